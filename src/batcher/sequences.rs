//! Images to generate that wait for a slot at the engine, and how many are
//! there.
//!
//! Interactive ones go first, by deadline and arrival as rows do. Bulk leaves a
//! part of the slots alone: an image keeps its slot for a thousand steps, which
//! nobody who waits should have to wait for.

use std::time::Instant;

use super::queue::{Entry, Queue};
use super::scheduler::Steps;
use crate::engine::{Graph, Sequences};
use crate::error::{Error, Stage};
use crate::generation::Sequence;
use crate::job::Class;

/// See the module.
#[derive(Debug)]
pub(super) struct Waiting {
    queue: Queue<Sequence>,
    at_engine: Sequences,
    reserve_percent: u8,
    /// When the last step was decided on.
    stepped_at: Option<Instant>,
}

impl Waiting {
    pub(super) fn new(reserve_percent: u8) -> Self {
        Self {
            queue: Queue::default(),
            at_engine: Sequences::default(),
            reserve_percent,
            stepped_at: None,
        }
    }

    pub(super) fn push(&mut self, sequence: Sequence, now: Instant) {
        let (class, deadline) = (sequence.ticket.class, sequence.ticket.deadline);
        let entry = Entry {
            arrived: now,
            deadline,
            item: sequence,
        };
        self.queue.push(class, Graph::Generate, entry);
    }

    /// The engine has told whom it has.
    pub(super) fn at_engine(&mut self, sequences: Sequences) {
        self.at_engine = sequences;
    }

    /// How many of a class wait.
    pub(super) fn len_of(&self, class: Class) -> usize {
        self.queue.len_of(class)
    }

    /// How many of a class may join.
    fn room(&self, class: Class) -> usize {
        let Sequences {
            n_free,
            interactive,
            bulk,
        } = self.at_engine;
        match class {
            Class::Interactive => n_free,
            Class::Bulk => {
                let n_slots = n_free + interactive + bulk;
                // All but the reserve, but one at least.
                let reserved = n_slots * usize::from(self.reserve_percent) / 100;
                let most = (n_slots - reserved).max(1);
                most.saturating_sub(bulk).min(n_free)
            }
        }
    }

    /// What a step would be for, if there is anybody.
    pub(super) fn steps(&self) -> Option<Steps> {
        let lanes = self.queue.lanes();
        let oldest = |class| {
            let mut lanes = lanes.iter();
            let lane = lanes.find(|lane| lane.class == class)?;
            (self.room(class) > 0).then_some(lane.oldest)
        };
        let interactive = self.at_engine.interactive > 0 || oldest(Class::Interactive).is_some();
        let bulk = self.at_engine.bulk > 0 || oldest(Class::Bulk).is_some();
        let class = match (interactive, bulk) {
            (true, _) => Class::Interactive,
            (false, true) => Class::Bulk,
            (false, false) => return None,
        };
        // Whoever is at the engine waits since the last step.
        let at_engine = self.at_engine.interactive + self.at_engine.bulk > 0;
        let stepped = self.stepped_at.filter(|_| at_engine);
        Some(Steps {
            class,
            bulk,
            since: stepped.or(oldest(class))?,
        })
    }

    /// Takes out those who join the next step.
    pub(super) fn join(&mut self, now: Instant) -> Vec<Sequence> {
        self.stepped_at = Some(now);
        let mut joining = Vec::new();
        for class in Class::ALL {
            while self.room(class) > 0
                && let Some(entry) = self.queue.pop(class, Graph::Generate)
            {
                self.at_engine.n_free -= 1;
                match class {
                    Class::Interactive => self.at_engine.interactive += 1,
                    Class::Bulk => self.at_engine.bulk += 1,
                }
                joining.push(entry.item);
            }
        }
        joining
    }

    pub(super) fn next_deadline(&self) -> Option<Instant> {
        self.queue.next_deadline()
    }

    /// Answers those whose time is up.
    pub(super) fn expire(&mut self, now: Instant, mut dropped: impl FnMut(&Error)) {
        for place in self.queue.expired(now) {
            if let Some(entry) = self.queue.remove(&place) {
                let error = Error::DeadlineExceeded {
                    stage: Stage::Queue,
                };
                dropped(&error);
                entry.item.finish(Err(error));
            }
        }
    }

    /// Gives up those whose callers have gone.
    pub(super) fn sweep(&mut self, now: Instant, mut dropped: impl FnMut(&Error)) {
        for place in self.queue.places() {
            let dead = self
                .queue
                .get(&place)
                .and_then(|entry| entry.item.ticket.dead(now, Stage::Queue));
            if let Some(error) = dead
                && let Some(entry) = self.queue.remove(&place)
            {
                dropped(&error);
                entry.item.finish(Err(error));
            }
        }
    }

    /// Gives everybody the same bad news.
    pub(super) fn refuse(&mut self, error: &Error) {
        for place in self.queue.places() {
            if let Some(entry) = self.queue.remove(&place) {
                entry.item.finish(Err(error.clone()));
            }
        }
    }
}
