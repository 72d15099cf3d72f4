//! Generate and Score: messages and scheduling with the fake engine, and the
//! results of a compiled model against those of transformers.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use imagegpt::compile::{CompileOptions, ModelSource, Silent, compile};
use imagegpt::engine::fake::{FakeEngine, FakeSequences, Script};
use imagegpt::engine::onnx;
use imagegpt::model::precision::{Precision, Provider};
use imagegpt::proto::pb;
use imagegpt::proto::pb::generate_request::Primer;
use imagegpt::proto::pb::generate_response::Message;
use imagegpt::runtime::Runtime;
use serde::Deserialize;
use tonic::{Code, Request, Status};

use crate::harness::{self, Client, Running, embed, f32s, flat, seeded, tokens, until_sample};

const SIDE: u32 = 8;
const COLORS: u16 = 16;

/// Starts a fake worker that generates `n_slots` images at the same time, with
/// `delay` per step.
pub(crate) async fn fake(n_slots: usize, delay: Duration, flags: &[&str]) -> Running {
    let script = Script {
        sequences: Some(FakeSequences {
            n_slots,
            n_colors: COLORS.into(),
            delay,
            can_copy: true,
        }),
        ..Default::default()
    };
    harness::fake(script, flags).await
}

fn greedy() -> pb::GenerateRequest {
    pb::GenerateRequest {
        temperature: Some(0.0),
        ..Default::default()
    }
}

#[expect(clippy::unnecessary_wraps, reason = "as requests have it")]
fn prefix(ids: &[u32]) -> Option<Primer> {
    Some(Primer::Prefix(pb::Tokens { ids: ids.to_vec() }))
}

#[expect(clippy::unnecessary_wraps, reason = "as requests have it")]
fn primer(keep: pb::image_primer::Keep) -> Option<Primer> {
    Some(Primer::Image(pb::ImagePrimer {
        image: Some(tokens(seeded(1))),
        keep: Some(keep),
        ..Default::default()
    }))
}

/// Everything that a call returned.
#[derive(Debug, Default)]
struct Sent {
    started: Option<pb::GenerateStarted>,
    /// Rows of each sample, top to bottom.
    rows: BTreeMap<u32, Vec<Vec<u32>>>,
    images: BTreeMap<u32, Result<pb::GeneratedImage, Code>>,
}

impl Sent {
    fn ids(&self, sample: u32) -> &[u32] {
        let image = self.images[&sample].as_ref().expect("an image");
        &image.tokens.as_ref().expect("tokens").ids
    }
}

async fn generate(
    client: &Client,
    request: impl tonic::IntoRequest<pb::GenerateRequest>,
) -> Result<Sent, Status> {
    let mut client = client.clone();
    let mut stream = client.generate(request).await?.into_inner();
    let mut sent = Sent::default();
    while let Some(response) = stream.message().await? {
        match response.message.expect("a message") {
            Message::Started(started) => {
                assert!(sent.started.is_none() && sent.rows.is_empty());
                sent.started = Some(started);
            }
            Message::Row(row) => {
                assert!(!sent.images.contains_key(&row.sample), "rows come first");
                let rows = sent.rows.entry(row.sample).or_default();
                assert_eq!(row.row as usize, rows.len(), "top to bottom");
                rows.push(row.ids);
            }
            Message::Result(result) => {
                let outcome = match result.outcome.expect("an outcome") {
                    pb::generate_result::Outcome::Image(image) => Ok(image),
                    pb::generate_result::Outcome::Error(status) => Err(Code::from(status.code)),
                };
                let before = sent.images.insert(result.sample, outcome);
                assert!(before.is_none(), "one outcome a sample");
            }
        }
    }
    Ok(sent)
}

/// Returns the tokens that the fake engine finds most likely after `primer`.
pub(crate) fn likeliest(primer: &[u32]) -> Vec<u32> {
    let primer: Vec<u16> = primer
        .iter()
        .map(|&id| id.try_into().expect("small"))
        .collect();
    let image = FakeEngine::greedy(COLORS, &primer, COLORS.into(), 64);
    image.into_iter().map(u32::from).collect()
}

