//! Any bytes as an image file: 1024 tokens or an error that is the file's, in
//! bounded time and memory. Seed it with `tests/golden/images`.
#![no_main]

use std::sync::LazyLock;

use bytes::Bytes;
use imagegpt::imaging::{
    Alpha, DecodeBudget, Fit, ImageInput, ImageLimits, Palette, PreprocessError, PreprocessOptions,
    Preprocessor,
};
use libfuzzer_sys::fuzz_target;

static PREPROCESSOR: LazyLock<Preprocessor> = LazyLock::new(|| {
    let clusters = (0..16).map(|index| [f64::from(index) / 7.5 - 1.0; 3]);
    let palette = Palette::new(clusters.collect()).expect("16 grays");
    let limits = ImageLimits {
        image_bytes_max: 1 << 20,
        image_pixels_max: 100_000,
        decode_bytes_max: 4 << 20,
    };
    Preprocessor::new(&palette, 32, limits)
});

fuzz_target!(|file: &[u8]| {
    // The options from the last byte, which formats ignore or check little.
    let choice = file.last().copied().unwrap_or(0);
    let options = PreprocessOptions {
        fit: if choice & 1 == 0 {
            Fit::Squash
        } else {
            Fit::CenterCrop
        },
        alpha: if choice & 2 == 0 {
            Alpha::Drop
        } else {
            Alpha::White
        },
    };
    let input = ImageInput::Encoded(Bytes::copy_from_slice(file));
    match PREPROCESSOR.tokenize(&input, options, &DecodeBudget::endless()) {
        Ok(tokenized) => assert_eq!(tokenized.tokens.len(), 1024),
        Err(PreprocessError::Panicked { format }) => panic!("the {format} decoder panicked"),
        Err(_) => {}
    }
});
