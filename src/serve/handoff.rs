//! Values that pass between the batcher and the engines' threads: turns one way, slots,
//! notices and answers the other.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::devices::DeviceIdx;
use crate::engine::WarmRun;
use crate::model::graph::{Graph, Want};
use crate::runtime::error::EngineError;
use crate::serve::cache::{AnswerCache, AnswerKey};
use crate::serve::error::{RequestStage, StageError};
use crate::serve::job::{Answer, CoalescedWaiters, Ticket};
use crate::serve::sequence::Sequence;

/// A batch on its way to the engine.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Counted from 1, for [`Stop`].
    pub id: u64,
    pub graph: Graph,
    /// The size to run at, at least as many as there are units.
    pub bucket: usize,
    /// Never empty.
    pub units: Vec<BatchUnit>,
    /// Since when an engine that was free could have run something.
    pub possible_since: Instant,
}

/// One row of a batch with everybody who waits for it.
#[derive(Debug, Clone)]
pub(crate) struct BatchUnit {
    pub tokens: Arc<[u16]>,
    pub want: Want,
    pub waiters: Arc<CoalescedWaiters>,
}

/// What the engine is given to do when it is free.
#[derive(Debug)]
pub(crate) enum EngineTurn {
    /// One run of a graph.
    Batch(Batch),
    /// One step of the sequences that it has, and of these, which join them.
    Step {
        joining: Vec<Sequence>,
        /// As of a batch.
        possible_since: Instant,
    },
}

impl EngineTurn {
    /// Gives everybody in it the same bad news.
    pub(crate) fn refuse(self, error: &StageError) {
        match self {
            Self::Batch(batch) => {
                for unit in batch.units {
                    unit.waiters.refuse(error);
                }
            }
            Self::Step { joining, .. } => {
                for sequence in joining {
                    sequence.finish(Err(error.clone()));
                }
            }
        }
    }
}

/// The sequences that an engine has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SequenceCounts {
    /// How many more there may be.
    pub n_free: usize,
    /// Those of interactive callers.
    pub interactive: usize,
    /// Those of bulk callers.
    pub bulk: usize,
}

/// What engines tell the batcher's thread.
#[derive(Debug)]
pub(crate) enum EngineNotice {
    /// An engine is free, and there was nothing for it yet.
    Free,
    /// Answers that the thread should give, since the engine runs on.
    Ran(Vec<PendingReplies>),
    /// The engine takes no more turns. The last thing that it says.
    Gone(DeviceIdx),
}

/// An engine's word that it is free for one batch, and what it did since the
/// last one.
#[derive(Debug)]
pub(crate) struct EngineSlot {
    pub device: DeviceIdx,
    /// Runs of the warm-up; in the first slot only.
    pub warm: Vec<WarmRun>,
    /// Runs that succeeded.
    pub runs: Vec<FinishedRun>,
    /// The largest batch that the engine takes from now on.
    pub largest: usize,
    pub sequences: SequenceCounts,
}

/// One run that succeeded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FinishedRun {
    pub graph: Graph,
    pub bucket: usize,
    /// Images that it has brought to an end, where an image takes many runs as
    /// parts of them.
    pub images: f64,
    pub elapsed: Duration,
}

/// An answer that is there and not yet given: a row's numbers and everybody who
/// waits for them. While something waits for the device, answers are given by the
/// batcher's thread, which has nothing to do while the device runs.
#[derive(Debug)]
pub(crate) struct PendingReplies {
    pub(crate) unit: BatchUnit,
    pub(crate) values: Vec<f32>,
}

impl PendingReplies {
    /// Gives everybody the answer.
    pub(crate) fn deliver(self, cache: &AnswerCache) {
        let Self { unit, values } = self;
        let finite = values.iter().all(|value| value.is_finite());
        if finite && cache.is_on() {
            let key = AnswerKey::new(unit.want, Arc::clone(&unit.tokens));
            cache.put(key, &values);
        }
        let mut tickets = unit.waiters.close();
        let last = tickets.pop();
        let now = Instant::now();
        let outcome = |ticket: &Ticket, values: Vec<f32>| {
            if ticket.deadline.is_some_and(|deadline| deadline <= now) {
                Err(StageError::DeadlineExceeded {
                    stage: RequestStage::Engine,
                })
            } else if finite {
                Ok(Answer::of(unit.want, &unit.tokens, values))
            } else {
                Err(EngineError::NotFinite.into())
            }
        };
        for ticket in tickets {
            let outcome = outcome(&ticket, values.clone());
            ticket.finish(outcome);
        }
        if let Some(ticket) = last {
            let outcome = outcome(&ticket, values);
            ticket.finish(outcome);
        }
    }
}
