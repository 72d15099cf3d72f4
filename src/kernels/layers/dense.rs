//! Dense products of a few rows, the most frequent work of a step of
//! generation.
//!
//! With a few rows, a product computes less than it reads, which is all of its
//! weights, once. Therefore the weights lie in the order in which they are read
//! ([`Panels`]), on large pages, and all rows use the weights while they pass.
//!
//! A row's result depends on that row alone, to the last bit: not on how many
//! other rows run with it, nor on threads, because each of its numbers is
//! summed in the order of the inputs, whatever the tile.
#![expect(
    unsafe_code,
    reason = "threads write disjoint columns of one output, through raw pointers"
)]

use std::cell::RefCell;

use bytemuck::Pod;
use half::bf16;

use self::digit_tile::DigitTile;
use self::tile::{Ahead, Tile, TileEnding};
use super::digits::{self, DigitRows};
use super::pages::LargePages;
use super::phase::TASKS_MAX;
use super::pointwise::Activation;
use super::{LayersError, check, size};
use crate::kernels::attention::Kernel;
use crate::kernels::vector::scratch::AlignedScratch;
use crate::kernels::vector::{Int24, LANES_MAX, Number, Portable, magnitude, tile_of};

mod digit_tile;
#[cfg(test)]
mod tests;
mod tile;

/// Format in which weights are given: `f32`, `bf16`, or `i8` with a scale per
/// output.
pub trait Weight: Copy + Send + Sync + std::fmt::Debug + 'static {
    /// Format in which the weights are kept.
    type Packed: Number + Pod;
    /// True if reading the weights takes work that several tiles should not
    /// repeat.
    const IS_UNPACKED: bool;

    /// Returns the factor of each output's sum that the format of the kept
    /// weights requires, if it requires any.
    fn factors(weights: &[Self], outputs: usize) -> Option<Vec<f32>>;

    fn pack(self, factor: f32) -> Self::Packed;

    /// Returns the weights, if they are floats.
    fn floats(_weights: &[Self]) -> Option<&[f32]> {
        None
    }

    /// Returns the weights, if they are in bfloat16.
    fn bf16(_weights: &[Self]) -> Option<&[bf16]> {
        None
    }

    /// Returns the weights, if they have 8 bits.
    fn bytes(_weights: &[Self]) -> Option<&[i8]> {
        None
    }
}

/// Format of a row's numbers while they are multiplied with weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowsAs {
    /// Floats, as the numbers are.
    Floats,
    /// Whole numbers, rounded to 24 bits; only with weights of 8 bits.
    Digits,
}

impl RowsAs {
    pub const ALL: [Self; 2] = [Self::Floats, Self::Digits];

    /// Returns the fastest format for weights of the type `W`.
    #[must_use]
    pub fn fastest<W: Weight>(kernel: Kernel, inputs: usize) -> Self {
        let digits = Self::Digits.are_available::<W>(kernel, inputs);
        if digits && kernel == Kernel::Avx512 {
            Self::Digits
        } else {
            Self::Floats
        }
    }

    /// Returns true if a kernel that is available has products of this format,
    /// of weights `W` and of `inputs` inputs.
    #[must_use]
    pub fn are_available<W: Weight>(self, kernel: Kernel, inputs: usize) -> bool {
        let are_bytes = || W::bytes(&[]).is_some() && inputs <= digits::INPUTS_MAX;
        self == Self::Floats || (are_bytes() && digits::are_available(kernel))
    }
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

    fn floats(weights: &[f32]) -> Option<&[f32]> {
        Some(weights)
    }
}

impl Weight for bf16 {
    type Packed = Self;
    const IS_UNPACKED: bool = false;

    fn factors(_weights: &[bf16], _outputs: usize) -> Option<Vec<f32>> {
        None
    }

    fn pack(self, _factor: f32) -> bf16 {
        self
    }

