//! Features that know of no model, to compare a probe's with: an image's pixels,
//! and how often it has each color.
//!
//! Both are made from the tokens that the model reads, so that a probe on them sees
//! what the model sees.

use super::{FeatureMatrix, ProbeError, real};

/// Makes a row per image of its pixels: red, green and blue of each token in raster
/// order, as `palette` has them (-1 to 1 in the published models). 32 by 32 tokens
/// are 3072 floats, 12 KB per image.
///
/// # Errors
///
/// When there is no image, images have different numbers of tokens or none, or a
/// token is outside the palette.
pub fn pixel_features(
    images: &[impl AsRef<[u16]>],
    palette: &[[f64; 3]],
) -> Result<FeatureMatrix, ProbeError> {
    let n_tokens = images.first().ok_or(ProbeError::NoRows)?.as_ref().len();
    let mut numbers = Vec::with_capacity(images.len() * n_tokens * 3);
    for (image, tokens) in images.iter().enumerate() {
        let tokens = tokens.as_ref();
        if tokens.len() != n_tokens {
            return Err(ProbeError::Tokens {
                image,
                tokens: tokens.len(),
                expected: n_tokens,
            });
        }
        for &token in tokens {
            let color = palette.get(usize::from(token));
            let color = color.ok_or(ProbeError::Color {
                image,
                token,
                colors: palette.len(),
            })?;
            #[expect(clippy::cast_possible_truncation, reason = "rounded once to f32")]
            numbers.extend(color.iter().map(|&level| level as f32));
        }
    }
    FeatureMatrix::from_f32(3 * n_tokens, numbers)
}

/// Makes a row per image of the shares of its tokens that are each of `n_colors`
/// colors: 512 floats in the published models, with the sum 1.
///
/// # Errors
///
/// When there is no image or no color, an image has no token, or a token is not
/// below `n_colors`.
pub fn color_features(
    images: &[impl AsRef<[u16]>],
    n_colors: usize,
) -> Result<FeatureMatrix, ProbeError> {
    let mut numbers = Vec::with_capacity(images.len() * n_colors);
    let mut counts = vec![0_usize; n_colors];
    for (image, tokens) in images.iter().enumerate() {
        let tokens = tokens.as_ref();
        if tokens.is_empty() {
            return Err(ProbeError::Tokens {
                image,
                tokens: 0,
                expected: 1,
            });
        }
        counts.fill(0);
        for &token in tokens {
            let count = counts.get_mut(usize::from(token));
            *count.ok_or(ProbeError::Color {
                image,
                token,
                colors: n_colors,
            })? += 1;
        }
        let shares = counts.iter().map(|&n| real(n) / real(tokens.len()));
        #[expect(clippy::cast_possible_truncation, reason = "rounded once to f32")]
        numbers.extend(shares.map(|share| share as f32));
    }
    FeatureMatrix::from_f32(n_colors, numbers)
}

#[cfg(test)]
mod tests {
    use super::*;

    const PALETTE: [[f64; 3]; 3] = [[-1.0, -1.0, -1.0], [1.0, 0.5, -0.25], [0.0, 1.0, 0.0]];

    fn rows(features: &FeatureMatrix) -> Vec<Vec<f32>> {
        let mut scratch = vec![0.0; features.width()];
        let rows = 0..features.n_rows();
        rows.map(|row| features.row(row, &mut scratch).to_vec())
            .collect()
    }

    #[test]
    fn pixels_are_the_palettes_colors() {
        let images = [vec![1_u16, 0], vec![2, 1]];
        let features = pixel_features(&images, &PALETTE).unwrap();
        assert_eq!(
            rows(&features),
            [
                [1.0, 0.5, -0.25, -1.0, -1.0, -1.0],
                [0.0, 1.0, 0.0, 1.0, 0.5, -0.25]
            ]
        );
    }

    #[test]
    fn colors_are_counted_as_shares() {
        let images = [vec![1_u16, 0, 1, 1], vec![2, 2, 2, 2]];
        let features = color_features(&images, 3).unwrap();
        assert_eq!(rows(&features), [[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]]);
    }

    #[test]
    fn tokens_that_do_not_fit_are_named() {
        let none: [Vec<u16>; 0] = [];
        assert_eq!(
            pixel_features(&none, &PALETTE).unwrap_err(),
            ProbeError::NoRows
        );
        assert_eq!(color_features(&none, 3).unwrap_err(), ProbeError::NoRows);
        let uneven = [vec![0_u16, 1], vec![0]];
        let error = pixel_features(&uneven, &PALETTE).unwrap_err().to_string();
        assert!(error.contains("image 1 has 1 tokens, and 2"), "{error}");
        let outside = [vec![0_u16, 3]];
        for error in [
            pixel_features(&outside, &PALETTE).unwrap_err(),
            color_features(&outside, 3).unwrap_err(),
        ] {
            let error = error.to_string();
            assert!(
                error.contains("image 0 has token 3, and the palette has 3 colors"),
                "{error}"
            );
        }
        let empty = color_features(&[Vec::<u16>::new()], 3).unwrap_err();
        assert!(matches!(empty, ProbeError::Tokens { .. }));
    }
}
