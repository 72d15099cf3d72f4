//! The life of the process.

use std::io::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context as _;
use clap::{Parser, Subcommand};
use imagegpt::bench::flags::BenchArgs;
use imagegpt::bench::{self, Verdict};
use imagegpt::commands::{self, Ask, Outcome};
use imagegpt::compile::command::{self, CompileArgs, InspectArgs};
use imagegpt::config::{NetworkConfig, ServeConfig};
use imagegpt::dataset::flags::EmbedArgs;
use imagegpt::dataset::{self, Ended as JobEnded, Terminal};
use imagegpt::doctor::{self, DoctorArgs, Verdict as Diagnosis};
use imagegpt::engine::{Failure, FailureKind};
use imagegpt::local::{load_and_start, own_worker};
use imagegpt::neighbors::{self, NeighborsConfig};
use imagegpt::worker::{Ended, Worker};
use tokio::signal::unix::{Signal, SignalKind, signal};

/// Flags or files are wrong: what clap exits with, too.
const EXIT_USAGE: u8 = 2;
/// A command was told to end: what a shell takes SIGINT for.
const EXIT_INTERRUPTED: u8 = 130;
/// A stage of the worker failed while it served: only a restart helps.
const EXIT_WORKER: u8 = 3;
/// The device failed: a restart helps, perhaps only on another node.
const EXIT_DEVICE: u8 = 4;

/// A job was told to end: the same command goes on.
const EXIT_RESUMABLE: u8 = 5;
/// Too many images of a dataset failed: the same command would end so again.
const EXIT_ERRORS: u8 = 6;

/// Time for a job's own worker to end: its only client is done with it.
const OWN_GRACE: Duration = Duration::from_secs(1);

/// Time for the answers that are left when the worker has failed.
const FAILED_GRACE: Duration = Duration::from_secs(1);

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
    #[command(flatten)]
    Ask(Ask),
    /// Embed a folder of images through a worker and show who looks like whom
    Neighbors(NeighborsConfig),
    /// Embed or classify a dataset of any size: files, WebDataset or Parquet in,
    /// Parquet out; killed at any moment, the same command goes on
    Embed(Box<EmbedArgs>),
    /// Load a worker and measure what it does
    Bench(Box<BenchArgs>),
    /// Check whether this machine can serve, and say what to install
    ///
    /// Looks at CPU, memory, ONNX Runtime, the NVIDIA driver and CUDA's
    /// libraries, and runs a tiny model on each provider. Exit code 0 if a
    /// worker can serve with what was asked for, 1 if not.
    Doctor(DoctorArgs),
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().command {
        Command::Serve(config) => serve(&config),
        Command::Compile(args) => to_stdout(|out| command::run(&args, out)),
        Command::Inspect(args) => to_stdout(|out| command::inspect(&args, out)),
        Command::Ask(command) => ask(&command),
        Command::Neighbors(config) => show_neighbors(&config),
        Command::Embed(args) => embed(&args),
        Command::Bench(args) => run_bench(&args),
        Command::Doctor(args) => diagnose(&args),
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
    let runtime = runtime()?;
    let code = runtime.block_on(async {
        let mut signals = Signals::new()?;
        tokio::select! {
            // Reading and compiling a model takes seconds to minutes.
            started = load_and_start(config) => serve_until(started?, &mut signals, config).await,
            () = signals.recv() => Ok(ExitCode::SUCCESS),
        }
    });
    // A run that does not end must not hold the process.
    runtime.shutdown_background();
    code
}

/// Serves until a signal or a failure, then ends in good order; a second signal
/// ends the process at once.
async fn serve_until(
    mut worker: Worker,
    signals: &mut Signals,
    config: &ServeConfig,
) -> anyhow::Result<ExitCode> {
    tokio::select! {
        () = signals.recv() => {}
        failure = worker.failed() => return Ok(give_up(worker, &failure).await),
    }
    Ok(tokio::select! {
        code = leave(worker, &config.network) => code,
        () = signals.recv() => {
            tracing::error!("ended hard: a second signal");
            ExitCode::FAILURE
        }
    })
}

