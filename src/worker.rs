//! The composition root: builds the stages, wires their channels, owns their
//! threads. The only file that knows them all.
//!
//! A worker ends by ownership. When the server stops, the last door to
//! admission closes; preprocessing runs dry and hangs up on the batcher; the
//! batcher hands on what waits and hangs up on the engine; the engine ends.

use std::net::SocketAddr;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use crossbeam_channel::Sender;
use tokio::net::TcpListener;
use tokio::sync::{oneshot, watch};

use crate::admission::{Admission, Capacity, Occupancy};
use crate::batcher;
use crate::batcher::policy::Policy;
use crate::config::ServeConfig;
use crate::engine::onnx::{self, OnnxEngine};
use crate::engine::{self, Engine, EngineError, EngineFactory, Facts, State};
use crate::head::Head;
use crate::http::{self, Pages};
use crate::job::Job;
use crate::metrics::Metrics;
use crate::model::Model;
use crate::preprocess::pool::{self, Picture};
use crate::preprocess::{ImageLimits, Palette, Preprocessor};
use crate::readiness::{Drain, Readiness};
use crate::rpc;

/// How often histograms are folded when nobody scrapes; they would otherwise
/// grow with every observation.
const METRICS_UPKEEP: Duration = Duration::from_secs(5);

/// A worker that listens.
pub struct Worker {
    /// Where gRPC is served.
    pub grpc_addr: SocketAddr,
    /// Where metrics are served.
    pub metrics_addr: SocketAddr,
    readiness: Readiness,
    drain: Drain,
    occupancy: Occupancy,
    engine: watch::Receiver<State>,
    server: tokio::task::JoinHandle<anyhow::Result<()>>,
    stop: oneshot::Sender<()>,
    threads: Vec<JoinHandle<()>>,
    /// Metrics pages and upkeep, which end with the worker.
    side_tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// The stages that have threads of their own, wired up.
struct Stages {
    /// Where admission puts its jobs.
    pictures: Sender<Job<Picture>>,
    engine: watch::Receiver<State>,
    threads: Vec<JoinHandle<()>>,
}

impl Stages {
    fn start(
        config: &ServeConfig,
        model: &Model,
        factory: EngineFactory,
        metrics: &Metrics,
    ) -> anyhow::Result<Self> {
        let limits = &config.limits;
        let palette = Palette::new(model.clusters.clone()).context("the palette")?;
        let preprocessor = Arc::new(Preprocessor::new(
            &palette,
            model.side,
            ImageLimits {
                image_bytes_max: to_usize(limits.image_bytes_max.as_u64()),
                image_pixels_max: limits.image_pixels_max,
                decode_bytes_max: limits.decode_bytes_max.as_u64(),
            },
        ));
        // Each queue holds as many jobs as may be in flight, and a job holds
        // its permit: no queue can be full when a job arrives.
        let images_max = limits.images_in_flight_max as usize;
        let (pictures_in, pictures) = crossbeam_channel::bounded(images_max);
        let (tokens_in, tokens) = crossbeam_channel::bounded(images_max);
        // One engine, so one slot and one batch.
        let (slots_in, slots) = crossbeam_channel::bounded(1);
        let (batches_in, batches) = crossbeam_channel::bounded(1);
        let (state_in, engine) = watch::channel(State::Loading);

        let mut threads = Vec::new();
        let engine_metrics = metrics.clone();
        threads.push(spawn("engine", move || {
            engine::run(factory, &slots_in, &batches, &state_in, &engine_metrics);
        })?);
        let policy = Policy {
            max_batch_size: config.batching.max_batch_size.into(),
            max_queue_delay: config.batching.max_queue_delay,
        };
        let channels = batcher::Channels {
            jobs: tokens,
            slots,
            batches: batches_in,
        };
        let batcher_metrics = metrics.clone();
        threads.push(spawn("batcher", move || {
            batcher::run(policy, &channels, &batcher_metrics);
        })?);
        for idx in 0..n_preprocess_threads(config) {
            let (preprocessor, pictures) = (Arc::clone(&preprocessor), pictures.clone());
            let (tokens_in, metrics) = (tokens_in.clone(), metrics.clone());
            threads.push(spawn(&format!("preprocess-{idx}"), move || {
                pool::run(&preprocessor, &pictures, &tokens_in, &metrics);
            })?);
        }
        Ok(Self {
            pictures: pictures_in,
            engine,
            threads,
        })
    }
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// All that was admitted was answered.
    Clean,
    /// The grace period ran out first.
    Hard {
        /// Images that were admitted and not answered.
        images: usize,
    },
}

/// An engine for the model at hand, as the flags say.
#[must_use]
pub fn onnx_factory(config: &ServeConfig, model: &Model, heads: &[Head]) -> EngineFactory {
    let options = onnx::Options {
        library: onnx::find_library(config.model.onnxruntime.as_deref()),
        provider: config.model.execution_provider,
        device_id: config.model.device_id,
        intra_op_threads: config.model.intra_op_threads,
        graphs: model.graphs.clone(),
        positions: model.positions(),
        n_colors: model.clusters.len(),
        n_labels: model.labels.len(),
        head_width: heads.first().map(|head| (head.width, head.name.clone())),
        compiled_for: model.compiled.map(|compiled| compiled.provider),
        max_batch_size: config.batching.max_batch_size.into(),
    };
    Box::new(move || Ok(Box::new(OnnxEngine::load(&options)?) as Box<dyn Engine>))
}

impl Worker {
    /// Binds both ports and starts every stage. The engine loads on its own
    /// thread meanwhile: see [`Worker::ready`].
    ///
    /// # Errors
    ///
    /// When a port is taken or a thread cannot be started.
    pub async fn start(
        config: &ServeConfig,
        model: Model,
        heads: Vec<Head>,
        factory: EngineFactory,
    ) -> anyhow::Result<Self> {
        let started = Instant::now();
        let network = &config.network;
        let listener = bind(network.listen, "--listen").await?;
        let metrics_listener = bind(network.metrics_listen, "--metrics-listen").await?;
        let (grpc_addr, metrics_addr) = (listener.local_addr()?, metrics_listener.local_addr()?);

        let metrics = Metrics::new()?;
        let stages = Stages::start(config, &model, factory, &metrics)?;
        let (readiness, drain) = Readiness::new(stages.engine.clone());
        let limits = &config.limits;
        let capacity = Capacity {
            images: limits.images_in_flight_max as usize,
            bytes: to_usize(limits.bytes_in_flight_max.as_u64()),
        };
        let admission = Admission::new(capacity, stages.pictures);
        let occupancy = admission.occupancy();
        let pages = Pages {
            metrics: metrics.clone(),
            occupancy: occupancy.clone(),
            readiness: readiness.clone(),
        };
        let model = Arc::new(model);
        let side_tasks = vec![
            tokio::spawn(serve_pages(metrics_listener, pages)),
            tokio::spawn(keep_metrics(metrics.clone())),
            tokio::spawn(announce(
                stages.engine.clone(),
                Arc::clone(&model),
                metrics.clone(),
                started,
            )),
        ];
        let service = rpc::Service {
            heads,
            model,
            admission,
            readiness: readiness.clone(),
            limits: limits.clone(),
            max_batch_size: config.batching.max_batch_size,
            metrics,
        };
        let options = rpc::Options {
            reflection: !network.no_reflection,
            keepalive_interval: network.keepalive_interval,
        };
        let (stop, stopped) = oneshot::channel();
        let server = tokio::spawn(rpc::serve(service, listener, options, async {
            let _ = stopped.await;
        }));
        Ok(Self {
            grpc_addr,
            metrics_addr,
            readiness,
            drain,
            occupancy,
            engine: stages.engine,
            server,
            stop,
            threads: stages.threads,
            side_tasks,
        })
    }

