//! Starts a whole worker inside the test, on ports that the system chooses.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use clap::Parser;
use imagegpt::engine::fake::{FakeEngine, Script};
use imagegpt::engine::onnx::OnnxOptions;
use imagegpt::engine::{
    CanaryOutcome, Engine, EngineFactory, EngineFacts, GraphRun, RunSpan, RunStop, SlotFeed,
    WarmRun,
};
use imagegpt::model::Model;
use imagegpt::model::buckets::Buckets;
use imagegpt::model::head::LinearHead;
use imagegpt::model::precision::ProviderChoice;
use imagegpt::proto::pb;
use imagegpt::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use imagegpt::runtime::error::EngineError;
use imagegpt::runtime::library::find_library;
use imagegpt::runtime::{GpuAttention, GpuCopies};
use imagegpt::serve::config::ServeConfig;
use imagegpt::serve::devices::DeviceEngine;
use imagegpt::serve::engines::onnx_engines;
use imagegpt::serve::heads::StartHeads;
use imagegpt::serve::worker::{Worker, WorkerEnded};
use serde::Deserialize;
use tonic::transport::Channel;

use crate::process;
pub(crate) use crate::process::PATIENCE;

pub(crate) type Client = ImageGptServiceClient<Channel>;

/// Interval between two checks of the condition that a test waits for.
const POLL: Duration = Duration::from_millis(1);

#[derive(Parser)]
struct Cli {
    #[command(flatten)]
    serve: ServeConfig,
}

/// Returns a directory below tests/data/models, or that of `untrained`.
pub(crate) fn model_dir(name: &str) -> PathBuf {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR"));
    match name {
        "untrained" => root.join("models/untrained"),
        _ => root.join("tests/data/models").join(name),
    }
}

/// Returns the configuration by `flags` for the model in `dir`.
pub(crate) fn config(dir: &std::path::Path, flags: &[&str]) -> ServeConfig {
    let dir = dir.to_str().expect("an UTF-8 path");
    let fixed = [
        "imagegpt",
        "--model",
        dir,
        "--listen",
        "127.0.0.1:0",
        "--execution-provider",
        "cpu",
        "--intra-op-threads",
        "1",
    ];
    let is_given = flags.contains(&"--metrics-listen");
    let metrics = [&["--metrics-listen", "127.0.0.1:0"][..], &[]][usize::from(is_given)];
    let all = fixed.iter().chain(metrics).chain(flags);
    let cli = Cli::try_parse_from(all).expect("flags that parse");
    cli.serve.validate().expect("flags that fit together");
    cli.serve
}

pub(crate) struct Running {
    pub(crate) worker: Worker,
    pub(crate) client: Client,
}

/// Starts a worker on the micro model's files with a scripted engine.
pub(crate) async fn fake(script: Script, flags: &[&str]) -> Running {
    start(&model_dir("micro"), flags, Some(fake_factory(script))).await
}

pub(crate) fn fake_factory(script: Script) -> EngineFactory {
    Box::new(|| Ok(Box::new(FakeEngine::new(script)) as Box<dyn Engine>))
}

/// Makes the script of an engine that runs one batch per message.
pub(crate) fn gated() -> (crossbeam_channel::Sender<()>, Script) {
    let (open, gate) = crossbeam_channel::bounded(4096);
    let script = Script {
        gate: Some(gate),
        ..Default::default()
    };
    (open, script)
}

