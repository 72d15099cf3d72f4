//! Every metric of the worker.
//!
//! Stages get handles, made once here by one expression a metric, so that a hot path
//! never looks a name up. Every series exists from the start, at zero, but for the
//! model's and the devices', and no label value comes from a request: cardinality is
//! fixed.

pub(crate) mod access;
pub(crate) mod generation;
pub(crate) mod gpu;
mod labels;
mod registry;
pub(crate) mod totals;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use metrics::{Counter, Gauge, Histogram, NoopRecorder};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

#[cfg(test)]
pub(crate) use self::labels::is_counted;
pub use self::labels::{AccessFile, BatchClose, ConnectionOutcome, EngineFault};
use self::labels::{CacheLookup, CanaryResult, DropReason};
use self::registry::{Family, LateMetric, Registry, durations};
pub use self::registry::{MetricDefinition, MetricKind};
use crate::engine::FallbackKind;
use crate::model::graph::Graph;
use crate::proto::{GrpcCode, Priority, RpcMethod};
use crate::serve::error::StageError;

/// Powers of two up to the largest batch that a flag may ask for.
const BATCH_SIZES: [f64; 11] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
];

/// Eighths: below 1 the engine ran with room to spare.
const FILLS: [f64; 8] = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0];

/// Handles to every metric. Cheap to clone.
#[derive(Clone)]
pub struct Metrics(Arc<Recorded>);

struct Recorded {
    recorder: PrometheusRecorder,
    prometheus: PrometheusHandle,
    handles: Handles,
    /// What the gauge of the largest batch shows, since gauges cannot be read.
    batch_size_smallest: AtomicUsize,
    totals: totals::Totals,
}

/// One handle or family of handles a metric.
struct Handles {
    requests: Family<(RpcMethod, GrpcCode), Counter>,
    request_duration: Family<RpcMethod, Histogram>,
    images: Family<GrpcCode, Counter>,
    dropped: Family<DropReason, Counter>,
    images_in_flight: Gauge,
    images_in_flight_max: Gauge,
    decode_duration: Histogram,
    quantize_duration: Histogram,
    streams: Gauge,
    bytes_in_flight: Gauge,
    bytes_in_flight_max: Gauge,
    queue_depth: Family<Priority, Gauge>,
    queue_duration: Family<Priority, Histogram>,
    batch_size_max: Gauge,
    engine_fallback: Family<FallbackKind, Gauge>,
    batch_padding: Counter,
    coalesced: Counter,
    answers_not_taken: Counter,
    cache_lookups: Family<CacheLookup, Counter>,
    cache_bytes: Gauge,
    drain_rate: Gauge,
    engine_faults: Family<EngineFault, Counter>,
    runs_stopped: Counter,
    canaries: Family<CanaryResult, Counter>,
    inference_duration: Family<Graph, Histogram>,
    engine_gap: LateMetric,
    batch_size: Family<Graph, Histogram>,
    batch_fill: Histogram,
    batches: Family<BatchClose, Counter>,
    log_lines_dropped: Counter,
    device_up: LateMetric,
    ready: Gauge,
    model_load_duration: Gauge,
    model_info: LateMetric,
    build_info: LateMetric,
    access: access::AccessMetrics,
    generation: generation::GenerationMetrics,
    gpu: gpu::GpuMetrics,
}

