//! Answers that are there and not yet given.
//!
//! While something waits for the device they are given by the batcher's thread,
//! which has nothing to do while the device runs.

use std::sync::Arc;
use std::time::Instant;

use super::{EngineError, Unit};
use crate::cache::{Cache, Key};
use crate::error::{Error, Stage};
use crate::job::{Answer, Ticket};

/// A row's numbers and everybody who waits for them.
#[derive(Debug)]
pub(crate) struct Owed {
    pub(super) unit: Unit,
    pub(super) values: Vec<f32>,
}

impl Owed {
    /// Gives everybody the answer.
    pub(crate) fn pay(self, cache: &Cache) {
        let Self { unit, values } = self;
        let finite = values.iter().all(|value| value.is_finite());
        if finite && cache.is_on() {
            let key = Key::new(unit.want, Arc::clone(&unit.tokens));
            cache.put(key, &values);
        }
        let mut tickets = unit.crowd.close();
        let last = tickets.pop();
        let now = Instant::now();
        let outcome = |ticket: &Ticket, values: Vec<f32>| {
            if ticket.deadline.is_some_and(|deadline| deadline <= now) {
                Err(Error::DeadlineExceeded {
                    stage: Stage::Engine,
                })
            } else if finite {
                Ok(Answer::of(unit.want, &unit.tokens, values))
            } else {
                Err(EngineError::NotFinite.into())
            }
        };
        for ticket in tickets {
            let outcome = outcome(&ticket, values.clone());
            ticket.finish(outcome);
        }
        if let Some(ticket) = last {
            let outcome = outcome(&ticket, values);
            ticket.finish(outcome);
        }
    }
}
