//! The program as a process: workers that tests start, query, signal and stop.
//!
//! This module is part of several test crates.

#![allow(dead_code, reason = "each crate of tests uses a part of it")]

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, ChildStderr, Command, ExitStatus, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// Longest time that a test waits for anything; generous, because CI shares two
/// cores.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

/// Interval between two checks of a process.
const POLL: Duration = Duration::from_millis(5);

/// Path of the program that was built.
pub(crate) const PROGRAM: &str = env!("CARGO_BIN_EXE_imagegpt");

pub(crate) fn program() -> Command {
    Command::new(PROGRAM)
}

/// Returns everything that a program wrote.
pub(crate) fn said(output: &Output) -> String {
    format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    )
}

/// Waits until a condition holds.
pub(crate) fn until(what: &str, condition: impl FnMut() -> bool) {
    until_or(what, condition, String::new);
}

/// Waits until a condition holds, or panics with a metrics page.
fn until_or(what: &str, mut condition: impl FnMut() -> bool, page: impl FnOnce() -> String) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "never: {what}\n{}", page());
        pause(POLL);
    }
}

/// Waits for a fixed time that is part of a scenario: something goes on
/// meanwhile, or must not happen. To wait for an event, use [`until`].
#[expect(
    clippy::disallowed_methods,
    reason = "the one pause of threads, for tests that mean the time itself"
)]
pub(crate) fn pause(time: Duration) {
    std::thread::sleep(time);
}

/// Returns a port that was free a moment ago, for a process, and that stays free.
///
/// A port that the system has chosen may be given to a connection of another test
/// before the process listens at it. This one is below the ports that Linux
/// chooses (32768 and up unless set), and no other call returns it.
pub(crate) fn free_port() -> SocketAddr {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 20_000;
    const N: u32 = 12_000;
    // Another program's tests at the same time begin elsewhere.
    let begin = std::process::id().wrapping_mul(97);
    let ports = std::iter::repeat_with(|| {
        let n = begin.wrapping_add(NEXT.fetch_add(1, Ordering::Relaxed));
        u16::try_from(FIRST + n % N).expect("a port")
    });
    let mut addresses = ports
        .take(1000)
        .map(|port| SocketAddr::from(([127, 0, 0, 1], port)));
    let free = addresses.find(|address| TcpListener::bind(address).is_ok());
    free.expect("a port")
}

pub(crate) fn signal(child: &Child, name: &str) {
    let pid = child.id().to_string();
    let sent = Command::new("kill").args([name, &pid]).status();
    assert!(sent.expect("kill").success());
}

/// Creates a named pipe that nobody writes to.
pub(crate) fn make_pipe(path: &Path) {
    let made = Command::new("mkfifo").arg(path).status();
    assert!(made.expect("mkfifo").success());
}

/// Returns a whole response over HTTP/1.1; empty if nobody listens.
pub(crate) fn get(addr: SocketAddr, path: &str) -> String {
    let mut text = String::new();
    let Ok(mut stream) = TcpStream::connect(addr) else {
        return text;
    };
    let limit = stream.set_read_timeout(Some(PATIENCE));
    limit.expect("a limit of time");
    let request = format!("GET {path} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n\r\n");
    if stream.write_all(request.as_bytes()).is_ok() {
        let _ = stream.read_to_string(&mut text);
    }
    text
}

/// Returns the value of a series on a metrics page.
pub(crate) fn sample(page: &str, series: &str) -> Option<f64> {
    let mut lines = page.lines();
    let value = lines.find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))?;
    Some(value.parse().expect("a number"))
}

/// Worker as a process, which does not outlive its test.
pub(crate) struct Worker {
    child: Child,
    flags: Vec<String>,
    pub(crate) grpc: SocketAddr,
    pub(crate) metrics: SocketAddr,
}

impl Worker {
    /// Starts a worker with `flags` of `serve` and waits until it is ready, at
    /// ports of [`free_port`]: the log, which would name ports that the system has
    /// chosen, is not read.
    pub(crate) fn start(flags: &[&str], log: impl Into<Stdio>) -> Self {
        Self::start_with(flags, &[], log)
    }

    /// Starts a worker as [`Self::start`] does, with variables of the
    /// environment.
    pub(crate) fn start_with(
        flags: &[&str],
        variables: &[(&str, &str)],
        log: impl Into<Stdio>,
    ) -> Self {
        let flags = flags.iter().map(|&flag| flag.to_owned()).collect();
        Self::at(free_port(), free_port(), flags, variables, log)
    }

    fn at(
        grpc: SocketAddr,
        metrics: SocketAddr,
        flags: Vec<String>,
        variables: &[(&str, &str)],
        log: impl Into<Stdio>,
    ) -> Self {
        let child = program()
            .arg("serve")
            .envs(variables.iter().copied())
            .args(["--listen", &grpc.to_string()])
            .args(["--metrics-listen", &metrics.to_string()])
            .args(&flags)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .expect("a worker");
        let mut worker = Self {
            child,
            flags,
            grpc,
            metrics,
        };
        until("a worker is ready", || {
            assert_eq!(worker.ended(), None, "a worker ends at its start");
            worker.page("/readyz").contains(" 200 ")
        });
        worker
    }

