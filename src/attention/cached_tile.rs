//! One head of [`super::cached`]: new tokens over a cache.
//!
//! The lanes of a vector are positions while scores are computed, and
//! dimensions while values are added up; both are read as they lie. A score is
//! one sum over the dimensions in order, a result one sum over the positions in
//! order, whatever the tiles are, so tiles are chosen for speed alone: several
//! vectors of one token hide how long an addition takes, several tokens share
//! the work of loading. Factors of positions are multiplied with scores and with
//! probabilities, of which there are far fewer than numbers; they are powers of
//! two, so that rounds nothing.
#![expect(
    unsafe_code,
    reason = "the hot loop of generation: raw pointers, bounds reasoned once a head"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]
#![expect(
    clippy::needless_range_loop,
    reason = "tokens and vectors index several arrays at once"
)]

use crate::vector::scratch::Scratch;
use crate::vector::{Kept, Vector};

/// Positions in a block of keys. A multiple of every vector's lanes.
pub const BLOCK: usize = 16;

/// Bytes ahead of a value that are asked for, about as many as come while what
/// is there is added up: the CPU's own guesses are half as fast.
const AHEAD: usize = 8192;

/// Probabilities that are below two to the power of this are zero: beside the
/// largest, of 1, they are nothing, and for numbers that are not normal, as still
/// smaller ones would be, a CPU takes a hundred times as long.
const LEAST_LOG2: f32 = -64.0;

/// What factors of values are multiplied with before probabilities are, and sums
/// are divided by: so that their products are normal numbers too. 2^30, as the
/// factor of numbers up to 2 is 2^-30.
const FACTOR_SCALE: f32 = 1_073_741_824.0;

/// One head of one sequence, and what it reads and writes.
pub(super) struct CachedHead<K: Kept> {
    /// Rows of the first new token, `head_dim` floats each.
    pub queries: *const f32,
    pub new_keys: *const f32,
    pub new_values: *const f32,
    /// Floats from a new token's row to the next one's.
    pub row_stride: usize,
    /// The cache.
    pub keys: *mut K::Element,
    pub values: *mut K::Element,
    pub output: *mut f32,
    pub output_stride: usize,
    pub head_dim: usize,
    /// Positions of the cache that are filled.
    pub past: usize,
    pub length: usize,
    /// What scores are multiplied with, times log2(e). Above zero.
    pub scale_log2: f32,
    /// What the thread reads next, to be asked for. It need not be there.
    pub next: *const u8,
}

/// Appends the new tokens and computes their output, `QUERIES` at a time while
/// there are as many, in tiles of up to `VECTORS` vectors.
///
/// # Safety
/// The CPU has the instructions of `V`; `head`'s rows are valid for `length`
/// tokens, and its cache for whole blocks that have room for `past + length`;
/// nobody else reads or writes the cache or the output of the head meanwhile.
#[inline(always)]
pub(super) unsafe fn attend<K: Kept, V: Vector, const QUERIES: usize, const VECTORS: usize>(
    head: &CachedHead<K>,
    scratch: &mut Scratch,
) {
    const { assert!(BLOCK.is_multiple_of(V::LANES) && V::LANES <= BLOCK && QUERIES >= 1) };
    // One more line, so that rows of a power of two do not share their sets of
    // the cache.
    let stride = (head.past + head.length).next_multiple_of(BLOCK) + BLOCK;
    let [scores] = scratch.split([QUERIES * stride]);
    let scores = scores.as_mut_ptr();
    // SAFETY: the caller vouches for the head and the instructions; scratch has
    // a row of all positions for each token of a group.
    unsafe {
        head.append();
        let mut first = 0;
        while first + QUERIES <= head.length {
            head.group::<V, QUERIES, VECTORS>(first, scores, stride);
            first += QUERIES;
        }
        while first < head.length {
            head.group::<V, 1, VECTORS>(first, scores, stride);
            first += 1;
        }
    }
}

impl<K: Kept> CachedHead<K> {
    /// Elements of a block's numbers, after which come its factors.
    fn numbers_len(&self) -> usize {
        BLOCK * self.head_dim * K::PER_NUMBER
    }

    /// Elements from a block to the next.
    fn block_len(&self) -> usize {
        BLOCK * K::position_len(self.head_dim)
    }

