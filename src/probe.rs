//! Linear probes: multinomial and multi-label logistic regression on features,
//! with what belongs to an honest one: splits, measures, baselines.
//!
//! Pure functions over numbers in memory (or over bytes of a mapped file that the
//! caller hands in): no files, no network, no clock. The objective is that of
//! scikit-learn's `LogisticRegression`, so that a strength `C` means the same in
//! both. Results depend on the numbers alone, not on the number of threads.
//!
//! The order of work: features ([`FeatureMatrix`]) and labels ([`ProbeTargets`]),
//! a split ([`ExampleSplit`]), a plan of fits ([`fit_plan`]), and measures of the
//! chosen fit ([`ClassScorer`], [`LabelScorer`]).

pub mod baseline;
mod error;
pub mod features;
pub mod fit;
pub mod linear;
pub mod logistic;
pub mod measures;
pub mod minimize;
mod parts;
pub mod split;
pub mod standard;
pub mod targets;

#[cfg(test)]
mod tests;

pub use self::error::ProbeError;
pub use self::features::{FeatureMatrix, FeatureNumber, MappedBytes};
pub use self::fit::{FitPlan, FitProgress, LayerFeatures, PlanResult, StrengthResult, fit_plan};
pub use self::linear::{LinearFit, PartScores};
pub use self::logistic::LogisticObjective;
pub use self::measures::{
    CalibrationBin, ClassBaselines, ClassFigures, ClassMeasures, ClassScorer, ConfusionCount,
    LabelFigures, LabelMeasures, LabelScorer, WrongExample,
};
pub use self::minimize::{FitOutcome, Minimum, MinimumLimits, minimize};
pub use self::split::{ExampleSplit, SplitPart, SplitShares};
pub use self::standard::Standardization;
pub use self::targets::{ClassWeights, ProbeTargets};

/// Most classes or labels of a probe, far above the classes of any common data set
/// (ImageNet-21k is sold in parts of 10,450 and of 1,000).
pub const CLASSES_MAX: usize = 10_000;

/// Most weights of a probe: classes times width. A head file has at most 64 MiB,
/// which is this many floats.
///
/// A fit at one layer holds about 30 vectors of this length in f64, and one more per
/// part of the rows: 4 to 64 parts, fewer where they would take over 64 MiB. That is
/// 4 MB with 10 classes of 512, 200 MB with 1000, and 4.5 GB at the limit.
pub const WEIGHTS_MAX: usize = 1 << 24;

/// Converts a count, which is far below 2^53.
#[expect(
    clippy::cast_precision_loss,
    reason = "counts of examples and classes, far below 2^53"
)]
fn real(count: usize) -> f64 {
    count as f64
}
