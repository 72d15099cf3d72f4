//! Metrics of connections, certificates and tokens.

use metrics::{Counter, Gauge};

use super::as_f64;
use super::labels::{ConnectionOutcome, ReloadedFile};
use super::registry::{Family, Registry};

/// Handles to the metrics of connections, certificates and tokens.
pub struct AccessMetrics {
    open: Gauge,
    max: Gauge,
    outcomes: Family<ConnectionOutcome, Counter>,
    reloads: Family<ReloadedFile, Counter>,
    reload_failed: Family<ReloadedFile, Gauge>,
    expiry: Gauge,
}

impl AccessMetrics {
    pub(super) fn new(metrics: &mut Registry<'_>) -> Self {
        Self {
            open: metrics.gauge(
                "imagegpt_connections_open",
                "Open connections, including those whose TLS or HTTP handshake is in progress.",
            ),
            max: metrics.gauge(
                "imagegpt_connections_max",
                "Limit on open connections: --connections-max, or fewer if ulimit -n allows fewer.",
            ),
            outcomes: metrics.counters(
                "imagegpt_connections_total",
                "Connections that were closed, rejected or could not be accepted, by outcome.",
            ),
            reloads: metrics.counters(
                "imagegpt_reloads_total",
                "Reloads of a changed certificate or token file that succeeded, by file.",
            ),
            reload_failed: metrics.gauges(
                "imagegpt_reload_failed",
                "1 while the current contents of a file cannot be used and the previous ones stay \
                 in force, else 0.",
            ),
            expiry: metrics.gauge(
                "imagegpt_tls_certificate_expiry_timestamp_seconds",
                "Unix time at which the TLS certificate in force expires, in seconds since 1970; \
                 0 without TLS.",
            ),
        }
    }

    /// Counts a connection as open.
    pub fn opened(&self) {
        self.open.increment(1.0);
    }

    /// Counts an open connection as ended.
    pub fn left(&self, outcome: ConnectionOutcome) {
        self.open.decrement(1.0);
        self.ended(outcome);
    }

    /// Counts the outcome of a connection that ended or was never let in.
    pub fn ended(&self, outcome: ConnectionOutcome) {
        self.outcomes.of(outcome).increment(1);
    }

    /// Sets the limit on open connections.
    pub fn connections_max(&self, max: usize) {
        self.max.set(as_f64(max));
    }

    /// Counts a changed file whose new contents are in force.
    pub fn reloaded(&self, file: ReloadedFile) {
        self.reloads.of(file).increment(1);
        self.reload_failed(file, false);
    }

    /// Sets whether the current contents of a file cannot be used.
    pub fn reload_failed(&self, file: ReloadedFile, failed: bool) {
        self.reload_failed
            .of(file)
            .set(if failed { 1.0 } else { 0.0 });
    }

    /// Sets the time at which the certificate in force expires.
    pub fn certificate_expiry(&self, seconds_since_1970: f64) {
        self.expiry.set(seconds_since_1970);
    }
}
