//! The queue, the policy and the measurements together: what an engine that is
//! free should run next.
//!
//! Nothing here waits, answers or reads a clock, so that tests run days of
//! traffic in a moment; `batcher.rs` gives it a thread.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::pace::Pace;
use super::policy::{BulkLedger, Decision, Policy};
use super::queue::{LaneView, QueuePosition, QueuedWork, WorkQueue};
use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::devices::DeviceIdx;
use crate::serve::metrics::BatchClose;

/// See the module.
#[derive(Debug)]
pub(crate) struct Scheduler<T> {
    pub queue: WorkQueue<T>,
    pub pace: Pace,
    policy: Policy,
    /// What bulk is owed of the time of all engines together.
    ledger: BulkLedger,
    /// Those that live.
    engines: BTreeMap<DeviceIdx, Engine>,
}

/// An engine, as far as it matters to what is run next.
#[derive(Debug)]
struct Engine {
    /// The largest batch that it takes; lowered when its memory does not suffice
    /// for more.
    largest: usize,
    running: Option<Running>,
    /// The class in which both a batch and a step wait for it, and by how much of
    /// its time, in seconds, batches are ahead of steps since then.
    contended: Option<(Priority, f64)>,
}

#[derive(Debug, Clone, Copy)]
struct Running {
    class: Priority,
    is_step: bool,
    bulk_waits: bool,
    started: Instant,
    /// What it usually takes; nothing if that is not known.
    typical: Duration,
    /// When it ends at the earliest, by what was measured.
    ends: Instant,
}

/// The sequences that a step would take further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Steps {
    /// The most urgent class among them.
    pub class: Priority,
    /// Whether there are any of bulk.
    pub bulk: bool,
    /// When the last step was made, or the first of them came.
    pub since: Instant,
}

/// What to do with an engine that is free.
#[derive(Debug)]
pub(crate) enum NextTurn<T> {
    Idle,
    WaitUntil(Instant),
    Run(Picked<T>),
    /// A step of the sequences.
    Step,
}

/// A batch, and those for whom it came too late.
#[derive(Debug)]
pub(crate) struct Picked<T> {
    pub class: Priority,
    pub graph: Graph,
    pub bucket: usize,
    pub close: BatchClose,
    /// Since when an engine that was free could have run something.
    pub possible_since: Instant,
    /// At most `bucket`; none if all were too late.
    pub rows: Vec<QueuedWork<T>>,
    /// Whose deadline comes before the run can end.
    pub late: Vec<QueuedWork<T>>,
    /// What the run takes at least, by what was measured.
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

    /// The largest batch that is formed now for an engine.
    #[must_use]
    pub(crate) fn largest(&self, device: DeviceIdx) -> usize {
        self.engines.get(&device).map_or(1, |engine| engine.largest)
    }

    /// The engine takes no more than this from now on.
    pub(crate) fn limit(&mut self, device: DeviceIdx, largest: usize) {
        if let Some(engine) = self.engines.get_mut(&device) {
            engine.largest = self.policy.buckets.at_most(largest);
        }
    }

    /// The engine takes no more work.
    pub(crate) fn gone(&mut self, device: DeviceIdx) {
        self.engines.remove(&device);
    }

    /// Images per second while all engines are busy: they take from one queue, so
    /// each had as many of the runs that were measured as it is fast.
    #[must_use]
    pub(crate) fn rate(&self) -> Option<f64> {
        let n_engines = u32::try_from(self.engines.len()).unwrap_or(u32::MAX);
        Some(self.pace.rate()? * f64::from(n_engines))
    }

