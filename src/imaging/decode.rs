//! Decodes the bytes of an image file to upright RGB pixels.
//!
//! Promises Pillow's pixels: `ImageOps.exif_transpose(image).convert("RGB")`,
//! or with [`Alpha::White`] the composite that transformers' `convert_to_rgb`
//! makes. The format is found by content. Size and memory are checked from the
//! header before any pixel is decoded, and only the first frame of an animation
//! is decoded. A file that is cut short is an error, bytes behind a whole file
//! are not, and color profiles and gamma are ignored.
//!
//! Differences from Pillow:
//!
//! - 16-bit gray keeps its high byte, as 16-bit color does. Pillow clips it, so
//!   that all but the darkest pixels turn white.
//! - A TIFF of 16-bit colors in planes without compression has its right
//!   pixels, where Pillow takes each byte for a sample.
//! - A PNG's orientation is read from eXIf, from the text that ImageMagick
//!   writes, and from plain XMP, not from compressed XMP. Other text is not read
//!   and may be damaged.
//! - A damaged lossy WebP may have other pixels: Pillow's library reads some
//!   damaged frames in another way.
//! - Decoded, where Pillow refuses: PNG data with a wrong Adler-32 behind the
//!   last pixel, and some damaged PNG and TIFF metadata; a JPEG that is cut short
//!   behind its last pixel; TIFF in RGB of 16 bits with more than one extra
//!   sample, 16-bit gray with alpha, and 8-bit gray whose bits are turned and
//!   that is inverted or has a sign.
//! - A WebP's orientation is read even if its header does not announce EXIF.
//! - Refused: TIFF in YCbCr outside of JPEGs or in L*a*b*, gray of 12 bits, and
//!   kinds of TIFF that Pillow reads wrongly: compressed numbers with a sign or
//!   of 32 bits that begin with the high byte, planes without compression whose
//!   bits are turned, a fourth plane of unstated meaning in tiles without
//!   compression; LZMA, WebP, JPEG of the old kind, JPEG of two samples and fax
//!   codes in words in a TIFF; a fax with a damaged row, which Pillow repairs; a
//!   DIB of other than one plane; a PNG with an unknown chunk that is critical.
//! - PNG data with a wrong checksum of a chunk is refused.

use std::fmt;
use std::panic::{AssertUnwindSafe, catch_unwind};

use image::ImageError;
use image::metadata::Orientation;

use self::rows::WholeImage;
use super::budget::BudgetedSource;
use super::{Alpha, DecodeBudget, ImageLimits, PreprocessError, RgbImage};

pub(crate) use self::rows::RowSink;

mod bmp;
mod exif;
mod gif;
mod jpeg;
mod pixels;
mod png;
mod rows;
mod tiff;
mod webp;

/// Reader from which decoders take their bytes. The reader fails once the
/// budget is spent, which ends the decode.
type Source<'a> = BudgetedSource<'a>;

/// The accepted file formats.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ImageFormat {
    Png,
    Jpeg,
    WebP,
    Gif,
    Bmp,
    Tiff,
}

impl ImageFormat {
    /// Returns the format whose signature the bytes start with. A BMP may lack
    /// its file header, and is then told by its image header (DIB).
    #[must_use]
    pub fn guess(bytes: &[u8]) -> Option<Self> {
        match bytes {
            [0x89, b'P', b'N', b'G', b'\r', b'\n', 0x1a, b'\n', ..] => Some(Self::Png),
            [0xff, 0xd8, 0xff, ..] => Some(Self::Jpeg),
            [
                b'R',
                b'I',
                b'F',
                b'F',
                _,
                _,
                _,
                _,
                b'W',
                b'E',
                b'B',
                b'P',
                ..,
            ] => Some(Self::WebP),
            [b'G', b'I', b'F', b'8', b'7' | b'9', b'a', ..] => Some(Self::Gif),
            [b'B', b'M', ..] => Some(Self::Bmp),
            // Pillow also takes 42 in the other byte order.
            [b'I', b'I', 42 | 43, 0, ..]
            | [b'I', b'I', 0, 42, ..]
            | [b'M', b'M', 0, 42 | 43, ..]
            | [b'M', b'M', 42, 0, ..] => Some(Self::Tiff),
            _ if bmp::is_dib(bytes) => Some(Self::Bmp),
            _ => None,
        }
    }
}

