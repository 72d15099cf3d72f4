//! Reads the description of an image from a TIFF's directory, and checks it
//! against itself and the limits before anything is decoded.

use super::directory::{Directory, TagValues};
use super::{Header, PreprocessError};

/// Most strips or tiles of an image. Starting one costs as much as a thousand
/// pixels; the largest image that is accepted by default has 250000 tiles of 16
/// x 16, the smallest size that the specification allows.
const CHUNKS_MAX: u64 = 1 << 18;

/// Most samples of a pixel, samples without a meaning included.
const SAMPLES_MAX: u64 = 16;

const OLD_JPEG: &str = "JPEG compression of the old kind (6)";

mod tag {
    pub(super) const WIDTH: u16 = 256;
    pub(super) const HEIGHT: u16 = 257;
    pub(super) const BITS: u16 = 258;
    pub(super) const COMPRESSION: u16 = 259;
    pub(super) const PHOTOMETRIC: u16 = 262;
    pub(super) const FILL_ORDER: u16 = 266;
    pub(super) const STRIP_OFFSETS: u16 = 273;
    pub(super) const SAMPLES: u16 = 277;
    pub(super) const ROWS_PER_STRIP: u16 = 278;
    pub(super) const STRIP_BYTES: u16 = 279;
    pub(super) const PLANAR: u16 = 284;
    pub(super) const FAX3_OPTIONS: u16 = 292;
    pub(super) const FAX4_OPTIONS: u16 = 293;
    pub(super) const PREDICTOR: u16 = 317;
    pub(super) const COLORS: u16 = 320;
    pub(super) const TILE_WIDTH: u16 = 322;
    pub(super) const TILE_HEIGHT: u16 = 323;
    pub(super) const TILE_OFFSETS: u16 = 324;
    pub(super) const TILE_BYTES: u16 = 325;
    pub(super) const INKS: u16 = 332;
    pub(super) const EXTRA: u16 = 338;
    pub(super) const SAMPLE_FORMAT: u16 = 339;
    pub(super) const JPEG_TABLES: u16 = 347;
    pub(super) const XMP: u16 = 700;
}

/// Meaning of a pixel's samples.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TiffColors {
    /// Gray levels; `inverted` is true if 0 is white.
    Gray {
        inverted: bool,
    },
    Rgb,
    Palette,
    Cmyk,
    /// Luma and chroma, which a JPEG decoder turns into RGB.
    YCbCr,
}

/// Numbers of which samples consist, and what becomes of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TiffNumbers {
    /// Levels or indexes of at most 8 bits.
    Small,
    /// Levels of 16 bits, of which the high byte is kept.
    Levels16,
    /// Gray levels of other types, limited to 0 and 255 as Pillow does.
    Signed16,
    Signed32,
    Float32,
}

/// Alpha, if the sample after the colors is alpha.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TiffAlpha {
    None,
    Separate,
    /// The colors are multiplied by it.
    Associated,
}

/// Differences as which samples are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Predictor {
    None,
    /// Differences of samples from the pixel before.
    Samples,
    /// Differences of bytes from the byte before: the first bytes of all
    /// floating-point numbers of a row, then their second bytes, and so on.
    FloatBytes,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TiffCompression {
    None,
    PackBits,
    Lzw,
    Deflate,
    Zstd,
    Jpeg,
    Fax(FaxCoding),
}

/// Fax codes of a row.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FaxCoding {
    /// Runs, each row from a whole byte on.
    Runs,
    /// Group 3: runs, behind marks of the ends of rows. With two dimensions, a
    /// bit behind the mark tells a row of runs from one relative to the row
    /// above.
    Group3 {
        two_dimensions: bool,
    },
    Group4,
}

impl FaxCoding {
    pub(super) fn is_group3(self) -> bool {
        matches!(self, Self::Group3 { .. })
    }
}

