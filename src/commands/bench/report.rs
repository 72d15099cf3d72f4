//! Report for a person: the table and the lines around it.

use std::io::Write;

use super::load::{LoadShape, Measurement};
use super::modes::ModeFindings;
use super::stats::{CodeCounts, as_f64};
use crate::client::load::CallCode;
use crate::commands::output::columns;

/// Largest tolerated lateness of the tool, as a fraction of the median latency.
/// A tool that sends calls later than this measures itself.
const LATE_SHARE: f64 = 0.1;
/// Lateness in milliseconds that is always tolerated, since the kernel's clock
/// causes it.
const LATE_MS: f64 = 1.0;

/// Formats a time with a sensible number of digits.
pub(super) fn milliseconds(time: f64) -> String {
    format!("{} ms", short(time))
}

/// Formats a rate with a sensible number of digits.
pub(super) fn rate(rate: f64) -> String {
    short(rate)
}

/// Formats a number with at least three significant digits.
pub(super) fn short(number: f64) -> String {
    match number {
        _ if number >= 100.0 => format!("{number:.0}"),
        _ if number >= 10.0 => format!("{number:.1}"),
        _ if number >= 1.0 => format!("{number:.2}"),
        _ => format!("{number:.3}"),
    }
}

/// Table with right-aligned columns; only the first column is left-aligned.
pub(super) struct Table(Vec<Vec<String>>);

impl Table {
    pub(super) fn new(header: &[&str]) -> Self {
        Self(vec![header.iter().map(ToString::to_string).collect()])
    }

    pub(super) fn row(&mut self, cells: Vec<String>) {
        self.0.push(cells);
    }

    pub(super) fn write(&self, out: &mut impl Write) -> std::io::Result<()> {
        columns(self.0.iter().cloned(), |column| column > 0, out)
    }
}

pub(super) const NONE: &str = "-";

