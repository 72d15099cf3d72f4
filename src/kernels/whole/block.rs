//! The way of a block of rows between two attentions.
#![expect(
    unsafe_code,
    reason = "reads and writes rows through raw pointers, which threads share"
)]

use std::cell::RefCell;

use super::panels::{PanelPages, Panels, Room, Rows};
use super::round::RoundedRows;
use super::tile::{PANEL_WIDTH_MAX, PART_BYTES, RowHead};
use super::{BLOCK_ROWS_MAX, CHUNK, ImageKernels, ImagesRun, MeansOf, Products, TILE_ROWS};
use crate::kernels::layers::{
    DenseWeights, Finish, LayerWeights, LayersError, Sizes, Weight, check, norm_weights, pointwise,
    size, stride,
};
use crate::kernels::vector::scratch::AlignedScratch;

/// Columns between expansion and contraction that are computed together: with
/// all of them a block would not stay in the cache. Whole numbers are rounded
/// under a factor for each of these parts of a row.
const INNER_COLUMNS: usize = 512;

/// Packed weights of one layer.
#[derive(Debug)]
pub(super) struct LayerOfImages {
    /// Weights of the norm, padded with zeros to whole vectors. The same holds
    /// for `inner_norm`.
    attention_norm: Vec<f32>,
    attention_scale: f32,
    /// Memory of all panels.
    pages: PanelPages,
    qkv: Panels,
    projection: Panels,
    inner_norm: Vec<f32>,
    /// Expansion to, and contraction from, some of the inner columns.
    inner: Vec<[Panels; 2]>,
}

impl LayerOfImages {
    /// # Errors
    /// The errors of [`Panels::pack`].
    pub(super) fn pack<W: Weight>(
        sizes: Sizes,
        layer: &LayerWeights<'_, W>,
        kernels: ImageKernels,
    ) -> Result<Self, LayersError> {
        let Sizes {
            width, inner_width, ..
        } = sizes;
        let all = size(1, width, inner_width)?;
        check("weights", layer.expand.weights.len(), all)?;
        check("weights", layer.contract.weights.len(), all)?;
        let qkv_width = size(1, 3, width)?;
        let parts = || {
            (0..inner_width)
                .step_by(INNER_COLUMNS)
                .map(|first| (first, INNER_COLUMNS.min(inner_width - first)))
        };
        let mut products = vec![[width, qkv_width], [width, width]];
        products.extend(parts().flat_map(|(_, n)| [[width, n], [n, width]]));
        let mut pages = PanelPages::new(&products, kernels)?;
        // In the order in which they are read.
        let projection = Panels::pack(&layer.projection, [width, width], kernels, &mut pages)?;
        let mut inner = Vec::new();
        for (first, n) in parts() {
            let columns = Columns::of(&layer.expand, inner_width, first, n)?;
            let rows = DenseWeights {
                weights: &layer.contract.weights[first * width..][..n * width],
                // The first part adds the bias.
                bias: layer.contract.bias.filter(|_| first == 0),
                ..layer.contract
            };
            inner.push([
                Panels::pack(&columns.weights(), [width, n], kernels, &mut pages)?,
                Panels::pack(&rows, [n, width], kernels, &mut pages)?,
            ]);
        }
        let qkv = Panels::pack(&layer.qkv, [width, qkv_width], kernels, &mut pages)?;
        Ok(Self {
            attention_norm: norm_weights(layer.attention_norm, width)?,
            attention_scale: layer.attention_scale,
            pages,
            qkv,
            projection,
            inner_norm: norm_weights(layer.inner_norm, width)?,
            inner,
        })
    }

    pub(super) fn attention_scale(&self) -> f32 {
        self.attention_scale
    }
}

/// Some columns of a product.
struct Columns<W> {
    weights: Vec<W>,
    scales: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
}

impl<W: Weight> Columns<W> {
    /// Copies `n` of the `outputs` columns of a product.
    fn of(
        dense: &DenseWeights<'_, W>,
        outputs: usize,
        first: usize,
        n: usize,
    ) -> Result<Self, LayersError> {
        let part = |name, floats: Option<&[f32]>| -> Result<_, LayersError> {
            floats
                .map(|floats| {
                    check(name, floats.len(), outputs)?;
                    Ok(floats[first..][..n].to_vec())
                })
                .transpose()
        };
        let rows = dense.weights.chunks_exact(outputs);
        Ok(Self {
            weights: rows.flat_map(|row| &row[first..][..n]).copied().collect(),
            scales: part("scales", dense.scales)?,
            bias: part("bias", dense.bias)?,
        })
    }

    fn weights(&self) -> DenseWeights<'_, W> {
        DenseWeights {
            weights: &self.weights,
            scales: self.scales.as_deref(),
            bias: self.bias.as_deref(),
        }
    }
}

