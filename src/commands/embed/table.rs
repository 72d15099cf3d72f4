//! Files of a part of the output. The same rows always give the same bytes.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;

use anyhow::Context as _;
use arrow_array::builder::{
    FixedSizeListBuilder, Float16Builder, Float32Builder, ListBuilder, StringBuilder,
    UInt16Builder, UInt32Builder,
};
use arrow_array::cast::AsArray as _;
use arrow_array::types::Date64Type;
use arrow_array::{ArrayRef, FixedSizeListArray, Float64Array, RecordBatch, StringArray};
use arrow_schema::{DataType, Field, FieldRef, Schema};
use bytes::Bytes;
use half::f16;
use parquet::arrow::ArrowWriter;
use parquet::basic::Compression;
use parquet::file::metadata::KeyValue;
use parquet::file::properties::{EnabledStatistics, WriterProperties};
use parquet::schema::types::ColumnPath;
use serde::Serialize;

use super::flags::{Dtype, TableFormat};
use super::journal::PartId;
use crate::client::pool::{ImageFault, PoolAnswer};
use crate::proto::{GrpcCode, pb};

/// Key of the metadata in a file that describes the file, as JSON.
const METADATA_KEY: &str = "imagegpt";
/// Names of the table's own columns.
pub(super) const OWN_COLUMNS: [&str; 9] = [
    "id",
    "embedding",
    "classes",
    "labels",
    "scores",
    "nats",
    "nats_per_token",
    "bits_per_token",
    "complexity_bits_per_token",
];

/// Properties that all parts have in common.
#[derive(Debug, Clone)]
pub(super) struct TableShape {
    pub(super) format: TableFormat,
    pub(super) values: StoredValues,
    /// Description of the model and the options, as JSON.
    pub(super) metadata: String,
}

/// Name of the column of color tokens.
pub(super) const TOKENS_COLUMN: &str = "tokens";
/// Beginning of the name of a column that holds one of several layers.
const LAYER_COLUMN: &str = "embedding_";

/// True for the name of a column that holds one of several layers.
pub(super) fn is_layer_column(name: &str) -> bool {
    let layer = name.strip_prefix(LAYER_COLUMN);
    layer.is_some_and(|layer| layer.parse::<u32>().is_ok())
}

impl TableShape {
    /// Directories of the output that the files of parts are in.
    pub(super) fn folders(&self) -> BTreeSet<String> {
        let mut folders = BTreeSet::from(["errors".to_owned()]);
        if self.format == TableFormat::Npy {
            folders.insert("metadata".to_owned());
            let columns = self.values.vectors();
            folders.extend(columns.iter().map(|column| npy_folder(column)));
        } else {
            folders.insert(String::new());
        }
        folders
    }
}

/// Returns the directory of NumPy's files for a column of vectors.
fn npy_folder(column: &str) -> String {
    column.replace("embedding", "img_emb")
}

/// Values that are stored for each image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum StoredValues {
    Embedding(VectorShape),
    Classes,
    Scores,
    /// Color tokens, as many as the number says.
    Tokens(usize),
}

/// Vectors that are stored for each image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct VectorShape {
    /// Layers with a column of their own, so that a reader of one layer reads
    /// no other; `None` is the only vector.
    pub(super) layers: Option<Vec<u32>>,
    pub(super) dimension: usize,
    pub(super) dtype: Dtype,
}

impl StoredValues {
    /// Names of the columns that hold vectors.
    fn vectors(&self) -> Vec<String> {
        match self {
            Self::Embedding(vectors) => vectors.columns(),
            Self::Classes | Self::Scores | Self::Tokens(_) => Vec::new(),
        }
    }
}

impl VectorShape {
    /// Bytes of one vector.
    fn bytes(&self) -> usize {
        let width = match self.dtype {
            Dtype::F32 => 4,
            Dtype::F16 => 2,
        };
        self.dimension * width
    }

