//! Flags of `imagegpt embed`, each also an environment variable where a job's
//! template would set it.

use std::time::Duration;

use clap::{Args, ValueEnum};

use crate::client::ConnectConfig;
use crate::commands::serve::OwnWorkerFlags;
use crate::imaging::{Alpha, Fit};
use crate::model::graph::{Context, Norm};
use crate::serve::config::bounds::{DAY, bounded_size, bounded_time};
use crate::telemetry::LogConfig;

/// Embed, classify or score a dataset of any size; killed at any moment, the same
/// command goes on where it was.
#[derive(Debug, Clone, Args)]
pub struct EmbedArgs {
    /// What to read: a folder tree of images; a list of images (.txt, one a
    /// line, or .csv with a header); WebDataset shards (.tar); Parquet, also
    /// with images as Hugging Face stores them; Arrow (.arrow); or a folder of
    /// such shards. A path, or a URL: s3://, gs://, az://, http://, https://.
    /// {000..999} and {a,b} are written out
    #[arg(value_name = "INPUT", required_unless_present = "finish")]
    pub inputs: Vec<String>,

    /// Where the table goes: a folder, or a URL (s3://, gs://, az://)
    #[arg(short, long, env = "IMAGEGPT_OUTPUT", value_name = "FOLDER")]
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

/// Who does the work.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Workers")]
pub struct WorkersConfig {
    /// Where workers listen, as often as there are; a name with several
    /// addresses (in Kubernetes a headless service) is all of them, and is
    /// resolved again as they come and go
    #[arg(
        long = "endpoint",
        env = "IMAGEGPT_ENDPOINT",
        default_value = "http://127.0.0.1:50051",
        value_delimiter = ',',
        value_name = "URL",
        conflicts_with = "model"
    )]
    pub endpoints: Vec<String>,

    #[command(flatten)]
    pub own: OwnWorkerFlags,

    /// Images that one worker may have at once; 0 is what it allows
    /// (--stream-window-max)
    #[arg(
        long,
        env = "IMAGEGPT_WINDOW",
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(0..=65_536)
    )]
    pub window: u32,

    /// A worker that has images and answers none of them for so long is left
    /// out for a while, and its images go elsewhere. Raise it where one batch
    /// takes longer
    #[arg(
        long,
        env = "IMAGEGPT_ITEM_TIMEOUT",
        default_value = "60s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub item_timeout: Duration,

    /// How often names of endpoints are resolved again
    #[arg(
        long,
        env = "IMAGEGPT_RESOLVE_INTERVAL",
        default_value = "10s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub resolve_interval: Duration,

    /// End, resumably, when no worker has answered anything for so long
    #[arg(
        long,
        env = "IMAGEGPT_GIVE_UP_AFTER",
        default_value = "10m",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub give_up_after: Duration,

    /// Memory for reading and waiting together: files that are read ahead, pages
    /// and record batches as they are after decompression, and images until their
    /// answers are there. A shard or an image that cannot fit is an error
    #[arg(
        long,
        env = "IMAGEGPT_IMAGE_MEMORY",
        default_value = "256MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 20, 1 << 30)
    )]
    pub image_memory: bytesize::ByteSize,
}

/// What is computed.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Task")]
pub struct TaskConfig {
    /// embed gives a vector an image, classify its best classes, score how
    /// likely the model finds it
    #[arg(long, env = "IMAGEGPT_TASK", value_enum, default_value = "embed")]
    pub task: EmbedTask,

    /// How an image becomes square
    #[arg(long, env = "IMAGEGPT_FIT", value_enum, default_value = "squash")]
    pub fit: Fit,

    /// What transparent pixels show: the color stored under them, or white
    #[arg(long, env = "IMAGEGPT_ALPHA", value_enum, default_value = "drop")]
    pub alpha: Alpha,

    /// embed: the image alone, or after the start token as in pre-training; a
    /// head knows its own
    #[arg(long, env = "IMAGEGPT_CONTEXT", value_enum, default_value = "raw")]
    pub context: Context,

    /// embed: the mean of all positions' states, or the last one
    #[arg(long, env = "IMAGEGPT_POOLING", value_enum, default_value = "mean")]
    pub pooling: Pooling,

    /// embed: whose features, out of GetModel's layers_served [default: the
    /// model's own]
    #[arg(long, env = "IMAGEGPT_LAYER", value_name = "N")]
    pub layer: Option<u32>,

    /// embed: after the next block's norm, or the residual stream itself
    #[arg(
        long,
        env = "IMAGEGPT_NORM",
        value_enum,
        default_value = "pre-attn-rms"
    )]
    pub norm: Norm,

    /// embed: scale vectors to length 1
    #[arg(long, env = "IMAGEGPT_NORMALIZE")]
    pub normalize: bool,

    /// embed: how numbers are stored
    #[arg(long, env = "IMAGEGPT_DTYPE", value_enum, default_value = "f32")]
    pub dtype: Dtype,

    /// classify: this linear head of the workers [default: the checkpoint's
    /// own]
    #[arg(long, env = "IMAGEGPT_HEAD", value_name = "NAME")]
    pub head: Option<String>,

    /// classify: how many classes, best first
    #[arg(
        long,
        env = "IMAGEGPT_TOP_K",
        default_value_t = 5,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1000)
    )]
    pub top_k: u32,
}

