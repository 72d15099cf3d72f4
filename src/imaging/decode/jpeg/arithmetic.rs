//! Decodes blocks of coefficients from arithmetic codes, sequential and
//! progressive (T.81, annexes D, F and G).

use super::huffman::{JpegBlock, NATURAL_ORDER, ScanBand, ScanPass, low_bits};
use super::source::JpegSource;

/// States of the estimate of a probability (table D.3): probability of the less
/// likely symbol, next states after it and after the more likely one, and true
/// if the symbols change places after the less likely one. The last state
/// stays, at one half.
#[rustfmt::skip]
const STATES: [(u16, u8, u8, bool); 114] = [
    (0x5a1d, 1, 1, true),
    (0x2586, 14, 2, false),
    (0x1114, 16, 3, false),
    (0x080b, 18, 4, false),
    (0x03d8, 20, 5, false),
    (0x01da, 23, 6, false),
    (0x00e5, 25, 7, false),
    (0x006f, 28, 8, false),
    (0x0036, 30, 9, false),
    (0x001a, 33, 10, false),
    (0x000d, 35, 11, false),
    (0x0006, 9, 12, false),
    (0x0003, 10, 13, false),
    (0x0001, 12, 13, false),
    (0x5a7f, 15, 15, true),
    (0x3f25, 36, 16, false),
    (0x2cf2, 38, 17, false),
    (0x207c, 39, 18, false),
    (0x17b9, 40, 19, false),
    (0x1182, 42, 20, false),
    (0x0cef, 43, 21, false),
    (0x09a1, 45, 22, false),
    (0x072f, 46, 23, false),
    (0x055c, 48, 24, false),
    (0x0406, 49, 25, false),
    (0x0303, 51, 26, false),
    (0x0240, 52, 27, false),
    (0x01b1, 54, 28, false),
    (0x0144, 56, 29, false),
    (0x00f5, 57, 30, false),
    (0x00b7, 59, 31, false),
    (0x008a, 60, 32, false),
    (0x0068, 62, 33, false),
    (0x004e, 63, 34, false),
    (0x003b, 32, 35, false),
    (0x002c, 33, 9, false),
    (0x5ae1, 37, 37, true),
    (0x484c, 64, 38, false),
    (0x3a0d, 65, 39, false),
    (0x2ef1, 67, 40, false),
    (0x261f, 68, 41, false),
    (0x1f33, 69, 42, false),
    (0x19a8, 70, 43, false),
    (0x1518, 72, 44, false),
    (0x1177, 73, 45, false),
    (0x0e74, 74, 46, false),
    (0x0bfb, 75, 47, false),
    (0x09f8, 77, 48, false),
    (0x0861, 78, 49, false),
    (0x0706, 79, 50, false),
    (0x05cd, 48, 51, false),
    (0x04de, 50, 52, false),
    (0x040f, 50, 53, false),
    (0x0363, 51, 54, false),
    (0x02d4, 52, 55, false),
    (0x025c, 53, 56, false),
    (0x01f8, 54, 57, false),
    (0x01a4, 55, 58, false),
    (0x0160, 56, 59, false),
    (0x0125, 57, 60, false),
    (0x00f6, 58, 61, false),
    (0x00cb, 59, 62, false),
    (0x00ab, 61, 63, false),
    (0x008f, 61, 32, false),
    (0x5b12, 65, 65, true),
    (0x4d04, 80, 66, false),
    (0x412c, 81, 67, false),
    (0x37d8, 82, 68, false),
    (0x2fe8, 83, 69, false),
    (0x293c, 84, 70, false),
    (0x2379, 86, 71, false),
    (0x1edf, 87, 72, false),
    (0x1aa9, 87, 73, false),
    (0x174e, 72, 74, false),
    (0x1424, 72, 75, false),
    (0x119c, 74, 76, false),
    (0x0f6b, 74, 77, false),
    (0x0d51, 75, 78, false),
    (0x0bb6, 77, 79, false),
    (0x0a40, 77, 48, false),
    (0x5832, 80, 81, true),
    (0x4d1c, 88, 82, false),
    (0x438e, 89, 83, false),
    (0x3bdd, 90, 84, false),
    (0x34ee, 91, 85, false),
    (0x2eae, 92, 86, false),
    (0x299a, 93, 87, false),
    (0x2516, 86, 71, false),
    (0x5570, 88, 89, true),
    (0x4ca9, 95, 90, false),
    (0x44d9, 96, 91, false),
    (0x3e22, 97, 92, false),
    (0x3824, 99, 93, false),
    (0x32b4, 99, 94, false),
    (0x2e17, 93, 86, false),
    (0x56a8, 95, 96, true),
    (0x4f46, 101, 97, false),
    (0x47e5, 102, 98, false),
    (0x41cf, 103, 99, false),
    (0x3c3d, 104, 100, false),
    (0x375e, 99, 93, false),
    (0x5231, 105, 102, false),
    (0x4c0f, 106, 103, false),
    (0x4639, 107, 104, false),
    (0x415e, 103, 99, false),
    (0x5627, 105, 106, true),
    (0x50e7, 108, 107, false),
    (0x4b85, 109, 103, false),
    (0x5597, 110, 109, false),
    (0x504f, 111, 107, false),
    (0x5a10, 110, 111, true),
    (0x5522, 112, 109, false),
    (0x59eb, 112, 111, true),
    (0x5a1d, 113, 113, false),
];

