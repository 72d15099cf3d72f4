//! `imagegpt bench`: loads a worker and reports its throughput and latency.
//!
//! Modules: [`flags`] has the command line and its help; `input` makes images;
//! `load` has the closed and the open loop, `arrivals` the times at which calls
//! of the open loop are due, `bulk` a bulk load beside both; `stats` counts;
//! `process` reads /proc; `modes`, `slow`, `soak` and `knee` are the modes;
//! `report` and `plot` show the results. `engine` measures without a worker.
//! Connections are in `crate::client::load`.
//!
//! Promises to the reader of the results: latency counts from the time at which
//! a call was due, refusals are never mixed with answers, and a measurement in
//! which the tool itself was the limit says so.

mod arrivals;
mod bulk;
pub(crate) mod engine;
pub mod flags;
mod input;
mod knee;
mod load;
mod modes;
mod plot;
mod process;
mod progress;
mod random;
mod report;
mod slow;
mod soak;
mod stats;

use std::io::Write;
use std::time::{Duration, SystemTime};

use anyhow::Context as _;
use procfs::{CpuInfo, Current as _, LoadAverage};
use serde_json::{Value, json};
use tokio::sync::watch;

use self::flags::{BenchArgs, Flags, Mode};
use self::load::{Bench, Measurement};
use self::modes::{ModeFindings, Phases};
use crate::files::can_write;
use crate::proto::pb;

/// Most threads of the tool by default. More threads send no more calls; they
/// only take cores from the worker.
const CLIENT_THREADS_MAX: usize = 4;
/// Exit code that a shell reports of a process that SIGINT ended.
const EXIT_INTERRUPTED: i32 = 130;

/// Outcome of a benchmark.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BenchVerdict {
    Fine,
    /// The worker broke a promise; the output says which.
    Broken,
}

/// Runs `imagegpt bench` and writes its tables to `out`.
///
/// Runs on an async runtime of its own, so that no other task delays its calls.
///
/// # Errors
///
/// When flags contradict each other, a worker does not answer, or a file cannot
/// be written.
pub fn run(args: &BenchArgs, out: &mut impl Write) -> anyhow::Result<BenchVerdict> {
    args.validate()?;
    // Files that cannot be written are reported before the measurement, not
    // after it.
    for (flag, path) in [("--json", &args.flags.json), ("--plot", &args.flags.plot)] {
        if let Some(path) = path {
            can_write(path)
                .with_context(|| format!("{flag} {} cannot be written", path.display()))?;
        }
    }
    process::are_there(&args.flags.pids)?;
    if let Mode::Engine(engine_args) = &args.mode {
        engine::run(&args.flags, engine_args, out)?;
        return Ok(BenchVerdict::Fine);
    }
    let n_threads = args.flags.client_threads.map_or_else(
        || {
            let cores = std::thread::available_parallelism().map_or(1, usize::from);
            cores.min(CLIENT_THREADS_MAX)
        },
        usize::from,
    );
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(n_threads)
        .thread_name("bench")
        .enable_all()
        .build()
        .context("the async runtime cannot be started")?;
    let verdict = runtime.block_on(measure(args, n_threads, out));
    // Calls that were abandoned must not keep the process alive.
    runtime.shutdown_background();
    verdict
}

async fn measure(
    args: &BenchArgs,
    n_threads: usize,
    out: &mut impl Write,
) -> anyhow::Result<BenchVerdict> {
    let (stop_in, stop) = watch::channel(false);
    let interrupted = stop.clone();
    tokio::spawn(stop_on_interrupt(stop_in));
    let started = SystemTime::now();
    let mut phases = Phases::new();
    let flags = &args.flags;
    let (model, connections, findings) = match &args.mode {
        Mode::Knee(knee) if let Some(serve) = &knee.serve => {
            let findings = knee::of_settings(flags, knee, serve, &stop, &mut phases).await;
            (None, None, findings)
        }
        mode => {
            let bench = Bench::connect(flags, stop).await?;
            header(&bench, mode, out)?;
            let findings = match mode {
                Mode::Saturate => Ok(modes::saturate(&bench, &mut phases).await),
                Mode::Load(args) => Ok(modes::load(&bench, args, &mut phases).await),
                Mode::Overload(args) => Ok(modes::overload(&bench, args, &mut phases).await),
                Mode::Mixed(args) => modes::mixed(&bench, args, &mut phases).await,
                Mode::SlowReader(args) => slow::run(&bench, args, &mut phases).await,
                Mode::Soak(args) => soak::run(&bench, args).await,
                Mode::Knee(args) => Ok(knee::of_endpoint(&bench, args, &mut phases).await),
                // The mode needs no worker, and `run` has handled it already.
                Mode::Engine(_) => Ok(ModeFindings::default()),
            };
            (Some(bench.model.clone()), Some(bench.lanes.len()), findings)
        }
    };
    // Measurements that were complete before a failure are shown too.
    report::table(&phases, out)?;
    let mut findings = findings?;
    findings
        .broken
        .extend(phases.iter().filter_map(Measurement::broken));
    report::findings(&findings, out)?;
    if let Some(path) = &flags.json {
        let text = serde_json::to_string_pretty(&json!({
            "tool_version": env!("CARGO_PKG_VERSION"),
            "started_unix_seconds": started
                .duration_since(SystemTime::UNIX_EPOCH)
                .unwrap_or_default()
                .as_secs(),
            "machine": machine(),
            "mode": args.mode.name(),
            "interrupted": *interrupted.borrow(),
            "command_line": std::env::args().collect::<Vec<_>>(),
            "flags": flags_row(flags),
            "client_threads": n_threads,
            "connections": connections,
            "model": model.as_ref().map(model_row),
            "measurements": phases,
            "findings": findings.numbers,
            "broken": findings.broken,
        }))?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("--json {} cannot be written", path.display()))?;
    }
    if let Some(path) = &flags.plot {
        draw(path, args.mode.name(), model.as_ref(), &phases, out)?;
    }
    Ok(verdict(&findings))
}

