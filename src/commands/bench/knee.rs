//! The knee: highest load at which 99 % of calls are answered within a given
//! time, and the flags that raise it.
//!
//! The search halves an interval and assumes that latency rises with load.
//! Where noise of the machine breaks this assumption, the result is one of
//! several possible. Every measurement is in the table, so that a reader can
//! judge the result.

use std::net::{Ipv4Addr, TcpListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::json;
use tokio::sync::watch;

use super::flags::{Flags, KneeArgs};
use super::load::{Bench, Measurement};
use super::modes::{ModeFindings, Phases, saturation};
use super::report::{milliseconds, rate};
use super::stats::as_f64;
use crate::client::ConnectConfig;
use crate::client::load::LoadConnection;

/// The search ends when the interval is this fraction of the saturation.
const RESOLUTION: f64 = 0.05;
/// Largest fraction of calls that may be refused, since percentiles do not
/// include refused calls: one in a thousand.
const REFUSED_MAX: f64 = 0.001;
/// Settings whose knee is within this fraction of the best count as equally
/// good.
const TIE: f64 = 0.03;
/// Time until a started worker must be ready; the model may have to be
/// downloaded and compiled first.
const READY_WITHIN: Duration = Duration::from_mins(10);
const READY_INTERVAL: Duration = Duration::from_millis(100);

/// A load that was tried.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub(super) struct Point {
    /// Load as a fraction of the saturation.
    share: f64,
    meets: bool,
}

/// Returns the fraction of the saturation to try next, or `None` when the knee
/// is known.
pub(super) fn next_share(points: &[Point]) -> Option<f64> {
    let good = points.iter().filter(|point| point.meets);
    let bad = points.iter().filter(|point| !point.meets);
    let high = bad.map(|point| point.share).fold(1.0, f64::min);
    // A load that met the target above a load that missed the target was luck.
    let low = good
        .map(|point| point.share)
        .filter(|&share| share < high)
        .fold(0.0, f64::max);
    (high - low > RESOLUTION).then(|| f64::midpoint(low, high))
}

/// Setting of a worker, with the results of its measurements.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Setting {
    max_batch_size: u16,
    max_queue_delay: Duration,
    saturation_images_per_second: f64,
    /// Highest rate that met the target; 0 if no load did.
    knee_images_per_second: f64,
    p99_ms: Option<f64>,
}

/// Returns the setting with the highest knee. Among equally good settings, the
/// smallest batch wins, then the shortest delay, since both only add latency.
pub(super) fn recommend(settings: &[Setting]) -> Option<&Setting> {
    let knees = settings.iter().map(|s| s.knee_images_per_second);
    let best = knees.fold(0.0, f64::max);
    settings
        .iter()
        .filter(|s| best > 0.0 && s.knee_images_per_second >= best * (1.0 - TIE))
        .min_by_key(|s| (s.max_batch_size, s.max_queue_delay))
}

/// Finds the knee of a running worker.
pub(super) async fn of_endpoint(
    bench: &Arc<Bench>,
    args: &KneeArgs,
    phases: &mut Phases,
) -> ModeFindings {
    let mut findings = ModeFindings::default();
    let found = find(bench, "", args.p99, phases).await;
    if phases.iter().any(|phase| phase.worker_gone) {
        return findings;
    }
    findings.number("p99_target_ms", 1e3 * args.p99.as_secs_f64());
    findings.number("saturation_images_per_second", found.saturation);
    findings.number("knee_images_per_second", found.knee);
    findings.number("p99_at_knee_ms", found.p99_ms);
    findings.line(found.sentence(args.p99));
    findings
}

struct Found {
    saturation: f64,
    knee: f64,
    p99_ms: Option<f64>,
}

impl Found {
    fn sentence(&self, target: Duration) -> String {
        let target = milliseconds(1e3 * target.as_secs_f64());
        match self.p99_ms {
            Some(p99) => format!(
                "p99 stays within {target} up to {} images/s (p99 {}), {:.0} % of saturation {}",
                rate(self.knee),
                milliseconds(p99),
                100.0 * self.knee / self.saturation.max(1e-9),
                rate(self.saturation)
            ),
            None => format!(
                "p99 exceeds {target} at every load that was tried, down to {:.0} % of \
                 saturation {}",
                100.0 * RESOLUTION,
                rate(self.saturation)
            ),
        }
    }
}

