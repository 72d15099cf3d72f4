//! Commands `imagegpt probe fit` and `imagegpt probe eval`: linear probes, from
//! labelled images to a head that `imagegpt serve --head` serves.

mod eval;
mod examples;
mod fit;
pub mod flags;
mod jobs;
mod plots;
mod report;
mod tables;

use std::io::Write;
use std::pin::pin;

use self::flags::ProbeCommand;
use self::jobs::Unfinished;
use super::embed::{JobEnded, Terminal};
use crate::telemetry::LogConfig;

impl ProbeCommand {
    /// Flags of the log.
    #[must_use]
    pub fn log(&self) -> &LogConfig {
        match self {
            Self::Fit(args) => &args.jobs.log,
            Self::Eval(args) => &args.jobs.log,
        }
    }
}

/// Runs a command; its table goes to `out`. Returns how the jobs that embed the
/// images ended, if one did not end well.
///
/// # Errors
///
/// Flags, inputs or labels that cannot be used: repeating the same command does
/// not help.
pub async fn run(
    command: &ProbeCommand,
    terminal: &Terminal,
    stop: impl Future<Output = ()>,
    out: &mut impl Write,
) -> anyhow::Result<JobEnded> {
    let mut stop = pin!(stop);
    // Boxed, since the jobs within them are large.
    let done = match command {
        ProbeCommand::Fit(args) => Box::pin(fit::run(args, terminal, &mut stop, out)).await,
        ProbeCommand::Eval(args) => Box::pin(eval::run(args, terminal, &mut stop, out)).await,
    };
    match done {
        Ok(()) => Ok(JobEnded::Done),
        Err(error) => match error.downcast_ref() {
            Some(Unfinished(ended)) => Ok(*ended),
            None => Err(error),
        },
    }
}