#[tokio::test]
async fn images_from_nothing_a_prefix_rows_and_a_mask() {
    let running = fake(4, Duration::ZERO, &[]).await;
    let image = seeded(1);
    let known = |n: usize| likeliest(&image[..n]);
    for (primer, expected) in [
        (None, known(0)),
        (prefix(&[]), known(0)),
        (prefix(&image[..13]), known(13)),
        (prefix(&image[..63]), known(63)),
        (prefix(&image), image.clone()),
        (primer(pb::image_primer::Keep::Rows(4)), known(32)),
        (primer(pb::image_primer::Keep::Rows(8)), image.clone()),
        (
            primer(pb::image_primer::Keep::Mask(vec![7; 64].into())),
            image.clone(),
        ),
        (
            primer(pb::image_primer::Keep::Mask(vec![0; 64].into())),
            known(0),
        ),
    ] {
        let request = pb::GenerateRequest {
            primer,
            samples: 2,
            scale: 2,
            log_probs: true,
            ..greedy()
        };
        let sent = generate(&running.client, request).await.expect("images");
        let started = sent.started.as_ref().expect("a first message");
        assert_eq!((started.samples, started.scale), (2, 2));
        for sample in 0..2 {
            assert_eq!(sent.ids(sample), expected);
            assert_eq!(sent.rows[&sample].concat(), expected, "rows are the image");
            let picture = &sent.images[&sample].as_ref().expect("an image").png;
            let picture = image::load_from_memory(picture).expect("a PNG");
            assert_eq!((picture.width(), picture.height()), (2 * SIDE, 2 * SIDE));
        }
    }
    // Every other pixel is kept: each draw sees what was kept before it.
    let mask: Vec<u8> = (0..64).map(|pixel| pixel % 2).collect();
    let request = pb::GenerateRequest {
        primer: primer(pb::image_primer::Keep::Mask(mask.into())),
        log_probs: true,
        no_rows: true,
        ..greedy()
    };
    let sent = generate(&running.client, request).await.expect("an image");
    assert!(sent.rows.is_empty());
    let got = sent.ids(0);
    for pixel in 0..64 {
        let expected = if pixel % 2 == 1 {
            image[pixel]
        } else {
            likeliest(&got[..pixel])[pixel]
        };
        assert_eq!(got[pixel], expected, "pixel {pixel}");
    }
    assert_eq!(
        sent.images[&0].as_ref().expect("an image").log_probs.len(),
        32
    );
    running.end().await;
}

#[tokio::test]
async fn a_seed_gives_the_same_whoever_else_is_there() {
    let request = |seed, samples| pb::GenerateRequest {
        seed: Some(seed),
        samples,
        temperature: Some(2.0),
        top_k: 12,
        top_p: Some(0.95),
        no_rows: true,
        ..Default::default()
    };
    let alone = fake(1, Duration::ZERO, &[]).await;
    let expected = generate(&alone.client, request(7, 3))
        .await
        .expect("images");
    assert_ne!(expected.ids(0), expected.ids(1));
    let other = generate(&alone.client, request(8, 1))
        .await
        .expect("an image");
    assert_ne!(expected.ids(0), other.ids(0));
    alone.end().await;

    let running = fake(8, Duration::from_micros(50), &[]).await;
    let mut calls = tokio::task::JoinSet::new();
    for idx in 0..12_u32 {
        let client = running.client.clone();
        let mut request = request(if idx % 3 == 0 { 7 } else { idx.into() }, 3);
        if idx % 3 == 1 {
            request.primer = prefix(&seeded(idx)[..idx as usize * 4]);
        }
        calls.spawn(async move { (idx, generate(&client, request).await) });
    }
    while let Some(call) = calls.join_next().await {
        let (idx, sent) = call.expect("no panic");
        let sent = sent.expect("images");
        if idx % 3 == 0 {
            for sample in 0..3 {
                assert_eq!(sent.ids(sample), expected.ids(sample), "call {idx}");
            }
        }
    }
    let seed = generate(&running.client, pb::GenerateRequest::default())
        .await
        .expect("an image")
        .started
        .expect("a first message")
        .seed;
    let again = generate(&running.client, pb::GenerateRequest::default()).await;
    let again = again.expect("an image").started.expect("a first message");
    assert_ne!(seed, again.seed, "drawn anew");
    running.end().await;
}

