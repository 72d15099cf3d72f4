//! Memory for images from their reading to their answer, and for the pages and
//! batches from which they are read.
//!
//! A reader acquires room before it reads the bytes. Rooms are granted in the
//! order of the requests. A room that is full waits only for the workers, so
//! the first image always gets through.

use std::sync::Arc;

use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Memory of `--image-memory`, with the part that is free.
#[derive(Debug, Clone)]
pub(super) struct ImageMemory {
    free: Arc<Semaphore>,
    limit: u32,
}

/// Room: a part of the memory, released when it is dropped.
#[derive(Debug)]
pub(super) struct ImageRoom(OwnedSemaphorePermit);

impl ImageRoom {
    /// Releases all of the room but `bytes`.
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
    /// Makes the memory of `limit` bytes; the flags' bounds are checked before.
    pub(super) fn new(limit: u32) -> Self {
        Self {
            free: Arc::new(Semaphore::new(limit as usize)),
            limit,
        }
    }

    /// Returns the size of the whole memory.
    pub(super) fn limit(&self) -> u64 {
        self.limit.into()
    }

    /// Acquires room for `bytes` bytes, at most the whole memory; `None` once
    /// the job has ended.
    pub(super) async fn room(&self, bytes: u64) -> Option<ImageRoom> {
        let permits = u32::try_from(bytes).unwrap_or(u32::MAX);
        let permits = permits.clamp(1, self.limit);
        let room = Arc::clone(&self.free).acquire_many_owned(permits).await;
        room.ok().map(ImageRoom)
    }

    /// Acquires room as [`Self::room`] does, on a thread that may block.
    pub(super) fn blocking_room(&self, runtime: &Handle, bytes: u64) -> Option<ImageRoom> {
        runtime.block_on(self.room(bytes))
    }

    /// Ends the memory: requests for room get none from now on.
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
        // A request for more than the whole memory gets the whole memory.
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