    /// Bytes of the vectors of one image.
    pub(super) fn bytes_of_image(&self) -> usize {
        self.layers.as_ref().map_or(1, Vec::len) * self.bytes()
    }

    /// Names of the vectors' columns.
    fn columns(&self) -> Vec<String> {
        match &self.layers {
            None => vec!["embedding".to_owned()],
            Some(layers) => layers
                .iter()
                .map(|layer| format!("{LAYER_COLUMN}{layer}"))
                .collect(),
        }
    }

    /// Returns the bytes of vector `place` of each answer, after checking that
    /// the answers have the lengths of all vectors.
    fn vectors<'a>(
        &self,
        answers: &'a [PoolAnswer],
        place: usize,
    ) -> anyhow::Result<Vec<&'a [u8]>> {
        let wanted = self.bytes_of_image();
        let range = place * self.bytes()..(place + 1) * self.bytes();
        let vector = |answer: &'a PoolAnswer| match answer {
            PoolAnswer::Embedding(bytes) => {
                let vector = bytes.get(range.clone()).filter(|_| bytes.len() == wanted);
                vector.with_context(|| {
                    format!(
                        "a worker answered with vectors of {} bytes; the model's dimension makes \
                         {wanted}",
                        bytes.len()
                    )
                })
            }
            PoolAnswer::Classes(_) | PoolAnswer::Score(_) | PoolAnswer::Tokens(_) => {
                anyhow::bail!("a worker's answer is not the vector that it was asked for")
            }
        };
        answers.iter().map(vector).collect()
    }
}

/// Row of the table: an image's id, its kept columns and its outcome.
#[derive(Debug)]
pub(super) struct TableRow {
    /// Place in the part, or in the part that is retried.
    pub(super) row: u64,
    pub(super) id: String,
    pub(super) kept: Option<RecordBatch>,
    pub(super) outcome: Result<PoolAnswer, ImageFault>,
}

/// Line of the error file.
#[derive(Debug, Serialize)]
struct ErrorLine<'a> {
    id: &'a str,
    code: GrpcCode,
    message: &'a str,
}

/// Appends a line to the content of an error file.
pub(super) fn error_line(errors: &mut Vec<u8>, id: &str, fault: &ImageFault) -> anyhow::Result<()> {
    let line = ErrorLine {
        id,
        code: fault.code,
        message: &fault.message,
    };
    serde_json::to_writer(&mut *errors, &line)?;
    errors.push(b'\n');
    Ok(())
}

/// Makes the files of a part, as names and contents. Rows that failed are only
/// in the error file. A file that would be empty is not written.
pub(super) fn files(
    id: PartId,
    rows: Vec<TableRow>,
    shape: &TableShape,
) -> anyhow::Result<Vec<(String, Bytes)>> {
    let mut errors = Vec::new();
    let (mut ids, mut answers, mut kept) = (Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        match row.outcome {
            Ok(answer) => {
                ids.push(row.id);
                answers.push(answer);
                kept.extend(row.kept);
            }
            Err(fault) => error_line(&mut errors, &row.id, &fault)?,
        }
    }
    let mut files = Vec::new();
    if !ids.is_empty() {
        let kept = concatenated(&kept)?;
        match (shape.format, &shape.values) {
            (TableFormat::Npy, StoredValues::Embedding(vectors)) => {
                for (place, column) in vectors.columns().iter().enumerate() {
                    let folder = npy_folder(column);
                    let content = npy(&vectors.vectors(&answers, place)?, vectors)?;
                    files.push((format!("{folder}/img_emb_{id}.npy"), content));
                }
                let index = batch(&ids, Vec::new(), kept, &shape.metadata)?;
                let index = content(&index, shape.format, &[], &shape.metadata)?;
                files.push((format!("metadata/metadata_{id}.parquet"), index));
            }
            (format, values) => {
                let table = columns(&answers, values)?;
                let table = batch(&ids, table, kept, &shape.metadata)?;
                let extension = match format {
                    TableFormat::Arrow => "arrow",
                    TableFormat::Parquet | TableFormat::Npy => "parquet",
                };
                let vectors = values.vectors();
                let content = content(&table, format, &vectors, &shape.metadata)?;
                files.push((format!("part-{id}.{extension}"), content));
            }
        }
    }
    if !errors.is_empty() {
        files.push((format!("errors/errors-{id}.jsonl"), errors.into()));
    }
    Ok(files)
}

