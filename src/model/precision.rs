//! The choices of a compiled model: its precision, its provider and its tasks.

use serde::{Deserialize, Serialize};

use crate::model::onnx::DataType;

/// Number format of weights and computation.
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
    /// 32-bit floats throughout.
    Fp32,
    /// 16-bit floats throughout, for GPUs.
    Fp16,
    /// bfloat16: throughout on a GPU, where it is less exact than fp16 but
    /// cannot overflow; on a CPU with instructions for it in products and
    /// attention, the rest in 32-bit floats.
    Bf16,
    /// Dense products in 8-bit integers (quantization), the rest in 32-bit
    /// floats, for CPUs.
    Int8,
}

/// Features of which a CPU needs one for [`Precision::Bf16`].
pub(crate) const BF16_FEATURES: &str = "AVX512_BF16 or AMX-BF16";

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

    /// Returns the largest relative error against the reference; a compilation
    /// with a larger error fails and writes nothing.
    #[must_use]
    pub fn tolerance(self) -> f64 {
        match self {
            Self::Fp32 => 1e-5,
            Self::Fp16 => 1e-2,
            // bfloat16 has three bits less than fp16, and the residual stream
            // is rounded twice per layer: an error of 1.9e-2 over 48 layers in
            // PyTorch, which scripts/bench-gpu/rounding.py prints.
            Self::Bf16 => 3e-2,
            Self::Int8 => 5e-2,
        }
    }

    /// Returns the data type of activations between operators.
    pub(crate) fn activation(self, provider: Provider) -> DataType {
        match (self, provider) {
            (Self::Fp32 | Self::Int8, _) | (Self::Bf16, Provider::Cpu) => DataType::Float,
            (Self::Fp16, _) => DataType::Float16,
            (Self::Bf16, Provider::Cuda) => DataType::Bfloat16,
        }
    }

    /// Returns the data type of the weights of dense products.
    pub(crate) fn weights(self) -> DataType {
        match self {
            Self::Fp32 => DataType::Float,
            Self::Fp16 => DataType::Float16,
            Self::Bf16 => DataType::Bfloat16,
            Self::Int8 => DataType::Int8,
        }
    }
}

/// Task that a model is compiled for.
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
    /// The negative log-likelihood of each token of an image.
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

/// Execution provider that graphs are made for.
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
    /// Returns the provider's name in flags and answers.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Cpu => "cpu",
            Self::Cuda => "cuda",
        }
    }

    /// Returns ONNX Runtime's name of the provider.
    #[must_use]
    pub fn runtime_name(self) -> &'static str {
        match self {
            Self::Cpu => "CPUExecutionProvider",
            Self::Cuda => "CUDAExecutionProvider",
        }
    }
}

/// Execution provider that a flag asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum ProviderChoice {
    /// CUDA if it can be used, else the CPU; the log says which.
    Auto,
    /// The CPU.
    Cpu,
    /// An NVIDIA GPU; the worker does not start without one.
    Cuda,
}
