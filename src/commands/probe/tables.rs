//! Tables that `imagegpt embed` has written, as a probe reads them: rows in the
//! order of the files, features in scratch files that are mapped into memory.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use arrow_array::cast::AsArray as _;
use arrow_array::types::{Float16Type, Float32Type, UInt16Type};
use arrow_array::{Array, ArrayRef, RecordBatch};
use arrow_schema::{DataType, Schema};
use parquet::arrow::ProjectionMask;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde::Deserialize;

use super::examples::ExampleRows;
use crate::files::scratch::ScratchFile;
use crate::probe::{FeatureMatrix, FeatureNumber};

/// Largest file of `_imagegpt/` that is read.
const NOTE_BYTES_MAX: u64 = 1 << 30;
/// Rows that are read at the same time.
const BATCH_ROWS: usize = 1024;

/// Output of a finished job of `imagegpt embed` on a disk.
#[derive(Debug)]
pub(super) struct EmbedTable {
    folder: PathBuf,
    /// Files of rows, in order.
    files: Vec<PathBuf>,
    pub(super) about: TableFacts,
    counts: TableCounts,
}

/// Facts that the manifest of a job records.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct TableFacts {
    pub(super) model: TableModel,
    /// Digest of the model's source weights; tables of older versions have none.
    #[serde(default)]
    pub(super) weights_digest: Option<String>,
    /// Options of the job, by the names of their flags.
    pub(super) options: BTreeMap<String, String>,
    #[serde(default)]
    inputs: Vec<TableInput>,
}

/// Input of a job.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
struct TableInput {
    name: String,
}

/// Counts in the summary of a finished job.
#[derive(Debug, Clone, Copy, Default, Deserialize)]
#[serde(default)]
struct TableCounts {
    rows: Option<usize>,
    errors: usize,
}

/// Model that made a table.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(super) struct TableModel {
    pub(super) name: String,
    pub(super) digest: String,
}

/// Columns of labels, parts and groups to read.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct ExampleColumns<'a> {
    pub(super) label: Option<&'a str>,
    pub(super) is_multi_label: bool,
    pub(super) part: Option<&'a str>,
    pub(super) group: Option<&'a str>,
}

/// Features of one layer, for all rows of a table.
#[derive(Debug)]
pub(super) struct LayerMatrix {
    pub(super) layer: u32,
    pub(super) features: FeatureMatrix,
}

/// True for a directory with the output of a job.
pub(super) fn is_table(input: &str) -> bool {
    Path::new(input).join("_imagegpt/manifest.json").is_file()
}

fn note(folder: &Path, name: &str) -> anyhow::Result<Option<Vec<u8>>> {
    let path = folder.join("_imagegpt").join(name);
    let length = match std::fs::metadata(&path) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        found => found.with_context(|| path.display().to_string())?.len(),
    };
    anyhow::ensure!(
        length <= NOTE_BYTES_MAX,
        "{} has {length} bytes, over the limit of {NOTE_BYTES_MAX}",
        path.display()
    );
    let content = std::fs::read(&path).with_context(|| path.display().to_string())?;
    Ok(Some(content))
}

impl EmbedTable {
    /// Opens the output of a finished job.
    ///
    /// # Errors
    ///
    /// When the job is not finished, has failed images that nobody retried, or has
    /// a format that is not read.
    pub(super) fn open(folder: &Path) -> anyhow::Result<Self> {
        let shown = folder.display();
        let manifest = note(folder, "manifest.json")?
            .with_context(|| format!("{shown} is no output of imagegpt embed"))?;
        let about: TableFacts = serde_json::from_slice(&manifest)
            .with_context(|| format!("{shown}/_imagegpt/manifest.json cannot be read"))?;
        let summary = note(folder, "summary.json")?.with_context(|| {
            format!(
                "{shown} is the output of a job that is not finished; run its command again, or \
                 `imagegpt embed --finish --output {shown}`"
            )
        })?;
        let counts: TableCounts = serde_json::from_slice(&summary)
            .with_context(|| format!("{shown}/_imagegpt/summary.json cannot be read"))?;
        let mut files = Vec::new();
        for entry in std::fs::read_dir(folder).with_context(|| shown.to_string())? {
            let path = entry.with_context(|| shown.to_string())?.path();
            let name = path.file_name().and_then(|name| name.to_str());
            let extension = path.extension().and_then(|extension| extension.to_str());
            if name.is_some_and(|name| name.starts_with("part-"))
                && matches!(extension, Some("parquet" | "arrow"))
            {
                files.push(path);
            }
        }
        files.sort_unstable();
        let is_npy = about
            .options
            .get("--format")
            .is_some_and(|format| format == "npy");
        anyhow::ensure!(
            !is_npy,
            "{shown} has the format npy; embed with --format parquet or arrow"
        );
        anyhow::ensure!(!files.is_empty(), "{shown} has no rows");
        Ok(Self {
            folder: folder.to_owned(),
            files,
            about,
            counts,
        })
    }

