//! Decoder of TIFF files, for the first page only.
//!
//! The container is read here ([`directory`], [`layout`]); the decompressors
//! are other crates'. The `tiff` crate is not used: it allocates a strip or
//! tile and decodes it before checking anything of it, and decodes several
//! kinds of files wrongly without an error.
//!
//! Memory: the channels of a pixel, the colors that palettes and CMYK become, a
//! row of a strip or tile and the decompressor's tables. Strips and tiles are
//! read row by row, except JPEGs, which are decoded whole, each within the
//! limits of a JPEG.
//!
//! Work: the decoded size of all strips and tiles together, the padding of
//! tiles included, is at most as much as decoding may hold. The number of
//! strips and tiles is limited. Many of them may share the same bytes of the
//! file, so their encoded size is limited too: to the size of the file plus the
//! decoded size.
//!
//! Refused by name: what Pillow refuses or reads wrongly, YCbCr other than in
//! JPEGs, L*a*b*, samples of 12 or 64 bits, several samples of less than 8 bits,
//! and the rarer compressions.

use image::metadata::Orientation;

use self::chunk::{Chunk, ChunkError, Codec};
use self::layout::{Image, Predictor, TiffAlpha, TiffColors, TiffCompression, TiffNumbers};
use super::jpeg::{self, Inside};
use super::pixels::{PixelLayout, Pixels, cmyk_to_rgb};
use super::{DecodeBudget, Header, PreprocessError, orientation};

mod chunk;
mod directory;
mod fax;
mod layout;

/// Most encoded bytes that are read per byte of a strip or tile. At worst, fax
/// codes take six times as much as the pixels, all other codes twice.
const ENCODED_RATIO_MAX: u64 = 8;
/// Encoded bytes that may be read besides, for the beginnings and ends of
/// strips.
const ENCODED_SPARE: u64 = 4 << 10;
/// Bytes of a decompressor's tables and windows, except Zstandard's.
const OTHER_BYTES: u64 = 256 << 10;
/// Bytes that Zstandard holds beside its window.
const ZSTD_BYTES: u64 = 1 << 20;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let image = Image::read(bytes, header)?;
    let data = Reader::new(bytes, &image, header).read()?;
    let alpha = image.alpha != TiffAlpha::None;
    let (layout, data) = match image.colors {
        TiffColors::Gray { .. } if alpha => (PixelLayout::GrayAlpha, data),
        TiffColors::Gray { .. } => (PixelLayout::Gray, data),
        TiffColors::Rgb if alpha => {
            let mut data = data;
            if image.alpha == TiffAlpha::Associated {
                divide_by_alpha(&mut data);
            }
            (PixelLayout::Rgba, data)
        }
        TiffColors::Rgb | TiffColors::YCbCr => (PixelLayout::Rgb, data),
        TiffColors::Cmyk => {
            let (pixels, _) = data.as_chunks::<4>();
            let rgb = pixels.iter().copied().flat_map(cmyk_to_rgb).collect();
            (PixelLayout::Rgb, rgb)
        }
        TiffColors::Palette => {
            let colors = image
                .palette
                .ok_or_else(|| header.damaged("a palette without colors"))?;
            let count = colors.len().min(3 << 16);
            let colors: Vec<u16> = colors
                .iter()
                .take(count)
                .map(|level| u16::try_from(level).unwrap_or(u16::MAX))
                .collect();
            if alpha {
                (PixelLayout::Rgba, look_up_with_alpha(&data, &colors))
            } else {
                (PixelLayout::Rgb, look_up(&data, &colors))
            }
        }
    };
    let turned = orientation(Some(bytes), image.xmp);
    let pixels = Pixels {
        width: image.width,
        height: image.height,
        layout,
        data,
    };
    Ok((pixels, turned))
}

/// State of reading strips or tiles into an image.
struct Reader<'a> {
    file: &'a [u8],
    image: &'a Image<'a>,
    header: Header<'a>,
    /// The image's channels, one byte each.
    data: Vec<u8>,
    /// One row of the current strip or tile.
    row: Vec<u8>,
    /// Pixels that the scans of JPEGs went over so far.
    scanned: u64,
}

