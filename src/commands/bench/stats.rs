//! Statistics of calls: counts, latencies, and the numbers computed from them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use hdrhistogram::Histogram;
use serde::Serialize;

use crate::client::load::{CallCode, Outcomes, Refusal};

/// Significant digits of a recorded latency.
const DIGITS: u8 = 3;
/// Number of shards, each with a lock of its own, that callers spread over to
/// avoid contention.
const SHARDS: usize = 16;

#[expect(
    clippy::cast_precision_loss,
    reason = "counts and nanoseconds of a run are far below 2^53"
)]
pub(super) fn as_f64(count: u64) -> f64 {
    count as f64
}

/// Histogram of times with three significant digits.
#[derive(Debug, Clone)]
pub(super) struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        Self(Histogram::new(DIGITS).expect("three digits are allowed, and it grows by itself"))
    }
}

impl Latencies {
    pub(super) fn record(&mut self, time: Duration) {
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        // The histogram grows to the whole range of a u64, so recording cannot
        // fail.
        let _ = self.0.record(nanoseconds);
    }

    fn add(&mut self, other: &Self) {
        // Adding fails only for a histogram that cannot grow.
        let _ = self.0.add(&other.0);
    }

    /// Returns the percentiles, or `None` if nothing was recorded.
    #[must_use]
    pub(super) fn percentiles(&self) -> Option<Percentiles> {
        if self.0.is_empty() {
            return None;
        }
        let milliseconds = |nanoseconds: u64| as_f64(nanoseconds) / 1e6;
        let at = |quantile| milliseconds(self.0.value_at_quantile(quantile));
        Some(Percentiles {
            count: self.0.len(),
            mean_ms: self.0.mean() / 1e6,
            p50_ms: at(0.5),
            p90_ms: at(0.9),
            p99_ms: at(0.99),
            p99_9_ms: at(0.999),
            max_ms: milliseconds(self.0.max()),
        })
    }
}

/// Number, mean, percentiles and maximum of latencies, in milliseconds.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Percentiles {
    pub count: u64,
    pub mean_ms: f64,
    pub p50_ms: f64,
    pub p90_ms: f64,
    pub p99_ms: f64,
    pub p99_9_ms: f64,
    pub max_ms: f64,
}

/// Counts of the calls of a measurement: calls that were sent, or should have
/// been sent, after the warm-up.
#[derive(Debug, Clone, Default)]
struct Tally {
    answered: Latencies,
    /// Latencies from the time of sending; open loop only.
    answered_from_send: Latencies,
    refused: BTreeMap<CallCode, Refused>,
    lateness: Latencies,
    retries: u64,
    images_answered: u64,
    images_failed: BTreeMap<CallCode, u64>,
    /// Counts of all calls that ended within the measured window.
    window: Window,
}

/// Calls that ended with one error code.
#[derive(Debug, Clone, Default)]
struct Refused {
    is_reject: bool,
    latencies: Latencies,
    latencies_from_send: Latencies,
    images: u64,
    with_retry_info: u64,
    retry_after_max: Duration,
    /// Message of the first of these calls.
    message: String,
}

/// Counts of what ended within the measured window: the base of every rate per
/// second.
#[derive(Debug, Clone, Copy, Default)]
struct Window {
    calls: u64,
    images: u64,
    images_within_slo: u64,
}

/// Recorder of finished calls, shared by many callers.
#[derive(Debug)]
pub(super) struct Recorder {
    shards: Vec<Mutex<Tally>>,
    sent: AtomicU64,
    images_sent: AtomicU64,
    unsent: AtomicU64,
    in_flight_peak: AtomicU64,
    slo: Option<Duration>,
    from: Instant,
    /// End of the measurement; `None` if it ends after a number of calls.
    until: Option<Instant>,
}

/// A finished call.
pub(super) struct EndedCall {
    /// Time at which the call should have been sent.
    pub(super) due: Instant,
    /// Time at which the call was sent; `None` in a closed loop, where it is
    /// the due time.
    pub(super) sent: Option<Instant>,
    pub(super) ended: Instant,
    pub(super) n_images: u64,
    pub(super) retries: u64,
    pub(super) outcome: Result<Outcomes, Refusal>,
}

