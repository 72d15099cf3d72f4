//! Body of a request on its way in: cut into messages, inflated and counted
//! before the gRPC library sees any of it.
//!
//! The library would gather a message, inflate it and decode it before it knows
//! that the request ends there, and would count no bytes. Here every byte is
//! taken from `--bytes-in-flight-max` before memory is allocated for it: the
//! bytes of the received message, of the inflated message, and of the values
//! decoded from it. The library gets whole messages that are not compressed.
//!
//! A method that takes one message gets the message once the request has ended;
//! until then its bytes are neither inflated nor decoded. A second message is
//! rejected at once.
//!
//! A message of a stream waits for room before it arrives: its length is read,
//! and nothing more until the most bytes that the message can become have been
//! taken. A stream that waits for room therefore holds nothing for which
//! another stream waits. A stream that has room needs no further room; it waits
//! only for its own client, for at most `--request-timeout`.

use std::future::Future;
use std::io::{Cursor, Read as _};
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use bytes::{Buf as _, Bytes};
use flate2::bufread::{GzDecoder, ZlibDecoder};
use http::header::HeaderName;
use http::{HeaderMap, HeaderValue};
use http_body::{Body as _, Frame, SizeHint};
use tonic::body::Body;
use tonic::{Code, Status};

use super::calling::CallerSlot;
use super::status;
use crate::excerpt::Excerpt;
use crate::proto::Priority;
use crate::proto::codec::{Growth, malformed};
use crate::serve::admission::no_room;
use crate::serve::capacity::{CapacityClaim, CapacityPool, CapacityShare};
use crate::serve::error::StageError;
use crate::serve::readiness::Readiness;
use crate::serve::rpc::error::RequestError;

/// Retry delay for a request that did not fit while it arrived.
const RETRY_ARRIVING: Duration = Duration::from_secs(1);
/// Header that names the compression of the messages.
pub(super) const ENCODING: HeaderName = HeaderName::from_static("grpc-encoding");
/// Length of a message's prefix: a byte that says whether the message is
/// compressed, and the message's length in four bytes.
const PREFIX_LEN: usize = 5;
/// Message without content, which tells the library that a message has arrived.
const EMPTY_MESSAGE: [u8; PREFIX_LEN] = [0; PREFIX_LEN];
/// First size of a message's buffer. Most requests of tokens fit, and a client
/// that announces a long message and sends little holds no more memory.
const BUFFER_MIN: usize = 4 << 10;
/// Bytes that are inflated before other calls of the thread have their turn:
/// about a millisecond of work.
const INFLATE_STEP: usize = 256 << 10;
/// Largest number of bytes that a byte of DEFLATE can become, by its format.
const DEFLATE_RATIO_MAX: usize = 1032;
/// Status text for a request that broke off because its client disconnected or
/// cancelled.
const BROKEN: &str = "the request ended before all of it had arrived: its stream was reset, or \
                      its connection was lost";

/// Compression of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum MessageCompression {
    Gzip,
    Deflate,
}

impl MessageCompression {
    /// Removes the header, so that the library expects no compression. An
    /// unknown compression stays in the header, and the library rejects it with
    /// its name, which is cut here.
    pub(super) fn take(headers: &mut HeaderMap) -> Option<Self> {
        let given = headers.get(ENCODING)?;
        let compression = match given.as_bytes() {
            b"gzip" => Self::Gzip,
            b"deflate" => Self::Deflate,
            unknown => {
                let shown = Excerpt::of_bytes(unknown).to_string();
                if let Ok(shown) = HeaderValue::from_bytes(shown.as_bytes()) {
                    headers.insert(ENCODING, shown);
                }
                return None;
            }
        };
        headers.remove(ENCODING);
        Some(compression)
    }
}

/// Share of the worker's bytes that a message holds on its way to the handler,
/// which finds it in the extensions of the request.
#[derive(Debug, Clone, Default)]
pub(super) struct Arrived(Arc<Inner>);

#[derive(Debug, Default)]
struct Inner {
    share: Mutex<CapacityShare>,
    /// Latest message of a stream, which bypasses the library: the library's
    /// buffer would keep the memory until the stream ends.
    message: Mutex<Option<Bytes>>,
    /// Bytes that a stream's handler needs in addition to each message.
    beside: AtomicUsize,
    /// True if a stream's next message waits for room.
    waits: AtomicBool,
}

