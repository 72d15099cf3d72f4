//! `imagegpt bench` against a worker with the fake engine.

use std::time::Duration;

use clap::Parser;
use imagegpt::commands::bench;
use imagegpt::commands::bench::BenchVerdict;
use imagegpt::commands::bench::flags::BenchArgs;
use imagegpt::engine::fake::Script;
use serde_json::Value;

use crate::bench_stub::{self, Lie};
use crate::harness::{self, Running};
use crate::process;

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    bench: BenchArgs,
}

/// Output of a run: its verdict, its table and its numbers.
struct Said {
    verdict: BenchVerdict,
    table: String,
    json: Value,
}

/// Runs the command with `arguments`, and with short measurements unless the
/// arguments say otherwise.
async fn run(running: &Running, arguments: &[&str]) -> Said {
    run_at(&[&running.url()], arguments).await
}

async fn run_at(endpoints: &[&str], arguments: &[&str]) -> Said {
    let folder = tempfile::tempdir().expect("a folder");
    let json = folder.path().join("result.json");
    let json_flag = json.to_str().expect("an UTF-8 path").to_owned();
    let mut all = vec!["bench"];
    all.extend_from_slice(arguments);
    for (flag, value) in [
        ("--duration", "800ms"),
        ("--warm-up", "200ms"),
        ("--connections", "2"),
        ("--json", &json_flag),
    ] {
        if !arguments.contains(&flag) {
            all.extend([flag, value]);
        }
    }
    if !endpoints.is_empty() {
        all.push("--endpoint");
        all.extend_from_slice(endpoints);
    }
    let args = Cli::try_parse_from(all)
        .expect("arguments that parse")
        .bench;
    // It has a runtime of its own, which may not be made inside another.
    let ran = tokio::task::spawn_blocking(move || {
        let mut table = Vec::new();
        let verdict = bench::run(&args, &mut table).expect("a run");
        (verdict, String::from_utf8(table).expect("text"))
    });
    let (verdict, table) = ran.await.expect("no panic");
    let json = std::fs::read(&json).expect("--json");
    Said {
        verdict,
        table,
        json: serde_json::from_slice(&json).expect("JSON"),
    }
}

impl Said {
    /// Returns a measurement by its name.
    fn measurement(&self, name: &str) -> &Value {
        let all = self.json["measurements"].as_array().expect("measurements");
        let named = all.iter().find(|one| one["name"] == name);
        named.unwrap_or_else(|| panic!("no {name:?} in {:#}", self.json))
    }

    fn finding(&self, name: &str) -> &Value {
        let value = &self.json["findings"][name];
        assert!(!value.is_null(), "no {name:?} in {:#}", self.json);
        value
    }
}

fn number(value: &Value) -> f64 {
    value
        .as_f64()
        .unwrap_or_else(|| panic!("no number: {value}"))
}

/// Checks the properties that every measurement must have.
fn check(said: &Said) {
    let all = said.json["measurements"].as_array().expect("measurements");
    for one in all {
        let calls = |codes: &Value| -> f64 {
            let codes = codes.as_object().expect("codes").values();
            codes.map(|code| number(&code["calls"])).sum()
        };
        let (rejected, failed) = (calls(&one["rejected"]), calls(&one["failed"]));
        assert_eq!(
            number(&one["sent"]),
            number(&one["answered"]) + rejected + failed + number(&one["abandoned"]),
            "{one:#}"
        );
        let mut latencies = vec![&one["latency"], &one["lateness"]];
        for codes in [&one["rejected"], &one["failed"]] {
            let codes = codes.as_object().expect("codes").values();
            latencies.extend(codes.map(|code| &code["latency"]));
        }
        for latency in latencies.into_iter().filter(|latency| !latency.is_null()) {
            let names = ["p50_ms", "p90_ms", "p99_ms", "p99_9_ms", "max_ms"];
            let values = names.map(|name| number(&latency[name]));
            assert!(values.is_sorted(), "{latency:#}");
        }
    }
}

fn millis(time: u64) -> Script {
    Script {
        delay: Duration::from_millis(time),
        ..Default::default()
    }
}

