//! The program's process: commands, signals, graceful shutdown and exit codes.

use std::io::{ErrorKind, Read, Write as _};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use imagegpt::commands::bench::BenchVerdict;
use imagegpt::commands::bench::flags::BenchArgs;
use imagegpt::commands::cli::{Cli, CliCommand, exit};
use imagegpt::commands::doctor::{Diagnosis, DoctorArgs};
use imagegpt::commands::embed::flags::EmbedArgs;
use imagegpt::commands::embed::{JobEnded, Terminal};
use imagegpt::commands::loss::exit_code;
use imagegpt::commands::print::{Printer, Unread};
use imagegpt::commands::probe::flags::ProbeCommand;
use imagegpt::commands::serve::{OwnWorker, is_ready, start};
use imagegpt::commands::{
    self, CommandOutcome, ImageCommand, bench, compile, completions, doctor, embed, environment,
    probe,
};
use imagegpt::serve::config::{NetworkConfig, ServeConfig};
use imagegpt::serve::devices::{FailureKind, WorkerFailure};
use imagegpt::serve::worker::{Worker, WorkerEnded};
use imagegpt::telemetry;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;

/// Time within which a second signal counts as the same request: `timeout` and
/// process managers send one signal to the process and one to its process
/// group.
const SAME_REQUEST: Duration = Duration::from_secs(1);

/// Interval between reads of a standard input that does not block.
const STDIN_POLL: Duration = Duration::from_millis(100);

/// Grace period for the remaining answers after the worker has failed.
const FAILED_GRACE: Duration = Duration::from_secs(1);

fn main() {
    let command = Cli::try_from_args(std::env::args_os().collect())
        .unwrap_or_else(|message| explain(&message))
        .command;
    if command.warns_on_stderr() {
        environment::print_unknown_variables();
    }
    let outcome = match command {
        CliCommand::Serve(config) => serve(&config),
        CliCommand::Compile(args) => to_stdout(|out| compile::run(&args, out)),
        CliCommand::Inspect(args) => to_stdout(|out| compile::inspect(&args, out)),
        CliCommand::Image(command) => ask(&command),
        CliCommand::Embed(args) => embed(&args),
        CliCommand::Probe(command) => run_probe(&command),
        CliCommand::Bench(args) => run_bench(&args),
        CliCommand::Doctor(args) => diagnose(&args),
        CliCommand::Completions(args) => to_stdout(|out| completions::run(&args, out)),
        CliCommand::Man(args) => to_stdout(|out| completions::man(&args, out)),
    };
    // All output has been written, and its errors reported: every line is
    // written as soon as it ends.
    let code = match outcome {
        Ok(code) => {
            telemetry::end(None);
            code
        }
        Err(error) => {
            telemetry::end(Some(&format!("{error:#}")));
            exit_code(&error)
        }
    };
    // Ends the process without the exit handlers of C and C++ libraries: a
    // thread may still run the model, and its runtime would be torn down during
    // that run.
    signal_hook::low_level::exit(code);
}

/// Prints the help, the version or the error in the flags, and ends the
/// process.
fn explain(message: &clap::Error) -> ! {
    let printed = message.print().and_then(|()| std::io::stdout().flush());
    let code = match printed {
        Err(error) if !message.use_stderr() && error.kind() != ErrorKind::BrokenPipe => {
            telemetry::end(Some(&format!("standard output cannot be written: {error}")));
            exit::USAGE
        }
        // Wrong flags have their exit code even if the message could not be
        // printed.
        _ => message.exit_code(),
    };
    signal_hook::low_level::exit(code);
}

fn to_stdout(
    command: impl FnOnce(&mut Printer<std::io::Stdout>) -> anyhow::Result<()>,
) -> anyhow::Result<i32> {
    command(&mut Printer::stdout(Unread::GoesOn))?;
    Ok(exit::DONE)
}

fn runtime() -> anyhow::Result<tokio::runtime::Runtime> {
    tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()
        .context("the async runtime cannot be started")
}

fn serve(config: &ServeConfig) -> anyhow::Result<i32> {
    // First the log, in whose format errors are told.
    telemetry::init(&config.log)?;
    environment::log_unknown_variables();
    config.validate()?;
    let runtime = runtime()?;
    let code = runtime.block_on(async {
        let mut signals = Signals::new()?;
        if config.network.exit_on_stdin_eof {
            signals.stdin_end = Some(end_of(std::io::stdin())?);
        }
        let mut worker = tokio::select! {
            biased;
            worker = start(config) => worker?,
            // A signal must end this wait: reading and compiling a model takes
            // seconds to minutes.
            () = signals.recv() => return Ok(exit::DONE),
        };
        tokio::select! {
            biased;
            ready = is_ready(&mut worker) => ready?,
            // A worker that became ready a moment ago may have calls, so it
            // shuts down gracefully.
            () = signals.recv() => return Ok(match worker.readiness().get() {
                Ok(_) => end(worker, &mut signals, config).await,
                Err(_) => exit::DONE,
            }),
        }
        Ok(serve_until(worker, &mut signals, config).await)
    });
    // A run of the model that does not end must not keep the process alive.
    runtime.shutdown_background();
    code
}

