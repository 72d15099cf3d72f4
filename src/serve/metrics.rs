//! Every metric of the worker: names, labels, buckets and the recorder.
//!
//! Stages get handles, made once here, so that a hot path never looks a name
//! up and no name is written twice. Every series exists from the start, at
//! zero, but for the model's and the GPUs', and no label value comes from a
//! request: cardinality is fixed.

pub mod access;
pub mod generation;
pub mod gpu;
pub mod totals;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, Key, KeyName, Label, Level, Metadata, Recorder, Unit};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use crate::engine::FallbackKind;
use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::error::{Error, RequestStage};

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
const ENGINE_GAP: &str = "imagegpt_engine_gap_seconds";
const BATCH_SIZE: &str = "imagegpt_batch_size";
const BATCH_FILL: &str = "imagegpt_batch_fill_ratio";
const BATCHES: &str = "imagegpt_batches_total";
const BATCH_SIZE_MAX: &str = "imagegpt_batch_size_max";
const ENGINE_FALLBACK: &str = "imagegpt_engine_fallback";
const BATCH_PADDING: &str = "imagegpt_batch_padding_images_total";
const COALESCED: &str = "imagegpt_images_coalesced_total";
const ANSWERS_NOT_TAKEN: &str = "imagegpt_answers_not_taken_total";
const CACHE_LOOKUPS: &str = "imagegpt_cache_lookups_total";
const CACHE_BYTES: &str = "imagegpt_cache_bytes";
const STREAMS: &str = "imagegpt_streams";
const BYTES_IN_FLIGHT: &str = "imagegpt_bytes_in_flight";
const BYTES_IN_FLIGHT_MAX: &str = "imagegpt_bytes_in_flight_max";
const DRAIN_RATE: &str = "imagegpt_drain_rate_images_per_second";
const ENGINE_FAULTS: &str = "imagegpt_engine_faults_total";
const RUNS_STOPPED: &str = "imagegpt_runs_stopped_total";
const CANARIES: &str = "imagegpt_canary_runs_total";
const DEVICE_UP: &str = "imagegpt_device_up";
const LOG_LINES_DROPPED: &str = "imagegpt_log_lines_dropped_total";
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
pub const METHODS: [&str; 18] = [
    "Embed",
    "EmbedStream",
    "Classify",
    "Score",
    "Generate",
    "Tokenize",
    "GetModel",
    // The Open Inference Protocol's.
    "ServerLive",
    "ServerReady",
    "ServerMetadata",
    "ModelReady",
    "ModelMetadata",
    "ModelInfer",
    "ModelStreamInfer",
    "ModelConfig",
    "ModelStatistics",
    "RepositoryIndex",
    "other",
];

/// Those whose calls are inference, answered one by one.
const INFERENCE: [&str; 5] = ["Embed", "Classify", "Score", "Tokenize", "ModelInfer"];

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
pub enum BatchClose {
    /// It had reached the size that the engine is fastest at.
    Full,
    /// Its oldest image had waited the queue delay.
    Delay,
    /// The engine was about to run something anyway, so waiting for company
    /// would have meant waiting for that.
    Turn,
    /// The worker is shutting down and waits for nobody.
    Drain,
}

impl BatchClose {
    const ALL: [Self; 4] = [Self::Full, Self::Delay, Self::Turn, Self::Drain];

    fn label(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Delay => "delay",
            Self::Turn => "turn",
            Self::Drain => "drain",
        }
    }
}

/// What went wrong in the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EngineFault {
    /// A run failed.
    Run,
    /// Memory did not suffice for a batch.
    OutOfMemory,
    /// The device can do no more.
    Device,
    /// The engine panicked.
    Panic,
}

impl EngineFault {
    const ALL: [Self; 4] = [Self::Run, Self::OutOfMemory, Self::Device, Self::Panic];

