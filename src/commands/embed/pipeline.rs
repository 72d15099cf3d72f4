//! Pipeline from shards to files: a thread reads images, workers answer them, a
//! task puts the rows in order, and another writes the parts.
//!
//! ```text
//!   reader ──images──▶ pool ──answers──▶ collector ──parts──▶ writer
//!      └──────rows, ends of parts───────────▲
//! ```
//!
//! Parts are made, written and recorded in the order of the input, whatever the
//! order of the answers. Two bounds limit the whole pipeline, and the reader
//! waits for both: images that are not answered, with the pages and batches
//! from which they are read, take at most `--image-memory`; and at most
//! [`PARTS_OPEN`] parts are begun and not yet written.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use arrow_array::RecordBatch;
use sha2::{Digest as _, Sha256};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::task::JoinSet;

use super::input::Reading;
use super::journal::{OutputFile, PartId, Record};
use super::progress::{JobCounts, JobProgress, Terminal};
use super::reader::{End, Event, ROW_BITS, Reader, ShardWork, read_to_the_end};
use super::sink::Sink;
use super::table::{self, TableRow, TableShape};
use crate::client::pool::{ImageFault, PoolAnswer, PoolOutcome, PoolTask, WorkerPool};
use crate::files::hex;
use crate::telemetry::panic_text;

/// Parts that are begun and not yet written: a part that is read, a part that
/// waits for its last answers, a part that is written, and a part that waits
/// for the slowest answer.
pub(super) const PARTS_OPEN: usize = 4;
/// Images in the queue between the reader and the workers, besides those that
/// the workers have.
pub(super) const IMAGES_QUEUE: usize = 256;
/// Rows in the queue between the reader and the collector.
const ROWS_QUEUE: usize = 256;
/// Interval at which progress is shown, and at which a standstill is looked
/// for.
const TICK: Duration = Duration::from_millis(500);

/// Work of the job, and its bounds.
#[derive(Debug)]
pub(super) struct EmbedJob {
    pub(super) work: Vec<ShardWork>,
    pub(super) reading: Reading,
    pub(super) part_items: usize,
    pub(super) give_up_after: Duration,
    /// Errors of the parts that were done before, and the limit of
    /// `--max-errors`.
    pub(super) errors_before: u64,
    pub(super) errors_max: Option<u64>,
    pub(super) sink: Sink,
    pub(super) shape: TableShape,
    pub(super) terminal: Terminal,
}

/// Reason for which the job stopped before its end.
#[derive(Debug, thiserror::Error)]
pub(super) enum Stopped {
    #[error("more than {max} images failed (--max-errors){}", such_as(last.as_ref()))]
    TooManyErrors {
        max: u64,
        /// Id of the last image that failed, with the reason, unless all
        /// failures were in runs before.
        last: Option<(String, String)>,
        /// Error files of the unfinished parts, with the errors known so far.
        unfinished: Vec<(PartId, Vec<u8>)>,
    },
    #[error(
        "no worker has answered any image for {} (--give-up-after); {troubles}",
        humantime::format_duration(*after)
    )]
    Standstill { after: Duration, troubles: String },
}

fn such_as(last: Option<&(String, String)>) -> String {
    last.map_or_else(String::new, |(id, message)| {
        format!("; the last one is {id}: {message}")
    })
}

/// Prefix of the error files of unfinished parts. The next run removes these
/// files, since it finds the same errors itself.
const UNFINISHED: &str = "unfinished-";

/// Removes the error files of unfinished parts that an earlier run, which had
/// too many errors, left of these shards.
pub(super) async fn forget_unfinished(
    sink: &Sink,
    is_ours: impl Fn(usize) -> bool,
) -> anyhow::Result<()> {
    for (name, _) in sink.list("errors").await? {
        let shard = name
            .strip_prefix(UNFINISHED)
            .and_then(|id| id.split_once('-'));
        if shard.is_some_and(|(shard, _)| shard.parse().is_ok_and(&is_ours)) {
            sink.remove(&format!("errors/{name}")).await?;
        }
    }
    Ok(())
}

