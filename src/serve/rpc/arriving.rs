//! A request's body on its way in: cut into messages, inflated and counted
//! before the gRPC library sees any of it.
//!
//! The library would gather a message, inflate it and turn it into values
//! before it knows that the request ends there, and count nothing. Here every
//! byte is taken from the worker's bytes before there is memory for it: of the
//! message as it came, of what it inflates to, and of the values that it
//! becomes. The library gets whole messages that are not compressed.
//!
//! A method that takes one message gets it once the request has ended: until
//! then it is bytes as they came, neither inflated nor decoded. A second message
//! is refused at once.
//!
//! A message of a stream waits for room before it arrives: its length is read,
//! and nothing after it until the most that it can become has been taken. A
//! stream that waits therefore holds nothing that another one waits for; one
//! that has room needs no more of it, waits for its own client only, and that
//! for no longer than `--request-timeout`.

use std::future::Future;
use std::io::{Cursor, Read as _};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use flate2::bufread::{GzDecoder, ZlibDecoder};
use http::HeaderMap;
use http::header::HeaderName;
use http_body::{Body as _, Frame, SizeHint};
use tonic::body::Body;
use tonic::{Code, Status};

use super::status;
use crate::proto::Priority;
use crate::proto::codec::{Growth, malformed};
use crate::serve::capacity::{CapacityPool, CapacityShare};
use crate::serve::error::{RequestStage, StageError};
use crate::serve::readiness::Readiness;
use crate::serve::rpc::error::RequestError;

/// When a request that did not fit while it arrived should come again.
const RETRY_ARRIVING: Duration = Duration::from_secs(1);
/// How messages are compressed, if they are.
pub(super) const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// Compressed or not, and a length.
const PREFIX_LEN: usize = 5;
/// A message without content, which tells the library that one has arrived.
const EMPTY_MESSAGE: [u8; PREFIX_LEN] = [0; PREFIX_LEN];
/// Bytes that a message's buffer begins with; most requests of tokens fit, and a
/// client that announces much and sends little holds no more.
const BUFFER_MIN: usize = 4 << 10;
/// Bytes inflated before other calls of the thread have their turn: about a
/// millisecond.
const INFLATE_STEP: usize = 256 << 10;
/// Most bytes that a byte of DEFLATE can become, by its format.
const DEFLATE_RATIO_MAX: usize = 1032;
/// Log text for a request that broke off; the client has gone.
const BROKEN: &str =
    "the request ended before it was whole: its stream was reset, or its connection lost";

/// How a message may be compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MessageCompression {
    Gzip,
    Deflate,
}

impl MessageCompression {
    /// Takes the header away, so that the library expects no compression; one
    /// that is not known here stays, and the library refuses it.
    pub(super) fn take(headers: &mut HeaderMap) -> Option<Self> {
        let compression = match headers.get(ENCODING)?.as_bytes() {
            b"gzip" => Self::Gzip,
            b"deflate" => Self::Deflate,
            _ => return None,
        };
        headers.remove(ENCODING);
        Some(compression)
    }
}

/// A message's share of the worker's bytes on its way to the handler, which
/// finds it in the request.
#[derive(Debug, Clone, Default)]
pub(super) struct Arrived(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    share: Mutex<CapacityShare>,
    /// The message of a stream, which the library does not see: its buffer would
    /// keep the memory until the stream ends.
    message: Mutex<Option<Bytes>>,
    /// Bytes that a stream's handler needs beside each message.
    beside: AtomicUsize,
    /// True if a stream's next message waits for room.
    waits: AtomicBool,
}

