//! The vector arithmetic in which kernels are written, and its portable form.
//!
//! There is one trait, so that a kernel's pointer arithmetic exists once: Miri
//! checks it through [`Portable`], and the wide forms only exchange the
//! arithmetic.
#![expect(
    unsafe_code,
    reason = "reads and writes unaligned vectors through raw pointers: bounds checks in the inner loop cost a third of the speed"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

#[cfg(target_arch = "x86_64")]
pub(crate) mod amx;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx2;
#[cfg(target_arch = "x86_64")]
pub(crate) mod avx512;
mod number;
pub(crate) mod scratch;

pub use self::number::{Int24, Kept};
pub(crate) use self::number::{Number, magnitude};

/// Returns the number of rows in the next tile, of `n_left` rows that remain:
/// tiles are powers of two, the largest first.
pub(crate) fn tile_of(n_left: usize, most: usize) -> usize {
    if n_left >= most {
        most
    } else {
        (n_left + 1).next_power_of_two() / 2
    }
}

/// Most lanes of a vector.
pub(crate) const LANES_MAX: usize = 16;

/// A vector of `LANES` floats.
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
    /// Reads `LANES` floats.
    /// # Safety
    /// The contract of [`Vector::splat`] holds, and `LANES` floats at `from` are
    /// readable.
    unsafe fn load(from: *const f32) -> Self;
    /// Reads `len` floats; the other lanes are zero.
    /// # Safety
    /// The contract of [`Vector::splat`] holds, and `len <= LANES` floats at
    /// `from` are readable.
    unsafe fn load_partial(from: *const f32, len: usize) -> Self;
    /// Reads numbers in bfloat16, whose bits are at `from`.
    /// # Safety
    /// The contract of [`Vector::splat`] holds, and `LANES` numbers at `from`
    /// are readable.
    unsafe fn load_bf16(from: *const u16) -> Self;
    /// Reads `LANES` whole numbers of 8 bits.
    /// # Safety
    /// The contract of [`Vector::splat`] holds, and `LANES` numbers at `from` are
    /// readable.
    unsafe fn load_i8(from: *const i8) -> Self;
    /// Reads whole numbers of three bytes, the lowest first, times 256.
    /// # Safety
    /// The contract of [`Vector::splat`] holds, and three bytes per lane at
    /// `from` are readable.
    unsafe fn load_i24(from: *const u8) -> Self;
    /// Reads `len` numbers in bfloat16; the other lanes are zero.
    /// # Safety
    /// The contract of [`Vector::splat`] holds, and `len <= LANES` numbers at
    /// `from` are readable.
    #[inline(always)]
    unsafe fn load_bf16_partial(from: *const u16, len: usize) -> Self {
        let mut bits = [0_u16; LANES_MAX];
        for (lane, bits) in bits.iter_mut().enumerate().take(len) {
            // SAFETY: the caller vouches for `len` numbers.
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

    /// Prefetches the memory at `at`, which will be needed soon and need not be
    /// valid.
    #[inline(always)]
    fn prefetch<T>(_at: *const T) {}

    /// Prefetches memory kilobytes ahead to the second level of the cache,
    /// which can wait for more at the same time than the first level.
    #[inline(always)]
    fn prefetch_far<T>(_at: *const T) {}

    fn add(self, other: Self) -> Self;
    fn sub(self, other: Self) -> Self;
    fn mul(self, other: Self) -> Self;
    fn div(self, other: Self) -> Self;
    /// Computes `self * factor + addend`, fused if the CPU can.
    fn mul_add(self, factor: Self, addend: Self) -> Self;
    /// Returns the larger of the two; `other` if `self` is NaN.
    fn max(self, other: Self) -> Self;
    /// Computes `2^self` for `self <= 0`; exactly zero for minus infinity.
    fn exp2(self) -> Self;
    /// Returns minus infinity in the lanes before `first`, and the other lanes
    /// unchanged.
    fn mask_before(self, first: usize) -> Self;
    /// Returns minus infinity in the lanes that are below those of `least`, and
    /// the other lanes unchanged.
    fn mask_below(self, least: Self) -> Self;

    /// Returns the numbers of pairs in bfloat16, which are the bits of the lanes:
    /// those in the lower halves, and those in the upper halves.
    fn bf16_pairs(self) -> [Self; 2];

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

/// Smallest `x` for which `2^x` is computed. Below it `2^x` is zero, since the
/// exponent leaves the normal range of `f32`.
pub(crate) const EXP2_MIN: f32 = -127.0;

/// Number whose addition rounds a float to the nearest integer, which is then
/// in the low bits of the float's mantissa.
pub(crate) const ROUND: f32 = 12_582_912.0;

/// Vector of four lanes, which every 64-bit CPU has, so that the compiler can
/// use the CPU's vectors.
#[derive(Clone, Copy)]
pub(crate) struct Portable([f32; 4]);

impl Portable {
    #[inline(always)]
    pub(crate) fn from_lanes(lanes: [f32; 4]) -> Self {
        Self(lanes)
    }

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
        // SAFETY: the caller vouches for four numbers.
        let bits = unsafe { from.cast::<[u16; 4]>().read() };
        Self(bits.map(|bits| f32::from_bits(u32::from(bits) << 16)))
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const i8) -> Self {
        // SAFETY: the caller vouches for four numbers.
        Self(unsafe { from.cast::<[i8; 4]>().read() }.map(f32::from))
    }

    #[inline(always)]
    unsafe fn load_i24(from: *const u8) -> Self {
        // SAFETY: the caller vouches for four numbers.
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

    // Not `f32::mul_add`: without the instruction, `f32::mul_add` is a library
    // call.
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
            // A NaN stays a NaN, because the comparison is false.
            let x = if *lane < EXP2_MIN { EXP2_MIN } else { *lane };
            let rounded = x + ROUND;
            let r = x - (rounded - ROUND);
            let mut p = EXP2[6];
            for c in EXP2[..6].iter().rev() {
                p = p * r + c;
            }
            // The exponent of a float is made from the integer part; -127 makes
            // zero.
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

    #[inline(always)]
    fn bf16_pairs(self) -> [Self; 2] {
        let bits = self.0.map(f32::to_bits);
        [
            Self(bits.map(|bits| f32::from_bits(bits << 16))),
            Self(bits.map(|bits| f32::from_bits(bits & 0xFFFF_0000))),
        ]
    }
}
