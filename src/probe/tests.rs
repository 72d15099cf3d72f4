//! Fits and measures beside those of scikit-learn (`tests/golden/probe.json`, made
//! by `make probe-golden`), and what holds for every fit.

use half::f16;
use serde::Deserialize;

use super::*;

#[derive(Deserialize)]
struct Golden {
    classes: Vec<ClassProblem>,
    labels: Vec<LabelProblem>,
}

#[derive(Deserialize)]
#[serde(untagged)]
enum GoldenWeight {
    Word(String),
    Each(Vec<f64>),
}

#[derive(Deserialize)]
struct ClassProblem {
    name: String,
    strength: f64,
    class_weight: Option<GoldenWeight>,
    features: Vec<Vec<f32>>,
    labels: Vec<usize>,
    mean: Vec<f64>,
    scale: Vec<f64>,
    weight: Vec<Vec<f64>>,
    bias: Vec<f64>,
    log_loss: f64,
    predictions: Vec<usize>,
    confusion: Vec<Vec<usize>>,
    precision: Vec<Option<f64>>,
    recall: Vec<Option<f64>>,
    f1: Vec<Option<f64>>,
    support: Vec<usize>,
    top_k: usize,
    top_k_accuracy: f64,
}

#[derive(Deserialize)]
struct LabelProblem {
    name: String,
    strength: f64,
    class_weight: Option<GoldenWeight>,
    features: Vec<Vec<f32>>,
    labels: Vec<Vec<u8>>,
    weight: Vec<Vec<f64>>,
    bias: Vec<f64>,
    log_loss: f64,
    predictions: Vec<Vec<u8>>,
    average_precision: Vec<f64>,
}

pub(super) const LIMITS: MinimumLimits = MinimumLimits {
    tolerance: 1e-9,
    iterations_max: 5000,
};

fn golden() -> Golden {
    serde_json::from_str(include_str!("../../tests/golden/probe.json")).unwrap()
}

fn matrix(rows: &[Vec<f32>]) -> FeatureMatrix {
    FeatureMatrix::from_f32(rows[0].len(), rows.concat()).unwrap()
}

fn names(n: usize) -> Vec<String> {
    (0..n).map(|idx| format!("class {idx}")).collect()
}

fn class_weights(weight: Option<&GoldenWeight>) -> ClassWeights {
    match weight {
        None => ClassWeights::None,
        Some(GoldenWeight::Word(word)) => {
            assert_eq!(word, "balanced");
            ClassWeights::Balanced
        }
        Some(GoldenWeight::Each(weights)) => ClassWeights::Explicit(weights.clone()),
    }
}

/// Fits all rows.
fn fit_all(
    features: &FeatureMatrix,
    targets: &ProbeTargets,
    weights: &ClassWeights,
    strength: f64,
) -> LinearFit {
    let rows: Vec<usize> = (0..features.n_rows()).collect();
    let standard = Standardization::of(features, &rows, 1);
    let objective =
        LogisticObjective::new(features, targets, &rows, &standard, weights, strength, 1).unwrap();
    let start = vec![0.0; objective.n_parameters()];
    let minimum = minimize(
        start,
        LIMITS,
        |point, gradient| objective.evaluate(point, gradient),
        |_, _, _| {},
    );
    assert_eq!(minimum.outcome, FitOutcome::Converged, "{minimum:?}");
    objective.fit_of(&minimum.point)
}

/// Asserts that numbers differ by at most `tolerance`, as a share where they are
/// above 1.
#[track_caller]
pub(super) fn assert_near(name: &str, found: &[f64], expected: &[f64], tolerance: f64) {
    assert_eq!(found.len(), expected.len(), "{name}");
    for (idx, (found, expected)) in found.iter().zip(expected).enumerate() {
        let limit = tolerance * expected.abs().max(1.0);
        assert!(
            (found - expected).abs() <= limit,
            "{name}, number {idx}: {found}, expected {expected}"
        );
    }
}

