//! Reader of a job: the thread that reads shards, cuts them into parts, and
//! sends the images to the workers and the rows to the collector.

use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use arrow_array::RecordBatch;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::input::{self, Broken, Reading, Sample, WantedRows};
use super::journal::PartId;
use super::plan::Shard;
use super::progress::JobCounts;
use super::retry::{ErrorRow, ErrorRows, PartRetry};
use super::sink::Sink;
use crate::client::pool::{ImageFault, PoolTask};
use crate::proto::GrpcCode;
use crate::telemetry::panic_text;

/// Bits of a task's id that number the row within its part; the upper bits
/// number the part.
pub(super) const ROW_BITS: u32 = 32;

/// Shard to work on, with the place at which to resume.
#[derive(Debug)]
pub(super) struct ShardWork {
    pub(super) shard: Shard,
    /// Number of the first part that is not done.
    pub(super) part: PartId,
    pub(super) cursor: u64,
    /// Size of the work, to compare works by when progress is shown.
    pub(super) weight: u64,
    /// Set if only errors of the part are tried again.
    pub(super) retry: Option<PartRetry>,
}

/// End of a part.
#[derive(Debug, Clone, Copy)]
pub(super) struct End {
    /// Cursor at which the shard's next part begins, if there is one.
    pub(super) next: Option<u64>,
}

/// Event that the reader sends to the collector.
pub(super) enum Event {
    Begin {
        id: PartId,
        permit: OwnedSemaphorePermit,
    },
    Row {
        /// Place in the part, or in the part that is retried.
        row: u64,
        id: String,
        kept: Option<RecordBatch>,
        /// Set when no worker needs to be asked.
        fault: Option<ImageFault>,
        /// True for an error of a run before, which was not tried again.
        is_old: bool,
    },
    /// End of the current part, which has all its rows.
    End(End),
    /// End of all rows. After it, silence of the reader is no failure.
    AllRead,
    Failed(anyhow::Error),
}

/// Body of the reader's thread. A panic of the reader is sent as an event, so
/// that nobody waits for rows that never come.
pub(super) fn read_to_the_end(reader: Reader, work: &[ShardWork]) {
    let events = reader.events.clone();
    let read = catch_unwind(AssertUnwindSafe(|| reader.run(work)));
    if let Err(panic) = read {
        let error = anyhow::anyhow!("the reader's thread panicked: {}", panic_text(&*panic));
        // Without a collector nobody is left to tell.
        let _ = events.blocking_send(Event::Failed(error));
    }
}

/// Reader: blocking code that runs on a thread of its own.
pub(super) struct Reader {
    /// Output, in which the errors to be tried again are.
    pub(super) sink: Sink,
    pub(super) reading: Reading,
    pub(super) part_items: usize,
    pub(super) events: mpsc::Sender<Event>,
    pub(super) tasks: mpsc::Sender<PoolTask>,
    pub(super) parts: Arc<Semaphore>,
    pub(super) counts: Arc<JobCounts>,
    /// Number of parts that were begun in this run.
    pub(super) n_parts: u64,
}

/// Part that is being read.
struct PartRead {
    id: PartId,
    n_rows: usize,
    open: bool,
}

impl PartRead {
    fn of(id: PartId) -> Self {
        Self {
            id,
            n_rows: 0,
            open: false,
        }
    }
}

impl Reader {
    fn run(mut self, work: &[ShardWork]) {
        #[expect(clippy::cast_precision_loss, reason = "a share for the eye")]
        let weight = |work: &ShardWork| work.weight as f64;
        let total = work.iter().map(weight).sum::<f64>().max(1.0);
        let mut before = 0.0;
        for work in work {
            let share = move |share: f64| (before + share * weight(work)) / total;
            let read = match &work.retry {
                None => self.shard(work, share),
                Some(retry) => self.retry(work, retry, share),
            };
            match read {
                Ok(ControlFlow::Continue(())) => {}
                // The collector or the pool has ended.
                Ok(ControlFlow::Break(())) => return,
                Err(error) => {
                    let _ = self.events.blocking_send(Event::Failed(error));
                    return;
                }
            }
            before += weight(work);
            self.counts.has_read(share(1.0));
        }
        let _ = self.events.blocking_send(Event::AllRead);
    }

