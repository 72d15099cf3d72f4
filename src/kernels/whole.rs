//! All layers of the model for whole images.
//!
//! Between two attentions everything is local to a position: projection, norm,
//! expansion, contraction, and the next layer's norm and queries, keys and
//! values. Therefore a thread takes a block of rows through all of that while
//! the rows stay in the second level of its cache, and the weights pass by
//! (`block.rs`). Threads meet only before and after attention
//! ([`CausalAttention`]), twice in a layer, where a graph of operators lets
//! them meet after each product and each norm.
//!
//! Weights are given in `f32` or bfloat16 and stay so, or are given in 8 bits with
//! a scale per output. Rows are rounded as the weights are: to bfloat16, or to
//! whole numbers under a factor of their own (`round.rs`). An image's result depends on the image
//! alone, to the last bit: each sum is over inputs in their order, or over
//! positions in chunks that begin at the image's first position.
#![expect(
    unsafe_code,
    reason = "threads share the rows between the parts of a layer, in disjoint pieces"
)]

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use self::block::{Block, LayerOfImages};
use self::gate::Gate;
use crate::kernels::attention::{
    AttentionJob, AttentionPrecision, AttentionShape, CausalAttention, Kernel,
};
use crate::kernels::layers::phase::{LayerPhase, TASKS_MAX, ThreadPlace};
use crate::kernels::layers::{
    LayerWeights, LayersError, Sizes, Weight, check, norm_weights, size, stride,
};
#[cfg(target_arch = "x86_64")]
use crate::kernels::vector;
use crate::kernels::vector::LANES_MAX;
use crate::kernels::vector::scratch::AlignedScratch;

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
mod block;
mod gate;
mod panels;
mod plain;
mod round;
#[cfg(test)]
mod tests;
mod tile;

/// Format of the numbers that products multiply.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Products {
    /// Floats; for weights that are given as floats.
    Floats,
    /// Numbers in bfloat16, whose sums are floats; for weights in bfloat16.
    ///
    /// The kernels [`Kernel::Portable`], [`Kernel::Avx2`] and [`Kernel::Avx512`]
    /// give the same bits: products are exact, and sums are rounded after each
    /// product, the second of a pair of inputs before the first.
    /// [`Kernel::Avx512Bf16`] does the same by Intel's description, but takes
    /// numbers for zero that are below the normal range of `f32`. A CPU that
    /// rounds a pair's products once gives other last bits. [`Kernel::Amx`] also
    /// takes such numbers for zero, and adds up the first and the second inputs of
    /// 16 pairs separately, before it adds both to the sum.
    Bf16,
    /// Words: weights of 8 bits with rows of up to 16 bits, in as many bits as
    /// no sum can overflow with.
    Words,
    /// Bytes: weights of 8 bits with rows of 8 bits.
    Bytes,
}

impl Products {
    pub const ALL: [Self; 4] = [Self::Floats, Self::Bf16, Self::Words, Self::Bytes];

    /// Returns the number of inputs that are multiplied in a step.
    fn per_step(self) -> usize {
        match self {
            Self::Floats => 1,
            Self::Bf16 | Self::Words => 2,
            Self::Bytes => 4,
        }
    }

    /// Returns the bytes in which a column's weights of a step are kept.
    fn packed_bytes(self) -> usize {
        match self {
            Self::Words => 2,
            Self::Floats | Self::Bf16 | Self::Bytes => 4,
        }
    }

    /// Returns true if a kernel that is available has these products, of weights
    /// `W`.
    #[must_use]
    pub fn are_available<W: Weight>(self, kernel: Kernel) -> bool {
        let are_bytes = W::bytes(&[]).is_some();
        match (self, kernel) {
            (Self::Floats, Kernel::Portable | Kernel::Avx2 | Kernel::Avx512) => {
                W::floats(&[]).is_some()
            }
            (Self::Bf16, _) => W::bf16(&[]).is_some(),
            (Self::Words, Kernel::Portable | Kernel::Avx2 | Kernel::Avx512) => are_bytes,
            // Not faster than words; for tests, and for Miri.
            (Self::Bytes, Kernel::Portable) => are_bytes,
            #[cfg(target_arch = "x86_64")]
            (Self::Bytes, Kernel::Avx512) => are_bytes && is_x86_feature_detected!("avx512vnni"),
            #[cfg(target_arch = "x86_64")]
            (Self::Bytes, Kernel::Amx) => are_bytes && vector::amx::has_bytes(),
            _ => false,
        }
    }
}

