//! Tests every kernel with products in `f32`, against attention as it is
//! written down, in `f64`, over keys and values that were rounded as the cache
//! rounds them.
#![expect(
    clippy::cast_precision_loss,
    reason = "small whole numbers and 24-bit fractions"
)]

use half::bf16;
use proptest::prelude::*;

use super::*;
use crate::kernels::attention::Int24;

/// Input of a call, and the cache that the call finds.
#[derive(Clone)]
struct Call<K: Tested> {
    shape: CacheShape,
    qkv: Vec<f32>,
    past: Vec<usize>,
    prefixes: Vec<SharedPrefix>,
    kept: [Vec<K::Element>; 2],
}

type Change = fn(&mut Call<bf16>);

/// Keys and values are parts 1 and 2 of a row.
const PARTS: [usize; 2] = [1, 2];

/// Format of kept numbers, with what tests need besides what kernels need.
trait Tested: Kept<Element: PartialEq + Default> {
    /// Reads a number from its elements and those of its factor.
    fn read(number: &[Self::Element], factor: &[Self::Element]) -> f32;
}

impl Tested for bf16 {
    fn read(number: &[bf16], _factor: &[bf16]) -> f32 {
        number[0].to_f32()
    }
}

impl Tested for Int24 {
    fn read(number: &[u8], factor: &[u8]) -> f32 {
        let factor = f32::from_ne_bytes(factor.try_into().unwrap());
        i32::from_le_bytes([0, number[0], number[1], number[2]]) as f32 * factor
    }
}

/// Output and cache after a call.
#[derive(Clone, Debug, PartialEq)]
struct Done<E> {
    output: Vec<f32>,
    kept: [Vec<E>; 2],
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

impl<K: Tested> Call<K> {
    /// Creates a call whose cache is full of numbers, past each sequence's end
    /// as well.
    fn random(shape: CacheShape, past: Vec<usize>, seed: u64) -> Self {
        let mut uniform = uniform(seed);
        let (output, _) = shape.lens().unwrap();
        let mut normal = move || (uniform() + uniform() + uniform() + uniform()) * 1.732;
        let n_rows = shape.batch * shape.heads * shape.capacity;
        let len = n_rows * K::position_len(shape.head_dim);
        let mut call = Self {
            shape,
            qkv: Vec::new(),
            past,
            prefixes: Vec::new(),
            kept: [(); 2].map(|()| vec![K::Element::default(); len]),
        };
        for part in PARTS {
            for at in positions(shape, |_| 0..shape.capacity) {
                let row: Vec<f32> = (0..shape.head_dim).map(|_| normal()).collect();
                call.put(part, at, &row);
            }
        }
        call.qkv = (0..3 * output).map(|_| normal()).collect();
        call
    }

    fn run(&self, kernel: Kernel, n_threads: usize) -> Done<K::Element> {
        let shape = self.shape;
        let mut output = vec![f32::NAN; shape.batch * shape.length * shape.width()];
        let [mut keys, mut values] = self.kept.clone();
        let cache = KeyValueCache::<K> {
            keys: &mut keys,
            values: &mut values,
        };
        CachedAttention::with_kernel(shape, scale(shape), kernel)
            .unwrap()
            .run(
                &self.qkv,
                &self.past,
                &self.prefixes,
                cache,
                &mut output,
                n_threads,
            )
            .unwrap();
        Done {
            output,
            kept: [keys, values],
        }
    }

    /// Returns the elements of a number, and of its factor.
    fn place(
        &self,
        part: usize,
        [sequence, head, position]: [usize; 3],
        d: usize,
    ) -> [std::ops::Range<usize>; 2] {
        let CacheShape {
            capacity,
            heads,
            head_dim,
            ..
        } = self.shape;
        let block = (sequence * heads + head) * (capacity / 16) + position / 16;
        let start = block * 16 * K::position_len(head_dim);
        let lane = position % 16;
        let number = if part == 1 {
            d * 16 + lane
        } else {
            lane * head_dim + d
        };
        let number = start + number * K::PER_NUMBER;
        let factor = start + 16 * head_dim * K::PER_NUMBER + lane * K::PER_FACTOR;
        [
            number..number + K::PER_NUMBER,
            factor..factor + K::PER_FACTOR,
        ]
    }

