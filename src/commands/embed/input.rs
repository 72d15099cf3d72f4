//! What comes in: shards of a dataset, one sample after the other.
//!
//! A reader is plain code that runs on the reader's thread and hands each sample
//! to a visitor, together with a cursor: where to begin so that this sample is
//! the first. That is all that resuming needs to know of a format.

mod columns;
mod files;
mod messages;
mod pages;
mod webdataset;

use std::cell::Cell;
use std::ops::ControlFlow;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::time::Duration;

use arrow_array::RecordBatch;
use bytes::Bytes;
use tokio::runtime::Handle;

use super::location::Location;
use super::memory::{ImageMemory, ImageRoom};
use super::plan::{Shard, ShardKind};
use super::ranged::Ranged;
use crate::client::pool::ImageFault;
use crate::telemetry::panic_text;

pub(super) use self::files::{ListedRow, Listing};

/// One image, with what goes with it.
#[derive(Debug)]
pub(super) struct Sample {
    pub(super) id: String,
    /// The encoded file, or why there is none.
    pub(super) image: Result<Bytes, ImageFault>,
    /// The room that the image takes, if it was asked for already.
    pub(super) room: Option<ImageRoom>,
    /// One row of the columns that are kept; `None` when none are.
    pub(super) kept: Option<RecordBatch>,
}

/// A sample and its place.
#[derive(Debug)]
pub(super) struct PlacedSample {
    /// Where to begin so that this sample is the first.
    pub(super) cursor: u64,
    /// How much of the shard lies before it, 0 to 1.
    pub(super) share: f64,
    pub(super) sample: Sample,
}

/// What readers must know besides the shard.
#[derive(Debug, Clone)]
pub(super) struct Reading {
    pub(super) runtime: Handle,
    pub(super) memory: ImageMemory,
    /// Larger images are not read.
    pub(super) image_bytes_max: u64,
    /// Columns, or kinds of sidecar files.
    pub(super) keep: Vec<String>,
    pub(super) image_column: Option<String>,
    pub(super) id_column: Option<String>,
    /// How long a URL of a list is asked for again.
    pub(super) url_patience: Duration,
}

/// Why a shard cannot be read to its end.
#[derive(Debug)]
pub(super) enum Broken {
    /// Its content is damaged, and will be the next time: an error of the
    /// dataset, like an image that cannot be decoded.
    Damaged(String),
    /// The shard's pages or batches do not fit into the memory that there is for images:
    /// an error of the dataset as well.
    OverLimit(String),
    /// The shard has other columns than the flags ask for, or none that is known to
    /// hold images: an error of the dataset as well, unless no shard has them.
    Unsuited(String),
    /// The shard could not be read this time: the job ends.
    Failed(anyhow::Error),
}

type Visitor<'a> = dyn FnMut(PlacedSample) -> ControlFlow<()> + 'a;

/// Visits a shard's samples from `cursor` on (0 is its beginning), until the
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
            return files::read(listing, range.clone(), cursor, reading, visit);
        }
        ShardKind::WebDataset(location) => {
            let file = file_of(shard, location, reading);
            let result = caught(visit, |visit| {
                webdataset::read(&file, cursor, reading, visit)
            });
            (file, result)
        }
        ShardKind::Parquet(location) => {
            let file = file_of(shard, location, reading);
            let result = caught(visit, |visit| {
                columns::read_parquet(&file, location, cursor, reading, visit)
            });
            (file, result)
        }
        ShardKind::Arrow(location) => {
            let file = file_of(shard, location, reading);
            let result = caught(visit, |visit| {
                columns::read_arrow(&file, location, cursor, reading, visit)
            });
            (file, result)
        }
    };
    match (result, file.failure()) {
        // Whatever the format's reader made of it: the bytes did not come.
        (Err(_), Some(failure)) => Err(Broken::Failed(failure)),
        (result, _) => result,
    }
}

/// A shard's file, read by ranges.
fn file_of(shard: &Shard, location: &Location, reading: &Reading) -> Ranged {
    Ranged::new(location.clone(), shard.bytes, reading.runtime.clone())
}

/// Checks that a shard has the columns that are asked for, without reading rows.
/// Shards without columns have them all.
pub(super) fn has_columns(shard: &Shard, reading: &Reading) -> Result<(), Broken> {
    let check = |location: &Location, check: fn(&Ranged, &Reading) -> Result<(), Broken>| {
        let file = file_of(shard, location, reading);
        caught(&mut |_| ControlFlow::Break(()), |_| check(&file, reading))
    };
    match &shard.kind {
        ShardKind::Lost(_) | ShardKind::Files { .. } | ShardKind::WebDataset(_) => Ok(()),
        ShardKind::Parquet(location) => check(location, columns::check_parquet),
        ShardKind::Arrow(location) => check(location, columns::check_arrow),
    }
}

/// The last net under the readers of formats: a library that panics on what a
/// file says has found it damaged. A panic of the visitor is none of the file's.
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
            "the reader of its format panicked: {}",
            panic_text(&*panic)
        ))),
    }
}

/// What stands for all samples of a shard that cannot be read.
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

/// Why an image of so many bytes is not read, if it is not: `held` is what the
/// page or the batch that it lies in takes beside it.
fn unfit(bytes: u64, held: u64, reading: &Reading) -> Option<ImageFault> {
    if bytes > reading.image_bytes_max {
        return Some(too_large(bytes, reading.image_bytes_max));
    }
    let limit = reading.memory.limit();
    (bytes.saturating_add(held) > limit).then(|| {
        let beside = if held > 0 {
            format!(", with {held} bytes of the file around it")
        } else {
            String::new()
        };
        ImageFault::invalid(format!(
            "image: {bytes} bytes{beside}, over the limit of {limit} (--image-memory); it was not \
             sent"
        ))
    })
}

/// What an image over the limit has as its outcome.
fn too_large(bytes: u64, max: u64) -> ImageFault {
    ImageFault::invalid(format!(
        "image: {bytes} bytes, over the limit of {max} (--image-bytes-max of the worker); it was \
         not sent"
    ))
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::commands::embed::location::Stores;

    pub(in crate::commands::embed) fn reading(keep: &[&str]) -> Reading {
        Reading {
            runtime: Handle::current(),
            memory: ImageMemory::new(16 << 20),
            image_bytes_max: 1000,
            keep: keep.iter().map(|&name| name.to_owned()).collect(),
            image_column: None,
            id_column: None,
            url_patience: Duration::from_secs(1),
        }
    }

    /// Reads a shard on a thread of its own, as the pipeline does: each sample as
    /// its cursor, its id and its image.
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
