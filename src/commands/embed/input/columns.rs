//! Reader of tables: Parquet and Arrow, with images in a column of bytes or, as
//! in Hugging Face's datasets, in a struct of bytes and path.

use std::ops::ControlFlow;

use arrow_array::cast::AsArray as _;
use arrow_array::{Array, RecordBatch};
use arrow_schema::{ArrowError, DataType, Schema};
use bytes::Bytes;

use super::elsewhere::{ImagesElsewhere, is_text};
use super::ids::{id_at, is_id, is_id_of_version_1};
use super::messages::{ArrowBatch, Messages};
use super::pages::{IMAGE_ROWS, ParquetTable, URL_ROWS, Wanted};
use super::{Broken, PlacedSample, Reading, Sample, Visitor, not_wanted, unfit};
use crate::client::pool::ImageFault;
use crate::commands::embed::kept::{can_be_kept, in_kept_types};
use crate::commands::embed::location::Location;
use crate::commands::embed::ranged::Ranged;

/// Columns that an error message lists.
const LISTED_MAX: usize = 32;
/// Name of the column that is taken for images without `--image-column`,
/// whatever other columns there are.
const IMAGE_COLUMN: &str = "image";
/// Names that columns of images usually have.
const USUAL_COLUMNS: [&str; 6] = ["img", "jpg", "jpeg", "png", "webp", "picture"];
/// Names that binary columns of anything have, images among it.
const BYTES_COLUMNS: [&str; 2] = ["bytes", "content"];
/// Names of columns that have the shape of a column of images, and hold
/// something else.
const OTHER_COLUMNS: [&str; 7] = ["audio", "sound", "speech", "wav", "mp3", "video", "pdf"];

/// Positions of the image, id and kept columns in a schema.
#[derive(Debug)]
struct Columns {
    image: usize,
    id: Option<usize>,
    keep: Vec<usize>,
}

impl Columns {
    fn find(schema: &Schema, reading: &Reading) -> Result<Self, Broken> {
        let place = |flag: &str, name: &str| {
            schema.index_of(name).map_err(|_| {
                Broken::Unsuited(format!(
                    "{flag} {name}: the file has no such column; {}",
                    listed(schema)
                ))
            })
        };
        let image = match (&reading.url_column, &reading.image_column) {
            (Some(name), _) => {
                let urls = place("--url-column", name)?;
                let kind = schema.field(urls).data_type();
                if !is_text(kind) {
                    return Err(Broken::Unsuited(format!(
                        "--url-column {name}: the column holds {kind}; URLs and paths are text"
                    )));
                }
                urls
            }
            (None, Some(name)) => {
                let image = place("--image-column", name)?;
                let kind = schema.field(image).data_type();
                if !is_image(kind) {
                    return Err(Broken::Unsuited(format!(
                        "--image-column {name}: the column holds {kind}; images are binary, or a \
                         struct with a binary field `bytes`"
                    )));
                }
                image
            }
            (None, None) => guess_image(schema)?,
        };
        let id = reading.id_column.as_ref();
        let id = id.map(|name| place("--id-column", name)).transpose()?;
        if let Some(id) = id.map(|id| schema.field(id))
            && !is_id(id.data_type())
        {
            return Err(Broken::Unsuited(format!(
                "--id-column {}: the column holds {}; ids are text, numbers, dates, times, \
                 booleans, UUIDs or UTF-8 in binary",
                id.name(),
                id.data_type()
            )));
        }
        let mut keep = Vec::new();
        for name in &reading.keep {
            let kept = place("--keep", name)?;
            let field = schema.field(kept);
            can_be_kept(field, reading.format).map_err(|why| {
                Broken::Unsuited(format!(
                    "--keep {name}: the column holds {}, which cannot be written into the table: \
                     {why}",
                    field.data_type()
                ))
            })?;
            keep.push(kept);
        }
        Ok(Self { image, id, keep })
    }

    /// True if version 1 of the manifest gave the rows the same ids.
    fn has_ids_of_version_1(&self, schema: &Schema) -> bool {
        self.id
            .is_none_or(|id| is_id_of_version_1(schema.field(id).data_type()))
    }

    /// Returns the positions of all these columns, ascending and without
    /// duplicates.
    fn places(&self) -> Vec<usize> {
        let mut places: Vec<usize> = self.keep.iter().copied().chain(self.id).collect();
        places.push(self.image);
        places.sort_unstable();
        places.dedup();
        places
    }

    /// Returns the same columns in a table that has only [`Self::places`].
    fn projected(&self) -> Self {
        let places = self.places();
        let new = |old: &usize| places.binary_search(old).unwrap_or_default();
        Self {
            image: new(&self.image),
            id: self.id.as_ref().map(new),
            keep: self.keep.iter().map(new).collect(),
        }
    }
}

fn is_bytes(kind: &DataType) -> bool {
    matches!(
        kind,
        DataType::Binary | DataType::LargeBinary | DataType::BinaryView
    )
}