/// State that stays at one half.
const FIXED: u8 = 113;

/// Number of tables of each kind.
const TABLES: usize = 16;

/// Number of estimates for first coefficients, and for the others.
const FIRST_ESTIMATES: usize = 64;
const OTHER_ESTIMATES: usize = 256;

/// Conditioning of a table, as a file defines it.
#[derive(Clone, Copy)]
pub(super) struct Conditioning {
    /// Bounds between small and large differences of first coefficients, as
    /// numbers of bits.
    pub(super) small: u8,
    pub(super) large: u8,
    /// Last of the other coefficients that count as low.
    pub(super) low: u8,
}

impl Default for Conditioning {
    fn default() -> Self {
        Self {
            small: 0,
            large: 1,
            low: 5,
        }
    }
}

/// Component of a scan: its tables, and the block before.
#[derive(Clone, Copy, Default)]
struct ArithmeticComponent {
    first_table: u8,
    other_table: u8,
    prediction: i32,
    context: u8,
}

/// Decoder of a scan of arithmetic codes.
pub(super) struct ArithmeticScan {
    band: ScanBand,
    components: [ArithmeticComponent; 4],
    conditioning: [Conditioning; TABLES],
    first: [[u8; FIRST_ESTIMATES]; TABLES],
    others: [[u8; OTHER_ESTIMATES]; TABLES],
    coder: Coder,
    /// True after a code that cannot be, up to the next restart.
    broken: bool,
}

/// State of the decoder of single symbols.
struct Coder {
    code: u64,
    interval: u64,
    /// Bits of `code` that are ahead. Negative at the beginning, while the
    /// first two bytes are missing.
    ahead: i32,
}

impl Coder {
    const BEGIN: Self = Self {
        code: 0,
        interval: 0,
        ahead: -16,
    };

    /// Decodes a symbol by its estimate, which is updated: the state, with the
    /// more likely symbol as the top bit.
    fn symbol(&mut self, estimate: &mut u8, source: &mut JpegSource<'_>) -> bool {
        while self.interval < 0x8000 {
            self.ahead -= 1;
            if self.ahead < 0 {
                self.code = self.code << 8 | u64::from(source.coded_byte());
                self.ahead += 8;
                if self.ahead < 0 {
                    self.ahead += 1;
                    if self.ahead == 0 {
                        self.interval = 0x8000;
                    }
                }
            }
            self.interval <<= 1;
        }
        let likely = *estimate & 0x80;
        let (less, after_less, after_more, exchange) = STATES[usize::from(*estimate & 0x7f) % 114];
        let less = u64::from(less);
        let after_less = after_less | if exchange { 0x80 } else { 0 };
        self.interval -= less;
        // `ahead` is 0 to 7 here.
        let bound = self.interval << (self.ahead & 63);
        let is_likely = if self.code >= bound {
            self.code -= bound;
            let conditional = self.interval < less;
            self.interval = less;
            conditional
        } else if self.interval < 0x8000 {
            self.interval >= less
        } else {
            return likely != 0;
        };
        if is_likely {
            *estimate = likely ^ after_more;
        } else {
            *estimate = likely ^ after_less;
        }
        (likely != 0) == is_likely
    }

