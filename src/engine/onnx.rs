//! ONNX Runtime behind the [`Engine`] trait.
//!
//! The runtime is a shared library that is loaded when the worker starts, so
//! one binary serves CPU and GPU. Graphs are used as exporters wrote them:
//! inputs are bound by name and in the integer type that the graph declares, an
//! attention mask is filled with ones and position ids with 0, 1, 2 and so on.
//! After loading, warm-up runs with every token id prove that the graph takes
//! the model's vocabulary and returns the expected shape.

mod answers;
mod sequences;
mod whole_images;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use ort::environment::Environment;

use self::sequences::SequenceEngine;
use self::whole_images::{WholeBatch, WholeGraph};
use super::{
    BatchRow, CanaryOutcome, Engine, EngineFacts, Fallback, FallbackKind, GraphRun, RunSpan,
    RunStop, SlotFeed, WarmRun,
};
use crate::kernels::whole::has_bf16_products;
use crate::model::GraphFiles;
use crate::model::buckets::Buckets;
use crate::model::graph::{Graph, Layers, Want};
use crate::model::precision::{BF16_FEATURES, Precision, Provider, ProviderChoice};
use crate::model::settings::check_classes;
use crate::runtime::capture::{CAPTURES, CaptureLock};
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::failure::{Failures, leak_if_lost};
use crate::runtime::load::Loader;
use crate::runtime::{GpuAttention, Residence, Runtime, arena, library, operators};

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
}

/// Engine that runs a model in ONNX Runtime.
pub struct OnnxEngine {
    facts: EngineFacts,
    graphs: BTreeMap<Graph, WholeGraph>,
    positions: usize,
    /// Id of the start token, which is the id after the last color.
    start: u16,
    sequences: Option<SequenceEngine>,
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

/// Duration of a warm-up run below which the run is repeated.
const WARM_TWICE: Duration = Duration::from_millis(500);

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

    fn load_all(&mut self, runtime: &Runtime, options: &OnnxOptions) -> Result<(), EngineError> {
        let served = |graph| graph != Graph::Generate || options.generate_slots > 0;
        let graphs = options.graphs.iter().filter(|(graph, _)| served(**graph));
        // Only compiled graphs on a CPU compute from shared weights in place.
        let shares =
            options.compiled_for == Some(Provider::Cpu) && runtime.provider == Provider::Cpu;
        let sharing = graphs.clone().map(|(_, path)| path).filter(|_| shares);
        let mut loader = Loader::new(options.files.clone(), sharing)?;
        for (&graph, path) in graphs {
            let started = Instant::now();
            if graph == Graph::Generate {
                self.load_sequences(runtime, &mut loader, path, options)?;
            } else {
                self.load_graph(runtime, &mut loader, graph, path, options)?;
            }
            let seconds = started.elapsed().as_secs_f64();
            tracing::debug!(graph = graph.label(), seconds, "graph loaded and warmed up");
        }
        loader.finish();
        Ok(())
    }

    /// Loads a graph and warms it up; if it cannot be captured as a CUDA graph,
    /// it is loaded without.
    fn load_graph(
        &mut self,
        runtime: &Runtime,
        loader: &mut Loader,
        graph: Graph,
        path: &Path,
        options: &OnnxOptions,
    ) -> Result<(), EngineError> {
        let is_compiled = options.compiled_for.is_some();
        let n_warm = self.warm.len();
        let load = |cuda_graphs| {
            // Drops the results of a failed first attempt, above all its
            // memory.
            self.warm.truncate(n_warm);
            self.graphs.remove(&graph);
            let runtime = Runtime {
                cuda_graphs,
                ..runtime.clone()
            };
            let whole = WholeGraph::open(&runtime, loader, graph, path, is_compiled)?;
            self.graphs.insert(graph, whole);
            self.warm_up(graph, options)
        };
        if let Some(error) = captured_or_not(runtime.cuda_graphs, load)? {
            self.not_captured(graph, &error);
        }
        Ok(())
    }

    fn not_captured(&mut self, graph: Graph, error: &EngineError) {
        let graph = graph.label();
        tracing::warn!(graph, %error, "cannot use CUDA graphs; launching kernels one by one");
        self.facts.fallbacks.push(Fallback {
            kind: FallbackKind::CudaGraphs,
            reason: format!("graph {graph}: {error}"),
        });
    }

