//! ModelStreamInfer: a stream of requests, answered in their order, in bounded
//! memory.
//!
//! As in EmbedStream, a task reads requests, submits them and puts their
//! answers into an outbox, and a request holds a place in the stream's window
//! until its answer has left. Unlike EmbedStream, the worker rejects a request
//! when it is full, as ModelInfer does, and a request that fails does not end
//! the stream.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Instant;

use futures_util::stream::FuturesOrdered;
use tokio_stream::StreamExt as _;
use tonic::{Code, Request, Status, Streaming};
use tracing::Instrument as _;

use super::Oip;
use super::infer::PreparedInfer;
use crate::proto::GrpcCode;
use crate::proto::inference::{ModelInferRequest, ModelInferResponse, ModelStreamInferResponse};
use crate::serve::capacity::CapacityShare;
use crate::serve::error::StageError;
use crate::serve::metrics::StreamOpen;
use crate::serve::rpc::arriving::Arrived;
use crate::serve::rpc::calling::CallOrigin;
use crate::serve::rpc::error::{RequestError, StreamEnd};
use crate::serve::rpc::listen::Peer;
use crate::serve::rpc::observe::{AnswerBytes, CallCourse, CallEnding, InProgress};
use crate::serve::rpc::stream::outbox::{Outbox, WindowPermit};
use crate::serve::rpc::stream::{
    BoxFuture, DRAIN_PATIENCE_MAX, END_PATIENCE, STREAM_BYTES_PART, elsewhere, hurry, outbox,
    present, read,
};
use crate::serve::rpc::{arriving, status};

type Requests = Streaming<ModelInferRequest>;

/// Opens a stream, which needs no opening message.
pub(super) fn open(oip: &Oip, request: Request<Requests>) -> Result<InferAnswers, RequestError> {
    let service = &oip.0;
    service.facts()?;
    let (_, extensions, requests) = request.into_parts();
    let origin = CallOrigin::of(&extensions);
    let arrived = extensions.get::<Arrived>().cloned().unwrap_or_default();
    let outbox = Arc::new(Outbox::new(arrived.clone()));
    let patience = DRAIN_PATIENCE_MAX.min(service.shutdown_grace_period / 2);
    let hurry = hurry(
        Arc::clone(&outbox),
        origin.deadline,
        service.limits.stream_idle_timeout,
        (service.readiness.clone(), patience),
    );
    let bytes_max = service.admission.bytes().size_for(origin.class) / STREAM_BYTES_PART;
    let session = Session {
        leaves_at: extensions.get::<Peer>().and_then(Peer::leaves_at),
        arrived,
        outbox: Arc::clone(&outbox),
        window: service.limits.stream_window_max as usize,
        bytes_max,
        origin,
        n_read: 0,
        _open: service.metrics.stream(),
        course: extensions.get::<CallCourse>().and_then(CallCourse::take),
        oip: oip.clone(),
    };
    let session = session.run(requests, hurry).in_current_span();
    Ok(InferAnswers::new(outbox, session))
}

/// Response of a ModelStreamInfer.
pub(in crate::serve::rpc) type InferAnswers = outbox::OutboxAnswers<ModelStreamInferResponse>;

/// Task that reads a stream's requests and produces its [`InferAnswers`].
#[derive(Debug)]
struct Session {
    oip: Oip,
    origin: CallOrigin,
    /// Share of the latest message.
    arrived: Arrived,
    /// Time at which the connection is asked to close, which it cannot do
    /// before the stream ends.
    leaves_at: Option<Instant>,
    outbox: Arc<Outbox<ModelStreamInferResponse>>,
    /// Limit on the requests that are held at the same time.
    window: usize,
    /// Limit on the bytes of all held requests together.
    bytes_max: usize,
    n_read: u64,
    _open: StreamOpen,
    /// Guards that count the call when the session ends.
    course: Option<(CallEnding, InProgress)>,
}

/// Request that was read and may be submitted.
struct Ready {
    id: String,
    arrived: Instant,
    prepared: Result<PreparedInfer, RequestError>,
    /// Share that was taken for the message while it arrived.
    share: CapacityShare,
    /// Bytes of the request that count against the stream's own limit.
    bytes: usize,
}

/// Request whose response is ready.
struct Done {
    response: ModelStreamInferResponse,
    place: WindowPermit,
}

impl Session {
    async fn run(mut self, requests: Requests, hurry: impl Future<Output = StreamEnd>) {
        let cause = tokio::select! {
            biased;
            cause = hurry => cause,
            () = self.converse(requests) => return,
        };
        // The requests in the worker have been dropped with the conversation.
        let status = self.ended(cause, self.outbox.n_taken());
        self.set_code(status.code());
        self.outbox.abandon(status);
        // A stalled client reads the status later, without this session.
        let _ = tokio::time::timeout(END_PATIENCE, self.outbox.ended()).await;
    }