    /// Decodes a symbol whose values are equally likely.
    fn even(&mut self, source: &mut JpegSource<'_>) -> bool {
        self.symbol(&mut { FIXED }, source)
    }
}

/// Marks a code that cannot be.
struct Broken;

impl ArithmeticScan {
    /// Creates the decoder. `tables` has the tables of each component: of the
    /// first coefficient and of the others.
    pub(super) fn new(
        band: ScanBand,
        tables: &[(u8, u8)],
        conditioning: [Conditioning; TABLES],
    ) -> Self {
        let mut components = [ArithmeticComponent::default(); 4];
        for (component, &(first, other)) in components.iter_mut().zip(tables) {
            component.first_table = first & 15;
            component.other_table = other & 15;
        }
        Self {
            band,
            components,
            conditioning,
            first: [[0; FIRST_ESTIMATES]; TABLES],
            others: [[0; OTHER_ESTIMATES]; TABLES],
            coder: Coder::BEGIN,
            broken: false,
        }
    }

    /// Forgets the blocks before, as at a restart.
    pub(super) fn restart(&mut self) {
        for component in &mut self.components {
            component.prediction = 0;
            component.context = 0;
        }
        self.first = [[0; FIRST_ESTIMATES]; TABLES];
        self.others = [[0; OTHER_ESTIMATES]; TABLES];
        self.coder = Coder::BEGIN;
        self.broken = false;
    }

    /// Decodes a block of a component of the scan.
    pub(super) fn block(
        &mut self,
        component: usize,
        block: &mut JpegBlock,
        source: &mut JpegSource<'_>,
    ) {
        if self.band.pass == (ScanPass::FirstCoefficient { refine: true }) {
            // libjpeg goes on here even after a code that cannot be.
            if self.coder.even(source) {
                block[0] |= 1 << self.band.low;
            }
            return;
        }
        if self.broken {
            return;
        }
        let outcome = match self.band.pass {
            ScanPass::Sequential => self
                .first(component, block, source)
                .and_then(|()| self.others(component, block, source)),
            ScanPass::FirstCoefficient { .. } => self.first(component, block, source),
            ScanPass::Others { refine: false } => self.others(component, block, source),
            ScanPass::Others { refine: true } => self.refine_others(component, block, source),
        };
        self.broken = outcome.is_err();
    }

    fn first(
        &mut self,
        component: usize,
        block: &mut JpegBlock,
        source: &mut JpegSource<'_>,
    ) -> Result<(), Broken> {
        let component = &mut self.components[component & 3];
        let table = usize::from(component.first_table & 15);
        let estimates = &mut self.first[table];
        let coder = &mut self.coder;
        let at = usize::from(component.context);
        if coder.symbol(&mut estimates[at], source) {
            let negative = coder.symbol(&mut estimates[at + 1], source);
            let mut at = at + 2 + usize::from(negative);
            let mut magnitude = i32::from(coder.symbol(&mut estimates[at], source));
            if magnitude != 0 {
                at = 20;
                while coder.symbol(&mut estimates[at], source) {
                    magnitude <<= 1;
                    if magnitude == 0x8000 {
                        return Err(Broken);
                    }
                    at += 1;
                }
            }
            let Conditioning { small, large, .. } = self.conditioning[table];
            component.context = if magnitude < (1 << small) >> 1 {
                0
            } else {
                let size = if magnitude > (1 << large) >> 1 { 12 } else { 4 };
                size + 4 * u8::from(negative)
            };
            let value = coder.value(magnitude, &mut estimates[at + 14], negative, source);
            component.prediction = component.prediction.wrapping_add(value) & 0xffff;
        } else {
            component.context = 0;
        }
        block[0] = low_bits(component.prediction << self.band.low);
        Ok(())
    }

