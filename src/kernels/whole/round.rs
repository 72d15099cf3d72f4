//! Rounds rows to bfloat16, or to whole numbers (quantization) for products with
//! weights of 8 bits.
//!
//! Each row of whole numbers has a factor of its own, so a row's result depends on nothing but
//! the row. The largest number of the row becomes the `limit`, the largest whole
//! number for which no sum of products overflows: with words of 16 bits it
//! follows from the weights ([`limit_of_words`]).
#![expect(
    unsafe_code,
    reason = "writes rows through raw pointers, and calls instructions for which the CPU was checked"
)]
#![expect(
    clippy::inline_always,
    reason = "the compiler uses a CPU's vectors only inside a function that has them"
)]

use half::bf16;

use super::tile::RowHead;
use super::{ImageKernels, Products};
use crate::kernels::attention::Kernel;
use crate::kernels::layers::LayersError;
use crate::kernels::vector::{ROUND, magnitude};

/// Largest whole number of a row of bytes. Not -128: both signs have the same
/// room.
const LARGEST_BYTE: i16 = 127;

/// Excess of weights of bytes while they are multiplied: the CPU's
/// products are of a signed and an unsigned byte.
pub(super) const EXCESS: u8 = 128;

/// Most inputs of a product of bytes, so that no sum overflows: a sum of 255
/// times 127 per input.
const INPUTS_MAX: usize = 1 << 16;

/// Smallest largest number of a row: rows of smaller numbers are rounded as if
/// they had this one, so that no factor leaves the normal range: 2^-100.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);

/// Rows of whole numbers, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct RoundedRows {
    /// First step of the first row.
    pub(super) start: *mut u32,
    /// Steps from a row to the next row.
    pub(super) stride: usize,
    pub(super) heads: *mut RowHead,
}

/// Returns the limit of rows of words: as large as possible, while no sum of
/// products with a column of the weights can overflow. With 512 inputs rows
/// keep all of their 16 bits.
///
/// # Errors
/// If the limit is so small that bytes would be as exact.
pub(super) fn limit_of_words(weights: &[i8], outputs: usize) -> Result<i16, LayersError> {
    let mut sums = vec![0_u64; outputs];
    for row in weights.chunks_exact(outputs) {
        for (sum, weight) in sums.iter_mut().zip(row) {
            *sum += u64::from(weight.unsigned_abs());
        }
    }
    let largest = sums.into_iter().max().unwrap_or(0).max(1);
    let limit = u64::from(i32::MAX.unsigned_abs()) / largest;
    i16::try_from(limit.min(u64::from(i16::MAX.unsigned_abs())))
        .ok()
        .filter(|limit| *limit >= LARGEST_BYTE)
        .ok_or(LayersError::Digits(weights.len() / outputs.max(1)))
}

/// Returns the limit of rows of bytes.
///
/// # Errors
/// If sums of as many inputs could overflow.
pub(super) fn limit_of_bytes(inputs: usize) -> Result<i16, LayersError> {
    if inputs > INPUTS_MAX {
        return Err(LayersError::Digits(inputs));
    }
    Ok(LARGEST_BYTE)
}

