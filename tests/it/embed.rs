//! All options of all calls, on real graphs.

use imagegpt::proto::pb;
use tonic::Code;

use crate::harness::{self, Case, embed, encoded, expected, f32s, relative_error, tokens, vector};

fn request(case: &Case, context: pb::Context, pooling: pb::Pooling) -> pb::EmbedRequest {
    pb::EmbedRequest {
        images: vec![tokens(case.tokens.clone())],
        context: context.into(),
        pooling: pooling.into(),
        ..Default::default()
    }
}

/// Checks all poolings and contexts of one published directory.
async fn check_embed(folder: &str) {
    let mut running = harness::onnx(folder, &[]).await;
    let cases = expected();
    let within = |got: &[f32], want: &[f32], what: &str| {
        let error = relative_error(got, want);
        assert!(error <= 1e-5, "{folder} {what}: {error:e}");
    };
    for case in &cases {
        for (context, answers) in [
            (pb::Context::Raw, &case.raw),
            (pb::Context::SosShifted, &case.sos_shifted),
        ] {
            for pooling in [pb::Pooling::Mean, pb::Pooling::Last, pb::Pooling::None] {
                let response = running
                    .client
                    .embed(request(case, context, pooling))
                    .await
                    .expect("a response")
                    .into_inner();
                assert_eq!(response.context, i32::from(context));
                assert_eq!(response.pooling, i32::from(pooling));
                let got = vector(&response.results[0]).expect("a vector");
                let width = answers.mean.len();
                match pooling {
                    pb::Pooling::Last => within(&got, &answers.last, "last"),
                    pb::Pooling::None => {
                        assert_eq!(got.len(), 64 * width);
                        within(&got[..width], &answers.first, "first state");
                        within(&got[63 * width..], &answers.last, "last state");
                    }
                    _ => within(&got, &answers.mean, "mean"),
                }
            }
        }
    }
    running.end().await;
}

#[tokio::test]
async fn a_published_graph_gives_what_pytorch_gave() {
    check_embed("micro").await;
}

#[tokio::test]
async fn an_optimum_graph_gets_its_mask_and_positions() {
    check_embed("optimum").await;
}

#[tokio::test]
async fn a_mask_of_booleans_is_filled() {
    check_embed("bool-mask").await;
}

/// Exports with a fixed batch axis run at its size, whatever the flags say.
#[tokio::test]
async fn a_fixed_batch_size_is_served_as_it_is() {
    for (folder, size) in [("fixed-batch-1", 1.0), ("fixed-batch-3", 3.0)] {
        check_embed(folder).await;
        for flags in [&[][..], &["--batch-sizes", "2,8", "--max-batch-size", "8"]] {
            let mut running = harness::onnx(folder, flags).await;
            let (cases, n) = (expected(), 5);
            let images = (0..n).map(|idx| tokens(cases[idx % 2].tokens.clone()));
            let response = running.client.embed(embed(images.collect())).await;
            let response = response.expect("a response").into_inner();
            for (idx, result) in response.results.iter().enumerate() {
                let got = vector(result).expect("a vector");
                let error = relative_error(&got, &cases[idx % 2].raw.mean);
                assert!(error <= 1e-5, "{folder} {idx}: {error:e}");
            }
            let classify = pb::ClassifyRequest {
                images: vec![tokens(cases[0].tokens.clone())],
                logits: true,
                ..Default::default()
            };
            let response = running.client.classify(classify).await;
            let outcome = response.expect("a response").into_inner().results.remove(0);
            let Some(pb::classify_result::Outcome::Classification(got)) = outcome.outcome else {
                panic!("{outcome:?}");
            };
            let logits = f32s(&got.logits.expect("logits"));
            assert!(
                relative_error(&logits, &cases[0].raw.logits) <= 1e-5,
                "{folder}"
            );
            assert_eq!(running.sample("imagegpt_batch_size_max").await, size);
            running.end().await;
        }
    }
}

/// Half of float32's digits: 11 bits, over two blocks of a graph that computes
/// in them.
#[tokio::test]
async fn a_float16_graph_is_served() {
    let mut running = harness::onnx("float16", &[]).await;
    for case in &expected() {
        for pooling in [pb::Pooling::Mean, pb::Pooling::Last] {
            let ask = request(case, pb::Context::Raw, pooling);
            // The second answer comes from memory that is bound.
            for _ in 0..2 {
                let response = running.client.embed(ask.clone()).await;
                let got = vector(&response.expect("a response").get_ref().results[0]);
                let want = match pooling {
                    pb::Pooling::Last => &case.raw.last,
                    _ => &case.raw.mean,
                };
                let error = relative_error(&got.expect("a vector"), want);
                assert!(error <= 5e-3, "{error:e}");
            }
        }
    }
    running.end().await;
}

