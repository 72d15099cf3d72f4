//! Mutations of files: of sizes and offsets, of bytes, and by parts of other
//! files.

use imagegpt::imaging::ImageFormat;

/// Generator of pseudo-random numbers, the same for the same seed.
pub(crate) struct Dice(pub(crate) u64);

impl Dice {
    pub(crate) fn roll(&mut self, sides: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        usize::try_from(self.0 % sides.max(1) as u64).unwrap()
    }
}

/// Place of a number in a file.
#[derive(Clone, Copy)]
struct Field {
    at: usize,
    width: usize,
    little: bool,
}

/// Boundary values of arithmetic and limits.
const TURNS: [u64; 24] = [
    0,
    1,
    2,
    3,
    7,
    8,
    9,
    16,
    63,
    64,
    255,
    256,
    1000,
    0x3fff,
    0x7fff,
    0x8000,
    0xffff,
    0x1_0000,
    0xff_ffff,
    0x100_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_fff0,
    u64::MAX,
];

/// Changes a file in some places; `other` is a file of the same format.
pub(crate) fn mutate(format: ImageFormat, bytes: &mut Vec<u8>, other: &[u8], dice: &mut Dice) {
    for _ in 0..=dice.roll(3) {
        match dice.roll(8) {
            0..5 => {
                let fields = fields(format, bytes);
                if !fields.is_empty() {
                    let field = fields[dice.roll(fields.len())];
                    set(bytes, field, dice);
                }
            }
            5 | 6 => change_byte(bytes, dice),
            _ => splice(bytes, other, dice),
        }
    }
    // A wrong checksum or length would hide what lies behind it.
    if dice.roll(8) > 0 {
        repair(format, bytes);
    }
}

fn set(bytes: &mut [u8], field: Field, dice: &mut Dice) {
    let Some(place) = bytes.get_mut(field.at..field.at + field.width) else {
        return;
    };
    let mut now = [0; 8];
    for (to, byte) in now.iter_mut().zip(place.iter()) {
        *to = *byte;
    }
    if !field.little {
        now[..field.width].reverse();
    }
    let now = u64::from_le_bytes(now);
    let value = match dice.roll(6) {
        0 => now.wrapping_add(1),
        1 => now.wrapping_sub(1),
        2 => now.wrapping_mul(2 + dice.roll(200) as u64),
        3 => dice.roll(400) as u64,
        _ => TURNS[dice.roll(TURNS.len())],
    };
    let mut value = value.to_le_bytes();
    if !field.little {
        value[..field.width].reverse();
    }
    place.copy_from_slice(&value[..field.width]);
}

fn change_byte(bytes: &mut Vec<u8>, dice: &mut Dice) {
    if bytes.is_empty() {
        return;
    }
    let at = dice.roll(bytes.len());
    match dice.roll(4) {
        0 => bytes[at] ^= 1 << dice.roll(8),
        1 => bytes[at] = [0, 0x7f, 0x80, 0xff][dice.roll(4)],
        2 => bytes[at] = dice.roll(256).to_le_bytes()[0],
        _ => bytes.truncate(bytes.len() - dice.roll(bytes.len() / 2 + 1)),
    }
}

/// Replaces a part of a file by a part of another file, or repeats it.
fn splice(bytes: &mut Vec<u8>, other: &[u8], dice: &mut Dice) {
    let from = if dice.roll(2) == 0 {
        other.to_vec()
    } else {
        bytes.clone()
    };
    let start = dice.roll(from.len());
    let end = (start + dice.roll(200)).min(from.len());
    let at = dice.roll(bytes.len() + 1);
    let to = (at + dice.roll(200)).min(bytes.len());
    bytes.splice(at..to, from[start..end].iter().copied());
}

/// Returns the places of a file's sizes and offsets.
fn fields(format: ImageFormat, bytes: &[u8]) -> Vec<Field> {
    match format {
        ImageFormat::Png => png(bytes),
        ImageFormat::Jpeg => jpeg(bytes),
        ImageFormat::WebP => webp(bytes),
        ImageFormat::Gif => gif(bytes),
        ImageFormat::Bmp => bmp(bytes),
        ImageFormat::Tiff => tiff(bytes),
    }
}

