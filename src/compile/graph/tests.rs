//! Tests of the graphs themselves: that a change of any graph is noticed, and
//! that means over positions are exact in 16 bits.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::Path;

use ort::session::Session;
use ort::value::Tensor;
use prost::Message as _;
use sha2::{Digest as _, Sha256};

use super::*;
use crate::compile::checkpoint::Checkpoint;
use crate::compile::store::{self, Parts};
use crate::compile::weights::CheckpointWeights;
use crate::compile::{Calibration, CompileOptions, ModelSource, Silent, attention, layout};
use crate::files::hex;
use crate::model::graph::Norm;
use crate::model::manifest::FORMAT;
use crate::model::onnx::TensorProto;
use crate::model::precision::CompileTask;
use crate::runtime::Runtime;
use crate::runtime::library::{environment, find_library};

/// File of the digests, which this test writes and compares.
const DIGESTS: &str = "tests/data/graphs.txt";
const N_LAYERS: usize = 3;
const FEATURE_LAYER: usize = 2;

fn runtime(has_ours: bool) -> Runtime {
    let environment = environment(&find_library(None)).expect("make setup has brought it");
    let mut runtime = Runtime::new(environment, Provider::Cpu).expect("a runtime");
    runtime.operators = runtime.operators.filter(|_| has_ours);
    runtime
}

/// Writes a checkpoint of random weights with this number of positions.
fn write_checkpoint(folder: &Path, n_positions: usize) {
    let mut progress = Silent;
    let local = ModelSource::parse("random:tiny", None).fetch(&mut progress);
    let local = local.expect("random weights");
    for entry in std::fs::read_dir(&local.folder).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), folder.join(entry.file_name())).unwrap();
    }
    let path = folder.join("config.json");
    let config = std::fs::read_to_string(&path).unwrap();
    let changed = config.replace("1024", &n_positions.to_string());
    assert_ne!(config, changed);
    std::fs::write(path, changed).unwrap();
}

/// Calls `see` with the plan of each graph, and its graph.
fn each_graph(
    n_positions: usize,
    (precision, provider, has_ours): (Precision, Provider, bool),
    mut see: impl FnMut(Graph, &GraphPlan<'_>, &Path),
) {
    let folder = tempfile::tempdir().unwrap();
    write_checkpoint(folder.path(), n_positions);
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let architecture = Architecture::read(folder.path()).unwrap();
    let weights = CheckpointWeights::new(&checkpoint, architecture);
    let runtime = runtime(has_ours);
    let options = CompileOptions {
        precision,
        provider,
        ..CompileOptions::default()
    };
    let tasks: Vec<CompileTask> = CompileTask::ALL
        .into_iter()
        .filter(|task| options.has_operators(*task))
        .collect();
    let calibration = (precision == Precision::Int8)
        .then(|| Calibration::new(&weights, N_LAYERS, |_| ()).unwrap());
    let parts = Parts {
        n_layers: N_LAYERS,
        language_head: true,
        classification_head: false,
        layout: layout(&tasks, &options, &runtime),
    };
    let formats = (precision, provider);
    let written = store::write(
        &weights,
        formats,
        parts,
        calibration.as_ref(),
        folder.path(),
        |_| (),
    );
    let mut store = written.unwrap();
    // Random weights have no classes.
    store.declare(TensorProto {
        name: "classification_head".to_owned(),
        dims: vec![7, 64],
        data_type: precision.activation(provider).into(),
        ..TensorProto::default()
    });
    for task in tasks {
        for &graph in Graph::of_task(task) {
            let plan = GraphPlan {
                architecture: &weights.architecture,
                store: &store,
                precision,
                provider,
                attention: attention(graph, &options, &runtime),
                has_ours,
                feature_layer: FEATURE_LAYER,
            };
            see(graph, &plan, folder.path());
        }
    }
}

/// Formats and providers of all graphs that can be compiled.
const WAYS: [(Precision, Provider, bool); 10] = [
    (Precision::Fp32, Provider::Cpu, true),
    (Precision::Fp32, Provider::Cpu, false),
    (Precision::Int8, Provider::Cpu, true),
    (Precision::Int8, Provider::Cpu, false),
    (Precision::Bf16, Provider::Cpu, true),
    (Precision::Fp32, Provider::Cuda, true),
    (Precision::Fp16, Provider::Cuda, true),
    (Precision::Bf16, Provider::Cuda, true),
    (Precision::Fp16, Provider::Cuda, false),
    (Precision::Bf16, Provider::Cuda, false),
];

/// Returns the digest of each graph by what it was built for.
fn digests() -> BTreeMap<String, String> {
    let mut digests = BTreeMap::new();
    for n_positions in [16, 36] {
        for way in WAYS {
            each_graph(n_positions, way, |graph, plan, _| {
                let mut model = build(graph, plan);
                // The same graph of a later version is the same graph.
                model.producer_version.clear();
                let (precision, provider, has_ours) = way;
                let own = if has_ours { "own" } else { "portable" };
                let name = format!(
                    "{} {} {own} {n_positions} {}",
                    provider.name(),
                    precision.name(),
                    graph.file_stem()
                );
                let digest = hex(&Sha256::digest(model.encode_to_vec()));
                digests.insert(name, digest);
            });
        }
    }
    digests
}

/// Compiled directories are found in the cache by the format's number, so a
/// graph that changed while the number stayed would not be compiled again.
#[test]
fn a_graph_that_changes_has_another_format() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(DIGESTS);
    let mut text = format!("format {FORMAT}\n");
    for (name, digest) in digests() {
        writeln!(text, "{name} {digest}").unwrap();
    }
    let recorded = std::fs::read_to_string(&path).unwrap_or_default();
    if recorded == text {
        return;
    }
    let format = |text: &str| text.lines().next().unwrap_or_default().to_owned();
    let is_raised = format(&recorded) != format(&text);
    if is_raised && std::env::var_os("IMAGEGPT_SNAPSHOTS").is_some_and(|value| value == "write") {
        std::fs::write(&path, text).unwrap();
        return;
    }
    let changed: Vec<&str> = text
        .lines()
        .filter(|line| !recorded.contains(line))
        .collect();
    panic!(
        "{DIGESTS} has other digests than these graphs; if they are meant to change, raise FORMAT \
         in src/model/manifest.rs (now {FORMAT}), run this test with IMAGEGPT_SNAPSHOTS=write, and \
         say so in CHANGELOG.md:\n{}",
        changed.join("\n")
    );
}

