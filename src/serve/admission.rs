//! Admission control: admits calls up to the worker's capacity, and counts
//! nothing twice.
//!
//! Capacity has two measures: images, which bound the queues, and bytes, which
//! bound memory (bytes that arrived plus bytes that the answer will take). A
//! call gets all it needs at once, or is rejected at once with the time after
//! which a retry makes sense (load shedding). Only a stream waits here
//! (backpressure): it is not read on until there is room for its next item.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use crate::imaging::ImageRequest;
use crate::proto::Priority;
use crate::serve::caller::Caller;
use crate::serve::capacity::{CapacityClaim, DrainRate, NoRoom};
use crate::serve::error::StageError;
use crate::serve::job::{Answer, Job, Permit, Reply, RequestedWork, Ticket};
use crate::serve::preprocess::Preprocessing;
use crate::serve::preprocess::queue::QueueEntrance;
use crate::serve::timeline::{ImageTimeline, RequestTimeline};

pub(crate) use super::capacity::{CapacityPool, CapacityShare};

/// Bounds on the work that may be in the worker at the same time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Capacity {
    pub images: usize,
    pub bytes: usize,
    /// Largest number of images that are being generated or wait for it: each
    /// keeps its place for as long as a thousand steps take, so they must not
    /// take all places.
    pub samples: usize,
    /// Share of each bound that bulk work cannot take, in percent.
    pub interactive_reserve: u8,
}

/// Call to be admitted.
#[derive(Debug)]
pub(crate) struct AdmissionCall {
    /// Each image with the work requested for it.
    pub images: Vec<(ImageRequest, RequestedWork)>,
    pub caller: Caller,
    /// Number of images that count in the caller's rate: an image of which
    /// several outputs are asked counts once.
    pub n_charged: usize,
    pub class: Priority,
    pub bytes: Bytes,
    pub deadline: Option<Instant>,
    /// Tracing span of the call, for its log lines.
    pub span: tracing::Span,
    /// Times of the call, which has arrived.
    pub timeline: RequestTimeline,
}

/// Item of a stream to be admitted.
#[derive(Debug)]
pub(crate) struct StreamItem {
    pub picture: ImageRequest,
    pub work: RequestedWork,
    pub caller: Caller,
    pub class: Priority,
    pub bytes: Bytes,
    pub deadline: Option<Instant>,
    /// Tracing span of the stream, for its log lines.
    pub span: tracing::Span,
    /// Times of the item, which has arrived.
    pub timeline: RequestTimeline,
}

/// Bytes of memory that a call or an item of a stream holds.
#[derive(Debug, Default)]
pub(crate) struct Bytes {
    /// Bytes of the pictures, held until the last picture is answered.
    pub request: usize,
    /// Share that was taken for the pictures while they arrived; may be more or
    /// less than they need.
    pub arrived: CapacityShare,
    /// Bytes of the answer, held until the caller has taken the answer.
    pub answer: usize,
}

impl Bytes {
    fn all(&self) -> usize {
        self.request + self.answer
    }

    /// Bytes to be taken in addition to the share of those that have arrived.
    fn missing(&self) -> usize {
        let n_arrived = self.arrived.size();
        (self.request.max(n_arrived) + self.answer) - n_arrived
    }
}

type Outcome = Result<Answer, StageError>;

/// Outcomes of a call's images. If dropped before all outcomes have arrived,
/// the stages are told that nobody waits for the rest.
#[derive(Debug)]
pub(crate) struct PendingAnswers {
    /// Outcomes in the call's order.
    outcomes: std::vec::IntoIter<oneshot::Receiver<Outcome>>,
    /// Keeps the answer's bytes accounted for until the caller has taken the
    /// answer; the bytes of the pictures are returned once the last picture is
    /// answered.
    pub bytes: Arc<CapacityShare>,
    door: Arc<QueueEntrance>,
}

impl PendingAnswers {
    /// Waits for the outcome of the next image, in the call's order; `None`
    /// after the last.
    pub(crate) async fn next(&mut self) -> Option<Outcome> {
        // The receiver is taken only once its outcome is there: if this future
        // is dropped while it waits, the image still counts as waited for.
        let outcome = self.outcomes.as_mut_slice().first_mut()?;
        let outcome = outcome.await.unwrap_or(Err(StageError::Lost));
        self.outcomes.next();
        Some(outcome)
    }
}

