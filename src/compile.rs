//! From a checkpoint to graphs that run several times faster.
//!
//! ```text
//!   source ─▶ checkpoint ─▶ weights ─┬─▶ store (weights.bin) ─▶ graphs ─┐
//!                                    └─▶ reference (float64) ───────────┴─▶ verify ─▶ manifest
//! ```
//!
//! Everything is made in a folder beside the output, tried there, and moved
//! into place at once; so a folder with a manifest is whole and was tried.
//! Nothing here knows of requests, and no Python runs.

pub mod cache;
pub(crate) mod checkpoint;
pub(crate) mod error;
pub(crate) mod graph;
pub mod hub;
pub(crate) mod options;
pub(crate) mod random;
pub(crate) mod reference;
pub(crate) mod source;
mod stage;
pub(crate) mod store;
pub(crate) mod verify;
pub(crate) mod weights;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use prost::Message;
use sha2::{Digest as _, Sha256};

use self::checkpoint::Checkpoint;
use self::graph::{Attention, GraphPlan};
use self::source::Local;
use self::stage::StagingFolder;
use self::store::{Parts, WeightLayout};
use self::verify::{Nearness, Trial};
use self::weights::CheckpointWeights;
use crate::files::hex;
use crate::model::architecture::Architecture;
use crate::model::graph::Graph;
use crate::model::manifest::{GraphFacts, Manifest, SourceFacts};
use crate::model::onnx::DataType;
use crate::model::precision::{CompileTask, Precision, Provider};
use crate::model::{architecture, manifest};
use crate::runtime::{Operators, Runtime};

pub use self::error::CompileError;
pub use self::options::CompileOptions;
pub use self::source::ModelSource;

/// What a compilation is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompileStep {
    /// In bytes.
    Download,
    /// Of the source, in bytes.
    Digest,
    /// Of `weights.bin`, in parameters.
    Write,
    /// In parameters.
    Reference,
    /// In graphs.
    Verify,
}

/// Is told how far a compilation is.
pub trait CompileProgress {
    /// A step begins that will take `total` units.
    fn begin(&mut self, step: CompileStep, total: u64);
    /// So many units more are done.
    fn advance(&mut self, units: u64);
}

/// Tells no one.
pub struct Silent;

impl CompileProgress for Silent {
    fn begin(&mut self, _step: CompileStep, _total: u64) {}
    fn advance(&mut self, _units: u64) {}
}

/// Makes the folder `output` from `source`, or nothing.
///
/// # Errors
///
/// When the source is not an ImageGPT that fits `options`, when a graph does
/// not do what it should, or when `output` exists or cannot be written.
///
/// # Panics
///
/// If the manifest cannot be turned into JSON, which it always can.
pub fn compile(
    source: &ModelSource,
    output: &Path,
    options: &CompileOptions,
    runtime: &Runtime,
    progress: &mut dyn CompileProgress,
) -> Result<Manifest, CompileError> {
    let fetched = Fetched {
        source,
        local: source.fetch(progress)?,
        sha256: None,
    };
    compile_fetched(fetched, output, options, runtime, progress)
}

/// A source that is on this machine.
struct Fetched<'a> {
    source: &'a ModelSource,
    local: Local,
    /// The weights' digest, where they have been read already.
    sha256: Option<String>,
}