#[tokio::test]
async fn an_int32_graph_gets_int32() {
    check_embed("int32").await;
}

#[tokio::test]
async fn a_new_style_preprocessor_config_is_read() {
    check_embed("new-style").await;
}

#[tokio::test]
async fn f16_and_normalize() {
    let mut running = harness::onnx("micro", &[]).await;
    let case = &expected()[0];
    let plain = &case.raw.mean;
    let length = plain.iter().map(|v| v * v).sum::<f32>().sqrt();
    let response = running
        .client
        .embed(pb::EmbedRequest {
            normalize: true,
            dtype: pb::DataType::F16.into(),
            ..request(case, pb::Context::Raw, pb::Pooling::Mean)
        })
        .await
        .expect("a response")
        .into_inner();
    let Some(pb::embed_result::Outcome::Embedding(tensor)) = &response.results[0].outcome else {
        panic!("no vector: {response:?}");
    };
    assert_eq!(tensor.dtype, i32::from(pb::DataType::F16));
    assert_eq!(tensor.shape, [u32::try_from(plain.len()).expect("small")]);
    assert_eq!(tensor.data.len(), plain.len() * 2);
    for (bytes, value) in tensor.data.chunks_exact(2).zip(plain) {
        let got = half::f16::from_le_bytes([bytes[0], bytes[1]]).to_f32();
        // Half precision has 11 significant bits.
        assert!((got - value / length).abs() <= 1e-3, "{got} {value}");
    }
    assert!(response.normalize);
    running.end().await;
}

#[tokio::test]
async fn classes_are_named_best_first() {
    let mut running = harness::onnx("micro", &[]).await;
    for case in &expected() {
        let response = running
            .client
            .classify(pb::ClassifyRequest {
                images: vec![tokens(case.tokens.clone())],
                logits: true,
                ..Default::default()
            })
            .await
            .expect("a response")
            .into_inner();
        let classification = classification(&response.results[0]);
        let logits = f32s(classification.logits.as_ref().expect("logits on request"));
        assert!(relative_error(&logits, &case.raw.logits) <= 1e-5);
        let exps: Vec<f32> = case.raw.logits.iter().map(|logit| logit.exp()).collect();
        let sum: f32 = exps.iter().sum();
        assert_eq!(
            classification.classes.len(),
            3,
            "fewer classes than the default of 5"
        );
        for pair in classification.classes.windows(2) {
            assert!(pair[0].score >= pair[1].score);
        }
        let labels = running
            .client
            .get_model(pb::GetModelRequest {})
            .await
            .expect("a model");
        for class in &classification.classes {
            let idx = class.index as usize;
            assert_eq!(class.label, labels.get_ref().labels[idx]);
            assert!((class.score - exps[idx] / sum).abs() < 1e-5);
        }
    }
    let top_1 = running
        .client
        .classify(pb::ClassifyRequest {
            images: vec![harness::flat(3)],
            top_k: 1,
            ..Default::default()
        })
        .await
        .expect("a response")
        .into_inner();
    let classification = classification(&top_1.results[0]);
    assert_eq!(classification.classes.len(), 1);
    assert_eq!(classification.logits, None, "not asked for");
    running.end().await;
}

fn classification(result: &pb::ClassifyResult) -> &pb::Classification {
    match result.outcome.as_ref().expect("an outcome") {
        pb::classify_result::Outcome::Classification(classification) => classification,
        pb::classify_result::Outcome::Error(status) => panic!("{status:?}"),
    }
}

#[tokio::test]
async fn multi_label_scores_are_sigmoids() {
    let mut running = harness::onnx("micro-multilabel", &[]).await;
    let case = &expected()[0];
    let response = running
        .client
        .classify(pb::ClassifyRequest {
            images: vec![tokens(case.tokens.clone())],
            ..Default::default()
        })
        .await
        .expect("a response")
        .into_inner();
    for class in &classification(&response.results[0]).classes {
        let logit = case.raw.logits[class.index as usize];
        assert!((class.score - 1.0 / (1.0 + (-logit).exp())).abs() < 1e-5);
    }
    let model = running
        .client
        .get_model(pb::GetModelRequest {})
        .await
        .expect("a model");
    assert_eq!(
        model.get_ref().activation,
        i32::from(pb::Activation::Sigmoid)
    );
    assert_eq!(model.get_ref().tasks, [i32::from(pb::Task::Classify)]);
    // The folder has no model.onnx, so nothing can be embedded.
    let error = running
        .client
        .embed(embed(vec![harness::flat(1)]))
        .await
        .expect_err("no graph");
    assert_eq!(error.code(), Code::Unimplemented);
    assert!(error.message().contains("model.onnx"), "{error}");
    running.end().await;
}

