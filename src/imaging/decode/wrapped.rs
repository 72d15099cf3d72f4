//! Decoder of BMP files, by the `image` crate; its `read` also decodes WebP
//! images.
//!
//! Memory: the pixels, a row of the file, and a palette of at most 256 colors.
//! Work: each pixel once, and each byte of run lengths once. The decoder
//! refuses pictures of other formats inside a BMP.

use image::codecs::bmp::BmpDecoder;
use image::metadata::Orientation;
use image::{ColorType, ImageDecoder};

use super::pixels::{PixelLayout, Pixels};
use super::{Header, PreprocessError};

/// Bytes of the palette, twice.
const OTHER_BYTES: u64 = 16 << 10;

pub(super) fn bmp(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let decoder = BmpDecoder::new(header.source(bytes)).map_err(|e| header.image_error(&e))?;
    let (width, height) = decoder.dimensions();
    let pixel_bytes = decoder.color_type().bytes_per_pixel().into();
    header.admit(width, height, pixel_bytes, OTHER_BYTES + u64::from(width))?;
    Ok((read(decoder, header)?, Orientation::NoTransforms))
}

/// Decodes an image whose size was admitted.
pub(super) fn read(
    decoder: impl ImageDecoder,
    header: Header<'_>,
) -> Result<Pixels, PreprocessError> {
    let layout = match decoder.color_type() {
        ColorType::L8 => PixelLayout::Gray,
        ColorType::La8 => PixelLayout::GrayAlpha,
        ColorType::Rgb8 => PixelLayout::Rgb,
        ColorType::Rgba8 => PixelLayout::Rgba,
        color => return Err(header.unsupported(format!("samples of type {color:?}"))),
    };
    let (width, height) = decoder.dimensions();
    let mut data = vec![0; width as usize * height as usize * layout.channels()];
    decoder
        .read_image(&mut data)
        .map_err(|error| header.image_error(&error))?;
    Ok(Pixels {
        width,
        height,
        layout,
        data,
    })
}
