//! The innermost part of products: many rows by panels of columns.
//!
//! One loop serves all formats. At each step a row contributes four bytes (one
//! float, two numbers of 16 bits, or four of 8 bits), and so does each column.
//! [`StepProducts`] says what becomes of them. Weights that are kept in fewer bytes
//! are unpacked once for all rows, a part of a panel at a time, to memory that
//! stays in the first level of the cache.
#![expect(
    unsafe_code,
    reason = "reads and writes vectors through raw pointers: the inner loop is nearly the whole cost of an image"
)]
#![expect(
    clippy::inline_always,
    reason = "intrinsics only become instructions inside a function that has them"
)]

use std::marker::PhantomData;

use crate::kernels::layers::pointwise::activate;
use crate::kernels::layers::{Activation, Finish};
use crate::kernels::vector::{Portable, Vector};

/// Bytes of a row, and of a column, that are multiplied in a step.
pub(super) const STEP: usize = 4;

/// Bytes of a panel that all rows pass over before the next bytes: half of the
/// smallest first level of a cache, which also holds the rows of a tile.
pub(super) const PART_BYTES: usize = 16 << 10;

/// Steps that are written out one after the other, with one prefetch for all.
const UNROLLED: usize = 4;

/// Most columns of a panel.
pub(super) const PANEL_WIDTH_MAX: usize = 32;

/// A vector of sums, each of a column.
///
/// # Safety
/// A value may exist only where the CPU has the instructions that its methods
/// use: constructors demand that of their caller. Pointers are to as many bytes
/// as each method names.
pub(super) unsafe trait Sums: Copy {
    /// Floats with the same number of lanes.
    type Floats: Vector;
    /// True if the numbers are whole, so that rows have heads.
    const ARE_WHOLE: bool;

    /// # Safety
    /// The CPU has the instructions.
    unsafe fn zero() -> Self;
    /// Reads sums that [`Sums::store`] wrote.
    /// # Safety
    /// The contract of [`Sums::zero`] holds, and a vector at `from` is readable.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// A vector at `to` is writable.
    unsafe fn store(self, to: *mut f32);
    /// Returns the sums as floats, where sums of whole numbers lack `addend`.
    fn floats(self, addend: i32) -> Self::Floats;
}

// SAFETY: a value proves a vector, whose constructors demand the instructions;
// exactly one vector is touched.
unsafe impl<V: Vector> Sums for V {
    type Floats = V;
    const ARE_WHOLE: bool = false;

