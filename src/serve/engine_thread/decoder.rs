//! Sequences in progress, on the engine's thread (continuous batching).
//!
//! A sequence lives in a slot, where the engine keeps the keys and values of
//! its past. A step feeds one token of each sequence and draws the next.
//! Sequences that are done or whose caller has disconnected leave before the
//! next step, and new sequences join it. A sequence's primer is fed first, in
//! chunks, one chunk per step, so that the other sequences are not held up. The
//! primer's last token is fed in a step of all sequences, so that every color
//! is drawn from the same computation, however the sequence came by its past.
//! Where a slot's memory can be copied, on a CPU, samples of one primer compute
//! it once, and a step reads it once for several of them.

use std::ops::Range;
use std::panic::AssertUnwindSafe;
use std::time::Instant;

use crate::engine::{Engine, SequenceFacts, SlotFeed, SlotFeedRow};
use crate::kernels::attention::SharedPrefix;
use crate::model::buckets::Buckets;
use crate::proto::Priority;
use crate::runtime::error::EngineError;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::handoff::SequenceCounts;
use crate::serve::metrics::{EngineFault, Metrics};
use crate::serve::sequence::{Sequence, all_finite};
use crate::telemetry::panic_text;

mod prefixes;

/// Slots of one engine, with the sequences in them.
pub(super) struct Decoder {
    slots: Vec<Option<Sequence>>,
    sizes: Buckets,
    facts: Option<SequenceFacts>,
    shares_prefixes: bool,
    /// True until the engine reports that it cannot copy a slot.
    can_copy: bool,
    /// Logits of the last run.
    logits: Vec<f32>,
    slot_bytes: usize,
    /// Number of sequences that the metric shows at present.
    n_shown: usize,
    metrics: Metrics,
}

/// Result of a step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) struct DecoderStep {
    /// Size of the run in rows; 0 if the step only fed primers.
    pub(super) size: usize,
    /// Images that the step has made, counted in fractions of an image.
    pub(super) images: f64,
}

/// Returns a sequence that has its slot from now on.
fn begun(mut sequence: Sequence) -> Sequence {
    sequence.ticket.timeline.generation_began(Instant::now());
    sequence
}

impl Decoder {
    pub(super) fn new(facts: Option<SequenceFacts>, metrics: Metrics) -> Self {
        let n_slots = facts.map_or(0, |facts| facts.n_slots);
        if let Some(facts) = facts {
            metrics.slots_added(facts.n_slots, facts.slot_bytes);
        }
        Self {
            slots: (0..n_slots).map(|_| None).collect(),
            sizes: facts.map_or_else(|| Buckets::powers_of_two(1), |facts| facts.sizes()),
            facts,
            shares_prefixes: facts.is_some_and(|facts| facts.shares_prefixes),
            can_copy: true,
            logits: Vec::new(),
            slot_bytes: facts.map_or(0, |facts| facts.slot_bytes),
            n_shown: 0,
            metrics,
        }
    }

    /// Returns the number of sequences by class, and of free slots.
    pub(super) fn sequences(&self) -> SequenceCounts {
        let of = |class| {
            let there = self.slots.iter().flatten();
            there
                .filter(|sequence| sequence.ticket.class == class)
                .count()
        };
        let (interactive, bulk) = (of(Priority::Interactive), of(Priority::Bulk));
        SequenceCounts {
            n_free: self.slots.len() - interactive - bulk,
            interactive,
            bulk,
        }
    }

    /// Takes new sequences into free slots; the batcher sends no more than
    /// there are.
    pub(super) fn join(&mut self, sequences: Vec<Sequence>) {
        let mut free = self.slots.iter_mut().filter(|slot| slot.is_none());
        for sequence in sequences {
            match free.next() {
                Some(slot) => *slot = Some(begun(sequence)),
                None => sequence.finish(Err(StageError::Lost)),
            }
        }
    }

