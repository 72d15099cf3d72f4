//! Gathers jobs into batches, under one lock and with a thread of its own
//! (continuous batching).
//!
//! Late binding: a batch is formed only when an engine has said that it is
//! free, from everything that waits at that moment. All engines take from one
//! queue; the engine that has been free longest comes first. The engine's
//! thread forms the batch itself if something waits. The batcher's thread forms
//! it if work arrives while an engine is idle; it also keeps the timers, and
//! sends the answers of engines that run on. Identical work is in the queue
//! once, with all callers that wait for the answer (coalescing). A caller that
//! has disconnected or is past its deadline leaves the queue at once: the
//! preprocessing queue rings a bell when a caller disconnects, and a timer runs
//! to the next deadline. A run that no caller waits for any more is stopped.

mod engines;
pub(crate) mod pace;
pub(crate) mod policy;
pub(crate) mod queue;
pub(crate) mod scheduler;
mod sequences;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender, select};

pub(crate) use self::engines::EngineLine;
use self::engines::{Engines, RunningBatch};
use self::policy::Policy;
use self::queue::{QueuePosition, QueuedWork};
use self::scheduler::{NextTurn, Picked, Scheduler};
use self::sequences::WaitingSequences;
use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::cache::{AnswerCache, AnswerKey};
use crate::serve::capacity::DrainRate;
use crate::serve::devices::DeviceIdx;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::fair::CallerId;
use crate::serve::handoff::{Batch, BatchUnit, EngineNotice, EngineSlot, EngineTurn};
use crate::serve::job::{Answer, CoalescedWaiters, Job, RequestedWork};
use crate::serve::metrics::Metrics;
use crate::serve::sequence::Sequence;
use crate::sync::{Mutex, MutexGuard, PoisonError};

type TokenJob = Job<Arc<[u16]>>;

/// Work that preprocessing hands on to the batcher.
#[derive(Debug)]
pub(crate) enum PreparedWork {
    /// One row of a run.
    Row(TokenJob),
    /// An image to generate.
    Sequence(Sequence),
}

/// Jobs that the batcher takes in while it holds the lock once: an engine may
/// have to wait for the lock meanwhile, about a tenth of a millisecond.
const PUSHED_AT_ONCE: usize = 64;

/// Time within which deadlines, and disconnections of callers, are handled
/// together, since finding them takes time in proportion to the work that
/// waits.
const TIMER_GRAIN: Duration = Duration::from_millis(1);

/// Pause after a sweep, as a multiple of the sweep's own duration.
const SWEEP_PAUSE: u32 = 9;

/// The batcher's ends of its channels.
pub(crate) struct Channels {
    /// Work from preprocessing.
    pub(crate) jobs: Receiver<PreparedWork>,
    /// Bell that admission rings when callers have disconnected.
    pub(crate) bell: Receiver<()>,
    /// Notices from the engines.
    pub(crate) notices: Receiver<EngineNotice>,
}

/// Parts of the worker that the batcher shares with other stages.
pub(crate) struct BatcherParts {
    pub(crate) cache: AnswerCache,
    pub(crate) drain: DrainRate,
    /// Percentage of each engine's slots for sequences that bulk work cannot
    /// take.
    pub(crate) interactive_reserve: u8,
    pub(crate) metrics: Metrics,
}

/// State from which batches are formed, shared by the batcher's thread and the
/// engines' threads. Cheap to clone.
#[derive(Clone)]
pub(crate) struct Batcher(Arc<Mutex<State>>);

