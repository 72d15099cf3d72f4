//! The memory that images take between their reading and their answer, and the
//! pages and batches that they are read from.
//!
//! Whoever reads asks for room before there are bytes. Rooms are given in the
//! order in which they were asked for, and one that is full of bytes waits for
//! nobody but the workers: so the first image always comes through.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// `--image-memory`, and what is left of it.
#[derive(Debug, Clone)]
pub(super) struct ImageMemory {
    free: Arc<Semaphore>,
    limit: u32,
}

/// A part of the memory; free when it is dropped.
#[derive(Debug)]
pub(super) struct ImageRoom(OwnedSemaphorePermit);

impl ImageRoom {
    /// Gives back all but `bytes`.
    pub(super) fn shrink(&mut self, bytes: u64) {
        let kept = usize::try_from(bytes).unwrap_or(usize::MAX).max(1);
        if let Some(surplus) = self.0.num_permits().checked_sub(kept) {
            drop(self.0.split(surplus));
        }
    }

    pub(super) fn bytes(&self) -> u64 {
        self.0.num_permits() as u64
    }

    pub(super) fn into_permit(self) -> OwnedSemaphorePermit {
        self.0
    }
}

impl ImageMemory {
    /// `limit` is checked with the flags.
    pub(super) fn new(limit: u32) -> Self {
        Self {
            free: Arc::new(Semaphore::new(limit as usize)),
            limit,
        }
    }

    /// How much there is when nobody has any.
    pub(super) fn limit(&self) -> u64 {
        self.limit.into()
    }

    /// Room for so many bytes, at most for all there are; `None` once the job
    /// has ended.
    pub(super) async fn room(&self, bytes: u64) -> Option<ImageRoom> {
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let permits = permits.clamp(1, self.limit);
        let room = Arc::clone(&self.free).acquire_many_owned(permits).await;
        room.ok().map(ImageRoom)
    }

    /// The same on a thread that may wait.
    pub(super) fn blocking_room(&self, runtime: &Handle, bytes: u64) -> Option<ImageRoom> {
        runtime.block_on(self.room(bytes))
    }

    /// Nobody is given anything any more.
    pub(super) fn close(&self) {
        self.free.close();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn rooms_together_are_never_over_the_limit() {
        let memory = ImageMemory::new(100);
        // More than there is, is all there is.
        let mut all = memory.room(u64::MAX).await.unwrap();
        assert_eq!(all.bytes(), 100);
        all.shrink(40);
        assert_eq!((all.bytes(), memory.free.available_permits()), (40, 60));
        all.shrink(70);
        assert_eq!(all.bytes(), 40);
        let rest = memory.room(60).await.unwrap();
        assert_eq!(memory.free.available_permits(), 0);
        drop((all, rest));
        assert_eq!(memory.free.available_permits(), 100);
        memory.close();
        assert!(memory.room(1).await.is_none());
    }
}
