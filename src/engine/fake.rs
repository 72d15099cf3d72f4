//! A scripted engine, for tests and for measuring the cost of the server alone.
//!
//! An answer is a pure function of a row's tokens, so that a test can check
//! that each caller got its own answer. Scripted faults are those of a real
//! engine.

mod cost;

use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError};

use super::{
    CanaryOutcome, Engine, EngineFacts, GraphRun, RunSpan, RunStop, SequenceFacts, SlotFeed,
    WarmRun,
};
use crate::model::graph::{Graph, Want};
use crate::runtime::error::EngineError;

pub use self::cost::Cost;

/// Interval at which a long run checks whether it should stop.
const STOP_INTERVAL: Duration = Duration::from_millis(1);

/// Behavior of the engine: its speed and its faults.
#[derive(Debug, Default)]
pub struct Script {
    /// Time that each run takes.
    pub delay: Duration,
    /// Additional time that each row of a run takes, padding included.
    pub delay_per_row: Duration,
    /// Gate before each run: the run waits for one message, so that a test can
    /// keep the engine busy by sending none.
    pub gate: Option<Receiver<()>>,
    /// Token that makes a run fail if a row begins with it, and a step if it is
    /// the last token that a sequence is fed.
    pub fail_on: Option<u16>,
    /// Token that makes a run panic, by the same rule as `fail_on`.
    pub panic_on: Option<u16>,
    /// Token that makes the device fail, by the same rule as `fail_on`.
    pub device_fails_on: Option<u16>,
    /// Token whose keys and values are not finite: all logits of its slot are NaN
    /// from then on, those of later sequences too, until the slot is cleared.
    pub nan_on: Option<u16>,
    /// Largest batch that fits the memory; larger batches fail.
    pub memory_for: Option<usize>,
    /// Number of idle checks that succeed before all later checks fail.
    pub canaries_until_failure: Option<usize>,
    /// Settings of generation, if the engine can generate; the number of colors
    /// is that of the palette of the test's model.
    pub sequences: Option<FakeSequences>,
}

impl Script {
    /// Waits for the gate and then for the duration of a run of `n_rows` rows.
    fn pass(&self, n_rows: usize, stop: &RunStop) -> Result<(), EngineError> {
        if let Some(gate) = &self.gate {
            // A closed gate lets everything through, so that a test that ends
            // early does not hang the worker's shutdown.
            while gate.recv_timeout(STOP_INTERVAL) == Err(RecvTimeoutError::Timeout) {
                if stop.requested() {
                    return Err(EngineError::Stopped);
                }
            }
        }
        let n_rows = u32::try_from(n_rows).unwrap_or(u32::MAX);
        take_time(self.delay + self.delay_per_row * n_rows, stop)
    }

    /// Fails or panics if one of `tokens` is scripted to do so.
    fn faults<'a>(&self, tokens: impl Iterator<Item = &'a u16>) -> Result<(), EngineError> {
        let tokens: Vec<u16> = tokens.copied().collect();
        let are_there = |token: Option<u16>| token.is_some_and(|token| tokens.contains(&token));
        assert!(
            !are_there(self.panic_on),
            "scripted panic in the fake engine"
        );
        if are_there(self.device_fails_on) {
            return Err(EngineError::Device("scripted device failure".to_owned()));
        }
        if are_there(self.fail_on) {
            return Err(EngineError::Runtime("scripted failure".to_owned()));
        }
        Ok(())
    }
}

/// Settings of a fake engine's generation.
#[derive(Debug, Clone, Copy)]
pub struct FakeSequences {
    pub n_slots: usize,
    pub n_colors: usize,
    /// Time that a step takes.
    pub delay: Duration,
    /// True if the engine can copy slots.
    pub can_copy: bool,
}

/// Scripted engine.
#[derive(Debug)]
pub struct FakeEngine {
    facts: EngineFacts,
    script: Script,
    warm: Vec<WarmRun>,
    /// State of each slot, instead of keys and values: for each token, a hash
    /// of all tokens up to it.
    kept: Vec<Vec<u32>>,
    /// Slots whose memory has numbers that are not finite, until they are
    /// cleared.
    spoiled: Vec<bool>,
    /// Start and end of the last run.
    span: Option<RunSpan>,
}

