//! Sees every call from outside its handler: request id, span, duration, code
//! and deadline, for calls that never reach a handler too; and puts a request's
//! body on its way in through [`super::arriving`], an answer's on its way out
//! through [`super::leaving`].

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderValue, Request, Response};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument as _;

use super::arriving::{self, Arrived, MessageCompression, RequestFacts};
use super::leaving::{self, LeavingBody};
use super::{deadline, status};
use crate::proto::codec::Growth;
use crate::proto::{GrpcCode, Priority, RpcMethod};
use crate::serve::capacity::{CapacityPool, CapacityShare};
use crate::serve::error::{RequestStage, StageError};
use crate::serve::metrics::Metrics;
use crate::serve::readiness::Readiness;
use crate::serve::rpc::error::RequestError;

/// Bytes of a message to health checks and reflection, which is a name. They are
/// not counted: all of a connection's together are less than its window.
const NAME_BYTES_MAX: usize = 4 << 10;
/// Names a call in logs and in its response; taken from the caller if given.
const REQUEST_ID: &str = "x-request-id";
/// The class of a call, by its name.
const PRIORITY: &str = "imagegpt-priority";
/// A caller's request id longer than this is replaced: it goes into every log
/// line of the call.
const REQUEST_ID_LEN_MAX: usize = 128;

#[derive(Debug, Clone)]
pub(super) struct ObserveLayer {
    pub(super) metrics: Metrics,
    pub(super) request_bytes_max: u64,
    /// How long a request may take to arrive.
    pub(super) request_timeout: Duration,
    /// Where bytes that are arriving are counted.
    pub(super) bytes: CapacityPool,
    pub(super) readiness: Arc<Readiness>,
    pub(super) calls: CallsInProgress,
}

impl ObserveLayer {
    /// The request with a body that is looked after on its way in.
    fn arriving(
        &self,
        mut request: Request<Body>,
        method: RpcMethod,
        class: Priority,
    ) -> Request<Body> {
        // A request without an end: its messages are counted one by one, by its
        // handler.
        let is_stream = method.client_streams();
        let arrived = Arrived::default();
        let arrival = RequestFacts {
            bytes: Some(self.bytes.clone()),
            class,
            message_bytes_max: usize::try_from(self.request_bytes_max).unwrap_or(usize::MAX),
            compression: MessageCompression::take(request.headers_mut()),
            growth: Growth::of_method(method),
            is_stream,
            timeout: self.request_timeout,
            // A stream sees the drain by itself, and ends with its answers.
            readiness: (!is_stream).then(|| Arc::clone(&self.readiness)),
            arrived: arrived.clone(),
        };
        request.extensions_mut().insert(arrived);
        request.map(|body| arrival.body(body))
    }
}

/// How many calls are in progress, from their arrival until their answer has
/// been taken.
#[derive(Debug, Clone)]
pub(crate) struct CallsInProgress(Arc<watch::Sender<usize>>);

impl CallsInProgress {
    #[must_use]
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// How many there are now.
    #[must_use]
    pub(crate) fn count(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until there are none.
    pub(crate) async fn none(&self) {
        // The sender lives in self, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|&count| count == 0).await;
    }

    fn enter(&self) -> InProgress {
        self.0.send_modify(|count| *count += 1);
        InProgress(self.clone())
    }
}

impl Default for CallsInProgress {
    fn default() -> Self {
        Self::new()
    }
}

/// One call in progress.
#[derive(Debug)]
pub(super) struct InProgress(CallsInProgress);

impl Drop for InProgress {
    fn drop(&mut self) {
        self.0.0.send_modify(|count| *count -= 1);
    }
}

/// When a call must be answered; handlers find it in the request.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(pub(super) Option<Instant>);

/// A call's count and its place among those in progress. Observed calls end
/// with their response; a stream, whose code comes last, takes both over and
/// ends them itself.
#[derive(Debug, Clone)]
pub(super) struct CallCourse(Arc<Mutex<Option<(CallEnding, InProgress)>>>);

impl CallCourse {
    fn new(ending: CallEnding, in_progress: InProgress) -> Self {
        Self(Arc::new(Mutex::new(Some((ending, in_progress)))))
    }

    /// From now on the caller's, if nobody took it before.
    pub(super) fn take(&self) -> Option<(CallEnding, InProgress)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// An answer's share of the worker's bytes; handlers leave it in the response.
#[derive(Debug, Clone)]
pub(super) struct AnswerBytes {
    pub(super) bytes: Arc<CapacityShare>,
}

impl<S> Layer<S> for ObserveLayer {
    type Service = ObservedService<S>;

