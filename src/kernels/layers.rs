//! All layers of the model for a few new tokens, as in a step of generation.
//!
//! A step of a few rows reads every weight once and computes next to nothing
//! with it, so it takes as long as reading memory does, if nothing else delays
//! it. If each product and each norm is an operator, the threads delay it: they
//! are woken for each operator and go to sleep after it, hundreds of times per
//! step. Here the threads come once, and go through all layers together
//! ([`LayersStep::work`]), part by part (`phase.rs`): norm, queries and keys
//! and values, attention over the cache ([`CachedAttention`]), projection,
//! norm, expansion, contraction.
//!
//! Weights are given in `f32` and kept in 24 bits
//! ([`Int24`](crate::kernels::attention::Int24)), or are given and kept in
//! bfloat16, or in 8 bits with a scale per output. Rows and sums are `f32`. Only if weights have 8 bits and
//! the CPU multiplies bytes, rows are rounded to 24 bits first (`digits.rs`). A
//! token's result depends on its sequence alone, to the last bit.
#![expect(
    unsafe_code,
    reason = "threads share the rows between the parts of a step, in disjoint pieces"
)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use self::dense::{PANEL_WIDTH_MAX, Panels, Rows};
use self::digits::DigitRows;
use self::phase::{LayerPhase, TASKS_MAX};
use crate::kernels::attention::{
    AttentionError, AttentionPrecision, CacheShape, CachedAttention, CachedHeads, CachedRows,
    HeadTasks, Kernel, KeyValueCache, SharedPrefix,
};
use crate::kernels::vector::scratch::AlignedScratch;
use crate::kernels::vector::{Kept, LANES_MAX};

pub use self::dense::{DenseWeights, RowsAs, Weight};
pub(in crate::kernels) use self::dense::{Finish, padded};
pub use self::pointwise::Activation;

mod dense;
mod digits;
pub(in crate::kernels) mod pages;
pub(in crate::kernels) mod phase;
pub(in crate::kernels) mod pointwise;
#[cfg(test)]
pub(in crate::kernels) mod tests;

/// Reason why layers cannot be prepared, or a step cannot be made.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum LayersError {
    #[error("layers of {0:?}: all sizes must be at least one, and the heads must divide the width")]
    Sizes(Sizes),
    #[error("the {0:?} kernel is not available on this CPU, or not for these products")]
    Kernel(Kernel),
    #[error("these products are not available with these weights, on this CPU or for {0} inputs")]
    Digits(usize),
    #[error("a product of {rows} rows from {inputs} to {outputs} is too large to address")]
    TooLarge {
        rows: usize,
        inputs: usize,
        outputs: usize,
    },
    #[error("{name} of {actual} numbers, not {expected}")]
    Length {
        name: &'static str,
        expected: usize,
        actual: usize,
    },
    #[error("a step of {0} rows is too large")]
    Rows(usize),
    #[error("cannot allocate {0} bytes for weights")]
    Memory(usize),
    #[error(transparent)]
    Attention(#[from] AttentionError),
}

/// Sizes that all layers have in common.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Sizes {
    pub width: usize,
    /// Width between expansion and contraction.
    pub inner_width: usize,
    pub heads: usize,
    /// Number that norms add to the mean square.
    pub epsilon: f32,
    pub activation: Activation,
}

impl Sizes {
    /// Refuses sizes of zero, and heads that do not divide the width.
    pub(in crate::kernels) fn check(self) -> Result<(), LayersError> {
        let Self {
            width,
            inner_width,
            heads,
            ..
        } = self;
        if width == 0 || inner_width == 0 || heads == 0 || !width.is_multiple_of(heads) {
            return Err(LayersError::Sizes(self));
        }
        Ok(())
    }
}

