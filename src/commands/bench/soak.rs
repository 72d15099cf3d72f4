//! Mode soak: a long mixed load in which every answer is verified.
//!
//! Callers and streams do what clients do to a worker: they ask, disconnect,
//! send garbage and set short deadlines. Each image must get its own answer,
//! exactly once. The worker's processes must not grow.

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use prost::Message as _;
use serde::Serialize;
use serde_json::json;
use tokio::task::JoinSet;

use super::flags::SoakArgs;
use super::input::{self, MadeImage};
use super::load::Bench;
use super::modes::{ModeFindings, has_streams};
use super::process::{self, ProcessUsage};
use super::progress::{Line, note};
use super::random::SplitMix64;
use super::report::milliseconds;
use super::stats::Latencies;
use crate::client::load::{
    CallCode, CallOptions, LoadConnection, Outcomes, Refusal, StreamEvent, StreamReader,
    StreamWriter,
};
use crate::engine::fake::FakeEngine;
use crate::model::graph::Want;
use crate::proto::{GrpcCode, Priority, pb};

/// Number of reference images of a real model; their answers are asked for
/// first.
const REFERENCES: u64 = 64;
/// Largest distance of an answer from its reference, as a fraction of the
/// reference's length: the rounding of an int8 model depends on the other
/// images of the batch. In any case, the answer must be nearer to its own
/// reference than to any other.
const TOLERANCE: f64 = 0.1;
/// Most images per call.
const IMAGES_MAX: u64 = 4;
/// Items of a stream before it ends and the next stream begins.
const STREAM_ITEMS: u64 = 200;
/// Calls out of a hundred that are cancelled by the caller, hold garbage, have
/// a short deadline, or are bulk work. The other calls are ordinary.
const LEAVE: u64 = 8;
const GARBAGE: u64 = 8;
const HURRY: u64 = 8;
const BULK: u64 = 6;
/// Longest time until a caller cancels, and longest of the short deadlines.
const HURRY_MAX_MS: u64 = 30;
/// Longest pause of a caller between calls.
const THINK_MAX_MS: u64 = 4;
const SAMPLES: u32 = 200;
/// Time after the last call in which the worker can close its connections and
/// files.
const SETTLE: Duration = Duration::from_secs(1);

/// Counts of a soak. The first group counts broken promises; the second is for
/// the report.
#[derive(Debug, Clone, Default, Serialize)]
struct Ledger {
    /// Answers that are not the image's own.
    wrong: u64,
    /// Images without an answer although the call or stream ended well, and
    /// calls that were never answered.
    lost: u64,
    /// Answers that were not asked for, or that came a second time.
    doubled: u64,
    /// Garbage that was not refused as INVALID_ARGUMENT.
    garbage_taken: u64,
    /// Calls that ended with an error code that the call gave no reason for, by
    /// code.
    unexpected: BTreeMap<String, u64>,
    /// True if the soak ended early because the worker went away.
    worker_gone: bool,

    calls: u64,
    verified: u64,
    left: u64,
    garbage_refused: u64,
    late: u64,
    full: u64,
    streams: u64,
    streams_left: u64,
    stream_items: u64,
}

impl Ledger {
    fn unexpected(&mut self, what: &str) {
        *self.unexpected.entry(what.to_owned()).or_default() += 1;
    }

    /// Returns a summary for the progress line, and whether a call found no
    /// worker.
    fn glance(&self) -> (String, bool) {
        let message = format!(
            "{} calls, {} answers verified, {} broken",
            self.calls,
            self.verified,
            self.broken().len()
        );
        (
            message,
            self.unexpected.contains_key(CallCode::NoWorker.name()),
        )
    }

    fn broken(&self) -> Vec<String> {
        let counts = [
            ("wrong answers", self.wrong),
            ("lost answers", self.lost),
            ("doubled answers", self.doubled),
            ("garbage images that were not refused", self.garbage_taken),
        ];
        let counts = counts.map(|(what, count)| (what.to_owned(), count));
        let unexpected = self.unexpected.iter();
        let unexpected = unexpected.map(|(what, &count)| (format!("unexpected {what}"), count));
        let gone = "the worker went away before the time was over";
        counts
            .into_iter()
            .chain(unexpected)
            .filter(|(_, count)| *count > 0)
            .map(|(what, count)| format!("{what}: {count}"))
            .chain(self.worker_gone.then(|| gone.to_owned()))
            .collect()
    }
}

