//! Compiled models: all layers and norms, linear heads, and sources that are
//! compiled when they are served.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use imagegpt::compile::{CompileOptions, ModelSource, Silent, cache, compile};
use imagegpt::engine::onnx;
use imagegpt::model::graph::{Graph, Norm};
use imagegpt::model::head::LinearHead;
use imagegpt::model::onnx as onnx_file;
use imagegpt::model::precision::{CompileTask, Precision, Provider};
use imagegpt::model::{CallTask, Model, ModelNeed};
use imagegpt::proto::pb;
use imagegpt::runtime::Runtime;
use imagegpt::serve::engines::onnx_engines;
use imagegpt::serve::heads::StartHeads;
use imagegpt::serve::worker::Worker;
use prost::Message as _;
use prost::encoding::{decode_varint, encode_varint};
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tonic::Code;

use crate::harness::{self, Case, Running, expected, f32s, relative_error, tokens, vector};
use crate::process;

pub(crate) fn runtime() -> Runtime {
    let library = onnx::find_library(None);
    Runtime::new(
        onnx::environment(&library).expect("the library"),
        Provider::Cpu,
    )
    .expect("a runtime")
}

/// Serves the micro checkpoint, compiled with features to `feature_layer`.
async fn compiled(folder: &Path, feature_layer: usize, flags: &[&str]) -> Running {
    let output = folder.join(format!("compiled-{feature_layer}"));
    let options = CompileOptions {
        feature_layer: Some(feature_layer),
        ..Default::default()
    };
    let source = ModelSource::Folder(harness::model_dir("micro-checkpoint"));
    compile(&source, &output, &options, &runtime(), &mut Silent).expect("compiled");
    harness::start(&output, flags, None).await
}

#[test]
fn only_the_graphs_that_are_needed_are_served() {
    use Graph::{Features, Hidden, Logits};
    let folder = tempfile::tempdir().expect("a directory");
    let output = folder.path().join("compiled");
    let options = CompileOptions {
        feature_layer: Some(1),
        ..Default::default()
    };
    let source = ModelSource::Folder(harness::model_dir("micro-checkpoint"));
    compile(&source, &output, &options, &runtime(), &mut Silent).expect("compiled");
    let all = Model::open(&output, None).expect("a model").graphs;
    let served = |needs: &[ModelNeed]| {
        let mut model = Model::open(&output, None).expect("a model");
        model.serve_only(needs);
        let mut graphs: Vec<Graph> = model.graphs.into_keys().collect();
        graphs.sort_unstable();
        graphs
    };
    let features = |layers: &[u32], norm| ModelNeed::Features {
        layers: layers.to_vec(),
        norm,
    };
    let normed = Features(Norm::PreAttnRms);
    assert_eq!(served(&[ModelNeed::Call(CallTask::Classify)]), [Logits]);
    assert_eq!(served(&[ModelNeed::Call(CallTask::Embed)]), [normed]);
    assert_eq!(
        served(&[features(&[1], Norm::None)]),
        [Features(Norm::None)]
    );
    // The checkpoint has two layers, and its features end at the first.
    assert_eq!(served(&[features(&[2], Norm::PreAttnRms)]), [Hidden]);
    assert_eq!(
        served(&[
            ModelNeed::Call(CallTask::Classify),
            features(&[], Norm::PreAttnRms)
        ]),
        [normed, Logits]
    );
    // Without the one graph that is needed, calls say what is missing.
    let missing = [
        ModelNeed::Call(CallTask::Score),
        features(&[99], Norm::None),
    ];
    assert_eq!(served(&missing).len(), all.len());
    assert_eq!(served(&[]).len(), all.len());
    // The default layer is the same, whichever norm is needed.
    for norm in [Norm::PreAttnRms, Norm::None] {
        let mut model = Model::open(&output, None).expect("a model");
        model.serve_only(&[features(&[], norm)]);
        assert_eq!(model.layer_default(), Some(1), "{norm:?}");
    }
}

