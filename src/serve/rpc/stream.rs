//! EmbedStream: a stream of any length in bounded memory.
//!
//! Each stream has a session, a task that reads items, submits them and puts
//! their answers into an [`Outbox`], from which the connection takes them. The
//! session is a task of its own because a connection whose client stops reading
//! does not poll for answers any more, so nothing else could notice that the
//! deadline has passed. The session ends with the response: when the client
//! disconnects, the connection drops the response, which aborts the session and
//! frees all its places.
//!
//! An item holds a place in the stream's window from the time at which it is
//! read until its answer has left, and the session reads only while a place is
//! free. If a client stops reading answers, the worker stops reading its items,
//! and HTTP/2 flow control stops the client (backpressure). If the worker is
//! full, one item per stream waits in the session; no item is rejected for lack
//! of room.

pub(super) mod outbox;

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use futures_util::stream::{FuturesOrdered, FuturesUnordered};
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status, Streaming};
use tracing::Instrument as _;

use self::outbox::{Outbox, WindowPermit};
use super::arriving::Arrived;
use super::calling::CallOrigin;
use super::embedding::Embedding;
use super::listen::Peer;
use super::observe::{CallCourse, CallEnding, InProgress};
use super::outcome_tally::OutcomeTally;
use super::{WorkerService, arriving, convert, deadline, status};
use crate::engine::EngineFacts;
use crate::model::{CallTask, Model};
use crate::proto::codec::ScanMessage;
use crate::proto::pb::embed_stream_request::Message;
use crate::proto::{Priority, codec, pb};
use crate::serve::admission::{Admission, Bytes, PendingAnswers, StreamItem};
use crate::serve::caller::Caller;
use crate::serve::config::LimitsConfig;
use crate::serve::error::StageError;
use crate::serve::job::Answer;
use crate::serve::metrics::StreamOpen;
use crate::serve::readiness::Readiness;
use crate::serve::rpc::error::{RequestError, StreamEnd};
use crate::serve::timeline::CallTimeline;

/// Largest size of an item's id: enough for any path or URL.
const ID_BYTES_MAX: usize = 1024;
/// Divisor for the bytes of one stream: a stream may hold an eighth of the
/// bytes of its class, so eight stalled readers are needed before other streams
/// wait.
pub(super) const STREAM_BYTES_PART: usize = 8;
/// Longest time without a read answer, while the worker drains, before a client
/// is given up; the time is at most half of the grace period.
pub(super) const DRAIN_PATIENCE_MAX: Duration = Duration::from_secs(5);
/// Time for a client to read the status of a stream that was ended at once.
pub(super) const END_PATIENCE: Duration = Duration::from_secs(1);

type Requests = Streaming<pb::EmbedStreamRequest>;
pub(super) type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Opens a stream, whose options come with its first message.
///
/// The response begins before the first message is read, because some clients
/// send nothing before the response has begun.
pub(super) fn open(
    service: &WorkerService,
    request: Request<Requests>,
) -> Result<EmbedAnswers, RequestError> {
    let facts = service.facts()?;
    service.require(CallTask::Embed)?;
    let (_, extensions, requests) = request.into_parts();
    let CallOrigin {
        caller,
        class,
        deadline,
        timeline,
    } = CallOrigin::of(&extensions);
    let arrived = extensions.get::<Arrived>().cloned().unwrap_or_default();
    let outbox = Arc::new(Outbox::new(arrived.clone()));
    let patience = DRAIN_PATIENCE_MAX.min(service.shutdown_grace_period / 2);
    let hurry = hurry(
        Arc::clone(&outbox),
        deadline,
        service.limits.stream_idle_timeout,
        (service.readiness.clone(), patience),
    );
    let course = extensions.get::<CallCourse>().and_then(CallCourse::take);
    let session = Session {
        model: Arc::clone(&service.model),
        facts,
        admission: service.admission.clone(),
        readiness: service.readiness.clone(),
        limits: service.limits.clone(),
        leaves_at: extensions.get::<Peer>().and_then(Peer::leaves_at),
        caller,
        class,
        deadline,
        arrived,
        outbox: Arc::clone(&outbox),
        n_read: 0,
        unanswered: 0,
        tally: OutcomeTally::new(service.metrics.clone(), deadline),
        _open: service.metrics.stream(),
        course,
        timeline,
    };
    let session = session.run(requests, hurry).in_current_span();
    Ok(EmbedAnswers::new(outbox, session))
}