async fn give_up(worker: Worker, failure: &Failure) -> ExitCode {
    tracing::error!(
        reason = failure.reason,
        "the worker failed; ending so that a restart can help"
    );
    worker.shutdown(FAILED_GRACE).await;
    ExitCode::from(match failure.kind {
        FailureKind::Worker => EXIT_WORKER,
        FailureKind::Device => EXIT_DEVICE,
    })
}

/// Lets load balancers notice, then drains.
async fn leave(mut worker: Worker, network: &NetworkConfig) -> ExitCode {
    let (delay, grace) = (network.shutdown_delay, network.shutdown_grace_period);
    if !delay.is_zero() {
        worker.leave();
        tracing::info!(
            ?delay,
            "not ready any more; serving whoever has not noticed"
        );
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            failure = worker.failed() => return give_up(worker, &failure).await,
        }
    }
    tracing::info!(images = worker.images_in_flight(), ?grace, "draining");
    match worker.shutdown(grace).await {
        Ended::Clean => {
            tracing::info!("ended");
            ExitCode::SUCCESS
        }
        Ended::Hard { calls } => {
            tracing::error!(calls, "ended hard: the grace period ran out");
            ExitCode::FAILURE
        }
    }
}

/// SIGTERM, as Kubernetes sends it, and SIGINT, as a terminal does.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn recv(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

fn ask(command: &Ask) -> anyhow::Result<ExitCode> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::new()?;
        commands::run(command, signals.recv(), &mut std::io::stdout()).await
    });
    // A read that does not end must not hold the process.
    runtime.shutdown_background();
    Ok(match outcome? {
        Outcome::Done => ExitCode::SUCCESS,
        Outcome::Failed => ExitCode::FAILURE,
        Outcome::Interrupted => ExitCode::from(EXIT_INTERRUPTED),
    })
}

fn show_neighbors(config: &NeighborsConfig) -> anyhow::Result<ExitCode> {
    runtime()?.block_on(neighbors::run(config, &mut std::io::stdout()))?;
    Ok(ExitCode::SUCCESS)
}

fn run_bench(args: &BenchArgs) -> anyhow::Result<ExitCode> {
    Ok(match bench::run(args, &mut std::io::stdout())? {
        Verdict::Fine => ExitCode::SUCCESS,
        Verdict::Broken => ExitCode::FAILURE,
    })
}

fn diagnose(args: &DoctorArgs) -> anyhow::Result<ExitCode> {
    Ok(match doctor::run(args, &mut std::io::stdout())? {
        Diagnosis::CanServe => ExitCode::SUCCESS,
        Diagnosis::CannotServe => ExitCode::FAILURE,
    })
}

fn embed(args: &EmbedArgs) -> anyhow::Result<ExitCode> {
    let terminal = Terminal::default();
    imagegpt::telemetry::init_to(&args.log, terminal.clone())?;
    let runtime = runtime()?;
    let ended = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let Some(model) = &args.workers.model else {
            let endpoints = args.workers.endpoints.clone();
            let out = &mut std::io::stdout();
            return dataset::run(args, endpoints, &terminal, signals.recv(), out).await;
        };
        // The same pipeline, with a worker of its own at the other end.
        let config = own_worker(model, &[], args.workers.serve.as_deref())?;
        let worker = tokio::select! {
            worker = load_and_start(&config) => worker?,
            () = signals.recv() => return Ok(JobEnded::Interrupted),
        };
        let endpoints = vec![format!("http://{}", worker.grpc_addr)];
        let out = &mut std::io::stdout();
        let ended = dataset::run(args, endpoints, &terminal, signals.recv(), out).await;
        worker.shutdown(OWN_GRACE).await;
        ended
    });
    // A read that does not end must not hold the process.
    runtime.shutdown_background();
    Ok(match ended? {
        JobEnded::Done => ExitCode::SUCCESS,
        JobEnded::Failed => ExitCode::FAILURE,
        JobEnded::Interrupted => ExitCode::from(EXIT_RESUMABLE),
        JobEnded::TooManyErrors => ExitCode::from(EXIT_ERRORS),
    })
}
