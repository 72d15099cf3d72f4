//! Tests all kernels and precisions, step by step over a cache, against layers
//! as they are written down, in `f64`, over whole sequences.
#![expect(
    clippy::cast_precision_loss,
    reason = "small whole numbers and 24-bit fractions"
)]

use half::bf16;

use super::*;
use crate::kernels::attention::Int24;

/// Returns numbers from -0.5 to 0.5, the same for the same seed.
pub(in crate::kernels) fn uniform(seed: u64) -> impl FnMut() -> f32 {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1_u32 << 24) as f32 - 0.5
    }
}

pub(in crate::kernels) trait Tested: Weight + Into<f32> {
    /// Returns a weight of about `value`, if its scale is a hundredth.
    fn of(value: f32) -> Self;
    const SCALE: f32;
}

impl Tested for f32 {
    const SCALE: f32 = 1.0;

    fn of(value: f32) -> Self {
        value
    }
}

impl Tested for bf16 {
    const SCALE: f32 = 1.0;

    fn of(value: f32) -> Self {
        Self::from_f32(value)
    }
}

impl Tested for i8 {
    const SCALE: f32 = 0.01;

    fn of(value: f32) -> Self {
        #[expect(clippy::cast_possible_truncation, reason = "within 127")]
        let weight = (value * 100.0).round() as Self;
        weight
    }
}

pub(in crate::kernels) struct Dense<W> {
    weights: Vec<W>,
    scales: Vec<f32>,
    bias: Vec<f32>,
}

impl<W: Tested> Dense<W> {
    fn random([inputs, outputs]: [usize; 2], uniform: &mut impl FnMut() -> f32) -> Self {
        // Results are about as large as the input.
        let size = 3.4 / (inputs as f32).sqrt();
        Self {
            weights: (0..inputs * outputs)
                .map(|_| W::of(size.min(2.0) * uniform()))
                .collect(),
            scales: vec![W::SCALE; outputs],
            bias: (0..outputs).map(|_| 0.2 * uniform()).collect(),
        }
    }

    fn weights(&self) -> DenseWeights<'_, W> {
        DenseWeights {
            weights: &self.weights,
            scales: (size_of::<W>() == 1).then_some(&self.scales),
            bias: Some(&self.bias),
        }
    }

    fn reference(&self, rows: &[f64]) -> Vec<f64> {
        let outputs = self.bias.len();
        let inputs = self.weights.len() / outputs;
        let mut found = Vec::new();
        for row in rows.chunks_exact(inputs) {
            for output in 0..outputs {
                let column = self.weights[output..].iter().step_by(outputs);
                let products = row.iter().zip(column).map(|(x, w)| {
                    let weight: f32 = (*w).into();
                    x * f64::from(weight) * f64::from(self.scales[output])
                });
                found.push(products.sum::<f64>() + f64::from(self.bias[output]));
            }
        }
        found
    }
}

pub(in crate::kernels) struct LayerOf<W> {
    norms: [Vec<f32>; 2],
    scale: f32,
    products: [Dense<W>; 4],
}

/// A few layers, and input rows for some sequences.
pub(in crate::kernels) struct Model<W> {
    pub(in crate::kernels) sizes: Sizes,
    layers: Vec<LayerOf<W>>,
    /// Input rows of each sequence.
    pub(in crate::kernels) rows: Vec<Vec<f32>>,
}

impl<W: Tested> Model<W> {
    pub(in crate::kernels) fn random(
        sizes: Sizes,
        n_layers: usize,
        n_sequences: usize,
        n_tokens: usize,
    ) -> Self {
        let mut uniform = uniform(7);
        let (width, inner) = (sizes.width, sizes.inner_width);
        let layers = (0..n_layers).map(|idx| LayerOf {
            norms: [(); 2].map(|()| (0..width).map(|_| 1.0 + uniform()).collect()),
            scale: 0.3 / (idx + 1) as f32,
            products: [
                [width, 3 * width],
                [width, width],
                [width, inner],
                [inner, width],
            ]
            .map(|sizes| Dense::random(sizes, &mut uniform)),
        });
        let layers = layers.collect();
        let rows = (0..n_sequences)
            .map(|_| (0..n_tokens * width).map(|_| 2.0 * uniform()).collect())
            .collect();
        Self {
            sizes,
            layers,
            rows,
        }
    }

