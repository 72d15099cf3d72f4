//! Tables of color tokens.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::Stdio;

use arrow_array::cast::AsArray as _;
use arrow_array::types::UInt16Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use crate::{done, embed, error_lines, files, process, start, tree};

#[test]
fn tokens_are_those_of_the_command_for_a_few_images() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 50);
    let output = dir.path().join("output");
    let workers = [start("0s")];
    let summary = done(embed(&input, &output, &workers).args(["--task", "tokenize"]));
    assert_eq!(
        (&summary["rows"], &summary["errors"]),
        (&49.into(), &1.into())
    );
    assert_eq!(error_lines(&output)[0].0, "00042.png");
    let content = files(&output).remove("part-00000-00000.parquet");
    let reader =
        ParquetRecordBatchReaderBuilder::try_new(bytes::Bytes::from(content.expect("a part")));
    let batch = reader.expect("Parquet").build().expect("a reader").next();
    let batch = batch.expect("a batch").expect("rows");
    let column = batch.column_by_name("tokens").expect("tokens");
    let table: BTreeMap<String, Vec<u16>> = (0..batch.num_rows())
        .map(|row| {
            let tokens = column.as_fixed_size_list().value(row);
            let tokens = tokens.as_primitive::<UInt16Type>().values().to_vec();
            (
                batch.column(0).as_string::<i32>().value(row).to_owned(),
                tokens,
            )
        })
        .collect();
    let tokenize = process::program()
        .args(["tokenize", "--json", "--endpoint", &workers[0].url()])
        .arg(&input)
        .stdout(Stdio::piped())
        .output()
        .expect("a run");
    let lines = String::from_utf8(tokenize.stdout).expect("UTF-8");
    let mut n_lines = 0;
    for line in lines.lines() {
        let line: Value = serde_json::from_str(line).expect("JSON");
        let Some(tokens) = line["ids"].as_array() else {
            continue;
        };
        let file = Path::new(line["file"].as_str().expect("a file"));
        let id = file.file_name().expect("a name").to_str().expect("UTF-8");
        let tokens: Vec<Value> = tokens.clone();
        let found: Vec<Value> = table[id].iter().map(|token| (*token).into()).collect();
        assert_eq!(found, tokens, "{id}");
        n_lines += 1;
    }
    assert_eq!(n_lines, 49);
}
