//! Rounds weights to 8 bits so that the results of products are close, not only
//! the weights.
//!
//! What is lost by rounding the weight of one input is made up for by the
//! weights of the inputs behind it, as far as the inputs vary together
//! (Frantar et al., "GPTQ", 2022). How they vary is taken from a run of the
//! reference over random tokens, so that no pictures are needed, within blocks
//! of inputs, so that it costs little.

use super::error::CompileError;
use super::reference;
use super::verify::{self, Random};
use super::weights::{CheckpointWeights, Dense};

/// Inputs that make up for one another.
const BLOCK: usize = 128;
/// Sequences of random tokens. They are of the length that the verification
/// has, and other ones than the verification's.
const N_SEQUENCES: usize = 4;
/// Part of the mean square of a block's inputs that is added to each: inputs
/// that vary alike by chance in the few rows are not relied on.
const DAMPING: f64 = 0.1;
/// Largest number of an 8-bit weight.
const LARGEST: f32 = 127.0;

/// Products of a layer, in the order of [`Calibration`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayerProduct {
    Qkv,
    Projection,
    Expand,
    Contract,
}

/// Second moments of the inputs of each product.
#[derive(Debug, Default)]
pub(crate) struct Calibration {
    layers: Vec<[Moments; 4]>,
}

/// Means of the products of any two inputs of a block, block after block,
/// `(block, block)`.
#[derive(Debug, Default)]
pub(crate) struct Moments {
    blocks: Vec<Vec<f32>>,
}

impl Calibration {
    /// Runs the reference over random tokens.
    ///
    /// # Errors
    ///
    /// When a tensor does not fit the configuration.
    pub(crate) fn new(
        weights: &CheckpointWeights<'_>,
        n_layers: usize,
        advance: impl FnMut(u64),
    ) -> Result<Self, CompileError> {
        let architecture = &weights.architecture;
        let length = verify::n_positions(architecture, n_layers);
        let mut random = Random(0x0f1e_2d3c_4b5a_6978);
        let sequences = verify::sequences(architecture, N_SEQUENCES, length, &mut random);
        let mut calibration = Self::default();
        let observe = |layer: usize, product: LayerProduct, rows: &[f64], inputs: usize| {
            if calibration.layers.len() <= layer {
                calibration.layers.resize_with(layer + 1, Default::default);
            }
            calibration.layers[layer][product as usize] = Moments::of(rows, inputs);
        };
        reference::trace(weights, &sequences, n_layers, advance, observe)?;
        Ok(calibration)
    }

    /// Returns what is known of the inputs of a product.
    pub(crate) fn moments(&self, layer: usize, product: LayerProduct) -> Option<&Moments> {
        Some(&self.layers.get(layer)?[product as usize])
    }
}

impl Moments {
    #[expect(
        clippy::cast_precision_loss,
        clippy::cast_possible_truncation,
        reason = "counts are small, and moments need no more than 24 bits"
    )]
    fn of(rows: &[f64], inputs: usize) -> Self {
        let mut blocks = vec![Vec::new(); inputs.div_ceil(BLOCK)];
        in_parallel(
            blocks.iter_mut().enumerate().collect(),
            |(block, moments)| {
                let first = block * BLOCK;
                let size = BLOCK.min(inputs - first);
                let mut sums = vec![0.0; size * size];
                for row in rows.chunks_exact(inputs) {
                    let row = &row[first..first + size];
                    for (sums, value) in sums.chunks_exact_mut(size).zip(row) {
                        for (sum, other) in sums.iter_mut().zip(row) {
                            *sum += value * other;
                        }
                    }
                }
                let share = inputs as f64 / rows.len().max(1) as f64;
                *moments = sums.iter().map(|sum| (sum * share) as f32).collect();
            },
        );
        Self { blocks }
    }
}

