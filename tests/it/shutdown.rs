//! How it ends: in the process, and as a process under signals.

use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use imagegpt::engine::fake::Script;
use imagegpt::model::precision::Precision;
use imagegpt::proto::pb::generate_response;
use imagegpt::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use imagegpt::serve::worker::WorkerEnded;
use tonic::Code;
use tonic_types::StatusExt as _;

use crate::generate::compiled;
use crate::harness::{self, embed, fake_answer, seeded, tokens, vector};
use crate::stream::Conversation;

#[tokio::test]
async fn what_was_admitted_is_finished() {
    let (open, gate) = crossbeam_channel::bounded(64);
    let script = Script {
        gate: Some(gate),
        ..Default::default()
    };
    let running = harness::fake(script, &["--max-batch-size", "2"]).await;
    let mut client = running.client.clone();
    let images: Vec<Vec<u32>> = (0..9).map(seeded).collect();
    let request = embed(images.iter().cloned().map(tokens).collect());
    let call = tokio::spawn(async move { client.embed(request).await });
    running.until_in_flight(9).await;
    let metrics_addr = running.worker.metrics_addr;
    let readiness = running.worker.readiness().clone();
    let shutdown = tokio::spawn(running.worker.shutdown(harness::PATIENCE));
    harness::until("draining", || readiness.get().is_err()).await;
    assert_eq!(
        harness::get(metrics_addr, "/readyz").await,
        (503, "draining\n".to_owned())
    );
    // New work is refused: by the worker, or by the client itself once it has
    // been told that the connection takes no more.
    let late = running
        .client
        .clone()
        .embed(embed(vec![harness::flat(1)]))
        .await;
    let code = late.expect_err("draining").code();
    assert!(
        matches!(code, Code::Unavailable | Code::Cancelled),
        "{code:?}"
    );
    drop(open);
    let response = call
        .await
        .expect("no panic")
        .expect("an answer")
        .into_inner();
    for (result, ids) in response.results.iter().zip(&images) {
        assert_eq!(vector(result).expect("a vector"), fake_answer(ids));
    }
    drop(running.client);
    assert_eq!(shutdown.await.expect("no panic"), WorkerEnded::Clean);
}

#[tokio::test]
async fn a_grace_period_that_runs_out_ends_hard_and_says_what_was_left() {
    let (open, gate) = crossbeam_channel::bounded::<()>(1);
    let script = Script {
        gate: Some(gate),
        ..Default::default()
    };
    let running = harness::fake(script, &[]).await;
    let mut client = running.client.clone();
    let call = tokio::spawn(async move { client.embed(embed(vec![harness::flat(1); 3])).await });
    running.until_in_flight(3).await;
    let ended = running.worker.shutdown(Duration::from_millis(100)).await;
    assert_eq!(ended, WorkerEnded::Hard { calls: 1 });
    drop(open);
    drop(call);
}

/// A health watch, as clients with health checking keep one open, and a
/// connection that says nothing are no calls; nobody waits for them.
#[tokio::test(flavor = "multi_thread")]
async fn idle_connections_do_not_hold_the_end() {
    let running = harness::fake(Script::default(), &[]).await;
    let endpoint = format!("http://{}", running.worker.grpc_addr);
    let channel = tonic::transport::Channel::from_shared(endpoint)
        .expect("a URL")
        .connect()
        .await
        .expect("a connection");
    let request = tonic_health::pb::HealthCheckRequest::default();
    let mut watch = tonic_health::pb::health_client::HealthClient::new(channel)
        .watch(request)
        .await
        .expect("a watch")
        .into_inner();
    watch.message().await.expect("a status");
    let silent = tokio::net::TcpStream::connect(running.worker.grpc_addr)
        .await
        .expect("a connection");
    let started = Instant::now();
    assert_eq!(
        running.worker.shutdown(harness::PATIENCE).await,
        WorkerEnded::Clean
    );
    assert!(started.elapsed() < Duration::from_secs(5));
    drop((watch, silent));
}

/// The program itself, with the addresses that it logged.
struct Process {
    child: Child,
    grpc: SocketAddr,
    log: BufReader<std::process::ChildStderr>,
}

/// The micro model's.
fn process(flags: &[&str]) -> (Child, SocketAddr, BufReader<std::process::ChildStderr>) {
    let process = start(&harness::model_dir("micro"), flags);
    (process.child, process.grpc, process.log)
}

