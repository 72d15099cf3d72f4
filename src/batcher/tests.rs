//! The batcher and the engine's thread together, with callers that come, go and
//! are late at random.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{oneshot, watch};

use super::policy::Policy;
use super::{Arrival, Channels, Shared};
use crate::admission::{DrainRate, Pool};
use crate::cache::Cache;
use crate::engine::fake::{FakeEngine, FakeSequences, Script};
use crate::engine::runner::{self, Runner};
use crate::engine::{Buckets, Engine, State, Stop};
use crate::error::Error;
use crate::generation::{Generate, Keep, Sampling, Sequence};
use crate::job::{Answer, Class, Context, Job, Permit, Reply, Ticket, Want, Work};
use crate::metrics::Metrics;

type Outcome = oneshot::Receiver<Result<Answer, Error>>;

const WORK: [Want; 2] = [Want::Mean, Want::Logits];
/// Of images to generate; the next id starts.
const COLORS: u16 = 64;

/// A row of this want, or an image of 2 by 2 that begins with the token.
fn job(
    token: u16,
    want: Option<Want>,
    class: Class,
    deadline: Option<Instant>,
    permit: Permit,
) -> (Arrival, Outcome) {
    let (reply, outcome) = Reply::new();
    let ticket = Ticket {
        class,
        deadline,
        entered_at: Instant::now(),
        span: tracing::Span::none(),
        reply,
        permit,
    };
    let Some(want) = want else {
        let generate = Generate {
            keep: Keep::All,
            sampling: Sampling::greedy(),
            sample: 0,
            rows: None,
        };
        let sequence = Sequence::new(ticket, Box::new(generate), &[token], 2, COLORS);
        return (Arrival::Sequence(sequence), outcome);
    };
    let job = Job {
        payload: vec![token; 4].into(),
        work: Work::Infer {
            context: Context::Raw,
            want,
        },
        ticket,
    };
    (Arrival::Row(job), outcome)
}

/// How the callers of one thread fared.
#[derive(Debug, Default)]
struct Tally {
    right: usize,
    wrong: usize,
    late: usize,
    failed: usize,
    lost: usize,
    left: usize,
}

#[test]
fn everyone_is_answered_once_whoever_leaves() {
    const THREADS: u64 = 2;
    const JOBS: u64 = 250_000;
    let pool = Pool::new(256, 0);
    let (jobs_in, jobs) = crossbeam_channel::bounded(256);
    let (bell_in, bell) = crossbeam_channel::bounded(1);
    let (slots_in, slots) = crossbeam_channel::bounded(1);
    let (turns_in, turns) = crossbeam_channel::bounded(1);
    let (state, engine_state) = watch::channel(State::Loading);
    let (stop, metrics) = (Arc::new(Stop::default()), Metrics::new().expect("metrics"));
    let buckets = Buckets::powers_of_two(8);
    let runner = Runner {
        slots: slots_in,
        turns,
        buckets: buckets.clone(),
        canary_interval: None,
        stop: Arc::clone(&stop),
        cache: Cache::new(0),
        metrics: metrics.clone(),
        state: Arc::new(state),
    };
    let policy = Policy {
        buckets,
        max_queue_delay: Duration::from_micros(50),
        bulk_share: 10,
        bulk_wait_max: Duration::from_secs(1),
    };
    let channels = Channels {
        jobs,
        bell,
        slots,
        turns: turns_in,
    };
    let shared = Shared {
        stop,
        cache: Cache::new(0),
        drain: DrainRate::default(),
        interactive_reserve: 25,
        metrics,
    };
    let script = Script {
        fail_on: Some(13),
        sequences: Some(FakeSequences {
            n_slots: 4,
            n_colors: COLORS.into(),
            delay: Duration::ZERO,
            can_copy: true,
        }),
        ..Default::default()
    };
    let n_left_unread = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let engine = move || {
            runner::run(
                Box::new(|| Ok(Box::new(FakeEngine::new(script)) as Box<dyn Engine>)),
                runner,
            );
        };
        scope.spawn(engine);
        // With its channels, so that the engine sees it end.
        scope.spawn(move || super::run(policy, &channels, shared));
        for seed in 0..THREADS {
            let (jobs_in, bell_in, pool) = (jobs_in.clone(), bell_in.clone(), pool.clone());
            let n_left_unread = &n_left_unread;
            scope.spawn(move || {
                let tally = caller(seed, JOBS, &jobs_in, &bell_in, &pool);
                assert_eq!((tally.wrong, tally.lost), (0, 0), "{tally:?}");
                assert!(
                    tally.right > 0 && tally.failed > 0 && tally.late > 0,
                    "{tally:?}"
                );
                n_left_unread.fetch_add(tally.left, Ordering::Relaxed);
            });
        }
        drop((jobs_in, bell_in));
    });
    assert!(n_left_unread.into_inner() > 0);
    assert_eq!(pool.taken(), 0, "every place is free again");
    assert!(matches!(*engine_state.borrow(), State::Stopped));
}

/// Sends jobs, leaves some of them, and waits for the rest.
fn caller(
    seed: u64,
    n_jobs: u64,
    jobs_in: &crossbeam_channel::Sender<Arrival>,
    bell: &crossbeam_channel::Sender<()>,
    pool: &Pool,
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
            if let Some(share) = pool.try_take(Class::Interactive, 1) {
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
        let class = Class::ALL[usize::from(bits >> 9 & 1 == 1)];
        let deadline = match bits >> 10 & 7 {
            0 => Some(Instant::now() + Duration::from_micros(bits >> 20 & 0xff)),
            1 => Some(Instant::now() + Duration::from_mins(1)),
            _ => None,
        };
        let (job, outcome) = job(token, want, class, deadline, permit);
        jobs_in.try_send(job).expect("as much room as permits");
        if (bits >> 13) % 4 == 0 {
            // Gone, now or a little later.
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
    // The last one is never fed.
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
        Ok(Err(Error::DeadlineExceeded { .. } | Error::DeadlineTooShort { .. })) => {
            tally.late += 1;
        }
        Ok(Err(Error::Engine(_))) if fails => tally.failed += 1,
        _ => tally.lost += 1,
    }
}