/// Rounds weights to symmetric 8 bits with a scale per output; to the nearest
/// number if nothing is known of the inputs.
pub(crate) fn quantize(dense: &Dense, moments: Option<&Moments>) -> (Vec<i8>, Vec<f32>) {
    let outputs = dense.outputs;
    let mut largest = vec![0.0_f32; outputs];
    for row in dense.weight.chunks_exact(outputs) {
        for (largest, value) in largest.iter_mut().zip(row) {
            *largest = largest.max(value.abs());
        }
    }
    // For a column of zeros any scale will do.
    let scales: Vec<f32> = largest
        .iter()
        .map(|largest| {
            if *largest > 0.0 {
                largest / LARGEST
            } else {
                1.0
            }
        })
        .collect();
    let mut bytes = vec![0; dense.weight.len()];
    let blocks = dense.weight.chunks(BLOCK * outputs);
    let blocks = blocks.zip(bytes.chunks_mut(BLOCK * outputs)).enumerate();
    in_parallel(blocks.collect(), |(block, (weights, bytes))| {
        let size = weights.len() / outputs;
        let moments = moments.and_then(|moments| moments.blocks.get(block));
        let shares = moments.and_then(|moments| shares(moments, size));
        round(weights, &scales, shares.as_deref(), bytes);
    });
    (bytes, scales)
}

/// Rounds a block of weights. `shares` has for each input how much the weight
/// of each input behind it makes up for.
fn round(weights: &[f32], scales: &[f32], shares: Option<&[f32]>, bytes: &mut [i8]) {
    let outputs = scales.len();
    let size = weights.len() / outputs;
    let mut weights = weights.to_vec();
    let mut errors = vec![0.0; outputs];
    for input in 0..size {
        let (done, behind) = weights.split_at_mut((input + 1) * outputs);
        let row = &done[input * outputs..];
        let bytes = &mut bytes[input * outputs..][..outputs];
        for ((byte, error), (weight, scale)) in bytes
            .iter_mut()
            .zip(&mut errors)
            .zip(row.iter().zip(scales))
        {
            let nearest = (weight / scale).round_ties_even().clamp(-LARGEST, LARGEST);
            *error = weight - nearest * scale;
            #[expect(clippy::cast_possible_truncation, reason = "clamped to 8 bits")]
            let nearest = nearest as i8;
            *byte = nearest;
        }
        let Some(shares) = shares else { continue };
        let shares = &shares[input * size + input + 1..(input + 1) * size];
        for (row, share) in behind.chunks_exact_mut(outputs).zip(shares) {
            for (weight, error) in row.iter_mut().zip(&errors) {
                *weight -= error * share;
            }
        }
    }
}

/// Returns for each input of a block how much the weights behind it change for
/// its rounding error, so that the mean square of the results' error is least:
/// the rows of the upper triangular factor of the inverse moments, each divided
/// by its diagonal. Returns `None` for moments that are no numbers.
#[expect(
    clippy::cast_precision_loss,
    clippy::cast_possible_truncation,
    reason = "counts are small, and moments need no more than 24 bits"
)]
fn shares(moments: &[f32], size: usize) -> Option<Vec<f32>> {
    let mut factor: Vec<f64> = moments.iter().copied().map(f64::from).collect();
    let diagonal: f64 = (0..size).map(|at| factor[at * size + at]).sum();
    let mean = diagonal / size as f64;
    let damping = if mean > 0.0 { DAMPING * mean } else { 1.0 };
    for at in 0..size {
        factor[at * size + at] += damping;
    }
    // The moments are the upper triangular `factor` times its transpose, whose
    // columns are found from the last on.
    for column in (0..size).rev() {
        let pivot = factor[column * size + column];
        let behind = |factor: &[f64], row: usize| -> f64 {
            let (row, column) = (row * size, column * size);
            let products = factor[row..row + size]
                .iter()
                .zip(&factor[column..column + size]);
            let after = column / size + 1;
            products.skip(after).map(|(a, b)| a * b).sum()
        };
        let pivot = (pivot - behind(&factor, column)).sqrt();
        if !(pivot.is_finite() && pivot > 0.0) {
            return None;
        }
        for row in 0..column {
            let rest = factor[row * size + column] - behind(&factor, row);
            factor[row * size + column] = rest / pivot;
        }
        factor[column * size + column] = pivot;
    }
    // Rows of the inverse, from the last on.
    let mut inverse = vec![0.0; size * size];
    for row in (0..size).rev() {
        let pivot = factor[row * size + row];
        let (above, below) = inverse.split_at_mut((row + 1) * size);
        let target = &mut above[row * size..];
        target[row] = 1.0 / pivot;
        for (at, known) in below.chunks_exact(size).enumerate() {
            let scale = -factor[row * size + row + 1 + at] / pivot;
            for (target, known) in target.iter_mut().zip(known) {
                *target += scale * known;
            }
        }
    }
    let rows = inverse.chunks_exact(size).enumerate();
    let shares = rows.flat_map(|(at, row)| row.iter().map(move |value| (value / row[at]) as f32));
    Some(shares.collect())
}

