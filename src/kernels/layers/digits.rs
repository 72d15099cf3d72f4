//! Rounds rows to whole numbers (quantization), for products with weights of
//! 8 bits.
//!
//! CPUs with VNNI multiply bytes, four to a lane, and add the products up
//! exactly. A row's numbers need more bits than a byte has, so they are rounded
//! to 24 bits under a factor of the row's own, and kept as three digits of 8
//! bits each: a product is three sums of bytes, combined at the end. Per row,
//! four inputs and 16 columns take three instructions, where floats take four
//! and a part of the work that unpacks the weights.
//!
//! All numbers of a row are rounded to steps of the row's largest number
//! divided by 8 million. If the largest number has weights of zero and is R
//! times larger than the others, the results are some 3.5e-8 R off beside those
//! of the others, which is as much as rounding weights to 8 bits costs at an R
//! of 200,000. `imagegpt compile` tests every checkpoint, and refuses a
//! checkpoint whose results are too far off.
#![expect(
    unsafe_code,
    reason = "reads and writes vectors through raw pointers: the inner loop is the whole cost of a step"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use crate::kernels::attention::Kernel;
use crate::kernels::vector::{Portable, Vector, magnitude};

#[cfg(target_arch = "x86_64")]
pub(super) use self::avx512::Vnni;

#[cfg(target_arch = "x86_64")]
mod avx512;

/// Number of digits of a number. Digits are -128 to 127, the lowest first.
pub(super) const DIGITS: usize = 3;

/// Number of inputs whose products are added up together.
pub(super) const GROUP: usize = 4;

/// Number of sums in a vector, each of a column.
pub(super) const LANES: usize = 16;

/// Bytes of a group of inputs' weights for all lanes.
pub(super) const LINE: usize = GROUP * LANES;

/// Bytes of a group's digits: all lowest digits, then all second, then all
/// highest.
pub(super) const GROUP_BYTES: usize = DIGITS * GROUP;

/// Most inputs of a product, so that no sum overflows: a sum of 255 times 128
/// per input, and as much again for the number with which the sum begins.
pub(super) const INPUTS_MAX: usize = 1 << 15;

/// The largest whole number: a little less than all digits at their largest,
/// because the factor and its inverse are rounded, so that a number may come
/// out larger.
const LARGEST: f32 = 127.0 * 65_536.0;

/// Smallest largest number of a row: rows of smaller numbers are rounded as if
/// they had this one, so that no factor leaves the normal range: 2^-100.
const SMALLEST: f32 = f32::from_bits((127 - 100) << 23);

/// Header in front of a row's digits.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct RowHeader {
    /// Factor with which the row's whole numbers are multiplied.
    pub(super) factor: f32,
    /// Number with which each digit's sum begins. Products are of a signed byte
    /// and an unsigned byte, so weights have 128 too much; this number takes
    /// the excess away.
    pub(super) begin: [i32; DIGITS],
}

/// Bytes from a row's beginning to its first group: one line.
pub(super) const HEAD_BYTES: usize = 64;

/// Rows of digits, one after the other.
#[derive(Clone, Copy, Debug)]
pub(super) struct DigitRows {
    pub(super) start: *mut u8,
    /// Bytes from a row to the next row.
    pub(super) stride: usize,
}

impl DigitRows {
    /// Returns the bytes that a row of up to `width` numbers takes: whole
    /// vectors, and an odd number of lines, so that rows do not lie a power of
    /// two apart.
    pub(super) fn stride(width: usize) -> usize {
        let bytes = HEAD_BYTES + width.next_multiple_of(LANES) * DIGITS;
        (bytes.div_ceil(64) | 1) * 64
    }

    pub(super) fn row(self, idx: usize) -> *mut u8 {
        self.start.wrapping_add(idx * self.stride)
    }

    /// Reads the header of a row.
    ///
    /// # Safety
    /// Row `idx` has been rounded.
    #[inline(always)]
    pub(super) unsafe fn head(self, idx: usize) -> RowHeader {
        // SAFETY: the caller vouches for the row.
        unsafe { self.row(idx).cast::<RowHeader>().read_unaligned() }
    }
}

/// Returns true if a kernel multiplies bytes.
pub(super) fn are_available(kernel: Kernel) -> bool {
    match kernel {
        // Not faster than floats; for tests, and for Miri.
        Kernel::Portable => true,
        #[cfg(target_arch = "x86_64")]
        Kernel::Avx512 => kernel.is_available() && is_x86_feature_detected!("avx512vnni"),
        _ => false,
    }
}

/// Sixteen sums of products of bytes.
///
/// # Safety
/// A value may exist only where the CPU has the instructions that its methods
/// use: constructors demand that of their caller. Pointers are to as many bytes
/// or floats as each method names.
pub(super) unsafe trait Lanes: Copy {
    /// Weights of a group of inputs, for each lane.
    type Line: Copy;
    /// Vectors of floats with the same instructions.
    type Floats: Vector;