/// Returns true if this CPU multiplies bfloat16, so that weights in bfloat16 are
/// faster than as floats.
#[must_use]
pub fn has_bf16_products() -> bool {
    Kernel::Avx512Bf16.is_available() || Kernel::Amx.is_available()
}

/// Instructions on which layers run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageKernels {
    pub products: Products,
    /// Kernel of the products and norms.
    pub products_on: Kernel,
    pub attention_on: Kernel,
}

impl ImageKernels {
    /// Returns the fastest kernels that this CPU has for weights of the type
    /// `W`.
    #[must_use]
    pub fn fastest<W: Weight>(attention: AttentionPrecision) -> Self {
        use Products::{Bf16, Bytes, Floats, Words};
        const BY_SPEED: [(Products, Kernel); 13] = [
            (Bytes, Kernel::Amx),
            (Bytes, Kernel::Avx512),
            (Words, Kernel::Avx512),
            (Words, Kernel::Avx2),
            (Words, Kernel::Portable),
            (Bf16, Kernel::Amx),
            (Bf16, Kernel::Avx512Bf16),
            (Bf16, Kernel::Avx512),
            (Bf16, Kernel::Avx2),
            (Bf16, Kernel::Portable),
            (Floats, Kernel::Avx512),
            (Floats, Kernel::Avx2),
            (Floats, Kernel::Portable),
        ];
        let (products, products_on) = BY_SPEED
            .into_iter()
            .find(|(products, kernel)| {
                kernel.is_available() && products.are_available::<W>(*kernel)
            })
            .unwrap_or((Floats, Kernel::Portable));
        Self {
            products,
            products_on,
            attention_on: Kernel::fastest(attention),
        }
    }

    /// Returns the number of steps of a product of `inputs` inputs. The matrix
    /// unit does as many together as a tile has rows.
    fn n_steps(self, inputs: usize) -> usize {
        let n_steps = inputs.div_ceil(self.products.per_step());
        match self.products_on {
            Kernel::Amx => n_steps.next_multiple_of(TILE_ROWS),
            _ => n_steps,
        }
    }
}

/// Rows of a tile of the matrix unit.
const TILE_ROWS: usize = 16;

/// Packed weights of a layer, which the layers of several graphs may share.
#[derive(Debug)]
pub struct PackedLayer {
    sizes: Sizes,
    kernels: ImageKernels,
    weights: LayerOfImages,
}

impl PackedLayer {
    /// Packs weights in the order in which they are read.
    ///
    /// # Errors
    /// If sizes do not fit, this CPU does not have the kernels or their products
    /// of these weights, sums of whole numbers could overflow, or memory does not
    /// suffice.
    pub fn pack<W: Weight>(
        sizes: Sizes,
        layer: &LayerWeights<'_, W>,
        kernels: ImageKernels,
    ) -> Result<Self, LayersError> {
        sizes.check()?;
        for kernel in [kernels.products_on, kernels.attention_on] {
            if !kernel.is_available() {
                return Err(LayersError::Kernel(kernel));
            }
        }
        if !kernels.products.are_available::<W>(kernels.products_on) {
            return Err(LayersError::Digits(sizes.width));
        }
        Ok(Self {
            sizes,
            kernels,
            weights: LayerOfImages::pack(sizes, layer, kernels)?,
        })
    }
}

/// Layers that whole images pass through.
#[derive(Debug)]
pub struct ImageLayers {
    sizes: Sizes,
    kernels: ImageKernels,
    packed: Vec<Arc<PackedLayer>>,
    /// Weights of the norm after the last layer, padded with zeros to whole
    /// vectors.
    final_norm: Option<Vec<f32>>,
}

/// Stream whose means over an image's positions are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum MeansOf {
    /// The normed rows that a layer's queries, keys and values are made of.
    Normed,
    /// The rows as they are in front of a layer.
    Raw,
}

/// Means over each image's positions, `(batch, n_layers + 1, width)`: in front
/// of each layer, and after the last, where the final norm has been applied, if
/// there is one.
#[derive(Debug)]
pub struct Means<'a> {
    pub of: MeansOf,
    pub to: &'a mut [f32],
}

