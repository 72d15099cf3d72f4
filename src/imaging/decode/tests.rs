use super::*;

const LIMITS: ImageLimits = ImageLimits {
    image_bytes_max: 1 << 20,
    image_pixels_max: 10_000,
    decode_bytes_max: 1 << 20,
};

fn error(bytes: &[u8]) -> String {
    decode(bytes, Alpha::Drop, &LIMITS, &DecodeBudget::endless())
        .unwrap_err()
        .to_string()
}

/// Builds a PNG of one chunk after another, with right checksums.
fn png(chunks: &[(&[u8; 4], &[u8])]) -> Vec<u8> {
    let mut bytes = b"\x89PNG\r\n\x1a\n".to_vec();
    for (kind, body) in chunks {
        bytes.extend(u32::try_from(body.len()).unwrap().to_be_bytes());
        let checked = [kind.as_slice(), body].concat();
        bytes.extend(&checked);
        bytes.extend(crc32(&checked).to_be_bytes());
    }
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
        })
    })
}

fn header_of(width: u32, height: u32) -> Vec<u8> {
    let size = [width.to_be_bytes(), height.to_be_bytes()].concat();
    [size.as_slice(), &[8, 2, 0, 0, 0]].concat()
}

#[test]
fn formats_are_known_by_content() {
    let check =
        |bytes: &[u8], expected| assert_eq!(ImageFormat::guess(bytes), expected, "{bytes:x?}");
    check(b"\x89PNG\r\n\x1a\n", Some(ImageFormat::Png));
    check(b"\xff\xd8\xff\xe0", Some(ImageFormat::Jpeg));
    check(b"RIFF\0\0\0\0WEBP", Some(ImageFormat::WebP));
    check(b"RIFF\0\0\0\0WAVE", None);
    check(b"GIF87a", Some(ImageFormat::Gif));
    check(b"GIF89a", Some(ImageFormat::Gif));
    check(b"GIF88a", None);
    check(b"BM", Some(ImageFormat::Bmp));
    check(b"II*\0", Some(ImageFormat::Tiff));
    check(b"MM\0*", Some(ImageFormat::Tiff));
    // Pillow takes the number in either byte order.
    check(b"II\0*", Some(ImageFormat::Tiff));
    check(b"MM*\0", Some(ImageFormat::Tiff));
    check(b"", None);
}

#[test]
fn a_bmp_without_a_file_header_is_known_by_its_image_header() {
    let dib = |len: u32, width: u32, planes: u16, bits: u16, compression: u32| {
        let mut bytes = [len, width, 7].map(u32::to_le_bytes).concat();
        bytes.extend([planes, bits].map(u16::to_le_bytes).concat());
        bytes.extend(compression.to_le_bytes());
        bytes.resize(124, 0);
        ImageFormat::guess(&bytes)
    };
    for len in [40, 52, 56, 64, 108, 124] {
        assert_eq!(dib(len, 5, 1, 24, 0), Some(ImageFormat::Bmp), "{len}");
    }
    for (len, width, planes, bits, compression) in [
        (16, 5, 1, 24, 0),
        (41, 5, 1, 24, 0),
        (40, 0, 1, 24, 0),
        (40, 5, 3, 24, 0),
        (40, 5, 1, 2, 0),
        (40, 5, 1, 24, 4),
    ] {
        assert_eq!(
            dib(len, width, planes, bits, compression),
            None,
            "{len} {bits}"
        );
    }
    let short = b"\x0c\0\0\0\x05\0\x07\0\x01\0\x18\0";
    assert_eq!(ImageFormat::guess(short), Some(ImageFormat::Bmp));
    assert_eq!(ImageFormat::guess(&short[..11]), None);
}

