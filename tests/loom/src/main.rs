//! Tries every interleaving of threads in the worker's three synchronization
//! points, with loom's locks in place of the standard library's.
//!
//! The files under test are the worker's own, included unchanged; their other
//! dependencies are replaced by the small modules below. `make loom` runs this
//! test.

#![allow(
    dead_code,
    reason = "the stand-ins have what the files name, used here or not"
)]

/// Replacement of the worker's `src/sync.rs`.
mod sync {
    pub(crate) use std::sync::PoisonError;

    pub(crate) use loom::sync::{Arc, Condvar, Mutex, MutexGuard};
}

/// Replacement of the worker's imaging and stages, as far as the files use
/// them.
mod imaging {
    use std::time::Duration;

    use self::cost::DecodeCost;

    pub mod cost {
        use std::time::Duration;

        #[derive(Debug, Clone, Copy)]
        pub struct DecodeCost(pub Duration);

        impl DecodeCost {
            pub fn is_cheap(self) -> bool {
                self.0.is_zero()
            }
        }
    }

    /// Picture with a cost in seconds.
    #[derive(Debug)]
    pub struct ImageRequest(pub u64);

    impl ImageRequest {
        pub fn cost(&self) -> DecodeCost {
            DecodeCost(Duration::from_secs(self.0))
        }
    }
}

mod proto {
    #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    pub enum Priority {
        Interactive,
        Bulk,
    }

    impl Priority {
        pub const ALL: [Self; 2] = [Self::Interactive, Self::Bulk];
    }
}

mod serve {
    pub(crate) use crate::fair;

    pub mod error {
        #[derive(Debug, Clone)]
        pub enum StageError {
            Gone,
            NotReady,
        }

        #[derive(Debug, Clone, Copy)]
        pub enum RequestStage {
            Preprocess,
            Queue,
        }
    }

    pub mod job {
        use std::time::Instant;

        use loom::sync::Arc;
        use loom::sync::atomic::{AtomicUsize, Ordering};

        use crate::proto::Priority;
        use crate::serve::error::{StageError, RequestStage};
        use crate::serve::fair::CallerId;

        /// Caller that counts its answers.
        #[derive(Debug)]
        pub struct Ticket {
            pub caller: CallerId,
            pub class: Priority,
            pub deadline: Option<Instant>,
            pub gone: bool,
            pub answers: Arc<AtomicUsize>,
        }

        impl Ticket {
            pub fn new(answers: &Arc<AtomicUsize>) -> Self {
                Self {
                    caller: CallerId::UNNAMED,
                    class: Priority::Bulk,
                    deadline: None,
                    gone: false,
                    answers: Arc::clone(answers),
                }
            }

            pub fn dead(&self, _now: Instant, _stage: RequestStage) -> Option<StageError> {
                self.gone.then_some(StageError::Gone)
            }

            pub fn finish(self, _outcome: Result<(), StageError>) {
                self.answers.fetch_add(1, Ordering::Relaxed);
            }
        }

        #[derive(Debug)]
        pub struct Job<P> {
            pub payload: P,
            pub ticket: Ticket,
        }
    }

    pub mod metrics {
        #[derive(Debug, Clone)]
        pub struct Metrics;

        impl Metrics {
            pub fn dead(&self, _error: &crate::serve::error::StageError) {}
        }
    }
}

// The files under test.
#[path = "../../../src/serve/fair.rs"]
mod fair;
#[path = "../../../src/serve/preprocess/queue.rs"]
mod queue;
#[path = "../../../src/engine/stop.rs"]
mod stop;
#[path = "../../../src/serve/job/waiters.rs"]
mod waiters;

use std::time::Instant;

use loom::sync::Arc;
use loom::sync::atomic::{AtomicUsize, Ordering};
use loom::thread;

use imaging::ImageRequest;
use proto::Priority;
use queue::ThreadReach;
use serve::error::RequestStage;
use serve::job::{Job, Ticket};
use serve::metrics::Metrics;
use stop::RunStop;
use waiters::CoalescedWaiters;

/// Checks that each caller is answered exactly once, while callers join and
/// leave and the engine answers.
fn callers_join_and_leave() {
    let answers: [Arc<AtomicUsize>; 3] = std::array::from_fn(|_| Arc::new(AtomicUsize::new(0)));
    let mut leaving = Ticket::new(&answers[1]);
    leaving.gone = true;
    let waiters = Arc::new(CoalescedWaiters::new(Ticket::new(&answers[0])));
    let engine = {
        let waiters = Arc::clone(&waiters);
        thread::spawn(move || {
            for ticket in waiters.close() {
                ticket.finish(Ok(()));
            }
        })
    };
    for ticket in [leaving, Ticket::new(&answers[2])] {
        if let Err(refused) = waiters.join(ticket) {
            // It runs on its own.
            refused.finish(Ok(()));
        }
        waiters.sweep(Instant::now(), RequestStage::Queue, |_| {});
    }
    engine.join().expect("no panic");
    for answered in answers {
        assert_eq!(answered.load(Ordering::Relaxed), 1);
    }
}

/// Checks that a request to stop a run never stops the next run and is not
/// lost.
fn a_run_is_stopped() {
    let stop = Arc::new(RunStop::default());
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

/// Checks that each picture comes out once and that both threads see the end,
/// while pictures are pushed and swept, one thread takes all and another only
/// the cheap ones.
fn pictures_pass() {
    let answers: [Arc<AtomicUsize>; 2] = std::array::from_fn(|_| Arc::new(AtomicUsize::new(0)));
    let (bell, _rings) = crossbeam_channel::bounded(1);
    let (door, queue) = queue::queue(bell, Metrics);
    let threads: Vec<_> = [ThreadReach::Any, ThreadReach::Cheap]
        .into_iter()
        .map(|reach| {
            let queue = Arc::clone(&queue);
            thread::spawn(move || {
                while let Some(job) = queue.next(reach) {
                    job.ticket.finish(Ok(()));
                }
            })
        })
        .collect();
    drop(queue);
    for (idx, answered) in answers.iter().enumerate() {
        let mut ticket = Ticket::new(answered);
        ticket.gone = idx == 1;
        ticket.class = Priority::ALL[idx];
        door.push(Job {
            payload: ImageRequest(idx as u64),
            ticket,
        });
    }
    door.sweep();
    drop(door);
    for thread in threads {
        thread.join().expect("no panic");
    }
    for answered in answers {
        assert_eq!(answered.load(Ordering::Relaxed), 1);
    }
}

fn main() {
    // The queue has three threads and so millions of orders; bugs that need
    // more than two preemptions are rare.
    let models: [(&str, fn(), Option<usize>); 3] = [
        ("callers join and leave", callers_join_and_leave, None),
        ("a run is stopped", a_run_is_stopped, None),
        ("pictures pass", pictures_pass, Some(2)),
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
