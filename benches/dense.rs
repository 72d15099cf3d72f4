//! The dense products of a step: ONNX Runtime's `Gemm`, our operator, and our
//! kernels alone, in turn, over the weights of imagegpt-small's 24 layers.
//!
//! `cargo bench --bench dense -- [threads] [rounds]`
#![expect(clippy::print_stdout, reason = "a benchmark prints")]
#![expect(clippy::cast_precision_loss, reason = "figures to print")]

use std::path::PathBuf;
use std::time::Instant;

use imagegpt::attention::Kernel;
use imagegpt::compile::onnx::{
    DataType, Dim, Graph, IMAGEGPT, IR_VERSION, Model, Node, OPSET, OperatorSet, Tensor, ValueInfo,
};
use imagegpt::dense::{Operands, Panels};
use imagegpt::engine::onnx::find_library;
use imagegpt::engine::operators;
use ort::environment::Environment;
use ort::memory::Allocator;
use ort::session::Session;
use ort::value::{DynTensor, Tensor as Value, TensorElementType};
use prost::Message as _;

const LAYERS: usize = 24;
const WIDTH: usize = 512;
const INNER: usize = 2048;
/// Inputs and outputs of a layer's products; each feeds the next but where its
/// rows are cut.
const PRODUCTS: [[usize; 2]; 4] = [
    [WIDTH, 3 * WIDTH],
    [WIDTH, WIDTH],
    [WIDTH, INNER],
    [INNER, WIDTH],
];

type Contestant<'a> = (String, Box<dyn FnMut() -> anyhow::Result<()> + 'a>);

