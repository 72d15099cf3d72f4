//! Large file that is read in blocks, which are requested ahead of time.
//!
//! Readers of tar, Parquet and Arrow are blocking code on a thread of its own.
//! This module makes an object in a bucket look like a file to them, with range
//! requests and in bounded memory.

use std::collections::VecDeque;
use std::io::{self, Read, Seek, SeekFrom};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use object_store::ObjectStoreExt as _;
use parquet::file::reader::{ChunkReader, Length};
use tokio::runtime::Handle;
use tokio::task::JoinHandle;

use super::location::{Location, lasting_fault};
use crate::client::pool::ImageFault;

/// Size of a block: large enough that a request's latency is small beside its
/// transfer.
const BLOCK_BYTES: u64 = 4 << 20;
/// Blocks that are requested before they are needed. At 50 ms per request this
/// gives about 160 MB/s.
const AHEAD: u64 = 2;
/// Blocks that are kept. Parquet's columns are read side by side, each from its
/// own position.
const KEPT: usize = 12;

/// File that is read by ranges. Clones share their blocks, and each has its own
/// position.
#[derive(Debug, Clone)]
pub(super) struct Ranged {
    blocks: Arc<Blocks>,
    at: u64,
}

#[derive(Debug)]
struct Blocks {
    location: Location,
    bytes: u64,
    runtime: Handle,
    kept: Mutex<VecDeque<(u64, Block)>>,
    /// Reason for which a block could not be fetched. The formats' readers turn
    /// such an error into texts of their own, which do not distinguish a
    /// damaged file from an unavailable bucket.
    failure: Mutex<Option<Unread>>,
}

/// Reason for which a block could not be fetched.
#[derive(Debug)]
pub(super) enum Unread {
    /// The store answers the same request in the same way the next time.
    ForGood(ImageFault),
    ThisTime(anyhow::Error),
}

impl Unread {
    fn new(location: &Location, error: &io::Error) -> Self {
        let cause = error.get_ref().and_then(|cause| cause.downcast_ref());
        match cause.and_then(|cause| lasting_fault(location, cause)) {
            Some(fault) => Self::ForGood(fault),
            None => Self::ThisTime(anyhow::anyhow!("{location}: {error}")),
        }
    }
}

#[derive(Debug)]
enum Block {
    Asked(JoinHandle<io::Result<Bytes>>),
    There(Bytes),
}

impl Ranged {
    /// Makes a reader of the file at `location`, which has `bytes` bytes.
    pub(super) fn new(location: Location, bytes: u64, runtime: Handle) -> Self {
        let blocks = Arc::new(Blocks {
            location,
            bytes,
            runtime,
            kept: Mutex::new(VecDeque::new()),
            failure: Mutex::new(None),
        });
        Self { blocks, at: 0 }
    }

    pub(super) fn location(&self) -> &Location {
        &self.blocks.location
    }

    /// Takes the reason for which a block could not be fetched, if one could
    /// not.
    pub(super) fn failure(&self) -> Option<Unread> {
        let failure = self.blocks.failure.lock();
        failure.unwrap_or_else(PoisonError::into_inner).take()
    }

    /// Returns the offset of the next byte.
    pub(super) fn at(&self) -> u64 {
        self.at
    }

    /// Returns a reader of the same file that begins at the offset `at`.
    pub(super) fn from(&self, at: u64) -> Self {
        Self {
            blocks: Arc::clone(&self.blocks),
            at: at.min(self.blocks.bytes),
        }
    }
}

impl Blocks {
    fn ask(&self, idx: u64) -> Block {
        let start = idx * BLOCK_BYTES;
        let range = start..(start + BLOCK_BYTES).min(self.bytes);
        let location = self.location.clone();
        Block::Asked(self.runtime.spawn(fetch(location, range)))
    }

    fn get(&self, idx: u64) -> io::Result<Bytes> {
        let n_blocks = self.bytes.div_ceil(BLOCK_BYTES);
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let has = |kept: &VecDeque<(u64, Block)>, idx| kept.iter().any(|(other, _)| *other == idx);
        // A reader of the first block, or of a block whose predecessor was
        // read, is taken to continue.
        let goes_on = idx == 0 || has(&kept, idx - 1);
        let last = if goes_on { idx + AHEAD } else { idx };
        for idx in idx..=last.min(n_blocks.saturating_sub(1)) {
            if !has(&kept, idx) {
                kept.push_back((idx, self.ask(idx)));
            }
        }
        let Some(place) = kept.iter().position(|(other, _)| *other == idx) else {
            return Err(io::ErrorKind::UnexpectedEof.into());
        };
        let bytes = match &mut kept[place].1 {
            Block::There(bytes) => Ok(bytes.clone()),
            Block::Asked(asked) => match self.runtime.block_on(asked) {
                Ok(fetched) => fetched,
                Err(error) => Err(io::Error::other(error)),
            },
        };
        match &bytes {
            Ok(bytes) => {
                kept[place].1 = Block::There(bytes.clone());
                while kept.len() > KEPT {
                    kept.pop_front();
                }
            }
            // The block may be requested again.
            Err(error) => {
                kept.remove(place);
                let failure = self.failure.lock();
                *failure.unwrap_or_else(PoisonError::into_inner) =
                    Some(Unread::new(&self.location, error));
            }
        }
        bytes
    }
}