/// Description of an image and of how it is stored.
pub(super) struct Image<'a> {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) colors: TiffColors,
    pub(super) alpha: TiffAlpha,
    pub(super) numbers: TiffNumbers,
    pub(super) samples: usize,
    pub(super) bits: u32,
    pub(super) little: bool,
    pub(super) compression: TiffCompression,
    pub(super) predictor: Predictor,
    /// True if each sample has strips or tiles of its own.
    pub(super) planar: bool,
    /// True if bytes begin with their lowest bit.
    pub(super) reversed: bool,
    /// Width in pixels of a strip or tile, pixels beyond the image's edges
    /// included.
    pub(super) chunk_width: u32,
    pub(super) chunk_height: u32,
    pub(super) offsets: TagValues<'a>,
    /// Largest window that Zstandard may take, a power of two.
    pub(super) zstd_window: u64,
    /// Lengths, which a file may lack if they follow from the rest.
    pub(super) lens: Option<TagValues<'a>>,
    pub(super) palette: Option<TagValues<'a>>,
    pub(super) jpeg_tables: Option<&'a [u8]>,
    pub(super) xmp: Option<&'a [u8]>,
}

impl TiffColors {
    pub(super) fn channels(self) -> usize {
        match self {
            Self::Gray { .. } | Self::Palette => 1,
            Self::Rgb | Self::YCbCr => 3,
            Self::Cmyk => 4,
        }
    }
}

/// Tags of a directory, with errors worded for callers.
struct Tags<'a> {
    directory: Directory<'a>,
    header: Header<'a>,
}

impl<'a> Tags<'a> {
    fn values(&self, tag: u16) -> Result<Option<TagValues<'a>>, PreprocessError> {
        self.directory.values(tag).map_err(|tag| {
            self.header.damaged(format!(
                "tag {tag} has values of an invalid type, or outside the file"
            ))
        })
    }

    fn number(&self, tag: u16) -> Result<Option<u64>, PreprocessError> {
        Ok(self.values(tag)?.and_then(|values| values.get(0)))
    }

    fn number_or(&self, tag: u16, default: u64) -> Result<u64, PreprocessError> {
        Ok(self.number(tag)?.unwrap_or(default))
    }

    /// Reads a side in pixels.
    fn side(&self, tag: u16) -> Result<u32, PreprocessError> {
        let side = self.number(tag)?.and_then(|side| u32::try_from(side).ok());
        side.ok_or_else(|| {
            self.header
                .damaged(format!("tag {tag} is missing or too large"))
        })
    }

    /// Reads a value that holds for all samples and may be repeated for each.
    fn uniform(
        &self,
        tag: u16,
        default: u64,
        name: &str,
        samples: usize,
    ) -> Result<u64, PreprocessError> {
        let Some(values) = self.values(tag)? else {
            return Ok(default);
        };
        let first = values.get(0).unwrap_or(default);
        if values.iter().take(samples).any(|value| value != first) {
            return Err(self
                .header
                .unsupported(format!("samples whose {name} differ")));
        }
        Ok(first)
    }
}

