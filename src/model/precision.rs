//! What a compiled model computes in, for which device, and what it can do.

use serde::{Deserialize, Serialize};

use crate::model::onnx::DataType;

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
pub enum CompileTask {
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

impl CompileTask {
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

/// Provider that a flag asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ProviderChoice {
    /// CUDA if it can be had, else the CPU, and the log says which.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU; the worker does not start without one.
    Cuda,
}
