//! BMP, and what it shares with WebP: a decoder of the `image` crate.

use image::codecs::bmp::BmpDecoder;
use image::metadata::Orientation;
use image::{ColorType, ImageDecoder};

use super::pixels::{Layout, Pixels};
use super::{Header, PreprocessError};

pub(super) fn bmp(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let decoder = BmpDecoder::new(header.source(bytes)).map_err(|e| header.image_error(&e))?;
    let (width, height) = decoder.dimensions();
    header.admit(width, height, decoder.color_type().bytes_per_pixel().into())?;
    Ok((read(decoder, header)?, Orientation::NoTransforms))
}

/// Decodes an image that was admitted.
pub(super) fn read(
    decoder: impl ImageDecoder,
    header: Header<'_>,
) -> Result<Pixels, PreprocessError> {
    let layout = match decoder.color_type() {
        ColorType::L8 => Layout::Gray,
        ColorType::La8 => Layout::GrayAlpha,
        ColorType::Rgb8 => Layout::Rgb,
        ColorType::Rgba8 => Layout::Rgba,
        color => return Err(header.unsupported(format!("{color:?} samples"))),
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
