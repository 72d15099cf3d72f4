//! Images per second on one core, stage by stage: `cargo bench --bench
//! preprocess`.

use std::fs;
use std::hint::black_box;
use std::path::Path;

use bytes::Bytes;
use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;
use imagegpt::imaging::decode::decode;
use imagegpt::imaging::resize::resize;
use imagegpt::imaging::{
    Alpha, DecodeBudget, Fit, ImageInput, ImageLimits, Palette, PreprocessOptions, Preprocessor,
    Quantizer, RgbImage,
};

const LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 64 << 20,
    image_pixels_max: 50_000_000,
    decode_bytes_max: 1 << 30,
};

/// Returns the name and content of a file of each size.
fn files() -> Vec<(&'static str, Vec<u8>)> {
    let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/images");
    let read = |name| fs::read(images.join(name)).expect("the golden images are committed");
    let photo = read("jpeg-photo.jpg");
    let large = enlarged(&decoded(&photo), 4000, 3000);
    let mut jpeg = Vec::new();
    JpegEncoder::new_with_quality(&mut jpeg, 85)
        .encode(&large.pixels, 4000, 3000, ExtendedColorType::Rgb8)
        .expect("a JPEG of this size can be written");
    vec![
        ("64x64 PNG", read("emoji-1f600.png")),
        ("640x427 JPEG", photo),
        ("4000x3000 JPEG", jpeg),
    ]
}

fn decoded(bytes: &[u8]) -> RgbImage {
    decode(bytes, Alpha::Drop, &LIMITS, &DecodeBudget::endless()).expect("the file is whole")
}

/// Enlarges an image by repeating its pixels, which gives about as much detail
/// as a photo has.
fn enlarged(image: &RgbImage, width: usize, height: usize) -> RgbImage {
    let (from_width, from_height) = (image.width as usize, image.height as usize);
    let mut pixels = Vec::with_capacity(width * height * 3);
    for row in 0..height {
        for column in 0..width {
            let at = row * from_height / height * from_width + column * from_width / width;
            pixels.extend_from_slice(&image.pixels[at * 3..at * 3 + 3]);
        }
    }
    RgbImage {
        width: u32::try_from(width).expect("a few thousand"),
        height: u32::try_from(height).expect("a few thousand"),
        pixels,
    }
}

/// Makes a palette of 512 colors that cover the color cube about as a real
/// palette does.
fn palette() -> Palette {
    let level = |step: u32| f64::from(step) / 3.5 - 1.0;
    let clusters = (0..512)
        .map(|index| [level(index / 64), level(index / 8 % 8), level(index % 8)])
        .collect();
    Palette::new(clusters).expect("512 colors between -1 and 1")
}

fn preprocess(criterion: &mut Criterion) {
    let files = files();
    let palette = palette();

    let mut group = criterion.benchmark_group("decode");
    group.throughput(Throughput::Elements(1));
    for (name, bytes) in &files {
        group.bench_function(*name, |bencher| bencher.iter(|| decoded(black_box(bytes))));
    }
    group.finish();

    let mut group = criterion.benchmark_group("resize");
    group.throughput(Throughput::Elements(1));
    for (name, bytes) in &files {
        let image = decoded(bytes);
        for fit in [Fit::Squash, Fit::CenterCrop] {
            group.bench_function(format!("{name} {fit:?}"), |bencher| {
                bencher.iter(|| resize(black_box(&image).view(), 32, fit));
            });
        }
    }
    group.finish();

    let mut group = criterion.benchmark_group("quantize");
    group.throughput(Throughput::Elements(1));
    let quantizer = Quantizer::new(&palette);
    let small = resize(decoded(&files[1].1).view(), 32, Fit::Squash);
    group.bench_function("32x32", |bencher| {
        bencher.iter(|| quantizer.quantize(black_box(&small.pixels)));
    });
    group.bench_function("build", |bencher| {
        bencher.iter(|| Quantizer::new(black_box(&palette)));
    });
    group.finish();

    let mut group = criterion.benchmark_group("tokenize");
    group.throughput(Throughput::Elements(1));
    let preprocessor = Preprocessor::new(&palette, 32, LIMITS);
    for (name, bytes) in files {
        let input = ImageInput::Encoded(Bytes::from(bytes));
        group.bench_function(name, |bencher| {
            bencher.iter(|| {
                preprocessor.tokenize(
                    &input,
                    PreprocessOptions::default(),
                    &DecodeBudget::endless(),
                )
            });
        });
    }
    group.finish();
}

criterion_group!(benches, preprocess);
criterion_main!(benches);
