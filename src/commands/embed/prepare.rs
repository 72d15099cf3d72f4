//! Preparation of a job: all that is settled before the first image is read.

use std::collections::BTreeMap;
use std::sync::Arc;

use anyhow::Context as _;

use super::flags::{EmbedArgs, EmbedTask, JobShare, RetryChoice};
use super::history::{PartHistory, histories};
use super::hub::{self, HubError};
use super::input::{self, Broken, Reading};
use super::journal::{self, JobManifest, ModelFact, NoRecord, PartId, Record};
use super::lease::{LeaseTimes, ShareLease, ShareTaken};
use super::location::{ReadError, Stores};
use super::memory::ImageMemory;
use super::pipeline;
use super::plan::{self, InputPlan, Shard, plan};
use super::reader::ShardWork;
use super::recorded::{RecordedParts, foreign_part};
use super::request::{check_model, check_part_items, options, vector_shape};
use super::retry::{self, PartRetry, RetryRefused, RetryRound};
use super::sink::Sink;
use super::table::{StoredValues, TableShape};
use crate::client::pool::{self, PoolConfig};
use crate::proto::pb;

/// Shards whose columns are checked before any work: files of other origin come
/// at most a few in a row.
const SHARDS_TRIED: usize = 8;

/// Reason for which a job cannot begin.
pub(super) enum Unprepared {
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
pub(super) struct Prepared {
    pub(super) share: JobShare,
    pub(super) plan: InputPlan,
    pub(super) manifest: JobManifest,
    pub(super) model: pb::GetModelResponse,
    pub(super) pool: PoolConfig,
    pub(super) sink: Sink,
    /// Right to work on the share, which other processes are refused.
    pub(super) lease: ShareLease,
    pub(super) stores: Arc<Stores>,
    pub(super) shape: TableShape,
    pub(super) records: BTreeMap<PartId, Record>,
    /// Errors to try again, if the command was told to.
    pub(super) retry: Option<RetryRound>,
}

impl Prepared {
    pub(super) async fn new(
        args: &EmbedArgs,
        endpoints: impl Future<Output = anyhow::Result<Vec<String>>>,
        stores: &Arc<Stores>,
        sink: Sink,
    ) -> Result<Self, Unprepared> {
        let share = args.share.share().map_err(Unprepared::Refused)?;
        // Told before a model is loaded, which may take long.
        refuse_taken(&sink, share).await?;
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
            &model.weights_digest,
            options(args, &model),
            plan.shards.len(),
            plan.facts.clone(),
            same_columns && plan.has_ids_of_version_1(),
        );
        let shape = shape(args, &model, &manifest);
        refuse_foreign(&sink, &shape).await?;
        manifest.settle(&sink).await.map_err(|error| {
            if error.is::<journal::Differs>() || plan::stays(&error) {
                Unprepared::Refused(error)
            } else {
                Unprepared::Failed(error)
            }
        })?;
        // Nothing of the share may be removed or written without it.
        let lease = ShareLease::take(&sink, share, LeaseTimes::default())
            .await
            .map_err(Unprepared::Failed)?;
        let n_shards = plan.shards.len();
        let is_ours = |shard: usize| shard < n_shards && share.has(shard);
        pipeline::forget_unfinished(&sink, is_ours)
            .await
            .map_err(Unprepared::Failed)?;
        let recorded = RecordedParts::read(&sink, is_ours).await.map_err(|error| {
            if error.is::<NoRecord>() {
                Unprepared::Refused(error)
            } else {
                Unprepared::Failed(error)
            }
        })?;
        recorded
            .tidy(&sink, &shape.folders(), is_ours)
            .await
            .map_err(Unprepared::Failed)?;
        let mut prepared = Self {
            share,
            plan,
            manifest,
            model,
            pool,
            sink,
            lease,
            stores: Arc::clone(stores),
            shape,
            records: recorded.whole,
            retry: None,
        };
        if let Some(choice) = &args.table.retry_errors {
            prepared.retry = Some(prepared.retry_round(choice).await?);
        }
        Ok(prepared)
    }