impl Batcher {
    pub(crate) fn new(policy: Policy, engines: Vec<EngineLine>, shared: BatcherParts) -> Self {
        let sequences = WaitingSequences::new(shared.interactive_reserve, policy.bulk_wait_max);
        Self(Arc::new(Mutex::new(State {
            scheduler: Scheduler::new(policy, engines.len()),
            sequences,
            known: HashMap::new(),
            engines: Engines::new(engines),
            draining: false,
            batch_id: 0,
            shared,
        })))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A thread that panics while it holds this lock ends the worker.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note that an engine is free. If there is work for the engine, its
    /// turn has been given when this function returns; if not, the batcher's
    /// thread is told.
    pub(crate) fn free(&self, slot: EngineSlot, notices: &Sender<EngineNotice>) {
        let device = slot.device;
        let mut state = self.lock();
        state.ended(slot);
        state.look();
        if state.engines.is_free(device) {
            // If the channel is full, the thread has yet to look anyway.
            let _ = notices.try_send(EngineNotice::Free);
        }
    }
}

/// Closes the engines' channels when the batcher's thread ends, in whichever
/// way. If the thread panics, all callers whose work waits are answered; work
/// that is still in the thread's channels is dropped with them, and its callers
/// are told that the worker lost the job.
struct HangUp<'a>(&'a Batcher);

impl Drop for HangUp<'_> {
    fn drop(&mut self) {
        let mut state = self.0.lock();
        state.engines.hang_up();
        if std::thread::panicking() {
            state.refuse_all();
        }
    }
}

/// Runs the batcher's thread until preprocessing has ended and all work that
/// waits has been handed on.
pub(crate) fn run(batcher: &Batcher, channels: &Channels) {
    let _hang_up = HangUp(batcher);
    let remembered = Remembered::of(&batcher.lock().shared);
    let mut draining = false;
    let (mut next_sweep, mut sweep_at) = (None, None);
    let mut outlook = batcher.lock().look();
    loop {
        let wake = match outlook {
            Outlook::Done => {
                // Answers of runs that ended since this thread looked last.
                return channels
                    .notices
                    .try_iter()
                    .for_each(|notice| remembered.deliver(notice));
            }
            Outlook::At(wake) => earlier(wake, sweep_at),
        };
        let mut event = match wait(channels, draining, wake) {
            // Answers are sent without the lock, since an engine may wait for
            // it.
            Event::Notice(notice @ EngineNotice::Ran(_)) => {
                remembered.deliver(notice);
                Event::Tick
            }
            event => event,
        };
        // Everything that has arrived by now takes part in the decision.
        let mut jobs = Vec::new();
        if let Event::Job(first) = event {
            let others = channels.jobs.try_iter().take(PUSHED_AT_ONCE);
            let all = std::iter::once(first).chain(others);
            jobs.extend(all.filter_map(|job| remembered.answer(job)));
            event = Event::Tick;
        }
        let mut state = batcher.lock();
        if !jobs.is_empty() {
            for job in jobs {
                state.push(job);
            }
            state.show();
        }
        match event {
            Event::Notice(EngineNotice::Gone(device)) => {
                state.gone(device);
                if state.engines.is_empty() {
                    state.refuse_all();
                    drop(state);
                    return refuse_arrivals(channels);
                }
            }
            Event::Bell => {
                sweep_at = next_sweep.or_else(|| Some(Instant::now()));
            }
            Event::NoMoreJobs => {
                draining = true;
                state.draining = true;
                // The bell is not listened to from here on, and may have rung
                // just before.
                sweep_at = Some(Instant::now());
            }
            Event::EnginesGone => {
                state.refuse_all();
                drop(state);
                return refuse_arrivals(channels);
            }
            Event::Notice(EngineNotice::Free | EngineNotice::Ran(_))
            | Event::Job(_)
            | Event::Tick => {}
        }
        let now = Instant::now();
        if sweep_at.is_some_and(|at| at <= now) {
            state.sweep(now);
            // A long sweep is not soon followed by another, or engines would
            // wait for the lock.
            let took = now.elapsed();
            next_sweep = Some(now + took + (took * SWEEP_PAUSE).max(TIMER_GRAIN));
            sweep_at = None;
        }
        outlook = state.look();
    }
}

