//! Tests every kernel that this CPU has, against a naive reference in `f64`.
//!
//! Errors are relative to the largest value, which bounds what attention can
//! return: at most 2e-6 in `f32`, 1e-2 in bfloat16.
#![expect(
    clippy::cast_precision_loss,
    reason = "small whole numbers and 24-bit fractions"
)]

use proptest::prelude::*;

use super::*;

/// Computes softmax attention as it is written down, in `f64`: another way to
/// the same result, sharing nothing with the kernels.
fn reference(shape: AttentionShape, scale: f32, qkv: &[f32]) -> Vec<f64> {
    let width = shape.width();
    let row = |image: usize, position: usize, part: usize, head: usize| {
        let start = ((image * shape.positions + position) * 3 + part) * width;
        &qkv[start + head * shape.head_dim..][..shape.head_dim]
    };
    let mut output = vec![0.0; shape.batch * shape.positions * width];
    for image in 0..shape.batch {
        for head in 0..shape.heads {
            for position in 0..shape.positions {
                let query = row(image, position, 0, head);
                let scores: Vec<f64> = (0..=position)
                    .map(|key| {
                        let products = query.iter().zip(row(image, key, 1, head));
                        let dot: f64 = products.map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                        dot * f64::from(scale)
                    })
                    .collect();
                let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                let start = (image * shape.positions + position) * width + head * shape.head_dim;
                for (key, score) in scores.iter().enumerate() {
                    let weight = (score - max).exp() / sum;
                    let values = row(image, key, 2, head);
                    for (to, value) in output[start..].iter_mut().zip(values) {
                        *to += weight * f64::from(*value);
                    }
                }
            }
        }
    }
    output
}

/// Returns numbers from -0.5 to 0.5, the same for the same seed.
fn uniform(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u32 << 24) as f32 - 0.5
    }
}

/// Returns roughly normal numbers.
fn normal(seed: u64, len: usize) -> Vec<f32> {
    let mut uniform = uniform(seed);
    (0..len)
        .map(|_| (uniform() + uniform() + uniform() + uniform()) * 1.732)
        .collect()
}

fn len(shape: AttentionShape) -> usize {
    shape.batch * shape.positions * shape.width()
}

fn scale(shape: AttentionShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

fn attend(
    kernel: Kernel,
    shape: AttentionShape,
    scale: f32,
    qkv: &[f32],
    n_threads: usize,
) -> Vec<f32> {
    let mut output = vec![f32::NAN; len(shape)];
    CausalAttention::with_kernel(shape, scale, kernel)
        .unwrap()
        .run(qkv, &mut output, n_threads)
        .unwrap();
    output
}

fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL.into_iter().filter(|k| k.is_available())
}

/// Runs every kernel and returns the first that is too far off.
fn check(shape: AttentionShape, scale: f32, qkv: &[f32], n_threads: usize) -> Result<(), String> {
    let expected = reference(shape, scale, qkv);
    let largest = qkv
        .chunks_exact(3 * shape.width())
        .flat_map(|row| &row[2 * shape.width()..])
        .fold(f32::MIN_POSITIVE, |max, value| max.max(value.abs()));
    for kernel in kernels() {
        let output = attend(kernel, shape, scale, qkv, n_threads);
        let error = expected
            .iter()
            .zip(&output)
            .map(|(expected, actual)| (expected - f64::from(*actual)).abs())
            // A NaN is worse than any error.
            .fold(0.0, |max, error| if error <= max { max } else { error })
            / f64::from(largest);
        let tolerance = match kernel.precision() {
            AttentionPrecision::F32 => 2e-6,
            AttentionPrecision::Bf16 => 1e-2,
        };
        if error.is_nan() || error > tolerance {
            return Err(format!("{kernel:?} is {error:e} off for {shape:?}"));
        }
    }
    Ok(())
}

