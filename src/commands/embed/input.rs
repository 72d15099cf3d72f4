//! Input of a job: shards of a dataset, read one sample after the other.
//!
//! A reader is blocking code that runs on the reader's thread. The reader hands
//! each sample to a visitor, together with a cursor: the position from which
//! reading must begin so that this sample is the first. Resuming a job needs no
//! other knowledge of a format.

mod archive;
mod columns;
mod elsewhere;
mod files;
mod ids;
mod messages;
mod pages;
mod sidecars;
mod webdataset;

use std::cell::Cell;
use std::collections::BTreeSet;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;
use std::time::Duration;

use arrow_array::RecordBatch;
use bytes::Bytes;
use tokio::runtime::Handle;

use super::flags::TableFormat;
use super::location::{Location, Stores};
use super::memory::{ImageMemory, ImageRoom};
use super::plan::{Shard, ShardKind};
use super::ranged::{Ranged, Unread};
use crate::client::pool::ImageFault;
use crate::telemetry::panic_text;

pub(super) use self::files::{ListedRow, Listing};
pub(super) use self::sidecars::SidecarsSeen;

/// Image with its id and the columns that are kept.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) id: String,
    /// Bytes of the encoded file, or the reason for which there are none.
    pub(super) image: Result<Bytes, ImageFault>,
    /// Memory that the image holds, if it was acquired already.
    pub(super) room: Option<ImageRoom>,
    /// One row of the columns that are kept; `None` when none are kept.
    pub(super) kept: Option<RecordBatch>,
}

/// Sample with its position in the shard.
#[derive(Debug)]
pub(super) struct PlacedSample {
    /// Cursor from which reading must begin so that this sample is the first.
    pub(super) cursor: u64,
    /// Share of the shard that lies before this sample, 0 to 1.
    pub(super) share: f64,
    pub(super) sample: Sample,
}

/// Options and resources of a reader, besides the shard.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) runtime: Handle,
    pub(super) memory: ImageMemory,
    /// Largest image in bytes; larger images are not read.
    pub(super) image_bytes_max: u64,
    /// Columns to keep, or extensions of sidecar files.
    pub(super) keep: Vec<String>,
    pub(super) image_column: Option<String>,
    /// Column of a table whose images are at a URL or a path.
    pub(super) url_column: Option<String>,
    pub(super) id_column: Option<String>,
    /// Format of the table that the kept columns are written into.
    pub(super) format: TableFormat,
    pub(super) sidecars: Arc<SidecarsSeen>,
    /// Longest time for which a URL of a list is retried.
    pub(super) url_patience: Duration,
    /// Stores of images that a table names.
    pub(super) stores: Arc<Stores>,
    /// Rows whose images are read; `None` for all. Samples of other rows have
    /// an error instead of an image. Tars are read whole.
    pub(super) wanted: Option<WantedRows>,
}

impl Reading {
    /// True if the image of the row with this cursor is read.
    fn wants(&self, cursor: u64) -> bool {
        let wanted = self.wanted.as_ref();
        wanted.is_none_or(|wanted| wanted.has(cursor))
    }
}

/// Rows of a part whose images are read.
#[derive(Debug, Clone)]
pub(super) struct WantedRows {
    /// Cursor of the part's first row, where cursors count rows.
    pub(super) first: u64,
    pub(super) rows: Arc<BTreeSet<u64>>,
    /// Row from which on all rows are read.
    pub(super) open_from: Option<u64>,
}

impl WantedRows {
    fn has(&self, cursor: u64) -> bool {
        let Some(row) = cursor.checked_sub(self.first) else {
            return false;
        };
        self.rows.contains(&row) || self.open_from.is_some_and(|from| row >= from)
    }
}

/// Makes the fault of a row that is not among the wanted ones, which nobody
/// sees.
fn not_wanted() -> ImageFault {
    ImageFault::invalid("image: it was not asked for".to_owned())
}

