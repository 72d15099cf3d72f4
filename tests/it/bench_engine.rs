//! `imagegpt bench engine` on a model with random weights, on the CPU.

use std::path::Path;

use clap::Parser;
use imagegpt::commands::bench;
use imagegpt::commands::bench::flags::BenchArgs;
use imagegpt::compile::{CompileOptions, ModelSource, Silent, compile};
use imagegpt::engine::onnx;
use imagegpt::kernels::whole::has_bf16_products;
use imagegpt::model::precision::{CompileTask, Provider};
use imagegpt::runtime::Runtime;
use serde_json::Value;

use crate::harness;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    bench: BenchArgs,
}

/// Runs the command, and returns its table or its error.
fn run(arguments: &[&str]) -> Result<String, String> {
    let all = ["bench", "engine"].iter().chain(arguments);
    let args = Cli::try_parse_from(all)
        .expect("arguments that parse")
        .bench;
    let mut table = Vec::new();
    bench::run(&args, &mut table).map_err(|error| format!("{error:#}"))?;
    Ok(String::from_utf8(table).expect("text"))
}

#[test]
fn every_graph_is_measured_beside_the_roofline() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (json, cache) = (path("result.json"), path("cache"));
    let serve = format!("--cache-dir {cache}");
    let arguments = [
        "--model",
        "random:tiny",
        "--execution-provider",
        "cpu",
        "--batch-sizes",
        "1,2",
        "--generate-slots",
        "2",
        "--rounds",
        "2",
        "--seconds",
        "1ms",
        "--serve",
        &serve,
        "--json",
        &json,
    ];
    let table = run(&arguments).expect("a run");
    assert!(
        table.contains("roofline:") && table.contains("random weights"),
        "{table}"
    );
    let said: Value = serde_json::from_slice(&std::fs::read(&json).expect("--json")).expect("JSON");
    let findings = &said["findings"];
    let ceiling = findings["roofline"]["tflop_per_second"].as_f64();
    assert!(ceiling.is_some_and(|rate| rate > 0.0), "{findings:#}");
    let graphs = findings["graphs"].as_array().expect("graphs");
    let names: Vec<(&str, u64)> = graphs
        .iter()
        .filter_map(|row| Some((row["graph"].as_str()?, row["batch_size"].as_u64()?)))
        .collect();
    let expected = ["features", "features_raw", "hidden", "score"]
        .iter()
        .flat_map(|name| [(*name, 1), (*name, 2)]);
    assert_eq!(names, expected.collect::<Vec<_>>());
    for row in graphs {
        assert!(row["runs"].as_u64() >= Some(2), "{row:#}");
        let number = |name: &str| row[name].as_f64().expect("a number");
        // What is printed follows from what was measured.
        let flop = number("flop_per_image") * number("images_per_second");
        assert!((flop / 1e12 / number("tflop_per_second") - 1.0).abs() < 1e-9);
        let share = number("tflop_per_second") / ceiling.unwrap_or(0.0);
        assert!((share / number("roofline_share") - 1.0).abs() < 1e-9);
    }
    let steps: Vec<(u64, u64)> = findings["generate"]
        .as_array()
        .expect("steps")
        .iter()
        .filter(|row| row["tokens_per_second"].as_f64() > Some(0.0))
        .filter_map(|row| Some((row["slots"].as_u64()?, row["past"].as_u64()?)))
        .collect();
    // With two slots a worker's steps have one row or two.
    let expected = [1, 2].map(|slots| [1, 512, 1023].map(|past| (slots, past)));
    assert_eq!(steps, expected.as_flattened());
}

