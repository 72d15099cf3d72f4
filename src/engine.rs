//! Runs batches: the [`Engine`] trait and what implements it.
//!
//! The engine lives on one named thread that owns it (`runner.rs`), because
//! ONNX Runtime's `Session::run` takes `&mut self`: a lock around it would only
//! move the queue to where nothing can see it. Several devices are several such
//! threads, which one batcher feeds.

mod buckets;
mod decoder;
pub mod devices;
pub mod fake;
mod gap;
pub mod onnx;
pub mod operators;
pub(crate) mod owed;
pub mod roofline;
pub(crate) mod runner;
pub mod runtime;
mod stop;

use std::sync::Arc;
use std::time::{Duration, Instant};

pub use self::buckets::Buckets;
pub use self::stop::{Hook, Stop};
use crate::attention::SharedPrefix;
use crate::error::Error;
use crate::generation::Sequence;
use crate::job::{Crowd, Norm, Want};

/// A computation that the model offers. Jobs of one batch share a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Graph {
    /// Tokens to pooled features of every layer up to the feature layer.
    Features(Norm),
    /// Tokens to last hidden states.
    Hidden,
    /// Tokens to scores of the classification head.
    Logits,
    /// Tokens to how unlikely each of them is.
    Score,
    /// Tokens of sequences to logits of what follows: run by [`Engine::feed`].
    Generate,
}

impl Graph {
    pub const ALL: [Self; 6] = [
        Self::Features(Norm::PreAttnRms),
        Self::Features(Norm::None),
        Self::Hidden,
        Self::Logits,
        Self::Score,
        Self::Generate,
    ];

    /// The graph that computes what is wanted.
    #[must_use]
    pub fn of(want: Want) -> Self {
        match want {
            Want::Features { norm, .. } => Self::Features(norm),
            Want::Mean | Want::Last | Want::States => Self::Hidden,
            Want::Logits => Self::Logits,
            Want::Nll => Self::Score,
        }
    }

    /// The graph's label in metrics and logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Features(Norm::PreAttnRms) => "features",
            Self::Features(Norm::None) => "features_raw",
            Self::Hidden => "hidden",
            Self::Logits => "logits",
            Self::Score => "score",
            Self::Generate => "generate",
        }
    }
}

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub struct Row<'a> {
    /// As many token ids as the model has positions.
    pub tokens: &'a [u16],
    pub want: Want,
}

/// What an engine tells of itself once it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Facts {
    /// "cpu" or "cuda".
    pub provider: &'static str,
    /// Version of the runtime underneath.
    pub runtime_version: String,
    /// Width of features and hidden states; 0 for classification alone.
    pub dimension: usize,
    /// Rows of the classification head; 0 without [`Graph::Logits`].
    pub n_classes: usize,
    /// What it has for sequences, if the model has [`Graph::Generate`].
    pub sequences: Option<SequenceFacts>,
    /// What it does without.
    pub fallbacks: Vec<Fallback>,
}

/// Something faster that could not be had, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    pub kind: FallbackKind,
    pub reason: String,
}

/// What an engine can do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FallbackKind {
    /// A GPU, where any execution provider will do.
    Cuda,
    /// Runs that are captured, and launched as one.
    CudaGraphs,
}

impl FallbackKind {
    pub const ALL: [Self; 2] = [Self::Cuda, Self::CudaGraphs];

    /// Its label in metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::CudaGraphs => "cuda_graphs",
        }
    }
}

/// What an engine has for sequences that are generated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceFacts {
    /// How many there may be at one time, each with keys and values of its own.
    pub n_slots: usize,
    /// Bytes of keys and values that one keeps.
    pub slot_bytes: usize,
    /// Tokens of one sequence that are fed in one run at most.
    pub chunk: usize,
    /// Rows of a step at least, where there are slots for it.
    pub rows_min: usize,
    /// Whether a step reads what sequences share once for several of them.
    pub shares_prefixes: bool,
}

