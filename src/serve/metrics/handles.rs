//! Metrics of calls, of the engine and of the worker, one expression per
//! metric.

use metrics::{Counter, Gauge, Histogram};

use super::labels::{BatchClose, CacheLookup, CanaryResult, DropReason, EngineFault};
use super::registry::{Family, LateMetric, Registry, durations};
use crate::engine::FallbackKind;
use crate::model::graph::Graph;
use crate::proto::{GrpcCode, Priority, RpcMethod};

/// Powers of two up to the largest batch that a flag may ask for.
const BATCH_SIZES: [f64; 11] = [
    1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1024.0,
];

/// Eighths of a full batch; below 1 the engine ran padding.
const FILLS: [f64; 8] = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0];

/// Handles of the metrics of calls, their images and their memory.
pub(super) struct RequestHandles {
    pub(super) requests: Family<(RpcMethod, GrpcCode), Counter>,
    /// The same counter for callers that the tokens file names.
    pub(super) requests_of_callers: LateMetric,
    pub(super) request_duration: Family<RpcMethod, Histogram>,
    pub(super) images: Family<GrpcCode, Counter>,
    pub(super) dropped: Family<DropReason, Counter>,
    pub(super) images_in_flight: Gauge,
    pub(super) images_in_flight_max: Gauge,
    pub(super) bytes_in_flight: Gauge,
    pub(super) bytes_in_flight_max: Gauge,
    pub(super) streams: Gauge,
    pub(super) answers_not_taken: Counter,
    pub(super) decode_duration: Histogram,
    pub(super) quantize_duration: Histogram,
    pub(super) cache_lookups: Family<CacheLookup, Counter>,
    pub(super) cache_bytes: Gauge,
}

impl RequestHandles {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        let (requests, requests_of_callers) = metrics.counters_and_late(
            "imagegpt_requests_total",
            "Answered calls, by method, gRPC code, and the caller that --auth-tokens-file names; \
             calls of other callers have no label caller.",
            &["method", "code", "caller"],
        );
        Self {
            requests,
            requests_of_callers,
            request_duration: metrics.histograms(
                "imagegpt_request_duration_seconds",
                "Time from the arrival of a call to its answer, by method.",
                durations(),
            ),
            images: metrics.counters(
                "imagegpt_images_total",
                "Answered images, by the gRPC code of the image's own outcome.",
            ),
            dropped: metrics.counters(
                "imagegpt_images_dropped_total",
                "Images dropped without an answer, by reason and by the stage that the image had \
                 reached.",
            ),
            images_in_flight: metrics.gauge(
                "imagegpt_images_in_flight",
                "Images that are admitted and not yet answered.",
            ),
            images_in_flight_max: metrics.gauge(
                "imagegpt_images_in_flight_max",
                "Limit on images in flight (--images-in-flight-max).",
            ),
            bytes_in_flight: metrics.gauge(
                "imagegpt_bytes_in_flight",
                "Bytes of memory that requests and answers in the worker use.",
            ),
            bytes_in_flight_max: metrics.gauge(
                "imagegpt_bytes_in_flight_max",
                "Limit on bytes in flight (--bytes-in-flight-max).",
            ),
            streams: metrics.gauge(
                "imagegpt_streams",
                "Open streams (EmbedStream and ModelStreamInfer).",
            ),
            answers_not_taken: metrics.counter(
                "imagegpt_answers_not_taken_total",
                "Answers dropped because the client did not read them in time (--answer-timeout).",
            ),
            decode_duration: metrics.histogram(
                "imagegpt_decode_duration_seconds",
                "Time to decode one encoded image.",
                durations(),
            ),
            quantize_duration: metrics.histogram(
                "imagegpt_quantize_duration_seconds",
                "Time to resize one image and quantize its pixels to color tokens.",
                durations(),
            ),
            cache_lookups: metrics.counters(
                "imagegpt_cache_lookups_total",
                "Lookups of images in the cache of answers, by result.",
            ),
            cache_bytes: metrics.gauge("imagegpt_cache_bytes", "Bytes of answers in the cache."),
        }
    }
}

