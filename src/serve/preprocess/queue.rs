//! Queue of pictures that wait for a preprocessing thread.
//!
//! The queue is a lock and not a channel for three reasons: pictures whose
//! callers gave up leave from the middle, interactive pictures overtake bulk
//! ones, and cheap pictures overtake costly ones within a bound of age.
//! Otherwise a few pictures that take a second each would hold up all others
//! (head-of-line blocking). Within a class, callers whose pictures wait get the
//! same decoding time (`fair.rs`), by the estimates from the headers. The queue needs no bound of its own: each
//! job holds its permit, so there are at most as many jobs as permits.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use crossbeam_channel::Sender;

use crate::imaging::ImageRequest;
use crate::imaging::cost::DecodeCost;
use crate::proto::Priority;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::fair::{FairOrder, FairTurn};
use crate::serve::job::Job;
use crate::serve::metrics::Metrics;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// Number of pictures of which one is bulk while both classes wait, so that
/// interactive pictures alone cannot fill the queue before the engine, and bulk
/// work gets its share of that queue.
const BULK_TURN: u32 = 5;

/// Multiple of a picture's own cost for which later arrivals may pass it. At 8,
/// a picture that takes a second waits for at most 8 seconds of later arrivals,
/// and a picture that takes a millisecond for those of the next 8 milliseconds.
const PATIENCE: u32 = 8;
/// Longest time in which later arrivals may pass a picture, whatever its header
/// claims.
const PATIENCE_MAX: Duration = Duration::from_secs(30);

/// Least time that a picture is charged in its caller's account, so that
/// pictures whose headers claim nothing take turns too: about the time that a
/// thread takes to fetch one.
const CHARGE_MIN: Duration = Duration::from_micros(10);

/// Admission's end of the queue, which is closed when this value is dropped.
#[derive(Debug)]
pub(crate) struct QueueEntrance(Arc<PreprocessQueue>);

/// End of the queue that the preprocessing threads hold.
#[derive(Debug)]
pub(crate) struct PreprocessQueue {
    state: Mutex<State>,
    /// Signal for threads that take any picture.
    arrived: Condvar,
    /// Signal for threads that take cheap pictures only: a shared signal could
    /// wake one of them for a picture that it must leave.
    cheap_arrived: Condvar,
    /// Bell that is rung when callers have disconnected, so that the batcher
    /// looks at its own queue.
    bell: Sender<()>,
    metrics: Metrics,
}

/// Pictures that a thread takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ThreadReach {
    Any,
    /// Only pictures that are decoded in a moment, so that these pass while
    /// large pictures occupy all other threads.
    Cheap,
}

/// Pictures that are told apart by the threads that may take them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum CostKind {
    Cheap,
    Costly,
}

impl CostKind {
    fn of(cost: DecodeCost) -> Self {
        if cost.is_cheap() {
            Self::Cheap
        } else {
            Self::Costly
        }
    }
}

/// Turn of a picture, by which it is taken.
type Turn = (CostKind, FairTurn<Rank>);

/// Sort key of pictures within a class and a caller: time of arrival plus a delay for the
/// picture's cost.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Rank {
    at: Instant,
    /// Number that tells apart pictures with the same time.
    nth: u64,
}

#[derive(Debug, Default)]
struct State {
    interactive: Waiting,
    bulk: Waiting,
    turn: u32,
    n_arrived: u64,
    closed: bool,
}

/// Waiting pictures of one class.
#[derive(Debug, Default)]
struct Waiting {
    pictures: BTreeMap<Rank, Picture>,
    order: FairOrder<CostKind, Rank>,
}

#[derive(Debug)]
struct Picture {
    job: Job<ImageRequest>,
    cost: DecodeCost,
}

impl Waiting {
    fn push(&mut self, rank: Rank, picture: Picture) {
        let kind = CostKind::of(picture.cost);
        self.order.insert(kind, picture.job.ticket.caller, rank);
        self.pictures.insert(rank, picture);
    }

    fn first(&self, reach: ThreadReach) -> Option<Turn> {
        let first = |kind| Some((kind, self.order.first(kind)?));
        let costly = match reach {
            ThreadReach::Any => first(CostKind::Costly),
            ThreadReach::Cheap => None,
        };
        let firsts = first(CostKind::Cheap).into_iter().chain(costly);
        firsts.min_by_key(|(_, turn)| *turn)
    }

