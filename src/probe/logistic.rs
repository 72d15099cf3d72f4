//! The objective of a logistic regression, with its gradient.
//!
//! With one class per row, the loss of an example is the negative log of its
//! class's share in the softmax of the logits; two classes are one logit, the
//! log-odds of the second, as in scikit-learn. With several labels, the loss is the
//! sum of the losses of independent sigmoids. scikit-learn's objective,
//! `C * sum(weight * loss) + 0.5 * |w|^2` with a free intercept, is divided by `C`
//! and by the sum of the examples' weights (by their number, with several labels):
//!
//! `sum(weight * loss) / total + 0.5 * penalty * |w|^2`, `penalty = 1 / (C * total)`
//!
//! which has the same minimum, and gradients of one size whatever the number of
//! examples and the strength.
//!
//! Features are standardized on the way, so an evaluation reads them once, as they
//! are stored, in tiles of rows: logits, residuals and gradient of a tile, in f64,
//! before the next.

mod tile;

use self::tile::{RowTile, stride_of};
use super::parts::RowParts;
use super::targets::OutputWeights;
use super::{
    ClassWeights, FeatureMatrix, LinearFit, ProbeError, ProbeTargets, Standardization, WEIGHTS_MAX,
    real,
};

/// Objective of a fit on some rows, as a function of its parameters: for each
/// output a row of weights for standardized features, and then one intercept per
/// output. Two classes are one output.
#[derive(Debug)]
pub struct LogisticObjective<'a> {
    features: &'a FeatureMatrix,
    targets: &'a ProbeTargets,
    rows: &'a [usize],
    standard: &'a Standardization,
    /// One over the scale of each column.
    inverse: Vec<f64>,
    weights: OutputWeights,
    /// Sum of the examples' weights.
    total: f64,
    penalty: f64,
    n_outputs: usize,
    n_threads: usize,
}

/// Sums over the rows of a part.
struct Sums {
    loss: f64,
    /// Rows of the tile's stride.
    gradient: Vec<f64>,
    bias: Vec<f64>,
}

impl<'a> LogisticObjective<'a> {
    /// Makes the objective of the examples in `rows`.
    ///
    /// # Errors
    ///
    /// When the sizes of features and labels differ, features of `rows` are not
    /// finite, `rows` are no training part ([`ProbeTargets::check_training`]), the
    /// probe would be too large, or weights or strength are not above 0.
    pub fn new(
        features: &'a FeatureMatrix,
        targets: &'a ProbeTargets,
        rows: &'a [usize],
        standard: &'a Standardization,
        weights: &ClassWeights,
        strength: f64,
        n_threads: usize,
    ) -> Result<Self, ProbeError> {
        features.check(rows)?;
        targets.check_training(rows)?;
        let width = features.width();
        if standard.mean.len() != width {
            return Err(ProbeError::Width {
                width,
                expected: standard.mean.len(),
            });
        }
        let n_classes = targets.names().len();
        if n_classes * width > WEIGHTS_MAX {
            return Err(ProbeError::WeightsOverLimit {
                classes: n_classes,
                width,
            });
        }
        let weights = targets.weights(rows, weights)?;
        let total = if targets.is_multi_label() {
            real(rows.len())
        } else {
            let counts = targets.counts(rows);
            let counted = counts.iter().zip(&weights.with);
            counted.map(|(&count, weight)| real(count) * weight).sum()
        };
        let is_binary = n_classes == 2 && !targets.is_multi_label();
        let mut objective = Self {
            features,
            targets,
            rows,
            standard,
            inverse: standard.scale.iter().map(|scale| 1.0 / scale).collect(),
            weights,
            total,
            penalty: 0.0,
            n_outputs: if is_binary { 1 } else { n_classes },
            n_threads,
        };
        objective.set_strength(strength)?;
        Ok(objective)
    }

    /// Sets the strength `C` of another fit on the same rows; a smaller one
    /// regularizes more.
    ///
    /// # Errors
    ///
    /// When it is not finite or not above 0.
    pub fn set_strength(&mut self, strength: f64) -> Result<(), ProbeError> {
        check_strength(strength)?;
        self.penalty = 1.0 / (strength * self.total);
        Ok(())
    }

