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
pub mod checkpoint;
pub mod command;
pub mod config;
pub mod error;
pub mod graph;
pub mod hub;
pub mod manifest;
pub mod onnx;
pub mod reference;
pub mod runtime;
pub mod source;
mod stage;
pub mod store;
pub mod verify;
pub mod weights;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use prost::Message;
use serde::{Deserialize, Serialize};

use self::checkpoint::Checkpoint;
use self::config::Architecture;
use self::graph::{Attention, Kind, Plan};
use self::manifest::SourceFacts;
use self::onnx::DataType;
use self::stage::Stage;
use self::store::Parts;
use self::verify::Trial;
use self::weights::Weights;

pub use self::error::CompileError;
pub use self::manifest::Manifest;
pub use self::runtime::{Residence, Runtime};
pub use self::source::Source;

/// How numbers are kept and computed.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// All in 32-bit floats.
    Fp32,
    /// All in 16-bit floats, for GPUs.
    Fp16,
    /// All in bfloat16, for GPUs: less exact than fp16, but never too large.
    Bf16,
    /// Dense products in 8-bit integers, the rest in 32-bit floats, for CPUs.
    Int8,
}

impl Precision {
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Int8 => "int8",
        }
    }

    /// Relative error against the reference above which nothing is written.
    #[must_use]
    pub fn tolerance(self) -> f64 {
        match self {
            Self::Fp32 => 1e-5,
            Self::Fp16 | Self::Bf16 => 1e-2,
            Self::Int8 => 5e-2,
        }
    }

    /// What flows between operators.
    pub(crate) fn activation(self) -> DataType {
        match self {
            Self::Fp32 | Self::Int8 => DataType::Float,
            Self::Fp16 => DataType::Float16,
            Self::Bf16 => DataType::Bfloat16,
        }
    }
}

/// What a compiled folder can do.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Task {
    /// Features of each layer up to the feature layer, pooled over positions.
    Embed,
    /// The last hidden state of every position.
    Hidden,
    /// Scores of a fine-tuned classification head.
    Classify,
    /// How unlikely each token of an image is.
    Score,
    /// New images, token by token.
    Generate,
}

impl Task {
    pub const ALL: [Self; 5] = [
        Self::Embed,
        Self::Hidden,
        Self::Classify,
        Self::Score,
        Self::Generate,
    ];

    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Embed => "embed",
            Self::Hidden => "hidden",
            Self::Classify => "classify",
            Self::Score => "score",
            Self::Generate => "generate",
        }
    }
}

/// What graphs are made for.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Serialize,
    Deserialize,
    clap::ValueEnum,
)]
#[serde(rename_all = "lowercase")]
pub enum Provider {
    Cpu,
    Cuda,
}

impl Provider {
    /// ONNX Runtime's name of it.
    #[must_use]
    pub fn runtime_name(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::Cuda => "CUDAExecutionProvider",
        }
    }
}

/// What to make of a source.
#[derive(Debug, Clone)]
pub struct CompileOptions {
    pub precision: Precision,
    pub provider: Provider,
    /// `None` for all that the checkpoint has heads for.
    pub tasks: Option<BTreeSet<Task>>,
    /// Where `embed` ends; `None` for two thirds of the depth.
    pub feature_layer: Option<usize>,
}

impl Default for CompileOptions {
    fn default() -> Self {
        Self {
            precision: Precision::Fp32,
            provider: Provider::Cpu,
            tasks: None,
            feature_layer: None,
        }
    }
}

/// What a compilation is busy with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Step {
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
pub trait Progress {
    /// A step begins that will take `total` units.
    fn begin(&mut self, step: Step, total: u64);
    /// So many units more are done.
    fn advance(&mut self, units: u64);
}

/// Tells no one.
pub struct Silent;

