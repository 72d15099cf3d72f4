//! Callers with names: their limits, their classes, and fair shares among them.

use std::time::Duration;

use imagegpt::engine::fake::Script;
use imagegpt::proto::pb;
use tonic::metadata::MetadataMap;
use tonic::{Code, Request, Status};
use tonic_types::StatusExt as _;

use crate::batching::{distinct, wait_for_batches, wait_for_depth};
use crate::harness::{self, Client, Running, embed, flat, gated, seeded, tokens, until_sample};
use crate::stream::{Conversation, reason};

/// Returns the token of a caller in the files of these tests.
fn token(name: &str) -> String {
    format!("token-of-caller-{name}")
}

/// Worker whose tokens file is in a directory that is kept.
struct Named {
    running: Running,
    dir: tempfile::TempDir,
}

impl Named {
    /// Starts a worker; each line is a name with its options.
    async fn start(script: Script, lines: &[&str], flags: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("a directory");
        write(&dir, lines);
        let path = dir.path().join("tokens").display().to_string();
        let flags = [flags, &["--auth-tokens-file", &path]].concat();
        let running = harness::fake(script, &flags).await;
        Self { running, dir }
    }

    /// Opens a connection.
    async fn client(&self) -> Client {
        harness::connect(&self.running.worker).await
    }

    /// Returns the number of answered calls of a caller, whose series begins
    /// with its first call.
    async fn answered(&self, caller: &str) -> f64 {
        let page = self.running.metrics().await;
        let series = ok(caller);
        let line = page.lines().find_map(|line| line.strip_prefix(&series));
        line.map_or(0.0, |count| count.trim().parse().expect("a number"))
    }
}

/// Writes the tokens file, in place of one that is there.
fn write(dir: &tempfile::TempDir, lines: &[&str]) {
    let line = |line: &&str| {
        let (name, options) = line.split_once(' ').unwrap_or((line, ""));
        format!("{name} {} {options}", token(name))
    };
    let named: Vec<String> = lines.iter().map(line).collect();
    let text = format!("{}\n{}\n", token(""), named.join("\n"));
    let next = dir.path().join("next");
    std::fs::write(&next, text).expect("written");
    std::fs::rename(next, dir.path().join("tokens")).expect("renamed");
}

fn ok(caller: &str) -> String {
    format!("imagegpt_requests_total{{method=\"Embed\",code=\"OK\",caller=\"{caller}\"}}")
}

fn authorize(metadata: &mut MetadataMap, name: &str) {
    let value = format!("Bearer {}", token(name));
    metadata.insert("authorization", value.parse().expect("ASCII"));
}

fn request(name: &str, images: Vec<pb::Image>) -> Request<pb::EmbedRequest> {
    let mut request = Request::new(embed(images));
    authorize(request.metadata_mut(), name);
    request
}

type Call = tokio::task::JoinHandle<Result<tonic::Response<pb::EmbedResponse>, Status>>;

fn call(client: &Client, name: &str, images: Vec<pb::Image>) -> Call {
    let mut client = client.clone();
    let request = request(name, images);
    tokio::spawn(async move { client.embed(request).await })
}

async fn refused(client: &Client, name: &str, images: Vec<pb::Image>) -> Status {
    let outcome = call(client, name, images).await.expect("no panic");
    outcome.expect_err("a refusal")
}

async fn stream(client: &Client, name: &str) -> Conversation {
    let name = name.to_owned();
    let change = move |request: &mut Request<_>| authorize(request.metadata_mut(), &name);
    Conversation::open_as(client, pb::EmbedStreamOptions::default(), change).await
}

#[tokio::test]
async fn a_caller_with_a_thousand_images_waiting_does_not_starve_another() {
    let (open, script) = gated();
    let flags = [
        "--max-batch-size",
        "4",
        "--max-queue-delay",
        "0s",
        "--images-in-flight-max",
        "4096",
    ];
    let named = Named::start(script, &["many", "few"], &flags).await;
    let blocking = call(&named.client().await, "", vec![flat(15)]);
    wait_for_batches(&named.running, 1.0).await;
    let mut calls = Vec::new();
    for (name, first, n) in [("many", 0, 1000), ("few", 5000, 100)] {
        let client = named.client().await;
        calls.extend(
            distinct(first, n)
                .into_iter()
                .map(|image| call(&client, name, vec![image])),
        );
    }
    wait_for_depth(&named.running, 1100.0).await;
    open.send(()).expect("a run");
    blocking.await.expect("no panic").expect("an answer");
    // Ten to one waits, and one to one is served.
    for n in 1..=25 {
        open.send(()).expect("a run");
        harness::until(&named.running, "answers of a run", async || {
            named.answered("few").await + named.answered("many").await == f64::from(4 * n)
        })
        .await;
        assert_eq!(named.answered("few").await, f64::from(2 * n));
    }
    drop(open);
    for call in calls {
        call.await.expect("no panic").expect("an answer");
    }
    assert_eq!(named.answered("many").await, 1000.0);
    assert_eq!(named.answered("few").await, 100.0);
    named.running.end().await;
}

