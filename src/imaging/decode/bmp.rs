//! Decoder of BMP files, and of DIB files, which lack the file header.
//!
//! The decoder is the worker's own: `image` refuses some of what Pillow reads,
//! and shows other colors for run lengths and for samples of 5 and 6 bits.
//!
//! Memory: the pixels alone, 1 to 4 bytes each. Work: each pixel once, and each
//! byte of run lengths once.
//!
//! Refused by name: masks of colors that Pillow does not know, compression by
//! JPEG, PNG or Huffman codes, and a gray palette whose pixels Pillow reads in
//! the wrong width.

use image::metadata::Orientation;

use super::pixels::{PixelLayout, Pixels};
use super::{Header, PreprocessError};

/// Bytes of the file header, which begins with "BM".
const FILE_HEADER: usize = 14;

/// Bytes of the palette and of a few numbers.
const OTHER_BYTES: u64 = 4 << 10;

/// Most colors of a palette, those beyond 256 without use.
const COLORS_MAX: u64 = 1 << 16;

/// Run lengths between two checks of the budget.
const STEP_RUNS: usize = 4096;

/// Meaning of the pixels of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BmpColors {
    /// Indexes of a palette.
    Indexed,
    /// Levels of gray.
    Gray,
    /// Black for 0, white for all else.
    Bilevel,
    /// 16 bits: 5 of red, some of green, and 5 of blue.
    Short { green: u32 },
    /// Whole bytes, with the positions of red, green and blue.
    Rgb { len: usize, places: [usize; 3] },
    /// Four bytes, with the positions of red, green, blue and alpha.
    Rgba { places: [usize; 4] },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum BmpCoding {
    Rows,
    Runs { nibbles: bool },
}

/// Facts of the header that precedes the palette.
struct Info<'a> {
    width: u32,
    height: u32,
    top_down: bool,
    bits: u32,
    compression: u32,
    colors: u32,
    /// True if a color of the palette has a fourth byte.
    padded: bool,
    /// Masks of red, green, blue and alpha.
    masks: Option<[u32; 4]>,
    /// The file behind the header, its masks included, and where it begins.
    behind: &'a [u8],
    end: usize,
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u16::from_le_bytes(*word).into())
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..)?.first_chunk()?;
    Some(u32::from_le_bytes(*word))
}

impl<'a> Info<'a> {
    /// Reads the header at an offset, or returns `None` if the file ends before
    /// it does or its kind is not known.
    fn read(file: &'a [u8], start: usize) -> Option<Self> {
        let info = file.get(start..)?;
        let len = u32_at(info, 0)?;
        let info = info.get(..usize::try_from(len).ok()?)?;
        let mut end = start + info.len();
        if len == 12 {
            return Some(Self {
                width: u16_at(info, 4)?,
                height: u16_at(info, 6)?,
                top_down: false,
                bits: u16_at(info, 10)?,
                compression: 0,
                colors: 0,
                padded: false,
                masks: None,
                behind: &file[end..],
                end,
            });
        }
        if !matches!(len, 40 | 52 | 56 | 64 | 108 | 124) {
            return None;
        }
        let height = u32_at(info, 8)?;
        // As in Pillow, other negative heights are too large to be read.
        let top_down = height >> 24 == 0xff;
        let compression = u32_at(info, 16)?;
        let mut masks = None;
        if compression == 3 {
            // The shortest header is followed by masks without that of alpha.
            let (from, count) = match len {
                40 => (file.get(end..)?.get(..12)?, 3),
                52 => (info.get(40..)?, 3),
                _ => (info.get(40..)?, 4),
            };
            end += if len == 40 { 12 } else { 0 };
            let mask = |at: usize| {
                if at < count {
                    u32_at(from, 4 * at)
                } else {
                    Some(0)
                }
            };
            masks = Some([mask(0)?, mask(1)?, mask(2)?, mask(3)?]);
        }
        Some(Self {
            width: u32_at(info, 4)?,
            height: if top_down {
                height.wrapping_neg()
            } else {
                height
            },
            top_down,
            bits: u16_at(info, 14)?,
            compression,
            colors: u32_at(info, 32)?,
            padded: true,
            masks,
            behind: &file[end..],
            end,
        })
    }

    /// Returns the bytes of a color in the palette.
    fn color_bytes(&self) -> usize {
        if self.padded { 4 } else { 3 }
    }

    /// Returns the number of colors of the palette.
    fn color_count(&self) -> u64 {
        match self.colors {
            0 => 1 << self.bits.min(32),
            count => count.into(),
        }
    }
}