    /// Puts a position's numbers into the cache.
    fn put(&mut self, part: usize, at: [usize; 3], row: &[f32]) {
        let by = K::factor(row);
        for (d, value) in row.iter().enumerate() {
            let [number, factor] = self.place(part, at, d);
            let kept = &mut self.kept[part - 1];
            // SAFETY: both are within the cache.
            unsafe {
                K::put_row(&[*value], by, kept[number].as_mut_ptr(), 0);
                K::put_factor(by, kept[factor].as_mut_ptr());
            }
        }
    }

    /// Returns the same call with its keys and values in the cache.
    fn after(&self) -> Self {
        let mut after = self.clone();
        let CacheShape { length, .. } = self.shape;
        for part in PARTS {
            let new = |sequence: usize| self.past[sequence]..self.past[sequence] + length;
            for at in positions(self.shape, new) {
                let [sequence, head, position] = at;
                let token = position - self.past[sequence];
                after.put(part, at, self.new_row(sequence, token, part, head));
            }
        }
        after
    }

    fn number(&self, part: usize, at: [usize; 3], d: usize) -> f64 {
        let [number, factor] = self.place(part, at, d);
        let kept = &self.kept[part - 1];
        K::read(&kept[number], &kept[factor]).into()
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
        let after = self.after();
        let mut output = vec![0.0; batch * length * heads * head_dim];
        for sequence in 0..batch {
            for head in 0..heads {
                for token in 0..length {
                    let query = self.new_row(sequence, token, 0, head);
                    let n_keys = self.past[sequence] + token + 1;
                    let scores: Vec<f64> = (0..n_keys)
                        .map(|position| {
                            let key = |d| after.number(1, [sequence, head, position], d);
                            let dot: f64 =
                                (0..head_dim).map(|d| f64::from(query[d]) * key(d)).sum();
                            dot * f64::from(scale(self.shape))
                        })
                        .collect();
                    let max = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|score| (score - max).exp()).sum();
                    let start = ((sequence * length + token) * heads + head) * head_dim;
                    for (position, score) in scores.iter().enumerate() {
                        let weight = (score - max).exp() / sum;
                        for d in 0..head_dim {
                            let value = after.number(2, [sequence, head, position], d);
                            output[start + d] += weight * value;
                        }
                    }
                }
            }
        }
        output
    }

    /// Returns the call of one of the sequences alone.
    fn alone(&self, sequence: usize) -> Self {
        let one = CacheShape {
            batch: 1,
            ..self.shape
        };
        let (output, _) = one.lens().unwrap();
        let part = |kept: &Vec<K::Element>| {
            let len = kept.len() / self.shape.batch;
            kept[sequence * len..][..len].to_vec()
        };
        Self {
            shape: one,
            qkv: self.qkv[sequence * 3 * output..(sequence + 1) * 3 * output].to_vec(),
            past: vec![self.past[sequence]],
            prefixes: Vec::new(),
            kept: self.kept.each_ref().map(part),
        }
    }

    /// Copies a sequence's first positions from another sequence, in every
    /// head.
    fn share(&mut self, sequence: usize, prefix: SharedPrefix) {
        let CacheShape {
            capacity,
            heads,
            head_dim,
            ..
        } = self.shape;
        let position_len = K::position_len(head_dim);
        let blocks = prefix.len.next_multiple_of(BLOCK);
        for kept in &mut self.kept {
            for head in 0..heads {
                let at = |of: usize| (of * heads + head) * capacity * position_len;
                let from = at(prefix.of);
                kept.copy_within(from..from + blocks * position_len, at(sequence));
            }
        }
    }

