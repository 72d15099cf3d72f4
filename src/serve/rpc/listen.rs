//! The accept loop: lets connections in up to a limit, does each TLS handshake
//! in a task of its own, and tells connections when to close.
//!
//! A connection holds a place from its accept to its close. The connection is
//! pending until its handshake is done and its client has said that it speaks
//! HTTP/2, for which there is a short time limit. When all places are taken, a
//! new connection gets the place of a connection without a call (`places.rs`),
//! or is closed at once.

mod places;

use std::future::Future;
use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::process::{Resource, getrlimit};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{oneshot, watch};
use tokio::task::JoinSet;
use tokio::time::Sleep;
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;

use self::places::{ConnectionPermit, ConnectionPermits, Leave, NoPlace, WAITING_MAX};
use super::reload::Latest;
use super::tls::{ClientNames, Tls};
use crate::serve::metrics::{ConnectionOutcome, Metrics};

pub(super) use self::places::{Guest, InUse, TooMany, WatchPermit};

/// Time for a client to finish its TLS handshake and to say that it speaks
/// HTTP/2, which takes a few round trips. Afterwards, pings detect clients that
/// vanished.
pub(super) const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Length of `PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n`, with which an HTTP/2 client
/// begins; the head of an HTTP/1.1 request is longer.
const PREFACE_LEN: usize = 24;
/// Pause after the system could not accept a connection. The connection stays
/// in the kernel's queue, so accepting again at once would only burn a core.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Shortest interval between two warnings about connections, so that clients
/// cannot fill the log.
const WARN_INTERVAL: Duration = Duration::from_secs(10);
/// Jitter of the largest age of a connection: up to a tenth shorter or longer.
const AGE_JITTER: f64 = 0.1;
/// File descriptors that are reserved for everything but connections that have
/// a place: waiting connections, models, the log, the metrics port, the
/// runtime.
const FILES_RESERVED: usize = 192 + WAITING_MAX;

/// TLS settings and limits of new connections.
#[derive(Clone)]
pub(super) struct ConnectionLimits {
    pub(super) tls: Option<Latest<Tls>>,
    pub(super) connections_max: usize,
    /// Limit on the connections of one address; none if there is no limit.
    pub(super) per_address_max: Option<usize>,
    pub(super) max_connection_age: Option<Duration>,
    pub(super) metrics: Metrics,
}