    #[inline(always)]
    unsafe fn zero() -> Self {
        // SAFETY: the caller vouches for the instructions.
        unsafe { V::splat(0.0) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller vouches for the instructions and the floats.
        unsafe { <V as Vector>::load(from) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller vouches for the floats.
        unsafe { Vector::store(self, to) }
    }

    #[inline(always)]
    fn floats(self, _addend: i32) -> V {
        self
    }
}

/// Products of a format, with the instructions of their sums.
///
/// # Safety
/// Exactly the bytes are touched that each method names.
pub(super) unsafe trait StepProducts {
    type Sums: Sums;
    /// Weights of a step, for each lane.
    type Weights: Copy;
    /// Inputs of a step, the same in all lanes.
    type Inputs: Copy;
    /// Bytes in which a column's weights of a step are kept.
    const PACKED_BYTES: usize = STEP;

    /// # Safety
    /// The CPU has the instructions, and [`STEP`] bytes for each lane are readable.
    unsafe fn weights(from: *const u8) -> Self::Weights;
    /// Unpacks a step's weights that are kept in fewer bytes than [`STEP`].
    /// # Safety
    /// The CPU has the instructions; for each lane [`StepProducts::PACKED_BYTES`] are
    /// readable and [`STEP`] bytes writable.
    unsafe fn unpack(_from: *const u8, _to: *mut u8) {}
    /// # Safety
    /// The CPU has the instructions, and [`STEP`] bytes are readable.
    unsafe fn inputs(from: *const u8) -> Self::Inputs;
    /// Adds the products of a step.
    /// # Safety
    /// The CPU has the instructions.
    unsafe fn add(sums: Self::Sums, weights: Self::Weights, inputs: Self::Inputs) -> Self::Sums;
}

/// Lanes of the vectors of `M`.
const fn lanes<M: StepProducts>() -> usize {
    <M::Sums as Sums>::Floats::LANES
}

/// Products of floats.
pub(super) struct Floats<V>(PhantomData<V>);

// SAFETY: exactly one vector, or one float, is touched.
unsafe impl<V: Vector> StepProducts for Floats<V> {
    type Sums = V;
    type Weights = V;
    type Inputs = V;

    #[inline(always)]
    unsafe fn weights(from: *const u8) -> V {
        // SAFETY: the caller vouches for the instructions and the floats.
        unsafe { <V as Vector>::load(from.cast()) }
    }

    #[inline(always)]
    unsafe fn inputs(from: *const u8) -> V {
        // SAFETY: the caller vouches for the instructions and one float.
        unsafe { V::splat(from.cast::<f32>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn add(sums: V, weights: V, inputs: V) -> V {
        weights.mul_add(inputs, sums)
    }
}

/// Products of bfloat16, two at a step, in the instructions of floats.
pub(super) struct Pairs<V>(PhantomData<V>);

// SAFETY: as for `Floats`; the bits of a pair are those of a float.
unsafe impl<V: Vector> StepProducts for Pairs<V> {
    type Sums = V;
    type Weights = [V; 2];
    type Inputs = [V; 2];

    #[inline(always)]
    unsafe fn weights(from: *const u8) -> [V; 2] {
        // SAFETY: the caller vouches for the instructions and the pairs.
        unsafe { <V as Vector>::load(from.cast()) }.bf16_pairs()
    }

    #[inline(always)]
    unsafe fn inputs(from: *const u8) -> [V; 2] {
        // SAFETY: the caller vouches for the instructions and one pair.
        unsafe { V::splat(from.cast::<f32>().read_unaligned()) }.bf16_pairs()
    }

    // Products of two numbers with 8 bits are exact, so that it does not matter
    // whether the CPU fuses.
    #[inline(always)]
    unsafe fn add(sums: V, [first, second]: [V; 2], inputs: [V; 2]) -> V {
        first.mul_add(inputs[0], second.mul_add(inputs[1], sums))
    }
}

/// Factor of a row of whole numbers, and what its sums lack.
#[derive(Clone, Copy, Debug, PartialEq)]
#[repr(C)]
pub(super) struct RowHead {
    pub(super) factor: f32,
    pub(super) addend: i32,
}

/// A product of some rows with all panels.
#[derive(Clone, Copy, Debug)]
pub(super) struct Product {
    pub(super) n_rows: usize,
    /// Rows of `n_steps` steps each.
    pub(super) rows: *const u8,
    /// Bytes from a row to the next row.
    pub(super) row_stride: usize,
    /// Heads of the rows; read only if they are whole numbers.
    pub(super) heads: *const RowHead,
    pub(super) n_steps: usize,
    /// Panels of all steps, one after the other.
    pub(super) panels: *const u8,
    pub(super) outputs: usize,
    /// Factors of the columns, and below their addends, for whole panels.
    pub(super) scales: *const f32,
    pub(super) bias: *const f32,
    pub(super) output: *mut f32,
    /// Floats from a row to the next row.
    pub(super) output_stride: usize,
    pub(super) finish: Finish,
    /// Room for the sums of all rows with one panel.
    pub(super) sums: *mut f32,
    /// Room for [`PART_BYTES`] of unpacked weights; not written if the weights are
    /// kept as they are multiplied.
    pub(super) unpacked: *mut u8,
}

/// Computes a product with plain code.
///
/// # Safety
/// The contract of [`Product::compute`] holds.
pub(super) unsafe fn portable<M: StepProducts<Sums: Sums<Floats = Portable>>>(product: &Product) {
    // SAFETY: the caller vouches for all of it.
    unsafe { product.compute::<M, 2, 4>() }
}

/// Returns the rows of the next tile, of `n_left` that are left. Smaller tiles
/// have fewer sums than the CPU can work on at the same time, so a tile is not
/// as high as possible where two of 8 rows take what would leave one of 4.
const fn tile_height(n_left: usize, most: usize) -> usize {
    if most > 8 && n_left >= 8 && n_left != most && n_left < most + 8 {
        8
    } else if n_left >= most {
        most
    } else if n_left >= 4 {
        4
    } else if n_left >= 2 {
        2
    } else {
        1
    }
}

/// Unpacks `n` vectors of weights.
///
/// # Safety
/// The CPU has the instructions of `M`; there are as many packed weights, and room
/// for as many unpacked.
#[inline(always)]
unsafe fn unpack<M: StepProducts>(from: *const u8, n: usize, to: *mut u8) {
    let lanes = lanes::<M>();
    for idx in 0..n {
        // SAFETY: the caller vouches for the vectors.
        unsafe {
            let from = from.add(idx * lanes * M::PACKED_BYTES);
            M::unpack(from, to.add(idx * lanes * STEP));
        }
    }
}

impl Product {
    /// Computes the product with tiles of up to `MOST` rows by `N` vectors.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; rows, heads, panels of `N` vectors,
    /// scales, bias, sums and unpacked weights are as large as their descriptions
    /// say, and nobody writes them, but this thread the latter two; the output has
    /// `outputs` floats in each row, and nobody else has them.
    #[inline(always)]
    pub(super) unsafe fn compute<M: StepProducts, const N: usize, const MOST: usize>(&self) {
        let width = N * lanes::<M>();
        let part = PART_BYTES / (width * STEP);
        let n_tiles = self.n_rows.div_ceil(MOST).max(1);
        let mut weights = self.panels;
        for column in (0..self.outputs).step_by(width) {
            for first in (0..self.n_steps).step_by(part) {
                let n_steps = part.min(self.n_steps - first);
                let bytes = n_steps * width * M::PACKED_BYTES;
                let next = weights.wrapping_add(bytes);
                let mut part = weights;
                if M::PACKED_BYTES < STEP {
                    // SAFETY: the caller vouches for the panels, and for room for
                    // a part.
                    unsafe { unpack::<M>(weights, n_steps * N, self.unpacked) }
                    part = self.unpacked;
                }
                let (mut row, mut idx) = (0, 0);
                while row < self.n_rows {
                    let height = tile_height(self.n_rows - row, MOST);
                    let tile = Tile {
                        rows: self.rows.wrapping_add(row * self.row_stride + first * STEP),
                        row_stride: self.row_stride,
                        n_steps,
                        weights: part,
                        is_first: first == 0,
                        sums: self.sums.wrapping_add(row * width),
                        ahead: next.wrapping_add(bytes / n_tiles * idx),
                        ahead_step: UNROLLED * width * M::PACKED_BYTES / n_tiles,
                    };
                    // SAFETY: the rows, steps and sums are some of those that
                    // the caller vouches for.
                    unsafe { tile.compute_rows::<M, N, MOST>(height) }
                    row += height;
                    idx += 1;
                }
                weights = next;
            }
            // SAFETY: the sums are complete, and the caller vouches for the
            // output.
            unsafe { self.end::<M::Sums, N>(column) }
        }
    }

    /// Scales the sums of the panel that begins at a column, adds the bias,
    /// finishes them and writes them to the output.
    ///
    /// # Safety
    /// The contract of [`Product::compute`] holds, and the sums are complete.
    #[inline(always)]
    pub(super) unsafe fn end<S: Sums, const N: usize>(&self, column: usize) {
        use Activation::{Gelu, GeluNew, QuickGelu, Relu};
        use Finish::{Activate, Add, Set};
        // Each has a loop of its own, since the CPU has no room for a loop that
        // could do all of them several times at the same time.
        // SAFETY: the caller vouches for all of it.
        unsafe {
            match self.finish {
                Set => self.end_rows::<S, N>(column, Set),
                Add => self.end_rows::<S, N>(column, Add),
                Activate(QuickGelu) => self.end_rows::<S, N>(column, Activate(QuickGelu)),
                Activate(Gelu) => self.end_rows::<S, N>(column, Activate(Gelu)),
                Activate(GeluNew) => self.end_rows::<S, N>(column, Activate(GeluNew)),
                Activate(Relu) => self.end_rows::<S, N>(column, Activate(Relu)),
            }
        }
    }

    /// Does the work of [`Product::end`] for one way to finish.
    ///
    /// # Safety
    /// The contract of [`Product::end`] holds.
    #[inline(always)]
    unsafe fn end_rows<S: Sums, const N: usize>(&self, column: usize, finish: Finish) {
        let lanes = S::Floats::LANES;
        let n_columns = self.outputs - column;
        // SAFETY: rows and columns are those that the caller vouches for; scales
        // and bias have whole panels.
        unsafe {
            for row in 0..self.n_rows {
                let head = if S::ARE_WHOLE {
                    *self.heads.add(row)
                } else {
                    RowHead {
                        factor: 1.0,
                        addend: 0,
                    }
                };
                let factor = S::Floats::splat(head.factor);
                for first in (0..n_columns.min(N * lanes)).step_by(lanes) {
                    let sums = S::load(self.sums.add(row * N * lanes + first));
                    let mut sum = sums.floats(head.addend);
                    if S::ARE_WHOLE {
                        sum = sum.mul(factor);
                    }
                    sum = sum.mul(<S::Floats as Vector>::load(self.scales.add(column + first)));
                    sum = sum.add(<S::Floats as Vector>::load(self.bias.add(column + first)));
                    let to = self.output.add(row * self.output_stride + column + first);
                    let len = lanes.min(n_columns - first);
                    match finish {
                        Finish::Set => {}
                        Finish::Add if len < lanes => {
                            sum = sum.add(S::Floats::load_partial(to, len));
                        }
                        Finish::Add => sum = sum.add(<S::Floats as Vector>::load(to)),
                        Finish::Activate(activation) => sum = activate(activation, sum),
                    }
                    if len < lanes {
                        sum.store_partial(to, len);
                    } else {
                        Vector::store(sum, to);
                    }
                }
            }
        }
    }
}

/// A few rows by a panel, over some of the steps.
struct Tile {
    rows: *const u8,
    row_stride: usize,
    n_steps: usize,
    weights: *const u8,
    /// True if there are no sums yet.
    is_first: bool,
    sums: *mut f32,
    /// Memory to prefetch, which need not be valid, and the bytes further after
    /// a few steps.
    ahead: *const u8,
    ahead_step: usize,
}

impl Tile {
    /// Computes the tile for `n` rows.
    ///
    /// # Safety
    /// The contract of [`Tile::compute`] holds; [`tile_height`] has returned `n`.
    #[inline(always)]
    unsafe fn compute_rows<M: StepProducts, const N: usize, const MOST: usize>(&self, n: usize) {
        // SAFETY: the caller vouches for the rows.
        unsafe {
            if n == MOST {
                self.compute::<M, N, MOST>();
            } else if n == 8 && MOST > 8 {
                self.compute::<M, N, 8>();
            } else if n == 4 && MOST > 4 {
                self.compute::<M, N, 4>();
            } else if n == 2 {
                self.compute::<M, N, 2>();
            } else {
                self.compute::<M, N, 1>();
            }
        }
    }

    /// Computes the tile for `H` rows.
    ///
    /// # Safety
    /// The CPU has the instructions of `M`; there are `H` rows and, for each of
    /// them, `N` vectors of sums, which nobody else has; weights and rows have
    /// as many steps.
    #[inline(always)]
    unsafe fn compute<M: StepProducts, const N: usize, const H: usize>(&self) {
        let lanes = lanes::<M>();
        // SAFETY: all that is read or written is what the caller vouches for.
        unsafe {
            let mut sums = [[M::Sums::zero(); N]; H];
            if !self.is_first {
                for (i, sums) in sums.iter_mut().enumerate() {
                    for (j, sum) in sums.iter_mut().enumerate() {
                        *sum = M::Sums::load(self.sums.add((i * N + j) * lanes));
                    }
                }
            }
            let (mut rows, mut weights) = (self.rows, self.weights);
            let mut ahead = self.ahead;
            for _ in 0..self.n_steps / UNROLLED {
                <M::Sums as Sums>::Floats::prefetch_far(ahead);
                ahead = ahead.wrapping_add(self.ahead_step);
                for step in 0..UNROLLED {
                    self.step::<M, N, H>(
                        &mut sums,
                        rows.add(step * STEP),
                        weights.add(step * N * lanes * STEP),
                    );
                }
                rows = rows.add(UNROLLED * STEP);
                weights = weights.add(UNROLLED * N * lanes * STEP);
            }
            for step in 0..self.n_steps % UNROLLED {
                self.step::<M, N, H>(
                    &mut sums,
                    rows.add(step * STEP),
                    weights.add(step * N * lanes * STEP),
                );
            }
            for (i, sums) in sums.into_iter().enumerate() {
                for (j, sum) in sums.into_iter().enumerate() {
                    sum.store(self.sums.add((i * N + j) * lanes));
                }
            }
        }
    }

    /// Adds the products of one step.
    ///
    /// # Safety
    /// The contract of [`Tile::compute`] holds, and rows and weights have this
    /// step.
    #[inline(always)]
    unsafe fn step<M: StepProducts, const N: usize, const H: usize>(
        &self,
        sums: &mut [[M::Sums; N]; H],
        rows: *const u8,
        weights: *const u8,
    ) {
        // SAFETY: the caller vouches for the step.
        unsafe {
            let mut columns = [M::weights(weights); N];
            for (j, column) in columns.iter_mut().enumerate().skip(1) {
                *column = M::weights(weights.add(j * lanes::<M>() * STEP));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let inputs = M::inputs(rows.add(i * self.row_stride));
                for (sum, column) in sums.iter_mut().zip(columns) {
                    *sum = M::add(*sum, column, inputs);
                }
            }
        }
    }
}
