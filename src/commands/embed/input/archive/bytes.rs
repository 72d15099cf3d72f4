//! Bytes of a tar: those of the file, or what gzip makes of them.

use std::io::{self, BufRead as _, BufReader, Cursor, Read};

use flate2::bufread::GzDecoder;
use parquet::file::reader::Length as _;

use super::header::Header;
use super::{BLOCK, Block};
use crate::commands::embed::ranged::Ranged;

/// First bytes of what gzip writes.
const GZIP: &[u8] = &[0x1f, 0x8b];
/// First bytes of other compressed files, which are refused by name.
const OTHERS: [(&[u8], &str); 5] = [
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\0", "xz"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
];

/// Bytes of a tar, read in their order.
#[derive(Debug)]
pub(super) struct TarBytes {
    source: TarSource,
    /// Offset of the next byte.
    at: u64,
    /// Block that was looked at before its turn.
    ahead: Option<Cursor<Block>>,
    /// Size of the file as it is stored.
    bytes: u64,
}

#[derive(Debug)]
enum TarSource {
    Plain(Ranged),
    Gzip(Box<GzipMembers>),
}

/// Makes the error of a tar whose file ends too early.
pub(super) fn cut() -> io::Error {
    io::Error::new(
        io::ErrorKind::UnexpectedEof,
        "the file ends in the middle of the tar",
    )
}

impl TarBytes {
    pub(super) fn new(file: &Ranged) -> io::Result<Self> {
        let mut first = [0; 8];
        let n = read_up_to(&mut file.from(0), &mut first)?;
        let first = &first[..n];
        if let Some((_, name)) = OTHERS.iter().find(|(magic, _)| first.starts_with(magic)) {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!("it is compressed with {name}, which is not read; use gzip or none"),
            ));
        }
        let source = if first.starts_with(GZIP) {
            TarSource::Gzip(Box::new(GzipMembers::new(file)))
        } else {
            TarSource::Plain(file.from(0))
        };
        Ok(Self {
            source,
            at: 0,
            ahead: None,
            bytes: file.len(),
        })
    }

    pub(super) fn at(&self) -> u64 {
        self.at
    }

    pub(super) fn is_seekable(&self) -> bool {
        matches!(self.source, TarSource::Plain(_))
    }

    #[expect(clippy::cast_precision_loss, reason = "a share for the eye")]
    pub(super) fn share(&self) -> f64 {
        let at = match &self.source {
            TarSource::Plain(_) => self.at,
            TarSource::Gzip(members) => members.at(),
        };
        at as f64 / self.bytes.max(1) as f64
    }

    /// Returns a reader of the same tar at another offset.
    pub(super) fn again(&self, at: u64) -> io::Result<Ranged> {
        match &self.source {
            TarSource::Plain(file) => Ok(file.from(at)),
            TarSource::Gzip(_) => Err(io::ErrorKind::Unsupported.into()),
        }
    }

    /// Reads the next block; `None` at the end of the file.
    pub(super) fn block(&mut self) -> io::Result<Option<Block>> {
        let mut block = [0; BLOCK];
        match read_up_to(self, &mut block)? {
            0 => Ok(None),
            BLOCK => Ok(Some(block)),
            _ => Err(cut()),
        }
    }

    /// Reads `size` bytes; the caller has checked the size against a limit.
    pub(super) fn content(&mut self, size: u64) -> io::Result<Vec<u8>> {
        let mut content = vec![0; usize::try_from(size).map_err(io::Error::other)?];
        let n = read_up_to(self, &mut content)?;
        if n < content.len() {
            return Err(cut());
        }
        Ok(content)
    }

    /// True if the next block is a header, or zeros, or the end: something that
    /// can follow a member without content.
    pub(super) fn is_header_next(&mut self) -> io::Result<bool> {
        let at = self.at;
        let Some(block) = self.block()? else {
            return Ok(true);
        };
        self.at = at;
        self.ahead = Some(Cursor::new(block));
        Ok(block == [0; BLOCK] || Header::new(&block).checksum_fits())
    }

    /// Goes on to an offset that has not been passed.
    pub(super) fn skip_to(&mut self, at: u64) -> io::Result<()> {
        let by = at.saturating_sub(self.at);
        if by == 0 {
            return Ok(());
        }
        match &mut self.source {
            TarSource::Plain(file) => {
                if at > self.bytes {
                    return Err(cut());
                }
                *file = file.from(at);
                self.ahead = None;
                self.at = at;
            }
            // Takes as much time as the file's size allows: deflate makes at
            // most 1032 bytes of one.
            TarSource::Gzip(_) => {
                let skipped = io::copy(&mut self.by_ref().take(by), &mut io::sink())?;
                if skipped < by {
                    return Err(cut());
                }
            }
        }
        Ok(())
    }
}

impl Read for TarBytes {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let mut n = 0;
        if let Some(ahead) = &mut self.ahead {
            n = ahead.read(buffer)?;
            if n == 0 {
                self.ahead = None;
            }
        }
        if n == 0 {
            n = match &mut self.source {
                TarSource::Plain(file) => {
                    // The block that was looked at has moved the file.
                    *file = file.from(self.at);
                    file.read(buffer)?
                }
                TarSource::Gzip(members) => members.read(buffer)?,
            };
        }
        self.at += n as u64;
        Ok(n)
    }
}

/// Reads until the buffer is full or the file ends.
fn read_up_to(reader: &mut impl Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut n = 0;
    while n < buffer.len() {
        match reader.read(&mut buffer[n..]) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(n)
}

/// Members of a gzip file, read as one: `cat` of several files is one file.
struct GzipMembers {
    /// Decoder of the current member; `None` after the last.
    decoder: Option<GzDecoder<BufReader<Ranged>>>,
    bytes: u64,
}

impl std::fmt::Debug for GzipMembers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("GzipMembers").finish_non_exhaustive()
    }
}

impl GzipMembers {
    fn new(file: &Ranged) -> Self {
        Self {
            decoder: Some(GzDecoder::new(BufReader::new(file.from(0)))),
            bytes: file.len(),
        }
    }

    /// Returns the offset in the compressed file.
    fn at(&self) -> u64 {
        let decoder = self.decoder.as_ref();
        decoder.map_or(self.bytes, |decoder| decoder.get_ref().get_ref().at())
    }
}

impl Read for GzipMembers {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while let Some(decoder) = &mut self.decoder {
            let n = decoder.read(buffer)?;
            if n > 0 || buffer.is_empty() {
                return Ok(n);
            }
            let Some(decoder) = self.decoder.take() else {
                break;
            };
            let mut rest = decoder.into_inner();
            if !pass_zeros(&mut rest)? {
                self.decoder = Some(GzDecoder::new(rest));
            }
        }
        Ok(0)
    }
}

/// Passes the zeros with which some programs fill up a gzip file; true at the
/// end of the file.
fn pass_zeros(file: &mut BufReader<Ranged>) -> io::Result<bool> {
    loop {
        let there = file.fill_buf()?;
        if there.is_empty() {
            return Ok(true);
        }
        let zeros = there.iter().take_while(|&&byte| byte == 0).count();
        let is_all = zeros == there.len();
        file.consume(zeros);
        if !is_all {
            return Ok(false);
        }
    }
}
