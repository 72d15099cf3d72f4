//! Report of a fit: figures as JSON and as a table.

use std::io::Write;

use serde::Serialize;

use crate::commands::output::columns;
use crate::probe::{
    ClassBaselines, ClassMeasures, FitOutcome, LabelMeasures, ProbeTargets, StrengthResult,
};

/// Report of `imagegpt probe fit`.
#[derive(Debug, Serialize)]
pub(super) struct FitReport {
    pub(super) model: String,
    pub(super) model_digest: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) weights_digest: Option<String>,
    pub(super) classes: Vec<String>,
    pub(super) multi_label: bool,
    pub(super) fit: String,
    pub(super) alpha: String,
    /// Number of examples of each part.
    pub(super) examples: PartCounts,
    /// Number of images that failed, and are left out.
    pub(super) failed: usize,
    pub(super) chosen: FitFigures,
    /// True if the head was fitted again on training and validation together.
    pub(super) refitted: bool,
    /// Best strength of each context, norm and layer.
    pub(super) layers: Vec<FitFigures>,
    /// Best strengths of features that know of no model.
    pub(super) baselines: Vec<FitFigures>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) guesses: Option<Guesses>,
    /// Measures of the chosen fit on the validation part.
    pub(super) validation: Option<Measures>,
    /// Measures of the head on the test part.
    pub(super) test: Option<Measures>,
    /// All fits.
    pub(super) fits: Vec<FitFigures>,
}

#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct PartCounts {
    pub(super) train: usize,
    pub(super) validation: usize,
    pub(super) test: usize,
}

/// Figures of one fit.
#[derive(Debug, Clone, Serialize)]
pub(super) struct FitFigures {
    pub(super) features: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) context: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) norm: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) layer: Option<u32>,
    pub(super) strength: f64,
    pub(super) train_accuracy: f64,
    pub(super) train_log_loss: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) validation_accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) validation_log_loss: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) test_accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) test_log_loss: Option<f64>,
    pub(super) iterations: usize,
    pub(super) converged: bool,
}

/// Context and norm of features.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct FeatureKind {
    pub(super) context: String,
    pub(super) norm: String,
}

impl FitFigures {
    /// Gathers the figures of a result; of features of a model with their kind.
    pub(super) fn of(name: &str, kind: Option<&FeatureKind>, result: &StrengthResult) -> Self {
        Self {
            features: name.to_owned(),
            context: kind.map(|kind| kind.context.clone()),
            norm: kind.map(|kind| kind.norm.clone()),
            layer: kind.map(|_| result.layer),
            strength: result.strength,
            train_accuracy: result.train.accuracy,
            train_log_loss: result.train.log_loss,
            validation_accuracy: result.validation.map(|scores| scores.accuracy),
            validation_log_loss: result.validation.map(|scores| scores.log_loss),
            test_accuracy: result.test.map(|scores| scores.accuracy),
            test_log_loss: result.test.map(|scores| scores.log_loss),
            iterations: result.iterations,
            converged: result.outcome != FitOutcome::IterationLimit,
        }
    }

    /// Log loss by which fits are compared: on the validation part, and without
    /// one on the training part, where there is a single fit.
    pub(super) fn loss(&self) -> f64 {
        self.validation_log_loss.unwrap_or(self.train_log_loss)
    }
}

/// Accuracies without a fit.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct Guesses {
    pub(super) majority_accuracy: f64,
    pub(super) chance_accuracy: f64,
    /// Part that they are measured on.
    pub(super) part: &'static str,
}

impl Guesses {
    /// Measures the guesses on the test part, or without one on validation.
    pub(super) fn of(targets: &ProbeTargets, split: &crate::probe::ExampleSplit) -> Option<Self> {
        let (part, rows) = if split.test.is_empty() {
            ("validation", &split.validation)
        } else {
            ("test", &split.test)
        };
        let guesses = ClassBaselines::of(targets, &split.train, rows)?;
        Some(Self {
            majority_accuracy: guesses.majority_accuracy,
            chance_accuracy: guesses.chance_accuracy,
            part,
        })
    }
}

