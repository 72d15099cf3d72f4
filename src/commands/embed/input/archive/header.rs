//! Headers of a tar's members: the fixed blocks, and the extended headers of
//! GNU and PAX.

use super::sparse::SparseRecords;
use super::{BLOCK, Block};

/// Header block of a member.
#[derive(Debug)]
pub(super) struct Header<'a> {
    block: &'a Block,
}

impl<'a> Header<'a> {
    pub(super) fn new(block: &'a Block) -> Self {
        Self { block }
    }

    pub(super) fn kind(&self) -> u8 {
        self.block[156]
    }

    pub(super) fn block(&self) -> &'a Block {
        self.block
    }

    /// Returns the number of bytes that are stored after the header.
    pub(super) fn size(&self) -> Result<u64, &'static str> {
        number(&self.block[124..136])
    }

    /// True if the block's sum is the one that it holds. Old programs added the
    /// bytes with their signs.
    pub(super) fn checksum_fits(&self) -> bool {
        let Ok(expected) = number(&self.block[148..156]) else {
            return false;
        };
        let bytes =
            self.block.iter().enumerate().map(
                |(at, &byte)| {
                    if (148..156).contains(&at) { b' ' } else { byte }
                },
            );
        let unsigned: u64 = bytes.clone().map(u64::from).sum();
        let signed: i64 = bytes.map(|byte| i64::from(byte.cast_signed())).sum();
        expected == unsigned || i64::try_from(expected) == Ok(signed)
    }

    fn name(&self) -> Vec<u8> {
        let name = text(&self.block[..100]);
        // GNU's format has other fields where the others have the prefix.
        let prefix = if &self.block[257..263] != b"ustar\0" {
            &[]
        } else if &self.block[508..] == b"tar\0" {
            // The program star keeps times after a shorter prefix.
            text(&self.block[345..476])
        } else {
            text(&self.block[345..500])
        };
        if prefix.is_empty() {
            name.to_vec()
        } else {
            [prefix, b"/", name].concat()
        }
    }

    fn link(&self) -> &'a [u8] {
        text(&self.block[157..257])
    }
}

/// Returns a field up to its first NUL.
fn text(field: &[u8]) -> &[u8] {
    field.split(|&byte| byte == 0).next().unwrap_or_default()
}

/// Reads a number of a header: octal digits, or, for large numbers, bytes with
/// the highest bit set.
pub(super) fn number(field: &[u8]) -> Result<u64, &'static str> {
    const WRONG: &str = "a header holds a number that cannot be read";
    let (&first, rest) = field.split_first().ok_or(WRONG)?;
    if first & 0x80 != 0 {
        // The second bit is the sign.
        if first & 0x40 != 0 {
            return Err(WRONG);
        }
        return rest
            .iter()
            .try_fold(u64::from(first & 0x3f), |sum, &byte| {
                Some(sum.checked_mul(256)? + u64::from(byte))
            })
            .ok_or(WRONG);
    }
    let digits = field.split(|&byte| byte == 0).next().unwrap_or_default();
    digits
        .trim_ascii()
        .iter()
        .try_fold(0, |sum: u64, &digit| match digit {
            b'0'..=b'7' => sum.checked_mul(8).map(|sum| sum + u64::from(digit - b'0')),
            _ => None,
        })
        .ok_or(WRONG)
}

/// Reads a decimal number of a record.
pub(super) fn decimal(text: &[u8]) -> Option<u64> {
    if !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    std::str::from_utf8(text).ok()?.parse().ok()
}

/// Values of extended headers, which replace those of the fixed header.
#[derive(Debug, Default)]
pub(super) struct Extended {
    path: Option<Vec<u8>>,
    link_path: Option<Vec<u8>>,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
    pub(super) size: Option<u64>,
    pub(super) sparse: SparseRecords,
}

impl Extended {
    /// Stores the name of one of GNU's headers of long names.
    pub(super) fn long_name(&mut self, content: &[u8]) {
        self.long_name = Some(text(content).to_vec());
    }

    pub(super) fn long_link(&mut self, content: &[u8]) {
        self.long_link = Some(text(content).to_vec());
    }

    /// Stores the records of a PAX header. Each is `LENGTH KEY=VALUE` and a line
    /// feed. The encoding of a name (`hdrcharset`) does not matter, since a name
    /// is bytes here.
    pub(super) fn records(&mut self, mut content: &[u8]) -> Result<(), &'static str> {
        const WRONG: &str = "an extended header is damaged";
        // Some writers fill up with NULs.
        while content.first().is_some_and(|&byte| byte != 0) {
            let space = content.iter().position(|&byte| byte == b' ').ok_or(WRONG)?;
            let length = decimal(&content[..space]).ok_or(WRONG)?;
            let length = usize::try_from(length).map_err(|_| WRONG)?;
            let record = content.get(space + 1..length).ok_or(WRONG)?;
            let record = record.strip_suffix(b"\n").ok_or(WRONG)?;
            content = &content[length..];
            let equals = record.iter().position(|&byte| byte == b'=').ok_or(WRONG)?;
            self.record(&record[..equals], &record[equals + 1..])
                .ok_or(WRONG)?;
        }
        Ok(())
    }

    /// Stores a record. An empty value takes an earlier value back.
    fn record(&mut self, key: &[u8], value: &[u8]) -> Option<()> {
        let bytes = (!value.is_empty()).then(|| value.to_vec());
        match key {
            b"path" => self.path = bytes,
            b"linkpath" => self.link_path = bytes,
            b"size" if bytes.is_none() => self.size = None,
            b"size" => self.size = Some(decimal(value)?),
            _ => {
                if let Some(key) = key.strip_prefix(b"GNU.sparse.") {
                    self.sparse.record(key, value)?;
                }
            }
        }
        Some(())
    }

    /// Returns the member's name: a sparse file's own, PAX's, GNU's, the fixed
    /// header's.
    pub(super) fn name(&self, header: &Header<'_>, global: &Self) -> Vec<u8> {
        let name = self.sparse.name.as_ref().or(self.path.as_ref());
        let name = name.or(self.long_name.as_ref()).or(global.path.as_ref());
        name.cloned().unwrap_or_else(|| header.name())
    }

    /// Returns the target of a link.
    pub(super) fn link(&self, header: &Header<'_>, global: &Self) -> Vec<u8> {
        let link = self.link_path.as_ref().or(self.long_link.as_ref());
        let link = link.or(global.link_path.as_ref());
        link.cloned().unwrap_or_else(|| header.link().to_vec())
    }
}

const _: () = assert!(
    BLOCK == 512,
    "the fields' offsets are those of a block of 512 bytes"
);