/// Does independent pieces of work on all cores.
fn in_parallel<T: Send>(work: Vec<T>, each: impl Fn(T) + Sync) {
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = work.len().div_ceil(n_threads).max(1);
    let mut work = work;
    std::thread::scope(|scope| {
        while !work.is_empty() {
            let rest = work.split_off(share.min(work.len()));
            let mine = std::mem::replace(&mut work, rest);
            scope.spawn(|| mine.into_iter().for_each(&each));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noise(seed: &mut u32) -> f32 {
        *seed = seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        f32::from(u16::from_be_bytes([
            seed.to_be_bytes()[0],
            seed.to_be_bytes()[1],
        ])) / 32_768.0
            - 1.0
    }

    /// Rows of inputs, each of which is partly the one before.
    fn correlated(inputs: usize, rows: usize) -> Vec<f64> {
        let mut seed = 7;
        let mut all = Vec::new();
        for _ in 0..rows {
            let mut before = 0.0;
            for _ in 0..inputs {
                before = 0.9 * before + 0.4 * f64::from(noise(&mut seed));
                all.push(before);
            }
        }
        all
    }

    fn product(inputs: usize, outputs: usize) -> Dense {
        let mut seed = 3;
        Dense {
            weight: (0..inputs * outputs).map(|_| noise(&mut seed)).collect(),
            bias: None,
            inputs,
            outputs,
        }
    }

    /// Mean square of the errors of the results.
    fn error(dense: &Dense, rows: &[f64], (bytes, scales): &(Vec<i8>, Vec<f32>)) -> f64 {
        let mut sum = 0.0;
        for row in rows.chunks_exact(dense.inputs) {
            for (output, scale) in scales.iter().enumerate() {
                let error: f64 = (0..dense.inputs)
                    .map(|input| {
                        let at = input * dense.outputs + output;
                        row[input] * f64::from(dense.weight[at] - f32::from(bytes[at]) * scale)
                    })
                    .sum();
                sum += error * error;
            }
        }
        sum
    }

    #[test]
    fn errors_of_results_fall_for_rows_that_were_not_seen() {
        for inputs in [5, 128, 200, 300] {
            let dense = product(inputs, 24);
            let rows = correlated(inputs, 700);
            let (seen, unseen) = rows.split_at(400 * inputs);
            let nearest = error(&dense, unseen, &quantize(&dense, None));
            let moments = Moments::of(seen, inputs);
            let calibrated = error(&dense, unseen, &quantize(&dense, Some(&moments)));
            assert!(
                calibrated < 0.6 * nearest,
                "{inputs}: {calibrated} {nearest}"
            );
        }
    }

    #[test]
    fn inputs_that_do_not_vary_together_leave_weights_at_the_nearest() {
        let dense = product(40, 9);
        let mut moments = vec![0.0; 40 * 40];
        for at in 0..40_u8 {
            moments[usize::from(at) * 41] = 1.0 + f32::from(at);
        }
        let moments = Moments {
            blocks: vec![moments],
        };
        assert_eq!(quantize(&dense, Some(&moments)), quantize(&dense, None));
        for broken in [f32::NAN, f32::INFINITY, -1e9] {
            let moments = Moments {
                blocks: vec![vec![broken; 40 * 40]],
            };
            assert_eq!(quantize(&dense, Some(&moments)), quantize(&dense, None));
        }
    }

    #[test]
    fn shares_are_those_of_the_definition() {
        // Two inputs with the moments 2, 1, 1, 2 (damped: 2.2): the second one
        // makes up for its part of the first.
        let found = shares(&[2.0, 1.0, 1.0, 2.0], 2).unwrap();
        let expected = [1.0, -1.0 / 2.2, 0.0, 1.0];
        for (found, expected) in found.iter().zip(expected) {
            assert!((found - expected).abs() < 1e-6, "{found} {expected}");
        }
    }
}
