//! Renders tokens as a picture again.

/// Largest number of picture pixels per side of one image pixel. The published
/// models then give 1024 pixels a side.
pub const SCALE_MAX: u32 = 32;

/// Renders an image of `side` by `side` tokens as a PNG file. Each token
/// becomes a square of `scale` by `scale` pixels, in its color of `palette`
/// (red, green, blue, in token order).
///
/// # Errors
///
/// When there are not `side * side` tokens, or a token has no color. There are
/// no other errors.
pub fn png(
    tokens: &[u16],
    palette: &[u8],
    side: usize,
    scale: usize,
    compression: png::Compression,
) -> Result<Vec<u8>, png::EncodingError> {
    let mut pixels = Vec::with_capacity(tokens.len() * scale * scale * 3);
    for row in tokens.chunks_exact(side) {
        let start = pixels.len();
        for &token in row {
            let color = palette.chunks_exact(3).nth(usize::from(token));
            for _ in 0..scale {
                pixels.extend_from_slice(color.unwrap_or_default());
            }
        }
        let line = start..pixels.len();
        for _ in 1..scale {
            pixels.extend_from_within(line.clone());
        }
    }
    let edge = u32::try_from(side * scale).unwrap_or(u32::MAX);
    let mut file = Vec::new();
    let mut encoder = png::Encoder::new(&mut file, edge, edge);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(compression);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(&pixels)?;
    writer.finish()?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_picture_shows_the_palettes_colors() {
        let palette = [0, 0, 0, 255, 0, 0, 0, 255, 0, 0, 0, 255];
        let file = png(&[0, 1, 2, 3], &palette, 2, 3, png::Compression::Fast).expect("a picture");
        let picture = image::load_from_memory(&file).expect("a PNG").into_rgb8();
        assert_eq!(picture.dimensions(), (6, 6));
        assert_eq!(picture.get_pixel(2, 2).0, [0, 0, 0]);
        assert_eq!(picture.get_pixel(3, 2).0, [255, 0, 0]);
        assert_eq!(picture.get_pixel(2, 3).0, [0, 255, 0]);
        assert_eq!(picture.get_pixel(5, 5).0, [0, 0, 255]);
        assert!(png(&[0, 4, 0, 0], &palette, 2, 1, png::Compression::Fast).is_err());
    }
}
