//! Tests all kernels and formats of products, against layers as they are
//! written down, in `f64`, and sums of whole numbers to the last bit.
#![expect(
    clippy::cast_precision_loss,
    reason = "small whole numbers and 24-bit fractions"
)]

use std::ops::DerefMut;

use half::bf16;
use proptest::prelude::*;

use super::panels::{PanelPages, Panels, Room, Rows, panel_width};
use super::round::{self, RoundedRows};
use super::tile::{PART_BYTES, RowHead, STEP};
use super::*;
use crate::kernels::layers::tests::{Model, Tested, sizes, uniform};
use crate::kernels::layers::{Activation, DenseWeights, Finish};

#[cfg(all(unix, not(miri)))]
mod guarded;

/// Returns all kernels for weights `W`, with attention on the same.
fn ways<W: Weight>() -> impl Iterator<Item = ImageKernels> {
    let kernels = Kernel::ALL.into_iter();
    let kernels = kernels.filter(|kernel| kernel.is_available());
    let ways = kernels.flat_map(|kernel| {
        Products::ALL.map(|products| ImageKernels {
            products,
            products_on: kernel,
            attention_on: kernel,
        })
    });
    ways.filter(|ways| ways.products.are_available::<W>(ways.products_on))
}

/// Makes memory that holds these floats.
type MakeMemory = dyn Fn(&[f32]) -> Box<dyn DerefMut<Target = [f32]>>;

/// A product: its weights and rows.
#[derive(Clone, Debug)]
struct Call<W> {
    inputs: usize,
    outputs: usize,
    weights: Vec<W>,
    rows: Vec<f32>,
    scales: Option<Vec<f32>>,
    bias: Option<Vec<f32>>,
    residual: Option<Vec<f32>>,
}

impl<W: Tested> Call<W> {
    fn random(n_rows: usize, [inputs, outputs]: [usize; 2], addends: u8, seed: u64) -> Self {
        let mut uniform = uniform(seed);
        let weights = (0..inputs * outputs).map(|_| W::of(2.5 * uniform()));
        let weights = weights.collect();
        let mut floats = |n: usize| -> Vec<f32> { (0..n).map(|_| uniform()).collect() };
        Self {
            inputs,
            outputs,
            weights,
            rows: floats(n_rows * inputs),
            scales: (size_of::<W>() == 1 || addends & 4 == 4).then(|| floats(outputs)),
            bias: (addends & 1 == 1).then(|| floats(outputs)),
            residual: (addends & 2 == 2).then(|| floats(n_rows * outputs)),
        }
    }

    fn n_rows(&self) -> usize {
        self.rows.len() / self.inputs
    }

    fn pack(&self, kernels: ImageKernels) -> (Panels, PanelPages) {
        let dense = DenseWeights {
            weights: &self.weights,
            scales: self.scales.as_deref(),
            bias: self.bias.as_deref(),
        };
        let product = [self.inputs, self.outputs];
        let mut pages = PanelPages::new(&[product], kernels).unwrap();
        let panels = Panels::pack(&dense, product, kernels, &mut pages).unwrap();
        (panels, pages)
    }

    fn run(&self, panels: &(Panels, PanelPages)) -> Vec<f32> {
        self.run_in(panels, &|floats| Box::new(floats.to_vec()))
    }

    /// Runs the call in memory that `memory` makes, no more than there must be.
    fn run_in(&self, (panels, pages): &(Panels, PanelPages), memory: &MakeMemory) -> Vec<f32> {
        let n = self.n_rows();
        let kernels = panels.kernels;
        let n_padded = match kernels.products_on {
            Kernel::Amx => n.next_multiple_of(TILE_ROWS),
            _ => n,
        };
        let blank = |n: usize| memory(&vec![f32::NAN; n]);
        let stride = kernels.n_steps(self.inputs);
        let input = memory(&self.rows);
        let mut sums = blank(n_padded * panel_width(kernels.products_on));
        let mut unpacked = blank(PART_BYTES / STEP);
        let mut rounded = blank(n_padded * stride);
        let mut heads = blank(n * size_of::<RowHead>() / STEP);
        let (mut output, finish) = match &self.residual {
            Some(residual) => (memory(residual), Finish::Add),
            None => (blank(n * self.outputs), Finish::Set),
        };
        let rows = Rows {
            n,
            input: input.as_ptr(),
            input_stride: self.inputs,
            output: output.as_mut_ptr(),
            output_stride: self.outputs,
            finish,
        };
        let room = Room {
            rounded: RoundedRows {
                start: rounded.as_mut_ptr().cast(),
                stride,
                heads: heads.as_mut_ptr().cast(),
            },
            sums: sums.as_mut_ptr(),
            unpacked: unpacked.as_mut_ptr().cast(),
        };
        // SAFETY: the kernels are available, and there is room for all rows.
        unsafe { panels.compute(pages, rows, room) }
        output.to_vec()
    }

