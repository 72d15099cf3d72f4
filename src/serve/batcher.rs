//! Gathers jobs into batches, under one lock and with a thread of its own.
//!
//! Late binding: a batch is formed only when an engine has said that it is free,
//! from everything that waits at that moment; several engines take from the one
//! queue, whoever has been free longest first. The engine's thread forms it
//! itself where something waits; this thread does so when something comes to an
//! engine that is idle, keeps the time, and gives the answers of engines that
//! run on. Identical work stands in
//! the queue once, with everybody who waits for it. Whoever has gone or is late
//! leaves at once: the queue of pictures tells when a caller goes, and a timer runs to the
//! next deadline. A run that nobody waits for any more is stopped.

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
use crate::serve::handoff::{Batch, BatchUnit, EngineNotice, EngineSlot, EngineTurn};
use crate::serve::job::{Answer, CoalescedWaiters, Job, RequestedWork};
use crate::serve::metrics::Metrics;
use crate::serve::sequence::Sequence;
use crate::sync::{Mutex, MutexGuard, PoisonError};

type TokenJob = Job<Arc<[u16]>>;

/// What preprocessing hands on.
#[derive(Debug)]
pub(crate) enum PreparedWork {
    /// One row of a run.
    Row(TokenJob),
    /// An image to generate.
    Sequence(Sequence),
}

/// Jobs that are taken in at one time: an engine may wait for the lock meanwhile,
/// about a tenth of a millisecond.
const PUSHED_AT_ONCE: usize = 64;

/// Deadlines within this of each other are dealt with at one time, and so are
/// callers that go: finding them takes as long as many wait.
const TIMER_GRAIN: Duration = Duration::from_millis(1);

/// Times as long as a sweep takes nobody sweeps after it.
const SWEEP_PAUSE: u32 = 9;

/// The batcher's ends of its channels.
pub(crate) struct Channels {
    /// From preprocessing.
    pub(crate) jobs: Receiver<PreparedWork>,
    /// From admission, when callers have gone.
    pub(crate) bell: Receiver<()>,
    /// From the engines.
    pub(crate) notices: Receiver<EngineNotice>,
}

/// What the batcher shares with others.
pub(crate) struct BatcherParts {
    pub(crate) cache: AnswerCache,
    pub(crate) drain: DrainRate,
    /// Percent of the sequences that bulk cannot have.
    pub(crate) interactive_reserve: u8,
    pub(crate) metrics: Metrics,
}

/// Where batches are formed, for the batcher's thread and the engines'. Cheap to
/// clone.
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
        // A thread that has panicked here ends the worker.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// An engine is free. When this returns it has its turn, if there is one for
    /// it already; if not, the batcher's thread is told.
    pub(crate) fn free(&self, slot: EngineSlot, notices: &Sender<EngineNotice>) {
        let device = slot.device;
        let mut state = self.lock();
        state.ended(slot);
        state.look();
        if state.engines.is_free(device) {
            // Where there is no room, the thread is still to look.
            let _ = notices.try_send(EngineNotice::Free);
        }
    }
}

/// Hangs up on the engines, however the batcher's thread ends. If it ends before
/// its time, whoever waits is told; who is still in its channels is lost with
/// them, and told that.
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

/// The life of the batcher thread: until preprocessing has ended and all that
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
                // Of runs that ended since this thread looked last.
                return channels
                    .notices
                    .try_iter()
                    .for_each(|notice| remembered.deliver(notice));
            }
            Outlook::At(wake) => earlier(wake, sweep_at),
        };
        let mut event = match wait(channels, draining, wake) {
            // Without the lock, for which an engine may wait.
            Event::Notice(notice @ EngineNotice::Ran(_)) => {
                remembered.deliver(notice);
                Event::Tick
            }
            event => event,
        };
        // Everything that has arrived by now belongs in the decision.
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
                // The bell is not listened to from here on, and may have rung.
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
            // A long one is not soon followed by another, or engines wait.
            let took = now.elapsed();
            next_sweep = Some(now + took + (took * SWEEP_PAUSE).max(TIMER_GRAIN));
            sweep_at = None;
        }
        outlook = state.look();
    }
}

/// Answers that need no run. They are given without the lock, since copying them
/// takes a while.
struct Remembered {
    cache: AnswerCache,
    metrics: Metrics,
}

impl Remembered {
    /// Gives the answers of a run, if that is what an engine tells of.
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