impl Arrived {
    /// Takes the share of the latest message.
    pub(super) fn take(&self) -> CapacityShare {
        let mut share = self.0.share.lock().unwrap_or_else(PoisonError::into_inner);
        std::mem::take(&mut share)
    }

    /// Takes the latest message of a stream; none if it was taken already.
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

    /// Sets the bytes that are taken in addition to each message from now on.
    pub(super) fn beside(&self, bytes: usize) {
        self.0.beside.store(bytes, Ordering::Relaxed);
    }

    /// Returns true if the next message waits for room, for which the client is
    /// not to blame.
    pub(super) fn waits(&self) -> bool {
        self.0.waits.load(Ordering::Relaxed)
    }
}

/// Facts about a request that are known before its body.
pub(super) struct RequestFacts {
    /// Pool in which bytes are counted; none for health checks and reflection.
    pub(super) bytes: Option<CapacityPool>,
    /// Class of the call until it is authenticated, which may change it.
    pub(super) class: Priority,
    pub(super) caller: CallerSlot,
    /// Limit on the bytes of one message, inflated.
    pub(super) message_bytes_max: usize,
    pub(super) compression: Option<MessageCompression>,
    /// Growth of a message when it is decoded.
    pub(super) growth: Growth,
    /// True if the method takes any number of messages.
    pub(super) is_stream: bool,
    /// Longest time for the request to arrive; for a stream, for each of its
    /// messages.
    pub(super) timeout: Duration,
    /// Readiness of the worker: once the worker drains, a request that is still
    /// arriving is rejected like a new one. None for streams.
    pub(super) readiness: Option<Arc<Readiness>>,
    pub(super) arrived: Arrived,
}

impl RequestFacts {
    /// Wraps a request's body as the body that the library gets.
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

    /// Takes `n` more bytes from the pool and adds them to `held`; fails at
    /// once if there is no room.
    fn hold(&self, held: &mut CapacityShare, n: usize) -> Result<(), Status> {
        let Some(pool) = &self.bytes else {
            return Ok(());
        };
        let (what, flag) = ("bytes", "--bytes-in-flight-max");
        let all = held.size().saturating_add(n);
        let claim = self.caller.claim(self.class, held.size());
        let max = pool.size_for(claim.class);
        if all > max {
            return Err(status::of_stage(StageError::NeverFits {
                given: all,
                max,
                what,
                flag,
            }));
        }
        // A request that arrives is not in the queue yet, so the drain rate does
        // not tell when there will be room.
        let share = pool
            .try_take(claim, n)
            .map_err(|reason| status::of_stage(no_room(reason, what, flag, RETRY_ARRIVING)))?;
        held.merge(share);
        Ok(())
    }

