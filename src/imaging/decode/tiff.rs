//! Decoder of TIFF files, for the first page only.
//!
//! The container is read here ([`directory`], [`layout`]); the decompressors
//! are other crates'. The `tiff` crate is not used: it allocates a strip or
//! tile and decodes it before checking anything of it, and decodes several
//! kinds of files wrongly without an error.
//!
//! Memory: the channels of a pixel, the RGB that palettes and CMYK become, a
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
//! Refused by name: YCbCr, L*a*b*, samples of 32 bits, signed or floating-point
//! samples, and several samples of less than 8 bits. Associated alpha is
//! accepted, but dividing it out is left to the caller.

use image::metadata::Orientation;

use self::chunk::{Chunk, ChunkError, Codec};
use self::layout::{Image, TiffColors, TiffCompression};
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
/// Bytes of a decompressor's tables and windows.
const OTHER_BYTES: u64 = 256 << 10;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let image = Image::read(bytes, header)?;
    let data = Reader::new(bytes, &image, header).read()?;
    let (layout, data) = match (image.colors, image.alpha) {
        (TiffColors::Gray { .. }, false) => (PixelLayout::Gray, data),
        (TiffColors::Gray { .. }, true) => (PixelLayout::GrayAlpha, data),
        (TiffColors::Rgb, false) => (PixelLayout::Rgb, data),
        (TiffColors::Rgb, true) => (PixelLayout::Rgba, data),
        (TiffColors::Cmyk, _) => {
            let (pixels, _) = data.as_chunks::<4>();
            let rgb = pixels.iter().copied().flat_map(cmyk_to_rgb).collect();
            (PixelLayout::Rgb, rgb)
        }
        (TiffColors::Palette, _) => {
            let colors = image
                .palette
                .ok_or_else(|| header.damaged("a palette without colors"))?;
            let count = colors.len().min(3 << 16);
            let colors: Vec<u16> = colors
                .iter()
                .take(count)
                .map(|level| u16::try_from(level).unwrap_or(u16::MAX))
                .collect();
            (PixelLayout::Rgb, look_up(&data, &colors))
        }
    };
    let turned = image
        .orientation
        .and_then(|value| Orientation::from_exif(u8::try_from(value).ok()?))
        .unwrap_or_else(|| orientation(None, image.xmp));
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
        let mut codec = Codec::new(self.image.compression);
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
        let bytes = self.encoded(at)?;
        let (pixels, rows) = image.inside(at.column, at.row);
        let fail = |error| failure(error, header);
        let whole = image.row_bytes(image.chunk_width);
        let wanted = image.row_bytes(pixels);
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
            chunk.read(&mut row).map_err(fail)?;
            chunk.skip(whole - wanted).map_err(fail)?;
            if image.predictor {
                undo_differences(&mut row, image);
            }
            self.place(at, y, pixels, &row);
        }
        self.row = row;
        Ok(())
    }

    /// Returns the encoded bytes of a strip or tile.
    fn encoded(&self, at: Position) -> Result<&'a [u8], PreprocessError> {
        let (across, down) = self.image.grid();
        let (across, down) = (across as usize, down as usize);
        let index = (at.plane * down + at.row as usize) * across + at.column as usize;
        let part = |index| {
            let start = usize::try_from(self.image.offsets.get(index)?).ok()?;
            let len = usize::try_from(self.image.lens.get(index)?).ok()?;
            self.file.get(start..)?.get(..len)
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
        match image.bits {
            16 => {
                // Index of the high byte.
                let high = usize::from(image.little);
                let (words, _) = row.as_chunks::<2>();
                let levels = words.iter().map(|word| word[high]);
                spread(target, channels, at.plane, levels, samples);
            }
            8 if samples == channels => target.copy_from_slice(row),
            8 => spread(target, channels, at.plane, row.iter().copied(), samples),
            bits => unpack(target, row, bits, image.colors == TiffColors::Palette),
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
    if image.bits == 8 {
        for at in samples..row.len() {
            row[at] = row[at].wrapping_add(row[at - samples]);
        }
        return;
    }
    let (words, _) = row.as_chunks_mut::<2>();
    for at in samples..words.len() {
        let [before, now] = [words[at - samples], words[at]];
        words[at] = if image.little {
            u16::from_le_bytes(now)
                .wrapping_add(u16::from_le_bytes(before))
                .to_le_bytes()
        } else {
            u16::from_be_bytes(now)
                .wrapping_add(u16::from_be_bytes(before))
                .to_be_bytes()
        };
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
    let count = colors.len() / 3;
    let level = |channel: usize, index: usize| {
        let word = if index < count {
            colors[channel * count + index]
        } else {
            0
        };
        word.to_be_bytes()[0]
    };
    indexes
        .iter()
        .flat_map(|&index| [0, 1, 2].map(|channel| level(channel, index.into())))
        .collect()
}
