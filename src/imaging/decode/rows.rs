//! Rows of pixels on their way out of the decoders.

use super::super::turn::{Turn, turned};
use super::super::{Alpha, RgbImage};
use super::pixels::Pixels;

/// Receiver of the rows of an image as they are decoded, from top to bottom.
pub(crate) trait RowSink {
    /// Prepares for an image of a size, which then has to be turned.
    fn begin(&mut self, width: u32, height: u32, turn: Turn);

    /// Takes the next rows, whole ones of RGB.
    fn take(&mut self, rows: &[u8]);
}

/// Bytes of rows that are converted at a time.
const BLOCK_BYTES: usize = 64 << 10;

impl Pixels {
    /// Gives the pixels to a sink.
    pub(super) fn pour(self, alpha: Alpha, turn: Turn, sink: &mut dyn RowSink) {
        sink.begin(self.width, self.height, turn);
        let row_bytes = self.width as usize * self.layout.channels();
        let block = (BLOCK_BYTES / row_bytes).max(1) * row_bytes;
        for rows in self.data.chunks(block) {
            match self.layout.to_rgb(alpha, rows) {
                Some(rows) => sink.take(&rows),
                None => sink.take(rows),
            }
        }
    }
}

/// Sink that gathers a whole image.
#[derive(Default)]
pub(super) struct WholeImage {
    image: RgbImage,
    turn: Turn,
}

impl WholeImage {
    /// Returns the image, upright.
    pub(super) fn upright(self) -> RgbImage {
        turned(self.image, self.turn)
    }
}

impl RowSink for WholeImage {
    fn begin(&mut self, width: u32, height: u32, turn: Turn) {
        self.turn = turn;
        self.image = RgbImage {
            width,
            height,
            pixels: Vec::with_capacity(width as usize * height as usize * 3),
        };
    }

    fn take(&mut self, rows: &[u8]) {
        self.image.pixels.extend_from_slice(rows);
    }
}