/// Response of an EmbedStream.
pub(super) type EmbedAnswers = outbox::OutboxAnswers<pb::EmbedStreamResponse>;

/// Task that reads a stream's items and produces its [`EmbedAnswers`].
#[derive(Debug)]
struct Session {
    model: Arc<Model>,
    facts: EngineFacts,
    admission: Admission,
    readiness: Readiness,
    limits: LimitsConfig,
    /// Time at which the connection is asked to close, which it cannot do
    /// before the stream ends.
    leaves_at: Option<Instant>,
    caller: Caller,
    class: Priority,
    deadline: Option<Instant>,
    /// Share of the latest message.
    arrived: Arrived,
    outbox: Arc<Outbox<pb::EmbedStreamResponse>>,
    /// Number of items that were read.
    n_read: u64,
    /// Number of items that were read and will have no answer.
    unanswered: u64,
    tally: OutcomeTally,
    _open: StreamOpen,
    /// Guards that count the call when the session ends.
    course: Option<(CallEnding, InProgress)>,
    timeline: CallTimeline,
}

/// Options of a stream, settled by its opening.
#[derive(Debug)]
struct Plan {
    embedding: Embedding,
    window: usize,
    /// Bytes that an answer holds.
    answer_bytes: usize,
    /// Limit on the bytes of all items of the stream together.
    bytes_max: usize,
}

/// Item that was submitted, or its error.
struct Submitted {
    id: String,
    pending: Result<PendingAnswers, RequestError>,
    /// Bytes of the item that count against the stream's own limit.
    bytes: usize,
}

/// Item whose outcome is known.
struct Done {
    id: String,
    outcome: Result<Answer, RequestError>,
    place: WindowPermit,
}

/// Items in the worker, in the order in which they are answered.
enum InFlight {
    AsDone(FuturesUnordered<BoxFuture<Done>>),
    AsSent(FuturesOrdered<BoxFuture<Done>>),
}

impl InFlight {
    fn new(order: pb::Order) -> Self {
        match order {
            pb::Order::Unspecified | pb::Order::AsDone => Self::AsDone(FuturesUnordered::new()),
            pb::Order::AsSent => Self::AsSent(FuturesOrdered::new()),
        }
    }

    fn push(&mut self, item: Submitted) {
        let done = Box::pin(done(item));
        match self {
            Self::AsDone(items) => items.push(done),
            Self::AsSent(items) => items.push_back(done),
        }
    }

    fn is_empty(&self) -> bool {
        match self {
            Self::AsDone(items) => items.is_empty(),
            Self::AsSent(items) => items.is_empty(),
        }
    }

    /// Awaits the next item whose outcome is known; for ever if no item is in
    /// the worker.
    async fn next(&mut self) -> Done {
        let done = match self {
            Self::AsDone(items) => items.next().await,
            Self::AsSent(items) => items.next().await,
        };
        match done {
            Some(done) => done,
            None => std::future::pending().await,
        }
    }
}

async fn done(item: Submitted) -> Done {
    let (outcome, share) = match item.pending {
        Ok(mut pending) => {
            let outcome = pending.next().await.unwrap_or(Err(StageError::Lost));
            (
                outcome.map_err(RequestError::from),
                Some(Arc::clone(&pending.bytes)),
            )
        }
        Err(error) => (Err(error), None),
    };
    let place = WindowPermit {
        bytes: item.bytes,
        _share: share,
    };
    Done {
        id: item.id,
        outcome,
        place,
    }
}

/// Way in which a stream ends once every item that was read has been answered.
enum Close {
    /// The client has sent all items.
    Sent,
    /// The client should continue in another stream.
    Elsewhere(StreamEnd),
    /// An error concerns all items.
    Failed(RequestError),
    /// The body of the request failed.
    Broken(Status),
}

