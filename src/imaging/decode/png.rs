//! Decoder of PNG files.
//!
//! Uses the `png` crate itself, not `image`'s wrapper: the wrapper checks the
//! size without reporting it, keeps text chunks and inflates color profiles.
//! Here text chunks and color profiles are skipped unread, so a decompression
//! bomb in them costs nothing.
//!
//! Memory: up to 4 bytes per pixel, some rows as they are stored, and the
//! largest chunk other than pixels. Work: each byte of the file once, and each
//! pixel once; data that is compressed behind the last pixel is not inflated.

use image::metadata::Orientation;
use png::{BitDepth, ColorType, DecodingError, Limits, Transformations};

use super::pixels::{PixelLayout, Pixels};
use super::{Header, PreprocessError, orientation};

/// Bytes of windows and buffers for inflating.
const OTHER_BYTES: u64 = 512 << 10;
/// Most bytes of a palette: three for each of 256 colors. The decoder panics on
/// larger palettes, and on palettes that end within a color.
const PALETTE_BYTES_MAX: usize = 3 * 256;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let fail = |error: DecodingError| header.damaged(error);
    let chunk_bytes = largest_chunk(bytes);
    let limits = Limits {
        bytes: header.decode_bytes_max(),
    };
    let mut decoder = png::Decoder::new_with_limits(header.source(bytes), limits);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    // Palettes and small grays become bytes, transparent colors become alpha,
    // and 16-bit samples keep their high byte.
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let info = decoder.read_header_info().map_err(fail)?;
    let (width, height) = info.size();
    header.admit_pixels(width, height)?;
    let other_bytes = row_bytes(info) + 3 * chunk_bytes + OTHER_BYTES;
    header.admit(width, height, pixel_bytes(info.color_type), other_bytes)?;

    let mut reader = decoder.read_info().map_err(fail)?;
    if let Some(palette) = &reader.info().palette
        && (palette.len() % 3 != 0 || palette.len() > PALETTE_BYTES_MAX)
    {
        return Err(header.damaged(format!(
            "a palette of {} bytes; it must have 3 bytes per color and at most {PALETTE_BYTES_MAX}",
            palette.len()
        )));
    }
    let layout = match reader.output_color_type() {
        (ColorType::Grayscale, BitDepth::Eight) => PixelLayout::Gray,
        (ColorType::GrayscaleAlpha, BitDepth::Eight) => PixelLayout::GrayAlpha,
        (ColorType::Rgb, BitDepth::Eight) => PixelLayout::Rgb,
        (ColorType::Rgba, BitDepth::Eight) => PixelLayout::Rgba,
        (color, depth) => return Err(header.unsupported(format!("{color:?} of {depth:?} bits"))),
    };
    let mut data = vec![0; width as usize * height as usize * layout.channels()];
    reader.next_frame(&mut data).map_err(fail)?;
    let orientation = orientation(chunk(bytes, *b"eXIf"), chunk(bytes, *b"iTXt").and_then(xmp));
    let pixels = Pixels {
        width,
        height,
        layout,
        data,
    };
    Ok((pixels, orientation))
}

/// Returns the most bytes per pixel, with the alpha that a transparent color
/// makes.
fn pixel_bytes(color: ColorType) -> u64 {
    match color {
        ColorType::Grayscale | ColorType::GrayscaleAlpha => 2,
        ColorType::Rgb | ColorType::Indexed | ColorType::Rgba => 4,
    }
}

/// Returns the bytes of the rows that the decoder holds as stored.
fn row_bytes(info: &png::Info<'_>) -> u64 {
    const ROWS: u64 = 16;
    let row = info.raw_row_length() as u64;
    let rows = ROWS.min(2 * u64::from(info.height));
    // Two more rows are held as they are returned.
    row * rows + 8 * u64::from(info.width)
}

/// Returns the bytes of the largest chunk that is held whole. Chunks of pixels
/// are not held whole.
fn largest_chunk(bytes: &[u8]) -> u64 {
    chunks(bytes)
        .filter(|(kind, _)| ![*b"IDAT", *b"fdAT"].contains(*kind))
        .map(|(_, body)| body.len() as u64)
        .max()
        .unwrap_or(0)
}

/// Returns the body of the first chunk of a kind, before the pixels or after
/// them. Of text chunks, returns the first that holds XMP.
fn chunk(bytes: &[u8], kind: [u8; 4]) -> Option<&[u8]> {
    chunks(bytes)
        .find(|(found, body)| **found == kind && (kind != *b"iTXt" || xmp(body).is_some()))
        .map(|(_, body)| body)
}

/// Iterates over the kinds and bodies of all chunks that are whole.
fn chunks(bytes: &[u8]) -> impl Iterator<Item = (&[u8; 4], &[u8])> {
    let mut rest = bytes.get(8..).unwrap_or(&[]);
    std::iter::from_fn(move || {
        let (len, after) = rest.split_first_chunk::<4>()?;
        let (kind, after) = after.split_first_chunk::<4>()?;
        let (body, after) = after.split_at_checked(u32::from_be_bytes(*len) as usize)?;
        rest = after.get(4..)?;
        Some((kind, body))
    })
}

/// Returns the text of an XMP chunk that is not compressed.
fn xmp(body: &[u8]) -> Option<&[u8]> {
    body.strip_prefix(b"XML:com.adobe.xmp\0\0\0")
}
