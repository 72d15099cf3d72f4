//! Command `imagegpt embed`: writes a table of embeddings, classes or scores of
//! a dataset of any size, computed by a pool of workers.
//!
//! The input is cut into parts: runs of images in the order of the input. A
//! part is written and then recorded. A job that was killed resumes with the
//! first part that has no record. A part's files depend only on its images, the
//! model and the options, so the output is the same to the byte as that of an
//! undisturbed run.

mod address;
mod connect;
mod encoding;
mod finding;
mod finish;
pub mod flags;
mod history;
mod hub;
mod identity;
mod input;
mod journal;
mod kept;
mod lease;
mod lists;
mod location;
mod memory;
mod names;
mod pipeline;
mod plan;
mod prepare;
mod progress;
mod ranged;
mod reader;
mod recorded;
mod report;
mod request;
mod retry;
mod sink;
mod table;
mod web;
mod wire;

use std::collections::BTreeSet;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use serde::Serialize;
use tokio::sync::mpsc;

use self::finish::{finish, finish_alone};
use self::flags::{EmbedArgs, EmbedTask, LayerChoice, Pooling, TableFormat};
use self::history::{PartHistory, histories};
use self::input::SidecarsSeen;
use self::journal::Record;
use self::location::Stores;
use self::pipeline::{EmbedJob, IMAGES_QUEUE, Stopped};
use self::prepare::{Prepared, Unprepared, reading};
use self::progress::JobCounts;
use self::reader::ShardWork;
use self::recorded::remove_superseded;
use self::report::{Report, say, warn_of_no_rows};
use self::request::asked;
use self::sink::{Sink, is_full};
use self::table::{OWN_COLUMNS, TOKENS_COLUMN, is_layer_column};
use self::web::WebTrust;
use crate::client::pool::WorkerPool;
use crate::model::graph::{Context, Norm};
use crate::model::{CallTask, ModelNeed};

pub(in crate::commands) use self::journal::Differs;
pub use self::progress::Terminal;

/// Bytes of a message besides its image, at most.
const MESSAGE_OVERHEAD: u64 = 2048;
/// Environment variables that name proxies, which look host names up
/// themselves.
const PROXIES: [&str; 6] = [
    "HTTP_PROXY",
    "http_proxy",
    "HTTPS_PROXY",
    "https_proxy",
    "ALL_PROXY",
    "all_proxy",
];

/// Outcome of the command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum JobEnded {
    /// All work of this job is done.
    Done,
    /// The command was told to end; the same command resumes the job.
    Interrupted,
    /// More errors than `--max-errors` allows: repeating the same command does
    /// not help.
    TooManyErrors,
    /// A failure that may be mended; the same command resumes the job.
    Failed,
}

/// Checks the flags, and that the output can be written: all that can be
/// checked before a model is loaded or a worker is asked. Returns an end of the
/// command if the output's disk is full, which may be mended.
///
/// # Errors
///
/// When the flags or the output cannot be used.
pub async fn check(args: &EmbedArgs) -> anyhow::Result<Option<JobEnded>> {
    let sink = Sink::open(&args.output, &Stores::default())?;
    if args.share.finish {
        return Ok(None);
    }
    args.validate()?;
    match sink.check().await {
        Err(error) if is_full(&error) => {
            tracing::error!("{error:#}; the same command goes on once there is room");
            Ok(Some(JobEnded::Failed))
        }
        checked => checked.map(|()| None),
    }
}

/// Runs the command after [`check`]; the JSON report goes to `out`. The inputs
/// are looked at before `endpoints` is awaited, which may load a model: a wrong
/// input is reported at once.
///
/// # Errors
///
/// Flags, inputs or an output that cannot be used: repeating the same command
/// does not help.
pub async fn run(
    args: &EmbedArgs,
    endpoints: impl Future<Output = anyhow::Result<Vec<String>>>,
    terminal: &Terminal,
    stop: impl Future<Output = ()>,
    out: &mut impl Write,
) -> anyhow::Result<JobEnded> {
    let stores = Arc::new(Stores::new(WebTrust {
        link_local: args.table.link_local_addresses,
        public_only: args.table.public_addresses_only,
    }));
    let sink = Sink::open(&args.output, &stores)?;
    if args.share.finish {
        return finish_alone(&sink, out).await;
    }
    tokio::pin!(stop);
    let prepared = tokio::select! {
        prepared = Prepared::new(args, endpoints, &stores, sink) => prepared,
        () = &mut stop => return Ok(JobEnded::Interrupted),
    };
    match prepared {
        Ok(prepared) => prepared.run(args, terminal, stop, out).await,
        Err(Unprepared::Refused(error)) => Err(error),
        Err(Unprepared::Failed(error)) => {
            tracing::error!("{error:#}");
            Ok(JobEnded::Failed)
        }
    }
}