/// ONNX Runtime has no product of bfloat16 on a CPU, so the ceiling of such a model
/// is one of floats there.
#[test]
fn bf16_on_a_cpu_is_measured_beside_a_product_of_floats() {
    let folder = tempfile::tempdir().expect("a folder");
    let cache = folder.path().join("cache").display().to_string();
    let serve = format!("--cache-dir {cache} --precision bf16");
    let ran = run(&[
        "--model",
        "random:tiny",
        "--execution-provider",
        "cpu",
        "--graphs",
        "features",
        "--batch-sizes",
        "1",
        "--generate-slots",
        "0",
        "--rounds",
        "1",
        "--seconds",
        "1ms",
        "--serve",
        &serve,
    ]);
    if has_bf16_products() {
        let table = ran.expect("a run");
        assert!(table.contains("bf16 on cpu"), "{table}");
        assert!(table.contains("matrices, fp32"), "{table}");
    } else {
        let error = ran.expect_err("refused");
        assert!(error.contains("AVX512_BF16 or AMX-BF16"), "{error}");
    }
}

#[test]
fn a_model_is_compared_with_its_reference() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = |name: &str| folder.path().join(name).display().to_string();
    let (json, fp32) = (path("result.json"), path("fp32"));
    let environment = onnx::environment(&onnx::find_library(None)).expect("the library");
    let runtime = Runtime::new(environment, Provider::Cpu).expect("a runtime");
    let options = CompileOptions {
        tasks: Some([CompileTask::Embed].into()),
        ..CompileOptions::default()
    };
    let source = ModelSource::parse("random:tiny", None);
    compile(&source, Path::new(&fp32), &options, &runtime, &mut Silent).expect("compiled");
    let serve = format!("--cache-dir {} --precision int8", path("cache"));
    let against = |model: &str| {
        run(&[
            "--model",
            model,
            "--reference",
            &fp32,
            "--execution-provider",
            "cpu",
            "--graphs",
            "features",
            "--batch-sizes",
            "1",
            "--generate-slots",
            "0",
            "--rounds",
            "1",
            "--seconds",
            "1ms",
            "--serve",
            &serve,
            "--json",
            &json,
        ])
    };
    let nearness = || -> (f64, f64) {
        let text = std::fs::read(&json).expect("--json");
        let said: Value = serde_json::from_slice(&text).expect("JSON");
        let row = &said["findings"]["nearness"][0];
        assert_eq!(row["graph"], "features");
        let number = |name: &str| row[name].as_f64().expect("a number");
        (number("relative_error"), number("cosine"))
    };
    let table = against(&fp32).expect("a run");
    assert!(table.contains("against the reference"), "{table}");
    // The same folder gives the same numbers.
    assert_eq!(nearness().0, 0.0);
    against("random:tiny").expect("a run in int8");
    let (error, cosine) = nearness();
    assert!((1e-5..5e-2).contains(&error), "{error}");
    assert!((0.998..1.0).contains(&cosine), "{cosine}");
    let other = harness::model_dir("micro-checkpoint");
    let other = against(&other.display().to_string()).expect_err("other weights");
    assert!(other.contains("other weights"), "{other}");
}

#[test]
fn what_cannot_be_measured_is_refused() {
    let refused = |arguments: &[&str], word: &str| {
        let error = run(arguments).expect_err("a refusal");
        assert!(error.contains(word), "{error}");
    };
    refused(&["--model", "random:xyz"], "random:xyz");
    refused(
        &["--model", "random:tiny", "--batch-sizes", "2,1"],
        "must be in ascending order",
    );
    refused(
        &["--model", "random:tiny", "--graphs", "pixels"],
        "no graph pixels",
    );
    // Before anything is loaded: there is no such model either.
    refused(
        &["--model", "random:xyz", "--json", "/nowhere/result.json"],
        "--json /nowhere/result.json cannot be written",
    );
    refused(
        &["--model", "random:xyz", "--plot", "latency.svg"],
        "--plot is for modes that load a worker",
    );
    let nothing = ["--graphs", "generate", "--generate-slots", "0"];
    refused(
        &[&["--model", "random:xyz"], &nothing[..]].concat(),
        "leaves nothing to measure",
    );
}
