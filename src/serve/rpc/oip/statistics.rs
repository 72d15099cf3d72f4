//! Statistics since the start of the worker, in the protocol's terms.

use super::VERSION;
use crate::proto::inference as oip;
use crate::serve::metrics::totals::{CountedTime, TotalsSnapshot};

pub(super) fn of(model: &str, snapshot: &TotalsSnapshot) -> oip::ModelStatisticsResponse {
    let sums = &snapshot.sums;
    // Load tools divide each time by its own count and compare the counts with
    // each other, so all of them count the images that were run.
    let of_images = |ns| duration(sums.images.count, ns);
    let batch = |(&batch_size, sum): (&usize, &CountedTime)| oip::InferBatchStatistics {
        batch_size: batch_size as u64,
        compute_input: duration(sum.count, 0),
        compute_infer: duration(sum.count, sum.ns),
        compute_output: duration(sum.count, 0),
    };
    let stats = oip::ModelStatistics {
        name: model.to_owned(),
        version: VERSION.to_owned(),
        last_inference: sums.last_run_ms,
        inference_count: sums.images.count,
        execution_count: sums.runs.values().map(|sum| sum.count).sum(),
        inference_stats: Some(oip::InferStatistics {
            success: duration(sums.success.count, sums.success.ns),
            fail: duration(sums.fail.count, sums.fail.ns),
            queue: of_images(snapshot.queue_ns),
            compute_input: of_images(snapshot.input_ns),
            compute_infer: of_images(sums.images.ns),
            compute_output: of_images(snapshot.output_ns),
            cache_hit: duration(snapshot.cache_hits, 0),
            cache_miss: duration(snapshot.cache_misses, 0),
        }),
        batch_stats: sums.runs.iter().map(batch).collect(),
    };
    oip::ModelStatisticsResponse {
        model_stats: vec![stats],
    }
}

#[expect(clippy::unnecessary_wraps, reason = "fields of messages are optional")]
fn duration(count: u64, ns: u64) -> Option<oip::StatisticDuration> {
    Some(oip::StatisticDuration { count, ns })
}
