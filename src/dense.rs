//! Dense products of a few rows on the CPU: `x W + bias + residual` in `f32`,
//! what a step of generation does over and over.
//!
//! With a few rows a product computes less than it reads: all of `W`, once. So
//! the weights lie in the order in which they are read ([`Panels`]), on large
//! pages, and every row that there is uses them while they pass.
//!
//! Threads take panels from a [`Job`], as many as come to [`Job::work`]. A row's
//! result depends on that row alone, to the last bit: not on how many others run
//! with it, nor on threads, because each of its numbers is summed in the order of
//! the inputs, whatever the tile.
#![expect(
    unsafe_code,
    reason = "hands disjoint columns of one output to several threads, and calls what the CPU was asked for"
)]

use std::marker::PhantomData;
use std::sync::atomic::{AtomicUsize, Ordering};

use self::pages::Pages;
use self::tile::Tile;
use crate::attention::{Kernel, Precision};
use crate::vector::{Portable, Vector};

mod pages;
#[cfg(test)]
mod tests;
mod tile;

/// Why a product cannot be had.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DenseError {
    #[error("a product from {inputs} to {outputs}: both must be at least one")]
    Empty { inputs: usize, outputs: usize },
    #[error("this cpu has no {0:?} kernel for f32 products")]
    Kernel(Kernel),
    #[error("a product of {rows} rows from {inputs} to {outputs} is too large to address")]
    TooLarge {
        rows: usize,
        inputs: usize,
        outputs: usize,
    },
    #[error("{name} of {actual} floats, not {expected}")]
    Length {
        name: &'static str,
        expected: usize,
        actual: usize,
    },
    #[error("no memory for {0} bytes of weights")]
    Memory(usize),
}

/// The weights of a product: panels of a few columns, in each a row of that many
/// numbers for every input. Tile that the last panel has too many are zero.
#[derive(Debug)]
pub struct Panels {
    inputs: usize,
    outputs: usize,
    kernel: Kernel,
    pages: Pages,
}

impl Panels {
    /// Puts weights of `(inputs, outputs)` in order, for the fastest kernel that
    /// this CPU has.
    ///
    /// # Errors
    /// If the sizes do not fit, or memory does not suffice.
    pub fn pack(weights: &[f32], inputs: usize, outputs: usize) -> Result<Self, DenseError> {
        Self::with_kernel(weights, inputs, outputs, Kernel::fastest(Precision::F32))
    }

    /// The same for a kernel of the caller's choice, for tests and benchmarks.
    ///
    /// # Errors
    /// As [`Panels::pack`], and if this CPU cannot run the kernel or its products
    /// are not `f32`.
    pub fn with_kernel(
        weights: &[f32],
        inputs: usize,
        outputs: usize,
        kernel: Kernel,
    ) -> Result<Self, DenseError> {
        if inputs == 0 || outputs == 0 {
            return Err(DenseError::Empty { inputs, outputs });
        }
        if !kernel.is_available() || kernel.precision() != Precision::F32 {
            return Err(DenseError::Kernel(kernel));
        }
        check("weights", weights.len(), size(1, inputs, outputs)?)?;
        let width = panel_width(kernel);
        let mut pages = Pages::zeroed(size(1, inputs, outputs.next_multiple_of(width))?)?;
        for (panel, rows) in pages
            .floats_mut()
            .chunks_exact_mut(inputs * width)
            .enumerate()
        {
            let first = panel * width;
            let n_columns = width.min(outputs - first);
            let weights = weights.chunks_exact(outputs);
            for (row, weights) in rows.chunks_exact_mut(width).zip(weights) {
                row[..n_columns].copy_from_slice(&weights[first..][..n_columns]);
            }
        }
        Ok(Self {
            inputs,
            outputs,
            kernel,
            pages,
        })
    }

    #[must_use]
    pub fn inputs(&self) -> usize {
        self.inputs
    }

    #[must_use]
    pub fn outputs(&self) -> usize {
        self.outputs
    }

    fn n_panels(&self) -> usize {
        self.outputs.div_ceil(panel_width(self.kernel))
    }

