//! Task that sends spans to the collector.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use anyhow::Context as _;
use opentelemetry_otlp::tonic_types::transport::{Certificate, ClientTlsConfig};
use opentelemetry_otlp::{SpanExporter, WithExportConfig as _, WithTonicConfig as _};
use opentelemetry_sdk::Resource;
use opentelemetry_sdk::trace::{SpanData, SpanExporter as _};
use tokio::sync::{mpsc, oneshot};
use tokio_rustls::rustls::pki_types::CertificateDer;
use tokio_rustls::rustls::pki_types::pem::PemObject as _;

use super::SpanUnit;
use crate::serve::config::TraceConfig;
use crate::serve::metrics::Metrics;
use crate::serve::metrics::trace::SpanDrop;

/// Most spans in one message to the collector.
const BATCH_MAX: usize = 512;
/// Weight at which a message is sent: with the largest unit after it, a half of
/// the largest message that collectors take by default (4 MiB).
const MESSAGE_BYTES: usize = 1 << 20;
/// Time in which spans gather before they are sent, so that a busy worker does
/// not send a message per call.
const GATHER: Duration = Duration::from_secs(1);
/// Longest time for the collector to take one message; while it takes none, the
/// queue fills up, and further spans are dropped.
const EXPORT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longest time for the last spans when the worker ends. A collector that is
/// there needs milliseconds.
const FLUSH_MAX: Duration = Duration::from_secs(2);
/// Variable with attributes of the process.
const RESOURCE_ATTRIBUTES: &str = "OTEL_RESOURCE_ATTRIBUTES";
/// Attribute with the name of the service.
const SERVICE_NAME: &str = "service.name";

/// Returns the exporter for the configured collector, if there is one.
pub(super) fn exporter(config: &TraceConfig) -> anyhow::Result<Option<SpanExporter>> {
    let Some(endpoint) = &config.otlp_endpoint else {
        return Ok(None);
    };
    let mut builder = SpanExporter::builder()
        .with_tonic()
        .with_endpoint(endpoint.as_str())
        .with_timeout(EXPORT_TIMEOUT);
    if endpoint.starts_with("https://") {
        let mut tls = ClientTlsConfig::new();
        tls = match &config.otlp_ca {
            Some(path) => tls.ca_certificate(authorities(path)?),
            None => tls.with_webpki_roots(),
        };
        builder = builder.with_tls_config(tls);
    }
    let mut exporter = builder
        .build()
        .with_context(|| format!("--otlp-endpoint {endpoint} cannot be used"))?;
    warn_of_attributes(std::env::var_os(RESOURCE_ATTRIBUTES));
    exporter.set_resource(&resource());
    Ok(Some(exporter))
}

/// Reads certificates of authorities.
fn authorities(path: &Path) -> anyhow::Result<Certificate> {
    let flag = || format!("--otlp-ca {}", path.display());
    let pem = std::fs::read(path).with_context(|| format!("{} cannot be read", flag()))?;
    let mut n_certificates = 0;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.with_context(|| format!("{} is not PEM", flag()))?;
        x509_parser::parse_x509_certificate(&certificate)
            .with_context(|| format!("{} has a certificate that cannot be read", flag()))?;
        n_certificates += 1;
    }
    anyhow::ensure!(
        n_certificates > 0,
        "{} has no certificate; give those of the authorities in PEM",
        flag()
    );
    Ok(Certificate::from_pem(pem))
}

/// Warns of what the library leaves out of `OTEL_RESOURCE_ATTRIBUTES`.
fn warn_of_attributes(given: Option<std::ffi::OsString>) {
    let Some(given) = given else {
        return;
    };
    match given.to_str() {
        None => tracing::warn!(
            "{RESOURCE_ATTRIBUTES} is not UTF-8 and is left out; write KEY=VALUE, and commas \
             between several"
        ),
        Some(text) => {
            for part in malformed(text) {
                tracing::warn!(
                    part,
                    "a part of {RESOURCE_ATTRIBUTES} is not KEY=VALUE and is left out"
                );
            }
        }
    }
}

/// Returns the parts of a list of attributes that are no attributes.
fn malformed(text: &str) -> impl Iterator<Item = &str> {
    let parts = text.split(',').map(str::trim);
    parts.filter(|part| !part.is_empty() && !part.contains('='))
}

/// Returns the attributes of the process: those of OTEL_RESOURCE_ATTRIBUTES and
/// OTEL_SERVICE_NAME, and the worker's own where these say nothing.
fn resource() -> Resource {
    let given = Resource::builder().build();
    let name = given.get(&SERVICE_NAME.into());
    let mut builder = Resource::builder();
    if name.is_none_or(|name| name.as_str().starts_with("unknown_service")) {
        builder = builder.with_service_name(env!("CARGO_PKG_NAME"));
    }
    if given.get(&"service.version".into()).is_none() {
        let version = opentelemetry::KeyValue::new("service.version", env!("CARGO_PKG_VERSION"));
        builder = builder.with_attribute(version);
    }
    builder.build()
}

