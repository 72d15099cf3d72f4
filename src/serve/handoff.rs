//! Values that pass between the batcher and the engines' threads: turns go to
//! the engines; slots, notices and answers come back.

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
use crate::serve::timeline::ModelRun;

/// A batch on its way to the engine.
#[derive(Debug)]
pub(crate) struct Batch {
    /// Number of the batch, counted from 1, by which
    /// [`RunStop`](crate::engine::RunStop) names the run.
    pub id: u64,
    pub graph: Graph,
    /// Size of the run in rows, at least the number of units.
    pub bucket: usize,
    /// Rows of the batch. Never empty.
    pub units: Vec<BatchUnit>,
    /// Earliest time at which a free engine could have run this batch.
    pub possible_since: Instant,
}

/// One row of a batch, with all callers that wait for its answer.
#[derive(Debug, Clone)]
pub(crate) struct BatchUnit {
    pub tokens: Arc<[u16]>,
    pub want: Want,
    pub waiters: Arc<CoalescedWaiters>,
}

/// Work that a free engine is given.
#[derive(Debug)]
pub(crate) enum EngineTurn {
    /// One run of a graph.
    Batch(Batch),
    /// One step of the sequences that the engine has, and of those that join
    /// them.
    Step {
        joining: Vec<Sequence>,
        /// Earliest time at which a free engine could have made this step.
        possible_since: Instant,
    },
}

impl EngineTurn {
    /// Answers all callers in the turn with this error.
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

/// Number of sequences that an engine has and has room for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct SequenceCounts {
    /// Free slots.
    pub n_free: usize,
    /// Sequences of interactive callers.
    pub interactive: usize,
    /// Sequences of bulk callers.
    pub bulk: usize,
}

/// Messages from the engines to the batcher's thread.
#[derive(Debug)]
pub(crate) enum EngineNotice {
    /// An engine is free, and there was no work for it yet.
    Free,
    /// Answers that the batcher's thread should send, since the engine runs on.
    Ran(Vec<PendingReplies>),
    /// The engine takes no more turns; always its last notice.
    Gone(DeviceIdx),
}

/// Notice that an engine is free for one turn, with the runs since its last
/// slot.
#[derive(Debug)]
pub(crate) struct EngineSlot {
    pub device: DeviceIdx,
    /// Runs of the warm-up; only in the first slot.
    pub warm: Vec<WarmRun>,
    /// True if batch sizes that have no measurement were never run.
    pub sizes_untried: bool,
    /// Runs that have succeeded since the last slot.
    pub runs: Vec<FinishedRun>,
    /// Largest batch that the engine takes from now on.
    pub largest: usize,
    pub sequences: SequenceCounts,
}

/// Measurement of one run that succeeded.
#[derive(Debug, Clone, Copy)]
pub(crate) struct FinishedRun {
    pub graph: Graph,
    pub bucket: usize,
    /// Images that the run has finished; if an image takes many runs, each run
    /// counts as a fraction of the image.
    pub images: f64,
    pub elapsed: Duration,
}

/// Answer that is computed and not yet sent: the numbers of a row, and all
/// callers that wait for them. While work waits for the device, the batcher's
/// thread sends the answers, since it has nothing else to do while the device
/// runs.
#[derive(Debug)]
pub(crate) struct PendingReplies {
    pub(crate) unit: BatchUnit,
    pub(crate) values: Vec<f32>,
    pub(crate) run: ModelRun,
}

impl PendingReplies {
    /// Caches the answer and sends it to all callers.
    pub(crate) fn deliver(self, cache: &AnswerCache) {
        let Self { unit, values, run } = self;
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
            ticket.finish_after(Some(&run), outcome);
        }
        if let Some(ticket) = last {
            let outcome = outcome(&ticket, values);
            ticket.finish_after(Some(&run), outcome);
        }
    }
}
