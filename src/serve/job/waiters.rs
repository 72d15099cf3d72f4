//! All callers that wait for the same answer (coalescing).
//!
//! Identical work runs once: its callers gather in one value, which the batcher
//! and the engine share. The batcher lets callers join and leave while the work
//! waits or runs; the engine closes the value and answers the callers in it.
//! The lock is held for a few pointer moves, never while anything runs.

use std::time::Instant;

use super::Ticket;
use crate::serve::error::{RequestStage, StageError};
use crate::sync::{Mutex, MutexGuard, PoisonError};

/// Callers that wait for the same answer.
#[derive(Debug)]
pub(crate) struct CoalescedWaiters(Mutex<State>);

#[derive(Debug)]
enum State {
    Open(Vec<Ticket>),
    /// The answer is on its way; a caller that comes now comes too late.
    Closed,
}

/// Number of callers that are left, with the most urgent class and the earliest
/// deadline among them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct WaitersLeft {
    pub n_tickets: usize,
    pub class: Option<crate::proto::Priority>,
    pub deadline: Option<Instant>,
}

impl CoalescedWaiters {
    #[must_use]
    pub(crate) fn new(first: Ticket) -> Self {
        Self(Mutex::new(State::Open(vec![first])))
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds a caller, unless the answer is already on its way.
    ///
    /// # Errors
    ///
    /// Returns the ticket if the answer is on its way.
    #[expect(
        clippy::result_large_err,
        reason = "the ticket must go on to other work"
    )]
    pub(crate) fn join(&self, ticket: Ticket) -> Result<(), Ticket> {
        match &mut *self.lock() {
            State::Open(tickets) => {
                tickets.push(ticket);
                Ok(())
            }
            State::Closed => Err(ticket),
        }
    }

    /// Passes each caller's ticket to `note`.
    pub(crate) fn each(&self, note: impl FnMut(&mut Ticket)) {
        if let State::Open(tickets) = &mut *self.lock() {
            tickets.iter_mut().for_each(note);
        }
    }

    /// Answers the callers that have disconnected or are past their deadline,
    /// and passes each error to `dropped`.
    pub(crate) fn sweep(
        &self,
        now: Instant,
        stage: RequestStage,
        dropped: impl FnMut(&StageError),
    ) -> WaitersLeft {
        self.drop_if(|ticket| ticket.dead(now, stage), dropped)
    }

    /// Answers the callers whose own deadline is not after `limit` and for whom
    /// the work therefore comes too late; the work may be in time for the
    /// others.
    pub(crate) fn late(
        &self,
        limit: Instant,
        error: &StageError,
        dropped: impl FnMut(&StageError),
    ) -> WaitersLeft {
        let late = |ticket: &Ticket| {
            let late = ticket.deadline.is_some_and(|deadline| deadline <= limit);
            late.then(|| error.clone())
        };
        self.drop_if(late, dropped)
    }

    fn drop_if(
        &self,
        reason: impl Fn(&Ticket) -> Option<StageError>,
        mut dropped: impl FnMut(&StageError),
    ) -> WaitersLeft {
        let mut dead = Vec::new();
        let left = match &mut *self.lock() {
            State::Closed => WaitersLeft {
                n_tickets: 0,
                class: None,
                deadline: None,
            },
            State::Open(tickets) => {
                let mut idx = 0;
                while let Some(ticket) = tickets.get(idx) {
                    match reason(ticket) {
                        Some(error) => dead.push((tickets.swap_remove(idx), error)),
                        None => idx += 1,
                    }
                }
                WaitersLeft {
                    n_tickets: tickets.len(),
                    class: tickets.iter().map(|ticket| ticket.class).min(),
                    deadline: tickets.iter().filter_map(|ticket| ticket.deadline).min(),
                }
            }
        };
        // Callers are woken after the lock has been released.
        for (ticket, error) in dead {
            dropped(&error);
            ticket.finish(Err(error));
        }
        left
    }

    /// Closes the value to new callers and returns those in it, which the
    /// calling code must answer. Only the first call returns any.
    #[must_use]
    pub(crate) fn close(&self) -> Vec<Ticket> {
        match std::mem::replace(&mut *self.lock(), State::Closed) {
            State::Open(tickets) => tickets,
            State::Closed => Vec::new(),
        }
    }

    /// Closes the value and answers all its callers with this error.
    pub(crate) fn refuse(&self, error: &StageError) {
        for ticket in self.close() {
            ticket.finish(Err(error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::proto::Priority;
    use crate::serve::fair::CallerId;
    use crate::serve::job::{Answer, Reply};

    type Outcome = tokio::sync::oneshot::Receiver<Result<Answer, StageError>>;

    fn ticket(class: Priority, deadline: Option<Instant>) -> (Ticket, Outcome) {
        let (reply, outcome) = Reply::new();
        let ticket = Ticket {
            caller: CallerId::UNNAMED,
            class,
            deadline,
            entered_at: Instant::now(),
            span: tracing::Span::none(),
            timeline: crate::serve::timeline::ImageTimeline::none(),
            reply,
            permit: crate::serve::job::Permit::none(),
        };
        (ticket, outcome)
    }

    #[test]
    fn callers_leave_and_the_rest_are_answered_once() {
        let now = Instant::now();
        let soon = now + Duration::from_secs(1);
        let (first, first_outcome) = ticket(Priority::Bulk, None);
        let (second, mut second_outcome) = ticket(Priority::Interactive, Some(soon));
        let (third, mut third_outcome) = ticket(Priority::Bulk, Some(now));
        let waiters = CoalescedWaiters::new(first);
        waiters.join(second).expect("open");
        waiters.join(third).expect("open");
        drop(first_outcome);
        let mut reasons = Vec::new();
        let left = waiters.sweep(now, RequestStage::Queue, |error| {
            reasons.push(error.to_string());
        });
        assert_eq!(
            left,
            WaitersLeft {
                n_tickets: 1,
                class: Some(Priority::Interactive),
                deadline: Some(soon)
            }
        );
        assert_eq!(reasons.len(), 2);
        assert!(matches!(
            third_outcome.try_recv(),
            Ok(Err(StageError::DeadlineExceeded { .. }))
        ));
        for ticket in waiters.close() {
            ticket.finish(Ok(Answer::Values(vec![1.0])));
        }
        assert!(matches!(second_outcome.try_recv(), Ok(Ok(_))));
        let (late, _outcome) = ticket(Priority::Bulk, None);
        assert!(waiters.join(late).is_err(), "closed");
        assert!(waiters.close().is_empty());
        assert_eq!(waiters.sweep(now, RequestStage::Queue, |_| {}).n_tickets, 0);
    }
}