async fn find(bench: &Arc<Bench>, prefix: &str, target: Duration, phases: &mut Phases) -> Found {
    let at_most = saturation(bench, &format!("{prefix}saturation"), phases).await;
    let mut found = Found {
        saturation: at_most,
        knee: 0.0,
        p99_ms: None,
    };
    let mut points = Vec::new();
    while let Some(share) = next_share(&points) {
        if bench.is_over(phases) || at_most <= 0.0 {
            break;
        }
        let name = format!("{prefix}{:.1} %", 100.0 * share);
        let priority = bench.flags.priority;
        let phase = bench.open(&name, share * at_most, priority, None).await;
        let meets = meets(&phase, target);
        if meets && share * at_most > found.knee {
            found.knee = share * at_most;
            found.p99_ms = phase.counts.p99_ms();
        }
        points.push(Point { share, meets });
        phases.push(phase);
    }
    found
}

fn meets(phase: &Measurement, target: Duration) -> bool {
    let counts = &phase.counts;
    let refused = counts.n_rejected() + counts.n_failed() + counts.unsent;
    let p99 = counts.p99_ms();
    !phase.interrupted
        && p99.is_some_and(|p99| p99 <= 1e3 * target.as_secs_f64())
        && as_f64(refused) <= REFUSED_MAX * as_f64(counts.sent)
}

/// Finds the knee of each setting, with workers that are started here one after
/// the other.
pub(super) async fn of_settings(
    flags: &Flags,
    args: &KneeArgs,
    serve: &str,
    stop: &watch::Receiver<bool>,
    phases: &mut Phases,
) -> anyhow::Result<ModeFindings> {
    let program = match &args.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().context("this program's path is unknown")?,
    };
    let mut findings = ModeFindings::default();
    let mut settings = Vec::new();
    for &max_batch_size in &args.batch_sizes {
        for &max_queue_delay in &args.queue_delays {
            if *stop.borrow() {
                break;
            }
            let delay = humantime::format_duration(max_queue_delay);
            let mut worker = Served::start(&program, serve, max_batch_size, max_queue_delay)?;
            worker.ready(stop).await?;
            let flags = Flags {
                endpoints: vec![worker.endpoint.clone()],
                pids: vec![worker.child.id()],
                ..flags.clone()
            };
            let bench = Bench::connect(&flags, stop.clone()).await?;
            let prefix = format!("batch {max_batch_size}, delay {delay}: ");
            let found = find(&bench, &prefix, args.p99, phases).await;
            if bench.is_over(phases) {
                break;
            }
            findings.line(format!("{prefix}{}", found.sentence(args.p99)));
            settings.push(Setting {
                max_batch_size,
                max_queue_delay,
                saturation_images_per_second: found.saturation,
                knee_images_per_second: found.knee,
                p99_ms: found.p99_ms,
            });
        }
    }
    findings.number("p99_target_ms", 1e3 * args.p99.as_secs_f64());
    findings.number("serve", serve);
    let rows = settings.iter().map(setting_row);
    findings.number("settings", rows.collect::<Vec<_>>());
    match recommend(&settings) {
        Some(best) => {
            findings.number("recommended", setting_row(best));
            findings.line(format!(
                "recommended: --max-batch-size {} --max-queue-delay {} ({} images/s at p99 {})",
                best.max_batch_size,
                humantime::format_duration(best.max_queue_delay),
                rate(best.knee_images_per_second),
                best.p99_ms.map_or_else(|| "?".to_owned(), milliseconds)
            ));
        }
        None => findings.line("no setting met the target at any load that was tried".to_owned()),
    }
    Ok(findings)
}

fn setting_row(setting: &Setting) -> serde_json::Value {
    json!({
        "max_batch_size": setting.max_batch_size,
        "max_queue_delay_ms": 1e3 * setting.max_queue_delay.as_secs_f64(),
        "saturation_images_per_second": setting.saturation_images_per_second,
        "knee_images_per_second": setting.knee_images_per_second,
        "p99_at_knee_ms": setting.p99_ms,
    })
}

/// A worker process that ends when this value is dropped.
struct Served {
    child: Child,
    endpoint: String,
    log: PathBuf,
}