    fn load_sequences(
        &mut self,
        runtime: &Runtime,
        loader: &mut Loader,
        path: &Path,
        options: &OnnxOptions,
    ) -> Result<(), EngineError> {
        let sizes = sequences::SequenceOptions {
            n_slots: options.generate_slots,
            bytes_max: options.generate_bytes_max,
            positions: options.positions,
            n_colors: options.n_colors,
            attention: options.generate_attention,
        };
        let load = |cuda_graphs| {
            self.sequences = None;
            let runtime = Runtime {
                cuda_graphs,
                ..runtime.clone()
            };
            let sequences = SequenceEngine::open(&runtime, loader, path, sizes)?;
            // Owned by the engine before its device is used; see `leak_if_lost`.
            let sequences = self.sequences.insert(sequences);
            let warm = sequences
                .prepare()
                .and_then(|()| sequences.warm_up())
                .map_err(|error| self.failures.judge(error))?;
            self.facts.sequences = Some(sequences.facts);
            self.warm.extend(warm);
            Ok(())
        };
        if let Some(error) = captured_or_not(runtime.cuda_graphs, load)? {
            self.not_captured(Graph::Generate, &error);
        }
        Ok(())
    }

    /// Runs the graph with every token id, at every batch size that is warmed up
    /// (on a CPU the smallest alone), and learns the width of its output.
    fn warm_up(&mut self, graph: Graph, options: &OnnxOptions) -> Result<(), EngineError> {
        // The start token is never a target of `score`.
        let n_ids = options.n_colors + usize::from(graph != Graph::Score);
        let tokens: Vec<u16> = (0..options.positions)
            .map(|position| u16::try_from(position % n_ids).unwrap_or(0))
            .collect();
        let want = match graph {
            Graph::Features(norm) => Want::Features {
                layers: Layers::FIRST,
                norm,
            },
            Graph::Hidden => Want::Mean,
            Graph::Logits => Want::Logits,
            Graph::Score | Graph::Generate => Want::Nll,
        };
        let row = BatchRow {
            tokens: &tokens,
            want,
        };
        let file = self
            .graphs
            .get(&graph)
            .map_or_else(String::new, |loaded| loaded.file.clone());
        let refuse = |reason: String| EngineError::Graph {
            file: file.clone(),
            reason,
        };
        let mut answer = Vec::new();
        // A GPU captures each size now. A CPU is ready sooner, and takes less
        // memory, if the larger sizes wait until images fill them.
        let n_sizes = if self.facts.sizes_untried {
            1
        } else {
            usize::MAX
        };
        let runs_twice = self.graphs.get(&graph).is_some_and(WholeGraph::captures);
        for bucket in options.buckets.iter().take(n_sizes) {
            let run = GraphRun {
                graph,
                bucket,
                rows: &[row],
            };
            let mut started = Instant::now();
            let first = self.run(&run, &RunStop::default());
            let values = match first {
                // The first run of a size allocates and tunes, so the second
                // run is measured, by which batch sizes are chosen. In a long
                // run the overhead is small, so that a second run is not worth
                // its time.
                //
                // The first run of a session on a GPU, which is always long, is
                // not captured; a run that was captured later, beside another
                // engine's capture, would spoil both.
                Ok(_) if runs_twice || started.elapsed() < WARM_TWICE => {
                    started = Instant::now();
                    self.run(&run, &RunStop::default())
                }
                first => first,
            }
            .map_err(|error| match error {
                // A lost device says nothing about the graph.
                EngineError::Device(_) => error,
                error => refuse(format!(
                    "a trial run of {bucket} images with every token id (0 to {}) failed: the \
                     graph does not fit the palette or the positions, or there is not enough \
                     memory: {error}",
                    n_ids - 1
                )),
            })?;
            self.warm.push(WarmRun {
                graph,
                bucket,
                elapsed: started.elapsed(),
            });
            answer = values.into_iter().next().unwrap_or_default();
        }
        let width = answer.len();
        if self.canary.is_none() {
            self.canary = Some(Canary {
                graph,
                bucket: options.buckets.smallest(),
                want,
                tokens: tokens.clone(),
                answer,
            });
        }
        if !options.sizes_are_given && self.facts.provider == "cpu" {
            self.check_sizes(graph, options)?;
        }
        match graph {
            Graph::Features(_) | Graph::Hidden => {
                let mut heads = options.head_widths.iter();
                if let Some((expected, head)) = heads.find(|(expected, _)| *expected != width) {
                    return Err(refuse(format!(
                        "features have {width} numbers, but the head {head} was trained on \
                         {expected} numbers"
                    )));
                }
                self.facts.dimension = width;
            }
            Graph::Logits => {
                check_classes(options.n_labels, width).map_err(refuse)?;
                self.facts.n_classes = width;
            }
            Graph::Score | Graph::Generate => {}
        }
        Ok(())
    }

