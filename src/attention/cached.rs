//! Attention of a few new tokens over the keys and values of all before them:
//! what a step of generation does.
//!
//! Input is as for [`CausalAttention`](super::CausalAttention), of the new
//! tokens only. Their keys and values are put into the cache behind what the
//! sequence has, as [`Int24`](super::Int24) or rounded to bfloat16; then each
//! attends to the cache up to itself. A step reads the whole cache once and
//! computes next to nothing, so its time is that of the bytes. Sums and softmax are
//! `f32`.
//!
//! The cache of a sequence's head is blocks of [`BLOCK`] positions in the order in
//! which they are read: of keys a row of [`BLOCK`] numbers for each dimension, so
//! that scores of a block are sums of whole vectors; of values a row for each
//! position; and behind either the positions' factors, where numbers have some.
//!
//! A token's result depends on its sequence alone, to the last bit: not on how
//! many sequences or new tokens run with it, not on the threads, and not on
//! what the cache or the input holds after it, finite or not.
#![expect(
    unsafe_code,
    reason = "hands disjoint parts of the cache and the output to several threads"
)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::cached_tile::{self, CachedHead};
use super::{AttentionError, Kernel, Precision, SCRATCH};
use crate::vector::{Kept, Portable};

pub use super::cached_tile::BLOCK;

#[cfg(test)]
mod tests;

/// The sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    pub batch: usize,
    /// New tokens of each sequence.
    pub length: usize,
    /// Positions that the cache has room for: a multiple of [`BLOCK`].
    pub capacity: usize,
    pub heads: usize,
    pub head_dim: usize,
}

impl CacheShape {
    /// Floats in a row of the output.
    #[must_use]
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Floats of the output, and numbers of the keys, which the values have too.
    fn lens(&self) -> Option<(usize, usize)> {
        let width = self.heads.checked_mul(self.head_dim)?;
        let rows = |each: usize| self.batch.checked_mul(each)?.checked_mul(width);
        // Three times as many bytes as an allocation can hold are too many, so
        // that no offset overflows: not with a factor for every number either.
        let fits = |len: &usize| *len <= isize::MAX as usize / 12;
        // Of no sequences too.
        self.capacity.checked_mul(width).filter(fits)?;
        Some((
            rows(self.length).filter(fits)?,
            rows(self.capacity).filter(fits)?,
        ))
    }
}

/// All sequences' keys and values, of `(batch, heads, capacity)` positions of
/// [`Kept::position_len`] each, in the order that the module describes.
#[derive(Debug)]
pub struct Cache<'a, K: Kept> {
    pub keys: &'a mut [K::Element],
    pub values: &'a mut [K::Element],
}

/// Attention over a cache, for one shape, checked, with its kernel chosen.
#[derive(Clone, Copy, Debug)]
pub struct CachedAttention {
    shape: CacheShape,
    scale: f32,
    kernel: Kernel,
    output_len: usize,
}

impl CachedAttention {
    /// `scale` is what scores are multiplied with, in these models
    /// `1 / sqrt(head_dim)`.
    ///
    /// # Errors
    /// If there is no head or dimension, the scale is not above zero, or the
    /// capacity is not whole blocks.
    pub fn new(shape: CacheShape, scale: f32) -> Result<Self, AttentionError> {
        Self::with_kernel(shape, scale, Kernel::fastest(Precision::F32))
    }

