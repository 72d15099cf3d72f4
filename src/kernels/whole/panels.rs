//! Packed weights of products of many rows.
#![expect(
    unsafe_code,
    reason = "threads write disjoint rows of one output, through raw pointers"
)]

use std::ops::Range;

use half::bf16;

use super::plain::{PlainBytes, PlainWords};
use super::round::{self, EXCESS, RoundedRows};
use super::tile::{self, Floats, PANEL_WIDTH_MAX, Pairs, Product, STEP};
use super::{ImageKernels, Products};
use crate::kernels::attention::Kernel;
use crate::kernels::layers::pages::LargePages;
use crate::kernels::layers::{DenseWeights, Finish, LayersError, Weight, check, padded, size};
use crate::kernels::vector::Portable;

/// Bytes of a line of the cache: no vector of weights lies in two.
const LINE_BYTES: usize = 64;

/// Weights of a product: panels of a few columns, one after the other. A panel
/// has a row per step, and the row has a column's weights of that step side by
/// side. Sums of columns that the last panel has too many are never read, and
/// inputs that the last steps have too many are multiplied with zeros.
#[derive(Debug)]
pub(super) struct Panels {
    inputs: usize,
    outputs: usize,
    pub(super) kernels: ImageKernels,
    /// Place in the [`PanelPages`] in which they were packed.
    packed: Range<usize>,
    /// One scale for each column of the panels; below the same.
    scales: Vec<f32>,
    bias: Vec<f32>,
    /// Largest whole number to which rows are rounded.
    pub(super) limit: i16,
}

/// Memory of the panels of several products, one after the other. The panels of
/// one product seldom fill a large page, those of a layer fill some.
#[derive(Debug)]
pub(super) struct PanelPages {
    pages: LargePages<u8>,
    n_taken: usize,
}

impl PanelPages {
    /// Allocates memory for the panels of products with these inputs and outputs.
    ///
    /// # Errors
    /// If the sizes do not fit, or memory does not suffice.
    pub(super) fn new(products: &[[usize; 2]], kernels: ImageKernels) -> Result<Self, LayersError> {
        let mut n_bytes = 0_usize;
        for product in products {
            let failed = LayersError::Memory(n_bytes);
            n_bytes = n_bytes
                .checked_add(n_packed_bytes(*product, kernels)?)
                .ok_or(failed)?;
        }
        Ok(Self {
            pages: LargePages::zeroed(n_bytes)?,
            n_taken: 0,
        })
    }

    /// Takes the next bytes.
    fn take(&mut self, n_bytes: usize) -> Result<Range<usize>, LayersError> {
        let begin = self.n_taken;
        let end = begin + n_bytes;
        check("panels", self.pages.numbers().len().min(end), end)?;
        self.n_taken = end;
        Ok(begin..end)
    }
}

/// Returns the bytes of a product's panels, whole lines of the cache.
fn n_packed_bytes(
    [inputs, outputs]: [usize; 2],
    kernels: ImageKernels,
) -> Result<usize, LayersError> {
    let columns = outputs.next_multiple_of(panel_width(kernels.products_on));
    let n_bytes = size(
        kernels.n_steps(inputs),
        columns,
        kernels.products.packed_bytes(),
    )?;
    Ok(n_bytes.next_multiple_of(LINE_BYTES))
}

