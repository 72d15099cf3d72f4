//! Sparse files in a tar: GNU's old format, and versions 0.0, 0.1 and 1.0 of
//! its records in PAX headers. Only pieces of such a file are stored, with a
//! map that says where each belongs; zeros lie between them.

use std::io;

use super::bytes::TarBytes;
use super::header::{Extended, Header, decimal, number};
use super::{BLOCK, Member, wrong};

/// Most pieces of a sparse file: 1 MiB of map. An image has a few.
const EXTENTS_MAX: usize = 1 << 16;
/// Longest line of a map of version 1.0: the digits of a number, and a line
/// feed.
const LINE_BYTES_MAX: usize = 21;

/// Fault of a sparse file whose pieces cannot be put in their places.
const DAMAGED: &str = "it is a sparse file whose map is damaged";

/// Piece of a sparse file that is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in super::super) struct Extent {
    /// Offset within the file.
    pub(in super::super) at: u64,
    pub(in super::super) bytes: u64,
}

/// Map of a sparse file while it is read.
#[derive(Debug, Default)]
struct SparseMap {
    extents: Vec<Extent>,
    is_too_long: bool,
}

impl SparseMap {
    fn push(&mut self, at: u64, bytes: u64) {
        // An empty piece only marks the end of the file.
        if bytes == 0 {
            return;
        }
        if self.extents.len() == EXTENTS_MAX {
            self.is_too_long = true;
        } else {
            self.extents.push(Extent { at, bytes });
        }
    }

    /// Returns the reason for which a file of `size` bytes, with `stored` bytes
    /// in the tar, cannot have this map.
    fn fault(&self, size: u64, stored: u64) -> Option<String> {
        if self.is_too_long {
            return Some(format!(
                "it is a sparse file of more than {EXTENTS_MAX} pieces, the limit"
            ));
        }
        let mut end = Some(0);
        let mut sum = Some(0_u64);
        for extent in &self.extents {
            end = end
                .filter(|&end| end <= extent.at)
                .and_then(|_: u64| extent.at.checked_add(extent.bytes));
            sum = sum.and_then(|sum| sum.checked_add(extent.bytes));
        }
        let fits = end.is_some_and(|end| end <= size) && sum.is_some_and(|sum| sum <= stored);
        (!fits).then(|| DAMAGED.to_owned())
    }
}

/// Records of a PAX header that describe a sparse file.
#[derive(Debug, Default)]
pub(super) struct SparseRecords {
    pub(super) name: Option<Vec<u8>>,
    /// Size of the file; the header's is that of the stored bytes.
    size: Option<u64>,
    major: Option<u64>,
    /// Offset of the piece whose length comes next, of version 0.0.
    offset: Option<u64>,
    map: Option<SparseMap>,
}

impl SparseRecords {
    /// Stores the record of a key without its prefix; `None` if the value is
    /// wrong.
    pub(super) fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        match key {
            b"name" => self.name = Some(value.to_vec()),
            b"size" | b"realsize" => self.size = Some(decimal(value)?),
            b"major" => self.major = Some(decimal(value)?),
            b"offset" => self.offset = Some(decimal(value)?),
            b"numbytes" => {
                let at = self.offset.take()?;
                self.map.get_or_insert_default().push(at, decimal(value)?);
            }
            b"map" => {
                let mut map = SparseMap::default();
                let mut numbers = value.split(|&byte| byte == b',');
                while let Some(at) = numbers.next() {
                    map.push(decimal(at)?, decimal(numbers.next()?)?);
                }
                self.map = Some(map);
            }
            _ => {}
        }
        Some(())
    }
}

/// Completes the member of a file: if it is sparse, its size, its map and the
/// offset of its first stored byte. `stored` bytes follow the header.
pub(super) fn locate(
    bytes: &mut TarBytes,
    header: &Header<'_>,
    local: Extended,
    stored: u64,
    member: &mut Member,
) -> io::Result<()> {
    let at = bytes.at();
    let records = local.sparse;
    let (map, size) = if header.kind() == b'S' {
        let map = old_map(bytes, header)?;
        let size = number(&header.block()[483..495]).map_err(|why| wrong(at, why))?;
        (map, records.size.unwrap_or(size))
    } else if let Some(map) = records.map {
        (map, records.size.unwrap_or(stored))
    } else if records.major == Some(1) {
        let Some(map) = map_before_content(bytes, stored)? else {
            member.fault = Some(DAMAGED.to_owned());
            return Ok(());
        };
        (map, records.size.unwrap_or(stored))
    } else {
        return Ok(());
    };
    let begins = bytes.at();
    let of_map = if header.kind() == b'S' {
        0
    } else {
        begins - at
    };
    member.fault = map.fault(size, stored.saturating_sub(of_map));
    member.content.at = begins;
    member.content.size = size;
    member.content.map = Some(map.extents);
    Ok(())
}

/// Reads a map of GNU's old format: four pieces in the header, and 21 in each
/// block after it.
fn old_map(bytes: &mut TarBytes, header: &Header<'_>) -> io::Result<SparseMap> {
    let mut map = SparseMap::default();
    let mut pieces = |field: &[u8], at| {
        for piece in field.chunks_exact(24).take_while(|piece| piece[0] != 0) {
            let (offset, length) = piece.split_at(12);
            let of = |field| number(field).map_err(|why| wrong(at, why));
            map.push(of(offset)?, of(length)?);
        }
        Ok::<_, io::Error>(())
    };
    let mut at = bytes.at();
    pieces(&header.block()[386..482], at)?;
    let mut goes_on = header.block()[482] != 0;
    while goes_on {
        at = bytes.at();
        let block = bytes.block()?.ok_or_else(super::bytes::cut)?;
        pieces(&block[..504], at)?;
        goes_on = block[504] != 0;
    }
    Ok(map)
}

/// Reads a map of version 1.0, which fills the first blocks of the content: a
/// line with the number of pieces, and two lines for each. Returns `None` if the
/// map is damaged.
fn map_before_content(bytes: &mut TarBytes, stored: u64) -> io::Result<Option<SparseMap>> {
    let begin = bytes.at();
    let mut block = [0; BLOCK];
    let mut place = BLOCK;
    let mut line = || {
        let mut digits = Vec::with_capacity(LINE_BYTES_MAX);
        while digits.len() < LINE_BYTES_MAX {
            if place == BLOCK {
                if bytes.at() - begin + BLOCK as u64 > stored {
                    return Ok(None);
                }
                block = bytes.block()?.ok_or_else(super::bytes::cut)?;
                place = 0;
            }
            let byte = block[place];
            place += 1;
            if byte == b'\n' {
                return Ok(decimal(&digits));
            }
            digits.push(byte);
        }
        Ok::<_, io::Error>(None)
    };
    let Some(n_pieces) = line()? else {
        return Ok(None);
    };
    let mut map = SparseMap::default();
    // The loop ends with the stored bytes, whatever the number.
    for _ in 0..n_pieces {
        let (Some(at), Some(length)) = (line()?, line()?) else {
            return Ok(None);
        };
        map.push(at, length);
    }
    Ok(Some(map))
}
