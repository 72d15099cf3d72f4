//! PNG.
//!
//! The `png` crate itself, not `image`'s wrapper: the wrapper checks the size
//! without telling it, keeps text chunks and inflates color profiles. Here both
//! are skipped unread, so a compressed bomb in them costs nothing.

use image::metadata::Orientation;
use png::{BitDepth, ColorType, DecodingError, Limits, Transformations};

use super::pixels::{Layout, Pixels};
use super::{Header, PreprocessError, orientation};

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let fail = |error: DecodingError| header.damaged(error);
    let limits = Limits {
        bytes: header.decode_bytes_max(),
    };
    let mut decoder = png::Decoder::new_with_limits(header.source(bytes), limits);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    // Palettes and small grays to bytes, transparent colors to alpha, and of 16
    // bits the high byte.
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let (width, height) = decoder.read_header_info().map_err(fail)?.size();
    header.admit(width, height, 4)?;

    let mut reader = decoder.read_info().map_err(fail)?;
    let layout = match reader.output_color_type() {
        (ColorType::Grayscale, BitDepth::Eight) => Layout::Gray,
        (ColorType::GrayscaleAlpha, BitDepth::Eight) => Layout::GrayAlpha,
        (ColorType::Rgb, BitDepth::Eight) => Layout::Rgb,
        (ColorType::Rgba, BitDepth::Eight) => Layout::Rgba,
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

/// The body of the first chunk of a kind, before the pixels or after them. Of
/// text chunks, the first with XMP.
fn chunk(bytes: &[u8], kind: [u8; 4]) -> Option<&[u8]> {
    let mut rest = bytes.get(8..)?;
    loop {
        let (len, after) = rest.split_first_chunk::<4>()?;
        let (found, after) = after.split_first_chunk::<4>()?;
        let (body, after) = after.split_at_checked(u32::from_be_bytes(*len) as usize)?;
        if *found == kind && (kind != *b"iTXt" || xmp(body).is_some()) {
            return Some(body);
        }
        rest = after.get(4..)?;
    }
}

/// The text of an XMP chunk that is not compressed.
fn xmp(body: &[u8]) -> Option<&[u8]> {
    body.strip_prefix(b"XML:com.adobe.xmp\0\0\0")
}
