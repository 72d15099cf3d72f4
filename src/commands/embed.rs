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
mod hub;
mod input;
mod journal;
mod kept;
mod lists;
mod location;
mod memory;
mod names;
mod pipeline;
mod plan;
mod progress;
mod ranged;
mod request;
mod sink;
mod table;
mod web;
mod wire;

use std::collections::BTreeMap;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use anyhow::Context as _;
use serde::Serialize;
use tokio::sync::mpsc;

use self::finding::LeftOut;
use self::finish::{finish, finish_alone, only_with_files};
use self::flags::{EmbedArgs, EmbedTask, JobShare, LayerChoice, Pooling, TableFormat};
use self::hub::HubError;
use self::input::{Broken, Reading, SidecarsSeen};
use self::journal::{JobManifest, ModelFact, PartId, Record};
use self::location::{ReadError, Stores};
use self::memory::ImageMemory;
use self::pipeline::{EmbedJob, IMAGES_QUEUE, ShardWork, Stopped};
use self::plan::{InputPlan, Shard, plan};
use self::progress::JobCounts;
use self::request::{asked, check_model, check_part_items, options, vector_shape};
use self::sink::Sink;
use self::table::{OWN_COLUMNS, StoredValues, TableShape, is_layer_column};
use self::web::WebTrust;
use crate::client::pool;
use crate::client::pool::{PoolConfig, WorkerPool};
use crate::model::graph::{Context, Norm};
use crate::model::{CallTask, ModelNeed};
use crate::proto::pb;

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
/// Shards whose columns are checked before any work: files of other origin come
/// at most a few in a row.
const SHARDS_TRIED: usize = 8;

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

/// JSON report at the end of the command, also with `--finish`.
#[derive(Debug, Serialize)]
struct Report<'a> {
    outcome: JobEnded,
    #[serde(skip_serializing_if = "Option::is_none")]
    reason: Option<String>,
    output: String,
    share: String,
    model: &'a ModelFact,
    /// Images in the finished parts of this share, of this run and the runs
    /// before.
    images: u64,
    /// Rows in the tables of these parts: images without an error.
    rows: u64,
    /// Errors in the finished parts of this share; after too many errors all
    /// that stand in error files, including those of unfinished parts.
    errors: u64,
    parts: usize,
    /// Images that have an outcome in this run. Those of parts that were not
    /// written will be done again.
    images_this_run: u64,
    errors_this_run: u64,
    seconds: f64,
    images_per_second: f64,
    /// Files of directories that were not read, if there are any.
    #[serde(flatten)]
    left_out: Option<&'a LeftOut>,
    /// True if all shares are done and the dataset's summary is written.
    finished: bool,
    /// SHA-256 of the dataset's summary.
    #[serde(skip_serializing_if = "Option::is_none")]
    sha256: Option<String>,
}

/// Checks the flags, and that the output can be written: all that can be
/// checked before a model is loaded or a worker is asked.
///
/// # Errors
///
/// When the flags or the output cannot be used.
pub async fn check(args: &EmbedArgs) -> anyhow::Result<()> {
    let sink = Sink::open(&args.output, &Stores::default())?;
    if args.share.finish {
        return Ok(());
    }
    args.validate()?;
    sink.check().await
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
            OWN_COLUMNS.contains(&name) || task.layers.is_some() && is_layer_column(name)
        };
        if let Some(name) = table.keep.iter().find(|name| is_own(name)) {
            anyhow::bail!("--keep {name}: the table already has its own column of this name");
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
        let unfit =
            |flag: &str, of: &str| anyhow::anyhow!("{flag} can only be used with --task {of}");
        match task.task {
            EmbedTask::Embed | EmbedTask::Score if task.head.is_some() => {
                Err(unfit("--head", "classify"))
            }
            EmbedTask::Classify | EmbedTask::Score if task.layer.is_some() => {
                Err(unfit("--layer", "embed"))
            }
            EmbedTask::Classify | EmbedTask::Score if task.layers.is_some() => {
                Err(unfit("--layers", "embed"))
            }
            EmbedTask::Embed if task.layers.is_some() && task.pooling == Pooling::Last => {
                anyhow::bail!("--layers can only be used with --pooling mean")
            }
            EmbedTask::Classify | EmbedTask::Score if task.context != Context::Raw => {
                Err(unfit("--context", "embed"))
            }
            EmbedTask::Classify | EmbedTask::Score if task.norm != Norm::PreAttnRms => {
                Err(unfit("--norm", "embed"))
            }
            EmbedTask::Classify | EmbedTask::Score if task.normalize => {
                Err(unfit("--normalize", "embed"))
            }
            EmbedTask::Classify | EmbedTask::Score if table.format == TableFormat::Npy => {
                Err(unfit("--format npy", "embed"))
            }
            _ => Ok(()),
        }
    }
}

