//! Layer in front of the handlers that says what is served to a call of a
//! method or a service that the worker does not have. The gRPC library answers
//! UNIMPLEMENTED without a word.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use http::{HeaderMap, Request, Response};
use tonic::Code;
use tonic::body::Body;
use tower::{Layer, Service};

use super::status;
use crate::excerpt::Excerpt;
use crate::proto::RpcMethod;
use crate::serve::rpc::error::RequestError;

#[derive(Debug, Clone, Copy)]
pub(super) struct UnservedLayer;

impl<S> Layer<S> for UnservedLayer {
    type Service = Explained<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Explained { inner }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Explained<S> {
    inner: S,
}

impl<S> Service<Request<Body>> for Explained<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Unpin,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = ExplainedFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let error = unserved(request.uri().path());
        ExplainedFuture {
            call: self.inner.call(request),
            error,
        }
    }
}

/// Future of a call, with the error for it if its method is not known.
pub(super) struct ExplainedFuture<F> {
    call: F,
    error: Option<RequestError>,
}

impl<F, E> Future for ExplainedFuture<F>
where
    F: Future<Output = Result<Response<Body>, E>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let response = ready!(Pin::new(&mut self.call).poll(cx))?;
        let response = match self.error.take() {
            Some(error) if is_unexplained(response.headers()) => {
                status::of_call(&error).into_http()
            }
            _ => response,
        };
        Poll::Ready(Ok(response))
    }
}

/// Returns true if an answer is the library's UNIMPLEMENTED without a message.
fn is_unexplained(headers: &HeaderMap) -> bool {
    let code = headers.get("grpc-status");
    let code = code.map(|code| Code::from_bytes(code.as_bytes()));
    code == Some(Code::Unimplemented) && !headers.contains_key("grpc-message")
}

/// Returns the error of a call by its path; `None` for a method of the contract.
/// Health checks and reflection have methods that only the library knows, so
/// they have an error, too, which is used if the library has no answer.
fn unserved(path: &str) -> Option<RequestError> {
    if !matches!(RpcMethod::of_path(path), None | Some(RpcMethod::Other)) {
        return None;
    }
    let service = RpcMethod::SERVICES
        .iter()
        .find(|(service, _)| path.starts_with(service));
    let name = |service: &str| service.trim_matches('/').to_owned();
    let served = if let Some((service, methods)) = service {
        format!("{} has {}", name(service), methods.join(", "))
    } else {
        let services = RpcMethod::SERVICES.iter().map(|(service, _)| name(service));
        let services: Vec<String> = services.collect();
        format!(
            "the worker has {}, grpc.health.v1.Health (Check, Watch) and, without \
             --no-reflection, server reflection",
            services.join(", ")
        )
    };
    Some(RequestError::MethodUnknown {
        given: Excerpt::of(path),
        served,
    })
}