    /// Returns the number of parameters.
    #[must_use]
    pub fn n_parameters(&self) -> usize {
        self.n_outputs * (self.features.width() + 1)
    }

    /// Returns the objective at `parameters`, and writes its gradient.
    ///
    /// # Panics
    ///
    /// When the sizes are not [`Self::n_parameters`].
    pub fn evaluate(&self, parameters: &[f64], gradient: &mut [f64]) -> f64 {
        assert_eq!(parameters.len(), self.n_parameters(), "all parameters");
        assert_eq!(gradient.len(), self.n_parameters(), "all of the gradient");
        let width = self.features.width();
        let stride = stride_of(width);
        let (weight, bias) = parameters.split_at(self.n_outputs * width);
        let padded = padded(weight, width);
        let parts = RowParts::new(self.rows.len(), self.n_outputs * stride);
        let n_threads = threads_for(self.rows.len() * weight.len(), self.n_threads);
        let parts = parts.map(n_threads, |rows| self.sums(&self.rows[rows], &padded, bias));

        let norm: f64 = weight.iter().map(|w| w * w).sum();
        let mut loss = 0.0;
        let (weight_gradient, bias_gradient) = gradient.split_at_mut(weight.len());
        weight_gradient.fill(0.0);
        bias_gradient.fill(0.0);
        for part in &parts {
            loss += part.loss;
            let rows = weight_gradient.chunks_exact_mut(width);
            for (into, from) in rows.zip(part.gradient.chunks_exact(stride)) {
                for (sum, from) in into.iter_mut().zip(from) {
                    *sum += from;
                }
            }
            for (sum, from) in bias_gradient.iter_mut().zip(&part.bias) {
                *sum += from;
            }
        }
        for (gradient, w) in weight_gradient.iter_mut().zip(weight) {
            *gradient = *gradient / self.total + self.penalty * w;
        }
        for gradient in bias_gradient {
            *gradient /= self.total;
        }
        loss / self.total + 0.5 * self.penalty * norm
    }

    fn sums(&self, rows: &[usize], weights: &[f64], bias: &[f64]) -> Sums {
        let mut sums = Sums {
            loss: 0.0,
            gradient: vec![0.0; weights.len()],
            bias: vec![0.0; bias.len()],
        };
        let mut tile = RowTile::new(self.features.width(), self.n_outputs);
        for rows in rows.chunks(tile.n_rows) {
            tile.read(self.features, rows, self.standard, &self.inverse);
            tile.logits(weights, bias);
            let (used, unused) = tile.z.split_at_mut(rows.len() * self.n_outputs);
            for (&row, z) in rows.iter().zip(used.chunks_exact_mut(self.n_outputs)) {
                sums.loss += self.residuals(row, z);
                for (sum, residual) in sums.bias.iter_mut().zip(z) {
                    *sum += *residual;
                }
            }
            unused.fill(0.0);
            tile.add_gradient(&mut sums.gradient);
        }
        sums
    }

    /// Turns the logits of a row into the derivatives of its loss, and returns the
    /// loss.
    fn residuals(&self, row: usize, z: &mut [f64]) -> f64 {
        match self.targets.class(row) {
            // The logit of two classes is that of the second.
            Some(class) if self.n_outputs == 1 => {
                sigmoid_residual(&mut z[0], class == 1, self.weights.with[class])
            }
            Some(class) => softmax_residuals(z, class, self.weights.with[class]),
            None => {
                let weights = self.weights.with.iter().zip(&self.weights.without);
                let outputs = z.iter_mut().zip(weights).enumerate();
                outputs
                    .map(|(output, (z, (&with, &without)))| {
                        let has = self.targets.has(row, output);
                        sigmoid_residual(z, has, if has { with } else { without })
                    })
                    .sum()
            }
        }
    }

