//! The transform with AVX2. Products of 16-bit pairs are added in 32 bits, so
//! nothing is rounded before the portable code rounds it.

#![expect(
    unsafe_code,
    reason = "calls code for a CPU feature that is looked for"
)]

use std::arch::x86_64::{
    __m128i, __m256i, _mm_add_epi16, _mm_mullo_epi16, _mm_or_si128, _mm_packs_epi16, _mm_set1_epi8,
    _mm_slli_epi16, _mm_sub_epi16, _mm_testz_si128, _mm_unpackhi_epi16, _mm_unpackhi_epi32,
    _mm_unpackhi_epi64, _mm_unpacklo_epi16, _mm_unpacklo_epi32, _mm_unpacklo_epi64, _mm_xor_si128,
    _mm256_add_epi32, _mm256_castsi256_si128, _mm256_cvtepi16_epi32, _mm256_extracti128_si256,
    _mm256_madd_epi16, _mm256_packs_epi32, _mm256_permute4x64_epi64, _mm256_set_m128i,
    _mm256_set1_epi32, _mm256_slli_epi32, _mm256_srai_epi32, _mm256_sub_epi32,
};

use super::super::huffman::JpegBlock;
use super::{
    C0_298, C0_390, C0_541, C0_765, C0_899, C1_175, C1_501, C1_847, C1_961, C2_053, C2_562, C3_072,
    POINT,
};

const PASS_1: i32 = POINT.cast_signed() - 2;
const PASS_2: i32 = POINT.cast_signed() + 5;

/// Rows of eight numbers.
type Rows = [__m128i; 8];

/// Returns the samples of a block, or `None` without AVX2.
#[inline]
pub(super) fn samples(block: &JpegBlock, quantization: &JpegBlock) -> Option<[u8; 64]> {
    // SAFETY: the CPU has AVX2.
    is_x86_feature_detected!("avx2").then(|| unsafe { transform(block, quantization) })
}

#[target_feature(enable = "avx2")]
fn transform(block: &JpegBlock, quantization: &JpegBlock) -> [u8; 64] {
    let coefficients: Rows = bytemuck::cast(*block);
    let factors: Rows = bytemuck::cast(*quantization);
    let mut rows = coefficients;
    for (row, factors) in rows.iter_mut().zip(factors) {
        *row = _mm_mullo_epi16(*row, factors);
    }
    let [_, below @ ..] = coefficients;
    let mut any = below[0];
    for row in below {
        any = _mm_or_si128(any, row);
    }
    let columns = if _mm_testz_si128(any, any) == 1 {
        [_mm_slli_epi16::<2>(rows[0]); 8]
    } else {
        pass::<PASS_1>(rows)
    };
    let levels = transpose(pass::<PASS_2>(transpose(columns)));
    let middle = _mm_set1_epi8(i8::MIN);
    let mut samples = [middle; 4];
    for (samples, pair) in samples.iter_mut().zip(levels.as_chunks::<2>().0) {
        *samples = _mm_xor_si128(_mm_packs_epi16(pair[0], pair[1]), middle);
    }
    bytemuck::cast(samples)
}

#[target_feature(enable = "avx2")]
#[inline]
fn transpose(rows: Rows) -> Rows {
    let [x0, x1, x2, x3, x4, x5, x6, x7] = rows;
    let low = [
        _mm_unpacklo_epi16(x0, x1),
        _mm_unpacklo_epi16(x2, x3),
        _mm_unpacklo_epi16(x4, x5),
        _mm_unpacklo_epi16(x6, x7),
    ];
    let high = [
        _mm_unpackhi_epi16(x0, x1),
        _mm_unpackhi_epi16(x2, x3),
        _mm_unpackhi_epi16(x4, x5),
        _mm_unpackhi_epi16(x6, x7),
    ];
    let fours = |[a, b, c, d]: [__m128i; 4]| {
        [
            (_mm_unpacklo_epi32(a, b), _mm_unpacklo_epi32(c, d)),
            (_mm_unpackhi_epi32(a, b), _mm_unpackhi_epi32(c, d)),
        ]
    };
    let halves = fours(low).into_iter().chain(fours(high));
    let mut columns = rows;
    for (pair, (left, right)) in columns.as_chunks_mut::<2>().0.iter_mut().zip(halves) {
        *pair = [
            _mm_unpacklo_epi64(left, right),
            _mm_unpackhi_epi64(left, right),
        ];
    }
    columns
}

/// Returns two rows as pairs, column by column.
#[target_feature(enable = "avx2")]
#[inline]
fn pairs(first: __m128i, second: __m128i) -> __m256i {
    _mm256_set_m128i(
        _mm_unpackhi_epi16(first, second),
        _mm_unpacklo_epi16(first, second),
    )
}

/// Returns the sum of the pairs, each number times its constant.
#[target_feature(enable = "avx2")]
#[inline]
fn products(pairs: __m256i, first: i32, second: i32) -> __m256i {
    let both = (second << 16) | (first & 0xffff);
    _mm256_madd_epi16(pairs, _mm256_set1_epi32(both))
}

/// Transforms the columns, and drops `SHIFT` bits, rounded.
#[target_feature(enable = "avx2")]
#[inline]
fn pass<const SHIFT: i32>([x0, x1, x2, x3, x4, x5, x6, x7]: Rows) -> Rows {
    const POINT_BITS: i32 = POINT.cast_signed();
    let half = _mm256_set1_epi32(1 << (SHIFT - 1));
    let x26 = pairs(x2, x6);
    let tmp2 = products(x26, C0_541, C0_541 - C1_847);
    let tmp3 = products(x26, C0_541 + C0_765, C0_541);
    let wide = |row| _mm256_slli_epi32::<POINT_BITS>(_mm256_cvtepi16_epi32(row));
    let tmp0 = _mm256_add_epi32(wide(_mm_add_epi16(x0, x4)), half);
    let tmp1 = _mm256_add_epi32(wide(_mm_sub_epi16(x0, x4)), half);
    let even = [
        _mm256_add_epi32(tmp0, tmp3),
        _mm256_add_epi32(tmp1, tmp2),
        _mm256_sub_epi32(tmp1, tmp2),
        _mm256_sub_epi32(tmp0, tmp3),
    ];
    let z34 = pairs(_mm_add_epi16(x7, x3), _mm_add_epi16(x5, x1));
    let sum3 = products(z34, C1_175 - C1_961, C1_175);
    let sum4 = products(z34, C1_175, C1_175 - C0_390);
    let (x71, x53) = (pairs(x7, x1), pairs(x5, x3));
    let odd = [
        _mm256_add_epi32(products(x71, -C0_899, C1_501 - C0_899), sum4),
        _mm256_add_epi32(products(x53, -C2_562, C3_072 - C2_562), sum3),
        _mm256_add_epi32(products(x53, C2_053 - C2_562, -C2_562), sum4),
        _mm256_add_epi32(products(x71, C0_298 - C0_899, -C0_899), sum3),
    ];
    let mut rows = [x0; 8];
    for step in 0..4 {
        let sum = _mm256_srai_epi32::<SHIFT>(_mm256_add_epi32(even[step], odd[step]));
        let difference = _mm256_srai_epi32::<SHIFT>(_mm256_sub_epi32(even[step], odd[step]));
        let both = _mm256_permute4x64_epi64::<0b11_01_10_00>(_mm256_packs_epi32(sum, difference));
        rows[step] = _mm256_castsi256_si128(both);
        rows[7 - step] = _mm256_extracti128_si256::<1>(both);
    }
    rows
}
