//! The inverse cosine transform of a block, bit for bit that of libjpeg-turbo's
//! vector code ("islow"), which Pillow's wheels run.
//!
//! The transform is the one of Loeffler, Ligtenberg and Moschytz in whole
//! numbers, once along columns and once along rows. Samples of undamaged files
//! do not depend on more than that. For coefficients out of range, the 16-bit
//! additions that wrap and the 16-bit results that saturate are also those of
//! the vector code.

use super::huffman::JpegBlock;

#[cfg(target_arch = "x86_64")]
mod avx2;

/// Bits of the constants behind the point.
const POINT: u32 = 13;

/// Returns a constant with its point.
#[expect(
    clippy::cast_possible_truncation,
    reason = "constants of at most 3.1, rounded as in libjpeg"
)]
const fn fixed(constant: f64) -> i32 {
    (constant * (1 << POINT) as f64 + 0.5) as i32
}

const C0_298: i32 = fixed(0.298_631_336);
const C0_390: i32 = fixed(0.390_180_644);
const C0_541: i32 = fixed(0.541_196_100);
const C0_765: i32 = fixed(0.765_366_865);
const C0_899: i32 = fixed(0.899_976_223);
const C1_175: i32 = fixed(1.175_875_602);
const C1_501: i32 = fixed(1.501_321_110);
const C1_847: i32 = fixed(1.847_759_065);
const C1_961: i32 = fixed(1.961_570_560);
const C2_053: i32 = fixed(2.053_119_869);
const C2_562: i32 = fixed(2.562_915_447);
const C3_072: i32 = fixed(3.072_711_026);

type Rows = [[i16; 8]; 8];

/// Transforms a block, and writes its samples to 8 rows that begin `stride`
/// bytes apart.
#[inline]
pub(super) fn transform(
    block: &JpegBlock,
    quantization: &JpegBlock,
    samples: &mut [u8],
    stride: usize,
) {
    let levels = samples_of(block, quantization);
    let (rows, _) = levels.as_chunks::<8>();
    for (row, samples) in rows.iter().zip(samples.chunks_mut(stride)) {
        let Some(samples) = samples.first_chunk_mut::<8>() else {
            return;
        };
        *samples = *row;
    }
}

/// Returns the samples of a block.
#[inline]
fn samples_of(block: &JpegBlock, quantization: &JpegBlock) -> [u8; 64] {
    #[cfg(target_arch = "x86_64")]
    if let Some(samples) = avx2::samples(block, quantization) {
        return samples;
    }
    portable(block, quantization)
}

/// Returns the samples of a block, with operations of every CPU.
fn portable(block: &JpegBlock, quantization: &JpegBlock) -> [u8; 64] {
    let (coefficients, _) = block.as_chunks::<8>();
    let (factors, _) = quantization.as_chunks::<8>();
    let mut rows: Rows = [[0; 8]; 8];
    for ((row, coefficients), factors) in rows.iter_mut().zip(coefficients).zip(factors) {
        for ((value, coefficient), factor) in row.iter_mut().zip(coefficients).zip(factors) {
            *value = coefficient.wrapping_mul(*factor);
        }
    }
    // Whether only the first row has coefficients.
    let flat = coefficients[1..].iter().flatten().all(|&value| value == 0);
    let columns = if flat {
        let mut first = rows[0];
        for value in &mut first {
            *value <<= 2;
        }
        [first; 8]
    } else {
        pass::<{ POINT - 2 }>(&rows)
    };
    let levels = transpose(&pass::<{ POINT + 5 }>(&transpose(&columns)));
    let mut samples = [0; 64];
    for (sample, level) in samples.iter_mut().zip(levels.as_flattened()) {
        *sample = to_sample(*level);
    }
    samples
}

/// Writes the samples of a block that has no coefficient but the first.
pub(super) fn transform_first(first: i16, factor: i16, samples: &mut [u8], stride: usize) {
    let value = i32::from(first.wrapping_mul(factor) << 2);
    let level = i16::try_from((value + (1 << 4)) >> 5).unwrap_or(0);
    for samples in samples.chunks_mut(stride).take(8) {
        if let Some(samples) = samples.first_chunk_mut::<8>() {
            samples.fill(to_sample(level));
        }
    }
}

/// Returns the sample of a level around zero.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "clamped to the range of a byte"
)]
#[inline]
fn to_sample(level: i16) -> u8 {
    (level.clamp(-128, 127) + 128) as u8
}

#[inline]
fn transpose(rows: &Rows) -> Rows {
    let mut columns = [[0; 8]; 8];
    for (at, column) in columns.iter_mut().enumerate() {
        for (value, row) in column.iter_mut().zip(rows) {
            *value = row[at];
        }
    }
    columns
}