    /// The same on a kernel of the caller's choice, for tests and benchmarks:
    /// one of those whose products are `f32`.
    ///
    /// # Errors
    /// As [`CachedAttention::new`], and if this CPU cannot run the kernel or it
    /// is none of those.
    pub fn with_kernel(
        shape: CacheShape,
        scale: f32,
        kernel: Kernel,
    ) -> Result<Self, AttentionError> {
        let CacheShape {
            heads, head_dim, ..
        } = shape;
        if heads == 0 || head_dim == 0 {
            return Err(AttentionError::Empty { heads, head_dim });
        }
        if !scale.is_finite() || scale <= 0.0 {
            return Err(AttentionError::Scale(scale));
        }
        if !kernel.is_available() || kernel.precision() != Precision::F32 {
            return Err(AttentionError::Kernel(kernel));
        }
        if !shape.capacity.is_multiple_of(BLOCK) {
            return Err(AttentionError::Capacity(shape.capacity));
        }
        let (output_len, _) = shape.lens().ok_or(AttentionError::CacheTooLarge(shape))?;
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

    /// Gets ready to put the new tokens of `qkv` into `cache`, where sequence
    /// `i` has `past[i]` tokens, and to compute `output`; [`CachedJob::work`]
    /// does it.
    ///
    /// # Errors
    /// If a length is not what the shape says, or a sequence would outgrow the
    /// cache.
    pub fn job<'a, K: Kept>(
        &self,
        qkv: &'a [f32],
        past: &'a [usize],
        cache: Cache<'a, K>,
        output: &'a mut [f32],
    ) -> Result<CachedJob<'a, K>, AttentionError> {
        self.check("qkv", 3 * self.output_len, qkv.len())?;
        self.check("output", self.output_len, output.len())?;
        let width = self.shape.width();
        let rows = CachedRows {
            qkv: qkv.as_ptr(),
            qkv_stride: 3 * width,
            output: output.as_mut_ptr(),
            output_stride: width,
        };
        Ok(CachedJob {
            heads: self.heads(rows, past, cache)?,
            borrow: PhantomData,
            next_head: AtomicUsize::new(0),
        })
    }

    /// The heads of a call whose rows lie somewhere.
    ///
    /// # Errors
    /// If a length is not what the shape says, or a sequence would outgrow the
    /// cache.
    pub(crate) fn heads<'a, K: Kept>(
        &self,
        rows: CachedRows,
        past: &'a [usize],
        cache: Cache<'a, K>,
    ) -> Result<CachedHeads<'a, K>, AttentionError> {
        let CacheShape {
            batch,
            length,
            capacity,
            heads,
            head_dim,
        } = self.shape;
        let Cache { keys, values } = cache;
        let cache_len = batch * heads * capacity * K::position_len(head_dim);
        self.check("past", batch, past.len())?;
        self.check("keys", cache_len, keys.len())?;
        self.check("values", cache_len, values.len())?;
        for &past in past {
            if past.checked_add(length).is_none_or(|end| end > capacity) {
                return Err(AttentionError::Full {
                    past,
                    length,
                    capacity,
                });
            }
        }
        Ok(CachedHeads {
            attention: *self,
            rows,
            past,
            keys: keys.as_mut_ptr(),
            values: values.as_mut_ptr(),
            borrow: PhantomData,
        })
    }

    fn check(
        &self,
        name: &'static str,
        expected: usize,
        actual: usize,
    ) -> Result<(), AttentionError> {
        if expected == actual {
            return Ok(());
        }
        Err(AttentionError::CacheLength {
            shape: self.shape,
            name,
            expected,
            actual,
        })
    }

    /// Computes `output` on `n_threads` threads, this one among them, as
    /// [`CausalAttention::run`](super::CausalAttention::run) does.
    ///
    /// # Errors
    /// As [`CachedAttention::job`].
    pub fn run<K: Kept>(
        &self,
        qkv: &[f32],
        past: &[usize],
        cache: Cache<'_, K>,
        output: &mut [f32],
        n_threads: usize,
    ) -> Result<(), AttentionError> {
        let job = self.job(qkv, past, cache, output)?;
        std::thread::scope(|scope| {
            for _ in 1..n_threads.min(job.n_heads()) {
                scope.spawn(|| job.work());
            }
            job.work();
        });
        Ok(())
    }
}

/// Where a call's rows lie: queries, keys and values of the new tokens side by
/// side, and what comes out; each row so many floats after the one before.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CachedRows {
    pub(crate) qkv: *const f32,
    pub(crate) qkv_stride: usize,
    pub(crate) output: *mut f32,
    pub(crate) output_stride: usize,
}

/// One call's heads, for a caller that sees to threads itself.
#[derive(Debug)]
pub(crate) struct CachedHeads<'a, K: Kept> {
    attention: CachedAttention,
    rows: CachedRows,
    past: &'a [usize],
    keys: *mut K::Element,
    values: *mut K::Element,
    borrow: PhantomData<&'a mut [K::Element]>,
}

