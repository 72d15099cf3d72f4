//! Metrics of calls, of the engine and of the worker: an expression each.

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

/// Eighths: below 1 the engine ran with room to spare.
const FILLS: [f64; 8] = [0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0];

/// Handles of calls, their images and what they hold.
pub(super) struct RequestHandles {
    pub(super) requests: Family<(RpcMethod, GrpcCode), Counter>,
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
            bytes_in_flight: metrics.gauge(
                "imagegpt_bytes_in_flight",
                "Bytes that requests and answers hold.",
            ),
            bytes_in_flight_max: metrics.gauge(
                "imagegpt_bytes_in_flight_max",
                "The limit on bytes in flight.",
            ),
            streams: metrics.gauge("imagegpt_streams", "Streams that are open."),
            answers_not_taken: metrics.counter(
                "imagegpt_answers_not_taken_total",
                "Answers that were given up because their client did not take them.",
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
            cache_lookups: metrics.counters(
                "imagegpt_cache_lookups_total",
                "Images looked for in the cache, by result.",
            ),
            cache_bytes: metrics.gauge(
                "imagegpt_cache_bytes",
                "Bytes of answers that are kept.",
            ),
        }
    }
}

/// Handles of the queue and of runs of the model.
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
                "Images that wait for the engine, by class.",
            ),
            queue_duration: metrics.histograms(
                "imagegpt_queue_duration_seconds",
                "Time an image waited for the engine after preprocessing.",
                durations(),
            ),
            coalesced: metrics.counter(
                "imagegpt_images_coalesced_total",
                "Images that shared another one's run because they were the same.",
            ),
            batches: metrics.counters(
                "imagegpt_batches_total",
                "Batches formed, by what closed them.",
            ),
            batch_size: metrics.histograms(
                "imagegpt_batch_size",
                "Images in one run, by graph.",
                BATCH_SIZES.to_vec(),
            ),
            batch_size_max: metrics.gauge(
                "imagegpt_batch_size_max",
                "The largest batch that every device takes; below --max-batch-size after memory ran out.",
            ),
            batch_fill: metrics.histogram(
                "imagegpt_batch_fill_ratio",
                "Images in one run divided by the size that it ran at.",
                FILLS.to_vec(),
            ),
            batch_padding: metrics.counter(
                "imagegpt_batch_padding_images_total",
                "Rows that were run to fill a batch size.",
            ),
            inference_duration: metrics.histograms(
                "imagegpt_inference_duration_seconds",
                "Time of one run of the model, by graph.",
                durations(),
            ),
            drain_rate: metrics.gauge(
                "imagegpt_drain_rate_images_per_second",
                "Images per second that all engines answer while they are busy.",
            ),
            engine_gap: metrics.device_histogram(
                "imagegpt_engine_gap_seconds",
                "Time a device had nothing to run before a run that was already possible.",
                durations(),
            ),
            engine_fallback: metrics.gauges(
                "imagegpt_engine_fallback",
                "1 if the engine does without this kind of thing, which could not be had.",
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
            device_up: metrics.device_gauge(
                "imagegpt_device_up",
                "1 while a device takes work, else 0.",
            ),
        }
    }
}

/// Handles of the worker as a whole.
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
            log_lines_dropped: metrics.counter(
                "imagegpt_log_lines_dropped_total",
                "Log lines that could not be written to standard error, or not fast enough.",
            ),
        }
    }
}