impl Progress for Silent {
    fn begin(&mut self, _step: Step, _total: u64) {}
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
    source: &Source,
    output: &Path,
    options: &CompileOptions,
    runtime: &Runtime,
    progress: &mut dyn Progress,
) -> Result<Manifest, CompileError> {
    let local = source.fetch(progress)?;
    let architecture = Architecture::read(&local.folder)?;
    let checkpoint = Checkpoint::open(&local.folder)?;
    let weights = Weights::new(&checkpoint, architecture);
    let tasks = tasks(&weights, options)?;
    let feature_layer = feature_layer(&weights.architecture, options)?;
    check_provider(options, runtime)?;
    let mut kinds: Vec<(Task, Kind)> = Vec::new();
    for task in &tasks {
        kinds.extend(Kind::of(*task).iter().map(|kind| (*task, *kind)));
    }
    let n_layers = kinds
        .iter()
        .map(|(_, kind)| kind.n_layers(&weights.architecture, feature_layer))
        .max()
        .unwrap_or(0);
    let stage = Stage::new(output)?;

    progress.begin(Step::Digest, checkpoint.bytes()?);
    let sha256 = checkpoint.digest(|bytes| progress.advance(bytes))?;

    let layer_parameters = weights.architecture.layer_parameters() * n_layers;
    progress.begin(Step::Write, layer_parameters as u64);
    let parts = Parts {
        n_layers,
        language_head: tasks.contains(&Task::Score) || tasks.contains(&Task::Generate),
        classification_head: tasks.contains(&Task::Classify),
    };
    let advance = |parameters| progress.advance(parameters);
    let store = store::write(&weights, options.precision, parts, stage.folder(), advance)?;

    progress.begin(Step::Reference, layer_parameters as u64);
    let advance = |parameters| progress.advance(parameters);
    let trial = Trial::new(&weights, &tasks, n_layers, advance)?;

    progress.begin(Step::Verify, kinds.len() as u64);
    let mut graphs = BTreeMap::new();
    for (task, kind) in kinds {
        let plan = Plan {
            architecture: &weights.architecture,
            store: &store,
            precision: options.precision,
            provider: options.provider,
            attention: attention(kind, options.provider, runtime),
            feature_layer,
        };
        let model = kind.build(&plan);
        let name = format!("{}.onnx", kind.name());
        let file = stage.write(&name, &model.encode_to_vec())?;
        let judgment = trial.judge(kind, &plan, &model, &file, runtime)?;
        graphs.insert(
            kind.name().to_owned(),
            trial.facts(kind, task, &plan, judgment),
        );
        progress.advance(1);
    }

    for name in [config::FILE, source::PREPROCESSOR] {
        stage.copy(&local.folder.join(name))?;
    }
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
        files: stage.files()?,
        architecture: weights.architecture.clone(),
    };
    let text = serde_json::to_vec_pretty(&manifest).expect("a manifest is plain data");
    stage.write(manifest::FILE, &text)?;
    stage.commit()?;
    Ok(manifest)
}

/// What is asked for, or all that the checkpoint has heads for.
fn tasks(weights: &Weights<'_>, options: &CompileOptions) -> Result<Vec<Task>, CompileError> {
    let missing = |task| match task {
        Task::Classify => weights.n_classes.is_none().then_some("score.weight"),
        Task::Score | Task::Generate => (!weights.has_language_head).then_some("lm_head.weight"),
        Task::Embed | Task::Hidden => None,
    };
    let Some(asked) = &options.tasks else {
        return Ok(Task::ALL
            .into_iter()
            .filter(|task| missing(*task).is_none())
            .collect());
    };
    for task in asked {
        if let Some(head) = missing(*task) {
            return Err(CompileError::Options(format!(
                "task {} needs the tensor {head}, which the checkpoint does not have",
                task.name()
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

fn check_provider(options: &CompileOptions, runtime: &Runtime) -> Result<(), CompileError> {
    let refuse = |text: &str| Err(CompileError::Options(text.to_owned()));
    match (options.precision, options.provider) {
        (Precision::Int8, Provider::Cuda) => {
            refuse("int8 is for the CPU, ONNX Runtime has no such product for CUDA; use bf16")
        }
        (Precision::Fp16 | Precision::Bf16, Provider::Cpu) => refuse(
            "ONNX Runtime computes fp16 and bf16 on the CPU slowly or not at all; use int8, or \
             compile for CUDA",
        ),
        (Precision::Bf16, Provider::Cuda) if runtime.provider == Provider::Cpu => {
            refuse("bf16 can only be tried on a GPU, so compile where there is one")
        }
        (_, Provider::Cpu) if runtime.provider == Provider::Cuda => {
            refuse("graphs for the CPU are tried on the CPU")
        }
        _ => Ok(()),
    }
}

fn attention(kind: Kind, provider: Provider, runtime: &Runtime) -> Attention {
    match (kind, provider, &runtime.operators) {
        (Kind::Generate, _, _) => Attention::GroupQuery,
        (_, Provider::Cpu, Some(_)) => Attention::Causal,
        _ => Attention::MultiHead,
    }
}
