//! Flags of `imagegpt probe`.

use std::num::NonZeroUsize;
use std::path::PathBuf;

use clap::{Args, Subcommand, ValueEnum};

use crate::client::ConnectConfig;
use crate::commands::embed::flags::{Dtype, FileKind, WorkersConfig};
use crate::imaging::{Alpha, Fit};
use crate::model::graph::{Context, Norm};
use crate::telemetry::LogConfig;

/// Commands for linear probes.
#[derive(Debug, Clone, Subcommand)]
pub enum ProbeCommand {
    /// Fit a linear classifier on the features of labelled images, and write the
    /// head that `imagegpt serve --head` serves
    ///
    /// Layer, context, norm and strength of regularization are chosen by the log
    /// loss on a validation part; a test part is only reported. Embedding is
    /// resumable: after a kill the same command continues.
    Fit(Box<FitArgs>),
    /// Measure a head on labelled images
    Eval(Box<EvalArgs>),
}

/// Flags of `imagegpt probe fit`.
#[derive(Debug, Clone, Args)]
pub struct FitArgs {
    #[command(flatten)]
    pub examples: ExamplesConfig,

    /// File of the head to write. The report is written beside it: NAME.json,
    /// NAME-layers.svg and NAME-confusion.svg
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,

    #[command(flatten)]
    pub features: FeaturesConfig,
    #[command(flatten)]
    pub split: SplitConfig,
    #[command(flatten)]
    pub regression: RegressionConfig,
    #[command(flatten)]
    pub jobs: ProbeJobsConfig,
}

/// Flags of `imagegpt probe eval`.
#[derive(Debug, Clone, Args)]
pub struct EvalArgs {
    /// Head to measure
    #[arg(value_name = "HEAD")]
    pub head: PathBuf,

    #[command(flatten)]
    pub examples: ExamplesConfig,

    /// Column that says for each image whether it is train, validation (or val)
    /// or test [default: by the input's directories or files]
    #[arg(long, value_name = "COLUMN")]
    pub split: Option<String>,

    /// Part of the input to measure, where the input is divided into parts
    /// [default: all of it]
    #[arg(long, value_enum, value_name = "PART")]
    pub part: Option<PartName>,

    /// File for all figures, as JSON
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// File for the predictions: a line of JSON per image with its id, label,
    /// prediction and the score of each class
    #[arg(long, value_name = "FILE")]
    pub predictions: Option<PathBuf>,

    /// PNG file for the most confidently wrong images, as the model sees them,
    /// in rows
    #[arg(long, value_name = "FILE")]
    pub sheet: Option<PathBuf>,

    /// Directory for the job that embeds the images [default: NAME.eval beside NAME.safetensors]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,

    #[command(flatten)]
    pub jobs: ProbeJobsConfig,
}

/// Flags of the jobs that embed the images, and of the log.
#[derive(Debug, Clone, Args)]
pub struct ProbeJobsConfig {
    #[command(flatten)]
    pub reading: ReadingConfig,
    #[command(flatten)]
    pub workers: WorkersConfig,
    #[command(flatten)]
    pub connect: ConnectConfig,
    #[command(flatten)]
    pub log: LogConfig,
}

/// Flags that name the labelled images.
#[derive(Debug, Clone, Args)]
pub struct ExamplesConfig {
    /// Labelled images: a directory with a subdirectory per class, or with
    /// train/, validation/ (or val/) and test/ above the classes; anything else
    /// that `imagegpt embed` reads, with --label; or tables that it has written
    #[arg(value_name = "INPUT", required = true)]
    pub inputs: Vec<String>,

    /// Column of the labels; for WebDataset the extension of the file beside the
    /// image (cls). Any type of text or numbers; with --multi-label a list of
    /// them [default: the image's directory]
    #[arg(long, value_name = "COLUMN")]
    pub label: Option<String>,

    /// Images have any number of labels: a list per image, or text with commas.
    /// Each label has its own probability
    #[arg(long, requires = "label")]
    pub multi_label: bool,
}

/// Flags for the features that are tried.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Features")]
pub struct FeaturesConfig {
    /// Layers to try, such as 8,12,16, or all that the model computes in one run
    #[arg(long, default_value = "all", value_name = "LAYERS")]
    pub layers: String,

    /// Contexts to try, each by a run over the images: raw, sos-shifted
    #[arg(
        long = "context",
        value_enum,
        value_delimiter = ',',
        default_value = "raw",
        value_name = "CONTEXTS"
    )]
    pub contexts: Vec<Context>,

    /// Norms to try, each by a run over the images: pre-attn-rms, none
    #[arg(
        long = "norm",
        value_enum,
        value_delimiter = ',',
        default_value = "pre-attn-rms",
        value_name = "NORMS"
    )]
    pub norms: Vec<Norm>,

    /// Way in which an image that is not square becomes square; the head records
    /// it
    #[arg(long, value_enum, default_value = "squash")]
    pub fit: Fit,

    /// Color of transparent pixels: the color stored under them (drop), or white;
    /// the head records it
    #[arg(long, value_enum, default_value = "drop")]
    pub alpha: Alpha,

    /// Number format of the features on the disk; f16 takes half the room and
    /// hardly changes a probe
    #[arg(long, value_enum, default_value = "f32")]
    pub dtype: Dtype,

    /// Directory for the jobs that embed the images, which a later run uses again
    /// [default: NAME.features beside NAME.safetensors]
    #[arg(long, value_name = "DIR")]
    pub work: Option<PathBuf>,
}

