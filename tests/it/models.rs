//! Model directories that cannot be served, and the error of each.

use std::path::Path;

use imagegpt::engine::onnx::OnnxEngine;
use imagegpt::model::Model;

use crate::{harness, process};

/// Opens and loads a directory, and returns the first error, if any.
fn complaint(dir: &Path) -> Option<String> {
    let model = match Model::open(dir, None) {
        Ok(model) => model,
        Err(error) => return Some(error.to_string()),
    };
    OnnxEngine::load(&harness::onnx_options(model))
        .err()
        .map(|error| error.to_string())
}

#[test]
fn folders_that_cannot_be_served() {
    let check = |folder: &str, words: &[&str]| {
        let complaint = complaint(&harness::model_dir(folder)).expect(folder);
        for word in words {
            assert!(
                complaint.contains(word),
                "{folder}: {complaint:?} lacks {word:?}"
            );
        }
    };
    check("unknown-input", &["model.onnx", "temperature"]);
    check("wrong-output", &["model.onnx", "last_hidden_state", "foo"]);
    check("vocab-too-small", &["vocab_size is 10", "16 colors"]);
    check("palette-short", &["vocab_size is 17", "15 colors"]);
    check(
        "palette-wrong",
        &["preprocessor_config.json", "clusters[4] has 2 numbers"],
    );
    check(
        "no-such-folder",
        &[
            "no-such-folder",
            "the directory does not exist",
            "imagegpt compile",
            "Hugging Face",
            "hub id",
        ],
    );
}

/// Loads a copy of the micro model in which one file was changed, and returns
/// the error.
fn changed(file: &str, change: impl FnOnce(serde_json::Value) -> serde_json::Value) -> String {
    let dir = copy_of("micro");
    let path = dir.path().join(file);
    let text = std::fs::read(&path).expect("a config");
    let value = change(serde_json::from_slice(&text).expect("JSON"));
    std::fs::write(&path, value.to_string()).expect("written");
    complaint(dir.path()).unwrap_or_else(|| "none".to_owned())
}

fn copy_of(folder: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(harness::model_dir(folder)).expect("the folder") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), dir.path().join(entry.file_name())).expect("a copy");
    }
    dir
}

#[test]
fn configs_that_do_not_fit() {
    let set = |file: &'static str, key: &'static str, value: serde_json::Value| {
        changed(file, move |mut config| {
            config[key] = value;
            config
        })
    };
    let preprocessor = "preprocessor_config.json";
    let check = |complaint: String, words: &str| {
        assert!(complaint.contains(words), "{complaint:?} lacks {words:?}");
    };
    check(set(preprocessor, "resample", 3.into()), "resample is 3");
    check(
        set(preprocessor, "do_normalize", false.into()),
        "do_normalize is false",
    );
    check(set(preprocessor, "size", 0.into()), "size is 0");
    check(set(preprocessor, "size", 16.into()), "n_positions is 64");
    check(
        set(
            preprocessor,
            "size",
            serde_json::json!({"height": 8, "width": 9}),
        ),
        "size is 8 x 9",
    );
    check(
        set(preprocessor, "clusters", serde_json::Value::Null),
        "clusters is missing",
    );
    check(
        set(preprocessor, "clusters", serde_json::json!([[9, 0, 0]])),
        "clusters[0] is",
    );
    check(
        set("config.json", "model_type", "gpt2".into()),
        "model_type is \"gpt2\"",
    );
    check(
        set("config.json", "n_positions", 1024.into()),
        "n_positions is 1024",
    );
    check(
        set("config.json", "problem_type", "regression".into()),
        "problem_type is",
    );
    check(
        set(
            "config.json",
            "id2label",
            serde_json::json!({"0": "a", "2": "b"}),
        ),
        "id2label has the key \"2\"",
    );
    check(
        set(
            "config.json",
            "id2label",
            serde_json::json!({"0": "a", "1": "b"}),
        ),
        "the head has 3 classes, but config.json names 2",
    );
    check(set("config.json", "n_layer", 2.into()), "none");
}