fn request(case: &Case, layers: &[u32], norm: pb::Norm) -> pb::EmbedRequest {
    pb::EmbedRequest {
        images: vec![tokens(case.tokens.clone())],
        layers: layers.to_vec(),
        norm: norm.into(),
        ..Default::default()
    }
}

fn assert_near(got: &[f32], wanted: &[f32], what: &str) {
    let error = relative_error(got, wanted);
    assert!(error <= 1e-5, "{what}: {error:e}");
}

#[tokio::test]
async fn every_layer_and_norm_is_what_transformers_gives() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut running = compiled(folder.path(), 2, &[]).await;
    for case in expected() {
        for (context, answers) in [
            (pb::Context::Raw, &case.raw),
            (pb::Context::SosShifted, &case.sos_shifted),
        ] {
            for (norm, layers) in [
                (pb::Norm::PreAttnRms, &answers.layers_normed),
                (pb::Norm::None, &answers.layers_raw),
            ] {
                // One by one, and all in one run.
                for (layer, wanted) in (0..).zip(layers) {
                    let mut request = request(&case, &[layer], norm);
                    request.context = context.into();
                    let response = running.client.embed(request).await.expect("a response");
                    let response = response.into_inner();
                    assert_eq!(response.layers, [layer]);
                    assert_eq!(response.norm, i32::from(norm));
                    let got = vector(&response.results[0]).expect("a vector");
                    assert_near(&got, wanted, &format!("layer {layer} {norm:?} {context:?}"));
                }
                let mut request = request(&case, &[0, 1, 2], norm);
                request.context = context.into();
                let response = running.client.embed(request).await.expect("a response");
                let result = &response.get_ref().results[0];
                assert_near(
                    &vector(result).expect("vectors"),
                    &layers.concat(),
                    "all layers",
                );
                let Some(pb::embed_result::Outcome::Embedding(tensor)) = &result.outcome else {
                    panic!("{result:?}");
                };
                assert_eq!(tensor.shape, [3, 16]);
            }
            let request = pb::EmbedRequest {
                pooling: pb::Pooling::Last.into(),
                context: context.into(),
                ..request(&case, &[], pb::Norm::Unspecified)
            };
            let response = running.client.embed(request).await.expect("a response");
            let got = vector(&response.get_ref().results[0]).expect("a vector");
            assert_near(&got, &answers.last, "last");
        }
        let request = pb::ClassifyRequest {
            images: vec![tokens(case.tokens.clone())],
            logits: true,
            ..Default::default()
        };
        let response = running
            .client
            .classify(request)
            .await
            .expect("a response")
            .into_inner();
        let classification = classification(&response.results[0]);
        let logits = f32s(classification.logits.as_ref().expect("logits"));
        assert_near(&logits, &case.raw.logits, "logits");
        assert_eq!(classification.classes.len(), 3);
    }
    running.end().await;
}

pub(crate) fn classification(result: &pb::ClassifyResult) -> &pb::Classification {
    match result.outcome.as_ref().expect("an outcome") {
        pb::classify_result::Outcome::Classification(classification) => classification,
        pb::classify_result::Outcome::Error(status) => panic!("{status:?}"),
    }
}

#[tokio::test]
async fn what_is_not_compiled_is_refused_by_name() {
    let folder = tempfile::tempdir().expect("a folder");
    let mut running = compiled(folder.path(), 1, &[]).await;
    let case = &expected()[0];
    let model = running
        .client
        .get_model(pb::GetModelRequest {})
        .await
        .expect("a model")
        .into_inner();
    assert_eq!((model.layers, model.layer_default), (2, 1));
    assert_eq!(
        model.layers_served,
        [0, 1, 2],
        "0 and 1 pooled in the graph, 2 from the states"
    );
    assert_eq!(model.precision, "fp32");

    let default = running
        .client
        .embed(request(case, &[], pb::Norm::Unspecified))
        .await
        .expect("ok");
    assert_eq!(default.get_ref().layers, [1]);
    let last = running
        .client
        .embed(request(case, &[2], pb::Norm::None))
        .await
        .expect("ok");
    let got = vector(&last.get_ref().results[0]).expect("a vector");
    assert_near(&got, &case.raw.layers_raw[2], "the last layer");

    for (layers, pooling, words) in [
        (&[3][..], pb::Pooling::Mean, "[3]"),
        (&[1, 0], pb::Pooling::Mean, "ascending"),
        (&[0, 0], pb::Pooling::Mean, "ascending"),
        // Of two graphs, so not in one run.
        (&[0, 2], pb::Pooling::Mean, "one run"),
        (&[1], pb::Pooling::None, "[1]"),
    ] {
        let request = pb::EmbedRequest {
            pooling: pooling.into(),
            ..request(case, layers, pb::Norm::Unspecified)
        };
        let error = running.client.embed(request).await.expect_err("not served");
        assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        assert!(error.message().contains(words), "{error}");
    }
    running.end().await;
}

