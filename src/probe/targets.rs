//! Labels of examples, and the weights of classes.

use super::{CLASSES_MAX, ProbeError, real};

#[derive(Debug, Clone)]
enum TargetKind {
    /// Class of each row.
    Classes(Vec<usize>),
    /// Values of each row: as many as there are names, one row after the other.
    Labels(Vec<bool>),
}

/// Labels of all rows: one class each, or any number of labels each.
#[derive(Debug, Clone)]
pub struct ProbeTargets {
    names: Vec<String>,
    n_rows: usize,
    kind: TargetKind,
}

/// Weights of classes in the sum of losses.
#[derive(Debug, Clone, PartialEq, Default)]
pub enum ClassWeights {
    /// Every example counts once.
    #[default]
    None,
    /// Every class counts alike: an example of a class counts
    /// `examples / (classes * examples of the class)`. With several labels, each
    /// label's two values count alike.
    Balanced,
    /// Weight of each class, in the order of names. With several labels, the weight
    /// of the examples that have the label; those without count once.
    Explicit(Vec<f64>),
}

impl ProbeTargets {
    /// Makes labels of one class per row: `classes` are indices into `names`.
    ///
    /// # Errors
    ///
    /// When there is no row, no name, too many names, or a class without a name.
    pub fn classes(names: Vec<String>, classes: Vec<usize>) -> Result<Self, ProbeError> {
        check_names(&names)?;
        if classes.is_empty() {
            return Err(ProbeError::NoRows);
        }
        if let Some(row) = classes.iter().position(|&class| class >= names.len()) {
            return Err(ProbeError::LabelOutside {
                row,
                class: classes[row],
                classes: names.len(),
            });
        }
        Ok(Self {
            names,
            n_rows: classes.len(),
            kind: TargetKind::Classes(classes),
        })
    }

    /// Makes labels of which a row may have any: `values` are `n_rows` rows of one
    /// value per name.
    ///
    /// # Errors
    ///
    /// When there is no row, no name, too many names, or another number of values.
    pub fn labels(
        names: Vec<String>,
        n_rows: usize,
        values: Vec<bool>,
    ) -> Result<Self, ProbeError> {
        check_names(&names)?;
        if n_rows == 0 {
            return Err(ProbeError::NoRows);
        }
        if n_rows.checked_mul(names.len()) != Some(values.len()) {
            return Err(ProbeError::LabelValues {
                rows: n_rows,
                labels: names.len(),
                values: values.len(),
            });
        }
        Ok(Self {
            names,
            n_rows,
            kind: TargetKind::Labels(values),
        })
    }

    /// Returns the names of classes or labels, in the order of a fit's rows.
    #[must_use]
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// Returns the number of examples.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Returns whether a row may have several labels.
    #[must_use]
    pub fn is_multi_label(&self) -> bool {
        matches!(self.kind, TargetKind::Labels(_))
    }

    /// Returns the class of a row; `None` where a row may have several labels.
    ///
    /// # Panics
    ///
    /// When `row` is outside.
    #[must_use]
    pub fn class(&self, row: usize) -> Option<usize> {
        match &self.kind {
            TargetKind::Classes(classes) => Some(classes[row]),
            TargetKind::Labels(_) => None,
        }
    }

    /// Returns whether a row has a class or a label.
    ///
    /// # Panics
    ///
    /// When `row` or `output` is outside.
    #[must_use]
    pub fn has(&self, row: usize, output: usize) -> bool {
        match &self.kind {
            TargetKind::Classes(classes) => classes[row] == output,
            TargetKind::Labels(values) => {
                values[row * self.names.len()..][..self.names.len()][output]
            }
        }
    }

    /// Returns the number of rows among `rows` that have each class or label.
    ///
    /// # Panics
    ///
    /// When a row is outside.
    #[must_use]
    pub fn counts(&self, rows: &[usize]) -> Vec<usize> {
        let mut counts = vec![0; self.names.len()];
        for &row in rows {
            match &self.kind {
                TargetKind::Classes(classes) => counts[classes[row]] += 1,
                TargetKind::Labels(values) => {
                    let values = &values[row * self.names.len()..];
                    for (count, &value) in counts.iter_mut().zip(values) {
                        *count += usize::from(value);
                    }
                }
            }
        }
        counts
    }

