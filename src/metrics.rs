//! Every metric of the worker: names, labels, buckets and the recorder.
//!
//! Stages get handles, made once here, so that a hot path never looks a name
//! up and no name is written twice. Every series exists from the start, at
//! zero, and no label value comes from a request: cardinality is fixed.

pub mod access;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::engine::Graph;
use crate::error::{Error, Stage};

const REQUESTS: &str = "imagegpt_requests_total";
const REQUEST_DURATION: &str = "imagegpt_request_duration_seconds";
const IMAGES: &str = "imagegpt_images_total";
const IMAGES_DROPPED: &str = "imagegpt_images_dropped_total";
const IMAGES_IN_FLIGHT: &str = "imagegpt_images_in_flight";
const IMAGES_IN_FLIGHT_MAX: &str = "imagegpt_images_in_flight_max";
const DECODE_DURATION: &str = "imagegpt_decode_duration_seconds";
const QUANTIZE_DURATION: &str = "imagegpt_quantize_duration_seconds";
const QUEUE_DEPTH: &str = "imagegpt_queue_depth";
const QUEUE_DURATION: &str = "imagegpt_queue_duration_seconds";
const INFERENCE_DURATION: &str = "imagegpt_inference_duration_seconds";
const BATCH_SIZE: &str = "imagegpt_batch_size";
const BATCH_FILL: &str = "imagegpt_batch_fill_ratio";
const BATCHES: &str = "imagegpt_batches_total";
const READY: &str = "imagegpt_ready";
const MODEL_LOAD_DURATION: &str = "imagegpt_model_load_duration_seconds";
const MODEL_INFO: &str = "imagegpt_model_info";
const BUILD_INFO: &str = "imagegpt_build_info";

/// Powers of two from 15 microseconds to 4 minutes: stages differ by six
/// orders of magnitude between a 2 KiB token request on a GPU and a batch of
/// imagegpt-large on a CPU, and a factor of two locates a change well enough.
fn duration_buckets() -> Vec<f64> {
    (0..25)
        .map(|exponent| 15e-6 * f64::from(1 << exponent))
        .collect()
}

/// Powers of two up to the largest batch that a flag may ask for.
const BATCH_SIZE_BUCKETS: [f64; 11] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
];

/// Eighths: below 1 the engine ran with room to spare.
const FILL_BUCKETS: [f64; 8] = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0];

/// The RPC methods that are counted; anything else is `other`.
pub const METHODS: [&str; 6] = [
    "Embed",
    "EmbedStream",
    "Classify",
    "Tokenize",
    "GetModel",
    "other",
];

/// The codes that the worker or its gRPC library can answer with.
pub const CODES: [&str; 13] = [
    "OK",
    "CANCELLED",
    "UNKNOWN",
    "INVALID_ARGUMENT",
    "DEADLINE_EXCEEDED",
    "NOT_FOUND",
    "RESOURCE_EXHAUSTED",
    "FAILED_PRECONDITION",
    "OUT_OF_RANGE",
    "UNIMPLEMENTED",
    "INTERNAL",
    "UNAVAILABLE",
    "UNAUTHENTICATED",
];

/// Why a batch was formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Close {
    /// It had reached the largest size.
    Full,
    /// Its oldest image had waited the queue delay.
    Delay,
    /// The worker is shutting down and waits for nobody.
    Drain,
}

impl Close {
    const ALL: [Self; 3] = [Self::Full, Self::Delay, Self::Drain];

    fn label(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Delay => "delay",
            Self::Drain => "drain",
        }
    }
}

/// Handles to every metric. Cheap to clone.
#[derive(Clone)]
pub struct Metrics(Arc<Handles>);

struct Handles {
    recorder: PrometheusRecorder,
    prometheus: PrometheusHandle,
    requests: BTreeMap<(&'static str, &'static str), Counter>,
    request_duration: BTreeMap<&'static str, Histogram>,
    images: BTreeMap<&'static str, Counter>,
    dropped: BTreeMap<(&'static str, &'static str), Counter>,
    images_in_flight: Gauge,
    images_in_flight_max: Gauge,
    decode_duration: Histogram,
    quantize_duration: Histogram,
    queue_depth: Gauge,
    queue_duration: Histogram,
    inference_duration: BTreeMap<Graph, Histogram>,
    batch_size: BTreeMap<Graph, Histogram>,
    batch_fill: Histogram,
    batches: BTreeMap<Close, Counter>,
    ready: Gauge,
    model_load_duration: Gauge,
    access: access::AccessMetrics,
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

/// Makes handles in one recorder.
struct Registry<'a>(&'a PrometheusRecorder);