#[tokio::test]
async fn what_makes_no_sense_is_refused_with_its_name() {
    let flags = [
        "--samples-per-call-max",
        "4",
        "--response-bytes-max",
        "512KiB",
    ];
    let running = fake(2, Duration::ZERO, &flags).await;
    let with = |change: fn(&mut pb::GenerateRequest)| {
        let mut request = greedy();
        change(&mut request);
        request
    };
    let rows = |rows| primer(pb::image_primer::Keep::Rows(rows));
    let mut checks: Vec<(pb::GenerateRequest, &str)> = vec![
        (
            with(|request| request.samples = 5),
            "samples: the call has 5 samples",
        ),
        (
            with(|request| request.temperature = Some(-1.0)),
            "temperature: -1",
        ),
        (
            with(|request| request.temperature = Some(f32::NAN)),
            "temperature: NaN",
        ),
        (with(|request| request.top_p = Some(0.0)), "top_p: 0"),
        (with(|request| request.top_p = Some(1.5)), "top_p: 1.5"),
        (with(|request| request.scale = 33), "scale: 33"),
        (
            with(|request| (request.samples, request.scale) = (4, 32)),
            "samples: the answer may take",
        ),
        (
            with(|request| request.primer = prefix(&[0; 65])),
            "prefix.ids: the prefix has 65 tokens; the limit is 64",
        ),
        (
            with(|request| request.primer = prefix(&[1, 16])),
            "prefix.ids: index 1 is 16, the start token",
        ),
        (
            with(|request| request.primer = prefix(&[17])),
            "prefix.ids: index 0 is 17, outside",
        ),
    ];
    let mut request = greedy();
    request.primer = rows(9);
    checks.push((request.clone(), "image.rows: 9"));
    request.primer = primer(pb::image_primer::Keep::Mask(vec![1; 63].into()));
    checks.push((request.clone(), "image.mask: the mask has 63 bytes"));
    request.primer = Some(Primer::Image(pb::ImagePrimer {
        image: Some(flat(1)),
        ..Default::default()
    }));
    checks.push((request.clone(), "image.keep: neither"));
    request.primer = Some(Primer::Image(pb::ImagePrimer {
        image: Some(harness::encoded(&b"GIF89a?"[..])),
        keep: Some(pb::image_primer::Keep::Rows(1)),
        ..Default::default()
    }));
    checks.push((request.clone(), "encoded: "));
    request.primer = Some(Primer::Image(pb::ImagePrimer {
        keep: Some(pb::image_primer::Keep::Rows(1)),
        ..Default::default()
    }));
    checks.push((request, "image: none of"));
    for (request, words) in checks {
        let status = generate(&running.client, request).await.expect_err(words);
        assert_eq!(status.code(), Code::InvalidArgument, "{words}");
        assert!(status.message().contains(words), "{status}");
    }
    let requests = "imagegpt_requests_total{method=\"Generate\",code=\"INVALID_ARGUMENT\"}";
    assert_eq!(running.sample(requests).await, 15.0);
    running.end().await;

    let without = harness::fake(Script::default(), &[]).await;
    let status = generate(&without.client, greedy())
        .await
        .expect_err("no slots");
    assert_eq!(status.code(), Code::Unimplemented);
    let score = pb::ScoreRequest {
        images: vec![flat(1)],
        ..Default::default()
    };
    let status = without
        .client
        .clone()
        .score(score)
        .await
        .expect_err("no graph");
    assert_eq!(status.code(), Code::Unimplemented);
    assert!(status.message().contains("score.onnx"), "{status}");
    without.end().await;
}

#[tokio::test]
async fn whoever_goes_frees_the_place_at_once() {
    let running = fake(1, Duration::from_millis(1), &[]).await;
    let request = pb::GenerateRequest {
        samples: 3,
        ..greedy()
    };
    let mut stream = running
        .client
        .clone()
        .generate(request)
        .await
        .expect("a stream")
        .into_inner();
    stream.message().await.expect("a message");
    running.until_in_flight(3).await;
    drop(stream);
    let left = Instant::now();
    running.until_in_flight(0).await;
    assert!(
        left.elapsed() < Duration::from_secs(1),
        "long before they were done"
    );
    let requests = "imagegpt_requests_total{method=\"Generate\",code=\"CANCELLED\"}";
    until_sample(&running, requests, |n| n >= 1.0).await;
    assert_eq!(running.sample("imagegpt_sequences").await, 0.0);
    assert!(generate(&running.client, greedy()).await.is_ok());
    running.end().await;
}

