//! Measures how long an engine is idle between two batches while more batches
//! wait.
//!
//!     cargo bench --bench gap -- [SECONDS]
//!
//! A worker at saturation runs in one process with three callers, each of which
//! sends one batch of images per call, so that a batch always waits. The first
//! engine sleeps through its runs and leaves the cores to other threads, as a
//! GPU does; the second runs a real graph, `random:tiny`, on one core. The
//! benchmark prints `imagegpt_engine_gap_seconds`; for the real graph also the
//! part of the gap that the engine itself causes (tokens in, answers out), in a
//! bare loop.

#![expect(
    clippy::print_stdout,
    reason = "a benchmark's result goes to standard output"
)]

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::Parser as _;
use imagegpt::commands::compile::Bars;
use imagegpt::commands::serve::locate;
use imagegpt::engine::{BatchRow, GraphRun, RunStop};
use imagegpt::model::Model;
use imagegpt::model::graph::{Graph, Layers, Norm, Want};
use imagegpt::proto::pb;
use imagegpt::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use imagegpt::serve::config::ServeConfig;
use imagegpt::serve::engines::{engines, onnx_factory};
use imagegpt::serve::heads::StartHeads;
use imagegpt::serve::worker::Worker;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

const SIZES: [usize; 3] = [1, 8, 64];
/// Number of callers: one batch is running, one waits, one is being sent.
const CALLERS: usize = 3;
const WARM_UP: Duration = Duration::from_millis(500);

#[derive(clap::Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeConfig,
}

fn main() -> anyhow::Result<()> {
    // cargo bench passes --bench.
    let seconds = std::env::args().skip(1).find_map(|arg| arg.parse().ok());
    let time = Duration::from_secs_f64(seconds.unwrap_or(4.0));
    let folder = locate(&config("random:tiny", 1, &[])?, &mut Bars::new())?;
    let runtime = tokio::runtime::Runtime::new()?;
    println!(
        "{:<14} {:>5} {:>8} {:>10} {:>10} {:>10}",
        "engine", "batch", "runs", "run", "gap", "of itself"
    );
    for (name, flags) in [
        ("sleeps 5 ms", &["--fake-engine", "5ms"][..]),
        ("random:tiny", &[]),
    ] {
        for size in SIZES {
            let folder = folder.display().to_string();
            let config = config(&folder, size, flags)?;
            let alone = match flags {
                [] => Some(outside_runs(&config, Path::new(&folder), size, time / 4)?),
                _ => None,
            };
            let found = runtime.block_on(saturated(&config, Path::new(&folder), size, time))?;
            println!(
                "{name:<14} {size:>5} {:>8.0} {:>10} {:>10} {:>10}",
                found.n,
                format!("{:.2} ms", 1e3 * found.run_seconds / found.n),
                format!("{:.1} us", 1e6 * found.gap_seconds / found.n),
                alone.map_or_else(String::new, |alone| format!("{:.1} us", 1e6 * alone)),
            );
        }
    }
    Ok(())
}

fn config(model: &str, size: usize, flags: &[&str]) -> anyhow::Result<ServeConfig> {
    let size = size.to_string();
    let fixed = [
        "gap",
        "--model",
        model,
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
        "--execution-provider",
        "cpu",
        "--intra-op-threads",
        "1",
        "--generate-slots",
        "0",
        "--max-batch-size",
        &size,
        "--batch-sizes",
        &size,
    ];
    Ok(Cli::try_parse_from(fixed.iter().chain(flags))?.serve)
}

