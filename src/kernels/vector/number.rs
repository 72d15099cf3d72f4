//! Number formats in memory. All numbers are computed with as `f32`.
#![expect(
    unsafe_code,
    reason = "reads vectors through raw pointers; see the contract of `Vector`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use bytemuck::{Pod, Zeroable};
use half::bf16;

use super::{LANES_MAX, Vector};

#[cfg(test)]
mod tests;

/// Bytes that come from memory together: a cache line.
const LINE: usize = 64;

/// Number format from which vectors are loaded.
pub trait Number: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// Numbers in a row of which at least one lies in every line that the row
    /// touches.
    const PER_LINE: usize = LINE / size_of::<Self>();
    /// True if a panel of the widest vectors is cut into strips. Reading takes
    /// most of the time, and a CPU reads from two places faster than from one.
    const IN_STRIPS: bool = false;

    /// Loads `LANES` numbers.
    /// # Safety
    /// The contract of `Vector::splat` holds, and `LANES` numbers at `from` are
    /// readable.
    unsafe fn load<V: Vector>(from: *const Self) -> V;
}

/// Format in which keys and values are kept: the numbers of a position and
/// head, and the factor with which all of them are multiplied, if there is one.
pub trait Kept: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// Element of the memory that holds the numbers.
    type Element: Copy + Send + Sync + std::fmt::Debug + 'static;
    /// Number of elements that make a number.
    const PER_NUMBER: usize;
    /// Number of elements that make a position's factor; 0 if there is no
    /// factor.
    const PER_FACTOR: usize;
    /// Numbers in a row of which at least one lies in every line that the row
    /// touches.
    const PER_LINE: usize;

    /// Returns the number of elements of a position's `head_dim` numbers, with
    /// their factor.
    #[must_use]
    fn position_len(head_dim: usize) -> usize {
        head_dim * Self::PER_NUMBER + Self::PER_FACTOR
    }

    /// Returns the factor of a position's numbers.
    fn factor(row: &[f32]) -> f32;

    /// Writes each number of a row, rounded to the nearest under the row's
    /// factor. `stride` is the number of elements from a number to the next.
    /// # Safety
    /// From `to` on the elements of all the row's numbers are writable.
    unsafe fn put_row(row: &[f32], factor: f32, to: *mut Self::Element, stride: usize);

    /// Writes a position's factor.
    /// # Safety
    /// A factor's elements at `to` are writable.
    unsafe fn put_factor(factor: f32, to: *mut Self::Element);

    /// Reads `LANES` numbers, without their factor.
    /// # Safety
    /// The contract of `Vector::splat` holds, and `LANES` numbers at `from` are
    /// readable.
    unsafe fn load<V: Vector>(from: *const Self::Element) -> V;

    /// Reads `len` numbers; the other lanes are zero.
    /// # Safety
    /// The contract of `Vector::splat` holds, and `len <= LANES` numbers at
    /// `from` are readable.
    unsafe fn load_partial<V: Vector>(from: *const Self::Element, len: usize) -> V;

    /// Reads the factors of positions that follow each other.
    /// # Safety
    /// The contract of `Vector::splat` holds, and `LANES` factors at `from` are
    /// readable.
    unsafe fn load_factors<V: Vector>(from: *const Self::Element) -> V;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller vouches for all of it.
        unsafe { V::load(from) }
    }
}

impl Number for bf16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller vouches for all of it; the type is its bits.
        unsafe { V::load_bf16(from.cast()) }
    }
}

impl Number for i8 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller vouches for all of it.
        unsafe { V::load_i8(from) }
    }
}

/// Each number is rounded to 8 bits, separately.
impl Kept for bf16 {
    type Element = Self;
    const PER_NUMBER: usize = 1;
    const PER_FACTOR: usize = 0;
    const PER_LINE: usize = LINE / size_of::<Self>();

    #[inline(always)]
    fn factor(_row: &[f32]) -> f32 {
        1.0
    }

    #[inline(always)]
    unsafe fn put_row(row: &[f32], _factor: f32, to: *mut Self, stride: usize) {
        for (i, value) in row.iter().enumerate() {
            // SAFETY: the caller vouches for the places.
            unsafe { to.add(i * stride).write(Self::from_f32(*value)) }
        }
    }

    #[inline(always)]
    unsafe fn put_factor(_factor: f32, _to: *mut Self) {}

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller vouches for all of it; the type is its bits.
        unsafe { V::load_bf16(from.cast()) }
    }

    #[inline(always)]
    unsafe fn load_partial<V: Vector>(from: *const Self, len: usize) -> V {
        // SAFETY: as above.
        unsafe { V::load_bf16_partial(from.cast(), len) }
    }

    #[inline(always)]
    unsafe fn load_factors<V: Vector>(_from: *const Self) -> V {
        // SAFETY: the caller vouches for the instructions.
        unsafe { V::splat(1.0) }
    }
}

/// A whole number of 24 bits, the lowest byte first, times a power of two that
/// several numbers share: the numbers of a position and head, or the weights of
/// an output.
///
/// The largest of the numbers is rounded to 23 bits or more, where `f32` has
/// 24, and the others to the same multiple. A sum over all of them is then
/// about as exact as with `f32`, whose sums round as much, in three quarters of
/// the bytes; but not if the largest of the numbers are multiplied with far
/// smaller factors than the others are. Sums must also have room for numbers of
/// 31 bits, before the numbers are multiplied with their factor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(transparent)]
pub struct Int24([u8; 3]);

// SAFETY: the type is three bytes, of which zeros are zero.
unsafe impl Zeroable for Int24 {}
// SAFETY: the type is three bytes of any value, and nothing else.
unsafe impl Pod for Int24 {}