    /// Gets ready to compute `output`; [`Job::work`] does it. `scratch` is the
    /// caller's to keep, so that no call allocates.
    ///
    /// # Errors
    /// If a length does not fit.
    pub fn job<'a>(
        &'a self,
        operands: Operands<'a>,
        output: &'a mut [f32],
        scratch: &'a mut Vec<f32>,
    ) -> Result<Job<'a>, DenseError> {
        let Operands {
            rows,
            bias,
            residual,
        } = operands;
        let n_rows = rows.len() / self.inputs;
        check("input", rows.len(), size(n_rows, self.inputs, 1)?)?;
        let output_len = size(n_rows, 1, self.outputs)?;
        check("output", output.len(), output_len)?;
        if let Some(bias) = bias {
            check("bias", bias.len(), self.outputs)?;
        }
        if let Some(residual) = residual {
            check("residual", residual.len(), output_len)?;
        }
        interleave(rows, self.inputs, tile_rows(self.kernel), scratch);
        Ok(Job {
            panels: self,
            n_rows,
            interleaved: scratch,
            bias,
            residual,
            output: output.as_mut_ptr(),
            borrow: PhantomData,
            next_panel: AtomicUsize::new(0),
        })
    }

    /// Computes `output` on `n_threads` threads, this one among them. The others
    /// are started for the call.
    ///
    /// # Errors
    /// As [`Panels::job`].
    pub fn run(
        &self,
        operands: Operands<'_>,
        output: &mut [f32],
        n_threads: usize,
    ) -> Result<(), DenseError> {
        let mut scratch = Vec::new();
        let job = self.job(operands, output, &mut scratch)?;
        std::thread::scope(|scope| {
            for _ in 1..n_threads.min(job.n_panels()) {
                scope.spawn(|| job.work());
            }
            job.work();
        });
        Ok(())
    }
}

/// What a product is of, besides the weights.
#[derive(Clone, Copy, Debug)]
pub struct Operands<'a> {
    /// `(rows, inputs)`.
    pub rows: &'a [f32],
    /// `(outputs)`, added to every row.
    pub bias: Option<&'a [f32]>,
    /// `(rows, outputs)`, added last.
    pub residual: Option<&'a [f32]>,
}

/// Floats in a panel's row: two vectors.
fn panel_width(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable => 8,
        Kernel::Avx2 => 16,
        _ => 32,
    }
}

/// Rows that are computed together, at most: as many as there are registers for.
fn tile_rows(kernel: Kernel) -> usize {
    match kernel {
        Kernel::Portable | Kernel::Avx2 => 4,
        _ => 8,
    }
}

fn size(rows: usize, inputs: usize, outputs: usize) -> Result<usize, DenseError> {
    rows.checked_mul(inputs)
        .and_then(|product| product.checked_mul(outputs))
        // An allocation holds no more bytes, so that no offset overflows.
        .filter(|floats| *floats <= isize::MAX as usize / 8)
        .ok_or(DenseError::TooLarge {
            rows,
            inputs,
            outputs,
        })
}

fn check(name: &'static str, actual: usize, expected: usize) -> Result<(), DenseError> {
    if actual == expected {
        return Ok(());
    }
    Err(DenseError::Length {
        name,
        expected,
        actual,
    })
}

/// Rows that remain, cut into tiles of powers of two, the largest first.
fn tile_of(n_left: usize, most: usize) -> usize {
    if n_left >= most {
        most
    } else {
        (n_left + 1).next_power_of_two() / 2
    }
}

/// Puts the rows of each tile side by side, so that one input's numbers of all of
/// them are one line of memory. A row's own order would put them a power of two
/// apart, where they drive each other out of the cache.
fn interleave(rows: &[f32], inputs: usize, most: usize, into: &mut Vec<f32>) {
    into.resize(rows.len(), 0.0);
    let (mut rows, mut into) = (rows, into.as_mut_slice());
    while !rows.is_empty() {
        let n = tile_of(rows.len() / inputs, most);
        let (tile, rest) = rows.split_at(n * inputs);
        let (to, rest_to) = into.split_at_mut(n * inputs);
        for (row, values) in tile.chunks_exact(inputs).enumerate() {
            for (value, to) in values.iter().zip(to[row..].iter_mut().step_by(n)) {
                *to = *value;
            }
        }
        (rows, into) = (rest, rest_to);
    }
}

