//! The queue, the policy and the measurements together: what the engine should
//! run next.
//!
//! Nothing here waits, answers or reads a clock, so that tests run days of
//! traffic in a moment; `batcher.rs` gives it a thread.

use std::time::{Duration, Instant};

use super::pace::Pace;
use super::policy::{Decision, Ledger, Policy};
use super::queue::{Entry, Lane, Place, Queue};
use crate::engine::Graph;
use crate::job::Class;
use crate::metrics::Close;

/// See the module.
#[derive(Debug)]
pub struct Scheduler<T> {
    pub queue: Queue<T>,
    pub pace: Pace,
    policy: Policy,
    ledger: Ledger,
    /// The largest batch that the engine takes; lowered when its memory does
    /// not suffice for more.
    largest: usize,
    running: Option<Running>,
    /// The class in which both a batch and a step wait, and by how much engine
    /// time, in seconds, batches are ahead of steps since then.
    contended: Option<(Class, f64)>,
}

#[derive(Debug, Clone, Copy)]
struct Running {
    class: Class,
    is_step: bool,
    bulk_waits: bool,
    started: Instant,
    /// When it ends at the earliest, by what was measured.
    ends: Instant,
}

/// The sequences that a step would take further.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Steps {
    /// The most urgent class among them.
    pub class: Class,
    /// Whether there are any of bulk.
    pub bulk: bool,
    /// When the last step was made, or the first of them came.
    pub since: Instant,
}

/// What to do while the engine is free.
#[derive(Debug)]
pub enum Next<T> {
    Idle,
    WaitUntil(Instant),
    Run(Picked<T>),
    /// A step of the sequences.
    Step,
}

/// A batch, and those for whom it came too late.
#[derive(Debug)]
pub struct Picked<T> {
    pub class: Class,
    pub graph: Graph,
    pub bucket: usize,
    pub close: Close,
    /// At most `bucket`; none if all were too late.
    pub rows: Vec<Entry<T>>,
    /// Whose deadline comes before the run can end.
    pub late: Vec<Entry<T>>,
    /// What the run takes at least, by what was measured.
    pub needed: Duration,
}

impl<T> Scheduler<T> {
    #[must_use]
    pub fn new(policy: Policy) -> Self {
        let largest = policy.buckets.largest();
        Self {
            queue: Queue::default(),
            pace: Pace::default(),
            policy,
            ledger: Ledger::default(),
            largest,
            running: None,
            contended: None,
        }
    }

    /// The largest batch that is formed now.
    #[must_use]
    pub fn largest(&self) -> usize {
        self.largest
    }

    /// The engine takes no more than this from now on.
    pub fn limit(&mut self, largest: usize) {
        self.largest = self.policy.buckets.at_most(largest);
    }

    /// What to run now that the engine is free.
    pub fn next(&mut self, now: Instant, draining: bool, steps: Option<Steps>) -> Next<T> {
        let lanes = self.queue.lanes();
        let bulk = lanes.iter().filter(|lane| lane.class == Class::Bulk);
        let bulk_owed = bulk.min_by_key(|lane| lane.first).is_some_and(|lane| {
            let bucket = self.bucket(lane.graph, lane.len, now);
            // What was never seen to run is not owed on account.
            let cost = self.pace.typical(lane.graph, bucket);
            let cost = cost.unwrap_or(self.policy.bulk_wait_max);
            self.ledger
                .bulk_is_owed(&self.policy, cost, lane.oldest, now)
        });
        let decision = self.decide(&lanes, now, draining, bulk_owed);
        self.contended = match (steps, decision) {
            (Some(steps), Decision::Flush(class, ..)) if steps.class == class => {
                let before = self.contended.filter(|(before, _)| *before == class);
                Some(before.unwrap_or((class, 0.0)))
            }
            _ => None,
        };
        if let Some(steps) = steps
            && self.step_goes_first(decision, steps, bulk_owed, now)
        {
            self.begin_step(steps, now);
            return Next::Step;
        }
        match decision {
            Decision::Idle => Next::Idle,
            Decision::WaitUntil(at) => Next::WaitUntil(at),
            Decision::Flush(class, graph, close) => {
                let len = lanes
                    .iter()
                    .find(|lane| (lane.class, lane.graph) == (class, graph))
                    .map_or(1, |lane| lane.len);
                let bulk_steps = steps.is_some_and(|steps| steps.bulk);
                Next::Run(self.pick(class, graph, close, len, bulk_steps, now))
            }
        }
    }

    fn decide(&self, lanes: &[Lane], now: Instant, draining: bool, bulk_owed: bool) -> Decision {
        // The size that a full queue would run at: where it is one image, as on
        // a CPU, nobody waits for company.
        let full = |graph| self.bucket(graph, self.largest, now);
        self.policy.decide(lanes, full, now, draining, bulk_owed)
    }

    /// Whether a step goes before the batch that could be run. A step is short,
    /// so it never waits for a batch to fill up; between classes the rules are
    /// those of batches; within one, both get the same time.
    fn step_goes_first(
        &self,
        decision: Decision,
        steps: Steps,
        bulk_owed: bool,
        now: Instant,
    ) -> bool {
        let Decision::Flush(class, ..) = decision else {
            return true;
        };
        match (steps.class, class) {
            (Class::Interactive, Class::Bulk) => !bulk_owed,
            (Class::Bulk, Class::Interactive) => {
                let cost = self.pace.floor(Graph::Generate, now).unwrap_or_default();
                self.ledger
                    .bulk_is_owed(&self.policy, cost, steps.since, now)
            }
            _ => self.contended.is_none_or(|(_, ahead)| ahead >= 0.0),
        }
    }

