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
    // Pillow does not miss the last chunk, which says nothing; the decoder does.
    let ended = with_end(bytes);
    let source = header.source(ended.as_deref().unwrap_or(bytes));
    let mut decoder = png::Decoder::new_with_limits(source, limits);
    decoder.set_ignore_text_chunk(true);
    decoder.set_ignore_iccp_chunk(true);
    // Palettes and small grays become bytes, transparent colors become alpha,
    // and 16-bit samples keep their high byte.
    decoder.set_transformations(Transformations::EXPAND | Transformations::STRIP_16);
    let info = decoder.read_header_info().map_err(fail)?;
    let (width, height) = info.size();
    header.admit_pixels(width, height)?;
    let copy_bytes = ended.as_ref().map_or(0, Vec::capacity) as u64;
    let other_bytes = row_bytes(info) + 3 * chunk_bytes + copy_bytes + OTHER_BYTES;
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
    // Of several chunks the last one counts.
    let stored = chunks(bytes).filter_map(exif).last();
    let text = match stored {
        None => chunks(bytes).filter_map(exif_text).last(),
        Some(_) => None,
    };
    let xmp = chunks(bytes).filter_map(xmp).last();
    let orientation = orientation(stored.or(text.as_deref()), xmp);
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

/// Returns a copy of a file with its last chunk, if the file ends behind a whole
/// chunk of another kind.
fn with_end(bytes: &[u8]) -> Option<Vec<u8>> {
    let (mut len, mut last) = (8, *b"IHDR");
    for (kind, body) in chunks(bytes) {
        len += 12 + body.len();
        last = *kind;
        if last == *b"IEND" {
            return None;
        }
    }
    (len == bytes.len() && last == *b"IDAT")
        .then(|| [bytes, b"\0\0\0\0IEND\xae\x42\x60\x82"].concat())
}

/// Most bytes of EXIF data as text, which is twice as long and more.
const TEXT_BYTES_MAX: usize = 256 << 10;

/// Returns the EXIF data in a chunk of their own, or in a text of that name,
/// before the pixels or after them.
fn exif<'a>((kind, body): (&[u8; 4], &'a [u8])) -> Option<&'a [u8]> {
    match kind {
        b"eXIf" => Some(body),
        b"tEXt" => body.strip_prefix(b"exif\0"),
        _ => None,
    }
}

/// Returns the EXIF data in a text chunk of ImageMagick's: after three line
/// breaks, two digits for each byte.
fn exif_text((kind, body): (&[u8; 4], &[u8])) -> Option<Vec<u8>> {
    let text = body.strip_prefix(b"Raw profile type exif\0")?;
    let inflated;
    let text = match kind {
        b"tEXt" => text,
        b"zTXt" => {
            inflated = inflate(text.strip_prefix(b"\0")?)?;
            &inflated
        }
        b"iTXt" => {
            let (packed, text) = international(text)?;
            if packed {
                inflated = inflate(text)?;
                &inflated
            } else {
                text
            }
        }
        _ => return None,
    };
    let lines = text.get(..TEXT_BYTES_MAX.min(text.len()))?;
    let digits: Vec<u8> = lines
        .split(|&byte| byte == b'\n')
        .skip(3)
        .flatten()
        .filter(|byte| !byte.is_ascii_whitespace())
        .map(|&byte| char::from(byte).to_digit(16)?.try_into().ok())
        .collect::<Option<_>>()?;
    let (pairs, _) = digits.as_chunks::<2>();
    Some(pairs.iter().map(|[high, low]| high << 4 | low).collect())
}

/// Inflates a text of at most [`TEXT_BYTES_MAX`] bytes.
fn inflate(bytes: &[u8]) -> Option<Vec<u8>> {
    let mut text = Vec::with_capacity(TEXT_BYTES_MAX);
    let mut decoder = flate2::Decompress::new(true);
    let status = decoder.decompress_vec(bytes, &mut text, flate2::FlushDecompress::Finish);
    (status.ok()? == flate2::Status::StreamEnd).then_some(text)
}

/// Returns the text of an XMP chunk that is not compressed.
fn xmp<'a>((kind, body): (&[u8; 4], &'a [u8])) -> Option<&'a [u8]> {
    let body = body.strip_prefix(b"XML:com.adobe.xmp\0")?;
    let (packed, text) = international(body).filter(|_| kind == b"iTXt")?;
    (!packed).then_some(text)
}

/// Returns the text in what follows the name of an iTXt chunk, and true if the
/// text is compressed: two bytes for compression, a language, and the name in
/// that language.
fn international(body: &[u8]) -> Option<(bool, &[u8])> {
    let (&[packed, method], rest) = body.split_first_chunk()?;
    let text = rest.splitn(3, |&byte| byte == 0).nth(2)?;
    (packed == 0 || method == 0).then_some((packed != 0, text))
}
