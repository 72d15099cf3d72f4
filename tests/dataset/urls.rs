//! Tables whose rows name their images: a column of URLs, and images of Hugging
//! Face's that have a path and no bytes.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use arrow_array::cast::AsArray as _;
use arrow_array::{
    ArrayRef, BinaryArray, Int64Array, LargeStringArray, RecordBatch, StringArray, StructArray,
};
use arrow_schema::{DataType, Field};
use parquet::arrow::ArrowWriter;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;

use crate::process::said;
use crate::{
    REFUSED, TOO_MANY_ERRORS, done, embed, error_lines, files, id, image, rows, start, tree, web,
};

fn parquet(at: PathBuf, columns: Vec<(&str, ArrayRef)>) -> PathBuf {
    let batch = RecordBatch::try_from_iter_with_nullable(
        columns
            .into_iter()
            .map(|(name, column)| (name, column, true)),
    );
    let batch = batch.expect("a table");
    let file = std::fs::File::create(&at).expect("a file");
    let mut writer = ArrowWriter::try_new(file, batch.schema(), None).expect("a writer");
    writer.write(&batch).expect("rows");
    writer.close().expect("an end");
    at
}

fn arrow(at: PathBuf, columns: Vec<(&str, ArrayRef)>) -> PathBuf {
    let batch = RecordBatch::try_from_iter(columns).expect("a table");
    let file = std::fs::File::create(&at).expect("a file");
    let writer = arrow_ipc::writer::FileWriter::try_new(file, &batch.schema());
    let mut writer = writer.expect("a writer");
    writer.write(&batch).expect("rows");
    writer.finish().expect("an end");
    at
}

/// Returns id and message of each line in the error files.
fn messages(output: &Path) -> BTreeMap<String, String> {
    let files = files(output).into_iter();
    let errors = files.filter(|(name, _)| name.starts_with("errors/"));
    let lines = errors.flat_map(|(_, content)| {
        let text = String::from_utf8(content).expect("UTF-8");
        text.lines().map(str::to_owned).collect::<Vec<_>>()
    });
    lines
        .map(|line| {
            let line: serde_json::Value = serde_json::from_str(&line).expect("JSON");
            let text = |key: &str| line[key].as_str().expect("text").to_owned();
            (text("id"), text("message"))
        })
        .collect()
}

/// Returns URLs and paths of a table in `dir`: those of rows 0, 4, 5 and 9 are
/// images.
fn urls(dir: &Path, web: SocketAddr) -> Vec<Option<String>> {
    let at = |name: &str| dir.join(name);
    vec![
        Some(format!("http://{web}/good/1.png?size=large")),
        None,
        Some(format!("http://{web}/410/1.png")),
        Some(String::new()),
        Some(format!("http://{web}/later/1.png")),
        Some("tree/00001.png".to_owned()),
        Some("tree/gone.png".to_owned()),
        Some(format!("http://{web}/{}", "x".repeat(9000))),
        Some(format!("http://{web}/500/1.png")),
        Some(at("tree/00002.png").to_str().expect("UTF-8").to_owned()),
        Some("zip://a.png".to_owned()),
    ]
}

