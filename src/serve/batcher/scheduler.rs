//! Scheduler: decides from the queue, the policy and the measurements which
//! work a free engine should run next.
//!
//! Nothing here waits, answers or reads a clock, so tests can run days of
//! traffic in a moment; `batcher.rs` provides the thread.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pace::Pace;
use super::policy::{BulkLedger, Decision, Policy};
use super::queue::{LaneView, QueuePosition, QueuedWork, WorkQueue};
use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::devices::DeviceIdx;
use crate::serve::fair::CallerId;
use crate::serve::metrics::BatchClose;

/// Queue, policy and measurements of all engines, from which the next turn is
/// decided.
#[derive(Debug)]
pub(crate) struct Scheduler<T> {
    pub queue: WorkQueue<T>,
    pub pace: Pace,
    policy: Policy,
    /// Engine time that bulk work is owed, over all engines.
    ledger: BulkLedger,
    /// Engines that are still running, by device.
    engines: BTreeMap<DeviceIdx, Engine>,
}

/// State of an engine that matters for the choice of its next turn.
#[derive(Debug)]
struct Engine {
    /// Largest batch that the engine takes; lowered when its memory does not
    /// suffice for more.
    largest: usize,
    running: Option<Running>,
    /// Class in which both a batch and a step wait for the engine, and the
    /// engine time, in seconds, that batches are ahead of steps since then.
    contended: Option<(Priority, f64)>,
}

#[derive(Debug, Clone, Copy)]
struct Running {
    class: Priority,
    is_step: bool,
    bulk_waits: bool,
    started: Instant,
    /// Typical duration of the run; zero if unknown.
    typical: Duration,
    /// Earliest end of the run, by the shortest measured duration.
    ends: Instant,
}

/// Summary of the sequences that a step would advance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Steps {
    /// Most urgent class among the sequences.
    pub class: Priority,
    /// True if there are bulk sequences.
    pub bulk: bool,
    /// Time of the last step or, without one, arrival of the first sequence.
    pub since: Instant,
}

/// Decision about a free engine.
#[derive(Debug)]
pub(crate) enum NextTurn<T> {
    Idle,
    WaitUntil(Instant),
    Run(Picked<T>),
    /// Advance the sequences by one step.
    Step,
}

/// Rows of the next batch, and work for which the batch comes too late.
#[derive(Debug)]
pub(crate) struct Picked<T> {
    pub class: Priority,
    pub graph: Graph,
    pub bucket: usize,
    pub close: BatchClose,
    /// Earliest time at which a free engine could have run something.
    pub possible_since: Instant,
    /// At most `bucket` rows; none if all were too late.
    pub rows: Vec<QueuedWork<T>>,
    /// Work whose deadline comes before the run can end.
    pub late: Vec<QueuedWork<T>>,
    /// Shortest measured duration of a run of this size; zero if unknown.
    pub needed: Duration,
}

impl<T> Scheduler<T> {
    #[must_use]
    pub(crate) fn new(policy: Policy, n_engines: usize) -> Self {
        let largest = policy.buckets.largest();
        let engine = |idx| {
            let engine = Engine {
                largest,
                running: None,
                contended: None,
            };
            (DeviceIdx(idx), engine)
        };
        Self {
            queue: WorkQueue::default(),
            pace: Pace::default(),
            policy,
            ledger: BulkLedger::default(),
            engines: (0..n_engines).map(engine).collect(),
        }
    }

    /// Returns the largest batch that is now formed for an engine.
    #[must_use]
    pub(crate) fn largest(&self, device: DeviceIdx) -> usize {
        self.engines.get(&device).map_or(1, |engine| engine.largest)
    }

    /// Lowers the largest batch that an engine takes, for good.
    pub(crate) fn limit(&mut self, device: DeviceIdx, largest: usize) {
        if let Some(engine) = self.engines.get_mut(&device) {
            engine.largest = self.policy.buckets.at_most(largest);
        }
    }

    /// Forgets an engine that takes no more work.
    pub(crate) fn gone(&mut self, device: DeviceIdx) {
        self.engines.remove(&device);
    }

    /// Rate in images per second while all engines are busy. All engines take
    /// from one queue, so each is represented among the measured runs in
    /// proportion to its speed.
    #[must_use]
    pub(crate) fn rate(&self) -> Option<f64> {
        let n_engines = u32::try_from(self.engines.len()).unwrap_or(u32::MAX);
        Some(self.pace.rate()? * f64::from(n_engines))
    }

