//! Traces in OpenTelemetry: spans of calls and batches, sent to a collector
//! over OTLP.
//!
//! A call's times come from threads that are not the call's own and are known
//! when the call ends, so spans are made then, from those times, and not while
//! the call runs. The library samples, makes ids and speaks the collector's
//! protocol; the queue before it is the worker's own, because it must count
//! what it drops. Nothing here blocks: a span that finds the queue full is
//! dropped and counted, as are spans that the collector does not take.

mod export;
mod headers;
mod state;

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Instant, SystemTime};

use opentelemetry::propagation::{Extractor, TextMapPropagator as _};
use opentelemetry::trace::{
    Link, SpanContext, SpanId, SpanKind, Status, TraceContextExt as _, TraceFlags, TraceId,
    TraceState,
};
use opentelemetry::{Context, InstrumentationScope, KeyValue, Value};
use opentelemetry_sdk::propagation::TraceContextPropagator;
use opentelemetry_sdk::trace::{
    IdGenerator, RandomIdGenerator, Sampler, SamplingDecision, ShouldSample as _, SpanData,
    SpanEvents, SpanLinks,
};
use tokio::sync::mpsc;

use crate::serve::config::TraceConfig;
use crate::serve::metrics::Metrics;
use crate::serve::metrics::trace::SpanDrop;

pub(crate) use self::export::SpanExport;
pub(crate) use self::state::tracestate;
pub(crate) use opentelemetry::KeyValue as SpanAttribute;
pub(crate) use opentelemetry::trace::SpanContext as SpanLink;

/// Most calls and batches whose spans wait to be sent.
const UNITS_MAX: usize = 4096;
/// Most bytes of the spans that wait, by [`weight`]: about a thousand calls, or
/// two hundred streams with all their events.
const BYTES_MAX: usize = 4 << 20;
/// Most calls that the span of one batch names: as many as the largest batch
/// has on a CPU; a span with more links is cut by many collectors (128 is the
/// default limit of the specification).
const LINKS_MAX: usize = 128;

/// Handle with which stages make spans; makes none without a collector. Cheap
/// to clone.
#[derive(Debug, Clone, Default)]
pub(crate) struct Traces(Option<Arc<Tracing>>);

#[derive(Debug)]
struct Tracing {
    sampler: Sampler,
    ids: RandomIdGenerator,
    scope: InstrumentationScope,
    units: mpsc::Sender<SpanUnit>,
    /// Weight of the spans that wait.
    n_bytes: Arc<AtomicUsize>,
    metrics: Metrics,
}

/// Spans that are sent or dropped together: those of one call, so that no child
/// is without its parent, or that of one batch.
#[derive(Debug)]
struct SpanUnit {
    spans: Vec<SpanData>,
    weight: usize,
}

/// Estimate of the bytes that a span takes in memory, which are more than those
/// of its message.
fn weight(span: &SpanData) -> usize {
    /// A span, an event or a link without what it holds.
    const BASE: usize = 256;
    /// An attribute without its text.
    const PAIR: usize = 96;
    let pairs = |pairs: &[KeyValue]| -> usize {
        let text = |pair: &KeyValue| match &pair.value {
            Value::String(text) => text.as_str().len(),
            _ => 0,
        };
        pairs.iter().map(|pair| PAIR + text(pair)).sum()
    };
    let events = span.events.events.iter();
    let events: usize = events.map(|event| BASE + pairs(&event.attributes)).sum();
    let state = span.span_context.trace_state().header().len();
    let name = span.name.len();
    BASE + name + state + pairs(&span.attributes) + events + BASE * span.links.links.len()
}

/// Headers of a call that say to which trace the call belongs.
#[derive(Debug, Clone, Default)]
pub(crate) struct TraceHeaders<'a> {
    /// Value of `traceparent`, whose form was checked.
    pub traceparent: Option<&'a str>,
    /// List of `tracestate`, whose form was checked.
    pub tracestate: Option<String>,
}

