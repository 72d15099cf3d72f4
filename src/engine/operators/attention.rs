//! The kernels of [`crate::attention`] as operators.
//!
//! `imagegpt.CausalAttention`, for whole sequences:
//!
//! | | |
//! |---|---|
//! | input 0 | `qkv`, f32, `(batch, positions, 3 * d)` |
//! | output 0 | f32, `(batch, positions, d)` |
//! | `num_heads` | int, required |
//! | `scale` | float, `1 / sqrt(d / num_heads)` if it is not there |
//! | `bf16` | int, 1 for [`Precision::Bf16`], 0 if it is not there |
//!
//! `imagegpt.CachedAttention`, for new tokens of sequences that have a cache:
//!
//! | | |
//! |---|---|
//! | input 0 | `qkv`, f32, `(batch, length, 3 * d)` |
//! | inputs 1, 2 | `past_key`, `past_value`, bf16, `(batch, heads, capacity, head_dim)` |
//! | input 3 | `seqlens_k`, i32, `(batch)`: tokens after this run, less one |
//! | output 0 | f32, `(batch, length, d)` |
//! | outputs 1, 2 | `key`, `value`, as inputs 1 and 2 |
//! | `num_heads`, `scale` | as above |
//!
//! The order of numbers within a head of the cache is the kernel's. An output
//! that is bound to the memory of its past is changed in place; the past is
//! copied to any other.

use std::ops::Range;

use half::bf16;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{DynTensor, DynTensorRefMut, TensorElementType, ValueType};

use crate::attention::{Cache, CacheShape, CachedAttention, CausalAttention, Precision, Shape};

/// The name of an operator within [`DOMAIN`](super::DOMAIN).
pub const CAUSAL_ATTENTION: &str = "CausalAttention";

/// The name of the other.
pub const CACHED_ATTENTION: &str = "CachedAttention";

fn heads(context: &KernelContext<'_>) -> ort::Result<usize> {
    context
        .get::<i64>("num_heads")
        .and_then(|heads| usize::try_from(heads).ok())
        .filter(|heads| *heads > 0)
        .ok_or_else(|| ort::Error::new("num_heads must be given, and at least one"))
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
                None | Some(0) => Precision::F32,
                Some(_) => Precision::Bf16,
            },
        })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        match context.inputs().into_iter().next() {
            Some(qkv) => infer_output(context, qkv),
            None => Ok(()),
        }
    }
}

