//! Causal self-attention on the CPU, the worker's central kernel.
//!
//! The input is the result of the model's `c_attn` product: `(batch, positions,
//! 3 * d)` floats, queries, keys and values side by side, each `d = heads *
//! head_dim` with head `h` at `h * head_dim`. The output is `(batch, positions,
//! d)`, laid out in the same way. Position `i` attends to positions `0..=i`.
//! There is no other mask and no dropout. For generation, [`CachedAttention`]
//! attends over a key/value cache.
//!
//! Work is cut into blocks of a few queries of one head. An [`AttentionJob`]
//! hands the blocks out to all threads that call [`AttentionJob::work`], so it
//! runs in any thread pool that the caller has. Results do not depend on the
//! number of threads. Input after a position changes nothing at the position,
//! not by one bit, as long as the input is finite: an infinity or a NaN also
//! spoils up to 63 positions before it, which are computed beside it and
//! multiply it by zero.
//!
//! [`CausalAttention::job`] checks in safe code all that makes a call sound.
#![expect(
    unsafe_code,
    reason = "hands disjoint parts of one output to several threads, and calls instructions for which the CPU was checked"
)]

use std::cell::RefCell;
use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use self::tile::{Block, HeadView};
#[cfg(target_arch = "x86_64")]
use crate::kernels::vector;
use crate::kernels::vector::Portable;
use crate::kernels::vector::scratch::AlignedScratch;

pub use self::cached::{
    BLOCK, CacheShape, CachedAttention, CachedJob, KeyValueCache, SharedPrefix,
};
pub(crate) use self::cached::{CachedHeads, CachedRows, HeadTasks};
pub use crate::kernels::vector::{Int24, Kept};

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "x86_64")]
mod avx512_bf16;
#[cfg(target_arch = "x86_64")]
mod bf16;
mod cached;
mod cached_tile;
#[cfg(test)]
mod tests;
mod tile;

/// Sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShape {
    pub batch: usize,
    pub positions: usize,
    pub heads: usize,
    pub head_dim: usize,
}

impl AttentionShape {
    /// Returns the number of floats in a row of the output.
    #[must_use]
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the floating-point operations of the causal half of both
    /// products.
    #[must_use]
    #[expect(
        clippy::cast_precision_loss,
        reason = "a figure to print beside a time"
    )]
    pub fn causal_flop(&self) -> f64 {
        let positions = self.positions as f64;
        4.0 * positions * positions / 2.0 * (self.batch * self.width()) as f64
    }

    fn output_len(&self) -> Option<usize> {
        self.batch
            .checked_mul(self.positions)?
            .checked_mul(self.heads)?
            .checked_mul(self.head_dim)
    }
}

/// Precision of the products. The softmax is always `f32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum AttentionPrecision {
    /// All in `f32`: within 2e-6 of the largest value.
    #[default]
    F32,
    /// Factors rounded to bfloat16, sums in `f32`: within 1e-2 of the largest
    /// value. On a CPU without bfloat16 products the same as
    /// [`AttentionPrecision::F32`].
    Bf16,
}

/// Instructions on which a call runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kernel {
    /// Plain code, with the instructions that the compiler chooses.
    Portable,
    /// AVX2 and FMA.
    Avx2,
    /// AVX-512 F, DQ and BW.
    Avx512,
    /// AVX-512 F, DQ, BW and BF16; products in bfloat16.
    Avx512Bf16,
    /// AMX tiles, and AVX-512 as for [`Kernel::Avx512Bf16`]; products in
    /// bfloat16.
    Amx,
}

impl Kernel {
    pub const ALL: [Self; 5] = [
        Self::Portable,
        Self::Avx2,
        Self::Avx512,
        Self::Avx512Bf16,
        Self::Amx,
    ];

    /// Returns the fastest kernel that this CPU has.
    ///
    /// [`Kernel::Avx512Bf16`] is not returned on a CPU with a matrix unit, even
    /// if this process may not use the unit: there it has been measured, and
    /// `f32` is faster. On other CPUs it has not been measured, but Zen 4 and
    /// later have a full unit for it.
    #[must_use]
    pub fn fastest(precision: AttentionPrecision) -> Self {
        let by_speed: &[Self] = match precision {
            AttentionPrecision::F32 => &[Self::Avx512, Self::Avx2],
            AttentionPrecision::Bf16 if Self::has_matrix_unit() => {
                &[Self::Amx, Self::Avx512, Self::Avx2]
            }
            AttentionPrecision::Bf16 => &[Self::Avx512Bf16, Self::Avx512, Self::Avx2],
        };
        by_speed
            .iter()
            .copied()
            .find(|kernel| kernel.is_available())
            .unwrap_or(Self::Portable)
    }

