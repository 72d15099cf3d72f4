//! What wakes the batcher.
//!
//! Its work lies in channels, and it looks through all of them whenever it
//! wakes; this only says that there is something to look for. Nothing is lost
//! between looking and sleeping: whatever comes then has rung, and the sleep does
//! not begin. A thread that waits on several channels at once would do as well,
//! but as it wakes it meets whoever woke it at a lock, and both wait once more.

use std::time::Instant;

use crate::sync::{Condvar, Mutex, MutexGuard, PoisonError};

/// See the module.
#[derive(Debug, Default)]
pub struct Alarm {
    state: Mutex<State>,
    rang: Condvar,
}

#[derive(Debug, Default)]
struct State {
    news: bool,
    callers_left: bool,
    engine_free: bool,
    /// What the batcher wants to be woken for; `None` while it is awake, and
    /// once somebody has woken it.
    asleep: Option<Heed>,
}

impl State {
    fn is_heeded(&self, heed: Heed) -> bool {
        self.news || self.engine_free && heed == Heed::Engines
    }
}

/// Whether it matters now that an engine gets free.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Heed {
    Engines,
    /// Nothing waits for one: it is noticed with the next news, and the batcher
    /// wakes once a batch and not twice.
    OnlyNews,
}

impl Alarm {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something has come, or will come no more.
    pub fn news(&self) {
        self.ring(|state| state.news = true);
    }

    /// Callers have gone: what waits and what runs is to be looked through.
    pub fn callers_left(&self) {
        self.ring(|state| (state.news, state.callers_left) = (true, true));
    }

    /// An engine has said that it is free.
    pub fn engine_free(&self) {
        self.ring(|state| state.engine_free = true);
    }

    fn ring(&self, set: impl FnOnce(&mut State)) {
        let mut state = self.lock();
        set(&mut state);
        let wakes = state.asleep.is_some_and(|heed| state.is_heeded(heed));
        if wakes {
            state.asleep = None;
        }
        // Woken without the lock, which it takes first of all.
        drop(state);
        if wakes {
            self.rang.notify_one();
        }
    }

    /// Sleeps until something rings that is heeded, or has since the last sleep,
    /// or until a time; whether callers have gone. For one thread only.
    pub fn sleep(&self, heed: Heed, until: Option<Instant>) -> bool {
        let mut state = self.lock();
        while !state.is_heeded(heed) {
            state.asleep = Some(heed);
            state = match until {
                None => self
                    .rang
                    .wait(state)
                    .unwrap_or_else(PoisonError::into_inner),
                Some(until) => {
                    let left = until.saturating_duration_since(Instant::now());
                    if left.is_zero() {
                        break;
                    }
                    let waited = self.rang.wait_timeout(state, left);
                    waited.unwrap_or_else(PoisonError::into_inner).0
                }
            };
        }
        std::mem::take(&mut *state).callers_left
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_rang_before_is_not_slept_through() {
        // Each would sleep for ever if it were.
        let alarm = Alarm::default();
        alarm.news();
        assert!(!alarm.sleep(Heed::OnlyNews, None));
        alarm.callers_left();
        assert!(alarm.sleep(Heed::OnlyNews, None));
        alarm.engine_free();
        assert!(!alarm.sleep(Heed::Engines, None));
        // Not heeded, and not forgotten.
        alarm.engine_free();
        alarm.callers_left();
        assert!(alarm.sleep(Heed::OnlyNews, None));
        let at_once = Some(Instant::now());
        assert!(!alarm.sleep(Heed::OnlyNews, at_once));
        assert!(!alarm.sleep(Heed::Engines, at_once));
    }
}
