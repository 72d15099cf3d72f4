//! How long a device has nothing to run though something waits for it.
//!
//! From the end of one run to the beginning of the next, within the runtime: so
//! it has all that lies between, from the cutting of the answers over the way to
//! the batcher and back to the tokens that are copied in. What a device waits
//! because nothing is there, or because a batch may still fill up, does not
//! count.

use std::time::{Duration, Instant};

use crate::engine::{Engine, EngineFacts, GraphRun, RunSpan, RunStop, SlotFeed, WarmRun};
use crate::runtime::error::EngineError;
use crate::serve::metrics::EngineGap;

/// An engine whose gaps are measured.
pub(super) struct Metered {
    engine: Box<dyn Engine>,
    metric: EngineGap,
    /// When the device last ended a run.
    ended: Instant,
    /// Since when the turn at hand was possible.
    possible_since: Instant,
}

impl Metered {
    pub(super) fn new(engine: Box<dyn Engine>, metric: EngineGap) -> Self {
        let now = Instant::now();
        Self {
            engine,
            metric,
            ended: now,
            possible_since: now,
        }
    }

    /// Runs to come are of a turn that was possible since then.
    pub(super) fn turn(&mut self, possible_since: Instant) {
        self.possible_since = possible_since;
    }

    /// Something was run, in a call that began then.
    fn ran(&mut self, called: Instant) {
        let span = self.engine.last_span().unwrap_or_else(|| RunSpan {
            started: called,
            ended: Instant::now(),
        });
        let gap = gap(self.ended, self.possible_since, span.started);
        self.metric.record(gap);
        self.ended = span.ended;
    }
}

/// What the device waited for a run that it might have begun earlier.
fn gap(ended: Instant, possible_since: Instant, started: Instant) -> Duration {
    started.saturating_duration_since(ended.max(possible_since))
}

impl Engine for Metered {
    fn facts(&self) -> &EngineFacts {
        self.engine.facts()
    }

    fn warm(&self) -> &[WarmRun] {
        self.engine.warm()
    }

    fn run(&mut self, run: &GraphRun<'_>, stop: &RunStop) -> Result<Vec<Vec<f32>>, EngineError> {
        let called = Instant::now();
        let outcome = self.engine.run(run, stop);
        self.ran(called);
        outcome
    }

    fn feed(&mut self, feed: &SlotFeed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        let called = Instant::now();
        let outcome = self.engine.feed(feed, logits);
        self.ran(called);
        outcome
    }

    fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool {
        self.engine.copy_slot(from, to, n)
    }

    fn canary(&mut self) -> Result<(), EngineError> {
        let outcome = self.engine.canary();
        // Whoever comes meanwhile waits for a device that runs something.
        self.ended = Instant::now();
        outcome
    }

    fn last_span(&self) -> Option<RunSpan> {
        self.engine.last_span()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_time_counts_in_which_something_waited() {
        let start = Instant::now();
        let at = |micros| start + Duration::from_micros(micros);
        let check = |ended, possible_since, started, expected| {
            let gap = gap(at(ended), at(possible_since), at(started));
            assert_eq!(gap, Duration::from_micros(expected));
        };
        // It waited while the run before it went on.
        check(100, 20, 130, 30);
        // It came when the device had long been idle.
        check(100, 500, 530, 30);
        // Nothing is to be gained where it began at once.
        check(100, 100, 100, 0);
        check(100, 500, 499, 0);
    }
}
