//! Reader of a tar's members, one after the other: ustar, GNU and PAX, sparse
//! files, tars that follow each other in one file, and tars compressed with
//! gzip.
//!
//! A library that unpacks tars hides what a dataset must not lose: raw names,
//! the maps of sparse files, and what lies after the first end marker. So the
//! headers are read here.

mod bytes;
mod header;
mod sparse;

use std::io::{self, Read};

use self::bytes::TarBytes;
use self::header::{Extended, Header};
pub(super) use self::sparse::Extent;

use crate::commands::embed::ranged::Ranged;

/// Size of a tar's blocks.
const BLOCK: usize = 512;
/// Most bytes of an extended header: a name, or records of PAX, which may hold
/// extended attributes. A limit keeps a false size from taking memory.
const EXTENDED_BYTES_MAX: u64 = 1 << 20;

type Block = [u8; BLOCK];

/// Kind of a member, as far as it matters for a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum MemberKind {
    File,
    /// Hard link, with the name of the file within the tar.
    HardLink(Vec<u8>),
    /// Symbolic link, with its target relative to the link's own directory.
    SymbolicLink(Vec<u8>),
    /// Directory, device, pipe, label of a volume: nothing that has content.
    Other,
}

/// Place of a member's content within the tar.
#[derive(Debug, Clone)]
pub(super) struct StoredContent {
    /// Offset of the first stored byte.
    pub(super) at: u64,
    /// Size of the file. A sparse file has fewer bytes stored.
    pub(super) size: u64,
    /// Pieces of a sparse file that are stored, in order.
    pub(super) map: Option<Vec<Extent>>,
}

/// Member of a tar.
#[derive(Debug)]
pub(super) struct Member {
    /// Offset at which the member begins, with all its extended headers.
    pub(super) begins: u64,
    /// Name as the tar has it, in any encoding.
    pub(super) name: Vec<u8>,
    pub(super) kind: MemberKind,
    pub(super) content: StoredContent,
    /// Reason for which the content cannot be read, although reading may go on
    /// after it.
    pub(super) fault: Option<String>,
}

/// Members of a tar, read from its beginning.
#[derive(Debug)]
pub(super) struct Members {
    bytes: TarBytes,
    /// Offset at which the next header is looked for.
    next: u64,
    /// Values of the global extended headers so far.
    global: Extended,
    /// True if only blocks of zeros have come since the last member.
    ended: bool,
}

impl Members {
    pub(super) fn new(file: &Ranged) -> io::Result<Self> {
        Ok(Self {
            bytes: TarBytes::new(file)?,
            next: 0,
            global: Extended::default(),
            ended: false,
        })
    }

    /// True if any part of the tar can be read again.
    pub(super) fn is_seekable(&self) -> bool {
        self.bytes.is_seekable()
    }

    /// Returns the share of the file that has been read, 0 to 1.
    pub(super) fn share(&self) -> f64 {
        self.bytes.share()
    }

    /// Reads on to the next member; `None` at the end. The member's content may
    /// be read by [`Self::read`] until the next call.
    ///
    /// # Errors
    ///
    /// When the tar is damaged, cut off, or cannot be read.
    pub(super) fn next(&mut self) -> io::Result<Option<Member>> {
        self.bytes.skip_to(self.next)?;
        let mut begins = None;
        let mut local = Extended::default();
        loop {
            let at = self.bytes.at();
            let Some(block) = self.bytes.block()? else {
                return self.end(begins.is_some()).map(|()| None);
            };
            if block == [0; BLOCK] {
                if begins.is_some() {
                    return Err(wrong(at, "an extended header belongs to no file"));
                }
                // After the end marker another tar may follow, as after `cat`.
                self.ended = true;
                continue;
            }
            let header = Header::new(&block);
            if !header.checksum_fits() {
                return Err(wrong(at, "there is no header of a tar"));
            }
            self.ended = false;
            let begins = *begins.get_or_insert(at);
            if self.extended(&header, &mut local)? {
                continue;
            }
            return self.member(begins, &header, local).map(Some);
        }
    }

    /// Checks that a tar may end here.
    fn end(&self, is_within: bool) -> io::Result<()> {
        if self.ended && !is_within {
            return Ok(());
        }
        Err(io::Error::new(
            io::ErrorKind::UnexpectedEof,
            if self.bytes.at() == 0 {
                "the file has no bytes"
            } else {
                "the file ends without the blocks of zeros that end a tar, so it was cut off"
            },
        ))
    }