    fn take(&mut self, (kind, turn): &Turn) -> Option<Job<ImageRequest>> {
        let Picture { job, cost } = self.pictures.remove(&turn.rank)?;
        // The bound holds whatever a header claims.
        let charged = cost.0.clamp(CHARGE_MIN, PATIENCE_MAX).as_nanos();
        let charged = u64::try_from(charged).unwrap_or(u64::MAX);
        self.order.serve(*kind, turn, charged);
        Some(job)
    }

    /// Takes out the jobs that are dead, with the reason.
    fn sweep(&mut self, now: Instant, dead: &mut Vec<(Job<ImageRequest>, StageError)>) {
        let is_dead = |_: &Rank, picture: &mut Picture| {
            let ticket = &picture.job.ticket;
            ticket.dead(now, RequestStage::Preprocess).is_some()
        };
        for (rank, Picture { job, cost }) in self.pictures.extract_if(.., is_dead) {
            self.order
                .remove(CostKind::of(cost), job.ticket.caller, rank);
            // A job that was dead a moment ago is dead now.
            if let Some(error) = job.ticket.dead(now, RequestStage::Preprocess) {
                dead.push((job, error));
            }
        }
    }

    fn drain(self) -> impl Iterator<Item = Job<ImageRequest>> {
        self.pictures.into_values().map(|picture| picture.job)
    }
}

impl State {
    fn lane(&mut self, class: Priority) -> &mut Waiting {
        match class {
            Priority::Interactive => &mut self.interactive,
            Priority::Bulk => &mut self.bulk,
        }
    }

    fn push(&mut self, job: Job<ImageRequest>, cost: DecodeCost, now: Instant) {
        self.n_arrived += 1;
        let patience = cost.0.saturating_mul(PATIENCE).min(PATIENCE_MAX);
        let rank = Rank {
            at: now + patience,
            nth: self.n_arrived,
        };
        let lane = self.lane(job.ticket.class);
        lane.push(rank, Picture { job, cost });
    }

    fn next(&mut self, reach: ThreadReach) -> Option<Job<ImageRequest>> {
        let bulk = self.bulk.first(reach);
        let interactive = self.interactive.first(reach);
        let (class, turn) = match (interactive, bulk) {
            (Some(_), Some(bulk)) if self.turn + 1 >= BULK_TURN => (Priority::Bulk, bulk),
            (Some(interactive), _) => (Priority::Interactive, interactive),
            (None, bulk) => (Priority::Bulk, bulk?),
        };
        let job = self.lane(class).take(&turn)?;
        self.turn = match class {
            Priority::Bulk => 0,
            // Interactive pictures are counted only while bulk waits.
            Priority::Interactive if bulk.is_none() => 0,
            Priority::Interactive => self.turn + 1,
        };
        Some(job)
    }
}

/// Creates a queue and its entrance. `bell` needs room for one ring, since two
/// mean the same.
#[must_use]
pub(crate) fn queue(bell: Sender<()>, metrics: Metrics) -> (QueueEntrance, Arc<PreprocessQueue>) {
    let queue = Arc::new(PreprocessQueue {
        state: Mutex::default(),
        arrived: Condvar::new(),
        cheap_arrived: Condvar::new(),
        bell,
        metrics,
    });
    (QueueEntrance(Arc::clone(&queue)), queue)
}

