//! The innermost part: a few rows by one panel.
#![expect(
    unsafe_code,
    reason = "reads and writes vectors through raw pointers: the inner loop is the whole cost of a step"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use crate::vector::Vector;

/// Vectors in a row of a panel.
const VECTORS: usize = 2;

/// How far ahead of its use a line of weights is asked for. A few hundred
/// nanoseconds at the speed of memory; the processor's own prefetching stops at
/// every page.
const AHEAD: usize = 2048;

/// Floats in a line.
const LINE: usize = 16;

/// A tile: some rows, and the columns of one panel.
pub(super) struct Tile {
    /// Of each input, one number a row.
    pub(super) rows: *const f32,
    pub(super) inputs: usize,
    /// Of each input, [`VECTORS`] vectors.
    pub(super) panel: *const f32,
    /// Tile that count.
    pub(super) n_columns: usize,
    pub(super) bias: Option<*const f32>,
    pub(super) residual: Option<*const f32>,
    pub(super) output: *mut f32,
    /// Floats from a row of the output, and of the residual, to the next.
    pub(super) stride: usize,
}

impl Tile {
    /// # Safety
    /// The CPU has the instructions of `V`; there are `R` rows, and the panel has
    /// `VECTORS` vectors of `V` for each input; bias, residual and output have
    /// `n_columns` floats in each of their rows, which are at most so many; and
    /// nobody else has those of the output.
    #[inline(always)]
    pub(super) unsafe fn compute<V: Vector, const R: usize>(&self) {
        let (mut rows, mut panel) = (self.rows, self.panel);
        // SAFETY: as many inputs as the caller vouches for.
        unsafe {
            let mut sums = [[V::splat(0.0); VECTORS]; R];
            for _ in 0..self.inputs {
                let mut weights = [V::splat(0.0); VECTORS];
                for (j, weights) in weights.iter_mut().enumerate() {
                    let at = panel.add(j * V::LANES);
                    // Once a line, where vectors are not shorter.
                    if (j * V::LANES).is_multiple_of(LINE) {
                        V::prefetch(at.wrapping_byte_add(AHEAD));
                    }
                    *weights = V::load(at);
                }
                for (i, sums) in sums.iter_mut().enumerate() {
                    let x = V::splat(*rows.add(i));
                    for (sum, weights) in sums.iter_mut().zip(weights) {
                        *sum = weights.mul_add(x, *sum);
                    }
                }
                rows = rows.add(R);
                panel = panel.add(VECTORS * V::LANES);
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (j, sum) in sums.into_iter().enumerate() {
                    self.finish(i, j * V::LANES, sum);
                }
            }
        }
    }

    /// Adds what is to be added, and writes a vector of row `i`.
    ///
    /// # Safety
    /// As [`Tile::compute`].
    #[inline(always)]
    unsafe fn finish<V: Vector>(&self, i: usize, column: usize, sum: V) {
        let Some(n_left) = self.n_columns.checked_sub(column).filter(|n| *n > 0) else {
            return;
        };
        let at = i * self.stride + column;
        // SAFETY: the caller vouches for the columns that count.
        unsafe {
            let mut sum = sum;
            if n_left >= V::LANES {
                if let Some(bias) = self.bias {
                    sum = sum.add(V::load(bias.add(column)));
                }
                if let Some(residual) = self.residual {
                    sum = sum.add(V::load(residual.add(at)));
                }
                sum.store(self.output.add(at));
            } else {
                if let Some(bias) = self.bias {
                    sum = sum.add(V::load_partial(bias.add(column), n_left));
                }
                if let Some(residual) = self.residual {
                    sum = sum.add(V::load_partial(residual.add(at), n_left));
                }
                sum.store_partial(self.output.add(at), n_left);
            }
        }
    }
}