fn concatenated(kept: &[RecordBatch]) -> anyhow::Result<Option<RecordBatch>> {
    let Some(first) = kept.first() else {
        return Ok(None);
    };
    let all = arrow_select::concat::concat_batches(&first.schema(), kept);
    Ok(Some(all.context(
        "the kept columns of a part do not fit together",
    )?))
}

/// Makes a table with the id as its first column and the kept columns last.
fn batch(
    ids: &[String],
    values: Vec<(FieldRef, ArrayRef)>,
    kept: Option<RecordBatch>,
    metadata: &str,
) -> anyhow::Result<RecordBatch> {
    let id = Arc::new(Field::new("id", DataType::Utf8, false));
    let ids: ArrayRef = Arc::new(StringArray::from_iter_values(ids));
    let (mut fields, mut columns) = (vec![id], vec![ids]);
    for (field, column) in values {
        fields.push(field);
        columns.push(column);
    }
    if let Some(kept) = kept {
        fields.extend(kept.schema().fields().iter().cloned());
        columns.extend(kept.columns().iter().cloned());
    }
    // A single key, since the order of several keys in a map is not always the
    // same.
    let metadata = HashMap::from([(METADATA_KEY.to_owned(), metadata.to_owned())]);
    let schema = Schema::new_with_metadata(fields, metadata);
    Ok(RecordBatch::try_new(Arc::new(schema), columns)?)
}

fn columns(
    answers: &[PoolAnswer],
    values: &StoredValues,
) -> anyhow::Result<Vec<(FieldRef, ArrayRef)>> {
    match values {
        StoredValues::Embedding(vectors) => {
            let columns = vectors.columns().into_iter().enumerate();
            let columns = columns
                .map(|(place, name)| embeddings(&name, &vectors.vectors(answers, place)?, vectors));
            columns.collect()
        }
        StoredValues::Classes => Ok(classes(answers)),
        StoredValues::Scores => Ok(scores(answers)),
        StoredValues::Tokens(positions) => Ok(vec![tokens(answers, *positions)?]),
    }
}

fn embeddings(
    name: &str,
    vectors: &[&[u8]],
    shape: &VectorShape,
) -> anyhow::Result<(FieldRef, ArrayRef)> {
    let length = i32::try_from(shape.dimension).context("the model's dimension")?;
    let n_values = vectors.len() * shape.dimension;
    let (kind, column): (DataType, ArrayRef) = match shape.dtype {
        Dtype::F32 => {
            let mut builder =
                FixedSizeListBuilder::new(Float32Builder::with_capacity(n_values), length)
                    .with_field(Field::new("item", DataType::Float32, false));
            for vector in vectors {
                for bytes in vector.chunks_exact(4) {
                    let value = f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]);
                    builder.values().append_value(value);
                }
                builder.append(true);
            }
            (DataType::Float32, Arc::new(builder.finish()))
        }
        Dtype::F16 => {
            let mut builder =
                FixedSizeListBuilder::new(Float16Builder::with_capacity(n_values), length)
                    .with_field(Field::new("item", DataType::Float16, false));
            for vector in vectors {
                for bytes in vector.chunks_exact(2) {
                    let value = f16::from_le_bytes([bytes[0], bytes[1]]);
                    builder.values().append_value(value);
                }
                builder.append(true);
            }
            (DataType::Float16, Arc::new(builder.finish()))
        }
    };
    let kind = DataType::FixedSizeList(Arc::new(Field::new("item", kind, false)), length);
    Ok((Arc::new(Field::new(name, kind, false)), column))
}

