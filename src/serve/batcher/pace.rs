//! Measured speed of the engines: durations of runs by graph and size, and
//! images per second.

use std::collections::{BTreeMap, VecDeque};
use std::time::{Duration, Instant};

use crate::model::graph::Graph;

/// Number of runs that are remembered per graph and size: enough that one slow
/// run does not decide, few enough that a change shows within a second.
const RUNS: usize = 8;
/// Number of runs, of any graph and size, that the rate is computed from.
const RATE_RUNS: usize = 32;
/// Age after which a measurement refuses no more work: refusing ends the runs
/// that would correct the measurement.
const STALE: Duration = Duration::from_secs(10);

/// Durations of the latest runs, by graph and size, and the rate that follows.
#[derive(Debug, Default)]
pub(crate) struct Pace {
    sizes: BTreeMap<(Graph, usize), Recent>,
    /// Images of each of the latest runs, and the run's duration.
    runs: VecDeque<(f64, Duration)>,
    /// True if the engines' warm-up ran only the smallest size: a larger size
    /// without a measurement was then never run.
    pub(crate) sizes_untried: bool,
}

#[derive(Debug)]
struct Recent {
    times: VecDeque<Duration>,
    /// True if only the warm-up was measured; the first run of a size may be
    /// slower than later runs.
    warm: bool,
    /// Time at which the last run ended.
    at: Instant,
}

impl Pace {
    /// Records a warm-up run, which is good enough for choosing among sizes.
    pub(crate) fn warmed(&mut self, graph: Graph, bucket: usize, elapsed: Duration, now: Instant) {
        let times = VecDeque::from([elapsed]);
        self.sizes.entry((graph, bucket)).or_insert(Recent {
            times,
            warm: true,
            at: now,
        });
    }

    /// Records a successful run of `images` in a batch of size `bucket`. If an
    /// image takes many runs, each run counts as a fraction of the image.
    pub(crate) fn ran(
        &mut self,
        graph: Graph,
        bucket: usize,
        images: f64,
        elapsed: Duration,
        now: Instant,
    ) {
        let recent = self.sizes.entry((graph, bucket)).or_insert(Recent {
            times: VecDeque::new(),
            warm: false,
            at: now,
        });
        if recent.warm || now.saturating_duration_since(recent.at) > STALE {
            recent.times.clear();
        } else if recent.times.len() == RUNS {
            recent.times.pop_front();
        }
        recent.times.push_back(elapsed);
        recent.warm = false;
        recent.at = now;
        if self.runs.len() == RATE_RUNS {
            self.runs.pop_front();
        }
        self.runs.push_back((images, elapsed));
    }

    /// Typical (median) duration of a run of this size, if any was measured.
    #[must_use]
    pub(crate) fn typical(&self, graph: Graph, bucket: usize) -> Option<Duration> {
        let times = &self.sizes.get(&(graph, bucket))?.times;
        let mut sorted: Vec<Duration> = times.iter().copied().collect();
        sorted.sort_unstable();
        sorted.get(sorted.len() / 2).copied()
    }

    /// Shortest duration of a run of this size, if measured in the last 10 s.
    #[must_use]
    pub(crate) fn at_least(&self, graph: Graph, bucket: usize, now: Instant) -> Option<Duration> {
        let recent = self.sizes.get(&(graph, bucket))?;
        if recent.warm || now.saturating_duration_since(recent.at) > STALE {
            return None;
        }
        recent.times.iter().min().copied()
    }

    /// Time since the last run of this size, if there was any.
    #[must_use]
    pub(crate) fn age(&self, graph: Graph, bucket: usize, now: Instant) -> Option<Duration> {
        let recent = self.sizes.get(&(graph, bucket))?;
        Some(now.saturating_duration_since(recent.at))
    }

    /// Shortest duration of a run of this graph at any size, if one of the
    /// sizes was measured within the last 10 s. Older measurements of the other
    /// sizes count as well, since such a size may still be the fastest: one
    /// image would run at it, even while only large batches have run lately.
    #[must_use]
    pub(crate) fn floor(&self, graph: Graph, now: Instant) -> Option<Duration> {
        let sizes = || self.sizes.iter().filter(|((of, _), _)| *of == graph);
        sizes().find_map(|(&(_, bucket), _)| self.at_least(graph, bucket, now))?;
        sizes().flat_map(|(_, recent)| &recent.times).min().copied()
    }

    /// Images per second while the engine is busy.
    #[must_use]
    pub(crate) fn rate(&self) -> Option<f64> {
        let (mut images, mut busy) = (0.0, 0.0);
        for (of_run, elapsed) in &self.runs {
            images += of_run;
            busy += elapsed.as_secs_f64();
        }
        (busy > 0.0 && images > 0.0).then(|| images / busy)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GRAPH: Graph = Graph::Hidden;
    const MS: fn(u64) -> Duration = Duration::from_millis;

    #[test]
    fn what_was_seen_is_what_is_said() {
        let now = Instant::now();
        let mut pace = Pace::default();
        assert_eq!(pace.typical(GRAPH, 1), None);
        pace.warmed(GRAPH, 1, MS(100), now);
        assert_eq!(pace.typical(GRAPH, 1), Some(MS(100)));
        assert_eq!(
            pace.at_least(GRAPH, 1, now),
            None,
            "a warm-up refuses nobody"
        );
        for time in [10, 12, 11, 90] {
            pace.ran(GRAPH, 1, 1.0, MS(time), now);
        }
        assert_eq!(pace.typical(GRAPH, 1), Some(MS(12)));
        assert_eq!(pace.at_least(GRAPH, 1, now), Some(MS(10)));
        assert_eq!(pace.floor(GRAPH, now), Some(MS(10)));
        assert_eq!(pace.floor(Graph::Logits, now), None);
        let later = now + STALE + MS(1);
        assert_eq!(pace.floor(GRAPH, later), None);
        pace.ran(GRAPH, 4, 4.0, MS(40), later);
        let floor = pace.floor(GRAPH, later);
        assert_eq!(floor, Some(MS(10)), "one image would not take 40 ms");
        assert_eq!(pace.at_least(GRAPH, 1, later), None, "it may have changed");
        let rate = pace.rate().expect("five runs");
        assert!((rate - 8.0 / 0.163).abs() < 1e-6, "{rate}");
        // A change shows once the old runs are forgotten.
        for _ in 0..RUNS {
            pace.ran(GRAPH, 1, 1.0, MS(50), later);
        }
        assert_eq!(pace.at_least(GRAPH, 1, later), Some(MS(50)));
    }
}
