//! Attention of one head with products in bfloat16, for CPUs that have them.
//!
//! The algorithm and its orientation are those of [`super::tile`], cut to the
//! tiles of the matrix unit: a tile is 16 rows of 16 pairs of bfloat16, or 16
//! rows of 16 floats, 1 KiB either way. Scores are keys by queries, so their
//! tiles turn into the probabilities that the second product takes without a
//! transpose; values are transposed as they are packed, once per head.
//!
//! The running maximum only moves once scores exceed it by a factor of 256:
//! until then the output needs no correction, and nothing comes near overflow.
#![expect(
    unsafe_code,
    reason = "vector intrinsics and raw pointers, with bounds argued once per block"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _CMP_GT_OQ, _mm512_add_epi32, _mm512_add_ps, _mm512_castps_si512,
    _mm512_cmp_ps_mask, _mm512_cvtne2ps_pbh, _mm512_div_ps, _mm512_fmadd_ps, _mm512_fmsub_ps,
    _mm512_loadu_ps, _mm512_mask_mov_ps, _mm512_maskz_loadu_ps, _mm512_max_ps, _mm512_mul_ps,
    _mm512_permutexvar_epi16, _mm512_reduce_ps, _mm512_scalef_ps, _mm512_set1_epi32,
    _mm512_set1_ps, _mm512_setzero_ps, _mm512_srli_epi32, _mm512_storeu_ps, _mm512_storeu_si512,
    _mm512_sub_ps, _mm512_ternarylogic_epi32,
};

use super::tile::{Block, HeadView};
use crate::kernels::vector::Vector;
use crate::kernels::vector::avx512::{Avx512, first_lanes};
use crate::kernels::vector::scratch::AlignedScratch;

/// Queries in a block: two pairs of tiles.
const QUERIES: usize = 64;

/// Keys whose scores are kept at the same time: 32 KiB of scores, and half of
/// that again for the probabilities.
const KEYS_PER_STEP: usize = 128;

/// Floats, or pairs of bfloat16, in a tile.
const TILE: usize = 256;

/// Vectors of queries in a block.
const VECTORS: usize = QUERIES / 16;

/// Coefficients of a minimax polynomial for `2^r` on [0, 1], constant term
/// first. Largest relative error 7.5e-5, a fiftieth of bfloat16's step.
const EXP2: [f32; 4] = [0.999_925_2, 0.695_833_56, 0.226_067_16, 0.078_024_52];

/// Most by which scores may exceed the running maximum, as a power of two.
const SLACK: f32 = 8.0;

/// Two by two tiles of sums, of `n` products each. Offsets are in floats.
pub(super) struct Tiles {
    /// Left factors: two tiles of rows, `left_next` apart, each next factor
    /// `left_step` further on.
    pub left: *const f32,
    pub left_next: usize,
    pub left_step: usize,
    /// Right factors: two tiles of columns, likewise.
    pub right: *const f32,
    pub right_next: usize,
    pub right_step: usize,
    pub n: usize,
    /// Sums. The tile at row `i`, column `j` is `i * sum_below + j *
    /// sum_beside` on.
    pub sum: *mut f32,
    pub sum_below: usize,
    pub sum_beside: usize,
}

/// Start of the sums: zero, or the sums that are there.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum SumStart {
    New,
    More,
}

/// Unit that multiplies tiles.
///
/// # Safety
/// `multiply` writes the four tiles of sums and nothing else.
pub(super) unsafe trait Multiply {
    /// Prepares the calling thread.
    ///
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn begin();

    /// # Safety
    /// The contract of [`Multiply::begin`] holds, which has been called, and
    /// the tiles are valid.
    unsafe fn multiply(tiles: &Tiles, sum: SumStart);

    /// # Safety
    /// The contract of [`Multiply::begin`] holds.
    unsafe fn end();
}

