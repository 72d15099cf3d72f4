//! Every metric of the worker.
//!
//! The stages get handles, which are made once, by one expression per metric,
//! so that a hot path never looks up a name. Every series exists from the
//! start, at zero, except those labeled with the model, a device or a caller. No
//! label value comes from a request (names of callers are those of the tokens
//! file), so the cardinality is bounded.

pub(crate) mod access;
pub(crate) mod generation;
pub(crate) mod gpu;
mod handles;
mod labels;
mod registry;
pub(crate) mod totals;
pub(crate) mod trace;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use metrics::{Gauge, Histogram, NoopRecorder};
use metrics_exporter_prometheus::{
    Matcher, PrometheusBuilder, PrometheusHandle, PrometheusRecorder,
};

use self::handles::{EngineHandles, RequestHandles, WorkerHandles};
#[cfg(test)]
pub(crate) use self::labels::is_counted;
pub use self::labels::{BatchClose, ConnectionOutcome, EngineFault, ReloadedFile};
use self::labels::{CacheLookup, CanaryResult, DropReason};
use self::registry::Registry;
pub use self::registry::{MetricDefinition, MetricKind};
use crate::engine::FallbackKind;
use crate::model::graph::Graph;
use crate::proto::{GrpcCode, Priority, RpcMethod};
use crate::serve::error::StageError;

/// Handles to every metric. Cheap to clone.
#[derive(Clone)]
pub struct Metrics(Arc<Recorded>);

struct Recorded {
    recorder: PrometheusRecorder,
    prometheus: PrometheusHandle,
    handles: Handles,
    /// Current value of the gauge of the largest batch, since gauges cannot be
    /// read.
    batch_size_smallest: AtomicUsize,
    totals: totals::Totals,
}

/// Handles of all metrics: one handle or one family of handles per metric.
struct Handles {
    request: RequestHandles,
    engine: EngineHandles,
    worker: WorkerHandles,
    access: access::AccessMetrics,
    generation: generation::GenerationMetrics,
    gpu: gpu::GpuMetrics,
    trace: trace::TraceMetrics,
}

impl Handles {
    fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            request: RequestHandles::new(metrics),
            engine: EngineHandles::new(metrics),
            worker: WorkerHandles::new(metrics),
            access: access::AccessMetrics::new(metrics),
            generation: generation::GenerationMetrics::new(metrics),
            gpu: gpu::GpuMetrics::new(metrics),
            trace: trace::TraceMetrics::new(metrics),
        }
    }
}

impl std::fmt::Debug for Metrics {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Metrics")
    }
}

impl Metrics {
    /// Returns the definitions of all metrics, by name, for documentation and
    /// checks.
    #[must_use]
    pub fn definitions() -> Vec<MetricDefinition> {
        let mut registry = Registry::new(&NoopRecorder);
        Handles::new(&mut registry);
        registry.into_definitions()
    }

    /// Makes metrics with a recorder of their own, so that several workers can
    /// live in one process.
    ///
    /// # Errors
    ///
    /// Fails only if a histogram has no buckets, which none has.
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
        handles
            .worker
            .build_info
            .gauge(&recorder, &version)
            .set(1.0);
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

    /// Returns the metrics of connections, certificates and tokens.
    #[must_use]
    pub fn access(&self) -> &access::AccessMetrics {
        &self.handles().access
    }

    /// Returns the metrics of traces.
    #[must_use]
    pub(crate) fn trace(&self) -> &trace::TraceMetrics {
        &self.handles().trace
    }

    /// Returns the sums that the worker itself can read.
    #[must_use]
    pub fn totals(&self) -> &totals::Totals {
        &self.0.totals
    }

    /// Renders all metrics in the exposition format that Prometheus scrapes.
    #[must_use]
    pub fn render(&self) -> String {
        self.upkeep();
        self.0.prometheus.render()
    }

    /// Folds the samples that histograms have gathered, as rendering does.
    pub fn upkeep(&self) {
        self.0.prometheus.run_upkeep();
    }

