//! Tests of the scheduler under a simulated clock: invariants under random
//! traffic, and the gain from each rule.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::super::policy::Policy;
use super::super::queue::QueuedWork;
use super::{NextTurn, Picked, Scheduler, Steps};
use crate::model::buckets::Buckets;
use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::devices::DeviceIdx;
use crate::serve::fair::CallerId;
use crate::serve::metrics::BatchClose;

const MS: fn(u64) -> Duration = Duration::from_millis;
const GRAPHS: [Graph; 2] = [Graph::Hidden, Graph::Logits];
const ONE: DeviceIdx = DeviceIdx(0);
const DELAY: Duration = Duration::from_millis(5);

fn policy(largest: usize) -> Policy {
    Policy {
        buckets: Buckets::powers_of_two(largest),
        max_queue_delay: DELAY,
        bulk_share: 10,
        bulk_wait_max: Duration::from_secs(10),
    }
}

fn as_images(n: usize) -> f64 {
    f64::from(u32::try_from(n).expect("a few"))
}

/// Random number generator with the same numbers on every machine.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        // xorshift64*
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 33) % n
    }

    /// Returns a number between 0 and 1, excluding both.
    fn unit(&mut self) -> f64 {
        let bits = u32::try_from(self.next() >> 32).expect("32 bits");
        (f64::from(bits) + 0.5) / (f64::from(u32::MAX) + 1.0)
    }

    /// Returns a time between two arrivals of a Poisson process.
    fn gap(&mut self, per_second: f64) -> Duration {
        Duration::from_secs_f64(-self.unit().ln() / per_second)
    }
}

/// Events that a scheduler is tested with.
#[derive(Debug, Clone, Copy)]
enum Step {
    Push {
        class: Priority,
        graph: Graph,
        deadline_ms: Option<u64>,
    },
    /// A waiting item is cancelled.
    Cancel(u64),
    /// Time passes.
    Pass(u64),
    /// The engine has ended its run and asks for more work.
    Free,
    /// The largest size does not fit into memory.
    Shrink,
}

/// Scheduler that is checked for its invariants after each step.
struct Checked {
    scheduler: Scheduler<u64>,
    now: Instant,
    next_item: u64,
    /// Items that must be in the queue, by all that has happened to them.
    waiting: BTreeMap<
        u64,
        (
            Priority,
            Graph,
            super::super::queue::QueuePosition,
            Option<Instant>,
        ),
    >,
    n_pushed: u64,
    n_gone: u64,
    busy: bool,
}

impl Checked {
    fn new(largest: usize) -> Self {
        Self {
            scheduler: Scheduler::new(policy(largest), 1),
            now: Instant::now(),
            next_item: 0,
            waiting: BTreeMap::new(),
            n_pushed: 0,
            n_gone: 0,
            busy: false,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Push {
                class,
                graph,
                deadline_ms,
            } => {
                let deadline = deadline_ms.map(|ms| self.now + MS(ms));
                let item = self.next_item;
                self.next_item += 1;
                self.n_pushed += 1;
                let entry = QueuedWork {
                    caller: CallerId::UNNAMED,
                    item,
                    arrived: self.now,
                    deadline,
                };
                let place = self.scheduler.queue.push(class, graph, entry);
                self.waiting.insert(item, (class, graph, place, deadline));
            }
            Step::Cancel(nth) => {
                let n = self.waiting.len() as u64;
                if n == 0 {
                    return;
                }
                let nth = usize::try_from(nth % n).expect("small");
                let (&item, &(_, _, place, _)) = self.waiting.iter().nth(nth).expect("one of them");
                let entry = self.scheduler.queue.remove(&place).expect("it waits");
                assert_eq!(entry.item, item);
                self.gone(item);
            }
            Step::Pass(ms) => self.now += MS(ms),
            Step::Free => self.free(),
            Step::Shrink => {
                let smaller = (self.scheduler.largest(ONE) / 2).max(1);
                self.scheduler.limit(ONE, smaller);
            }
        }
    }

    fn gone(&mut self, item: u64) {
        self.waiting.remove(&item).expect("an item leaves once");
        self.n_gone += 1;
    }

    fn free(&mut self) {
        if self.busy {
            self.scheduler.ended(ONE, self.now);
        }
        self.busy = false;
        let due =
            self.scheduler.queue.lanes().iter().any(|lane| {
                lane.oldest + DELAY <= self.now || lane.len >= self.scheduler.largest(ONE)
            });
        match self.scheduler.next(ONE, self.now, false, None) {
            NextTurn::Idle => assert!(self.waiting.is_empty(), "idle while something waits"),
            NextTurn::WaitUntil(at) => {
                assert!(
                    !due,
                    "nothing waits past its delay while the engine is free"
                );
                assert!(at > self.now && at <= self.now + DELAY);
            }
            NextTurn::Run(picked) => self.picked(&picked),
            NextTurn::Step => panic!("there are no sequences"),
        }
        assert_eq!(
            self.n_pushed - self.n_gone,
            self.waiting.len() as u64,
            "each item is in one place"
        );
    }