    /// Returns the call of one of the tokens alone, over the cache that `done`
    /// left. Positions after the token are there already, and hold NaN or
    /// infinity.
    fn token(&self, token: usize, done: &Done<K::Element>) -> Self {
        let width = 3 * self.shape.width();
        let mut after = self.clone();
        after.kept.clone_from(&done.kept);
        after.shape.length = 1;
        after.qkv = self
            .qkv
            .chunks_exact(self.shape.length * width)
            .flat_map(|rows| rows[token * width..][..width].iter().copied())
            .collect();
        for past in &mut after.past {
            *past += token;
        }
        let past = after.past.clone();
        for at in positions(self.shape, |sequence| past[sequence]..self.shape.capacity) {
            after.put(1, at, &vec![f32::NAN; self.shape.head_dim]);
            after.put(2, at, &vec![f32::INFINITY; self.shape.head_dim]);
        }
        after
    }
}

/// Returns some positions of every sequence and head.
fn positions(
    shape: CacheShape,
    of: impl Fn(usize) -> std::ops::Range<usize>,
) -> impl Iterator<Item = [usize; 3]> {
    (0..shape.batch).flat_map(move |sequence| {
        let range = of(sequence);
        (0..shape.heads).flat_map(move |head| range.clone().map(move |at| [sequence, head, at]))
    })
}

fn scale(shape: CacheShape) -> f32 {
    1.0 / (shape.head_dim as f32).sqrt()
}

fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL
        .into_iter()
        .filter(|k| k.is_available() && k.precision() == AttentionPrecision::F32)
}

/// Checks that the results are near, that the cache is right to the last bit,
/// and that nothing depends on other sequences, on threads or on later
/// positions.
fn check<K: Tested>(call: &Call<K>) -> Result<(), String> {
    let expected = call.reference();
    let shape = call.shape;
    for kernel in kernels() {
        let done = call.run(kernel, 1);
        let error = expected
            .iter()
            .zip(&done.output)
            .map(|(expected, actual)| (expected - f64::from(*actual)).abs())
            // A NaN is worse than any error.
            .fold(0.0, |max, error| if error <= max { max } else { error });
        // Numbers are up to 3.5.
        if error.is_nan() || error > 1e-5 {
            return Err(format!("{kernel:?} is {error:e} off for {shape:?}"));
        }
        if done.kept != call.after().kept {
            return Err(format!("{kernel:?} spoils the cache of {shape:?}"));
        }
        if call.run(kernel, 3) != done {
            return Err(format!("{kernel:?} depends on threads for {shape:?}"));
        }
        for sequence in 0..shape.batch {
            let alone = call.alone(sequence).run(kernel, 2);
            let (output, _) = call.alone(sequence).shape.lens().unwrap();
            let same = |kept: &Vec<K::Element>, all: &Vec<K::Element>| {
                kept[..] == all[sequence * kept.len()..][..kept.len()]
            };
            if alone.output != done.output[sequence * output..][..output]
                || !alone
                    .kept
                    .iter()
                    .zip(&done.kept)
                    .all(|(kept, all)| same(kept, all))
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

/// Generates a shape, and the number of tokens that each sequence has already.
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
        check::<Int24>(&Call::random(shape, past, seed)).map_err(TestCaseError::fail)?;
    }
}

/// Tests heads as large as those of a model, in the middle of an image and at
/// its end; and with a chunk of a primer.
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
            near::<Int24>(&Call::random(shape, past.to_vec(), head_dim as u64));
        }
    }
}

fn near<K: Tested>(call: &Call<K>) {
    let done = call.run(Kernel::fastest(AttentionPrecision::F32), 2);
    for (expected, actual) in call.reference().iter().zip(done.output) {
        assert!((expected - f64::from(actual)).abs() < 1e-5);
    }
}