/// Verifier that tells whether an answer is an image's own.
enum Verifier {
    /// Verifies against the fake engine, whose answers can be computed.
    Fake,
    /// Verifies against the answers of images 0 to n, which were asked for one
    /// by one.
    References(Vec<Vec<f32>>),
}

/// State that all clients share.
struct Soak {
    bench: Arc<Bench>,
    verifier: Verifier,
    ledger: Mutex<Ledger>,
    latencies: Mutex<Latencies>,
    until: Instant,
}

pub(super) async fn run(bench: &Arc<Bench>, args: &SoakArgs) -> anyhow::Result<ModeFindings> {
    let verifier = verifier(bench).await?;
    let n_streams = match args.streams {
        0 => 0,
        _ if !has_streams(bench).await? => {
            note("the worker does not serve EmbedStream: soaking without streams");
            0
        }
        n_streams => n_streams.into(),
    };
    let started = Instant::now();
    let soak = Arc::new(Soak {
        bench: Arc::clone(bench),
        verifier,
        ledger: Mutex::default(),
        latencies: Mutex::default(),
        until: started + bench.flags.duration,
    });
    let callers = bench.callers();
    let mut clients = JoinSet::new();
    for caller in 0..callers {
        let soak = Arc::clone(&soak);
        clients.spawn(async move { soak.caller(caller).await });
    }
    for stream in 0..n_streams {
        let soak = Arc::clone(&soak);
        clients.spawn(async move { soak.streamer(stream).await });
    }
    let samples = soak.watch(&mut clients).await;
    let ledger = lock(&soak.ledger).clone();
    let latency = lock(&soak.latencies).percentiles();

    let mut findings = ModeFindings::default();
    findings.number("callers", callers);
    findings.number("streams", n_streams);
    findings.number("seconds", started.elapsed().as_secs_f64());
    findings.number("ledger", json!(ledger));
    findings.number("latency", json!(latency));
    findings.line(format!(
        "{} calls and {} items of {} streams; {} answers verified{}",
        ledger.calls,
        ledger.stream_items,
        ledger.streams,
        ledger.verified,
        latency.map_or_else(String::new, |latency| format!(
            ", ordinary calls in p50 {} p99 {}",
            milliseconds(latency.p50_ms),
            milliseconds(latency.p99_ms)
        ))
    ));
    findings.line(format!(
        "{} calls cancelled, {} streams cancelled, {} garbage images refused, {} calls ended at \
         their deadline, {} calls rejected because the worker was full",
        ledger.left, ledger.streams_left, ledger.garbage_refused, ledger.late, ledger.full
    ));
    findings.line(format!(
        "wrong {}, lost {}, doubled {}",
        ledger.wrong, ledger.lost, ledger.doubled
    ));
    findings.broken = ledger.broken();
    if ledger.verified == 0 && !bench.is_stopped() {
        findings
            .broken
            .push("no answer could be verified".to_owned());
    }
    judge_growth(bench, args, &samples, started, &mut findings);
    Ok(findings)
}

