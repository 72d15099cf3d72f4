//! Composition root: builds the stages, wires their channels, and owns their
//! threads. This is the only file that knows all stages.
//!
//! A worker shuts down by ownership. When the server stops, the last handle to
//! admission's entrance is dropped; preprocessing finishes its queue and closes
//! the batcher's channel; the batcher hands on the waiting work and closes the
//! engines' channels; the engines end.

use std::net::SocketAddr;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

use crate::engine::EngineFacts;
use crate::gpu;
use crate::imaging::{ImageLimits, Palette, Preprocessor};
use crate::model::Model;
use crate::serve::admission::{Admission, Capacity, Occupancy};
use crate::serve::batcher::Batcher;
use crate::serve::batcher::policy::Policy;
use crate::serve::cache::AnswerCache;
use crate::serve::capacity::DrainRate;
use crate::serve::config::{LimitsConfig, ServeConfig};
use crate::serve::devices::{
    DeviceEngine, DeviceIdx, DeviceReports, DeviceStates, FailureKind, WorkerFailure, WorkerState,
};
use crate::serve::engine_thread::Runner;
use crate::serve::engines::to_usize;
use crate::serve::heads::{self, HeadFollower, StartHeads};
use crate::serve::http::PageSources;
use crate::serve::metrics::Metrics;
use crate::serve::preprocess::queue::{QueueEntrance, ThreadReach};
use crate::serve::preprocess::{Preprocessing, queue};
use crate::serve::readiness::{Drain, Readiness};
use crate::serve::trace::{SpanExport, Traces};
use crate::serve::{batcher, engine_thread, http, preprocess, rpc};
use crate::telemetry::panic_text;

/// Time for the connections to write out the last answers and to close, after
/// the last call's answer has been handed to its connection.
const LINGER: Duration = Duration::from_secs(1);
/// Interval at which histograms are folded if nobody scrapes; otherwise they
/// would grow with every observation.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);
/// Interval at which the GPUs' usage is read: as fresh as any scrape needs, and
/// NVML answers within milliseconds.
const GPU_INTERVAL: Duration = Duration::from_secs(5);

/// Worker whose ports are bound.
pub struct Worker {
    /// Address at which gRPC is served.
    pub grpc_addr: SocketAddr,
    /// Address at which metrics are served.
    pub metrics_addr: SocketAddr,
    readiness: Readiness,
    drain: Drain,
    occupancy: Occupancy,
    calls: rpc::CallsInProgress,
    devices: watch::Receiver<DeviceStates>,
    server: tokio::task::JoinHandle<()>,
    stop: oneshot::Sender<()>,
    threads: Vec<JoinHandle<()>>,
    /// Tasks for metrics pages and upkeep, which end with the worker.
    side_tasks: Vec<tokio::task::JoinHandle<()>>,
    export: Option<SpanExport>,
}

/// Stages that have their own threads, connected by their channels.
struct Stages {
    /// Entrance for the jobs that admission lets in.
    door: QueueEntrance,
    /// Preprocessing for jobs of admission that need no thread.
    preprocessing: Preprocessing,
    drain: DrainRate,
    cache: AnswerCache,
    devices: watch::Receiver<DeviceStates>,
    reports: DeviceReports,
    threads: Vec<JoinHandle<()>>,
}

