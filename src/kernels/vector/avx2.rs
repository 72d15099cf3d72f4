//! Vectors of AVX2 and FMA: 8 lanes.
#![expect(
    unsafe_code,
    reason = "vector intrinsics and raw pointers; see the contract of `Vector`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use std::arch::x86_64::{
    __m256, __m256i, _CMP_LT_OQ, _MM_HINT_T0, _MM_HINT_T1, _mm_loadl_epi64, _mm_loadu_si128,
    _mm_prefetch, _mm256_add_epi32, _mm256_add_ps, _mm256_and_si256, _mm256_blendv_ps,
    _mm256_castps_si256, _mm256_castsi128_si256, _mm256_castsi256_ps, _mm256_cmp_ps,
    _mm256_cmpgt_epi32, _mm256_cvtepi8_epi32, _mm256_cvtepi32_ps, _mm256_cvtepu16_epi32,
    _mm256_div_ps, _mm256_fmadd_ps, _mm256_inserti128_si256, _mm256_loadu_ps, _mm256_maskload_ps,
    _mm256_maskstore_ps, _mm256_max_ps, _mm256_mul_ps, _mm256_permute2f128_ps, _mm256_set1_epi32,
    _mm256_set1_ps, _mm256_setr_epi8, _mm256_setr_epi32, _mm256_setzero_ps, _mm256_shuffle_epi8,
    _mm256_shuffle_ps, _mm256_slli_epi32, _mm256_storeu_ps, _mm256_sub_ps, _mm256_unpackhi_ps,
    _mm256_unpacklo_ps,
};

use super::{EXP2, EXP2_MIN, ROUND, Vector};

#[derive(Clone, Copy)]
pub(crate) struct Avx2(__m256);

/// Returns a mask with all ones in the first `len` lanes, and zeros in the
/// others.
///
/// # Safety
/// The CPU has AVX2.
#[inline(always)]
unsafe fn first_lanes(len: usize) -> __m256i {
    debug_assert!(len <= 8);
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_possible_wrap,
        reason = "at most eight"
    )]
    let len = len as i32;
    // SAFETY: the caller vouches for the instructions.
    unsafe {
        let lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        _mm256_cmpgt_epi32(_mm256_set1_epi32(len), lanes)
    }
}

impl Avx2 {
    /// Converts whole numbers.
    ///
    /// # Safety
    /// The contract of [`Vector::splat`] holds.
    #[inline(always)]
    pub(crate) unsafe fn from_i32(numbers: __m256i) -> Self {
        // SAFETY: the caller vouches for the instructions.
        Self(unsafe { _mm256_cvtepi32_ps(numbers) })
    }
}

