//! Stops a run whose every caller has gone.
//!
//! The engine thread is inside the runtime then, so somebody else has to say
//! it: the batcher, which knows the run by its number. A request that comes
//! late finds another number and does nothing, so it can never stop the next
//! run; one that comes before its run is kept for it. Numbers rise.

use crate::sync::{Mutex, MutexGuard, PoisonError};

/// Tells the runtime to stop; cheap, and harmless when it has ended.
pub type StopHook = Box<dyn Fn() + Send>;

/// See the module.
#[derive(Default)]
pub struct RunStop(Mutex<State>);

#[derive(Default)]
struct State {
    /// The run in progress; 0 between runs.
    run: u64,
    /// The last one that has begun.
    last: u64,
    /// One that is yet to begin and is to be stopped.
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

    /// The engine begins a run.
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

    /// The run has ended; returns whether it was to be stopped.
    pub fn end(&self) -> bool {
        let mut state = self.lock();
        state.run = 0;
        state.hook = None;
        std::mem::take(&mut state.requested)
    }

    /// The engine says how the run in progress is stopped; called at once if
    /// that was asked for already.
    pub fn arm(&self, hook: StopHook) {
        let mut state = self.lock();
        if state.requested {
            hook();
        }
        state.hook = Some(hook);
    }

    /// Stops the run of this number, if it has not ended.
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

    /// Whether the run in progress should stop.
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
