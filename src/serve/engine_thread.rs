//! Thread of one engine: loads the engine, then asks for batches until the
//! batcher closes the channel.
//!
//! The thread asks for a batch when the engine is free (an [`EngineSlot`] for
//! the batcher) and never before, so a batch is formed at the last moment. If
//! work waits, this thread forms the batch itself, because the way to another
//! thread and back would take longer. Nothing here awaits.
//!
//! A batch that fails is split and tried again, so that a row that cannot be
//! computed fails alone. A batch that does not fit into memory lowers the
//! largest size. A device that has failed ends its engine, and the worker if no
//! other engine is left.

mod decoder;
mod gap;
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, RecvTimeoutError, Sender};

use self::decoder::Decoder;
use self::gap::Metered;
use super::devices::{DeviceIdx, DeviceReports};
use super::handoff::{
    Batch, BatchUnit, EngineNotice, EngineSlot, EngineTurn, FinishedRun, PendingReplies,
};
use crate::engine::{BatchRow, CanaryOutcome, Engine, EngineFactory, GraphRun, RunStop};
use crate::model::buckets::Buckets;
use crate::model::graph::Graph;
use crate::runtime::error::EngineError;
use crate::serve::batcher::Batcher;
use crate::serve::cache::AnswerCache;
use crate::serve::error::{RequestStage, StageError};
use crate::serve::job::Ticket;
use crate::serve::metrics::{EngineFault, EngineGap, Metrics};
use crate::serve::sequence::Sequence;
use crate::serve::timeline::ModelRun;
use crate::serve::trace::{BatchContent, Traces};
use crate::telemetry::panic_text;

/// Parts that the thread needs besides the engine.
pub(crate) struct Runner {
    pub(crate) device: DeviceIdx,
    pub(crate) batcher: Batcher,
    pub(crate) notices: Sender<EngineNotice>,
    pub(crate) turns: Receiver<EngineTurn>,
    pub(crate) buckets: Buckets,
    /// Time that the engine may be idle before the canary is run; `None` turns
    /// the canary off.
    pub(crate) canary_interval: Option<Duration>,
    pub(crate) stop: Arc<RunStop>,
    pub(crate) cache: AnswerCache,
    pub(crate) metrics: Metrics,
    pub(crate) traces: Traces,
    pub(crate) gap: EngineGap,
    pub(crate) reports: DeviceReports,
}

/// Runs the engine's thread to its end.
pub(crate) fn run(factory: EngineFactory, runner: Runner) {
    let farewell = Farewell {
        device: runner.device,
        notices: runner.notices.clone(),
        turns: runner.turns.clone(),
    };
    let (device, reports) = (runner.device, runner.reports.clone());
    let loaded = std::panic::catch_unwind(AssertUnwindSafe(factory))
        .unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(&*panic))));
    let engine = match loaded {
        Ok(engine) => engine,
        Err(error) => return reports.failed(device, &error),
    };
    reports.loaded(device, engine.facts());
    let largest = runner.buckets.largest();
    let mut life = Life {
        decoder: Decoder::new(engine.facts().sequences, runner.metrics.clone()),
        engine: Metered::new(engine, runner.gap.clone()),
        runner,
        largest,
        runs: Vec::new(),
        replies: Vec::new(),
        began: Instant::now(),
        has_left: false,
    };
    match life.live() {
        Ok(()) => reports.ended(device),
        Err(error) => {
            reports.failed(device, &error);
            drop(farewell);
            // The effect of freeing memory of a failed device is unknown, and
            // other devices in this process continue to serve.
            std::mem::forget(life.engine);
        }
    }
}

/// Guard that tells the batcher that the engine is gone, however its thread
/// ends.
struct Farewell {
    device: DeviceIdx,
    notices: Sender<EngineNotice>,
    turns: Receiver<EngineTurn>,
}