impl Arrived {
    /// The share of the message that came last.
    pub(super) fn take(&self) -> CapacityShare {
        let mut share = self.0.share.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut share)
    }

    /// The bytes of a stream's message that came last, once.
    pub(super) fn take_message(&self) -> Option<Bytes> {
        let mut message = self
            .0
            .message
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        message.take()
    }

    fn put_message(&self, message: Bytes) {
        let mut place = self
            .0
            .message
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let before = place.replace(message);
        drop(place);
        drop(before);
    }

    fn put(&self, share: CapacityShare) {
        let mut place = self.0.share.lock().unwrap_or_else(PoisonError::into_inner);
        let before = std::mem::replace(&mut *place, share);
        drop(place);
        drop(before);
    }

    /// From now on so many bytes are taken beside each message.
    pub(super) fn beside(&self, bytes: usize) {
        self.0.beside.store(bytes, Ordering::Relaxed);
    }

    /// True if the next message waits for room: nothing that the client could do
    /// anything about.
    pub(super) fn waits(&self) -> bool {
        self.0.waits.load(Ordering::Relaxed)
    }
}

/// Facts about a request before its body.
pub(super) struct RequestFacts {
    /// Where bytes are counted; none for requests that are not the worker's work.
    pub(super) bytes: Option<CapacityPool>,
    pub(super) class: Priority,
    /// Bytes of one message, inflated.
    pub(super) message_bytes_max: usize,
    pub(super) compression: Option<MessageCompression>,
    /// Growth of a message that becomes values.
    pub(super) growth: Growth,
    /// True if the method takes any number of messages.
    pub(super) is_stream: bool,
    /// How long the request may take; of a stream, each of its messages.
    pub(super) timeout: Duration,
    /// Once the worker drains, a request that is still arriving is refused like
    /// one that comes then.
    pub(super) readiness: Option<Arc<Readiness>>,
    pub(super) arrived: Arrived,
}

impl RequestFacts {
    /// The body that the library gets.
    pub(super) fn body(self, body: Body) -> Body {
        Body::new(Arriving {
            arrival: self,
            body,
            rest: Bytes::new(),
            has_ended: false,
            part: Part::default(),
            held: CapacityShare::default(),
            since: Instant::now(),
            end: None,
        })
    }

    /// Takes bytes at once, to those that are held.
    fn hold(&self, held: &mut CapacityShare, n: usize) -> Result<(), Status> {
        let Some(pool) = &self.bytes else {
            return Ok(());
        };
        let (what, flag) = ("bytes", "--bytes-in-flight-max");
        let all = held.size().saturating_add(n);
        // A share is counted in 32 bits.
        let max = pool.size_for(self.class).min(u32::MAX as usize);
        if all > max {
            return Err(status::of_stage(StageError::NeverFits {
                given: all,
                max,
                what,
                flag,
            }));
        }
        let Some(share) = pool.try_take(self.class, n) else {
            return Err(status::of_stage(StageError::Full {
                what,
                flag,
                // What arrives is not yet in line, so no rate tells when.
                retry_after: RETRY_ARRIVING,
            }));
        };
        held.merge(share);
        Ok(())
    }

    /// Facts that the first bytes of a message state.
    fn prefix(&self, prefix: [u8; PREFIX_LEN]) -> Result<Prefix, Status> {
        let [flag, len @ ..] = prefix;
        let compression = match (flag, self.compression) {
            (0, _) => None,
            (1, Some(compression)) => Some(compression),
            (1, None) => {
                return Err(malformed(
                    "request: a message is compressed, and the header grpc-encoding does not say \
                     how",
                ));
            }
            (flag, _) => {
                return Err(malformed(&format!(
                    "request: a message begins with {flag}, which is neither 0 nor 1"
                )));
            }
        };
        let len = usize::try_from(u32::from_be_bytes(len)).unwrap_or(usize::MAX);
        if len > self.message_bytes_max {
            return Err(self.too_large());
        }
        Ok(Prefix { compression, len })
    }

    fn too_large(&self) -> Status {
        if self.bytes.is_none() {
            return Status::out_of_range(format!(
                "request: the message is over the limit of {} bytes",
                self.message_bytes_max
            ));
        }
        status::of_call(&RequestError::MessageTooLarge {
            max: self.message_bytes_max as u64,
        })
    }

