//! Tries every order in which threads may meet in the worker's four meeting
//! places, with loom's locks in place of the standard library's.
//!
//! The files under test are the worker's own, included as they are; what they
//! touch besides is replaced by the little below. `make loom` runs it.

#![allow(
    dead_code,
    reason = "the stand-ins have what the files name, used here or not"
)]

/// What `src/sync.rs` is in the worker.
mod sync {
    pub(crate) use std::sync::PoisonError;

    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
}

mod error {
    #[derive(Debug, Clone)]
    pub enum Error {
        Gone,
        NotReady,
    }

    #[derive(Debug, Clone, Copy)]
    pub enum Stage {
        Preprocess,
        Queue,
    }
}

mod job {
    use std::time::Instant;

    use loom::sync::Arc;
    use loom::sync::atomic::{AtomicUsize, Ordering};

    use crate::error::{Error, Stage};

    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    pub enum Class {
        Interactive,
        Bulk,
    }

    impl Class {
        pub const ALL: [Self; 2] = [Self::Interactive, Self::Bulk];
    }

    /// Counts how often it was answered.
    #[derive(Debug)]
    pub struct Ticket {
        pub class: Class,
        pub deadline: Option<Instant>,
        pub gone: bool,
        pub answers: Arc<AtomicUsize>,
    }

    impl Ticket {
        pub fn new(answers: &Arc<AtomicUsize>) -> Self {
            Self {
                class: Class::Bulk,
                deadline: None,
                gone: false,
                answers: Arc::clone(answers),
            }
        }

        pub fn dead(&self, _now: Instant, _stage: Stage) -> Option<Error> {
            self.gone.then_some(Error::Gone)
        }

        pub fn finish(self, _outcome: Result<(), Error>) {
            self.answers.fetch_add(1, Ordering::Relaxed);
        }
    }

    #[derive(Debug)]
    pub struct Job<P> {
        pub payload: P,
        pub ticket: Ticket,
    }
}

mod metrics {
    #[derive(Debug, Clone)]
    pub struct Metrics;

    impl Metrics {
        pub fn dead(&self, _error: &crate::error::Error) {}
    }
}

mod pool {
    #[derive(Debug)]
    pub struct Picture;
}

mod batcher {
    pub(crate) use crate::alarm;
}

// The files under test.
#[path = "../../../src/batcher/alarm.rs"]
mod alarm;
#[path = "../../../src/job/crowd.rs"]
mod crowd;
#[path = "../../../src/preprocess/queue.rs"]
mod queue;
#[path = "../../../src/engine/stop.rs"]
mod stop;

use std::time::Instant;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use alarm::{Alarm, Heed};
use crowd::Crowd;
use error::Stage;
use job::{Class, Job, Ticket};
use metrics::Metrics;
use pool::Picture;
use stop::Stop;

/// The batcher lets callers join and leave while the engine answers: each is
/// answered exactly once.
fn callers_join_and_leave() {
    let answers: [Arc<AtomicUsize>; 3] = std::array::from_fn(|_| Arc::new(AtomicUsize::new(0)));
    let mut leaving = Ticket::new(&answers[1]);
    leaving.gone = true;
    let crowd = Arc::new(Crowd::new(Ticket::new(&answers[0])));
    let engine = {
        let crowd = Arc::clone(&crowd);
        thread::spawn(move || {
            for ticket in crowd.close() {
                ticket.finish(Ok(()));
            }
        })
    };
    for ticket in [leaving, Ticket::new(&answers[2])] {
        if let Err(refused) = crowd.join(ticket) {
            // It runs on its own.
            refused.finish(Ok(()));
        }
        crowd.sweep(Instant::now(), Stage::Queue, |_| {});
    }
    engine.join().expect("no panic");
    for answered in answers {
        assert_eq!(answered.load(Ordering::Relaxed), 1);
    }
}