/// Sends answers that need no run: from the cache, or from a run that has
/// ended. They are sent without the lock, since copying them takes a while.
struct Remembered {
    cache: AnswerCache,
    metrics: Metrics,
}

impl Remembered {
    /// Sends the answers of a run, if the notice has any.
    fn deliver(&self, notice: EngineNotice) {
        if let EngineNotice::Ran(replies) = notice {
            for reply in replies {
                reply.deliver(&self.cache);
            }
        }
    }

    fn of(shared: &BatcherParts) -> Self {
        Self {
            cache: shared.cache.clone(),
            metrics: shared.metrics.clone(),
        }
    }

    /// Answers a job from the cache, or gives the job back if the cache has no
    /// answer.
    fn answer(&self, arrival: PreparedWork) -> Option<PreparedWork> {
        let PreparedWork::Row(mut job) = arrival else {
            return Some(arrival);
        };
        let RequestedWork::Infer { want, .. } = job.work else {
            return Some(PreparedWork::Row(job));
        };
        if !self.cache.is_on()
            || job
                .ticket
                .dead(Instant::now(), RequestStage::Queue)
                .is_some()
        {
            return Some(PreparedWork::Row(job));
        }
        let key = AnswerKey::new(want, job.payload);
        let found = self.cache.get(&key);
        self.metrics.cache(found.is_some());
        let Some(values) = found else {
            job.payload = key.tokens;
            return Some(PreparedWork::Row(job));
        };
        let answer = Answer::of(want, &key.tokens, values.to_vec());
        job.ticket.finish(Ok(answer));
        None
    }
}

/// Next thing to do once every free engine has been given its work.
enum Outlook {
    /// The worker ends, and nothing waits or runs.
    Done,
    /// Nothing has to be done before this time, if there is a time.
    At(Option<Instant>),
}

/// Result of looking for work for the engines that are free.
enum Fed {
    /// An engine has been given its turn, or the waiting work has changed: look
    /// again.
    Given,
    /// A batch may still fill up until this time.
    WaitUntil(Instant),
    /// No work waits, or no engine is free.
    Nothing,
}

/// Events that wake the batcher's thread.
#[expect(
    clippy::large_enum_variant,
    reason = "there is one at a time, on the stack"
)]
enum Event {
    Job(PreparedWork),
    Notice(EngineNotice),
    Bell,
    NoMoreJobs,
    EnginesGone,
    Tick,
}

/// Waits for the next event. Jobs are received until preprocessing has ended.
fn wait(channels: &Channels, draining: bool, wake: Option<Instant>) -> Event {
    let never_jobs = crossbeam_channel::never();
    let never_bell = crossbeam_channel::never();
    let tick = wake.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
    let (jobs, bell) = if draining {
        // Admission has ended, and the bell with it.
        (&never_jobs, &never_bell)
    } else {
        (&channels.jobs, &channels.bell)
    };
    select! {
        recv(jobs) -> job => job.map_or(Event::NoMoreJobs, Event::Job),
        recv(channels.notices) -> notice => notice.map_or(Event::EnginesGone, Event::Notice),
        recv(bell) -> ring => ring.map_or(Event::Tick, |()| Event::Bell),
        recv(tick) -> _ => Event::Tick,
    }
}

/// Earlier of two optional times; `None` if both are `None`.
fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

/// Work in the queue, with the callers that wait for its answer.
#[derive(Debug)]
struct Waiting {
    key: AnswerKey,
    waiters: Arc<CoalescedWaiters>,
}

/// Work that identical jobs may join, and its place: in the queue or at an
/// engine.
struct Known {
    waiters: Arc<CoalescedWaiters>,
    at: At,
}

#[derive(Clone, Copy)]
enum At {
    Queue(QueuePosition),
    Engine(DeviceIdx),
}

