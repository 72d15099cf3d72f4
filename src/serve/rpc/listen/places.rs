//! The places of connections, and which connection leaves when another waits.
//!
//! A client that answers pings could hold its connections for ever, so a place
//! without a call is only lent. When all are taken, a newcomer's arrival sends
//! one of those away that have no call in progress. The ones that never had a
//! call leave first, in the order in which they came, then the others by the
//! end of their last call. Calls that need no token (health) and reflection
//! neither keep a connection nor renew it, or a client without a token could
//! hold a place by them.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::serve::metrics::{ConnectionOutcome, Metrics};

/// Age of a connection that has had no call, and rest since the last call of
/// one that has, before which it is not sent away: clients that make one call
/// after another keep their places, and a newcomer has time for its handshake
/// and its first call.
const REST_MIN: Duration = Duration::from_secs(1);
/// Time for a connection that was told to go away to do so, a round trip and a
/// ping; then it is cut.
const LEAVE_TIME: Duration = Duration::from_secs(1);
/// Time for a connection that was cut to be gone: its task only has to run.
const CUT_TIME: Duration = Duration::from_secs(1);
/// Newcomers that may wait for a place at once; each holds a file descriptor.
pub(super) const WAITING_MAX: usize = 64;
/// Calls without a token in progress on one connection, watches with them. A
/// probe has one; each costs a task and some kilobytes.
const OPEN_CALLS_PER_CONNECTION: usize = 16;
/// Watches of one connection. A client that balances its own load has one for
/// each name that it asks about, and the worker has four.
const WATCHES_PER_CONNECTION: usize = 8;
/// Watches of all connections beyond the first of each. The first is always
/// had, so that nobody can use up what others need.
const WATCHES_SHARED: usize = 4096;
/// Streams of reflection on one connection: a tool opens one after the other.
const REFLECTIONS_PER_CONNECTION: usize = 4;
/// Streams of reflection in the worker. Each may hold an answer (some 64 KiB)
/// that its client does not take.
const REFLECTIONS_MAX: usize = 256;

/// All places of the worker. Cheap to clone.
#[derive(Clone)]
pub(super) struct ConnectionPermits(Arc<Shared>);

struct Shared {
    max: usize,
    /// None is no limit.
    per_address_max: Option<usize>,
    free: Arc<Semaphore>,
    waiting: Arc<Semaphore>,
    watches: Arc<Semaphore>,
    reflections: Arc<Semaphore>,
    metrics: Metrics,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// Grows with each arrival and each end of a connection's last call.
    clock: u64,
    guests: HashMap<u64, Entry>,
    /// Connections that have had no call, by when they came.
    unused: BTreeMap<u64, u64>,
    /// Connections that have no call now, by when the last one ended.
    rested: BTreeMap<u64, u64>,
    addresses: HashMap<IpAddr, usize>,
}

struct Entry {
    n_calls: usize,
    /// Key of the connection where it is listed, if it is.
    order: Option<u64>,
    was_used: bool,
    since: Instant,
    /// True if its client has yet to begin to speak HTTP.
    is_pending: bool,
    was_sent_away: bool,
    leave: Option<oneshot::Sender<()>>,
    cut: Option<oneshot::Sender<()>>,
}

/// Why a connection gets no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// All are taken, and nobody can be sent away.
    Full,
    /// The address has as many connections as one may have.
    Address,
}

impl NoPlace {
    pub(super) fn outcome(self) -> ConnectionOutcome {
        match self {
            Self::Full => ConnectionOutcome::Refused,
            Self::Address => ConnectionOutcome::RefusedAddress,
        }
    }
}

impl ConnectionPermits {
    pub(super) fn new(max: usize, per_address_max: Option<usize>, metrics: Metrics) -> Self {
        Self(Arc::new(Shared {
            max,
            per_address_max,
            free: Arc::new(Semaphore::new(max)),
            waiting: Arc::new(Semaphore::new(WAITING_MAX)),
            watches: Arc::new(Semaphore::new(WATCHES_SHARED)),
            reflections: Arc::new(Semaphore::new(REFLECTIONS_MAX)),
            metrics,
            state: Mutex::default(),
        }))
    }

