//! Pool of one measure of the worker's capacity, with a part that bulk work
//! cannot take.
//!
//! A pool has two semaphores, because of how a fair semaphore treats those who
//! wait: a place that becomes free goes to the first in line, so a bulk stream
//! that always waits would take every place, and calls that do not wait would
//! find none. Bulk work waits at the shared part alone; the reserved part stays
//! for interactive calls.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::proto::Priority;

/// Retry delay for a rejected caller before any batch was measured.
const RETRY_UNMEASURED: Duration = Duration::from_secs(1);
/// Bounds of the retry delay: shorter, a retry is a busy loop; longer, the
/// delay is a guess.
const RETRY_MIN: Duration = Duration::from_millis(10);
const RETRY_MAX: Duration = Duration::from_secs(30);

/// Pool of capacity, in images, bytes or samples. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct CapacityPool {
    shared: Arc<Semaphore>,
    reserved: Arc<Semaphore>,
    size: usize,
    shared_size: usize,
}

/// Part of a pool, returned to the pool when this value is dropped.
#[derive(Debug, Default)]
pub(crate) struct CapacityShare {
    shared: Option<OwnedSemaphorePermit>,
    reserved: Option<OwnedSemaphorePermit>,
}

impl CapacityPool {
    /// Creates a pool of `size`, of which `reserve_percent` percent are for
    /// interactive calls alone.
    #[must_use]
    pub(crate) fn new(size: usize, reserve_percent: u8) -> Self {
        // The division comes first: sizes in bytes may be near the largest
        // number.
        let reserved = size / 100 * usize::from(reserve_percent)
            + size % 100 * usize::from(reserve_percent) / 100;
        Self {
            shared: Arc::new(Semaphore::new(size - reserved)),
            reserved: Arc::new(Semaphore::new(reserved)),
            size,
            shared_size: size - reserved,
        }
    }

    /// Size of the whole pool.
    #[must_use]
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Size of the part that is taken.
    #[must_use]
    pub(crate) fn taken(&self) -> usize {
        let free = self.shared.available_permits() + self.reserved.available_permits();
        self.size.saturating_sub(free)
    }

    /// Largest part that a call of this class can ever have.
    #[must_use]
    pub(crate) fn size_for(&self, class: Priority) -> usize {
        match class {
            Priority::Interactive => self.size,
            Priority::Bulk => self.shared_size,
        }
    }

    /// Takes `n` at once, or nothing.
    #[must_use]
    pub(crate) fn try_take(&self, class: Priority, n: usize) -> Option<CapacityShare> {
        let mut share = CapacityShare::default();
        let mut rest = n;
        if class == Priority::Interactive {
            // The reserve is taken first, so that the shared part is left to
            // bulk work. Another call may be faster between looking and taking;
            // then the shared part has to suffice.
            let n_reserved = self.reserved.available_permits().min(n);
            share.reserved = acquire(&self.reserved, n_reserved);
            if share.reserved.is_some() {
                rest -= n_reserved;
            }
        }
        if rest > 0 {
            share.shared = Some(acquire(&self.shared, rest)?);
        }
        Some(share)
    }

