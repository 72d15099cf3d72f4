//! The innermost part of products of floats: a few rows by one panel.
#![expect(
    unsafe_code,
    reason = "reads and writes vectors through raw pointers: the inner loop is the whole cost of a step"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use super::Finish;
use crate::kernels::layers::pointwise::activate;
use crate::kernels::vector::{LANES_MAX, Number, Vector};

/// Bytes ahead of its use at which a line of weights is prefetched, in all
/// strips together. They take a few hundred nanoseconds at the speed of memory;
/// the processor's own prefetching stops at every page.
pub(super) const AHEAD: usize = 4096;

/// Weights that are prefetched while others are used. The memory behind the
/// panel need not be valid.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ahead {
    /// The weights that the tile itself reads next, then the first of the next
    /// panel.
    Own { next: *const u8 },
    /// A part of the next panel. If several tiles pass over a panel, all but
    /// the first find the panel in the cache and would leave memory idle.
    Next {
        from: *const u8,
        /// Bytes further per input.
        step: usize,
    },
}

impl Ahead {
    /// Returns the prefetching of tile `idx` of `n_tiles` over a panel of
    /// `inputs` rows of `width` weights, of `size` bytes each. Weights of 8
    /// bits are so few that several tiles do not wait for memory.
    pub(super) fn of(
        n_tiles: usize,
        idx: usize,
        inputs: usize,
        width: usize,
        size: usize,
        next: *const u8,
    ) -> Self {
        let step = (width * size).div_ceil(n_tiles);
        if n_tiles < 2 || size == 1 {
            Self::Own { next }
        } else {
            Self::Next {
                from: next.wrapping_add(idx * inputs * step),
                step,
            }
        }
    }
}

/// Treatment of the sums of a tile, and the place of the results.
#[derive(Clone, Copy, Debug)]
pub(super) struct TileEnding {
    /// Scales, and below the bias; both are as wide as the panel.
    pub(super) scales: Option<*const f32>,
    pub(super) bias: Option<*const f32>,
    pub(super) output: *mut f32,
    pub(super) output_stride: usize,
    pub(super) finish: Finish,
}

impl TileEnding {
    /// Returns the ending of a tile that begins at row `row`.
    pub(super) fn at_row(self, row: usize) -> Self {
        Self {
            output: self.output.wrapping_add(row * self.output_stride),
            ..self
        }
    }

    /// Scales a sum, adds the bias, finishes the sum and writes it to row `i`.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`; scales, bias and the row have a vector
    /// at this column, and nobody else has these columns of the output.
    #[inline(always)]
    pub(super) unsafe fn end<V: Vector>(&self, i: usize, column: usize, mut sum: V) {
        // SAFETY: the caller vouches for the row and its columns.
        unsafe {
            let to = self.output.add(i * self.output_stride + column);
            if let Some(scales) = self.scales {
                sum = sum.mul(V::load(scales.add(column)));
            }
            if let Some(bias) = self.bias {
                sum = sum.add(V::load(bias.add(column)));
            }
            match self.finish {
                Finish::Set => {}
                Finish::Add => sum = sum.add(V::load(to)),
                Finish::Activate(activation) => sum = activate(activation, sum),
            }
            sum.store(to);
        }
    }
}

/// A tile: some rows, and the columns of one panel.
pub(super) struct Tile<N> {
    pub(super) rows: *const f32,
    /// Floats from a row to the next. Must not be a power of two, or rows would
    /// evict each other from the cache.
    pub(super) row_stride: usize,
    pub(super) inputs: usize,
    /// Panel, whose strips have a row per input.
    pub(super) panel: *const N,
    /// Memory to which the panel is unpacked as floats, if it is.
    pub(super) unpack: Option<*mut f32>,
    pub(super) ahead: Ahead,
    pub(super) ending: TileEnding,
}

/// Computes a tile with AVX2.
///
/// # Safety
/// The CPU has AVX2 and FMA, and the contract of [`Tile::compute`] holds.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2<N: Number>(tile: &Tile<N>, n_rows: usize) {
    // SAFETY: the caller vouches for all of it.
    unsafe { tile.compute_rows::<crate::kernels::vector::avx2::Avx2, 3>(n_rows) }
}

