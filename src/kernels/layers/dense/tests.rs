//! Tests every kernel, against sums in `f64`.
#![expect(
    clippy::cast_precision_loss,
    reason = "small whole numbers and 24-bit fractions"
)]

use std::sync::atomic::{AtomicUsize, Ordering};

use proptest::prelude::*;

use super::*;
use crate::kernels::layers::tests::{uniform, ways};

/// A product: its weights and rows.
#[derive(Clone)]
struct Call<W> {
    inputs: usize,
    outputs: usize,
    weights: Vec<W>,
    rows: Vec<f32>,
    scales: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    residual: Option<Vec<f32>>,
}

/// Weights that are made from numbers between -0.5 and 0.5.
trait Tested: Weight + Into<f32> {
    fn from_uniform(uniform: f32) -> Self;
}

impl Tested for f32 {
    fn from_uniform(uniform: f32) -> Self {
        uniform
    }
}

impl Tested for bf16 {
    fn from_uniform(uniform: f32) -> Self {
        Self::from_f32(uniform)
    }
}

impl Tested for i8 {
    fn from_uniform(uniform: f32) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "within 127")]
        let weight = (uniform * 254.0) as Self;
        weight
    }
}

/// Returns a row's length that has room for whole panels.
fn stride(outputs: usize) -> usize {
    outputs.next_multiple_of(super::super::PANEL_WIDTH_MAX) + 16
}

/// Rows that are shared among threads.
struct Shared(Rows);

// SAFETY: no two threads take the same panel.
unsafe impl Sync for Shared {}

impl<W: Tested> Call<W> {
    fn random(n_rows: usize, [inputs, outputs]: [usize; 2], addends: u8, seed: u64) -> Self {
        let mut uniform = uniform(seed);
        let weights = (0..inputs * outputs)
            .map(|_| W::from_uniform(uniform()))
            .collect();
        let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| uniform()).collect() };
        Self {
            inputs,
            outputs,
            weights,
            rows: floats(n_rows * inputs),
            scales: (size_of::<W>() == 1).then(|| {
                let scales = floats(outputs).into_iter();
                scales.map(|scale| (scale + 0.6) / 254.0).collect()
            }),
            bias: (addends & 1 == 1).then(|| floats(outputs)),
            residual: (addends & 2 == 2).then(|| floats(n_rows * outputs)),
        }
    }

    fn n_rows(&self) -> usize {
        self.rows.len() / self.inputs
    }

    fn pack(&self, (kernel, rows_as): (Kernel, RowsAs)) -> Panels<W> {
        let dense = DenseWeights {
            weights: &self.weights,
            scales: self.scales.as_deref(),
            bias: self.bias.as_deref(),
        };
        Panels::pack(&dense, [self.inputs, self.outputs], kernel, rows_as).unwrap()
    }

    fn run(&self, panels: &Panels<W>, n_threads: usize) -> Vec<f32> {
        let stride = stride(self.outputs);
        let mut output = vec![f32::NAN; self.n_rows() * stride];
        if let Some(residual) = &self.residual {
            let rows = output.chunks_exact_mut(stride);
            for (to, from) in rows.zip(residual.chunks_exact(self.outputs)) {
                to[..self.outputs].copy_from_slice(from);
            }
        }
        let finish = match self.residual {
            Some(_) => Finish::Add,
            None => Finish::Set,
        };
        let stride_of_digits = DigitRows::stride(self.inputs);
        let mut digits = vec![0_u8; self.n_rows() * stride_of_digits];
        let digits = DigitRows {
            start: digits.as_mut_ptr(),
            stride: stride_of_digits,
        };
        if matches!(panels.packed, Packed::Bytes(_)) {
            for (idx, row) in self.rows.chunks_exact(self.inputs).enumerate() {
                let to = digits.row(idx);
                // SAFETY: panels of bytes are for a kernel that has digits.
                unsafe { digits::round(panels.kernel, row.as_ptr(), self.inputs, to) }
            }
        }
        let shared = Shared(Rows {
            n: self.n_rows(),
            input: self.rows.as_ptr(),
            input_stride: self.inputs,
            digits,
            output: output.as_mut_ptr(),
            output_stride: stride,
        });
        let next = AtomicUsize::new(0);
        let work = || {
            let Shared(rows) = &shared;
            loop {
                let panel = next.fetch_add(1, Ordering::Relaxed);
                if panel >= panels.len() {
                    break;
                }
                // SAFETY: the kernel is available, the panel this thread's, and
                // the rows have room for whole panels.
                unsafe { panels.compute(panel, *rows, finish, std::ptr::null()) }
            }
        };
        std::thread::scope(|scope| {
            for _ in 1..n_threads {
                scope.spawn(work);
            }
            work();
        });
        let rows = output.chunks_exact(stride);
        rows.flat_map(|row| &row[..self.outputs]).copied().collect()
    }

    /// Returns the call of one of its rows alone.
    fn alone(&self, row: usize) -> Self {
        let of = |values: &[f32], width: usize| values[row * width..][..width].to_vec();
        Self {
            rows: of(&self.rows, self.inputs),
            residual: self
                .residual
                .as_deref()
                .map(|residual| of(residual, self.outputs)),
            ..self.clone()
        }
    }

    fn reference(&self) -> Vec<f64> {
        let mut output = Vec::new();
        for (i, row) in self.rows.chunks_exact(self.inputs).enumerate() {
            for column in 0..self.outputs {
                let product: f64 = row
                    .iter()
                    .zip(self.weights[column..].iter().step_by(self.outputs))
                    .map(|(x, w)| f64::from(*x) * f64::from(Into::<f32>::into(*w)))
                    .sum();
                let scale = self.scales.as_ref().map_or(1.0, |scales| scales[column]);
                let product = product * f64::from(scale);
                let bias = self.bias.as_ref().map_or(0.0, |bias| bias[column]);
                let at = i * self.outputs + column;
                let residual = self.residual.as_ref().map_or(0.0, |residual| residual[at]);
                output.push(product + f64::from(bias) + f64::from(residual));
            }
        }
        output
    }
}