    /// Finds the errors to try again, once the share is done.
    async fn retry_round(&self, choice: &RetryChoice) -> Result<RetryRound, Unprepared> {
        if let Some(work) = self.unfinished_shards().first() {
            return Err(Unprepared::Refused(anyhow::anyhow!(
                "--retry-errors: the job is not finished, part {} and others are missing; run the \
                 same command without --retry-errors first",
                work.part
            )));
        }
        let round = retry::next_round(&self.sink, self.share, choice, &self.before()).await;
        round.map_err(|error| {
            if error.is::<RetryRefused>() {
                Unprepared::Refused(error)
            } else {
                Unprepared::Failed(error)
            }
        })
    }

    /// Parts that were done when this run began.
    pub(super) fn before(&self) -> Vec<PartHistory<'_>> {
        histories(&self.records, 0..self.plan.shards.len())
    }

    /// Number of errors that were there when this run began, and are not tried
    /// again in it.
    pub(super) fn errors_before(&self) -> u64 {
        let errors: u64 = self.before().iter().map(PartHistory::errors).sum();
        let again = self.retry.iter().flat_map(|round| &round.parts);
        errors - again.map(PartRetry::n_lines).sum::<u64>()
    }

    /// Work of this run: the errors to try again, or the unfinished shards.
    pub(super) fn work(&self) -> Vec<ShardWork> {
        let Some(round) = &self.retry else {
            return self.unfinished_shards();
        };
        let parts = round.parts.iter();
        parts
            .filter_map(|retry| {
                Some(ShardWork {
                    shard: self.plan.shards.get(retry.id.shard)?.clone(),
                    part: retry.id,
                    cursor: retry.cursor,
                    weight: retry.n_lines(),
                    retry: Some(retry.clone()),
                })
            })
            .collect()
    }

    /// Unfinished shards of this share, with the place at which to resume each.
    fn unfinished_shards(&self) -> Vec<ShardWork> {
        let shards = self.plan.shards.iter().enumerate();
        shards
            .filter(|(idx, _)| self.share.has(*idx))
            .filter_map(|(idx, shard)| {
                let done = journal::done(&self.records, idx);
                let cursor = match done.last() {
                    None => 0,
                    Some(last) => last.next?,
                };
                Some(ShardWork {
                    shard: shard.clone(),
                    part: PartId::of(idx, done.len()),
                    cursor,
                    weight: shard.bytes,
                    retry: None,
                })
            })
            .collect()
    }
}

/// Refuses a share on which another process is known to work. Whatever else is
/// wrong with the output shows when its manifest is written.
async fn refuse_taken(sink: &Sink, share: JobShare) -> Result<(), Unprepared> {
    match ShareLease::check(sink, share).await {
        Err(error) if error.is::<ShareTaken>() => Err(Unprepared::Failed(error)),
        _ => Ok(()),
    }
}

/// Refuses an output in which no job has begun, and which has files that are
/// called like those of parts: somebody else's, which a job would replace.
async fn refuse_foreign(sink: &Sink, shape: &TableShape) -> Result<(), Unprepared> {
    let begun = JobManifest::read(sink).await.map_err(Unprepared::Failed)?;
    if begun.is_some() {
        return Ok(());
    }
    let foreign = foreign_part(sink, &shape.folders()).await;
    match foreign.map_err(Unprepared::Failed)? {
        None => Ok(()),
        Some(name) => Err(Unprepared::Refused(anyhow::anyhow!(
            "--output {sink} has the file {name}, which no job there has made; give another \
             --output, or remove the file"
        ))),
    }
}

/// Describes the tables of the job.
fn shape(args: &EmbedArgs, model: &pb::GetModelResponse, manifest: &JobManifest) -> TableShape {
    let about = serde_json::json!({
        "model": manifest.model,
        "options": manifest.options,
    });
    TableShape {
        format: args.table.format,
        values: match args.task.task {
            EmbedTask::Embed => StoredValues::Embedding(vector_shape(&args.task, model)),
            EmbedTask::Classify => StoredValues::Classes,
            EmbedTask::Score => StoredValues::Scores,
            EmbedTask::Tokenize => StoredValues::Tokens(model.positions as usize),
        },
        metadata: about.to_string(),
    }
}

/// Gathers the flags that say how images are read.
pub(super) fn reading(
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
        wanted: None,
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
