//! Progress of a running job: a bar on a terminal, otherwise a log line at
//! intervals.

use std::io::{self, IsTerminal as _, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

/// Interval of the log lines when standard error is no terminal.
const LINE_INTERVAL: Duration = Duration::from_secs(10);
/// Window of the rate that is shown: the last few seconds, so that a stall
/// shows.
const RATE_WINDOW: Duration = Duration::from_secs(5);
/// Steps into which the bar and the estimate of the time left divide the whole
/// job.
const STEPS: u64 = 1_000_000;

/// Terminal that the bar and the log share: a line of the log is written above
/// the bar. `MultiProgress` is not used, since it panics when the terminal has
/// vanished.
#[derive(Debug, Clone, Default)]
pub struct Terminal(Arc<Mutex<Option<ProgressBar>>>);

impl Terminal {
    fn bar(&self) -> std::sync::MutexGuard<'_, Option<ProgressBar>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Write for Terminal {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let bar = self.bar().clone();
        match bar {
            Some(bar) => bar.suspend(|| io::stderr().write(bytes)),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Counters that the pipeline's tasks share.
#[derive(Debug, Default)]
pub(super) struct JobCounts {
    /// Images that have an outcome in this run.
    pub(super) images: AtomicU64,
    /// Images among them that failed.
    pub(super) errors: AtomicU64,
    /// Errors of a run before, which `--retry-errors` did not try again.
    pub(super) old_errors: AtomicU64,
    /// Share of the input that has been read, in units of 1 / [`STEPS`].
    read: AtomicU64,
}

impl JobCounts {
    /// Number of errors of this run, those that it took over among them.
    pub(super) fn all_errors(&self) -> u64 {
        self.errors.load(Ordering::Relaxed) + self.old_errors.load(Ordering::Relaxed)
    }

    /// Records that the share `share` of the whole input, 0 to 1, has been
    /// read.
    pub(super) fn has_read(&self, share: f64) {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            clippy::cast_precision_loss,
            reason = "between 0 and a million"
        )]
        let steps = (share.clamp(0.0, 1.0) * STEPS as f64) as u64;
        self.read.store(steps, Ordering::Relaxed);
    }
}

/// Progress of a job, shown while it runs.
#[derive(Debug)]
pub(super) struct JobProgress {
    bar: Option<ProgressBar>,
    started: Instant,
    /// Share of the input that had been read when this run started.
    began_at: Option<u64>,
    last_line: Instant,
    /// Window of the rate: the time at which it began, and the number of images
    /// then.
    window: (Instant, u64),
    rate: f64,
}

impl JobProgress {
    pub(super) fn begin(terminal: &Terminal) -> Self {
        let now = Instant::now();
        let bar = io::stderr().is_terminal().then(|| {
            let style = ProgressStyle::with_template("{wide_bar} {percent:>3} % {msg}")
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(STEPS).with_style(style)
        });
        terminal.bar().clone_from(&bar);
        Self {
            bar,
            started: now,
            began_at: None,
            last_line: now,
            window: (now, 0),
            rate: 0.0,
        }
    }

    /// Updates the bar or logs a line. Called about every half second.
    pub(super) fn update(&mut self, counts: &JobCounts, trouble: &[String]) {
        let images = counts.images.load(Ordering::Relaxed);
        let errors = counts.errors.load(Ordering::Relaxed);
        let read = counts.read.load(Ordering::Relaxed);
        let began_at = *self.began_at.get_or_insert(read);
        let (since, before) = self.window;
        let elapsed = since.elapsed();
        if elapsed >= RATE_WINDOW || self.rate == 0.0 {
            #[expect(clippy::cast_precision_loss, reason = "a rate for the eye")]
            let rate = images.saturating_sub(before) as f64 / elapsed.as_secs_f64().max(1e-3);
            self.rate = rate;
            self.window = (Instant::now(), images);
        }
        let left = left(self.started.elapsed(), began_at, read);
        let left = left.map_or_else(String::new, |left| {
            format!(", {} left", humantime::format_duration(left))
        });
        let trouble = if trouble.is_empty() {
            String::new()
        } else {
            format!(", {} workers are left out", trouble.len())
        };
        let text = format!(
            "{images} images, {:.1}/s, {errors} errors{left}{trouble}",
            self.rate
        );
        if let Some(bar) = &self.bar {
            bar.set_position(read);
            bar.set_message(text);
        } else if self.last_line.elapsed() >= LINE_INTERVAL {
            self.last_line = Instant::now();
            tracing::info!("{:.1} %: {text}", percent(read));
        }
    }
}

impl Drop for JobProgress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "up to a million")]
fn percent(read: u64) -> f64 {
    100.0 * read as f64 / STEPS as f64
}

/// Estimates the time left, in whole seconds, once enough is done to estimate
/// it.
fn left(elapsed: Duration, began_at: u64, read: u64) -> Option<Duration> {
    let done = read.saturating_sub(began_at);
    if done < STEPS / 1000 || elapsed < Duration::from_secs(2) {
        return None;
    }
    #[expect(clippy::cast_precision_loss, reason = "up to a million")]
    let factor = (STEPS - read) as f64 / done as f64;
    Some(Duration::from_secs(elapsed.mul_f64(factor).as_secs()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn time_left_counts_from_where_this_run_began() {
        let ten = Duration::from_secs(10);
        assert_eq!(left(ten, 0, 500_000), Some(ten));
        assert_eq!(left(ten, 500_000, 750_000), Some(ten));
        assert_eq!(left(ten, 0, 0), None);
        assert_eq!(left(ten, 0, STEPS), Some(Duration::ZERO));
    }
}
