//! A rolling restart under load: three real workers are replaced one after the
//! other, and no interactive call fails.
//!
//! The load is `imagegpt bench load`, round robin over the three. As gRPC
//! clients with a retry policy do, it tries a call that is answered UNAVAILABLE
//! on the next worker: a worker says that only of calls that it has not taken.

use std::io::Read;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

/// Calls a second; the workers together could do ten times as many.
const RATE: u32 = 100;
/// Long enough for three restarts.
const SECONDS: u64 = 9;
/// How long anything may take before the test gives up.
const PATIENCE: Duration = Duration::from_mins(1);

struct Worker {
    child: Child,
    grpc: SocketAddr,
    metrics: SocketAddr,
}

impl Worker {
    fn start(grpc: SocketAddr, metrics: SocketAddr) -> Self {
        let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/untrained");
        let child = Command::new(env!("CARGO_BIN_EXE_imagegpt"))
            .args(["serve", "--model", model, "--fake-engine", "2ms+1ms"])
            .args(["--listen", &grpc.to_string()])
            .args(["--metrics-listen", &metrics.to_string()])
            .args(["--shutdown-delay", "300ms"])
            .stderr(Stdio::null())
            .spawn()
            .expect("a worker");
        let worker = Self {
            child,
            grpc,
            metrics,
        };
        worker.until_ready();
        worker
    }

    fn until_ready(&self) {
        let started = Instant::now();
        while !get(self.metrics, "/readyz").contains("200 OK") {
            assert!(started.elapsed() < PATIENCE, "a worker is never ready");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Interactive calls that it has answered.
    fn answered(&self) -> u64 {
        let page = get(self.metrics, "/metrics");
        let series = "imagegpt_requests_total{method=\"Embed\",code=\"OK\"} ";
        let line = page.lines().find_map(|line| line.strip_prefix(series));
        line.expect("the series").parse().expect("a count")
    }

    /// SIGTERM, and its end.
    fn end(mut self) -> (SocketAddr, SocketAddr) {
        let pid = self.child.id().to_string();
        let sent = Command::new("kill").args(["-TERM", &pid]).status();
        assert!(sent.expect("kill").success());
        let started = Instant::now();
        let status = loop {
            if let Some(status) = self.child.try_wait().expect("a child") {
                break status;
            }
            assert!(started.elapsed() < PATIENCE, "a worker never ends");
            std::thread::sleep(Duration::from_millis(10));
        };
        assert_eq!(status.code(), Some(0), "a clean end");
        (self.grpc, self.metrics)
    }
}

/// A test that fails must not leave its workers behind.
impl Drop for Worker {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A whole response over HTTP/1.1, empty while nobody listens.
fn get(addr: SocketAddr, path: &str) -> String {
    let mut text = String::new();
    let Ok(mut stream) = TcpStream::connect(addr) else {
        return text;
    };
    let request = format!("GET {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    if std::io::Write::write_all(&mut stream, request.as_bytes()).is_ok() {
        let _ = stream.read_to_string(&mut text);
    }
    text
}

/// A port that was free a moment ago, to give to a process.
fn free_port() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.local_addr().expect("its address")
}

#[test]
fn a_rolling_restart_fails_no_call() {
    let mut workers: Vec<Option<Worker>> = (0..3)
        .map(|_| Some(Worker::start(free_port(), free_port())))
        .collect();
    let endpoints: Vec<String> = workers
        .iter()
        .flatten()
        .map(|worker| format!("http://{}", worker.grpc))
        .collect();
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("load.json");
    let load = Command::new(env!("CARGO_BIN_EXE_imagegpt"))
        .args(["bench", "load", "--endpoint", &endpoints.join(",")])
        .args(["--rate", &RATE.to_string(), "--warm-up", "0s"])
        .args(["--duration", &format!("{SECONDS}s"), "--retries", "3"])
        .arg("--json")
        .arg(&json)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a load");
    for worker in &mut workers {
        // Each restart finds all three at work.
        std::thread::sleep(Duration::from_millis(700));
        let (grpc, metrics) = worker.take().expect("a worker").end();
        *worker = Some(Worker::start(grpc, metrics));
    }
    let output: Output = load.wait_with_output().expect("the load's end");
    let said = format!(
        "{}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    assert!(output.status.success(), "{said}");
    let json: serde_json::Value =
        serde_json::from_slice(&std::fs::read(&json).expect("a file")).expect("JSON");
    let counts = &json["measurements"][0];
    let count = |name: &str| counts[name].as_u64().expect(name);
    assert!(
        count("sent") >= u64::from(RATE) * SECONDS * 8 / 10,
        "{counts:#}"
    );
    assert_eq!(count("answered"), count("sent"), "{said}");
    for bad in ["failed", "rejected", "images_failed"] {
        let none = counts[bad]
            .as_object()
            .is_some_and(serde_json::Map::is_empty);
        assert!(none, "{bad}: {counts:#}");
    }
    for worker in workers.iter().flatten() {
        assert!(worker.answered() > 0, "each serves again");
    }
}
