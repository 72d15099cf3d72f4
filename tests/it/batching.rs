//! Late forming of batches, batches of several calls, and dropping of cancelled
//! work.

use std::time::Duration;

use imagegpt::engine::fake::Script;
use imagegpt::proto::pb;
use tonic::{Code, Request};

use crate::harness::{
    self, embed, fake_answer, gated, seeded, tokens, until, until_sample, vector,
};

#[tokio::test]
async fn what_arrives_while_the_engine_is_busy_shares_the_next_batch() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let call = |seed: u32| {
        let mut client = running.client.clone();
        tokio::spawn(async move {
            let response = client.embed(embed(vec![tokens(seeded(seed))])).await;
            vector(&response.expect("a response").into_inner().results[0]).expect("a vector")
        })
    };
    // The first goes alone: nothing else was there when the engine was free.
    let first = call(0);
    running.until_in_flight(1).await;
    wait_for_batches(&running, 1.0).await;
    let rest: Vec<_> = (1..=5).map(call).collect();
    running.until_in_flight(6).await;
    wait_for_depth(&running, 5.0).await;
    assert_eq!(
        batches(&running.metrics().await),
        1.0,
        "no batch is formed while the engine is busy"
    );
    open.send(()).expect("the first run");
    open.send(()).expect("the second run");
    assert_eq!(first.await.expect("no panic"), fake_answer(&seeded(0)));
    for (seed, answer) in (1..).zip(rest) {
        assert_eq!(answer.await.expect("no panic"), fake_answer(&seeded(seed)));
    }
    let page = running.metrics().await;
    assert_eq!(batches(&page), 2.0);
    let series = "imagegpt_batch_size_sum{graph=\"hidden\"}";
    assert_eq!(harness::sample(&page, series), 6.0);
    running.end().await;
}

/// Makes images that differ, so that they are not coalesced.
pub(crate) fn distinct(first_seed: u32, n: u32) -> Vec<pb::Image> {
    (first_seed..first_seed + n)
        .map(|seed| tokens(seeded(seed)))
        .collect()
}

const BATCHES: &str = "imagegpt_batch_size_count{graph=\"hidden\"}";

pub(crate) fn batches(page: &str) -> f64 {
    harness::sample(page, BATCHES)
}

pub(crate) async fn wait_for_batches(running: &harness::Running, n: f64) {
    until_sample(running, BATCHES, |count| count >= n).await;
}

pub(crate) async fn wait_for_depth(running: &harness::Running, n: f64) {
    until(running, &format!("{n} in the queue"), async || {
        let page = running.metrics().await;
        let of =
            |class| harness::sample(&page, &format!("imagegpt_queue_depth{{class=\"{class}\"}}"));
        of("interactive") + of("bulk") >= n
    })
    .await;
}

#[tokio::test]
async fn a_call_larger_than_a_batch_is_split_and_comes_back_in_order() {
    let mut running = harness::fake(Script::default(), &["--max-batch-size", "4"]).await;
    let images: Vec<Vec<u32>> = (0..50).map(seeded).collect();
    let response = running
        .client
        .embed(embed(images.iter().cloned().map(tokens).collect()))
        .await
        .expect("a response")
        .into_inner();
    assert_eq!(response.results.len(), 50);
    for (result, ids) in response.results.iter().zip(&images) {
        assert_eq!(vector(result).expect("a vector"), fake_answer(ids));
    }
    let page = running.metrics().await;
    let series = "imagegpt_batch_size_bucket{graph=\"hidden\",le=\"4\"}";
    assert_eq!(
        harness::sample(&page, series),
        batches(&page),
        "none above 4"
    );
    running.end().await;
}

#[tokio::test]
async fn an_engine_that_is_free_waits_the_queue_delay_for_company() {
    let running = harness::fake(Script::default(), &["--max-queue-delay", "300ms"]).await;
    let call = |seed: u32| {
        let mut client = running.client.clone();
        async move {
            client
                .embed(embed(vec![tokens(seeded(seed))]))
                .await
                .expect("a response")
        }
    };
    tokio::join!(call(1), call(2), call(3));
    assert_eq!(batches(&running.metrics().await), 1.0);
    let delay = "imagegpt_batches_total{close_reason=\"delay\"}";
    assert_eq!(running.sample(delay).await, 1.0);
    running.end().await;
}

#[tokio::test]
async fn a_late_call_is_told_so_and_costs_no_run() {
    for _ in 0..10 {
        if late_call().await {
            return;
        }
    }
    panic!("the client's own timer came first every time");
}

