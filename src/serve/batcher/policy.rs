//! When to close a batch, of whom, and how large: pure functions of what waits,
//! of the time, and of what was measured.

use std::time::{Duration, Instant};

use super::pace::Pace;
use super::queue::LaneView;
use crate::model::buckets::Buckets;
use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::metrics::BatchClose;

/// The operator's choices.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    pub buckets: Buckets,
    /// How long an image may wait for others while the engine is free.
    pub max_queue_delay: Duration,
    /// The share of engine time that bulk gets at least while both classes
    /// wait, in percent.
    pub bulk_share: u8,
    /// The longest that bulk goes without a batch while it waits.
    pub bulk_wait_max: Duration,
}

/// What to do while the engine is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// Nothing waits.
    Idle,
    /// A batch may still fill up until then.
    WaitUntil(Instant),
    /// Form a batch of this lane now.
    Flush(Priority, Graph, BatchClose),
}

impl Policy {
    /// Decides among lanes, for a worker that drains (and so waits for nobody)
    /// or not. `full` says how many images of a graph gain nothing from more
    /// company, `bulk_owed` whether bulk has waited for its share.
    #[must_use]
    pub(crate) fn decide(
        &self,
        lanes: &[LaneView],
        full: impl Fn(Graph) -> usize,
        now: Instant,
        draining: bool,
        bulk_owed: bool,
    ) -> Decision {
        let reason = |lane: &LaneView| {
            if lane.len >= full(lane.graph) {
                Some(BatchClose::Full)
            } else if lane.oldest + self.max_queue_delay <= now {
                Some(BatchClose::Delay)
            } else {
                draining.then_some(BatchClose::Drain)
            }
        };
        // While nobody's time is up the engine may stay idle for company.
        if lanes.iter().all(|lane| reason(lane).is_none()) {
            let wake = lanes.iter().map(|lane| lane.oldest + self.max_queue_delay);
            return wake.min().map_or(Decision::Idle, Decision::WaitUntil);
        }
        // Once it starts something anyway, the most urgent goes first, though
        // it might have waited a little longer: else it waits for a batch.
        let waits = |class| lanes.iter().any(|lane| lane.class == class);
        let class = if waits(Priority::Interactive) && !(bulk_owed && waits(Priority::Bulk)) {
            Priority::Interactive
        } else {
            Priority::Bulk
        };
        // Among graphs, whoever's first image is the most urgent, so that no
        // graph starves another.
        lanes
            .iter()
            .filter(|lane| lane.class == class)
            .min_by_key(|lane| lane.first)
            .map_or(Decision::Idle, |lane| {
                let close = reason(lane).unwrap_or(BatchClose::Turn);
                Decision::Flush(class, lane.graph, close)
            })
    }

    /// How large a batch to form of `n` images that wait: the smallest size at
    /// which the engine answers nearly the most images a second. Where padding
    /// is free (a GPU that is not full) that is a large one, where every row
    /// costs the same (a CPU) it is one image: then the others are answered no
    /// later, this one sooner, and whoever is more urgent need not wait for all
    /// of them.
    #[must_use]
    pub(crate) fn bucket(
        &self,
        graph: Graph,
        n: usize,
        largest: usize,
        pace: &Pace,
        now: Instant,
    ) -> usize {
        let up = self.buckets.at_least(n.min(largest)).min(largest);
        let mut rates = Vec::new();
        for bucket in self.buckets.iter().take_while(|&bucket| bucket <= up) {
            let (Some(time), Some(age)) =
                (pace.typical(graph, bucket), pace.age(graph, bucket, now))
            else {
                // Nothing to choose by.
                return up;
            };
            if age >= REMEASURE && bucket <= n {
                return bucket;
            }
            let n_rows = f64::from(u32::try_from(bucket.min(n)).unwrap_or(u32::MAX));
            rates.push((bucket, n_rows / (time + HANDOVER).as_secs_f64()));
        }
        let best = rates.iter().map(|&(_, rate)| rate).fold(0.0, f64::max);
        rates
            .into_iter()
            .find(|&(_, rate)| rate >= NEARLY * best)
            .map_or(up, |(bucket, _)| bucket)
    }
}

impl Policy {
    /// How large to make a batch of interactive work, for which `bucket` is
    /// enough, when `n` images of it and of bulk wait: larger where that costs
    /// the interactive ones little time and spares bulk most of a run.
    #[must_use]
    pub(crate) fn shared_bucket(
        &self,
        graph: Graph,
        bucket: usize,
        n: usize,
        largest: usize,
        pace: &Pace,
    ) -> usize {
        let Some(enough) = pace.typical(graph, bucket) else {
            return bucket;
        };
        self.buckets
            .iter()
            .take_while(|&size| size <= largest.min(n))
            .filter(|&size| {
                let time = pace.typical(graph, size);
                size > bucket && time.is_some_and(|time| time <= enough.mul_f64(STRETCH))
            })
            .last()
            .unwrap_or(bucket)
    }
}

/// How much longer an interactive batch may take so that bulk rides along: less
/// than twice, which is what two images take where every row costs.
const STRETCH: f64 = 1.9;

