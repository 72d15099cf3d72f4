//! A scripted engine for tests and for pricing the server alone.
//!
//! Its answers are a pure function of a row's tokens, so that a test can tell
//! whether each caller got its own.

mod cost;

use std::time::{Duration, Instant};

use crossbeam_channel::Receiver;

use super::{Engine, EngineError, Facts, Graph, Row};
use crate::job::Want;

pub use self::cost::Cost;

/// What the engine does with a batch.
#[derive(Debug, Default)]
pub struct Script {
    /// Time that each run takes.
    pub delay: Duration,
    /// Time that each row of a run takes besides, padding too.
    pub delay_per_row: Duration,
    /// If set, each run waits for one message first; a test holds the engine
    /// busy by sending none.
    pub gate: Option<Receiver<()>>,
    /// A row that begins with this token makes the run fail.
    pub fail_on: Option<u16>,
    /// A row that begins with this token makes the run panic.
    pub panic_on: Option<u16>,
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
