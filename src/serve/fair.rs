//! Fair shares among callers whose work waits (start-time fair queuing).
//!
//! Each caller has an account of the service that it got. While several callers
//! wait, the caller with the lowest account goes first, so that all get the
//! same service, however much each has waiting. A caller that comes back begins
//! no lower than the lowest account of those that wait: time in which it asked
//! for nothing earns no credit. Accounts are closed once nothing waits.
//!
//! With one caller all accounts are equal, and the ranks alone decide.
//!
//! The order is a plain data structure: nothing here waits or reads a clock.
//! Every operation takes time in proportion to the logarithm of what waits.

use std::collections::{BTreeMap, BTreeSet};

/// Number of a caller, which belongs to one name for as long as the process
/// lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub(crate) struct CallerId(pub(crate) u32);

impl CallerId {
    /// All callers without a name, who count as one caller.
    pub(crate) const UNNAMED: Self = Self(0);
}

/// Place of a caller's first entry in a lane; the least goes first.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct FairTurn<R> {
    /// Service that the caller got, as far as it counts.
    served: u64,
    pub(crate) rank: R,
    pub(crate) caller: CallerId,
}

/// Order of the entries of one class: among callers by the service that they
/// got, and within a caller by rank. The entries are in lanes; a caller has one
/// account for all of them.
#[derive(Debug)]
pub(crate) struct FairOrder<L, R> {
    accounts: BTreeMap<CallerId, Account>,
    /// Callers with entries, by their accounts.
    waiting: BTreeSet<(u64, CallerId)>,
    /// Callers without entries that got more service than those that wait.
    idle: BTreeSet<(u64, CallerId)>,
    /// Lowest account with which a caller can come back.
    least: u64,
    lanes: BTreeMap<L, Lane<R>>,
}

#[derive(Debug)]
struct Account {
    served: u64,
    n_waiting: usize,
}

#[derive(Debug)]
struct Lane<R> {
    ranks: BTreeMap<CallerId, BTreeSet<R>>,
    /// First entry of each caller.
    turns: BTreeSet<FairTurn<R>>,
}

impl<R: Ord + Copy> Lane<R> {
    /// Changes a caller's ranks or account, and moves the turn that follows
    /// from them.
    fn change(
        &mut self,
        caller: CallerId,
        (before, after): (u64, u64),
        change: impl FnOnce(&mut BTreeSet<R>),
    ) {
        let ranks = self.ranks.entry(caller).or_default();
        let turn = |served, ranks: &BTreeSet<R>| {
            let rank = *ranks.first()?;
            Some(FairTurn {
                served,
                rank,
                caller,
            })
        };
        let old = turn(before, ranks);
        change(ranks);
        let new = turn(after, ranks);
        if ranks.is_empty() {
            self.ranks.remove(&caller);
        }
        if old != new {
            if let Some(old) = old {
                self.turns.remove(&old);
            }
            self.turns.extend(new);
        }
    }
}

impl<L, R> Default for FairOrder<L, R> {
    fn default() -> Self {
        Self {
            accounts: BTreeMap::new(),
            waiting: BTreeSet::new(),
            idle: BTreeSet::new(),
            least: 0,
            lanes: BTreeMap::new(),
        }
    }
}

impl<L: Ord + Copy, R: Ord + Copy> FairOrder<L, R> {
    /// Adds an entry of a caller to a lane.
    pub(crate) fn insert(&mut self, lane: L, caller: CallerId, rank: R) {
        let least = self.least;
        let account = self.accounts.entry(caller).or_insert(Account {
            served: least,
            n_waiting: 0,
        });
        if account.n_waiting == 0 {
            self.idle.remove(&(account.served, caller));
            account.served = account.served.max(least);
            self.waiting.insert((account.served, caller));
        }
        account.n_waiting += 1;
        let served = account.served;
        let lane = self.lanes.entry(lane).or_insert_with(|| Lane {
            ranks: BTreeMap::new(),
            turns: BTreeSet::new(),
        });
        lane.change(caller, (served, served), |ranks| {
            ranks.insert(rank);
        });
    }

