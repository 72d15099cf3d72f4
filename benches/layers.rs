//! A step of generation through all layers, without ONNX Runtime:
//! `cargo bench --bench layers -- [THREADS] [ROUNDS] [ROWS] [PAST] [SHARED]`.
//!
//! The layers have imagegpt-small's sizes and made-up numbers: weights and
//! cache in 24 bits, and weights in 8 bits with a cache in bfloat16, on every
//! kernel of this CPU, with rows as floats, and as digits where that is faster.
//! They take turns, one step each, `ROUNDS` times. The last columns are the
//! weights and cache that a step reads, divided by the fastest step, and its
//! multiplications and additions. All sequences share their first `SHARED`
//! tokens.
#![expect(clippy::print_stdout, reason = "a benchmark prints")]
#![expect(clippy::cast_precision_loss, reason = "figures to print")]

use std::time::Instant;

use bytemuck::Pod;
use half::bf16;
use imagegpt::kernels::attention::{BLOCK, Int24, Kept, Kernel, KeyValueCache, SharedPrefix};
use imagegpt::kernels::layers::{
    Activation, DenseWeights, LayerWeights, NewTokens, RowsAs, Sizes, StepLayers, StepMemory,
    Weight,
};
use memmap2::MmapMut;

const LAYERS: usize = 24;
const SIZES: Sizes = Sizes {
    width: 512,
    inner_width: 2048,
    heads: 8,
    epsilon: 1e-5,
    activation: Activation::QuickGelu,
};

/// Function to time, with its name and the bytes that it reads.
type Contestant = (String, usize, Box<dyn FnMut() -> anyhow::Result<()>>);

fn main() -> anyhow::Result<()> {
    // Cargo adds `--bench`.
    let mut numbers = std::env::args().filter_map(|arg| arg.parse::<usize>().ok());
    let n_threads = numbers.next().unwrap_or(2);
    let n_rounds = numbers.next().unwrap_or(15);
    let n_rows = numbers.next().unwrap_or(8);
    let past = numbers.next().unwrap_or(64);
    let shared = numbers.next().unwrap_or(0).min(past);

    let mut contestants: Vec<Contestant> = Vec::new();
    for kernel in [Kernel::Avx512, Kernel::Avx2, Kernel::Portable] {
        if kernel.is_available() {
            let case = (kernel, n_threads, n_rows, past, shared);
            contestants.push(steps::<_, Int24>(case, RowsAs::Floats, 1.0_f32, 0)?);
            contestants.push(steps::<_, bf16>(case, RowsAs::Floats, 1_i8, bf16::ZERO)?);
            let rows_as = RowsAs::fastest::<i8>(kernel, SIZES.inner_width);
            if rows_as == RowsAs::Digits {
                contestants.push(steps::<_, bf16>(case, rows_as, 1_i8, bf16::ZERO)?);
            }
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
    println!(
        "{n_threads} threads, {n_rounds} rounds, {n_rows} rows, a past of {past}, {shared} shared"
    );
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

/// Makes steps of `n_rows` sequences that have `past` tokens each and share the
/// first `shared` of them.
fn steps<W: Weight, K: Kept<Element: Pod>>(
    (kernel, n_threads, n_rows, past, shared): (Kernel, usize, usize, usize, usize),
    rows_as: RowsAs,
    weight: W,
    kept: K::Element,
) -> anyhow::Result<Contestant> {
    let Sizes {
        width, inner_width, ..
    } = SIZES;
    let weights = vec![weight; width * inner_width];
    let norm = vec![1.0; width];
    let scales = vec![1e-3; 3 * width.max(inner_width)];
    let dense = |inputs: usize, outputs: usize| DenseWeights {
        weights: &weights[..inputs * outputs],
        // Small enough that no score makes others nothing, which is slower.
        scales: Some(&scales[..outputs]),
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
    let layers =
        StepLayers::with_kernel(SIZES, std::iter::repeat_n(layer, LAYERS), kernel, rows_as)?;
    let capacity = (past + 1).next_multiple_of(BLOCK);
    let position_len = SIZES.heads * K::position_len(width / SIZES.heads);
    let n_bytes = n_rows * capacity * position_len * size_of::<K::Element>();
    let mut caches = Vec::new();
    for _ in 0..2 * LAYERS {
        let mut cache = MmapMut::map_anon(n_bytes)?;
        // As in the worker.
        #[cfg(target_os = "linux")]
        let _ = cache.advise(memmap2::Advice::HugePage);
        bytemuck::cast_slice_mut(&mut cache).fill(kept);
        caches.push(cache);
    }
    let (rows, pasts) = (vec![0.5; n_rows * width], vec![past; n_rows]);
    let prefixes = vec![SharedPrefix { of: 0, len: shared }; n_rows];
    let mut room = StepMemory::default();
    let mut output = vec![0.0; n_rows * width];
    let step = move || {
        let mut caches = caches.iter_mut();
        let caches = std::iter::from_fn(|| {
            Some(KeyValueCache {
                keys: bytemuck::cast_slice_mut(caches.next()?),
                values: bytemuck::cast_slice_mut(caches.next()?),
            })
        });
        let tokens = NewTokens::<K> {
            rows: &rows,
            length: 1,
            past: &pasts,
            prefixes: &prefixes,
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
    let kept = position_len * size_of::<K::Element>();
    let n_read = n_rows * (past - shared) + shared;
    let read = weights_of_layer() * size_of::<W::Packed>() + 2 * n_read * kept;
    let bits = |bytes: usize| 8 * bytes;
    let name = format!(
        "{kernel:?}, weights of {} bits by {rows_as:?}, past of {}",
        bits(size_of::<W::Packed>()),
        bits(K::PER_NUMBER * size_of::<K::Element>()),
    );
    Ok((name, LAYERS * read, Box::new(step)))
}