impl Recorder {
    pub(super) fn new(from: Instant, until: Option<Instant>, slo: Option<Duration>) -> Self {
        Self {
            shards: (0..SHARDS).map(|_| Mutex::default()).collect(),
            sent: AtomicU64::new(0),
            images_sent: AtomicU64::new(0),
            unsent: AtomicU64::new(0),
            in_flight_peak: AtomicU64::new(0),
            slo,
            from,
            until,
        }
    }

    /// Returns true if a call due at this time belongs to the measurement.
    pub(super) fn measures(&self, due: Instant) -> bool {
        due >= self.from
    }

    /// Counts a call that is sent now.
    pub(super) fn sent(&self, due: Instant, n_images: u64) {
        if self.measures(due) {
            self.sent.fetch_add(1, Ordering::Relaxed);
            self.images_sent.fetch_add(n_images, Ordering::Relaxed);
        }
    }

    /// Counts a call that was due but never sent.
    pub(super) fn unsent(&self) {
        self.unsent.fetch_add(1, Ordering::Relaxed);
    }

    /// Records the number of calls in flight now.
    pub(super) fn in_flight(&self, n_calls: u64) {
        self.in_flight_peak.fetch_max(n_calls, Ordering::Relaxed);
    }

    fn shard(&self, of: usize) -> MutexGuard<'_, Tally> {
        let shard = &self.shards[of % SHARDS];
        shard.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Records how much later than due a call was sent.
    pub(super) fn lateness(&self, of: usize, due: Instant, sent: Instant) {
        if self.measures(due) {
            let late = sent.saturating_duration_since(due);
            self.shard(of).lateness.record(late);
        }
    }

    pub(super) fn done(&self, of: usize, call: EndedCall) {
        let latency = call.ended.saturating_duration_since(call.due);
        let from_send = call
            .sent
            .map(|sent| call.ended.saturating_duration_since(sent));
        let within_slo = self.slo.is_none_or(|slo| latency <= slo);
        let in_window = call.ended >= self.from && self.until.is_none_or(|end| call.ended < end);
        let measured = self.measures(call.due);
        let mut tally = self.shard(of);
        if measured {
            tally.retries += call.retries;
        }
        match call.outcome {
            Ok(images) => {
                let n_good = images.iter().filter(|image| image.is_ok()).count() as u64;
                if in_window {
                    tally.window.calls += 1;
                    tally.window.images += n_good;
                    tally.window.images_within_slo += if within_slo { n_good } else { 0 };
                }
                if measured {
                    tally.answered.record(latency);
                    if let Some(time) = from_send {
                        tally.answered_from_send.record(time);
                    }
                    tally.images_answered += n_good;
                    for code in images.iter().filter_map(|image| image.as_ref().err()) {
                        *tally.images_failed.entry(*code).or_default() += 1;
                    }
                }
            }
            Err(refusal) if measured => {
                let refused = tally.refused.entry(refusal.code).or_default();
                refused.is_reject = refusal.is_reject();
                refused.latencies.record(latency);
                if let Some(time) = from_send {
                    refused.latencies_from_send.record(time);
                }
                refused.images += call.n_images;
                if let Some(after) = refusal.retry_after {
                    refused.with_retry_info += 1;
                    refused.retry_after_max = refused.retry_after_max.max(after);
                }
                if refused.message.is_empty() {
                    refused.message = refusal.message;
                }
            }
            Err(_) => {}
        }
    }

    /// Returns a summary for the progress line.
    pub(super) fn glance(&self) -> String {
        let (mut calls, mut images) = (0, 0);
        for idx in 0..SHARDS {
            let window = self.shard(idx).window;
            calls += window.calls;
            images += window.images;
        }
        let seconds = self.from.elapsed().as_secs_f64().max(1e-9);
        format!("{calls} calls, {:.1} images/s", as_f64(images) / seconds)
    }

