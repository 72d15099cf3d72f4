//! Queue from which sessions take images: first the images that came back from
//! a worker, then new ones.
//!
//! An image that was with several workers when they ended is a suspect. A
//! suspect is given to a worker that has no other images: this shows whether
//! the image is the cause, and if it is, no other image is lost with it.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use tokio::sync::{Mutex as AsyncMutex, Notify, mpsc};

use super::PoolTask;

/// Workers that may end with an image before the image is a suspect. Ordinary
/// trouble, a rolling restart or a reclaimed spot machine, meets an image once
/// or twice.
const LOST_BEFORE_SUSPECT: u32 = 3;
/// Workers that may end with a suspect that they have alone, before it is an
/// error.
const LOST_ALONE: u32 = 3;

/// Feed of images for all sessions: images that came back, and then new ones.
/// The number of images that came back is bounded by the number that were
/// taken.
#[derive(Debug)]
pub struct TaskFeed {
    returned: Mutex<Returned>,
    bell: Notify,
    fresh: AsyncMutex<mpsc::Receiver<PoolTask>>,
}

#[derive(Debug, Default)]
struct Returned {
    /// Images that are no suspects, in the order of their ids: the oldest
    /// first, since a part waits for it.
    innocent: VecDeque<PoolTask>,
    suspects: VecDeque<PoolTask>,
}

/// Image that a session was given.
#[derive(Debug)]
pub(super) struct TakenTasks {
    pub(super) task: PoolTask,
    /// True if the worker must have no other image with it.
    pub(super) alone: bool,
}

/// Answer to a session that asks for an image that came back.
enum CameBack {
    This(TakenTasks),
    /// Only suspects wait, and they are given only to an idle worker.
    NotYet,
    Nothing,
}

impl TaskFeed {
    pub(super) fn new(fresh: mpsc::Receiver<PoolTask>) -> Self {
        Self {
            returned: Mutex::default(),
            bell: Notify::new(),
            fresh: AsyncMutex::new(fresh),
        }
    }

    /// Takes the next image. Pends when there is none, and for ever when there
    /// will be no more: the feed cannot tell the pool's end, since images that
    /// are with a worker may come back. While a suspect waits, only a session
    /// whose worker has no images is given one. The future can be dropped
    /// without losing an image.
    pub(super) async fn take(&self, worker_is_idle: bool) -> TakenTasks {
        loop {
            match self.came_back(worker_is_idle) {
                CameBack::This(taken) => return taken,
                // The session asks again after the worker's next answer.
                CameBack::NotYet => return std::future::pending().await,
                CameBack::Nothing => {}
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
                task = fresh => return TakenTasks { task, alone: false },
            }
        }
    }

    fn came_back(&self, worker_is_idle: bool) -> CameBack {
        let mut returned = self.returned();
        if returned.suspects.is_empty() {
            let task = returned.innocent.pop_front();
            return task.map_or(CameBack::Nothing, |task| {
                CameBack::This(TakenTasks { task, alone: false })
            });
        }
        let idle = worker_is_idle.then(|| returned.suspects.pop_front());
        idle.flatten().map_or(CameBack::NotYet, |task| {
            CameBack::This(TakenTasks { task, alone: true })
        })
    }

    /// Takes an image that is ready now and need not be alone with its worker.
    pub(super) fn try_take(&self) -> Option<PoolTask> {
        match self.came_back(false) {
            CameBack::This(taken) => return Some(taken.task),
            CameBack::NotYet => return None,
            CameBack::Nothing => {}
        }
        self.fresh.try_lock().ok()?.try_recv().ok()
    }

    /// Takes back an image that has no answer.
    pub(super) fn give_back(&self, task: PoolTask) {
        let mut returned = self.returned();
        if is_suspect(&task) {
            returned.suspects.push_back(task);
        } else {
            let queue = &mut returned.innocent;
            let place = queue.partition_point(|other| other.id < task.id);
            queue.insert(place, task);
        }
        drop(returned);
        self.bell.notify_one();
    }

    fn returned(&self) -> MutexGuard<'_, Returned> {
        self.returned.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn is_suspect(task: &PoolTask) -> bool {
    task.lost >= LOST_BEFORE_SUSPECT
}

/// True if so many workers ended with this image that no other worker may get
/// it.
pub(super) fn is_guilty(task: &PoolTask) -> bool {
    task.lost >= LOST_BEFORE_SUSPECT + LOST_ALONE
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use tokio::sync::Semaphore;

    use super::*;

    fn task(id: u64, lost: u32) -> PoolTask {
        let room = Arc::new(Semaphore::new(1)).try_acquire_owned().unwrap();
        PoolTask {
            id,
            image: bytes::Bytes::new(),
            room,
            failures: 0,
            lost,
        }
    }

    #[tokio::test]
    async fn what_came_back_goes_first_and_in_order() {
        let (fresh, tasks) = mpsc::channel(4);
        let feed = TaskFeed::new(tasks);
        fresh.send(task(7, 0)).await.unwrap();
        feed.give_back(task(5, 1));
        feed.give_back(task(3, 2));
        assert_eq!(feed.take(false).await.task.id, 3);
        assert_eq!(feed.take(false).await.task.id, 5);
        assert_eq!(feed.take(false).await.task.id, 7);
        // An image that comes back wakes a sleeping session, also when there
        // are no new images.
        drop(fresh);
        let (taken, ()) = tokio::join!(feed.take(false), async {
            tokio::task::yield_now().await;
            feed.give_back(task(8, 0));
        });
        assert_eq!(taken.task.id, 8);
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_has_its_worker_to_itself() {
        let (_fresh, tasks) = mpsc::channel(4);
        let feed = TaskFeed::new(tasks);
        feed.give_back(task(1, 0));
        feed.give_back(task(2, LOST_BEFORE_SUSPECT));
        // A busy worker must become idle first.
        let busy = tokio::time::timeout(Duration::from_secs(1), feed.take(false));
        assert!(busy.await.is_err());
        assert!(feed.try_take().is_none());
        let taken = feed.take(true).await;
        assert!(taken.alone && taken.task.id == 2);
        assert!(!is_guilty(&taken.task));
        let taken = feed.take(true).await;
        assert!(!taken.alone && taken.task.id == 1);
    }
}
