//! ONNX Runtime behind the [`Engine`] trait.
//!
//! The runtime is a shared library that is loaded when the worker starts, so
//! one binary serves CPU and GPU. Graphs are taken as exporters left them:
//! inputs are bound by name and in the integer type that the graph declares,
//! an attention mask is filled with ones and position ids with 0, 1, 2 and so
//! on. After loading, one warm-up run with every token id in it proves that
//! the graph takes the model's vocabulary and returns the shape it promised.

mod sequences;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use ort::environment::Environment;
use ort::session::builder::SessionBuilder;
use ort::session::{RunOptions, Session, SessionInputValue};
use ort::value::{DynTensor, Outlet, Shape, Tensor, TensorElementType, ValueType};

use self::sequences::SequenceEngine;
use super::runtime::{Residence, Runtime, operators};
use super::{Buckets, Engine, EngineError, Facts, Feed, Graph, Row, Run, Stop, Warm};
use crate::compile;
use crate::job::{Layers, Want};

/// The library's file name as distributors install it.
pub const LIBRARY: &str = "libonnxruntime.so";
/// Where the project's own set-up puts it, beside the build.
pub const LIBRARY_FOLDER: &str = "onnxruntime";

/// What runs the graphs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Provider {
    /// CUDA if it can be had, else the CPU, and the log says which.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU; the worker does not start without one.
    Cuda,
}

/// All that an engine is made from.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where the runtime's library is.
    pub library: PathBuf,
    pub provider: Provider,
    /// Which GPU.
    pub device_id: i32,
    /// Threads of one run; 0 lets the runtime take one a physical core.
    pub intra_op_threads: usize,
    pub graphs: BTreeMap<Graph, PathBuf>,
    /// Tokens of one row.
    pub positions: usize,
    /// Colors of the palette; the start token is the next id.
    pub n_colors: usize,
    /// Whether config.json gives the vocabulary and the positions. If not,
    /// trial runs find out whether the graph has more than the palette and the
    /// size say.
    pub sizes_are_given: bool,
    /// Classes that config.json names; 0 if it names none.
    pub n_labels: usize,
    /// Width of the features that each linear head was trained on, with its
    /// name to say if it does not fit.
    pub head_widths: Vec<(usize, String)>,
    /// What the graphs were compiled for; `None` for a published export.
    pub compiled_for: Option<compile::Provider>,
    /// The batch sizes; the warm-up runs at each, so that no caller's batch is
    /// the first of its size.
    pub buckets: Buckets,
    /// Images that are generated at one time; 0 for none.
    pub generate_slots: usize,
    /// What their keys and values may take.
    pub generate_bytes_max: usize,
}

/// See the module.
pub struct OnnxEngine {
    facts: Facts,
    graphs: BTreeMap<Graph, Loaded>,
    positions: usize,
    /// The id after the last color.
    start: u16,
    sequences: Option<SequenceEngine>,
    warm: Vec<Warm>,
    canary: Option<Canary>,
}

/// A row whose answer is known.
struct Canary {
    graph: Graph,
    bucket: usize,
    want: Want,
    tokens: Vec<u16>,
    answer: Vec<f32>,
}

/// How far a known answer may move: a device may add in another order from run
/// to run, but not more than that.
const CANARY_TOLERANCE: f64 = 1e-2;

/// A warm-up run that takes less than this is done twice.
const WARM_TWICE: Duration = Duration::from_millis(500);

/// A graph with what binding it needs.
struct Loaded {
    file: String,
    session: Session,
    inputs: Vec<Input>,
    output: String,
}

struct Input {
    name: String,
    role: Role,
    integer: Integer,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    InputIds,
    AttentionMask,
    PositionIds,
    Targets,
}

#[derive(Clone, Copy)]
enum Integer {
    Int32,
    Int64,
}

/// ONNX Runtime allows one environment a process and forgets it when its last
/// user goes, after which no other can be made: so the first stays.
static ENVIRONMENT: Mutex<Option<Environment>> = Mutex::new(None);

