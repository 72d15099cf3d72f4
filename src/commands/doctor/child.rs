//! Child processes of the doctor: this program once more, for code that may
//! crash its process or never return. The fate of the child process becomes a
//! line of the report.
//!
//! A child process prints its findings as JSON on its last line.

use std::fmt;
use std::io::{self, Read as _, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::DoctorArgs;

/// Interval at which a child process is polled; each runs for some milliseconds
/// at least.
const POLL: Duration = Duration::from_millis(10);
/// Time in which a killed process should end. A process that waits within the
/// kernel, as calls of a driver do, may never end and is left behind.
const KILL_GRACE: Duration = Duration::from_secs(1);

/// Reason why a child process gave no answer.
#[derive(Debug)]
pub(super) enum ChildLost {
    /// The child process did not end within this time.
    Hung(Duration),
    Ended(ExitStatus),
    Io(io::Error),
}

impl fmt::Display for ChildLost {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hung(time) => {
                let time = humantime::format_duration(*time);
                write!(f, "there was no answer within {time}")
            }
            Self::Ended(status) => write!(f, "the child process ended with {status}"),
            Self::Io(error) => write!(f, "no child process could be run: {error}"),
        }
    }
}

impl From<io::Error> for ChildLost {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Starts this program's doctor with the flags `question` and the paths in
/// `args`, and returns its answer.
///
/// # Errors
///
/// When the child process gives no answer.
pub(super) fn ask<T: DeserializeOwned>(
    args: &DoctorArgs,
    question: &[&str],
    time_max: Duration,
) -> Result<T, ChildLost> {
    let mut command = Command::new(std::env::current_exe()?);
    command
        .arg("doctor")
        .args(question)
        .stdin(Stdio::null())
        .stdout(Stdio::piped());
    let paths = [
        ("--onnxruntime", &args.library.onnxruntime),
        ("--cache-dir", &args.cache.cache_dir),
    ];
    for (flag, path) in paths {
        if let Some(path) = path {
            command.arg(flag).arg(path);
        }
    }
    if let Some(model) = &args.model {
        command.args(["--model", model]);
    }
    let mut child = command.spawn()?;
    let Some(status) = end_of(&mut child, time_max)? else {
        // A process that cannot be killed has ended by itself.
        let _ = child.kill();
        let _ = end_of(&mut child, KILL_GRACE)?;
        return Err(ChildLost::Hung(time_max));
    };
    // The answer fits into the pipe, so the process never waited for a reader.
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_end(&mut said)?;
    }
    // A library may have printed something before the answer.
    let said = String::from_utf8_lossy(&said);
    let answer = said.lines().last().map(serde_json::from_str);
    match answer {
        Some(Ok(answer)) => Ok(answer),
        _ => Err(ChildLost::Ended(status)),
    }
}

fn end_of(child: &mut Child, time_max: Duration) -> io::Result<Option<ExitStatus>> {
    let started = Instant::now();
    loop {
        let status = child.try_wait()?;
        if status.is_some() || started.elapsed() > time_max {
            return Ok(status);
        }
        std::thread::sleep(POLL);
    }
}

/// Prints the answer of a child process.
///
/// # Errors
///
/// When the answer cannot be written.
pub(super) fn answer(found: &impl Serialize, out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(out, "{}", serde_json::to_string(found)?)?;
    Ok(())
}