impl Drop for Farewell {
    fn drop(&mut self) {
        // The channel has room for this notice: see where it is made.
        let _ = self.notices.send(EngineNotice::Gone(self.device));
        // A turn may still arrive until the batcher has read the notice and
        // closes the channel.
        for turn in &self.turns {
            turn.refuse(&StageError::NotReady);
        }
    }
}

/// Loaded engine, with the state of its thread.
struct Life {
    engine: Metered,
    decoder: Decoder,
    runner: Runner,
    /// Largest batch that fits into memory.
    largest: usize,
    /// Runs that have succeeded since the last slot.
    runs: Vec<FinishedRun>,
    /// Answers that are computed and not yet sent.
    replies: Vec<PendingReplies>,
    /// Beginning of the present batch, before any run of it failed.
    began: Instant,
    /// True if a part of the batch was left uncomputed because it was told to
    /// stop. A run that ends before it notices the request was not stopped, nor
    /// was a captured run, which cannot be.
    has_left: bool,
}

impl Life {
    /// Runs turns until the batcher closes the channel or the engine cannot go
    /// on.
    fn live(&mut self) -> Result<(), EngineError> {
        let mut warm = self.engine.warm().to_vec();
        loop {
            let slot = EngineSlot {
                device: self.runner.device,
                warm: std::mem::take(&mut warm),
                sizes_untried: self.engine.facts().sizes_untried,
                runs: std::mem::take(&mut self.runs),
                largest: self.largest,
                sequences: self.decoder.sequences(),
            };
            self.runner.batcher.free(slot, &self.runner.notices);
            let outcome = match self.next() {
                Ok(Some(EngineTurn::Batch(batch))) => self.run(&batch),
                Ok(Some(EngineTurn::Step {
                    joining,
                    possible_since,
                })) => self.step(joining, possible_since),
                Ok(None) => {
                    // No sequence is left here unless the batcher has failed.
                    self.decoder.refuse(&StageError::NotReady);
                    return Ok(());
                }
                Err(error) => Err(error),
            };
            // A caller who has disconnected frees the slot even while no step
            // is made.
            self.decoder.sweep(Instant::now());
            if let Err(error) = outcome {
                tracing::error!(%error, "the engine failed and takes no more work");
                self.decoder.refuse(&last_words(&error));
                return Err(error);
            }
        }
    }

    fn run(&mut self, batch: &Batch) -> Result<(), EngineError> {
        self.engine.turn(batch.possible_since);
        self.began = Instant::now();
        for unit in &batch.units {
            let began = |ticket: &mut Ticket| ticket.timeline.running(self.began);
            unit.waiters.each(began);
        }
        self.runner.stop.begin(batch.id);
        let outcome = self.attempt(batch.graph, batch.bucket, &batch.units);
        self.runner.stop.end();
        if std::mem::take(&mut self.has_left) {
            self.runner.metrics.stopped();
        }
        outcome.inspect_err(|error| {
            // Pieces of the batch that were run before the failure.
            self.deliver();
            // No part of the batch goes to another device: the cause of this
            // failure may be an input that would fail every device in turn.
            for unit in &batch.units {
                unit.waiters.refuse(&last_words(error));
            }
        })
    }

    fn step(&mut self, joining: Vec<Sequence>, possible_since: Instant) -> Result<(), EngineError> {
        self.engine.turn(possible_since);
        self.decoder.join(joining);
        let started = Instant::now();
        let step = self.decoder.step(&mut self.engine)?;
        let elapsed = started.elapsed();
        let graph = Graph::Generate;
        self.runner.metrics.inference(graph, elapsed);
        if step.size > 0 {
            self.runs.push(FinishedRun {
                graph,
                bucket: step.size,
                images: step.images,
                elapsed,
            });
        }
        Ok(())
    }

    /// Returns the next turn. All answers are sent, or handed over to the
    /// batcher's thread, by then.
    fn next(&mut self) -> Result<Option<EngineTurn>, EngineError> {
        if let Ok(turn) = self.runner.turns.try_recv() {
            self.hand_over();
            return Ok(Some(turn));
        }
        self.deliver();
        self.receive()
    }