    /// Puts the new keys and values into the cache.
    ///
    /// # Safety
    /// As [`attend`].
    #[inline(always)]
    unsafe fn append(&self) {
        for token in 0..self.length {
            let position = self.past + token;
            let (block, lane) = (position / BLOCK, position % BLOCK);
            let start = block * self.block_len();
            // SAFETY: the token is one of the head's, the position is within the
            // cache, and so is its block.
            unsafe {
                let key = self.new_keys.add(token * self.row_stride);
                let value = self.new_values.add(token * self.row_stride);
                let keys = self.keys.add(start + lane * K::PER_NUMBER);
                let values = (self.values).add(start + lane * self.head_dim * K::PER_NUMBER);
                let row = |from| std::slice::from_raw_parts(from, self.head_dim);
                let (key, value) = (row(key), row(value));
                let (key_factor, value_factor) = (K::factor(key), K::factor(value));
                for (d, key) in key.iter().enumerate() {
                    K::put(*key, key_factor, keys.add(d * BLOCK * K::PER_NUMBER));
                }
                for (d, value) in value.iter().enumerate() {
                    K::put(*value, value_factor, values.add(d * K::PER_NUMBER));
                }
                let factor = |of| self.factors(of, position).cast_mut();
                K::put_factor(key_factor, factor(self.keys));
                K::put_factor(value_factor, factor(self.values));
            }
        }
    }

    /// The output of the `Q` new tokens from `first` on.
    ///
    /// # Safety
    /// As [`attend`]; there are so many, and `scores` has a row for each,
    /// `stride` apart and a block longer than the positions of the last.
    #[inline(always)]
    unsafe fn group<V: Vector, const Q: usize, const N: usize>(
        &self,
        first: usize,
        scores: *mut f32,
        stride: usize,
    ) {
        let n_keys = |query: usize| self.past + first + query + 1;
        // SAFETY: the caller vouches for the tokens and the scratch; positions
        // are rounded up to whole blocks, which the cache and the rows have.
        unsafe {
            let n_padded = n_keys(Q - 1).next_multiple_of(BLOCK);
            let queries = self.queries.add(first * self.row_stride);
            let n_vectors = n_padded / V::LANES;
            let mut vector = 0;
            while vector + N <= n_vectors {
                self.score::<V, Q, N>(queries, vector, scores, stride);
                vector += N;
            }
            while vector + 2 <= n_vectors {
                self.score::<V, Q, 2>(queries, vector, scores, stride);
                vector += 2;
            }
            if vector < n_vectors {
                self.score::<V, Q, 1>(queries, vector, scores, stride);
            }
            let mut factors = [0.0; Q];
            for query in 0..Q {
                let row = scores.add(query * stride);
                // What comes after the token, whatever it is, counts nothing.
                for position in n_keys(query)..n_padded {
                    *row.add(position) = f32::NEG_INFINITY;
                }
                factors[query] = self.soften::<V>(row, n_padded);
                if K::PER_FACTOR > 0 {
                    self.weigh::<V>(row, n_padded);
                    factors[query] /= FACTOR_SCALE;
                }
            }
            let mix = Mix {
                head: self,
                first,
                scores,
                stride,
                factors: &factors,
            };
            mix.run::<V, Q, N>();
        }
    }

