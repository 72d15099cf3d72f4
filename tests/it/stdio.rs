//! Standard output and standard error that are closed, full, or a broken pipe:
//! every command keeps its exit code, and a worker continues to serve.

use std::fs::File;
use std::io::{PipeReader, Read as _};
use std::path::Path;
use std::process::{Command, Stdio};

use imagegpt::engine::fake::Script;
use imagegpt::model::precision::Precision;

use crate::generate::compiled;
use crate::harness::{self, PATIENCE, embed, seeded, tokens};
use crate::process::{PROGRAM, Worker};

/// Every line of a JSON log is an object, while a model is compiled and when
/// the worker cannot start, too.
#[test]
fn a_log_in_json_has_objects_alone() {
    let cache = tempfile::tempdir().expect("a directory");
    let cache = cache.path().to_str().expect("UTF-8");
    let model = harness::model_dir("micro-checkpoint");
    let model = model.to_str().expect("UTF-8");
    let flags = ["--model", model, "--cache-dir", cache];
    let (worker, log) = Worker::starting(&flags);
    let mut steps = Vec::new();
    while let Some(line) = log.next() {
        let event: serde_json::Value = serde_json::from_str(&line).expect(&line);
        if event["message"] == "compiling" {
            steps.push(event["step"].as_str().expect("a step").to_owned());
        }
        if event["message"] == "ready" {
            break;
        }
    }
    assert!(steps.contains(&"writing weights".to_owned()), "{steps:?}");
    drop(worker);
    for wrong in [
        &["--model", "/nonexistent/model"][..],
        &[
            "--model",
            model,
            "--cache-dir",
            cache,
            "--listen",
            "192.0.2.1:0",
            "--insecure",
        ],
        &[
            "--model",
            model,
            "--fake-engine",
            "1ms",
            "--head-dir",
            cache,
        ],
    ] {
        // Not even a filter hides why the worker ended.
        let fixed = ["serve", "--log-format", "json", "--log", "off"];
        let (code, said) = run(&[&fixed, wrong].concat(), Sink::Read, Sink::Read);
        assert_eq!(code, Some(2), "{wrong:?}: {said}");
        let events: Vec<serde_json::Value> = said
            .lines()
            .map(|line| serde_json::from_str(line).expect(line))
            .collect();
        let [event] = &events[..] else {
            panic!("{wrong:?}: {said}");
        };
        assert_eq!(event["level"], "ERROR", "{said}");
        assert!(
            event["message"].is_string() && event["timestamp"].is_string(),
            "{said}"
        );
    }
}

/// Destination of an output stream of the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sink {
    Read,
    Closed,
    Full,
    /// Broken pipe: its reader has closed it.
    Gone,
}

const BROKEN: [Sink; 3] = [Sink::Closed, Sink::Full, Sink::Gone];

impl Sink {
    fn open(self) -> Stdio {
        match self {
            Self::Read => Stdio::piped(),
            // The shell closes it.
            Self::Closed => Stdio::null(),
            Self::Full => full().into(),
            Self::Gone => {
                let (reader, writer) = std::io::pipe().expect("a pipe");
                drop(reader);
                writer.into()
            }
        }
    }
}

fn full() -> File {
    let file = File::options().write(true).open("/dev/full");
    file.expect("a disk without room")
}

/// Makes a command with these destinations; a shell closes the streams that
/// must be closed.
fn program(arguments: &[&str], out: Sink, err: Sink) -> Command {
    let script = match (out, err) {
        (Sink::Closed, Sink::Closed) => "exec \"$0\" \"$@\" >&- 2>&-",
        (Sink::Closed, _) => "exec \"$0\" \"$@\" >&-",
        (_, Sink::Closed) => "exec \"$0\" \"$@\" 2>&-",
        _ => "exec \"$0\" \"$@\"",
    };
    let mut command = Command::new("sh");
    command
        .args(["-c", script, PROGRAM])
        .args(arguments)
        .env(
            "ORT_DYLIB_PATH",
            imagegpt::runtime::library::find_library(None),
        )
        .stdin(Stdio::null())
        .stdout(out.open())
        .stderr(err.open());
    command
}

/// Runs the program, and returns its exit code and standard error.
fn run(arguments: &[&str], out: Sink, err: Sink) -> (Option<i32>, String) {
    let output = program(arguments, out, err).output().expect("started");
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!said.contains("panicked"), "{arguments:?}: {said}");
    (output.status.code(), said)
}

/// Exit codes of a command, by the destination of its output.
struct Codes {
    fine: i32,
    unread: i32,
    full: i32,
}

