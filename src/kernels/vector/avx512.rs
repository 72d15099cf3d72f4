//! Vectors of AVX-512 (F, DQ and BW): 16 lanes.
#![expect(
    unsafe_code,
    reason = "vector intrinsics and raw pointers; see the contract of `Vector`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use std::arch::x86_64::{
    __m512, __m512bh, __m512i, _CMP_LT_OQ, _MM_HINT_T0, _MM_HINT_T1, _mm_loadu_si128, _mm_prefetch,
    _mm_setr_epi8, _mm256_loadu_si256, _mm512_add_ps, _mm512_and_si512, _mm512_broadcast_i32x4,
    _mm512_castps_si512, _mm512_castsi512_ps, _mm512_cmp_ps_mask, _mm512_cvtepi8_epi32,
    _mm512_cvtepi32_ps, _mm512_cvtepu16_epi32, _mm512_div_ps, _mm512_dpbf16_ps, _mm512_fmadd_ps,
    _mm512_inserti32x4, _mm512_loadu_ps, _mm512_mask_mov_ps, _mm512_mask_storeu_ps,
    _mm512_maskz_loadu_ps, _mm512_max_ps, _mm512_mul_ps, _mm512_permutexvar_epi32,
    _mm512_reduce_ps, _mm512_scalef_ps, _mm512_set1_epi32, _mm512_set1_ps, _mm512_setr_epi32,
    _mm512_setzero_ps, _mm512_shuffle_epi8, _mm512_shuffle_f32x4, _mm512_shuffle_ps,
    _mm512_slli_epi32, _mm512_storeu_ps, _mm512_sub_ps, _mm512_unpackhi_ps, _mm512_unpacklo_ps,
    _mm512_zextsi256_si512,
};

use super::Vector;

/// Coefficients of a minimax polynomial for `2^r` on [0, 1], constant term
/// first. Largest relative error 8e-8 with rounding.
#[expect(clippy::approx_constant, reason = "a coefficient near ln 2, not it")]
const EXP2: [f32; 7] = [
    1.0,
    0.693_147,
    0.240_229_83,
    0.055_483_34,
    0.009_678_841,
    0.001_243_968_7,
    0.000_217_022_55,
];

#[derive(Clone, Copy)]
pub(crate) struct Avx512(__m512);

/// Returns the mask of the first `len` lanes.
#[inline(always)]
pub(crate) fn first_lanes(len: usize) -> u16 {
    debug_assert!(len <= 16);
    #[expect(clippy::cast_possible_truncation, reason = "sixteen bits, as shifted")]
    let mask = ((1_u32 << len) - 1) as u16;
    mask
}

impl Avx512 {
    /// Converts whole numbers.
    ///
    /// # Safety
    /// The contract of [`Vector::splat`] holds.
    #[inline(always)]
    pub(crate) unsafe fn from_i32(numbers: __m512i) -> Self {
        // SAFETY: the caller vouches for the instructions.
        Self(unsafe { _mm512_cvtepi32_ps(numbers) })
    }

    /// Adds to each lane the products of two numbers in bfloat16 with two others.
    ///
    /// # Safety
    /// The CPU has AVX-512 BF16.
    #[inline(always)]
    pub(crate) unsafe fn add_bf16_products(self, left: __m512bh, right: __m512bh) -> Self {
        // SAFETY: the caller vouches for the instructions.
        Self(unsafe { _mm512_dpbf16_ps(self.0, left, right) })
    }
}

