//! Attention of one block of queries over the keys that they may see, in `f32`.
//!
//! The lanes of a vector are queries. Therefore the queries are transposed once
//! per block, scores come out as one row of queries per key, the softmax runs
//! down the rows with no sum across lanes, and keys and values are read row by
//! row, one float at a time, broadcast: no key is ever transposed. Both
//! products are the same loop, `ROWS` rows by `VECTORS` vectors of accumulators
//! that stay in registers.
//!
//! Keys are taken [`KEYS_PER_STEP`] at a time. The running maximum, sum and
//! output are corrected as the maximum grows (online softmax), so scores never
//! take more than one step's room. Vectors of queries that all come before a
//! key are skipped; the vector of which only some queries do is masked.
#![expect(
    unsafe_code,
    reason = "the product's hot loop: raw pointers, with bounds argued once per block"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]
#![expect(
    clippy::needless_range_loop,
    reason = "rows and vectors index several arrays at once"
)]

use std::ops::Range;

use crate::kernels::vector::Vector;
use crate::kernels::vector::scratch::AlignedScratch;

/// One head of one image, with the rows that it reads and writes. Rows begin at
/// position 0 and hold `head_dim` floats.
pub(super) struct HeadView {
    pub queries: *const f32,
    pub keys: *const f32,
    pub values: *const f32,
    pub output: *mut f32,
    /// Floats from a row of queries, keys or values to the next row.
    pub row_stride: usize,
    pub output_stride: usize,
    pub head_dim: usize,
    /// Factor of the scores, times log2(e). Above zero.
    pub scale_log2: f32,
}

impl HeadView {
    /// Prefetches some rows of a block to be written, and the rows of queries
    /// that lie `distance` before them and are likely the next block's, to be
    /// read. Both come from far away. The CPU would wait for all of them at the
    /// same time, but does not wait for a few with each tile.
    #[inline(always)]
    pub(super) fn prefetch<V: Vector>(&self, block: Block, rows: Range<usize>, distance: usize) {
        for row in rows {
            let position = block.first_query + row;
            let write = self.output.wrapping_add(position * self.output_stride);
            let read = self
                .queries
                .wrapping_add(position.saturating_sub(distance) * self.row_stride);
            for d in (0..self.head_dim).step_by(16) {
                V::prefetch(write.wrapping_add(d));
                V::prefetch(read.wrapping_add(d));
            }
        }
    }
}

/// Consecutive queries of a head.
#[derive(Clone, Copy)]
pub(super) struct Block {
    pub first_query: usize,
    /// Number of queries: at least one, at most the lanes of all vectors.
    pub n_queries: usize,
}

impl Block {
    /// Returns the number of keys that the last query sees, which sees most.
    pub(super) fn n_keys(self) -> usize {
        self.first_query + self.n_queries
    }
}

/// Keys whose scores are kept at the same time. With 64 queries the scores take
/// 15 KiB, under half of a small first-level cache. A multiple of every `ROWS`.
const KEYS_PER_STEP: usize = 60;

/// Computes the blocks that `next` returns, of which the first has the last
/// keys.
///
/// # Safety
/// The CPU has the instructions of `V`, `head`'s rows are valid for
/// `positions`, and blocks lie within them; nobody else reads or writes the
/// output rows of a block meanwhile.
#[inline(always)]
pub(super) unsafe fn attend<V: Vector, const ROWS: usize, const VECTORS: usize>(
    head: &HeadView,
    next: &mut dyn FnMut() -> Option<Block>,
    scratch: &mut AlignedScratch,
) {
    const { assert!(KEYS_PER_STEP.is_multiple_of(ROWS) && VECTORS >= 1 && VECTORS <= 4) };
    let Some(mut block) = next() else { return };
    let width = V::LANES * VECTORS;
    let row = head.head_dim.next_multiple_of(16);
    // Tiles read whole groups of `ROWS` keys. Their results for rows past the
    // last key, whatever the rows hold, are never read.
    let packed = block.n_keys().next_multiple_of(ROWS) * row;
    let [keys, values, queries, scores, output] = scratch.split([
        packed,
        packed,
        head.head_dim * width,
        KEYS_PER_STEP * width,
        head.head_dim * width,
    ]);
    let (keys, values) = (keys.as_mut_ptr(), values.as_mut_ptr());
    // SAFETY: the caller vouches for the instructions, the head and its blocks;
    // scratch is as large as requested above.
    unsafe {
        pack::<V>(head, head.keys, block.n_keys(), keys, row);
        pack::<V>(head, head.values, block.n_keys(), values, row);
    }
    loop {
        let work = Work {
            head,
            block,
            n_vectors: block.n_queries.div_ceil(V::LANES),
            width,
            row,
            keys,
            values,
            queries: queries.as_mut_ptr(),
            scores: scores.as_mut_ptr(),
            output: output.as_mut_ptr(),
        };
        // SAFETY: as above; a later block has no more keys than the first.
        unsafe { work.run::<V, ROWS, VECTORS>() };
        let Some(another) = next() else { break };
        debug_assert!(another.n_keys() <= block.n_keys());
        block = another;
    }
}