    /// Number of rows, if the summary of the job has it.
    pub(super) fn n_rows(&self) -> Option<usize> {
        self.counts.rows
    }

    /// Number of images that failed, and have no row.
    pub(super) fn errors(&self) -> usize {
        self.counts.errors
    }

    /// Reads the examples of all rows.
    ///
    /// # Errors
    ///
    /// When a file cannot be read, lacks a column, or a value is null.
    pub(super) fn examples(&self, columns: ExampleColumns<'_>) -> anyhow::Result<ExampleRows> {
        let named = [columns.label, columns.part, columns.group];
        let read: Vec<&str> = std::iter::once("id")
            .chain(named.into_iter().flatten())
            .collect();
        let mut rows = ExampleRows {
            ids: Vec::new(),
            labels: columns.label.map(|_| Vec::new()),
            parts: columns.part.map(|_| Vec::new()),
            groups: columns.group.map(|_| Vec::new()),
            files: (self.about.inputs.iter())
                .map(|input| input.name.clone())
                .collect(),
        };
        self.visit(&read, &mut |batch| {
            let ids = texts(batch, "id", "id", None)?;
            if let (Some(label), Some(labels)) = (columns.label, &mut rows.labels) {
                labels.extend(label_lists(batch, label, columns.is_multi_label, &ids)?);
            }
            if let (Some(name), Some(parts)) = (columns.part, &mut rows.parts) {
                parts.extend(texts(batch, name, "--split", Some(&ids))?);
            }
            if let (Some(name), Some(groups)) = (columns.group, &mut rows.groups) {
                groups.extend(texts(batch, name, "--group", Some(&ids))?);
            }
            rows.ids.extend(ids);
            Ok(())
        })?;
        if let Some(told) = self.counts.rows {
            anyhow::ensure!(
                rows.len() == told,
                "{} has {} rows, and its job has made {told}; run the job's command again",
                self.folder.display(),
                rows.len()
            );
        }
        Ok(rows)
    }

    /// Names of the columns of vectors, by their layers.
    ///
    /// # Errors
    ///
    /// When the table has none.
    pub(super) fn layers(&self) -> anyhow::Result<BTreeMap<u32, String>> {
        let options = &self.about.options;
        let shown = self.folder.display();
        let is_plain =
            |flag: &str, value: &str| options.get(flag).is_none_or(|given| given == value);
        anyhow::ensure!(
            is_plain("--task", "embed")
                && is_plain("--pooling", "mean")
                && is_plain("--normalize", "false"),
            "{shown} does not have the plain mean features that a head reads; embed without \
             --pooling and --normalize"
        );
        let number = |text: &str| -> Option<u32> { text.parse().ok() };
        let layers: Option<BTreeMap<u32, String>> =
            match (options.get("--layers"), options.get("--layer")) {
                (Some(layers), _) => layers
                    .split(',')
                    .map(|layer| Some((number(layer)?, format!("embedding_{layer}"))))
                    .collect(),
                (None, Some(layer)) => {
                    number(layer).map(|layer| BTreeMap::from([(layer, "embedding".to_owned())]))
                }
                (None, None) => None,
            };
        layers.with_context(|| format!("{shown} does not say of which layers its vectors are"))
    }