/// Measures of a classifier on a part.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measures {
    pub(super) examples: usize,
    pub(super) accuracy: f64,
    /// Standard error of the accuracy; of examples with one class.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) accuracy_error: Option<f64>,
    pub(super) log_loss: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) top_5_accuracy: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) calibration_error: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) mean_average_precision: Option<f64>,
    pub(super) classes: Vec<ClassRow>,
    /// Numbers of examples by class and prediction, where there are any.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) confusion: Vec<(String, String, usize)>,
    /// Bins of confidence: examples, mean confidence, accuracy.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) calibration: Vec<(usize, f64, f64)>,
    /// Most confidently wrong examples.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) wrong: Vec<WrongRow>,
}

/// Figures of a class or a label.
#[derive(Debug, Clone, Serialize)]
pub(super) struct ClassRow {
    pub(super) class: String,
    pub(super) examples: usize,
    pub(super) precision: Option<f64>,
    pub(super) recall: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) f1: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) average_precision: Option<f64>,
}

/// Example with a wrong prediction.
#[derive(Debug, Clone, Serialize)]
pub(super) struct WrongRow {
    pub(super) id: String,
    pub(super) label: String,
    pub(super) predicted: String,
    pub(super) confidence: f64,
    /// Row of the example.
    #[serde(skip)]
    pub(super) row: usize,
}

impl Measures {
    /// Gathers measures of examples with one class each; `ids` names them.
    pub(super) fn of_classes(measures: &ClassMeasures, names: &[String], ids: &[String]) -> Self {
        let name = |class: usize| names.get(class).cloned().unwrap_or_default();
        let classes = measures
            .classes
            .iter()
            .enumerate()
            .map(|(class, figures)| ClassRow {
                class: name(class),
                examples: figures.support,
                precision: figures.precision,
                recall: figures.recall,
                f1: figures.f1,
                average_precision: None,
            });
        let confusion = measures
            .confusion
            .iter()
            .map(|count| (name(count.class), name(count.predicted), count.examples));
        let bins = measures
            .calibration
            .iter()
            .map(|bin| (bin.examples, bin.confidence, bin.accuracy));
        let wrong = measures.wrong.iter().map(|wrong| WrongRow {
            id: ids.get(wrong.example).cloned().unwrap_or_default(),
            label: name(wrong.class),
            predicted: name(wrong.predicted),
            confidence: wrong.confidence,
            row: wrong.example,
        });
        Self {
            examples: measures.examples,
            accuracy: measures.accuracy,
            accuracy_error: Some(measures.accuracy_error),
            log_loss: measures.log_loss,
            top_5_accuracy: (names.len() > measures.top_k).then_some(measures.top_k_accuracy),
            calibration_error: Some(measures.calibration_error),
            mean_average_precision: None,
            classes: classes.collect(),
            confusion: confusion.collect(),
            calibration: bins.collect(),
            wrong: wrong.collect(),
        }
    }

    /// Gathers measures of examples with any number of labels.
    pub(super) fn of_labels(measures: &LabelMeasures, names: &[String]) -> Self {
        let labels = measures
            .labels
            .iter()
            .zip(names)
            .map(|(figures, name)| ClassRow {
                class: name.clone(),
                examples: figures.support,
                precision: figures.precision,
                recall: figures.recall,
                f1: None,
                average_precision: figures.average_precision,
            });
        Self {
            examples: measures.examples,
            accuracy: measures.accuracy,
            accuracy_error: None,
            log_loss: measures.log_loss,
            top_5_accuracy: None,
            calibration_error: None,
            mean_average_precision: measures.mean_average_precision,
            classes: labels.collect(),
            confusion: Vec::new(),
            calibration: Vec::new(),
            wrong: Vec::new(),
        }
    }