/// Writes one row per measurement, and below the rows lines about refusals,
/// lateness and cores.
pub(super) fn table(phases: &[Measurement], out: &mut impl Write) -> std::io::Result<()> {
    if phases.is_empty() {
        return Ok(());
    }
    let header = [
        "measurement",
        "offered",
        "sent",
        "answered",
        "rejected",
        "failed",
        "images/s",
        "goodput",
        "p50 ms",
        "p90",
        "p99",
        "p99.9",
        "max",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for phase in phases {
        let counts = &phase.counts;
        let offered = match phase.shape {
            LoadShape::Closed { .. } => NONE.to_owned(),
            LoadShape::Open {
                offered_images_per_second,
            } => short(offered_images_per_second),
        };
        let mut row = vec![phase.name.clone(), offered];
        row.extend(
            [
                counts.sent,
                counts.answered,
                counts.n_rejected(),
                counts.n_failed(),
            ]
            .map(|count| count.to_string()),
        );
        row.push(short(counts.images_per_second));
        row.push(short(counts.goodput_images_per_second));
        match counts.latency {
            Some(l) => row.extend([l.p50_ms, l.p90_ms, l.p99_ms, l.p99_9_ms, l.max_ms].map(short)),
            None => row.extend([NONE; 5].map(str::to_owned)),
        }
        rows.push(row);
    }
    Table(rows).write(out)?;
    for phase in phases {
        remarks(phase, out)?;
    }
    Ok(())
}

/// Writes the facts about a measurement that its row does not show.
fn remarks(phase: &Measurement, out: &mut impl Write) -> std::io::Result<()> {
    let counts = &phase.counts;
    let mut lines = Vec::new();
    for (code, refused) in counts.rejected.iter().chain(&counts.failed) {
        lines.push(refusals(*code, refused));
    }
    for (code, count) in &counts.images_failed {
        lines.push(format!("{count} images inside answers failed with {code}"));
    }
    if let Some(server) = &phase.server {
        lines.push(format!(
            "server: {:.2} cores, {} requests/s per core, {} images/s per core, memory up to {} \
             MiB{}",
            server.cores,
            short(server.requests_per_second_per_core),
            short(server.images_per_second_per_core),
            server.rss_kib_max / 1024,
            phase.client_cores.map_or_else(String::new, |cores| format!(
                "; this tool: {cores:.2} cores"
            ))
        ));
    }
    if let Some(bulk) = phase.bulk_images_per_second {
        lines.push(format!(
            "bulk load at the same time: {} images/s",
            short(bulk)
        ));
    }
    if let Some(late) = counts.lateness {
        let from_send = counts
            .latency_from_send
            .map_or_else(String::new, |latency| {
                format!(
                    "; from when calls were sent: p50 {} p99 {}",
                    milliseconds(latency.p50_ms),
                    milliseconds(latency.p99_ms)
                )
            });
        let verdict = if is_client_bound(phase) {
            ": THE TOOL OR ITS MACHINE WAS LATE, so these latencies are too long"
        } else {
            ""
        };
        lines.push(format!(
            "the generator was late by p50 {} p99 {} max {}{verdict}{from_send}",
            milliseconds(late.p50_ms),
            milliseconds(late.p99_ms),
            milliseconds(late.max_ms)
        ));
    }
    for (count, what) in [
        (
            counts.unsent,
            "calls were due but not sent, because of the limit on calls in flight (--in-flight-max)",
        ),
        (counts.retries, "retries"),
        (
            counts.abandoned,
            "calls were abandoned when the run was interrupted",
        ),
    ] {
        if count > 0 {
            lines.push(format!("{count} {what}"));
        }
    }
    if phase.is_crowded() {
        lines.push(format!(
            "up to {} calls were in flight on {} connections, which usually carry 200 each, so \
             some waited in this tool; raise --connections",
            counts.in_flight_peak, phase.connections
        ));
    }
    if phase.interrupted {
        lines.push("interrupted".to_owned());
    }
    for line in lines {
        writeln!(out, "  {}: {line}", phase.name)?;
    }
    Ok(())
}

/// True if the tool was so late that the latencies are wrong.
pub(super) fn is_client_bound(phase: &Measurement) -> bool {
    let Some((late, latency)) = phase.counts.lateness.zip(phase.counts.latency) else {
        return false;
    };
    phase.counts.unsent > 0 || late.p99_ms > LATE_MS.max(LATE_SHARE * latency.p50_ms)
}

fn refusals(code: CallCode, refused: &CodeCounts) -> String {
    let latency = refused.latency.map_or_else(String::new, |latency| {
        format!(
            " in p50 {} p99 {} max {}",
            milliseconds(latency.p50_ms),
            milliseconds(latency.p99_ms),
            milliseconds(latency.max_ms)
        )
    });
    let from_send = refused
        .latency_from_send
        .map_or_else(String::new, |latency| {
            format!(" (p99 {} from when sent)", milliseconds(latency.p99_ms))
        });
    let retry = if refused.with_retry_info > 0 {
        format!(
            ", {:.1} % with RetryInfo (up to {})",
            100.0 * as_f64(refused.with_retry_info) / as_f64(refused.calls),
            milliseconds(refused.retry_after_max_ms)
        )
    } else {
        String::new()
    };
    format!(
        "{} {code}{latency}{from_send}{retry}: {:?}",
        refused.calls, refused.message
    )
}

/// Writes the findings of the mode and the promises that were broken.
pub(super) fn findings(findings: &ModeFindings, out: &mut impl Write) -> std::io::Result<()> {
    for line in &findings.lines {
        writeln!(out, "{line}")?;
    }
    for broken in &findings.broken {
        writeln!(out, "BROKEN: {broken}")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_keep_three_digits() {
        for (number, expected) in [
            (0.0, "0.000"),
            (0.1234, "0.123"),
            (1.234, "1.23"),
            (12.34, "12.3"),
            (1234.5, "1234"),
        ] {
            assert_eq!(short(number), expected);
        }
    }

    #[test]
    fn columns_line_up() {
        let mut out = Vec::new();
        let row = |cells: [&str; 2]| cells.map(str::to_owned).to_vec();
        Table(vec![row(["a", "n"]), row(["bcd", "123"])])
            .write(&mut out)
            .unwrap();
        assert_eq!(String::from_utf8(out).unwrap(), "a      n\nbcd  123\n");
    }
}