/// What to do about the library.
const LIBRARY_HINT: &str = "give the path of a libonnxruntime.so of version 1.24 or newer by \
                            --onnxruntime or ORT_DYLIB_PATH, or run `make setup`";

/// The process's environment, made from `library` the first time.
///
/// # Errors
///
/// When the library is missing or of another version; the text says what to
/// do.
pub fn environment(library: &Path) -> Result<Environment, EngineError> {
    let mut environment = ENVIRONMENT
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if let Some(environment) = &*environment {
        return Ok(environment.clone());
    }
    // The dynamic linker's own complaint does not get through.
    if library.components().count() > 1 && !library.is_file() {
        return Err(EngineError::Library(format!(
            "{} is not there; {LIBRARY_HINT}",
            library.display()
        )));
    }
    let built = ort::init_from(library)
        .map_err(|error| {
            EngineError::Library(format!(
                "{} cannot be used as ONNX Runtime: {error}; {LIBRARY_HINT}",
                library.display()
            ))
        })?
        .with_name("imagegpt")
        .with_telemetry(false)
        .build()
        .map_err(runtime)?;
    Ok(environment.insert(built).clone())
}

fn runtime(error: impl std::fmt::Display) -> EngineError {
    EngineError::Runtime(error.to_string())
}

/// Finds the library: `given`, else beside the running program or up to two
/// folders above it (where a build and its tests run), else by its bare name,
/// which leaves the search to the dynamic linker.
#[must_use]
pub fn find_library(given: Option<&Path>) -> PathBuf {
    if let Some(path) = given {
        return path.to_owned();
    }
    let program = std::env::current_exe().unwrap_or_default();
    program
        .ancestors()
        .skip(1)
        .take(3)
        .flat_map(|folder| {
            [
                folder.join(LIBRARY),
                folder.join(LIBRARY_FOLDER).join(LIBRARY),
            ]
        })
        .find(|path| path.is_file())
        .unwrap_or_else(|| PathBuf::from(LIBRARY))
}

impl OnnxEngine {
    /// Loads every graph and runs each once.
    ///
    /// # Errors
    ///
    /// When the library, the execution provider or a graph cannot be used;
    /// each text says what to change.
    pub fn load(options: &Options) -> Result<Self, EngineError> {
        let environment = environment(&options.library)?;
        let cuda = runtime_of(environment.clone(), options, compile::Provider::Cuda)?;
        let cpu = runtime_of(environment, options, compile::Provider::Cpu)?;
        let runtime = match (options.provider, options.compiled_for) {
            (Provider::Cpu, _) | (Provider::Auto, Some(compile::Provider::Cpu)) => cpu,
            (Provider::Cuda, _) => cuda,
            (Provider::Auto, _) => match builder(&cuda) {
                Ok(_) => cuda,
                Err(error) => {
                    tracing::info!(%error, "no CUDA execution provider; running on the CPU");
                    cpu
                }
            },
        };
        check_compiled_for(options.compiled_for, runtime.provider)?;
        let mut engine = Self {
            facts: Facts {
                provider: provider_name(runtime.provider),
                runtime_version: version(&options.library),
                dimension: 0,
                n_classes: 0,
                sequences: None,
            },
            graphs: BTreeMap::new(),
            positions: options.positions,
            start: u16::try_from(options.n_colors).unwrap_or(u16::MAX),
            sequences: None,
            warm: Vec::new(),
            canary: None,
        };
        for (&graph, path) in &options.graphs {
            if graph == Graph::Generate {
                engine.load_sequences(&runtime, path, options)?;
                continue;
            }
            let loaded = Loaded::open(builder(&runtime)?, graph, path)?;
            engine.graphs.insert(graph, loaded);
            engine.warm_up(graph, options)?;
        }
        Ok(engine)
    }