async fn fetch(location: Location, range: std::ops::Range<u64>) -> io::Result<Bytes> {
    match location {
        Location::Local(path) => tokio::task::spawn_blocking(move || {
            let mut file = std::fs::File::open(path)?;
            file.seek(SeekFrom::Start(range.start))?;
            let length = usize::try_from(range.end - range.start).map_err(io::Error::other)?;
            let mut bytes = vec![0; length];
            file.read_exact(&mut bytes)?;
            Ok(bytes.into())
        })
        .await
        .map_err(io::Error::other)?,
        Location::Remote { store, path, .. } => store
            .get_range(&path, range)
            .await
            .map_err(io::Error::other),
    }
}

impl Read for Ranged {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at >= self.blocks.bytes || buffer.is_empty() {
            return Ok(0);
        }
        let block = self.blocks.get(self.at / BLOCK_BYTES)?;
        // The offset is less than a block, so it fits into `usize` on every
        // machine.
        let start = usize::try_from(self.at % BLOCK_BYTES).map_err(io::Error::other)?;
        let there = block.get(start..).unwrap_or_default();
        let n = there.len().min(buffer.len());
        buffer[..n].copy_from_slice(&there[..n]);
        self.at += n as u64;
        Ok(n)
    }
}

impl Seek for Ranged {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let (base, by) = match to {
            SeekFrom::Start(at) => (at, 0),
            SeekFrom::End(by) => (self.blocks.bytes, by),
            SeekFrom::Current(by) => (self.at, by),
        };
        self.at = base
            .checked_add_signed(by)
            .ok_or(io::ErrorKind::InvalidInput)?;
        Ok(self.at)
    }
}

impl Length for Ranged {
    fn len(&self) -> u64 {
        self.blocks.bytes
    }
}

impl ChunkReader for Ranged {
    type T = Self;

    fn get_read(&self, start: u64) -> parquet::errors::Result<Self> {
        Ok(self.from(start))
    }

    fn get_bytes(&self, start: u64, length: usize) -> parquet::errors::Result<Bytes> {
        // A range within one block needs no copy.
        let offset = usize::try_from(start % BLOCK_BYTES).map_err(io::Error::other)?;
        let block = self.blocks.get(start / BLOCK_BYTES)?;
        if let Some(end) = offset.checked_add(length)
            && end <= block.len()
        {
            return Ok(block.slice(offset..end));
        }
        let wanted = (self.blocks.bytes.saturating_sub(start)).min(length as u64);
        let mut bytes = BytesMut::zeroed(usize::try_from(wanted).map_err(io::Error::other)?);
        self.from(start).read_exact(&mut bytes)?;
        if bytes.len() < length {
            return Err(io::Error::from(io::ErrorKind::UnexpectedEof).into());
        }
        Ok(bytes.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn blocks_read_as_the_file_does() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("file");
        let length = 2 * usize::try_from(BLOCK_BYTES).unwrap() + 12345;
        let content: Vec<u8> = (0..length)
            .map(|n| u8::try_from(n % 251).unwrap())
            .collect();
        std::fs::write(&path, &content).unwrap();
        let ranged = Ranged::new(Location::Local(path), length as u64, Handle::current());
        tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            ranged.from(0).read_to_end(&mut all).unwrap();
            assert!(all == content);
            let over_an_edge = BLOCK_BYTES - 10;
            let at = usize::try_from(over_an_edge).unwrap();
            let chunk = ranged.get_bytes(over_an_edge, 20).unwrap();
            assert_eq!(chunk, content[at..at + 20]);
            assert!(ranged.get_bytes(length as u64 - 5, 6).is_err());
            let mut sought = ranged.clone();
            sought.seek(SeekFrom::End(-3)).unwrap();
            let mut last = Vec::new();
            sought.read_to_end(&mut last).unwrap();
            assert_eq!(last, content[length - 3..]);
        })
        .await
        .unwrap();
    }
}
