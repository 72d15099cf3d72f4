//! Source pixels of each result pixel, and their weights, along one direction.

use std::ops::Range;

use super::WEIGHT_BITS;

const ONE: f64 = (1 << WEIGHT_BITS) as f64;

/// One direction of a resize, with the part of the result that is wanted.
#[derive(Clone, Debug)]
pub(super) struct Axis {
    pub(super) source_len: usize,
    pub(super) result_len: u64,
    pub(super) window: Range<u64>,
}

impl Axis {
    pub(super) fn whole(source_len: usize, result_len: usize) -> Self {
        Self::part(source_len, result_len as u64, 0..result_len as u64)
    }

    /// Returns the middle `crop` pixels after the shorter side has become
    /// `crop` long. The arithmetic is Python's: true division, truncation, and
    /// an offset rounded half to even.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "lengths are positive and far below 2^53"
    )]
    pub(super) fn centered(source_len: usize, shorter: usize, crop: u64) -> Self {
        let result_len = ((crop * source_len as u64) as f64 / shorter as f64) as u64;
        let start = ((result_len - crop) as f64 / 2.0).round_ties_even() as u64;
        Self::part(source_len, result_len, start..start + crop)
    }

    pub(super) fn part(source_len: usize, result_len: u64, window: Range<u64>) -> Self {
        Self {
            source_len,
            result_len,
            window,
        }
    }

    /// Returns true if the length stays the same, so that Pillow skips the
    /// pass.
    pub(super) fn is_identity(&self) -> bool {
        self.source_len as u64 == self.result_len
    }

    /// Returns the number of pixels by which the length shrinks; negative if it
    /// grows.
    pub(super) fn shrinkage(&self) -> i128 {
        self.source_len as i128 - i128::from(self.result_len)
    }

    /// Returns the taps of the window; of a source that is mirrored, if it is.
    pub(super) fn taps(&self, mirrored: bool) -> Vec<Taps> {
        let last = mirrored.then(|| self.source_len - 1);
        let taps = |position| Taps::new(self, position).mirrored(last);
        self.window.clone().map(taps).collect()
    }
}

/// The source pixels of which one result pixel is a weighted mean.
///
/// The weights themselves are computed when they are needed: keeping all of
/// them would take memory in proportion to the longest side.
#[derive(Clone, Debug)]
pub(super) struct Taps {
    pub(super) source: Range<usize>,
    /// Index of the last source pixel, if the source is mirrored.
    last: Option<usize>,
    center: f64,
    /// One over the filter's half width in source pixels.
    sharpness: f64,
    total: f64,
}

impl Taps {
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "positions are clamped to the source, which is far below 2^53"
    )]
    fn new(axis: &Axis, position: u64) -> Self {
        if axis.is_identity() {
            let index = position as usize;
            return Self {
                source: index..index + 1,
                last: None,
                center: index as f64 + 0.5,
                sharpness: 1.0,
                total: 1.0,
            };
        }
        let scale = axis.source_len as f64 / axis.result_len as f64;
        let support = scale.max(1.0);
        let center = (position as f64 + 0.5) * scale;
        let first = (center - support + 0.5).max(0.0) as usize;
        let end = ((center + support + 0.5) as usize).min(axis.source_len);
        let mut taps = Self {
            source: first..end,
            last: None,
            center,
            sharpness: 1.0 / support,
            total: 1.0,
        };
        taps.total = (first..end).map(|index| taps.raw(index)).sum();
        taps
    }

    /// Returns the taps of a source that is mirrored, whose last pixel is given.
    fn mirrored(mut self, last: Option<usize>) -> Self {
        if let Some(last) = last {
            self.source = last + 1 - self.source.end..last + 1 - self.source.start;
            self.last = Some(last);
        }
        self
    }

    #[expect(clippy::cast_precision_loss, reason = "indexes are far below 2^53")]
    fn raw(&self, index: usize) -> f64 {
        let distance = (index as f64 - self.center + 0.5) * self.sharpness;
        (1.0 - distance.abs()).max(0.0)
    }

    /// Returns the weight of one source pixel in fixed point, rounded half up.
    #[expect(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        reason = "a weight lies between 0 and 1, so it fits"
    )]
    pub(super) fn weight(&self, index: usize) -> u32 {
        let index = self.last.map_or(index, |last| last - index);
        (0.5 + self.raw(index) / self.total * ONE) as u32
    }
}