    /// Prints the measures, with a row per class.
    pub(super) fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        write!(
            out,
            "{} images: accuracy {}{}, log loss {:.3}",
            self.examples,
            percent(self.accuracy),
            plus_minus(self.accuracy_error),
            self.log_loss
        )?;
        for (name, share) in [
            ("top 5", self.top_5_accuracy),
            ("calibration error", self.calibration_error),
            ("mean average precision", self.mean_average_precision),
        ] {
            if let Some(share) = share {
                write!(out, ", {name} {}", percent(share))?;
            }
        }
        writeln!(out)?;
        let header = ["class", "images", "precision", "recall"].map(str::to_owned);
        let share = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), percent);
        let rows = self.classes.iter().map(|class| {
            vec![
                class.class.clone(),
                class.examples.to_string(),
                share(class.precision),
                share(class.recall),
            ]
        });
        columns(
            std::iter::once(header.to_vec()).chain(rows),
            |column| column > 0,
            out,
        )
    }
}

/// Formats a share as percent.
fn percent(share: f64) -> String {
    format!("{:.1} %", 100.0 * share)
}

impl FitReport {
    /// Prints the table by layer, with the baselines below.
    pub(super) fn print(&self, out: &mut impl Write) -> std::io::Result<()> {
        let counts = self.examples;
        writeln!(
            out,
            "{} classes; {} training, {} validation and {} test images",
            self.classes.len(),
            counts.train,
            counts.validation,
            counts.test
        )?;
        let header = ["features", "strength", "validation", "log loss", "test", ""];
        let share = |share: Option<f64>| share.map_or_else(|| "-".to_owned(), percent);
        let row = |figures: &FitFigures| {
            let is_chosen = figures.features == self.chosen.features
                && (&figures.context, &figures.norm, figures.layer)
                    == (&self.chosen.context, &self.chosen.norm, self.chosen.layer);
            let name = match (&figures.context, &figures.norm, figures.layer) {
                (Some(context), Some(norm), Some(layer)) => {
                    format!("layer {layer}, {context}, {norm}")
                }
                _ => figures.features.clone(),
            };
            let mark = if is_chosen { "chosen" } else { "" };
            vec![
                name,
                format!("{}", figures.strength),
                share(figures.validation_accuracy),
                figures
                    .validation_log_loss
                    .map_or_else(|| "-".to_owned(), |loss| format!("{loss:.3}")),
                share(figures.test_accuracy),
                mark.to_owned(),
            ]
        };
        let guesses = self.guesses.iter().flat_map(|guesses| {
            let accuracies = [
                ("majority class", guesses.majority_accuracy),
                ("chance", guesses.chance_accuracy),
            ];
            accuracies.map(|(name, accuracy)| {
                let mut row = vec!["-".to_owned(); 5];
                name.clone_into(&mut row[0]);
                row[if guesses.part == "test" { 4 } else { 2 }] = percent(accuracy);
                row.push(String::new());
                row
            })
        });
        let rows = std::iter::once(header.map(str::to_owned).to_vec())
            .chain(self.layers.iter().map(row))
            .chain(self.baselines.iter().map(row))
            .chain(guesses);
        columns(rows, |column| (1..5).contains(&column), out)?;
        if self.failed > 0 {
            writeln!(out, "{} images failed and are left out", self.failed)?;
        }
        let n_open = self.fits.iter().filter(|fit| !fit.converged).count();
        if n_open > 0 {
            writeln!(
                out,
                "{n_open} of {} fits did not converge (--iterations-max, --tolerance)",
                self.fits.len()
            )?;
        }
        let on = if self.refitted {
            "training and validation images"
        } else {
            "training images"
        };
        match &self.test {
            Some(test) => writeln!(
                out,
                "the head, fitted on {on}, is right for {}{} of the test images, log loss {:.3}",
                percent(test.accuracy),
                plus_minus(test.accuracy_error),
                test.log_loss
            ),
            None => writeln!(out, "the head is fitted on {on}; there are no test images"),
        }
    }
}

/// Formats the standard error of an accuracy in points, if there is one.
fn plus_minus(error: Option<f64>) -> String {
    error.map_or_else(String::new, |error| format!(" ± {:.1}", 100.0 * error))
}
