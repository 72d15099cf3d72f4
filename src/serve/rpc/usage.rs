//! Layer that counts the calls of each connection: calls that keep the
//! connection's place, and health checks and reflection, which have limits. The
//! layer is behind the layer that checks tokens, so that calls rejected there
//! do not count.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http::{Request, Response};
use http_body::{Frame, SizeHint};
use tokio::sync::OwnedSemaphorePermit;
use tonic::Status;
use tonic::body::Body;
use tower::{Layer, Service};

use super::auth::OPEN;
use super::listen::{Guest, InUse, TooMany};

/// Path prefix of both versions of reflection.
const REFLECTION: &str = "/grpc.reflection.";

/// Layer that counts the calls of one connection.
#[derive(Debug, Clone)]
pub(super) struct UsageLayer(pub(super) Guest);

impl<S> Layer<S> for UsageLayer {
    type Service = Used<S>;

    fn layer(&self, inner: S) -> Self::Service {
        Used {
            inner,
            guest: self.0.clone(),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Used<S> {
    inner: S,
    guest: Guest,
}

/// Guard of a call among those of its connection, kept until the call's answer
/// has been written.
#[derive(Debug)]
pub(super) enum CallPlace {
    Work { _in_use: InUse },
    Health { _permit: OwnedSemaphorePermit },
    Reflection { _permits: [OwnedSemaphorePermit; 2] },
}

impl CallPlace {
    fn by(path: &str, guest: &Guest) -> Result<Self, TooMany> {
        if path.starts_with(OPEN) {
            Ok(Self::Health {
                _permit: guest.open_call()?,
            })
        } else if path.starts_with(REFLECTION) {
            let (own, all) = guest.reflection()?;
            Ok(Self::Reflection {
                _permits: [own, all],
            })
        } else {
            Ok(Self::Work {
                _in_use: guest.call(),
            })
        }
    }
}

impl<S> Service<Request<Body>> for Used<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Unpin,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = UsageFuture<S::Future>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        match CallPlace::by(request.uri().path(), &self.guest) {
            Ok(taken) => {
                request.extensions_mut().insert(self.guest.clone());
                UsageFuture::Passed(self.inner.call(request), Some(taken))
            }
            Err(error) => {
                let status = Status::resource_exhausted(error.to_string());
                UsageFuture::Refusal(Some(status.into_http()))
            }
        }
    }
}

/// Future of a call that may pass, or of its rejection. Not boxed, since every
/// call passes through it.
pub(super) enum UsageFuture<F> {
    Passed(F, Option<CallPlace>),
    /// Response that rejects the call, taken at the first poll.
    Refusal(Option<Response<Body>>),
}

impl<F, E> Future for UsageFuture<F>
where
    F: Future<Output = Result<Response<Body>, E>> + Unpin,
{
    type Output = F::Output;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        match &mut *self {
            Self::Passed(call, taken) => {
                let response = ready!(Pin::new(call).poll(cx))?;
                let taken = taken.take();
                let leaving = |body| {
                    Body::new(Leaving {
                        body,
                        _taken: taken,
                    })
                };
                Poll::Ready(Ok(response.map(leaving)))
            }
            Self::Refusal(response) => response
                .take()
                .map_or(Poll::Pending, |response| Poll::Ready(Ok(response))),
        }
    }
}

/// Body of an answer, which keeps the call's guard until the body is dropped.
struct Leaving {
    body: Body,
    _taken: Option<CallPlace>,
}

impl http_body::Body for Leaving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
