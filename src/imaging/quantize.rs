//! Finds the nearest palette color of each pixel: the model's tokens.
//!
//! Promises the exact answer: the least `sum((x / 127.5 - 1 - c)^2)` in f64, and
//! the lowest index among equals, as numpy's argmin over all colors finds it.
//!
//! Comparing all 512 colors for 1024 pixels costs about as much as decoding a
//! small image. Therefore the color cube is cut into 32 x 32 x 32 cells, and
//! each cell keeps the few colors that can be nearest to any point in it. The
//! choice of these colors is proven by distance bounds, not sampled, so nothing
//! is approximate.

use thiserror::Error;

/// Number of cells along one side of the color cube, and of byte values along
/// one side of a cell, for the coarse and the fine cut.
const COARSE: usize = 8;
const FINE: usize = 32;
const COARSE_STEP: usize = 256 / COARSE;
const FINE_STEP: usize = 256 / FINE;

/// Largest error of a bound by rounding, relative to distances of about 1. The
/// margin is a million times what f64 needs, and adds next to no candidates.
const MARGIN: f64 = 1e-9;

/// A model's colors, in token order.
///
/// The colors are floats where -1 is black and 1 is full, red then green then
/// blue, as in `preprocessor_config.json`'s `clusters`.
#[derive(Clone, Debug, PartialEq)]
pub struct Palette {
    clusters: Vec<[f64; 3]>,
}

/// Reason why a palette cannot be used.
#[derive(Clone, Debug, Error, PartialEq)]
pub enum PaletteError {
    #[error("clusters: the list of colors is empty")]
    Empty,
    #[error("clusters: {count} colors do not fit 16-bit tokens; the limit is {count_max}")]
    TooMany { count: usize, count_max: usize },
    #[error("clusters: color {index} is {value:?}; each number must be finite and near -1 to 1")]
    OutOfRange { index: usize, value: [f64; 3] },
}

impl Palette {
    /// Checks the colors.
    ///
    /// # Errors
    ///
    /// When there are no colors or too many, or a color is not a number near -1
    /// to 1.
    pub fn new(clusters: Vec<[f64; 3]>) -> Result<Self, PaletteError> {
        // One below the number of 16-bit values, since the start token follows
        // the colors.
        let count_max = usize::from(u16::MAX);
        if clusters.is_empty() {
            return Err(PaletteError::Empty);
        }
        if clusters.len() > count_max {
            return Err(PaletteError::TooMany {
                count: clusters.len(),
                count_max,
            });
        }
        // Real palettes reach -1 and 1. The bound is wide, and only keeps
        // MARGIN large beside the rounding of squares; a NaN fails it too.
        let usable = |value: &f64| value.abs() <= 16.0;
        match clusters.iter().position(|color| !color.iter().all(usable)) {
            Some(index) => Err(PaletteError::OutOfRange {
                index,
                value: clusters[index],
            }),
            None => Ok(Self { clusters }),
        }
    }

    /// Returns the colors, in token order.
    #[must_use]
    pub fn clusters(&self) -> &[[f64; 3]] {
        &self.clusters
    }
}

/// Search structure that finds the nearest color of a pixel.
#[derive(Debug)]
pub struct Quantizer {
    clusters: Box<[[f64; 3]]>,
    /// Level of each byte on the palette's scale: `x / 127.5 - 1`.
    levels: [f64; 256],
    /// End of each cell's candidates, which start at the end of the last
    /// cell's.
    ends: Box<[usize]>,
    /// The candidates of all cells, in token order within each.
    candidates: Box<[u16]>,
}

