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
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::bf16::{self, Multiply, SumStart, Tiles};
use super::tile::{Block, HeadView};
use crate::kernels::vector::scratch::AlignedScratch;

/// Returns true if the CPU has the matrix unit and Linux lets this process use
/// it. Linux must be asked, because the unit's registers make every thread's
/// saved state 8 KiB larger.
pub(super) fn is_available() -> bool {
    static AVAILABLE: OnceLock<bool> = OnceLock::new();
    *AVAILABLE.get_or_init(|| {
        const BF16: u32 = 1 << 22;
        const TILES: u32 = 1 << 24;
        let features = __cpuid_count(7, 0).edx;
        features & BF16 != 0 && features & TILES != 0 && request_permission()
    })
}

/// Asks Linux for the tile registers, for this process and its future threads.
#[cfg(target_os = "linux")]
fn request_permission() -> bool {
    const ARCH_PRCTL: usize = 158;
    const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
    const XFEATURE_XTILEDATA: usize = 18;
    let status: isize;
    // SAFETY: a system call that takes two numbers and touches no memory of
    // ours; the kernel overwrites rcx and r11.
    unsafe {
        asm!(
            "syscall",
            inlateout("rax") ARCH_PRCTL => status,
            in("rdi") ARCH_REQ_XCOMP_PERM,
            in("rsi") XFEATURE_XTILEDATA,
            lateout("rcx") _,
            lateout("r11") _,
            options(nostack),
        );
    }
    status == 0
}

#[cfg(not(target_os = "linux"))]
fn request_permission() -> bool {
    false
}

/// # Safety
/// The CPU has AVX-512 F, DQ, BW and BF16, [`is_available`] has said yes, and
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

/// Configuration that `ldtilecfg` reads: all eight tiles are 16 rows of 64
/// bytes.
#[repr(C, align(64))]
struct Config {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    row_bytes: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: Config = Config {
    palette: 1,
    start_row: 0,
    reserved: [0; 14],
    row_bytes: [64, 64, 64, 64, 64, 64, 64, 64, 0, 0, 0, 0, 0, 0, 0, 0],
    rows: [16, 16, 16, 16, 16, 16, 16, 16, 0, 0, 0, 0, 0, 0, 0, 0],
};

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
        // SAFETY: the caller vouches for the instructions; the configuration is
        // one that the unit accepts. It stays until `end`: nothing else on this
        // thread uses tiles in between.
        unsafe { asm!("ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly)) }
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
        // SAFETY: the caller vouches for the instructions. The tiles are
        // released because idle tiles would be saved at every switch of
        // threads.
        unsafe { asm!("tilerelease", options(nostack, nomem)) }
    }
}
