//! Modes that consist of plain measurements, with their findings.

use std::sync::Arc;

use serde_json::{Map, Value, json};

use super::bulk::{self, Bulk};
use super::flags::{BulkKind, LoadArgs, MixedArgs, OverloadArgs};
use super::load::{Bench, Measurement};
use super::progress::note;
use super::report::{milliseconds, rate};
use super::stats::{Percentiles, as_f64};
use crate::proto::Priority;

/// Findings of a mode.
#[derive(Debug, Default)]
pub(super) struct ModeFindings {
    /// Lines for a person, printed below the table.
    pub lines: Vec<String>,
    /// Numbers for a program, in `--json`.
    pub numbers: Map<String, Value>,
    /// Promises that the worker broke; with any, the exit code is 1.
    pub broken: Vec<String>,
}

impl ModeFindings {
    pub(super) fn number(&mut self, name: &str, value: impl Into<Value>) {
        self.numbers.insert(name.to_owned(), value.into());
    }

    pub(super) fn line(&mut self, line: String) {
        self.lines.push(line);
    }
}

/// All measurements so far, which an interrupted mode leaves behind.
pub(super) type Phases = Vec<Measurement>;

pub(super) async fn saturate(bench: &Arc<Bench>, phases: &mut Phases) -> ModeFindings {
    let given = bench.flags.callers.iter().copied().map(usize::from);
    let mut callers: Vec<usize> = given.collect();
    if callers.is_empty() {
        callers.push(bench.callers_default());
    }
    for callers in callers {
        if !bench.is_over(phases) {
            let name = format!("saturate, {callers} callers");
            phases.push(bench.closed(&name, callers, None).await);
        }
    }
    let whole = phases.iter().filter(|phase| phase.is_whole());
    let best = whole
        .map(|phase| phase.counts.images_per_second)
        .fold(0.0, f64::max);
    let mut findings = ModeFindings::default();
    if best > 0.0 {
        findings.number("saturation_images_per_second", best);
        findings.line(format!("saturation: {} images/s", rate(best)));
    }
    findings
}

/// Measures the saturation: highest throughput of the worker in images per
/// second; 0 if no worker answered.
pub(super) async fn saturation(bench: &Arc<Bench>, name: &str, phases: &mut Phases) -> f64 {
    let phase = bench.closed(name, bench.callers(), None).await;
    let rate = if phase.is_whole() {
        phase.counts.images_per_second
    } else {
        0.0
    };
    phases.push(phase);
    rate
}

pub(super) async fn load(bench: &Arc<Bench>, args: &LoadArgs, phases: &mut Phases) -> ModeFindings {
    let mut findings = ModeFindings::default();
    let steps: Vec<(String, f64)> = if args.rate.is_empty() {
        let at_most = saturation(bench, "saturation", phases).await;
        if at_most > 0.0 {
            findings.number("saturation_images_per_second", at_most);
        }
        args.of_saturation
            .iter()
            .map(|percent| (format!("{percent} %"), at_most * percent / 100.0))
            .collect()
    } else {
        let named = |&rate: &f64| (format!("{rate} images/s"), rate);
        args.rate.iter().map(named).collect()
    };
    for (name, images_per_second) in steps {
        if bench.is_over(phases) || images_per_second <= 0.0 {
            break;
        }
        let priority = bench.flags.priority;
        let phase = bench.open(&name, images_per_second, priority, None).await;
        phases.push(phase);
    }
    findings
}

pub(super) async fn overload(
    bench: &Arc<Bench>,
    args: &OverloadArgs,
    phases: &mut Phases,
) -> ModeFindings {
    let mut findings = ModeFindings::default();
    let before = saturation(bench, "saturation", phases).await;
    let mut measured = Vec::new();
    for times in &args.times {
        if bench.is_over(phases) || before <= 0.0 {
            break;
        }
        let name = format!("{times} x saturation");
        let priority = bench.flags.priority;
        let phase = bench.open(&name, before * times, priority, None).await;
        measured.push((*times, phase.clone()));
        phases.push(phase);
    }
    if bench.is_over(phases) {
        return findings;
    }
    // On a shared machine the saturation varies, so it is measured before and
    // after.
    let after = saturation(bench, "saturation again", phases).await;
    if bench.is_over(phases) {
        return findings;
    }
    let base = f64::midpoint(before, after);
    findings.number("saturation_images_per_second", base);
    findings.line(format!(
        "saturation: {} images/s before, {} after",
        rate(before),
        rate(after)
    ));
    let mut rows = Vec::new();
    for (times, phase) in &measured {
        let counts = &phase.counts;
        let percent = 100.0 * counts.goodput_images_per_second / base.max(1e-9);
        let rejects = counts.n_rejected();
        let with_retry: u64 = counts
            .rejected
            .values()
            .map(|code| code.with_retry_info)
            .sum();
        let rejected = || counts.rejected.values();
        let p99 = worst_p99(rejected().map(|code| code.latency));
        let p99_from_send = worst_p99(rejected().map(|code| code.latency_from_send));
        let retry_percent = 100.0 * as_f64(with_retry) / as_f64(rejects).max(1.0);
        let refused = match p99 {
            Some(p99) => format!(
                "{rejects} rejects in p99 {} ({} from when they were sent), {retry_percent:.1} % \
                 with RetryInfo",
                milliseconds(p99),
                p99_from_send.map_or_else(|| "?".to_owned(), milliseconds)
            ),
            None if *times > 1.0 => {
                "no rejects: the worker's queue was still filling; use a longer --warm-up"
                    .to_owned()
            }
            None => "no rejects".to_owned(),
        };
        findings.line(format!(
            "at {times} x: goodput {percent:.1} % of saturation; {refused}"
        ));
        rows.push(json!({
            "times": times,
            "goodput_percent_of_saturation": percent,
            "rejects": rejects,
            "reject_p99_ms": p99,
            "reject_p99_from_send_ms": p99_from_send,
            "rejects_with_retry_info_percent": (rejects > 0).then_some(retry_percent),
        }));
    }
    findings.number("overload", rows);
    findings
}

