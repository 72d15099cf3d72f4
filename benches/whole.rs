//! Whole images through all layers, without ONNX Runtime:
//! `cargo bench --bench whole -- [THREADS] [ROUNDS] [LAYERS] [POSITIONS] [BATCH]`.
//!
//! The layers have imagegpt-small's sizes and made-up numbers, with weights in
//! `f32`, in bfloat16 and in 8 bits, on every kernel of this CPU. They take turns, one batch
//! each, `ROUNDS` times, and with them bare loops of the instructions that do the
//! work, on as many threads: what the CPU can do at most, in the same minute.
//! The shares are of the products, that is, of all less as many attentions
//! alone, by the time that threads had a core, so that other work on the machine
//! takes nothing away.
#![expect(clippy::print_stdout, reason = "a benchmark prints")]
#![expect(clippy::cast_precision_loss, reason = "figures to print")]
#![expect(unsafe_code, reason = "bare loops of a CPU's instructions")]

use std::time::{Duration, Instant};

use half::bf16;
use imagegpt::kernels::attention::{AttentionShape, CausalAttention, Kernel};
use imagegpt::kernels::layers::{Activation, DenseWeights, LayerWeights, Sizes, Weight};
use imagegpt::kernels::whole::{
    ImageKernels, ImageLayers, ImageMemory, Images, Means, MeansOf, Products,
};

const SIZES: Sizes = Sizes {
    width: 512,
    inner_width: 2048,
    heads: 8,
    epsilon: 1e-5,
    activation: Activation::QuickGelu,
};

#[derive(Clone, Copy)]
struct Case {
    n_threads: usize,
    n_layers: usize,
    positions: usize,
    batch: usize,
}

impl Case {
    /// Returns the operations of all products, of which one is a
    /// multiplication and an addition.
    fn flop(self) -> f64 {
        let Sizes {
            width, inner_width, ..
        } = SIZES;
        let weights = 4 * width * width + 2 * width * inner_width;
        2.0 * (weights * self.n_layers * self.positions * self.batch) as f64
    }

    fn shape(self) -> AttentionShape {
        AttentionShape {
            batch: self.batch,
            positions: self.positions,
            heads: SIZES.heads,
            head_dim: SIZES.width / SIZES.heads,
        }
    }
}

/// Work to time, and its name.
struct Contestant {
    name: String,
    run: Box<dyn FnMut() -> anyhow::Result<()>>,
    /// Seconds on the clock, and those that all threads had a core.
    times: Vec<[f64; 2]>,
}

impl Contestant {
    fn new(name: String, run: impl FnMut() -> anyhow::Result<()> + 'static) -> Self {
        Self {
            name,
            run: Box::new(run),
            times: Vec::new(),
        }
    }

    /// Runs the work once.
    fn time(&mut self) -> anyhow::Result<()> {
        let (started, cpu) = (Instant::now(), on_cores());
        (self.run)()?;
        let cpu = on_cores().saturating_sub(cpu).as_secs_f64();
        self.times.push([started.elapsed().as_secs_f64(), cpu]);
        Ok(())
    }

    /// Returns the median of the times on the clock.
    fn median(&self) -> f64 {
        let mut times: Vec<f64> = self.times.iter().map(|[clock, _]| *clock).collect();
        times.sort_by(f64::total_cmp);
        times[times.len() / 2]
    }

    /// Returns the least of the times on the clock, and of those on cores.
    fn least(&self) -> [f64; 2] {
        [0, 1].map(|which| {
            let times = self.times.iter().map(|both| both[which]);
            times.fold(f64::INFINITY, f64::min)
        })
    }

    fn print(&self, images: f64) {
        let [clock, cores] = self.least();
        let [median, clock, cores] =
            [self.median(), clock, cores].map(|seconds| seconds * 1e3 / images);
        print!("{median:9.2} {clock:9.2} {cores:9.2}  {}", self.name);
    }
}

/// Returns the time that all threads of this process have had a core.
fn on_cores() -> Duration {
    let time = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::try_from(time).unwrap_or_default()
}

fn main() -> anyhow::Result<()> {
    // Cargo adds `--bench`.
    let mut numbers = std::env::args().filter_map(|arg| arg.parse::<usize>().ok());
    let n_threads = numbers.next().unwrap_or(2);
    let n_rounds = numbers.next().unwrap_or(9);
    let case = Case {
        n_threads,
        n_layers: numbers.next().unwrap_or(16),
        positions: numbers.next().unwrap_or(1024),
        batch: numbers.next().unwrap_or(1),
    };
    for kernel in Kernel::ALL.into_iter().rev() {
        if kernel.is_available() {
            compare(kernel, case, n_rounds)?;
        }
    }
    Ok(())
}

