//! Flags of `imagegpt embed`. Each flag that a job's template would set is also
//! an environment variable.

use std::collections::BTreeSet;
use std::time::Duration;

use clap::{Args, ValueEnum};

pub use super::finding::FileKind;
use crate::client::ConnectConfig;
use crate::commands::serve::OwnWorkerFlags;
use crate::imaging::{Alpha, Fit};
use crate::model::graph::{Context, Norm};
use crate::proto::GrpcCode;
use crate::serve::config::bounds::{DAY, bounded_size, bounded_time};
use crate::telemetry::LogConfig;

/// Embed, classify or score a dataset of any size. Resumable: after a kill at
/// any moment, the same command continues after the last finished part.
#[derive(Debug, Clone, Args)]
pub struct EmbedArgs {
    /// Input to read: a directory tree of images; a list of images (.txt with
    /// one path or URL per line, .csv or .tsv with a header, or .jsonl with an
    /// object per line); WebDataset shards (.tar); Parquet, also with images as
    /// Hugging Face stores them; Arrow (.arrow); or a directory of such shards.
    /// A path, or a URL: file:, s3://, gs://, az://, http://, https://, or
    /// hf://datasets/OWNER/NAME for a dataset of the Hugging Face Hub. Brace
    /// patterns such as {000..999} and {a,b} are expanded, unless a path has
    /// that very name
    #[arg(value_name = "INPUT", required_unless_present = "finish")]
    pub inputs: Vec<String>,

    /// Directory or URL (s3://, gs://, az://) into which the output table is
    /// written
    #[arg(short, long, env = "IMAGEGPT_OUTPUT", value_name = "DIR")]
    pub output: String,

    #[command(flatten)]
    pub workers: WorkersConfig,
    #[command(flatten)]
    pub task: TaskConfig,
    #[command(flatten)]
    pub table: TableConfig,
    #[command(flatten)]
    pub share: ShareConfig,
    #[command(flatten)]
    pub connect: ConnectConfig,
    #[command(flatten)]
    pub log: LogConfig,
}

/// Flags that name the workers and bound what they are given.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workers")]
pub struct WorkersConfig {
    /// URL of a worker, or HOST:PORT; give several, separated by commas or by repeating the
    /// flag, to use all of them. A host name with several addresses (in
    /// Kubernetes a headless service) stands for one worker per address, and is
    /// resolved again as workers come and go
    #[arg(
        long = "endpoint",
        env = "IMAGEGPT_ENDPOINT",
        default_value = "http://127.0.0.1:50051",
        value_delimiter = ',',
        value_name = "URL",
        conflicts_with_all = ["model", "serve"]
    )]
    pub endpoints: Vec<String>,

    #[command(flatten)]
    pub own: OwnWorkerFlags,

    /// Images that one worker may have in flight at the same time; 0 uses the
    /// limit that the worker reports (its --stream-window-max)
    #[arg(
        long,
        env = "IMAGEGPT_WINDOW",
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(0..=65_536)
    )]
    pub window: u32,

    /// Longest time without an answer from a worker that has images. After this
    /// time the worker is left out with exponential backoff, and its images go
    /// to other workers. Raise the time where one batch takes longer
    #[arg(
        long,
        env = "IMAGEGPT_ITEM_TIMEOUT",
        default_value = "60s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub item_timeout: Duration,

    /// Time between two DNS lookups of the endpoints' host names
    #[arg(
        long,
        env = "IMAGEGPT_RESOLVE_INTERVAL",
        default_value = "10s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub resolve_interval: Duration,

    /// Time without an answer from any worker after which the job ends with
    /// exit code 1; the same command then resumes the job
    #[arg(
        long,
        env = "IMAGEGPT_GIVE_UP_AFTER",
        default_value = "10m",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub give_up_after: Duration,

    /// Memory for reading and waiting together: files that are read ahead,
    /// pages and record batches after decompression, and images until they are
    /// answered. A shard or an image that cannot fit is recorded as an error
    #[arg(
        long,
        env = "IMAGEGPT_IMAGE_MEMORY",
        default_value = "256MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 20, 1 << 30)
    )]
    pub image_memory: bytesize::ByteSize,
}