/// Writes a head of 2 classes over `width` features, whose logits are the first
/// feature and its negative.
fn head(folder: &Path, name: &str, width: usize, layer: &str) -> PathBuf {
    let mut weight = vec![0.0_f32; 2 * width];
    weight[0] = 1.0;
    weight[width] = -1.0;
    let bytes = |values: &[f32]| {
        values
            .iter()
            .flat_map(|v| v.to_le_bytes())
            .collect::<Vec<u8>>()
    };
    let (weight, bias) = (bytes(&weight), bytes(&[0.5, 0.0]));
    let tensors = [
        (
            "weight",
            TensorView::new(Dtype::F32, vec![2, width], &weight).expect("fits"),
        ),
        (
            "bias",
            TensorView::new(Dtype::F32, vec![2], &bias).expect("fits"),
        ),
    ];
    let metadata: HashMap<String, String> = [
        ("labels", "[\"plus\", \"minus\"]"),
        ("layer", layer),
        ("norm", "NONE"),
        ("context", "SOS_SHIFTED"),
    ]
    .map(|(key, value)| (key.to_owned(), value.to_owned()))
    .into();
    let path = folder.join(format!("{name}.safetensors"));
    let file = safetensors::serialize(tensors, Some(metadata)).expect("a file");
    std::fs::write(&path, file).expect("written");
    path
}

#[tokio::test]
async fn several_heads_share_a_backbone() {
    let folder = tempfile::tempdir().expect("a folder");
    let (one, two) = (
        head(folder.path(), "one", 16, "1"),
        head(folder.path(), "two", 16, "0"),
    );
    let (one, two) = (
        format!("one={}", one.display()),
        format!("two={}", two.display()),
    );
    let mut running = compiled(folder.path(), 1, &["--head", &one, "--head", &two]).await;
    let model = running
        .client
        .get_model(pb::GetModelRequest {})
        .await
        .expect("a model")
        .into_inner();
    let names: Vec<&str> = model.heads.iter().map(|head| head.name.as_str()).collect();
    assert_eq!(names, ["one", "two"]);
    assert_eq!(model.heads[0].labels, ["plus", "minus"]);
    assert_eq!(model.heads[0].layer, 1);

    let case = &expected()[0];
    let call = |head: &str| pb::ClassifyRequest {
        images: vec![tokens(case.tokens.clone())],
        head: head.to_owned(),
        logits: true,
        ..Default::default()
    };
    for (name, layer) in [("one", 1), ("two", 0)] {
        let response = running
            .client
            .classify(call(name))
            .await
            .expect("a response")
            .into_inner();
        assert_eq!(
            (response.head.as_str(), response.context),
            (name, pb::Context::SosShifted.into())
        );
        let first = case.sos_shifted.layers_raw[layer][0];
        let classification = classification(&response.results[0]);
        let logits = f32s(classification.logits.as_ref().expect("logits"));
        assert!((logits[0] - (first + 0.5)).abs() < 1e-5 && (logits[1] + first).abs() < 1e-5);
        let best = if first + 0.5 > -first {
            "plus"
        } else {
            "minus"
        };
        assert_eq!(classification.classes[0].label, best);
    }
    // The checkpoint's own head is there too, and stays the default.
    let own = running
        .client
        .classify(call(""))
        .await
        .expect("a response")
        .into_inner();
    assert_eq!(classification(&own.results[0]).classes.len(), 3);

    let error = running
        .client
        .classify(call("three"))
        .await
        .expect_err("not loaded");
    assert_eq!(error.code(), Code::NotFound);
    assert!(error.message().contains("one, two"), "{error}");
    let raw = pb::ClassifyRequest {
        context: pb::Context::Raw.into(),
        ..call("one")
    };
    let error = running
        .client
        .classify(raw)
        .await
        .expect_err("another context");
    assert_eq!(error.code(), Code::InvalidArgument);
    let words = "context: the head one was trained with CONTEXT_SOS_SHIFTED; leave context unset";
    assert_eq!(error.message(), words);
    running.end().await;
}