/// Builds a TIFF of entries that hold one 16-bit value each, followed by data.
/// The offsets of strips and their lengths are given relative to the data.
fn tiff(entries: &[(u16, u16)], strips: &[(u16, u16)], data: &[u8]) -> Vec<u8> {
    let count = u16::try_from(entries.len() + 2).unwrap();
    let behind = 8 + 2 + 12 * count + 4;
    let lists = u16::try_from(strips.len() * 2).unwrap();
    let mut bytes = b"II*\0\x08\0\0\0".to_vec();
    bytes.extend(count.to_le_bytes());
    let mut all: Vec<(u16, u32, u32)> = entries
        .iter()
        .map(|&(tag, value)| (tag, 1, u32::from(value)))
        .collect();
    let start = behind + 2 * lists;
    let many = u32::try_from(strips.len()).unwrap();
    // Four bytes of values stand in the entry itself.
    let both = |low: u16, high: u16| u32::from(high) << 16 | u32::from(low);
    match *strips {
        [(offset, len)] => all.extend([(273, 1, both(start + offset, 0)), (279, 1, both(len, 0))]),
        [(first, first_len), (second, second_len)] => all.extend([
            (273, 2, both(start + first, start + second)),
            (279, 2, both(first_len, second_len)),
        ]),
        _ => all.extend([
            (273, many, both(behind, 0)),
            (279, many, both(behind + lists, 0)),
        ]),
    }
    for (tag, count, value) in all {
        bytes.extend([tag, 3].map(u16::to_le_bytes).concat());
        bytes.extend(count.to_le_bytes());
        bytes.extend(value.to_le_bytes());
    }
    bytes.extend([0; 4]);
    bytes.extend(
        strips
            .iter()
            .flat_map(|(offset, _)| (start + offset).to_le_bytes()),
    );
    bytes.extend(strips.iter().flat_map(|(_, len)| len.to_le_bytes()));
    bytes.extend(data);
    bytes
}

#[test]
fn deep_planes_keep_their_high_bytes() {
    // Pillow takes each byte for a sample.
    let entries = [
        (256, 1),
        (257, 1),
        (258, 16),
        (259, 1),
        (262, 2),
        (277, 3),
        (284, 2),
    ];
    let file = tiff(
        &entries,
        &[(0, 2), (2, 2), (4, 2)],
        b"\x34\x12\x78\x56\xbc\x9a",
    );
    let image = decode(&file, Alpha::Drop, &LIMITS, &DecodeBudget::endless()).unwrap();
    assert_eq!(image.pixels, [0x12, 0x56, 0x9a]);
}

#[test]
fn windows_of_zstandard_count_as_memory() {
    let entries = [(256, 1), (257, 1), (258, 8), (259, 50000), (262, 1)];
    // A block of one byte, the last, in a frame with a window.
    let file = |window: u8| {
        let frame = [0x28, 0xb5, 0x2f, 0xfd, 0, window, 9, 0, 0, 77];
        tiff(&entries, &[(0, 10)], &frame)
    };
    let limits = ImageLimits {
        decode_bytes_max: 4 << 20,
        ..LIMITS
    };
    let decode = |window| {
        decode(
            &file(window),
            Alpha::Drop,
            &limits,
            &DecodeBudget::endless(),
        )
    };
    assert_eq!(decode(10 << 3).unwrap().pixels, [77; 3]);
    for window in [12 << 3, 17 << 3, 31 << 3 | 7] {
        let error = decode(window).unwrap_err().to_string();
        assert!(error.contains("(--decode-bytes-max)"), "{window}: {error}");
    }
}

#[test]
fn what_is_no_image_is_told_so() {
    assert_eq!(error(b""), "encoded: the image file is empty (0 bytes)");
    assert_eq!(
        error(b"<!DOCTYPE html><html></html>"),
        "encoded: not an image in an accepted format (PNG, JPEG, WebP, GIF, BMP or TIFF)"
    );
    let limits = ImageLimits {
        image_bytes_max: 4,
        ..LIMITS
    };
    assert_eq!(
        decode(b"12345", Alpha::Drop, &limits, &DecodeBudget::endless())
            .unwrap_err()
            .to_string(),
        "encoded: the file has 5 bytes, over the limit of 4 (--image-bytes-max)"
    );
}