    /// Reads the prefix of a message.
    fn prefix(&self, prefix: [u8; PREFIX_LEN]) -> Result<Prefix, Status> {
        let [flag, len @ ..] = prefix;
        let compression = match (flag, self.compression) {
            (0, _) => None,
            (1, Some(compression)) => Some(compression),
            (1, None) => {
                return Err(malformed(
                    "request: a message is compressed, but the header grpc-encoding does not name \
                     its compression; use gzip or deflate",
                ));
            }
            (flag, _) => {
                return Err(malformed(&format!(
                    "request: a message begins with {flag}; its first byte must be 0 or 1"
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
                "request: the message is too large; the limit is {} bytes",
                self.message_bytes_max
            ));
        }
        status::of_call(&RequestError::MessageTooLarge {
            max: self.message_bytes_max as u64,
        })
    }

    /// Returns the most bytes that a message can hold, including the bytes that
    /// its handler needs in addition.
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

/// Future that waits for the room of a stream's message.
type Room = Pin<Box<dyn Future<Output = CapacityShare> + Send>>;

/// Progress of the message that is arriving.
enum Part {
    Prefix {
        bytes: [u8; PREFIX_LEN],
        n: usize,
    },
    Room {
        prefix: Prefix,
        room: Room,
    },
    /// Content of the message, in a buffer that begins with the prefix that the
    /// library will read.
    Message {
        prefix: Prefix,
        buffer: Vec<u8>,
    },
    Inflating(Box<Inflating>),
    /// Everything was passed to the library, or rejected.
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

/// Message that is being inflated.
struct Inflating {
    inflater: Inflater,
    /// Inflated message, which begins with the prefix that the library will
    /// read.
    buffer: Vec<u8>,
    /// Bytes of the compressed message.
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

    /// Inflates up to `n` bytes and returns their number; 0 at the end.
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
    /// Received bytes that have not been processed.
    rest: Bytes,
    /// True if the body has ended.
    has_ended: bool,
    part: Part,
    /// Share of the message that is arriving.
    held: CapacityShare,
    /// Time at which the request, or the message of a stream, began to arrive.
    since: Instant,
    /// Timer of the arrival, made at the first wait: most requests arrive at
    /// once.
    end: Option<Pin<Box<dyn Future<Output = Status> + Send>>>,
}

/// Next action on a body.
enum Step {
    /// Pass a message to the library.
    Give(Bytes),
    /// Take another step, since the part has changed.
    Again,
    /// Read the next piece of the body.
    Read,
    /// Let other tasks run first.
    Yield,
    /// End the body.
    End,
}

impl Arriving {
    /// Takes one step with the received bytes.
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
                // From here on the body waits only for the client.
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
                (0, false) => Err(malformed("request: the body has no message; send one")),
                _ => Err(truncated()),
            };
        }
        let prefix = self.arrival.prefix(*bytes)?;
        self.part = match &self.arrival.bytes {
            Some(pool) if self.arrival.is_stream => {
                // A share that no handler took, such as the share of the
                // opening, is released now: a stream that waits for room must
                // hold none.
                drop(self.arrival.arrived.take());
                // A stream that waits gets room only from the part that bulk
                // work may use.
                let most = self.arrival.most(&prefix);
                let most = most.min(pool.size_for(Priority::Bulk));
                let pool = pool.clone();
                let claim = CapacityClaim {
                    class: Priority::Bulk,
                    ..self.arrival.caller.claim(Priority::Bulk, 0)
                };
                // The room does not come from the interactive reserve, whatever
                // the stream's class: a message may take long to arrive, and
                // calls that do not wait need the reserve.
                let room = Box::pin(async move { pool.take(claim, most).await });
                Part::Room { prefix, room }
            }
            _ => Part::Message {
                prefix,
                buffer: Vec::new(),
            },
        };
        Ok(Step::Again)
    }

    /// Takes the message of a request that arrived in one piece, as most
    /// requests do, without a copy; none if the request has another form.
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

    /// Gathers the content of a message.
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
                    "request: the body has a second message; this method takes one",
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
                // One further byte shows that the message is too large.
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

    /// Passes a message and its share on.
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

    /// Returns true if the body waits for its client, which has a time limit.
    fn is_timed(&self) -> bool {
        match self.part {
            Part::Message { .. } => true,
            // A stream may stay open for as long as its client likes.
            Part::Prefix { .. } => !self.arrival.is_stream || self.arrival.bytes.is_none(),
            Part::Room { .. } | Part::Inflating(_) | Part::Over => false,
        }
    }

    /// Resolves to the status of a request that has not arrived in time, or
    /// that the draining worker rejects.
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

    /// Reads the next piece of the body.
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
                // A request's trailers do not matter.
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

/// Returns the status of a request that ends within a message.
fn truncated() -> Status {
    malformed("request: the body ends before its message is complete")
}

/// Returns the status of a call whose request broke off. The library hides a
/// body's CANCELLED and answers as if the request had ended, so the body fails
/// with ABORTED, which the worker uses for nothing else; see [`ended`].
fn broken(status: &Status) -> Status {
    use std::error::Error as _;
    if status.source().is_some() {
        tracing::debug!(error = %status, "request broke off");
        return Status::aborted(BROKEN);
    }
    // Without a cause from the transport, gRPC-Web could not parse its frames.
    malformed(&format!("request: {}", status.message()))
}

/// Returns the status of a call whose request body failed with `status`.
pub(super) fn ended(status: Status, deadline: Option<Instant>) -> Status {
    if status.code() != Code::Aborted {
        return status;
    }
    // A client that gives up at its deadline resets the stream.
    if deadline.is_some_and(|deadline| deadline <= Instant::now()) {
        return status::of_call(&RequestError::RequestLate);
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
            // The body's memory and share are freed at once, whenever the
            // library drops the body.
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
