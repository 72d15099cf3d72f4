//! Shrinks (or grows) an image to the model's square.
//!
//! Promises the very bytes of Pillow's `Image.resize((side, side), BILINEAR)`
//! on 8-bit RGB: a triangle filter whose support grows with the downscale
//! factor, in two passes that each round to 8 bits, in fixed point with 22
//! fractional bits. The rounding is part of the contract: it decides tokens at
//! the border between two colors. So is the order of the passes, horizontal
//! first but for tall images, which is as in Pillow 13; up to Pillow 12 it was
//! always horizontal first.
//!
//! Memory does not grow with the image: source rows pass through in blocks, and
//! of an intermediate size only the window that is wanted is computed. A 1 x
//! 4000 image whose center crop goes through 224 x 896000 costs three rows.

use std::ops::Range;

use super::{Fit, RgbImage, RgbView};

/// Fractional bits of a weight: 32, less 8 for the pixel, less 2 for sums that
/// overshoot. Pillow's choice, and visible in the result.
const WEIGHT_BITS: u32 = 32 - 8 - 2;
const WEIGHT_ONE: f64 = (1 << WEIGHT_BITS) as f64;
const HALF: u32 = 1 << (WEIGHT_BITS - 1);

/// Source bytes of one block of rows. A block is read once for each output
/// column, so it should stay in the second-level cache.
const BLOCK_BYTES: usize = 512 * 1024;
const BLOCK_ROWS_MAX: usize = 4096;

/// The paper crops 224 of what becomes 32.
const CROP_FACTOR: u64 = 7;

/// Makes the model's square of an image.
///
/// # Panics
///
/// When `side` is 0.
#[must_use]
pub fn resize(image: RgbView<'_>, side: u32, fit: Fit) -> RgbImage {
    match fit {
        Fit::Squash => resize_to(image, side, side),
        Fit::CenterCrop => {
            let crop = u64::from(side) * CROP_FACTOR;
            let shorter = image.width.min(image.height);
            let cropped = resample(
                image,
                &Axis::centered(image.width, shorter, crop),
                &Axis::centered(image.height, shorter, crop),
            );
            resize_to(cropped.view(), side, side)
        }
    }
}

/// Pillow's `Image.resize((width, height), BILINEAR)`.
///
/// # Panics
///
/// When `width` or `height` is 0.
#[must_use]
pub fn resize_to(image: RgbView<'_>, width: u32, height: u32) -> RgbImage {
    assert!(width > 0 && height > 0, "an image has pixels");
    resample(
        image,
        &Axis::whole(image.width, width as usize),
        &Axis::whole(image.height, height as usize),
    )
}

/// One direction of a resize: which part of the result is wanted.
#[derive(Clone, Debug)]
struct Axis {
    source_len: usize,
    result_len: u64,
    window: Range<u64>,
}

impl Axis {
    fn whole(source_len: usize, result_len: usize) -> Self {
        Self::part(source_len, result_len as u64, 0..result_len as u64)
    }

    /// The middle `crop` pixels after the shorter side has become `crop` long.
    /// The arithmetic is Python's: true division, truncation, and an offset
    /// rounded half to even.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "lengths are positive and far below 2^53"
    )]
    fn centered(source_len: usize, shorter: usize, crop: u64) -> Self {
        let result_len = ((crop * source_len as u64) as f64 / shorter as f64) as u64;
        let start = ((result_len - crop) as f64 / 2.0).round_ties_even() as u64;
        Self::part(source_len, result_len, start..start + crop)
    }

    fn part(source_len: usize, result_len: u64, window: Range<u64>) -> Self {
        Self {
            source_len,
            result_len,
            window,
        }
    }

    /// Every pixel as it is.
    fn identity(source_len: usize) -> Self {
        Self::whole(source_len, source_len)
    }

    /// Whether the length stays, so that Pillow skips the pass.
    fn is_identity(&self) -> bool {
        self.source_len as u64 == self.result_len
    }

    /// By how much the length shrinks; negative when it grows.
    fn shrinkage(&self) -> i128 {
        self.source_len as i128 - i128::from(self.result_len)
    }

    fn taps(&self) -> Vec<Taps> {
        self.window
            .clone()
            .map(|position| Taps::new(self, position))
            .collect()
    }
}