    /// Counts a call that was answered, and whose caller has this label; empty
    /// for a caller without one.
    pub fn request(&self, method: RpcMethod, code: GrpcCode, caller: &str, elapsed: Duration) {
        let handles = &self.handles().request;
        if caller.is_empty() {
            handles.requests.of((method, code)).increment(1);
        } else {
            let values = [method.name(), labels::counted(code).name(), caller];
            let counter = &handles.requests_of_callers;
            counter.counter(&self.0.recorder, &values).increment(1);
        }
        self.handles()
            .request
            .request_duration
            .of(method)
            .record(elapsed);
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

    /// Counts a stream as open until the returned guard is dropped.
    #[must_use]
    pub fn stream(&self) -> StreamOpen {
        self.handles().request.streams.increment(1.0);
        StreamOpen(self.handles().request.streams.clone())
    }

    /// Counts an image of a call whose outcome is known.
    pub fn image(&self, code: GrpcCode) {
        self.handles().request.images.of(code).increment(1);
    }

    /// Counts an image that was dropped, by the error and the stage that the
    /// image had reached.
    pub fn dead(&self, error: &StageError) {
        let reason = match error {
            StageError::Cancelled { stage } => DropReason::Cancelled(*stage),
            StageError::DeadlineExceeded { stage } => DropReason::Deadline(*stage),
            StageError::DeadlineTooShort { .. } => DropReason::DeadlineTooShort,
            _ => return,
        };
        self.handles().request.dropped.of(reason).increment(1);
    }

    /// Sets the number of images in flight, and its limit.
    pub fn in_flight(&self, images: usize, max: usize) {
        self.handles().request.images_in_flight.set(as_f64(images));
        self.handles().request.images_in_flight_max.set(as_f64(max));
    }

    /// Records the times in which one image was decoded, and was resized and
    /// quantized.
    pub fn preprocessed(&self, decode: Option<Duration>, quantize: Option<Duration>) {
        if let Some(decode) = decode {
            self.handles().request.decode_duration.record(decode);
        }
        if let Some(quantize) = quantize {
            self.handles().request.quantize_duration.record(quantize);
        }
        let both = decode.unwrap_or_default() + quantize.unwrap_or_default();
        self.0.totals.preprocessed(both);
    }

    /// Sets the bytes of requests and answers in flight, their limit, and the
    /// bytes of the cache.
    pub fn bytes(&self, in_flight: usize, max: usize, cache: u64) {
        self.handles()
            .request
            .bytes_in_flight
            .set(as_f64(in_flight));
        self.handles().request.bytes_in_flight_max.set(as_f64(max));
        self.handles()
            .request
            .cache_bytes
            .set(as_f64(usize::try_from(cache).unwrap_or(usize::MAX)));
    }

    /// Sets the number of images of a class that wait for the engine.
    pub fn queue_depth(&self, class: Priority, images: usize) {
        self.handles()
            .engine
            .queue_depth
            .of(class)
            .set(as_f64(images));
    }

    /// Records the time that one image waited in the queue for the engine.
    pub fn queued(&self, class: Priority, waited: Duration) {
        self.handles()
            .engine
            .queue_duration
            .of(class)
            .record(waited);
    }

    /// Counts an answer that was dropped because its client did not read it in
    /// time.
    pub fn answer_not_taken(&self) {
        self.handles().request.answers_not_taken.increment(1);
    }

    /// Counts an image that shares the run of an identical image.
    pub fn coalesced(&self) {
        self.handles().engine.coalesced.increment(1);
    }

    /// Counts a lookup of an image in the cache.
    pub fn cache(&self, hit: bool) {
        self.0.totals.cache(hit);
        let result = if hit {
            CacheLookup::Hit
        } else {
            CacheLookup::Miss
        };
        self.handles().request.cache_lookups.of(result).increment(1);
    }

    /// Sets the images per second that all engines together answer while they
    /// are busy.
    pub fn drain_rate(&self, images_per_second: f64) {
        self.handles().engine.drain_rate.set(images_per_second);
    }

    /// Sets the largest batch that every device takes.
    pub fn batch_size_max(&self, images: usize) {
        self.0.batch_size_smallest.store(images, Ordering::Relaxed);
        self.handles().engine.batch_size_max.set(as_f64(images));
    }

    /// Lowers the largest batch that every device takes, if one device now
    /// takes fewer images.
    pub fn batch_size_lowered(&self, images: usize) {
        let smallest = &self.0.batch_size_smallest;
        let before = smallest.fetch_min(images, Ordering::Relaxed);
        self.handles()
            .engine
            .batch_size_max
            .set(as_f64(before.min(images)));
    }

    /// Sets whether a device takes work.
    pub fn device_up(&self, id: i32, up: bool) {
        let up = if up { 1.0 } else { 0.0 };
        let gauge = &self.handles().engine.device_up;
        gauge.gauge(&self.0.recorder, &[&id.to_string()]).set(up);
    }

    /// Counts a run that failed.
    pub fn fault(&self, fault: EngineFault) {
        self.handles().engine.engine_faults.of(fault).increment(1);
    }

    /// Counts a run that was stopped.
    pub fn stopped(&self) {
        self.handles().engine.runs_stopped.increment(1);
    }

    /// Counts a check of an idle engine.
    pub fn canary(&self, ok: bool) {
        let result = if ok {
            CanaryResult::Ok
        } else {
            CanaryResult::Failed
        };
        self.handles().engine.canaries.of(result).increment(1);
    }

    /// Counts a batch of `size` images that will run padded to `bucket` rows.
    pub fn batch(&self, graph: Graph, size: usize, bucket: usize, close: BatchClose) {
        self.handles()
            .engine
            .batch_size
            .of(graph)
            .record(as_f64(size));
        self.handles()
            .engine
            .batch_fill
            .record(as_f64(size) / as_f64(bucket));
        self.handles()
            .engine
            .batch_padding
            .increment(bucket.saturating_sub(size) as u64);
        self.handles().engine.batches.of(close).increment(1);
    }

    /// Sets that the engine runs with this fallback.
    pub fn fell_back(&self, kind: FallbackKind) {
        self.handles().engine.engine_fallback.of(kind).set(1.0);
    }

    /// Records the time in which the engine ran a batch.
    pub fn inference(&self, graph: Graph, elapsed: Duration) {
        self.handles()
            .engine
            .inference_duration
            .of(graph)
            .record(elapsed);
    }

    /// Returns the histogram of the gaps between the runs of a device.
    #[must_use]
    pub fn engine_gap(&self, id: i32) -> EngineGap {
        let gap = &self.handles().engine.engine_gap;
        EngineGap(gap.histogram(&self.0.recorder, &[&id.to_string()]))
    }

    /// Sets the number of log lines that were dropped since the process began.
    pub fn log_lines_dropped(&self, lines: u64) {
        self.handles().worker.log_lines_dropped.absolute(lines);
    }

    /// Sets whether the worker serves.
    pub fn ready(&self, ready: bool) {
        self.handles()
            .worker
            .ready
            .set(if ready { 1.0 } else { 0.0 });
    }

    /// Sets the model that was loaded and warmed up, and the time that it took.
    pub fn model_loaded(&self, name: &str, digest: &str, provider: &str, elapsed: Duration) {
        self.handles()
            .worker
            .model_load_duration
            .set(elapsed.as_secs_f64());
        let info = &self.handles().worker.model_info;
        info.gauge(&self.0.recorder, &[name, digest, provider])
            .set(1.0);
    }
}

/// Guard of one open stream, which counts as open until the guard is dropped.
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

/// Histogram of the gaps between the runs of one device.
#[derive(Clone)]
pub struct EngineGap(Histogram);

impl EngineGap {
    /// Records a gap in which the device ran nothing although a run was
    /// possible.
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