/// The weights of one layer.
#[derive(Clone, Copy, Debug)]
pub struct LayerWeights<'a, W> {
    pub attention_norm: &'a [f32],
    /// Factor of the attention's scores.
    pub attention_scale: f32,
    /// Product that makes queries, keys and values, side by side.
    pub qkv: DenseWeights<'a, W>,
    pub projection: DenseWeights<'a, W>,
    pub inner_norm: &'a [f32],
    pub expand: DenseWeights<'a, W>,
    pub contract: DenseWeights<'a, W>,
}

#[derive(Debug)]
struct Layer<W: Weight> {
    /// Weights of the norm, padded with zeros to whole vectors. The same holds
    /// for `inner_norm`.
    attention_norm: Vec<f32>,
    attention_scale: f32,
    qkv: Panels<W>,
    projection: Panels<W>,
    inner_norm: Vec<f32>,
    expand: Panels<W>,
    contract: Panels<W>,
}

/// Layers in the order in which a step reads them.
#[derive(Debug)]
pub struct StepLayers<W: Weight> {
    sizes: Sizes,
    kernel: Kernel,
    rows_as: RowsAs,
    packed: Vec<Layer<W>>,
}

/// New tokens of some sequences, and the tokens and caches that the sequences
/// have.
#[derive(Debug)]
pub struct NewTokens<'a, K: Kept> {
    /// Input of the first layer, `(sequences, length, width)`.
    pub rows: &'a [f32],
    /// Number of new tokens of each sequence.
    pub length: usize,
    /// Number of tokens that each sequence has before the new ones.
    pub past: &'a [usize],
    /// Prefixes that sequences share with others: none, or one per sequence.
    pub prefixes: &'a [SharedPrefix],
    /// Number of positions that each sequence's cache has room for.
    pub capacity: usize,
    /// Keys and values of each layer.
    pub caches: Vec<KeyValueCache<'a, K>>,
}

/// Memory of steps, which run one after the other. It is as large as the
/// largest step needs.
#[derive(Default)]
pub struct StepMemory {
    rows: AlignedScratch,
    phases: Vec<LayerPhase>,
}

impl std::fmt::Debug for StepMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("StepMemory").finish_non_exhaustive()
    }
}