    fn picked(&mut self, picked: &Picked<u64>) {
        assert!(picked.bucket <= self.scheduler.largest(ONE));
        assert!(picked.rows.len() <= picked.bucket, "never above the size");
        assert!(!picked.rows.is_empty() || !picked.late.is_empty());
        for class in Priority::ALL {
            let of_class = |entry: &&QueuedWork<u64>| self.waiting[&entry.item].0 == class;
            let rows: Vec<&QueuedWork<u64>> = picked.rows.iter().filter(of_class).collect();
            // Equal deadlines leave in the order of arrival.
            let mut without: Vec<u64> = Vec::new();
            for entry in &rows {
                assert_eq!(self.waiting[&entry.item].1, picked.graph);
                if entry.deadline.is_none() {
                    without.push(entry.item);
                }
            }
            assert!(without.is_sorted(), "{without:?}");
            if let (Some(last), false) = (without.last(), rows.is_empty()) {
                let older = self
                    .waiting
                    .iter()
                    .find(|&(item, &(of, graph, _, deadline))| {
                        item < last
                            && (of, graph, deadline) == (class, picked.graph, None)
                            && !without.contains(item)
                    });
                assert_eq!(older, None, "an older equal was passed over");
            }
        }
        let items: Vec<u64> = picked
            .rows
            .iter()
            .chain(&picked.late)
            .map(|entry| entry.item)
            .collect();
        for item in items {
            self.gone(item);
        }
        if !picked.rows.is_empty() {
            self.busy = true;
            let took = MS(1 + picked.bucket as u64);
            let (graph, bucket) = (picked.graph, picked.bucket);
            self.now += took;
            self.scheduler
                .pace
                .ran(graph, bucket, as_images(picked.rows.len()), took, self.now);
        }
    }

    /// Checks that everything that waits leaves in the end.
    fn drain(mut self) {
        while !self.waiting.is_empty() {
            self.now += DELAY;
            self.free();
        }
        assert_eq!(self.n_pushed, self.n_gone);
    }
}

fn steps() -> impl Strategy<Value = Step> {
    let class = prop_oneof![Just(Priority::Interactive), Just(Priority::Bulk)];
    let graph = prop_oneof![Just(GRAPHS[0]), Just(GRAPHS[1])];
    prop_oneof![
        6 => (class, graph, proptest::option::of(0_u64..100)).prop_map(
            |(class, graph, deadline_ms)| Step::Push { class, graph, deadline_ms }
        ),
        2 => any::<u64>().prop_map(Step::Cancel),
        2 => (0_u64..20).prop_map(Step::Pass),
        3 => Just(Step::Free),
        1 => Just(Step::Shrink),
    ]
}

proptest! {
    #[test]
    fn invariants_hold(largest in 1_usize..20, steps in prop::collection::vec(steps(), 1..200)) {
        let mut checked = Checked::new(largest);
        for step in steps {
            checked.step(step);
        }
        checked.drain();
    }
}

#[test]
fn invariants_hold_for_a_million_steps() {
    let mut random = Random(7);
    let mut checked = Checked::new(8);
    for _ in 0..1_000_000 {
        let step = match random.below(16) {
            0..=5 => Step::Push {
                class: Priority::ALL[usize::try_from(random.below(2)).expect("small")],
                graph: GRAPHS[usize::try_from(random.below(2)).expect("small")],
                deadline_ms: (random.below(2) == 0).then(|| random.below(100)),
            },
            6..=9 => Step::Cancel(random.next()),
            10..=11 => Step::Pass(random.below(8)),
            _ => Step::Free,
        };
        checked.step(step);
    }
    checked.drain();
}

/// Moment at which the next batch is formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Binding {
    /// Formed when the engine is free.
    Late,
    /// Formed when the engine begins the batch before or, if nothing waited
    /// then, with the first arrival after that.
    Early,
}