#[tokio::test]
async fn without_labels_there_are_only_logits() {
    let mut running = harness::onnx("no-labels", &[]).await;
    let case = &expected()[0];
    let response = running
        .client
        .classify(pb::ClassifyRequest {
            images: vec![tokens(case.tokens.clone())],
            ..Default::default()
        })
        .await
        .expect("a response")
        .into_inner();
    let classification = classification(&response.results[0]);
    assert!(classification.classes.is_empty());
    let logits = f32s(classification.logits.as_ref().expect("logits unasked"));
    assert!(relative_error(&logits, &case.raw.logits) <= 1e-5);
    let model = running
        .client
        .get_model(pb::GetModelRequest {})
        .await
        .expect("a model");
    assert!(model.get_ref().labels.is_empty());
    assert_eq!(
        model.get_ref().activation,
        i32::from(pb::Activation::Unspecified)
    );
    running.end().await;
}

#[tokio::test]
async fn the_three_forms_of_an_image_agree() {
    let mut running = harness::onnx("untrained", &[]).await;
    let pixels: Vec<u8> = (0..40 * 30 * 3_u32).map(|i| (i * 7 % 251) as u8).collect();
    let mut png = Vec::new();
    image::RgbImage::from_raw(40, 30, pixels.clone())
        .expect("40 x 30")
        .write_to(&mut std::io::Cursor::new(&mut png), image::ImageFormat::Png)
        .expect("a PNG");
    let raw = pb::Image {
        source: Some(pb::image::Source::Rgb8(pb::RawImage {
            width: 40,
            height: 30,
            pixels: pixels.into(),
        })),
    };
    let response = running
        .client
        .tokenize(pb::TokenizeRequest {
            images: vec![encoded(png.clone()), raw.clone()],
            preprocess: None,
        })
        .await
        .expect("a response")
        .into_inner();
    let ids: Vec<Vec<u32>> = response
        .results
        .iter()
        .map(
            |result| match result.outcome.as_ref().expect("an outcome") {
                pb::tokenize_result::Outcome::Tokens(tokens) => tokens.ids.clone(),
                pb::tokenize_result::Outcome::Error(status) => panic!("{status:?}"),
            },
        )
        .collect();
    assert_eq!(ids[0].len(), 1024);
    assert_eq!(ids[0], ids[1]);
    assert_eq!(
        response.preprocess,
        Some(pb::Preprocess {
            fit: pb::Fit::Squash.into(),
            alpha: pb::Alpha::Drop.into(),
        }),
        "the defaults are filled in"
    );
    let response = running
        .client
        .embed(embed(vec![encoded(png), raw, tokens(ids[0].clone())]))
        .await
        .expect("a response")
        .into_inner();
    let vectors: Vec<Vec<f32>> = response
        .results
        .iter()
        .map(|result| vector(result).expect("a vector"))
        .collect();
    assert_eq!(vectors[0], vectors[1]);
    assert_eq!(vectors[0], vectors[2]);
    running.end().await;
}

#[tokio::test]
async fn get_model_tells_what_is_loaded() {
    let mut running = harness::onnx("untrained", &["--max-batch-size", "4"]).await;
    let model = running
        .client
        .get_model(pb::GetModelRequest {})
        .await
        .expect("a model")
        .into_inner();
    assert_eq!(model.name, "untrained");
    assert!(
        model.digest.starts_with("sha256:") && model.digest.len() == 71,
        "{}",
        model.digest
    );
    assert_eq!(
        model.tasks,
        [i32::from(pb::Task::Embed), i32::from(pb::Task::Classify)]
    );
    assert_eq!((model.positions, model.side), (1024, 32));
    assert!(model.dimension > 0 && model.layers > 0);
    assert_eq!(model.palette_rgb8.len(), 512 * 3);
    assert_eq!(model.execution_provider, "cpu");
    assert!(
        model.onnxruntime_version.starts_with("1."),
        "{}",
        model.onnxruntime_version
    );
    assert_eq!(model.worker_version, env!("CARGO_PKG_VERSION"));
    assert!(model.notice.contains("untrained"), "{}", model.notice);
    let limits = model.limits.expect("limits");
    assert_eq!(
        (limits.batch_size_max, limits.images_per_call_max),
        (4, 256)
    );
    running.end().await;
}