impl fmt::Display for ImageFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Png => "PNG",
            Self::Jpeg => "JPEG",
            Self::WebP => "WebP",
            Self::Gif => "GIF",
            Self::Bmp => "BMP",
            Self::Tiff => "TIFF",
        })
    }
}

/// Decodes an image file to a whole image.
///
/// # Errors
///
/// When the file is empty, of no accepted format, over a limit or damaged,
/// when a decoder panics, and when the budget is spent.
pub fn decode(
    bytes: &[u8],
    alpha: Alpha,
    limits: &ImageLimits,
    budget: &DecodeBudget<'_>,
) -> Result<RgbImage, PreprocessError> {
    let mut whole = WholeImage::default();
    decode_to(bytes, alpha, limits, budget, &mut whole, true)?;
    Ok(whole.upright())
}

/// Decodes an image file to rows. A sink that took rows has nothing of use
/// after an error.
///
/// # Errors
///
/// As for [`decode`].
pub(crate) fn decode_rows(
    bytes: &[u8],
    alpha: Alpha,
    limits: &ImageLimits,
    budget: &DecodeBudget<'_>,
    sink: &mut dyn RowSink,
) -> Result<(), PreprocessError> {
    decode_to(bytes, alpha, limits, budget, sink, false)
}

fn decode_to(
    bytes: &[u8],
    alpha: Alpha,
    limits: &ImageLimits,
    budget: &DecodeBudget<'_>,
    sink: &mut dyn RowSink,
    gathers: bool,
) -> Result<(), PreprocessError> {
    if bytes.is_empty() {
        return Err(PreprocessError::Empty);
    }
    if bytes.len() > limits.image_bytes_max {
        return Err(PreprocessError::BytesOverLimit {
            bytes: bytes.len(),
            bytes_max: limits.image_bytes_max,
        });
    }
    let format = ImageFormat::guess(bytes).ok_or(PreprocessError::NotAnImage)?;
    budget.check()?;
    let header = Header {
        format,
        limits,
        budget,
        gathers,
    };
    // Nothing is shared with the decoders, so a panic leaves nothing half done.
    catch_unwind(AssertUnwindSafe(|| {
        let (pixels, orientation) = match format {
            ImageFormat::Jpeg => return jpeg::decode(bytes, header, sink),
            ImageFormat::Png => png::decode(bytes, header),
            ImageFormat::WebP => webp::decode(bytes, header),
            ImageFormat::Gif => gif::decode(bytes, header),
            ImageFormat::Bmp => bmp::decode(bytes, header),
            ImageFormat::Tiff => tiff::decode(bytes, header),
        }?;
        // A decoder may take a read that the budget refused for the end of the
        // file.
        budget.check()?;
        pixels.pour(alpha, orientation.into(), sink);
        Ok(())
    }))
    .unwrap_or(Err(PreprocessError::Panicked { format }))
    .map_err(|error| budget.error_or(error))
}

/// Returns the orientation in EXIF data, or else in XMP.
///
/// JPEG puts "Exif" before the data, and some writers carry it over to other
/// formats. XMP is searched as text, as Pillow does.
fn orientation(exif: Option<&[u8]>, xmp: Option<&[u8]>) -> Orientation {
    exif.map(|exif| exif.strip_prefix(b"Exif\0\0").unwrap_or(exif))
        .and_then(|exif| Orientation::from_exif(exif::orientation(exif)?))
        .or_else(|| xmp_orientation(xmp?))
        .unwrap_or(Orientation::NoTransforms)
}

