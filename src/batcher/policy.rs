//! When to close a batch: a pure function of what waits and of the time.

use std::time::{Duration, Instant};

use crate::engine::Graph;
use crate::metrics::Close;

/// The operator's choice between latency and fill.
#[derive(Debug, Clone, Copy)]
pub struct Policy {
    /// Images in one run at most. At least 1.
    pub max_batch_size: usize,
    /// How long an image may wait for others while the engine is free.
    pub max_queue_delay: Duration,
}

/// The jobs that wait for one graph.
#[derive(Debug, Clone, Copy)]
pub struct Lane {
    pub graph: Graph,
    /// Jobs that wait. At least 1.
    pub len: usize,
    /// When the first of them arrived.
    pub oldest: Instant,
}

/// What to do while the engine is free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Decision {
    /// Nothing waits.
    Idle,
    /// A batch may still fill up until then.
    WaitUntil(Instant),
    /// Form a batch of this graph now.
    Flush(Graph, Close),
}

impl Policy {
    /// Decides among lanes, for a worker that drains (and so waits for
    /// nobody) or not. The lane whose head has waited longest goes first, so
    /// that no graph starves another.
    #[must_use]
    pub fn decide(&self, lanes: &[Lane], now: Instant, draining: bool) -> Decision {
        let mut due: Option<(Lane, Close)> = None;
        let mut wake: Option<Instant> = None;
        for &lane in lanes {
            let expires = lane.oldest + self.max_queue_delay;
            let close = if lane.len >= self.max_batch_size {
                Close::Full
            } else if expires <= now {
                Close::Delay
            } else if draining {
                Close::Drain
            } else {
                wake = Some(wake.map_or(expires, |wake| wake.min(expires)));
                continue;
            };
            if due.is_none_or(|(first, _)| lane.oldest < first.oldest) {
                due = Some((lane, close));
            }
        }
        match (due, wake) {
            (Some((lane, close)), _) => Decision::Flush(lane.graph, close),
            (None, Some(wake)) => Decision::WaitUntil(wake),
            (None, None) => Decision::Idle,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DELAY: Duration = Duration::from_millis(10);

    fn check(lanes: &[(Graph, usize, u64)], now_ms: u64, draining: bool, expected: &str) {
        let policy = Policy {
            max_batch_size: 4,
            max_queue_delay: DELAY,
        };
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        let lanes: Vec<Lane> = lanes
            .iter()
            .map(|&(graph, len, oldest_ms)| Lane {
                graph,
                len,
                oldest: at(oldest_ms),
            })
            .collect();
        let got = match policy.decide(&lanes, at(now_ms), draining) {
            Decision::Idle => "idle".to_owned(),
            Decision::WaitUntil(wake) => format!("wait {}", (wake - start).as_millis()),
            Decision::Flush(graph, close) => format!("{} {close:?}", graph.label()),
        };
        assert_eq!(got, expected, "lanes {lanes:?} at {now_ms} ms");
    }

    #[test]
    fn decisions() {
        use Graph::{Hidden, Logits};
        check(&[], 0, false, "idle");
        check(&[(Hidden, 1, 0)], 3, false, "wait 10");
        check(&[(Hidden, 1, 0)], 10, false, "hidden Delay");
        check(&[(Hidden, 4, 9)], 9, false, "hidden Full");
        check(&[(Hidden, 9, 9)], 9, false, "hidden Full");
        check(&[(Hidden, 1, 9)], 9, true, "hidden Drain");
        // Two graphs: whoever is due, and of those the one that waited longer.
        check(&[(Hidden, 1, 5), (Logits, 1, 2)], 6, false, "wait 12");
        check(&[(Hidden, 4, 5), (Logits, 1, 2)], 6, false, "hidden Full");
        check(&[(Hidden, 4, 5), (Logits, 1, 2)], 13, false, "logits Delay");
    }
}
