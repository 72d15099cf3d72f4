//! Job: one image of one call, as it travels from stage to stage.
//!
//! A [`Job`] carries its payload, which each stage replaces by the next form
//! (image, then tokens), and a [`Ticket`], which stays with it to the end: its
//! deadline, its share of the worker's capacity, and the way back to the
//! caller. Because the capacity travels inside the job, queues sized by that
//! capacity cannot overflow, even when callers disconnect.

mod waiters;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::model::graph::{Context, Want};
use crate::proto::Priority;
use crate::serve::capacity::CapacityShare;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::fair::CallerId;
use crate::serve::generate::GenerateRequest;
use crate::serve::timeline::{ImageTimeline, ModelRun};

pub(crate) use self::waiters::CoalescedWaiters;

/// One image of one call, in the form that the next stage takes.
#[derive(Debug)]
pub(crate) struct Job<P> {
    pub payload: P,
    pub work: RequestedWork,
    pub ticket: Ticket,
}

/// Work that the caller requests for an image.
#[derive(Debug, Clone)]
pub(crate) enum RequestedWork {
    /// Only the image's tokens.
    Tokenize,
    /// A run of the model.
    Infer { context: Context, want: Want },
    /// Completion of the image: unknown pixels are drawn one by one.
    Generate(Box<GenerateRequest>),
}

/// Answer for one image.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    Tokens(Box<[u16]>),
    /// The requested numbers, row-major.
    Values(Vec<f32>),
    /// Negative log-likelihood of each token, in nats.
    Nll {
        tokens: Arc<[u16]>,
        nll: Vec<f32>,
    },
    /// A generated image.
    Generated {
        tokens: Box<[u16]>,
        /// Natural logarithm of the probability of each token that was drawn.
        log_probs: Vec<f32>,
    },
}

impl Answer {
    /// Builds the answer for these tokens from the requested numbers.
    #[must_use]
    pub(crate) fn of(want: Want, tokens: &Arc<[u16]>, values: Vec<f32>) -> Self {
        match want {
            Want::Nll => Self::Nll {
                tokens: Arc::clone(tokens),
                nll: values,
            },
            _ => Self::Values(values),
        }
    }
}

/// Part of a job that stays with it from admission to reply.
#[derive(Debug)]
pub(crate) struct Ticket {
    /// Caller among whose work the job waits for its turn.
    pub caller: CallerId,
    pub class: Priority,
    /// Deadline after which the answer is useless.
    pub deadline: Option<Instant>,
    /// Time at which the job entered its current stage.
    pub entered_at: Instant,
    /// Tracing span of the call, for its log lines.
    pub span: tracing::Span,
    /// Times at which the image passed the stages.
    pub timeline: ImageTimeline,
    /// Way back to the caller.
    pub reply: Reply,
    /// Share of the worker's capacity, returned when the job ends.
    pub permit: Permit,
}

impl Ticket {
    /// Returns the reason why the job is not worth any more work, if there is
    /// one.
    #[must_use]
    pub(crate) fn dead(&self, now: Instant, stage: RequestStage) -> Option<StageError> {
        // The deadline is checked first: a caller whose deadline has passed
        // also disconnects.
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            Some(StageError::DeadlineExceeded { stage })
        } else if self.reply.is_closed() {
            Some(StageError::Cancelled { stage })
        } else {
            None
        }
    }

    /// Answers the caller and returns the capacity.
    pub(crate) fn finish(self, outcome: Result<Answer, StageError>) {
        self.finish_after(None, outcome);
    }

    /// Answers the caller after a run of the model, if there was one, and
    /// returns the capacity.
    pub(crate) fn finish_after(self, run: Option<&ModelRun>, outcome: Result<Answer, StageError>) {
        // The capacity is returned first, so that a caller who has an answer
        // can rely on the room that its image has left.
        drop(self.permit);
        // The caller reads the times once it has the answer.
        self.timeline.answered(run);
        self.reply.send(outcome);
    }
}

/// Job's share of the worker's capacity, returned when this value is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held until the job ends, and not read")]
pub(crate) struct Permit {
    /// One image of `--images-in-flight-max`.
    pub image: CapacityShare,
    /// One image of the caller's own limit on images in flight; empty if the
    /// caller has none.
    pub of_caller: CapacityShare,
    /// The call's bytes of `--bytes-in-flight-max`, shared by all its images
    /// and held until the last of them ends.
    pub bytes: Arc<CapacityShare>,
}

#[cfg(test)]
impl Permit {
    /// Permit for work that takes none of the worker's capacity.
    pub(crate) fn none() -> Self {
        Self {
            image: CapacityShare::default(),
            of_caller: CapacityShare::default(),
            bytes: Arc::new(CapacityShare::default()),
        }
    }
}

/// Way back to the caller, used exactly once: sending consumes the reply, and
/// dropping it unsent tells the caller that the worker lost the job.
#[derive(Debug)]
pub(crate) struct Reply(Option<oneshot::Sender<Result<Answer, StageError>>>);

impl Reply {
    /// Returns a reply and the receiver at which its outcome will arrive.
    #[must_use]
    pub(crate) fn new() -> (Self, oneshot::Receiver<Result<Answer, StageError>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(Some(sender)), receiver)
    }

    /// True if the caller has disconnected.
    #[must_use]
    pub(crate) fn is_closed(&self) -> bool {
        self.0.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Sends the outcome, which is dropped if the caller has disconnected.
    pub(crate) fn send(mut self, outcome: Result<Answer, StageError>) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(outcome);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(Err(StageError::Lost));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_dropped_reply_says_so() {
        let (reply, mut receiver) = Reply::new();
        drop(reply);
        assert!(matches!(receiver.try_recv(), Ok(Err(StageError::Lost))));
    }

    #[test]
    fn a_sent_reply_arrives_once() {
        let (reply, mut receiver) = Reply::new();
        assert!(!reply.is_closed());
        reply.send(Ok(Answer::Values(vec![1.0])));
        assert!(matches!(receiver.try_recv(), Ok(Ok(Answer::Values(v))) if v == [1.0]));
    }

    #[test]
    fn a_reply_knows_that_its_caller_has_gone() {
        let (reply, receiver) = Reply::new();
        drop(receiver);
        assert!(reply.is_closed());
    }
}
