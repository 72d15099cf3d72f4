//! The two ways to load a worker, closed loop and open loop, and the
//! measurement of each.
//!
//! Closed loop: each of a number of callers sends its next call when its last
//! call was answered. A closed loop finds the throughput of the worker, but
//! hides how long callers would wait. Open loop: calls are due at times that do
//! not depend on answers, and latency counts from the due time. A worker (or
//! this tool) that falls behind therefore shows in the latencies: there is no
//! coordinated omission.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use bytes::Bytes;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::{JoinHandle, JoinSet};

use super::arrivals::{Arrivals, Spread};
use super::flags::Flags;
use super::input::{self, BenchImages, MadeImage};
use super::process::{self, ProcessUsage};
use super::progress::Line;
use super::stats::{CallCounts, EndedCall, Recorder, as_f64};
use crate::client::load::{CallCode, CallOptions, LoadConnection, Outcomes, Refusal};
use crate::proto::{Priority, pb};

/// Interval at which the resource use of the worker's processes is read.
const SAMPLE_INTERVAL: Duration = Duration::from_millis(500);
/// Interval at which a sleeping generator checks whether the run should end.
const STOP_INTERVAL: Duration = Duration::from_millis(50);
/// Pause before a retry, multiplied by the number of the retry: load balancers
/// and callers need a moment to notice that a worker has gone.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// Smallest default of connections. One task of the worker serves a connection
/// at a time, so using all cores of the worker needs several.
const CONNECTIONS_MIN: usize = 8;
const CONNECTIONS_MAX: usize = 64;
/// Concurrent calls that one connection carries by the usual default of HTTP/2
/// servers; calls above this limit wait in the tool's own HTTP/2 library.
const CALLS_PER_CONNECTION_MAX: usize = 200;
/// Calls planned per connection: half of the limit, which leaves room for
/// refusals that are on their way.
const CALLS_PER_CONNECTION: usize = CALLS_PER_CONNECTION_MAX / 2;
/// Default of callers, in full batches: one batch runs, one is ready, two are
/// on their way.
const CALLERS_BATCHES: usize = 4;
const CALLERS_MIN: usize = 16;

/// State of the tool, connected to its workers.
#[derive(Debug)]
pub(super) struct Bench {
    pub(super) flags: Flags,
    /// Connections; those to several endpoints alternate.
    pub(super) lanes: Vec<LoadConnection>,
    next_lane: AtomicUsize,
    /// Model that the first endpoint serves.
    pub(super) model: pb::GetModelResponse,
    pub(super) input: BenchImages,
    stop: watch::Receiver<bool>,
}

/// Kind and size of the load of a measurement.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "lowercase", tag = "loop")]
pub(super) enum LoadShape {
    Closed { callers: usize },
    Open { offered_images_per_second: f64 },
}

/// Result of one measurement.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Measurement {
    pub name: String,
    #[serde(flatten)]
    pub shape: LoadShape,
    /// Duration of the measurement, after the warm-up.
    pub seconds: f64,
    /// True if the measurement was interrupted.
    pub interrupted: bool,
    #[serde(flatten)]
    pub counts: CallCounts,
    /// Resource use of the worker's processes, with `--pid`.
    pub server: Option<ServerUse>,
    pub connections: usize,
    /// CPU cores that this tool itself used.
    pub client_cores: Option<f64>,
    /// Rate of a bulk load that ran at the same time.
    pub bulk_images_per_second: Option<f64>,
    /// True if calls found no worker, and there was still none at the end.
    pub worker_gone: bool,
}

impl Measurement {
    /// True if a worker was there and answered, so that the result is valid.
    pub(super) fn is_whole(&self) -> bool {
        !self.worker_gone && self.counts.answered > 0
    }

    /// Returns the promise that was broken, checked in every mode, if any.
    pub(super) fn broken(&self) -> Option<String> {
        let counts = &self.counts;
        let name = &self.name;
        if let Some(lost) = counts.failed.get(&CallCode::NoWorker) {
            let (calls, reason) = (lost.calls, &lost.message);
            let now = if self.worker_gone {
                "the worker went away"
            } else {
                "the worker was away for some time"
            };
            return Some(format!(
                "{name}: {now}; {calls} calls found no worker ({reason})"
            ));
        }
        if self.worker_gone {
            return Some(format!("{name}: the worker went away"));
        }
        if counts.answered > 0 || counts.sent == 0 || self.interrupted {
            return None;
        }
        let mut refused = counts.failed.iter().chain(&counts.rejected);
        let why = refused.next().map_or_else(
            || "no call ended".to_owned(),
            |(code, refused)| format!("{code}: {}", refused.message),
        );
        Some(format!("{name}: no call was answered ({why})"))
    }

