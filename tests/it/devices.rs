//! Several devices that share one queue, and the worker after one of them
//! fails.

use std::time::{Duration, Instant};

use imagegpt::engine::fake::{FakeSequences, Script};
use imagegpt::model::Model;
use imagegpt::model::precision::ProviderChoice;
use imagegpt::proto::pb;
use imagegpt::runtime::error::EngineError;
use imagegpt::serve::devices::{DeviceEngine, FailureKind};
use imagegpt::serve::engines::{engines, onnx_engines};
use imagegpt::serve::heads::StartHeads;
use imagegpt::serve::worker::Worker;
use tonic::{Code, Status};

use crate::batching::wait_for_batches;
use crate::harness::{
    self, Running, embed, fake_answer, flat, gated, model_dir, sample, seeded, tokens, until,
    until_sample, vector,
};

/// Flags for batches of one image, so that each engine gets some of the work.
const ALONE: [&str; 4] = ["--max-batch-size", "1", "--max-queue-delay", "0s"];

/// Token that makes a device fail.
const POISON: u16 = 13;

fn poisoned() -> Script {
    Script {
        delay: Duration::from_millis(2),
        device_fails_on: Some(POISON),
        ..Default::default()
    }
}

/// Returns images that differ, so that they are not coalesced, without
/// [`POISON`].
fn harmless() -> impl Iterator<Item = Vec<u32>> {
    (0..).map(seeded).filter(|ids| ids[0] != u32::from(POISON))
}

type Call = tokio::task::JoinHandle<Result<Vec<f32>, Status>>;

fn call(running: &Running, ids: Vec<u32>) -> Call {
    let mut client = running.client.clone();
    tokio::spawn(async move {
        let response = client.embed(embed(vec![tokens(ids)])).await?;
        let vector = vector(&response.get_ref().results[0]);
        vector.map_err(|(code, text)| Status::new(code, text))
    })
}

async fn devices(running: &Running) -> Vec<pb::Device> {
    let request = pb::GetModelRequest {};
    let response = running.client.clone().get_model(request).await;
    response.expect("a model").into_inner().devices
}

/// Returns for each device whether it is up, by GetModel and the metrics page.
async fn up(running: &Running) -> Vec<bool> {
    let mut serving = Vec::new();
    // One may fail between the two looks.
    until(running, "GetModel and the page agree", async || {
        let devices = devices(running).await;
        let page = running.metrics().await;
        let agrees = |device: &pb::Device| {
            assert_eq!(device.execution_provider, "fake");
            let series = format!("imagegpt_device_up{{device=\"{}\"}}", device.id);
            let expected = if device.serving { "1" } else { "0" };
            sample(&page, &series).to_string() == expected
        };
        serving = devices.iter().map(|device| device.serving).collect();
        devices.iter().all(agrees)
    })
    .await;
    serving
}

/// Waits until `n` devices serve; GetModel answers as long as one device
/// serves.
async fn until_up(running: &Running, n: usize) {
    until(running, &format!("{n} devices up"), async || {
        up(running).await.iter().filter(|&&up| up).count() == n
    })
    .await;
}

#[tokio::test]
async fn two_devices_take_half_the_time() {
    const IMAGES: usize = 24;
    let took = async |n_devices: usize| {
        let script = || Script {
            delay: Duration::from_millis(25),
            ..Default::default()
        };
        let scripts = std::iter::repeat_with(script).take(n_devices).collect();
        let mut running = harness::fake_devices(scripts, &ALONE).await;
        let images: Vec<Vec<u32>> = harmless().take(IMAGES).collect();
        let request = embed(images.iter().cloned().map(tokens).collect());
        let started = Instant::now();
        let response = running.client.embed(request).await.expect("a response");
        let elapsed = started.elapsed();
        for (result, ids) in response.get_ref().results.iter().zip(&images) {
            assert_eq!(vector(result).expect("a vector"), fake_answer(ids));
        }
        running.end().await;
        elapsed
    };
    let (one, two) = (took(1).await, took(2).await);
    assert!(one >= Duration::from_millis(25) * 24, "{one:?}");
    assert!(two >= Duration::from_millis(25) * 12, "{two:?}");
    assert!(two < one.mul_f64(0.7), "{two:?} with two, {one:?} with one");
}

