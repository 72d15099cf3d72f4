//! Priority classes, coalescing of identical requests, stopped runs, and
//! rejections with a time until a retry.

use std::time::{Duration, Instant};

use imagegpt::engine::fake::Script;
use imagegpt::proto::pb;
use tonic::{Code, Request};
use tonic_types::StatusExt as _;

use crate::batching::{batches, distinct, wait_for_batches, wait_for_depth};
use crate::harness::{
    self, Running, embed, fake_answer, flat, gated, sample, seeded, tokens, until_sample, vector,
};

fn bulk(images: Vec<pb::Image>) -> Request<pb::EmbedRequest> {
    of_class("bulk", images)
}

fn of_class(class: &'static str, images: Vec<pb::Image>) -> Request<pb::EmbedRequest> {
    let mut request = Request::new(embed(images));
    let class = class.parse().expect("ascii");
    request.metadata_mut().insert("imagegpt-priority", class);
    request
}

type Call = tokio::task::JoinHandle<Result<tonic::Response<pb::EmbedResponse>, tonic::Status>>;

fn call(running: &Running, request: Request<pb::EmbedRequest>) -> Call {
    let mut client = running.client.clone();
    tokio::spawn(async move { client.embed(request).await })
}

/// Makes a call that keeps the engine busy until its gate is opened once.
async fn occupy(running: &Running) -> Call {
    let blocking = call(running, Request::new(embed(vec![flat(15)])));
    wait_for_batches(running, 1.0).await;
    blocking
}

async fn answered(call: Call) -> Vec<Vec<f32>> {
    let response = call.await.expect("no panic").expect("a response");
    let results = &response.get_ref().results;
    let vectors = results
        .iter()
        .map(|result| vector(result).expect("a vector"));
    vectors.collect()
}

#[tokio::test]
async fn interactive_calls_overtake_bulk() {
    let (open, script) = gated();
    let flags = ["--max-batch-size", "4", "--max-queue-delay", "0s"];
    let running = harness::fake(script, &flags).await;
    let blocking = occupy(&running).await;
    let first = call(&running, bulk(distinct(10, 8)));
    wait_for_depth(&running, 8.0).await;
    let second = call(&running, Request::new(embed(distinct(50, 4))));
    wait_for_depth(&running, 12.0).await;
    // The one that runs, and then the interactive one.
    open.send(()).expect("a run");
    open.send(()).expect("a run");
    answered(blocking).await;
    answered(second).await;
    assert!(!first.is_finished(), "bulk waits");
    open.send(()).expect("a run");
    open.send(()).expect("a run");
    assert_eq!(answered(first).await.len(), 8);
    running.end().await;
}

#[tokio::test]
async fn rows_that_would_be_padding_are_used_by_the_other_class() {
    let (open, script) = gated();
    let flags = ["--max-batch-size", "4", "--max-queue-delay", "0s"];
    let running = harness::fake(script, &flags).await;
    let blocking = occupy(&running).await;
    let first = call(&running, bulk(distinct(10, 1)));
    wait_for_depth(&running, 1.0).await;
    let second = call(&running, Request::new(embed(distinct(50, 3))));
    wait_for_depth(&running, 4.0).await;
    open.send(()).expect("a run");
    open.send(()).expect("a run");
    answered(blocking).await;
    answered(first).await;
    answered(second).await;
    assert_eq!(batches(&running.metrics().await), 2.0);
    running.end().await;
}

#[tokio::test]
async fn bulk_finds_no_room_in_what_is_reserved() {
    let (open, script) = gated();
    let flags = [
        "--images-in-flight-max",
        "8",
        "--images-per-call-max",
        "8",
        "--interactive-reserve",
        "25",
    ];
    let running = harness::fake(script, &flags).await;
    let blocking = call(&running, bulk(distinct(0, 6)));
    running.until_in_flight(6).await;
    let error = running
        .client
        .clone()
        .embed(bulk(vec![flat(1)]))
        .await
        .expect_err("full for bulk");
    assert_eq!(error.code(), Code::ResourceExhausted);
    let retry = error.get_details_retry_info().expect("a RetryInfo");
    assert_eq!(
        retry.retry_delay,
        Some(Duration::from_secs(1)),
        "nothing was measured yet"
    );
    let interactive = call(&running, Request::new(embed(distinct(20, 2))));
    running.until_in_flight(8).await;
    drop(open);
    answered(blocking).await;
    answered(interactive).await;
    let error = running
        .client
        .clone()
        .embed(bulk(distinct(0, 7)))
        .await
        .expect_err("more than bulk can have");
    assert_eq!(error.code(), Code::InvalidArgument, "{error}");
    running.end().await;
}

#[tokio::test]
async fn an_unknown_class_is_refused() {
    let running = harness::fake(Script::default(), &[]).await;
    let request = of_class("urgent", vec![flat(1)]);
    let error = running.client.clone().embed(request).await;
    let error = error.expect_err("no such class");
    assert_eq!(error.code(), Code::InvalidArgument);
    assert!(error.message().contains("\"urgent\""), "{error}");
    running.end().await;
}

