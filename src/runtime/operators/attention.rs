//! The operator `imagegpt.CausalAttention`, attention over whole sequences by
//! the kernel of [`crate::kernels::attention`].
//!
//! Its inputs, outputs and attributes:
//!
//! | | |
//! |---|---|
//! | input 0 | `qkv`, f32, `(batch, positions, 3 * d)` |
//! | output 0 | f32, `(batch, positions, d)` |
//! | `num_heads` | int, required |
//! | `scale` | float, `1 / sqrt(d / num_heads)` by default |
//! | `bf16` | int, 1 for [`AttentionPrecision::Bf16`], 0 by default |

use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{TensorElementType, ValueType};

use crate::kernels::attention::{AttentionPrecision, AttentionShape, CausalAttention};

/// Name of the operator within [`DOMAIN`](super::DOMAIN).
pub const CAUSAL_ATTENTION: &str = "CausalAttention";

pub(super) fn heads(context: &KernelContext<'_>) -> ort::Result<usize> {
    context
        .get::<i64>("num_heads")
        .and_then(|heads| usize::try_from(heads).ok())
        .filter(|heads| *heads > 0)
        .ok_or_else(|| ort::Error::new("the attribute num_heads must be given and at least 1"))
}

#[expect(
    clippy::cast_precision_loss,
    reason = "a head dimension is a small number"
)]
fn default_scale(head_dim: usize) -> f32 {
    1.0 / (head_dim as f32).sqrt()
}

pub(super) struct CausalAttentionOp;

impl Operator for CausalAttentionOp {
    type Kernel<'attr> = CausalAttentionKernel;

    fn name(&self) -> &str {
        CAUSAL_ATTENTION
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [OperatorInput::required(TensorElementType::Float32)]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<CausalAttentionKernel> {
        Ok(CausalAttentionKernel {
            heads: heads(context)?,
            scale: context.get::<f32>("scale"),
            precision: match context.get::<i64>("bf16") {
                None | Some(0) => AttentionPrecision::F32,
                Some(_) => AttentionPrecision::Bf16,
            },
        })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        match context.inputs().into_iter().next() {
            Some(qkv) => infer_part(context, qkv, 3),
            None => Ok(()),
        }
    }
}

/// Declares the output's shape: the input's, with the last dimension divided by
/// `part`. Unknown dimensions stay unknown.
pub(super) fn infer_part(
    context: &mut ShapeInferenceContext,
    input: ValueType,
    part: i64,
) -> ort::Result<()> {
    let ValueType::Tensor {
        ty,
        mut shape,
        dimension_symbols,
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
    if let Some(last) = shape.last_mut().filter(|last| **last > 0) {
        *last /= part;
    }
    context.set_output(
        0,
        &ValueType::Tensor {
            ty,
            shape,
            dimension_symbols,
        },
    )
}

pub(super) struct CausalAttentionKernel {
    heads: usize,
    scale: Option<f32>,
    precision: AttentionPrecision,
}

impl CausalAttentionKernel {
    fn shape(&self, qkv: &[i64]) -> Option<AttentionShape> {
        let &[batch, positions, columns] = qkv else {
            return None;
        };
        let columns = usize::try_from(columns).ok()?;
        columns
            .is_multiple_of(3 * self.heads)
            .then_some(AttentionShape {
                batch: usize::try_from(batch).ok()?,
                positions: usize::try_from(positions).ok()?,
                heads: self.heads,
                head_dim: columns / (3 * self.heads),
            })
    }
}

impl Kernel for CausalAttentionKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let qkv = context
            .input(0)?
            .ok_or_else(|| ort::Error::new("qkv is missing"))?;
        let (dimensions, qkv) = qkv.try_extract_tensor::<f32>()?;
        let shape = self.shape(dimensions).ok_or_else(|| {
            ort::Error::new(format!(
                "qkv of {dimensions} is not (batch, positions, 3 * d) with d a multiple of {} heads",
                self.heads
            ))
        })?;
        let scale = self.scale.unwrap_or_else(|| default_scale(shape.head_dim));
        let attention =
            CausalAttention::new(shape, scale, self.precision).map_err(ort::Error::wrap)?;

        let mut output = context
            .output(0, [dimensions[0], dimensions[1], dimensions[2] / 3])?
            .ok_or_else(|| ort::Error::new("the output is missing"))?;
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        let job = attention.job(qkv, output).map_err(ort::Error::wrap)?;
        if job.n_blocks() == 0 {
            return Ok(());
        }
        // Each thread's first call takes blocks until none is left; later calls
        // find nothing to do.
        context.par_for(job.n_blocks(), 0, |_| job.work())
    }
}