    fn load_sequences(
        &mut self,
        runtime: &Runtime,
        path: &Path,
        options: &Options,
    ) -> Result<(), EngineError> {
        if options.generate_slots == 0 {
            return Ok(());
        }
        let sizes = sequences::Options {
            n_slots: options.generate_slots,
            bytes_max: options.generate_bytes_max,
            positions: options.positions,
            n_colors: options.n_colors,
        };
        let mut sequences = SequenceEngine::load(runtime, path, sizes)?;
        self.warm.extend(sequences.warm_up()?);
        self.facts.sequences = Some(sequences.facts);
        self.sequences = Some(sequences);
        Ok(())
    }

    /// Proves that the graph takes every token id and learns its width.
    fn warm_up(&mut self, graph: Graph, options: &Options) -> Result<(), EngineError> {
        // The start token is never what comes next.
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
        let row = Row {
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
        for bucket in options.buckets.iter() {
            let run = Run {
                graph,
                bucket,
                rows: &[row],
            };
            let mut started = Instant::now();
            let first = self.run(&run, &Stop::default());
            let values = match first {
                // The first run of a size allocates and tunes; sizes are chosen
                // by what comes after. Where a run takes long that is little of
                // it, and another would cost more than it tells.
                Ok(_) if started.elapsed() < WARM_TWICE => {
                    started = Instant::now();
                    self.run(&run, &Stop::default())
                }
                first => first,
            }
            .map_err(|error| {
                refuse(format!(
                    "a trial run of {bucket} images with every token id (0 to {}) failed, so the \
                     graph does not fit the palette or the positions, or memory does not suffice: \
                     {error}",
                    n_ids - 1
                ))
            })?;
            self.warm.push(Warm {
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
            self.check_sizes(graph, options.n_colors)?;
        }
        match graph {
            Graph::Features(_) | Graph::Hidden => {
                let mut heads = options.head_widths.iter();
                if let Some((expected, head)) = heads.find(|(expected, _)| *expected != width) {
                    return Err(refuse(format!(
                        "features have {width} numbers, but the head {head} was trained on \
                         {expected}"
                    )));
                }
                self.facts.dimension = width;
            }
            Graph::Logits => {
                if options.n_labels != 0 && options.n_labels != width {
                    return Err(refuse(format!(
                        "the head has {width} classes, but config.json names {}",
                        options.n_labels
                    )));
                }
                self.facts.n_classes = width;
            }
            Graph::Score | Graph::Generate => {}
        }
        Ok(())
    }

    /// Refuses a graph that takes a token id beyond the start token, or a
    /// position beyond the last: then the palette or the size is another
    /// model's, and answers would look right and be wrong. A CPU says so by
    /// failing; a GPU would not.
    fn check_sizes(&mut self, graph: Graph, n_colors: usize) -> Result<(), EngineError> {
        let positions = self.positions;
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
            let row = Row {
                tokens: &tokens,
                want: Want::Mean,
            };
            let mut feeds = Vec::new();
            for input in &loaded.inputs {
                let feed = feed(input, &[row], 1, tokens.len(), None)?;
                feeds.push((input.name.as_str(), feed));
            }
            if loaded.session.run(feeds).is_ok() {
                return Err(EngineError::Graph {
                    file: loaded.file.clone(),
                    reason: format!(
                        "takes {what}, so preprocessor_config.json is another model's; put the \
                         model's config.json beside it if that is meant"
                    ),
                });
            }
        }
        Ok(())
    }
}

fn no_graph(graph: Graph) -> EngineError {
    EngineError::Runtime(format!("no graph {} is loaded", graph.label()))
}

/// Graphs that were compiled for one provider are slow on another or do not
/// run there.
fn check_compiled_for(
    compiled_for: Option<compile::Provider>,
    provider: compile::Provider,
) -> Result<(), EngineError> {
    match compiled_for {
        Some(made) if made != provider => {
            let (made, given) = (provider_name(made), provider_name(provider));
            Err(EngineError::Provider(format!(
                "the model was compiled for {made} and cannot run on {given}; compile it with \
                 --provider {given}, or serve it with --execution-provider {made}"
            )))
        }
        _ => Ok(()),
    }
}

fn provider_name(provider: compile::Provider) -> &'static str {
    match provider {
        compile::Provider::Cpu => "cpu",
        compile::Provider::Cuda => "cuda",
    }
}

/// How sessions are opened for these options.
fn runtime_of(
    environment: Environment,
    options: &Options,
    provider: compile::Provider,
) -> Result<Runtime, EngineError> {
    let (operators, residence) = if options.compiled_for.is_some() {
        // Compiled graphs share one file of weights and compute from where it
        // is mapped; packing would copy them for every graph.
        (Some(operators().map_err(runtime)?), Residence::Mapped)
    } else {
        (None, Residence::Packed)
    };
    Ok(Runtime {
        environment,
        provider,
        device_id: options.device_id,
        operators,
        n_threads: options.intra_op_threads,
        residence,
    })
}

/// A session's options, or what to do when the provider cannot be had.
fn builder(runtime: &Runtime) -> Result<SessionBuilder, EngineError> {
    runtime.builder().map_err(|error| match runtime.provider {
        compile::Provider::Cpu => self::runtime(error),
        compile::Provider::Cuda => EngineError::Provider(format!(
            "the CUDA execution provider cannot be used: {error}; it needs onnxruntime-gpu's \
             library by --onnxruntime and CUDA's libraries on LD_LIBRARY_PATH; or choose \
             --execution-provider cpu"
        )),
    })
}

/// The library's version: from its file's name (`libonnxruntime.so.1.31.1`),
/// where links lead to it, else as far as the library itself tells.
fn version(library: &Path) -> String {
    let file = std::fs::canonicalize(library).unwrap_or_default();
    let name = file.file_name().unwrap_or_default().to_string_lossy();
    match name.split_once(".so.") {
        Some((_, version)) => version.to_owned(),
        None => ort::util::probe(library)
            .map_or_else(|| "unknown".to_owned(), |minor| format!("1.{minor}")),
    }
}

impl Loaded {
    fn open(mut builder: SessionBuilder, graph: Graph, path: &Path) -> Result<Self, EngineError> {
        let file = path.display().to_string();
        let refuse = |reason: String| EngineError::Graph {
            file: file.clone(),
            reason,
        };
        let session = builder
            .commit_from_file(path)
            .map_err(|error| refuse(format!("not a graph that ONNX Runtime can load: {error}")))?;
        let mut inputs = Vec::new();
        for outlet in session.inputs() {
            let role = match outlet.name() {
                "input_ids" => Role::InputIds,
                "attention_mask" => Role::AttentionMask,
                "position_ids" => Role::PositionIds,
                "targets" if graph == Graph::Score => Role::Targets,
                other => {
                    return Err(refuse(format!(
                        "has an input {other:?}; input_ids, attention_mask and position_ids are \
                         known"
                    )));
                }
            };
            let integer = match outlet.dtype() {
                ValueType::Tensor {
                    ty: TensorElementType::Int64,
                    ..
                } => Integer::Int64,
                ValueType::Tensor {
                    ty: TensorElementType::Int32,
                    ..
                } => Integer::Int32,
                other => {
                    return Err(refuse(format!(
                        "input {:?} is {other:?}; int32 and int64 tensors are supported",
                        outlet.name()
                    )));
                }
            };
            inputs.push(Input {
                name: outlet.name().to_owned(),
                role,
                integer,
            });
        }
        if !inputs.iter().any(|input| input.role == Role::InputIds) {
            return Err(refuse("has no input \"input_ids\"".to_owned()));
        }
        let wanted = match graph {
            Graph::Features(_) => "features",
            Graph::Hidden => "last_hidden_state",
            Graph::Logits | Graph::Generate => "logits",
            Graph::Score => "nll",
        };
        let Some(output) = session
            .outputs()
            .iter()
            .find(|outlet| outlet.name() == wanted)
        else {
            let names: Vec<&str> = session.outputs().iter().map(Outlet::name).collect();
            return Err(refuse(format!(
                "has no output {wanted:?}; it has {}",
                names.join(", ")
            )));
        };
        if output.dtype().tensor_type() != Some(TensorElementType::Float32) {
            return Err(refuse(format!(
                "output {wanted:?} is {:?}; a float32 tensor is supported",
                output.dtype()
            )));
        }
        let output = wanted.to_owned();
        Ok(Self {
            file,
            session,
            inputs,
            output,
        })
    }
}

impl Engine for OnnxEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn warm(&self) -> &[Warm] {
        &self.warm
    }

