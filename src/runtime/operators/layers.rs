//! The operator `imagegpt.Layers`, all layers for new tokens of sequences with
//! a key/value cache, by the kernel of [`crate::kernels::layers`].
//!
//! After the first three inputs, each layer has two caches and fourteen
//! constants ([`Constants`], which also has the attributes):
//!
//! | | |
//! |---|---|
//! | input 0 | input of the first layer, f32, `(batch * length, width)` |
//! | input 1 | `seqlens_k`, i32, `(batch)`: number of tokens after this run, less one |
//! | input 2 | `prefixes`, i32, `(batch, 2)`: another sequence of the batch, and the number of its first positions that this sequence has too and that may be read there ([`SharedPrefix`]) |
//! | + 0, 1 | `past_key`, `past_value`, `(batch, heads, capacity, n)`: bf16 with n = `head_dim`, or bytes of [`Int24`] with n = `3 * head_dim + 4` |
//! | output 0 | output of the last layer, with the shape of input 0 |
//! | outputs | `key`, `value` of each layer, with the shape of its `past_key`, `past_value` |
//!
//! Constants are packed once. The kernel chooses the order of numbers within a
//! head of the cache. An output that is bound to the memory of its past is
//! changed in place; to any other output the past is copied first.

use std::ops::Range;

use half::bf16;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
    ShapeInferenceContext,
};
use ort::value::{
    DynTensor, DynTensorRef, DynTensorRefMut, PrimitiveTensorElementType, TensorElementType,
};

use super::constants::{CONSTANTS, Constants};
use crate::kernels::attention::{Int24, Kept, KeyValueCache, SharedPrefix};
use crate::kernels::layers::{NewTokens, Sizes, StepLayers, StepMemory, Weight};

/// Name of the operator within [`DOMAIN`](super::DOMAIN).
pub const LAYERS: &str = "Layers";

/// Number of inputs before those of the layers.
const FIRST: usize = 3;
/// Number of inputs of a layer before its constants.
const CACHES: usize = 2;
/// Number of inputs per layer.
const PER_LAYER: usize = CACHES + CONSTANTS;
/// Number of outputs of a node with a single layer.
const OUTPUTS_MIN: usize = 3;
/// Largest number of threads of a session that take part in a run.
const THREADS_MAX: usize = 64;

pub(super) struct LayersOp;

impl Operator for LayersOp {
    type Kernel<'attr> = LayersKernel;

    fn name(&self) -> &str {
        LAYERS
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Int32),
            OperatorInput::required(TensorElementType::Int32),
            OperatorInput::variadic(PER_LAYER),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [
            OperatorOutput::required(TensorElementType::Float32),
            OperatorOutput::variadic(OUTPUTS_MIN - 1),
        ]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<LayersKernel> {
        let constants = Constants::of(context, FIRST, CACHES)?;
        let packed = match constants.weights_type() {
            TensorElementType::Float32 => Packed::Float(pack(&constants)?),
            TensorElementType::Bfloat16 => Packed::Bf16(pack(&constants)?),
            TensorElementType::Int8 => Packed::Int8(pack(&constants)?),
            other => {
                return Err(ort::Error::new(format!(
                    "weights have the type {other}; f32, bf16 and i8 are supported"
                )));
            }
        };
        Ok(LayersKernel {
            packed,
            room: StepMemory::default(),
        })
    }

    fn infer_shape(&self, context: &mut ShapeInferenceContext) -> ort::Result<()> {
        let inputs = context.inputs();
        let caches = inputs
            .iter()
            .skip(FIRST)
            .enumerate()
            .filter(|(idx, _)| idx % PER_LAYER < 2)
            .map(|(_, cache)| cache);
        // Only the outputs that every node has: the number of this node's
        // outputs is unknown here, and for outputs that do not exist older
        // versions of ONNX Runtime write out of bounds.
        let known = inputs.first().into_iter().chain(caches).take(OUTPUTS_MIN);
        for (idx, output) in known.enumerate() {
            super::infer_same(context, idx, output)?;
        }
        Ok(())
    }
}

