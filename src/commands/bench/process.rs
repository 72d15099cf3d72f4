//! Resource use of the worker's processes, read from /proc.

use std::time::{Duration, Instant};

use procfs::process::Process;
use serde::Serialize;

use super::stats::as_f64;

/// Resource use of the processes at one moment, summed over all.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct ProcessUsage {
    #[serde(skip)]
    pub at: Instant,
    /// CPU time since each process began.
    pub cpu_seconds: f64,
    pub rss_kib: u64,
    pub threads: u64,
    /// Open file descriptors; `None` without permission to count them.
    pub file_descriptors: Option<u64>,
}

/// Reads the current resource use; `None` if there are no processes or one has
/// ended.
#[must_use]
pub(super) fn usage(pids: &[u32]) -> Option<ProcessUsage> {
    let mut sum: Option<ProcessUsage> = None;
    for pid in pids {
        let one = usage_of(&Process::new(i32::try_from(*pid).ok()?).ok()?)?;
        sum = Some(match sum {
            None => one,
            Some(sum) => ProcessUsage {
                at: sum.at,
                cpu_seconds: sum.cpu_seconds + one.cpu_seconds,
                rss_kib: sum.rss_kib + one.rss_kib,
                threads: sum.threads + one.threads,
                file_descriptors: sum
                    .file_descriptors
                    .zip(one.file_descriptors)
                    .map(|(a, b)| a + b),
            },
        });
    }
    sum
}

/// Checks that each process exists.
///
/// # Errors
///
/// Names the first process that does not exist.
pub(super) fn are_there(pids: &[u32]) -> anyhow::Result<()> {
    for pid in pids {
        anyhow::ensure!(
            usage(&[*pid]).is_some(),
            "--pid {pid}: there is no such process on this machine"
        );
    }
    Ok(())
}

/// CPU seconds of the tool itself.
pub(super) fn own_cpu_seconds() -> Option<f64> {
    Some(usage_of(&Process::myself().ok()?)?.cpu_seconds)
}

fn usage_of(process: &Process) -> Option<ProcessUsage> {
    let (stat, status) = (process.stat().ok()?, process.status().ok()?);
    Some(ProcessUsage {
        at: Instant::now(),
        cpu_seconds: as_f64(stat.utime + stat.stime) / as_f64(procfs::ticks_per_second()),
        rss_kib: status.vmrss?,
        threads: status.threads,
        file_descriptors: process.fd_count().ok().map(|count| count as u64),
    })
}

/// Slope of the least-squares line through points (x, y); `None` if all points
/// have the same x.
#[must_use]
pub(super) fn slope(points: &[(f64, f64)]) -> Option<f64> {
    let n = points.iter().fold(0.0, |n, _| n + 1.0);
    let mean_x = points.iter().map(|point| point.0).sum::<f64>() / n;
    let mean_y = points.iter().map(|point| point.1).sum::<f64>() / n;
    let (mut products, mut squares) = (0.0, 0.0);
    for (x, y) in points {
        products += (x - mean_x) * (y - mean_y);
        squares += (x - mean_x).powi(2);
    }
    (squares > 0.0).then(|| products / squares)
}

/// Shortest time of readings for a slope. A shorter time shows only what the
/// allocator did at the moment, and not a growth per minute.
pub(super) const SLOPE_TIME_MIN: Duration = Duration::from_mins(1);

/// Growth of memory from `since` on, in KiB per minute; `None` if the readings
/// span less than [`SLOPE_TIME_MIN`].
#[must_use]
pub(super) fn rss_slope(samples: &[ProcessUsage], since: Instant) -> Option<f64> {
    let last = samples.last()?.at;
    if last.saturating_duration_since(since) < SLOPE_TIME_MIN {
        return None;
    }
    let points: Vec<(f64, f64)> = samples
        .iter()
        .filter(|usage| usage.at >= since)
        .map(|usage| {
            let minutes = usage.at.duration_since(since).as_secs_f64() / 60.0;
            (minutes, as_f64(usage.rss_kib))
        })
        .collect();
    slope(&points)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slopes() {
        let check = |points: &[(f64, f64)], expected: Option<f64>| match (slope(points), expected) {
            (Some(got), Some(expected)) => assert!((got - expected).abs() < 1e-9, "{got}"),
            (got, expected) => assert_eq!(got, expected),
        };
        check(&[], None);
        check(&[(1.0, 5.0)], None);
        check(&[(1.0, 5.0), (1.0, 7.0)], None);
        check(&[(0.0, 7.0), (1.0, 7.0), (5.0, 7.0)], Some(0.0));
        check(&[(0.0, 100.0), (1.0, 130.0), (2.0, 160.0)], Some(30.0));
        // Noise that is equal at both ends does not tilt the line.
        check(&[(0.0, 1.0), (0.0, 3.0), (2.0, 5.0), (2.0, 7.0)], Some(2.0));
    }

    #[test]
    fn growth_a_minute_needs_a_minute() {
        let began = Instant::now();
        let grown = |seconds: u64| -> Vec<ProcessUsage> {
            let at = |second| ProcessUsage {
                at: began + Duration::from_secs(second),
                cpu_seconds: 0.0,
                rss_kib: 1000 + 2 * second,
                threads: 1,
                file_descriptors: None,
            };
            (0..=seconds).map(at).collect()
        };
        let warm = began + Duration::from_secs(20);
        assert_eq!(rss_slope(&grown(79), warm), None);
        let slope = rss_slope(&grown(80), warm).unwrap();
        assert!((slope - 120.0).abs() < 1e-6, "{slope}");
        assert_eq!(rss_slope(&[], warm), None);
    }

    #[test]
    fn this_process_uses_something() {
        let usage = usage(&[std::process::id()]).unwrap();
        assert!(usage.rss_kib > 0 && usage.threads > 0);
        assert!(usage.file_descriptors.is_some_and(|count| count > 0));
        assert!(super::usage(&[]).is_none());
        assert!(are_there(&[std::process::id()]).is_ok());
        // No process has such a large id.
        let error = are_there(&[std::process::id(), u32::MAX]).unwrap_err();
        assert!(error.to_string().contains("--pid 4294967295"), "{error}");
    }
}