// SAFETY: constructors demand AVX-512 of their caller, and a value proves that
// a constructor was called; loads and stores touch exactly the floats named.
unsafe impl Vector for Avx512 {
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        // SAFETY: the caller vouches for the instructions.
        Self(unsafe { _mm512_set1_ps(x) })
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for the instructions and 16 floats.
        Self(unsafe { _mm512_loadu_ps(from) })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, len: usize) -> Self {
        // SAFETY: the caller vouches for the instructions; masked lanes are not read.
        Self(unsafe { _mm512_maskz_loadu_ps(first_lanes(len), from) })
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for the instructions and 16 numbers.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits)))
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller vouches for the instructions and 16 numbers.
        unsafe {
            let wide = _mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()));
            Self(_mm512_cvtepi32_ps(wide))
        }
    }

    #[inline(always)]
    unsafe fn load_i24(from: *const u8) -> Self {
        // SAFETY: the caller vouches for the instructions and 48 bytes.
        unsafe {
            // Loaded in two parts, since a mask would be made anew for each
            // vector.
            let bytes = _mm512_zextsi256_si512(_mm256_loadu_si256(from.cast()));
            let last = _mm_loadu_si128(from.add(32).cast());
            let bytes = _mm512_inserti32x4::<2>(bytes, last);
            // Four numbers go to each 128 bits, and in these three bytes one
            // place up each.
            let quarters = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
            let quarters = _mm512_permutexvar_epi32(quarters, bytes);
            let upper = _mm_setr_epi8(-1, 0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11);
            let upper = _mm512_broadcast_i32x4(upper);
            Self(_mm512_cvtepi32_ps(_mm512_shuffle_epi8(quarters, upper)))
        }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: `self` proves the instructions, the caller vouches for 16 floats.
        unsafe { _mm512_storeu_ps(to, self.0) }
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, len: usize) {
        // SAFETY: `self` proves the instructions; masked lanes are not written.
        unsafe { _mm512_mask_storeu_ps(to, first_lanes(len), self.0) }
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
        Self(unsafe { _mm512_add_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm512_sub_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm512_mul_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm512_div_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm512_fmadd_ps(self.0, factor.0, addend.0) })
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        Self(unsafe { _mm512_max_ps(self.0, other.0) })
    }

    #[inline(always)]
    fn exp2(self) -> Self {
        // SAFETY: `self` proves the instructions.
        unsafe {
            // The part above the next lower integer; zero for minus infinity.
            // `scalef` takes the integer itself, and any exponent.
            let r = _mm512_reduce_ps::<0x09>(self.0);
            let mut p = _mm512_set1_ps(EXP2[6]);
            for c in EXP2[..6].iter().rev() {
                p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(*c));
            }
            Self(_mm512_scalef_ps(p, self.0))
        }
    }

    #[inline(always)]
    fn mask_before(self, first: usize) -> Self {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let masked = _mm512_set1_ps(f32::NEG_INFINITY);
            Self(_mm512_mask_mov_ps(self.0, first_lanes(first), masked))
        }
    }

    #[inline(always)]
    fn mask_below(self, least: Self) -> Self {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let masked = _mm512_set1_ps(f32::NEG_INFINITY);
            let below = _mm512_cmp_ps_mask::<_CMP_LT_OQ>(self.0, least.0);
            Self(_mm512_mask_mov_ps(self.0, below, masked))
        }
    }

    #[inline(always)]
    fn bf16_pairs(self) -> [Self; 2] {
        // SAFETY: `self` proves the instructions.
        unsafe {
            let bits = _mm512_castps_si512(self.0);
            let upper = _mm512_set1_epi32(0xFFFF_0000_u32.cast_signed());
            [
                Self(_mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))),
                Self(_mm512_castsi512_ps(_mm512_and_si512(bits, upper))),
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
            let mut r = [_mm512_setzero_ps(); 16];
            for (row, r) in r.iter_mut().enumerate() {
                if row < rows {
                    *r = Self::load_partial(from.add(row * from_stride), cols).0;
                }
            }
            // Pairs of rows interleaved, then quads, within each 128-bit lane...
            let mut t = r;
            for i in (0..16).step_by(2) {
                t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
                t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
            }
            for i in (0..16).step_by(4) {
                r[i] = _mm512_shuffle_ps::<0x44>(t[i], t[i + 2]);
                r[i + 1] = _mm512_shuffle_ps::<0xEE>(t[i], t[i + 2]);
                r[i + 2] = _mm512_shuffle_ps::<0x44>(t[i + 1], t[i + 3]);
                r[i + 3] = _mm512_shuffle_ps::<0xEE>(t[i + 1], t[i + 3]);
            }
            // ... then the 128-bit lanes themselves.
            for i in 0..4 {
                t[i] = _mm512_shuffle_f32x4::<0x88>(r[i], r[i + 4]);
                t[i + 4] = _mm512_shuffle_f32x4::<0xDD>(r[i], r[i + 4]);
                t[i + 8] = _mm512_shuffle_f32x4::<0x88>(r[i + 8], r[i + 12]);
                t[i + 12] = _mm512_shuffle_f32x4::<0xDD>(r[i + 8], r[i + 12]);
            }
            for i in 0..4 {
                r[i] = _mm512_shuffle_f32x4::<0x88>(t[i], t[i + 8]);
                r[i + 4] = _mm512_shuffle_f32x4::<0x88>(t[i + 4], t[i + 12]);
                r[i + 8] = _mm512_shuffle_f32x4::<0xDD>(t[i], t[i + 8]);
                r[i + 12] = _mm512_shuffle_f32x4::<0xDD>(t[i + 4], t[i + 12]);
            }
            for (col, r) in r.iter().enumerate() {
                if col < cols {
                    Self(*r).store_partial(to.add(col * to_stride), rows);
                }
            }
        }
    }
}