/// Packs the weights of a node whose weights have the type `W`.
fn pack<W: Weight + PrimitiveTensorElementType>(
    constants: &Constants<'_>,
) -> ort::Result<StepLayers<W>> {
    let layers = (0..constants.n_layers()).map(|layer| constants.layer::<W>(layer));
    let layers = layers.collect::<ort::Result<Vec<_>>>()?;
    StepLayers::pack(constants.sizes, layers).map_err(ort::Error::wrap)
}

/// Packed weights, by their type.
enum Packed {
    Float(StepLayers<f32>),
    Bf16(StepLayers<bf16>),
    Int8(StepLayers<i8>),
}

pub(super) struct LayersKernel {
    packed: Packed,
    room: StepMemory,
}

impl Kernel for LayersKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let [rows, seqlens_k, prefixes, first_key] = super::inputs::<4>(context)?;
        let call = Call {
            context,
            rows: &rows,
            seqlens_k: &seqlens_k,
            prefixes: &prefixes,
            room: &mut self.room,
        };
        match (&self.packed, first_key.data_type()) {
            (Packed::Float(layers), TensorElementType::Uint8) => call.run::<_, Int24>(layers),
            (Packed::Float(layers), TensorElementType::Bfloat16) => call.run::<_, bf16>(layers),
            (Packed::Bf16(layers), TensorElementType::Uint8) => call.run::<_, Int24>(layers),
            (Packed::Bf16(layers), TensorElementType::Bfloat16) => call.run::<_, bf16>(layers),
            (Packed::Int8(layers), TensorElementType::Uint8) => call.run::<_, Int24>(layers),
            (Packed::Int8(layers), TensorElementType::Bfloat16) => call.run::<_, bf16>(layers),
            (_, other) => Err(ort::Error::new(format!(
                "the cache has the type {other}; u8 and bf16 are supported"
            ))),
        }
    }
}

/// One run of the operator.
struct Call<'a> {
    context: &'a ComputeContext,
    rows: &'a DynTensor,
    seqlens_k: &'a DynTensor,
    prefixes: &'a DynTensor,
    room: &'a mut StepMemory,
}

impl Call<'_> {
    fn run<W: Weight, K: Kept<Element: PrimitiveTensorElementType>>(
        self,
        layers: &StepLayers<W>,
    ) -> ort::Result<()> {
        let context = self.context;
        let Sizes { width, heads, .. } = layers.sizes();
        let (dims, rows) = self.rows.try_extract_tensor::<f32>()?;
        let (_, ends) = self.seqlens_k.try_extract_tensor::<i32>()?;
        let batch = ends.len();
        let length = rows.len() / (batch * width).max(1);
        let past = past(ends, length)?;
        let (_, prefixes) = self.prefixes.try_extract_tensor::<i32>()?;
        let prefixes = shared(prefixes)?;

        let mut output = super::output(context, 0, dims.to_vec())?;
        let mut kept = Vec::with_capacity(2 * layers.n_layers());
        let mut capacity = 0;
        for layer in 0..layers.n_layers() {
            for part in 0..2 {
                let past = context.input(FIRST + layer * PER_LAYER + part)?;
                let past = past.ok_or_else(|| ort::Error::new("a cache is missing"))?;
                let past: DynTensorRef<'_> = past.downcast()?;
                let dims = past.shape().to_vec();
                capacity = match dims[..] {
                    [_, _, capacity, _] => usize::try_from(capacity).map_err(ort::Error::wrap)?,
                    _ => 0,
                };
                let expected = [batch, heads, capacity, K::position_len(width / heads)];
                let fits = dims
                    .iter()
                    .zip(expected)
                    .all(|(dim, size)| usize::try_from(*dim) == Ok(size));
                if !fits || dims.len() != expected.len() {
                    return Err(ort::Error::new(format!(
                        "a cache of {dims:?} is not (batch, heads, capacity, elements of a position) \
                         = {expected:?}"
                    )));
                }
                let mut present = super::output(context, 1 + 2 * layer + part, dims)?;
                keep::<K::Element>(&past, &mut present)?;
                kept.push(present);
            }
        }
        // From here on the past is not read, since its memory may be the
        // output's.
        apart::<K::Element>(&kept)?;
        let mut caches: Vec<KeyValueCache<'_, K>> = Vec::with_capacity(layers.n_layers());
        for pair in kept.chunks_exact_mut(2) {
            let [keys, values] = pair else { continue };
            caches.push(KeyValueCache {
                keys: keys.try_extract_tensor_mut::<K::Element>()?.1,
                values: values.try_extract_tensor_mut::<K::Element>()?.1,
            });
        }
        let tokens = NewTokens {
            rows,
            length,
            past: &past,
            prefixes: &prefixes,
            capacity,
            caches,
        };
        let step = layers.step(tokens, self.room).map_err(ort::Error::wrap)?;
        // Each thread's first call goes through all layers; later calls find
        // nothing to do.
        context.par_for(THREADS_MAX, 0, |_| step.work())?;
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        step.finish(output).map_err(ort::Error::wrap)
    }
}

