//! Requests whose `:authority` is no authority of a URL.
//!
//! gRPC clients put the name of their target there: several addresses
//! (`ipv4:A,B`), the path of a socket behind a proxy, the name of a cluster.
//! The worker does not read the value, but the HTTP/2 library resets each
//! stream whose value does not parse as part of a URL, has no setting against
//! that, and its maintainers keep it so. So such a value is replaced before the
//! library reads it.
//!
//! The replacement has as many bytes as the value, so that the header table of
//! the library stays equal to the client's. An empty value becomes one byte,
//! which the library counts and the client does not: the library may then drop
//! the oldest entry of a full table one entry early, which ends the connection
//! with an error if the client still uses that entry, and never yields another
//! entry's value.
//!
//! Values that no header may have (control characters, spaces at an end, bytes
//! that are not UTF-8) are passed on unchanged, and the library refuses them.

mod block;
mod huffman;

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::{Buf as _, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// First bytes of a client that speaks HTTP/2.
const PREFACE: &[u8; 24] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
const HEAD_LEN: usize = 9;
const HEADERS: u8 = 1;
const PADDED: u8 = 0x8;
const PRIORITY: u8 = 0x20;
/// Largest payload of a frame, the default of HTTP/2, which the worker does
/// not raise. A larger frame is passed on, and the library refuses it.
const PAYLOAD_BYTES_MAX: usize = 16 << 10;
/// Bytes that are read at once while a frame is incomplete.
const SCRATCH_BYTES: usize = 4 << 10;

/// A connection whose requests have an `:authority` that the HTTP/2 library
/// accepts.
///
/// Holds back at most one incomplete frame of headers and the bytes of one read.
#[derive(Debug)]
pub(super) struct TolerantStream<S> {
    inner: S,
    place: FramePlace,
    /// Bytes from the beginning of a frame that is not complete yet.
    held: BytesMut,
    /// Bytes that the reader has not taken yet.
    done: BytesMut,
}

/// Place in the bytes of a client.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum FramePlace {
    /// Number of bytes of the preface that have passed.
    Preface(usize),
    Boundary,
    /// Number of bytes of a frame that are still to pass.
    Within(usize),
    /// The client does not speak HTTP/2, or has sent its last byte.
    Opaque,
}

/// Head of a frame.
#[derive(Debug, Clone, Copy)]
struct FrameHead {
    payload_bytes: usize,
    kind: u8,
    flags: u8,
}

impl FrameHead {
    fn parse(bytes: &[u8]) -> Option<Self> {
        let &[a, b, c, kind, flags, ..] = bytes.get(..HEAD_LEN)? else {
            return None;
        };
        Some(Self {
            payload_bytes: u32::from_be_bytes([0, a, b, c]) as usize,
            kind,
            flags,
        })
    }

    fn frame_bytes(self) -> usize {
        HEAD_LEN + self.payload_bytes
    }

    fn is_looked_at(self) -> bool {
        self.kind == HEADERS && self.payload_bytes <= PAYLOAD_BYTES_MAX
    }
}

impl<S> TolerantStream<S> {
    pub(super) fn new(inner: S) -> Self {
        Self {
            inner,
            place: FramePlace::Preface(0),
            held: BytesMut::new(),
            done: BytesMut::new(),
        }
    }

    /// Moves held bytes that are complete to those that are done, and returns
    /// the number of bytes that are missing.
    fn settle(&mut self) -> usize {
        loop {
            let n_passed = self.place.pass(&self.held);
            self.done.extend_from_slice(&self.held.split_to(n_passed));
            if self.held.is_empty() {
                return 0;
            }
            let n_wanted = FrameHead::parse(&self.held).map_or(HEAD_LEN, FrameHead::frame_bytes);
            if self.held.len() < n_wanted {
                return n_wanted - self.held.len();
            }
            let frame = self.held.split_to(n_wanted);
            match changed(&frame) {
                Some(changed) => self.done.extend_from_slice(&changed),
                None => self.done.extend_from_slice(&frame),
            }
        }
    }
}