struct State {
    scheduler: Scheduler<Waiting>,
    sequences: WaitingSequences,
    /// Work that waits or runs, by its key, so that identical work is found.
    known: HashMap<AnswerKey, Known>,
    engines: Engines,
    /// True if the worker drains: batches no longer wait to fill up.
    draining: bool,
    batch_id: u64,
    shared: BatcherParts,
}

impl State {
    /// Gives every free engine its work, if there is any.
    fn look(&mut self) -> Outlook {
        loop {
            let now = Instant::now();
            self.expire(now);
            let wake = match self.feed(now) {
                Fed::Given => continue,
                Fed::Nothing if self.draining && self.engines.all_free() => return Outlook::Done,
                Fed::Nothing => None,
                Fed::WaitUntil(at) => Some(at),
            };
            let deadline = self.next_deadline().map(|at| at + TIMER_GRAIN);
            return Outlook::At(earlier(deadline, wake));
        }
    }

    /// Gives one turn: to the engine that has been free longest among those for
    /// which there is work.
    fn feed(&mut self, now: Instant) -> Fed {
        let mut wake = None;
        for device in self.engines.free() {
            let steps = self.sequences.steps(device);
            match self.scheduler.next(device, now, self.draining, steps) {
                NextTurn::Run(picked) => {
                    if let Some((batch, running)) = self.form(device, picked, now) {
                        let turn = EngineTurn::Batch(batch);
                        self.engines.give(device, turn, Some(running));
                    }
                    return Fed::Given;
                }
                NextTurn::Step => {
                    let joining = self.join(device, now);
                    let turn = EngineTurn::Step {
                        joining,
                        possible_since: steps.map_or(now, |steps| steps.since),
                    };
                    self.engines.give(device, turn, None);
                    return Fed::Given;
                }
                NextTurn::WaitUntil(at) => wake = earlier(wake, Some(at)),
                NextTurn::Idle => {}
            }
        }
        wake.map_or(Fed::Nothing, Fed::WaitUntil)
    }

    fn push(&mut self, arrival: PreparedWork) {
        match arrival {
            PreparedWork::Row(job) => self.push_row(job),
            PreparedWork::Sequence(sequence) => self.push_sequence(sequence),
        }
    }

    fn push_sequence(&mut self, sequence: Sequence) {
        let now = Instant::now();
        let ticket = &sequence.ticket;
        let too_late = || {
            let step = self.scheduler.pace.floor(Graph::Generate, now)?;
            let n_steps = u32::try_from(sequence.n_steps_left()).unwrap_or(u32::MAX);
            let needed = step.saturating_mul(n_steps);
            (now + needed > ticket.deadline?).then_some(StageError::DeadlineTooShort { needed })
        };
        if let Some(error) = ticket.dead(now, RequestStage::Queue).or_else(too_late) {
            self.shared.metrics.dead(&error);
            return sequence.finish(Err(error));
        }
        self.sequences.push(sequence, now);
    }

    /// Takes out the sequences that join the engine's next step.
    fn join(&mut self, device: DeviceIdx, now: Instant) -> Vec<Sequence> {
        let joining = self.sequences.join(device, now);
        for sequence in &joining {
            let waited = now.saturating_duration_since(sequence.ticket.entered_at);
            self.shared.metrics.queued(sequence.ticket.class, waited);
        }
        self.show();
        joining
    }