    /// Returns the sum of all shards, once the last call has ended. `elapsed`
    /// is the length of the measured window.
    pub(super) fn counts(&self, elapsed: Duration) -> CallCounts {
        let mut sum = Tally::default();
        for idx in 0..SHARDS {
            sum.add(&self.shard(idx));
        }
        let seconds = elapsed.as_secs_f64().max(1e-9);
        let answered = sum.answered.0.len();
        let sent = self.sent.load(Ordering::Relaxed);
        let (mut rejected, mut failed) = (BTreeMap::new(), BTreeMap::new());
        let mut n_refused = 0;
        for (code, refused) in &sum.refused {
            let calls = refused.latencies.0.len();
            n_refused += calls;
            let to = if refused.is_reject {
                &mut rejected
            } else {
                &mut failed
            };
            to.insert(
                *code,
                CodeCounts {
                    calls,
                    images: refused.images,
                    latency: refused.latencies.percentiles(),
                    latency_from_send: refused.latencies_from_send.percentiles(),
                    with_retry_info: refused.with_retry_info,
                    retry_after_max_ms: 1e3 * refused.retry_after_max.as_secs_f64(),
                    message: refused.message.clone(),
                },
            );
        }
        CallCounts {
            sent,
            answered,
            abandoned: sent.saturating_sub(answered + n_refused),
            unsent: self.unsent.load(Ordering::Relaxed),
            in_flight_peak: self.in_flight_peak.load(Ordering::Relaxed),
            retries: sum.retries,
            rejected,
            failed,
            images_sent: self.images_sent.load(Ordering::Relaxed),
            images_answered: sum.images_answered,
            images_failed: sum.images_failed,
            requests_per_second: as_f64(sum.window.calls) / seconds,
            images_per_second: as_f64(sum.window.images) / seconds,
            goodput_images_per_second: as_f64(sum.window.images_within_slo) / seconds,
            latency: sum.answered.percentiles(),
            latency_from_send: sum.answered_from_send.percentiles(),
            lateness: sum.lateness.percentiles(),
        }
    }
}

impl Tally {
    fn add(&mut self, other: &Self) {
        self.answered.add(&other.answered);
        self.answered_from_send.add(&other.answered_from_send);
        self.lateness.add(&other.lateness);
        self.retries += other.retries;
        self.images_answered += other.images_answered;
        for (code, count) in &other.images_failed {
            *self.images_failed.entry(*code).or_default() += count;
        }
        for (code, refused) in &other.refused {
            let sum = self.refused.entry(*code).or_default();
            sum.is_reject = refused.is_reject;
            sum.latencies.add(&refused.latencies);
            sum.latencies_from_send.add(&refused.latencies_from_send);
            sum.images += refused.images;
            sum.with_retry_info += refused.with_retry_info;
            sum.retry_after_max = sum.retry_after_max.max(refused.retry_after_max);
            if sum.message.is_empty() {
                sum.message.clone_from(&refused.message);
            }
        }
        self.window.calls += other.window.calls;
        self.window.images += other.window.images;
        self.window.images_within_slo += other.window.images_within_slo;
    }
}

/// Results of one measurement. For calls, `sent` = `answered` + `rejected` +
/// `failed` + `abandoned`. Rates per second refer to calls that ended within
/// the window, all other counts to calls that were due in the window.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CallCounts {
    pub sent: u64,
    /// Calls that were answered, even if the answer says that an image failed.
    pub answered: u64,
    /// Calls that the tool abandoned because it was interrupted.
    pub abandoned: u64,
    /// Calls that could not be sent before the end of the measurement because
    /// `--in-flight-max` calls were in flight.
    pub unsent: u64,
    /// Largest number of calls in flight at the same time; open loop only.
    pub in_flight_peak: u64,
    pub retries: u64,
    /// Calls that the worker rejected for lack of room, by code.
    pub rejected: BTreeMap<CallCode, CodeCounts>,
    /// Calls that ended with any other error code, by code.
    pub failed: BTreeMap<CallCode, CodeCounts>,
    pub images_sent: u64,
    pub images_answered: u64,
    /// Failed images inside answers, by code.
    pub images_failed: BTreeMap<CallCode, u64>,
    pub requests_per_second: f64,
    pub images_per_second: f64,
    /// Images per second that were answered within `--slo`; all images without
    /// `--slo`.
    pub goodput_images_per_second: f64,
    /// Latencies of answered calls from the time at which they were due.
    pub latency: Option<Percentiles>,
    /// Latencies of answered calls from the time at which they left the tool;
    /// open loop only. If they are much shorter than `latency`, the tool or its
    /// machine was late, not the worker.
    pub latency_from_send: Option<Percentiles>,
    /// Lateness of the tool: time from due to sent; open loop only.
    pub lateness: Option<Percentiles>,
}

impl CallCounts {
    #[must_use]
    pub(super) fn n_rejected(&self) -> u64 {
        self.rejected.values().map(|code| code.calls).sum()
    }