#[test]
fn a_head_of_a_layer_that_is_not_served_is_refused_at_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = head(folder.path(), "deep", 16, "7");
    let flag = format!("deep={}", file.display()).parse().expect("a flag");
    let head = LinearHead::open(&flag).expect("a head");
    let model = Model::open(&harness::model_dir("micro"), None).expect("a model");
    let error = head.check(&model).expect_err("2 layers").to_string();
    assert!(
        error.contains("--head deep=") && error.contains("layer 7"),
        "{error}"
    );
}

#[tokio::test]
async fn a_checkpoint_is_compiled_once() {
    let cache_dir = tempfile::tempdir().expect("a folder");
    let options = CompileOptions {
        precision: Precision::Int8,
        ..CompileOptions::default()
    };
    let source = harness::model_dir("micro-checkpoint");
    let locate = |text: &str| {
        let source = ModelSource::parse(text, None);
        let cache_dir = Some(cache_dir.path());
        cache::locate(&source, cache_dir, &options, || Ok(runtime()), &mut Silent)
    };
    let source_text = source.to_str().expect("an UTF-8 path");
    let first = locate(source_text).expect("compiled");
    assert!(first.starts_with(cache_dir.path()));
    let entries = || {
        std::fs::read_dir(cache_dir.path())
            .expect("the cache")
            .count()
    };
    assert_eq!(entries(), 1);
    assert_eq!(locate(source_text).expect("found"), first);
    assert_eq!(entries(), 1);
    // A damaged folder is made again, and another palette is another folder.
    std::fs::write(first.join("weights.bin"), "damaged").expect("written");
    assert_eq!(locate(source_text).expect("made again"), first);
    imagegpt::model::manifest::Manifest::read(&first).expect("whole again");
    let changed = tempfile::tempdir().expect("a folder");
    for entry in std::fs::read_dir(&source).expect("the source") {
        let entry = entry.expect("an entry");
        std::fs::copy(entry.path(), changed.path().join(entry.file_name())).expect("a copy");
    }
    let palette = changed.path().join("preprocessor_config.json");
    let mut text = std::fs::read_to_string(&palette).expect("a palette");
    text.push('\n');
    std::fs::write(&palette, text).expect("written");
    let changed = changed.path().to_str().expect("an UTF-8 path");
    assert_ne!(locate(changed).expect("compiled"), first);
    // What can be served is served where it lies.
    let compiled = first.to_str().expect("an UTF-8 path");
    assert_eq!(locate(compiled).expect("as it is"), first);
    let published = harness::model_dir("micro");
    assert_eq!(
        locate(published.to_str().expect("an UTF-8 path")).expect("as it is"),
        published
    );

    let mut running = harness::start(&first, &[], None).await;
    let case = &expected()[0];
    let response = running
        .client
        .embed(request(case, &[], pb::Norm::Unspecified))
        .await;
    let response = response.expect("a response").into_inner();
    let layer = usize::try_from(response.layers[0]).expect("small");
    let error = relative_error(
        &vector(&response.results[0]).expect("a vector"),
        &case.raw.layers_normed[layer],
    );
    assert!(error <= 5e-2, "{error:e}");
    running.end().await;
}

/// Returns the directory with the files that an older version wrote.
fn before(name: &str) -> PathBuf {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    root.join("tests/data/before-sha256").join(name)
}