    fn push_row(&mut self, job: TokenJob) {
        let RequestedWork::Infer { want, .. } = job.work else {
            // Preprocessing answers Tokenize jobs itself.
            debug_assert!(false, "a tokenize job reached the batcher");
            return;
        };
        let metrics = &self.shared.metrics;
        let now = Instant::now();
        let mut ticket = job.ticket;
        if let Some(error) = ticket.dead(now, RequestStage::Queue) {
            metrics.dead(&error);
            return ticket.finish(Err(error));
        }
        let key = AnswerKey::new(want, job.payload);
        let (class, caller, deadline) = (ticket.class, ticket.caller, ticket.deadline);
        if let Some(known) = self.known.get_mut(&key) {
            match known.waiters.join(ticket) {
                Ok(()) => {
                    metrics.coalesced();
                    self.urge(&key, class, caller, deadline);
                    return;
                }
                // Answered this very moment: the work runs once more.
                Err(refused) => ticket = refused,
            }
        }
        let graph = Graph::of(want);
        let scheduler = &self.scheduler;
        let needed =
            deadline.and_then(|deadline| scheduler.too_late(class, graph, caller, deadline, now));
        if let Some(needed) = needed {
            let error = StageError::DeadlineTooShort { needed };
            metrics.dead(&error);
            return ticket.finish(Err(error));
        }
        let entry = QueuedWork {
            caller,
            arrived: ticket.entered_at,
            deadline,
            item: Waiting {
                key: key.clone(),
                waiters: Arc::new(CoalescedWaiters::new(ticket)),
            },
        };
        let waiters = Arc::clone(&entry.item.waiters);
        let at = At::Queue(self.scheduler.queue.push(class, graph, entry));
        self.known.insert(key, Known { waiters, at });
    }

    /// Moves work up in the queue after a more urgent job has joined it, to the
    /// place where that job would stand.
    ///
    /// Work for which several callers wait runs in the turn of one of them: of
    /// the first one, unless a caller joins who has less work waiting and whose
    /// turn therefore comes sooner. Sharing a run with a caller that has a
    /// thousand images waiting must not mean waiting behind them.
    fn urge(
        &mut self,
        key: &AnswerKey,
        class: Priority,
        caller: CallerId,
        deadline: Option<Instant>,
    ) {
        let Some(known) = self.known.get_mut(key) else {
            return;
        };
        let place = match known.at {
            At::Queue(place) => place,
            At::Engine(device) => {
                // The work runs already; the job that joined must still be
                // answered by its deadline.
                if let Some(running) = self.engines.running(device) {
                    running.deadline = earlier(running.deadline, deadline);
                }
                return;
            }
        };
        let queue = &self.scheduler.queue;
        let Some(entry) = queue.get(&place) else {
            return;
        };
        let class = class.min(place.class);
        let n_waiting = |caller| queue.len_of_caller(class, caller);
        let caller = if n_waiting(caller) < n_waiting(entry.caller) {
            caller
        } else {
            entry.caller
        };
        let deadline = earlier(entry.deadline, deadline);
        let is_moved = class != place.class || caller != entry.caller || deadline != entry.deadline;
        if is_moved && let Some(moved) = self.scheduler.promote(&place, class, caller, deadline) {
            known.at = At::Queue(moved);
        }
    }