/// Flags for batches of 2 images, which take 20 ms: 100 images per second.
const SMALL: [&str; 2] = ["--max-batch-size", "2"];

#[tokio::test(flavor = "multi_thread")]
async fn saturate_counts_every_call() {
    let running = harness::fake(millis(20), &SMALL).await;
    let pid = std::process::id().to_string();
    let said = run(&running, &["saturate", "--callers", "1,8", "--pid", &pid]).await;
    check(&said);
    // One caller has one batch in 20 ms, eight fill two places each time.
    let rate = |name| number(&said.measurement(name)["images_per_second"]);
    let (one, eight) = (rate("saturate, 1 callers"), rate("saturate, 8 callers"));
    assert!((10.0..=51.0).contains(&one), "{one}");
    assert!(eight > 1.4 * one && eight <= 103.0, "{one} {eight}");
    assert!(number(&said.measurement("saturate, 1 callers")["server"]["rss_kib_max"]) > 0.0);
    assert_eq!(said.json["model"]["execution_provider"], "fake");
    assert_eq!(said.verdict, BenchVerdict::Fine);
    assert!(said.table.contains("saturation: "), "{}", said.table);

    let arguments = ["saturate", "--requests", "30", "--callers", "4"];
    let said = run(&running, &arguments).await;
    check(&said);
    assert_eq!(said.measurement("saturate, 4 callers")["sent"], 30);

    // Other tasks, several images a call.
    for task in ["classify", "tokenize"] {
        let arguments = ["saturate", "--task", task, "--images-per-call", "3"];
        let said = run(&running, &arguments).await;
        check(&said);
        let measurement = &said.json["measurements"][0];
        assert!(number(&measurement["answered"]) > 0.0, "{measurement:#}");
        assert_eq!(
            number(&measurement["images_answered"]),
            3.0 * number(&measurement["answered"])
        );
    }
    running.end().await;
}

