//! Tests of the batcher together with engines' threads, with callers that come,
//! disconnect and are late at random.

use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::policy::Policy;
use super::{Batcher, BatcherParts, Channels, EngineLine, HangUp, PreparedWork};
use crate::engine::Engine;
use crate::engine::fake::{FakeEngine, FakeSequences, Script};
use crate::model::buckets::Buckets;
use crate::model::graph::{Context, Want};
use crate::proto::Priority;
use crate::serve::cache::AnswerCache;
use crate::serve::capacity::{CapacityPool, DrainRate};
use crate::serve::devices::{DeviceIdx, DeviceReports, DeviceStates, WorkerState};
use crate::serve::engine_thread;
use crate::serve::engine_thread::Runner;
use crate::serve::error::StageError;
use crate::serve::fair::CallerId;
use crate::serve::generate::{GenerateRequest, KeptPixels};
use crate::serve::job::{Answer, Job, Permit, Reply, RequestedWork, Ticket};
use crate::serve::metrics::Metrics;
use crate::serve::sequence::{Sampling, Sequence};

type Outcome = oneshot::Receiver<Result<Answer, StageError>>;

const WORK: [Want; 2] = [Want::Mean, Want::Logits];
/// Number of colors of images to generate; the next number is the start token.
const COLORS: u16 = 64;

/// Job for a row of this want, or for an image of 2 by 2 pixels that begins
/// with the token.
fn job(
    token: u16,
    want: Option<Want>,
    class: Priority,
    deadline: Option<Instant>,
    permit: Permit,
) -> (PreparedWork, Outcome) {
    let (reply, outcome) = Reply::new();
    let ticket = Ticket {
        caller: CallerId::UNNAMED,
        class,
        deadline,
        entered_at: Instant::now(),
        span: tracing::Span::none(),
        timeline: crate::serve::timeline::ImageTimeline::none(),
        reply,
        permit,
    };
    let Some(want) = want else {
        let generate = GenerateRequest {
            keep: KeptPixels::All,
            sampling: Sampling::greedy(),
            sample: 0,
            rows: None,
        };
        let sequence = Sequence::new(ticket, Box::new(generate), &[token], 2, COLORS);
        return (PreparedWork::Sequence(sequence), outcome);
    };
    let job = Job {
        payload: vec![token; 4].into(),
        work: RequestedWork::Infer {
            context: Context::Raw,
            want,
        },
        ticket,
    };
    (PreparedWork::Row(job), outcome)
}

/// Outcomes of one thread's callers.
#[derive(Debug, Default)]
struct Tally {
    right: usize,
    wrong: usize,
    late: usize,
    failed: usize,
    /// Refused because a device failed.
    refused: usize,
    lost: usize,
    left: usize,
}

/// Running batcher, with one engine per script.
struct Running {
    jobs: crossbeam_channel::Sender<PreparedWork>,
    bell: crossbeam_channel::Sender<()>,
    devices: watch::Receiver<DeviceStates>,
    drain: DrainRate,
    metrics: Metrics,
    threads: Vec<std::thread::JoinHandle<()>>,
}

impl Running {
    /// Waits until a series of the metrics page has this value.
    fn until(&self, series: &str, value: f64) {
        let is_there = |line: &str| {
            let shown = line.strip_prefix(series);
            shown.is_some_and(|shown| shown.trim().parse() == Ok(value))
        };
        while !self.metrics.render().lines().any(is_there) {
            std::thread::yield_now();
        }
    }

    /// Waits until only `n` engines serve: an engine that ends answers its
    /// callers before it reports its end.
    fn until_serving(&self, n: usize) {
        while self.devices.borrow().n_serving() > n {
            std::thread::yield_now();
        }
        assert_eq!(self.devices.borrow().n_serving(), n);
    }