    /// Reads a header that describes the member after it. Returns false for the
    /// header of a member itself.
    fn extended(&mut self, header: &Header<'_>, local: &mut Extended) -> io::Result<bool> {
        let kind = header.kind();
        if !matches!(kind, b'x' | b'X' | b'g' | b'L' | b'K') {
            return Ok(false);
        }
        let at = self.bytes.at();
        let size = header.size().map_err(|why| wrong(at, why))?;
        if size > EXTENDED_BYTES_MAX {
            return Err(wrong(
                at,
                &format!(
                    "an extended header has {size} bytes, over the limit of {EXTENDED_BYTES_MAX}"
                ),
            ));
        }
        let content = self.bytes.content(size)?;
        self.bytes
            .skip_to(at + size.next_multiple_of(BLOCK as u64))?;
        match kind {
            b'g' => self.global.records(&content),
            b'L' => {
                local.long_name(&content);
                Ok(())
            }
            b'K' => {
                local.long_link(&content);
                Ok(())
            }
            _ => local.records(&content),
        }
        .map_err(|why| wrong(at, why))?;
        Ok(true)
    }

    /// Makes the member of a header, and finds out where its content is.
    fn member(&mut self, begins: u64, header: &Header<'_>, local: Extended) -> io::Result<Member> {
        let at = self.bytes.at();
        let size = match local.size {
            Some(size) => size,
            None => header.size().map_err(|why| wrong(at, why))?,
        };
        let name = local.name(header, &self.global);
        let (kind, has_data) = match header.kind() {
            flag @ b'1'..=b'6' => {
                // Some writers give sizes to links and directories without
                // content, others store the content of a hard link.
                let has_data = size > 0 && !self.bytes.is_header_next()?;
                let kind = match flag {
                    b'1' if has_data => MemberKind::File,
                    b'1' => MemberKind::HardLink(local.link(header, &self.global)),
                    b'2' => MemberKind::SymbolicLink(local.link(header, &self.global)),
                    _ => MemberKind::Other,
                };
                (kind, has_data)
            }
            // Directories of incremental backups, labels of volumes, long names
            // and lists of access rights of old programs.
            b'D' | b'V' | b'N' | b'A' | b'E' | b'I' => (MemberKind::Other, true),
            // POSIX: what is not known is a file.
            _ => (MemberKind::File, true),
        };
        let stored = if has_data { size } else { 0 };
        let mut member = Member {
            begins,
            name,
            kind,
            content: StoredContent {
                at,
                size: stored,
                map: None,
            },
            fault: None,
        };
        if header.kind() == b'M' {
            member.fault = Some("it is continued from another volume of the tar".to_owned());
        } else if member.kind == MemberKind::File {
            sparse::locate(&mut self.bytes, header, local, stored, &mut member)?;
        }
        let data = if header.kind() == b'S' {
            // The blocks of a map in GNU's old format are not part of the size.
            member.content.at
        } else {
            at
        };
        let end = stored.checked_next_multiple_of(BLOCK as u64);
        let end = end.and_then(|stored| data.checked_add(stored));
        self.next = end.ok_or_else(|| wrong(at, "a file has an impossible size"))?;
        Ok(member)
    }

    /// Reads the whole content of the member that was read last, whose size has
    /// been checked against a limit.
    pub(super) fn read(&mut self, content: &StoredContent) -> io::Result<Vec<u8>> {
        fill(&mut self.bytes, content)
    }

    /// Reads the whole content of a member that was read at any time before,
    /// from a tar that is seekable.
    pub(super) fn read_again(&self, content: &StoredContent) -> io::Result<Vec<u8>> {
        fill(&mut self.bytes.again(content.at)?, content)
    }
}

/// Reads a content from a reader that stands at its beginning.
fn fill(reader: &mut impl Read, content: &StoredContent) -> io::Result<Vec<u8>> {
    let mut whole = vec![0; usize::try_from(content.size).map_err(io::Error::other)?];
    let mut piece = |place: &mut [u8]| {
        reader
            .read_exact(place)
            .map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => bytes::cut(),
                _ => error,
            })
    };
    let Some(map) = &content.map else {
        piece(&mut whole)?;
        return Ok(whole);
    };
    for extent in map {
        // A map is checked against the file's size when it is read.
        let place = usize::try_from(extent.at)
            .ok()
            .zip(usize::try_from(extent.bytes).ok());
        let place = place.and_then(|(at, bytes)| whole.get_mut(at..at.checked_add(bytes)?));
        piece(place.ok_or(io::ErrorKind::InvalidData)?)?;
    }
    Ok(whole)
}

/// Makes the error of a tar that is damaged at an offset.
fn wrong(at: u64, why: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("{why}, at byte {at}"))
}