/// Flags that say what is computed for each image.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Task")]
pub struct TaskConfig {
    /// Result for each image: embed stores its vector, classify its best
    /// classes, score its likelihood under the model, tokenize its color tokens
    #[arg(long, env = "IMAGEGPT_TASK", value_enum, default_value = "embed")]
    pub task: EmbedTask,

    /// Way in which an image that is not square becomes square [default:
    /// with --task classify as the linear head was trained if it says so, or
    /// else squash]
    #[arg(long, env = "IMAGEGPT_FIT", value_enum)]
    pub fit: Option<Fit>,

    /// Color of transparent pixels: the color stored under them (drop), or
    /// white [default: with --task classify as the linear head was trained if it
    /// says so, or else drop]
    #[arg(long, env = "IMAGEGPT_ALPHA", value_enum)]
    pub alpha: Option<Alpha>,

    /// embed: tokens that the model sees: the image alone (raw), or the image
    /// after the start token as in pre-training (sos-shifted). A linear head
    /// records its own context
    #[arg(long, env = "IMAGEGPT_CONTEXT", value_enum, default_value = "raw")]
    pub context: Context,

    /// embed: how the states of all positions become one vector: their mean, or
    /// the last position's state
    #[arg(long, env = "IMAGEGPT_POOLING", value_enum, default_value = "mean")]
    pub pooling: Pooling,

    /// embed: layer whose features are stored, one of layers_served in GetModel
    /// [default: layer_default in GetModel; the last layer with --pooling last]
    #[arg(long, env = "IMAGEGPT_LAYER", value_name = "N")]
    pub layer: Option<u32>,

    /// embed: several layers, such as 8,12,16, or all that the model
    /// computes in one run. The table has a column for each: embedding_8,
    /// embedding_12 and so on
    #[arg(
        long,
        env = "IMAGEGPT_LAYERS",
        value_name = "LAYERS",
        value_parser = layer_choice,
        conflicts_with = "layer"
    )]
    pub layers: Option<LayerChoice>,

    /// embed: point at which features are taken: after the next block's norm,
    /// or the residual stream itself
    #[arg(
        long,
        env = "IMAGEGPT_NORM",
        value_enum,
        default_value = "pre-attn-rms"
    )]
    pub norm: Norm,

    /// embed: scale each vector to length 1
    #[arg(long, env = "IMAGEGPT_NORMALIZE")]
    pub normalize: bool,

    /// embed: number format in which vectors are stored
    #[arg(long, env = "IMAGEGPT_DTYPE", value_enum, default_value = "f32")]
    pub dtype: Dtype,

    /// classify: name of the workers' linear head to use [default: the
    /// checkpoint's own head]
    #[arg(long, env = "IMAGEGPT_HEAD", value_name = "NAME")]
    pub head: Option<String>,

    /// classify: number of classes to store per image, best first
    #[arg(
        long,
        env = "IMAGEGPT_TOP_K",
        default_value_t = 5,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1000)
    )]
    pub top_k: u32,
}

/// Flags of the output table, of the input's columns, and of lists' URLs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Table")]
pub struct TableConfig {
    /// File format of the table: parquet and arrow hold ids, vectors and kept
    /// columns; npy holds vectors in img_emb/, and ids and kept columns in
    /// metadata/, as clip-retrieval lays them out
    #[arg(long, env = "IMAGEGPT_FORMAT", value_enum, default_value = "parquet")]
    pub format: TableFormat,

    /// Kind of the files to read where a directory contains several kinds, or
    /// where a file's name does not show it. With tar, files of a directory
    /// that have no extension are read too [default: found by the names]
    #[arg(long, env = "IMAGEGPT_KIND", value_enum, value_name = "KIND")]
    pub kind: Option<FileKind>,

