//! Tables with a column for each of several layers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use arrow_array::cast::AsArray as _;
use arrow_array::types::Float32Type;
use parquet::arrow::arrow_reader::ParquetRecordBatchReaderBuilder;
use serde_json::Value;

use crate::process::said;
use crate::{REFUSED, done, embed, files, tree};

const MODEL: &str = concat!(
    env!("CARGO_MANIFEST_DIR"),
    "/tests/data/models/micro-checkpoint"
);

/// Makes the command for a model of two layers, whose features of layers 0 and
/// 1 come from one run.
fn job(dir: &Path, input: &Path, output: &Path) -> Command {
    let mut command = embed(input, output, &[]);
    command
        .args(["--model", MODEL, "--serve", "--feature-layer 1"])
        .env("IMAGEGPT_CACHE_DIR", dir.join("cache"));
    command
}

/// Returns the vectors of a table by column, and the options in its metadata.
fn vectors(output: &Path) -> (BTreeMap<String, Vec<f32>>, Value) {
    let content = files(output).remove("part-00000-00000.parquet");
    let content = bytes::Bytes::from(content.expect("a part"));
    let reader = ParquetRecordBatchReaderBuilder::try_new(content).expect("Parquet");
    let about = reader.schema().metadata()["imagegpt"].clone();
    let about: Value = serde_json::from_str(&about).expect("JSON");
    let batch = reader.build().expect("a reader").next().expect("a batch");
    let batch = batch.expect("rows");
    let schema = batch.schema();
    let columns = schema.fields().iter().zip(batch.columns()).skip(1);
    let columns = columns.map(|(field, column)| {
        let values = column.as_fixed_size_list().values();
        let values = values.as_primitive::<Float32Type>().values().to_vec();
        (field.name().clone(), values)
    });
    (columns.collect(), about["options"].clone())
}

#[test]
fn each_layer_is_a_column_with_the_vectors_of_a_job_of_its_own() {
    let dir = tempfile::tempdir().expect("a folder");
    let at = |name: &str| -> PathBuf { dir.path().join(name) };
    let input = tree(dir.path(), 5);
    let run = |name: &str, flags: &[&str]| {
        done(job(dir.path(), &input, &at(name)).args(flags));
        vectors(&at(name))
    };
    let (all, options) = run("all", &["--layers", "all"]);
    assert_eq!(options["--layers"], "0,1");
    assert_eq!(options["--layer"], Value::Null);
    for layer in ["0", "1"] {
        let (alone, _) = run(&format!("layer-{layer}"), &["--layer", layer]);
        assert!(alone["embedding"].iter().any(|value| *value != 0.0));
        assert_eq!(alone["embedding"], all[&format!("embedding_{layer}")]);
    }
    assert_ne!(all["embedding_0"], all["embedding_1"]);
    let (named, options) = run("named", &["--layers", "1,0,1"]);
    assert_eq!((&named, &options["--layers"]), (&all, &"0,1".into()));
    let (raw, _) = run("raw", &["--layers", "all", "--norm", "none"]);
    assert!(raw.keys().eq(all.keys()) && raw != all);
    let (one, _) = run("one", &["--layers", "1"]);
    assert_eq!(one.keys().collect::<Vec<_>>(), ["embedding_1"]);

    // NumPy's files have a directory for each layer.
    done(job(dir.path(), &input, &at("npy")).args(["--layers", "0,1", "--format", "npy"]));
    for layer in ["0", "1"] {
        let name = format!("img_emb_{layer}/img_emb_00000-00000.npy");
        let content = files(&at("npy")).remove(&name).expect("a file");
        let values = content[content.len() - 4 * all["embedding_0"].len()..].chunks_exact(4);
        let values = values.map(|b| f32::from_le_bytes(b.try_into().expect("4 bytes")));
        assert_eq!(
            values.collect::<Vec<_>>(),
            all[&format!("embedding_{layer}")]
        );
    }
    // A part with a lost file is done again.
    let lost = at("npy/img_emb_1/img_emb_00000-00000.npy");
    std::fs::remove_file(&lost).expect("a file");
    done(job(dir.path(), &input, &at("npy")).args(["--layers", "0,1", "--format", "npy"]));
    assert!(lost.exists());
}

#[test]
fn layers_that_cannot_be_had_together_are_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let input = tree(dir.path(), 2);
    let output = dir.path().join("output");
    for (flags, expected) in [
        (
            &["--layers", "0,2"][..],
            "--layers 2: the workers' model micro-checkpoint computes in one run layers 0 to 1",
        ),
        (&["--layers", "7"], "--layers 7"),
        (
            &["--layers", "0,x"],
            "layers must be numbers such as 8,12,16, or all",
        ),
        (&["--layers", "0", "--layer", "1"], "cannot be used with"),
        (
            &["--layers", "0", "--task", "score"],
            "--layers can only be used with --task embed",
        ),
        (
            &["--layers", "0", "--pooling", "last"],
            "--layers can only be used with --pooling mean",
        ),
    ] {
        let ended = job(dir.path(), &input, &output).args(flags).output();
        let ended = ended.expect("a run");
        assert_eq!(ended.status.code(), Some(REFUSED), "{}", said(&ended));
        assert!(
            said(&ended).contains(expected),
            "{flags:?}: {}",
            said(&ended)
        );
        assert!(!output.join("_imagegpt").exists(), "{flags:?}");
    }
}