impl Extractor for TraceHeaders<'_> {
    fn get(&self, key: &str) -> Option<&str> {
        match key {
            "traceparent" => self.traceparent,
            "tracestate" => self.tracestate.as_deref(),
            _ => None,
        }
    }

    fn keys(&self) -> Vec<&str> {
        vec!["traceparent", "tracestate"]
    }
}

impl Traces {
    /// Returns a handle and the task that sends spans, if a collector is
    /// configured.
    ///
    /// # Errors
    ///
    /// Fails if the endpoint or its certificates cannot be used.
    pub(crate) fn start(
        config: &TraceConfig,
        metrics: &Metrics,
    ) -> anyhow::Result<(Self, Option<SpanExport>)> {
        let Some(exporter) = export::exporter(config)? else {
            return Ok((Self::default(), None));
        };
        headers::warn_of_lost();
        let (units, waiting) = mpsc::channel(UNITS_MAX);
        let n_bytes = Arc::<AtomicUsize>::default();
        let ratio = Sampler::TraceIdRatioBased(config.otlp_sample_ratio);
        let tracing = Tracing {
            sampler: Sampler::ParentBased(Box::new(ratio)),
            ids: RandomIdGenerator::default(),
            scope: InstrumentationScope::builder(env!("CARGO_PKG_NAME"))
                .with_version(env!("CARGO_PKG_VERSION"))
                .build(),
            units,
            n_bytes: Arc::clone(&n_bytes),
            metrics: metrics.clone(),
        };
        let export = SpanExport::start(exporter, waiting, n_bytes, metrics.clone());
        Ok((Self(Some(Arc::new(tracing))), Some(export)))
    }

    /// Begins the span of a call, as a child of the span that the headers name;
    /// none if the call is not sampled.
    pub(crate) fn call<'a>(
        &self,
        headers: impl FnOnce() -> TraceHeaders<'a>,
        name: &str,
    ) -> Option<CallSpan> {
        let tracing = self.0.as_ref()?;
        let headers = headers();
        let context = headers
            .traceparent
            .map(|_| TraceContextPropagator::new().extract_with_context(&Context::new(), &headers));
        let parent = context
            .as_ref()
            .map(|context| context.span().span_context().clone());
        let parent = parent.filter(SpanContext::is_valid);
        let trace_id = match &parent {
            Some(parent) => parent.trace_id(),
            None => tracing.ids.new_trace_id(),
        };
        let sampled = tracing.sampler.should_sample(
            context.as_ref().filter(|_| parent.is_some()),
            trace_id,
            name,
            &SpanKind::Server,
            &[],
            &[],
        );
        if sampled.decision != SamplingDecision::RecordAndSample {
            return None;
        }
        let is_by_parent_alone = parent.is_some() && !tracing.samples_by_ratio(trace_id, name);
        let context = SpanContext::new(
            trace_id,
            tracing.ids.new_span_id(),
            TraceFlags::SAMPLED,
            false,
            sampled.trace_state,
        );
        Some(CallSpan {
            is_by_parent_alone,
            parent: parent.map_or(SpanId::INVALID, |parent| parent.span_id()),
            context,
            tracing: Arc::clone(tracing),
        })
    }

    /// Begins the span of a batch; none without a collector. The span is sent
    /// only if a sampled call takes part in the batch.
    pub(crate) fn batch(&self, content: BatchContent) -> Option<Arc<BatchSpan>> {
        let tracing = self.0.as_ref()?;
        Some(Arc::new(BatchSpan {
            content,
            links: Mutex::default(),
            tracing: Arc::clone(tracing),
        }))
    }
}

impl Tracing {
    /// Queues spans, or drops and counts them if too many wait.
    fn send(&self, spans: Vec<SpanData>) {
        let weight = spans.iter().map(weight).sum();
        let n_spans = spans.len();
        let before = self.n_bytes.fetch_add(weight, Ordering::Relaxed);
        let fits = before + weight <= BYTES_MAX;
        if !fits || self.units.try_send(SpanUnit { spans, weight }).is_err() {
            self.n_bytes.fetch_sub(weight, Ordering::Relaxed);
            self.metrics.trace().dropped(SpanDrop::Queue, n_spans);
        }
    }