/// Returns true if a file without a file header begins with an image header.
///
/// The first four bytes alone are too little to tell an image by: the other
/// fields must hold what an image can have.
pub(super) fn is_dib(file: &[u8]) -> bool {
    Info::read(file, 0).is_some_and(|info| {
        let planes = u16_at(file, if u32_at(file, 0) == Some(12) { 8 } else { 12 });
        planes == Some(1)
            && info.width > 0
            && info.height > 0
            && matches!(info.bits, 1 | 4 | 8 | 16 | 24 | 32)
            && info.compression <= 3
    })
}

pub(super) fn decode(
    file: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let (start, offset) = if file.starts_with(b"BM") {
        (FILE_HEADER, u32_at(file, 10).unwrap_or(0))
    } else {
        (0, 0)
    };
    let info = Info::read(file, start).ok_or_else(|| {
        header.damaged("a header cut short, or of another size than 12, 40, 52, 56, 64, 108 or 124")
    })?;
    header.admit_pixels(info.width, info.height)?;
    let palette = read_palette(&info, header)?;
    let coding = match info.compression {
        0 | 3 => BmpCoding::Rows,
        1 | 2 if info.bits <= 8 => BmpCoding::Runs {
            nibbles: info.compression == 2,
        },
        other => {
            return Err(header.unsupported(format!(
                "compression {other} with {} bits per pixel",
                info.bits
            )));
        }
    };
    let (colors, bits) = read_colors(&info, palette, coding, header)?;
    let layout = match colors {
        BmpColors::Gray | BmpColors::Bilevel => PixelLayout::Gray,
        BmpColors::Rgba { .. } => PixelLayout::Rgba,
        BmpColors::Indexed | BmpColors::Short { .. } | BmpColors::Rgb { .. } => PixelLayout::Rgb,
    };
    let pixel_bytes = layout.channels() as u64;
    header.admit(info.width, info.height, pixel_bytes, OTHER_BYTES)?;

    // A file that states the place directly behind its header means the place
    // behind its palette; a file that states none means that too.
    let palette_len = info.color_count() * info.color_bytes() as u64;
    let mut from = u64::from(offset);
    if info.bits <= 8 && (from == info.end as u64 || from == 0) {
        from = info.end as u64 + palette_len;
    } else if from == 0 {
        from = info.end as u64;
    }
    let picture = Picture {
        width: info.width as usize,
        height: info.height as usize,
        bits,
        stride: (u64::from(info.width) * u64::from(info.bits)).div_ceil(32) * 4,
        colors,
        palette: Palette::new(palette, info.color_bytes()),
        channels: layout.channels(),
        header,
    };
    let from = usize::try_from(from).unwrap_or(usize::MAX).min(file.len());
    let mut data = match coding {
        BmpCoding::Rows => picture.read_rows(&file[from..])?,
        BmpCoding::Runs { nibbles } => picture.read_runs(file, from, nibbles)?,
    };
    if !info.top_down {
        flip(&mut data, picture.width * picture.channels);
    }
    let pixels = Pixels {
        width: info.width,
        height: info.height,
        layout,
        data,
    };
    Ok((pixels, Orientation::NoTransforms))
}

/// Returns the bytes of the palette that are in the file.
fn read_palette<'a>(info: &Info<'a>, header: Header<'_>) -> Result<&'a [u8], PreprocessError> {
    if !matches!(info.bits, 1 | 4 | 8) {
        return Ok(&[]);
    }
    let colors = info.color_count();
    if colors > COLORS_MAX {
        return Err(header.unsupported(format!(
            "a palette of {colors} colors; the limit is {COLORS_MAX}"
        )));
    }
    let len = usize::try_from(colors).unwrap_or(0) * info.color_bytes();
    Ok(&info.behind[..len.min(info.behind.len())])
}