/// One call's panels, to be worked on by any number of threads.
#[derive(Debug)]
pub struct Job<'a> {
    panels: &'a Panels,
    n_rows: usize,
    /// As [`interleave`] leaves them.
    interleaved: &'a [f32],
    bias: Option<&'a [f32]>,
    residual: Option<&'a [f32]>,
    output: *mut f32,
    borrow: PhantomData<&'a mut [f32]>,
    /// The first panel that no thread has begun.
    next_panel: AtomicUsize,
}

// SAFETY: a panel is given to one thread only, and no two of them write the same
// float of `output`; nobody reads it while the job borrows it.
unsafe impl Sync for Job<'_> {}
// SAFETY: the same; a job is borrows of floats and a counter.
unsafe impl Send for Job<'_> {}

impl Job<'_> {
    /// How many panels there are: more threads than this have nothing to do.
    #[must_use]
    pub fn n_panels(&self) -> usize {
        if self.n_rows == 0 {
            0
        } else {
            self.panels.n_panels()
        }
    }

    /// Computes panels until none is left to begin. The output is complete when
    /// this has returned on every thread that called it, at least one.
    pub fn work(&self) {
        // SAFETY: the kernel is available, `with_kernel` has asked.
        unsafe {
            match self.panels.kernel {
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx2 => self.avx2(),
                #[cfg(target_arch = "x86_64")]
                Kernel::Avx512 => self.avx512(),
                _ => self.work_with::<Portable>(),
            }
        }
    }

    /// # Safety
    /// The CPU has AVX2 and FMA.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx2,fma")]
    unsafe fn avx2(&self) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { self.work_with::<crate::vector::avx2::Avx2>() }
    }

    /// # Safety
    /// The CPU has AVX-512 F and DQ.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512dq")]
    unsafe fn avx512(&self) {
        // SAFETY: the caller vouches for the instructions.
        unsafe { self.work_with::<crate::vector::avx512::Avx512>() }
    }

    /// # Safety
    /// The CPU has the instructions of `V`, which are the kernel's.
    #[expect(
        clippy::inline_always,
        reason = "intrinsics only become instructions inside a function that has them"
    )]
    #[inline(always)]
    unsafe fn work_with<V: Vector>(&self) {
        let most = tile_rows(self.panels.kernel);
        loop {
            // Nothing is passed from thread to thread through the counter.
            let panel = self.next_panel.fetch_add(1, Ordering::Relaxed);
            if panel >= self.n_panels() {
                break;
            }
            let mut row = 0;
            while row < self.n_rows {
                let n = tile_of(self.n_rows - row, most);
                let tile = self.tile(panel, row);
                // SAFETY: the caller vouches for the instructions; the panel is
                // this thread's, and the rows are there.
                unsafe {
                    match n {
                        8 => tile.compute::<V, 8>(),
                        4 => tile.compute::<V, 4>(),
                        2 => tile.compute::<V, 2>(),
                        _ => tile.compute::<V, 1>(),
                    }
                }
                row += n;
            }
        }
    }

    /// Where a tile, the rows from `row` on and a panel, is found.
    fn tile(&self, panel: usize, row: usize) -> Tile {
        let Panels {
            inputs,
            outputs,
            kernel,
            ref pages,
        } = *self.panels;
        let width = panel_width(kernel);
        let first = panel * width;
        Tile {
            rows: self.interleaved[row * inputs..].as_ptr(),
            inputs,
            panel: pages.floats()[first * inputs..].as_ptr(),
            n_columns: width.min(outputs - first),
            bias: self.bias.map(|bias| bias[first..].as_ptr()),
            residual: self
                .residual
                .map(|residual| residual[row * outputs + first..].as_ptr()),
            // SAFETY: `job` has checked the length; row and column are within.
            output: unsafe { self.output.add(row * outputs + first) },
            stride: outputs,
        }
    }
}