/// Simulates Poisson arrivals at an engine whose batches take 10 ms plus 1 ms
/// per image; returns the mean time from arrival to answer, and the mean number
/// of images per batch.
fn simulate(binding: Binding, per_second: f64) -> (Duration, f64) {
    const IMAGES: usize = 20_000;
    let batch_time = |bucket: usize| MS(10 + bucket as u64);
    let mut scheduler = Scheduler::new(
        Policy {
            max_queue_delay: Duration::ZERO,
            ..policy(8)
        },
        1,
    );
    let start = Instant::now();
    for bucket in Buckets::powers_of_two(8).iter() {
        scheduler
            .pace
            .warmed(GRAPHS[0], bucket, batch_time(bucket), start);
    }
    let mut random = Random(42);
    let mut at = start;
    let arrivals: Vec<Instant> = (0..IMAGES)
        .map(|_| {
            at += random.gap(per_second);
            at
        })
        .collect();
    let mut arrivals = arrivals.into_iter().peekable();
    let mut push = |scheduler: &mut Scheduler<Instant>, until: Instant| {
        while let Some(&arrived) = arrivals.peek()
            && arrived <= until
        {
            arrivals.next();
            let entry = QueuedWork {
                caller: CallerId::UNNAMED,
                item: arrived,
                arrived,
                deadline: None,
            };
            scheduler
                .queue
                .push(Priority::Interactive, GRAPHS[0], entry);
        }
        arrivals.peek().copied()
    };
    let (mut waited, mut n_batches) = (Duration::ZERO, 0_u32);
    let mut free_at = start;
    let mut prepared: Option<Picked<Instant>> = None;
    loop {
        // The batch that runs next, and the time at which it starts.
        let (picked, starts) = if let Some(picked) = prepared.take() {
            // The batch is fixed: later arrivals wait for the batch after it.
            let formed = picked.rows.iter().map(|row| row.arrived).max();
            (picked, formed.map_or(free_at, |formed| formed.max(free_at)))
        } else {
            let next = push(&mut scheduler, free_at);
            match (scheduler.next(ONE, free_at, false, None), next) {
                (NextTurn::Run(picked), _) => (picked, free_at),
                (_, Some(next)) => {
                    free_at = next;
                    continue;
                }
                (_, None) => break,
            }
        };
        let took = batch_time(picked.bucket);
        let ends = starts + took;
        let images = as_images(picked.rows.len());
        scheduler
            .pace
            .ran(GRAPHS[0], picked.bucket, images, took, ends);
        waited += picked
            .rows
            .iter()
            .map(|row| ends - row.item)
            .sum::<Duration>();
        n_batches += 1;
        scheduler.ended(ONE, ends);
        if binding == Binding::Early {
            // The next batch is formed now that this one has started.
            let next = push(&mut scheduler, starts);
            prepared = match scheduler.next(ONE, starts, false, None) {
                NextTurn::Run(picked) => Some(picked),
                _ => next.filter(|&next| next < ends).and_then(|next| {
                    push(&mut scheduler, next);
                    match scheduler.next(ONE, next, false, None) {
                        NextTurn::Run(picked) => Some(picked),
                        _ => None,
                    }
                }),
            };
        }
        push(&mut scheduler, ends);
        free_at = ends;
    }
    let n_images = u32::try_from(IMAGES).expect("fits");
    (
        waited / n_images,
        f64::from(n_images) / f64::from(n_batches),
    )
}

#[test]
fn late_binding_answers_sooner_than_early_commitment() {
    for per_second in [50.0, 100.0, 200.0, 300.0, 400.0] {
        let (late, late_size) = simulate(Binding::Late, per_second);
        let (early, early_size) = simulate(Binding::Early, per_second);
        let row = format!(
            "{per_second:>4} images/s: late {late:>9.2?}, {late_size:.2} a batch; \
             early {early:>9.2?}, {early_size:.2} a batch"
        );
        show(&row);
        assert!(late < early, "{row}");
        assert!(late_size >= 0.99 * early_size, "{row}");
    }
    // At two thirds of the engine's capacity late binding saves a quarter of
    // the time.
    let (late, _) = simulate(Binding::Late, 300.0);
    let (early, _) = simulate(Binding::Early, 300.0);
    assert!(late * 4 < early * 3, "{late:?} against {early:?}");
}

/// Prints a figure, for a run with --nocapture.
#[expect(clippy::print_stdout, reason = "a test's figures")]
fn show(row: &str) {
    println!("{row}");
}

/// Results of a simulation with both classes.
#[derive(Debug)]
struct Mixed {
    interactive_p99: Duration,
    interactive_per_second: f64,
    bulk_per_second: f64,
}

/// Duration of a batch on a CPU: 10 ms per image at any size.
fn like_a_cpu(bucket: usize) -> Duration {
    MS(10 * bucket as u64)
}

/// Duration of a batch on a GPU: 80 ms for 8 images, 45 ms for one.
fn like_a_gpu(bucket: usize) -> Duration {
    MS(40 + 5 * bucket as u64)
}

