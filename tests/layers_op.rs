//! All layers as one operator inside ONNX Runtime, on the session's own threads,
//! against the kernels themselves: for new tokens, with a cache in place or
//! elsewhere, and for whole images.
//!
//! Needs ONNX Runtime from `make setup` or `ORT_DYLIB_PATH`.
#![warn(clippy::disallowed_methods)]
#![expect(
    unsafe_code,
    reason = "puts numbers into the memory of a cache, within bounds"
)]
#![expect(
    clippy::cast_precision_loss,
    clippy::unwrap_used,
    reason = "24 bits fit; a test that meets a surprise should stop there"
)]

use std::path::PathBuf;
use std::sync::OnceLock;

use half::bf16;
use imagegpt::kernels::attention::{AttentionPrecision, BLOCK, Int24, Kept, KeyValueCache};
use imagegpt::kernels::layers::{
    Activation, DenseWeights, LayerWeights, NewTokens, Sizes, StepLayers, StepMemory,
};
use imagegpt::kernels::whole::{ImageKernels, ImageLayers, ImageMemory, Images, Means, MeansOf};
use imagegpt::model::onnx::{
    AttributeProto, DataType, Dim, GraphProto, IR_VERSION, ModelProto, NodeProto, OPSET,
    OperatorSet, TensorProto as Constant, ValueInfoProto,
};
use imagegpt::runtime::library::find_library;
use imagegpt::runtime::operators;
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
/// Shape of the cache: sequences, heads, positions, and bytes per position.
const CACHE_DIMS: [usize; 4] = [3, 2, 48, 40];
const HEAD_DIM: usize = 12;

fn environment() -> &'static Environment {
    static ENVIRONMENT: OnceLock<Environment> = OnceLock::new();
    ENVIRONMENT.get_or_init(|| {
        let given = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
        let library = find_library(given.as_deref());
        ort::init_from(library).unwrap().build().unwrap()
    })
}

/// Returns numbers from -1 to 1, the same for the same seed.
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

/// Name, dimensions and numbers of a constant.
type NamedTensor = (String, Vec<usize>, Vec<f32>);