    /// A place for a connection from this address, or the right to wait for one
    /// that somebody is asked to leave.
    pub(super) fn enter(&self, addr: Option<IpAddr>) -> Result<Newcomer, NoPlace> {
        let address = self.count_address(addr)?;
        if let Ok(permit) = Arc::clone(&self.0.free).try_acquire_owned() {
            return Ok(Newcomer {
                address,
                seat: Seat::Free(permit),
            });
        }
        let waiting = Arc::clone(&self.0.waiting).try_acquire_owned();
        let waiting = waiting.map_err(|_| NoPlace::Full)?;
        let leaving = self.lock().send_away(self.0.max).ok_or(NoPlace::Full)?;
        Ok(Newcomer {
            address,
            seat: Seat::After {
                leaving,
                _waiting: waiting,
            },
        })
    }

    fn count_address(&self, addr: Option<IpAddr>) -> Result<Address, NoPlace> {
        let addr = addr.map(subscriber);
        if let Some(addr) = addr {
            let mut state = self.lock();
            let count = state.addresses.entry(addr).or_default();
            if self.0.per_address_max.is_some_and(|max| *count >= max) {
                return Err(NoPlace::Address);
            }
            *count += 1;
        }
        Ok(Address {
            places: self.clone(),
            addr,
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic halfway through a change.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl std::fmt::Debug for ConnectionPermits {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ConnectionPermits")
    }
}

impl State {
    fn next(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Asks the connection that has been without a call the longest to leave;
    /// none where all have calls or had one a moment ago.
    fn send_away(&mut self, max: usize) -> Option<u64> {
        let rests = |state: &Self, id: &u64| {
            let entry = state.guests.get(id);
            entry.is_some_and(|entry| entry.since.elapsed() >= REST_MIN)
        };
        // Clients that only connect may not take more than half of the places
        // from those that call, however fast they come.
        let crowded = self.unused.len() > max / 2;
        let oldest = self.unused.values().next().copied();
        let unused = oldest.filter(|id| crowded || rests(self, id));
        let longest = self.rested.values().next().copied();
        let id = unused.or_else(|| longest.filter(|id| rests(self, id)))?;
        self.unlist(id);
        let entry = self.guests.get_mut(&id)?;
        entry.was_sent_away = true;
        let word = if entry.is_pending {
            // Nothing is lost with it.
            entry.cut.take()
        } else {
            entry.leave.take()
        };
        if let Some(word) = word {
            let _ = word.send(());
        }
        Some(id)
    }

    /// Takes a connection out of the lists of those that may be sent away.
    fn unlist(&mut self, id: u64) {
        let Some(entry) = self.guests.get_mut(&id) else {
            return;
        };
        if let Some(order) = entry.order.take() {
            self.unused.remove(&order);
            self.rested.remove(&order);
        }
    }

    /// Ends a connection that was asked to leave and has no call.
    fn cut(&mut self, id: u64) {
        let entry = self.guests.get_mut(&id);
        if let Some(entry) = entry.filter(|entry| entry.n_calls == 0)
            && let Some(cut) = entry.cut.take()
        {
            let _ = cut.send(());
        }
    }
}

/// Returns the network or host that an address counts as. A provider gives a subscriber of IPv6 a /64 at
/// the least, and with it 2^64 addresses to come from.
fn subscriber(addr: IpAddr) -> IpAddr {
    match addr.to_canonical() {
        IpAddr::V6(addr) => {
            let network = u128::from(addr) >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from(network))
        }
        addr @ IpAddr::V4(_) => addr,
    }
}

/// One connection in its address's count.
#[derive(Debug)]
struct Address {
    places: ConnectionPermits,
    addr: Option<IpAddr>,
}

impl Drop for Address {
    fn drop(&mut self) {
        let Some(addr) = self.addr else { return };
        let mut state = self.places.lock();
        if let Some(count) = state.addresses.get_mut(&addr) {
            *count -= 1;
            if *count == 0 {
                state.addresses.remove(&addr);
            }
        }
    }
}

/// A connection that has a place, or waits for one.
#[derive(Debug)]
pub(super) struct Newcomer {
    address: Address,
    seat: Seat,
}

#[derive(Debug)]
enum Seat {
    Free(OwnedSemaphorePermit),
    After {
        leaving: u64,
        _waiting: OwnedSemaphorePermit,
    },
}

impl Newcomer {
    /// Returns its place, and how it learns that it has to leave; none if no place
    /// is free in time.
    pub(super) async fn sit(self) -> Option<(ConnectionPermit, Leave)> {
        let Self { address, seat } = self;
        let places = address.places.clone();
        let permit = match seat {
            Seat::Free(permit) => permit,
            Seat::After { leaving, _waiting } => {
                let mut free = std::pin::pin!(Arc::clone(&places.0.free).acquire_owned());
                let permit = if let Ok(permit) = tokio::time::timeout(LEAVE_TIME, &mut free).await {
                    permit
                } else {
                    places.lock().cut(leaving);
                    tokio::time::timeout(CUT_TIME, free).await.ok()?
                };
                permit.ok()?
            }
        };
        Some(ConnectionPermit::new(places, address, permit))
    }
}

/// How a connection learns that it has to leave.
#[derive(Debug)]
pub(super) struct Leave {
    /// After the calls that it has.
    pub(super) leave: oneshot::Receiver<()>,
    /// Now.
    pub(super) cut: oneshot::Receiver<()>,
}

/// A connection's place, counted.
#[derive(Debug)]
pub(super) struct ConnectionPermit {
    pub(super) guest: Guest,
    pub(super) outcome: ConnectionOutcome,
    _address: Address,
    _permit: OwnedSemaphorePermit,
}

impl ConnectionPermit {
    fn new(
        places: ConnectionPermits,
        address: Address,
        permit: OwnedSemaphorePermit,
    ) -> (Self, Leave) {
        places.0.metrics.access().opened();
        let (leave_in, leave) = oneshot::channel();
        let (cut_in, cut) = oneshot::channel();
        let mut state = places.lock();
        let id = state.next();
        state.unused.insert(id, id);
        let entry = Entry {
            n_calls: 0,
            order: Some(id),
            was_used: false,
            since: Instant::now(),
            is_pending: true,
            was_sent_away: false,
            leave: Some(leave_in),
            cut: Some(cut_in),
        };
        state.guests.insert(id, entry);
        drop(state);
        let guest = Guest {
            id,
            open_calls: Arc::new(Semaphore::new(OPEN_CALLS_PER_CONNECTION)),
            watches: Arc::new(Semaphore::new(WATCHES_PER_CONNECTION)),
            reflections: Arc::new(Semaphore::new(REFLECTIONS_PER_CONNECTION)),
            places,
        };
        let place = Self {
            guest,
            outcome: ConnectionOutcome::Closed,
            _address: address,
            _permit: permit,
        };
        (place, Leave { leave, cut })
    }
}

impl Drop for ConnectionPermit {
    fn drop(&mut self) {
        let places = &self.guest.places;
        let mut state = places.lock();
        state.unlist(self.guest.id);
        let entry = state.guests.remove(&self.guest.id);
        drop(state);
        let outcome = match self.outcome {
            ConnectionOutcome::Closed if entry.is_some_and(|entry| entry.was_sent_away) => {
                ConnectionOutcome::SentAway
            }
            outcome => outcome,
        };
        places.0.metrics.access().left(outcome);
    }
}

/// A connection, as its calls know it. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::serve::rpc) struct Guest {
    id: u64,
    places: ConnectionPermits,
    open_calls: Arc<Semaphore>,
    watches: Arc<Semaphore>,
    reflections: Arc<Semaphore>,
}

/// Too many of a kind: how many may be, and of what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {max} are in progress on this {whole}, which is the limit; {remedy}")]
pub(in crate::serve::rpc) struct TooMany {
    what: &'static str,
    max: usize,
    whole: &'static str,
    remedy: &'static str,
}

impl Guest {
    /// The client has begun to speak HTTP.
    pub(super) fn speaks(&self) {
        if let Some(entry) = self.places.lock().guests.get_mut(&self.id) {
            entry.is_pending = false;
        }
    }

    /// A call that keeps the connection's place until what this gives is
    /// dropped.
    pub(in crate::serve::rpc) fn call(&self) -> InUse {
        let mut state = self.places.lock();
        if let Some(entry) = state.guests.get_mut(&self.id) {
            entry.n_calls += 1;
            if entry.n_calls == 1 {
                state.unlist(self.id);
            }
        }
        drop(state);
        InUse(self.clone())
    }

    fn call_ended(&self) {
        let mut state = self.places.lock();
        let order = state.next();
        let Some(entry) = state.guests.get_mut(&self.id) else {
            return;
        };
        entry.n_calls -= 1;
        entry.was_used = true;
        if entry.n_calls == 0 {
            entry.since = Instant::now();
            entry.order = Some(order);
            state.rested.insert(order, self.id);
        }
    }

    /// A call without a token.
    pub(in crate::serve::rpc) fn open_call(&self) -> Result<OwnedSemaphorePermit, TooMany> {
        let permit = Arc::clone(&self.open_calls).try_acquire_owned();
        permit.map_err(|_| TooMany {
            what: "health: calls",
            max: OPEN_CALLS_PER_CONNECTION,
            whole: "connection",
            remedy: "await their answers first",
        })
    }

    /// A watch of health.
    pub(in crate::serve::rpc) fn watch(&self) -> Result<WatchPermit, TooMany> {
        let own = Arc::clone(&self.watches).try_acquire_owned();
        let own = own.map_err(|_| TooMany {
            what: "health: watches",
            max: WATCHES_PER_CONNECTION,
            whole: "connection",
            remedy: "end one, or use Check",
        })?;
        let is_first = self.watches.available_permits() + 1 == WATCHES_PER_CONNECTION;
        let shared = if is_first {
            None
        } else {
            let shared = Arc::clone(&self.places.0.watches).try_acquire_owned();
            Some(shared.map_err(|_| TooMany {
                what: "health: watches beyond the first of each connection",
                max: WATCHES_SHARED,
                whole: "worker",
                remedy: "use Check",
            })?)
        };
        Ok(WatchPermit {
            _own: own,
            _shared: shared,
        })
    }

    /// A stream of reflection.
    pub(in crate::serve::rpc) fn reflection(
        &self,
    ) -> Result<(OwnedSemaphorePermit, OwnedSemaphorePermit), TooMany> {
        let take = |permits: &Arc<Semaphore>, max, whole| {
            let permit = Arc::clone(permits).try_acquire_owned();
            permit.map_err(|_| TooMany {
                what: "reflection: streams",
                max,
                whole,
                remedy: "end one first",
            })
        };
        let own = take(&self.reflections, REFLECTIONS_PER_CONNECTION, "connection")?;
        let all = take(&self.places.0.reflections, REFLECTIONS_MAX, "worker")?;
        Ok((own, all))
    }
}

/// A call in progress on a connection.
#[derive(Debug)]
pub(in crate::serve::rpc) struct InUse(Guest);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.call_ended();
    }
}

/// A watch's share of what watches may hold.
#[derive(Debug)]
pub(in crate::serve::rpc) struct WatchPermit {
    _own: OwnedSemaphorePermit,
    _shared: Option<OwnedSemaphorePermit>,
}

#[cfg(test)]
mod tests;
