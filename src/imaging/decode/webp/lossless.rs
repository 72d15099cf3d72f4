//! Checks the sizes inside a lossless frame (VP8L), or inside alpha that is
//! stored in the same way: the memory that its Huffman codes take.
//!
//! A code can take three hundred times its bytes in memory. There may be 65536
//! groups of five codes, and the number of groups is stored in an image inside
//! the frame. Therefore everything in front of the pixels is read here, with
//! the small images of the frame's transforms.

use super::super::{Header, PreprocessError};

/// Returns width and height of a frame.
pub(super) fn size(frame: &[u8]) -> Option<(u32, u32)> {
    let &[0x2f, b0, b1, b2, b3] = frame.first_chunk()? else {
        return None;
    };
    let bits = u32::from_le_bytes([b0, b1, b2, b3]);
    Some(((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1))
}

/// Returns the bytes that the decoder holds for the codes of a frame. `stream`
/// is the data behind the frame's header.
pub(super) fn code_bytes(
    stream: &[u8],
    width: u32,
    height: u32,
    header: Header<'_>,
) -> Result<u64, PreprocessError> {
    let mut reader = Reader {
        stream,
        bits: 0,
        count: 0,
        header,
    };
    let width = reader.transforms(width, height)?;
    let cache = reader.cache_bits()?;
    let groups = reader.groups(width, height)?;
    let mut bytes = 0;
    let bytes_max = header.limits.decode_bytes_max;
    for _ in 0..groups {
        header.budget.check()?;
        bytes += GROUP_BYTES;
        for alphabet in alphabets(cache) {
            bytes += reader.code(alphabet)?.held_bytes();
        }
        if bytes > bytes_max {
            return Err(PreprocessError::DecodeOverLimit {
                format: header.format,
                width,
                height,
                bytes,
                bytes_max,
            });
        }
    }
    Ok(bytes)
}

/// Bytes of a group beside its tables, in a vector that doubles.
const GROUP_BYTES: u64 = 1024;

/// First symbol that repeats an earlier color, given by its number in the
/// cache.
const CACHED: u16 = 256 + 24;

/// Length in bits of the longest code.
const LENGTH_MAX: usize = 15;

/// Returns the number of symbols of each of a group's five codes: green with
/// lengths and cached colors, red, blue, alpha, distance.
fn alphabets(cache: Option<u32>) -> [u16; 5] {
    let cached = cache.map_or(0, |bits| 1 << bits);
    [CACHED + cached, 256, 256, 256, 40]
}

/// A Huffman code: the number of codes of each length, and their symbols from
/// the shortest.
struct Code {
    counts: [u16; LENGTH_MAX + 1],
    symbols: Vec<u16>,
}

impl Code {
    fn new(lengths: &[u8]) -> Option<Self> {
        let mut counts = [0; LENGTH_MAX + 1];
        for &length in lengths.iter().filter(|&&length| length > 0) {
            counts[usize::from(length)] += 1;
        }
        let mut symbols = Vec::new();
        for (length, &count) in counts.iter().enumerate().skip(1) {
            if count > 0 {
                let of_length = lengths
                    .iter()
                    .zip(0..)
                    .filter(|(found, _)| usize::from(**found) == length);
                symbols.extend(of_length.map(|(_, symbol)| symbol));
            }
        }
        // Each code is complete, or a single symbol of no bits.
        let space: u32 = (1..=LENGTH_MAX)
            .map(|length| u32::from(counts[length]) << (LENGTH_MAX - length))
            .sum();
        let whole = symbols.len() == 1 || space == 1 << LENGTH_MAX;
        whole.then_some(Self { counts, symbols })
    }

    /// Returns the bytes of the decoder's table and tree for the code.
    fn held_bytes(&self) -> u64 {
        const TABLE_BITS: usize = 10;
        const NODE: u64 = 16;
        let longest = self.counts.iter().rposition(|&count| count > 0);
        let table = 4 << longest.unwrap_or(0).min(TABLE_BITS);
        let long: u64 = self.counts[TABLE_BITS + 1..]
            .iter()
            .map(|&count| u64::from(count))
            .sum();
        // Up to two nodes per symbol, in a vector that may double, or the three
        // nodes of a code of two symbols.
        table + 4 * NODE * (long + 1)
    }
}

/// Reader of bits, lowest first.
struct Reader<'a> {
    stream: &'a [u8],
    bits: u64,
    count: u32,
    header: Header<'a>,
}

