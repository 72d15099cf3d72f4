//! The accept loop: lets connections in up to a limit, shakes hands with each
//! in a task of its own, and sees them out.
//!
//! A connection holds a place from its accept to its close. Until it has
//! shaken hands and said that it speaks HTTP/2 it is pending: at most half of
//! the places may be, each for a short time, so that clients that connect and
//! say nothing cannot keep the others out. Whoever finds no place is closed
//! at once.

use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tonic::transport::server::Connected;

use super::reload::Latest;
use super::tls::Tls;
use crate::metrics::Metrics;
use crate::metrics::access::Outcome;

/// Time for a client to finish its TLS handshake and to say that it speaks
/// HTTP/2. It takes a few round trips; after it, pings find out who is gone.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// `PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n`, with which a client begins; a head of
/// HTTP/1.1, where that is served, is longer.
const PREFACE_LEN: usize = 24;
/// Rest after the system could not give a connection. It is still there, in
/// the kernel's queue, so asking again at once would only burn a core.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Trouble with connections is told this often at most: whoever may connect
/// may not fill the log.
const WARN_INTERVAL: Duration = Duration::from_secs(10);
/// Connections differ in age by a tenth at most, either way.
const AGE_JITTER: f64 = 0.1;
/// File descriptors for everything but connections: models, the log, the
/// metrics port, the runtime.
const FILES_RESERVED: usize = 128;

/// What connections are met with.
#[derive(Clone)]
pub(super) struct Door {
    pub(super) tls: Option<Latest<Tls>>,
    pub(super) connections_max: usize,
    pub(super) max_connection_age: Option<Duration>,
    pub(super) metrics: Metrics,
}

/// Accepts until `stop`, hands each connection to `serve`, and ends when the
/// last one has ended. `serve` is told when to see its connection out.
pub(super) async fn run<S, F>(
    listener: TcpListener,
    door: Door,
    serve: S,
    stop: impl Future<Output = ()>,
) where
    S: Fn(Connection, Farewell) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let connections_max = affordable(door.connections_max);
    door.metrics.access().connections_max(connections_max);
    let places = Arc::new(Semaphore::new(connections_max));
    let pending = Arc::new(Semaphore::new(connections_max.div_ceil(2)));
    let (stopping, stopped) = watch::channel(false);
    // As many tasks as places.
    let mut connections = JoinSet::new();
    let mut warned = Warned::default();
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) if is_the_clients(&error) => continue,
            Err(error) => {
                door.metrics.access().ended(Outcome::AcceptFailed);
                if warned.may() {
                    tracing::error!(%error, "no connection can be accepted");
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let (Ok(place), Ok(pending)) = (
            Arc::clone(&places).try_acquire_owned(),
            Arc::clone(&pending).try_acquire_owned(),
        ) else {
            door.metrics.access().ended(Outcome::Refused);
            if warned.may() {
                tracing::warn!(
                    connections_max,
                    "a connection was closed for want of a place (--connections-max)"
                );
            }
            continue;
        };
        let place = Place::new(place, door.metrics.clone());
        let (door, serve, stopped) = (door.clone(), serve.clone(), stopped.clone());
        connections.spawn(async move {
            let mut stopping = stopped.clone();
            let connection = tokio::select! {
                connection = door.greet(stream, place, pending) => connection,
                _ = stopping.wait_for(|&stop| stop) => None,
            };
            if let Some((connection, closed)) = connection {
                serve(connection, Farewell { stopped, closed }).await;
            }
        });
    }
    // Whoever comes now is refused by the kernel, and goes elsewhere.
    drop(listener);
    stopping.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// When to stop serving a connection: the worker ends, or it has closed.
#[derive(Debug)]
pub(super) struct Farewell {
    stopped: watch::Receiver<bool>,
    closed: oneshot::Receiver<()>,
}

impl Farewell {
    pub(super) async fn wait(mut self) {
        tokio::select! {
            // An error is the end of the loop, which is the same.
            _ = self.stopped.wait_for(|&stop| stop) => {}
            _ = self.closed => {}
        }
    }
}

impl Door {
    /// Shakes hands.
    async fn greet(
        &self,
        stream: TcpStream,
        mut place: Place,
        pending: OwnedSemaphorePermit,
    ) -> Option<(Connection, oneshot::Receiver<()>)> {
        // Small answers leave at once.
        let _ = stream.set_nodelay(true);
        let addr = stream.peer_addr().ok();
        let deadline = tokio::time::Instant::now() + HANDSHAKE_TIMEOUT;
        let stream = match &self.tls {
            None => Stream::Plain(stream),
            Some(tls) => {
                let acceptor = TlsAcceptor::from(Arc::clone(&tls.get().config));
                let shaken = tokio::time::timeout_at(deadline, acceptor.accept(stream)).await;
                match shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(stream) => Stream::Tls(Box::new(stream)),
                    Err(error) => {
                        tracing::debug!(?addr, %error, "a TLS handshake failed");
                        place.outcome = Outcome::HandshakeFailed;
                        return None;
                    }
                }
            }
        };
        let (open, closed) = oneshot::channel();
        let connection = Connection {
            stream,
            pending: Some(Pending {
                deadline: Box::pin(tokio::time::sleep_until(deadline)),
                n_bytes: 0,
                _permit: pending,
            }),
            peer: Peer {
                addr,
                age: self.max_connection_age.map(jittered),
                since: Instant::now(),
            },
            place,
            _open: open,
        };
        Some((connection, closed))
    }
}

