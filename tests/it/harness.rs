//! Starts a whole worker inside the test, on ports that the system chooses.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::Parser;
use imagegpt::engine::fake::{FakeEngine, Script};
use imagegpt::engine::{Engine, EngineFactory};
use imagegpt::model::Model;
use imagegpt::model::head::LinearHead;
use imagegpt::proto::pb;
use imagegpt::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use imagegpt::serve::config::ServeConfig;
use imagegpt::serve::devices::DeviceEngine;
use imagegpt::serve::worker::{Worker, WorkerEnded, onnx_engines};
use serde::Deserialize;
use tonic::transport::Channel;

pub(crate) type Client = ImageGptServiceClient<Channel>;

/// How long anything may take before a test gives up; generous, because CI
/// shares two cores.
pub(crate) const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeConfig,
}

/// A folder below tests/data/models, or `untrained`.
pub(crate) fn model_dir(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    match name {
        "untrained" => root.join("models/untrained"),
        _ => root.join("tests/data/models").join(name),
    }
}

/// The config that these flags make, for the model in `dir`.
pub(crate) fn config(dir: &std::path::Path, flags: &[&str]) -> ServeConfig {
    let dir = dir.to_str().expect("an UTF-8 path");
    let fixed = [
        "imagegpt",
        "--model",
        dir,
        "--listen",
        "127.0.0.1:0",
        "--metrics-listen",
        "127.0.0.1:0",
        "--execution-provider",
        "cpu",
        "--intra-op-threads",
        "1",
    ];
    let cli = Cli::try_parse_from(fixed.iter().chain(flags)).expect("flags that parse");
    cli.serve.validate().expect("flags that fit together");
    cli.serve
}

pub(crate) struct Running {
    pub(crate) worker: Worker,
    pub(crate) client: Client,
}

/// A worker on the micro model's files with a scripted engine.
pub(crate) async fn fake(script: Script, flags: &[&str]) -> Running {
    start(&model_dir("micro"), flags, Some(fake_factory(script))).await
}

pub(crate) fn fake_factory(script: Script) -> EngineFactory {
    Box::new(|| Ok(Box::new(FakeEngine::new(script)) as Box<dyn Engine>))
}

/// Device 0 and no other.
pub(crate) fn one(factory: EngineFactory) -> Vec<DeviceEngine> {
    vec![DeviceEngine { id: 0, factory }]
}

/// A worker on the micro model's files with a scripted engine for each device.
pub(crate) async fn fake_devices(scripts: Vec<Script>, flags: &[&str]) -> Running {
    let dir = model_dir("micro");
    let engine = |(id, script)| DeviceEngine {
        id,
        factory: fake_factory(script),
    };
    let engines = (0..).zip(scripts).map(engine).collect();
    let model = Model::open(&dir, None).expect("a model");
    let worker = start_worker(&config(&dir, flags), model, Vec::new(), engines).await;
    let client = connect(&worker).await;
    Running { worker, client }
}

/// A worker that runs the model in a test folder.
pub(crate) async fn onnx(name: &str, flags: &[&str]) -> Running {
    start(&model_dir(name), flags, None).await
}

pub(crate) async fn start(
    dir: &std::path::Path,
    flags: &[&str],
    factory: Option<EngineFactory>,
) -> Running {
    let config = config(dir, flags);
    let model = Model::open(dir, None).expect("a model");
    let heads: Vec<LinearHead> = config
        .model
        .heads
        .iter()
        .map(|flag| LinearHead::open(flag).expect("a head"))
        .collect();
    let engines = match factory {
        Some(factory) => {
            let id = config.model.devices.ids[0];
            vec![DeviceEngine { id, factory }]
        }
        None => onnx_engines(&config, &model, &heads).expect("ONNX Runtime"),
    };
    let worker = start_worker(&config, model, heads, engines).await;
    let client = connect(&worker).await;
    Running { worker, client }
}

/// A worker on the micro model's files, without a client.
pub(crate) async fn fake_worker(script: Script, flags: &[&str]) -> Worker {
    let dir = model_dir("micro");
    let model = Model::open(&dir, None).expect("a model");
    let engines = one(fake_factory(script));
    start_worker(&config(&dir, flags), model, Vec::new(), engines).await
}

async fn start_worker(
    config: &ServeConfig,
    model: Model,
    heads: Vec<LinearHead>,
    engines: Vec<DeviceEngine>,
) -> Worker {
    let mut worker = Worker::start(config, model, heads, engines)
        .await
        .expect("a worker");
    worker.ready().await.expect("a ready engine");
    worker
}

pub(crate) async fn connect(worker: &Worker) -> Client {
    Client::connect(format!("http://{}", worker.grpc_addr))
        .await
        .expect("a connection")
}

impl Running {
    /// Ends the worker in good order.
    pub(crate) async fn end(self) {
        drop(self.client);
        assert_eq!(self.worker.shutdown(PATIENCE).await, WorkerEnded::Clean);
    }

    /// The metrics page.
    pub(crate) async fn metrics(&self) -> String {
        get(self.worker.metrics_addr, "/metrics").await.1
    }

