//! What to make of a source, in the words of the command line.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::error::CompileError;
use super::onnx::DataType;
use crate::engine::runtime::Runtime;

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
            Self::Fp16 => 1e-2,
            // It has three bits less than fp16, and the residual stream rounds
            // twice a layer: 1.9e-2 over 48 layers in PyTorch, which
            // scripts/bench-gpu/rounding.py prints.
            Self::Bf16 => 3e-2,
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
    /// As flags and answers have it.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

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

impl CompileOptions {
    /// Refuses what cannot be made, or not tried in `runtime`.
    pub(super) fn check(&self, runtime: &Runtime) -> Result<(), CompileError> {
        let refuse = |text: &str| Err(CompileError::Options(text.to_owned()));
        match (self.precision, self.provider) {
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

    /// Whether ONNX Runtime can compute the task with these options: on CUDA,
    /// `GroupQueryAttention` has kernels for 16 bits alone.
    pub(super) fn has_operators(&self, task: Task) -> bool {
        let has_cache = task == Task::Generate;
        !(has_cache && self.provider == Provider::Cuda && self.precision == Precision::Fp32)
    }

    /// A folder's name for what these options make of weights.
    pub(super) fn cache_key(&self, sha256: &str, runtime: &Runtime) -> String {
        let mut parts = vec![
            sha256[..16].to_owned(),
            self.precision.name().to_owned(),
            match self.provider {
                Provider::Cpu if runtime.operators.is_some() => "cpu".to_owned(),
                Provider::Cpu => "cpu-stock".to_owned(),
                Provider::Cuda if runtime.operators.is_some() => "cuda".to_owned(),
                Provider::Cuda => "cuda-stock".to_owned(),
            },
        ];
        let tasks = self
            .tasks
            .iter()
            .flatten()
            .map(|task| task.name().to_owned());
        parts.extend(tasks);
        parts.extend(self.feature_layer.map(|layer| layer.to_string()));
        parts.push(concat!("v", env!("CARGO_PKG_VERSION")).to_owned());
        parts.push(format!("f{}", super::manifest::FORMAT));
        parts.join("-")
    }
}
