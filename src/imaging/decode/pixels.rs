//! Decoded pixels in the layouts of the decoders, and their conversion to
//! upright RGB: alpha first, then orientation.

use image::metadata::Orientation;

use super::super::{Alpha, RgbImage};

/// 8-bit pixels as a decoder left them.
pub(super) struct Pixels {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) layout: PixelLayout,
    pub(super) data: Vec<u8>,
}

/// The channels of a pixel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum PixelLayout {
    Gray,
    GrayAlpha,
    Rgb,
    Rgba,
}

impl PixelLayout {
    pub(super) fn channels(self) -> usize {
        match self {
            Self::Gray => 1,
            Self::GrayAlpha => 2,
            Self::Rgb => 3,
            Self::Rgba => 4,
        }
    }
}

impl Pixels {
    pub(super) fn into_rgb(self, alpha: Alpha) -> RgbImage {
        let pixels = match (self.layout, alpha) {
            (PixelLayout::Rgb, _) => self.data,
            (PixelLayout::Gray, _) => convert(&self.data, |&[gray]| [gray; 3]),
            (PixelLayout::GrayAlpha, Alpha::Drop) => convert(&self.data, |&[gray, _]| [gray; 3]),
            (PixelLayout::GrayAlpha, Alpha::White) => {
                convert(&self.data, |&[gray, alpha]| [on_white(gray, alpha); 3])
            }
            (PixelLayout::Rgba, Alpha::Drop) => convert(&self.data, |&[r, g, b, _]| [r, g, b]),
            (PixelLayout::Rgba, Alpha::White) => convert(&self.data, |&[r, g, b, alpha]| {
                [r, g, b].map(|level| on_white(level, alpha))
            }),
        };
        RgbImage {
            width: self.width,
            height: self.height,
            pixels,
        }
    }
}

fn convert<const CHANNELS: usize>(
    data: &[u8],
    pixel: impl Fn(&[u8; CHANNELS]) -> [u8; 3],
) -> Vec<u8> {
    let mut rgb = vec![0; data.len() / CHANNELS * 3];
    let (from, _) = data.as_chunks::<CHANNELS>();
    let (to, _) = rgb.as_chunks_mut::<3>();
    for (from, to) in from.iter().zip(to) {
        *to = pixel(from);
    }
    rgb
}

/// Composites one level onto white, rounded to nearest. The result is that of
/// Pillow's `alpha_composite` with an opaque background, as the test over all
/// 65536 pairs shows.
fn on_white(level: u8, alpha: u8) -> u8 {
    let sum = u32::from(level) * u32::from(alpha) + 255 * (255 - u32::from(alpha)) + 128;
    // Division by 255, exact in this range.
    u8::try_from((sum + (sum >> 8)) >> 8).unwrap_or(u8::MAX)
}

/// Converts a pixel of four inks by Pillow's formula: each ink is multiplied
/// with black, rounded to nearest.
#[inline]
pub(super) fn cmyk_to_rgb([cyan, magenta, yellow, black]: [u8; 4]) -> [u8; 3] {
    let light = 255 - u32::from(black);
    [cyan, magenta, yellow].map(|ink| {
        let product = u32::from(ink) * light + 128;
        let product = (product + (product >> 8)) >> 8;
        u8::try_from(light - product).unwrap_or(0)
    })
}

/// Side of the square tiles that are turned one after another. Going along
/// whole rows of one image would miss the cache at every pixel of the other.
const TILE: usize = 32;