    /// One sample of the metrics page, by its name and labels as printed.
    pub(crate) async fn sample(&self, series: &str) -> f64 {
        sample(&self.metrics().await, series)
    }

    /// Waits until `n` images are in flight.
    pub(crate) async fn until_in_flight(&self, n: usize) {
        until(&format!("{n} images in flight"), || {
            self.worker.images_in_flight() == n
        })
        .await;
    }
}

/// Whether a call ended because its time was up: by the worker, or on a busy
/// machine by tonic's own timer in the client, a few milliseconds later.
pub(crate) fn is_late(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::DeadlineExceeded || is_clients_timer(status)
}

/// Whether the client's own timer came first.
pub(crate) fn is_clients_timer(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::Cancelled && status.message() == "Timeout expired"
}

/// The value of a series on a metrics page.
pub(crate) fn sample(page: &str, series: &str) -> f64 {
    page.lines()
        .find_map(|line| line.strip_prefix(series)?.strip_prefix(' '))
        .unwrap_or_else(|| panic!("no series {series} in:\n{page}"))
        .parse()
        .expect("a number")
}

/// Waits until a condition holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let started = Instant::now();
    while !condition() {
        assert!(started.elapsed() < PATIENCE, "never: {what}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// GET over HTTP/1.1: status and body.
pub(crate) async fn get(addr: std::net::SocketAddr, path: &str) -> (u16, String) {
    ask(addr, "GET", path).await
}

/// A request over HTTP/1.1: status and body.
pub(crate) async fn ask(addr: std::net::SocketAddr, method: &str, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(addr)
        .await
        .expect("a connection");
    let request = format!("{method} {path} HTTP/1.1\r\nhost: test\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("a response");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.expect("a status"), body.to_owned())
}

/// An image of the micro model's 64 tokens, each `token`.
pub(crate) fn flat(token: u32) -> pb::Image {
    tokens(vec![token; 64])
}

/// An image of the micro model, different for each seed.
pub(crate) fn seeded(seed: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(1);
    (0..64)
        .map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            (state >> 16) % 16
        })
        .collect()
}

pub(crate) fn tokens(ids: Vec<u32>) -> pb::Image {
    pb::Image {
        source: Some(pb::image::Source::Tokens(pb::Tokens { ids })),
    }
}

pub(crate) fn encoded(bytes: impl Into<bytes::Bytes>) -> pb::Image {
    pb::Image {
        source: Some(pb::image::Source::Encoded(bytes.into())),
    }
}

pub(crate) fn embed(images: Vec<pb::Image>) -> pb::EmbedRequest {
    pb::EmbedRequest {
        images,
        ..Default::default()
    }
}

/// The vector of a result, or its error's code and sentence.
pub(crate) fn vector(result: &pb::EmbedResult) -> Result<Vec<f32>, (tonic::Code, String)> {
    match result.outcome.as_ref().expect("an outcome") {
        pb::embed_result::Outcome::Embedding(tensor) => Ok(f32s(tensor)),
        pb::embed_result::Outcome::Error(status) => {
            Err((status.code.into(), status.message.clone()))
        }
    }
}

pub(crate) fn f32s(tensor: &pb::Tensor) -> Vec<f32> {
    assert_eq!(tensor.dtype, i32::from(pb::DataType::F32));
    let values: Vec<f32> = tensor
        .data
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes(bytes.try_into().expect("four bytes")))
        .collect();
    assert_eq!(values.len(), tensor.shape.iter().product::<u32>() as usize);
    values
}

/// ‖a − b‖ / ‖b‖.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    (difference / square(&mut b.iter().map(|&b| f64::from(b)))).sqrt()
}

/// Tokens of an image of the micro model, with what PyTorch answered for its
/// weights; see tests/data/models.
#[derive(Deserialize)]
pub(crate) struct Case {
    pub(crate) tokens: Vec<u32>,
    pub(crate) raw: Answers,
    pub(crate) sos_shifted: Answers,
}

#[derive(Deserialize)]
pub(crate) struct Answers {
    pub(crate) mean: Vec<f32>,
    pub(crate) last: Vec<f32>,
    pub(crate) first: Vec<f32>,
    pub(crate) logits: Vec<f32>,
    /// By layer from the embedding on.
    pub(crate) layers_raw: Vec<Vec<f32>>,
    pub(crate) layers_normed: Vec<Vec<f32>>,
}

pub(crate) fn expected() -> Vec<Case> {
    #[derive(Deserialize)]
    struct File {
        cases: Vec<Case>,
    }
    let text = std::fs::read(model_dir("expected.json")).expect("expected.json");
    serde_json::from_slice::<File>(&text)
        .expect("its shape")
        .cases
}

/// What the fake engine answers for these tokens.
pub(crate) fn fake_answer(ids: &[u32]) -> Vec<f32> {
    let tokens: Vec<u16> = ids
        .iter()
        .map(|&id| id.try_into().expect("16 bits"))
        .collect();
    FakeEngine::answer(&tokens, imagegpt::model::graph::Want::Mean)
}