#[test]
fn files_that_are_missing_or_broken() {
    let check = |file: &str, content: Option<&[u8]>, words: &str| {
        let dir = copy_of("micro");
        let path = dir.path().join(file);
        match content {
            Some(content) => std::fs::write(&path, content).expect("written"),
            None => std::fs::remove_file(&path).expect("removed"),
        }
        let complaint = complaint(dir.path()).unwrap_or_else(|| "none".to_owned());
        assert!(
            complaint.contains(words),
            "{file}: {complaint:?} lacks {words:?}"
        );
    };
    check(
        "preprocessor_config.json",
        None,
        "missing; it holds the palette",
    );
    check(
        "preprocessor_config.json",
        Some(b"{"),
        "preprocessor_config.json: EOF",
    );
    check(
        "model.onnx",
        Some(b"not a graph"),
        "not a graph that ONNX Runtime can load",
    );
    check("config.json", None, "none");
    let empty = tempfile::tempdir().expect("a folder");
    let complaint = complaint(empty.path()).expect("nothing is there");
    assert!(
        complaint.contains("neither weights nor graphs (model.onnx or model_classification.onnx,"),
        "{complaint}"
    );
}

/// Without config.json the vocabulary is unknown; the trial run checks the
/// palette.
#[test]
fn a_vocabulary_that_does_not_fit_shows_in_the_trial_run() {
    let dir = copy_of("vocab-too-small");
    std::fs::remove_file(dir.path().join("config.json")).expect("removed");
    let complaint = complaint(dir.path()).expect("ids 10 to 16 have no row");
    assert!(
        complaint.contains("every token id (0 to 16)"),
        "{complaint}"
    );
}

/// Without config.json a palette that is too small, or a size, of another model
/// is found by the trial run.
#[test]
fn a_palette_of_another_model_shows_in_the_trial_run() {
    let check = |key: &str, value: serde_json::Value, words: &str| {
        let dir = copy_of("micro");
        std::fs::remove_file(dir.path().join("config.json")).expect("removed");
        let path = dir.path().join("preprocessor_config.json");
        let text = std::fs::read(&path).expect("a config");
        let mut config: serde_json::Value = serde_json::from_slice(&text).expect("JSON");
        config[key] = value;
        std::fs::write(&path, config.to_string()).expect("written");
        let complaint = complaint(dir.path()).expect(key);
        assert!(complaint.contains(words), "{complaint}");
    };
    check(
        "clusters",
        serde_json::json!([[0, 0, 0], [1, 1, 1]]),
        "takes token id 3, which the palette lacks",
    );
    check("size", 4.into(), "takes 17 positions");
}

#[test]
fn a_digest_follows_content_and_not_place() {
    let original = Model::open(&harness::model_dir("micro"), None).expect("a model");
    let dir = copy_of("micro");
    let copy = Model::open(dir.path(), Some("copy")).expect("a model");
    assert_eq!(copy.digest, original.digest);
    assert_eq!(
        (original.name.as_str(), copy.name.as_str()),
        ("micro", "copy")
    );
    let path = dir.path().join("model.onnx");
    let mut graph = std::fs::read(&path).expect("a graph");
    *graph.last_mut().expect("not empty") ^= 1;
    std::fs::write(&path, graph).expect("written");
    assert_ne!(
        Model::open(dir.path(), None).expect("a model").digest,
        original.digest
    );
}

#[test]
fn a_missing_library_is_one_clear_sentence() {
    // In a process of its own: the runtime is loaded once a process.
    let output = process::program()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--metrics-listen",
            "127.0.0.1:0",
        ])
        .arg("--model")
        .arg(harness::model_dir("micro"))
        .args(["--onnxruntime", "/nowhere/libonnxruntime.so"])
        .output()
        .expect("the program");
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(2), "{text}");
    assert!(
        text.contains("/nowhere/libonnxruntime.so does not exist")
            && text.contains("--onnxruntime"),
        "{text}"
    );
    assert!(!text.contains("panicked"), "{text}");
}
