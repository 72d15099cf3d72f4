//! `imagegpt doctor` as a process on any machine, with the real ONNX Runtime in
//! its build for CPUs, so that CUDA is never available.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::harness::model_dir;
use crate::process;

/// Source of a library that ends its process when it is loaded.
const CRASH: &str = "#include <stdlib.h>
__attribute__((constructor)) static void crash(void) { abort(); }
";

fn doctor(arguments: &[&str]) -> Output {
    let library = imagegpt::runtime::library::find_library(None);
    process::program()
        .arg("doctor")
        .args(arguments)
        .env("ORT_DYLIB_PATH", library)
        .env_remove("IMAGEGPT_EXECUTION_PROVIDER")
        // A worker's, which the tiny model is none of.
        .env("IMAGEGPT_PRECISION", "int8")
        .env("IMAGEGPT_FEATURE_LAYER", "16")
        .output()
        .expect("the program runs")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout).expect("JSON")
}

fn check<'r>(report: &'r Value, name: &str) -> &'r Value {
    let checks = report["checks"].as_array().expect("checks");
    let found = checks.iter().find(|check| check["name"] == name);
    found.unwrap_or_else(|| panic!("no check {name}: {report}"))
}

#[test]
fn the_cpu_serves_and_the_report_says_so() {
    let output = doctor(&["--format", "json"]);
    let report = json(&output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    assert_eq!(report["can_serve"], true);
    assert_eq!(report["providers"], serde_json::json!(["cpu"]));
    let inference = check(&report, "inference on cpu");
    assert_eq!(inference["result"], "ok", "{inference}");
    let found = inference["found"].as_str().expect("text");
    assert!(found.contains("tiny, graph features"), "{found}");
    assert_eq!(check(&report, "ONNX Runtime")["result"], "ok");
    assert_eq!(
        check(&report, "inference on cuda:0")["found"],
        "not tried: see above"
    );
    assert!(report["obstacles"]["cuda"].is_string(), "{report}");
}

#[test]
fn cuda_does_not_serve_and_the_report_says_why() {
    let output = doctor(&["--execution-provider", "cuda", "--format", "json"]);
    let report = json(&output);
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert_eq!(report["can_serve"], false);
    let provider = check(&report, "CUDA provider");
    assert_eq!(provider["result"], "failed");
    let todo = provider["todo"].as_str().expect("what to do");
    assert!(todo.contains("pip install onnxruntime-gpu"), "{todo}");
    let checks = report["checks"].as_array().expect("checks");
    assert!(
        checks
            .iter()
            .all(|check| check["name"] != "inference on cpu")
    );
}

#[test]
fn a_given_model_is_tried_and_said_in_a_table() {
    let model = model_dir("micro");
    let model = model.to_str().expect("UTF-8");
    let output = doctor(&["--execution-provider", "cpu", "--model", model]);
    let table = String::from_utf8(output.stdout).expect("UTF-8");
    assert_eq!(output.status.code(), Some(0), "{table}");
    let row = |name: &str| {
        let mut lines = table.lines();
        let line = lines.find(|line| line.starts_with(name));
        line.unwrap_or_else(|| panic!("no row {name}: {table}"))
    };
    assert!(row("inference on cpu").contains("ok"), "{table}");
    assert!(row("inference on cpu").contains("micro"), "{table}");
    assert!(row("CUDA").contains("not needed"), "{table}");
    assert_eq!(table.lines().last(), Some("can serve on: cpu"));
}

#[test]
fn a_model_or_library_that_cannot_be_used_fails_and_says_why() {
    let empty = tempfile::tempdir().expect("a folder");
    let empty_path = empty.path();
    let empty = empty_path.to_str().expect("UTF-8");
    let output = doctor(&["--model", empty, "--format", "json"]);
    let report = json(&output);
    assert_eq!(output.status.code(), Some(1), "{report}");
    let inference = check(&report, "inference on cpu");
    assert_eq!(inference["result"], "failed");
    let found = inference["found"].as_str().expect("text");
    assert!(found.contains(empty), "{found}");

    let text = Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml");
    let text = text.to_str().expect("UTF-8");
    let output = doctor(&["--onnxruntime", text, "--format", "json"]);
    let report = json(&output);
    assert_eq!(output.status.code(), Some(1), "{report}");
    assert_eq!(check(&report, "ONNX Runtime")["result"], "failed");

    // A library that ends its process ends that one, and not the report.
    let source = empty_path.join("crash.c");
    std::fs::write(&source, CRASH).expect("written");
    let library = empty_path.join("libcrash.so");
    let compiled = Command::new("cc")
        .args(["-shared", "-fPIC", "-o"])
        .args([&library, &source])
        .status();
    assert!(compiled.expect("a C compiler").success());
    let library = library.to_str().expect("UTF-8");
    let output = doctor(&["--onnxruntime", library, "--format", "json"]);
    let report = json(&output);
    let found = check(&report, "ONNX Runtime")["found"].to_string();
    assert!(found.contains("signal: 6 (SIGABRT)"), "{found}");
    assert_eq!(output.status.code(), Some(1), "{report}");

    // What would have to be downloaded is refused before anything is looked at.
    let output = doctor(&["--model", "openai/imagegpt-small"]);
    assert_eq!(output.status.code(), Some(2));
    let complaint = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(complaint.contains("is not a directory"), "{complaint}");
}

#[test]
fn the_library_of_a_python_environment_is_found_and_said() {
    let prefix = tempfile::tempdir().expect("a folder");
    let capi = "lib/python3.11/site-packages/onnxruntime/capi/libonnxruntime.so.1.31.1";
    let library = prefix.path().join(capi);
    let program = prefix.path().join("bin/imagegpt");
    for (file, source) in [
        (&library, imagegpt::runtime::library::find_library(None)),
        (&program, process::PROGRAM.into()),
    ] {
        std::fs::create_dir_all(file.parent().expect("a parent")).expect("made");
        std::fs::copy(source, file).expect("copied");
    }
    let output = Command::new(&program)
        .args(["doctor", "--format", "json", "--execution-provider", "cpu"])
        .env_remove("ORT_DYLIB_PATH")
        .output()
        .expect("the program runs");
    let report = json(&output);
    assert_eq!(output.status.code(), Some(0), "{report}");
    let found = check(&report, "ONNX Runtime")["found"].to_string();
    assert!(found.contains(library.to_str().expect("UTF-8")), "{found}");
    // Models are run with it, too.
    assert_eq!(check(&report, "inference on cpu")["result"], "ok");
}

#[test]
fn a_cache_that_cannot_be_made_is_told_and_devices_are_checked_as_by_serve() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("file");
    std::fs::write(&file, "").expect("written");
    let cache = |path: &str| {
        let cpu = ["--execution-provider", "cpu", "--format", "json"];
        let output = doctor(&[&cpu[..], &["--cache-dir", path]].concat());
        let report = json(&output);
        let check = check(&report, "compiled models");
        assert_eq!(check["result"], "warning", "{check}");
        check["found"].as_str().expect("text").to_owned()
    };
    let found = cache(file.to_str().expect("UTF-8"));
    assert!(found.contains("is not a directory"), "{found}");
    let found = cache("/proc/nope");
    assert!(found.contains("cannot be written (/proc: "), "{found}");

    let output = doctor(&["--device-id", "0,0"]);
    assert_eq!(output.status.code(), Some(2));
    let complaint = String::from_utf8(output.stderr).expect("UTF-8");
    assert!(complaint.contains("--device-id has 0 twice"), "{complaint}");
}
