//! Caller of a call, from its authentication to its end.
//!
//! The outermost layer puts an empty slot into the extensions of a request; the
//! layer that authenticates the call fills it. Whatever counts, logs or admits
//! the call reads it there.

use std::sync::{Arc, OnceLock};
use std::time::Instant;

use tonic::Extensions;

use crate::proto::Priority;
use crate::serve::caller::Caller;
use crate::serve::capacity::CapacityClaim;
use crate::serve::timeline::CallTimeline;

/// Slot for the caller of a call, which is filled once the call is
/// authenticated.
#[derive(Debug, Clone, Default)]
pub(super) struct CallerSlot(Arc<OnceLock<(Caller, Priority)>>);

impl CallerSlot {
    /// Notes who calls, and in which class.
    pub(super) fn fill(&self, caller: Caller, class: Priority) {
        // A call is authenticated once.
        let _ = self.0.set((caller, class));
    }

    /// Returns the caller; none for a call that is not authenticated.
    pub(super) fn caller(&self) -> Option<&Caller> {
        self.0.get().map(|(caller, _)| caller)
    }

    /// Returns the class of the call; none for a call that is not
    /// authenticated.
    pub(super) fn class(&self) -> Option<Priority> {
        self.0.get().map(|(_, class)| *class)
    }

    /// Returns the claim of the call on the worker's capacity, of which it
    /// holds `own` already.
    pub(super) fn claim(&self, class: Priority, own: usize) -> CapacityClaim {
        match self.0.get() {
            Some((caller, class)) => CapacityClaim {
                caller: caller.id(),
                class: *class,
                own,
            },
            None => CapacityClaim {
                own,
                ..class.into()
            },
        }
    }
}

/// Facts about a call that its handler finds in the extensions of the request.
#[derive(Debug, Clone)]
pub(super) struct CallFacts {
    pub(super) caller: CallerSlot,
    /// Class for which the call asks, or that of its method.
    pub(super) class: Priority,
    /// Time by which the call must be answered, if the caller set one.
    pub(super) deadline: Option<Instant>,
    pub(super) timeline: CallTimeline,
}

/// Caller, class, deadline and times of the call that work belongs to.
#[derive(Debug, Clone)]
pub(super) struct CallOrigin {
    pub(super) caller: Caller,
    pub(super) class: Priority,
    pub(super) deadline: Option<Instant>,
    pub(super) timeline: CallTimeline,
}

impl CallOrigin {
    /// Reads the origin of a call from the extensions of its request.
    pub(super) fn of(extensions: &Extensions) -> Self {
        let Some(facts) = extensions.get::<CallFacts>() else {
            // Every call that reaches a handler has them.
            return Self {
                caller: Caller::default(),
                class: Priority::Interactive,
                deadline: None,
                timeline: CallTimeline::new(Instant::now(), None, false),
            };
        };
        Self {
            caller: facts.caller.caller().cloned().unwrap_or_default(),
            class: facts.caller.class().unwrap_or(facts.class),
            deadline: facts.deadline,
            timeline: facts.timeline.clone(),
        }
    }
}