#[expect(
    clippy::zombie_processes,
    reason = "the test that gets the child waits for it"
)]
fn start(model: &Path, flags: &[&str]) -> Process {
    let mut child = Command::new(env!("CARGO_BIN_EXE_imagegpt"))
        .args([
            "serve",
            "--execution-provider",
            "cpu",
            "--log-format",
            "json",
        ])
        .args(["--listen", "127.0.0.1:0", "--metrics-listen", "127.0.0.1:0"])
        .args(flags)
        .arg("--model")
        .arg(model)
        .stderr(Stdio::piped())
        .spawn()
        .expect("the program");
    let mut log = BufReader::new(child.stderr.take().expect("a pipe"));
    let mut addr = None;
    let mut line = String::new();
    while log.read_line(&mut line).expect("a log line") > 0 {
        let event: serde_json::Value = serde_json::from_str(&line).expect("one JSON object a line");
        match event["message"].as_str() {
            Some("listening") => {
                let text = event["grpc"].as_str().expect("an address");
                addr = Some(text.parse().expect("an address"));
            }
            Some("ready") => {
                let grpc = addr.expect("listening comes first");
                return Process { child, grpc, log };
            }
            _ => {}
        }
        line.clear();
    }
    panic!("never ready");
}

fn kill(child: &Child, signal: &str) {
    let status = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status()
        .expect("kill");
    assert!(status.success());
}

// Several threads, because the test blocks while its client must answer the
// server's goodbye.
#[tokio::test(flavor = "multi_thread")]
async fn sigterm_and_sigint_end_the_program_with_0() {
    for signal in ["-TERM", "-INT"] {
        let (mut child, addr, log) = process(&[]);
        let mut client = ImageGptServiceClient::connect(format!("http://{addr}"))
            .await
            .expect("a connection");
        let response = client
            .embed(embed(vec![tokens(seeded(3))]))
            .await
            .expect("a response");
        vector(&response.get_ref().results[0]).expect("a vector");
        let started = Instant::now();
        kill(&child, signal);
        let rest: Vec<String> = log.lines().map_while(Result::ok).collect();
        let status = child.wait().expect("an end");
        assert_eq!(status.code(), Some(0), "{signal}: {rest:#?}");
        assert!(
            started.elapsed() < Duration::from_secs(10),
            "an open connection holds nothing"
        );
        assert!(
            rest.iter().any(|line| line.contains("draining")),
            "{rest:#?}"
        );
    }
}

#[tokio::test]
async fn a_worker_that_leaves_serves_on_and_one_that_drains_does_not() {
    let (open, gate) = crossbeam_channel::bounded(64);
    let script = Script {
        gate: Some(gate),
        ..Default::default()
    };
    let running = harness::fake(script, &[]).await;
    let metrics_addr = running.worker.metrics_addr;
    running.worker.leave();
    let page = harness::get(metrics_addr, "/readyz").await;
    assert_eq!(page, (503, "leaving\n".to_owned()));
    let channel =
        tonic::transport::Channel::from_shared(format!("http://{}", running.worker.grpc_addr));
    let channel = channel.expect("a URL").connect().await;
    let mut health = tonic_health::pb::health_client::HealthClient::new(
        channel.expect("new connections are taken, too"),
    );
    let check = health.check(tonic_health::pb::HealthCheckRequest::default());
    let status = check.await.expect("an answer").into_inner().status;
    assert_eq!(
        status,
        i32::from(tonic_health::pb::health_check_response::ServingStatus::NotServing)
    );
    open.send(()).expect("a run");
    let mut client = running.client.clone();
    let response = client.embed(embed(vec![tokens(seeded(1))])).await;
    let response = response.expect("it still serves").into_inner();
    let got = vector(&response.results[0]).expect("a vector");
    assert_eq!(got, fake_answer(&seeded(1)));

    // A call in progress keeps the connection open, on which a late one comes.
    let blocking = {
        let mut client = running.client.clone();
        tokio::spawn(async move { client.embed(embed(vec![harness::flat(2)])).await })
    };
    running.until_in_flight(1).await;
    let readiness = running.worker.readiness().clone();
    let shutdown = tokio::spawn(running.worker.shutdown(harness::PATIENCE));
    harness::until("draining", || readiness.serving().is_err()).await;
    let late = client.embed(embed(vec![harness::flat(3)])).await;
    let late = late.expect_err("draining");
    // By the worker, or by the client's own library once it knows that the
    // connection takes no more.
    match late.code() {
        Code::Unavailable => {
            let reason = late.get_details_error_info().map(|info| info.reason);
            assert_eq!(reason.as_deref(), Some("DRAINING"), "{late}");
        }
        code => assert_eq!(code, Code::Cancelled, "{late}"),
    }
    drop(open);
    blocking.await.expect("no panic").expect("an answer");
    drop((client, running.client, health));
    assert_eq!(shutdown.await.expect("no panic"), WorkerEnded::Clean);
}