fn compile_fetched(
    fetched: Fetched<'_>,
    output: &Path,
    options: &CompileOptions,
    runtime: &Runtime,
    progress: &mut dyn CompileProgress,
) -> Result<Manifest, CompileError> {
    let Fetched {
        source,
        local,
        sha256,
    } = fetched;
    let architecture = Architecture::read(&local.folder)?;
    let checkpoint = Checkpoint::open(&local.folder)?;
    let weights = CheckpointWeights::new(&checkpoint, architecture);
    let tasks = tasks(&weights, options)?;
    let feature_layer = feature_layer(&weights.architecture, options)?;
    options.check(runtime)?;
    let mut kinds: Vec<(CompileTask, Graph)> = Vec::new();
    for task in &tasks {
        kinds.extend(Graph::of_task(*task).iter().map(|kind| (*task, *kind)));
    }
    let n_layers = kinds
        .iter()
        .map(|(_, kind)| kind.n_layers(&weights.architecture, feature_layer))
        .max()
        .unwrap_or(0);
    let stage = StagingFolder::new(output)?;

    let sha256 = match sha256 {
        Some(known) => known,
        None => digest(&checkpoint, progress)?,
    };

    let layer_parameters = weights.architecture.layer_parameters() * n_layers;
    progress.begin(CompileStep::Write, layer_parameters as u64);
    let parts = Parts {
        n_layers,
        language_head: tasks.contains(&CompileTask::Score)
            || tasks.contains(&CompileTask::Generate),
        classification_head: tasks.contains(&CompileTask::Classify),
        layout: layout(&tasks, options, runtime),
    };
    let advance = |parameters| progress.advance(parameters);
    let store = store::write(&weights, options.precision, parts, stage.folder(), advance)?;

    progress.begin(CompileStep::Reference, layer_parameters as u64);
    let advance = |parameters| progress.advance(parameters);
    let trial = Trial::new(&weights, &tasks, n_layers, advance)?;

    let plan = |kind| GraphPlan {
        architecture: &weights.architecture,
        store: &store,
        precision: options.precision,
        provider: options.provider,
        attention: attention(kind, options, runtime),
        has_ours: runtime.operators.is_some(),
        feature_layer,
    };
    let graphs = graphs(&kinds, plan, &stage, &trial, runtime, progress)?;

    for name in [architecture::FILE, source::PREPROCESSOR] {
        stage.copy(&local.folder.join(name))?;
    }
    let files = stage.files()?;
    let manifest = Manifest {
        format: manifest::FORMAT,
        tool_version: env!("CARGO_PKG_VERSION").to_owned(),
        source: SourceFacts {
            name: source.to_string(),
            revision: local.revision,
            sha256,
        },
        precision: options.precision,
        provider: options.provider,
        tasks,
        feature_layer,
        parameters: weights.n_parameters(),
        n_classes: weights.n_classes,
        graphs,
        verification: manifest::Verification {
            provider: runtime.provider,
            tolerance: options.precision.tolerance(),
            n_sequences: verify::N_SEQUENCES,
            n_positions: trial.n_positions(),
        },
        sha256: stage.sha256(files.keys())?,
        files,
        architecture: weights.architecture.clone(),
    };
    let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    stage.write(manifest::FILE, &text)?;
    stage.commit()?;
    Ok(manifest)
}

/// How weights lie in their file for the graphs that read them.
fn layout(tasks: &[CompileTask], options: &CompileOptions, runtime: &Runtime) -> WeightLayout {
    if options.provider == Provider::Cuda {
        WeightLayout::Apart
    } else if options.precision == Precision::Int8
        && tasks.contains(&CompileTask::Generate)
        && attention(Graph::Generate, options, runtime) == Attention::GroupQuery
    {
        WeightLayout::WithBlocks
    } else {
        WeightLayout::Plain
    }
}

/// The compiled folder of `source` in the folder `cache`, made if it is not
/// there: for serving a source as it is.
///
/// It is found again by the weights' digest, the options and this version.
/// Two processes may make it at once; the one that ends later takes what the
/// other made.
///
/// # Errors
///
/// As for [`compile`].
pub fn compile_cached(
    source: &ModelSource,
    cache: &Path,
    options: &CompileOptions,
    runtime: &Runtime,
    progress: &mut dyn CompileProgress,
) -> Result<(PathBuf, Manifest), CompileError> {
    let local = source.fetch(progress)?;
    let checkpoint = Checkpoint::open(&local.folder)?;
    let sha256 = digest(&checkpoint, progress)?;
    // The palette is copied into the folder, so another one is another folder.
    let preprocessor = local.folder.join(source::PREPROCESSOR);
    let preprocessor = architecture::read(&preprocessor)?;
    let mut hash = Sha256::new();
    hash.update(&sha256);
    hash.update(&preprocessor);
    let key = hex(&hash.finalize());
    let folder = cache.join(options.cache_key(&key, runtime));
    if let Ok(manifest) = Manifest::read(&folder) {
        return Ok((folder, manifest));
    }
    // Folders appear whole, so what cannot be read has been damaged since.
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|error| CompileError::write(&folder, &error))?;
    }
    let fetched = Fetched {
        source,
        local,
        sha256: Some(sha256),
    };
    match compile_fetched(fetched, &folder, options, runtime, progress) {
        Ok(manifest) => Ok((folder, manifest)),
        Err(error) => match Manifest::read(&folder) {
            Ok(manifest) => Ok((folder, manifest)),
            Err(_) => Err(error),
        },
    }
}

