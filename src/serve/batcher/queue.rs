//! Work that waits for an engine, in the order in which it should run.
//!
//! There is one lane per class and graph. Within a lane the earliest deadline
//! goes first. Work without a deadline is placed as if its deadline were
//! [`PATIENCE`] after its arrival: such work keeps its order of arrival, and
//! later work cannot overtake it for ever. Equal deadlines leave in the order
//! of arrival.
//!
//! The queue is a plain data structure: the caller passes the time, and nothing
//! here waits or answers.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crate::model::graph::Graph;
use crate::proto::Priority;

/// Time after arrival at which work without a deadline is placed in its lane; a
/// deadline further off counts as this one. An image that has waited this long
/// goes before everything that arrives from now on.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Sort key of an entry within a lane.
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
    /// Rank of the entry that goes first.
    pub first: LaneRank,
}

/// Queue of work for the engines, with one lane per class and graph.
#[derive(Debug)]
pub(crate) struct WorkQueue<T> {
    lanes: BTreeMap<(Priority, Graph), Entries<T>>,
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
            deadlines: BTreeMap::new(),
            next_seq: 0,
        }
    }
}

impl<T> WorkQueue<T> {
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
        let lane = self.lanes.entry((class, graph)).or_insert_with(|| Entries {
            by_rank: BTreeMap::new(),
            by_age: BTreeMap::new(),
        });
        lane.by_age.insert((entry.arrived, rank.seq), rank);
        lane.by_rank.insert(rank, entry);
        place
    }

    /// Takes an entry out, wherever in its lane it is.
    pub(crate) fn remove(&mut self, place: &QueuePosition) -> Option<QueuedWork<T>> {
        let lane = self.lanes.get_mut(&(place.class, place.graph))?;
        let entry = lane.by_rank.remove(&place.rank)?;
        lane.by_age.remove(&(entry.arrived, place.rank.seq));
        if let Some(deadline) = entry.deadline {
            self.deadlines.remove(&(deadline, place.rank.seq));
        }
        Some(entry)
    }

    /// Takes the first entry of a lane.
    pub(crate) fn pop(&mut self, class: Priority, graph: Graph) -> Option<QueuedWork<T>> {
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
                let (&first, _) = entries.by_rank.first_key_value()?;
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

    /// Returns the deadline of the first entry of a lane.
    #[must_use]
    pub(crate) fn first_deadline(&self, class: Priority, graph: Graph) -> Option<Instant> {
        let lane = self.lanes.get(&(class, graph))?;
        lane.by_rank.first_key_value()?.1.deadline
    }

    /// Number of entries that would go before an entry with this deadline if it
    /// were added now.
    #[must_use]
    pub(crate) fn ahead(
        &self,
        class: Priority,
        graph: Graph,
        arrived: Instant,
        deadline: Option<Instant>,
    ) -> usize {
        let rank = self.rank(arrived, deadline);
        self.lanes
            .get(&(class, graph))
            .map_or(0, |lane| lane.by_rank.range(..rank).count())
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
        QueuedWork {
            item,
            arrived,
            deadline,
        }
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
        assert_eq!(queue.ahead(Bulk, GRAPH, at(4), Some(at(9))), 1);
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
