//! The horizontal pass with AVX2: four pixels at a time, as pairs of 16 bits
//! for each channel, whose products are added in 32 bits. Weights of more than
//! 15 bits are kept in two parts, so that every sum is exact.

#![expect(
    unsafe_code,
    reason = "calls code for a CPU feature that is looked for"
)]

use std::arch::x86_64::{
    __m128i, __m256i, _mm_add_epi32, _mm_min_epu32, _mm_set1_epi32, _mm_slli_epi32, _mm_srli_epi32,
    _mm256_add_epi32, _mm256_broadcastsi128_si256, _mm256_castsi256_si128,
    _mm256_extracti128_si256, _mm256_madd_epi16, _mm256_setzero_si256, _mm256_shuffle_epi8,
};

use super::axis::Taps;
use super::{HALF, WEIGHT_BITS};

/// Pixels of a group.
const GROUP: usize = 4;
const GROUP_BYTES: usize = 3 * GROUP;
/// Bits of a weight's lower part, which is a positive number of 16 bits.
const LOW_BITS: i32 = 15;
const LOW: u32 = 0x7fff;
/// Place of no byte.
const NONE: u8 = 0x80;
/// Places of the bytes of a group in pairs for each channel: of the first two
/// pixels, and of the last two.
const PAIRS: [u8; 32] = {
    let mut places = [NONE; 32];
    let mut at: u8 = 0;
    while at < 12 {
        let (pixel, channel) = (at / 3, at % 3);
        places[(pixel / 2 * 16 + channel * 4 + pixel % 2 * 2) as usize] = at;
        at += 1;
    }
    places
};

/// Weights of one result column, for groups of pixels.
#[derive(Debug, Default)]
struct GroupWeights {
    low: Vec<[i16; 16]>,
    /// Upper parts. Empty if all are zero.
    high: Vec<[i16; 16]>,
}

impl GroupWeights {
    fn new(taps: &Taps) -> Self {
        let mut made = Self::default();
        let mut any = 0;
        for weights in groups(taps) {
            any |= weights[0] | weights[1] | weights[2] | weights[3];
            made.low.push(lanes(weights.map(|weight| weight & LOW)));
        }
        if any > LOW {
            let high = |weights: [u32; GROUP]| lanes(weights.map(|weight| weight >> LOW_BITS));
            made.high.extend(groups(taps).map(high));
        }
        made
    }

    /// Returns the weighted mean of pixels; those beyond the weights count for
    /// nothing.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn mean(&self, pixels: &[u8]) -> [u8; 3] {
        let sums = if self.high.is_empty() {
            self.sums::<false>(pixels)
        } else {
            self.sums::<true>(pixels)
        };
        let sums = _mm_add_epi32(sums, _mm_set1_epi32(HALF.cast_signed()));
        let means = _mm_srli_epi32::<{ WEIGHT_BITS.cast_signed() }>(sums);
        let means: [[u8; 4]; 4] = bytemuck::cast(_mm_min_epu32(means, _mm_set1_epi32(255)));
        [means[0][0], means[1][0], means[2][0]]
    }

    /// Returns the weighted sums of the channels. `HIGH` says whether there are
    /// upper parts.
    #[target_feature(enable = "avx2")]
    #[inline]
    fn sums<const HIGH: bool>(&self, pixels: &[u8]) -> __m128i {
        let places: __m256i = bytemuck::cast(PAIRS);
        let mut sums = [_mm256_setzero_si256(); 2];
        let mut add = |bytes: [u8; 16], low: &[i16; 16], high: &[i16; 16]| {
            let bytes = _mm256_broadcastsi128_si256(bytemuck::cast(bytes));
            let pairs = _mm256_shuffle_epi8(bytes, places);
            let products = _mm256_madd_epi16(pairs, bytemuck::cast(*low));
            sums[0] = _mm256_add_epi32(sums[0], products);
            if HIGH {
                let products = _mm256_madd_epi16(pairs, bytemuck::cast(*high));
                sums[1] = _mm256_add_epi32(sums[1], products);
            }
        };
        // Without upper parts, the lower ones stand in their place, unread.
        let mut weights = self
            .low
            .iter()
            .zip(if HIGH { &self.high } else { &self.low });
        // A group is read with the four bytes behind it.
        for (bytes, (low, high)) in windows(pixels).zip(&mut weights) {
            add(*bytes, low, high);
        }
        let mut rest = &pixels[(self.low.len() - weights.len()) * GROUP_BYTES..];
        for (low, high) in weights {
            let (group, behind) = rest.split_at(rest.len().min(GROUP_BYTES));
            let mut bytes = [0; 16];
            bytes[..group.len()].copy_from_slice(group);
            add(bytes, low, high);
            rest = behind;
        }
        let [low, high] = sums.map(|sums| {
            _mm_add_epi32(
                _mm256_castsi256_si128(sums),
                _mm256_extracti128_si256::<1>(sums),
            )
        });
        _mm_add_epi32(low, _mm_slli_epi32::<LOW_BITS>(high))
    }
}