    /// Decides what this engine, which is free, should run.
    pub(crate) fn next(
        &mut self,
        device: DeviceIdx,
        now: Instant,
        draining: bool,
        steps: Option<Steps>,
    ) -> NextTurn<T> {
        let largest = self.largest(device);
        // Bulk runs at other engines are charged only when they end, so their
        // time is counted in advance.
        let in_advance = self.bulk_at_engines();
        let lanes = self.queue.lanes();
        let bulk = lanes.iter().filter(|lane| lane.class == Priority::Bulk);
        let bulk_owed = bulk.min_by_key(|lane| lane.first).is_some_and(|lane| {
            let bucket = self.bucket(lane.graph, lane.len, largest, now);
            // A size that has never run gets no batch on account.
            let cost = self.pace.typical(lane.graph, bucket);
            let cost = cost.unwrap_or(self.policy.bulk_wait_max);
            self.ledger
                .bulk_is_owed(&self.policy, in_advance + cost, lane.oldest, now)
        });
        let decision = self.decide(&lanes, largest, now, draining, bulk_owed);
        self.contend(device, steps, decision);
        if let Some(steps) = steps
            && self.step_goes_first(device, decision, steps, bulk_owed, now)
        {
            self.begin_step(device, steps, now);
            return NextTurn::Step;
        }
        match decision {
            Decision::Idle => NextTurn::Idle,
            Decision::WaitUntil(at) => NextTurn::WaitUntil(at),
            Decision::Flush(class, graph, close) => {
                let bulk_steps = steps.is_some_and(|steps| steps.bulk);
                let mut picked = self.pick(device, class, graph, close, bulk_steps, now);
                picked.possible_since = self.possible_since(&lanes, steps, &picked, now);
                NextTurn::Run(picked)
            }
        }
    }

    /// Earliest time at which something could have been run: the end of some
    /// image's queue delay, the time since which a step has waited, or the
    /// arrival of the last image of a full batch.
    fn possible_since(
        &self,
        lanes: &[LaneView],
        steps: Option<Steps>,
        picked: &Picked<T>,
        now: Instant,
    ) -> Instant {
        let delayed = lanes.iter();
        let delayed = delayed.map(|lane| lane.oldest + self.policy.max_queue_delay);
        let stepped = steps.map(|steps| steps.since);
        let last = picked.rows.iter().map(|row| row.arrived).max();
        let full = last.filter(|_| picked.close == BatchClose::Full);
        let first = delayed.chain(stepped).chain(full).min();
        first.map_or(now, |since| since.min(now))
    }

    fn decide(
        &self,
        lanes: &[LaneView],
        largest: usize,
        now: Instant,
        draining: bool,
        bulk_owed: bool,
    ) -> Decision {
        // Size at which a full queue would run: if that is one image, as on a
        // CPU, no image waits for a batch to fill up.
        let full = |graph| self.policy.full(graph, largest, &self.pace, now);
        self.policy.decide(lanes, full, now, draining, bulk_owed)
    }

    /// Engine time that the current runs of bulk work are expected to take.
    fn bulk_at_engines(&self) -> Duration {
        let running = self.engines.values().filter_map(|engine| engine.running);
        let bulk = running.filter(|running| running.class == Priority::Bulk);
        bulk.map(|running| running.typical).sum()
    }

    /// Keeps the account of an engine for which both a batch and a step of one
    /// class wait.
    fn contend(&mut self, device: DeviceIdx, steps: Option<Steps>, decision: Decision) {
        let Some(engine) = self.engines.get_mut(&device) else {
            return;
        };
        engine.contended = match (steps, decision) {
            (Some(steps), Decision::Flush(class, ..)) if steps.class == class => {
                let before = engine.contended.filter(|(before, _)| *before == class);
                Some(before.unwrap_or((class, 0.0)))
            }
            // An excess of batches is still to be made up for when their
            // callers come back, as callers do who wait for each answer.
            (Some(steps), _) => {
                let before = engine.contended;
                before.filter(|(class, ahead)| *class == steps.class && *ahead > 0.0)
            }
            (None, _) => None,
        };
    }

