//! The inner loops of the horizontal pass.

use super::axis::Taps;
use super::{HALF, to_byte};

/// The weights of one result column.
///
/// With many weights, the inner loop decides the speed. The weights are kept
/// three times each, so that they line up with red, green and blue, and in
/// 16-bit halves: the product of a byte and a half is an operation that every
/// x86-64 and ARM vector unit has, but a 32-bit product is not an operation of
/// the compiler's default target. With few weights, the plain loop is faster.
#[derive(Debug, Default)]
pub(super) struct ColumnWeights {
    /// Whole weights. Empty if there are many.
    few: Vec<u32>,
    low: Vec<u16>,
    /// Upper halves. Empty if all are zero, as they are when the image shrinks
    /// 64-fold or more.
    high: Vec<u16>,
}

impl ColumnWeights {
    const FEW: usize = 12;

    #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
    pub(super) fn new(taps: &Taps) -> Self {
        let mut made = Self::default();
        if taps.source.len() <= Self::FEW {
            let weights = taps.source.clone().map(|index| taps.weight(index));
            made.few.extend(weights);
            return made;
        }
        let mut seen = 0;
        for index in taps.source.clone() {
            let weight = taps.weight(index);
            seen |= weight;
            made.low.extend([weight as u16; 3]);
        }
        if seen > u32::from(u16::MAX) {
            for index in taps.source.clone() {
                made.high.extend([(taps.weight(index) >> 16) as u16; 3]);
            }
        }
        made
    }

    /// Returns the weighted mean of the pixels.
    pub(super) fn mean(&self, pixels: &[u8]) -> [u8; 3] {
        if !self.few.is_empty() {
            let (pixels, _) = pixels.as_chunks::<3>();
            let mut sums = [HALF; 3];
            for (pixel, &weight) in pixels.iter().zip(&self.few) {
                for (sum, &level) in sums.iter_mut().zip(pixel) {
                    *sum += weight * u32::from(level);
                }
            }
            return sums.map(to_byte);
        }
        let low = dot3(pixels, &self.low);
        if self.high.is_empty() {
            low.map(|low| to_byte(HALF + low))
        } else {
            let high = dot3(pixels, &self.high);
            std::array::from_fn(|channel| to_byte(HALF + low[channel] + (high[channel] << 16)))
        }
    }
}

/// Returns the weighted sums of interleaved red, green and blue.
///
/// No sum overflows: the weights add up to one (2^22) but for their rounding,
/// which at most doubles the sum, and a pixel is below 2^8.
fn dot3(pixels: &[u8], weights: &[u16]) -> [u32; 3] {
    // The least common multiple of 3 channels and 8 lanes.
    const LANES: usize = 24;
    let mut sums = [0_u32; LANES];
    let (pixel_chunks, pixel_rest) = pixels.as_chunks::<LANES>();
    let (weight_chunks, weight_rest) = weights.as_chunks::<LANES>();
    for (pixels, weights) in pixel_chunks.iter().zip(weight_chunks) {
        for lane in 0..LANES {
            sums[lane] += u32::from(pixels[lane]) * u32::from(weights[lane]);
        }
    }
    for ((sum, &pixel), &weight) in sums.iter_mut().zip(pixel_rest).zip(weight_rest) {
        *sum += u32::from(pixel) * u32::from(weight);
    }
    std::array::from_fn(|channel| sums.iter().skip(channel).step_by(3).sum())
}
