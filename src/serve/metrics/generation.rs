//! Metrics of images that are generated.

use metrics::{Counter, Gauge};

use super::{Metrics, Registry, as_f64};

const SEQUENCES: &str = "imagegpt_sequences";
const SEQUENCES_MAX: &str = "imagegpt_sequences_max";
const CACHE_BYTES_MAX: &str = "imagegpt_sequence_cache_bytes_max";
const TOKENS: &str = "imagegpt_tokens_total";

pub(super) const COUNTERS: [(&str, &str); 1] = [(
    TOKENS,
    "Tokens that were fed to sequences: drawn or known ones of a step, and those of primers.",
)];

pub(super) const GAUGES: [(&str, &str); 3] = [
    (SEQUENCES, "Images that are being generated."),
    (
        SEQUENCES_MAX,
        "The limit on images that are generated at one time.",
    ),
    (
        CACHE_BYTES_MAX,
        "Bytes of keys and values that so many images keep.",
    ),
];

/// Handles to these metrics.
pub struct GenerationMetrics {
    sequences: Gauge,
    sequences_max: Gauge,
    cache_bytes_max: Gauge,
    stepped: Counter,
    primers: Counter,
}

impl GenerationMetrics {
    pub(super) fn new(registry: &Registry<'_>) -> Self {
        Self {
            sequences: registry.gauge(SEQUENCES, &[]),
            sequences_max: registry.gauge(SEQUENCES_MAX, &[]),
            cache_bytes_max: registry.gauge(CACHE_BYTES_MAX, &[]),
            stepped: registry.counter(TOKENS, &[("kind", "step")]),
            primers: registry.counter(TOKENS, &[("kind", "primer")]),
        }
    }
}

impl Metrics {
    /// An engine generates so many images, after so many before.
    pub fn sequences(&self, before: usize, n: usize) {
        // A sum over engines, of which each knows its own part alone.
        let gauge = &self.0.generation.sequences;
        gauge.increment(as_f64(n) - as_f64(before));
    }

    /// An engine may generate so many, each keeping so many bytes.
    pub fn slots_added(&self, n: usize, bytes: usize) {
        let metrics = &self.0.generation;
        metrics.sequences_max.increment(as_f64(n));
        let all = as_f64(n.saturating_mul(bytes));
        metrics.cache_bytes_max.increment(all);
    }

    /// That engine has ended.
    pub fn slots_removed(&self, n: usize, bytes: usize) {
        let metrics = &self.0.generation;
        metrics.sequences_max.decrement(as_f64(n));
        let all = as_f64(n.saturating_mul(bytes));
        metrics.cache_bytes_max.decrement(all);
    }

    /// A step took so many sequences a pixel further.
    pub fn generated(&self, n: usize) {
        self.0.generation.stepped.increment(n as u64);
    }

    /// So many tokens of a primer were fed.
    pub fn prefilled(&self, n: usize) {
        self.0.generation.primers.increment(n as u64);
    }
}