#[test]
fn a_second_signal_ends_the_delay_and_the_program_but_not_within_a_second() {
    let (mut child, _, log) = process(&["--shutdown-delay", "1h"]);
    let started = Instant::now();
    kill(&child, "-TERM");
    let mut lines = log.lines().map_while(Result::ok);
    let leaving = lines.find(|line| line.contains("not ready"));
    assert!(leaving.is_some(), "it says so");
    // Over and over, as somebody impatient does it.
    while child.try_wait().expect("a child").is_none() {
        assert!(started.elapsed() < harness::PATIENCE);
        let _ = Command::new("kill")
            .args(["-TERM", &child.id().to_string()])
            .stderr(Stdio::null())
            .status();
        std::thread::sleep(Duration::from_millis(20));
    }
    assert!(started.elapsed() >= Duration::from_secs(1));
    assert_eq!(child.wait().expect("an end").code(), Some(1));
}

/// As `timeout` does it: one to the process, and one to its group.
#[test]
fn two_signals_at_once_are_one_request() {
    let (mut child, _, log) = process(&["--shutdown-delay", "500ms"]);
    kill(&child, "-TERM");
    let mut lines = log.lines().map_while(Result::ok);
    assert!(lines.any(|line| line.contains("not ready")), "it says so");
    kill(&child, "-TERM");
    kill(&child, "-INT");
    let rest: Vec<String> = lines.collect();
    assert_eq!(child.wait().expect("an end").code(), Some(0), "{rest:#?}");
}

/// The engine is in a step of the real runtime when the process ends, which must
/// not be torn down under it: that showed in about every fifth try.
#[tokio::test(flavor = "multi_thread")]
async fn an_end_amid_a_run_leaves_nothing_in_the_log_but_its_reason() {
    let folder = tempfile::tempdir().expect("a folder");
    let model = compiled(folder.path(), Precision::Fp32);
    for _ in 0..40 {
        let flags = ["--shutdown-grace-period", "1ms", "--generate-slots", "64"];
        let mut process = start(&model, &flags);
        let mut client = ImageGptServiceClient::connect(format!("http://{}", process.grpc))
            .await
            .expect("a connection");
        let request = imagegpt::proto::pb::GenerateRequest {
            samples: 64,
            ..Default::default()
        };
        let samples = client.generate(request).await.expect("a stream");
        let mut samples = samples.into_inner();
        let row = |message: imagegpt::proto::pb::GenerateResponse| {
            matches!(message.message, Some(generate_response::Message::Row(_)))
        };
        while !row(samples.message().await.expect("a message").expect("more")) {}
        kill(&process.child, "-TERM");
        let status = process.child.wait().expect("an end");
        let lines: Vec<String> = process.log.lines().map_while(Result::ok).collect();
        assert_eq!(status.code(), Some(1), "{lines:#?}");
        for line in &lines {
            let event: serde_json::Value = serde_json::from_str(line).expect("one JSON object");
            let is_end = event["message"] == "ended hard: the grace period ran out";
            assert!(event["level"] != "ERROR" || is_end, "{lines:#?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stalled_reader_does_not_hold_the_program() {
    let (mut child, addr, log) = process(&["--shutdown-grace-period", "20s"]);
    let client = ImageGptServiceClient::connect(format!("http://{addr}"))
        .await
        .expect("a connection");
    let options = imagegpt::proto::pb::EmbedStreamOptions::default();
    let conversation = Conversation::open(&client, options).await;
    conversation.item("never read", tokens(seeded(1))).await;
    let started = Instant::now();
    kill(&child, "-TERM");
    let rest: Vec<String> = log.lines().map_while(Result::ok).collect();
    let status = child.wait().expect("an end");
    assert_eq!(status.code(), Some(0), "{rest:#?}");
    assert!(started.elapsed() < Duration::from_secs(19), "{rest:#?}");
    drop(conversation);
}