    /// Columns of the input that are copied into the table; for WebDataset the
    /// extensions of sidecar files (json,txt,cls)
    #[arg(
        long,
        env = "IMAGEGPT_KEEP",
        value_delimiter = ',',
        value_name = "COLUMNS"
    )]
    pub keep: Vec<String>,

    /// Column that holds the images of a Parquet or Arrow table, or the paths
    /// in a list [default: found by the columns' names and types]
    #[arg(long, env = "IMAGEGPT_IMAGE_COLUMN", value_name = "COLUMN")]
    pub image_column: Option<String>,

    /// Column of a Parquet or Arrow table or of a list (.csv, .tsv, .jsonl) that
    /// holds the URLs or paths of images, which are read as those of a list.
    /// Paths are relative to the table. Parquet and Arrow tables are read in
    /// this way only with this flag
    #[arg(
        long,
        env = "IMAGEGPT_URL_COLUMN",
        value_name = "COLUMN",
        conflicts_with = "image_column"
    )]
    pub url_column: Option<String>,

    /// Column of a table or a list that holds the ids: text, numbers, dates,
    /// times, booleans, UUIDs or UTF-8 in binary [default: of a table the path
    /// below the input and the row, of a list the path or URL]
    #[arg(long, env = "IMAGEGPT_ID_COLUMN", value_name = "COLUMN")]
    pub id_column: Option<String>,

    /// Images per part, in the order of the input. At most four parts are
    /// unfinished at the same time. Unfinished parts are held in memory, and
    /// are done again after a kill: lower the number for slow models and long
    /// vectors
    #[arg(
        long,
        env = "IMAGEGPT_PART_ITEMS",
        default_value_t = 4096,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub part_items: u32,

    /// Time for which one image's URL in a list is retried, with exponential
    /// backoff, while its server is busy, unavailable or slow (5xx, 408, 429,
    /// timeouts, refused connections). After this time the image is recorded as
    /// an error; an image that does not exist or is forbidden is an error at
    /// once
    #[arg(
        long,
        env = "IMAGEGPT_URL_PATIENCE",
        default_value = "1min",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub url_patience: Duration,

    /// Refuse every URL of a list, and every redirect, that leads to an address
    /// that is not public: loopback, private, shared, link-local, multicast.
    /// Set the flag for a list from an untrusted source, which could otherwise
    /// make this machine send requests to hosts that only its own network
    /// reaches. Without the flag a list may name hosts on private networks, and
    /// only redirects from public addresses must lead to public ones. Addresses
    /// cannot be checked through a proxy, so HTTP_PROXY, HTTPS_PROXY and
    /// ALL_PROXY must not be set
    #[arg(
        long,
        env = "IMAGEGPT_PUBLIC_ADDRESSES_ONLY",
        conflicts_with = "link_local_addresses"
    )]
    pub public_addresses_only: bool,

    /// Allow URLs of a list to lead to link-local addresses (169.254.0.0/16,
    /// fe80::/10 and metadata services elsewhere), where clouds serve a
    /// machine's metadata and credentials. Off by default, since hardly any
    /// data lies there. Even with this flag, redirects from public addresses to
    /// link-local ones are refused
    #[arg(long, env = "IMAGEGPT_LINK_LOCAL_ADDRESSES")]
    pub link_local_addresses: bool,

    /// Try the errors of a finished job again, into new parts beside those that
    /// are there: all errors, or those with the codes that are given, such as
    /// --retry-errors=UNAVAILABLE,RESOURCE_EXHAUSTED. Needs the inputs and
    /// options of the job. Each finished run is a round; the next one tries what
    /// is left
    #[arg(
        long,
        env = "IMAGEGPT_RETRY_ERRORS",
        value_name = "CODES",
        num_args = 0..=1,
        require_equals = true,
        default_missing_value = "all",
        value_parser = retry_choice,
        conflicts_with = "finish"
    )]
    pub retry_errors: Option<RetryChoice>,

    /// Number of failed images, over all runs of this job, above which the job
    /// ends with exit code 6 [default: no limit]
    #[arg(long, env = "IMAGEGPT_MAX_ERRORS", value_name = "N")]
    pub max_errors: Option<u64>,
}

/// Flags that divide a job among several machines.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Several jobs")]
pub struct ShareConfig {
    /// Do only the share I of N, where I counts from 0. No two shares write the
    /// same file
    #[arg(long, env = "IMAGEGPT_SHARD", value_name = "I/N", value_parser = share, conflicts_with = "shards")]
    pub shard: Option<JobShare>,

    /// Number of shares, of which this job does the share whose index is in a
    /// variable: JOB_COMPLETION_INDEX, as set by an Indexed Job of Kubernetes,
    /// SLURM_ARRAY_TASK_ID, as set by an array job of Slurm (--array=0-3 for 4
    /// shares), or OMPI_COMM_WORLD_RANK, as set by Open MPI
    #[arg(
        long,
        env = "IMAGEGPT_SHARDS",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub shards: Option<u32>,