pub(crate) fn copy_all(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).expect("a folder");
    for entry in std::fs::read_dir(from).expect("a folder") {
        let entry = entry.expect("an entry");
        let to = to.join(entry.file_name());
        if entry.path().is_dir() {
            copy_all(&entry.path(), &to);
        } else {
            std::fs::copy(entry.path(), to).expect("a copy");
        }
    }
}

/// Compiles the micro checkpoint into a directory.
pub(crate) fn compiled_folder(to: &Path, precision: Precision) {
    let options = CompileOptions {
        precision,
        tasks: Some([CompileTask::Embed].into()),
        ..Default::default()
    };
    let source = ModelSource::Folder(harness::model_dir("micro-checkpoint"));
    compile(&source, to, &options, &runtime(), &mut Silent).expect("compiled");
}

/// Runs the program, and returns its exit code and output.
pub(crate) fn run(args: &[&str]) -> (i32, String) {
    let output = process::program().args(args).output().expect("the program");
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    (output.status.code().unwrap_or(-1), text)
}

pub(crate) fn text(path: &Path) -> &str {
    path.to_str().expect("a name")
}

/// Starts a worker that must refuse the model, and returns its error.
async fn why_not(folder: &Path) -> String {
    let model = match Model::open(folder, None) {
        Ok(model) => model,
        Err(error) => return error.to_string(),
    };
    let config = harness::config(folder, &[]);
    let engines = onnx_engines(&config, &model, &[]).expect("engines");
    let mut worker = Worker::start(&config, model, StartHeads::default(), engines)
        .await
        .expect("a worker");
    let error = worker.ready().await.expect_err("not to be served");
    format!("{error:#}")
}

#[tokio::test]
async fn weights_that_are_cut_or_written_over_change_no_answer() {
    let dir = tempfile::tempdir().expect("a folder");
    let case = &expected()[0];
    for name in ["checkpoint", "export"] {
        let folder = dir.path().join(name);
        let weights = folder.join(if name == "checkpoint" {
            compiled_folder(&folder, Precision::Fp32);
            "weights.bin"
        } else {
            external_export(&folder, "weights.bin");
            "weights.bin"
        });
        let mut running = harness::start(&folder, &[], None).await;
        let mut ask = async || {
            let request = request(case, &[], pb::Norm::Unspecified);
            let response = running.client.embed(request).await.expect("a response");
            vector(&response.get_ref().results[0]).expect("a vector")
        };
        let whole = ask().await;
        let bytes = std::fs::read(&weights).expect("weights");
        // In place, as `cp` writes over a file that is there.
        let file = std::fs::File::options().write(true).open(&weights);
        let mut file = file.expect("the file");
        std::io::Write::write_all(&mut file, &vec![0x40; bytes.len()]).expect("written");
        assert_eq!(ask().await, whole, "{name}: written over");
        file.set_len(10).expect("cut");
        assert_eq!(ask().await, whole, "{name}: cut");
        std::fs::remove_file(&weights).expect("removed");
        assert_eq!(ask().await, whole, "{name}: removed");
        running.end().await;
    }
}

/// A change of any byte in any file of a compiled model is found, and the model
/// is not served.
#[tokio::test]
async fn a_folder_that_is_not_what_was_compiled_is_refused() {
    let dir = tempfile::tempdir().expect("a folder");
    let folder = dir.path().join("whole");
    compiled_folder(&folder, Precision::Fp32);
    let (code, said) = run(&["inspect", text(&folder), "--verify"]);
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("of the 5 files is as recorded"), "{said}");
    for (file, at) in [
        ("weights.bin", 90_000),
        ("weights.bin", 0),
        ("embed-none.onnx", 2000),
    ] {
        let other = dir.path().join(format!("{file}-{at}"));
        copy_all(&folder, &other);
        let path = other.join(file);
        let mut bytes = std::fs::read(&path).expect("a file");
        bytes[at] ^= 1;
        std::fs::write(&path, bytes).expect("written");
        let why = why_not(&other).await;
        assert!(why.contains(file) && why.contains("SHA-256"), "{why}");
        assert!(why.contains("compile the model again"), "{why}");
        let (code, said) = run(&["inspect", text(&other), "--verify"]);
        assert_eq!(code, 2, "{said}");
        assert!(said.contains(&format!("{file} has the SHA-256 ")), "{said}");
        assert_eq!(run(&["inspect", text(&other)]).0, 0, "by sizes alone");
    }
    // Cut short while it is not served.
    let path = folder.join("weights.bin");
    let file = std::fs::File::options()
        .write(true)
        .open(path)
        .expect("a file");
    file.set_len(5000).expect("cut");
    let why = why_not(&folder).await;
    assert!(
        why.contains("weights.bin of 90176 bytes, but the file has 5000"),
        "{why}"
    );
}