    /// Waits until the model is loaded and warm.
    ///
    /// # Errors
    ///
    /// Why it could not be loaded.
    pub async fn ready(&mut self) -> Result<Facts, EngineError> {
        let state = self
            .engine
            .wait_for(|state| !matches!(state, State::Loading))
            .await
            .map(|state| state.clone());
        match state {
            Ok(State::Ready(facts)) => Ok(facts),
            Ok(State::Failed(reason)) => Err(EngineError::Runtime(reason)),
            Ok(State::Loading | State::Stopped) | Err(_) => {
                Err(EngineError::Runtime("the engine ended".to_owned()))
            }
        }
    }

    /// Resolves with the reason when the engine fails; pends otherwise.
    pub async fn failed(&mut self) -> String {
        let failed = |state: &State| matches!(state, State::Failed(_));
        match self.engine.wait_for(failed).await.as_deref() {
            Ok(State::Failed(reason)) => reason.clone(),
            _ => std::future::pending().await,
        }
    }

    /// Whether it serves.
    #[must_use]
    pub fn readiness(&self) -> &Readiness {
        &self.readiness
    }

    /// Images admitted and not yet answered.
    #[must_use]
    pub fn images_in_flight(&self) -> usize {
        self.occupancy.images()
    }

    /// Stops taking calls and finishes what was admitted, within `grace`.
    pub async fn shutdown(mut self, grace: Duration) -> Ended {
        let deadline = tokio::time::Instant::now() + grace;
        self.drain.begin();
        let _ = self.stop.send(());
        match tokio::time::timeout_at(deadline, &mut self.server).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::error!(%error, "the server ended badly"),
            Ok(Err(error)) => tracing::error!(%error, "the server task ended badly"),
            Err(_) => {
                // The service, and with it the door to the stages, may live on
                // in connections that do not close; there is no waiting for it.
                self.server.abort();
                let images = self.occupancy.images();
                return if images == 0 {
                    tracing::info!("clients kept idle connections open past the grace period");
                    Ended::Clean
                } else {
                    Ended::Hard { images }
                };
            }
        }
        let threads = std::mem::take(&mut self.threads);
        let joined = tokio::task::spawn_blocking(move || {
            for thread in threads {
                if let Err(panic) = thread.join() {
                    let panic = engine::panic_text(&*panic);
                    tracing::error!(panic, "a stage's thread had panicked");
                }
            }
        });
        for task in &self.side_tasks {
            task.abort();
        }
        match tokio::time::timeout_at(deadline, joined).await {
            Ok(_) => Ended::Clean,
            Err(_) => Ended::Hard {
                images: self.occupancy.images(),
            },
        }
    }
}