    /// Takes `n` once they are free. Pends for ever if `n` is more than bulk
    /// work can have.
    pub(crate) async fn take(&self, class: Priority, n: usize) -> CapacityShare {
        if let Some(share) = self.try_take(class, n) {
            return share;
        }
        let n = u32::try_from(n).unwrap_or(u32::MAX);
        let shared = Arc::clone(&self.shared).acquire_many_owned(n).await;
        CapacityShare {
            // The semaphores are never closed.
            shared: shared.ok(),
            reserved: None,
        }
    }
}

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
    pub(super) fn retry_after(&self, n_images: usize, jitter: f64) -> Duration {
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

fn acquire(semaphore: &Arc<Semaphore>, n: usize) -> Option<OwnedSemaphorePermit> {
    let n = u32::try_from(n).ok()?;
    Arc::clone(semaphore).try_acquire_many_owned(n).ok()
}

impl CapacityShare {
    /// Splits off one unit as a share of its own, if one is left.
    #[must_use]
    pub(crate) fn split_one(&mut self) -> Option<Self> {
        let mut one = Self::default();
        if let Some(permit) = &mut self.shared {
            one.shared = permit.split(1);
        }
        if one.shared.is_none() {
            let permit = self.reserved.as_mut()?;
            one.reserved = Some(permit.split(1)?);
        }
        Some(one)
    }

    /// Size of the share.
    #[must_use]
    pub(crate) fn size(&self) -> usize {
        let permits = OwnedSemaphorePermit::num_permits;
        self.shared.as_ref().map_or(0, permits) + self.reserved.as_ref().map_or(0, permits)
    }

    /// Splits off `n` units as a share of their own, or as many as there are.
    #[must_use]
    pub(crate) fn split(&mut self, n: usize) -> Self {
        let shared = split(self.shared.as_mut(), n);
        let n_shared = shared.as_ref().map_or(0, OwnedSemaphorePermit::num_permits);
        let reserved = split(self.reserved.as_mut(), n - n_shared);
        Self { shared, reserved }
    }

    /// Adds another share of the same pool to this one.
    pub(crate) fn merge(&mut self, other: Self) {
        merge(&mut self.shared, other.shared);
        merge(&mut self.reserved, other.reserved);
    }
}

fn split(permit: Option<&mut OwnedSemaphorePermit>, n: usize) -> Option<OwnedSemaphorePermit> {
    let permit = permit?;
    permit.split(n.min(permit.num_permits()))
}

fn merge(one: &mut Option<OwnedSemaphorePermit>, other: Option<OwnedSemaphorePermit>) {
    match (one.as_mut(), other) {
        (Some(one), Some(other)) => one.merge(other),
        (None, other) => *one = other,
        (Some(_), None) => {}
    }
}

#[cfg(test)]
mod tests {
    use Priority::{Bulk, Interactive};

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

    #[test]
    fn bulk_cannot_take_the_reserve() {
        let pool = CapacityPool::new(10, 25);
        let bulk = pool.try_take(Bulk, 8).expect("8 are shared");
        assert!(pool.try_take(Bulk, 1).is_none());
        let interactive = pool.try_take(Interactive, 2).expect("2 are reserved");
        assert!(pool.try_take(Interactive, 1).is_none());
        assert_eq!(pool.taken(), 10);
        drop(interactive);
        drop(bulk);
        assert_eq!(pool.taken(), 0);
    }

    #[test]
    fn interactive_calls_use_both_parts() {
        let pool = CapacityPool::new(10, 25);
        let all = pool.try_take(Interactive, 10).expect("all");
        assert!(pool.try_take(Interactive, 1).is_none());
        drop(all);
        assert!(pool.try_take(Interactive, 11).is_none());
        assert_eq!(pool.taken(), 0, "a refusal keeps nothing");
        assert!(pool.try_take(Bulk, 0).is_some());
    }

    #[test]
    fn a_share_splits_into_ones() {
        let pool = CapacityPool::new(10, 50);
        let mut share = pool.try_take(Interactive, 7).expect("7");
        let ones: Vec<CapacityShare> = std::iter::from_fn(|| share.split_one()).collect();
        assert_eq!(ones.len(), 7);
        drop(share);
        assert_eq!(pool.taken(), 7);
        let mut one = CapacityShare::default();
        for other in ones {
            one.merge(other);
        }
        drop(one);
        assert_eq!(pool.taken(), 0);
    }

    #[test]
    fn a_part_of_a_share_is_given_back_alone() {
        let pool = CapacityPool::new(10, 50);
        let mut share = pool.try_take(Interactive, 7).expect("7");
        drop(share.split(4));
        assert_eq!(pool.taken(), 3);
        drop(share.split(9));
        assert_eq!(pool.taken(), 0);
        drop(share);
        assert_eq!(pool.taken(), 0);
    }

    #[tokio::test]
    async fn bulk_that_waits_keeps_no_interactive_call_out() {
        let pool = CapacityPool::new(4, 25);
        let held = pool.try_take(Bulk, 3).expect("3 are shared");
        let waiting = {
            let pool = pool.clone();
            tokio::spawn(async move { pool.take(Bulk, 1).await })
        };
        tokio::task::yield_now().await;
        for _ in 0..100 {
            assert!(pool.try_take(Interactive, 1).is_some());
        }
        drop(held);
        drop(waiting.await.expect("no panic"));
        assert_eq!(pool.taken(), 0);
    }

    #[test]
    fn large_pools_do_not_overflow() {
        let size = 1 << 60;
        let pool = CapacityPool::new(size, 25);
        assert_eq!(pool.size_for(Bulk), size - size / 4);
    }
}