/// Simulates interactive Poisson arrivals, and bulk work that always has 64
/// images waiting.
fn mixed(
    batch_time: fn(usize) -> Duration,
    interactive_per_second: f64,
    with_bulk: bool,
    bulk_share: u8,
) -> Mixed {
    let start = Instant::now();
    let mut scheduler = Scheduler::new(
        Policy {
            bulk_share,
            max_queue_delay: Duration::ZERO,
            ..policy(8)
        },
        1,
    );
    for bucket in Buckets::powers_of_two(8).iter() {
        scheduler
            .pace
            .warmed(GRAPHS[0], bucket, batch_time(bucket), start);
    }
    let mut random = Random(3);
    let end = start + Duration::from_mins(5);
    let (mut now, mut next_arrival) = (start, start + random.gap(interactive_per_second));
    let mut latencies = Vec::new();
    let (mut n_bulk, mut n_interactive) = (0_u32, 0_u32);
    while now < end {
        while next_arrival <= now {
            let entry = QueuedWork {
                caller: CallerId::UNNAMED,
                item: Priority::Interactive,
                arrived: next_arrival,
                deadline: None,
            };
            scheduler
                .queue
                .push(Priority::Interactive, GRAPHS[0], entry);
            next_arrival += random.gap(interactive_per_second);
        }
        while with_bulk && scheduler.queue.len_of(Priority::Bulk) < 64 {
            let entry = QueuedWork {
                caller: CallerId::UNNAMED,
                item: Priority::Bulk,
                arrived: now,
                deadline: None,
            };
            scheduler.queue.push(Priority::Bulk, GRAPHS[0], entry);
        }
        match scheduler.next(ONE, now, false, None) {
            NextTurn::Run(picked) => {
                let took = batch_time(picked.bucket);
                now += took;
                let images = as_images(picked.rows.len());
                scheduler
                    .pace
                    .ran(GRAPHS[0], picked.bucket, images, took, now);
                for row in picked.rows {
                    match row.item {
                        Priority::Bulk => n_bulk += 1,
                        Priority::Interactive => {
                            n_interactive += 1;
                            latencies.push(now - row.arrived);
                        }
                    }
                }
                scheduler.ended(ONE, now);
            }
            NextTurn::WaitUntil(at) => now = at,
            NextTurn::Idle => now = next_arrival,
            NextTurn::Step => panic!("there are no sequences"),
        }
    }
    latencies.sort_unstable();
    let seconds = (now - start).as_secs_f64();
    Mixed {
        interactive_p99: latencies[latencies.len() * 99 / 100],
        interactive_per_second: f64::from(n_interactive) / seconds,
        bulk_per_second: f64::from(n_bulk) / seconds,
    }
}

#[test]
fn bulk_moves_interactive_latency_by_little_and_takes_what_is_left() {
    // Either engine runs 100 images per second, and its largest batch takes 80
    // ms.
    let (capacity, one_batch) = (100.0, MS(80));
    for batch_time in [like_a_cpu, like_a_gpu] {
        for interactive in [5.0, 10.0, 20.0, 40.0] {
            let alone = mixed(batch_time, interactive, false, 10);
            let both = mixed(batch_time, interactive, true, 10);
            show(&format!(
                "{interactive} images/s: alone {alone:.1?}, with bulk {both:.1?}"
            ));
            assert!(
                both.interactive_p99 <= alone.interactive_p99.mul_f64(1.2) + one_batch,
                "{alone:?} {both:?}"
            );
            let left = capacity - both.interactive_per_second;
            assert!(both.bulk_per_second >= 0.8 * left, "{both:?} {left}");
        }
    }
}

#[test]
fn bulk_has_its_share_when_interactive_work_would_take_all() {
    for share in [10, 50] {
        let got = mixed(like_a_cpu, 200.0, true, share);
        let expected = f64::from(share);
        assert!(
            (got.bulk_per_second - expected).abs() < 0.15 * expected,
            "{share} %: {got:?}"
        );
    }
}

#[test]
fn whoever_cannot_be_served_in_time_is_told_before_it_waits() {
    let mut scheduler: Scheduler<u32> = Scheduler::new(policy(4), 1);
    let start = Instant::now();
    let (class, graph) = (Priority::Interactive, GRAPHS[0]);
    let at = |ms| start + MS(ms);
    let too_late = |scheduler: &Scheduler<u32>, deadline_ms| {
        scheduler.too_late(class, graph, CallerId::UNNAMED, at(deadline_ms), start)
    };
    assert_eq!(too_late(&scheduler, 0), None, "nothing was measured");
    for (bucket, ms) in [(1, 100), (4, 250)] {
        scheduler
            .pace
            .ran(graph, bucket, as_images(bucket), MS(ms), start);
    }
    assert_eq!(too_late(&scheduler, 99), Some(MS(100)));
    assert_eq!(too_late(&scheduler, 100), None);
    // Eight entries that go before it take two batches.
    for item in 0..8 {
        let entry = QueuedWork {
            caller: CallerId::UNNAMED,
            item,
            arrived: start,
            deadline: Some(at(300)),
        };
        scheduler.queue.push(class, graph, entry);
    }
    assert_eq!(too_late(&scheduler, 290), None, "it goes before them");
    assert_eq!(too_late(&scheduler, 599), Some(MS(600)));
    // One of the batches runs, and the rest of its time counts.
    let NextTurn::Run(picked) = scheduler.next(ONE, start, false, None) else {
        panic!("a full batch waits");
    };
    assert_eq!(picked.rows.len(), 4);
    assert_eq!(too_late(&scheduler, 300), Some(MS(250 + 250 + 100)));
}

#[test]
fn a_queue_that_runs_one_by_one_counts_one_by_one() {
    let mut scheduler: Scheduler<u32> = Scheduler::new(policy(8), 1);
    let start = Instant::now();
    let (class, graph) = (Priority::Interactive, GRAPHS[0]);
    // A CPU after its warm-up, which has run only single images since.
    for bucket in [1, 2, 4, 8] {
        let elapsed = MS(100 * bucket as u64);
        scheduler.pace.warmed(graph, bucket, elapsed, start);
    }
    scheduler.pace.ran(graph, 1, 1.0, MS(100), start);
    for item in 0..100 {
        scheduler
            .queue
            .push(class, graph, entry(item, start, Some(start + MS(200))));
    }
    let too_late = |deadline_ms| {
        scheduler.too_late(
            class,
            graph,
            CallerId::UNNAMED,
            start + MS(deadline_ms),
            start,
        )
    };
    assert_eq!(too_late(1000), Some(MS(100 * 100 + 100)));
    assert_eq!(too_late(100 * 100 + 100), None);
}