/// Runs the job in a task of its own, so that a panic in any of its pieces
/// becomes the job's error.
///
/// # Errors
///
/// The failure that ended the job early. Parts that were recorded before it
/// stay done.
pub(super) async fn run(
    job: EmbedJob,
    pool: WorkerPool,
    tasks: mpsc::Sender<PoolTask>,
    answers: mpsc::Receiver<PoolOutcome>,
    counts: &Arc<JobCounts>,
) -> anyhow::Result<()> {
    // Dropped when the job is told to end, which also ends the task.
    let mut whole = JoinSet::new();
    let counts = Arc::clone(counts);
    whole.spawn(async move { pieces(job, pool, tasks, answers, &counts).await });
    match whole.join_next().await {
        Some(Ok(result)) => result,
        Some(Err(error)) => Err(panicked("a task of the job", error)),
        None => anyhow::bail!("the job has no task"),
    }
}

/// Makes the error of a task that panicked.
fn panicked(what: &str, error: tokio::task::JoinError) -> anyhow::Error {
    match error.try_into_panic() {
        Ok(panic) => anyhow::anyhow!("{what} panicked: {}", panic_text(&*panic)),
        Err(error) => anyhow::anyhow!("{what} ended before its end: {error}"),
    }
}

async fn pieces(
    job: EmbedJob,
    mut pool: WorkerPool,
    tasks: mpsc::Sender<PoolTask>,
    answers: mpsc::Receiver<PoolOutcome>,
    counts: &Arc<JobCounts>,
) -> anyhow::Result<()> {
    let parts = Arc::new(Semaphore::new(PARTS_OPEN));
    let memory = job.reading.memory.clone();
    let (events_in, events) = mpsc::channel(ROWS_QUEUE);
    let reader = Reader {
        sink: job.sink.clone(),
        reading: job.reading,
        part_items: job.part_items,
        events: events_in,
        tasks,
        parts: Arc::clone(&parts),
        counts: Arc::clone(counts),
        n_parts: 0,
    };
    let work = job.work;
    let thread = std::thread::Builder::new()
        .name("reader".to_owned())
        .spawn(move || read_to_the_end(reader, &work))
        .context("the reader's thread cannot be started")?;
    // The channel holds as many parts as may be open, so it is never full.
    let (parts_in, parts_out) = mpsc::channel(PARTS_OPEN);
    let sink = job.sink;
    let writer = Writer {
        sink: sink.clone(),
        shape: job.shape,
    };
    let collector = Collector {
        open: VecDeque::new(),
        first: 0,
        last_answer: Instant::now(),
        writer: parts_in,
        terminal: job.terminal,
        counts: Arc::clone(counts),
        errors_before: job.errors_before,
        errors_max: job.errors_max,
        last_error: None,
        all_read: false,
    };
    let collected = collector.run(events, answers, &pool, job.give_up_after);
    let result = both(collected, writer.run(parts_out), &sink).await;
    // A reader that waits for room learns here that there will be none.
    parts.close();
    memory.close();
    match result {
        Ok(()) => pool.finish().await,
        Err(error) if error.is::<PoolEnded>() => {
            let why = pool.why_ended().await;
            return Err(why.unwrap_or(error));
        }
        Err(error) => {
            drop(pool);
            return Err(error);
        }
    }
    drop(thread);
    Ok(())
}

/// Waits until everything is collected and written. After too many errors, the
/// errors of unfinished parts are written too.
async fn both(
    collected: impl Future<Output = anyhow::Result<()>>,
    written: impl Future<Output = anyhow::Result<()>>,
    sink: &Sink,
) -> anyhow::Result<()> {
    tokio::pin!(written);
    tokio::pin!(collected);
    tokio::select! {
        result = &mut collected => match result {
            Ok(()) => written.await,
            Err(error) => match error.downcast_ref() {
                // The errors of finished parts are in those parts' own files.
                Some(Stopped::TooManyErrors { unfinished, .. }) => {
                    written.await?;
                    for (id, lines) in unfinished {
                        let name = format!("errors/{UNFINISHED}{id}.jsonl");
                        sink.write(&name, lines.clone().into()).await?;
                    }
                    Err(error)
                }
                _ => Err(error),
            }
        },
        // The writer ends before the collector only when it cannot go on.
        result = &mut written => result,
    }
}

/// Error of a pool whose sessions ended while images were still unanswered.
#[derive(Debug, thiserror::Error)]
#[error("the pool of workers has ended before the job")]
struct PoolEnded;

/// Part whose rows are waiting for answers.
struct OpenPart {
    id: PartId,
    permit: OwnedSemaphorePermit,
    rows: Vec<OpenRow>,
    unanswered: usize,
    /// Set once the part has all its rows.
    end: Option<End>,
}