    /// Removes an entry that was not served.
    pub(crate) fn remove(&mut self, lane: L, caller: CallerId, rank: R) {
        let (Some(account), Some(lane)) =
            (self.accounts.get_mut(&caller), self.lanes.get_mut(&lane))
        else {
            return;
        };
        let mut found = false;
        let served = account.served;
        lane.change(caller, (served, served), |ranks| {
            found = ranks.remove(&rank);
        });
        if !found {
            return;
        }
        account.n_waiting -= 1;
        if account.n_waiting == 0 {
            self.waiting.remove(&(served, caller));
            self.idle.insert((served, caller));
            self.settle();
        }
    }

    /// Removes an entry that is served, and charges its caller `cost`.
    pub(crate) fn serve(&mut self, lane: L, turn: &FairTurn<R>, cost: u64) {
        let caller = turn.caller;
        if let Some(account) = self.accounts.get_mut(&caller) {
            let before = account.served;
            let after = before.saturating_add(cost);
            account.served = after;
            self.waiting.remove(&(before, caller));
            self.waiting.insert((after, caller));
            for lane in self.lanes.values_mut() {
                if lane.ranks.contains_key(&caller) {
                    lane.change(caller, (before, after), |_| {});
                }
            }
        }
        self.remove(lane, caller, turn.rank);
        self.settle();
    }

    /// Raises the least account to that of the callers that wait, and closes
    /// the accounts that are not above it.
    fn settle(&mut self) {
        let Some(&(lowest, _)) = self.waiting.first() else {
            self.accounts.clear();
            self.idle.clear();
            self.least = 0;
            return;
        };
        self.least = self.least.max(lowest);
        while let Some(&(served, caller)) = self.idle.first()
            && served <= self.least
        {
            self.idle.pop_first();
            self.accounts.remove(&caller);
        }
    }

    /// Returns the turn that comes next in a lane.
    #[must_use]
    pub(crate) fn first(&self, lane: L) -> Option<FairTurn<R>> {
        self.turns(lane).next()
    }

    /// Returns the first turn of each caller in a lane, in their order.
    pub(crate) fn turns(&self, lane: L) -> impl Iterator<Item = FairTurn<R>> {
        let lane = self.lanes.get(&lane).into_iter();
        lane.flat_map(|lane| lane.turns.iter().copied())
    }

    /// Number of a caller's entries, in all lanes.
    #[must_use]
    pub(crate) fn n_waiting(&self, caller: CallerId) -> usize {
        let account = self.accounts.get(&caller);
        account.map_or(0, |account| account.n_waiting)
    }