/// Handles of the metrics of the queue and of runs of the model.
pub(super) struct EngineHandles {
    pub(super) queue_depth: Family<Priority, Gauge>,
    pub(super) queue_duration: Family<Priority, Histogram>,
    pub(super) coalesced: Counter,
    pub(super) batches: Family<BatchClose, Counter>,
    pub(super) batch_size: Family<Graph, Histogram>,
    pub(super) batch_size_max: Gauge,
    pub(super) batch_fill: Histogram,
    pub(super) batch_padding: Counter,
    pub(super) inference_duration: Family<Graph, Histogram>,
    pub(super) drain_rate: Gauge,
    pub(super) engine_gap: LateMetric,
    pub(super) engine_fallback: Family<FallbackKind, Gauge>,
    pub(super) engine_faults: Family<EngineFault, Counter>,
    pub(super) runs_stopped: Counter,
    pub(super) canaries: Family<CanaryResult, Counter>,
    pub(super) device_up: LateMetric,
}

impl EngineHandles {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            queue_depth: metrics.gauges(
                "imagegpt_queue_depth",
                "Images that wait for the engine, by priority class.",
            ),
            queue_duration: metrics.histograms(
                "imagegpt_queue_duration_seconds",
                "Time that an image waited for the engine after preprocessing, by priority class.",
                durations(),
            ),
            coalesced: metrics.counter(
                "imagegpt_images_coalesced_total",
                "Images that shared the run of an identical image (coalescing).",
            ),
            batches: metrics.counters(
                "imagegpt_batches_total",
                "Batches formed, by the reason for which no more images were awaited.",
            ),
            batch_size: metrics.histograms(
                "imagegpt_batch_size",
                "Images in one run of the model, without padding, by graph.",
                BATCH_SIZES.to_vec(),
            ),
            batch_size_max: metrics.gauge(
                "imagegpt_batch_size_max",
                "Largest batch that every device takes; below --max-batch-size after a device ran \
                 out of memory, and 1 for a model that runs images one by one (int8 compiled with --portable).",
            ),
            batch_fill: metrics.histogram(
                "imagegpt_batch_fill_ratio",
                "Images in one run divided by the batch size of the run, padding included.",
                FILLS.to_vec(),
            ),
            batch_padding: metrics.counter(
                "imagegpt_batch_padding_images_total",
                "Rows of padding that were run to fill a batch up to its batch size.",
            ),
            inference_duration: metrics.histograms(
                "imagegpt_inference_duration_seconds",
                "Duration of one run of the model, by graph.",
                durations(),
            ),
            drain_rate: metrics.gauge(
                "imagegpt_drain_rate_images_per_second",
                "Measured throughput of all engines together while they are busy, in images per \
                 second.",
            ),
            engine_gap: metrics.device_histogram(
                "imagegpt_engine_gap_seconds",
                "Time that a device was idle before a run although the run was already possible, \
                 by device.",
                durations(),
            ),
            engine_fallback: metrics.gauges(
                "imagegpt_engine_fallback",
                "1 if the engine runs without CUDA (cuda), CUDA graphs (cuda_graphs) or copies \
                 over the driver (gpu_copies) because they could not be used, else 0.",
            ),
            engine_faults: metrics.counters(
                "imagegpt_engine_faults_total",
                "Runs of the model that failed, by kind of fault.",
            ),
            runs_stopped: metrics.counter(
                "imagegpt_runs_stopped_total",
                "Runs of the model that were stopped because no caller waited for their results \
                 any more.",
            ),
            canaries: metrics.counters(
                "imagegpt_canary_runs_total",
                "Runs on a known image that checked an idle engine (--canary-interval), by result.",
            ),
            device_up: metrics.device_gauge(
                "imagegpt_device_up",
                "1 while the device takes work, else 0.",
            ),
        }
    }
}

/// Handles of the metrics of the worker as a whole.
pub(super) struct WorkerHandles {
    pub(super) ready: Gauge,
    pub(super) model_load_duration: Gauge,
    pub(super) model_info: LateMetric,
    pub(super) build_info: LateMetric,
    pub(super) log_lines_dropped: Counter,
}

impl WorkerHandles {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            ready: metrics.gauge("imagegpt_ready", "1 while the worker serves, else 0."),
            model_load_duration: metrics.gauge(
                "imagegpt_model_load_duration_seconds",
                "Time from the start of the worker until its model was loaded and warmed up.",
            ),
            model_info: metrics.late_gauge(
                "imagegpt_model_info",
                "Always 1; the labels name the model that is served.",
                &["name", "digest", "execution_provider"],
            ),
            build_info: metrics.late_gauge(
                "imagegpt_build_info",
                "Always 1; the label is the worker's version.",
                &["version"],
            ),
            log_lines_dropped: metrics.counter(
                "imagegpt_log_lines_dropped_total",
                "Log lines dropped because they could not be written to standard error, or not \
                 fast enough.",
            ),
        }
    }
}
