//! The Open Inference Protocol: answers equal those of the native service bit
//! for bit, and every kind of wrong request gets its error.

use std::collections::HashMap;
use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};
use imagegpt::engine::fake::Script;
use imagegpt::model::precision::Precision;
use imagegpt::proto::inference as oip;
use imagegpt::proto::inference::grpc_inference_service_client::GrpcInferenceServiceClient;
use imagegpt::proto::inference::infer_parameter::ParameterChoice;
use imagegpt::proto::inference::model_infer_request::{
    InferInputTensor, InferRequestedOutputTensor,
};
use imagegpt::proto::pb;
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::batching::{wait_for_batches, wait_for_depth};
use crate::harness::{
    self, Running, embed, encoded, fake_answer, flat, gated, sample, seeded, tokens, until_sample,
    vector,
};

pub(crate) type Client = GrpcInferenceServiceClient<Channel>;

/// Flags that run every image alone where bits are compared, since kernels for
/// one row may add in another order than those for several rows.
const ALONE: [&str; 2] = ["--max-batch-size", "1"];

pub(crate) async fn client(running: &Running) -> Client {
    Client::connect(running.url()).await.expect("a connection")
}

pub(crate) fn word(text: &str) -> ParameterChoice {
    ParameterChoice::StringParam(text.to_owned())
}

pub(crate) fn parameters(list: &[(&str, ParameterChoice)]) -> HashMap<String, oip::InferParameter> {
    list.iter()
        .map(|(name, choice)| {
            let parameter_choice = Some(choice.clone());
            ((*name).to_owned(), oip::InferParameter { parameter_choice })
        })
        .collect()
}

pub(crate) fn output(name: &str, list: &[(&str, ParameterChoice)]) -> InferRequestedOutputTensor {
    InferRequestedOutputTensor {
        name: name.to_owned(),
        parameters: parameters(list),
    }
}

pub(crate) fn outputs(names: &[&str]) -> Vec<InferRequestedOutputTensor> {
    names.iter().map(|name| output(name, &[])).collect()
}

/// Makes a request with one raw input.
fn raw(name: &str, datatype: &str, shape: &[i64], contents: impl Into<Bytes>) -> Asked {
    oip::ModelInferRequest {
        model_name: "micro".to_owned(),
        inputs: vec![InferInputTensor {
            name: name.to_owned(),
            datatype: datatype.to_owned(),
            shape: shape.to_vec(),
            ..Default::default()
        }],
        raw_input_contents: vec![contents.into()],
        ..Default::default()
    }
}

pub(crate) type Asked = oip::ModelInferRequest;

fn extent(n: usize) -> i64 {
    i64::try_from(n).expect("few")
}

/// Makes a request of `images` as INT64 tokens.
pub(crate) fn ids(images: &[Vec<u32>]) -> Asked {
    let mut contents = BytesMut::new();
    for &id in images.iter().flatten() {
        contents.put_i64_le(id.into());
    }
    raw("input_ids", "INT64", &[extent(images.len()), 64], contents)
}

pub(crate) fn files(files: &[&[u8]]) -> Asked {
    let mut contents = BytesMut::new();
    for file in files {
        contents.put_u32_le(u32::try_from(file.len()).expect("small"));
        contents.put_slice(file);
    }
    raw("image", "BYTES", &[extent(files.len())], contents)
}

pub(crate) async fn infer(
    client: &mut Client,
    request: &Asked,
) -> Result<oip::ModelInferResponse, Status> {
    let response = client.model_infer(request.clone()).await?.into_inner();
    assert_eq!(response.outputs.len(), response.raw_output_contents.len());
    Ok(response)
}

/// Returns an output by its name: datatype, shape and bytes.
pub(crate) fn tensor<'a>(
    response: &'a oip::ModelInferResponse,
    name: &str,
) -> (&'a str, &'a [i64], &'a [u8]) {
    let idx = response
        .outputs
        .iter()
        .position(|output| output.name == name)
        .unwrap_or_else(|| panic!("no {name} in {:?}", response.outputs));
    let output = &response.outputs[idx];
    (
        &output.datatype,
        &output.shape,
        &response.raw_output_contents[idx],
    )
}

/// Returns the elements of a BYTES tensor.
fn elements(mut raw: &[u8]) -> Vec<String> {
    let mut elements = Vec::new();
    while let Some((length, rest)) = raw.split_first_chunk() {
        let (element, rest) = rest.split_at(u32::from_le_bytes(*length) as usize);
        elements.push(String::from_utf8(element.to_vec()).expect("UTF-8"));
        raw = rest;
    }
    assert!(raw.is_empty());
    elements
}