#[test]
fn size_is_checked_before_pixels() {
    let header = header_of(60_000, 60_000);
    let claim = png(&[(b"IHDR", &header), (b"IDAT", b""), (b"IEND", b"")]);
    assert_eq!(claim.len(), 57);
    assert_eq!(
        error(&claim),
        "encoded: the PNG claims 60000 x 60000 = 3600000000 pixels, over the limit of 10000 \
         (--image-pixels-max)"
    );
    let limits = ImageLimits {
        image_pixels_max: u64::MAX,
        ..LIMITS
    };
    assert_eq!(
        decode(&claim, Alpha::Drop, &limits, &DecodeBudget::endless())
            .unwrap_err()
            .to_string(),
        "encoded: decoding the 60000 x 60000 PNG takes up to 25203884343 bytes, over the limit \
         of 1048576 (--decode-bytes-max)"
    );
}

#[test]
fn a_whole_file_may_be_followed_by_anything() {
    // One black pixel: a stored deflate block of filter 0 and three zeros.
    let data = b"\x78\x01\x01\x04\0\xfb\xff\0\0\0\0\0\x04\0\x01";
    let mut bytes = png(&[(b"IHDR", &header_of(1, 1)), (b"IDAT", data), (b"IEND", b"")]);
    let expected = RgbImage {
        width: 1,
        height: 1,
        pixels: vec![0; 3],
    };
    assert_eq!(
        decode(&bytes, Alpha::Drop, &LIMITS, &DecodeBudget::endless()).unwrap(),
        expected
    );
    bytes.extend(b"trailing garbage");
    assert_eq!(
        decode(&bytes, Alpha::Drop, &LIMITS, &DecodeBudget::endless()).unwrap(),
        expected
    );
}

#[test]
fn orientation_comes_from_exif_or_else_xmp() {
    let exif = |orientation: u8| {
        let mut bytes = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
        bytes.extend([orientation, 0, 0, 0]);
        bytes
    };
    let check = |exif: Option<&[u8]>, xmp: Option<&[u8]>, expected| {
        assert_eq!(
            orientation(exif, xmp).to_exif(),
            expected,
            "{exif:?} {xmp:?}"
        );
    };
    check(None, None, 1);
    check(Some(&exif(6)), None, 6);
    check(Some(&[b"Exif\0\0".as_slice(), &exif(8)].concat()), None, 8);
    check(Some(&exif(9)), None, 1);
    check(Some(b"II*"), None, 1);
    check(None, Some(b"<a tiff:Orientation=\"3\"/>"), 3);
    check(None, Some(b"<tiff:Orientation>5</tiff:Orientation>"), 5);
    check(None, Some(b"tiff:Orientation="), 1);
    check(Some(&exif(1)), Some(b"tiff:Orientation=\"3\""), 1);
    // An orientation in EXIF that is none still stands before XMP.
    check(Some(&exif(9)), Some(b"tiff:Orientation=\"3\""), 1);
}

#[test]
fn palettes_are_whole_colors_and_at_most_256() {
    let indexed = |palette: &[u8]| {
        let mut header = header_of(1, 1);
        header[9] = 3;
        // A stored deflate block of filter 0 and index 0.
        let data = b"\x78\x01\x01\x02\0\xfd\xff\0\0\0\x02\0\x01";
        png(&[
            (b"IHDR", &header),
            (b"PLTE", palette),
            (b"tRNS", b"\x80"),
            (b"IDAT", data),
            (b"IEND", b""),
        ])
    };
    let whole = indexed(&[1, 2, 3]);
    let image = decode(&whole, Alpha::Drop, &LIMITS, &DecodeBudget::endless()).unwrap();
    assert_eq!(image.pixels, [1, 2, 3]);
    for len in [1, 4, 64, 65, 767, 769, 771, 3000] {
        let error = error(&indexed(&vec![7; len]));
        assert!(
            error.starts_with("encoded: the PNG is damaged or cut short: "),
            "{len}: {error}"
        );
    }
    assert_eq!(
        error(&indexed(&[7; 64])),
        "encoded: the PNG is damaged or cut short: a palette of 64 bytes; it must have 3 bytes per \
         color and at most 768"
    );
}