/// Field of a protobuf message: its number, its content if it has a length, and
/// all of its bytes.
type WireField<'a> = (u64, &'a [u8], &'a [u8]);

/// Returns the fields of a message, including those that [`onnx_file`] does not
/// know and would drop.
fn wire_fields(mut bytes: &[u8]) -> Vec<WireField<'_>> {
    let mut fields = Vec::new();
    while !bytes.is_empty() {
        let whole = bytes;
        let tag = decode_varint(&mut bytes).expect("a tag");
        let len = match tag & 7 {
            0 => {
                decode_varint(&mut bytes).expect("a number");
                0
            }
            2 => decode_varint(&mut bytes).expect("a length"),
            kind => panic!("wire type {kind}"),
        };
        let (content, rest) = bytes.split_at(usize::try_from(len).expect("a length"));
        bytes = rest;
        fields.push((tag >> 3, content, &whole[..whole.len() - rest.len()]));
    }
    fields
}

fn put_field(number: u64, content: &[u8], to: &mut Vec<u8>) {
    encode_varint(number << 3 | 2, to);
    encode_varint(content.len() as u64, to);
    to.extend(content);
}

/// Writes an ONNX export of the micro model whose weights are in another file.
fn external_export(folder: &Path, location: &str) {
    const GRAPH: u64 = 7;
    const INITIALIZER: u64 = 5;
    copy_all(&harness::model_dir("micro"), folder);
    std::fs::remove_file(folder.join("model_classification.onnx")).expect("removed");
    let path = folder.join("model.onnx");
    let bytes = std::fs::read(&path).expect("a graph");
    let mut weights = Vec::new();
    let entry = |key: &str, value: String| onnx_file::StringEntry {
        key: key.to_owned(),
        value,
    };
    let mut model = Vec::new();
    for (number, graph, whole) in wire_fields(&bytes) {
        if number != GRAPH {
            model.extend(whole);
            continue;
        }
        let mut rewritten = Vec::new();
        for (number, content, whole) in wire_fields(graph) {
            let tensor = (number == INITIALIZER)
                .then(|| onnx_file::TensorProto::decode(content).expect("a tensor"))
                .filter(|tensor| tensor.raw_data.len() >= 256);
            let Some(mut tensor) = tensor else {
                rewritten.extend(whole);
                continue;
            };
            tensor.external_data = vec![
                entry("location", location.to_owned()),
                entry("offset", weights.len().to_string()),
                entry("length", tensor.raw_data.len().to_string()),
            ];
            tensor.data_location = 1;
            weights.append(&mut tensor.raw_data);
            put_field(INITIALIZER, &tensor.encode_to_vec(), &mut rewritten);
        }
        put_field(GRAPH, &rewritten, &mut model);
    }
    assert!(weights.len() > 10_000);
    std::fs::write(&path, model).expect("written");
    if !location.contains("..") && !location.starts_with('/') {
        std::fs::write(folder.join(location), weights).expect("written");
    }
}

