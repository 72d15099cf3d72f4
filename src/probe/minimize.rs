//! Minimization of a smooth convex function: L-BFGS with a line search on slopes.
//!
//! Our own, because the crates fall short of what a probe needs. The line searches
//! of `argmin` 0.11 have no bound on their evaluations: on the problems of
//! `tests/golden/probe.json`, with a tolerance below what f64 can reach, the one of
//! More and Thuente went on without end, where this module takes 20 to 60
//! evaluations; Hager and Zhang's takes two to three times the evaluations at every
//! tolerance. It also depends on `paste`, which nobody keeps any more. `lbfgs` has
//! directions without a line search.
//!
//! The direction is the two-loop recursion over the last ten steps (Nocedal and
//! Wright, algorithm 7.4). Along it a convex function has its minimum where the
//! slope changes sign, so the search brackets by slopes: they stay exact near the
//! minimum, where differences of losses are only rounding.

use std::collections::VecDeque;

/// Steps that a direction remembers. More take memory (two vectors each) and time,
/// and save few iterations; it is also what SciPy has.
const MEMORY: usize = 10;
/// Most evaluations of a line search. One or two is the rule; 20 halvings leave a
/// millionth of the bracket.
const SEARCH_MAX: usize = 20;
/// Share of the promised decrease that a step must reach.
const DECREASE: f64 = 1e-4;
/// Share of the slope that a step may leave.
const CURVATURE: f64 = 0.9;
/// Rounding of a loss that is a sum over many examples, as a share of the loss.
const ROUNDING: f64 = 64.0 * f64::EPSILON;
/// Steps in a row that lower neither the loss by more than rounding nor the largest
/// component of the gradient, after which more steps are no use.
const IDLE_STEPS_MAX: usize = 30;

/// Limits of a minimization.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinimumLimits {
    /// Largest component of the gradient at which the point is the minimum.
    pub tolerance: f64,
    /// Most iterations, each of one direction and about one evaluation.
    pub iterations_max: usize,
}

impl Default for MinimumLimits {
    /// Returns limits for a probe: its scores do not change beyond 1e-5, and 1000
    /// iterations are several times what a fit at a reasonable strength takes.
    fn default() -> Self {
        Self {
            tolerance: 1e-5,
            iterations_max: 1000,
        }
    }
}

/// Ending of a minimization.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FitOutcome {
    /// The gradient is within the tolerance.
    Converged,
    /// The loss does not go lower in f64, although the gradient is above the
    /// tolerance: the tolerance is too small for these numbers.
    PrecisionLimit,
    /// The iterations were spent: allow more, or regularize more.
    IterationLimit,
}

/// Result of a minimization.
#[derive(Debug, Clone, PartialEq)]
pub struct Minimum {
    pub point: Vec<f64>,
    pub loss: f64,
    /// Largest component of the gradient at the point, without its sign.
    pub gradient_max: f64,
    pub iterations: usize,
    /// Evaluations of the function, the first among them.
    pub evaluations: usize,
    pub outcome: FitOutcome,
}

/// Minimizes a convex function from `start` on. `evaluate` returns the value at a
/// point and writes the gradient; `progress` gets the number of iterations done,
/// with the value and the largest component of the gradient after the last.
///
/// Where the function is not finite, the step is taken for too long; it must be
/// finite at `start`.
pub fn minimize(
    start: Vec<f64>,
    limits: MinimumLimits,
    mut evaluate: impl FnMut(&[f64], &mut [f64]) -> f64,
    mut progress: impl FnMut(usize, f64, f64),
) -> Minimum {
    let mut gradient = vec![0.0; start.len()];
    let loss = evaluate(&start, &mut gradient);
    let mut search = Search {
        here: Evaluated {
            point: start,
            gradient,
            loss,
        },
        pairs: VecDeque::with_capacity(MEMORY),
        evaluations: 1,
    };
    let mut iterations = 0;
    let mut n_idle = 0;
    let mut least = f64::INFINITY;
    let outcome = loop {
        let gradient_max = largest(&search.here.gradient);
        if gradient_max <= limits.tolerance {
            break FitOutcome::Converged;
        }
        if n_idle >= IDLE_STEPS_MAX {
            break FitOutcome::PrecisionLimit;
        }
        if iterations >= limits.iterations_max {
            break FitOutcome::IterationLimit;
        }
        let before = search.here.loss;
        if !search.step(&mut evaluate) {
            if search.pairs.is_empty() {
                break FitOutcome::PrecisionLimit;
            }
            // A direction from old steps may have become useless; the gradient
            // itself is one.
            search.pairs.clear();
            n_idle += 1;
            continue;
        }
        iterations += 1;
        let gained = before - search.here.loss;
        let gradient_max = largest(&search.here.gradient);
        n_idle += 1;
        if gained > ROUNDING * before.abs() || gradient_max < least {
            n_idle = 0;
        }
        least = least.min(gradient_max);
        progress(iterations, search.here.loss, gradient_max);
    };
    Minimum {
        gradient_max: largest(&search.here.gradient),
        point: search.here.point,
        loss: search.here.loss,
        iterations,
        evaluations: search.evaluations,
        outcome,
    }
}