impl Stages {
    fn start(
        config: &ServeConfig,
        model: &Model,
        engines: Vec<DeviceEngine>,
        metrics: &Metrics,
        traces: &Traces,
    ) -> anyhow::Result<Self> {
        let limits = &config.limits;
        let preprocessor = Arc::new(preprocessor(model, limits)?);
        // The queue has room for as many jobs as may be in flight, and each job
        // holds its permit: the queue cannot be full when a job arrives.
        let images_max = limits.images_in_flight_max as usize;
        let (tokens_in, tokens) = crossbeam_channel::bounded(images_max);
        // Room for one ring, because two mean the same.
        let (bell_in, bell) = crossbeam_channel::bounded(1);
        let (door, pictures) = queue::queue(bell_in, metrics.clone());
        // An engine sends at most the answers of its last run, and that it is
        // free or has ended; if there is no room, the engine waits or need not
        // send the notice.
        let (notices_in, notices) = crossbeam_channel::bounded(2 * engines.len());
        // Any thread that ends before its time ends the worker's readiness; the
        // end of a device does so only as all devices together decide.
        let ids = engines.iter().map(|engine| engine.id);
        let (reports, devices) = DeviceReports::new(ids, metrics.clone());
        let batching = &config.batching;
        let buckets = model.buckets(batching.buckets());
        if let Some(reason) = model.why_other_buckets(&batching.buckets()) {
            tracing::info!(
                reason,
                "the flags of batch sizes have no effect on this model"
            );
        }
        metrics.batch_size_max(buckets.largest());
        let drain = DrainRate::default();
        let cache = AnswerCache::new(batching.cache_bytes.as_u64());

        // Each channel holds one turn, which is sent after a slot.
        let lines = engines.iter().map(|_| batcher::EngineLine::new());
        let (lines, ends): (Vec<_>, Vec<_>) = lines.unzip();
        let policy = Policy {
            buckets: buckets.clone(),
            max_queue_delay: batching.max_queue_delay,
            bulk_share: batching.bulk_share,
            bulk_wait_max: batching.bulk_wait_max,
        };
        let shared = batcher::BatcherParts {
            cache: cache.clone(),
            drain: drain.clone(),
            interactive_reserve: limits.interactive_reserve,
            metrics: metrics.clone(),
        };
        let batcher = Batcher::new(policy, lines, shared);
        let mut threads = Vec::new();
        for ((idx, engine), (turns, stop)) in engines.into_iter().enumerate().zip(ends) {
            let runner = Runner {
                device: DeviceIdx(idx),
                batcher: batcher.clone(),
                notices: notices_in.clone(),
                turns,
                buckets: buckets.clone(),
                canary_interval: Some(batching.canary_interval).filter(|every| !every.is_zero()),
                stop,
                cache: cache.clone(),
                metrics: metrics.clone(),
                traces: traces.clone(),
                gap: metrics.engine_gap(engine.id),
                reports: reports.clone(),
            };
            let (name, factory) = (format!("engine-{}", engine.id), engine.factory);
            threads.push(spawn(&name, &reports, move || {
                engine_thread::run(factory, runner);
            })?);
        }
        // Dropped so that the batcher sees when the last engine has ended.
        drop(notices_in);
        let channels = batcher::Channels {
            jobs: tokens,
            bell,
            notices,
        };
        threads.push(spawn("batcher", &reports, move || {
            batcher::run(&batcher, &channels);
        })?);
        let preprocessing = Preprocessing {
            preprocessor,
            decode_cpu_time_max: limits.decode_cpu_time_max,
            batcher: tokens_in,
            metrics: metrics.clone(),
        };
        // One thread more than `--preprocess-threads` takes cheap pictures
        // only. It is idle while the others keep up, and shares their cores
        // while large pictures occupy all of them.
        let reaches = (0..n_preprocess_threads(config)).map(|_| ThreadReach::Any);
        for (idx, reach) in reaches.chain([ThreadReach::Cheap]).enumerate() {
            let (preprocessing, pictures) = (preprocessing.clone(), Arc::clone(&pictures));
            threads.push(spawn(&format!("preprocess-{idx}"), &reports, move || {
                preprocess::run(&preprocessing, &pictures, reach);
            })?);
        }
        Ok(Self {
            door,
            preprocessing,
            drain,
            cache,
            devices,
            reports,
            threads,
        })
    }
}

/// Outcome of a worker's shutdown.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum WorkerEnded {
    /// Every call in progress was answered, and its answer taken by its client,
    /// except where the client read nothing for as long as the drain waits for
    /// readers: nothing was lost that the worker could have delivered.
    Clean,
    /// The grace period ended before the calls.
    Hard {
        /// Number of calls that were in progress.
        calls: usize,
    },
}