    fn pack(&self, (kernel, rows_as): (Kernel, RowsAs)) -> StepLayers<W> {
        StepLayers::with_kernel(self.sizes, self.layers(), kernel, rows_as).unwrap()
    }

    pub(in crate::kernels) fn layers(&self) -> impl Iterator<Item = LayerWeights<'_, W>> {
        self.layers.iter().map(|layer| {
            let [qkv, projection, expand, contract] = &layer.products;
            LayerWeights {
                attention_norm: &layer.norms[0],
                attention_scale: layer.scale,
                qkv: qkv.weights(),
                projection: projection.weights(),
                inner_norm: &layer.norms[1],
                expand: expand.weights(),
                contract: contract.weights(),
            }
        })
    }

    /// Returns the result of all tokens of a sequence.
    fn reference(&self, sequence: usize) -> Vec<f64> {
        self.streams(sequence).pop().unwrap()
    }

    /// Returns all tokens of a sequence in front of each layer, and after the
    /// last.
    pub(in crate::kernels) fn streams(&self, sequence: usize) -> Vec<Vec<f64>> {
        let Sizes { width, heads, .. } = self.sizes;
        let head_dim = width / heads;
        let mut stream: Vec<f64> = self.rows[sequence].iter().map(|x| f64::from(*x)).collect();
        let mut streams = vec![stream.clone()];
        for layer in &self.layers {
            let [qkv, projection, expand, contract] = &layer.products;
            let qkv = qkv.reference(&self.norm(&stream, &layer.norms[0]));
            let n_tokens = qkv.len() / (3 * width);
            let mut attended = vec![0.0; n_tokens * width];
            for head in 0..heads {
                let row = |token: usize, part: usize| {
                    &qkv[(3 * token + part) * width + head * head_dim..][..head_dim]
                };
                for token in 0..n_tokens {
                    let scores: Vec<f64> = (0..=token)
                        .map(|key| {
                            let products = row(token, 0).iter().zip(row(key, 1));
                            f64::from(layer.scale) * products.map(|(q, k)| q * k).sum::<f64>()
                        })
                        .collect();
                    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let sum: f64 = scores.iter().map(|score| (score - largest).exp()).sum();
                    for (key, score) in scores.iter().enumerate() {
                        let weight = (score - largest).exp() / sum;
                        let to = &mut attended[token * width + head * head_dim..][..head_dim];
                        for (to, value) in to.iter_mut().zip(row(key, 2)) {
                            *to += weight * value;
                        }
                    }
                }
            }
            add(&mut stream, &projection.reference(&attended));
            let mut inner = expand.reference(&self.norm(&stream, &layer.norms[1]));
            for x in &mut inner {
                *x = activated(self.sizes.activation, *x);
            }
            add(&mut stream, &contract.reference(&inner));
            streams.push(stream.clone());
        }
        streams
    }

    pub(in crate::kernels) fn norm(&self, rows: &[f64], weights: &[f32]) -> Vec<f64> {
        let mut normed = Vec::new();
        for row in rows.chunks_exact(weights.len()) {
            let mean = row.iter().map(|x| x * x).sum::<f64>() / weights.len() as f64;
            let factor = 1.0 / (mean + f64::from(self.sizes.epsilon)).sqrt();
            let values = row.iter().zip(weights);
            normed.extend(values.map(|(x, weight)| x * factor * f64::from(*weight)));
        }
        normed
    }
}

fn add(sum: &mut [f64], addend: &[f64]) {
    for (sum, addend) in sum.iter_mut().zip(addend) {
        *sum += addend;
    }
}