type Run =
    dyn FnMut(&mut FakeEngine, &GraphRun<'_>, &RunStop) -> Result<Vec<Vec<f32>>, EngineError>;

/// Fake engine with other facts or another behavior.
pub(crate) struct Altered {
    engine: FakeEngine,
    pub(crate) facts: EngineFacts,
    pub(crate) run: Box<Run>,
}

/// Makes a fake engine and changes it.
pub(crate) fn altered(
    script: Script,
    change: impl FnOnce(&mut Altered) + Send + 'static,
) -> EngineFactory {
    Box::new(|| {
        let engine = FakeEngine::new(script);
        let mut altered = Altered {
            facts: engine.facts().clone(),
            engine,
            run: Box::new(FakeEngine::run),
        };
        change(&mut altered);
        Ok(Box::new(altered))
    })
}

impl Engine for Altered {
    fn facts(&self) -> &EngineFacts {
        &self.facts
    }

    fn warm(&self) -> &[WarmRun] {
        self.engine.warm()
    }

    fn run(&mut self, run: &GraphRun<'_>, stop: &RunStop) -> Result<Vec<Vec<f32>>, EngineError> {
        (self.run)(&mut self.engine, run, stop)
    }

    fn feed(&mut self, feed: &SlotFeed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        self.engine.feed(feed, logits)
    }

    fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool {
        self.engine.copy_slot(from, to, n)
    }

    fn fill_slot(&mut self, slot: usize, number: f32) -> Result<(), EngineError> {
        self.engine.fill_slot(slot, number)
    }

    fn canary(&mut self) -> Result<CanaryOutcome, EngineError> {
        self.engine.canary()
    }

    fn last_span(&self) -> Option<RunSpan> {
        self.engine.last_span()
    }
}

/// Returns the options of an engine with ONNX Runtime for a small model on the
/// CPU.
pub(crate) fn onnx_options(model: Model) -> OnnxOptions {
    OnnxOptions {
        library: find_library(None),
        provider: ProviderChoice::Cpu,
        device_id: 0,
        intra_op_threads: 1,
        positions: model.positions(),
        n_colors: model.clusters.len(),
        sizes_are_given: model.sizes_are_given,
        n_labels: model.labels.len(),
        head_widths: Vec::new(),
        compiled_for: None,
        precision: None,
        graphs: model.graphs,
        files: model.files,
        buckets: Buckets::powers_of_two(2),
        generate_slots: 0,
        generate_bytes_max: 0,
        gpu_memory_limit: None,
        cuda_graphs: false,
        generate_attention: GpuAttention::Auto,
        gpu_copies: GpuCopies::OnnxRuntime,
    }
}

/// Makes device 0 alone.
pub(crate) fn one(factory: EngineFactory) -> Vec<DeviceEngine> {
    vec![DeviceEngine { id: 0, factory }]
}

/// Starts a worker on the micro model's files with a scripted engine for each
/// device.
pub(crate) async fn fake_devices(scripts: Vec<Script>, flags: &[&str]) -> Running {
    let dir = model_dir("micro");
    let engine = |(id, script)| DeviceEngine {
        id,
        factory: fake_factory(script),
    };
    let engines = (0..).zip(scripts).map(engine).collect();
    let model = Model::open(&dir, None).expect("a model");
    let worker = start_worker(&config(&dir, flags), model, StartHeads::default(), engines).await;
    let client = connect(&worker).await;
    Running { worker, client }
}

/// Starts a worker that runs the model in a test directory.
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
    let flags = &config.model.heads;
    let heads = flags.iter().map(LinearHead::open);
    let mut heads = StartHeads::new(heads.collect::<Result<_, _>>().expect("heads"));
    if let Some(dir) = &config.model.head_dir {
        heads.add_dir(dir, flags, &model).expect("a directory");
    }
    let engines = match factory {
        Some(factory) => {
            let id = config.model.devices.ids[0];
            vec![DeviceEngine { id, factory }]
        }
        None => onnx_engines(&config, &model, &heads.heads).expect("ONNX Runtime"),
    };
    let worker = start_worker(&config, model, heads, engines).await;
    let client = connect(&worker).await;
    Running { worker, client }
}

/// Starts a worker on the micro model's files, without a client.
pub(crate) async fn fake_worker(script: Script, flags: &[&str]) -> Worker {
    let dir = model_dir("micro");
    let model = Model::open(&dir, None).expect("a model");
    let engines = one(fake_factory(script));
    start_worker(&config(&dir, flags), model, StartHeads::default(), engines).await
}

async fn start_worker(
    config: &ServeConfig,
    model: Model,
    heads: StartHeads,
    engines: Vec<DeviceEngine>,
) -> Worker {
    let mut worker = Worker::start(config, model, heads, engines)
        .await
        .expect("a worker");
    worker.ready().await.expect("a ready engine");
    worker
}

pub(crate) async fn connect(worker: &Worker) -> Client {
    Client::connect(url(worker)).await.expect("a connection")
}

pub(crate) fn url(worker: &Worker) -> String {
    format!("http://{}", worker.grpc_addr)
}

impl Running {
    /// Shuts the worker down gracefully.
    pub(crate) async fn end(self) {
        drop(self.client);
        assert_eq!(self.worker.shutdown(PATIENCE).await, WorkerEnded::Clean);
    }

    pub(crate) fn url(&self) -> String {
        url(&self.worker)
    }

    /// Returns the metrics page.
    pub(crate) async fn metrics(&self) -> String {
        metrics(self).await
    }

    /// Returns a sample of the metrics page, by its name and labels as printed.
    pub(crate) async fn sample(&self, series: &str) -> f64 {
        sample(&self.metrics().await, series)
    }

    /// Waits until `n` images are in flight.
    pub(crate) async fn until_in_flight(&self, n: usize) {
        until_in_flight(&self.worker, n).await;
    }
}

/// Waits until `n` images are in flight.
pub(crate) async fn until_in_flight(worker: &Worker, n: usize) {
    let what = format!("{n} images in flight");
    until(worker, &what, async || worker.images_in_flight() == n).await;
}