impl SequenceFacts {
    /// The sizes that steps run at.
    #[must_use]
    pub fn sizes(&self) -> Buckets {
        let least = self.rows_min.min(self.n_slots);
        let all = Buckets::powers_of_two(self.n_slots);
        let sizes = all.iter().filter(|&size| size >= least).collect();
        Buckets::ascending(sizes).unwrap_or_else(|| Buckets::powers_of_two(1))
    }
}

/// Tokens to feed to some sequences, in one run.
///
/// Sequences live in slots. What the runtime keeps of a slot is its first
/// `past` tokens' keys and values; feeding adds to them.
#[derive(Debug, Clone, Copy)]
pub struct Feed<'a> {
    /// The slot of the first row; the others follow it.
    pub first_slot: usize,
    /// Never empty. Several rows have one token each; one row may have as many
    /// as [`SequenceFacts::chunk`].
    pub rows: &'a [FeedRow<'a>],
    /// None, or one for each row: which other one of them begins with the same
    /// tokens, and with how many. Only where [`SequenceFacts::shares_prefixes`].
    pub prefixes: &'a [SharedPrefix],
}

/// The tokens of one sequence in a [`Feed`].
#[derive(Debug, Clone, Copy)]
pub struct FeedRow<'a> {
    pub tokens: &'a [u16],
    /// Tokens that were fed before.
    pub past: usize,
}

/// One run of a graph.
#[derive(Debug, Clone, Copy)]
pub struct Run<'a> {
    pub graph: Graph,
    /// The size to run at: at least as many as there are rows. What is missing
    /// is padding, which has no answer.
    pub bucket: usize,
    /// Never empty.
    pub rows: &'a [Row<'a>],
}

/// How long a graph took at a size, when the engine warmed up.
#[derive(Debug, Clone, Copy)]
pub struct Warm {
    pub graph: Graph,
    pub bucket: usize,
    pub elapsed: Duration,
}

/// When something was run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Span {
    pub started: Instant,
    pub ended: Instant,
}

impl Span {
    /// Runs something, and says when.
    pub fn of<T>(run: impl FnOnce() -> T) -> (T, Self) {
        let started = Instant::now();
        let outcome = run();
        let ended = Instant::now();
        (outcome, Self { started, ended })
    }
}

/// Computes batches. Built and used on the engine thread alone.
pub trait Engine {
    fn facts(&self) -> &Facts;

    /// What the warm-up took.
    fn warm(&self) -> &[Warm];