fn of(little: bool, places: &[(usize, usize)]) -> Vec<Field> {
    let field = |&(at, width)| Field { at, width, little };
    places.iter().map(field).collect()
}

fn word(bytes: &[u8], at: usize, width: usize, little: bool) -> Option<usize> {
    let bytes = bytes.get(at..at.checked_add(width)?)?;
    let fold = |sum: usize, byte: &u8| sum << 8 | usize::from(*byte);
    Some(if little {
        bytes.iter().rev().fold(0, fold)
    } else {
        bytes.iter().fold(0, fold)
    })
}

/// Returns the places of chunks, which consist of kind and length in either
/// order, a body, and a checksum or padding.
fn chunks(bytes: &[u8], start: usize, png: bool) -> Vec<(usize, usize)> {
    let mut found = Vec::new();
    let mut at = start;
    while found.len() < 200 {
        let Some(len) = word(bytes, if png { at } else { at + 4 }, 4, !png) else {
            break;
        };
        found.push((at, len));
        let behind = if png { 4 } else { len % 2 };
        let Some(next) = (at + 8).checked_add(len).map(|next| next + behind) else {
            break;
        };
        at = next;
    }
    found
}

fn png(bytes: &[u8]) -> Vec<Field> {
    let mut fields = of(
        false,
        &[
            (16, 4),
            (20, 4),
            (24, 1),
            (25, 1),
            (26, 1),
            (27, 1),
            (28, 1),
        ],
    );
    for (at, _) in chunks(bytes, 8, true) {
        fields.extend(of(
            false,
            &[(at, 4), (at + 8, 4), (at + 12, 4), (at + 16, 4)],
        ));
    }
    fields
}

fn webp(bytes: &[u8]) -> Vec<Field> {
    let mut fields = of(true, &[(4, 4)]);
    for (at, _) in chunks(bytes, 12, false) {
        fields.extend(of(true, &[(at + 4, 4)]));
        let body = at + 8;
        fields.extend(match bytes.get(at..at + 4) {
            Some(b"VP8X") => of(true, &[(body, 1), (body + 4, 3), (body + 7, 3)]),
            Some(b"ANMF") => of(
                true,
                &[
                    (body, 3),
                    (body + 3, 3),
                    (body + 6, 3),
                    (body + 9, 3),
                    (body + 15, 1),
                    (body + 20, 4),
                    (body + 24, 4),
                    (body + 30, 2),
                ],
            ),
            Some(b"VP8 ") => of(
                true,
                &[
                    (body, 3),
                    (body + 6, 2),
                    (body + 8, 2),
                    (body + 10, 1),
                    (body + 11, 4),
                ],
            ),
            Some(b"VP8L") => of(
                true,
                &[(body + 1, 4), (body + 5, 1), (body + 6, 1), (body + 7, 2)],
            ),
            Some(b"ALPH") => of(true, &[(body, 1), (body + 1, 1), (body + 2, 1)]),
            _ => Vec::new(),
        });
    }
    fields
}

fn jpeg(bytes: &[u8]) -> Vec<Field> {
    let mut fields = Vec::new();
    for at in 0..bytes.len().saturating_sub(3) {
        let [0xff, kind] = bytes[at..at + 2] else {
            continue;
        };
        let body = at + 4;
        match kind {
            0xc0..=0xc2 => {
                fields.extend(of(
                    false,
                    &[
                        (at + 1, 1),
                        (body, 1),
                        (body + 1, 2),
                        (body + 3, 2),
                        (body + 5, 1),
                    ],
                ));
                fields.extend((body + 6..body + 18).flat_map(|at| of(false, &[(at, 1)])));
            }
            0xda => fields.extend((body..body + 10).flat_map(|at| of(false, &[(at, 1)]))),
            0xc4 | 0xdb | 0xdd => {
                fields.extend((body..body + 17).flat_map(|at| of(false, &[(at, 1)])));
            }
            0xe0..=0xef => {}
            _ => continue,
        }
        fields.extend(of(false, &[(at + 1, 1), (at + 2, 2)]));
    }
    fields
}

