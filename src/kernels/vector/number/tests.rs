//! Tests numbers of 24 bits, alone and in the vectors of this CPU.
#![expect(clippy::cast_precision_loss, reason = "24 bits")]

use proptest::prelude::*;

use super::*;
use crate::kernels::attention::Kernel;
use crate::kernels::vector::Portable;
#[cfg(target_arch = "x86_64")]
use crate::kernels::vector::avx2::Avx2;
use crate::kernels::vector::avx512::Avx512;

/// Reads back a row after it is written as kept numbers.
fn kept(row: &[f32]) -> Vec<f32> {
    let factor = <Int24 as Kept>::factor(row);
    let mut bytes = vec![0; 3 * row.len()];
    // SAFETY: there are three bytes for each number.
    unsafe { Int24::put_row(row, factor, bytes.as_mut_ptr(), 3) };
    let numbers = bytes.chunks_exact(3);
    numbers
        .map(|bytes| i32::from_le_bytes([0, bytes[0], bytes[1], bytes[2]]) as f32 * factor)
        .collect()
}

/// Generates numbers far larger and far smaller than one, and of either sign.
fn row() -> impl Strategy<Value = Vec<f32>> {
    let spread = prop_oneof![Just(0_i32), 1..20_i32, Just(80_i32)];
    (-90..100_i32, spread).prop_flat_map(|(exponent, spread)| {
        let number = (-1.0..1.0_f32, 0..=spread)
            .prop_map(move |(fraction, lower)| fraction * 2_f32.powi(exponent - lower));
        prop::collection::vec(number, 1..80)
    })
}

proptest! {
    /// Checks that no number is further off than half of the last of the
    /// largest number's 23 bits.
    #[test]
    #[cfg_attr(miri, ignore = "takes too long")]
    fn a_row_is_as_exact_as_its_largest_number(row in row()) {
        let largest = row.iter().fold(0.0_f32, |max, value| max.max(value.abs()));
        // Below this bound, products with the factor would not be normal
        // numbers.
        let most = f64::from(largest).max(2_f64.powi(-62)) * 2_f64.powi(-23);
        for (value, read) in row.iter().zip(kept(&row)) {
            let error = (f64::from(*value) - f64::from(read)).abs();
            // The largest number of 24 bits has no next number to be rounded
            // to.
            prop_assert!(error <= most, "{value} is read as {read}, {error:e} off");
        }
    }
}

#[test]
fn what_24_bits_hold_is_exact() {
    let row = [1.0, -1.0, 0.5, 1.5 + 2_f32.powi(-22), -2_f32.powi(-22), 0.0];
    assert_eq!(kept(&row), row);
    assert_eq!(kept(&[0.0, -0.0]), [0.0, 0.0]);
    // The smallest number that is as exact as any, and a smaller number.
    let least = [2_f32.powi(-62), 2_f32.powi(-84)];
    assert_eq!(kept(&least), least);
    assert_eq!(kept(&[f32::MIN_POSITIVE]), [0.0]);
    // Half a step is rounded to even, and never beyond the largest number.
    assert_eq!(kept(&[f32::MAX]), [f32::MAX - 2_f32.powi(127 - 23)]);
    assert_eq!(
        kept(&[1.0, 2_f32.powi(-23), 3.0 * 2_f32.powi(-23)])[1..],
        [0.0, 2_f32.powi(-21)]
    );
}

#[test]
fn no_number_spoils_its_row() {
    for none in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        assert!(kept(&[1.0, none]).iter().all(|value| value.is_nan()));
    }
}

/// Reads numbers with one vector type, whose instructions the CPU must have.
fn read<V: Vector>(bytes: &[u8]) -> Vec<f32> {
    bytes
        .chunks_exact(3 * V::LANES)
        .flat_map(|bytes| {
            let mut lanes = [0.0; LANES_MAX];
            // SAFETY: the caller of this test function has checked the
            // instructions; there are enough bytes.
            unsafe { V::load_i24(bytes.as_ptr()).store(lanes.as_mut_ptr()) };
            lanes.into_iter().take(V::LANES)
        })
        .collect()
}

#[test]
fn vectors_read_every_bit() {
    let mut state = 1_u32;
    let bytes: Vec<u8> = std::iter::repeat_with(|| {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 24) as u8
    })
    .take(3 * 64)
    .collect();
    let expected: Vec<f32> = bytes
        .chunks_exact(3)
        .map(|bytes| {
            let number = i32::from(bytes[0])
                + (i32::from(bytes[1]) << 8)
                + (i32::from(bytes[2].cast_signed()) << 16);
            (number * 256) as f32
        })
        .collect();
    assert_eq!(read::<Portable>(&bytes), expected);
    #[cfg(target_arch = "x86_64")]
    {
        if Kernel::Avx2.is_available() {
            assert_eq!(read::<Avx2>(&bytes), expected);
        }
        if Kernel::Avx512.is_available() {
            assert_eq!(read::<Avx512>(&bytes), expected);
        }
    }
    assert!(Kernel::Portable.is_available());
}