/// The output is a third of the input's last dimension, where that is known.
fn infer_output(context: &mut ShapeInferenceContext, qkv: ValueType) -> ort::Result<()> {
    let ValueType::Tensor {
        ty,
        mut shape,
        dimension_symbols,
    } = qkv
    else {
        return Ok(());
    };
    // An unknown extent without a name would be taken for a real -1; then
    // nothing is said, and the run finds out.
    let mut extents = shape.iter().zip(dimension_symbols.iter());
    if extents.any(|(extent, symbol)| *extent < 0 && symbol.is_empty()) {
        return Ok(());
    }
    if let Some(last) = shape.last_mut().filter(|last| **last > 0) {
        *last /= 3;
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
    precision: Precision,
}

impl CausalAttentionKernel {
    fn shape(&self, qkv: &[i64]) -> Option<Shape> {
        let &[batch, positions, columns] = qkv else {
            return None;
        };
        let columns = usize::try_from(columns).ok()?;
        columns.is_multiple_of(3 * self.heads).then_some(Shape {
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
        // Each thread's first call takes blocks until none is left; the calls
        // after that find nothing to do.
        context.par_for(job.n_blocks(), 0, |_| job.work())
    }
}

pub(super) struct CachedAttentionOp;

impl Operator for CachedAttentionOp {
    type Kernel<'attr> = CachedAttentionKernel;

    fn name(&self) -> &str {
        CACHED_ATTENTION
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            TensorElementType::Float32,
            TensorElementType::Bfloat16,
            TensorElementType::Bfloat16,
            TensorElementType::Int32,
        ]
        .map(OperatorInput::required)
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [
            TensorElementType::Float32,
            TensorElementType::Bfloat16,
            TensorElementType::Bfloat16,
        ]
        .map(OperatorOutput::required)
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<CachedAttentionKernel> {
        Ok(CachedAttentionKernel {
            heads: heads(context)?,
            scale: context.get::<f32>("scale"),
        })
    }

    /// What the cache is, the graph says where it declares its outputs.
    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        match context.inputs().into_iter().next() {
            Some(qkv) => infer_output(context, qkv),
            None => Ok(()),
        }
    }
}

pub(super) struct CachedAttentionKernel {
    heads: usize,
    scale: Option<f32>,
}

impl CachedAttentionKernel {
    /// The sizes of a call, if its inputs fit each other.
    fn shape(&self, qkv: &[i64], keys: &[i64], values: &[i64]) -> Option<CacheShape> {
        let (&[batch, length, columns], &[sequences, heads, capacity, head_dim]) = (qkv, keys)
        else {
            return None;
        };
        let size = |extent: i64| usize::try_from(extent).ok();
        let shape = CacheShape {
            batch: size(batch)?,
            length: size(length)?,
            capacity: size(capacity)?,
            heads: size(heads)?,
            head_dim: size(head_dim)?,
        };
        let columns_expected = shape.heads.checked_mul(shape.head_dim)?.checked_mul(3)?;
        let fits = sequences == batch
            && values == keys
            && shape.heads == self.heads
            && size(columns)? == columns_expected;
        fits.then_some(shape)
    }
}

impl Kernel for CachedAttentionKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let [qkv, past_key, past_value, seqlens_k] = super::inputs(context)?;
        let (qkv_dims, qkv) = qkv.try_extract_tensor::<f32>()?;
        let cache_dims = past_key.shape();
        let shape = self
            .shape(qkv_dims, cache_dims, past_value.shape())
            .ok_or_else(|| {
                ort::Error::new(format!(
                    "qkv of {qkv_dims} is not (batch, length, 3 * d), or keys of {cache_dims} and \
                     values of {} are not (batch, {}, capacity, d / {1})",
                    past_value.shape(),
                    self.heads
                ))
            })?;
        let (_, ends) = seqlens_k.try_extract_tensor::<i32>()?;
        let past: Vec<usize> = ends
            .iter()
            .map(|&end| {
                let end = usize::try_from(end).ok()?.checked_add(1)?;
                end.checked_sub(shape.length)
            })
            .collect::<Option<_>>()
            .ok_or_else(|| {
                ort::Error::new(format!(
                    "seqlens_k {ends:?} are not tokens after {} new ones, less one",
                    shape.length
                ))
            })?;
        let scale = self.scale.unwrap_or_else(|| default_scale(shape.head_dim));
        let attention = CachedAttention::new(shape, scale).map_err(ort::Error::wrap)?;

        let dims = cache_dims.to_vec();
        let output_dims = [qkv_dims[0], qkv_dims[1], qkv_dims[2] / 3];
        let mut output = super::output(context, 0, output_dims)?;
        let mut key = super::output(context, 1, dims.clone())?;
        let mut value = super::output(context, 2, dims)?;
        keep(&past_key, &mut key)?;
        keep(&past_value, &mut value)?;
        // From here on nobody looks at the past, which may be what is written.
        if overlap(&bytes(&key), &bytes(&value)) {
            return Err(ort::Error::new("keys and values share memory"));
        }
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        let (_, keys) = key.try_extract_tensor_mut::<bf16>()?;
        let (_, values) = value.try_extract_tensor_mut::<bf16>()?;
        let cache = Cache { keys, values };
        let job = attention
            .job(qkv, &past, cache, output)
            .map_err(ort::Error::wrap)?;
        if job.n_heads() == 0 {
            return Ok(());
        }
        // As above: the first call of each thread does its share.
        context.par_for(job.n_heads(), 0, |_| job.work())
    }
}

/// Makes `present` what `past` is; it may be the same memory already, but
/// nothing between that and other memory.
fn keep(past: &DynTensor, present: &mut DynTensorRefMut<'_>) -> ort::Result<()> {
    // The order matters: while there is a slice of one, the other's memory must
    // not be within it.
    let (from, to) = (bytes(past), bytes(present));
    if from == to {
        return Ok(());
    }
    if overlap(&from, &to) {
        return Err(ort::Error::new(
            "a cache's output is partly the memory of its input",
        ));
    }
    let (_, past) = past.try_extract_tensor::<bf16>()?;
    let (_, present) = present.try_extract_tensor_mut::<bf16>()?;
    if past.len() != present.len() {
        return Err(ort::Error::new(
            "a cache's output is not as long as its input",
        ));
    }
    present.copy_from_slice(past);
    Ok(())
}

/// The addresses of a tensor of bfloat16.
fn bytes(tensor: &DynTensor) -> Range<usize> {
    let start = tensor.data_ptr().addr();
    start..start + tensor.shape().num_elements() * size_of::<bf16>()
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}
