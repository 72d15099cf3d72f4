//! Products of a tile of rows with the weights, and of its residuals with the rows.
//!
//! A tile is some standardized rows in f64, read twice: for the logits, and for the
//! gradient while a second-level cache still holds the rows. Rows lie
//! `stride` numbers apart, a multiple of the widest step plus a line of the cache:
//! without that line, rows of 512 would all compete for the same places of the
//! first-level cache. What is beyond the columns is zero.
//!
//! The loops are over arrays of constant size, which the compiler turns into
//! vectors: eight lanes with AVX-512, four with AVX2.
#![expect(
    clippy::inline_always,
    reason = "becomes vector instructions only inside the function that has them"
)]

use multiversion::multiversion;
use multiversion::target::target_cfg_f;

use crate::probe::FeatureMatrix;
use crate::probe::parts::BLOCK_ROWS;
use crate::probe::standard::Standardization;

/// Numbers per step of the gradient: four vectors of eight lanes.
const STEP: usize = 32;
/// Numbers of a line of the cache.
const LINE: usize = 8;
/// Outputs whose weights stay in the cache while all rows of a tile pass: 64 KB with
/// 512 columns.
const OUTPUTS: usize = 16;
/// Rows whose logits are computed at a time.
const ROWS: usize = 4;
/// Most numbers of the sums of `ROWS` rows and four outputs in eight lanes.
const PARTIAL: usize = ROWS * 4 * 8;

/// Distance of rows of `width` numbers, in a tile and in padded weights.
pub(super) fn stride_of(width: usize) -> usize {
    width.next_multiple_of(STEP) + LINE
}

/// Rows of some examples, with a number per row and output.
pub(super) struct RowTile {
    pub(super) n_rows: usize,
    stride: usize,
    n_outputs: usize,
    x: Vec<f64>,
    /// Logits, then residuals, of `n_outputs` per row.
    pub(super) z: Vec<f64>,
    scratch: Vec<f32>,
}

impl RowTile {
    pub(super) fn new(width: usize, n_outputs: usize) -> Self {
        let stride = stride_of(width);
        // With 512 columns 32 rows are 128 KB, which leaves a second-level cache
        // room for the sums of some classes. Those of many do not fit anyway, and
        // are read less often for more rows.
        let n_rows = if n_outputs <= 64 { 32 } else { BLOCK_ROWS };
        Self {
            n_rows,
            stride,
            n_outputs,
            x: vec![0.0; n_rows * stride],
            z: vec![0.0; n_rows * n_outputs],
            scratch: vec![0.0; width],
        }
    }

    /// Reads and standardizes `rows`, at most `n_rows`; `inverse` is 1 / scale.
    /// Rows beyond them are left as they were.
    pub(super) fn read(
        &mut self,
        features: &FeatureMatrix,
        rows: &[usize],
        standard: &Standardization,
        inverse: &[f64],
    ) {
        for (&row, into) in rows.iter().zip(self.x.chunks_exact_mut(self.stride)) {
            let from = features.row(row, &mut self.scratch);
            standardize(from, &standard.mean, inverse, into);
        }
    }

    /// Computes the logits of the tile. `weights` has a row of `stride` per output.
    pub(super) fn logits(&mut self, weights: &[f64], bias: &[f64]) {
        for logits in self.z.chunks_exact_mut(self.n_outputs) {
            logits.copy_from_slice(bias);
        }
        add_products(&self.x, weights, self.stride, &mut self.z);
    }

