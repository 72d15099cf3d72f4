//! Every kernel with products in `f32`, against attention as it is written
//! down, in `f64`, over keys and values that were rounded like the cache's.
#![expect(
    clippy::cast_precision_loss,
    reason = "small whole numbers and 24-bit fractions"
)]

use half::bf16;
use proptest::prelude::*;

use super::*;

/// A call's input and the cache that it finds.
#[derive(Clone)]
struct Call<K> {
    shape: CacheShape,
    qkv: Vec<f32>,
    past: Vec<usize>,
    keys: Vec<K>,
    values: Vec<K>,
}

type Change = fn(&mut Call<bf16>);

/// Of what tests are made, besides what kernels need.
trait Tested: Kept + PartialEq + Into<f32> {}

impl Tested for f32 {}
impl Tested for bf16 {}

/// What a call leaves.
#[derive(Clone, Debug, PartialEq)]
struct Done<K> {
    output: Vec<f32>,
    keys: Vec<K>,
    values: Vec<K>,
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

impl<K: Tested> Call<K> {
    /// The cache is full of numbers, past each sequence's end as well.
    fn random(shape: CacheShape, past: Vec<usize>, seed: u64) -> Self {
        let mut uniform = uniform(seed);
        let (output, cache) = shape.lens().unwrap();
        let mut normal = move || (uniform() + uniform() + uniform() + uniform()) * 1.732;
        let mut cached = |len| -> Vec<K> { (0..len).map(|_| K::of(normal())).collect() };
        let (keys, values) = (cached(cache), cached(cache));
        let qkv = (0..3 * output).map(|_| normal()).collect();
        Self {
            shape,
            qkv,
            past,
            keys,
            values,
        }
    }

    fn run(&self, kernel: Kernel, n_threads: usize) -> Done<K> {
        let shape = self.shape;
        let mut done = Done {
            output: vec![f32::NAN; shape.batch * shape.length * shape.width()],
            keys: self.keys.clone(),
            values: self.values.clone(),
        };
        let cache = Cache {
            keys: &mut done.keys,
            values: &mut done.values,
        };
        CachedAttention::with_kernel(shape, scale(shape), kernel)
            .unwrap()
            .run(&self.qkv, &self.past, cache, &mut done.output, n_threads)
            .unwrap();
        done
    }

    fn new_row(&self, sequence: usize, token: usize, part: usize, head: usize) -> &[f32] {
        let CacheShape {
            length, head_dim, ..
        } = self.shape;
        let start = ((sequence * length + token) * 3 + part) * self.shape.width();
        &self.qkv[start + head * head_dim..][..head_dim]
    }