impl Served {
    fn start(
        program: &Path,
        serve: &str,
        max_batch_size: u16,
        max_queue_delay: Duration,
    ) -> anyhow::Result<Self> {
        // The port is free now. If another process takes it before the worker
        // does, the worker's log reports the conflict.
        let port = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
            .and_then(|listener| listener.local_addr())
            .context("there is no free port on 127.0.0.1")?
            .port();
        let log = std::env::temp_dir().join(format!("imagegpt-knee-{port}.log"));
        let to_log = std::fs::File::create(&log)
            .with_context(|| format!("{} cannot be written", log.display()))?;
        let child = Command::new(program)
            .arg("serve")
            .args(serve.split_whitespace())
            .args(["--listen", &format!("127.0.0.1:{port}")])
            .args(["--metrics-listen", "127.0.0.1:0"])
            .args(["--max-batch-size", &max_batch_size.to_string()])
            .arg("--max-queue-delay")
            .arg(humantime::format_duration(max_queue_delay).to_string())
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(to_log)
            .spawn()
            .with_context(|| format!("{} cannot be started", program.display()))?;
        Ok(Self {
            child,
            endpoint: format!("http://127.0.0.1:{port}"),
            log,
        })
    }

    async fn ready(&mut self, stop: &watch::Receiver<bool>) -> anyhow::Result<()> {
        let started = Instant::now();
        loop {
            // The worker listens on loopback and is asked without TLS and
            // tokens.
            let connect = ConnectConfig::default();
            if let Ok(lane) = LoadConnection::connect(&self.endpoint, &connect, None).await
                && lane.model().await.is_ok()
            {
                return Ok(());
            }
            let is_gone = !matches!(self.child.try_wait(), Ok(None));
            anyhow::ensure!(
                !is_gone && started.elapsed() < READY_WITHIN && !*stop.borrow(),
                "--serve: the worker did not become ready; the end of its log:\n{}",
                self.log_end()
            );
            tokio::time::sleep(READY_INTERVAL).await;
        }
    }

    fn log_end(&self) -> String {
        let log = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().collect();
        lines[lines.len().saturating_sub(5)..].join("\n")
    }
}

impl Drop for Served {
    fn drop(&mut self) {
        // The worker has no callers left, so killing it loses nothing.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = std::fs::remove_file(&self.log);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Searches the knee of a worker whose latency is that of a queue: 1 ms of
    /// service, and more the closer the load is to saturation.
    fn knee(target_ms: f64) -> (f64, usize) {
        let mut points = Vec::new();
        while let Some(share) = next_share(&points) {
            let latency_ms = 1.0 / (1.0 - share);
            points.push(Point {
                share,
                meets: latency_ms <= target_ms,
            });
        }
        let good = points.iter().filter(|point| point.meets);
        (
            good.map(|point| point.share).fold(0.0, f64::max),
            points.len(),
        )
    }

    #[test]
    fn the_knee_of_a_queue_is_found() {
        for (target_ms, expected) in [(2.0, 0.5), (4.0, 0.75), (10.0, 0.9), (100.0, 0.99)] {
            let (found, tries) = knee(target_ms);
            assert!(
                found <= expected && expected - found <= RESOLUTION,
                "{target_ms} ms: {found}"
            );
            assert!(tries <= 6, "{tries}");
        }
        // A target below the latency of an idle worker.
        let (found, tries) = knee(0.5);
        assert!(found < 1e-9 && tries <= 6);
    }

    #[test]
    fn luck_above_a_failure_does_not_count() {
        let point = |share, meets| Point { share, meets };
        let points = [point(0.5, false), point(0.75, true), point(0.48, true)];
        assert_eq!(next_share(&points), None);
    }

    #[test]
    fn ties_go_to_the_smaller_setting() {
        let setting = |max_batch_size, delay_ms, knee| Setting {
            max_batch_size,
            max_queue_delay: Duration::from_millis(delay_ms),
            saturation_images_per_second: 100.0,
            knee_images_per_second: knee,
            p99_ms: Some(1.0),
        };
        let check = |settings: &[Setting], expected: Option<(u16, u64)>| {
            let got = recommend(settings).map(|s| (s.max_batch_size, s.max_queue_delay));
            let expected = expected.map(|(size, ms)| (size, Duration::from_millis(ms)));
            assert_eq!(got, expected);
        };
        check(&[], None);
        check(&[setting(1, 0, 0.0)], None);
        check(
            &[
                setting(8, 0, 100.0),
                setting(4, 2, 98.0),
                setting(4, 0, 97.5),
                setting(1, 0, 50.0),
            ],
            Some((4, 0)),
        );
    }
}