/// Answers that a client has not read yet are counted with their real size, not
/// with the largest possible size.
#[tokio::test]
async fn pictures_that_wait_to_be_read_hold_their_own_size() {
    let running = fake(4, Duration::ZERO, &[]).await;
    let request = pb::GenerateRequest {
        samples: 8,
        scale: 32,
        ..greedy()
    };
    let stream = running.client.clone().generate(request).await;
    let stream = stream.expect("a stream").into_inner();
    running.until_in_flight(0).await;
    // 8 pictures of 256 pixels a side, of 3 bytes at worst.
    let at_worst = f64::from(8 * 256 * 256 * 3);
    until_sample(&running, "imagegpt_bytes_in_flight", |held| {
        held <= at_worst / 10.0
    })
    .await;
    drop(stream);
    running.end().await;
}

#[tokio::test]
async fn a_deadline_ends_the_stream() {
    let running = fake(1, Duration::from_millis(50), &[]).await;
    let mut request = Request::new(greedy());
    request.set_timeout(Duration::from_millis(300));
    let started = Instant::now();
    let status = generate(&running.client, request)
        .await
        .expect_err("64 steps of 50 ms");
    assert!(harness::is_late(&status), "{status}");
    assert!(started.elapsed() < Duration::from_secs(3));
    // By now it is known what a step takes.
    let mut request = Request::new(greedy());
    request.set_timeout(Duration::from_millis(1500));
    let status = generate(&running.client, request)
        .await
        .expect_err("too short");
    assert_eq!(status.code(), Code::DeadlineExceeded);
    assert!(status.message().contains("would take at least"), "{status}");
    running.until_in_flight(0).await;
    running.end().await;
}

#[tokio::test]
async fn more_than_there_are_places_wait_and_embeds_go_on() {
    let running = fake(2, Duration::from_millis(3), &[]).await;
    let mut calls = tokio::task::JoinSet::new();
    for idx in 0..6_u32 {
        let client = running.client.clone();
        let request = pb::GenerateRequest {
            samples: 2,
            primer: prefix(&seeded(idx)[..20]),
            ..greedy()
        };
        calls.spawn(async move { (idx, generate(&client, request).await) });
    }
    running.until_in_flight(12).await;
    for _ in 0..10 {
        let response = running.client.clone().embed(embed(vec![flat(3)])).await;
        assert_eq!(response.expect("a response").get_ref().results.len(), 1);
    }
    assert!(running.worker.images_in_flight() > 0, "not after them");
    while let Some(call) = calls.join_next().await {
        let (idx, sent) = call.expect("no panic");
        let expected = likeliest(&seeded(idx)[..20]);
        assert_eq!(sent.expect("images").ids(1), expected);
    }
    running.end().await;
}

#[tokio::test]
async fn what_was_begun_is_finished_when_the_worker_drains() {
    let running = fake(2, Duration::from_millis(2), &[]).await;
    let client = running.client.clone();
    let call = tokio::spawn(async move { generate(&client, greedy()).await });
    running.until_in_flight(1).await;
    running.end().await;
    let sent = call.await.expect("no panic").expect("an image");
    assert_eq!(sent.ids(0), likeliest(&[]));
}

/// Starts a worker with the causal micro model, compiled.
pub(crate) async fn causal(folder: &Path, precision: Precision, flags: &[&str]) -> Running {
    harness::start(&compiled(folder, precision), flags, None).await
}

/// Compiles the causal micro model and returns its directory.
pub(crate) fn compiled(folder: &Path, precision: Precision) -> PathBuf {
    let output = folder.join(precision.name());
    if !output.is_dir() {
        let library = onnx::find_library(None);
        let environment = onnx::environment(&library).expect("the library");
        let runtime = Runtime::new(environment, Provider::Cpu).expect("a runtime");
        let options = CompileOptions {
            precision,
            ..Default::default()
        };
        let source = ModelSource::Folder(harness::model_dir("micro-causal"));
        compile(&source, &output, &options, &runtime, &mut Silent).expect("compiled");
    }
    output
}

/// Results of transformers; see tests/data/models.
#[derive(Deserialize)]
pub(crate) struct Expected {
    pub(crate) images: Vec<Image>,
    primers: Vec<Completion>,
}

#[derive(Deserialize)]
pub(crate) struct Image {
    pub(crate) tokens: Vec<u32>,
    pub(crate) nll: Vec<f64>,
}

#[derive(Deserialize)]
pub(crate) struct Completion {
    primer: Vec<u32>,
    tokens: Vec<u32>,
    log_probs: Vec<f64>,
}