impl Reader<'_> {
    fn damaged(&self) -> PreprocessError {
        self.header
            .damaged("a lossless frame that is cut short or has invalid codes")
    }

    /// Reads a number of at most 16 bits.
    fn number(&mut self, bits: u32) -> Result<u32, PreprocessError> {
        while self.count < bits {
            let (&byte, rest) = self.stream.split_first().ok_or_else(|| self.damaged())?;
            self.stream = rest;
            self.bits |= u64::from(byte) << self.count;
            self.count += 8;
        }
        let number = self.bits & ((1 << bits) - 1);
        self.bits >>= bits;
        self.count -= bits;
        Ok(u32::try_from(number).unwrap_or(0))
    }

    fn flag(&mut self) -> Result<bool, PreprocessError> {
        Ok(self.number(1)? == 1)
    }

    /// Reads a number that is a symbol or a length.
    fn small(&mut self, bits: u32) -> Result<u16, PreprocessError> {
        Ok(u16::try_from(self.number(bits)?).unwrap_or(0))
    }

    /// Skips the transforms. Returns the width that is left: if there are few
    /// colors, several pixels share one.
    fn transforms(&mut self, mut width: u32, height: u32) -> Result<u32, PreprocessError> {
        let mut seen = 0_u8;
        while self.flag()? {
            let kind = self.number(2)?;
            if seen >> kind & 1 == 1 {
                return Err(self.damaged());
            }
            seen |= 1 << kind;
            match kind {
                0 | 1 => {
                    self.blocks(width, height)?;
                }
                2 => {}
                _ => {
                    let colors = self.number(8)? + 1;
                    self.image(colors, 1)?;
                    let bits = match colors {
                        ..=2 => 3,
                        3..=4 => 2,
                        5..=16 => 1,
                        _ => 0,
                    };
                    width = width.div_ceil(1 << bits);
                }
            }
        }
        Ok(width)
    }

    /// Reads an image that has one pixel for each square block of another
    /// image. The side of the blocks is read first.
    fn blocks(&mut self, width: u32, height: u32) -> Result<Vec<[u8; 4]>, PreprocessError> {
        let bits = self.number(3)? + 2;
        self.image(width.div_ceil(1 << bits), height.div_ceil(1 << bits))
    }

    fn cache_bits(&mut self) -> Result<Option<u32>, PreprocessError> {
        if !self.flag()? {
            return Ok(None);
        }
        match self.number(4)? {
            bits @ 1..=11 => Ok(Some(bits)),
            _ => Err(self.damaged()),
        }
    }

    /// Returns the number of groups of codes in the frame.
    fn groups(&mut self, width: u32, height: u32) -> Result<u32, PreprocessError> {
        if !self.flag()? {
            return Ok(1);
        }
        let blocks = self.blocks(width, height)?;
        let numbers = blocks
            .iter()
            .map(|&[red, green, _, _]| u32::from(u16::from_be_bytes([red, green])));
        Ok(numbers.max().unwrap_or(0) + 1)
    }

    fn code(&mut self, alphabet: u16) -> Result<Code, PreprocessError> {
        const ORDER: [usize; 19] = [
            17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
        ];
        if self.flag()? {
            return self.simple_code(alphabet);
        }
        let mut lengths = [0; 19];
        let count = self.number(4)? as usize + 4;
        for &at in &ORDER[..count] {
            lengths[at] = self.small(3)?.to_le_bytes()[0];
        }
        let code = Code::new(&lengths).ok_or_else(|| self.damaged())?;
        let lengths = self.lengths(&code, alphabet)?;
        Code::new(&lengths).ok_or_else(|| self.damaged())
    }

    /// Reads a code of one or two symbols.
    fn simple_code(&mut self, alphabet: u16) -> Result<Code, PreprocessError> {
        let two = self.flag()?;
        let bits = if self.flag()? { 8 } else { 1 };
        let mut symbols = vec![self.small(bits)?];
        if two {
            symbols.push(self.small(8)?);
        }
        if symbols.iter().any(|&symbol| symbol >= alphabet) {
            return Err(self.damaged());
        }
        let mut counts = [0; LENGTH_MAX + 1];
        counts[1] = 1 + u16::from(two);
        Ok(Code { counts, symbols })
    }

    /// Reads the lengths of a code, which are coded themselves.
    fn lengths(&mut self, code: &Code, alphabet: u16) -> Result<Vec<u8>, PreprocessError> {
        let mut left = alphabet;
        if self.flag()? {
            let bits = 2 + 2 * self.number(3)?;
            left = self.small(bits)?.saturating_add(2);
            if left > alphabet {
                return Err(self.damaged());
            }
        }
        let alphabet = usize::from(alphabet);
        let mut lengths = Vec::with_capacity(alphabet);
        let mut previous = 8;
        while lengths.len() < alphabet && left > 0 {
            left -= 1;
            let (length, count) = match self.symbol(code)? {
                symbol @ 0..=15 => (symbol.to_le_bytes()[0], 1),
                16 => (previous, self.number(2)? + 3),
                17 => (0, self.number(3)? + 3),
                _ => (0, self.number(7)? + 11),
            };
            if length > 0 {
                previous = length;
            }
            lengths.extend((0..count).map(|_| length));
            if lengths.len() > alphabet {
                return Err(self.damaged());
            }
        }
        Ok(lengths)
    }

    fn symbol(&mut self, code: &Code) -> Result<u16, PreprocessError> {
        if let [symbol] = code.symbols[..] {
            return Ok(symbol);
        }
        let (mut word, mut first, mut index) = (0, 0, 0);
        for &count in &code.counts[1..] {
            let count = u32::from(count);
            word |= self.number(1)?;
            if word < first + count {
                return Ok(code.symbols[(index + word - first) as usize]);
            }
            index += count;
            first = (first + count) << 1;
            word <<= 1;
        }
        Err(self.damaged())
    }

    /// Reads an image that has one group of codes and no images inside.
    fn image(&mut self, width: u32, height: u32) -> Result<Vec<[u8; 4]>, PreprocessError> {
        const CHECKED: usize = 4096;
        let cache_bits = self.cache_bits()?;
        let mut cache = vec![[0; 4]; cache_bits.map_or(0, |bits| 1 << bits)];
        let codes = alphabets(cache_bits).map(|alphabet| self.code(alphabet));
        let [green, red, blue, alpha, distance] = codes;
        let (green, red, blue, alpha, distance) = (green?, red?, blue?, alpha?, distance?);
        let count = width as usize * height as usize;
        let mut pixels: Vec<[u8; 4]> = Vec::with_capacity(count);
        let mut checked = 0;
        while pixels.len() < count {
            if pixels.len() >= checked {
                self.header.budget.check()?;
                checked = pixels.len() + CHECKED;
            }
            let start = pixels.len();
            let symbol = self.symbol(&green)?;
            if symbol < 256 {
                let mut level = |code| self.symbol(code).map(|level| level.to_le_bytes()[0]);
                let (red, blue, alpha) = (level(&red)?, level(&blue)?, level(&alpha)?);
                pixels.push([red, symbol.to_le_bytes()[0], blue, alpha]);
            } else if symbol < CACHED {
                let length = self.distance(symbol - 256)?;
                let code = self.symbol(&distance)?;
                let back = back(self.distance(code)?, width);
                if back > start || count - start < length {
                    return Err(self.damaged());
                }
                for at in start..start + length {
                    pixels.push(pixels[at - back]);
                }
            } else {
                let color = cache.get(usize::from(symbol - CACHED));
                pixels.push(*color.ok_or_else(|| self.damaged())?);
            }
            if let Some(bits) = cache_bits {
                for &[red, green, blue, alpha] in &pixels[start..] {
                    let color = u32::from_be_bytes([alpha, red, green, blue]);
                    let at = 0x1e35_a7bd_u32.wrapping_mul(color) >> (32 - bits);
                    cache[at as usize] = [red, green, blue, alpha];
                }
            }
        }
        Ok(pixels)
    }

    /// Reads a length or distance, whose last bits follow its symbol.
    fn distance(&mut self, symbol: u16) -> Result<usize, PreprocessError> {
        if symbol < 4 {
            return Ok(usize::from(symbol) + 1);
        }
        let bits = u32::from((symbol - 2) >> 1);
        let offset = (2 + (usize::from(symbol) & 1)) << bits;
        // Up to 18 bits, more than `number` reads in one call.
        let low = self.number(bits.min(16))? as usize;
        let high = self.number(bits.saturating_sub(16))? as usize;
        Ok(offset + (high << 16 | low) + 1)
    }
}