impl Quantizer {
    /// Computes the candidates of every cell.
    #[must_use]
    pub fn new(palette: &Palette) -> Self {
        let clusters: Box<[_]> = palette.clusters().into();
        #[expect(clippy::cast_precision_loss, reason = "bytes are exact in f64")]
        let levels = std::array::from_fn(|byte| byte as f64 / 127.5 - 1.0);
        let all: Vec<u16> = (0..=u16::MAX).take(clusters.len()).collect();

        // There are two cuts, since testing every color in every fine cell
        // would take eight times as long.
        let mut coarse = Vec::with_capacity(COARSE.pow(3));
        for cell in cells(COARSE) {
            coarse.push(near(&clusters, &levels, cell, COARSE_STEP, &all));
        }
        let mut candidates = Vec::new();
        let mut ends = Vec::with_capacity(FINE.pow(3));
        for cell in cells(FINE) {
            let parent = cell.map(|axis| axis * COARSE / FINE);
            let parent = &coarse[cell_index(parent, COARSE)];
            candidates.extend(near(&clusters, &levels, cell, FINE_STEP, parent));
            ends.push(candidates.len());
        }
        Self {
            clusters,
            levels,
            ends: ends.into(),
            candidates: candidates.into(),
        }
    }

    /// Returns the number of colors in the palette.
    #[must_use]
    pub fn colors(&self) -> usize {
        self.clusters.len()
    }

    /// Returns the token of the color that is nearest to `rgb`.
    #[must_use]
    pub fn nearest(&self, rgb: [u8; 3]) -> u16 {
        let cell = cell_index(rgb.map(|byte| usize::from(byte) / FINE_STEP), FINE);
        let start = cell.checked_sub(1).map_or(0, |last| self.ends[last]);
        let candidates = &self.candidates[start..self.ends[cell]];
        let color = rgb.map(|byte| self.levels[usize::from(byte)]);
        let mut best = (f64::INFINITY, 0);
        for &token in candidates {
            let distance = distance(color, self.clusters[usize::from(token)]);
            if distance < best.0 {
                best = (distance, token);
            }
        }
        best.1
    }

    /// Returns the tokens of pixels in the same order; a pixel has 3 bytes.
    #[must_use]
    pub fn quantize(&self, pixels: &[u8]) -> Box<[u16]> {
        let (pixels, rest) = pixels.as_chunks::<3>();
        debug_assert!(rest.is_empty(), "a pixel has three bytes");
        pixels.iter().map(|&rgb| self.nearest(rgb)).collect()
    }
}

fn distance(a: [f64; 3], b: [f64; 3]) -> f64 {
    let squares: [f64; 3] = std::array::from_fn(|axis| (a[axis] - b[axis]).powi(2));
    squares[0] + squares[1] + squares[2]
}

/// Iterates over all cells of a cut, in the order of [`cell_index`].
fn cells(cut: usize) -> impl Iterator<Item = [usize; 3]> {
    (0..cut.pow(3)).map(move |index| [index / cut / cut, index / cut % cut, index % cut])
}

fn cell_index([red, green, blue]: [usize; 3], cut: usize) -> usize {
    (red * cut + green) * cut + blue
}

/// Returns the colors of `among` that can be nearest to a point in a cell: the
/// colors whose least distance to the cell is not above another's greatest.
fn near(
    clusters: &[[f64; 3]],
    levels: &[f64; 256],
    cell: [usize; 3],
    step: usize,
    among: &[u16],
) -> Vec<u16> {
    let low = cell.map(|axis| levels[axis * step]);
    let high = cell.map(|axis| levels[axis * step + step - 1]);
    let bounds: Vec<(f64, f64)> = among
        .iter()
        .map(|&token| {
            let color = clusters[usize::from(token)];
            let closest = std::array::from_fn(|axis| color[axis].clamp(low[axis], high[axis]));
            let middle: [f64; 3] = std::array::from_fn(|axis| f64::midpoint(low[axis], high[axis]));
            let farthest = std::array::from_fn(|axis| {
                if color[axis] < middle[axis] {
                    high[axis]
                } else {
                    low[axis]
                }
            });
            (distance(color, closest), distance(color, farthest))
        })
        .collect();
    let reach = bounds
        .iter()
        .map(|&(_, farthest)| farthest)
        .fold(f64::INFINITY, f64::min);
    let reach = reach + MARGIN * (1.0 + reach);
    among
        .iter()
        .zip(&bounds)
        .filter(|(_, (closest, _))| *closest <= reach)
        .map(|(&token, _)| token)
        .collect()
}

#[cfg(test)]
mod tests;
