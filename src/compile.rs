//! Compiles a checkpoint into graphs that run several times faster.
//!
//! ```text
//!   source ─▶ checkpoint ─▶ weights ─┬─▶ store (weights.bin) ─▶ graphs ─┐
//!                                    └─▶ reference (float64) ───────────┴─▶ verify ─▶ manifest
//! ```
//!
//! Everything is written into a staging directory beside the output, verified
//! there, and moved into place by one rename; so a directory with a manifest is
//! complete and verified. Nothing here depends on requests, and no Python runs.

pub mod cache;
mod calibrate;
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

use self::calibrate::Calibration;
use self::checkpoint::Checkpoint;
use self::graph::{Attention, GraphPlan};
use self::stage::StagingFolder;
use self::store::{Parts, WeightLayout};
use self::verify::{Nearness, Trial};
use self::weights::CheckpointWeights;
use crate::files::hex;
use crate::model::architecture::Architecture;
use crate::model::graph::Graph;
use crate::model::manifest::{GraphFacts, Manifest, SourceFacts};
use crate::model::precision::{CompileTask, Precision, Provider};
use crate::model::settings::ModelSettings;
use crate::model::{architecture, manifest};
use crate::runtime::{Operators, Runtime};

pub use self::error::CompileError;
pub use self::options::CompileOptions;
pub use self::source::{Local, ModelSource};

/// Step of a compilation, with the unit of its progress.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CompileStep {
    /// Download of a file from the hub, counted in bytes.
    Download,
    /// Digest of the source's weights, counted in bytes.
    Digest,
    /// Run of the reference by which weights are rounded, counted in parameters.
    Calibrate,
    /// Writing of `weights.bin`, counted in parameters.
    Write,
    /// Computation of the float64 reference, counted in parameters.
    Reference,
    /// Verification, counted in graphs.
    Verify,
}

/// Receiver of a compilation's progress.
pub trait CompileProgress {
    /// Begins a step of `total` units.
    fn begin(&mut self, step: CompileStep, total: u64);
    /// Adds `units` to the finished units of the step.
    fn advance(&mut self, units: u64);
}

/// Progress that is not reported.
pub struct Silent;

impl CompileProgress for Silent {
    fn begin(&mut self, _step: CompileStep, _total: u64) {}
    fn advance(&mut self, _units: u64) {}
}

/// Compiles `source` into the directory `output`; if this fails, nothing is
/// written there.
///
/// # Errors
///
/// When the source is not an ImageGPT that fits `options`, when a graph fails
/// its verification, or when `output` exists or cannot be written.
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
    options.check_cpu()?;
    let fetched = Fetched::new(source, progress)?;
    compile_fetched(fetched, output, options, runtime, progress)
}

/// Source whose files are on this machine.
struct Fetched<'a> {
    source: &'a ModelSource,
    local: Local,
    settings: ModelSettings,
    /// Digest of the weights, if it was computed already.
    sha256: Option<String>,
}

impl<'a> Fetched<'a> {
    /// Fetches a source and reads its settings, which `serve` would refuse
    /// otherwise after all of the work.
    fn new(
        source: &'a ModelSource,
        progress: &mut dyn CompileProgress,
    ) -> Result<Self, CompileError> {
        let local = source.fetch(progress)?;
        let settings = ModelSettings::of_checkpoint(&local.folder)?;
        Ok(Self {
            source,
            local,
            settings,
            sha256: None,
        })
    }

    /// Refuses weights that do not fit the settings. The sizes of the
    /// architecture count also where config.json leaves them out.
    fn check(&self, weights: &CheckpointWeights<'_>) -> Result<(), CompileError> {
        let architecture = &weights.architecture;
        let [vocabulary, positions] = [architecture.vocabulary, architecture.n_positions];
        self.settings
            .check_sizes(Some(vocabulary as u64), Some(positions as u64))?;
        if let Some(n_classes) = weights.n_classes {
            self.settings.check_classes(n_classes)?;
        }
        Ok(())
    }
}