#[tokio::test]
async fn who_shares_work_does_not_wait_behind_the_others_images() {
    let (open, script) = gated();
    let flags = ["--max-batch-size", "1", "--max-queue-delay", "0s"];
    let named = Named::start(script, &["many", "few"], &flags).await;
    let client = named.client().await;
    let blocking = call(&client, "", vec![flat(15)]);
    wait_for_batches(&named.running, 1.0).await;
    let calls: Vec<Call> = distinct(0, 20)
        .into_iter()
        .map(|image| call(&client, "many", vec![image]))
        .collect();
    wait_for_depth(&named.running, 20.0).await;
    let shared = call(&client, "few", distinct(19, 1));
    let coalesced = "imagegpt_images_coalesced_total";
    until_sample(&named.running, coalesced, |n| n == 1.0).await;
    // One run for the call that blocks, and then one for each caller.
    for _ in 0..3 {
        open.send(()).expect("a run");
    }
    blocking.await.expect("no panic").expect("an answer");
    shared.await.expect("no panic").expect("an answer");
    assert!(named.answered("many").await <= 2.0);
    drop(open);
    for call in calls {
        call.await.expect("no panic").expect("an answer");
    }
    named.running.end().await;
}

#[tokio::test]
async fn a_rate_rejects_calls_and_says_when_to_retry() {
    let flags = ["--images-per-call-max", "2", "--samples-per-call-max", "2"];
    let named = Named::start(Script::default(), &["slow rate=2/h", "other"], &flags).await;
    let client = named.client().await;
    call(&client, "slow", distinct(0, 2))
        .await
        .expect("no panic")
        .expect("the burst");
    let status = refused(&client, "slow", distinct(2, 1)).await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(reason(&status), "CALLER_LIMIT");
    assert!(
        status
            .message()
            .starts_with("the caller \"slow\" is over its limit rate=2/h (--auth-tokens-file)"),
        "{}",
        status.message()
    );
    let retry = status.get_details_retry_info().expect("a RetryInfo");
    let seconds = retry.retry_delay.expect("a time").as_secs();
    assert!((1700..=1800).contains(&seconds), "{seconds}");
    for name in ["other", ""] {
        call(&client, name, distinct(3, 2))
            .await
            .expect("no panic")
            .expect("not limited");
    }
    named.running.end().await;
}

#[tokio::test]
async fn a_streams_item_waits_for_the_rate_but_not_while_the_worker_drains() {
    let flags = ["--images-per-call-max", "2", "--samples-per-call-max", "2"];
    let named = Named::start(Script::default(), &["slow rate=1/h"], &flags).await;
    let client = named.client().await;
    let mut conversation = stream(&client, "slow").await;
    for idx in 0..3 {
        let id = idx.to_string();
        conversation.item(&id, tokens(seeded(idx))).await;
    }
    let mut ids = [conversation.answer().await.0, conversation.answer().await.0];
    ids.sort();
    assert_eq!(ids, ["0", "1"]);
    // A second stream of the caller ends at its deadline.
    let mut late = Conversation::open_as(&client, pb::EmbedStreamOptions::default(), |request| {
        authorize(request.metadata_mut(), "slow");
        request.set_timeout(Duration::from_secs(1));
    })
    .await;
    late.item("late", tokens(seeded(9))).await;
    let (answers, end) = late.rest().await;
    assert!(answers.is_empty(), "{answers:?}");
    assert_eq!(end.expect("a status").code(), Code::DeadlineExceeded);
    let rest = tokio::spawn(async move { conversation.rest().await });
    named.running.end().await;
    let (answers, end) = rest.await.expect("no panic");
    assert_eq!(answers.len(), 1);
    assert_eq!(answers[0].0, "2");
    assert_eq!(end.expect("a status").code(), Code::Unavailable);
}