/// Returns the mean of the ratios of a graph's raw features of the embedding to
/// the same features in fp32, weighted by their size.
fn ratio(n_positions: usize) -> f64 {
    let mut features = Vec::new();
    for way in [
        (Precision::Fp32, Provider::Cuda, true),
        (Precision::Fp16, Provider::Cuda, true),
    ] {
        each_graph(n_positions, way, |graph, plan, folder| {
            if graph != Graph::Features(Norm::None) {
                return;
            }
            let file = folder.join("graph.onnx");
            std::fs::write(&file, build(graph, plan).encode_to_vec()).unwrap();
            features.push(first_features(&file, n_positions));
        });
    }
    let [exact, rounded] = <[Vec<f64>; 2]>::try_from(features).unwrap();
    let product: f64 = exact.iter().zip(&rounded).map(|(a, b)| a * b).sum();
    product / exact.iter().map(|a| a * a).sum::<f64>()
}

/// Runs a graph of features on some images and returns their means of the
/// embedding.
fn first_features(file: &Path, n_positions: usize) -> Vec<f64> {
    const IMAGES: usize = 64;
    let mut session: Session = runtime(true).open(file, None).unwrap();
    let ids: Vec<i32> = (0..IMAGES * n_positions)
        .map(|idx| i32::try_from(idx * idx % 509).unwrap())
        .collect();
    let ids = Tensor::from_array(([IMAGES, n_positions], ids)).unwrap();
    let outputs = session.run(ort::inputs!["input_ids" => ids]).unwrap();
    let (shape, values) = outputs["features"].try_extract_tensor::<f32>().unwrap();
    let width = usize::try_from(shape[2]).unwrap();
    values
        .chunks_exact((FEATURE_LAYER + 1) * width)
        .flat_map(|image| image[..width].iter().map(|&value| value.into()))
        .collect()
}

#[test]
fn means_are_exact_for_any_number_of_positions() {
    // 1/36 is 0.024 % too small in fp16; over thousands of means, rounding each
    // of them leaves far less.
    for n_positions in [16, 36] {
        let ratio = ratio(n_positions);
        assert!((ratio - 1.0).abs() < 5e-5, "{n_positions}: {ratio}");
    }
}