    #[must_use]
    pub(super) fn n_failed(&self) -> u64 {
        self.failed.values().map(|code| code.calls).sum()
    }

    /// Returns the 99th percentile of answered calls, in milliseconds.
    #[must_use]
    pub(super) fn p99_ms(&self) -> Option<f64> {
        self.latency.map(|latency| latency.p99_ms)
    }
}

/// Calls that ended with one error code.
#[derive(Debug, Clone, Serialize)]
pub(super) struct CodeCounts {
    pub calls: u64,
    pub images: u64,
    pub latency: Option<Percentiles>,
    /// Latencies from the time at which the calls left the tool; open loop
    /// only.
    pub latency_from_send: Option<Percentiles>,
    /// Calls whose status carries a `google.rpc.RetryInfo`.
    pub with_retry_info: u64,
    pub retry_after_max_ms: f64,
    /// Message of the first of these calls.
    pub message: String,
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::proto::GrpcCode;

    fn refusal(code: CallCode) -> Refusal {
        Refusal {
            code,
            message: code.name().to_lowercase(),
            retry_after: (code == CallCode::Grpc(GrpcCode::ResourceExhausted))
                .then_some(Duration::from_millis(7)),
        }
    }

    #[test]
    fn counts_add_up() {
        let start = Instant::now();
        let at = |milliseconds| start + Duration::from_millis(milliseconds);
        let recorder = Recorder::new(at(100), Some(at(1100)), Some(Duration::from_millis(50)));
        let call = |due, ended, outcome| {
            recorder.sent(at(due), 2);
            let done = EndedCall {
                due: at(due),
                sent: None,
                ended: at(ended),
                n_images: 2,
                retries: 0,
                outcome,
            };
            recorder.done(usize::try_from(due).unwrap(), done);
        };
        let good = || Ok(vec![Ok(Bytes::new()), Ok(Bytes::new())]);
        // Sent during the warm-up; only the end is within the window.
        call(50, 150, good());
        call(200, 210, good());
        // Slower than the SLO.
        call(300, 400, good());
        // Sent within the window, answered after it.
        call(1000, 1200, good());
        call(
            400,
            410,
            Ok(vec![
                Ok(Bytes::new()),
                Err(CallCode::Grpc(GrpcCode::InvalidArgument)),
            ]),
        );
        call(
            500,
            501,
            Err(refusal(CallCode::Grpc(GrpcCode::ResourceExhausted))),
        );
        call(
            600,
            660,
            Err(refusal(CallCode::Grpc(GrpcCode::DeadlineExceeded))),
        );
        recorder.sent(at(700), 2);
        let counts = recorder.counts(Duration::from_secs(1));
        assert_eq!((counts.sent, counts.answered), (7, 4));
        assert_eq!((counts.n_rejected(), counts.n_failed()), (1, 1));
        assert_eq!(counts.abandoned, 1);
        assert_eq!((counts.images_sent, counts.images_answered), (14, 7));
        assert_eq!(
            counts.images_failed[&CallCode::Grpc(GrpcCode::InvalidArgument)],
            1
        );
        let near = |got: f64, expected: f64| assert!((got - expected).abs() < 1e-6, "{got}");
        near(counts.requests_per_second, 4.0);
        near(counts.images_per_second, 7.0);
        near(counts.goodput_images_per_second, 3.0);
        assert_eq!(
            counts.rejected[&CallCode::Grpc(GrpcCode::ResourceExhausted)].with_retry_info,
            1
        );
        let latency = counts.latency.unwrap();
        assert!((latency.max_ms - 200.0).abs() < 1.0 && latency.count == 4);
    }

    #[test]
    fn percentiles_are_exact_to_three_digits() {
        let mut latencies = Latencies::default();
        assert!(latencies.percentiles().is_none());
        for milliseconds in 1..=1000 {
            latencies.record(Duration::from_millis(milliseconds));
        }
        let got = latencies.percentiles().unwrap();
        for (got, expected) in [
            (got.p50_ms, 500.0),
            (got.p90_ms, 900.0),
            (got.p99_ms, 990.0),
            (got.p99_9_ms, 999.0),
            (got.max_ms, 1000.0),
        ] {
            assert!((got / expected - 1.0).abs() < 2e-3, "{got} {expected}");
        }
    }
}