#[test]
fn each_url_of_a_table_is_a_row_or_an_error_with_the_id_of_its_row() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    tree(dir.path(), 3);
    let urls = urls(dir.path(), web());
    let n_rows = urls.len();
    let captions: Vec<String> = (0..n_rows).map(|n| format!("caption {n}")).collect();
    let numbers = Int64Array::from_iter_values((0..n_rows).map(|n| n.try_into().expect("few")));
    let columns = |column: ArrayRef| {
        vec![
            (
                "caption",
                Arc::new(StringArray::from(captions.clone())) as ArrayRef,
            ),
            ("link", column),
            ("number", Arc::new(numbers.clone()) as ArrayRef),
        ]
    };
    let small = || Arc::new(urls.iter().cloned().collect::<StringArray>()) as ArrayRef;
    let large = || Arc::new(urls.iter().cloned().collect::<LargeStringArray>()) as ArrayRef;
    let expected = [
        (
            1,
            "INVALID_ARGUMENT",
            "the row has no URL (--url-column link)",
        ),
        (2, "NOT_FOUND", "/410/1.png: the server answered 410"),
        (
            3,
            "INVALID_ARGUMENT",
            "the row has no URL (--url-column link)",
        ),
        (6, "NOT_FOUND", "tree/gone.png: there is no such file"),
        (7, "INVALID_ARGUMENT", "the limit is 8192"),
        (
            8,
            "UNAVAILABLE",
            "also after retries for 1s (--url-patience)",
        ),
        (10, "INVALID_ARGUMENT", "zip:// is not supported"),
    ];
    for (name, input) in [
        ("t.parquet", parquet(at("t.parquet"), columns(small()))),
        ("l.parquet", parquet(at("l.parquet"), columns(large()))),
        ("t.arrow", arrow(at("t.arrow"), columns(small()))),
    ] {
        let output = at(&format!("o-{name}"));
        let flags = [
            "--url-column",
            "link",
            "--keep",
            "caption,number",
            "--url-patience",
            "1s",
        ];
        let summary = done(embed(&input, &output, &workers).args(flags));
        assert_eq!(summary["images"], n_rows, "{name}");
        let read: Vec<String> = rows(&output).into_keys().collect();
        let of_row = |row: usize| format!("{name}#{row}");
        assert_eq!(read, [0, 4, 5, 9].map(of_row), "{name}");
        let codes: BTreeMap<String, String> = error_lines(&output).into_iter().collect();
        let messages = messages(&output);
        assert_eq!(codes.len(), expected.len(), "{codes:?}");
        for (row, code, message) in expected {
            assert_eq!(codes[&of_row(row)], code, "{name} {row}");
            let found = &messages[&of_row(row)];
            assert!(found.contains(message), "{name} {row}: {found}");
        }
        // The kept columns are those of the rows that could be read.
        let part = files(&output)["part-00000-00000.parquet"].clone();
        let reader = ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(part));
        let batch = reader.expect("Parquet").build().expect("a reader").next();
        let batch = batch.expect("a batch").expect("rows");
        let kept = batch
            .column_by_name("caption")
            .expect("kept")
            .as_string::<i32>();
        let kept: Vec<&str> = kept.iter().flatten().collect();
        assert_eq!(kept, ["caption 0", "caption 4", "caption 5", "caption 9"]);
    }
}

#[test]
fn ids_of_a_table_of_urls_are_those_of_a_column_and_its_errors_count() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    tree(dir.path(), 3);
    let urls = urls(dir.path(), web());
    let captions = (0..urls.len()).map(|n| Some(format!("caption {n}")));
    let columns: Vec<(&str, ArrayRef)> = vec![
        ("caption", Arc::new(captions.collect::<StringArray>())),
        ("link", Arc::new(urls.into_iter().collect::<StringArray>())),
    ];
    let input = parquet(at("t.parquet"), columns);
    let output = at("o-ids");
    let flags = [
        "--url-column",
        "link",
        "--id-column",
        "caption",
        "--url-patience",
        "1s",
    ];
    done(embed(&input, &output, &workers).args(flags));
    let read: Vec<String> = rows(&output).into_keys().collect();
    assert_eq!(read, [0, 4, 5, 9].map(|n| format!("caption {n}")));
    assert!(messages(&output).contains_key("caption 8"));
    let mut few = embed(&input, &at("o-few"), &workers);
    let ended = few.args(flags).args(["--max-errors", "3"]).output();
    let ended = ended.expect("a run");
    assert_eq!(
        ended.status.code(),
        Some(TOO_MANY_ERRORS),
        "{}",
        said(&ended)
    );
}

#[test]
fn a_csv_and_a_list_in_jsonl_have_a_column_of_urls_too() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    tree(dir.path(), 3);
    let web = web();
    let csv = format!(
        "caption,path,link\none,no,http://{web}/good/1.png\ntwo,no,\nthree,no,tree/00002.png\n"
    );
    std::fs::write(at("t.csv"), csv).expect("a list");
    let jsonl = format!(
        "{{\"caption\": \"one\", \"link\": \"http://{web}/good/1.png\", \"path\": \"no\"}}\n\
         {{\"caption\": \"two\", \"link\": null}}\n{{\"link\": \"tree/00002.png\"}}\nno JSON\n"
    );
    std::fs::write(at("t.jsonl"), &jsonl).expect("a list");
    std::fs::write(at("t.ndjson"), jsonl).expect("a list");
    for (name, n_errors) in [("t.csv", 1), ("t.jsonl", 2), ("t.ndjson", 2)] {
        let output = at(&format!("o-{name}"));
        let flags = ["--url-column", "link", "--keep", "caption"];
        let summary = done(embed(&at(name), &output, &workers).args(flags));
        assert_eq!(summary["errors"], n_errors, "{name}");
        let read: Vec<String> = rows(&output).into_keys().collect();
        let first = format!("http://{web}/good/1.png");
        assert_eq!(read, [first, "tree/00002.png".to_owned()], "{name}");
        let found = messages(&output);
        let second = &found[&format!("{name}#1")];
        assert!(
            second.contains("neither a path nor a URL"),
            "{name}: {second}"
        );
    }
    // Without the flag the usual names count, so every row is "no".
    let output = at("o-usual");
    done(&mut embed(&at("t.jsonl"), &output, &workers));
    assert_eq!(rows(&output).len(), 0);
}