/// Images, and places for what is made of them.
#[derive(Debug)]
pub struct Images<'a> {
    pub batch: usize,
    pub positions: usize,
    /// Input of the first layer, `(batch, positions, width)`.
    pub rows: &'a [f32],
    /// Rows after the last layer and the final norm, `(batch, positions, width)`.
    pub output: Option<&'a mut [f32]>,
    pub means: Option<Means<'a>>,
    /// Number of threads that will most likely come, for which the work is cut.
    /// Results do not depend on it.
    pub n_threads: usize,
}

/// Memory of runs, which come one after the other. It is as large as the largest
/// run needs.
#[derive(Default)]
pub struct ImageMemory {
    rows: AlignedScratch,
    phases: Vec<LayerPhase>,
    gates: Vec<Gate>,
}

impl std::fmt::Debug for ImageMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ImageMemory").finish_non_exhaustive()
    }
}

/// Positions whose rows are added up first for a mean. Blocks are made of whole
/// chunks.
const CHUNK: usize = 16;

/// Most rows of a block.
const BLOCK_ROWS_MAX: usize = 4 * CHUNK;

impl ImageLayers {
    /// Packs the weights of all layers.
    ///
    /// # Errors
    /// The errors of [`PackedLayer::pack`] and [`ImageLayers::new`].
    pub fn pack<'a, W: Weight>(
        sizes: Sizes,
        layers: impl IntoIterator<Item = LayerWeights<'a, W>>,
        final_norm: Option<&[f32]>,
        kernels: ImageKernels,
    ) -> Result<Self, LayersError> {
        let layers = layers
            .into_iter()
            .map(|layer| PackedLayer::pack(sizes, &layer, kernels).map(Arc::new));
        let packed = layers.collect::<Result<_, LayersError>>()?;
        Self::new(sizes, packed, final_norm, kernels)
    }

    /// Puts packed layers together.
    ///
    /// # Errors
    /// If a layer was packed for other sizes or kernels, or the final norm has
    /// another width.
    pub fn new(
        sizes: Sizes,
        packed: Vec<Arc<PackedLayer>>,
        final_norm: Option<&[f32]>,
        kernels: ImageKernels,
    ) -> Result<Self, LayersError> {
        sizes.check()?;
        if let Some(other) = packed.iter().find(|layer| layer.sizes != sizes) {
            return Err(LayersError::Sizes(other.sizes));
        }
        if let Some(other) = packed.iter().find(|layer| layer.kernels != kernels) {
            return Err(LayersError::Kernel(other.kernels.products_on));
        }
        Ok(Self {
            sizes,
            kernels,
            packed,
            final_norm: final_norm
                .map(|weights| norm_weights(weights, sizes.width))
                .transpose()?,
        })
    }

    #[must_use]
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    #[must_use]
    pub fn kernels(&self) -> ImageKernels {
        self.kernels
    }

    /// Returns the number of layers.
    #[must_use]
    pub fn n_layers(&self) -> usize {
        self.packed.len()
    }

    /// Prepares a run that takes `images` through all layers.
    /// [`ImagesRun::work`] runs it.
    ///
    /// # Errors
    /// If a length does not fit, or images are too large.
    pub fn run<'a>(
        &'a self,
        images: Images<'a>,
        memory: &'a mut ImageMemory,
    ) -> Result<ImagesRun<'a>, LayersError> {
        let Sizes { width, heads, .. } = self.sizes;
        let Images {
            batch, positions, ..
        } = images;
        let n_rows = size(batch, positions, 1)?;
        // The widest rows, with their padding.
        size(n_rows, 1, stride(size(1, 3, width)?))?;
        let n_floats = size(n_rows, width, 1)?;
        check("input", images.rows.len(), n_floats)?;
        if let Some(output) = &images.output {
            check("output", output.len(), n_floats)?;
        }
        let n_streams = self.packed.len() + 1;
        if let Some(means) = &images.means {
            check("means", means.to.len(), size(batch, n_streams, width)?)?;
        }
        let chunks = positions.div_ceil(CHUNK);
        let blocks = ImageBlocks::new(batch, positions, images.n_threads);
        if blocks.len().saturating_add(batch) > TASKS_MAX {
            return Err(LayersError::Rows(n_rows));
        }
        let ImageMemory {
            rows,
            phases,
            gates,
        } = memory;
        let mean_stride = width.next_multiple_of(LANES_MAX);
        let n_sums = match images.means {
            Some(_) => size(batch * chunks, mean_stride, 2)?,
            None => 0,
        };
        let stream_stride = stride(width);
        let [stream, qkv, attended, sums] =
            rows.split([n_rows * stream_stride, 3 * n_floats, n_floats, n_sums]);
        let shape = AttentionShape {
            batch,
            positions,
            heads,
            head_dim: width / heads,
        };
        let (qkv, attended) = (qkv.as_mut_ptr(), attended.as_mut_ptr());
        let attention = self.packed.iter().map(|layer| {
            let kernel = self.kernels.attention_on;
            let attention =
                CausalAttention::with_kernel(shape, layer.weights.attention_scale(), kernel)?;
            // SAFETY: there are as many floats, which this run has to itself;
            // its gates and phases keep other work on them apart.
            Ok(unsafe { attention.job_at(qkv, attended) })
        });
        let attention = attention.collect::<Result<Vec<_>, LayersError>>()?;
        phases.resize_with(n_streams, LayerPhase::default);
        phases.iter_mut().for_each(LayerPhase::reset);
        gates.resize_with(self.packed.len(), Gate::default);
        gates.iter_mut().for_each(Gate::reset);
        let (means_of, means) = match images.means {
            Some(Means { of, to }) => (of, Some(to.as_mut_ptr())),
            None => (MeansOf::Raw, None),
        };
        Ok(ImagesRun {
            layers: self,
            blocks,
            input: images.rows,
            stream: stream.as_mut_ptr(),
            stream_stride,
            qkv,
            attended,
            sums: sums.as_mut_ptr(),
            output: images.output.map(<[f32]>::as_mut_ptr),
            means_of,
            means,
            attention,
            phases,
            gates,
            n_threads: AtomicUsize::new(0),
            borrow: PhantomData,
        })
    }
}