fn bmp(bytes: &[u8]) -> Vec<Field> {
    let whole = bytes.starts_with(b"BM");
    let at = if whole { 14 } else { 0 };
    let mut fields = if whole {
        of(true, &[(10, 4)])
    } else {
        Vec::new()
    };
    // The header's length, size, planes, bits, compression, length of the
    // pixels, number of colors and masks; the shortest header has words.
    fields.extend(of(true, &[(at, 4), (at + 4, 4), (at + 8, 4), (at + 12, 2)]));
    fields.extend(of(
        true,
        &[(at + 4, 2), (at + 6, 2), (at + 8, 2), (at + 10, 2)],
    ));
    fields.extend(of(
        true,
        &[(at + 14, 2), (at + 16, 4), (at + 20, 4), (at + 32, 4)],
    ));
    fields.extend((0..4).flat_map(|mask| of(true, &[(at + 40 + 4 * mask, 4)])));
    fields
}

fn gif(bytes: &[u8]) -> Vec<Field> {
    let mut fields = of(true, &[(6, 2), (8, 2), (10, 1), (11, 1)]);
    let separators = (13..bytes.len()).filter(|&at| bytes[at] == b',' || bytes[at] == b'!');
    for at in separators.take(60) {
        fields.extend(of(
            true,
            &[
                (at + 1, 2),
                (at + 3, 2),
                (at + 5, 2),
                (at + 7, 2),
                (at + 9, 1),
                (at + 10, 1),
                (at + 11, 1),
            ],
        ));
    }
    fields
}

fn tiff(bytes: &[u8]) -> Vec<Field> {
    let little = bytes.first() == Some(&b'I');
    let big = word(bytes, 2, 2, little) == Some(43);
    let (count_len, entry_len, width, at) = if big { (8, 20, 8, 8) } else { (2, 12, 4, 4) };
    let mut fields = of(little, &[(at, width)]);
    let Some(start) = word(bytes, at, width, little) else {
        return fields;
    };
    let Some(count) = word(bytes, start, count_len, little) else {
        return fields;
    };
    for entry in (0..count.min(60)).map(|entry| start + count_len + entry * entry_len) {
        let (kind, number, value) = (entry + 2, entry + 4, entry + 4 + width);
        // Values twice as often: most are small and stand in the entry.
        fields.extend(of(
            little,
            &[
                (value, width),
                (value, 2),
                (number, width),
                (kind, 2),
                (entry, 2),
            ],
        ));
        if let (Some(values), Some(place)) = (
            word(bytes, number, width, little),
            word(bytes, value, width, little),
        ) && values > 1
        {
            fields.extend(of(
                little,
                &[(place, 4), (place.saturating_add(4), 4), (place, 2)],
            ));
        }
    }
    fields.retain(|field| field.at < bytes.len());
    fields
}

/// Corrects the checksums and the length of the whole file.
fn repair(format: ImageFormat, bytes: &mut [u8]) {
    match format {
        ImageFormat::Png => {
            for (at, len) in chunks(bytes, 8, true) {
                let Some(checked) = bytes.get(at + 4..at + 8 + len) else {
                    break;
                };
                let sum = crc32(checked).to_be_bytes();
                if let Some(place) = bytes.get_mut(at + 8 + len..at + 12 + len) {
                    place.copy_from_slice(&sum);
                }
            }
        }
        ImageFormat::WebP => {
            let len = u32::try_from(bytes.len().saturating_sub(8)).unwrap();
            if let Some(place) = bytes.get_mut(4..8) {
                place.copy_from_slice(&len.to_le_bytes());
            }
        }
        ImageFormat::Jpeg | ImageFormat::Gif | ImageFormat::Bmp | ImageFormat::Tiff => {}
    }
}

pub(crate) fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(u32::MAX, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| {
            (crc >> 1) ^ (0xedb8_8320 * (crc & 1))
        })
    })
}