/// Returns the constants of a layer in the operator's order. Weights have no scale, and expansion and contraction have no bias.
fn constants(layer: usize) -> Vec<NamedTensor> {
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

/// Makes a graph of a single operator, whose node `change` may alter.
fn model(element: DataType, change: impl FnOnce(&mut NodeProto)) -> ModelProto {
    // Each value's dimensions are its own, so that the operator decides.
    let dims = ["zero", "one", "two", "three"].map(Dim::Name);
    let mut graph = GraphProto {
        name: "layers".to_owned(),
        input: vec![
            ValueInfoProto::tensor("rows", DataType::Float, &dims[..2]),
            ValueInfoProto::tensor("seqlens_k", DataType::Int32, &dims[..1]),
            ValueInfoProto::tensor("prefixes", DataType::Int32, &dims[1..3]),
        ],
        output: vec![ValueInfoProto::tensor(
            "output",
            DataType::Float,
            &dims[..2],
        )],
        ..GraphProto::default()
    };
    let mut node = NodeProto {
        input: names(&["rows", "seqlens_k", "prefixes"]),
        output: names(&["output"]),
        name: "node".to_owned(),
        op_type: operators::LAYERS.to_owned(),
        domain: operators::DOMAIN.to_owned(),
        attribute: vec![
            AttributeProto::int("num_heads", as_i64(SIZES.heads)),
            AttributeProto::floats("scale", SCALES.to_vec()),
            AttributeProto::float("epsilon", SIZES.epsilon),
            AttributeProto::string("activation", "quick_gelu"),
        ],
    };
    for layer in 0..N_LAYERS {
        for part in ["key", "value"] {
            let (past, present) = (format!("past_{part}.{layer}"), format!("{part}.{layer}"));
            graph
                .input
                .push(ValueInfoProto::tensor(&past, element, &dims));
            graph
                .output
                .push(ValueInfoProto::tensor(&present, element, &dims));
            node.input.push(past);
            node.output.push(present);
        }
        put_constants(constants(layer), &mut graph, &mut node);
    }
    change(&mut node);
    graph.node.push(node);
    model_of(graph)
}

/// Adds tensors as constants of the graph and inputs of the node.
fn put_constants(constants: Vec<NamedTensor>, graph: &mut GraphProto, node: &mut NodeProto) {
    for (name, dims, numbers) in constants {
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

fn model_of(graph: GraphProto) -> ModelProto {
    let version_of = |domain: &str, version| OperatorSet {
        domain: domain.to_owned(),
        version,
    };
    ModelProto {
        ir_version: IR_VERSION,
        opset_import: vec![version_of("", OPSET), version_of(operators::DOMAIN, 1)],
        graph: Some(graph),
        ..ModelProto::default()
    }
}

fn open(model: &ModelProto, n_threads: usize) -> ort::Result<Session> {
    Session::builder(environment())?
        .with_intra_threads(n_threads)?
        .with_operators(operators::domain()?)?
        .commit_from_memory(&model.encode_to_vec())
}

fn rows() -> Vec<f32> {
    noise(100, PAST.len() * LENGTH * SIZES.width)
}

/// Returns the keys and values of both layers before a run.
fn cache<K: Kept<Element: Default>>() -> Vec<Vec<K::Element>> {
    let [sequences, heads, positions, _] = CACHE_DIMS;
    let n_positions = sequences * heads * positions;
    let block_len = BLOCK * K::position_len(HEAD_DIM);
    (0..2 * N_LAYERS)
        .map(|idx| {
            let numbers = noise(200 + idx, n_positions * HEAD_DIM);
            let mut kept = vec![K::Element::default(); n_positions / BLOCK * block_len];
            for (position, row) in numbers.chunks_exact(HEAD_DIM).enumerate() {
                let lane = position % BLOCK;
                let block = &mut kept[position / BLOCK * block_len..][..block_len];
                let factor = K::factor(row);
                for (d, value) in row.iter().enumerate() {
                    let number = match idx % 2 {
                        0 => d * BLOCK + lane,
                        _ => lane * HEAD_DIM + d,
                    };
                    let at = &mut block[number * K::PER_NUMBER..][..K::PER_NUMBER];
                    // SAFETY: so many elements make a number.
                    unsafe { K::put_row(&[*value], factor, at.as_mut_ptr(), 0) }
                }
                let at = BLOCK * HEAD_DIM * K::PER_NUMBER + lane * K::PER_FACTOR;
                let at = &mut block[at..][..K::PER_FACTOR];
                // SAFETY: so many elements make a factor.
                unsafe { K::put_factor(factor, at.as_mut_ptr()) }
            }
            kept
        })
        .collect()
}

/// Returns the weights that a layer's constants and scale are.
fn weights((constants, scale): (&Vec<NamedTensor>, f32)) -> LayerWeights<'_, f32> {
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
}

/// Calls the kernel directly, and returns rows, keys and values.
fn directly<K: Kept<Element: Default>>() -> (Vec<f32>, Vec<Vec<K::Element>>) {
    let constants: Vec<_> = (0..N_LAYERS).map(constants).collect();
    let layers = constants.iter().zip(SCALES).map(weights);
    let layers = StepLayers::pack(SIZES, layers).unwrap();
    let mut cache = cache::<K>();
    let caches = cache.chunks_exact_mut(2).map(|pair| {
        let [keys, values] = pair else { unreachable!() };
        KeyValueCache::<K> { keys, values }
    });
    let rows = rows();
    let tokens = NewTokens {
        rows: &rows,
        length: LENGTH,
        past: &PAST,
        prefixes: &[],
        capacity: CACHE_DIMS[2],
        caches: caches.collect(),
    };
    let mut room = StepMemory::default();
    let step = layers.step(tokens, &mut room).unwrap();
    step.work();
    let mut output = vec![f32::NAN; rows.len()];
    step.finish(&mut output).unwrap();
    (output, cache)
}

/// Returns the number of tokens of each sequence after the run, less one.
fn seqlens_k() -> Vec<i32> {
    PAST.map(|past| i32::try_from(past + LENGTH - 1).unwrap())
        .to_vec()
}

/// Returns the prefixes of sequences that share nothing.
fn prefixes() -> Tensor<i32> {
    Tensor::from_array(([3_usize, 2], vec![0; 6])).unwrap()
}

#[test]
fn a_cache_elsewhere_is_copied() {
    let expected = directly::<Int24>();
    let cache = cache::<Int24>();
    for n_threads in [1, 2, 3] {
        let mut session = open(&model(DataType::Uint8, |_| {}), n_threads).unwrap();
        let past: Vec<Tensor<u8>> = cache
            .iter()
            .map(|numbers| Tensor::from_array((CACHE_DIMS, numbers.clone())).unwrap())
            .collect();
        let outputs = session
            .run(ort::inputs![
                "rows" => Tensor::from_array(([6_usize, 24], rows())).unwrap(),
                "seqlens_k" => Tensor::from_array(([3_usize], seqlens_k())).unwrap(),
                "prefixes" => prefixes(),
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
            let (dims, found) = outputs[*name].try_extract_tensor::<u8>().unwrap();
            assert_eq!(&dims[..], [3, 2, 48, 40]);
            assert!(found == expected.as_slice(), "{name}");
        }
        for (past, cache) in past.iter().zip(&cache) {
            assert!(past.extract_tensor().1 == cache, "an input was written");
        }
    }
}

#[test]
fn a_cache_that_is_its_own_output_is_changed_in_place() {
    let expected = directly::<Int24>();
    let mut session = open(&model(DataType::Uint8, |_| {}), 2).unwrap();
    let mut binding = session.create_binding().unwrap();
    let rows = Tensor::from_array(([6_usize, 24], rows())).unwrap();
    binding.bind_input("rows", &rows).unwrap();
    let ends = Tensor::from_array(([3_usize], seqlens_k())).unwrap();
    binding.bind_input("seqlens_k", &ends).unwrap();
    binding.bind_input("prefixes", &prefixes()).unwrap();
    let mut caches = Vec::new();
    for (numbers, name) in cache::<Int24>()
        .iter()
        .zip(["key.0", "value.0", "key.1", "value.1"])
    {
        let mut tensor = Tensor::<u8>::new(&Allocator::default(), CACHE_DIMS).unwrap();
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

/// A cache in bfloat16 rounds to fewer bits, so its result is near but not
/// equal.
#[test]
fn a_cache_may_be_bfloat16() {
    let expected = directly::<bf16>();
    let mut session = open(&model(DataType::Bfloat16, |_| {}), 2).unwrap();
    let dims = [CACHE_DIMS[0], CACHE_DIMS[1], CACHE_DIMS[2], HEAD_DIM];
    let past: Vec<Tensor<bf16>> = cache::<bf16>()
        .into_iter()
        .map(|numbers| Tensor::from_array((dims, numbers)).unwrap())
        .collect();
    let outputs = session
        .run(ort::inputs![
            "rows" => Tensor::from_array(([6_usize, 24], rows())).unwrap(),
            "seqlens_k" => Tensor::from_array(([3_usize], seqlens_k())).unwrap(),
            "prefixes" => prefixes(),
            "past_key.0" => &past[0],
            "past_value.0" => &past[1],
            "past_key.1" => &past[2],
            "past_value.1" => &past[3],
        ])
        .unwrap();
    let (_, output) = outputs["output"].try_extract_tensor::<f32>().unwrap();
    assert_eq!(output, expected.0);
    let (_, key) = outputs["key.1"].try_extract_tensor::<bf16>().unwrap();
    assert!(key == expected.1[2]);

    let exact = directly::<Int24>().0;
    let size = |numbers: &[f32]| numbers.iter().map(|x| x * x).sum::<f32>().sqrt();
    let pairs = output.iter().zip(&exact);
    let difference: Vec<f32> = pairs.map(|(found, exact)| found - exact).collect();
    let error = size(&difference) / size(&exact);
    assert!(error > 0.0 && error < 1e-2, "{error:e}");
}

#[test]
fn refuses_calls_that_do_not_fit() {
    let mut session = open(&model(DataType::Uint8, |_| {}), 1).unwrap();
    let mut refused_with = |dims: [usize; 4], ends: Vec<i32>, shared: Vec<i32>, word: &str| {
        let shared = Tensor::from_array(([shared.len() / 2, 2], shared)).unwrap();
        let past = || Tensor::from_array((dims, vec![0_u8; dims.iter().product()])).unwrap();
        let error = session
            .run(ort::inputs![
                "rows" => Tensor::from_array(([6_usize, 24], rows())).unwrap(),
                "seqlens_k" => Tensor::from_array(([ends.len()], ends)).unwrap(),
                "prefixes" => shared,
                "past_key.0" => past(),
                "past_value.0" => past(),
                "past_key.1" => past(),
                "past_value.1" => past(),
            ])
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    let mut refused_prefixes = |shared: [i32; 6], word: &str| {
        refused_with(CACHE_DIMS, vec![20, 20, 20], shared.to_vec(), word);
    };
    refused_prefixes([0, 0, 0, -1, 0, 0], "not pairs");
    // Of several new tokens none may.
    refused_prefixes([0, 0, 0, 16, 0, 0], "cannot share its first 16 positions");
    let mut refused = |dims: [usize; 4], ends: Vec<i32>, word: &str| {
        let none = vec![0; 2 * ends.len()];
        refused_with(dims, ends, none, word);
    };
    refused(CACHE_DIMS, vec![1, 1, 48], "outgrows");
    refused(CACHE_DIMS, vec![1, -1, 1], "less one");
    refused(CACHE_DIMS, vec![1, 0, 1], "less one");
    refused([3, 2, 40, 40], vec![1, 1, 1], "whole blocks");
    refused(
        [3, 4, 48, 22],
        vec![1, 1, 1],
        "is not (batch, heads, capacity",
    );
    refused(
        [2, 2, 48, 40],
        vec![1, 1, 1],
        "is not (batch, heads, capacity",
    );
}

#[test]
fn refuses_graphs_that_do_not_fit() {
    let refused = |change: fn(&mut NodeProto), word: &str| {
        let error = open(&model(DataType::Uint8, change), 1)
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(
        |node| node.attribute[0].i = 5,
        "heads must divide the width",
    );
    refused(
        |node| node.attribute[1].floats.truncate(1),
        "1 scales for 2 layers",
    );
    refused(
        |node| node.attribute[3].s = b"mish".to_vec(),
        "activation \"mish\"",
    );
    refused(|node| drop(node.attribute.remove(2)), "epsilon is missing");
    refused(|node| drop(node.input.pop()), "16 per layer");
    refused(|node| node.input.swap(5, 8), "weights of");
}

/// Images and positions of a run of whole images.
const IMAGES: [usize; 2] = [3, 35];

/// Makes a graph of whole images, whose node `change` may alter.
fn image_model(output: &str, has_norm: bool, change: impl FnOnce(&mut NodeProto)) -> ModelProto {
    let dims = ["zero", "one", "two"].map(Dim::Name);
    let mut graph = GraphProto {
        name: "layers".to_owned(),
        input: vec![ValueInfoProto::tensor("rows", DataType::Float, &dims)],
        output: vec![ValueInfoProto::tensor("output", DataType::Float, &dims)],
        ..GraphProto::default()
    };
    let mut node = NodeProto {
        input: names(&["rows"]),
        output: names(&["output"]),
        name: "node".to_owned(),
        op_type: operators::IMAGE_LAYERS.to_owned(),
        domain: operators::DOMAIN.to_owned(),
        attribute: vec![
            AttributeProto::int("num_heads", as_i64(SIZES.heads)),
            AttributeProto::floats("scale", SCALES.to_vec()),
            AttributeProto::float("epsilon", SIZES.epsilon),
            AttributeProto::string("activation", "quick_gelu"),
            AttributeProto::string("output", output),
        ],
    };
    let norm = final_norm(has_norm);
    let norm = vec![("norm".to_owned(), vec![norm.len()], norm)];
    put_constants(norm, &mut graph, &mut node);
    for layer in 0..N_LAYERS {
        put_constants(constants(layer), &mut graph, &mut node);
    }
    change(&mut node);
    graph.node.push(node);
    model_of(graph)
}

fn final_norm(has_norm: bool) -> Vec<f32> {
    noise(300, if has_norm { SIZES.width } else { 0 })
}

fn images() -> Vec<f32> {
    noise(301, IMAGES[0] * IMAGES[1] * SIZES.width)
}

/// Calls the kernel directly, and returns rows, or means of a stream.
fn images_directly(means_of: Option<MeansOf>, has_norm: bool) -> Vec<f32> {
    let constants: Vec<_> = (0..N_LAYERS).map(constants).collect();
    let layers = constants.iter().zip(SCALES).map(weights);
    let norm = final_norm(has_norm);
    let norm = Some(norm.as_slice()).filter(|_| has_norm);
    let kernels = ImageKernels::fastest::<f32>(AttentionPrecision::F32);
    let layers = ImageLayers::pack(SIZES, layers, norm, kernels).unwrap();
    let [batch, positions] = IMAGES;
    let rows = images();
    let n_rows = match means_of {
        None => positions,
        Some(_) => N_LAYERS + 1,
    };
    let mut output = vec![f32::NAN; batch * n_rows * SIZES.width];
    let (rows_to, means) = match means_of {
        None => (Some(&mut output[..]), None),
        Some(of) => (
            None,
            Some(Means {
                of,
                to: &mut output,
            }),
        ),
    };
    let mut memory = ImageMemory::default();
    let images = Images {
        batch,
        positions,
        rows: &rows,
        output: rows_to,
        means,
        n_threads: 1,
    };
    let run = layers.run(images, &mut memory).unwrap();
    run.work();
    assert_eq!(run.finish(), 1);
    output
}

#[test]
fn images_are_as_from_the_kernel() {
    let [batch, positions] = IMAGES;
    let outputs = [
        ("rows", None, positions),
        ("normed_means", Some(MeansOf::Normed), N_LAYERS + 1),
        ("raw_means", Some(MeansOf::Raw), N_LAYERS + 1),
    ];
    for (name, means_of, n_rows) in outputs {
        for has_norm in [false, true] {
            let expected = images_directly(means_of, has_norm);
            for n_threads in [1, 2, 3] {
                let model = image_model(name, has_norm, |_| {});
                let mut session = open(&model, n_threads).unwrap();
                // Runs with another number of images lie between equal runs.
                for n_images in [batch, 1, batch] {
                    let len = n_images * positions * SIZES.width;
                    let rows = images()[..len].to_vec();
                    let dims = [n_images, positions, SIZES.width];
                    let rows = Tensor::from_array((dims, rows)).unwrap();
                    let outputs = session.run(ort::inputs!["rows" => rows]).unwrap();
                    let (dims, found) = outputs["output"].try_extract_tensor::<f32>().unwrap();
                    let row_dims = [n_images, n_rows, SIZES.width].map(as_i64);
                    assert_eq!(dims[..], row_dims);
                    let expected = &expected[..found.len()];
                    assert_eq!(found, expected, "{name}, {n_threads} threads");
                }
            }
        }
    }
}

/// Graphs of one model have their weights in common, and other weights are
/// never taken for them.
#[test]
fn layers_of_other_weights_are_not_shared() {
    let mut domain_sessions = Vec::new();
    let domain = operators(environment()).unwrap();
    let mut found = Vec::new();
    for factor in [1.0_f32, 1.0, 2.0] {
        let mut model = image_model("rows", true, |_| {});
        for tensor in &mut model.graph.as_mut().unwrap().initializer {
            if tensor.name == "constant.1.1" {
                let floats: &[[u8; 4]] = tensor.raw_data.as_chunks().0;
                let scaled = floats
                    .iter()
                    .flat_map(|&bytes| (f32::from_le_bytes(bytes) * factor).to_le_bytes());
                tensor.raw_data = scaled.collect();
            }
        }
        let mut session = Session::builder(environment())
            .unwrap()
            .with_operators(std::sync::Arc::clone(&domain))
            .unwrap()
            .commit_from_memory(&model.encode_to_vec())
            .unwrap();
        let dims = [IMAGES[0], IMAGES[1], SIZES.width];
        let rows = Tensor::from_array((dims, images())).unwrap();
        let outputs = session.run(ort::inputs!["rows" => rows]).unwrap();
        found.push(
            outputs["output"]
                .try_extract_tensor::<f32>()
                .unwrap()
                .1
                .to_vec(),
        );
        drop(outputs);
        domain_sessions.push(session);
    }
    assert_eq!(found[0], found[1]);
    assert_ne!(found[0], found[2]);
}

#[test]
fn refuses_images_that_do_not_fit() {
    let refused = |change: fn(&mut NodeProto), word: &str| {
        let error = open(&image_model("rows", true, change), 1)
            .map(|_| ())
            .unwrap_err();
        assert!(error.to_string().contains(word), "{error}");
    };
    refused(
        |node| node.attribute[4].s = b"all".to_vec(),
        "output \"all\"",
    );
    refused(|node| drop(node.attribute.pop()), "output is missing");
    refused(|node| drop(node.input.pop()), "14 per layer");
    refused(|node| node.input.swap(1, 3), "weights of 24 numbers");
    let mut session = open(&image_model("rows", true, |_| {}), 1).unwrap();
    let rows = Tensor::from_array(([3_usize, 35, 23], vec![0.0_f32; 3 * 35 * 23])).unwrap();
    let error = session
        .run(ort::inputs!["rows" => rows])
        .map(|_| ())
        .unwrap_err();
    assert!(
        error.to_string().contains("(batch, positions, 24)"),
        "{error}"
    );
}
