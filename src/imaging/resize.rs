//! Shrinks (or grows) an image to the model's square.
//!
//! Promises the very bytes of Pillow's `Image.resize((side, side), BILINEAR)`
//! on 8-bit RGB: a triangle filter whose support grows with the downscale
//! factor, in two passes that each round to 8 bits, in fixed point with 22
//! fractional bits. The rounding is part of the contract: it decides tokens at
//! the border between two colors. The order of the passes is part of the
//! contract too. As in Pillow 13, the horizontal pass is first except for tall
//! images; up to Pillow 12 it was always first.
//!
//! Memory does not grow with the image: source rows pass through in blocks, and
//! of an intermediate size only the window that is needed is computed. A 1 x
//! 4000 image whose center crop goes through 224 x 896000 costs three rows.

use std::ops::Range;

use self::axis::{Axis, Taps};
use self::weights::ColumnWeights;
use super::{Fit, RgbImage, RgbView};

mod axis;
mod weights;

/// Number of fractional bits of a weight: 32, less 8 for the pixel, less 2 for
/// sums that overshoot. The number is Pillow's choice, and affects the result.
const WEIGHT_BITS: u32 = 32 - 8 - 2;
const HALF: u32 = 1 << (WEIGHT_BITS - 1);

/// Source bytes of one block of rows. A block is read once per output column,
/// so it should stay in the second-level cache.
const BLOCK_BYTES: usize = 512 * 1024;
const BLOCK_ROWS_MAX: usize = 4096;

/// Side of the crop, as a multiple of the model's side: the paper crops 224
/// pixels, which become 32.
const CROP_FACTOR: u64 = 7;

/// Resizes an image to the model's square.
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

/// Resizes an image as Pillow's `Image.resize((width, height), BILINEAR)` does.
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

/// Runs both passes, for the window that the two axes select.
fn resample(image: RgbView<'_>, horizontal: &Axis, vertical: &Axis) -> RgbImage {
    // Pillow 13's rule (python-pillow/Pillow#9549), which saves time in Pillow.
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
        let mut weights = ColumnWeights::default();
        for (column, taps) in self.taps.iter().enumerate() {
            weights.fill(taps);
            let span = taps.source.start * 3..taps.source.end * 3;
            for (from, to) in source.clone().zip(block.chunks_exact_mut(row_bytes)) {
                to[column * 3..][..3].copy_from_slice(&weights.apply(&from[span.clone()]));
            }
        }
    }
}

/// Adds one row's weighted pixels to the sums of the vertical pass.
fn add_weighted(sums: &mut [u32], pixels: &[u8], weight: u32) {
    // Both branches compute the same product. With a 16-bit weight it is far
    // faster, see `ColumnWeights`.
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

fn to_byte(sum: u32) -> u8 {
    (sum >> WEIGHT_BITS).min(255) as u8
}

fn side_of(len: usize) -> u32 {
    u32::try_from(len).expect("a result's side is the model's, or 7 times it")
}

#[cfg(test)]
mod tests;
