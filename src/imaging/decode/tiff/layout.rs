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

mod tag {
    pub(super) const WIDTH: u16 = 256;
    pub(super) const HEIGHT: u16 = 257;
    pub(super) const BITS: u16 = 258;
    pub(super) const COMPRESSION: u16 = 259;
    pub(super) const PHOTOMETRIC: u16 = 262;
    pub(super) const FILL_ORDER: u16 = 266;
    pub(super) const STRIP_OFFSETS: u16 = 273;
    pub(super) const ORIENTATION: u16 = 274;
    pub(super) const SAMPLES: u16 = 277;
    pub(super) const ROWS_PER_STRIP: u16 = 278;
    pub(super) const STRIP_BYTES: u16 = 279;
    pub(super) const PLANAR: u16 = 284;
    pub(super) const FAX_OPTIONS: u16 = 293;
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
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TiffCompression {
    None,
    PackBits,
    Lzw,
    Deflate,
    Jpeg,
    Fax4,
}

/// Description of an image and of how it is stored.
#[expect(
    clippy::struct_excessive_bools,
    reason = "each is a tag of the format with two values, which mix freely"
)]
pub(super) struct Image<'a> {
    pub(super) width: u32,
    pub(super) height: u32,
    pub(super) colors: TiffColors,
    /// True if the sample after the colors is alpha.
    pub(super) alpha: bool,
    pub(super) samples: usize,
    pub(super) bits: u32,
    pub(super) little: bool,
    pub(super) compression: TiffCompression,
    /// True if samples are stored as differences from the pixel before.
    pub(super) predictor: bool,
    /// True if each sample has strips or tiles of its own.
    pub(super) planar: bool,
    /// True if bytes begin with their lowest bit.
    pub(super) reversed: bool,
    /// Width in pixels of a strip or tile, pixels beyond the image's edges
    /// included.
    pub(super) chunk_width: u32,
    pub(super) chunk_height: u32,
    pub(super) offsets: TagValues<'a>,
    pub(super) lens: TagValues<'a>,
    pub(super) palette: Option<TagValues<'a>>,
    pub(super) jpeg_tables: Option<&'a [u8]>,
    pub(super) orientation: Option<u64>,
    pub(super) xmp: Option<&'a [u8]>,
}