impl<'a> Image<'a> {
    pub(super) fn read(bytes: &'a [u8], header: Header<'a>) -> Result<Self, PreprocessError> {
        let directory = Directory::read(bytes).map_err(|error| header.damaged(error))?;
        let little = directory.order().little;
        let tags = Tags { directory, header };
        let (width, height) = (tags.side(tag::WIDTH)?, tags.side(tag::HEIGHT)?);
        header.admit_pixels(width, height)?;

        let Samples {
            colors,
            count: samples,
            alpha,
            plain_gray,
        } = Samples::read(&tags)?;
        let bits = tags.uniform(tag::BITS, 1, "bits", samples)?;
        let compression = read_compression(&tags, samples, bits)?;
        let numbers = read_numbers(&tags, colors, (samples, plain_gray), bits, compression)?;
        let colors = match (colors, numbers) {
            // Pillow leaves these as they are.
            (
                TiffColors::Gray { .. },
                TiffNumbers::Levels16
                | TiffNumbers::Signed16
                | TiffNumbers::Signed32
                | TiffNumbers::Float32,
            ) => TiffColors::Gray { inverted: false },
            _ => colors,
        };
        let predictor = read_predictor(&tags, compression, numbers, bits)?;
        let planar = match tags.number_or(tag::PLANAR, 1)? {
            1 => false,
            2 => samples > 1,
            other => return Err(header.unsupported(format!("planar configuration {other}"))),
        };
        let reversed = match tags.number_or(tag::FILL_ORDER, 1)? {
            1 => false,
            2 => true,
            other => return Err(header.unsupported(format!("fill order {other}"))),
        };
        let plain = compression == TiffCompression::None;
        let unclear = match numbers {
            _ if compression == TiffCompression::Zstd => true,
            TiffNumbers::Small => plain && planar,
            TiffNumbers::Levels16 => !little || !matches!(colors, TiffColors::Gray { .. }),
            TiffNumbers::Signed16 | TiffNumbers::Signed32 | TiffNumbers::Float32 => true,
        };
        if reversed && unclear {
            return Err(header.unsupported(format!(
                "fill order 2 with samples of {bits} bits of this type or in planes"
            )));
        }
        if planar && colors == TiffColors::YCbCr {
            return Err(header.unsupported("colors in YCbCr in planes"));
        }
        let chunks = Chunks::read(&tags, (width, height))?;
        let zstd_window = if compression == TiffCompression::Zstd {
            let windows = chunks.offsets.iter().map(|at| {
                let at = usize::try_from(at).unwrap_or(usize::MAX);
                zstd_window(bytes.get(at..).unwrap_or_default()).unwrap_or(0)
            });
            // The library limits windows to powers of two, from 1 KiB on.
            let window = windows.max().unwrap_or(0).max(1 << 10);
            window.checked_next_power_of_two().unwrap_or(u64::MAX)
        } else {
            0
        };
        let image = Self {
            width,
            height,
            zstd_window,
            colors,
            alpha,
            numbers,
            samples,
            bits: u32::try_from(bits).unwrap_or(16),
            little,
            compression,
            predictor,
            planar,
            reversed,
            chunk_width: chunks.width,
            chunk_height: chunks.height,
            offsets: chunks.offsets,
            lens: chunks.lens,
            palette: tags.values(tag::COLORS)?,
            jpeg_tables: tags.values(tag::JPEG_TABLES)?.and_then(TagValues::as_bytes),
            xmp: tags
                .values(tag::XMP)
                .ok()
                .flatten()
                .and_then(TagValues::as_bytes),
        };
        image.check(bytes.len(), header)?;
        Ok(image)
    }

    /// Returns the number of channels that are decoded: the colors, and alpha.
    pub(super) fn channels(&self) -> usize {
        self.colors.channels() + usize::from(self.alpha != TiffAlpha::None)
    }

    /// Returns the number of strips or tiles from left to right, and from top
    /// to bottom.
    pub(super) fn grid(&self) -> (u32, u32) {
        (
            self.width.div_ceil(self.chunk_width),
            self.height.div_ceil(self.chunk_height),
        )
    }

    /// Returns the number of samples of a pixel that are stored together.
    pub(super) fn chunk_samples(&self) -> usize {
        if self.planar { 1 } else { self.samples }
    }

    /// Returns the number of planes that are decoded: one per needed sample if
    /// each sample has strips or tiles of its own, else 1.
    pub(super) fn planes(&self) -> usize {
        if self.planar { self.channels() } else { 1 }
    }

    /// Returns the bytes of `pixels` pixels in a row of a strip or tile.
    pub(super) fn row_bytes(&self, pixels: u32) -> u64 {
        let bits = u64::from(pixels) * self.chunk_samples() as u64 * u64::from(self.bits);
        bits.div_ceil(8)
    }