/// Returns what the pixels are, and the bits of a pixel.
fn read_colors(
    info: &Info<'_>,
    palette: &[u8],
    coding: BmpCoding,
    header: Header<'_>,
) -> Result<(BmpColors, u32), PreprocessError> {
    let direct = |colors| Ok((colors, info.bits));
    let bytes = |len, places| direct(BmpColors::Rgb { len, places });
    match (info.bits, info.masks) {
        (1 | 4 | 8, None) => {
            let count = info.color_count();
            match (is_gray(palette, info), coding) {
                (false, _) if count > 256 => Err(header.unsupported(format!(
                    "a palette of {count} colors other than levels of gray; the limit is 256"
                ))),
                (false, _) => direct(BmpColors::Indexed),
                // Pillow then also takes each bit for a pixel, and leaves the
                // rest of the row.
                (true, BmpCoding::Rows) if count <= 2 => Ok((BmpColors::Bilevel, 1)),
                (true, BmpCoding::Runs { .. }) if count <= 2 => direct(BmpColors::Bilevel),
                (true, BmpCoding::Rows) if info.bits < 8 => Err(header.unsupported(format!(
                    "a palette of {count} levels of gray with {} bits per pixel",
                    info.bits
                ))),
                (true, _) => direct(BmpColors::Gray),
            }
        }
        (16, None | Some([0x7c00, 0x3e0, 0x1f, _])) => direct(BmpColors::Short { green: 5 }),
        (16, Some([0xf800, 0x7e0, 0x1f, _])) => direct(BmpColors::Short { green: 6 }),
        (24, None | Some([0xff_0000, 0xff00, 0xff, _])) => bytes(3, [2, 1, 0]),
        (32, None | Some([0xff_0000, 0xff00, 0xff, 0])) => bytes(4, [2, 1, 0]),
        (32, Some([0xff00_0000, 0xff_0000, 0xff00, 0])) => bytes(4, [3, 2, 1]),
        (32, Some([0xff00_0000, 0xff00, 0xff, 0])) => bytes(4, [3, 1, 0]),
        (32, Some(masks)) => {
            let places = match masks {
                [0xff00_0000, 0xff_0000, 0xff00, 0xff] => [3, 2, 1, 0],
                [0xff, 0xff00, 0xff_0000, 0xff00_0000] => [0, 1, 2, 3],
                [0xff_0000, 0xff00, 0xff, 0xff00_0000] | [0, 0, 0, 0] => [2, 1, 0, 3],
                [0xff00_0000, 0xff00, 0xff, 0xff_0000] => [3, 1, 0, 2],
                _ => return Err(unknown_masks(info, header)),
            };
            direct(BmpColors::Rgba { places })
        }
        (_, Some(_)) => Err(unknown_masks(info, header)),
        (bits, None) => Err(header.unsupported(format!("{bits} bits per pixel"))),
    }
}

/// Returns true if the palette is whole and only counts up, or has black and
/// white alone. Pillow takes such a palette for none.
fn is_gray(palette: &[u8], info: &Info<'_>) -> bool {
    let color_bytes = info.color_bytes();
    let count = usize::try_from(info.color_count()).unwrap_or(usize::MAX);
    let step = if count == 2 { 255 } else { 1 };
    let colors = palette.chunks(color_bytes);
    let is_level = |(index, color): (usize, &[u8])| {
        color.len() >= 3
            && color[..3]
                .iter()
                .all(|&level| usize::from(level) == index * step % 256)
    };
    colors.len() == count && colors.enumerate().all(is_level)
}

fn unknown_masks(info: &Info<'_>, header: Header<'_>) -> PreprocessError {
    let masks = info.masks.unwrap_or_default();
    header.unsupported(format!(
        "{} bits per pixel with the masks {masks:#x?}",
        info.bits
    ))
}

/// The colors of a palette, black for those that the file lacks.
struct Palette([[u8; 3]; 256]);

impl Palette {
    fn new(bytes: &[u8], color_bytes: usize) -> Self {
        let mut colors = [[0; 3]; 256];
        let entries = bytes.chunks_exact(color_bytes);
        for (color, entry) in colors.iter_mut().zip(entries) {
            *color = [entry[2], entry[1], entry[0]];
        }
        Self(colors)
    }
}

/// The picture that is read, row by row in the order of the file.
struct Picture<'a> {
    width: usize,
    height: usize,
    /// Bits of a pixel, and bytes of a row in the file.
    bits: u32,
    stride: u64,
    colors: BmpColors,
    palette: Palette,
    channels: usize,
    header: Header<'a>,
}

