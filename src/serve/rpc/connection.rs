//! Serving of one connection from its first byte to its last: HTTP/2 with a
//! watched task per call, and HTTP/1.1 for gRPC-Web or for one answer that says
//! what the port serves (`not_grpc.rs`).
//!
//! The gRPC library's own server has two gaps: it does not give access to a
//! call's task, so a call whose client reads nothing could not be ended, and it
//! has no setting for the bytes that a connection may buffer.

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

use super::authority::TolerantStream;
use super::deadline;
use super::leaving::Patience;
use super::listen::{Connection, ConnectionEnd, HANDSHAKE_TIMEOUT};

/// Bytes that a client may send on one stream before it must wait for the
/// worker: large enough for a large image without a round trip per 64 KiB.
const STREAM_WINDOW_BYTES: u32 = 1 << 20;
const CONNECTION_WINDOW_BYTES: u32 = 4 << 20;
/// Largest number of calls on one connection that were cancelled before a
/// handler took them; above the limit the connection is closed as an attack.
/// The library's own limit of 20 would cut off a client that cancels a burst of
/// calls.
const PENDING_RESETS_MAX: usize = 1024;
/// Bytes of one call that a connection may buffer for writing. The worker
/// counts these bytes with the answers, so a few pieces that keep the
/// connection busy are enough.
const SEND_BUFFER_BYTES: usize = 256 << 10;
/// Bytes of the head of an HTTP/1.1 request that is only told what the port
/// serves: the heads of browsers take a few KiB, and hyper asks for 8 KiB at
/// least.
const HTTP1_BUFFER_BYTES: usize = 16 << 10;

type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Settings with which connections are served.
#[derive(Debug, Clone)]
pub(super) struct ConnectionDriver {
    /// True if a connection may make calls over HTTP/1.1; otherwise it gets one
    /// answer and is closed.
    pub(super) http1: bool,
    pub(super) keepalive_interval: Duration,
    /// Time that a client may take to answer an HTTP/2 ping.
    pub(super) keepalive_timeout: Duration,
    pub(super) streams_max: u32,
    pub(super) header_bytes_max: u32,
    pub(super) patience: Arc<Patience>,
}

impl ConnectionDriver {
    /// Serves a connection until it closes. The client is asked to close it
    /// (GOAWAY) at the largest age and when `farewell` resolves; calls in
    /// progress may finish.
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
        let peer = connection.peer.clone();
        let leaves_at = peer.leaves_at();
        let service = service.map_request(move |request: Request<Incoming>| {
            let mut request = request.map(Body::new);
            request.extensions_mut().insert(peer.clone());
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
            let driven =
                builder.serve_connection(TokioIo::new(TolerantStream::new(connection)), service);
            let mut driven = pin!(driven);
            let mut farewell = pin!(farewell.wait());
            let mut old = pin!(deadline::passed(leaves_at));
            let (mut has_gone, mut is_old) = (false, false);
            loop {
                tokio::select! {
                    ended = &mut driven => {
                        if let Err(error) = ended {
                            tracing::debug!(error, "connection failed");
                        }
                        return;
                    }
                    () = &mut farewell, if !has_gone => has_gone = true,
                    () = &mut old, if !is_old => is_old = true,
                }
                driven.as_mut().graceful_shutdown();
            }
        };
        // The connection is watched for HTTP/1.1, whose calls have no task of
        // their own.
        self.patience.watch(loose, driven).await;
    }

    fn builder(&self, calls: CallTasks) -> Builder<CallTasks> {
        let mut builder = Builder::new(calls);
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
        // With a timer, the head of an HTTP/1.1 request must arrive within 30
        // s.
        builder.http1().timer(TokioTimer::new());
        if !self.http1 {
            builder
                .http1()
                .keep_alive(false)
                .header_read_timeout(HANDSHAKE_TIMEOUT)
                .max_buf_size(HTTP1_BUFFER_BYTES);
        }
        builder
    }
}

/// Runs each call of a connection in a task that is watched.
#[derive(Debug, Clone)]
struct CallTasks {
    patience: Arc<Patience>,
    /// Bytes of answers in the connection whose writing is not awaited.
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