#[test]
fn an_image_with_a_path_and_no_bytes_is_read_from_the_path() {
    const IMAGES: usize = 60;
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    let folder = tree(dir.path(), IMAGES);
    done(&mut embed(&folder, &at("o-tree"), &workers));
    let from_tree = rows(&at("o-tree"));
    // Every third row holds its image, one has nothing, and one names no file.
    let has_bytes = |n: usize| n.is_multiple_of(3);
    let content: Vec<Vec<u8>> = (0..IMAGES).map(image).collect();
    let bytes: BinaryArray = (0..IMAGES)
        .map(|n| has_bytes(n).then(|| &content[n][..]))
        .collect();
    let path: StringArray = (0..IMAGES)
        .map(|n| match n {
            7 => None,
            8 => Some("tree/none.png".to_owned()),
            _ => Some(format!("tree/{}.png", id(n))),
        })
        .collect();
    let field = |name, kind| Arc::new(Field::new(name, kind, true));
    let image = StructArray::from(vec![
        (
            field("bytes", DataType::Binary),
            Arc::new(bytes) as ArrayRef,
        ),
        (field("path", DataType::Utf8), Arc::new(path) as ArrayRef),
    ]);
    let image = || Arc::new(image.clone()) as ArrayRef;
    for (name, input) in [
        (
            "t.parquet",
            parquet(at("t.parquet"), vec![("image", image())]),
        ),
        ("t.arrow", arrow(at("t.arrow"), vec![("image", image())])),
    ] {
        let output = at(&format!("o-{name}"));
        // The memory has room for a few images only.
        let mut command = embed(&input, &output, &workers);
        done(command.args(["--image-memory", "1MiB"]));
        let found = rows(&output);
        for n in (0..IMAGES).filter(|n| ![7, 8, 42].contains(n)) {
            let expected = &from_tree[&format!("{}.png", id(n))];
            assert_eq!(&found[&format!("{name}#{n}")], expected, "{name} {n}");
        }
        let found = messages(&output);
        let expected = [42, 7, 8].map(|n| format!("{name}#{n}"));
        assert_eq!(found.keys().cloned().collect::<Vec<_>>(), expected);
        assert!(found[&format!("{name}#7")].contains("neither bytes nor a path"));
        assert!(found[&format!("{name}#8")].contains("tree/none.png: there is no such file"));
    }
}

#[test]
fn a_column_without_urls_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| dir.path().join(name);
    let workers = [start("0s")];
    let folder = tree(dir.path(), 2);
    let shards = crate::tars(dir.path(), 4, 2);
    let column: ArrayRef = Arc::new(Int64Array::from(vec![1, 2]));
    let table = parquet(
        at("t.parquet"),
        vec![("link", Arc::clone(&column)), ("n", column)],
    );
    std::fs::write(at("t.csv"), "a,b\n1,2\n").expect("a list");
    std::fs::write(at("t.txt"), "tree/00001.png\n").expect("a list");
    std::fs::write(at("t.jsonl"), "{\"a\": \"b\"}\n").expect("a list");
    let refused = |input: &Path, flags: &[&str], why: &str| {
        let mut command = embed(input, &at("none"), &workers);
        let ended = command.args(flags).output().expect("a run");
        assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
        assert!(said(&ended).contains(why), "{}", said(&ended));
    };
    let link = ["--url-column", "link"];
    refused(
        &table,
        &link,
        "--url-column link: the column holds Int64; URLs and paths are text",
    );
    refused(
        &table,
        &["--url-column", "url"],
        "--url-column url: the file has no such column",
    );
    refused(
        &at("t.csv"),
        &link,
        "--url-column link: the list has no such column",
    );
    refused(
        &at("t.jsonl"),
        &link,
        "--url-column link: the list has no such column",
    );
    refused(&at("t.txt"), &link, "a list of names without columns");
    refused(
        &folder,
        &link,
        "has no columns; give a .parquet, .arrow, .csv, .tsv or .jsonl file",
    );
    refused(&shards, &link, "has no columns");
    refused(
        &table,
        &["--url-column", "a", "--image-column", "b"],
        "cannot be used with",
    );
}