/// Rounds a row.
///
/// # Safety
/// The kernels are available and have rounded products, there is room for row
/// `idx` with whole steps, and nobody else has the row.
pub(super) unsafe fn round(
    kernels: ImageKernels,
    from: &[f32],
    limit: i16,
    to: RoundedRows,
    idx: usize,
) {
    #[cfg(target_arch = "x86_64")]
    use Kernel::{Amx, Avx2, Avx512, Avx512Bf16};
    let n_numbers = kernels.n_steps(from.len()) * kernels.products.per_step();
    // SAFETY: the caller vouches for the room and for the instructions.
    unsafe {
        let row = to.start.add(idx * to.stride);
        let head = match kernels.products {
            Products::Bf16 | Products::Floats => {
                let row = std::slice::from_raw_parts_mut(row.cast::<bf16>(), n_numbers);
                match kernels.products_on {
                    #[cfg(target_arch = "x86_64")]
                    Avx2 => super::avx2::round_bf16(from, row),
                    #[cfg(target_arch = "x86_64")]
                    Avx512 | Avx512Bf16 | Amx => super::avx512::round_bf16(from, row),
                    _ => to_bf16(from, row),
                }
                return;
            }
            Products::Words => {
                let row = std::slice::from_raw_parts_mut(row.cast::<i16>(), n_numbers);
                match kernels.products_on {
                    #[cfg(target_arch = "x86_64")]
                    Avx2 => super::avx2::round_words(from, limit, row),
                    #[cfg(target_arch = "x86_64")]
                    Avx512 => super::avx512::round_words(from, limit, row),
                    _ => words(from, limit, row),
                }
            }
            Products::Bytes => {
                let row = std::slice::from_raw_parts_mut(row.cast::<i8>(), n_numbers);
                match kernels.products_on {
                    #[cfg(target_arch = "x86_64")]
                    Avx512 | Amx => super::avx512::round_bytes(from, limit, row),
                    _ => bytes(from, limit, row),
                }
            }
        };
        to.heads.add(idx).write(head);
    }
}

/// Rounds a row to bfloat16: to the nearest, of two to the even. All kernels round
/// by this, since the CPU's instruction takes small numbers for zero.
#[inline(always)]
pub(super) fn to_bf16(from: &[f32], to: &mut [bf16]) {
    let (numbers, beyond) = to.split_at_mut(from.len());
    for (to, x) in numbers.iter_mut().zip(from) {
        let bits = x.to_bits();
        let nearest = bits.wrapping_add(0x7FFF + (bits >> 16 & 1));
        // A NaN stays a NaN.
        let bits = if x.is_nan() { bits | 1 << 22 } else { nearest };
        let upper = (bits >> 16) as u16;
        *to = bf16::from_bits(upper);
    }
    beyond.fill(bf16::ZERO);
}

/// Rounds a row to words.
#[inline(always)]
pub(super) fn words(from: &[f32], limit: i16, to: &mut [i16]) -> RowHead {
    let (factor, inverse) = factors(from, limit);
    let (numbers, beyond) = to.split_at_mut(from.len());
    for (to, x) in numbers.iter_mut().zip(from) {
        #[expect(clippy::cast_possible_truncation, reason = "within the limit")]
        let word = steps(*x, inverse) as i16;
        *to = word;
    }
    beyond.fill(0);
    RowHead { factor, addend: 0 }
}

/// Rounds a row to bytes. The head's addend takes away what the weights have
/// too much.
#[inline(always)]
pub(super) fn bytes(from: &[f32], limit: i16, to: &mut [i8]) -> RowHead {
    let (factor, inverse) = factors(from, limit);
    let (numbers, beyond) = to.split_at_mut(from.len());
    let mut sum = 0_i32;
    for (to, x) in numbers.iter_mut().zip(from) {
        #[expect(clippy::cast_possible_truncation, reason = "within the limit")]
        let byte = steps(*x, inverse) as i8;
        *to = byte;
        sum = sum.wrapping_add(i32::from(byte));
    }
    beyond.fill(0);
    RowHead {
        factor,
        addend: sum.wrapping_mul(-i32::from(EXCESS)),
    }
}

/// Returns the factor of a row's whole numbers, and its inverse; NaN if the row
/// is not finite, so that all of its results are NaN.
#[inline(always)]
fn factors(row: &[f32], limit: i16) -> (f32, f32) {
    let largest = row.iter().copied().map(magnitude).fold(0, u32::max);
    let largest = f32::from_bits(largest);
    if !largest.is_finite() {
        return (f32::NAN, 0.0);
    }
    let (largest, limit) = (largest.max(SMALLEST), f32::from(limit));
    (largest / limit, limit / largest)
}

/// Rounds `x` times `inverse`, which is within 22 bits, to the nearest whole
/// number. In this form the compiler finds the vectors.
#[inline(always)]
fn steps(x: f32, inverse: f32) -> i32 {
    const MANTISSA: u32 = (1 << 23) - 1;
    const ZERO: i32 = 1 << 22;
    let bits = (x * inverse + ROUND).to_bits();
    (bits & MANTISSA).cast_signed() - ZERO
}
