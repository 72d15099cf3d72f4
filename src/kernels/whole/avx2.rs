//! Products with AVX2.
#![expect(
    unsafe_code,
    reason = "vector intrinsics and raw pointers; see the contract of `Sums`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use std::arch::x86_64::{
    __m256i, _mm_loadu_si128, _mm256_add_epi32, _mm256_cvtepi8_epi16, _mm256_loadu_si256,
    _mm256_madd_epi16, _mm256_set1_epi32, _mm256_setzero_si256, _mm256_storeu_si256,
};

use half::bf16;

use super::round;
use super::tile::{Floats, Pairs, Product, RowHead, StepProducts, Sums};
use crate::kernels::vector::avx2::Avx2;

/// Computes a product of floats.
///
/// # Safety
/// The CPU has AVX2 and FMA, and the contract of [`Product::compute`] holds.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn floats(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<Floats<Avx2>, 2, 6>() }
}

/// Computes a product of bfloat16.
///
/// # Safety
/// The CPU has AVX2 and FMA, and the contract of [`Product::compute`] holds.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn bf16(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<Pairs<Avx2>, 2, 4>() }
}

/// Computes a product of words.
///
/// # Safety
/// The CPU has AVX2 and FMA, and the contract of [`Product::compute`] holds.
#[target_feature(enable = "avx2,fma")]
pub(super) unsafe fn words(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<Words, 2, 4>() }
}

/// Eight sums of whole numbers.
#[derive(Clone, Copy)]
struct WholeSums(__m256i);

// SAFETY: constructors demand AVX2 of their caller, and a value proves that a
// constructor was called; only memory that the caller vouches for is touched.
unsafe impl Sums for WholeSums {
    type Floats = Avx2;
    const ARE_WHOLE: bool = true;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller vouches for the instructions.
        Self(unsafe { _mm256_setzero_si256() })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for the instructions and 32 bytes.
        Self(unsafe { _mm256_loadu_si256(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: `self` proves the instructions, the caller vouches for 32 bytes.
        unsafe { _mm256_storeu_si256(to.cast(), self.0) }
    }

    #[inline(always)]
    fn floats(self, addend: i32) -> Avx2 {
        // SAFETY: `self` proves the instructions.
        unsafe { Avx2::from_i32(_mm256_add_epi32(self.0, _mm256_set1_epi32(addend))) }
    }
}

/// Products of words, two at a step.
struct Words;

// SAFETY: only memory that the caller vouches for is touched.
unsafe impl StepProducts for Words {
    type Sums = WholeSums;
    type Weights = __m256i;
    type Inputs = __m256i;
    const PACKED_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn weights(from: *const u8) -> __m256i {
        // SAFETY: the caller vouches for the instructions and 32 bytes.
        unsafe { _mm256_loadu_si256(from.cast()) }
    }

    #[inline(always)]
    unsafe fn unpack(from: *const u8, to: *mut u8) {
        // SAFETY: the caller vouches for the instructions, 16 bytes and room for 32.
        unsafe {
            let words = _mm256_cvtepi8_epi16(_mm_loadu_si128(from.cast()));
            _mm256_storeu_si256(to.cast(), words);
        }
    }

    #[inline(always)]
    unsafe fn inputs(from: *const u8) -> __m256i {
        // SAFETY: the caller vouches for the instructions and four bytes.
        unsafe { _mm256_set1_epi32(from.cast::<i32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn add(sums: WholeSums, weights: __m256i, inputs: __m256i) -> WholeSums {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            let products = _mm256_madd_epi16(weights, inputs);
            WholeSums(_mm256_add_epi32(sums.0, products))
        }
    }
}

/// Rounds a row to bfloat16.
///
/// # Safety
/// The CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) fn round_bf16(from: &[f32], to: &mut [bf16]) {
    round::to_bf16(from, to);
}

/// Rounds a row to words.
///
/// # Safety
/// The CPU has AVX2 and FMA.
#[target_feature(enable = "avx2,fma")]
pub(super) fn round_words(from: &[f32], limit: i16, to: &mut [i16]) -> RowHead {
    round::words(from, limit, to)
}