/// Returns the number of pixels back to the start of a copy. Small codes mean
/// places nearby.
fn back(code: usize, width: u32) -> usize {
    let Some(&(x, y)) = NEARBY.get(code - 1) else {
        return code - NEARBY.len();
    };
    let back = i64::from(x) + i64::from(y) * i64::from(width);
    usize::try_from(back.max(1)).unwrap_or(1)
}

/// Columns to the left and rows up of the places nearby, in the order of their
/// codes.
#[rustfmt::skip]
const NEARBY: [(i8, i8); 120] = [
    (0, 1),  (1, 0),  (1, 1),  (-1, 1), (0, 2),  (2, 0),  (1, 2),  (-1, 2),
    (2, 1),  (-2, 1), (2, 2),  (-2, 2), (0, 3),  (3, 0),  (1, 3),  (-1, 3),
    (3, 1),  (-3, 1), (2, 3),  (-2, 3), (3, 2),  (-3, 2), (0, 4),  (4, 0),
    (1, 4),  (-1, 4), (4, 1),  (-4, 1), (3, 3),  (-3, 3), (2, 4),  (-2, 4),
    (4, 2),  (-4, 2), (0, 5),  (3, 4),  (-3, 4), (4, 3),  (-4, 3), (5, 0),
    (1, 5),  (-1, 5), (5, 1),  (-5, 1), (2, 5),  (-2, 5), (5, 2),  (-5, 2),
    (4, 4),  (-4, 4), (3, 5),  (-3, 5), (5, 3),  (-5, 3), (0, 6),  (6, 0),
    (1, 6),  (-1, 6), (6, 1),  (-6, 1), (2, 6),  (-2, 6), (6, 2),  (-6, 2),
    (4, 5),  (-4, 5), (5, 4),  (-5, 4), (3, 6),  (-3, 6), (6, 3),  (-6, 3),
    (0, 7),  (7, 0),  (1, 7),  (-1, 7), (5, 5),  (-5, 5), (7, 1),  (-7, 1),
    (4, 6),  (-4, 6), (6, 4),  (-6, 4), (2, 7),  (-2, 7), (7, 2),  (-7, 2),
    (3, 7),  (-3, 7), (7, 3),  (-7, 3), (5, 6),  (-5, 6), (6, 5),  (-6, 5),
    (8, 0),  (4, 7),  (-4, 7), (7, 4),  (-7, 4), (8, 1),  (8, 2),  (6, 6),
    (-6, 6), (8, 3),  (5, 7),  (-5, 7), (7, 5),  (-7, 5), (8, 4),  (6, 7),
    (-6, 7), (7, 6),  (-7, 6), (8, 5),  (7, 7),  (-7, 7), (8, 6),  (8, 7)
];