/// The source pixels that one result pixel is a weighted mean of.
///
/// The weights themselves are computed when they are needed: keeping all of
/// them would take memory in proportion to the longest side.
#[derive(Clone, Debug)]
struct Taps {
    source: Range<usize>,
    center: f64,
    /// One over the filter's half width in source pixels.
    sharpness: f64,
    total: f64,
}

impl Taps {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "positions are clamped to the source, which is far below 2^53"
    )]
    fn new(axis: &Axis, position: u64) -> Self {
        if axis.is_identity() {
            let index = position as usize;
            return Self {
                source: index..index + 1,
                center: index as f64 + 0.5,
                sharpness: 1.0,
                total: 1.0,
            };
        }
        let scale = axis.source_len as f64 / axis.result_len as f64;
        let support = scale.max(1.0);
        let center = (position as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(axis.source_len);
        let mut taps = Self {
            source: first..end,
            center,
            sharpness: 1.0 / support,
            total: 1.0,
        };
        taps.total = (first..end).map(|index| taps.raw(index)).sum();
        taps
    }

    #[expect(clippy::cast_precision_loss, reason = "indexes are far below 2^53")]
    fn raw(&self, index: usize) -> f64 {
        let distance = (index as f64 - self.center + 0.5) * self.sharpness;
        (1.0 - distance.abs()).max(0.0)
    }

    /// The weight of one source pixel in fixed point, rounded half up.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a weight lies between 0 and 1, so it fits"
    )]
    fn weight(&self, index: usize) -> u32 {
        (0.5 + self.raw(index) / self.total * WEIGHT_ONE) as u32
    }
}

/// Both passes, for the window that the two axes name.
fn resample(image: RgbView<'_>, horizontal: &Axis, vertical: &Axis) -> RgbImage {
    // Pillow 13's rule (python-pillow/Pillow#9549), meant to save time there.
    let vertical_first =
        vertical.shrinkage() > 0 && vertical.shrinkage() > 2 * horizontal.shrinkage();
    if vertical_first && !horizontal.is_identity() {
        let shrunk = horizontal_first(image, &Axis::identity(image.width), vertical);
        let rows = Axis::identity(shrunk.height as usize);
        return horizontal_first(shrunk.view(), horizontal, &rows);
    }
    horizontal_first(image, horizontal, vertical)
}

fn horizontal_first(image: RgbView<'_>, horizontal: &Axis, vertical: &Axis) -> RgbImage {
    let columns = Columns {
        taps: horizontal.taps(),
        identity: horizontal.is_identity(),
    };
    let rows = vertical.taps();
    let row_bytes = columns.taps.len() * 3;
    let mut sums = vec![HALF; rows.len() * row_bytes];

    let needed_end = rows.last().map_or(0, |taps| taps.source.end);
    let block_rows = (BLOCK_BYTES / (image.width * 3)).clamp(16, BLOCK_ROWS_MAX);
    let mut start = rows.first().map_or(0, |taps| taps.source.start);
    let mut block = Vec::new();
    while start < needed_end {
        let end = needed_end.min(start + block_rows);
        block.resize((end - start) * row_bytes, 0);
        columns.apply(image, start..end, &mut block);
        for (taps, sums) in rows.iter().zip(sums.chunks_exact_mut(row_bytes)) {
            for row in taps.source.start.max(start)..taps.source.end.min(end) {
                let pixels = &block[(row - start) * row_bytes..][..row_bytes];
                add_weighted(sums, pixels, taps.weight(row));
            }
        }
        start = end;
    }
    RgbImage {
        width: side_of(columns.taps.len()),
        height: side_of(rows.len()),
        pixels: sums.into_iter().map(to_byte).collect(),
    }
}

