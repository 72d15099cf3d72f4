//! Files that were made to occupy a decoder or its memory, under a worker's
//! default limits.

use std::time::Duration;

use imagegpt::imaging::ImageLimits;

use super::jpeg::Shape;
use super::seeds::{CLASSIC, Entry, STRIPS, TILES, deflate, facts, tiff};
use super::{SLACK_BYTES, measure};

const LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 64 << 20,
    image_pixels_max: 64_000_000,
    decode_bytes_max: 512 << 20,
};

/// Checks that a file is refused quickly because of its header.
fn refused(name: &str, bytes: &[u8], expected: &str) {
    let measured = measure(bytes, &LIMITS, None);
    let error = measured.outcome.map(|_| ()).unwrap_err().to_string();
    println!(
        "{name}: {:?}, {} bytes: {error}",
        measured.cpu, measured.peak_bytes
    );
    assert!(error.contains(expected), "{name}: {error}");
    assert!(
        measured.cpu < Duration::from_millis(500),
        "{name}: {:?}",
        measured.cpu
    );
    assert!(
        measured.peak_bytes < SLACK_BYTES + 2 * bytes.len() as u64,
        "{name}: {} bytes",
        measured.peak_bytes
    );
}

/// Returns the TIFF entries of an image in tiles.
fn tiled(size: (u32, u32), tile: (u32, u32), samples: u32) -> Vec<Entry> {
    let mut entries = facts(size, samples, 8, 8, if samples < 3 { 1 } else { 2 });
    entries.extend([(322, 4, vec![tile.0]), (323, 4, vec![tile.1])]);
    if samples > 3 {
        entries.push((338, 3, vec![0; samples as usize - 3]));
    }
    entries
}

#[test]
fn tiles_are_checked_before_they_are_read() {
    let part = vec![b'x'; 16];
    let one = |size, tile, samples| {
        tiff(
            CLASSIC,
            &tiled(size, tile, samples),
            std::slice::from_ref(&part),
            TILES,
        )
    };
    refused(
        "a tile of 2^32 - 16",
        &one((16, 16), (u32::MAX - 15, 16), 64),
        "64 samples",
    );
    refused(
        "a tile of 2^32 - 16",
        &one((16, 16), (u32::MAX - 15, 16), 4),
        "(--decode-bytes-max)",
    );
    refused(
        "a tile of 2 GiB",
        &one((16, 1), (1 << 27, 1), 16),
        "(--decode-bytes-max)",
    );
    // Many rows of tiles, each of which is only padding.
    let zeros = deflate(&vec![0; 1 << 20]);
    let tall = tiff(
        CLASSIC,
        &tiled((1, 600), (1 << 20, 1), 1),
        &vec![zeros; 600],
        TILES,
    );
    refused("tiles of padding", &tall, "(--decode-bytes-max)");
}

#[test]
fn strips_are_counted() {
    let mut entries = facts((1, 300_000), 1, 8, 8, 1);
    entries.push((278, 4, vec![1]));
    let strips = vec![deflate(&[7]); 300_000];
    refused(
        "300000 strips",
        &tiff(CLASSIC, &entries, &strips, STRIPS),
        "300000 strips or tiles",
    );
    // The same megabyte for each of many strips that become a byte.
    let mut entries = facts((1, 1000), 1, 8, 8, 1);
    entries.push((278, 4, vec![1]));
    entries.push((279, 4, vec![1 << 20; 1000]));
    entries.push((273, 4, vec![8; 1000]));
    let bytes = [
        tiff(CLASSIC, &entries, &[], (65_000, 65_001)),
        vec![0; 1 << 20],
    ]
    .concat();
    refused(
        "strips of the same bytes",
        &bytes,
        "strips or tiles of 1048576000 bytes",
    );
}