impl Session {
    async fn run(mut self, requests: Requests, hurry: impl Future<Output = StreamEnd>) {
        let cause = tokio::select! {
            biased;
            cause = hurry => cause,
            () = self.converse(requests) => return,
        };
        // The items in the worker have been dropped with the conversation.
        let error = RequestError::StreamEnded {
            cause,
            items_read: self.n_read,
            items_answered: self.outbox.n_taken(),
        };
        let status = status::of_call(&error);
        self.set_code(status.code());
        self.tally.rest(status.code());
        self.outbox.abandon(status);
        // A stalled client reads the status later, without this session.
        let _ = tokio::time::timeout(END_PATIENCE, self.outbox.ended()).await;
    }

    fn set_code(&mut self, code: Code) {
        if let Some((ending, _)) = &mut self.course {
            ending.code = code;
        }
    }

    /// Reads and answers items until all are answered and the client has read
    /// the status.
    async fn converse(&mut self, requests: Requests) {
        let mut elsewhere = pin!(elsewhere(self.readiness.clone(), self.leaves_at));
        let mut requests = Some(requests);
        let mut plan: Option<Plan> = None;
        // Item that was read and waits for room.
        let mut waiting: Option<BoxFuture<Submitted>> = None;
        let mut in_flight = InFlight::new(pb::Order::AsDone);
        let mut close = Close::Sent;
        while requests.is_some() || waiting.is_some() || !in_flight.is_empty() {
            let window = plan.as_ref().map_or(1, |plan| plan.window);
            let may_read = requests.is_some() && waiting.is_none();
            let closed = tokio::select! {
                biased;
                done = in_flight.next() => self.answer(done, plan.as_ref()).err(),
                cause = &mut elsewhere, if requests.is_some() => Some(Close::Elsewhere(cause)),
                item = present(&mut waiting) => {
                    waiting = None;
                    in_flight.push(item);
                    None
                }
                request = read(&mut requests, &self.arrived, &self.outbox, window), if may_read => {
                    match self.take(request, &mut plan) {
                        Ok(Taken::Order(order)) => {
                            in_flight = InFlight::new(order);
                            None
                        }
                        Ok(Taken::Item(item)) => {
                            waiting = Some(item);
                            None
                        }
                        Err(closed) => Some(closed),
                    }
                }
            };
            // The first reason to close counts, except that the client has sent
            // all items: a later item without an answer must show in the
            // status. When the request is dropped, HTTP/2 discards whatever
            // else the client sends.
            if let Some(closed) = closed {
                requests = None;
                if matches!(close, Close::Sent) {
                    close = closed;
                }
            }
        }
        self.close(close).await;
    }

    async fn close(&mut self, close: Close) {
        let end = match close {
            Close::Sent => Ok(()),
            Close::Elsewhere(cause) => Err(status::of_call(&RequestError::StreamEnded {
                cause,
                items_read: self.n_read,
                items_answered: self.n_read - self.unanswered,
            })),
            Close::Failed(error) => Err(status::of_call(&error)),
            Close::Broken(status) => Err(arriving::ended(status, self.deadline)),
        };
        self.set_code(end.as_ref().err().map_or(Code::Ok, Status::code));
        self.outbox.finish(end);
        self.outbox.ended().await;
    }

    /// Handles a message, or returns the way in which it ends the stream.
    fn take(
        &mut self,
        request: Result<Option<pb::EmbedStreamRequest>, Status>,
        plan: &mut Option<Plan>,
    ) -> Result<Taken, Close> {
        let misused = |problem| Err(Close::Failed(RequestError::StreamMisused { problem }));
        let Some(request) = request.map_err(Close::Broken)? else {
            return match plan {
                Some(_) => Err(Close::Sent),
                None => misused("the request ended without an opening; send open first"),
            };
        };
        match (request.message, &plan) {
            (Some(Message::Open(options)), None) => {
                let (settled, order) = self.settle(&options).map_err(Close::Failed)?;
                *plan = Some(settled);
                Ok(Taken::Order(order))
            }
            (Some(Message::Item(item)), Some(plan)) => Ok(Taken::Item(self.item(item, plan))),
            (Some(Message::Item(_)), None) => misused("the first message must be open, not item"),
            (Some(Message::Open(_)), Some(_)) => misused("open was sent twice; send it once"),
            (None, _) => misused("a message has neither open nor item set"),
        }
    }

