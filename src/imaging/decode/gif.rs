//! Decoder of GIF files, for the first frame only.
//!
//! Uses the `gif` crate itself, not `image`'s wrapper: the wrapper makes
//! transparent pixels black, but Pillow shows the palette's color.
//!
//! Memory: one index per pixel of the frame, 3 or 4 bytes per pixel of the
//! screen on which the frame lies, and the metadata in front of the frame, as
//! long as in the file. Work: the blocks up to the frame's last pixel, and each
//! pixel once. Bytes behind the frame are not read, and codes beyond the last
//! pixel are not expanded.

use std::io::Read as _;

use gif::{DecodeOptions, DecodingError, MemoryLimit};
use image::metadata::Orientation;

use super::pixels::{PixelLayout, Pixels};
use super::{Header, PreprocessError, orientation};

/// Bytes per pixel: an index, and the color that is made of the index.
const PIXEL_BYTES: u64 = 5;

/// Bytes of the tables for colors and codes.
const OTHER_BYTES: u64 = 128 << 10;

/// Bytes of the header in front of the palette.
const HEADER: usize = 13;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let fail = |error: DecodingError| header.damaged(error);
    // Metadata is collected in a vector that doubles.
    let other_bytes = OTHER_BYTES + 2 * bytes.len() as u64;
    let mut options = DecodeOptions::new();
    // The limit is for metadata only: the frame's size is checked below.
    options.set_memory_limit(
        u64::try_from(header.decode_bytes_max())
            .ok()
            .and_then(std::num::NonZeroU64::new)
            .map_or(MemoryLimit::Unlimited, MemoryLimit::Bytes),
    );
    let (head, rest) = bytes.split_at(bytes.len().min(HEADER));
    let head = with_palette(head);
    let file = head.as_slice().chain(header.source(rest));
    let mut decoder = options.read_info(file).map_err(fail)?;
    let screen = (decoder.width(), decoder.height());
    // A screen without pixels is as large as its frame.
    if screen.0 > 0 && screen.1 > 0 {
        header.admit(screen.0.into(), screen.1.into(), PIXEL_BYTES, other_bytes)?;
    }
    let Some(frame) = decoder.next_frame_info().map_err(fail)? else {
        return Err(header.damaged("no frame"));
    };
    let (left, top) = (usize::from(frame.left), usize::from(frame.top));
    let (frame_width, frame_height) = (usize::from(frame.width), usize::from(frame.height));
    let transparent = frame.transparent;

    // A frame that reaches beyond the screen enlarges it, as in Pillow.
    let width = usize::from(screen.0).max(left + frame_width);
    let height = usize::from(screen.1).max(top + frame_height);
    header.admit(side(width), side(height), PIXEL_BYTES, other_bytes)?;
    if frame_width == 0 || frame_height == 0 {
        return Err(header.damaged("a frame without pixels"));
    }
    let mut frame = vec![0; frame_width * frame_height];
    decoder.read_into_buffer(&mut frame).map_err(fail)?;

    let colors = colors(decoder.palette().map_err(fail)?, transparent);
    let layout = if transparent.is_some() {
        PixelLayout::Rgba
    } else {
        PixelLayout::Rgb
    };
    let channels = layout.channels();
    // Around the frame, Pillow shows the transparent color, or else the first
    // color.
    let around = &colors[usize::from(transparent.unwrap_or(0))][..channels];
    let mut data = Vec::with_capacity(width * height * channels);
    for row in 0..height {
        let inside = row.checked_sub(top).filter(|&row| row < frame_height);
        match inside {
            None => data.extend(around.iter().cycle().take(width * channels)),
            Some(row) => {
                data.extend(around.iter().cycle().take(left * channels));
                for &index in &frame[row * frame_width..][..frame_width] {
                    data.extend_from_slice(&colors[usize::from(index)][..channels]);
                }
                let right = width - left - frame_width;
                data.extend(around.iter().cycle().take(right * channels));
            }
        }
    }
    let pixels = Pixels {
        width: side(width),
        height: side(height),
        layout,
        data,
    };
    Ok((pixels, orientation(None, decoder.xmp_metadata())))
}

/// Adds levels of gray to a header without a palette, as Pillow shows the
/// indexes of a frame that has no palette either.
fn with_palette(header: &[u8]) -> Vec<u8> {
    let mut bytes = header.to_vec();
    if header.len() == HEADER && header[10] & 0x80 == 0 {
        // The flag of a palette, and the logarithm of its length less one.
        bytes[10] |= 0x87;
        bytes.extend((0..=u8::MAX).flat_map(|level| [level; 3]));
    }
    bytes
}

/// Returns the palette as RGBA, with black for missing colors.
fn colors(palette: &[u8], transparent: Option<u8>) -> [[u8; 4]; 256] {
    let mut colors = [[0, 0, 0, 255]; 256];
    let (entries, _) = palette.as_chunks::<3>();
    for (color, entry) in colors.iter_mut().zip(entries) {
        color[..3].copy_from_slice(entry);
    }
    if let Some(index) = transparent {
        colors[usize::from(index)][3] = 0;
    }
    colors
}

fn side(pixels: usize) -> u32 {
    u32::try_from(pixels).expect("a sum of two 16-bit numbers")
}