async fn bind(addr: SocketAddr, flag: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(addr)
        .await
        .with_context(|| format!("{flag} {addr} cannot be listened on"))
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> anyhow::Result<JoinHandle<()>> {
    std::thread::Builder::new()
        .name(name.to_owned())
        .spawn(body)
        .with_context(|| format!("the thread {name} cannot be started"))
}

async fn serve_pages(listener: TcpListener, pages: Pages) {
    if let Err(error) = http::serve(listener, pages).await {
        tracing::error!(%error, "the metrics port ended");
    }
}

async fn keep_metrics(metrics: Metrics) {
    let mut interval = tokio::time::interval(METRICS_UPKEEP);
    loop {
        interval.tick().await;
        metrics.upkeep();
    }
}

/// Tells the operator what was loaded, once it is.
async fn announce(
    mut engine: watch::Receiver<State>,
    model: Arc<Model>,
    metrics: Metrics,
    started: Instant,
) {
    let loaded = engine
        .wait_for(|state| !matches!(state, State::Loading))
        .await
        .map(|state| state.clone());
    let Ok(State::Ready(facts)) = loaded else {
        return;
    };
    let elapsed = started.elapsed();
    metrics.model_loaded(&model.name, &model.digest, facts.provider, elapsed);
    tracing::info!(
        model = model.name,
        digest = model.digest,
        execution_provider = facts.provider,
        onnxruntime = facts.runtime_version,
        dimension = facts.dimension,
        ?elapsed,
        "ready"
    );
    if !model.notice.is_empty() {
        tracing::warn!(notice = model.notice, "the model carries a notice");
    }
}

fn n_preprocess_threads(config: &ServeConfig) -> usize {
    match config.model.preprocess_threads {
        0 => std::thread::available_parallelism().map_or(1, usize::from),
        n => n,
    }
}

fn to_usize(size: u64) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}
