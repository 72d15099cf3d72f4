//! The attention operator inside ONNX Runtime, on the session's own threads,
//! against the kernel and against a naive `f64` reference.
//!
//! Needs ONNX Runtime from `make setup` or `ORT_DYLIB_PATH`.
#![warn(clippy::disallowed_methods)]
#![expect(
    clippy::cast_precision_loss,
    clippy::unwrap_used,
    reason = "24 bits fit; a test that meets a surprise should stop there"
)]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use imagegpt::kernels::attention::{AttentionPrecision, AttentionShape, CausalAttention};
use imagegpt::runtime::library::find_library;
use imagegpt::runtime::operators;
use ort::environment::Environment;
use ort::session::Session;
use ort::value::Tensor;

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

/// Returns roughly normal numbers, the same for the same seed.
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

fn reference(shape: AttentionShape, scale: f64, qkv: &[f32]) -> Vec<f64> {
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
    let shape = AttentionShape {
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
            AttentionPrecision::F32,
            default_scale,
            2e-6,
        ),
        (
            "causal_attention_scaled.onnx",
            AttentionPrecision::F32,
            0.5,
            2e-6,
        ),
        (
            "causal_attention_2_bf16.onnx",
            AttentionPrecision::Bf16,
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
