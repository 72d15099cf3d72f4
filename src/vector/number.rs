//! Numbers as they are kept in memory; all are computed with as `f32`.
#![expect(
    unsafe_code,
    reason = "reads vectors through raw pointers; see the contract of `Vector`"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use half::bf16;

use super::Vector;

/// Bytes that come from memory together.
const LINE: usize = 64;

/// A number that vectors are loaded from.
pub trait Number: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// How many lie in a line.
    const PER_LINE: usize = LINE / size_of::<Self>();

    /// # Safety
    /// As `Vector::splat`, and `LANES` of them at `from` are readable.
    unsafe fn load<V: Vector>(from: *const Self) -> V;
}

/// A number that keys and values are kept in.
pub trait Kept: Number {
    /// The nearest one.
    fn of(value: f32) -> Self;

    /// Reads `len` of them; the other lanes are zero.
    /// # Safety
    /// As `Vector::splat`, and `len <= LANES` of them at `from` are readable.
    unsafe fn load_partial<V: Vector>(from: *const Self, len: usize) -> V;
}

impl Number for f32 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller vouches for all of it.
        unsafe { V::load(from) }
    }
}

impl Kept for f32 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        value
    }

    #[inline(always)]
    unsafe fn load_partial<V: Vector>(from: *const Self, len: usize) -> V {
        // SAFETY: the caller vouches for all of it.
        unsafe { V::load_partial(from, len) }
    }
}

impl Number for bf16 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller vouches for all of it; the type is its bits.
        unsafe { V::load_bf16(from.cast()) }
    }
}

impl Kept for bf16 {
    #[inline(always)]
    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }

    #[inline(always)]
    unsafe fn load_partial<V: Vector>(from: *const Self, len: usize) -> V {
        // SAFETY: as above.
        unsafe { V::load_bf16_partial(from.cast(), len) }
    }
}

impl Number for i8 {
    #[inline(always)]
    unsafe fn load<V: Vector>(from: *const Self) -> V {
        // SAFETY: the caller vouches for all of it.
        unsafe { V::load_i8(from) }
    }
}