    fn run(&mut self, run: &Run<'_>, stop: &Stop) -> Result<Vec<Vec<f32>>, EngineError> {
        let positions = self.positions;
        let loaded = self
            .graphs
            .get_mut(&run.graph)
            .ok_or_else(|| no_graph(run.graph))?;
        let mut feeds = Vec::with_capacity(loaded.inputs.len());
        for input in &loaded.inputs {
            let start = (run.graph == Graph::Score).then_some(self.start);
            let feed = feed(input, run.rows, run.bucket, positions, start)?;
            feeds.push((input.name.as_str(), feed));
        }
        let options = Arc::new(RunOptions::new().map_err(runtime)?);
        let terminate = Arc::clone(&options);
        stop.arm(Box::new(move || {
            // It fails for options that have gone, and these have not.
            let _ = terminate.terminate();
        }));
        let outputs = loaded
            .session
            .run_with_options(feeds, &*options)
            .map_err(|error| run_failed(&error.to_string()))?;
        let output = outputs
            .get(&loaded.output)
            .ok_or_else(|| EngineError::Runtime("the run returned no output".to_owned()))?;
        let (shape, values) = output.try_extract_tensor::<f32>().map_err(runtime)?;
        answers(run, positions, shape, values)
    }

    fn feed(&mut self, feed: &Feed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        self.sequences
            .as_mut()
            .ok_or_else(|| no_graph(Graph::Generate))?
            .feed(feed, logits)
    }

    fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool {
        let sequences = self.sequences.as_mut();
        sequences.is_some_and(|sequences| sequences.copy_slot(from, to, n))
    }

    fn canary(&mut self) -> Result<(), EngineError> {
        let Some(canary) = self.canary.take() else {
            return Ok(());
        };
        let row = Row {
            tokens: &canary.tokens,
            want: canary.want,
        };
        let run = Run {
            graph: canary.graph,
            bucket: canary.bucket,
            rows: &[row],
        };
        let got = self.run(&run, &Stop::default());
        let expected = canary.answer.clone();
        self.canary = Some(canary);
        let got = got?.into_iter().next().unwrap_or_default();
        let moved = distance(&got, &expected);
        if moved <= CANARY_TOLERANCE {
            Ok(())
        } else {
            Err(EngineError::Output {
                got: format!("an answer {moved:.3} of its length from the known one"),
                expected: "the known one".to_owned(),
            })
        }
    }
}

/// ‖a − b‖ / ‖b‖; infinite where an answer is unusable.
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

/// What the runtime says when memory does not suffice, in lower case.
const OUT_OF_MEMORY: [&str; 6] = [
    "out of memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "smaller than requested bytes",
    "alloc_failed",
];

/// What it says when the device or its context is lost: CUDA's errors that
/// every later call repeats.
const DEVICE_FAILED: [&str; 11] = [
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "uncorrectable",
    "device is lost",
    "gpu is lost",
    "execution_failed",
    "driver shutting down",
];

/// What kind of failure a run's error text tells of; the runtime has no codes
/// for them.
fn run_failed(text: &str) -> EngineError {
    let lower = text.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if says(&DEVICE_FAILED) {
        EngineError::Device(text.to_owned())
    } else if says(&OUT_OF_MEMORY) {
        EngineError::OutOfMemory(text.to_owned())
    } else {
        EngineError::Runtime(text.to_owned())
    }
}