#[test]
fn jpegs_inside_are_what_their_strip_is() {
    let mut entries = facts((16, 3), 1, 8, 7, 1);
    entries.push((278, 4, vec![1]));
    let jpeg = Shape {
        size: (4096, 4096),
        sampling: &[(1, 1)],
        scans: &[(&[0][..], (0, 63), 0)],
        progressive: false,
    }
    .file();
    let bytes = tiff(CLASSIC, &entries, &vec![jpeg; 3], STRIPS);
    refused("JPEGs that are larger", &bytes, "a JPEG of 4096 x 4096");
}

#[test]
fn scans_are_added_up() {
    let one: &[usize] = &[0];
    let mut scans = vec![(one, (0, 0), 0), (one, (1, 63), 13)];
    scans.extend((0..90).map(|_| (one, (1, 63), 0)));
    let bytes = Shape {
        size: (2048, 2048),
        sampling: &[(1, 1)],
        scans: &scans,
        progressive: true,
    }
    .file();
    let limits = ImageLimits {
        image_pixels_max: 5_000_000,
        ..LIMITS
    };
    let error = measure(&bytes, &limits, None)
        .outcome
        .map(|_| ())
        .unwrap_err();
    assert_eq!(
        error.to_string(),
        "encoded: the first 39 scans of the JPEG cover 163577856 pixels in total, over the limit \
         of 160000000 (32 times --image-pixels-max)"
    );
}

#[test]
fn components_in_separate_scans_give_the_same_pixels() {
    let decoded = |bytes: &[u8]| measure(bytes, &LIMITS, None).outcome.unwrap();
    let seeds = super::jpeg::seeds();
    for seed in &seeds {
        let image = decoded(&seed.bytes);
        assert_eq!((image.width, image.height), (52, 37), "{}", seed.name);
        if let Some(sampling) = seed.name.strip_suffix("-apart") {
            let whole = format!("{sampling}-whole");
            let whole = seeds.iter().find(|seed| seed.name == whole).unwrap();
            assert!(image == decoded(&whole.bytes), "{}", seed.name);
        }
    }
}

/// Makes a WebP of these chunks.
fn webp(chunks: &[(&[u8; 4], Vec<u8>)]) -> Vec<u8> {
    let mut bytes = b"RIFF\0\0\0\0WEBP".to_vec();
    for (kind, body) in chunks {
        bytes.extend_from_slice(*kind);
        bytes.extend(u32::try_from(body.len()).unwrap().to_le_bytes());
        bytes.extend(body);
        bytes.extend(vec![0; body.len() % 2]);
    }
    let len = u32::try_from(bytes.len() - 8).unwrap();
    bytes[4..8].copy_from_slice(&len.to_le_bytes());
    bytes
}

/// WebP files with chunks that a decoder might take for the frame.
#[test]
fn frames_are_as_large_as_their_canvas() {
    let header = vec![0, 0, 0, 0, 63, 0, 0, 63, 0, 0];
    let mut hidden = vec![0; 16];
    hidden.extend(b"JUNK");
    hidden.extend(0x7fff_fff0_u32.to_le_bytes());
    let mut frame = b"\x10\0\0\x9d\x01\x2a".to_vec();
    frame.extend([12_000_u16.to_le_bytes(), 12_000_u16.to_le_bytes()].concat());
    frame.extend(vec![0; 100]);
    let bytes = webp(&[
        (b"VP8X", header),
        (b"ANMF", hidden),
        (b"VP8 ", frame.clone()),
    ]);
    refused(
        "a hidden frame",
        &bytes,
        "a frame of 12000 x 12000 on a canvas of 64 x 64",
    );
    refused(
        "a large frame",
        &webp(&[(b"VP8 ", frame)]),
        "claims 12000 x 12000",
    );
}

/// Bit writer, lowest bit first.
#[derive(Default)]
struct Bits {
    bytes: Vec<u8>,
    word: u64,
    count: u32,
}

impl Bits {
    fn push(&mut self, value: u64, count: u32) {
        self.word |= value << self.count;
        self.count += count;
        while self.count >= 8 {
            self.bytes.push(self.word.to_le_bytes()[0]);
            self.word >>= 8;
            self.count -= 8;
        }
    }

