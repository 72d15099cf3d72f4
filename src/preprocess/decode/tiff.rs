//! TIFF, its first page.
//!
//! The `tiff` crate itself, not `image`'s wrapper: the wrapper refuses palettes
//! and small grays, and truncates where Pillow rounds in CMYK.

use image::metadata::Orientation;
use tiff::decoder::{Decoder, DecodingResult, Limits};
use tiff::tags::Tag;
use tiff::{ColorType, TiffError};

use super::pixels::{Layout, Pixels};
use super::{Header, PreprocessError, orientation};

const XMP: Tag = Tag::Unknown(700);

/// What the samples of a pixel mean.
#[derive(Clone, Copy)]
enum Samples {
    As(Layout),
    Cmyk,
    Palette,
}

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let fail = |error| failure(header, error);
    if let Some(as_gray) = palette_as_gray(bytes) {
        return decode_samples(&as_gray, true, header).map_err(fail)?;
    }
    decode_samples(bytes, false, header).map_err(fail)?
}

fn failure(header: Header<'_>, error: TiffError) -> PreprocessError {
    match error {
        TiffError::UnsupportedError(error) => header.unsupported(error),
        error => header.damaged(error),
    }
}

/// The outer error is the decoder's, the inner one ours.
fn decode_samples(
    bytes: &[u8],
    palette: bool,
    header: Header<'_>,
) -> Result<Result<(Pixels, Orientation), PreprocessError>, TiffError> {
    let mut decoder = Decoder::new(header.source(bytes))?;
    let (width, height) = decoder.dimensions()?;
    let color = decoder.colortype()?;
    let (samples, bits) = match color {
        ColorType::Gray(bits) if palette => (Samples::Palette, bits),
        ColorType::Gray(bits) => (Samples::As(Layout::Gray), bits),
        ColorType::GrayA(bits) => (Samples::As(Layout::GrayAlpha), bits),
        ColorType::RGB(bits) => (Samples::As(Layout::Rgb), bits),
        ColorType::RGBA(bits) => (Samples::As(Layout::Rgba), bits),
        ColorType::CMYK(bits) => (Samples::Cmyk, bits),
        color => return Ok(Err(header.unsupported(format!("{color:?}")))),
    };
    let channels = match samples {
        Samples::As(layout) => layout.channels(),
        Samples::Cmyk => 4,
        Samples::Palette => 1,
    };
    let sample_bytes = u64::from(bits).div_ceil(8);
    // The decoder's buffer, and the bytes that are made of it.
    if let Err(error) = header.admit(width, height, (sample_bytes + 1) * channels as u64 + 3) {
        return Ok(Err(error));
    }
    let mut limits = Limits::default();
    limits.decoding_buffer_size = header.decode_bytes_max();
    limits.intermediate_buffer_size = header.decode_bytes_max();
    limits.ifd_value_size = header.decode_bytes_max();
    let mut decoder = decoder.with_limits(limits);
    let turned = decoder.find_tag_unsigned::<u16>(Tag::Orientation)?;
    let xmp = decoder.get_tag_u8_vec(XMP).ok();
    let orientation = turned
        .and_then(|value| Orientation::from_exif(u8::try_from(value).ok()?))
        .unwrap_or_else(|| orientation(None, xmp.as_deref()));
    let colors = match samples {
        Samples::Palette => decoder.get_tag_u16_vec(Tag::ColorMap)?,
        Samples::As(_) | Samples::Cmyk => Vec::new(),
    };

    let mut result = DecodingResult::U8(Vec::new());
    let planes = decoder.read_image_to_buffer(&mut result)?;
    if result.as_buffer(0).as_bytes().len() < planes.complete_len {
        return Err(TiffError::LimitsExceeded);
    }
    let data = match result {
        DecodingResult::U8(data) if bits == 8 => data,
        DecodingResult::U8(data) if bits < 8 && channels == 1 => {
            unpack(&data, width as usize, bits, palette)
        }
        // Of 16 bits, the high byte.
        DecodingResult::U16(data) if bits == 16 && !palette => {
            data.into_iter().map(|word| word.to_be_bytes()[0]).collect()
        }
        _ => return Ok(Err(header.unsupported(format!("{color:?} samples")))),
    };
    let data = if planes.planes > 1 {
        interleave(&data, planes.planes)
    } else {
        data
    };
    let (layout, data) = match samples {
        Samples::As(layout) => (layout, data),
        Samples::Cmyk => (Layout::Rgb, cmyk_to_rgb(&data)),
        Samples::Palette => (Layout::Rgb, look_up(&data, &colors)),
    };
    if data.len() != width as usize * height as usize * layout.channels() {
        return Ok(Err(header.damaged("samples are missing")));
    }
    let pixels = Pixels {
        width,
        height,
        layout,
        data,
    };
    Ok(Ok((pixels, orientation)))
}

