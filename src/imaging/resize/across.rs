//! The pass over the pixels of rows: each result pixel is a weighted mean of
//! some pixels of its row.

#[cfg(target_arch = "x86_64")]
use super::avx2::Avx2Columns;
use super::axis::{Axis, Taps};
use super::weights::ColumnWeights;

/// Longest rows of which the weights are kept, in pixels: they take about 32
/// bytes per pixel. For longer rows they are computed for each block of rows.
const KEPT_LEN_MAX: usize = 16 << 10;

/// The taps of all result pixels of a row.
pub(super) struct Across {
    taps: Vec<Taps>,
    source_bytes: usize,
    /// First byte of the row that is copied, if the pass keeps all pixels.
    copied_from: Option<usize>,
    kept: KeptWeights,
}

/// Weights of each result pixel, or none if they are not kept.
enum KeptWeights {
    #[cfg(target_arch = "x86_64")]
    Avx2(Avx2Columns),
    Portable(Vec<ColumnWeights>),
}

impl Across {
    /// Prepares for rows along an axis; from its end if they are mirrored.
    pub(super) fn new(axis: &Axis, mirrored: bool) -> Self {
        let taps = axis.taps(mirrored);
        let copied = axis.is_identity() && !mirrored;
        let first = taps.first().map_or(0, |taps| taps.source.start * 3);
        let kept = if axis.source_len <= KEPT_LEN_MAX && !copied {
            &taps[..]
        } else {
            &[]
        };
        Self {
            kept: KeptWeights::new(kept),
            source_bytes: axis.source_len * 3,
            copied_from: copied.then_some(first),
            taps,
        }
    }

    /// Returns the bytes of a result row.
    pub(super) fn result_bytes(&self) -> usize {
        self.taps.len() * 3
    }

    /// Computes the result rows of some rows.
    pub(super) fn apply(&self, source: &[u8], target: &mut [u8]) {
        if let Some(first) = self.copied_from {
            let rows = source.chunks_exact(self.source_bytes);
            for (from, to) in rows.zip(target.chunks_exact_mut(self.result_bytes())) {
                to.copy_from_slice(&from[first..][..to.len()]);
            }
            return;
        }
        match &self.kept {
            #[cfg(target_arch = "x86_64")]
            KeptWeights::Avx2(kept) => {
                kept.apply(&self.taps, source, self.source_bytes, target);
            }
            KeptWeights::Portable(kept) => self.portable(kept, source, target),
        }
    }

    /// Computes the result rows with operations of every CPU.
    fn portable(&self, kept: &[ColumnWeights], source: &[u8], target: &mut [u8]) {
        let result_bytes = self.result_bytes();
        for (column, taps) in self.taps.iter().enumerate() {
            let made;
            let weights = if let Some(weights) = kept.get(column) {
                weights
            } else {
                made = ColumnWeights::new(taps);
                &made
            };
            let span = taps.source.start * 3..taps.source.end * 3;
            let rows = source.chunks_exact(self.source_bytes);
            for (from, to) in rows.zip(target.chunks_exact_mut(result_bytes)) {
                to[column * 3..][..3].copy_from_slice(&weights.mean(&from[span.clone()]));
            }
        }
    }
}

impl KeptWeights {
    fn new(kept: &[Taps]) -> Self {
        #[cfg(target_arch = "x86_64")]
        if let Some(columns) = Avx2Columns::new(kept) {
            return Self::Avx2(columns);
        }
        Self::Portable(kept.iter().map(ColumnWeights::new).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vectors_compute_what_the_portable_code_does() {
        let mut state = 1_u32;
        let mut noise = |len: usize| -> Vec<u8> {
            let mut next = || {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                state.to_be_bytes()[0]
            };
            (0..len).map(|_| next()).collect()
        };
        for len in [1, 2, 3, 5, 31, 33, 64, 100, 427, 640, 2999, 20_000] {
            for side in [1, 2, 31, 32, 224, 300] {
                for mirrored in [false, true] {
                    let source = noise(len * 3 * 5);
                    let across = Across::new(&Axis::whole(len, side), mirrored);
                    let mut ours = vec![0; side * 3 * 5];
                    across.apply(&source, &mut ours);
                    let mut expected = vec![0; side * 3 * 5];
                    across.portable(&[], &source, &mut expected);
                    assert_eq!(ours, expected, "{len} to {side}");
                    let kept: Vec<_> = across.taps.iter().map(ColumnWeights::new).collect();
                    across.portable(&kept, &source, &mut expected);
                    assert_eq!(ours, expected, "{len} to {side}");
                }
            }
        }
    }
}
