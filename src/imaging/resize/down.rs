//! The pass over rows: each result row is a weighted mean of some rows.

use std::ops::Range;

use multiversion::multiversion;

use super::axis::Taps;
use super::{HALF, to_byte};

/// Result rows that are begun, and the taps of all.
pub(super) struct Down {
    /// Taps in the order in which the result rows are finished.
    taps: Vec<Taps>,
    /// Result rows that are finished.
    done: usize,
    /// Sums of the result rows behind them that are begun.
    sums: Vec<Vec<u32>>,
    row_bytes: usize,
}

impl Down {
    /// Prepares for rows of some bytes. The taps are reversed if the last
    /// result row is the first to be finished.
    pub(super) fn new(mut taps: Vec<Taps>, reversed: bool, row_bytes: usize) -> Self {
        if reversed {
            taps.reverse();
        }
        Self {
            taps,
            done: 0,
            sums: Vec::new(),
            row_bytes,
        }
    }

    /// Returns the rows that any result row needs.
    pub(super) fn needed(&self) -> Range<usize> {
        let start = self.taps.first().map_or(0, |taps| taps.source.start);
        let end = self.taps.last().map_or(0, |taps| taps.source.end);
        start..end
    }

    /// Adds a row, and appends the result rows that are finished by it.
    pub(super) fn add(&mut self, row: usize, pixels: &[u8], result: &mut Vec<u8>) {
        while let Some(taps) = self.taps.get(self.done + self.sums.len())
            && taps.source.start <= row
        {
            self.sums.push(vec![HALF; self.row_bytes]);
        }
        for (taps, sums) in self.taps[self.done..].iter().zip(&mut self.sums) {
            if taps.source.contains(&row) {
                add_weighted(sums, pixels, taps.weight(row));
            }
        }
        let begun = &self.taps[self.done..][..self.sums.len()];
        let finished = begun
            .iter()
            .take_while(|taps| taps.source.end <= row + 1)
            .count();
        for sums in self.sums.drain(..finished) {
            result.extend(sums.into_iter().map(to_byte));
        }
        self.done += finished;
    }
}

/// Adds a row's weighted pixels to the sums of a result row.
#[multiversion(targets("x86_64+avx2"))]
fn add_weighted(sums: &mut [u32], pixels: &[u8], weight: u32) {
    // Both branches compute the same product. With a 16-bit weight it is far
    // faster without AVX2, which has products of 32 bits.
    if let Ok(weight) = u16::try_from(weight) {
        for (sum, &pixel) in sums.iter_mut().zip(pixels) {
            *sum += u32::from(weight) * u32::from(pixel);
        }
    } else {
        for (sum, &pixel) in sums.iter_mut().zip(pixels) {
            *sum += weight * u32::from(pixel);
        }
    }
}
