//! `imagegpt embed` over tables, lists and URLs that are made in unusual ways:
//! each image is a row or an error line under its own name, and a job that can
//! never succeed says so before any work.
//!
//! Small files that went wrong once are in tests/data/tables; the tests make
//! others of the same kinds themselves.

#![warn(clippy::disallowed_methods)]

mod columns;
mod environment;
mod ids;
mod lists;
#[path = "../process/mod.rs"]
mod process;
mod server;
mod stores;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;

use arrow_array::cast::AsArray as _;
use arrow_array::{ArrayRef, BinaryArray, RecordBatch};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use parquet::file::properties::WriterProperties;
use serde_json::Value;

use crate::process::{Worker, said};

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/models/untrained");

/// Exit codes of the command.
const FAILED: i32 = 1;
const REFUSED: i32 = 2;

/// Starts a worker whose runs take no time.
fn worker() -> Worker {
    let flags = ["--model", MODEL, "--fake-engine", "0s"];
    Worker::start(&flags, Stdio::null())
}

/// Returns the path of a file that went wrong once.
fn case(name: &str) -> PathBuf {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/data/tables")).join(name)
}

/// Makes the command `imagegpt embed` without a worker. No variable of this
/// machine names credentials.
fn command(inputs: &[impl AsRef<Path>], output: &Path) -> Command {
    let mut command = process::program();
    command
        .arg("embed")
        .args(inputs.iter().map(AsRef::as_ref))
        .arg("--output")
        .arg(output)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    for (name, _) in std::env::vars_os() {
        let text = name.to_string_lossy();
        if text.starts_with("AWS_") || text.to_ascii_lowercase().ends_with("_proxy") {
            command.env_remove(name);
        }
    }
    command
}

/// Makes the same command with a worker.
fn embed(inputs: &[impl AsRef<Path>], output: &Path, worker: &Worker) -> Command {
    let mut command = command(inputs, output);
    command.args(["--endpoint", &worker.url(), "--give-up-after", "20s"]);
    command
}

/// Runs a command that must succeed, and returns the JSON that it printed.
fn done(command: &mut Command) -> Value {
    let output = command.output().expect("a run");
    assert!(output.status.success(), "{}", said(&output));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// Runs a command that must be refused before any work, with these words.
fn refused(command: &mut Command, output: &Path, words: &[&str]) -> Output {
    let ended = command.output().expect("a run");
    assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
    for word in words {
        assert!(said(&ended).contains(word), "{word}: {}", said(&ended));
    }
    assert!(!output.join("_imagegpt").exists(), "{}", said(&ended));
    ended
}

/// Makes image `n`, different for each number.
fn image(n: u8) -> Vec<u8> {
    let picture = image::RgbImage::from_fn(8, 8, |x, y| {
        let place = u8::try_from(x * 8 + y).expect("few");
        image::Rgb([place.wrapping_mul(n | 1), n, place])
    });
    let mut file = std::io::Cursor::new(Vec::new());
    picture
        .write_to(&mut file, image::ImageFormat::Png)
        .expect("a PNG");
    file.into_inner()
}

/// Makes a column of images.
fn images(numbers: std::ops::Range<u8>) -> ArrayRef {
    let images: Vec<Vec<u8>> = numbers.map(image).collect();
    let column: BinaryArray = images.iter().map(|image| Some(&image[..])).collect();
    Arc::new(column)
}

/// Makes a table with the column `image` and others beside it.
fn table(numbers: std::ops::Range<u8>, columns: &[(&str, ArrayRef)]) -> RecordBatch {
    let mut all = vec![("image", images(numbers))];
    all.extend(columns.iter().cloned());
    RecordBatch::try_from_iter(all).expect("a table")
}

/// Writes a Parquet file with one row group per table.
fn parquet(at: &Path, tables: &[RecordBatch], properties: Option<WriterProperties>) {
    std::fs::create_dir_all(at.parent().expect("a folder")).expect("a folder");
    let file = std::fs::File::create(at).expect("a file");
    let writer = ArrowWriter::try_new(file, tables[0].schema(), properties);
    let mut writer = writer.expect("a writer");
    for table in tables {
        writer.write(table).expect("rows");
        writer.flush().expect("a row group");
    }
    writer.close().expect("an end");
}

/// Writes an Arrow file with one batch per table.
fn arrow(at: &Path, tables: &[RecordBatch]) {
    let file = std::fs::File::create(at).expect("a file");
    let writer = arrow_ipc::writer::FileWriter::try_new(file, &tables[0].schema());
    let mut writer = writer.expect("a writer");
    for table in tables {
        writer.write(table).expect("rows");
    }
    writer.finish().expect("an end");
}

/// Returns the tables of the output, in the order of their names.
fn tables(output: &Path) -> Vec<RecordBatch> {
    let mut names: Vec<PathBuf> = std::fs::read_dir(output)
        .expect("an output")
        .map(|entry| entry.expect("an entry").path())
        .filter(|path| path.is_file())
        .collect();
    names.sort();
    let mut tables = Vec::new();
    for path in names {
        let content = std::fs::read(&path).expect("a file");
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(content));
        for table in reader.expect("Parquet").build().expect("a reader") {
            tables.push(table.expect("rows"));
        }
    }
    tables
}

/// Returns the ids of all rows, in their order.
fn ids(output: &Path) -> Vec<String> {
    let ids = |table: &RecordBatch| {
        let ids = table.column(0).as_string::<i32>();
        ids.iter()
            .map(|id| id.expect("an id").to_owned())
            .collect::<Vec<_>>()
    };
    tables(output).iter().flat_map(ids).collect()
}

/// Returns code and message of each error line by its id.
fn errors(output: &Path) -> BTreeMap<String, (String, String)> {
    let mut errors = BTreeMap::new();
    let Ok(files) = std::fs::read_dir(output.join("errors")) else {
        return errors;
    };
    for file in files {
        let content = std::fs::read_to_string(file.expect("an entry").path());
        for line in content.expect("a file").lines() {
            let line: Value = serde_json::from_str(line).expect("JSON");
            let text = |key: &str| line[key].as_str().expect("text").to_owned();
            let twice = errors.insert(text("id"), (text("code"), text("message")));
            assert!(twice.is_none(), "an id has two errors");
        }
    }
    errors
}