/// Makes the columns of classes, best first, as three lists of the same length.
fn classes(answers: &[PoolAnswer]) -> Vec<(FieldRef, ArrayRef)> {
    let item = |kind| Arc::new(Field::new("item", kind, false));
    let mut indexes = ListBuilder::new(UInt32Builder::new()).with_field(item(DataType::UInt32));
    let mut labels = ListBuilder::new(StringBuilder::new()).with_field(item(DataType::Utf8));
    let mut scores = ListBuilder::new(Float32Builder::new()).with_field(item(DataType::Float32));
    for answer in answers {
        if let PoolAnswer::Classes(found) = answer {
            for class in found {
                indexes.values().append_value(class.index);
                labels.values().append_value(&class.label);
                scores.values().append_value(class.score);
            }
        }
        indexes.append(true);
        labels.append(true);
        scores.append(true);
    }
    let field = |name: &str, kind| {
        let kind = DataType::List(item(kind));
        Arc::new(Field::new(name, kind, false))
    };
    vec![
        (
            field("classes", DataType::UInt32),
            Arc::new(indexes.finish()) as ArrayRef,
        ),
        (
            field("labels", DataType::Utf8),
            Arc::new(labels.finish()) as ArrayRef,
        ),
        (
            field("scores", DataType::Float32),
            Arc::new(scores.finish()) as ArrayRef,
        ),
    ]
}

/// Makes the columns of the likelihood, and of the size to which the tokens
/// compress without the model.
fn scores(answers: &[PoolAnswer]) -> Vec<(FieldRef, ArrayRef)> {
    let column = |name: &str, number: fn(&pb::Score) -> f64| {
        let numbers = answers.iter().map(|answer| match answer {
            PoolAnswer::Score(score) => number(score),
            _ => f64::NAN,
        });
        let field = Arc::new(Field::new(name, DataType::Float64, false));
        let column: ArrayRef = Arc::new(Float64Array::from_iter_values(numbers));
        (field, column)
    };
    vec![
        column("nats", |score| score.nats),
        column("nats_per_token", |score| score.nats_per_token),
        column("bits_per_token", |score| score.bits_per_token),
        column("complexity_bits_per_token", |score| {
            score.complexity_bits_per_token.unwrap_or(f64::NAN)
        }),
    ]
}

/// Makes the column of color tokens, in raster order.
fn tokens(answers: &[PoolAnswer], positions: usize) -> anyhow::Result<(FieldRef, ArrayRef)> {
    let item = Arc::new(Field::new("item", DataType::UInt16, false));
    let mut values = UInt16Builder::with_capacity(answers.len() * positions);
    for answer in answers {
        let PoolAnswer::Tokens(tokens) = answer else {
            anyhow::bail!("a worker's answer is not the tokens that it was asked for");
        };
        anyhow::ensure!(
            tokens.len() == positions,
            "a worker answered with {} tokens; the model has {positions}",
            tokens.len()
        );
        for token in tokens {
            values.append_value(u16::try_from(*token).context("a token has 16 bits")?);
        }
    }
    let length = i32::try_from(positions).context("the model's positions")?;
    let column =
        FixedSizeListArray::try_new(Arc::clone(&item), length, Arc::new(values.finish()), None)?;
    let kind = DataType::FixedSizeList(item, length);
    Ok((
        Arc::new(Field::new(TOKENS_COLUMN, kind, false)),
        Arc::new(column),
    ))
}

/// Makes the file of a table, in which the columns `vectors` hold the vectors;
/// an index of vectors (npy) is a Parquet file.
pub(super) fn content(
    table: &RecordBatch,
    format: TableFormat,
    vectors: &[String],
    metadata: &str,
) -> anyhow::Result<Bytes> {
    match format {
        TableFormat::Arrow => arrow(table),
        TableFormat::Parquet | TableFormat::Npy => parquet(table, vectors, metadata),
    }
}

