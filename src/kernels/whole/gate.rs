//! The end of work that threads share out among themselves without counting it.

use std::sync::atomic::{AtomicUsize, Ordering};

use crate::kernels::layers::phase::wait_until;

/// Bit of a gate through which no thread passes any more.
const CLOSED: usize = 1 << (usize::BITS - 1);

/// Counter of the threads that are at a piece of work.
///
/// A thread that finds nothing left to begin closes the gate once every thread
/// has left it: then all that was begun is done. A thread that comes later
/// does not enter, so nobody depends on it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Gate(AtomicUsize);

impl Gate {
    /// Opens the gate again.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Does `work`, unless the gate is closed, and waits until it is. `work`
    /// returns when nothing is left to begin. What all threads have written in
    /// `work` can be seen after this function.
    pub(super) fn pass(&self, work: impl FnOnce()) {
        let entered = self
            .0
            .fetch_update(Ordering::Acquire, Ordering::Acquire, |n| {
                (n & CLOSED == 0).then_some(n + 1)
            });
        if entered.is_err() {
            return;
        }
        work();
        // Each later change of the counter carries this release on.
        self.0.fetch_sub(1, Ordering::Release);
        wait_until(|| {
            self.is_closed()
                || self
                    .0
                    .compare_exchange(0, CLOSED, Ordering::AcqRel, Ordering::Relaxed)
                    .is_ok()
        });
    }

    fn is_closed(&self) -> bool {
        self.0.load(Ordering::Acquire) & CLOSED != 0
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::AtomicBool;

    use super::*;

    #[test]
    fn nobody_passes_before_all_is_done() {
        const N: usize = 40;
        let gate = Gate::default();
        let next = AtomicUsize::new(0);
        let done: [AtomicBool; N] = std::array::from_fn(|_| AtomicBool::new(false));
        let pass = || {
            gate.pass(|| {
                while let Some(one) = done.get(next.fetch_add(1, Ordering::Relaxed)) {
                    std::thread::yield_now();
                    one.store(true, Ordering::Relaxed);
                }
            });
            assert!(done.iter().all(|one| one.load(Ordering::Relaxed)));
        };
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(pass);
            }
        });
        // A thread that comes late does not enter.
        gate.pass(|| panic!("the gate is open"));
    }
}