    /// The most that a message can hold, with what its handler needs beside it.
    fn most(&self, prefix: &Prefix) -> usize {
        let inflated = match prefix.compression {
            None => 0,
            Some(_) => prefix
                .len
                .saturating_mul(DEFLATE_RATIO_MAX)
                .saturating_add(INFLATE_STEP)
                .min(self.message_bytes_max),
        };
        let message = inflated.max(prefix.len);
        let beside = self.arrived.0.beside.load(Ordering::Relaxed);
        inflated + prefix.len + (self.growth.most)(message) + beside
    }
}

#[derive(Debug, Clone, Copy)]
struct Prefix {
    compression: Option<MessageCompression>,
    len: usize,
}

/// Waits for the room of a stream's message.
type Room = Pin<Box<dyn Future<Output = CapacityShare> + Send>>;

/// How far the message that arrives has come.
enum Part {
    Prefix {
        bytes: [u8; PREFIX_LEN],
        n: usize,
    },
    Room {
        prefix: Prefix,
        room: Room,
    },
    /// With the prefix that the library will read.
    Message {
        prefix: Prefix,
        buffer: Vec<u8>,
    },
    Inflating(Box<Inflating>),
    /// Everything was handed on, or refused.
    Over,
}

impl Default for Part {
    fn default() -> Self {
        Self::Prefix {
            bytes: [0; PREFIX_LEN],
            n: 0,
        }
    }
}

/// A message that is being inflated.
struct Inflating {
    inflater: Inflater,
    /// With the prefix that the library will read.
    buffer: Vec<u8>,
    /// Bytes of the message as it came.
    compressed_bytes: usize,
}

enum Inflater {
    Gzip(GzDecoder<Cursor<Bytes>>),
    Deflate(ZlibDecoder<Cursor<Bytes>>),
}

impl Inflater {
    fn read(&mut self, place: &mut [u8]) -> Result<usize, Status> {
        let n = match self {
            Self::Gzip(inflater) => inflater.read(place),
            Self::Deflate(inflater) => inflater.read(place),
        };
        n.map_err(|error| malformed(&format!("request: a message cannot be inflated: {error}")))
    }
}

impl Inflating {
    fn new(compression: MessageCompression, message: Vec<u8>) -> Self {
        let compressed_bytes = message.capacity();
        let mut message = Bytes::from(message);
        message.advance(PREFIX_LEN);
        let message = Cursor::new(message);
        Self {
            inflater: match compression {
                MessageCompression::Gzip => Inflater::Gzip(GzDecoder::new(message)),
                MessageCompression::Deflate => Inflater::Deflate(ZlibDecoder::new(message)),
            },
            buffer: Vec::new(),
            compressed_bytes,
        }
    }

    /// Inflates up to so many bytes; none at the end.
    fn read(&mut self, n: usize) -> Result<usize, Status> {
        let start = self.buffer.len();
        self.buffer.resize(start + n, 0);
        let n = self.inflater.read(&mut self.buffer[start..])?;
        self.buffer.truncate(start + n);
        Ok(n)
    }
}

/// Body of a request on its way in.
struct Arriving {
    arrival: RequestFacts,
    body: Body,
    /// Bytes that came and have not been looked at.
    rest: Bytes,
    /// True if nothing more comes.
    has_ended: bool,
    part: Part,
    /// Of the message that arrives.
    held: CapacityShare,
    /// When the request, or the message of a stream, began to arrive.
    since: Instant,
    /// Made once something has to be waited for: most requests are here at once.
    end: Option<Pin<Box<dyn Future<Output = Status> + Send>>>,
}

/// The next thing to do.
enum Step {
    /// Hand this to the library.
    Give(Bytes),
    /// Look at what has changed.
    Again,
    /// The next piece of the body is needed.
    Read,
    /// Others have their turn first.
    Yield,
    /// There is nothing more.
    End,
}

