//! Lets calls in, up to the worker's capacity, and counts nothing twice.
//!
//! Capacity has two measures: images, which bound the queues, and bytes,
//! which bound memory (what arrived plus what the answer will take). A call
//! gets all it needs at once or is refused at once: it never waits here.

use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Sender, TrySendError};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

use crate::error::Error;
use crate::job::{Answer, Job, Permit, Reply, Ticket, Work};
use crate::preprocess::pool::Picture;

/// Bounds on what may be in the worker at once.
#[derive(Debug, Clone, Copy)]
pub struct Capacity {
    pub images: usize,
    pub bytes: usize,
}

/// One call, as admission sees it.
#[derive(Debug)]
pub struct Call {
    pub pictures: Vec<Picture>,
    pub work: Work,
    /// What the call holds in memory until it is answered.
    pub bytes: usize,
    pub deadline: Option<Instant>,
    /// Where the call's log lines belong.
    pub span: tracing::Span,
}

/// The outcomes of a call's images, in the call's order, as they arrive.
#[derive(Debug)]
pub struct Pending {
    pub outcomes: Vec<oneshot::Receiver<Result<Answer, Error>>>,
    /// Keeps the answer's bytes accounted for until the caller has taken it.
    pub bytes: Arc<OwnedSemaphorePermit>,
}

/// The door of the worker.
#[derive(Debug)]
pub struct Admission {
    capacity: Capacity,
    images: Arc<Semaphore>,
    bytes: Arc<Semaphore>,
    jobs: Sender<Job<Picture>>,
}

impl Admission {
    /// A door to `jobs`, whose capacity is at least `capacity.images`.
    #[must_use]
    pub fn new(capacity: Capacity, jobs: Sender<Job<Picture>>) -> Self {
        Self {
            capacity,
            images: Arc::new(Semaphore::new(capacity.images)),
            bytes: Arc::new(Semaphore::new(capacity.bytes)),
            jobs,
        }
    }

    /// A view of how full the worker is, which does not keep the door open.
    #[must_use]
    pub fn occupancy(&self) -> Occupancy {
        Occupancy {
            images_max: self.capacity.images,
            images: Arc::clone(&self.images),
        }
    }

    /// Where bytes of requests that are still arriving are counted.
    #[must_use]
    pub fn bytes(&self) -> Arc<Semaphore> {
        Arc::clone(&self.bytes)
    }

    /// Sends every image of the call down the line.
    ///
    /// # Errors
    ///
    /// [`Error::Full`] when there is no room for the whole call.
    pub fn submit(&self, call: Call) -> Result<Pending, Error> {
        let mut images = take(&self.images, call.pictures.len()).ok_or(Error::Full {
            what: "images",
            flag: "--images-in-flight-max",
        })?;
        let bytes = Arc::new(take(&self.bytes, call.bytes).ok_or(Error::Full {
            what: "bytes",
            flag: "--bytes-in-flight-max",
        })?);
        let now = Instant::now();
        let mut outcomes = Vec::with_capacity(call.pictures.len());
        for picture in call.pictures {
            let (reply, outcome) = Reply::new();
            outcomes.push(outcome);
            let Some(image) = images.split(1) else {
                // One permit a picture was taken above.
                continue;
            };
            let job = Job {
                payload: picture,
                work: call.work,
                ticket: Ticket {
                    deadline: call.deadline,
                    entered_at: now,
                    span: call.span.clone(),
                    reply,
                    permit: Permit {
                        image,
                        bytes: Arc::clone(&bytes),
                    },
                },
            };
            // The queue holds as many jobs as there are permits, so it has
            // room for whoever holds one; it is closed once stages have ended.
            match self.jobs.try_send(job) {
                Ok(()) => {}
                Err(TrySendError::Full(job)) => job.ticket.finish(Err(Error::Full {
                    what: "images",
                    flag: "--images-in-flight-max",
                })),
                Err(TrySendError::Disconnected(job)) => job.ticket.finish(Err(Error::Draining)),
            }
        }
        Ok(Pending { outcomes, bytes })
    }
}

/// How full the worker is.
#[derive(Debug, Clone)]
pub struct Occupancy {
    /// The limit on images in flight.
    pub images_max: usize,
    images: Arc<Semaphore>,
}

impl Occupancy {
    /// Images admitted and not yet answered.
    #[must_use]
    pub fn images(&self) -> usize {
        self.images_max
            .saturating_sub(self.images.available_permits())
    }
}

/// `n` permits at once, or none.
fn take(semaphore: &Arc<Semaphore>, n: usize) -> Option<OwnedSemaphorePermit> {
    let n = u32::try_from(n).ok()?;
    Arc::clone(semaphore).try_acquire_many_owned(n).ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::preprocess::{ImageInput, PreprocessOptions};

    fn call(n_images: usize, bytes: usize) -> Call {
        Call {
            pictures: (0..n_images)
                .map(|_| Picture {
                    input: ImageInput::Tokens(Vec::new()),
                    options: PreprocessOptions::default(),
                })
                .collect(),
            work: Work::Tokenize,
            bytes,
            deadline: None,
            span: tracing::Span::none(),
        }
    }

    fn admission() -> (Admission, crossbeam_channel::Receiver<Job<Picture>>) {
        let (sender, receiver) = crossbeam_channel::bounded(4);
        let capacity = Capacity {
            images: 4,
            bytes: 100,
        };
        (Admission::new(capacity, sender), receiver)
    }

    #[test]
    fn a_call_is_admitted_whole_or_not_at_all() {
        let (admission, jobs) = admission();
        let first = admission.submit(call(3, 10)).expect("there is room for 3");
        assert_eq!(first.outcomes.len(), 3);
        assert!(matches!(
            admission.submit(call(2, 10)),
            Err(Error::Full { what: "images", .. })
        ));
        assert_eq!(admission.occupancy().images(), 3);
        assert_eq!(jobs.len(), 3);
    }

    #[test]
    fn bytes_bound_a_call_too_and_come_back() {
        let (admission, jobs) = admission();
        let first = admission.submit(call(1, 80)).expect("there is room");
        assert!(matches!(
            admission.submit(call(1, 30)),
            Err(Error::Full { what: "bytes", .. })
        ));
        assert_eq!(
            admission.occupancy().images(),
            1,
            "a refused call leaves no image permit behind"
        );
        drop(first);
        // The caller has gone, but its job still holds the image: no room yet.
        assert!(admission.submit(call(1, 30)).is_err());
        jobs.recv()
            .expect("the job")
            .ticket
            .finish(Err(Error::Lost));
        assert!(admission.submit(call(1, 30)).is_ok());
    }

    #[test]
    fn stages_that_have_ended_say_draining() {
        let (admission, jobs) = admission();
        drop(jobs);
        let mut pending = admission.submit(call(1, 1)).expect("admitted");
        assert!(matches!(
            pending.outcomes[0].try_recv(),
            Ok(Err(Error::Draining))
        ));
        assert_eq!(admission.occupancy().images(), 0);
    }
}