/// Cut of images into blocks of rows.
#[derive(Clone, Copy, Debug)]
struct ImageBlocks {
    batch: usize,
    positions: usize,
    /// Rows of every block but an image's last.
    rows: usize,
}

impl ImageBlocks {
    /// Cuts images so that threads have about as much to do: of the largest
    /// blocks, those with which the last thread is done first.
    fn new(batch: usize, positions: usize, n_threads: usize) -> Self {
        let by_rows = (CHUNK..=BLOCK_ROWS_MAX).rev().step_by(CHUNK);
        let all = by_rows.map(|rows| Self {
            batch,
            positions,
            rows,
        });
        let longest = |blocks: &Self| blocks.len().div_ceil(n_threads.max(1)) * blocks.rows;
        all.min_by_key(longest).unwrap_or(Self {
            batch,
            positions,
            rows: CHUNK,
        })
    }

    fn per_image(&self) -> usize {
        self.positions.div_ceil(self.rows)
    }

    fn len(&self) -> usize {
        self.batch.saturating_mul(self.per_image())
    }

    /// Returns the image of a block, and its first position and number of rows.
    fn block(&self, idx: usize) -> (usize, usize, usize) {
        let per_image = self.per_image();
        let first = idx % per_image * self.rows;
        (
            idx / per_image,
            first,
            self.rows.min(self.positions - first),
        )
    }
}

/// Images on their way through the layers, to be worked on by any number of
/// threads.
#[derive(Debug)]
pub struct ImagesRun<'a> {
    layers: &'a ImageLayers,
    blocks: ImageBlocks,
    input: &'a [f32],
    /// Rows that go through all layers, to which the layers' results are added.
    stream: *mut f32,
    stream_stride: usize,
    /// Queries, keys and values, as attention reads them.
    qkv: *mut f32,
    attended: *mut f32,
    /// Sums of the rows of each chunk, of this stream and the one before in
    /// turns.
    sums: *mut f32,
    output: Option<*mut f32>,
    means_of: MeansOf,
    means: Option<*mut f32>,
    /// Attention of each layer.
    attention: Vec<AttentionJob<'a>>,
    /// Phases between attentions: one more than there are layers.
    phases: &'a [LayerPhase],
    /// Ends of each layer's attention.
    gates: &'a [Gate],
    /// Number of threads that have called [`ImagesRun::work`].
    n_threads: AtomicUsize,
    /// Borrow of output and means, and of the rows, which belong to the memory.
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a task is given to one thread only, and tasks of a phase write
// disjoint rows that no other task of the phase reads; phases and attentions
// come one after the other, and the memory that one has written can be seen
// when the next begins. Nobody else has the rows while the run borrows them.
unsafe impl Sync for ImagesRun<'_> {}
// SAFETY: the same; a run is borrows of numbers and counters.
unsafe impl Send for ImagesRun<'_> {}

