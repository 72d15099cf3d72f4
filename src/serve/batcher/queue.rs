//! Work that waits for an engine, in the order in which it should run.
//!
//! There is one lane per class and graph. Within a class, callers whose work
//! waits get the same number of rows (`fair.rs`), in whichever lanes. Within a
//! lane and a caller the earliest deadline goes first. Work without a deadline
//! is placed as if its deadline were [`PATIENCE`] after its arrival: such work
//! keeps its order of arrival, and later work of its caller cannot overtake it
//! for ever. Equal deadlines leave in the order of arrival.
//!
//! The queue is a plain data structure: the caller passes the time, and nothing
//! here waits or answers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::fair::{CallerId, FairOrder, FairTurn};

/// Time after arrival at which work without a deadline is placed in its lane; a
/// deadline further off counts as this one. An image that has waited this long
/// goes before everything of its caller that arrives from now on.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Service of one row, in the accounts of callers.
const ROW: u64 = 1;

/// Sort key of an entry within a lane and a caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct LaneRank {
    due: Instant,
    seq: u64,
}

/// Position of an entry, by which the entry can be found again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct QueuePosition {
    pub class: Priority,
    pub graph: Graph,
    rank: LaneRank,
}

/// Entry of the queue.
#[derive(Debug)]
pub(crate) struct QueuedWork<T> {
    pub item: T,
    /// Caller in whose turn the work runs.
    pub caller: CallerId,
    pub arrived: Instant,
    pub deadline: Option<Instant>,
}

/// Summary of a lane for the policy. Never of an empty lane.
#[derive(Debug, Clone, Copy)]
pub(crate) struct LaneView {
    pub class: Priority,
    pub graph: Graph,
    pub len: usize,
    /// Arrival of the entry that has waited longest.
    pub oldest: Instant,
    /// Turn of the entry that goes first.
    pub first: FairTurn<LaneRank>,
}

/// Queue of work for the engines, with one lane per class and graph.
#[derive(Debug)]
pub(crate) struct WorkQueue<T> {
    lanes: BTreeMap<(Priority, Graph), Entries<T>>,
    interactive: FairOrder<Graph, LaneRank>,
    bulk: FairOrder<Graph, LaneRank>,
    /// All deadlines, for a timer; the sequence number tells equal deadlines
    /// apart.
    deadlines: BTreeMap<(Instant, u64), QueuePosition>,
    next_seq: u64,
}

#[derive(Debug)]
struct Entries<T> {
    by_rank: BTreeMap<LaneRank, QueuedWork<T>>,
    /// Ranks in order of arrival; an entry that was moved has a later number.
    by_age: BTreeMap<(Instant, u64), LaneRank>,
}

impl<T> Default for WorkQueue<T> {
    fn default() -> Self {
        Self {
            lanes: BTreeMap::new(),
            interactive: FairOrder::default(),
            bulk: FairOrder::default(),
            deadlines: BTreeMap::new(),
            next_seq: 0,
        }
    }
}

impl<T> WorkQueue<T> {
    fn order(&self, class: Priority) -> &FairOrder<Graph, LaneRank> {
        match class {
            Priority::Interactive => &self.interactive,
            Priority::Bulk => &self.bulk,
        }
    }

    fn order_mut(&mut self, class: Priority) -> &mut FairOrder<Graph, LaneRank> {
        match class {
            Priority::Interactive => &mut self.interactive,
            Priority::Bulk => &mut self.bulk,
        }
    }

    /// Number of entries of a class that belong to a caller.
    #[must_use]
    pub(crate) fn len_of_caller(&self, class: Priority, caller: CallerId) -> usize {
        self.order(class).n_waiting(caller)
    }

    /// Number of entries of a class.
    #[must_use]
    pub(crate) fn len_of(&self, class: Priority) -> usize {
        let lanes = self.lanes.iter().filter(|((of, _), _)| *of == class);
        lanes.map(|(_, entries)| entries.by_rank.len()).sum()
    }

    /// Number of entries in one lane.
    #[must_use]
    pub(crate) fn len_in(&self, class: Priority, graph: Graph) -> usize {
        self.lanes
            .get(&(class, graph))
            .map_or(0, |lane| lane.by_rank.len())
    }