/// Source of a metrics page: a worker, or the address of a worker that was
/// moved elsewhere.
pub(crate) trait Measured {
    fn metrics_addr(&self) -> SocketAddr;
}

impl Measured for Running {
    fn metrics_addr(&self) -> SocketAddr {
        self.worker.metrics_addr
    }
}

impl Measured for Worker {
    fn metrics_addr(&self) -> SocketAddr {
        self.metrics_addr
    }
}

impl Measured for SocketAddr {
    fn metrics_addr(&self) -> SocketAddr {
        *self
    }
}

/// Returns the metrics page.
pub(crate) async fn metrics(worker: &impl Measured) -> String {
    get(worker.metrics_addr(), "/metrics").await.1
}

/// Waits until a condition holds; if it never does, panics with the worker's
/// metrics page.
pub(crate) async fn until(
    worker: &impl Measured,
    what: &str,
    mut condition: impl AsyncFnMut() -> bool,
) {
    let holds = async {
        while !condition().await {
            pause(POLL).await;
        }
    };
    if tokio::time::timeout(PATIENCE, holds).await.is_ok() {
        return;
    }
    // Asked without blocking a runtime that has one thread, which may be the worker's.
    let addr = worker.metrics_addr();
    let page = tokio::task::spawn_blocking(move || process::get(addr, "/metrics"));
    let page = page.await.expect("no panic");
    panic!("never: {what}\n{page}");
}

/// Waits until a series has an acceptable value, and returns the value. The end
/// of a call is counted a moment after the client has seen it.
pub(crate) async fn until_sample(
    worker: &impl Measured,
    series: &str,
    condition: impl Fn(f64) -> bool,
) -> f64 {
    let mut value = f64::NAN;
    let what = format!("the wanted value of {series}");
    until(worker, &what, async || {
        value = sample(&metrics(worker).await, series);
        condition(value)
    })
    .await;
    value
}

/// Waits for a fixed time that is part of a scenario: something goes on
/// meanwhile, or must not happen. To wait for an event, use [`until`].
#[expect(
    clippy::disallowed_methods,
    reason = "the one pause of tasks, for tests that mean the time itself"
)]
pub(crate) async fn pause(time: Duration) {
    tokio::time::sleep(time).await;
}

/// Returns true if a call ended at its deadline: by the worker, or on a busy
/// machine by tonic's own timer in the client, a few milliseconds later.
pub(crate) fn is_late(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::DeadlineExceeded || is_clients_timer(status)
}

/// Returns true if the client's own timer ended the call.
pub(crate) fn is_clients_timer(status: &tonic::Status) -> bool {
    status.code() == tonic::Code::Cancelled && status.message() == "Timeout expired"
}

/// Returns the value of a series on a metrics page.
pub(crate) fn sample(page: &str, series: &str) -> f64 {
    process::sample(page, series).unwrap_or_else(|| panic!("no series {series} in:\n{page}"))
}

/// Sends a GET over HTTP/1.1, and returns status and body.
pub(crate) async fn get(addr: SocketAddr, path: &str) -> (u16, String) {
    ask(addr, "GET", path).await
}

/// Sends a request over HTTP/1.1, and returns status and body.
pub(crate) async fn ask(addr: SocketAddr, method: &str, path: &str) -> (u16, String) {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let mut stream = tokio::net::TcpStream::connect(addr)
        .await
        .expect("a connection");
    let request = format!("{method} {path} HTTP/1.1\r\nhost: {addr}\r\nconnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.expect("sent");
    let mut text = String::new();
    stream.read_to_string(&mut text).await.expect("a response");
    let (head, body) = text.split_once("\r\n\r\n").expect("a head and a body");
    let status = head.split(' ').nth(1).and_then(|code| code.parse().ok());
    (status.expect("a status"), body.to_owned())
}

/// Makes an image of the micro model whose 64 tokens are all `token`.
pub(crate) fn flat(token: u32) -> pb::Image {
    tokens(vec![token; 64])
}

/// Makes an image of the micro model that differs for each seed.
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

/// Returns the vector of a result, or its error's code and message.
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

/// Returns the relative error ‖a − b‖ / ‖b‖.
pub(crate) fn relative_error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(a - b)));
    (difference / square(&mut b.iter().map(|&b| f64::from(b)))).sqrt()
}

/// Tokens of an image of the micro model, with PyTorch's results for the
/// model's weights; see tests/data/models.
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
    /// Raw features by layer, from the embedding on.
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

/// Returns the fake engine's answer for these tokens.
pub(crate) fn fake_answer(ids: &[u32]) -> Vec<f32> {
    let tokens: Vec<u16> = ids
        .iter()
        .map(|&id| id.try_into().expect("16 bits"))
        .collect();
    FakeEngine::answer(&tokens, imagegpt::model::graph::Want::Mean)
}
