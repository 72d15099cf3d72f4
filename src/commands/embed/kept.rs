//! Columns of the input that are kept in the table: what can be written, and in
//! which type.

use std::panic::catch_unwind;
use std::sync::Arc;

use arrow_array::{ArrayRef, RecordBatch, new_null_array};
use arrow_cast::CastOptions;
use arrow_schema::{ArrowError, DataType, Field, FieldRef, Schema, TimeUnit};

use super::flags::TableFormat;
use super::table;
use crate::telemetry::panic_text;

/// Returns the type in which values of the type `kind` are kept: the same, with
/// keys of dictionaries wide enough for the values of all row groups and
/// batches of a part. Parquet has no times in seconds, and other readers would
/// find numbers without a meaning, so these are kept in milliseconds.
fn kept_type(kind: &DataType, format: TableFormat) -> DataType {
    let inner = |field: &FieldRef| -> FieldRef {
        let kind = kept_type(field.data_type(), format);
        Arc::new(field.as_ref().clone().with_data_type(kind))
    };
    match kind {
        DataType::Dictionary(key, values) => {
            let key = match key.as_ref() {
                DataType::Int8 | DataType::Int16 | DataType::UInt8 | DataType::UInt16 => {
                    DataType::Int32
                }
                key => key.clone(),
            };
            DataType::Dictionary(Box::new(key), Box::new(kept_type(values, format)))
        }
        DataType::Timestamp(TimeUnit::Second, zone) if format != TableFormat::Arrow => {
            DataType::Timestamp(TimeUnit::Millisecond, zone.clone())
        }
        DataType::Time32(TimeUnit::Second) if format != TableFormat::Arrow => {
            DataType::Time32(TimeUnit::Millisecond)
        }
        DataType::List(field) => DataType::List(inner(field)),
        DataType::LargeList(field) => DataType::LargeList(inner(field)),
        DataType::FixedSizeList(field, length) => DataType::FixedSizeList(inner(field), *length),
        DataType::Map(field, sorted) => DataType::Map(inner(field), *sorted),
        DataType::Struct(fields) => DataType::Struct(fields.iter().map(inner).collect()),
        kind => kind.clone(),
    }
}

/// Converts the kept columns of a batch into the types in which they are kept. A
/// value that its type cannot hold is an error.
pub(super) fn in_kept_types(
    batch: RecordBatch,
    format: TableFormat,
) -> Result<RecordBatch, ArrowError> {
    let schema = batch.schema();
    let is_kept = |field: &FieldRef| kept_type(field.data_type(), format) == *field.data_type();
    let options = CastOptions {
        safe: false,
        ..CastOptions::default()
    };
    if schema.fields().iter().all(is_kept) {
        return Ok(batch);
    }
    let mut fields = Vec::new();
    let mut columns = Vec::new();
    for (field, column) in schema.fields().iter().zip(batch.columns()) {
        let kind = kept_type(field.data_type(), format);
        columns.push(arrow_cast::cast_with_options(column, &kind, &options)?);
        fields.push(field.as_ref().clone().with_data_type(kind));
    }
    let schema = Schema::new_with_metadata(fields, schema.metadata().clone());
    RecordBatch::try_new(Arc::new(schema), columns)
}

/// Checks that a column can be kept in a table of the format, by writing a
/// table with it.
///
/// # Errors
///
/// The reason for which the column cannot be kept.
pub(super) fn can_be_kept(field: &Field, format: TableFormat) -> Result<(), String> {
    if format != TableFormat::Arrow && has_union(field.data_type()) {
        return Err("Parquet has no unions".to_owned());
    }
    // Libraries panic on some types that they do not know.
    let written = catch_unwind(|| write_probe(field, format));
    match written {
        Ok(written) => written.map_err(|error| format!("{error:#}")),
        Err(panic) => Err(panic_text(&*panic)),
    }
}

fn has_union(kind: &DataType) -> bool {
    match kind {
        DataType::Union(..) => true,
        DataType::Dictionary(_, values) => has_union(values),
        DataType::Struct(fields) => fields.iter().any(|field| has_union(field.data_type())),
        DataType::List(field)
        | DataType::LargeList(field)
        | DataType::FixedSizeList(field, _)
        | DataType::Map(field, _) => has_union(field.data_type()),
        _ => false,
    }
}

/// Writes a table of two rows without values.
fn write_probe(field: &Field, format: TableFormat) -> anyhow::Result<()> {
    let schema = Arc::new(Schema::new(vec![field.clone().with_nullable(true)]));
    let column: ArrayRef = new_null_array(field.data_type(), 1);
    let row = in_kept_types(RecordBatch::try_new(schema, vec![column])?, format)?;
    let rows = arrow_select::concat::concat_batches(&row.schema(), [&row, &row])?;
    table::content(&rows, format, &[], "").map(drop)
}
