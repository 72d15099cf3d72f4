//! Multiplies tiles of bfloat16 with the matrix unit (AMX): sixteen times the
//! speed of `f32` vectors, on Intel from Sapphire Rapids on, under Linux.
//!
//! The standard library's intrinsics for AMX are not stable (Rust 1.95), so the
//! instructions are written as inline assembly.
#![expect(
    unsafe_code,
    reason = "inline assembly, and raw pointers; see the contract of `Multiply`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use std::arch::asm;

use super::bf16::{self, Multiply, SumStart, Tiles};
use super::tile::{Block, HeadView};
use crate::kernels::vector::amx;
use crate::kernels::vector::scratch::AlignedScratch;

/// # Safety
/// The CPU has AVX-512 F, DQ, BW and BF16, [`amx::is_available`] has said yes, and
/// the contract of [`bf16::attend`] holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512bf16")]
pub(super) unsafe fn attend(
    head: &HeadView,
    next: &mut dyn FnMut() -> Option<Block>,
    scratch: &mut AlignedScratch,
) {
    // SAFETY: the caller vouches for the instructions and the rows.
    unsafe { bf16::attend::<MatrixUnit>(head, next, scratch) }
}

struct MatrixUnit;

/// Computes the products of one call. `$start` prepares the four tiles of sums,
/// tmm0 to tmm3.
macro_rules! multiply {
    ($tiles:ident, $($start:literal),*) => {
        asm!(
            $($start,)*
            "2:",
            "tileloadd tmm4, [{left} + {row}*1]",
            "tileloadd tmm6, [{right} + {row}*1]",
            "tdpbf16ps tmm0, tmm4, tmm6",
            "tileloadd tmm7, [{right_next} + {row}*1]",
            "tdpbf16ps tmm1, tmm4, tmm7",
            "tileloadd tmm5, [{left_next} + {row}*1]",
            "tdpbf16ps tmm2, tmm5, tmm6",
            "tdpbf16ps tmm3, tmm5, tmm7",
            "add {left}, {left_step}",
            "add {left_next}, {left_step}",
            "add {right}, {right_step}",
            "add {right_next}, {right_step}",
            "dec {n}",
            "jnz 2b",
            "tilestored [{sum} + {row}*1], tmm0",
            "tilestored [{beside} + {row}*1], tmm1",
            "tilestored [{below} + {row}*1], tmm2",
            "tilestored [{across} + {row}*1], tmm3",
            row = in(reg) 64_usize,
            left = inout(reg) $tiles.left => _,
            left_next = inout(reg) $tiles.left.add($tiles.left_next) => _,
            left_step = in(reg) $tiles.left_step * 4,
            right = inout(reg) $tiles.right => _,
            right_next = inout(reg) $tiles.right.add($tiles.right_next) => _,
            right_step = in(reg) $tiles.right_step * 4,
            n = inout(reg) $tiles.n => _,
            sum = in(reg) $tiles.sum,
            beside = in(reg) $tiles.sum.add($tiles.sum_beside),
            below = in(reg) $tiles.sum.add($tiles.sum_below),
            across = in(reg) $tiles.sum.add($tiles.sum_below + $tiles.sum_beside),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

// SAFETY: `multiply` stores four tiles, those of the sums.
unsafe impl Multiply for MatrixUnit {
    #[inline(always)]
    unsafe fn begin() {
        // SAFETY: the caller vouches for the instructions.
        unsafe { amx::begin() }
    }

    #[inline(always)]
    unsafe fn multiply(tiles: &Tiles, sum: SumStart) {
        debug_assert!(tiles.n > 0);
        // SAFETY: the caller vouches for the tiles, 1 KiB each; `n` is above zero,
        // so the loop ends.
        unsafe {
            match sum {
                SumStart::New => multiply!(
                    tiles,
                    "tilezero tmm0",
                    "tilezero tmm1",
                    "tilezero tmm2",
                    "tilezero tmm3"
                ),
                SumStart::More => multiply!(
                    tiles,
                    "tileloadd tmm0, [{sum} + {row}*1]",
                    "tileloadd tmm1, [{beside} + {row}*1]",
                    "tileloadd tmm2, [{below} + {row}*1]",
                    "tileloadd tmm3, [{across} + {row}*1]"
                ),
            }
        }
    }

    #[inline(always)]
    unsafe fn end() {
        // SAFETY: the caller vouches for the instructions.
        unsafe { amx::end() }
    }
}
