//! Structured logs on standard error, whose reader may be slow, full or gone.
//!
//! A thread that logs must never block or end because of the log's destination.
//! Lines go through a bounded queue to a thread of the log. A line is dropped
//! and counted if the queue is full or the line cannot be written.

use std::fs::File;
use std::io::{self, IsTerminal as _, Write};
use std::os::fd::AsFd as _;
use std::panic::PanicHookInfo;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::{Args, ValueEnum};
use crossbeam_channel::{Receiver, Sender};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime as _, SystemTime};

/// Flags of the log on standard error.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Log")]
pub struct LogConfig {
    /// Log filter: a level (error, warn, info, debug or trace), or levels by
    /// module, such as info,imagegpt=debug
    #[arg(
        long,
        env = "IMAGEGPT_LOG",
        default_value = "info,ort=warn",
        value_name = "FILTER"
    )]
    pub log: String,

    /// Format of the log: a line of text or a JSON object per event
    #[arg(long, env = "IMAGEGPT_LOG_FORMAT", value_enum, default_value = "text")]
    pub log_format: LogFormat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    Text,
    Json,
}

/// Most lines that wait to be written: some seconds of a busy log at level
/// debug.
const LINES_MAX: usize = 4096;
/// Most bytes of the lines that wait; the cause of an error may be a page long.
const BYTES_MAX: usize = 4 << 20;
/// Longest wait for the last lines at the end of the process. A terminal or a
/// file needs milliseconds; a pipe that nobody reads must not delay the end.
const FLUSH_MAX: Duration = Duration::from_secs(1);

/// Longest wait for the message of a panic. The panic may concern one image
/// only, and the process then continues.
const PANIC_FLUSH_MAX: Duration = Duration::from_millis(20);

/// Number of lines that were dropped since the start of the process.
static DROPPED: AtomicU64 = AtomicU64::new(0);
/// Queue of the process's log, once the log is installed.
static LOG: OnceLock<(LogQueue, LogFormat)> = OnceLock::new();