impl Worker {
    /// Binds both ports and starts every stage. The engines load on their own
    /// threads meanwhile: see [`Worker::ready`].
    ///
    /// # Errors
    ///
    /// Fails if a port is taken or a thread cannot be started.
    pub async fn start(
        config: &ServeConfig,
        model: Model,
        heads: StartHeads,
        engines: Vec<DeviceEngine>,
    ) -> anyhow::Result<Self> {
        let started = Instant::now();
        let network = &config.network;
        let access = rpc::Access::open(&config.access, &config.limits)?;
        let listener = bind(network.listen, "--listen").await?;
        let metrics_listener = bind(network.metrics_listen, "--metrics-listen").await?;
        let (grpc_addr, metrics_addr) = (listener.local_addr()?, metrics_listener.local_addr()?);
        // Before anything can say that it is ready: who starts a worker on a
        // free port reads the port first.
        tracing::info!(grpc = %grpc_addr, metrics = %metrics_addr, "listening");

        let metrics = Metrics::new()?;
        warn_of_silent_access_log(config);
        let (traces, export) = Traces::start(&config.trace, &metrics)?;
        let stages = Stages::start(config, &model, engines, &metrics, &traces)?;
        let (readiness, drain) = Readiness::new(stages.devices.clone());
        let limits = &config.limits;
        let capacity = Capacity {
            images: limits.images_in_flight_max as usize,
            bytes: to_usize(limits.bytes_in_flight_max.as_u64()),
            samples: limits.samples_in_flight_max as usize,
            interactive_reserve: limits.interactive_reserve,
        };
        let admission = Admission::new(capacity, stages.drain, stages.door, stages.preprocessing);
        let occupancy = admission.occupancy();
        let pages = PageSources {
            metrics: metrics.clone(),
            occupancy: occupancy.clone(),
            cache: stages.cache,
            readiness: readiness.clone(),
        };
        let largest = model.buckets(config.batching.buckets()).largest();
        let max_batch_size = u16::try_from(largest).unwrap_or(u16::MAX);
        let model = Arc::new(model);
        let gpus = gpu::KnownGpus::default();
        let mut side_tasks = vec![
            tokio::spawn(watch_gpus(
                stages.devices.clone(),
                config.model.devices.ids.clone(),
                gpus.clone(),
                metrics.clone(),
            )),
            tokio::spawn(http::serve(metrics_listener, pages)),
            tokio::spawn(keep_metrics(metrics.clone())),
            tokio::spawn(announce(
                stages.devices.clone(),
                Arc::clone(&model),
                metrics.clone(),
                started,
            )),
        ];
        let (heads, follower) = heads::serve(heads, &config.model, &model);
        let follow = |follower| follow_heads(follower, stages.devices.clone(), metrics.clone());
        side_tasks.extend(follower.map(|follower| tokio::spawn(follow(follower))));
        let service = rpc::WorkerService {
            heads,
            model,
            admission,
            readiness: readiness.clone(),
            limits: limits.clone(),
            max_batch_size,
            gpus,
            metrics,
            shutdown_grace_period: network.shutdown_grace_period,
        };
        let calls = rpc::CallsInProgress::new();
        let options = rpc::ServerOptions {
            reflection: !network.no_reflection,
            keepalive_interval: network.keepalive_interval,
            keepalive_timeout: network.keepalive_timeout,
            calls: calls.clone(),
            access,
            connections: config.connections.clone(),
            traces,
            access_log: config.trace.access_log,
        };
        let (stop, stopped) = oneshot::channel();
        let reports = stages.reports;
        let server = tokio::spawn(async move {
            let stopped = async {
                let _ = stopped.await;
            };
            if let Err(error) = rpc::serve(service, listener, options, stopped).await {
                reports.fail(format!("the gRPC server ended: {error:#}"));
            }
        });
        Ok(Self {
            grpc_addr,
            metrics_addr,
            readiness,
            drain,
            occupancy,
            calls,
            devices: stages.devices,
            server,
            stop,
            threads: stages.threads,
            side_tasks,
            export,
        })
    }

    /// Waits until the model is loaded and warmed up.
    ///
    /// # Errors
    ///
    /// Returns the reason why the model could not be loaded.
    pub async fn ready(&mut self) -> Result<EngineFacts, WorkerFailure> {
        let state = self
            .devices
            .wait_for(|devices| !matches!(devices.state(), WorkerState::Loading))
            .await
            .map(|devices| devices.state());
        match state {
            Ok(WorkerState::Ready(facts)) => Ok(facts),
            Ok(WorkerState::Failed(failure)) => Err(failure),
            Ok(WorkerState::Loading | WorkerState::Stopped) | Err(_) => Err(WorkerFailure {
                kind: FailureKind::Worker,
                reason: "the engine ended".to_owned(),
            }),
        }
    }

