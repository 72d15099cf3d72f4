//! All layers as one operator inside ONNX Runtime: it gives what the kernel
//! gives, on the session's own threads, over a cache in place or elsewhere.
//!
//! Needs a libonnxruntime: `ORT_DYLIB_PATH`, or what `make setup` brought.
#![expect(
    clippy::cast_precision_loss,
    clippy::unwrap_used,
    reason = "24 bits fit; a test that meets a surprise should stop there"
)]

use std::path::PathBuf;
use std::sync::OnceLock;

use half::bf16;
use imagegpt::attention::Cache;
use imagegpt::compile::onnx::{
    Attribute, DataType, Dim, Graph, IR_VERSION, Model, Node, OPSET, OperatorSet,
    Tensor as Constant, ValueInfo,
};
use imagegpt::engine::onnx::find_library;
use imagegpt::engine::operators;
use imagegpt::layers::{Activation, DenseWeights, LayerWeights, Layers, Room, Sizes, Tokens};
use ort::environment::Environment;
use ort::memory::Allocator;
use ort::session::Session;
use ort::value::Tensor;
use prost::Message as _;

const SIZES: Sizes = Sizes {
    width: 24,
    inner_width: 40,
    heads: 2,
    epsilon: 1e-5,
    activation: Activation::QuickGelu,
};
const N_LAYERS: usize = 2;
const SCALES: [f32; N_LAYERS] = [0.3, 0.2];
const LENGTH: usize = 2;
const PAST: [usize; 3] = [0, 31, 46];
const CACHE_DIMS: [usize; 4] = [3, 2, 48, 12];

fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let given = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
        let library = find_library(given.as_deref());
        ort::init_from(library).unwrap().build().unwrap()
    })
}

/// Numbers from -1 to 1, the same for the same seed.
fn noise(seed: usize, len: usize) -> Vec<f32> {
    let mut state = (seed as u64 + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
        })
        .collect()
}

/// The constants of a layer, in the operator's order: names, dimensions, numbers.
/// Weights have no scale, and expansion and contraction no bias.
fn constants(layer: usize) -> Vec<(String, Vec<usize>, Vec<f32>)> {
    let (width, inner) = (SIZES.width, SIZES.inner_width);
    let sizes = [
        vec![width],
        vec![width, 3 * width],
        vec![0],
        vec![3 * width],
        vec![width, width],
        vec![0],
        vec![width],
        vec![width],
        vec![width, inner],
        vec![0],
        vec![0],
        vec![inner, width],
        vec![0],
        vec![0],
    ];
    let sizes = sizes.into_iter().enumerate();
    sizes
        .map(|(idx, dims)| {
            let numbers = noise(layer * 14 + idx, dims.iter().product());
            (format!("constant.{layer}.{idx}"), dims, numbers)
        })
        .collect()
}

fn as_i64(size: usize) -> i64 {
    i64::try_from(size).unwrap()
}

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// A graph of the one operator, as `change` makes its node.
fn model(element: DataType, change: impl FnOnce(&mut Node)) -> Model {
    // Each value's dimensions are its own, so that the operator decides.
    let dims = ["zero", "one", "two", "three"].map(Dim::Name);
    let mut graph = Graph {
        name: "layers".to_owned(),
        input: vec![
            ValueInfo::tensor("rows", DataType::Float, &dims[..2]),
            ValueInfo::tensor("seqlens_k", DataType::Int32, &dims[..1]),
        ],
        output: vec![ValueInfo::tensor("output", DataType::Float, &dims[..2])],
        ..Graph::default()
    };
    let mut node = Node {
        input: names(&["rows", "seqlens_k"]),
        output: names(&["output"]),
        name: "node".to_owned(),
        op_type: operators::LAYERS.to_owned(),
        domain: operators::DOMAIN.to_owned(),
        attribute: vec![
            Attribute::int("num_heads", as_i64(SIZES.heads)),
            Attribute::floats("scale", SCALES.to_vec()),
            Attribute::float("epsilon", SIZES.epsilon),
            Attribute::string("activation", "quick_gelu"),
        ],
    };
    for layer in 0..N_LAYERS {
        for part in ["key", "value"] {
            let (past, present) = (format!("past_{part}.{layer}"), format!("{part}.{layer}"));
            graph.input.push(ValueInfo::tensor(&past, element, &dims));
            graph
                .output
                .push(ValueInfo::tensor(&present, element, &dims));
            node.input.push(past);
            node.output.push(present);
        }
        for (name, dims, numbers) in constants(layer) {
            graph.initializer.push(Constant {
                name: name.clone(),
                dims: dims.into_iter().map(as_i64).collect(),
                data_type: DataType::Float.into(),
                raw_data: numbers
                    .iter()
                    .flat_map(|number| number.to_le_bytes())
                    .collect(),
                ..Constant::default()
            });
            node.input.push(name);
        }
    }
    change(&mut node);
    graph.node.push(node);
    let version_of = |domain: &str, version| OperatorSet {
        domain: domain.to_owned(),
        version,
    };
    Model {
        ir_version: IR_VERSION,
        opset_import: vec![version_of("", OPSET), version_of(operators::DOMAIN, 1)],
        graph: Some(graph),
        ..Model::default()
    }
}

