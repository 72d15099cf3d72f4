//! Dense products of a few rows: what a step of generation does over and over.
//!
//! With a few rows a product computes less than it reads: all of its weights,
//! once. So they lie in the order in which they are read ([`Panels`]), on large
//! pages, and every row that there is uses them while they pass.
//!
//! A row's result depends on that row alone, to the last bit: not on how many
//! others run with it, nor on threads, because each of its numbers is summed in
//! the order of the inputs, whatever the tile.
#![expect(
    unsafe_code,
    reason = "threads write disjoint columns of one output, through raw pointers"
)]

use std::cell::RefCell;

use bytemuck::Pod;

use self::tile::{Ahead, Tile};
use super::pages::Pages;
use super::phase::TASKS_MAX;
use super::pointwise::Activation;
use super::{LayersError, check, size};
use crate::attention::Kernel;
use crate::vector::scratch::Scratch;
use crate::vector::{Int24, LANES_MAX, Number, Portable, magnitude, tile_of};

#[cfg(test)]
mod tests;
mod tile;

/// A number that weights are given in: `f32`, or `i8` with a scale for each output.
pub trait Weight: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// What they are kept in.
    type Packed: Number + Pod;
    /// Whether reading them is work that several tiles should not do over again.
    const IS_UNPACKED: bool;

    /// What each output's sum is multiplied with for how its weights are kept,
    /// if with anything.
    fn factors(weights: &[Self], outputs: usize) -> Option<Vec<f32>>;

    fn pack(self, factor: f32) -> Self::Packed;
}

impl Weight for f32 {
    type Packed = Int24;
    const IS_UNPACKED: bool = true;

    fn factors(weights: &[f32], outputs: usize) -> Option<Vec<f32>> {
        let mut magnitudes = vec![0; outputs];
        for row in weights.chunks_exact(outputs) {
            for (largest, weight) in magnitudes.iter_mut().zip(row) {
                *largest = magnitude(*weight).max(*largest);
            }
        }
        Some(magnitudes.into_iter().map(Int24::factor_of).collect())
    }

    fn pack(self, factor: f32) -> Int24 {
        Int24::of(self, factor)
    }
}

impl Weight for i8 {
    type Packed = Self;
    const IS_UNPACKED: bool = false;

    fn factors(_weights: &[i8], _outputs: usize) -> Option<Vec<f32>> {
        None
    }

    fn pack(self, _factor: f32) -> i8 {
        self
    }
}

thread_local! {
    /// A panel's weights as floats, for the tiles after the first: 256 KiB for
    /// imagegpt-small on AVX-512, which the second level of the cache of such CPUs
    /// has room for.
    static UNPACKED: RefCell<Scratch> = const { RefCell::new(Scratch::new()) };
}

/// What a product is made of.
#[derive(Clone, Copy, Debug)]
pub struct DenseWeights<'a, W> {
    /// `(inputs, outputs)`.
    pub weights: &'a [W],
    /// `(outputs)`: what each output's sum is multiplied with. None is ones.
    pub scales: Option<&'a [f32]>,
    /// `(outputs)`, added to every row.
    pub bias: Option<&'a [f32]>,
}

/// The weights of a product: panels of a few columns, made of strips one after the
/// other, in each a row of as many numbers as it has columns for every input. What
/// the last panel has too many is zero.
#[derive(Debug)]
pub(super) struct Panels<W: Weight> {
    inputs: usize,
    outputs: usize,
    kernel: Kernel,
    pages: Pages<W::Packed>,
    /// One for each column of the panels.
    scales: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

/// Rows of a product's input and output; each so many floats after the one
/// before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) n: usize,
    pub(super) input: *const f32,
    pub(super) input_stride: usize,
    /// In each row there is room for whole panels.
    pub(super) output: *mut f32,
    pub(super) output_stride: usize,
}

/// What becomes of a sum.
#[derive(Clone, Copy, Debug)]
pub(super) enum Finish {
    Set,
    /// It is added to what is there.
    Add,
    Activate(Activation),
}

/// Floats in a panel's row: so many vectors that there are enough sums for the
/// CPU to have something to do while one is added to, and registers for all.
pub(super) fn panel_width(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable => 8,
        Kernel::Avx2 => 24,
        _ => 32,
    }
}

/// Numbers in a strip's row. [`tile`] reads them so.
fn strip_width<N: Number>(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable | Kernel::Avx2 => panel_width(kernel),
        _ if N::IN_STRIPS => LANES_MAX,
        _ => panel_width(kernel),
    }
}

/// The widest panel of any kernel.
pub(super) const PANEL_WIDTH_MAX: usize = 32;

/// Rows that are computed together, at most: as many as there are registers for.
fn tile_rows(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable | Kernel::Avx2 => 4,
        _ => 8,
    }
}

/// One for each column of whole panels; what is too many is zero.
fn padded(
    name: &'static str,
    floats: Option<&[f32]>,
    outputs: usize,
    width: usize,
) -> Result<Option<Vec<f32>>, LayersError> {
    let Some(floats) = floats else {
        return Ok(None);
    };
    check(name, floats.len(), outputs)?;
    let mut padded = floats.to_vec();
    padded.resize(outputs.next_multiple_of(width), 0.0);
    Ok(Some(padded))
}

