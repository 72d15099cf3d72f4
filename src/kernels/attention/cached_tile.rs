//! Attention of one head of [`super::cached`]: new tokens of one sequence over
//! its cache, or new tokens of several sequences over caches that begin alike.
//!
//! The lanes of a vector are positions while scores are computed, and
//! dimensions while values are added up; both are read in place. A score is one
//! sum over the dimensions in order, and a result is one sum over the positions
//! in order, whatever the tiles are. Therefore tiles are chosen for speed
//! alone: several vectors of one token hide the latency of an addition, several
//! tokens share the work of loading. Factors of positions are multiplied with
//! scores and with probabilities, of which there are far fewer than numbers.
//! The factors are powers of two, so that multiplying by them rounds nothing.
#![expect(
    unsafe_code,
    reason = "the hot loop of generation: raw pointers, with bounds argued once per head"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]
#![expect(
    clippy::needless_range_loop,
    reason = "tokens and vectors index several arrays at once"
)]

use std::ops::Range;

use crate::kernels::vector::scratch::AlignedScratch;
use crate::kernels::vector::{Kept, Vector};

/// Number of positions in a block of keys. A multiple of every vector's lanes.
pub const BLOCK: usize = 16;

/// Bytes ahead of a value that are prefetched, about as many as arrive while
/// the values at hand are added up: the CPU's own prefetching is half as fast.
const AHEAD: usize = 8192;

/// Probabilities below two to the power of this number are set to zero. Beside
/// the largest probability, of 1, they count for nothing. Still smaller
/// probabilities would be subnormal numbers, for which a CPU takes a hundred
/// times as long.
const LEAST_LOG2: f32 = -64.0;

/// Scale of the values' factors: they are multiplied with it before they are
/// multiplied with probabilities, and sums are divided by it, so that the
/// products are normal numbers too. 2^30, as the factor of numbers up to 2 is
/// 2^-30.
const FACTOR_SCALE: f32 = 1_073_741_824.0;

/// One head of one sequence, with the memory that it reads and writes.
#[derive(Clone, Copy)]
pub(super) struct CachedHead<K: Kept> {
    /// Rows of the first new token, `head_dim` floats each.
    pub queries: *const f32,
    pub new_keys: *const f32,
    pub new_values: *const f32,
    /// Floats from a new token's row to the next token's row.
    pub row_stride: usize,
    /// Keys and values of the head in the cache.
    pub keys: *mut K::Element,
    pub values: *mut K::Element,
    pub output: *mut f32,
    pub output_stride: usize,
    pub head_dim: usize,
    /// Number of positions of the cache that are filled.
    pub past: usize,
    pub length: usize,
    /// Factor of the scores, times log2(e). Above zero.
    pub scale_log2: f32,
}

/// First positions of several sequences, which are the same in all of them.
#[derive(Clone, Copy)]
pub(super) struct SharedPositions<K: Kept> {
    /// Keys and values of the positions. A head that shares nothing reads its
    /// own.
    pub keys: *const K::Element,
    pub values: *const K::Element,
    /// Number of positions: whole blocks, at most those that each sequence has.
    pub len: usize,
}

/// Heads that are computed together, and the address at which the thread reads
/// next. The address is prefetched, and need not be valid.
pub(super) struct TileWork<'a, K: Kept> {
    /// One head; or as many heads as a tile has queries, or half as many, of
    /// one new token each and of the same sizes.
    pub heads: &'a [CachedHead<K>],
    pub prefix: SharedPositions<K>,
    pub next: *const u8,
}

/// Appends the new tokens and computes their output, `QUERIES` tokens at a time
/// while that many are left, in tiles of up to `VECTORS` vectors.
///
/// # Safety
/// The CPU has the instructions of `V`; rows of the heads are valid for `length`
/// tokens, and their caches for whole blocks that have room for `past + length`;
/// nobody else reads or writes the caches beyond the prefix, or the output,
/// meanwhile, and nobody writes the prefix.
#[inline(always)]
pub(super) unsafe fn attend<K: Kept, V: Vector, const QUERIES: usize, const VECTORS: usize>(
    work: &TileWork<'_, K>,
    scratch: &mut AlignedScratch,
) {
    const { assert!(BLOCK.is_multiple_of(V::LANES) && V::LANES <= BLOCK && QUERIES >= 2) };
    let ends = work.heads.iter().map(|head| head.past + head.length);
    // One more line, so that rows of a power of two do not share their sets of
    // the CPU's cache.
    let stride = ends.max().unwrap_or(0).next_multiple_of(BLOCK) + BLOCK;
    let [scores] = scratch.split([QUERIES * stride]);
    let scores = Scores {
        rows: scores.as_mut_ptr(),
        stride,
    };
    // SAFETY: the caller vouches for the heads and the instructions; scratch has
    // a row of all positions for each token of a group.
    unsafe {
        match work.heads {
            [head] if head.length != 1 => head.tokens::<V, QUERIES, VECTORS>(work.next, scores),
            [head] => Group::step([head], work).run::<V, VECTORS>(scores),
            [a, b] => Group::step([a, b], work).run::<V, VECTORS>(scores),
            heads => {
                if let Some(heads) = heads.first_chunk::<QUERIES>() {
                    Group::step(heads.each_ref(), work).run::<V, VECTORS>(scores);
                }
            }
        }
    }
}

