//! The preprocess stage against the results of Pillow and transformers for the
//! same files (`make_golden.py`).

#![warn(clippy::disallowed_methods)]
#![expect(
    clippy::unwrap_used,
    clippy::print_stdout,
    reason = "a test that meets a surprise should stop there, and measured figures are printed"
)]

use std::fs;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use imagegpt::imaging::decode::decode;
use imagegpt::imaging::resize::resize_to;
use imagegpt::imaging::{
    Alpha, DecodeBudget, Fit, ImageInput, ImageLimits, Palette, PreprocessOptions, Preprocessor,
    Quantizer, RgbView,
};
use serde::Deserialize;
use sha2::{Digest, Sha256};

mod hostile;
mod pixels;

pub(crate) const POSITIONS: usize = 1024;

/// Row of golden.json.
#[derive(Debug, Deserialize)]
struct Case {
    file: String,
    fit: String,
    alpha: String,
    rgb_sha256: String,
    size: [u32; 2],
    tokens_offset: usize,
}

impl Case {
    fn options(&self) -> PreprocessOptions {
        PreprocessOptions {
            fit: match self.fit.as_str() {
                "SQUASH" => Fit::Squash,
                "CENTER_CROP" => Fit::CenterCrop,
                other => panic!("fit {other}"),
            },
            alpha: match self.alpha.as_str() {
                "DROP" => Alpha::Drop,
                "WHITE" => Alpha::White,
                other => panic!("alpha {other}"),
            },
        }
    }
}

pub(crate) fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_owned()
}

pub(crate) fn images() -> PathBuf {
    root().join("tests/golden/images")
}

pub(crate) const LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 16 << 20,
    image_pixels_max: 50_000_000,
    decode_bytes_max: 512 << 20,
};

pub(crate) fn preprocessor(limits: ImageLimits) -> Preprocessor {
    #[derive(Deserialize)]
    struct Config {
        clusters: Vec<[f64; 3]>,
    }
    let text = fs::read(root().join("models/untrained/preprocessor_config.json")).unwrap();
    let config: Config = serde_json::from_slice(&text).unwrap();
    Preprocessor::new(&Palette::new(config.clusters).unwrap(), 32, limits)
}

fn cases() -> Vec<(Case, Vec<u16>)> {
    let folder = root().join("tests/golden");
    let cases: Vec<Case> =
        serde_json::from_slice(&fs::read(folder.join("golden.json")).unwrap()).unwrap();
    let bytes = fs::read(folder.join("tokens.bin")).unwrap();
    let (words, rest) = bytes.as_chunks::<2>();
    assert!(rest.is_empty());
    let tokens: Vec<u16> = words.iter().copied().map(u16::from_le_bytes).collect();
    assert!(!cases.is_empty());
    cases
        .into_iter()
        .map(|case| {
            let expected = tokens[case.tokens_offset..][..POSITIONS].to_vec();
            (case, expected)
        })
        .collect()
}

/// Returns the number of tokens that differ.
fn mismatches(preprocessor: &Preprocessor, case: &Case, expected: &[u16]) -> Result<usize, String> {
    let bytes = Bytes::from(fs::read(images().join(&case.file)).unwrap());
    let tokenized = preprocessor
        .tokenize(
            &ImageInput::Encoded(bytes),
            case.options(),
            &DecodeBudget::endless(),
        )
        .map_err(|error| error.to_string())?;
    assert_eq!(tokenized.tokens.len(), POSITIONS);
    Ok(tokenized
        .tokens
        .iter()
        .zip(expected)
        .filter(|(ours, theirs)| ours != theirs)
        .count())
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;

    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns the stage at fault: the decoder, or the stages after it.
fn blame(case: &Case) -> &'static str {
    let bytes = fs::read(images().join(&case.file)).unwrap();
    match decode(
        &bytes,
        case.options().alpha,
        &LIMITS,
        &DecodeBudget::endless(),
    ) {
        Err(_) => "not decoded",
        Ok(image) if [image.width, image.height] != case.size => "another size",
        Ok(image) if hex(&Sha256::digest(&image.pixels)) != case.rgb_sha256 => "other pixels",
        Ok(_) => "the right pixels",
    }
}

#[test]
fn files_give_the_same_tokens() {
    let preprocessor = preprocessor(LIMITS);
    let mut failures = Vec::new();
    for (case, expected) in &cases() {
        match mismatches(&preprocessor, case, expected) {
            Ok(0) => {}
            outcome => failures.push(format!(
                "{} {} {}: {outcome:?}, {}",
                case.file,
                case.fit,
                case.alpha,
                blame(case)
            )),
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn the_filter_alone_is_pillows() {
    #[derive(Deserialize)]
    struct Row {
        from: [u32; 2],
        to: [u32; 2],
        input_offset: usize,
        output_offset: usize,
    }
    let folder = root().join("tests/golden");
    let rows: Vec<Row> =
        serde_json::from_slice(&fs::read(folder.join("resize.json")).unwrap()).unwrap();
    let data = fs::read(folder.join("resize.bin")).unwrap();
    let bytes = |[width, height]: [u32; 2]| width as usize * height as usize * 3;
    for row in rows {
        let pixels = &data[row.input_offset..][..bytes(row.from)];
        let expected = &data[row.output_offset..][..bytes(row.to)];
        let view = RgbView::new(row.from[0], row.from[1], pixels).unwrap();
        let resized = resize_to(view, row.to[0], row.to[1]);
        assert_eq!(resized.pixels, expected, "{:?} to {:?}", row.from, row.to);
    }
}

#[test]
fn ties_go_to_the_lowest_index_that_f64_finds() {
    #[derive(Deserialize)]
    struct Ties {
        clusters: Vec<[f64; 3]>,
        cases: Vec<Tie>,
    }
    #[derive(Deserialize)]
    struct Tie {
        color: [u8; 3],
        f64: u16,
    }
    let text = fs::read(root().join("tests/golden/ties.json")).unwrap();
    let ties: Ties = serde_json::from_slice(&text).unwrap();
    let quantizer = Quantizer::new(&Palette::new(ties.clusters).unwrap());
    for tie in ties.cases {
        assert_eq!(quantizer.nearest(tie.color), tie.f64, "{:?}", tie.color);
    }
}
