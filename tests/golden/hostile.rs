//! Files that are truncated, inconsistent or tampered with: each gives tokens
//! or an error in a short time, and never a panic. `tests/decode` tampers at
//! random.

use std::fs;

use bytes::Bytes;
use imagegpt::imaging::{
    Alpha, DecodeBudget, Fit, ImageInput, PreprocessError, PreprocessOptions, Preprocessor,
};

use super::{LIMITS, POSITIONS, images, preprocessor};

fn tokenize(preprocessor: &Preprocessor, bytes: &[u8]) -> Result<(), PreprocessError> {
    let options = PreprocessOptions {
        fit: Fit::CenterCrop,
        alpha: Alpha::White,
    };
    let input = ImageInput::Encoded(Bytes::copy_from_slice(bytes));
    let tokenized = preprocessor.tokenize(&input, options, &DecodeBudget::endless())?;
    assert_eq!(tokenized.tokens.len(), POSITIONS);
    Ok(())
}

fn files() -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = fs::read_dir(images())
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .map(|path| {
            let name = path.file_name().unwrap().to_string_lossy().into_owned();
            (name, fs::read(path).unwrap())
        })
        .collect();
    files.sort();
    files
}

/// Truncated files are refused, as by Pillow, which raises "image file is
/// truncated".
#[test]
fn files_cut_in_half_are_refused() {
    let preprocessor = preprocessor(LIMITS);
    for (name, bytes) in files() {
        // Of an animation the first half may be whole frames, and 4 pixels of a
        // tiny image whole rows.
        if name.contains("animated") || bytes.len() < 100 {
            continue;
        }
        let outcome = tokenize(&preprocessor, &bytes[..bytes.len() / 2]);
        assert!(
            matches!(outcome, Err(PreprocessError::Damaged { .. })),
            "{name}: {outcome:?}"
        );
    }
}

/// The end marker of a JPEG of several scans is needed, as by Pillow: further
/// scans could follow. A single scan says itself when it is whole.
#[test]
fn a_jpeg_without_its_end_is_whole_if_its_pixels_are() {
    let preprocessor = preprocessor(LIMITS);
    let cut = "encoded: the JPEG is damaged or cut short: no end-of-image marker";
    for (name, bytes_cut, expected) in [
        ("jpeg-420.jpg", 2, None),
        ("jpeg-gray.jpg", 2, None),
        ("jpeg-420.jpg", 8, Some(cut)),
        ("jpeg-gray.jpg", 8, Some(cut)),
        ("jpeg-progressive.jpg", 2, Some(cut)),
    ] {
        let bytes = fs::read(images().join(name)).unwrap();
        let outcome = tokenize(&preprocessor, &bytes[..bytes.len() - bytes_cut]);
        let error = outcome.err().map(|error| error.to_string());
        assert_eq!(
            error.as_deref(),
            expected,
            "{name} without {bytes_cut} bytes"
        );
    }
}

/// Headers that claim more pixels than the file has, in every format.
#[test]
fn large_claims_are_refused_by_the_header() {
    let preprocessor = preprocessor(LIMITS);
    let check = |name: &str, patches: &[(usize, &[u8])], format: &str| {
        let mut bytes = fs::read(images().join(name)).unwrap();
        for (at, patch) in patches {
            bytes[*at..][..patch.len()].copy_from_slice(patch);
        }
        let error = tokenize(&preprocessor, &bytes).unwrap_err().to_string();
        let expected = format!("encoded: the {format} claims ");
        assert!(
            error.starts_with(&expected) && error.ends_with("(--image-pixels-max)"),
            "{name}: {error}"
        );
    };
    let frame = |bytes: &[u8]| {
        let start = bytes.windows(2).position(|pair| pair == [0xff, 0xc0]);
        start.unwrap() + 5
    };
    let jpeg = fs::read(images().join("jpeg-gray.jpg")).unwrap();
    check("jpeg-gray.jpg", &[(frame(&jpeg), &[0xff; 4])], "JPEG");
    check("gif-p.gif", &[(6, &[0xff; 4])], "GIF");
    // The frame, not the screen.
    let gif = fs::read(images().join("gif-p.gif")).unwrap();
    let table = 13 + 3 * (2 << (gif[10] & 7));
    let at = table + gif[table..].iter().position(|&byte| byte == b',').unwrap();
    check("gif-p.gif", &[(at + 5, &[0xff; 4])], "GIF");
    check(
        "bmp-rgb.bmp",
        &[(18, &[0x20, 0x4e, 0, 0, 0x20, 0x4e, 0, 0])],
        "BMP",
    );
    // Width, height, and the rows of its one strip.
    let tiff = fs::read(images().join("tiff-rgb.tiff")).unwrap();
    let value = |tag: u16, kind: u8| {
        let entry = [&tag.to_le_bytes()[..], &[kind, 0, 1, 0, 0, 0]].concat();
        8 + tiff.windows(8).position(|window| window == entry).unwrap()
    };
    let sides = [value(256, 4), value(257, 4), value(278, 4)].map(|at| (at, &[0xff; 2][..]));
    check("tiff-rgb.tiff", &sides, "TIFF");
    // The lossy frame inside, not the canvas.
    let webp = fs::read(images().join("webp-lossy.webp")).unwrap();
    let at = webp.windows(4).position(|kind| kind == b"VP8 ").unwrap() + 14;
    check(
        "webp-lossy.webp",
        &[(at, &[0xff, 0x3f, 0xff, 0x3f])],
        "WebP",
    );
}