/// Rows of scores, later of probabilities: one row per query of a group.
#[derive(Clone, Copy)]
struct Scores {
    rows: *mut f32,
    /// Floats from a row to the next: a block more than all positions.
    stride: usize,
}

impl Scores {
    /// Returns row `idx`.
    ///
    /// # Safety
    /// There are more than `idx` rows.
    unsafe fn row(self, idx: usize) -> *mut f32 {
        // SAFETY: the caller vouches for the row.
        unsafe { self.rows.add(idx * self.stride) }
    }
}

impl<K: Kept> CachedHead<K> {
    /// Returns the number of elements of a block's numbers. The block's factors
    /// follow the numbers.
    fn numbers_len(&self) -> usize {
        BLOCK * self.head_dim * K::PER_NUMBER
    }

    /// Returns the number of elements from a block to the next.
    fn block_len(&self) -> usize {
        BLOCK * K::position_len(self.head_dim)
    }

    /// Returns the address of the block of a position.
    fn block(&self, of: *const K::Element, position: usize) -> *const K::Element {
        of.wrapping_add(position / BLOCK * self.block_len())
    }

    /// Computes several new tokens of one sequence, or none.
    ///
    /// # Safety
    /// The contract of [`attend`] holds.
    #[inline(always)]
    unsafe fn tokens<V: Vector, const QUERIES: usize, const VECTORS: usize>(
        &self,
        next: *const u8,
        scores: Scores,
    ) {
        // SAFETY: the caller vouches for the head and its tokens.
        unsafe {
            self.append();
            let mut first = 0;
            while first + QUERIES <= self.length {
                Group::<K, QUERIES>::of(self, first, next).run::<V, VECTORS>(scores);
                first += QUERIES;
            }
            while first < self.length {
                Group::<K, 1>::of(self, first, next).run::<V, VECTORS>(scores);
                first += 1;
            }
        }
    }

    /// Appends the new keys and values to the cache.
    ///
    /// # Safety
    /// The contract of [`attend`] holds.
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
                K::put_row(key, key_factor, keys, BLOCK * K::PER_NUMBER);
                K::put_row(value, value_factor, values, K::PER_NUMBER);
                let factor = |of| self.factors(of, position).cast_mut();
                K::put_factor(key_factor, factor(self.keys));
                K::put_factor(value_factor, factor(self.values));
            }
        }
    }

    /// Returns the address of the factors of the positions from `position` on.
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

    /// Multiplies the probabilities of some positions, whole vectors, with the
    /// factors of their values, scaled by [`FACTOR_SCALE`]. Probabilities of
    /// positions after a token may become anything.
    ///
    /// # Safety
    /// The contract of [`CachedHead::soften`] holds, and the positions are
    /// within the cache.
    #[inline(always)]
    unsafe fn weigh<V: Vector>(
        &self,
        row: *mut f32,
        values: *const K::Element,
        positions: Range<usize>,
    ) {
        // SAFETY: the caller vouches for all of it.
        unsafe {
            for position in positions.step_by(V::LANES) {
                let at = row.add(position);
                let factors = K::load_factors::<V>(self.factors(values, position));
                V::load(at)
                    .mul(factors.mul(V::splat(FACTOR_SCALE)))
                    .store(at);
            }
        }
    }
}

/// New tokens that are computed together: one token each of sequences that
/// begin alike, or consecutive tokens of one sequence.
struct Group<'a, K: Kept, const Q: usize> {
    /// Head of each token, which holds the positions that the token alone sees.
    heads: [&'a CachedHead<K>; Q],
    /// Index of each token among the new tokens of its head.
    tokens: [usize; Q],
    /// Positions that all tokens see. Keys are read for `prefix.len` positions,
    /// values for `n_values` positions.
    prefix: SharedPositions<K>,
    n_values: usize,
    next: *const u8,
    /// True if the group waits for memory, and therefore prefetches what is
    /// read next. Groups of tokens of one sequence compute longer than they
    /// wait.
    asks: bool,
}

