//! An answer's body on its way out: handed on in pieces, and given up when its
//! client does not take it.
//!
//! HTTP/2 lets a client take as little as it likes, and an answer that is not
//! taken holds its share of the worker's bytes. The server asks for a piece, and
//! then waits by itself until the client has room for it; a body that has been
//! asked cannot say any more that it has waited for long enough. So each call's
//! task is watched from outside ([`Patience::watch`]): when time is up the body
//! ends in an error if the server asks on, which resets the stream and clears
//! what of it waits in the connection; if the server still waits with the first
//! piece, the task is dropped, which resets the stream too.
//!
//! A piece goes out once the one before has been written, so what the connection
//! has of an answer is one piece, and the answer's share is held until the last
//! has been written. An answer that is one piece would pay for that with a wait
//! of its own; so a connection may have [`LOOSE_BYTES_MAX`] of such pieces that
//! nobody waits for.

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
use crate::serve::metrics::Metrics;
use crate::serve::readiness::Readiness;

/// Bytes handed on at once: four HTTP/2 frames, so that waking the connection
/// costs little beside writing it.
const PIECE_BYTES: usize = 64 << 10;
/// Bytes that one connection may have of answers that are over as far as the
/// worker knows: some dozens of vectors, little beside the connection's window
/// of 4 MiB.
const LOOSE_BYTES_MAX: usize = 256 << 10;
/// An answer has the limit once for each of these, so that one that is taken drop
/// by drop ends too: at 60 s, 0.3 Mbit/s.
const TIMED_BYTES: usize = 2 << 20;

tokio::task_local! {
    static TAKING: Taking;
}

/// The end of a wait for a client.
type WaitEnd = Pin<Box<dyn Future<Output = ()> + Send>>;

/// How long answers wait for their clients.
#[derive(Debug, Clone)]
pub(super) struct Patience {
    /// For one piece, and for so many bytes.
    pub(super) answer_timeout: Duration,
    /// The same for streams, whose sessions end them before.
    pub(super) stream_timeout: Duration,
    /// The same for one piece while the worker drains.
    pub(super) drain_timeout: Duration,
    pub(super) readiness: Readiness,
    pub(super) metrics: Metrics,
}

impl Patience {
    /// Runs one call, or one connection of HTTP/1.1, until its end or until its
    /// client has not taken its answer for too long.
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
                // The body says so where it is asked.
                match future.as_mut().poll(cx) {
                    Poll::Ready(output) => Poll::Ready(Some(output)),
                    Poll::Pending => Poll::Ready(None),
                }
            })
            .await
        };
        TAKING.scope(taking.clone(), watched).await
    }

    /// Resolves when a piece has waited for too long.
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
                // Its session gives it up.
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

/// Progress of an answer that is taken piece by piece: the body tells, and
/// whoever watches the call looks.
#[derive(Debug, Clone)]
pub(super) struct Taking(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    state: Mutex<State>,
    /// True if the connection has a piece; see [`Piece`].
    out: AtomicU8,
    /// Woken when it has none any more.
    waker: AtomicWaker,
    /// Bytes that the connection has and nobody waits for.
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

/// A piece that has not been taken.
#[derive(Debug, Clone, Copy)]
struct Wait {
    /// Differs from piece to piece.
    seq: u64,
    since: Instant,
    /// Of the answer, or the message, that it is a piece of.
    answer_since: Instant,
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

    /// State of the call that is being answered.
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
                "an answer was given up: its client does not take it"
            );
        });
    }

    /// A piece leaves, the whole of an answer or a part.
    fn hand(&self, piece: Bytes, is_whole: bool, answer: Answer) -> Bytes {
        let n_bytes = piece.len();
        self.blame(answer);
        let take = |loose: usize| {
            let loose = loose + n_bytes;
            (loose <= LOOSE_BYTES_MAX).then_some(loose)
        };
        let order = Ordering::Relaxed;
        // A part would keep all of its answer in memory.
        let is_loose = is_whole && self.0.loose.fetch_update(order, order, take).is_ok();
        let out = if is_loose { LOOSE } else { TIGHT };
        self.0.out.store(out, Ordering::Release);
        Bytes::from_owner(Piece {
            bytes: piece,
            is_loose,
            taking: self.clone(),
        })
    }

    /// From now on the next move is the client's.
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

    /// Pieces in the connection, for a body that goes on once they have been written.
    fn out(&self, cx: &Context<'_>) -> u8 {
        if self.0.out.load(Ordering::Acquire) == NONE {
            return NONE;
        }
        self.0.waker.register(cx.waker());
        // It may have been written meanwhile.
        self.0.out.load(Ordering::Acquire)
    }
}

/// Resets the stream as one that nobody wants any more.
fn not_taken() -> Status {
    let mut status = Status::cancelled("the answer was not taken");
    status.set_source(Arc::new(h2::Error::from(h2::Reason::CANCEL)));
    status
}

/// The connection has nothing of the answer.
const NONE: u8 = 0;
/// The connection has a piece that nobody need wait for.
const LOOSE: u8 = 1;
/// The connection has a piece that the answer's end waits for.
const TIGHT: u8 = 2;

/// A piece in the hands of the server or its connection.
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

/// The answer that a piece belongs to.
#[derive(Debug, Clone, Copy)]
struct Answer {
    since: Instant,
    n_bytes: usize,
}

/// Body of an answer on its way out. It keeps the call in progress, and its share, until it has
/// been taken.
pub(super) struct LeavingBody {
    body: Body,
    /// Part of the body's last frame that has not been handed on.
    rest: Bytes,
    answer: Answer,
    taking: Taking,
    _held: Option<AnswerBytes>,
    _in_progress: Option<InProgress>,
}

impl LeavingBody {
    pub(super) fn new(
        body: Body,
        taking: Taking,
        held: Option<AnswerBytes>,
        in_progress: Option<InProgress>,
    ) -> Self {
        Self {
            body,
            rest: Bytes::new(),
            answer: Answer {
                since: Instant::now(),
                n_bytes: 0,
            },
            taking,
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
        // The server asks on, so what it had is with the connection.
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
                    Err(trailers) => return Poll::Ready(Some(Ok(trailers))),
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

impl Drop for LeavingBody {
    fn drop(&mut self) {
        self.taking.lock().wait = None;
    }
}