impl Handles {
    #[expect(clippy::too_many_lines, reason = "a table, an expression a metric")]
    fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            requests: metrics.counters(
                "imagegpt_requests_total",
                "Calls answered, by method and gRPC code.",
            ),
            request_duration: metrics.histograms(
                "imagegpt_request_duration_seconds",
                "Time from a call's arrival to its answer.",
                durations(),
            ),
            images: metrics.counters(
                "imagegpt_images_total",
                "Images answered, by the code of their own outcome.",
            ),
            dropped: metrics.counters(
                "imagegpt_images_dropped_total",
                "Images dropped before they had an answer, by reason and the stage they had reached.",
            ),
            images_in_flight: metrics.gauge(
                "imagegpt_images_in_flight",
                "Images admitted and not yet answered.",
            ),
            images_in_flight_max: metrics.gauge(
                "imagegpt_images_in_flight_max",
                "The limit on images in flight.",
            ),
            decode_duration: metrics.histogram(
                "imagegpt_decode_duration_seconds",
                "Time to decode one encoded image.",
                durations(),
            ),
            quantize_duration: metrics.histogram(
                "imagegpt_quantize_duration_seconds",
                "Time to resize one image and find its color tokens.",
                durations(),
            ),
            streams: metrics.gauge("imagegpt_streams", "Streams that are open."),
            bytes_in_flight: metrics.gauge(
                "imagegpt_bytes_in_flight",
                "Bytes that requests and answers hold.",
            ),
            bytes_in_flight_max: metrics.gauge(
                "imagegpt_bytes_in_flight_max",
                "The limit on bytes in flight.",
            ),
            queue_depth: metrics.gauges(
                "imagegpt_queue_depth",
                "Images that wait for the engine, by class.",
            ),
            queue_duration: metrics.histograms(
                "imagegpt_queue_duration_seconds",
                "Time an image waited for the engine after preprocessing.",
                durations(),
            ),
            batch_size_max: metrics.gauge(
                "imagegpt_batch_size_max",
                "The largest batch that every device takes; below --max-batch-size after memory ran out.",
            ),
            engine_fallback: metrics.gauges(
                "imagegpt_engine_fallback",
                "1 if the engine does without this kind of thing, which could not be had.",
            ),
            batch_padding: metrics.counter(
                "imagegpt_batch_padding_images_total",
                "Rows that were run to fill a batch size.",
            ),
            coalesced: metrics.counter(
                "imagegpt_images_coalesced_total",
                "Images that shared another one's run because they were the same.",
            ),
            answers_not_taken: metrics.counter(
                "imagegpt_answers_not_taken_total",
                "Answers that were given up because their client did not take them.",
            ),
            cache_lookups: metrics.counters(
                "imagegpt_cache_lookups_total",
                "Images looked for in the cache, by result.",
            ),
            cache_bytes: metrics.gauge(
                "imagegpt_cache_bytes",
                "Bytes of answers that are kept.",
            ),
            drain_rate: metrics.gauge(
                "imagegpt_drain_rate_images_per_second",
                "Images per second that all engines answer while they are busy.",
            ),
            engine_faults: metrics.counters(
                "imagegpt_engine_faults_total",
                "Runs of the model that failed, by kind.",
            ),
            runs_stopped: metrics.counter(
                "imagegpt_runs_stopped_total",
                "Runs that were stopped because nobody waited for them any more.",
            ),
            canaries: metrics.counters(
                "imagegpt_canary_runs_total",
                "Checks of an idle engine, by result.",
            ),
            inference_duration: metrics.histograms(
                "imagegpt_inference_duration_seconds",
                "Time of one run of the model, by graph.",
                durations(),
            ),
            engine_gap: metrics.device_histogram(
                "imagegpt_engine_gap_seconds",
                "Time a device had nothing to run before a run that was already possible.",
                durations(),
            ),
            batch_size: metrics.histograms(
                "imagegpt_batch_size",
                "Images in one run, by graph.",
                BATCH_SIZES.to_vec(),
            ),
            batch_fill: metrics.histogram(
                "imagegpt_batch_fill_ratio",
                "Images in one run divided by the size that it ran at.",
                FILLS.to_vec(),
            ),
            batches: metrics.counters(
                "imagegpt_batches_total",
                "Batches formed, by what closed them.",
            ),
            log_lines_dropped: metrics.counter(
                "imagegpt_log_lines_dropped_total",
                "Log lines that could not be written to standard error, or not fast enough.",
            ),
            device_up: metrics.device_gauge(
                "imagegpt_device_up",
                "1 while a device takes work, else 0.",
            ),
            ready: metrics.gauge("imagegpt_ready", "1 while the worker serves, else 0."),
            model_load_duration: metrics.gauge(
                "imagegpt_model_load_duration_seconds",
                "Seconds from start to a loaded and warmed model.",
            ),
            model_info: metrics.late_gauge(
                "imagegpt_model_info",
                "1, labeled with the model that is served.",
                &["name", "digest", "execution_provider"],
            ),
            build_info: metrics.late_gauge(
                "imagegpt_build_info",
                "1, labeled with the worker's version.",
                &["version"],
            ),
            access: access::AccessMetrics::new(metrics),
            generation: generation::GenerationMetrics::new(metrics),
            gpu: gpu::GpuMetrics::new(metrics),
        }
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Definitions of all metrics, by name: for documentation and checks.
    #[must_use]
    pub fn definitions() -> Vec<MetricDefinition> {
        let mut registry = Registry::new(&NoopRecorder);
        Handles::new(&mut registry);
        registry.into_definitions()
    }

    /// A recorder of its own, so that several workers can live in one process.
    ///
    /// # Errors
    ///
    /// Never in practice: only empty bucket lists are refused.
    pub fn new() -> anyhow::Result<Self> {
        let mut builder = PrometheusBuilder::new();
        for definition in Self::definitions() {
            if definition.kind == MetricKind::Histogram {
                let name = Matcher::Full(definition.name.to_owned());
                builder = builder.set_buckets_for_metric(name, &definition.buckets)?;
            }
        }
        let recorder = builder.build_recorder();
        let handles = Handles::new(&mut Registry::new(&recorder));
        let version = [env!("CARGO_PKG_VERSION")];
        handles.build_info.gauge(&recorder, &version).set(1.0);
        Ok(Self(Arc::new(Recorded {
            prometheus: recorder.handle(),
            handles,
            batch_size_smallest: AtomicUsize::new(usize::MAX),
            totals: totals::Totals::default(),
            recorder,
        })))
    }

    fn handles(&self) -> &Handles {
        &self.0.handles
    }

    /// Connections, certificates and tokens.
    #[must_use]
    pub fn access(&self) -> &access::AccessMetrics {
        &self.handles().access
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
    pub fn request(&self, method: RpcMethod, code: GrpcCode, elapsed: Duration) {
        self.handles().requests.of((method, code)).increment(1);
        self.handles().request_duration.of(method).record(elapsed);
        let is_inference = matches!(
            method,
            RpcMethod::Embed
                | RpcMethod::Classify
                | RpcMethod::Score
                | RpcMethod::Tokenize
                | RpcMethod::ModelInfer
        );
        if is_inference {
            self.0.totals.call(code == GrpcCode::Ok, elapsed);
        }
    }

    /// A stream was opened; it counts as open until what this gives is dropped.
    #[must_use]
    pub fn stream(&self) -> StreamOpen {
        self.handles().streams.increment(1.0);
        StreamOpen(self.handles().streams.clone())
    }

    /// An image of a call has its outcome.
    pub fn image(&self, code: GrpcCode) {
        self.handles().images.of(code).increment(1);
    }

    /// An image was dropped, for this error and where it had got to.
    pub fn dead(&self, error: &StageError) {
        let reason = match error {
            StageError::Cancelled { stage } => DropReason::Cancelled(*stage),
            StageError::DeadlineExceeded { stage } => DropReason::Deadline(*stage),
            StageError::DeadlineTooShort { .. } => DropReason::DeadlineTooShort,
            _ => return,
        };
        self.handles().dropped.of(reason).increment(1);
    }

    /// How much of the capacity is in use.
    pub fn in_flight(&self, images: usize, max: usize) {
        self.handles().images_in_flight.set(as_f64(images));
        self.handles().images_in_flight_max.set(as_f64(max));
    }

    /// One image was decoded, resized and quantized.
    pub fn preprocessed(&self, decode: Option<Duration>, quantize: Option<Duration>) {
        if let Some(decode) = decode {
            self.handles().decode_duration.record(decode);
        }
        if let Some(quantize) = quantize {
            self.handles().quantize_duration.record(quantize);
        }
        let both = decode.unwrap_or_default() + quantize.unwrap_or_default();
        self.0.totals.preprocessed(both);
    }

    /// How much memory requests, answers and the cache hold.
    pub fn bytes(&self, in_flight: usize, max: usize, cache: u64) {
        self.handles().bytes_in_flight.set(as_f64(in_flight));
        self.handles().bytes_in_flight_max.set(as_f64(max));
        self.handles()
            .cache_bytes
            .set(as_f64(usize::try_from(cache).unwrap_or(usize::MAX)));
    }

    /// Images of this class now wait for the engine.
    pub fn queue_depth(&self, class: Priority, images: usize) {
        self.handles().queue_depth.of(class).set(as_f64(images));
    }

    /// One image left the queue for the engine.
    pub fn queued(&self, class: Priority, waited: Duration) {
        self.handles().queue_duration.of(class).record(waited);
    }

    /// An answer was given up because its client did not take it.
    pub fn answer_not_taken(&self) {
        self.handles().answers_not_taken.increment(1);
    }

    /// An image shares another one's run.
    pub fn coalesced(&self) {
        self.handles().coalesced.increment(1);
    }

    /// An image was looked for in the cache.
    pub fn cache(&self, hit: bool) {
        self.0.totals.cache(hit);
        let result = if hit {
            CacheLookup::Hit
        } else {
            CacheLookup::Miss
        };
        self.handles().cache_lookups.of(result).increment(1);
    }

    /// All engines answer so many images a second while they are busy.
    pub fn drain_rate(&self, images_per_second: f64) {
        self.handles().drain_rate.set(images_per_second);
    }

    /// The largest batch that every device takes.
    pub fn batch_size_max(&self, images: usize) {
        self.0.batch_size_smallest.store(images, Ordering::Relaxed);
        self.handles().batch_size_max.set(as_f64(images));
    }

    /// A device takes no larger batches any more.
    pub fn batch_size_lowered(&self, images: usize) {
        let smallest = &self.0.batch_size_smallest;
        let before = smallest.fetch_min(images, Ordering::Relaxed);
        self.handles()
            .batch_size_max
            .set(as_f64(before.min(images)));
    }

    /// A device began or ceased to take work.
    pub fn device_up(&self, id: i32, up: bool) {
        let up = if up { 1.0 } else { 0.0 };
        let gauge = &self.handles().device_up;
        gauge.gauge(&self.0.recorder, &[&id.to_string()]).set(up);
    }

    /// A run failed.
    pub fn fault(&self, fault: EngineFault) {
        self.handles().engine_faults.of(fault).increment(1);
    }

    /// A run was stopped.
    pub fn stopped(&self) {
        self.handles().runs_stopped.increment(1);
    }

    /// An idle engine was checked.
    pub fn canary(&self, ok: bool) {
        let result = if ok {
            CanaryResult::Ok
        } else {
            CanaryResult::Failed
        };
        self.handles().canaries.of(result).increment(1);
    }

    /// A batch of `size` images was formed, to run at the size `bucket`.
    pub fn batch(&self, graph: Graph, size: usize, bucket: usize, close: BatchClose) {
        self.handles().batch_size.of(graph).record(as_f64(size));
        self.handles()
            .batch_fill
            .record(as_f64(size) / as_f64(bucket));
        self.handles()
            .batch_padding
            .increment(bucket.saturating_sub(size) as u64);
        self.handles().batches.of(close).increment(1);
    }

    /// The engine does without something.
    pub fn fell_back(&self, kind: FallbackKind) {
        self.handles().engine_fallback.of(kind).set(1.0);
    }

    /// The engine ran a batch.
    pub fn inference(&self, graph: Graph, elapsed: Duration) {
        self.handles().inference_duration.of(graph).record(elapsed);
    }

    /// Where the gaps between the runs of a device are counted.
    #[must_use]
    pub fn engine_gap(&self, id: i32) -> EngineGap {
        let gap = &self.handles().engine_gap;
        EngineGap(gap.histogram(&self.0.recorder, &[&id.to_string()]))
    }

    /// Number of log lines that were dropped since the process began.
    pub fn log_lines_dropped(&self, lines: u64) {
        self.handles().log_lines_dropped.absolute(lines);
    }

    /// The worker began or ceased to serve.
    pub fn ready(&self, ready: bool) {
        self.handles().ready.set(if ready { 1.0 } else { 0.0 });
    }

    /// A model was loaded and warmed.
    pub fn model_loaded(&self, name: &str, digest: &str, provider: &str, elapsed: Duration) {
        self.handles()
            .model_load_duration
            .set(elapsed.as_secs_f64());
        let info = &self.handles().model_info;
        info.gauge(&self.0.recorder, &[name, digest, provider])
            .set(1.0);
    }
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

#[expect(
    clippy::cast_precision_loss,
    reason = "counts of images stay far below 2^52"
)]
fn as_f64(count: usize) -> f64 {
    count as f64
}
