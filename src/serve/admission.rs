//! Lets calls in, up to the worker's capacity, and counts nothing twice.
//!
//! Capacity has two measures: images, which bound the queues, and bytes,
//! which bound memory (what arrived plus what the answer will take). A call
//! gets all it needs at once or is refused at once, with the time after which
//! a retry makes sense. Only a stream waits here: it is not read on until
//! there is room for its next item.

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::imaging::ImageRequest;
use crate::proto::Priority;
use crate::serve::capacity::DrainRate;
use crate::serve::error::StageError;
use crate::serve::job::{Answer, Job, Permit, Reply, RequestedWork, Ticket};
use crate::serve::preprocess::Preprocessing;
use crate::serve::preprocess::queue::QueueEntrance;

pub(crate) use super::capacity::{CapacityPool, CapacityShare};

/// Bounds on what may be in the worker at once.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Capacity {
    pub images: usize,
    pub bytes: usize,
    /// Images that are generated or wait for it: each keeps its place for as
    /// long as a thousand steps take, so they must not take all of them.
    pub samples: usize,
    /// How much of both bulk work cannot take, in percent.
    pub interactive_reserve: u8,
}

/// One call, as admission sees it.
#[derive(Debug)]
pub(crate) struct AdmissionCall {
    /// Each image with what is wanted of it.
    pub images: Vec<(ImageRequest, RequestedWork)>,
    pub class: Priority,
    pub bytes: Bytes,
    pub deadline: Option<Instant>,
    /// Where the call's log lines belong.
    pub span: tracing::Span,
}

/// One item of a stream, as admission sees it.
#[derive(Debug)]
pub(crate) struct StreamItem {
    pub picture: ImageRequest,
    pub work: RequestedWork,
    pub class: Priority,
    pub bytes: Bytes,
    pub deadline: Option<Instant>,
    /// Where the stream's log lines belong.
    pub span: tracing::Span,
}

/// Bytes that a call or an item holds in memory.
#[derive(Debug, Default)]
pub(crate) struct Bytes {
    /// Bytes of the pictures, until the last of them is answered.
    pub request: usize,
    /// Share that was taken for the pictures while they arrived; more than they need or less.
    pub arrived: CapacityShare,
    /// Bytes of the answer, until that has been taken.
    pub answer: usize,
}

impl Bytes {
    fn all(&self) -> usize {
        self.request + self.answer
    }

    /// Bytes to be taken besides those that have arrived.
    fn missing(&self) -> usize {
        let n_arrived = self.arrived.size();
        (self.request.max(n_arrived) + self.answer) - n_arrived
    }
}

type Outcome = Result<Answer, StageError>;

/// The outcomes of a call's images. Dropped before all have come, it tells the
/// stages that nobody waits for the rest.
#[derive(Debug)]
pub(crate) struct PendingAnswers {
    /// In the call's order.
    outcomes: std::vec::IntoIter<oneshot::Receiver<Outcome>>,
    /// Keeps the answer's bytes accounted for until the caller has taken it; the
    /// pictures' are free once the last is answered.
    pub bytes: Arc<CapacityShare>,
    door: Arc<QueueEntrance>,
}

impl PendingAnswers {
    /// The outcome of the next image, in the call's order; `None` after the
    /// last.
    pub(crate) async fn next(&mut self) -> Option<Outcome> {
        // Looked at first and taken once it is there: if this future is
        // dropped while it waits, the image still counts as waited for.
        let outcome = self.outcomes.as_mut_slice().first_mut()?;
        let outcome = outcome.await.unwrap_or(Err(StageError::Lost));
        self.outcomes.next();
        Some(outcome)
    }
}

impl Drop for PendingAnswers {
    fn drop(&mut self) {
        if self.outcomes.len() > 0 {
            // Their replies see it from now on.
            self.outcomes = Vec::new().into_iter();
            self.door.sweep();
        }
    }
}

/// The door of the worker. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Admission {
    images: CapacityPool,
    bytes: CapacityPool,
    samples: CapacityPool,
    drain: DrainRate,
    door: Arc<QueueEntrance>,
    preprocessing: Preprocessing,
}