thread_local! {
    /// Rows of a block between its products: 350 KiB for imagegpt-small.
    static BLOCK: RefCell<AlignedScratch> = const { RefCell::new(AlignedScratch::new()) };
}

/// Rows that follow each other.
#[derive(Clone, Copy, Debug)]
struct Place {
    floats: *mut f32,
    stride: usize,
}

/// Places of a thread.
#[derive(Clone, Copy, Debug)]
struct Places {
    normed: Place,
    inner: Place,
    room: Room,
}

/// Rows of one image that follow each other.
#[derive(Debug)]
pub(super) struct Block<'a> {
    run: &'a ImagesRun<'a>,
    image: usize,
    first_position: usize,
    n_rows: usize,
    /// First row among those of all images.
    first_row: usize,
}

impl<'a> Block<'a> {
    pub(super) fn of(run: &'a ImagesRun<'a>, idx: usize) -> Self {
        let (image, first_position, n_rows) = run.blocks.block(idx);
        debug_assert!(n_rows <= BLOCK_ROWS_MAX);
        Self {
            run,
            image,
            first_position,
            n_rows,
            first_row: image * run.blocks.positions + first_position,
        }
    }

    /// Takes the block from the attention of layer `idx - 1`, or the input, to
    /// that of layer `idx`, or the output.
    ///
    /// # Safety
    /// The block is this thread's, and what comes before is over.
    pub(super) unsafe fn run(&self, idx: usize) {
        let layers = self.run.layers;
        let Sizes {
            width, inner_width, ..
        } = layers.sizes;
        let n = self.n_rows;
        // Tiles of the matrix unit have whole rows.
        let n_padded = n.next_multiple_of(TILE_ROWS);
        let inner_width = inner_width.min(INNER_COLUMNS);
        let [one, inner] = [width, inner_width].map(stride);
        // Rounded numbers take at most half of the room of floats.
        let (rounded, n_heads) = match layers.kernels.products {
            Products::Floats => (0, 0),
            _ => (stride(width.max(inner_width).div_ceil(2)), n),
        };
        let unpacked = match layers.kernels.products {
            Products::Words => PART_BYTES,
            Products::Floats | Products::Bf16 | Products::Bytes => 0,
        };
        BLOCK.with_borrow_mut(|scratch| {
            let [normed, inner_rows, rounded_rows, heads, sums, unpacked] = scratch.split([
                n * one,
                n * inner,
                n_padded * rounded,
                n_heads * size_of::<RowHead>() / size_of::<f32>(),
                n_padded * PANEL_WIDTH_MAX,
                unpacked / size_of::<f32>(),
            ]);
            let places = Places {
                normed: Place {
                    floats: normed.as_mut_ptr(),
                    stride: one,
                },
                inner: Place {
                    floats: inner_rows.as_mut_ptr(),
                    stride: inner,
                },
                room: Room {
                    rounded: RoundedRows {
                        start: rounded_rows.as_mut_ptr().cast(),
                        stride: rounded,
                        heads: heads.as_mut_ptr().cast(),
                    },
                    sums: sums.as_mut_ptr(),
                    unpacked: unpacked.as_mut_ptr().cast(),
                },
            };
            // SAFETY: the caller vouches for the block and the order; the places
            // have as many rows, with room for the widest.
            unsafe {
                match idx.checked_sub(1) {
                    None => self.copy_in(),
                    Some(before) => self.end_layer(&layers.packed[before].weights, places),
                }
                match layers.packed.get(idx) {
                    Some(layer) => self.begin_layer(&layer.weights, idx, places),
                    None => self.end(places),
                }
            }
        });
    }

    /// Returns the block's rows of the stream.
    fn stream(&self) -> Place {
        let stride = self.run.stream_stride;
        Place {
            floats: self.run.stream.wrapping_add(self.first_row * stride),
            stride,
        }
    }

    /// Copies the input to the stream.
    ///
    /// # Safety
    /// The contract of [`Block::run`] holds.
    unsafe fn copy_in(&self) {
        let width = self.run.layers.sizes.width;
        let stream = self.stream();
        let input = &self.run.input[self.first_row * width..][..self.n_rows * width];
        for (row, from) in input.chunks_exact(width).enumerate() {
            // SAFETY: the row is this thread's, a stride long.
            let to = unsafe {
                let to = stream.floats.add(row * stream.stride);
                std::slice::from_raw_parts_mut(to, stream.stride)
            };
            let (to, beyond) = to.split_at_mut(width);
            to.copy_from_slice(from);
            // Norms read whole vectors.
            beyond.fill(0.0);
        }
    }