#[tokio::test]
async fn a_device_that_fails_under_load_is_taken_out_and_the_others_go_on() {
    let mut running = harness::fake_devices(vec![poisoned(), poisoned()], &ALONE).await;
    assert_eq!(up(&running).await, [true, true]);
    let images: Vec<Vec<u32>> = harmless().take(60).collect();
    let mut calls: Vec<Call> = Vec::new();
    for (idx, ids) in images.iter().enumerate() {
        if idx == 20 {
            calls.push(call(&running, vec![POISON.into(); 64]));
        }
        calls.push(call(&running, ids.clone()));
    }
    let poison = calls.remove(20);
    let refused = poison.await.expect("no panic").expect_err("a device died");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    for (call, ids) in calls.into_iter().zip(&images) {
        let answer = call.await.expect("no panic");
        assert_eq!(answer.expect("another device has it"), fake_answer(ids));
    }
    until_up(&running, 1).await;
    assert!(running.worker.readiness().get().is_ok());
    let addr = running.worker.metrics_addr;
    for page in ["/readyz", "/livez"] {
        assert_eq!(harness::get(addr, page).await.0, 200, "{page}");
    }
    let page = running.metrics().await;
    let faults = "imagegpt_engine_faults_total{kind=\"device\"}";
    assert_eq!(sample(&page, faults), 1.0, "it did not kill the next one");
    assert_eq!(sample(&page, "imagegpt_images_in_flight"), 0.0);

    // The last one goes, and the worker with it.
    let refused = call(&running, vec![POISON.into(); 64]).await;
    let refused = refused.expect("no panic").expect_err("the last one died");
    assert_eq!(refused.code(), Code::Unavailable, "{refused}");
    let failure = running.worker.failed().await;
    assert_eq!(failure.kind, FailureKind::Device);
    assert!(failure.reason.starts_with("device "), "{failure:?}");
    for page in ["/readyz", "/livez"] {
        assert_eq!(harness::get(addr, page).await.0, 503, "{page}");
    }
    // The gauges follow the failure, each in a task of its own. GetModel is not
    // answered any more.
    for series in ["imagegpt_ready", "imagegpt_device_up{device=\"0\"}"] {
        harness::until(&running, series, async || {
            running.sample(series).await == 0.0
        })
        .await;
    }
    let refused = call(&running, images[0].clone()).await.expect("no panic");
    assert_eq!(
        refused.expect_err("nobody is left").code(),
        Code::Unavailable
    );
    running.end().await;
}

#[tokio::test]
async fn an_idle_device_that_fails_its_check_gets_no_work() {
    let script = Script {
        canaries_until_failure: Some(1),
        ..Default::default()
    };
    let flags = [&ALONE[..], &["--canary-interval", "20ms"]].concat();
    let running = harness::fake_devices(vec![script, Script::default()], &flags).await;
    until_up(&running, 1).await;
    assert_eq!(up(&running).await, [false, true]);
    for ids in harmless().take(5) {
        let answer = call(&running, ids.clone()).await.expect("no panic");
        assert_eq!(answer.expect("the other has it"), fake_answer(&ids));
    }
    running.end().await;
}

#[tokio::test]
async fn a_run_that_is_stopped_is_the_one_that_nobody_waits_for() {
    let ((first, script), (second, other)) = (gated(), gated());
    let running = harness::fake_devices(vec![script, other], &ALONE).await;
    let mut images = harmless();
    let (gone, stays) = (images.next(), images.next().expect("a second"));
    let gone = call(&running, gone.expect("a first"));
    wait_for_batches(&running, 1.0).await;
    let staying = call(&running, stays.clone());
    wait_for_batches(&running, 2.0).await;
    gone.abort();
    until_sample(&running, "imagegpt_runs_stopped_total", |n| n >= 1.0).await;
    assert!(!staying.is_finished(), "it waits for its gate");
    first.send(()).expect("an engine");
    second.send(()).expect("an engine");
    let answer = staying.await.expect("no panic").expect("a vector");
    assert_eq!(answer, fake_answer(&stays));
    assert_eq!(running.sample("imagegpt_runs_stopped_total").await, 1.0);
    running.end().await;
}