    /// Resolves with the reason when the worker cannot go on; pends otherwise.
    pub async fn failed(&mut self) -> WorkerFailure {
        let failed = |devices: &DeviceStates| devices.failure().is_some();
        let devices = self.devices.wait_for(failed).await;
        let failure = devices.ok().and_then(|devices| devices.failure().cloned());
        match failure {
            Some(failure) => failure,
            None => std::future::pending().await,
        }
    }

    /// Returns the worker's readiness.
    #[must_use]
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// Number of images that were admitted and are not yet answered.
    #[must_use]
    pub fn images_in_flight(&self) -> usize {
        self.occupancy.images()
    }

    /// Makes the worker not ready, so that no new callers are sent to it; calls
    /// that still arrive are served.
    pub fn leave(&self) {
        self.drain.leave();
    }

    /// Stops taking calls and finishes the calls in progress, within `grace`
    /// (graceful shutdown).
    pub async fn shutdown(mut self, grace: Duration) -> WorkerEnded {
        let export = self.export.take();
        let ended = self.end(grace).await;
        // The last calls' spans are made by now.
        if let Some(export) = export {
            export.end().await;
        }
        ended
    }

    async fn end(mut self, grace: Duration) -> WorkerEnded {
        let deadline = tokio::time::Instant::now() + grace;
        self.drain.begin();
        let _ = self.stop.send(());
        let ended = tokio::time::timeout_at(deadline, async {
            tokio::select! {
                _ = &mut self.server => true,
                // Connections without calls may never close: a health watch, or
                // a client that does not respond. The shutdown does not wait
                // for them.
                () = self.calls.none() => {
                    tokio::time::timeout(LINGER, &mut self.server).await.is_ok()
                }
            }
        })
        .await;
        for task in &self.side_tasks {
            task.abort();
        }
        let Ok(server_ended) = ended else {
            self.server.abort();
            return WorkerEnded::Hard {
                calls: self.calls.count(),
            };
        };
        if !server_ended {
            // The service, and with it admission's entrance, lives on in the
            // connections that are left, so the threads do not end by
            // themselves; but they have nothing left to do.
            tracing::info!(
                "clients keep idle connections open; the worker ends without waiting for them"
            );
            self.server.abort();
            return WorkerEnded::Clean;
        }
        let joined = join(std::mem::take(&mut self.threads));
        match tokio::time::timeout_at(deadline, joined).await {
            Ok(_) => WorkerEnded::Clean,
            Err(_) => WorkerEnded::Hard { calls: 0 },
        }
    }
}

/// Warns if the filter of the log leaves out the lines of --access-log.
fn warn_of_silent_access_log(config: &ServeConfig) {
    let is_shown = tracing::enabled!(target: "imagegpt::access", tracing::Level::INFO);
    if config.trace.access_log && !is_shown {
        tracing::warn!("--access-log writes nothing, since --log leaves out imagegpt::access=info");
    }
}

/// Resolves when all stages have ended. The wait is on a thread of its own,
/// because a runtime waits for its own blocking threads when it ends, however
/// long they take.
fn join(threads: Vec<JoinHandle<()>>) -> oneshot::Receiver<()> {
    let (done, joined) = oneshot::channel();
    let join = move || {
        for thread in threads {
            // A panic of the thread has been reported where it happened.
            let _ = thread.join();
        }
        let _ = done.send(());
    };
    // If the thread cannot be started, the shutdown ends with the grace period.
    let _ = std::thread::Builder::new()
        .name("join".to_owned())
        .spawn(join);
    joined
}

async fn bind(addr: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr)
        .await
        .with_context(|| format!("cannot bind {addr} ({flag})"))
}

/// Starts a stage's thread. A panic in the thread ends readiness: without one
/// of its stages the worker cannot answer.
fn spawn(
    name: &str,
    reports: &DeviceReports,
    body: impl FnOnce() + Send + 'static,
) -> anyhow::Result<JoinHandle<()>> {
    let (reports, thread_name) = (reports.clone(), name.to_owned());
    let supervised = move || {
        if let Err(panic) = std::panic::catch_unwind(AssertUnwindSafe(body)) {
            let panic = panic_text(&*panic);
            reports.fail(format!("the {thread_name} thread panicked: {panic}"));
        }
    };
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(supervised)
        .with_context(|| format!("cannot start the thread {name}"))
}

async fn keep_metrics(metrics: Metrics) {
    let mut interval = tokio::time::interval(METRICS_UPKEEP);
    loop {
        interval.tick().await;
        metrics.upkeep();
    }
}