/// A request to stop a run never stops the next one, and is not lost.
fn a_run_is_stopped() {
    let stop = Arc::new(Stop::default());
    let (first, second) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    stop.begin(1);
    let batcher = {
        let stop = Arc::clone(&stop);
        thread::spawn(move || stop.request(1))
    };
    let hook = |count: &Arc<AtomicUsize>| {
        let count = Arc::clone(count);
        Box::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        })
    };
    stop.arm(hook(&first));
    let stopped = stop.end();
    stop.begin(2);
    stop.arm(hook(&second));
    assert!(!stop.end(), "the second run was not to be stopped");
    let requested = batcher.join().expect("no panic");
    assert_eq!(requested, stopped);
    assert_eq!(first.load(Ordering::Relaxed), usize::from(stopped));
    assert_eq!(second.load(Ordering::Relaxed), 0);
}

/// Pictures are pushed and swept while two threads take them: each comes out
/// once, and both threads see the end.
fn pictures_pass() {
    let answers: [Arc<AtomicUsize>; 2] = std::array::from_fn(|_| Arc::new(AtomicUsize::new(0)));
    let alarm = Arc::new(Alarm::default());
    let (door, queue) = queue::queue(Arc::clone(&alarm), Metrics);
    let threads: Vec<_> = (0..2)
        .map(|_| {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                while let Some(job) = queue.next() {
                    job.ticket.finish(Ok(()));
                }
            })
        })
        .collect();
    drop(queue);
    for (idx, answered) in answers.iter().enumerate() {
        let mut ticket = Ticket::new(answered);
        ticket.gone = idx == 1;
        ticket.class = Class::ALL[idx];
        door.push(Job {
            payload: Picture,
            ticket,
        });
    }
    door.sweep();
    drop(door);
    for thread in threads {
        thread.join().expect("no panic");
    }
    assert!(alarm.sleep(Heed::OnlyNews, None), "the batcher is told");
    for answered in answers {
        assert_eq!(answered.load(Ordering::Relaxed), 1);
    }
}

/// The batcher sleeps until there is work and an engine for it, each of which
/// comes from a thread of its own, and hears of callers who leave.
fn the_batcher_wakes() {
    let alarm = Arc::new(Alarm::default());
    let (jobs, free) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let caller = {
        let (alarm, jobs) = (Arc::clone(&alarm), Arc::clone(&jobs));
        thread::spawn(move || {
            jobs.fetch_add(1, Ordering::Relaxed);
            alarm.news();
            alarm.callers_left();
        })
    };
    let engine = {
        let (alarm, free) = (Arc::clone(&alarm), Arc::clone(&free));
        thread::spawn(move || {
            free.fetch_add(1, Ordering::Relaxed);
            alarm.engine_free();
        })
    };
    let mut callers_left = false;
    loop {
        // As the batcher looks: at the engines first.
        let is_free = free.load(Ordering::Relaxed) == 1;
        let waits = jobs.load(Ordering::Relaxed) == 1;
        if waits && is_free && callers_left {
            break;
        }
        // Where work waits for an engine, that is what must wake it.
        let heed = if waits && !is_free {
            Heed::Engines
        } else {
            Heed::OnlyNews
        };
        callers_left |= alarm.sleep(heed, None);
    }
    caller.join().expect("no panic");
    engine.join().expect("no panic");
}

fn main() {
    // The queue has three threads and so millions of orders; bugs that need
    // more than two preemptions are rare.
    let models: [(&str, fn(), Option<usize>); 4] = [
        ("callers join and leave", callers_join_and_leave, None),
        ("a run is stopped", a_run_is_stopped, None),
        ("pictures pass", pictures_pass, Some(2)),
        ("the batcher wakes", the_batcher_wakes, None),
    ];
    for (name, model, preemption_bound) in models {
        let n_orders = std::sync::Arc::new(std::sync::atomic::AtomicUsize::new(0));
        let count = std::sync::Arc::clone(&n_orders);
        let mut builder = loom::model::Builder::new();
        builder.preemption_bound = preemption_bound;
        builder.check(move || {
            count.fetch_add(1, Ordering::Relaxed);
            model();
        });
        println!(
            "{name}: right in all {} orders",
            n_orders.load(Ordering::Relaxed)
        );
    }
}