    /// Starts a worker at ports that the system chooses and the log names, and
    /// waits until the log says that the worker is ready.
    pub(crate) fn logging(flags: &[&str]) -> (Self, Log) {
        let (mut worker, log) = Self::starting(flags);
        let nowhere = worker.grpc;
        while let Some(line) = log.next() {
            let event: serde_json::Value =
                serde_json::from_str(&line).expect("one JSON object a line");
            let addr = |name: &str| {
                let text = event[name].as_str().expect("an address");
                text.parse().expect("an address")
            };
            match event["message"].as_str() {
                Some("listening") => {
                    (worker.grpc, worker.metrics) = (addr("grpc"), addr("metrics"));
                }
                Some("ready") => {
                    assert_ne!(worker.grpc, nowhere, "listening comes first");
                    return (worker, log);
                }
                _ => {}
            }
        }
        panic!("never ready");
    }

    /// Starts a worker with a log, and waits for nothing.
    pub(crate) fn starting(flags: &[&str]) -> (Self, Log) {
        let nowhere = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut child = program()
            .args(["serve", "--log-format", "json"])
            .args(["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"])
            .args(flags)
            .stdin(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .expect("a worker");
        let log = Log::new(child.stderr.take().expect("a pipe"));
        let worker = Self {
            child,
            flags: Vec::new(),
            grpc: nowhere,
            metrics: nowhere,
        };
        (worker, log)
    }

    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.grpc)
    }

    /// Returns a page with its head; empty if nobody answers.
    pub(crate) fn page(&self, path: &str) -> String {
        get(self.metrics, path)
    }

    /// Returns the value of a series, if the metrics page has the series.
    pub(crate) fn sample(&self, series: &str) -> Option<f64> {
        sample(&self.page("/metrics"), series)
    }

    /// Waits until a condition holds.
    pub(crate) fn until(&self, what: &str, condition: impl Fn(&Self) -> bool) {
        until_or(what, || condition(self), || self.page("/metrics"));
    }

    pub(crate) fn signal(&self, name: &str) {
        signal(&self.child, name);
    }

    /// Writes to the standard input of a worker that has a log.
    pub(crate) fn write(&mut self, bytes: &[u8]) {
        let stdin = self.child.stdin.as_mut().expect("an open pipe");
        stdin.write_all(bytes).expect("the worker reads");
    }

    /// Ends the standard input of a worker that has a log.
    pub(crate) fn end_stdin(&mut self) {
        self.child.stdin.take().expect("an open pipe");
    }

    pub(crate) fn ended(&mut self) -> Option<ExitStatus> {
        self.child.try_wait().expect("a child")
    }

    /// Waits for the process to end and returns its exit code, unless a signal
    /// ended the process.
    pub(crate) fn wait(&mut self) -> Option<i32> {
        let mut status = None;
        until("a worker ends", || {
            status = self.ended();
            status.is_some()
        });
        status.expect("its end").code()
    }

    /// Stops the worker as an operator does.
    pub(crate) fn end(mut self) {
        self.end_in_good_order();
    }

    fn end_in_good_order(&mut self) {
        self.signal("-TERM");
        assert_eq!(self.wait(), Some(0), "a clean end");
    }

    /// Stops the worker as an operator does, and starts another one in its
    /// place.
    pub(crate) fn end_and_replace(mut self) -> Self {
        self.end_in_good_order();
        self.another()
    }

    /// Kills the worker, and starts another one in its place.
    pub(crate) fn kill_and_replace(mut self) -> Self {
        self.child.kill().expect("a kill");
        self.child.wait().expect("its end");
        self.another()
    }

    fn another(&self) -> Self {
        Self::at(
            self.grpc,
            self.metrics,
            self.flags.clone(),
            &[],
            Stdio::null(),
        )
    }
}

/// Kills the worker, since a test that fails must not leave its workers behind.
impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Lines of a worker's log, read as they are written.
pub(crate) struct Log(mpsc::Receiver<String>);

impl Log {
    fn new(pipe: ChildStderr) -> Self {
        let (lines, log) = mpsc::channel();
        let read = move || {
            for line in BufReader::new(pipe).lines().map_while(Result::ok) {
                // Until nobody wants to know.
                if lines.send(line).is_err() {
                    return;
                }
            }
        };
        let reader = std::thread::Builder::new().name("log".to_owned());
        reader.spawn(read).expect("a thread");
        Self(log)
    }

    /// Returns the next line; `None` after the worker has ended.
    pub(crate) fn next(&self) -> Option<String> {
        match self.0.recv_timeout(PATIENCE) {
            Ok(line) => Some(line),
            Err(mpsc::RecvTimeoutError::Disconnected) => None,
            Err(mpsc::RecvTimeoutError::Timeout) => panic!("the log neither goes on nor ends"),
        }
    }

    /// Reads up to a line that contains `words`; returns false if there is
    /// none.
    pub(crate) fn reaches(&self, words: &str) -> bool {
        std::iter::from_fn(|| self.next()).any(|line| line.contains(words))
    }

    /// Returns the remaining lines, up to the worker's end.
    pub(crate) fn rest(self) -> Vec<String> {
        std::iter::from_fn(|| self.next()).collect()
    }
}
