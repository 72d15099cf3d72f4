//! Images to generate (sequences) that wait for a slot at an engine, and the
//! number of sequences at each engine.
//!
//! Interactive sequences go first. Within a class callers get the same number
//! of slots, and a caller's sequences go by deadline and arrival, as rows do. Bulk
//! work cannot take all slots: a sequence keeps its slot for a thousand steps,
//! which an interactive caller should not have to wait for. A sequence stays
//! with the engine that it joined; waiting sequences are shared out evenly
//! among several engines.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::queue::{QueuedWork, WorkQueue};
use super::scheduler::Steps;
use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::devices::DeviceIdx;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::handoff::SequenceCounts;
use crate::serve::sequence::Sequence;

/// Queue of the sequences that wait for a slot, with the occupancy of each
/// engine.
#[derive(Debug)]
pub(super) struct WaitingSequences {
    queue: WorkQueue<Sequence>,
    engines: BTreeMap<DeviceIdx, AtEngine>,
    reserve_percent: u8,
    /// Longest time that bulk work waits for a slot while interactive sequences
    /// take every slot that becomes free.
    bulk_wait_max: Duration,
    /// Time at which a bulk sequence last got a slot.
    bulk_joined_at: Option<Instant>,
}

/// Sequences at one engine.
#[derive(Debug, Default)]
struct AtEngine {
    sequences: SequenceCounts,
    /// Time at which the engine's last step was decided on.
    stepped_at: Option<Instant>,
}

impl WaitingSequences {
    pub(super) fn new(reserve_percent: u8, bulk_wait_max: Duration) -> Self {
        Self {
            queue: WorkQueue::default(),
            engines: BTreeMap::new(),
            reserve_percent,
            bulk_wait_max,
            bulk_joined_at: None,
        }
    }

    pub(super) fn push(&mut self, sequence: Sequence, now: Instant) {
        let (class, deadline) = (sequence.ticket.class, sequence.ticket.deadline);
        let entry = QueuedWork {
            caller: sequence.ticket.caller,
            arrived: now,
            deadline,
            item: sequence,
        };
        self.queue.push(class, Graph::Generate, entry);
    }

    /// Records the number of sequences that an engine has reported.
    pub(super) fn at_engine(&mut self, device: DeviceIdx, sequences: SequenceCounts) {
        self.engines.entry(device).or_default().sequences = sequences;
    }

    /// Forgets an engine that takes no more sequences and has answered those
    /// that it had.
    pub(super) fn gone(&mut self, device: DeviceIdx) {
        self.engines.remove(&device);
    }

    /// Number of waiting sequences of a class.
    pub(super) fn len_of(&self, class: Priority) -> usize {
        self.queue.len_of(class)
    }

    /// Number of sequences of a class that an engine has room for.
    fn room(&self, class: Priority, at: SequenceCounts) -> usize {
        match class {
            Priority::Interactive => at.n_free,
            Priority::Bulk => {
                let n_slots = at.n_free + at.interactive + at.bulk;
                // Bulk work may take all slots but the reserve, and at least
                // one.
                let reserved = n_slots * usize::from(self.reserve_percent) / 100;
                let most = (n_slots - reserved).max(1);
                most.saturating_sub(at.bulk).min(at.n_free)
            }
        }
    }

    /// Number of waiting sequences of a class that this engine should take: as
    /// many as bring the engine up to the mean of the engines with room. At
    /// least one engine with room is below the mean, so no sequence waits while
    /// there is room, except until that engine is free.
    fn share(&self, class: Priority, device: DeviceIdx) -> usize {
        let Some(engine) = self.engines.get(&device) else {
            return 0;
        };
        let n_there = |at: SequenceCounts| at.interactive + at.bulk;
        let with_room = || {
            let all = self.engines.values().map(|engine| engine.sequences);
            all.filter(|&at| self.room(class, at) > 0)
        };
        let n_all = self.queue.len_of(class) + with_room().map(n_there).sum::<usize>();
        let mean = n_all.div_ceil(with_room().count().max(1));
        let at = engine.sequences;
        mean.saturating_sub(n_there(at)).min(self.room(class, at))
    }