/// Returns the bytes of native embeddings, row after row.
async fn native(running: &Running, request: pb::EmbedRequest) -> Vec<u8> {
    let response = running.client.clone().embed(request).await;
    let results = response.expect("embeddings").into_inner().results;
    results
        .into_iter()
        .flat_map(|result| match result.outcome.expect("an outcome") {
            pb::embed_result::Outcome::Embedding(tensor) => tensor.data,
            pb::embed_result::Outcome::Error(status) => panic!("{status:?}"),
        })
        .collect()
}

pub(crate) fn golden(name: &str) -> Vec<u8> {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/images/");
    std::fs::read(format!("{folder}{name}")).expect("a golden image")
}

#[tokio::test]
async fn answers_equal_the_native_services_bit_for_bit() {
    let running = harness::onnx("micro", &ALONE).await;
    let mut client = client(&running).await;
    let images: Vec<Vec<u32>> = (0..5).map(seeded).collect();
    let natives = || images.iter().cloned().map(tokens).collect::<Vec<_>>();
    let mut request = ids(&images);
    request.id = "call 7".to_owned();
    request.model_version = "1".to_owned();

    // None named: the embedding alone.
    let response = infer(&mut client, &request).await.expect("an answer");
    assert_eq!(response.id, "call 7");
    assert_eq!(
        (
            response.model_name.as_str(),
            response.model_version.as_str()
        ),
        ("micro", "1")
    );
    assert_eq!(response.outputs.len(), 1);
    let plain = native(&running, embed(natives())).await;
    assert_eq!(
        tensor(&response, "embedding"),
        ("FP32", &[5, 16][..], &plain[..])
    );

    // Everything at once, in the order asked for.
    request.outputs = outputs(&["tokens", "logits", "last_hidden_state", "embedding"]);
    let response = infer(&mut client, &request).await.expect("an answer");
    let names: Vec<&str> = response.outputs.iter().map(|o| o.name.as_str()).collect();
    assert_eq!(
        names,
        ["tokens", "logits", "last_hidden_state", "embedding"]
    );
    assert_eq!(tensor(&response, "embedding").2, plain);
    let states = native(
        &running,
        pb::EmbedRequest {
            pooling: pb::Pooling::None.into(),
            ..embed(natives())
        },
    )
    .await;
    assert_eq!(
        tensor(&response, "last_hidden_state"),
        ("FP32", &[5, 64, 16][..], &states[..])
    );
    let back: Vec<u8> = images
        .iter()
        .flatten()
        .flat_map(|&id| i32::try_from(id).expect("small").to_le_bytes())
        .collect();
    assert_eq!(
        tensor(&response, "tokens"),
        ("INT32", &[5, 64][..], &back[..])
    );
    let classify = pb::ClassifyRequest {
        images: natives(),
        logits: true,
        ..Default::default()
    };
    let classes = running.client.clone().classify(classify).await;
    let logits: Vec<u8> = classes
        .expect("classes")
        .into_inner()
        .results
        .into_iter()
        .flat_map(|result| match result.outcome.expect("an outcome") {
            pb::classify_result::Outcome::Classification(c) => c.logits.expect("logits").data,
            pb::classify_result::Outcome::Error(status) => panic!("{status:?}"),
        })
        .collect();
    assert_eq!(
        tensor(&response, "logits"),
        ("FP32", &[5, 3][..], &logits[..])
    );

    // Options, of the request and of one output.
    request.parameters = parameters(&[
        ("context", word("sos_shifted")),
        ("normalize", ParameterChoice::BoolParam(true)),
        ("nobody_knows", word("this")),
    ]);
    request.outputs = vec![output(
        "embedding",
        &[("dtype", word("FP16")), ("pooling", word("last"))],
    )];
    let response = infer(&mut client, &request).await.expect("an answer");
    let halves = native(
        &running,
        pb::EmbedRequest {
            context: pb::Context::SosShifted.into(),
            normalize: true,
            pooling: pb::Pooling::Last.into(),
            dtype: pb::DataType::F16.into(),
            ..embed(natives())
        },
    )
    .await;
    assert_eq!(
        tensor(&response, "embedding"),
        ("FP16", &[5, 16][..], &halves[..])
    );
    let page = running.metrics().await;
    let calls = "imagegpt_requests_total{method=\"ModelInfer\",code=\"OK\"}";
    assert_eq!(sample(&page, calls), 3.0);
    running.end().await;
}

