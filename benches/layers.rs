//! A step of generation through all layers, without ONNX Runtime:
//! `cargo bench --bench layers -- [THREADS] [ROUNDS] [ROWS] [PAST]`.
//!
//! imagegpt-small's sizes with numbers made up, weights in `f32` with a cache in
//! `f32`, and in 8 bits with a cache in bfloat16, on every kernel of this CPU;
//! they take turns, one step each, `ROUNDS` times over. The last columns are what
//! a step has to read, weights and cache, over the fastest step, and what it has
//! to multiply and add.
#![expect(clippy::print_stdout, reason = "a benchmark prints")]
#![expect(clippy::cast_precision_loss, reason = "figures to print")]

use std::time::Instant;

use half::bf16;
use imagegpt::attention::{BLOCK, Cache, Kept, Kernel};
use imagegpt::layers::{
    Activation, DenseWeights, LayerWeights, Layers, Room, Sizes, Tokens, Weight,
};

const LAYERS: usize = 24;
const SIZES: Sizes = Sizes {
    width: 512,
    inner_width: 2048,
    heads: 8,
    epsilon: 1e-5,
    activation: Activation::QuickGelu,
};

/// Something to time, what it is called, and bytes that it has to read.
type Contestant = (String, usize, Box<dyn FnMut() -> anyhow::Result<()>>);

fn main() -> anyhow::Result<()> {
    // Cargo adds `--bench`.
    let mut numbers = std::env::args().filter_map(|arg| arg.parse::<usize>().ok());
    let n_threads = numbers.next().unwrap_or(2);
    let n_rounds = numbers.next().unwrap_or(15);
    let n_rows = numbers.next().unwrap_or(8);
    let past = numbers.next().unwrap_or(64);

    let mut contestants: Vec<Contestant> = Vec::new();
    for kernel in [Kernel::Avx512, Kernel::Avx2, Kernel::Portable] {
        if kernel.is_available() {
            let case = (kernel, n_threads, n_rows, past);
            contestants.push(steps(case, 1e-2_f32, 0.0_f32)?);
            contestants.push(steps(case, 1_i8, bf16::ZERO)?);
        }
    }
    let mut times = vec![Vec::with_capacity(n_rounds); contestants.len()];
    for _ in 0..n_rounds {
        for ((_, _, step), times) in contestants.iter_mut().zip(&mut times) {
            let started = Instant::now();
            step()?;
            times.push(started.elapsed().as_secs_f64());
        }
    }
    let n_weights = weights_of_layer() * LAYERS;
    println!("{n_threads} threads, {n_rounds} rounds, {n_rows} rows, a past of {past}");
    println!("  median  fastest     read  computed");
    for ((name, bytes, _), times) in contestants.iter().zip(&mut times) {
        times.sort_by(f64::total_cmp);
        let (fastest, median) = (times[0], times[times.len() / 2]);
        let gigabytes = *bytes as f64 / fastest / 1e9;
        let gigaflops = 2.0 * (n_weights * n_rows) as f64 / fastest / 1e9;
        println!(
            "{:6.2} ms {:5.2} ms {gigabytes:4.1} GB/s {gigaflops:3.0} GFLOP/s  {name}",
            median * 1e3,
            fastest * 1e3,
        );
    }
    Ok(())
}

fn weights_of_layer() -> usize {
    let Sizes {
        width, inner_width, ..
    } = SIZES;
    4 * width * width + 2 * width * inner_width
}

/// Steps of `n_rows` sequences, each with `past` tokens before.
fn steps<W: Weight, K: Kept + Send + Sync + 'static>(
    (kernel, n_threads, n_rows, past): (Kernel, usize, usize, usize),
    weight: W,
    kept: K,
) -> anyhow::Result<Contestant> {
    let Sizes {
        width, inner_width, ..
    } = SIZES;
    let weights = vec![weight; width * inner_width];
    let norm = vec![1.0; width];
    let dense = |inputs: usize, outputs: usize| DenseWeights {
        weights: &weights[..inputs * outputs],
        scales: None,
        bias: None,
    };
    let layer = LayerWeights {
        attention_norm: &norm,
        attention_scale: 0.125,
        qkv: dense(width, 3 * width),
        projection: dense(width, width),
        inner_norm: &norm,
        expand: dense(width, inner_width),
        contract: dense(inner_width, width),
    };
    let layers = Layers::with_kernel(SIZES, std::iter::repeat_n(layer, LAYERS), kernel)?;
    let capacity = (past + 1).next_multiple_of(BLOCK);
    let mut caches = vec![vec![kept; n_rows * capacity * width]; 2 * LAYERS];
    let (rows, pasts) = (vec![0.5; n_rows * width], vec![past; n_rows]);
    let mut room = Room::default();
    let mut output = vec![0.0; n_rows * width];
    let step = move || {
        let mut caches = caches.iter_mut();
        let caches = std::iter::from_fn(|| {
            Some(Cache {
                keys: caches.next()?,
                values: caches.next()?,
            })
        });
        let tokens = Tokens {
            rows: &rows,
            length: 1,
            past: &pasts,
            capacity,
            caches: caches.collect(),
        };
        let step = layers.step(tokens, &mut room)?;
        std::thread::scope(|scope| {
            for _ in 1..n_threads {
                scope.spawn(|| step.work());
            }
            step.work();
        });
        step.finish(&mut output)?;
        Ok(())
    };
    let read = weights_of_layer() * size_of::<W>() + 2 * n_rows * past * width * size_of::<K>();
    let bits = |bytes: usize| 8 * bytes;
    let name = format!(
        "{kernel:?}, weights of {} bits, past of {}",
        bits(size_of::<W>()),
        bits(size_of::<K>()),
    );
    Ok((name, LAYERS * read, Box::new(step)))
}