impl<K: Kept> CachedHeads<'_, K> {
    /// How many there are in all sequences.
    pub(crate) fn len(&self) -> usize {
        let CacheShape {
            batch,
            length,
            heads,
            ..
        } = self.attention.shape;
        if length == 0 { 0 } else { batch * heads }
    }

    /// Where the keys of head `idx` begin.
    pub(crate) fn keys(&self, idx: usize) -> *const K::Element {
        self.keys.wrapping_add(idx * self.head_len())
    }

    /// Elements of a head's keys.
    fn head_len(&self) -> usize {
        let shape = self.attention.shape;
        shape.capacity * K::position_len(shape.head_dim)
    }

    /// Computes head `idx` of all sequences', and asks for what lies at `next`,
    /// which need not be valid.
    ///
    /// # Safety
    /// `idx` is below [`CachedHeads::len`], and no other thread has that head;
    /// there are as many rows as the shape says, whole, and until this returns
    /// nobody writes the head's part of them or reads that of the output.
    pub(crate) unsafe fn attend(&self, idx: usize, next: *const u8) {
        // SAFETY: the caller vouches for the head and its rows.
        let head = unsafe { self.head(idx, next) };
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the kernel is available, `with_kernel` has asked; the
            // head is this thread's.
            unsafe {
                match self.attention.kernel {
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => super::avx2::attend_cached(&head, scratch),
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => super::avx512::attend_cached(&head, scratch),
                    _ => cached_tile::attend::<K, Portable, 4, 2>(&head, scratch),
                }
            }
        });
    }

    /// # Safety
    /// As [`CachedHeads::attend`].
    unsafe fn head(&self, idx: usize, next: *const u8) -> CachedHead<K> {
        let CachedAttention { shape, scale, .. } = self.attention;
        let rows = self.rows;
        let width = shape.width();
        let (sequence, column) = (idx / shape.heads, idx % shape.heads * shape.head_dim);
        let first = sequence * shape.length;
        let cached = idx * self.head_len();
        // SAFETY: `heads` has checked the lengths of the cache, and the caller
        // vouches for the rows; sequence and column are within.
        unsafe {
            let qkv = rows.qkv.add(first * rows.qkv_stride + column);
            CachedHead {
                queries: qkv,
                new_keys: qkv.add(width),
                new_values: qkv.add(2 * width),
                row_stride: rows.qkv_stride,
                keys: self.keys.add(cached),
                values: self.values.add(cached),
                output: rows.output.add(first * rows.output_stride + column),
                output_stride: rows.output_stride,
                head_dim: shape.head_dim,
                past: self.past[sequence],
                length: shape.length,
                scale_log2: scale * std::f32::consts::LOG2_E,
                next,
            }
        }
    }
}

/// One call's heads, to be worked on by any number of threads.
#[derive(Debug)]
pub struct CachedJob<'a, K: Kept> {
    heads: CachedHeads<'a, K>,
    /// Of the input and the output.
    borrow: PhantomData<(&'a [f32], &'a mut [f32])>,
    /// The first head of all sequences that no thread has begun.
    next_head: AtomicUsize,
}

// SAFETY: a head of a sequence is given to one thread only, and no two of them
// share a number of the cache or of `output`; nobody else has either while the
// job borrows them.
unsafe impl<K: Kept> Sync for CachedJob<'_, K> {}
// SAFETY: the same; a job is borrows of numbers and a counter.
unsafe impl<K: Kept> Send for CachedJob<'_, K> {}

impl<K: Kept> CachedJob<'_, K> {
    /// How many heads there are in all sequences: more threads than this have
    /// nothing to do.
    #[must_use]
    pub fn n_heads(&self) -> usize {
        self.heads.len()
    }

    /// Computes heads until none is left to begin. The output is complete when
    /// this has returned on every thread that called it, at least one.
    pub fn work(&self) {
        loop {
            // Nothing is passed from thread to thread through the counter.
            let idx = self.next_head.fetch_add(1, Ordering::Relaxed);
            if idx >= self.heads.len() {
                break;
            }
            // SAFETY: the head is this thread's; `job` has checked the lengths of
            // the rows, which the job borrows.
            unsafe { self.heads.attend(idx, self.heads.keys(idx + 1).cast()) }
        }
    }
}
