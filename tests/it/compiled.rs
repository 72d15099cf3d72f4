//! Compiled models: every layer and norm, linear heads, and sources that are
//! compiled when they are served.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use imagegpt::compile::{CompileOptions, Provider, Runtime, Silent, Source, cache, compile};
use imagegpt::config::CompileConfig;
use imagegpt::engine::onnx;
use imagegpt::head::Head;
use imagegpt::model::Model;
use imagegpt::pb;
use safetensors::Dtype;
use safetensors::tensor::TensorView;
use tonic::Code;

use crate::harness::{self, Case, Running, expected, f32s, relative_error, tokens, vector};

fn runtime() -> Runtime {
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
    let source = Source::Folder(harness::model_dir("micro-checkpoint"));
    compile(&source, &output, &options, &runtime(), &mut Silent).expect("compiled");
    harness::start(&output, flags, None).await
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

fn classification(result: &pb::ClassifyResult) -> &pb::Classification {
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

/// Writes a head of 2 classes over `width` numbers: the first number of the
/// features, and its negative.
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
    running.end().await;
}

#[test]
fn a_head_of_a_layer_that_is_not_served_is_refused_at_start() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = head(folder.path(), "deep", 16, "7");
    let flag = format!("deep={}", file.display()).parse().expect("a flag");
    let head = Head::open(&flag).expect("a head");
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
    let config = CompileConfig {
        revision: None,
        precision: imagegpt::compile::Precision::Int8,
        feature_layer: None,
        cache_dir: Some(cache_dir.path().to_owned()),
    };
    let source = harness::model_dir("micro-checkpoint");
    let locate =
        |text: &str| cache::locate(text, &config, Provider::Cpu, || Ok(runtime()), &mut Silent);
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
    imagegpt::compile::Manifest::read(&first).expect("whole again");
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