    /// Number of a caller's entries in a lane that go before a rank.
    #[must_use]
    pub(crate) fn n_before(&self, lane: L, caller: CallerId, rank: R) -> usize {
        let ranks = self
            .lanes
            .get(&lane)
            .and_then(|lane| lane.ranks.get(&caller));
        ranks.map_or(0, |ranks| ranks.range(..rank).count())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: CallerId = CallerId(1);
    const B: CallerId = CallerId(2);
    const C: CallerId = CallerId(3);

    /// Order with one lane, whose ranks are the numbers of arrival.
    #[derive(Default)]
    struct Line {
        order: FairOrder<(), u32>,
        n_arrived: u32,
    }

    impl Line {
        fn push(&mut self, caller: CallerId, n: usize) {
            for _ in 0..n {
                self.order.insert((), caller, self.n_arrived);
                self.n_arrived += 1;
            }
        }

        fn serve(&mut self) -> Option<CallerId> {
            let turn = self.order.first(())?;
            self.order.serve((), &turn, 1);
            Some(turn.caller)
        }

        /// Serves `n` entries and counts those of A, B and C.
        fn count(&mut self, n: usize) -> [usize; 3] {
            let mut counts = [0; 3];
            for _ in 0..n {
                if let Some(caller) = self.serve() {
                    counts[caller.0 as usize - 1] += 1;
                }
            }
            counts
        }
    }

    #[test]
    fn ten_to_one_load_gets_one_to_one_service_while_both_wait() {
        let mut line = Line::default();
        line.push(A, 1000);
        line.push(B, 100);
        for n in 1..=100 {
            assert_eq!(line.count(2), [1, 1, 0], "pair {n}");
        }
        assert_eq!(line.count(900), [900, 0, 0]);
        assert_eq!(line.serve(), None);
    }

    #[test]
    fn three_share_and_two_share_when_one_leaves() {
        let mut line = Line::default();
        line.push(A, 500);
        line.push(B, 50);
        line.push(C, 500);
        assert_eq!(line.count(150), [50, 50, 50]);
        assert_eq!(line.count(100), [50, 0, 50]);
        // B comes back and gets a third from now on, and no more for the time
        // in which it had nothing.
        line.push(B, 50);
        assert_eq!(line.count(60), [20, 20, 20]);
    }

    #[test]
    fn a_caller_with_one_at_a_time_alternates_with_one_that_floods() {
        let mut line = Line::default();
        line.push(A, 100);
        let mut order = Vec::new();
        for _ in 0..10 {
            line.push(B, 1);
            order.extend([line.serve(), line.serve()]);
        }
        let n_of_b = order.iter().filter(|served| **served == Some(B)).count();
        assert_eq!(n_of_b, 10, "{order:?}");
        // It asks again before its work is done, and still gets half.
        let mut counts = [0; 2];
        for _ in 0..40 {
            if line.order.n_waiting(B) == 0 {
                line.push(B, 1);
            }
            match line.serve() {
                Some(A) => counts[0] += 1,
                _ => counts[1] += 1,
            }
        }
        assert_eq!(counts, [20, 20]);
    }

    #[test]
    fn accounts_are_kept_only_while_they_matter() {
        let mut line = Line::default();
        for id in 1..=1000 {
            line.push(CallerId(id), 1);
            line.push(A, 1);
        }
        while line.serve().is_some() {}
        assert!(line.order.accounts.is_empty() && line.order.idle.is_empty());
        // With one caller that always waits, those of others are closed once it
        // has caught up.
        line.push(A, 1000);
        for id in 2..=500 {
            line.push(CallerId(id), 1);
            line.serve();
            line.serve();
            assert!(line.order.accounts.len() <= 3, "{id}");
        }
    }

    #[test]
    fn costs_are_shared_and_not_numbers() {
        let mut order: FairOrder<(), u32> = FairOrder::default();
        for rank in 0..100 {
            order.insert((), A, rank);
            order.insert((), B, 1000 + rank);
        }
        let mut counts = [0; 2];
        for _ in 0..44 {
            let turn = order.first(()).expect("they wait");
            let cost = if turn.caller == A { 10 } else { 1 };
            order.serve((), &turn, cost);
            counts[turn.caller.0 as usize - 1] += 1;
        }
        assert_eq!(counts, [4, 40]);
    }

    #[test]
    fn a_caller_has_one_account_for_all_lanes() {
        let mut order: FairOrder<u8, u32> = FairOrder::default();
        for rank in 0..10 {
            order.insert(0, A, rank);
            order.insert(1, A, rank);
            order.insert(1, B, 100 + rank);
        }
        let turn = order.first(0).expect("A waits");
        order.serve(0, &turn, 5);
        assert_eq!(order.first(1).map(|turn| turn.caller), Some(B));
        assert!(order.first(1) < order.first(0));
        assert_eq!(order.n_before(1, A, 4), 4);
        assert_eq!((order.n_waiting(A), order.n_waiting(B)), (19, 10));
        for rank in 0..10 {
            order.remove(1, B, 100 + rank);
        }
        assert_eq!(order.n_waiting(B), 0);
        order.remove(1, B, 100);
        assert_eq!(order.n_waiting(A), 19);
    }
}