    /// Returns the call of one of its rows alone.
    fn alone(&self, row: usize) -> Self {
        let of = |values: &[f32], width: usize| values[row * width..][..width].to_vec();
        Self {
            weights: self.weights.clone(),
            rows: of(&self.rows, self.inputs),
            scales: self.scales.clone(),
            bias: self.bias.clone(),
            residual: self.residual.as_ref().map(|rows| of(rows, self.outputs)),
            ..*self
        }
    }

    /// Makes an output from its sum.
    fn finish(&self, row: usize, output: usize, sum: f32) -> f32 {
        let at = |floats: &Option<Vec<f32>>, none: f32| {
            floats.as_ref().map_or(none, |floats| floats[output])
        };
        let mut sum = sum * at(&self.scales, 1.0) + at(&self.bias, 0.0);
        if let Some(residual) = &self.residual {
            sum += residual[row * self.outputs + output];
        }
        sum
    }

    /// Returns sums in `f64`, and the sums of their terms' magnitudes.
    fn reference(&self) -> Vec<[f64; 2]> {
        let mut found = Vec::new();
        for row in self.rows.chunks_exact(self.inputs) {
            for output in 0..self.outputs {
                let column = self.weights[output..].iter().step_by(self.outputs);
                let products = row.iter().zip(column).map(|(x, weight)| {
                    let weight: f32 = (*weight).into();
                    f64::from(*x) * f64::from(weight)
                });
                let (mut sum, mut magnitude) = (0.0, 0.0);
                for product in products {
                    sum += product;
                    magnitude += product.abs();
                }
                found.push([sum, magnitude]);
            }
        }
        found
    }
}

/// Checks products that are summed as floats.
fn check_floats<W: Tested>(call: &Call<W>) {
    let expected = call.reference();
    for way in ways::<W>() {
        let panels = call.pack(way);
        let found = call.run(&panels);
        for (at, (found, [sum, magnitude])) in found.iter().zip(&expected).enumerate() {
            let (row, output) = (at / call.outputs, at % call.outputs);
            #[expect(clippy::cast_possible_truncation, reason = "compared as floats")]
            let sum = call.finish(row, output, *sum as f32);
            let error = f64::from((sum - found).abs());
            assert!(
                error <= 1e-6 + 3e-6 * magnitude,
                "{way:?}: {error:e} off at row {row}, output {output}"
            );
        }
        for row in 0..call.n_rows() {
            let alone = call.alone(row).run(&panels);
            assert_eq!(
                alone,
                found[row * call.outputs..][..call.outputs],
                "{way:?}"
            );
        }
    }
}

/// Checks products of bfloat16, and that they have the bits of their description
/// on kernels without instructions for bfloat16.
fn check_bf16(mut call: Call<bf16>) {
    let floats = call.clone();
    for x in &mut call.rows {
        *x = bf16::from_f32(*x).to_f32();
    }
    check_floats(&call);
    let expected = call.run_described();
    for way in ways::<bf16>() {
        let panels = floats.pack(way);
        let found = floats.run(&panels);
        assert_eq!(call.run(&panels), found, "{way:?} rounds in its own way");
        if way.products_on.precision() == AttentionPrecision::F32 {
            assert_eq!(found, expected, "{way:?}");
        }
    }
}