/// Returns the mean time of a call of the engine outside the runtime, in
/// seconds.
fn outside_runs(
    config: &ServeConfig,
    folder: &Path,
    size: usize,
    time: Duration,
) -> anyhow::Result<f64> {
    let model = Model::open(folder, None)?;
    let layer = model.compiled.map_or(0, |compiled| compiled.feature_layer);
    let mut engine = onnx_factory(config, &model, &[])()?;
    let images: Vec<Vec<u16>> = (0..size).map(|seed| image(&model, seed)).collect();
    let norm = Norm::PreAttnRms;
    let layers = Layers::ascending(&[layer]).context("a layer")?;
    let rows: Vec<BatchRow<'_>> = images
        .iter()
        .map(|tokens| BatchRow {
            tokens,
            want: Want::Features { layers, norm },
        })
        .collect();
    let run = GraphRun {
        graph: Graph::Features(norm),
        bucket: size,
        rows: &rows,
    };
    let (mut outside, mut runs) = (Duration::ZERO, 0.0);
    let begun = Instant::now();
    while begun.elapsed() < time {
        let called = Instant::now();
        let answers = engine.run(&run, &RunStop::default())?;
        let all = called.elapsed();
        anyhow::ensure!(answers.len() == size, "an answer is missing");
        let span = engine.last_span().context("the engine says when it ran")?;
        outside += all.saturating_sub(span.ended - span.started);
        runs += 1.0;
    }
    Ok(outside.as_secs_f64() / runs)
}

/// Metrics of the engine's runs.
#[derive(Clone, Copy)]
struct Runs {
    n: f64,
    run_seconds: f64,
    gap_seconds: f64,
}

async fn saturated(
    config: &ServeConfig,
    folder: &Path,
    size: usize,
    time: Duration,
) -> anyhow::Result<Runs> {
    let model = Model::open(folder, None)?;
    let calls: Vec<pb::EmbedRequest> = (0..CALLERS)
        .map(|caller| {
            let seeds = caller * size..(caller + 1) * size;
            call(seeds.map(|seed| image(&model, seed)).collect())
        })
        .collect();
    let engines = engines(config, &model, &[])?;
    let mut worker = Worker::start(config, model, StartHeads::default(), engines).await?;
    worker.ready().await?;
    let ended = Arc::new(AtomicBool::new(false));
    let mut callers = Vec::new();
    for request in calls {
        let client = ImageGptServiceClient::connect(format!("http://{}", worker.grpc_addr));
        let (mut client, ended) = (client.await?, Arc::clone(&ended));
        callers.push(tokio::spawn(async move {
            while !ended.load(Ordering::Relaxed) {
                client.embed(request.clone()).await?;
            }
            anyhow::Ok(())
        }));
    }
    tokio::time::sleep(WARM_UP).await;
    let before = page(worker.metrics_addr).await?;
    tokio::time::sleep(time).await;
    let after = page(worker.metrics_addr).await?;
    ended.store(true, Ordering::Relaxed);
    for caller in callers {
        caller.await.context("a caller panicked")??;
    }
    worker.shutdown(Duration::from_secs(10)).await;
    Ok(Runs {
        n: after.n - before.n,
        run_seconds: after.run_seconds - before.run_seconds,
        gap_seconds: after.gap_seconds - before.gap_seconds,
    })
}

/// Returns the sums of a metrics page over all graphs and devices.
async fn page(addr: SocketAddr) -> anyhow::Result<Runs> {
    let mut stream = tokio::net::TcpStream::connect(addr).await?;
    let request = "GET /metrics HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n";
    stream.write_all(request.as_bytes()).await?;
    let mut text = String::new();
    stream.read_to_string(&mut text).await?;
    let sum = |name: &str| -> f64 {
        let series = text.lines().filter(|line| line.starts_with(name));
        let values = series.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok());
        values.sum()
    };
    Ok(Runs {
        n: sum("imagegpt_engine_gap_seconds_count"),
        run_seconds: sum("imagegpt_inference_duration_seconds_sum"),
        gap_seconds: sum("imagegpt_engine_gap_seconds_sum"),
    })
}

fn call(images: Vec<Vec<u16>>) -> pb::EmbedRequest {
    let image = |tokens: Vec<u16>| pb::Image {
        source: Some(pb::image::Source::Tokens(pb::Tokens {
            ids: tokens.into_iter().map(u32::from).collect(),
        })),
    };
    pb::EmbedRequest {
        images: images.into_iter().map(image).collect(),
        ..Default::default()
    }
}

/// Makes an image that differs for each seed, since identical images would be
/// coalesced into one run.
fn image(model: &Model, seed: usize) -> Vec<u16> {
    let n_colors = model.clusters.len();
    (0..model.positions())
        .map(|position| {
            let mixed = (seed + 1) * 7919 + position * (seed + 31);
            u16::try_from(mixed % n_colors).unwrap_or(0)
        })
        .collect()
}