/// Writes and tries each graph, by the name of its file.
fn graphs<'a>(
    kinds: &[(CompileTask, Graph)],
    plan: impl Fn(Graph) -> GraphPlan<'a>,
    stage: &StagingFolder,
    trial: &Trial,
    runtime: &Runtime,
    progress: &mut dyn CompileProgress,
) -> Result<BTreeMap<String, GraphFacts>, CompileError> {
    progress.begin(CompileStep::Verify, kinds.len() as u64);
    let mut graphs = BTreeMap::new();
    for &(task, kind) in kinds {
        let (plan, judgment) = build(kind, plan(kind), stage, trial, runtime)?;
        let facts = trial.facts(kind, task, &plan, judgment);
        graphs.insert(kind.file_stem().to_owned(), facts);
        progress.advance(1);
    }
    Ok(graphs)
}

/// Writes a graph and tries it.
///
/// The worker's own steps keep 24 bits where weights have 32, which is not enough
/// if the largest weights meet activations that are as much smaller. Then steps are
/// ONNX Runtime's, which take longer.
fn build<'a>(
    kind: Graph,
    plan: GraphPlan<'a>,
    stage: &StagingFolder,
    trial: &Trial,
    runtime: &Runtime,
) -> Result<(GraphPlan<'a>, (Nearness, Operators)), CompileError> {
    let attempt = |plan: &GraphPlan<'a>| {
        let model = graph::build(kind, plan);
        let file = stage.write(
            &format!("{}.onnx", kind.file_stem()),
            &model.encode_to_vec(),
        )?;
        trial.judge(kind, plan, &model, &file, runtime)
    };
    match attempt(&plan) {
        Err(error) if plan.attention == Attention::Layers && plan.precision == Precision::Fp32 => {
            let exact = GraphPlan {
                attention: Attention::GroupQuery,
                ..plan
            };
            // If that does not work either, the first error says why.
            let Ok(judgment) = attempt(&exact) else {
                return Err(error);
            };
            tracing::warn!(%error, "steps of generation are ONNX Runtime's own, and slower");
            Ok((exact, judgment))
        }
        judgment => Ok((plan, judgment?)),
    }
}

/// Reads all of the weights.
fn digest(
    checkpoint: &Checkpoint,
    progress: &mut dyn CompileProgress,
) -> Result<String, CompileError> {
    progress.begin(CompileStep::Digest, checkpoint.bytes()?);
    checkpoint.digest(|bytes| progress.advance(bytes))
}

/// What is asked for, or all that the checkpoint has heads for.
fn tasks(
    weights: &CheckpointWeights<'_>,
    options: &CompileOptions,
) -> Result<Vec<CompileTask>, CompileError> {
    let missing = |task| match task {
        CompileTask::Classify => weights.n_classes.is_none().then_some("score.weight"),
        CompileTask::Score | CompileTask::Generate => {
            (!weights.has_language_head).then_some("lm_head.weight")
        }
        CompileTask::Embed | CompileTask::Hidden => None,
    };
    let Some(asked) = &options.tasks else {
        return Ok(CompileTask::ALL
            .into_iter()
            .filter(|task| missing(*task).is_none() && options.has_operators(*task))
            .collect());
    };
    for task in asked {
        if let Some(head) = missing(*task) {
            return Err(CompileError::Options(format!(
                "task {} needs the tensor {head}, which the checkpoint does not have",
                task.name()
            )));
        }
        if !options.has_operators(*task) {
            return Err(CompileError::Options(format!(
                "task {} cannot be had in {} on {}, whose attention over kept keys and values is \
                 for 16 bits; use bf16 or fp16",
                task.name(),
                options.precision.name(),
                options.provider.name(),
            )));
        }
    }
    if asked.is_empty() {
        return Err(CompileError::Options("no task is asked for".to_owned()));
    }
    Ok(asked.iter().copied().collect())
}

fn feature_layer(
    architecture: &Architecture,
    options: &CompileOptions,
) -> Result<usize, CompileError> {
    let layer = options
        .feature_layer
        .unwrap_or_else(|| architecture.default_feature_layer());
    if layer <= architecture.n_layers {
        return Ok(layer);
    }
    Err(CompileError::Options(format!(
        "feature layer {layer} is beyond the model's {} layers",
        architecture.n_layers
    )))
}

fn attention(kind: Graph, options: &CompileOptions, runtime: &Runtime) -> Attention {
    // The worker's own attention is for CPUs.
    let is_ours = options.provider == Provider::Cpu && runtime.operators.is_some();
    match kind {
        Graph::Generate if is_ours && options.precision.activation() == DataType::Float => {
            Attention::Layers
        }
        Graph::Generate => Attention::GroupQuery,
        _ if is_ours => Attention::Causal,
        _ => Attention::MultiHead,
    }
}