fn open(model: &Model, n_threads: usize) -> ort::Result<Session> {
    Session::builder(environment())?
        .with_intra_threads(n_threads)?
        .with_operators(operators::domain()?)?
        .commit_from_memory(&model.encode_to_vec())
}

fn rows() -> Vec<f32> {
    noise(100, PAST.len() * LENGTH * SIZES.width)
}

/// Keys and values of both layers before a run, as floats that are also bfloat16.
fn cache() -> Vec<Vec<f32>> {
    (0..2 * N_LAYERS)
        .map(|idx| {
            let numbers = noise(200 + idx, CACHE_DIMS.iter().product());
            let rounded = numbers
                .into_iter()
                .map(|number| bf16::from_f32(number).to_f32());
            rounded.collect()
        })
        .collect()
}

/// What the kernel gives, called directly: rows, keys and values.
fn directly() -> (Vec<f32>, Vec<Vec<f32>>) {
    let constants: Vec<_> = (0..N_LAYERS).map(constants).collect();
    let layers = constants.iter().zip(SCALES).map(|(constants, scale)| {
        let floats = |idx: usize| constants[idx].2.as_slice();
        let dense = |idx: usize| DenseWeights {
            weights: floats(idx),
            scales: None,
            bias: Some(floats(idx + 2)).filter(|bias| !bias.is_empty()),
        };
        LayerWeights {
            attention_norm: floats(0),
            attention_scale: scale,
            qkv: dense(1),
            projection: dense(4),
            inner_norm: floats(7),
            expand: dense(8),
            contract: dense(11),
        }
    });
    let layers = Layers::pack(SIZES, layers).unwrap();
    let mut cache = cache();
    let caches = cache.chunks_exact_mut(2).map(|pair| {
        let [keys, values] = pair else { unreachable!() };
        Cache { keys, values }
    });
    let rows = rows();
    let tokens = Tokens {
        rows: &rows,
        length: LENGTH,
        past: &PAST,
        capacity: CACHE_DIMS[2],
        caches: caches.collect(),
    };
    let mut room = Room::default();
    let step = layers.step(tokens, &mut room).unwrap();
    step.work();
    let mut output = vec![f32::NAN; rows.len()];
    step.finish(&mut output).unwrap();
    (output, cache)
}

/// Tokens after the run, less one.
fn seqlens_k() -> Vec<i32> {
    PAST.map(|past| i32::try_from(past + LENGTH - 1).unwrap())
        .to_vec()
}

#[test]
fn a_cache_elsewhere_is_copied() {
    let expected = directly();
    let cache = cache();
    for n_threads in [1, 2, 3] {
        let mut session = open(&model(DataType::Float, |_| {}), n_threads).unwrap();
        let past: Vec<Tensor<f32>> = cache
            .iter()
            .map(|numbers| Tensor::from_array((CACHE_DIMS, numbers.clone())).unwrap())
            .collect();
        let outputs = session
            .run(ort::inputs![
                "rows" => Tensor::from_array(([6_usize, 24], rows())).unwrap(),
                "seqlens_k" => Tensor::from_array(([3_usize], seqlens_k())).unwrap(),
                "past_key.0" => &past[0],
                "past_value.0" => &past[1],
                "past_key.1" => &past[2],
                "past_value.1" => &past[3],
            ])
            .unwrap();
        let (dims, output) = outputs["output"].try_extract_tensor::<f32>().unwrap();
        assert_eq!(&dims[..], [6, 24]);
        assert_eq!(output, expected.0, "{n_threads} threads");
        let present = ["key.0", "value.0", "key.1", "value.1"];
        for (name, expected) in present.iter().zip(&expected.1) {
            let (dims, found) = outputs[*name].try_extract_tensor::<f32>().unwrap();
            assert_eq!(&dims[..], [3, 2, 48, 12]);
            assert!(found == expected.as_slice(), "{name}");
        }
        for (past, cache) in past.iter().zip(&cache) {
            assert!(past.extract_tensor().1 == cache, "an input was written");
        }
    }
}