#[tokio::test]
async fn images_in_flight_of_a_caller_are_limited() {
    let (open, script) = gated();
    let named = Named::start(script, &["small in-flight=2", "other"], &[]).await;
    let client = named.client().await;
    let first = call(&client, "small", distinct(0, 2));
    named.running.until_in_flight(2).await;
    let status = refused(&client, "small", distinct(2, 1)).await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(reason(&status), "CALLER_LIMIT");
    assert!(
        status.message().contains("in-flight=2"),
        "{}",
        status.message()
    );
    assert!(status.get_details_retry_info().is_some());
    let status = refused(&client, "small", distinct(2, 3)).await;
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(reason(&status), "NEVER_FITS");
    // Items of a stream wait, and hold no place of others.
    let mut conversation = stream(&client, "small").await;
    for idx in 0..4 {
        let id = idx.to_string();
        conversation.item(&id, tokens(seeded(100 + idx))).await;
    }
    let other = call(&client, "other", distinct(10, 3));
    named.running.until_in_flight(5).await;
    drop(open);
    for answered in [first, other] {
        answered.await.expect("no panic").expect("an answer");
    }
    let (id, outcome) = conversation.answer().await;
    assert_eq!(id, "0");
    outcome.expect("a vector");
    drop(conversation);
    named.running.until_in_flight(0).await;
    call(&client, "small", distinct(20, 2))
        .await
        .expect("no panic")
        .expect("room again");
    named.running.end().await;
}

#[tokio::test]
async fn a_caller_of_class_bulk_is_bulk_whatever_it_asks() {
    let (open, script) = gated();
    let lines = ["batch class=bulk", "ordinary"];
    let named = Named::start(script, &lines, &["--max-queue-delay", "0s"]).await;
    let client = named.client().await;
    let blocking = call(&client, "", vec![flat(15)]);
    wait_for_batches(&named.running, 1.0).await;
    let mut calls = vec![blocking];
    for (name, seed) in [("batch", 1), ("ordinary", 2)] {
        let mut asks = request(name, distinct(seed, 1));
        let class = "interactive".parse().expect("ASCII");
        asks.metadata_mut().insert("imagegpt-priority", class);
        let mut client = client.clone();
        calls.push(tokio::spawn(async move { client.embed(asks).await }));
    }
    for class in ["bulk", "interactive"] {
        let depth = format!("imagegpt_queue_depth{{class=\"{class}\"}}");
        until_sample(&named.running, &depth, |n| n == 1.0).await;
    }
    drop(open);
    for call in calls {
        call.await.expect("no panic").expect("an answer");
    }
    named.running.end().await;
}

#[tokio::test]
async fn a_caller_above_its_share_leaves_room_for_others() {
    let (open, script) = gated();
    let flags = [
        "--images-in-flight-max",
        "16",
        "--images-per-call-max",
        "16",
    ];
    let named = Named::start(script, &["greedy", "modest"], &flags).await;
    let client = named.client().await;
    let first = call(&client, "greedy", distinct(0, 14));
    named.running.until_in_flight(14).await;
    let status = refused(&client, "greedy", distinct(20, 1)).await;
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert_eq!(reason(&status), "OVER_SHARE");
    assert!(status.get_details_retry_info().is_some());
    let second = call(&client, "modest", distinct(30, 2));
    named.running.until_in_flight(16).await;
    drop(open);
    for answered in [first, second] {
        answered.await.expect("no panic").expect("an answer");
    }
    named.running.end().await;
}

#[tokio::test]
async fn a_reload_changes_callers_and_keeps_the_state_of_the_others() {
    let flags = ["--images-per-call-max", "1", "--samples-per-call-max", "1"];
    let named = Named::start(Script::default(), &["slow rate=1/h"], &flags).await;
    let client = named.client().await;
    call(&client, "slow", distinct(0, 1))
        .await
        .expect("no panic")
        .expect("the burst");
    assert_eq!(
        refused(&client, "new", distinct(1, 1)).await.code(),
        Code::Unauthenticated
    );
    write(&named.dir, &["new", "slow rate=1/h"]);
    let reloads = "imagegpt_reloads_total{file=\"tokens\"}";
    until_sample(&named.running, reloads, |n| n == 1.0).await;
    call(&client, "new", distinct(1, 1))
        .await
        .expect("no panic")
        .expect("a caller now");
    let status = refused(&client, "slow", distinct(2, 1)).await;
    assert_eq!(reason(&status), "CALLER_LIMIT", "its hour is not over");
    write(&named.dir, &["slow rate=1000/s"]);
    until_sample(&named.running, reloads, |n| n == 2.0).await;
    call(&client, "slow", distinct(3, 1))
        .await
        .expect("no panic")
        .expect("another rate");
    let page = named.running.metrics().await;
    assert_eq!(harness::sample(&page, &ok("new")), 1.0);
    assert_eq!(harness::sample(&page, &ok("slow")), 2.0);
    named.running.end().await;
}
