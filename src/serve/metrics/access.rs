//! Metrics of connections, certificates and tokens.

use std::collections::BTreeMap;

use metrics::{Counter, Gauge};

use super::{Registry, as_f64};

const CONNECTIONS_OPEN: &str = "imagegpt_connections_open";
const CONNECTIONS_MAX: &str = "imagegpt_connections_max";
const CONNECTIONS: &str = "imagegpt_connections_total";
const RELOADS: &str = "imagegpt_reloads_total";
const RELOAD_FAILED: &str = "imagegpt_reload_failed";
const CERTIFICATE_EXPIRY: &str = "imagegpt_tls_certificate_expiry_timestamp_seconds";

pub(super) const COUNTERS: [(&str, &str); 2] = [
    (
        CONNECTIONS,
        "Connections that ended or were refused, by outcome.",
    ),
    (
        RELOADS,
        "Times that a replaced certificate or token file was taken.",
    ),
];

pub(super) const GAUGES: [(&str, &str); 4] = [
    (
        CONNECTIONS_OPEN,
        "Connections that are open, with those that shake hands.",
    ),
    (CONNECTIONS_MAX, "The limit on open connections."),
    (
        RELOAD_FAILED,
        "1 while the file as it is now cannot be used and the one before is in force.",
    ),
    (
        CERTIFICATE_EXPIRY,
        "When the certificate in force ends, in seconds since 1970; 0 without TLS.",
    ),
];

/// What became of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConnectionOutcome {
    /// It was let in and has closed.
    Closed,
    /// It was closed at once, for want of a place.
    Refused,
    /// A connection was closed at once, because its address has as many as one may have.
    RefusedAddress,
    /// A connection without a call gave its place to another one.
    SentAway,
    /// The client did not finish its handshake, or not in time.
    HandshakeFailed,
    /// The system gave no connection, for want of file descriptors mostly.
    AcceptFailed,
}

impl ConnectionOutcome {
    const ALL: [Self; 6] = [
        Self::Closed,
        Self::Refused,
        Self::RefusedAddress,
        Self::SentAway,
        Self::HandshakeFailed,
        Self::AcceptFailed,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Refused => "refused",
            Self::RefusedAddress => "refused_address",
            Self::SentAway => "sent_away",
            Self::HandshakeFailed => "handshake_failed",
            Self::AcceptFailed => "accept_failed",
        }
    }
}

/// Files that may be replaced while the worker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AccessFile {
    Certificate,
    Tokens,
}

impl AccessFile {
    const ALL: [Self; 2] = [Self::Certificate, Self::Tokens];

    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Tokens => "tokens",
        }
    }
}

/// Handles to these metrics.
pub struct AccessMetrics {
    open: Gauge,
    max: Gauge,
    outcomes: BTreeMap<ConnectionOutcome, Counter>,
    reloads: BTreeMap<AccessFile, Counter>,
    reload_failed: BTreeMap<AccessFile, Gauge>,
    expiry: Gauge,
}

impl AccessMetrics {
    pub(super) fn new(registry: &Registry<'_>) -> Self {
        Self {
            open: registry.gauge(CONNECTIONS_OPEN, &[]),
            max: registry.gauge(CONNECTIONS_MAX, &[]),
            outcomes: ConnectionOutcome::ALL
                .into_iter()
                .map(|outcome| {
                    let labels = [("outcome", outcome.label())];
                    (outcome, registry.counter(CONNECTIONS, &labels))
                })
                .collect(),
            reloads: AccessFile::ALL
                .into_iter()
                .map(|file| {
                    let labels = [("file", file.label())];
                    (file, registry.counter(RELOADS, &labels))
                })
                .collect(),
            reload_failed: AccessFile::ALL
                .into_iter()
                .map(|file| {
                    let labels = [("file", file.label())];
                    (file, registry.gauge(RELOAD_FAILED, &labels))
                })
                .collect(),
            expiry: registry.gauge(CERTIFICATE_EXPIRY, &[]),
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
        if let Some(counter) = self.outcomes.get(&outcome) {
            counter.increment(1);
        }
    }

    /// How many may be open.
    pub fn connections_max(&self, max: usize) {
        self.max.set(as_f64(max));
    }

    /// A replaced file is in force.
    pub fn reloaded(&self, file: AccessFile) {
        if let Some(counter) = self.reloads.get(&file) {
            counter.increment(1);
        }
        self.reload_failed(file, false);
    }

    /// Whether the file as it is now cannot be used.
    pub fn reload_failed(&self, file: AccessFile, failed: bool) {
        if let Some(gauge) = self.reload_failed.get(&file) {
            gauge.set(if failed { 1.0 } else { 0.0 });
        }
    }

    /// When the certificate in force ends.
    pub fn certificate_expiry(&self, seconds_since_1970: f64) {
        self.expiry.set(seconds_since_1970);
    }
}
