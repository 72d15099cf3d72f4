//! Decodes blocks of coefficients from Huffman codes, sequential and
//! progressive (T.81, annexes F and G).
//!
//! Data that are damaged give the coefficients that libjpeg-turbo makes of
//! them: an invalid code is a zero, and coefficients beyond the last are put in
//! the last place.

use multiversion::multiversion;

use super::source::{BitBuffer, JpegSource, extended};

/// Coefficients of a block, row by row.
pub(super) type JpegBlock = [i16; 64];

/// Places of coefficients in a block, in the order of the file. The last place
/// is repeated for damaged files, which go beyond it.
pub(super) const NATURAL_ORDER: [u8; 128] = natural_order();

const fn natural_order() -> [u8; 128] {
    let mut order = [63; 128];
    let (mut at, mut diagonal) = (0, 0);
    while diagonal < 15 {
        let mut step = 0;
        while step <= diagonal {
            // Odd diagonals go down to the left.
            let row = if diagonal % 2 == 1 {
                step
            } else {
                diagonal - step
            };
            let column = diagonal - row;
            if row < 8 && column < 8 {
                order[at] = row * 8 + column;
                at += 1;
            }
            step += 1;
        }
        diagonal += 1;
    }
    order
}

/// Number of bits by which short codes are looked up.
const LOOKUP_BITS: u32 = 10;

/// Code lengths and symbols, as a file defines them.
#[derive(Clone)]
pub(super) struct HuffmanCode {
    /// Number of codes of 1 to 16 bits.
    pub(super) counts: [u8; 16],
    pub(super) symbols: [u8; 256],
}

/// Coefficient of a code that is looked up together with its value.
#[derive(Clone, Copy, Default)]
struct QuickCode {
    value: i16,
    zeros: u8,
    /// Bits of the code and its value, or 0 if they are too many.
    bits: u8,
}

/// Table that decodes a Huffman code.
pub(super) struct HuffmanTable {
    /// Length of the code in the upper byte, and its symbol; or zero for bits
    /// that begin a longer code.
    lookup: Box<[u16; 1 << LOOKUP_BITS]>,
    /// For bits that hold a code with its value: the value, the zeros before it
    /// and the length of both; or zero.
    quick: Box<[QuickCode; 1 << LOOKUP_BITS]>,
    /// Largest code of each length, or -1.
    largest: [i32; 17],
    /// Difference between the index of a symbol and its code, by length.
    offset: [i32; 17],
    symbols: [u8; 256],
}

impl HuffmanTable {
    /// Makes the table. Returns `None` if there are too many codes of a length,
    /// or if a code for differences has a symbol of more than 15 bits.
    pub(super) fn new(code: &HuffmanCode, differences: bool) -> Option<Self> {
        let mut table = Self {
            lookup: Box::new([0; 1 << LOOKUP_BITS]),
            quick: Box::new([QuickCode::default(); 1 << LOOKUP_BITS]),
            largest: [-1; 17],
            offset: [0; 17],
            symbols: code.symbols,
        };
        let (mut next, mut index) = (0_usize, 0_usize);
        for (bits, &count) in (1_u32..).zip(&code.counts) {
            let count = usize::from(count);
            // No code is all ones.
            if count > 0 && next + count >= 1 << bits {
                return None;
            }
            if count > 0 {
                let at = bits as usize;
                table.offset[at] = signed(index) - signed(next);
                table.largest[at] = signed(next + count - 1);
            }
            for symbol in code.symbols.get(index..index + count)? {
                if differences && *symbol > 15 {
                    return None;
                }
                if let Some(spare) = LOOKUP_BITS.checked_sub(bits) {
                    let entry = u16::from_be_bytes([bits.to_le_bytes()[0], *symbol]);
                    table.lookup[next << spare..(next + 1) << spare].fill(entry);
                }
                next += 1;
            }
            index += count;
            next <<= 1;
        }
        if !differences {
            table.fill_quick();
        }
        Some(table)
    }

    /// Finds the bits that hold a code with its value.
    fn fill_quick(&mut self) {
        for ((bits, quick), entry) in (0_i32..).zip(self.quick.iter_mut()).zip(&*self.lookup) {
            let [code_len, symbol] = entry.to_be_bytes();
            let (zeros, len) = (symbol >> 4, symbol & 15);
            let total = code_len + len;
            if code_len == 0 || len == 0 || u32::from(total) > LOOKUP_BITS {
                continue;
            }
            let value = (bits >> (LOOKUP_BITS - u32::from(total))) & ((1 << len) - 1);
            *quick = QuickCode {
                value: low_bits(extended(value, len.into())),
                zeros,
                bits: total,
            };
        }
    }