impl<'a, K: Kept, const Q: usize> Group<'a, K, Q> {
    /// Creates a group of the only new token of each head.
    fn step(heads: [&'a CachedHead<K>; Q], work: &TileWork<'_, K>) -> Self {
        Self {
            heads,
            tokens: [0; Q],
            prefix: work.prefix,
            n_values: work.prefix.len,
            next: work.next,
            asks: true,
        }
    }

    /// Creates a group of the new tokens from `first` on, which are in the
    /// cache. Keys are read for all tokens as far as the last token sees.
    fn of(head: &'a CachedHead<K>, first: usize, next: *const u8) -> Self {
        let n_seen = head.past + first + 1;
        let mut tokens = [first; Q];
        for (query, token) in tokens.iter_mut().enumerate() {
            *token += query;
        }
        Self {
            heads: [head; Q],
            tokens,
            prefix: SharedPositions {
                keys: head.keys,
                values: head.values,
                len: (n_seen + Q - 1).next_multiple_of(BLOCK),
            },
            n_values: n_seen,
            next,
            asks: Q == 1,
        }
    }

    /// Returns the number of positions that a query sees, of which its own is
    /// the last.
    fn n_keys(&self, query: usize) -> usize {
        self.heads[query].past + self.tokens[query] + 1
    }

    /// Returns the query of one of the tokens.
    ///
    /// # Safety
    /// The contract of [`attend`] holds.
    unsafe fn query(&self, query: usize) -> *const f32 {
        let head = self.heads[query];
        // SAFETY: the token is one of the head's.
        unsafe { head.queries.add(self.tokens[query] * head.row_stride) }
    }

    /// # Safety
    /// The contract of [`attend`] holds; `scores` has a row for each token.
    #[inline(always)]
    unsafe fn run<V: Vector, const N: usize>(&self, scores: Scores) {
        let head = self.heads[0];
        let shared = self.prefix.len;
        // SAFETY: the caller vouches for the tokens and the scratch; positions
        // are rounded up to whole blocks, which the cache and the rows have.
        unsafe {
            let mut queries = [std::ptr::null(); Q];
            for (query, row) in queries.iter_mut().enumerate() {
                *row = self.query(query);
            }
            let keys = Keys {
                head,
                start: self.prefix.keys,
                queries,
                end: shared,
                beyond: head.block(head.keys, shared),
                values: self.prefix.values,
                asks: self.asks,
            };
            keys.score::<V, N>(0..shared, scores);
            for query in 0..Q {
                self.score_own::<V, N>(query, scores);
            }
            let mut factors = [0.0; Q];
            for query in 0..Q {
                let (row, n_keys) = (scores.row(query), self.n_keys(query));
                // Positions after the token, whatever they hold, count nothing.
                let end = n_keys.next_multiple_of(BLOCK);
                for position in n_keys..end {
                    *row.add(position) = f32::NEG_INFINITY;
                }
                factors[query] = head.soften::<V>(row, end);
                if K::PER_FACTOR > 0 {
                    let own = self.heads[query].values;
                    let shared = shared.min(end);
                    head.weigh::<V>(row, self.prefix.values, 0..shared);
                    head.weigh::<V>(row, own, shared..end);
                    factors[query] /= FACTOR_SCALE;
                }
            }
            let mix = Mix {
                group: self,
                scores,
                factors: &factors,
            };
            mix.run::<V, N>();
        }
    }

    /// Computes the scores of the positions that one token alone sees.
    /// Meanwhile, the token is put into the cache.
    ///
    /// # Safety
    /// The contract of [`Group::run`] holds.
    #[inline(always)]
    unsafe fn score_own<V: Vector, const N: usize>(&self, query: usize, scores: Scores) {
        let head = self.heads[query];
        let shared = self.prefix.len;
        let end = self.n_keys(query).next_multiple_of(BLOCK);
        if end <= shared {
            return;
        }
        let beyond = match self.heads.get(query + 1) {
            Some(head) => head.block(head.keys, shared),
            None => self.prefix.values,
        };
        // SAFETY: as the caller vouches: the positions are within the head's
        // blocks, and there is a row for the token.
        unsafe {
            let keys = Keys {
                head,
                start: head.keys,
                queries: [self.query(query)],
                end,
                beyond,
                values: head.values,
                asks: self.asks,
            };
            let scores = Scores {
                rows: scores.row(query),
                ..scores
            };
            // Blocks that are full already come first: while they are read, the
            // cache lines for the new key are on their way.
            let full = (head.past / BLOCK * BLOCK).max(shared);
            keys.score::<V, N>(shared..full, scores);
            head.append();
            keys.score::<V, N>(full..end, scores);
        }
    }
}

/// Keys of one cache, and the tokens that see them.
struct Keys<'a, K: Kept, const Q: usize> {
    /// Head from which the sizes are taken.
    head: &'a CachedHead<K>,
    start: *const K::Element,
    queries: [*const f32; Q],
    /// Number of positions, and the address that is read after them.
    end: usize,
    beyond: *const K::Element,
    /// Values of the same positions, whose factors will be needed all at once.
    values: *const K::Element,
    asks: bool,
}

