//! Reference implementation of the model in float64, as plain as possible.
//!
//! The reference shares nothing with the graphs but the weights: no fused
//! operator, no packing, no cache. Compiled graphs are compared with it, so
//! being easy to check by eye matters more than speed; threads only split rows.

use super::calibrate::LayerProduct;
use super::error::CompileError;
use super::weights::{CheckpointWeights, Dense};
use crate::kernels::layers::Activation;
use crate::model::architecture::Architecture;

/// Results of the reference that the tasks need, for each sequence.
#[derive(Debug, Clone)]
pub(crate) struct Trace {
    /// Means over positions of the residual stream, `(batch, width)`: after the
    /// embedding and after each layer.
    pub raw: Vec<Vec<f64>>,
    /// Means as in `raw`, but after the norm in front of the next layer.
    pub normed: Vec<Vec<f64>>,
    /// Activations after the norm that ends the run, `(batch * sequence,
    /// width)`.
    pub hidden: Vec<f64>,
}

/// Runs the first `n_layers` layers on sequences of equal length. `observe` is
/// given the layer, and the inputs of each of its products with their width.
///
/// # Errors
///
/// When a tensor does not fit the configuration.
///
/// # Panics
///
/// If a token is not in the vocabulary or a sequence has too many positions.
pub(crate) fn trace(
    weights: &CheckpointWeights<'_>,
    sequences: &[Vec<i32>],
    n_layers: usize,
    mut advance: impl FnMut(u64),
    mut observe: impl FnMut(usize, LayerProduct, &[f64], usize),
) -> Result<Trace, CompileError> {
    let architecture = &weights.architecture;
    let width = architecture.width;
    let length = sequences.first().map_or(0, Vec::len);
    let mut rows = embed(weights, sequences)?;
    let mut raw = Vec::new();
    let mut normed_means = Vec::new();
    for idx in 0..n_layers {
        let layer = weights.layer(idx)?;
        let normed = norm(architecture, &rows, &layer.attention_norm);
        raw.push(means(&rows, length, width));
        normed_means.push(means(&normed, length, width));
        observe(idx, LayerProduct::Qkv, &normed, width);
        let qkv = dense(&normed, &layer.qkv);
        let attended = attend(architecture, idx, &qkv, length);
        observe(idx, LayerProduct::Projection, &attended, width);
        add(&mut rows, &dense(&attended, &layer.projection));
        let normed = norm(architecture, &rows, &layer.inner_norm);
        observe(idx, LayerProduct::Expand, &normed, width);
        let mut inner = dense(&normed, &layer.expand);
        for value in &mut inner {
            *value = activate(architecture.activation, *value);
        }
        observe(idx, LayerProduct::Contract, &inner, layer.contract.inputs);
        add(&mut rows, &dense(&inner, &layer.contract));
        advance(architecture.layer_parameters() as u64);
    }
    let is_whole = n_layers == architecture.n_layers;
    let last_norm = if is_whole {
        weights.final_norm()?
    } else {
        weights.attention_norm(n_layers)?
    };
    let hidden = norm(architecture, &rows, &last_norm);
    normed_means.push(means(&hidden, length, width));
    // transformers returns the last hidden state after the final norm only.
    raw.push(means(if is_whole { &hidden } else { &rows }, length, width));
    Ok(Trace {
        raw,
        normed: normed_means,
        hidden,
    })
}

/// Multiplies rows by a head of the shape `(outputs, width)`.
#[must_use]
pub(crate) fn head(rows: &[f64], head: &[f32], width: usize) -> Vec<f64> {
    rows.chunks_exact(width)
        .flat_map(|row| head.chunks_exact(width).map(move |weight| (row, weight)))
        .map(|(row, weight)| row.iter().zip(weight).map(|(x, w)| x * f64::from(*w)).sum())
        .collect()
}

/// Returns the negative log-likelihood of `targets`, one per row of logits.
#[must_use]
pub(crate) fn nll(logits: &[f64], targets: &[usize], n_colors: usize) -> Vec<f64> {
    logits
        .chunks_exact(n_colors)
        .zip(targets)
        .map(|(logits, target)| {
            let largest = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            let sum: f64 = logits.iter().map(|logit| (logit - largest).exp()).sum();
            largest + sum.ln() - logits[*target]
        })
        .collect()
}

/// Returns the means over the positions of each sequence.
#[must_use]
pub(crate) fn means(rows: &[f64], length: usize, width: usize) -> Vec<f64> {
    #[expect(clippy::cast_precision_loss, reason = "sequences are short")]
    let share = 1.0 / length as f64;
    let mut means = Vec::new();
    for sequence in rows.chunks_exact(length * width) {
        let mut sum = vec![0.0; width];
        for row in sequence.chunks_exact(width) {
            add(&mut sum, row);
        }
        means.extend(sum.iter().map(|value| value * share));
    }
    means
}

fn embed(
    weights: &CheckpointWeights<'_>,
    sequences: &[Vec<i32>],
) -> Result<Vec<f64>, CompileError> {
    let width = weights.architecture.width;
    let tokens = weights.token_embedding()?;
    let positions = weights.position_embedding()?;
    let mut rows = Vec::new();
    for sequence in sequences {
        for (position, token) in sequence.iter().enumerate() {
            let token = usize::try_from(*token).expect("tokens are not negative");
            let token = &tokens[token * width..][..width];
            let position = &positions[position * width..][..width];
            rows.extend(
                token
                    .iter()
                    .zip(position)
                    .map(|(t, p)| f64::from(*t) + f64::from(*p)),
            );
        }
    }
    Ok(rows)
}