impl Arriving {
    /// Goes one step on with what is here.
    fn step(&mut self, cx: &mut Context<'_>) -> Poll<Result<Step, Status>> {
        match &mut self.part {
            Part::Over => Poll::Ready(Ok(Step::End)),
            Part::Prefix { .. } => Poll::Ready(self.prefix()),
            Part::Room { prefix, room } => {
                self.arrival.arrived.0.waits.store(true, Ordering::Relaxed);
                let share = ready!(room.as_mut().poll(cx));
                self.arrival.arrived.0.waits.store(false, Ordering::Relaxed);
                let prefix = *prefix;
                self.held = share;
                // From here on the client is waited for, and nobody else.
                self.since = Instant::now();
                self.end = None;
                self.part = Part::Message {
                    prefix,
                    buffer: Vec::new(),
                };
                Poll::Ready(Ok(Step::Again))
            }
            Part::Message { .. } => Poll::Ready(self.message()),
            Part::Inflating(_) => Poll::Ready(self.inflate()),
        }
    }

    fn prefix(&mut self) -> Result<Step, Status> {
        if matches!(self.part, Part::Prefix { n: 0, .. })
            && let Some(message) = self.whole()?
        {
            return Ok(Step::Give(message));
        }
        let Part::Prefix { bytes, n } = &mut self.part else {
            return Ok(Step::Again);
        };
        let n_new = self.rest.len().min(PREFIX_LEN - *n);
        self.rest.copy_to_slice(&mut bytes[*n..*n + n_new]);
        *n += n_new;
        if *n < PREFIX_LEN {
            if !self.has_ended {
                return Ok(Step::Read);
            }
            return match (*n, self.arrival.is_stream) {
                (0, true) => Ok(Step::End),
                (0, false) => Err(malformed("request: it has no message; send one")),
                _ => Err(truncated()),
            };
        }
        let prefix = self.arrival.prefix(*bytes)?;
        self.part = match &self.arrival.bytes {
            Some(pool) if self.arrival.is_stream => {
                // The share of a message that nobody took, such as an opening,
                // goes now: a stream that waits for room holds none.
                drop(self.arrival.arrived.take());
                // Whoever waits has only what bulk work has too.
                let most = self.arrival.most(&prefix);
                let most = most.min(pool.size_for(Priority::Bulk));
                let pool = pool.clone();
                // Not of the reserve, whatever the stream's class: a message may
                // take long to arrive, and calls that do not wait need it.
                let room = Box::pin(async move { pool.take(Priority::Bulk, most).await });
                Part::Room { prefix, room }
            }
            _ => Part::Message {
                prefix,
                buffer: Vec::new(),
            },
        };
        Ok(Step::Again)
    }

    /// A request of one message that is here in one piece, as most are: it is
    /// handed on as it is, without a copy.
    fn whole(&mut self) -> Result<Option<Bytes>, Status> {
        if self.arrival.is_stream || !self.has_ended || self.rest.len() < PREFIX_LEN {
            return Ok(None);
        }
        let mut bytes = [0; PREFIX_LEN];
        bytes.copy_from_slice(&self.rest[..PREFIX_LEN]);
        let prefix = self.arrival.prefix(bytes)?;
        if prefix.compression.is_some() || self.rest.len() != PREFIX_LEN + prefix.len {
            return Ok(None);
        }
        let n_grown = (self.arrival.growth.of)(&self.rest[PREFIX_LEN..]);
        self.arrival
            .hold(&mut self.held, self.rest.len() + n_grown)?;
        self.arrival.arrived.put(std::mem::take(&mut self.held));
        self.part = Part::Over;
        Ok(Some(std::mem::take(&mut self.rest)))
    }

