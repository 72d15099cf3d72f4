//! This program once more, for what may take its process with it or never come
//! back: what a driver or a library does to that process is a line of the report.
//!
//! The other process says in JSON what it found, on its last line.

use std::fmt;
use std::io::{self, Read as _, Write};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use serde::Serialize;
use serde::de::DeserializeOwned;

use super::DoctorArgs;

/// How often a process is looked at; each takes some milliseconds at least.
const POLL: Duration = Duration::from_millis(10);
/// Time to end for a process that was killed. One that waits within the kernel,
/// as a driver's calls do, may never; it is left behind.
const KILL_GRACE: Duration = Duration::from_secs(1);

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum ChildLost {
    /// It was given so long.
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
            Self::Ended(status) => write!(f, "the process that tried it ended with {status}"),
            Self::Io(error) => write!(f, "no process to try it in: {error}"),
        }
    }
}

impl From<io::Error> for ChildLost {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Starts this program's doctor with `question`, and with what `args` say of the
/// machine, and waits for what it answers.
///
/// # Errors
///
/// When it says nothing.
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
        // If it cannot be killed, it has ended by itself.
        let _ = child.kill();
        let _ = end_of(&mut child, KILL_GRACE)?;
        return Err(ChildLost::Hung(time_max));
    };
    // What it says fits the pipe, so it never waited for a reader.
    let mut said = Vec::new();
    if let Some(mut stdout) = child.stdout.take() {
        stdout.read_to_end(&mut said)?;
    }
    // A library may have said something before.
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

/// What the other process says.
///
/// # Errors
///
/// When nobody takes it.
pub(super) fn answer(found: &impl Serialize, out: &mut impl Write) -> anyhow::Result<()> {
    writeln!(out, "{}", serde_json::to_string(found)?)?;
    Ok(())
}
