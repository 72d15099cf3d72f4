//! Body of an answer on its way out: sent in pieces, and dropped when its
//! client does not read it in time.
//!
//! HTTP/2 lets a client read as slowly as it likes, and an answer that is not
//! read holds its share of the worker's bytes. The server polls the body for a
//! piece, and then itself waits until the client has room for the piece;
//! meanwhile the body is not polled and cannot report that the wait is too
//! long. Therefore each call's task is watched from outside
//! ([`Patience::watch`]). When the time is over, the body ends in an error if
//! the server polls it again, which resets the stream and clears its pieces in
//! the connection; if the server still waits with the first piece, the task is
//! dropped, which resets the stream too.
//!
//! A piece is sent once the piece before it has been written, so the connection
//! holds at most one piece of an answer, and the answer's share is held until
//! the last piece has been written. An answer of a single piece would have to
//! wait just for that; so a connection may hold up to [`LOOSE_BYTES_MAX`] of
//! single-piece answers whose writing is not awaited.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicU8, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::Bytes;
use futures_util::task::AtomicWaker;
use http_body::{Frame, SizeHint};
use tonic::Status;
use tonic::body::Body;

use super::observe::{AnswerBytes, InProgress};
use super::report;
use crate::serve::metrics::Metrics;
use crate::serve::readiness::Readiness;
use crate::serve::timeline::CallTimeline;

/// Largest size of a piece: four HTTP/2 frames, so that waking the connection
/// costs little compared with writing the piece.
const PIECE_BYTES: usize = 64 << 10;
/// Largest number of bytes in one connection of answers that the worker already
/// counts as finished: some dozens of vectors, which is little compared with
/// the connection's window of 4 MiB.
const LOOSE_BYTES_MAX: usize = 256 << 10;
/// Bytes per timeout: a whole answer must be read within one timeout per
/// started 2 MiB, so that an answer that is read in tiny steps ends too. With
/// 60 s, the slowest rate is 0.3 Mbit/s.
const TIMED_BYTES: usize = 2 << 20;

tokio::task_local! {
    static TAKING: Taking;
}

/// Future that resolves when a client has been awaited for too long.
type WaitEnd = Pin<Box<dyn Future<Output = ()> + Send>>;

/// Time limits within which clients must read their answers.
#[derive(Debug, Clone)]
pub(super) struct Patience {
    /// Time limit for one piece, and for each started [`TIMED_BYTES`].
    pub(super) answer_timeout: Duration,
    /// Like `answer_timeout`, for streams; longer, since a stream's session
    /// ends an idle stream itself.
    pub(super) stream_timeout: Duration,
    /// Time limit for one piece while the worker drains.
    pub(super) drain_timeout: Duration,
    pub(super) readiness: Readiness,
    pub(super) metrics: Metrics,
}

impl Patience {
    /// Runs one call, or one HTTP/1.1 connection, until its end, or until its
    /// client has not read its answer in time; then returns none.
    pub(super) async fn watch<F: Future>(
        self: Arc<Self>,
        loose: Arc<AtomicUsize>,
        future: F,
    ) -> Option<F::Output> {
        let taking = Taking::new(loose);
        let watched = async {
            let mut future = pin!(future);
            let mut end: Option<(u64, WaitEnd)> = None;
            std::future::poll_fn(|cx| {
                if let Poll::Ready(output) = future.as_mut().poll(cx) {
                    return Poll::Ready(Some(output));
                }
                let Some(wait) = taking.wait() else {
                    end = None;
                    return Poll::Pending;
                };
                if end.as_ref().is_none_or(|(seq, _)| *seq != wait.seq) {
                    end = Some((wait.seq, Box::pin(Arc::clone(&self).over(wait))));
                }
                if let Some((_, end)) = &mut end {
                    ready!(end.as_mut().poll(cx));
                }
                taking.give_up(&self.metrics);
                // If the server polls the body, the body now ends in an error.
                match future.as_mut().poll(cx) {
                    Poll::Ready(output) => Poll::Ready(Some(output)),
                    Poll::Pending => Poll::Ready(None),
                }
            })
            .await
        };
        TAKING.scope(taking.clone(), watched).await
    }