    fn label(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::OutOfMemory => "out_of_memory",
            Self::Device => "device",
            Self::Panic => "panic",
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
    streams: Gauge,
    bytes_in_flight: Gauge,
    bytes_in_flight_max: Gauge,
    queue_depth: BTreeMap<Priority, Gauge>,
    queue_duration: BTreeMap<Priority, Histogram>,
    batch_size_max: Gauge,
    engine_fallback: BTreeMap<&'static str, Gauge>,
    /// What that gauge shows, since gauges cannot be read.
    batch_size_smallest: AtomicUsize,
    batch_padding: Counter,
    coalesced: Counter,
    answers_not_taken: Counter,
    cache_lookups: BTreeMap<bool, Counter>,
    cache_bytes: Gauge,
    drain_rate: Gauge,
    engine_faults: BTreeMap<EngineFault, Counter>,
    runs_stopped: Counter,
    canaries: BTreeMap<bool, Counter>,
    inference_duration: BTreeMap<Graph, Histogram>,
    batch_size: BTreeMap<Graph, Histogram>,
    batch_fill: Histogram,
    batches: BTreeMap<BatchClose, Counter>,
    log_lines_dropped: Counter,
    ready: Gauge,
    model_load_duration: Gauge,
    access: access::AccessMetrics,
    generation: generation::GenerationMetrics,
    totals: totals::Totals,
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

    fn key(name: &'static str, labels: &Labels) -> Key {
        let labels: Vec<Label> = labels
            .iter()
            .map(|&(key, value)| Label::from_static_parts(key, value))
            .collect();
        Key::from_parts(name, labels)
    }

    fn counter(&self, name: &'static str, labels: &Labels) -> Counter {
        let counter = self
            .0
            .register_counter(&Self::key(name, labels), &Self::METADATA);
        // Registering alone exports nothing; a series that appears with its
        // first event hides that event from rate().
        counter.increment(0);
        counter
    }

    fn gauge(&self, name: &'static str, labels: &Labels) -> Gauge {
        let gauge = self
            .0
            .register_gauge(&Self::key(name, labels), &Self::METADATA);
        gauge.set(0.0);
        gauge
    }

    fn histogram(&self, name: &'static str, labels: &Labels) -> Histogram {
        self.0
            .register_histogram(&Self::key(name, labels), &Self::METADATA)
    }

    fn describe(&self) {
        let counters = [
            (REQUESTS, "Calls answered, by method and gRPC code."),
            (IMAGES, "Images answered, by the code of their own outcome."),
            (
                IMAGES_DROPPED,
                "Images dropped before they had an answer, by reason and the stage they had reached.",
            ),
            (BATCHES, "Batches formed, by what closed them."),
            (BATCH_PADDING, "Rows that were run to fill a batch size."),
            (
                COALESCED,
                "Images that shared another one's run because they were the same.",
            ),
            (
                ANSWERS_NOT_TAKEN,
                "Answers that were given up because their client did not take them.",
            ),
            (CACHE_LOOKUPS, "Images looked for in the cache, by result."),
            (ENGINE_FAULTS, "Runs of the model that failed, by kind."),
            (
                RUNS_STOPPED,
                "Runs that were stopped because nobody waited for them any more.",
            ),
            (CANARIES, "Checks of an idle engine, by result."),
            (
                LOG_LINES_DROPPED,
                "Log lines that could not be written to standard error, or not fast enough.",
            ),
        ];
        let counters = counters
            .into_iter()
            .chain(access::COUNTERS)
            .chain(generation::COUNTERS);
        for (name, text) in counters {
            self.0
                .describe_counter(KeyName::from_const_str(name), None, text.into());
        }
        self.describe_gauges();
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
            (
                ENGINE_GAP,
                Unit::Seconds,
                "Time a device had nothing to run before a run that was already possible.",
            ),
            (BATCH_SIZE, Unit::Count, "Images in one run, by graph."),
            (
                BATCH_FILL,
                Unit::Count,
                "Images in one run divided by the size that it ran at.",
            ),
        ];
        for (name, unit, text) in histograms {
            self.0
                .describe_histogram(KeyName::from_const_str(name), Some(unit), text.into());
        }
    }

