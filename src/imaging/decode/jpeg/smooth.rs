//! Smooths progressive pictures whose last scans are missing, as libjpeg-turbo
//! does: coefficients that are zero and not fully known are estimated from the
//! first coefficients of a block and of the 24 blocks around it.

use super::coefficients::{Coefficients, ComponentBlocks, SMOOTHED};
use super::frame::JpegFrame;
use super::huffman::{JpegBlock, NATURAL_ORDER, low_bits};

/// Weights of the 5 x 5 first coefficients for one estimate, row by row.
type Weights = [i32; 25];

/// Weights for the coefficients 1 to 5 if some of the first 9 are known
/// (derived from T.81, annex K.8, for 5 x 5 blocks).
#[rustfmt::skip]
const WEIGHTS_KNOWN: [Weights; 5] = [
    [
         0,   0,   0,   0,   0,
         0,   0,   0,   0,   0,
        -7,  50,   0, -50,   7,
         0,   0,   0,   0,   0,
         0,   0,   0,   0,   0,
    ],
    [
         0,   0,  -7,   0,   0,
         0,   0,  50,   0,   0,
         0,   0,   0,   0,   0,
         0,   0, -50,   0,   0,
         0,   0,   7,   0,   0,
    ],
    [
         0,   0,  -1,   0,   0,
         0,   0,  13,   0,   0,
         0,   0, -24,   0,   0,
         0,   0,  13,   0,   0,
         0,   0,  -1,   0,   0,
    ],
    [
         0,  -1,   0,   1,   0,
        -1,  10,   0, -10,   1,
         0,   0,   0,   0,   0,
         1, -10,   0,  10,  -1,
         0,   1,   0,  -1,   0,
    ],
    [
         0,   0,   0,   0,   0,
         0,   0,   0,   0,   0,
        -1,  13, -24,  13,  -1,
         0,   0,   0,   0,   0,
         0,   0,   0,   0,   0,
    ],
];

/// Weights for the coefficients 1 to 9 and then 0 if none of the first 9 is
/// known.
#[rustfmt::skip]
const WEIGHTS_UNKNOWN: [Weights; 10] = [
    [
        -1,  -1,   0,   1,   1,
        -3,  13,   0, -13,   3,
        -3,  38,   0, -38,   3,
        -3,  13,   0, -13,   3,
        -1,  -1,   0,   1,   1,
    ],
    [
        -1,  -3,  -3,  -3,  -1,
        -1,  13,  38,  13,  -1,
         0,   0,   0,   0,   0,
         1, -13, -38, -13,   1,
         1,   3,   3,   3,   1,
    ],
    [
         0,   0,   1,   0,   0,
         0,   2,   7,   2,   0,
         0,  -5, -14,  -5,   0,
         0,   2,   7,   2,   0,
         0,   0,   1,   0,   0,
    ],
    [
        -1,   0,   0,   0,   1,
         0,   9,   0,  -9,   0,
         0,   0,   0,   0,   0,
         0,  -9,   0,   9,   0,
         1,   0,   0,   0,  -1,
    ],
    [
         0,   0,   0,   0,   0,
         0,   2,  -5,   2,   0,
         1,   7, -14,   7,   1,
         0,   2,  -5,   2,   0,
         0,   0,   0,   0,   0,
    ],
    [
         0,   0,   0,   0,   0,
         0,   1,   0,  -1,   0,
         0,   2,   0,  -2,   0,
         0,   1,   0,  -1,   0,
         0,   0,   0,   0,   0,
    ],
    [
         0,   0,   0,   0,   0,
         0,   1,  -3,   1,   0,
         0,   0,   0,   0,   0,
         0,  -1,   3,  -1,   0,
         0,   0,   0,   0,   0,
    ],
    [
         0,   0,   0,   0,   0,
         0,   1,   0,  -1,   0,
         0,  -3,   0,   3,   0,
         0,   1,   0,  -1,   0,
         0,   0,   0,   0,   0,
    ],
    [
         0,   0,   0,   0,   0,
         0,   1,   2,   1,   0,
         0,   0,   0,   0,   0,
         0,  -1,  -2,  -1,   0,
         0,   0,   0,   0,   0,
    ],
    [
        -2,  -6,  -8,  -6,  -2,
        -6,   6,  42,   6,  -6,
        -8,  42, 152,  42,  -8,
        -6,   6,  42,   6,  -6,
        -2,  -6,  -8,  -6,  -2,
    ],
];

