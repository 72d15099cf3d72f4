//! Decoder of GIF files, for the first frame only.
//!
//! Uses the `gif` crate itself, not `image`'s wrapper: the wrapper makes
//! transparent pixels black, but Pillow shows the palette's color.
//!
//! The way to the frame is found here, as Pillow finds it: what is no block is
//! skipped byte by byte, and of several control blocks the last one that names a
//! transparent color counts. The decoder is given the screen, the palette, the
//! color that is transparent, and the frame up to its last whole data block.
//! Pillow does not read a data block that is cut short.
//!
//! Memory: one index per pixel of the frame, and 3 or 4 bytes per pixel of the
//! screen on which the frame lies. Work: each byte of the file once, and each
//! pixel once. Codes beyond the last pixel are not expanded.

use std::io::Read as _;

use gif::{DecodeOptions, DecodingError, MemoryLimit};
use image::metadata::Orientation;

use super::pixels::{PixelLayout, Pixels};
use super::{Header, PreprocessError};

/// Bytes per pixel: an index, and the color that is made of the index.
const PIXEL_BYTES: u64 = 5;

/// Bytes of the tables for colors and codes, and of the palette's copy.
const OTHER_BYTES: u64 = 128 << 10;

/// Bytes of the header in front of the palette.
const HEADER: usize = 13;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let fail = |error: DecodingError| header.damaged(error);
    let other_bytes = OTHER_BYTES;
    let mut options = DecodeOptions::new();
    // The limit is for metadata only: the frame's size is checked below.
    options.set_memory_limit(
        u64::try_from(header.decode_bytes_max())
            .ok()
            .and_then(std::num::NonZeroU64::new)
            .map_or(MemoryLimit::Unlimited, MemoryLimit::Bytes),
    );
    let found = Found::read(bytes).ok_or_else(|| header.damaged("no whole header of a frame"))?;
    let transparent = found.transparent;
    let head = found.head();
    // The decoder gives the last pixels only at the end of the data.
    let end = b"\0;".as_slice();
    let file = head.as_slice().chain(header.source(found.frame)).chain(end);
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
    // Pillow reads no orientation from a GIF.
    Ok((pixels, Orientation::NoTransforms))
}

/// The first frame of a file, and what is needed of the file before it.
struct Found<'a> {
    /// The header, with the palette if there is one.
    screen: &'a [u8],
    transparent: Option<u8>,
    /// The frame from its mark to the end of its last whole data block.
    frame: &'a [u8],
}

impl<'a> Found<'a> {
    /// Finds the first frame. Returns `None` if the file ends first.
    fn read(file: &'a [u8]) -> Option<Self> {
        let palette = palette_bytes(*file.get(10)?);
        let (screen, mut rest) = file.split_at_checked(HEADER + palette)?;
        let mut transparent = None;
        loop {
            let (&mark, after) = rest.split_first()?;
            match mark {
                b',' => break,
                b';' => return None,
                b'!' => rest = skip_extension(after, &mut transparent)?,
                _ => rest = after,
            }
        }
        let palette = palette_bytes(*rest.get(9)?);
        // The mark, the description, the palette, and the length of codes.
        let mut len = 10 + palette + 1;
        rest.get(..len)?;
        while let Some(block @ 1..) = rest.get(len).map(|&len| usize::from(len)) {
            if len + 1 + block > rest.len() {
                break;
            }
            len += 1 + block;
        }
        Some(Self {
            screen,
            transparent,
            frame: &rest[..len],
        })
    }

    /// Returns what precedes the frame: the header and the palette, or levels of
    /// gray instead, as Pillow shows the indexes of a frame that has no palette
    /// either.
    fn head(&self) -> Vec<u8> {
        let mut bytes = self.screen.to_vec();
        if bytes.len() == HEADER {
            // The flag of a palette, and the logarithm of its length less one.
            bytes[10] |= 0x87;
            bytes.extend((0..=u8::MAX).flat_map(|level| [level; 3]));
        }
        bytes
    }
}

/// Returns the bytes of the palette that these flags announce.
fn palette_bytes(flags: u8) -> usize {
    if flags & 0x80 == 0 {
        0
    } else {
        3 << ((flags & 7) + 1)
    }
}

/// Takes a data block, which is empty if the file ends before it, and cut short
/// if the file ends within it.
fn take_block<'a>(rest: &mut &'a [u8]) -> &'a [u8] {
    let Some((&len, after)) = rest.split_first() else {
        return &[];
    };
    let (block, after) = after.split_at(after.len().min(len.into()));
    *rest = after;
    block
}

/// Skips an extension as Pillow does, which reads on behind one without data
/// unless it is a comment. Returns `None` if a control block is too short.
fn skip_extension<'a>(bytes: &'a [u8], transparent: &mut Option<u8>) -> Option<&'a [u8]> {
    const CONTROL: u8 = 0xf9;
    const COMMENT: u8 = 0xfe;
    let (&kind, mut rest) = bytes.split_first()?;
    let block = take_block(&mut rest);
    if kind == CONTROL && !block.is_empty() {
        if block[0] & 1 == 1 {
            *transparent = Some(*block.get(3)?);
        }
        block.get(2)?;
    }
    if kind != COMMENT || !block.is_empty() {
        while !take_block(&mut rest).is_empty() {}
    }
    Some(rest)
}

/// Returns the palette as RGBA. Missing colors are black, or levels of gray if
/// the others are: Pillow leaves out such a palette.
fn colors(palette: &[u8], transparent: Option<u8>) -> [[u8; 4]; 256] {
    let (entries, _) = palette.as_chunks::<3>();
    let gray = (0..=u8::MAX)
        .zip(entries)
        .all(|(at, &entry)| entry == [at; 3]);
    let mut colors = [[0, 0, 0, 255]; 256];
    if gray {
        for (color, level) in colors.iter_mut().zip(0..=u8::MAX) {
            color[..3].fill(level);
        }
    }
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
