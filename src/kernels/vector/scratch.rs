//! Scratch memory that a thread keeps from one block to the next.
#![expect(
    unsafe_code,
    reason = "one cast: lines of floats to floats, for their alignment"
)]

/// A cache line, so that scratch memory begins on one.
#[derive(Clone, Copy)]
#[repr(C, align(64))]
struct Line([f32; 16]);

/// Floats on cache lines. The memory grows to the largest block seen, a few
/// tens of KiB.
#[derive(Default)]
pub(crate) struct AlignedScratch {
    lines: Vec<Line>,
}

impl AlignedScratch {
    pub(crate) const fn new() -> Self {
        Self { lines: Vec::new() }
    }

    /// Returns pieces of these lengths, each beginning on a cache line. The
    /// pieces hold whatever the last block left.
    pub(crate) fn split<const N: usize>(&mut self, lengths: [usize; N]) -> [&mut [f32]; N] {
        let n_lines = lengths.iter().map(|length| length.div_ceil(16)).sum();
        if self.lines.len() < n_lines {
            self.lines.resize(n_lines, Line([0.0; 16]));
        }
        let mut rest = self.lines.as_mut_slice();
        lengths.map(|length| {
            let (piece, tail) = std::mem::take(&mut rest).split_at_mut(length.div_ceil(16));
            rest = tail;
            as_floats(piece)
        })
    }
}

fn as_floats(lines: &mut [Line]) -> &mut [f32] {
    // SAFETY: a line is sixteen floats and nothing else, so `n` lines are
    // `16 * n` floats in a row; the borrow is passed on.
    unsafe { std::slice::from_raw_parts_mut(lines.as_mut_ptr().cast(), lines.len() * 16) }
}