    /// Scores of `Q` tokens with the `N` vectors of positions from `vector` on,
    /// before they are scaled.
    ///
    /// # Safety
    /// As [`CachedHead::group`]; the positions are within the cache's blocks.
    #[inline(always)]
    unsafe fn score<V: Vector, const Q: usize, const N: usize>(
        &self,
        queries: *const f32,
        vector: usize,
        scores: *mut f32,
        stride: usize,
    ) {
        // SAFETY: vectors lie within blocks, rows of a block are `BLOCK` apart,
        // and `d` is below `head_dim`.
        unsafe {
            let mut keys = [self.keys.cast_const(); N];
            for (j, keys) in keys.iter_mut().enumerate() {
                let position = (vector + j) * V::LANES;
                let start = position / BLOCK * self.block_len();
                *keys = self.keys.add(start + position % BLOCK * K::PER_NUMBER);
            }
            // One token reads from memory, so it asks for what comes next: the
            // keys of another tile, then values. Several together compute
            // longer than they wait.
            let end = (vector + N) * V::LANES;
            let next = if end <= self.past {
                self.keys.wrapping_add(end / BLOCK * self.block_len())
            } else {
                self.values
            };
            let ahead = next.addr().wrapping_sub(keys[0].addr());
            let mut sums = [[V::splat(0.0); N]; Q];
            for d in 0..self.head_dim {
                let mut k = [V::splat(0.0); N];
                for j in 0..N {
                    let at = keys[j].add(d * BLOCK * K::PER_NUMBER);
                    // Once a line.
                    if Q == 1
                        && (j * V::LANES).is_multiple_of(BLOCK)
                        && (d * BLOCK).is_multiple_of(K::PER_LINE)
                    {
                        V::prefetch_far(at.wrapping_byte_add(ahead));
                    }
                    k[j] = K::load(at);
                }
                for i in 0..Q {
                    let q = V::splat(*queries.add(i * self.row_stride + d));
                    for j in 0..N {
                        sums[i][j] = k[j].mul_add(q, sums[i][j]);
                    }
                }
            }
            for j in 0..N {
                let position = (vector + j) * V::LANES;
                let factors = self.factors(self.keys, position);
                // The values' will be wanted all at once.
                if Q == 1 && K::PER_FACTOR > 0 && position.is_multiple_of(BLOCK) {
                    V::prefetch_far(factors.wrapping_byte_add(ahead));
                    V::prefetch_far(self.factors(self.values, position));
                }
                let factors = K::load_factors::<V>(factors);
                for i in 0..Q {
                    let sum = if K::PER_FACTOR > 0 {
                        sums[i][j].mul(factors)
                    } else {
                        sums[i][j]
                    };
                    sum.store(scores.add(i * stride + position));
                }
            }
        }
    }

    /// Where the factors of the positions from one on are.
    ///
    /// # Safety
    /// The position is within the cache.
    unsafe fn factors(&self, of: *const K::Element, position: usize) -> *const K::Element {
        let start = position / BLOCK * self.block_len() + self.numbers_len();
        // SAFETY: the caller vouches for the block.
        unsafe { of.add(start + position % BLOCK * K::PER_FACTOR) }
    }

    /// Turns `n` scores into probabilities, up to the factor that is returned.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`; `n` floats at `row` are this
    /// thread's, whole vectors, at least one.
    #[inline(always)]
    unsafe fn soften<V: Vector>(&self, row: *mut f32, n: usize) -> f32 {
        // SAFETY: the caller vouches for all of it.
        unsafe {
            let mut max = V::splat(f32::NEG_INFINITY);
            for position in (0..n).step_by(V::LANES) {
                max = V::load(row.add(position)).max(max);
            }
            let mut lanes = [0.0; BLOCK];
            max.store(lanes.as_mut_ptr());
            let lanes_of = &lanes[..V::LANES];
            let max = lanes_of.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            let (max, scale) = (V::splat(max), V::splat(self.scale_log2));
            let least = V::splat(LEAST_LOG2);
            let mut sum = V::splat(0.0);
            for position in (0..n).step_by(V::LANES) {
                let at = row.add(position);
                let p = V::load(at).sub(max).mul(scale).mask_below(least).exp2();
                p.store(at);
                sum = sum.add(p);
            }
            sum.store(lanes.as_mut_ptr());
            1.0 / lanes[..V::LANES].iter().sum::<f32>()
        }
    }

    /// Multiplies `n` probabilities with the factors of their values, scaled. What
    /// comes after a token may become anything.
    ///
    /// # Safety
    /// As [`CachedHead::soften`], and so many positions are within the cache.
    #[inline(always)]
    unsafe fn weigh<V: Vector>(&self, row: *mut f32, n: usize) {
        // SAFETY: the caller vouches for all of it.
        unsafe {
            for position in (0..n).step_by(V::LANES) {
                let at = row.add(position);
                let factors = K::load_factors::<V>(self.factors(self.values, position));
                V::load(at)
                    .mul(factors.mul(V::splat(FACTOR_SCALE)))
                    .store(at);
            }
        }
    }
}

/// Values to be added up, weighted.
struct Mix<'a, K: Kept, const Q: usize> {
    head: &'a CachedHead<K>,
    /// The first of `Q` new tokens.
    first: usize,
    /// A row of probabilities for each, times the factors of the values.
    scores: *const f32,
    stride: usize,
    /// What a token's sum is multiplied with in the end.
    factors: &'a [f32; Q],
}

