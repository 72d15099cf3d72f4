//! Decoder of WebP files, for the first frame of an animation only.
//!
//! The decoder trusts the last sizes that it finds in a file. Therefore it is
//! given a file that is made here: the chunks of one frame, whose sizes agree
//! with each other and were checked. Other parts of the caller's file are never
//! decoded. The first frame of an animation is placed on its canvas here,
//! transparent around it and without blending, because there is nothing below
//! it.
//!
//! Memory: the copy of the frame's bytes, and up to 12 bytes per pixel (the
//! ARGB of a lossless frame or of compressed alpha, its planes, the output),
//! with the codes that [`lossless`] counts.
//!
//! Work: a few passes over the frame's pixels and one over its bytes. A lossy
//! frame is read whole before it is decoded, so a budget that ends during the
//! decode is noticed only after the frame's pixels.

use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;
use image::{ColorType, ImageDecoder};

use super::pixels::{PixelLayout, Pixels};
use super::{Header, PreprocessError, orientation};

mod lossless;
mod lossy;

/// Most bytes that the decoder holds per pixel: the planes of a lossy frame,
/// its output, and the ARGB from which its alpha is taken. A lossless frame
/// takes less, as does the canvas of an animation once its frame is decoded.
const PIXEL_BYTES: u64 = 12;

/// Bytes of tables, and of buffers for a row.
const OTHER_BYTES: u64 = 256 << 10;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    let file = File::read(bytes, header)?;
    let (width, height) = file.canvas;
    header.admit_pixels(width, height)?;
    let frame = &file.frame;
    let held = frame.check(header)?;
    header.admit(frame.width, frame.height, PIXEL_BYTES, held)?;
    header.admit(width, height, PIXEL_BYTES, 0)?;

    let still = frame.alone(header)?;
    let decoder = WebPDecoder::new(header.source(&still)).map_err(|e| header.image_error(&e))?;
    if decoder.dimensions() != (frame.width, frame.height) {
        return Err(header.damaged("a frame of another size than its header"));
    }
    let pixels = read(decoder, header)?;
    let pixels = if file.animated || (pixels.layout == PixelLayout::Rgba && !file.alpha) {
        file.on_canvas(&pixels)
    } else {
        pixels
    };
    Ok((pixels, orientation(file.exif, file.xmp)))
}

/// Decodes an image whose size was admitted.
fn read(decoder: impl ImageDecoder, header: Header<'_>) -> Result<Pixels, PreprocessError> {
    let layout = match decoder.color_type() {
        ColorType::L8 => PixelLayout::Gray,
        ColorType::La8 => PixelLayout::GrayAlpha,
        ColorType::Rgb8 => PixelLayout::Rgb,
        ColorType::Rgba8 => PixelLayout::Rgba,
        color => return Err(header.unsupported(format!("samples of type {color:?}"))),
    };
    let (width, height) = decoder.dimensions();
    let mut data = vec![0; width as usize * height as usize * layout.channels()];
    decoder
        .read_image(&mut data)
        .map_err(|error| header.image_error(&error))?;
    Ok(Pixels {
        width,
        height,
        layout,
        data,
    })
}

/// Parts of a file that decoding needs.
struct File<'a> {
    animated: bool,
    /// Width and height of the canvas.
    canvas: (u32, u32),
    /// True if transparency is shown: if the extended header says so, or if the
    /// file has no extended header.
    alpha: bool,
    /// Column and row of the frame on the canvas.
    place: (u32, u32),
    frame: Frame<'a>,
    exif: Option<&'a [u8]>,
    xmp: Option<&'a [u8]>,
}

/// One image: its pixels, and its alpha if the alpha is stored separately.
struct Frame<'a> {
    width: u32,
    height: u32,
    alpha: Option<&'a [u8]>,
    pixels: &'a [u8],
    lossless: bool,
}