    /// True if a step goes before the batch that could be run. A step is short,
    /// so it never waits for a batch to fill up. Between classes the rules are
    /// those of batches; within a class, batches and steps get the same engine
    /// time.
    fn step_goes_first(
        &self,
        device: DeviceIdx,
        decision: Decision,
        steps: Steps,
        bulk_owed: bool,
        now: Instant,
    ) -> bool {
        let Decision::Flush(class, ..) = decision else {
            return true;
        };
        match (steps.class, class) {
            (Priority::Interactive, Priority::Bulk) => !bulk_owed,
            (Priority::Bulk, Priority::Interactive) => {
                let cost = self.pace.floor(Graph::Generate, now).unwrap_or_default();
                let cost = self.bulk_at_engines() + cost;
                self.ledger
                    .bulk_is_owed(&self.policy, cost, steps.since, now)
            }
            _ => {
                let contended = self
                    .engines
                    .get(&device)
                    .and_then(|engine| engine.contended);
                contended.is_none_or(|(_, ahead)| ahead >= 0.0)
            }
        }
    }

    fn begin_step(&mut self, device: DeviceIdx, steps: Steps, now: Instant) {
        self.ledger.served(steps.class, now);
        let least = self.pace.floor(Graph::Generate, now).unwrap_or_default();
        let bulk_waits =
            steps.bulk && steps.class != Priority::Bulk || self.queue.len_of(Priority::Bulk) > 0;
        if let Some(engine) = self.engines.get_mut(&device) {
            engine.running = Some(Running {
                class: steps.class,
                is_step: true,
                bulk_waits,
                started: now,
                typical: least,
                ends: now + least,
            });
        }
    }

    fn bucket(&self, graph: Graph, n: usize, largest: usize, now: Instant) -> usize {
        self.policy.bucket(graph, n, largest, &self.pace, now)
    }

    fn pick(
        &mut self,
        device: DeviceIdx,
        class: Priority,
        graph: Graph,
        close: BatchClose,
        bulk_steps: bool,
        now: Instant,
    ) -> Picked<T> {
        let largest = self.largest(device);
        // Work that no size serves in time does not make the batch small for
        // others.
        let mut late = Vec::new();
        let smallest = self.policy.buckets.at_most(1);
        while let Some(deadline) = self.queue.first_deadline(class, graph)
            && !self.in_time(graph, smallest, deadline, now)
            && let Some(entry) = self.queue.remove_first(class, graph)
        {
            late.push(entry);
        }
        let len = self.queue.len_in(class, graph).max(1);
        let mut bucket = self.bucket(graph, len, largest, now);
        if class == Priority::Interactive {
            let bulk = self.queue.len_in(Priority::Bulk, graph);
            bucket = self
                .policy
                .shared_bucket(graph, bucket, len + bulk, largest, &self.pace);
        }
        // The most urgent entry decides, whosever turn it is: the batch is made
        // smaller if only a smaller one is in time.
        while let Some(deadline) = self.queue.first_deadline(class, graph)
            && !self.in_time(graph, bucket, deadline, now)
            && self.policy.buckets.at_most(bucket - 1) < bucket
        {
            bucket = self.policy.buckets.at_most(bucket - 1);
        }
        let mut rows = Vec::with_capacity(bucket);
        while rows.len() < bucket
            && let Some(entry) = self.queue.pop(class, graph)
        {
            match entry.deadline {
                Some(deadline) if !self.in_time(graph, bucket, deadline, now) => late.push(entry),
                _ => rows.push(entry),
            }
        }
        if !rows.is_empty() {
            // Rows that would be padding are free for the other class.
            let other = match class {
                Priority::Interactive => Priority::Bulk,
                Priority::Bulk => Priority::Interactive,
            };
            self.fill(other, graph, bucket, now, &mut rows);
            self.ledger.served(class, now);
            let bulk_waits = bulk_steps || self.queue.len_of(Priority::Bulk) > 0;
            let least = self.pace.at_least(graph, bucket, now).unwrap_or_default();
            let typical = self.pace.typical(graph, bucket).unwrap_or_default();
            if let Some(engine) = self.engines.get_mut(&device) {
                engine.running = Some(Running {
                    class,
                    is_step: false,
                    bulk_waits,
                    started: now,
                    typical,
                    ends: now + least,
                });
            }
        }
        let needed = self.pace.at_least(graph, bucket, now).unwrap_or_default();
        Picked {
            class,
            graph,
            bucket,
            close,
            possible_since: now,
            rows,
            late,
            needed,
        }
    }

    /// Fills rows of a batch that would be padding with work of the other
    /// class. Work that this batch does not serve in time is left to a smaller
    /// batch, or to one of another engine.
    fn fill(
        &mut self,
        class: Priority,
        graph: Graph,
        bucket: usize,
        now: Instant,
        rows: &mut Vec<QueuedWork<T>>,
    ) {
        while rows.len() < bucket {
            let next = self.queue.next(class, graph);
            let deadline = next.and_then(|entry| entry.deadline);
            if deadline.is_some_and(|deadline| !self.in_time(graph, bucket, deadline, now)) {
                return;
            }
            let Some(entry) = self.queue.pop(class, graph) else {
                return;
            };
            rows.push(entry);
        }
    }