/// Load at twice the worker's capacity: callers of a closed loop never wait
/// longer than for each other, but with an open loop calls queue up.
#[tokio::test(flavor = "multi_thread")]
async fn an_open_loop_shows_the_queue() {
    let running = harness::fake(millis(50), &SMALL).await;
    let said = run(&running, &["saturate", "--callers", "2"]).await;
    let closed = number(&said.measurement("saturate, 2 callers")["latency"]["p99_ms"]);
    let plot = tempfile::tempdir().expect("a folder");
    let plot = plot.path().join("plot.svg");
    let arguments = [
        "load",
        "--rate",
        "20,80",
        "--plot",
        plot.to_str().expect("UTF-8"),
    ];
    let said = run(&running, &arguments).await;
    check(&said);
    let p99 = |name| number(&said.measurement(name)["latency"]["p99_ms"]);
    // 0.8 s at 40 a second too many are 32 images, 0.8 s of work.
    let (fits, queues) = (p99("20 images/s"), p99("80 images/s"));
    assert!(queues > 400.0 && queues > 2.0 * fits, "{fits} {queues}");
    assert!(queues > 3.0 * closed, "{closed} {queues}");
    assert!(!said.measurement("20 images/s")["lateness"].is_null());
    let svg = std::fs::read_to_string(&plot).expect("--plot");
    assert!(svg.contains("<svg") && svg.contains("offered images/s"));
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn load_takes_shares_of_the_saturation() {
    let running = harness::fake(millis(20), &SMALL).await;
    let said = run(&running, &["load", "--of-saturation", "50", "--constant"]).await;
    check(&said);
    let offered = number(&said.measurement("50 %")["offered_images_per_second"]);
    let saturation = number(said.finding("saturation_images_per_second"));
    assert!((offered - saturation / 2.0).abs() < 1e-6);
    let sent = number(&said.measurement("50 %")["sent"]);
    assert!(
        (sent - 0.8 * offered).abs() <= 1.0 + 0.1 * sent,
        "{sent} {offered}"
    );
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn overload_tells_refusals_from_answers() {
    let flags = [
        "--max-batch-size",
        "2",
        "--images-in-flight-max",
        "8",
        "--images-per-call-max",
        "2",
    ];
    let running = harness::fake(millis(20), &flags).await;
    let said = run(&running, &["overload", "--times", "3", "--duration", "1s"]).await;
    check(&said);
    let rejected = &said.measurement("3 x saturation")["rejected"]["RESOURCE_EXHAUSTED"];
    assert!(number(&rejected["calls"]) > 20.0, "{rejected:#}");
    let row = &said.finding("overload")[0];
    let goodput = number(&row["goodput_percent_of_saturation"]);
    assert!((70.0..130.0).contains(&goodput), "{row:#}");
    assert!(number(&row["reject_p99_ms"]) < 500.0, "{row:#}");
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mixed_and_slow_readers_report_what_they_saw() {
    let running = harness::fake(millis(10), &SMALL).await;
    let said = run(&running, &["mixed", "--of-saturation", "20"]).await;
    check(&said);
    assert!(number(said.finding("bulk_images_per_second")) > 0.0);
    assert!(number(said.finding("bulk_percent_of_what_was_left")) > 20.0);
    said.finding("interactive_p99_alone_ms");
    said.finding("interactive_p99_beside_bulk_ms");

    running.end().await;

    // Thousands of small items fit into the windows of a stream that nobody
    // reads, and all are answered in the end: so an engine that costs nothing.
    let running = harness::fake(Script::default(), &SMALL).await;
    let arguments = ["slow-reader", "--readers", "2", "--rate", "50"];
    let said = run(&running, &arguments).await;
    check(&said);
    if said.json["findings"]["skipped"].is_null() {
        assert!(number(said.finding("items_answered_in_the_end")) > 0.0);
        assert_eq!(said.json["broken"], Value::Array(Vec::new()));
    } else {
        assert!(said.table.contains("UNIMPLEMENTED"), "{}", said.table);
    }
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn soak_verifies_every_answer() {
    let running = harness::fake(millis(1), &["--max-batch-size", "8"]).await;
    let said = run(&running, &["soak", "--duration", "2s"]).await;
    assert_eq!(
        said.verdict,
        BenchVerdict::Fine,
        "{}\n{:#}",
        said.table,
        said.json
    );
    let ledger = said.finding("ledger");
    for happened in ["verified", "left", "garbage_refused", "late"] {
        assert!(number(&ledger[happened]) > 0.0, "{happened}: {ledger:#}");
    }
    for broke in ["wrong", "lost", "doubled", "garbage_taken"] {
        assert_eq!(ledger[broke], 0, "{broke}: {ledger:#}");
    }
    running.end().await;
}

/// The soak must notice a worker whose runs all fail.
#[tokio::test(flavor = "multi_thread")]
async fn soak_sees_what_breaks() {
    let script = Script {
        // Images begin with their number's lowest digit.
        fail_on: Some(3),
        ..Default::default()
    };
    let running = harness::fake(script, &["--max-batch-size", "8"]).await;
    let said = run(&running, &["soak", "--streams", "0"]).await;
    assert_eq!(said.verdict, BenchVerdict::Broken);
    assert!(
        said.table
            .contains("BROKEN: unexpected INTERNAL of an image"),
        "{}",
        said.table
    );
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_knee_lies_below_saturation() {
    let running = harness::fake(millis(20), &SMALL).await;
    let arguments = ["knee", "--p99", "150ms", "--duration", "500ms"];
    let said = run(&running, &arguments).await;
    check(&said);
    let knee = number(said.finding("knee_images_per_second"));
    assert!(knee <= number(said.finding("saturation_images_per_second")));
    let said = run(&running, &["knee", "--p99", "1ms", "--duration", "300ms"]).await;
    assert_eq!(number(said.finding("knee_images_per_second")), 0.0);
    running.end().await;
}

/// The command starts workers itself, with the program that was built.
#[tokio::test(flavor = "multi_thread")]
async fn the_knee_of_settings_recommends_flags() {
    let model = harness::model_dir("micro");
    let serve = format!("--model {} --fake-engine 10ms+1ms", model.display());
    let arguments = [
        "knee",
        "--p99",
        "200ms",
        "--program",
        process::PROGRAM,
        "--serve",
        &serve,
        "--batch-sizes",
        "1,4",
        "--queue-delays",
        "0ms",
        "--duration",
        "400ms",
    ];
    let said = run_at(&[], &arguments).await;
    check(&said);
    let settings = said.finding("settings").as_array().expect("rows").clone();
    assert_eq!(settings.len(), 2);
    let saturation = |row: &Value| number(&row["saturation_images_per_second"]);
    assert!(saturation(&settings[1]) > 1.5 * saturation(&settings[0]));
    assert_eq!(said.finding("recommended")["max_batch_size"], 4);
}

/// Calls go to another worker while one worker is down.
#[tokio::test(flavor = "multi_thread")]
async fn retries_go_to_the_next_worker() {
    let running = harness::fake(millis(1), &SMALL).await;
    let gone = harness::fake(millis(1), &SMALL).await;
    let endpoints = [&running, &gone].map(Running::url);
    let endpoints: Vec<&str> = endpoints.iter().map(String::as_str).collect();
    let arguments = [
        "saturate",
        "--retries",
        "5",
        "--duration",
        "2s",
        "--callers",
        "4",
    ];
    // The worker leaves only after it has answered: on a busy machine the
    // command may take seconds to connect, and a worker that is gone before
    // that would end it.
    let leave = async {
        let answered = r#"imagegpt_requests_total{method="Embed",code="OK"}"#;
        harness::until(&gone, "answers of both workers", async || {
            gone.sample(answered).await >= 50.0
        })
        .await;
        gone.end().await;
    };
    let (said, ()) = tokio::join!(run_at(&endpoints, &arguments), leave);
    check(&said);
    let measurement = &said.json["measurements"][0];
    assert!(number(&measurement["retries"]) > 0.0, "{measurement:#}");
    assert_eq!(measurement["failed"], Value::Object(serde_json::Map::new()));
    running.end().await;
}

/// Streams against a stub that answers correctly first, and then wrongly.
#[tokio::test(flavor = "multi_thread")]
async fn soak_sees_lost_doubled_and_swapped_items() {
    for (lie, broke) in [
        (Lie::None, None),
        (Lie::Double, Some("doubled")),
        (Lie::Lose, Some("lost")),
        (Lie::Swap, Some("wrong")),
    ] {
        let endpoint = format!("http://{}", bench_stub::start(lie).await);
        let arguments = ["soak", "--callers", "2", "--streams", "4"];
        let said = run_at(&[&endpoint], &arguments).await;
        let ledger = said.finding("ledger");
        assert!(number(&ledger["stream_items"]) > 0.0, "{ledger:#}");
        for count in ["wrong", "lost", "doubled"] {
            let expected = broke == Some(count);
            assert_eq!(
                number(&ledger[count]) > 0.0,
                expected,
                "{lie:?}: {ledger:#}"
            );
        }
        let expected = match broke {
            None => BenchVerdict::Fine,
            Some(_) => BenchVerdict::Broken,
        };
        assert_eq!(said.verdict, expected, "{lie:?}: {}", said.table);
    }
}

/// Runs the command without any worker, and returns its error.
async fn refused(arguments: &[&str]) -> String {
    let all = ["bench", "--endpoint", "http://127.0.0.1:1"].iter();
    let args = Cli::try_parse_from(all.chain(arguments))
        .expect("arguments that parse")
        .bench;
    let ran = tokio::task::spawn_blocking(move || bench::run(&args, &mut Vec::new()));
    let error = ran.await.expect("no panic").expect_err("a refusal");
    format!("{error:#}")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_end_well_is_told_before_the_load() {
    let folder = tempfile::tempdir().expect("a folder");
    let folder = folder.path().to_str().expect("UTF-8");
    for (arguments, words) in [
        (["saturate", "--json", "/nowhere/a.json"], "--json /nowhere"),
        (["load", "--plot", folder], "is a directory"),
        (["soak", "--pid", "4294967295"], "there is no such process"),
        // What all of them would come to.
        (["saturate", "--seed", "1"], "no worker answers"),
    ] {
        let error = refused(&arguments).await;
        assert!(error.contains(words), "{arguments:?}: {error}");
    }
}

/// Every mode reports that its worker has disappeared, and does not report its
/// figures as the worker's capacity.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_goes_away_is_told() {
    let mut modes = tokio::task::JoinSet::new();
    for arguments in [
        &["saturate", "--callers", "2,4"][..],
        &["load", "--rate", "50,60"],
        &["load"],
        &["overload"],
        &["mixed", "--rate", "20"],
        &["slow-reader", "--rate", "50"],
        &["soak"],
        &["knee", "--p99", "1s"],
    ] {
        modes.spawn(async move {
            let running = harness::fake(millis(5), &SMALL).await;
            let endpoint = running.url();
            let arguments = [arguments, &["--duration", "1500ms"]].concat();
            let leave = async {
                harness::pause(Duration::from_millis(700)).await;
                running.end().await;
            };
            let endpoints = [endpoint.as_str()];
            let (said, ()) = tokio::join!(run_at(&endpoints, &arguments), leave);
            assert_eq!(
                said.verdict,
                BenchVerdict::Broken,
                "{arguments:?}: {}",
                said.table
            );
            assert!(
                said.table.contains("the worker went away"),
                "{arguments:?}: {}",
                said.table
            );
            let findings = said.json["findings"].as_object().expect("findings");
            let none = [
                "saturation_images_per_second",
                "knee_images_per_second",
                "overload",
            ];
            for number in none {
                assert!(
                    !findings.contains_key(number),
                    "{arguments:?}: {findings:#?}"
                );
            }
            // Remarks on measurements are indented.
            let is_finding = |line: &str| line.starts_with("saturation: ");
            assert!(!said.table.lines().any(is_finding), "{}", said.table);
        });
    }
    modes.join_all().await;
}

/// The exit code reports a worker that has disappeared, and a worker that
/// refuses all calls.
#[tokio::test(flavor = "multi_thread")]
async fn the_exit_code_tells_of_calls_without_answers() {
    let exit_code = |endpoint: String, task: &'static str| {
        tokio::task::spawn_blocking(move || {
            let ran = process::program()
                .args(["bench", "saturate", "--endpoint", &endpoint, "--task", task])
                .args(["--warm-up", "0s", "--duration", "1s", "--callers", "2"])
                .output()
                .expect("the program");
            let text = String::from_utf8_lossy(&ran.stdout).into_owned();
            (ran.status.code(), text)
        })
    };
    let running = harness::fake(millis(5), &SMALL).await;
    let endpoint = running.url();
    let (code, text) = exit_code(endpoint.clone(), "embed")
        .await
        .expect("no panic");
    assert_eq!(code, Some(0), "{text}");
    let leave = async {
        harness::pause(Duration::from_millis(500)).await;
        running.end().await;
    };
    let (ran, ()) = tokio::join!(exit_code(endpoint, "embed"), leave);
    let (code, text) = ran.expect("no panic");
    assert_eq!(code, Some(1), "{text}");

    // It can only classify.
    let dir = harness::model_dir("no-labels");
    let engine = harness::fake_factory(Script::default());
    let only_classify = harness::start(&dir, &SMALL, Some(engine)).await;
    let endpoint = only_classify.url();
    let (code, text) = exit_code(endpoint, "embed").await.expect("no panic");
    assert_eq!(code, Some(1), "{text}");
    assert!(
        text.contains("no call was answered (UNIMPLEMENTED"),
        "{text}"
    );
    only_classify.end().await;
}

/// The client's side of a stream: a reader that stops and then reads
/// everything, and a bulk load that counts its answers.
#[tokio::test(flavor = "multi_thread")]
async fn streams_stall_and_recover() {
    let endpoint = format!("http://{}", bench_stub::start(Lie::None).await);
    let arguments = ["slow-reader", "--readers", "2", "--rate", "50"];
    let said = run_at(&[&endpoint], &arguments).await;
    check(&said);
    assert_eq!(said.verdict, BenchVerdict::Fine, "{}", said.table);
    let taken = number(said.finding("items_taken_while_stalled"));
    assert!(taken > 16.0, "{taken}");
    assert!(number(said.finding("items_answered_in_the_end")) >= taken);

    let said = run_at(&[&endpoint], &["mixed", "--rate", "50"]).await;
    check(&said);
    assert_eq!(said.finding("bulk_kind"), "stream");
    assert!(number(said.finding("bulk_images_per_second")) > 100.0);
}