/// Returns the images of a call that generates eight images.
async fn generated(running: &Running, seed: u64) -> Vec<Vec<u32>> {
    use pb::generate_response::Message;
    let request = pb::GenerateRequest {
        samples: 8,
        seed: Some(seed),
        ..Default::default()
    };
    let stream = running.client.clone().generate(request).await;
    let mut stream = stream.expect("a stream").into_inner();
    let mut images = vec![Vec::new(); 8];
    while let Some(response) = stream.message().await.expect("a message") {
        if let Some(Message::Row(row)) = response.message {
            images[row.sample as usize].extend(row.ids);
        }
    }
    images
}

#[tokio::test]
async fn the_same_seed_draws_the_same_images_on_any_number_of_devices() {
    let script = || Script {
        sequences: Some(FakeSequences {
            n_slots: 4,
            n_colors: 16,
            delay: Duration::from_millis(1),
            can_copy: true,
        }),
        ..Default::default()
    };
    let alone = harness::fake(script(), &[]).await;
    let expected = generated(&alone, 5).await;
    assert!(expected.iter().all(|ids| ids.len() == 64));
    alone.end().await;

    let running = harness::fake_devices(vec![script(), script()], &[]).await;
    assert_eq!(running.sample("imagegpt_sequences_max").await, 8.0);
    let request = pb::GetModelRequest {};
    let model = running.client.clone().get_model(request).await;
    let limits = model.expect("a model").into_inner().limits;
    assert_eq!(limits.expect("limits").generate_slots, 8);
    // Both devices draw: one has places for four.
    let both = until_sample(&running, "imagegpt_sequences", |n| n > 7.0);
    let (images, _) = tokio::join!(generated(&running, 5), both);
    assert_eq!(images, expected);
    running.end().await;
}

#[tokio::test]
async fn a_drain_answers_what_every_device_has() {
    let ((first, script), (second, other)) = (gated(), gated());
    let running = harness::fake_devices(vec![script, other], &ALONE).await;
    let images: Vec<Vec<u32>> = harmless().take(6).collect();
    let calls: Vec<Call> = images
        .iter()
        .cloned()
        .map(|ids| call(&running, ids))
        .collect();
    // One at each device, and the others wait.
    running.until_in_flight(6).await;
    wait_for_batches(&running, 2.0).await;
    let Running { worker, client } = running;
    drop(client);
    let ending = tokio::spawn(worker.shutdown(harness::PATIENCE));
    // Closed gates let everything through.
    drop((first, second));
    for (call, ids) in calls.into_iter().zip(&images) {
        let answer = call.await.expect("no panic").expect("a vector");
        assert_eq!(answer, fake_answer(ids));
    }
    let ended = ending.await.expect("no panic");
    assert_eq!(ended, imagegpt::serve::worker::WorkerEnded::Clean);
}

fn fails_to_load(error: EngineError) -> DeviceEngine {
    DeviceEngine {
        id: 7,
        factory: Box::new(|| Err(error)),
    }
}

#[tokio::test]
async fn a_device_that_is_lost_while_it_loads_is_told_from_a_wrong_model() {
    let dir = model_dir("micro");
    let config = harness::config(&dir, &[]);
    for (error, kind) in [
        (
            EngineError::NotLoaded("no head".to_owned()),
            FailureKind::Worker,
        ),
        (
            EngineError::Device("error 700".to_owned()),
            FailureKind::Device,
        ),
    ] {
        let expected = error.to_string();
        let engines = vec![fails_to_load(error)];
        let model = Model::open(&dir, None).expect("a model");
        let worker = Worker::start(&config, model, StartHeads::default(), engines).await;
        let mut worker = worker.expect("a worker");
        let failure = worker.ready().await.expect_err("it does not load");
        assert_eq!(failure.kind, kind);
        assert_eq!(failure.to_string(), expected);
        worker.shutdown(harness::PATIENCE).await;
    }
}

