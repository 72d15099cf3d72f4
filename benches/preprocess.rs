//! Seconds per image on one core, step by step, for `scripts/bench_pictures.py`
//! (`make bench`), which compares them with Pillow's.
//!
//! Each line of standard input is a time in milliseconds, a space and the path
//! of an image file; each line of standard output is a JSON object with the
//! median seconds of each step, repeated for that time.

use std::error::Error;
use std::hint::black_box;
use std::io::{BufRead as _, Write as _};
use std::time::{Duration, Instant};

use bytes::Bytes;
use imagegpt::imaging::decode::decode;
use imagegpt::imaging::resize::resize;
use imagegpt::imaging::{
    Alpha, DecodeBudget, Fit, ImageInput, ImageLimits, Palette, PreprocessOptions, Preprocessor,
    Quantizer,
};

const LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 64 << 20,
    image_pixels_max: 50_000_000,
    decode_bytes_max: 1 << 30,
};
const SIDE: u32 = 32;

/// Makes a palette of 512 colors that cover the color cube about as a real
/// palette does.
fn palette() -> Palette {
    let level = |step: u32| f64::from(step) / 3.5 - 1.0;
    let clusters = (0..512)
        .map(|index| [level(index / 64), level(index / 8 % 8), level(index % 8)])
        .collect();
    Palette::new(clusters).expect("512 colors between -1 and 1")
}

/// Returns the median seconds of a step.
fn median<T>(time: Duration, mut step: impl FnMut() -> T) -> f64 {
    let began = Instant::now();
    let mut seconds = Vec::new();
    while seconds.len() < 3 || began.elapsed() < time {
        let started = Instant::now();
        black_box(step());
        seconds.push(started.elapsed().as_secs_f64());
    }
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

fn main() -> Result<(), Box<dyn Error>> {
    let palette = palette();
    let preprocessor = Preprocessor::new(&palette, SIDE, LIMITS);
    let quantizer = Quantizer::new(&palette);
    let mut output = std::io::stdout().lock();
    for line in std::io::stdin().lock().lines() {
        let line = line?;
        let (time, path) = line.split_once(' ').ok_or("no time and path")?;
        let time = Duration::from_millis(time.parse()?) / 5;
        let bytes = std::fs::read(path)?;
        let whole = || decode(&bytes, Alpha::Drop, &LIMITS, &DecodeBudget::endless());
        let image = whole()?;
        let small = resize(image.view(), SIDE, Fit::Squash);
        let input = ImageInput::Encoded(Bytes::from(bytes.clone()));
        let tokens = || {
            let options = PreprocessOptions::default();
            preprocessor.tokenize(&input, options, &DecodeBudget::endless())
        };
        tokens()?;
        let steps = serde_json::json!({
            "decode": median(time, whole),
            "resize": median(time, || resize(image.view(), SIDE, Fit::Squash)),
            "crop": median(time, || resize(image.view(), SIDE, Fit::CenterCrop)),
            "quantize": median(time, || quantizer.quantize(&small.pixels)),
            "tokenize": median(time, tokens),
        });
        writeln!(output, "{steps}")?;
        output.flush()?;
    }
    Ok(())
}