/// Tests groups of every size into which tiles are cut, one after the other and
/// mixed with sequences that share nothing, less than a block, or another's
/// past to its last token.
fn begin_alike<K: Tested>(head_dim: usize, capacity: usize, kernels: impl Iterator<Item = Kernel>) {
    let shape = CacheShape {
        batch: 13,
        length: 1,
        capacity,
        heads: 2,
        head_dim,
    };
    let past: Vec<usize> = (0..13).map(|idx| capacity - 1 - idx % 5 * 3).collect();
    let mut call = Call::<K>::random(shape, past, head_dim as u64);
    let mut prefixes: Vec<_> = (0..13).map(|of| SharedPrefix { of, len: 0 }).collect();
    let mut joins = |sequence: usize, of: usize, len: usize| {
        let prefix = SharedPrefix { of, len };
        call.share(sequence, prefix);
        prefixes[sequence] = prefix;
    };
    for sequence in [2, 3, 5, 7, 8, 11] {
        joins(sequence, 0, capacity - 14 - sequence);
    }
    joins(4, 1, 16);
    joins(9, 6, 15);
    joins(12, 10, capacity - 13);
    for kernel in kernels {
        let apart = call.run(kernel, 1);
        let mut alike = call.clone();
        alike.prefixes.clone_from(&prefixes);
        for n_threads in [1, 3] {
            assert!(
                alike.run(kernel, n_threads) == apart,
                "{kernel:?} {head_dim}"
            );
        }
        // The prefix is read in the sequence that shares it.
        for at in positions(shape, |sequence| {
            0..usize::from(sequence == 4) * prefixes[4].len
        }) {
            alike.put(1, at, &vec![f32::NAN; head_dim]);
            alike.put(2, at, &vec![f32::NAN; head_dim]);
        }
        assert!(alike.run(kernel, 1).output == apart.output, "{kernel:?}");
        alike.prefixes.clear();
        assert!(alike.run(kernel, 1).output != apart.output, "{kernel:?}");
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn what_begins_alike_is_read_once_and_changes_nothing() {
    for head_dim in [3, 8, 20, 64, 96, 128] {
        begin_alike::<bf16>(head_dim, 160, kernels());
        begin_alike::<Int24>(head_dim, 160, kernels());
    }
}

/// Tests a small case of the same for Miri.
#[test]
fn a_tiny_beginning_is_read_once() {
    begin_alike::<Int24>(3, 48, [Kernel::Portable].into_iter());
}

#[test]
fn a_prefix_that_nobody_has_is_refused() {
    let shape = CacheShape {
        batch: 3,
        capacity: 32,
        ..ONE_HEAD
    };
    let tasks = |shape, prefixes: &[(usize, usize)]| {
        let prefix = |&(of, len): &(usize, usize)| SharedPrefix { of, len };
        let prefixes: Vec<_> = prefixes.iter().map(prefix).collect();
        HeadTasks::new(shape, &[20, 30, 20], &prefixes, Kernel::Portable).map(|tasks| tasks.0.len())
    };
    assert_eq!(tasks(shape, &[]), Ok(3));
    assert_eq!(tasks(shape, &[(0, 20), (1, 99), (0, 0)]), Ok(3), "its own");
    assert_eq!(tasks(shape, &[(0, 0), (0, 20), (0, 20)]), Ok(2));
    assert_eq!(tasks(shape, &[(1, 20), (1, 0), (1, 16)]), Ok(2));
    for prefixes in [
        // Prefixes that are longer than one sequence's past, longer than the
        // other's past, of a sequence that does not exist, and of a sequence
        // that shares a prefix itself.
        [(0, 0), (0, 21), (0, 0)],
        [(0, 0), (1, 0), (1, 21)],
        [(0, 0), (3, 1), (0, 0)],
        [(0, 0), (0, 20), (1, 20)],
    ] {
        assert!(matches!(
            tasks(shape, &prefixes),
            Err(AttentionError::Prefix { .. })
        ));
    }
    let error = tasks(shape, &[(0, 0), (0, 20)]).unwrap_err();
    assert_eq!(
        error.to_string(),
        "2 shared prefixes for 3 sequences: there must be none, or one per sequence"
    );
    let several = CacheShape { length: 2, ..shape };
    assert!(tasks(several, &[(0, 0), (0, 16), (0, 0)]).is_err());
}

/// Tests shapes small enough for Miri, which runs only the portable kernel: the
/// pointer arithmetic of all kernels is the same code.
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
        check::<Int24>(&Call::random(shape, past.to_vec(), 3)).unwrap();
    }
}

