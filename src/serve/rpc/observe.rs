//! Layer around all handlers, which gives every call its request id, tracing
//! span, duration, code and deadline, even if the call never reaches a handler.
//! The layer also passes the body of a request through [`super::arriving`], and
//! the body of an answer through [`super::leaving`].

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::{HeaderMap, HeaderName, HeaderValue, Request, Response};
use tokio::sync::watch;
use tonic::body::Body;
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument as _;

use super::arriving::{self, Arrived, MessageCompression, RequestFacts};
use super::calling::{CallFacts, CallerSlot};
use super::leaving::{self, LeavingBody};
use super::listen::Peer;
use super::report::{self, CallReport};
use super::{deadline, status};
use crate::excerpt::Excerpt;
use crate::proto::codec::Growth;
use crate::proto::{GrpcCode, Priority, RpcMethod};
use crate::serve::caller::Caller;
use crate::serve::capacity::{CapacityPool, CapacityShare};
use crate::serve::error::{RequestStage, StageError};
use crate::serve::metrics::Metrics;
use crate::serve::readiness::Readiness;
use crate::serve::rpc::error::RequestError;
use crate::serve::timeline::CallTimeline;
use crate::serve::trace::{CallSpan, TraceHeaders, Traces, tracestate};

/// Largest size of a message to health checks and reflection, which holds a
/// name. These bytes are not counted: all of them on one connection are less
/// than its window.
const NAME_BYTES_MAX: usize = 4 << 10;
/// Header with the id of a call in logs and in its response; the caller's id is
/// used if there is one.
const REQUEST_ID: &str = "x-request-id";
/// Header with the name of a call's priority class.
pub(super) const PRIORITY: &str = "imagegpt-priority";
/// Metadata that says one thing about a call. (`authorization` is read where a
/// call is authenticated. Of several request ids the first counts: they change
/// no answer, and a proxy may add its own.)
const SINGLE: [HeaderName; 2] = [
    HeaderName::from_static(PRIORITY),
    HeaderName::from_static("grpc-timeout"),
];
/// Largest length of a caller's request id; a longer id is replaced, since the
/// id is in every log line of the call.
const REQUEST_ID_LEN_MAX: usize = 128;

#[derive(Debug, Clone)]
pub(super) struct ObserveLayer {
    pub(super) metrics: Metrics,
    pub(super) request_bytes_max: u64,
    /// Longest time for a request to arrive.
    pub(super) request_timeout: Duration,
    /// Pool in which the bytes of arriving requests are counted.
    pub(super) bytes: CapacityPool,
    pub(super) readiness: Arc<Readiness>,
    pub(super) calls: CallsInProgress,
    pub(super) traces: Traces,
    /// True if each call has a line in the access log.
    pub(super) access_log: bool,
}

impl ObserveLayer {
    /// Wraps the body of a request so that it is counted while it arrives.
    fn arriving(
        &self,
        mut request: Request<Body>,
        method: RpcMethod,
        class: Priority,
        caller: &CallerSlot,
    ) -> Request<Body> {
        // The messages of a stream are counted one by one, by its handler.
        let is_stream = method.client_streams();
        let arrived = Arrived::default();
        let arrival = RequestFacts {
            bytes: Some(self.bytes.clone()),
            class,
            caller: caller.clone(),
            message_bytes_max: usize::try_from(self.request_bytes_max).unwrap_or(usize::MAX),
            compression: MessageCompression::take(request.headers_mut()),
            growth: Growth::of_method(method),
            is_stream,
            timeout: self.request_timeout,
            // A stream's session watches the drain itself, and ends after its
            // answers.
            readiness: (!is_stream).then(|| Arc::clone(&self.readiness)),
            arrived: arrived.clone(),
        };
        request.extensions_mut().insert(arrived);
        request.map(|body| arrival.body(body))
    }
}

/// Counter of calls in progress; a call counts from its arrival until its
/// answer has been written.
#[derive(Debug, Clone)]
pub(crate) struct CallsInProgress(Arc<watch::Sender<usize>>);

impl CallsInProgress {
    #[must_use]
    pub(crate) fn new() -> Self {
        Self(Arc::new(watch::Sender::new(0)))
    }

    /// Returns the number of calls in progress.
    #[must_use]
    pub(crate) fn count(&self) -> usize {
        *self.0.borrow()
    }

    /// Waits until no call is in progress.
    pub(crate) async fn none(&self) {
        // The sender lives in self, so waiting cannot fail.
        let _ = self.0.subscribe().wait_for(|&count| count == 0).await;
    }

    fn enter(&self, report: CallReport) -> InProgress {
        self.0.send_modify(|count| *count += 1);
        InProgress {
            calls: self.clone(),
            _report: report,
        }
    }
}

impl Default for CallsInProgress {
    fn default() -> Self {
        Self::new()
    }
}