fn check(arguments: &[&str], codes: &Codes) {
    let code = |out, err| {
        let (code, said) = run(arguments, out, err);
        (
            code.unwrap_or_else(|| panic!("{arguments:?} {out:?}: a signal")),
            said,
        )
    };
    let (fine, said) = code(Sink::Read, Sink::Read);
    assert_eq!(fine, codes.fine, "{arguments:?}: {said}");
    let (closed, said) = code(Sink::Closed, Sink::Read);
    assert_eq!(closed, codes.fine, "{arguments:?}: {said}");
    let (gone, said) = code(Sink::Gone, Sink::Read);
    assert_eq!(gone, codes.unread, "{arguments:?}: {said}");
    assert!(!said.contains("roken pipe"), "quiet: {arguments:?}: {said}");
    let (full, said) = code(Sink::Full, Sink::Read);
    assert_eq!(full, codes.full, "{arguments:?}: {said}");
    assert!(
        said.contains("standard output cannot be written: No space left on device"),
        "{arguments:?}: {said}"
    );
    for err in BROKEN {
        assert_eq!(
            code(Sink::Read, err).0,
            codes.fine,
            "{arguments:?}: 2 {err:?}"
        );
    }
    assert_eq!(
        code(Sink::Closed, Sink::Closed).0,
        codes.fine,
        "{arguments:?}"
    );
    assert_eq!(code(Sink::Full, Sink::Gone).0, codes.full, "{arguments:?}");
}

#[test]
fn help_and_version_need_somewhere_to_go() {
    let codes = Codes {
        fine: 0,
        unread: 0,
        full: 2,
    };
    check(&["--version"], &codes);
    check(&["--help"], &codes);
    check(&["help", "serve"], &codes);
    // What goes to standard error is lost, and the flags are as wrong.
    for err in BROKEN {
        assert_eq!(run(&["serve", "--nonsense"], Sink::Read, err).0, Some(2));
        assert_eq!(run(&[], Sink::Read, err).0, Some(2));
    }
}

#[test]
fn inspect_and_compile_end_as_they_would() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = compiled(folder.path(), Precision::Fp32);
    let model = model.to_str().expect("UTF-8");
    let codes = Codes {
        fine: 0,
        unread: 0,
        full: 2,
    };
    check(&["inspect", model], &codes);
    for err in BROKEN {
        let (code, _) = run(&["inspect", "/nowhere"], Sink::Read, err);
        assert_eq!(code, Some(2), "{err:?}");
    }
    let source = harness::model_dir("micro-causal");
    let source = source.to_str().expect("UTF-8");
    let output = folder.path().join("made");
    let arguments = [
        "compile",
        source,
        "--output",
        output.to_str().expect("UTF-8"),
    ];
    let (code, said) = run(&arguments, Sink::Gone, Sink::Gone);
    assert_eq!(code, Some(0), "{said}");
    assert!(output.join("imagegpt.json").is_file());
}

#[test]
fn doctor_ends_with_its_verdict() {
    let codes = Codes {
        fine: 0,
        unread: 0,
        full: 2,
    };
    check(&["doctor", "--execution-provider", "cpu"], &codes);
}

/// Makes a directory with a picture, and a list of pictures of which one does
/// not exist.
fn pictures() -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a folder");
    let picture = image::RgbImage::from_pixel(20, 10, image::Rgb([200, 30, 90]));
    std::fs::create_dir(folder.path().join("pictures")).expect("a folder");
    for name in ["one.png", "two.png"] {
        let path = folder.path().join("pictures").join(name);
        picture.save(path).expect("saved");
    }
    folder
}

#[tokio::test(flavor = "multi_thread")]
async fn commands_that_ask_a_worker_keep_their_codes() {
    let running = harness::fake(Script::default(), &[]).await;
    let endpoint = running.url();
    let checks = tokio::task::spawn_blocking(move || {
        let folder = pictures();
        let path = |name: &str| folder.path().join(name).to_str().expect("UTF-8").to_owned();
        let images = path("pictures");
        let ask = |command: &[&str], codes: &Codes| {
            check(&[command, &["--endpoint", &endpoint]].concat(), codes);
        };
        let asks = Codes {
            fine: 0,
            unread: 130,
            full: 2,
        };
        ask(&["tokenize", &images], &asks);
        ask(&["tokenize", &images, "--json"], &asks);
        ask(&["classify", &images], &asks);
        ask(&["neighbors", &images], &asks);
        // Something on standard error besides.
        let some = Codes {
            fine: 1,
            unread: 130,
            full: 2,
        };
        ask(&["tokenize", &images, "/nowhere.png"], &some);
        let goes_on = Codes {
            fine: 0,
            unread: 0,
            full: 2,
        };
        let bench = [
            "bench",
            "saturate",
            "--duration",
            "200ms",
            "--warm-up",
            "0s",
        ];
        ask(&bench, &goes_on);
        let summary = Codes {
            fine: 0,
            unread: 0,
            full: 1,
        };
        ask(&["embed", &images, "--output", &path("features")], &summary);
        // Nothing of the job is lost with the summary.
        let finish = ["embed", "--finish", "--output", &path("features")];
        check(&finish, &summary);
    });
    checks.await.expect("all as they should");
    running.end().await;
}