#[test]
fn a_cache_that_is_its_own_output_is_changed_in_place() {
    let expected = directly();
    let mut session = open(&model(DataType::Float, |_| {}), 2).unwrap();
    let mut binding = session.create_binding().unwrap();
    let rows = Tensor::from_array(([6_usize, 24], rows())).unwrap();
    binding.bind_input("rows", &rows).unwrap();
    let ends = Tensor::from_array(([3_usize], seqlens_k())).unwrap();
    binding.bind_input("seqlens_k", &ends).unwrap();
    let mut caches = Vec::new();
    for (numbers, name) in cache().iter().zip(["key.0", "value.0", "key.1", "value.1"]) {
        let mut tensor = Tensor::<f32>::new(&Allocator::default(), CACHE_DIMS).unwrap();
        tensor.extract_tensor_mut().1.copy_from_slice(numbers);
        binding.bind_input(format!("past_{name}"), &tensor).unwrap();
        binding.bind_output(name, &mut tensor).unwrap();
        caches.push(tensor);
    }
    let output = Tensor::<f32>::new(&Allocator::default(), [6_usize, 24]).unwrap();
    binding.bind_output("output", output).unwrap();
    // The second time appends the same at the same place.
    for _ in 0..2 {
        let outputs = session.run_binding(&binding).unwrap();
        let (_, output) = outputs["output"].try_extract_tensor::<f32>().unwrap();
        assert_eq!(output, expected.0);
    }
    for (cache, expected) in caches.iter().zip(&expected.1) {
        assert!(cache.extract_tensor().1 == expected);
    }
}

/// Its numbers are rounded, so the result is near and not the same.
#[test]
fn a_cache_may_be_bfloat16() {
    let expected = directly();
    let mut session = open(&model(DataType::Bfloat16, |_| {}), 2).unwrap();
    let past: Vec<Tensor<bf16>> = cache()
        .iter()
        .map(|numbers| {
            let numbers: Vec<bf16> = numbers.iter().map(|n| bf16::from_f32(*n)).collect();
            Tensor::from_array((CACHE_DIMS, numbers)).unwrap()
        })
        .collect();
    let outputs = session
        .run(ort::inputs![
            "rows" => Tensor::from_array(([6_usize, 24], rows())).unwrap(),
            "seqlens_k" => Tensor::from_array(([3_usize], seqlens_k())).unwrap(),
            "past_key.0" => &past[0],
            "past_value.0" => &past[1],
            "past_key.1" => &past[2],
            "past_value.1" => &past[3],
        ])
        .unwrap();
    let (_, output) = outputs["output"].try_extract_tensor::<f32>().unwrap();
    let size = |numbers: &[f32]| numbers.iter().map(|x| x * x).sum::<f32>().sqrt();
    let pairs = output.iter().zip(&expected.0);
    let difference: Vec<f32> = pairs.map(|(found, expected)| found - expected).collect();
    let error = size(&difference) / size(&expected.0);
    assert!(error > 0.0 && error < 1e-2, "{error:e}");
    let (_, key) = outputs["key.1"].try_extract_tensor::<bf16>().unwrap();
    let errors = key.iter().zip(&expected.1[2]);
    let largest = errors
        .map(|(found, expected)| (found.to_f32() - expected).abs())
        .fold(0.0, f32::max);
    assert!(largest < 0.1, "{largest}");
}

#[test]
fn refuses_calls_that_do_not_fit() {
    let mut session = open(&model(DataType::Float, |_| {}), 1).unwrap();
    let mut refused = |dims: [usize; 4], ends: Vec<i32>, word: &str| {
        let past = || Tensor::from_array((dims, vec![0.0_f32; dims.iter().product()])).unwrap();
        let error = session
            .run(ort::inputs![
                "rows" => Tensor::from_array(([6_usize, 24], rows())).unwrap(),
                "seqlens_k" => Tensor::from_array(([ends.len()], ends)).unwrap(),
                "past_key.0" => past(),
                "past_value.0" => past(),
                "past_key.1" => past(),
                "past_value.1" => past(),
            ])
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(CACHE_DIMS, vec![1, 1, 48], "outgrows");
    refused(CACHE_DIMS, vec![1, -1, 1], "less one");
    refused(CACHE_DIMS, vec![1, 0, 1], "less one");
    refused([3, 2, 40, 12], vec![1, 1, 1], "whole blocks");
    refused(
        [3, 4, 48, 6],
        vec![1, 1, 1],
        "is not (batch, heads, capacity",
    );
    refused(
        [2, 2, 48, 12],
        vec![1, 1, 1],
        "is not (batch, heads, capacity",
    );
}

#[test]
fn refuses_graphs_that_do_not_fit() {
    let refused = |change: fn(&mut Node), word: &str| {
        let error = open(&model(DataType::Float, change), 1)
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(|node| node.attribute[0].i = 5, "heads divide the width");
    refused(
        |node| node.attribute[1].floats.truncate(1),
        "1 scales for 2 layers",
    );
    refused(
        |node| node.attribute[3].s = b"mish".to_vec(),
        "activation \"mish\"",
    );
    refused(|node| drop(node.attribute.remove(2)), "epsilon is missing");
    refused(|node| drop(node.input.pop()), "16 of each layer");
    refused(|node| node.input.swap(5, 8), "weights of");
}
