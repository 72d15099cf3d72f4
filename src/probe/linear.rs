//! A fitted probe, for features as they come.

use super::logistic::{log_sum_exp, softplus, visit_logits};
use super::parts::RowParts;
use super::{FeatureMatrix, ProbeError, ProbeTargets, real};

/// Linear classifier: the logit of a class is the product of its row with the
/// features, plus its bias.
#[derive(Debug, Clone, PartialEq)]
pub struct LinearFit {
    /// Features of a row.
    pub width: usize,
    /// Independent sigmoids instead of a softmax.
    pub is_multi_label: bool,
    /// A row of `width` per class or label.
    pub weight: Vec<f64>,
    /// One number per class or label.
    pub bias: Vec<f64>,
}

/// Scores of a fit on some examples, each counted once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PartScores {
    /// Mean loss of an example, in nats; of an example and label, where examples
    /// have several.
    pub log_loss: f64,
    /// Share of the examples whose class has the largest logit; of the pairs of
    /// example and label that are right, where examples have several.
    pub accuracy: f64,
}

impl LinearFit {
    /// Calls `visit` with the position in `rows` and the logits of each row, in
    /// their order.
    ///
    /// # Errors
    ///
    /// When the features have another width, or rows are outside or not finite.
    pub fn visit(
        &self,
        features: &FeatureMatrix,
        rows: &[usize],
        visit: impl FnMut(usize, &[f64]),
    ) -> Result<(), ProbeError> {
        self.check(features, rows)?;
        visit_logits(self, features, rows, visit);
        Ok(())
    }

    /// Returns the scores on the examples in `rows`.
    ///
    /// # Errors
    ///
    /// When the features have another width, rows are outside or not finite, or
    /// there are none.
    pub fn scores(
        &self,
        features: &FeatureMatrix,
        targets: &ProbeTargets,
        rows: &[usize],
        n_threads: usize,
    ) -> Result<PartScores, ProbeError> {
        self.check(features, rows)?;
        if rows.is_empty() {
            return Err(ProbeError::NoRows);
        }
        let n_outputs = self.bias.len();
        let parts = RowParts::new(rows.len(), n_outputs * self.width);
        let parts = parts.map(n_threads, |part| {
            let rows = &rows[part];
            let (mut loss, mut n_right) = (0.0, 0);
            visit_logits(self, features, rows, |position, logits| {
                let row = rows[position];
                if let Some(class) = targets.class(row) {
                    loss += log_sum_exp(logits) - logits[class];
                    n_right += usize::from(largest(logits) == class);
                } else {
                    for (label, &logit) in logits.iter().enumerate() {
                        let has = targets.has(row, label);
                        loss += softplus(if has { -logit } else { logit });
                        n_right += usize::from((logit > 0.0) == has);
                    }
                }
            });
            (loss, n_right)
        });
        let (mut loss, mut n_right) = (0.0, 0);
        for (part_loss, part_right) in parts {
            loss += part_loss;
            n_right += part_right;
        }
        let n = real(rows.len())
            * if self.is_multi_label {
                real(n_outputs)
            } else {
                1.0
            };
        Ok(PartScores {
            log_loss: loss / n,
            accuracy: real(n_right) / n,
        })
    }

    /// Returns the probability of each class, or of each label, for logits of
    /// [`Self::visit`].
    #[must_use]
    pub fn probabilities(&self, logits: &[f64]) -> Vec<f64> {
        if self.is_multi_label {
            return logits
                .iter()
                .map(|logit| (-softplus(-logit)).exp())
                .collect();
        }
        let all = log_sum_exp(logits);
        logits.iter().map(|logit| (logit - all).exp()).collect()
    }

    /// Returns the class with the largest logit, or the labels that are more
    /// likely than not.
    #[must_use]
    pub fn predicted(&self, logits: &[f64]) -> Vec<usize> {
        if self.is_multi_label {
            return (0..logits.len())
                .filter(|&label| logits[label] > 0.0)
                .collect();
        }
        vec![largest(logits)]
    }

    /// Returns weight and bias in f32, as a head file has them.
    ///
    /// # Errors
    ///
    /// When a number is beyond an f32, which a column of nearly no variance makes;
    /// a bias counts as the column after the last.
    pub fn rounded(&self) -> Result<(Vec<f32>, Vec<f32>), ProbeError> {
        let round = |class: usize, column: usize, weight: f64| {
            #[expect(clippy::cast_possible_truncation, reason = "rounded once to f32")]
            let rounded = weight as f32;
            if rounded.is_finite() {
                Ok(rounded)
            } else {
                Err(ProbeError::WeightOverflow {
                    class,
                    column,
                    weight,
                })
            }
        };
        let weight = self.weight.iter().enumerate();
        let bias = self.bias.iter().enumerate();
        Ok((
            weight
                .map(|(idx, &w)| round(idx / self.width, idx % self.width, w))
                .collect::<Result<_, _>>()?,
            bias.map(|(class, &b)| round(class, self.width, b))
                .collect::<Result<_, _>>()?,
        ))
    }

    fn check(&self, features: &FeatureMatrix, rows: &[usize]) -> Result<(), ProbeError> {
        if features.width() != self.width {
            return Err(ProbeError::Width {
                width: features.width(),
                expected: self.width,
            });
        }
        features.check(rows)
    }
}

/// Returns the index of the largest number, the first of equals.
pub(super) fn largest(numbers: &[f64]) -> usize {
    let mut best = 0;
    for (idx, &number) in numbers.iter().enumerate() {
        if number > numbers[best] {
            best = idx;
        }
    }
    best
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_weight_that_no_f32_holds_is_named() {
        let mut fit = LinearFit {
            width: 2,
            is_multi_label: false,
            weight: vec![1.0, 0.1, -2.0, 0.0],
            bias: vec![0.5, 1e10],
        };
        let rounded = (vec![1.0, 0.1, -2.0, 0.0], vec![0.5, 1e10]);
        assert_eq!(fit.rounded(), Ok(rounded));
        fit.weight[3] = -1e39;
        let error = fit.rounded().unwrap_err().to_string();
        assert!(
            error.contains("weight of class 1 for column 1 is -1000"),
            "{error}"
        );
        fit.weight[3] = 0.0;
        fit.bias[0] = f64::INFINITY;
        assert!(matches!(
            fit.rounded(),
            Err(ProbeError::WeightOverflow {
                class: 0,
                column: 2,
                ..
            })
        ));
    }

    #[test]
    fn features_of_another_width_are_refused() {
        let fit = LinearFit {
            width: 2,
            is_multi_label: false,
            weight: vec![1.0; 4],
            bias: vec![0.0; 2],
        };
        let features = FeatureMatrix::from_f32(3, vec![0.0; 3]).unwrap();
        let error = fit.visit(&features, &[0], |_, _| {}).unwrap_err();
        assert_eq!(
            error,
            ProbeError::Width {
                width: 3,
                expected: 2
            }
        );
    }
}
