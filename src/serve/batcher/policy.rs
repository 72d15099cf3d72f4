//! Rules for when to close a batch, of which class and graph, and at which
//! size: pure functions of the waiting work, the time and the measured
//! durations.

use std::time::{Duration, Instant};

use super::pace::Pace;
use super::queue::LaneView;
use crate::model::buckets::Buckets;
use crate::model::graph::Graph;
use crate::proto::Priority;
use crate::serve::metrics::BatchClose;

/// Scheduling options that the operator sets.
#[derive(Debug, Clone)]
pub(crate) struct Policy {
    pub buckets: Buckets,
    /// Longest time that an image waits for a batch to fill up while the engine
    /// is free.
    pub max_queue_delay: Duration,
    /// Smallest share of engine time that bulk work gets while both classes
    /// wait, in percent.
    pub bulk_share: u8,
    /// Longest time that bulk work waits without getting a batch.
    pub bulk_wait_max: Duration,
}

/// Decision about a free engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Decision {
    /// No work waits.
    Idle,
    /// A batch may still fill up until this time.
    WaitUntil(Instant),
    /// Form a batch of this class and graph now.
    Flush(Priority, Graph, BatchClose),
}

impl Policy {
    /// Decides which lane gets the next batch, and when. While the worker
    /// drains, no batch waits to fill up. `full` gives the number of images of
    /// a graph from which a larger batch gains nothing; `bulk_owed` is true if
    /// bulk work has earned the next batch.
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
        // While no image has waited for the whole queue delay, the engine may
        // stay idle so that batches fill up.
        if lanes.iter().all(|lane| reason(lane).is_none()) {
            let wake = lanes.iter().map(|lane| lane.oldest + self.max_queue_delay);
            return wake.min().map_or(Decision::Idle, Decision::WaitUntil);
        }
        // If a batch is due anyway, the most urgent lane goes first, though it
        // might have waited a little longer: otherwise it would wait for the
        // whole batch.
        let waits = |class| lanes.iter().any(|lane| lane.class == class);
        let class = if waits(Priority::Interactive) && !(bulk_owed && waits(Priority::Bulk)) {
            Priority::Interactive
        } else {
            Priority::Bulk
        };
        // Among graphs, the one whose first image is the most urgent goes
        // first, so that no graph starves another.
        lanes
            .iter()
            .filter(|lane| lane.class == class)
            .min_by_key(|lane| lane.first)
            .map_or(Decision::Idle, |lane| {
                let close = reason(lane).unwrap_or(BatchClose::Turn);
                Decision::Flush(class, lane.graph, close)
            })
    }

    /// Chooses the size of a batch when `n` images wait: the smallest size at
    /// which the engine answers nearly the most images per second. If padding
    /// is free (a GPU that is not full), that is a large size. If every row
    /// costs the same (a CPU), it is one image: the other images are then
    /// answered no later, this image sooner, and more urgent work need not wait
    /// for all of them.
    ///
    /// A size that was never run is tried once `n` images fill it, if the size
    /// before it was faster per image than its own predecessor: so an engine
    /// that gains nothing by two images never runs four.
    #[must_use]
    pub(crate) fn bucket(
        &self,
        graph: Graph,
        n: usize,
        largest: usize,
        pace: &Pace,
        now: Instant,
    ) -> usize {
        self.choose(graph, n, largest, pace, now, true)
    }

    /// Returns the number of images from which a larger batch gains nothing, by
    /// the sizes that were run so far: no image waits for others so that a size
    /// can be tried.
    #[must_use]
    pub(crate) fn full(&self, graph: Graph, largest: usize, pace: &Pace, now: Instant) -> usize {
        self.choose(graph, largest, largest, pace, now, false)
    }

    fn choose(
        &self,
        graph: Graph,
        n: usize,
        largest: usize,
        pace: &Pace,
        now: Instant,
        tries: bool,
    ) -> usize {
        let up = self.buckets.at_least(n.min(largest)).min(largest);
        let mut rates: Vec<(usize, f64)> = Vec::new();
        for bucket in self.buckets.iter().take_while(|&bucket| bucket <= up) {
            let (Some(time), Some(age)) =
                (pace.typical(graph, bucket), pace.age(graph, bucket, now))
            else {
                if pace.sizes_untried && !rates.is_empty() {
                    let gains = match rates[..] {
                        [.., (_, before), (_, last)] => last * NEARLY > before,
                        _ => true,
                    };
                    if tries && gains && bucket <= n {
                        return bucket;
                    }
                    break;
                }
                // Without a measurement there is nothing to choose by.
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
    /// Chooses the size of an interactive batch, for which `bucket` is enough,
    /// when `n` interactive and bulk images wait: a larger size if it costs the
    /// interactive images little time and saves bulk work most of a run.
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

/// Largest factor by which an interactive batch may take longer so that bulk
/// work can share it: less than 2, which is the cost of two images where every
/// row costs the same.
const STRETCH: f64 = 1.9;

/// Time that a batch costs besides its run, about: the way to the engine and
/// back.
const HANDOVER: Duration = Duration::from_micros(100);
/// Share of the best rate from which a smaller batch is preferred.
const NEARLY: f64 = 0.98;
/// Age of a measurement after which its size is run once more: otherwise a
/// measurement that was wrong, or is no longer right, would keep a size from
/// being used for ever.
const REMEASURE: Duration = Duration::from_mins(1);

/// Largest lead of bulk work over its share, in bulk batches. Time that bulk
/// work had while the engine was not needed otherwise is soon forgotten, but
/// not at once: otherwise bulk would be owed a batch as soon as a few
/// interactive batches have run.
const AHEAD_MAX: u32 = 4;

/// Account of the engine time that bulk work is owed. Interactive work goes
/// first; for the engine time that interactive work takes while bulk waits,
/// bulk earns its share.
#[derive(Debug, Default)]
pub(crate) struct BulkLedger {
    /// Engine time that bulk work has earned and not yet had.
    earned: Duration,
    /// Engine time that bulk work has had beyond its earnings. Either this or
    /// `earned` is zero.
    ahead: Duration,
    /// Time at which bulk work last got a batch.
    served_at: Option<Instant>,
}

impl BulkLedger {
    /// Records that a batch of this class took `elapsed`, and whether bulk work
    /// waited meanwhile.
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
            // Bulk that did not wait is owed nothing later.
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

    /// Records that a batch of this class was formed.
    pub(crate) fn served(&mut self, class: Priority, now: Instant) {
        if class == Priority::Bulk {
            self.served_at = Some(now);
        }
    }

    /// True if bulk work has earned a batch that takes `cost`, or has waited
    /// for `--bulk-wait-max`. `oldest` is the arrival of the bulk image that
    /// has waited longest.
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
    use crate::serve::fair::CallerId;

    const MS: fn(u64) -> Duration = Duration::from_millis;

    fn policy() -> Policy {
        Policy {
            buckets: Buckets::powers_of_two(4),
            max_queue_delay: MS(10),
            bulk_share: 20,
            bulk_wait_max: MS(5000),
        }
    }

    /// Checks a decision. Each lane is a class, a graph, a number of waiting
    /// images and their arrival.
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
                    caller: CallerId::UNNAMED,
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
        // A size that has not run for a minute is tried once, if enough images
        // wait.
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
        // Something in between: padding costs more than it brings.
        let mut pace = Pace::default();
        for (size, ms) in [(1, 10), (2, 16), (4, 28)] {
            pace.warmed(Hidden, size, MS(ms), now);
        }
        assert_eq!(sizes(&pace, now), [1, 2, 2, 4, 4]);
    }

    #[test]
    fn sizes_are_tried_with_images_that_wait() {
        let policy = policy();
        let now = Instant::now();
        let mut pace = Pace::default();
        pace.sizes_untried = true;
        let sizes = |pace: &Pace| [1, 2, 3, 4, 9].map(|n| policy.bucket(Hidden, n, 4, pace, now));
        let full = |pace: &Pace| policy.full(Hidden, 4, pace, now);
        pace.warmed(Hidden, 1, MS(10), now);
        assert_eq!(sizes(&pace), [1, 2, 2, 2, 2], "two images fill a new size");
        assert_eq!(full(&pace), 1, "no image waits for another one");
        // Two are no faster per image than one: four are never run.
        pace.ran(Hidden, 2, 2.0, MS(20), now);
        assert_eq!(sizes(&pace), [1; 5]);
        assert_eq!(full(&pace), 1);
        // Two are faster: four are tried once four wait.
        for _ in 0..8 {
            pace.ran(Hidden, 2, 2.0, MS(14), now);
        }
        assert_eq!(sizes(&pace), [1, 2, 2, 4, 4]);
        assert_eq!(full(&pace), 2);
        pace.ran(Hidden, 4, 4.0, MS(20), now);
        assert_eq!(sizes(&pace), [1, 2, 4, 4, 4]);
        assert_eq!(full(&pace), 4);
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