impl Admission {
    #[must_use]
    pub(crate) fn new(
        capacity: Capacity,
        drain: DrainRate,
        door: QueueEntrance,
        preprocessing: Preprocessing,
    ) -> Self {
        Self {
            images: CapacityPool::new(capacity.images, capacity.interactive_reserve),
            bytes: CapacityPool::new(capacity.bytes, capacity.interactive_reserve),
            samples: CapacityPool::new(capacity.samples, capacity.interactive_reserve),
            drain,
            door: Arc::new(door),
            preprocessing,
        }
    }

    /// The way of an image from here on: to a preprocessing thread, or straight
    /// to the batcher where there is nothing to decode.
    fn enter(&self, job: Job<ImageRequest>) {
        match job.work {
            RequestedWork::Infer { .. } | RequestedWork::Tokenize if job.payload.is_tokens() => {
                self.preprocessing.tokenize(job);
            }
            // Rows of an image to generate are encoded as it begins.
            _ => self.door.push(job),
        }
    }

    /// A view of how full the worker is, which does not keep the door open.
    #[must_use]
    pub(crate) fn occupancy(&self) -> Occupancy {
        Occupancy {
            images: self.images.clone(),
            bytes: self.bytes.clone(),
        }
    }

    /// Where bytes of requests that are still arriving are counted.
    #[must_use]
    pub(crate) fn bytes(&self) -> CapacityPool {
        self.bytes.clone()
    }

    /// Places for the samples of a call that generates images, besides those that
    /// [`Admission::submit`] takes.
    ///
    /// # Errors
    ///
    /// As [`Admission::submit`].
    pub(crate) fn samples(&self, class: Priority, n: usize) -> Result<CapacityShare, StageError> {
        let (what, flag) = ("samples", "--samples-in-flight-max");
        fits(&self.samples, class, n, what, flag)?;
        self.samples
            .try_take(class, n)
            .ok_or_else(|| self.full(what, flag))
    }

    /// Sends every image of the call down the line.
    ///
    /// # Errors
    ///
    /// [`StageError::Full`] when there is no room for the whole call now,
    /// [`StageError::NeverFits`] when there never is.
    pub(crate) fn submit(&self, call: AdmissionCall) -> Result<PendingAnswers, StageError> {
        self.submit_with(call, 0).map(|(pending, _)| pending)
    }

    /// The same for a call that may hold so many bytes more: as a share of their
    /// own, to give back what it turns out not to need.
    ///
    /// # Errors
    ///
    /// As [`Admission::submit`].
    pub(crate) fn submit_with(
        &self,
        call: AdmissionCall,
        spare: usize,
    ) -> Result<(PendingAnswers, CapacityShare), StageError> {
        let n_images = call.images.len();
        let n_bytes = call.bytes.all() + spare;
        for (pool, n, what, flag) in [
            (&self.images, n_images, "images", "--images-in-flight-max"),
            (&self.bytes, n_bytes, "bytes", "--bytes-in-flight-max"),
        ] {
            fits(pool, call.class, n, what, flag)?;
        }
        let mut images = self
            .images
            .try_take(call.class, n_images)
            .ok_or_else(|| self.full("images", "--images-in-flight-max"))?;
        let missing = call.bytes.missing() + spare;
        let mut bytes = self
            .bytes
            .try_take(call.class, missing)
            .ok_or_else(|| self.full("bytes", "--bytes-in-flight-max"))?;
        let spare = bytes.split(spare);
        let answer = Arc::new(bytes.split(call.bytes.answer));
        bytes.merge(call.bytes.arrived);
        let request = Arc::new(bytes);
        let now = Instant::now();
        let mut outcomes = Vec::with_capacity(n_images);
        for (picture, work) in call.images {
            let (reply, outcome) = Reply::new();
            outcomes.push(outcome);
            let ticket = Ticket {
                class: call.class,
                deadline: call.deadline,
                entered_at: now,
                span: call.span.clone(),
                reply,
                permit: Permit {
                    // One was taken for each picture.
                    image: images.split_one().unwrap_or_default(),
                    bytes: Arc::clone(&request),
                },
            };
            self.enter(Job {
                payload: picture,
                work,
                ticket,
            });
        }
        let pending = PendingAnswers {
            outcomes: outcomes.into_iter(),
            bytes: answer,
            door: Arc::clone(&self.door),
        };
        Ok((pending, spare))
    }