    /// Runs one batch and returns the wanted numbers of each row, in order.
    ///
    /// # Errors
    ///
    /// When the run failed or was stopped; then no row has an answer.
    fn run(&mut self, run: &Run<'_>, stop: &Stop) -> Result<Vec<Vec<f32>>, EngineError>;

    /// Feeds tokens and puts the logits of what follows each row's last one into
    /// `logits`, row after row.
    ///
    /// What a row gets does not depend on the other rows.
    ///
    /// # Errors
    ///
    /// When the run failed; then each row may be fed once more.
    fn feed(&mut self, feed: &Feed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError>;

    /// Makes slot `to` keep what slot `from` keeps of its first `n` tokens.
    /// Whether the engine can do that; if not, they have to be fed again.
    fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool;

    /// Computes something whose answer is known, to see that the device still
    /// does.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    fn canary(&mut self) -> Result<(), EngineError>;

    /// When the runtime was at work in the last [`Engine::run`] or
    /// [`Engine::feed`]; the rest of the call goes by while the device has
    /// nothing to do. `None` stands for all of the call.
    fn last_span(&self) -> Option<Span> {
        None
    }
}

/// Why an engine could not be loaded, or a batch not run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The runtime's library is missing or cannot be used.
    #[error("{0}")]
    Library(String),
    /// The execution provider that was asked for cannot be had.
    #[error("{0}")]
    Provider(String),
    /// A graph is not one that this worker can serve.
    #[error("{file}: {reason}")]
    Graph { file: String, reason: String },
    /// The engine could not be loaded, for a reason that says it all.
    #[error("{0}")]
    NotLoaded(String),
    /// The runtime failed.
    #[error("onnx runtime: {0}")]
    Runtime(String),
    /// There was not enough memory for a batch of this size.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The device is gone or in a state that only a new process leaves.
    #[error("the device has failed: {0}")]
    Device(String),
    /// The run was stopped because nobody waited for it any more.
    #[error("the run was stopped")]
    Stopped,
    /// The run's numbers are not what the graph promised.
    #[error("the model returned {got}, not {expected}")]
    Output { got: String, expected: String },
    /// Numbers of a run are not finite.
    #[error("the model returned a value that is not finite")]
    NotFinite,
    /// The engine panicked.
    #[error("the engine panicked: {0}")]
    Panicked(String),
}

/// Makes the engine, on the engine's own thread.
pub type EngineFactory = Box<dyn FnOnce() -> Result<Box<dyn Engine>, EngineError> + Send>;

/// Which of a worker's engines: its place in `--device-id`, counted from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct DeviceIdx(pub usize);

/// A batch on its way to the engine.
#[derive(Debug)]
pub struct Batch {
    /// Counted from 1, for [`Stop`].
    pub id: u64,
    pub graph: Graph,
    /// The size to run at, at least as many as there are units.
    pub bucket: usize,
    /// Never empty.
    pub units: Vec<Unit>,
    /// Since when an engine that was free could have run something.
    pub possible_since: Instant,
}

/// One row of a batch with everybody who waits for it.
#[derive(Debug, Clone)]
pub struct Unit {
    pub tokens: Arc<[u16]>,
    pub want: Want,
    pub crowd: Arc<Crowd>,
}

/// What the engine is given to do when it is free.
#[derive(Debug)]
pub enum Turn {
    /// One run of a graph.
    Batch(Batch),
    /// One step of the sequences that it has, and of these, which join them.
    Step {
        joining: Vec<Sequence>,
        /// As of a batch.
        possible_since: Instant,
    },
}

impl Turn {
    /// Gives everybody in it the same bad news.
    pub(crate) fn refuse(self, error: &Error) {
        match self {
            Self::Batch(batch) => {
                for unit in batch.units {
                    unit.crowd.refuse(error);
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
pub struct Sequences {
    /// How many more there may be.
    pub n_free: usize,
    /// Those of interactive callers.
    pub interactive: usize,
    /// Those of bulk callers.
    pub bulk: usize,
}

/// What engines tell the batcher's thread.
#[derive(Debug)]
pub(crate) enum Notice {
    /// An engine is free, and there was nothing for it yet.
    Free,
    /// Answers that the thread should give, since the engine runs on.
    Ran(Vec<owed::Owed>),
    /// The engine takes no more turns. The last thing that it says.
    Gone(DeviceIdx),
}

/// An engine's word that it is free for one batch, and what it did since the
/// last one.
#[derive(Debug)]
pub struct Slot {
    pub device: DeviceIdx,
    /// Runs of the warm-up; in the first slot only.
    pub warm: Vec<Warm>,
    /// Runs that succeeded.
    pub runs: Vec<Ran>,
    /// The largest batch that the engine takes from now on.
    pub largest: usize,
    pub sequences: Sequences,
}

/// One run that succeeded.
#[derive(Debug, Clone, Copy)]
pub struct Ran {
    pub graph: Graph,
    pub bucket: usize,
    /// Images that it has brought to an end, where an image takes many runs as
    /// parts of them.
    pub images: f64,
    pub elapsed: Duration,
}

/// Where a worker's engines are in their life, all taken together.
#[derive(Debug, Clone)]
pub enum State {
    /// Loading and warming up.
    Loading,
    /// All were loaded, and one at least still serves.
    Ready(Facts),
    /// Ended in good order after the last batch.
    Stopped,
    /// One was never started, or the last has ended before its time; the process
    /// should end too.
    Failed(Failure),
}

/// Why a worker cannot go on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    pub kind: FailureKind,
    pub reason: String,
}

/// Who is to blame for a failure.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FailureKind {
    /// One of the worker's own stages.
    Worker,
    /// The device or the runtime on it: a restart elsewhere may be better.
    Device,
}

/// What a panic said, if it said it in words.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