/// Computes a tile with AVX-512.
///
/// # Safety
/// The CPU has AVX-512 F, DQ and BW, and the contract of [`Tile::compute`] holds.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn avx512<N: Number>(tile: &Tile<N>, n_rows: usize) {
    // SAFETY: the caller vouches for all of it.
    unsafe { tile.compute_rows::<crate::kernels::vector::avx512::Avx512, 2>(n_rows) }
}

impl<N: Number> Tile<N> {
    /// Returns the same tile over other weights: those that another tile has
    /// unpacked.
    pub(super) fn over<M>(&self, panel: *const M) -> Tile<M> {
        Tile {
            rows: self.rows,
            row_stride: self.row_stride,
            inputs: self.inputs,
            panel,
            unpack: None,
            ahead: self.ahead,
            ending: self.ending,
        }
    }

    /// Computes the tile for `n` rows.
    ///
    /// # Safety
    /// The contract of [`Tile::compute`] holds; `n` is 1, 2, 4 or 8.
    #[inline(always)]
    pub(super) unsafe fn compute_rows<V: Vector, const VECTORS: usize>(&self, n: usize) {
        // SAFETY: the caller vouches for the rows.
        unsafe {
            match n {
                8 => self.compute::<V, VECTORS, 8>(),
                4 => self.compute::<V, VECTORS, 4>(),
                2 => self.compute::<V, VECTORS, 2>(),
                _ => self.compute::<V, VECTORS, 1>(),
            }
        }
    }

    /// Computes the tile for `R` rows.
    ///
    /// # Safety
    /// The CPU has the instructions of `V`; there are `R` rows, and the panel has
    /// `VECTORS` vectors of `V` for each input, and the memory to which it is
    /// unpacked has room for them; and the contract of [`TileEnding::end`] holds for
    /// as many rows and vectors.
    #[inline(always)]
    unsafe fn compute<V: Vector, const VECTORS: usize, const R: usize>(&self) {
        // The number of strips that `strip_width` makes: strips of one vector,
        // or one strip of all vectors.
        let n_strips = const {
            if N::IN_STRIPS && V::LANES == LANES_MAX {
                VECTORS
            } else {
                1
            }
        };
        let strip_vectors = VECTORS / n_strips;
        let row_len = strip_vectors * V::LANES;
        let row_bytes = row_len * size_of::<N>();
        let n_lines = row_len.div_ceil(N::PER_LINE);
        let n_ahead = AHEAD / (n_strips * row_bytes);
        let n_own = self.inputs.saturating_sub(n_ahead);
        let mut ahead = self.panel.cast::<u8>().wrapping_add(n_ahead * row_bytes);
        let (mut rows, mut panel) = (self.rows, self.panel);
        // SAFETY: there are as many inputs as the caller vouches for.
        unsafe {
            let mut sums = [[V::splat(0.0); VECTORS]; R];
            for input in 0..self.inputs {
                match self.ahead {
                    Ahead::Own { next } => {
                        if input == n_own {
                            ahead = next;
                        }
                        for strip in 0..n_strips {
                            let row = ahead.wrapping_add(strip * self.inputs * row_bytes);
                            for line in 0..n_lines {
                                let line = line * N::PER_LINE * size_of::<N>();
                                V::prefetch(row.wrapping_add(line));
                            }
                        }
                        ahead = ahead.wrapping_add(row_bytes);
                    }
                    Ahead::Next { from, step } => {
                        V::prefetch_far(from.wrapping_add(input * step));
                    }
                }
                let mut weights = [V::splat(0.0); VECTORS];
                for (j, weights) in weights.iter_mut().enumerate() {
                    let strip = j / strip_vectors * self.inputs * row_len;
                    *weights = N::load(panel.add(strip + j % strip_vectors * V::LANES));
                    if let Some(unpack) = self.unpack {
                        weights.store(unpack.add(input * VECTORS * V::LANES + j * V::LANES));
                    }
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = V::splat(*rows.add(i * self.row_stride));
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = weights.mul_add(x, *sum);
                    }
                }
                rows = rows.add(1);
                panel = panel.add(row_len);
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (j, sum) in sums.into_iter().enumerate() {
                    self.ending.end(i, j * V::LANES, sum);
                }
            }
        }
    }
}
