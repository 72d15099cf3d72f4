//! Decodes fax compression of groups 3 (T.4) and 4 (T.6), row by row. A row is
//! a list of runs, or states its color changes relative to those of the row
//! above.
//!
//! A damaged row is an error, because other decoders repair it in ways of their
//! own: a code that is none, runs that are together longer or shorter than the
//! row, a row without a mark of its beginning although there is a mark somewhere,
//! and data that end within a row.
//!
//! The codes are the `fax` crate's. Its decoder is not used: it accepts changes
//! that go back to the left, with which a row can take any amount of time.

use fax::maps::{Mode, black, mode, white};

use super::chunk::Data;
use super::layout::FaxCoding;

/// Most zero bytes that are read behind the data, since codes are looked up by
/// 16 bits.
const ZEROS_MAX: u32 = 4;

pub(super) struct Fax {
    width: u32,
    coding: FaxCoding,
    bits: Bits,
    /// True if rows begin with a mark. Without it, Pillow's library skips what is
    /// in front of the next mark.
    marked: bool,
    refused: bool,
    /// Columns at which the color changes, beginning with white: of the row
    /// above, and of the current row.
    above: Vec<u32>,
    changes: Vec<u32>,
    /// The current row as bytes, black as ones, and the number of bytes that
    /// were taken.
    line: Vec<u8>,
    taken: usize,
}

#[derive(Default)]
struct Bits {
    word: u32,
    count: u8,
    zeros: u32,
}

struct BitReader<'a, 'b> {
    bits: &'a mut Bits,
    data: &'a mut Data<'b>,
}

impl BitReader<'_, '_> {
    /// Skips bits up to the beginning of a byte.
    fn align(&mut self) -> Option<()> {
        let bits = fax::BitReader::bits_to_byte_boundary(self);
        fax::BitReader::consume(self, bits).ok()
    }

    fn bit(&mut self) -> Option<bool> {
        let bit = fax::BitReader::peek(self, 1)?;
        fax::BitReader::consume(self, 1).ok()?;
        Some(bit == 1)
    }

    /// Skips the mark of the end of a row, 11 zeros or more and a one. Returns
    /// false if there is none.
    fn skip_mark(&mut self) -> Option<bool> {
        let marked = fax::BitReader::peek(self, 11)? == 0;
        if marked {
            while !self.bit()? {}
        }
        Some(marked)
    }

    /// Returns true if bits behind the end of the data were taken.
    fn overran(&self) -> bool {
        u32::from(self.bits.count) < 8 * self.bits.zeros
    }

    fn fill(&mut self) -> Result<(), ()> {
        while self.bits.count < 16 {
            let byte = self.data.byte().unwrap_or_else(|| {
                self.bits.zeros += 1;
                0
            });
            if self.bits.zeros > ZEROS_MAX {
                return Err(());
            }
            self.bits.word = self.bits.word << 8 | u32::from(byte);
            self.bits.count += 8;
        }
        Ok(())
    }
}

impl fax::BitReader for BitReader<'_, '_> {
    type Error = ();

    fn peek(&self, bits: u8) -> Option<u16> {
        let shift = self.bits.count.checked_sub(bits)?;
        let [low, high, _, _] = (self.bits.word >> shift).to_le_bytes();
        let mask = u16::MAX.checked_shr(16_u32.checked_sub(bits.into())?)?;
        Some(u16::from_le_bytes([low, high]) & mask)
    }

    fn consume(&mut self, bits: u8) -> Result<(), ()> {
        self.bits.count = self.bits.count.checked_sub(bits).ok_or(())?;
        self.fill()
    }

    fn bits_to_byte_boundary(&self) -> u8 {
        self.bits.count & 7
    }
}

impl Fax {
    /// Begins a strip or tile of these bytes, whose bits may be reversed.
    pub(super) fn new(width: u32, coding: FaxCoding, bytes: &[u8], reversed: bool) -> Self {
        let row_bytes = usize::try_from(width.div_ceil(8)).unwrap_or(usize::MAX);
        Self {
            width,
            coding,
            bits: Bits::default(),
            marked: coding.is_group3() && has_mark(bytes, reversed),
            refused: false,
            above: Vec::new(),
            changes: Vec::new(),
            line: vec![0; row_bytes],
            taken: row_bytes,
        }
    }

    /// Sees to it that a strip or tile with marks behind one without is an
    /// error, since Pillow's library looks for no marks then.
    pub(super) fn follow(&mut self, unmarked: &mut bool) {
        self.refused = self.marked && *unmarked;
        *unmarked |= self.coding.is_group3() && !self.marked;
    }

    /// Takes bytes of the current row.
    pub(super) fn take(&mut self, to: &mut [u8]) -> usize {
        let count = to.len().min(self.line.len() - self.taken);
        to[..count].copy_from_slice(&self.line[self.taken..self.taken + count]);
        self.taken += count;
        count
    }