    fn others(
        &mut self,
        component: usize,
        block: &mut JpegBlock,
        source: &mut JpegSource<'_>,
    ) -> Result<(), Broken> {
        let table = usize::from(self.components[component & 3].other_table & 15);
        let estimates = &mut self.others[table];
        let coder = &mut self.coder;
        let last = usize::from(self.band.last);
        let mut at = usize::from(self.band.first);
        while at <= last {
            // Whether the block ends here.
            if coder.symbol(&mut estimates[3 * (at - 1)], source) {
                break;
            }
            while !coder.symbol(&mut estimates[3 * (at - 1) + 1], source) {
                at += 1;
                if at > last {
                    return Err(Broken);
                }
            }
            let negative = coder.even(source);
            let mut estimate = 3 * (at - 1) + 2;
            let mut magnitude = i32::from(coder.symbol(&mut estimates[estimate], source));
            if magnitude != 0 && coder.symbol(&mut estimates[estimate], source) {
                magnitude <<= 1;
                let low = at <= usize::from(self.conditioning[table].low);
                estimate = if low { 189 } else { 217 };
                while coder.symbol(&mut estimates[estimate], source) {
                    magnitude <<= 1;
                    if magnitude == 0x8000 {
                        return Err(Broken);
                    }
                    estimate += 1;
                }
            }
            let value = coder.value(magnitude, &mut estimates[estimate + 14], negative, source);
            block[usize::from(NATURAL_ORDER[at & 63])] = low_bits(value << self.band.low);
            at += 1;
        }
        Ok(())
    }

    fn refine_others(
        &mut self,
        component: usize,
        block: &mut JpegBlock,
        source: &mut JpegSource<'_>,
    ) -> Result<(), Broken> {
        let table = usize::from(self.components[component & 3].other_table & 15);
        let estimates = &mut self.others[table];
        let coder = &mut self.coder;
        let one = 1_i16 << self.band.low;
        let (mut at, last) = (usize::from(self.band.first), usize::from(self.band.last));
        let place = |at: usize| usize::from(NATURAL_ORDER[at & 63]);
        let known = (1..=last).rev().find(|&at| block[place(at)] != 0);
        while at <= last {
            let beyond = known.is_none_or(|known| at > known);
            if beyond && coder.symbol(&mut estimates[3 * (at - 1)], source) {
                break;
            }
            loop {
                let coefficient = &mut block[place(at)];
                let estimate = 3 * (at - 1);
                if *coefficient != 0 {
                    if coder.symbol(&mut estimates[estimate + 2], source) {
                        let step = if *coefficient < 0 { -one } else { one };
                        *coefficient = coefficient.wrapping_add(step);
                    }
                    break;
                }
                if coder.symbol(&mut estimates[estimate + 1], source) {
                    *coefficient = if coder.even(source) { -one } else { one };
                    break;
                }
                at += 1;
                if at > last {
                    return Err(Broken);
                }
            }
            at += 1;
        }
        Ok(())
    }
}

impl Coder {
    /// Decodes the lower bits of a value whose highest bit is known, and
    /// returns the value, which is one more than its bits.
    fn value(
        &mut self,
        magnitude: i32,
        estimate: &mut u8,
        negative: bool,
        source: &mut JpegSource<'_>,
    ) -> i32 {
        let (mut value, mut bit) = (magnitude, magnitude >> 1);
        while bit > 0 {
            if self.symbol(estimate, source) {
                value |= bit;
            }
            bit >>= 1;
        }
        value += 1;
        if negative { -value } else { value }
    }
}
