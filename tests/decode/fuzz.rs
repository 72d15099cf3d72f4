//! Files that are tampered with: each is decoded or refused within the limits
//! of memory and time, and decoding stops when no caller waits any more.
//!
//! `IMAGEGPT_FUZZ_SECONDS` sets the duration, `IMAGEGPT_FUZZ_SEED` the first
//! seed; `make fuzz` runs this test for ten minutes.

use std::collections::BTreeMap;
use std::env;
use std::time::{Duration, Instant};

use imagegpt::imaging::{ImageFormat, ImageLimits, PreprocessError};

use super::mutate::{Dice, mutate};
use super::seeds::{Seed, seeds};
use super::{SLACK_BYTES, measure};

/// Limits that are small enough that no file takes long, and large enough for
/// the seeds.
const LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 1 << 20,
    image_pixels_max: 250_000,
    decode_bytes_max: 4 << 20,
};

/// Largest CPU time of a run: 32 passes over the largest image, with debug
/// assertions, on a busy machine.
const CPU_MAX: Duration = Duration::from_secs(2);

/// Largest CPU time of a run after its caller has left: a pass over the largest
/// image.
const CPU_ABANDONED_MAX: Duration = Duration::from_millis(250);

const FORMATS: [ImageFormat; 6] = [
    ImageFormat::Png,
    ImageFormat::Jpeg,
    ImageFormat::WebP,
    ImageFormat::Gif,
    ImageFormat::Bmp,
    ImageFormat::Tiff,
];

/// Results of the runs of a format.
#[derive(Default)]
struct Tally {
    runs: u64,
    decoded: u64,
    abandoned: u64,
    slowest: Duration,
    slowest_abandoned: Duration,
    peak_bytes: u64,
}

#[test]
fn tampered_files_stay_within_the_limits() {
    let number = |name, default| env::var(name).map_or(default, |text| text.parse().unwrap());
    let seconds: u64 = number("IMAGEGPT_FUZZ_SECONDS", 12);
    let seed: u64 = number("IMAGEGPT_FUZZ_SEED", 0x1234_5678_9abc_def1);
    println!("IMAGEGPT_FUZZ_SEED={seed}");
    let corpus: Vec<(ImageFormat, Vec<Seed>)> =
        FORMATS.map(|format| (format, seeds(format))).into();
    let mut dice = Dice(seed.max(1));
    let mut tallies: BTreeMap<String, Tally> = BTreeMap::new();
    let end = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < end {
        for (format, seeds) in &corpus {
            let tally = tallies.entry(format.to_string()).or_default();
            let state = dice.0;
            let first = &seeds[dice.roll(seeds.len())];
            let other = &seeds[dice.roll(seeds.len())];
            let mut bytes = first.bytes.clone();
            mutate(*format, &mut bytes, &other.bytes, &mut dice);
            let looks = (dice.roll(8) == 0).then(|| u32::try_from(dice.roll(32)).unwrap());
            run(&first.name, state, &bytes, looks, tally);
        }
    }
    for (format, tally) in &tallies {
        println!(
            "{format}: {} runs, {} decoded, {} given up; slowest {:?}, {:?} after being given up; \
             largest peak {} bytes",
            tally.runs,
            tally.decoded,
            tally.abandoned,
            tally.slowest,
            tally.slowest_abandoned,
            tally.peak_bytes
        );
        assert!(tally.decoded > 0 && tally.decoded < tally.runs, "{format}");
    }
}

fn run(name: &str, state: u64, bytes: &[u8], looks: Option<u32>, tally: &mut Tally) {
    let measured = measure(bytes, &LIMITS, looks);
    let about = || {
        let path = env::temp_dir().join(format!("imagegpt-fuzz-{state}"));
        std::fs::write(&path, bytes).unwrap();
        format!("{name}, IMAGEGPT_FUZZ_SEED={state}, {}", path.display())
    };
    tally.runs += 1;
    tally.slowest = tally.slowest.max(measured.cpu);
    tally.peak_bytes = tally.peak_bytes.max(measured.peak_bytes);
    assert!(measured.cpu <= CPU_MAX, "{:?}: {}", measured.cpu, about());
    assert!(
        measured.peak_bytes <= LIMITS.decode_bytes_max + SLACK_BYTES,
        "{} bytes: {}",
        measured.peak_bytes,
        about()
    );
    if let Some(cpu) = measured.cpu_abandoned {
        tally.abandoned += 1;
        tally.slowest_abandoned = tally.slowest_abandoned.max(cpu);
        assert!(cpu <= CPU_ABANDONED_MAX, "{cpu:?}: {}", about());
        assert!(
            matches!(
                measured.outcome,
                Err(PreprocessError::Abandoned | PreprocessError::Panicked { .. })
            ),
            "{:?}: {}",
            measured.outcome.map(|image| (image.width, image.height)),
            about()
        );
    }
    match measured.outcome {
        Ok(_) => tally.decoded += 1,
        Err(PreprocessError::Panicked { .. }) => panic!("{}", about()),
        Err(_) => {}
    }
}
