//! The worker's own kernels as operators of ONNX Runtime.
//!
//! On a CPU they run only on the threads of the session that calls them
//! (`intra_threads`). Attention and layers are for the CPU only, quick-gelu in
//! 16 bits is for GPUs.

use ort::operator::{ComputeContext, OperatorDomain};
use ort::value::{DynTensorRef, DynTensorRefMut, IntoShape};

pub use self::attention::CAUSAL_ATTENTION;
pub use self::layers::LAYERS;
use self::quick_gelu::QuickGelu;
pub use self::quick_gelu::{FACTOR as QUICK_GELU_FACTOR, QUICK_GELU_BF16, QUICK_GELU_FP16};
use crate::gpu::kernels::Half;
use crate::model::precision::Provider;

mod attention;
mod layers;
mod quick_gelu;

/// Name of the domain of this worker's operators.
pub const DOMAIN: &str = "imagegpt";

/// Creates the domain with its operators, for `SessionBuilder::with_operators`.
///
/// # Errors
///
/// When ONNX Runtime cannot create the domain.
pub fn domain() -> ort::Result<OperatorDomain> {
    let mut domain = OperatorDomain::new(DOMAIN)?
        .add(attention::CausalAttentionOp)?
        .add(layers::LayersOp)?;
    for half in [Half::Fp16, Half::Bf16] {
        for provider in [Provider::Cpu, Provider::Cuda] {
            domain = domain.add(QuickGelu { half, provider })?;
        }
    }
    Ok(domain)
}

fn inputs<const N: usize>(context: &ComputeContext) -> ort::Result<[DynTensorRef<'_>; N]> {
    let mut inputs = Vec::with_capacity(N);
    for idx in 0..N {
        let input = context.input(idx)?;
        let input = input.ok_or_else(|| ort::Error::new(format!("input {idx} is missing")))?;
        inputs.push(input.downcast()?);
    }
    inputs
        .try_into()
        .map_err(|_| ort::Error::new("inputs are missing"))
}

fn output(
    context: &ComputeContext,
    idx: usize,
    dims: impl IntoShape,
) -> ort::Result<DynTensorRefMut<'_>> {
    let output = context.output(idx, dims)?;
    let output = output.ok_or_else(|| ort::Error::new(format!("output {idx} is missing")))?;
    output.downcast()
}