impl FakeEngine {
    /// Width of features and hidden states.
    pub const DIMENSION: usize = 4;
    /// Number of classes of the classification head.
    pub const CLASSES: usize = 3;

    #[must_use]
    pub fn new(script: Script) -> Self {
        // With a gate the duration of a run is unknown.
        let graphs = Graph::ALL.into_iter().filter(|_| script.gate.is_none());
        let warm = graphs.flat_map(|graph| {
            // Sizes that are never requested do no harm.
            (0..11).map(move |power| (graph, 1_u32 << power))
        });
        let warm = warm
            .map(|(graph, bucket)| WarmRun {
                graph,
                bucket: bucket as usize,
                elapsed: match (graph, script.sequences) {
                    (Graph::Generate, Some(sequences)) => sequences.delay,
                    _ => script.delay + script.delay_per_row * bucket,
                },
            })
            .collect();
        Self {
            warm,
            facts: EngineFacts {
                provider: "fake",
                runtime_version: "none".to_owned(),
                dimension: Self::DIMENSION,
                n_classes: Self::CLASSES,
                sequences: script.sequences.map(|sequences| SequenceFacts {
                    n_slots: sequences.n_slots,
                    slot_bytes: 1 << 10,
                    chunk: 8,
                    chunks_are_powers: false,
                    rows_min: 2,
                    shares_prefixes: true,
                }),
                fallbacks: Vec::new(),
                sizes_untried: false,
            },
            kept: vec![Vec::new(); script.sequences.map_or(0, |sequences| sequences.n_slots)],
            spoiled: vec![false; script.sequences.map_or(0, |sequences| sequences.n_slots)],
            script,
            span: None,
        }
    }

    /// Returns the answer for `tokens`: numbers that differ if any token
    /// differs in value or position.
    #[must_use]
    pub fn answer(tokens: &[u16], want: Want) -> Vec<f32> {
        let n_values = match want {
            Want::Features { layers, .. } => Self::DIMENSION * layers.len(),
            Want::Mean | Want::Last => Self::DIMENSION,
            Want::States => Self::DIMENSION * tokens.len(),
            Want::Nll => tokens.len(),
            Want::Logits => Self::CLASSES,
        };
        let hash = tokens.iter().fold(SEED, |hash, &token| mix(hash, token));
        (0..n_values)
            .map(|idx| {
                let mixed = hash.rotate_left(u32::try_from(idx % 32).unwrap_or(0));
                // 16 bits convert to f32 exactly.
                f32::from(u16::try_from(mixed & 0xffff).unwrap_or(0)) / 65536.0
            })
            .collect()
    }
}

impl FakeEngine {
    /// Returns the logits after tokens with this hash: small, different
    /// numbers.
    fn next_logits(hash: u32, n_colors: usize) -> impl Iterator<Item = f32> {
        (0..n_colors).map(move |color| {
            let mixed = mix(hash, u16::try_from(color).unwrap_or(u16::MAX));
            f32::from(u16::try_from(mixed.wrapping_mul(2_654_435_761) >> 16).unwrap_or(0)) / 16384.0
        })
    }

    /// Returns `primer` continued with the most likely tokens, up to `n_tokens`
    /// tokens in all.
    #[must_use]
    pub fn greedy(start: u16, primer: &[u16], n_colors: usize, n_tokens: usize) -> Vec<u16> {
        let mut tokens = primer.to_vec();
        let mut hash = primer
            .iter()
            .fold(mix(SEED, start), |hash, &token| mix(hash, token));
        while tokens.len() < n_tokens {
            let logits: Vec<f32> = Self::next_logits(hash, n_colors).collect();
            let mut best = 0;
            for (color, logit) in logits.iter().enumerate() {
                if *logit > logits[best] {
                    best = color;
                }
            }
            let token = u16::try_from(best).unwrap_or(u16::MAX);
            tokens.push(token);
            hash = mix(hash, token);
        }
        tokens
    }
}

/// Initial value of a hash of tokens.
const SEED: u32 = 17;

fn mix(hash: u32, token: u16) -> u32 {
    hash.wrapping_mul(31).wrapping_add(u32::from(token))
}

