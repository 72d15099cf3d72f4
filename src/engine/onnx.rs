//! ONNX Runtime behind the [`Engine`] trait.
//!
//! The runtime is a shared library that is loaded when the worker starts, so
//! one binary serves CPU and GPU. Graphs are used as exporters wrote them:
//! inputs are bound by name and in the integer type that the graph declares, an
//! attention mask is filled with ones and position ids with 0, 1, 2 and so on.
//! After loading, warm-up runs with every token id prove that the graph takes
//! the model's vocabulary and returns the expected shape.

mod answers;
mod choice;
mod copies;
mod loading;
mod sequences;
mod whole_images;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use self::choice::{check_compiled_for, check_precision, choose, may_capture};
use self::copies::EngineCopies;
use self::sequences::SequenceEngine;
use self::whole_images::{WholeBatch, WholeGraph};
use super::{
    BatchRow, CanaryOutcome, Engine, EngineFacts, GraphRun, RunSpan, RunStop, SlotFeed, WarmRun,
};
use crate::model::GraphFiles;
use crate::model::buckets::Buckets;
use crate::model::graph::{Graph, Want};
use crate::model::precision::{Precision, Provider, ProviderChoice};
use crate::runtime::capture::{CAPTURES, CaptureLock};
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::failure::{Failures, leak_if_lost};
use crate::runtime::{GpuAttention, GpuCopies, library};

pub use self::choice::auto_takes_cuda;
pub use crate::runtime::library::{LIBRARY, LIBRARY_FOLDER, environment, find_library};
pub use crate::runtime::probe::probe;

/// Settings of an engine.
#[derive(Debug, Clone)]
pub struct OnnxOptions {
    /// Path of the runtime's library.
    pub library: PathBuf,
    pub provider: ProviderChoice,
    /// Number of the GPU, from 0.
    pub device_id: i32,
    /// Number of threads per run; 0 uses one thread per physical core.
    pub intra_op_threads: usize,
    pub graphs: BTreeMap<Graph, PathBuf>,
    /// Files of the graphs, as they were when the model was opened.
    pub files: GraphFiles,
    /// Number of tokens per row.
    pub positions: usize,
    /// Number of colors of the palette; the start token is the next id.
    pub n_colors: usize,
    /// True if config.json gives the vocabulary and the positions. If not,
    /// trial runs check that the graph takes no more token ids than the palette
    /// has and no more positions than the size has.
    pub sizes_are_given: bool,
    /// Number of classes that config.json names; 0 if it names none.
    pub n_labels: usize,
    /// Width of the features that each linear head was trained on, with the
    /// head's name for error texts.
    pub head_widths: Vec<(usize, String)>,
    /// Provider that the graphs were compiled for; `None` for a published
    /// export.
    pub compiled_for: Option<Provider>,
    /// Precision that the graphs were compiled in; `None` for a published
    /// export.
    pub precision: Option<Precision>,
    /// Batch sizes. The warm-up runs at each of them, so that no caller's batch
    /// is the first of its size.
    pub buckets: Buckets,
    /// Largest number of images that are generated at the same time; 0 disables
    /// generation.
    pub generate_slots: usize,
    /// Largest size of the key/value cache of all these images, in bytes.
    pub generate_bytes_max: usize,
    /// Largest memory of a GPU that graphs may take, weights included, in
    /// bytes; `None` sets no limit.
    pub gpu_memory_limit: Option<usize>,
    /// True if runs on a GPU are captured as CUDA graphs where this is
    /// possible.
    pub cuda_graphs: bool,
    /// Kernel of attention over the key/value cache on a GPU.
    pub generate_attention: GpuAttention,
    /// Program that copies between the host and a GPU.
    pub gpu_copies: GpuCopies,
}

/// Engine that runs a model in ONNX Runtime.
pub struct OnnxEngine {
    facts: EngineFacts,
    graphs: BTreeMap<Graph, WholeGraph>,
    positions: usize,
    /// Id of the start token, which is the id after the last color.
    start: u16,
    sequences: Option<SequenceEngine>,
    /// Copies of all graphs, which run in turn.
    copies: EngineCopies,
    warm: Vec<WarmRun>,
    canary: Option<Canary>,
    /// Lock of captures in this process, on a GPU.
    captures: Option<&'static CaptureLock>,
    failures: Failures,
    /// Start and end of the last run of the runtime.
    span: Option<RunSpan>,
}

/// Row whose answer is known.
struct Canary {
    graph: Graph,
    bucket: usize,
    want: Want,
    tokens: Vec<u16>,
    answer: Vec<f32>,
}