#[test]
fn those_for_whom_it_is_too_late_make_no_batch_large() {
    let mut scheduler: Scheduler<u32> = Scheduler::new(policy(8), 1);
    let start = Instant::now();
    let (class, graph) = (Priority::Interactive, GRAPHS[0]);
    for (bucket, ms) in [(1, 20), (2, 21), (4, 23), (8, 27)] {
        scheduler
            .pace
            .ran(graph, bucket, as_images(bucket), MS(ms), start);
    }
    for item in 0..7 {
        scheduler
            .queue
            .push(class, graph, entry(item, start, Some(start + MS(10))));
    }
    scheduler
        .queue
        .push(class, graph, entry(7, start, Some(start + MS(22))));
    let NextTurn::Run(picked) = scheduler.next(ONE, start, false, None) else {
        panic!("a full batch waits");
    };
    assert_eq!((picked.late.len(), picked.rows.len()), (7, 1));
    assert_eq!(picked.bucket, 1);
}

#[test]
fn who_would_ride_along_too_late_is_left_to_another_engine() {
    let mut scheduler: Scheduler<u32> = Scheduler::new(policy(4), 2);
    let start = Instant::now();
    let graph = GRAPHS[0];
    for (bucket, ms) in [(1, 45), (2, 60), (4, 80)] {
        scheduler
            .pace
            .ran(graph, bucket, as_images(bucket), MS(ms), start);
    }
    for item in 0..3 {
        scheduler
            .queue
            .push(Priority::Bulk, graph, entry(item, start, None));
    }
    // Bulk has waited long enough, and its batch has a row to spare.
    let now = start + Duration::from_secs(20);
    let urgent = entry(9, now, Some(now + MS(60)));
    scheduler.queue.push(Priority::Interactive, graph, urgent);
    for (bucket, ms) in [(1, 45), (2, 60), (4, 80)] {
        scheduler
            .pace
            .ran(graph, bucket, as_images(bucket), MS(ms), now);
    }
    let NextTurn::Run(picked) = scheduler.next(ONE, now, false, None) else {
        panic!("bulk is owed");
    };
    assert_eq!((picked.class, picked.rows.len()), (Priority::Bulk, 3));
    assert!(picked.late.is_empty());
    let later = now + MS(10);
    let NextTurn::Run(picked) = scheduler.next(OTHER, later, false, None) else {
        panic!("one waits");
    };
    assert_eq!(
        (picked.class, picked.rows.len()),
        (Priority::Interactive, 1)
    );
    assert!(picked.late.is_empty());
}

#[test]
fn nobody_waits_for_company_that_would_not_help() {
    let mut scheduler: Scheduler<u32> = Scheduler::new(policy(4), 1);
    let start = Instant::now();
    let push = |scheduler: &mut Scheduler<u32>| {
        let entry = QueuedWork {
            caller: CallerId::UNNAMED,
            item: 0,
            arrived: start,
            deadline: None,
        };
        scheduler
            .queue
            .push(Priority::Interactive, GRAPHS[0], entry);
    };
    push(&mut scheduler);
    assert!(matches!(
        scheduler.next(ONE, start, false, None),
        NextTurn::WaitUntil(_)
    ));
    for bucket in [1, 2, 4] {
        scheduler
            .pace
            .warmed(GRAPHS[0], bucket, like_a_cpu(bucket), start);
    }
    let NextTurn::Run(picked) = scheduler.next(ONE, start, false, None) else {
        panic!("one at a time is as fast as four");
    };
    assert_eq!((picked.bucket, picked.close), (1, BatchClose::Full));
    scheduler.ended(ONE, start);
    push(&mut scheduler);
    scheduler.pace.ran(GRAPHS[0], 4, 4.0, MS(11), start);
    assert!(matches!(
        scheduler.next(ONE, start, false, None),
        NextTurn::WaitUntil(_)
    ));
}

#[test]
fn a_batch_is_made_small_enough_for_the_most_urgent() {
    let mut scheduler: Scheduler<u32> = Scheduler::new(policy(4), 1);
    let start = Instant::now();
    let (class, graph) = (Priority::Interactive, GRAPHS[0]);
    for (bucket, ms) in [(1, 100), (2, 150), (4, 250)] {
        scheduler
            .pace
            .ran(graph, bucket, as_images(bucket), MS(ms), start);
    }
    for (item, deadline_ms) in [(0, 160), (1, 1000), (2, 1000), (3, 1000)] {
        let entry = QueuedWork {
            caller: CallerId::UNNAMED,
            item,
            arrived: start,
            deadline: Some(start + MS(deadline_ms)),
        };
        scheduler.queue.push(class, graph, entry);
    }
    let NextTurn::Run(picked) = scheduler.next(ONE, start, false, None) else {
        panic!("a full batch waits");
    };
    assert_eq!((picked.bucket, picked.rows.len()), (2, 2));
    assert!(picked.late.is_empty());
    // An entry that no size can serve is late and costs no run.
    let late = QueuedWork {
        caller: CallerId::UNNAMED,
        item: 9,
        arrived: start,
        deadline: Some(start + MS(50)),
    };
    scheduler.queue.push(class, graph, late);
    let NextTurn::Run(picked) = scheduler.next(ONE, start + MS(10), false, None) else {
        panic!("its delay has passed");
    };
    assert_eq!(picked.late.len(), 1);
    assert_eq!(picked.rows.len(), 2, "and makes no batch small");
}