    fn layer(&self, inner: S) -> Self::Service {
        ObservedService {
            inner,
            observe: self.clone(),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct ObservedService<S> {
    inner: S,
    observe: ObserveLayer,
}

impl<S> Service<Request<Body>> for ObservedService<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let Some(method) = RpcMethod::of_path(request.uri().path()) else {
            // Health checks and reflection are not the worker's work. Their
            // messages are small, but may trickle in as well.
            let arrival = RequestFacts {
                bytes: None,
                class: Priority::Interactive,
                message_bytes_max: NAME_BYTES_MAX,
                compression: None,
                growth: Growth::NONE,
                is_stream: true,
                timeout: self.observe.request_timeout,
                readiness: None,
                arrived: Arrived::default(),
            };
            return Box::pin(self.inner.call(request.map(|body| arrival.body(body))));
        };
        let started = Instant::now();
        let id = request_id(request.headers());
        let trace_id = trace_id(request.headers()).unwrap_or_default();
        let span = tracing::info_span!(
            "call",
            method = method.name(),
            request_id = id.to_str().unwrap_or_default(),
            trace_id
        );
        let ending = CallEnding {
            metrics: self.observe.metrics.clone(),
            method,
            started,
            code: Code::Cancelled,
        };
        let deadline = deadline::of(request.headers(), started);
        let course = CallCourse::new(ending, self.observe.calls.enter());
        let request_bytes_max = self.observe.request_bytes_max;
        let call = class(request.headers(), method).map(|class| {
            let mut request = self.observe.arriving(request, method, class);
            if method.client_streams() || method.server_streams() {
                request.extensions_mut().insert(course.clone());
            }
            request.extensions_mut().insert(Deadline(deadline));
            request.extensions_mut().insert(class);
            span.in_scope(|| self.inner.call(request))
        });
        Box::pin(
            async move {
                // Named whole, so that the future owns all of it and its drop
                // counts the call.
                let course = course;
                let mut response = match call {
                    Ok(call) => until(deadline, call).await?,
                    Err(error) => status::of_call(&error).into_http(),
                };
                correct(response.headers_mut(), request_bytes_max, deadline);
                let in_progress = course.take().map(|(mut ending, in_progress)| {
                    ending.code = code(response.headers());
                    in_progress
                });
                response.headers_mut().insert(REQUEST_ID, id);
                let held = response.extensions_mut().remove::<AnswerBytes>();
                let taking = leaving::Taking::of_this_call(method.client_streams());
                Ok(response
                    .map(|body| Body::new(LeavingBody::new(body, taking, held, in_progress))))
            }
            .instrument(span),
        )
    }
}

/// The call's response, or DEADLINE_EXCEEDED when its time is up, be it that
/// the request was still arriving.
async fn until<F, E>(deadline: Option<Instant>, call: F) -> Result<Response<Body>, E>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    let Some(deadline) = deadline else {
        return call.await;
    };
    tokio::time::timeout_at(deadline.into(), call)
        .await
        .unwrap_or_else(|_| {
            let error = StageError::DeadlineExceeded {
                stage: RequestStage::Queue,
            };
            Ok(status::of_stage(error).into_http())
        })
}

/// The class that a call belongs to: as its metadata says, else by its method.
fn class(headers: &HeaderMap, method: RpcMethod) -> Result<Priority, RequestError> {
    let Some(given) = headers.get(PRIORITY) else {
        return Ok(match method {
            // A job over many images, unless its caller says otherwise.
            RpcMethod::EmbedStream => Priority::Bulk,
            _ => Priority::Interactive,
        });
    };
    Priority::ALL
        .into_iter()
        .find(|class| given == class.label())
        .ok_or_else(|| RequestError::PriorityUnknown {
            given: String::from_utf8_lossy(given.as_bytes()).into_owned(),
        })
}

/// Counts the call when it ends, also when its future is dropped because the
/// caller went away.
#[derive(Debug)]
pub(super) struct CallEnding {
    metrics: Metrics,
    method: RpcMethod,
    started: Instant,
    pub(super) code: Code,
}

impl Drop for CallEnding {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        let code = GrpcCode::from(self.code);
        self.metrics.request(self.method, code, elapsed);
        match self.code {
            Code::Internal | Code::Unknown => tracing::warn!(%code, ?elapsed, "call failed"),
            _ => tracing::debug!(%code, ?elapsed, "call ended"),
        }
    }
}

/// A unary call that failed has its code in the headers; one that did not has
/// it in the trailers, which are yet to come.
fn code(headers: &HeaderMap) -> Code {
    headers
        .get("grpc-status")
        .map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// Errors of the library in the worker's words: a message over the limit, and a
/// request that broke off.
fn correct(headers: &mut HeaderMap, request_bytes_max: u64, deadline: Option<Instant>) {
    let message = headers
        .get("grpc-message")
        .map_or(&b""[..], HeaderValue::as_bytes);
    let code = code(headers);
    let status = if status::is_over_limit(code, message) {
        status::of_call(&RequestError::MessageTooLarge {
            max: request_bytes_max,
        })
    } else if code == Code::Aborted {
        arriving::ended(Status::aborted(""), deadline)
    } else {
        return;
    };
    for name in ["grpc-status", "grpc-message", "grpc-status-details-bin"] {
        headers.remove(name);
    }
    // Fails only for metadata that is not ASCII, of which there is none.
    if status.add_header(headers).is_err() {
        headers.insert("grpc-status", HeaderValue::from(status.code() as i32));
    }
}

fn request_id(headers: &HeaderMap) -> HeaderValue {
    headers
        .get(REQUEST_ID)
        .filter(|id| {
            let text = id.to_str().unwrap_or_default();
            !text.is_empty() && text.len() <= REQUEST_ID_LEN_MAX
        })
        .cloned()
        .unwrap_or_else(generated_id)
}

/// Unique in the process by a counter, and among processes by the time of
/// start and the process id.
fn generated_id() -> HeaderValue {
    static PREFIX: std::sync::LazyLock<u64> = std::sync::LazyLock::new(|| {
        use std::hash::{BuildHasher as _, RandomState};
        RandomState::new().hash_one(std::process::id())
    });
    static COUNTER: AtomicU64 = AtomicU64::new(0);
    let count = COUNTER.fetch_add(1, Ordering::Relaxed);
    HeaderValue::from_str(&format!("{:016x}-{count:x}", *PREFIX))
        .unwrap_or_else(|_| HeaderValue::from_static("unknown"))
}

/// The trace id of a W3C `traceparent`: version, 32 hexadecimal digits that
/// are not all zero, parent id, flags.
fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let value = headers.get("traceparent")?.to_str().ok()?;
    let mut parts = value.split('-');
    let (version, trace, parent, flags) =
        (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
    let hex = |text: &str, len| {
        text.len() == len
            && text
                .bytes()
                .all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b))
    };
    let valid = hex(version, 2)
        && version != "ff"
        && hex(trace, 32)
        && trace.bytes().any(|b| b != b'0')
        && hex(parent, 16)
        && parent.bytes().any(|b| b != b'0')
        && hex(flags, 2);
    valid.then_some(trace)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(name: &'static str, value: &str) -> HeaderMap {
        let mut headers = HeaderMap::new();
        headers.insert(name, value.parse().expect("a header value"));
        headers
    }