    /// Gathers a message.
    fn message(&mut self) -> Result<Step, Status> {
        let Part::Message { prefix, buffer } = &mut self.part else {
            return Ok(Step::Again);
        };
        let len = PREFIX_LEN + prefix.len;
        let is_stream = self.arrival.is_stream;
        if buffer.is_empty() {
            let size = len.min(BUFFER_MIN.max(PREFIX_LEN + self.rest.len()));
            if !is_stream {
                self.arrival.hold(&mut self.held, size)?;
            }
            buffer.reserve_exact(size);
            buffer.push(0);
            let n_bytes = u32::try_from(prefix.len).unwrap_or(u32::MAX);
            buffer.extend_from_slice(&n_bytes.to_be_bytes());
        }
        while buffer.len() < len && !self.rest.is_empty() {
            if buffer.len() == buffer.capacity() {
                let more = buffer.len().min(len - buffer.len());
                if !is_stream {
                    self.arrival.hold(&mut self.held, more)?;
                }
                buffer.reserve_exact(more);
            }
            let room = buffer.capacity() - buffer.len();
            let n = room.min(len - buffer.len()).min(self.rest.len());
            buffer.extend_from_slice(&self.rest.split_to(n));
        }
        if buffer.len() < len {
            return if self.has_ended {
                Err(truncated())
            } else {
                Ok(Step::Read)
            };
        }
        if !is_stream {
            if !self.rest.is_empty() {
                return Err(malformed(
                    "request: it has a second message; this method takes one",
                ));
            }
            if !self.has_ended {
                return Ok(Step::Read);
            }
        }
        let (prefix, buffer) = (*prefix, std::mem::take(buffer));
        match prefix.compression {
            None => self.give(buffer),
            Some(compression) => {
                self.part = Part::Inflating(Box::new(Inflating::new(compression, buffer)));
                Ok(Step::Again)
            }
        }
    }

    fn inflate(&mut self) -> Result<Step, Status> {
        let Part::Inflating(inflating) = &mut self.part else {
            return Ok(Step::Again);
        };
        let max = PREFIX_LEN + self.arrival.message_bytes_max;
        let mut n_step = 0;
        if inflating.buffer.is_empty() {
            let size = (PREFIX_LEN + 4 * inflating.compressed_bytes).min(max);
            if !self.arrival.is_stream {
                self.arrival.hold(&mut self.held, size)?;
            }
            inflating.buffer.reserve_exact(size);
            inflating.buffer.resize(PREFIX_LEN, 0);
        }
        while n_step < INFLATE_STEP {
            let len = inflating.buffer.len();
            if len == max {
                // One byte more shows that there are more.
                if inflating.inflater.read(&mut [0])? > 0 {
                    return Err(self.arrival.too_large());
                }
            } else if len == inflating.buffer.capacity() {
                let more = len.min(max - len);
                if !self.arrival.is_stream {
                    self.arrival.hold(&mut self.held, more)?;
                }
                inflating.buffer.reserve_exact(more);
            }
            let room = inflating.buffer.capacity().min(max) - len;
            let n = match room {
                0 => 0,
                room => inflating.read(room.min(INFLATE_STEP))?,
            };
            if n == 0 {
                let compressed_bytes = inflating.compressed_bytes;
                let mut buffer = std::mem::take(&mut inflating.buffer);
                let n_bytes = u32::try_from(buffer.len() - PREFIX_LEN).unwrap_or(u32::MAX);
                buffer[1..PREFIX_LEN].copy_from_slice(&n_bytes.to_be_bytes());
                self.part = Part::default();
                if !self.arrival.is_stream {
                    drop(self.held.split(compressed_bytes));
                }
                return self.give(buffer);
            }
            n_step += n;
        }
        Ok(Step::Yield)
    }

    /// Hands a message on, with its share.
    fn give(&mut self, buffer: Vec<u8>) -> Result<Step, Status> {
        let n_grown = (self.arrival.growth.of)(&buffer[PREFIX_LEN..]);
        if self.arrival.is_stream {
            let beside = self.arrival.arrived.0.beside.load(Ordering::Relaxed);
            let needed = buffer.capacity() + n_grown + beside;
            let surplus = self.held.size().saturating_sub(needed);
            drop(self.held.split(surplus));
            self.part = Part::default();
        } else {
            self.arrival.hold(&mut self.held, n_grown)?;
            self.part = Part::Over;
        }
        self.arrival.arrived.put(std::mem::take(&mut self.held));
        let mut message = Bytes::from(buffer);
        if self.arrival.is_stream && self.arrival.bytes.is_some() {
            message.advance(PREFIX_LEN);
            self.arrival.arrived.put_message(message);
            return Ok(Step::Give(Bytes::from_static(&EMPTY_MESSAGE)));
        }
        Ok(Step::Give(message))
    }

