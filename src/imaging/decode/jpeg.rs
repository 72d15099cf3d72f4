//! Decoder of JPEG files.
//!
//! Uses the `zune-jpeg` crate itself, not `image`'s wrapper: the wrapper copies
//! the file, parses its headers three times, and accepts a file that is cut
//! short as whole, with the rest gray. CMYK and YCCK become RGB as Pillow's
//! `convert` does, with Adobe's inversion always assumed.
//!
//! The decoder is not given the file, but the parts of the file that
//! [`Outline`] found: its tables, frame and scans, and nothing between or
//! behind them.
//!
//! Memory: the copy of these parts, the pixels, a few rows of blocks, and for a
//! progressive file 2 bytes per coefficient, padded to whole units of the
//! largest sampling.
//!
//! Work: each scan goes over the blocks of its components, whatever the number
//! of its bytes. The sum over all scans is limited to [`PASSES_MAX`] times the
//! pixels that an image may have. After the scans, each block is transformed
//! once.
//!
//! Refused by name, because the decoder gets them wrong: sequential files with
//! more than one scan, luma that is stored at less than the full width,
//! sampling factors that do not divide the largest, chroma at half the width
//! that is at most 2 pixels wide, and progressive files whose first
//! coefficients are not complete, which Pillow smooths.

use image::metadata::Orientation;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use self::outline::{JpegFrame, Outline};
use super::pixels::{PixelLayout, Pixels};
use super::{BudgetedSource, Header, PreprocessError, orientation};

mod outline;

/// Most passes of a file's scans over the pixels of the largest image that is
/// accepted, each component counted for itself. A progressive file of libjpeg's
/// goes over its own pixels 14 times in color, 24 times in CMYK.
const PASSES_MAX: u64 = 32;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let outline = Outline::read(bytes, header)?;
    let frame = &outline.frame;
    let (width, height) = (u32::from(frame.width), u32::from(frame.height));
    header.admit_pixels(width, height)?;
    outline.check(header)?;
    let scanned = outline.scanned();
    check_scans(outline.scans.len(), scanned, header)?;
    header.admit(width, height, 3, held_bytes(&outline))?;

    let (layout, data) = decode_scans(&outline, Colors::Rgb, header)?;
    let pixels = Pixels {
        width,
        height,
        layout,
        data,
    };
    Ok((pixels, orientation(outline.exif, outline.xmp)))
}

/// Requirements on a JPEG inside another file, and the work and memory that the
/// file took so far.
pub(super) struct Inside {
    pub(super) width: u32,
    /// Rows that are needed, and rows of a whole strip or tile. The JPEG must
    /// have one of these two heights.
    pub(super) rows: (u32, u32),
    pub(super) components: usize,
    /// Pixels that the scans of all JPEGs of the file went over so far.
    pub(super) scanned: u64,
    /// Bytes that the file's decoder holds.
    pub(super) held_bytes: u64,
}

/// Decodes a JPEG inside a TIFF to its samples as stored, since the TIFF gives
/// them their meaning.
pub(super) fn decode_samples(
    bytes: &[u8],
    inside: &mut Inside,
    header: Header<'_>,
) -> Result<Vec<u8>, PreprocessError> {
    let outline = Outline::read(bytes, header)?;
    let frame = &outline.frame;
    let (width, height) = (u32::from(frame.width), u32::from(frame.height));
    let fits = width == inside.width
        && [inside.rows.0, inside.rows.1].contains(&height)
        && frame.components.len() == inside.components;
    if !fits {
        return Err(header.damaged(format!(
            "a JPEG of {width} x {height} and {} components in a strip or tile of {} x {} and {} \
             components",
            frame.components.len(),
            inside.width,
            inside.rows.1,
            inside.components
        )));
    }
    header.admit_pixels(width, height)?;
    outline.check(header)?;
    inside.scanned = inside.scanned.saturating_add(outline.scanned());
    check_scans(outline.scans.len(), inside.scanned, header)?;
    let held = inside.held_bytes + held_bytes(&outline);
    header.admit(width, height, inside.components as u64, held)?;
    Ok(decode_scans(&outline, Colors::Stored, header)?.1)
}

/// Colors to which the components are converted.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Colors {
    Rgb,
    /// The components as stored, without conversion.
    Stored,
}

fn decode_scans(
    outline: &Outline<'_>,
    colors: Colors,
    header: Header<'_>,
) -> Result<(PixelLayout, Vec<u8>), PreprocessError> {
    let fail = |error: DecodeErrors| match error {
        DecodeErrors::Unsupported(scheme) => header.unsupported(format!("{scheme:?}")),
        error => header.damaged(format!("{error:?}")),
    };
    let options = DecoderOptions::default()
        // Otherwise the decoder returns gray where it could not decode the file.
        .set_strict_mode(true)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_max_scans(outline::SCANS_MAX);
    // A scan of few bytes can go over the whole image, so the budget is checked
    // at each scan.
    let stops: Vec<usize> = outline.scans.iter().map(|scan| scan.at).collect();
    let source = BudgetedSource::with_stops(&outline.stream, header.budget, &stops);
    let mut decoder = JpegDecoder::new_with_options(source, options);
    decoder.decode_headers().map_err(fail)?;
    let Some(stored) = decoder.input_colorspace() else {
        return Err(header.damaged("no frame header"));
    };
    let (layout, target) = match (stored, colors) {
        (ColorSpace::Luma, _) => (PixelLayout::Gray, ColorSpace::Luma),
        (ColorSpace::MultiBand(_), _) => {
            return Err(header.unsupported("2 components; 1, 3 and 4 are supported"));
        }
        (_, Colors::Rgb) => (PixelLayout::Rgb, ColorSpace::RGB),
        (stored, Colors::Stored) => (PixelLayout::Rgb, stored),
    };
    decoder.set_options(options.jpeg_set_out_colorspace(target));
    let frame = &outline.frame;
    let pixels = usize::from(frame.width) * usize::from(frame.height);
    let mut data = vec![0; pixels * target.num_components()];
    decoder.decode_into(&mut data).map_err(fail)?;
    Ok((layout, data))
}

fn check_scans(scans: usize, pixels: u64, header: Header<'_>) -> Result<(), PreprocessError> {
    let pixels_max = header.limits.image_pixels_max.saturating_mul(PASSES_MAX);
    if pixels > pixels_max {
        return Err(PreprocessError::ScansOverLimit {
            format: header.format,
            scans,
            pixels,
            pixels_max,
            passes: PASSES_MAX,
        });
    }
    Ok(())
}

/// Bytes that the decoder holds beside the pixels.
fn held_bytes(outline: &Outline<'_>) -> u64 {
    /// Huffman tables, with room to spare.
    const TABLES: u64 = 64 << 10;
    const COEFFICIENT: u64 = 2;
    let frame = &outline.frame;
    let coefficients = if frame.progressive {
        frame.padded_pixels() * COEFFICIENT
    } else {
        0
    };
    outline.stream.len() as u64 + coefficients + row_bytes(frame) + TABLES
}

/// Bytes of a row of units in the decoder: as decoded, enlarged, and the part
/// that the next row needs.
fn row_bytes(frame: &JpegFrame) -> u64 {
    const COPIES: u64 = 4;
    let (horizontal, vertical) = frame.largest_sampling();
    let width = u64::from(frame.width).next_multiple_of(8 * horizontal);
    width * 8 * vertical * 2 * COPIES * frame.components.len() as u64
}
