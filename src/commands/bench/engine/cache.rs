//! Check of whether steps read keys and values after a sequence's end.

use serde::Serialize;

use crate::engine::{Engine, SlotFeed, SlotFeedRow};

/// Tokens that each sequence is fed, one per step.
const N_STEPS: u16 = 16;

/// Logits of steps beside a cache of NaN, compared with those beside zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub(super) struct NanCache {
    /// True if all logits were finite.
    finite: bool,
    /// True if no bit of them differed.
    same_bits: bool,
    /// True if no bit differs between two runs beside zeros.
    repeats: bool,
}

/// Makes the same steps beside zeros, twice, and beside NaN; `None` for a model
/// that generates nothing. The cache is zero afterwards.
///
/// # Errors
///
/// When a step fails, or the cache cannot hold NaN.
pub(super) fn check(engine: &mut dyn Engine) -> anyhow::Result<Option<NanCache>> {
    let Some(sequences) = engine.facts().sequences else {
        return Ok(None);
    };
    let n_slots = sequences.n_slots;
    let mut beside = |number: f32| -> anyhow::Result<Vec<f32>> {
        for slot in 0..n_slots {
            engine.fill_slot(slot, number)?;
        }
        steps(engine, n_slots)
    };
    let zeros = beside(0.0)?;
    let again = beside(0.0)?;
    let nan = beside(f32::NAN)?;
    beside(0.0)?;
    let same = |other: &[f32]| {
        let bits = |logits: &[f32]| -> Vec<u32> { logits.iter().map(|x| x.to_bits()).collect() };
        bits(&zeros) == bits(other)
    };
    Ok(Some(NanCache {
        finite: nan.iter().all(|logit| logit.is_finite()),
        same_bits: same(&nan),
        repeats: same(&again),
    }))
}

/// Returns the logits of all steps.
fn steps(engine: &mut dyn Engine, n_slots: usize) -> anyhow::Result<Vec<f32>> {
    let (mut all, mut logits) = (Vec::new(), Vec::new());
    for step in 0..N_STEPS {
        let token = [step];
        let row = SlotFeedRow {
            tokens: &token,
            past: step.into(),
        };
        let feed = SlotFeed {
            first_slot: 0,
            rows: &vec![row; n_slots],
            prefixes: &[],
        };
        engine.feed(&feed, &mut logits)?;
        all.extend_from_slice(&logits);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::engine::fake::{FakeEngine, FakeSequences, Script};

    #[test]
    fn an_engine_that_reads_beyond_the_end_is_found() {
        // The fake engine's logits are NaN while anything in the slot is.
        let mut engine = FakeEngine::new(Script {
            sequences: Some(FakeSequences {
                n_slots: 3,
                n_colors: 8,
                delay: Duration::ZERO,
                can_copy: false,
            }),
            ..Script::default()
        });
        let found = check(&mut engine).unwrap().unwrap();
        let expected = NanCache {
            finite: false,
            same_bits: false,
            repeats: true,
        };
        assert_eq!(found, expected);
        let mut none = FakeEngine::new(Script::default());
        assert_eq!(check(&mut none).unwrap(), None);
    }
}
