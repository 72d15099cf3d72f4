//! Progress for a person, on standard error, so that the table on standard
//! output stays clean: a progress bar on a terminal, one line per measurement
//! elsewhere.

use std::io::{IsTerminal as _, Write as _};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

/// Progress line of one measurement; cleared when dropped.
#[derive(Debug)]
pub(super) struct Line {
    bar: Option<ProgressBar>,
    total: Option<Duration>,
}

impl Line {
    /// Shows the line; `total` is the duration of the measurement, if it is
    /// known.
    pub(super) fn begin(name: &str, total: Option<Duration>) -> Self {
        if !std::io::stderr().is_terminal() {
            let time = total.map_or_else(String::new, |total| {
                format!(", {:.1} s", total.as_secs_f64())
            });
            let _ = writeln!(std::io::stderr(), "imagegpt: {name}{time}");
            return Self { bar: None, total };
        }
        let template = match total {
            Some(_) => "{prefix:32} {wide_bar} {msg}",
            None => "{prefix:32} {spinner} {msg}",
        };
        let style =
            ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total.map_or(0, milliseconds))
            .with_style(style)
            .with_prefix(name.to_owned());
        Self {
            bar: Some(bar),
            total,
        }
    }

    pub(super) fn update(&self, elapsed: Duration, message: String) {
        if let Some(bar) = &self.bar {
            if let Some(total) = self.total {
                bar.set_position(milliseconds(elapsed.min(total)));
            }
            bar.set_message(message);
        }
    }
}

impl Drop for Line {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

fn milliseconds(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Prints a line for the person, at any time.
pub(super) fn note(text: &str) {
    let _ = writeln!(std::io::stderr(), "imagegpt: {text}");
}