    fn describe_gauges(&self) {
        let gauges = [
            (IMAGES_IN_FLIGHT, "Images admitted and not yet answered."),
            (IMAGES_IN_FLIGHT_MAX, "The limit on images in flight."),
            (BYTES_IN_FLIGHT, "Bytes that requests and answers hold."),
            (BYTES_IN_FLIGHT_MAX, "The limit on bytes in flight."),
            (STREAMS, "Streams that are open."),
            (QUEUE_DEPTH, "Images that wait for the engine, by class."),
            (
                BATCH_SIZE_MAX,
                "The largest batch that every device takes; below --max-batch-size after memory ran out.",
            ),
            (CACHE_BYTES, "Bytes of answers that are kept."),
            (
                DRAIN_RATE,
                "Images per second that all engines answer while they are busy.",
            ),
            (DEVICE_UP, "1 while a device takes work, else 0."),
            (READY, "1 while the worker serves, else 0."),
            (
                ENGINE_FALLBACK,
                "1 if the engine does without this kind of thing, which could not be had.",
            ),
            (
                MODEL_LOAD_DURATION,
                "Seconds from start to a loaded and warmed model.",
            ),
            (MODEL_INFO, "1, labeled with the model that is served."),
            (BUILD_INFO, "1, labeled with the worker's version."),
        ];
        let gauges = gauges
            .into_iter()
            .chain(access::GAUGES)
            .chain(generation::GAUGES)
            .chain(gpu::GAUGES);
        for (name, text) in gauges {
            self.0
                .describe_gauge(KeyName::from_const_str(name), None, text.into());
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
        let dropped = dropped_counters(&registry);
        let by_graph = |name| {
            Graph::ALL
                .iter()
                .map(|&graph| (graph, registry.histogram(name, &[("graph", graph.label())])))
                .collect()
        };
        let version = [("version", env!("CARGO_PKG_VERSION"))];
        registry.gauge(BUILD_INFO, &version).set(1.0);
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
            images_in_flight: registry.gauge(IMAGES_IN_FLIGHT, &[]),
            images_in_flight_max: registry.gauge(IMAGES_IN_FLIGHT_MAX, &[]),
            decode_duration: registry.histogram(DECODE_DURATION, &[]),
            quantize_duration: registry.histogram(QUANTIZE_DURATION, &[]),
            streams: registry.gauge(STREAMS, &[]),
            bytes_in_flight: registry.gauge(BYTES_IN_FLIGHT, &[]),
            bytes_in_flight_max: registry.gauge(BYTES_IN_FLIGHT_MAX, &[]),
            queue_depth: by_class(&|labels| registry.gauge(QUEUE_DEPTH, labels)),
            queue_duration: by_class(&|labels| registry.histogram(QUEUE_DURATION, labels)),
            batch_size_max: registry.gauge(BATCH_SIZE_MAX, &[]),
            engine_fallback: FallbackKind::ALL
                .map(|kind| {
                    let label = kind.label();
                    (label, registry.gauge(ENGINE_FALLBACK, &[("kind", label)]))
                })
                .into(),
            batch_size_smallest: AtomicUsize::new(usize::MAX),
            batch_padding: registry.counter(BATCH_PADDING, &[]),
            coalesced: registry.counter(COALESCED, &[]),
            answers_not_taken: registry.counter(ANSWERS_NOT_TAKEN, &[]),
            cache_lookups: [(true, "hit"), (false, "miss")]
                .map(|(hit, label)| (hit, registry.counter(CACHE_LOOKUPS, &[("result", label)])))
                .into(),
            cache_bytes: registry.gauge(CACHE_BYTES, &[]),
            drain_rate: registry.gauge(DRAIN_RATE, &[]),
            engine_faults: EngineFault::ALL
                .map(|fault| {
                    let counter = registry.counter(ENGINE_FAULTS, &[("kind", fault.label())]);
                    (fault, counter)
                })
                .into(),
            runs_stopped: registry.counter(RUNS_STOPPED, &[]),
            canaries: [(true, "ok"), (false, "failed")]
                .map(|(ok, label)| (ok, registry.counter(CANARIES, &[("result", label)])))
                .into(),
            inference_duration: by_graph(INFERENCE_DURATION),
            batch_size: by_graph(BATCH_SIZE),
            batch_fill: registry.histogram(BATCH_FILL, &[]),
            batches: BatchClose::ALL
                .iter()
                .map(|&close| {
                    let counter = registry.counter(BATCHES, &[("close_reason", close.label())]);
                    (close, counter)
                })
                .collect(),
            log_lines_dropped: registry.counter(LOG_LINES_DROPPED, &[]),
            ready: registry.gauge(READY, &[]),
            model_load_duration: registry.gauge(MODEL_LOAD_DURATION, &[]),
            access: access::AccessMetrics::new(&registry),
            generation: generation::GenerationMetrics::new(&registry),
            totals: totals::Totals::default(),
            recorder,
        };
        Ok(Self(Arc::new(handles)))
    }

