//! Rate at which work leaves the worker, and the retry delay that follows from
//! it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Retry delay for a rejected caller before any batch was measured.
const RETRY_UNMEASURED: Duration = Duration::from_secs(1);
/// Bounds of the retry delay: shorter, a retry is a busy loop; longer, the
/// delay is a guess.
const RETRY_MIN: Duration = Duration::from_millis(10);
pub(super) const RETRY_MAX: Duration = Duration::from_secs(30);

/// Rate in images per second at which the engines answer while they are busy,
/// as the batcher last measured it.
#[derive(Debug, Clone, Default)]
pub(crate) struct DrainRate(Arc<AtomicU64>);

impl DrainRate {
    /// Replaces the rate.
    pub(crate) fn set(&self, images_per_second: f64) {
        self.0.store(images_per_second.to_bits(), Ordering::Relaxed);
    }

    /// Returns the rate, once one was measured.
    #[must_use]
    pub(crate) fn get(&self) -> Option<f64> {
        let rate = f64::from_bits(self.0.load(Ordering::Relaxed));
        (rate > 0.0).then_some(rate)
    }

    /// Retry delay for a rejected caller: the time in which half to all of the
    /// images in the worker will have been answered.
    pub(in crate::serve) fn retry_after(&self, n_images: usize, jitter: f64) -> Duration {
        let Some(rate) = self.get() else {
            return RETRY_UNMEASURED;
        };
        #[expect(clippy::cast_precision_loss, reason = "images are at most a million")]
        let seconds = n_images as f64 / rate * (0.5 + 0.5 * jitter);
        Duration::try_from_secs_f64(seconds)
            .unwrap_or(RETRY_MAX)
            .clamp(RETRY_MIN, RETRY_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_times_follow_the_measured_rate() {
        let drain = DrainRate::default();
        assert_eq!(drain.retry_after(100, 0.5), RETRY_UNMEASURED);
        drain.set(50.0);
        assert_eq!(drain.retry_after(100, 0.0), Duration::from_secs(1));
        assert_eq!(drain.retry_after(100, 1.0), Duration::from_secs(2));
        assert_eq!(drain.retry_after(0, 1.0), RETRY_MIN);
        assert_eq!(drain.retry_after(1_000_000, 1.0), RETRY_MAX);
    }
}