/// Measures all products on a kernel, and prints the figures.
fn compare(kernel: Kernel, case: Case, n_rounds: usize) -> anyhow::Result<()> {
    let mut peaks = Vec::new();
    let mut runs = Vec::new();
    for products in Products::ALL {
        let contestant = match products {
            Products::Floats => layers::<f32>(kernel, products, case)?,
            Products::Bf16 => layers::<bf16>(kernel, products, case)?,
            _ => layers::<i8>(kernel, products, case)?,
        };
        let Some(contestant) = contestant else {
            continue;
        };
        runs.push(contestant);
        peaks.push(peak::of(kernel, products, case.n_threads));
    }
    let mut attention = attention(kernel, case)?;
    for _ in 0..n_rounds {
        let peaks = peaks.iter_mut().flatten().map(|(_, peak)| peak);
        for one in runs.iter_mut().chain(peaks).chain([&mut attention]) {
            one.time()?;
        }
    }
    let load = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "{kernel:?}: {case}, {n_rounds} rounds; load {}",
        load.trim()
    );
    println!("ms/image: median, fastest, fastest on all cores together");
    let images = case.batch as f64;
    attention.print(images);
    println!();
    let [_, alone] = attention.least();
    for (run, peak) in runs.iter().zip(&peaks) {
        run.print(images);
        let [_, cores] = run.least();
        let products = case.flop() / (cores - alone);
        print!(": products {:.1} GFLOP/s of a core", products / 1e9);
        if let Some((flop, peak)) = peak {
            let [_, cores] = peak.least();
            let peak = flop / cores;
            print!(" = {:.0} % of {:.1}", 100.0 * products / peak, peak / 1e9);
        }
        println!();
    }
    Ok(())
}

impl std::fmt::Display for Case {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} threads, {} layers, {} positions, batches of {}",
            self.n_threads, self.n_layers, self.positions, self.batch
        )
    }
}

/// Returns numbers from -1 to 1.
fn uniform() -> impl FnMut() -> f32 {
    let mut state = 0x9E37_79B9_7F4A_7C15_u64;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u32 << 23) as f32 - 1.0
    }
}

fn layers<W: Weight + Made>(
    kernel: Kernel,
    products: Products,
    case: Case,
) -> anyhow::Result<Option<Contestant>> {
    if !products.are_available::<W>(kernel) {
        return Ok(None);
    }
    let kernels = ImageKernels {
        products,
        products_on: kernel,
        attention_on: kernel,
    };
    let Sizes {
        width, inner_width, ..
    } = SIZES;
    let mut uniform = uniform();
    let weights: Vec<W> = (0..width * inner_width)
        .map(|_| W::made(uniform()))
        .collect();
    let norm = vec![1.0; width];
    let scales = vec![W::SCALE; 3 * width.max(inner_width)];
    let dense = |inputs: usize, outputs: usize| DenseWeights {
        weights: &weights[..inputs * outputs],
        scales: (size_of::<W>() == 1).then_some(&scales[..outputs]),
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
    let layer = std::iter::repeat_n(layer, case.n_layers);
    let layers = ImageLayers::pack(SIZES, layer, Some(&norm), kernels)?;
    let rows: Vec<f32> = (0..case.batch * case.positions * width)
        .map(|_| uniform())
        .collect();
    let mut means = vec![0.0; case.batch * (case.n_layers + 1) * width];
    let mut memory = ImageMemory::default();
    Ok(Some(Contestant::new(format!("{products:?}"), move || {
        let images = Images {
            batch: case.batch,
            positions: case.positions,
            rows: &rows,
            output: None,
            means: Some(Means {
                of: MeansOf::Normed,
                to: &mut means,
            }),
            n_threads: case.n_threads,
        };
        let run = layers.run(images, &mut memory)?;
        on_threads(case.n_threads, || run.work());
        run.finish();
        Ok(())
    })))
}

/// Weights made from numbers from -1 to 1.
trait Made {
    const SCALE: f32;
    fn made(uniform: f32) -> Self;
}

impl Made for f32 {
    const SCALE: f32 = 1.0;

    fn made(uniform: f32) -> Self {
        uniform * 0.05
    }
}

impl Made for bf16 {
    const SCALE: f32 = 1.0;

    fn made(uniform: f32) -> Self {
        Self::from_f32(uniform * 0.05)
    }
}

impl Made for i8 {
    const SCALE: f32 = 0.05 / 127.0;

    fn made(uniform: f32) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "within 127")]
        let weight = (uniform * 127.0).round() as Self;
        weight
    }
}