/// Weights as they are given, and what they are packed as.
#[derive(Clone, Copy)]
enum Source<'a> {
    Floats(&'a [f32]),
    Bf16(&'a [bf16]),
    Words(&'a [i8]),
    Bytes(&'a [i8]),
}

impl<'a> Source<'a> {
    /// Returns the weights for products of a kind; none if they are of another.
    fn of<W: Weight>(weights: &'a [W], products: Products) -> Option<Self> {
        match products {
            Products::Floats => W::floats(weights).map(Self::Floats),
            Products::Bf16 => W::bf16(weights).map(Self::Bf16),
            Products::Words => W::bytes(weights).map(Self::Words),
            Products::Bytes => W::bytes(weights).map(Self::Bytes),
        }
    }

    /// Packs weights of one input, input `i` of a step, for as many columns.
    fn put(self, weights: Range<usize>, i: usize, step: &mut [u8]) {
        match self {
            Self::Floats(floats) => {
                let step: &mut [f32] = bytemuck::cast_slice_mut(step);
                step.copy_from_slice(&floats[weights]);
            }
            Self::Bf16(halves) => {
                let step: &mut [[bf16; 2]] = bytemuck::cast_slice_mut(step);
                for (to, weight) in step.iter_mut().zip(&halves[weights]) {
                    to[i] = *weight;
                }
            }
            Self::Words(bytes) => {
                let step: &mut [[i8; 2]] = bytemuck::cast_slice_mut(step);
                for (to, weight) in step.iter_mut().zip(&bytes[weights]) {
                    to[i] = *weight;
                }
            }
            Self::Bytes(bytes) => {
                let step: &mut [[u8; 4]] = bytemuck::cast_slice_mut(step);
                for (to, weight) in step.iter_mut().zip(&bytes[weights]) {
                    to[i] = weight.cast_unsigned().wrapping_add(EXCESS);
                }
            }
        }
    }
}

/// Rows of a product's input and output. A stride is the number of floats from
/// a row to the next row.
#[derive(Clone, Copy, Debug)]
pub(super) struct Rows {
    pub(super) n: usize,
    pub(super) input: *const f32,
    pub(super) input_stride: usize,
    pub(super) output: *mut f32,
    pub(super) output_stride: usize,
    pub(super) finish: Finish,
}

/// Memory in which a thread computes products.
#[derive(Clone, Copy, Debug)]
pub(super) struct Room {
    /// Rows that are rounded, if they are: whole steps, and rows of whole tiles,
    /// of 16. The same holds for the sums.
    pub(super) rounded: RoundedRows,
    /// Sums of all rows with one panel.
    pub(super) sums: *mut f32,
    /// Unpacked weights, [`tile::PART_BYTES`], if products unpack any.
    pub(super) unpacked: *mut u8,
}

/// Returns the number of columns of a panel.
pub(super) fn panel_width(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable => 8,
        Kernel::Avx2 => 16,
        _ => PANEL_WIDTH_MAX,
    }
}

impl Panels {
    /// Packs the weights of some of a product's inputs into the next of the
    /// pages. The kernels must be available.
    ///
    /// # Errors
    /// If the sizes do not fit, sums would overflow, or memory does not suffice.
    pub(super) fn pack<W: Weight>(
        dense: &DenseWeights<'_, W>,
        [inputs, outputs]: [usize; 2],
        kernels: ImageKernels,
        pages: &mut PanelPages,
    ) -> Result<Self, LayersError> {
        check("weights", dense.weights.len(), size(1, inputs, outputs)?)?;
        let width = panel_width(kernels.products_on);
        let columns = outputs.next_multiple_of(width);
        let per_step = kernels.products.per_step();
        let n_steps = kernels.n_steps(inputs);
        let packed_bytes = kernels.products.packed_bytes();
        let packed = pages.take(n_packed_bytes([inputs, outputs], kernels)?)?;
        let source =
            Source::of(dense.weights, kernels.products).ok_or(LayersError::Digits(inputs))?;
        let row_bytes = width * packed_bytes;
        let bytes = &mut pages.pages.numbers_mut()[packed.clone()];
        let panels = bytes.chunks_exact_mut(n_steps * row_bytes);
        for (panel, steps) in panels.enumerate() {
            let first = outputs.min(panel * width);
            let n_columns = width.min(outputs - first);
            for input in 0..inputs {
                let step = &mut steps[input / per_step * row_bytes..][..n_columns * packed_bytes];
                let weights = input * outputs + first;
                source.put(weights..weights + n_columns, input % per_step, step);
            }
        }
        let limit = match source {
            Source::Floats(_) | Source::Bf16(_) => 0,
            Source::Words(weights) => round::limit_of_words(weights, outputs)?,
            Source::Bytes(_) => round::limit_of_bytes(inputs)?,
        };
        Ok(Self {
            inputs,
            outputs,
            kernels,
            packed,
            scales: padded("scales", dense.scales, outputs, width)?
                .unwrap_or_else(|| vec![1.0; columns]),
            bias: padded("bias", dense.bias, outputs, width)?.unwrap_or_else(|| vec![0.0; columns]),
            limit,
        })
    }

    /// Computes the product of some rows with the panels in the pages in which
    /// they were packed.
    ///
    /// # Safety
    /// The kernels are available; there are `rows.n` rows of `inputs` and
    /// `outputs` floats, nobody writes the input until this function returns,
    /// and nobody else has the output; the room is this thread's, with as many
    /// rows.
    pub(super) unsafe fn compute(&self, pages: &PanelPages, rows: Rows, room: Room) {
        let as_floats = Product {
            n_rows: rows.n,
            rows: rows.input.cast(),
            row_stride: rows.input_stride * STEP,
            heads: room.rounded.heads,
            n_steps: self.kernels.n_steps(self.inputs),
            panels: pages.pages.numbers()[self.packed.clone()].as_ptr(),
            outputs: self.outputs,
            scales: self.scales.as_ptr(),
            bias: self.bias.as_ptr(),
            output: rows.output,
            output_stride: rows.output_stride,
            finish: rows.finish,
            sums: room.sums,
            unpacked: room.unpacked,
        };
        let kernel = self.kernels.products_on;
        if self.kernels.products == Products::Floats {
            // SAFETY: the caller vouches for the kernel and the rows; the panels
            // have been packed for the kernel.
            unsafe {
                match kernel {
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx2 => super::avx2::floats(&as_floats),
                    #[cfg(target_arch = "x86_64")]
                    Kernel::Avx512 => super::avx512::floats(&as_floats),
                    _ => tile::portable::<Floats<Portable>>(&as_floats),
                }
            }
            return;
        }
        for row in 0..rows.n {
            // SAFETY: the caller vouches for the row, and for room for it.
            unsafe {
                let from = rows.input.add(row * rows.input_stride);
                let from = std::slice::from_raw_parts(from, self.inputs);
                round::round(self.kernels, from, self.limit, room.rounded, row);
            }
        }
        let product = Product {
            rows: room.rounded.start.cast(),
            row_stride: room.rounded.stride * STEP,
            ..as_floats
        };
        // SAFETY: as above, and the rows have just been rounded.
        unsafe {
            match (self.kernels.products, kernel) {
                #[cfg(target_arch = "x86_64")]
                (Products::Bf16, Kernel::Avx2) => super::avx2::bf16(&product),
                #[cfg(target_arch = "x86_64")]
                (Products::Bf16, Kernel::Avx512) => super::avx512::bf16_as_floats(&product),
                #[cfg(target_arch = "x86_64")]
                (Products::Bf16, Kernel::Avx512Bf16) => super::avx512::bf16(&product),
                #[cfg(target_arch = "x86_64")]
                (Products::Bf16, Kernel::Amx) => super::amx::bf16(&product),
                (Products::Bf16, _) => tile::portable::<Pairs<Portable>>(&product),
                #[cfg(target_arch = "x86_64")]
                (Products::Words, Kernel::Avx2) => super::avx2::words(&product),
                #[cfg(target_arch = "x86_64")]
                (Products::Words, Kernel::Avx512) => super::avx512::words(&product),
                (Products::Words, _) => tile::portable::<PlainWords>(&product),
                #[cfg(target_arch = "x86_64")]
                (_, Kernel::Avx512) => super::avx512::bytes(&product),
                #[cfg(target_arch = "x86_64")]
                (_, Kernel::Amx) => super::amx::bytes(&product),
                _ => tile::portable::<PlainBytes>(&product),
            }
        }
    }
}