/// Point with the value and the gradient there.
struct Evaluated {
    point: Vec<f64>,
    gradient: Vec<f64>,
    loss: f64,
}

/// Change of point and gradient in one step.
struct Pair {
    point: Vec<f64>,
    gradient: Vec<f64>,
    /// Product of the two, which is above zero.
    product: f64,
}

/// Bound of a bracket.
#[derive(Clone, Copy)]
struct Bound {
    step: f64,
    /// Slope there; NaN where the function is not finite.
    slope: f64,
}

struct Search {
    here: Evaluated,
    pairs: VecDeque<Pair>,
    evaluations: usize,
}

impl Search {
    /// Goes one step; `false` if the line search found none.
    fn step(&mut self, evaluate: &mut impl FnMut(&[f64], &mut [f64]) -> f64) -> bool {
        let direction = self.direction();
        let slope = dot(&direction, &self.here.gradient);
        if slope.is_nan() || slope >= 0.0 {
            return false;
        }
        // Without pairs nothing is known about lengths.
        let first = if self.pairs.is_empty() {
            1.0 / dot(&direction, &direction).sqrt().max(1.0)
        } else {
            1.0
        };
        let Some(there) = self.search(&direction, slope, first, evaluate) else {
            return false;
        };
        let here = std::mem::replace(&mut self.here, there);
        let difference = |mut old: Vec<f64>, new: &[f64]| {
            for (old, new) in old.iter_mut().zip(new) {
                *old = new - *old;
            }
            old
        };
        let point = difference(here.point, &self.here.point);
        let gradient = difference(here.gradient, &self.here.gradient);
        let product = dot(&point, &gradient);
        // A pair without curvature would make directions that do not descend.
        if product > f64::EPSILON * dot(&gradient, &gradient) {
            if self.pairs.len() == MEMORY {
                self.pairs.pop_front();
            }
            self.pairs.push_back(Pair {
                point,
                gradient,
                product,
            });
        }
        true
    }

    /// Returns minus the gradient times an estimate of the inverse Hessian.
    fn direction(&self) -> Vec<f64> {
        let mut direction: Vec<f64> = self.here.gradient.iter().map(|g| -g).collect();
        let mut factors = [0.0; MEMORY];
        for (pair, factor) in self.pairs.iter().zip(&mut factors).rev() {
            *factor = dot(&pair.point, &direction) / pair.product;
            add(-*factor, &pair.gradient, &mut direction);
        }
        if let Some(last) = self.pairs.back() {
            let scale = last.product / dot(&last.gradient, &last.gradient);
            for number in &mut direction {
                *number *= scale;
            }
        }
        for (pair, factor) in self.pairs.iter().zip(factors) {
            let other = dot(&pair.gradient, &direction) / pair.product;
            add(factor - other, &pair.point, &mut direction);
        }
        direction
    }

    /// Finds a step along `direction` that lowers the loss and leaves less slope.
    fn search(
        &mut self,
        direction: &[f64],
        slope: f64,
        first: f64,
        evaluate: &mut impl FnMut(&[f64], &mut [f64]) -> f64,
    ) -> Option<Evaluated> {
        let mut step = first;
        let mut low = Bound { step: 0.0, slope };
        let mut before = low;
        let mut high: Option<Bound> = None;
        let mut there = Evaluated {
            point: vec![0.0; direction.len()],
            gradient: vec![0.0; direction.len()],
            loss: 0.0,
        };
        for _ in 0..SEARCH_MAX {
            there.point.copy_from_slice(&self.here.point);
            add(step, direction, &mut there.point);
            there.loss = evaluate(&there.point, &mut there.gradient);
            self.evaluations += 1;
            let found = Bound {
                step,
                slope: dot(direction, &there.gradient),
            };
            let is_finite = there.loss.is_finite() && found.slope.is_finite();
            let promised = self.here.loss + DECREASE * step * slope;
            let is_lower = there.loss <= promised + ROUNDING * self.here.loss.abs();
            if is_finite && is_lower && found.slope.abs() <= CURVATURE * slope.abs() {
                return Some(there);
            }
            if is_finite && is_lower && found.slope < 0.0 {
                (before, low) = (low, found);
            } else {
                high = Some(Bound {
                    slope: if is_finite { found.slope } else { f64::NAN },
                    ..found
                });
            }
            step = next_step(before, low, high);
        }
        None
    }
}

