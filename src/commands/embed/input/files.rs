//! Reader of images that are files: of a directory tree, or named by a list.

use std::ops::{ControlFlow, Range};
use std::pin::pin;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, StringArray};
use bytes::Bytes;
use futures_util::{Stream, StreamExt as _};
use reqwest::Url;

use super::{Broken, PlacedSample, Reading, Sample, Visitor, not_wanted, too_large, unfit};
use crate::client::pool::ImageFault;
use crate::commands::embed::location::{
    ListedObject, Location, ReadError, Stores, fault, is_absolute, scheme_of,
};
use crate::commands::embed::memory::ImageRoom;
use crate::commands::embed::web;
use crate::commands::embed::web::WebClient;

/// Files that are read at the same time, each up to the largest image: enough
/// for a disk, and to hide a bucket's latency.
const AT_ONCE: usize = 16;

/// Names of files, which are held in memory with about 100 bytes each.
#[derive(Debug)]
pub(in crate::commands::embed) enum Listing {
    /// Files below a directory.
    Tree {
        base: Location,
        entries: Vec<ListedObject>,
    },
    /// Files that a list names, relative to the list's own directory.
    List {
        stores: Arc<Stores>,
        base: Location,
        rows: Vec<ListedRow>,
    },
}

/// Line of a list.
#[derive(Debug)]
pub(in crate::commands::embed) struct ListedRow {
    pub(in crate::commands::embed) name: String,
    /// Value of `--id-column`, if the line has one.
    pub(in crate::commands::embed) id: Option<String>,
    /// Values of the kept columns, in the order of `--keep`.
    pub(in crate::commands::embed) kept: Vec<Option<String>>,
    /// Fault of the line itself.
    pub(in crate::commands::embed) trouble: Option<ImageFault>,
}

impl Listing {
    fn name(&self, idx: usize) -> Option<&str> {
        match self {
            Self::Tree { entries, .. } => Some(entries.get(idx)?.name.as_str()),
            Self::List { rows, .. } => Some(rows.get(idx)?.name.as_str()),
        }
    }

    pub(in crate::commands::embed) fn is_tree(&self) -> bool {
        matches!(self, Self::Tree { .. })
    }

    /// Returns the name of a file, if the file's id is this name below the
    /// listing's directory.
    pub(in crate::commands::embed) fn relative_name(&self, idx: usize) -> Option<&str> {
        let has_own = match self {
            Self::Tree { .. } => false,
            Self::List { rows, .. } => rows.get(idx)?.id.is_some(),
        };
        self.name(idx).filter(|name| !has_own && !is_absolute(name))
    }

    /// Returns the id of a file, which begins with `prefix` if the file's name
    /// is relative to the listing.
    pub(in crate::commands::embed) fn id(&self, idx: usize, prefix: &str) -> Option<String> {
        let name = self.name(idx)?;
        Some(match self {
            Self::Tree { .. } => format!("{prefix}{name}"),
            Self::List { rows, .. } => match &rows.get(idx)?.id {
                Some(id) => id.clone(),
                None if is_absolute(name) => name.to_owned(),
                None => format!("{prefix}{name}"),
            },
        })
    }

    /// Returns the fault that showed when the file was listed.
    fn trouble(&self, idx: usize) -> Option<ImageFault> {
        match self {
            Self::Tree { entries, .. } => entries.get(idx)?.trouble.clone(),
            Self::List { rows, .. } => rows.get(idx)?.trouble.clone(),
        }
    }

    /// Returns the memory that a file may take once it is read: as much as the
    /// largest image if its size is unknown. `held` is memory that no image
    /// can have.
    fn room(&self, idx: usize, held: u64, reading: &Reading) -> u64 {
        let max = bytes_max(held, reading);
        match self {
            Self::Tree { entries, .. } => entries.get(idx).map_or(0, |entry| entry.bytes.min(max)),
            Self::List { .. } => max,
        }
    }

    /// Returns the URL of an image on a web server, with the client that reads
    /// it.
    fn on_the_web(&self, name: &str) -> anyhow::Result<Option<(&WebClient, Url)>> {
        let Self::List { stores, base, .. } = self else {
            return Ok(None);
        };
        let url = if is_absolute(name) {
            // A malformed URL is refused when it is located.
            let scheme = scheme_of(name).unwrap_or_default();
            let is_web = matches!(scheme.as_str(), "http" | "https");
            is_web.then(|| Url::parse(name).ok()).flatten()
        } else {
            base.web_join(name)
        };
        url.map(|url| Ok((stores.web()?, url))).transpose()
    }

    fn locate(&self, name: &str) -> anyhow::Result<Location> {
        match self {
            Self::Tree { base, .. } => Ok(base.join(name)),
            Self::List { stores, base, .. } => {
                if is_absolute(name) {
                    stores.locate(name)
                } else {
                    base.checked_join(name)
                }
            }
        }
    }

    fn kept(&self, idx: usize, names: &[String]) -> Result<Option<RecordBatch>, Broken> {
        let Self::List { rows, .. } = self else {
            return Ok(None);
        };
        let Some(row) = rows.get(idx).filter(|_| !names.is_empty()) else {
            return Ok(None);
        };
        let columns = names.iter().zip(&row.kept).map(|(name, value)| {
            let column: ArrayRef = Arc::new(StringArray::from(vec![value.as_deref()]));
            (name, column, true)
        });
        let batch = RecordBatch::try_from_iter_with_nullable(columns);
        batch
            .map(Some)
            .map_err(|error| Broken::Failed(error.into()))
    }
}