/// Serves until a signal or a failure, then shuts down.
async fn serve_until(mut worker: Worker, signals: &mut Signals, config: &ServeConfig) -> i32 {
    tokio::select! {
        () = signals.recv() => end(worker, signals, config).await,
        failure = worker.failed() => give_up(worker, &failure).await,
    }
}

/// Shuts down gracefully. Another signal, [`SAME_REQUEST`] after the first or
/// later, ends the process at once.
async fn end(worker: Worker, signals: &mut Signals, config: &ServeConfig) -> i32 {
    tokio::select! {
        code = leave(worker, &config.network) => code,
        () = signals.another() => {
            tracing::error!("forced shutdown: a second signal arrived");
            exit::FAILED
        }
    }
}

async fn give_up(worker: Worker, failure: &WorkerFailure) -> i32 {
    tracing::error!(
        reason = failure.reason,
        "the worker failed; the process ends, and a restart may help"
    );
    worker.shutdown(FAILED_GRACE).await;
    match failure.kind {
        FailureKind::Worker => exit::WORKER,
        FailureKind::Device => exit::DEVICE,
    }
}

/// Waits until load balancers have noticed that the worker is not ready, then
/// drains.
async fn leave(mut worker: Worker, network: &NetworkConfig) -> i32 {
    let (delay, grace) = (network.shutdown_delay, network.shutdown_grace_period);
    if !delay.is_zero() {
        worker.leave();
        tracing::info!(
            ?delay,
            "shutting down; still serving calls until load balancers have noticed"
        );
        tokio::select! {
            () = tokio::time::sleep(delay) => {}
            failure = worker.failed() => return give_up(worker, &failure).await,
        }
    }
    tracing::info!(images = worker.images_in_flight(), ?grace, "draining");
    match worker.shutdown(grace).await {
        WorkerEnded::Clean => {
            tracing::info!("shutdown complete");
            exit::DONE
        }
        WorkerEnded::Hard { calls } => {
            tracing::error!(calls, "forced shutdown: the grace period ran out");
            exit::FAILED
        }
    }
}

/// Requests to end the process: SIGTERM, which Kubernetes sends, SIGINT, which
/// a terminal sends, and on demand the end of standard input.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
    /// Resolves when standard input ends; `None` if nobody waits for that, or
    /// after it.
    stdin_end: Option<oneshot::Receiver<()>>,
}

impl Signals {
    fn new() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            stdin_end: None,
        })
    }

    /// Waits for the first request.
    async fn recv(&mut self) {
        let stdin_end = async {
            match &mut self.stdin_end {
                // An error would mean that the reader is gone.
                Some(ended) => _ = ended.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
            () = stdin_end => {
                tracing::info!("standard input has ended (--exit-on-stdin-eof)");
                self.stdin_end = None;
            }
        }
    }

    /// Waits, after a first request, for a signal that is a separate request.
    /// The end of standard input is none: a program that sends a signal to its
    /// worker often closes the worker's input, or ends, while the worker
    /// drains.
    async fn another(&mut self) {
        self.stdin_end = None;
        let first = Instant::now();
        loop {
            self.recv().await;
            if first.elapsed() >= SAME_REQUEST {
                return;
            }
        }
    }
}

/// Reads `input` to its end in a thread of its own, since a read of a pipe
/// blocks, and tells when it is there. An input that cannot be read has ended.
fn end_of(mut input: impl Read + Send + 'static) -> std::io::Result<oneshot::Receiver<()>> {
    let (ended, end) = oneshot::channel();
    std::thread::Builder::new()
        .name("stdin".to_owned())
        .spawn(move || {
            // The bytes mean nothing, and each read overwrites those before.
            let mut buffer = [0; 4096];
            loop {
                match input.read(&mut buffer) {
                    Ok(1..) => {}
                    Err(error) if error.kind() == ErrorKind::Interrupted => {}
                    // The program at the other end may have made the pipe
                    // non-blocking.
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {
                        std::thread::sleep(STDIN_POLL);
                    }
                    Ok(0) | Err(_) => break,
                }
            }
            // Nobody waits any more once the process shuts down.
            let _ = ended.send(());
        })?;
    Ok(end)
}

fn ask(command: &ImageCommand) -> anyhow::Result<i32> {
    let runtime = runtime()?;
    let outcome = runtime.block_on(async {
        let mut signals = Signals::new()?;
        let out = &mut Printer::stdout(Unread::Ends);
        commands::run(command, signals.recv(), out).await
    });
    // A read that does not end must not keep the process alive.
    runtime.shutdown_background();
    Ok(match outcome? {
        CommandOutcome::Done => exit::DONE,
        CommandOutcome::Failed => exit::FAILED,
        CommandOutcome::Interrupted => exit::INTERRUPTED,
    })
}