#[tokio::test]
async fn a_refused_caller_is_told_when_to_come_back() {
    let (open, mut script) = gated();
    script.delay = Duration::from_millis(20);
    let flags = [
        "--images-in-flight-max",
        "8",
        "--images-per-call-max",
        "8",
        "--max-batch-size",
        "1",
    ];
    let running = harness::fake(script, &flags).await;
    // Some runs to measure: 50 images a second.
    for seed in 0..4 {
        let one = call(&running, Request::new(embed(distinct(seed, 1))));
        open.send(()).expect("a run");
        answered(one).await;
    }
    let blocking = call(&running, Request::new(embed(distinct(10, 8))));
    running.until_in_flight(8).await;
    let started = Instant::now();
    let error = running
        .client
        .clone()
        .embed(embed(vec![flat(1)]))
        .await
        .expect_err("full");
    assert!(started.elapsed() < Duration::from_secs(5), "at once");
    let retry = error
        .get_details_retry_info()
        .and_then(|info| info.retry_delay);
    let retry = retry.expect("a RetryInfo");
    // Half to all of 8 images at 50 a second at most; runs measured on a busy
    // machine may have taken longer.
    assert!(
        retry >= Duration::from_millis(70) && retry < Duration::from_secs(5),
        "{retry:?}"
    );
    drop(open);
    answered(blocking).await;
    running.end().await;
}

#[tokio::test]
async fn identical_images_share_a_run() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let blocking = occupy(&running).await;
    let calls: Vec<Call> = (0..5)
        .map(|_| {
            let images = vec![tokens(seeded(1)), tokens(seeded(2))];
            call(&running, Request::new(embed(images)))
        })
        .collect();
    running.until_in_flight(11).await;
    wait_for_depth(&running, 2.0).await;
    // One more that joins what runs already.
    let same = call(&running, Request::new(embed(vec![flat(15)])));
    running.until_in_flight(12).await;
    until_sample(&running, "imagegpt_images_coalesced_total", |n| n >= 9.0).await;
    open.send(()).expect("a run");
    open.send(()).expect("a run");
    answered(blocking).await;
    assert_eq!(answered(same).await, [fake_answer(&[15; 64])]);
    for call in calls {
        let expected = [fake_answer(&seeded(1)), fake_answer(&seeded(2))];
        assert_eq!(answered(call).await, expected);
    }
    let page = running.metrics().await;
    assert_eq!(batches(&page), 2.0);
    let rows = "imagegpt_batch_size_sum{graph=\"hidden\"}";
    assert_eq!(sample(&page, rows), 3.0, "three different images");
    running.end().await;
}

#[tokio::test]
async fn different_options_do_not_share_a_run() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let blocking = occupy(&running).await;
    let with = |pooling: pb::Pooling, context: pb::Context| {
        Request::new(pb::EmbedRequest {
            images: vec![tokens(seeded(1))],
            pooling: pooling.into(),
            context: context.into(),
            ..Default::default()
        })
    };
    let calls = [
        with(pb::Pooling::Mean, pb::Context::Raw),
        with(pb::Pooling::Last, pb::Context::Raw),
        with(pb::Pooling::Mean, pb::Context::SosShifted),
    ]
    .map(|request| call(&running, request));
    wait_for_depth(&running, 3.0).await;
    drop(open);
    answered(blocking).await;
    for call in calls {
        answered(call).await;
    }
    assert_eq!(running.sample("imagegpt_images_coalesced_total").await, 0.0);
    running.end().await;
}

#[tokio::test]
async fn a_cache_answers_without_a_run() {
    let running = harness::fake(Script::default(), &["--cache-bytes", "1MiB"]).await;
    let images = || Request::new(embed(vec![tokens(seeded(1))]));
    let first = answered(call(&running, images())).await;
    let before = batches(&running.metrics().await);
    assert_eq!(answered(call(&running, images())).await, first);
    let page = running.metrics().await;
    assert_eq!(batches(&page), before, "no run");
    let lookups = |result| format!("imagegpt_cache_lookups_total{{result=\"{result}\"}}");
    assert_eq!(sample(&page, &lookups("hit")), 1.0);
    assert_eq!(sample(&page, &lookups("miss")), 1.0);
    assert!(sample(&page, "imagegpt_cache_bytes") > 0.0);
    running.end().await;
}