    /// Returns the fit that `parameters` are, for features as they come. Two classes
    /// have two rows, the one the negative of the other, whose difference is the
    /// log-odds.
    ///
    /// # Panics
    ///
    /// When the size is not [`Self::n_parameters`].
    #[must_use]
    pub fn fit_of(&self, parameters: &[f64]) -> LinearFit {
        assert_eq!(parameters.len(), self.n_parameters(), "all parameters");
        let width = self.features.width();
        let (weight, bias) = parameters.split_at(self.n_outputs * width);
        let (mut weight, mut bias) = (weight.to_vec(), bias.to_vec());
        self.standard.fold(&mut weight, &mut bias);
        if self.n_outputs == 1 && !self.targets.is_multi_label() {
            let halves = |numbers: &[f64]| {
                let signs = [-0.5, 0.5].into_iter();
                signs
                    .flat_map(|sign| numbers.iter().map(move |x| sign * x))
                    .collect()
            };
            (weight, bias) = (halves(&weight), halves(&bias));
        }
        LinearFit {
            width,
            is_multi_label: self.targets.is_multi_label(),
            weight,
            bias,
        }
    }
}

/// Checks the strength `C` of a fit.
pub(super) fn check_strength(strength: f64) -> Result<(), ProbeError> {
    if strength.is_finite() && strength > 0.0 {
        Ok(())
    } else {
        Err(ProbeError::Strength { strength })
    }
}

/// Returns the threads that are worth starting for so many products: another
/// thread costs about 50 microseconds, in which a core does a million products.
fn threads_for(n_products: usize, n_threads: usize) -> usize {
    n_threads.min(n_products >> 21).max(1)
}

/// Returns rows of weights in the tile's stride.
fn padded(weight: &[f64], width: usize) -> Vec<f64> {
    let stride = stride_of(width);
    let mut padded = vec![0.0; weight.len() / width * stride];
    for (into, from) in padded
        .chunks_exact_mut(stride)
        .zip(weight.chunks_exact(width))
    {
        into[..width].copy_from_slice(from);
    }
    padded
}

/// Returns the largest logit, and the log of the sum of their exponentials. No
/// exponential is above 1, so none overflows.
pub(super) fn log_sum_exp(z: &[f64]) -> f64 {
    let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    most + z.iter().map(|z| (z - most).exp()).sum::<f64>().ln()
}

/// Returns `ln(1 + exp(z))`.
pub(super) fn softplus(z: f64) -> f64 {
    z.max(0.0) + (-z.abs()).exp().ln_1p()
}

/// Returns `1 / (1 + exp(-z))`.
pub(super) fn sigmoid(z: f64) -> f64 {
    let small = (-z.abs()).exp();
    if z >= 0.0 {
        1.0 / (1.0 + small)
    } else {
        small / (1.0 + small)
    }
}

fn softmax_residuals(z: &mut [f64], class: usize, weight: f64) -> f64 {
    let most = z.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let above = z[class] - most;
    let mut sum = 0.0;
    for z in &mut *z {
        *z = (*z - most).exp();
        sum += *z;
    }
    let share = weight / sum;
    for z in &mut *z {
        *z *= share;
    }
    z[class] -= weight;
    weight * (sum.ln() - above)
}

fn sigmoid_residual(z: &mut f64, has: bool, weight: f64) -> f64 {
    let logit = *z;
    // The loss of one without the label is that of one with it at minus the logit.
    let signed = if has { logit } else { -logit };
    let residual = weight * sigmoid(-signed);
    *z = if has { -residual } else { residual };
    weight * softplus(-signed)
}

/// Products of rows with weights, for a fit on features as they come.
pub(super) fn visit_logits(
    fit: &LinearFit,
    features: &FeatureMatrix,
    rows: &[usize],
    mut visit: impl FnMut(usize, &[f64]),
) {
    let standard = Standardization::none(fit.width);
    let weights = padded(&fit.weight, fit.width);
    let n_outputs = fit.bias.len();
    let mut tile = RowTile::new(fit.width, n_outputs);
    let n_rows = tile.n_rows;
    for (idx, rows) in rows.chunks(n_rows).enumerate() {
        tile.read(features, rows, &standard, &standard.scale);
        tile.logits(&weights, &fit.bias);
        let logits = tile.z.chunks_exact(n_outputs).take(rows.len());
        for (row, logits) in logits.enumerate() {
            visit(idx * n_rows + row, logits);
        }
    }
}