    /// Refuses a graph that takes a token id beyond the start token, or a
    /// position beyond the last: then the palette or the size belongs to
    /// another model, and answers would look right but be wrong. A CPU fails
    /// for ids that the graph does not have; a GPU would not.
    fn check_sizes(&mut self, graph: Graph, options: &OnnxOptions) -> Result<(), EngineError> {
        let (positions, n_colors) = (self.positions, options.n_colors);
        let loaded = self.graphs.get_mut(&graph).ok_or_else(|| no_graph(graph))?;
        let beyond = u16::try_from(n_colors + 1).unwrap_or(u16::MAX);
        for (tokens, what) in [
            (
                vec![beyond; positions],
                format!("token id {beyond}, which the palette lacks"),
            ),
            (
                vec![0; positions + 1],
                format!("{} positions, more than the size has", positions + 1),
            ),
        ] {
            let row = BatchRow {
                tokens: &tokens,
                want: Want::Mean,
            };
            let batch = WholeBatch {
                rows: &[row],
                size: options.buckets.smallest(),
                positions: tokens.len(),
                start: None,
            };
            if loaded.takes(batch)? {
                return Err(EngineError::Graph {
                    file: loaded.file.clone(),
                    reason: format!(
                        "takes {what}, so preprocessor_config.json belongs to another model; if \
                         this is intended, put the model's config.json beside it"
                    ),
                });
            }
        }
        Ok(())
    }
}

/// Calls `load` with CUDA graphs if they are wanted, and without them if this
/// fails; returns the reason why runs cannot be captured.
fn captured_or_not(
    wanted: bool,
    mut load: impl FnMut(bool) -> Result<(), EngineError>,
) -> Result<Option<EngineError>, EngineError> {
    match load(wanted) {
        // The error is about CUDA graphs only if loading works without them.
        Err(error) if wanted && !matches!(error, EngineError::Device(_)) => {
            load(false).map(|()| Some(error))
        }
        outcome => outcome.map(|()| None),
    }
}

fn no_graph(graph: Graph) -> EngineError {
    EngineError::Runtime(format!("no graph {} is loaded", graph.label()))
}

/// Refuses graphs that were compiled for another provider than `provider`, on
/// which they would be slow or not run at all.
fn check_compiled_for(
    compiled_for: Option<Provider>,
    provider: Provider,
) -> Result<(), EngineError> {
    match compiled_for {
        Some(made) if made != provider => {
            let (made, given) = (made.name(), provider.name());
            Err(EngineError::Provider(format!(
                "the model was compiled for {made} and cannot run on {given}; compile it with \
                 --provider {given}, or serve it with --execution-provider {made}"
            )))
        }
        _ => Ok(()),
    }
}

/// Refuses graphs in a precision that this CPU could only run slowly.
fn check_precision(precision: Option<Precision>, provider: Provider) -> Result<(), EngineError> {
    if (precision, provider) != (Some(Precision::Bf16), Provider::Cpu) || has_bf16_products() {
        return Ok(());
    }
    Err(EngineError::Provider(format!(
        "the model was compiled in bf16 for CPUs with {BF16_FEATURES}, which this CPU does not \
         have; compile it with --precision int8 or fp32"
    )))
}

/// Returns true if an engine with these options may capture its runs.
fn may_capture(options: &OnnxOptions) -> bool {
    options.cuda_graphs
        && options.gpu_memory_limit.is_none()
        && options.provider != ProviderChoice::Cpu
        && options.compiled_for != Some(Provider::Cpu)
}

