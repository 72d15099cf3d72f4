//! Measures for how long a device has nothing to run though work for it waits.
//!
//! A gap lasts from the end of one run to the beginning of the next, both
//! within the runtime. It therefore includes everything in between: cutting the
//! answers, the way to the batcher and back, and copying the tokens in. Time in
//! which no work is there, or in which a batch may still fill up, does not
//! count.

use std::time::{Duration, Instant};

use crate::engine::{
    CanaryOutcome, Engine, EngineFacts, GraphRun, RunSpan, RunStop, SlotFeed, WarmRun,
};
use crate::runtime::error::EngineError;
use crate::serve::metrics::EngineGap;

/// Engine whose gaps are measured.
pub(super) struct Metered {
    engine: Box<dyn Engine>,
    metric: EngineGap,
    /// Time at which the device last ended a run.
    ended: Instant,
    /// Earliest time at which the current turn could have begun.
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

    /// Begins a turn that could have begun at `possible_since`; the next runs
    /// belong to it.
    pub(super) fn turn(&mut self, possible_since: Instant) {
        self.possible_since = possible_since;
    }

    /// Records a run, in a call that began at `called`.
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

/// Time that the device waited for a run that could have begun earlier.
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

    fn fill_slot(&mut self, slot: usize, number: f32) -> Result<(), EngineError> {
        self.engine.fill_slot(slot, number)
    }

    fn canary(&mut self) -> Result<CanaryOutcome, EngineError> {
        let outcome = self.engine.canary();
        // Work that arrives meanwhile waits for a device that is busy.
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
        // The work waited while the run before it went on.
        check(100, 20, 130, 30);
        // The work came when the device had long been idle.
        check(100, 500, 530, 30);
        // There is no gap where the run began at once.
        check(100, 100, 100, 0);
        check(100, 500, 499, 0);
    }
}
