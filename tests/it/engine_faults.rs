//! An engine that fails: callers are told, and so is the world.

use imagegpt::engine::fake::{FakeEngine, Script};
use imagegpt::engine::{Engine, EngineError, Facts, FailureKind, Run, Stop, Warm};
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

/// Returns what its script says instead of an answer.
struct Odd(FakeEngine, Vec<Vec<f32>>);

impl Engine for Odd {
    fn facts(&self) -> &Facts {
        self.0.facts()
    }

    fn warm(&self) -> &[Warm] {
        &[]
    }

    fn run(&mut self, _run: &Run<'_>, _stop: &Stop) -> Result<Vec<Vec<f32>>, EngineError> {
        Ok(self.1.clone())
    }

    fn canary(&mut self) -> Result<(), EngineError> {
        Ok(())
    }
}

#[tokio::test]
async fn numbers_that_are_none_are_an_error() {
    for odd in [
        vec![vec![1.0, f32::NAN, 0.0, 0.0]],
        vec![vec![f32::INFINITY; 4]],
        vec![],
    ] {
        let factory = Box::new(move || {
            Ok(Box::new(Odd(FakeEngine::new(Script::default()), odd)) as Box<dyn Engine>)
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
