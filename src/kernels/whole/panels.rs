//! Packed weights of products of many rows.
#![expect(
    unsafe_code,
    reason = "threads write disjoint rows of one output, through raw pointers"
)]

use super::plain::{PlainBytes, PlainWords};
use super::round::{self, EXCESS, RoundedRows};
use super::tile::{self, Floats, PANEL_WIDTH_MAX, Product, STEP};
use super::{ImageKernels, Products};
use crate::kernels::attention::Kernel;
use crate::kernels::layers::pages::LargePages;
use crate::kernels::layers::{DenseWeights, Finish, LayersError, Weight, check, padded, size};
use crate::kernels::vector::Portable;

/// Weights of a product: panels of a few columns, one after the other. A panel
/// has a row per step, and the row has a column's weights of that step side by
/// side, as the bytes of one number. Columns that the last panel has too many,
/// and inputs that the last step has too many, are zero.
#[derive(Debug)]
pub(super) struct Panels {
    inputs: usize,
    outputs: usize,
    kernels: ImageKernels,
    packed: LargePages<u32>,
    /// One scale for each column of the panels.
    scales: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    /// Largest whole number to which rows are rounded.
    pub(super) limit: i16,
}

/// Returns the index of a step's weight, if there is one.
type Place<'a> = dyn Fn(usize) -> Option<usize> + 'a;

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
    /// Rows that are rounded, if they are.
    pub(super) rounded: RoundedRows,
    /// Sums of all rows with one panel.
    pub(super) sums: *mut f32,
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
    /// Packs the weights of some of a product's inputs. The kernels must be
    /// available.
    ///
    /// # Errors
    /// If the sizes do not fit, sums would overflow, or memory does not suffice.
    pub(super) fn pack<W: Weight>(
        dense: &DenseWeights<'_, W>,
        [inputs, outputs]: [usize; 2],
        kernels: ImageKernels,
    ) -> Result<Self, LayersError> {
        check("weights", dense.weights.len(), size(1, inputs, outputs)?)?;
        let width = panel_width(kernels.products_on);
        let columns = outputs.next_multiple_of(width);
        let per_step = kernels.products.per_step();
        let n_steps = inputs.div_ceil(per_step);
        let mut packed = LargePages::<u32>::zeroed(size(1, n_steps, columns)?)?;
        let floats = W::floats(dense.weights);
        let bytes = W::bytes(dense.weights);
        let mut limit = 0;
        // Returns the bytes of a step, from the places of its weights.
        let unit: &dyn Fn(&Place) -> [u8; STEP] = match (kernels.products, floats, bytes) {
            (Products::Floats, Some(floats), _) => {
                &|place| place(0).map_or([0; STEP], |at| floats[at].to_ne_bytes())
            }
            (Products::Words, _, Some(bytes)) => {
                limit = round::limit_of_words(bytes, outputs)?;
                &|place| {
                    let word = |i| place(i).map_or(0, |at| i16::from(bytes[at])).to_ne_bytes();
                    let [[a, b], [c, d]] = [word(0), word(1)];
                    [a, b, c, d]
                }
            }
            (Products::Bytes, _, Some(bytes)) => {
                limit = round::limit_of_bytes(inputs)?;
                &|place| {
                    [0, 1, 2, 3].map(|i| {
                        let weight = place(i).map_or(0, |at| bytes[at]);
                        weight.cast_unsigned().wrapping_add(EXCESS)
                    })
                }
            }
            _ => return Err(LayersError::Digits(inputs)),
        };
        let panels = packed.numbers_mut().chunks_exact_mut(n_steps * width);
        for (panel, rows) in panels.enumerate() {
            for (step, row) in rows.chunks_exact_mut(width).enumerate() {
                for (lane, packed) in row.iter_mut().enumerate() {
                    let column = panel * width + lane;
                    let bytes = unit(&|i| {
                        let input = step * per_step + i;
                        let is_one = input < inputs && column < outputs;
                        is_one.then_some(input * outputs + column)
                    });
                    *packed = u32::from_ne_bytes(bytes);
                }
            }
        }
        Ok(Self {
            inputs,
            outputs,
            kernels,
            packed,
            scales: padded("scales", dense.scales, outputs, width)?,
            bias: padded("bias", dense.bias, outputs, width)?,
            limit,
        })
    }

    /// Computes the product of some rows.
    ///
    /// # Safety
    /// The kernels are available; there are `rows.n` rows of `inputs` and
    /// `outputs` floats, nobody writes the input until this function returns,
    /// and nobody else has the output; the room is this thread's, with as many
    /// rows.
    pub(super) unsafe fn compute(&self, rows: Rows, room: Room) {
        let as_floats = Product {
            n_rows: rows.n,
            rows: rows.input.cast(),
            row_stride: rows.input_stride * STEP,
            heads: None,
            n_steps: self.inputs.div_ceil(self.kernels.products.per_step()),
            panels: self.packed.numbers().as_ptr().cast(),
            outputs: self.outputs,
            scales: self.scales.as_ref().map(Vec::as_ptr),
            bias: self.bias.as_ref().map(Vec::as_ptr),
            output: rows.output,
            output_stride: rows.output_stride,
            finish: rows.finish,
            sums: room.sums,
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
            heads: Some(room.rounded.heads),
            ..as_floats
        };
        // SAFETY: as above, and the rows have just been rounded.
        unsafe {
            match (self.kernels.products, kernel) {
                #[cfg(target_arch = "x86_64")]
                (Products::Words, Kernel::Avx2) => super::avx2::words(&product),
                #[cfg(target_arch = "x86_64")]
                (Products::Words, Kernel::Avx512) => super::avx512::words(&product),
                (Products::Words, _) => tile::portable::<PlainWords>(&product),
                #[cfg(target_arch = "x86_64")]
                (_, Kernel::Avx512) => super::avx512::bytes(&product),
                _ => tile::portable::<PlainBytes>(&product),
            }
        }
    }
}