/// Makes a call that misses its deadline; returns true if the worker ended the
/// call, not the client's own timer.
async fn late_call() -> bool {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let mut blocking = running.client.clone();
    let blocking = tokio::spawn(async move { blocking.embed(embed(vec![harness::flat(1)])).await });
    wait_for_batches(&running, 1.0).await;
    let mut request = Request::new(embed(vec![harness::flat(2), harness::flat(3)]));
    request.set_timeout(Duration::from_millis(200));
    let error = running
        .client
        .clone()
        .embed(request)
        .await
        .expect_err("late");
    if harness::is_clients_timer(&error) {
        return false;
    }
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error}");
    // The places of the dead are free before the engine is.
    running.until_in_flight(1).await;
    open.send(()).expect("the first run");
    blocking.await.expect("no panic").expect("an answer");
    let page = running.metrics().await;
    assert_eq!(batches(&page), 1.0, "the late images were never run");
    let dropped = "imagegpt_images_dropped_total{reason=\"deadline\",stage=\"queue\"}";
    assert_eq!(harness::sample(&page, dropped), 2.0);
    let late = "imagegpt_images_total{code=\"DEADLINE_EXCEEDED\"}";
    assert_eq!(harness::sample(&page, late), 2.0);
    let calls = "imagegpt_requests_total{method=\"Embed\",code=\"DEADLINE_EXCEEDED\"}";
    assert_eq!(harness::sample(&page, calls), 1.0);
    running.end().await;
    true
}

#[tokio::test]
async fn a_caller_who_leaves_frees_its_place() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let mut blocking = running.client.clone();
    let blocking = tokio::spawn(async move { blocking.embed(embed(vec![harness::flat(1)])).await });
    wait_for_batches(&running, 1.0).await;
    let mut leaving = running.client.clone();
    let leaving = tokio::spawn(async move { leaving.embed(embed(distinct(10, 7))).await });
    wait_for_depth(&running, 7.0).await;
    leaving.abort();
    running.until_in_flight(1).await;
    open.send(()).expect("the first run");
    blocking.await.expect("no panic").expect("an answer");
    let cancelled = "imagegpt_images_dropped_total{reason=\"cancelled\",stage=\"queue\"}";
    assert_eq!(running.sample(cancelled).await, 7.0);
    assert_eq!(batches(&running.metrics().await), 1.0);
    running.end().await;
}

#[tokio::test]
async fn a_full_worker_refuses_at_once_and_serves_on() {
    let (open, script) = gated();
    let flags = [
        "--images-in-flight-max",
        "8",
        "--images-per-call-max",
        "8",
        "--max-batch-size",
        "8",
    ];
    let mut running = harness::fake(script, &flags).await;
    let mut filling = running.client.clone();
    let filling =
        tokio::spawn(async move { filling.embed(embed(vec![harness::flat(1); 8])).await });
    running.until_in_flight(8).await;
    let error = running
        .client
        .embed(embed(vec![harness::flat(2)]))
        .await
        .expect_err("full");
    assert_eq!(error.code(), Code::ResourceExhausted);
    assert!(
        error.message().contains("--images-in-flight-max"),
        "{error}"
    );
    // Lets all runs through: an image that is decoded only after the first has its
    // own.
    drop(open);
    filling.await.expect("no panic").expect("an answer");
    running
        .client
        .embed(embed(vec![harness::flat(2)]))
        .await
        .expect("there is room again");
    running.end().await;
}

#[tokio::test]
async fn graphs_do_not_share_a_batch() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let mut blocking = running.client.clone();
    let blocking = tokio::spawn(async move { blocking.embed(embed(vec![harness::flat(1)])).await });
    wait_for_batches(&running, 1.0).await;
    let (mut one, mut other) = (running.client.clone(), running.client.clone());
    let one = tokio::spawn(async move { one.embed(embed(distinct(30, 2))).await });
    let other = tokio::spawn(async move {
        let images = distinct(20, 2);
        other
            .classify(pb::ClassifyRequest {
                images,
                ..Default::default()
            })
            .await
    });
    wait_for_depth(&running, 4.0).await;
    for _ in 0..3 {
        open.send(()).expect("a run");
    }
    blocking.await.expect("no panic").expect("an answer");
    one.await.expect("no panic").expect("an answer");
    other.await.expect("no panic").expect("an answer");
    let page = running.metrics().await;
    assert_eq!(batches(&page), 2.0);
    let logits = "imagegpt_batch_size_count{graph=\"logits\"}";
    assert_eq!(harness::sample(&page, logits), 1.0);
    running.end().await;
}