impl<'a> File<'a> {
    fn read(bytes: &'a [u8], header: Header<'_>) -> Result<Self, PreprocessError> {
        let cut = || header.damaged("a file without a complete frame");
        let mut chunks = Chunks(riff(bytes).ok_or_else(cut)?);
        let first = Chunks(chunks.0).next().ok_or_else(cut)?;
        let (flags, extended) = match first {
            (b"VP8X", body) => {
                let Some(&[flags, _, _, _, w0, w1, w2, h0, h1, h2]) = body.first_chunk() else {
                    return Err(header.damaged("a header chunk cut short"));
                };
                let side = |bytes: [u8; 3]| u24(bytes) + 1;
                (flags, Some((side([w0, w1, w2]), side([h0, h1, h2]))))
            }
            _ => (0, None),
        };
        let animated = flags & 2 != 0;
        let (mut frame, mut exif, mut xmp) = (None, None, None);
        let mut alpha = None;
        if !matches!(first.0, b"VP8X" | b"VP8 " | b"VP8L") {
            return Err(header.damaged("a first chunk that is no image and no header"));
        }
        for (kind, body) in chunks.by_ref() {
            match kind {
                b"ANMF" if animated && frame.is_none() => {
                    frame = Some(read_animated(body, header)?);
                }
                b"ALPH" if !animated && frame.is_none() => {
                    alpha.get_or_insert(body);
                }
                b"VP8 " | b"VP8L" if !animated && frame.is_none() => {
                    let alpha = alpha.filter(|_| flags & 0x10 != 0);
                    frame = Some(((0, 0), Frame::read(*kind, body, alpha, header)?));
                }
                b"EXIF" => exif = exif.or(Some(body)),
                b"XMP " => xmp = xmp.or(Some(body)),
                _ => {}
            }
        }
        // Chunks fill the file, as Pillow's library demands.
        if !chunks.0.is_empty() {
            return Err(header.damaged("a chunk that is cut short, or bytes that are no chunk"));
        }
        let (place, frame) = frame.ok_or_else(cut)?;
        let canvas = extended.unwrap_or((frame.width, frame.height));
        let inside = |at: u32, size: u32, of: u32| u64::from(at) + u64::from(size) <= u64::from(of);
        let fits = if animated {
            inside(place.0, frame.width, canvas.0) && inside(place.1, frame.height, canvas.1)
        } else {
            (frame.width, frame.height) == canvas
        };
        if !fits {
            return Err(header.damaged(format!(
                "a frame of {} x {} on a canvas of {} x {}, which it does not fit",
                frame.width, frame.height, canvas.0, canvas.1
            )));
        }
        Ok(Self {
            animated,
            canvas,
            alpha: extended.is_none() || flags & 0x10 != 0,
            place,
            frame,
            exif,
            xmp,
        })
    }

    /// Places the frame on its canvas, with transparent black around it.
    fn on_canvas(&self, frame: &Pixels) -> Pixels {
        let (width, height) = self.canvas;
        let layout = if self.alpha {
            PixelLayout::Rgba
        } else {
            PixelLayout::Rgb
        };
        let channels = layout.channels();
        let mut data = vec![0; width as usize * height as usize * channels];
        let from = frame.layout.channels();
        let rows = frame.data.chunks_exact(frame.width as usize * from);
        for (row, pixels) in (self.place.1 as usize..).zip(rows) {
            let start = (row * width as usize + self.place.0 as usize) * channels;
            let target = data[start..].chunks_exact_mut(channels);
            for (to, pixel) in target.zip(pixels.chunks_exact(from)) {
                let alpha = if from == 4 { pixel[3] } else { 255 };
                to.copy_from_slice(&[pixel[0], pixel[1], pixel[2], alpha][..channels]);
            }
        }
        Pixels {
            width,
            height,
            layout,
            data,
        }
    }
}

/// Reads the frame of an animation: its place on the canvas and its image.
fn read_animated<'a>(
    body: &'a [u8],
    header: Header<'_>,
) -> Result<((u32, u32), Frame<'a>), PreprocessError> {
    let Some((head, chunks)) = body.split_first_chunk::<16>() else {
        return Err(header.damaged("a frame cut short"));
    };
    let side = |at: usize| u24([head[at], head[at + 1], head[at + 2]]);
    let mut alpha = None;
    for (kind, body) in Chunks(chunks) {
        match kind {
            b"ALPH" => {
                alpha.get_or_insert(body);
            }
            b"VP8 " | b"VP8L" => {
                let frame = Frame::read(*kind, body, alpha, header)?;
                if (frame.width, frame.height) != (side(6) + 1, side(9) + 1) {
                    return Err(header.damaged("a frame of another size than its header"));
                }
                return Ok(((2 * side(0), 2 * side(3)), frame));
            }
            _ => {}
        }
    }
    Err(header.damaged("a frame without pixels"))
}