/// Computes the blocks that `next` returns, of which the first has the last
/// keys.
///
/// # Safety
/// The CPU has AVX-512 F, DQ, BW and BF16 and what `M` needs, and the contract
/// of [`super::tile::attend`] holds.
#[inline(always)]
pub(super) unsafe fn attend<M: Multiply>(
    head: &HeadView,
    next: &mut dyn FnMut() -> Option<Block>,
    scratch: &mut AlignedScratch,
) {
    let Some(mut block) = next() else { return };
    let n_keys = block.n_keys();
    // Groups of 32 keys, and of 32 columns.
    let (key_groups, column_groups) = (n_keys.div_ceil(32), head.head_dim.div_ceil(32));
    let [keys, values, queries, scores, shares, output] = scratch.split([
        key_groups * column_groups * 2 * TILE,
        key_groups * column_groups * 2 * TILE,
        VECTORS * column_groups * TILE,
        VECTORS * KEYS_PER_STEP * 16,
        VECTORS * KEYS_PER_STEP / 32 * TILE,
        VECTORS * column_groups * 2 * TILE,
    ]);
    let (keys, values) = (keys.as_mut_ptr(), values.as_mut_ptr());
    // SAFETY: the caller vouches for the instructions, the head and its blocks;
    // scratch is as large as requested above.
    unsafe {
        M::begin();
        pack_keys(head, n_keys, keys);
        pack_values(head, n_keys, values);
    }
    loop {
        let work = Work {
            head,
            block,
            column_groups,
            keys,
            values,
            queries: queries.as_mut_ptr(),
            scores: scores.as_mut_ptr(),
            shares: shares.as_mut_ptr(),
            output: output.as_mut_ptr(),
        };
        // SAFETY: as above; a later block has no more keys than the first.
        unsafe { work.run::<M>() };
        let Some(another) = next() else { break };
        debug_assert!(another.n_keys() <= block.n_keys());
        block = another;
    }
    // SAFETY: as above.
    unsafe { M::end() };
}

/// Loads sixteen floats of a row from column `d`, zero past the row's end.
///
/// # Safety
/// The CPU has AVX-512; the row has `head_dim` floats.
#[inline(always)]
unsafe fn columns(row: *const f32, d: usize, head_dim: usize) -> __m512 {
    let len = head_dim.saturating_sub(d).min(16);
    // SAFETY: masked lanes are not read, and a pointer to no lane may be
    // anywhere.
    unsafe { _mm512_maskz_loadu_ps(first_lanes(len), row.wrapping_add(d)) }
}

