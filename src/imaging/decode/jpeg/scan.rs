//! Decodes the scans of a JPEG, block by block.

use super::super::{Header, PreprocessError};
use super::CUT;
use super::arithmetic::ArithmeticScan;
use super::frame::{JpegComponent, JpegFrame};
use super::huffman::{HuffmanScan, HuffmanTable, JpegBlock, ScanBand, ScanPass};
use super::segments::{JpegScan, JpegTables, ScanComponent};
use super::source::JpegSource;

/// Decoder of one scan.
pub(super) struct ScanDecoder {
    entropy: Entropy,
    pub(super) components: Vec<ScanComponent>,
    /// Units between two restart markers, or 0, and units up to the next.
    restart_interval: u16,
    units_left: u16,
    /// Number of the next restart marker.
    restart_number: u8,
}

enum Entropy {
    Huffman(HuffmanScan),
    Arithmetic(Box<ArithmeticScan>),
}

/// Place of a block: its column and row in its component.
#[derive(Clone, Copy)]
pub(super) struct BlockPlace {
    pub(super) column: u32,
    pub(super) row: u32,
}

/// Receiver of the blocks of a scan.
pub(super) trait BlockSink {
    /// Lets `decode` change the block at a place of a component, whose index is
    /// that of the frame.
    fn block(&mut self, component: usize, place: BlockPlace, decode: impl FnOnce(&mut JpegBlock));
}

impl ScanDecoder {
    pub(super) fn new(
        scan: &JpegScan,
        frame: &JpegFrame,
        tables: &JpegTables,
        header: Header<'_>,
    ) -> Result<Self, PreprocessError> {
        let band = scan.band(frame, header)?;
        let entropy = if frame.coding.arithmetic {
            let numbers: Vec<(u8, u8)> = scan
                .components
                .iter()
                .map(|component| (component.first_table, component.other_table))
                .collect();
            let scan = ArithmeticScan::new(band, &numbers, tables.conditioning);
            Entropy::Arithmetic(Box::new(scan))
        } else {
            let tables = scan
                .components
                .iter()
                .map(|component| tables.of(component, band.pass))
                .collect::<Option<_>>()
                .ok_or_else(|| header.damaged("a scan without valid Huffman codes"))?;
            Entropy::Huffman(HuffmanScan::new(band, tables))
        };
        Ok(Self {
            entropy,
            components: scan.components.clone(),
            restart_interval: tables.restart_interval,
            units_left: tables.restart_interval,
            restart_number: 0,
        })
    }

    /// Returns the rows of units in a row of the frame's units, from `row` on,
    /// that the scan has.
    pub(super) fn rows(&self, row: u32, frame: &JpegFrame) -> std::ops::Range<u32> {
        match self.alone(frame) {
            None => row..row + 1,
            Some((_, component)) => {
                let rows = component.sampling.1;
                (row * rows).min(component.blocks.1)..((row + 1) * rows).min(component.blocks.1)
            }
        }
    }

    /// Returns the component of a scan that has only one. Its units are blocks.
    fn alone<'a>(&self, frame: &'a JpegFrame) -> Option<(usize, &'a JpegComponent)> {
        match self.components[..] {
            [ScanComponent { index, .. }] => Some((index, frame.components.get(index)?)),
            _ => None,
        }
    }

    /// Decodes a row of units. Returns `false` if data were missing before its
    /// last unit.
    pub(super) fn row(
        &mut self,
        row: u32,
        frame: &JpegFrame,
        source: &mut JpegSource<'_>,
        sink: &mut impl BlockSink,
        header: Header<'_>,
    ) -> Result<bool, PreprocessError> {
        let mut good = false;
        if let Some((index, component)) = self.alone(frame) {
            for column in 0..component.blocks.0 {
                good |= !source.insufficient;
                let decode = self.begin_unit(source, header)?;
                let place = BlockPlace { column, row };
                sink.block(index, place, |block| {
                    if decode {
                        self.entropy.block(0, block, source);
                    }
                });
            }
        } else {
            for unit in 0..frame.width.div_ceil(8 * frame.sampling.0) {
                good |= !source.insufficient;
                let decode = self.begin_unit(source, header)?;
                for (at, component) in self.components.iter().enumerate() {
                    let (h, v) = frame.components[component.index].sampling;
                    for y in 0..v {
                        for x in 0..h {
                            let place = BlockPlace {
                                column: unit * h + x,
                                row: row * v + y,
                            };
                            sink.block(component.index, place, |block| {
                                if decode {
                                    self.entropy.block(at, block, source);
                                }
                            });
                        }
                    }
                }
            }
        }
        if source.cut {
            return Err(header.damaged(CUT));
        }
        Ok(good)
    }

    /// Prepares for the next unit. Returns `false` if the unit has no data.
    fn begin_unit(
        &mut self,
        source: &mut JpegSource<'_>,
        header: Header<'_>,
    ) -> Result<bool, PreprocessError> {
        if self.restart_interval > 0 {
            if self.units_left == 0 {
                source
                    .restart(self.restart_number)
                    .ok_or_else(|| header.damaged(CUT))?;
                self.restart_number = (self.restart_number + 1) & 7;
                self.units_left = self.restart_interval;
                match &mut self.entropy {
                    Entropy::Huffman(scan) => scan.restart(),
                    Entropy::Arithmetic(scan) => scan.restart(),
                }
            }
            self.units_left -= 1;
        }
        Ok(!source.insufficient)
    }
}

impl Entropy {
    #[inline]
    fn block(&mut self, component: usize, block: &mut JpegBlock, source: &mut JpegSource<'_>) {
        match self {
            Self::Huffman(scan) => scan.block(component, block, source),
            Self::Arithmetic(scan) => scan.block(component, block, source),
        }
    }
}

impl JpegScan {
    /// Returns the coefficients that the scan gives.
    fn band(&self, frame: &JpegFrame, header: Header<'_>) -> Result<ScanBand, PreprocessError> {
        if !frame.coding.progressive {
            // Some files have zeros here, which libjpeg ignores.
            return Ok(ScanBand {
                first: 1,
                last: 63,
                low: 0,
                pass: ScanPass::Sequential,
            });
        }
        let &Self {
            first,
            last,
            high,
            low,
            ..
        } = self;
        let refine = high != 0;
        let valid = if first == 0 {
            last == 0
        } else {
            first <= last && last < 64 && self.components.len() == 1
        };
        if !valid || (refine && low + 1 != high) || low > 13 {
            return Err(header.damaged(format!(
                "a scan of coefficients {first} to {last}, bits {high} to {low}"
            )));
        }
        Ok(ScanBand {
            first,
            last,
            low,
            pass: if first == 0 {
                ScanPass::FirstCoefficient { refine }
            } else {
                ScanPass::Others { refine }
            },
        })
    }
}

impl JpegTables {
    /// Makes the Huffman tables that a pass needs for a component. Returns
    /// `None` if one is missing or invalid.
    fn of(&self, component: &ScanComponent, pass: ScanPass) -> Option<[Option<HuffmanTable>; 2]> {
        let (first, others) = match pass {
            ScanPass::Sequential => (true, true),
            ScanPass::FirstCoefficient { refine } => (!refine, false),
            ScanPass::Others { .. } => (false, true),
        };
        let first = if first {
            let code = self.first.get(usize::from(component.first_table))?;
            Some(HuffmanTable::new(code.as_ref()?, true)?)
        } else {
            None
        };
        let others = if others {
            let code = self.others.get(usize::from(component.other_table))?;
            Some(HuffmanTable::new(code.as_ref()?, false)?)
        } else {
            None
        };
        Some([first, others])
    }
}