    /// Describes the next step of this engine; `None` if there are no sequences
    /// for it.
    pub(super) fn steps(&self, device: DeviceIdx) -> Option<Steps> {
        let AtEngine {
            sequences,
            stepped_at,
        } = self.engines.get(&device)?;
        let lanes = self.queue.lanes();
        let oldest = |class| {
            let mut lanes = lanes.iter();
            let lane = lanes.find(|lane| lane.class == class)?;
            (self.share(class, device) > 0).then_some(lane.oldest)
        };
        let interactive = sequences.interactive > 0 || oldest(Priority::Interactive).is_some();
        let bulk = sequences.bulk > 0 || oldest(Priority::Bulk).is_some();
        let class = match (interactive, bulk) {
            (true, _) => Priority::Interactive,
            (false, true) => Priority::Bulk,
            (false, false) => return None,
        };
        // Sequences at the engine have waited since the last step.
        let at_engine = sequences.interactive + sequences.bulk > 0;
        let stepped = stepped_at.filter(|_| at_engine);
        Some(Steps {
            class,
            bulk,
            since: stepped.or(oldest(class))?,
        })
    }

    /// Takes out the sequences that join this engine's next step.
    pub(super) fn join(&mut self, device: DeviceIdx, now: Instant) -> Vec<Sequence> {
        let mut joining = Vec::new();
        if self.bulk_is_owed(now) && self.share(Priority::Bulk, device) > 0 {
            joining.extend(self.join_one(Priority::Bulk, device, now));
        }
        for class in Priority::ALL {
            for _ in 0..self.share(class, device) {
                joining.extend(self.join_one(class, device, now));
            }
        }
        if let Some(engine) = self.engines.get_mut(&device) {
            engine.stepped_at = Some(now);
        }
        joining
    }

    fn join_one(&mut self, class: Priority, device: DeviceIdx, now: Instant) -> Option<Sequence> {
        let engine = self.engines.get_mut(&device)?;
        let entry = self.queue.pop(class, Graph::Generate)?;
        let at = &mut engine.sequences;
        at.n_free = at.n_free.saturating_sub(1);
        match class {
            Priority::Interactive => at.interactive += 1,
            Priority::Bulk => {
                at.bulk += 1;
                self.bulk_joined_at = Some(now);
            }
        }
        Some(entry.item)
    }

    /// True if a bulk sequence has waited for so long that it goes before
    /// interactive ones.
    fn bulk_is_owed(&self, now: Instant) -> bool {
        let lanes = self.queue.lanes();
        let Some(lane) = lanes.iter().find(|lane| lane.class == Priority::Bulk) else {
            return false;
        };
        let since = (self.bulk_joined_at).map_or(lane.oldest, |at| at.max(lane.oldest));
        now.saturating_duration_since(since) >= self.bulk_wait_max
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.queue.next_deadline()
    }

    /// Answers the callers whose deadline has passed.
    pub(super) fn expire(&mut self, now: Instant, mut dropped: impl FnMut(&StageError)) {
        for place in self.queue.expired(now) {
            if let Some(entry) = self.queue.remove(&place) {
                let error = StageError::DeadlineExceeded {
                    stage: RequestStage::Queue,
                };
                dropped(&error);
                entry.item.finish(Err(error));
            }
        }
    }

    /// Drops the sequences whose callers have disconnected.
    pub(super) fn sweep(&mut self, now: Instant, mut dropped: impl FnMut(&StageError)) {
        for place in self.queue.places() {
            let dead = self
                .queue
                .get(&place)
                .and_then(|entry| entry.item.ticket.dead(now, RequestStage::Queue));
            if let Some(error) = dead
                && let Some(entry) = self.queue.remove(&place)
            {
                dropped(&error);
                entry.item.finish(Err(error));
            }
        }
    }