struct OpenRow {
    row: u64,
    id: String,
    kept: Option<RecordBatch>,
    outcome: Option<Result<PoolAnswer, ImageFault>>,
}

/// Part that has all its answers.
struct WholePart {
    id: PartId,
    rows: Vec<TableRow>,
    next: Option<u64>,
    _permit: OwnedSemaphorePermit,
}

/// Collector: assigns answers to rows, and finished parts to the writer.
struct Collector {
    open: VecDeque<OpenPart>,
    /// Number of the first open part; the ids of tasks count parts by this
    /// number.
    first: u64,
    last_answer: Instant,
    writer: mpsc::Sender<WholePart>,
    terminal: Terminal,
    counts: Arc<JobCounts>,
    errors_before: u64,
    errors_max: Option<u64>,
    /// Id of the last image that failed, with the reason.
    last_error: Option<(String, String)>,
    /// True if the reader has sent its last row.
    all_read: bool,
}

impl Collector {
    async fn run(
        mut self,
        mut events: mpsc::Receiver<Event>,
        mut answers: mpsc::Receiver<PoolOutcome>,
        pool: &WorkerPool,
        give_up_after: Duration,
    ) -> anyhow::Result<()> {
        let mut progress = JobProgress::begin(&self.terminal);
        let mut tick = tokio::time::interval(TICK);
        while !(self.all_read && self.open.is_empty()) {
            tokio::select! {
                event = events.recv(), if !self.all_read => match event {
                    Some(event) => self.hear(event)?,
                    // The reader sends `AllRead` when it has read everything.
                    None => anyhow::bail!(
                        "the reader's thread ended before it had read all shards"
                    ),
                },
                Some(done) = answers.recv() => {
                    // The row of this answer was sent before the image, but in
                    // another queue.
                    while let Ok(event) = events.try_recv() {
                        self.hear(event)?;
                    }
                    self.answered(done)?;
                }
                _ = tick.tick() => {
                    anyhow::ensure!(!pool.has_ended(), PoolEnded);
                    let troubles = pool.troubles();
                    progress.update(&self.counts, &troubles);
                    self.stands_still(give_up_after, &troubles)?;
                }
            }
            self.close_parts()?;
            self.has_too_many_errors()?;
        }
        Ok(())
    }

    /// Ends the job as soon as there are more errors than `--max-errors`
    /// allows. All errors up to then are in the files of this run, or of the
    /// runs before.
    fn has_too_many_errors(&self) -> anyhow::Result<()> {
        let errors = self.errors_before + self.counts.all_errors();
        let Some(max) = self.errors_max.filter(|&max| errors > max) else {
            return Ok(());
        };
        let mut unfinished = Vec::new();
        // Errors that are tried again stand in the files of their parts.
        for part in self.open.iter().filter(|part| part.id.retry.is_none()) {
            let mut lines = Vec::new();
            for row in &part.rows {
                if let Some(Err(fault)) = &row.outcome {
                    table::error_line(&mut lines, &row.id, fault)?;
                }
            }
            if !lines.is_empty() {
                unfinished.push((part.id, lines));
            }
        }
        Err(Stopped::TooManyErrors {
            max,
            last: self.last_error.clone(),
            unfinished,
        }
        .into())
    }

    fn hear(&mut self, event: Event) -> anyhow::Result<()> {
        match event {
            Event::Begin { id, permit } => self.open.push_back(OpenPart {
                id,
                permit,
                rows: Vec::new(),
                unanswered: 0,
                end: None,
            }),
            Event::Row {
                row,
                id,
                kept,
                fault,
                is_old,
            } => {
                if is_old {
                    self.counts.old_errors.fetch_add(1, Ordering::Relaxed);
                } else if let Some(fault) = &fault {
                    self.count(Some((id.clone(), fault.message.clone())));
                } else if self.open.iter().all(|part| part.unanswered == 0) {
                    // Workers are silent only from the time at which they have
                    // an image.
                    self.last_answer = Instant::now();
                }
                let part = self.open.back_mut();
                let part = part.context("a row comes after a beginning")?;
                part.unanswered += usize::from(fault.is_none());
                part.rows.push(OpenRow {
                    row,
                    id,
                    kept,
                    outcome: fault.map(Err),
                });
            }
            Event::End(end) => {
                let part = self
                    .open
                    .back_mut()
                    .context("ends come after a beginning")?;
                part.end = Some(end);
            }
            Event::AllRead => self.all_read = true,
            Event::Failed(error) => return Err(error),
        }
        Ok(())
    }