/// What the table looks like.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Table")]
pub struct TableConfig {
    /// parquet and arrow hold ids, vectors and kept columns; npy holds vectors
    /// in img_emb/, and ids and kept columns in metadata/, as clip-retrieval
    /// has them
    #[arg(long, env = "IMAGEGPT_FORMAT", value_enum, default_value = "parquet")]
    pub format: TableFormat,

    /// Columns of the input that are carried over; for WebDataset kinds of
    /// sidecar files (json,txt,cls)
    #[arg(
        long,
        env = "IMAGEGPT_KEEP",
        value_delimiter = ',',
        value_name = "COLUMNS"
    )]
    pub keep: Vec<String>,

    /// Column of a table that has the images, or of a CSV that has their paths
    /// [default: the one that looks like it]
    #[arg(long, env = "IMAGEGPT_IMAGE_COLUMN", value_name = "COLUMN")]
    pub image_column: Option<String>,

    /// Column of a table that has the ids [default: the file's name and the row]
    #[arg(long, env = "IMAGEGPT_ID_COLUMN", value_name = "COLUMN")]
    pub id_column: Option<String>,

    /// Images a part, as they follow each other in the input. Parts that are not
    /// finished, four at most, are done again after a kill and are in memory
    /// until then: take fewer for slow models and long vectors
    #[arg(
        long,
        env = "IMAGEGPT_PART_ITEMS",
        default_value_t = 4096,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub part_items: u32,

    /// How long the URL of one image in a list is asked for again while its server
    /// is busy, away or slow (5xx, 408, 429, timeouts, connections that are
    /// refused); after that it is an error of this image, as one that is gone
    /// or forbidden is at once
    #[arg(
        long,
        env = "IMAGEGPT_URL_PATIENCE",
        default_value = "1min",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub url_patience: Duration,

    /// Refuses every URL of a list, and every redirect, that leads to another
    /// than a public address: loopback, private, shared, link-local, multicast.
    /// Set it for a list from somebody who is not trusted, who could otherwise
    /// have this machine ask hosts that only the own network reaches. Without
    /// it a list may name such hosts, and only what a public address redirects
    /// to must be public. Cannot be checked through a proxy, so HTTP_PROXY,
    /// HTTPS_PROXY and ALL_PROXY must not be set
    #[arg(
        long,
        env = "IMAGEGPT_PUBLIC_ADDRESSES_ONLY",
        conflicts_with = "link_local_addresses"
    )]
    pub public_addresses_only: bool,

    /// Allows URLs of a list to lead to link-local addresses, where clouds have
    /// the metadata and credentials of a machine (169.254.0.0/16, fe80::/10 and
    /// the like). Off, since hardly any data lies there; also with it no public
    /// address redirects there
    #[arg(long, env = "IMAGEGPT_LINK_LOCAL_ADDRESSES")]
    pub link_local_addresses: bool,

    /// End when more images than this have failed [default: never]
    #[arg(long, env = "IMAGEGPT_MAX_ERRORS", value_name = "N")]
    pub max_errors: Option<u64>,
}

/// Which part of the work.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Several jobs")]
pub struct ShareConfig {
    /// Do the I-th of N shares, counted from 0; no two write the same file
    #[arg(long, env = "IMAGEGPT_SHARD", value_name = "I/N", value_parser = share, conflicts_with = "shards")]
    pub shard: Option<JobShare>,

    /// Do the share that JOB_COMPLETION_INDEX says, out of so many: what an
    /// Indexed Job of Kubernetes sets
    #[arg(
        long,
        env = "IMAGEGPT_SHARDS",
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    pub shards: Option<u32>,

    /// Check that all parts of a job are there, and write its summary; with
    /// --output alone
    #[arg(long, conflicts_with_all = ["shard", "shards", "inputs"])]
    pub finish: bool,
}

/// One of several shares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JobShare {
    pub index: u32,
    pub of: u32,
}

impl JobShare {
    pub(super) const WHOLE: Self = Self { index: 0, of: 1 };
}

fn share(text: &str) -> Result<JobShare, String> {
    let parts = text.split_once('/');
    let parsed = parts.and_then(|(index, of)| Some((index.parse().ok()?, of.parse().ok()?)));
    match parsed {
        Some((index, of)) if index < of => Ok(JobShare { index, of }),
        _ => Err("it must be I/N, with I from 0 to N-1, such as 0/4".to_owned()),
    }
}

impl ShareConfig {
    /// What this job is to do.
    pub(super) fn share(&self) -> anyhow::Result<JobShare> {
        if let Some(share) = self.shard {
            return Ok(share);
        }
        let Some(of) = self.shards else {
            return Ok(JobShare::WHOLE);
        };
        let index = std::env::var("JOB_COMPLETION_INDEX").ok();
        let index = index.as_deref().map(str::parse::<u32>);
        match index {
            Some(Ok(index)) if index < of => Ok(JobShare { index, of }),
            Some(_) => anyhow::bail!("JOB_COMPLETION_INDEX must be a number under --shards {of}"),
            None => anyhow::bail!(
                "--shards {of} takes the share that JOB_COMPLETION_INDEX says, which is not set; \
                 give --shard I/N"
            ),
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum EmbedTask {
    Embed,
    Classify,
    Score,
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
    fn shares() {
        check(&["in"], "0 of 1");
        check(&["in", "--shard", "1/4"], "1 of 4");
        check(&["in", "--shard", "4/4"], "such as 0/4");
        check(&["in", "--shards", "4"], "JOB_COMPLETION_INDEX");
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