    /// Answers the callers that have disconnected or are past their deadline,
    /// and frees their slots.
    pub(super) fn sweep(&mut self, now: Instant) {
        for slot in &mut self.slots {
            let dead = slot
                .as_ref()
                .and_then(|sequence| sequence.ticket.dead(now, RequestStage::Engine));
            if let Some(error) = dead
                && let Some(sequence) = slot.take()
            {
                self.metrics.dead(&error);
                sequence.finish(Err(error));
            }
        }
        self.show();
    }

    fn show(&mut self) {
        let there = self.slots.iter().flatten().count();
        self.metrics.sequences(self.n_shown, there);
        self.n_shown = there;
    }

    /// Answers all callers with this error.
    pub(super) fn refuse(&mut self, error: &StageError) {
        for sequence in self.slots.iter_mut().filter_map(Option::take) {
            sequence.finish(Err(error.clone()));
        }
        self.show();
    }

    /// Makes one step of all sequences.
    ///
    /// # Errors
    ///
    /// Returns the errors that end the engine; every other failure is answered
    /// to the sequence that it belongs to.
    pub(super) fn step(&mut self, engine: &mut dyn Engine) -> Result<DecoderStep, EngineError> {
        self.sweep(Instant::now());
        self.gather(engine);
        self.share_primers(engine);
        self.feed_primer(engine)?;
        // Once more, before a sequence with the same primer may be done and
        // leave.
        self.share_primers(engine);
        let ready: Vec<usize> = self
            .occupied()
            .filter(|(_, sequence)| sequence.n_to_feed() == 1)
            .map(|(idx, _)| idx)
            .collect();
        let Some(&last) = ready.last() else {
            return Ok(DecoderStep {
                size: 0,
                images: 0.0,
            });
        };
        let size = self.sizes.at_least(last + 1);
        let mut images = 0.0;
        let rows = self.rows(size);
        let shared = if self.shares_prefixes {
            prefixes::prefixes(&self.slots[..size])
        } else {
            Vec::new()
        };
        match self.feed(engine, 0, &rows, &shared) {
            Ok(()) => {
                let n_colors = self.logits.len() / size;
                for &slot in &ready {
                    let logits = slot * n_colors..(slot + 1) * n_colors;
                    images += self.advance(engine, slot, logits)?;
                }
            }
            Err(error) if ends_engine(&error) => return Err(self.fatal(error)),
            Err(error) => {
                self.metrics.fault(fault(&error));
                tracing::error!(
                    n_sequences = ready.len(),
                    %error,
                    "a step failed; each sequence is run alone"
                );
                for &slot in &ready {
                    images += self.step_alone(engine, slot)?;
                }
            }
        }
        self.metrics.generated(ready.len());
        Ok(DecoderStep { size, images })
    }

    fn occupied(&self) -> impl Iterator<Item = (usize, &Sequence)> {
        let slots = self.slots.iter().enumerate();
        slots.filter_map(|(idx, slot)| Some((idx, slot.as_ref()?)))
    }

    /// Returns one token for each of the first `size` slots. A slot whose
    /// sequence is not ready is run as well: the keys and values that this
    /// leaves lie after those that the sequence keeps, and are overwritten
    /// before they are ever read.
    fn rows(&self, size: usize) -> Vec<(u16, usize)> {
        let row = |slot: &Option<Sequence>| match slot {
            Some(sequence) => (
                sequence.to_feed(1).next().unwrap_or_default(),
                sequence.n_fed(),
            ),
            None => (0, 0),
        };
        self.slots.iter().take(size).map(row).collect()
    }

    /// Feeds one token to each slot from `first_slot` on.
    fn feed(
        &mut self,
        engine: &mut dyn Engine,
        first_slot: usize,
        rows: &[(u16, usize)],
        prefixes: &[SharedPrefix],
    ) -> Result<(), EngineError> {
        let rows: Vec<SlotFeedRow<'_>> = rows
            .iter()
            .map(|(token, past)| SlotFeedRow {
                tokens: std::slice::from_ref(token),
                past: *past,
            })
            .collect();
        let feed = SlotFeed {
            first_slot,
            rows: &rows,
            prefixes,
        };
        contained(engine, &feed, &mut self.logits)
    }