/// Accepts connections until `stop` resolves, hands each to `serve`, and
/// returns when the last connection has ended. `serve` is told when to close
/// its connection.
pub(super) async fn run<S, F>(
    listener: TcpListener,
    door: ConnectionLimits,
    serve: S,
    stop: impl Future<Output = ()>,
) where
    S: Fn(Connection, ConnectionEnd) -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let connections_max = affordable(door.connections_max);
    door.metrics.access().connections_max(connections_max);
    let places =
        ConnectionPermits::new(connections_max, door.per_address_max, door.metrics.clone());
    let (stopping, stopped) = watch::channel(false);
    // There are at most as many tasks as places and waiting connections.
    let mut connections = JoinSet::new();
    let mut warned = Warned::default();
    let mut stop = pin!(stop);
    loop {
        let accepted = tokio::select! {
            () = &mut stop => break,
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
        };
        let (stream, addr) = match accepted {
            Ok(accepted) => accepted,
            Err(error) if is_the_clients(&error) => continue,
            Err(error) => {
                door.metrics.access().ended(ConnectionOutcome::AcceptFailed);
                if warned.may() {
                    tracing::error!(%error, "cannot accept connections");
                }
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let newcomer = match places.enter(Some(addr.ip())) {
            Ok(newcomer) => newcomer,
            Err(reason) => {
                door.metrics.access().ended(reason.outcome());
                if warned.may() {
                    door.refused(reason, connections_max, addr.ip());
                }
                continue;
            }
        };
        let (door, serve, stopped) = (door.clone(), serve.clone(), stopped.clone());
        connections.spawn(async move {
            let mut stopping = stopped.clone();
            let connection = tokio::select! {
                connection = async {
                    let Some((place, leave)) = newcomer.sit().await else {
                        door.metrics.access().ended(NoPlace::Full.outcome());
                        return None;
                    };
                    door.greet(stream, place, leave).await
                } => connection,
                _ = stopping.wait_for(|&stop| stop) => None,
            };
            if let Some((connection, closed, leave)) = connection {
                let farewell = ConnectionEnd {
                    stopped,
                    closed,
                    leave,
                };
                serve(connection, farewell).await;
            }
        });
    }
    // From now on the kernel refuses new connections, so clients go elsewhere.
    drop(listener);
    stopping.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// Signal to stop serving a connection: the worker shuts down, another
/// connection waits for the place, or the connection has closed.
#[derive(Debug)]
pub(super) struct ConnectionEnd {
    stopped: watch::Receiver<bool>,
    closed: oneshot::Receiver<()>,
    leave: oneshot::Receiver<()>,
}

impl ConnectionEnd {
    pub(super) async fn wait(mut self) {
        tokio::select! {
            // An error means that the accept loop has ended, which is the same.
            _ = self.stopped.wait_for(|&stop| stop) => {}
            _ = self.closed => {}
            // An error means that the place is gone, which is the same.
            _ = self.leave => {}
        }
    }
}

impl ConnectionLimits {
    /// Logs the reason for which a connection was closed at once.
    fn refused(&self, reason: NoPlace, connections_max: usize, addr: IpAddr) {
        match reason {
            NoPlace::Full => tracing::warn!(
                connections_max,
                "rejected a connection: the limit is reached (--connections-max), and every open \
                 connection has a call or had one within the last second"
            ),
            NoPlace::Address => tracing::warn!(
                %addr,
                max = self.per_address_max,
                "rejected a connection: its address has reached the limit on connections \
                 (--connections-per-address-max)"
            ),
        }
    }

    /// Does the TLS handshake of a new connection, if TLS is used.
    async fn greet(
        &self,
        stream: TcpStream,
        mut place: ConnectionPermit,
        leave: Leave,
    ) -> Option<(Connection, oneshot::Receiver<()>, oneshot::Receiver<()>)> {
        // Small answers are sent at once.
        let _ = stream.set_nodelay(true);
        let addr = stream.peer_addr().ok();
        let deadline = tokio::time::Instant::now() + HANDSHAKE_TIMEOUT;
        let Leave { leave, mut cut } = leave;
        let mut certificate = None;
        let stream = match &self.tls {
            None => Stream::Plain(stream),
            Some(tls) => {
                let acceptor = TlsAcceptor::from(Arc::clone(&tls.get().config));
                let shaken = tokio::select! {
                    shaken = tokio::time::timeout_at(deadline, acceptor.accept(stream)) => shaken,
                    _ = &mut cut => return None,
                };
                match shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(stream) => {
                        certificate = client_names(&stream);
                        Stream::Tls(Box::new(stream))
                    }
                    Err(error) => {
                        tracing::debug!(?addr, %error, "TLS handshake failed");
                        place.outcome = ConnectionOutcome::HandshakeFailed;
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
            }),
            peer: Peer {
                addr,
                certificate,
                age: self.max_connection_age.map(jittered),
                since: Instant::now(),
            },
            place,
            cut: Some(cut),
            _open: open,
        };
        Some((connection, closed, leave))
    }
}

/// Client of a connection, stored in the extensions of each request.
#[derive(Debug, Clone)]
pub(super) struct Peer {
    pub(super) addr: Option<SocketAddr>,
    /// Names of the client by its verified certificate.
    pub(super) certificate: Option<ClientNames>,
    /// Age at which the connection is asked to close.
    pub(super) age: Option<Duration>,
    since: Instant,
}

impl Peer {
    /// Returns the time at which the connection is asked to close. Calls in
    /// progress may go on, but a call that would never end must end itself;
    /// otherwise the connection never closes.
    pub(super) fn leaves_at(&self) -> Option<Instant> {
        self.since.checked_add(self.age?)
    }
}

/// A connection that has a place.
#[derive(Debug)]
pub(super) struct Connection {
    stream: Stream,
    /// State of a connection whose client has not yet begun to speak HTTP/2.
    pending: Option<Pending>,
    pub(super) peer: Peer,
    place: ConnectionPermit,
    /// Resolves when the connection must close at once; none once it was told
    /// so.
    cut: Option<oneshot::Receiver<()>>,
    /// Sender that is dropped with the connection, which resolves
    /// [`ConnectionEnd::wait`].
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
}

impl Connection {
    /// Returns the handle of the connection for its calls.
    pub(super) fn guest(&self) -> Guest {
        self.place.guest.clone()
    }

    /// Fails once the place was given to another connection.
    fn check_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(cut) = &mut self.cut {
            // The receiver cannot fail: the sender lives as long as the place.
            if Pin::new(cut).poll(cx).is_pending() {
                return Ok(());
            }
            self.cut = None;
        }
        Err(io::ErrorKind::ConnectionAborted.into())
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.check_cut(cx)?;
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
            this.place.guest.speaks();
        } else if pending.deadline.as_mut().poll(cx).is_ready() {
            this.place.outcome = ConnectionOutcome::HandshakeFailed;
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
        self.check_cut(cx)?;
        match &mut self.stream {
            Stream::Plain(stream) => Pin::new(stream).poll_write(cx, bytes),
            Stream::Tls(stream) => Pin::new(stream).poll_write(cx, bytes),
        }
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.check_cut(cx)?;
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
        self.check_cut(cx)?;
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

/// Reads the names of a client whose certificate was verified.
fn client_names(stream: &TlsStream<TcpStream>) -> Option<ClientNames> {
    let (_, session) = stream.get_ref();
    Some(ClientNames::of(session.peer_certificates()?.first()?))
}

/// Returns true if a failed accept concerns only the client that connected.
fn is_the_clients(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::ConnectionAborted
            | io::ErrorKind::ConnectionReset
            | io::ErrorKind::Interrupted
    )
}

/// Time of the last warning about connections.
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
    // Each `RandomState` has another seed.
    let random = RandomState::new().hash_one(()) >> 32;
    let random = f64::from(u32::try_from(random).unwrap_or(0)) / f64::from(u32::MAX);
    age.mul_f64(1.0 - AGE_JITTER + 2.0 * AGE_JITTER * random)
}

/// Lowers the limit on connections to the number for which there are file
/// descriptors. Otherwise the worker would run out of descriptors elsewhere,
/// for example at the metrics port, before it reaches its own limit.
fn affordable(connections_max: usize) -> usize {
    let affordable = connections(getrlimit(Resource::Nofile).current);
    if affordable < connections_max {
        tracing::warn!(
            connections_max = affordable,
            "lowered --connections-max: the limit on open files (ulimit -n) allows fewer \
             connections"
        );
    }
    affordable.min(connections_max)
}

/// Returns the number of connections for which a limit on open files leaves
/// room; `None` is no limit.
fn connections(open_files_max: Option<u64>) -> usize {
    open_files_max.map_or(usize::MAX, |files| {
        let files = usize::try_from(files).unwrap_or(usize::MAX);
        files.saturating_sub(FILES_RESERVED).max(1)
    })
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
        // The check fails by chance once in 10^30 runs.
        assert!(ages.iter().any(|&age| age < Duration::from_secs(950)));
        assert!(ages.iter().any(|&age| age > Duration::from_secs(1050)));
    }

    #[test]
    fn the_limit_on_open_files_leaves_room_for_others() {
        assert_eq!(connections(Some(1024)), 1024 - FILES_RESERVED);
        assert_eq!(connections(Some(1)), 1);
        assert_eq!(connections(None), usize::MAX);
        let here = connections(getrlimit(Resource::Nofile).current);
        assert_eq!(affordable(usize::MAX), here);
        assert_eq!(affordable(1), 1);
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