impl FramePlace {
    /// Returns the number of bytes that can pass unchanged. The rest begins
    /// with a frame that must be changed, or that is too short to tell.
    fn pass(&mut self, bytes: &[u8]) -> usize {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match *self {
                Self::Opaque => return bytes.len(),
                Self::Preface(n_passed) if rest[0] != PREFACE[n_passed] => *self = Self::Opaque,
                Self::Preface(n_passed) => {
                    at += 1;
                    *self = match n_passed + 1 {
                        n_passed if n_passed == PREFACE.len() => Self::Boundary,
                        n_passed => Self::Preface(n_passed),
                    };
                }
                Self::Within(n_left) => {
                    let n_passed = n_left.min(rest.len());
                    at += n_passed;
                    *self = match n_left - n_passed {
                        0 => Self::Boundary,
                        n_left => Self::Within(n_left),
                    };
                }
                Self::Boundary => {
                    let Some(head) = FrameHead::parse(rest) else {
                        return at;
                    };
                    if head.is_looked_at() {
                        let Some(frame) = rest.get(..head.frame_bytes()) else {
                            return at;
                        };
                        if changed(frame).is_some() {
                            return at;
                        }
                    }
                    *self = Self::Within(head.frame_bytes());
                }
            }
        }
        at
    }
}

/// Returns the frame with another authority, if its authority must be changed.
fn changed(frame: &[u8]) -> Option<Vec<u8>> {
    let head = FrameHead::parse(frame)?;
    let payload = frame.get(HEAD_LEN..)?;
    let (mut start, mut end) = (0, payload.len());
    if head.flags & PADDED != 0 {
        let padding = usize::from(*payload.first()?);
        start += 1;
        end = end.checked_sub(padding)?;
    }
    if head.flags & PRIORITY != 0 {
        start += 5;
    }
    let block = payload.get(start..end)?;
    let (value, literal) = block::replacement(block)?;
    let (value_start, value_end) = (HEAD_LEN + start + value.start, HEAD_LEN + start + value.end);
    let mut changed = frame[..value_start].to_vec();
    changed.extend(literal);
    changed.extend_from_slice(&frame[value_end..]);
    let payload_bytes = changed.len() - HEAD_LEN;
    if payload_bytes > PAYLOAD_BYTES_MAX {
        return None;
    }
    let length = u32::try_from(payload_bytes).ok()?.to_be_bytes();
    changed[..3].copy_from_slice(&length[1..]);
    Some(changed)
}

impl<S: AsyncRead + Unpin> AsyncRead for TolerantStream<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        loop {
            if !this.done.is_empty() {
                let n_taken = buffer.remaining().min(this.done.len());
                buffer.put_slice(&this.done[..n_taken]);
                this.done.advance(n_taken);
                return Poll::Ready(Ok(()));
            }
            if this.held.is_empty() {
                let start = buffer.filled().len();
                ready!(Pin::new(&mut this.inner).poll_read(cx, buffer))?;
                let arrived = &buffer.filled()[start..];
                let n_passed = this.place.pass(arrived);
                if n_passed == arrived.len() {
                    return Poll::Ready(Ok(()));
                }
                this.held.extend_from_slice(&arrived[n_passed..]);
                buffer.set_filled(start + n_passed);
                if n_passed > 0 {
                    return Poll::Ready(Ok(()));
                }
            }
            let n_missing = this.settle();
            if n_missing == 0 || !this.done.is_empty() {
                continue;
            }
            let mut scratch = [0; SCRATCH_BYTES];
            let mut scratch = ReadBuf::new(&mut scratch[..n_missing.min(SCRATCH_BYTES)]);
            ready!(Pin::new(&mut this.inner).poll_read(cx, &mut scratch))?;
            if scratch.filled().is_empty() {
                // The client has closed within a frame; the library says so.
                this.place = FramePlace::Opaque;
            }
            this.held.extend_from_slice(scratch.filled());
        }
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for TolerantStream<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.inner).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }
}

#[cfg(test)]
mod tests;
