//! Measures where an example may have several labels.

use super::share;
use crate::probe::logistic::softplus;
use crate::probe::real;

/// Measures of independent labels. Shares are from 0 to 1, losses in nats.
#[derive(Debug, Clone, PartialEq)]
pub struct LabelMeasures {
    pub examples: usize,
    /// Mean loss of an example and label.
    pub log_loss: f64,
    /// Share of the pairs of example and label that are right.
    pub accuracy: f64,
    /// Mean of the average precisions of the labels that occur; `None` if none does.
    pub mean_average_precision: Option<f64>,
    /// Figures of each label, in the order of names.
    pub labels: Vec<LabelFigures>,
}

/// Figures of one label; `None` where a share would be of nothing. A label is
/// predicted where its logit is above 0, its probability above one half.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LabelFigures {
    /// Examples that have the label.
    pub support: usize,
    pub accuracy: f64,
    /// Share of its predictions that are right.
    pub precision: Option<f64>,
    /// Share of the examples with the label that are predicted.
    pub recall: Option<f64>,
    /// Area under the steps of precision over recall.
    pub average_precision: Option<f64>,
}

/// Collector of [`LabelMeasures`]. An average precision needs the order of all
/// examples, so each logit is held: 16 bytes per example and label.
#[derive(Debug, Clone)]
pub struct LabelScorer {
    /// Logits of each label, and whether the example has it.
    labels: Vec<Vec<(f64, bool)>>,
}

impl LabelScorer {
    /// Makes a scorer for `n_labels` labels.
    #[must_use]
    pub fn new(n_labels: usize) -> Self {
        Self {
            labels: vec![Vec::new(); n_labels],
        }
    }

    /// Adds an example: the logit of each label, and which labels it has.
    pub fn add(&mut self, logits: &[f64], has: impl Fn(usize) -> bool) {
        for (label, (seen, &logit)) in self.labels.iter_mut().zip(logits).enumerate() {
            seen.push((logit, has(label)));
        }
    }

    /// Returns the measures; `None` without an example or a label.
    #[must_use]
    pub fn finish(self) -> Option<LabelMeasures> {
        let examples = self.labels.first().map_or(0, Vec::len);
        if examples == 0 {
            return None;
        }
        let losses = self.labels.iter().flatten();
        let loss: f64 = losses
            .map(|&(logit, has)| softplus(if has { -logit } else { logit }))
            .sum();
        let labels: Vec<_> = self.labels.into_iter().map(figures).collect();
        let precisions: Vec<f64> = labels.iter().filter_map(|l| l.average_precision).collect();
        let n_labels = real(labels.len());
        Some(LabelMeasures {
            examples,
            log_loss: loss / real(examples) / n_labels,
            accuracy: labels.iter().map(|label| label.accuracy).sum::<f64>() / n_labels,
            mean_average_precision: (!precisions.is_empty())
                .then(|| precisions.iter().sum::<f64>() / real(precisions.len())),
            labels,
        })
    }
}

fn figures(mut seen: Vec<(f64, bool)>) -> LabelFigures {
    let count = |wanted: fn(&(f64, bool)) -> bool| seen.iter().filter(|one| wanted(one)).count();
    let support = count(|&(_, has)| has);
    let n_predicted = count(|&(logit, _)| logit > 0.0);
    let n_found = count(|&(logit, has)| has && logit > 0.0);
    let n_right = count(|&(logit, has)| has == (logit > 0.0));
    let accuracy = real(n_right) / real(seen.len());
    LabelFigures {
        support,
        accuracy,
        precision: share(n_found, n_predicted),
        recall: share(n_found, support),
        average_precision: average_precision(&mut seen, support),
    }
}

/// Returns the sum over thresholds of the precision there, each times the recall
/// that it adds. Equal logits are one threshold.
fn average_precision(seen: &mut [(f64, bool)], support: usize) -> Option<f64> {
    if support == 0 {
        return None;
    }
    seen.sort_by(|(one, _), (other, _)| other.total_cmp(one));
    let (mut n_seen, mut n_found, mut area) = (0, 0, 0.0);
    for equal in seen.chunk_by(|(one, _), (other, _)| one.total_cmp(other).is_eq()) {
        let more = equal.iter().filter(|(_, has)| *has).count();
        n_seen += equal.len();
        n_found += more;
        area += real(more) / real(support) * real(n_found) / real(n_seen);
    }
    Some(area)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_logits_are_one_threshold() {
        // By logit: 2 with, 1 with and without at once, 0 with.
        let mut seen = [(1.0, false), (2.0, true), (0.0, true), (1.0, true)];
        let area = average_precision(&mut seen, 3).unwrap();
        let expected = (1.0 + 2.0 / 3.0 + 3.0 / 4.0) / 3.0;
        assert!((area - expected).abs() < 1e-15, "{area}");
    }

    #[test]
    fn a_label_without_examples_has_no_precision_to_average() {
        let mut scorer = LabelScorer::new(2);
        scorer.add(&[1.0, -1.0], |label| label == 0);
        scorer.add(&[-2.0, -1.0], |_| false);
        let measures = scorer.finish().unwrap();
        assert_eq!(measures.mean_average_precision, Some(1.0));
        let [first, second] = measures.labels[..] else {
            panic!("two labels");
        };
        assert_eq!((first.support, first.accuracy), (1, 1.0));
        assert_eq!((first.precision, first.recall), (Some(1.0), Some(1.0)));
        assert_eq!((second.precision, second.recall), (None, None));
        assert_eq!(second.average_precision, None);
        assert_eq!((measures.examples, measures.accuracy), (2, 1.0));
        assert_eq!(LabelScorer::new(2).finish(), None);
    }
}
