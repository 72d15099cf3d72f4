//! Pool of one measure of the worker's capacity, with a part that bulk work
//! cannot take, and a rule by which no caller takes what others need.
//!
//! Bulk work and all that waits take from the shared part alone; the reserved
//! part stays for interactive calls. What becomes free goes to those that wait,
//! before calls that do not wait: otherwise work that waits would never get its
//! place. Callers that wait take turns and get the same (`fair.rs`); those of
//! one caller go in the order of their arrival.
//!
//! A caller that holds more than its share of the pool (the pool divided by the
//! callers that hold a part or have lately asked for one) leaves the last
//! eighth of the pool to others. So a caller alone may take nearly all, and
//! another one that comes finds room at once. From there on the other takes
//! whatever becomes free below the eighth, until both hold their share. Calls
//! without a name count as one caller, for which the rule holds only beside
//! named ones.

mod drain;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::proto::Priority;
use crate::serve::fair::{CallerId, FairOrder, FairTurn};

pub(crate) use self::drain::DrainRate;

/// Part of a pool that a caller above its share leaves to others, as a divisor:
/// large enough that another caller begins at once (128 of 1,024 images), and
/// small enough to cost a caller that is alone little.
const LEFT_PART: usize = 8;
/// Time for which a caller that holds nothing counts among the callers: one
/// that was rejected comes back within this time.
const LATELY: Duration = drain::RETRY_MAX;
/// Interval at which callers that no longer count are forgotten.
const FORGET_INTERVAL: Duration = Duration::from_secs(1);

/// Pool of capacity, in images, bytes or samples. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct CapacityPool(Arc<Pool>);

/// Part of a pool, returned to the pool when this value is dropped.
#[derive(Debug, Default)]
pub(crate) struct CapacityShare {
    of: Option<(CapacityPool, CallerId)>,
    parts: Parts,
}

/// Caller that asks for a part of a pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CapacityClaim {
    pub caller: CallerId,
    pub class: Priority,
    /// Part that the same call holds already. A call whose caller holds nothing
    /// else may take whatever is free, so that no call is impossible.
    pub own: usize,
}

/// Claim of a caller without a name.
impl From<Priority> for CapacityClaim {
    fn from(class: Priority) -> Self {
        Self {
            caller: CallerId::UNNAMED,
            class,
            own: 0,
        }
    }
}

/// Reason for which a pool gives nothing now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum NoRoom {
    /// Too little is free.
    Full,
    /// The free part is left to callers that hold less.
    OverShare,
}

#[derive(Debug)]
struct Pool {
    size: usize,
    shared_size: usize,
    state: Mutex<State>,
}

/// Sizes of the shared and the reserved part of something.
#[derive(Debug, Clone, Copy, Default)]
struct Parts {
    shared: usize,
    reserved: usize,
}

impl Parts {
    fn all(self) -> usize {
        self.shared + self.reserved
    }
}

#[derive(Debug)]
struct State {
    free: Parts,
    /// Callers that hold a part, or have lately asked for one.
    holdings: BTreeMap<CallerId, Holding>,
    forget_at: Instant,
    /// Claims that wait, by the number of their arrival.
    waiters: BTreeMap<u64, Waiter>,
    order: FairOrder<(), u64>,
    n_arrived: u64,
}

#[derive(Debug)]
struct Holding {
    n: usize,
    asked_at: Instant,
}

#[derive(Debug)]
struct Waiter {
    claim: CapacityClaim,
    n: usize,
    granted: oneshot::Sender<CapacityShare>,
}