    /// True if more calls were in flight than connections usually carry. Some
    /// calls then waited in the tool, and their wait counts as the worker's
    /// latency.
    pub(super) fn is_crowded(&self) -> bool {
        let room = self.connections.saturating_mul(CALLS_PER_CONNECTION_MAX);
        usize::try_from(self.counts.in_flight_peak).is_ok_and(|peak| peak > room)
    }
}

/// Resource use of the worker's processes during a measurement.
#[derive(Debug, Clone, Copy, Serialize)]
pub(super) struct ServerUse {
    /// CPU seconds per second.
    pub cores: f64,
    pub requests_per_second_per_core: f64,
    pub images_per_second_per_core: f64,
    pub rss_kib_start: u64,
    pub rss_kib_max: u64,
    pub rss_kib_end: u64,
}

impl Bench {
    /// Connects to every endpoint.
    ///
    /// # Errors
    ///
    /// When an endpoint does not answer, or its worker cannot do what the flags
    /// ask for.
    pub(super) async fn connect(
        flags: &Flags,
        stop: watch::Receiver<bool>,
    ) -> anyhow::Result<Arc<Self>> {
        let endpoints = &flags.endpoints;
        let first = endpoints.first().context("--endpoint has no URL")?;
        let probe = LoadConnection::connect(first, &flags.connect, None).await?;
        let model = probe
            .model()
            .await
            .map_err(|refusal| anyhow::anyhow!("{first} does not say what it serves: {refusal}"))?;
        let limits = model.limits.unwrap_or_default();
        let k = flags.images_per_call as usize;
        anyhow::ensure!(
            flags.images_per_call <= limits.images_per_call_max,
            "--images-per-call is {k}; the worker's limit is {} (--images-per-call-max)",
            limits.images_per_call_max
        );
        let calls_max = limits.images_in_flight_max as usize / k;
        let connections = flags.connections.map_or_else(
            || {
                let needed = calls_max.div_ceil(CALLS_PER_CONNECTION);
                needed.clamp(CONNECTIONS_MIN, CONNECTIONS_MAX)
            },
            usize::from,
        );
        let mut lanes = Vec::with_capacity(connections * endpoints.len());
        for _ in 0..connections {
            for endpoint in endpoints {
                lanes.push(LoadConnection::connect(endpoint, &flags.connect, None).await?);
            }
        }
        let input = match &flags.images {
            Some(folder) => BenchImages::folder(folder, flags.seed, flags.repeat_share)?,
            None => BenchImages::tokens(&model, flags.seed, flags.repeat_share),
        };
        Ok(Arc::new(Self {
            flags: flags.clone(),
            lanes,
            next_lane: AtomicUsize::new(0),
            model,
            input,
            stop,
        }))
    }

    /// Call options from the flags.
    pub(super) fn manner(&self) -> CallOptions {
        CallOptions {
            method: self.flags.task,
            priority: self.flags.priority,
            deadline: self.flags.deadline,
            patience: self.flags.timeout,
        }
    }

    pub(super) fn n_endpoints(&self) -> usize {
        self.flags.endpoints.len().max(1)
    }

    pub(super) fn batch_size_max(&self) -> usize {
        let limits = self.model.limits.unwrap_or_default();
        limits.batch_size_max.max(1) as usize
    }

    /// Default number of callers: enough to saturate the worker, and no more
    /// than it has room for.
    pub(super) fn callers_default(&self) -> usize {
        let k = self.flags.images_per_call as usize;
        let limits = self.model.limits.unwrap_or_default();
        let room = (limits.images_in_flight_max as usize / k).max(1);
        let callers = (CALLERS_BATCHES * self.batch_size_max()).div_ceil(k);
        callers.clamp(CALLERS_MIN, CALLERS_MIN.max(room)).min(room) * self.n_endpoints()
    }

    /// Number of callers of a closed loop in the modes that take one number.
    pub(super) fn callers(&self) -> usize {
        let given = self.flags.callers.iter().copied().max();
        given.map_or_else(|| self.callers_default(), usize::from)
    }

    pub(super) fn is_stopped(&self) -> bool {
        *self.stop.borrow()
    }

    /// True if the run should end: it was interrupted, or the worker has gone.
    pub(super) fn is_over(&self, phases: &[Measurement]) -> bool {
        self.is_stopped() || phases.last().is_some_and(|phase| phase.worker_gone)
    }

