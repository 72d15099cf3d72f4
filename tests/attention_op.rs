//! The attention operators inside ONNX Runtime: they give what the kernels give,
//! and what a naive `f64` reference gives, on the session's own threads.
//!
//! Needs a libonnxruntime: `ORT_DYLIB_PATH`, or what `make setup` brought.
#![expect(
    clippy::cast_precision_loss,
    clippy::unwrap_used,
    reason = "24 bits fit; a test that meets a surprise should stop there"
)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use half::bf16;
use imagegpt::attention::{Cache, CacheShape, CachedAttention, CausalAttention, Precision, Shape};
use imagegpt::compile::onnx as format;
use imagegpt::engine::onnx::find_library;
use imagegpt::engine::operators;
use ort::environment::Environment;
use ort::memory::Allocator;
use ort::session::Session;
use ort::value::Tensor;
use prost::Message as _;

fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let given = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
        let library = find_library(given.as_deref());
        ort::init_from(library).unwrap().build().unwrap()
    })
}

fn session(environment: &Environment, model: &str, n_threads: usize) -> ort::Result<Session> {
    Session::builder(environment)?
        .with_intra_threads(n_threads)?
        .with_operators(operators::domain()?)?
        .commit_from_file(Path::new("tests/data").join(model))
}

/// Roughly normal numbers, the same for the same seed.
fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u32 << 24) as f32 - 0.5
    };
    (0..len)
        .map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.732)
        .collect()
}

fn reference(shape: Shape, scale: f64, qkv: &[f32]) -> Vec<f64> {
    let width = shape.heads * shape.head_dim;
    let at = |image: usize, position: usize, column: usize| {
        f64::from(qkv[(image * shape.positions + position) * 3 * width + column])
    };
    let mut output = Vec::new();
    for image in 0..shape.batch {
        for query in 0..shape.positions {
            for column in 0..width {
                let head = column / shape.head_dim * shape.head_dim;
                let weights: Vec<f64> = (0..=query)
                    .map(|key| {
                        let dot: f64 = (head..head + shape.head_dim)
                            .map(|c| at(image, query, c) * at(image, key, width + c))
                            .sum();
                        (dot * scale).exp()
                    })
                    .collect();
                let sum: f64 = weights.iter().sum();
                output.push(
                    weights
                        .iter()
                        .enumerate()
                        .map(|(key, w)| w / sum * at(image, key, 2 * width + column))
                        .sum(),
                );
            }
        }
    }
    output
}

#[test]
fn equals_the_kernel_and_the_reference() {
    let environment = environment();
    let shape = Shape {
        batch: 2,
        positions: 77,
        heads: 2,
        head_dim: 24,
    };
    let qkv = normal(7, 2 * 77 * 3 * 48);
    let default_scale = 1.0 / 24_f32.sqrt();
    for (model, precision, scale, tolerance) in [
        (
            "causal_attention_2.onnx",
            Precision::F32,
            default_scale,
            2e-6,
        ),
        ("causal_attention_scaled.onnx", Precision::F32, 0.5, 2e-6),
        (
            "causal_attention_2_bf16.onnx",
            Precision::Bf16,
            default_scale,
            1e-2,
        ),
    ] {
        let expected = reference(shape, f64::from(scale), &qkv);
        let mut direct = vec![0.0; expected.len()];
        CausalAttention::new(shape, scale, precision)
            .unwrap()
            .run(&qkv, &mut direct, 1)
            .unwrap();
        for n_threads in [1, 2, 3] {
            let mut session = session(environment, model, n_threads).unwrap();
            let input = Tensor::from_array(([2_usize, 77, 144], qkv.clone())).unwrap();
            let outputs = session.run(ort::inputs!["qkv" => &input]).unwrap();
            let (dimensions, output) = outputs[0].try_extract_tensor::<f32>().unwrap();
            assert_eq!(&dimensions[..], [2, 77, 48]);
            assert_eq!(output, direct, "{model} on {n_threads} threads");
            let error = output
                .iter()
                .zip(&expected)
                .map(|(a, e)| (f64::from(*a) - e).abs())
                .fold(0.0, f64::max);
            // Values reach 3.5, so this is stricter than relative to the largest.
            assert!(error < tolerance, "{model}: {error:e}");
        }
    }
}