/// Turns and mirrors an image as its EXIF orientation says.
pub(super) fn turn(image: RgbImage, orientation: Orientation) -> RgbImage {
    use Orientation as O;
    // Source of a pixel of the result: true first if rows and columns change
    // places, then for each direction if its ends are swapped in the source.
    let (transposed, from_right, from_bottom) = match orientation {
        O::NoTransforms => return image,
        O::FlipHorizontal => (false, true, false),
        O::Rotate180 => (false, true, true),
        O::FlipVertical => (false, false, true),
        O::Rotate90FlipH => (true, false, false),
        O::Rotate90 => (true, false, true),
        O::Rotate270FlipH => (true, true, true),
        O::Rotate270 => (true, true, false),
    };
    let (width, height) = (image.width as usize, image.height as usize);
    let (result_width, result_height) = if transposed {
        (height, width)
    } else {
        (width, height)
    };
    let (source, _) = image.pixels.as_chunks::<3>();
    let mut pixels = vec![0; image.pixels.len()];
    let (result, _) = pixels.as_chunks_mut::<3>();
    for top in (0..result_height).step_by(TILE) {
        for left in (0..result_width).step_by(TILE) {
            let right = result_width.min(left + TILE);
            for row in top..result_height.min(top + TILE) {
                let target = &mut result[row * result_width + left..row * result_width + right];
                for (column, target) in (left..right).zip(target) {
                    let (x, y) = if transposed {
                        (row, column)
                    } else {
                        (column, row)
                    };
                    let x = if from_right { width - 1 - x } else { x };
                    let y = if from_bottom { height - 1 - y } else { y };
                    *target = source[y * width + x];
                }
            }
        }
    }
    RgbImage {
        width: if transposed {
            image.height
        } else {
            image.width
        },
        height: if transposed {
            image.width
        } else {
            image.height
        },
        pixels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Computes Pillow's own steps, in its fixed point.
    fn pillow_on_white(level: u32, alpha: u32) -> u32 {
        if alpha == 0 {
            return 255;
        }
        let total = alpha * 255 + 255 * (255 - alpha);
        let weight = alpha * 255 * 255 * 128 / total;
        let sum = level * weight + 255 * (255 * 128 - weight) + (0x80 << 7);
        (((sum >> 8) + sum) >> 8) >> 7
    }

    #[test]
    fn white_is_pillows_alpha_composite() {
        for level in 0..=255 {
            for alpha in 0..=255 {
                assert_eq!(
                    u32::from(on_white(level, alpha)),
                    pillow_on_white(level.into(), alpha.into()),
                    "{level} at {alpha}"
                );
            }
        }
    }

    #[test]
    fn layouts_become_rgb() {
        let check = |layout, alpha, data: &[u8], expected: [u8; 3]| {
            let pixels = Pixels {
                width: 1,
                height: 1,
                layout,
                data: data.to_vec(),
            };
            assert_eq!(
                pixels.into_rgb(alpha).pixels,
                expected,
                "{layout:?} {alpha:?}"
            );
        };
        check(PixelLayout::Gray, Alpha::White, &[7], [7, 7, 7]);
        check(PixelLayout::Rgb, Alpha::White, &[1, 2, 3], [1, 2, 3]);
        check(PixelLayout::GrayAlpha, Alpha::Drop, &[7, 0], [7, 7, 7]);
        check(PixelLayout::GrayAlpha, Alpha::White, &[7, 0], [255; 3]);
        check(
            PixelLayout::Rgba,
            Alpha::Drop,
            &[10, 20, 30, 0],
            [10, 20, 30],
        );
        check(PixelLayout::Rgba, Alpha::White, &[10, 20, 30, 0], [255; 3]);
        check(
            PixelLayout::Rgba,
            Alpha::White,
            &[10, 20, 30, 128],
            [132, 137, 142],
        );
    }

    #[test]
    fn orientations_move_corners() {
        // A 3 x 2 image: a b c / d e f.
        let image = RgbImage {
            width: 3,
            height: 2,
            pixels: b"abcdef".iter().flat_map(|&byte| [byte; 3]).collect(),
        };
        let check = |exif, width, expected: &str| {
            let orientation = Orientation::from_exif(exif).unwrap();
            let turned = turn(image.clone(), orientation);
            let letters: Vec<u8> = turned.pixels.iter().copied().step_by(3).collect();
            assert_eq!(turned.width, width, "orientation {exif}");
            assert_eq!(letters, expected.as_bytes(), "orientation {exif}");
        };
        check(1, 3, "abcdef");
        check(2, 3, "cbafed");
        check(3, 3, "fedcba");
        check(4, 3, "defabc");
        check(5, 2, "adbecf");
        check(6, 2, "daebfc");
        check(7, 2, "fcebda");
        check(8, 2, "cfbead");
    }
}
