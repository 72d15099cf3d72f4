//! Attention of a step of generation beside ONNX Runtime's GroupQueryAttention:
//! `cargo bench --bench cached_attention -- [THREADS] [ROUNDS] [BATCH] [PAST] [LENGTH]`.
//!
//! Each contestant is a session with several layers, whose key/value caches are
//! bound in place and are together far larger than the CPU's caches, as in a
//! model; the contestants take turns, one run each, `ROUNDS` times. The last
//! column is the part of the cache that a step reads, divided by the fastest
//! run.
#![expect(clippy::print_stdout, reason = "a benchmark prints")]
#![expect(clippy::cast_precision_loss, reason = "figures to print")]

use std::path::PathBuf;
use std::time::Instant;

use half::bf16;
use imagegpt::kernels::attention::{
    BLOCK, CacheShape, CachedAttention, Int24, Kept, Kernel, KeyValueCache,
};
use imagegpt::model::onnx::{
    AttributeProto, DataType, Dim, GraphProto, IR_VERSION, MICROSOFT, ModelProto, NodeProto, OPSET,
    OperatorSet, ValueInfoProto,
};
use imagegpt::runtime::library::find_library;
use ort::environment::Environment;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::Session;
use ort::value::{DynTensor, Tensor, TensorElementType};
use prost::Message as _;

const GROUP_QUERY: &str = "GroupQueryAttention";
const LAYERS: usize = 8;
const CAPACITY: usize = 1024;
const HEADS: usize = 8;
const HEAD_DIM: usize = 64;

/// Function to time, with its name and the bytes per head and position.
type Contestant<'a> = (String, usize, Box<dyn FnMut() -> anyhow::Result<()> + 'a>);

