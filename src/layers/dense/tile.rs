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

/// How far ahead of its use a line of weights is asked for. A few hundred
/// nanoseconds at the speed of memory; the processor's own prefetching stops at
/// every page.
const AHEAD: usize = 2048;

/// Which weights are asked for while others are used. What comes after the panel
/// need not be there.
#[derive(Clone, Copy, Debug)]
pub(super) enum Ahead<W> {
    /// Those that the tile itself comes to, then the first of the next panel.
    Own { next: *const W },
    /// With several tiles a panel passes through, all but the first find it in
    /// the cache and leave memory idle; so each asks for a part of the next one.
    Next {
        from: *const W,
        /// Weights further with each input.
        step: usize,
    },
}

impl<W: Weight> Ahead<W> {
    /// For tile `idx` of so many over a panel of so many rows of weights. Of 8 bits
    /// there are so few that memory is not what several tiles wait for.
    pub(super) fn of(
        n_tiles: usize,
        idx: usize,
        inputs: usize,
        width: usize,
        next: *const u8,
    ) -> Self {
        let next = next.cast();
        let step = width.div_ceil(n_tiles);
        if n_tiles < 2 || size_of::<W>() == 1 {
            Self::Own { next }
        } else {
            Self::Next {
                from: next.wrapping_add(idx * inputs * step),
                step,
            }
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
    /// A row of it for each input.
    pub(super) panel: *const W,
    pub(super) ahead: Ahead<W>,
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
    unsafe { tile.compute_rows::<crate::vector::avx2::Avx2, 3>(n_rows) }
}

/// # Safety
/// The CPU has AVX-512 F and DQ; and as [`Tile::compute`].
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq")]
pub(super) unsafe fn avx512<W: Weight>(tile: &Tile<W>, n_rows: usize) {
    // SAFETY: the caller vouches for all of it.
    unsafe { tile.compute_rows::<crate::vector::avx512::Avx512, 2>(n_rows) }
}

impl<W: Weight> Tile<W> {
    /// # Safety
    /// As [`Tile::compute`]; `n` is 1, 2, 4 or 8.
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

    /// # Safety
    /// The CPU has the instructions of `V`; there are `R` rows, and the panel has
    /// `VECTORS` vectors of `V` for each input; scales, bias and each row of the
    /// output are as wide; and nobody else has these columns of the output.
    #[inline(always)]
    unsafe fn compute<V: Vector, const VECTORS: usize, const R: usize>(&self) {
        let n_lines = (VECTORS * V::LANES).div_ceil(W::PER_LINE);
        let n_ahead = AHEAD / size_of::<W>() / (VECTORS * V::LANES);
        let n_own = self.inputs.saturating_sub(n_ahead);
        let mut ahead = self.panel.wrapping_add(n_ahead * VECTORS * V::LANES);
        let (mut rows, mut panel) = (self.rows, self.panel);
        // SAFETY: as many inputs as the caller vouches for.
        unsafe {
            let mut sums = [[V::splat(0.0); VECTORS]; R];
            for input in 0..self.inputs {
                match self.ahead {
                    Ahead::Own { next } => {
                        if input == n_own {
                            ahead = next;
                        }
                        for line in 0..n_lines {
                            V::prefetch(ahead.wrapping_add(line * W::PER_LINE));
                        }
                        ahead = ahead.wrapping_add(VECTORS * V::LANES);
                    }
                    Ahead::Next { from, step } => {
                        V::prefetch_far(from.wrapping_add(input * step));
                    }
                }
                let mut weights = [V::splat(0.0); VECTORS];
                for (j, weights) in weights.iter_mut().enumerate() {
                    *weights = W::load(panel.add(j * V::LANES));
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