/// Checks that the results are near, and depend neither on threads nor on other
/// rows.
fn check_call<W: Tested>(call: &Call<W>) -> Result<(), String> {
    let expected = call.reference();
    // Terms are up to a quarter, and about a ninth of a quarter on average.
    let tolerance = 1e-6 * (call.inputs as f64).max(8.0).sqrt();
    for kernel in ways::<W>() {
        let panels = call.pack(kernel);
        let done = call.run(&panels, 1);
        for (at, (expected, actual)) in expected.iter().zip(&done).enumerate() {
            let error = (expected - f64::from(*actual)).abs();
            if error.is_nan() || error > tolerance {
                return Err(format!("{kernel:?} is {error:e} off at {at}"));
            }
        }
        if call.run(&panels, 3) != done {
            return Err(format!("{kernel:?} depends on threads"));
        }
        for (row, together) in done.chunks_exact(call.outputs).enumerate() {
            if call.alone(row).run(&panels, 1) != together {
                return Err(format!("{kernel:?}: row {row} depends on company"));
            }
        }
    }
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    #[cfg_attr(miri, ignore = "takes too long")]
    fn agrees_with_the_reference_and_depends_on_nothing_else(
        n_rows in 0..21_usize,
        inputs in 1..130_usize,
        outputs in 1..100_usize,
        addends in 0..4_u8,
        seed: u64,
    ) {
        let sizes = [inputs, outputs];
        check_call::<f32>(&Call::random(n_rows, sizes, addends, seed))
            .map_err(TestCaseError::fail)?;
        check_call::<bf16>(&Call::random(n_rows, sizes, addends, seed))
            .map_err(TestCaseError::fail)?;
        check_call::<i8>(&Call::random(n_rows, sizes, addends, seed))
            .map_err(TestCaseError::fail)?;
    }
}

/// Tests the widest product of imagegpt-small, for a full step.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn agrees_at_full_width() {
    check_call::<f32>(&Call::random(16, [2048, 512], 3, 1)).unwrap();
    check_call::<bf16>(&Call::random(16, [2048, 512], 3, 1)).unwrap();
    check_call::<i8>(&Call::random(16, [2048, 512], 3, 1)).unwrap();
}

/// Tests products small enough for Miri, which runs only the portable kernel:
/// the pointer arithmetic of all kernels is the same code.
#[test]
fn tiny_sizes() {
    for (n_rows, sizes, addends) in [
        (1, [1, 1], 0),
        (7, [3, 9], 3),
        (4, [2, 8], 1),
        (6, [5, 15], 2),
    ] {
        check_call::<f32>(&Call::random(n_rows, sizes, addends, 2)).unwrap();
        check_call::<bf16>(&Call::random(n_rows, sizes, addends, 2)).unwrap();
        check_call::<i8>(&Call::random(n_rows, sizes, addends, 2)).unwrap();
    }
}