#[test]
fn refuses_what_does_not_divide_into_heads() {
    let environment = environment();
    let mut session = session(environment, "causal_attention_8.onnx", 1).unwrap();
    let input = Tensor::from_array(([1_usize, 4, 30], vec![0.0_f32; 120])).unwrap();
    let error = session
        .run(ort::inputs!["qkv" => &input])
        .map(|_| ())
        .unwrap_err();
    assert!(error.to_string().contains("8 heads"), "{error}");
}

const CACHED: CacheShape = CacheShape {
    batch: 3,
    length: 2,
    capacity: 48,
    heads: 2,
    head_dim: 24,
};
const CACHE_DIMS: [usize; 4] = [3, 2, 48, 24];
const PAST: [usize; 3] = [0, 31, 46];

/// A graph of the one operator.
fn cached_session(n_threads: usize) -> Session {
    use format::DataType::{Bfloat16, Float, Int32};
    let value = |name, data_type, rank: usize| {
        let dims = ["batch", "one", "two", "three"].map(format::Dim::Name);
        // Each value's dimensions are its own, so that the operator decides.
        format::ValueInfo::tensor(name, data_type, &dims[..rank])
    };
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
    let node = format::Node {
        input: names(&["qkv", "past_key", "past_value", "seqlens_k"]),
        output: names(&["output", "key", "value"]),
        name: "node".to_owned(),
        op_type: operators::CACHED_ATTENTION.to_owned(),
        domain: operators::DOMAIN.to_owned(),
        attribute: vec![
            format::Attribute::int("num_heads", 2),
            format::Attribute::float("scale", 0.3),
        ],
    };
    let version_of = |domain: &str, version| format::OperatorSet {
        domain: domain.to_owned(),
        version,
    };
    let model = format::Model {
        ir_version: format::IR_VERSION,
        opset_import: vec![
            version_of("", format::OPSET),
            version_of(operators::DOMAIN, 1),
        ],
        graph: Some(format::Graph {
            node: vec![node],
            name: "cached".to_owned(),
            input: vec![
                value("qkv", Float, 3),
                value("past_key", Bfloat16, 4),
                value("past_value", Bfloat16, 4),
                value("seqlens_k", Int32, 1),
            ],
            output: vec![
                value("output", Float, 3),
                value("key", Bfloat16, 4),
                value("value", Bfloat16, 4),
            ],
            ..Default::default()
        }),
        ..Default::default()
    };
    Session::builder(environment())
        .unwrap()
        .with_intra_threads(n_threads)
        .unwrap()
        .with_operators(operators::domain().unwrap())
        .unwrap()
        .commit_from_memory(&model.encode_to_vec())
        .unwrap()
}

fn cached_inputs() -> (Vec<f32>, Vec<bf16>, Vec<bf16>) {
    let bf16s = |seed| -> Vec<bf16> {
        let numbers = normal(seed, CACHE_DIMS.iter().product());
        numbers.into_iter().map(bf16::from_f32).collect()
    };
    (normal(1, 3 * 2 * 3 * 48), bf16s(2), bf16s(3))
}

/// What the kernel gives, called directly.
fn cached_directly() -> (Vec<f32>, Vec<bf16>, Vec<bf16>) {
    let (qkv, mut keys, mut values) = cached_inputs();
    let mut output = vec![f32::NAN; qkv.len() / 3];
    let cache = Cache {
        keys: &mut keys,
        values: &mut values,
    };
    CachedAttention::new(CACHED, 0.3)
        .unwrap()
        .run(&qkv, &PAST, cache, &mut output, 1)
        .unwrap();
    (output, keys, values)
}

/// Tokens after the run, less one.
fn seqlens_k(past: [usize; 3]) -> Tensor<i32> {
    let ends = past.map(|past| i32::try_from(past + CACHED.length - 1).unwrap());
    Tensor::from_array(([3_usize], ends.to_vec())).unwrap()
}