    fn settle(&self, options: &pb::EmbedStreamOptions) -> Result<(Plan, pb::Order), RequestError> {
        let embedding = Embedding::new(options, &self.model, &self.facts)?;
        let order = match convert::order(options.order)? {
            pb::Order::Unspecified | pb::Order::AsDone => pb::Order::AsDone,
            pb::Order::AsSent => pb::Order::AsSent,
        };
        let tensor_bytes = embedding.n_values() * convert::dtype_bytes(embedding.dtype);
        let response_bytes_max = self.limits.response_bytes_max.as_u64();
        if tensor_bytes as u64 > response_bytes_max {
            return Err(RequestError::ResponseTooLarge {
                given: tensor_bytes as u64,
                max: response_bytes_max,
            });
        }
        let window = match options.window {
            0 => self.limits.stream_window_max,
            window => window.min(self.limits.stream_window_max),
        };
        let opened = pb::EmbedStreamOpened {
            model_digest: self.model.digest.clone(),
            options: Some(pb::EmbedStreamOptions {
                order: order.into(),
                window,
                ..embedding.applied(&self.model)
            }),
        };
        let message = pb::embed_stream_response::Message::Opened(opened);
        let response = pb::EmbedStreamResponse {
            message: Some(message),
        };
        self.outbox.push(response, None);
        let answer_bytes = convert::answer_bytes(embedding.n_values(), embedding.dtype);
        self.arrived.beside(answer_bytes);
        let plan = Plan {
            answer_bytes,
            embedding,
            window: window as usize,
            bytes_max: self.admission.bytes().size_for(self.class) / STREAM_BYTES_PART,
        };
        Ok((plan, order))
    }

    /// Submits an item once there is room for it.
    fn item(&mut self, item: pb::EmbedStreamItem, plan: &Plan) -> BoxFuture<Submitted> {
        self.n_read += 1;
        self.tally.expect(1);
        self.outbox.hold();
        let arrived = self.arrived.take();
        let mut id = item.id;
        let picture = if id.len() > ID_BYTES_MAX {
            let given = id.len();
            id.truncate(id.floor_char_boundary(ID_BYTES_MAX));
            id.shrink_to_fit();
            Err(RequestError::IdTooLong {
                given,
                max: ID_BYTES_MAX,
            })
        } else {
            let source = item.image.and_then(|image| image.source);
            convert::picture(source, plan.embedding.preprocess)
        };
        let picture = match picture {
            Ok(picture) => picture,
            Err(error) => {
                return Box::pin(std::future::ready(Submitted {
                    id,
                    pending: Err(error),
                    bytes: 0,
                }));
            }
        };
        let request = convert::picture_bytes(&picture) + id.len();
        let bytes = request + plan.answer_bytes;
        let item = StreamItem {
            picture,
            work: plan.embedding.work(),
            caller: self.caller.clone(),
            class: self.class,
            bytes: Bytes {
                request,
                arrived,
                answer: plan.answer_bytes,
            },
            deadline: self.deadline,
            span: tracing::Span::current(),
            timeline: self.timeline.request(),
        };
        let (outbox, admission) = (Arc::clone(&self.outbox), self.admission.clone());
        let bytes_max = plan.bytes_max;
        let mut readiness = self.readiness.clone();
        Box::pin(async move {
            outbox.room(bytes, bytes_max).await;
            // A worker that drains does not wait for a caller's rate: items that
            // were read are answered before it ends.
            tokio::select! {
                () = item.caller.charge_when_due() => {}
                () = readiness.drained() => {}
            }
            let pending = admission.submit_when_room(item).await;
            let pending = pending.map_err(RequestError::from);
            Submitted { id, pending, bytes }
        })
    }