    /// Does the parts of a layer after its attention.
    ///
    /// # Safety
    /// The contract of [`Block::run`] holds, and the places are this thread's.
    unsafe fn end_layer(&self, layer: &LayerOfImages, places: Places) {
        let Sizes {
            width, activation, ..
        } = self.run.layers.sizes;
        let stream = self.stream();
        let attended = Place {
            floats: self.run.attended.wrapping_add(self.first_row * width),
            stride: width,
        };
        // SAFETY: the caller vouches for all of it.
        unsafe {
            self.product(
                layer,
                &layer.projection,
                attended,
                stream,
                Finish::Add,
                places,
            );
            self.norm(&layer.inner_norm, places.normed);
            for [expand, contract] in &layer.inner {
                let activate = Finish::Activate(activation);
                self.product(layer, expand, places.normed, places.inner, activate, places);
                self.product(layer, contract, places.inner, stream, Finish::Add, places);
            }
        }
    }

    /// Does the parts of layer `idx` before its attention.
    ///
    /// # Safety
    /// The contract of [`Block::end_layer`] holds.
    unsafe fn begin_layer(&self, layer: &LayerOfImages, idx: usize, places: Places) {
        let stride = 3 * self.run.layers.sizes.width;
        let qkv = Place {
            floats: self.run.qkv.wrapping_add(self.first_row * stride),
            stride,
        };
        // SAFETY: the caller vouches for all of it.
        unsafe {
            self.norm(&layer.attention_norm, places.normed);
            let of = match self.run.means_of {
                MeansOf::Normed => places.normed,
                MeansOf::Raw => self.stream(),
            };
            self.sum(of, idx);
            self.product(layer, &layer.qkv, places.normed, qkv, Finish::Set, places);
        }
    }

    /// Writes the output.
    ///
    /// # Safety
    /// The contract of [`Block::end_layer`] holds.
    unsafe fn end(&self, places: Places) {
        let layers = self.run.layers;
        let width = layers.sizes.width;
        // SAFETY: the caller vouches for all of it.
        unsafe {
            let last = match &layers.final_norm {
                Some(weights) => {
                    self.norm(weights, places.normed);
                    places.normed
                }
                None => self.stream(),
            };
            self.sum(last, layers.packed.len());
            let Some(output) = self.run.output else {
                return;
            };
            for row in 0..self.n_rows {
                let to = output.add((self.first_row + row) * width);
                to.copy_from_nonoverlapping(last.floats.add(row * last.stride), width);
            }
        }
    }

    /// Norms the rows of the stream.
    ///
    /// # Safety
    /// The contract of [`Block::end_layer`] holds.
    unsafe fn norm(&self, weights: &[f32], to: Place) {
        let layers = self.run.layers;
        let Sizes { width, epsilon, .. } = layers.sizes;
        let from = self.stream();
        for row in 0..self.n_rows {
            // SAFETY: the row is this thread's, and has room for whole vectors;
            // `pack` has checked the kernel.
            unsafe {
                pointwise::norm(
                    layers.kernels.products_on,
                    from.floats.add(row * from.stride),
                    weights.as_ptr(),
                    to.floats.add(row * to.stride),
                    width,
                    epsilon,
                );
            }
        }
    }

    /// Adds up the rows of each chunk, if means are asked for.
    ///
    /// # Safety
    /// The contract of [`Block::end_layer`] holds, and no other thread has these
    /// chunks, in front of layer `stream`.
    unsafe fn sum(&self, rows: Place, stream: usize) {
        if self.run.means.is_none() {
            return;
        }
        let width = self.run.layers.sizes.width;
        for first in (0..self.n_rows).step_by(CHUNK) {
            let chunk = (self.first_position + first) / CHUNK;
            let to = self.run.sums(stream, self.image, chunk);
            // SAFETY: the chunk is this thread's, as are the rows.
            unsafe {
                let to = std::slice::from_raw_parts_mut(to, width);
                to.fill(0.0);
                for row in first..self.n_rows.min(first + CHUNK) {
                    let from = rows.floats.add(row * rows.stride);
                    let from = std::slice::from_raw_parts(from, width);
                    for (to, from) in to.iter_mut().zip(from) {
                        *to += from;
                    }
                }
            }
        }
    }

    /// Computes a product of the layer with the block's rows.
    ///
    /// # Safety
    /// The contract of [`Block::end_layer`] holds, for input and output of the
    /// product's sizes.
    unsafe fn product(
        &self,
        layer: &LayerOfImages,
        panels: &Panels,
        from: Place,
        to: Place,
        finish: Finish,
        places: Places,
    ) {
        let rows = Rows {
            n: self.n_rows,
            input: from.floats,
            input_stride: from.stride,
            output: to.floats,
            output_stride: to.stride,
            finish,
        };
        // SAFETY: `pack` has checked the kernels; the caller vouches for the
        // rows and the places.
        unsafe { panels.compute(&layer.pages, rows, places.room) }
    }
}
