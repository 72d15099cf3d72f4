//! The accept loop: lets connections in up to a limit, shakes hands with each
//! in a task of its own, and sees them out.
//!
//! A connection holds a place from its accept to its close. Until it has
//! shaken hands and said that it speaks HTTP/2 it is pending, which it may be
//! for a short time. When all places are taken, a newcomer gets that of a
//! connection without a call (`places.rs`), or is closed at once.

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
use super::tls::Tls;
use crate::serve::metrics::{ConnectionOutcome, Metrics};

pub(super) use self::places::{Guest, InUse, TooMany, WatchPermit};

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
/// File descriptors for everything but connections that have a place: those that
/// wait for one, models, the log, the metrics port, the runtime.
const FILES_RESERVED: usize = 192 + WAITING_MAX;

/// What connections are met with.
#[derive(Clone)]
pub(super) struct ConnectionLimits {
    pub(super) tls: Option<Latest<Tls>>,
    pub(super) connections_max: usize,
    /// Limit on the connections of one address; none is no limit.
    pub(super) per_address_max: Option<usize>,
    pub(super) max_connection_age: Option<Duration>,
    pub(super) metrics: Metrics,
}

/// Accepts until `stop`, hands each connection to `serve`, and ends when the
/// last one has ended. `serve` is told when to see its connection out.
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
    // As many tasks as places, and as newcomers may wait for one.
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
                    tracing::error!(%error, "no connection can be accepted");
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
    // Whoever comes now is refused by the kernel, and goes elsewhere.
    drop(listener);
    stopping.send_replace(true);
    while connections.join_next().await.is_some() {}
}

/// When to stop serving a connection: the worker ends, another connection waits
/// for the place, or it has closed.
#[derive(Debug)]
pub(super) struct ConnectionEnd {
    stopped: watch::Receiver<bool>,
    closed: oneshot::Receiver<()>,
    leave: oneshot::Receiver<()>,
}

impl ConnectionEnd {
    pub(super) async fn wait(mut self) {
        tokio::select! {
            // An error is the end of the loop, which is the same.
            _ = self.stopped.wait_for(|&stop| stop) => {}
            _ = self.closed => {}
            // An error is the end of its place, which is the same.
            _ = self.leave => {}
        }
    }
}

impl ConnectionLimits {
    /// Says why a connection was closed at once.
    fn refused(&self, reason: NoPlace, connections_max: usize, addr: IpAddr) {
        match reason {
            NoPlace::Full => tracing::warn!(
                connections_max,
                "a connection was closed for want of a place (--connections-max): all have calls, \
                 or had one within a second"
            ),
            NoPlace::Address => tracing::warn!(
                %addr,
                max = self.per_address_max,
                "a connection was closed because its address has as many as one may have \
                 (--connections-per-address-max)"
            ),
        }
    }

    /// Shakes hands.
    async fn greet(
        &self,
        stream: TcpStream,
        mut place: ConnectionPermit,
        leave: Leave,
    ) -> Option<(Connection, oneshot::Receiver<()>, oneshot::Receiver<()>)> {
        // Small answers leave at once.
        let _ = stream.set_nodelay(true);
        let addr = stream.peer_addr().ok();
        let deadline = tokio::time::Instant::now() + HANDSHAKE_TIMEOUT;
        let Leave { leave, mut cut } = leave;
        let stream = match &self.tls {
            None => Stream::Plain(stream),
            Some(tls) => {
                let acceptor = TlsAcceptor::from(Arc::clone(&tls.get().config));
                let shaken = tokio::select! {
                    shaken = tokio::time::timeout_at(deadline, acceptor.accept(stream)) => shaken,
                    _ = &mut cut => return None,
                };
                match shaken.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into())) {
                    Ok(stream) => Stream::Tls(Box::new(stream)),
                    Err(error) => {
                        tracing::debug!(?addr, %error, "a TLS handshake failed");
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
    place: ConnectionPermit,
    /// Resolves when it has to go at once; none once it has.
    cut: Option<oneshot::Receiver<()>>,
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
}

impl Connection {
    /// The connection as its calls know it.
    pub(super) fn guest(&self) -> Guest {
        self.place.guest.clone()
    }

    /// An error once the place was given to somebody else.
    fn check_cut(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        if let Some(cut) = &mut self.cut {
            // An error cannot be: the sender lives as long as the place.
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
    let affordable = connections(getrlimit(Resource::Nofile).current);
    if affordable < connections_max {
        tracing::warn!(
            connections_max = affordable,
            "the limit on open files (ulimit -n) leaves fewer connections than --connections-max"
        );
    }
    affordable.min(connections_max)
}

/// Connections that so many files leave room for; `None` is no limit.
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
        // By chance once in 10^30 runs.
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