fn add(sum: &mut [f64], addend: &[f64]) {
    for (sum, addend) in sum.iter_mut().zip(addend) {
        *sum += addend;
    }
}

#[expect(clippy::cast_precision_loss, reason = "widths are small")]
fn norm(architecture: &Architecture, rows: &[f64], weight: &[f32]) -> Vec<f64> {
    let mut normed = Vec::with_capacity(rows.len());
    for row in rows.chunks_exact(weight.len()) {
        let square: f64 = row.iter().map(|value| value * value).sum();
        let mean = square / weight.len() as f64;
        let factor = 1.0 / (mean + f64::from(architecture.epsilon)).sqrt();
        normed.extend(
            row.iter()
                .zip(weight)
                .map(|(x, w)| x * factor * f64::from(*w)),
        );
    }
    normed
}

fn dense(rows: &[f64], dense: &Dense) -> Vec<f64> {
    let n_rows = rows.len() / dense.inputs;
    let mut output = vec![0.0; n_rows * dense.outputs];
    let n_threads = std::thread::available_parallelism().map_or(1, usize::from);
    let share = n_rows.div_ceil(n_threads).max(1);
    std::thread::scope(|scope| {
        for (input, output) in rows
            .chunks(share * dense.inputs)
            .zip(output.chunks_mut(share * dense.outputs))
        {
            scope.spawn(move || dense_rows(input, dense, output));
        }
    });
    output
}

fn dense_rows(input: &[f64], dense: &Dense, output: &mut [f64]) {
    if let Some(bias) = &dense.bias {
        for row in output.chunks_exact_mut(dense.outputs) {
            for (value, bias) in row.iter_mut().zip(bias) {
                *value = f64::from(*bias);
            }
        }
    }
    let mut weight = vec![0.0; dense.outputs];
    for (idx, narrow) in dense.weight.chunks_exact(dense.outputs).enumerate() {
        for (wide, narrow) in weight.iter_mut().zip(narrow) {
            *wide = f64::from(*narrow);
        }
        let inputs = input.chunks_exact(dense.inputs).map(|row| row[idx]);
        for (row, factor) in output.chunks_exact_mut(dense.outputs).zip(inputs) {
            for (value, weight) in row.iter_mut().zip(&weight) {
                *value += factor * weight;
            }
        }
    }
}

fn attend(architecture: &Architecture, layer: usize, qkv: &[f64], length: usize) -> Vec<f64> {
    let (width, head_dim) = (architecture.width, architecture.head_dim());
    let scale = architecture.attention_scale(layer);
    let mut output = vec![0.0; qkv.len() / 3];
    let sequences = qkv
        .chunks_exact(length * 3 * width)
        .zip(output.chunks_exact_mut(length * width));
    for (qkv, output) in sequences {
        for head in 0..architecture.n_heads {
            let part = |position: usize, which: usize| {
                &qkv[position * 3 * width + which * width + head * head_dim..][..head_dim]
            };
            for query in 0..length {
                let scores: Vec<f64> = (0..=query)
                    .map(|key| scale * dot(part(query, 0), part(key, 1)))
                    .collect();
                let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let weights: Vec<f64> = scores.iter().map(|s| (s - largest).exp()).collect();
                let sum: f64 = weights.iter().sum();
                let output = &mut output[query * width + head * head_dim..][..head_dim];
                for (key, weight) in weights.iter().enumerate() {
                    for (output, value) in output.iter_mut().zip(part(key, 2)) {
                        *output += weight / sum * value;
                    }
                }
            }
        }
    }
    output
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn activate(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::Gelu => 0.5 * x * (1.0 + erf(x / std::f64::consts::SQRT_2)),
        Activation::GeluNew => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Relu => x.max(0.0),
    }
}

/// Computes the error function by its series with terms of one sign, which has
/// no cancellation (Abramowitz and Stegun, 7.1.6).
fn erf(x: f64) -> f64 {
    if x.abs() > 6.0 {
        return x.signum();
    }
    let mut term = x;
    let mut sum = x;
    let mut denominator = 1.0;
    while term.abs() > sum.abs() * 1e-17 {
        denominator += 2.0;
        term *= 2.0 * x * x / denominator;
        sum += term;
    }
    std::f64::consts::FRAC_2_SQRT_PI * (-x * x).exp() * sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_error_function_is_exact() {
        for (x, expected) in [
            (0.0, 0.0),
            (0.5, 0.520_499_877_813_046_5),
            (-1.0, -0.842_700_792_949_714_9),
            (3.0, 0.999_977_909_503_001_4),
            (9.0, 1.0),
        ] {
            assert!((erf(x) - expected).abs() < 1e-14, "erf({x}) = {}", erf(x));
        }
    }

    #[test]
    fn likelihoods_sum_to_one() {
        let logits = [0.3, -2.0, 700.0, 699.0];
        let sum: f64 = (0..4)
            .map(|target| (-nll(&logits, &[target], 4)[0]).exp())
            .sum();
        assert!((sum - 1.0).abs() < 1e-12);
    }

    #[test]
    fn means_are_of_each_sequence() {
        let rows = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0];
        assert_eq!(means(&rows, 2, 2), [2.0, 3.0, 6.0, 7.0]);
    }
}
