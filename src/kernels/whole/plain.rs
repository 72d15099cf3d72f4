//! Products of whole numbers in plain code: what the wide forms compute, to the
//! last bit.
#![expect(
    unsafe_code,
    reason = "reads and writes vectors through raw pointers; see the contract of `Sums`"
)]
#![expect(clippy::inline_always, reason = "the loops around these are hot")]

use super::tile::{StepProducts, Sums};
use crate::kernels::vector::Portable;

const LANES: usize = 4;

/// Four sums of whole numbers.
#[derive(Clone, Copy)]
pub(super) struct PlainSums([i32; LANES]);

// SAFETY: no special instructions are needed, and exactly the named memory is
// touched.
unsafe impl Sums for PlainSums {
    type Floats = Portable;
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
    fn floats(self, addend: i32) -> Portable {
        #[expect(clippy::cast_precision_loss, reason = "sums are rounded as floats are")]
        Portable::from_lanes(self.0.map(|sum| sum.wrapping_add(addend) as f32))
    }
}

impl PlainSums {
    /// Adds the products of a step with `N` inputs. Only rows that are not finite
    /// overflow, and their factor is NaN.
    #[inline(always)]
    fn add<W: Into<i32>, I: Into<i32>, const N: usize>(
        mut self,
        weights: [[W; N]; LANES],
        inputs: [I; N],
    ) -> Self {
        let inputs = inputs.map(Into::into);
        for (sum, weights) in self.0.iter_mut().zip(weights) {
            for (weight, input) in weights.into_iter().zip(inputs) {
                *sum = sum.wrapping_add(weight.into() * input);
            }
        }
        self
    }
}

/// Products of words, two at a step.
pub(super) struct PlainWords;

// SAFETY: exactly the named memory is touched.
unsafe impl StepProducts for PlainWords {
    type Sums = PlainSums;
    type Weights = [[i16; 2]; LANES];
    type Inputs = [i16; 2];
    const PACKED_BYTES: usize = 2;

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
    unsafe fn add(sums: PlainSums, weights: Self::Weights, inputs: Self::Inputs) -> PlainSums {
        sums.add(weights, inputs)
    }
}

/// Products of bytes, four at a step.
pub(super) struct PlainBytes;

// SAFETY: as above.
unsafe impl StepProducts for PlainBytes {
    type Sums = PlainSums;
    type Weights = [[u8; 4]; LANES];
    type Inputs = [i8; 4];

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
    unsafe fn add(sums: PlainSums, weights: Self::Weights, inputs: Self::Inputs) -> PlainSums {
        sums.add(weights, inputs)
    }
}