/// Task that sends spans, and its end.
#[derive(Debug)]
pub(crate) struct SpanExport {
    task: tokio::task::JoinHandle<()>,
    stop: oneshot::Sender<()>,
}

impl SpanExport {
    pub(super) fn start(
        exporter: SpanExporter,
        waiting: mpsc::Receiver<SpanUnit>,
        n_bytes: Arc<AtomicUsize>,
        metrics: Metrics,
    ) -> Self {
        let (stop, stopped) = oneshot::channel();
        let queue = SpanQueue { waiting, n_bytes };
        let task = tokio::spawn(run(exporter, queue, metrics, stopped));
        Self { task, stop }
    }

    /// Sends the spans that wait, for two seconds at most, and ends.
    pub(crate) async fn end(self) {
        let _ = self.stop.send(());
        let mut task = self.task;
        if tokio::time::timeout(FLUSH_MAX, &mut task).await.is_err() {
            task.abort();
        }
    }
}

async fn run(
    exporter: SpanExporter,
    mut queue: SpanQueue,
    metrics: Metrics,
    mut stopped: oneshot::Receiver<()>,
) {
    let mut collector = Collector {
        exporter,
        metrics,
        is_away: false,
    };
    loop {
        let mut message = Message::default();
        let is_last = tokio::select! {
            // An error means that the worker was dropped without a shutdown.
            _ = &mut stopped => true,
            () = queue.gather(&mut message) => false,
        };
        if is_last {
            break collector.send_rest(message, &mut queue).await;
        }
        collector.send(message.spans).await;
    }
}

/// Spans of one message, which have left the queue.
#[derive(Default)]
struct Message {
    spans: Vec<SpanData>,
    weight: usize,
}

impl Message {
    fn is_full(&self) -> bool {
        self.spans.len() >= BATCH_MAX || self.weight >= MESSAGE_BYTES
    }
}

/// End of the queue from which spans are sent.
struct SpanQueue {
    waiting: mpsc::Receiver<SpanUnit>,
    n_bytes: Arc<AtomicUsize>,
}

impl SpanQueue {
    fn add(&self, unit: SpanUnit, message: &mut Message) {
        self.n_bytes.fetch_sub(unit.weight, Ordering::Relaxed);
        message.weight += unit.weight;
        message.spans.extend(unit.spans);
    }

    /// Takes spans until a message is full or the first has waited for long
    /// enough.
    async fn gather(&mut self, message: &mut Message) {
        let Some(first) = self.waiting.recv().await else {
            // The stages are gone; what follows is the stop.
            return std::future::pending().await;
        };
        self.add(first, message);
        let late = tokio::time::sleep(GATHER);
        let mut late = std::pin::pin!(late);
        while !message.is_full() {
            tokio::select! {
                () = &mut late => return,
                unit = self.waiting.recv() => match unit {
                    Some(unit) => self.add(unit, message),
                    None => return,
                },
            }
        }
    }

    /// Fills a message with what waits at present.
    fn fill(&mut self, message: &mut Message) {
        while !message.is_full()
            && let Ok(unit) = self.waiting.try_recv()
        {
            self.add(unit, message);
        }
    }
}

struct Collector {
    exporter: SpanExporter,
    metrics: Metrics,
    /// True if the last message was not taken, so that the log has one line per
    /// change and not one per message.
    is_away: bool,
}

impl Collector {
    /// Sends the spans that wait when the worker ends.
    async fn send_rest(mut self, mut message: Message, queue: &mut SpanQueue) {
        loop {
            queue.fill(&mut message);
            if message.spans.is_empty() {
                return;
            }
            self.send(std::mem::take(&mut message).spans).await;
        }
    }

    async fn send(&mut self, batch: Vec<SpanData>) {
        let n_spans = batch.len();
        let sent = tokio::time::timeout(EXPORT_TIMEOUT, self.exporter.export(batch)).await;
        let error = match sent {
            Ok(Ok(())) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("no answer within {} s", EXPORT_TIMEOUT.as_secs())),
        };
        match error {
            None => {
                self.metrics.trace().exported(n_spans);
                if std::mem::take(&mut self.is_away) {
                    tracing::info!("the OTLP collector takes spans again");
                }
            }
            Some(error) => {
                self.metrics.trace().dropped(SpanDrop::Collector, n_spans);
                if !std::mem::replace(&mut self.is_away, true) {
                    tracing::warn!(
                        error,
                        "the OTLP collector takes no spans; they are dropped and counted until it does"
                    );
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_that_are_no_attributes_are_found() {
        let check = |text: &str, expected: &[&str]| {
            assert_eq!(malformed(text).collect::<Vec<_>>(), expected, "{text}");
        };
        check("", &[]);
        check("a=b, c = d,e=,", &[]);
        check("a", &["a"]);
        check("a=b,, b c ,d", &["b c", "d"]);
    }
}