    /// Returns true if one of the endpoints has no worker now.
    pub(super) async fn is_worker_gone(&self) -> bool {
        // The first connections lead to each endpoint in turn.
        for lane in self.lanes.iter().take(self.n_endpoints()) {
            if matches!(lane.model().await, Err(refusal) if refusal.code == CallCode::NoWorker) {
                return true;
            }
        }
        false
    }

    /// Resolves when the run should end.
    pub(super) async fn stopped(&self) {
        let mut stop = self.stop.clone();
        if stop.wait_for(|stop| *stop).await.is_err() {
            // The sender was dropped, so the run cannot be stopped any more.
            std::future::pending::<()>().await;
        }
    }

    fn lane(&self) -> usize {
        self.next_lane.fetch_add(1, Ordering::Relaxed)
    }

    pub(super) fn pictures(&self, n: usize) -> Vec<MadeImage> {
        (0..n).map(|_| self.input.next()).collect()
    }

    fn body(&self) -> Bytes {
        let k = self.flags.images_per_call as usize;
        input::request(&self.pictures(k))
    }

    /// Makes a call, with as many retries as the flags allow. Each retry uses
    /// the next connection, which leads to another worker if there are several
    /// endpoints.
    pub(super) async fn call(
        &self,
        lane: usize,
        manner: CallOptions,
        body: Bytes,
    ) -> (Result<Outcomes, Refusal>, u64) {
        let mut retries = 0;
        loop {
            let at = lane.wrapping_add(usize::try_from(retries).unwrap_or(0));
            let lane = &self.lanes[at % self.lanes.len()];
            match lane.call(manner, body.clone()).await {
                Err(refusal) if refusal.is_elsewhere() && retries < self.flags.retries.into() => {
                    retries += 1;
                    let pause = RETRY_PAUSE.saturating_mul(u32::try_from(retries).unwrap_or(1));
                    tokio::time::sleep(pause).await;
                }
                outcome => return (outcome, retries),
            }
        }
    }

    /// Runs a closed loop with `callers` callers. `bulk` counts the images of
    /// another load at the same time.
    pub(super) async fn closed(
        self: &Arc<Self>,
        name: &str,
        callers: usize,
        bulk: Option<&Arc<AtomicU64>>,
    ) -> Measurement {
        let flags = &self.flags;
        let from = Instant::now() + flags.warm_up;
        let until = match flags.requests {
            None => Some(from + flags.duration),
            Some(_) => None,
        };
        let recorder = Arc::new(Recorder::new(from, until, flags.slo));
        let taken = Arc::new(AtomicU64::new(0));
        let watch = Watch::start(self, name, from, until, bulk, &recorder);
        let mut loops = JoinSet::new();
        for caller in 0..callers {
            let (bench, recorder, taken) = (Arc::clone(self), recorder.clone(), taken.clone());
            loops.spawn(async move {
                bench
                    .call_over_and_over(caller, &recorder, until, &taken)
                    .await;
            });
        }
        tokio::select! {
            () = async { while loops.join_next().await.is_some() {} } => {}
            () = self.stopped() => loops.abort_all(),
        }
        // Aborted tasks have released the recorder once they are joined.
        while loops.join_next().await.is_some() {}
        let observed = watch.end().await;
        self.phase(name, LoadShape::Closed { callers }, &recorder, &observed)
            .await
    }

    async fn call_over_and_over(
        &self,
        caller: usize,
        recorder: &Recorder,
        until: Option<Instant>,
        taken: &AtomicU64,
    ) {
        let n_images = u64::from(self.flags.images_per_call);
        let calls_max = self.flags.requests.unwrap_or(u64::MAX);
        loop {
            let due = Instant::now();
            if until.is_some_and(|end| due >= end)
                || recorder.measures(due) && taken.fetch_add(1, Ordering::Relaxed) >= calls_max
            {
                return;
            }
            recorder.sent(due, n_images);
            let (outcome, retries) = self.call(caller, self.manner(), self.body()).await;
            let ended = Instant::now();
            let is_lost = matches!(&outcome, Err(refusal) if refusal.code == CallCode::NoWorker);
            let done = EndedCall {
                due,
                sent: None,
                ended,
                n_images,
                retries,
                outcome,
            };
            recorder.done(caller, done);
            if is_lost {
                // Without a pause, this caller would retry as fast as the
                // machine can.
                tokio::time::sleep(RETRY_PAUSE).await;
            }
        }
    }