    /// Returns true if this CPU has a matrix unit, which the operating system may
    /// still withhold.
    fn has_matrix_unit() -> bool {
        #[cfg(target_arch = "x86_64")]
        let is_present = vector::amx::is_present();
        #[cfg(not(target_arch = "x86_64"))]
        let is_present = false;
        is_present
    }

    /// Returns true if this CPU and the operating system let the kernel run.
    /// The answer is remembered, so asking is cheap.
    #[cfg(target_arch = "x86_64")]
    #[must_use]
    pub fn is_available(self) -> bool {
        match self {
            Self::Portable => true,
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bw")
            }
            Self::Avx512Bf16 => {
                Self::Avx512.is_available() && is_x86_feature_detected!("avx512bf16")
            }
            Self::Amx => Self::Avx512Bf16.is_available() && vector::amx::is_available(),
        }
    }

    /// Returns true if this CPU and the operating system let the kernel run.
    #[cfg(not(target_arch = "x86_64"))]
    #[must_use]
    pub fn is_available(self) -> bool {
        self == Self::Portable
    }

    /// Returns the precision of the kernel's products.
    #[must_use]
    pub fn precision(self) -> AttentionPrecision {
        match self {
            Self::Portable | Self::Avx2 | Self::Avx512 => AttentionPrecision::F32,
            Self::Avx512Bf16 | Self::Amx => AttentionPrecision::Bf16,
        }
    }

    /// Returns the number of queries in a block.
    fn queries_per_block(self) -> usize {
        match self {
            Self::Portable => 8,
            Self::Avx2 => 16,
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => 64,
        }
    }

    /// Computes the blocks that `next` returns.
    ///
    /// # Safety
    /// The kernel is available, and the contract of [`tile::attend`] holds.
    unsafe fn attend(
        self,
        head: &HeadView,
        next: &mut dyn FnMut() -> Option<Block>,
        scratch: &mut AlignedScratch,
    ) {
        // SAFETY: the caller vouches for all of it.
        unsafe {
            match self {
                #[cfg(target_arch = "x86_64")]
                Self::Avx2 => avx2::attend(head, next, scratch),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512 => avx512::attend(head, next, scratch),
                #[cfg(target_arch = "x86_64")]
                Self::Avx512Bf16 => avx512_bf16::attend(head, next, scratch),
                #[cfg(target_arch = "x86_64")]
                Self::Amx => amx::attend(head, next, scratch),
                _ => tile::attend::<Portable, 6, 2>(head, next, scratch),
            }
        }
    }
}

/// Reason why a call is refused.
#[derive(Clone, Copy, Debug, PartialEq, thiserror::Error)]
pub enum AttentionError {
    #[error("attention over {heads} heads of {head_dim} dimensions: both must be at least one")]
    Empty { heads: usize, head_dim: usize },
    #[error("attention scale {0}: it must be a finite number above zero")]
    Scale(f32),
    #[error("the {0:?} kernel is not available on this CPU or for this kind of attention")]
    Kernel(Kernel),
    #[error("attention over {0:?} is too large to address")]
    TooLarge(AttentionShape),
    #[error("attention over {shape:?}: {name} has {actual} floats, not {expected}")]
    Length {
        shape: AttentionShape,
        name: &'static str,
        expected: usize,
        actual: usize,
    },
    #[error("a cache of {0} positions: it must be whole blocks of {BLOCK} positions")]
    Capacity(usize),
    #[error("attention over {0:?} is too large to address")]
    CacheTooLarge(CacheShape),
    #[error("attention over {shape:?}: {name} has {actual} numbers, not {expected}")]
    CacheLength {
        shape: CacheShape,
        name: &'static str,
        expected: usize,
        actual: usize,
    },
    #[error(
        "{actual} shared prefixes for {expected} sequences: there must be none, or one per sequence"
    )]
    Prefixes { expected: usize, actual: usize },
    #[error(
        "sequence {sequence} cannot share its first {len} positions with sequence {of}: both must \
         have them, sequence {of} must not share a prefix itself, and every sequence must have \
         one new token"
    )]
    Prefix {
        sequence: usize,
        of: usize,
        len: usize,
    },
    #[error(
        "a sequence of {past} tokens and {length} more outgrows its cache of {capacity} positions"
    )]
    Full {
        past: usize,
        length: usize,
        capacity: usize,
    },
}

