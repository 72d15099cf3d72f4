//! Bodies of HTTP that are compressed for the way (`Content-Encoding`), in
//! bounded memory.

use std::io::{self, Write};

use bytes::Bytes;
use flate2::write::{MultiGzDecoder, ZlibDecoder};

/// First bytes of a gzip stream.
const GZIP: [u8; 2] = [0x1f, 0x8b];

/// Reason for which a body cannot be taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum BodyRefused {
    /// The body has more than the allowed bytes, after decompression.
    #[error("the body has over {0} bytes")]
    TooLarge(u64),
    #[error("the body cannot be decompressed ({encoding}): {error}")]
    Damaged {
        encoding: &'static str,
        error: io::Error,
    },
    #[error("the body is compressed with {0}, which is not supported; gzip and deflate are")]
    Unsupported(String),
}

/// Collector of a body, which decompresses it on the way. It holds at most
/// `max` bytes, and what one piece of the body may add is cut there as well.
#[derive(Debug)]
pub(super) struct BodyDecoder {
    encoding: String,
    max: u64,
    inner: Option<Inner>,
}

#[derive(Debug)]
enum Inner {
    Plain(Limited),
    Gzip(Box<MultiGzDecoder<Limited>>),
    Zlib(Box<ZlibDecoder<Limited>>),
}

#[derive(Debug)]
struct Limited {
    bytes: Vec<u8>,
    max: u64,
    is_over: bool,
}

impl Write for Limited {
    fn write(&mut self, more: &[u8]) -> io::Result<usize> {
        let all = (self.bytes.len() as u64).saturating_add(more.len() as u64);
        if all > self.max {
            self.is_over = true;
            return Err(io::ErrorKind::FileTooLarge.into());
        }
        self.bytes.extend_from_slice(more);
        Ok(more.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl BodyDecoder {
    /// Makes the collector of a body of at most `max` bytes after
    /// decompression, with the value of its `Content-Encoding`.
    pub(super) fn new(encoding: Option<&str>, max: u64) -> Self {
        Self {
            encoding: encoding.unwrap_or_default().trim().to_ascii_lowercase(),
            max,
            inner: None,
        }
    }

    fn begin(&self, first: &[u8]) -> Result<Inner, BodyRefused> {
        let limited = Limited {
            bytes: Vec::new(),
            max: self.max,
            is_over: false,
        };
        match self.encoding.as_str() {
            // Some buckets state an encoding that their objects do not have.
            "gzip" | "x-gzip" if first.starts_with(&GZIP[..first.len().min(2)]) => {
                Ok(Inner::Gzip(Box::new(MultiGzDecoder::new(limited))))
            }
            "deflate" => Ok(Inner::Zlib(Box::new(ZlibDecoder::new(limited)))),
            "" | "identity" | "gzip" | "x-gzip" | "aws-chunked" => Ok(Inner::Plain(limited)),
            other => Err(BodyRefused::Unsupported(other.to_owned())),
        }
    }

    /// Takes the next piece of the body.
    pub(super) fn push(&mut self, piece: &[u8]) -> Result<(), BodyRefused> {
        if piece.is_empty() {
            return Ok(());
        }
        let mut inner = match self.inner.take() {
            Some(inner) => inner,
            None => self.begin(piece)?,
        };
        let (written, encoding, limited) = match &mut inner {
            Inner::Plain(body) => (body.write_all(piece), "identity", &*body),
            Inner::Gzip(body) => (body.write_all(piece), "gzip", body.get_ref()),
            Inner::Zlib(body) => (body.write_all(piece), "deflate", body.get_ref()),
        };
        match written {
            Err(_) if limited.is_over => Err(BodyRefused::TooLarge(self.max)),
            Err(error) => Err(BodyRefused::Damaged { encoding, error }),
            Ok(()) => {
                self.inner = Some(inner);
                Ok(())
            }
        }
    }

    /// Returns the whole body.
    pub(super) fn finish(self) -> Result<Bytes, BodyRefused> {
        let over = self.max;
        let (body, encoding) = match self.inner {
            None => return Ok(Bytes::new()),
            Some(Inner::Plain(body)) => return Ok(body.bytes.into()),
            Some(Inner::Gzip(body)) => (body.finish(), "gzip"),
            Some(Inner::Zlib(body)) => (body.finish(), "deflate"),
        };
        match body {
            Ok(body) => Ok(body.bytes.into()),
            Err(error) if error.kind() == io::ErrorKind::FileTooLarge => {
                Err(BodyRefused::TooLarge(over))
            }
            Err(error) => Err(BodyRefused::Damaged { encoding, error }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn gzip(content: &[u8]) -> Vec<u8> {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        encoder.write_all(content).unwrap();
        encoder.finish().unwrap()
    }

    fn decoded(encoding: Option<&str>, max: u64, body: &[u8]) -> Result<Bytes, BodyRefused> {
        let mut decoder = BodyDecoder::new(encoding, max);
        for piece in body.chunks(7) {
            decoder.push(piece)?;
        }
        decoder.finish()
    }

    #[test]
    fn bodies_are_as_they_were_before_the_way() {
        let text = b"some text, some text, some text";
        let zipped = gzip(text);
        for (encoding, body) in [
            (None, &text[..]),
            (Some("identity"), text),
            (Some("gzip"), &zipped),
            (Some("X-Gzip"), &zipped),
            // Stated, and not there.
            (Some("gzip"), text),
        ] {
            assert_eq!(decoded(encoding, 100, body).unwrap(), &text[..]);
        }
        let wrong = decoded(Some("br"), 100, text).unwrap_err();
        assert!(matches!(wrong, BodyRefused::Unsupported(_)));
        let cut = decoded(Some("gzip"), 100, &zipped[..zipped.len() - 9]).unwrap_err();
        assert!(matches!(cut, BodyRefused::Damaged { .. }), "{cut}");
    }

    #[test]
    fn a_body_is_counted_as_it_is_after_decompression() {
        let bomb = gzip(&vec![0; 10 << 20]);
        assert!(bomb.len() < 100 << 10);
        let over = decoded(Some("gzip"), 1 << 20, &bomb).unwrap_err();
        assert!(matches!(over, BodyRefused::TooLarge(max) if max == 1 << 20));
    }
}