/// Chooses the execution provider and its settings, and adds features that
/// cannot be used to `fallbacks`.
fn choose(
    environment: &Environment,
    options: &OnnxOptions,
    fallbacks: &mut Vec<Fallback>,
) -> Result<Runtime, EngineError> {
    let of = |provider| runtime_of(environment.clone(), options, provider);
    let provider = match (options.provider, options.compiled_for) {
        (ProviderChoice::Cpu, _) | (ProviderChoice::Auto, Some(Provider::Cpu)) => Provider::Cpu,
        // Graphs for CUDA cannot fall back to the CPU.
        (ProviderChoice::Cuda, _) | (ProviderChoice::Auto, Some(Provider::Cuda)) => {
            probe(&of(Provider::Cuda)?)?;
            Provider::Cuda
        }
        (ProviderChoice::Auto, None) => match probe(&of(Provider::Cuda)?) {
            Ok(()) => Provider::Cuda,
            Err(error) => {
                tracing::info!(
                    %error,
                    "cannot use the CUDA execution provider; running on the CPU"
                );
                fallbacks.push(Fallback {
                    kind: FallbackKind::Cuda,
                    reason: error.to_string(),
                });
                Provider::Cpu
            }
        },
    };
    let mut runtime = of(provider)?;
    // Without a limit, each session on a GPU has an arena of its own, as is
    // usual.
    if provider == Provider::Cpu || options.gpu_memory_limit.is_some() {
        let limit = runtime.gpu_memory_limit;
        arena::share(environment, provider, runtime.device_id, limit).map_err(|error| {
            EngineError::NotLoaded(format!(
                "cannot create a memory arena for {}: {error}",
                provider.name()
            ))
        })?;
        runtime.shares_arena = true;
    }
    if runtime.shares_arena && runtime.cuda_graphs {
        // A captured run writes to the memory that it had when it was captured,
        // which the arena may have given to another graph since, even for its
        // weights.
        runtime.cuda_graphs = false;
        let reason = "with --gpu-memory-limit all graphs share their memory, but captured runs \
                      need memory of their own";
        tracing::warn!(
            reason,
            "cannot use CUDA graphs; launching kernels one by one"
        );
        fallbacks.push(Fallback {
            kind: FallbackKind::CudaGraphs,
            reason: reason.to_owned(),
        });
    }
    Ok(runtime)
}

/// Returns true if the execution provider `auto` means CUDA for these options.
///
/// # Errors
///
/// When ONNX Runtime cannot be used.
pub fn auto_takes_cuda(options: &OnnxOptions) -> Result<bool, EngineError> {
    if let Some(compiled_for) = options.compiled_for {
        return Ok(compiled_for == Provider::Cuda);
    }
    let environment = environment(&options.library)?;
    let cuda = runtime_of(environment, options, Provider::Cuda)?;
    Ok(probe(&cuda).is_ok())
}