/// Returns the message of a panic, if the panic has a message.
pub(crate) fn panic_text(panic: &(dyn std::any::Any + Send)) -> String {
    panic
        .downcast_ref::<&str>()
        .map(ToString::to_string)
        .or_else(|| panic.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}

/// Number of log lines that could not be written since the start of the
/// process.
pub(crate) fn lines_dropped() -> u64 {
    DROPPED.load(Ordering::Relaxed)
}

/// Installs the process's log subscriber.
///
/// # Errors
///
/// When the filter cannot be parsed, a subscriber is installed already, or no
/// thread or file descriptor is left for the log.
pub fn init(config: &LogConfig) -> anyhow::Result<()> {
    // A descriptor of its own avoids the lock of `std::io::stderr`: a thread
    // that is stuck in a write would hold the lock and block every other
    // thread.
    let stderr = io::stderr().as_fd().try_clone_to_owned();
    let stderr = stderr.context("standard error cannot be opened for the log")?;
    init_to(config, File::from(stderr))
}

/// Installs the log subscriber with a writer that also knows the progress bars
/// on the terminal.
///
/// # Errors
///
/// As [`init`].
pub fn init_to(config: &LogConfig, out: impl Write + Send + 'static) -> anyhow::Result<()> {
    let filter = EnvFilter::try_new(&config.log)
        .map_err(|error| anyhow::anyhow!("--log {:?} is not a filter: {error}", config.log))?;
    let queue = LogQueue::start(out).context("the log's thread cannot be started")?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        // The subscriber prints its own errors with `eprintln!`, which panics
        // if standard error cannot be written.
        .log_internal_errors(false)
        .with_writer(queue.clone());
    let installed = match config.log_format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    installed.map_err(|error| anyhow::anyhow!("{error}"))?;
    if LOG.set((queue, config.log_format)).is_ok() {
        std::panic::set_hook(Box::new(log_panic));
    }
    Ok(())
}

/// Returns the format of the process's log, once the log is installed.
pub(crate) fn log_format() -> Option<LogFormat> {
    LOG.get().map(|(_, format)| *format)
}

/// Prints a line for the person at the terminal. With a log, the line goes
/// through the log's queue, so that a standard error that nobody reads does not
/// block a worker, and has the log's format, whatever the log's filter is.
pub(crate) fn note(text: &str) {
    let line = format!("imagegpt: {text}\n");
    match LOG.get() {
        Some((queue, LogFormat::Text)) => queue.push(line.as_bytes()),
        Some((queue, LogFormat::Json)) => queue.push(error_object(text).as_bytes()),
        None => {
            // Without standard error there is nobody to tell.
            let _ = io::stderr().write_all(line.as_bytes());
        }
    }
}

/// Returns the line of an error in the form of the JSON log.
fn error_object(text: &str) -> String {
    let mut timestamp = String::new();
    // Writing to a string cannot fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut timestamp));
    let object = serde_json::json!({
        "timestamp": timestamp,
        "level": "ERROR",
        "message": text,
        "target": "imagegpt",
    });
    format!("{object}\n")
}

/// Says why the process ends, and waits up to a second until all log lines have
/// been written.
pub fn end(reason: Option<&str>) {
    if let Some(reason) = reason {
        note(reason);
    }
    if let Some((queue, _)) = LOG.get() {
        queue.flush(FLUSH_MAX);
    }
}

/// Panic hook that logs like the standard library's. The standard hook writes
/// to standard error itself and could block there for ever.
fn log_panic(info: &PanicHookInfo<'_>) {
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("<unnamed>");
    let trace = std::backtrace::Backtrace::capture();
    let trace = match trace.status() {
        std::backtrace::BacktraceStatus::Captured => format!("\nstack backtrace:\n{trace}"),
        _ => String::new(),
    };
    note(&format!("thread '{name}' {info}{trace}"));
    // A second panic may end the process at once.
    if let Some((queue, _)) = LOG.get() {
        queue.flush(PANIC_FLUSH_MAX);
    }
}

/// Queue of the lines that wait to be written. Cheap to clone.
#[derive(Debug, Clone)]
struct LogQueue {
    entries: Sender<Entry>,
    n_bytes: Arc<AtomicUsize>,
}

#[derive(Debug)]
enum Entry {
    Line(Box<[u8]>),
    /// Request that is answered once all earlier lines have been written or
    /// dropped.
    Flush(Sender<()>),
}

impl LogQueue {
    fn start(out: impl Write + Send + 'static) -> io::Result<Self> {
        let (entries, waiting) = crossbeam_channel::bounded(LINES_MAX);
        let n_bytes = Arc::new(AtomicUsize::new(0));
        let queue = Self {
            entries,
            n_bytes: Arc::clone(&n_bytes),
        };
        let write = move || write_all(&waiting, &n_bytes, LogFile::new(out));
        std::thread::Builder::new()
            .name("log".to_owned())
            .spawn(write)?;
        Ok(queue)
    }

    /// Queues a line, or drops the line if too many lines or bytes wait.
    fn push(&self, line: &[u8]) {
        let before = self.n_bytes.fetch_add(line.len(), Ordering::Relaxed);
        let fits = before + line.len() <= BYTES_MAX;
        if !fits || self.entries.try_send(Entry::Line(line.into())).is_err() {
            self.n_bytes.fetch_sub(line.len(), Ordering::Relaxed);
            DROPPED.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Waits up to `max` until everything that was pushed has been written or
    /// dropped.
    fn flush(&self, max: Duration) {
        let deadline = Instant::now() + max;
        let (done, written) = crossbeam_channel::bounded(1);
        if self
            .entries
            .send_deadline(Entry::Flush(done), deadline)
            .is_ok()
        {
            let _ = written.recv_deadline(deadline);
        }
    }
}

/// Each write is one whole line, as the subscriber writes.
impl Write for LogQueue {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        self.push(line);
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl MakeWriter<'_> for LogQueue {
    type Writer = Self;

    fn make_writer(&self) -> Self {
        self.clone()
    }
}

/// Loop of the log's thread.
fn write_all(entries: &Receiver<Entry>, n_bytes: &AtomicUsize, mut out: LogFile<impl Write>) {
    let mut n_told = 0;
    for entry in entries {
        let line = match entry {
            Entry::Line(line) => line,
            Entry::Flush(done) => {
                let _ = done.send(());
                continue;
            }
        };
        let written = out.write_line(&line);
        n_bytes.fetch_sub(line.len(), Ordering::Relaxed);
        if written.is_err() {
            DROPPED.fetch_add(1, Ordering::Relaxed);
            continue;
        }
        let dropped = lines_dropped();
        if dropped > n_told {
            let lines = dropped - n_told;
            tracing::warn!(
                lines,
                "log lines before this one were dropped, because they could not be written"
            );
            // This warning may be dropped, too.
            n_told = dropped;
        }
    }
}

/// Destination of the lines, which keeps lines whole where possible.
struct LogFile<W> {
    out: W,
    /// True if the last write ended in the middle of a line.
    is_torn: bool,
}

impl<W: Write> LogFile<W> {
    fn new(out: W) -> Self {
        Self {
            out,
            is_torn: false,
        }
    }

    fn write_line(&mut self, line: &[u8]) -> io::Result<()> {
        if self.is_torn {
            self.out.write_all(b"\n")?;
            self.is_torn = false;
        }
        let mut rest = line;
        while !rest.is_empty() {
            match self.out.write(rest) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(n) => rest = rest.get(n..).unwrap_or_default(),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
            self.is_torn = !rest.is_empty();
        }
        self.out.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Disk with room for a limited number of bytes.
    #[derive(Clone)]
    struct Disk {
        free: Arc<AtomicUsize>,
        text: Arc<Mutex<Vec<u8>>>,
    }

    impl Write for Disk {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let n = self.free.load(Ordering::Relaxed).min(bytes.len());
            if n == 0 {
                return Err(io::ErrorKind::StorageFull.into());
            }
            self.free.fetch_sub(n, Ordering::Relaxed);
            self.text.lock().unwrap().extend(&bytes[..n]);
            Ok(n)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_line_after_a_torn_one_begins_a_new_line() {
        let disk = Disk {
            free: Arc::new(AtomicUsize::new(7)),
            text: Arc::default(),
        };
        let mut file = LogFile::new(disk.clone());
        file.write_line(b"one\n").unwrap();
        assert!(file.write_line(b"two and more\n").is_err());
        assert!(file.write_line(b"lost\n").is_err());
        disk.free.store(100, Ordering::Relaxed);
        file.write_line(b"three\n").unwrap();
        file.write_line(b"four\n").unwrap();
        let text = String::from_utf8(disk.text.lock().unwrap().clone()).unwrap();
        assert_eq!(text, "one\ntwo\nthree\nfour\n");
    }

    /// Blocks the log's thread until the gate opens.
    struct Gate(Receiver<()>);

    impl Write for Gate {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_log_that_nobody_reads_holds_nobody_and_its_lines_are_counted() {
        let (open, gate) = crossbeam_channel::bounded::<()>(0);
        let queue = LogQueue::start(Gate(gate)).unwrap();
        let before = lines_dropped();
        let begun = Instant::now();
        // One line is in the write, the others wait.
        let n_pushed = LINES_MAX + 100;
        for _ in 0..n_pushed {
            queue.push(b"a line\n");
        }
        let n_dropped = lines_dropped() - before;
        assert!((99..=100).contains(&n_dropped), "{n_dropped}");
        queue.flush(Duration::from_millis(10));
        // The limit on bytes holds, too.
        queue.push(&vec![b'x'; BYTES_MAX + 1]);
        assert_eq!(lines_dropped() - before, n_dropped + 1);
        assert!(begun.elapsed() < Duration::from_secs(30));
        drop(open);
        queue.flush(Duration::from_secs(30));
        assert_eq!(queue.n_bytes.load(Ordering::Relaxed), 0);
    }
}