fn is_image(kind: &DataType) -> bool {
    match kind {
        // Fields are found by name, since older files have the path first.
        DataType::Struct(fields) => fields
            .iter()
            .any(|field| field.name() == "bytes" && is_bytes(field.data_type())),
        kind => is_bytes(kind),
    }
}

/// Lists a table's columns with their types for an error message, at most
/// [`LISTED_MAX`] of them.
fn listed(schema: &Schema) -> String {
    let fields = schema.fields();
    if fields.is_empty() {
        return "the file has no columns".to_owned();
    }
    let shown: Vec<String> = fields
        .iter()
        .take(LISTED_MAX)
        .map(|field| format!("{} ({})", field.name(), field.data_type()))
        .collect();
    let more = match fields.len() - shown.len() {
        0 => String::new(),
        more => format!(" and {more} more"),
    };
    format!("its columns are {}{more}", shown.join(", "))
}

fn guess_image(schema: &Schema) -> Result<usize, Broken> {
    let fields = schema.fields();
    let found = |wanted: &dyn Fn(&str, &DataType) -> bool| -> Vec<usize> {
        let is_wanted = |&place: &usize| {
            let name = fields[place].name().to_ascii_lowercase();
            let kind = fields[place].data_type();
            is_image(kind) && wanted(&name, kind)
        };
        (0..fields.len()).filter(is_wanted).collect()
    };
    let candidates = [
        found(&|name, _| name == IMAGE_COLUMN),
        found(&|name, _| USUAL_COLUMNS.contains(&name)),
        found(&|name, kind| matches!(kind, DataType::Struct(_)) && !OTHER_COLUMNS.contains(&name)),
        found(&|name, _| BYTES_COLUMNS.contains(&name)),
    ];
    let first = candidates.iter().find(|places| !places.is_empty());
    match first.map(Vec::as_slice) {
        Some(&[one]) => Ok(one),
        None | Some(&[]) => Err(Broken::Unsuited(format!(
            "no column is known to hold images: {}; name a binary column, or a struct with a \
             binary field `bytes`, with --image-column",
            listed(schema)
        ))),
        Some(_) => Err(Broken::Unsuited(format!(
            "several columns may hold images: {}; name one with --image-column",
            listed(schema)
        ))),
    }
}

fn bytes_at(column: &dyn Array, row: usize) -> Option<&[u8]> {
    if column.is_null(row) {
        return None;
    }
    match column.data_type() {
        DataType::Binary => Some(column.as_binary::<i32>().value(row)),
        DataType::LargeBinary => Some(column.as_binary::<i64>().value(row)),
        DataType::BinaryView => Some(column.as_binary_view().value(row)),
        _ => None,
    }
}

fn image_at(
    column: &dyn Array,
    row: usize,
    held: u64,
    reading: &Reading,
) -> Result<Bytes, ImageFault> {
    let bytes = match column.data_type() {
        DataType::Struct(_) if column.is_null(row) => None,
        DataType::Struct(_) => column
            .as_struct()
            .column_by_name("bytes")
            .and_then(|bytes| bytes_at(bytes.as_ref(), row)),
        _ => bytes_at(column, row),
    };
    match bytes {
        None => Err(ImageFault::invalid(
            "image: the row has neither bytes nor a path; --url-column names a column of URLs"
                .to_owned(),
        )),
        Some(bytes) => match unfit(bytes.len() as u64, held, reading) {
            Some(fault) => Err(fault),
            None => Ok(Bytes::copy_from_slice(bytes)),
        },
    }
}

/// Position in a table, with the table's size.
struct Place<'a> {
    /// Name of the table in the ids of its rows.
    name: &'a str,
    row: u64,
    n_rows: u64,
    /// Memory that the batch takes, which is not available to its images.
    held: u64,
}

fn visit_batch(
    batch: &RecordBatch,
    columns: &Columns,
    reading: &Reading,
    location: &Location,
    place: &mut Place<'_>,
    visit: &mut Visitor<'_>,
) -> Result<ControlFlow<()>, Broken> {
    let failed = |error: ArrowError| Broken::Damaged(error.to_string());
    let kept = if columns.keep.is_empty() {
        None
    } else {
        let kept = batch.project(&columns.keep).map_err(failed)?;
        Some(in_kept_types(kept, reading.format).map_err(failed)?)
    };
    let image = batch.column(columns.image).as_ref();
    let mut elsewhere = ImagesElsewhere::new(image, location, place.row, place.held, reading);
    let schema = batch.schema();
    for row in 0..batch.num_rows() {
        let id = columns.id.map_or(Ok(None), |id| {
            id_at(schema.field(id), batch.column(id).as_ref(), row)
        });
        let ordinal = || format!("{}#{}", place.name, place.row);
        let (image, room) = match elsewhere.next(row).map_err(Broken::Failed)? {
            Some(fetched) => fetched,
            None if !reading.wants(place.row) => (Err(not_wanted()), None),
            None => (image_at(image, row, place.held, reading), None),
        };
        let (id, image, room) = match id {
            Ok(id) => (id.unwrap_or_else(ordinal), image, room),
            Err(fault) => (ordinal(), Err(fault), None),
        };
        let seen = PlacedSample {
            cursor: place.row,
            #[expect(clippy::cast_precision_loss, reason = "a share for the eye")]
            share: place.row as f64 / place.n_rows.max(1) as f64,
            sample: Sample {
                id,
                image,
                room,
                kept: kept.as_ref().map(|kept| kept.slice(row, 1)),
            },
        };
        if visit(seen) == ControlFlow::Break(()) {
            return Ok(ControlFlow::Break(()));
        }
        place.row += 1;
    }
    Ok(ControlFlow::Continue(()))
}