    fn in_time(&self, graph: Graph, bucket: usize, deadline: Instant, now: Instant) -> bool {
        let least = self.pace.at_least(graph, bucket, now).unwrap_or_default();
        now + least <= deadline
    }

    /// Records that the engine has ended the batch or step that was picked
    /// last.
    pub(crate) fn ended(&mut self, device: DeviceIdx, now: Instant) {
        let Some(engine) = self.engines.get_mut(&device) else {
            return;
        };
        if let Some(running) = engine.running.take() {
            let elapsed = now.saturating_duration_since(running.started);
            let bulk_waits = running.bulk_waits || self.queue.len_of(Priority::Bulk) > 0;
            self.ledger
                .ran(&self.policy, running.class, elapsed, bulk_waits);
            if let Some((class, ahead)) = &mut engine.contended
                && *class == running.class
            {
                let seconds = elapsed.as_secs_f64();
                *ahead += if running.is_step { -seconds } else { seconds };
            }
        }
    }

    /// Shortest time in which work that arrives now can be done, if that is
    /// past its deadline: the rest of the run that ends first, the work ahead
    /// of it, shared out among the engines, and its own run. All are the
    /// shortest durations that were measured lately, so that no work is
    /// rejected that might have been served in time.
    #[must_use]
    pub(crate) fn too_late(
        &self,
        class: Priority,
        graph: Graph,
        caller: CallerId,
        deadline: Instant,
        now: Instant,
    ) -> Option<Duration> {
        let own = self.pace.floor(graph, now)?;
        let rest = |engine: &Engine| {
            engine.running.map_or(Duration::ZERO, |running| {
                running.ends.saturating_duration_since(now)
            })
        };
        let rests: Vec<Duration> = self.engines.values().map(rest).collect();
        let largest = self.engines.values().map(|engine| engine.largest).max()?;
        // Size of the batches of a full queue: if every row costs the same,
        // that is one image, and the largest size is never run.
        let full = self.bucket(graph, largest, largest, now);
        let each = self.pace.at_least(graph, full, now).unwrap_or_default();
        let needed = |ahead: usize| {
            let batches = u32::try_from(ahead / full.max(1)).unwrap_or(u32::MAX);
            begins_in(&rests, each, batches) + own
        };
        // Counting the entries ahead takes time in proportion to their number,
        // so it is done only if the answer can matter.
        if now + needed(self.queue.len_in(class, graph)) <= deadline {
            return None;
        }
        let needed = needed(self.queue.ahead(class, graph, caller, now, Some(deadline)));
        (now + needed > deadline).then_some(needed)
    }

    /// Earliest deadline of the waiting work, at which the queue must be looked
    /// at again.
    #[must_use]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.queue.next_deadline()
    }

    /// Moves an entry to its place under a new class, caller and deadline.
    pub(crate) fn promote(
        &mut self,
        place: &QueuePosition,
        class: Priority,
        caller: CallerId,
        deadline: Option<Instant>,
    ) -> Option<QueuePosition> {
        let entry = self.queue.remove(place)?;
        let entry = QueuedWork {
            caller,
            deadline,
            ..entry
        };
        Some(self.queue.push(class, place.graph, entry))
    }
}

/// Time until a batch begins that has `batches` batches ahead of it, each of
/// which takes `each` and goes to the first engine that is free. The engines
/// are busy for `rests`, of which there is at least one.
fn begins_in(rests: &[Duration], each: Duration, batches: u32) -> Duration {
    let first = rests.iter().min().copied().unwrap_or_default();
    // Batches that have begun within this time.
    let begun = |within: Duration| -> u128 {
        let on =
            |rest: &Duration| Some((within.checked_sub(*rest)?).as_nanos() / each.as_nanos() + 1);
        rests.iter().filter_map(on).sum()
    };
    if each.is_zero() {
        return first;
    }
    // Earliest time by which this batch has begun. The first engine alone is
    // never sooner than all of them.
    let (mut low, mut high) = (first, first + each * batches);
    while low < high {
        let middle = (low + high) / 2;
        if begun(middle) > u128::from(batches) {
            high = middle;
        } else {
            low = middle + Duration::from_nanos(1);
        }
    }
    low
}

#[cfg(test)]
mod tests;
