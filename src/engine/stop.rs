//! Stops a run after all of its callers have cancelled or disconnected.
//!
//! The engine thread is inside the runtime during a run, so the batcher
//! requests the stop, by the number of the run. Numbers rise from run to run: a
//! request that comes too late has an old number and does nothing, so it can
//! never stop the next run; a request that comes before its run is kept until
//! the run begins.

use crate::sync::{Mutex, MutexGuard, PoisonError};

/// Function that tells the runtime to stop; cheap, and harmless after the run.
pub type StopHook = Box<dyn Fn() + Send>;

/// Stop requests for the runs of one engine.
#[derive(Default)]
pub struct RunStop(Mutex<State>);

#[derive(Default)]
struct State {
    /// Number of the run in progress; 0 between runs.
    run: u64,
    /// Number of the last run that has begun.
    last: u64,
    /// Number of a later run that is to be stopped as soon as it begins.
    ahead: u64,
    requested: bool,
    hook: Option<StopHook>,
}

impl std::fmt::Debug for RunStop {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("RunStop")
    }
}

impl RunStop {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins a run; called by the engine.
    pub fn begin(&self, run: u64) {
        let mut state = self.lock();
        *state = State {
            run,
            last: run,
            ahead: state.ahead,
            requested: state.ahead == run,
            hook: None,
        };
    }

    /// Ends the run; returns true if a stop was requested.
    pub fn end(&self) -> bool {
        let mut state = self.lock();
        state.run = 0;
        state.hook = None;
        std::mem::take(&mut state.requested)
    }

    /// Sets the hook that stops the run in progress; the hook is called at once
    /// if a stop was requested before.
    pub fn arm(&self, hook: StopHook) {
        let mut state = self.lock();
        if state.requested {
            hook();
        }
        state.hook = Some(hook);
    }

    /// Stops the run with the number `run`, unless it has ended. Returns false
    /// if the run has ended or was told to stop before.
    pub fn request(&self, run: u64) -> bool {
        let mut state = self.lock();
        if run > state.last {
            state.ahead = run;
            return true;
        }
        if run == 0 || state.run != run || state.requested {
            return false;
        }
        state.requested = true;
        if let Some(hook) = &state.hook {
            hook();
        }
        true
    }

    /// Returns true if the run in progress should stop.
    #[must_use]
    pub fn requested(&self) -> bool {
        self.lock().requested
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    fn counting() -> (Arc<AtomicUsize>, StopHook) {
        let count = Arc::new(AtomicUsize::new(0));
        let hook = {
            let count = Arc::clone(&count);
            Box::new(move || {
                count.fetch_add(1, Ordering::Relaxed);
            })
        };
        (count, hook)
    }

    #[test]
    fn only_the_run_that_was_meant_is_stopped() {
        let stop = RunStop::default();
        assert!(!stop.request(0), "nothing runs");
        stop.begin(1);
        let (count, hook) = counting();
        stop.arm(hook);
        assert!(!stop.requested());
        assert!(stop.request(1));
        assert!(!stop.request(1), "once is enough");
        assert_eq!(count.load(Ordering::Relaxed), 1);
        assert!(stop.end());
        stop.begin(2);
        assert!(!stop.request(1), "too late");
        assert!(!stop.end());
    }

    #[test]
    fn a_request_before_its_run_is_kept_for_it() {
        let stop = RunStop::default();
        stop.begin(1);
        assert!(stop.request(2), "it is yet to begin");
        assert!(!stop.requested());
        assert!(!stop.end());
        stop.begin(2);
        assert!(stop.requested());
        let (count, hook) = counting();
        stop.arm(hook);
        assert_eq!(count.load(Ordering::Relaxed), 1);
        assert!(stop.end());
        stop.begin(3);
        assert!(!stop.end());
    }

    #[test]
    fn a_request_before_the_hook_is_not_lost() {
        let stop = RunStop::default();
        stop.begin(7);
        assert!(stop.request(7));
        let (count, hook) = counting();
        stop.arm(hook);
        assert_eq!(count.load(Ordering::Relaxed), 1);
    }
}