    fn shard(
        &mut self,
        work: &ShardWork,
        share: impl Fn(f64) -> f64,
    ) -> anyhow::Result<ControlFlow<()>> {
        let mut part = PartRead::of(work.part);
        let mut stopped = false;
        let reading = self.reading.clone();
        let counts = Arc::clone(&self.counts);
        let read = input::read(&work.shard, work.cursor, &reading, &mut |seen| {
            counts.has_read(share(seen.share));
            let mut flow = self.cut(&mut part, seen.cursor);
            if flow.is_continue() {
                let row = part.n_rows as u64;
                flow = self.sample(&mut part, row, seen.sample);
            }
            stopped = flow.is_break();
            flow
        });
        if stopped {
            return Ok(ControlFlow::Break(()));
        }
        if let Some(fault) = damage(read)? {
            let row = part.n_rows as u64;
            let flow = self.error(&mut part, row, work.shard.name.clone(), fault, false);
            if flow.is_break() {
                return Ok(flow);
            }
        }
        Ok(self.end(part))
    }

    /// Tries the errors of a part again. Errors that are not tried, and those
    /// that the shard does not reach any more, stay as they are.
    fn retry(
        &mut self,
        work: &ShardWork,
        retry: &PartRetry,
        share: impl Fn(f64) -> f64,
    ) -> anyhow::Result<ControlFlow<()>> {
        let errors = self
            .reading
            .runtime
            .block_on(retry.error_rows(&self.sink))?;
        let tried = errors.lines.iter().filter(|(_, line)| line.is_tried);
        let mut reading = self.reading.clone();
        reading.wanted = Some(WantedRows {
            first: retry.cursor,
            rows: Arc::new(
                tried
                    .map(|(row, _)| *row)
                    .filter(|row| *row >= retry.from)
                    .collect(),
            ),
            open_from: errors.open_from,
        });
        let mut part = PartRead::of(work.part);
        let counts = Arc::clone(&self.counts);
        let mut row = 0;
        let mut stopped = false;
        let read = input::read(&work.shard, retry.cursor, &reading, &mut |seen| {
            let here = row;
            row += 1;
            if here >= retry.from {
                counts.has_read(share(retry.share_before(here)));
                let flow = self.again(&mut part, here, &errors, seen.sample);
                stopped = flow.is_break();
                flow?;
            }
            if errors.is_last(here) {
                ControlFlow::Break(())
            } else {
                ControlFlow::Continue(())
            }
        });
        if stopped {
            return Ok(ControlFlow::Break(()));
        }
        let damage = damage(read)?;
        Ok(self.end_retry(part, work, row.max(retry.from), &errors, damage))
    }

    /// Handles one row of a part whose errors are tried again.
    fn again(
        &mut self,
        part: &mut PartRead,
        row: u64,
        errors: &ErrorRows,
        sample: Sample,
    ) -> ControlFlow<()> {
        match errors.lines.get(&row) {
            Some(line) if !line.is_tried => self.carry(part, row, line),
            Some(_) => {
                self.cut(part, row)?;
                self.sample(part, row, sample)
            }
            None if errors.open_from.is_some_and(|from| row > from) => {
                self.cut(part, row)?;
                self.sample(part, row, sample)
            }
            None => ControlFlow::Continue(()),
        }
    }

    /// Ends the retry of a part, whose rows before `row` were read.
    fn end_retry(
        &mut self,
        mut part: PartRead,
        work: &ShardWork,
        row: u64,
        errors: &ErrorRows,
        damage: Option<ImageFault>,
    ) -> ControlFlow<()> {
        if errors.open_from.is_some_and(|from| row >= from) {
            // The error at the shard's end is another one now, or none.
            if let Some(fault) = damage {
                self.cut(&mut part, row)?;
                self.error(&mut part, row, work.shard.name.clone(), fault, false)?;
            }
        } else {
            for (row, line) in errors.lines.range(row..) {
                self.carry(&mut part, *row, line)?;
            }
        }
        self.end(part)
    }

