//! Turns of the engines that capture runs as CUDA graphs.
//!
//! ONNX Runtime captures in CUDA's mode "global": while one thread captures,
//! calls of any other thread of the process that might be unsafe, such as
//! allocations and copies on any GPU, fail and spoil the capture. So one engine
//! captures at a time, and no other engine uses a GPU meanwhile.

use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard, TryLockError};

/// Lock that an engine holds alone while it captures, and that a short use of a
/// GPU shares with others.
#[derive(Debug)]
pub(crate) struct CaptureLock(RwLock<()>);

/// The process's lock, since CUDA's mode is of the process too.
pub(crate) static CAPTURES: CaptureLock = CaptureLock::new();

impl CaptureLock {
    pub(crate) const fn new() -> Self {
        Self(RwLock::new(()))
    }

    /// Waits until no other engine captures and no short use is left; until the
    /// guard is dropped, the caller alone uses GPUs.
    pub(crate) fn alone(&self) -> RwLockWriteGuard<'_, ()> {
        // The lock guards no data that a panic could leave half changed.
        self.0.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns a guard for a short use of a GPU, before whose end nobody begins
    /// to capture; `None` while somebody captures.
    pub(crate) fn beside(&self) -> Option<RwLockReadGuard<'_, ()>> {
        match self.0.try_read() {
            Ok(guard) => Some(guard),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_uses_a_gpu_while_somebody_captures() {
        let lock = CaptureLock::new();
        let capturing = lock.alone();
        assert!(lock.beside().is_none());
        drop(capturing);
        let one = lock.beside();
        assert!(one.is_some());
        assert!(
            lock.beside().is_some(),
            "devices do not wait for each other"
        );
    }

    #[test]
    fn a_capture_waits_for_uses_that_have_begun() {
        let lock = CaptureLock::new();
        let using = lock.beside();
        assert!(using.is_some());
        let (sender, ended) = std::sync::mpsc::channel();
        std::thread::scope(|scope| {
            let lock = &lock;
            scope.spawn(move || {
                let _capturing = lock.alone();
                // The use says that it has ended before it lets go.
                ended.try_recv().expect("the use has ended");
            });
            sender.send(()).expect("somebody listens");
            drop(using);
        });
    }

    #[test]
    fn a_load_that_panicked_leaves_the_lock_usable() {
        let lock = CaptureLock::new();
        let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
            let _capturing = lock.alone();
            panic!("while capturing");
        }));
        assert!(panicked.is_err());
        assert!(lock.beside().is_some());
        drop(lock.alone());
    }
}