/// Smoothing of one component.
pub(super) struct Smoothing<'a> {
    blocks: &'a ComponentBlocks,
    quantization: &'a JpegBlock,
    /// Vertical sampling factor, and blocks across and down.
    vertical: u32,
    size: (u32, u32),
    unit_rows: u32,
    last_good_row: u32,
    bits: [i8; SMOOTHED],
    bits_before: [i8; SMOOTHED],
}

/// Returns true if smoothing changes a picture: if a first coefficient is known
/// of all components, and another one is not fully known.
pub(super) fn is_useful(
    coefficients: &Coefficients,
    quantization: &[Option<JpegBlock>],
    frame: &JpegFrame,
) -> bool {
    let known = |(component, table): (&ComponentBlocks, &Option<JpegBlock>)| {
        table.is_some_and(|table| {
            component.bits[0] >= 0
                && NATURAL_ORDER[..SMOOTHED]
                    .iter()
                    .all(|&at| table[usize::from(at)] != 0)
        })
    };
    let components = &coefficients.components;
    frame.coding.progressive
        && components.iter().zip(quantization).all(known)
        && components
            .iter()
            .any(|component| component.bits[1..].iter().any(|&bits| bits != 0))
}

impl<'a> Smoothing<'a> {
    pub(super) fn new(
        coefficients: &'a Coefficients,
        index: usize,
        quantization: &'a JpegBlock,
        frame: &JpegFrame,
    ) -> Self {
        let component = &frame.components[index];
        let blocks = &coefficients.components[index];
        Self {
            blocks,
            quantization,
            vertical: component.sampling.1,
            size: component.blocks,
            unit_rows: frame.unit_rows(),
            last_good_row: coefficients.last_good_row,
            bits: blocks.bits,
            bits_before: coefficients.bits_before(index),
        }
    }

    /// Returns a block with estimates for the coefficients that are missing.
    pub(super) fn block(&self, column: u32, row: u32) -> JpegBlock {
        let mut block = *self.blocks.get(column, row);
        let bits = if row / self.vertical > self.last_good_row {
            &self.bits_before
        } else {
            &self.bits
        };
        let around = self.around(column, row);
        let first = i64::from(self.quantization[0].cast_unsigned());
        let unknown = bits[1..].iter().all(|&bits| bits == -1);
        let weights: &[Weights] = if unknown {
            &WEIGHTS_UNKNOWN
        } else {
            &WEIGHTS_KNOWN
        };
        for (at, weights) in (1..).zip(weights) {
            let at = if at == SMOOTHED { 0 } else { at };
            let place = usize::from(NATURAL_ORDER[at]);
            // The first coefficient is replaced in any case.
            if at > 0 && (bits[at] == 0 || block[place] != 0) {
                continue;
            }
            let sum: i32 = weights
                .iter()
                .zip(around)
                .map(|(weight, first)| weight * i32::from(first))
                .sum();
            let sum = first * i64::from(sum);
            let factor = i64::from(self.quantization[place].cast_unsigned());
            let mut size = ((factor << 7) + sum.abs()) / (factor << 8);
            if at > 0 && bits[at] > 0 {
                size = size.min((1 << bits[at]) - 1);
            }
            let size = i32::try_from(size).unwrap_or(i32::MAX);
            block[place] = low_bits(if sum < 0 { -size } else { size });
        }
        block
    }

    /// Returns the first coefficients of the 5 x 5 blocks around a block. At
    /// the edges the outermost blocks are repeated.
    fn around(&self, column: u32, row: u32) -> [i16; 25] {
        // Blocks of the last row of units that only fill it up count if they
        // are below, as libjpeg has it, but not if the row is the last itself.
        let unit = row / self.vertical;
        let rows = if unit + 1 < self.unit_rows {
            self.vertical
        } else {
            self.size.1 - unit * self.vertical
        };
        let number = unit * rows + row % self.vertical;
        let end = rows * self.unit_rows;
        let above = if number > 0 { row - 1 } else { row };
        let below = if number + 1 < end { row + 1 } else { row };
        let rows = [
            if number > 1 { above - 1 } else { above },
            above,
            row,
            below,
            if number + 2 < end { below + 1 } else { below },
        ];
        let last = self.size.0 - 1;
        let columns = [
            column.saturating_sub(2),
            column.saturating_sub(1),
            column,
            (column + 1).min(last),
            (column + 2).min(last),
        ];
        std::array::from_fn(|at| self.blocks.get(columns[at % 5], rows[at / 5])[0])
    }
}
