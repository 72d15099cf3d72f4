//! The worker's own kernels as operators of ONNX Runtime.
//!
//! On a CPU they run only on the threads of the session that calls them
//! (`intra_threads`). Layers are for the CPU only, quick-gelu in 16 bits is for
//! GPUs.

use ort::operator::{ComputeContext, OperatorDomain, ShapeInferenceContext};
use ort::value::{DynTensorRef, DynTensorRefMut, IntoShape, ValueType};

pub use self::image_layers::IMAGE_LAYERS;
pub use self::layers::LAYERS;
use self::quick_gelu::QuickGelu;
pub use self::quick_gelu::{FACTOR as QUICK_GELU_FACTOR, QUICK_GELU_BF16, QUICK_GELU_FP16};
use crate::gpu::kernels::Half;
use crate::model::precision::Provider;

mod constants;
mod image_layers;
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
        .add(image_layers::ImageLayersOp::default())?
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

/// Declares that an output has the shape of an input. Unknown extents stay
/// unknown.
fn infer_same(
    context: &mut ShapeInferenceContext,
    output: usize,
    input: &ValueType,
) -> ort::Result<()> {
    let ValueType::Tensor {
        shape,
        dimension_symbols,
        ..
    } = input
    else {
        return Ok(());
    };
    // An unknown extent without a name would be taken for a real -1; then no
    // shape is declared, and the run determines it.
    let mut extents = shape.iter().zip(dimension_symbols.iter());
    if extents.any(|(extent, symbol)| *extent < 0 && symbol.is_empty()) {
        return Ok(());
    }
    context.set_output(output, input)
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