impl<W: Weight> StepLayers<W> {
    /// Packs weights in the order in which they are read, for the fastest
    /// kernel that this CPU has.
    ///
    /// # Errors
    /// If sizes do not fit, or memory does not suffice.
    pub fn pack<'a>(
        sizes: Sizes,
        layers: impl IntoIterator<Item = LayerWeights<'a, W>>,
    ) -> Result<Self, LayersError> {
        let kernel = Kernel::fastest(AttentionPrecision::F32);
        let inputs = sizes.width.max(sizes.inner_width);
        let rows_as = RowsAs::fastest::<W>(kernel, inputs);
        Self::with_kernel(sizes, layers, kernel, rows_as)
    }

    /// Packs weights for a kernel and products of the caller's choice, for
    /// tests and benchmarks.
    ///
    /// # Errors
    /// The errors of [`StepLayers::pack`], and an error if this CPU cannot run
    /// the kernel, the kernel's products are not `f32`, or the CPU has no
    /// products of the kind.
    pub fn with_kernel<'a>(
        sizes: Sizes,
        layers: impl IntoIterator<Item = LayerWeights<'a, W>>,
        kernel: Kernel,
        rows_as: RowsAs,
    ) -> Result<Self, LayersError> {
        sizes.check()?;
        let Sizes {
            width, inner_width, ..
        } = sizes;
        if !kernel.is_available() || kernel.precision() != AttentionPrecision::F32 {
            return Err(LayersError::Kernel(kernel));
        }
        let inputs = width.max(inner_width);
        if !rows_as.are_available::<W>(kernel, inputs) {
            return Err(LayersError::Digits(inputs));
        }
        let three = size(1, 3, width)?;
        let layers = layers.into_iter().map(|layer| {
            Ok(Layer {
                attention_norm: norm_weights(layer.attention_norm, width)?,
                attention_scale: layer.attention_scale,
                qkv: Panels::pack(&layer.qkv, [width, three], kernel, rows_as)?,
                projection: Panels::pack(&layer.projection, [width, width], kernel, rows_as)?,
                inner_norm: norm_weights(layer.inner_norm, width)?,
                expand: Panels::pack(&layer.expand, [width, inner_width], kernel, rows_as)?,
                contract: Panels::pack(&layer.contract, [inner_width, width], kernel, rows_as)?,
            })
        });
        Ok(Self {
            sizes,
            kernel,
            rows_as,
            packed: layers.collect::<Result<_, LayersError>>()?,
        })
    }

    #[must_use]
    pub fn sizes(&self) -> Sizes {
        self.sizes
    }

    /// Returns the number of layers.
    #[must_use]
    pub fn n_layers(&self) -> usize {
        self.packed.len()
    }

    /// Prepares a step that takes `tokens` through all layers.
    /// [`LayersStep::work`] runs the step.
    ///
    /// # Errors
    /// If a length does not fit, a sequence would outgrow its cache, or a
    /// prefix is not possible.
    pub fn step<'a, K: Kept>(
        &'a self,
        tokens: NewTokens<'a, K>,
        room: &'a mut StepMemory,
    ) -> Result<LayersStep<'a, W, K>, LayersError> {
        let Sizes {
            width,
            inner_width,
            heads,
            ..
        } = self.sizes;
        let batch = tokens.past.len();
        let n_rows = size(batch, tokens.length, 1)?;
        // The widest rows, with their padding.
        size(n_rows, 1, stride(3 * width.max(inner_width)))?;
        if n_rows * heads > TASKS_MAX {
            return Err(LayersError::Rows(n_rows));
        }
        check("input", tokens.rows.len(), size(n_rows, width, 1)?)?;
        check("caches", tokens.caches.len(), self.packed.len())?;
        let shape = CacheShape {
            batch,
            length: tokens.length,
            capacity: tokens.capacity,
            heads,
            head_dim: width / heads,
        };
        let StepMemory { rows, phases } = room;
        let digits = match self.rows_as {
            RowsAs::Floats => 0,
            RowsAs::Digits => DigitRows::stride(width.max(inner_width)) / size_of::<f32>(),
        };
        let [one, three, inner] = [width, 3 * width, inner_width].map(stride);
        let strides = [one, one, three, one, inner, digits];
        let starts = rows.split(strides.map(|stride| n_rows * stride));
        let starts = starts.map(<[f32]>::as_mut_ptr);
        let [stream, normed, qkv, attended, inner, digits] = std::array::from_fn(|i| Place {
            floats: starts[i],
            stride: strides[i],
        });
        let digits = DigitRows {
            start: digits.floats.cast(),
            stride: digits.stride * size_of::<f32>(),
        };
        for (row, from) in tokens.rows.chunks_exact(width).enumerate() {
            // SAFETY: there are as many rows, of a stride each, and this thread
            // has them all.
            let to = unsafe {
                std::slice::from_raw_parts_mut(
                    stream.floats.add(row * stream.stride),
                    stream.stride,
                )
            };
            let (to, beyond) = to.split_at_mut(width);
            to.copy_from_slice(from);
            // Norms read whole vectors.
            beyond.fill(0.0);
        }
        let rows = CachedRows {
            qkv: qkv.floats,
            qkv_stride: qkv.stride,
            output: attended.floats,
            output_stride: attended.stride,
        };
        let tasks = HeadTasks::new(shape, tokens.past, tokens.prefixes, self.kernel)?;
        let heads = tokens.caches.into_iter().zip(&self.packed);
        let heads = heads.map(|(cache, layer)| {
            CachedAttention::with_kernel(shape, layer.attention_scale, self.kernel)?.heads(
                rows,
                tokens.past,
                cache,
                tasks.clone(),
            )
        });
        let heads = heads.collect::<Result<Vec<_>, _>>()?;
        phases.resize_with(Part::ALL.len() * self.packed.len(), LayerPhase::default);
        phases.iter_mut().for_each(LayerPhase::reset);
        Ok(LayersStep {
            layers: self,
            n_rows,
            stream,
            normed,
            qkv,
            attended,
            inner,
            digits,
            heads,
            phases,
            n_threads: AtomicUsize::new(0),
            borrow: PhantomData,
        })
    }
}

