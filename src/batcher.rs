//! Gathers jobs into batches, on a thread of its own.
//!
//! Late binding: a batch is formed only when the engine has said that it is
//! free, from everything that waits at that moment. Jobs whose caller has gone
//! or whose deadline has passed are dropped before they cost engine time, and
//! never hold their place for longer than `SWEEP_INTERVAL`. Jobs of one
//! graph leave in the order in which they came.

pub mod policy;

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, select};

use crate::engine::{Batch, Graph, Slot};
use crate::error::{Error, Stage};
use crate::job::{Job, Work};
use crate::metrics::Metrics;
use policy::{Decision, Lane, Policy};

/// How long a dead job may hold its place in the queue. Short against any
/// deadline worth setting, long against a sweep of a full queue (about 10 µs).
const SWEEP_INTERVAL: Duration = Duration::from_millis(10);

type TokenJob = Job<Box<[u16]>>;

/// The batcher's ends of its channels.
pub(crate) struct Channels {
    /// From preprocessing.
    pub(crate) jobs: Receiver<TokenJob>,
    /// From the engine, when it is free.
    pub(crate) slots: Receiver<Slot>,
    /// To the engine. Capacity 1, and sent to only after a slot: never full.
    pub(crate) batches: Sender<(Graph, Batch)>,
}

/// The life of the batcher thread: until preprocessing has ended and all that
/// waits has been handed on.
pub(crate) fn run(policy: Policy, channels: &Channels, metrics: &Metrics) {
    let mut queue = Queue::default();
    let mut slot: Option<Slot> = None;
    let mut draining = false;
    let mut swept_at = Instant::now();
    loop {
        let now = Instant::now();
        if now.duration_since(swept_at) >= SWEEP_INTERVAL {
            queue.sweep(now, metrics);
            swept_at = now;
        }
        let mut wake = (queue.len > 0).then(|| now + SWEEP_INTERVAL);
        if slot.is_some() {
            match policy.decide(&queue.lanes(), now, draining) {
                Decision::Flush(graph, close) => {
                    let batch = queue.take(graph, policy.max_batch_size, now, metrics);
                    metrics.queue_depth(queue.len);
                    if !batch.is_empty() {
                        metrics.batch(graph, batch.len(), policy.max_batch_size, close);
                        slot = None;
                        if let Err(refused) = channels.batches.send((graph, batch)) {
                            refuse(refused.into_inner().1);
                        }
                    }
                    continue;
                }
                Decision::WaitUntil(at) => wake = wake.map(|wake| wake.min(at)),
                Decision::Idle if draining => return,
                Decision::Idle => {}
            }
        }
        match wait(channels, slot.is_none(), draining, wake) {
            Event::Job(job) => {
                queue.push(job);
                // Everything that has arrived by now belongs in the decision.
                while let Ok(job) = channels.jobs.try_recv() {
                    queue.push(job);
                }
                metrics.queue_depth(queue.len);
            }
            Event::Slot(free) => slot = Some(free),
            Event::NoMoreJobs => draining = true,
            Event::EngineGone => {
                metrics.queue_depth(0);
                return refuse_all(queue, channels);
            }
            Event::Tick => {}
        }
    }
}

/// All that can happen to the batcher.
enum Event {
    Job(TokenJob),
    Slot(Slot),
    NoMoreJobs,
    EngineGone,
    Tick,
}

/// Waits for the next event. A channel is listened to only while it can say
/// something new: slots while there is none, jobs until they have ended.
fn wait(channels: &Channels, want_slot: bool, draining: bool, wake: Option<Instant>) -> Event {
    let never_jobs = crossbeam_channel::never();
    let never_slots = crossbeam_channel::never();
    let tick = wake.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
    let jobs = if draining {
        &never_jobs
    } else {
        &channels.jobs
    };
    let slots = if want_slot {
        &channels.slots
    } else {
        &never_slots
    };
    select! {
        recv(jobs) -> job => job.map_or(Event::NoMoreJobs, Event::Job),
        recv(slots) -> slot => slot.map_or(Event::EngineGone, Event::Slot),
        recv(tick) -> _ => Event::Tick,
    }
}

/// The engine has ended before its time: whoever waits, and whoever still
/// comes, is told.
fn refuse_all(queue: Queue, channels: &Channels) {
    for (_, lane) in queue.lanes {
        refuse(lane.into());
    }
    loop {
        match channels.jobs.recv_timeout(Duration::from_secs(1)) {
            Ok(job) => refuse(vec![job]),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

fn refuse(jobs: Vec<TokenJob>) {
    for job in jobs {
        job.ticket.finish(Err(Error::NotReady));
    }
}

/// What waits, by graph, each in order of arrival.
#[derive(Default)]
struct Queue {
    lanes: BTreeMap<Graph, VecDeque<TokenJob>>,
    len: usize,
}

impl Queue {
    fn push(&mut self, job: TokenJob) {
        let Work::Infer { want, .. } = job.work else {
            // Preprocessing answers Tokenize itself.
            debug_assert!(false, "a tokenize job reached the batcher");
            return;
        };
        self.lanes
            .entry(Graph::of(want))
            .or_default()
            .push_back(job);
        self.len += 1;
    }

    fn lanes(&self) -> Vec<Lane> {
        self.lanes
            .iter()
            .filter_map(|(&graph, lane)| {
                let oldest = lane.front()?.ticket.entered_at;
                Some(Lane {
                    graph,
                    len: lane.len(),
                    oldest,
                })
            })
            .collect()
    }

    /// The next live jobs of a graph, at most `n`.
    fn take(&mut self, graph: Graph, n: usize, now: Instant, metrics: &Metrics) -> Batch {
        let mut batch = Vec::with_capacity(n);
        let lane = self.lanes.entry(graph).or_default();
        while batch.len() < n {
            let Some(job) = lane.pop_front() else { break };
            self.len -= 1;
            if let Some(error) = job.ticket.dead(now, Stage::Queue) {
                metrics.dead(&error);
                job.ticket.finish(Err(error));
            } else {
                metrics.queued(now.saturating_duration_since(job.ticket.entered_at));
                batch.push(job);
            }
        }
        batch
    }

    /// Drops the dead, wherever they stand.
    fn sweep(&mut self, now: Instant, metrics: &Metrics) {
        for lane in self.lanes.values_mut() {
            let alive = |job: &TokenJob| job.ticket.dead(now, Stage::Queue).is_none();
            if lane.iter().all(alive) {
                continue;
            }
            for job in std::mem::take(lane) {
                if let Some(error) = job.ticket.dead(now, Stage::Queue) {
                    metrics.dead(&error);
                    job.ticket.finish(Err(error));
                    self.len -= 1;
                } else {
                    lane.push_back(job);
                }
            }
        }
        metrics.queue_depth(self.len);
    }
}