#[tokio::test]
async fn images_come_in_every_form() {
    let running = harness::onnx("micro", &ALONE).await;
    let mut client = client(&running).await;
    let (png, jpeg) = (golden("png-la.png"), golden("jpeg-rgb.jpg"));
    let expected = native(
        &running,
        pb::EmbedRequest {
            preprocess: Some(pb::Preprocess {
                fit: pb::Fit::CenterCrop.into(),
                alpha: pb::Alpha::White.into(),
            }),
            ..embed(vec![encoded(png.clone()), encoded(jpeg.clone())])
        },
    )
    .await;
    let options = [("fit", word("center_crop")), ("alpha", word("white"))];
    let mut raw_files = files(&[&png, &jpeg]);
    raw_files.parameters = parameters(&options);
    let response = infer(&mut client, &raw_files).await.expect("raw");
    assert_eq!(tensor(&response, "embedding").2, expected);
    // As Triton's models have it, and typed.
    let mut typed = raw_files;
    typed.raw_input_contents.clear();
    typed.inputs[0].shape = vec![2, 1];
    typed.inputs[0].contents = Some(oip::InferTensorContents {
        bytes_contents: vec![png.into(), jpeg.into()],
        ..Default::default()
    });
    let response = infer(&mut client, &typed).await.expect("typed");
    assert_eq!(tensor(&response, "embedding").2, expected);

    // Pixels, two images of one size.
    let pixels: Vec<u8> = (0..2 * 5 * 7 * 3)
        .map(|n: u32| u8::try_from(n * 11 % 256).expect("a byte"))
        .collect();
    let natives = pixels.chunks(5 * 7 * 3).map(|pixels| pb::Image {
        source: Some(pb::image::Source::Rgb8(pb::RawImage {
            width: 7,
            height: 5,
            pixels: pixels.to_vec().into(),
        })),
    });
    let expected = native(&running, embed(natives.collect())).await;
    let request = raw("pixels", "UINT8", &[2, 5, 7, 3], pixels.clone());
    let response = infer(&mut client, &request).await.expect("raw");
    assert_eq!(tensor(&response, "embedding").2, expected);
    let mut typed = request;
    typed.raw_input_contents.clear();
    typed.inputs[0].contents = Some(oip::InferTensorContents {
        uint_contents: pixels.iter().copied().map(u32::from).collect(),
        ..Default::default()
    });
    let response = infer(&mut client, &typed).await.expect("typed");
    assert_eq!(tensor(&response, "embedding").2, expected);

    // Tokens of both widths, in both forms.
    let images = [seeded(1), seeded(2)];
    let expected = native(
        &running,
        embed(images.iter().cloned().map(tokens).collect()),
    )
    .await;
    let flat_ids = images.concat();
    let narrow: Vec<u8> = flat_ids.iter().flat_map(|id| id.to_le_bytes()).collect();
    let int32 = raw("input_ids", "INT32", &[2, 64], narrow);
    let mut typed64 = ids(&images);
    typed64.raw_input_contents.clear();
    typed64.inputs[0].contents = Some(oip::InferTensorContents {
        int64_contents: flat_ids.iter().copied().map(i64::from).collect(),
        ..Default::default()
    });
    let mut typed32 = int32.clone();
    typed32.raw_input_contents.clear();
    typed32.inputs[0].contents = Some(oip::InferTensorContents {
        int_contents: flat_ids.iter().map(|id| id.cast_signed()).collect(),
        ..Default::default()
    });
    for request in [int32, typed64, typed32] {
        let response = infer(&mut client, &request).await.expect("an answer");
        assert_eq!(tensor(&response, "embedding").2, expected);
    }
    running.end().await;
}

#[tokio::test]
async fn likelihoods_equal_the_native_services() {
    let folder = tempfile::tempdir().expect("a folder");
    let running = crate::generate::causal(folder.path(), Precision::Fp32, &ALONE).await;
    let mut client = client(&running).await;
    let model = client
        .repository_index(oip::RepositoryIndexRequest::default())
        .await
        .expect("an index")
        .into_inner()
        .models
        .remove(0);
    assert_eq!(
        (model.state.as_str(), model.version.as_str()),
        ("READY", "1")
    );
    let score = pb::ScoreRequest {
        images: vec![tokens(seeded(4)), flat(2)],
        map: true,
        ..Default::default()
    };
    let scores = running.client.clone().score(score).await.expect("scores");
    let expected: Vec<u8> = scores
        .into_inner()
        .results
        .into_iter()
        .flat_map(|result| match result.outcome.expect("an outcome") {
            pb::score_result::Outcome::Score(score) => score.map.expect("a map").data,
            pb::score_result::Outcome::Error(status) => panic!("{status:?}"),
        })
        .collect();
    let mut request = ids(&[seeded(4), vec![2; 64]]);
    request.model_name = model.name;
    request.outputs = outputs(&["nll"]);
    let response = infer(&mut client, &request).await.expect("an answer");
    assert_eq!(
        tensor(&response, "nll"),
        ("FP32", &[2, 64][..], &expected[..])
    );
    running.end().await;
}