/// Judges the growth of memory, threads and open files of the worker's
/// processes. The first quarter of the run is warm-up: allocators and thread
/// pools grow to their size.
fn judge_growth(
    bench: &Bench,
    args: &SoakArgs,
    samples: &[ProcessUsage],
    started: Instant,
    findings: &mut ModeFindings,
) {
    let warm = started + bench.flags.duration / 4;
    let (Some(first), Some(last)) = (
        samples.iter().find(|usage| usage.at >= warm),
        samples.last(),
    ) else {
        return;
    };
    let slope = process::rss_slope(&samples[..samples.len() - 1], warm);
    findings.number("server_after_warm_up", json!(first));
    findings.number("server_at_the_end", json!(last));
    findings.number("rss_slope_kib_per_minute", slope);
    let files = |usage: &ProcessUsage| {
        let files = usage.file_descriptors;
        files.map_or_else(|| "?".to_owned(), |count| count.to_string())
    };
    findings.line(format!(
        "worker: memory {} to {} KiB, {}; threads {} to {}; files {} to {}",
        first.rss_kib,
        last.rss_kib,
        slope.map_or_else(
            || "too few readings for a slope (less than a minute)".to_owned(),
            |slope| format!("slope {slope:.1} KiB/min")
        ),
        first.threads,
        last.threads,
        files(first),
        files(last)
    ));
    if last.threads > first.threads {
        let text = format!("threads grew from {} to {}", first.threads, last.threads);
        findings.broken.push(text);
    }
    if last.file_descriptors > first.file_descriptors {
        let text = format!("open files grew from {} to {}", files(first), files(last));
        findings.broken.push(text);
    }
    if let Some((slope, max)) = slope.zip(args.rss_slope_max)
        && slope > max
    {
        let text = format!(
            "memory grew by {slope:.1} KiB/min; the limit is {max} KiB/min (--rss-slope-max)"
        );
        findings.broken.push(text);
    }
}

/// Prepares the verifier; with a real model, this takes one call per reference
/// image.
async fn verifier(bench: &Arc<Bench>) -> anyhow::Result<Verifier> {
    if bench.model.execution_provider == "fake" && bench.input.n_distinct().is_none() {
        return Ok(Verifier::Fake);
    }
    let n_files = bench.input.n_distinct().map_or(u64::MAX, |n| n as u64);
    let mut references = Vec::new();
    for number in 0..REFERENCES.min(n_files) {
        let body = input::request(&[bench.input.picture(number)]);
        let lane = usize::try_from(number).unwrap_or(0);
        let (outcome, _) = bench.call(lane, bench.manner(), body).await;
        let images = outcome
            .map_err(|refusal| anyhow::anyhow!("a reference image was refused: {refusal}"))?;
        match images.into_iter().next() {
            Some(Ok(data)) => references.push(f32s(&data)),
            Some(Err(code)) => anyhow::bail!("a reference image failed with {code}"),
            None => anyhow::bail!("the answer for a reference image is empty"),
        }
    }
    Ok(Verifier::References(references))
}

impl Verifier {
    /// Returns an image whose answer can be verified.
    fn picture(&self, bench: &Bench, random: &mut SplitMix64) -> MadeImage {
        match self {
            Self::Fake => bench.input.next(),
            Self::References(all) => bench.input.picture(random.below(all.len() as u64)),
        }
    }

    fn is_own(&self, bench: &Bench, number: u64, data: &Bytes) -> bool {
        let got = f32s(data);
        match self {
            Self::Fake => bench.input.tokens_of(number).is_some_and(|tokens| {
                let expected = FakeEngine::answer(&tokens, Want::Mean);
                // Both must be equal to the bit.
                got.iter()
                    .map(|value| value.to_bits())
                    .eq(expected.iter().map(|value| value.to_bits()))
            }),
            Self::References(all) => {
                let own = usize::try_from(number).ok().and_then(|idx| all.get(idx));
                own.is_some_and(|own| {
                    let distance = distance(&got, own);
                    let length = distance_from_zero(own);
                    distance <= TOLERANCE * length
                        && all
                            .iter()
                            .all(|other| self::distance(&got, other) >= distance)
                })
            }
        }
    }
}

fn distance(a: &[f32], b: &[f32]) -> f64 {
    if a.len() != b.len() {
        return f64::INFINITY;
    }
    let squares = a.iter().zip(b).map(|(a, b)| f64::from(a - b).powi(2));
    squares.sum::<f64>().sqrt()
}

fn distance_from_zero(a: &[f32]) -> f64 {
    a.iter().map(|&a| f64::from(a).powi(2)).sum::<f64>().sqrt()
}