    /// Resolves when a piece has waited for its client for too long.
    async fn over(self: Arc<Self>, wait: Wait) {
        let timeout = if wait.is_stream {
            self.stream_timeout
        } else {
            self.answer_timeout
        };
        let n_times = u32::try_from(1 + wait.answer_bytes / TIMED_BYTES).unwrap_or(u32::MAX);
        let whole = wait.answer_since + timeout.saturating_mul(n_times);
        let late = tokio::time::sleep_until(whole.min(wait.since + timeout).into());
        let drained = async {
            if wait.is_stream {
                // The stream's session ends a stalled stream itself.
                std::future::pending::<()>().await;
            }
            self.readiness.clone().drained().await;
            tokio::time::sleep(self.drain_timeout).await;
        };
        tokio::select! {
            () = late => {}
            () = drained => {}
        }
    }
}

/// Progress of an answer that is read piece by piece: the body updates it, and
/// the watcher of the call reads it.
#[derive(Debug, Clone)]
pub(super) struct Taking(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// [`NONE`], [`LOOSE`] or [`TIGHT`]: the piece of the answer that the
    /// connection holds.
    out: AtomicU8,
    /// Waker of the body, woken when the connection holds no piece any more.
    waker: AtomicWaker,
    /// Bytes in the connection whose writing is not awaited.
    loose: Arc<AtomicUsize>,
}

#[derive(Debug, Default)]
struct State {
    wait: Option<Wait>,
    n_waits: u64,
    is_given_up: bool,
    is_stream: bool,
    span: Option<tracing::Span>,
}

/// Wait for a client to read a piece.
#[derive(Debug, Clone, Copy)]
struct Wait {
    /// Number of the wait, which differs from piece to piece.
    seq: u64,
    since: Instant,
    /// Time at which the answer or stream message with the piece began to
    /// leave.
    answer_since: Instant,
    /// Size of the answer or stream message with the piece.
    answer_bytes: usize,
    is_stream: bool,
}

impl Taking {
    fn new(loose: Arc<AtomicUsize>) -> Self {
        Self(Arc::new(Inner {
            state: Mutex::default(),
            out: AtomicU8::new(NONE),
            waker: AtomicWaker::new(),
            loose,
        }))
    }