    /// # Safety
    /// The CPU has the instructions.
    unsafe fn splat(x: i32) -> Self;

    /// # Safety
    /// The contract of [`Lanes::splat`] holds, and 64 bytes at `from` are
    /// readable.
    unsafe fn line(from: *const u8) -> Self::Line;

    /// Adds to each lane the products of its weights, which are unsigned, with
    /// four signed bytes.
    ///
    /// # Safety
    /// Four bytes are readable.
    unsafe fn dot(self, line: Self::Line, four: *const i8) -> Self;

    fn numbers(self) -> [i32; LANES];

    /// Writes the digits of up to 16 numbers times `inverse`, and of zeros up
    /// to 16. To lane `4 i + d` of `self`, the sum of digits `d` of group `i`
    /// is added.
    ///
    /// # Safety
    /// `n <= 16` floats are readable and [`GROUP_BYTES`] for each group of 16
    /// numbers writable.
    unsafe fn split(self, from: *const f32, n: usize, inverse: f32, to: *mut u8) -> Self;
}

/// Sums in plain code, with the instructions that the compiler chooses.
#[derive(Clone, Copy)]
pub(super) struct Plain([i32; LANES]);

// SAFETY: no special instructions are needed, and exactly the named memory is
// touched.
unsafe impl Lanes for Plain {
    type Line = [[u8; GROUP]; LANES];
    type Floats = Portable;

    unsafe fn splat(x: i32) -> Self {
        Self([x; LANES])
    }

    unsafe fn line(from: *const u8) -> Self::Line {
        // SAFETY: the caller vouches for 64 bytes.
        unsafe { from.cast::<Self::Line>().read() }
    }

    unsafe fn dot(mut self, line: Self::Line, four: *const i8) -> Self {
        // SAFETY: the caller vouches for four bytes.
        let four = unsafe { four.cast::<[i8; GROUP]>().read() };
        for (sum, weights) in self.0.iter_mut().zip(line) {
            let products = weights.iter().zip(four);
            *sum += products
                .map(|(weight, digit)| i32::from(*weight) * i32::from(digit))
                .sum::<i32>();
        }
        self
    }

    fn numbers(self) -> [i32; LANES] {
        self.0
    }

    unsafe fn split(mut self, from: *const f32, n: usize, inverse: f32, to: *mut u8) -> Self {
        for i in 0..LANES {
            // SAFETY: the caller vouches for `n` floats.
            let x = if i < n { unsafe { *from.add(i) } } else { 0.0 };
            #[expect(clippy::cast_possible_truncation, reason = "24 bits, unless no number")]
            let steps = (x * inverse).round_ties_even() as i32;
            let (group, at) = (i / GROUP, i % GROUP);
            for (d, digit) in digits(steps).into_iter().enumerate() {
                let place = group * GROUP_BYTES + d * GROUP + at;
                // SAFETY: the caller vouches for all groups.
                unsafe { to.add(place).cast::<i8>().write(digit) }
                self.0[group * GROUP + d] += i32::from(digit);
            }
        }
        self
    }
}

/// Returns a whole number's digits, of which each next digit counts 256 times
/// as much.
fn digits(steps: i32) -> [i8; DIGITS] {
    // With 128 added, the digits are unsigned and are the bytes of the sum.
    let [a, b, c, _] = (steps.wrapping_add(0x80_8080) ^ 0x80_8080).to_le_bytes();
    [a.cast_signed(), b.cast_signed(), c.cast_signed()]
}

/// Rounds a row to digits.
///
/// # Safety
/// Digits are available; `width` floats of the row are readable, and at `to` the
/// bytes of [`DigitRows::stride`] writable.
pub(super) unsafe fn round(kernel: Kernel, row: *const f32, width: usize, to: *mut u8) {
    // SAFETY: the caller vouches for all of it.
    unsafe {
        match kernel {
            #[cfg(target_arch = "x86_64")]
            Kernel::Avx512 => avx512::round(row, width, to),
            _ => round_by::<Plain>(row, width, to),
        }
    }
}

/// Rounds a row with the instructions of `L`.
///
/// # Safety
/// The contract of [`round`] holds, and the CPU has the instructions of `L`.
#[inline(always)]
unsafe fn round_by<L: Lanes>(row: *const f32, width: usize, to: *mut u8) {
    // SAFETY: the caller vouches for the row, the bytes and the instructions.
    unsafe {
        let numbers = std::slice::from_raw_parts(row, width);
        let largest = numbers.iter().copied().map(magnitude).fold(0, u32::max);
        let factor = factor_of(f32::from_bits(largest));
        let inverse = 1.0 / factor;
        let mut sums = L::splat(0);
        for at in (0..width).step_by(LANES) {
            let to = to.add(HEAD_BYTES + at * DIGITS);
            sums = sums.split(row.add(at), LANES.min(width - at), inverse, to);
        }
        let sums = sums.numbers();
        let mut begin = [0; DIGITS];
        for (d, begin) in begin.iter_mut().enumerate() {
            *begin = -128 * sums.iter().skip(d).step_by(GROUP).sum::<i32>();
        }
        to.cast::<RowHeader>()
            .write_unaligned(RowHeader { factor, begin });
    }
}