/// Returns the number of floats from a row to the next: room for whole panels,
/// and an odd number of lines, so that rows do not lie a power of two apart.
pub(in crate::kernels) fn stride(width: usize) -> usize {
    ((width + PANEL_WIDTH_MAX).div_ceil(LANES_MAX) | 1) * LANES_MAX
}

pub(in crate::kernels) fn norm_weights(
    weights: &[f32],
    width: usize,
) -> Result<Vec<f32>, LayersError> {
    check("norm", weights.len(), width)?;
    let mut weights = weights.to_vec();
    weights.resize(width.next_multiple_of(LANES_MAX), 0.0);
    Ok(weights)
}

pub(in crate::kernels) fn size(
    rows: usize,
    inputs: usize,
    outputs: usize,
) -> Result<usize, LayersError> {
    rows.checked_mul(inputs)
        .and_then(|product| product.checked_mul(outputs))
        // The limit keeps a few times as many bytes within an allocation, so
        // that no offset overflows.
        .filter(|floats| *floats <= isize::MAX as usize / 64)
        .ok_or(LayersError::TooLarge {
            rows,
            inputs,
            outputs,
        })
}

pub(in crate::kernels) fn check(
    name: &'static str,
    actual: usize,
    expected: usize,
) -> Result<(), LayersError> {
    if actual == expected {
        return Ok(());
    }
    Err(LayersError::Length {
        name,
        expected,
        actual,
    })
}

/// Parts of a layer, in the order in which they run.
#[derive(Clone, Copy, Debug)]
enum Part {
    AttentionNorm,
    Qkv,
    Attend,
    RoundAttended,
    Project,
    InnerNorm,
    Expand,
    RoundInner,
    Contract,
}

impl Part {
    const ALL: [Self; 9] = [
        Self::AttentionNorm,
        Self::Qkv,
        Self::Attend,
        Self::RoundAttended,
        Self::Project,
        Self::InnerNorm,
        Self::Expand,
        Self::RoundInner,
        Self::Contract,
    ];
}

impl Part {
    /// Returns the layer of a phase, and the part of the layer that the phase
    /// is.
    fn of(phase: usize) -> (usize, Self) {
        let parts = Self::ALL.len();
        (phase / parts, Self::ALL[phase % parts])
    }
}

/// A task, and the address at which its thread will most likely read next.
#[derive(Clone, Copy, Debug)]
struct Task {
    idx: usize,
    next: *const u8,
}

/// Rows between two parts.
#[derive(Clone, Copy, Debug)]
struct Place {
    floats: *mut f32,
    stride: usize,
}

/// One step, to be worked on by any number of threads.
#[derive(Debug)]
pub struct LayersStep<'a, W: Weight, K: Kept> {
    layers: &'a StepLayers<W>,
    n_rows: usize,
    /// Rows that go through all layers, to which the layers' results are added.
    stream: Place,
    normed: Place,
    qkv: Place,
    attended: Place,
    inner: Place,
    /// Rows of digits that the next product reads, if it multiplies digits.
    digits: DigitRows,
    /// Attention heads of each layer.
    heads: Vec<CachedHeads<'a, K>>,
    /// Phases of all layers: the parts of each layer.
    phases: &'a [LayerPhase],
    /// Number of threads that have called [`LayersStep::work`].
    n_threads: AtomicUsize,
    /// Borrow of the rows, which belong to the step's memory.
    borrow: PhantomData<&'a mut [f32]>,
}