    fn bf16(weights: &[bf16]) -> Option<&[bf16]> {
        Some(weights)
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

    fn bytes(weights: &[i8]) -> Option<&[i8]> {
        Some(weights)
    }
}

thread_local! {
    /// A panel's weights as floats, for the tiles after the first: 256 KiB for
    /// imagegpt-small on AVX-512. The second level of the cache of CPUs with
    /// AVX-512 has room for that.
    static UNPACKED: RefCell<AlignedScratch> = const { RefCell::new(AlignedScratch::new()) };
}

/// Weights, scales and bias of a product.
#[derive(Clone, Copy, Debug)]
pub struct DenseWeights<'a, W> {
    /// Weights, `(inputs, outputs)`.
    pub weights: &'a [W],
    /// Factors of the outputs' sums, `(outputs)`. `None` means ones.
    pub scales: Option<&'a [f32]>,
    /// Numbers that are added to every row, `(outputs)`.
    pub bias: Option<&'a [f32]>,
}

/// Packed weights of a product: panels of a few columns, made of strips one
/// after the other. A strip has a row per input, and a row has a number per
/// column of the strip. Columns that the last panel has too many are zero.
#[derive(Debug)]
pub(super) struct Panels<W: Weight> {
    inputs: usize,
    outputs: usize,
    kernel: Kernel,
    packed: Packed<W>,
    /// One scale for each column of the panels.
    scales: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Packed<W: Weight> {
    Floats(LargePages<W::Packed>),
    /// A strip has [`digits::LANES`] columns. A row of the strip holds each
    /// column's weights of a whole group of inputs, all with 128 added.
    Bytes(LargePages<u8>),
}

impl<W: Weight> Packed<W> {
    /// Returns the number of columns of a panel.
    fn width(&self, kernel: Kernel) -> usize {
        match self {
            Self::Floats(_) => panel_width(kernel),
            Self::Bytes(_) => digit_tile::WIDTH,
        }
    }
}

/// Rows of a product's input and output. A stride is the number of floats from
/// a row to the next row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) n: usize,
    /// Input for panels of floats; other panels do not read it.
    pub(super) input: *const f32,
    pub(super) input_stride: usize,
    /// The same rows rounded, for panels of bytes; other panels do not read
    /// them.
    pub(super) digits: DigitRows,
    /// Output, with room for whole panels in each row.
    pub(super) output: *mut f32,
    pub(super) output_stride: usize,
}

/// Treatment of a sum when it is written.
#[derive(Clone, Copy, Debug)]
pub(in crate::kernels) enum Finish {
    Set,
    /// The sum is added to the output that is there.
    Add,
    Activate(Activation),
}

/// Cuts rows into tiles of up to `most` rows. Returns each tile's first row and
/// number of rows.
fn tiles(n_rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut row = 0;
    std::iter::from_fn(move || {
        let n = tile_of(n_rows - row, most);
        let tile = (n > 0).then_some((row, n));
        row += n;
        tile
    })
}

/// Returns the number of floats in a panel's row: as many vectors as give the
/// CPU enough sums to work on while one is added to, and as there are registers
/// for.
pub(super) fn panel_width(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable => 8,
        Kernel::Avx2 => 24,
        _ => 32,
    }
}

/// Returns the number of numbers in a strip's row, as [`tile`] reads them.
fn strip_width<N: Number>(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable | Kernel::Avx2 => panel_width(kernel),
        _ if N::IN_STRIPS => LANES_MAX,
        _ => panel_width(kernel),
    }
}

/// Width of the widest panel of any kernel.
pub(super) const PANEL_WIDTH_MAX: usize = 32;
const _: () = assert!(digit_tile::WIDTH <= PANEL_WIDTH_MAX);

/// Returns the most rows that are computed together: as many as there are
/// registers for.
fn tile_rows(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable | Kernel::Avx2 => 4,
        _ => 8,
    }
}