/// Causal self-attention of one shape, checked, with its kernel chosen.
#[derive(Clone, Copy, Debug)]
pub struct CausalAttention {
    shape: AttentionShape,
    scale: f32,
    kernel: Kernel,
    output_len: usize,
}

impl CausalAttention {
    /// Creates the attention of a shape. `scale` is the factor of the scores,
    /// in these models `1 / sqrt(head_dim)`.
    ///
    /// # Errors
    /// If there is no head or dimension, the scale is not above zero, or the
    /// shape is too large.
    pub fn new(
        shape: AttentionShape,
        scale: f32,
        precision: AttentionPrecision,
    ) -> Result<Self, AttentionError> {
        Self::with_kernel(shape, scale, Kernel::fastest(precision))
    }

    /// Creates the attention on a kernel of the caller's choice, for tests and
    /// benchmarks.
    ///
    /// # Errors
    /// The errors of [`CausalAttention::new`], and an error if this CPU cannot
    /// run the kernel.
    pub fn with_kernel(
        shape: AttentionShape,
        scale: f32,
        kernel: Kernel,
    ) -> Result<Self, AttentionError> {
        if shape.heads == 0 || shape.head_dim == 0 {
            return Err(AttentionError::Empty {
                heads: shape.heads,
                head_dim: shape.head_dim,
            });
        }
        if !scale.is_finite() || scale <= 0.0 {
            return Err(AttentionError::Scale(scale));
        }
        if !kernel.is_available() {
            return Err(AttentionError::Kernel(kernel));
        }
        // The input, three times as many bytes as the output, must also fit an
        // allocation, so that no offset below overflows.
        let output_len = shape
            .output_len()
            .filter(|len| *len <= isize::MAX as usize / 12)
            .ok_or(AttentionError::TooLarge(shape))?;
        Ok(Self {
            shape,
            scale,
            kernel,
            output_len,
        })
    }

    #[must_use]
    pub fn kernel(&self) -> Kernel {
        self.kernel
    }

    /// Prepares the computation of `output` from `qkv`, which
    /// [`AttentionJob::work`] runs.
    ///
    /// # Errors
    /// If a length differs from the shape's.
    pub fn job<'a>(
        &self,
        qkv: &'a [f32],
        output: &'a mut [f32],
    ) -> Result<AttentionJob<'a>, AttentionError> {
        let check = |name, expected, actual| {
            if expected == actual {
                Ok(())
            } else {
                Err(AttentionError::Length {
                    shape: self.shape,
                    name,
                    expected,
                    actual,
                })
            }
        };
        check("qkv", 3 * self.output_len, qkv.len())?;
        check("output", self.output_len, output.len())?;
        // SAFETY: the lengths are those of the shape, and the job borrows both
        // slices.
        Ok(unsafe { self.job_at(qkv.as_ptr(), output.as_mut_ptr()) })
    }

    /// Prepares the computation of the output from memory that a caller shares
    /// out itself.
    ///
    /// # Safety
    /// For `'a` both places have as many floats as the shape says; until the
    /// job's blocks are done, nobody writes the first or has the second.
    pub(crate) unsafe fn job_at<'a>(&self, qkv: *const f32, output: *mut f32) -> AttentionJob<'a> {
        let blocks_per_head = self
            .shape
            .positions
            .div_ceil(self.kernel.queries_per_block());
        // No heads if there are no positions: then no head has a first row
        // either.
        let n_heads = match blocks_per_head {
            0 => 0,
            _ => self.shape.batch * self.shape.heads,
        };
        AttentionJob {
            attention: *self,
            qkv,
            output,
            borrow: PhantomData,
            next_head: AtomicUsize::new(0),
            blocks_left: (0..n_heads)
                .map(|_| AtomicUsize::new(blocks_per_head))
                .collect(),
            n_blocks: n_heads * blocks_per_head,
        }
    }

    /// Computes `output` on `n_threads` threads, the calling thread among them.
    /// The other threads are started for the call, which takes about 30 µs
    /// each.
    ///
    /// # Errors
    /// If a length differs from the shape's.
    pub fn run(
        &self,
        qkv: &[f32],
        output: &mut [f32],
        n_threads: usize,
    ) -> Result<(), AttentionError> {
        let job = self.job(qkv, output)?;
        std::thread::scope(|scope| {
            for _ in 1..n_threads.min(job.n_blocks()) {
                scope.spawn(|| job.work());
            }
            job.work();
        });
        Ok(())
    }
}