// SAFETY: a task is given to one thread only, and tasks of one part write
// disjoint pieces of memory that no task of the part reads, except the task's
// own pieces; parts come one after the other, and the memory that one part has
// written can be seen when the next part begins. Nobody else has the rows or
// the caches while the step borrows them.
unsafe impl<W: Weight, K: Kept> Sync for LayersStep<'_, W, K> {}
// SAFETY: the same; a step is borrows of numbers and counters.
unsafe impl<W: Weight, K: Kept> Send for LayersStep<'_, W, K> {}

impl<W: Weight, K: Kept> LayersStep<'_, W, K> {
    /// Takes part in all layers, from the part at which the other threads are.
    /// The step is done when this function has returned on any thread that
    /// called it.
    pub fn work(&self) {
        if self.is_done() {
            return;
        }
        let place = phase::ThreadPlace::new(self.n_threads.fetch_add(1, Ordering::Relaxed));
        for (idx, phase) in self.phases.iter().enumerate() {
            let n_tasks = self.n_tasks(idx);
            while let Some(task) = phase.take(n_tasks, place.end()) {
                let n_threads = self.n_threads.load(Ordering::Relaxed);
                let next = match place.next(task, n_threads, phase, n_tasks) {
                    Some(next) => self.reads(idx, next),
                    None => self.first_read(idx + 1, place),
                };
                // SAFETY: the task is this thread's; the parts before are over.
                unsafe { self.run(idx, task, next.unwrap_or(std::ptr::null())) }
                phase.done();
            }
            phase.wait(n_tasks);
        }
    }

    /// Returns the address at which a task of a phase begins to read memory
    /// that no thread has read in this step.
    fn reads(&self, idx: usize, task: usize) -> Option<*const u8> {
        let (layer, part) = Part::of(idx);
        let packed = &self.layers.packed[layer];
        Some(match part {
            Part::AttentionNorm | Part::RoundAttended | Part::InnerNorm | Part::RoundInner => {
                return None;
            }
            Part::Qkv => packed.qkv.panel(task),
            Part::Attend => self.heads[layer].first_read(task).cast(),
            Part::Project => packed.projection.panel(task),
            Part::Expand => packed.expand.panel(task),
            Part::Contract => packed.contract.panel(task),
        })
    }

    /// Returns the address at which a thread begins to read that comes to this
    /// phase.
    fn first_read(&self, idx: usize, place: phase::ThreadPlace) -> Option<*const u8> {
        (idx..self.phases.len()).find_map(|idx| self.reads(idx, place.first(self.n_tasks(idx))?))
    }

    /// Returns true if all layers are done, so that the rows are complete.
    fn is_done(&self) -> bool {
        let last = self.phases.len().checked_sub(1);
        last.is_none_or(|idx| self.phases[idx].is_over(self.n_tasks(idx)))
    }

    /// Copies out the result of the last layer, `(sequences, length, width)`,
    /// once a thread has returned from [`LayersStep::work`].
    ///
    /// # Errors
    /// If the output has another length.
    ///
    /// # Panics
    /// If the step is not done.
    pub fn finish(self, output: &mut [f32]) -> Result<(), LayersError> {
        assert!(self.is_done(), "no thread has worked on this step");
        let width = self.layers.sizes.width;
        check("output", output.len(), self.n_rows * width)?;
        for (row, to) in output.chunks_exact_mut(width).enumerate() {
            // SAFETY: there are as many rows, and all threads are done with
            // them.
            let from = unsafe {
                std::slice::from_raw_parts(self.stream.floats.add(row * self.stream.stride), width)
            };
            to.copy_from_slice(from);
        }
        Ok(())
    }

    fn n_tasks(&self, idx: usize) -> usize {
        let (layer, part) = Part::of(idx);
        if self.n_rows == 0 {
            return 0;
        }
        let heads = &self.heads[layer];
        let layer = &self.layers.packed[layer];
        match part {
            Part::AttentionNorm | Part::InnerNorm => self.n_rows,
            Part::RoundAttended | Part::RoundInner => match self.layers.rows_as {
                RowsAs::Floats => 0,
                RowsAs::Digits => self.n_rows,
            },
            Part::Qkv => layer.qkv.len(),
            Part::Attend => heads.len(),
            Part::Project => layer.projection.len(),
            Part::Expand => layer.expand.len(),
            Part::Contract => layer.contract.len(),
        }
    }

    /// Does a task of a phase, and prefetches the memory at `next`, if there is
    /// any, which is needed after the task.
    ///
    /// # Safety
    /// The task is one of the phase's, no other thread has or had the task, and
    /// all phases before are over.
    unsafe fn run(&self, idx: usize, task: usize, next: *const u8) {
        let (layer, part) = Part::of(idx);
        let heads = &self.heads[layer];
        let layer = &self.layers.packed[layer];
        let sizes = self.layers.sizes;
        let task = Task { idx: task, next };
        // SAFETY: all places have as many rows as there are, and strides with room
        // for whole panels; the caller vouches for the task and the order.
        unsafe {
            match part {
                Part::AttentionNorm => self.norm(&layer.attention_norm, task),
                Part::Qkv => self.dense(&layer.qkv, task, self.normed, self.qkv, Finish::Set),
                Part::Attend => heads.attend(task.idx, task.next),
                Part::RoundAttended => self.round(self.attended, sizes.width, task.idx),
                Part::Project => {
                    self.dense(
                        &layer.projection,
                        task,
                        self.attended,
                        self.stream,
                        Finish::Add,
                    );
                }
                Part::InnerNorm => self.norm(&layer.inner_norm, task),
                Part::Expand => {
                    let finish = Finish::Activate(sizes.activation);
                    self.dense(&layer.expand, task, self.normed, self.inner, finish);
                }
                Part::RoundInner => self.round(self.inner, sizes.inner_width, task.idx),
                Part::Contract => {
                    self.dense(&layer.contract, task, self.inner, self.stream, Finish::Add);
                }
            }
        }
    }

    /// Norms a row of the stream.
    ///
    /// # Safety
    /// The contract of [`LayersStep::run`] holds.
    unsafe fn norm(&self, weights: &[f32], task: Task) {
        let row = task.idx;
        let Sizes { width, epsilon, .. } = self.layers.sizes;
        // SAFETY: the row is this thread's.
        unsafe {
            pointwise::norm(
                self.layers.kernel,
                self.stream.floats.add(row * self.stream.stride),
                weights.as_ptr(),
                self.normed.floats.add(row * self.normed.stride),
                width,
                epsilon,
            );
            if self.layers.rows_as == RowsAs::Digits {
                self.round(self.normed, width, row);
            }
        }
    }

    /// Rounds a row to digits.
    ///
    /// # Safety
    /// The contract of [`LayersStep::run`] holds, for a row of `width` numbers at
    /// `from`.
    unsafe fn round(&self, from: Place, width: usize, row: usize) {
        let to = self.digits.row(row);
        // SAFETY: `with_kernel` has checked the kernel; the row is this
        // thread's, and there is room for the widest row.
        unsafe {
            let from = from.floats.add(row * from.stride);
            digits::round(self.layers.kernel, from, width, to);
        }
    }

    /// Computes a panel of a product.
    ///
    /// # Safety
    /// The contract of [`LayersStep::run`] holds.
    unsafe fn dense(&self, panels: &Panels<W>, task: Task, from: Place, to: Place, finish: Finish) {
        let rows = Rows {
            n: self.n_rows,
            input: from.floats,
            input_stride: from.stride,
            digits: self.digits,
            output: to.floats,
            output_stride: to.stride,
        };
        // SAFETY: `with_kernel` has checked the kernel; the panel is this
        // thread's, and with the panel these columns.
        unsafe { panels.compute(task.idx, rows, finish, task.next) }
    }
}
