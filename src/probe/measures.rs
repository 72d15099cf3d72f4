//! Measures of a classifier on examples that its fit has not seen.
//!
//! A scorer takes the logits of one example after the other and holds only counts,
//! so any number of examples can be measured; a fit gives logits through
//! [`LinearFit::visit`](super::LinearFit::visit).

mod labels;

use std::collections::BTreeMap;

pub use self::labels::{LabelFigures, LabelMeasures, LabelScorer};
use super::linear::largest;
use super::logistic::log_sum_exp;
use super::{ProbeTargets, real};

/// Bins of the calibration error, the usual number.
const CALIBRATION_BINS: usize = 15;

/// Measures of a classifier with one class per example. Shares and errors are from 0
/// to 1, losses in nats.
#[derive(Debug, Clone, PartialEq)]
pub struct ClassMeasures {
    pub examples: usize,
    /// Share of the examples whose class has the largest logit; of equal logits the
    /// first counts.
    pub accuracy: f64,
    /// Standard error of the accuracy: `sqrt(a (1 - a) / examples)`.
    pub accuracy_error: f64,
    pub log_loss: f64,
    /// Number of classes of [`Self::top_k_accuracy`].
    pub top_k: usize,
    /// Share of the examples with fewer than `top_k` classes above their own.
    pub top_k_accuracy: f64,
    /// Pairs of class and prediction that occur, ascending. A full matrix of many
    /// classes would be mostly zeros.
    pub confusion: Vec<ConfusionCount>,
    /// Figures of each class, in the order of names.
    pub classes: Vec<ClassFigures>,
    /// Mean over the examples of the difference between confidence and accuracy of
    /// their bin.
    pub calibration_error: f64,
    /// Bins of equal width over confidences from 0 to 1; empty ones are there too.
    pub calibration: Vec<CalibrationBin>,
    /// Wrong examples, the most confident first.
    pub wrong: Vec<WrongExample>,
}

/// Number of examples of a class that got a prediction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ConfusionCount {
    pub class: usize,
    pub predicted: usize,
    pub examples: usize,
}

/// Figures of one class; `None` where a share would be of nothing.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassFigures {
    /// Examples of the class.
    pub support: usize,
    /// Share of its predictions that are right.
    pub precision: Option<f64>,
    /// Share of its examples that are predicted.
    pub recall: Option<f64>,
    /// Harmonic mean of both, `2 right / (support + predictions)`.
    pub f1: Option<f64>,
}

/// Examples whose prediction has a probability within a bin.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CalibrationBin {
    pub examples: usize,
    /// Mean probability of the predictions; 0 in an empty bin.
    pub confidence: f64,
    /// Share of the predictions that are right; 0 in an empty bin.
    pub accuracy: f64,
}

/// Example with a wrong prediction.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WrongExample {
    /// Number under which the example was given.
    pub example: usize,
    pub class: usize,
    pub predicted: usize,
    /// Probability of the prediction.
    pub confidence: f64,
}

/// Measures that no features are needed for, on the same examples.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ClassBaselines {
    /// Accuracy of a class drawn at random: one over the number of classes.
    pub chance_accuracy: f64,
    /// Log loss of equal probabilities.
    pub chance_log_loss: f64,
    /// Most frequent class of the training part; of equals the first.
    pub majority_class: usize,
    /// Accuracy of always predicting it.
    pub majority_accuracy: f64,
    /// Log loss of the training part's frequencies.
    pub majority_log_loss: f64,
}

impl ClassBaselines {
    /// Measures the baselines on `rows`; `None` where examples have several labels,
    /// or when there are no examples. `train` has an example of every class
    /// ([`ProbeTargets::check_training`]).
    ///
    /// # Panics
    ///
    /// When a row is outside.
    #[must_use]
    pub fn of(targets: &ProbeTargets, train: &[usize], rows: &[usize]) -> Option<Self> {
        if targets.is_multi_label() || rows.is_empty() || train.is_empty() {
            return None;
        }
        let counts = targets.counts(train);
        let mut majority_class = 0;
        for (class, &count) in counts.iter().enumerate() {
            if count > counts[majority_class] {
                majority_class = class;
            }
        }
        let measured = targets.counts(rows);
        let losses = measured.iter().zip(&counts).filter(|(n, _)| **n != 0);
        let losses = losses.map(|(&n, &count)| real(n) * (real(train.len()) / real(count)).ln());
        let n_classes = real(counts.len());
        Some(Self {
            chance_accuracy: 1.0 / n_classes,
            chance_log_loss: n_classes.ln(),
            majority_class,
            majority_accuracy: real(measured[majority_class]) / real(rows.len()),
            majority_log_loss: losses.sum::<f64>() / real(rows.len()),
        })
    }
}