/// Milliseconds of a day.
const DAY_MS: i64 = 24 * 60 * 60 * 1000;

/// True if a table has dates in milliseconds (date64), each a whole day.
/// Parquet has only dates in days, and other readers would find numbers without
/// a meaning in a column that was written otherwise.
fn has_dates_in_ms(table: &RecordBatch) -> bool {
    let dates = table
        .columns()
        .iter()
        .filter_map(|column| column.as_primitive_opt::<Date64Type>());
    let mut found = false;
    for column in dates {
        found = true;
        if column.iter().flatten().any(|date| date % DAY_MS != 0) {
            return false;
        }
    }
    found
}

fn parquet(table: &RecordBatch, vectors: &[String], metadata: &str) -> anyhow::Result<Bytes> {
    // Coerced types have another name for the values of lists, too.
    let coerces = has_dates_in_ms(table);
    let value = if coerces { "element" } else { "item" };
    // The numbers of a vector neither repeat nor compress, and nobody needs
    // their largest or smallest.
    let vectors = vectors.iter().map(|name| {
        let path = [name.as_str(), "list", value];
        ColumnPath::from(path.map(str::to_owned).to_vec())
    });
    // Readers that know Arrow's schema find the metadata there; others find it
    // here.
    let about = KeyValue::new(METADATA_KEY.to_owned(), metadata.to_owned());
    let mut properties = WriterProperties::builder()
        .set_compression(Compression::SNAPPY)
        .set_key_value_metadata(Some(vec![about]))
        .set_coerce_types(coerces);
    for column in vectors {
        properties = properties
            .set_column_compression(column.clone(), Compression::UNCOMPRESSED)
            .set_column_dictionary_enabled(column.clone(), false)
            .set_column_statistics_enabled(column, EnabledStatistics::None);
    }
    let properties = Some(properties.build());
    let mut writer = ArrowWriter::try_new(Vec::new(), table.schema(), properties)?;
    writer.write(table)?;
    Ok(writer.into_inner()?.into())
}

fn arrow(table: &RecordBatch) -> anyhow::Result<Bytes> {
    let mut writer = arrow_ipc::writer::FileWriter::try_new(Vec::new(), &table.schema())?;
    writer.write(table)?;
    writer.finish()?;
    Ok(writer.into_inner()?.into())
}

/// Makes a file of version 1.0 of NumPy's format.
fn npy(vectors: &[&[u8]], shape: &VectorShape) -> anyhow::Result<Bytes> {
    const MAGIC: &[u8] = b"\x93NUMPY\x01\x00";
    /// Multiple to which the header is padded, so that the numbers are aligned
    /// in memory.
    const ALIGNMENT: usize = 64;
    let kind = match shape.dtype {
        Dtype::F32 => "<f4",
        Dtype::F16 => "<f2",
    };
    let (rows, dimension) = (vectors.len(), shape.dimension);
    let mut header =
        format!("{{'descr': '{kind}', 'fortran_order': False, 'shape': ({rows}, {dimension}), }}");
    let before = MAGIC.len() + 2;
    let padded = (before + header.len() + 1).next_multiple_of(ALIGNMENT) - before;
    header.push_str(&" ".repeat(padded - header.len() - 1));
    header.push('\n');
    let mut file = Vec::with_capacity(before + padded + rows * shape.bytes());
    file.extend_from_slice(MAGIC);
    file.extend_from_slice(&u16::try_from(padded)?.to_le_bytes());
    file.extend_from_slice(header.as_bytes());
    for vector in vectors {
        file.extend_from_slice(vector);
    }
    Ok(file.into())
}

#[cfg(test)]
mod tests {
    use arrow_array::Int64Array;
    use arrow_array::types::{Float32Type, Int64Type};
    use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