    /// Decodes the next row, if the current row was taken. Returns `None` if
    /// there is no row left, or no valid one.
    pub(super) fn row(&mut self, data: &mut Data<'_>) -> Option<()> {
        if self.taken < self.line.len() {
            return Some(());
        }
        let mut reader = BitReader {
            bits: &mut self.bits,
            data,
        };
        reader.fill().ok()?;
        let relative = match self.coding {
            FaxCoding::Runs => {
                reader.align()?;
                false
            }
            FaxCoding::Group3 { two_dimensions } => {
                if self.refused || reader.skip_mark()? != self.marked {
                    return None;
                }
                two_dimensions && !reader.bit()?
            }
            FaxCoding::Group4 => true,
        };
        std::mem::swap(&mut self.above, &mut self.changes);
        self.changes.clear();
        if relative {
            relative_row(&self.above, &mut self.changes, self.width, &mut reader)?;
        } else {
            row_of_runs(&mut self.changes, self.width, &mut reader)?;
        }
        if reader.overran() {
            return None;
        }
        self.paint();
        Some(())
    }

    /// Paints the row's bits from its changes.
    fn paint(&mut self) {
        self.taken = 0;
        self.line.fill(0);
        for pair in self.changes.chunks(2) {
            let start = pair[0];
            let end = pair.get(1).copied().unwrap_or(self.width);
            fill(&mut self.line, start, end);
        }
    }
}

/// Returns true if 11 zeros follow each other, which no codes make.
fn has_mark(bytes: &[u8], reversed: bool) -> bool {
    let mut zeros = 0;
    bytes.iter().any(|&byte| {
        let byte = if reversed { byte.reverse_bits() } else { byte };
        let found = zeros + byte.leading_zeros() >= 11;
        zeros = if byte == 0 {
            zeros + 8
        } else {
            byte.trailing_zeros()
        };
        found
    })
}

/// Adds a change of color. There are no more changes than pixels, and one: runs
/// of no pixels would otherwise fill any memory.
fn add_change(changes: &mut Vec<u32>, at: u32, width: u32) -> Option<()> {
    let room = changes.len() <= width as usize;
    changes.push(at);
    room.then_some(())
}

/// Reads the changes of a row that is a list of runs.
fn row_of_runs(changes: &mut Vec<u32>, width: u32, reader: &mut BitReader<'_, '_>) -> Option<()> {
    let (mut at, mut is_black) = (0_u32, false);
    while at < width {
        at = run_end(at, is_black, width, reader)?;
        add_change(changes, at, width)?;
        is_black = !is_black;
    }
    Some(())
}

/// Reads the changes of a row relative to those of the row above.
fn relative_row(
    above: &[u32],
    changes: &mut Vec<u32>,
    width: u32,
    reader: &mut BitReader<'_, '_>,
) -> Option<()> {
    let mut change = |at| add_change(changes, at, width);
    let (mut at, mut is_black, mut next, mut first) = (0, false, 0, true);
    while at < width {
        // The first change above that is to the right of `at` and to the
        // other color, and the change behind it.
        while next > 0 && above[next - 1] > at {
            next -= 1;
        }
        while above
            .get(next)
            .is_some_and(|&x| x < at || (x == at && !first) || (next % 2 == 1) != is_black)
        {
            next += 1;
        }
        let b1 = above.get(next).copied().unwrap_or(width);
        match mode::decode(reader)? {
            Mode::Pass => at = above.get(next + 1).copied().unwrap_or(width),
            Mode::Vertical(delta) => {
                let to = b1.checked_add_signed(delta.into())?;
                if to < at || to > width {
                    return None;
                }
                change(to)?;
                (at, is_black) = (to, !is_black);
            }
            Mode::Horizontal => {
                for of_black in [is_black, !is_black] {
                    at = run_end(at, of_black, width, reader)?;
                    change(at)?;
                }
            }
            Mode::Extension | Mode::EOF => return None,
        }
        first = false;
    }
    Some(())
}

/// Sets the bits from `start` up to `end`.
fn fill(line: &mut [u8], start: u32, end: u32) {
    let mut at = start;
    while at < end {
        let byte = (at / 8) as usize;
        let (from, to) = (at % 8, (end - at / 8 * 8).min(8));
        if from == 0 && to == 8 {
            let last = (end / 8) as usize;
            line[byte..last].fill(0xff);
            at = end / 8 * 8;
        } else {
            let bits = (0xff_u32 >> from) & !(0xff >> to);
            line[byte] |= bits.to_le_bytes()[0];
            at += to - from;
        }
    }
}

/// Reads a run that begins at a column, and returns the column behind it, which
/// lies within the row.
fn run_end(at: u32, of_black: bool, width: u32, reader: &mut BitReader<'_, '_>) -> Option<u32> {
    let end = at.checked_add(run(of_black, reader)?)?;
    (end <= width).then_some(end)
}

/// Reads the length of a run: parts of 64 pixels and more, then one part of
/// less than 64.
fn run(of_black: bool, reader: &mut BitReader<'_, '_>) -> Option<u32> {
    let mut sum = 0_u32;
    loop {
        let part = if of_black {
            black::decode(reader)
        } else {
            white::decode(reader)
        }?;
        sum = sum.checked_add(part.into())?;
        if part < 64 {
            return Some(sum);
        }
    }
}