#[tokio::test]
async fn classification_names_the_best_classes() {
    let running = harness::onnx("micro", &ALONE).await;
    let mut client = client(&running).await;
    let mut request = ids(&[seeded(1), seeded(2)]);
    request.outputs = outputs(&["logits"]);
    let plain = infer(&mut client, &request).await.expect("logits");
    let logits: Vec<f32> = tensor(&plain, "logits")
        .2
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four")))
        .collect();
    request.outputs = vec![output(
        "logits",
        &[("classification", ParameterChoice::Int64Param(2))],
    )];
    let response = infer(&mut client, &request).await.expect("classes");
    let (datatype, shape, raw) = tensor(&response, "logits");
    assert_eq!((datatype, shape), ("BYTES", &[2, 2][..]));
    let labels = ["circle", "square", "triangle"];
    let expected: Vec<String> = logits
        .chunks_exact(3)
        .flat_map(|row| {
            let mut order = [0, 1, 2];
            order.sort_by(|&a: &usize, &b| row[b].total_cmp(&row[a]));
            order[..2]
                .iter()
                .map(|&idx| format!("{}:{idx}:{}", row[idx], labels[idx]))
                .collect::<Vec<_>>()
        })
        .collect();
    assert_eq!(elements(raw), expected);
    // More than there are.
    request.outputs = vec![output(
        "logits",
        &[("classification", ParameterChoice::Uint64Param(99))],
    )];
    let response = infer(&mut client, &request).await.expect("classes");
    assert_eq!(tensor(&response, "logits").1, [2, 3]);
    running.end().await;
}

/// Requests that are wrong in one place, with the expected error.
#[expect(clippy::too_many_lines, reason = "a table, a fault a row")]
fn wrong() -> Vec<(Asked, Code, &'static str)> {
    let good = || ids(&[seeded(1), seeded(2)]);
    let with = |change: &dyn Fn(&mut Asked)| {
        let mut request = good();
        change(&mut request);
        request
    };
    let parameter = |name: &'static str, choice: ParameterChoice| {
        with(&move |request| request.parameters = parameters(&[(name, choice.clone())]))
    };
    let invalid = Code::InvalidArgument;
    vec![
        (
            with(&|r| r.model_name = "other".into()),
            Code::NotFound,
            "\"other\" is not found; the worker serves \"micro\"",
        ),
        (
            with(&|r| r.model_version = "2".into()),
            Code::NotFound,
            "micro, version 2",
        ),
        (
            with(&|r| r.model_version = "new".into()),
            invalid,
            "model_version: \"new\" is not a whole number",
        ),
        (
            with(&|r| r.inputs.clear()),
            invalid,
            "inputs: the request has 0 inputs",
        ),
        (
            with(&|r| r.inputs[0].name = "pixel_values".into()),
            invalid,
            "\"pixel_values\" is not an input; send image",
        ),
        (
            with(&|r| r.inputs[0].datatype = "FP32".into()),
            invalid,
            "input_ids: its datatype is \"FP32\"; it must be INT64 or INT32",
        ),
        (
            with(&|r| r.inputs[0].shape = vec![2, 63]),
            invalid,
            "input_ids: its shape is [2, 63]; it must be [-1, 64]",
        ),
        (
            with(&|r| r.inputs[0].shape = vec![-1, 64]),
            invalid,
            "its shape is [-1, 64]",
        ),
        (
            with(&|r| r.inputs[0].shape = vec![3, 64]),
            invalid,
            "its raw contents have 1024 bytes, but its shape and datatype take 192 times 8",
        ),
        (
            with(&|r| r.inputs[0].shape = vec![0, 64]),
            invalid,
            "images: the call has no image",
        ),
        (
            with(&|r| r.inputs[0].shape = vec![1 << 40, 64]),
            invalid,
            "--images-per-call-max",
        ),
        (
            with(&|r| r.raw_input_contents.clear()),
            invalid,
            "it has no data; send contents or raw_input_contents",
        ),
        (
            with(&|r| r.raw_input_contents.push(Bytes::new())),
            invalid,
            "raw_input_contents: the request has 2 entries for 1 input",
        ),
        (
            with(&|r| r.inputs[0].contents = Some(oip::InferTensorContents::default())),
            invalid,
            "contents must not be set if raw_input_contents is set",
        ),
        (
            with(&|r| {
                r.raw_input_contents.clear();
                r.inputs[0].contents = Some(oip::InferTensorContents {
                    int_contents: vec![1; 128],
                    ..Default::default()
                });
            }),
            invalid,
            "int64_contents has 0 elements, but its shape takes 128",
        ),
        (
            raw("image", "BYTES", &[1], &b"\x09\0\0\0short"[..]),
            invalid,
            "image: its raw contents end within element 0 of 1",
        ),
        (
            raw("image", "UINT8", &[1], &b"\0\0\0\0"[..]),
            invalid,
            "image: its datatype is \"UINT8\"; it must be BYTES",
        ),
        (
            raw("pixels", "UINT8", &[1, 2, 2, 4], vec![0; 16]),
            invalid,
            "it must be [-1, height, width, 3]",
        ),
        (
            raw("pixels", "UINT8", &[1, i64::MAX, i64::MAX, 3], vec![0; 16]),
            invalid,
            "it must be [-1, height, width, 3]",
        ),
        (
            with(&|r| r.outputs = outputs(&["scores"])),
            invalid,
            "outputs: \"scores\" is not an output; name embedding",
        ),
        (
            with(&|r| r.outputs = outputs(&["tokens", "tokens"])),
            invalid,
            "tokens is named twice",
        ),
        (
            with(&|r| r.outputs = outputs(&["tokens", "status"])),
            invalid,
            "status is only available with the parameter partial",
        ),
        (
            with(&|r| r.outputs = outputs(&["nll"])),
            Code::Unimplemented,
            "cannot score",
        ),
        (
            parameter("fit", word("stretch")),
            invalid,
            "fit: \"stretch\" is not one of squash, center_crop",
        ),
        (
            parameter("layer", ParameterChoice::Int64Param(1)),
            invalid,
            "layers: [1] with this norm and pooling are not served",
        ),
        (
            parameter("head", word("mood")),
            // Not needed for an embedding, so not looked at.
            Code::Ok,
            "",
        ),
        (
            with(&|r| r.outputs = vec![output("logits", &[("head", word("mood"))])]),
            Code::NotFound,
            "head: \"mood\" is not loaded",
        ),
        (
            parameter("priority", ParameterChoice::Int64Param(3)),
            invalid,
            "priority: 3 is not a level; use 1 (interactive), 2 (bulk) or 0",
        ),
        (
            with(&|r| {
                r.outputs = vec![output("tokens", &[("shared_memory_region", word("a"))])];
            }),
            invalid,
            "shared_memory_region: the worker has no shared memory",
        ),
        (
            with(&|r| {
                r.raw_input_contents.clear();
                r.inputs[0].parameters = parameters(&[("shared_memory_region", word("a"))]);
            }),
            invalid,
            "shared_memory_region: the worker has no shared memory",
        ),
        (
            parameter("timeout", word("soon")),
            invalid,
            "timeout: it must be an int64_param",
        ),
        (ids(&[seeded(1), vec![16; 64]]), invalid, "image 1: "),
        (files(&[b"no image"]), invalid, "image 0: encoded"),
    ]
}