    /// Checks that a probe can be fitted on `rows`: every class has an example, and
    /// there are two classes; or every label has examples with and without it.
    ///
    /// # Errors
    ///
    /// When that is not so, with the name of the class or label.
    pub fn check_training(&self, rows: &[usize]) -> Result<(), ProbeError> {
        if rows.is_empty() {
            return Err(ProbeError::NoRows);
        }
        if let Some(&row) = rows.iter().find(|&&row| row >= self.n_rows) {
            return Err(ProbeError::RowOutside {
                row,
                rows: self.n_rows,
            });
        }
        let counts = self.counts(rows);
        let counted = self.names.iter().zip(&counts);
        if self.is_multi_label() {
            for (name, &count) in counted {
                if count == 0 || count == rows.len() {
                    return Err(ProbeError::OneValue {
                        label: name.clone(),
                        value: count != 0,
                    });
                }
            }
            return Ok(());
        }
        let mut present = counted.clone().filter(|(_, count)| **count != 0);
        if let (Some((name, _)), None) = (present.next(), present.next()) {
            return Err(ProbeError::OneClass {
                class: name.clone(),
            });
        }
        for (name, &count) in counted {
            if count == 0 {
                return Err(ProbeError::NotInTraining {
                    class: name.clone(),
                });
            }
        }
        Ok(())
    }

    /// Returns the weights of an example with and without each class or label, for
    /// a fit on `rows`.
    pub(super) fn weights(
        &self,
        rows: &[usize],
        weights: &ClassWeights,
    ) -> Result<OutputWeights, ProbeError> {
        let n = self.names.len();
        let counts = self.counts(rows);
        let ones = || vec![1.0; n];
        Ok(match weights {
            ClassWeights::None => OutputWeights {
                with: ones(),
                without: ones(),
            },
            ClassWeights::Balanced => {
                let n_values = if self.is_multi_label() { 2 } else { n };
                let share = |count: usize| real(rows.len()) / real(n_values * count);
                OutputWeights {
                    with: counts.iter().map(|&count| share(count)).collect(),
                    without: counts
                        .iter()
                        .map(|&count| share(rows.len() - count))
                        .collect(),
                }
            }
            ClassWeights::Explicit(weights) => {
                if weights.len() != n {
                    return Err(ProbeError::WeightCount {
                        weights: weights.len(),
                        classes: n,
                    });
                }
                for (name, &weight) in self.names.iter().zip(weights) {
                    if !weight.is_finite() || weight <= 0.0 {
                        return Err(ProbeError::ClassWeight {
                            class: name.clone(),
                            weight,
                        });
                    }
                }
                OutputWeights {
                    with: weights.clone(),
                    without: ones(),
                }
            }
        })
    }
}

/// Weights of an example in the losses: of one that has the class or label, and of
/// one that has not (with one class per row, only the first is used).
#[derive(Debug, Clone)]
pub(super) struct OutputWeights {
    pub(super) with: Vec<f64>,
    pub(super) without: Vec<f64>,
}

fn check_names(names: &[String]) -> Result<(), ProbeError> {
    if names.is_empty() {
        return Err(ProbeError::NoClasses);
    }
    if names.len() > CLASSES_MAX {
        return Err(ProbeError::ClassesOverLimit {
            classes: names.len(),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(n: usize) -> Vec<String> {
        (0..n).map(|idx| format!("name {idx}")).collect()
    }

    #[test]
    fn balanced_classes_weigh_alike() {
        let targets = ProbeTargets::classes(names(3), vec![0, 0, 0, 0, 1, 2]).unwrap();
        let rows = [0, 1, 2, 4, 5];
        let weights = targets.weights(&rows, &ClassWeights::Balanced).unwrap();
        assert_eq!(weights.with, [5.0 / 9.0, 5.0 / 3.0, 5.0 / 3.0]);
    }

    #[test]
    fn balanced_labels_weigh_their_values_alike() {
        let values = vec![true, false, true, true, false, false, false, true];
        let targets = ProbeTargets::labels(names(2), 4, values).unwrap();
        let rows = [0, 1, 2, 3];
        let weights = targets.weights(&rows, &ClassWeights::Balanced).unwrap();
        assert_eq!(weights.with, [1.0, 1.0]);
        let rows = [0, 1, 2];
        let weights = targets.weights(&rows, &ClassWeights::Balanced).unwrap();
        assert_eq!(weights.with, [0.75, 1.5]);
        assert_eq!(weights.without, [1.5, 0.75]);
    }

    #[test]
    fn labels_that_cannot_be_are_refused() {
        let text = |targets: Result<ProbeTargets, ProbeError>| targets.unwrap_err().to_string();
        let outside = text(ProbeTargets::classes(names(2), vec![0, 1, 2]));
        assert!(
            outside.contains("label of row 2 is class 2, and there are 2"),
            "{outside}"
        );
        let values = text(ProbeTargets::labels(names(2), 3, vec![true; 5]));
        assert!(
            values.contains("3 rows of 2 labels would be 6 values, and 5 are given"),
            "{values}"
        );
        let none = ProbeTargets::classes(Vec::new(), vec![0]).unwrap_err();
        assert_eq!(none, ProbeError::NoClasses);
        let none = ProbeTargets::classes(names(2), Vec::new()).unwrap_err();
        assert_eq!(none, ProbeError::NoRows);
        let none = ProbeTargets::labels(names(2), 0, Vec::new()).unwrap_err();
        assert_eq!(none, ProbeError::NoRows);
    }
}