    /// Copies the features of layers into scratch files on the disk of `work`, and
    /// maps them.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or written, or lacks a layer.
    pub(super) fn features(
        &self,
        layers: &BTreeMap<u32, String>,
        work: &Path,
    ) -> anyhow::Result<Vec<LayerMatrix>> {
        let columns: Vec<&str> = layers.values().map(String::as_str).collect();
        let mut files = Vec::new();
        for _ in &columns {
            files.push(ScratchFile::create(work).with_context(|| work.display().to_string())?);
        }
        let mut shape = None;
        let mut n_rows = 0;
        self.visit(&columns, &mut |batch| {
            for (name, file) in columns.iter().zip(&mut files) {
                let (number, width, bytes) = vectors(batch, name)?;
                anyhow::ensure!(
                    *shape.get_or_insert((number, width)) == (number, width),
                    "{}: the column {name} has vectors of another kind than the others",
                    self.folder.display()
                );
                let appended = file.append(bytes);
                appended.with_context(|| format!("the features do not fit: {}", work.display()))?;
            }
            n_rows += batch.num_rows();
            Ok(())
        })?;
        let (number, width) = shape.context("the table has no rows")?;
        layers
            .keys()
            .zip(files)
            .map(|(&layer, file)| {
                let map = file.map().context("the features cannot be mapped")?;
                let features =
                    FeatureMatrix::from_mapping(Box::new(map), 0, number, n_rows, width)?;
                Ok(LayerMatrix { layer, features })
            })
            .collect()
    }

    /// Reads the color tokens of all rows.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or has none.
    pub(super) fn tokens(&self) -> anyhow::Result<Vec<Vec<u16>>> {
        let mut rows = Vec::new();
        self.visit(&["tokens"], &mut |batch| {
            let column = batch.column(0).as_fixed_size_list_opt();
            let column = column.context("the column tokens has no lists")?;
            for row in 0..batch.num_rows() {
                let tokens = column.value(row);
                let tokens = tokens.as_primitive_opt::<UInt16Type>();
                rows.push(
                    tokens
                        .context("tokens are 16-bit numbers")?
                        .values()
                        .to_vec(),
                );
            }
            Ok(())
        })?;
        Ok(rows)
    }

    /// Visits all rows in batches that have the columns `names`, in this order.
    fn visit(
        &self,
        names: &[&str],
        visit: &mut dyn FnMut(&RecordBatch) -> anyhow::Result<()>,
    ) -> anyhow::Result<()> {
        for path in &self.files {
            let mut read = || -> anyhow::Result<()> {
                let file = std::fs::File::open(path)?;
                let in_order = |batch: &RecordBatch| {
                    let places: Result<Vec<usize>, _> = names
                        .iter()
                        .map(|name| batch.schema().index_of(name))
                        .collect();
                    batch.project(&places?)
                };
                if path
                    .extension()
                    .is_some_and(|extension| extension == "arrow")
                {
                    let reader = arrow_ipc::reader::FileReader::try_new(file, None)?;
                    has_columns(&reader.schema(), names)?;
                    for batch in reader {
                        visit(&in_order(&batch?)?)?;
                    }
                    return Ok(());
                }
                let builder = ParquetRecordBatchReaderBuilder::try_new(file)?;
                has_columns(builder.schema(), names)?;
                // By place, since a name with a dot would be a path.
                let schema = builder.schema();
                let places: Result<Vec<usize>, _> =
                    names.iter().map(|name| schema.index_of(name)).collect();
                let mask = ProjectionMask::roots(builder.parquet_schema(), places?);
                for batch in builder
                    .with_projection(mask)
                    .with_batch_size(BATCH_ROWS)
                    .build()?
                {
                    visit(&in_order(&batch?)?)?;
                }
                Ok(())
            };
            read().with_context(|| path.display().to_string())?;
        }
        Ok(())
    }
}

fn has_columns(schema: &Schema, names: &[&str]) -> anyhow::Result<()> {
    for name in names {
        anyhow::ensure!(
            schema.index_of(name).is_ok(),
            "the table has no column {name:?}; its columns are {}; embed with --keep {name}",
            (schema.fields().iter())
                .map(|field| field.name().as_str())
                .collect::<Vec<_>>()
                .join(", ")
        );
    }
    Ok(())
}

