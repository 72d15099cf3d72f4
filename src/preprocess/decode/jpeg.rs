//! JPEG.
//!
//! The `zune-jpeg` crate itself, not `image`'s wrapper: the wrapper copies the
//! file, parses its headers three times, and passes a file that is cut short as
//! whole, the rest gray. CMYK and YCCK become RGB as Pillow's `convert` does,
//! with Adobe's inversion always assumed.

use image::metadata::Orientation;
use zune_jpeg::JpegDecoder;
use zune_jpeg::errors::DecodeErrors;
use zune_jpeg::zune_core::colorspace::ColorSpace;
use zune_jpeg::zune_core::options::DecoderOptions;

use super::pixels::{Layout, Pixels};
use super::{Header, PreprocessError, orientation};

/// Scans of a progressive file. Encoders use about 10; each further one costs a
/// pass over all pixels for a few bytes of input.
const SCANS_MAX: usize = 100;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let fail = |error: DecodeErrors| match error {
        DecodeErrors::Unsupported(scheme) => header.unsupported(format!("{scheme:?}")),
        error => header.damaged(format!("{error:?}")),
    };
    let options = DecoderOptions::default()
        .set_strict_mode(false)
        .set_max_width(usize::MAX)
        .set_max_height(usize::MAX)
        .jpeg_set_max_scans(SCANS_MAX);
    let mut decoder = JpegDecoder::new_with_options(header.source(bytes), options);
    decoder.decode_headers().map_err(fail)?;
    let (Some(info), Some(colors)) = (decoder.info(), decoder.input_colorspace()) else {
        return Err(header.damaged("no frame header"));
    };
    let (width, height) = (info.width.into(), info.height.into());
    let outline = Outline::read(bytes);
    header.admit(
        width,
        height,
        outline.pixel_bytes(info.components, width, height),
    )?;
    if !outline.ended {
        return Err(header.damaged("no end-of-image marker"));
    }

    let (layout, target) = match colors {
        ColorSpace::Luma => (Layout::Gray, ColorSpace::Luma),
        ColorSpace::MultiBand(_) => return Err(header.unsupported("two components")),
        _ => (Layout::Rgb, ColorSpace::RGB),
    };
    decoder.set_options(options.jpeg_set_out_colorspace(target));
    let mut data = vec![0; width as usize * height as usize * layout.channels()];
    decoder.decode_into(&mut data).map_err(fail)?;
    let orientation = orientation(
        decoder.exif().map(Vec::as_slice),
        decoder.xmp().map(Vec::as_slice),
    );
    let pixels = Pixels {
        width,
        height,
        layout,
        data,
    };
    Ok((pixels, orientation))
}

/// What the markers of a file say, without its pixels.
#[derive(Debug, Default, PartialEq)]
struct Outline {
    /// Whether the decoder must keep all coefficients until the end: a
    /// progressive file, or one whose components come in scans of their own.
    buffered: bool,
    /// Whether the end-of-image marker was reached. Without it Pillow refuses
    /// the file as truncated.
    ended: bool,
}

impl Outline {
    fn read(bytes: &[u8]) -> Self {
        let mut outline = Self::default();
        let mut at = 2;
        let mut scans = 0;
        while let Some(marker) = bytes.get(at..at + 2) {
            match marker {
                [0xff, 0xd9] => {
                    outline.ended = true;
                    break;
                }
                // The data of a scan, a stuffed byte or restart marker in it, or
                // padding.
                [0xff, 0x00 | 0x01 | 0xd0..=0xd8] => at += 2,
                [0xff, 0xff] => at += 1,
                [0xff, kind] => {
                    if matches!(kind, 0xc2 | 0xc6 | 0xca | 0xce) {
                        outline.buffered = true;
                    }
                    if *kind == 0xda {
                        scans += 1;
                        outline.buffered |= scans > 1;
                    }
                    let Some(&[high, low]) = bytes.get(at + 2..at + 4) else {
                        break;
                    };
                    at += 2 + usize::from(u16::from_be_bytes([high, low])).max(2);
                }
                _ => match bytes[at..].iter().position(|&byte| byte == 0xff) {
                    Some(skip) => at += skip,
                    None => break,
                },
            }
        }
        outline
    }

    /// The most that the decoder holds for a pixel.
    fn pixel_bytes(&self, components: u8, width: u32, height: u32) -> u64 {
        let output = 3;
        if !self.buffered {
            return output;
        }
        // 16 bits a coefficient, and blocks of up to 32 x 32 at the edges.
        let padded = |side: u32| u64::from(side).next_multiple_of(32);
        let coefficients = padded(width) * padded(height) * 2 * u64::from(components);
        output + coefficients.div_ceil((u64::from(width) * u64::from(height)).max(1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outlines() {
        let check = |bytes: &[u8], buffered, ended| {
            assert_eq!(
                Outline::read(bytes),
                Outline { buffered, ended },
                "{bytes:x?}"
            );
        };
        check(b"", false, false);
        check(b"\xff\xd8", false, false);
        check(b"\xff\xd8\xff\xd9", false, true);
        // An end marker inside a segment, such as a thumbnail's, does not count.
        check(b"\xff\xd8\xff\xe1\x00\x04\xff\xd9", false, false);
        check(b"\xff\xd8\xff\xe1\x00\x04\xff\xd9\xff\xd9", false, true);
        check(b"\xff\xd8\xff\xc2\x00\x02\xff\xd9", true, true);
        // Scan data with a stuffed byte and a restart marker.
        check(
            b"\xff\xd8\xff\xda\x00\x02ab\xff\x00c\xff\xd0\xff\xd9",
            false,
            true,
        );
        check(
            b"\xff\xd8\xff\xda\x00\x02ab\xff\xda\x00\x02c\xff\xd9",
            true,
            true,
        );
        check(b"\xff\xd8\xff\xda\x00\x02ab\xff", false, false);
        check(b"\xff\xd8\xff\xda\xff", false, false);
    }
}