    /// Puts an item's answer into the outbox. An error that concerns all items
    /// closes the stream instead, and its item has no answer.
    fn answer(&mut self, item: Done, plan: Option<&Plan>) -> Result<(), Close> {
        let outcome = match (item.outcome, plan) {
            (Ok(answer), Some(plan)) => plan.embedding.tensor(answer),
            (Ok(_), None) => Err(StageError::Lost.into()),
            (Err(error), _) => Err(error),
        };
        self.tally
            .one(outcome.as_ref().map_or_else(status::code, |_| Code::Ok));
        let outcome = match outcome {
            Ok(tensor) => pb::embed_stream_result::Outcome::Embedding(tensor),
            Err(error) if ends_stream(&error) => {
                self.unanswered += 1;
                self.outbox.forget(&item.place);
                return Err(match error {
                    RequestError::Stage(
                        StageError::DeadlineExceeded { .. } | StageError::DeadlineTooShort { .. },
                    ) => Close::Elsewhere(StreamEnd::Deadline),
                    error => Close::Failed(error),
                });
            }
            Err(error) => pb::embed_stream_result::Outcome::Error(status::of_image(&error)),
        };
        let result = pb::EmbedStreamResult {
            id: item.id,
            outcome: Some(outcome),
        };
        let message = pb::embed_stream_response::Message::Result(result);
        let response = pb::EmbedStreamResponse {
            message: Some(message),
        };
        self.outbox.push(response, Some(item.place));
        Ok(())
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // Only after a panic: otherwise the end is set already, or the client
        // has disconnected.
        if std::thread::panicking() {
            self.set_code(Code::Internal);
            self.outbox
                .abandon(status::of_call(&StageError::Lost.into()));
        }
    }
}

/// Result of a message: the settled order of the opening, or an item that is
/// being submitted.
enum Taken {
    Order(pb::Order),
    Item(BoxFuture<Submitted>),
}

/// Returns true if an item's error ends its stream. An item that needs more
/// room than the worker has does not, since the next item may fit.
fn ends_stream(error: &RequestError) -> bool {
    error.ends_call() && !matches!(error, RequestError::Stage(StageError::NeverFits { .. }))
}

/// Awaits the future; for ever if there is none.
pub(super) async fn present<T>(future: &mut Option<BoxFuture<T>>) -> T {
    match future {
        Some(future) => future.await,
        None => std::future::pending().await,
    }
}

/// Reads the next message, once the window has a free place for an item.
pub(super) async fn read<Q: prost::Message + ScanMessage + Default, T>(
    requests: &mut Option<Streaming<Q>>,
    arrived: &Arrived,
    outbox: &Outbox<T>,
    window: usize,
) -> Result<Option<Q>, Status> {
    outbox.credit(window).await;
    let Some(requests) = requests else {
        return Ok(None);
    };
    let message = requests.message().await?;
    // The library's message is empty: it only tells that a message has arrived.
    match arrived.take_message() {
        Some(bytes) if message.is_some() => codec::decode(bytes).map(Some),
        _ => Ok(message),
    }
}

/// Resolves when the client should continue in another stream.
pub(super) async fn elsewhere(mut readiness: Readiness, leaves_at: Option<Instant>) -> StreamEnd {
    tokio::select! {
        () = readiness.drained() => StreamEnd::Draining,
        () = deadline::passed(leaves_at) => StreamEnd::ConnectionAge,
    }
}

/// Resolves when the stream must end at once, even with items in the worker.
pub(super) async fn hurry<T>(
    outbox: Arc<Outbox<T>>,
    deadline: Option<Instant>,
    idle_timeout: Duration,
    (mut readiness, drain_patience): (Readiness, Duration),
) -> StreamEnd {
    let stalled = async {
        readiness.drained().await;
        outbox.stalled(drain_patience).await;
    };
    tokio::select! {
        () = deadline::passed(deadline) => StreamEnd::Deadline,
        () = outbox.idle(idle_timeout) => StreamEnd::Idle,
        () = stalled => StreamEnd::Draining,
    }
}