#[test]
fn classes_are_fitted_as_scikit_learn_fits_them() {
    for problem in golden().classes {
        let name = problem.name.as_str();
        let features = matrix(&problem.features);
        let n_classes = problem.bias.len();
        let targets = ProbeTargets::classes(names(n_classes), problem.labels.clone()).unwrap();
        let rows: Vec<usize> = (0..features.n_rows()).collect();
        let standard = Standardization::of(&features, &rows, 1);
        assert_near(name, &standard.mean, &problem.mean, 1e-12);
        assert_near(name, &standard.scale, &problem.scale, 1e-9);

        let weights = class_weights(problem.class_weight.as_ref());
        let fit = fit_all(&features, &targets, &weights, problem.strength);
        assert_near(name, &fit.weight, &problem.weight.concat(), 1e-4);
        assert_near(name, &fit.bias, &problem.bias, 1e-4);
        let scores = fit.scores(&features, &targets, &rows, 1).unwrap();
        assert_near(name, &[scores.log_loss], &[problem.log_loss], 1e-6);
        let measures = measured(&fit, &features, &targets, problem.top_k);
        assert_near(name, &[measures.log_loss], &[problem.log_loss], 1e-6);
        assert!(
            (measures.accuracy - scores.accuracy).abs() < 1e-15,
            "{name}"
        );
        check_measures(&problem, &measures);
        fit.visit(&features, &rows, |row, logits| {
            assert_eq!(linear::largest(logits), problem.predictions[row], "{name}");
        })
        .unwrap();
    }
}

fn measured(
    fit: &LinearFit,
    features: &FeatureMatrix,
    targets: &ProbeTargets,
    top_k: usize,
) -> ClassMeasures {
    let rows: Vec<usize> = (0..features.n_rows()).collect();
    let mut scorer = ClassScorer::new(fit.bias.len(), top_k, 3);
    fit.visit(features, &rows, |row, logits| {
        scorer.add(row, targets.class(row).unwrap(), logits);
    })
    .unwrap();
    scorer.finish().unwrap()
}

fn check_measures(problem: &ClassProblem, measures: &ClassMeasures) {
    let name = problem.name.as_str();
    let mut confusion = vec![vec![0; problem.bias.len()]; problem.bias.len()];
    for count in &measures.confusion {
        confusion[count.class][count.predicted] = count.examples;
    }
    assert_eq!(confusion, problem.confusion, "{name}");
    assert_near(
        name,
        &[measures.top_k_accuracy],
        &[problem.top_k_accuracy],
        1e-12,
    );
    let close = |found: Option<f64>, expected: Option<f64>| match (found, expected) {
        (Some(found), Some(expected)) => (found - expected).abs() < 1e-12,
        (found, expected) => found == expected,
    };
    for (class, figures) in measures.classes.iter().enumerate() {
        assert_eq!(figures.support, problem.support[class], "{name}");
        assert!(close(figures.precision, problem.precision[class]), "{name}");
        assert!(close(figures.recall, problem.recall[class]), "{name}");
        assert!(close(figures.f1, problem.f1[class]), "{name}");
    }
}