/// What a batch costs besides its run: the way to the engine and back, about.
const HANDOVER: Duration = Duration::from_micros(100);
/// How much of the best rate a smaller batch is worth.
const NEARLY: f64 = 0.98;
/// A size that was not run for so long is run once: a measurement that was
/// wrong, or is no longer right, would else keep a size from being used for
/// ever.
const REMEASURE: Duration = Duration::from_mins(1);

/// How many of its own batches bulk may have had ahead of its share: what it had
/// while the engine was not needed otherwise is soon forgotten, but not at once,
/// or it would be owed a batch as soon as a few interactive ones have run.
const AHEAD_MAX: u32 = 4;

/// Keeps account of what bulk is owed. Interactive work goes first; for the
/// engine time that it takes while bulk waits, bulk earns its share.
#[derive(Debug, Default)]
pub(crate) struct BulkLedger {
    /// Engine time that bulk has earned and not had.
    earned: Duration,
    /// Engine time that bulk has had beyond what it earned. One of the two is
    /// zero.
    ahead: Duration,
    /// When bulk last had a batch.
    served_at: Option<Instant>,
}

impl BulkLedger {
    /// A batch of this class took this long; bulk work waited meanwhile or not.
    pub(crate) fn ran(
        &mut self,
        policy: &Policy,
        class: Priority,
        elapsed: Duration,
        bulk_waited: bool,
    ) {
        match class {
            Priority::Bulk => {
                let paid = elapsed.min(self.earned);
                self.earned -= paid;
                self.ahead = (self.ahead + elapsed.saturating_sub(paid)).min(elapsed * AHEAD_MAX);
            }
            // What nobody waits for is not owed later.
            Priority::Interactive if !bulk_waited => self.earned = Duration::ZERO,
            Priority::Interactive => {
                let share = u32::from(policy.bulk_share.min(99));
                let earned = elapsed * share / (100 - share);
                let paid = earned.min(self.ahead);
                self.ahead -= paid;
                self.earned = (self.earned + earned.saturating_sub(paid)).min(policy.bulk_wait_max);
            }
        }
    }

    /// A batch of this class was formed.
    pub(crate) fn served(&mut self, class: Priority, now: Instant) {
        if class == Priority::Bulk {
            self.served_at = Some(now);
        }
    }

    /// Whether bulk has earned a batch that takes `cost`, or has waited too
    /// long. `oldest` is when the bulk work that waits came.
    #[must_use]
    pub(crate) fn bulk_is_owed(
        &self,
        policy: &Policy,
        cost: Duration,
        oldest: Instant,
        now: Instant,
    ) -> bool {
        let since = self.served_at.map_or(oldest, |at| at.max(oldest));
        self.earned > Duration::ZERO && self.earned >= cost.min(policy.bulk_wait_max)
            || now.saturating_duration_since(since) >= policy.bulk_wait_max
    }
}

#[cfg(test)]
mod tests {
    use Graph::{Hidden, Logits};
    use Priority::{Bulk, Interactive};

    use super::super::queue::{QueuedWork, WorkQueue};
    use super::*;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn policy() -> Policy {
        Policy {
            buckets: Buckets::powers_of_two(4),
            max_queue_delay: MS(10),
            bulk_share: 20,
            bulk_wait_max: MS(5000),
        }
    }

    /// Each lane: class, graph, how many wait, when they came.
    fn check(
        lanes: &[(Priority, Graph, usize, u64)],
        now_ms: u64,
        draining: bool,
        owed: bool,
        expected: &str,
    ) {
        let start = Instant::now();
        let at = |ms| start + MS(ms);
        let mut queue = WorkQueue::default();
        for &(class, graph, len, came) in lanes {
            for _ in 0..len {
                let entry = QueuedWork {
                    item: (),
                    arrived: at(came),
                    deadline: None,
                };
                queue.push(class, graph, entry);
            }
        }
        let got = match policy().decide(&queue.lanes(), |_| 4, at(now_ms), draining, owed) {
            Decision::Idle => "idle".to_owned(),
            Decision::WaitUntil(wake) => format!("wait {}", (wake - start).as_millis()),
            Decision::Flush(class, graph, close) => {
                format!("{} {} {close:?}", class.label(), graph.label())
            }
        };
        assert_eq!(got, expected, "{lanes:?} at {now_ms} ms");
    }

    #[test]
    fn decisions_in_one_lane() {
        check(&[], 0, false, false, "idle");
        check(&[(Interactive, Hidden, 1, 0)], 3, false, false, "wait 10");
        let delay = "interactive hidden Delay";
        check(&[(Interactive, Hidden, 1, 0)], 10, false, false, delay);
        let full = "bulk hidden Full";
        check(&[(Bulk, Hidden, 4, 9)], 9, false, false, full);
        check(&[(Bulk, Hidden, 9, 9)], 9, false, false, full);
        check(&[(Bulk, Hidden, 1, 9)], 9, true, false, "bulk hidden Drain");
    }

