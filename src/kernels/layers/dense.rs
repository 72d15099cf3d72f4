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

    /// The weights, where they are of 8 bits.
    fn bytes(weights: &[Self]) -> Option<&[i8]>;
}

/// What a row's numbers are while they are multiplied with weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowsAs {
    /// As they are.
    Floats,
    /// Rounded to 24 bits; only with weights of 8 bits.
    Digits,
}

impl RowsAs {
    pub const ALL: [Self; 2] = [Self::Floats, Self::Digits];

    /// What is fastest with such weights.
    #[must_use]
    pub fn fastest<W: Weight>(kernel: Kernel, inputs: usize) -> Self {
        let digits = Self::Digits.are_available::<W>(kernel, inputs);
        if digits && kernel == Kernel::Avx512 {
            Self::Digits
        } else {
            Self::Floats
        }
    }

    /// Whether a kernel that is available has such products of so many inputs.
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

    fn bytes(_weights: &[f32]) -> Option<&[i8]> {
        None
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
    /// imagegpt-small on AVX-512, which the second level of the cache of such CPUs
    /// has room for.
    static UNPACKED: RefCell<AlignedScratch> = const { RefCell::new(AlignedScratch::new()) };
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
    packed: Packed<W>,
    /// One for each column of the panels.
    scales: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

#[derive(Debug)]
enum Packed<W: Weight> {
    Floats(LargePages<W::Packed>),
    /// A strip has [`digits::LANES`] columns, and in a row of it each column's
    /// weights of a whole group of inputs, all with 128 more.
    Bytes(LargePages<u8>),
}

impl<W: Weight> Packed<W> {
    /// Columns of a panel.
    fn width(&self, kernel: Kernel) -> usize {
        match self {
            Self::Floats(_) => panel_width(kernel),
            Self::Bytes(_) => digit_tile::WIDTH,
        }
    }
}

/// Rows of a product's input and output; each so many floats after the one
/// before.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) n: usize,
    /// For panels of floats; others do not look at it.
    pub(super) input: *const f32,
    pub(super) input_stride: usize,
    /// The same rows rounded, for panels of bytes; others do not look at it.
    pub(super) digits: DigitRows,
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

/// Rows cut into tiles of up to so many: the first of each, and how many.
fn tiles(n_rows: usize, most: usize) -> impl Iterator<Item = (usize, usize)> {
    let mut row = 0;
    std::iter::from_fn(move || {
        let n = tile_of(n_rows - row, most);
        let tile = (n > 0).then_some((row, n));
        row += n;
        tile
    })
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
const _: () = assert!(digit_tile::WIDTH <= PANEL_WIDTH_MAX);

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

/// Bytes of so many columns.
fn bytes_len(inputs: usize, columns: usize) -> usize {
    inputs.next_multiple_of(digits::GROUP) * columns
}

/// Weights as they are multiplied with floats, and what [`Weight::factors`] are.
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

/// Weights as they are multiplied with digits.
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
                // A column too many comes to zero, as elsewhere, and an input too
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
    /// Puts weights in order for a kernel, which must be available, and with it such
    /// products ([`RowsAs::are_available`]).
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

    /// Where a panel begins.
    ///
    /// # Panics
    /// If there is none of this number.
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

    /// Computes the columns of panel `idx` in all rows, and asks for what lies at
    /// `next`, which need not be valid.
    ///
    /// # Safety
    /// The kernel and its products are available and `idx` below [`Panels::len`];
    /// `rows` are so many, with room for whole panels; those that the panel takes,
    /// floats or digits, have all inputs, and until this returns nobody writes them;
    /// and nobody else has these columns of the output.
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

    /// # Safety
    /// As [`Panels::compute`], with that panel.
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

    /// # Safety
    /// As [`Panels::compute`], with that panel.
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
                // Those after the first find it in the cache.
                next: (row == 0).then_some(next),
                ending: ending.at_row(row),
            };
            // SAFETY: the caller vouches for the rows, of which these are some, and
            // for the instructions; the panel is there.
            unsafe {
                match self.kernel {
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => digit_tile::avx512(&tile, n),
                    _ => tile.compute_rows::<digits::Plain>(n),
                }
            }
        }
    }

    /// # Safety
    /// As [`Tile::compute_rows`], with the kernel's vectors.
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