/// Blocks of one call, to be worked on by any number of threads.
#[derive(Debug)]
pub struct AttentionJob<'a> {
    attention: CausalAttention,
    qkv: *const f32,
    output: *mut f32,
    borrow: PhantomData<&'a mut [f32]>,
    /// First head that no thread has begun.
    next_head: AtomicUsize,
    /// Number of blocks that no thread has begun, for each head of each image.
    /// The blocks left are those with the first queries.
    blocks_left: Box<[AtomicUsize]>,
    n_blocks: usize,
}

// SAFETY: a block is given to one thread only, and no two blocks write the same
// float of `output`; nobody else reads `output` while the job borrows it.
unsafe impl Sync for AttentionJob<'_> {}
// SAFETY: the same; a job is a borrow of the output and some counters.
unsafe impl Send for AttentionJob<'_> {}

thread_local! {
    static SCRATCH: RefCell<AlignedScratch> = const { RefCell::new(AlignedScratch::new()) };
}

impl AttentionJob<'_> {
    /// Returns the number of blocks: further threads have nothing to do.
    #[must_use]
    pub fn n_blocks(&self) -> usize {
        self.n_blocks
    }

    /// Computes blocks until none is left to begin. The output is complete when
    /// this function has returned on every thread that called it, at least one.
    ///
    /// A thread takes a head of its own as long as there is one, because the
    /// head's keys and values then stay in the thread's cache. After that, the
    /// thread helps with the heads of other threads.
    pub fn work(&self) {
        SCRATCH.with_borrow_mut(|scratch| {
            loop {
                let head = self.next_head.fetch_add(1, Ordering::Relaxed);
                if head >= self.blocks_left.len() {
                    break;
                }
                self.attend(head, scratch);
            }
            // The heads that were begun last have the most blocks left.
            for head in (0..self.blocks_left.len()).rev() {
                self.attend(head, scratch);
            }
        });
    }

    /// Takes the next block of a head: from the last block, which is the
    /// longest, to the first, so that threads that share a head finish
    /// together.
    fn next_block(&self, head: usize) -> Option<Block> {
        let queries_per_block = self.attention.kernel.queries_per_block();
        // No data is passed from thread to thread through the counters.
        let block = self.blocks_left[head]
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| {
                left.checked_sub(1)
            })
            .ok()?
            - 1;
        let first_query = block * queries_per_block;
        Some(Block {
            first_query,
            n_queries: (self.attention.shape.positions - first_query).min(queries_per_block),
        })
    }

    fn attend(&self, head: usize, scratch: &mut AlignedScratch) {
        let CausalAttention {
            shape,
            scale,
            kernel,
            ..
        } = self.attention;
        let next = &mut || self.next_block(head);
        let width = shape.width();
        let (image, column) = (head / shape.heads, head % shape.heads * shape.head_dim);
        // SAFETY: both places are as long as the shape says, and image and column
        // are within it.
        let head = unsafe {
            let image_rows = self.qkv.add(image * shape.positions * 3 * width);
            HeadView {
                queries: image_rows.add(column),
                keys: image_rows.add(width + column),
                values: image_rows.add(2 * width + column),
                output: self.output.add(image * shape.positions * width + column),
                row_stride: 3 * width,
                output_stride: width,
                head_dim: shape.head_dim,
                scale_log2: scale * std::f32::consts::LOG2_E,
            }
        };
        // SAFETY: the kernel is available, as `with_kernel` has checked; the
        // head's rows are within both slices, and a block's output is this
        // thread's.
        unsafe { kernel.attend(&head, next, scratch) }
    }
}