fn f32s(data: &[u8]) -> Vec<f32> {
    let chunks = data.chunks_exact(4);
    chunks
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect()
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Soak {
    fn over(&self) -> bool {
        Instant::now() >= self.until || self.bench.is_stopped()
    }

    /// Samples the worker until all clients are done, and once more after the
    /// worker had time to settle.
    async fn watch(&self, clients: &mut JoinSet<()>) -> Vec<ProcessUsage> {
        let flags = &self.bench.flags;
        let started = Instant::now();
        let interval = (flags.duration / SAMPLES).max(Duration::from_millis(50));
        let line = Line::begin("soak", Some(flags.duration));
        let mut samples: Vec<ProcessUsage> = process::usage(&flags.pids).into_iter().collect();
        loop {
            tokio::select! {
                () = tokio::time::sleep(interval) => {}
                one = clients.join_next() => {
                    match one {
                        None => break,
                        Some(Err(error)) if error.is_panic() => {
                            lock(&self.ledger).unexpected("panic of this tool");
                        }
                        Some(_) => {}
                    }
                    continue;
                }
                () = self.bench.stopped() => {
                    clients.shutdown().await;
                    break;
                }
            }
            samples.extend(process::usage(&flags.pids));
            let (message, found_none) = lock(&self.ledger).glance();
            line.update(started.elapsed(), message);
            if found_none && self.bench.is_worker_gone().await {
                clients.shutdown().await;
                lock(&self.ledger).worker_gone = true;
                break;
            }
        }
        tokio::time::sleep(SETTLE).await;
        samples.extend(process::usage(&flags.pids));
        samples
    }

    async fn caller(&self, caller: usize) {
        let mut random = SplitMix64::fork(self.bench.flags.seed, caller as u64);
        while !self.over() {
            let think = Duration::from_millis(random.below(THINK_MAX_MS + 1));
            tokio::time::sleep(think).await;
            lock(&self.ledger).calls += 1;
            let limits = self.bench.model.limits.unwrap_or_default();
            let n_max = IMAGES_MAX.min(limits.images_per_call_max.into());
            let n_images = 1 + random.below(n_max);
            let pictures: Vec<MadeImage> = (0..n_images)
                .map(|_| self.verifier.picture(&self.bench, &mut random))
                .collect();
            let chance = random.below(100);
            if chance < LEAVE {
                self.leave(caller, &pictures, &mut random).await;
            } else if chance < LEAVE + GARBAGE {
                self.garbage(caller, pictures, &mut random).await;
            } else if chance < LEAVE + GARBAGE + HURRY {
                self.hurry(caller, &pictures, &mut random).await;
            } else {
                let bulk = chance < LEAVE + GARBAGE + HURRY + BULK;
                self.ordinary(caller, &pictures, bulk.then_some(Priority::Bulk))
                    .await;
            }
        }
    }

    async fn call(
        &self,
        caller: usize,
        manner: CallOptions,
        pictures: &[MadeImage],
    ) -> Result<Outcomes, Refusal> {
        let body = input::request(pictures);
        self.bench.call(caller, manner, body).await.0
    }

    async fn ordinary(&self, caller: usize, pictures: &[MadeImage], priority: Option<Priority>) {
        let manner = CallOptions {
            priority,
            ..self.bench.manner()
        };
        let sent = Instant::now();
        match self.call(caller, manner, pictures).await {
            Ok(images) => {
                lock(&self.latencies).record(sent.elapsed());
                self.verify(pictures, &images);
            }
            Err(refusal) => {
                let may_be_late = self.bench.flags.deadline.is_some();
                self.refused(&refusal, may_be_late).await;
            }
        }
    }

    async fn leave(&self, caller: usize, pictures: &[MadeImage], random: &mut SplitMix64) {
        let patience = Duration::from_millis(random.below(HURRY_MAX_MS));
        let call = self.call(caller, self.bench.manner(), pictures);
        match tokio::time::timeout(patience, call).await {
            Err(_) => lock(&self.ledger).left += 1,
            Ok(Ok(images)) => self.verify(pictures, &images),
            Ok(Err(refusal)) => self.refused(&refusal, false).await,
        }
    }

    async fn hurry(&self, caller: usize, pictures: &[MadeImage], random: &mut SplitMix64) {
        let manner = CallOptions {
            deadline: Some(Duration::from_millis(1 + random.below(HURRY_MAX_MS))),
            ..self.bench.manner()
        };
        match self.call(caller, manner, pictures).await {
            Ok(images) => self.verify(pictures, &images),
            Err(refusal) => self.refused(&refusal, true).await,
        }
    }

    /// Sends good images around a garbage image, which alone must fail.
    async fn garbage(&self, caller: usize, mut pictures: Vec<MadeImage>, random: &mut SplitMix64) {
        let at = usize::try_from(random.below(pictures.len() as u64)).unwrap_or(0);
        pictures[at].encoded = garbage(&self.bench.model, random);
        match self.call(caller, self.bench.manner(), &pictures).await {
            Ok(mut images) if images.len() == pictures.len() => {
                let outcome = images.remove(at);
                pictures.remove(at);
                let mut ledger = lock(&self.ledger);
                match outcome {
                    Err(CallCode::Grpc(GrpcCode::InvalidArgument)) => ledger.garbage_refused += 1,
                    _ => ledger.garbage_taken += 1,
                }
                drop(ledger);
                self.verify(&pictures, &images);
            }
            Ok(images) => self.verify(&pictures, &images),
            Err(refusal) => self.refused(&refusal, false).await,
        }
    }

    fn verify(&self, pictures: &[MadeImage], images: &Outcomes) {
        let mut verdicts = Vec::with_capacity(images.len());
        for (picture, outcome) in pictures.iter().zip(images) {
            let verdict = match outcome {
                Ok(data) => Ok(self.verifier.is_own(&self.bench, picture.number, data)),
                Err(code) => Err(*code),
            };
            verdicts.push(verdict);
        }
        let mut ledger = lock(&self.ledger);
        ledger.lost += pictures.len().saturating_sub(images.len()) as u64;
        ledger.doubled += images.len().saturating_sub(pictures.len()) as u64;
        for verdict in verdicts {
            match verdict {
                Ok(true) => ledger.verified += 1,
                Ok(false) => ledger.wrong += 1,
                Err(code) => ledger.unexpected(&format!("{code} of an image")),
            }
        }
    }

    /// Counts a call that ended with an error. `may_be_late` is true if the
    /// call had a deadline.
    async fn refused(&self, refusal: &Refusal, may_be_late: bool) {
        let pause = {
            let mut ledger = lock(&self.ledger);
            match refusal.code {
                // The tool's HTTP/2 library ends the call as CANCELLED when the
                // answer is still on its way at the deadline.
                CallCode::Grpc(GrpcCode::DeadlineExceeded | GrpcCode::Cancelled) if may_be_late => {
                    ledger.late += 1;
                    return;
                }
                CallCode::Grpc(GrpcCode::ResourceExhausted) => ledger.full += 1,
                CallCode::ClientTimeout => ledger.lost += 1,
                code => ledger.unexpected(code.name()),
            }
            refusal.retry_after.unwrap_or(SETTLE / 10)
        };
        tokio::time::sleep(pause.min(SETTLE)).await;
    }

    /// Runs one stream after the other; some are cancelled in the middle.
    async fn streamer(&self, stream: usize) {
        let mut random = SplitMix64::fork(self.bench.flags.seed, u64::MAX - stream as u64);
        let lane = &self.bench.lanes[stream % self.bench.lanes.len()];
        while !self.over() {
            if let Err(refusal) = self.stream(lane, &mut random).await {
                self.refused(&refusal, false).await;
            }
        }
    }

    async fn stream(&self, lane: &LoadConnection, random: &mut SplitMix64) -> Result<(), Refusal> {
        let window = u32::try_from(1 + random.below(32)).unwrap_or(1);
        let (writer, reader) = lane.stream(None, window).await?;
        lock(&self.ledger).streams += 1;
        let leave_after = (random.below(4) == 0).then(|| random.below(STREAM_ITEMS));
        let mut picture_random = SplitMix64::fork(random.next(), 0);
        let asked = Mutex::new(HashMap::new());
        let items = self.send_items(writer, &asked, &mut picture_random);
        let answers = self.take_answers(reader, &asked, leave_after);
        tokio::join!(items, answers).1
    }

    /// Sends the items. Their ids count from 0; `asked` maps each id to the
    /// number of its image, or to `None` for garbage.
    async fn send_items(
        &self,
        writer: StreamWriter,
        asked: &Mutex<HashMap<u64, Option<u64>>>,
        random: &mut SplitMix64,
    ) {
        for id in 0..STREAM_ITEMS {
            if self.over() {
                return;
            }
            let mut picture = self.verifier.picture(&self.bench, random);
            let is_garbage = random.below(100) < GARBAGE;
            if is_garbage {
                picture.encoded = garbage(&self.bench.model, random);
            }
            lock(asked).insert(id, (!is_garbage).then_some(picture.number));
            if !writer.send(id, &picture.encoded).await {
                // The reader reports how the stream ended.
                lock(asked).remove(&id);
                return;
            }
            lock(&self.ledger).stream_items += 1;
        }
    }

    async fn take_answers(
        &self,
        mut reader: StreamReader,
        asked: &Mutex<HashMap<u64, Option<u64>>>,
        leave_after: Option<u64>,
    ) -> Result<(), Refusal> {
        let mut n_answers = 0;
        loop {
            if leave_after == Some(n_answers) {
                lock(&self.ledger).streams_left += 1;
                return Ok(());
            }
            // A stream of bulk work beside a saturating load may take long.
            // Items count as lost only if no answer at all arrives within the
            // timeout.
            let event = tokio::time::timeout(self.bench.flags.timeout, reader.next());
            let (id, outcome) = match event.await {
                Ok(StreamEvent::Answer(id, outcome)) => (id, outcome),
                Ok(StreamEvent::End(None)) | Err(_) => break,
                Ok(StreamEvent::End(Some(refusal))) => return Err(refusal),
            };
            n_answers += 1;
            let number = id.and_then(|id| lock(asked).remove(&id));
            let own = match (number, &outcome) {
                (Some(Some(number)), Ok(data)) => {
                    Some(self.verifier.is_own(&self.bench, number, data))
                }
                _ => None,
            };
            let mut ledger = lock(&self.ledger);
            match (number, outcome, own) {
                (None, ..) => ledger.doubled += 1,
                (Some(None), Err(CallCode::Grpc(GrpcCode::InvalidArgument)), _) => {
                    ledger.garbage_refused += 1;
                }
                (Some(None), ..) => ledger.garbage_taken += 1,
                (Some(Some(_)), Err(code), _) => ledger.unexpected(&format!("{code} of an item")),
                (Some(Some(_)), Ok(_), Some(true)) => ledger.verified += 1,
                (Some(Some(_)), Ok(_), _) => ledger.wrong += 1,
            }
        }
        lock(&self.ledger).lost += lock(asked).len() as u64;
        Ok(())
    }
}

/// Returns an encoded `pb::Image` that every worker must refuse.
fn garbage(model: &pb::GetModelResponse, random: &mut SplitMix64) -> Bytes {
    let n_positions = model.positions as usize;
    let n_colors = u32::try_from(model.palette_rgb8.len() / 3).unwrap_or(u32::MAX);
    let source = match random.below(5) {
        0 => {
            let n_bytes = random.below(4096);
            let noise = (0..n_bytes).map(|_| u8::try_from(random.below(256)).unwrap_or(0));
            Some(pb::image::Source::Encoded(
                noise.collect::<Vec<u8>>().into(),
            ))
        }
        1 => Some(pb::image::Source::Tokens(pb::Tokens {
            ids: vec![0; n_positions.saturating_sub(1)],
        })),
        2 => Some(pb::image::Source::Tokens(pb::Tokens {
            // The first id that is not a color.
            ids: vec![n_colors; n_positions],
        })),
        3 => Some(pb::image::Source::Rgb8(pb::RawImage {
            width: 7,
            height: 7,
            pixels: vec![0; 10].into(),
        })),
        _ => None,
    };
    pb::Image { source }.encode_to_vec().into()
}