fn activated(activation: Activation, x: f64) -> f64 {
    match activation {
        Activation::QuickGelu => x / (1.0 + (-1.702 * x).exp()),
        Activation::GeluNew => {
            let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044_715 * x.powi(3));
            0.5 * x * (1.0 + inner.tanh())
        }
        Activation::Gelu => x * normal(x),
        Activation::Relu => x.max(0.0),
    }
}

/// Returns the probability that a normal variable is below `x`: its density
/// added up in small steps from far below, with Simpson's rule.
fn normal(x: f64) -> f64 {
    let from = -10.0_f64;
    let n_steps = 4000;
    let step = (x - from) / f64::from(n_steps);
    let density = |x: f64| (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
    let sum: f64 = (0..=n_steps)
        .map(|i| {
            let weight = match i {
                0 => 1.0,
                i if i == n_steps => 1.0,
                i if i % 2 == 1 => 4.0,
                _ => 2.0,
            };
            weight * density(from + f64::from(i) * step)
        })
        .sum();
    sum * step / 3.0
}

/// Format of keys and values, in which some are NaN.
trait Blank: Kept {
    /// Element of which a NaN is made, if all elements are this.
    const NONE: Self::Element;
}

impl Blank for bf16 {
    const NONE: Self = Self::NAN;
}

impl Blank for Int24 {
    const NONE: u8 = 0xFF;
}

/// Sequences that are fed to the layers, with their cache.
struct Fed<'m, W, K: Kept> {
    model: &'m Model<W>,
    sequences: Vec<usize>,
    n_threads: usize,
    capacity: usize,
    /// Keys and values of each layer.
    caches: Vec<[Vec<K::Element>; 2]>,
    past: Vec<usize>,
    prefixes: Vec<SharedPrefix>,
    room: StepMemory,
    /// Results of each sequence.
    rows: Vec<Vec<f32>>,
}

impl<'m, W: Tested, K: Blank> Fed<'m, W, K> {
    fn new(model: &'m Model<W>, sequences: Vec<usize>, n_threads: usize) -> Self {
        let width = model.sizes.width;
        let n_tokens = model.rows[0].len() / width;
        let capacity = n_tokens.next_multiple_of(crate::kernels::attention::BLOCK);
        // Memory beyond a sequence's end must not matter, so it holds NaN.
        let Sizes { heads, .. } = model.sizes;
        let n_positions = sequences.len() * heads * capacity;
        let cache = vec![K::NONE; n_positions * K::position_len(width / heads)];
        Self {
            model,
            n_threads,
            capacity,
            caches: vec![[cache.clone(), cache]; model.layers.len()],
            past: vec![0; sequences.len()],
            prefixes: Vec::new(),
            room: StepMemory::default(),
            rows: vec![Vec::new(); sequences.len()],
            sequences,
        }
    }

    /// Feeds the next `length` tokens of each sequence.
    fn feed(&mut self, layers: &StepLayers<W>, length: usize) {
        let width = self.model.sizes.width;
        let n = length * width;
        let starts = self.past.iter().zip(&self.sequences);
        let rows: Vec<f32> = starts
            .flat_map(|(past, sequence)| &self.model.rows[*sequence][past * width..][..n])
            .copied()
            .collect();
        let caches = self.caches.iter_mut();
        let tokens = NewTokens::<K> {
            rows: &rows,
            length,
            past: &self.past,
            prefixes: &self.prefixes,
            capacity: self.capacity,
            caches: caches
                .map(|[keys, values]| KeyValueCache { keys, values })
                .collect(),
        };
        let step = layers.step(tokens, &mut self.room).unwrap();
        std::thread::scope(|scope| {
            for _ in 1..self.n_threads {
                scope.spawn(|| step.work());
            }
            step.work();
        });
        let mut output = vec![f32::NAN; rows.len()];
        step.finish(&mut output).unwrap();
        for (to, from) in self.rows.iter_mut().zip(output.chunks_exact(n.max(1))) {
            to.extend_from_slice(from);
        }
        for past in &mut self.past {
            *past += length;
        }
    }
}

