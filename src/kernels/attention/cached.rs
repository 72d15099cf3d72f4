//! Attention of a few new tokens over the keys and values of all tokens before
//! them, as in a step of generation.
//!
//! The input is that of [`CausalAttention`](super::CausalAttention), for the
//! new tokens only. Their keys and values are appended to the cache of their
//! sequence, as [`Int24`](super::Int24) or rounded to bfloat16; then each new
//! token attends to the cache up to itself. A step reads the whole cache once
//! and computes next to nothing, so its time is that of reading the bytes. Sums
//! and softmax are `f32`.
//!
//! If sequences begin alike ([`SharedPrefix`]), a step reads the common part
//! once for several of them.
//!
//! The cache of a sequence's head is stored in blocks of [`BLOCK`] positions,
//! in the order in which they are read. A block of keys has a row of [`BLOCK`]
//! numbers per dimension, so that scores of a block are sums of whole vectors.
//! A block of values has a row per position. In both, the positions' factors
//! follow, if the numbers have factors.
//!
//! A token's result depends on its sequence alone, to the last bit: not on how
//! many sequences or new tokens run with it, not on whether the sequence shares
//! a prefix, not on the threads, and not on what the cache or the input holds
//! after the token, finite or not.
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

/// Sizes of one call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CacheShape {
    pub batch: usize,
    /// Number of new tokens of each sequence.
    pub length: usize,
    /// Number of positions that a sequence's cache has room for: a multiple of
    /// [`BLOCK`].
    pub capacity: usize,
    pub heads: usize,
    pub head_dim: usize,
}

impl CacheShape {
    /// Returns the number of floats in a row of the output.
    #[must_use]
    pub fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Returns the number of floats of the output, and that of the keys'
    /// numbers, which the values have too.
    fn lens(&self) -> Option<(usize, usize)> {
        let width = self.heads.checked_mul(self.head_dim)?;
        let rows = |each: usize| self.batch.checked_mul(each)?.checked_mul(width);
        // Three times a length, in bytes of floats, must fit an allocation, so
        // that no offset overflows: not with a factor for every number either.
        let fits = |len: &usize| *len <= isize::MAX as usize / 12;
        // The limit holds for no sequences too.
        self.capacity.checked_mul(width).filter(fits)?;
        Some((
            rows(self.length).filter(fits)?,
            rows(self.capacity).filter(fits)?,
        ))
    }
}

/// Keys and values of all sequences: `(batch, heads, capacity)` positions of
/// [`Kept::position_len`] elements each, in the order that the module
/// describes.
#[derive(Debug)]
pub struct KeyValueCache<'a, K: Kept> {
    pub keys: &'a mut [K::Element],
    pub values: &'a mut [K::Element],
}

/// First positions of a sequence that are exactly those of another sequence of
/// the same call, and may be read there.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SharedPrefix {
    /// Index of the other sequence, which must not share a prefix itself; or
    /// the sequence's own index.
    pub of: usize,
    /// Number of shared positions; 0 if the sequence shares nothing.
    pub len: usize,
}

/// Most sequences that are computed together.
const TOGETHER_MAX: usize = 4;

/// One head of the sequences that are computed together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct HeadTask {
    head: usize,
    /// Indexes of the sequences, of which the first `n` count.
    sequences: [usize; TOGETHER_MAX],
    n: usize,
    /// Shared prefix, in whole blocks.
    prefix: SharedPrefix,
}

/// Tasks of a call, to be shared out among its threads. The tasks are the same
/// for all layers.
#[derive(Clone, Debug)]
pub(crate) struct HeadTasks(Arc<[HeadTask]>);

impl HeadTasks {
    /// Creates the tasks of a call of `shape`. `prefixes` is empty or has one
    /// prefix per sequence.
    ///
    /// # Errors
    /// If a prefix is longer than what one of its two sequences has, or is of a
    /// sequence that does not exist or shares another's prefix, or if there is
    /// not one new token per sequence.
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
            // Without a shared prefix, each sequence is computed by itself.
            let together = if prefix.len > 0 { together(kernel) } else { 1 };
            let all: Vec<usize> = std::iter::once(first).chain(with).collect();
            for head in 0..heads {
                // The groups of one head follow each other, so that the prefix
                // is still in the CPU's cache.
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

/// Returns the number of queries in a tile: 4, or 2 if the CPU has fewer
/// registers.
fn together(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Avx2 => 2,
        _ => TOGETHER_MAX,
    }
}

/// Attention over a key/value cache, for one shape, checked, with its kernel
/// chosen.
#[derive(Clone, Copy, Debug)]
pub struct CachedAttention {
    shape: CacheShape,
    scale: f32,
    kernel: Kernel,
    output_len: usize,
}

impl CachedAttention {
    /// Creates the attention of a shape. `scale` is the factor of the scores,
    /// in these models `1 / sqrt(head_dim)`.
    ///
    /// # Errors
    /// If there is no head or dimension, the scale is not above zero, the
    /// capacity is not whole blocks, or the shape is too large.
    pub fn new(shape: CacheShape, scale: f32) -> Result<Self, AttentionError> {
        Self::with_kernel(shape, scale, Kernel::fastest(AttentionPrecision::F32))
    }

