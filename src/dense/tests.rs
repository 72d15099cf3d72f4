//! Every kernel, against sums in `f64`.
#![expect(
    clippy::cast_precision_loss,
    reason = "small whole numbers and 24-bit fractions"
)]

use proptest::prelude::*;

use super::*;

/// A product and what it is of.
#[derive(Clone)]
struct Call {
    inputs: usize,
    outputs: usize,
    weights: Vec<f32>,
    rows: Vec<f32>,
    bias: Option<Vec<f32>>,
    residual: Option<Vec<f32>>,
}

/// Numbers from -0.5 to 0.5, the same for the same seed.
fn uniform(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u32 << 24) as f32 - 0.5
    }
}

impl Call {
    fn random(n_rows: usize, [inputs, outputs]: [usize; 2], addends: u8, seed: u64) -> Self {
        let mut uniform = uniform(seed);
        let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| uniform()).collect() };
        Self {
            inputs,
            outputs,
            weights: floats(inputs * outputs),
            rows: floats(n_rows * inputs),
            bias: (addends & 1 == 1).then(|| floats(outputs)),
            residual: (addends & 2 == 2).then(|| floats(n_rows * outputs)),
        }
    }

    fn n_rows(&self) -> usize {
        self.rows.len() / self.inputs
    }

    fn pack(&self, kernel: Kernel) -> Panels {
        Panels::with_kernel(&self.weights, self.inputs, self.outputs, kernel).unwrap()
    }

    fn run(&self, panels: &Panels, n_threads: usize) -> Vec<f32> {
        let operands = Operands {
            rows: &self.rows,
            bias: self.bias.as_deref(),
            residual: self.residual.as_deref(),
        };
        let mut output = vec![f32::NAN; self.n_rows() * self.outputs];
        panels.run(operands, &mut output, n_threads).unwrap();
        output
    }

    /// One of its rows by itself.
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
                    .map(|(x, w)| f64::from(*x) * f64::from(*w))
                    .sum();
                let bias = self.bias.as_ref().map_or(0.0, |bias| bias[column]);
                let at = i * self.outputs + column;
                let residual = self.residual.as_ref().map_or(0.0, |residual| residual[at]);
                output.push(product + f64::from(bias) + f64::from(residual));
            }
        }
        output
    }
}

fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.is_available() && kernel.precision() == Precision::F32)
}

/// The results are near, and depend neither on threads nor on company.
fn check_call(call: &Call) -> Result<(), String> {
    let expected = call.reference();
    // Terms are up to a quarter, and about a ninth of that on average.
    let tolerance = 1e-6 * (call.inputs as f64).max(8.0).sqrt();
    for kernel in kernels() {
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
        let call = Call::random(n_rows, [inputs, outputs], addends, seed);
        check_call(&call).map_err(TestCaseError::fail)?;
    }
}

/// The widest product of imagegpt-small, for a full step.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn agrees_at_full_width() {
    check_call(&Call::random(16, [2048, 512], 3, 1)).unwrap();
}

/// Small enough for Miri, which runs only the portable kernel: the pointer
/// arithmetic of all is the same code.
#[test]
fn tiny_sizes() {
    for (n_rows, sizes, addends) in [
        (1, [1, 1], 0),
        (7, [3, 9], 3),
        (4, [2, 8], 1),
        (6, [5, 15], 2),
    ] {
        check_call(&Call::random(n_rows, sizes, addends, 2)).unwrap();
    }
}

/// What is not a number stays in its row and its column.
#[test]
fn a_row_that_is_not_finite_spoils_no_other() {
    let mut call = Call::random(5, [20, 40], 3, 3);
    let clean = call.clone();
    call.rows[2 * 20] = f32::NAN;
    for kernel in kernels() {
        let panels = call.pack(kernel);
        let (spoiled, clean) = (call.run(&panels, 1), clean.run(&panels, 1));
        for row in 0..5 {
            let at = row * 40..(row + 1) * 40;
            if row == 2 {
                assert!(spoiled[at].iter().all(|value| value.is_nan()));
            } else {
                assert_eq!(spoiled[at.clone()], clean[at], "{kernel:?}");
            }
        }
    }
}

#[test]
fn refuses_what_it_cannot_do() {
    let empty = Panels::pack(&[], 0, 4).unwrap_err();
    assert_eq!(
        empty,
        DenseError::Empty {
            inputs: 0,
            outputs: 4
        }
    );
    let short = Panels::pack(&[0.0; 11], 3, 4).unwrap_err();
    assert_eq!(short.to_string(), "weights of 11 floats, not 12");
    let large = Panels::pack(&[], usize::MAX / 2, 4).unwrap_err();
    assert!(large.to_string().contains("too large"), "{large}");
    let bf16 = Panels::with_kernel(&[0.0; 12], 3, 4, Kernel::Amx).unwrap_err();
    assert_eq!(bf16, DenseError::Kernel(Kernel::Amx));

    let panels = Panels::pack(&[0.0; 12], 3, 4).unwrap();
    let run = |n_rows: usize, n_bias: usize, n_residual: usize, n_output: usize| {
        let floats = [0.0; 16];
        let operands = Operands {
            rows: &floats[..n_rows],
            bias: Some(&floats[..n_bias]),
            residual: Some(&floats[..n_residual]),
        };
        let outcome = panels.run(operands, &mut [0.0; 16][..n_output], 1);
        outcome.map_err(|error| error.to_string())
    };
    assert_eq!(run(6, 4, 8, 8), Ok(()));
    assert_eq!(run(0, 4, 0, 0), Ok(()));
    for (lengths, expected) in [
        ([7, 4, 8, 8], "input of 7 floats, not 6"),
        ([6, 3, 8, 8], "bias of 3 floats, not 4"),
        ([6, 4, 9, 8], "residual of 9 floats, not 8"),
        ([6, 4, 8, 7], "output of 7 floats, not 8"),
    ] {
        let [rows, bias, residual, output] = lengths;
        let error = run(rows, bias, residual, output).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn weights_begin_on_a_large_page() {
    let pages = Pages::zeroed(100).unwrap();
    assert_eq!(pages.floats(), [0.0; 100]);
    assert!(pages.floats().as_ptr().addr().is_multiple_of(2 << 20));
}
