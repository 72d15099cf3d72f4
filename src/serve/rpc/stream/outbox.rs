//! Queue of answers from a stream's session to its connection.
//!
//! A channel would not do: waiting answers must be dropped when the deadline
//! passes although no one takes them, and an item's place becomes free only
//! when its answer has been taken. The queue needs no bound of its own: a
//! session reads an item only while fewer items than its window are held.

use std::collections::VecDeque;
use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use tokio::sync::Notify;
use tonic::Status;

use super::super::arriving::Arrived;
use crate::serve::capacity::CapacityShare;

/// Queue of a stream's answers that wait for its connection.
#[derive(Debug)]
pub(in crate::serve::rpc) struct Outbox<T> {
    state: Mutex<State<T>>,
    /// Notification of the session, the only waiter, when an answer was taken.
    taken: Notify,
    /// State of the next message, which may wait for room in the worker.
    arrived: Arrived,
}

#[derive(Debug)]
struct State<T> {
    queue: VecDeque<(T, Option<WindowPermit>)>,
    end: End,
    /// Waker of the connection's task, while it waits for answers.
    taker: Option<Waker>,
    /// Place of the answer that was taken last.
    leaving: Option<WindowPermit>,
    /// Number of items that were read and whose answers are not known to have
    /// left.
    n_held: usize,
    bytes_held: usize,
    n_taken: u64,
    /// Time at which the client last did something, or was last given something
    /// to do.
    active_at: Instant,
}

#[derive(Debug)]
enum End {
    /// There may be more answers.
    Open,
    /// The stream ends with this result after the last answer.
    Set(Result<(), Status>),
    /// The end has been taken.
    Taken,
}

/// Place of an item in the window, with its share of the worker's bytes.
#[derive(Debug, Default)]
pub(in crate::serve::rpc) struct WindowPermit {
    /// Bytes of the item that count against the stream's own limit.
    pub(in crate::serve::rpc) bytes: usize,
    pub(in crate::serve::rpc) _share: Option<Arc<CapacityShare>>,
}

impl<T> State<T> {
    fn leave(&mut self, place: &WindowPermit) {
        self.n_held = self.n_held.saturating_sub(1);
        self.bytes_held = self.bytes_held.saturating_sub(place.bytes);
    }

    /// Returns true if the client has an answer to read.
    fn has_something(&self) -> bool {
        !self.queue.is_empty() || self.leaving.is_some()
    }
}