/// Largest relative difference from a known answer: a device may add in another
/// order from run to run, which explains only smaller differences.
const CANARY_TOLERANCE: f64 = 1e-2;
impl OnnxEngine {
    /// Loads every graph and warms it up.
    ///
    /// # Errors
    ///
    /// When the library, the execution provider or a graph cannot be used;
    /// each text says what to change.
    pub fn load(options: &OnnxOptions) -> Result<Self, EngineError> {
        let environment = environment(&options.library)?;
        let mut fallbacks = Vec::new();
        // Held before the first use of the GPU, since that would spoil the
        // capture of another engine.
        let _alone = may_capture(options).then(|| CAPTURES.alone());
        let runtime = choose(&environment, options, &mut fallbacks)?;
        check_compiled_for(options.compiled_for, runtime.provider)?;
        check_precision(options.precision, runtime.provider)?;
        let mut engine = Self {
            facts: EngineFacts {
                provider: runtime.provider.name(),
                runtime_version: library::version(&options.library),
                dimension: 0,
                n_classes: 0,
                sequences: None,
                fallbacks,
                sizes_untried: runtime.provider == Provider::Cpu,
            },
            graphs: BTreeMap::new(),
            positions: options.positions,
            start: u16::try_from(options.n_colors).unwrap_or(u16::MAX),
            sequences: None,
            copies: EngineCopies::open(options.gpu_copies, &runtime),
            warm: Vec::new(),
            canary: None,
            captures: (runtime.provider == Provider::Cuda).then_some(&CAPTURES),
            failures: Failures::of(&runtime),
            span: None,
        };
        match engine.load_all(&runtime, options) {
            Ok(()) => Ok(engine),
            Err(error) => {
                leak_if_lost(engine, &error);
                Err(error)
            }
        }
    }
}

fn no_graph(graph: Graph) -> EngineError {
    EngineError::Runtime(format!("no graph {} is loaded", graph.label()))
}
impl Engine for OnnxEngine {
    fn facts(&self) -> &EngineFacts {
        &self.facts
    }

    fn warm(&self) -> &[WarmRun] {
        &self.warm
    }

    fn run(&mut self, run: &GraphRun<'_>, stop: &RunStop) -> Result<Vec<Vec<f32>>, EngineError> {
        let loaded = self
            .graphs
            .get_mut(&run.graph)
            .ok_or_else(|| no_graph(run.graph))?;
        let batch = WholeBatch {
            rows: run.rows,
            size: run.bucket,
            positions: self.positions,
            start: (run.graph == Graph::Score).then_some(self.start),
        };
        let options = loaded.options(run.bucket).map_err(runtime)?;
        let terminate = Arc::clone(&options);
        stop.arm(Box::new(move || {
            // This fails only for dropped options, and these are still alive.
            let _ = terminate.terminate();
        }));
        let failures = self.failures;
        loaded
            .run(run, batch, &options, &mut self.copies, &mut self.span)
            .map_err(|error| failures.judge(error))
    }

    fn feed(&mut self, feed: &SlotFeed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        self.sequences
            .as_mut()
            .ok_or_else(|| no_graph(Graph::Generate))?
            .feed(feed, &mut self.copies, logits, &mut self.span)
            .map_err(|error| self.failures.judge(error))
    }

    fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool {
        let sequences = self.sequences.as_mut();
        sequences.is_some_and(|sequences| sequences.copy_slot(from, to, n))
    }

    fn fill_slot(&mut self, slot: usize, number: f32) -> Result<(), EngineError> {
        self.sequences
            .as_mut()
            .ok_or_else(|| no_graph(Graph::Generate))?
            .fill_slots(slot, 1, number)
            .map_err(|error| self.failures.judge(error))
    }

    fn canary(&mut self) -> Result<CanaryOutcome, EngineError> {
        let beside = self.captures.map(CaptureLock::beside);
        if matches!(beside, Some(None)) {
            tracing::debug!("no idle check: another engine captures its runs");
            return Ok(CanaryOutcome::Skipped);
        }
        let Some(canary) = self.canary.take() else {
            return Ok(CanaryOutcome::Answered);
        };
        let row = BatchRow {
            tokens: &canary.tokens,
            want: canary.want,
        };
        let run = GraphRun {
            graph: canary.graph,
            bucket: canary.bucket,
            rows: &[row],
        };
        let got = self.run(&run, &RunStop::default());
        let expected = canary.answer.clone();
        self.canary = Some(canary);
        let got = got?.into_iter().next().unwrap_or_default();
        let moved = distance(&got, &expected);
        if moved <= CANARY_TOLERANCE {
            Ok(CanaryOutcome::Answered)
        } else {
            Err(EngineError::Output {
                got: format!("an answer with a relative error of {moved:.3}"),
                expected: "the known answer".to_owned(),
            })
        }
    }

    fn last_span(&self) -> Option<RunSpan> {
        self.span
    }
}

/// Returns the relative difference ‖a − b‖ / ‖b‖; infinity if an answer is
/// unusable.
fn distance(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut a.iter().zip(b).map(|(&a, &b)| f64::from(a) - f64::from(b)));
    let length = square(&mut b.iter().map(|&b| f64::from(b)));
    let distance = if length > 0.0 {
        (difference / length).sqrt()
    } else {
        difference.sqrt()
    };
    if distance.is_nan() {
        f64::INFINITY
    } else {
        distance
    }
}

#[cfg(test)]
mod tests;
