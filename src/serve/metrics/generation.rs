//! Metrics of images that are generated.

use metrics::{Counter, Gauge};

use super::labels::FedTokens;
use super::registry::{Family, Registry};
use super::{Metrics, as_f64};

/// Handles to the metrics of generated images.
pub(crate) struct GenerationMetrics {
    sequences: Gauge,
    sequences_max: Gauge,
    cache_bytes_max: Gauge,
    tokens: Family<FedTokens, Counter>,
}

impl GenerationMetrics {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            sequences: metrics.gauge("imagegpt_sequences", "Images that are being generated now."),
            sequences_max: metrics.gauge(
                "imagegpt_sequences_max",
                "Limit on images that are generated at the same time, over all devices.",
            ),
            cache_bytes_max: metrics.gauge(
                "imagegpt_sequence_cache_bytes_max",
                "Bytes of the key/value cache when imagegpt_sequences_max images are being \
                 generated.",
            ),
            tokens: metrics.counters(
                "imagegpt_tokens_total",
                "Tokens fed to images that are generated, by kind: drawn or known tokens of a \
                 step (step), or tokens of a primer (primer).",
            ),
        }
    }
}

impl Metrics {
    /// Changes the number of images that an engine generates from `before` to
    /// `n`.
    pub fn sequences(&self, before: usize, n: usize) {
        // The gauge is a sum over engines; each engine knows only its own part.
        let gauge = &self.handles().generation.sequences;
        gauge.increment(as_f64(n) - as_f64(before));
    }

    /// Adds the slots of an engine that generates up to `n` images at the same
    /// time, each with `bytes` bytes of key/value cache.
    pub fn slots_added(&self, n: usize, bytes: usize) {
        let metrics = &self.handles().generation;
        metrics.sequences_max.increment(as_f64(n));
        let all = as_f64(n.saturating_mul(bytes));
        metrics.cache_bytes_max.increment(all);
    }

    /// Removes the slots of an engine that has ended.
    pub fn slots_removed(&self, n: usize, bytes: usize) {
        let metrics = &self.handles().generation;
        metrics.sequences_max.decrement(as_f64(n));
        let all = as_f64(n.saturating_mul(bytes));
        metrics.cache_bytes_max.decrement(all);
    }

    /// Counts a step that advanced `n` images by one pixel each.
    pub fn generated(&self, n: usize) {
        self.handles()
            .generation
            .tokens
            .of(FedTokens::Step)
            .increment(n as u64);
    }

    /// Counts `n` tokens of a primer that were fed.
    pub fn prefilled(&self, n: usize) {
        self.handles()
            .generation
            .tokens
            .of(FedTokens::Primer)
            .increment(n as u64);
    }
}