pub(in crate::kernels) fn kernels() -> impl Iterator<Item = Kernel> {
    Kernel::ALL
        .into_iter()
        .filter(|kernel| kernel.is_available() && kernel.precision() == AttentionPrecision::F32)
}

/// Returns the kernels, with the formats of rows that they can multiply weights
/// `W` with.
pub(super) fn ways<W: Weight>() -> impl Iterator<Item = (Kernel, RowsAs)> {
    let ways = kernels().flat_map(|kernel| RowsAs::ALL.map(|rows_as| (kernel, rows_as)));
    ways.filter(|(kernel, rows_as)| rows_as.are_available::<W>(*kernel, 1))
}

fn check_model<W: Tested, K: Blank>(model: &Model<W>, tolerance: f64) {
    let n_tokens = model.rows[0].len() / model.sizes.width;
    let all: Vec<usize> = (0..model.rows.len()).collect();
    for kernel in ways::<W>() {
        let layers = model.pack(kernel);
        // A primer, and then one token after the other.
        let mut together = Fed::<W, K>::new(model, all.clone(), 1);
        together.feed(&layers, n_tokens / 2);
        for _ in n_tokens / 2..n_tokens {
            together.feed(&layers, 1);
        }
        for (sequence, rows) in together.rows.iter().enumerate() {
            let expected = model.reference(sequence);
            assert_eq!(expected.len(), rows.len());
            for (at, (expected, found)) in expected.iter().zip(rows).enumerate() {
                let error = (expected - f64::from(*found)).abs();
                assert!(
                    error < tolerance,
                    "{kernel:?} {:?}: {error:e} off at {at} of sequence {sequence}",
                    model.sizes
                );
            }
            // Two copies of each sequence, which share all that they have.
            let mut twice = Fed::<W, K>::new(model, vec![sequence; 2], 2);
            for past in 0..n_tokens {
                twice.prefixes = vec![SharedPrefix { of: 0, len: past }; 2];
                twice.feed(&layers, 1);
            }
            assert_eq!(twice.rows, [rows.clone(), rows.clone()], "{kernel:?}");
            for n_threads in [1, 3] {
                let mut alone = Fed::<W, K>::new(model, vec![sequence], n_threads);
                for _ in 0..n_tokens {
                    alone.feed(&layers, 1);
                }
                assert_eq!(alone.rows[0], *rows, "{kernel:?} depends on company");
            }
        }
    }
}