    /// Sends one item of a stream down the line, once there is room for it.
    ///
    /// # Errors
    ///
    /// [`StageError::NeverFits`] when there never is.
    pub(crate) async fn submit_when_room(
        &self,
        item: StreamItem,
    ) -> Result<PendingAnswers, StageError> {
        let (what, flag) = ("bytes", "--bytes-in-flight-max");
        // Whoever waits has only what bulk work has too.
        fits(&self.bytes, Priority::Bulk, item.bytes.all(), what, flag)?;
        // Always in this order, and whoever holds both is in the line and
        // ends: so nobody waits for somebody who waits. Bytes first: they come
        // back when readers take their answers, which may be never, and an
        // image's place held meanwhile would be idle. A message was read only
        // once there was room for all that its item holds, so an item that came
        // with its share does not wait for bytes here.
        let item_bytes = item.bytes;
        let n_arrived = item_bytes.arrived.size();
        let mut bytes = item_bytes.arrived;
        if n_arrived < item_bytes.request + item_bytes.answer {
            let missing = item_bytes.request + item_bytes.answer - n_arrived;
            bytes.merge(self.bytes.take(item.class, missing).await);
        }
        let answer = Arc::new(bytes.split(item_bytes.answer));
        let request = Arc::new(bytes);
        let image = self.images.take(item.class, 1).await;
        let (reply, outcome) = Reply::new();
        let ticket = Ticket {
            class: item.class,
            deadline: item.deadline,
            entered_at: Instant::now(),
            span: item.span,
            reply,
            permit: Permit {
                image,
                bytes: request,
            },
        };
        self.enter(Job {
            payload: item.picture,
            work: item.work,
            ticket,
        });
        Ok(PendingAnswers {
            outcomes: vec![outcome].into_iter(),
            bytes: answer,
            door: Arc::clone(&self.door),
        })
    }

    /// The refusal of a call that may fit later.
    fn full(&self, what: &'static str, flag: &'static str) -> StageError {
        StageError::Full {
            what,
            flag,
            retry_after: self.drain.retry_after(self.images.taken(), jitter()),
        }
    }
}

/// Refuses what a class can never have of a pool.
fn fits(
    pool: &CapacityPool,
    class: Priority,
    n: usize,
    what: &'static str,
    flag: &'static str,
) -> Result<(), StageError> {
    let max = pool.size_for(class);
    if n > max {
        return Err(StageError::NeverFits {
            given: n,
            max,
            what,
            flag,
        });
    }
    Ok(())
}

/// A number from 0 to 1 that differs from call to call, so that those who were
/// refused together do not come back together.
fn jitter() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    // Each has keys of its own.
    let hash = RandomState::new().hash_one(0_u8);
    #[expect(clippy::cast_precision_loss, reason = "32 bits fit")]
    {
        (hash >> 32) as f64 / f64::from(u32::MAX)
    }
}

/// How full the worker is.
#[derive(Debug, Clone)]
pub(crate) struct Occupancy {
    images: CapacityPool,
    bytes: CapacityPool,
}

impl Occupancy {
    /// Images admitted and not yet answered.
    #[must_use]
    pub(crate) fn images(&self) -> usize {
        self.images.taken()
    }

    /// The limit on images in flight.
    #[must_use]
    pub(crate) fn images_max(&self) -> usize {
        self.images.size()
    }

    /// Bytes that requests and answers hold.
    #[must_use]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.taken()
    }

    /// The limit on bytes in flight.
    #[must_use]
    pub(crate) fn bytes_max(&self) -> usize {
        self.bytes.size()
    }
}

#[cfg(test)]
mod tests;
