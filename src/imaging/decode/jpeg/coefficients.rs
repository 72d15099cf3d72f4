//! The coefficients of a file of several scans, and what of them its scans
//! gave.

use super::frame::JpegFrame;
use super::huffman::JpegBlock;
use super::scan::{BlockPlace, BlockSink};
use super::segments::JpegScan;

/// Number of coefficients whose precision decides about smoothing.
pub(super) const SMOOTHED: usize = 10;

/// Blocks of all components.
pub(super) struct Coefficients {
    pub(super) components: Vec<ComponentBlocks>,
    /// Last row of the frame's units for which the last scan had data.
    pub(super) last_good_row: u32,
    scans: u32,
}

/// Blocks of one component.
pub(super) struct ComponentBlocks {
    pub(super) across: u32,
    pub(super) blocks: Vec<JpegBlock>,
    /// Lowest bit that was given of each of the first coefficients, or -1; and
    /// the same before the last scan of the component.
    pub(super) bits: [i8; SMOOTHED],
    pub(super) bits_before: [i8; SMOOTHED],
}

impl Coefficients {
    pub(super) fn new(frame: &JpegFrame) -> Self {
        let components = frame.components.iter().map(|component| {
            let (across, down) = component.padded;
            ComponentBlocks {
                across,
                blocks: vec![[0; 64]; across as usize * down as usize],
                bits: [-1; SMOOTHED],
                bits_before: [-1; SMOOTHED],
            }
        });
        Self {
            components: components.collect(),
            last_good_row: 0,
            scans: 0,
        }
    }

    /// Notes what a progressive scan gives.
    pub(super) fn begin_scan(&mut self, scan: &JpegScan) {
        self.scans += 1;
        let (first, last) = (usize::from(scan.first), usize::from(scan.last));
        for component in &scan.components {
            let Some(component) = self.components.get_mut(component.index) else {
                continue;
            };
            for at in first.min(1)..SMOOTHED {
                component.bits_before[at] = if self.scans > 1 {
                    component.bits[at]
                } else {
                    0
                };
            }
            for at in first..=last.min(SMOOTHED - 1) {
                component.bits[at] = scan.low.cast_signed();
            }
        }
    }

    /// Returns the bits of the coefficients before the last scan, as they count
    /// for rows that the last scan lacks.
    pub(super) fn bits_before(&self, component: usize) -> [i8; SMOOTHED] {
        if self.scans > 1 {
            self.components[component].bits_before
        } else {
            [-1; SMOOTHED]
        }
    }
}

impl ComponentBlocks {
    pub(super) fn get(&self, column: u32, row: u32) -> &JpegBlock {
        &self.blocks[row as usize * self.across as usize + column as usize]
    }
}

impl BlockSink for Coefficients {
    #[inline]
    fn block(&mut self, component: usize, place: BlockPlace, decode: impl FnOnce(&mut JpegBlock)) {
        let component = &mut self.components[component];
        let at = place.row as usize * component.across as usize + place.column as usize;
        decode(&mut component.blocks[at]);
    }
}