/// Guard of one call in progress, which reports the call when its answer has
/// been written.
#[derive(Debug)]
pub(super) struct InProgress {
    calls: CallsInProgress,
    _report: CallReport,
}

impl Drop for InProgress {
    fn drop(&mut self) {
        self.calls.0.send_modify(|count| *count -= 1);
    }
}

/// Guards of a call: its metrics and its place among the calls in progress. The
/// layer ends a unary call with its response; a stream, whose code comes last,
/// takes both guards and ends the call itself.
#[derive(Debug, Clone)]
pub(super) struct CallCourse(Arc<Mutex<Option<(CallEnding, InProgress)>>>);

impl CallCourse {
    fn new(ending: CallEnding, in_progress: InProgress) -> Self {
        Self(Arc::new(Mutex::new(Some((ending, in_progress)))))
    }

    /// Takes the guards, if they were not taken before.
    pub(super) fn take(&self) -> Option<(CallEnding, InProgress)> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// Share of the worker's bytes that an answer holds; handlers put it into the
/// extensions of the response.
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

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let Some(method) = RpcMethod::of_path(request.uri().path()) else {
            // Health checks and reflection are not counted as work. Their
            // messages are small, but may also arrive slowly.
            let arrival = RequestFacts {
                bytes: None,
                class: Priority::Interactive,
                caller: CallerSlot::default(),
                message_bytes_max: NAME_BYTES_MAX,
                compression: MessageCompression::take(request.headers_mut()),
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
        let headers = || trace_headers(request.headers());
        let call_span = self.observe.traces.call(headers, method.name());
        let sampled_id = call_span.as_ref().map(CallSpan::trace_id);
        let given_id = trace_id(request.headers()).unwrap_or_default();
        let span = tracing::info_span!(
            "call",
            method = method.name(),
            request_id = id.to_str().unwrap_or_default(),
            trace_id = sampled_id.as_deref().unwrap_or(given_id),
            caller = tracing::field::Empty
        );
        let timeline = CallTimeline::new(started, call_span, method.client_streams());
        let caller = CallerSlot::default();
        let report = CallReport {
            timeline: timeline.clone(),
            method,
            caller: caller.clone(),
            peer: request.extensions().get::<Peer>().and_then(|p| p.addr),
            request_id: id.clone(),
            log_span: self.observe.access_log.then(|| span.clone()),
        };
        let ending = CallEnding {
            metrics: self.observe.metrics.clone(),
            method,
            caller: caller.clone(),
            started,
            code: Code::Cancelled,
            timeline: timeline.clone(),
        };
        let deadline = deadline::of(request.headers(), started);
        let course = CallCourse::new(ending, self.observe.calls.enter(report));
        let request_bytes_max = self.observe.request_bytes_max;
        let class =
            single(request.headers(), &SINGLE).and_then(|()| class(request.headers(), method));
        let call = class.map(|class| {
            let mut request = self.observe.arriving(request, method, class, &caller);
            if method.client_streams() || method.server_streams() {
                request.extensions_mut().insert(course.clone());
            }
            request.extensions_mut().insert(CallFacts {
                caller,
                class,
                deadline,
                timeline: timeline.clone(),
            });
            span.in_scope(|| self.inner.call(request))
        });
        Box::pin(
            async move {
                // The whole value is moved into the future, so that dropping
                // the future counts the call.
                let course = course;
                let mut response = match call {
                    Ok(call) => until(deadline, &timeline, call).await?,
                    Err(error) => status::of_call(&error).into_http(),
                };
                correct(response.headers_mut(), request_bytes_max, deadline);
                let in_progress = course.take().map(|(mut ending, in_progress)| {
                    ending.code = code(response.headers());
                    in_progress
                });
                response.headers_mut().insert(REQUEST_ID, id);
                if response.headers().contains_key("grpc-status") {
                    // A response without a body has its trailers here.
                    let timing = report::timing(&timeline);
                    response.headers_mut().insert(report::TIMING, timing);
                }
                let held = response.extensions_mut().remove::<AnswerBytes>();
                let taking = leaving::Taking::of_this_call(method.client_streams());
                Ok(response.map(|body| {
                    Body::new(LeavingBody::new(
                        body,
                        taking,
                        held,
                        in_progress,
                        Some(timeline),
                    ))
                }))
            }
            .instrument(span),
        )
    }
}

/// Awaits a call's response, or answers DEADLINE_EXCEEDED at its deadline, even
/// if the request is still arriving.
async fn until<F, E>(
    deadline: Option<Instant>,
    timeline: &CallTimeline,
    call: F,
) -> Result<Response<Body>, E>
where
    F: Future<Output = Result<Response<Body>, E>>,
{
    let Some(deadline) = deadline else {
        return call.await;
    };
    tokio::time::timeout_at(deadline.into(), call)
        .await
        .unwrap_or_else(|_| {
            let error = if timeline.has_arrived() {
                let stage = RequestStage::Queue;
                StageError::DeadlineExceeded { stage }.into()
            } else {
                RequestError::RequestLate
            };
            Ok(status::of_call(&error).into_http())
        })
}

/// Returns the priority class of a call, from its metadata or else by its
/// method.
fn class(headers: &HeaderMap, method: RpcMethod) -> Result<Priority, RequestError> {
    let Some(given) = headers.get(PRIORITY) else {
        return Ok(match method {
            // A stream is usually a job over many images.
            RpcMethod::EmbedStream => Priority::Bulk,
            _ => Priority::Interactive,
        });
    };
    Priority::ALL
        .into_iter()
        .find(|class| given == class.label())
        .ok_or_else(|| RequestError::PriorityUnknown {
            given: Excerpt::of_bytes(given.as_bytes()),
        })
}

/// Checks that metadata that can have one value does not have several: the
/// worker cannot know which of them the caller means.
pub(super) fn single(headers: &HeaderMap, names: &[HeaderName]) -> Result<(), RequestError> {
    for name in names {
        let mut values = headers.get_all(name).iter();
        let first = values.next();
        if values.any(|value| Some(value) != first) {
            return Err(RequestError::MetadataRepeated { name: name.clone() });
        }
    }
    Ok(())
}

/// Guard that counts a call when it ends, also if its future is dropped because
/// the caller disconnected.
#[derive(Debug)]
pub(super) struct CallEnding {
    metrics: Metrics,
    method: RpcMethod,
    caller: CallerSlot,
    started: Instant,
    pub(super) code: Code,
    /// Times of the call, whose report is made later.
    timeline: CallTimeline,
}

impl Drop for CallEnding {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        let code = GrpcCode::from(self.code);
        self.timeline.ended(code);
        let caller = self.caller.caller().map_or("", Caller::label);
        self.metrics.request(self.method, code, caller, elapsed);
        match self.code {
            Code::Internal | Code::Unknown => tracing::warn!(%code, ?elapsed, "call failed"),
            _ => tracing::debug!(%code, ?elapsed, "call ended"),
        }
    }
}

