//! Sees every call from outside its handler: request id, span, duration and
//! code, for calls that never reach a handler too.

use std::future::Future;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::Instant;

use http::{HeaderMap, HeaderValue, Request, Response};
use tonic::{Code, Status};
use tower::{Layer, Service};
use tracing::Instrument as _;

use super::status;
use crate::metrics::{METHODS, Metrics};

/// Names a call in logs and in its response; taken from the caller if given.
const REQUEST_ID: &str = "x-request-id";
/// A caller's request id longer than this is replaced: it goes into every log
/// line of the call.
const REQUEST_ID_LEN_MAX: usize = 128;

#[derive(Debug, Clone)]
pub(super) struct Observe {
    pub(super) metrics: Metrics,
    pub(super) request_bytes_max: u64,
}

impl<S> Layer<S> for Observe {
    type Service = Observed<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Observed {
            inner,
            observe: self.clone(),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Observed<S> {
    inner: S,
    observe: Observe,
}

impl<S, B, R> Service<Request<B>> for Observed<S>
where
    S: Service<Request<B>, Response = Response<R>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<B>) -> Self::Future {
        let Some(method) = method(request.uri().path()) else {
            // Health checks and reflection are not the worker's work.
            return Box::pin(self.inner.call(request));
        };
        let id = request_id(request.headers());
        let trace_id = trace_id(request.headers()).unwrap_or_default();
        let span = tracing::info_span!(
            "call",
            method,
            request_id = id.to_str().unwrap_or_default(),
            trace_id
        );
        let ending = Ending {
            metrics: self.observe.metrics.clone(),
            method,
            started: Instant::now(),
            code: Code::Cancelled,
        };
        let request_bytes_max = self.observe.request_bytes_max;
        let call = span.in_scope(|| self.inner.call(request));
        Box::pin(
            async move {
                // Named whole, so that the future owns all of it and its drop
                // counts the call.
                let mut ending = ending;
                let mut response = call.await?;
                correct(response.headers_mut(), request_bytes_max);
                ending.code = code(response.headers());
                response.headers_mut().insert(REQUEST_ID, id);
                Ok(response)
            }
            .instrument(span),
        )
    }
}

/// Counts the call when it ends, also when its future is dropped because the
/// caller went away.
struct Ending {
    metrics: Metrics,
    method: &'static str,
    started: Instant,
    code: Code,
}

impl Drop for Ending {
    fn drop(&mut self) {
        let elapsed = self.started.elapsed();
        let code = status::name(self.code);
        self.metrics.request(self.method, code, elapsed);
        match self.code {
            Code::Internal | Code::Unknown => tracing::warn!(code, ?elapsed, "call failed"),
            _ => tracing::debug!(code, ?elapsed, "call ended"),
        }
    }
}

/// The method of our service that a path names, `other` for one it lacks.
fn method(path: &str) -> Option<&'static str> {
    let method = path.strip_prefix("/imagegpt.v1.ImageGptService/")?;
    let known = METHODS.iter().find(|&&known| known == method);
    Some(known.copied().unwrap_or("other"))
}

/// A unary call that failed has its code in the headers; one that did not has
/// it in the trailers, which are yet to come.
fn code(headers: &HeaderMap) -> Code {
    headers
        .get("grpc-status")
        .map_or(Code::Ok, |code| Code::from_bytes(code.as_bytes()))
}

/// tonic answers a message over the limit with OUT_OF_RANGE, where gRPC's own
/// libraries say RESOURCE_EXHAUSTED; no handler of ours uses the former.
fn correct(headers: &mut HeaderMap, request_bytes_max: u64) {
    if code(headers) != Code::OutOfRange {
        return;
    }
    let status = Status::resource_exhausted(format!(
        "request: the message is over the limit of {request_bytes_max} bytes \
         (--request-bytes-max); send fewer or smaller images a call"
    ));
    for name in ["grpc-status", "grpc-message"] {
        headers.remove(name);
    }
    // Fails only for metadata that is not ASCII, of which there is none.
    if status.add_header(headers).is_err() {
        headers.insert("grpc-status", HeaderValue::from_static("8"));
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
        assert_eq!(method("/imagegpt.v1.ImageGptService/Embed"), Some("Embed"));
        assert_eq!(method("/imagegpt.v1.ImageGptService/Nope"), Some("other"));
        assert_eq!(method("/grpc.health.v1.Health/Check"), None);
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
        correct(&mut over, 1000);
        assert_eq!(code(&over), Code::ResourceExhausted);
        let mut other = headers("grpc-status", "3");
        correct(&mut other, 1000);
        assert_eq!(code(&other), Code::InvalidArgument);
        assert_eq!(code(&HeaderMap::new()), Code::Ok);
    }
}