impl ImagesRun<'_> {
    /// Takes part in all layers, from the place at which the other threads are.
    /// The run is done when this function has returned on any thread that called
    /// it.
    pub fn work(&self) {
        if self.is_done() {
            return;
        }
        let place = ThreadPlace::new(self.n_threads.fetch_add(1, Ordering::Relaxed));
        for (idx, phase) in self.phases.iter().enumerate() {
            let n_tasks = self.n_tasks(idx);
            while let Some(task) = phase.take(n_tasks, place.end()) {
                // SAFETY: the task is this thread's; what comes before is over.
                unsafe { self.run(idx, task) }
                phase.done();
            }
            phase.wait(n_tasks);
            if let (Some(gate), Some(attention)) = (self.gates.get(idx), self.attention.get(idx)) {
                gate.pass(|| attention.work());
            }
        }
    }

    /// Returns true if all layers are done, so that the rows are complete.
    fn is_done(&self) -> bool {
        let last = self.phases.len().checked_sub(1);
        last.is_none_or(|idx| self.phases[idx].is_over(self.n_tasks(idx)))
    }

    /// Completes output and means, once a thread has returned from
    /// [`ImagesRun::work`]. Returns the number of threads that came.
    ///
    /// # Panics
    /// If the run is not done.
    pub fn finish(self) -> usize {
        assert!(self.is_done(), "no thread has worked on these images");
        for image in 0..self.blocks.batch {
            // SAFETY: all phases are over, and the run is nobody else's.
            unsafe { self.take_mean(image, self.layers.packed.len()) }
        }
        self.n_threads.into_inner()
    }

    /// Returns the number of tasks of a phase: the blocks, and then the means
    /// that the phase before has left.
    fn n_tasks(&self, idx: usize) -> usize {
        let n_means = match self.means {
            Some(_) if idx > 0 => self.blocks.batch,
            _ => 0,
        };
        self.blocks.len() + n_means
    }

    /// Does a task of a phase.
    ///
    /// # Safety
    /// The task is one of the phase's, no other thread has or had it, and what
    /// comes before the phase is over.
    unsafe fn run(&self, idx: usize, task: usize) {
        // SAFETY: the caller vouches for the task and the order.
        unsafe {
            match task.checked_sub(self.blocks.len()) {
                Some(image) => self.take_mean(image, idx - 1),
                None => Block::of(self, task).run(idx),
            }
        }
    }

    /// Returns the place of the sums of an image's chunk, in front of layer
    /// `stream`.
    fn sums(&self, stream: usize, image: usize, chunk: usize) -> *mut f32 {
        let width = self.layers.sizes.width.next_multiple_of(LANES_MAX);
        let chunks = self.blocks.positions.div_ceil(CHUNK);
        let row = (stream % 2 * self.blocks.batch + image) * chunks + chunk;
        self.sums.wrapping_add(row * width)
    }

    /// Makes the mean of an image in front of layer `stream` from its chunks.
    ///
    /// # Safety
    /// The phase in which the chunks are summed is over, the next but one has
    /// not begun, and no other thread makes this mean.
    unsafe fn take_mean(&self, image: usize, stream: usize) {
        let Some(means) = self.means else { return };
        let width = self.layers.sizes.width;
        let row = image * (self.layers.packed.len() + 1) + stream;
        #[expect(clippy::cast_precision_loss, reason = "positions are few")]
        let n = self.blocks.positions as f32;
        // SAFETY: there is a mean for each image and stream, and a sum for each
        // chunk.
        unsafe {
            let mean = std::slice::from_raw_parts_mut(means.add(row * width), width);
            mean.fill(0.0);
            for chunk in 0..self.blocks.positions.div_ceil(CHUNK) {
                let sums = std::slice::from_raw_parts(self.sums(stream, image, chunk), width);
                for (mean, sum) in mean.iter_mut().zip(sums) {
                    *mean += sum;
                }
            }
            for mean in mean {
                *mean /= n;
            }
        }
    }
}
