//! Small files of every format and kind.

use std::fs;
use std::io::Write as _;
use std::path::Path;

use fax::encoder::Encoder;
use flate2::Compression;
use flate2::write::ZlibEncoder;
use image::ExtendedColorType;
use image::codecs::jpeg::JpegEncoder;
use imagegpt::imaging::ImageFormat;

use super::jpeg;

/// File from which tampered files are made.
#[derive(Clone)]
pub(crate) struct Seed {
    pub(crate) name: String,
    pub(crate) bytes: Vec<u8>,
}

/// Returns the seeds of a format: the small golden images, those of odd kinds,
/// and files of the kinds that they lack.
pub(crate) fn seeds(format: ImageFormat) -> Vec<Seed> {
    const BYTES_MAX: usize = 20_000;
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden");
    let mut seeds: Vec<Seed> = ["images", "pixels"]
        .into_iter()
        .flat_map(|name| fs::read_dir(folder.join(name)).unwrap())
        .map(|entry| entry.unwrap().path())
        .filter(|path| {
            // The odd JPEGs are made in `jpeg`.
            path.starts_with(folder.join("images"))
                || ["bmp", "dib", "gif", "tif"]
                    .map(Some)
                    .contains(&path.extension().and_then(std::ffi::OsStr::to_str))
        })
        .map(|path| Seed {
            name: path.file_name().unwrap().to_string_lossy().into_owned(),
            bytes: fs::read(path).unwrap(),
        })
        .filter(|seed| seed.bytes.len() <= BYTES_MAX)
        .chain(tiffs())
        .chain(jpeg::seeds())
        .filter(|seed| ImageFormat::guess(&seed.bytes) == Some(format))
        .collect();
    seeds.sort_by(|a, b| a.name.cmp(&b.name));
    seeds
}

/// Entry of a TIFF directory: tag, kind (3 for 16 bits, 4 for 32 bits, 7 for
/// bytes), values.
pub(crate) type Entry = (u16, u16, Vec<u32>);

/// Byte order and width of offsets of a file.
#[derive(Clone, Copy)]
pub(crate) struct Container {
    pub(crate) little: bool,
    pub(crate) big: bool,
}

pub(crate) const CLASSIC: Container = Container {
    little: true,
    big: false,
};

impl Container {
    fn number(self, bytes: &mut Vec<u8>, value: u64, width: usize) {
        if self.little {
            bytes.extend(&value.to_le_bytes()[..width]);
        } else {
            bytes.extend(&value.to_be_bytes()[8 - width..]);
        }
    }
}

/// Makes a TIFF of these entries, followed by the chunks, whose offsets and
/// lengths are in the tags `places`.
pub(crate) fn tiff(
    container: Container,
    entries: &[Entry],
    chunks: &[Vec<u8>],
    places: (u16, u16),
) -> Vec<u8> {
    let width = if container.big { 8 } else { 4 };
    let entry_len = if container.big { 20 } else { 12 };
    let mut entries = entries.to_vec();
    entries.push((places.0, 4, vec![0; chunks.len()]));
    let lens = chunks
        .iter()
        .map(|chunk| u32::try_from(chunk.len()).unwrap());
    entries.push((places.1, 4, lens.collect()));
    entries.sort_by_key(|entry| entry.0);
    let size = |kind: u16| match kind {
        3 => 2,
        4 => 4,
        _ => 1,
    };
    let start = if container.big { 16 } else { 8 };
    let directory = if container.big { 8 } else { 2 } + entries.len() * entry_len + width;
    let mut behind = start + directory;
    let spilled: usize = entries
        .iter()
        .map(|(_, kind, values)| values.len() * size(*kind))
        .filter(|len| *len > width)
        .sum();
    let mut at = behind + spilled;
    let mut offsets = Vec::new();
    for chunk in chunks {
        offsets.push(u32::try_from(at).unwrap());
        at += chunk.len();
    }
    let mut bytes = if container.little {
        b"II".to_vec()
    } else {
        b"MM".to_vec()
    };
    container.number(&mut bytes, if container.big { 43 } else { 42 }, 2);
    if container.big {
        container.number(&mut bytes, 8, 2);
        container.number(&mut bytes, 0, 2);
    }
    container.number(&mut bytes, start as u64, width);
    container.number(
        &mut bytes,
        entries.len() as u64,
        if container.big { 8 } else { 2 },
    );
    let mut tail = Vec::new();
    for (tag, kind, values) in &entries {
        let values = if *tag == places.0 { &offsets } else { values };
        container.number(&mut bytes, (*tag).into(), 2);
        container.number(&mut bytes, (*kind).into(), 2);
        container.number(&mut bytes, values.len() as u64, width);
        let mut packed = Vec::new();
        for value in values {
            container.number(&mut packed, (*value).into(), size(*kind));
        }
        if packed.len() > width {
            container.number(&mut bytes, behind as u64, width);
            behind += packed.len();
            tail.extend(packed);
        } else {
            packed.resize(width, 0);
            bytes.extend(packed);
        }
    }
    container.number(&mut bytes, 0, width);
    bytes.extend(tail);
    bytes.extend(chunks.concat());
    bytes
}