#[tokio::test]
async fn what_is_wrong_is_told() {
    let running = harness::fake(Script::default(), &[]).await;
    let mut client = client(&running).await;
    for (request, code, words) in wrong() {
        match infer(&mut client, &request).await {
            Ok(_) => assert_eq!(code, Code::Ok, "{words}"),
            Err(status) => {
                assert_eq!(status.code(), code, "{status}");
                assert!(status.message().contains(words), "{status} lacks {words}");
            }
        }
    }
    // A negative id is one image's own fault.
    let mut request = ids(&[seeded(1), seeded(2)]);
    let mut contents = BytesMut::from(&request.raw_input_contents[0][..]);
    contents[64 * 8..][..8].copy_from_slice(&(-5_i64).to_le_bytes());
    request.raw_input_contents = vec![contents.freeze()];
    let status = infer(&mut client, &request).await.expect_err("negative");
    assert!(
        status.message().contains("image 1: input_ids: -5"),
        "{status}"
    );
    running.end().await;
}

#[tokio::test]
async fn a_partial_answer_says_whose_is_missing() {
    let script = Script {
        fail_on: Some(9),
        ..Default::default()
    };
    let running = harness::fake(script, &[]).await;
    let mut client = client(&running).await;
    let images = [seeded(1), vec![9; 64], vec![16; 64], seeded(2)];
    let mut request = ids(&images);
    request.parameters = parameters(&[("partial", ParameterChoice::BoolParam(true))]);
    request.outputs = vec![
        output("status", &[]),
        output("embedding", &[]),
        output(
            "logits",
            &[("classification", ParameterChoice::Int64Param(1))],
        ),
        output("tokens", &[]),
    ];
    let response = infer(&mut client, &request).await.expect("an answer");
    assert_eq!(response.outputs[0].name, "status");
    let (datatype, shape, raw) = tensor(&response, "status");
    assert_eq!((datatype, shape), ("BYTES", &[4][..]));
    let status = elements(raw);
    assert_eq!((status[0].as_str(), status[3].as_str()), ("", ""));
    assert!(
        status[1].starts_with("INTERNAL: the model run failed"),
        "{status:?}"
    );
    assert!(status[2].starts_with("INVALID_ARGUMENT: "), "{status:?}");
    let rows: Vec<Vec<f32>> = tensor(&response, "embedding")
        .2
        .chunks_exact(16)
        .map(|row| {
            row.chunks_exact(4)
                .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four")))
                .collect()
        })
        .collect();
    assert_eq!(rows[0], fake_answer(&images[0]));
    assert_eq!((&rows[1], &rows[2]), (&vec![0.0; 4], &vec![0.0; 4]));
    assert_eq!(rows[3], fake_answer(&images[3]));
    let classes = elements(tensor(&response, "logits").2);
    assert_eq!(classes.len(), 4);
    assert!(classes[1].is_empty() && classes[2].is_empty() && !classes[3].is_empty());
    // The tokens of the image whose run failed are known.
    let tokens = tensor(&response, "tokens").2;
    assert_eq!(tokens[64 * 4..][..4], 9_i32.to_le_bytes());

    // Not asked for by name, it comes last.
    request.outputs = outputs(&["tokens"]);
    let response = infer(&mut client, &request).await.expect("an answer");
    assert_eq!(response.outputs[1].name, "status");
    // Without it the first fault is the call's.
    request.parameters.clear();
    request.outputs.clear();
    let status = infer(&mut client, &request).await.expect_err("a fault");
    assert_eq!(status.code(), Code::Internal);
    assert!(
        status
            .message()
            .starts_with("image 1: the model run failed"),
        "{status}"
    );
    running.end().await;
}

