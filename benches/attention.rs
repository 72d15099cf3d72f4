//! The attention kernels beside ONNX Runtime's own, on the shapes of the three
//! published models: `cargo bench --bench attention -- [THREADS] [ROUNDS]`.
//!
//! All kernels of a shape take turns, one call each, `ROUNDS` times: on a
//! shared machine the ratios mean more than the milliseconds. The kernels are
//! called by themselves, with threads started for each call. The last column is
//! the arithmetic of the causal half, `4 * S * S / 2 * d`, divided by the
//! fastest call.
#![expect(clippy::print_stdout, reason = "a benchmark prints")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use imagegpt::kernels::attention::{AttentionShape, CausalAttention, Kernel};
use imagegpt::runtime::library::find_library;
use ort::environment::Environment;
use ort::session::Session;
use ort::value::Tensor;

/// Function to time, with its name.
type Contestant<'a> = (String, Box<dyn FnMut() -> anyhow::Result<()> + 'a>);

fn main() -> anyhow::Result<()> {
    // Cargo adds `--bench`.
    let mut numbers = std::env::args().filter_map(|arg| arg.parse::<usize>().ok());
    let n_threads = numbers.next().unwrap_or(2);
    let n_rounds = numbers.next().unwrap_or(15);
    let given = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
    let environment = ort::init_from(find_library(given.as_deref()))?.build()?;
    println!("{n_threads} threads, {n_rounds} rounds, batch 1, 1024 positions");
    for (name, heads, head_dim) in [("small", 8, 64), ("medium", 8, 128), ("large", 16, 96)] {
        let shape = AttentionShape {
            batch: 1,
            positions: 1024,
            heads,
            head_dim,
        };
        compare(&environment, name, shape, n_threads, n_rounds)?;
    }
    Ok(())
}

fn compare(
    environment: &Environment,
    name: &str,
    shape: AttentionShape,
    n_threads: usize,
    n_rounds: usize,
) -> anyhow::Result<()> {
    let width = shape.width();
    let qkv = noise(shape.positions * 3 * width);
    let dimensions = [1, shape.positions, width];
    let parts = [0, 1, 2].map(|part| {
        qkv.chunks_exact(width)
            .skip(part)
            .step_by(3)
            .flatten()
            .copied()
            .collect::<Vec<_>>()
    });
    let [query, key, value] = parts.map(|part| Tensor::from_array((dimensions, part)));
    let (query, key, value) = (query?, key?, value?);

    let mut contestants: Vec<Contestant> = Vec::new();
    let mut theirs = session(
        environment,
        &format!("multi_head_attention_{}", shape.heads),
        n_threads,
    )?;
    contestants.push((
        "onnxruntime MultiHeadAttention".into(),
        Box::new(move || {
            theirs.run(ort::inputs!["query" => &query, "key" => &key, "value" => &value])?;
            Ok(())
        }),
    ));
    for kernel in Kernel::ALL {
        if !kernel.is_available() {
            continue;
        }
        #[expect(clippy::cast_precision_loss, reason = "a small number")]
        let scale = 1.0 / (shape.head_dim as f32).sqrt();
        let attention = CausalAttention::with_kernel(shape, scale, kernel)?;
        let (qkv, mut output) = (&qkv, vec![0.0; shape.positions * width]);
        contestants.push((
            format!("{kernel:?}"),
            Box::new(move || Ok(attention.run(qkv, &mut output, n_threads)?)),
        ));
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
    println!("\n{name}: {} heads of {}", shape.heads, shape.head_dim);
    println!(
        "{:32} {:>9} {:>9} {:>8} {:>9}",
        "", "median ms", "min ms", "ratio", "GFLOP/s"
    );
    let theirs = median(&mut times[0]);
    for ((name, _), times) in contestants.iter().zip(&mut times) {
        let median = median(times);
        println!(
            "{name:32} {median:9.2} {:9.2} {:8.2} {:9.0}",
            times[0],
            theirs / median,
            shape.causal_flop() / times[0] / 1e6
        );
    }
    Ok(())
}

fn median(times: &mut [f64]) -> f64 {
    times.sort_by(f64::total_cmp);
    times[times.len() / 2]
}

fn session(environment: &Environment, model: &str, n_threads: usize) -> ort::Result<Session> {
    let data = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data");
    Session::builder(environment)?
        .with_intra_threads(n_threads)?
        // Threads that spin after their share is done would slow the next in turn.
        .with_intra_op_spinning(false)?
        .commit_from_file(data.join(model).with_extension("onnx"))
}

#[expect(clippy::cast_precision_loss, reason = "24 bits fit")]
fn noise(len: usize) -> Vec<f32> {
    let mut state = 1_u32;
    (0..len)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 8) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}