    /// Adds the products of residuals with rows to `sums`, which has a row of
    /// `stride` per output. Residuals of rows that were not read must be zero.
    pub(super) fn add_gradient(&self, sums: &mut [f64]) {
        add_outer(&self.x, &self.z, self.stride, sums);
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn standardize(from: &[f32], mean: &[f64], inverse: &[f64], into: &mut [f64]) {
    let columns = from.iter().zip(mean.iter().zip(inverse));
    for (into, (&x, (mean, inverse))) in into.iter_mut().zip(columns) {
        *into = (f64::from(x) - mean) * inverse;
    }
}

/// Computes `a * b + c`, in one instruction where there is one: without, a fused
/// product is a slow function.
#[inline(always)]
fn add_product<const FUSED: bool>(a: f64, b: f64, c: f64) -> f64 {
    if FUSED { a.mul_add(b, c) } else { a * b + c }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn add_products(x: &[f64], weights: &[f64], stride: usize, z: &mut [f64]) {
    if target_cfg_f!(target_feature = "avx512f") {
        all_products::<8, true>(x, weights, stride, z);
    } else if target_cfg_f!(target_feature = "fma") || cfg!(target_arch = "aarch64") {
        all_products::<4, true>(x, weights, stride, z);
    } else {
        all_products::<4, false>(x, weights, stride, z);
    }
}

#[inline(always)]
fn all_products<const LANES: usize, const FUSED: bool>(
    x: &[f64],
    weights: &[f64],
    stride: usize,
    z: &mut [f64],
) {
    let n_outputs = weights.len() / stride;
    for block in (0..n_outputs).step_by(OUTPUTS) {
        let end = n_outputs.min(block + OUTPUTS);
        let tiles = x.chunks_exact(ROWS * stride);
        for (x, z) in tiles.zip(z.chunks_exact_mut(ROWS * n_outputs)) {
            let mut first = block;
            while first + 4 <= end {
                products::<LANES, 4, FUSED>(x, weights, stride, first, z);
                first += 4;
            }
            if first + 2 <= end {
                products::<LANES, 2, FUSED>(x, weights, stride, first, z);
                first += 2;
            }
            if first < end {
                products::<LANES, 1, FUSED>(x, weights, stride, first, z);
            }
        }
    }
}

/// Adds the products of `ROWS` rows with `N` rows of weights, from `first` on.
#[inline(always)]
fn products<const LANES: usize, const N: usize, const FUSED: bool>(
    x: &[f64],
    weights: &[f64],
    stride: usize,
    first: usize,
    z: &mut [f64],
) {
    let n_outputs = weights.len() / stride;
    let x: [_; ROWS] = vectors::<LANES, ROWS>(x, stride);
    let weights: [_; N] = vectors::<LANES, N>(&weights[first * stride..], stride);
    let mut sums = [[[0.0; LANES]; N]; ROWS];
    for step in 0..stride / LANES {
        let mut w = [[0.0; LANES]; N];
        for output in 0..N {
            w[output] = weights[output][step];
        }
        for row in 0..ROWS {
            let x = x[row][step];
            for output in 0..N {
                sums[row][output] = add_each::<LANES, FUSED>(x, w[output], sums[row][output]);
            }
        }
    }
    // Through memory and a function of its own: a sum over lanes in sight of the
    // loop makes the compiler keep other vectors there, at a third of the speed.
    let mut partial = [0.0; PARTIAL];
    for (into, sums) in partial.chunks_exact_mut(LANES).zip(sums.as_flattened()) {
        into.copy_from_slice(sums);
    }
    for row in 0..ROWS {
        let z = &mut z[row * n_outputs + first..][..N];
        add_totals(&partial[row * N * LANES..], LANES, z);
    }
}

/// Adds the products of lanes. Arrays by value, as the loops have them, are what the
/// compiler keeps in vectors; the same over indices became lone numbers.
#[inline(always)]
fn add_each<const LANES: usize, const FUSED: bool>(
    a: [f64; LANES],
    b: [f64; LANES],
    mut sums: [f64; LANES],
) -> [f64; LANES] {
    for lane in 0..LANES {
        sums[lane] = add_product::<FUSED>(a[lane], b[lane], sums[lane]);
    }
    sums
}

/// Returns the first `N` rows as vectors, all of one length, so that the compiler
/// sees that a step is inside each.
#[inline(always)]
fn vectors<const LANES: usize, const N: usize>(
    rows: &[f64],
    stride: usize,
) -> [&[[f64; LANES]]; N] {
    let n = stride / LANES;
    let (rows, _) = rows.as_chunks::<LANES>();
    let mut each = [&rows[..n]; N];
    for (idx, row) in each.iter_mut().enumerate() {
        *row = &rows[idx * n..][..n];
    }
    each
}

/// Adds the sum of each group of `n_lanes` numbers to a number of `z`.
#[inline(never)]
fn add_totals(partial: &[f64], n_lanes: usize, z: &mut [f64]) {
    for (z, lanes) in z.iter_mut().zip(partial.chunks_exact(n_lanes)) {
        *z += lanes.iter().sum::<f64>();
    }
}

#[multiversion(targets("x86_64+avx512f+avx512vl+avx2+fma", "x86_64+avx2+fma"))]
fn add_outer(x: &[f64], residuals: &[f64], stride: usize, sums: &mut [f64]) {
    if target_cfg_f!(target_feature = "avx512f") {
        all_outer::<8, 4, true>(x, residuals, stride, sums);
    } else if target_cfg_f!(target_feature = "fma") || cfg!(target_arch = "aarch64") {
        all_outer::<4, 2, true>(x, residuals, stride, sums);
    } else {
        all_outer::<4, 2, false>(x, residuals, stride, sums);
    }
}

#[inline(always)]
fn all_outer<const LANES: usize, const VECTORS: usize, const FUSED: bool>(
    x: &[f64],
    residuals: &[f64],
    stride: usize,
    sums: &mut [f64],
) {
    let n_outputs = sums.len() / stride;
    // The outputs inside, so that the columns of all rows stay in the first level
    // of the cache.
    for column in (0..stride - LINE).step_by(VECTORS * LANES) {
        let mut first = 0;
        while first + 4 <= n_outputs {
            let sums = &mut sums[first * stride..];
            outer::<LANES, VECTORS, 4, FUSED>(x, residuals, stride, column, first, n_outputs, sums);
            first += 4;
        }
        if first + 2 <= n_outputs {
            let sums = &mut sums[first * stride..];
            outer::<LANES, VECTORS, 2, FUSED>(x, residuals, stride, column, first, n_outputs, sums);
            first += 2;
        }
        if first < n_outputs {
            let sums = &mut sums[first * stride..];
            outer::<LANES, VECTORS, 1, FUSED>(x, residuals, stride, column, first, n_outputs, sums);
        }
    }
}

/// Adds the products of all rows with the residuals of `N` outputs, for
/// `VECTORS` vectors of columns.
#[inline(always)]
fn outer<const LANES: usize, const VECTORS: usize, const N: usize, const FUSED: bool>(
    x: &[f64],
    residuals: &[f64],
    stride: usize,
    column: usize,
    first: usize,
    n_outputs: usize,
    into: &mut [f64],
) {
    let mut sums = [[[0.0; LANES]; VECTORS]; N];
    for (x, residuals) in x
        .chunks_exact(stride)
        .zip(residuals.chunks_exact(n_outputs))
    {
        let (x, _) = x[column..][..VECTORS * LANES].as_chunks::<LANES>();
        let residuals = &residuals[first..][..N];
        for output in 0..N {
            let residual = [residuals[output]; LANES];
            for vector in 0..VECTORS {
                let sum = sums[output][vector];
                sums[output][vector] = add_each::<LANES, FUSED>(residual, x[vector], sum);
            }
        }
    }
    for output in 0..N {
        let into = &mut into[output * stride + column..][..VECTORS * LANES];
        for vector in 0..VECTORS {
            for lane in 0..LANES {
                into[vector * LANES + lane] += sums[output][vector][lane];
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Whole numbers, so that sums are exact in any order.
    fn numbers(n: usize, step: usize) -> Vec<f64> {
        let levels = [-3.0, 1.0, 4.0, -1.0, 5.0, -2.0, 0.0];
        (0..n)
            .map(|idx| levels[idx * step % levels.len()])
            .collect()
    }

    /// Rows of `width` numbers, `stride` apart.
    fn padded(rows: usize, width: usize, step: usize) -> Vec<f64> {
        let stride = stride_of(width);
        let mut padded = vec![0.0; rows * stride];
        let numbers = numbers(rows * width, step);
        for (into, from) in padded.chunks_mut(stride).zip(numbers.chunks(width)) {
            into[..width].copy_from_slice(from);
        }
        padded
    }

    type Products = fn(&[f64], &[f64], usize, &mut [f64]);

    #[test]
    fn all_forms_of_the_products_agree() {
        let forms: [Products; 4] = [
            add_products,
            all_products::<8, true>,
            all_products::<4, true>,
            all_products::<4, false>,
        ];
        for (width, n_outputs) in [(1, 1), (31, 2), (32, 3), (33, 7), (70, 35)] {
            let stride = stride_of(width);
            let (x, weights) = (padded(8, width, 1), padded(n_outputs, width, 2));
            let mut expected = numbers(8 * n_outputs, 3);
            for (idx, z) in expected.iter_mut().enumerate() {
                let x = &x[idx / n_outputs * stride..][..width];
                let weights = &weights[idx % n_outputs * stride..][..width];
                *z += x.iter().zip(weights).map(|(x, w)| x * w).sum::<f64>();
            }
            for form in forms {
                let mut z = numbers(8 * n_outputs, 3);
                form(&x, &weights, stride, &mut z);
                assert!(z == expected, "{width}, {n_outputs}");
            }
        }
    }

    #[test]
    fn all_forms_of_the_gradient_agree() {
        let forms: [Products; 4] = [
            add_outer,
            all_outer::<8, 4, true>,
            all_outer::<4, 2, true>,
            all_outer::<4, 2, false>,
        ];
        for (width, n_outputs) in [(1, 1), (31, 2), (32, 3), (33, 7), (70, 35)] {
            let stride = stride_of(width);
            let (x, residuals) = (padded(8, width, 1), numbers(8 * n_outputs, 2));
            let mut expected = padded(n_outputs, width, 3);
            for (output, sums) in expected.chunks_mut(stride).enumerate() {
                for (x, residuals) in x.chunks(stride).zip(residuals.chunks(n_outputs)) {
                    for (sum, x) in sums.iter_mut().zip(x) {
                        *sum += residuals[output] * x;
                    }
                }
            }
            for form in forms {
                let mut sums = padded(n_outputs, width, 3);
                form(&x, &residuals, stride, &mut sums);
                assert!(sums == expected, "{width}, {n_outputs}");
            }
        }
    }
}