/// Returns the settings of sessions on `provider` for these options.
fn runtime_of(
    environment: Environment,
    options: &OnnxOptions,
    provider: Provider,
) -> Result<Runtime, EngineError> {
    let (operators, residence) = if options.compiled_for.is_some() {
        // Compiled graphs share the weights of one file and compute from them
        // in place; packing would copy them for every graph.
        let operators = operators(&environment).map_err(runtime)?;
        (Some(operators), Residence::InPlace)
    } else {
        (None, Residence::Packed)
    };
    let is_cuda = provider == Provider::Cuda;
    Ok(Runtime {
        environment,
        provider,
        device_id: if is_cuda { options.device_id } else { 0 },
        operators,
        n_threads: options.intra_op_threads,
        residence,
        shares_arena: false,
        gpu_memory_limit: options.gpu_memory_limit.filter(|_| is_cuda),
        cuda_graphs: options.cuda_graphs && is_cuda,
        attention: GpuAttention::Auto,
    })
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
            .run(run, batch, &options, &mut self.span)
            .map_err(|error| failures.judge(error))
    }

    fn feed(&mut self, feed: &SlotFeed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        self.sequences
            .as_mut()
            .ok_or_else(|| no_graph(Graph::Generate))?
            .feed(feed, logits, &mut self.span)
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
mod tests {
    use super::*;
    use crate::model::Model;

    /// Returns the outcome of loading that fails with `failures`, and for each
    /// attempt whether it was captured.
    fn tried(
        wanted: bool,
        failures: Vec<EngineError>,
    ) -> (Result<Option<String>, String>, Vec<bool>) {
        let mut failures = failures.into_iter();
        let mut tries = Vec::new();
        let outcome = captured_or_not(wanted, |captured| {
            tries.push(captured);
            failures.next().map_or(Ok(()), Err)
        });
        let outcome = outcome.map(|refused| refused.map(|error| error.to_string()));
        (outcome.map_err(|error| error.to_string()), tries)
    }

    #[test]
    fn a_graph_that_cannot_be_captured_is_loaded_without() {
        let refusal = || EngineError::Runtime("no".to_owned());
        let text = refusal().to_string();
        assert_eq!(tried(true, vec![]), (Ok(None), vec![true]));
        assert_eq!(tried(false, vec![]), (Ok(None), vec![false]));
        let without = (Ok(Some(text.clone())), vec![true, false]);
        assert_eq!(tried(true, vec![refusal()]), without);
        // Loading that fails without CUDA graphs, too, has another reason,
        // which is reported.
        let other = EngineError::Runtime("never".to_owned());
        let never = (Err(other.to_string()), vec![true, false]);
        assert_eq!(tried(true, vec![refusal(), other]), never);
        assert_eq!(tried(false, vec![refusal()]), (Err(text), vec![false]));
        // A device that has failed fails again.
        let lost = || EngineError::Device("lost".to_owned());
        let told = (Err(lost().to_string()), vec![true]);
        assert_eq!(tried(true, vec![lost()]), told);
    }

    /// Loads the smallest model on the CPU.
    fn engine() -> OnnxEngine {
        OnnxEngine::load(&options(micro())).expect("an engine")
    }

    fn micro() -> Model {
        let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro");
        Model::open(&folder, None).expect("a model")
    }

    fn options(model: Model) -> OnnxOptions {
        OnnxOptions {
            library: find_library(None),
            provider: ProviderChoice::Cpu,
            device_id: 0,
            intra_op_threads: 1,
            positions: model.positions(),
            n_colors: model.clusters.len(),
            sizes_are_given: true,
            n_labels: 0,
            head_widths: Vec::new(),
            compiled_for: None,
            precision: None,
            graphs: model.graphs,
            files: model.files,
            buckets: Buckets::powers_of_two(1),
            generate_slots: 0,
            generate_bytes_max: 0,
            gpu_memory_limit: None,
            cuda_graphs: false,
            generate_attention: GpuAttention::Auto,
        }
    }

    #[test]
    fn an_idle_check_waits_until_nobody_captures() {
        static LOCK: CaptureLock = CaptureLock::new();
        let mut engine = engine();
        assert_eq!(engine.captures.map(|_| ()), None, "a CPU captures nothing");
        engine.captures = Some(&LOCK);
        assert_eq!(engine.canary().expect("a check"), CanaryOutcome::Answered);
        // From now on every check fails that is run at all.
        if let Some(canary) = &mut engine.canary {
            canary.answer.fill(9.0);
        }
        engine.canary().expect_err("another answer is known");
        let capturing = LOCK.alone();
        assert_eq!(engine.canary().expect("no run"), CanaryOutcome::Skipped);
        drop(capturing);
        engine.canary().expect_err("nobody captures");
    }

    #[test]
    fn an_engine_that_may_capture_loads_alone() {
        let cuda = OnnxOptions {
            provider: ProviderChoice::Cuda,
            cuda_graphs: true,
            ..options(micro())
        };
        assert!(may_capture(&cuda));
        let without = |change: fn(&mut OnnxOptions)| {
            let mut options = cuda.clone();
            change(&mut options);
            may_capture(&options)
        };
        assert!(!without(|options| options.provider = ProviderChoice::Cpu));
        assert!(!without(|options| options.cuda_graphs = false));
        assert!(!without(|options| options.gpu_memory_limit = Some(1)));
        assert!(!without(
            |options| options.compiled_for = Some(Provider::Cpu)
        ));
        assert!(without(|options| options.provider = ProviderChoice::Auto));
    }

    #[test]
    fn an_answer_that_moved_is_noticed() {
        assert!(distance(&[1.0, 2.0], &[1.0, 2.0]) <= CANARY_TOLERANCE);
        assert!(distance(&[1.0, 2.1], &[1.0, 2.0]) > CANARY_TOLERANCE);
        assert!(distance(&[f32::NAN], &[1.0]).is_infinite());
        assert!(distance(&[], &[1.0]).is_infinite());
    }
}