/// Collector of [`ClassMeasures`].
#[derive(Debug, Clone)]
pub struct ClassScorer {
    n_classes: usize,
    top_k: usize,
    wrong_max: usize,
    examples: usize,
    n_right: usize,
    n_within_top: usize,
    loss: f64,
    /// Examples by class and prediction: at most one entry per example.
    confusion: BTreeMap<(usize, usize), usize>,
    bins: [Bin; CALIBRATION_BINS],
    wrong: Vec<WrongExample>,
}

#[derive(Debug, Clone, Copy, Default)]
struct Bin {
    examples: usize,
    confidence: f64,
    n_right: usize,
}

impl ClassScorer {
    /// Makes a scorer for `n_classes`, which also counts how often the class is
    /// among the first `top_k`, and keeps the `wrong_max` most confident mistakes.
    #[must_use]
    pub fn new(n_classes: usize, top_k: usize, wrong_max: usize) -> Self {
        Self {
            n_classes,
            top_k,
            wrong_max,
            examples: 0,
            n_right: 0,
            n_within_top: 0,
            loss: 0.0,
            confusion: BTreeMap::new(),
            bins: [Bin::default(); CALIBRATION_BINS],
            wrong: Vec::new(),
        }
    }

    /// Adds an example: the number by which the caller knows it, its class, and the
    /// logit of each class.
    ///
    /// # Panics
    ///
    /// When `class` is outside the logits.
    pub fn add(&mut self, example: usize, class: usize, logits: &[f64]) {
        let predicted = largest(logits);
        let all = log_sum_exp(logits);
        let confidence = (logits[predicted] - all).exp();
        let is_right = predicted == class;
        let own = logits[class];
        let before = logits.iter().enumerate();
        let n_before = before
            .filter(|&(other, &logit)| logit > own || logit >= own && other < class)
            .count();
        self.examples += 1;
        self.n_right += usize::from(is_right);
        self.n_within_top += usize::from(n_before < self.top_k);
        self.loss += all - own;
        *self.confusion.entry((class, predicted)).or_default() += 1;
        let bin = &mut self.bins[bin_of(confidence)];
        bin.examples += 1;
        bin.confidence += confidence;
        bin.n_right += usize::from(is_right);
        if !is_right {
            self.keep(WrongExample {
                example,
                class,
                predicted,
                confidence,
            });
        }
    }

    /// Keeps a mistake if it is among the most confident.
    fn keep(&mut self, mistake: WrongExample) {
        let place = self
            .wrong
            .partition_point(|kept| kept.confidence >= mistake.confidence);
        if place < self.wrong_max {
            self.wrong.truncate(self.wrong_max - 1);
            self.wrong.insert(place, mistake);
        }
    }

    /// Returns the measures; `None` without an example.
    #[must_use]
    pub fn finish(self) -> Option<ClassMeasures> {
        if self.examples == 0 {
            return None;
        }
        let n = real(self.examples);
        let accuracy = real(self.n_right) / n;
        let mut supports = vec![0; self.n_classes];
        let mut predictions = vec![0; self.n_classes];
        let mut rights = vec![0; self.n_classes];
        for (&(class, predicted), &examples) in &self.confusion {
            supports[class] += examples;
            predictions[predicted] += examples;
            if class == predicted {
                rights[class] = examples;
            }
        }
        let counted = supports.iter().zip(&predictions).zip(&rights);
        let classes = counted.map(|((&support, &predicted), &right)| ClassFigures {
            support,
            precision: share(right, predicted),
            recall: share(right, support),
            f1: share(2 * right, support + predicted),
        });
        let calibration = self.bins.map(|bin| CalibrationBin {
            examples: bin.examples,
            confidence: bin.confidence / real(bin.examples.max(1)),
            accuracy: real(bin.n_right) / real(bin.examples.max(1)),
        });
        let misses = calibration
            .iter()
            .map(|bin| real(bin.examples) * (bin.confidence - bin.accuracy).abs());
        Some(ClassMeasures {
            examples: self.examples,
            accuracy,
            accuracy_error: (accuracy * (1.0 - accuracy) / n).sqrt(),
            log_loss: self.loss / n,
            top_k: self.top_k,
            top_k_accuracy: real(self.n_within_top) / n,
            classes: classes.collect(),
            confusion: self
                .confusion
                .iter()
                .map(|(&(class, predicted), &examples)| ConfusionCount {
                    class,
                    predicted,
                    examples,
                })
                .collect(),
            calibration_error: misses.sum::<f64>() / n,
            calibration: calibration.to_vec(),
            wrong: self.wrong,
        })
    }
}

/// Returns the bin of a confidence from 0 to 1; the last one has its upper bound.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "from 0 to the number of bins"
)]
fn bin_of(confidence: f64) -> usize {
    ((confidence * real(CALIBRATION_BINS)) as usize).min(CALIBRATION_BINS - 1)
}