    /// Moves sequences to lower slots if that makes a step smaller.
    fn gather(&mut self, engine: &mut dyn Engine) {
        while self.can_copy {
            let Some(last) = self.slots.iter().rposition(Option::is_some) else {
                return;
            };
            let n_sequences = self.slots.iter().flatten().count();
            let Some(hole) = self.slots.iter().position(Option::is_none) else {
                return;
            };
            if self.sizes.at_least(n_sequences) >= self.sizes.at_least(last + 1) {
                return;
            }
            let n_fed = self.slots[last].as_ref().map_or(0, Sequence::n_fed);
            self.can_copy = n_fed == 0 || engine.copy_slot(last, hole, n_fed);
            if self.can_copy {
                self.slots.swap(last, hole);
            }
        }
    }

    /// Copies the keys and values of a primer to new sequences from a sequence
    /// that has begun with the same tokens.
    fn share_primers(&mut self, engine: &mut dyn Engine) {
        if !self.can_copy {
            return;
        }
        for to in 0..self.slots.len() {
            let Some(newcomer) = self.slots[to].as_ref() else {
                continue;
            };
            let n = newcomer.n_to_feed() - 1;
            if newcomer.n_fed() > 0 || n == 0 {
                continue;
            }
            let donor = self
                .occupied()
                .find(|(from, donor)| {
                    *from != to && donor.n_fed() >= n && donor.shares(newcomer, n)
                })
                .map(|(from, _)| from);
            if let Some(from) = donor {
                self.can_copy = engine.copy_slot(from, to, n);
                if !self.can_copy {
                    return;
                }
                if let Some(newcomer) = &mut self.slots[to] {
                    newcomer.fed(n);
                }
            }
        }
    }

    /// Feeds a chunk of one primer, without its last token, if a primer is left
    /// to feed.
    fn feed_primer(&mut self, engine: &mut dyn Engine) -> Result<(), EngineError> {
        let begun = |sequence: &Sequence| std::cmp::Reverse(sequence.n_fed());
        let Some((slot, sequence)) = self
            .occupied()
            .filter(|(_, sequence)| sequence.n_to_feed() > 1)
            // One primer after the other: others may begin with the same
            // tokens.
            .min_by_key(|(_, sequence)| begun(sequence))
        else {
            return Ok(());
        };
        let n_left = sequence.n_to_feed() - 1;
        let n = self.facts.map_or(1, |facts| facts.piece(n_left));
        let tokens: Vec<u16> = sequence.to_feed(n).collect();
        let row = SlotFeedRow {
            tokens: &tokens,
            past: sequence.n_fed(),
        };
        let feed = SlotFeed {
            first_slot: slot,
            rows: &[row],
            prefixes: &[],
        };
        match contained(engine, &feed, &mut self.logits) {
            Ok(()) => {
                self.metrics.prefilled(n);
                if !all_finite(&self.logits) {
                    return self.spoiled(engine, slot);
                }
                if let Some(sequence) = &mut self.slots[slot] {
                    sequence.fed(n);
                }
                Ok(())
            }
            Err(error) if ends_engine(&error) => Err(self.fatal(error)),
            Err(error) => {
                self.fail(slot, error);
                Ok(())
            }
        }
    }