/// Whom a call came from; tonic leaves it in each request's extensions.
#[derive(Debug, Clone, Copy)]
pub(super) struct Peer {
    pub(super) addr: Option<SocketAddr>,
    /// The age at which the connection is told to go away.
    pub(super) age: Option<Duration>,
    since: Instant,
}

impl Peer {
    /// When the connection is told to go away. Calls in progress may go on, but
    /// one that would never end must end itself, or the connection never does.
    pub(super) fn leaves_at(&self) -> Option<Instant> {
        self.since.checked_add(self.age?)
    }
}

/// A connection that has a place.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    /// Until the client has begun to speak HTTP/2.
    pending: Option<Pending>,
    pub(super) peer: Peer,
    place: Place,
    /// Dropped with the connection, which is how the farewell learns of it.
    _open: oneshot::Sender<()>,
}

#[derive(Debug)]
enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

#[derive(Debug)]
struct Pending {
    deadline: Pin<Box<Sleep>>,
    n_bytes: usize,
    _permit: OwnedSemaphorePermit,
}

/// A connection's place, counted.
struct Place {
    _permit: OwnedSemaphorePermit,
    metrics: Metrics,
    outcome: Outcome,
}

impl Place {
    fn new(permit: OwnedSemaphorePermit, metrics: Metrics) -> Self {
        metrics.access().opened();
        Self {
            _permit: permit,
            metrics,
            outcome: Outcome::Closed,
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.metrics.access().left(self.outcome);
    }
}

impl std::fmt::Debug for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Place")
    }
}

impl Connected for Connection {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        let n_before = buffer.filled().len();
        let read = match &mut this.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_read(cx, buffer),
            Stream::Tls(stream) => Pin::new(stream).poll_read(cx, buffer),
        };
        let Some(pending) = &mut this.pending else {
            return read;
        };
        pending.n_bytes += buffer.filled().len() - n_before;
        if pending.n_bytes >= PREFACE_LEN {
            this.pending = None;
        } else if pending.deadline.as_mut().poll(cx).is_ready() {
            this.place.outcome = Outcome::HandshakeFailed;
            return Poll::Ready(Err(io::ErrorKind::TimedOut.into()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_flush(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_flush(cx),
        }
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_shutdown(cx),
            Stream::Tls(stream) => Pin::new(stream).poll_shutdown(cx),
        }
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
            Stream::Tls(stream) => Pin::new(stream).poll_write_vectored(cx, slices),
        }
    }

    fn is_write_vectored(&self) -> bool {
        match &self.stream {
            Stream::Plain(stream) => stream.is_write_vectored(),
            Stream::Tls(stream) => stream.is_write_vectored(),
        }
    }
}

/// A failed accept that concerns that one client only.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// When trouble was told last.
#[derive(Debug, Default)]
struct Warned(Option<Instant>);

impl Warned {
    fn may(&mut self) -> bool {
        let now = Instant::now();
        let may = self.0.is_none_or(|last| now - last >= WARN_INTERVAL);
        if may {
            self.0 = Some(now);
        }
        may
    }
}

fn jittered(age: Duration) -> Duration {
    // Differently seeded each time.
    let random = RandomState::new().hash_one(()) >> 32;
    let random = f64::from(u32::try_from(random).unwrap_or(0)) / f64::from(u32::MAX);
    age.mul_f64(1.0 - AGE_JITTER + 2.0 * AGE_JITTER * random)
}

/// As many connections as there are file descriptors for. Without this the
/// worker would run out of them at other places, such as the metrics port,
/// before it comes to its own limit.
fn affordable(connections_max: usize) -> usize {
    let limits = std::fs::read_to_string("/proc/self/limits").unwrap_or_default();
    let affordable = open_files(&limits).map_or(usize::MAX, |files| {
        files.saturating_sub(FILES_RESERVED).max(1)
    });
    if affordable < connections_max {
        tracing::warn!(
            connections_max = affordable,
            "the limit on open files (ulimit -n) leaves fewer connections than --connections-max"
        );
    }
    affordable.min(connections_max)
}

/// The soft limit, of the kernel's table of them; none if there is none.
fn open_files(limits: &str) -> Option<usize> {
    let line = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))?;
    line.split_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ages_differ_by_a_tenth_at_most() {
        let age = Duration::from_secs(1000);
        let ages: Vec<Duration> = (0..100).map(|_| jittered(age)).collect();
        for age in &ages {
            assert!((900..=1100).contains(&age.as_secs()), "{age:?}");
        }
        // By chance once in 10^30 runs.
        assert!(ages.iter().any(|&age| age < Duration::from_secs(950)));
        assert!(ages.iter().any(|&age| age > Duration::from_secs(1050)));
    }

    #[test]
    fn the_limit_on_open_files_is_read() {
        let table = "Limit                     Soft Limit           Hard Limit           Units     \n\
                     Max processes             7823                 7823                 processes \n\
                     Max open files            1024                 524288               files     \n";
        assert_eq!(open_files(table), Some(1024));
        assert_eq!(open_files(&table.replace("1024", "unlimited")), None);
        assert_eq!(open_files(""), None);
    }

    #[test]
    fn trouble_is_told_now_and_then() {
        let mut warned = Warned::default();
        assert!(warned.may());
        assert!(!warned.may());
    }

    #[test]
    fn only_a_clients_own_trouble_needs_no_rest() {
        let check = |code, expected| {
            assert_eq!(
                is_the_clients(&io::Error::from_raw_os_error(code)),
                expected,
                "{code}"
            );
        };
        check(103, true); // ECONNABORTED
        check(24, false); // EMFILE
        check(23, false); // ENFILE
        check(105, false); // ENOBUFS
    }
}