#[tokio::test]
async fn files_that_an_export_names_are_in_its_digest() {
    let dir = tempfile::tempdir().expect("a folder");
    let digest = |folder: &Path| Model::open(folder, None).map(|model| model.digest);
    for location in ["weights.bin", "model.onnx_data", "./w"] {
        let folder = dir.path().join(location.trim_start_matches("./"));
        external_export(&folder, location);
        let first = digest(&folder).expect("a model");
        let path = folder.join(location);
        let mut bytes = std::fs::read(&path).expect("weights");
        bytes[5000] ^= 1;
        std::fs::write(&path, &bytes).expect("written");
        let second = digest(&folder).expect("a model");
        assert_ne!(first, second, "{location}");
        // As a hub's cache has it: a link to where the file is.
        let blob = dir.path().join(format!("blob-{}", location.len()));
        std::fs::rename(&path, &blob).expect("moved");
        std::os::unix::fs::symlink(&blob, &path).expect("a link");
        assert_eq!(digest(&folder).expect("a model"), second);
        harness::start(&folder, &[], None).await.end().await;
        // A byte too few for the last tensor.
        std::fs::remove_file(&path).expect("removed");
        std::fs::write(&path, &bytes[1..]).expect("written");
        let error = digest(&folder).expect_err("cut").to_string();
        assert!(error.contains("model.onnx: the tensor "), "{error}");
        assert!(
            error.contains(&format!("has {}", bytes.len() - 1)),
            "{error}"
        );
        std::fs::remove_file(&path).expect("removed");
        let error = digest(&folder).expect_err("gone").to_string();
        assert!(error.contains("cannot be read"), "{error}");
    }
    for outside in ["../weights.bin", "/etc/passwd", "a/../../weights.bin"] {
        let folder = dir.path().join(format!("outside-{}", outside.len()));
        external_export(&folder, outside);
        let error = digest(&folder).expect_err(outside).to_string();
        assert!(error.contains("model.onnx: names the file"), "{error}");
        assert!(error.contains("move the file there"), "{error}");
    }
}

#[tokio::test]
async fn a_folder_of_an_older_version_is_refused_with_what_to_do() {
    let why = why_not(&before("compiled")).await;
    for part in [
        "has format 6 of version 0.1.0; this version reads format 8",
        "imagegpt compile tests/data/models/micro-checkpoint --precision fp32 --output DIR",
    ] {
        assert!(why.contains(part), "{why}");
    }
    // A format that is not known yet may have anything in its manifest.
    let dir = tempfile::tempdir().expect("a folder");
    let manifest = r#"{"format": 9, "tool_version": "9.0.0", "precision": "fp1"}"#;
    std::fs::write(dir.path().join("imagegpt.json"), manifest).expect("written");
    let why = why_not(dir.path()).await;
    let part =
        "has format 9, written by imagegpt 9.0.0; this version reads format 8; upgrade imagegpt";
    assert!(why.contains(part), "{why}");
}

/// Restores the job of an older version, with the path of its inputs in this
/// checkout.
fn job_of_an_older_version(job: &str, output: &Path, whole: &Path) {
    copy_all(&before(job), output);
    let read = |folder: &Path| -> serde_json::Value {
        let text = std::fs::read(folder.join("_imagegpt/manifest.json")).expect("a manifest");
        serde_json::from_slice(&text).expect("JSON")
    };
    let mut manifest = read(output);
    manifest["inputs"] = read(whole)["inputs"].clone();
    let text = serde_json::to_string_pretty(&manifest).expect("JSON");
    std::fs::write(output.join("_imagegpt/manifest.json"), text + "\n").expect("written");
}

#[test]
fn jobs_of_an_older_version_go_on_or_are_refused_with_what_to_do() {
    let dir = tempfile::tempdir().expect("a folder");
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let pictures = root.join("models/pictures/flags");
    let compiled = dir.path().join("compiled");
    compiled_folder(&compiled, Precision::Fp32);
    for (job, folder) in [
        ("job-published", harness::model_dir("micro")),
        ("job-compiled", compiled),
    ] {
        let embed = |output: &Path| {
            let output = text(output);
            let [pictures, folder] = [text(&pictures), text(&folder)];
            run(&[
                "embed",
                pictures,
                "--model",
                folder,
                "--output",
                output,
                "--part-items",
                "2",
            ])
        };
        let whole = dir.path().join(format!("{job}-whole"));
        let (code, said) = embed(&whole);
        assert_eq!(code, 0, "{said}");
        let half = dir.path().join(job);
        job_of_an_older_version(job, &half, &whole);
        let (code, said) = embed(&half);
        if job == "job-published" {
            assert_eq!(code, 0, "{said}");
            // The part that the older version ended stays as it is: it was
            // made on another CPU, whose last bits need not be this one's.
            let read = |folder: &Path, part| std::fs::read(folder.join(part)).expect("a part");
            let ended = "part-00000-00000.parquet";
            assert_eq!(read(&half, ended), read(&before(job), ended), "{ended}");
            let added = "part-00002-00000.parquet";
            assert_eq!(read(&half, added), read(&whole, added), "{added}");
        } else {
            assert_eq!(code, 2, "{said}");
            let now = Model::open(&folder, None).expect("a model").digest;
            let was = "sha256:dacbe542ce28e1ee066bc390205c6f6523e93a04b886bcb1ae6d4fb46584f2ff";
            let sentence = format!("the model's digest was {was}, is now {now}. Finish the output");
            assert!(said.contains(&sentence), "{said}");
        }
    }
}