/// Transforms the columns of rows, and drops `SHIFT` bits, rounded.
#[inline]
fn pass<const SHIFT: u32>([x0, x1, x2, x3, x4, x5, x6, x7]: &Rows) -> Rows {
    let wide = |value: &i16| i32::from(*value);
    // Each step goes over all columns, which the compiler turns into vectors.
    let mut even = [[0; 8]; 4];
    for at in 0..8 {
        let tmp2 = wide(&x2[at]) * C0_541 + wide(&x6[at]) * (C0_541 - C1_847);
        let tmp3 = wide(&x2[at]) * (C0_541 + C0_765) + wide(&x6[at]) * C0_541;
        let tmp0 = wide(&x0[at].wrapping_add(x4[at])) << POINT;
        let tmp1 = wide(&x0[at].wrapping_sub(x4[at])) << POINT;
        even[0][at] = tmp0 + tmp3;
        even[1][at] = tmp1 + tmp2;
        even[2][at] = tmp1 - tmp2;
        even[3][at] = tmp0 - tmp3;
    }
    let mut odd = [[0; 8]; 4];
    for at in 0..8 {
        let z3 = wide(&x7[at].wrapping_add(x3[at]));
        let z4 = wide(&x5[at].wrapping_add(x1[at]));
        let sum3 = z3 * (C1_175 - C1_961) + z4 * C1_175;
        let sum4 = z3 * C1_175 + z4 * (C1_175 - C0_390);
        let [x1, x3] = [wide(&x1[at]), wide(&x3[at])];
        let [x5, x7] = [wide(&x5[at]), wide(&x7[at])];
        odd[0][at] = x7 * -C0_899 + x1 * (C1_501 - C0_899) + sum4;
        odd[1][at] = x5 * -C2_562 + x3 * (C3_072 - C2_562) + sum3;
        odd[2][at] = x5 * (C2_053 - C2_562) + x3 * -C2_562 + sum4;
        odd[3][at] = x7 * (C0_298 - C0_899) + x1 * -C0_899 + sum3;
    }
    let mut result = [[0; 8]; 8];
    for step in 0..4 {
        for at in 0..8 {
            result[step][at] = drop_bits::<SHIFT>(even[step][at] + odd[step][at]);
            result[7 - step][at] = drop_bits::<SHIFT>(even[step][at] - odd[step][at]);
        }
    }
    result
}

/// Drops the lower bits of a number, rounded, and saturates the rest.
#[expect(
    clippy::cast_possible_truncation,
    reason = "clamped to the range of 16 bits"
)]
#[inline]
fn drop_bits<const SHIFT: u32>(number: i32) -> i16 {
    let rounded = (number + (1 << (SHIFT - 1))) >> SHIFT;
    rounded.clamp(i16::MIN.into(), i16::MAX.into()) as i16
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples(block: &JpegBlock, quantization: &JpegBlock) -> [u8; 64] {
        let mut samples = [0; 64];
        transform(block, quantization, &mut samples, 8);
        samples
    }

    /// Computes the transform by its definition.
    fn exact(block: &JpegBlock) -> [f64; 64] {
        let scale = |at: usize| if at == 0 { 0.5_f64.sqrt() } else { 1.0 };
        let wave = |x: usize, u: usize| {
            let phase = f64::from(u32::try_from((2 * x + 1) * u).unwrap());
            (phase * std::f64::consts::PI / 16.0).cos()
        };
        std::array::from_fn(|at| {
            let (x, y) = (at % 8, at / 8);
            let sum: f64 = (0..64)
                .map(|k| {
                    let (u, v) = (k % 8, k / 8);
                    scale(u) * scale(v) * f64::from(block[k]) * wave(x, u) * wave(y, v)
                })
                .sum();
            (sum / 4.0 + 128.0).clamp(0.0, 255.0)
        })
    }

    #[test]
    fn samples_are_those_of_the_definition_within_a_level() {
        let mut state = 1_u32;
        for _ in 0..200 {
            let block: JpegBlock = std::array::from_fn(|at| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                let span = i16::try_from(300 / (at + 1) + 3).unwrap();
                i16::try_from(state >> 20).unwrap() % span - span / 2
            });
            for (ours, exact) in samples(&block, &[1; 64]).iter().zip(exact(&block)) {
                assert!((f64::from(*ours) - exact).abs() < 1.0, "{ours} for {exact}");
            }
        }
    }

    /// Compares over the whole range of coefficients, in which sums wrap and
    /// results saturate.
    #[test]
    #[cfg(target_arch = "x86_64")]
    fn vectors_compute_what_the_portable_code_does() {
        let mut state = 1_u32;
        let mut next = || {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            i16::from_be_bytes([state.to_be_bytes()[0], state.to_be_bytes()[1]])
        };
        for turn in 0..20_000 {
            let (shift, last) = (turn % 16, turn / 16 % 64);
            let block: JpegBlock =
                std::array::from_fn(|at| if at <= last { next() >> shift } else { 0 });
            let factors: JpegBlock = std::array::from_fn(|_| next() >> (turn % 13));
            let Some(ours) = avx2::samples(&block, &factors) else {
                return;
            };
            assert_eq!(ours, portable(&block, &factors), "{block:?} {factors:?}");
        }
    }

    #[test]
    fn a_block_of_one_coefficient_is_flat() {
        for first in (i16::MIN..=i16::MAX).step_by(7) {
            for factor in [1, 16, 255] {
                let mut block = [0; 64];
                block[0] = first;
                let mut quick = [0; 64];
                transform_first(first, factor, &mut quick, 8);
                assert_eq!(samples(&block, &[factor; 64]), quick, "{first} x {factor}");
            }
        }
    }
}