/// Place in the line of a pool, which is left when this value is dropped.
struct Waiting<'a> {
    pool: &'a CapacityPool,
    number: u64,
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        let Some(waiter) = state.waiters.remove(&self.number) else {
            return;
        };
        state.order.remove((), waiter.claim.caller, self.number);
        // Others may have waited behind it.
        self.pool.grant(state);
    }
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
        let shared = size - reserved;
        Self(Arc::new(Pool {
            size,
            shared_size: shared,
            state: Mutex::new(State {
                free: Parts { shared, reserved },
                holdings: BTreeMap::new(),
                forget_at: Instant::now() + FORGET_INTERVAL,
                waiters: BTreeMap::new(),
                order: FairOrder::default(),
                n_arrived: 0,
            }),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic halfway through a change.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Size of the whole pool.
    #[must_use]
    pub(crate) fn size(&self) -> usize {
        self.0.size
    }

    /// Size of the part that is taken.
    #[must_use]
    pub(crate) fn taken(&self) -> usize {
        self.0.size - self.lock().free.all()
    }

    /// Largest part that a call of this class can ever have.
    #[must_use]
    pub(crate) fn size_for(&self, class: Priority) -> usize {
        match class {
            Priority::Interactive => self.0.size,
            Priority::Bulk => self.0.shared_size,
        }
    }

    /// Takes `n` at once, or nothing.
    pub(crate) fn try_take(
        &self,
        claim: impl Into<CapacityClaim>,
        n: usize,
    ) -> Result<CapacityShare, NoRoom> {
        let claim = claim.into();
        let mut state = self.lock();
        state.asks(claim.caller, Instant::now);
        let parts = state.try_take(&self.0, claim, n)?;
        drop(state);
        Ok(self.share(claim, parts))
    }

    fn share(&self, claim: CapacityClaim, parts: Parts) -> CapacityShare {
        CapacityShare {
            of: Some((self.clone(), claim.caller)),
            parts,
        }
    }

    /// Takes `n` once they are free. Pends for ever if `n` is more than bulk
    /// work can have.
    pub(crate) async fn take(&self, claim: impl Into<CapacityClaim>, n: usize) -> CapacityShare {
        let claim = claim.into();
        let (granted, share) = oneshot::channel();
        let number = {
            let mut state = self.lock();
            state.asks(claim.caller, Instant::now);
            if let Ok(parts) = state.try_take(&self.0, claim, n) {
                drop(state);
                return self.share(claim, parts);
            }
            let number = state.n_arrived;
            state.n_arrived += 1;
            state.order.insert((), claim.caller, number);
            let waiter = Waiter { claim, n, granted };
            state.waiters.insert(number, waiter);
            self.grant(state);
            number
        };
        let _waiting = Waiting { pool: self, number };
        // The sender stays in the line until it is used.
        share.await.unwrap_or_default()
    }

    /// Gives what is free to those that wait, in their turns.
    fn grant<'a>(&'a self, mut state: MutexGuard<'a, State>) {
        loop {
            let granted = state.grants(&self.0);
            drop(state);
            if granted.is_empty() {
                return;
            }
            // Sent without the lock. A share that nobody waits for any more
            // comes back here, and is given to the next.
            let mut returned = Vec::new();
            for (waiter, parts) in granted {
                let share = self.share(waiter.claim, parts);
                if let Err(mut refused) = waiter.granted.send(share) {
                    refused.of = None;
                    returned.push((waiter.claim.caller, parts));
                }
            }
            if returned.is_empty() {
                return;
            }
            state = self.lock();
            for (caller, parts) in returned {
                state.put_back(caller, parts);
            }
        }
    }
}

impl State {
    /// Notes that a caller asks, and forgets those that have not asked lately.
    fn asks(&mut self, caller: CallerId, now: impl FnOnce() -> Instant) {
        // Where no caller has a name, nobody asks when one asked last.
        let is_alone = self.holdings.len() == 1 && self.holdings.contains_key(&caller);
        if caller == CallerId::UNNAMED && is_alone {
            return;
        }
        let now = now();
        let holding = self.holdings.entry(caller).or_insert(Holding {
            n: 0,
            asked_at: now,
        });
        holding.asked_at = now;
        if self.forget_at <= now {
            self.forget_at = now + FORGET_INTERVAL;
            self.holdings
                .retain(|_, holding| holding.n > 0 || holding.asked_at + LATELY > now);
        }
    }

    /// True if the caller has more than its share with `n` more, and what it
    /// would leave is less than the part for others.
    fn is_over_share(&self, pool: &Pool, claim: CapacityClaim, n: usize) -> bool {
        let n_callers = match claim.caller {
            CallerId::UNNAMED => self.holdings.len(),
            // Another caller may come at any time.
            _ => self.holdings.len().max(2),
        };
        let (size, free) = match claim.class {
            Priority::Interactive => (pool.size, self.free.all()),
            Priority::Bulk => (pool.shared_size, self.free.shared),
        };
        let held = self.holdings.get(&claim.caller);
        let others = held
            .map_or(0, |holding| holding.n)
            .saturating_sub(claim.own);
        n_callers > 1
            && others > 0
            && others + claim.own + n > size / n_callers
            && free.saturating_sub(n) < size.div_ceil(LEFT_PART)
    }

    /// Returns the first turn of those that wait and are not over their share.
    fn next_waiter(&self, pool: &Pool) -> Option<(FairTurn<u64>, &Waiter)> {
        self.order.turns(()).find_map(|turn| {
            let waiter = self.waiters.get(&turn.rank)?;
            // What waits has nothing of the reserved part, whatever its class.
            let claim = CapacityClaim {
                class: Priority::Bulk,
                ..waiter.claim
            };
            (!self.is_over_share(pool, claim, waiter.n)).then_some((turn, waiter))
        })
    }

    fn try_take(&mut self, pool: &Pool, claim: CapacityClaim, n: usize) -> Result<Parts, NoRoom> {
        if n == 0 {
            return Ok(Parts::default());
        }
        // The reserve is taken first, so that the shared part is left to bulk
        // work.
        let reserved = match claim.class {
            Priority::Interactive => self.free.reserved.min(n),
            Priority::Bulk => 0,
        };
        let shared = n - reserved;
        // The shared part is for those that wait, if any can have it.
        if shared > self.free.shared || shared > 0 && self.next_waiter(pool).is_some() {
            return Err(NoRoom::Full);
        }
        if self.is_over_share(pool, claim, n) {
            return Err(NoRoom::OverShare);
        }
        let parts = Parts { shared, reserved };
        self.give(claim.caller, parts);
        Ok(parts)
    }

    fn give(&mut self, caller: CallerId, parts: Parts) {
        self.free.shared -= parts.shared;
        self.free.reserved -= parts.reserved;
        if let Some(holding) = self.holdings.get_mut(&caller) {
            holding.n += parts.all();
        } else {
            let asked_at = Instant::now();
            let n = parts.all();
            self.holdings.insert(caller, Holding { n, asked_at });
        }
    }

    fn put_back(&mut self, caller: CallerId, parts: Parts) {
        self.free.shared += parts.shared;
        self.free.reserved += parts.reserved;
        if let Some(holding) = self.holdings.get_mut(&caller) {
            holding.n = holding.n.saturating_sub(parts.all());
        }
    }

    /// Takes those out of the line that get their part now.
    fn grants(&mut self, pool: &Pool) -> Vec<(Waiter, Parts)> {
        let mut granted = Vec::new();
        while let Some((turn, waiter)) = self.next_waiter(pool)
            && waiter.n <= self.free.shared
            && let Some(waiter) = self.waiters.remove(&turn.rank)
        {
            self.order.serve((), &turn, waiter.n.max(1) as u64);
            let parts = Parts {
                shared: waiter.n,
                reserved: 0,
            };
            self.give(waiter.claim.caller, parts);
            granted.push((waiter, parts));
        }
        granted
    }
}

impl CapacityShare {
    /// Splits off one unit as a share of its own, if one is left.
    #[must_use]
    pub(crate) fn split_one(&mut self) -> Option<Self> {
        (self.size() > 0).then(|| self.split(1))
    }

    /// Size of the share.
    #[must_use]
    pub(crate) fn size(&self) -> usize {
        self.parts.all()
    }

    /// Splits off `n` units as a share of their own, or as many as there are.
    #[must_use]
    pub(crate) fn split(&mut self, n: usize) -> Self {
        let shared = n.min(self.parts.shared);
        let reserved = (n - shared).min(self.parts.reserved);
        self.parts.shared -= shared;
        self.parts.reserved -= reserved;
        Self {
            of: self.of.clone(),
            parts: Parts { shared, reserved },
        }
    }

    /// Adds another share of the same pool and caller to this one.
    pub(crate) fn merge(&mut self, mut other: Self) {
        if self.of.is_none() {
            self.of = other.of.take();
        }
        let parts = std::mem::take(&mut other.parts);
        self.parts.shared += parts.shared;
        self.parts.reserved += parts.reserved;
    }
}

impl Drop for CapacityShare {
    fn drop(&mut self) {
        let parts = self.parts;
        if let Some((pool, caller)) = self.of.take()
            && parts.all() > 0
        {
            let mut state = pool.lock();
            state.put_back(caller, parts);
            pool.grant(state);
        }
    }
}

#[cfg(test)]
mod tests;