// SAFETY: constructors demand AVX2 and FMA of their caller, and a value proves
// that a constructor was called; loads and stores touch exactly the floats
// named.
unsafe impl Vector for Avx2 {
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller vouches for the instructions.
        Self(unsafe { _mm256_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for the instructions and 8 floats.
        Self(unsafe { _mm256_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, len: usize) -> Self {
        // SAFETY: the caller vouches for the instructions; masked lanes are not read.
        Self(unsafe { _mm256_maskload_ps(from, first_lanes(len)) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for the instructions and 8 numbers.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller vouches for the instructions and 8 numbers.
        unsafe {
            let wide = _mm256_cvtepi8_epi32(_mm_loadl_epi64(from.cast()));
            Self(_mm256_cvtepi32_ps(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_i24(from: *const u8) -> Self {
        // SAFETY: the caller vouches for the instructions and 24 bytes.
        unsafe {
            // The second half begins after 12 bytes; its load takes the last 16
            // bytes.
            let low = _mm256_castsi128_si256(_mm_loadu_si128(from.cast()));
            let high = _mm_loadu_si128(from.add(8).cast());
            let bytes = _mm256_inserti128_si256::<1>(low, high);
            let upper = _mm256_setr_epi8(
                -1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, //
                -1, 4, 5, 6, -1, 7, 8, 9, -1, 10, 11, 12, -1, 13, 14, 15,
            );
            Self(_mm256_cvtepi32_ps(_mm256_shuffle_epi8(bytes, upper)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: `self` proves the instructions, the caller vouches for 8 floats.
        unsafe { _mm256_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, len: usize) {
        // SAFETY: `self` proves the instructions; masked lanes are not written.
        unsafe { _mm256_maskstore_ps(to, first_lanes(len), self.0) }
    }

    #[inline(always)]
    fn prefetch<T>(at: *const T) {
        // SAFETY: a hint, without effect where nothing is mapped.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(at.cast()) }
    }

    #[inline(always)]
    fn prefetch_far<T>(at: *const T) {
        // SAFETY: as above.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(at.cast()) }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm256_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm256_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm256_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm256_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm256_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm256_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn exp2(self) -> Self {
        // SAFETY: `self` proves the instructions.
        unsafe {
            // The bound is the first argument, so that a NaN lane stays a NaN.
            let x = _mm256_max_ps(_mm256_set1_ps(EXP2_MIN), self.0);
            let rounded = _mm256_add_ps(x, _mm256_set1_ps(ROUND));
            let r = _mm256_sub_ps(x, _mm256_sub_ps(rounded, _mm256_set1_ps(ROUND)));
            let mut p = _mm256_set1_ps(EXP2[6]);
            for c in EXP2[..6].iter().rev() {
                p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(*c));
            }
            // The exponent of a float is made from the integer part; -127 makes
            // zero.
            let biased = _mm256_add_epi32(_mm256_castps_si256(rounded), _mm256_set1_epi32(127));
            let power = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(biased));
            Self(_mm256_mul_ps(p, power))
        }
    }

    #[inline(always)]
    fn mask_before(self, first: usize) -> Self {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let masked = _mm256_set1_ps(f32::NEG_INFINITY);
            let mask = _mm256_castsi256_ps(first_lanes(first));
            Self(_mm256_blendv_ps(self.0, masked, mask))
        }
    }

    #[inline(always)]
    fn mask_below(self, least: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let masked = _mm256_set1_ps(f32::NEG_INFINITY);
            let below = _mm256_cmp_ps::<_CMP_LT_OQ>(self.0, least.0);
            Self(_mm256_blendv_ps(self.0, masked, below))
        }
    }

    #[inline(always)]
    fn bf16_pairs(self) -> [Self; 2] {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let bits = _mm256_castps_si256(self.0);
            let upper = _mm256_set1_epi32(0xFFFF_0000_u32.cast_signed());
            [
                Self(_mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))),
                Self(_mm256_castsi256_ps(_mm256_and_si256(bits, upper))),
            ]
        }
    }

    #[inline(always)]
    unsafe fn transpose(
        from: *const f32,
        from_stride: usize,
        to: *mut f32,
        to_stride: usize,
        rows: usize,
        cols: usize,
    ) {
        // SAFETY: the caller vouches for the instructions; rows past `rows` are
        // not read, columns past `cols` neither read nor written.
        unsafe {
            let mut r = [_mm256_setzero_ps(); 8];
            for (row, r) in r.iter_mut().enumerate() {
                if row < rows {
                    *r = Self::load_partial(from.add(row * from_stride), cols).0;
                }
            }
            let mut t = r;
            for i in (0..8).step_by(2) {
                t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
                t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
            }
            for i in (0..8).step_by(4) {
                r[i] = _mm256_shuffle_ps::<0x44>(t[i], t[i + 2]);
                r[i + 1] = _mm256_shuffle_ps::<0xEE>(t[i], t[i + 2]);
                r[i + 2] = _mm256_shuffle_ps::<0x44>(t[i + 1], t[i + 3]);
                r[i + 3] = _mm256_shuffle_ps::<0xEE>(t[i + 1], t[i + 3]);
            }
            for i in 0..4 {
                t[i] = _mm256_permute2f128_ps::<0x20>(r[i], r[i + 4]);
                t[i + 4] = _mm256_permute2f128_ps::<0x31>(r[i], r[i + 4]);
            }
            for (col, t) in t.iter().enumerate() {
                if col < cols {
                    Self(*t).store_partial(to.add(col * to_stride), rows);
                }
            }
        }
    }
}
