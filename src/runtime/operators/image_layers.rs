//! The operator `imagegpt.ImageLayers`, all layers for whole images, by the
//! kernel of [`crate::kernels::whole`].
//!
//! After the first two inputs, each layer has fourteen constant inputs
//! ([`Constants`]). Inputs, outputs and attributes:
//!
//! | | |
//! |---|---|
//! | input 0 | input of the first layer, f32, `(batch, positions, width)` |
//! | input 1 | the norm after the last layer, f32, `(width)`, constant; empty for none |
//! | output 0 | by `output`: f32, `(batch, positions, width)` or `(batch, layers + 1, width)` |
//! | `output` | string: `rows`, the rows after the last layer and the final norm; `normed_means` or `raw_means`, means over positions in front of each layer and after the last ([`MeansOf`]) |
//!
//! Graphs of one model have weights in common, and their sessions run one after
//! the other. So the operators of a domain pack each layer once, and use the
//! same memory for the rows of images.

use std::sync::{Arc, Mutex, PoisonError, Weak};

use half::bf16;
use ort::operator::{
    ComputeContext, Kernel, KernelContext, Operator, OperatorInput, OperatorOutput,
};
use ort::value::{DynTensorValueType, PrimitiveTensorElementType, TensorElementType};

use super::constants::{CONSTANTS, Constants};
use crate::kernels::attention::AttentionPrecision;
use crate::kernels::layers::Weight;
use crate::kernels::whole::{
    ImageKernels, ImageLayers, ImageMemory, Images, Means, MeansOf, PackedLayer,
};

/// Name of the operator within [`DOMAIN`](super::DOMAIN).
pub const IMAGE_LAYERS: &str = "ImageLayers";

/// Number of inputs before those of the layers.
const FIRST: usize = 2;
/// Largest number of threads of a session that take part in a run.
const THREADS_MAX: usize = 64;

/// Packed layers and memory that the nodes of a domain share.
#[derive(Default)]
struct Common {
    /// Packed layers that a session uses, by their identity.
    packed: Mutex<Vec<(u64, Weak<PackedLayer>)>>,
    room: Mutex<Room>,
}

/// Memory of runs, which a run has to itself.
#[derive(Default)]
struct Room {
    memory: ImageMemory,
    /// Number of threads of the last run.
    n_threads: usize,
}

#[derive(Default)]
pub(super) struct ImageLayersOp {
    common: Arc<Common>,
}

/// Content of the output.
#[derive(Clone, Copy)]
enum Output {
    Rows,
    Means(MeansOf),
}

impl Output {
    fn named(name: &str) -> Option<Self> {
        Some(match name {
            "rows" => Self::Rows,
            "normed_means" => Self::Means(MeansOf::Normed),
            "raw_means" => Self::Means(MeansOf::Raw),
            _ => return None,
        })
    }
}

impl Operator for ImageLayersOp {
    type Kernel<'attr> = ImageLayersKernel;

    fn name(&self) -> &str {
        IMAGE_LAYERS
    }

    fn inputs(&self) -> impl IntoIterator<Item = OperatorInput> {
        [
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::required(TensorElementType::Float32),
            OperatorInput::variadic(CONSTANTS),
        ]
    }

    fn outputs(&self) -> impl IntoIterator<Item = OperatorOutput> {
        [OperatorOutput::required(TensorElementType::Float32)]
    }

    fn create_kernel(&self, context: &KernelContext<'_>) -> ort::Result<ImageLayersKernel> {
        let output: String = context
            .get("output")
            .ok_or_else(|| ort::Error::new("the attribute output is missing"))?;
        let output = Output::named(&output)
            .ok_or_else(|| ort::Error::new(format!("there is no output {output:?}")))?;
        let constants = Constants::of(context, FIRST, 0)?;
        let norm = context.constant_input::<DynTensorValueType>(1)?;
        let norm = norm.try_extract_tensor::<f32>()?.1;
        let norm = Some(norm).filter(|norm| !norm.is_empty());
        let layers = match constants.weights_type() {
            // Floats stay floats in attention too; beside the rounding of
            // weights, that of attention to bfloat16 is small.
            TensorElementType::Float32 => {
                self.layers::<f32>(&constants, norm, AttentionPrecision::F32)?
            }
            TensorElementType::Bfloat16 => {
                self.layers::<bf16>(&constants, norm, AttentionPrecision::Bf16)?
            }
            TensorElementType::Int8 => {
                self.layers::<i8>(&constants, norm, AttentionPrecision::Bf16)?
            }
            other => {
                return Err(ort::Error::new(format!(
                    "weights have the type {other}; f32, bf16 and i8 are supported"
                )));
            }
        };
        Ok(ImageLayersKernel {
            layers,
            output,
            common: Arc::clone(&self.common),
        })
    }
}