fn verdict(findings: &ModeFindings) -> BenchVerdict {
    if findings.broken.is_empty() {
        BenchVerdict::Fine
    } else {
        BenchVerdict::Broken
    }
}

fn draw(
    path: &std::path::Path,
    mode: &str,
    model: Option<&pb::GetModelResponse>,
    phases: &Phases,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let of = model.map_or_else(String::new, |model| {
        format!(": {} on {}", model.name, model.execution_provider)
    });
    if plot::draw(path, &format!("imagegpt bench {mode}{of}"), phases)? {
        writeln!(out, "wrote {}", path.display())?;
    } else {
        writeln!(out, "--plot: no latency was measured, so nothing was drawn")?;
    }
    Ok(())
}

/// Writes the facts that all results depend on: machine, model and calls.
fn header(bench: &Bench, mode: &Mode, out: &mut impl Write) -> std::io::Result<()> {
    let (model, flags) = (&bench.model, &bench.flags);
    let machine = machine();
    writeln!(
        out,
        "machine: {}, {} threads, load {}",
        machine["cpu"].as_str().unwrap_or("unknown"),
        machine["threads"],
        machine["load_average"].as_str().unwrap_or("unknown")
    )?;
    writeln!(
        out,
        "model: {} ({}), {} dimensions, batches of up to {}, on {}",
        model.name,
        model.digest,
        model.dimension,
        bench.batch_size_max(),
        model.execution_provider
    )?;
    writeln!(
        out,
        "calls: {:?} of {} image{} ({}) over {} connections to {}",
        flags.task,
        flags.images_per_call,
        if flags.images_per_call == 1 { "" } else { "s" },
        bench.input.describe(),
        bench.lanes.len(),
        flags.endpoints.join(", ")
    )?;
    if matches!(mode, Mode::Soak(_)) {
        let time = humantime::format_duration(flags.duration);
        return writeln!(out, "soaking for {time}; every answer is verified");
    }
    writeln!(
        out,
        "measurements of {} after {}; latency counts from when a call was due",
        humantime::format_duration(flags.duration),
        humantime::format_duration(flags.warm_up)
    )
}

/// Ends the run at the first Ctrl-C and shows the results so far; ends the
/// process at once at the second.
async fn stop_on_interrupt(stop: watch::Sender<bool>) {
    if tokio::signal::ctrl_c().await.is_err() {
        // Without a handler, the signal ends the process by itself. The sender
        // is kept alive, because receivers would take its end for a request to
        // stop.
        std::future::pending::<()>().await;
    }
    progress::note("interrupted: showing the results so far; press Ctrl-C again to end at once");
    stop.send_replace(true);
    let _ = tokio::signal::ctrl_c().await;
    std::process::exit(EXIT_INTERRUPTED);
}

fn machine() -> Value {
    let cpus = CpuInfo::current().ok();
    let load = LoadAverage::current().map_or_else(
        |_| String::new(),
        |load| format!("{:.2} {:.2} {:.2}", load.one, load.five, load.fifteen),
    );
    json!({
        "cpu": cpus.as_ref().and_then(|cpus| cpus.model_name(0)),
        "threads": std::thread::available_parallelism().map_or(0, usize::from),
        "kernel": rustix::system::uname().release().to_string_lossy(),
        // Other load on the machine shows in the load average.
        "load_average": load,
    })
}

fn seconds(time: Duration) -> f64 {
    time.as_secs_f64()
}

fn flags_row(flags: &Flags) -> Value {
    json!({
        "endpoints": flags.endpoints,
        "task": flags.task,
        "images_per_call": flags.images_per_call,
        "images": flags.images,
        "repeat_share": flags.repeat_share,
        "connections": flags.connections,
        "callers": flags.callers,
        "in_flight_max": flags.in_flight_max,
        "warm_up_seconds": seconds(flags.warm_up),
        "duration_seconds": seconds(flags.duration),
        "requests": flags.requests,
        "slo_seconds": flags.slo.map(seconds),
        "deadline_seconds": flags.deadline.map(seconds),
        "timeout_seconds": seconds(flags.timeout),
        "priority": flags.priority,
        "retries": flags.retries,
        "constant": flags.constant,
        "seed": flags.seed,
        "pids": flags.pids,
    })
}

fn model_row(model: &pb::GetModelResponse) -> Value {
    let limits = model.limits.unwrap_or_default();
    json!({
        "name": model.name,
        "digest": model.digest,
        "dimension": model.dimension,
        "layers": model.layers,
        "layer_default": model.layer_default,
        "precision": model.precision,
        "positions": model.positions,
        "execution_provider": model.execution_provider,
        "onnxruntime_version": model.onnxruntime_version,
        "worker_version": model.worker_version,
        "notice": model.notice,
        "batch_size_max": limits.batch_size_max,
        "images_in_flight_max": limits.images_in_flight_max,
        "images_per_call_max": limits.images_per_call_max,
        "stream_window_max": limits.stream_window_max,
    })
}
