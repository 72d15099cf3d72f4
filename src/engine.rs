//! Runs batches: the [`Engine`] trait and what implements it.
//!
//! The engine lives on one named thread that owns it (`runner.rs`), because
//! ONNX Runtime's `Session::run` takes `&mut self`: a lock around it would only
//! move the queue to where nothing can see it. Several devices are several such
//! threads, which one batcher feeds.

pub mod fake;
pub mod onnx;
mod stop;

use std::time::{Duration, Instant};

use crate::kernels::attention::SharedPrefix;
use crate::model::graph::{Graph, Want};
use crate::runtime::error::EngineError;

pub use self::stop::{RunStop, StopHook};
pub use crate::model::buckets::Buckets;

/// One row of a batch.
#[derive(Debug, Clone, Copy)]
pub struct BatchRow<'a> {
    /// As many token ids as the model has positions.
    pub tokens: &'a [u16],
    pub want: Want,
}

/// What an engine tells of itself once it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineFacts {
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
pub struct SlotFeed<'a> {
    /// The slot of the first row; the others follow it.
    pub first_slot: usize,
    /// Never empty. Several rows have one token each; one row may have as many
    /// as [`SequenceFacts::chunk`].
    pub rows: &'a [SlotFeedRow<'a>],
    /// None, or one for each row: which other one of them begins with the same
    /// tokens, and with how many. Only where [`SequenceFacts::shares_prefixes`].
    pub prefixes: &'a [SharedPrefix],
}

/// The tokens of one sequence in a [`SlotFeed`].
#[derive(Debug, Clone, Copy)]
pub struct SlotFeedRow<'a> {
    pub tokens: &'a [u16],
    /// Tokens that were fed before.
    pub past: usize,
}

/// One run of a graph.
#[derive(Debug, Clone, Copy)]
pub struct GraphRun<'a> {
    pub graph: Graph,
    /// The size to run at: at least as many as there are rows. What is missing
    /// is padding, which has no answer.
    pub bucket: usize,
    /// Never empty.
    pub rows: &'a [BatchRow<'a>],
}

/// How long a graph took at a size, when the engine warmed up.
#[derive(Debug, Clone, Copy)]
pub struct WarmRun {
    pub graph: Graph,
    pub bucket: usize,
    pub elapsed: Duration,
}

/// When something was run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunSpan {
    pub started: Instant,
    pub ended: Instant,
}

impl RunSpan {
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
    fn facts(&self) -> &EngineFacts;

    /// What the warm-up took.
    fn warm(&self) -> &[WarmRun];

    /// Runs one batch and returns the wanted numbers of each row, in order.
    ///
    /// # Errors
    ///
    /// When the run failed or was stopped; then no row has an answer.
    fn run(&mut self, run: &GraphRun<'_>, stop: &RunStop) -> Result<Vec<Vec<f32>>, EngineError>;

    /// Feeds tokens and puts the logits of what follows each row's last one into
    /// `logits`, row after row.
    ///
    /// What a row gets does not depend on the other rows.
    ///
    /// # Errors
    ///
    /// When the run failed; then each row may be fed once more.
    fn feed(&mut self, feed: &SlotFeed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError>;

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
    fn last_span(&self) -> Option<RunSpan> {
        None
    }
}

/// Makes the engine, on the engine's own thread.
pub type EngineFactory = Box<dyn FnOnce() -> Result<Box<dyn Engine>, EngineError> + Send>;
