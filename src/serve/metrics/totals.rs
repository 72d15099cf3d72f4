//! Sums since the start, which the worker itself can read and report: the
//! exporter's histograms can be rendered, but not read.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, SystemTime};

/// Number of events, and their time together in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CountedTime {
    pub count: u64,
    pub ns: u64,
}

impl CountedTime {
    fn add(&mut self, elapsed: Duration) {
        self.count += 1;
        self.ns = self.ns.saturating_add(ns(elapsed));
    }
}

/// Sums over all callers since the start of the worker.
#[derive(Debug, Default)]
pub struct Totals {
    /// Time of decoding, resizing and quantizing.
    input_ns: AtomicU64,
    /// Time of waiting for the engine.
    queue_ns: AtomicU64,
    /// Time of making tensors from answers, where that time is measured.
    output_ns: AtomicU64,
    cache_hits: AtomicU64,
    cache_misses: AtomicU64,
    /// Sums behind one lock, so that a reader sees all of them in one state.
    sums: Mutex<TotalSums>,
}

/// Sums that are changed and read together.
#[derive(Debug, Clone, Default)]
pub struct TotalSums {
    /// Calls for inference that succeeded.
    pub success: CountedTime,
    /// Calls for inference that failed.
    pub fail: CountedTime,
    /// Images that were run; the time of a run counts once per image in the
    /// run.
    pub images: CountedTime,
    /// Runs of the model, by the number of images in the run.
    pub runs: BTreeMap<usize, CountedTime>,
    /// Time of the last run, in milliseconds since 1970.
    pub last_run_ms: u64,
}

/// Copy of all sums at one moment.
#[derive(Debug, Clone)]
pub struct TotalsSnapshot {
    pub sums: TotalSums,
    pub input_ns: u64,
    pub queue_ns: u64,
    pub output_ns: u64,
    pub cache_hits: u64,
    pub cache_misses: u64,
}

impl Totals {
    /// Counts a call for inference that has ended.
    pub fn call(&self, ok: bool, elapsed: Duration) {
        let mut sums = self.lock();
        if ok {
            sums.success.add(elapsed);
        } else {
            sums.fail.add(elapsed);
        }
    }

    /// Counts a run of `n_images` images.
    pub fn ran(&self, n_images: usize, elapsed: Duration) {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH);
        let mut sums = self.lock();
        sums.images.count += n_images as u64;
        let all = ns(elapsed).saturating_mul(n_images as u64);
        sums.images.ns = sums.images.ns.saturating_add(all);
        sums.runs.entry(n_images).or_default().add(elapsed);
        let now = now.unwrap_or_default().as_millis();
        sums.last_run_ms = u64::try_from(now).unwrap_or(u64::MAX);
    }

    /// Adds the time in which an image became tokens.
    pub fn preprocessed(&self, elapsed: Duration) {
        self.input_ns.fetch_add(ns(elapsed), Ordering::Relaxed);
    }

    /// Adds the time that an image waited for the engine.
    pub fn waited(&self, elapsed: Duration) {
        self.queue_ns.fetch_add(ns(elapsed), Ordering::Relaxed);
    }

    /// Adds the time in which the tensor of an answer was made.
    pub fn answered(&self, elapsed: Duration) {
        self.output_ns.fetch_add(ns(elapsed), Ordering::Relaxed);
    }

    /// Counts a lookup of an image in the cache.
    pub fn cache(&self, hit: bool) {
        let counter = if hit {
            &self.cache_hits
        } else {
            &self.cache_misses
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }

    #[must_use]
    pub fn snapshot(&self) -> TotalsSnapshot {
        let load = |value: &AtomicU64| value.load(Ordering::Relaxed);
        TotalsSnapshot {
            sums: self.lock().clone(),
            input_ns: load(&self.input_ns),
            queue_ns: load(&self.queue_ns),
            output_ns: load(&self.output_ns),
            cache_hits: load(&self.cache_hits),
            cache_misses: load(&self.cache_misses),
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, TotalSums> {
        // Nothing below can panic halfway through a change.
        self.sums.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn ns(elapsed: Duration) -> u64 {
    u64::try_from(elapsed.as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_image_takes_as_long_as_its_run() {
        let totals = Totals::default();
        totals.ran(4, Duration::from_nanos(10));
        totals.ran(1, Duration::from_nanos(3));
        totals.ran(4, Duration::from_nanos(20));
        let sums = totals.snapshot().sums;
        assert_eq!(sums.images, CountedTime { count: 9, ns: 123 });
        assert_eq!(sums.runs[&4], CountedTime { count: 2, ns: 30 });
        assert_eq!(sums.runs[&1], CountedTime { count: 1, ns: 3 });
    }
}