    /// Makes a batch of the picked rows, without callers that have disconnected
    /// or are past their deadline.
    fn form(
        &mut self,
        device: DeviceIdx,
        picked: Picked<Waiting>,
        now: Instant,
    ) -> Option<(Batch, RunningBatch)> {
        let metrics = &self.shared.metrics;
        for entry in picked.late {
            let Waiting { key, waiters } = entry.item;
            let stage = RequestStage::Queue;
            waiters.sweep(now, stage, |error| metrics.dead(error));
            // Only the callers with this deadline are late; the work may be in
            // time for the others.
            let limit = entry.deadline.unwrap_or(now);
            let error = if limit > now {
                // The deadline has not passed yet, but the run would end after
                // it.
                StageError::DeadlineTooShort {
                    needed: picked.needed,
                }
            } else {
                StageError::DeadlineExceeded { stage }
            };
            let left = waiters.late(limit, &error, |error| metrics.dead(error));
            let Some(class) = left.class else {
                self.known.remove(&key);
                continue;
            };
            let entry = QueuedWork {
                item: Waiting {
                    key: key.clone(),
                    waiters,
                },
                caller: entry.caller,
                arrived: entry.arrived,
                deadline: left.deadline,
            };
            let place = self.scheduler.queue.push(class, picked.graph, entry);
            if let Some(known) = self.known.get_mut(&key) {
                known.at = At::Queue(place);
            }
        }
        let mut units = Vec::with_capacity(picked.rows.len());
        let mut running = Vec::with_capacity(picked.rows.len());
        let mut deadline: Option<Instant> = None;
        for entry in picked.rows {
            let Waiting { key, waiters } = entry.item;
            let left = waiters.sweep(now, RequestStage::Queue, |error| metrics.dead(error));
            if left.n_tickets == 0 {
                // No job can join this work now, since that needs the lock.
                self.known.remove(&key);
                continue;
            }
            // A row may be of the other class, if it takes the place of
            // padding.
            let class = left.class.unwrap_or(picked.class);
            let waited = now.saturating_duration_since(entry.arrived);
            metrics.queued(class, waited);
            metrics.totals().waited(waited);
            if let Some(known) = self.known.get_mut(&key) {
                known.at = At::Engine(device);
            }
            deadline = earlier(deadline, left.deadline);
            units.push(BatchUnit {
                tokens: Arc::clone(&key.tokens),
                want: key.want,
                waiters: Arc::clone(&waiters),
            });
            running.push((key, waiters));
        }
        self.show();
        if units.is_empty() {
            self.scheduler.ended(device, now);
            return None;
        }
        self.batch_id += 1;
        self.shared
            .metrics
            .batch(picked.graph, units.len(), picked.bucket, picked.close);
        let running = RunningBatch {
            id: self.batch_id,
            units: running,
            stopping: false,
            deadline,
        };
        let batch = Batch {
            id: self.batch_id,
            graph: picked.graph,
            bucket: picked.bucket,
            units,
            possible_since: picked.possible_since,
        };
        Some((batch, running))
    }

    /// Takes note that an engine is free and has ended its run.
    fn ended(&mut self, slot: EngineSlot) {
        let (device, now) = (slot.device, Instant::now());
        if let Some(running) = self.engines.freed(device, now) {
            forget(&mut self.known, &running);
        }
        self.scheduler.ended(device, now);
        self.sequences.at_engine(device, slot.sequences);
        let pace = &mut self.scheduler.pace;
        for warm in slot.warm {
            pace.warmed(warm.graph, warm.bucket, warm.elapsed, now);
        }
        pace.sizes_untried |= slot.sizes_untried;
        for ran in slot.runs {
            pace.ran(ran.graph, ran.bucket, ran.images, ran.elapsed, now);
        }
        self.show_rate();
        if slot.largest < self.scheduler.largest(device) {
            self.scheduler.limit(device, slot.largest);
        }
    }

    /// Takes note that an engine takes no more turns. The work in the queue is
    /// left to the other engines.
    fn gone(&mut self, device: DeviceIdx) {
        if let Some(running) = self.engines.remove(device) {
            forget(&mut self.known, &running);
            // Callers of a batch that the engine had not begun; the engine has
            // answered all others itself.
            for (_, waiters) in running.units {
                waiters.refuse(&StageError::NotReady);
            }
        }
        self.scheduler.gone(device);
        self.sequences.gone(device);
        self.show_rate();
    }

    fn show_rate(&self) {
        if let Some(rate) = self.scheduler.rate() {
            self.shared.drain.set(rate);
            self.shared.metrics.drain_rate(rate);
        }
    }

    /// Earliest deadline of all work, in the queue or at an engine.
    fn next_deadline(&self) -> Option<Instant> {
        let waiting = earlier(
            self.scheduler.next_deadline(),
            self.sequences.next_deadline(),
        );
        earlier(waiting, self.engines.next_deadline())
    }