/// Copies the first `n_rows` rows of keys or values to `to`.
///
/// In the input, rows are nearly a power of two apart and fall into few sets of
/// a cache: read there, they evict each other from the second level.
///
/// # Safety
/// The contract of [`attend`] holds; `to` has `n_rows` rows of `row` floats.
#[inline(always)]
unsafe fn pack<V: Vector>(
    head: &HeadView,
    from: *const f32,
    n_rows: usize,
    to: *mut f32,
    row: usize,
) {
    let head_dim = head.head_dim;
    for i in 0..n_rows {
        // SAFETY: the row is one of the head's, the column below `head_dim`.
        unsafe {
            let (from, to) = (from.add(i * head.row_stride), to.add(i * row));
            let mut d = 0;
            while d + V::LANES <= head_dim {
                V::load(from.add(d)).store(to.add(d));
                d += V::LANES;
            }
            if d < head_dim {
                let len = head_dim - d;
                V::load_partial(from.add(d), len).store_partial(to.add(d), len);
            }
        }
    }
}

/// One block, and the scratch memory in which it is computed.
struct Work<'a> {
    head: &'a HeadView,
    block: Block,
    /// Number of vectors of queries, the last of which may not be full.
    n_vectors: usize,
    /// Floats in a row of queries, scores and output.
    width: usize,
    /// Floats in a row of keys and values.
    row: usize,
    /// The keys and values that the block sees, packed.
    keys: *const f32,
    values: *const f32,
    /// Queries, transposed: `head_dim` rows.
    queries: *mut f32,
    /// Scores, then probabilities, of a step: one plane per vector, in it one
    /// vector per key. Side by side, a row of four vectors would repeat the low
    /// 12 bits of its address every 16 keys, and loads would wait for stores
    /// that seem to be to the same address.
    scores: *mut f32,
    /// Output so far, transposed: `head_dim` rows.
    output: *mut f32,
}

/// Treatment of the output so far, when values are added to it.
#[derive(Clone, Copy)]
enum Before<'a, V> {
    /// There is no output yet.
    Nothing,
    /// The output stays as it is.
    Same,
    /// The output is multiplied by a factor per vector of queries.
    Times(&'a [V]),
}

/// Keys of one step.
#[derive(Clone, Copy)]
struct Step {
    first_key: usize,
    n_keys: usize,
}

