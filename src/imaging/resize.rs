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
//! Rows are taken as they are decoded, and an image that has to be turned is
//! not turned before but resized along its own rows and columns, with the same
//! weights. Memory does not grow with the image: of a result row only the sums
//! are kept, and of an intermediate size only the window that is needed is
//! computed. A 1 x 4000 image whose center crop goes through 224 x 896000 costs
//! three rows.

use self::across::Across;
use self::axis::Axis;
use self::down::Down;
use super::turn::Turn;
use super::{Fit, RgbImage, RgbView};

mod across;
#[cfg(target_arch = "x86_64")]
mod avx2;
mod axis;
mod down;
mod weights;

/// Number of fractional bits of a weight: 32, less 8 for the pixel, less 2 for
/// sums that overshoot. The number is Pillow's choice, and affects the result.
const WEIGHT_BITS: u32 = 32 - 8 - 2;
const HALF: u32 = 1 << (WEIGHT_BITS - 1);

/// Bytes of rows that a pass takes at a time, so that they stay in the
/// second-level cache.
const BLOCK_BYTES: usize = 256 * 1024;

/// Side of the crop, as a multiple of the model's side: the paper crops 224
/// pixels, which become 32.
const CROP_FACTOR: u64 = 7;

/// Resizes an image to the model's square.
///
/// # Panics
///
/// When `side` is 0, or the image has no pixels.
#[must_use]
pub fn resize(image: RgbView<'_>, side: u32, fit: Fit) -> RgbImage {
    let mut resize = RowResize::new((image.width, image.height), Turn::default(), side, fit);
    resize.take(image.pixels);
    resize.finish()
}

/// Resizes an image as Pillow's `Image.resize((width, height), BILINEAR)` does.
///
/// # Panics
///
/// When `width` or `height` is 0, or the image has no pixels.
#[must_use]
pub fn resize_to(image: RgbView<'_>, width: u32, height: u32) -> RgbImage {
    assert!(width > 0 && height > 0, "an image has pixels");
    let horizontal = Axis::whole(image.width, width as usize);
    let vertical = Axis::whole(image.height, height as usize);
    resample(image, &horizontal, &vertical)
}

/// Resize of an image whose rows come one after another.
pub(crate) struct RowResize {
    first: Resample,
    turn: Turn,
    side: u32,
    fit: Fit,
}

impl RowResize {
    /// Prepares for an image of a width and height, before it is turned.
    pub(crate) fn new(size: (usize, usize), turn: Turn, side: u32, fit: Fit) -> Self {
        assert!(side > 0, "a model's image has pixels");
        let (width, height) = if turn.transposed {
            (size.1, size.0)
        } else {
            size
        };
        let (horizontal, vertical) = match fit {
            Fit::Squash => (
                Axis::whole(width, side as usize),
                Axis::whole(height, side as usize),
            ),
            Fit::CenterCrop => {
                let crop = u64::from(side) * CROP_FACTOR;
                let shorter = width.min(height);
                (
                    Axis::centered(width, shorter, crop),
                    Axis::centered(height, shorter, crop),
                )
            }
        };
        Self {
            first: Resample::new(&horizontal, &vertical, turn),
            turn,
            side,
            fit,
        }
    }

    /// Takes the next rows of the image, any number of them.
    pub(crate) fn take(&mut self, rows: &[u8]) {
        self.first.take(rows);
    }

    /// Returns the resized and turned image, after all rows were taken.
    pub(crate) fn finish(self) -> RgbImage {
        let image = self.first.finish();
        let image = if self.turn.transposed {
            transposed(&image)
        } else {
            image
        };
        match self.fit {
            Fit::Squash => image,
            Fit::CenterCrop => resize_to(image.view(), self.side, self.side),
        }
    }
}

/// Runs both passes over an image, for the window that the two axes select.
fn resample(image: RgbView<'_>, horizontal: &Axis, vertical: &Axis) -> RgbImage {
    let mut resample = Resample::new(horizontal, vertical, Turn::default());
    resample.take(image.pixels);
    resample.finish()
}