/// Loads 32 floats of a row from column `d` as bfloat16, zero past the row's
/// end.
///
/// # Safety
/// The contract of [`columns`] holds, and AVX-512 BF16.
#[inline(always)]
unsafe fn row_pairs(row: *const f32, d: usize, head_dim: usize) -> __m512i {
    // SAFETY: the caller vouches for the instructions and the row.
    unsafe {
        let (low, high) = (columns(row, d, head_dim), columns(row, d + 16, head_dim));
        std::mem::transmute(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// Packs keys as left tiles: 16 keys by 32 columns, all columns of 16 keys
/// together.
///
/// # Safety
/// The contract of [`attend`] holds; `to` has room for `n_keys` rounded up to
/// 32.
#[inline(always)]
unsafe fn pack_keys(head: &HeadView, n_keys: usize, to: *mut f32) {
    let column_groups = head.head_dim.div_ceil(32);
    for key in 0..n_keys.next_multiple_of(32) {
        for group in 0..column_groups {
            // SAFETY: rows are below `n_keys`, and tiles as many as there is room for.
            unsafe {
                let mut pairs = _mm512_castps_si512(_mm512_setzero_ps());
                if key < n_keys {
                    let row = head.keys.add(key * head.row_stride);
                    pairs = row_pairs(row, 32 * group, head.head_dim);
                }
                let tile = to.add((key / 16 * column_groups + group) * TILE);
                _mm512_storeu_si512(tile.add(key % 16 * 16).cast(), pairs);
            }
        }
    }
}

/// Packs values as left tiles, transposed: 16 columns by 32 keys, all columns
/// of 32 keys together.
///
/// # Safety
/// The contract of [`pack_keys`] holds.
#[inline(always)]
unsafe fn pack_values(head: &HeadView, n_keys: usize, to: *mut f32) {
    let column_tiles = head.head_dim.div_ceil(32) * 2;
    // One number from the lower half, one from the upper half, and so on.
    let mut interleave = [0_u16; 32];
    for (pair, from) in (0..16).zip(interleave.chunks_exact_mut(2)) {
        from.copy_from_slice(&[pair, pair + 16]);
    }
    for group in 0..n_keys.div_ceil(32) {
        for tile in 0..column_tiles {
            let mut pairs = [0.0_f32; TILE];
            // SAFETY: as in `pack_keys`; the transpose is of 16 by 16.
            unsafe {
                let interleave = std::mem::transmute::<[u16; 32], __m512i>(interleave);
                for pair in 0..16 {
                    let key = group * 32 + pair * 2;
                    let row = |key: usize| {
                        if key < n_keys {
                            let row = head.values.add(key * head.row_stride);
                            columns(row, tile * 16, head.head_dim)
                        } else {
                            _mm512_setzero_ps()
                        }
                    };
                    let both = std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(
                        row(key + 1),
                        row(key),
                    ));
                    let both = _mm512_permutexvar_epi16(interleave, both);
                    _mm512_storeu_si512(pairs.as_mut_ptr().add(pair * 16).cast(), both);
                }
                let to = to.add((group * column_tiles + tile) * TILE);
                Avx512::transpose(pairs.as_ptr(), 16, to, 16, 16, 16);
            }
        }
    }
}

/// One block, and the scratch memory in which it is computed, all of it tiles.
struct Work<'a> {
    head: &'a HeadView,
    block: Block,
    column_groups: usize,
    keys: *const f32,
    values: *const f32,
    /// Queries, as right tiles: 32 columns by 16 queries, all columns of a
    /// vector together.
    queries: *mut f32,
    /// Scores: a plane per vector, in it a row per key of a step.
    scores: *mut f32,
    /// Weight of each key's value, as right tiles: 32 keys by 16 queries, all
    /// keys of a vector together.
    shares: *mut f32,
    /// Output so far, as sums: 16 columns by 16 queries, all vectors of 16
    /// columns together.
    output: *mut f32,
}

impl Work<'_> {
    /// # Safety
    /// The contract of [`attend`] holds.
    #[inline(always)]
    unsafe fn run<M: Multiply>(&self) {
        let Block {
            first_query,
            n_queries,
        } = self.block;
        let n_keys = self.block.n_keys();
        let n_vectors = n_queries.div_ceil(16);
        // SAFETY: the caller vouches for the instructions and the rows; indices
        // are below the number of vectors, groups and columns.
        unsafe {
            self.fetch_queries(n_vectors);
            let mut max = [_mm512_set1_ps(f32::NEG_INFINITY); VECTORS];
            let mut sum = [_mm512_setzero_ps(); VECTORS];
            for first_key in (0..n_keys).step_by(KEYS_PER_STEP) {
                let groups = (n_keys - first_key).min(KEYS_PER_STEP).div_ceil(32);
                for half in 0..n_queries.div_ceil(32) {
                    // Groups of keys that some query of this half sees.
                    let seen = (first_query + 32 * half + 32).saturating_sub(first_key) / 32;
                    let seen = seen.min(groups);
                    if seen == 0 {
                        continue;
                    }
                    for group in 0..seen {
                        if first_key == 0 {
                            let row = 32 * half + 8 * group;
                            let rows = row.min(n_queries)..(row + 8).min(n_queries);
                            self.head.prefetch::<Avx512>(self.block, rows, QUERIES);
                        }
                        let from = (first_key / 16 + 2 * group) * self.column_groups * TILE;
                        M::multiply(
                            &Tiles {
                                left: self.keys.add(from),
                                left_next: self.column_groups * TILE,
                                left_step: TILE,
                                right: self.queries.add(2 * half * self.column_groups * TILE),
                                right_next: self.column_groups * TILE,
                                right_step: TILE,
                                n: self.column_groups,
                                sum: self
                                    .scores
                                    .add((2 * half * KEYS_PER_STEP + 32 * group) * 16),
                                sum_below: 16 * 16,
                                sum_beside: KEYS_PER_STEP * 16,
                            },
                            SumStart::New,
                        );
                    }
                    for vector in 2 * half..n_vectors.min(2 * half + 2) {
                        self.soften(
                            first_key,
                            seen * 32,
                            vector,
                            &mut max[vector],
                            &mut sum[vector],
                        );
                    }
                    for group in 0..self.column_groups {
                        M::multiply(
                            &Tiles {
                                left: self
                                    .values
                                    .add((first_key / 32 * self.column_groups + group) * 2 * TILE),
                                left_next: TILE,
                                left_step: self.column_groups * 2 * TILE,
                                right: self.shares.add(2 * half * KEYS_PER_STEP / 32 * TILE),
                                right_next: KEYS_PER_STEP / 32 * TILE,
                                right_step: TILE,
                                n: seen,
                                sum: self.output.add((group * 2 * VECTORS + 2 * half) * TILE),
                                sum_below: VECTORS * TILE,
                                sum_beside: TILE,
                            },
                            if first_key == 0 {
                                SumStart::New
                            } else {
                                SumStart::More
                            },
                        );
                    }
                }
            }
            for (vector, sum) in sum.iter().enumerate().take(n_vectors) {
                self.finish(vector, *sum);
            }
        }
    }

    /// # Safety
    /// The contract of [`attend`] holds.
    #[inline(always)]
    unsafe fn fetch_queries(&self, n_vectors: usize) {
        let Block {
            first_query,
            n_queries,
        } = self.block;
        for vector in 0..n_vectors {
            for group in 0..self.column_groups {
                let mut pairs = [0.0_f32; TILE];
                // SAFETY: rows are of the block's queries; the transpose is of 16
                // by 16.
                unsafe {
                    for i in 0..(n_queries - vector * 16).min(16) {
                        let position = first_query + vector * 16 + i;
                        let row = self.head.queries.add(position * self.head.row_stride);
                        let row = row_pairs(row, 32 * group, self.head.head_dim);
                        _mm512_storeu_si512(pairs.as_mut_ptr().add(i * 16).cast(), row);
                    }
                    let to = self
                        .queries
                        .add((vector * self.column_groups + group) * TILE);
                    Avx512::transpose(pairs.as_ptr(), 16, to, 16, 16, 16);
                }
            }
        }
    }

    /// Turns a vector's scores of `n_keys` keys, a multiple of 32, into the
    /// weights of the keys' values, and brings `max`, `sum` and the output up
    /// to date.
    ///
    /// # Safety
    /// The contract of [`attend`] holds.
    #[inline(always)]
    unsafe fn soften(
        &self,
        first_key: usize,
        n_keys: usize,
        vector: usize,
        max: &mut __m512,
        sum: &mut __m512,
    ) {
        let first_query = self.block.first_query + vector * 16;
        // From this key on, some queries come before the key.
        let diagonal = first_query.saturating_sub(first_key).min(n_keys);
        // SAFETY: keys are below `n_keys`, and `vector` is one of the block's.
        unsafe {
            let plane = self.scores.add(vector * KEYS_PER_STEP * 16);
            let shares = self.shares.add(vector * KEYS_PER_STEP / 32 * TILE);
            let mut tops = [*max; 4];
            let mut key = 0;
            while key + 4 <= diagonal {
                for (i, top) in tops.iter_mut().enumerate() {
                    let score = _mm512_loadu_ps(plane.add((key + i) * 16));
                    *top = _mm512_max_ps(score, *top);
                }
                key += 4;
            }
            while key < n_keys {
                let at = plane.add(key * 16);
                let mut score = _mm512_loadu_ps(at);
                if key > diagonal {
                    let hidden = (first_key + key - first_query).min(16);
                    score = _mm512_mask_mov_ps(
                        score,
                        first_lanes(hidden),
                        _mm512_set1_ps(f32::NEG_INFINITY),
                    );
                    _mm512_storeu_ps(at, score);
                }
                tops[0] = _mm512_max_ps(score, tops[0]);
                key += 1;
            }
            let top = _mm512_max_ps(
                _mm512_max_ps(tops[0], tops[1]),
                _mm512_max_ps(tops[2], tops[3]),
            );

            let scale = _mm512_set1_ps(self.head.scale_log2);
            let growth = _mm512_mul_ps(_mm512_sub_ps(top, *max), scale);
            let outgrown = _mm512_cmp_ps_mask::<_CMP_GT_OQ>(growth, _mm512_set1_ps(SLACK));
            if outgrown != 0 {
                // Each query is corrected separately: a query that sees more
                // keys must not change, by a rounding, the results of the
                // queries beside it.
                let top = _mm512_mask_mov_ps(*max, outgrown, top);
                let factor = _mm512_mask_mov_ps(
                    _mm512_set1_ps(1.0),
                    outgrown,
                    exp2(_mm512_mul_ps(_mm512_sub_ps(*max, top), scale)),
                );
                if first_key > 0 {
                    *sum = _mm512_mul_ps(*sum, factor);
                    for tile in 0..self.column_groups * 2 {
                        let tile = self.output.add((tile * VECTORS + vector) * TILE);
                        for row in 0..16 {
                            let at = tile.add(row * 16);
                            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
                        }
                    }
                }
                *max = top;
            }

            let offset = _mm512_mul_ps(*max, scale);
            let (half, high) = (
                _mm512_set1_epi32(0x8000),
                _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed()),
            );
            let mut sums = [*sum, _mm512_setzero_ps()];
            for pair in 0..n_keys / 2 {
                let at = plane.add(pair * 32);
                let even = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at), scale, offset));
                let odd = exp2(_mm512_fmsub_ps(_mm512_loadu_ps(at.add(16)), scale, offset));
                sums[0] = _mm512_add_ps(sums[0], even);
                sums[1] = _mm512_add_ps(sums[1], odd);
                // Rounded to bfloat16 by adding half a step: both numbers are
                // at least zero and at most 256.
                let even =
                    _mm512_srli_epi32::<16>(_mm512_add_epi32(_mm512_castps_si512(even), half));
                let odd = _mm512_add_epi32(_mm512_castps_si512(odd), half);
                // (odd & high) | even
                let both = _mm512_ternarylogic_epi32::<0xF8>(even, odd, high);
                _mm512_storeu_si512(shares.add(pair * 16).cast(), both);
            }
            *sum = _mm512_add_ps(sums[0], sums[1]);
        }
    }

    /// Divides a vector's output by its `sum` and writes it to its place in
    /// memory.
    ///
    /// # Safety
    /// The contract of [`attend`] holds.
    #[inline(always)]
    unsafe fn finish(&self, vector: usize, sum: __m512) {
        let head = self.head;
        let position = self.block.first_query + vector * 16;
        let rows = (self.block.n_queries - vector * 16).min(16);
        // SAFETY: rows are of the block's queries, columns below `head_dim`.
        unsafe {
            let factor = _mm512_div_ps(_mm512_set1_ps(1.0), sum);
            for d in (0..head.head_dim).step_by(16) {
                let tile = self.output.add((d / 16 * VECTORS + vector) * TILE);
                for row in 0..16 {
                    let at = tile.add(row * 16);
                    _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), factor));
                }
                Avx512::transpose(
                    tile,
                    16,
                    head.output.add(position * head.output_stride + d),
                    head.output_stride,
                    (head.head_dim - d).min(16),
                    rows,
                );
            }
        }
    }
}

/// Computes `2^x`, zero for minus infinity.
///
/// # Safety
/// The CPU has AVX-512 F and DQ.
#[inline(always)]
unsafe fn exp2(x: __m512) -> __m512 {
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let r = _mm512_reduce_ps::<0x09>(x);
        let mut p = _mm512_set1_ps(EXP2[3]);
        for c in EXP2[..3].iter().rev() {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
        }
        _mm512_scalef_ps(p, x)
    }
}