/// Waits until the engines are loaded; returns their facts and the number of
/// devices that serve.
async fn loaded(mut devices: watch::Receiver<DeviceStates>) -> Option<(EngineFacts, usize)> {
    let devices = devices
        .wait_for(|devices| !matches!(devices.state(), WorkerState::Loading))
        .await
        .ok()?;
    match devices.state() {
        WorkerState::Ready(facts) => Some((facts, devices.n_serving())),
        _ => None,
    }
}

/// Follows `--head-dir` once the model is loaded, whose features the heads must
/// fit.
async fn follow_heads(
    follower: HeadFollower,
    devices: watch::Receiver<DeviceStates>,
    metrics: Metrics,
) {
    if let Some((facts, _)) = loaded(devices).await {
        follower.run(facts.dimension, metrics).await;
    }
}

/// Reports the GPUs that the model runs on, once it is loaded, and then their
/// usage at each interval. A driver may hang; then only this task waits, and
/// the driver is not asked again.
async fn watch_gpus(
    devices: watch::Receiver<DeviceStates>,
    ids: Vec<i32>,
    known: gpu::KnownGpus,
    metrics: Metrics,
) {
    match loaded(devices).await {
        Some((facts, _)) if facts.provider == "cuda" => {}
        _ => return,
    }
    let Ok(monitor) = tokio::task::spawn_blocking(gpu::Monitor::open).await else {
        return;
    };
    let gpus = &monitor.gpus;
    for gpu in ids.iter().filter_map(|&id| gpus.device(id)) {
        tracing::info!(
            device_id = gpu.id,
            name = gpu.name,
            uuid = gpu.uuid,
            memory_bytes = gpu.memory_bytes,
            compute_capability = %gpu.compute_capability,
            driver = gpus.driver_version,
            "the model runs on a GPU"
        );
    }
    known.set(gpus.clone());
    if let Some(reason) = &gpus.absent {
        tracing::warn!(
            reason,
            "the GPU cannot be monitored; its metrics are absent"
        );
        return;
    }
    let monitor = Arc::new(monitor);
    let mut interval = tokio::time::interval(GPU_INTERVAL);
    interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        interval.tick().await;
        let (monitor, ids) = (Arc::clone(&monitor), ids.clone());
        let look = tokio::task::spawn_blocking(move || monitor.usage(&ids));
        for (id, usage) in look.await.unwrap_or_default() {
            metrics.gpu(id, usage);
        }
    }
}

/// Logs and publishes the loaded model, once it is loaded.
async fn announce(
    devices: watch::Receiver<DeviceStates>,
    model: Arc<Model>,
    metrics: Metrics,
    started: Instant,
) {
    let Some((facts, n_devices)) = loaded(devices).await else {
        return;
    };
    let elapsed = started.elapsed();
    metrics.model_loaded(&model.name, &model.digest, facts.provider, elapsed);
    for fallback in &facts.fallbacks {
        metrics.fell_back(fallback.kind);
    }
    tracing::info!(
        model = model.name,
        digest = model.digest,
        execution_provider = facts.provider,
        n_devices,
        onnxruntime = facts.runtime_version,
        dimension = facts.dimension,
        ?elapsed,
        "ready"
    );
    if !model.notice.is_empty() {
        tracing::warn!(notice = model.notice, "the model carries a notice");
    }
}

/// Returns the preprocessor that turns images into tokens for this model,
/// within these limits.
///
/// # Errors
///
/// Fails if the model's palette cannot be searched.
pub fn preprocessor(model: &Model, limits: &LimitsConfig) -> anyhow::Result<Preprocessor> {
    let palette =
        Palette::new(model.clusters.clone()).context("the model's palette cannot be used")?;
    let limits = ImageLimits {
        image_bytes_max: to_usize(limits.image_bytes_max.as_u64()),
        image_pixels_max: limits.image_pixels_max,
        decode_bytes_max: limits.decode_bytes_max.as_u64(),
    };
    Ok(Preprocessor::new(&palette, model.side, limits))
}

/// Number of threads that turn images into tokens; 0 in the configuration means
/// one thread per CPU that the process may use.
pub(crate) fn n_preprocess_threads(config: &ServeConfig) -> usize {
    match config.model.preprocess_threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n.into(),
    }
}