    /// Returns the state of the call that is being answered.
    pub(super) fn of_this_call(is_stream: bool) -> Self {
        let taking = TAKING
            .try_with(Clone::clone)
            .unwrap_or_else(|_| Self::new(Arc::default()));
        let mut state = taking.lock();
        state.is_stream = is_stream;
        state.span = Some(tracing::Span::current());
        drop(state);
        taking
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing below can panic halfway through a change.
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait(&self) -> Option<Wait> {
        self.lock().wait
    }

    fn give_up(&self, metrics: &Metrics) {
        let mut state = self.lock();
        state.is_given_up = true;
        let span = state.span.take().unwrap_or_else(tracing::Span::none);
        let wait = state.wait;
        drop(state);
        metrics.answer_not_taken();
        let waited = wait.map(|wait| wait.since.elapsed());
        span.in_scope(|| {
            tracing::debug!(
                ?waited,
                "dropped an answer: its client did not read it in time"
            );
        });
    }

    /// Hands a piece to the connection: a whole answer or a part of it.
    fn hand(&self, piece: Bytes, is_whole: bool, answer: Answer) -> Bytes {
        let n_bytes = piece.len();
        self.blame(answer);
        let take = |loose: usize| {
            let loose = loose + n_bytes;
            (loose <= LOOSE_BYTES_MAX).then_some(loose)
        };
        let order = Ordering::Relaxed;
        // A part keeps its whole answer in memory, so only whole answers are
        // loose.
        let is_loose = is_whole && self.0.loose.fetch_update(order, order, take).is_ok();
        let out = if is_loose { LOOSE } else { TIGHT };
        self.0.out.store(out, Ordering::Release);
        Bytes::from_owner(Piece {
            bytes: piece,
            is_loose,
            taking: self.clone(),
        })
    }

    /// Starts the time in which the client must read the next piece.
    fn blame(&self, answer: Answer) {
        let mut state = self.lock();
        state.n_waits += 1;
        state.wait = Some(Wait {
            seq: state.n_waits,
            since: Instant::now(),
            answer_since: answer.since,
            answer_bytes: answer.n_bytes,
            is_stream: state.is_stream,
        });
    }

    /// Returns the state of the piece in the connection; if there is one, the
    /// body is woken once the piece has been written.
    fn out(&self, cx: &Context<'_>) -> u8 {
        if self.0.out.load(Ordering::Acquire) == NONE {
            return NONE;
        }
        self.0.waker.register(cx.waker());
        // The piece may have been written in the meantime.
        self.0.out.load(Ordering::Acquire)
    }
}

/// Returns the status that resets the stream of a dropped answer (CANCEL).
fn not_taken() -> Status {
    let mut status = Status::cancelled("the client did not read the answer in time");
    status.set_source(Arc::new(h2::Error::from(h2::Reason::CANCEL)));
    status
}

/// The connection holds no piece of the answer.
const NONE: u8 = 0;
/// The connection holds a piece whose writing need not be awaited.
const LOOSE: u8 = 1;
/// The connection holds a piece that must be written before the answer ends.
const TIGHT: u8 = 2;

/// Piece of an answer that the server or its connection holds.
struct Piece {
    bytes: Bytes,
    is_loose: bool,
    taking: Taking,
}

impl AsRef<[u8]> for Piece {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Piece {
    fn drop(&mut self) {
        let inner = &self.taking.0;
        if self.is_loose {
            inner.loose.fetch_sub(self.bytes.len(), Ordering::Relaxed);
        }
        inner.out.store(NONE, Ordering::Release);
        inner.waker.wake();
    }
}

/// Start time and size of the answer to which a piece belongs.
#[derive(Debug, Clone, Copy)]
struct Answer {
    since: Instant,
    n_bytes: usize,
}

/// Body of an answer on its way out. The body keeps the call in progress, and
/// the answer's share of the worker's bytes, until the answer has been written.
pub(super) struct LeavingBody {
    body: Body,
    /// Part of the body's last frame that has not been sent.
    rest: Bytes,
    answer: Answer,
    taking: Taking,
    /// Times of the call, for its trailers; none for a page.
    timeline: Option<CallTimeline>,
    _held: Option<AnswerBytes>,
    _in_progress: Option<InProgress>,
}

impl LeavingBody {
    pub(super) fn new(
        body: Body,
        taking: Taking,
        held: Option<AnswerBytes>,
        in_progress: Option<InProgress>,
        timeline: Option<CallTimeline>,
    ) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            answer: Answer {
                since: Instant::now(),
                n_bytes: 0,
            },
            taking,
            timeline,
            _held: held,
            _in_progress: in_progress,
        }
    }
}

impl http_body::Body for LeavingBody {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        // The server polls again, so the piece before is with the connection.
        if this.taking.lock().is_given_up {
            return Poll::Ready(Some(Err(not_taken())));
        }
        if this.rest.is_empty() {
            if this.taking.out(cx) == TIGHT {
                return Poll::Pending;
            }
            this.taking.lock().wait = None;
            match ready!(Pin::new(&mut this.body).poll_frame(cx)) {
                Some(Ok(frame)) => match frame.into_data() {
                    Ok(data) => this.rest = data,
                    Err(frame) => {
                        return Poll::Ready(Some(Ok(with_timing(frame, this.timeline.as_ref()))));
                    }
                },
                end => return Poll::Ready(end),
            }
            this.answer = Answer {
                since: Instant::now(),
                n_bytes: this.rest.len(),
            };
        }
        if this.taking.out(cx) != NONE {
            if this.taking.wait().is_none() {
                this.taking.blame(this.answer);
            }
            return Poll::Pending;
        }
        let piece = this.rest.split_to(this.rest.len().min(PIECE_BYTES));
        let is_whole = piece.len() == this.answer.n_bytes;
        let piece = this.taking.hand(piece, is_whole, this.answer);
        Poll::Ready(Some(Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        if self.rest.is_empty() {
            self.body.size_hint()
        } else {
            SizeHint::default()
        }
    }
}

/// Adds the times of the call to its trailers.
fn with_timing(frame: Frame<Bytes>, timeline: Option<&CallTimeline>) -> Frame<Bytes> {
    let Some(timeline) = timeline else {
        return frame;
    };
    match frame.into_trailers() {
        Ok(mut trailers) => {
            trailers.insert(report::TIMING, report::timing(timeline));
            Frame::trailers(trailers)
        }
        Err(frame) => frame,
    }
}

impl Drop for LeavingBody {
    fn drop(&mut self) {
        self.taking.lock().wait = None;
    }
}