impl Int24 {
    /// The largest whole number of 24 bits.
    const MAX: f32 = 8_388_607.0;
    /// Factor by which numbers are read too large, since they are read as the
    /// upper 24 of 32 bits.
    const READ_AS: f32 = 256.0;
    /// Exponent bits of the least number for which factors are normal numbers.
    const EXPONENT_MIN: u32 = 31;
    /// Like `EXPONENT_MIN`, for keys and values, whose factors are multiplied
    /// with probabilities of 2^-64. Numbers below 2^-84 are zero then, and
    /// nothing beside any that matter.
    const KEPT_EXPONENT_MIN: u32 = 65;

    /// Returns the factor of numbers as they are read, where the largest of
    /// them has this [`magnitude`]; NaN if the magnitude is not that of a
    /// finite number.
    #[inline(always)]
    pub(crate) fn factor_of(magnitude: u32) -> f32 {
        Self::factor_from(magnitude, Self::EXPONENT_MIN)
    }

    #[inline(always)]
    fn factor_from(magnitude: u32, exponent_min: u32) -> f32 {
        const NOT_FINITE: u32 = 0xFF;
        let exponent = magnitude >> 23;
        if exponent == NOT_FINITE {
            return f32::NAN;
        }
        // Of the 24 bits one is the sign, 22 are behind the largest number's
        // first bit, and 8 are `READ_AS`.
        f32::from_bits((exponent.max(exponent_min) - 30) << 23)
    }

    /// Rounds `value` to the nearest number under a factor.
    #[inline(always)]
    pub(crate) fn of(value: f32, factor: f32) -> Self {
        Self::from_steps(Self::steps(value, Self::inverse(factor)))
    }

    /// Returns the number with which values are multiplied to become whole
    /// numbers. The result is exact, as factors are powers of two that are
    /// neither the largest nor the smallest.
    #[inline(always)]
    fn inverse(factor: f32) -> f32 {
        1.0 / (factor * Self::READ_AS)
    }

    #[inline(always)]
    fn steps(value: f32, inverse: f32) -> i32 {
        let steps = (value * inverse).round_ties_even();
        #[expect(clippy::cast_possible_truncation, reason = "within 24 bits")]
        let steps = steps.clamp(-Self::MAX, Self::MAX) as i32;
        steps
    }

    #[inline(always)]
    fn from_steps(steps: i32) -> Self {
        let [a, b, c, _] = steps.to_le_bytes();
        Self([a, b, c])
    }
}

/// Returns bits that are larger for a number further from zero, and largest for
/// infinity and NaN.
#[inline(always)]
pub(crate) fn magnitude(value: f32) -> u32 {
    value.to_bits() & (u32::MAX >> 1)
}

/// Numbers are loaded without their factor.
impl Number for Int24 {
    // A row of 16 is 48 bytes.
    const PER_LINE: usize = 16;
    const IN_STRIPS: bool = true;

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller vouches for all of it; the type is its bytes.
        unsafe { V::load_i24(from.cast()) }
    }
}

impl Kept for Int24 {
    type Element = u8;
    const PER_NUMBER: usize = size_of::<Self>();
    const PER_FACTOR: usize = size_of::<f32>();
    const PER_LINE: usize = <Self as Number>::PER_LINE;

    #[inline(always)]
    fn factor(row: &[f32]) -> f32 {
        let largest = row.iter().copied().map(magnitude).fold(0, u32::max);
        Self::factor_from(largest, Self::KEPT_EXPONENT_MIN)
    }

    #[inline(always)]
    unsafe fn put_row(row: &[f32], factor: f32, to: *mut u8, stride: usize) {
        let inverse = Self::inverse(factor);
        let mut places = (0..).map(|i| to.wrapping_add(i * stride).cast::<Self>());
        for values in row.chunks(LANES_MAX) {
            // All numbers are rounded before any is written, so that the CPU
            // rounds several at the same time.
            let mut steps = [0; LANES_MAX];
            for (steps, value) in steps.iter_mut().zip(values) {
                *steps = Self::steps(*value, inverse);
            }
            for (steps, to) in steps[..values.len()].iter().zip(&mut places) {
                // SAFETY: the caller vouches for three bytes per number.
                unsafe { to.write(Self::from_steps(*steps)) }
            }
        }
    }

    #[inline(always)]
    unsafe fn put_factor(factor: f32, to: *mut u8) {
        // SAFETY: the caller vouches for four bytes.
        unsafe { to.cast::<[u8; 4]>().write(factor.to_ne_bytes()) }
    }

    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const u8) -> V {
        // SAFETY: the caller vouches for all of it.
        unsafe { V::load_i24(from) }
    }

    #[inline(always)]
    unsafe fn load_partial<V: Vector>(from: *const u8, len: usize) -> V {
        let mut bytes = [0; 3 * LANES_MAX];
        // SAFETY: the caller vouches for the instructions and `len` numbers, and
        // no vector has more lanes than there is room for.
        unsafe {
            bytes.as_mut_ptr().copy_from_nonoverlapping(from, 3 * len);
            V::load_i24(bytes.as_ptr())
        }
    }

    #[inline(always)]
    unsafe fn load_factors<V: Vector>(from: *const u8) -> V {
        let mut factors = [0.0_f32; LANES_MAX];
        // Factors may lie at any address, but `load` may require aligned
        // numbers.
        // SAFETY: the caller vouches for the instructions and a vector of them.
        unsafe {
            let to = factors.as_mut_ptr().cast::<u8>();
            to.copy_from_nonoverlapping(from, size_of::<f32>() * V::LANES);
            V::load(factors.as_ptr())
        }
    }
}