fn main() -> anyhow::Result<()> {
    // Cargo adds `--bench`.
    let mut numbers = std::env::args().filter_map(|arg| arg.parse::<usize>().ok());
    let n_threads = numbers.next().unwrap_or(2);
    let n_rounds = numbers.next().unwrap_or(15);
    let batch = numbers.next().unwrap_or(8);
    let past = numbers.next().unwrap_or(512);
    let length = numbers.next().unwrap_or(1);
    let shape = CacheShape {
        batch,
        length,
        capacity: CAPACITY.max((past + length).next_multiple_of(BLOCK)),
        heads: HEADS,
        head_dim: HEAD_DIM,
    };
    let given = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
    let environment = ort::init_from(find_library(given.as_deref()))?.build()?;

    let mut contestants: Vec<Contestant> = Vec::new();
    let run = bound(&environment, shape, past, n_threads)?;
    contestants.push((format!("op {GROUP_QUERY}"), 4 * HEAD_DIM, run));
    for kernel in [Kernel::Avx512, Kernel::Avx2, Kernel::Portable] {
        if kernel.is_available() {
            let run = direct::<Int24>(kernel, 1, shape, past, n_threads)?;
            let bytes = Int24::position_len(HEAD_DIM);
            contestants.push((format!("direct {kernel:?} 24 bits"), bytes, run));
            let run = direct::<bf16>(kernel, bf16::ONE, shape, past, n_threads)?;
            contestants.push((format!("direct {kernel:?} bf16"), 2 * HEAD_DIM, run));
        }
    }

    let mut times = vec![Vec::new(); contestants.len()];
    for round in 0..=n_rounds {
        for ((_, _, run), times) in contestants.iter_mut().zip(&mut times) {
            let start = Instant::now();
            run()?;
            // The first round warms up.
            if round > 0 {
                times.push(start.elapsed().as_secs_f64() * 1e3 / LAYERS as f64);
            }
        }
    }
    println!(
        "{n_threads} threads, {n_rounds} rounds: {length} new tokens of {batch} sequences after \
         {past}, {HEADS} heads of {HEAD_DIM}, ms a layer"
    );
    println!(
        "{:32} {:>9} {:>9} {:>8} {:>9}",
        "", "median ms", "min ms", "ratio", "GB/s"
    );
    let theirs = median(&mut times[0]);
    for ((name, bytes, _), times) in contestants.iter().zip(&mut times) {
        let median = median(times);
        let read = 2 * bytes * batch * (past + length) * HEADS;
        println!(
            "{name:32} {median:9.3} {:9.3} {:8.2} {:9.1}",
            times[0],
            theirs / median,
            read as f64 / times[0] / 1e6
        );
    }
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Runs of a session with `LAYERS` of the operator, its caches bound in place.
fn bound(
    environment: &Environment,
    shape: CacheShape,
    past: usize,
    n_threads: usize,
) -> anyhow::Result<Box<dyn FnMut() -> anyhow::Result<()>>> {
    let mut session = session(environment, &model(), n_threads)?;
    let CacheShape { batch, length, .. } = shape;
    let mut binding = session.create_binding()?;
    let qkv = noise(batch * length * 3 * shape.width());
    let qkv = Tensor::from_array(([batch, length, 3 * shape.width()], qkv))?;
    binding.bind_input("qkv", &qkv)?;
    let end = i32::try_from(past + length)?;
    let seqlens_k = Tensor::from_array(([batch], vec![end - 1; batch]))?;
    binding.bind_input("seqlens_k", &seqlens_k)?;
    let scalar: [usize; 0] = [];
    binding.bind_input("total", &Tensor::from_array((scalar, vec![end]))?)?;
    let info = MemoryInfo::new(
        AllocationDevice::CPU,
        0,
        AllocatorType::Device,
        MemoryType::Default,
    )?;
    let allocator = Allocator::new(&session, info)?;
    let dims = [batch, HEADS, shape.capacity, HEAD_DIM];
    for layer in 0..LAYERS {
        for part in ["key", "value"] {
            let mut cache = DynTensor::new(&allocator, TensorElementType::Float32, dims)?;
            cache.try_extract_tensor_mut::<f32>()?.1.fill(0.5);
            binding.bind_input(format!("past_{part}.{layer}"), &cache)?;
            binding.bind_output(format!("{part}.{layer}"), cache)?;
        }
        let output = [batch, length, shape.width()];
        let output = DynTensor::new(&allocator, TensorElementType::Float32, output)?;
        binding.bind_output(format!("output.{layer}"), output)?;
    }
    Ok(Box::new(move || {
        session.run_binding(&binding)?;
        Ok(())
    }))
}

fn session(
    environment: &Environment,
    model: &ModelProto,
    n_threads: usize,
) -> ort::Result<Session> {
    Session::builder(environment)?
        .with_intra_threads(n_threads)?
        // Threads that spin after their share is done would slow the next in turn.
        .with_intra_op_spinning(false)?
        .commit_from_memory(&model.encode_to_vec())
}

fn model() -> ModelProto {
    let [batch, length] = ["batch", "length"].map(Dim::Name);
    let qkv = [batch, length, Dim::Size(3 * HEADS * HEAD_DIM)];
    let mut graph = GraphProto {
        name: GROUP_QUERY.to_owned(),
        input: vec![
            ValueInfoProto::tensor("qkv", DataType::Float, &qkv),
            ValueInfoProto::tensor("seqlens_k", DataType::Int32, &[batch]),
            ValueInfoProto::tensor("total", DataType::Int32, &[]),
        ],
        ..GraphProto::default()
    };
    let cache = [
        batch,
        Dim::Size(HEADS),
        Dim::Name("capacity"),
        Dim::Size(HEAD_DIM),
    ];
    for layer in 0..LAYERS {
        let [past_key, past_value, key, value, output] =
            ["past_key", "past_value", "key", "value", "output"]
                .map(|part| format!("{part}.{layer}"));
        for name in [&past_key, &past_value] {
            graph
                .input
                .push(ValueInfoProto::tensor(name, DataType::Float, &cache));
        }
        for name in [&key, &value] {
            graph
                .output
                .push(ValueInfoProto::tensor(name, DataType::Float, &cache));
        }
        let dims = [batch, length, Dim::Size(HEADS * HEAD_DIM)];
        let info = ValueInfoProto::tensor(&output, DataType::Float, &dims);
        graph.output.push(info);
        let heads = i64::try_from(HEADS).unwrap_or(i64::MAX);
        let attributes = ["num_heads", "kv_num_heads"].map(|name| AttributeProto::int(name, heads));
        let mut input = vec!["qkv".to_owned()];
        input.extend([String::new(), String::new(), past_key, past_value]);
        input.extend(["seqlens_k", "total"].map(str::to_owned));
        graph.node.push(NodeProto {
            input,
            output: vec![output, key, value],
            name: format!("layer.{layer}"),
            op_type: GROUP_QUERY.to_owned(),
            domain: MICROSOFT.to_owned(),
            attribute: attributes.to_vec(),
        });
    }
    let operators = |domain: &str, version| OperatorSet {
        domain: domain.to_owned(),
        version,
    };
    ModelProto {
        ir_version: IR_VERSION,
        opset_import: vec![operators("", OPSET), operators(MICROSOFT, 1)],
        graph: Some(graph),
        ..ModelProto::default()
    }
}

/// Runs the kernel alone over a cache filled with `one`, with threads started
/// for each layer.
fn direct<K: Kept>(
    kernel: Kernel,
    one: K::Element,
    shape: CacheShape,
    past: usize,
    n_threads: usize,
) -> anyhow::Result<Box<dyn FnMut() -> anyhow::Result<()>>> {
    let attention = CachedAttention::with_kernel(shape, 0.125, kernel)?;
    let rows = shape.batch * shape.length * shape.width();
    let qkv = noise(3 * rows);
    let past = vec![past; shape.batch];
    let n_cached = shape.batch * shape.heads * shape.capacity * K::position_len(HEAD_DIM);
    let mut caches = vec![[vec![one; n_cached], vec![one; n_cached]]; LAYERS];
    let mut output = vec![0.0; rows];
    Ok(Box::new(move || {
        for [keys, values] in &mut caches {
            let cache = KeyValueCache::<K> { keys, values };
            attention.run(&qkv, &past, &[], cache, &mut output, n_threads)?;
        }
        Ok(())
    }))
}

fn noise(len: usize) -> Vec<f32> {
    let mut state = 1_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}