    #[test]
    fn methods() {
        let check = |path, expected| assert_eq!(RpcMethod::of_path(path), expected, "{path}");
        check("/imagegpt.v1.ImageGptService/Embed", Some(RpcMethod::Embed));
        check("/imagegpt.v1.ImageGptService/Nope", Some(RpcMethod::Other));
        let infer = "/inference.GRPCInferenceService/ModelInfer";
        check(infer, Some(RpcMethod::ModelInfer));
        check("/grpc.health.v1.Health/Check", None);
        let streams = |method: RpcMethod| (method.client_streams(), method.server_streams());
        assert_eq!(streams(RpcMethod::Embed), (false, false));
        assert_eq!(streams(RpcMethod::EmbedStream), (true, true));
        assert_eq!(streams(RpcMethod::Generate), (false, true));
    }

    #[test]
    fn classes() {
        let check = |headers: &HeaderMap, method, expected: Result<Priority, &str>| match (
            class(headers, method),
            expected,
        ) {
            (Ok(got), Ok(expected)) => assert_eq!(got, expected),
            (Err(error), Err(words)) => assert!(error.to_string().contains(words)),
            (got, _) => panic!("{got:?}"),
        };
        check(
            &HeaderMap::new(),
            RpcMethod::Embed,
            Ok(Priority::Interactive),
        );
        check(
            &HeaderMap::new(),
            RpcMethod::EmbedStream,
            Ok(Priority::Bulk),
        );
        check(
            &headers(PRIORITY, "bulk"),
            RpcMethod::Embed,
            Ok(Priority::Bulk),
        );
        let interactive = headers(PRIORITY, "interactive");
        check(
            &interactive,
            RpcMethod::EmbedStream,
            Ok(Priority::Interactive),
        );
        check(
            &headers(PRIORITY, "urgent"),
            RpcMethod::Embed,
            Err("\"urgent\""),
        );
    }

    #[test]
    fn trace_ids() {
        let check = |value, expected| {
            assert_eq!(
                trace_id(&headers("traceparent", value)),
                expected,
                "{value}"
            );
        };
        let trace = "4bf92f3577b34da6a3ce929d0e0e4736";
        check(
            "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            Some(trace),
        );
        check(
            "00-00000000000000000000000000000000-00f067aa0ba902b7-01",
            None,
        );
        check(
            "00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01",
            None,
        );
        check(
            "ff-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01",
            None,
        );
        check(
            "00-4BF92F3577B34DA6A3CE929D0E0E4736-00f067aa0ba902b7-01",
            None,
        );
        check("nonsense", None);
    }

    #[test]
    fn request_ids_are_kept_or_made() {
        assert_eq!(request_id(&headers(REQUEST_ID, "abc")), "abc");
        let long = "x".repeat(REQUEST_ID_LEN_MAX + 1);
        assert_ne!(request_id(&headers(REQUEST_ID, &long)), long.as_str());
        assert_ne!(request_id(&HeaderMap::new()), request_id(&HeaderMap::new()));
    }

    #[test]
    fn a_message_over_the_limit_is_resource_exhausted() {
        let mut over = headers("grpc-status", "11");
        correct(&mut over, 1000, None);
        assert_eq!(code(&over), Code::ResourceExhausted);
        let mut other = headers("grpc-status", "3");
        correct(&mut other, 1000, None);
        assert_eq!(code(&other), Code::InvalidArgument);
        assert_eq!(code(&HeaderMap::new()), Code::Ok);
    }
}