/// Returns a share; `None` of nothing.
fn share(part: usize, whole: usize) -> Option<f64> {
    (whole != 0).then(|| real(part) / real(whole))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Logits that give these probabilities.
    fn logits(shares: &[f64]) -> Vec<f64> {
        shares.iter().map(|share| share.ln() + 5.0).collect()
    }

    fn near(found: f64, expected: f64) {
        assert!((found - expected).abs() < 1e-12, "{found}, not {expected}");
    }

    #[test]
    fn measures_of_four_examples() {
        let mut scorer = ClassScorer::new(3, 2, 1);
        scorer.add(10, 0, &logits(&[0.7, 0.2, 0.1]));
        scorer.add(11, 1, &logits(&[0.24, 0.35, 0.41]));
        scorer.add(12, 2, &logits(&[0.9, 0.06, 0.04]));
        scorer.add(13, 0, &logits(&[0.71, 0.2, 0.09]));
        let measures = scorer.finish().unwrap();
        near(measures.accuracy, 0.5);
        near(measures.accuracy_error, 0.25);
        let losses = [0.7_f64, 0.35, 0.04, 0.71].map(|p| -p.ln());
        near(measures.log_loss, losses.iter().sum::<f64>() / 4.0);
        near(measures.top_k_accuracy, 0.75);
        // 0.7 and 0.71 share a bin.
        let bins: Vec<_> = measures.calibration.iter().map(|b| b.examples).collect();
        assert_eq!(bins, [0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 1, 0]);
        near(measures.calibration[10].confidence, 0.705);
        near(measures.calibration[10].accuracy, 1.0);
        near(measures.calibration_error, (2.0 * 0.295 + 0.41 + 0.9) / 4.0);
        let count = |class, predicted, examples| ConfusionCount {
            class,
            predicted,
            examples,
        };
        let counts = [count(0, 0, 2), count(1, 2, 1), count(2, 0, 1)];
        assert_eq!(measures.confusion, counts);
        let [first, second, third] = measures.classes[..] else {
            panic!("three classes");
        };
        near(first.precision.unwrap(), 2.0 / 3.0);
        near(first.recall.unwrap(), 1.0);
        near(first.f1.unwrap(), 0.8);
        assert_eq!((second.support, second.precision), (1, None));
        assert_eq!((third.precision, third.recall), (Some(0.0), Some(0.0)));
        let [wrong] = measures.wrong[..] else {
            panic!("one is kept");
        };
        assert_eq!((wrong.example, wrong.class, wrong.predicted), (12, 2, 0));
        near(wrong.confidence, 0.9);
    }

    #[test]
    fn the_most_confident_mistakes_are_kept_in_order() {
        let mut scorer = ClassScorer::new(2, 1, 3);
        for (example, share) in [0.6, 0.9, 0.7, 0.9, 0.8].into_iter().enumerate() {
            scorer.add(example, 1, &logits(&[share, 1.0 - share]));
        }
        let wrong = scorer.finish().unwrap().wrong;
        let kept: Vec<_> = wrong.iter().map(|wrong| wrong.example).collect();
        assert_eq!(kept, [1, 3, 4]);
        let mut none = ClassScorer::new(2, 1, 0);
        none.add(0, 1, &[2.0, 1.0]);
        assert!(none.finish().unwrap().wrong.is_empty());
        assert_eq!(ClassScorer::new(2, 1, 3).finish(), None);
    }

    #[test]
    fn an_impossible_class_has_a_finite_loss() {
        let mut scorer = ClassScorer::new(2, 1, 3);
        scorer.add(0, 1, &[5000.0, 0.0]);
        let measures = scorer.finish().unwrap();
        near(measures.log_loss, 5000.0);
        near(measures.wrong[0].confidence, 1.0);
    }

    #[test]
    fn baselines_know_the_training_part_alone() {
        let names = ["a", "b"].map(str::to_owned).to_vec();
        let targets = ProbeTargets::classes(names, vec![0, 1, 1, 1, 0, 0, 1]).unwrap();
        let baselines = ClassBaselines::of(&targets, &[0, 1, 2, 3], &[4, 5, 6]).unwrap();
        near(baselines.chance_accuracy, 0.5);
        near(baselines.chance_log_loss, 2.0_f64.ln());
        assert_eq!(baselines.majority_class, 1);
        near(baselines.majority_accuracy, 1.0 / 3.0);
        let loss = (2.0 * 4.0_f64.ln() + (4.0_f64 / 3.0).ln()) / 3.0;
        near(baselines.majority_log_loss, loss);
        assert_eq!(ClassBaselines::of(&targets, &[0, 1], &[]), None);
    }
}
