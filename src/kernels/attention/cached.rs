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
//! Of sequences that begin alike ([`SharedPrefix`]), a step reads that part once for
//! several of them.
//!
//! The cache of a sequence's head is blocks of [`BLOCK`] positions in the order in
//! which they are read: of keys a row of [`BLOCK`] numbers for each dimension, so
//! that scores of a block are sums of whole vectors; of values a row for each
//! position; and behind either the positions' factors, where numbers have some.
//!
//! A token's result depends on its sequence alone, to the last bit: not on how
//! many sequences or new tokens run with it, not on whether it shares a prefix, not
//! on the threads, and not on what the cache or the input holds after it, finite or
//! not.
#![expect(
    unsafe_code,
    reason = "hands disjoint parts of the cache and the output to several threads"
)]

use std::marker::PhantomData;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use super::cached_tile::{self, CachedHead, SharedPositions, TileWork};
use super::{AttentionError, AttentionPrecision, Kernel, SCRATCH};
use crate::kernels::vector::{Kept, Portable, tile_of};

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
pub struct KeyValueCache<'a, K: Kept> {
    pub keys: &'a mut [K::Element],
    pub values: &'a mut [K::Element],
}

/// A sequence's first positions, of which another one of the same call has the very
/// same: they may be read there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedPrefix {
    /// The other one, which shares nobody else's; or the sequence itself.
    pub of: usize,
    /// How many positions: none if it shares nothing.
    pub len: usize,
}

/// The most sequences that are computed together.
const TOGETHER_MAX: usize = 4;

/// One head of sequences that are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HeadTask {
    head: usize,
    /// The first so many.
    sequences: [usize; TOGETHER_MAX],
    n: usize,
    /// Whole blocks.
    prefix: SharedPrefix,
}

/// What the threads that take part in a call share out among themselves. The same
/// for all layers.
#[derive(Clone, Debug)]
pub(crate) struct HeadTasks(Arc<[HeadTask]>);

impl HeadTasks {
    /// Tasks of a call of `shape`. `prefixes` are none or one of each sequence.
    ///
    /// # Errors
    /// If a prefix is longer than what one of the two has, or of a sequence that is
    /// not there or shares another's.
    pub(crate) fn new(
        shape: CacheShape,
        past: &[usize],
        prefixes: &[SharedPrefix],
        kernel: Kernel,
    ) -> Result<Self, AttentionError> {
        let CacheShape {
            batch,
            length,
            heads,
            ..
        } = shape;
        if length == 0 {
            return Ok(Self(Arc::default()));
        }
        if !prefixes.is_empty() && prefixes.len() != batch {
            return Err(AttentionError::Prefixes {
                expected: batch,
                actual: prefixes.len(),
            });
        }
        let of = |sequence: usize| prefixes.get(sequence).copied().unwrap_or_default();
        let shares = |sequence: usize| of(sequence).len > 0 && of(sequence).of != sequence;
        for sequence in (0..batch).filter(|&sequence| shares(sequence)) {
            let SharedPrefix { of, len } = of(sequence);
            let has = |sequence: usize| past.get(sequence).is_some_and(|past| len <= *past);
            if length != 1 || !has(sequence) || !has(of) || shares(of) {
                return Err(AttentionError::Prefix { sequence, of, len });
            }
        }
        let mut tasks = Vec::with_capacity(batch * heads);
        for first in (0..batch).filter(|&sequence| !shares(sequence)) {
            let blocks = |len: usize| len / BLOCK * BLOCK;
            let with: Vec<usize> = (0..batch)
                .filter(|&other| shares(other) && of(other).of == first)
                .collect();
            let shared = with.iter().map(|&other| blocks(of(other).len)).min();
            let prefix = SharedPrefix {
                of: first,
                len: shared.unwrap_or(0),
            };
            // Of none, each is by itself.
            let together = if prefix.len > 0 { together(kernel) } else { 1 };
            let all: Vec<usize> = std::iter::once(first).chain(with).collect();
            for head in 0..heads {
                // One after the other, so that the prefix is still in the cache.
                let mut rest = &all[..];
                while !rest.is_empty() {
                    let (some, others) = rest.split_at(tile_of(rest.len(), together));
                    let mut sequences = [0; TOGETHER_MAX];
                    sequences[..some.len()].copy_from_slice(some);
                    tasks.push(HeadTask {
                        head,
                        sequences,
                        n: some.len(),
                        prefix,
                    });
                    rest = others;
                }
            }
        }
        Ok(Self(tasks.into()))
    }
}