pub(in crate::kernels) fn sizes(
    width: usize,
    inner_width: usize,
    heads: usize,
    activation: Activation,
) -> Sizes {
    Sizes {
        width,
        inner_width,
        heads,
        epsilon: 1e-5,
        activation,
    }
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn agree_with_the_reference_and_depend_on_nothing_else() {
    use Activation::{Gelu, GeluNew, QuickGelu, Relu};
    for sizes in [
        sizes(64, 256, 2, QuickGelu),
        sizes(24, 40, 3, Gelu),
        sizes(33, 70, 1, GeluNew),
        sizes(20, 17, 4, Relu),
    ] {
        for n_sequences in [1, 2, 5, 8] {
            check_model::<f32, Int24>(&Model::random(sizes, 3, n_sequences, 19), 2e-5);
            check_model::<i8, Int24>(&Model::random(sizes, 3, n_sequences, 19), 2e-5);
            check_model::<bf16, Int24>(&Model::random(sizes, 3, n_sequences, 19), 2e-5);
        }
        // Keys and values have 8 bits.
        check_model::<f32, bf16>(&Model::random(sizes, 3, 2, 19), 4e-2);
        check_model::<bf16, bf16>(&Model::random(sizes, 3, 2, 19), 4e-2);
        check_model::<i8, bf16>(&Model::random(sizes, 3, 2, 19), 4e-2);
    }
}

/// Tests layers small enough for Miri, which runs only the portable kernel: the
/// pointer arithmetic of all kernels is the same code.
#[test]
fn tiny_layers() {
    let sizes = sizes(6, 9, 2, Activation::QuickGelu);
    check_model::<f32, Int24>(&Model::random(sizes, 2, 2, 3), 1e-5);
    check_model::<bf16, Int24>(&Model::random(sizes, 1, 2, 3), 1e-5);
    check_model::<i8, bf16>(&Model::random(sizes, 1, 2, 3), 4e-2);
}

#[test]
fn activations_are_what_their_names_say() {
    let inputs: Vec<f32> = (-600..=600_i16).map(|x| f32::from(x) / 50.0).collect();
    for kernel in kernels() {
        for name in ["quick_gelu", "gelu", "gelu_new", "relu"] {
            let activation = Activation::named(name).unwrap();
            let found = activate(kernel, activation, &inputs);
            for (x, found) in inputs.iter().zip(found) {
                let error = (activated(activation, f64::from(*x)) - f64::from(found)).abs();
                assert!(error < 1e-6, "{kernel:?} {name} is {error:e} off at {x}");
            }
            let odd = activate(kernel, activation, &[f32::NAN]);
            assert!(odd[0].is_nan(), "{name}");
        }
    }
    assert_eq!(Activation::named("mish"), None);
}

/// Activates numbers by a product with one, in a row for each number.
fn activate(kernel: Kernel, activation: Activation, inputs: &[f32]) -> Vec<f32> {
    let one = DenseWeights {
        weights: &[1.0_f32],
        scales: None,
        bias: None,
    };
    let panels = Panels::pack(&one, [1, 1], kernel, RowsAs::Floats).unwrap();
    let mut output = vec![f32::NAN; inputs.len() * PANEL_WIDTH_MAX];
    let rows = Rows {
        n: inputs.len(),
        input: inputs.as_ptr(),
        input_stride: 1,
        digits: DigitRows {
            start: std::ptr::null_mut(),
            stride: 0,
        },
        output: output.as_mut_ptr(),
        output_stride: PANEL_WIDTH_MAX,
    };
    // SAFETY: the kernel is available, and there is room for a panel in each row.
    unsafe { panels.compute(0, rows, Finish::Activate(activation), std::ptr::null()) };
    output.iter().step_by(PANEL_WIDTH_MAX).copied().collect()
}

/// Checks that a NaN stays in its sequence.
#[test]
fn a_sequence_that_is_not_finite_spoils_no_other() {
    check_spoiled::<f32>();
    check_spoiled::<bf16>();
    check_spoiled::<i8>();
}

fn check_spoiled<W: Tested>() {
    let mut model = Model::<W>::random(sizes(16, 24, 2, Activation::QuickGelu), 2, 3, 4);
    let run = |model: &Model<W>, way| {
        let layers = model.pack(way);
        let mut fed = Fed::<W, Int24>::new(model, vec![0, 1, 2], 2);
        fed.feed(&layers, 4);
        fed.rows
    };
    let clean: Vec<_> = ways::<W>().map(|way| run(&model, way)).collect();
    model.rows[1][20] = f32::NAN;
    for (way, clean) in ways::<W>().zip(clean) {
        let spoiled = run(&model, way);
        assert_eq!((&spoiled[0], &spoiled[2]), (&clean[0], &clean[2]));
        // The token before the NaN is clean, too.
        assert_eq!(spoiled[1][..16], clean[1][..16]);
        assert!(spoiled[1][16..].iter().all(|x| x.is_nan()), "{way:?}");
    }
}

/// Checks that [`StepLayers::pack`] chooses one of the ways, and that refusing
/// is not a panic.
#[test]
fn digits_are_for_weights_of_8_bits() {
    let floats = Model::<f32>::random(sizes(8, 16, 2, Activation::Relu), 1, 1, 2);
    let error = StepLayers::with_kernel(
        floats.sizes,
        std::iter::empty::<LayerWeights<'_, f32>>(),
        Kernel::Portable,
        RowsAs::Digits,
    );
    let error = error.unwrap_err();
    assert_eq!(error, LayersError::Digits(16), "{error}");
    let bytes = StepLayers::pack(floats.sizes, std::iter::empty::<LayerWeights<'_, i8>>()).unwrap();
    assert!(ways::<i8>().any(|way| way == (bytes.kernel, bytes.rows_as)));
    for kernel in kernels() {
        // Sums of as many inputs would overflow.
        assert!(!RowsAs::Digits.are_available::<i8>(kernel, digits::INPUTS_MAX + 1));
        assert_eq!(RowsAs::fastest::<i8>(kernel, usize::MAX), RowsAs::Floats);
        assert_eq!(RowsAs::fastest::<f32>(kernel, 1), RowsAs::Floats);
    }
}

type Change = fn(&mut Sizes);

#[test]
fn refuse_what_they_cannot_do() {
    let model = Model::<f32>::random(sizes(8, 16, 2, Activation::Relu), 1, 1, 2);
    let with = |change: Change| {
        let mut sizes = model.sizes;
        change(&mut sizes);
        let changed = Model {
            sizes,
            layers: Model::<f32>::random(model.sizes, 1, 1, 2).layers,
            rows: Vec::new(),
        };
        let layer = &changed.layers[0];
        let [qkv, projection, expand, contract] = &layer.products;
        let weights = LayerWeights {
            attention_norm: &layer.norms[0],
            attention_scale: layer.scale,
            qkv: qkv.weights(),
            projection: projection.weights(),
            inner_norm: &layer.norms[1],
            expand: expand.weights(),
            contract: contract.weights(),
        };
        let packed = StepLayers::pack(sizes, [weights]);
        packed.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(with(|_| {}), Ok(()));
    let changes: [(Change, &str); 4] = [
        (|sizes| sizes.heads = 3, "heads must divide the width"),
        (|sizes| sizes.inner_width = 0, "at least one"),
        (
            |sizes| sizes.inner_width = 15,
            "weights of 128 numbers, not 120",
        ),
        (|sizes| sizes.width = 16, "norm of 8 numbers, not 16"),
    ];
    for (change, expected) in changes {
        let error = with(change).unwrap_err();
        assert!(error.contains(expected), "{error}");
    }

    let layers = model.pack((Kernel::Portable, RowsAs::Floats));
    let step = |n_rows: usize, length: usize, past: &[usize], capacity: usize, n_caches: usize| {
        let mut keys = vec![vec![bf16::ZERO; 16 * 8]; n_caches];
        let mut values = keys.clone();
        let caches = keys.iter_mut().zip(&mut values);
        let tokens = NewTokens::<bf16> {
            rows: &[0.0; 64][..n_rows],
            length,
            past,
            prefixes: &[],
            capacity,
            caches: caches
                .map(|(keys, values)| KeyValueCache { keys, values })
                .collect(),
        };
        let mut room = StepMemory::default();
        let step = layers.step(tokens, &mut room);
        step.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(step(16, 2, &[14], 16, 1), Ok(()));
    for (outcome, expected) in [
        (step(15, 2, &[14], 16, 1), "input of 15 numbers, not 16"),
        (step(16, 2, &[14], 16, 2), "caches of 2 numbers, not 1"),
        (step(16, 2, &[15], 16, 1), "outgrows"),
        (step(16, 2, &[0], 32, 1), "keys has 128 numbers, not 256"),
        (step(16, 1, &[0, 0], 16, 1), "keys has 128 numbers, not 256"),
        (step(0, usize::MAX / 2, &[0], 16, 1), "too large"),
    ] {
        let error = outcome.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn nothing_new_is_no_work() {
    let model = Model::<f32>::random(sizes(8, 16, 2, Activation::Relu), 2, 2, 2);
    let layers = model.pack((Kernel::Portable, RowsAs::Floats));
    let mut fed = Fed::<f32, Int24>::new(&model, vec![0, 1], 2);
    fed.feed(&layers, 0);
    assert_eq!(fed.rows, [[0.0; 0], [0.0; 0]]);
}
