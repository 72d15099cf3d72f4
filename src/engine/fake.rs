//! A scripted engine for tests and for pricing the server alone.
//!
//! Its answers are a pure function of a row's tokens, so that a test can tell
//! whether each caller got its own.

use std::str::FromStr;
use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::{Engine, EngineError, Facts, Graph, Row};
use crate::job::Want;

/// What the engine does with a batch.
#[derive(Debug, Default)]
pub struct Script {
    /// Time that each run takes.
    pub delay: Duration,
    /// Time that each row of a run adds.
    pub delay_per_row: Duration,
    /// If set, each run waits for one message first; a test holds the engine
    /// busy by sending none.
    pub gate: Option<Receiver<()>>,
    /// A row that begins with this token makes the run fail.
    pub fail_on: Option<u16>,
    /// A row that begins with this token makes the run panic.
    pub panic_on: Option<u16>,
}

/// What a fake run costs: `serve --fake-engine`. Written as a time a run, or
/// as a time a run and one a row: `100ms`, `2ms+1ms`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cost {
    pub fixed: Duration,
    pub per_row: Duration,
}

/// Longer runs are a typing error.
const COST_MAX: Duration = Duration::from_mins(1);

impl FromStr for Cost {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let time = |text: &str| match humantime::parse_duration(text.trim()) {
            Ok(time) if time <= COST_MAX => Ok(time),
            _ => Err(
                "it must be a time of up to 60s, such as 100ms, or two of them, a run's and \
                      an image's, such as 2ms+1ms"
                    .to_owned(),
            ),
        };
        let (fixed, per_row) = match text.split_once('+') {
            Some((fixed, per_row)) => (time(fixed)?, time(per_row)?),
            None => (time(text)?, Duration::ZERO),
        };
        Ok(Self { fixed, per_row })
    }
}

impl From<Cost> for Script {
    fn from(cost: Cost) -> Self {
        Self {
            delay: cost.fixed,
            delay_per_row: cost.per_row,
            ..Self::default()
        }
    }
}

/// Sleeping overshoots by up to this much on an ordinary kernel.
const SLEEP_OVERSHOOT: Duration = Duration::from_micros(200);
/// From here on the overshoot does not matter.
const SLEEP_ALONE: Duration = Duration::from_millis(5);

/// Sleeps, and spins the last bit of a short time, where the overshoot would be
/// a good part of it.
fn pass_time(time: Duration) {
    if time.is_zero() {
        return;
    }
    if time >= SLEEP_ALONE {
        std::thread::sleep(time);
        return;
    }
    let end = Instant::now() + time;
    std::thread::sleep(time.saturating_sub(SLEEP_OVERSHOOT));
    while Instant::now() < end {
        std::hint::spin_loop();
    }
}

/// See the module.
#[derive(Debug)]
pub struct FakeEngine {
    facts: Facts,
    script: Script,
}

impl FakeEngine {
    /// Width of the vectors that it returns.
    pub const DIMENSION: usize = 4;
    /// Rows of its classification head.
    pub const CLASSES: usize = 3;

    #[must_use]
    pub fn new(script: Script) -> Self {
        Self {
            facts: Facts {
                provider: "fake",
                runtime_version: "none".to_owned(),
                dimension: Self::DIMENSION,
                n_classes: Self::CLASSES,
            },
            script,
        }
    }

    /// The answer for these tokens: sums that differ when any token differs
    /// in value or in place.
    #[must_use]
    pub fn answer(tokens: &[u16], want: Want) -> Vec<f32> {
        let n_values = match want {
            Want::Features { layers, .. } => Self::DIMENSION * layers.len(),
            Want::Mean | Want::Last => Self::DIMENSION,
            Want::States => Self::DIMENSION * tokens.len(),
            Want::Logits => Self::CLASSES,
        };
        let hash = tokens.iter().fold(17_u32, |hash, &token| {
            hash.wrapping_mul(31).wrapping_add(u32::from(token))
        });
        (0..n_values)
            .map(|idx| {
                let mixed = hash.rotate_left(u32::try_from(idx % 32).unwrap_or(0));
                // 16 bits convert to f32 exactly.
                f32::from(u16::try_from(mixed & 0xffff).unwrap_or(0)) / 65536.0
            })
            .collect()
    }
}

impl Engine for FakeEngine {
    fn facts(&self) -> &Facts {
        &self.facts
    }

    fn run(&mut self, _graph: Graph, rows: &[Row<'_>]) -> Result<Vec<Vec<f32>>, EngineError> {
        if let Some(gate) = &self.script.gate {
            // A closed gate lets everything through, so that a test that ends
            // early does not hang the worker's shutdown.
            let _ = gate.recv();
        }
        let n_rows = u32::try_from(rows.len()).unwrap_or(u32::MAX);
        let per_row = self.script.delay_per_row.saturating_mul(n_rows);
        pass_time(self.script.delay.saturating_add(per_row));
        let begins_with = |token: Option<u16>| {
            token.is_some() && rows.iter().any(|row| row.tokens.first().copied() == token)
        };
        assert!(
            !begins_with(self.script.panic_on),
            "scripted panic in the fake engine"
        );
        if begins_with(self.script.fail_on) {
            return Err(EngineError::Runtime("scripted failure".to_owned()));
        }
        Ok(rows
            .iter()
            .map(|row| Self::answer(row.tokens, row.want))
            .collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn costs() {
        let check = |text: &str, expected: Option<(u64, u64)>| {
            let cost = text.parse::<Cost>().ok();
            let micros = |time| Duration::from_micros(time);
            assert_eq!(
                cost.map(|cost| (cost.fixed, cost.per_row)),
                expected.map(|(fixed, per_row)| (micros(fixed), micros(per_row))),
                "{text:?}"
            );
        };
        check("0s", Some((0, 0)));
        check("100ms", Some((100_000, 0)));
        check("2ms+150us", Some((2_000, 150)));
        check("2ms + 1ms", Some((2_000, 1_000)));
        for text in ["", "5", "2h", "1ms+", "+1ms", "1ms+2ms+3ms"] {
            check(text, None);
        }
    }
}
