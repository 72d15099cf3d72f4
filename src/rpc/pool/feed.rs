//! Where sessions take images from: those that came back first, then new ones.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, Notify, mpsc};

use super::Task;

/// See the module. What came back is bounded by what was taken.
#[derive(Debug)]
pub struct Feed {
    returned: Mutex<VecDeque<Task>>,
    bell: Notify,
    fresh: AsyncMutex<mpsc::Receiver<Task>>,
}

impl Feed {
    pub(super) fn new(fresh: mpsc::Receiver<Task>) -> Self {
        Self {
            returned: Mutex::new(VecDeque::new()),
            bell: Notify::new(),
            fresh: AsyncMutex::new(fresh),
        }
    }

    /// The next image; pends when there is none, and for ever when there will
    /// be none: the pool's end is not the feed's to say, since images that are
    /// with a worker may come back. Nothing is lost when it is dropped.
    pub(super) async fn take(&self) -> Task {
        loop {
            if let Some(task) = self.pop() {
                return task;
            }
            let fresh = async {
                match self.fresh.lock().await.recv().await {
                    Some(task) => task,
                    None => std::future::pending().await,
                }
            };
            tokio::select! {
                biased;
                () = self.bell.notified() => {}
                task = fresh => return task,
            }
        }
    }

    /// One that is there already.
    pub(super) fn try_take(&self) -> Option<Task> {
        self.pop()
            .or_else(|| self.fresh.try_lock().ok()?.try_recv().ok())
    }

    fn pop(&self) -> Option<Task> {
        let mut returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
        returned.pop_front()
    }

    /// Gives images back that have no answer.
    pub(super) fn give_back(&self, tasks: impl IntoIterator<Item = Task>) {
        for task in tasks {
            let mut returned = self.returned.lock().unwrap_or_else(PoisonError::into_inner);
            // The oldest first: a part waits for it.
            let place = returned.partition_point(|other| other.id < task.id);
            returned.insert(place, task);
            drop(returned);
            self.bell.notify_one();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use tokio::sync::Semaphore;

    use super::*;

    #[tokio::test]
    async fn what_came_back_goes_first_and_in_order() {
        let rooms = Arc::new(Semaphore::new(10));
        let task = |id| Task {
            id,
            image: bytes::Bytes::new(),
            room: Arc::clone(&rooms).try_acquire_owned().unwrap(),
            failures: 0,
        };
        let (fresh, tasks) = mpsc::channel(4);
        let feed = Feed::new(tasks);
        fresh.send(task(7)).await.unwrap();
        feed.give_back([task(5), task(3)]);
        assert_eq!(feed.take().await.id, 3);
        assert_eq!(feed.take().await.id, 5);
        assert_eq!(feed.take().await.id, 7);
        // A sleeper is woken by what comes back, also when nothing new comes.
        drop(fresh);
        let (taken, ()) = tokio::join!(feed.take(), async {
            tokio::task::yield_now().await;
            feed.give_back([task(8)]);
        });
        assert_eq!(taken.id, 8);
    }
}