/// Returns the next step to try: where the slope would be zero if it were linear,
/// well inside the bracket, or up to ten times as far where none ends yet.
fn next_step(before: Bound, low: Bound, high: Option<Bound>) -> f64 {
    let Some(high) = high else {
        let share = low.slope / (before.slope - low.slope);
        let more = (low.step - before.step) * share;
        // A slope that does not rise has no zero ahead.
        let more = if share < 0.0 { -more } else { f64::INFINITY };
        return (low.step + more).clamp(1.5 * low.step, 10.0 * low.step);
    };
    let width = high.step - low.step;
    let share = if high.slope > 0.0 {
        (low.slope / (low.slope - high.slope)).clamp(0.1, 0.9)
    } else {
        0.5
    };
    low.step + share * width
}

/// Returns the largest component, without its sign; NaN if one is.
fn largest(numbers: &[f64]) -> f64 {
    let mut most = 0.0_f64;
    for number in numbers {
        if number.is_nan() {
            return f64::NAN;
        }
        most = most.max(number.abs());
    }
    most
}

/// Returns the product of two vectors, added in eight sums, which a CPU computes at
/// the same time.
fn dot(a: &[f64], b: &[f64]) -> f64 {
    let mut sums = [0.0; 8];
    let (a, a_rest) = a.as_chunks::<8>();
    let (b, b_rest) = b.as_chunks::<8>();
    for (a, b) in a.iter().zip(b) {
        for ((sum, a), b) in sums.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
    let rest: f64 = a_rest.iter().zip(b_rest).map(|(a, b)| a * b).sum();
    sums.iter().sum::<f64>() + rest
}

/// Adds `factor` times `from` to `to`.
fn add(factor: f64, from: &[f64], to: &mut [f64]) {
    for (to, from) in to.iter_mut().zip(from) {
        *to += factor * from;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMITS: MinimumLimits = MinimumLimits {
        tolerance: 1e-10,
        iterations_max: 500,
    };

    /// Half the sum of squared distances from 1, each times a curvature.
    fn bowl(curvatures: &[f64]) -> impl Fn(&[f64], &mut [f64]) -> f64 {
        move |point, gradient| {
            let mut value = 0.0;
            for ((x, g), c) in point.iter().zip(gradient).zip(curvatures) {
                *g = c * (x - 1.0);
                value += 0.5 * c * (x - 1.0).powi(2);
            }
            value
        }
    }

    #[test]
    fn a_bowl_is_minimized_at_its_bottom() {
        let curvatures: Vec<f64> = (0..40).map(|idx| 1.15_f64.powi(idx)).collect();
        let mut seen = Vec::new();
        let minimum = minimize(
            vec![-3.0; 40],
            LIMITS,
            bowl(&curvatures),
            |done, value, _| {
                seen.push((done, value));
            },
        );
        assert_eq!(minimum.outcome, FitOutcome::Converged);
        assert!(minimum.gradient_max <= 1e-10);
        for x in &minimum.point {
            assert!((x - 1.0).abs() < 1e-9, "{x}");
        }
        assert_eq!(seen.len(), minimum.iterations);
        assert!(seen.windows(2).all(|pair| pair[1].0 == pair[0].0 + 1));
        assert!(minimum.evaluations < 2 * minimum.iterations);
    }

    #[test]
    fn iterations_are_bounded() {
        let curvatures: Vec<f64> = (0..40).map(|idx| 1.5_f64.powi(idx)).collect();
        let limits = MinimumLimits {
            iterations_max: 5,
            ..LIMITS
        };
        let minimum = minimize(vec![0.0; 40], limits, bowl(&curvatures), |_, _, _| {});
        assert_eq!(minimum.outcome, FitOutcome::IterationLimit);
        assert_eq!(minimum.iterations, 5);
        assert!(minimum.gradient_max > 1e-10);
    }

    #[test]
    fn a_tolerance_below_rounding_ends() {
        // The slope is never within 1e-300 of zero.
        let value = |point: &[f64], gradient: &mut [f64]| {
            let z = point[0] / 3.0 - 0.1;
            gradient[0] = z.tanh() / 3.0 + 1e-17;
            z.cosh().ln() + 7.0
        };
        let limits = MinimumLimits {
            tolerance: 1e-300,
            iterations_max: 100_000,
        };
        let minimum = minimize(vec![40.0], limits, value, |_, _, _| {});
        assert_eq!(minimum.outcome, FitOutcome::PrecisionLimit);
        assert!((minimum.point[0] - 0.3).abs() < 1e-7, "{:?}", minimum.point);
        assert!(minimum.iterations < 200);
    }

    #[test]
    fn a_step_into_infinity_is_too_long() {
        // Infinite from 1 on; the minimum is at 1 - 1/100.
        let value = |point: &[f64], gradient: &mut [f64]| {
            let left = 1.0 - point[0];
            gradient[0] = 1.0 / left - 100.0;
            if left <= 0.0 {
                f64::INFINITY
            } else {
                -left.ln() - 100.0 * point[0]
            }
        };
        let minimum = minimize(vec![0.5], LIMITS, value, |_, _, _| {});
        assert_eq!(minimum.outcome, FitOutcome::Converged);
        assert!((minimum.point[0] - 0.99).abs() < 1e-9);
    }
}