impl Engine for FakeEngine {
    fn facts(&self) -> &EngineFacts {
        &self.facts
    }

    fn warm(&self) -> &[WarmRun] {
        &self.warm
    }

    fn run(&mut self, run: &GraphRun<'_>, stop: &RunStop) -> Result<Vec<Vec<f32>>, EngineError> {
        let (outcome, span) = RunSpan::of(|| self.script.pass(run.bucket, stop));
        self.span = Some(span);
        outcome?;
        if self.script.memory_for.is_some_and(|max| run.bucket > max) {
            return Err(EngineError::OutOfMemory("scripted".to_owned()));
        }
        self.script
            .faults(run.rows.iter().filter_map(|row| row.tokens.first()))?;
        Ok(run
            .rows
            .iter()
            .map(|row| Self::answer(row.tokens, row.want))
            .collect())
    }

    fn feed(&mut self, feed: &SlotFeed<'_>, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        let sequences = self
            .script
            .sequences
            .ok_or_else(|| EngineError::Runtime("no sequences were scripted".to_owned()))?;
        let (outcome, span) = RunSpan::of(|| {
            if let Some(gate) = &self.script.gate {
                let _ = gate.recv();
            }
            take_time(sequences.delay, &RunStop::default())
        });
        self.span = Some(span);
        outcome?;
        self.script
            .faults(feed.rows.iter().filter_map(|row| row.tokens.last()))?;
        let prefixes = feed.prefixes.iter().enumerate();
        for (row, prefix) in prefixes.filter(|(_, prefix)| prefix.len > 0) {
            let of = |row: usize| self.kept[feed.first_slot + row].get(..prefix.len);
            assert!(
                of(row).is_some() && of(row) == of(prefix.of),
                "row {row} has what it shares"
            );
        }
        logits.clear();
        let slots = self.kept[feed.first_slot..].iter_mut();
        let slots = slots.zip(&mut self.spoiled[feed.first_slot..]);
        for (row, (kept, spoiled)) in feed.rows.iter().zip(slots) {
            kept.truncate(row.past);
            assert_eq!(kept.len(), row.past, "a slot keeps what it was fed");
            for &token in row.tokens {
                let hash = kept.last().copied().unwrap_or(SEED);
                kept.push(mix(hash, token));
            }
            *spoiled |= row
                .tokens
                .iter()
                .any(|&token| Some(token) == self.script.nan_on);
            if *spoiled {
                logits.extend(std::iter::repeat_n(f32::NAN, sequences.n_colors));
                continue;
            }
            let hash = kept.last().copied().unwrap_or(SEED);
            logits.extend(Self::next_logits(hash, sequences.n_colors));
        }
        Ok(())
    }

    fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool {
        let can = self
            .script
            .sequences
            .is_some_and(|sequences| sequences.can_copy);
        if can {
            self.kept[to] = self.kept[from][..n].to_vec();
        }
        can
    }

    fn fill_slot(&mut self, slot: usize, number: f32) -> Result<(), EngineError> {
        self.spoiled[slot] = !number.is_finite();
        Ok(())
    }

    fn canary(&mut self) -> Result<CanaryOutcome, EngineError> {
        match &mut self.script.canaries_until_failure {
            Some(0) => Err(EngineError::NotFinite),
            Some(left) => {
                *left -= 1;
                Ok(CanaryOutcome::Answered)
            }
            None => Ok(CanaryOutcome::Answered),
        }
    }

    fn last_span(&self) -> Option<RunSpan> {
        self.span
    }
}

/// Waits for the duration of a run, or until the run is stopped. Sleeping is
/// exact to about a tenth of a millisecond only, so shorter times are spent
/// spinning.
fn take_time(time: Duration, stop: &RunStop) -> Result<(), EngineError> {
    let until = Instant::now() + time;
    loop {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(());
        }
        if stop.requested() {
            return Err(EngineError::Stopped);
        }
        // The rest of the time is spent spinning, so that it does not end late.
        let sleep = left.min(STOP_INTERVAL).saturating_sub(STOP_INTERVAL / 4);
        if sleep > STOP_INTERVAL / 4 {
            std::thread::sleep(sleep);
        } else {
            std::hint::spin_loop();
        }
    }
}