fn shapes() -> impl Strategy<Value = AttentionShape> {
    let head_dim = prop_oneof![
        1..20_usize,
        prop::sample::select(vec![8, 16, 24, 32, 48, 64, 80, 96, 128, 136]),
    ];
    let positions = prop_oneof![
        1..70_usize,
        70..200_usize,
        prop::sample::select(vec![59, 60, 61, 63, 64, 65, 127, 128, 129, 193]),
    ];
    (1..4_usize, positions, 1..4_usize, head_dim).prop_map(|(batch, positions, heads, head_dim)| {
        AttentionShape {
            batch,
            positions,
            heads,
            head_dim,
        }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn agrees_with_the_reference(shape in shapes(), seed: u64, n_threads in 1..4_usize) {
        let qkv = normal(seed, 3 * len(shape));
        check(shape, scale(shape), &qkv, n_threads).map_err(TestCaseError::fail)?;
    }

    /// Tests scores up to ten thousand either way, with exact products, so that
    /// all error is the softmax's. Runs of rising scores move the maximum all
    /// the way.
    #[test]
    fn large_scores_stay_stable(shape in shapes(), seed: u64, rising: bool) {
        let mut uniform = uniform(seed);
        let mut qkv = normal(seed, 3 * len(shape));
        let width = shape.width();
        for (position, row) in qkv.chunks_exact_mut(3 * width).enumerate() {
            let factor = if rising { (position % shape.positions) as f32 } else { 7.0 };
            for x in &mut row[..2 * width] {
                *x = (uniform() * 15.0).round();
            }
            if rising {
                row[..width].fill(1.0);
                row[width..2 * width].fill(factor);
            }
        }
        let largest = if rising { shape.positions * shape.head_dim } else { 49 * shape.head_dim };
        let scale = 1e4 / largest as f32;
        check(shape, scale, &qkv, 2).map_err(TestCaseError::fail)?;
    }

    #[test]
    fn is_causal_and_repeatable(shape in shapes(), seed: u64, cut: prop::sample::Index) {
        check_causal(shape, seed, cut.index(shape.positions)).map_err(TestCaseError::fail)?;
    }
}

/// Checks that input after `cut` changes nothing before it, not by one bit, and
/// that the number of threads changes nothing.
fn check_causal(shape: AttentionShape, seed: u64, cut: usize) -> Result<(), String> {
    let qkv = normal(seed, 3 * len(shape));
    let visible = (cut + 1) * shape.width();
    let mut changed = qkv.clone();
    for image in changed.chunks_exact_mut(shape.positions * 3 * shape.width()) {
        for x in &mut image[3 * visible..] {
            *x = *x * 50.0 + 3.0;
        }
    }
    for kernel in kernels() {
        let before = attend(kernel, shape, scale(shape), &qkv, 1);
        let after = attend(kernel, shape, scale(shape), &changed, 3);
        let images = shape.positions * shape.width();
        for (before, after) in before.chunks_exact(images).zip(after.chunks_exact(images)) {
            if before[..visible] != after[..visible] {
                return Err(format!("{kernel:?} looks past {cut} for {shape:?}"));
            }
        }
    }
    Ok(())
}

/// Tests that a query whose scores exceed the maximum does not change the
/// rounding of the 15 queries computed beside it, some of them before it, as
/// was once the case.
#[test]
fn queries_do_not_disturb_each_other() {
    let shape = AttentionShape {
        batch: 1,
        positions: 159,
        heads: 1,
        head_dim: 1,
    };
    for cut in 120..158 {
        check_causal(shape, 0, cut).unwrap();
    }
}

/// Tests the shapes of the published models, with fewer heads.
#[test]
fn agrees_at_full_length() {
    for head_dim in [64, 96, 128] {
        let shape = AttentionShape {
            batch: 1,
            positions: 1024,
            heads: 1,
            head_dim,
        };
        let qkv = normal(head_dim as u64, 3 * len(shape));
        check(shape, scale(shape), &qkv, 2).unwrap();
    }
}

/// Tests shapes small enough for Miri, which runs only the portable kernel: the
/// pointer arithmetic of all `f32` kernels is the same code.
#[test]
fn tiny_shapes() {
    for (batch, positions, heads, head_dim) in [
        (1, 1, 1, 1),
        (2, 5, 2, 3),
        (1, 9, 1, 8),
        (1, 17, 2, 7),
        (1, 62, 1, 2),
    ] {
        let shape = AttentionShape {
            batch,
            positions,
            heads,
            head_dim,
        };
        let qkv = normal(3, 3 * len(shape));
        check(shape, scale(shape), &qkv, 2).unwrap();
    }
}

#[test]
fn no_positions_is_no_work() {
    let shape = AttentionShape {
        batch: 2,
        positions: 0,
        heads: 2,
        head_dim: 8,
    };
    check(shape, 1.0, &[], 2).unwrap();
}

#[test]
fn refuses_what_it_cannot_do() {
    let shape = AttentionShape {
        batch: 1,
        positions: 2,
        heads: 2,
        head_dim: 8,
    };
    let check = |shape: AttentionShape, scale: f32, qkv: usize, output: usize| {
        CausalAttention::new(shape, scale, AttentionPrecision::F32)
            .and_then(|attention| attention.run(&vec![0.0; qkv], &mut vec![0.0; output], 1))
            .map_err(|error| error.to_string())
            .unwrap_err()
    };
    for (error, expected) in [
        (
            check(AttentionShape { heads: 0, ..shape }, 1.0, 0, 0),
            "at least one",
        ),
        (
            check(
                AttentionShape {
                    head_dim: 0,
                    ..shape
                },
                1.0,
                0,
                0,
            ),
            "at least one",
        ),
        (check(shape, 0.0, 96, 32), "above zero"),
        (check(shape, f32::NAN, 96, 32), "above zero"),
        (check(shape, 1.0, 95, 32), "qkv has 95 floats, not 96"),
        (check(shape, 1.0, 96, 33), "output has 33 floats, not 32"),
        (
            check(
                AttentionShape {
                    positions: usize::MAX / 8,
                    ..shape
                },
                1.0,
                0,
                0,
            ),
            "too large",
        ),
    ] {
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn the_fastest_kernel_is_available() {
    for precision in [AttentionPrecision::F32, AttentionPrecision::Bf16] {
        assert!(Kernel::fastest(precision).is_available());
    }
    assert_eq!(
        Kernel::fastest(AttentionPrecision::F32).precision(),
        AttentionPrecision::F32
    );
}