/// Reason for which a shard cannot be read to its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// The content is damaged, and will be the next time: an error of the
    /// dataset, like an image that cannot be decoded.
    Damaged(String),
    /// The shard's pages or batches do not fit into `--image-memory`: an error
    /// of the dataset as well.
    OverLimit(String),
    /// The shard lacks a column that the flags ask for, or a column that is
    /// known to hold images: an error of the dataset as well, unless no shard
    /// has such columns.
    Unsuited(String),
    /// The store or the server will never hand out the shard's bytes: an error
    /// of the dataset as well.
    Refused(ImageFault),
    /// The shard could not be read this time, so the job ends.
    Failed(anyhow::Error),
}

type Visitor<'a> = dyn FnMut(PlacedSample) -> ControlFlow<()> + 'a;

/// Visits a shard's samples from `cursor` on (0 is the beginning), until the
/// visitor breaks.
pub(super) fn read(
    shard: &Shard,
    cursor: u64,
    reading: &Reading,
    visit: &mut Visitor<'_>,
) -> Result<(), Broken> {
    let (file, result) = match &shard.kind {
        ShardKind::Lost(fault) => {
            if cursor == 0 {
                let _ = visit(lost(shard, fault));
            }
            return Ok(());
        }
        ShardKind::Files { listing, range } => {
            let prefix = &shard.id_base;
            return files::read(listing, range.clone(), prefix, cursor, reading, visit);
        }
        ShardKind::WebDataset(location) => {
            let file = file_of(shard, location, reading);
            let mut visit_below = |mut seen: PlacedSample| {
                seen.sample.id.insert_str(0, &shard.id_base);
                reading.sidecars.note(seen.sample.kept.as_ref());
                visit(seen)
            };
            let result = caught(&mut visit_below, |visit| {
                webdataset::read(&file, &shard.id_base, cursor, reading, visit)
            });
            (file, result)
        }
        ShardKind::Parquet(location) => {
            let file = file_of(shard, location, reading);
            let result = caught(visit, |visit| {
                columns::read_parquet(&file, &shard.id_base, cursor, reading, visit)
            });
            (file, result)
        }
        ShardKind::Arrow(location) => {
            let file = file_of(shard, location, reading);
            let result = caught(visit, |visit| {
                columns::read_arrow(&file, &shard.id_base, cursor, reading, visit)
            });
            (file, result)
        }
    };
    because_of_store(result, &file)
}

/// Returns the store's failure for a result that it is the cause of: whatever
/// error the format's reader made of it, the bytes could not be fetched.
fn because_of_store<T>(result: Result<T, Broken>, file: &Ranged) -> Result<T, Broken> {
    match (result, file.failure()) {
        (Err(_), Some(Unread::ForGood(fault))) => Err(Broken::Refused(fault)),
        (Err(_), Some(Unread::ThisTime(failure))) => Err(Broken::Failed(failure)),
        (result, _) => result,
    }
}

/// Opens a shard's file for reading by ranges.
fn file_of(shard: &Shard, location: &Location, reading: &Reading) -> Ranged {
    Ranged::new(location.clone(), shard.bytes, reading.runtime.clone())
}

/// Returns true if a file is a tar by its content, or can never be read: then
/// it is one error where its rows would be.
///
/// # Errors
///
/// When the file cannot be read this time.
pub(super) fn is_tar(location: &Location, bytes: u64, runtime: Handle) -> anyhow::Result<bool> {
    let file = Ranged::new(location.clone(), bytes, runtime);
    let is_tar = webdataset::is_tar(&file);
    match file.failure() {
        None => Ok(is_tar),
        Some(Unread::ForGood(_)) => Ok(true),
        Some(Unread::ThisTime(failure)) => Err(failure),
    }
}