fn xmp_orientation(xmp: &[u8]) -> Option<Orientation> {
    const NAME: &[u8] = b"tiff:Orientation";
    let digit = xmp
        .windows(NAME.len() + 3)
        .filter_map(|window| window.strip_prefix(NAME))
        .find_map(|after| match after {
            [b'=', b'"', digit @ b'0'..=b'9'] | [b'>', digit @ b'0'..=b'9', _] => Some(*digit),
            _ => None,
        })?;
    Orientation::from_exif(digit - b'0')
}

/// Format of a file, for errors, with the limits and the budget that its
/// decoder must keep to.
#[derive(Clone, Copy)]
struct Header<'a> {
    format: ImageFormat,
    limits: &'a ImageLimits,
    budget: &'a DecodeBudget<'a>,
    /// True if the rows are gathered to a whole image.
    gathers: bool,
}

impl<'a> Header<'a> {
    /// Returns the bytes of the file as a source that fails once the budget is
    /// spent.
    fn source(self, bytes: &'a [u8]) -> Source<'a> {
        BudgetedSource::new(bytes, self.budget)
    }

    /// Refuses an image that is too large.
    ///
    /// `pixel_bytes` is the most that the decoder holds per pixel, its own
    /// output included, and `other_bytes` the memory that it holds besides. For
    /// a whole image, its RGB pixels and their copy while they are turned are
    /// added here.
    fn admit(
        self,
        width: u32,
        height: u32,
        pixel_bytes: u64,
        other_bytes: u64,
    ) -> Result<(), PreprocessError> {
        let format = self.format;
        self.admit_pixels(width, height)?;
        let pixels = u64::from(width) * u64::from(height);
        // The decoder's other memory is free again once there is only RGB left.
        let decoding = pixels
            .saturating_mul(pixel_bytes)
            .saturating_add(other_bytes);
        let following = if self.gathers { 3 } else { 0 };
        let following = pixels.saturating_mul(following);
        let bytes = decoding
            .saturating_add(following)
            .max(following.saturating_mul(2));
        let bytes_max = self.limits.decode_bytes_max;
        if bytes > bytes_max {
            return Err(PreprocessError::DecodeOverLimit {
                format,
                width,
                height,
                bytes,
                bytes_max,
            });
        }
        Ok(())
    }

    /// Refuses an image that has too many pixels, or none.
    fn admit_pixels(self, width: u32, height: u32) -> Result<(), PreprocessError> {
        let pixels = u64::from(width) * u64::from(height);
        if pixels == 0 {
            return Err(self.damaged(format!(
                "a size of {width} x {height}; both sides must be at least 1 pixel"
            )));
        }
        let pixels_max = self.limits.image_pixels_max;
        if pixels > pixels_max {
            return Err(PreprocessError::EncodedPixelsOverLimit {
                format: self.format,
                width,
                height,
                pixels_max,
            });
        }
        Ok(())
    }

    /// Returns the limit in bytes for a decoder that limits its memory itself.
    fn decode_bytes_max(self) -> usize {
        usize::try_from(self.limits.decode_bytes_max).unwrap_or(usize::MAX)
    }

    fn damaged(self, detail: impl fmt::Display) -> PreprocessError {
        PreprocessError::Damaged {
            format: self.format,
            detail: sentence(&detail),
        }
    }

    fn unsupported(self, detail: impl fmt::Display) -> PreprocessError {
        PreprocessError::Unsupported {
            format: self.format,
            detail: sentence(&detail),
        }
    }

    fn image_error(self, error: &ImageError) -> PreprocessError {
        match error {
            ImageError::Unsupported(error) => self.unsupported(error),
            error => self.damaged(error),
        }
    }
}

/// Formats a decoder's message as the end of an error text, on one line.
fn sentence(detail: &impl fmt::Display) -> String {
    let text = detail.to_string();
    let words: Vec<&str> = text.split_whitespace().collect();
    words.join(" ").trim_end_matches('.').to_owned()
}

#[cfg(test)]
mod tests;