/// Position of a strip or tile: its plane, and its column and row in the grid.
#[derive(Clone, Copy)]
struct Position {
    plane: usize,
    column: u32,
    row: u32,
}

impl<'a> Reader<'a> {
    fn new(file: &'a [u8], image: &'a Image<'a>, header: Header<'a>) -> Self {
        let pixels = image.width as usize * image.height as usize;
        Self {
            file,
            image,
            header,
            data: vec![0; pixels * image.channels()],
            row: Vec::new(),
            scanned: 0,
        }
    }

    fn read(mut self) -> Result<Vec<u8>, PreprocessError> {
        let (across, down) = self.image.grid();
        let header = self.header;
        let mut codec = Codec::new(self.image).map_err(|error| failure(error, header))?;
        for plane in 0..self.image.planes() {
            for row in 0..down {
                for column in 0..across {
                    self.header.budget.check()?;
                    let at = Position { plane, column, row };
                    self.read_chunk(at, &mut codec)?;
                }
            }
        }
        Ok(self.data)
    }

    fn read_chunk(&mut self, at: Position, codec: &mut Codec) -> Result<(), PreprocessError> {
        let (image, header) = (self.image, self.header);
        let (pixels, rows) = image.inside(at.column, at.row);
        let fail = |error| failure(error, header);
        let whole = image.row_bytes(image.chunk_width);
        let wanted = image.row_bytes(pixels);
        let bytes = self.encoded(at)?;
        let jpeg;
        // Codes that stand for no pixel, such as codes that clear LZW's table,
        // must not cost more than the pixels that the header claims.
        let encoded_max = (whole * u64::from(rows))
            .saturating_mul(ENCODED_RATIO_MAX)
            .saturating_add(ENCODED_SPARE);
        let mut chunk = if image.compression == TiffCompression::Jpeg {
            jpeg = self.decode_jpeg(bytes, rows)?;
            Chunk::plain(codec, &jpeg, header.budget)
        } else {
            let len = usize::try_from(encoded_max).unwrap_or(usize::MAX);
            let bytes = &bytes[..bytes.len().min(len)];
            Chunk::new(codec, bytes, image, header.budget)
        };
        let mut row = std::mem::take(&mut self.row);
        row.resize(usize::try_from(wanted).unwrap_or(usize::MAX), 0);
        for y in 0..rows {
            if y > 0 {
                // The padding of the row before.
                chunk.skip(whole - wanted).map_err(fail)?;
            }
            chunk.read(&mut row).map_err(fail)?;
            match image.predictor {
                Predictor::None => {}
                Predictor::Samples => undo_differences(&mut row, image),
                Predictor::FloatBytes => undo_float_differences(&mut row),
            }
            self.place(at, y, pixels, &row);
        }
        self.row = row;
        Ok(())
    }