    /// Returns the width in pixels of a strip or tile inside the image, and its
    /// rows there.
    pub(super) fn inside(&self, column: u32, row: u32) -> (u32, u32) {
        (
            self.chunk_width.min(self.width - column * self.chunk_width),
            self.chunk_height.min(self.height - row * self.chunk_height),
        )
    }

    /// Refuses more strips or tiles, or larger ones, than the limits allow.
    fn check(&self, file: usize, header: Header<'_>) -> Result<(), PreprocessError> {
        let (across, down) = self.grid();
        let planes = if self.planar { self.samples as u64 } else { 1 };
        let count = (u64::from(across) * u64::from(down)).saturating_mul(planes);
        if count > CHUNKS_MAX {
            return Err(header.unsupported(format!(
                "{count} strips or tiles; the limit is {CHUNKS_MAX}"
            )));
        }
        let offsets = self.offsets.len() as u64;
        if offsets != count {
            return Err(header.damaged(format!("{offsets} offsets for {count} strips or tiles")));
        }
        let lens = self.lens.map(TagValues::len);
        let enough = match lens {
            None => count == 1,
            Some(lens) => lens as u64 == count,
        };
        // Without compression, lengths follow from the sizes.
        if !enough && self.compression != TiffCompression::None {
            return Err(header.damaged(format!(
                "{} lengths for {count} strips or tiles",
                lens.unwrap_or(0)
            )));
        }
        // Rows that are needed of all strips or tiles, padded to the right. A
        // JPEG is decoded down to its last row.
        let rows = if self.compression == TiffCompression::Jpeg {
            u64::from(down) * u64::from(self.chunk_height)
        } else {
            u64::from(self.height)
        };
        let wanted = (u64::from(across) * self.planes() as u64).saturating_mul(rows);
        let decoded = self.row_bytes(self.chunk_width).saturating_mul(wanted);
        let bytes_max = header.limits.decode_bytes_max;
        if decoded > bytes_max {
            return Err(PreprocessError::ChunksOverLimit {
                format: header.format,
                width: self.width,
                height: self.height,
                bytes: decoded,
                bytes_max,
            });
        }
        // Several strips or tiles may share the same bytes, as empty tiles do.
        // But then these bytes are not longer than the pixels that they become.
        let encoded = self
            .lens
            .map_or(0, |lens| lens.iter().fold(0, u64::saturating_add));
        let encoded = if self.compression == TiffCompression::None {
            0
        } else {
            encoded
        };
        if encoded > (file as u64).saturating_add(decoded) {
            return Err(header.damaged(format!(
                "strips or tiles of {encoded} bytes; the limit is the file's {file} bytes plus the \
                 {decoded} that they become"
            )));
        }
        let row = self.row_bytes(self.width).saturating_mul(2);
        header.admit(
            self.width,
            self.height,
            self.pixel_bytes(),
            row + super::OTHER_BYTES + self.codec_bytes(),
        )
    }

    /// Returns the bytes that are held per pixel: the channels, and the colors
    /// that palettes and CMYK become.
    pub(super) fn pixel_bytes(&self) -> u64 {
        let colors = match (self.colors, self.alpha) {
            (TiffColors::Palette, TiffAlpha::None) | (TiffColors::Cmyk, _) => 3,
            (TiffColors::Palette, _) => 4,
            (TiffColors::Gray { .. } | TiffColors::Rgb | TiffColors::YCbCr, _) => 0,
        };
        self.channels() as u64 + colors
    }

    /// Returns the bytes that a decompressor holds by the size of the image:
    /// for fax codes the columns at which colors change, in two rows.
    fn codec_bytes(&self) -> u64 {
        match self.compression {
            TiffCompression::Fax(_) => 16 * u64::from(self.chunk_width),
            TiffCompression::Zstd => self.zstd_window.saturating_add(super::ZSTD_BYTES),
            _ => 0,
        }
    }
}