/// Checks that no two caches share memory.
fn apart<K>(caches: &[DynTensorRefMut<'_>]) -> ort::Result<()> {
    let mut ranges: Vec<_> = caches.iter().map(|cache| bytes::<K>(cache)).collect();
    ranges.sort_unstable_by_key(|range| range.start);
    if ranges.windows(2).any(|pair| overlap(&pair[0], &pair[1])) {
        return Err(ort::Error::new("keys and values share memory"));
    }
    Ok(())
}

/// Returns the number of tokens of each sequence before its `length` new ones;
/// `ends` has the number after them, less one.
fn past(ends: &[i32], length: usize) -> ort::Result<Vec<usize>> {
    let past = ends.iter().map(|&end| {
        let end = usize::try_from(end).ok()?.checked_add(1)?;
        end.checked_sub(length)
    });
    past.collect::<Option<_>>().ok_or_else(|| {
        ort::Error::new(format!(
            "seqlens_k is {ends:?}; each must be the tokens after {length} new ones, less one"
        ))
    })
}

/// Reads the shared prefixes from pairs of a sequence and a number of
/// positions.
fn shared(pairs: &[i32]) -> ort::Result<Vec<SharedPrefix>> {
    let size = |size: i32| usize::try_from(size).ok();
    let (pairs, rest) = pairs.as_chunks::<2>();
    let shared = pairs.iter().map(|&[of, len]| {
        Some(SharedPrefix {
            of: size(of)?,
            len: size(len)?,
        })
    });
    let shared = shared.collect::<Option<_>>().filter(|_| rest.is_empty());
    shared.ok_or_else(|| ort::Error::new("prefixes are not pairs of a sequence and positions"))
}

/// Copies `past` to `present`, unless both are the same memory; memory that
/// overlaps in part is refused.
fn keep<K: PrimitiveTensorElementType + Copy>(
    past: &DynTensor,
    present: &mut DynTensorRefMut<'_>,
) -> ort::Result<()> {
    // The addresses are compared before slices exist, since the slices of
    // `past` and `present` must not overlap.
    let (from, to) = (bytes::<K>(past), bytes::<K>(present));
    if from == to {
        return Ok(());
    }
    if overlap(&from, &to) {
        return Err(ort::Error::new(
            "the output of a cache overlaps the memory of its input in part",
        ));
    }
    let (_, past) = past.try_extract_tensor::<K>()?;
    let (_, present) = present.try_extract_tensor_mut::<K>()?;
    if past.len() != present.len() {
        return Err(ort::Error::new(
            "the output of a cache is not as long as its input",
        ));
    }
    present.copy_from_slice(past);
    Ok(())
}

/// Returns the range of addresses of a tensor with elements `K`.
fn bytes<K>(tensor: &DynTensor) -> Range<usize> {
    let start = tensor.data_ptr().addr();
    start..start + tensor.shape().num_elements() * size_of::<K>()
}

fn overlap(a: &Range<usize>, b: &Range<usize>) -> bool {
    a.start < b.end && b.start < a.end
}