/// Returns the largest 99th percentile over all codes.
fn worst_p99(latencies: impl Iterator<Item = Option<Percentiles>>) -> Option<f64> {
    let p99s = latencies.flatten().map(|latency| latency.p99_ms);
    p99s.fold(None, |worst: Option<f64>, p99| {
        Some(worst.map_or(p99, |worst| worst.max(p99)))
    })
}

pub(super) async fn mixed(
    bench: &Arc<Bench>,
    args: &MixedArgs,
    phases: &mut Phases,
) -> anyhow::Result<ModeFindings> {
    let mut findings = ModeFindings::default();
    let kind = match args.bulk {
        BulkKind::Stream if !has_streams(bench).await? => {
            note("the worker does not serve EmbedStream; the bulk load consists of plain calls");
            BulkKind::Unary
        }
        kind => kind,
    };
    let at_most = saturation(bench, "saturation", phases).await;
    let interactive = args.rate.unwrap_or(at_most * args.of_saturation / 100.0);
    if bench.is_over(phases) || interactive <= 0.0 {
        return Ok(findings);
    }
    let priority = Some(Priority::Interactive);
    let alone = bench
        .open("interactive alone", interactive, priority, None)
        .await;
    phases.push(alone.clone());
    if bench.is_over(phases) {
        return Ok(findings);
    }
    let bulk = Bulk::start(bench, kind, args.bulk_clients);
    let beside = bench
        .open(
            "interactive beside bulk",
            interactive,
            priority,
            Some(&bulk.answered),
        )
        .await;
    let (kind, clients) = (bulk.kind, bulk.clients);
    phases.push(beside.clone());
    if let Some(refusal) = bulk.end().await {
        findings.line(format!(
            "a bulk client ended early ({refusal}), so the bulk rate is too low"
        ));
        findings.number("bulk_ended", refusal.to_string());
    }
    if beside.worker_gone {
        return Ok(findings);
    }

    let bulk_rate = beside.bulk_images_per_second.unwrap_or(0.0);
    let left = at_most - beside.counts.images_per_second;
    let share = 100.0 * bulk_rate / left.max(1e-9);
    let batch_ms = 1e3 * as_f64(bench.batch_size_max() as u64) * as_f64(bench.n_endpoints() as u64)
        / at_most.max(1e-9);
    findings.number("saturation_images_per_second", at_most);
    findings.number("bulk_kind", json!(kind));
    findings.number("bulk_clients", clients);
    findings.number("bulk_images_per_second", bulk_rate);
    findings.number("bulk_percent_of_what_was_left", share);
    findings.number("full_batch_ms", batch_ms);
    findings.number("interactive_p99_alone_ms", alone.counts.p99_ms());
    findings.number("interactive_p99_beside_bulk_ms", beside.counts.p99_ms());
    if let Some((alone, beside)) = alone.counts.p99_ms().zip(beside.counts.p99_ms()) {
        let allowed = 1.2 * alone + batch_ms;
        findings.number("interactive_p99_allowed_ms", allowed);
        findings.line(format!(
            "interactive p99: {} alone, {} beside bulk; 20 % more plus one full batch ({}, batch \
             size divided by saturation) is {}",
            milliseconds(alone),
            milliseconds(beside),
            milliseconds(batch_ms),
            milliseconds(allowed)
        ));
    }
    findings.line(format!(
        "bulk: {} images/s, {share:.1} % of the remaining capacity (saturation {} minus \
         interactive {})",
        rate(bulk_rate),
        rate(at_most),
        rate(beside.counts.images_per_second)
    ));
    Ok(findings)
}

/// Returns true if the worker serves EmbedStream.
pub(super) async fn has_streams(bench: &Bench) -> anyhow::Result<bool> {
    bulk::has_streams(bench)
        .await
        .map_err(|refusal| anyhow::anyhow!("EmbedStream cannot be opened: {refusal}"))
}