/// The file with its palette declared gray, when it has one: the decoder then
/// gives the indexes, which it otherwise refuses to.
fn palette_as_gray(bytes: &[u8]) -> Option<Vec<u8>> {
    const PHOTOMETRIC: u16 = 262;
    const PALETTE: u16 = 3;
    const BLACK_IS_ZERO: u16 = 1;
    let little = bytes.starts_with(b"II");
    let word = |at: usize| {
        let word = *bytes.get(at..)?.first_chunk()?;
        Some(if little {
            u16::from_le_bytes(word)
        } else {
            u16::from_be_bytes(word)
        })
    };
    // BigTIFF (43) has other offsets, and its palettes stay refused.
    if word(2)? != 42 {
        return None;
    }
    let offset = *bytes.get(4..)?.first_chunk()?;
    let directory = if little {
        u32::from_le_bytes(offset)
    } else {
        u32::from_be_bytes(offset)
    } as usize;
    let entries = usize::from(word(directory)?);
    let value = (0..entries)
        .map(|entry| directory + 2 + entry * 12)
        .find(|&at| word(at) == Some(PHOTOMETRIC))?
        + 8;
    if word(value)? != PALETTE {
        return None;
    }
    let mut copy = bytes.to_vec();
    let gray = if little {
        BLACK_IS_ZERO.to_le_bytes()
    } else {
        BLACK_IS_ZERO.to_be_bytes()
    };
    copy[value..value + 2].copy_from_slice(&gray);
    Some(copy)
}

/// Samples of 1, 2 or 4 bits as bytes: indexes as they are, gray levels spread
/// to 255. Each row starts on a byte.
fn unpack(data: &[u8], width: usize, bits: u8, palette: bool) -> Vec<u8> {
    let mask = (1_u8 << bits) - 1;
    let factor = if palette { 1 } else { 255 / mask };
    let per_byte = usize::from(8 / bits);
    data.chunks(width.div_ceil(per_byte))
        .flat_map(|row| {
            (0..width.min(row.len() * per_byte)).map(move |column| {
                let place = u8::try_from(column % per_byte).expect("8 at most");
                let shift = 8 - bits * (place + 1);
                (row[column / per_byte] >> shift & mask) * factor
            })
        })
        .collect()
}

fn interleave(data: &[u8], planes: usize) -> Vec<u8> {
    let plane = data.len() / planes;
    (0..plane)
        .flat_map(|pixel| (0..planes).map(move |channel| data[channel * plane + pixel]))
        .collect()
}

/// Pillow's formula: each ink and black multiply, rounded to nearest.
fn cmyk_to_rgb(data: &[u8]) -> Vec<u8> {
    let (pixels, _) = data.as_chunks::<4>();
    pixels
        .iter()
        .flat_map(|&[cyan, magenta, yellow, black]| {
            let light = 255 - u32::from(black);
            [cyan, magenta, yellow].map(|ink| {
                let product = u32::from(ink) * light + 128;
                let product = (product + (product >> 8)) >> 8;
                u8::try_from(light - product).unwrap_or(0)
            })
        })
        .collect()
}

/// Colors from a map of 16-bit levels: all reds, all greens, all blues.
fn look_up(indexes: &[u8], colors: &[u16]) -> Vec<u8> {
    let count = colors.len() / 3;
    let level = |channel: usize, index: usize| {
        let word = if index < count {
            colors[channel * count + index]
        } else {
            0
        };
        word.to_be_bytes()[0]
    };
    indexes
        .iter()
        .flat_map(|&index| [0, 1, 2].map(|channel| level(channel, index.into())))
        .collect()
}