/// One input tensor of [bucket, positions]; rows that are missing repeat the
/// last one, which is as cheap as any and has valid tokens. With a start token
/// it comes first, and the last token is not fed: it is only a target.
fn feed(
    input: &Input,
    rows: &[Row<'_>],
    bucket: usize,
    positions: usize,
    start: Option<u16>,
) -> Result<SessionInputValue<'static>, EngineError> {
    let shape = [bucket, positions];
    let padding = rows.last().into_iter().cycle();
    let padded = rows.iter().chain(padding).take(bucket);
    let values = padded.flat_map(|row| {
        (0..positions).map(move |position| match input.role {
            Role::InputIds => i32::from(match (start, position) {
                (Some(start), 0) => start,
                (Some(_), position) => row.tokens[position - 1],
                (None, position) => row.tokens[position],
            }),
            Role::Targets => i32::from(row.tokens[position]),
            Role::AttentionMask => 1,
            Role::PositionIds => i32::try_from(position).unwrap_or(i32::MAX),
        })
    });
    let tensor: DynTensor = match input.integer {
        Integer::Int32 => Tensor::from_array((shape, values.collect::<Vec<i32>>()))
            .map_err(runtime)?
            .upcast(),
        Integer::Int64 => {
            let values = values.map(i64::from).collect::<Vec<i64>>();
            Tensor::from_array((shape, values))
                .map_err(runtime)?
                .upcast()
        }
    };
    Ok(tensor.into())
}

/// Cuts a run's output into the wanted numbers of each row. Pooling happens
/// here, next to the runtime's memory, so that of a row's states (2 MiB for
/// imagegpt-small) only the vector is copied out.
fn answers(
    run: &Run<'_>,
    positions: usize,
    shape: &Shape,
    values: &[f32],
) -> Result<Vec<Vec<f32>>, EngineError> {
    let dims: Vec<usize> = shape
        .iter()
        .map(|&dim| usize::try_from(dim).unwrap_or(0))
        .collect();
    let &Run {
        graph,
        bucket,
        rows,
    } = run;
    let row_len = match (graph, dims.as_slice()) {
        (Graph::Hidden, &[n_rows, n_positions, width])
            if n_rows == bucket && n_positions == positions && width > 0 =>
        {
            n_positions * width
        }
        (Graph::Features(_), &[n_rows, n_layers, width])
            if n_rows == bucket && n_layers > 0 && width > 0 =>
        {
            n_layers * width
        }
        (Graph::Logits, &[n_rows, n_classes]) if n_rows == bucket && n_classes > 0 => n_classes,
        (Graph::Score, &[n_rows, n_positions]) if n_rows == bucket && n_positions == positions => {
            n_positions
        }
        _ => {
            return Err(EngineError::Output {
                got: format!("shape {dims:?}"),
                expected: match graph {
                    Graph::Features(_) => format!("[{bucket}, layers, width]"),
                    Graph::Hidden => format!("[{bucket}, {positions}, width]"),
                    Graph::Logits => format!("[{bucket}, classes]"),
                    Graph::Score | Graph::Generate => format!("[{bucket}, {positions}]"),
                },
            });
        }
    };
    let width = dims.last().copied().unwrap_or(0);
    rows.iter()
        .zip(values.chunks_exact(row_len))
        .map(|(row, values)| match row.want {
            Want::Features { layers, .. } => pick(values, width, layers),
            Want::States | Want::Logits | Want::Nll => Ok(values.to_vec()),
            Want::Last => Ok(values[row_len - width..].to_vec()),
            Want::Mean => Ok(mean(values, width)),
        })
        .collect()
}