    /// True if a call is sampled whatever its caller says.
    fn samples_by_ratio(&self, trace_id: TraceId, name: &str) -> bool {
        let kind = SpanKind::Server;
        let sampled = self
            .sampler
            .should_sample(None, trace_id, name, &kind, &[], &[]);
        sampled.decision == SamplingDecision::RecordAndSample
    }

    /// Context of a span within a sampled trace. The caller's `tracestate` is
    /// in the call's own span alone.
    fn within(&self, trace_id: TraceId) -> SpanContext {
        SpanContext::new(
            trace_id,
            self.ids.new_span_id(),
            TraceFlags::SAMPLED,
            false,
            TraceState::default(),
        )
    }

    fn span(
        &self,
        context: SpanContext,
        name: impl Into<std::borrow::Cow<'static, str>>,
        times: (SystemTime, SystemTime),
    ) -> SpanData {
        SpanData {
            span_context: context,
            parent_span_id: SpanId::INVALID,
            parent_span_is_remote: false,
            span_kind: SpanKind::Internal,
            name: name.into(),
            start_time: times.0,
            end_time: times.1.max(times.0),
            attributes: Vec::new(),
            dropped_attributes_count: 0,
            events: SpanEvents::default(),
            links: SpanLinks::default(),
            status: Status::Unset,
            instrumentation_scope: self.scope.clone(),
        }
    }
}

/// Converter of times of the process's clock to times of the calendar, by one
/// moment that is known in both.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Calendar {
    instant: Instant,
    time: SystemTime,
}

impl Calendar {
    pub(crate) fn now(instant: Instant) -> Self {
        Self {
            instant,
            time: SystemTime::now(),
        }
    }

    fn time(&self, instant: Instant) -> SystemTime {
        match instant.checked_duration_since(self.instant) {
            Some(after) => self.time + after,
            None => self.time - self.instant.duration_since(instant),
        }
    }
}

/// Span of a sampled call.
#[derive(Debug)]
pub(crate) struct CallSpan {
    context: SpanContext,
    /// Id of the span in the caller that made the call.
    parent: SpanId,
    /// True if the call is sampled only because its caller says so.
    is_by_parent_alone: bool,
    tracing: Arc<Tracing>,
}

/// Part of a call with its own span, or an event of the call's span.
#[derive(Debug)]
pub(crate) struct CallPart {
    pub name: &'static str,
    pub began: Instant,
    pub ended: Instant,
    pub attributes: Vec<SpanAttribute>,
    /// Span of the batch in which the part took place.
    pub batch: Option<SpanContext>,
}

/// Content of a call's span, known when the call has ended.
#[derive(Debug)]
pub(crate) struct CallContent {
    pub name: String,
    pub calendar: Calendar,
    pub began: Instant,
    pub ended: Instant,
    pub attributes: Vec<SpanAttribute>,
    /// Reason for which the call counts as failed by the worker.
    pub failure: Option<&'static str>,
    /// Parts that follow each other; each becomes a child.
    pub parts: Vec<CallPart>,
    /// Parts that may overlap; each becomes an event at its end.
    pub events: Vec<CallPart>,
    /// Number of events that were left out.
    pub n_events_left_out: u64,
}

impl CallSpan {
    /// Returns the id of the call's trace, in 32 hexadecimal digits.
    pub(crate) fn trace_id(&self) -> String {
        self.context.trace_id().to_string()
    }

    /// True if the call is sampled only because its caller says so.
    pub(crate) fn is_by_parent_alone(&self) -> bool {
        self.is_by_parent_alone
    }