    /// Connections, certificates and tokens.
    #[must_use]
    pub fn access(&self) -> &access::AccessMetrics {
        &self.0.access
    }

    /// Sums that the worker itself can read.
    #[must_use]
    pub fn totals(&self) -> &totals::Totals {
        &self.0.totals
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
        if INFERENCE.contains(&method) {
            self.0.totals.call(code == "OK", elapsed);
        }
    }

    /// A stream was opened; it counts as open until what this gives is dropped.
    #[must_use]
    pub fn stream(&self) -> StreamOpen {
        self.0.streams.increment(1.0);
        StreamOpen(self.0.streams.clone())
    }

    /// An image of a call has its outcome.
    pub fn image(&self, code: &'static str) {
        if let Some(counter) = self.0.images.get(code) {
            counter.increment(1);
        }
    }

    /// An image was dropped, for this error and where it had got to.
    pub fn dead(&self, error: &Error) {
        match error {
            Error::Cancelled { stage } => self.dropped("cancelled", *stage),
            Error::DeadlineExceeded { stage } => self.dropped("deadline", *stage),
            Error::DeadlineTooShort { .. } => {
                self.dropped("deadline_too_short", RequestStage::Queue)
            }
            _ => {}
        }
    }

    fn dropped(&self, reason: &'static str, stage: RequestStage) {
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
        let both = decode.unwrap_or_default() + quantize.unwrap_or_default();
        self.0.totals.preprocessed(both);
    }

    /// How much memory requests, answers and the cache hold.
    pub fn bytes(&self, in_flight: usize, max: usize, cache: u64) {
        self.0.bytes_in_flight.set(as_f64(in_flight));
        self.0.bytes_in_flight_max.set(as_f64(max));
        self.0
            .cache_bytes
            .set(as_f64(usize::try_from(cache).unwrap_or(usize::MAX)));
    }

    /// Images of this class now wait for the engine.
    pub fn queue_depth(&self, class: Priority, images: usize) {
        if let Some(gauge) = self.0.queue_depth.get(&class) {
            gauge.set(as_f64(images));
        }
    }

    /// One image left the queue for the engine.
    pub fn queued(&self, class: Priority, waited: Duration) {
        if let Some(histogram) = self.0.queue_duration.get(&class) {
            histogram.record(waited);
        }
    }

    /// An answer was given up because its client did not take it.
    pub fn answer_not_taken(&self) {
        self.0.answers_not_taken.increment(1);
    }

    /// An image shares another one's run.
    pub fn coalesced(&self) {
        self.0.coalesced.increment(1);
    }

    /// An image was looked for in the cache.
    pub fn cache(&self, hit: bool) {
        self.0.totals.cache(hit);
        if let Some(counter) = self.0.cache_lookups.get(&hit) {
            counter.increment(1);
        }
    }

    /// All engines answer so many images a second while they are busy.
    pub fn drain_rate(&self, images_per_second: f64) {
        self.0.drain_rate.set(images_per_second);
    }

    /// The largest batch that every device takes.
    pub fn batch_size_max(&self, images: usize) {
        self.0.batch_size_smallest.store(images, Ordering::Relaxed);
        self.0.batch_size_max.set(as_f64(images));
    }

    /// A device takes no larger batches any more.
    pub fn batch_size_lowered(&self, images: usize) {
        let smallest = &self.0.batch_size_smallest;
        let before = smallest.fetch_min(images, Ordering::Relaxed);
        self.0.batch_size_max.set(as_f64(before.min(images)));
    }

    /// A device began or ceased to take work.
    pub fn device_up(&self, id: i32, up: bool) {
        let labels = vec![Label::new("device", id.to_string())];
        self.0
            .recorder
            .register_gauge(&Key::from_parts(DEVICE_UP, labels), &Registry::METADATA)
            .set(if up { 1.0 } else { 0.0 });
    }

