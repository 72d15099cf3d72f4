//! The value that travels down the line: one image of one call.
//!
//! A [`Job`] carries its payload, which each stage replaces by the next form
//! (image, then tokens), and a [`Ticket`], which stays with it to the end: its
//! deadline, its share of the worker's capacity and the way back to the
//! caller. Because the capacity travels inside the job, queues sized by that
//! capacity cannot overflow, even when callers vanish.

mod waiters;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

use crate::model::graph::{Context, Want};
use crate::proto::Priority;
use crate::serve::capacity::CapacityShare;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::generate::GenerateRequest;

pub(crate) use self::waiters::CoalescedWaiters;

/// One image of one call, in the form that the next stage takes.
#[derive(Debug)]
pub(crate) struct Job<P> {
    pub payload: P,
    pub work: RequestedWork,
    pub ticket: Ticket,
}

/// What the caller wants of an image.
#[derive(Debug, Clone)]
pub(crate) enum RequestedWork {
    /// Only its tokens.
    Tokenize,
    /// A run of the model.
    Infer { context: Context, want: Want },
    /// What is not known of it, pixel by pixel.
    Generate(Box<GenerateRequest>),
}

/// The answer for one image.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Answer {
    Tokens(Box<[u16]>),
    /// The wanted numbers, row-major.
    Values(Vec<f32>),
    /// How unlikely each of the tokens is, in nats.
    Nll {
        tokens: Arc<[u16]>,
        nll: Vec<f32>,
    },
    /// An image that was made.
    Generated {
        tokens: Box<[u16]>,
        /// ln p of each token that was drawn.
        log_probs: Vec<f32>,
    },
}

impl Answer {
    /// The answer for tokens of which this was wanted and computed.
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

/// What stays with a job from admission to reply.
#[derive(Debug)]
pub(crate) struct Ticket {
    pub class: Priority,
    /// When the answer stops being useful.
    pub deadline: Option<Instant>,
    /// When the job entered the stage it is in.
    pub entered_at: Instant,
    /// Where the call's log lines belong.
    pub span: tracing::Span,
    /// The way back to the caller.
    pub reply: Reply,
    /// The job's share of the worker's capacity, returned when the job ends.
    pub permit: Permit,
}

impl Ticket {
    /// Why the job is no longer worth any work, if so.
    #[must_use]
    pub(crate) fn dead(&self, now: Instant, stage: RequestStage) -> Option<StageError> {
        // The deadline first: a caller whose time is up leaves, too.
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            Some(StageError::DeadlineExceeded { stage })
        } else if self.reply.is_closed() {
            Some(StageError::Cancelled { stage })
        } else {
            None
        }
    }

    /// Answers the caller and gives the capacity back.
    pub(crate) fn finish(self, outcome: Result<Answer, StageError>) {
        // Capacity first, so that a caller who has an answer can rely on the
        // room it left.
        drop(self.permit);
        self.reply.send(outcome);
    }
}

/// A job's share of the worker's capacity, which goes back when it is dropped.
#[derive(Debug)]
#[expect(dead_code, reason = "held until the job ends, and not read")]
pub(crate) struct Permit {
    /// One image of `--images-in-flight-max`.
    pub image: CapacityShare,
    /// The call's bytes of `--bytes-in-flight-max`, shared by all its images
    /// and held until the last of them ends.
    pub bytes: Arc<CapacityShare>,
}

#[cfg(test)]
impl Permit {
    /// For work that takes none of the worker's capacity.
    pub(crate) fn none() -> Self {
        Self {
            image: CapacityShare::default(),
            bytes: Arc::new(CapacityShare::default()),
        }
    }
}

/// The way back to the caller. Used exactly once: sending consumes it, and
/// dropping it unsent tells the caller that the worker lost the job.
#[derive(Debug)]
pub(crate) struct Reply(Option<oneshot::Sender<Result<Answer, StageError>>>);

impl Reply {
    /// A reply and the place where its outcome will arrive.
    #[must_use]
    pub(crate) fn new() -> (Self, oneshot::Receiver<Result<Answer, StageError>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(Some(sender)), receiver)
    }

    /// Whether the caller has gone.
    #[must_use]
    pub(crate) fn is_closed(&self) -> bool {
        self.0.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Delivers the outcome; a caller who has gone misses it.
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