    /// Ends everything in good order.
    fn end(self) -> watch::Receiver<DeviceStates> {
        drop((self.jobs, self.bell));
        for thread in self.threads {
            thread.join().expect("no panic");
        }
        self.devices
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> std::thread::JoinHandle<()> {
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread.spawn(body).expect("a thread")
}

fn policy(buckets: &Buckets) -> Policy {
    Policy {
        buckets: buckets.clone(),
        max_queue_delay: Duration::from_micros(50),
        bulk_share: 10,
        bulk_wait_max: Duration::from_secs(1),
    }
}

fn shared(metrics: &Metrics) -> BatcherParts {
    BatcherParts {
        cache: AnswerCache::new(0),
        drain: DrainRate::default(),
        interactive_reserve: 25,
        metrics: metrics.clone(),
    }
}

fn start(scripts: Vec<Script>) -> Running {
    // As many places as there are permits, and one for a job without a permit.
    let (jobs_in, jobs) = crossbeam_channel::bounded(257);
    let (bell_in, bell) = crossbeam_channel::bounded(1);
    let (notices_in, notices) = crossbeam_channel::bounded(2 * scripts.len());
    let metrics = Metrics::new().expect("metrics");
    let ids = (0..).take(scripts.len());
    let (reports, devices) = DeviceReports::new(ids, metrics.clone());
    let buckets = Buckets::powers_of_two(8);
    let (policy, shared) = (policy(&buckets), shared(&metrics));
    let drain = shared.drain.clone();
    let (lines, ends): (Vec<_>, Vec<_>) = scripts.iter().map(|_| EngineLine::new()).unzip();
    let batcher = Batcher::new(policy, lines, shared);
    let mut threads = Vec::new();
    for (((idx, script), id), (turns, stop)) in scripts.into_iter().enumerate().zip(0..).zip(ends) {
        let runner = Runner {
            device: DeviceIdx(idx),
            batcher: batcher.clone(),
            notices: notices_in.clone(),
            turns,
            buckets: buckets.clone(),
            canary_interval: None,
            stop,
            cache: AnswerCache::new(0),
            metrics: metrics.clone(),
            traces: crate::serve::trace::Traces::default(),
            gap: metrics.engine_gap(id),
            reports: reports.clone(),
        };
        let factory = Box::new(|| Ok(Box::new(FakeEngine::new(script)) as Box<dyn Engine>));
        threads.push(spawn("engine", || engine_thread::run(factory, runner)));
    }
    drop(notices_in);
    let channels = Channels {
        jobs,
        bell,
        notices,
    };
    // The thread owns its channels, so that the engines see it end.
    threads.push(spawn("batcher", move || {
        super::run(&batcher, &channels);
    }));
    // A worker takes no calls before, and an engine that fails while others load
    // ends the worker.
    while matches!(devices.borrow().state(), WorkerState::Loading) {
        std::thread::yield_now();
    }
    Running {
        jobs: jobs_in,
        bell: bell_in,
        devices,
        drain,
        metrics,
        threads,
    }
}

fn with_sequences() -> Script {
    Script {
        sequences: Some(FakeSequences {
            n_slots: 4,
            n_colors: COLORS.into(),
            delay: Duration::ZERO,
            can_copy: true,
        }),
        ..Default::default()
    }
}

/// Runs two threads of callers with `n_jobs` jobs each while `also` happens;
/// returns all outcomes, and the devices at the end.
fn storm(
    scripts: Vec<Script>,
    n_jobs: u64,
    also: impl FnOnce(&Running) + Send,
) -> (Tally, watch::Receiver<DeviceStates>) {
    let pool = CapacityPool::new(256, 0);
    let running = start(scripts);
    let mut all = Tally::default();
    std::thread::scope(|scope| {
        let threads = [0, 1].map(|seed| {
            let (running, pool) = (&running, pool.clone());
            scope.spawn(move || caller(seed, n_jobs, &running.jobs, &running.bell, &pool))
        });
        also(&running);
        for thread in threads {
            let tally = thread.join().expect("no panic");
            all.right += tally.right;
            all.wrong += tally.wrong;
            all.late += tally.late;
            all.failed += tally.failed;
            all.refused += tally.refused;
            all.lost += tally.lost;
            all.left += tally.left;
        }
    });
    let devices = running.end();
    assert_eq!((all.wrong, all.lost), (0, 0), "{all:?}");
    assert!(all.right > 0 && all.failed > 0, "{all:?}");
    assert!(all.late > 0 && all.left > 0, "{all:?}");
    assert_eq!(pool.taken(), 0, "every place is free again");
    (all, devices)
}

#[test]
fn everyone_is_answered_once_whoever_leaves() {
    for n_engines in [1, 2] {
        let script = || Script {
            fail_on: Some(13),
            ..with_sequences()
        };
        let scripts = std::iter::repeat_with(script).take(n_engines).collect();
        let (all, devices) = storm(scripts, 125_000, |_| {});
        assert_eq!(all.refused, 0, "{all:?}");
        assert!(matches!(devices.borrow().state(), WorkerState::Stopped));
    }
}

#[test]
fn everyone_is_answered_once_whichever_engine_dies() {
    // No other job has this token.
    const POISON: u16 = 99;
    const DEATHS: usize = 3;
    for _ in 0..10 {
        let script = || Script {
            fail_on: Some(13),
            device_fails_on: Some(POISON),
            ..with_sequences()
        };
        let scripts = std::iter::repeat_with(script).take(DEATHS + 1).collect();
        let (all, devices) = storm(scripts, 5_000, |running| {
            for n_dead in 1..=DEATHS {
                // The device fails under load, and not before.
                std::thread::sleep(Duration::from_millis(20));
                assert_eq!(one_by_one(running, [POISON]), [false]);
                running.until_serving(DEATHS + 1 - n_dead);
            }
        });
        // Only callers that were being served are refused: rows or sequences
        // with a few callers each; waiting work went to the other engines.
        assert!(all.refused <= DEATHS * 64, "{all:?}");
        let devices = devices.borrow();
        assert_eq!(devices.failure(), None);
        assert!(matches!(devices.state(), WorkerState::Stopped));
    }
}

fn row(token: u16) -> (PreparedWork, Outcome) {
    job(
        token,
        Some(Want::Mean),
        Priority::Bulk,
        None,
        Permit::none(),
    )
}

/// Sends rows of these tokens one by one, each after the row before was
/// answered, and returns whether each was answered.
fn one_by_one(running: &Running, tokens: impl IntoIterator<Item = u16>) -> Vec<bool> {
    let ask = |token| {
        let (job, outcome) = row(token);
        running.jobs.send(job).expect("a batcher");
        match outcome.blocking_recv().expect("an answer") {
            Ok(answer) => {
                let values = FakeEngine::answer(&[token; 4], Want::Mean);
                assert_eq!(answer, Answer::Values(values));
                true
            }
            Err(StageError::NotReady) => false,
            Err(error) => panic!("{error}"),
        }
    };
    tokens.into_iter().map(ask).collect()
}

#[test]
fn who_waits_when_the_batcher_panics_is_told() {
    let metrics = Metrics::new().expect("metrics");
    let policy = policy(&Buckets::powers_of_two(8));
    let (line, _ends) = EngineLine::new();
    let batcher = Batcher::new(policy, vec![line], shared(&metrics));
    let (waiting, mut outcome) = row(1);
    batcher.lock().push(waiting);
    let thread = spawn("batcher", move || {
        let _hang_up = HangUp(&batcher);
        panic!("as asked");
    });
    assert!(thread.join().is_err());
    assert!(matches!(outcome.try_recv(), Ok(Err(StageError::NotReady))));
}

#[test]
fn what_ends_an_engine_is_not_given_to_the_next_one() {
    let script = || Script {
        device_fails_on: Some(13),
        ..Default::default()
    };
    let running = start(vec![script(), script(), script()]);
    let got = one_by_one(&running, [1, 2, 3, 13, 4, 5, 6, 13, 7]);
    let expected = [true, true, true, false, true, true, true, false, true];
    assert_eq!(got, expected);
    running.until_serving(1);
    assert!(matches!(
        running.devices.borrow().state(),
        WorkerState::Ready(_)
    ));
    // The last engine fails, and the worker with it.
    assert_eq!(one_by_one(&running, [13, 8, 9]), [false; 3]);
    let devices = running.end();
    assert!(matches!(devices.borrow().state(), WorkerState::Failed(_)));
}

#[test]
fn callers_join_what_either_engine_runs() {
    let (open, gate) = crossbeam_channel::bounded(8);
    let script = || Script {
        gate: Some(gate.clone()),
        ..Default::default()
    };
    let running = start(vec![script(), script()]);
    let mut outcomes = Vec::new();
    let mut send = |token| {
        let (job, outcome) = row(token);
        running.jobs.send(job).expect("a batcher");
        outcomes.push((token, outcome));
    };
    // Each token keeps one engine busy.
    for (token, n_batches) in [(1, 1.0), (2, 2.0)] {
        send(token);
        running.until("imagegpt_batch_size_count{graph=\"hidden\"}", n_batches);
    }
    for token in [1, 2, 2] {
        send(token);
    }
    running.until("imagegpt_images_coalesced_total", 3.0);
    for _ in 0..2 {
        open.send(()).expect("an engine");
    }
    for (token, outcome) in outcomes {
        let answer = outcome.blocking_recv().expect("an answer");
        let values = FakeEngine::answer(&[token; 4], Want::Mean);
        assert_eq!(
            answer.expect("two runs are enough for all"),
            Answer::Values(values)
        );
    }
    running.end();
}

#[test]
fn the_rate_is_that_of_all_engines_that_live() {
    let script = || Script {
        delay: Duration::from_millis(50),
        device_fails_on: Some(13),
        ..Default::default()
    };
    let running = start(vec![script(), script()]);
    let rate = |token| {
        one_by_one(&running, token..token + 3);
        running.drain.get().expect("some runs")
    };
    // One image per run, which takes 50 ms, or a little more on a busy machine.
    let two = rate(1);
    assert!(two <= 40.0, "{two}");
    assert_eq!(one_by_one(&running, [13]), [false]);
    let one = rate(20);
    assert!(one <= 20.0, "{one}");
    assert!((1.4..=2.8).contains(&(two / one)), "{two} and {one}");
    running.end();
}

/// Sends jobs, abandons some of them, and waits for the rest.
fn caller(
    seed: u64,
    n_jobs: u64,
    jobs_in: &crossbeam_channel::Sender<PreparedWork>,
    bell: &crossbeam_channel::Sender<()>,
    pool: &CapacityPool,
) -> Tally {
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random
    };
    let mut tally = Tally::default();
    let mut open = std::collections::VecDeque::new();
    for _ in 0..n_jobs {
        let share = loop {
            if let Ok(share) = pool.try_take(Priority::Interactive, 1) {
                break share;
            }
            match open.pop_front() {
                Some(waiting) => settle(waiting, &mut tally),
                None => std::thread::yield_now(),
            }
        };
        let permit = Permit {
            image: share,
            ..Permit::none()
        };
        let bits = next();
        let token = u16::try_from(bits % 64).expect("small");
        let want = WORK[usize::from(bits >> 8 & 1 == 1)];
        let want = (bits >> 32 & 15 != 0).then_some(want);
        let class = Priority::ALL[usize::from(bits >> 9 & 1 == 1)];
        let deadline = match bits >> 10 & 7 {
            0 => Some(Instant::now() + Duration::from_micros(bits >> 20 & 0xff)),
            1 => Some(Instant::now() + Duration::from_mins(1)),
            _ => None,
        };
        let (job, outcome) = job(token, want, class, deadline, permit);
        jobs_in.try_send(job).expect("as much room as permits");
        if (bits >> 13) % 4 == 0 {
            // The caller disconnects now or a little later.
            if bits >> 15 & 1 == 0 {
                std::thread::yield_now();
            }
            drop(outcome);
            let _ = bell.try_send(());
            tally.left += 1;
        } else {
            open.push_back((token, want, outcome));
        }
    }
    for waiting in open {
        settle(waiting, &mut tally);
    }
    tally
}

fn settle((token, want, outcome): (u16, Option<Want>, Outcome), tally: &mut Tally) {
    let image = FakeEngine::greedy(COLORS, &[token], COLORS.into(), 4);
    // The last token is never fed.
    let fails = match want {
        Some(_) => token == 13,
        None => image[..3].contains(&13),
    };
    match outcome.blocking_recv() {
        Ok(Ok(Answer::Generated { tokens, .. })) => {
            if want.is_none() && *tokens == *image {
                tally.right += 1;
            } else {
                tally.wrong += 1;
            }
        }
        Ok(Ok(Answer::Values(values))) => {
            if want.is_some_and(|want| values == FakeEngine::answer(&[token; 4], want)) {
                tally.right += 1;
            } else {
                tally.wrong += 1;
            }
        }
        Ok(Err(StageError::DeadlineExceeded { .. } | StageError::DeadlineTooShort { .. })) => {
            tally.late += 1;
        }
        Ok(Err(StageError::Engine(_))) if fails => tally.failed += 1,
        Ok(Err(StageError::NotReady)) => tally.refused += 1,
        _ => tally.lost += 1,
    }
}
