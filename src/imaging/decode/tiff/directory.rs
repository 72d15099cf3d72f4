//! Reads the directory of a TIFF's first page: its tags, in place.
//!
//! Nothing is copied and nothing is trusted: an entry whose values are not in
//! the file is an error, and each value is read when it is asked for.

/// Most entries of a directory. Writers use about 20.
const ENTRIES_MAX: u64 = 4096;

/// Byte order and width of the numbers in a file.
#[derive(Clone, Copy)]
pub(super) struct Order {
    pub(super) little: bool,
    /// True for BigTIFF, with offsets of 8 bytes.
    big: bool,
}

/// The first directory of a file.
pub(super) struct Directory<'a> {
    file: &'a [u8],
    order: Order,
    entries: &'a [u8],
}

/// The values of one tag.
#[derive(Clone, Copy)]
pub(super) struct TagValues<'a> {
    /// Bytes of the values, exactly as many as the values take.
    bytes: &'a [u8],
    width: usize,
    little: bool,
}

impl Order {
    fn number(self, bytes: &[u8]) -> u64 {
        number(bytes, self.little)
    }
}

fn number(bytes: &[u8], little: bool) -> u64 {
    let fold = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
    if little {
        bytes.iter().rev().fold(0, fold)
    } else {
        bytes.iter().fold(0, fold)
    }
}

/// Returns `len` bytes at an offset, or `None` if they are not all in the file.
fn part(file: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let start = usize::try_from(at).ok()?;
    let end = usize::try_from(at.checked_add(len)?).ok()?;
    file.get(start..end)
}

impl<'a> Directory<'a> {
    /// Reads the directory. The error says what is wrong with the file.
    pub(super) fn read(file: &'a [u8]) -> Result<Self, &'static str> {
        const CUT: &str = "a directory that lies outside the file";
        let head = part(file, 0, 8).ok_or(CUT)?;
        let order = Order {
            little: head[0] == b'I',
            big: head[2..4].contains(&43),
        };
        let at = if order.big {
            let sizes = order.number(&head[4..6]);
            if sizes != 8 || head[6..8] != [0, 0] {
                return Err("BigTIFF offsets of another size than 8 bytes");
            }
            order.number(part(file, 8, 8).ok_or(CUT)?)
        } else {
            order.number(&head[4..8])
        };
        let (count_len, entry_len) = order.lens();
        let count = order.number(part(file, at, count_len).ok_or(CUT)?);
        if count > ENTRIES_MAX {
            return Err("a directory of more than 4096 entries, the limit");
        }
        let start = at.checked_add(count_len).ok_or(CUT)?;
        Ok(Self {
            file,
            order,
            entries: part(file, start, count * entry_len).ok_or(CUT)?,
        })
    }

    pub(super) fn order(&self) -> Order {
        self.order
    }

    /// Returns the values of a tag. The error is the tag's number, if the
    /// values are outside the file or not whole numbers without a sign.
    pub(super) fn values(&self, tag: u16) -> Result<Option<TagValues<'a>>, u16> {
        let (_, entry_len) = self.order.lens();
        let entry = self
            .entries
            .chunks_exact(usize::try_from(entry_len).unwrap_or(usize::MAX))
            .find(|entry| self.order.number(&entry[..2]) == u64::from(tag));
        let Some(entry) = entry else {
            return Ok(None);
        };
        let width: usize = match self.order.number(&entry[2..4]) {
            // Bytes, with or without a sign, and bytes of no type. Negative
            // numbers are read as large ones, which no tag allows.
            1 | 6 | 7 => 1,
            3 | 8 => 2,
            // Numbers, and offsets of directories.
            4 | 9 | 13 => 4,
            16..=18 if self.order.big => 8,
            _ => return Err(tag),
        };
        let (count, value) = entry[4..].split_at((entry.len() - 4) / 2);
        let len = self
            .order
            .number(count)
            .checked_mul(width as u64)
            .ok_or(tag)?;
        let bytes = if len <= value.len() as u64 {
            part(value, 0, len)
        } else {
            part(self.file, self.order.number(value), len)
        };
        Ok(Some(TagValues {
            bytes: bytes.ok_or(tag)?,
            width,
            little: self.order.little,
        }))
    }
}

impl Order {
    /// Returns the bytes of the number of entries, and of an entry.
    fn lens(self) -> (u64, u64) {
        if self.big { (8, 20) } else { (2, 12) }
    }
}

impl<'a> TagValues<'a> {
    pub(super) fn len(self) -> usize {
        self.bytes.len() / self.width
    }

    pub(super) fn get(self, index: usize) -> Option<u64> {
        let start = index.checked_mul(self.width)?;
        let bytes = self.bytes.get(start..start + self.width)?;
        Some(number(bytes, self.little))
    }

    pub(super) fn iter(self) -> impl Iterator<Item = u64> + 'a {
        self.bytes
            .chunks_exact(self.width)
            .map(move |bytes| number(bytes, self.little))
    }

    /// Returns the values as they are stored, if each is a byte.
    pub(super) fn as_bytes(self) -> Option<&'a [u8]> {
        (self.width == 1).then_some(self.bytes)
    }
}