#[tokio::test]
async fn a_stream_answers_in_order_and_outlives_errors() {
    let running = harness::fake(Script::default(), &["--stream-window-max", "3"]).await;
    let mut client = client(&running).await;
    let request = |idx: u32| {
        let mut request = ids(&[seeded(idx)]);
        request.id = format!("r{idx}");
        if idx % 5 == 3 {
            request.inputs[0].datatype = "FP32".into();
        }
        if idx % 5 == 4 {
            request.parameters = parameters(&[(
                "triton_enable_empty_final_response",
                ParameterChoice::BoolParam(true),
            )]);
        }
        request
    };
    let requests = tokio_stream::iter((0..40).map(request).collect::<Vec<_>>());
    let mut answers = client
        .model_stream_infer(requests)
        .await
        .expect("a stream")
        .into_inner();
    for idx in 0..40 {
        let answer = answers.message().await.expect("no error").expect("more");
        let response = answer.infer_response.expect("with the id");
        assert_eq!(response.id, format!("r{idx}"));
        if idx % 5 == 3 {
            let message = answer.error_message;
            assert!(
                message.starts_with("INVALID_ARGUMENT: input_ids: its datatype"),
                "{message}"
            );
            assert!(response.outputs.is_empty());
            continue;
        }
        assert_eq!(answer.error_message, "");
        let expected: Vec<u8> = fake_answer(&seeded(idx))
            .into_iter()
            .flat_map(f32::to_le_bytes)
            .collect();
        assert_eq!(tensor(&response, "embedding").2, expected);
        let is_final = response.parameters.get("triton_final_response");
        assert_eq!(is_final.is_some(), idx % 5 == 4);
    }
    assert!(answers.message().await.expect("a clean end").is_none());
    drop(answers);
    let calls = "imagegpt_requests_total{method=\"ModelStreamInfer\",code=\"OK\"}";
    until_sample(&running, calls, |n| n == 1.0).await;
    assert_eq!(running.sample("imagegpt_streams").await, 0.0);
    running.end().await;
}

#[tokio::test]
async fn a_stream_reads_no_further_than_its_window() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--stream-window-max", "4"]).await;
    let mut client = client(&running).await;
    let requests = tokio_stream::iter((0..20).map(|idx| ids(&[seeded(idx)])).collect::<Vec<_>>());
    let mut answers = client
        .model_stream_infer(requests)
        .await
        .expect("a stream")
        .into_inner();
    running.until_in_flight(4).await;
    harness::pause(Duration::from_millis(20)).await;
    assert_eq!(running.worker.images_in_flight(), 4);
    drop(open);
    for _ in 0..20 {
        answers.message().await.expect("no error").expect("more");
    }
    assert!(answers.message().await.expect("a clean end").is_none());
    running.end().await;
}

