//! Standardization of columns, and how a fit on standardized features becomes one
//! on the features as they come.

use super::parts::{BLOCK_ROWS, RowParts};
use super::{FeatureMatrix, real};

/// Mean and scale of each column: a standardized feature is
/// `(feature - mean) / scale`.
#[derive(Debug, Clone, PartialEq)]
pub struct Standardization {
    /// Mean of each column.
    pub mean: Vec<f64>,
    /// Population standard deviation of each column; 1 for a constant one.
    pub scale: Vec<f64>,
}

/// Sums of some rows, around their own mean.
struct Moments {
    n_rows: usize,
    mean: Vec<f64>,
    /// Sum of the squared distances from the mean.
    squares: Vec<f64>,
}

impl Moments {
    fn new(width: usize) -> Self {
        Self {
            n_rows: 0,
            mean: vec![0.0; width],
            squares: vec![0.0; width],
        }
    }

    /// Adds rows around another mean. Only distances between means are squared, so
    /// a column far from zero loses no digits.
    fn merge(&mut self, other: &Self) {
        let n_rows = self.n_rows + other.n_rows;
        if other.n_rows == 0 {
            return;
        }
        let share = real(other.n_rows) / real(n_rows);
        let between = real(self.n_rows) * share;
        let own = self.mean.iter_mut().zip(&mut self.squares);
        for ((mean, squares), (other_mean, other_squares)) in
            own.zip(other.mean.iter().zip(&other.squares))
        {
            let distance = other_mean - *mean;
            *mean += distance * share;
            *squares += other_squares + distance * distance * between;
        }
        self.n_rows = n_rows;
    }
}

impl Standardization {
    /// Measures `rows` of the features, which are finite ([`FeatureMatrix::check`]),
    /// in one pass.
    ///
    /// # Panics
    ///
    /// When a row is outside the matrix.
    #[must_use]
    pub fn of(features: &FeatureMatrix, rows: &[usize], n_threads: usize) -> Self {
        let width = features.width();
        let parts = RowParts::new(rows.len(), 2 * width).map(n_threads, |part| {
            let mut moments = Moments::new(width);
            let mut own = Moments::new(width);
            let mut block = vec![0.0; width * BLOCK_ROWS];
            for rows in rows[part].chunks(BLOCK_ROWS) {
                let block = &mut block[..rows.len() * width];
                features.read_rows(rows, block);
                measure(block, rows.len(), &mut own);
                moments.merge(&own);
            }
            moments
        });
        let mut all = Moments::new(width);
        for part in &parts {
            all.merge(part);
        }
        let n = real(all.n_rows);
        let scale = all.mean.iter().zip(&all.squares).map(|(mean, squares)| {
            let variance = squares / n;
            // What rounding leaves of a constant column's variance is no variance:
            // the bound is that of a sum of `n` numbers, as scikit-learn has it.
            let rounding = n * f64::EPSILON * variance + (n * mean * f64::EPSILON).powi(2);
            if variance <= rounding {
                1.0
            } else {
                variance.sqrt()
            }
        });
        let scale = scale.collect();
        Self {
            mean: all.mean,
            scale,
        }
    }

    /// Makes the standardization that changes nothing.
    #[must_use]
    pub fn none(width: usize) -> Self {
        Self {
            mean: vec![0.0; width],
            scale: vec![1.0; width],
        }
    }

    /// Turns a fit on standardized features into one on features as they come:
    /// `weight` has rows of `width`, one per number in `bias`.
    ///
    /// # Panics
    ///
    /// When the sizes differ.
    pub fn fold(&self, weight: &mut [f64], bias: &mut [f64]) {
        let width = self.mean.len();
        assert_eq!(weight.len(), bias.len() * width, "a row per bias");
        for (row, bias) in weight.chunks_exact_mut(width).zip(bias) {
            for (weight, (mean, scale)) in row.iter_mut().zip(self.mean.iter().zip(&self.scale)) {
                *weight /= scale;
                *bias -= *weight * mean;
            }
        }
    }
}

/// Measures a block of `n_rows` rows, in two passes over the cache.
fn measure(block: &[f32], n_rows: usize, moments: &mut Moments) {
    let width = moments.mean.len();
    moments.n_rows = n_rows;
    moments.mean.fill(0.0);
    moments.squares.fill(0.0);
    for row in block.chunks_exact(width) {
        for (sum, &x) in moments.mean.iter_mut().zip(row) {
            *sum += f64::from(x);
        }
    }
    for mean in &mut moments.mean {
        *mean /= real(n_rows);
    }
    for row in block.chunks_exact(width) {
        let sums = moments.squares.iter_mut().zip(&moments.mean);
        for ((squares, mean), &x) in sums.zip(row) {
            *squares += (f64::from(x) - mean).powi(2);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn means_and_scales_are_exact_far_from_zero() {
        // Deviations of 0.25 and 0.75 around a million: a sum of squares in f64
        // would have lost their fifth digit.
        let n = 1000;
        let numbers: Vec<f32> = (0..n)
            .flat_map(|idx| {
                let sign = if idx % 2 == 0 { 1.0 } else { -1.0 };
                [1_000_000.0 + 0.25 * sign, 0.75 * sign - 3.0, 0.1, 0.0]
            })
            .collect();
        let features = FeatureMatrix::from_f32(4, numbers).unwrap();
        let rows: Vec<usize> = (0..n).collect();
        let standard = Standardization::of(&features, &rows, 1);
        assert_eq!(standard, Standardization::of(&features, &rows, 3));
        let mean = [1_000_000.0, -3.0, f64::from(0.1_f32), 0.0];
        let scale = [0.25, 0.75, 1.0, 1.0];
        for column in 0..4 {
            assert!((standard.mean[column] - mean[column]).abs() < 1e-8);
            assert!((standard.scale[column] - scale[column]).abs() < 1e-9);
        }
    }

    #[test]
    fn only_the_rows_that_are_given_are_measured() {
        let features = FeatureMatrix::from_f32(1, vec![1.0, 100.0, 3.0]).unwrap();
        let standard = Standardization::of(&features, &[0, 2], 1);
        assert_eq!((standard.mean[0], standard.scale[0]), (2.0, 1.0));
    }

    #[test]
    fn a_folded_fit_has_the_same_logits() {
        let standard = Standardization {
            mean: vec![2.0, -1.0],
            scale: vec![4.0, 0.5],
        };
        let (mut weight, mut bias) = (vec![1.0, 2.0, -3.0, 0.5], vec![0.25, 1.0]);
        let x = [3.0, 7.0];
        let logits: Vec<f64> = (0..2)
            .map(|row| {
                let z = (0..2).map(|col| {
                    weight[2 * row + col] * (x[col] - standard.mean[col]) / standard.scale[col]
                });
                z.sum::<f64>() + bias[row]
            })
            .collect();
        standard.fold(&mut weight, &mut bias);
        for row in 0..2 {
            let logit = weight[2 * row] * x[0] + weight[2 * row + 1] * x[1] + bias[row];
            assert!((logit - logits[row]).abs() < 1e-12);
        }
    }
}