impl Drop for PendingAnswers {
    fn drop(&mut self) {
        if self.outcomes.len() > 0 {
            // The replies see from now on that their receivers are gone.
            self.outcomes = Vec::new().into_iter();
            self.door.sweep();
        }
    }
}

/// Entrance of the worker, which admits or rejects calls. Cheap to clone.
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

    /// Sends an image to a preprocessing thread, or straight to the batcher if
    /// there is nothing to decode.
    fn enter(&self, job: Job<ImageRequest>) {
        match job.work {
            RequestedWork::Infer { .. } | RequestedWork::Tokenize if job.payload.is_tokens() => {
                self.preprocessing.tokenize(job);
            }
            // An image to generate takes the queue even if it is tokens, since
            // its known rows are encoded as it begins.
            _ => self.door.push(job),
        }
    }

    /// Returns a view of the worker's occupancy, which does not keep the
    /// entrance open.
    #[must_use]
    pub(crate) fn occupancy(&self) -> Occupancy {
        Occupancy {
            images: self.images.clone(),
            bytes: self.bytes.clone(),
        }
    }

    /// Returns the pool in which bytes of requests that are still arriving are
    /// counted.
    #[must_use]
    pub(crate) fn bytes(&self) -> CapacityPool {
        self.bytes.clone()
    }

    /// Takes places for the samples of a call that generates images, besides
    /// the places that [`Admission::submit`] takes.
    ///
    /// # Errors
    ///
    /// Same errors as [`Admission::submit`].
    pub(crate) fn samples(
        &self,
        caller: &Caller,
        class: Priority,
        n: usize,
    ) -> Result<CapacityShare, StageError> {
        let (what, flag) = ("samples", "--samples-in-flight-max");
        fits(&self.samples, class, n, what, flag)?;
        self.samples
            .try_take(claim(caller, class, 0), n)
            .map_err(|reason| self.full(reason, what, flag))
    }

    /// Admits a call whole, and sends every image of it on its way.
    ///
    /// # Errors
    ///
    /// [`StageError::Full`] or [`StageError::OverShare`] if there is no room for
    /// the whole call now, [`StageError::NeverFits`] if there never is, and
    /// [`StageError::CallerLimit`] or [`StageError::CallerNeverFits`] for a
    /// limit of the caller's own.
    pub(crate) fn submit(&self, call: AdmissionCall) -> Result<PendingAnswers, StageError> {
        self.submit_with(call, 0).map(|(pending, _)| pending)
    }

    /// Admits a call that may hold `spare` more bytes: returns these as a share
    /// of their own, so that the caller can give back the part that turns out
    /// not to be needed.
    ///
    /// # Errors
    ///
    /// Same errors as [`Admission::submit`].
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
        let retry_after = |n_held| self.drain.retry_after(n_held, jitter());
        let mut of_caller = call.caller.try_hold(n_images, retry_after)?;
        let claim_of = |own| claim(&call.caller, call.class, own);
        let mut images = self
            .images
            .try_take(claim_of(0), n_images)
            .map_err(|reason| self.full(reason, "images", "--images-in-flight-max"))?;
        let missing = call.bytes.missing() + spare;
        let mut bytes = self
            .bytes
            .try_take(claim_of(call.bytes.arrived.size()), missing)
            .map_err(|reason| self.full(reason, "bytes", "--bytes-in-flight-max"))?;
        // The rate comes last: a call that is rejected for lack of room is not
        // charged.
        call.caller.charge(call.n_charged)?;
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
                caller: call.caller.id(),
                class: call.class,
                deadline: call.deadline,
                entered_at: now,
                span: call.span.clone(),
                timeline: ImageTimeline::new(call.timeline.clone(), now),
                reply,
                permit: Permit {
                    // One place was taken for each picture.
                    image: images.split_one().unwrap_or_default(),
                    of_caller: of_caller.split_one().unwrap_or_default(),
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

    /// Sends an item of a stream on its way, once there is room for it, also
    /// within the caller's own limit on images in flight.
    ///
    /// # Errors
    ///
    /// [`StageError::NeverFits`] if there never is room.
    pub(crate) async fn submit_when_room(
        &self,
        item: StreamItem,
    ) -> Result<PendingAnswers, StageError> {
        let (what, flag) = ("bytes", "--bytes-in-flight-max");
        // An item that waits can only have the part that bulk work can have
        // too.
        fits(&self.bytes, Priority::Bulk, item.bytes.all(), what, flag)?;
        // Always in this order (bytes, then an image's place), so that there is
        // no deadlock: an item that holds both is on its way and ends, and
        // therefore no item waits for another one that waits. Bytes come first:
        // they are returned when readers take their answers, which may be
        // never, and an image's place held meanwhile would be idle. A message
        // was read only once there was room for all that its item holds, so an
        // item that came with its share does not wait for bytes here.
        let item_bytes = item.bytes;
        let n_arrived = item_bytes.arrived.size();
        let mut bytes = item_bytes.arrived;
        if n_arrived < item_bytes.request + item_bytes.answer {
            let missing = item_bytes.request + item_bytes.answer - n_arrived;
            let claim = claim(&item.caller, item.class, n_arrived);
            bytes.merge(self.bytes.take(claim, missing).await);
        }
        let answer = Arc::new(bytes.split(item_bytes.answer));
        let request = Arc::new(bytes);
        // The caller's own limit comes before the worker's, so that an item
        // that waits for its own caller's images holds no place of others.
        let of_caller = item.caller.hold().await;
        let claim = claim(&item.caller, item.class, 0);
        let image = self.images.take(claim, 1).await;
        let (reply, outcome) = Reply::new();
        let now = Instant::now();
        let ticket = Ticket {
            caller: item.caller.id(),
            class: item.class,
            deadline: item.deadline,
            entered_at: now,
            span: item.span,
            timeline: ImageTimeline::new(item.timeline, now),
            reply,
            permit: Permit {
                image,
                of_caller,
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

    /// Returns the rejection of a call that may fit later.
    fn full(&self, reason: NoRoom, what: &'static str, flag: &'static str) -> StageError {
        let retry_after = self.drain.retry_after(self.images.taken(), jitter());
        no_room(reason, what, flag, retry_after)
    }
}

/// Makes the error of a call for which a pool has no room now.
pub(crate) fn no_room(
    reason: NoRoom,
    what: &'static str,
    flag: &'static str,
    retry_after: Duration,
) -> StageError {
    match reason {
        NoRoom::Full => StageError::Full {
            what,
            flag,
            retry_after,
        },
        NoRoom::OverShare => StageError::OverShare {
            what,
            flag,
            retry_after,
        },
    }
}

fn claim(caller: &Caller, class: Priority, own: usize) -> CapacityClaim {
    CapacityClaim {
        caller: caller.id(),
        class,
        own,
    }
}

/// Rejects a request for more of a pool than its class can ever have.
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

/// Returns a number from 0 to 1 that differs from call to call, so that callers
/// who were rejected together do not come back together (jitter).
fn jitter() -> f64 {
    use std::hash::{BuildHasher as _, RandomState};
    // Each `RandomState` has random keys of its own.
    let hash = RandomState::new().hash_one(0_u8);
    #[expect(clippy::cast_precision_loss, reason = "32 bits fit")]
    {
        (hash >> 32) as f64 / f64::from(u32::MAX)
    }
}

/// Occupancy of the worker: images and bytes in flight.
#[derive(Debug, Clone)]
pub(crate) struct Occupancy {
    images: CapacityPool,
    bytes: CapacityPool,
}

impl Occupancy {
    /// Number of images that were admitted and are not yet answered.
    #[must_use]
    pub(crate) fn images(&self) -> usize {
        self.images.taken()
    }

    /// Limit on images in flight.
    #[must_use]
    pub(crate) fn images_max(&self) -> usize {
        self.images.size()
    }

    /// Number of bytes that requests and answers hold.
    #[must_use]
    pub(crate) fn bytes(&self) -> usize {
        self.bytes.taken()
    }

    /// Limit on bytes in flight.
    #[must_use]
    pub(crate) fn bytes_max(&self) -> usize {
        self.bytes.size()
    }
}

#[cfg(test)]
mod tests;
