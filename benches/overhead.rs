//! Measures the cost of the server: images per second through gRPC at
//! saturation, against the same graph in a bare loop at the fastest batch size.
//!
//!     cargo bench --bench overhead -- [MODEL_DIR]
//!
//! Both are interleaved in one process (A B A B) and compared round by round,
//! because the machine may be shared. Images are sent as tokens, so that the
//! server is measured and not image decoding (benches/preprocess.rs measures
//! decoding).

#![expect(
    clippy::print_stdout,
    reason = "a benchmark's result goes to standard output"
)]

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser as _;
use imagegpt::engine::onnx::{OnnxEngine, OnnxOptions};
use imagegpt::engine::{BatchRow, Engine, GraphRun, RunStop};
use imagegpt::model::Model;
use imagegpt::model::graph::{Graph, Want};
use imagegpt::model::precision::ProviderChoice;
use imagegpt::proto::pb;
use imagegpt::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use imagegpt::runtime::library::find_library;
use imagegpt::runtime::{GpuAttention, GpuCopies};
use imagegpt::serve::config::ServeConfig;
use imagegpt::serve::engines::onnx_engines;
use imagegpt::serve::heads::StartHeads;
use imagegpt::serve::worker::Worker;

const ROUNDS: usize = 5;
const BATCH_SIZE: usize = 8;
/// Number of batches per measurement.
const BATCHES: usize = 12;
/// Number of callers, enough that a full batch always waits while another runs.
const CALLERS: usize = 4 * BATCH_SIZE;

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeConfig,
}

fn main() -> anyhow::Result<()> {
    // cargo bench passes --bench.
    let dir = std::env::args().skip(1).find(|arg| !arg.starts_with('-'));
    let dir = dir.unwrap_or_else(|| "models/untrained".to_owned());
    let model = Model::open(&PathBuf::from(&dir), None)?;
    let batch_size = BATCH_SIZE.to_string();
    let config = Cli::try_parse_from([
        "overhead",
        "--model",
        &dir,
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
        "--execution-provider",
        "cpu",
        "--max-batch-size",
        &batch_size,
    ])?
    .serve;
    let mut engine = OnnxEngine::load(&OnnxOptions {
        generate_slots: 0,
        generate_bytes_max: 0,
        gpu_memory_limit: None,
        cuda_graphs: false,
        generate_attention: GpuAttention::Auto,
        gpu_copies: GpuCopies::OnnxRuntime,
        library: find_library(None),
        provider: ProviderChoice::Cpu,
        device_id: 0,
        intra_op_threads: 0,
        graphs: model.graphs.clone(),
        files: model.files.clone(),
        positions: model.positions(),
        n_colors: model.clusters.len(),
        sizes_are_given: model.sizes_are_given,
        n_labels: model.labels.len(),
        head_widths: Vec::new(),
        compiled_for: model.compiled.map(|compiled| compiled.provider),
        precision: model.compiled.map(|compiled| compiled.precision),
        buckets: model.buckets(config.batching.buckets()),
    })?;
    println!("machine: {}", machine());
    println!("model: {dir} {}", model.digest);
    println!(
        "batch: {BATCH_SIZE}; callers: {CALLERS}, one image a call; rounds: {ROUNDS} of {BATCHES} batches"
    );
    let images: Vec<Vec<u16>> = (0..BATCH_SIZE * BATCHES)
        .map(|seed| image(seed, model.positions(), model.clusters.len()))
        .collect();
    let runtime = tokio::runtime::Runtime::new()?;
    let engines = onnx_engines(&config, &model, &[])?;
    let mut worker = runtime.block_on(Worker::start(
        &config,
        model,
        StartHeads::default(),
        engines,
    ))?;
    runtime.block_on(worker.ready())?;

    // The scheduler chooses among the sizes, so the bare loop may, too.
    let mut best = (0.0, BATCH_SIZE);
    for bucket in config.batching.buckets().iter() {
        let rate = bare_loop(&mut engine, bucket, &images)?;
        println!("bare loop in batches of {bucket}: {rate:.2} images/s");
        if rate > best.0 {
            best = (rate, bucket);
        }
    }
    let bucket = best.1;
    println!("the fastest is {bucket}");
    let (mut bare, mut served) = (Vec::new(), Vec::new());
    for round in 0..ROUNDS {
        bare.push(bare_loop(&mut engine, bucket, &images)?);
        served.push(runtime.block_on(through_grpc(worker.grpc_addr, &images))?);
        println!(
            "round {round}: bare {:.2} images/s, gRPC {:.2} images/s",
            bare[round], served[round]
        );
    }
    let ratios = bare.iter().zip(&served).map(|(bare, served)| served / bare);
    let ratio = median(ratios.collect());
    let (bare, served) = (median(bare), median(served));
    println!(
        "batch time in the bare loop: {:.0} ms",
        1e3 * as_f64(bucket) / bare
    );
    println!("bare loop: {bare:.2} images/s");
    println!("through gRPC: {served:.2} images/s");
    println!("ratio, median of the rounds': {:.1} %", 100.0 * ratio);
    runtime.block_on(worker.shutdown(Duration::from_secs(10)));
    Ok(())
}