/// Returns the engine time of batches and of steps in ten seconds, in which
/// rows of 100 ms and sequences with steps of 10 ms, of these classes, always
/// wait.
fn shared_time(rows: Priority, sequences: Priority) -> (Duration, Duration) {
    let mut scheduler = Scheduler::<()>::new(policy(1), 1);
    let start = Instant::now();
    scheduler.pace.warmed(GRAPHS[0], 1, MS(100), start);
    let mut now = start;
    let (mut batches, mut steps) = (Duration::ZERO, Duration::ZERO);
    let mut since = start;
    while now < start + Duration::from_secs(10) {
        while scheduler.queue.len_of(rows) < 2 {
            let entry = QueuedWork {
                caller: CallerId::UNNAMED,
                item: (),
                arrived: now,
                deadline: None,
            };
            scheduler.queue.push(rows, GRAPHS[0], entry);
        }
        let waiting = Steps {
            class: sequences,
            bulk: sequences == Priority::Bulk,
            since,
        };
        match scheduler.next(ONE, now, false, Some(waiting)) {
            NextTurn::Run(picked) => {
                let took = MS(100);
                scheduler
                    .pace
                    .ran(GRAPHS[0], picked.bucket, 1.0, took, now + took);
                batches += took;
                now += took;
            }
            NextTurn::Step => {
                let took = MS(10);
                scheduler
                    .pace
                    .ran(Graph::Generate, 1, 0.0, took, now + took);
                steps += took;
                now += took;
                since = now;
            }
            NextTurn::Idle | NextTurn::WaitUntil(_) => panic!("something waits"),
        }
        scheduler.ended(ONE, now);
    }
    (batches, steps)
}

/// Simulates a caller who waits for each answer and comes back one step later:
/// the queue is empty whenever a batch ends.
#[test]
fn steps_get_their_share_beside_a_caller_that_comes_back() {
    let mut scheduler = Scheduler::<()>::new(policy(1), 1);
    let start = Instant::now();
    scheduler.pace.warmed(GRAPHS[0], 1, MS(100), start);
    let mut now = start;
    let (mut batches, mut steps) = (Duration::ZERO, Duration::ZERO);
    let mut is_back = true;
    while now < start + Duration::from_secs(10) {
        if is_back && scheduler.queue.len_of(Priority::Bulk) == 0 {
            let entry = QueuedWork {
                caller: CallerId::UNNAMED,
                item: (),
                arrived: now,
                deadline: None,
            };
            scheduler.queue.push(Priority::Bulk, GRAPHS[0], entry);
        }
        let waiting = Steps {
            class: Priority::Bulk,
            bulk: true,
            since: now,
        };
        let took = match scheduler.next(ONE, now, false, Some(waiting)) {
            NextTurn::Run(_) => {
                is_back = false;
                batches += MS(100);
                MS(100)
            }
            NextTurn::Step => {
                is_back = true;
                steps += MS(10);
                MS(10)
            }
            NextTurn::Idle | NextTurn::WaitUntil(_) => panic!("a sequence waits"),
        };
        now += took;
        scheduler.ended(ONE, now);
    }
    let share = steps.as_secs_f64() / (steps + batches).as_secs_f64();
    assert!(
        (0.45..0.55).contains(&share),
        "steps had {share} of the time"
    );
}

#[test]
fn steps_and_batches_share_the_engine_by_class() {
    let seconds = |time: Duration| time.as_secs_f64();
    for class in Priority::ALL {
        let (batches, steps) = shared_time(class, class);
        assert!(
            (seconds(batches) - seconds(steps)).abs() <= 0.2,
            "{class:?}: half of the time each, {batches:?} and {steps:?}"
        );
    }
    // Bulk has its share and no more, whether it is the rows or the sequences.
    let share = f64::from(policy(1).bulk_share) / 100.0;
    let (batches, steps) = shared_time(Priority::Bulk, Priority::Interactive);
    let got = seconds(batches) / seconds(batches + steps);
    assert!((got - share).abs() < 0.05, "{got} of {share}");
    let (batches, steps) = shared_time(Priority::Interactive, Priority::Bulk);
    let got = seconds(steps) / seconds(batches + steps);
    assert!((got - share).abs() < 0.05, "{got} of {share}");
}

