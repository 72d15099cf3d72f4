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
    /// So many images are being generated.
    pub fn sequences(&self, n: usize) {
        self.0.generation.sequences.set(as_f64(n));
    }

    /// So many may be, each keeping so many bytes.
    pub fn sequences_max(&self, n: usize, bytes: usize) {
        self.0.generation.sequences_max.set(as_f64(n));
        self.0
            .generation
            .cache_bytes_max
            .set(as_f64(n.saturating_mul(bytes)));
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
