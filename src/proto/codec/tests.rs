use prost::Message as _;

use super::*;

fn check(message: &[u8], expected: Result<(), &str>) {
    match (pb::EmbedRequest::scan(message), expected) {
        (Ok(()), Ok(())) => {}
        (Err(error), Err(words)) => assert!(error.contains(words), "{error}"),
        (got, _) => panic!("{got:?}"),
    }
}

#[test]
fn ordinary_requests_pass() {
    let tokens = pb::Tokens {
        ids: (0..1024).collect(),
    };
    let image = pb::Image {
        source: Some(pb::image::Source::Tokens(tokens)),
    };
    let request = pb::EmbedRequest {
        images: vec![image; 256],
        layers: (0..64).collect(),
        normalize: true,
        ..Default::default()
    };
    check(&request.encode_to_vec(), Ok(()));
    check(&[], Ok(()));
}

#[test]
fn what_would_grow_is_refused() {
    check(&[0x0a, 0x00].repeat(IMAGES_MAX), Ok(()));
    check(&[0x0a, 0x00].repeat(IMAGES_MAX + 1), Err("more than 65536"));
    let ids = pb::Tokens {
        ids: vec![1; TOKENS_BYTES_MAX + 1],
    };
    let image = pb::Image {
        source: Some(pb::image::Source::Tokens(ids)),
    };
    let request = pb::EmbedRequest {
        images: vec![image],
        ..Default::default()
    };
    check(&request.encode_to_vec(), Err("more than any model takes"));
    let request = pb::EmbedRequest {
        layers: vec![1; 5000],
        ..Default::default()
    };
    check(&request.encode_to_vec(), Err("options take more than"));
    // Decoding merges tokens that come in pieces.
    let ids = pb::Tokens {
        ids: vec![1; TOKENS_BYTES_MAX / 2 + 1],
    };
    let image = pb::Image {
        source: Some(pb::image::Source::Tokens(ids.clone())),
    };
    let once = image.encode_to_vec();
    let twice = [&once[..], &once[..]].concat();
    let mut request = vec![0x0a];
    prost::encode_length_delimiter(twice.len(), &mut request).expect("room");
    request.extend(twice);
    check(&request, Err("more than any model takes"));
    let generate = pb::GenerateRequest {
        primer: Some(pb::generate_request::Primer::Prefix(ids)),
        ..Default::default()
    };
    let once = generate.encode_to_vec();
    assert!(pb::GenerateRequest::scan(&once).is_ok());
    assert!(pb::GenerateRequest::scan(&[&once[..], &once[..]].concat()).is_err());
    // A list in which each number has a tag of its own is counted, too.
    check(&[0x38, 0x01].repeat(3000), Err("options take more than"));
}

#[test]
fn inference_requests_are_looked_through() {
    use inference::ModelInferRequest;
    use inference::model_infer_request::{InferInputTensor, InferRequestedOutputTensor};
    let check = |request: &ModelInferRequest, expected: Result<(), &str>| match (
        ModelInferRequest::scan(&request.encode_to_vec()),
        expected,
    ) {
        (Ok(()), Ok(())) => {}
        (Err(error), Err(words)) => assert!(error.contains(words), "{error}"),
        (got, _) => panic!("{got:?}"),
    };
    let with = |contents| ModelInferRequest {
        inputs: vec![InferInputTensor {
            name: "input_ids".to_owned(),
            shape: vec![1024, 1024],
            contents: Some(contents),
            ..Default::default()
        }],
        ..Default::default()
    };
    let ids = |n| inference::InferTensorContents {
        int64_contents: vec![1; n],
        ..Default::default()
    };
    check(&with(ids(NUMBERS_BYTES_MAX)), Ok(()));
    check(&with(ids(NUMBERS_BYTES_MAX + 1)), Err("raw_input_contents"));
    let mut several = with(ids(NUMBERS_BYTES_MAX / 2 + 1));
    several.inputs.push(several.inputs[0].clone());
    check(&several, Err("raw_input_contents"));
    let images = |n| inference::InferTensorContents {
        bytes_contents: vec![bytes::Bytes::new(); n],
        ..Default::default()
    };
    check(&with(images(IMAGES_MAX)), Ok(()));
    check(&with(images(IMAGES_MAX + 1)), Err("more than 65536 images"));
    let outputs = |n| ModelInferRequest {
        outputs: vec![InferRequestedOutputTensor::default(); n],
        ..Default::default()
    };
    check(&outputs(TENSORS_MAX), Ok(()));
    check(&outputs(TENSORS_MAX + 1), Err("more than 64 tensors"));
    let raw = ModelInferRequest {
        raw_input_contents: vec![bytes::Bytes::new(); TENSORS_MAX + 1],
        ..Default::default()
    };
    check(&raw, Err("more than 64 tensors"));
    let shape = ModelInferRequest {
        inputs: vec![InferInputTensor {
            shape: vec![1; OTHER_BYTES_MAX + 1],
            ..Default::default()
        }],
        ..Default::default()
    };
    check(&shape, Err("options take more than"));
}

#[test]
fn what_is_no_message_is_refused() {
    for bytes in [&[0x0a, 0x05, 0x00][..], &[0x0a], &[0xff; 12], &[0x0b]] {
        check(bytes, Err("not a protobuf message"));
    }
}