#[test]
fn labels_are_fitted_as_scikit_learn_fits_one_against_the_rest() {
    for problem in golden().labels {
        let name = problem.name.as_str();
        let features = matrix(&problem.features);
        let n_labels = problem.bias.len();
        let values: Vec<bool> = problem.labels.concat().iter().map(|&v| v == 1).collect();
        let targets =
            ProbeTargets::labels(names(n_labels), features.n_rows(), values.clone()).unwrap();
        let weights = class_weights(problem.class_weight.as_ref());
        let fit = fit_all(&features, &targets, &weights, problem.strength);
        assert!(fit.is_multi_label);
        assert_near(name, &fit.weight, &problem.weight.concat(), 1e-4);
        assert_near(name, &fit.bias, &problem.bias, 1e-4);

        let rows: Vec<usize> = (0..features.n_rows()).collect();
        let scores = fit.scores(&features, &targets, &rows, 1).unwrap();
        let mut scorer = LabelScorer::new(n_labels);
        fit.visit(&features, &rows, |row, logits| {
            scorer.add(logits, |label| targets.has(row, label));
            let predicted: Vec<u8> = logits.iter().map(|&z| u8::from(z > 0.0)).collect();
            assert_eq!(predicted, problem.predictions[row], "{name}, row {row}");
        })
        .unwrap();
        let measures = scorer.finish().unwrap();
        let losses = [scores.log_loss, measures.log_loss];
        assert_near(name, &losses, &[problem.log_loss; 2], 1e-6);
        let each: Vec<f64> = measures
            .labels
            .iter()
            .map(|label| label.average_precision.unwrap())
            .collect();
        assert_near(name, &each, &problem.average_precision, 1e-12);
        let mean = each.iter().sum::<f64>() / real(n_labels);
        assert_near(
            name,
            &[measures.mean_average_precision.unwrap()],
            &[mean],
            1e-12,
        );
        let predictions = problem.predictions.concat();
        let n_right = values.iter().zip(&predictions);
        let n_right = n_right.filter(|(has, p)| **has == (**p == 1)).count();
        assert_near(
            name,
            &[measures.accuracy, scores.accuracy],
            &[real(n_right) / real(values.len()); 2],
            1e-12,
        );
    }
}

/// Numbers without a pattern that matters, from -1 to 1.
pub(super) fn noise(n: usize, seed: u32) -> Vec<f32> {
    let mut state = seed;
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            f32::from(u16::try_from(state >> 16).unwrap()) / 32_768.0 - 1.0
        })
        .collect()
}

/// Examples whose first columns tell something of their class.
pub(super) fn examples(n: usize, width: usize, n_classes: usize) -> (FeatureMatrix, ProbeTargets) {
    let mut numbers = noise(n * width, 1);
    for (row, numbers) in numbers.chunks_mut(width).enumerate() {
        numbers[row % n_classes % width] += 0.5;
    }
    let classes = (0..n).map(|row| row % n_classes).collect();
    (
        FeatureMatrix::from_f32(width, numbers).unwrap(),
        ProbeTargets::classes(names(n_classes), classes).unwrap(),
    )
}

#[test]
fn gradients_are_differences_of_losses() {
    let width = 5;
    let (features, three) = examples(150, width, 3);
    let (_, two) = examples(150, width, 2);
    let values = noise(150 * 7, 9).iter().map(|&x| x > 0.3).collect();
    let seven = ProbeTargets::labels(names(7), 150, values).unwrap();
    let rows: Vec<usize> = (0..149).collect();
    let standard = Standardization::of(&features, &rows, 1);
    for targets in [two, three, seven] {
        for weights in [ClassWeights::None, ClassWeights::Balanced] {
            let objective =
                LogisticObjective::new(&features, &targets, &rows, &standard, &weights, 0.05, 1)
                    .unwrap();
            let n = objective.n_parameters();
            let mut point: Vec<f64> = noise(n, 5).iter().map(|&x| f64::from(x)).collect();
            let mut gradient = vec![0.0; n];
            objective.evaluate(&point, &mut gradient);
            let mut unused = vec![0.0; n];
            for idx in 0..n {
                let (here, step) = (point[idx], 1e-5);
                point[idx] = here + step;
                let above = objective.evaluate(&point, &mut unused);
                point[idx] = here - step;
                let below = objective.evaluate(&point, &mut unused);
                point[idx] = here;
                let difference = (above - below) / (2.0 * step);
                assert!(
                    (difference - gradient[idx]).abs() < 1e-9,
                    "{idx}: {difference}, {}",
                    gradient[idx]
                );
            }
        }
    }
}