    /// Waits for a turn, and runs the canary whenever the engine has been idle
    /// for the interval.
    fn receive(&mut self) -> Result<Option<EngineTurn>, EngineError> {
        let Some(interval) = self.runner.canary_interval else {
            return Ok(self.runner.turns.recv().ok());
        };
        loop {
            match self.runner.turns.recv_timeout(interval) {
                Ok(turn) => return Ok(Some(turn)),
                Err(RecvTimeoutError::Disconnected) => return Ok(None),
                Err(RecvTimeoutError::Timeout) => self.canary()?,
            }
        }
    }

    fn canary(&mut self) -> Result<(), EngineError> {
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| self.engine.canary()))
            .unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(&*panic))));
        if matches!(outcome, Ok(CanaryOutcome::Skipped)) {
            return Ok(());
        }
        self.runner.metrics.canary(outcome.is_ok());
        outcome.map(drop).map_err(|error| match error {
            EngineError::Panicked(_) => error,
            // Only the device can be at fault, since this input was computed
            // correctly before.
            error => EngineError::Device(format!("the idle check failed: {error}")),
        })
    }

    /// Runs units of one graph and answers them; splits them if the run fails.
    /// Each recursion halves the units, so its depth is the logarithm of the
    /// size.
    ///
    /// # Errors
    ///
    /// Returns the errors that end the engine; every other failure is answered
    /// here.
    fn attempt(
        &mut self,
        graph: Graph,
        bucket: usize,
        units: &[BatchUnit],
    ) -> Result<(), EngineError> {
        if self.runner.stop.requested() {
            self.leave(units);
            return Ok(());
        }
        let rows: Vec<BatchRow<'_>> = units
            .iter()
            .map(|unit| BatchRow {
                tokens: &unit.tokens,
                want: unit.want,
            })
            .collect();
        let run = GraphRun {
            graph,
            bucket,
            rows: &rows,
        };
        let started = Instant::now();
        let (engine, stop) = (&mut self.engine, &self.runner.stop);
        let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| engine.run(&run, stop)))
            .unwrap_or_else(|panic| Err(EngineError::Panicked(panic_text(&*panic))))
            .and_then(|values| {
                if values.len() == rows.len() {
                    Ok(values)
                } else {
                    Err(EngineError::Output {
                        got: format!("{} rows", values.len()),
                        expected: format!("{}", rows.len()),
                    })
                }
            });
        let elapsed = started.elapsed();
        self.runner.metrics.inference(graph, elapsed);
        match outcome {
            Ok(values) => {
                self.runner.metrics.totals().ran(units.len(), elapsed);
                self.runs.push(FinishedRun {
                    graph,
                    bucket,
                    images: f64::from(u32::try_from(units.len()).unwrap_or(u32::MAX)),
                    elapsed,
                });
                let run = self.model_run(graph, bucket, units.len(), started + elapsed);
                let replies = units.iter().cloned().zip(values);
                let replies = replies.map(|(unit, values)| PendingReplies {
                    unit,
                    values,
                    run: run.clone(),
                });
                self.replies.extend(replies);
                Ok(())
            }
            Err(EngineError::Stopped) => {
                self.leave(units);
                Ok(())
            }
            Err(error @ (EngineError::Device(_) | EngineError::Panicked(_))) => {
                self.runner.metrics.fault(match error {
                    EngineError::Device(_) => EngineFault::Device,
                    _ => EngineFault::Panic,
                });
                Err(error)
            }
            // A run that was told to stop may end with any error.
            Err(_) if self.runner.stop.requested() => {
                self.leave(units);
                Ok(())
            }
            Err(error) => self.again(graph, bucket, units, error),
        }
    }

    /// Returns what the callers of a run are told about it, and begins its span
    /// if there is a collector.
    fn model_run(&self, graph: Graph, bucket: usize, n_images: usize, ended: Instant) -> ModelRun {
        let span = self.runner.traces.batch(BatchContent {
            began: self.began,
            ended,
            graph: graph.label(),
            device: self.runner.device.0,
            n_images,
            bucket,
        });
        ModelRun {
            began: self.began,
            ended,
            n_images,
            span,
        }
    }

    /// Runs the units of a failed run in smaller pieces, until a unit that
    /// cannot be computed is alone.
    fn again(
        &mut self,
        graph: Graph,
        bucket: usize,
        units: &[BatchUnit],
        error: EngineError,
    ) -> Result<(), EngineError> {
        let out_of_memory = matches!(error, EngineError::OutOfMemory(_));
        let smaller = self.runner.buckets.at_most(bucket - 1);
        self.runner.metrics.fault(if out_of_memory {
            EngineFault::OutOfMemory
        } else {
            EngineFault::Run
        });
        tracing::error!(
            graph = graph.label(),
            n_images = units.len(),
            bucket,
            %error,
            "inference failed"
        );
        if out_of_memory && smaller < self.largest && smaller < bucket {
            self.largest = smaller;
            self.runner.metrics.batch_size_lowered(smaller);
            tracing::warn!(
                device = self.runner.device.0,
                largest = smaller,
                "not enough memory for larger batches; lower --max-batch-size to this size"
            );
        }
        match units {
            // The unit may fit at a smaller size.
            [_] if out_of_memory && smaller < bucket => self.attempt(graph, smaller, units),
            [unit] => {
                let tickets = unit.waiters.close();
                let error = StageError::from(error);
                for ticket in tickets {
                    let failed =
                        || tracing::warn!("the model run failed for an image of this call");
                    ticket.span.in_scope(failed);
                    ticket.finish(Err(error.clone()));
                }
                Ok(())
            }
            units => {
                let half = units.len().div_ceil(2).min(self.largest);
                let mut rest = units;
                while !rest.is_empty() {
                    // An earlier piece may have shown that even less fits.
                    let n = half.min(self.largest).min(rest.len());
                    let (piece, after) = rest.split_at(n);
                    let bucket = self.runner.buckets.at_least(n);
                    self.attempt(graph, bucket.min(self.largest), piece)?;
                    rest = after;
                }
                Ok(())
            }
        }
    }

    /// Sends the answers that are computed and not yet sent.
    fn deliver(&mut self) {
        for reply in self.replies.drain(..) {
            reply.deliver(&self.runner.cache);
        }
    }

    /// Hands the answers over to the batcher's thread, which sends them while
    /// the device runs. A single answer is sent here, since that takes no
    /// longer than waking another thread.
    fn hand_over(&mut self) {
        if self.replies.len() > 1 {
            let notice = EngineNotice::Ran(std::mem::take(&mut self.replies));
            if let Err(error) = self.runner.notices.send(notice)
                && let EngineNotice::Ran(replies) = error.0
            {
                self.replies = replies;
            }
        }
        self.deliver();
    }

    /// Answers the remaining callers of a stopped run, for which no caller was
    /// waiting any more.
    fn leave(&mut self, units: &[BatchUnit]) {
        self.has_left = true;
        let stage = RequestStage::Engine;
        for unit in units {
            let dropped = |error: &StageError| self.runner.metrics.dead(error);
            unit.waiters.sweep(Instant::now(), stage, dropped);
            unit.waiters.refuse(&StageError::Cancelled { stage });
        }
    }
}

/// Error for the callers that were being served when the engine ended. After a
/// panic the worker's state is unknown, and the fault is the worker's own;
/// after a failure of the device another worker may do better.
fn last_words(error: &EngineError) -> StageError {
    match error {
        EngineError::Panicked(text) => EngineError::Panicked(text.clone()).into(),
        _ => StageError::NotReady,
    }
}
