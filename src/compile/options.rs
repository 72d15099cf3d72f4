//! What to make of a source, in the words of the command line.

use std::collections::BTreeSet;

use super::error::CompileError;
use crate::model::precision::{CompileTask, Precision, Provider};
use crate::runtime::Runtime;

/// What to make of a source.
#[derive(Debug, Clone)]
pub struct CompileOptions {
    pub precision: Precision,
    pub provider: Provider,
    /// `None` for all that the checkpoint has heads for.
    pub tasks: Option<BTreeSet<CompileTask>>,
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
    pub(super) fn has_operators(&self, task: CompileTask) -> bool {
        let has_cache = task == CompileTask::Generate;
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
        parts.push(format!("f{}", crate::model::manifest::FORMAT));
        parts.join("-")
    }
}