    /// Returns the encoded bytes of a strip or tile. Those without compression
    /// have the length of their pixels, whatever the file states.
    fn encoded(&self, at: Position) -> Result<&'a [u8], PreprocessError> {
        let (across, down) = self.image.grid();
        let (across, down) = (across as usize, down as usize);
        let index = (at.plane * down + at.row as usize) * across + at.column as usize;
        let part = |index| {
            let start = usize::try_from(self.image.offsets.get(index)?).ok()?;
            let behind = self.file.get(start..)?;
            match self.image.lens {
                Some(lens) if self.image.compression != TiffCompression::None => {
                    behind.get(..usize::try_from(lens.get(index)?).ok()?)
                }
                _ => Some(behind),
            }
        };
        part(index).ok_or_else(|| {
            self.header
                .damaged(format!("strip or tile {index} lies outside the file"))
        })
    }

    fn decode_jpeg(&mut self, bytes: &[u8], rows: u32) -> Result<Vec<u8>, PreprocessError> {
        let image = self.image;
        // Tables that all strips or tiles share come first, without their end
        // marker.
        let tables = image.jpeg_tables.unwrap_or(b"\xff\xd8\xff\xd9");
        let (Some(tables), Some(rest)) = (
            tables.strip_suffix(b"\xff\xd9"),
            bytes.strip_prefix(b"\xff\xd8"),
        ) else {
            return Err(self
                .header
                .damaged("JPEG data without their start or end marker"));
        };
        let whole = [tables, rest].concat();
        let pixels = u64::from(image.width) * u64::from(image.height);
        let mut inside = Inside {
            width: image.chunk_width,
            rows: (rows, image.chunk_height),
            components: image.chunk_samples(),
            luma_and_chroma: image.colors == TiffColors::YCbCr,
            scanned: self.scanned,
            held_bytes: pixels * image.pixel_bytes() + whole.len() as u64,
        };
        let samples = jpeg::decode_samples(&whole, &mut inside, self.header)?;
        self.scanned = inside.scanned;
        Ok(samples)
    }

    /// Puts a row of samples into its place in the image.
    fn place(&mut self, at: Position, y: u32, pixels: u32, row: &[u8]) {
        let image = self.image;
        let channels = image.channels();
        let left = (at.column * image.chunk_width) as usize;
        let top = (at.row * image.chunk_height + y) as usize;
        let start = (top * image.width as usize + left) * channels;
        let target = &mut self.data[start..start + pixels as usize * channels];
        let samples = image.chunk_samples();
        let little = image.little;
        match image.numbers {
            TiffNumbers::Levels16 => {
                // Index of the high byte.
                let high = usize::from(little);
                let (words, _) = row.as_chunks::<2>();
                let levels = words.iter().map(|word| word[high]);
                spread(target, channels, at.plane, levels, samples);
            }
            TiffNumbers::Signed16 => {
                let (words, _) = row.as_chunks::<2>();
                clip(target, words.iter().copied(), |word| {
                    f64::from(if little {
                        i16::from_le_bytes(word)
                    } else {
                        i16::from_be_bytes(word)
                    })
                });
            }
            TiffNumbers::Signed32 => {
                let (words, _) = row.as_chunks::<4>();
                clip(target, words.iter().copied(), |word| {
                    f64::from(if little {
                        i32::from_le_bytes(word)
                    } else {
                        i32::from_be_bytes(word)
                    })
                });
            }
            TiffNumbers::Float32 => {
                let (words, _) = row.as_chunks::<4>();
                clip(target, words.iter().copied(), |word| {
                    f64::from(if little {
                        f32::from_le_bytes(word)
                    } else {
                        f32::from_be_bytes(word)
                    })
                });
            }
            TiffNumbers::Small => match image.bits {
                8 if samples == channels => target.copy_from_slice(row),
                8 => spread(target, channels, at.plane, row.iter().copied(), samples),
                bits => unpack(target, row, bits, image.colors == TiffColors::Palette),
            },
        }
        if image.colors == (TiffColors::Gray { inverted: true }) && at.plane == 0 {
            for gray in target.iter_mut().step_by(channels) {
                *gray = 255 - *gray;
            }
        }
    }
}

fn failure(error: ChunkError, header: Header<'_>) -> PreprocessError {
    match error {
        ChunkError::Short => header.damaged("a strip or tile that ends before its pixels"),
        ChunkError::Invalid => header.damaged("a strip or tile that does not decompress"),
        ChunkError::Other(error) => error,
    }
}

/// Undoes the predictor: adds to each sample the previous sample of the same
/// color in its row.
fn undo_differences(row: &mut [u8], image: &Image<'_>) {
    let samples = image.chunk_samples();
    match (image.bits, image.little) {
        (8, _) => add_before(row.as_chunks_mut().0, samples, |[a], [b]| {
            [a.wrapping_add(b)]
        }),
        (16, true) => add_before(row.as_chunks_mut().0, samples, |a, b| {
            let sum = u16::from_le_bytes(a).wrapping_add(u16::from_le_bytes(b));
            sum.to_le_bytes()
        }),
        (16, false) => add_before(row.as_chunks_mut().0, samples, |a, b| {
            let sum = u16::from_be_bytes(a).wrapping_add(u16::from_be_bytes(b));
            sum.to_be_bytes()
        }),
        // Compressed numbers of 32 bits have their low byte first.
        _ => add_before(row.as_chunks_mut().0, samples, |a, b| {
            let sum = u32::from_le_bytes(a).wrapping_add(u32::from_le_bytes(b));
            sum.to_le_bytes()
        }),
    }
}