impl<K: Kept, const Q: usize> Keys<'_, K, Q> {
    /// Computes the scores of some positions, whole blocks, before the scores
    /// are scaled.
    ///
    /// # Safety
    /// The contract of [`Group::run`] holds; the positions are within the
    /// cache's blocks.
    #[inline(always)]
    unsafe fn score<V: Vector, const N: usize>(&self, positions: Range<usize>, scores: Scores) {
        let (mut vector, end) = (positions.start / V::LANES, positions.end / V::LANES);
        // SAFETY: tiles end within the positions.
        unsafe {
            while vector + N <= end {
                self.tile::<V, N>(vector, scores);
                vector += N;
            }
            while vector + 2 <= end {
                self.tile::<V, 2>(vector, scores);
                vector += 2;
            }
            if vector < end {
                self.tile::<V, 1>(vector, scores);
            }
        }
    }

    /// Computes the scores of the `N` vectors of positions from `vector` on.
    ///
    /// # Safety
    /// The contract of [`Keys::score`] holds.
    #[inline(always)]
    unsafe fn tile<V: Vector, const N: usize>(&self, vector: usize, scores: Scores) {
        let head = self.head;
        // SAFETY: vectors lie within blocks, rows of a block are `BLOCK` apart,
        // and `d` is below `head_dim`.
        unsafe {
            let mut keys = [self.start; N];
            for (j, keys) in keys.iter_mut().enumerate() {
                let position = (vector + j) * V::LANES;
                let start = position / BLOCK * head.block_len();
                *keys = self.start.add(start + position % BLOCK * K::PER_NUMBER);
            }
            let end = (vector + N) * V::LANES;
            let next = if end < self.end {
                head.block(self.start, end)
            } else {
                self.beyond
            };
            let ahead = next.addr().wrapping_sub(keys[0].addr());
            let mut sums = [[V::splat(0.0); N]; Q];
            for d in 0..head.head_dim {
                let mut k = [V::splat(0.0); N];
                for j in 0..N {
                    let at = keys[j].add(d * BLOCK * K::PER_NUMBER);
                    // One prefetch per cache line.
                    if self.asks
                        && (j * V::LANES).is_multiple_of(BLOCK)
                        && (d * BLOCK).is_multiple_of(K::PER_LINE)
                    {
                        V::prefetch_far(at.wrapping_byte_add(ahead));
                    }
                    k[j] = K::load(at);
                }
                for i in 0..Q {
                    let q = V::splat(*self.queries[i].add(d));
                    for j in 0..N {
                        sums[i][j] = k[j].mul_add(q, sums[i][j]);
                    }
                }
            }
            for j in 0..N {
                let position = (vector + j) * V::LANES;
                let factors = head.factors(self.start, position);
                if self.asks && K::PER_FACTOR > 0 && position.is_multiple_of(BLOCK) {
                    V::prefetch_far(factors.wrapping_byte_add(ahead));
                    V::prefetch_far(head.factors(self.values, position));
                }
                let factors = K::load_factors::<V>(factors);
                for i in 0..Q {
                    let sum = if K::PER_FACTOR > 0 {
                        sums[i][j].mul(factors)
                    } else {
                        sums[i][j]
                    };
                    sum.store(scores.row(i).add(position));
                }
            }
        }
    }
}

/// Sum of values, weighted by probabilities.
struct Mix<'a, K: Kept, const Q: usize> {
    group: &'a Group<'a, K, Q>,
    /// Probabilities, times the factors of the values.
    scores: Scores,
    /// Factor by which each token's sum is multiplied in the end.
    factors: &'a [f32; Q],
}