/// Size of the strips or tiles, and their bytes in the file.
struct Chunks<'a> {
    width: u32,
    height: u32,
    offsets: TagValues<'a>,
    lens: Option<TagValues<'a>>,
}

impl<'a> Chunks<'a> {
    fn read(tags: &Tags<'a>, (width, height): (u32, u32)) -> Result<Self, PreprocessError> {
        let header = tags.header;
        let missing = || header.damaged("no offsets of strips or tiles");
        let strips = tags.values(tag::STRIP_OFFSETS)?;
        let tiles = tags.values(tag::TILE_OFFSETS)?;
        // Some writers put the places of tiles into the tags of strips. Pillow
        // alone, which reads what is not compressed, takes them for strips.
        let tiled =
            tags.number(tag::TILE_WIDTH)?.is_some() && tags.number_or(tag::COMPRESSION, 1)? != 1;
        let chunks = match (strips, tiles) {
            (Some(offsets), None) if tiled => Self {
                width: tags.side(tag::TILE_WIDTH)?,
                height: tags.side(tag::TILE_HEIGHT)?,
                offsets,
                lens: tags.values(tag::STRIP_BYTES)?,
            },
            (Some(offsets), None) => {
                let rows = tags.number_or(tag::ROWS_PER_STRIP, u64::MAX)?;
                Self {
                    width,
                    // The default, 2^32 - 1, means one strip.
                    height: u32::try_from(rows).unwrap_or(height).min(height),
                    offsets,
                    lens: tags.values(tag::STRIP_BYTES)?,
                }
            }
            (None, Some(offsets)) => Self {
                width: tags.side(tag::TILE_WIDTH)?,
                height: tags.side(tag::TILE_HEIGHT)?,
                offsets,
                lens: tags.values(tag::TILE_BYTES)?,
            },
            (None, None) => return Err(missing()),
            (Some(_), Some(_)) => return Err(header.damaged("both strips and tiles")),
        };
        if chunks.width == 0 || chunks.height == 0 {
            return Err(header.damaged("strips or tiles without pixels"));
        }
        Ok(chunks)
    }
}

/// Meaning of the samples of a pixel, and their number.
struct Samples {
    colors: TiffColors,
    count: usize,
    alpha: TiffAlpha,
    /// True if the samples that are read are gray alone: others are in planes
    /// of their own, which may be left out.
    plain_gray: bool,
}