    /// What this engine, which is free, should run.
    pub(crate) fn next(
        &mut self,
        device: DeviceIdx,
        now: Instant,
        draining: bool,
        steps: Option<Steps>,
    ) -> NextTurn<T> {
        let largest = self.largest(device);
        // What bulk is having elsewhere is paid when that ends.
        let in_advance = self.bulk_at_engines();
        let lanes = self.queue.lanes();
        let bulk = lanes.iter().filter(|lane| lane.class == Priority::Bulk);
        let bulk_owed = bulk.min_by_key(|lane| lane.first).is_some_and(|lane| {
            let bucket = self.bucket(lane.graph, lane.len, largest, now);
            // What was never seen to run is not owed on account.
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

    /// Since when something could have been run: since the queue delay of some
    /// image was over, or a step waited, or the last image came of a batch that
    /// is full.
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
        // The size that a full queue would run at: where it is one image, as on
        // a CPU, nobody waits for company.
        let full = |graph| self.bucket(graph, largest, largest, now);
        self.policy.decide(lanes, full, now, draining, bulk_owed)
    }

    /// Engine time that runs of bulk are about to take.
    fn bulk_at_engines(&self) -> Duration {
        let running = self.engines.values().filter_map(|engine| engine.running);
        let bulk = running.filter(|running| running.class == Priority::Bulk);
        bulk.map(|running| running.typical).sum()
    }

    /// Keeps account for an engine for which both a batch and a step of one class
    /// wait.
    fn contend(&mut self, device: DeviceIdx, steps: Option<Steps>, decision: Decision) {
        let Some(engine) = self.engines.get_mut(&device) else {
            return;
        };
        engine.contended = match (steps, decision) {
            (Some(steps), Decision::Flush(class, ..)) if steps.class == class => {
                let before = engine.contended.filter(|(before, _)| *before == class);
                Some(before.unwrap_or((class, 0.0)))
            }
            // What batches have had too much is still to be made up for when their
            // callers come back, as those do who wait for each answer.
            (Some(steps), _) => {
                let before = engine.contended;
                before.filter(|(class, ahead)| *class == steps.class && *ahead > 0.0)
            }
            (None, _) => None,
        };
    }

    /// Whether a step goes before the batch that could be run. A step is short,
    /// so it never waits for a batch to fill up; between classes the rules are
    /// those of batches; within one, both get the same time.
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
        // Whom no size serves in time does not make it small for the others.
        let mut late = Vec::new();
        let smallest = self.policy.buckets.at_most(1);
        while let Some(deadline) = self.queue.first_deadline(class, graph)
            && !self.in_time(graph, smallest, deadline, now)
            && let Some(entry) = self.queue.pop(class, graph)
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
        // The most urgent decides: a smaller batch if only that is in time.
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

    /// Gives room in a batch to work of a class that it is not for. Whom the batch
    /// does not serve in time another may: a smaller one, or another engine's.
    fn fill(
        &mut self,
        class: Priority,
        graph: Graph,
        bucket: usize,
        now: Instant,
        rows: &mut Vec<QueuedWork<T>>,
    ) {
        while rows.len() < bucket {
            let deadline = self.queue.first_deadline(class, graph);
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

    /// The engine has ended the batch that was picked for it last.
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

    /// How long work that comes now needs at least, if that is longer than its
    /// deadline leaves: the rest of the run that ends first, what goes before it,
    /// shared out among the engines, its own run. By the shortest times that were
    /// measured lately, so that nobody is refused who might have been served.
    #[must_use]
    pub(crate) fn too_late(
        &self,
        class: Priority,
        graph: Graph,
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
        // As large as batches of a full queue are: where every row costs the same
        // they are of one image, and the largest are never run.
        let full = self.bucket(graph, largest, largest, now);
        let each = self.pace.at_least(graph, full, now).unwrap_or_default();
        let needed = |ahead: usize| {
            let batches = u32::try_from(ahead / full.max(1)).unwrap_or(u32::MAX);
            begins_in(&rests, each, batches) + own
        };
        // Counting those ahead takes as long as there are many, so only where it
        // matters.
        if now + needed(self.queue.len_in(class, graph)) <= deadline {
            return None;
        }
        let needed = needed(self.queue.ahead(class, graph, now, Some(deadline)));
        (now + needed > deadline).then_some(needed)
    }

    /// When something will have to be looked at again, whatever arrives.
    #[must_use]
    pub(crate) fn next_deadline(&self) -> Option<Instant> {
        self.queue.next_deadline()
    }

    /// Moves an entry to where it stands with this class and deadline.
    pub(crate) fn promote(
        &mut self,
        place: &QueuePosition,
        class: Priority,
        deadline: Option<Instant>,
    ) -> Option<QueuePosition> {
        let entry = self.queue.remove(place)?;
        let entry = QueuedWork { deadline, ..entry };
        Some(self.queue.push(class, place.graph, entry))
    }
}

/// When a batch begins that comes after so many others, which take `each` and go
/// to whichever engine is free first. The engines are busy for `rests`, of which
/// there is one at least.
fn begins_in(rests: &[Duration], each: Duration, batches: u32) -> Duration {
    let first = rests.iter().min().copied().unwrap_or_default();
    // Batches that have begun by then, where one engine would begin them all.
    let begun = |within: Duration| -> u128 {
        let on =
            |rest: &Duration| Some((within.checked_sub(*rest)?).as_nanos() / each.as_nanos() + 1);
        rests.iter().filter_map(on).sum()
    };
    if each.is_zero() {
        return first;
    }
    // The earliest time by which it is one of them. The first engine alone is
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