    /// Makes a step of one sequence, after a step of all has failed, and
    /// returns the fraction of the image that the step has made.
    fn step_alone(&mut self, engine: &mut dyn Engine, slot: usize) -> Result<f64, EngineError> {
        let Some(sequence) = self.slots[slot].as_ref() else {
            return Ok(0.0);
        };
        let row = (
            sequence.to_feed(1).next().unwrap_or_default(),
            sequence.n_fed(),
        );
        match self.feed(engine, slot, &[row], &[]) {
            Ok(()) => self.advance(engine, slot, 0..self.logits.len()),
            Err(error) if ends_engine(&error) => Err(self.fatal(error)),
            Err(error) => {
                self.fail(slot, error);
                Ok(0.0)
            }
        }
    }

    /// Gives a sequence its logits, which are at `logits` of the last run;
    /// answers the sequence and empties its slot when it ends. Returns the
    /// fraction of the image that was made.
    fn advance(
        &mut self,
        engine: &mut dyn Engine,
        slot: usize,
        logits: Range<usize>,
    ) -> Result<f64, EngineError> {
        let Some(sequence) = &mut self.slots[slot] else {
            return Ok(0.0);
        };
        let before = sequence.progress();
        sequence.fed(1);
        if sequence.advance(&self.logits[logits]).is_err() {
            return self.spoiled(engine, slot).map(|()| 0.0);
        }
        if !sequence.is_done() {
            return Ok(sequence.progress() - before);
        }
        if let Some(sequence) = self.slots[slot].take() {
            sequence.finish(Ok(()));
        }
        Ok(1.0 - before)
    }

    /// Answers a sequence whose numbers are not finite, and clears its slot for
    /// the next sequence.
    fn spoiled(&mut self, engine: &mut dyn Engine, slot: usize) -> Result<(), EngineError> {
        if let Some(sequence) = self.slots[slot].take() {
            sequence.finish(Err(EngineError::NotFinite.into()));
        }
        let cleared = std::panic::catch_unwind(AssertUnwindSafe(|| engine.fill_slot(slot, 0.0)))
            .unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(&*panic))));
        cleared.map_err(|error| {
            let error = match error {
                EngineError::Panicked(_) | EngineError::Device(_) => error,
                // The slot would spoil every sequence after this one.
                error => EngineError::Device(format!("slot {slot} cannot be cleared: {error}")),
            };
            self.fatal(error)
        })
    }

    /// Answers a sequence with the error of a run that was for it alone.
    fn fail(&mut self, slot: usize, error: EngineError) {
        self.metrics.fault(fault(&error));
        if let Some(sequence) = self.slots[slot].take() {
            let failed = || tracing::error!(%error, "a step of this call failed");
            sequence.ticket.span.in_scope(failed);
            sequence.finish(Err(error.into()));
        }
    }

    fn fatal(&self, error: EngineError) -> EngineError {
        self.metrics.fault(fault(&error));
        error
    }
}

impl Drop for Decoder {
    fn drop(&mut self) {
        self.metrics.sequences(self.n_shown, 0);
        self.metrics
            .slots_removed(self.slots.len(), self.slot_bytes);
    }
}

fn ends_engine(error: &EngineError) -> bool {
    matches!(error, EngineError::Device(_) | EngineError::Panicked(_))
}

fn fault(error: &EngineError) -> EngineFault {
    match error {
        EngineError::Device(_) => EngineFault::Device,
        EngineError::Panicked(_) => EngineFault::Panic,
        EngineError::OutOfMemory(_) => EngineFault::OutOfMemory,
        _ => EngineFault::Run,
    }
}

/// Feeds tokens; a panic becomes an error.
fn contained(
    engine: &mut dyn Engine,
    feed: &SlotFeed<'_>,
    logits: &mut Vec<f32>,
) -> Result<(), EngineError> {
    let rows = feed.rows;
    std::panic::catch_unwind(AssertUnwindSafe(|| engine.feed(feed, logits)))
        .unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(&*panic))))?;
    if logits.is_empty() || !logits.len().is_multiple_of(rows.len()) {
        return Err(EngineError::Output {
            got: format!("{} logits", logits.len()),
            expected: format!("the same number for each of {} rows", rows.len()),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests;
