//! The worker's own kernels as operators of ONNX Runtime.
//!
//! They run on the threads of the session that calls them, as many as its
//! `intra_threads`, and on no others. They are for the CPU; where a session has
//! another execution provider, the graph should have other operators.

use ort::operator::{ComputeContext, OperatorDomain};
use ort::value::{DynTensorRef, DynTensorRefMut, IntoShape};

pub use self::attention::CAUSAL_ATTENTION;
pub use self::layers::LAYERS;

mod attention;
mod layers;

/// The domain of this worker's operators.
pub const DOMAIN: &str = "imagegpt";

/// The domain with its operators, for `SessionBuilder::with_operators`.
///
/// # Errors
/// If ONNX Runtime cannot make a domain.
pub fn domain() -> ort::Result<OperatorDomain> {
    OperatorDomain::new(DOMAIN)?
        .add(attention::CausalAttentionOp)?
        .add(layers::LayersOp)
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
