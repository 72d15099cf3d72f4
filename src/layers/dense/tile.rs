//! The innermost part: a few rows by one panel.
#![expect(
    unsafe_code,
    reason = "reads and writes vectors through raw pointers: the inner loop is the whole cost of a step"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use super::{Finish, Weight};
use crate::vector::Vector;

/// Vectors in a row of a panel.
const VECTORS: usize = 2;

/// How far ahead of its use a line of weights is asked for. A few hundred
/// nanoseconds at the speed of memory; the processor's own prefetching stops at
/// every page.
const AHEAD: usize = 2048;

/// Which weights are asked for while others are used.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ahead {
    /// Those that the tile itself comes to.
    Own,
    /// With several tiles a panel passes through, all but the first find it in
    /// the cache and leave memory idle; so each asks for a part of the next one.
    Next {
        /// Weights from the tile's first one to the first that it asks for.
        first: usize,
        /// Weights further that it asks for with each input.
        step: usize,
    },
}

impl Ahead {
    /// For tile `idx` of so many over a panel of so many rows of weights. Of 8
    /// bits there are so few that memory is not what tiles wait for.
    pub(super) fn of<W: Weight>(n_tiles: usize, idx: usize, inputs: usize, width: usize) -> Self {
        if n_tiles < 2 || size_of::<W>() == 1 {
            return Self::Own;
        }
        let step = width / n_tiles;
        Self::Next {
            first: inputs * (width + idx * step),
            step,
        }
    }
}

/// A tile: some rows, and the columns of one panel.
pub(super) struct Tile<W> {
    pub(super) rows: *const f32,
    /// Floats from a row to the next. Not a power of two, or they would drive
    /// each other out of the cache.
    pub(super) row_stride: usize,
    pub(super) inputs: usize,
    /// Of each input, [`VECTORS`] vectors.
    pub(super) panel: *const W,
    pub(super) ahead: Ahead,
    /// These are as wide as the panel.
    pub(super) scales: Option<*const f32>,
    pub(super) bias: Option<*const f32>,
    pub(super) output: *mut f32,
    pub(super) output_stride: usize,
    pub(super) finish: Finish,
}

/// # Safety
/// The CPU has AVX2 and FMA; and as [`Tile::compute`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn avx2<W: Weight>(tile: &Tile<W>, n_rows: usize) {
    // SAFETY: the caller vouches for all of it.
    unsafe { tile.compute_rows::<crate::vector::avx2::Avx2>(n_rows) }
}

/// # Safety
/// The CPU has AVX-512 F and DQ; and as [`Tile::compute`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn avx512<W: Weight>(tile: &Tile<W>, n_rows: usize) {
    // SAFETY: the caller vouches for all of it.
    unsafe { tile.compute_rows::<crate::vector::avx512::Avx512>(n_rows) }
}

impl<W: Weight> Tile<W> {
    /// # Safety
    /// As [`Tile::compute`]; `n` is 1, 2, 4 or 8.
    #[inline(always)]
    pub(super) unsafe fn compute_rows<V: Vector>(&self, n: usize) {
        // SAFETY: the caller vouches for the rows.
        unsafe {
            match n {
                8 => self.compute::<V, 8>(),
                4 => self.compute::<V, 4>(),
                2 => self.compute::<V, 2>(),
                _ => self.compute::<V, 1>(),
            }
        }
    }

    /// # Safety
    /// The CPU has the instructions of `V`; there are `R` rows, and the panel has
    /// `VECTORS` vectors of `V` for each input; scales, bias and each row of the
    /// output are as wide; and nobody else has these columns of the output.
    #[inline(always)]
    unsafe fn compute<V: Vector, const R: usize>(&self) {
        let (mut rows, mut panel) = (self.rows, self.panel);
        // SAFETY: as many inputs as the caller vouches for.
        unsafe {
            let mut sums = [[V::splat(0.0); VECTORS]; R];
            for input in 0..self.inputs {
                let mut weights = [V::splat(0.0); VECTORS];
                for (j, weights) in weights.iter_mut().enumerate() {
                    let at = panel.add(j * V::LANES);
                    // Once a line.
                    let is_line = ((input * VECTORS + j) * V::LANES).is_multiple_of(W::PER_LINE);
                    if is_line && matches!(self.ahead, Ahead::Own) {
                        V::prefetch(at.wrapping_byte_add(AHEAD));
                    }
                    *weights = W::load(at);
                }
                if let Ahead::Next { first, step } = self.ahead {
                    V::prefetch_far(self.panel.wrapping_add(first + input * step));
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = V::splat(*rows.add(i * self.row_stride));
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = weights.mul_add(x, *sum);
                    }
                }
                rows = rows.add(1);
                panel = panel.add(VECTORS * V::LANES);
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (j, sum) in sums.into_iter().enumerate() {
                    self.end(i, j * V::LANES, sum);
                }
            }
        }
    }

    /// Makes a sum what is wanted, and writes it to row `i`.
    ///
    /// # Safety
    /// As [`Tile::compute`].
    #[inline(always)]
    unsafe fn end<V: Vector>(&self, i: usize, column: usize, mut sum: V) {
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
                Finish::Activate(activation) => sum = activation.of(sum),
            }
            sum.store(to);
        }
    }
}