fn attention(kernel: Kernel, case: Case) -> anyhow::Result<Contestant> {
    let shape = case.shape();
    let attention = CausalAttention::with_kernel(shape, 0.125, kernel)?;
    let mut uniform = uniform();
    let n = case.batch * case.positions * SIZES.width;
    let qkv: Vec<f32> = (0..3 * n).map(|_| uniform()).collect();
    let mut output = vec![0.0; n];
    Ok(Contestant::new("attention alone".to_owned(), move || {
        for _ in 0..case.n_layers {
            attention.run(&qkv, &mut output, case.n_threads)?;
        }
        Ok(())
    }))
}

fn on_threads(n_threads: usize, work: impl Fn() + Sync) {
    std::thread::scope(|scope| {
        for _ in 1..n_threads {
            scope.spawn(&work);
        }
        work();
    });
}

/// Bare loops: instructions on registers alone.
mod peak {
    use super::{Contestant, Kernel, Products, on_threads};

    const STEPS: usize = 40_000_000;
    /// Sums that are added to independently.
    const SUMS: usize = 12;

    /// Returns a loop and the operations that all threads do in it.
    pub(super) fn of(
        kernel: Kernel,
        products: Products,
        n_threads: usize,
    ) -> Option<(f64, Contestant)> {
        #[cfg(target_arch = "x86_64")]
        {
            let (work, per_instruction): (unsafe fn(), usize) = match (kernel, products) {
                (Kernel::Avx2, Products::Floats) => (x86::floats_avx2, 16),
                (Kernel::Avx2, Products::Words) => (x86::words_avx2, 32),
                (Kernel::Avx512, Products::Floats) => (x86::floats_avx512, 32),
                (Kernel::Avx512Bf16, Products::Bf16) => (x86::bf16_avx512, 64),
                (Kernel::Avx512, Products::Words) => (x86::words_avx512, 64),
                (Kernel::Avx512, Products::Bytes) => (x86::bytes_avx512, 128),
                _ => return None,
            };
            let flop = (STEPS * SUMS * per_instruction * n_threads) as f64;
            let contestant = Contestant::new(format!("peak of {products:?}"), move || {
                // SAFETY: the layers beside it run on this kernel.
                on_threads(n_threads, || unsafe { work() });
                Ok(())
            });
            Some((flop, contestant))
        }
        #[cfg(not(target_arch = "x86_64"))]
        None
    }

    #[cfg(target_arch = "x86_64")]
    mod x86 {
        use std::arch::asm;

        use super::STEPS;

        /// Makes a loop of an instruction on twelve sums, written out because a
        /// compiler would shorten it.
        macro_rules! bare {
            ($name:ident, $features:literal, $zero:literal, $one:literal) => {
                #[target_feature(enable = $features)]
                pub(super) fn $name() {
                    // SAFETY: the function has the instructions; only the
                    // registers named are written.
                    unsafe {
                        asm!(
                            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11,12,13",
                            $zero,
                            ".endr",
                            "2:",
                            ".irp i,0,1,2,3,4,5,6,7,8,9,10,11",
                            $one,
                            ".endr",
                            "dec {n}",
                            "jnz 2b",
                            n = inout(reg) STEPS => _,
                            out("xmm0") _, out("xmm1") _, out("xmm2") _, out("xmm3") _,
                            out("xmm4") _, out("xmm5") _, out("xmm6") _, out("xmm7") _,
                            out("xmm8") _, out("xmm9") _, out("xmm10") _, out("xmm11") _,
                            out("xmm12") _, out("xmm13") _, out("xmm14") _,
                            options(nomem, nostack),
                        );
                    }
                }
            };
        }

        bare!(
            floats_avx2,
            "avx2,fma",
            "vpxor ymm\\i, ymm\\i, ymm\\i",
            "vfmadd231ps ymm\\i, ymm12, ymm13"
        );
        bare!(
            words_avx2,
            "avx2,fma",
            "vpxor ymm\\i, ymm\\i, ymm\\i",
            "vpmaddwd ymm14, ymm12, ymm13\nvpaddd ymm\\i, ymm\\i, ymm14"
        );
        bare!(
            floats_avx512,
            "avx512f",
            "vpxord zmm\\i, zmm\\i, zmm\\i",
            "vfmadd231ps zmm\\i, zmm12, zmm13"
        );
        bare!(
            bf16_avx512,
            "avx512bf16",
            "vpxord zmm\\i, zmm\\i, zmm\\i",
            "vdpbf16ps zmm\\i, zmm12, zmm13"
        );
        bare!(
            words_avx512,
            "avx512bw",
            "vpxord zmm\\i, zmm\\i, zmm\\i",
            "vpmaddwd zmm14, zmm12, zmm13\nvpaddd zmm\\i, zmm\\i, zmm14"
        );
        bare!(
            bytes_avx512,
            "avx512vnni",
            "vpxord zmm\\i, zmm\\i, zmm\\i",
            "vpdpbusd zmm\\i, zmm12, zmm13"
        );
    }
}
