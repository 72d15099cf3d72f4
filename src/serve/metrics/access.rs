//! Metrics of connections, certificates and tokens.

use metrics::{Counter, Gauge};

use super::as_f64;
use super::labels::{AccessFile, ConnectionOutcome};
use super::registry::{Family, Registry};

/// Handles to these metrics.
pub struct AccessMetrics {
    open: Gauge,
    max: Gauge,
    outcomes: Family<ConnectionOutcome, Counter>,
    reloads: Family<AccessFile, Counter>,
    reload_failed: Family<AccessFile, Gauge>,
    expiry: Gauge,
}

impl AccessMetrics {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            open: metrics.gauge(
                "imagegpt_connections_open",
                "Connections that are open, with those that shake hands.",
            ),
            max: metrics.gauge("imagegpt_connections_max", "The limit on open connections."),
            outcomes: metrics.counters(
                "imagegpt_connections_total",
                "Connections that ended or were refused, by outcome.",
            ),
            reloads: metrics.counters(
                "imagegpt_reloads_total",
                "Times that a replaced certificate or token file was taken.",
            ),
            reload_failed: metrics.gauges(
                "imagegpt_reload_failed",
                "1 while the file as it is now cannot be used and the one before is in force.",
            ),
            expiry: metrics.gauge(
                "imagegpt_tls_certificate_expiry_timestamp_seconds",
                "When the certificate in force ends, in seconds since 1970; 0 without TLS.",
            ),
        }
    }

    /// A connection has taken a place.
    pub fn opened(&self) {
        self.open.increment(1.0);
    }

    /// A connection has left its place.
    pub fn left(&self, outcome: ConnectionOutcome) {
        self.open.decrement(1.0);
        self.ended(outcome);
    }

    /// A connection ended, or never took a place.
    pub fn ended(&self, outcome: ConnectionOutcome) {
        self.outcomes.of(outcome).increment(1);
    }

    /// How many may be open.
    pub fn connections_max(&self, max: usize) {
        self.max.set(as_f64(max));
    }

    /// A replaced file is in force.
    pub fn reloaded(&self, file: AccessFile) {
        self.reloads.of(file).increment(1);
        self.reload_failed(file, false);
    }

    /// Whether the file as it is now cannot be used.
    pub fn reload_failed(&self, file: AccessFile, failed: bool) {
        self.reload_failed
            .of(file)
            .set(if failed { 1.0 } else { 0.0 });
    }

    /// When the certificate in force ends.
    pub fn certificate_expiry(&self, seconds_since_1970: f64) {
        self.expiry.set(seconds_since_1970);
    }
}