impl EmbedArgs {
    /// Computations that the job needs of a model that is served for it alone.
    #[must_use]
    pub fn needs(&self) -> Vec<ModelNeed> {
        let task = &self.task;
        vec![match (task.task, task.pooling) {
            (EmbedTask::Tokenize, _) => return Vec::new(),
            (EmbedTask::Score, _) => ModelNeed::Call(CallTask::Score),
            // The features of a linear head are needed because the head is
            // loaded.
            (EmbedTask::Classify, _) if task.head.is_some() => return Vec::new(),
            (EmbedTask::Classify, _) => ModelNeed::Call(CallTask::Classify),
            (EmbedTask::Embed, Pooling::Last) => ModelNeed::States,
            (EmbedTask::Embed, Pooling::Mean) => ModelNeed::Features {
                layers: match &task.layers {
                    Some(LayerChoice::Named(layers)) => layers.clone(),
                    // All layers of one run have layer 0 among them.
                    Some(LayerChoice::All) => vec![0],
                    None => task.layer.into_iter().collect(),
                },
                norm: task.norm,
            },
        }]
    }

    fn validate(&self) -> anyhow::Result<()> {
        let (task, table) = (&self.task, &self.table);
        let is_own = |name: &str| {
            OWN_COLUMNS.contains(&name)
                || task.layers.is_some() && is_layer_column(name)
                || task.task == EmbedTask::Tokenize && name == TOKENS_COLUMN
        };
        if let Some(name) = table.keep.iter().find(|name| is_own(name)) {
            anyhow::bail!("--keep {name}: the table already has its own column of this name");
        }
        let mut named = BTreeSet::new();
        if let Some(name) = table.keep.iter().find(|name| !named.insert(*name)) {
            anyhow::bail!(
                "--keep {name}: the column is named twice, and a table has one column of a name; \
                 name it once"
            );
        }
        if let Some(name) = PROXIES
            .into_iter()
            .filter(|_| table.public_addresses_only)
            .find(|name| std::env::var_os(name).is_some_and(|value| !value.is_empty()))
        {
            anyhow::bail!(
                "--public-addresses-only: {name} is set, and the addresses that a proxy connects \
                 to cannot be checked; unset {name}, or let the proxy refuse other addresses and \
                 leave the flag out"
            );
        }
        let is_embed = task.task == EmbedTask::Embed;
        let only = [
            (
                "--head",
                "--task classify",
                task.head.is_some() && task.task != EmbedTask::Classify,
            ),
            ("--layer", "--task embed", task.layer.is_some() && !is_embed),
            (
                "--layers",
                "--task embed",
                task.layers.is_some() && !is_embed,
            ),
            (
                "--layers",
                "--pooling mean",
                task.layers.is_some() && task.pooling == Pooling::Last,
            ),
            (
                "--context",
                "--task embed",
                task.context != Context::Raw && !is_embed,
            ),
            (
                "--norm",
                "--task embed",
                task.norm != Norm::PreAttnRms && !is_embed,
            ),
            ("--normalize", "--task embed", task.normalize && !is_embed),
            (
                "--format npy",
                "--task embed",
                table.format == TableFormat::Npy && !is_embed,
            ),
        ];
        match only.iter().find(|(_, _, is_unfit)| *is_unfit) {
            Some((flag, of, _)) => anyhow::bail!("{flag} can only be used with {of}"),
            None => Ok(()),
        }
    }
}

impl Prepared {
    async fn run(
        mut self,
        args: &EmbedArgs,
        terminal: &Terminal,
        stop: impl Future<Output = ()>,
        out: &mut impl Write,
    ) -> anyhow::Result<JobEnded> {
        let started = Instant::now();
        let work = self.work();
        let n_shards = work.len();
        let before = self.before();
        let images_before: u64 = before.iter().map(PartHistory::images).sum();
        let message = match &self.retry {
            Some(round) if round.parts.is_empty() => {
                "there are no such errors left to retry".to_owned()
            }
            Some(round) => format!("retrying errors, round {}", round.number),
            None if before.is_empty() => "starting the job".to_owned(),
            None => "resuming the job".to_owned(),
        };
        tracing::info!(
            model = self.model.name,
            digest = self.model.digest,
            shards_left = n_shards,
            parts_done = before.len(),
            images_done = images_before,
            "{message}"
        );
        let counts = Arc::new(JobCounts::default());
        let mut sidecars = Arc::default();
        let errors_max = args.table.max_errors;
        let has_too_many = errors_max.filter(|max| self.errors_before() > *max);
        let result = if let Some(max) = has_too_many.filter(|_| work.is_empty()) {
            Err(Stopped::TooManyErrors {
                max,
                last: None,
                unfinished: Vec::new(),
            }
            .into())
        } else if work.is_empty() {
            Ok(None)
        } else {
            // What is there now is no longer all that there will be.
            self.sink.remove(finish::SUMMARY).await?;
            let job = self.job(args, work, terminal)?;
            sidecars = Arc::clone(&job.reading.sidecars);
            let (tasks_in, tasks) = mpsc::channel(IMAGES_QUEUE);
            let asked = asked(&args.task, &self.model);
            let digest = self.model.digest.clone();
            let (pool, answers) = WorkerPool::start(self.pool.clone(), asked, digest, tasks)?;
            tokio::select! {
                result = pipeline::run(job, pool, tasks_in, answers, &counts) => result.map(|()| None),
                () = stop => Ok(Some(JobEnded::Interrupted)),
                error = self.lease.lost() => Err(error),
            }
        };
        let (outcome, reason) = match result {
            Ok(outcome) => (outcome.unwrap_or(JobEnded::Done), None),
            Err(error) => {
                let outcome = match error.downcast_ref() {
                    Some(Stopped::TooManyErrors { .. }) => JobEnded::TooManyErrors,
                    _ => JobEnded::Failed,
                };
                (outcome, Some(format!("{error:#}")))
            }
        };
        for warning in SidecarsSeen::warnings(&sidecars, &args.table.keep) {
            tracing::warn!("{warning}");
        }
        let reported = self.report(outcome, reason, &counts, started, out).await;
        self.lease.release().await;
        Ok(reported.unwrap_or_else(|error| {
            tracing::error!("{error:#}");
            JobEnded::Failed
        }))
    }

