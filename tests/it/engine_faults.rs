//! An engine that fails: callers get errors, and health and metrics show the
//! failure.

use imagegpt::engine::fake::Script;
use imagegpt::serve::devices::FailureKind;
use tonic::Code;

use crate::harness::{self, embed, seeded, tokens, vector};

#[tokio::test]
async fn a_failed_run_fails_its_images_and_the_worker_serves_on() {
    let script = Script {
        fail_on: Some(13),
        ..Default::default()
    };
    let mut running = harness::fake(script, &[]).await;
    let response = running
        .client
        .embed(embed(vec![harness::flat(13)]))
        .await
        .expect("a response");
    let (code, sentence) = vector(&response.get_ref().results[0]).expect_err("the run failed");
    assert_eq!(code, Code::Internal);
    assert!(
        !sentence.contains("scripted"),
        "the cause is for the log: {sentence}"
    );
    let response = running
        .client
        .embed(embed(vec![tokens(seeded(1))]))
        .await
        .expect("serves on");
    vector(&response.get_ref().results[0]).expect("a vector");
    running.end().await;
}

#[tokio::test]
async fn a_panic_answers_everyone_and_ends_readiness() {
    let script = Script {
        panic_on: Some(13),
        ..Default::default()
    };
    let mut running = harness::fake(script, &[]).await;
    let response = running
        .client
        .embed(embed(vec![harness::flat(13)]))
        .await
        .expect("a response");
    let (code, _) = vector(&response.get_ref().results[0]).expect_err("the run panicked");
    assert_eq!(code, Code::Internal);
    let failure = running.worker.failed().await;
    assert_eq!(failure.kind, FailureKind::Worker);
    assert!(failure.reason.contains("scripted panic"), "{failure:?}");
    let error = running
        .client
        .embed(embed(vec![harness::flat(1)]))
        .await
        .expect_err("failed");
    assert_eq!(error.code(), Code::Unavailable);
    let addr = running.worker.metrics_addr;
    assert_eq!(harness::get(addr, "/livez").await.0, 503);
    assert_eq!(harness::get(addr, "/readyz").await.0, 503);
    assert_eq!(running.sample("imagegpt_ready").await, 0.0);
    running.end().await;
}

#[tokio::test]
async fn numbers_that_are_none_are_an_error() {
    for odd in [
        vec![vec![1.0, f32::NAN, 0.0, 0.0]],
        vec![vec![f32::INFINITY; 4]],
        vec![],
    ] {
        let factory = harness::altered(Script::default(), |engine| {
            engine.run = Box::new(move |_, _, _| Ok(odd.clone()));
        });
        let mut running = harness::start(&harness::model_dir("micro"), &[], Some(factory)).await;
        let response = running
            .client
            .embed(embed(vec![harness::flat(1)]))
            .await
            .expect("a response");
        let (code, _) = vector(&response.get_ref().results[0]).expect_err("not finite");
        assert_eq!(code, Code::Internal);
        running.end().await;
    }
}

async fn outcomes(running: &mut harness::Running, images: Vec<u32>) -> Vec<Result<(), Code>> {
    let images = images.into_iter().map(harness::flat).collect();
    let response = running.client.embed(embed(images)).await;
    let results = response.expect("a response").into_inner().results;
    let outcome = |result| vector(result).map(|_| ()).map_err(|(code, _)| code);
    results.iter().map(outcome).collect()
}

#[tokio::test]
async fn one_poisonous_image_fails_alone() {
    let script = Script {
        fail_on: Some(13),
        ..Default::default()
    };
    let mut running = harness::fake(script, &[]).await;
    let got = outcomes(&mut running, vec![1, 2, 13, 3, 4, 5, 6, 7]).await;
    let mut expected = vec![Ok(()); 8];
    expected[2] = Err(Code::Internal);
    assert_eq!(got, expected);
    let faults = "imagegpt_engine_faults_total{kind=\"run\"}";
    // The batch of eight, and the halves of it that had it.
    assert!((1.0..=4.0).contains(&running.sample(faults).await));
    assert_eq!(running.sample("imagegpt_ready").await, 1.0);
    running.end().await;
}

#[tokio::test]
async fn memory_that_runs_out_lowers_the_batch_size() {
    let script = Script {
        memory_for: Some(2),
        ..Default::default()
    };
    let mut running = harness::fake(script, &[]).await;
    for _ in 0..2 {
        let got = outcomes(&mut running, (0..8).collect()).await;
        assert_eq!(got, [Ok(()); 8], "nobody notices");
    }
    let page = running.metrics().await;
    assert_eq!(harness::sample(&page, "imagegpt_batch_size_max"), 2.0);
    let faults = "imagegpt_engine_faults_total{kind=\"out_of_memory\"}";
    assert!(
        harness::sample(&page, faults) <= 3.0,
        "once a size, and never again"
    );
    running.end().await;
}

#[tokio::test]
async fn a_device_that_fails_ends_readiness_for_good() {
    let script = Script {
        device_fails_on: Some(13),
        ..Default::default()
    };
    let mut running = harness::fake(script, &[]).await;
    let error = running
        .client
        .embed(embed(vec![harness::flat(13)]))
        .await
        .expect_err("another worker may be better");
    assert_eq!(error.code(), Code::Unavailable);
    let failure = running.worker.failed().await;
    assert_eq!(failure.kind, FailureKind::Device);
    assert_eq!(
        harness::get(running.worker.metrics_addr, "/livez").await.0,
        503
    );
    running.end().await;
}

#[tokio::test]
async fn an_idle_engine_is_checked() {
    let script = Script {
        canaries_until_failure: Some(3),
        ..Default::default()
    };
    let mut running = harness::fake(script, &["--canary-interval", "20ms"]).await;
    let failure = running.worker.failed().await;
    assert_eq!(failure.kind, FailureKind::Device);
    assert!(failure.reason.contains("idle check"), "{failure:?}");
    let ok = "imagegpt_canary_runs_total{result=\"ok\"}";
    assert_eq!(running.sample(ok).await, 3.0);
    running.end().await;
}