/// Shape of one token of a sequence with one head.
const ONE_HEAD: CacheShape = CacheShape {
    batch: 1,
    length: 1,
    capacity: 64,
    heads: 1,
    head_dim: 8,
};

/// Tests scores that are far apart, so that everything rests on the last score.
#[test]
fn large_scores_stay_stable() {
    let mut call = Call::<bf16>::random(ONE_HEAD, vec![40], 5);
    for (d, x) in call.qkv.iter_mut().enumerate() {
        *x = if d < 16 { 60.0 } else { 2.0 };
    }
    for kernel in kernels() {
        assert_eq!(call.run(kernel, 1).output, [2.0; 8], "{kernel:?}");
    }
}

/// Checks that a value of no weight does not show, however large it is, and
/// that of tiny values nothing is left but themselves.
#[test]
fn nothing_is_seen_of_what_has_no_weight() {
    let mut call = Call::<Int24>::random(ONE_HEAD, vec![40], 5);
    call.qkv[..8].fill(10.0);
    for position in 0..40 {
        let (key, value) = if position == 7 {
            (-10.0, 1e25)
        } else {
            (1.0, 1e-12)
        };
        call.put(1, [0, 0, position], &[key; 8]);
        call.put(2, [0, 0, position], &[value; 8]);
    }
    call.qkv[8..16].fill(1.0);
    call.qkv[16..].fill(1e-12);
    for kernel in kernels() {
        for value in call.run(kernel, 1).output {
            assert!((value - 1e-12).abs() < 1e-18, "{kernel:?}: {value:e}");
        }
    }
}

/// Checks tokens at the edge of what has weight, alone and several at the same
/// time: their place among others changes no bit.
#[test]
fn what_comes_after_counts_nothing() {
    let shape = CacheShape {
        batch: 1,
        length: 20,
        capacity: 48,
        heads: 1,
        head_dim: 1,
    };
    let mut call = Call::<Int24>::random(shape, vec![3], 9);
    for (position, key) in [-48.0, -24.0, 0.0].into_iter().enumerate() {
        call.put(1, [0, 0, position], &[key * std::f32::consts::LN_2]);
        call.put(2, [0, 0, position], &[1.0]);
    }
    for row in call.qkv.chunks_exact_mut(3) {
        row.copy_from_slice(&[1.0, -64.0 * std::f32::consts::LN_2, 1.0]);
    }
    check::<Int24>(&call).unwrap();
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
        let [keys, values] = &mut call.kept;
        let cache = KeyValueCache::<bf16> { keys, values };
        let mut output = vec![0.0; 32];
        CachedAttention::new(call.shape, 1.0)
            .and_then(|attention| attention.run(&call.qkv, &call.past, &[], cache, &mut output, 1))
            .map_err(|error| error.to_string())
    };
    let refused: [(Change, &str); 9] = [
        (|call| call.shape.heads = 0, "at least one"),
        (|call| call.shape.capacity = 24, "whole blocks of 16"),
        (|call| call.shape.batch = usize::MAX / 64, "too large"),
        (|call| call.shape.length = 1, "qkv has 96 numbers, not 48"),
        (|call| call.past.push(0), "past has 2 numbers, not 1"),
        (|call| call.kept[0].truncate(255), "keys has 255"),
        (|call| call.kept[1].push(bf16::ZERO), "values has 257"),
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