    fn job(
        &self,
        args: &EmbedArgs,
        work: Vec<ShardWork>,
        terminal: &Terminal,
    ) -> anyhow::Result<EmbedJob> {
        let limits = self.model.limits.unwrap_or_default();
        // Less than the worker's limit for a message, since a larger message
        // would end the whole stream.
        let message = limits.request_bytes_max.saturating_sub(MESSAGE_OVERHEAD);
        Ok(EmbedJob {
            work,
            reading: reading(args, limits.image_bytes_max.min(message), &self.stores)?,
            part_items: args.table.part_items as usize,
            give_up_after: args.workers.give_up_after,
            errors_before: self.errors_before(),
            errors_max: args.table.max_errors,
            sink: self.sink.clone(),
            shape: self.shape.clone(),
            terminal: terminal.clone(),
        })
    }

    async fn report(
        &self,
        outcome: JobEnded,
        reason: Option<String>,
        counts: &JobCounts,
        started: Instant,
        out: &mut impl Write,
    ) -> anyhow::Result<JobEnded> {
        let (index, of) = (self.share.index, self.share.of);
        let records = Record::read_all(&self.sink, |shard| self.share.has(shard)).await?;
        remove_superseded(&self.sink, &records).await?;
        let done = histories(&records, 0..self.plan.shards.len());
        // A share that is one of several does not know when the others are
        // done.
        let finished = outcome == JobEnded::Done && of == 1;
        if let Some(round) = self.retry.as_ref().filter(|_| outcome == JobEnded::Done) {
            round.end(&self.sink, self.share).await?;
        }
        let summary = if finished {
            Some(finish(&self.sink).await?)
        } else {
            None
        };
        match (&reason, outcome) {
            (Some(reason), _) => tracing::error!("{reason}"),
            (None, JobEnded::Interrupted) => tracing::warn!("the job was told to end"),
            (None, _) => {}
        }
        if !self.plan.left_out.is_empty() {
            tracing::warn!("not read: {}", self.plan.left_out);
        }
        match outcome {
            JobEnded::Done if !finished => tracing::info!(
                "share {index}/{of} is done; when all shares are done, run `imagegpt embed \
                 --finish --output {}`",
                self.sink
            ),
            JobEnded::Done => tracing::info!("the job is done; its output is {}", self.sink),
            JobEnded::TooManyErrors => tracing::error!(
                "the errors are in {}/errors, those of unfinished parts in unfinished-*.jsonl; the \
                 same command with a higher --max-errors resumes the job",
                self.sink
            ),
            JobEnded::Interrupted | JobEnded::Failed => tracing::warn!(
                "{} parts are done and will not be repeated; the same command resumes the job",
                done.len()
            ),
        }
        let seconds = started.elapsed().as_secs_f64();
        let images_this_run = counts.images.load(Ordering::Relaxed);
        let errors_this_run = counts.errors.load(Ordering::Relaxed);
        let errors = if outcome == JobEnded::TooManyErrors && self.retry.is_none() {
            self.errors_before() + counts.all_errors()
        } else {
            done.iter().map(PartHistory::errors).sum()
        };
        let images = done.iter().map(PartHistory::images).sum();
        let rows = done.iter().map(PartHistory::rows).sum();
        if outcome == JobEnded::Done {
            warn_of_no_rows(rows, errors, &self.sink);
        }
        let report = Report {
            outcome,
            reason,
            output: self.sink.to_string(),
            share: format!("{index}/{of}"),
            model: &self.manifest.model,
            images,
            rows,
            errors,
            parts: done.len(),
            images_this_run,
            errors_this_run,
            seconds,
            #[expect(clippy::cast_precision_loss, reason = "a rate for the eye")]
            images_per_second: images_this_run as f64 / seconds.max(1e-3),
            left_out: Some(&self.plan.left_out).filter(|left_out| !left_out.is_empty()),
            finished,
            sha256: summary.map(|summary| summary.sha256),
        };
        say(&report, out)?;
        Ok(outcome)
    }
}