impl<W: Weight> Panels<W> {
    /// Puts weights in order for a kernel, which must be available.
    ///
    /// # Errors
    /// If the sizes do not fit, or memory does not suffice.
    pub(super) fn pack(
        dense: &DenseWeights<'_, W>,
        [inputs, outputs]: [usize; 2],
        kernel: Kernel,
    ) -> Result<Self, LayersError> {
        check("weights", dense.weights.len(), size(1, inputs, outputs)?)?;
        let width = panel_width(kernel);
        if outputs.div_ceil(width) > TASKS_MAX {
            return Err(LayersError::TooLarge {
                rows: 1,
                inputs,
                outputs,
            });
        }
        let factors = W::factors(dense.weights, outputs);
        let factor = |column: usize| factors.as_ref().map_or(1.0, |factors| factors[column]);
        let mut pages =
            Pages::<W::Packed>::zeroed(size(1, inputs, outputs.next_multiple_of(width))?)?;
        let strip_width = strip_width::<W::Packed>(kernel);
        for (strip, rows) in pages
            .numbers_mut()
            .chunks_exact_mut(inputs * strip_width)
            .enumerate()
        {
            let first = outputs.min(strip * strip_width);
            let n_columns = strip_width.min(outputs - first);
            let weights = dense.weights.chunks_exact(outputs);
            for (row, weights) in rows.chunks_exact_mut(strip_width).zip(weights) {
                let columns = row.iter_mut().zip(first..first + n_columns);
                for (packed, column) in columns {
                    *packed = weights[column].pack(factor(column));
                }
            }
        }
        let scales = match (dense.scales, &factors) {
            (Some(scales), Some(factors)) => {
                check("scales", scales.len(), outputs)?;
                let both = scales.iter().zip(factors);
                Some(both.map(|(scale, factor)| scale * factor).collect())
            }
            (scales, None) => scales.map(<[f32]>::to_vec),
            (None, _) => factors,
        };
        Ok(Self {
            inputs,
            outputs,
            kernel,
            pages,
            scales: padded("scales", scales.as_deref(), outputs, width)?,
            bias: padded("bias", dense.bias, outputs, width)?,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.outputs.div_ceil(panel_width(self.kernel))
    }

    /// Where a panel begins.
    ///
    /// # Panics
    /// If there is none of this number.
    pub(super) fn panel(&self, idx: usize) -> *const W::Packed {
        let len = panel_width(self.kernel) * self.inputs;
        self.pages.numbers()[idx * len..][..len].as_ptr()
    }

    /// Computes the columns of panel `idx` in all rows, and asks for what lies at
    /// `next`, which need not be valid.
    ///
    /// # Safety
    /// The kernel is available and `idx` below [`Panels::len`]; `rows` are so
    /// many, with all inputs and with room for whole panels; until this returns
    /// nobody writes the inputs, and nobody else has these columns of the output.
    pub(super) unsafe fn compute(&self, idx: usize, rows: Rows, finish: Finish, next: *const u8) {
        let width = panel_width(self.kernel);
        let most = tile_rows(self.kernel);
        let first = idx * width;
        let panel = self.panel(idx);
        let from =
            |floats: &Option<Vec<f32>>| floats.as_ref().map(|floats| floats[first..].as_ptr());
        let n_tiles = rows.n.div_ceil(most);
        let mut row = 0;
        UNPACKED.with_borrow_mut(|unpacked| {
            let keeps = W::IS_UNPACKED && tile_of(rows.n, most) < rows.n;
            let len = if keeps { self.inputs * width } else { 0 };
            let [floats] = unpacked.split([len]);
            let floats = floats.as_mut_ptr();
            while row < rows.n {
                let n = tile_of(rows.n - row, most);
                let size = size_of::<W::Packed>();
                let unpack = (keeps && row == 0).then_some(floats);
                // SAFETY: the caller vouches for the rows, of which these are some,
                // and for the instructions; the panel is there, and so are its
                // floats once the first tile has left them.
                unsafe {
                    let tile = Tile {
                        rows: rows.input.add(row * rows.input_stride),
                        row_stride: rows.input_stride,
                        inputs: self.inputs,
                        panel,
                        unpack,
                        ahead: Ahead::of(n_tiles, row / most, self.inputs, width, size, next),
                        scales: from(&self.scales),
                        bias: from(&self.bias),
                        output: rows.output.add(row * rows.output_stride + first),
                        output_stride: rows.output_stride,
                        finish,
                    };
                    if keeps && row > 0 {
                        self.run(&tile.over(floats.cast_const()), n);
                    } else {
                        self.run(&tile, n);
                    }
                }
                row += n;
            }
        });
    }

    /// # Safety
    /// As [`Tile::compute`], with the kernel's vectors.
    unsafe fn run<N: Number>(&self, tile: &Tile<N>, n_rows: usize) {
        // SAFETY: the caller vouches for all of it.
        unsafe {
            match self.kernel {
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => tile::avx2(tile, n_rows),
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => tile::avx512(tile, n_rows),
                _ => tile.compute_rows::<Portable, 2>(n_rows),
            }
        }
    }
}