/// Returns the bytes of each group and the four behind it.
#[inline]
fn windows(mut pixels: &[u8]) -> impl Iterator<Item = &[u8; 16]> {
    std::iter::from_fn(move || {
        let window = pixels.first_chunk()?;
        pixels = &pixels[GROUP_BYTES..];
        Some(window)
    })
}

/// Returns the weights of each group, with zeros behind the last.
fn groups(taps: &Taps) -> impl Iterator<Item = [u32; GROUP]> {
    let weight = |index| {
        if index < taps.source.end {
            taps.weight(index)
        } else {
            0
        }
    };
    let firsts = taps.source.clone().step_by(GROUP);
    firsts.map(move |first| std::array::from_fn(|at| weight(first + at)))
}

/// Returns the weights as they are multiplied: a pair for each channel, and
/// nothing for a fourth.
#[expect(clippy::cast_possible_truncation, reason = "parts of at most 15 bits")]
fn lanes(weights: [u32; GROUP]) -> [i16; 16] {
    let [a, b, c, d] = weights.map(|weight| weight.cast_signed() as i16);
    [a, b, a, b, a, b, 0, 0, c, d, c, d, c, d, 0, 0]
}

/// The horizontal pass on a CPU that has AVX2.
#[derive(Debug)]
pub(super) struct Avx2Columns {
    /// Weights of each column, or none if they are not kept.
    kept: Vec<GroupWeights>,
}

impl Avx2Columns {
    /// Computes the weights to keep, or returns `None` without AVX2.
    pub(super) fn new(kept: &[Taps]) -> Option<Self> {
        is_x86_feature_detected!("avx2").then(|| Self {
            kept: kept.iter().map(GroupWeights::new).collect(),
        })
    }

    /// Computes the columns of rows of `source_bytes` bytes.
    pub(super) fn apply(
        &self,
        taps: &[Taps],
        source: &[u8],
        source_bytes: usize,
        target: &mut [u8],
    ) {
        // SAFETY: the CPU has AVX2, or `self` would not exist.
        unsafe { columns(&self.kept, taps, source, source_bytes, target) };
    }
}

#[target_feature(enable = "avx2")]
fn columns(
    kept: &[GroupWeights],
    taps: &[Taps],
    source: &[u8],
    source_bytes: usize,
    target: &mut [u8],
) {
    for (column, column_taps) in taps.iter().enumerate() {
        let made;
        let weights = if let Some(weights) = kept.get(column) {
            weights
        } else {
            made = GroupWeights::new(column_taps);
            &made
        };
        let rows = target.chunks_exact_mut(taps.len() * 3);
        for (row, means) in rows.enumerate() {
            let start = row * source_bytes + column_taps.source.start * 3;
            if let Some(mean) = means[column * 3..].first_chunk_mut::<3>() {
                *mean = weights.mean(&source[start..]);
            }
        }
    }
}