    /// A run failed.
    pub fn fault(&self, fault: EngineFault) {
        if let Some(counter) = self.0.engine_faults.get(&fault) {
            counter.increment(1);
        }
    }

    /// A run was stopped.
    pub fn stopped(&self) {
        self.0.runs_stopped.increment(1);
    }

    /// An idle engine was checked.
    pub fn canary(&self, ok: bool) {
        if let Some(counter) = self.0.canaries.get(&ok) {
            counter.increment(1);
        }
    }

    /// A batch of `size` images was formed, to run at the size `bucket`.
    pub fn batch(&self, graph: Graph, size: usize, bucket: usize, close: BatchClose) {
        if let Some(histogram) = self.0.batch_size.get(&graph) {
            histogram.record(as_f64(size));
        }
        self.0.batch_fill.record(as_f64(size) / as_f64(bucket));
        self.0
            .batch_padding
            .increment(bucket.saturating_sub(size) as u64);
        if let Some(counter) = self.0.batches.get(&close) {
            counter.increment(1);
        }
    }

    /// The engine does without something.
    pub fn fell_back(&self, kind: FallbackKind) {
        if let Some(gauge) = self.0.engine_fallback.get(kind.label()) {
            gauge.set(1.0);
        }
    }

    /// The engine ran a batch.
    pub fn inference(&self, graph: Graph, elapsed: Duration) {
        if let Some(histogram) = self.0.inference_duration.get(&graph) {
            histogram.record(elapsed);
        }
    }

    /// Where the gaps between the runs of a device are counted.
    #[must_use]
    pub fn engine_gap(&self, id: i32) -> EngineGap {
        let labels = vec![Label::new("device", id.to_string())];
        let key = Key::from_parts(ENGINE_GAP, labels);
        let histogram = self
            .0
            .recorder
            .register_histogram(&key, &Registry::METADATA);
        EngineGap(histogram)
    }

    /// Number of log lines that were dropped since the process began.
    pub fn log_lines_dropped(&self, lines: u64) {
        self.0.log_lines_dropped.absolute(lines);
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

/// Images that were dropped, by reason and stage.
fn dropped_counters(registry: &Registry<'_>) -> BTreeMap<(&'static str, &'static str), Counter> {
    let mut dropped = BTreeMap::new();
    for reason in ["cancelled", "deadline"] {
        for stage in [
            RequestStage::Preprocess,
            RequestStage::Queue,
            RequestStage::Engine,
        ] {
            let labels = [("reason", reason), ("stage", stage.label())];
            dropped.insert(
                (reason, stage.label()),
                registry.counter(IMAGES_DROPPED, &labels),
            );
        }
    }
    // Refused as it comes to the queue, so there is no other stage.
    let labels = [
        ("reason", "deadline_too_short"),
        ("stage", RequestStage::Queue.label()),
    ];
    dropped.insert(
        ("deadline_too_short", RequestStage::Queue.label()),
        registry.counter(IMAGES_DROPPED, &labels),
    );
    dropped
}

/// One open stream.
pub struct StreamOpen(Gauge);

impl std::fmt::Debug for StreamOpen {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("StreamOpen")
    }
}

impl Drop for StreamOpen {
    fn drop(&mut self) {
        self.0.decrement(1.0);
    }
}

/// The gaps between the runs of one device.
#[derive(Clone)]
pub struct EngineGap(Histogram);

impl EngineGap {
    /// The device had nothing to run for so long, though something waited.
    pub fn record(&self, gap: Duration) {
        self.0.record(gap);
    }
}

impl std::fmt::Debug for EngineGap {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("EngineGap")
    }
}

/// Names and values of labels.
type Labels = [(&'static str, &'static str)];

/// One handle for each class.
fn by_class<T>(register: &dyn Fn(&Labels) -> T) -> BTreeMap<Priority, T> {
    Priority::ALL
        .map(|class| (class, register(&[("class", class.label())])))
        .into()
}

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of images stay far below 2^52"
)]
fn as_f64(count: usize) -> f64 {
    count as f64
}
