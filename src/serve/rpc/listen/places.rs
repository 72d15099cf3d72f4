//! Places of open connections, and the choice of the connection that must close
//! when a new one waits for a place.
//!
//! A client that answers pings could hold its connections for ever, so a place
//! without a call is only lent. When all places are taken, each new connection
//! makes one connection without a call in progress close. Connections that
//! never had a call close first, in the order of their arrival; then the
//! others, in the order in which their last calls ended. Calls that need no
//! token (health) and reflection do not count as calls here; otherwise a client
//! without a token could hold a place with them.

use std::collections::{BTreeMap, HashMap};
use std::net::{IpAddr, Ipv6Addr};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::serve::metrics::{ConnectionOutcome, Metrics};

/// Shortest time since a connection's last call, or since its arrival if the
/// connection has had no call, before the connection may be closed for a new
/// one. Clients that make one call after another keep their places, and a new
/// connection has time for its handshake and its first call.
const REST_MIN: Duration = Duration::from_secs(1);
/// Time for a connection to close after it was asked to (a round trip and a
/// ping); after it the connection is cut.
const LEAVE_TIME: Duration = Duration::from_secs(1);
/// Time for a connection that was cut to free its place: its task only has to
/// run.
const CUT_TIME: Duration = Duration::from_secs(1);
/// Largest number of new connections that wait for a place at the same time;
/// each holds a file descriptor.
pub(super) const WAITING_MAX: usize = 64;
/// Largest number of calls without a token in progress on one connection,
/// including watches. A probe needs one call; each call costs a task and a few
/// kilobytes.
const OPEN_CALLS_PER_CONNECTION: usize = 16;
/// Largest number of health watches on one connection. A client that balances
/// its own load has one watch per service name that it asks about, and the
/// worker has four names.
const WATCHES_PER_CONNECTION: usize = 8;
/// Largest number of health watches over all connections, not counting the
/// first watch of each connection. The first watch is always granted, so that
/// no client can use up the watches that others need.
const WATCHES_SHARED: usize = 4096;
/// Largest number of reflection streams on one connection: a tool opens one
/// after the other.
const REFLECTIONS_PER_CONNECTION: usize = 4;
/// Largest number of reflection streams in the worker. Each stream may hold an
/// answer of about 64 KiB that its client does not read.
const REFLECTIONS_MAX: usize = 256;

/// All places for connections of the worker. Cheap to clone.
#[derive(Clone)]
pub(super) struct ConnectionPermits(Arc<Shared>);

struct Shared {
    max: usize,
    /// Limit on connections of one address; none if there is no limit.
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
    /// Counter that grows with each new connection and each end of a
    /// connection's last call.
    clock: u64,
    guests: HashMap<u64, Entry>,
    /// Connections that have had no call, by their order of arrival.
    unused: BTreeMap<u64, u64>,
    /// Connections that have no call now, by the order in which their last
    /// calls ended.
    rested: BTreeMap<u64, u64>,
    addresses: HashMap<IpAddr, usize>,
}

struct Entry {
    n_calls: usize,
    /// Key of the connection in `unused` or `rested`, if one of them lists the
    /// connection.
    order: Option<u64>,
    was_used: bool,
    since: Instant,
    /// True if the client has not yet begun to speak HTTP.
    is_pending: bool,
    was_sent_away: bool,
    leave: Option<oneshot::Sender<()>>,
    cut: Option<oneshot::Sender<()>>,
}