/// Compresses 150 MB of zeros to about 1 MB of zlib.
fn zlib_bomb() -> Vec<u8> {
    const MATCHES: u32 = 600_000;
    let mut bits = Bits::default();
    // The last block, with the fixed codes: a zero, then itself 258 times over
    // (length code 285, distance code 0), then the end code 256.
    bits.push(0b011, 3);
    bits.push_code(0b0011_0000, 8);
    for _ in 0..MATCHES {
        bits.push_code(0b1100_0101, 8);
        bits.push_code(0, 5);
    }
    bits.push_code(0, 7);
    let len = MATCHES * 258 + 1;
    let mut bytes = vec![0x78, 0x01];
    bytes.extend(bits.finish());
    // Adler-32 of zeros.
    bytes.extend((((len % 65_521) << 16) | 1).to_be_bytes());
    bytes
}

/// Bit writer in the order of deflate, lowest bit first.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    pending: u32,
    count: u32,
}

impl Bits {
    fn push(&mut self, value: u32, count: u32) {
        self.pending |= value << self.count;
        self.count += count;
        while self.count >= 8 {
            self.bytes.push(self.pending.to_le_bytes()[0]);
            self.pending >>= 8;
            self.count -= 8;
        }
    }

    /// Writes a Huffman code, highest bit first.
    fn push_code(&mut self, code: u32, count: u32) {
        self.push(code.reverse_bits() >> (32 - count), count);
    }

    fn finish(mut self) -> Vec<u8> {
        self.push(0, 7);
        self.bytes
    }
}

/// Inserts a chunk in front of a PNG's pixels.
fn with_chunk(png: &[u8], kind: [u8; 4], body: &[u8]) -> Vec<u8> {
    let crc = [kind.as_slice(), body]
        .concat()
        .iter()
        .fold(u32::MAX, |crc, &byte| {
            (0..8).fold(crc ^ u32::from(byte), |crc, _| {
                (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
            })
        });
    // Signature and IHDR.
    let (head, tail) = png.split_at(8 + 25);
    let len = u32::try_from(body.len()).unwrap().to_be_bytes();
    [head, &len, &kind, body, &(!crc).to_be_bytes(), tail].concat()
}

/// Peak memory of hostile files, measured in a process of its own because peak
/// memory is per process.
#[test]
#[ignore = "run by compressed_bombs_stay_small"]
fn decode_bombs() {
    let preprocessor = preprocessor(LIMITS);
    let png = fs::read(images().join("png-rgba.png")).unwrap();
    let bomb = zlib_bomb();
    for (kind, prefix) in [
        (*b"zTXt", b"Comment\0\0".as_slice()),
        (*b"iCCP", b"profile\0\0"),
        (*b"iTXt", b"XML:com.adobe.xmp\0\x01\0\0\0"),
    ] {
        let bytes = with_chunk(&png, kind, &[prefix, &bomb].concat());
        tokenize(&preprocessor, &bytes).unwrap();
    }
    // As the pixels of a small image: more than enough of them.
    let header_only = [&png[..33], &png[png.len() - 12..]].concat();
    let _ = tokenize(&preprocessor, &with_chunk(&header_only, *b"IDAT", &bomb));

    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    for line in status.lines() {
        if let Some(peak) = line.strip_prefix("VmHWM:") {
            println!("\npeak KiB: {}", peak.trim().trim_end_matches(" kB"));
        }
    }
}

#[test]
#[cfg(target_os = "linux")]
fn compressed_bombs_stay_small() {
    const PEAK_KIB_MAX: u64 = 64 << 10;
    let output = std::process::Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "hostile::decode_bombs",
            "--ignored",
            "--nocapture",
        ])
        .output()
        .unwrap();
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{text}");
    let peak = text
        .lines()
        .find_map(|line| line.strip_prefix("peak KiB: "))
        .unwrap();
    let peak: u64 = peak.parse().unwrap();
    assert!(peak < PEAK_KIB_MAX, "{peak} KiB");
}