    /// Answers the callers whose deadline has passed.
    fn expire(&mut self, now: Instant) {
        let expired = self.scheduler.queue.expired(now);
        if !expired.is_empty() {
            for place in expired {
                self.sweep_place(&place, now);
            }
            self.show();
        }
        self.sequences
            .expire(now, |error| self.shared.metrics.dead(error));
        if self.engines.next_deadline().is_some_and(|at| at <= now) {
            self.sweep_running(now);
        }
    }

    /// Removes the work of callers that have disconnected, in the queue and at
    /// the engines.
    fn sweep(&mut self, now: Instant) {
        for place in self.scheduler.queue.places() {
            self.sweep_place(&place, now);
        }
        self.sequences
            .sweep(now, |error| self.shared.metrics.dead(error));
        self.show();
        self.sweep_running(now);
    }

    fn sweep_place(&mut self, place: &QueuePosition, now: Instant) {
        let Some(entry) = self.scheduler.queue.get(place) else {
            return;
        };
        let metrics = &self.shared.metrics;
        let waiters = &entry.item.waiters;
        let left = waiters.sweep(now, RequestStage::Queue, |error| metrics.dead(error));
        if left.n_tickets == 0 {
            if let Some(entry) = self.scheduler.queue.remove(place) {
                self.known.remove(&entry.item.key);
            }
        } else if entry.deadline != left.deadline {
            // The most urgent caller has left; the work takes the deadline of
            // the others, but keeps its class.
            let (key, caller) = (entry.item.key.clone(), entry.caller);
            let moved = self
                .scheduler
                .promote(place, place.class, caller, left.deadline);
            if let (Some(known), Some(moved)) = (self.known.get_mut(&key), moved) {
                known.at = At::Queue(moved);
            }
        }
    }

    fn sweep_running(&mut self, now: Instant) {
        let metrics = &self.shared.metrics;
        for (running, stop) in self.engines.all_running() {
            let (mut n_tickets, mut deadline) = (0, None);
            for (_, waiters) in &running.units {
                let left = waiters.sweep(now, RequestStage::Engine, |error| metrics.dead(error));
                n_tickets += left.n_tickets;
                deadline = earlier(deadline, left.deadline);
            }
            running.deadline = deadline;
            if n_tickets == 0 && !running.stopping {
                running.stopping = true;
                stop.request(running.id);
                // Identical work that arrives from now on needs a run that is
                // not stopped.
                forget(&mut self.known, running);
            }
        }
    }

    fn show(&self) {
        for class in Priority::ALL {
            let depth = self.scheduler.queue.len_of(class) + self.sequences.len_of(class);
            self.shared.metrics.queue_depth(class, depth);
        }
    }

    /// Answers all callers whose work waits, with `NotReady`: the last engine
    /// has ended before its time.
    fn refuse_all(&mut self) {
        for place in self.scheduler.queue.places() {
            if let Some(entry) = self.scheduler.queue.remove(&place) {
                entry.item.waiters.refuse(&StageError::NotReady);
            }
        }
        self.sequences.refuse(&StageError::NotReady);
        self.show();
    }
}

/// Answers everything that still arrives with `NotReady`, until preprocessing
/// ends.
fn refuse_arrivals(channels: &Channels) {
    loop {
        match channels.jobs.recv_timeout(Duration::from_secs(1)) {
            Ok(PreparedWork::Row(job)) => job.ticket.finish(Err(StageError::NotReady)),
            Ok(PreparedWork::Sequence(sequence)) => sequence.finish(Err(StageError::NotReady)),
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}

/// Removes a run from the work that others can join. Work with the same key
/// stays if it is not of this run: it belongs to jobs that came after the
/// answer, or after all callers of the run had left.
fn forget(known: &mut HashMap<AnswerKey, Known>, running: &RunningBatch) {
    for (key, waiters) in &running.units {
        if let Some(found) = known.get(key)
            && Arc::ptr_eq(&found.waiters, waiters)
        {
            known.remove(key);
        }
    }
}

#[cfg(test)]
mod tests;