#[test]
fn a_cache_elsewhere_is_copied() {
    let (qkv, keys, values) = cached_inputs();
    let expected = cached_directly();
    for n_threads in [1, 2, 3] {
        let mut session = cached_session(n_threads);
        let past_key = Tensor::from_array((CACHE_DIMS, keys.clone())).unwrap();
        let past_value = Tensor::from_array((CACHE_DIMS, values.clone())).unwrap();
        let outputs = session
            .run(ort::inputs![
                "qkv" => Tensor::from_array(([3_usize, 2, 144], qkv.clone())).unwrap(),
                "past_key" => &past_key,
                "past_value" => &past_value,
                "seqlens_k" => seqlens_k(PAST),
            ])
            .unwrap();
        let (dimensions, output) = outputs["output"].try_extract_tensor::<f32>().unwrap();
        assert_eq!(&dimensions[..], [3, 2, 48]);
        assert_eq!(output, expected.0, "{n_threads} threads");
        for (name, expected) in [("key", &expected.1), ("value", &expected.2)] {
            let (dimensions, found) = outputs[name].try_extract_tensor::<bf16>().unwrap();
            assert_eq!(&dimensions[..], [3, 2, 48, 24]);
            assert!(found == expected.as_slice(), "{name}");
        }
        assert!(past_key.extract_tensor().1 == keys, "an input was written");
        assert!(past_value.extract_tensor().1 == values);
    }
}

#[test]
fn a_cache_that_is_its_own_output_is_changed_in_place() {
    let (qkv, keys, values) = cached_inputs();
    let expected = cached_directly();
    let mut session = cached_session(2);
    let tensor = |numbers: &[bf16]| {
        let mut tensor = Tensor::<bf16>::new(&Allocator::default(), CACHE_DIMS).unwrap();
        tensor.extract_tensor_mut().1.copy_from_slice(numbers);
        tensor
    };
    let (mut keys, mut values) = (tensor(&keys), tensor(&values));
    let mut binding = session.create_binding().unwrap();
    let qkv = Tensor::from_array(([3_usize, 2, 144], qkv)).unwrap();
    binding.bind_input("qkv", &qkv).unwrap();
    binding.bind_input("seqlens_k", &seqlens_k(PAST)).unwrap();
    binding.bind_input("past_key", &keys).unwrap();
    binding.bind_output("key", &mut keys).unwrap();
    binding.bind_input("past_value", &values).unwrap();
    binding.bind_output("value", &mut values).unwrap();
    let output = Tensor::<f32>::new(&Allocator::default(), [3_usize, 2, 48]).unwrap();
    binding.bind_output("output", output).unwrap();
    // The second time appends the same at the same place.
    for _ in 0..2 {
        let outputs = session.run_binding(&binding).unwrap();
        let (_, output) = outputs["output"].try_extract_tensor::<f32>().unwrap();
        assert_eq!(output, expected.0);
    }
    assert!(keys.extract_tensor().1 == expected.1);
    assert!(values.extract_tensor().1 == expected.2);
}

#[test]
fn refuses_a_cache_that_does_not_fit() {
    let (qkv, keys, values) = cached_inputs();
    let mut session = cached_session(1);
    let mut refused = |cache: [usize; 4], past: Vec<i32>, word: &str| {
        let n: usize = cache.iter().product();
        let past_key = Tensor::from_array((cache, keys[..n].to_vec())).unwrap();
        let past_value = Tensor::from_array((cache, values[..n].to_vec())).unwrap();
        let error = session
            .run(ort::inputs![
                "qkv" => Tensor::from_array(([3_usize, 2, 144], qkv.clone())).unwrap(),
                "past_key" => &past_key,
                "past_value" => &past_value,
                "seqlens_k" => Tensor::from_array(([past.len()], past)).unwrap(),
            ])
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(CACHE_DIMS, vec![1, 1, 48], "outgrows");
    refused(CACHE_DIMS, vec![1, -1, 1], "less one");
    refused(CACHE_DIMS, vec![1, 0, 1], "less one");
    refused(CACHE_DIMS, vec![1, 1], "past has 2");
    refused([3, 2, 40, 24], vec![1, 1, 1], "whole blocks");
    refused([3, 4, 24, 12], vec![1, 1, 1], "are not (batch, 2, capacity");
    refused([2, 2, 48, 24], vec![1, 1, 1], "are not (batch, 2, capacity");
}