impl<K: Kept, const Q: usize> Mix<'_, K, Q> {
    /// # Safety
    /// As [`CachedHead::group`].
    #[inline(always)]
    unsafe fn run<V: Vector, const QUERIES: usize, const N: usize>(&self) {
        let head_dim = self.head.head_dim;
        let mut d = 0;
        // SAFETY: tiles end within `head_dim`.
        unsafe {
            // Where one token leaves registers free, a whole row is one tile.
            if Q == 1 {
                while d + 8 * V::LANES <= head_dim {
                    self.tile::<V, 8>(d, V::LANES);
                    d += 8 * V::LANES;
                }
            }
            while d + N * V::LANES <= head_dim {
                self.tile::<V, N>(d, V::LANES);
                d += N * V::LANES;
            }
            while d + 2 * V::LANES <= head_dim {
                self.tile::<V, 2>(d, V::LANES);
                d += 2 * V::LANES;
            }
            while d < head_dim {
                let lanes = (head_dim - d).min(V::LANES);
                self.tile::<V, 1>(d, lanes);
                d += lanes;
            }
        }
    }

    /// The output's dimensions `d..d + N * LANES`, of the last vector only
    /// `lanes`.
    ///
    /// # Safety
    /// As [`CachedHead::group`]; the dimensions are the head's.
    #[inline(always)]
    unsafe fn tile<V: Vector, const N: usize>(&self, d: usize, lanes: usize) {
        // SAFETY: positions are those that the token sees, whose probabilities
        // its row has; the output's rows are the tokens'.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; Q];
            // What all tokens see.
            let n_common = self.head.past + self.first + 1;
            // Where that is beyond them, what comes next is asked for.
            let row = K::position_len(self.head.head_dim) * size_of::<K::Element>();
            let last = n_common.saturating_sub(AHEAD / row);
            let to_next = (self.head.next.addr())
                .wrapping_sub(self.head.values.addr().wrapping_add(last * row));
            for position in 0..n_common {
                let ahead = if position < last { AHEAD } else { to_next };
                let v = self.load::<V, N>(position, d, lanes, ahead);
                for i in 0..Q {
                    let p = V::splat(*self.scores.add(i * self.stride + position));
                    for j in 0..N {
                        sums[i][j] = v[j].mul_add(p, sums[i][j]);
                    }
                }
            }
            // What only the later ones do: no token touches what it may not see.
            for i in 0..Q {
                for position in n_common..n_common + i {
                    let v = self.load::<V, N>(position, d, lanes, 0);
                    let p = V::splat(*self.scores.add(i * self.stride + position));
                    for j in 0..N {
                        sums[i][j] = v[j].mul_add(p, sums[i][j]);
                    }
                }
                let factor = V::splat(self.factors[i]);
                let row = (self.first + i) * self.head.output_stride;
                let to = self.head.output.add(row + d);
                for j in 0..N {
                    let sum = sums[i][j].mul(factor);
                    if j + 1 == N && lanes < V::LANES {
                        sum.store_partial(to.add(j * V::LANES), lanes);
                    } else {
                        sum.store(to.add(j * V::LANES));
                    }
                }
            }
        }
    }

    /// The values of a position that [`Mix::tile`] adds up; what lies so many
    /// bytes ahead is asked for. Not a closure there: those are compiled without
    /// the instructions of their surroundings.
    ///
    /// # Safety
    /// As [`Mix::tile`], and a token sees the position.
    #[inline(always)]
    unsafe fn load<V: Vector, const N: usize>(
        &self,
        position: usize,
        d: usize,
        lanes: usize,
        ahead: usize,
    ) -> [V; N] {
        // SAFETY: the position is within the cache, and the caller vouches for
        // the dimensions.
        unsafe {
            let number = position * self.head.head_dim + d;
            let factors_before = position / BLOCK * BLOCK * K::PER_FACTOR;
            let row = (self.head.values).add(number * K::PER_NUMBER + factors_before);
            let mut v = [V::splat(0.0); N];
            for j in 0..N {
                let at = row.cast_const().add(j * V::LANES * K::PER_NUMBER);
                // Once a line, where rows are lines.
                if Q == 1 && (j * V::LANES).is_multiple_of(K::PER_LINE) {
                    V::prefetch_far(at.wrapping_byte_add(ahead));
                }
                v[j] = if j + 1 == N && lanes < V::LANES {
                    K::load_partial(at, lanes)
                } else {
                    K::load(at)
                };
            }
            v
        }
    }
}
