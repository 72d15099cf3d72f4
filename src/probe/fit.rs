//! Plans of fits: over layers and strengths, chosen by the validation part.

use std::num::NonZeroUsize;

use super::logistic::check_strength;
use super::parts::in_order;
use super::{
    ClassWeights, ExampleSplit, FeatureMatrix, FitOutcome, LinearFit, LogisticObjective,
    MinimumLimits, PartScores, ProbeError, ProbeTargets, Standardization, minimize,
};

/// Features of all examples at one layer.
#[derive(Debug, Clone, Copy)]
pub struct LayerFeatures<'a> {
    /// Number of the layer, for results and errors.
    pub layer: u32,
    /// One row per example, in the order of the labels.
    pub features: &'a FeatureMatrix,
}

/// Fits to try, and how.
#[derive(Debug, Clone, PartialEq)]
pub struct FitPlan {
    /// Strengths `C`, each above 0. They are fitted from the smallest, which
    /// regularizes most, each from the weights of the one before.
    pub strengths: Vec<f64>,
    pub class_weights: ClassWeights,
    /// Standardize features by the training part. Without, features are fitted as
    /// they are (pixels, which have one scale).
    pub standardize: bool,
    pub limits: MinimumLimits,
    /// Threads of the whole plan: for layers first, then for rows of a layer. The
    /// results do not depend on it.
    pub threads: NonZeroUsize,
}

/// Progress of one fit of the plan.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct FitProgress {
    pub layer: u32,
    pub strength: f64,
    /// Iterations done.
    pub iterations: usize,
    /// Regularized loss, as the fit lowers it.
    pub loss: f64,
    /// Largest component of its gradient.
    pub gradient_max: f64,
}

/// Result of one layer and strength.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct StrengthResult {
    pub layer: u32,
    pub strength: f64,
    pub train: PartScores,
    /// Scores by which the plan chooses; `None` without a validation part.
    pub validation: Option<PartScores>,
    /// Scores that nothing is chosen by; `None` without a test part.
    pub test: Option<PartScores>,
    pub iterations: usize,
    pub outcome: FitOutcome,
    /// Largest component of the gradient at the end.
    pub gradient_max: f64,
}

/// Result of a plan.
#[derive(Debug, Clone, PartialEq)]
pub struct PlanResult {
    /// Every fit: by layer in the given order, then by strength ascending.
    pub results: Vec<StrengthResult>,
    /// Index of the chosen result: the lowest log loss on the validation part; of
    /// equals the first.
    pub chosen: usize,
    /// Chosen fit.
    pub fit: LinearFit,
}

