//! Parts of a step that come one after the other, each cut into tasks that
//! threads share out among themselves.
//!
//! Nobody depends on a thread that is not there: whoever comes takes what tasks
//! are left and waits only for those that another has begun. So threads may come
//! late, or never, as those of a pool do.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Looks before a thread that waits lets another run: a few microseconds, longer
/// than tasks of equal length end apart. Then the other may have lost its core.
const LOOKS: u32 = 512;

/// One part. On lines of its own, since all threads write it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(super) struct Phase {
    /// The first task that nobody has begun.
    next: AtomicUsize,
    n_done: AtomicUsize,
}

impl Phase {
    /// Ready to begin again.
    pub(super) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Tasks for a thread to do, one after the other; many while many are left,
    /// so that what they read is in one piece, and one by one in the end, so that
    /// all threads end together. None if all are begun.
    pub(super) fn take(&self, n_tasks: usize, n_threads: usize) -> Option<Range<usize>> {
        let mut first = self.next.load(Ordering::Relaxed);
        while first < n_tasks {
            let n = ((n_tasks - first) / (2 * n_threads.max(1))).max(1);
            // Nothing is passed from thread to thread through this counter.
            match self.next.compare_exchange_weak(
                first,
                first + n,
                Ordering::Relaxed,
                Ordering::Relaxed,
            ) {
                Ok(_) => return Some(first..first + n),
                Err(now) => first = now,
            }
        }
        None
    }

    /// Tasks that were taken are done. What they wrote can be seen by whoever
    /// finds the phase over.
    pub(super) fn done(&self, tasks: &Range<usize>) {
        self.n_done.fetch_add(tasks.len(), Ordering::Release);
    }

    pub(super) fn is_over(&self, n_tasks: usize) -> bool {
        self.n_done.load(Ordering::Acquire) >= n_tasks
    }

    /// Waits until all tasks are done, of which none may be left to take.
    pub(super) fn wait(&self, n_tasks: usize) {
        let mut looks = 0;
        while !self.is_over(n_tasks) {
            if looks < LOOKS {
                looks += 1;
                std::hint::spin_loop();
            } else {
                std::thread::yield_now();
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_taken_once_and_phases_do_not_overlap() {
        const N_TASKS: usize = 37;
        let phases: Vec<Phase> = (0..5).map(|_| Phase::default()).collect();
        let runs: Vec<AtomicUsize> = (0..5 * N_TASKS).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            for _ in 0..3 {
                scope.spawn(|| {
                    for (idx, phase) in phases.iter().enumerate() {
                        while let Some(tasks) = phase.take(N_TASKS, 3) {
                            for task in tasks.clone() {
                                let before = runs[..idx * N_TASKS].iter();
                                assert!(before.map(|n| n.load(Ordering::Relaxed)).all(|n| n == 1));
                                runs[idx * N_TASKS + task].fetch_add(1, Ordering::Relaxed);
                            }
                            phase.done(&tasks);
                        }
                        phase.wait(N_TASKS);
                    }
                });
            }
        });
        assert!(runs.iter().all(|n| n.load(Ordering::Relaxed) == 1));
        assert!(phases.iter().all(|phase| phase.is_over(N_TASKS)));
    }

    #[test]
    fn one_thread_does_all_and_a_late_one_finds_nothing() {
        let phase = Phase::default();
        let mut taken = Vec::new();
        while let Some(tasks) = phase.take(10, 1) {
            taken.extend(tasks.clone());
            phase.done(&tasks);
        }
        assert_eq!(taken, (0..10).collect::<Vec<_>>());
        phase.wait(10);
        assert_eq!(phase.take(10, 1), None);
    }
}