    fn begin_step(&mut self, steps: Steps, now: Instant) {
        self.ledger.served(steps.class, now);
        let least = self.pace.floor(Graph::Generate, now);
        self.running = Some(Running {
            class: steps.class,
            is_step: true,
            bulk_waits: steps.bulk && steps.class != Class::Bulk
                || self.queue.len_of(Class::Bulk) > 0,
            started: now,
            ends: now + least.unwrap_or_default(),
        });
    }

    fn bucket(&self, graph: Graph, n: usize, now: Instant) -> usize {
        self.policy.bucket(graph, n, self.largest, &self.pace, now)
    }

    fn pick(
        &mut self,
        class: Class,
        graph: Graph,
        close: Close,
        len: usize,
        bulk_steps: bool,
        now: Instant,
    ) -> Picked<T> {
        let mut bucket = self.bucket(graph, len, now);
        if class == Class::Interactive {
            let bulk = self.queue.len_in(Class::Bulk, graph);
            bucket = self
                .policy
                .shared_bucket(graph, bucket, len + bulk, self.largest, &self.pace);
        }
        // The most urgent decides: a smaller batch if only that is in time.
        while let Some(deadline) = self.queue.first_deadline(class, graph)
            && !self.in_time(graph, bucket, deadline, now)
            && self.policy.buckets.at_most(bucket - 1) < bucket
        {
            bucket = self.policy.buckets.at_most(bucket - 1);
        }
        let (mut rows, mut late) = (Vec::with_capacity(bucket), Vec::new());
        self.fill(class, graph, bucket, now, &mut rows, &mut late);
        if !rows.is_empty() {
            // Rows that would be padding are free for the other class.
            let other = match class {
                Class::Interactive => Class::Bulk,
                Class::Bulk => Class::Interactive,
            };
            self.fill(other, graph, bucket, now, &mut rows, &mut late);
            self.ledger.served(class, now);
            let least = self.pace.at_least(graph, bucket, now);
            self.running = Some(Running {
                class,
                is_step: false,
                bulk_waits: bulk_steps || self.queue.len_of(Class::Bulk) > 0,
                started: now,
                ends: now + least.unwrap_or_default(),
            });
        }
        let needed = self.pace.at_least(graph, bucket, now).unwrap_or_default();
        Picked {
            class,
            graph,
            bucket,
            close,
            rows,
            late,
            needed,
        }
    }

    fn fill(
        &mut self,
        class: Class,
        graph: Graph,
        bucket: usize,
        now: Instant,
        rows: &mut Vec<Entry<T>>,
        late: &mut Vec<Entry<T>>,
    ) {
        while rows.len() < bucket
            && let Some(entry) = self.queue.pop(class, graph)
        {
            match entry.deadline {
                Some(deadline) if !self.in_time(graph, bucket, deadline, now) => late.push(entry),
                _ => rows.push(entry),
            }
        }
    }

    fn in_time(&self, graph: Graph, bucket: usize, deadline: Instant, now: Instant) -> bool {
        let least = self.pace.at_least(graph, bucket, now).unwrap_or_default();
        now + least <= deadline
    }

    /// The engine has ended the batch that was picked last.
    pub fn ended(&mut self, now: Instant) {
        if let Some(running) = self.running.take() {
            let elapsed = now.saturating_duration_since(running.started);
            let bulk_waits = running.bulk_waits || self.queue.len_of(Class::Bulk) > 0;
            self.ledger
                .ran(&self.policy, running.class, elapsed, bulk_waits);
            if let Some((class, ahead)) = &mut self.contended
                && *class == running.class
            {
                let seconds = elapsed.as_secs_f64();
                *ahead += if running.is_step { -seconds } else { seconds };
            }
        }
    }

    /// How long work that comes now needs at least, if that is longer than its
    /// deadline leaves: the rest of the present run, what goes before it, its
    /// own run. By the shortest times that were measured lately, so that nobody
    /// is refused who might have been served.
    #[must_use]
    pub fn too_late(
        &self,
        class: Class,
        graph: Graph,
        deadline: Instant,
        now: Instant,
    ) -> Option<Duration> {
        let own = self.pace.floor(graph, now)?;
        let present = self.running.map_or(Duration::ZERO, |running| {
            running.ends.saturating_duration_since(now)
        });
        let ahead = self.queue.ahead(class, graph, now, Some(deadline));
        let batches = u32::try_from(ahead / self.largest.max(1)).unwrap_or(u32::MAX);
        let each = self.pace.at_least(graph, self.largest, now);
        let needed = present + each.unwrap_or_default() * batches + own;
        (now + needed > deadline).then_some(needed)
    }

    /// When something will have to be looked at again, whatever arrives.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.queue.next_deadline()
    }

    /// Moves an entry to where it stands with this class and deadline.
    pub fn promote(
        &mut self,
        place: &Place,
        class: Class,
        deadline: Option<Instant>,
    ) -> Option<Place> {
        let entry = self.queue.remove(place)?;
        let entry = Entry { deadline, ..entry };
        Some(self.queue.push(class, place.graph, entry))
    }
}

#[cfg(test)]
mod tests;