/// Returns the values of a column as text. `ids` name the rows, if they are known.
fn texts(
    batch: &RecordBatch,
    name: &str,
    flag: &str,
    ids: Option<&[String]>,
) -> anyhow::Result<Vec<String>> {
    let column = batch.column_by_name(name);
    let column = column.with_context(|| format!("the table has no column {name:?}"))?;
    texts_of(column, name, flag, ids)
}

fn texts_of(
    column: &ArrayRef,
    name: &str,
    flag: &str,
    ids: Option<&[String]>,
) -> anyhow::Result<Vec<String>> {
    let text = arrow_cast::cast(column, &DataType::Utf8).with_context(|| {
        format!(
            "{flag} {name}: the column holds {}, which cannot be read as text",
            column.data_type()
        )
    })?;
    let text = text.as_string::<i32>();
    (0..text.len())
        .map(|row| {
            anyhow::ensure!(
                !text.is_null(row),
                "{flag} {name}: {} has no value",
                ids.and_then(|ids| ids.get(row))
                    .map_or("a row", String::as_str)
            );
            Ok(text.value(row).to_owned())
        })
        .collect()
}

/// Returns the labels of each row of a column.
fn label_lists(
    batch: &RecordBatch,
    name: &str,
    is_multi_label: bool,
    ids: &[String],
) -> anyhow::Result<Vec<Vec<String>>> {
    let column = batch.column_by_name(name);
    let column = column.with_context(|| format!("the table has no column {name:?}"))?;
    let lists = match column.data_type() {
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..)
            if is_multi_label =>
        {
            column
        }
        DataType::List(_) | DataType::LargeList(_) | DataType::FixedSizeList(..) => anyhow::bail!(
            "--label {name}: the column holds {}; give --multi-label for images with any number \
             of labels",
            column.data_type()
        ),
        _ => {
            let texts = texts_of(column, name, "--label", Some(ids))?;
            if !is_multi_label {
                let empty = texts.iter().position(String::is_empty);
                if let Some(id) = empty.and_then(|row| ids.get(row)) {
                    anyhow::bail!("--label {name}: {id} has an empty label");
                }
                return Ok(texts.into_iter().map(|text| vec![text]).collect());
            }
            let several = texts.iter().map(|text| {
                let labels = text.split(',').map(str::trim);
                labels
                    .filter(|label| !label.is_empty())
                    .map(str::to_owned)
                    .collect()
            });
            return Ok(several.collect());
        }
    };
    let item = std::sync::Arc::new(arrow_schema::Field::new("item", DataType::Utf8, true));
    let lists = arrow_cast::cast(lists, &DataType::List(item))
        .with_context(|| format!("--label {name}: the column holds {}", column.data_type()))?;
    let lists = lists.as_list::<i32>();
    (0..lists.len())
        .map(|row| {
            if lists.is_null(row) {
                return Ok(Vec::new());
            }
            texts_of(&lists.value(row), name, "--label", None)
        })
        .collect()
}

/// Returns the numbers of a column of vectors as bytes, one row after the other.
fn vectors<'a>(
    batch: &'a RecordBatch,
    name: &str,
) -> anyhow::Result<(FeatureNumber, usize, &'a [u8])> {
    let column = batch.column_by_name(name);
    let column = column.and_then(|column| column.as_fixed_size_list_opt());
    let column = column.with_context(|| format!("the column {name} has no vectors"))?;
    anyhow::ensure!(
        column.null_count() == 0 && column.values().null_count() == 0,
        "the column {name} has null vectors, or nulls in its vectors"
    );
    let values = column.values();
    let (number, bytes): (_, &[u8]) = match values.data_type() {
        DataType::Float32 => {
            let values = values.as_primitive::<Float32Type>().values();
            (FeatureNumber::F32, bytemuck::cast_slice(&values[..]))
        }
        DataType::Float16 => {
            let values = values.as_primitive::<Float16Type>().values();
            (FeatureNumber::F16, bytemuck::cast_slice(&values[..]))
        }
        kind => anyhow::bail!("the column {name} holds {kind}; vectors are of f32 or f16"),
    };
    let width = usize::try_from(column.value_length())?;
    anyhow::ensure!(
        bytes.len() == batch.num_rows() * width * number.n_bytes(),
        "the column {name} has vectors of different lengths"
    );
    Ok((number, width, bytes))
}