/// Returns the size of the largest file that is read beside `held` bytes.
fn bytes_max(held: u64, reading: &Reading) -> u64 {
    let free = reading.memory.limit().saturating_sub(held);
    reading.image_bytes_max.min(free)
}

/// File of a listing that has been read, with the memory that it takes.
pub(super) type ReadFile = (
    usize,
    Option<ImageRoom>,
    anyhow::Result<Result<Bytes, ImageFault>>,
);

/// Reads files of a listing, several at the same time and each in its turn.
/// `held` is memory that the files cannot have; `first` is the cursor of the
/// first file of `range`.
pub(super) fn each(
    listing: Arc<Listing>,
    range: Range<usize>,
    first: u64,
    held: u64,
    reading: &Reading,
) -> impl Stream<Item = ReadFile> + use<'_> {
    let cursors = first..;
    futures_util::stream::iter(range.zip(cursors))
        .map(move |(idx, cursor)| (idx, cursor, Arc::clone(&listing)))
        .map(move |(idx, cursor, listing)| async move {
            if !reading.wants(cursor) {
                return (idx, None, Ok(Err(not_wanted())));
            }
            let listing = listing.as_ref();
            // Room is acquired in the order of the files, so that no later file
            // holds the room that the first file waits for.
            let room = listing.room(idx, held, reading);
            let mut room = reading.memory.room(room).await;
            let image = file(listing, idx, held, reading).await;
            match &image {
                Ok(Ok(image)) => {
                    if let Some(room) = &mut room {
                        room.shrink(image.len() as u64);
                    }
                }
                Ok(Err(_)) | Err(_) => room = None,
            }
            (idx, room, image)
        })
        .buffered(AT_ONCE)
}

/// Reads the images that rows of a table name. The faults name them, since the
/// rows' ids do not.
pub(super) fn of_rows(
    listing: Arc<Listing>,
    range: Range<usize>,
    first: u64,
    held: u64,
    reading: &Reading,
) -> impl Stream<Item = ReadFile> + use<'_> {
    let named = Arc::clone(&listing);
    each(listing, range, first, held, reading).map(move |(idx, room, image)| {
        let name = named.name(idx).unwrap_or_default();
        let image = image.map(|image| {
            image.map_err(|fault| {
                let of = fault.message.strip_prefix("image: ");
                let message = match of {
                    Some(of) if !name.is_empty() && named.trouble(idx).is_none() => {
                        format!("image: {name}: {of}")
                    }
                    _ => fault.message,
                };
                ImageFault { message, ..fault }
            })
        });
        (idx, room, image)
    })
}

/// Reads the files of `range`; `cursor` counts from the beginning of `range`.
/// The ids of files that the listing itself names begin with `prefix`.
pub(super) fn read(
    listing: &Arc<Listing>,
    range: Range<usize>,
    prefix: &str,
    cursor: u64,
    reading: &Reading,
    visit: &mut Visitor<'_>,
) -> Result<(), Broken> {
    let length = range.len();
    let skipped = usize::try_from(cursor).unwrap_or(length).min(length);
    let range = range.start + skipped..range.end;
    let mut place = skipped as u64;
    let mut files = pin!(each(Arc::clone(listing), range, place, 0, reading));
    while let Some((idx, room, image)) = reading.runtime.block_on(files.next()) {
        let seen = PlacedSample {
            cursor: place,
            #[expect(clippy::cast_precision_loss, reason = "a share for the eye")]
            share: place as f64 / length as f64,
            sample: Sample {
                id: listing.id(idx, prefix).unwrap_or_default(),
                image: image.map_err(Broken::Failed)?,
                room,
                kept: listing.kept(idx, &reading.keep)?,
            },
        };
        if visit(seen) == ControlFlow::Break(()) {
            break;
        }
        place += 1;
    }
    Ok(())
}

/// Reads a file: its bytes, or its fault. Fails when the store cannot be read.
async fn file(
    listing: &Listing,
    idx: usize,
    held: u64,
    reading: &Reading,
) -> anyhow::Result<Result<Bytes, ImageFault>> {
    let max = bytes_max(held, reading);
    let over = |bytes| unfit(bytes, held, reading).unwrap_or_else(|| too_large(bytes, max));
    let of_image = |fault: ImageFault| ImageFault {
        message: format!("image: {}", fault.message),
        ..fault
    };
    if let Some(fault) = listing.trouble(idx) {
        return Ok(Err(of_image(fault)));
    }
    let name = listing.name(idx).unwrap_or_default();
    if let Some((client, url)) = listing.on_the_web(name)? {
        return Ok(
            match web::read(client, &url, max, reading.url_patience).await {
                Ok(web::WebAnswer::Image(bytes)) => Ok(bytes),
                Ok(web::WebAnswer::TooLarge(bytes)) => Err(over(bytes)),
                Err(fault) => Err(of_image(fault)),
            },
        );
    }
    let location = match listing.locate(name) {
        Ok(location) => location,
        Err(error) => return Ok(Err(ImageFault::invalid(format!("image: {error:#}")))),
    };
    match location.read(max).await {
        Ok(Some(bytes)) => Ok(Ok(bytes)),
        Ok(None) => {
            let entry = location.stat().await?;
            Ok(Err(over(entry.map_or(0, |entry| entry.bytes))))
        }
        Err(ReadError::Trouble(trouble)) => Ok(Err(of_image(fault(&trouble)))),
        Err(ReadError::Refused(fault)) => Ok(Err(of_image(fault))),
        Err(error) => Err(anyhow::Error::new(error).context(location.to_string())),
    }
}