impl<T> Outbox<T> {
    pub(in crate::serve::rpc) fn new(arrived: Arrived) -> Self {
        Self {
            arrived,
            state: Mutex::new(State {
                queue: VecDeque::new(),
                end: End::Open,
                taker: None,
                leaving: None,
                n_held: 0,
                bytes_held: 0,
                n_taken: 0,
                active_at: Instant::now(),
            }),
            taken: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing below can panic halfway through a change.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until the condition returns a value; it is checked again whenever
    /// an answer was taken or an item forgotten.
    async fn once<V>(&self, mut condition: impl FnMut(&mut State<T>) -> Option<V>) -> V {
        loop {
            // A notification that comes before the wait is kept.
            if let Some(value) = condition(&mut self.lock()) {
                return value;
            }
            self.taken.notified().await;
        }
    }

    /// Waits until fewer than `window` items are held.
    pub(in crate::serve::rpc) async fn credit(&self, window: usize) {
        self.once(|state| (state.n_held < window).then_some(()))
            .await;
    }

    /// Counts an item that was read.
    pub(in crate::serve::rpc) fn hold(&self) {
        let mut state = self.lock();
        state.n_held += 1;
        state.active_at = Instant::now();
    }

    /// Waits until the stream's items together hold at most `max` bytes with
    /// `bytes` added; a single item may hold more.
    pub(in crate::serve::rpc) async fn room(&self, bytes: usize, max: usize) {
        self.once(|state| {
            let fits = state.bytes_held == 0 || state.bytes_held.saturating_add(bytes) <= max;
            fits.then(|| state.bytes_held += bytes)
        })
        .await;
    }

    /// Frees the place of an item that has no answer.
    pub(in crate::serve::rpc) fn forget(&self, place: &WindowPermit) {
        self.lock().leave(place);
        self.taken.notify_one();
    }

    /// Adds a response to the queue: an item's answer with its place, or a
    /// response to no item.
    pub(in crate::serve::rpc) fn push(&self, response: T, place: Option<WindowPermit>) {
        let mut state = self.lock();
        state.queue.push_back((response, place));
        state.active_at = Instant::now();
        let taker = state.taker.take();
        drop(state);
        if let Some(taker) = taker {
            taker.wake();
        }
    }

    /// Sets the end of the stream, after the answers in the queue.
    pub(in crate::serve::rpc) fn finish(&self, end: Result<(), Status>) {
        self.set_end(end, false);
    }

    /// Ends the stream at once with an error, drops the answers in the queue
    /// and frees their places.
    pub(in crate::serve::rpc) fn abandon(&self, status: Status) {
        self.set_end(Err(status), true);
    }

    fn set_end(&self, end: Result<(), Status>, now: bool) {
        let mut state = self.lock();
        if matches!(state.end, End::Taken) {
            return;
        }
        state.end = End::Set(end);
        let mut dropped = (VecDeque::new(), None);
        if now {
            dropped = (std::mem::take(&mut state.queue), state.leaving.take());
            state.n_held = 0;
            state.bytes_held = 0;
        }
        let taker = state.taker.take();
        drop(state);
        // Dropped shares wake tasks that wait for room, so the lock is released
        // first.
        drop(dropped);
        if let Some(taker) = taker {
            taker.wake();
        }
    }

    /// Returns the number of items whose answers were taken.
    pub(in crate::serve::rpc) fn n_taken(&self) -> u64 {
        self.lock().n_taken
    }

    /// Waits until the end has been taken.
    pub(in crate::serve::rpc) async fn ended(&self) {
        self.once(|state| matches!(state.end, End::Taken).then_some(()))
            .await;
    }

    /// Waits until the client has done nothing for `timeout` although it was
    /// the client's turn. The client's turn may come while items have no answer
    /// yet, since these items may wait for answers that the client does not
    /// read.
    pub(in crate::serve::rpc) async fn idle(&self, timeout: Duration) {
        let is_to_blame =
            |state: &State<T>| state.has_something() || state.n_held == 0 && !self.arrived.waits();
        self.silent(timeout, Instant::now(), is_to_blame).await;
    }

    /// Waits until the client has read nothing for `timeout` from now on,
    /// although there was something to read.
    pub(in crate::serve::rpc) async fn stalled(&self, timeout: Duration) {
        let has_something =
            |state: &State<T>| matches!(state.end, End::Set(_)) || state.has_something();
        self.silent(timeout, Instant::now(), has_something).await;
    }

    async fn silent(
        &self,
        timeout: Duration,
        mut since: Instant,
        is_to_blame: impl Fn(&State<T>) -> bool,
    ) {
        loop {
            tokio::time::sleep_until((since + timeout).into()).await;
            let state = self.lock();
            let now = Instant::now();
            since = if is_to_blame(&state) {
                since.max(state.active_at)
            } else {
                now
            };
            if since + timeout <= now {
                return;
            }
        }
    }

    /// Takes the next response. The poll tells that the connection has room, so
    /// the response before has left and its place becomes free. If the place
    /// became free earlier, a stalled reader would hold one item more than its
    /// window.
    pub(in crate::serve::rpc) fn poll_take(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<T, Status>>> {
        let mut state = self.lock();
        let left = state.leaving.take();
        if let Some(place) = &left {
            state.leave(place);
        }
        let polled = if let Some((response, place)) = state.queue.pop_front() {
            state.n_taken += u64::from(place.is_some());
            state.leaving = place;
            state.active_at = Instant::now();
            Poll::Ready(Some(Ok(response)))
        } else if let End::Open = state.end {
            state.taker = Some(cx.waker().clone());
            Poll::Pending
        } else {
            match std::mem::replace(&mut state.end, End::Taken) {
                End::Set(Err(status)) => Poll::Ready(Some(Err(status))),
                End::Set(Ok(())) | End::Open | End::Taken => Poll::Ready(None),
            }
        };
        drop(state);
        drop(left);
        // The session is also notified after a poll that only freed a place.
        self.taken.notify_one();
        polled
    }
}

/// Response of a stream, taken from its session's outbox.
#[derive(Debug)]
pub(crate) struct OutboxAnswers<T> {
    outbox: Arc<Outbox<T>>,
    session: tokio::task::AbortHandle,
}

impl<T> OutboxAnswers<T> {
    /// Spawns the session, which fills the outbox, and returns the response.
    pub(in crate::serve::rpc) fn new(
        outbox: Arc<Outbox<T>>,
        session: impl Future<Output = ()> + Send + 'static,
    ) -> Self {
        let session = tokio::spawn(session).abort_handle();
        Self { outbox, session }
    }
}

impl<T> tokio_stream::Stream for OutboxAnswers<T> {
    type Item = Result<T, Status>;

    fn poll_next(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        self.outbox.poll_take(cx)
    }
}

impl<T> Drop for OutboxAnswers<T> {
    fn drop(&mut self) {
        self.session.abort();
        // Answers that are never read must not hold bytes.
        self.outbox
            .abandon(Status::cancelled("the caller disconnected or cancelled"));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::proto::pb;

    fn response(id: &str) -> pb::EmbedStreamResponse {
        let result = pb::EmbedStreamResult {
            id: id.to_owned(),
            outcome: None,
        };
        pb::EmbedStreamResponse {
            message: Some(pb::embed_stream_response::Message::Result(result)),
        }
    }

    fn take(
        outbox: &Outbox<pb::EmbedStreamResponse>,
    ) -> Poll<Option<Result<pb::EmbedStreamResponse, Status>>> {
        outbox.poll_take(&mut Context::from_waker(Waker::noop()))
    }

    fn place(bytes: usize) -> WindowPermit {
        WindowPermit {
            bytes,
            ..Default::default()
        }
    }

    #[tokio::test]
    async fn a_place_is_free_when_the_connection_asks_for_more() {
        let outbox = Outbox::new(Arrived::default());
        assert!(take(&outbox).is_pending());
        outbox.credit(1).await;
        outbox.hold();
        outbox.room(10, 15).await;
        outbox.push(response("a"), Some(place(10)));
        for _ in 0..2 {
            let full = tokio::time::timeout(Duration::from_millis(5), outbox.credit(1)).await;
            assert!(full.is_err(), "held until the answer has left");
            assert_eq!(outbox.n_taken() == 1, take(&outbox).is_pending());
        }
        outbox.credit(1).await;
        outbox.hold();
        outbox.room(100, 15).await;
        outbox.hold();
        let full = tokio::time::timeout(Duration::from_millis(5), outbox.room(1, 15)).await;
        assert!(full.is_err(), "one may hold more than all, two may not");
    }

    #[tokio::test]
    async fn room_is_there_when_an_item_leaves_without_an_answer() {
        let outbox = Outbox::<pb::EmbedStreamResponse>::new(Arrived::default());
        outbox.hold();
        outbox.room(10, 15).await;
        outbox.hold();
        let waits = outbox.room(10, 15);
        let leaves = async { outbox.forget(&place(10)) };
        // In this order: the wait begins before the item leaves.
        let both = async { tokio::join!(waits, leaves) };
        let in_time = tokio::time::timeout(Duration::from_secs(5), both).await;
        assert!(in_time.is_ok(), "nobody was told");
    }

    #[tokio::test]
    async fn the_end_comes_after_the_answers_or_instead_of_them() {
        let outbox = Outbox::new(Arrived::default());
        outbox.hold();
        outbox.push(response("a"), Some(place(1)));
        outbox.finish(Ok(()));
        assert!(matches!(take(&outbox), Poll::Ready(Some(Ok(_)))));
        assert!(matches!(take(&outbox), Poll::Ready(None)));
        outbox.ended().await;

        let outbox = Outbox::new(Arrived::default());
        outbox.hold();
        outbox.push(response("a"), Some(place(1)));
        outbox.abandon(Status::unavailable("gone"));
        outbox.credit(1).await;
        assert!(matches!(take(&outbox), Poll::Ready(Some(Err(_)))));
        assert_eq!(outbox.n_taken(), 0);
        outbox.ended().await;
    }

    #[tokio::test]
    async fn idle_is_only_who_could_do_something() {
        let outbox = Outbox::new(Arrived::default());
        let timeout = Duration::from_millis(20);
        outbox.hold();
        let busy = tokio::time::timeout(3 * timeout, outbox.idle(timeout)).await;
        assert!(busy.is_err(), "the worker has the item");
        outbox.push(response("a"), Some(place(1)));
        std::thread::sleep(timeout);
        outbox.idle(timeout).await;
        outbox.stalled(timeout).await;
        // An item that waits for answers that the client does not read does not
        // make the stream busy.
        outbox.hold();
        let room = tokio::time::timeout(Duration::from_millis(5), outbox.room(2, 2));
        assert!(room.await.is_ok());
        outbox.hold();
        let room = tokio::time::timeout(Duration::from_millis(5), outbox.room(2, 2));
        assert!(room.await.is_err());
        outbox.idle(timeout).await;
        assert!(take(&outbox).is_ready() && take(&outbox).is_pending());
        let busy = tokio::time::timeout(3 * timeout, outbox.idle(timeout)).await;
        assert!(busy.is_err(), "it has taken all that there was");
        let stalled = tokio::time::timeout(3 * timeout, outbox.stalled(timeout)).await;
        assert!(stalled.is_err(), "there is nothing to take");
    }
}