/// Pads floats with zeros, to one for each column of whole panels.
pub(in crate::kernels) fn padded(
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

/// Returns the bytes of `columns` columns.
fn bytes_len(inputs: usize, columns: usize) -> usize {
    inputs.next_multiple_of(digits::GROUP) * columns
}

/// Packs weights to be multiplied with floats, and returns their
/// [`Weight::factors`].
fn pack_floats<W: Weight>(
    weights: &[W],
    [inputs, outputs]: [usize; 2],
    kernel: Kernel,
) -> Result<(Packed<W>, Option<Vec<f32>>), LayersError> {
    let factors = W::factors(weights, outputs);
    let factor = |column: usize| factors.as_ref().map_or(1.0, |factors| factors[column]);
    let columns = outputs.next_multiple_of(panel_width(kernel));
    let mut pages = LargePages::<W::Packed>::zeroed(size(1, inputs, columns)?)?;
    let strip_width = strip_width::<W::Packed>(kernel);
    for (strip, rows) in pages
        .numbers_mut()
        .chunks_exact_mut(inputs * strip_width)
        .enumerate()
    {
        let first = outputs.min(strip * strip_width);
        let n_columns = strip_width.min(outputs - first);
        let weights = weights.chunks_exact(outputs);
        for (row, weights) in rows.chunks_exact_mut(strip_width).zip(weights) {
            let columns = row.iter_mut().zip(first..first + n_columns);
            for (packed, column) in columns {
                *packed = weights[column].pack(factor(column));
            }
        }
    }
    Ok((Packed::Floats(pages), factors))
}

/// Packs weights to be multiplied with digits.
fn pack_bytes<W: Weight>(
    weights: &[W],
    [inputs, outputs]: [usize; 2],
) -> Result<Packed<W>, LayersError> {
    let weights = W::bytes(weights).ok_or(LayersError::Digits(inputs))?;
    let columns = outputs.next_multiple_of(digit_tile::WIDTH);
    size(1, inputs.next_multiple_of(digits::GROUP), columns)?;
    let mut pages = LargePages::<u8>::zeroed(bytes_len(inputs, columns))?;
    let strips = pages
        .numbers_mut()
        .chunks_exact_mut(bytes_len(inputs, digits::LANES));
    for (strip, lines) in strips.enumerate() {
        let first = strip * digits::LANES;
        let groups = lines.chunks_exact_mut(digits::LINE);
        for (group, line) in groups.enumerate() {
            for (at, byte) in line.iter_mut().enumerate() {
                let column = first + at / digits::GROUP;
                let input = group * digits::GROUP + at % digits::GROUP;
                // A column too many gives zero, as in floats, and an input too
                // many has digits of zero.
                let is_one = input < inputs && column < outputs;
                let weight = if is_one {
                    weights[input * outputs + column]
                } else {
                    0
                };
                *byte = weight.cast_unsigned() ^ 0x80;
            }
        }
    }
    Ok(Packed::Bytes(pages))
}

impl<W: Weight> Panels<W> {
    /// Packs weights for a kernel. The kernel and its products of this kind
    /// ([`RowsAs::are_available`]) must be available.
    ///
    /// # Errors
    /// If the sizes do not fit, or memory does not suffice.
    pub(super) fn pack(
        dense: &DenseWeights<'_, W>,
        [inputs, outputs]: [usize; 2],
        kernel: Kernel,
        rows_as: RowsAs,
    ) -> Result<Self, LayersError> {
        check("weights", dense.weights.len(), size(1, inputs, outputs)?)?;
        let (packed, factors) = match rows_as {
            RowsAs::Floats => pack_floats(dense.weights, [inputs, outputs], kernel)?,
            RowsAs::Digits => (pack_bytes(dense.weights, [inputs, outputs])?, None),
        };
        let width = packed.width(kernel);
        if outputs.div_ceil(width) > TASKS_MAX {
            return Err(LayersError::TooLarge {
                rows: 1,
                inputs,
                outputs,
            });
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
            packed,
            scales: padded("scales", scales.as_deref(), outputs, width)?,
            bias: padded("bias", dense.bias, outputs, width)?,
        })
    }

    pub(super) fn len(&self) -> usize {
        self.outputs.div_ceil(self.packed.width(self.kernel))
    }

    /// Returns the address at which a panel begins.
    ///
    /// # Panics
    /// If there is no panel `idx`.
    pub(super) fn panel(&self, idx: usize) -> *const u8 {
        let width = self.packed.width(self.kernel);
        match &self.packed {
            Packed::Floats(pages) => {
                let len = self.inputs * width;
                pages.numbers()[idx * len..][..len].as_ptr().cast()
            }
            Packed::Bytes(pages) => {
                let len = bytes_len(self.inputs, width);
                pages.numbers()[idx * len..][..len].as_ptr()
            }
        }
    }

    /// Computes the columns of panel `idx` in all rows, and prefetches the
    /// memory at `next`, which need not be valid.
    ///
    /// # Safety
    /// The kernel and its products are available and `idx` is below
    /// [`Panels::len`]; there are `rows.n` rows, with room for whole panels;
    /// the rows that the panel reads, floats or digits, have all inputs, and
    /// until this function returns nobody writes them; and nobody else has
    /// these columns of the output.
    pub(super) unsafe fn compute(&self, idx: usize, rows: Rows, finish: Finish, next: *const u8) {
        let first = idx * self.packed.width(self.kernel);
        let panel = self.panel(idx);
        let from =
            |floats: &Option<Vec<f32>>| floats.as_ref().map(|floats| floats[first..].as_ptr());
        let ending = TileEnding {
            scales: from(&self.scales),
            bias: from(&self.bias),
            output: rows.output.wrapping_add(first),
            output_stride: rows.output_stride,
            finish,
        };
        // SAFETY: the caller vouches for all of it.
        unsafe {
            match self.packed {
                Packed::Floats(_) => self.compute_floats(panel.cast(), rows, ending, next),
                Packed::Bytes(_) => self.compute_bytes(panel, rows, ending, next),
            }
        }
    }

    /// Computes the columns of a panel of floats.
    ///
    /// # Safety
    /// The contract of [`Panels::compute`] holds, with the panel given.
    unsafe fn compute_floats(
        &self,
        panel: *const W::Packed,
        rows: Rows,
        ending: TileEnding,
        next: *const u8,
    ) {
        let width = panel_width(self.kernel);
        let most = tile_rows(self.kernel);
        let n_tiles = rows.n.div_ceil(most);
        UNPACKED.with_borrow_mut(|unpacked| {
            let keeps = W::IS_UNPACKED && tile_of(rows.n, most) < rows.n;
            let len = if keeps { self.inputs * width } else { 0 };
            let [floats] = unpacked.split([len]);
            let floats = floats.as_mut_ptr();
            for (row, n) in tiles(rows.n, most) {
                let size = size_of::<W::Packed>();
                let unpack = (keeps && row == 0).then_some(floats);
                // SAFETY: the caller vouches for the rows, of which these are
                // some, and for the instructions; the panel is there, and so
                // are its floats once the first tile has written them.
                unsafe {
                    let tile = Tile {
                        rows: rows.input.add(row * rows.input_stride),
                        row_stride: rows.input_stride,
                        inputs: self.inputs,
                        panel,
                        unpack,
                        ahead: Ahead::of(n_tiles, row / most, self.inputs, width, size, next),
                        ending: ending.at_row(row),
                    };
                    if keeps && row > 0 {
                        self.run(&tile.over(floats.cast_const()), n);
                    } else {
                        self.run(&tile, n);
                    }
                }
            }
        });
    }

    /// Computes the columns of a panel of bytes.
    ///
    /// # Safety
    /// The contract of [`Panels::compute`] holds, with the panel given.
    unsafe fn compute_bytes(
        &self,
        panel: *const u8,
        rows: Rows,
        ending: TileEnding,
        next: *const u8,
    ) {
        for (row, n) in tiles(rows.n, digit_tile::ROWS_MAX) {
            let tile = DigitTile {
                rows: DigitRows {
                    start: rows.digits.row(row),
                    ..rows.digits
                },
                n_groups: self.inputs.div_ceil(digits::GROUP),
                panel,
                // The tiles after the first find the panel in the cache.
                next: (row == 0).then_some(next),
                ending: ending.at_row(row),
            };
            // SAFETY: the caller vouches for the rows, of which these are some,
            // and for the instructions; the panel is there.
            unsafe {
                match self.kernel {
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => digit_tile::avx512(&tile, n),
                    _ => tile.compute_rows::<digits::Plain>(n),
                }
            }
        }
    }

    /// Computes a tile with the kernel's vectors.
    ///
    /// # Safety
    /// The contract of [`Tile::compute_rows`] holds, with the kernel's vectors.
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
