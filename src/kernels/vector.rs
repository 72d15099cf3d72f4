//! The vector arithmetic that kernels are written in, and its portable form.
//!
//! One trait, so that a kernel's pointer arithmetic exists once: Miri checks it
//! through [`Portable`], and the wide forms only exchange the arithmetic.
#![expect(
    unsafe_code,
    reason = "reads and writes unaligned vectors through raw pointers: bounds checks in the inner loop cost a third of the speed"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod number;
pub(crate) mod scratch;

pub use self::number::{Int24, Kept};
pub(crate) use self::number::{Number, magnitude};

/// Rows that remain, cut into tiles of powers of two, the largest first.
pub(crate) fn tile_of(n_left: usize, most: usize) -> usize {
    if n_left >= most {
        most
    } else {
        (n_left + 1).next_power_of_two() / 2
    }
}

/// The most lanes that a vector has.
pub(crate) const LANES_MAX: usize = 16;

/// A vector of `LANES` floats, one query in each lane.
///
/// # Safety
///
/// A value may exist only where the CPU has the instructions its methods use:
/// the constructors (`splat`, `load`, `load_partial`) demand that of their
/// caller, so the methods that take `self` may rely on it.
/// `load` and `store` must touch exactly `LANES` numbers, which are at most
/// `LANES_MAX`; the partial forms exactly `len`, which is at most `LANES`.
pub unsafe trait Vector: Copy {
    const LANES: usize;

    /// # Safety
    /// The CPU has this vector's instructions.
    unsafe fn splat(x: f32) -> Self;
    /// # Safety
    /// As [`Vector::splat`], and `LANES` floats at `from` are readable.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads `len` floats; the other lanes are zero.
    /// # Safety
    /// As [`Vector::splat`], and `len <= LANES` floats at `from` are readable.
    unsafe fn load_partial(from: *const f32, len: usize) -> Self;
    /// Reads bfloat16, of which the bits are at `from`.
    /// # Safety
    /// As [`Vector::splat`], and `LANES` of them are readable.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// # Safety
    /// As [`Vector::splat`], and `LANES` numbers at `from` are readable.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Reads whole numbers of three bytes, the lowest first, times 256.
    /// # Safety
    /// As [`Vector::splat`], and three bytes a lane are readable.
    unsafe fn load_i24(from: *const u8) -> Self;
    /// Reads `len` bfloat16; the other lanes are zero.
    /// # Safety
    /// As [`Vector::splat`], and `len <= LANES` of them are readable.
    #[inline(always)]
    unsafe fn load_bf16_partial(from: *const u16, len: usize) -> Self {
        let mut bits = [0_u16; LANES_MAX];
        for (lane, bits) in bits.iter_mut().enumerate().take(len) {
            // SAFETY: the caller vouches for `len` of them.
            *bits = unsafe { *from.add(lane) };
        }
        // SAFETY: the caller vouches for the instructions; no vector has more
        // lanes than there are bits.
        unsafe { Self::load_bf16(bits.as_ptr()) }
    }
    /// # Safety
    /// `LANES` floats at `to` are writable.
    unsafe fn store(self, to: *mut f32);
    /// # Safety
    /// `len <= LANES` floats at `to` are writable.
    unsafe fn store_partial(self, to: *mut f32, len: usize);

    /// Says that what lies `at` will be wanted soon; it need not be valid.
    #[inline(always)]
    fn prefetch<T>(_at: *const T) {}

    /// The same for what lies kilobytes ahead: the second level of the cache,
    /// which can wait for more at once than the first.
    #[inline(always)]
    fn prefetch_far<T>(_at: *const T) {}

    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// `self * factor + addend`, fused where the CPU can.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// The larger of the two; `other` where `self` is not a number.
    fn max(self, other: Self) -> Self;
    /// `2^self` for `self <= 0`; exactly zero for minus infinity.
    fn exp2(self) -> Self;
    /// Minus infinity in the lanes before `first`.
    fn mask_before(self, first: usize) -> Self;
    /// Minus infinity in the lanes that are below those of `least`.
    fn mask_below(self, least: Self) -> Self;

    /// Transposes `rows` by `cols` floats, each at most `LANES`, so that
    /// `to[col][row] = from[row][col]`.
    ///
    /// # Safety
    /// The CPU has this vector's instructions; `rows` rows of `cols` floats,
    /// `from_stride` apart, are readable, and `cols` rows of `rows` floats,
    /// `to_stride` apart, are writable.
    #[inline(always)]
    unsafe fn transpose(
        from: *const f32,
        from_stride: usize,
        to: *mut f32,
        to_stride: usize,
        rows: usize,
        cols: usize,
    ) {
        for row in 0..rows {
            for col in 0..cols {
                // SAFETY: within the rows and columns that the caller vouches for.
                unsafe { *to.add(col * to_stride + row) = *from.add(row * from_stride + col) };
            }
        }
    }
}

