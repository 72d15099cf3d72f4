//! A rolling restart under load: three real workers are replaced one after the
//! other, and no interactive call fails.
//!
//! The load is `imagegpt bench load`, round robin over the three. Like gRPC
//! clients with a retry policy, it retries a call that is answered UNAVAILABLE
//! on the next worker: a worker answers so only for calls that it has not
//! accepted.

#![warn(clippy::disallowed_methods)]

use std::process::{Output, Stdio};
use std::time::Duration;

use crate::process::Worker;

mod process;

/// Calls per second; all workers together could do ten times as many.
const RATE: u32 = 100;
/// Duration of the load in seconds, long enough for three restarts.
const SECONDS: u64 = 9;
#[test]
fn a_rolling_restart_fails_no_call() {
    let model = concat!(env!("CARGO_MANIFEST_DIR"), "/models/untrained");
    let flags = [
        ["--model", model],
        ["--fake-engine", "2ms+1ms"],
        ["--shutdown-delay", "300ms"],
    ]
    .concat();
    let mut workers: Vec<Option<Worker>> = (0..3)
        .map(|_| Some(Worker::start(&flags, Stdio::null())))
        .collect();
    let endpoints: Vec<String> = workers.iter().flatten().map(Worker::url).collect();
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("load.json");
    let load = process::program()
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
        process::pause(Duration::from_millis(700));
        *worker = worker.take().map(Worker::end_and_replace);
    }
    let output: Output = load.wait_with_output().expect("the load's end");
    let said = process::said(&output);
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
        let answered = worker.sample("imagegpt_requests_total{method=\"Embed\",code=\"OK\"}");
        assert!(answered.expect("the series") > 0.0, "each serves again");
    }
}
