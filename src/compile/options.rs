//! Options of a compilation, named as on the command line.

use std::collections::BTreeSet;

use super::error::CompileError;
use crate::kernels::whole::has_bf16_products;
use crate::model::precision::{BF16_FEATURES, CompileTask, Precision, Provider};
use crate::runtime::Runtime;

/// Options of a compilation.
#[derive(Debug, Clone)]
pub struct CompileOptions {
    pub precision: Precision,
    pub provider: Provider,
    /// Tasks to compile for; `None` for all that the checkpoint has heads for.
    pub tasks: Option<BTreeSet<CompileTask>>,
    /// Last layer of `embed`; `None` for two thirds of the depth.
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
    /// Refuses options that are not supported, or whose graphs cannot be
    /// verified in `runtime`.
    pub(crate) fn check(&self, runtime: &Runtime) -> Result<(), CompileError> {
        let refuse = |text: &str| Err(CompileError::Options(text.to_owned()));
        match (self.precision, self.provider) {
            (Precision::Int8, Provider::Cuda) => refuse(
                "precision int8 is not supported on CUDA, for which ONNX Runtime has no 8-bit \
                 matrix product; use --precision bf16",
            ),
            (Precision::Fp16, Provider::Cpu) => refuse(
                "precision fp16 is not supported on the CPU, where ONNX Runtime computes it slowly \
                 or not at all; use --precision int8, or compile for CUDA (--provider cuda)",
            ),
            (Precision::Bf16, Provider::Cpu) if runtime.operators.is_none() => refuse(
                "precision bf16 on the CPU needs the worker's own operators; leave --portable out, \
                 or use --precision fp32 or int8",
            ),
            (Precision::Bf16, Provider::Cuda) if runtime.provider == Provider::Cpu => refuse(
                "graphs in bf16 can be verified on a GPU only; compile on a machine with a GPU",
            ),
            (_, Provider::Cpu) if runtime.provider == Provider::Cuda => {
                refuse("graphs for the CPU must be verified on the CPU, not on a GPU")
            }
            _ => Ok(()),
        }
    }

    /// Refuses options whose graphs this CPU could only run slowly.
    pub(super) fn check_cpu(&self) -> Result<(), CompileError> {
        let is_bf16 = (self.precision, self.provider) == (Precision::Bf16, Provider::Cpu);
        if is_bf16 && !has_bf16_products() {
            return Err(CompileError::Options(format!(
                "precision bf16 on the CPU needs {BF16_FEATURES}, which this CPU does not have; use \
                 --precision int8 or fp32, or compile for CUDA (--provider cuda)"
            )));
        }
        Ok(())
    }

    /// Returns true if ONNX Runtime can compute the task with these options: on
    /// CUDA, `GroupQueryAttention` has kernels for 16 bits only.
    pub(super) fn has_operators(&self, task: CompileTask) -> bool {
        let has_cache = task == CompileTask::Generate;
        !(has_cache && self.provider == Provider::Cuda && self.precision == Precision::Fp32)
    }

    /// Returns the name of the cached directory for weights with this digest.
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