    /// Creates the attention on a kernel of the caller's choice, for tests and
    /// benchmarks. The kernel's products must be `f32`.
    ///
    /// # Errors
    /// The errors of [`CachedAttention::new`], and an error if this CPU cannot
    /// run the kernel or the kernel's products are not `f32`.
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

    /// Prepares a call that puts the new tokens of `qkv` into `cache`, in which
    /// sequence `i` has `past[i]` tokens, and computes `output`.
    /// [`CachedJob::work`] runs the call. `prefixes` is empty or has one prefix
    /// per sequence.
    ///
    /// # Errors
    /// If a length differs from the shape's, a sequence would outgrow the
    /// cache, or a prefix is not possible.
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

    /// Returns the heads of a call whose rows are in memory that the caller
    /// manages. `tasks` must be of the same shape, past and kernel.
    ///
    /// # Errors
    /// If a length differs from the shape's, or a sequence would outgrow the
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

    /// Computes `output` on `n_threads` threads, the calling thread among them,
    /// as [`CausalAttention::run`](super::CausalAttention::run) does.
    ///
    /// # Errors
    /// The errors of [`CachedAttention::job`].
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

/// Memory of a call's rows: queries, keys and values of the new tokens side by
/// side, and the output. A stride is the number of floats from a row to the
/// next row.
#[derive(Clone, Copy, Debug)]
pub(crate) struct CachedRows {
    pub(crate) qkv: *const f32,
    pub(crate) qkv_stride: usize,
    pub(crate) output: *mut f32,
    pub(crate) output_stride: usize,
}

/// Heads of one call, for a caller that manages the threads itself.
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
    /// Returns the number of tasks.
    pub(crate) fn len(&self) -> usize {
        self.tasks.0.len()
    }

    /// Returns the address at which task `idx` begins to read, or null if there
    /// is no such task.
    pub(crate) fn first_read(&self, idx: usize) -> *const K::Element {
        let task = self.tasks.0.get(idx);
        task.map_or(std::ptr::null(), |task| {
            let head = self.head_idx(task.prefix.of, task.head);
            self.keys.wrapping_add(head * self.head_len())
        })
    }

    /// Returns a head's index among the heads of all sequences.
    fn head_idx(&self, sequence: usize, head: usize) -> usize {
        sequence * self.attention.shape.heads + head
    }

    /// Returns the number of elements of a head's keys.
    fn head_len(&self) -> usize {
        let shape = self.attention.shape;
        shape.capacity * K::position_len(shape.head_dim)
    }

    /// Does task `idx`, and prefetches the memory at `next`, which need not be
    /// valid.
    ///
    /// # Safety
    /// `idx` is below [`CachedHeads::len`], and no other thread has that task;
    /// there are as many rows as the shape states, whole, and until this
    /// function returns nobody writes the task's part of the rows or reads the
    /// task's part of the output.
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
            // SAFETY: the kernel is available, as `with_kernel` has checked;
            // the heads are this thread's, and nobody writes within the prefix,
            // which all of the heads have.
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

    /// Returns the head of a sequence, with the memory of its rows and cache.
    ///
    /// # Safety
    /// The contract of [`CachedHeads::attend`] holds.
    unsafe fn head(&self, sequence: usize, head: usize) -> CachedHead<K> {
        let CachedAttention { shape, scale, .. } = self.attention;
        let rows = self.rows;
        let width = shape.width();
        let column = head * shape.head_dim;
        let first = sequence * shape.length;
        let cached = self.head_idx(sequence, head) * self.head_len();
        // SAFETY: `heads` has checked the lengths of the cache, and the caller
        // vouches for the rows; sequence and column are within them.
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

/// Heads of one call, to be worked on by any number of threads.
#[derive(Debug)]
pub struct CachedJob<'a, K: Kept> {
    heads: CachedHeads<'a, K>,
    /// Borrow of the input and the output.
    borrow: PhantomData<(&'a [f32], &'a mut [f32])>,
    /// First task that no thread has begun.
    next_task: AtomicUsize,
}

// SAFETY: a head of a sequence is given to one thread only; no two threads
// write the same number of the cache or of `output`, and numbers of the cache
// that several threads read are written by none; nobody else has access to
// either while the job borrows them.
unsafe impl<K: Kept> Sync for CachedJob<'_, K> {}
// SAFETY: the same; a job is borrows of numbers and a counter.
unsafe impl<K: Kept> Send for CachedJob<'_, K> {}

impl<K: Kept> CachedJob<'_, K> {
    /// Returns the number of tasks: further threads have nothing to do.
    #[must_use]
    pub fn n_tasks(&self) -> usize {
        self.heads.len()
    }

    /// Does tasks until none is left to begin. The output is complete when this
    /// function has returned on every thread that called it, at least one.
    pub fn work(&self) {
        loop {
            // No data is passed from thread to thread through the counter.
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