/// Builds a TIFF of bilevel rows in fax codes, one strip per list of codes.
fn fax(compression: u16, width: u16, rows_per_strip: u16, strips: &[&str]) -> Vec<u8> {
    let strips: Vec<Vec<u8>> = strips.iter().map(|codes| packed(codes)).collect();
    let mut places = Vec::new();
    let mut at = 0;
    for strip in &strips {
        let len = u16::try_from(strip.len()).unwrap();
        places.push((at, len));
        at += len;
    }
    let height = rows_per_strip * u16::try_from(strips.len()).unwrap();
    let entries = [
        (256, width),
        (257, height),
        (258, 1),
        (259, compression),
        (262, 0),
        (278, rows_per_strip),
    ];
    tiff(&entries, &places, &strips.concat())
}

/// Packs a text of zeros and ones, with spaces for readers.
fn packed(bits: &str) -> Vec<u8> {
    let bits: Vec<u8> = bits.bytes().filter(|bit| *bit != b' ').collect();
    let byte = |bits: &[u8]| {
        (0..8).fold(0, |byte, at| {
            byte << 1 | u8::from(bits.get(at) == Some(&b'1'))
        })
    };
    bits.chunks(8).map(byte).collect()
}

#[test]
fn rows_of_fax_codes_are_exactly_as_wide_as_the_picture() {
    // A white run of 2 and a black run of 2.
    const ROW: &str = "0111 11";
    const MARK: &str = "000000000001";
    let marked = format!("{MARK} {ROW} {MARK} {ROW}");
    let unmarked = format!("{ROW} {ROW}");
    let row = [255, 255, 0, 0].map(|level| [level; 3]).concat();
    let whole = |file: &[u8]| {
        let image = decode(file, Alpha::Drop, &LIMITS, &DecodeBudget::endless()).unwrap();
        assert_eq!(image.pixels, row.repeat(image.height as usize));
    };
    whole(&fax(2, 4, 2, &[&format!("{ROW} 00 {ROW}")]));
    whole(&fax(3, 4, 2, &[&marked]));
    whole(&fax(3, 4, 2, &[&unmarked]));
    whole(&fax(3, 4, 2, &[&unmarked, &unmarked]));
    whole(&fax(3, 4, 2, &[&marked, &unmarked]));
    let damaged = |compression, strips: &[&str]| {
        let error = error(&fax(compression, 4, 2, strips));
        assert!(error.contains("does not decompress"), "{strips:?}: {error}");
    };
    // Runs of 2 and 3 pixels, of 2 pixels and a code that is none, and one row.
    damaged(2, &[&format!("0111 10 00 {ROW}")]);
    damaged(2, &[&format!("0111 0000 {ROW}")]);
    damaged(2, &[ROW]);
    // A row without a mark among others, a mark behind rows without, and a strip
    // with marks behind one without.
    damaged(3, &[&format!("{MARK} {ROW} {ROW}")]);
    damaged(3, &[&format!("{ROW} {MARK} {ROW}")]);
    damaged(3, &[&format!("{ROW} {ROW} {MARK}")]);
    damaged(3, &[&unmarked, &marked]);
}

/// Builds a GIF of 1 x 1 pixel with index 1, these blocks before the frame, and
/// a palette of two colors.
fn gif(palette: [u8; 6], blocks: &[u8]) -> Vec<u8> {
    let head = b"GIF89a\x01\0\x01\0\x80\0\0";
    // The codes clear, 1 and end, of 3 bits each.
    let frame = b",\0\0\0\0\x01\0\x01\0\0\x02\x02\x4c\x01\0;";
    [head.as_slice(), &palette, blocks, frame].concat()
}