pub(crate) fn transformers() -> Expected {
    let path = harness::model_dir("micro-causal").join("expected.json");
    let text = std::fs::read(path).expect("expected.json");
    serde_json::from_slice(&text).expect("its shape")
}

fn assert_near(got: &[f32], expected: &[f64], tolerance: f64) {
    assert_eq!(got.len(), expected.len());
    for (got, expected) in got.iter().zip(expected) {
        assert!(
            (f64::from(*got) - expected).abs() <= tolerance,
            "{got} and {expected}"
        );
    }
}

async fn score(running: &Running, images: Vec<pb::Image>) -> Vec<pb::Score> {
    let request = pb::ScoreRequest {
        images,
        map: true,
        complexity: true,
        ..Default::default()
    };
    let response = running.client.clone().score(request).await.expect("scores");
    let results = response.into_inner().results.into_iter();
    results
        .map(|result| match result.outcome.expect("an outcome") {
            pb::score_result::Outcome::Score(score) => score,
            pb::score_result::Outcome::Error(status) => panic!("{status:?}"),
        })
        .collect()
}

#[tokio::test]
async fn scores_are_what_transformers_gives() {
    let folder = tempfile::tempdir().expect("a folder");
    let running = causal(folder.path(), Precision::Fp32, &[]).await;
    let expected = transformers();
    let images = expected
        .images
        .iter()
        .map(|image| tokens(image.tokens.clone()));
    let mut images: Vec<pb::Image> = images.collect();
    images.push(flat(3));
    let scores = score(&running, images).await;
    for (score, image) in scores.iter().zip(&expected.images) {
        let map = score.map.as_ref().expect("a map");
        assert_eq!(map.shape, [SIDE, SIDE]);
        assert_near(&f32s(map), &image.nll, 1e-4);
        let nats: f64 = image.nll.iter().sum();
        assert!((score.nats - nats).abs() <= 1e-4 * nats);
        assert!((score.nats_per_token - nats / 64.0).abs() <= 1e-5);
        assert!(
            (score.bits_per_token * std::f64::consts::LN_2 - score.nats_per_token).abs() < 1e-9
        );
    }
    let complexity = |score: &pb::Score| score.complexity_bits_per_token.expect("on request");
    assert!(complexity(&scores[3]) < complexity(&scores[0]), "one color");
    assert_eq!(
        running
            .sample("imagegpt_batch_size_sum{graph=\"score\"}")
            .await,
        4.0
    );
    running.end().await;
}

#[tokio::test]
async fn greedy_completions_are_what_transformers_gives_in_one_mixed_batch() {
    let folder = tempfile::tempdir().expect("a folder");
    let running = causal(folder.path(), Precision::Fp32, &[]).await;
    let model = running
        .client
        .clone()
        .get_model(pb::GetModelRequest {})
        .await
        .expect("a model")
        .into_inner();
    assert!(model.tasks.contains(&pb::Task::Generate.into()));
    assert!(model.tasks.contains(&pb::Task::Score.into()));
    assert_eq!(model.limits.expect("limits").generate_slots, 8);
    let expected = transformers();
    let mut calls = tokio::task::JoinSet::new();
    for (idx, completion) in expected.primers.iter().enumerate() {
        let client = running.client.clone();
        let request = pb::GenerateRequest {
            primer: prefix(&completion.primer),
            log_probs: true,
            ..greedy()
        };
        calls.spawn(async move { (idx, generate(&client, request).await) });
    }
    while let Some(call) = calls.join_next().await {
        let (idx, sent) = call.expect("no panic");
        let (sent, expected) = (sent.expect("an image"), &expected.primers[idx]);
        assert_eq!(sent.ids(0), expected.tokens, "primer {idx}");
        let image = sent.images[&0].as_ref().expect("an image");
        assert_near(&image.log_probs, &expected.log_probs, 1e-4);
    }
    running.end().await;
}