enum Unprepared {
    Refused(anyhow::Error),
    Failed(anyhow::Error),
}

impl Unprepared {
    /// Classifies an input's error. An input that is wrong stays wrong; an
    /// input that could not be read may be readable the next time.
    fn of_input(error: anyhow::Error) -> Self {
        let away = |cause: &(dyn std::error::Error + 'static)| {
            let unread = cause.downcast_ref();
            cause.is::<object_store::Error>()
                || cause.is::<std::io::Error>()
                || matches!(unread, Some(ReadError::Io(_) | ReadError::Store(_)))
        };
        let is_hub = |cause: &(dyn std::error::Error + 'static)| cause.is::<HubError>();
        if plan::stays(&error) {
            Self::Refused(anyhow::anyhow!(told_once(&error)))
        } else if error.chain().any(|cause| away(cause) || is_hub(cause)) {
            Self::Failed(error)
        } else {
            Self::Refused(error)
        }
    }
}

/// Joins an error's causes; errors of stores have the text of their own cause in
/// them, which is left out.
fn told_once(error: &anyhow::Error) -> String {
    error.chain().fold(String::new(), |text, cause| {
        let cause = cause.to_string();
        match text.as_str() {
            "" => cause,
            known if known.contains(&cause) => text,
            known => format!("{known}: {cause}"),
        }
    })
}

/// Facts that are settled before the first image is read.
struct Prepared {
    share: JobShare,
    plan: InputPlan,
    manifest: JobManifest,
    model: pb::GetModelResponse,
    pool: PoolConfig,
    sink: Sink,
    stores: Arc<Stores>,
    records: BTreeMap<PartId, Record>,
}

impl Prepared {
    async fn new(
        args: &EmbedArgs,
        endpoints: impl Future<Output = anyhow::Result<Vec<String>>>,
        stores: &Arc<Stores>,
        sink: Sink,
    ) -> Result<Self, Unprepared> {
        let share = args.share.share().map_err(Unprepared::Refused)?;
        let began = hub::began(&args.inputs, &sink)
            .await
            .map_err(Unprepared::Failed)?;
        let plan = plan(
            &args.inputs,
            stores,
            &plan::PlanOptions {
                part_items: args.table.part_items as usize,
                keep: &args.table.keep,
                image_column: args.table.image_column.as_deref(),
                url_column: args.table.url_column.as_deref(),
                id_column: args.table.id_column.as_deref(),
                kind: args.table.kind,
                output: &sink.to_string(),
                began: &began,
            },
        )
        .await
        .map_err(Unprepared::of_input)?;
        tracing::info!("the inputs are {}", plan.kinds());
        let reading = reading(args, 0, stores).map_err(Unprepared::Refused)?;
        let shards = plan.shards.clone();
        let same_columns = tokio::task::spawn_blocking(move || columns_fit(&shards, &reading))
            .await
            .map_err(|error| Unprepared::Failed(error.into()))?
            .map_err(Unprepared::Refused)?;
        let pool = PoolConfig {
            endpoints: endpoints.await.map_err(Unprepared::Refused)?,
            connect: args.connect.clone(),
            window: args.workers.window,
            item_timeout: args.workers.item_timeout,
            resolve_interval: args.workers.resolve_interval,
        };
        // Mistakes in the flags show at once, before the wait for a worker's
        // answer.
        pool.check().map_err(Unprepared::Refused)?;
        let model = pool::first_model(&pool, args.workers.give_up_after)
            .await
            .map_err(Unprepared::Failed)?;
        check_model(&model, &args.task).map_err(Unprepared::Refused)?;
        check_part_items(args, &model).map_err(Unprepared::Refused)?;
        let manifest = JobManifest::new(
            ModelFact {
                name: model.name.clone(),
                digest: model.digest.clone(),
            },
            options(args, &model),
            plan.shards.len(),
            plan.facts.clone(),
            same_columns && plan.has_ids_of_version_1(),
        );
        manifest.settle(&sink).await.map_err(|error| {
            if error.is::<journal::Differs>() || plan::stays(&error) {
                Unprepared::Refused(error)
            } else {
                Unprepared::Failed(error)
            }
        })?;
        let is_ours = |shard: usize| shard % share.of as usize == share.index as usize;
        pipeline::forget_unfinished(&sink, is_ours)
            .await
            .map_err(Unprepared::Failed)?;
        let records = Record::read_all(&sink, is_ours)
            .await
            .map_err(Unprepared::Failed)?;
        let records = only_with_files(&sink, records)
            .await
            .map_err(Unprepared::Failed)?;
        Ok(Self {
            share,
            plan,
            manifest,
            model,
            pool,
            sink,
            stores: Arc::clone(stores),
            records,
        })
    }

