//! Converts the components of a JPEG to colors, bit for bit as libjpeg-turbo
//! and then Pillow do.

use multiversion::multiversion;

use super::super::pixels::cmyk_to_rgb;
use super::frame::JpegFrame;
use super::huffman::low_bits;
use super::segments::ColorMarkers;

/// Meaning of the components of a JPEG, and what is made of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum JpegColors {
    Gray,
    Rgb,
    YCbCr,
    /// Four inks, stored inverted.
    Cmyk,
    /// Inks as luma and chroma, and black.
    Ycck,
    /// Components as they are stored, any number of them.
    Stored(usize),
}

impl JpegColors {
    /// Guesses the meaning of the components of a frame.
    pub(super) fn guess(frame: &JpegFrame, markers: ColorMarkers) -> Self {
        let ids: Vec<u8> = frame
            .components
            .iter()
            .map(|component| component.id)
            .collect();
        match (&ids[..], markers.adobe) {
            ([_], _) => Self::Gray,
            ([_, _, _], _) if markers.jfif => Self::YCbCr,
            ([_, _, _], Some(0)) | (b"RGB", None) => Self::Rgb,
            ([_, _, _], _) => Self::YCbCr,
            (_, Some(0) | None) => Self::Cmyk,
            (_, Some(_)) => Self::Ycck,
        }
    }

    /// Returns the number of channels that are made: 1 for gray, 3 for colors.
    pub(super) fn channels(self) -> usize {
        match self {
            Self::Gray => 1,
            Self::Stored(count) => count,
            _ => 3,
        }
    }

    /// Converts a row of each component to a row of pixels.
    pub(super) fn convert(self, rows: [&[u8]; 4], target: &mut [u8]) {
        let [first, second, third, fourth] = rows;
        match self {
            Self::Gray | Self::Stored(1) => target.copy_from_slice(first),
            Self::YCbCr => convert_ycc(first, second, third, target),
            Self::Cmyk => {
                let (pixels, _) = target.as_chunks_mut::<3>();
                let samples = first.iter().zip(second).zip(third).zip(fourth);
                for (pixel, (((c, m), y), k)) in pixels.iter_mut().zip(samples) {
                    *pixel = cmyk_to_rgb([!c, !m, !y, !k]);
                }
            }
            Self::Ycck => {
                let (pixels, _) = target.as_chunks_mut::<3>();
                let samples = first.iter().zip(second).zip(third).zip(fourth);
                for (pixel, (((y, cb), cr), k)) in pixels.iter_mut().zip(samples) {
                    // libjpeg inverts the colors to inks, and Pillow inverts
                    // all inks.
                    let [c, m, y] = ycc_to_rgb(*y, *cb, *cr);
                    *pixel = cmyk_to_rgb([c, m, y, !k]);
                }
            }
            Self::Rgb | Self::Stored(_) => {
                let channels = self.channels();
                for (at, row) in rows.into_iter().take(channels).enumerate() {
                    let channel = target.iter_mut().skip(at).step_by(channels);
                    for (to, sample) in channel.zip(row) {
                        *to = *sample;
                    }
                }
            }
        }
    }
}

/// Converts rows of luma and chroma. Each step goes over some columns, which
/// the compiler turns into vectors.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2"))]
fn convert_ycc(luma: &[u8], cb: &[u8], cr: &[u8], target: &mut [u8]) {
    const STEP: usize = 32;
    let (luma, luma_rest) = luma.as_chunks::<STEP>();
    let (cb, cb_rest) = cb.as_chunks::<STEP>();
    let (cr, cr_rest) = cr.as_chunks::<STEP>();
    let (pixels, _) = target.as_chunks_mut::<3>();
    let (pixels, rest) = pixels.as_chunks_mut::<STEP>();
    for (((pixels, luma), cb), cr) in pixels.iter_mut().zip(luma).zip(cb).zip(cr) {
        let mut colors = [[0; STEP]; 3];
        for at in 0..STEP {
            let [red, green, blue] = ycc_to_rgb(luma[at], cb[at], cr[at]);
            colors[0][at] = red;
            colors[1][at] = green;
            colors[2][at] = blue;
        }
        for (at, pixel) in pixels.iter_mut().enumerate() {
            *pixel = [colors[0][at], colors[1][at], colors[2][at]];
        }
    }
    let samples = luma_rest.iter().zip(cb_rest).zip(cr_rest);
    for (pixel, ((luma, cb), cr)) in rest.iter_mut().zip(samples) {
        *pixel = ycc_to_rgb(*luma, *cb, *cr);
    }
}

/// Returns `number * factor / 65536` of a number of at most 9 bits, rounded.
#[inline]
fn scaled(number: i16, factor: i16) -> i16 {
    // The upper half of a product of 16-bit numbers, which vectors have.
    let twice = (i32::from(2 * number) * i32::from(factor)) >> 16;
    (low_bits(twice) + 1) >> 1
}

/// Converts luma and chroma to red, green and blue, by the factors 1.402,
/// 0.34414, 0.71414 and 1.772, each rounded to 16 bits behind the point.
#[inline]
fn ycc_to_rgb(luma: u8, cb: u8, cr: u8) -> [u8; 3] {
    let (luma, cb, cr) = (i16::from(luma), i16::from(cb) - 128, i16::from(cr) - 128);
    // The factors less whole numbers have 16 bits.
    let red = luma + cr + scaled(cr, 26_345);
    let blue = luma + 2 * cb + scaled(cb, -14_942);
    let green = -22_554 * i32::from(cb) + 18_734 * i32::from(cr);
    let green = luma - cr + low_bits((green + (1 << 15)) >> 16);
    [limit(red), limit(green), limit(blue)]
}

#[expect(clippy::cast_sign_loss, reason = "clamped to the range of a byte")]
#[inline]
fn limit(level: i16) -> u8 {
    level.clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colors_are_those_of_the_factors() {
        let limit = |level: i32| u8::try_from(level.clamp(0, 255)).unwrap();
        let half = 1 << 15;
        for cb in 0..=255 {
            for cr in 0..=255 {
                for luma in [0, 100, 255] {
                    let [y, b, r] = [luma, cb, cr].map(i32::from);
                    let (b, r) = (b - 128, r - 128);
                    let expected = [
                        y + ((91_881 * r + half) >> 16),
                        y + ((-22_554 * b - 46_802 * r + half) >> 16),
                        y + ((116_130 * b + half) >> 16),
                    ];
                    let ours = ycc_to_rgb(luma, cb, cr);
                    assert_eq!(ours, expected.map(limit), "{luma} {cb} {cr}");
                }
            }
        }
    }
}