/// Fits every strength at every layer, and chooses one by the validation part. The
/// test part is measured and never asked.
///
/// The features are not copied; [`WEIGHTS_MAX`](super::WEIGHTS_MAX) has the memory of
/// a layer's fit, of which as many run at a time as there are threads.
///
/// # Errors
///
/// When the plan is empty or has values out of range, features do not fit the labels
/// or are not finite, the training part cannot be fitted, or several fits are to be
/// compared without a validation part.
pub fn fit_plan(
    layers: &[LayerFeatures<'_>],
    targets: &ProbeTargets,
    split: &ExampleSplit,
    plan: &FitPlan,
    progress: &(dyn Fn(FitProgress) + Sync),
) -> Result<PlanResult, ProbeError> {
    let strengths = check(layers, targets, split, plan)?;
    let at_once = plan.threads.get().min(layers.len());
    let per_layer = (plan.threads.get() / at_once).max(1);
    let fitted = in_order(layers.len(), at_once, |idx| {
        let fits = LayerFits {
            layer: layers[idx],
            targets,
            split,
            plan,
            n_threads: per_layer,
        };
        fits.run(&strengths, progress)
    });
    let mut results = Vec::new();
    let mut best: Option<(usize, LinearFit)> = None;
    for layer in fitted {
        let layer = layer?;
        let chosen = results.len() + layer.chosen;
        results.extend(layer.results);
        if best
            .as_ref()
            .is_none_or(|(before, _)| is_better(&results[chosen], &results[*before]))
        {
            best = Some((chosen, layer.fit));
        }
    }
    let (chosen, fit) = best.ok_or(ProbeError::EmptyPlan { what: "layer" })?;
    Ok(PlanResult {
        results,
        chosen,
        fit,
    })
}

/// Returns whether the validation part has a lower log loss.
fn is_better(one: &StrengthResult, other: &StrengthResult) -> bool {
    match (one.validation, other.validation) {
        (Some(one), Some(other)) => one.log_loss < other.log_loss,
        _ => false,
    }
}

/// Checks a plan, and returns its strengths in the order of the fits.
fn check(
    layers: &[LayerFeatures<'_>],
    targets: &ProbeTargets,
    split: &ExampleSplit,
    plan: &FitPlan,
) -> Result<Vec<f64>, ProbeError> {
    if layers.is_empty() {
        return Err(ProbeError::EmptyPlan { what: "layer" });
    }
    if plan.strengths.is_empty() {
        return Err(ProbeError::EmptyPlan { what: "strength" });
    }
    let tolerance = plan.limits.tolerance;
    if !tolerance.is_finite() || tolerance <= 0.0 {
        return Err(ProbeError::Tolerance { tolerance });
    }
    for &strength in &plan.strengths {
        check_strength(strength)?;
    }
    let mut strengths = plan.strengths.clone();
    strengths.sort_by(f64::total_cmp);
    strengths.dedup();
    let fits = layers.len() * strengths.len();
    if split.validation.is_empty() && fits > 1 {
        return Err(ProbeError::NoValidation { fits });
    }
    for layer in layers {
        if layer.features.n_rows() != targets.n_rows() {
            return Err(ProbeError::Rows {
                layer: layer.layer,
                rows: layer.features.n_rows(),
                labels: targets.n_rows(),
            });
        }
    }
    Ok(strengths)
}

/// Fits at one layer.
struct LayerFits<'a> {
    layer: LayerFeatures<'a>,
    targets: &'a ProbeTargets,
    split: &'a ExampleSplit,
    plan: &'a FitPlan,
    n_threads: usize,
}

impl LayerFits<'_> {
    fn run(
        &self,
        strengths: &[f64],
        progress: &(dyn Fn(FitProgress) + Sync),
    ) -> Result<PlanResult, ProbeError> {
        let features = self.layer.features;
        let rows = &self.split.train;
        features.check(rows)?;
        let standard = if self.plan.standardize {
            Standardization::of(features, rows, self.n_threads)
        } else {
            Standardization::none(features.width())
        };
        let mut objective = LogisticObjective::new(
            features,
            self.targets,
            rows,
            &standard,
            &self.plan.class_weights,
            strengths[0],
            self.n_threads,
        )?;
        let mut point = vec![0.0; objective.n_parameters()];
        let mut results: Vec<StrengthResult> = Vec::new();
        let mut best: Option<(usize, LinearFit)> = None;
        for &strength in strengths {
            objective.set_strength(strength)?;
            let minimum = minimize(
                point,
                self.plan.limits,
                |point, gradient| objective.evaluate(point, gradient),
                |iterations, loss, gradient_max| {
                    progress(FitProgress {
                        layer: self.layer.layer,
                        strength,
                        iterations,
                        loss,
                        gradient_max,
                    });
                },
            );
            let fit = objective.fit_of(&minimum.point);
            point = minimum.point;
            let result = StrengthResult {
                layer: self.layer.layer,
                strength,
                train: self.scores(&fit, rows)?,
                validation: self.scores_if_any(&fit, &self.split.validation)?,
                test: self.scores_if_any(&fit, &self.split.test)?,
                iterations: minimum.iterations,
                outcome: minimum.outcome,
                gradient_max: minimum.gradient_max,
            };
            if best
                .as_ref()
                .is_none_or(|(before, _)| is_better(&result, &results[*before]))
            {
                best = Some((results.len(), fit));
            }
            results.push(result);
        }
        let (chosen, fit) = best.ok_or(ProbeError::EmptyPlan { what: "strength" })?;
        Ok(PlanResult {
            results,
            chosen,
            fit,
        })
    }

    fn scores(&self, fit: &LinearFit, rows: &[usize]) -> Result<PartScores, ProbeError> {
        fit.scores(self.layer.features, self.targets, rows, self.n_threads)
    }

    fn scores_if_any(
        &self,
        fit: &LinearFit,
        rows: &[usize],
    ) -> Result<Option<PartScores>, ProbeError> {
        if rows.is_empty() {
            return Ok(None);
        }
        self.scores(fit, rows).map(Some)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::probe::SplitShares;
    use crate::probe::tests::{LIMITS, assert_near, bits, examples, noise};

    fn plan(strengths: &[f64], threads: usize) -> FitPlan {
        FitPlan {
            strengths: strengths.to_vec(),
            class_weights: ClassWeights::None,
            standardize: true,
            limits: LIMITS,
            threads: NonZeroUsize::new(threads).unwrap(),
        }
    }

    #[test]
    fn a_plan_chooses_by_validation_and_the_same_with_any_threads() {
        let (good, targets) = examples(600, 6, 3);
        let bad = FeatureMatrix::from_f32(6, noise(600 * 6, 77)).unwrap();
        let layers =
            [(2, &bad), (5, &good)].map(|(layer, features)| LayerFeatures { layer, features });
        let shares = SplitShares {
            validation: 0.2,
            test: 0.2,
        };
        let split = ExampleSplit::stratified(&targets, shares, 3).unwrap();
        let seen = Mutex::new(Vec::new());
        let progress = |progress: FitProgress| seen.lock().unwrap().push(progress);
        let strengths = [1.0, 0.001, 0.03];
        let result = fit_plan(&layers, &targets, &split, &plan(&strengths, 1), &progress).unwrap();
        let tried: Vec<_> = result
            .results
            .iter()
            .map(|r| (r.layer, r.strength))
            .collect();
        assert_eq!(
            tried,
            [
                (2, 0.001),
                (2, 0.03),
                (2, 1.0),
                (5, 0.001),
                (5, 0.03),
                (5, 1.0)
            ]
        );
        let chosen = &result.results[result.chosen];
        assert_eq!(chosen.layer, 5);
        let loss = |r: &StrengthResult| r.validation.unwrap().log_loss;
        assert!(result.results.iter().all(|r| loss(r) >= loss(chosen)));
        for (fit, more) in result.results.iter().zip(&result.results[1..]) {
            assert_eq!(fit.outcome, FitOutcome::Converged);
            // Less regularization, less loss in training.
            assert!(fit.layer != more.layer || more.train.log_loss < fit.train.log_loss);
        }
        let iterations: usize = result.results.iter().map(|r| r.iterations).sum();
        assert_eq!(seen.lock().unwrap().len(), iterations);
        let scored = result.fit.scores(&good, &targets, &split.validation, 1);
        assert_eq!(Some(scored.unwrap()), chosen.validation);
        let scored = result.fit.scores(&good, &targets, &split.test, 1);
        assert_eq!(Some(scored.unwrap()), chosen.test);

        for threads in [2, 5] {
            let again = fit_plan(
                &layers,
                &targets,
                &split,
                &plan(&strengths, threads),
                &|_| {},
            );
            let again = again.unwrap();
            assert_eq!(again, result);
            assert_eq!(bits(&again.fit.weight), bits(&result.fit.weight));
        }

        // The test part is only measured.
        let without = ExampleSplit {
            test: Vec::new(),
            ..split
        };
        let again = fit_plan(&layers, &targets, &without, &plan(&strengths, 2), &|_| {}).unwrap();
        assert_eq!((again.chosen, &again.fit), (result.chosen, &result.fit));
        assert_eq!(again.results[0].test, None);
    }

    #[test]
    fn a_path_ends_where_single_fits_end() {
        let (features, targets) = examples(300, 5, 4);
        let layer = LayerFeatures {
            layer: 0,
            features: &features,
        };
        let split = ExampleSplit {
            train: (0..200).collect(),
            validation: (200..300).collect(),
            test: Vec::new(),
        };
        let path = fit_plan(
            &[layer],
            &targets,
            &split,
            &plan(&[0.01, 0.1, 10.0], 1),
            &|_| {},
        );
        let alone = fit_plan(&[layer], &targets, &split, &plan(&[10.0], 1), &|_| {});
        let (path, alone) = (path.unwrap(), alone.unwrap());
        let (last, only) = (path.results[2], alone.results[0]);
        assert_near(
            "losses",
            &[last.train.log_loss, last.validation.unwrap().log_loss],
            &[only.train.log_loss, only.validation.unwrap().log_loss],
            1e-7,
        );
    }

    #[test]
    fn plans_that_cannot_be_are_refused() {
        let (features, targets) = examples(60, 4, 3);
        let layer = LayerFeatures {
            layer: 7,
            features: &features,
        };
        let whole = ExampleSplit {
            train: (0..60).collect(),
            ..ExampleSplit::default()
        };
        let refused = |layers: &[LayerFeatures<'_>], split: &ExampleSplit, plan: FitPlan| {
            let error = fit_plan(layers, &targets, split, &plan, &|_| {}).unwrap_err();
            error.to_string()
        };
        let check = |error: String, words: &str| assert!(error.contains(words), "{error}");
        check(refused(&[], &whole, plan(&[1.0], 1)), "no layer");
        check(refused(&[layer], &whole, plan(&[], 1)), "no strength");
        check(refused(&[layer], &whole, plan(&[0.0], 1)), "strength 0 ");
        check(
            refused(&[layer], &whole, plan(&[f64::NAN], 1)),
            "strength NaN",
        );
        check(
            refused(&[layer], &whole, plan(&[1.0, 2.0], 1)),
            "validation part is empty, and 2 fits",
        );
        let short = FeatureMatrix::from_f32(4, vec![0.0; 4 * 59]).unwrap();
        let short = LayerFeatures {
            layer: 8,
            features: &short,
        };
        check(
            refused(&[short], &whole, plan(&[1.0], 1)),
            "layer 8 have 59 rows, and the labels have 60",
        );
        let mut other = plan(&[1.0], 1);
        other.class_weights = ClassWeights::Explicit(vec![1.0, 2.0]);
        check(
            refused(&[layer], &whole, other),
            "2 values, and there are 3",
        );
        let mut other = plan(&[1.0], 1);
        other.class_weights = ClassWeights::Explicit(vec![1.0, -1.0, 1.0]);
        check(refused(&[layer], &whole, other), "\"class 1\" is -1");
        let mut other = plan(&[1.0], 1);
        other.limits.tolerance = 0.0;
        check(refused(&[layer], &whole, other), "tolerance 0");
        let part = ExampleSplit {
            train: (0..60).step_by(3).collect(),
            ..ExampleSplit::default()
        };
        check(
            refused(&[layer], &part, plan(&[1.0], 1)),
            "one class, \"class 0\"",
        );
        let part = ExampleSplit {
            train: (0..60).filter(|row| row % 3 != 1).collect(),
            ..ExampleSplit::default()
        };
        check(
            refused(&[layer], &part, plan(&[1.0], 1)),
            "class \"class 1\" has no example in the training part",
        );
        let outside = ExampleSplit {
            train: (0..61).collect(),
            ..ExampleSplit::default()
        };
        check(
            refused(&[layer], &outside, plan(&[1.0], 1)),
            "row 60 is not among the 60 rows",
        );
    }
}