/// Coefficients of a minimax polynomial for `2^r` on [-0.5, 0.5], constant term
/// first. Largest relative error 1.6e-8, before rounding.
pub(crate) const EXP2: [f32; 7] = [
    1.0,
    std::f32::consts::LN_2,
    0.240_226_46,
    0.055_503_286,
    0.009_618_489,
    0.001_339_993_1,
    0.000_153_458_12,
];

/// Below this, `2^x` is zero: the exponent leaves the normal range of `f32`.
pub(crate) const EXP2_MIN: f32 = -127.0;

/// Adding this rounds a float to the nearest integer, which is then in the low
/// bits of its mantissa.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Four lanes: what every 64-bit CPU has, so the compiler can use its vectors.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 4]);

impl Portable {
    #[inline(always)]
    fn zip(self, other: Self, f: impl Fn(f32, f32) -> f32) -> Self {
        let mut out = self;
        for lane in 0..4 {
            out.0[lane] = f(self.0[lane], other.0[lane]);
        }
        out
    }
}

// SAFETY: needs no special instructions, and touches exactly the floats named.
unsafe impl Vector for Portable {
    const LANES: usize = 4;

    #[inline(always)]
    unsafe fn splat(x: f32) -> Self {
        Self([x; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for four floats.
        Self(unsafe { from.cast::<[f32; 4]>().read() })
    }

    #[inline(always)]
    unsafe fn load_partial(from: *const f32, len: usize) -> Self {
        let mut lanes = [0.0; 4];
        for (lane, to) in lanes.iter_mut().enumerate().take(len) {
            // SAFETY: the caller vouches for `len` floats.
            *to = unsafe { *from.add(lane) };
        }
        Self(lanes)
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u16) -> Self {
        // SAFETY: the caller vouches for four of them.
        let bits = unsafe { from.cast::<[u16; 4]>().read() };
        Self(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller vouches for four of them.
        Self(unsafe { from.cast::<[i8; 4]>().read() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_i24(from: *const u8) -> Self {
        // SAFETY: the caller vouches for four of them.
        let numbers = unsafe { from.cast::<[[u8; 3]; 4]>().read() };
        #[expect(clippy::cast_precision_loss, reason = "24 bits and eight of zero")]
        Self(numbers.map(|[a, b, c]| i32::from_le_bytes([0, a, b, c]) as f32))
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for four floats.
        unsafe { to.cast::<[f32; 4]>().write(self.0) };
    }

    #[inline(always)]
    unsafe fn store_partial(self, to: *mut f32, len: usize) {
        for (lane, from) in self.0.iter().enumerate().take(len) {
            // SAFETY: the caller vouches for `len` floats.
            unsafe { *to.add(lane) = *from };
        }
    }

    #[inline(always)]
    fn add(self, other: Self) -> Self {
        self.zip(other, |a, b| a + b)
    }

    #[inline(always)]
    fn sub(self, other: Self) -> Self {
        self.zip(other, |a, b| a - b)
    }

    #[inline(always)]
    fn mul(self, other: Self) -> Self {
        self.zip(other, |a, b| a * b)
    }

    #[inline(always)]
    fn div(self, other: Self) -> Self {
        self.zip(other, |a, b| a / b)
    }

    // Not `f32::mul_add`: without the instruction that is a library call.
    #[inline(always)]
    fn mul_add(self, factor: Self, addend: Self) -> Self {
        self.mul(factor).add(addend)
    }

    #[inline(always)]
    fn max(self, other: Self) -> Self {
        self.zip(other, |a, b| if a > b { a } else { b })
    }

    #[inline(always)]
    fn exp2(self) -> Self {
        let mut out = self;
        for lane in &mut out.0 {
            // Not a number stays itself: the comparison is false.
            let x = if *lane < EXP2_MIN { EXP2_MIN } else { *lane };
            let rounded = x + ROUND;
            let r = x - (rounded - ROUND);
            let mut p = EXP2[6];
            for c in EXP2[..6].iter().rev() {
                p = p * r + c;
            }
            // The exponent of a float made from its integer part; -127 makes zero.
            let power = f32::from_bits(rounded.to_bits().wrapping_add(127) << 23);
            *lane = p * power;
        }
        out
    }

    #[inline(always)]
    fn mask_before(self, first: usize) -> Self {
        let mut out = self;
        for (lane, x) in out.0.iter_mut().enumerate() {
            *x = if lane < first { f32::NEG_INFINITY } else { *x };
        }
        out
    }

    #[inline(always)]
    fn mask_below(self, least: Self) -> Self {
        self.zip(
            least,
            |x, least| if x < least { f32::NEG_INFINITY } else { x },
        )
    }
}