impl TiffColors {
    pub(super) fn channels(self) -> usize {
        match self {
            Self::Gray { .. } | Self::Palette => 1,
            Self::Rgb => 3,
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
    fn uniform(&self, tag: u16, default: u64, name: &str) -> Result<u64, PreprocessError> {
        let Some(values) = self.values(tag)? else {
            return Ok(default);
        };
        let first = values.get(0).unwrap_or(default);
        if values.len() as u64 > SAMPLES_MAX || values.iter().any(|value| value != first) {
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

        let (colors, samples, alpha) = read_samples(&tags)?;
        let bits = tags.uniform(tag::BITS, 1, "bits")?;
        match tags.uniform(tag::SAMPLE_FORMAT, 1, "formats")? {
            1 | 4 => {}
            2 => return Err(header.unsupported("signed samples")),
            3 => return Err(header.unsupported("floating-point samples")),
            other => return Err(header.unsupported(format!("sample format {other}"))),
        }
        let small = matches!(bits, 1 | 2 | 4) && samples == 1;
        let large = bits == 8 || (bits == 16 && colors != TiffColors::Palette);
        if !(small || large) {
            return Err(
                header.unsupported(format!("{samples} samples per pixel of {bits} bits each"))
            );
        }
        let compression = read_compression(&tags)?;
        let predictor = match tags.number_or(tag::PREDICTOR, 1)? {
            1 => false,
            2 if bits >= 8 => true,
            other => {
                return Err(
                    header.unsupported(format!("predictor {other} with samples of {bits} bits"))
                );
            }
        };
        let reversed = match tags.number_or(tag::FILL_ORDER, 1)? {
            1 => false,
            2 if bits <= 8 => true,
            other => {
                return Err(
                    header.unsupported(format!("fill order {other} with samples of {bits} bits"))
                );
            }
        };
        let planar = match tags.number_or(tag::PLANAR, 1)? {
            1 => false,
            2 => samples > 1,
            other => return Err(header.unsupported(format!("planar configuration {other}"))),
        };
        let chunks = Chunks::read(&tags, (width, height))?;
        let image = Self {
            width,
            height,
            colors,
            alpha,
            samples,
            bits: u32::try_from(bits).unwrap_or(16),
            little,
            compression,
            // Only these compressions apply the predictor.
            predictor: predictor
                && matches!(compression, TiffCompression::Lzw | TiffCompression::Deflate),
            planar,
            reversed,
            chunk_width: chunks.width,
            chunk_height: chunks.height,
            offsets: chunks.offsets,
            lens: chunks.lens,
            palette: tags.values(tag::COLORS)?,
            jpeg_tables: tags.values(tag::JPEG_TABLES)?.and_then(TagValues::as_bytes),
            orientation: tags.number(tag::ORIENTATION).ok().flatten(),
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
        self.colors.channels() + usize::from(self.alpha)
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
        if [self.offsets, self.lens]
            .iter()
            .any(|values| values.len() as u64 != count)
        {
            return Err(header.damaged(format!(
                "{} offsets and {} lengths for {count} strips or tiles",
                self.offsets.len(),
                self.lens.len()
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
        let encoded = self.lens.iter().fold(0, u64::saturating_add);
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
            row + super::OTHER_BYTES + self.fax_bytes(),
        )
    }

    /// Returns the bytes that are held per pixel: the channels, and the RGB
    /// that palettes and CMYK become.
    pub(super) fn pixel_bytes(&self) -> u64 {
        let colors = match self.colors {
            TiffColors::Palette | TiffColors::Cmyk => 3,
            TiffColors::Gray { .. } | TiffColors::Rgb => 0,
        };
        self.channels() as u64 + colors
    }

    /// Returns the bytes of the columns at which colors change, in two rows of
    /// fax codes.
    fn fax_bytes(&self) -> u64 {
        if self.compression == TiffCompression::Fax4 {
            16 * u64::from(self.chunk_width)
        } else {
            0
        }
    }
}

/// Size of the strips or tiles, and their bytes in the file.
struct Chunks<'a> {
    width: u32,
    height: u32,
    offsets: TagValues<'a>,
    lens: TagValues<'a>,
}

impl<'a> Chunks<'a> {
    fn read(tags: &Tags<'a>, (width, height): (u32, u32)) -> Result<Self, PreprocessError> {
        let header = tags.header;
        let missing = || header.damaged("no offsets or no lengths of strips or tiles");
        let strips = tags.values(tag::STRIP_OFFSETS)?;
        let tiles = tags.values(tag::TILE_OFFSETS)?;
        let chunks = match (strips, tiles) {
            (Some(offsets), None) => {
                let rows = tags.number_or(tag::ROWS_PER_STRIP, u64::MAX)?;
                Self {
                    width,
                    // The default, 2^32 - 1, means one strip.
                    height: u32::try_from(rows).unwrap_or(height).min(height),
                    offsets,
                    lens: tags.values(tag::STRIP_BYTES)?.ok_or_else(missing)?,
                }
            }
            (None, Some(offsets)) => Self {
                width: tags.side(tag::TILE_WIDTH)?,
                height: tags.side(tag::TILE_HEIGHT)?,
                offsets,
                lens: tags.values(tag::TILE_BYTES)?.ok_or_else(missing)?,
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

/// Reads the meaning of samples, their number, and whether one is alpha.
fn read_samples(tags: &Tags<'_>) -> Result<(TiffColors, usize, bool), PreprocessError> {
    let header = tags.header;
    let colors = match tags.number(tag::PHOTOMETRIC)? {
        Some(0) => TiffColors::Gray { inverted: true },
        Some(1) => TiffColors::Gray { inverted: false },
        Some(2) => TiffColors::Rgb,
        Some(3) => TiffColors::Palette,
        Some(5) if tags.number_or(tag::INKS, 1)? == 1 => TiffColors::Cmyk,
        Some(6) => return Err(header.unsupported("colors in YCbCr")),
        Some(8..=10) => return Err(header.unsupported("colors in L*a*b*")),
        Some(other) => {
            return Err(header.unsupported(format!("photometric interpretation {other}")));
        }
        None => return Err(header.unsupported("no photometric interpretation")),
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
            "{samples} samples per pixel and {channels} colors, but tag 338 lists another number \
             of extra samples"
        )));
    }
    // Alpha is the first extra sample, if the file states so, or if an RGB
    // image has a fourth sample without a stated meaning.
    let alpha = match extra {
        Some(extra) => matches!(extra.get(0), Some(1 | 2)),
        None if others == 0 => false,
        None if others == 1 && colors == TiffColors::Rgb => true,
        None => {
            return Err(header.unsupported("extra samples whose meaning the file does not state"));
        }
    };
    if alpha && matches!(colors, TiffColors::Palette | TiffColors::Cmyk) {
        return Err(header.unsupported("a palette or CMYK with alpha"));
    }
    let samples = usize::try_from(samples).unwrap_or(usize::MAX);
    Ok((colors, samples, alpha))
}

fn read_compression(tags: &Tags<'_>) -> Result<TiffCompression, PreprocessError> {
    let header = tags.header;
    let name = match tags.number_or(tag::COMPRESSION, 1)? {
        1 => return Ok(TiffCompression::None),
        4 => {
            let bits = tags.uniform(tag::BITS, 1, "bits")?;
            if bits != 1 || tags.number_or(tag::SAMPLES, 1)? != 1 {
                return Err(
                    header.unsupported("fax compression of other than 1 sample of 1 bit per pixel")
                );
            }
            if tags.number_or(tag::FAX_OPTIONS, 0)? != 0 {
                return Err(header.unsupported("fax compression with uncompressed parts"));
            }
            return Ok(TiffCompression::Fax4);
        }
        5 => return Ok(TiffCompression::Lzw),
        7 => {
            if tags.uniform(tag::BITS, 1, "bits")? != 8 {
                return Err(header.unsupported("JPEG compression of samples of other than 8 bits"));
            }
            return Ok(TiffCompression::Jpeg);
        }
        8 | 32946 => return Ok(TiffCompression::Deflate),
        32773 => return Ok(TiffCompression::PackBits),
        2 | 3 => "fax compression of group 3",
        6 => "JPEG compression of the old kind (6)",
        34661 => "JBIG compression",
        34712 => "JPEG 2000 compression",
        34925 => "LZMA compression",
        50000 => "Zstandard compression",
        50001 => "WebP compression",
        other => return Err(header.unsupported(format!("compression scheme {other}"))),
    };
    Err(header.unsupported(name))
}