#[tokio::test]
async fn a_stream_ends_with_the_worker() {
    let running = harness::fake(Script::default(), &[]).await;
    let mut client = client(&running).await;
    let (tx, rx) = tokio::sync::mpsc::channel(1);
    tx.send(ids(&[seeded(1)])).await.expect("sent");
    let requests = tokio_stream::wrappers::ReceiverStream::new(rx);
    let mut answers = client
        .model_stream_infer(requests)
        .await
        .expect("a stream")
        .into_inner();
    answers.message().await.expect("no error").expect("one");
    let end = tokio::spawn(running.end());
    let status = answers.message().await.expect_err("the worker drains");
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(
        status
            .message()
            .contains("every item that was read was answered")
    );
    drop((tx, answers, client));
    end.await.expect("no panic");
}

#[tokio::test]
async fn its_own_timeout_ends_a_request() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let mut client = client(&running).await;
    let mut request = ids(&[seeded(1)]);
    request.parameters = parameters(&[("timeout", ParameterChoice::Int64Param(30_000))]);
    let status = infer(&mut client, &request).await.expect_err("late");
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status}");
    running.until_in_flight(0).await;
    drop(open);
    let late = "imagegpt_images_total{code=\"DEADLINE_EXCEEDED\"}";
    assert_eq!(running.sample(late).await, 1.0);
    request.parameters = parameters(&[("timeout", ParameterChoice::Int64Param(0))]);
    infer(&mut client, &request).await.expect("none");
    running.end().await;
}

#[tokio::test]
async fn both_protocols_share_batches_and_classes() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let blocking = {
        let mut client = running.client.clone();
        tokio::spawn(async move { client.embed(embed(vec![flat(1)])).await })
    };
    wait_for_batches(&running, 1.0).await;
    let theirs: Vec<_> = (10..13)
        .map(|seed| {
            let client = client(&running);
            let mut request = ids(&[seeded(seed)]);
            if seed == 12 {
                request.parameters = parameters(&[("priority", ParameterChoice::Uint64Param(2))]);
            }
            (client, request)
        })
        .collect();
    let mut calls = Vec::new();
    for (client, request) in theirs {
        let mut client = client.await;
        calls.push(tokio::spawn(
            async move { infer(&mut client, &request).await },
        ));
    }
    let native = {
        let mut client = running.client.clone();
        tokio::spawn(async move { client.embed(embed(vec![tokens(seeded(20))])).await })
    };
    wait_for_depth(&running, 4.0).await;
    let bulk = "imagegpt_queue_depth{class=\"bulk\"}";
    assert_eq!(running.sample(bulk).await, 1.0);
    for _ in 0..2 {
        open.send(()).expect("a run");
    }
    blocking.await.expect("no panic").expect("an answer");
    for call in calls {
        call.await.expect("no panic").expect("an answer");
    }
    let response = native.await.expect("no panic").expect("an answer");
    assert_eq!(
        vector(&response.get_ref().results[0]).expect("a vector"),
        fake_answer(&seeded(20))
    );
    let page = running.metrics().await;
    let runs = "imagegpt_batch_size_count{graph=\"hidden\"}";
    assert_eq!(sample(&page, runs), 2.0, "one run for both protocols");
    running.end().await;
}

#[tokio::test]
async fn statistics_agree_with_each_other() {
    let running = harness::onnx("micro", &[]).await;
    let mut client = client(&running).await;
    for n_images in [1, 3] {
        let images: Vec<Vec<u32>> = (0..n_images).map(|n| seeded(100 * n_images + n)).collect();
        infer(&mut client, &ids(&images)).await.expect("an answer");
    }
    running
        .client
        .clone()
        .embed(embed(vec![tokens(seeded(900))]))
        .await
        .expect("an answer");
    infer(&mut client, &raw("none", "BYTES", &[1], Bytes::new()))
        .await
        .expect_err("no such input");
    let statistics = async |name: &str| {
        let request = oip::ModelStatisticsRequest {
            name: name.to_owned(),
            ..Default::default()
        };
        let mut client = client.clone();
        client.model_statistics(request).await
    };
    let response = statistics("micro").await.expect("statistics").into_inner();
    let stats = &response.model_stats[0];
    assert_eq!(
        (stats.name.as_str(), stats.version.as_str()),
        ("micro", "1")
    );
    assert_eq!(stats.inference_count, 5);
    assert!(stats.last_inference > 1_700_000_000_000);
    let sums = stats.inference_stats.as_ref().expect("sums");
    assert_eq!(sums.success.expect("calls").count, 3);
    assert_eq!(sums.fail.expect("calls").count, 1);
    for sum in [
        sums.queue,
        sums.compute_input,
        sums.compute_infer,
        sums.compute_output,
    ] {
        assert_eq!(sum.expect("a sum").count, 5);
    }
    assert!(sums.compute_infer.expect("a sum").ns > 0);
    let batches = stats.batch_stats.iter();
    let (runs, images) = batches.fold((0, 0), |(runs, images), batch| {
        let count = batch.compute_infer.expect("a sum").count;
        assert_eq!(batch.compute_input.expect("a sum").count, count);
        assert_eq!(batch.compute_output.expect("a sum").count, count);
        (runs + count, images + count * batch.batch_size)
    });
    assert_eq!((runs, images), (stats.execution_count, 5));
    assert_eq!(
        statistics("")
            .await
            .expect("all")
            .get_ref()
            .model_stats
            .len(),
        1
    );
    let status = statistics("other").await.expect_err("unknown");
    assert_eq!(status.code(), Code::NotFound);
    running.end().await;
}