impl Samples {
    fn read(tags: &Tags<'_>) -> Result<Self, PreprocessError> {
        let header = tags.header;
        let colors = match tags.number_or(tag::PHOTOMETRIC, 0)? {
            0 => TiffColors::Gray { inverted: true },
            1 => TiffColors::Gray { inverted: false },
            2 => TiffColors::Rgb,
            3 => TiffColors::Palette,
            5 if tags.number_or(tag::INKS, 1)? == 1 => TiffColors::Cmyk,
            6 if tags.number_or(tag::COMPRESSION, 1)? == 7 => TiffColors::YCbCr,
            6 if tags.number_or(tag::COMPRESSION, 1)? == 6 => {
                return Err(header.unsupported(OLD_JPEG));
            }
            6 => return Err(header.unsupported("colors in YCbCr without JPEG compression")),
            8..=10 => return Err(header.unsupported("colors in L*a*b*")),
            other => {
                return Err(header.unsupported(format!("photometric interpretation {other}")));
            }
        };
        let samples = tags.number_or(tag::SAMPLES, 1)?;
        let channels = colors.channels() as u64;
        if samples < channels {
            return Err(header.damaged(format!(
                "{samples} samples per pixel; its colors need {channels}"
            )));
        }
        if samples > SAMPLES_MAX {
            return Err(header.unsupported(format!(
                "{samples} samples per pixel; the limit is {SAMPLES_MAX}"
            )));
        }
        let extra = tags.values(tag::EXTRA)?;
        let others = samples - channels;
        if extra.is_some_and(|extra| extra.len() as u64 != others) {
            return Err(header.damaged(format!(
                "{samples} samples per pixel and {channels} colors, but tag 338 lists another \
                 number of extra samples"
            )));
        }
        let planar = tags.number_or(tag::PLANAR, 1)? == 2;
        let plain = tags.number_or(tag::COMPRESSION, 1)? == 1;
        // Alpha is the first extra sample, if the file states so, or if an RGB
        // image has a fourth sample without a stated meaning. 999 is how one
        // program states alpha.
        let rgb = colors == TiffColors::Rgb;
        let alpha = match extra.map(|extra| extra.get(0)) {
            Some(Some(1)) => TiffAlpha::Associated,
            Some(Some(2)) => TiffAlpha::Separate,
            Some(Some(999)) if rgb && others == 1 => TiffAlpha::Separate,
            Some(_) => TiffAlpha::None,
            None if others == 0 => TiffAlpha::None,
            // Pillow's library takes such a plane for alpha by which the colors
            // are multiplied, and Pillow alone misreads tiles.
            None if others == 1 && rgb && planar && !plain => TiffAlpha::Associated,
            None if others == 1 && rgb && !(planar && tags.number(tag::TILE_WIDTH)?.is_some()) => {
                TiffAlpha::Separate
            }
            None => {
                return Err(
                    header.unsupported("extra samples whose meaning the file does not state")
                );
            }
        };
        match (colors, alpha) {
            (TiffColors::Gray { .. } | TiffColors::Palette, TiffAlpha::Associated) => {
                return Err(header.unsupported("gray or a palette multiplied by alpha"));
            }
            (TiffColors::Cmyk | TiffColors::YCbCr, alpha) if alpha != TiffAlpha::None => {
                return Err(header.unsupported("CMYK or YCbCr with alpha"));
            }
            _ => {}
        }
        if colors == TiffColors::YCbCr && samples != 3 {
            return Err(header.unsupported("colors in YCbCr with extra samples"));
        }
        let gray = matches!(colors, TiffColors::Gray { .. });
        let plain_gray = gray && (others == 0 || (planar && alpha == TiffAlpha::None));
        Ok(Self {
            colors,
            count: usize::try_from(samples).unwrap_or(usize::MAX),
            alpha,
            plain_gray,
        })
    }
}

/// Reads the type of the samples.
fn read_numbers(
    tags: &Tags<'_>,
    colors: TiffColors,
    (samples, plain_gray): (usize, bool),
    bits: u64,
    compression: TiffCompression,
) -> Result<TiffNumbers, PreprocessError> {
    let header = tags.header;
    let little = tags.directory.order().little;
    let format = tags.uniform(tag::SAMPLE_FORMAT, 1, "formats", samples)?;
    let inverted = colors == TiffColors::Gray { inverted: true };
    let unsupported = |detail: &str| {
        Err(header.unsupported(format!(
            "{samples} samples per pixel of {bits} bits each and format {format}{detail}"
        )))
    };
    let numbers = match (format, bits) {
        (1 | 4, 1 | 2 | 4) if samples == 1 => return Ok(TiffNumbers::Small),
        (1 | 4, 8) => return Ok(TiffNumbers::Small),
        (1 | 4, 16) if inverted && !little => return unsupported(", inverted"),
        (1 | 4, 16) if colors != TiffColors::Palette => return Ok(TiffNumbers::Levels16),
        // Pillow takes no notice of the sign.
        (2, 8) if plain_gray && !inverted => return Ok(TiffNumbers::Small),
        (2, 16) if plain_gray && !inverted => TiffNumbers::Signed16,
        (1, 32) if plain_gray && !inverted && little => TiffNumbers::Signed32,
        (2, 32) if plain_gray && !inverted => TiffNumbers::Signed32,
        (3, 32) if plain_gray => TiffNumbers::Float32,
        _ => return unsupported(""),
    };
    // Pillow swaps the bytes of these once too often.
    if !little && compression != TiffCompression::None {
        return unsupported(", high byte first and compressed");
    }
    Ok(numbers)
}