    /// Check that all parts of a job exist, and write its summary. Takes no
    /// inputs, only --output
    #[arg(long, conflicts_with_all = ["shard", "shards", "inputs"])]
    pub finish: bool,
}

/// Layers that `--layers` asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LayerChoice {
    /// All layers that the model computes in one run.
    All,
    /// Layers in ascending order, each once.
    Named(Vec<u32>),
}

fn layer_choice(text: &str) -> Result<LayerChoice, String> {
    if text == "all" {
        return Ok(LayerChoice::All);
    }
    let layers = text.split(',').map(|layer| layer.trim().parse());
    let layers: Result<BTreeSet<u32>, _> = layers.collect();
    layers
        .map(|layers| LayerChoice::Named(layers.into_iter().collect()))
        .map_err(|_| "layers must be numbers such as 8,12,16, or all".to_owned())
}

/// Errors that `--retry-errors` tries again.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum RetryChoice {
    /// Errors with any code.
    All,
    /// Errors with one of these codes.
    Codes(BTreeSet<GrpcCode>),
}

impl RetryChoice {
    /// Reads codes by their names, or `all`; `None` if a name is unknown.
    pub(super) fn of_names(names: &[impl AsRef<str>]) -> Option<Self> {
        let names = names.iter().map(|name| name.as_ref().trim());
        if names.clone().eq(["all"]) {
            return Some(Self::All);
        }
        names
            .map(GrpcCode::named)
            .collect::<Option<_>>()
            .map(Self::Codes)
    }

    /// Returns the names of the codes, in order.
    pub(super) fn names(&self) -> Vec<String> {
        match self {
            Self::All => vec!["all".to_owned()],
            Self::Codes(codes) => codes.iter().map(GrpcCode::to_string).collect(),
        }
    }

    /// True if errors with this code are tried again.
    pub(super) fn has(&self, code: GrpcCode) -> bool {
        match self {
            Self::All => true,
            Self::Codes(codes) => codes.contains(&code),
        }
    }
}

fn retry_choice(text: &str) -> Result<RetryChoice, String> {
    let names: Vec<&str> = text.split(',').collect();
    RetryChoice::of_names(&names).ok_or_else(|| {
        "codes must be names of gRPC codes such as UNAVAILABLE,NOT_FOUND, or all".to_owned()
    })
}

/// Variables that hold the index of a share, as schedulers set them.
const INDEX_VARIABLES: [&str; 3] = [
    "JOB_COMPLETION_INDEX",
    "SLURM_ARRAY_TASK_ID",
    "OMPI_COMM_WORLD_RANK",
];

/// One share of a job that is divided among several machines.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobShare {
    pub index: u32,
    pub of: u32,
}

impl JobShare {
    pub(super) const WHOLE: Self = Self { index: 0, of: 1 };

    /// True if the share has the shard with this number.
    pub(super) fn has(self, shard: usize) -> bool {
        shard % self.of as usize == self.index as usize
    }
}

fn share(text: &str) -> Result<JobShare, String> {
    let parts = text.split_once('/');
    let parsed = parts.and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
    match parsed {
        Some((index, of)) if index < of => Ok(JobShare { index, of }),
        _ => Err("a share must be I/N, with I from 0 to N-1, such as 0/4".to_owned()),
    }
}

impl ShareConfig {
    /// Returns the share that this process does, from the flags or from a
    /// variable of [`INDEX_VARIABLES`].
    pub(super) fn share(&self) -> anyhow::Result<JobShare> {
        self.share_in(|variable| std::env::var(variable).ok())
    }

