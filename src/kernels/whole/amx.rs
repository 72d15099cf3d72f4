//! Products with the matrix unit (AMX).
//!
//! A tile of weights is sixteen steps by sixteen columns, which is how panels hold
//! them; a tile of rows is sixteen rows by sixteen steps, and one of sums sixteen
//! rows by sixteen columns. Sums stay in tiles until they are complete.
#![expect(
    unsafe_code,
    reason = "inline assembly, and raw pointers; see the contract of `Product`"
)]

use std::arch::asm;

use super::TILE_ROWS;
use super::avx512::WholeSums;
use super::tile::{PANEL_WIDTH_MAX, Product, STEP, Sums};
use crate::kernels::vector::amx;
use crate::kernels::vector::avx512::Avx512;

/// Bytes of a panel's step, and of the sums of a row with a panel.
const LINE: usize = PANEL_WIDTH_MAX * STEP;

/// Bytes of memory that are prefetched for each tile of rows and 16 steps.
const AHEAD: usize = TILE_ROWS * LINE / 2;

/// Up to 32 rows by a panel, which is two tiles wide.
struct Tiles {
    rows: *const u8,
    row_stride: usize,
    weights: *const u8,
    /// Number of tiles of steps.
    n: usize,
    sums: *mut f32,
    /// Memory to prefetch, which need not be valid.
    ahead: *const u8,
}

/// Multiplies tiles with an instruction. If `$both` is one, there are two tiles of
/// rows, and one tile otherwise.
macro_rules! multiply {
    ($tiles:ident, $dot:literal, $both:literal) => {
        asm!(
            "tilezero tmm0",
            "tilezero tmm1",
            "tilezero tmm2",
            "tilezero tmm3",
            "2:",
            "tileloadd tmm4, [{rows} + {row_stride}*1]",
            "tileloadd tmm6, [{weights} + {line}*1]",
            concat!($dot, " tmm0, tmm4, tmm6"),
            "tileloadd tmm7, [{weights} + {line}*1 + 64]",
            concat!($dot, " tmm1, tmm4, tmm7"),
            concat!(".if ", $both),
            "tileloadd tmm5, [{below} + {row_stride}*1]",
            concat!($dot, " tmm2, tmm5, tmm6"),
            concat!($dot, " tmm3, tmm5, tmm7"),
            "add {below}, 64",
            ".endif",
            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13,14,15",
            "prefetcht1 [{ahead} + 64*\\i]",
            ".endr",
            "add {rows}, 64",
            "add {weights}, {tile_bytes}",
            "add {ahead}, {ahead_bytes}",
            "dec {n}",
            "jnz 2b",
            "tilestored [{sums} + {line}*1], tmm0",
            "tilestored [{sums} + {line}*1 + 64], tmm1",
            concat!(".if ", $both),
            "tilestored [{sums} + {line}*1 + {tile_bytes}], tmm2",
            "tilestored [{sums} + {line}*1 + {tile_bytes} + 64], tmm3",
            ".endif",
            rows = inout(reg) $tiles.rows => _,
            below = inout(reg) $tiles.rows.wrapping_add(TILE_ROWS * $tiles.row_stride) => _,
            row_stride = in(reg) $tiles.row_stride,
            weights = inout(reg) $tiles.weights => _,
            line = in(reg) LINE,
            tile_bytes = const TILE_ROWS * LINE,
            ahead = inout(reg) $tiles.ahead => _,
            ahead_bytes = const AHEAD,
            n = inout(reg) $tiles.n => _,
            sums = in(reg) $tiles.sums,
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
            options(nostack),
        )
    };
}

/// Makes a function that multiplies tiles with an instruction.
macro_rules! multiplying {
    ($name:ident, $dot:literal) => {
        /// Computes the sums of one tile of rows, or of two.
        ///
        /// # Safety
        /// The matrix unit has been prepared and has the instruction; rows, weights
        /// and sums are of whole tiles, and there is at least one.
        unsafe fn $name(tiles: &Tiles, are_two: bool) {
            debug_assert!(tiles.n > 0);
            // SAFETY: the caller vouches for the tiles; `n` is above zero, so the
            // loop ends.
            unsafe {
                if are_two {
                    multiply!(tiles, $dot, "1");
                } else {
                    multiply!(tiles, $dot, "0");
                }
            }
        }
    };
}

multiplying!(multiply_bf16, "tdpbf16ps");
// Rows are signed, weights are not.
multiplying!(multiply_bytes, "tdpbsud");

/// Computes a product of bfloat16.
///
/// # Safety
/// The CPU has AVX-512 F, DQ and BW, the matrix unit is available, and the contract
/// of [`compute`] holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn bf16(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { compute::<Avx512>(product, multiply_bf16) }
}

/// Computes a product of bytes.
///
/// # Safety
/// The contract of [`bf16`] holds, and the matrix unit has products of bytes.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn bytes(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { compute::<WholeSums>(product, multiply_bytes) }
}

/// Computes a product with sums of the format of `S`.
///
/// # Safety
/// The CPU has the instructions of `S` and `multiply`; the contract of
/// [`Product::compute`] holds, with steps of whole tiles, and with whole tiles of
/// rows and sums, however many rows there are.
#[inline]
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
unsafe fn compute<S: Sums<Floats = Avx512>>(product: &Product, multiply: unsafe fn(&Tiles, bool)) {
    let n = product.n_steps / TILE_ROWS;
    let panel_bytes = product.n_steps * LINE;
    // SAFETY: the caller vouches for the instructions, the panels, and whole tiles
    // of rows and sums.
    unsafe {
        amx::begin();
        let mut weights = product.panels;
        for column in (0..product.outputs).step_by(PANEL_WIDTH_MAX) {
            let next = weights.wrapping_add(panel_bytes);
            for row in (0..product.n_rows).step_by(2 * TILE_ROWS) {
                let tiles = Tiles {
                    rows: product.rows.add(row * product.row_stride),
                    row_stride: product.row_stride,
                    weights,
                    n,
                    sums: product.sums.add(row * PANEL_WIDTH_MAX),
                    ahead: next.wrapping_add(row / (2 * TILE_ROWS) * n * AHEAD),
                };
                multiply(&tiles, product.n_rows - row > TILE_ROWS);
            }
            product.end::<S, 2>(column);
            weights = next;
        }
        amx::end();
    }
}
