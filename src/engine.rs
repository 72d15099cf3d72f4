//! Runs batches: the [`Engine`] trait and its implementations.
//!
//! An engine is owned by one named thread (`serve/engine_thread.rs`), because
//! ONNX Runtime's `Session::run` takes `&mut self`: a lock around it would only
//! move the queue to a place where nothing can observe it. Several devices have
//! one such thread each, all fed by one batcher.

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
    /// Token ids of the image, one per position of the model.
    pub tokens: &'a [u16],
    pub want: Want,
}

/// Facts about an engine once it is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EngineFacts {
    /// Execution provider: "cpu" or "cuda".
    pub provider: &'static str,
    /// Version of ONNX Runtime.
    pub runtime_version: String,
    /// Width of features and hidden states; 0 if the model has neither.
    pub dimension: usize,
    /// Number of classes of the classification head; 0 without
    /// [`Graph::Logits`].
    pub n_classes: usize,
    /// Facts about generation, if the model has [`Graph::Generate`].
    pub sequences: Option<SequenceFacts>,
    /// Fallbacks to slower ways that were needed.
    pub fallbacks: Vec<Fallback>,
    /// True if the warm-up ran only the smallest batch size: larger sizes are
    /// then tried with images that wait anyway.
    pub sizes_untried: bool,
}

/// Fallback to something slower, with the reason.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fallback {
    pub kind: FallbackKind,
    pub reason: String,
}

/// Kind of feature that an engine can run without, more slowly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FallbackKind {
    /// A GPU, if any execution provider is allowed.
    Cuda,
    /// CUDA graphs: runs that are captured and then launched as a whole.
    CudaGraphs,
    /// Copies between the host and a GPU over the driver.
    GpuCopies,
}

impl FallbackKind {
    pub const ALL: [Self; 3] = [Self::Cuda, Self::CudaGraphs, Self::GpuCopies];

    /// Returns the kind's label in metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Cuda => "cuda",
            Self::CudaGraphs => "cuda_graphs",
            Self::GpuCopies => "gpu_copies",
        }
    }
}

/// Facts about an engine's generation of sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SequenceFacts {
    /// Number of slots, each with a key/value cache of its own: the largest
    /// number of sequences at the same time.
    pub n_slots: usize,
    /// Size of the key/value cache of one slot, in bytes.
    pub slot_bytes: usize,
    /// Largest number of tokens of one sequence that are fed in one run.
    pub chunk: usize,
    /// True if a run of several tokens must have a power of two of them: the
    /// lengths that were warmed up.
    pub chunks_are_powers: bool,
    /// Smallest number of rows in a step, if there are that many slots.
    pub rows_min: usize,
    /// True if a step reads a prefix that several sequences share only once.
    pub shares_prefixes: bool,
}

impl SequenceFacts {
    /// Returns the number of tokens of the next run of a primer of which
    /// `n_left` tokens are left.
    #[must_use]
    pub fn piece(&self, n_left: usize) -> usize {
        let most = self.chunk.max(1).min(n_left);
        if self.chunks_are_powers && most > 0 {
            1 << most.ilog2()
        } else {
            most
        }
    }

    /// Returns the numbers of tokens of all runs of primers of at most
    /// `n_tokens` tokens that are warmed up.
    pub fn pieces(&self, n_tokens: usize) -> impl Iterator<Item = usize> + use<> {
        let largest = self.piece(n_tokens);
        let least = if self.chunks_are_powers { 1 } else { largest };
        std::iter::successors(Some(largest), |size| Some(size / 2))
            .take_while(move |&size| size >= least.max(1))
    }

    /// Returns the batch sizes of steps.
    #[must_use]
    pub fn sizes(&self) -> Buckets {
        let least = self.rows_min.min(self.n_slots);
        let all = Buckets::powers_of_two(self.n_slots);
        let sizes = all.iter().filter(|&size| size >= least).collect();
        Buckets::ascending(sizes).unwrap_or_else(|| Buckets::powers_of_two(1))
    }
}

/// Tokens that are fed to some sequences in one run.
///
/// Each sequence has a slot. A slot's key/value cache holds the keys and values
/// of its first `past` tokens; feeding adds to them.
#[derive(Debug, Clone, Copy)]
pub struct SlotFeed<'a> {
    /// Slot of the first row; the other rows are in the slots after it.
    pub first_slot: usize,
    /// Rows, at least one. Several rows have one token each; a single row may
    /// have up to [`SequenceFacts::chunk`] tokens.
    pub rows: &'a [SlotFeedRow<'a>],
    /// Shared prefixes: empty, or for each row another row that begins with the
    /// same tokens, and their number. Used only with
    /// [`SequenceFacts::shares_prefixes`].
    pub prefixes: &'a [SharedPrefix],
}

/// Tokens of one sequence in a [`SlotFeed`].
#[derive(Debug, Clone, Copy)]
pub struct SlotFeedRow<'a> {
    pub tokens: &'a [u16],
    /// Number of tokens that were fed before.
    pub past: usize,
}

/// One run of a graph.
#[derive(Debug, Clone, Copy)]
pub struct GraphRun<'a> {
    pub graph: Graph,
    /// Batch size, at least the number of rows. The rest is padding, which has
    /// no answer.
    pub bucket: usize,
    /// Rows of the batch, at least one.
    pub rows: &'a [BatchRow<'a>],
}