fn compile_fetched(
    fetched: Fetched<'_>,
    output: &Path,
    options: &CompileOptions,
    runtime: &Runtime,
    progress: &mut dyn CompileProgress,
) -> Result<Manifest, CompileError> {
    let architecture = Architecture::read(&fetched.local.folder)?;
    let checkpoint = Checkpoint::open(&fetched.local.folder)?;
    let weights = CheckpointWeights::new(&checkpoint, architecture);
    fetched.check(&weights)?;
    let Fetched {
        source,
        local,
        sha256,
        ..
    } = fetched;
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
    let calibration = if options.precision == Precision::Int8 {
        progress.begin(CompileStep::Calibrate, layer_parameters as u64);
        let advance = |parameters| progress.advance(parameters);
        Some(Calibration::new(&weights, n_layers, advance)?)
    } else {
        None
    };

    progress.begin(CompileStep::Write, layer_parameters as u64);
    let parts = Parts {
        n_layers,
        language_head: tasks.contains(&CompileTask::Score)
            || tasks.contains(&CompileTask::Generate),
        classification_head: tasks.contains(&CompileTask::Classify),
        layout: layout(&tasks, options, runtime),
    };
    let advance = |parameters| progress.advance(parameters);
    let formats = (options.precision, options.provider);
    let store = store::write(
        &weights,
        formats,
        parts,
        calibration.as_ref(),
        stage.folder(),
        advance,
    )?;
    drop(calibration);

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

/// Chooses the order of weights in their file, by the graphs that will read
/// them.
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

/// Returns the compiled directory of `source` in the directory `cache`, and
/// compiles it first if it does not exist; for serving a source directly.
///
/// The directory's name is made from the digest of the weights, the options and
/// this version. Two processes may compile it at the same time; the one that
/// ends later takes the other's result.
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
    options.check_cpu()?;
    let mut fetched = Fetched::new(source, progress)?;
    let checkpoint = Checkpoint::open(&fetched.local.folder)?;
    let sha256 = digest(&checkpoint, progress)?;
    // The palette is copied into the directory, so it is part of the name.
    let preprocessor = fetched.local.folder.join(source::PREPROCESSOR);
    let preprocessor = architecture::read(&preprocessor)?;
    let mut hash = Sha256::new();
    hash.update(&sha256);
    hash.update(&preprocessor);
    let key = hex(&hash.finalize());
    let folder = cache.join(options.cache_key(&key, runtime));
    if let Ok(manifest) = Manifest::read(&folder) {
        return Ok((folder, manifest));
    }
    // Directories appear complete, so one that cannot be read was damaged
    // since.
    if folder.exists() {
        std::fs::remove_dir_all(&folder).map_err(|error| CompileError::write(&folder, &error))?;
    }
    fetched.sha256 = Some(sha256);
    match compile_fetched(fetched, &folder, options, runtime, progress) {
        Ok(manifest) => Ok((folder, manifest)),
        Err(error) => match Manifest::read(&folder) {
            Ok(manifest) => Ok((folder, manifest)),
            Err(_) => Err(error),
        },
    }
}

/// Writes and verifies each graph; the result has the facts by file name.
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

/// Writes a graph and verifies it.
///
/// The worker's own operator for generation keeps 24 bits of 32-bit weights,
/// which is not exact enough if the largest weights meet activations that are
/// smaller by the same factor. Then generation uses ONNX Runtime's operators,
/// which are slower.
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
            tracing::warn!(
                %error,
                "generation uses ONNX Runtime's operators, which are slower than the worker's own"
            );
            Ok((exact, judgment))
        }
        judgment => Ok((plan, judgment?)),
    }
}

/// Computes the digest of the source, which reads all of the weights.
fn digest(
    checkpoint: &Checkpoint,
    progress: &mut dyn CompileProgress,
) -> Result<String, CompileError> {
    progress.begin(CompileStep::Digest, checkpoint.bytes()?);
    checkpoint.digest(|bytes| progress.advance(bytes))
}

/// Returns the tasks of `options`, or else all tasks that the checkpoint has
/// heads for.
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
                "task {} is not supported in {} on {}, where attention with a key/value cache has \
                 kernels for 16 bits only; use --precision bf16 or fp16",
                task.name(),
                options.precision.name(),
                options.provider.name(),
            )));
        }
    }
    if asked.is_empty() {
        return Err(CompileError::Options(
            "there is no task to compile for; name at least one (--tasks)".to_owned(),
        ));
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
        "feature layer {layer} is beyond the model's {} layers (--feature-layer)",
        architecture.n_layers
    )))
}

fn attention(kind: Graph, options: &CompileOptions, runtime: &Runtime) -> Attention {
    // The worker's own layers are for CPUs.
    let is_ours = options.provider == Provider::Cpu && runtime.operators.is_some();
    match kind {
        Graph::Generate if is_ours => Attention::Layers,
        Graph::Generate => Attention::GroupQuery,
        _ if is_ours => Attention::ImageLayers,
        _ => Attention::MultiHead,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::runtime::library::{environment, find_library};

    /// Compiles for a CPU in bfloat16, also where the CPU has no instructions
    /// for it: the same products in plain code are slow, but can be verified.
    #[test]
    fn bf16_for_a_cpu_is_near_the_reference() {
        let environment = environment(&find_library(None)).expect("make setup has brought it");
        let runtime = Runtime::new(environment, Provider::Cpu).expect("a runtime");
        let folder = tempfile::tempdir().expect("a folder");
        let source = ModelSource::parse("random:tiny", None);
        let options = CompileOptions {
            precision: Precision::Bf16,
            ..CompileOptions::default()
        };
        let fetched = Fetched::new(&source, &mut Silent).expect("a source");
        let output = folder.path().join("out");
        let compiled = compile_fetched(fetched, &output, &options, &runtime, &mut Silent);
        let manifest = compiled.expect("a compiled model");
        assert_eq!(manifest.graphs.len(), 5);
        for (name, graph) in &manifest.graphs {
            assert!(graph.cosine > 0.9999, "{name}: {}", graph.cosine);
            let worst = graph.errors.iter().copied().fold(0.0, f64::max);
            // Rounded to bfloat16, and nothing worse.
            assert!(worst > 1e-6 && worst < 1e-2, "{name}: {worst}");
        }
    }
}