#[tokio::test]
async fn a_run_that_nobody_waits_for_is_stopped() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let one = occupy(&running).await;
    // The same image: the run goes on for whoever is left.
    let other = call(&running, Request::new(embed(vec![flat(15)])));
    running.until_in_flight(2).await;
    until_sample(&running, "imagegpt_images_coalesced_total", |n| n >= 1.0).await;
    one.abort();
    running.until_in_flight(1).await;
    assert_eq!(running.sample("imagegpt_runs_stopped_total").await, 0.0);
    other.abort();
    running.until_in_flight(0).await;
    until_sample(&running, "imagegpt_runs_stopped_total", |n| n >= 1.0).await;
    let page = running.metrics().await;
    let dropped = "imagegpt_images_dropped_total{reason=\"cancelled\",stage=\"engine\"}";
    assert_eq!(sample(&page, dropped), 2.0);
    // The gate was never opened, and the engine is free.
    let next = call(&running, Request::new(embed(distinct(1, 1))));
    open.send(()).expect("a run");
    assert_eq!(answered(next).await, [fake_answer(&seeded(1))]);
    running.end().await;
}

/// Stopping a run of ONNX Runtime, which ends in the middle of the run.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_onnx_runtime_is_stopped() {
    const SECONDS: &str = "imagegpt_inference_duration_seconds_sum{graph=\"hidden\"}";
    const STOPPED: &str = "imagegpt_runs_stopped_total";
    let flags = ["--batch-sizes", "16", "--max-batch-size", "16"];
    let running = harness::onnx("untrained", &flags).await;
    let images = |seed: u32| -> Vec<pb::Image> {
        let image = |idx: u32| (0..1024_u32).map(move |at| (seed + idx * 31 + at) % 512);
        (0..16).map(|idx| tokens(image(idx).collect())).collect()
    };
    let ask = |seed| call(&running, Request::new(embed(images(seed))));
    answered(ask(0)).await;
    let whole = running.sample(SECONDS).await;
    // On a machine that is busy a run may be over before its caller has left.
    for seed in 1.. {
        let page = running.metrics().await;
        let (before, n_stopped) = (sample(&page, SECONDS), sample(&page, STOPPED));
        let n_batches = batches(&page);
        let one = ask(seed);
        wait_for_batches(&running, n_batches + 1.0).await;
        one.abort();
        running.until_in_flight(0).await;
        until_sample(&running, SECONDS, |seconds| seconds > before).await;
        let page = running.metrics().await;
        if sample(&page, STOPPED) > n_stopped {
            let stopped = sample(&page, SECONDS) - before;
            assert!(stopped < 0.8 * whole, "{stopped} s of {whole} s");
            break;
        }
        assert!(seed < 20, "no run was stopped");
    }
    assert_eq!(
        answered(ask(100)).await.len(),
        16,
        "and the next one is whole"
    );
    running.end().await;
}

#[tokio::test]
async fn a_run_whose_callers_are_late_is_stopped() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let mut request = Request::new(embed(vec![flat(1)]));
    request.set_timeout(Duration::from_millis(100));
    let error = running.client.clone().embed(request).await;
    assert!(harness::is_late(&error.expect_err("late")));
    until_sample(&running, "imagegpt_runs_stopped_total", |n| n >= 1.0).await;
    let next = call(&running, Request::new(embed(distinct(1, 1))));
    open.send(()).expect("a run");
    answered(next).await;
    running.end().await;
}

#[tokio::test]
async fn what_cannot_be_done_in_time_is_refused_at_once() {
    let script = Script {
        delay: Duration::from_millis(300),
        ..Default::default()
    };
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    answered(call(&running, Request::new(embed(distinct(0, 1))))).await;
    let mut request = Request::new(embed(distinct(1, 1)));
    request.set_timeout(Duration::from_millis(200));
    let started = Instant::now();
    let error = running.client.clone().embed(request).await;
    let error = error.expect_err("too short");
    assert_eq!(error.code(), Code::DeadlineExceeded);
    assert!(
        error.message().contains("would take at least"),
        "{error}, after {:?}",
        started.elapsed()
    );
    assert!(started.elapsed() < Duration::from_millis(150), "at once");
    let dropped = "imagegpt_images_dropped_total{reason=\"deadline_too_short\",stage=\"queue\"}";
    assert_eq!(running.sample(dropped).await, 1.0);
    assert_eq!(batches(&running.metrics().await), 1.0);
    running.end().await;
}

#[tokio::test]
async fn a_twin_that_is_late_takes_nobody_along() {
    let script = Script {
        delay: Duration::from_millis(400),
        ..Default::default()
    };
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    answered(call(&running, Request::new(embed(distinct(0, 1))))).await;
    let blocking = call(&running, Request::new(embed(distinct(1, 1))));
    wait_for_batches(&running, 2.0).await;
    // The same image: one caller has time, the other one has not.
    let patient = call(&running, Request::new(embed(distinct(2, 1))));
    wait_for_depth(&running, 1.0).await;
    let mut request = Request::new(embed(distinct(2, 1)));
    request.set_timeout(Duration::from_millis(600));
    let hasty = call(&running, request).await.expect("no panic");
    assert!(harness::is_late(&hasty.expect_err("late")));
    answered(blocking).await;
    assert_eq!(answered(patient).await, [fake_answer(&seeded(2))]);
    running.end().await;
}
