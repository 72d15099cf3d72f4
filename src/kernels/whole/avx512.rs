//! Products with AVX-512.
#![expect(
    unsafe_code,
    reason = "vector intrinsics and raw pointers; see the contract of `Sums`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use std::arch::x86_64::{
    __m512bh, __m512i, _mm256_loadu_si256, _mm512_add_epi32, _mm512_cvtepi8_epi16,
    _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_madd_epi16, _mm512_set1_epi32,
    _mm512_setzero_si512, _mm512_storeu_si512,
};

use half::bf16;

use super::round;
use super::tile::{Floats, Pairs, Product, RowHead, StepProducts, Sums};
use crate::kernels::vector::avx512::Avx512;

/// Computes a product of floats.
///
/// # Safety
/// The CPU has AVX-512 F, DQ and BW, and the contract of [`Product::compute`] holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn floats(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<Floats<Avx512>, 2, 12>() }
}

/// Computes a product of bfloat16.
///
/// # Safety
/// The CPU has AVX-512 F, DQ, BW and BF16, and the contract of
/// [`Product::compute`] holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512bf16")]
pub(super) unsafe fn bf16(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<Bf16, 2, 12>() }
}

/// Computes a product of bfloat16 without instructions for bfloat16.
///
/// # Safety
/// The CPU has AVX-512 F, DQ and BW, and the contract of [`Product::compute`] holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn bf16_as_floats(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<Pairs<Avx512>, 2, 12>() }
}

/// Computes a product of words.
///
/// # Safety
/// The CPU has AVX-512 F, DQ and BW, and the contract of [`Product::compute`] holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) unsafe fn words(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<Words, 2, 12>() }
}

/// Computes a product of bytes.
///
/// # Safety
/// The CPU has AVX-512 F, DQ, BW and VNNI, and the contract of
/// [`Product::compute`] holds.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni")]
pub(super) unsafe fn bytes(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<Bytes, 2, 12>() }
}

/// Products of bfloat16, two at a step.
struct Bf16;

// SAFETY: only memory that the caller vouches for is touched.
unsafe impl StepProducts for Bf16 {
    type Sums = Avx512;
    type Weights = __m512bh;
    type Inputs = __m512bh;

    #[inline(always)]
    unsafe fn weights(from: *const u8) -> __m512bh {
        // SAFETY: the caller vouches for the instructions and 64 bytes.
        unsafe { from.cast::<__m512bh>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn inputs(from: *const u8) -> __m512bh {
        // SAFETY: the caller vouches for the instructions and four bytes; both
        // types are 512 bits, and any bits are pairs of bfloat16.
        unsafe { std::mem::transmute::<__m512i, __m512bh>(broadcast(from)) }
    }

    #[inline(always)]
    unsafe fn add(sums: Avx512, weights: __m512bh, inputs: __m512bh) -> Avx512 {
        // SAFETY: the caller vouches for the instructions.
        unsafe { sums.add_bf16_products(weights, inputs) }
    }
}

/// Sixteen sums of whole numbers.
#[derive(Clone, Copy)]
pub(super) struct WholeSums(__m512i);

// SAFETY: constructors demand AVX-512 of their caller, and a value proves that a
// constructor was called; only memory that the caller vouches for is touched.
unsafe impl Sums for WholeSums {
    type Floats = Avx512;
    const ARE_WHOLE: bool = true;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller vouches for the instructions.
        Self(unsafe { _mm512_setzero_si512() })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for the instructions and 64 bytes.
        Self(unsafe { _mm512_loadu_si512(from.cast()) })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: `self` proves the instructions, the caller vouches for 64 bytes.
        unsafe { _mm512_storeu_si512(to.cast(), self.0) }
    }

    #[inline(always)]
    fn floats(self, addend: i32) -> Avx512 {
        // SAFETY: `self` proves the instructions.
        unsafe { Avx512::from_i32(_mm512_add_epi32(self.0, _mm512_set1_epi32(addend))) }
    }
}

/// Returns the four bytes of a step in all lanes.
///
/// # Safety
/// The CPU has AVX-512 F, and four bytes are readable.
#[inline(always)]
unsafe fn broadcast(from: *const u8) -> __m512i {
    // SAFETY: the caller vouches for the instructions and four bytes.
    unsafe { _mm512_set1_epi32(from.cast::<i32>().read_unaligned()) }
}

/// Products of words, two at a step.
struct Words;

// SAFETY: only memory that the caller vouches for is touched.
unsafe impl StepProducts for Words {
    type Sums = WholeSums;
    type Weights = __m512i;
    type Inputs = __m512i;
    const PACKED_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn weights(from: *const u8) -> __m512i {
        // SAFETY: the caller vouches for the instructions and 64 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn unpack(from: *const u8, to: *mut u8) {
        // SAFETY: the caller vouches for the instructions, 32 bytes and room for 64.
        unsafe {
            let words = _mm512_cvtepi8_epi16(_mm256_loadu_si256(from.cast()));
            _mm512_storeu_si512(to.cast(), words);
        }
    }

    #[inline(always)]
    unsafe fn inputs(from: *const u8) -> __m512i {
        // SAFETY: the caller vouches for the instructions and four bytes.
        unsafe { broadcast(from) }
    }

    #[inline(always)]
    unsafe fn add(sums: WholeSums, weights: __m512i, inputs: __m512i) -> WholeSums {
        // SAFETY: the caller vouches for the instructions.
        unsafe {
            let products = _mm512_madd_epi16(weights, inputs);
            WholeSums(_mm512_add_epi32(sums.0, products))
        }
    }
}

/// Products of bytes, four at a step.
struct Bytes;

// SAFETY: only memory that the caller vouches for is touched.
unsafe impl StepProducts for Bytes {
    type Sums = WholeSums;
    type Weights = __m512i;
    type Inputs = __m512i;

    #[inline(always)]
    unsafe fn weights(from: *const u8) -> __m512i {
        // SAFETY: the caller vouches for the instructions and 64 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn inputs(from: *const u8) -> __m512i {
        // SAFETY: the caller vouches for the instructions and four bytes.
        unsafe { broadcast(from) }
    }

    #[inline(always)]
    unsafe fn add(sums: WholeSums, weights: __m512i, inputs: __m512i) -> WholeSums {
        // SAFETY: the caller vouches for the instructions.
        WholeSums(unsafe { _mm512_dpbusd_epi32(sums.0, weights, inputs) })
    }
}

/// Rounds a row to bfloat16.
///
/// # Safety
/// The CPU has AVX-512 F, DQ and BW.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) fn round_bf16(from: &[f32], to: &mut [bf16]) {
    round::to_bf16(from, to);
}

/// Rounds a row to words.
///
/// # Safety
/// The CPU has AVX-512 F, DQ and BW.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) fn round_words(from: &[f32], limit: i16, to: &mut [i16]) -> RowHead {
    round::words(from, limit, to)
}

/// Rounds a row to bytes.
///
/// # Safety
/// The CPU has AVX-512 F, DQ and BW.
#[target_feature(enable = "avx512f,avx512dq,avx512bw")]
pub(super) fn round_bytes(from: &[f32], limit: i16, to: &mut [i8]) -> RowHead {
    round::bytes(from, limit, to)
}
