//! One connection, from its first byte to its last: HTTP/2, and HTTP/1.1 where
//! that is served, with a task for each call that is watched.
//!
//! The gRPC library's own server would do, but for two things: it lets nobody
//! see a call's task, and so nobody end one whose client takes nothing, and it
//! does not say what a connection may buffer.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::AtomicUsize;
use std::time::Duration;

use bytes::Bytes;
use http::{Request, Response};
use hyper::body::Incoming;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::conn::auto::Builder;
use hyper_util::service::TowerToHyperService;
use tonic::body::Body;
use tower::{Service, ServiceExt as _};

use super::deadline;
use super::leaving::Patience;
use super::listen::{Connection, ConnectionEnd};

/// Bytes that a client may send before it must wait for us: one stream may
/// hold a large image without a round trip for every 64 KiB.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Calls on one connection that may be cancelled before a handler took them;
/// past it the connection is closed as an attack. The library's own limit of
/// 20 would cut off a client that gives up on a burst of calls.
const PENDING_RESETS_MAX: usize = 1024;
/// Bytes of one call that a connection may have to write. They are parts of
/// answers that the worker counts, so a few pieces that keep it busy are enough.
const SEND_BUFFER_BYTES: usize = 256 << 10;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// How connections are served.
#[derive(Debug, Clone)]
pub(super) struct ConnectionDriver {
    pub(super) http1: bool,
    pub(super) keepalive_interval: Duration,
    /// Time that a client may take to answer an HTTP/2 ping.
    pub(super) keepalive_timeout: Duration,
    pub(super) streams_max: u32,
    pub(super) header_bytes_max: u32,
    pub(super) patience: Arc<Patience>,
}

impl ConnectionDriver {
    /// Serves a connection until it closes. It is told to go away at its age, and
    /// when its farewell comes; calls in progress end in their own time.
    pub(super) async fn serve<S, B>(
        self,
        connection: Connection,
        farewell: ConnectionEnd,
        service: S,
    ) where
        S: Service<Request<Body>, Response = Response<B>> + Clone + Send + 'static,
        S::Future: Send,
        S::Error: Into<BoxError> + Send,
        B: http_body::Body<Data = Bytes> + Send + 'static,
        B::Error: Into<BoxError> + Send + Sync,
    {
        let peer = connection.peer;
        let service = service.map_request(move |request: Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer);
            request
        });
        let loose = Arc::default();
        let calls = CallTasks {
            patience: Arc::clone(&self.patience),
            loose: Arc::clone(&loose),
        };
        let builder = self.builder(calls);
        let service = TowerToHyperService::new(service);
        let driven = async {
            let driven = builder.serve_connection(TokioIo::new(connection), service);
            let mut driven = pin!(driven);
            let mut farewell = pin!(farewell.wait());
            let mut old = pin!(deadline::passed(peer.leaves_at()));
            let (mut has_gone, mut is_old) = (false, false);
            loop {
                tokio::select! {
                    ended = &mut driven => {
                        if let Err(error) = ended {
                            tracing::debug!(error, "a connection broke");
                        }
                        return;
                    }
                    () = &mut farewell, if !has_gone => has_gone = true,
                    () = &mut old, if !is_old => is_old = true,
                }
                driven.as_mut().graceful_shutdown();
            }
        };
        // For a call over HTTP/1.1, which has no task of its own.
        self.patience.watch(loose, driven).await;
    }

    fn builder(&self, calls: CallTasks) -> Builder<CallTasks> {
        let mut builder = Builder::new(calls);
        if !self.http1 {
            builder = builder.http2_only();
        }
        builder
            .http2()
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW_BYTES)
            .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
            .max_concurrent_streams(self.streams_max)
            .keep_alive_interval(Some(self.keepalive_interval))
            .keep_alive_timeout(self.keepalive_timeout)
            .max_pending_accept_reset_streams(PENDING_RESETS_MAX)
            .max_header_list_size(self.header_bytes_max)
            .max_send_buf_size(SEND_BUFFER_BYTES);
        // With it, a head of HTTP/1.1 has 30 s to come.
        builder.http1().timer(TokioTimer::new());
        builder
    }
}

/// Runs each call of a connection in a task that is watched.
#[derive(Debug, Clone)]
struct CallTasks {
    patience: Arc<Patience>,
    /// Pieces of answers in the connection that nobody waits for.
    loose: Arc<AtomicUsize>,
}

impl<F> hyper::rt::Executor<F> for CallTasks
where
    F: Future<Output: Send> + Send + 'static,
{
    fn execute(&self, call: F) {
        let loose = Arc::clone(&self.loose);
        tokio::spawn(Arc::clone(&self.patience).watch(loose, call));
    }
}
