//! Phases of a step, which come one after the other. Each is cut into tasks
//! that threads share out among themselves.
//!
//! No thread depends on a thread that is absent: every thread that comes takes
//! the tasks that are left, and waits only for tasks that another thread has
//! begun. Therefore threads may come late, or never, as the threads of a pool
//! do.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// Checks that a waiting thread makes before it yields to another thread: a few
/// microseconds, longer than the ends of tasks of equal length are apart. After
/// that, the other thread may have lost its core.
const LOOKS: u32 = 512;

/// End from which a thread takes tasks. Tasks read memory in their order, so a
/// thread that goes on at its place reads on, and knows what it will read next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::kernels) enum TaskEnd {
    Front,
    Back,
}

/// Place of a thread among all that have come: half of the threads begin at
/// each end.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) struct ThreadPlace {
    end: TaskEnd,
    /// Number of threads at the same end that came before.
    before: usize,
}

impl ThreadPlace {
    pub(in crate::kernels) fn new(idx: usize) -> Self {
        Self {
            end: if idx.is_multiple_of(2) {
                TaskEnd::Front
            } else {
                TaskEnd::Back
            },
            before: idx / 2,
        }
    }

    /// Returns the end from which the thread takes its tasks.
    pub(in crate::kernels) fn end(self) -> TaskEnd {
        self.end
    }

    /// Returns the task that the thread takes first, if no thread is much
    /// faster than others.
    pub(super) fn first(self, n_tasks: usize) -> Option<usize> {
        let others_after = n_tasks.checked_sub(self.before + 1)?;
        Some(match self.end {
            TaskEnd::Front => self.before,
            TaskEnd::Back => others_after,
        })
    }

    /// Returns the task that the thread takes after `task`, if `n_threads` are
    /// as fast; none if that task is not left.
    pub(super) fn next(
        self,
        task: usize,
        n_threads: usize,
        phase: &LayerPhase,
        n_tasks: usize,
    ) -> Option<usize> {
        // As many threads take a task at this end in the meantime.
        let step = match self.end {
            TaskEnd::Front => n_threads.div_ceil(2),
            TaskEnd::Back => n_threads / 2,
        };
        let next = match self.end {
            TaskEnd::Front => task.checked_add(step),
            TaskEnd::Back => task.checked_sub(step),
        };
        next.filter(|next| phase.left(n_tasks).contains(next))
    }
}

/// One phase. Aligned to lines of its own, because all threads write it.
#[derive(Debug, Default)]
#[repr(align(128))]
pub(in crate::kernels) struct LayerPhase {
    /// Number of tasks begun at the back, in the upper half, and at the front.
    /// In the end the sum is more than the tasks that exist, by up to the
    /// number of threads.
    begun: AtomicU64,
    n_done: AtomicUsize,
}

/// Most tasks of a phase: with one more attempt per thread, the number must not
/// overflow half of a counter.
pub(in crate::kernels) const TASKS_MAX: usize = (u32::MAX / 2) as usize;

/// One task begun at the back.
const AT_BACK: u64 = 1 << 32;

impl LayerPhase {
    /// Resets the phase, so that it can begin again.
    pub(in crate::kernels) fn reset(&mut self) {
        *self = Self::default();
    }

    /// Takes the next task at this end; none if all tasks are begun.
    pub(in crate::kernels) fn take(&self, n_tasks: usize, end: TaskEnd) -> Option<usize> {
        let one = match end {
            TaskEnd::Front => 1,
            TaskEnd::Back => AT_BACK,
        };
        // No data is passed from thread to thread through this counter.
        let mut left = left(self.begun.fetch_add(one, Ordering::Relaxed), n_tasks);
        match end {
            TaskEnd::Front => left.next(),
            TaskEnd::Back => left.next_back(),
        }
    }

    /// Returns the tasks that no thread has begun.
    fn left(&self, n_tasks: usize) -> Range<usize> {
        left(self.begun.load(Ordering::Relaxed), n_tasks)
    }

    /// Counts a task that was taken as done. Its results can be seen by every
    /// thread that finds the phase over.
    pub(in crate::kernels) fn done(&self) {
        self.n_done.fetch_add(1, Ordering::Release);
    }

    pub(in crate::kernels) fn is_over(&self, n_tasks: usize) -> bool {
        self.n_done.load(Ordering::Acquire) >= n_tasks
    }

    /// Waits until all tasks are done. None may be left to take.
    pub(in crate::kernels) fn wait(&self, n_tasks: usize) {
        wait_until(|| self.is_over(n_tasks));
    }
}

/// Waits until `is_over` returns true, for what other threads have begun.
pub(in crate::kernels) fn wait_until(is_over: impl Fn() -> bool) {
    let mut looks = 0;
    while !is_over() {
        if looks < LOOKS {
            looks += 1;
            std::hint::spin_loop();
        } else {
            std::thread::yield_now();
        }
    }
}

fn left(begun: u64, n_tasks: usize) -> Range<usize> {
    let n = |begun| usize::try_from(begun).unwrap_or(usize::MAX);
    n(begun % AT_BACK)..n_tasks.saturating_sub(n(begun / AT_BACK))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_taken_once_and_phases_do_not_overlap() {
        const N_TASKS: usize = 37;
        let phases: Vec<LayerPhase> = (0..5).map(|_| LayerPhase::default()).collect();
        let runs: Vec<AtomicUsize> = (0..5 * N_TASKS).map(|_| AtomicUsize::new(0)).collect();
        std::thread::scope(|scope| {
            for idx in 0..3 {
                let (phases, runs) = (&phases, &runs);
                scope.spawn(move || {
                    for (idx_phase, phase) in phases.iter().enumerate() {
                        while let Some(task) = phase.take(N_TASKS, ThreadPlace::new(idx).end) {
                            let before = runs[..idx_phase * N_TASKS].iter();
                            assert!(before.map(|n| n.load(Ordering::Relaxed)).all(|n| n == 1));
                            runs[idx_phase * N_TASKS + task].fetch_add(1, Ordering::Relaxed);
                            phase.done();
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
        let phase = LayerPhase::default();
        let mut taken = Vec::new();
        while let Some(task) = phase.take(10, TaskEnd::Back) {
            taken.push(task);
            phase.done();
        }
        assert_eq!(taken, (0..10).rev().collect::<Vec<_>>());
        phase.wait(10);
        assert_eq!(phase.take(10, TaskEnd::Front), None);
    }

    #[test]
    fn threads_in_step_take_what_they_expect() {
        const N_TASKS: usize = 10;
        for n_threads in 1..=4 {
            let places: Vec<ThreadPlace> = (0..n_threads).map(ThreadPlace::new).collect();
            let phase = LayerPhase::default();
            let mut expected: Vec<_> = places.iter().map(|place| place.first(N_TASKS)).collect();
            let mut n_taken = 0;
            'all: loop {
                let mut taken = Vec::new();
                for (place, expected) in places.iter().zip(&expected) {
                    let Some(task) = phase.take(N_TASKS, place.end) else {
                        break 'all;
                    };
                    assert_eq!(Some(task), *expected, "{n_threads} threads");
                    n_taken += 1;
                    taken.push(task);
                }
                expected = (places.iter().zip(taken))
                    .map(|(place, task)| place.next(task, n_threads, &phase, N_TASKS))
                    .collect();
            }
            assert_eq!(n_taken, N_TASKS);
        }
        assert_eq!(ThreadPlace::new(1).first(1), Some(0));
        assert_eq!(ThreadPlace::new(2).first(1), None);
    }
}