impl<K: Kept, const Q: usize> Mix<'_, K, Q> {
    /// # Safety
    /// The contract of [`Group::run`] holds.
    #[inline(always)]
    unsafe fn run<V: Vector, const N: usize>(&self) {
        let head_dim = self.group.heads[0].head_dim;
        let mut d = 0;
        // SAFETY: tiles end within `head_dim`.
        unsafe {
            // One token leaves registers free, so a whole row is one tile.
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

    /// Computes the output's dimensions `d..d + N * LANES`, of which the last
    /// vector has only `lanes`.
    ///
    /// # Safety
    /// The contract of [`Group::run`] holds; the dimensions are the head's.
    #[inline(always)]
    unsafe fn tile<V: Vector, const N: usize>(&self, d: usize, lanes: usize) {
        let group = self.group;
        let n_shared = group.n_values;
        // SAFETY: positions are those that the token sees, whose probabilities
        // its row has; the output's rows are the tokens'.
        unsafe {
            let mut sums = [[V::splat(0.0); N]; Q];
            let own = |query: usize| {
                let head: &CachedHead<K> = group.heads[query];
                head.block(head.values, n_shared).cast()
            };
            let values = self.values(group.prefix.values, n_shared, d, lanes, own(0));
            for position in 0..n_shared {
                let v = values.load::<V, N>(position);
                for i in 0..Q {
                    let p = V::splat(*self.scores.row(i).add(position));
                    for j in 0..N {
                        sums[i][j] = v[j].mul_add(p, sums[i][j]);
                    }
                }
            }
            // Then the positions that each token alone sees: no token touches
            // positions that it may not see.
            for i in 0..Q {
                let head = group.heads[i];
                let n_keys = group.n_keys(i);
                let next = if i + 1 < Q { own(i + 1) } else { group.next };
                let values = self.values(head.values, n_keys, d, lanes, next);
                let mut sums_of = sums[i];
                for position in n_shared..n_keys {
                    let v = values.load::<V, N>(position);
                    let p = V::splat(*self.scores.row(i).add(position));
                    for j in 0..N {
                        sums_of[j] = v[j].mul_add(p, sums_of[j]);
                    }
                }
                let factor = V::splat(self.factors[i]);
                let row = group.tokens[i] * head.output_stride;
                let to = head.output.add(row + d);
                for j in 0..N {
                    let sum = sums_of[j].mul(factor);
                    if j + 1 == N && lanes < V::LANES {
                        sum.store_partial(to.add(j * V::LANES), lanes);
                    } else {
                        sum.store(to.add(j * V::LANES));
                    }
                }
            }
        }
    }

    /// Returns the values of `n` positions at the dimensions of a tile. The
    /// memory at `next` is read after them.
    #[inline(always)]
    fn values(
        &self,
        values: *const K::Element,
        n: usize,
        d: usize,
        lanes: usize,
        next: *const u8,
    ) -> Values<K> {
        let head = self.group.heads[0];
        let row = K::position_len(head.head_dim) * size_of::<K::Element>();
        let last = n.saturating_sub(AHEAD / row);
        Values {
            head_dim: head.head_dim,
            start: values,
            d,
            lanes,
            asks: self.group.asks,
            last,
            to_next: (next.addr()).wrapping_sub(values.addr().wrapping_add(last * row)),
        }
    }
}

/// Values of one cache that are read one position after the other.
struct Values<K: Kept> {
    head_dim: usize,
    start: *const K::Element,
    d: usize,
    lanes: usize,
    asks: bool,
    /// First position from which [`AHEAD`] bytes ahead is beyond the values.
    last: usize,
    /// Distance in bytes from position `last` to the memory that is read next.
    to_next: usize,
}

impl<K: Kept> Values<K> {
    /// Loads the values of a position, and prefetches values that are needed
    /// later.
    ///
    /// # Safety
    /// The contract of [`Mix::tile`] holds, and a token sees the position.
    #[inline(always)]
    unsafe fn load<V: Vector, const N: usize>(&self, position: usize) -> [V; N] {
        let ahead = if position < self.last {
            AHEAD
        } else {
            self.to_next
        };
        // SAFETY: the position is within the cache, and the caller vouches for
        // the dimensions.
        unsafe {
            let number = position * self.head_dim + self.d;
            let factors_before = position / BLOCK * BLOCK * K::PER_FACTOR;
            let row = (self.start).add(number * K::PER_NUMBER + factors_before);
            let mut v = [V::splat(0.0); N];
            for j in 0..N {
                let at = row.add(j * V::LANES * K::PER_NUMBER);
                // One prefetch per cache line, if rows are whole lines.
                if self.asks && (j * V::LANES).is_multiple_of(K::PER_LINE) {
                    V::prefetch_far(at.wrapping_byte_add(ahead));
                }
                v[j] = if j + 1 == N && self.lanes < V::LANES {
                    K::load_partial(at, self.lanes)
                } else {
                    K::load(at)
                };
            }
            v
        }
    }
}