#[tokio::test]
async fn a_seed_and_its_score_hold_at_every_batch_size_and_precision() {
    let folder = tempfile::tempdir().expect("a folder");
    for (precision, tolerance) in [(Precision::Fp32, 1e-4), (Precision::Int8, 0.3)] {
        let mut images: Vec<Vec<u32>> = Vec::new();
        for slots in ["1", "2", "3", "8"] {
            let running = causal(folder.path(), precision, &["--generate-slots", slots]).await;
            let request = pb::GenerateRequest {
                seed: Some(11),
                samples: 5,
                primer: prefix(&seeded(2)[..9]),
                log_probs: true,
                ..Default::default()
            };
            let sent = generate(&running.client, request).await.expect("images");
            let got: Vec<Vec<u32>> = (0..5).map(|sample| sent.ids(sample).to_vec()).collect();
            let scores = score(&running, got.iter().cloned().map(tokens).collect()).await;
            for (sample, score) in (0..5).zip(scores) {
                let image = sent.images[&sample].as_ref().expect("an image");
                let map = f32s(score.map.as_ref().expect("a map"));
                let expected: Vec<f64> = map[9..].iter().map(|nll| -f64::from(*nll)).collect();
                assert_near(&image.log_probs, &expected, tolerance);
            }
            if images.is_empty() {
                images = got;
            } else {
                assert_eq!(got, images, "{slots} slots, {precision:?}");
            }
            running.end().await;
        }
    }
}

#[tokio::test]
async fn samples_are_distributed_as_the_model_says() {
    let folder = tempfile::tempdir().expect("a folder");
    let running = causal(folder.path(), Precision::Fp32, &[]).await;
    // One pixel is left, so that its probabilities are those of 16 images.
    let known = &seeded(4)[..63];
    let images = (0..u32::from(COLORS)).map(|color| {
        let ids = known.iter().copied().chain([color]);
        tokens(ids.collect())
    });
    let scores = score(&running, images.collect()).await;
    let probability = |score: &pb::Score| {
        let map = f32s(score.map.as_ref().expect("a map"));
        (-f64::from(map[63])).exp()
    };
    let probabilities: Vec<f64> = scores.iter().map(probability).collect();
    assert!((probabilities.iter().sum::<f64>() - 1.0).abs() < 1e-4);
    let mut counts = [0_u32; 16];
    for seed in 0..50 {
        let request = pb::GenerateRequest {
            primer: prefix(known),
            samples: 64,
            seed: Some(seed),
            no_rows: true,
            ..Default::default()
        };
        let sent = generate(&running.client, request).await.expect("images");
        for sample in 0..64 {
            counts[sent.ids(sample)[63] as usize] += 1;
        }
    }
    let n: f64 = counts.iter().map(|&count| f64::from(count)).sum();
    // Colors that come less than five times are counted as one.
    let (mut rare, mut statistic, mut freedom) = ((0.0, 0.0), 0.0, 0.0);
    for (&count, probability) in counts.iter().zip(&probabilities) {
        let expected = n * probability;
        if expected < 5.0 {
            rare = (rare.0 + f64::from(count), rare.1 + expected);
        } else {
            statistic += (f64::from(count) - expected).powi(2) / expected;
            freedom += 1.0;
        }
    }
    statistic += (rare.0 - rare.1).powi(2) / rare.1.max(1.0);
    // Larger once in ten thousand: about mean and four standard deviations.
    assert!(
        freedom > 4.0,
        "a model that knows too well: {probabilities:?}"
    );
    let limit = freedom + 4.0 * (2.0_f64 * freedom).sqrt() + 4.0;
    assert!(
        statistic < limit,
        "{statistic} of {freedom}: {counts:?} {probabilities:?}"
    );
    running.end().await;
}

#[tokio::test]
async fn samples_that_wait_leave_room_for_everybody_else() {
    let flags = [
        "--samples-in-flight-max",
        "4",
        "--images-in-flight-max",
        "8",
        "--images-per-call-max",
        "8",
    ];
    let running = fake(1, Duration::from_millis(5), &flags).await;
    let request = |samples| pb::GenerateRequest {
        samples,
        ..greedy()
    };
    let client = running.client.clone();
    let call = tokio::spawn(async move { generate(&client, request(4)).await });
    running.until_in_flight(4).await;
    let status = generate(&running.client, request(1))
        .await
        .expect_err("full");
    assert_eq!(status.code(), Code::ResourceExhausted);
    assert!(status.message().contains("samples in flight"), "{status}");
    let status = generate(&running.client, request(5))
        .await
        .expect_err("never");
    assert_eq!(status.code(), Code::InvalidArgument);
    let response = running.client.clone().embed(embed(vec![flat(3); 4])).await;
    assert_eq!(response.expect("room").get_ref().results.len(), 4);
    assert!(call.await.expect("no panic").is_ok());
    assert!(generate(&running.client, request(4)).await.is_ok());
    running.end().await;
}