#[test]
fn huge_logits_neither_overflow_nor_panic() {
    let (features, targets) = examples(40, 3, 4);
    let rows: Vec<usize> = (0..40).collect();
    let standard = Standardization::none(3);
    let objective = LogisticObjective::new(
        &features,
        &targets,
        &rows,
        &standard,
        &ClassWeights::None,
        1.0,
        1,
    )
    .unwrap();
    let n = objective.n_parameters();
    let point: Vec<f64> = noise(n, 3).iter().map(|&x| 1e6 * f64::from(x)).collect();
    let mut gradient = vec![0.0; n];
    assert!(objective.evaluate(&point, &mut gradient).is_finite());
    assert!(gradient.iter().all(|g| g.is_finite()));
}

pub(super) fn bits(numbers: &[f64]) -> Vec<u64> {
    numbers.iter().map(|number| number.to_bits()).collect()
}

#[test]
fn threads_and_storage_change_no_bit() {
    // Enough rows for several parts, and enough products for a second thread.
    let (width, n_classes, n) = (64, 4, 30_000);
    let halves: Vec<f16> = noise(n * width, 4)
        .iter()
        .map(|&x| f16::from_f32(x))
        .collect();
    let bytes: Vec<u8> = bytemuck::cast_slice(&halves).to_vec();
    let owned = FeatureMatrix::from_f16(width, halves).unwrap();
    let bytes = Box::new(bytes);
    let mapped = FeatureMatrix::from_mapping(bytes, 0, FeatureNumber::F16, n, width).unwrap();
    let targets = ProbeTargets::classes(
        names(n_classes),
        (0..n).map(|row| row * 7 % n_classes).collect(),
    )
    .unwrap();
    let rows: Vec<usize> = (0..n).collect();
    let results = [(&owned, 1), (&owned, 2), (&mapped, 3)].map(|(features, n_threads)| {
        let standard = Standardization::of(features, &rows, n_threads);
        let objective = LogisticObjective::new(
            features,
            &targets,
            &rows,
            &standard,
            &ClassWeights::None,
            1.0,
            n_threads,
        )
        .unwrap();
        let point: Vec<f64> = noise(objective.n_parameters(), 8)
            .iter()
            .map(|&x| f64::from(x))
            .collect();
        let mut result = vec![0.0; point.len()];
        let loss = objective.evaluate(&point, &mut result);
        result.push(loss);
        result.extend(&standard.mean);
        let scores = objective.fit_of(&point);
        let scores = scores.scores(features, &targets, &rows, n_threads).unwrap();
        result.extend([scores.log_loss, scores.accuracy]);
        bits(&result)
    });
    assert_eq!(results[0], results[1]);
    assert_eq!(results[0], results[2]);
}

#[test]
fn the_largest_probe_is_bounded() {
    let names = names(CLASSES_MAX);
    let too_many = [names.clone(), vec!["one more".to_owned()]].concat();
    assert_eq!(
        ProbeTargets::classes(too_many, vec![0]).unwrap_err(),
        ProbeError::ClassesOverLimit { classes: 10_001 }
    );
    let targets = ProbeTargets::classes(names, (0..CLASSES_MAX).collect()).unwrap();
    let width = WEIGHTS_MAX / CLASSES_MAX + 1;
    let bytes = vec![0; CLASSES_MAX * width * 2];
    let number = FeatureNumber::F16;
    let features = FeatureMatrix::from_mapping(Box::new(bytes), 0, number, CLASSES_MAX, width);
    let features = features.unwrap();
    let rows: Vec<usize> = (0..CLASSES_MAX).collect();
    let standard = Standardization::none(width);
    let error = LogisticObjective::new(
        &features,
        &targets,
        &rows,
        &standard,
        &ClassWeights::None,
        1.0,
        1,
    )
    .unwrap_err();
    assert_eq!(
        error,
        ProbeError::WeightsOverLimit {
            classes: CLASSES_MAX,
            width
        }
    );
}