/// Checks that a Parquet file has the columns that the flags ask for.
///
/// Returns false if version 1 of the manifest gave the rows other ids.
pub(super) fn check_parquet(file: &Ranged, reading: &Reading) -> Result<bool, Broken> {
    let table = ParquetTable::open(file, reading)?;
    let columns = Columns::find(table.schema(), reading)?;
    Ok(columns.has_ids_of_version_1(table.schema()))
}

/// Checks that an Arrow file or stream has the columns that the flags ask for.
///
/// Returns false if version 1 of the manifest gave the rows other ids.
pub(super) fn check_arrow(file: &Ranged, reading: &Reading) -> Result<bool, Broken> {
    let messages = Messages::open(file, reading)?;
    let columns = Columns::find(messages.schema(), reading)?;
    Ok(columns.has_ids_of_version_1(messages.schema()))
}

/// Reads the rows of a Parquet file; `cursor` is the number of a row.
pub(super) fn read_parquet(
    file: &Ranged,
    name: &str,
    cursor: u64,
    reading: &Reading,
    visit: &mut Visitor<'_>,
) -> Result<(), Broken> {
    let table = ParquetTable::open(file, reading)?;
    let columns = Columns::find(table.schema(), reading)?;
    // A column of URLs is text, whose values are copied.
    let has_urls = reading.url_column.is_some();
    let is_only_image =
        !has_urls && columns.id != Some(columns.image) && !columns.keep.contains(&columns.image);
    let places = columns.places();
    let wanted = Wanted {
        places: &places,
        viewed: is_only_image.then_some(columns.image),
        batch_rows: if has_urls { URL_ROWS } else { IMAGE_ROWS },
    };
    let columns = columns.projected();
    let mut place = Place {
        name,
        row: 0,
        n_rows: table.n_rows(),
        held: 0,
    };
    for group in 0..table.n_groups() {
        let rows = table.rows(group)?;
        // Row groups before the cursor are not read at all.
        if place.row.saturating_add(rows) <= cursor {
            place.row = place.row.saturating_add(rows);
            continue;
        }
        let end = place.row.saturating_add(rows);
        let skipped = cursor.saturating_sub(place.row);
        place.row = place.row.max(cursor);
        let flow = table.each(group, &wanted, skipped, |batch, held| {
            place.held = held;
            visit_batch(batch, &columns, reading, file.location(), &mut place, visit)
        })?;
        if flow.is_break() {
            return Ok(());
        }
        if place.row != end {
            return Err(Broken::Damaged(format!(
                "row group {group} claims {rows} rows and has {} fewer",
                end.saturating_sub(place.row)
            )));
        }
    }
    Ok(())
}

/// Reads the rows of both of Arrow's formats: a file, or a stream as in Hugging
/// Face's cache. `cursor` is the number of a row.
pub(super) fn read_arrow(
    file: &Ranged,
    name: &str,
    cursor: u64,
    reading: &Reading,
    visit: &mut Visitor<'_>,
) -> Result<(), Broken> {
    let home = file.location().clone();
    let mut messages = Messages::open(file, reading)?;
    let columns = Columns::find(messages.schema(), reading)?;
    let mut place = Place {
        name,
        row: 0,
        // The number of rows is not recorded anywhere; for the progress display
        // the number of bytes serves as well.
        n_rows: parquet::file::reader::Length::len(file),
        held: 0,
    };
    messages.each(|ArrowBatch { mut rows, held }| {
        let n_rows = rows.num_rows() as u64;
        if place.row + n_rows <= cursor {
            place.row += n_rows;
            return Ok(ControlFlow::Continue(()));
        }
        if let Some(skipped) = cursor.checked_sub(place.row).filter(|&skipped| skipped > 0) {
            let skipped = usize::try_from(skipped).unwrap_or(usize::MAX);
            rows = rows.slice(skipped, rows.num_rows() - skipped);
            place.row = cursor;
        }
        place.held = held;
        visit_batch(&rows, &columns, reading, &home, &mut place, visit)
    })
}

#[cfg(test)]
mod tests;