fn main() -> anyhow::Result<()> {
    // Cargo adds `--bench`.
    let mut numbers = std::env::args().filter_map(|arg| arg.parse::<usize>().ok());
    let n_threads = numbers.next().unwrap_or(2);
    let n_rounds = numbers.next().unwrap_or(15);
    let given = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
    let environment = ort::init_from(find_library(given.as_deref()))?.build()?;
    let n_bytes: usize = PRODUCTS.iter().map(|[i, o]| i * o * 4 * LAYERS).sum();
    println!(
        "{n_threads} threads, {n_rounds} rounds, {} MB of weights; ms a step",
        n_bytes / 1_000_000
    );
    println!(
        "{:>4} {:20} {:>9} {:>9} {:>8} {:>9}",
        "rows", "", "median ms", "min ms", "ratio", "GB/s"
    );
    for n_rows in [1, 2, 4, 8, 16, 64] {
        let mut contestants: Vec<Contestant> = Vec::new();
        for operator in ["Gemm", operators::DENSE] {
            let run = session(&environment, operator, n_rows, n_threads)?;
            contestants.push((format!("op {operator}"), run));
        }
        for kernel in [Kernel::Avx512, Kernel::Avx2, Kernel::Portable] {
            if kernel.is_available() {
                contestants.push((
                    format!("direct {kernel:?}"),
                    direct(kernel, n_rows, n_threads)?,
                ));
            }
        }
        let mut times = vec![Vec::new(); contestants.len()];
        for round in 0..=n_rounds {
            for ((_, run), times) in contestants.iter_mut().zip(&mut times) {
                let start = Instant::now();
                run()?;
                // The first round warms up.
                if round > 0 {
                    times.push(start.elapsed().as_secs_f64() * 1e3);
                }
            }
        }
        let theirs = median(&mut times[0]);
        for ((name, _), times) in contestants.iter().zip(&mut times) {
            let median = median(times);
            println!(
                "{n_rows:>4} {name:20} {median:9.2} {:9.2} {:8.2} {:9.1}",
                times[0],
                theirs / median,
                n_bytes as f64 / median / 1e6
            );
        }
    }
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

/// Runs of a graph with all products, each over rows of its own that are bound
/// once.
fn session(
    environment: &Environment,
    operator: &str,
    n_rows: usize,
    n_threads: usize,
) -> anyhow::Result<Box<dyn FnMut() -> anyhow::Result<()>>> {
    let mut session = open(environment, &model(operator), n_threads)?;
    let mut binding = session.create_binding()?;
    for width in [WIDTH, INNER] {
        let rows = Value::from_array(([n_rows, width], noise(width, n_rows * width)))?;
        binding.bind_input(format!("rows.{width}"), &rows)?;
    }
    let allocator = Allocator::default();
    for layer in 0..LAYERS {
        for (product, [_, outputs]) in PRODUCTS.into_iter().enumerate() {
            let float = TensorElementType::Float32;
            let output = DynTensor::new(&allocator, float, [n_rows, outputs])?;
            binding.bind_output(format!("output.{layer}.{product}"), output)?;
        }
    }
    Ok(Box::new(move || {
        session.run_binding(&binding)?;
        Ok(())
    }))
}

fn open(environment: &Environment, model: &Model, n_threads: usize) -> ort::Result<Session> {
    Session::builder(environment)?
        .with_intra_threads(n_threads)?
        // Threads that spin after their share is done would slow the next in turn.
        .with_intra_op_spinning(false)?
        .with_operators(operators::domain()?)?
        .commit_from_memory(&model.encode_to_vec())
}

fn model(operator: &str) -> Model {
    let mut graph = Graph {
        name: operator.to_owned(),
        ..Graph::default()
    };
    for width in [WIDTH, INNER] {
        let dims = [Dim::Name("rows"), Dim::Size(width)];
        graph.input.push(ValueInfo::tensor(
            &format!("rows.{width}"),
            DataType::Float,
            &dims,
        ));
    }
    for layer in 0..LAYERS {
        for (product, [inputs, outputs]) in PRODUCTS.into_iter().enumerate() {
            let [weights, output] =
                ["weights", "output"].map(|part| format!("{part}.{layer}.{product}"));
            let values = noise(4 * layer + product, inputs * outputs);
            graph.initializer.push(Tensor {
                name: weights.clone(),
                dims: [inputs, outputs]
                    .map(|size| i64::try_from(size).unwrap_or(i64::MAX))
                    .to_vec(),
                data_type: DataType::Float.into(),
                raw_data: values
                    .iter()
                    .flat_map(|value| value.to_le_bytes())
                    .collect(),
                ..Tensor::default()
            });
            let dims = [Dim::Name("rows"), Dim::Size(outputs)];
            graph
                .output
                .push(ValueInfo::tensor(&output, DataType::Float, &dims));
            let is_ours = operator == operators::DENSE;
            graph.node.push(Node {
                input: vec![format!("rows.{inputs}"), weights],
                name: output.clone(),
                output: vec![output],
                op_type: operator.to_owned(),
                domain: if is_ours { IMAGEGPT } else { "" }.to_owned(),
                ..Node::default()
            });
        }
    }
    let version_of = |domain: &str, version| OperatorSet {
        domain: domain.to_owned(),
        version,
    };
    Model {
        ir_version: IR_VERSION,
        opset_import: vec![version_of("", OPSET), version_of(IMAGEGPT, 1)],
        graph: Some(graph),
        ..Model::default()
    }
}

/// The kernel alone, threads started for each product.
fn direct(
    kernel: Kernel,
    n_rows: usize,
    n_threads: usize,
) -> anyhow::Result<Box<dyn FnMut() -> anyhow::Result<()>>> {
    let mut products = Vec::new();
    for layer in 0..LAYERS {
        for (product, [inputs, outputs]) in PRODUCTS.into_iter().enumerate() {
            let weights = noise(4 * layer + product, inputs * outputs);
            let panels = Panels::with_kernel(&weights, inputs, outputs, kernel)?;
            products.push((panels, vec![0.0; n_rows * outputs]));
        }
    }
    let rows = noise(INNER, n_rows * INNER);
    Ok(Box::new(move || {
        for (panels, output) in &mut products {
            let operands = Operands {
                rows: &rows[..n_rows * panels.inputs()],
                bias: None,
                residual: None,
            };
            panels.run(operands, output, n_threads)?;
        }
        Ok(())
    }))
}

/// Other numbers for another seed: ONNX Runtime keeps equal weights only once.
fn noise(seed: usize, len: usize) -> Vec<f32> {
    let mut state = u32::try_from(seed).unwrap_or(0);
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}