    /// Parts that were done when this run began.
    fn before(&self) -> Vec<&Record> {
        let shards = 0..self.plan.shards.len();
        shards
            .flat_map(|shard| journal::done(&self.records, shard))
            .collect()
    }

    fn errors_before(&self) -> u64 {
        self.before().iter().map(|record| record.errors).sum()
    }

    /// Unfinished shards of this share, with the place at which to resume each.
    fn work(&self) -> Vec<ShardWork> {
        let (index, of) = (self.share.index as usize, self.share.of as usize);
        let ours = self.plan.shards.iter().enumerate().skip(index).step_by(of);
        ours.filter_map(|(idx, shard)| {
            let done = journal::done(&self.records, idx);
            let cursor = match done.last() {
                None => 0,
                Some(last) => last.next?,
            };
            Some(ShardWork {
                idx,
                shard: shard.clone(),
                part: done.len(),
                cursor,
            })
        })
        .collect()
    }

    async fn run(
        self,
        args: &EmbedArgs,
        terminal: &Terminal,
        stop: impl Future<Output = ()>,
        out: &mut impl Write,
    ) -> anyhow::Result<JobEnded> {
        let started = Instant::now();
        let work = self.work();
        let n_shards = work.len();
        let before = self.before();
        let images_before: u64 = before.iter().map(|record| record.images).sum();
        tracing::info!(
            model = self.model.name,
            digest = self.model.digest,
            shards_left = n_shards,
            parts_done = before.len(),
            images_done = images_before,
            "{}",
            if before.is_empty() {
                "starting the job"
            } else {
                "resuming the job"
            }
        );
        let counts = Arc::new(JobCounts::default());
        let mut sidecars = Arc::default();
        let result = if work.is_empty() {
            Ok(None)
        } else {
            let job = self.job(args, work, terminal)?;
            sidecars = Arc::clone(&job.reading.sidecars);
            let (tasks_in, tasks) = mpsc::channel(IMAGES_QUEUE);
            let asked = asked(&args.task, &self.model);
            let digest = self.model.digest.clone();
            let (pool, answers) = WorkerPool::start(self.pool.clone(), asked, digest, tasks)?;
            tokio::select! {
                result = pipeline::run(job, pool, tasks_in, answers, &counts) => result.map(|()| None),
                () = stop => Ok(Some(JobEnded::Interrupted)),
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
        for kind in SidecarsSeen::missing(&sidecars, &args.table.keep) {
            tracing::warn!(
                "--keep {kind}: none of the tars' samples that were read has a file of this kind, \
                 so the column is empty"
            );
        }
        let reported = self.report(outcome, reason, &counts, started, out).await;
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
        let values = match args.task.task {
            EmbedTask::Embed => StoredValues::Embedding(vector_shape(&args.task, &self.model)),
            EmbedTask::Classify => StoredValues::Classes,
            EmbedTask::Score => StoredValues::Scores,
        };
        let about = serde_json::json!({
            "model": self.manifest.model,
            "options": self.manifest.options,
        });
        Ok(EmbedJob {
            work,
            reading: reading(args, limits.image_bytes_max.min(message), &self.stores)?,
            part_items: args.table.part_items as usize,
            give_up_after: args.workers.give_up_after,
            errors_before: self.errors_before(),
            errors_max: args.table.max_errors,
            sink: self.sink.clone(),
            shape: TableShape {
                format: args.table.format,
                values,
                metadata: about.to_string(),
            },
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
        let is_ours = |shard: usize| shard % of as usize == index as usize;
        let records = Record::read_all(&self.sink, is_ours).await?;
        let done: Vec<&Record> = (0..self.plan.shards.len())
            .flat_map(|shard| journal::done(&records, shard))
            .collect();
        // A share that is one of several does not know when the others are
        // done.
        let finished = outcome == JobEnded::Done && of == 1;
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
        let errors = if outcome == JobEnded::TooManyErrors {
            self.errors_before() + errors_this_run
        } else {
            done.iter().map(|record| record.errors).sum()
        };
        let images = done.iter().map(|record| record.images).sum();
        let rows = done.iter().map(|record| record.rows()).sum();
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

/// Says plainly that a job whose images all failed has an empty output: its exit
/// code is that of a finished job.
fn warn_of_no_rows(rows: u64, errors: u64, sink: &Sink) {
    if rows == 0 && errors > 0 {
        tracing::warn!(
            "no image has a row: all {errors} are errors, which are in {sink}/errors; \
             --max-errors makes such a job fail"
        );
    }
}

/// Gathers the flags that say how images are read.
fn reading(
    args: &EmbedArgs,
    image_bytes_max: u64,
    stores: &Arc<Stores>,
) -> anyhow::Result<Reading> {
    Ok(Reading {
        runtime: tokio::runtime::Handle::current(),
        memory: ImageMemory::new(
            u32::try_from(args.workers.image_memory.as_u64()).context("--image-memory")?,
        ),
        image_bytes_max,
        keep: args.table.keep.clone(),
        image_column: args.table.image_column.clone(),
        url_column: args.table.url_column.clone(),
        id_column: args.table.id_column.clone(),
        format: args.table.format,
        sidecars: Arc::default(),
        url_patience: args.table.url_patience,
        stores: Arc::clone(stores),
    })
}

/// Looks for a shard that has the columns that the flags ask for. A shard
/// without them, among others that have them, is an error of its own; if none
/// of the first [`SHARDS_TRIED`] has them, the flags are wrong.
///
/// Returns false if version 1 of the manifest gave the rows other ids.
fn columns_fit(shards: &[Shard], reading: &Reading) -> anyhow::Result<bool> {
    let mut first = None;
    for shard in shards.iter().take(SHARDS_TRIED) {
        match input::has_columns(shard, reading) {
            Err(Broken::Unsuited(reason)) => {
                first.get_or_insert_with(|| format!("{}: {reason}", shard.name));
            }
            Ok(is_same) => return Ok(is_same),
            // A shard that cannot be read shows nothing about columns, and is
            // an error of its own.
            Err(_) => return Ok(true),
        }
    }
    first.map_or(Ok(true), |reason| Err(anyhow::anyhow!(reason)))
}

/// Prints the line of JSON. A failure to print does not change the outcome of
/// the job; the owner of `out` finds it out.
fn say(report: &impl Serialize, out: &mut impl Write) -> anyhow::Result<()> {
    let line = serde_json::to_string(report)?;
    if let Err(error) = writeln!(out, "{line}") {
        tracing::error!("{error}");
    }
    Ok(())
}