impl ImageLayersOp {
    /// Packs the layers that no other session has packed.
    fn layers<W: Weight + PrimitiveTensorElementType + bytemuck::Pod>(
        &self,
        constants: &Constants<'_>,
        norm: Option<&[f32]>,
        attention: AttentionPrecision,
    ) -> ort::Result<ImageLayers> {
        let sizes = constants.sizes;
        let kernels = ImageKernels::fastest::<W>(attention);
        let mut known = lock(&self.common.packed);
        known.retain(|(_, layer)| layer.strong_count() > 0);
        let mut packed = Vec::with_capacity(constants.n_layers());
        for layer in 0..constants.n_layers() {
            let identity = constants.identity::<W>(layer)?;
            let same = |(other, layer): &(u64, Weak<PackedLayer>)| {
                (*other == identity).then(|| layer.upgrade()).flatten()
            };
            if let Some(layer) = known.iter().find_map(same) {
                packed.push(layer);
                continue;
            }
            let layer = PackedLayer::pack(sizes, &constants.layer::<W>(layer)?, kernels);
            let layer = Arc::new(layer.map_err(ort::Error::wrap)?);
            known.push((identity, Arc::downgrade(&layer)));
            packed.push(layer);
        }
        ImageLayers::new(sizes, packed, norm, kernels).map_err(ort::Error::wrap)
    }
}

pub(super) struct ImageLayersKernel {
    layers: ImageLayers,
    output: Output,
    common: Arc<Common>,
}

impl Kernel for ImageLayersKernel {
    fn compute(&mut self, context: &ComputeContext) -> ort::Result<()> {
        let [input] = super::inputs::<1>(context)?;
        let width = self.layers.sizes().width;
        let (dims, rows) = input.try_extract_tensor::<f32>()?;
        let size = |dim: i64| usize::try_from(dim).ok();
        let (batch, positions) = match dims[..] {
            [batch, positions, columns] if size(columns) == Some(width) => {
                size(batch).zip(size(positions))
            }
            _ => None,
        }
        .ok_or_else(|| {
            ort::Error::new(format!(
                "the input of {dims} is not (batch, positions, {width})"
            ))
        })?;
        let output_dims = match self.output {
            Output::Rows => [batch, positions, width],
            Output::Means(_) => [batch, self.layers.n_layers() + 1, width],
        };
        let mut output = super::output(context, 0, output_dims)?;
        let (_, output) = output.try_extract_tensor_mut::<f32>()?;
        let (output, means) = match self.output {
            Output::Rows => (Some(output), None),
            Output::Means(of) => (None, Some(Means { of, to: output })),
        };
        let mut room = lock(&self.common.room);
        let Room { memory, n_threads } = &mut *room;
        if *n_threads == 0 {
            *n_threads = std::thread::available_parallelism().map_or(1, usize::from);
        }
        let images = Images {
            batch,
            positions,
            rows,
            output,
            means,
            n_threads: *n_threads,
        };
        let run = self.layers.run(images, memory).map_err(ort::Error::wrap)?;
        // Each thread's first call goes through all layers; later calls find
        // nothing to do.
        context.par_for(THREADS_MAX, 0, |_| run.work())?;
        *n_threads = run.finish();
        Ok(())
    }
}

/// Locks what nodes have in common. A panic of another thread leaves it usable:
/// layers are added when they are packed, and a run writes its memory before it
/// reads it.
fn lock<T>(mutex: &Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