impl Call<bf16> {
    /// Returns the results that the description of [`Products::Bf16`] gives.
    fn run_described(&self) -> Vec<f32> {
        let mut found = Vec::new();
        for (row, inputs) in self.rows.chunks_exact(self.inputs).enumerate() {
            for output in 0..self.outputs {
                let column = self.weights[output..].iter().step_by(self.outputs);
                let products = inputs.iter().zip(column);
                let products: Vec<f32> = products.map(|(x, weight)| x * weight.to_f32()).collect();
                let pairs = products.chunks(2);
                let terms = pairs.flat_map(|pair| pair.iter().rev());
                let sum = terms.fold(0.0, |sum, product| sum + product);
                found.push(self.finish(row, output, sum));
            }
        }
        found
    }
}

/// Checks that products of whole numbers are exact, on all kernels.
fn check_whole_numbers(call: &Call<i8>) {
    for way in ways::<i8>() {
        let panels = call.pack(way);
        let found = call.run(&panels);
        for (row, from) in call.rows.chunks_exact(call.inputs).enumerate() {
            let (numbers, head) = rounded(way.products, from, panels.0.limit);
            for output in 0..call.outputs {
                let column = call.weights[output..].iter().step_by(call.outputs);
                let products = numbers.iter().zip(column);
                let sum: i64 = products
                    .map(|(number, weight)| i64::from(*number) * i64::from(*weight))
                    .sum();
                assert!(i32::try_from(sum).is_ok(), "{way:?} overflows");
                let expected = call.finish(row, output, sum as f32 * head.factor);
                let found = found[row * call.outputs + output];
                assert_eq!(
                    found.to_bits(),
                    expected.to_bits(),
                    "{way:?} at {row} {output}"
                );
            }
        }
    }
}