    fn ended(&self, cause: StreamEnd, items_answered: u64) -> Status {
        status::of_call(&RequestError::StreamEnded {
            cause,
            items_read: self.n_read,
            items_answered,
        })
    }

    fn set_code(&mut self, code: Code) {
        if let Some((ending, _)) = &mut self.course {
            ending.code = code;
        }
    }

    /// Reads and answers requests until all are answered and the client has
    /// read the status.
    async fn converse(&mut self, requests: Requests) {
        let readiness = self.oip.0.readiness.clone();
        let mut elsewhere = pin!(elsewhere(readiness, self.leaves_at));
        let mut requests = Some(requests);
        // Request that was read and waits for room within the stream's own
        // limit.
        let mut waiting: Option<BoxFuture<Ready>> = None;
        let mut in_flight: FuturesOrdered<BoxFuture<Done>> = FuturesOrdered::new();
        let mut end = Ok(());
        while requests.is_some() || waiting.is_some() || !in_flight.is_empty() {
            let may_read = requests.is_some() && waiting.is_none();
            tokio::select! {
                biased;
                Some(done) = in_flight.next(), if !in_flight.is_empty() => {
                    self.outbox.push(done.response, Some(done.place));
                }
                cause = &mut elsewhere, if requests.is_some() => {
                    requests = None;
                    end = Err(self.ended(cause, self.n_read));
                }
                ready = present(&mut waiting) => {
                    waiting = None;
                    in_flight.push_back(self.submit(ready));
                }
                request = read(&mut requests, &self.arrived, &self.outbox, self.window), if may_read => {
                    match request {
                        Ok(Some(request)) => waiting = Some(self.take(request)),
                        Ok(None) => requests = None,
                        Err(status) => {
                            requests = None;
                            end = Err(arriving::ended(status, self.origin.deadline));
                        }
                    }
                }
            }
        }
        self.set_code(end.as_ref().err().map_or(Code::Ok, Status::code));
        self.outbox.finish(end);
        self.outbox.ended().await;
    }

    fn take(&mut self, request: ModelInferRequest) -> BoxFuture<Ready> {
        self.n_read += 1;
        self.outbox.hold();
        let arrived = Instant::now();
        let share = self.arrived.take();
        let id = request.id.clone();
        let prepared = PreparedInfer::new(&self.oip, request, self.origin.clone());
        let bytes = prepared.as_ref().map_or(0, PreparedInfer::bytes);
        let (outbox, bytes_max) = (Arc::clone(&self.outbox), self.bytes_max);
        Box::pin(async move {
            outbox.room(bytes, bytes_max).await;
            Ready {
                id,
                arrived,
                prepared,
                share,
                bytes,
            }
        })
    }

    fn submit(&self, ready: Ready) -> BoxFuture<Done> {
        let oip = self.oip.clone();
        // Requests are submitted at once, so that they enter the queue in their
        // order.
        let share = ready.share;
        let running = ready
            .prepared
            .and_then(|prepared| prepared.submit(&oip, share));
        Box::pin(async move {
            let outcome = match running {
                Ok(running) => running.finish(&oip).await,
                Err(error) => Err(error),
            };
            let elapsed = ready.arrived.elapsed();
            oip.0.metrics.totals().call(outcome.is_ok(), elapsed);
            let (response, held) = answer(&oip, ready.id, outcome);
            let place = WindowPermit {
                bytes: ready.bytes,
                _share: held.map(|held| held.bytes),
            };
            Done { response, place }
        })
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

/// Makes the response to a request: its answer, or its error with the id of the
/// request.
fn answer(
    oip: &Oip,
    id: String,
    outcome: Result<(ModelInferResponse, AnswerBytes), RequestError>,
) -> (ModelStreamInferResponse, Option<AnswerBytes>) {
    let (error_message, response, held) = match outcome {
        Ok((response, held)) => (String::new(), response, Some(held)),
        Err(error) => {
            tracing::debug!(id, %error, "a request of a stream failed");
            let response = ModelInferResponse {
                model_name: oip.0.model.name.clone(),
                model_version: super::VERSION.to_owned(),
                id,
                ..Default::default()
            };
            // The message has no field for the code, so the text begins with
            // it.
            let code = GrpcCode::from(status::code(&error));
            (format!("{code}: {error}"), response, None)
        }
    };
    let response = ModelStreamInferResponse {
        error_message,
        infer_response: Some(response),
    };
    (response, held)
}