    /// Returns the symbol of the next code, or 0 for bits that are no code.
    /// The bits must have been refilled.
    #[inline]
    fn symbol(&self, bits: &mut BitBuffer, source: &mut JpegSource<'_>) -> u8 {
        let [len, symbol] = self.lookup[bits.peek(LOOKUP_BITS)].to_be_bytes();
        if len > 0 {
            bits.skip(len.into(), source);
            return symbol;
        }
        self.long_symbol(bits, source)
    }

    fn long_symbol(&self, bits: &mut BitBuffer, source: &mut JpegSource<'_>) -> u8 {
        for len in LOOKUP_BITS + 1..=16 {
            let code = signed(bits.peek(len));
            if code <= self.largest[len as usize] {
                bits.skip(len, source);
                let index = usize::try_from(code + self.offset[len as usize]).unwrap_or(0);
                return self.symbols[index & 255];
            }
        }
        bits.skip(17, source);
        0
    }
}

/// Converts a number of at most 16 bits.
fn signed(number: usize) -> i32 {
    i32::try_from(number).unwrap_or(i32::MAX)
}

/// Coefficients that a scan gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ScanBand {
    /// First and last coefficient, in the order of the file.
    pub(super) first: u8,
    pub(super) last: u8,
    /// Lowest bit that is given.
    pub(super) low: u8,
    pub(super) pass: ScanPass,
}

/// Part of its coefficients that a scan gives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ScanPass {
    /// All coefficients, whole.
    Sequential,
    /// Upper bits of the first coefficient, or one more bit of it.
    FirstCoefficient { refine: bool },
    /// Upper bits of the others, or one more bit of them.
    Others { refine: bool },
}

/// Decoder of a scan of Huffman codes.
pub(super) struct HuffmanScan {
    band: ScanBand,
    /// Tables of each component of the scan: of the first coefficient and of
    /// the others. A component has only the tables that the scan needs.
    tables: Vec<[Option<HuffmanTable>; 2]>,
    /// First coefficients of the blocks before, by component.
    predictions: [i32; 4],
    /// Number of further blocks that have no coefficients in this scan.
    empty_blocks: u32,
}

impl HuffmanScan {
    pub(super) fn new(band: ScanBand, tables: Vec<[Option<HuffmanTable>; 2]>) -> Self {
        Self {
            band,
            tables,
            predictions: [0; 4],
            empty_blocks: 0,
        }
    }

    /// Forgets the blocks before, as at a restart.
    pub(super) fn restart(&mut self) {
        self.predictions = [0; 4];
        self.empty_blocks = 0;
    }

    /// Decodes a block of a component of the scan.
    #[inline]
    pub(super) fn block(
        &mut self,
        component: usize,
        block: &mut JpegBlock,
        source: &mut JpegSource<'_>,
    ) {
        match self.band.pass {
            ScanPass::Sequential => {
                if let [Some(first), Some(others)] = &self.tables[component] {
                    let prediction = &mut self.predictions[component & 3];
                    sequential(first, others, prediction, block, source);
                }
            }
            ScanPass::FirstCoefficient { refine: false } => {
                if let [Some(table), _] = &self.tables[component] {
                    let mut bits = source.bits;
                    let prediction = &mut self.predictions[component & 3];
                    *prediction = prediction.wrapping_add(difference(table, &mut bits, source));
                    block[0] = low_bits(*prediction << self.band.low);
                    source.bits = bits;
                }
            }
            ScanPass::FirstCoefficient { refine: true } => {
                let mut bits = source.bits;
                if bits.bit(source) {
                    block[0] |= 1 << self.band.low;
                }
                source.bits = bits;
            }
            ScanPass::Others { refine } => {
                if let [_, Some(table)] = &self.tables[component] {
                    let (band, empty) = (self.band, &mut self.empty_blocks);
                    if refine {
                        refine_others(band, table, empty, block, source);
                    } else {
                        others(band, table, empty, block, source);
                    }
                }
            }
        }
    }
}

/// Returns the lower 16 bits of a number.
#[expect(
    clippy::cast_possible_truncation,
    reason = "numbers of damaged files wrap as they do in libjpeg"
)]
#[inline]
pub(super) fn low_bits(number: i32) -> i16 {
    number as i16
}

/// Returns the difference between the first coefficients of two blocks.
#[inline]
fn difference(table: &HuffmanTable, bits: &mut BitBuffer, source: &mut JpegSource<'_>) -> i32 {
    bits.refill(source);
    match table.symbol(bits, source) {
        0 => 0,
        len => bits.value(len.into(), source),
    }
}