/// Adds to each number the number `distance` before it.
fn add_before<const BYTES: usize>(
    row: &mut [[u8; BYTES]],
    distance: usize,
    add: impl Fn([u8; BYTES], [u8; BYTES]) -> [u8; BYTES],
) {
    for at in distance..row.len() {
        row[at] = add(row[at], row[at - distance]);
    }
}

/// Undoes the predictor of floating-point numbers: adds to each byte the byte
/// before it, and gathers the bytes of each number, which lie apart.
fn undo_float_differences(row: &mut [u8]) {
    for at in 1..row.len() {
        row[at] = row[at].wrapping_add(row[at - 1]);
    }
    let bytes = row.to_vec();
    let count = bytes.len() / 4;
    let (words, _) = row.as_chunks_mut::<4>();
    for (at, word) in words.iter_mut().enumerate() {
        // The highest bytes come first; the row has the lowest first.
        *word = [3, 2, 1, 0].map(|place| bytes[place * count + at]);
    }
}

/// Divides colors by their alpha, rounded down as Pillow does.
fn divide_by_alpha(data: &mut [u8]) {
    let (pixels, _) = data.as_chunks_mut::<4>();
    for [red, green, blue, alpha] in pixels {
        for level in [red, green, blue] {
            let whole = (u32::from(*level) * 255).checked_div(u32::from(*alpha));
            *level = u8::try_from(whole.unwrap_or(0)).unwrap_or(u8::MAX);
        }
    }
}

/// Limits numbers to the range of a byte and drops what is behind the point,
/// as Pillow makes gray of them.
#[expect(
    clippy::cast_possible_truncation,
    clippy::cast_sign_loss,
    reason = "limited to the range of a byte; what is no number becomes 0"
)]
fn clip<W>(target: &mut [u8], words: impl Iterator<Item = W>, number: impl Fn(W) -> f64) {
    for (to, word) in target.iter_mut().zip(words) {
        *to = number(word).clamp(0.0, 255.0) as u8;
    }
}

/// Puts samples into the channels of pixels, from channel `plane` on. Samples
/// without a channel are dropped.
fn spread(
    target: &mut [u8],
    channels: usize,
    plane: usize,
    mut levels: impl Iterator<Item = u8>,
    samples: usize,
) {
    let wanted = samples.min(channels - plane);
    for pixel in target.chunks_exact_mut(channels) {
        for (to, level) in pixel[plane..plane + wanted].iter_mut().zip(levels.by_ref()) {
            *to = level;
        }
        if samples > wanted {
            levels.nth(samples - wanted - 1);
        }
    }
}

/// Unpacks samples of 1, 2 or 4 bits into bytes: indexes stay as they are, gray
/// levels are spread to 255.
fn unpack(target: &mut [u8], row: &[u8], bits: u32, palette: bool) {
    let mask = (1_u8 << bits) - 1;
    let factor = if palette { 1 } else { 255 / mask };
    let per_byte = 8 / bits as usize;
    for (pixels, byte) in target.chunks_mut(per_byte).zip(row) {
        for (pixel, shift) in pixels.iter_mut().zip((0..8 / bits).rev()) {
            *pixel = (byte >> (shift * bits) & mask) * factor;
        }
    }
}

/// Looks up the colors of indexes in a map of 16-bit levels: all reds, all
/// greens, all blues.
fn look_up(indexes: &[u8], colors: &[u16]) -> Vec<u8> {
    indexes
        .iter()
        .flat_map(|&index| color(index, colors))
        .collect()
}

/// Looks up the colors of pairs of an index and alpha.
fn look_up_with_alpha(pairs: &[u8], colors: &[u16]) -> Vec<u8> {
    let (pairs, _) = pairs.as_chunks::<2>();
    pairs
        .iter()
        .flat_map(|&[index, alpha]| {
            let [red, green, blue] = color(index, colors);
            [red, green, blue, alpha]
        })
        .collect()
}

/// Returns a color of a map, black for one that the map lacks.
fn color(index: u8, colors: &[u16]) -> [u8; 3] {
    let (index, count) = (usize::from(index), colors.len() / 3);
    [0, 1, 2].map(|channel| {
        let place = Some(channel * count + index).filter(|_| index < count);
        let word = place.map_or(0, |place| colors[place]);
        word.to_be_bytes()[0]
    })
}