#[test]
fn a_step_does_not_wait_for_a_batch_to_fill() {
    let mut scheduler = Scheduler::<()>::new(policy(4), 1);
    let now = Instant::now();
    let entry = QueuedWork {
        caller: CallerId::UNNAMED,
        item: (),
        arrived: now,
        deadline: None,
    };
    scheduler
        .queue
        .push(Priority::Interactive, GRAPHS[0], entry);
    let waiting = Steps {
        class: Priority::Bulk,
        bulk: true,
        since: now,
    };
    assert!(matches!(
        scheduler.next(ONE, now, false, Some(waiting)),
        NextTurn::Step
    ));
}

/// Engine that shares the queue with the first.
const OTHER: DeviceIdx = DeviceIdx(1);

fn entry<T>(item: T, arrived: Instant, deadline: Option<Instant>) -> QueuedWork<T> {
    QueuedWork {
        caller: CallerId::UNNAMED,
        item,
        arrived,
        deadline,
    }
}

#[test]
fn two_engines_take_from_one_queue_half_as_long() {
    let mut scheduler: Scheduler<u32> = Scheduler::new(policy(4), 2);
    let start = Instant::now();
    let (class, graph) = (Priority::Interactive, GRAPHS[0]);
    let too_late = |scheduler: &Scheduler<u32>, deadline_ms, now| {
        scheduler.too_late(
            class,
            graph,
            CallerId::UNNAMED,
            start + MS(deadline_ms),
            now,
        )
    };
    for (bucket, ms) in [(1, 100), (4, 250)] {
        scheduler
            .pace
            .ran(graph, bucket, as_images(bucket), MS(ms), start);
    }
    let rate = scheduler.pace.rate().expect("two runs");
    assert!((scheduler.rate().expect("two runs") - 2.0 * rate).abs() < 1e-9);
    // Twelve entries that go before it take three batches: the third begins
    // when the first has ended, and its own when the second has.
    for item in 0..12 {
        let deadline = Some(start + MS(340));
        scheduler
            .queue
            .push(class, graph, entry(item, start, deadline));
    }
    assert_eq!(too_late(&scheduler, 349, start), Some(MS(250 + 100)));
    // One batch runs at each engine, and one waits.
    for (device, at) in [(ONE, MS(0)), (OTHER, MS(50))] {
        let NextTurn::Run(picked) = scheduler.next(device, start + at, false, None) else {
            panic!("a full batch waits");
        };
        assert_eq!(picked.rows.len(), 4);
    }
    let now = start + MS(50);
    // The batch that waits begins after 200 ms, and its own when the other
    // ends: 250 ms.
    assert_eq!(too_late(&scheduler, 399, now), Some(MS(250 + 100)));
    assert_eq!(too_late(&scheduler, 400, now), None);
    // With one engine left its own batch comes after the waiting one.
    scheduler.gone(OTHER);
    assert_eq!(too_late(&scheduler, 400, now), Some(MS(200 + 250 + 100)));
    assert!((scheduler.rate().expect("two runs") - rate).abs() < 1e-9);
    // The memory limit of one engine holds for that engine alone.
    scheduler.limit(ONE, 2);
    scheduler.ended(ONE, start + MS(240));
    let NextTurn::Run(picked) = scheduler.next(ONE, start + MS(240), false, None) else {
        panic!("a full batch waits");
    };
    assert_eq!((picked.bucket, picked.rows.len()), (2, 2));
}

#[test]
fn a_batch_begins_when_the_first_of_several_engines_is_free_for_it() {
    let check = |rests: &[u64], each, batches, expected| {
        let rests: Vec<Duration> = rests.iter().copied().map(MS).collect();
        let got = super::begins_in(&rests, MS(each), batches);
        assert_eq!(got, MS(expected), "{rests:?} {each} {batches}");
    };
    check(&[0], 10, 3, 30);
    check(&[7], 10, 0, 7);
    check(&[0, 0], 10, 1, 0);
    check(&[0, 0], 10, 2, 10);
    check(&[0, 0], 10, 5, 20);
    check(&[0, 5], 10, 1, 5);
    check(&[0, 5], 10, 2, 10);
    // One engine ends long after the others; no batch waits for it.
    check(&[0, 1000], 10, 3, 30);
    check(&[0, 15], 10, 2, 15);
    check(&[3, 4], 0, 9, 3);
}

