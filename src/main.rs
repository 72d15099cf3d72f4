//! The life of the process.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use imagegpt::compile::command::{self, Bars, CompileArgs, InspectArgs};
use imagegpt::compile::{self, Runtime, cache};
use imagegpt::config::ServeConfig;
use imagegpt::engine::onnx;
use imagegpt::head::Head;
use imagegpt::model::Model;
use imagegpt::neighbors::{self, NeighborsConfig};
use imagegpt::worker::{Ended, Worker, onnx_factory};
use tokio::signal::unix::{SignalKind, signal};

/// Flags or files are wrong: what clap exits with, too.
const EXIT_USAGE: u8 = 2;
/// The engine failed while the worker served: only a restart helps.
const EXIT_ENGINE: u8 = 3;

/// ImageGPT over gRPC: images become color tokens, tokens become features and
/// class scores, through ONNX Runtime
#[derive(Debug, Parser)]
#[command(name = "imagegpt", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve a model over gRPC
    Serve(Box<ServeConfig>),
    /// Make graphs that run several times faster than a published export
    Compile(CompileArgs),
    /// Show what a compiled directory holds
    Inspect(InspectArgs),
    /// Embed a folder of images through a worker and show who looks like whom
    Neighbors(NeighborsConfig),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(config) => serve(&config),
        Command::Compile(args) => to_stdout(|out| command::run(&args, out)),
        Command::Inspect(args) => to_stdout(|out| command::inspect(&args, out)),
        Command::Neighbors(config) => show_neighbors(&config),
    };
    outcome.unwrap_or_else(|error| {
        // Before the log is set up, and for commands that have none.
        let _ = writeln!(std::io::stderr(), "imagegpt: {error:#}");
        ExitCode::from(EXIT_USAGE)
    })
}

fn to_stdout(
    command: impl FnOnce(&mut std::io::Stdout) -> anyhow::Result<()>,
) -> anyhow::Result<ExitCode> {
    command(&mut std::io::stdout())?;
    Ok(ExitCode::SUCCESS)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the async runtime cannot be started")
}

fn serve(config: &ServeConfig) -> anyhow::Result<ExitCode> {
    config.validate()?;
    imagegpt::telemetry::init(&config.log)?;
    let folder = locate(config)?;
    let name = config.model.model_name.as_deref();
    let model = Model::open(&folder, name)?;
    let heads = config.model.heads.iter().map(Head::open);
    let heads = heads.collect::<Result<Vec<_>, _>>()?;
    let factory = onnx_factory(config, &model, &heads);
    runtime()?.block_on(async {
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut worker = Worker::start(config, model, heads, factory).await?;
        tracing::info!(grpc = %worker.grpc_addr, metrics = %worker.metrics_addr, "listening");
        tokio::select! {
            ready = worker.ready() => { ready.context("the model cannot be served")?; }
            _ = terminate.recv() => return Ok(ExitCode::SUCCESS),
            _ = interrupt.recv() => return Ok(ExitCode::SUCCESS),
        }
        let reason = tokio::select! {
            _ = terminate.recv() => None,
            _ = interrupt.recv() => None,
            reason = worker.failed() => Some(reason),
        };
        if let Some(reason) = reason {
            tracing::error!(
                reason,
                "the engine failed; ending so that a restart can help"
            );
            worker.shutdown(std::time::Duration::from_secs(1)).await;
            return Ok(ExitCode::from(EXIT_ENGINE));
        }
        let grace = config.network.shutdown_grace_period;
        tracing::info!(images = worker.images_in_flight(), ?grace, "draining");
        Ok(match worker.shutdown(grace).await {
            Ended::Clean => {
                tracing::info!("ended");
                ExitCode::SUCCESS
            }
            Ended::Hard { images } => {
                tracing::error!(images, "ended hard: the grace period ran out");
                ExitCode::FAILURE
            }
        })
    })
}

/// The directory to serve, compiled if it has to be.
fn locate(config: &ServeConfig) -> anyhow::Result<PathBuf> {
    let library = onnx::find_library(config.model.onnxruntime.as_deref());
    let provider = match config.model.execution_provider {
        onnx::Provider::Cuda => compile::Provider::Cuda,
        // A GPU that is there by chance is no reason to compile for it.
        onnx::Provider::Cpu | onnx::Provider::Auto => compile::Provider::Cpu,
    };
    let runtime = || Ok(Runtime::new(onnx::environment(&library)?, provider)?);
    let mut bars = Bars::new();
    let folder = cache::locate(
        &config.model.model,
        &config.model.compile,
        provider,
        runtime,
        &mut bars,
    );
    bars.end();
    folder
}

fn show_neighbors(config: &NeighborsConfig) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(neighbors::run(config, &mut std::io::stdout()))?;
    Ok(ExitCode::SUCCESS)
}
