//! Sums of products of whole numbers in plain code: what the wide forms compute,
//! to the last bit.
#![expect(
    unsafe_code,
    reason = "reads and writes vectors through raw pointers; see the contract of `Sums`"
)]
#![expect(clippy::inline_always, reason = "the loops around these are hot")]

use super::tile::Sums;
use crate::kernels::vector::Portable;

const LANES: usize = 4;

/// Sums of products of words, two at a step.
#[derive(Clone, Copy)]
pub(super) struct PlainWords([i32; LANES]);

/// Sums of products of bytes, four at a step.
#[derive(Clone, Copy)]
pub(super) struct PlainBytes([i32; LANES]);

/// Returns sums as floats.
fn floats(sums: [i32; LANES], addend: i32) -> Portable {
    #[expect(clippy::cast_precision_loss, reason = "sums are rounded as floats are")]
    Portable::from_lanes(sums.map(|sum| sum.wrapping_add(addend) as f32))
}

// SAFETY: no special instructions are needed, and exactly the named memory is
// touched.
unsafe impl Sums for PlainWords {
    type Floats = Portable;
    type Weights = [[i16; 2]; LANES];
    type Inputs = [i16; 2];
    const ARE_WHOLE: bool = true;
    const PACKED_BYTES: usize = 2;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for a vector.
        Self(unsafe { from.cast::<[i32; LANES]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for a vector.
        unsafe { to.cast::<[i32; LANES]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn weights(from: *const u8) -> Self::Weights {
        // SAFETY: the caller vouches for the bytes.
        unsafe { from.cast::<Self::Weights>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn unpack(from: *const u8, to: *mut u8) {
        // SAFETY: the caller vouches for the bytes.
        unsafe {
            let bytes = from.cast::<[[i8; 2]; LANES]>().read();
            to.cast::<Self::Weights>()
                .write_unaligned(bytes.map(|step| step.map(i16::from)));
        }
    }

    #[inline(always)]
    unsafe fn inputs(from: *const u8) -> Self::Inputs {
        // SAFETY: the caller vouches for the bytes.
        unsafe { from.cast::<Self::Inputs>().read_unaligned() }
    }

    #[inline(always)]
    fn add(mut self, weights: Self::Weights, inputs: Self::Inputs) -> Self {
        for (sum, weights) in self.0.iter_mut().zip(weights) {
            let products = weights.iter().zip(inputs);
            // Only rows that are not finite overflow, and their factor is NaN.
            *sum = products
                .map(|(weight, input)| i32::from(*weight) * i32::from(input))
                .fold(*sum, i32::wrapping_add);
        }
        self
    }

    #[inline(always)]
    fn floats(self, addend: i32) -> Portable {
        floats(self.0, addend)
    }
}

// SAFETY: as above.
unsafe impl Sums for PlainBytes {
    type Floats = Portable;
    type Weights = [[u8; 4]; LANES];
    type Inputs = [i8; 4];
    const ARE_WHOLE: bool = true;

    #[inline(always)]
    unsafe fn zero() -> Self {
        Self([0; LANES])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for a vector.
        Self(unsafe { from.cast::<[i32; LANES]>().read() })
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for a vector.
        unsafe { to.cast::<[i32; LANES]>().write(self.0) }
    }

    #[inline(always)]
    unsafe fn weights(from: *const u8) -> Self::Weights {
        // SAFETY: the caller vouches for the bytes.
        unsafe { from.cast::<Self::Weights>().read() }
    }

    #[inline(always)]
    unsafe fn inputs(from: *const u8) -> Self::Inputs {
        // SAFETY: the caller vouches for the bytes.
        unsafe { from.cast::<Self::Inputs>().read() }
    }

    #[inline(always)]
    fn add(mut self, weights: Self::Weights, inputs: Self::Inputs) -> Self {
        for (sum, weights) in self.0.iter_mut().zip(weights) {
            let products = weights.iter().zip(inputs);
            // Only rows that are not finite overflow, and their factor is NaN.
            *sum = products
                .map(|(weight, input)| i32::from(*weight) * i32::from(input))
                .fold(*sum, i32::wrapping_add);
        }
        self
    }

    #[inline(always)]
    fn floats(self, addend: i32) -> Portable {
        floats(self.0, addend)
    }
}
