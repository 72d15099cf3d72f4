//! Decoded pixels in the layouts of the decoders, and their conversion to RGB.

use super::super::Alpha;

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

    /// Converts pixels to RGB, or returns `None` if they are.
    pub(super) fn to_rgb(self, alpha: Alpha, data: &[u8]) -> Option<Vec<u8>> {
        Some(match (self, alpha) {
            (Self::Rgb, _) => return None,
            (Self::Gray, _) => convert(data, |&[gray]| [gray; 3]),
            (Self::GrayAlpha, Alpha::Drop) => convert(data, |&[gray, _]| [gray; 3]),
            (Self::GrayAlpha, Alpha::White) => {
                convert(data, |&[gray, alpha]| [on_white(gray, alpha); 3])
            }
            (Self::Rgba, Alpha::Drop) => convert(data, |&[r, g, b, _]| [r, g, b]),
            (Self::Rgba, Alpha::White) => convert(data, |&[r, g, b, alpha]| {
                [r, g, b].map(|level| on_white(level, alpha))
            }),
        })
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
        let check = |layout: PixelLayout, alpha, data: &[u8], expected: [u8; 3]| {
            let pixels = layout.to_rgb(alpha, data);
            let pixels = pixels.unwrap_or_else(|| data.to_vec());
            assert_eq!(pixels, expected, "{layout:?} {alpha:?}");
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
}