fn run_bench(args: &BenchArgs) -> anyhow::Result<i32> {
    Ok(
        match bench::run(args, &mut Printer::stdout(Unread::GoesOn))? {
            BenchVerdict::Fine => exit::DONE,
            BenchVerdict::Broken => exit::FAILED,
        },
    )
}

fn diagnose(args: &DoctorArgs) -> anyhow::Result<i32> {
    Ok(
        match doctor::run(args, &mut Printer::stdout(Unread::GoesOn))? {
            Diagnosis::CanServe => exit::DONE,
            Diagnosis::CannotServe => exit::FAILED,
        },
    )
}

fn embed(args: &EmbedArgs) -> anyhow::Result<i32> {
    let terminal = Terminal::default();
    telemetry::init_to(&args.log, terminal.clone())?;
    environment::log_unknown_variables();
    let runtime = runtime()?;
    let mut out = Printer::stdout(Unread::GoesOn);
    let ended = runtime.block_on(async {
        if let Some(ended) = embed::check(args).await? {
            return Ok(ended);
        }
        let mut signals = Signals::new()?;
        let mut config = args.workers.own.config(&[])?;
        let mut own = None;
        // With --model, the same pipeline asks a worker in this process.
        let endpoints = async {
            let Some(config) = &mut config else {
                return Ok(args.workers.endpoints.clone());
            };
            config.model.needs = Some(args.needs());
            let started = OwnWorker::start(config, std::future::pending()).await?;
            let worker = started.context("the worker ended before it was ready")?;
            let endpoint = worker.endpoint();
            own = Some(worker);
            Ok(vec![endpoint])
        };
        let ended = embed::run(args, endpoints, &terminal, signals.recv(), &mut out).await;
        if let Some(worker) = own {
            worker.end().await;
        }
        ended
    });
    // A read that does not end must not keep the process alive.
    runtime.shutdown_background();
    Ok(job_code(ended?, &out))
}

/// Exit code of a command that runs jobs.
fn job_code(ended: JobEnded, out: &Printer<std::io::Stdout>) -> i32 {
    match ended {
        // The output is complete except for the printed summary; the same
        // command prints the summary again.
        JobEnded::Done if out.has_failed() => exit::FAILED,
        JobEnded::Done => exit::DONE,
        JobEnded::Failed => exit::FAILED,
        JobEnded::Interrupted => exit::RESUMABLE,
        JobEnded::TooManyErrors => exit::ERRORS,
    }
}

fn run_probe(command: &ProbeCommand) -> anyhow::Result<i32> {
    let terminal = Terminal::default();
    telemetry::init_to(command.log(), terminal.clone())?;
    environment::log_unknown_variables();
    let runtime = runtime()?;
    let mut out = Printer::stdout(Unread::GoesOn);
    let ended = runtime.block_on(async {
        let mut signals = Signals::new()?;
        probe::run(command, &terminal, signals.recv(), &mut out).await
    });
    runtime.shutdown_background();
    Ok(job_code(ended?, &out))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use imagegpt::commands::serve::own_config;
    use imagegpt::engine::fake::{FakeEngine, Script};
    use imagegpt::engine::{Engine, EngineFactory};
    use imagegpt::model::Model;
    use imagegpt::proto::pb;
    use imagegpt::proto::pb::image_gpt_service_client::ImageGptServiceClient;
    use imagegpt::serve::devices::DeviceEngine;
    use imagegpt::serve::heads::StartHeads;

    use super::*;

    /// Exit code of a process whose engine meets a row that begins with a 3.
    async fn code_after(script: Script) -> i32 {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro");
        let config = own_config(dir.to_str().unwrap(), &[], None).unwrap();
        let factory: EngineFactory =
            Box::new(|| Ok(Box::new(FakeEngine::new(script)) as Box<dyn Engine>));
        let engines = vec![DeviceEngine { id: 0, factory }];
        let model = Model::open(&dir, None).unwrap();
        let mut worker = Worker::start(&config, model, StartHeads::default(), engines)
            .await
            .unwrap();
        worker.ready().await.unwrap();
        let url = format!("http://{}", worker.grpc_addr);
        let mut client = ImageGptServiceClient::connect(url).await.unwrap();
        let tokens = pb::Tokens { ids: vec![3; 64] };
        let request = pb::EmbedRequest {
            images: vec![pb::Image {
                source: Some(pb::image::Source::Tokens(tokens)),
            }],
            ..Default::default()
        };
        let mut signals = Signals::new().unwrap();
        let ended = serve_until(worker, &mut signals, &config);
        let (code, _) = tokio::join!(ended, client.embed(request));
        code
    }

    #[tokio::test]
    async fn a_failed_device_and_a_failed_worker_have_codes_of_their_own() {
        let device = Script {
            device_fails_on: Some(3),
            ..Default::default()
        };
        assert_eq!(code_after(device).await, exit::DEVICE);
        let panics = Script {
            panic_on: Some(3),
            ..Default::default()
        };
        assert_eq!(code_after(panics).await, exit::WORKER);
    }
}