    /// True if the queue is empty.
    #[cfg(test)]
    pub(crate) fn is_empty(&self) -> bool {
        self.lanes.values().all(|lane| lane.by_rank.is_empty())
    }

    /// Returns the rank of an entry with this deadline if it were added now.
    fn rank(&self, arrived: Instant, deadline: Option<Instant>) -> LaneRank {
        let patience = arrived + PATIENCE;
        LaneRank {
            due: deadline.map_or(patience, |deadline| deadline.min(patience)),
            seq: self.next_seq,
        }
    }

    /// Adds an entry to its lane.
    pub(crate) fn push(
        &mut self,
        class: Priority,
        graph: Graph,
        entry: QueuedWork<T>,
    ) -> QueuePosition {
        let rank = self.rank(entry.arrived, entry.deadline);
        self.next_seq += 1;
        let place = QueuePosition { class, graph, rank };
        if let Some(deadline) = entry.deadline {
            self.deadlines.insert((deadline, rank.seq), place);
        }
        self.order_mut(class).insert(graph, entry.caller, rank);
        let lane = self.lanes.entry((class, graph)).or_insert_with(|| Entries {
            by_rank: BTreeMap::new(),
            by_age: BTreeMap::new(),
        });
        lane.by_age.insert((entry.arrived, rank.seq), rank);
        lane.by_rank.insert(rank, entry);
        place
    }

    /// Takes an entry out that is not served, wherever in its lane it is.
    pub(crate) fn remove(&mut self, place: &QueuePosition) -> Option<QueuedWork<T>> {
        let entry = self.take(place)?;
        self.order_mut(place.class)
            .remove(place.graph, entry.caller, place.rank);
        Some(entry)
    }

    /// Takes an entry out of its lane alone.
    fn take(&mut self, place: &QueuePosition) -> Option<QueuedWork<T>> {
        let lane = self.lanes.get_mut(&(place.class, place.graph))?;
        let entry = lane.by_rank.remove(&place.rank)?;
        lane.by_age.remove(&(entry.arrived, place.rank.seq));
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, place.rank.seq));
        }
        Some(entry)
    }

    /// Takes the entry of a lane whose turn it is, to be served: the first one
    /// of the caller that got the least service.
    pub(crate) fn pop(&mut self, class: Priority, graph: Graph) -> Option<QueuedWork<T>> {
        let turn = self.order(class).first(graph)?;
        self.order_mut(class).serve(graph, &turn, ROW);
        let rank = turn.rank;
        self.take(&QueuePosition { class, graph, rank })
    }

    /// Returns the entry of a lane whose turn it is.
    #[must_use]
    pub(crate) fn next(&self, class: Priority, graph: Graph) -> Option<&QueuedWork<T>> {
        let rank = self.order(class).first(graph)?.rank;
        self.get(&QueuePosition { class, graph, rank })
    }

    /// Takes the most urgent entry of a lane, of whichever caller, which is not
    /// served.
    pub(crate) fn remove_first(&mut self, class: Priority, graph: Graph) -> Option<QueuedWork<T>> {
        let lane = self.lanes.get(&(class, graph))?;
        let (&rank, _) = lane.by_rank.first_key_value()?;
        self.remove(&QueuePosition { class, graph, rank })
    }

    /// Returns the lanes that are not empty.
    #[must_use]
    pub(crate) fn lanes(&self) -> Vec<LaneView> {
        self.lanes
            .iter()
            .filter_map(|(&(class, graph), entries)| {
                let first = self.order(class).first(graph)?;
                let (&(oldest, _), _) = entries.by_age.first_key_value()?;
                Some(LaneView {
                    class,
                    graph,
                    len: entries.by_rank.len(),
                    oldest,
                    first,
                })
            })
            .collect()
    }

    /// Returns the deadline of the most urgent entry of a lane, of whichever
    /// caller.
    #[must_use]
    pub(crate) fn first_deadline(&self, class: Priority, graph: Graph) -> Option<Instant> {
        let lane = self.lanes.get(&(class, graph))?;
        lane.by_rank.first_key_value()?.1.deadline
    }

    /// Number of entries that would surely go before a caller's entry with this
    /// deadline if it were added now: those of the caller itself. How many of
    /// other callers go before depends on whose turn it is.
    #[must_use]
    pub(crate) fn ahead(
        &self,
        class: Priority,
        graph: Graph,
        caller: CallerId,
        arrived: Instant,
        deadline: Option<Instant>,
    ) -> usize {
        let rank = self.rank(arrived, deadline);
        self.order(class).n_before(graph, caller, rank)
    }

    /// Returns the earliest deadline of all entries.
    #[must_use]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        let (&(deadline, _), _) = self.deadlines.first_key_value()?;
        Some(deadline)
    }

    /// Returns the positions of the entries whose deadline has passed.
    #[must_use]
    pub(crate) fn expired(&self, now: Instant) -> Vec<QueuePosition> {
        self.deadlines
            .range(..=(now, u64::MAX))
            .map(|(_, &place)| place)
            .collect()
    }

    /// Returns the positions of all entries.
    #[must_use]
    pub(crate) fn places(&self) -> Vec<QueuePosition> {
        let places = |(&(class, graph), lane): (&(Priority, Graph), &Entries<T>)| {
            let ranks: Vec<LaneRank> = lane.by_rank.keys().copied().collect();
            ranks
                .into_iter()
                .map(move |rank| QueuePosition { class, graph, rank })
        };
        self.lanes.iter().flat_map(places).collect()
    }

    /// Returns the entry at a position.
    #[must_use]
    pub(crate) fn get(&self, place: &QueuePosition) -> Option<&QueuedWork<T>> {
        let lane = self.lanes.get(&(place.class, place.graph))?;
        lane.by_rank.get(&place.rank)
    }
}