/// Starts a worker with a destination for its log.
fn start(log: impl Into<Stdio>, level: &str) -> Worker {
    let model = harness::model_dir("micro");
    let model = model.to_str().expect("UTF-8");
    let flags = ["--fake-engine", "0s", "--model", model, "--log", level];
    Worker::start(&flags, log)
}

fn dropped(worker: &Worker) -> f64 {
    let dropped = worker.sample("imagegpt_log_lines_dropped_total");
    dropped.expect("the series")
}

/// Makes `n` calls, each of which is logged.
fn calls(worker: &Worker, n: usize) {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let mut client = harness::Client::connect(worker.url())
            .await
            .expect("a connection");
        for _ in 0..n {
            let call = client.embed(embed(vec![tokens(seeded(1))]));
            let answer = tokio::time::timeout(PATIENCE, call).await;
            answer.expect("no answer").expect("an answer");
        }
    });
}

#[test]
fn a_worker_whose_log_cannot_be_written_serves_on() {
    for sink in [Sink::Full, Sink::Gone] {
        let worker = start(sink.open(), "debug");
        calls(&worker, 10);
        worker.until("counted", |worker| dropped(worker) >= 10.0);
        worker.end();
    }
    // Standard error that was closed is no trouble: the program has /dev/null.
    let worker = start(Stdio::null(), "debug");
    calls(&worker, 10);
    assert!(dropped(&worker) == 0.0);
    worker.end();
}

#[test]
fn a_log_collector_that_goes_away_takes_no_worker_along() {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let worker = start(writer, "debug");
    calls(&worker, 1);
    let mut some = [0; 64];
    assert!(reader.read(&mut some).expect("a log") > 0);
    drop(reader);
    calls(&worker, 10);
    worker.until("counted", |worker| dropped(worker) > 0.0);
    worker.end();
}

/// Reads the rest of a pipe in a thread.
fn rest(mut reader: PipeReader) -> std::thread::JoinHandle<String> {
    let read = move || {
        let mut text = String::new();
        let _ = reader.read_to_string(&mut text);
        text
    };
    std::thread::Builder::new()
        .name("pipe".to_owned())
        .spawn(read)
        .expect("a thread")
}

/// Makes calls until the pipe and the log's queue in front of it are full.
fn fill(worker: &Worker) {
    worker.until("the pipe and the queue are full", |worker| {
        let is_full = dropped(worker) > 0.0;
        if !is_full {
            calls(worker, 50);
        }
        is_full
    });
}

#[test]
fn a_log_that_nobody_reads_holds_neither_calls_nor_the_end() {
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let worker = start(writer, "trace");
    fill(&worker);
    worker.end();
    drop(reader);

    // One that stops for a while gets the number of lines that it has missed, and
    // the last line of all.
    let (reader, writer) = std::io::pipe().expect("a pipe");
    let worker = start(writer, "trace");
    fill(&worker);
    let text = rest(reader);
    let told = "log lines before this one were dropped";
    calls(&worker, 1);
    worker.until("the queue is empty", |worker| {
        let before = dropped(worker);
        calls(worker, 1);
        dropped(worker) == before
    });
    worker.end();
    let text = text.join().expect("text");
    assert!(text.contains(told));
    assert!(text.lines().any(|line| line.contains(" ended")));
}

#[test]
fn what_cannot_be_served_is_told_whoever_listens() {
    let arguments = [
        &["serve", "--model", "/nowhere"][..],
        &["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"],
    ]
    .concat();
    let (code, said) = run(&arguments, Sink::Read, Sink::Read);
    assert_eq!(code, Some(2));
    assert!(
        said.contains("imagegpt: ") && said.contains("/nowhere"),
        "{said}"
    );
    for err in BROKEN {
        assert_eq!(run(&arguments, Sink::Closed, err).0, Some(2), "{err:?}");
    }
    assert!(!Path::new("/nowhere").exists());
}