/// Reason for which a connection gets no place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum NoPlace {
    /// All places are taken, and no connection can be closed.
    Full,
    /// The address has reached its limit on connections.
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

    /// Returns a place for a connection from this address, or the right to wait
    /// for the place of a connection that was asked to close.
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

    /// Asks the connection that has been without a call for the longest time to
    /// close, and returns its id; none if all connections have calls or had one
    /// a moment ago.
    fn send_away(&mut self, max: usize) -> Option<u64> {
        let rests = |state: &Self, id: &u64| {
            let entry = state.guests.get(id);
            entry.is_some_and(|entry| entry.since.elapsed() >= REST_MIN)
        };
        // Clients that only connect may take at most half of the places from
        // clients that call, however fast they connect.
        let crowded = self.unused.len() > max / 2;
        let oldest = self.unused.values().next().copied();
        let unused = oldest.filter(|id| crowded || rests(self, id));
        let longest = self.rested.values().next().copied();
        let id = unused.or_else(|| longest.filter(|id| rests(self, id)))?;
        self.unlist(id);
        let entry = self.guests.get_mut(&id)?;
        entry.was_sent_away = true;
        let word = if entry.is_pending {
            // No call is lost with a connection that has not begun to speak
            // HTTP.
            entry.cut.take()
        } else {
            entry.leave.take()
        };
        if let Some(word) = word {
            let _ = word.send(());
        }
        Some(id)
    }

    /// Removes a connection from the lists of connections that may be asked to
    /// close.
    fn unlist(&mut self, id: u64) {
        let Some(entry) = self.guests.get_mut(&id) else {
            return;
        };
        if let Some(order) = entry.order.take() {
            self.unused.remove(&order);
            self.rested.remove(&order);
        }
    }

    /// Cuts a connection that was asked to close and has no call.
    fn cut(&mut self, id: u64) {
        let entry = self.guests.get_mut(&id);
        if let Some(entry) = entry.filter(|entry| entry.n_calls == 0)
            && let Some(cut) = entry.cut.take()
        {
            let _ = cut.send(());
        }
    }
}

/// Returns the network or host as which an address is counted. An IPv6
/// subscriber gets a /64 network or a larger one from the provider, and can use
/// all of its 2^64 addresses.
fn subscriber(addr: IpAddr) -> IpAddr {
    match addr.to_canonical() {
        IpAddr::V6(addr) => {
            let network = u128::from(addr) >> 64 << 64;
            IpAddr::V6(Ipv6Addr::from(network))
        }
        addr @ IpAddr::V4(_) => addr,
    }
}

/// Guard that counts one connection of an address.
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
    /// Waits for the connection's place, and returns the place and the signals
    /// that the connection must close; none if no place becomes free in time.
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

/// Signals by which a connection learns that it must close.
#[derive(Debug)]
pub(super) struct Leave {
    /// Asks the connection to close after its calls in progress.
    pub(super) leave: oneshot::Receiver<()>,
    /// Tells the connection to close at once.
    pub(super) cut: oneshot::Receiver<()>,
}

/// Place of one connection, which counts as open until the place is dropped.
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

/// Handle of a connection for its calls. Cheap to clone.
#[derive(Debug, Clone)]
pub(in crate::serve::rpc) struct Guest {
    id: u64,
    places: ConnectionPermits,
    open_calls: Arc<Semaphore>,
    watches: Arc<Semaphore>,
    reflections: Arc<Semaphore>,
}

/// Error of a call or stream beyond a limit of its connection or of the worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{what}: {max} are in progress on this {whole}, which is the limit; {remedy}")]
pub(in crate::serve::rpc) struct TooMany {
    what: &'static str,
    max: usize,
    whole: &'static str,
    remedy: &'static str,
}

impl Guest {
    /// Notes that the client has begun to speak HTTP.
    pub(super) fn speaks(&self) {
        if let Some(entry) = self.places.lock().guests.get_mut(&self.id) {
            entry.is_pending = false;
        }
    }

    /// Counts a call that keeps the connection's place until the returned guard
    /// is dropped.
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

    /// Counts a call without a token until the returned permit is dropped.
    pub(in crate::serve::rpc) fn open_call(&self) -> Result<OwnedSemaphorePermit, TooMany> {
        let permit = Arc::clone(&self.open_calls).try_acquire_owned();
        permit.map_err(|_| TooMany {
            what: "health: calls",
            max: OPEN_CALLS_PER_CONNECTION,
            whole: "connection",
            remedy: "await their answers first",
        })
    }

    /// Counts a health watch until the returned permit is dropped.
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

    /// Counts a reflection stream until the returned permits are dropped.
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

/// Guard of a call in progress on a connection.
#[derive(Debug)]
pub(in crate::serve::rpc) struct InUse(Guest);

impl Drop for InUse {
    fn drop(&mut self) {
        self.0.call_ended();
    }
}

/// Permit of one health watch.
#[derive(Debug)]
pub(in crate::serve::rpc) struct WatchPermit {
    _own: OwnedSemaphorePermit,
    _shared: Option<OwnedSemaphorePermit>,
}

#[cfg(test)]
mod tests;