/// Flags for the division of the images into parts.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Parts")]
pub struct SplitConfig {
    /// Column that says for each image whether it is train, validation (or val)
    /// or test [default: by the input's directories or files, if they all begin
    /// so]
    #[arg(long = "split", value_name = "COLUMN")]
    pub column: Option<String>,

    /// Share of the training images that become the validation part, if the
    /// input has none
    #[arg(long, default_value_t = 0.2, value_name = "SHARE", value_parser = share)]
    pub validation_share: f64,

    /// Share of the images that become the test part, if the input has none
    #[arg(long, default_value_t = 0.0, value_name = "SHARE", value_parser = share)]
    pub test_share: f64,

    /// Column of groups, whose images are in the same part, such as the person or
    /// the scene. Without it, each class is divided by the shares
    #[arg(long, value_name = "COLUMN")]
    pub group: Option<String>,

    /// Seed of the division
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub seed: u64,
}

/// Flags of the regression.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Regression")]
pub struct RegressionConfig {
    /// Strengths to try: the C of scikit-learn, of which a smaller one regularizes
    /// more
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "0.001,0.003,0.01,0.03,0.1,0.3,1,3",
        value_name = "C"
    )]
    pub strengths: Vec<f64>,

    /// Weights of classes: each image counts once (none), or each class counts
    /// alike (balanced)
    #[arg(long, value_enum, default_value = "none", value_name = "WEIGHTS")]
    pub class_weights: WeightsChoice,

    /// Fit the chosen layer and strength once more, on the training and validation
    /// images together; the head is that fit
    #[arg(
        long,
        default_value_t = true,
        action = clap::ArgAction::Set,
        value_name = "BOOL"
    )]
    pub refit: bool,

    /// Iterations after which a fit ends, converged or not
    #[arg(
        long,
        default_value_t = 1000,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=100_000)
    )]
    pub iterations_max: u32,

    /// Largest component of the gradient of the mean loss at which a fit has
    /// converged, as scikit-learn's tol
    #[arg(long, default_value_t = 1e-4, value_name = "X", value_parser = tolerance)]
    pub tolerance: f64,

    /// Fit probes on the pixels and on the counts of colors too, to compare with
    /// [default: with up to 20,000 images, if they are embedded here]
    #[arg(long, value_name = "BOOL")]
    pub baselines: Option<bool>,

    /// Threads of the fits [default: one per CPU]
    #[arg(long, value_name = "N")]
    pub threads: Option<NonZeroUsize>,
}

/// Flags that say how images are read, as for `imagegpt embed`.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Input")]
pub struct ReadingConfig {
    /// Kind of the files to read, where a directory has several kinds
    #[arg(long, value_enum, value_name = "KIND")]
    pub kind: Option<FileKind>,

    /// Column that holds the images of a table, or the paths in a list
    #[arg(long, value_name = "COLUMN")]
    pub image_column: Option<String>,

    /// Column of a table or a list that holds the URLs or paths of images
    #[arg(long, value_name = "COLUMN", conflicts_with = "image_column")]
    pub url_column: Option<String>,

    /// Column that holds the ids
    #[arg(long, value_name = "COLUMN")]
    pub id_column: Option<String>,

    /// Images per part of the embedding jobs, see `imagegpt embed`
    #[arg(long, default_value_t = 1024, value_name = "N")]
    pub part_items: u32,

    /// Images that may fail; more end the command with exit code 6
    #[arg(long, default_value_t = 0, value_name = "N")]
    pub max_errors: u64,
}

/// Weights of classes that can be chosen by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum WeightsChoice {
    None,
    Balanced,
}

/// Parts of an input that can be chosen by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum PartName {
    Train,
    Validation,
    Test,
}

fn tolerance(text: &str) -> Result<f64, String> {
    let tolerance: Option<f64> = text.parse().ok();
    tolerance
        .filter(|tolerance| (1e-12..=0.1).contains(tolerance))
        .ok_or_else(|| "a tolerance must be a number from 1e-12 to 0.1".to_owned())
}

fn share(text: &str) -> Result<f64, String> {
    let share: Option<f64> = text.parse().ok();
    share
        .filter(|share| (0.0..1.0).contains(share))
        .ok_or_else(|| "a share must be a number from 0 to below 1".to_owned())
}