/// Rounds a row in plain code.
fn rounded(products: Products, row: &[f32], limit: i16) -> (Vec<i16>, RowHead) {
    if products == Products::Words {
        let mut words = vec![0; row.len()];
        let head = round::words(row, limit, &mut words);
        (words, head)
    } else {
        let mut bytes = vec![0; row.len()];
        let head = round::bytes(row, limit, &mut bytes);
        (bytes.into_iter().map(i16::from).collect(), head)
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    #[cfg_attr(miri, ignore = "takes too long")]
    fn products_are_sums_of_products(
        n_rows in 1..40_usize,
        inputs in 1..700_usize,
        outputs in 1..80_usize,
        addends in 0..8_u8,
        seed in any::<u64>(),
    ) {
        check_floats::<f32>(&Call::random(n_rows, [inputs, outputs], addends, seed));
        check_bf16(Call::random(n_rows, [inputs, outputs], addends, seed));
        check_whole_numbers(&Call::random(n_rows, [inputs, outputs], addends, seed));
    }

    #[test]
    #[cfg_attr(miri, ignore = "takes too long")]
    fn rows_are_rounded_to_the_nearest(
        row in proptest::collection::vec(proptest::num::f32::NORMAL | proptest::num::f32::ZERO, 1..100),
        limit in 127..=i16::MAX,
    ) {
        for products in [Products::Words, Products::Bytes] {
            let limit = if products == Products::Bytes { 127 } else { limit };
            let (numbers, head) = rounded(products, &row, limit);
            for (x, number) in row.iter().zip(&numbers) {
                let error = (f64::from(*x) - f64::from(*number) * f64::from(head.factor)).abs();
                let step = f64::from(head.factor);
                prop_assert!(error <= 0.5 * step + f64::from(x.abs()) * 2.4e-7);
                prop_assert!(number.abs() <= limit);
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    #[cfg_attr(miri, ignore = "takes too long")]
    fn images_agree_with_the_reference(
        head_dim in proptest::sample::select(vec![32, 64, 96, 128, 5, 24]),
        heads in 1..3_usize,
        inner_width in 1..200_usize,
        positions in 1..40_usize,
        batch in 1..4_usize,
    ) {
        let sizes = sizes(heads * head_dim, inner_width, heads, Activation::QuickGelu);
        let norm = final_norm(sizes.width);
        check_model(&Model::<f32>::random(sizes, 1, batch, positions), Some(&norm));
        check_model(&Model::<bf16>::random(sizes, 1, batch, positions), Some(&norm));
        check_model(&Model::<i8>::random(sizes, 1, batch, positions), Some(&norm));
    }
}

#[cfg(all(unix, not(miri)))]
mod between_guard_pages {
    use super::guarded::{Guarded, GuardedEnd};
    use super::*;

    /// Checks that nothing before or after any memory is touched.
    fn check<W: Tested>() {
        for end in [GuardedEnd::First, GuardedEnd::Last] {
            let memory: &MakeMemory = &move |floats| Box::new(Guarded::of(floats, end));
            for way in ways::<W>() {
                for (n_rows, inputs) in [1, 2, 3, 7, 16, 17, 33, 64]
                    .into_iter()
                    .zip([1, 2, 5, 64, 130, 9, 200, 31])
                {
                    for outputs in [1, 7, 8, 17, 33, 64] {
                        let call = Call::<W>::random(n_rows, [inputs, outputs], 3, 1);
                        let panels = call.pack(way);
                        assert_eq!(call.run_in(&panels, memory), call.run(&panels), "{way:?}");
                    }
                }
                for (width, inner, heads, positions) in
                    [(5, 7, 1, 1), (48, 600, 2, 65), (64, 33, 2, 17)]
                {
                    let sizes = sizes(width, inner, heads, Activation::QuickGelu);
                    let model = Model::<W>::random(sizes, 2, 2, positions);
                    let layers = ImageLayers::pack(sizes, model.layers(), None, way).unwrap();
                    let run = |memory| run_in(&model, &layers, &[0, 1], MeansOf::Raw, 2, memory);
                    assert!(
                        run(memory) == run(&|floats| Box::new(floats.to_vec())),
                        "{way:?}"
                    );
                }
            }
        }
    }

    #[test]
    fn nothing_else_is_touched() {
        check::<f32>();
        check::<bf16>();
        check::<i8>();
    }
}

#[test]
fn tiny_products() {
    for addends in 0..8 {
        check_floats::<f32>(&Call::random(7, [5, 11], addends, 3));
        check_bf16(Call::random(7, [5, 11], addends, 3));
        check_whole_numbers(&Call::random(7, [5, 11], addends, 3));
    }
}

/// Checks the largest sums that weights can make.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn no_sum_overflows() {
    for inputs in [1, 512, 513, 2048, 8192] {
        for weight in [i8::MIN, i8::MAX] {
            let call = Call {
                inputs,
                outputs: 3,
                weights: vec![weight; 3 * inputs],
                rows: [vec![1.0; inputs], vec![-1.0; inputs]].concat(),
                scales: None,
                bias: None,
                residual: None,
            };
            check_whole_numbers(&call);
        }
    }
}

/// Results of a run.
#[derive(Clone, Debug, PartialEq)]
struct Found {
    output: Vec<f32>,
    means: Vec<f32>,
}

/// Runs some of a model's sequences as a batch.
fn run<W: Tested>(
    model: &Model<W>,
    layers: &ImageLayers,
    images: &[usize],
    of: MeansOf,
    n_threads: usize,
) -> Found {
    let memory: &MakeMemory = &|floats| Box::new(floats.to_vec());
    run_in(model, layers, images, of, n_threads, memory)
}

/// Runs some of a model's sequences as a batch, in memory that `memory` makes.
fn run_in<W: Tested>(
    model: &Model<W>,
    layers: &ImageLayers,
    images: &[usize],
    of: MeansOf,
    n_threads: usize,
    memory: &MakeMemory,
) -> Found {
    let width = model.sizes.width;
    let positions = model.rows[0].len() / width;
    let rows = images.iter().flat_map(|idx| &model.rows[*idx]);
    let rows = memory(&rows.copied().collect::<Vec<_>>());
    let blank = |n: usize| memory(&vec![f32::NAN; n]);
    let mut output = blank(rows.len());
    let mut means = blank(images.len() * (layers.n_layers() + 1) * width);
    let batch = Images {
        batch: images.len(),
        positions,
        rows: &rows,
        output: Some(&mut output),
        means: Some(Means { of, to: &mut means }),
        n_threads,
    };
    let mut memory = ImageMemory::default();
    let run = layers.run(batch, &mut memory).unwrap();
    std::thread::scope(|scope| {
        for _ in 1..n_threads {
            scope.spawn(|| run.work());
        }
        run.work();
    });
    // A thread that comes late finds nothing to do.
    run.work();
    run.finish();
    Found {
        output: output.to_vec(),
        means: means.to_vec(),
    }
}

impl Found {
    /// Returns the results of one image of a batch.
    fn image(&self, idx: usize, batch: usize) -> Self {
        let of = |all: &[f32]| {
            let n = all.len() / batch;
            all[idx * n..][..n].to_vec()
        };
        Self {
            output: of(&self.output),
            means: of(&self.means),
        }
    }
}

/// Returns the largest difference.
fn error(found: &[f32], expected: &[f64]) -> f64 {
    assert_eq!(found.len(), expected.len());
    let both = found.iter().zip(expected);
    both.map(|(found, expected)| (f64::from(*found) - expected).abs())
        // A NaN must not be lost.
        .fold(
            0.0,
            |largest, error| if error <= largest { largest } else { error },
        )
}

fn mean(rows: &[f64], width: usize) -> Vec<f64> {
    let n = rows.len() / width;
    let column = |i: usize| rows[i..].iter().step_by(width).sum::<f64>() / n as f64;
    (0..width).map(column).collect()
}

/// Returns how far results may be off.
fn tolerance(products: Products) -> f64 {
    match products {
        Products::Floats => 4e-5,
        Products::Bf16 => 0.1,
        Products::Words => 1e-3,
        Products::Bytes => 0.2,
    }
}

fn check_model<W: Tested>(model: &Model<W>, final_norm: Option<&[f32]>) {
    let width = model.sizes.width;
    let batch = model.rows.len();
    let all: Vec<usize> = (0..batch).collect();
    let n_layers = model.layers().count();
    // In front of each layer, normed, and after the last.
    let norms: Vec<Option<Vec<f32>>> = model
        .layers()
        .map(|layer| Some(layer.attention_norm.to_vec()))
        .chain([final_norm.map(<[f32]>::to_vec)])
        .collect();
    let expected: Vec<[Vec<Vec<f64>>; 2]> = (0..batch)
        .map(|sequence| {
            let raw = model.streams(sequence);
            let normed = raw.iter().zip(&norms).map(|(rows, norm)| match norm {
                Some(norm) => model.norm(rows, norm),
                None => rows.clone(),
            });
            [normed.collect(), raw]
        })
        .collect();
    for way in ways::<W>() {
        let layers = ImageLayers::pack(model.sizes, model.layers(), final_norm, way).unwrap();
        for of in [MeansOf::Normed, MeansOf::Raw] {
            let together = run(model, &layers, &all, of, 1);
            for (image, [normed, raw]) in expected.iter().enumerate() {
                let found = together.image(image, batch);
                let (before, last) = match of {
                    MeansOf::Normed => (normed, &normed[n_layers]),
                    MeansOf::Raw => (raw, &normed[n_layers]),
                };
                let streams = before[..n_layers].iter().chain([last]);
                let means: Vec<f64> = streams.flat_map(|rows| mean(rows, width)).collect();
                let errors = [error(&found.output, last), error(&found.means, &means)];
                assert!(
                    errors.iter().all(|error| *error < tolerance(way.products)),
                    "{way:?} {:?}: {errors:?} off in image {image}",
                    model.sizes
                );
                let n_threads = 1 + image % 3;
                let alone = run(model, &layers, &[image], of, n_threads);
                assert!(alone == found, "{way:?} depends on company");
            }
            let threads = run(model, &layers, &all, of, 3);
            assert!(threads == together, "{way:?} depends on threads");
        }
    }
}

fn final_norm(width: usize) -> Vec<f32> {
    let mut uniform = uniform(5);
    (0..width).map(|_| 1.0 + uniform()).collect()
}

#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn agree_with_the_reference_and_depend_on_nothing_else() {
    use Activation::{Gelu, GeluNew, QuickGelu, Relu};
    for (sizes, positions) in [
        (sizes(64, 256, 2, QuickGelu), 65),
        (sizes(128, 600, 2, QuickGelu), 64),
        (sizes(96, 20, 1, Gelu), 63),
        (sizes(128, 256, 1, QuickGelu), 200),
        (sizes(33, 70, 1, GeluNew), 7),
        (sizes(20, 17, 4, Relu), 200),
        (sizes(64, 64, 2, QuickGelu), 1),
    ] {
        let norm = final_norm(sizes.width);
        check_model(&Model::<f32>::random(sizes, 2, 3, positions), Some(&norm));
        check_model(&Model::<bf16>::random(sizes, 2, 3, positions), Some(&norm));
        check_model(&Model::<i8>::random(sizes, 2, 3, positions), Some(&norm));
        check_model(&Model::<f32>::random(sizes, 1, 1, positions), None);
    }
}

/// Tests images small enough for Miri, which runs only the portable kernel: the
/// pointer arithmetic of all kernels is the same code.
#[test]
fn tiny_images() {
    let sizes = sizes(6, 9, 2, Activation::QuickGelu);
    check_model(&Model::<f32>::random(sizes, 2, 2, 3), Some(&final_norm(6)));
    check_model(&Model::<bf16>::random(sizes, 1, 2, 3), None);
    check_model(&Model::<i8>::random(sizes, 1, 2, 18), None);
}

#[test]
fn no_layers_are_the_norm_alone() {
    let sizes = sizes(6, 9, 2, Activation::QuickGelu);
    check_model(&Model::<f32>::random(sizes, 0, 2, 18), Some(&final_norm(6)));
    check_model(&Model::<f32>::random(sizes, 0, 1, 3), None);
}

/// Checks that a NaN stays in its image.
#[test]
#[cfg_attr(miri, ignore = "takes too long")]
fn an_image_that_is_not_finite_spoils_no_other() {
    check_spoiled::<f32>();
    check_spoiled::<bf16>();
    check_spoiled::<i8>();
}

fn check_spoiled<W: Tested>() {
    let mut model = Model::<W>::random(sizes(16, 24, 2, Activation::QuickGelu), 2, 3, 80);
    let run = |model: &Model<W>, way| {
        let layers = ImageLayers::pack(model.sizes, model.layers(), None, way).unwrap();
        let found = run(model, &layers, &[0, 1, 2], MeansOf::Raw, 2);
        [0, 1, 2].map(|image| found.image(image, 3))
    };
    let clean: Vec<_> = ways::<W>().map(|way| run(&model, way)).collect();
    for odd in [f32::NAN, f32::INFINITY] {
        model.rows[1][20] = odd;
        for (way, clean) in ways::<W>().zip(&clean) {
            let spoiled = run(&model, way);
            assert!(spoiled[0] == clean[0] && spoiled[2] == clean[2], "{way:?}");
            assert!(
                spoiled[1].output[79 * 16..].iter().all(|x| x.is_nan()),
                "{way:?}"
            );
        }
    }
}

#[test]
fn refuse_what_they_cannot_do() {
    let model = Model::<f32>::random(sizes(8, 16, 2, Activation::Relu), 1, 1, 2);
    let kernels = ImageKernels {
        products: Products::Floats,
        products_on: Kernel::Portable,
        attention_on: Kernel::Portable,
    };
    let pack = |sizes: Sizes, norm: &[f32], kernels| {
        let packed = ImageLayers::pack(sizes, model.layers(), Some(norm), kernels);
        packed.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(pack(model.sizes, &[1.0; 8], kernels), Ok(()));
    let with = |change: fn(&mut Sizes)| {
        let mut sizes = model.sizes;
        change(&mut sizes);
        pack(sizes, &[1.0; 8], kernels).unwrap_err()
    };
    let as_bytes = ImageKernels {
        products: Products::Bytes,
        ..kernels
    };
    let rounded = ImageKernels {
        products_on: Kernel::Amx,
        ..kernels
    };
    for (error, expected) in [
        (with(|sizes| sizes.heads = 3), "heads must divide the width"),
        (with(|sizes| sizes.inner_width = 0), "at least one"),
        (
            with(|sizes| sizes.inner_width = 15),
            "weights of 128 numbers, not 120",
        ),
        (
            pack(model.sizes, &[1.0; 7], kernels).unwrap_err(),
            "norm of 7 numbers, not 8",
        ),
        (
            pack(model.sizes, &[1.0; 8], as_bytes).unwrap_err(),
            "not available",
        ),
        (
            pack(model.sizes, &[1.0; 8], rounded).unwrap_err(),
            "not available",
        ),
    ] {
        assert!(error.contains(expected), "{error}");
    }
    let layers = ImageLayers::pack(model.sizes, model.layers(), None, kernels).unwrap();
    let run = |n: usize, batch: usize, positions: usize, n_output: usize, n_means: usize| {
        let images = Images {
            batch,
            positions,
            rows: &[0.0; 64][..n],
            output: Some(&mut [0.0; 64][..n_output]),
            means: Some(Means {
                of: MeansOf::Raw,
                to: &mut [0.0; 64][..n_means],
            }),
            n_threads: 2,
        };
        let mut memory = ImageMemory::default();
        let run = layers.run(images, &mut memory);
        run.map(|_| ()).map_err(|error| error.to_string())
    };
    assert_eq!(run(32, 2, 2, 32, 32), Ok(()));
    for (outcome, expected) in [
        (run(31, 2, 2, 32, 32), "input of 31 numbers, not 32"),
        (run(32, 2, 2, 31, 32), "output of 31 numbers, not 32"),
        (run(32, 2, 2, 32, 31), "means of 31 numbers, not 32"),
        (run(0, usize::MAX / 2, 4, 0, 0), "too large"),
        (run(0, 1 << 59, 1, 0, 0), "too large"),
    ] {
        let error = outcome.unwrap_err();
        assert!(error.contains(expected), "{error}");
    }
}

#[test]
fn no_images_are_no_work() {
    let model = Model::<f32>::random(sizes(8, 16, 2, Activation::Relu), 2, 1, 0);
    for way in ways::<f32>() {
        let layers = ImageLayers::pack(model.sizes, model.layers(), None, way).unwrap();
        let found = run(&model, &layers, &[], MeansOf::Raw, 2);
        assert!(found.output.is_empty() && found.means.is_empty());
        let found = run(&model, &layers, &[0], MeansOf::Raw, 2);
        assert!(found.output.is_empty());
    }
}

#[test]
#[should_panic(expected = "no thread has worked")]
fn a_run_that_is_not_done_has_no_results() {
    let model = Model::<f32>::random(sizes(8, 16, 2, Activation::Relu), 1, 1, 2);
    let kernels = ImageKernels::fastest::<f32>(AttentionPrecision::F32);
    let layers = ImageLayers::pack(model.sizes, model.layers(), None, kernels).unwrap();
    let mut memory = ImageMemory::default();
    let images = Images {
        batch: 1,
        positions: 2,
        rows: &model.rows[0],
        output: None,
        means: None,
        n_threads: 1,
    };
    layers.run(images, &mut memory).unwrap().finish();
}

/// Checks that blocks cover each image's positions once, in whole chunks, and
/// that threads get about as much each.
#[test]
fn blocks_are_cut_for_the_threads() {
    for (batch, positions, n_threads, rows) in [
        (1, 1024, 2, 64),
        (1, 1024, 12, 48),
        (1, 1024, 0, 64),
        (1, 1, 2, 16),
        (8, 1024, 2, 64),
        (1, 100, 2, 64),
        (1, 64, 4, 16),
    ] {
        let blocks = ImageBlocks::new(batch, positions, n_threads);
        assert_eq!(
            blocks.rows, rows,
            "{positions} positions, {n_threads} threads"
        );
        let mut next = (0, 0);
        for idx in 0..blocks.len() {
            let (image, first, n) = blocks.block(idx);
            assert_eq!((image, first), next);
            assert!(n > 0 && first.is_multiple_of(CHUNK));
            next = if first + n == positions {
                (image + 1, 0)
            } else {
                (image, first + n)
            };
        }
        assert_eq!(next, (batch, 0));
    }
}
