//! Metrics of images that are generated.

use metrics::{Counter, Gauge};

use super::labels::FedTokens;
use super::registry::{Family, Registry};
use super::{Metrics, as_f64};

/// Handles to these metrics.
pub(crate) struct GenerationMetrics {
    sequences: Gauge,
    sequences_max: Gauge,
    cache_bytes_max: Gauge,
    tokens: Family<FedTokens, Counter>,
}

impl GenerationMetrics {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            sequences: metrics.gauge(
                "imagegpt_sequences",
                "Images that are being generated.",
            ),
            sequences_max: metrics.gauge(
                "imagegpt_sequences_max",
                "The limit on images that are generated at one time.",
            ),
            cache_bytes_max: metrics.gauge(
                "imagegpt_sequence_cache_bytes_max",
                "Bytes of keys and values that so many images keep.",
            ),
            tokens: metrics.counters(
                "imagegpt_tokens_total",
                "Tokens that were fed to sequences: drawn or known ones of a step, and those of primers.",
            ),
        }
    }
}

impl Metrics {
    /// An engine generates so many images, after so many before.
    pub fn sequences(&self, before: usize, n: usize) {
        // A sum over engines, of which each knows its own part alone.
        let gauge = &self.handles().generation.sequences;
        gauge.increment(as_f64(n) - as_f64(before));
    }

    /// An engine may generate so many, each keeping so many bytes.
    pub fn slots_added(&self, n: usize, bytes: usize) {
        let metrics = &self.handles().generation;
        metrics.sequences_max.increment(as_f64(n));
        let all = as_f64(n.saturating_mul(bytes));
        metrics.cache_bytes_max.increment(all);
    }

    /// That engine has ended.
    pub fn slots_removed(&self, n: usize, bytes: usize) {
        let metrics = &self.handles().generation;
        metrics.sequences_max.decrement(as_f64(n));
        let all = as_f64(n.saturating_mul(bytes));
        metrics.cache_bytes_max.decrement(all);
    }

    /// A step took so many sequences a pixel further.
    pub fn generated(&self, n: usize) {
        self.handles()
            .generation
            .tokens
            .of(FedTokens::Step)
            .increment(n as u64);
    }

    /// So many tokens of a primer were fed.
    pub fn prefilled(&self, n: usize) {
        self.handles()
            .generation
            .tokens
            .of(FedTokens::Primer)
            .increment(n as u64);
    }
}