    /// Sends the span with its children.
    pub(crate) fn end(&self, content: CallContent) {
        let tracing = &self.tracing;
        let mut spans = Vec::with_capacity(content.parts.len() + 1);
        let calendar = content.calendar;
        let times = |began, ended| (calendar.time(began), calendar.time(ended));
        for part in content.parts {
            let context = tracing.within(self.context.trace_id());
            let mut child = tracing.span(context, part.name, times(part.began, part.ended));
            child.parent_span_id = self.context.span_id();
            child.attributes = part.attributes;
            child.links.links.extend(part.batch.map(Link::with_context));
            spans.push(child);
        }
        let mut span = tracing.span(
            self.context.clone(),
            content.name,
            times(content.began, content.ended),
        );
        span.parent_span_id = self.parent;
        span.parent_span_is_remote = self.parent != SpanId::INVALID;
        span.span_kind = SpanKind::Server;
        span.attributes = content.attributes;
        span.events.dropped_count = u32::try_from(content.n_events_left_out).unwrap_or(u32::MAX);
        for event in content.events {
            let time = calendar.time(event.ended);
            let event = opentelemetry::trace::Event::new(event.name, time, event.attributes, 0);
            span.events.events.push(event);
        }
        if let Some(failure) = content.failure {
            span.status = Status::error(failure);
        }
        spans.push(span);
        tracing.send(spans);
    }
}

/// Span of one batch, which links to the sampled calls that took part. Sent
/// when its last holder drops it, if there are such calls.
#[derive(Debug)]
pub(crate) struct BatchSpan {
    content: BatchContent,
    links: Mutex<Option<BatchLinks>>,
    tracing: Arc<Tracing>,
}

/// Links of a batch's span, once there is a sampled call.
#[derive(Debug)]
struct BatchLinks {
    context: SpanContext,
    links: Vec<Link>,
    n_left_out: u32,
}

/// Content of a batch's span.
#[derive(Debug, Clone, Copy)]
pub(crate) struct BatchContent {
    pub began: Instant,
    pub ended: Instant,
    /// Name of the graph that was run.
    pub graph: &'static str,
    /// Index of the device among the worker's.
    pub device: usize,
    pub n_images: usize,
    /// Size of the run in rows, padding included.
    pub bucket: usize,
}

impl BatchSpan {
    fn lock(&self) -> std::sync::MutexGuard<'_, Option<BatchLinks>> {
        // Nothing below can panic halfway through a change.
        self.links.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Links the batch to a sampled call; returns the batch's own context, for
    /// the link back.
    pub(crate) fn link(&self, call: &CallSpan) -> SpanContext {
        let mut links = self.lock();
        let links = links.get_or_insert_with(|| BatchLinks {
            context: self.tracing.within(self.tracing.ids.new_trace_id()),
            links: Vec::new(),
            n_left_out: 0,
        });
        let id = call.context.span_id();
        let is_linked = |link: &Link| link.span_context.span_id() == id;
        // A call has one link, however many of its images are in the batch.
        if !links.links.iter().any(is_linked) {
            if links.links.len() < LINKS_MAX {
                let context = SpanContext::new(
                    call.context.trace_id(),
                    id,
                    TraceFlags::SAMPLED,
                    false,
                    TraceState::default(),
                );
                links.links.push(Link::with_context(context));
            } else {
                links.n_left_out += 1;
            }
        }
        links.context.clone()
    }
}

impl Drop for BatchSpan {
    fn drop(&mut self) {
        let Some(links) = self.lock().take() else {
            return;
        };
        let content = self.content;
        let calendar = Calendar::now(Instant::now());
        let times = (calendar.time(content.began), calendar.time(content.ended));
        let mut span = self.tracing.span(links.context, "batch", times);
        span.attributes = vec![
            KeyValue::new("imagegpt.graph", content.graph),
            number("imagegpt.device", content.device),
            number("imagegpt.images", content.n_images),
            number("imagegpt.batch_size", content.bucket),
        ];
        span.links.links = links.links;
        span.links.dropped_count = links.n_left_out;
        self.tracing.send(vec![span]);
    }
}

/// Returns an attribute with a number.
pub(crate) fn number(name: &'static str, value: usize) -> SpanAttribute {
    KeyValue::new(name, i64::try_from(value).unwrap_or(i64::MAX))
}