impl Work<'_> {
    /// # Safety
    /// The contract of [`attend`] holds.
    #[inline(always)]
    unsafe fn run<V: Vector, const ROWS: usize, const VECTORS: usize>(&self) {
        debug_assert!(self.block.n_queries >= 1 && self.n_vectors <= VECTORS);
        // SAFETY: what is below `n_vectors` is below `VECTORS`, and the caller
        // vouches for the rest.
        unsafe {
            self.transpose_queries::<V>();
            let (zero, masked) = (V::splat(0.0), V::splat(f32::NEG_INFINITY));
            let (mut max, mut sum) = ([masked; VECTORS], [zero; VECTORS]);
            let n_keys = self.block.n_keys();
            for first_key in (0..n_keys).step_by(KEYS_PER_STEP) {
                let step = Step {
                    first_key,
                    n_keys: (n_keys - first_key).min(KEYS_PER_STEP),
                };
                for key in (0..step.n_keys).step_by(ROWS) {
                    if first_key == 0 {
                        // All rows are prefetched within the step's tiles, a
                        // few with each.
                        let queries = self.block.n_queries;
                        let row = |key: usize| queries * key.min(step.n_keys) / step.n_keys;
                        self.head
                            .prefetch::<V>(self.block, row(key)..row(key + ROWS), self.width);
                    }
                    match self.n_vectors - self.first_vector::<V>(step, key) {
                        1 => self.score::<V, ROWS, 1>(step, key),
                        2 if VECTORS >= 2 => self.score::<V, ROWS, 2>(step, key),
                        3 if VECTORS >= 3 => self.score::<V, ROWS, 3>(step, key),
                        _ if VECTORS >= 4 => self.score::<V, ROWS, 4>(step, key),
                        _ => unreachable!("there are at most {VECTORS} vectors"),
                    }
                }
                let mut factors = [zero; VECTORS];
                for vector in 0..self.n_vectors {
                    factors[vector] =
                        self.soften::<V>(step, vector, &mut max[vector], &mut sum[vector]);
                }
                // Keys are taken by the first vector that sees them: all
                // vectors see the first keys, fewer and fewer see the keys on
                // the diagonal.
                let mut from = 0;
                for vector in 0..self.n_vectors {
                    let to = self.visible_keys::<V>(step, vector);
                    if from < to {
                        // The output is corrected once per step; vectors before
                        // this one see none of these keys.
                        let before = match (first_key, from) {
                            (0, 0) => Before::Nothing,
                            (_, 0) => Before::Times(&factors[vector..]),
                            _ => Before::Same,
                        };
                        match self.n_vectors - vector {
                            1 => self.mix::<V, ROWS, 1>(step, from, to, before),
                            2 if VECTORS >= 2 => self.mix::<V, ROWS, 2>(step, from, to, before),
                            3 if VECTORS >= 3 => self.mix::<V, ROWS, 3>(step, from, to, before),
                            _ if VECTORS >= 4 => self.mix::<V, ROWS, 4>(step, from, to, before),
                            _ => unreachable!("there are at most {VECTORS} vectors"),
                        }
                        from = to;
                    }
                }
            }
            for sum in &mut sum {
                *sum = V::splat(1.0).div(*sum);
            }
            self.finish::<V>(&sum[..self.n_vectors]);
        }
    }

    /// Returns the first vector with a query that sees the step's `key`.
    #[inline(always)]
    fn first_vector<V: Vector>(&self, step: Step, key: usize) -> usize {
        (step.first_key + key).saturating_sub(self.block.first_query) / V::LANES
    }

    /// Returns the number of the step's keys that some query of `vector` sees.
    #[inline(always)]
    fn visible_keys<V: Vector>(&self, step: Step, vector: usize) -> usize {
        let end = self.block.first_query + (vector + 1) * V::LANES;
        end.saturating_sub(step.first_key).min(step.n_keys)
    }

    /// Returns the number of queries in `vector`.
    #[inline(always)]
    fn lanes<V: Vector>(&self, vector: usize) -> usize {
        (self.block.n_queries - vector * V::LANES).min(V::LANES)
    }

    /// Fetches the block's queries and transposes them.
    ///
    /// # Safety
    /// The contract of [`attend`] holds.
    #[inline(always)]
    unsafe fn transpose_queries<V: Vector>(&self) {
        let HeadView {
            head_dim,
            row_stride,
            ..
        } = *self.head;
        // SAFETY: positions are the block's, columns below `head_dim`.
        unsafe {
            let zero = V::splat(0.0);
            for vector in 0..self.n_vectors {
                let rows = self.lanes::<V>(vector);
                let position = self.block.first_query + vector * V::LANES;
                let to = self.queries.add(vector * V::LANES);
                if rows < V::LANES {
                    for d in 0..head_dim {
                        zero.store(to.add(d * self.width));
                    }
                }
                for d in (0..head_dim).step_by(V::LANES) {
                    V::transpose(
                        self.head.queries.add(position * row_stride + d),
                        row_stride,
                        to.add(d * self.width),
                        self.width,
                        rows,
                        (head_dim - d).min(V::LANES),
                    );
                }
            }
        }
    }

    /// Multiplies the output by `factors` and writes it to its place in memory.
    ///
    /// # Safety
    /// The contract of [`attend`] holds; there is a factor for each vector.
    #[inline(always)]
    unsafe fn finish<V: Vector>(&self, factors: &[V]) {
        let HeadView {
            head_dim,
            output_stride,
            ..
        } = *self.head;
        // SAFETY: positions are the block's, columns below `head_dim`.
        unsafe {
            for d in 0..head_dim {
                for (vector, factor) in factors.iter().enumerate() {
                    let at = self.output.add(d * self.width + vector * V::LANES);
                    V::load(at).mul(*factor).store(at);
                }
            }
            for vector in 0..factors.len() {
                let position = self.block.first_query + vector * V::LANES;
                for d in (0..head_dim).step_by(V::LANES) {
                    V::transpose(
                        self.output.add(d * self.width + vector * V::LANES),
                        self.width,
                        self.head.output.add(position * output_stride + d),
                        output_stride,
                        (head_dim - d).min(V::LANES),
                        self.lanes::<V>(vector),
                    );
                }
            }
        }
    }

    /// Computes the scores of `ROWS` keys from `key` for the last `N` vectors
    /// of queries.
    ///
    /// # Safety
    /// The contract of [`attend`] holds; `N` is at least one and at most
    /// `n_vectors`.
    #[inline(always)]
    unsafe fn score<V: Vector, const ROWS: usize, const N: usize>(&self, step: Step, key: usize) {
        let first_lane = (self.n_vectors - N) * V::LANES;
        // SAFETY: packed keys are a multiple of `ROWS`, `d` is below `head_dim`,
        // and the `N` vectors end with the last of a row.
        unsafe {
            let mut keys = [self.keys; ROWS];
            for (i, row) in keys.iter_mut().enumerate() {
                *row = self.keys.add((step.first_key + key + i) * self.row);
            }
            let mut acc = [[V::splat(0.0); N]; ROWS];
            let mut queries = self.queries.cast_const().add(first_lane);
            for d in 0..self.head.head_dim {
                let mut q = [V::splat(0.0); N];
                for (j, q) in q.iter_mut().enumerate() {
                    *q = V::load(queries.add(j * V::LANES));
                }
                queries = queries.add(self.width);
                for i in 0..ROWS {
                    let k = V::splat(*keys[i].add(d));
                    for j in 0..N {
                        acc[i][j] = k.mul_add(q[j], acc[i][j]);
                    }
                }
            }
            let scores = self.scores.add(first_lane * KEYS_PER_STEP + key * V::LANES);
            for (i, acc) in acc.iter().enumerate() {
                for (j, acc) in acc.iter().enumerate() {
                    acc.store(scores.add((j * KEYS_PER_STEP + i) * V::LANES));
                }
            }
        }
    }

    /// Turns the scores of `vector` into probabilities, up to a factor. Brings
    /// `max` and `sum` up to date, and returns the factor by which the output
    /// so far must be multiplied.
    ///
    /// # Safety
    /// The contract of [`attend`] holds.
    #[inline(always)]
    unsafe fn soften<V: Vector>(&self, step: Step, vector: usize, max: &mut V, sum: &mut V) -> V {
        let first_lane = vector * V::LANES;
        let visible = self.visible_keys::<V>(step, vector);
        // From this key on, some queries come before the key.
        let diagonal = (self.block.first_query + first_lane)
            .saturating_sub(step.first_key)
            .min(visible);
        // SAFETY: keys are below `n_keys`, and `vector` is one of the row's.
        unsafe {
            let plane = self.scores.add(first_lane * KEYS_PER_STEP);
            let at = |key: usize| plane.add(key * V::LANES);
            let mut new_max = *max;
            for key in 0..diagonal {
                new_max = V::load(at(key)).max(new_max);
            }
            for key in diagonal..visible {
                let hidden = step.first_key + key - self.block.first_query - first_lane;
                let score = V::load(at(key)).mask_before(hidden);
                score.store(at(key));
                new_max = score.max(new_max);
            }
            let scale = V::splat(self.head.scale_log2);
            let factor = max.sub(new_max).mul(scale).exp2();
            let mut new_sum = sum.mul(factor);
            for key in 0..visible {
                let p = V::load(at(key)).sub(new_max).mul(scale).exp2();
                p.store(at(key));
                new_sum = new_sum.add(p);
            }
            *max = new_max;
            *sum = new_sum;
            factor
        }
    }

    /// Adds the values of the step's keys `from..to`, weighted, to the output of
    /// the last `N` vectors.
    ///
    /// # Safety
    /// The contract of [`attend`] holds; `N` is at most `n_vectors`, `to` at
    /// most `n_keys`, and `before` has `N` factors, if any. All vectors see the
    /// first key.
    #[inline(always)]
    unsafe fn mix<V: Vector, const ROWS: usize, const N: usize>(
        &self,
        step: Step,
        from: usize,
        to: usize,
        before: Before<V>,
    ) {
        let head_dim = self.head.head_dim;
        let mut d = 0;
        // SAFETY: `d` plus the rows of a tile stays within `head_dim`.
        unsafe {
            while d + ROWS <= head_dim {
                self.mix_tile::<V, ROWS, N>(step, from, to, before, d);
                d += ROWS;
            }
            while d + 4 <= head_dim {
                self.mix_tile::<V, 4, N>(step, from, to, before, d);
                d += 4;
            }
            while d + 2 <= head_dim {
                self.mix_tile::<V, 2, N>(step, from, to, before, d);
                d += 2;
            }
            if d < head_dim {
                self.mix_tile::<V, 1, N>(step, from, to, before, d);
            }
        }
    }

    /// # Safety
    /// The contract of [`Work::mix`] holds, and `d + R` is at most `head_dim`.
    #[inline(always)]
    unsafe fn mix_tile<V: Vector, const R: usize, const N: usize>(
        &self,
        step: Step,
        from: usize,
        to: usize,
        before: Before<V>,
        d: usize,
    ) {
        let first_lane = (self.n_vectors - N) * V::LANES;
        // SAFETY: rows `d..d + R` of the output, rows `from..to` of the scores
        // and the same keys' values, all within what the caller vouches for.
        unsafe {
            let output = self.output.add(d * self.width + first_lane);
            let mut acc = [[V::splat(0.0); N]; R];
            match before {
                Before::Nothing => {}
                Before::Same => {
                    for i in 0..R {
                        for j in 0..N {
                            acc[i][j] = V::load(output.add(i * self.width + j * V::LANES));
                        }
                    }
                }
                Before::Times(factors) => {
                    for j in 0..N {
                        let factor = factors[j];
                        for i in 0..R {
                            let at = output.add(i * self.width + j * V::LANES);
                            acc[i][j] = V::load(at).mul(factor);
                        }
                    }
                }
            }
            let mut scores = self
                .scores
                .cast_const()
                .add(first_lane * KEYS_PER_STEP + from * V::LANES);
            let mut values = self.values.add((step.first_key + from) * self.row + d);
            for _ in from..to {
                let mut p = [V::splat(0.0); N];
                for (j, p) in p.iter_mut().enumerate() {
                    *p = V::load(scores.add(j * KEYS_PER_STEP * V::LANES));
                }
                for i in 0..R {
                    let v = V::splat(*values.add(i));
                    for j in 0..N {
                        acc[i][j] = v.mul_add(p[j], acc[i][j]);
                    }
                }
                scores = scores.wrapping_add(V::LANES);
                // Past the last key, this pointer may be outside the values.
                values = values.wrapping_add(self.row);
            }
            for (i, acc) in acc.iter().enumerate() {
                for (j, acc) in acc.iter().enumerate() {
                    acc.store(output.add(i * self.width + j * V::LANES));
                }
            }
        }
    }
}