impl<'a> Frame<'a> {
    fn read(
        kind: [u8; 4],
        body: &'a [u8],
        alpha: Option<&'a [u8]>,
        header: Header<'_>,
    ) -> Result<Self, PreprocessError> {
        let lossless = kind == *b"VP8L";
        let size = if lossless {
            lossless::size(body)
        } else {
            lossy::size(body)
        };
        let (width, height) = size.ok_or_else(|| header.damaged("a frame cut short"))?;
        Ok(Self {
            width,
            height,
            alpha: alpha.filter(|_| !lossless),
            pixels: body,
            lossless,
        })
    }

    /// Checks the sizes inside the frame, and returns the bytes that decoding
    /// holds beside the pixels.
    fn check(&self, header: Header<'_>) -> Result<u64, PreprocessError> {
        let bytes = (self.pixels.len() + self.alpha.map_or(0, <[u8]>::len)) as u64;
        header.admit_pixels(self.width, self.height)?;
        let codes = if self.lossless {
            lossless::code_bytes(&self.pixels[5..], self.width, self.height, header)?
        } else {
            lossy::check(self.pixels, header)?;
            match self.alpha {
                Some([info, body @ ..]) if info & 3 == 1 => {
                    lossless::code_bytes(body, self.width, self.height, header)?
                }
                _ => 0,
            }
        };
        // One copy of the frame, and for a lossy frame three more of its parts.
        Ok(OTHER_BYTES + 4 * bytes + codes)
    }

    /// Returns the frame as a file of its own.
    fn alone(&self, header: Header<'_>) -> Result<Vec<u8>, PreprocessError> {
        let mut chunks = Vec::with_capacity(self.pixels.len() + 64);
        chunks.extend_from_slice(b"RIFF\0\0\0\0WEBP");
        if let Some(alpha) = self.alpha {
            let [w0, w1, w2, _] = (self.width - 1).to_le_bytes();
            let [h0, h1, h2, _] = (self.height - 1).to_le_bytes();
            push(
                &mut chunks,
                *b"VP8X",
                &[0x10, 0, 0, 0, w0, w1, w2, h0, h1, h2],
            );
            push(&mut chunks, *b"ALPH", alpha);
        }
        let kind = if self.lossless { *b"VP8L" } else { *b"VP8 " };
        push(&mut chunks, kind, self.pixels);
        let len = u32::try_from(chunks.len() - 8)
            .map_err(|_| header.damaged("a frame of more than 4 GiB"))?;
        chunks[4..8].copy_from_slice(&len.to_le_bytes());
        Ok(chunks)
    }
}

/// Appends a chunk with its length and padding.
fn push(file: &mut Vec<u8>, kind: [u8; 4], body: &[u8]) {
    file.extend_from_slice(&kind);
    // Each body is part of a file that gave its length as a 32-bit number.
    let len = u32::try_from(body.len()).unwrap_or(u32::MAX);
    file.extend_from_slice(&len.to_le_bytes());
    file.extend_from_slice(body);
    if body.len() % 2 == 1 {
        file.push(0);
    }
}

/// Iterator over the kinds and bodies of chunks, up to the first chunk that is
/// not whole.
struct Chunks<'a>(&'a [u8]);

impl<'a> Iterator for Chunks<'a> {
    type Item = (&'a [u8; 4], &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let (kind, after) = self.0.split_first_chunk::<4>()?;
        let (len, after) = after.split_first_chunk::<4>()?;
        let len = usize::try_from(u32::from_le_bytes(*len)).ok()?;
        let (body, after) = after.split_at_checked(len)?;
        self.0 = after.get(len % 2..)?;
        Some((kind, body))
    }
}

/// Returns the chunks that a file claims to hold. Bytes behind them do not
/// belong to the file; a file that is shorter than its claim is cut short and
/// gives `None`.
fn riff(bytes: &[u8]) -> Option<&[u8]> {
    let len = u32::from_le_bytes(*bytes.get(4..)?.first_chunk()?);
    bytes.get(8..)?.get(..usize::try_from(len).ok()?)?.get(4..)
}

fn u24([low, middle, high]: [u8; 3]) -> u32 {
    u32::from_le_bytes([low, middle, high, 0])
}