/// As many queries as a tile has: 4, or 2 where there are fewer registers.
fn together(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Avx2 => 2,
        _ => TOGETHER_MAX,
    }
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
        Self::with_kernel(shape, scale, Kernel::fastest(AttentionPrecision::F32))
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
        if !kernel.is_available() || kernel.precision() != AttentionPrecision::F32 {
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
    /// does it. `prefixes` are none, or one of each sequence.
    ///
    /// # Errors
    /// If a length is not what the shape says, a sequence would outgrow the
    /// cache, or a prefix cannot be.
    pub fn job<'a, K: Kept>(
        &self,
        qkv: &'a [f32],
        past: &'a [usize],
        prefixes: &[SharedPrefix],
        cache: KeyValueCache<'a, K>,
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
        let tasks = HeadTasks::new(self.shape, past, prefixes, self.kernel)?;
        Ok(CachedJob {
            heads: self.heads(rows, past, cache, tasks)?,
            borrow: PhantomData,
            next_task: AtomicUsize::new(0),
        })
    }

    /// The heads of a call whose rows lie somewhere. `tasks` are of the same shape,
    /// past and kernel.
    ///
    /// # Errors
    /// If a length is not what the shape says, or a sequence would outgrow the
    /// cache.
    pub(crate) fn heads<'a, K: Kept>(
        &self,
        rows: CachedRows,
        past: &'a [usize],
        cache: KeyValueCache<'a, K>,
        tasks: HeadTasks,
    ) -> Result<CachedHeads<'a, K>, AttentionError> {
        let CacheShape {
            batch,
            length,
            capacity,
            heads,
            head_dim,
        } = self.shape;
        let KeyValueCache { keys, values } = cache;
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
            tasks,
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
        prefixes: &[SharedPrefix],
        cache: KeyValueCache<'_, K>,
        output: &mut [f32],
        n_threads: usize,
    ) -> Result<(), AttentionError> {
        let job = self.job(qkv, past, prefixes, cache, output)?;
        std::thread::scope(|scope| {
            for _ in 1..n_threads.min(job.n_tasks()) {
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
    tasks: HeadTasks,
    borrow: PhantomData<&'a mut [K::Element]>,
}

impl<K: Kept> CachedHeads<'_, K> {
    /// How many tasks there are.
    pub(crate) fn len(&self) -> usize {
        self.tasks.0.len()
    }

    /// Where task `idx` begins to read; nothing if there is no such task.
    pub(crate) fn first_read(&self, idx: usize) -> *const K::Element {
        let task = self.tasks.0.get(idx);
        task.map_or(std::ptr::null(), |task| {
            let head = self.head_idx(task.prefix.of, task.head);
            self.keys.wrapping_add(head * self.head_len())
        })
    }

    /// A head's place among those of all sequences.
    fn head_idx(&self, sequence: usize, head: usize) -> usize {
        sequence * self.attention.shape.heads + head
    }

    /// Elements of a head's keys.
    fn head_len(&self) -> usize {
        let shape = self.attention.shape;
        shape.capacity * K::position_len(shape.head_dim)
    }

    /// Does task `idx`, and asks for what lies at `next`, which need not be valid.
    ///
    /// # Safety
    /// `idx` is below [`CachedHeads::len`], and no other thread has that task;
    /// there are as many rows as the shape says, whole, and until this returns
    /// nobody writes the task's part of them or reads that of the output.
    pub(crate) unsafe fn attend(&self, idx: usize, next: *const u8) {
        let task = self.tasks.0[idx];
        // SAFETY: the caller vouches for the heads and their rows.
        let head = |sequence| unsafe { self.head(sequence, task.head) };
        let heads = task.sequences.map(head);
        let prefix = head(task.prefix.of);
        let work = TileWork {
            heads: &heads[..task.n],
            prefix: SharedPositions {
                keys: prefix.keys,
                values: prefix.values,
                len: task.prefix.len,
            },
            next,
        };
        SCRATCH.with_borrow_mut(|scratch| {
            // SAFETY: the kernel is available, `with_kernel` has asked; the
            // heads are this thread's, and nobody writes within the prefix, which
            // all of them have.
            unsafe {
                match self.attention.kernel {
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => super::avx2::attend_cached(&work, scratch),
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => super::avx512::attend_cached(&work, scratch),
                    _ => cached_tile::attend::<K, Portable, TOGETHER_MAX, 2>(&work, scratch),
                }
            }
        });
    }

    /// # Safety
    /// As [`CachedHeads::attend`].
    unsafe fn head(&self, sequence: usize, head: usize) -> CachedHead<K> {
        let CachedAttention { shape, scale, .. } = self.attention;
        let rows = self.rows;
        let width = shape.width();
        let column = head * shape.head_dim;
        let first = sequence * shape.length;
        let cached = self.head_idx(sequence, head) * self.head_len();
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
    /// The first task that no thread has begun.
    next_task: AtomicUsize,
}

// SAFETY: a head of a sequence is given to one thread only; no two of them write
// the same number of the cache or of `output`, and what several read of the cache
// none writes; nobody else has either while the job borrows them.
unsafe impl<K: Kept> Sync for CachedJob<'_, K> {}
// SAFETY: the same; a job is borrows of numbers and a counter.
unsafe impl<K: Kept> Send for CachedJob<'_, K> {}

impl<K: Kept> CachedJob<'_, K> {
    /// More threads than this have nothing to do.
    #[must_use]
    pub fn n_tasks(&self) -> usize {
        self.heads.len()
    }

    /// Does tasks until none is left to begin. The output is complete when
    /// this has returned on every thread that called it, at least one.
    pub fn work(&self) {
        loop {
            // Nothing is passed from thread to thread through the counter.
            let idx = self.next_task.fetch_add(1, Ordering::Relaxed);
            if idx >= self.heads.len() {
                break;
            }
            // SAFETY: the task is this thread's; `job` has checked the lengths of
            // the rows, which the job borrows.
            unsafe {
                let next = self.heads.first_read(idx + 1);
                self.heads.attend(idx, next.cast());
            }
        }
    }
}
