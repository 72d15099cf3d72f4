//! The innermost part of products of bytes: a few rows by one panel.
#![expect(
    unsafe_code,
    reason = "reads vectors through raw pointers: the inner loop is the whole cost of a step"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use super::tile::{AHEAD, TileEnding};
use crate::kernels::layers::digits::{
    DIGITS, DigitRows, GROUP, GROUP_BYTES, HEAD_BYTES, LANES, LINE, Lanes, put_together,
};
use crate::kernels::vector::Vector;

/// Most rows that are computed together: with a sum for each digit there are
/// registers for no more.
pub(super) const ROWS_MAX: usize = 8;

/// Number of strips in a panel.
const STRIPS: usize = 2;

/// Number of columns in a panel.
pub(super) const WIDTH: usize = STRIPS * LANES;

/// A tile: some rows, and the columns of one panel.
pub(super) struct DigitTile {
    pub(super) rows: DigitRows,
    pub(super) n_groups: usize,
    /// Panel of [`STRIPS`] strips, with a line per group.
    pub(super) panel: *const u8,
    /// Memory that is prefetched after the panel's own weights, and need not be
    /// valid. `None` prefetches nothing, because the panel has just been read.
    pub(super) next: Option<*const u8>,
    pub(super) ending: TileEnding,
}

/// Computes a tile with VNNI.
///
/// # Safety
/// The CPU has AVX-512 F, DQ, BW and VNNI, and the contract of
/// [`DigitTile::compute`] holds.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni")]
pub(super) unsafe fn avx512(tile: &DigitTile, n_rows: usize) {
    // SAFETY: the caller vouches for all of it.
    unsafe { tile.compute_rows::<crate::kernels::layers::digits::Vnni>(n_rows) }
}

impl DigitTile {
    /// Computes the tile for `n` rows.
    ///
    /// # Safety
    /// The contract of [`DigitTile::compute`] holds; `n` is 1, 2, 4 or 8.
    #[inline(always)]
    pub(super) unsafe fn compute_rows<L: Lanes>(&self, n: usize) {
        // With few rows, both strips are read at the same time: memory is
        // faster from two places.
        // SAFETY: the caller vouches for the rows.
        unsafe {
            match n {
                8 => self.compute::<L, 8, 1>(),
                4 => self.compute::<L, 4, STRIPS>(),
                2 => self.compute::<L, 2, STRIPS>(),
                _ => self.compute::<L, 1, STRIPS>(),
            }
        }
    }

    /// Computes the tile for `R` rows, `S` strips at a time.
    ///
    /// # Safety
    /// The CPU has the instructions of `L`; there are `R` rows of as many
    /// groups, and a panel; and the contract of [`TileEnding::end`] holds for
    /// as many rows and columns.
    #[inline(always)]
    unsafe fn compute<L: Lanes, const R: usize, const S: usize>(&self) {
        let strip_bytes = self.n_groups * LINE;
        let n_ahead = AHEAD / (S * LINE);
        let n_own = self.n_groups.saturating_sub(n_ahead);
        for first in (0..STRIPS).step_by(S) {
            let strips = self.panel.wrapping_add(first * strip_bytes);
            let after = strips.wrapping_add(S * strip_bytes);
            let next = if first + S < STRIPS {
                after
            } else {
                self.next.unwrap_or(after)
            };
            let asks = self.next.is_some();
            let mut ahead = strips.wrapping_add(n_ahead * LINE);
            let (mut line, mut group) = (strips, self.rows.start.wrapping_add(HEAD_BYTES));
            // SAFETY: there are as many groups as the caller vouches for.
            unsafe {
                let mut sums = [[[L::splat(0); DIGITS]; S]; R];
                for (i, sums) in sums.iter_mut().enumerate() {
                    let begin = self.rows.head(i).begin;
                    for sums in sums {
                        // No closure, as with `map`: its code may stay a
                        // function of its own, without the instructions.
                        for (sum, begin) in sums.iter_mut().zip(begin) {
                            *sum = L::splat(begin);
                        }
                    }
                }
                for at in 0..self.n_groups {
                    if asks {
                        if at == n_own {
                            ahead = next;
                        }
                        for strip in 0..S {
                            L::Floats::prefetch(ahead.wrapping_add(strip * strip_bytes));
                        }
                        ahead = ahead.wrapping_add(LINE);
                    }
                    let mut weights = [L::line(line); S];
                    for (strip, weights) in weights.iter_mut().enumerate().skip(1) {
                        *weights = L::line(line.add(strip * strip_bytes));
                    }
                    for (i, sums) in sums.iter_mut().enumerate() {
                        let digits = group.add(i * self.rows.stride).cast::<i8>();
                        for d in 0..DIGITS {
                            for (sums, weights) in sums.iter_mut().zip(weights) {
                                sums[d] = sums[d].dot(weights, digits.add(d * GROUP));
                            }
                        }
                    }
                    line = line.wrapping_add(LINE);
                    group = group.wrapping_add(GROUP_BYTES);
                }
                for (i, sums) in sums.into_iter().enumerate() {
                    let factor = L::Floats::splat(self.rows.head(i).factor);
                    for (strip, sums) in sums.into_iter().enumerate() {
                        let [low, middle, high] = sums;
                        let sums = [low.numbers(), middle.numbers(), high.numbers()];
                        let sums = put_together(sums);
                        for lane in (0..LANES).step_by(L::Floats::LANES) {
                            let sum = L::Floats::load(sums[lane..].as_ptr()).mul(factor);
                            self.ending.end(i, (first + strip) * LANES + lane, sum);
                        }
                    }
                }
            }
        }
    }
}