/// The horizontal pass.
struct Columns {
    taps: Vec<Taps>,
    identity: bool,
}

impl Columns {
    /// Computes the result's columns of some source rows.
    fn apply(&self, image: RgbView<'_>, rows: Range<usize>, block: &mut [u8]) {
        let source_bytes = image.width * 3;
        let row_bytes = self.taps.len() * 3;
        let source = &image.pixels[rows.start * source_bytes..rows.end * source_bytes];
        let source = source.chunks_exact(source_bytes);
        if self.identity {
            let first = self.taps.first().map_or(0, |taps| taps.source.start);
            for (from, to) in source.zip(block.chunks_exact_mut(row_bytes)) {
                to.copy_from_slice(&from[first * 3..][..row_bytes]);
            }
            return;
        }
        let mut weights = Weights::default();
        for (column, taps) in self.taps.iter().enumerate() {
            weights.fill(taps);
            let span = taps.source.start * 3..taps.source.end * 3;
            for (from, to) in source.clone().zip(block.chunks_exact_mut(row_bytes)) {
                to[column * 3..][..3].copy_from_slice(&weights.apply(&from[span.clone()]));
            }
        }
    }
}

/// Adds one row's part to the vertical pass's sums.
fn add_weighted(sums: &mut [u32], pixels: &[u8], weight: u32) {
    // The same product twice: of 16 bits it is far faster, see `Weights`.
    if let Ok(weight) = u16::try_from(weight) {
        for (sum, &pixel) in sums.iter_mut().zip(pixels) {
            *sum += u32::from(weight) * u32::from(pixel);
        }
    } else {
        for (sum, &pixel) in sums.iter_mut().zip(pixels) {
            *sum += weight * u32::from(pixel);
        }
    }
}

/// The weights of one result column, three times each so that they line up with
/// red, green and blue, in 16-bit halves: the product of a byte and a half is
/// an operation that every x86-64 and ARM vector unit has, and in the compiler's
/// default target a 32-bit product is not.
#[derive(Debug, Default)]
struct Weights {
    low: Vec<u16>,
    /// Empty when all are zero, as they are when shrinking 64-fold or more.
    high: Vec<u16>,
}

impl Weights {
    #[expect(clippy::cast_possible_truncation, reason = "the halves are meant")]
    fn fill(&mut self, taps: &Taps) {
        self.low.clear();
        self.high.clear();
        let mut seen = 0;
        for index in taps.source.clone() {
            let weight = taps.weight(index);
            seen |= weight;
            self.low.extend([weight as u16; 3]);
        }
        if seen > u32::from(u16::MAX) {
            for index in taps.source.clone() {
                self.high.extend([(taps.weight(index) >> 16) as u16; 3]);
            }
        }
    }

    fn apply(&self, pixels: &[u8]) -> [u8; 3] {
        let low = dot3(pixels, &self.low);
        if self.high.is_empty() {
            low.map(|low| to_byte(HALF + low))
        } else {
            let high = dot3(pixels, &self.high);
            std::array::from_fn(|channel| to_byte(HALF + low[channel] + (high[channel] << 16)))
        }
    }
}

/// The weighted sums of interleaved red, green and blue.
///
/// No sum overflows: the weights add up to one (2^22) but for their rounding,
/// which at most doubles it, and a pixel is below 2^8.
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

#[expect(clippy::cast_possible_truncation, reason = "clamped to a byte")]
fn to_byte(sum: u32) -> u8 {
    (sum >> WEIGHT_BITS).min(255) as u8
}

fn side_of(len: usize) -> u32 {
    u32::try_from(len).expect("a result's side is the model's, or 7 times it")
}

#[cfg(test)]
mod tests;
