//! Where pictures wait for a preprocessing thread.
//!
//! A lock and not a channel, because those who gave up leave from the middle,
//! and because interactive pictures overtake bulk ones. It needs no bound of
//! its own: a job holds its permit, so there are at most as many as permits.

use std::collections::VecDeque;
use std::time::Instant;

use super::pool::Picture;
use crate::batcher::alarm::Alarm;
use crate::error::{Error, Stage};
use crate::job::{Class, Job};
use crate::metrics::Metrics;
use crate::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};

/// While both classes wait, every so many pictures a bulk one goes first, so
/// that interactive ones alone cannot fill the queue before the engine and bulk
/// gets its share of that.
const BULK_TURN: u32 = 5;

/// The end that admission holds: the queue is closed when it is dropped.
#[derive(Debug)]
pub struct Door(Arc<Queue>);

/// The end that preprocessing threads hold.
#[derive(Debug)]
pub struct Queue {
    state: Mutex<State>,
    arrived: Condvar,
    /// Rung when callers have gone, for the batcher to look at its own queue.
    alarm: Arc<Alarm>,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct State {
    interactive: VecDeque<Job<Picture>>,
    bulk: VecDeque<Job<Picture>>,
    turn: u32,
    closed: bool,
}

impl State {
    fn lane(&mut self, class: Class) -> &mut VecDeque<Job<Picture>> {
        match class {
            Class::Interactive => &mut self.interactive,
            Class::Bulk => &mut self.bulk,
        }
    }

    fn next(&mut self) -> Option<Job<Picture>> {
        let bulk_first = !self.bulk.is_empty() && self.turn + 1 >= BULK_TURN;
        let first = if bulk_first || self.interactive.is_empty() {
            Class::Bulk
        } else {
            Class::Interactive
        };
        let job = self.lane(first).pop_front()?;
        self.turn = match first {
            Class::Bulk => 0,
            // Counted only while bulk waits.
            Class::Interactive if self.bulk.is_empty() => 0,
            Class::Interactive => self.turn + 1,
        };
        Some(job)
    }
}

/// A queue and its door.
#[must_use]
pub fn queue(alarm: Arc<Alarm>, metrics: Metrics) -> (Door, Arc<Queue>) {
    let queue = Arc::new(Queue {
        state: Mutex::default(),
        arrived: Condvar::new(),
        alarm,
        metrics,
    });
    (Door(Arc::clone(&queue)), queue)
}

impl Queue {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next picture, once there is one; `None` once the door is closed
    /// and all have gone through.
    pub fn next(&self) -> Option<Job<Picture>> {
        let mut state = self.lock();
        loop {
            if let Some(job) = state.next() {
                return Some(job);
            }
            if state.closed {
                return None;
            }
            state = self
                .arrived
                .wait(state)
                .unwrap_or_else(PoisonError::into_inner);
        }
    }
}

impl Door {
    /// Puts a picture at the end of its class.
    pub fn push(&self, job: Job<Picture>) {
        self.0.lock().lane(job.ticket.class).push_back(job);
        self.0.arrived.notify_one();
    }

    /// Answers those who have gone or are late, here and in the batcher, so
    /// that their places are free at once.
    pub fn sweep(&self) {
        let now = Instant::now();
        let mut dead = Vec::new();
        {
            let mut state = self.0.lock();
            for class in Class::ALL {
                let lane = state.lane(class);
                let alive = |job: &Job<Picture>| job.ticket.dead(now, Stage::Preprocess).is_none();
                if lane.iter().all(alive) {
                    continue;
                }
                for job in std::mem::take(lane) {
                    match job.ticket.dead(now, Stage::Preprocess) {
                        Some(error) => dead.push((job, error)),
                        None => lane.push_back(job),
                    }
                }
            }
        }
        // Callers are woken without the lock.
        for (job, error) in dead {
            self.0.metrics.dead(&error);
            job.ticket.finish(Err(error));
        }
        self.0.alarm.callers_left();
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        self.0.lock().closed = true;
        self.0.arrived.notify_all();
    }
}

/// Whoever still waits when the last end goes is told, since nobody else would.
impl Drop for Queue {
    fn drop(&mut self) {
        let state = std::mem::take(&mut *self.lock());
        for job in state.interactive.into_iter().chain(state.bulk) {
            job.ticket.finish(Err(Error::NotReady));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::batcher::alarm::Heed;
    use crate::job::{Answer, Permit, Reply, Ticket, Work};
    use crate::preprocess::{ImageInput, PreprocessOptions};

    type Outcome = tokio::sync::oneshot::Receiver<Result<Answer, Error>>;

    fn job(class: Class, id: u32) -> (Job<Picture>, Outcome) {
        let (reply, outcome) = Reply::new();
        let job = Job {
            payload: Picture {
                input: ImageInput::Tokens(vec![id]),
                options: PreprocessOptions::default(),
            },
            work: Work::Tokenize,
            ticket: Ticket {
                class,
                deadline: None,
                entered_at: Instant::now(),
                span: tracing::Span::none(),
                reply,
                permit: Permit::none(),
            },
        };
        (job, outcome)
    }

    fn id(job: &Job<Picture>) -> u32 {
        match &job.payload.input {
            ImageInput::Tokens(ids) => ids[0],
            other => panic!("{other:?}"),
        }
    }

    fn new() -> (Door, Arc<Queue>, Arc<Alarm>) {
        let alarm = Arc::new(Alarm::default());
        let metrics = Metrics::new().expect("metrics");
        let (door, queue) = queue(Arc::clone(&alarm), metrics);
        (door, queue, alarm)
    }

    #[test]
    fn interactive_pictures_overtake_and_bulk_has_its_turn() {
        let (door, queue, _alarm) = new();
        let mut outcomes = Vec::new();
        for id in 0..3 {
            let (job, outcome) = job(Class::Bulk, id);
            door.push(job);
            outcomes.push(outcome);
        }
        for id in 10..18 {
            let (job, outcome) = job(Class::Interactive, id);
            door.push(job);
            outcomes.push(outcome);
        }
        drop(door);
        let order: Vec<u32> = std::iter::from_fn(|| queue.next())
            .map(|job| id(&job))
            .collect();
        assert_eq!(order, [10, 11, 12, 13, 0, 14, 15, 16, 17, 1, 2]);
    }

    #[test]
    fn those_who_have_gone_leave_at_once() {
        let (door, queue, alarm) = new();
        let (stays, _outcome) = job(Class::Bulk, 1);
        let (leaves, gone) = job(Class::Bulk, 2);
        door.push(leaves);
        door.push(stays);
        drop(gone);
        door.sweep();
        door.sweep();
        let rang = || alarm.sleep(Heed::OnlyNews, Some(Instant::now()));
        assert!(rang());
        assert!(!rang(), "two rings mean the same");
        assert_eq!(queue.next().map(|job| id(&job)), Some(1));
        drop(door);
        assert!(queue.next().is_none());
    }

    #[test]
    fn whoever_is_left_is_told() {
        let (door, queue, _alarm) = new();
        let (job, mut outcome) = job(Class::Bulk, 1);
        door.push(job);
        drop(queue);
        drop(door);
        assert!(matches!(outcome.try_recv(), Ok(Err(Error::NotReady))));
    }
}