    /// Keeps an error line as it is.
    fn carry(&mut self, part: &mut PartRead, row: u64, line: &ErrorRow) -> ControlFlow<()> {
        self.cut(part, row)?;
        self.error(part, row, line.id.clone(), line.fault.clone(), true)
    }

    /// Begins the next part if the part is full; `next` is its cursor.
    fn cut(&mut self, part: &mut PartRead, next: u64) -> ControlFlow<()> {
        if part.n_rows == self.part_items {
            self.tell(Event::End(End { next: Some(next) }))?;
            *part = PartRead::of(part.id.next());
        }
        ControlFlow::Continue(())
    }

    /// Adds an image that has no answer to a part.
    fn error(
        &mut self,
        part: &mut PartRead,
        row: u64,
        id: String,
        fault: ImageFault,
        is_old: bool,
    ) -> ControlFlow<()> {
        self.begin(part)?;
        part.n_rows += 1;
        self.tell(Event::Row {
            row,
            id,
            kept: None,
            fault: Some(fault),
            is_old,
        })
    }

    fn sample(&mut self, part: &mut PartRead, row: u64, sample: Sample) -> ControlFlow<()> {
        self.begin(part)?;
        let (image, fault) = match sample.image {
            Ok(image) => (Some(image), None),
            Err(fault) => (None, Some(fault)),
        };
        self.tell(Event::Row {
            row,
            id: sample.id,
            kept: sample.kept,
            fault,
            is_old: false,
        })?;
        let place = part.n_rows as u64;
        part.n_rows += 1;
        let Some(image) = image else {
            return ControlFlow::Continue(());
        };
        let room = sample.room.or_else(|| {
            let (memory, runtime) = (&self.reading.memory, &self.reading.runtime);
            memory.blocking_room(runtime, image.len() as u64)
        });
        let Some(room) = room else {
            return ControlFlow::Break(());
        };
        let task = PoolTask {
            id: (self.n_parts - 1) << ROW_BITS | place,
            image,
            room: room.into_permit(),
            failures: 0,
            lost: 0,
        };
        match self.tasks.blocking_send(task) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }

    fn begin(&mut self, part: &mut PartRead) -> ControlFlow<()> {
        if part.open {
            return ControlFlow::Continue(());
        }
        let permit = Arc::clone(&self.parts).acquire_owned();
        let Ok(permit) = self.reading.runtime.block_on(permit) else {
            return ControlFlow::Break(());
        };
        part.open = true;
        self.n_parts += 1;
        self.tell(Event::Begin {
            id: part.id,
            permit,
        })
    }

    /// Ends a shard, or the retry of a part. A shard without images has a part,
    /// too, so that it is recorded.
    fn end(&mut self, mut part: PartRead) -> ControlFlow<()> {
        self.begin(&mut part)?;
        self.tell(Event::End(End { next: None }))
    }

    fn tell(&self, event: Event) -> ControlFlow<()> {
        match self.events.blocking_send(event) {
            Ok(()) => ControlFlow::Continue(()),
            Err(_) => ControlFlow::Break(()),
        }
    }
}

/// Returns the fault that stands for the rest of a shard that cannot be read to
/// its end, which is the shard's last row. Fails when the shard could not be
/// read this time.
fn damage(read: Result<(), Broken>) -> anyhow::Result<Option<ImageFault>> {
    let (code, reason) = match read {
        Ok(()) => return Ok(None),
        Err(Broken::Damaged(reason)) => (GrpcCode::DataLoss, reason),
        Err(Broken::OverLimit(reason)) => (GrpcCode::ResourceExhausted, reason),
        Err(Broken::Unsuited(reason)) => (GrpcCode::InvalidArgument, reason),
        Err(Broken::Refused(fault)) => (fault.code, fault.message),
        Err(Broken::Failed(error)) => return Err(error),
    };
    Ok(Some(ImageFault {
        code,
        message: format!("the rest of the file is not read: {reason}"),
    }))
}