impl Registry<'_> {
    const METADATA: Metadata<'static> =
        Metadata::new("imagegpt", Level::INFO, Some(module_path!()));

    fn key(name: &'static str, labels: &[(&'static str, &'static str)]) -> Key {
        let labels: Vec<Label> = labels
            .iter()
            .map(|&(key, value)| Label::from_static_parts(key, value))
            .collect();
        Key::from_parts(name, labels)
    }

    fn counter(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Counter {
        let counter = self
            .0
            .register_counter(&Self::key(name, labels), &Self::METADATA);
        // Registering alone exports nothing; a series that appears with its
        // first event hides that event from rate().
        counter.increment(0);
        counter
    }

    fn gauge(&self, name: &'static str) -> Gauge {
        let gauge = self
            .0
            .register_gauge(&Self::key(name, &[]), &Self::METADATA);
        gauge.set(0.0);
        gauge
    }

    fn histogram(&self, name: &'static str, labels: &[(&'static str, &'static str)]) -> Histogram {
        self.0
            .register_histogram(&Self::key(name, labels), &Self::METADATA)
    }

    fn describe(&self) {
        let counters = [
            (REQUESTS, "Calls answered, by method and gRPC code."),
            (IMAGES, "Images answered, by the code of their own outcome."),
            (
                IMAGES_DROPPED,
                "Images dropped before they cost engine time, by reason and the stage they had reached.",
            ),
            (BATCHES, "Batches formed, by what closed them."),
        ];
        for (name, text) in counters.into_iter().chain(access::COUNTERS) {
            self.0
                .describe_counter(KeyName::from_const_str(name), None, text.into());
        }
        let gauges = [
            (IMAGES_IN_FLIGHT, "Images admitted and not yet answered."),
            (IMAGES_IN_FLIGHT_MAX, "The limit on images in flight."),
            (QUEUE_DEPTH, "Images that wait for the engine."),
            (READY, "1 while the worker serves, else 0."),
            (
                MODEL_LOAD_DURATION,
                "Seconds from start to a loaded and warmed model.",
            ),
            (MODEL_INFO, "1, labeled with the model that is served."),
            (BUILD_INFO, "1, labeled with the worker's version."),
        ];
        for (name, text) in gauges.into_iter().chain(access::GAUGES) {
            self.0
                .describe_gauge(KeyName::from_const_str(name), None, text.into());
        }
        let histograms = [
            (
                REQUEST_DURATION,
                Unit::Seconds,
                "Time from a call's arrival to its answer.",
            ),
            (
                DECODE_DURATION,
                Unit::Seconds,
                "Time to decode one encoded image.",
            ),
            (
                QUANTIZE_DURATION,
                Unit::Seconds,
                "Time to resize one image and find its color tokens.",
            ),
            (
                QUEUE_DURATION,
                Unit::Seconds,
                "Time an image waited for the engine after preprocessing.",
            ),
            (
                INFERENCE_DURATION,
                Unit::Seconds,
                "Time of one run of the model, by graph.",
            ),
            (BATCH_SIZE, Unit::Count, "Images in one run, by graph."),
            (
                BATCH_FILL,
                Unit::Count,
                "Images in one run divided by the largest batch size.",
            ),
        ];
        for (name, unit, text) in histograms {
            self.0
                .describe_histogram(KeyName::from_const_str(name), Some(unit), text.into());
        }
    }
}

impl Metrics {
    /// A recorder of its own, so that several workers can live in one process.
    ///
    /// # Errors
    ///
    /// Never in practice: only empty bucket lists are refused.
    pub fn new() -> anyhow::Result<Self> {
        let recorder = PrometheusBuilder::new()
            .set_buckets_for_metric(Matcher::Suffix("_seconds".into()), &duration_buckets())?
            .set_buckets_for_metric(Matcher::Full(BATCH_SIZE.into()), &BATCH_SIZE_BUCKETS)?
            .set_buckets_for_metric(Matcher::Full(BATCH_FILL.into()), &FILL_BUCKETS)?
            .build_recorder();
        let registry = Registry(&recorder);
        registry.describe();
        let mut requests = BTreeMap::new();
        for method in METHODS {
            for code in CODES {
                let labels = [("method", method), ("code", code)];
                requests.insert((method, code), registry.counter(REQUESTS, &labels));
            }
        }
        let mut dropped = BTreeMap::new();
        for reason in ["cancelled", "deadline"] {
            for stage in [Stage::Preprocess, Stage::Queue] {
                let labels = [("reason", reason), ("stage", stage.label())];
                dropped.insert(
                    (reason, stage.label()),
                    registry.counter(IMAGES_DROPPED, &labels),
                );
            }
        }
        let by_graph = |name| {
            Graph::ALL
                .iter()
                .map(|&graph| (graph, registry.histogram(name, &[("graph", graph.label())])))
                .collect()
        };
        registry
            .0
            .register_gauge(
                &Registry::key(BUILD_INFO, &[("version", env!("CARGO_PKG_VERSION"))]),
                &Registry::METADATA,
            )
            .set(1.0);
        let handles = Handles {
            prometheus: recorder.handle(),
            requests,
            request_duration: METHODS
                .iter()
                .map(|&method| {
                    let histogram = registry.histogram(REQUEST_DURATION, &[("method", method)]);
                    (method, histogram)
                })
                .collect(),
            images: CODES
                .iter()
                .map(|&code| (code, registry.counter(IMAGES, &[("code", code)])))
                .collect(),
            dropped,
            images_in_flight: registry.gauge(IMAGES_IN_FLIGHT),
            images_in_flight_max: registry.gauge(IMAGES_IN_FLIGHT_MAX),
            decode_duration: registry.histogram(DECODE_DURATION, &[]),
            quantize_duration: registry.histogram(QUANTIZE_DURATION, &[]),
            queue_depth: registry.gauge(QUEUE_DEPTH),
            queue_duration: registry.histogram(QUEUE_DURATION, &[]),
            inference_duration: by_graph(INFERENCE_DURATION),
            batch_size: by_graph(BATCH_SIZE),
            batch_fill: registry.histogram(BATCH_FILL, &[]),
            batches: Close::ALL
                .iter()
                .map(|&close| {
                    let counter = registry.counter(BATCHES, &[("close_reason", close.label())]);
                    (close, counter)
                })
                .collect(),
            ready: registry.gauge(READY),
            model_load_duration: registry.gauge(MODEL_LOAD_DURATION),
            access: access::AccessMetrics::new(&registry),
            recorder,
        };
        Ok(Self(Arc::new(handles)))
    }

