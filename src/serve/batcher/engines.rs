//! State of the engines as the batcher sees them: the engines that are free,
//! and the batches that the others run.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};

use crate::engine::RunStop;
use crate::serve::cache::AnswerKey;
use crate::serve::devices::DeviceIdx;
use crate::serve::error::StageError;
use crate::serve::handoff::EngineTurn;
use crate::serve::job::CoalescedWaiters;

/// The batcher's end of one engine.
pub(crate) struct EngineLine {
    /// Channel with room for one turn. A turn is sent only after the engine's
    /// slot, so the channel is never full.
    turns: Sender<EngineTurn>,
    stop: Arc<RunStop>,
}

impl EngineLine {
    /// Returns the batcher's end and the engine's end.
    pub(crate) fn new() -> (Self, (Receiver<EngineTurn>, Arc<RunStop>)) {
        let (turns, of_engine) = crossbeam_channel::bounded(1);
        let stop = Arc::new(RunStop::default());
        let line = Self {
            turns,
            stop: Arc::clone(&stop),
        };
        (line, (of_engine, stop))
    }
}

/// A batch at an engine.
pub(super) struct RunningBatch {
    pub(super) id: u64,
    pub(super) units: Vec<(AnswerKey, Arc<CoalescedWaiters>)>,
    pub(super) stopping: bool,
    /// Earliest deadline among the batch's callers.
    pub(super) deadline: Option<Instant>,
}

struct Engine {
    line: EngineLine,
    /// Time since which the engine has been free; `None` while the engine runs
    /// something.
    free_since: Option<Instant>,
    running: Option<RunningBatch>,
}

/// Engines that are still running, by device.
pub(super) struct Engines(BTreeMap<DeviceIdx, Engine>);

impl Engines {
    pub(super) fn new(lines: Vec<EngineLine>) -> Self {
        let engine = |(idx, line)| {
            let engine = Engine {
                line,
                // An engine loads until it says that it is free.
                free_since: None,
                running: None,
            };
            (DeviceIdx(idx), engine)
        };
        Self(lines.into_iter().enumerate().map(engine).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Returns the free engines, the one that has been free longest first.
    pub(super) fn free(&self) -> Vec<DeviceIdx> {
        let free = self.0.iter();
        let mut free: Vec<(Instant, DeviceIdx)> = free
            .filter_map(|(&device, engine)| Some((engine.free_since?, device)))
            .collect();
        free.sort_unstable();
        free.into_iter().map(|(_, device)| device).collect()
    }

    /// True if the engine is waiting for a turn.
    pub(super) fn is_free(&self, device: DeviceIdx) -> bool {
        let engine = self.0.get(&device);
        engine.is_some_and(|engine| engine.free_since.is_some())
    }

    /// Forgets all engines; each sees that its channel has closed.
    pub(super) fn hang_up(&mut self) {
        self.0.clear();
    }

    /// True if no engine runs anything.
    pub(super) fn all_free(&self) -> bool {
        self.0.values().all(|engine| engine.free_since.is_some())
    }

    /// Takes note that an engine is free, and returns the batch that has ended.
    pub(super) fn freed(&mut self, device: DeviceIdx, now: Instant) -> Option<RunningBatch> {
        let engine = self.0.get_mut(&device)?;
        engine.free_since = Some(now);
        engine.running.take()
    }

    /// Gives a free engine its turn. If the engine has failed meanwhile, the
    /// callers in the turn are answered with `NotReady`.
    pub(super) fn give(
        &mut self,
        device: DeviceIdx,
        turn: EngineTurn,
        running: Option<RunningBatch>,
    ) {
        let refused = match self.0.get_mut(&device) {
            Some(engine) => {
                engine.free_since = None;
                engine.running = running;
                engine.line.turns.send(turn).err().map(|error| error.0)
            }
            None => Some(turn),
        };
        if let Some(turn) = refused {
            turn.refuse(&StageError::NotReady);
        }
    }

    /// Forgets an engine that takes no more turns, closes its channel, and
    /// returns the batch that was running.
    pub(super) fn remove(&mut self, device: DeviceIdx) -> Option<RunningBatch> {
        self.0.remove(&device)?.running
    }

    /// Returns the batch that an engine runs.
    pub(super) fn running(&mut self, device: DeviceIdx) -> Option<&mut RunningBatch> {
        self.0.get_mut(&device)?.running.as_mut()
    }

    /// Returns the batches of all engines, each with the handle that stops its
    /// run.
    pub(super) fn all_running(&mut self) -> impl Iterator<Item = (&mut RunningBatch, &RunStop)> {
        let engines = self.0.values_mut();
        engines.filter_map(|engine| Some((engine.running.as_mut()?, &*engine.line.stop)))
    }

    /// Returns the earliest deadline of the batches that are running.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let running = self.0.values().filter_map(|engine| engine.running.as_ref());
        running.filter_map(|running| running.deadline).min()
    }
}