/// Both passes over an image whose rows come one after another. The result is
/// not transposed yet, even if the image has to be.
struct Resample {
    across: Across,
    down: Down,
    /// True if the pass over the rows' pixels is before the one over the rows.
    across_first: bool,
    /// True if the last result row is finished first.
    from_bottom: bool,
    /// Bytes of a row of the image.
    row_bytes: usize,
    /// Rows taken.
    rows: usize,
    /// Rows between the two passes.
    between: Vec<u8>,
    /// Result rows in the order in which they are finished.
    result: Vec<u8>,
}

impl Resample {
    /// Prepares for an image whose axes are those of the result: if it has to
    /// be transposed, the horizontal axis goes along its columns.
    fn new(horizontal: &Axis, vertical: &Axis, turn: Turn) -> Self {
        // Pillow 13's rule (python-pillow/Pillow#9549), which saves time in Pillow.
        let vertical_first = vertical.shrinkage() > 0
            && vertical.shrinkage() > 2 * horizontal.shrinkage()
            && !horizontal.is_identity();
        let (across, down) = if turn.transposed {
            (vertical, horizontal)
        } else {
            (horizontal, vertical)
        };
        let row_bytes = across.source_len * 3;
        // A pass that keeps every row may be the second one as well.
        let across_first = vertical_first == turn.transposed || down.is_identity();
        let down_taps = down.taps(turn.from_bottom);
        let across = Across::new(across, turn.from_right);
        let passed_bytes = if across_first {
            across.result_bytes()
        } else {
            row_bytes
        };
        Self {
            down: Down::new(down_taps, turn.from_bottom, passed_bytes),
            across,
            across_first,
            from_bottom: turn.from_bottom,
            row_bytes,
            rows: 0,
            between: Vec::new(),
            result: Vec::new(),
        }
    }

    fn take(&mut self, rows: &[u8]) {
        let block = (BLOCK_BYTES / self.row_bytes).max(1) * self.row_bytes;
        for rows in rows.chunks(block) {
            if self.across_first {
                self.take_across(rows);
            } else {
                self.take_down(rows);
            }
            self.rows += rows.len() / self.row_bytes;
        }
    }

    fn take_across(&mut self, rows: &[u8]) {
        let needed = self.down.needed();
        let skipped = needed.start.saturating_sub(self.rows);
        let count = needed.end.saturating_sub(self.rows);
        let count = count.min(rows.len() / self.row_bytes);
        if skipped >= count {
            return;
        }
        let rows = &rows[skipped * self.row_bytes..count * self.row_bytes];
        let result_bytes = self.across.result_bytes();
        self.between.resize((count - skipped) * result_bytes, 0);
        self.across.apply(rows, &mut self.between);
        for (at, row) in self.between.chunks_exact(result_bytes).enumerate() {
            self.down
                .add(self.rows + skipped + at, row, &mut self.result);
        }
    }

    fn take_down(&mut self, rows: &[u8]) {
        for (at, row) in rows.chunks_exact(self.row_bytes).enumerate() {
            self.down.add(self.rows + at, row, &mut self.between);
            if self.between.len() >= BLOCK_BYTES {
                self.pass_on();
            }
        }
    }

    /// Turns the rows between the passes into result rows.
    fn pass_on(&mut self) {
        let rows = self.between.len() / self.row_bytes;
        let done = self.result.len();
        self.result
            .resize(done + rows * self.across.result_bytes(), 0);
        self.across.apply(&self.between, &mut self.result[done..]);
        self.between.clear();
    }

    fn finish(mut self) -> RgbImage {
        if !self.across_first {
            self.pass_on();
        }
        let row_bytes = self.across.result_bytes();
        let (width, height) = (row_bytes / 3, self.result.len() / row_bytes);
        if self.from_bottom {
            for row in 0..height / 2 {
                let (top, bottom) = self.result.split_at_mut((height - 1 - row) * row_bytes);
                top[row * row_bytes..][..row_bytes].swap_with_slice(&mut bottom[..row_bytes]);
            }
        }
        RgbImage {
            width: side_of(width),
            height: side_of(height),
            pixels: self.result,
        }
    }
}

/// Exchanges the rows and columns of an image.
fn transposed(image: &RgbImage) -> RgbImage {
    let (source, _) = image.pixels.as_chunks::<3>();
    let (width, height) = (image.width as usize, image.height as usize);
    let columns = (0..width).flat_map(|x| (0..height).map(move |y| y * width + x));
    RgbImage {
        width: image.height,
        height: image.width,
        pixels: columns.flat_map(|at| source[at]).collect(),
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