    fn answered(&mut self, done: PoolOutcome) -> anyhow::Result<()> {
        self.last_answer = Instant::now();
        let part = (done.id >> ROW_BITS).checked_sub(self.first);
        let part = part.and_then(|place| self.open.get_mut(usize::try_from(place).ok()?));
        let part = part.context("an answer for a part that is closed")?;
        let row = usize::try_from(done.id & u64::from(u32::MAX))?;
        let row = part.rows.get_mut(row).context("an answer for no row")?;
        anyhow::ensure!(row.outcome.is_none(), "{} was answered twice", row.id);
        let failed = done.outcome.as_ref().err();
        let failed = failed.map(|fault| (row.id.clone(), fault.message.clone()));
        row.outcome = Some(done.outcome);
        part.unanswered -= 1;
        self.count(failed);
        Ok(())
    }

    /// Counts an outcome. A failure comes with the image's id and the reason.
    fn count(&mut self, failed: Option<(String, String)>) {
        self.counts.images.fetch_add(1, Ordering::Relaxed);
        if failed.is_some() {
            self.counts.errors.fetch_add(1, Ordering::Relaxed);
            self.last_error = failed;
        }
    }

    /// Hands finished parts on to the writer, in order, up to the first
    /// unfinished part.
    fn close_parts(&mut self) -> anyhow::Result<()> {
        while let Some(part) = self.open.front()
            && part.unanswered == 0
            && let Some(end) = part.end
        {
            let Some(part) = self.open.pop_front() else {
                break;
            };
            self.first += 1;
            let rows = part.rows.into_iter().map(|row| {
                Some(TableRow {
                    row: row.row,
                    id: row.id,
                    kept: row.kept,
                    outcome: row.outcome?,
                })
            });
            let rows: Option<Vec<TableRow>> = rows.collect();
            let whole = WholePart {
                id: part.id,
                rows: rows.context("a row without an outcome")?,
                next: end.next,
                _permit: part.permit,
            };
            if self.writer.try_send(whole).is_err() {
                // The writer's own error is the one that ends the job.
                anyhow::bail!("the writer has ended");
            }
        }
        Ok(())
    }

    fn stands_still(&self, after: Duration, troubles: &[String]) -> Result<(), Stopped> {
        let waiting = self.open.iter().any(|part| part.unanswered > 0);
        if !waiting || self.last_answer.elapsed() < after {
            return Ok(());
        }
        Err(Stopped::Standstill {
            after,
            troubles: troubles.join("; "),
        })
    }
}

/// Writer: makes the files of parts, and records the parts.
struct Writer {
    sink: Sink,
    shape: TableShape,
}

impl Writer {
    async fn run(self, mut parts: mpsc::Receiver<WholePart>) -> anyhow::Result<()> {
        while let Some(part) = parts.recv().await {
            self.write(part).await?;
        }
        Ok(())
    }

    async fn write(&self, part: WholePart) -> anyhow::Result<()> {
        let images = part.rows.len() as u64;
        let errors = part.rows.iter().filter(|row| row.outcome.is_err());
        let error_rows: Vec<u64> = errors.map(|row| row.row).collect();
        let (id, shape) = (part.id, self.shape.clone());
        let encode = move || {
            let files = table::files(id, part.rows, &shape)?;
            let digested = files.into_iter().map(|(name, content)| {
                let sha256 = hex(&Sha256::digest(&content));
                (name, sha256, content)
            });
            Ok::<_, anyhow::Error>(digested.collect::<Vec<_>>())
        };
        let mut files = Vec::new();
        for (name, sha256, content) in tokio::task::spawn_blocking(encode)
            .await
            .map_err(|error| panicked("the writer of a part", error))??
        {
            let bytes = content.len() as u64;
            self.sink.write(&name, content).await?;
            files.push(OutputFile {
                name,
                bytes,
                sha256,
            });
        }
        let record = Record {
            id,
            images,
            errors: error_rows.len() as u64,
            error_rows,
            next: part.next,
            files,
        };
        record.write(&self.sink).await
    }
}