#[test]
fn random_traffic_on_several_engines_keeps_every_item_once() {
    const ENGINES: usize = 3;
    let mut scheduler: Scheduler<u64> = Scheduler::new(policy(8), ENGINES);
    let mut random = Random(11);
    let mut now = Instant::now();
    // Time at which each engine ends its run.
    let mut ends: [Option<Instant>; ENGINES] = [None; ENGINES];
    let (mut n_pushed, mut n_gone, mut busiest) = (0_u64, 0_u64, 0);
    let mut step = |scheduler: &mut Scheduler<u64>, now: Instant, draining: bool| {
        let mut n_taken = 0;
        for (idx, end) in ends.iter_mut().enumerate() {
            let device = DeviceIdx(idx);
            if end.is_some_and(|end| end > now) {
                continue;
            }
            if end.take().is_some() {
                scheduler.ended(device, now);
            }
            match scheduler.next(device, now, draining, None) {
                NextTurn::Run(picked) => {
                    assert!(picked.rows.len() <= picked.bucket.min(scheduler.largest(device)));
                    n_taken += (picked.rows.len() + picked.late.len()) as u64;
                    if !picked.rows.is_empty() {
                        let took = MS(1 + picked.bucket as u64);
                        let (graph, bucket) = (picked.graph, picked.bucket);
                        scheduler.pace.ran(
                            graph,
                            bucket,
                            as_images(picked.rows.len()),
                            took,
                            now + took,
                        );
                        *end = Some(now + took);
                    }
                }
                NextTurn::Idle => assert!(scheduler.queue.is_empty(), "idle while something waits"),
                NextTurn::WaitUntil(at) => assert!(at > now && at <= now + DELAY),
                NextTurn::Step => panic!("there are no sequences"),
            }
        }
        busiest = busiest.max(ends.iter().flatten().count());
        n_taken
    };
    for _ in 0..100_000 {
        if random.below(2) == 0 {
            let class = Priority::ALL[usize::try_from(random.below(2)).expect("small")];
            let graph = GRAPHS[usize::try_from(random.below(2)).expect("small")];
            let deadline = (random.below(2) == 0).then(|| now + MS(random.below(100)));
            scheduler
                .queue
                .push(class, graph, entry(n_pushed, now, deadline));
            n_pushed += 1;
        }
        now += MS(random.below(2));
        n_gone += step(&mut scheduler, now, false);
        let waiting = Priority::ALL.map(|class| scheduler.queue.len_of(class) as u64);
        assert_eq!(n_pushed - n_gone, waiting.iter().sum::<u64>());
    }
    while !scheduler.queue.is_empty() {
        now += DELAY;
        n_gone += step(&mut scheduler, now, true);
    }
    assert_eq!(n_pushed, n_gone);
    assert_eq!(busiest, ENGINES, "all of them were busy at one time");
}

/// Returns bulk work's share of all engine time in a minute in which both
/// classes always wait for this number of engines.
fn share_of_bulk(n_engines: usize) -> f64 {
    let mut scheduler = Scheduler::<()>::new(policy(1), n_engines);
    let start = Instant::now();
    scheduler.pace.warmed(GRAPHS[0], 1, MS(10), start);
    let mut free_at = vec![start; n_engines];
    let (mut n_bulk, mut n_all) = (0_u32, 0_u32);
    // The engine that is free first comes next.
    while let Some((idx, &now)) = free_at.iter().enumerate().min_by_key(|&(_, &at)| at)
        && now < start + Duration::from_mins(1)
    {
        let device = DeviceIdx(idx);
        for class in Priority::ALL {
            while scheduler.queue.len_of(class) < 2 {
                scheduler.queue.push(class, GRAPHS[0], entry((), now, None));
            }
        }
        scheduler.ended(device, now);
        let NextTurn::Run(picked) = scheduler.next(device, now, false, None) else {
            panic!("both classes wait");
        };
        n_bulk += u32::from(picked.class == Priority::Bulk);
        n_all += 1;
        free_at[idx] = now + MS(10);
    }
    f64::from(n_bulk) / f64::from(n_all)
}

#[test]
fn bulk_has_its_share_of_all_engines_together() {
    let share = f64::from(policy(1).bulk_share) / 100.0;
    for n_engines in [1, 2, 16] {
        let got = share_of_bulk(n_engines);
        show(&format!("{n_engines} engines: bulk has {got:.3}"));
        assert!((got - share).abs() < 0.02, "{n_engines}: {got} of {share}");
    }
}

#[test]
fn a_batch_knows_since_when_it_was_possible() {
    let start = Instant::now();
    let at = |ms| start + MS(ms);
    let push = |scheduler: &mut Scheduler<u32>, arrived| {
        let entry = QueuedWork {
            caller: CallerId::UNNAMED,
            item: 0,
            arrived,
            deadline: None,
        };
        scheduler
            .queue
            .push(Priority::Interactive, GRAPHS[0], entry);
    };
    let check = |arrived: &[u64], steps, now, expected| {
        let mut scheduler: Scheduler<u32> = Scheduler::new(policy(4), 1);
        for &ms in arrived {
            push(&mut scheduler, at(ms));
        }
        let NextTurn::Run(picked) = scheduler.next(ONE, at(now), false, steps) else {
            panic!("{arrived:?} at {now}");
        };
        assert_eq!(picked.possible_since, at(expected), "{arrived:?} at {now}");
    };
    // A full batch was possible with the last image that it takes, not with
    // later ones.
    check(&[0, 1, 2, 3, 4], None, 4, 3);
    // The queue delay of 5 ms was over before the batch was full.
    check(&[0, 1, 2, 9], None, 10, 5);
    // A batch that is not full was possible once the first image's delay was
    // over.
    check(&[0, 3], None, 5, 5);
    check(&[0, 3], None, 20, 5);
    // A step was possible earlier.
    let waiting = Steps {
        class: Priority::Bulk,
        bulk: true,
        since: at(2),
    };
    check(&[0, 3], Some(waiting), 20, 2);
}
