//! Products of bytes in the widest vectors.

use std::arch::x86_64::{
    __m512i, _mm_setr_epi8, _mm512_add_epi32, _mm512_broadcast_i32x4, _mm512_cvtps_epi32,
    _mm512_dpbusd_epi32, _mm512_loadu_si512, _mm512_mask_storeu_epi32, _mm512_maskz_loadu_ps,
    _mm512_mul_ps, _mm512_permutexvar_epi32, _mm512_set1_epi8, _mm512_set1_epi32, _mm512_set1_ps,
    _mm512_setr_epi32, _mm512_shuffle_epi8, _mm512_storeu_si512, _mm512_xor_si512,
};

use super::{LANES, Lanes};
use crate::kernels::vector::avx512::{Avx512, first_lanes};

#[derive(Clone, Copy)]
pub(in super::super) struct Vnni(__m512i);

/// Rounds a row to digits with VNNI.
///
/// # Safety
/// The contract of [`super::round`] holds, and the CPU has AVX-512 F, DQ, BW and
/// VNNI.
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vnni")]
pub(super) unsafe fn round(row: *const f32, width: usize, to: *mut u8) {
    // SAFETY: the caller vouches for all of it.
    unsafe { super::round_by::<Vnni>(row, width, to) }
}

// SAFETY: constructors demand AVX-512 with VNNI of their caller, and a value
// proves that a constructor was called; only memory that the caller vouches for
// is touched.
unsafe impl Lanes for Vnni {
    type Line = __m512i;
    type Floats = Avx512;

    #[inline(always)]
    unsafe fn splat(x: i32) -> Self {
        // SAFETY: the caller vouches for the instructions.
        Self(unsafe { _mm512_set1_epi32(x) })
    }

    #[inline(always)]
    unsafe fn line(from: *const u8) -> __m512i {
        // SAFETY: the caller vouches for the instructions and 64 bytes.
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn dot(self, line: __m512i, four: *const i8) -> Self {
        // SAFETY: `self` proves the instructions, the caller vouches for four bytes.
        unsafe {
            let four = _mm512_set1_epi32(four.cast::<i32>().read_unaligned());
            Self(_mm512_dpbusd_epi32(self.0, line, four))
        }
    }

    #[inline(always)]
    fn numbers(self) -> [i32; LANES] {
        let mut numbers = [0; LANES];
        // SAFETY: `self` proves the instructions, and there are 16 numbers.
        unsafe { _mm512_storeu_si512(numbers.as_mut_ptr().cast(), self.0) };
        numbers
    }

    #[inline(always)]
    unsafe fn split(self, from: *const f32, n: usize, inverse: f32, to: *mut u8) -> Self {
        // SAFETY: `self` proves the instructions; the caller vouches for `n` floats
        // and 48 bytes, which twelve lanes are.
        unsafe {
            let x = _mm512_maskz_loadu_ps(first_lanes(n), from);
            let steps = _mm512_cvtps_epi32(_mm512_mul_ps(x, _mm512_set1_ps(inverse)));
            // With 128 added, the digits are unsigned and are the bytes of the
            // sum.
            let more = _mm512_set1_epi32(0x80_8080);
            let digits = _mm512_xor_si512(_mm512_add_epi32(steps, more), more);
            // One group per 128 bits, and in it digit by digit.
            let order = _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, -1, -1, -1, -1);
            let groups = _mm512_shuffle_epi8(digits, _mm512_broadcast_i32x4(order));
            let twelve = _mm512_setr_epi32(0, 1, 2, 4, 5, 6, 8, 9, 10, 12, 13, 14, 0, 0, 0, 0);
            let packed = _mm512_permutexvar_epi32(twelve, groups);
            _mm512_mask_storeu_epi32(to.cast(), first_lanes(12), packed);
            Self(_mm512_dpbusd_epi32(self.0, _mm512_set1_epi8(1), groups))
        }
    }
}
