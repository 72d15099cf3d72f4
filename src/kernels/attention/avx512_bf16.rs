//! Multiplies tiles of bfloat16 with AVX-512 BF16: twice the speed of `f32` on
//! a CPU that has a full unit for it, as Zen 4 does.
#![expect(
    unsafe_code,
    reason = "vector intrinsics and raw pointers; see the contract of `Multiply`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]
#![expect(
    clippy::needless_range_loop,
    reason = "rows and vectors index several arrays at once"
)]

use std::arch::x86_64::{
    __m512bh, __m512i, _mm512_dpbf16_ps, _mm512_loadu_ps, _mm512_loadu_si512, _mm512_set1_epi32,
    _mm512_setzero_ps, _mm512_storeu_ps,
};

use super::bf16::{self, Multiply, SumStart, Tiles};
use super::tile::{Block, HeadView};
use crate::kernels::vector::scratch::AlignedScratch;

/// # Safety
/// The CPU has AVX-512 F, DQ, BW and BF16, and the contract of [`bf16::attend`]
/// holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512bf16")]
pub(super) unsafe fn attend(
    head: &HeadView,
    next: &mut dyn FnMut() -> Option<Block>,
    scratch: &mut AlignedScratch,
) {
    // SAFETY: the caller vouches for the instructions and the rows.
    unsafe { bf16::attend::<DotProducts>(head, next, scratch) }
}

struct DotProducts;

/// Rows of sums that are kept in registers, times two vectors.
const ROWS: usize = 8;

// SAFETY: `multiply` writes 16 rows of each tile of sums.
unsafe impl Multiply for DotProducts {
    #[inline(always)]
    unsafe fn begin() {}

    #[inline(always)]
    unsafe fn multiply(tiles: &Tiles, sum: SumStart) {
        for first_row in (0..32).step_by(ROWS) {
            // SAFETY: row `i` of a tile is 16 floats or pairs, `i * 16` on.
            unsafe {
                let inside = first_row % 16 * 16;
                let to = tiles.sum.add(first_row / 16 * tiles.sum_below + inside);
                let mut acc = [[_mm512_setzero_ps(); 2]; ROWS];
                if sum == SumStart::More {
                    for i in 0..ROWS {
                        for j in 0..2 {
                            acc[i][j] = _mm512_loadu_ps(to.add(i * 16 + j * tiles.sum_beside));
                        }
                    }
                }
                for step in 0..tiles.n {
                    let left = tiles
                        .left
                        .add(first_row / 16 * tiles.left_next + step * tiles.left_step + inside);
                    let right = tiles.right.add(step * tiles.right_step);
                    for pair in 0..16 {
                        // No closure, as with `map`: its code may stay a
                        // function of its own, without the instructions.
                        let at = right.add(pair * 16);
                        let beside = at.add(tiles.right_next);
                        let r = [
                            as_pairs(_mm512_loadu_si512(at.cast())),
                            as_pairs(_mm512_loadu_si512(beside.cast())),
                        ];
                        for i in 0..ROWS {
                            let pair = left.add(i * 16 + pair).cast::<i32>().read();
                            let l = as_pairs(_mm512_set1_epi32(pair));
                            for j in 0..2 {
                                acc[i][j] = _mm512_dpbf16_ps(acc[i][j], l, r[j]);
                            }
                        }
                    }
                }
                for i in 0..ROWS {
                    for j in 0..2 {
                        _mm512_storeu_ps(to.add(i * 16 + j * tiles.sum_beside), acc[i][j]);
                    }
                }
            }
        }
    }

    #[inline(always)]
    unsafe fn end() {}
}

#[inline(always)]
fn as_pairs(bits: __m512i) -> __m512bh {
    // SAFETY: both are 512 bits, and any bits are pairs of bfloat16.
    unsafe { std::mem::transmute(bits) }
}