    /// Connections, certificates and tokens.
    #[must_use]
    pub fn access(&self) -> &access::AccessMetrics {
        &self.0.access
    }

    /// The exposition format that Prometheus scrapes.
    #[must_use]
    pub fn render(&self) -> String {
        self.upkeep();
        self.0.prometheus.render()
    }

    /// Folds what histograms have gathered, as rendering does.
    pub fn upkeep(&self) {
        self.0.prometheus.run_upkeep();
    }

    /// A call was answered.
    pub fn request(&self, method: &'static str, code: &'static str, elapsed: Duration) {
        if let Some(counter) = self.0.requests.get(&(method, code)) {
            counter.increment(1);
        }
        if let Some(histogram) = self.0.request_duration.get(method) {
            histogram.record(elapsed);
        }
    }

    /// An image of a call has its outcome.
    pub fn image(&self, code: &'static str) {
        if let Some(counter) = self.0.images.get(code) {
            counter.increment(1);
        }
    }

    /// An image was dropped before it cost any work, for this error.
    pub fn dead(&self, error: &Error) {
        match error {
            Error::Cancelled { stage } => self.dropped("cancelled", *stage),
            Error::DeadlineExceeded { stage } => self.dropped("deadline", *stage),
            _ => {}
        }
    }

    fn dropped(&self, reason: &'static str, stage: Stage) {
        if let Some(counter) = self.0.dropped.get(&(reason, stage.label())) {
            counter.increment(1);
        }
    }

    /// How much of the capacity is in use.
    pub fn in_flight(&self, images: usize, max: usize) {
        self.0.images_in_flight.set(as_f64(images));
        self.0.images_in_flight_max.set(as_f64(max));
    }

    /// One image was decoded, resized and quantized.
    pub fn preprocessed(&self, decode: Option<Duration>, quantize: Option<Duration>) {
        if let Some(decode) = decode {
            self.0.decode_duration.record(decode);
        }
        if let Some(quantize) = quantize {
            self.0.quantize_duration.record(quantize);
        }
    }

    /// Images now wait for the engine.
    pub fn queue_depth(&self, images: usize) {
        self.0.queue_depth.set(as_f64(images));
    }

    /// One image left the queue for the engine.
    pub fn queued(&self, waited: Duration) {
        self.0.queue_duration.record(waited);
    }

    /// A batch was formed.
    pub fn batch(&self, graph: Graph, size: usize, size_max: usize, close: Close) {
        if let Some(histogram) = self.0.batch_size.get(&graph) {
            histogram.record(as_f64(size));
        }
        self.0.batch_fill.record(as_f64(size) / as_f64(size_max));
        if let Some(counter) = self.0.batches.get(&close) {
            counter.increment(1);
        }
    }

    /// The engine ran a batch.
    pub fn inference(&self, graph: Graph, elapsed: Duration) {
        if let Some(histogram) = self.0.inference_duration.get(&graph) {
            histogram.record(elapsed);
        }
    }

    /// The worker began or ceased to serve.
    pub fn ready(&self, ready: bool) {
        self.0.ready.set(if ready { 1.0 } else { 0.0 });
    }

    /// A model was loaded and warmed.
    pub fn model_loaded(&self, name: &str, digest: &str, provider: &str, elapsed: Duration) {
        self.0.model_load_duration.set(elapsed.as_secs_f64());
        let labels = vec![
            Label::new("name", name.to_owned()),
            Label::new("digest", digest.to_owned()),
            Label::new("execution_provider", provider.to_owned()),
        ];
        self.0
            .recorder
            .register_gauge(&Key::from_parts(MODEL_INFO, labels), &Registry::METADATA)
            .set(1.0);
    }
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of images stay far below 2^52"
)]
fn as_f64(count: usize) -> f64 {
    count as f64
}