/// The features of some layers out of those of all.
fn pick(values: &[f32], width: usize, layers: Layers) -> Result<Vec<f32>, EngineError> {
    let mut picked = Vec::with_capacity(layers.len() * width);
    for layer in layers.iter() {
        let features = values.get(layer * width..(layer + 1) * width);
        picked.extend_from_slice(features.ok_or_else(|| EngineError::Output {
            got: format!("{} layers", values.len() / width),
            expected: format!("layer {layer}"),
        })?);
    }
    Ok(picked)
}

/// Mean over positions, summed in f64 so that the order of summation does not
/// show in f32.
fn mean(states: &[f32], width: usize) -> Vec<f32> {
    let mut sums = vec![0.0_f64; width];
    let states = states.chunks_exact(width);
    #[expect(clippy::cast_precision_loss, reason = "positions are at most 2^16")]
    let n_states = states.len() as f64;
    for state in states {
        for (sum, &value) in sums.iter_mut().zip(state) {
            *sum += f64::from(value);
        }
    }
    #[expect(
        clippy::cast_possible_truncation,
        reason = "the answer is f32, rounded once"
    )]
    sums.iter().map(|sum| (sum / n_states) as f32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_mean_is_over_positions() {
        assert_eq!(mean(&[1.0, 10.0, 3.0, 30.0], 2), [2.0, 20.0]);
    }

    #[test]
    fn answers_are_cut_by_what_each_row_wants() {
        let rows = [Want::Mean, Want::Last, Want::States].map(|want| Row {
            tokens: &[0, 1],
            want,
        });
        let values: Vec<f32> = (0..16_u8).map(f32::from).collect();
        // The fourth row is padding.
        let run = Run {
            graph: Graph::Hidden,
            bucket: 4,
            rows: &rows,
        };
        let got = answers(&run, 2, &Shape::new([4, 2, 2]), &values).expect("fits");
        assert_eq!(
            got,
            [vec![1.0, 2.0], vec![6.0, 7.0], vec![8.0, 9.0, 10.0, 11.0]]
        );
    }

    #[test]
    fn another_shape_is_refused() {
        let rows = [Row {
            tokens: &[0, 1],
            want: Want::Mean,
        }];
        let run = Run {
            graph: Graph::Hidden,
            bucket: 1,
            rows: &rows,
        };
        let error = answers(&run, 2, &Shape::new([1, 3, 2]), &[0.0; 6])
            .expect_err("three positions are not two");
        assert_eq!(
            error.to_string(),
            "the model returned shape [1, 3, 2], not [1, 2, width]"
        );
    }

    #[test]
    fn failures_are_told_apart_by_their_words() {
        let check = |text, expected: &str| {
            let kind = match run_failed(text) {
                EngineError::Device(_) => "device",
                EngineError::OutOfMemory(_) => "memory",
                EngineError::Runtime(_) => "run",
                other => panic!("{other:?}"),
            };
            assert_eq!(kind, expected, "{text}");
        };
        check(
            "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
            "device",
        );
        check("CUDA failure 719: unspecified launch failure", "device");
        check(
            "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED",
            "device",
        );
        check("CUDA failure 2: out of memory ; GPU=0", "memory");
        check(
            "Available memory of 12 is smaller than requested bytes of 999",
            "memory",
        );
        check(
            "Failed to allocate memory for requested buffer of size 1",
            "memory",
        );
        check("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", "memory");
        check("Non-zero status code returned while running Gather", "run");
    }

    #[test]
    fn an_answer_that_moved_is_noticed() {
        assert!(distance(&[1.0, 2.0], &[1.0, 2.0]) <= CANARY_TOLERANCE);
        assert!(distance(&[1.0, 2.1], &[1.0, 2.0]) > CANARY_TOLERANCE);
        assert!(distance(&[f32::NAN], &[1.0]).is_infinite());
        assert!(distance(&[], &[1.0]).is_infinite());
    }

    #[test]
    fn a_given_library_is_taken_as_it_is() {
        assert_eq!(
            find_library(Some(Path::new("/x/y.so"))),
            Path::new("/x/y.so")
        );
    }
}