    /// Runs an open loop at `images_per_second`.
    pub(super) async fn open(
        self: &Arc<Self>,
        name: &str,
        images_per_second: f64,
        priority: Option<Priority>,
        bulk: Option<&Arc<AtomicU64>>,
    ) -> Measurement {
        let flags = &self.flags;
        let start = Instant::now();
        let from = start + flags.warm_up;
        let until = from + flags.duration;
        let recorder = Arc::new(Recorder::new(from, Some(until), flags.slo));
        let watch = Watch::start(self, name, from, Some(until), bulk, &recorder);
        let calls_per_second = images_per_second / f64::from(flags.images_per_call);
        let spread = if flags.constant {
            Spread::Constant
        } else {
            Spread::Poisson
        };
        let n_places = flags.in_flight_max;
        let generator = Generator {
            bench: Arc::clone(self),
            manner: CallOptions {
                priority,
                ..self.manner()
            },
            recorder: Arc::clone(&recorder),
            places: Arc::new(Semaphore::new(n_places as usize)),
            start,
            until,
        };
        let places = Arc::clone(&generator.places);
        let arrivals = Arrivals::new(spread, calls_per_second, flags.seed);
        let runtime = tokio::runtime::Handle::current();
        // A thread, because the runtime's timers have a resolution of only a
        // millisecond.
        let generated = tokio::task::spawn_blocking(move || generator.run(arrivals, &runtime));
        // The generator returns nothing, and the panic hook has reported a
        // panic.
        let _ = generated.await;
        // All permits are free again when every call has ended.
        tokio::select! {
            _ = places.acquire_many(n_places) => {}
            () = self.stopped() => {}
        }
        let observed = watch.end().await;
        let shape = LoadShape::Open {
            offered_images_per_second: images_per_second,
        };
        self.phase(name, shape, &recorder, &observed).await
    }

    async fn phase(
        &self,
        name: &str,
        shape: LoadShape,
        recorder: &Recorder,
        observed: &Observed,
    ) -> Measurement {
        let counts = recorder.counts(observed.elapsed);
        let unmet = counts.answered == 0 || counts.n_failed() > 0;
        let worker_gone = unmet && self.is_worker_gone().await;
        let server = observed.server_use(&counts);
        let seconds = observed.elapsed.as_secs_f64();
        Measurement {
            name: name.to_owned(),
            shape,
            seconds,
            interrupted: self.is_stopped(),
            server,
            connections: self.lanes.len(),
            client_cores: observed.client_cpu_seconds.map(|cpu| cpu / seconds),
            bulk_images_per_second: observed.bulk_images.map(|n| as_f64(n) / seconds),
            worker_gone,
            counts,
        }
    }
}

/// Generator that sends the calls of an open loop when they are due.
struct Generator {
    bench: Arc<Bench>,
    manner: CallOptions,
    recorder: Arc<Recorder>,
    places: Arc<Semaphore>,
    start: Instant,
    until: Instant,
}

impl Generator {
    fn run(&self, arrivals: Arrivals, runtime: &tokio::runtime::Handle) {
        let n_images = u64::from(self.bench.flags.images_per_call);
        for offset in arrivals {
            let due = self.start + offset;
            if due >= self.until || !self.wait(due) {
                return;
            }
            let Some(place) = self.place(runtime) else {
                // The measurement is over, so this call, though due, is never
                // sent.
                if self.recorder.measures(due) {
                    self.recorder.unsent();
                }
                continue;
            };
            self.recorder.sent(due, n_images);
            let n_free = u32::try_from(self.places.available_permits()).unwrap_or(0);
            let n_in_flight = self.bench.flags.in_flight_max.saturating_sub(n_free);
            self.recorder.in_flight(n_in_flight.into());
            let (bench, recorder) = (Arc::clone(&self.bench), Arc::clone(&self.recorder));
            let manner = self.manner;
            runtime.spawn(async move {
                let lane = bench.lane();
                let body = bench.body();
                let sent = Instant::now();
                recorder.lateness(lane, due, sent);
                let (outcome, retries) = bench.call(lane, manner, body).await;
                let done = EndedCall {
                    due,
                    sent: Some(sent),
                    ended: Instant::now(),
                    n_images,
                    retries,
                    outcome,
                };
                recorder.done(lane, done);
                drop(place);
            });
        }
    }