/// Returns the factor of a row's whole numbers, where `largest` is the row's
/// largest number; NaN if that is not finite, so that the whole row is NaN.
fn factor_of(largest: f32) -> f32 {
    if largest.is_finite() {
        largest.max(SMALLEST) / LARGEST
    } else {
        f32::NAN
    }
}

/// Combines the sums of digits, still without the row's factor.
#[inline(always)]
pub(super) fn put_together([low, middle, high]: [[i32; LANES]; DIGITS]) -> [f32; LANES] {
    let mut found = [0.0; LANES];
    for (i, found) in found.iter_mut().enumerate() {
        #[expect(clippy::cast_precision_loss, reason = "sums are rounded as floats are")]
        let [low, middle, high] = [low[i] as f32, middle[i] as f32, high[i] as f32];
        *found = high * 65_536.0 + (middle * 256.0 + low);
    }
    found
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn kernels() -> impl Iterator<Item = Kernel> {
        Kernel::ALL
            .into_iter()
            .filter(|kernel| are_available(*kernel))
    }

    /// Returns a rounded row: its numbers, read back, and the numbers with
    /// which sums begin.
    fn rounded(kernel: Kernel, row: &[f32]) -> (Vec<f64>, [i32; DIGITS]) {
        let mut lines = vec![[0_u64; 8]; DigitRows::stride(row.len()) / 64];
        let to: *mut u8 = lines.as_mut_ptr().cast();
        // SAFETY: there are as many bytes as such a row takes.
        let head = unsafe {
            round(kernel, row.as_ptr(), row.len(), to);
            to.cast::<RowHeader>().read_unaligned()
        };
        let bytes: &[i8] = bytemuck::cast_slice(&lines);
        let groups = bytes[HEAD_BYTES..].chunks_exact(GROUP_BYTES);
        let numbers = groups.flat_map(|group| {
            (0..GROUP).map(move |i| {
                let digit = |d: usize| f64::from(group[d * GROUP + i]);
                (digit(0) + 256.0 * digit(1) + 65_536.0 * digit(2)) * f64::from(head.factor)
            })
        });
        (numbers.collect(), head.begin)
    }

    fn check_row(row: &[f32]) -> Result<(), String> {
        let largest = row.iter().fold(0.0_f32, |largest, x| x.abs().max(largest));
        let expected = rounded(Kernel::Portable, row);
        for kernel in kernels() {
            let found = rounded(kernel, row);
            if found != expected {
                return Err(format!("{kernel:?} rounds in its own way"));
            }
        }
        let (numbers, _) = expected;
        let step = f64::from(largest.max(SMALLEST) / LARGEST);
        for (x, found) in row.iter().zip(&numbers) {
            // Half of a step, and three roundings of floats: of the factor, of
            // its inverse, and of the number times the inverse.
            let error = (f64::from(*x) - found).abs();
            if error > 0.5 * step + f64::from(x.abs()) * 1.8e-7 {
                return Err(format!("{x} is {error:e} off, of {largest}"));
            }
        }
        if numbers[row.len()..].iter().any(|beyond| *beyond != 0.0) {
            return Err("what is beyond is not zero".to_owned());
        }
        Ok(())
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(256))]

        #[test]
        #[cfg_attr(miri, ignore = "takes too long")]
        fn rows_are_rounded_to_24_bits(
            row in proptest::collection::vec(proptest::num::f32::NORMAL | proptest::num::f32::ZERO, 1..100),
            exponent in -60..60_i32,
        ) {
            check_row(&row).map_err(TestCaseError::fail)?;
            // Test numbers near each other, too.
            let near = row.iter().map(|x| x % 1.0 * 2.0_f32.powi(exponent));
            check_row(&near.collect::<Vec<_>>()).map_err(TestCaseError::fail)?;
        }
    }

    #[test]
    fn digits_are_balanced() {
        for (steps, expected) in [
            (0, [0, 0, 0]),
            (127, [127, 0, 0]),
            (128, [-128, 1, 0]),
            (-129, [127, -1, 0]),
            (127 << 16, [0, 0, 127]),
            (-(127 << 16), [0, 0, -127]),
        ] {
            assert_eq!(digits(steps), expected, "{steps}");
        }
        for row in [
            &[1.0, -1.0, 0.5][..],
            &[f32::MAX, f32::MIN, 1.0],
            &[0.0; 17],
            &[1e-40],
        ] {
            check_row(row).unwrap();
        }
    }

    #[test]
    fn a_row_that_is_not_finite_is_not_a_number() {
        for kernel in kernels() {
            for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
                let (numbers, _) = rounded(kernel, &[1.0, odd, 2.0]);
                assert!(numbers[..3].iter().all(|x| x.is_nan()), "{kernel:?} {odd}");
            }
        }
    }
}