    use super::*;

    fn rows() -> Vec<TableRow> {
        let kept = |n: i64| {
            let column: ArrayRef = Arc::new(Int64Array::from(vec![n]));
            Some(RecordBatch::try_from_iter([("label", column)]).unwrap())
        };
        let vector = |values: [f32; 2]| {
            let bytes = values.iter().flat_map(|value| value.to_le_bytes());
            Ok(PoolAnswer::Embedding(bytes.collect::<Vec<u8>>().into()))
        };
        let row = |id: &str, n: i64, outcome| TableRow {
            row: n.unsigned_abs() - 1,
            id: id.to_owned(),
            kept: kept(n),
            outcome,
        };
        vec![
            row("a", 1, vector([1.0, 2.0])),
            row("b", 2, Err(ImageFault::invalid("image: no".to_owned()))),
            row("c", 3, vector([3.0, 4.0])),
        ]
    }

    fn made(format: TableFormat) -> Vec<(String, Bytes)> {
        let shape = TableShape {
            format,
            values: StoredValues::Embedding(VectorShape {
                layers: None,
                dimension: 2,
                dtype: Dtype::F32,
            }),
            metadata: r#"{"digest":"x"}"#.to_owned(),
        };
        let id = PartId::of(3, 1);
        let files_made = files(id, rows(), &shape).unwrap();
        assert_eq!(files_made, files(id, rows(), &shape).unwrap());
        files_made
    }

    #[test]
    fn good_rows_are_in_the_table_and_bad_ones_in_the_error_file() {
        let files = made(TableFormat::Parquet);
        assert_eq!(files[0].0, "part-00003-00001.parquet");
        let reader = ParquetRecordBatchReaderBuilder::try_new(files[0].1.clone()).unwrap();
        let about = reader
            .metadata()
            .file_metadata()
            .key_value_metadata()
            .unwrap();
        assert!(about.iter().any(|pair| pair.key == METADATA_KEY));
        let table = reader.build().unwrap().next().unwrap().unwrap();
        assert_eq!(table.column(0).as_string::<i32>().value(1), "c");
        let vectors = table.column(1).as_fixed_size_list();
        let second = vectors.value(1);
        assert_eq!(
            second.as_primitive::<Float32Type>().values()[..],
            [3.0, 4.0]
        );
        assert_eq!(
            table.column(2).as_primitive::<Int64Type>().values()[..],
            [1, 3]
        );
        assert_eq!(files[1].0, "errors/errors-00003-00001.jsonl");
        assert_eq!(
            files[1].1,
            "{\"id\":\"b\",\"code\":\"INVALID_ARGUMENT\",\"message\":\"image: no\"}\n"
        );
    }

    #[test]
    fn arrow_has_the_same_table() {
        let files = made(TableFormat::Arrow);
        let content = std::io::Cursor::new(files[0].1.clone());
        let mut reader = arrow_ipc::reader::FileReader::try_new(content, None).unwrap();
        assert!(reader.schema().metadata().contains_key(METADATA_KEY));
        assert_eq!(reader.next().unwrap().unwrap().num_rows(), 2);
    }

    #[test]
    fn numpy_has_a_header_of_64_bytes_and_an_index_beside_it() {
        let files = made(TableFormat::Npy);
        let names: Vec<&str> = files.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(
            names,
            [
                "img_emb/img_emb_00003-00001.npy",
                "metadata/metadata_00003-00001.parquet",
                "errors/errors-00003-00001.jsonl"
            ]
        );
        let npy = &files[0].1;
        assert_eq!(npy.len(), 128 + 16);
        assert_eq!(usize::from(u16::from_le_bytes([npy[8], npy[9]])) + 10, 128);
        assert!(
            npy[10..].starts_with(b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 2), }")
        );
        assert_eq!(npy[127], b'\n');
        assert_eq!(npy[140..], 4.0_f32.to_le_bytes());
    }
}