/// Checks that a shard has the columns that the flags ask for, without reading
/// rows. A shard of a format without columns always passes. Returns false if
/// version 1 of the manifest gave the shard's rows other ids.
pub(super) fn has_columns(shard: &Shard, reading: &Reading) -> Result<bool, Broken> {
    let check = |location: &Location, check: fn(&Ranged, &Reading) -> Result<bool, Broken>| {
        let file = file_of(shard, location, reading);
        let mut is_same = true;
        let checked = caught(&mut |_| ControlFlow::Break(()), |_| {
            is_same = check(&file, reading)?;
            Ok(())
        });
        because_of_store(checked, &file).map(|()| is_same)
    };
    match &shard.kind {
        ShardKind::Lost(_) | ShardKind::Files { .. } | ShardKind::WebDataset(_) => Ok(true),
        ShardKind::Parquet(location) => check(location, columns::check_parquet),
        ShardKind::Arrow(location) => check(location, columns::check_arrow),
    }
}

/// Catches panics of the formats' readers: a library that panics on a file's
/// content has found the file damaged. A panic of the visitor is not the file's
/// fault, and goes on.
fn caught(
    visit: &mut Visitor<'_>,
    read: impl FnOnce(&mut Visitor<'_>) -> Result<(), Broken>,
) -> Result<(), Broken> {
    let visiting = Cell::new(false);
    let result = catch_unwind(AssertUnwindSafe(|| {
        read(&mut |seen| {
            visiting.set(true);
            let flow = visit(seen);
            visiting.set(false);
            flow
        })
    }));
    match result {
        Ok(result) => result,
        Err(panic) if visiting.get() => resume_unwind(panic),
        Err(panic) => Err(Broken::Damaged(format!(
            "the reader of the file's format panicked: {}",
            panic_text(&*panic)
        ))),
    }
}

/// Makes the sample that stands for all samples of a shard that cannot be read.
fn lost(shard: &Shard, fault: &ImageFault) -> PlacedSample {
    PlacedSample {
        cursor: 0,
        share: 0.0,
        sample: Sample {
            id: shard.name.clone(),
            image: Err(fault.clone()),
            room: None,
            kept: None,
        },
    }
}

/// Returns the fault of an image of `bytes` bytes that is over a limit. `held`
/// is the memory of the page or the batch that contains the image.
fn unfit(bytes: u64, held: u64, reading: &Reading) -> Option<ImageFault> {
    if bytes > reading.image_bytes_max {
        return Some(too_large(bytes, reading.image_bytes_max));
    }
    let limit = reading.memory.limit();
    (bytes.saturating_add(held) > limit).then(|| {
        let beside = if held > 0 {
            format!(", with {held} bytes of its page or batch")
        } else {
            String::new()
        };
        ImageFault::invalid(format!(
            "image: {bytes} bytes{beside}, over the limit of {limit} (--image-memory); the image \
             was not sent"
        ))
    })
}

/// Makes the fault of an image that is over the worker's limit.
fn too_large(bytes: u64, max: u64) -> ImageFault {
    ImageFault::invalid(format!(
        "image: {bytes} bytes, over the limit of {max} (--image-bytes-max of the worker); the \
         image was not sent"
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::commands::embed) fn reading(keep: &[&str]) -> Reading {
        Reading {
            runtime: Handle::current(),
            memory: ImageMemory::new(16 << 20),
            image_bytes_max: 1000,
            keep: keep.iter().map(|&name| name.to_owned()).collect(),
            image_column: None,
            url_column: None,
            id_column: None,
            format: TableFormat::Parquet,
            sidecars: Arc::default(),
            url_patience: Duration::from_secs(1),
            stores: Arc::default(),
            wanted: None,
        }
    }

    /// Reads a shard on a thread of its own, as the pipeline does, and returns
    /// each sample with its cursor.
    pub(in crate::commands::embed) async fn read_all(
        shard: Shard,
        cursor: u64,
        reading: Reading,
    ) -> (Vec<(u64, Sample)>, Result<(), Broken>) {
        tokio::task::spawn_blocking(move || {
            let mut seen = Vec::new();
            let result = read(&shard, cursor, &reading, &mut |one| {
                seen.push((one.cursor, one.sample));
                ControlFlow::Continue(())
            });
            (seen, result)
        })
        .await
        .unwrap()
    }

    pub(in crate::commands::embed) fn local(path: &std::path::Path) -> Location {
        Stores::default().locate(path.to_str().unwrap()).unwrap()
    }
}