#[tokio::test]
async fn the_server_and_the_model_describe_themselves() {
    let running = harness::onnx("micro", &[]).await;
    let mut client = client(&running).await;
    let live = client.server_live(oip::ServerLiveRequest {}).await;
    assert!(live.expect("an answer").get_ref().live);
    let ready = client.server_ready(oip::ServerReadyRequest {}).await;
    assert!(ready.expect("an answer").get_ref().ready);
    for (name, version, expected) in [
        ("micro", "", true),
        ("micro", "1", true),
        ("micro", "2", false),
        ("other", "", false),
    ] {
        let request = oip::ModelReadyRequest {
            name: name.to_owned(),
            version: version.to_owned(),
        };
        let ready = client.model_ready(request).await.expect("an answer");
        assert_eq!(ready.get_ref().ready, expected, "{name} {version}");
    }
    let server = client
        .server_metadata(oip::ServerMetadataRequest {})
        .await
        .expect("an answer")
        .into_inner();
    assert!(server.extensions.iter().any(|name| name == "statistics"));
    let named = |name: &str| oip::ModelMetadataRequest {
        name: name.to_owned(),
        version: String::new(),
    };
    let model = client
        .model_metadata(named("micro"))
        .await
        .expect("an answer")
        .into_inner();
    let listed = |tensors: &[oip::model_metadata_response::TensorMetadata]| -> Vec<String> {
        tensors
            .iter()
            .map(|t| format!("{} {} {:?}", t.name, t.datatype, t.shape))
            .collect()
    };
    assert_eq!(
        listed(&model.inputs),
        [
            "image BYTES [-1, 1]",
            "input_ids INT64 [-1, 64]",
            "pixels UINT8 [-1, -1, -1, 3]"
        ]
    );
    assert_eq!(
        listed(&model.outputs),
        [
            "embedding FP32 [-1, 16]",
            "last_hidden_state FP32 [-1, 64, 16]",
            "logits FP32 [-1, 3]",
            "tokens INT32 [-1, 64]"
        ]
    );
    assert_eq!(
        model.properties["labels"],
        "[\"circle\",\"square\",\"triangle\"]"
    );
    let unknown = client.model_metadata(named("other")).await;
    assert_eq!(unknown.expect_err("unknown").code(), Code::NotFound);
    let config = client
        .model_config(oip::ModelConfigRequest {
            name: "micro".to_owned(),
            version: String::new(),
        })
        .await
        .expect("an answer")
        .into_inner()
        .config
        .expect("a config");
    assert!(config.max_batch_size > 0 && config.input.iter().all(|input| input.optional));
    assert_eq!(config.input[1].dims, [64]);
    assert_eq!(config.output[1].dims, [64, 16]);
    running.end().await;
}

#[tokio::test]
async fn a_worker_without_room_refuses_as_natively() {
    let (open, script) = gated();
    let flags = ["--images-in-flight-max", "8", "--images-per-call-max", "8"];
    let running = harness::fake(script, &flags).await;
    let mut client = client(&running).await;
    let filling = {
        let mut client = client.clone();
        let images: Vec<Vec<u32>> = (0..8).map(seeded).collect();
        tokio::spawn(async move { infer(&mut client, &ids(&images)).await })
    };
    running.until_in_flight(8).await;
    let status = infer(&mut client, &ids(&[seeded(9)]))
        .await
        .expect_err("full");
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    // Two outputs of eight images are more than there is room for at all.
    let mut two = ids(&(0..8).map(seeded).collect::<Vec<_>>());
    two.outputs = outputs(&["embedding", "tokens"]);
    let status = infer(&mut client, &two).await.expect_err("never");
    assert_eq!(status.code(), Code::InvalidArgument, "{status}");
    drop(open);
    filling.await.expect("no panic").expect("an answer");
    running.end().await;
}
