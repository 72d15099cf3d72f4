//! Decodes files and prints one line of JSON for each: its size, the SHA-256 of
//! its upright RGB pixels, its tokens and the CPU time of decoding, or the error. `make corpus` compares
//! the lines with Pillow.
//!
//! Usage: `pixels PREPROCESSOR_CONFIG`, with the paths on standard input, one
//! per line.

#![expect(
    clippy::print_stdout,
    reason = "a program whose output is what it prints"
)]

use std::fmt::Write as _;
use std::io::{self, BufRead as _};
use std::time::Duration;
use std::{env, fs};

use imagegpt::imaging::decode::decode;
use imagegpt::imaging::resize::resize;
use imagegpt::imaging::{Alpha, DecodeBudget, Fit, ImageLimits, Palette, Quantizer};
use rustix::time::{ClockId, clock_gettime};
use serde::Deserialize;
use serde_json::json;
use sha2::{Digest, Sha256};

/// Limits that only pictures of extreme size reach.
const LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 1 << 30,
    image_pixels_max: 200_000_000,
    decode_bytes_max: 2 << 30,
};

#[derive(Deserialize)]
struct Config {
    clusters: Vec<[f64; 3]>,
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let config = env::args()
        .nth(1)
        .ok_or("usage: pixels PREPROCESSOR_CONFIG")?;
    let config: Config = serde_json::from_slice(&fs::read(config)?)?;
    let quantizer = Quantizer::new(&Palette::new(config.clusters)?);
    for path in io::stdin().lock().lines() {
        let path = path?;
        let bytes = fs::read(&path)?;
        let began = cpu_time();
        let decoded = decode(&bytes, Alpha::Drop, &LIMITS, &DecodeBudget::endless());
        let decode = cpu_time().saturating_sub(began);
        let line = match decoded {
            Ok(image) => {
                let small = resize(image.view(), 32, Fit::Squash);
                json!({
                    "file": path,
                    "size": [image.width, image.height],
                    "sha256": hex(&Sha256::digest(&image.pixels)),
                    "tokens": quantizer.quantize(&small.pixels),
                    "decode_ms": decode.as_secs_f64() * 1e3,
                })
            }
            Err(error) => json!({"file": path, "error": error.to_string()}),
        };
        println!("{line}");
    }
    Ok(())
}

/// Returns the CPU time that this thread has used.
fn cpu_time() -> Duration {
    let time = clock_gettime(ClockId::ThreadCPUTime);
    Duration::new(
        u64::try_from(time.tv_sec).unwrap_or(0),
        u32::try_from(time.tv_nsec).unwrap_or(0),
    )
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::new(), |mut text, byte| {
        // Writing to a string does not fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}