/// Returns the entries that every image has.
pub(crate) fn facts(
    (width, height): (u32, u32),
    samples: u32,
    bits: u32,
    compression: u32,
    photometric: u32,
) -> Vec<Entry> {
    vec![
        (256, 4, vec![width]),
        (257, 4, vec![height]),
        (258, 3, vec![bits; samples as usize]),
        (259, 3, vec![compression]),
        (262, 3, vec![photometric]),
        (277, 3, vec![samples]),
    ]
}

pub(crate) const STRIPS: (u16, u16) = (273, 279);
pub(crate) const TILES: (u16, u16) = (324, 325);

pub(crate) fn deflate(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = ZlibEncoder::new(Vec::new(), Compression::best());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

fn lzw(bytes: &[u8]) -> Vec<u8> {
    weezl::encode::Encoder::with_tiff_size_switch(weezl::BitOrder::Msb, 8)
        .encode(bytes)
        .unwrap()
}

fn pack_bits(bytes: &[u8]) -> Vec<u8> {
    let mut packed = Vec::new();
    for part in bytes.chunks(100) {
        if part.iter().all(|byte| *byte == part[0]) && part.len() > 1 {
            packed.push(u8::try_from(257 - part.len()).unwrap());
            packed.push(part[0]);
        } else {
            packed.push(u8::try_from(part.len() - 1).unwrap());
            packed.extend(part);
        }
    }
    packed
}

fn group4(bytes: &[u8], width: u16) -> Vec<u8> {
    let mut encoder = Encoder::new(fax::VecWriter::new());
    for row in bytes.chunks(usize::from(width).div_ceil(8)) {
        let colors = fax::slice_bits(row).take(width.into());
        let colors = colors.map(|bit| {
            if bit {
                fax::Color::Black
            } else {
                fax::Color::White
            }
        });
        encoder.encode_line(colors, width).unwrap();
    }
    encoder.finish().unwrap().finish()
}

/// Makes rows of a picture that is neither flat nor noise.
pub(crate) fn picture(row_bytes: usize, rows: usize) -> Vec<u8> {
    (0..row_bytes * rows)
        .map(|at| {
            let (x, y) = (at % row_bytes, at / row_bytes);
            u8::try_from((x * 5 + y * 3 + x * y / 7) % 256).unwrap()
        })
        .collect()
}

/// Function that compresses a strip or tile.
type Encode = fn(&[u8]) -> Vec<u8>;

/// Makes TIFFs of 48 x 40 pixels of every kind that is decoded.
#[expect(
    clippy::too_many_lines,
    reason = "a list of files, each with what sets it apart"
)]
pub(crate) fn tiffs() -> Vec<Seed> {
    const SIZE: (u32, u32) = (48, 40);
    let mut seeds = Vec::new();
    let mut add = |name: &str, bytes: Vec<u8>| {
        seeds.push(Seed {
            name: format!("tiff-made-{name}"),
            bytes,
        });
    };
    let big_endian = Container {
        little: false,
        big: false,
    };
    let big = Container {
        little: true,
        big: true,
    };
    let codecs: [(&str, u32, Encode); 4] = [
        ("none", 1, |bytes| bytes.to_vec()),
        ("lzw", 5, lzw),
        ("deflate", 8, deflate),
        ("packbits", 32773, pack_bits),
    ];
    let rgb = picture(48 * 3, 40);
    for (name, number, encode) in codecs {
        let mut strips = facts(SIZE, 3, 8, number, 2);
        strips.push((278, 4, vec![16]));
        let parts: Vec<Vec<u8>> = rgb.chunks(48 * 3 * 16).map(encode).collect();
        add(
            &format!("{name}-strips"),
            tiff(CLASSIC, &strips, &parts, STRIPS),
        );
        add(
            &format!("{name}-strips-mm"),
            tiff(big_endian, &strips, &parts, STRIPS),
        );
        add(
            &format!("{name}-strips-big"),
            tiff(big, &strips, &parts, STRIPS),
        );
        strips.push((317, 3, vec![2]));
        add(
            &format!("{name}-differences"),
            tiff(CLASSIC, &strips, &parts, STRIPS),
        );
        strips.push((266, 3, vec![2]));
        let reversed: Vec<Vec<u8>> = parts
            .iter()
            .map(|part| part.iter().map(|byte| byte.reverse_bits()).collect())
            .collect();
        add(
            &format!("{name}-reversed"),
            tiff(CLASSIC, &strips, &reversed, STRIPS),
        );

        let mut tiles = facts(SIZE, 3, 8, number, 2);
        tiles.extend([(322, 4, vec![32]), (323, 4, vec![16])]);
        let tile = encode(&picture(32 * 3, 16));
        let parts = vec![tile; 6];
        add(
            &format!("{name}-tiles"),
            tiff(CLASSIC, &tiles, &parts, TILES),
        );
        tiles.push((284, 3, vec![2]));
        let parts = vec![encode(&picture(32, 16)); 18];
        add(
            &format!("{name}-tiles-planar"),
            tiff(CLASSIC, &tiles, &parts, TILES),
        );

        let mut deep = facts(SIZE, 1, 16, number, 1);
        deep.push((317, 3, vec![2]));
        add(
            &format!("{name}-16"),
            tiff(big_endian, &deep, &[encode(&picture(96, 40))], STRIPS),
        );
        let mut extra = facts(SIZE, 4, 8, number, 2);
        extra.extend([(338, 3, vec![0]), (317, 3, vec![2])]);
        add(
            &format!("{name}-rgbx"),
            tiff(CLASSIC, &extra, &[encode(&picture(192, 40))], STRIPS),
        );
        let bits = facts(SIZE, 1, 1, number, 0);
        add(
            &format!("{name}-1"),
            tiff(CLASSIC, &bits, &[encode(&picture(6, 40))], STRIPS),
        );
        let mut colors = facts(SIZE, 1, 4, number, 3);
        colors.push((320, 3, (0..48).map(|level| level * 1300).collect()));
        add(
            &format!("{name}-p"),
            tiff(CLASSIC, &colors, &[encode(&picture(24, 40))], STRIPS),
        );
        let cmyk = facts(SIZE, 4, 8, number, 5);
        add(
            &format!("{name}-cmyk"),
            tiff(CLASSIC, &cmyk, &[encode(&picture(192, 40))], STRIPS),
        );
    }
    let bits = picture(6, 40);
    let mut fax = facts(SIZE, 1, 1, 4, 0);
    add("fax", tiff(CLASSIC, &fax, &[group4(&bits, 48)], STRIPS));
    fax.push((278, 4, vec![10]));
    let parts: Vec<Vec<u8>> = bits.chunks(60).map(|rows| group4(rows, 48)).collect();
    add("fax-strips", tiff(CLASSIC, &fax, &parts, STRIPS));
    let mut gray = Vec::new();
    JpegEncoder::new(&mut gray)
        .encode(&picture(48, 40), 48, 40, ExtendedColorType::L8)
        .unwrap();
    add(
        "jpeg",
        tiff(CLASSIC, &facts(SIZE, 1, 8, 7, 1), &[gray], STRIPS),
    );
    add(
        "jpeg-rgb",
        tiff(
            CLASSIC,
            &facts(SIZE, 3, 8, 7, 2),
            &[jpeg::plain(48, 40)],
            STRIPS,
        ),
    );
    seeds
}