    /// Returns the share for the values of variables that `value` has.
    fn share_in(&self, value: impl Fn(&str) -> Option<String>) -> anyhow::Result<JobShare> {
        if let Some(share) = self.shard {
            return Ok(share);
        }
        let Some(of) = self.shards else {
            return Ok(JobShare::WHOLE);
        };
        let mut found: Option<(&str, u32)> = None;
        for variable in INDEX_VARIABLES {
            let Some(text) = value(variable).filter(|text| !text.is_empty()) else {
                continue;
            };
            let index = text.parse().ok().filter(|index| *index < of);
            let Some(index) = index else {
                anyhow::bail!(
                    "{variable}={text} must be a number from 0 to {} (--shards {of})",
                    of - 1
                );
            };
            match found {
                Some((other, before)) if before != index => anyhow::bail!(
                    "{other}={before} and {variable}={index} name different shares; give \
                     --shard I/{of}, or unset one of them"
                ),
                _ => found = Some((variable, index)),
            }
        }
        match found {
            Some((_, index)) => Ok(JobShare { index, of }),
            None => anyhow::bail!(
                "--shards {of} takes the share that the variable JOB_COMPLETION_INDEX, \
                 SLURM_ARRAY_TASK_ID or OMPI_COMM_WORLD_RANK names, none of which is set; set \
                 one, or give --shard I/{of}"
            ),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EmbedTask {
    Embed,
    Classify,
    Score,
    Tokenize,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Pooling {
    Mean,
    Last,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum Dtype {
    F32,
    F16,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TableFormat {
    Parquet,
    Arrow,
    Npy,
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Debug, Parser)]
    struct Cli {
        #[command(flatten)]
        embed: EmbedArgs,
    }

    fn check(flags: &[&str], expected: &str) {
        let got = match Cli::try_parse_from(["embed", "--output", "o"].iter().chain(flags)) {
            Ok(cli) => match cli.embed.share.share() {
                Ok(share) => format!("{} of {}", share.index, share.of),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        assert!(got.contains(expected), "{flags:?}: {got}");
    }

    #[test]
    fn schedulers_name_the_share() {
        const KUBERNETES: &str = "JOB_COMPLETION_INDEX";
        const SLURM: &str = "SLURM_ARRAY_TASK_ID";
        const MPI: &str = "OMPI_COMM_WORLD_RANK";
        let config = ShareConfig {
            shard: None,
            shards: Some(4),
            finish: false,
        };
        for (set, expected) in [
            (&[(KUBERNETES, "3")][..], "3 of 4"),
            (&[(SLURM, "0")], "0 of 4"),
            (&[(MPI, "2")], "2 of 4"),
            (&[(KUBERNETES, ""), (SLURM, "1")], "1 of 4"),
            (&[(SLURM, "1"), (MPI, "1")], "1 of 4"),
            (&[(SLURM, "1"), (MPI, "0")], "different shares"),
            (
                &[(SLURM, "4")],
                "SLURM_ARRAY_TASK_ID=4 must be a number from 0 to 3",
            ),
            (&[(MPI, "one")], "OMPI_COMM_WORLD_RANK=one must be"),
            (&[], "none of which is set"),
        ] {
            let value = |name: &str| {
                let known = set.iter().find(|(variable, _)| *variable == name);
                known.map(|(_, value)| (*value).to_owned())
            };
            let got = match config.share_in(value) {
                Ok(share) => format!("{} of {}", share.index, share.of),
                Err(error) => error.to_string(),
            };
            assert!(got.contains(expected), "{set:?}: {got}");
        }
        let named = ShareConfig {
            shard: Some(JobShare { index: 1, of: 2 }),
            ..config
        };
        let share = named.share_in(|_| Some("0".to_owned())).expect("a share");
        assert_eq!(share, JobShare { index: 1, of: 2 });
    }

    #[test]
    fn shares() {
        check(&["in"], "0 of 1");
        check(&["in", "--shard", "1/4"], "1 of 4");
        check(&["in", "--shard", "4/4"], "such as 0/4");
        check(&["in", "--shards", "4"], "SLURM_ARRAY_TASK_ID");
        check(&["in", "--shard", "0/2", "--shards", "2"], "cannot be used");
        check(&["--finish"], "0 of 1");
        check(&["--finish", "in"], "cannot be used");
        check(&[], "INPUT");
        check(
            &["in", "--item-timeout", "99ms"],
            "'99ms' for '--item-timeout <TIME>': it must be 100ms to 1day",
        );
        check(
            &["in", "--image-memory", "2GiB"],
            "'2GiB' for '--image-memory <SIZE>': it must be 1.0 MiB to 1.0 GiB",
        );
    }
}