#[tokio::test]
async fn a_worker_starts_with_all_of_its_devices_or_not_at_all() {
    let dir = model_dir("micro");
    let config = harness::config(&dir, &[]);
    let (open, gate) = crossbeam_channel::bounded::<()>(1);
    let load = harness::fake_factory(Script::default());
    let slow = DeviceEngine {
        id: 1,
        factory: Box::new(move || {
            let _ = gate.recv();
            load()
        }),
    };
    let mut engines = harness::one(harness::fake_factory(Script::default()));
    engines.push(slow);
    let model = Model::open(&dir, None).expect("a model");
    let worker = Worker::start(&config, model, StartHeads::default(), engines).await;
    let mut worker = worker.expect("a worker");
    let first = "imagegpt_device_up{device=\"0\"}";
    until_sample(&worker, first, |up| up >= 1.0).await;
    assert!(worker.readiness().get().is_err(), "the other still loads");
    open.send(()).expect("it loads");
    worker.ready().await.expect("both are loaded");
    worker.shutdown(harness::PATIENCE).await;

    let mut engines = harness::one(harness::fake_factory(Script::default()));
    engines.push(fails_to_load(EngineError::NotLoaded(
        "no such device".to_owned(),
    )));
    let model = Model::open(&dir, None).expect("a model");
    let worker = Worker::start(&config, model, StartHeads::default(), engines).await;
    let mut worker = worker.expect("a worker");
    let error = worker.ready().await.expect_err("one is missing");
    assert_eq!(error.to_string(), "device 7: no such device");
    until(&worker, "the threads end", async || {
        worker.readiness().failure().is_some()
    })
    .await;
    worker.shutdown(harness::PATIENCE).await;
}

#[tokio::test]
async fn ids_are_engines_on_the_cpu_and_one_engine_where_auto_takes_it() {
    let dir = model_dir("micro");
    let mut config = harness::config(&dir, &["--device-id", "0,2"]);
    let model = Model::open(&dir, None).expect("a model");
    let ids = |engines: Vec<DeviceEngine>| -> Vec<i32> {
        engines.iter().map(|engine| engine.id).collect()
    };
    let on_cpu = onnx_engines(&config, &model, &[]).expect("ONNX Runtime");
    assert_eq!(ids(on_cpu), [0, 2]);
    config.model.devices.provider.execution_provider = ProviderChoice::Auto;
    // The library that tests run with has no CUDA.
    let auto = onnx_engines(&config, &model, &[]).expect("ONNX Runtime");
    assert_eq!(ids(auto), [0]);
    config.model.fake_engine = Some("1ms".parse().expect("a cost"));
    assert_eq!(
        ids(engines(&config, &model, &[]).expect("fake ones")),
        [0, 2]
    );
}

#[tokio::test]
async fn several_cpu_engines_answer_as_one_does() {
    let cases = harness::expected();
    let running = harness::onnx("micro", &["--device-id", "0,1", "--max-batch-size", "1"]).await;
    let images = || cases.iter().map(|case| tokens(case.tokens.clone()));
    for _ in 0..3 {
        let response = running
            .client
            .clone()
            .embed(embed(images().collect()))
            .await;
        let response = response.expect("a response").into_inner();
        for (result, case) in response.results.iter().zip(&cases) {
            let vector = vector(result).expect("a vector");
            let error = harness::relative_error(&vector, &case.raw.mean);
            assert!(error < 1e-4, "{error}");
        }
    }
    let devices = devices(&running).await;
    assert_eq!(devices.len(), 2);
    for device in devices {
        assert_eq!(
            (device.execution_provider.as_str(), device.serving),
            ("cpu", true)
        );
    }
    let answer = running.client.clone().embed(embed(vec![flat(1)])).await;
    vector(&answer.expect("a response").get_ref().results[0]).expect("a vector");
    running.end().await;
}