#[cfg(test)]
mod tests {
    use Priority::{Bulk, Interactive};

    use super::*;

    const GRAPH: Graph = Graph::Hidden;

    fn entry(item: u32, arrived: Instant, deadline: Option<Instant>) -> QueuedWork<u32> {
        of(CallerId::UNNAMED, item, arrived, deadline)
    }

    fn of(
        caller: CallerId,
        item: u32,
        arrived: Instant,
        deadline: Option<Instant>,
    ) -> QueuedWork<u32> {
        QueuedWork {
            item,
            caller,
            arrived,
            deadline,
        }
    }

    #[test]
    fn callers_take_turns_and_within_a_caller_deadlines_decide() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (a, b) = (CallerId(1), CallerId(2));
        let mut queue = WorkQueue::default();
        for item in 0..4 {
            queue.push(Bulk, GRAPH, of(a, item, start, None));
        }
        queue.push(Bulk, GRAPH, of(a, 4, start, Some(at(5))));
        queue.push(Bulk, GRAPH, of(b, 10, at(1), None));
        queue.push(Bulk, GRAPH, of(b, 11, at(1), Some(at(3))));
        // The most urgent entry is found whosever turn it is.
        assert_eq!(queue.first_deadline(Bulk, GRAPH), Some(at(3)));
        assert_eq!(queue.len_of_caller(Bulk, a), 5);
        assert_eq!(queue.ahead(Bulk, GRAPH, b, at(1), Some(at(4))), 1);
        assert_eq!(queue.next(Bulk, GRAPH).map(|entry| entry.item), Some(11));
        let order: Vec<u32> = std::iter::from_fn(|| queue.pop(Bulk, GRAPH))
            .map(|entry| entry.item)
            .collect();
        assert_eq!(order, [11, 4, 0, 10, 1, 2, 3]);
    }

    #[test]
    fn a_caller_that_floods_one_graph_does_not_hold_up_another_graph() {
        let start = Instant::now();
        let (a, b) = (CallerId(1), CallerId(2));
        let mut queue = WorkQueue::default();
        for item in 0..100 {
            queue.push(Bulk, GRAPH, of(a, item, start, None));
        }
        let later = start + Duration::from_secs(1);
        queue.push(Bulk, Graph::Logits, of(b, 200, later, None));
        let next = |queue: &WorkQueue<u32>| {
            let lanes = queue.lanes();
            let first = lanes.iter().min_by_key(|lane| lane.first);
            first.map(|lane| lane.graph)
        };
        assert_eq!(next(&queue), Some(GRAPH), "the older one, at first");
        queue.pop(Bulk, GRAPH);
        assert_eq!(next(&queue), Some(Graph::Logits));
        queue.pop(Bulk, Graph::Logits);
        assert_eq!(next(&queue), Some(GRAPH));
    }

    #[test]
    fn classes_have_accounts_of_their_own() {
        let start = Instant::now();
        let (a, b) = (CallerId(1), CallerId(2));
        let mut queue = WorkQueue::default();
        for item in 0..20 {
            queue.push(Interactive, GRAPH, of(a, item, start, None));
            queue.push(Bulk, GRAPH, of(a, 100 + item, start, None));
            queue.push(Bulk, GRAPH, of(b, 200 + item, start, None));
        }
        for _ in 0..10 {
            queue.pop(Interactive, GRAPH);
        }
        let bulk: Vec<u32> = std::iter::from_fn(|| queue.pop(Bulk, GRAPH))
            .take(10)
            .map(|entry| entry.item / 100)
            .collect();
        assert_eq!(bulk.iter().filter(|&&caller| caller == 1).count(), 5);
    }

    #[test]
    fn the_earliest_deadline_goes_first_and_equals_in_order() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut queue = WorkQueue::default();
        for (item, arrived, deadline) in [
            (1, 0, None),
            (2, 1, None),
            (3, 2, Some(10)),
            (4, 2, Some(5)),
            (5, 3, Some(10)),
            // Further off than `PATIENCE`: treated as if it had no deadline.
            (6, 4, Some(1000)),
        ] {
            queue.push(Bulk, GRAPH, entry(item, at(arrived), deadline.map(at)));
        }
        assert_eq!(queue.len_of(Bulk), 6);
        assert_eq!(queue.next_deadline(), Some(at(5)));
        assert_eq!(queue.lanes()[0].oldest, at(0));
        assert_eq!(
            queue.ahead(Bulk, GRAPH, CallerId::UNNAMED, at(4), Some(at(9))),
            1
        );
        let order: Vec<u32> = std::iter::from_fn(|| queue.pop(Bulk, GRAPH))
            .map(|entry| entry.item)
            .collect();
        assert_eq!(order, [4, 3, 5, 1, 2, 6]);
        assert!(queue.is_empty() && queue.next_deadline().is_none());
    }

    #[test]
    fn nothing_overtakes_for_ever() {
        let start = Instant::now();
        let mut queue = WorkQueue::default();
        queue.push(Bulk, GRAPH, entry(0, start, None));
        // Urgent work, once `PATIENCE` is over, goes after older work.
        let late = start + PATIENCE + Duration::from_secs(1);
        queue.push(
            Bulk,
            GRAPH,
            entry(1, late, Some(late + Duration::from_millis(1))),
        );
        assert_eq!(queue.pop(Bulk, GRAPH).map(|entry| entry.item), Some(0));
    }

    #[test]
    fn the_oldest_stays_so_when_it_moves() {
        let start = Instant::now();
        let later = start + Duration::from_secs(1);
        let mut queue = WorkQueue::default();
        let first = queue.push(Bulk, GRAPH, entry(1, start, None));
        queue.push(Bulk, GRAPH, entry(2, later, None));
        let moved = queue.remove(&first).expect("it waits");
        queue.push(Bulk, GRAPH, moved);
        assert_eq!(queue.lanes()[0].oldest, start);
        assert_eq!(queue.pop(Bulk, GRAPH).map(|entry| entry.item), Some(1));
        assert_eq!(queue.lanes()[0].oldest, later);
    }

    #[test]
    fn entries_leave_from_the_middle() {
        let start = Instant::now();
        let deadline = start + Duration::from_secs(1);
        let mut queue = WorkQueue::default();
        let first = queue.push(Interactive, GRAPH, entry(1, start, None));
        let second = queue.push(Interactive, GRAPH, entry(2, start, Some(deadline)));
        assert_eq!(queue.places().len(), 2);
        assert!(queue.expired(start).is_empty());
        assert_eq!(queue.expired(deadline), [second]);
        assert_eq!(queue.remove(&second).map(|entry| entry.item), Some(2));
        assert!(queue.remove(&second).is_none());
        assert!(queue.next_deadline().is_none());
        assert_eq!(queue.get(&first).map(|entry| entry.item), Some(1));
        assert_eq!(queue.len_of(Interactive), 1);
        assert_eq!(queue.len_of(Bulk), 0);
    }
}