impl Picture<'_> {
    fn read_rows(&self, file: &[u8]) -> Result<Vec<u8>, PreprocessError> {
        let stride = usize::try_from(self.stride).unwrap_or(usize::MAX);
        let len = (self.width * self.bits as usize).div_ceil(8);
        // The padding of the last row may be missing.
        let whole = stride
            .checked_mul(self.height - 1)
            .and_then(|rows| rows.checked_add(len));
        if whole.is_none_or(|whole| file.len() < whole) {
            return Err(self.header.damaged("fewer bytes than its pixels take"));
        }
        let mut data = Vec::with_capacity(self.width * self.height * self.channels);
        for row in 0..self.height {
            self.header.budget.check()?;
            self.read_row(&file[row * stride..][..len], &mut data);
        }
        Ok(data)
    }

    fn read_row(&self, row: &[u8], data: &mut Vec<u8>) {
        match self.colors {
            BmpColors::Short { green } => {
                let (pixels, _) = row.as_chunks::<2>();
                data.extend(pixels.iter().flat_map(|&pixel| short(pixel, green)));
            }
            BmpColors::Rgb { len, places } => {
                let pixels = row.chunks_exact(len);
                data.extend(pixels.flat_map(|pixel| places.map(|place| pixel[place])));
            }
            BmpColors::Rgba { places } => {
                let (pixels, _) = row.as_chunks::<4>();
                data.extend(
                    pixels
                        .iter()
                        .flat_map(|pixel| places.map(|place| pixel[place])),
                );
            }
            BmpColors::Indexed | BmpColors::Gray | BmpColors::Bilevel => {
                let (bits, mask) = (self.bits, 0xff_u8 >> (8 - self.bits));
                let indexes = row.iter().flat_map(|byte| {
                    (0..8 / bits)
                        .rev()
                        .map(move |at| byte >> (at * bits) & mask)
                });
                for index in indexes.take(self.width) {
                    self.push(index, data);
                }
            }
        }
    }

    #[inline]
    fn push(&self, index: u8, data: &mut Vec<u8>) {
        match self.colors {
            BmpColors::Indexed => data.extend(self.palette.0[usize::from(index)]),
            BmpColors::Bilevel => data.push(if index == 0 { 0 } else { 255 }),
            _ => data.push(index),
        }
    }

    /// Decodes run lengths as Pillow does: pixels that are skipped have index
    /// 0, a run does not reach beyond its row, and pixels that stand for
    /// themselves may.
    fn read_runs(
        &self,
        file: &[u8],
        start: usize,
        nibbles: bool,
    ) -> Result<Vec<u8>, PreprocessError> {
        let whole = self.width * self.height;
        let mut data = Vec::with_capacity(whole * self.channels);
        let mut at = start;
        let (mut made, mut x) = (0, 0);
        let mut steps = 0;
        while made < whole {
            if steps % STEP_RUNS == 0 {
                self.header.budget.check()?;
            }
            steps += 1;
            let Some(&[count, value]) = file.get(at..).and_then(<[u8]>::first_chunk) else {
                break;
            };
            at += 2;
            let (high, low) = (value >> 4, value & 15);
            let before = made;
            match (count, value) {
                (0, 0) => {
                    made = made.next_multiple_of(self.width);
                    x = 0;
                }
                (0, 1) => break,
                (0, 2) => {
                    let Some(&[right, down]) = file.get(at..).and_then(<[u8]>::first_chunk) else {
                        break;
                    };
                    at += 2;
                    made += usize::from(right) + usize::from(down) * self.width;
                    made = made.min(whole);
                    x = made % self.width;
                }
                (0, count) => {
                    let pixels = usize::from(count).min(whole - made);
                    let len = if nibbles { pixels.div_ceil(2) } else { pixels };
                    let Some(bytes) = file.get(at..at + len) else {
                        break;
                    };
                    at += len;
                    for index in 0..pixels {
                        let level = if nibbles {
                            bytes[index / 2] >> (4 - index % 2 * 4) & 15
                        } else {
                            bytes[index]
                        };
                        self.push(level, &mut data);
                    }
                    made += pixels;
                    x += usize::from(count);
                    // Padding to 16 bits, counted from the file's beginning.
                    at += at % 2;
                    continue;
                }
                (count, _) => {
                    let run = usize::from(count).min(self.width.saturating_sub(x));
                    x += run;
                    let run = run.min(whole - made);
                    made += run;
                    for index in 0..run {
                        let level = match (nibbles, index % 2) {
                            (false, _) => value,
                            (true, 0) => high,
                            (true, _) => low,
                        };
                        self.push(level, &mut data);
                    }
                    continue;
                }
            }
            for step in 0..made - before {
                if step % (1 << 20) == 0 {
                    self.header.budget.check()?;
                }
                self.push(0, &mut data);
            }
        }
        if made < whole {
            return Err(self
                .header
                .damaged("run lengths that end before its pixels"));
        }
        Ok(data)
    }
}

/// Splits a pixel of 16 bits into red, green and blue, whose levels Pillow
/// spreads to 255 and rounds down.
fn short(pixel: [u8; 2], green_bits: u32) -> [u8; 3] {
    let pixel = u32::from(u16::from_le_bytes(pixel));
    let level = |shift: u32, bits: u32| {
        let max = (1 << bits) - 1;
        u8::try_from((pixel >> shift & max) * 255 / max).unwrap_or(u8::MAX)
    };
    [level(5 + green_bits, 5), level(5, green_bits), level(0, 5)]
}

/// Turns rows upside down.
fn flip(data: &mut [u8], row: usize) {
    let mut rest = data;
    while rest.len() >= 2 * row {
        let (first, others) = rest.split_at_mut(row);
        let (others, last) = others.split_at_mut(others.len() - row);
        first.swap_with_slice(last);
        rest = others;
    }
}