impl PreprocessQueue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits for the next picture within reach; `None` once the entrance is
    /// closed and all pictures within reach have been taken.
    pub(crate) fn next(&self, reach: ThreadReach) -> Option<Job<ImageRequest>> {
        let arrived = match reach {
            ThreadReach::Any => &self.arrived,
            ThreadReach::Cheap => &self.cheap_arrived,
        };
        let mut state = self.lock();
        loop {
            if let Some(job) = state.next(reach) {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = arrived.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl QueueEntrance {
    /// Adds a picture to its class, with a place that follows from its arrival
    /// and its cost.
    pub(crate) fn push(&self, job: Job<ImageRequest>) {
        // Headers are read without the lock.
        let cost = job.payload.cost();
        self.0.lock().push(job, cost, Instant::now());
        self.0.arrived.notify_one();
        if cost.is_cheap() {
            self.0.cheap_arrived.notify_one();
        }
    }

    /// Answers callers that have disconnected or are past their deadline, here
    /// and in the batcher, so that their places are free at once.
    pub(crate) fn sweep(&self) {
        let now = Instant::now();
        let mut dead = Vec::new();
        {
            let mut state = self.0.lock();
            for class in Priority::ALL {
                state.lane(class).sweep(now, &mut dead);
            }
        }
        // Callers are woken after the lock has been released.
        for (job, error) in dead {
            self.0.metrics.dead(&error);
            job.ticket.finish(Err(error));
        }
        // A full channel means that the batcher has yet to hear an earlier
        // ring.
        let _ = self.0.bell.try_send(());
    }
}

impl Drop for QueueEntrance {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.arrived.notify_all();
        self.0.cheap_arrived.notify_all();
    }
}

/// Answers jobs that are still in the queue when its last end is dropped, since
/// nothing else would.
impl Drop for PreprocessQueue {
    fn drop(&mut self) {
        let state = std::mem::take(&mut *self.lock());
        for job in state.interactive.drain().chain(state.bulk.drain()) {
            job.ticket.finish(Err(StageError::NotReady));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::imaging::{ImageInput, PreprocessOptions};
    use crate::serve::fair::CallerId;
    use crate::serve::job::{Answer, Permit, Reply, RequestedWork, Ticket};

    type Outcome = tokio::sync::oneshot::Receiver<Result<Answer, StageError>>;

    fn job(class: Priority, id: u32) -> (Job<ImageRequest>, Outcome) {
        let (reply, outcome) = Reply::new();
        let job = Job {
            payload: ImageRequest {
                input: ImageInput::Tokens(vec![id]),
                options: PreprocessOptions::default(),
            },
            work: RequestedWork::Tokenize,
            ticket: Ticket {
                caller: CallerId::UNNAMED,
                class,
                deadline: None,
                entered_at: Instant::now(),
                span: tracing::Span::none(),
                timeline: crate::serve::timeline::ImageTimeline::none(),
                reply,
                permit: Permit::none(),
            },
        };
        (job, outcome)
    }

    fn id(job: &Job<ImageRequest>) -> u32 {
        match &job.payload.input {
            ImageInput::Tokens(ids) => ids[0],
            other => panic!("{other:?}"),
        }
    }

    fn new() -> (
        QueueEntrance,
        Arc<PreprocessQueue>,
        crossbeam_channel::Receiver<()>,
    ) {
        let (bell, rings) = crossbeam_channel::bounded(1);
        let (door, queue) = queue(bell, Metrics::new().expect("metrics"));
        (door, queue, rings)
    }

    #[test]
    fn interactive_pictures_overtake_and_bulk_has_its_turn() {
        let (door, queue, _rings) = new();
        let mut outcomes = Vec::new();
        for id in 0..3 {
            let (job, outcome) = job(Priority::Bulk, id);
            door.push(job);
            outcomes.push(outcome);
        }
        for id in 10..18 {
            let (job, outcome) = job(Priority::Interactive, id);
            door.push(job);
            outcomes.push(outcome);
        }
        drop(door);
        let order: Vec<u32> = std::iter::from_fn(|| queue.next(ThreadReach::Any))
            .map(|job| id(&job))
            .collect();
        assert_eq!(order, [10, 11, 12, 13, 0, 14, 15, 16, 17, 1, 2]);
    }

    #[test]
    fn those_who_have_gone_leave_at_once() {
        let (door, queue, rings) = new();
        let (stays, _outcome) = job(Priority::Bulk, 1);
        let (leaves, gone) = job(Priority::Bulk, 2);
        door.push(leaves);
        door.push(stays);
        drop(gone);
        door.sweep();
        door.sweep();
        assert_eq!(rings.try_iter().count(), 1, "two rings mean the same");
        assert_eq!(queue.next(ThreadReach::Any).map(|job| id(&job)), Some(1));
        drop(door);
        assert!(queue.next(ThreadReach::Any).is_none());
    }

    /// Pushes pictures of one class, each with its arrival and its cost in
    /// milliseconds, and takes them all out again.
    fn order(pictures: &[(u64, u64)], reach: ThreadReach) -> Vec<u32> {
        let start = Instant::now();
        let mut state = State::default();
        let mut outcomes = Vec::new();
        for (id, &(arrival, cost)) in (0..).zip(pictures) {
            let (job, outcome) = job(Priority::Interactive, id);
            let cost = DecodeCost(Duration::from_millis(cost));
            state.push(job, cost, start + Duration::from_millis(arrival));
            outcomes.push(outcome);
        }
        std::iter::from_fn(|| state.next(reach))
            .map(|job| id(&job))
            .collect()
    }

    #[test]
    fn cheap_pictures_pass_costly_ones_within_a_bound_of_age() {
        // Equal costs keep the order of arrival, also at one instant.
        assert_eq!(
            order(&[(0, 5), (0, 5), (1, 5)], ThreadReach::Any),
            [0, 1, 2]
        );
        // A picture of a second lets arrivals of the next eight seconds pass.
        let hog = (0, 1000);
        assert_eq!(
            order(&[hog, (1, 1), (7_900, 1), (8_100, 1)], ThreadReach::Any),
            [1, 2, 0, 3]
        );
        // A picture with the largest claim waits no longer than the bound.
        let claim = (0, u64::MAX / 2_000_000);
        assert_eq!(
            order(&[claim, (29_000, 1), (31_000, 1)], ThreadReach::Any),
            [1, 0, 2]
        );
    }

    #[test]
    fn callers_get_the_same_decoding_time() {
        let start = Instant::now();
        let mut state = State::default();
        let mut outcomes = Vec::new();
        // One caller has a thousand pictures, each ten times as costly as those
        // of another caller, which come later.
        for (caller, n, cost, arrival) in [(1, 1000, 50, 0), (2, 100, 5, 1)] {
            for _ in 0..n {
                let (mut job, outcome) = job(Priority::Interactive, caller);
                job.ticket.caller = CallerId(caller);
                let cost = DecodeCost(Duration::from_millis(cost));
                state.push(job, cost, start + Duration::from_millis(arrival));
                outcomes.push(outcome);
            }
        }
        let mut next = |n| {
            let taken = std::iter::from_fn(|| state.next(ThreadReach::Any)).take(n);
            let taken: Vec<u32> = taken.map(|job| id(&job)).collect();
            taken.iter().filter(|&&caller| caller == 1).count()
        };
        assert_eq!(next(110), 10, "the same time for both");
        assert_eq!(next(20), 20, "all for the caller that is left");
    }

    #[test]
    fn a_thread_for_cheap_pictures_leaves_the_others() {
        let pictures = [(0, 1000), (1, 101), (2, 100), (3, 1)];
        assert_eq!(order(&pictures, ThreadReach::Cheap), [3, 2]);
        assert_eq!(order(&pictures, ThreadReach::Any), [3, 2, 1, 0]);
    }

    #[test]
    fn large_pictures_that_hold_all_threads_do_not_hold_small_ones() {
        let (door, queue, _rings) = new();
        let mut outcomes = Vec::new();
        let mut push = |input: ImageInput| {
            let (mut job, outcome) = job(Priority::Interactive, 0);
            job.payload.input = input;
            door.push(job);
            outcomes.push(outcome);
        };
        let rgb8 = |side| ImageInput::Rgb8 {
            width: side,
            height: side,
            pixels: bytes::Bytes::new(),
        };
        // The thread waits before any picture has come, and is woken for the
        // one that it takes.
        let cheap = std::thread::scope(|scope| {
            let waiter = scope.spawn(|| queue.next(ThreadReach::Cheap));
            push(rgb8(8000));
            push(rgb8(8000));
            push(rgb8(100));
            waiter.join().expect("no panic")
        });
        let side = |job: Option<Job<ImageRequest>>| match job?.payload.input {
            ImageInput::Rgb8 { width, .. } => Some(width),
            other => panic!("{other:?}"),
        };
        assert_eq!(side(cheap), Some(100));
        assert_eq!(side(queue.next(ThreadReach::Any)), Some(8000));
        drop(door);
        assert!(queue.next(ThreadReach::Cheap).is_none());
        assert_eq!(side(queue.next(ThreadReach::Any)), Some(8000));
        assert!(queue.next(ThreadReach::Any).is_none());
    }

    #[test]
    fn whoever_is_left_is_told() {
        let (door, queue, _rings) = new();
        let (job, mut outcome) = job(Priority::Bulk, 1);
        door.push(job);
        drop(queue);
        drop(door);
        assert!(matches!(outcome.try_recv(), Ok(Err(StageError::NotReady))));
    }
}