#[multiversion(targets("x86_64+avx2+bmi1+bmi2"))]
fn sequential(
    first: &HuffmanTable,
    others: &HuffmanTable,
    prediction: &mut i32,
    block: &mut JpegBlock,
    source: &mut JpegSource<'_>,
) {
    let mut bits = source.bits;
    *prediction = prediction.wrapping_add(difference(first, &mut bits, source));
    block[0] = low_bits(*prediction);
    let mut at = 1;
    while at < 64 {
        bits.refill(source);
        let quick = others.quick[bits.peek(LOOKUP_BITS)];
        if quick.bits > 0 {
            bits.skip(quick.bits.into(), source);
            at += usize::from(quick.zeros);
            block[usize::from(NATURAL_ORDER[at & 127] & 63)] = quick.value;
            at += 1;
            continue;
        }
        let symbol = others.symbol(&mut bits, source);
        let (zeros, len) = (symbol >> 4, symbol & 15);
        at += usize::from(zeros);
        if len > 0 {
            let value = bits.value(len.into(), source);
            block[usize::from(NATURAL_ORDER[at & 127] & 63)] = low_bits(value);
        } else if zeros < 15 {
            break;
        }
        at += 1;
    }
    source.bits = bits;
}

/// Reads the number of blocks, this one included, that have no further
/// coefficients.
fn empty_blocks(exponent: u8, bits: &mut BitBuffer, source: &mut JpegSource<'_>) -> u32 {
    let more = match exponent {
        0 => 0,
        len => bits.take(len.into(), source).unsigned_abs(),
    };
    (1 << exponent) + more
}

/// Decodes upper bits of coefficients other than the first.
fn others(
    band: ScanBand,
    table: &HuffmanTable,
    empty: &mut u32,
    block: &mut JpegBlock,
    source: &mut JpegSource<'_>,
) {
    if *empty > 0 {
        *empty -= 1;
        return;
    }
    let mut bits = source.bits;
    let mut at = usize::from(band.first);
    while at <= usize::from(band.last) {
        bits.refill(source);
        let symbol = table.symbol(&mut bits, source);
        let (zeros, len) = (symbol >> 4, symbol & 15);
        if len > 0 {
            at += usize::from(zeros);
            let value = bits.value(len.into(), source);
            block[usize::from(NATURAL_ORDER[at & 127] & 63)] = low_bits(value << band.low);
        } else if zeros == 15 {
            at += 15;
        } else {
            *empty = empty_blocks(zeros, &mut bits, source) - 1;
            break;
        }
        at += 1;
    }
    source.bits = bits;
}

/// Decodes one more bit of coefficients other than the first.
fn refine_others(
    band: ScanBand,
    table: &HuffmanTable,
    empty: &mut u32,
    block: &mut JpegBlock,
    source: &mut JpegSource<'_>,
) {
    let mut bits = source.bits;
    let one = 1_i16 << band.low;
    let last = usize::from(band.last);
    let mut at = usize::from(band.first);
    while *empty == 0 && at <= last {
        bits.refill(source);
        let symbol = table.symbol(&mut bits, source);
        let (zeros, len) = (symbol >> 4, symbol & 15);
        let mut new = 0;
        if len > 0 {
            new = if bits.bit(source) { one } else { -one };
        } else if zeros < 15 {
            *empty = empty_blocks(zeros, &mut bits, source);
            break;
        }
        // Passes over `zeros` coefficients that are still zero, and refines
        // those that are not.
        let mut zeros = i32::from(zeros);
        loop {
            let coefficient = &mut block[usize::from(NATURAL_ORDER[at] & 63)];
            if *coefficient == 0 {
                zeros -= 1;
                if zeros < 0 {
                    break;
                }
            } else {
                refine(coefficient, one, &mut bits, source);
            }
            at += 1;
            if at > last {
                break;
            }
        }
        if new != 0 {
            block[usize::from(NATURAL_ORDER[at] & 63)] = new;
        }
        at += 1;
    }
    if *empty > 0 {
        for at in at..=last {
            let coefficient = &mut block[usize::from(NATURAL_ORDER[at] & 63)];
            if *coefficient != 0 {
                refine(coefficient, one, &mut bits, source);
            }
        }
        *empty -= 1;
    }
    source.bits = bits;
}

/// Reads the next bit of a coefficient that is not zero.
fn refine(coefficient: &mut i16, one: i16, bits: &mut BitBuffer, source: &mut JpegSource<'_>) {
    if bits.bit(source) && *coefficient & one == 0 {
        let step = if *coefficient >= 0 { one } else { -one };
        *coefficient = coefficient.wrapping_add(step);
    }
}