    /// Writes a code with the 11 lengths 1 to 10 and 10, whose table has 1024
    /// entries.
    fn push_code(&mut self) {
        self.push(0, 1);
        self.push(15, 4);
        for symbol in [
            17, 18, 0, 1, 2, 3, 4, 5, 16, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15,
        ] {
            self.push(
                match symbol {
                    1..=6 => 3,
                    7..=10 => 4,
                    _ => 0,
                },
                3,
            );
        }
        // 11 of them: in 4 bits, without the first two.
        self.push(1, 1);
        self.push(1, 3);
        self.push(9, 4);
        for length in [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10_u64] {
            let (code, bits) = if length <= 6 {
                (length - 1, 3)
            } else {
                (length + 5, 4)
            };
            self.push(code.reverse_bits() >> (64 - bits), bits);
        }
    }
}

#[test]
fn codes_are_counted_before_they_are_built() {
    const GROUPS: usize = 600;
    let mut bits = Bits::default();
    bits.push(0x2f, 8);
    // 1 x 1, without alpha, version 0; no transform and no cache.
    bits.push(0, 14 + 14 + 1 + 3 + 1 + 1);
    // Groups by an image of one pixel, of red and green 255: 65536 of them.
    bits.push(1, 1);
    bits.push(0, 3 + 1);
    for _ in 0..2 {
        bits.push(0b101, 3);
        bits.push(255, 8);
    }
    for _ in 0..3 {
        bits.push(0b0001, 4);
    }
    for _ in 0..5 * GROUPS {
        bits.push_code();
    }
    bits.push(0, 16);
    let bytes = webp(&[(b"VP8L", bits.bytes)]);
    let limits = ImageLimits {
        decode_bytes_max: 8 << 20,
        ..LIMITS
    };
    let measured = measure(&bytes, &limits, None);
    let error = measured.outcome.map(|_| ()).unwrap_err().to_string();
    assert!(
        error.starts_with("encoded: decoding the 1 x 1 WebP takes up to "),
        "{error}"
    );
    assert!(
        measured.peak_bytes < SLACK_BYTES,
        "{} bytes",
        measured.peak_bytes
    );
}

/// Huffman codes without pixels cost no more time than pixels.
#[test]
fn codes_without_pixels_are_not_worked_through() {
    let strip = |compression, part: Vec<u8>| {
        let mut entries = facts((64, 64), 1, 8, compression, 1);
        entries.push((278, 4, vec![64]));
        tiff(CLASSIC, &entries, &[part], STRIPS)
    };
    // LZW's code 256, of 9 bits, again and again; PackBits' 128; stored blocks of
    // Deflate that are empty.
    let clears = [0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02, 0x01, 0x00].repeat(1 << 20);
    let stored = [b"\x78\x01".as_slice(), &b"\0\0\0\xff\xff".repeat(2 << 20)].concat();
    for (name, compression, part) in [
        ("clears", 5, clears),
        ("no-ops", 32773, vec![0x80; 10 << 20]),
        ("stored", 8, stored),
    ] {
        refused(name, &strip(compression, part), "the TIFF is damaged");
    }
    // Nor where the header claims pixels enough for all of them.
    let mut entries = facts((8000, 8000), 1, 8, 5, 1);
    entries.push((278, 4, vec![8000]));
    let clears = [0x80, 0x40, 0x20, 0x10, 0x08, 0x04, 0x02, 0x01, 0x00].repeat(1 << 20);
    let claimed = tiff(CLASSIC, &entries, &[clears], STRIPS);
    let measured = measure(&claimed, &LIMITS, None);
    let error = measured.outcome.map(|_| ()).unwrap_err().to_string();
    assert!(error.contains("the TIFF is damaged"), "{error}");
    // Working through all of them takes seconds.
    assert!(
        measured.cpu < Duration::from_millis(500),
        "{:?}",
        measured.cpu
    );
}