    /// Answers what arrives, or gives it back.
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

/// What is to come once all engines that are free have what there is for them.
enum Outlook {
    /// The worker ends, and nothing waits or runs.
    Done,
    /// Nothing is to be done before this, if there is such a time.
    At(Option<Instant>),
}

/// What came of looking for work for the engines that are free.
enum Fed {
    /// One of them has its turn, or what waits has changed: look again.
    Given,
    /// A batch may still fill up until then.
    WaitUntil(Instant),
    /// Nothing waits, or no engine is free.
    Nothing,
}

/// All that can happen to the batcher.
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

/// Waits for the next event. Jobs are listened to until they have ended.
fn wait(channels: &Channels, draining: bool, wake: Option<Instant>) -> Event {
    let never_jobs = crossbeam_channel::never();
    let never_bell = crossbeam_channel::never();
    let tick = wake.map_or_else(crossbeam_channel::never, crossbeam_channel::at);
    let (jobs, bell) = if draining {
        // The door, and the bell with it, has gone.
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

/// The earlier of two times that may not be.
fn earlier(one: Option<Instant>, other: Option<Instant>) -> Option<Instant> {
    one.into_iter().chain(other).min()
}

/// Work that waits.
#[derive(Debug)]
struct Waiting {
    key: AnswerKey,
    waiters: Arc<CoalescedWaiters>,
}

/// Where work is that others may join.
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
    /// By what it is, so that identical work is found.
    known: HashMap<AnswerKey, Known>,
    engines: Engines,
    /// Whether the worker shuts down and waits for nobody.
    draining: bool,
    batch_id: u64,
    shared: BatcherParts,
}

impl State {
    /// Gives every engine that is free what there is for it.
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

    /// Gives the engine that has been free longest and has something to do its
    /// turn.
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

    /// The sequences that join the engine's next step.
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
            // Preprocessing answers Tokenize itself.
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
        let (class, deadline) = (ticket.class, ticket.deadline);
        if let Some(known) = self.known.get_mut(&key) {
            match known.waiters.join(ticket) {
                Ok(()) => {
                    metrics.coalesced();
                    self.urge(&key, class, deadline);
                    return;
                }
                // Answered this moment: it runs once more.
                Err(refused) => ticket = refused,
            }
        }
        let graph = Graph::of(want);
        let needed =
            deadline.and_then(|deadline| self.scheduler.too_late(class, graph, deadline, now));
        if let Some(needed) = needed {
            let error = StageError::DeadlineTooShort { needed };
            metrics.dead(&error);
            return ticket.finish(Err(error));
        }
        let entry = QueuedWork {
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

    /// Somebody more urgent has joined: the work moves up to where they would
    /// stand.
    fn urge(&mut self, key: &AnswerKey, class: Priority, deadline: Option<Instant>) {
        let Some(known) = self.known.get_mut(key) else {
            return;
        };
        let place = match known.at {
            At::Queue(place) => place,
            At::Engine(device) => {
                // It runs already; whoever joined must be told in time all the same.
                if let Some(running) = self.engines.running(device) {
                    running.deadline = earlier(running.deadline, deadline);
                }
                return;
            }
        };
        let Some(entry) = self.scheduler.queue.get(&place) else {
            return;
        };
        let class = class.min(place.class);
        let deadline = earlier(entry.deadline, deadline);
        if (class != place.class || deadline != entry.deadline)
            && let Some(moved) = self.scheduler.promote(&place, class, deadline)
        {
            known.at = At::Queue(moved);
        }
    }

    /// Makes the batch that was picked, without those who are late or gone.
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
            // Only those whose deadline it is; it may be in time for the rest.
            let limit = entry.deadline.unwrap_or(now);
            let error = if limit > now {
                // It is not over yet, but the run would end after it.
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
                // Nobody can join it without the lock.
                self.known.remove(&key);
                continue;
            }
            // A row may be of the other class, where it would have been padding.
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

    /// An engine is free: it is done with what it ran.
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
        for ran in slot.runs {
            pace.ran(ran.graph, ran.bucket, ran.images, ran.elapsed, now);
        }
        self.show_rate();
        if slot.largest < self.scheduler.largest(device) {
            self.scheduler.limit(device, slot.largest);
        }
    }

    /// An engine takes no more turns. What waits is for the others.
    fn gone(&mut self, device: DeviceIdx) {
        if let Some(running) = self.engines.remove(device) {
            forget(&mut self.known, &running);
            // Those whom it had not begun to serve; all others it has told.
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

    /// The next deadline, in the queue or at an engine.
    fn next_deadline(&self) -> Option<Instant> {
        let waiting = earlier(
            self.scheduler.next_deadline(),
            self.sequences.next_deadline(),
        );
        earlier(waiting, self.engines.next_deadline())
    }

    /// Answers those whose time is up.
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

    /// Callers have gone: gives their places free, wherever they stand.
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
            // Whoever was the most urgent has gone; the rest is not so urgent,
            // but keeps its class.
            let key = entry.item.key.clone();
            let moved = self.scheduler.promote(place, place.class, left.deadline);
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
                // Whoever comes now wants a run that is not stopped.
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

    /// The last engine has ended before its time: whoever waits is told.
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

/// And so is whoever still comes.
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

/// Nobody can join this run any more. The same work may be known elsewhere: for
/// those who came after the answer, or after all others had gone.
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