/// Measures the images per second of the engine alone.
fn bare_loop(engine: &mut OnnxEngine, bucket: usize, images: &[Vec<u16>]) -> anyhow::Result<f64> {
    let started = Instant::now();
    for batch in images.chunks(bucket) {
        let rows: Vec<BatchRow<'_>> = batch
            .iter()
            .map(|tokens| BatchRow {
                tokens,
                want: Want::Mean,
            })
            .collect();
        let run = GraphRun {
            graph: Graph::Hidden,
            bucket,
            rows: &rows,
        };
        let answers = engine.run(&run, &RunStop::default())?;
        anyhow::ensure!(answers.len() == batch.len(), "an answer is missing");
    }
    Ok(as_f64(images.len()) / started.elapsed().as_secs_f64())
}

/// Measures the images per second of callers, each of which sends its next
/// image when it has the answer for the last one.
async fn through_grpc(addr: std::net::SocketAddr, images: &[Vec<u16>]) -> anyhow::Result<f64> {
    let images: Arc<[Vec<u16>]> = images.into();
    let next = Arc::new(AtomicUsize::new(0));
    let client = ImageGptServiceClient::connect(format!("http://{addr}")).await?;
    let started = Instant::now();
    let callers: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (images, next, mut client) = (images.clone(), next.clone(), client.clone());
            tokio::spawn(async move {
                while let Some(tokens) = images.get(next.fetch_add(1, Ordering::Relaxed)) {
                    let ids = tokens.iter().copied().map(u32::from).collect();
                    let request = pb::EmbedRequest {
                        images: vec![pb::Image {
                            source: Some(pb::image::Source::Tokens(pb::Tokens { ids })),
                        }],
                        ..Default::default()
                    };
                    let response = client.embed(request).await?.into_inner();
                    let outcome = response.results.into_iter().next().and_then(|r| r.outcome);
                    anyhow::ensure!(
                        matches!(outcome, Some(pb::embed_result::Outcome::Embedding(_))),
                        "no vector: {outcome:?}"
                    );
                }
                Ok(())
            })
        })
        .collect();
    for caller in callers {
        caller.await.context("a caller panicked")??;
    }
    Ok(as_f64(images.len()) / started.elapsed().as_secs_f64())
}

fn image(seed: usize, positions: usize, n_colors: usize) -> Vec<u16> {
    (0..positions)
        .map(|position| {
            let mixed = (seed * 7919 + position) * 31 % n_colors;
            u16::try_from(mixed).unwrap_or(0)
        })
        .collect()
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

#[expect(clippy::cast_precision_loss, reason = "small counts")]
fn as_f64(count: usize) -> f64 {
    count as f64
}

/// Returns the processor's name and its number of threads.
fn machine() -> String {
    let cpuinfo = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = cpuinfo
        .lines()
        .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
        .map_or("unknown", |(_, name)| name);
    let n_threads = std::thread::available_parallelism().map_or(0, usize::from);
    format!("{name}, {n_threads} threads")
}