/// An image's numbers depend neither on the other images of its batch nor on
/// the number of threads. Graphs with an operator that has one scale for a whole
/// batch run images one by one.
#[tokio::test]
async fn an_image_has_the_same_bits_in_any_company() {
    for (precision, is_portable) in [
        (Precision::Fp32, false),
        (Precision::Int8, false),
        (Precision::Int8, true),
    ] {
        let dir = tempfile::tempdir().expect("a folder");
        let folder = dir.path().join("compiled");
        let options = CompileOptions {
            precision,
            tasks: Some([CompileTask::Embed].into()),
            ..Default::default()
        };
        let mut runtime = runtime();
        if is_portable {
            runtime.operators = None;
        }
        let source = ModelSource::Folder(harness::model_dir("micro-checkpoint"));
        compile(&source, &folder, &options, &runtime, &mut Silent).expect("compiled");
        in_any_company(&folder, is_portable).await;
    }
}

async fn in_any_company(folder: &Path, is_one_by_one: bool) {
    let cases = expected();
    let image = |idx: usize| match idx {
        0 => tokens(cases[0].tokens.clone()),
        _ => harness::tokens(harness::seeded(u32::try_from(idx).expect("few"))),
    };
    let flags = ["--max-batch-size", "8", "--batch-sizes", "4,8"];
    let mut running = harness::start(folder, &flags, None).await;
    let info = running.client.get_model(pb::GetModelRequest {}).await;
    let info = info.expect("a response").into_inner();
    let most = if is_one_by_one { 1 } else { 8 };
    assert_eq!(info.limits.expect("limits").batch_size_max, most);
    let mut ask = async |images: Vec<pb::Image>| {
        let request = harness::embed(images);
        let response = running.client.embed(request).await.expect("a response");
        vector(&response.get_ref().results[0]).expect("a vector")
    };
    let alone = ask(vec![image(0)]).await;
    for n in [2, 5, 9] {
        assert_eq!(ask((0..n).map(image).collect()).await, alone, "{n} images");
    }
    running.end().await;
    let pictures = Path::new(env!("CARGO_MANIFEST_DIR")).join("models/pictures/flags");
    let jobs = tempfile::tempdir().expect("a folder");
    let embed = |sizes: &str, n_threads: usize| {
        let output = jobs.path().join(format!("job-{sizes}"));
        let largest = sizes.rsplit(',').next().unwrap_or_default();
        let serve = format!(
            "--batch-sizes {sizes} --max-batch-size {largest} --intra-op-threads {n_threads}"
        );
        let [pictures, folder, out] = [text(&pictures), text(folder), text(&output)];
        let (code, said) = run(&[
            "embed", pictures, "--model", folder, "--output", out, "--serve", &serve,
        ]);
        assert_eq!(code, 0, "{said}");
        assert_eq!(
            said.contains("images run one by one"),
            is_one_by_one && sizes != "1",
            "{said}"
        );
        std::fs::read(output.join("part-00000-00000.parquet")).expect("a part")
    };
    let one_by_one = embed("1", 1);
    assert_eq!(embed("8", 2), one_by_one);
    assert_eq!(embed("2,4", 3), one_by_one);
}