    /// Answers all waiting callers with this error.
    pub(super) fn refuse(&mut self, error: &StageError) {
        for place in self.queue.places() {
            if let Some(entry) = self.queue.remove(&place) {
                entry.item.finish(Err(error.clone()));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::serve::fair::CallerId;
    use crate::serve::generate::{GenerateRequest, KeptPixels};
    use crate::serve::job::{Permit, Reply, Ticket};
    use crate::serve::sequence::Sampling;

    const ONE: DeviceIdx = DeviceIdx(0);
    const OTHER: DeviceIdx = DeviceIdx(1);
    const BULK_WAIT_MAX: Duration = Duration::from_secs(5);

    fn push(waiting: &mut WaitingSequences, class: Priority, n: usize) {
        let now = Instant::now();
        for _ in 0..n {
            let ticket = Ticket {
                caller: CallerId::UNNAMED,
                class,
                deadline: None,
                entered_at: now,
                span: tracing::Span::none(),
                timeline: crate::serve::timeline::ImageTimeline::none(),
                reply: Reply::new().0,
                permit: Permit::none(),
            };
            let generate = GenerateRequest {
                keep: KeptPixels::All,
                sampling: Sampling::greedy(),
                sample: 0,
                rows: None,
            };
            let sequence = Sequence::new(ticket, Box::new(generate), &[], 2, 4);
            waiting.push(sequence, now);
        }
    }

    fn at(n_free: usize, interactive: usize) -> SequenceCounts {
        SequenceCounts {
            n_free,
            interactive,
            bulk: 0,
        }
    }

    #[test]
    fn those_that_wait_are_shared_out_among_engines_with_room() {
        let now = Instant::now();
        let mut waiting = WaitingSequences::new(25, BULK_WAIT_MAX);
        push(&mut waiting, Priority::Interactive, 3);
        assert!(waiting.steps(ONE).is_none(), "it has not said what it has");
        waiting.at_engine(ONE, at(4, 0));
        waiting.at_engine(OTHER, at(4, 0));
        assert_eq!(waiting.join(ONE, now).len(), 2);
        assert_eq!(waiting.join(OTHER, now).len(), 1);
        // The engine with fewer sequences takes the next.
        push(&mut waiting, Priority::Interactive, 1);
        assert_eq!(waiting.join(ONE, now).len(), 0);
        assert!(waiting.steps(ONE).is_some(), "for those that it has");
        assert_eq!(waiting.join(OTHER, now).len(), 1);
        // The engine that is full leaves all to the other.
        waiting.at_engine(OTHER, at(0, 4));
        push(&mut waiting, Priority::Interactive, 5);
        assert_eq!(waiting.join(OTHER, now).len(), 0);
        assert_eq!(
            waiting.join(ONE, now).len(),
            2,
            "as many as it has room for"
        );
        // An engine that is gone reduces nobody's share.
        waiting.gone(ONE);
        assert!(waiting.steps(ONE).is_none());
        waiting.at_engine(OTHER, at(4, 0));
        assert_eq!(waiting.join(OTHER, now).len(), 3);
    }

    #[test]
    fn bulk_leaves_a_part_of_each_engine_alone() {
        let now = Instant::now();
        let mut waiting = WaitingSequences::new(25, BULK_WAIT_MAX);
        push(&mut waiting, Priority::Bulk, 9);
        for device in [ONE, OTHER] {
            waiting.at_engine(device, at(4, 0));
        }
        for device in [ONE, OTHER] {
            assert_eq!(waiting.join(device, now).len(), 3);
        }
        push(&mut waiting, Priority::Interactive, 1);
        assert_eq!(waiting.join(OTHER, now).len(), 1);
        assert_eq!(waiting.len_of(Priority::Bulk), 3);
    }

    #[test]
    fn bulk_gets_a_slot_beside_interactive_ones_that_never_end() {
        let mut waiting = WaitingSequences::new(25, BULK_WAIT_MAX);
        push(&mut waiting, Priority::Bulk, 3);
        let mut now = Instant::now();
        let mut joined = Vec::new();
        for second in 0..20 {
            push(&mut waiting, Priority::Interactive, 2);
            // One sequence ends per second.
            let bulk = joined.len();
            let at = SequenceCounts {
                n_free: 1,
                interactive: 3 - bulk,
                bulk,
            };
            waiting.at_engine(ONE, at);
            let joining = waiting.join(ONE, now);
            assert_eq!(joining.len(), 1);
            if joining[0].ticket.class == Priority::Bulk {
                joined.push(second);
            }
            now += Duration::from_secs(1);
        }
        assert_eq!(joined, [5, 10, 15]);
    }
}