/// Returns the code of a response by its headers: a failed unary call has its
/// code there, while a successful call has it in the trailers, which come
/// later.
fn code(headers: &HeaderMap) -> Code {
    headers
        .get("grpc-status")
        .map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// Replaces two statuses of the library by the worker's own: for a message over
/// the limit, and for a request that broke off.
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
    // Adding the header fails only for metadata that is not ASCII; there is
    // none.
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

/// Returns a new request id, which is unique in the process by a counter, and
/// among processes by a random prefix.
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

/// Returns the headers that say to which trace a call belongs.
fn trace_headers(headers: &HeaderMap) -> TraceHeaders<'_> {
    let parent = parent(headers).filter(|_| trace_id(headers).is_some());
    let states = headers.get_all("tracestate").iter();
    TraceHeaders {
        traceparent: parent.and_then(|parent| parent.to_str().ok()),
        tracestate: tracestate(states.map(HeaderValue::as_bytes)),
    }
}

/// Returns the header `traceparent`; of several parents none is the parent.
fn parent(headers: &HeaderMap) -> Option<&HeaderValue> {
    let mut parents = headers.get_all("traceparent").iter();
    parents.next().filter(|_| parents.next().is_none())
}

/// Returns the trace id of a W3C `traceparent` header, which has a version, the
/// trace id (32 hexadecimal digits, not all zero), a parent id and flags.
fn trace_id(headers: &HeaderMap) -> Option<&str> {
    let value = parent(headers)?.to_str().ok()?;
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
        // Of several parents none is the parent.
        let mut several = headers("traceparent", &format!("00-{trace}-00f067aa0ba902b7-01"));
        assert_eq!(trace_id(&several), Some(trace));
        let other = several["traceparent"].clone();
        several.append("traceparent", other);
        assert_eq!(trace_id(&several), None);
    }

    #[test]
    fn metadata_with_one_value_has_one() {
        for name in SINGLE {
            let mut given = HeaderMap::new();
            for _ in 0..2 {
                given.append(&name, HeaderValue::from_static("bulk"));
            }
            assert!(single(&given, &SINGLE).is_ok(), "{name}");
            given.append(&name, HeaderValue::from_static("interactive"));
            let error = single(&given, &SINGLE).expect_err("two values").to_string();
            assert!(error.starts_with(name.as_str()), "{error}");
        }
        // Lists may go on in another header.
        let mut given = headers("tracestate", "a=1");
        given.append("tracestate", HeaderValue::from_static("b=2"));
        assert!(single(&given, &SINGLE).is_ok());
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