#[test]
fn the_way_to_a_gifs_frame_is_pillows() {
    let palette = [10, 20, 30, 40, 50, 60];
    let pixels = |blocks: &[u8], alpha| {
        let file = gif(palette, blocks);
        let image = decode(&file, alpha, &LIMITS, &DecodeBudget::endless()).unwrap();
        image.pixels
    };
    let control = |flags: u8, index: u8| [0x21, 0xf9, 4, flags, 0, 0, index, 0];
    assert_eq!(pixels(b"", Alpha::White), [40, 50, 60]);
    // The last control block that names a transparent color counts.
    let both = [control(1, 1), control(0, 0)].concat();
    assert_eq!(pixels(&both, Alpha::White), [255; 3]);
    let both = [control(1, 1), control(1, 0)].concat();
    assert_eq!(pixels(&both, Alpha::White), [40, 50, 60]);
    // What is no block is skipped.
    assert_eq!(pixels(b"\0junk", Alpha::Drop), [40, 50, 60]);
    // A data block that is cut short is not read.
    let file = gif(palette, b"");
    let cut = error(&file[..file.len() - 3]);
    assert!(cut.starts_with("encoded: the GIF is damaged"), "{cut}");
    assert!(error(&file[..25]).ends_with("no whole header of a frame"));
}

#[test]
fn of_several_orientations_in_a_png_the_last_counts() {
    let exif = |orientation: u8| {
        let mut bytes = b"II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0".to_vec();
        bytes.extend([orientation, 0, 0, 0, 0, 0, 0, 0]);
        bytes
    };
    let text = |kind: &str| {
        let digits = exif(6)
            .iter()
            .fold(String::new(), |text, byte| text + &format!("{byte:02x}"));
        format!("Raw profile type exif\0{kind}\nexif\n26\n{digits}\n")
    };
    // Two white pixels: a stored deflate block of filter 0 and six bytes.
    let data = b"\x78\x01\x01\x07\0\xf8\xff\0\xff\xff\xff\xff\xff\xff\x14\xf2\x05\xfb";
    let height = |before: (&[u8; 4], &[u8]), after: (&[u8; 4], &[u8])| {
        let header = header_of(2, 1);
        let file = png(&[
            (b"IHDR", &header),
            before,
            (b"IDAT", data),
            after,
            (b"IEND", b""),
        ]);
        let image = decode(&file, Alpha::Drop, &LIMITS, &DecodeBudget::endless()).unwrap();
        image.height
    };
    let none = (b"teXt", b"".as_slice());
    assert_eq!(height((b"eXIf", &exif(6)), (b"eXIf", &exif(3))), 1);
    assert_eq!(height((b"eXIf", &exif(3)), (b"eXIf", &exif(6))), 2);
    assert_eq!(height((b"tEXt", text("").as_bytes()), none), 2);
    assert_eq!(height((b"iTXt", text("\0\0\0\0").as_bytes()), none), 2);
    assert_eq!(
        height((b"iTXt", text("\0\0\0\0").as_bytes()), (b"eXIf", &exif(1))),
        1
    );
}

#[test]
fn chunks_of_a_webp_fill_the_file() {
    let path = concat!(
        env!("CARGO_MANIFEST_DIR"),
        "/tests/golden/images/exif-8.webp"
    );
    let file = std::fs::read(path).unwrap();
    let with = |tail: &[u8]| {
        let mut file = [file.as_slice(), tail].concat();
        let len = u32::try_from(file.len() - 8).unwrap();
        file[4..8].copy_from_slice(&len.to_le_bytes());
        decode(&file, Alpha::Drop, &LIMITS, &DecodeBudget::endless())
    };
    assert!(with(b"").is_ok());
    assert!(with(b"what\x02\0\0\0ab").is_ok());
    for tail in [
        b"j".as_slice(),
        b"junkjunk",
        b"what\x04\0\0\0ab",
        b"what\x01\0\0\0a",
    ] {
        let error = with(tail).unwrap_err().to_string();
        assert!(error.contains("bytes that are no chunk"), "{error}");
    }
}