/// Checks that a NaN stays in its row.
#[test]
fn a_row_that_is_not_finite_spoils_no_other() {
    check_spoiled(Call::<f32>::random(5, [20, 40], 3, 3));
    check_spoiled(Call::<bf16>::random(5, [20, 40], 3, 3));
    check_spoiled(Call::<i8>::random(5, [20, 40], 3, 3));
}

fn check_spoiled<W: Tested>(mut call: Call<W>) {
    let clean = call.clone();
    call.rows[2 * 20] = f32::NAN;
    for way in ways::<W>() {
        let panels = call.pack(way);
        let (spoiled, clean) = (call.run(&panels, 1), clean.run(&panels, 1));
        for row in 0..5 {
            let at = row * 40..(row + 1) * 40;
            if row == 2 {
                assert!(spoiled[at].iter().all(|value| value.is_nan()), "{way:?}");
            } else {
                assert_eq!(spoiled[at.clone()], clean[at], "{way:?}");
            }
        }
    }
}

/// Checks that a number a thousand times larger than the others, with weights
/// of zero, costs the others ten bits of 24, which is still nothing beside
/// weights of 8 bits.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn one_large_number_leaves_the_others_enough() {
    let (inputs, outputs) = (512, 64);
    let mut call = Call::<i8>::random(4, [inputs, outputs], 0, 9);
    call.weights[..outputs].fill(0);
    for row in call.rows.chunks_exact_mut(inputs) {
        row[0] = 500.0;
    }
    let expected = call.reference();
    let length = |of: &mut dyn Iterator<Item = f64>| of.map(|x| x * x).sum::<f64>().sqrt();
    for way in ways::<i8>() {
        let done = call.run(&call.pack(way), 1);
        let mut off = done.iter().zip(&expected).map(|(x, e)| f64::from(*x) - e);
        let off = length(&mut off) / length(&mut expected.iter().copied());
        assert!(off < 1e-4, "{way:?} is {off:e} off");
    }
}

/// Checks that sums of as many inputs as there may be, all as large as can be,
/// do not overflow.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn the_largest_numbers_are_added_up() {
    let inputs = digits::INPUTS_MAX;
    for (weight, x) in [(127, 1.0), (-128, 1.0), (-128, -1.0), (127, -1.0)] {
        let mut call = Call::<i8>::random(3, [inputs, 5], 0, 1);
        call.weights.fill(weight);
        call.rows.fill(x);
        call.scales = None;
        // Digits of all sizes beside the largest number.
        for (i, x) in call.rows.iter_mut().enumerate().skip(1) {
            *x *= [1.0, 0.999, 0.501, 0.0039][i % 4];
        }
        let expected = call.reference();
        for way in ways::<i8>() {
            if way.1 == RowsAs::Digits {
                let done = call.run(&call.pack(way), 1);
                for (expected, actual) in expected.iter().zip(&done) {
                    let off = expected / f64::from(*actual) - 1.0;
                    assert!(off.abs() < 2e-7, "{way:?} is {off:e} off");
                }
            }
        }
    }
}

#[test]
fn refuses_what_does_not_fit() {
    let pack = |n_weights: usize, n_scales: usize, n_bias: usize| {
        let floats = [0.0_f32; 16];
        let dense = DenseWeights {
            weights: &floats[..n_weights],
            scales: Some(&floats[..n_scales]),
            bias: Some(&floats[..n_bias]),
        };
        let panels = Panels::pack(&dense, [3, 4], Kernel::Portable, RowsAs::Floats);
        panels.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(pack(12, 4, 4), Ok(()));
    for (lengths, expected) in [
        ([11, 4, 4], "weights of 11 numbers, not 12"),
        ([12, 5, 4], "scales of 5 numbers, not 4"),
        ([12, 4, 3], "bias of 3 numbers, not 4"),
    ] {
        let [weights, scales, bias] = lengths;
        assert_eq!(pack(weights, scales, bias), Err(expected.to_owned()));
    }
    let dense = DenseWeights::<f32> {
        weights: &[],
        scales: None,
        bias: None,
    };
    let large = Panels::pack(
        &dense,
        [usize::MAX / 2, 4],
        Kernel::Portable,
        RowsAs::Floats,
    )
    .unwrap_err();
    assert!(large.to_string().contains("too large"), "{large}");
}

#[test]
fn weights_begin_on_a_large_page() {
    let pages = LargePages::<f32>::zeroed(100).unwrap();
    assert_eq!(pages.numbers(), [0.0; 100]);
    assert!(pages.numbers().as_ptr().addr().is_multiple_of(2 << 20));
}