    fn reference(&self) -> Vec<f64> {
        let CacheShape {
            batch,
            length,
            heads,
            head_dim,
            ..
        } = self.shape;
        let mut output = vec![0.0; batch * length * heads * head_dim];
        for sequence in 0..batch {
            for head in 0..heads {
                for token in 0..length {
                    let query = self.new_row(sequence, token, 0, head);
                    let n_keys = self.past[sequence] + token + 1;
                    let scores: Vec<f64> = (0..n_keys)
                        .map(|position| {
                            let key =
                                |d| -> f32 { self.number(1, [sequence, head, position, d]).into() };
                            let dot: f64 = (0..head_dim)
                                .map(|d| f64::from(query[d]) * f64::from(key(d)))
                                .sum();
                            dot * f64::from(scale(self.shape))
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                    let start = ((sequence * length + token) * heads + head) * head_dim;
                    for (position, score) in scores.iter().enumerate() {
                        let weight = (score - max).exp() / sum;
                        for d in 0..head_dim {
                            let value: f32 = self.number(2, [sequence, head, position, d]).into();
                            output[start + d] += weight * f64::from(value);
                        }
                    }
                }
            }
        }
        output
    }

    /// A key's (part 1) or a value's (part 2) number after the call.
    fn number(&self, part: usize, [sequence, head, position, d]: [usize; 4]) -> K {
        match position.checked_sub(self.past[sequence]) {
            Some(token) if token < self.shape.length => {
                K::of(self.new_row(sequence, token, part, head)[d])
            }
            _ if part == 1 => self.keys[self.key_at([sequence, head, position, d])],
            _ => self.values[self.value_at([sequence, head, position, d])],
        }
    }

    fn key_at(&self, [sequence, head, position, d]: [usize; 4]) -> usize {
        let CacheShape {
            capacity,
            heads,
            head_dim,
            ..
        } = self.shape;
        let blocks = (sequence * heads + head) * (capacity / 16) + position / 16;
        (blocks * head_dim + d) * 16 + position % 16
    }

    fn value_at(&self, [sequence, head, position, d]: [usize; 4]) -> usize {
        let CacheShape {
            capacity,
            heads,
            head_dim,
            ..
        } = self.shape;
        ((sequence * heads + head) * capacity + position) * head_dim + d
    }

    /// The call of one of the sequences alone.
    fn alone(&self, sequence: usize) -> Self {
        let one = CacheShape {
            batch: 1,
            ..self.shape
        };
        let (output, cache) = one.lens().unwrap();
        let cached = sequence * cache..(sequence + 1) * cache;
        Self {
            shape: one,
            qkv: self.qkv[sequence * 3 * output..(sequence + 1) * 3 * output].to_vec(),
            past: vec![self.past[sequence]],
            keys: self.keys[cached.clone()].to_vec(),
            values: self.values[cached].to_vec(),
        }
    }

    /// The call of one of the tokens alone, over what `done` left; what comes
    /// after it is there already, and no number.
    fn token(&self, token: usize, done: &Done<K>) -> Self {
        let width = 3 * self.shape.width();
        let mut after = self.clone();
        after.keys.clone_from(&done.keys);
        after.values.clone_from(&done.values);
        after.shape.length = 1;
        after.qkv = self
            .qkv
            .chunks_exact(self.shape.length * width)
            .flat_map(|rows| rows[token * width..][..width].iter().copied())
            .collect();
        for past in &mut after.past {
            *past += token;
        }
        for sequence in 0..self.shape.batch {
            for head in 0..self.shape.heads {
                for position in after.past[sequence]..self.shape.capacity {
                    for d in 0..self.shape.head_dim {
                        let at = [sequence, head, position, d];
                        let (key, value) = (after.key_at(at), after.value_at(at));
                        after.keys[key] = K::of(f32::NAN);
                        after.values[value] = K::of(f32::INFINITY);
                    }
                }
            }
        }
        after
    }
}

fn scale(shape: CacheShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL
        .into_iter()
        .filter(|k| k.is_available() && k.precision() == Precision::F32)
}

/// The results are near, the cache is what it should be to the last bit, and
/// nothing depends on company, threads or what comes after.
fn check<K: Tested>(call: &Call<K>) -> Result<(), String> {
    let expected = call.reference();
    let shape = call.shape;
    for kernel in kernels() {
        let done = call.run(kernel, 1);
        let error = expected
            .iter()
            .zip(&done.output)
            .map(|(expected, actual)| (expected - f64::from(*actual)).abs())
            // Not a number is worse than any error.
            .fold(0.0, |max, error| if error <= max { max } else { error });
        // Numbers are up to 3.5.
        if error.is_nan() || error > 1e-5 {
            return Err(format!("{kernel:?} is {error:e} off for {shape:?}"));
        }
        for sequence in 0..shape.batch {
            for head in 0..shape.heads {
                for position in 0..shape.capacity {
                    for d in 0..shape.head_dim {
                        let at = [sequence, head, position, d];
                        let key = done.keys[call.key_at(at)];
                        let value = done.values[call.value_at(at)];
                        if (key, value) != (call.number(1, at), call.number(2, at)) {
                            return Err(format!("{kernel:?} spoils {at:?} of {shape:?}"));
                        }
                    }
                }
            }
        }
        if call.run(kernel, 3) != done {
            return Err(format!("{kernel:?} depends on threads for {shape:?}"));
        }
        for sequence in 0..shape.batch {
            let alone = call.alone(sequence).run(kernel, 2);
            let (output, cache) = call.alone(sequence).shape.lens().unwrap();
            if alone.output != done.output[sequence * output..][..output]
                || alone.keys != done.keys[sequence * cache..][..cache]
            {
                return Err(format!("{kernel:?} depends on company for {shape:?}"));
            }
        }
        for token in 0..shape.length {
            let one = call.token(token, &done).run(kernel, 1);
            let width = shape.width();
            let rows = done.output.chunks_exact(shape.length * width);
            for (rows, row) in rows.zip(one.output.chunks_exact(width)) {
                if rows[token * width..][..width] != *row {
                    return Err(format!(
                        "{kernel:?}: token {token} depends on those beside it for {shape:?}"
                    ));
                }
            }
        }
    }
    Ok(())
}

/// A shape, and what each sequence has already.
fn calls() -> impl Strategy<Value = (CacheShape, Vec<usize>)> {
    let head_dim = prop_oneof![
        1..20_usize,
        prop::sample::select(vec![8, 16, 24, 64, 96, 128, 136]),
    ];
    let length = prop_oneof![3 => Just(1_usize), 2 => 2..20_usize];
    (1..4_usize, length, 1..10_usize, 1..4_usize, head_dim).prop_flat_map(
        |(batch, length, blocks, heads, head_dim)| {
            let shape = CacheShape {
                batch,
                length,
                capacity: (16 * blocks).max(length.next_multiple_of(16)),
                heads,
                head_dim,
            };
            let past = prop::collection::vec(0..=shape.capacity - length, batch);
            (Just(shape), past)
        },
    )
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    #[cfg_attr(miri, ignore = "takes too long")]
    fn agrees_with_the_reference_and_depends_on_nothing_else(
        (shape, past) in calls(),
        seed: u64,
    ) {
        check::<bf16>(&Call::random(shape, past.clone(), seed)).map_err(TestCaseError::fail)?;
        check::<f32>(&Call::random(shape, past, seed)).map_err(TestCaseError::fail)?;
    }
}

/// A model of this size, in the middle of an image and at its end; and a chunk
/// of a primer.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn agrees_at_full_length() {
    for head_dim in [64, 96, 128] {
        for (length, past) in [(1, [0, 511, 1023]), (64, [0, 448, 960])] {
            let shape = CacheShape {
                batch: 3,
                length,
                capacity: 1024,
                heads: 2,
                head_dim,
            };
            near::<bf16>(&Call::random(shape, past.to_vec(), head_dim as u64));
            near::<f32>(&Call::random(shape, past.to_vec(), head_dim as u64));
        }
    }
}

fn near<K: Tested>(call: &Call<K>) {
    let done = call.run(Kernel::fastest(Precision::F32), 2);
    for (expected, actual) in call.reference().iter().zip(done.output) {
        assert!((expected - f64::from(actual)).abs() < 1e-5);
    }
}

/// Small enough for Miri, which runs only the portable kernel: the pointer
/// arithmetic of all is the same code.
#[test]
fn tiny_shapes() {
    for (length, capacity, heads, head_dim, past) in [
        (1, 16, 1, 1, [0, 15]),
        (1, 32, 2, 3, [16, 31]),
        (5, 32, 1, 7, [3, 27]),
        (2, 16, 2, 20, [0, 14]),
    ] {
        let shape = CacheShape {
            batch: 2,
            length,
            capacity,
            heads,
            head_dim,
        };
        check::<bf16>(&Call::random(shape, past.to_vec(), 3)).unwrap();
        check::<f32>(&Call::random(shape, past.to_vec(), 3)).unwrap();
    }
}

/// Scores far apart, on the last of which everything rests.
#[test]
fn large_scores_stay_stable() {
    let shape = CacheShape {
        batch: 1,
        length: 1,
        capacity: 64,
        heads: 1,
        head_dim: 8,
    };
    let mut call = Call::<bf16>::random(shape, vec![40], 5);
    for (d, x) in call.qkv.iter_mut().enumerate() {
        *x = if d < 16 { 60.0 } else { 2.0 };
    }
    for kernel in kernels() {
        assert_eq!(call.run(kernel, 1).output, [2.0; 8], "{kernel:?}");
    }
}

#[test]
fn nothing_new_is_no_work() {
    let shape = CacheShape {
        batch: 2,
        length: 0,
        capacity: 16,
        heads: 2,
        head_dim: 8,
    };
    check::<bf16>(&Call::random(shape, vec![3, 16], 1)).unwrap();
}

#[test]
fn refuses_what_it_cannot_do() {
    let shape = CacheShape {
        batch: 1,
        length: 2,
        capacity: 16,
        heads: 2,
        head_dim: 8,
    };
    let good = Call::random(shape, vec![3], 1);
    let run = |change: Change| {
        let mut call = good.clone();
        change(&mut call);
        let cache = Cache {
            keys: &mut call.keys,
            values: &mut call.values,
        };
        let mut output = vec![0.0; 32];
        CachedAttention::new(call.shape, 1.0)
            .and_then(|attention| attention.run(&call.qkv, &call.past, cache, &mut output, 1))
            .map_err(|error| error.to_string())
    };
    let refused: [(Change, &str); 9] = [
        (|call| call.shape.heads = 0, "at least one"),
        (|call| call.shape.capacity = 24, "whole blocks of 16"),
        (|call| call.shape.batch = usize::MAX / 64, "too large"),
        (|call| call.shape.length = 1, "qkv has 96 numbers, not 48"),
        (|call| call.past.push(0), "past has 2 numbers, not 1"),
        (|call| call.keys.truncate(255), "keys has 255"),
        (|call| call.values.push(bf16::ZERO), "values has 257"),
        (|call| call.past[0] = 15, "15 tokens and 2 more outgrows"),
        (|call| call.past[0] = usize::MAX, "outgrows"),
    ];
    for (change, expected) in refused {
        let error = run(change).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
    assert_eq!(run(|call| call.past[0] = 14), Ok(()));
    let amx = CachedAttention::with_kernel(shape, 1.0, Kernel::Amx).unwrap_err();
    assert_eq!(amx, AttentionError::Kernel(Kernel::Amx));
    let scale = CachedAttention::new(shape, f32::NAN).unwrap_err();
    assert!(scale.to_string().contains("above zero"), "{scale}");
}