    /// True if the client is waited for, and may not be for ever.
    fn is_timed(&self) -> bool {
        match self.part {
            Part::Message { .. } => true,
            // A stream may stay open for as long as its client likes.
            Part::Prefix { .. } => !self.arrival.is_stream || self.arrival.bytes.is_none(),
            Part::Room { .. } | Part::Inflating(_) | Part::Over => false,
        }
    }

    /// The end of a request that has not arrived in time.
    fn poll_late(&mut self, cx: &mut Context<'_>) -> Poll<Status> {
        if !self.is_timed() {
            return Poll::Pending;
        }
        let (max, since) = (self.arrival.timeout, self.since);
        let readiness = &self.arrival.readiness;
        let end = self.end.get_or_insert_with(|| {
            let readiness = readiness.as_deref().cloned();
            Box::pin(async move {
                let drained = async {
                    match readiness {
                        Some(mut readiness) => readiness.drained().await,
                        None => std::future::pending().await,
                    }
                };
                let error = tokio::select! {
                    () = drained => RequestError::Draining,
                    () = tokio::time::sleep_until((since + max).into()) => RequestError::RequestSlow { max },
                };
                status::of_call(&error)
            })
        });
        end.as_mut().poll(cx)
    }

    /// Reads on.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Status>> {
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            return self.poll_late(cx).map(Err);
        };
        match frame {
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => {
                    self.rest = data;
                    self.has_ended = self.body.is_end_stream();
                }
                // Trailers, of which a request has none that matter.
                Err(_) => self.has_ended = true,
            },
            Some(Err(status)) => return Poll::Ready(Err(broken(&status))),
            None => self.has_ended = true,
        }
        Poll::Ready(Ok(()))
    }

    fn poll_message(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Status>> {
        loop {
            match ready!(self.step(cx))? {
                Step::Give(message) => return Poll::Ready(Ok(Some(message))),
                Step::End => return Poll::Ready(Ok(None)),
                Step::Again => {}
                Step::Read => ready!(self.poll_read(cx))?,
                Step::Yield => {
                    cx.waker().wake_by_ref();
                    return Poll::Pending;
                }
            }
        }
    }
}

/// A request that ends amid a message.
fn truncated() -> Status {
    malformed("request: it ends before its message does")
}

/// Status of a call whose request broke off. The library hides a body's
/// CANCELLED and answers as if the request had ended, so it is told ABORTED,
/// which nothing else of ours is; see [`ended`].
fn broken(status: &Status) -> Status {
    use std::error::Error as _;
    if status.source().is_some() {
        tracing::debug!(error = %status, "a request broke off");
        return Status::aborted(BROKEN);
    }
    // Without a cause of the transport's: gRPC-Web's frames make no sense.
    malformed(&format!("request: {}", status.message()))
}

/// Status of a call whose request's body ended in the given one.
pub(super) fn ended(status: Status, deadline: Option<Instant>) -> Status {
    if status.code() != Code::Aborted {
        return status;
    }
    // A client that gives up at its deadline resets the stream.
    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        return status::of_stage(StageError::DeadlineExceeded {
            stage: RequestStage::Queue,
        });
    }
    Status::cancelled(BROKEN)
}

impl http_body::Body for Arriving {
    type Data = Bytes;
    type Error = Status;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Status>>> {
        let this = &mut *self;
        let polled = ready!(this.poll_message(cx));
        if polled.is_err() {
            // What it holds is free at once, whenever the library lets go of it.
            this.part = Part::Over;
            this.rest = Bytes::new();
            this.body = Body::empty();
            drop(std::mem::take(&mut this.held));
        }
        Poll::Ready(polled.transpose().map(|message| message.map(Frame::data)))
    }

    fn is_end_stream(&self) -> bool {
        matches!(self.part, Part::Over)
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::default()
    }
}
