//! Metrics of the spans that are sent to a collector.

use metrics::Counter;

pub(crate) use super::labels::SpanDrop;
use super::registry::{Family, Registry};

/// Handles to the metrics of traces.
pub(crate) struct TraceMetrics {
    exported: Counter,
    dropped: Family<SpanDrop, Counter>,
}

impl TraceMetrics {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            exported: metrics.counter(
                "imagegpt_spans_exported_total",
                "Spans that the OTLP collector has taken (--otlp-endpoint).",
            ),
            dropped: metrics.counters(
                "imagegpt_spans_dropped_total",
                "Spans dropped because too many waited (queue) or the OTLP collector did not take \
                 them (collector), by reason.",
            ),
        }
    }

    /// Counts spans that the collector has taken.
    pub(crate) fn exported(&self, n_spans: usize) {
        self.exported.increment(n_spans as u64);
    }

    /// Counts spans that were dropped.
    pub(crate) fn dropped(&self, reason: SpanDrop, n_spans: usize) {
        self.dropped.of(reason).increment(n_spans as u64);
    }
}