    /// Sleeps until a call is due; returns `false` when the run should end.
    fn wait(&self, due: Instant) -> bool {
        loop {
            if self.bench.is_stopped() {
                return false;
            }
            let left = due.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return true;
            }
            std::thread::sleep(left.min(STOP_INTERVAL));
        }
    }

    /// Waits for a permit among the calls in flight; `None` if none is free
    /// before the end of the measurement.
    fn place(&self, runtime: &tokio::runtime::Handle) -> Option<OwnedSemaphorePermit> {
        let places = Arc::clone(&self.places);
        if let Ok(place) = Arc::clone(&places).try_acquire_owned() {
            return Some(place);
        }
        runtime.block_on(async {
            tokio::select! {
                place = places.acquire_owned() => place.ok(),
                () = tokio::time::sleep_until(self.until.into()) => None,
                () = self.bench.stopped() => None,
            }
        })
    }
}

/// Samples the worker, the tool and the clock while a measurement runs.
struct Watch {
    task: JoinHandle<Observed>,
    end: oneshot::Sender<()>,
}

#[derive(Debug)]
struct Observed {
    elapsed: Duration,
    samples: Vec<ProcessUsage>,
    client_cpu_seconds: Option<f64>,
    bulk_images: Option<u64>,
}

impl Watch {
    fn start(
        bench: &Bench,
        name: &str,
        from: Instant,
        until: Option<Instant>,
        bulk: Option<&Arc<AtomicU64>>,
        recorder: &Arc<Recorder>,
    ) -> Self {
        let (end, ended) = oneshot::channel();
        let total = until.map(|until| until - Instant::now());
        let line = Line::begin(name, total);
        let (pids, bulk) = (bench.flags.pids.clone(), bulk.cloned());
        let recorder = Arc::clone(recorder);
        let task = tokio::spawn(watch(pids, from, until, bulk, recorder, line, ended));
        Self { task, end }
    }

    async fn end(self) -> Observed {
        let _ = self.end.send(());
        self.task.await.unwrap_or_else(|_| Observed {
            elapsed: Duration::ZERO,
            samples: Vec::new(),
            client_cpu_seconds: None,
            bulk_images: None,
        })
    }
}

async fn watch(
    pids: Vec<u32>,
    from: Instant,
    until: Option<Instant>,
    bulk: Option<Arc<AtomicU64>>,
    recorder: Arc<Recorder>,
    line: Line,
    mut ended: oneshot::Receiver<()>,
) -> Observed {
    let begun = Instant::now();
    let bulk_now = || bulk.as_ref().map(|count| count.load(Ordering::Relaxed));
    let mut is_ended = tokio::select! {
        () = tokio::time::sleep_until(from.into()) => false,
        _ = &mut ended => true,
    };
    let started = Instant::now();
    let (bulk_start, cpu_start) = (bulk_now(), process::own_cpu_seconds());
    let mut samples: Vec<ProcessUsage> = process::usage(&pids).into_iter().collect();
    while !is_ended {
        let tick = Instant::now() + SAMPLE_INTERVAL;
        let tick = until.map_or(tick, |until| until.min(tick));
        tokio::select! {
            () = tokio::time::sleep_until(tick.into()) => {}
            _ = &mut ended => is_ended = true,
        }
        samples.extend(process::usage(&pids));
        let now = Instant::now();
        line.update(now - begun, recorder.glance());
        if until.is_some_and(|until| now >= until) {
            break;
        }
    }
    let ended_at = Instant::now();
    let observed = Observed {
        elapsed: match until {
            // Rates refer to the exact window in which calls are counted.
            Some(until) if ended_at >= until => until.saturating_duration_since(from),
            _ => ended_at.saturating_duration_since(started),
        },
        samples,
        client_cpu_seconds: process::own_cpu_seconds()
            .zip(cpu_start)
            .map(|(end, start)| end - start),
        bulk_images: bulk_now().zip(bulk_start).map(|(end, start)| end - start),
    };
    if !is_ended {
        // Calls that were sent in time are still awaited.
        let _ = ended.await;
    }
    observed
}

impl Observed {
    fn server_use(&self, counts: &CallCounts) -> Option<ServerUse> {
        let (first, last) = (self.samples.first()?, self.samples.last()?);
        let seconds = last.at.duration_since(first.at).as_secs_f64();
        let cores = (last.cpu_seconds - first.cpu_seconds) / seconds.max(1e-9);
        // A difference below the resolution of the kernel's clock is no
        // measurement.
        let per_core = |rate: f64| if cores > 0.0 { rate / cores } else { 0.0 };
        let rss = self.samples.iter().map(|usage| usage.rss_kib);
        Some(ServerUse {
            cores,
            requests_per_second_per_core: per_core(counts.requests_per_second),
            images_per_second_per_core: per_core(counts.images_per_second),
            rss_kib_start: first.rss_kib,
            rss_kib_max: rss.max()?,
            rss_kib_end: last.rss_kib,
        })
    }
}