    #[test]
    fn decisions_among_graphs() {
        let two = [(Bulk, Hidden, 1, 5), (Bulk, Logits, 1, 2)];
        check(&two, 6, false, false, "wait 12");
        let full = [(Bulk, Hidden, 4, 5), (Bulk, Logits, 1, 2)];
        check(&full, 6, false, false, "bulk logits Turn");
        check(&full, 13, false, false, "bulk logits Delay");
    }

    #[test]
    fn interactive_goes_first_unless_bulk_is_owed() {
        let both = [(Bulk, Hidden, 4, 0), (Interactive, Hidden, 1, 8)];
        check(&both, 9, false, false, "interactive hidden Turn");
        check(&both, 9, false, true, "bulk hidden Full");
        check(&both[1..], 18, false, true, "interactive hidden Delay");
    }

    #[test]
    fn sizes_follow_what_was_measured() {
        let policy = policy();
        let now = Instant::now();
        let mut pace = Pace::default();
        let sizes =
            |pace: &Pace, at| [1, 2, 3, 4, 9].map(|n| policy.bucket(Hidden, n, 4, pace, at));
        assert_eq!(sizes(&pace, now), [1, 2, 4, 4, 4], "nothing is known");
        // A CPU: every row costs.
        for size in [1, 2, 4] {
            pace.warmed(Hidden, size, MS(10 * size as u64), now);
        }
        assert_eq!(sizes(&pace, now), [1; 5]);
        // What was not seen for long is tried once, where enough wait for it.
        let later = now + REMEASURE;
        pace.ran(Hidden, 1, 1.0, MS(10), later);
        assert_eq!(sizes(&pace, later), [1, 2, 2, 2, 2]);
        pace.ran(Hidden, 2, 2.0, MS(20), later);
        assert_eq!(sizes(&pace, later), [1, 1, 1, 4, 4]);
        // A GPU: a larger batch costs little more.
        let mut pace = Pace::default();
        for size in [1, 2, 4] {
            pace.warmed(Hidden, size, MS(10 + size as u64), now);
        }
        assert_eq!(sizes(&pace, now), [1, 2, 4, 4, 4]);
        let limited = policy.bucket(Hidden, 9, 2, &pace, now);
        assert_eq!(limited, 2, "what the engine takes");
        // Something between: padding costs more than it brings.
        let mut pace = Pace::default();
        for (size, ms) in [(1, 10), (2, 16), (4, 28)] {
            pace.warmed(Hidden, size, MS(ms), now);
        }
        assert_eq!(sizes(&pace, now), [1, 2, 2, 4, 4]);
    }

    #[test]
    fn bulk_rides_along_where_that_is_cheap() {
        let policy = policy();
        let now = Instant::now();
        let sizes = |times: [u64; 3]| {
            let mut pace = Pace::default();
            for (size, ms) in [1, 2, 4].into_iter().zip(times) {
                pace.warmed(Hidden, size, MS(ms), now);
            }
            [1, 2, 3, 9].map(|n| policy.shared_bucket(Hidden, 1, n, 4, &pace))
        };
        assert_eq!(sizes([10, 20, 40]), [1, 1, 1, 1]);
        assert_eq!(sizes([10, 11, 13]), [1, 2, 2, 4]);
        assert_eq!(sizes([10, 14, 20]), [1, 2, 2, 2]);
        assert_eq!(sizes([45, 50, 60]), [1, 2, 2, 4]);
    }

    #[test]
    fn bulk_earns_its_share() {
        let policy = policy();
        let mut ledger = BulkLedger::default();
        let start = Instant::now();
        let owed = |ledger: &BulkLedger| ledger.bulk_is_owed(&policy, MS(100), start, start);
        for _ in 0..3 {
            ledger.ran(&policy, Interactive, MS(100), true);
            assert!(!owed(&ledger));
        }
        ledger.ran(&policy, Interactive, MS(100), true);
        assert!(owed(&ledger), "four to one");
        ledger.ran(&policy, Bulk, MS(100), true);
        assert!(!owed(&ledger));
        for _ in 0..9 {
            ledger.ran(&policy, Bulk, MS(100), true);
        }
        ledger.ran(&policy, Interactive, MS(1900), true);
        assert!(!owed(&ledger), "it has had four batches ahead");
        ledger.ran(&policy, Interactive, MS(100), true);
        assert!(owed(&ledger));
        ledger.ran(&policy, Bulk, MS(100), true);
        ledger.ran(&policy, Interactive, MS(300), true);
        ledger.ran(&policy, Interactive, MS(1), false);
        assert!(!owed(&ledger), "nobody waited");
    }

    #[test]
    fn bulk_does_not_wait_for_ever() {
        let policy = policy();
        let mut ledger = BulkLedger::default();
        let start = Instant::now();
        let owed =
            |ledger: &BulkLedger, ms| ledger.bulk_is_owed(&policy, MS(100), start, start + MS(ms));
        assert!(!owed(&ledger, 4999));
        assert!(owed(&ledger, 5000));
        ledger.served(Bulk, start + MS(5000));
        assert!(!owed(&ledger, 9000));
    }
}