/// Duration of a graph's run at a batch size during the warm-up.
#[derive(Debug, Clone, Copy)]
pub struct WarmRun {
    pub graph: Graph,
    pub bucket: usize,
    pub elapsed: Duration,
}

/// Outcome of a check that found nothing wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CanaryOutcome {
    /// The device gave the known answer.
    Answered,
    /// Nothing was run, since another engine was capturing its runs, which a
    /// run on any GPU would have spoiled.
    Skipped,
}

/// Start and end of a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RunSpan {
    pub started: Instant,
    pub ended: Instant,
}

impl RunSpan {
    /// Calls `run`, and returns its result with its start and end.
    pub fn of<T>(run: impl FnOnce() -> T) -> (T, Self) {
        let started = Instant::now();
        let outcome = run();
        let ended = Instant::now();
        (outcome, Self { started, ended })
    }
}

/// Computes batches. An engine is created and used on the engine thread only.
pub trait Engine {
    fn facts(&self) -> &EngineFacts;

    /// Returns the durations of the warm-up's runs.
    fn warm(&self) -> &[WarmRun];

    /// Runs one batch and returns the wanted numbers of each row, in order.
    ///
    /// # Errors
    ///
    /// When the run failed or was stopped; then no row has an answer.
    fn run(&mut self, run: &GraphRun<'_>, stop: &RunStop) -> Result<Vec<Vec<f32>>, EngineError>;

    /// Feeds tokens and writes the logits of the token after each row's last
    /// token into `logits`, row after row.
    ///
    /// The logits of a row do not depend on the other rows.
    ///
    /// # Errors
    ///
    /// When the run failed; then each row may be fed again.
    fn feed(&mut self, feed: &SlotFeed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError>;

    /// Copies the key/value cache of the first `n` tokens from slot `from` to
    /// slot `to`. Returns false if the engine cannot copy; then the tokens must
    /// be fed to the slot again.
    fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool;

    /// Sets all numbers of a slot's key/value cache. Zero keeps numbers that are
    /// not finite from the next sequence in the slot: a kernel may multiply keys
    /// and values after a sequence's end by zero, and 0 × NaN is NaN. Other
    /// numbers show in measurements whether a kernel does.
    ///
    /// # Errors
    ///
    /// When the slot could not be filled, after which it must not be used again,
    /// or when its cache cannot hold the number.
    fn fill_slot(&mut self, slot: usize, number: f32) -> Result<(), EngineError>;

    /// Computes a row whose answer is known, to check that the device still
    /// works.
    ///
    /// # Errors
    ///
    /// When the run fails or its answer differs from the known answer.
    fn canary(&mut self) -> Result<CanaryOutcome, EngineError>;

    /// Returns the part of the last [`Engine::run`] or [`Engine::feed`] in
    /// which the runtime was at work; during the rest of the call the device
    /// was idle. `None` stands for the whole call.
    fn last_span(&self) -> Option<RunSpan> {
        None
    }
}

/// Function that creates the engine, called on the engine's own thread.
pub type EngineFactory = Box<dyn FnOnce() -> Result<Box<dyn Engine>, EngineError> + Send>;

#[cfg(test)]
mod tests {
    use super::*;

    fn facts(chunk: usize, chunks_are_powers: bool) -> SequenceFacts {
        SequenceFacts {
            n_slots: 1,
            slot_bytes: 1,
            chunk,
            chunks_are_powers,
            rows_min: 1,
            shares_prefixes: false,
        }
    }

    /// Returns the pieces of a primer of `n_tokens` tokens.
    fn of_primer(facts: SequenceFacts, mut n_tokens: usize) -> Vec<usize> {
        let mut pieces = Vec::new();
        while n_tokens > 0 {
            pieces.push(facts.piece(n_tokens));
            n_tokens -= facts.piece(n_tokens);
        }
        pieces
    }

    #[test]
    fn every_piece_of_a_primer_was_warmed_up() {
        let warmed: Vec<usize> = facts(256, true).pieces(1024).collect();
        assert_eq!(warmed, [256, 128, 64, 32, 16, 8, 4, 2, 1]);
        assert_eq!(of_primer(facts(256, true), 600), [256, 256, 64, 16, 8]);
        for n_tokens in 1..=1024 {
            let pieces = of_primer(facts(256, true), n_tokens);
            assert!(pieces.iter().all(|piece| warmed.contains(piece)));
            assert!(pieces.len() <= 12, "{n_tokens}: {pieces:?}");
        }
        // A small model has no primer of a whole chunk.
        let small: Vec<usize> = facts(256, true).pieces(100).collect();
        assert_eq!(small, [64, 32, 16, 8, 4, 2, 1]);
    }

    #[test]
    fn a_cpu_takes_any_length_up_to_its_chunk() {
        assert_eq!(of_primer(facts(64, false), 150), [64, 64, 22]);
        assert_eq!(facts(64, false).pieces(1024).collect::<Vec<_>>(), [64]);
        assert_eq!(facts(64, false).pieces(16).collect::<Vec<_>>(), [16]);
    }
}