/// Returns the bytes of the window that the first frame of Zstandard data asks
/// for.
fn zstd_window(data: &[u8]) -> Option<u64> {
    let head = data.strip_prefix(b"\x28\xb5\x2f\xfd")?;
    let (&flags, rest) = head.split_first()?;
    if flags & 0x20 == 0 {
        let window = *rest.first()?;
        let base = 1_u64 << (10 + u32::from(window >> 3));
        return Some(base + base / 8 * u64::from(window & 7));
    }
    // The frame is its own window. Its size stands behind the number of a
    // dictionary, in 1, 2, 4 or 8 bytes.
    let dictionary = [0, 1, 2, 4][usize::from(flags & 3)];
    let len = 1_usize << (flags >> 6);
    let size = rest.get(dictionary..)?.get(..len)?;
    let size = size
        .iter()
        .rev()
        .fold(0, |size, &byte| size << 8 | u64::from(byte));
    Some(if len == 2 { size + 256 } else { size })
}

/// Reads the predictor. Only some compressions apply it.
fn read_predictor(
    tags: &Tags<'_>,
    compression: TiffCompression,
    numbers: TiffNumbers,
    bits: u64,
) -> Result<Predictor, PreprocessError> {
    let applies = matches!(
        compression,
        TiffCompression::Lzw | TiffCompression::Deflate | TiffCompression::Zstd
    );
    match tags.number_or(tag::PREDICTOR, 1)? {
        _ if !applies => Ok(Predictor::None),
        1 => Ok(Predictor::None),
        2 if bits >= 8 => Ok(Predictor::Samples),
        3 if numbers == TiffNumbers::Float32 => Ok(Predictor::FloatBytes),
        other => Err(tags
            .header
            .unsupported(format!("predictor {other} with samples of {bits} bits"))),
    }
}

fn read_compression(
    tags: &Tags<'_>,
    samples: usize,
    bits: u64,
) -> Result<TiffCompression, PreprocessError> {
    let header = tags.header;
    let number = tags.number_or(tag::COMPRESSION, 1)?;
    if matches!(number, 2..=4) && (bits != 1 || samples != 1) {
        return Err(header.unsupported("fax compression of other than 1 sample of 1 bit per pixel"));
    }
    let options = |tag| tags.number_or(tag, 0);
    // The second bit of both allows parts without codes.
    let uncoded = match number {
        3 => options(tag::FAX3_OPTIONS)? & 2,
        4 => options(tag::FAX4_OPTIONS)? & 2,
        _ => 0,
    };
    if uncoded != 0 {
        return Err(header.unsupported("fax compression with uncompressed parts"));
    }
    let name = match number {
        1 => return Ok(TiffCompression::None),
        2 => return Ok(TiffCompression::Fax(FaxCoding::Runs)),
        3 => {
            return Ok(TiffCompression::Fax(FaxCoding::Group3 {
                two_dimensions: options(tag::FAX3_OPTIONS)? & 1 != 0,
            }));
        }
        4 => return Ok(TiffCompression::Fax(FaxCoding::Group4)),
        5 => return Ok(TiffCompression::Lzw),
        7 => {
            if bits != 8 {
                return Err(header.unsupported("JPEG compression of samples of other than 8 bits"));
            }
            return Ok(TiffCompression::Jpeg);
        }
        8 | 32946 => return Ok(TiffCompression::Deflate),
        32773 => return Ok(TiffCompression::PackBits),
        50000 => return Ok(TiffCompression::Zstd),
        6 => OLD_JPEG,
        32771 => "fax compression in words (32771)",
        34661 => "JBIG compression",
        34712 => "JPEG 2000 compression",
        34925 => "LZMA compression",
        50001 => "WebP compression",
        other => return Err(header.unsupported(format!("compression scheme {other}"))),
    };
    Err(header.unsupported(name))
}
