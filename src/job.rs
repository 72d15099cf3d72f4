//! The value that travels down the line: one image of one call.
//!
//! A [`Job`] carries its payload, which each stage replaces by the next form
//! (image, then tokens), and a [`Ticket`], which stays with it to the end: its
//! deadline, its share of the worker's capacity and the way back to the
//! caller. Because the capacity travels inside the job, queues sized by that
//! capacity cannot overflow, even when callers vanish.

mod crowd;

use std::sync::Arc;
use std::time::Instant;

use tokio::sync::oneshot;

pub use self::crowd::{Crowd, Left};
use crate::admission::Share;
use crate::error::{Error, Stage};
use crate::generation::Generate;

/// One image of one call, in the form that the next stage takes.
#[derive(Debug)]
pub struct Job<P> {
    pub payload: P,
    pub work: Work,
    pub ticket: Ticket,
}

impl<P> Job<P> {
    /// The same job with its payload in another form.
    pub fn with_payload<Q>(self, payload: Q) -> Job<Q> {
        Job {
            payload,
            work: self.work,
            ticket: self.ticket,
        }
    }
}

/// What the caller wants of an image.
#[derive(Debug, Clone)]
pub enum Work {
    /// Only its tokens.
    Tokenize,
    /// A run of the model.
    Infer { context: Context, want: Want },
    /// What is not known of it, pixel by pixel.
    Generate(Box<Generate>),
}

/// How urgent a call is. Ordered by urgency.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Class {
    /// Somebody waits for the answer: goes first.
    Interactive,
    /// A job over many images: fills what is left, and gets its share of the
    /// engine when there is nothing left.
    Bulk,
}

impl Class {
    pub const ALL: [Self; 2] = [Self::Interactive, Self::Bulk];

    /// The class's name in metadata, metrics and logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Interactive => "interactive",
            Self::Bulk => "bulk",
        }
    }
}

/// Which tokens the model sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Context {
    /// The image's tokens as they are.
    Raw,
    /// The start token first and the last pixel dropped, as in pre-training.
    SosShifted,
}

/// What is pooled of a layer: its states after the next block's norm, or as
/// they are.
pub use crate::compile::graph::Norm;

/// Which numbers of a run are the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Want {
    /// Pooled features of these layers, one after the other.
    Features { layers: Layers, norm: Norm },
    /// Mean of the last hidden states over all positions.
    Mean,
    /// Last hidden state of the last position.
    Last,
    /// Last hidden states of all positions.
    States,
    /// Scores of the classification head.
    Logits,
    /// How unlikely each token is after those before it, in nats.
    Nll,
}

/// Some of a model's layers, in ascending order. Never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layers(u64);

impl Layers {
    /// One more than the largest layer that can be named; the deepest
    /// published model has 48.
    pub const END: usize = 64;

    /// The embedding alone, which every model has.
    pub const FIRST: Self = Self(1);

    /// The layers of a list, which must ascend.
    #[must_use]
    pub fn ascending(list: &[u32]) -> Option<Self> {
        let mut bits = 0_u64;
        for &layer in list {
            let bit = 1_u64.checked_shl(layer)?;
            // Ascending means larger than all before.
            if bits >= bit {
                return None;
            }
            bits |= bit;
        }
        (bits != 0).then_some(Self(bits))
    }

    /// One by one.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..Self::END).filter(move |layer| self.0 >> layer & 1 == 1)
    }

    /// How many there are.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Never, but clippy asks.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// The answer for one image.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
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
    pub fn of(want: Want, tokens: &Arc<[u16]>, values: Vec<f32>) -> Self {
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
pub struct Ticket {
    pub class: Class,
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
    pub fn dead(&self, now: Instant, stage: Stage) -> Option<Error> {
        // The deadline first: a caller whose time is up leaves, too.
        if self.deadline.is_some_and(|deadline| deadline <= now) {
            Some(Error::DeadlineExceeded { stage })
        } else if self.reply.is_closed() {
            Some(Error::Cancelled { stage })
        } else {
            None
        }
    }

    /// Answers the caller and gives the capacity back.
    pub fn finish(self, outcome: Result<Answer, Error>) {
        // Capacity first, so that a caller who has an answer can rely on the
        // room it left.
        drop(self.permit);
        self.reply.send(outcome);
    }
}

/// A job's share of the worker's capacity.
#[derive(Debug)]
pub struct Permit {
    /// One image of `--images-in-flight-max`.
    pub image: Share,
    /// The call's bytes of `--bytes-in-flight-max`, shared by all its images
    /// and held until the last of them ends.
    pub bytes: Arc<Share>,
}

impl Permit {
    /// For work that takes none of the worker's capacity.
    #[must_use]
    pub fn none() -> Self {
        Self {
            image: Share::default(),
            bytes: Arc::new(Share::default()),
        }
    }
}

/// The way back to the caller. Used exactly once: sending consumes it, and
/// dropping it unsent tells the caller that the worker lost the job.
#[derive(Debug)]
pub struct Reply(Option<oneshot::Sender<Result<Answer, Error>>>);

impl Reply {
    /// A reply and the place where its outcome will arrive.
    #[must_use]
    pub fn new() -> (Self, oneshot::Receiver<Result<Answer, Error>>) {
        let (sender, receiver) = oneshot::channel();
        (Self(Some(sender)), receiver)
    }

    /// Whether the caller has gone.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.0.as_ref().is_none_or(oneshot::Sender::is_closed)
    }

    /// Delivers the outcome; a caller who has gone misses it.
    pub fn send(mut self, outcome: Result<Answer, Error>) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(outcome);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(sender) = self.0.take() {
            let _ = sender.send(Err(Error::Lost));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_ascend() {
        let check = |list: &[u32], expected: Option<&[usize]>| {
            let layers = Layers::ascending(list).map(|layers| layers.iter().collect::<Vec<_>>());
            assert_eq!(layers.as_deref(), expected, "{list:?}");
        };
        check(&[0], Some(&[0]));
        check(&[0, 5, 63], Some(&[0, 5, 63]));
        check(&[], None);
        check(&[5, 0], None);
        check(&[5, 5], None);
        check(&[64], None);
        check(&[u32::MAX], None);
    }

    #[test]
    fn a_dropped_reply_says_so() {
        let (reply, mut receiver) = Reply::new();
        drop(reply);
        assert!(matches!(receiver.try_recv(), Ok(Err(Error::Lost))));
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
