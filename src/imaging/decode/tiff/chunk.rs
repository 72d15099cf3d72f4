//! Decompresses the bytes of one strip or tile as they are asked for.

use flate2::{Decompress, FlushDecompress, Status};
use weezl::{BitOrder, LzwStatus};
use zstd_safe::{DCtx, DParameter, InBuffer, OutBuffer, ResetDirective};

use super::fax::Fax;
use super::layout::{FaxCoding, Image, TiffCompression};
use super::{DecodeBudget, PreprocessError};

/// Most bytes that go into a codec, or come out of it, between two checks of
/// the budget.
const STEP_BYTES: usize = 4096;
/// Encoded bytes of LZW that an image may have beyond one and a half per byte
/// of pixels, the length of the longest code, of 12 bits, for a single byte.
/// The allowance is two steps, since a step is taken before its pixels are
/// made.
const LZW_SPARE: u64 = 2 * STEP_BYTES as u64;
/// Further encoded bytes of LZW for each strip or tile: its first clear code,
/// its end, and bits that the decoder reads ahead.
const LZW_CHUNK_SPARE: u64 = 32;

/// Reason why a strip or tile cannot be read.
pub(super) enum ChunkError {
    /// The data end before the pixels.
    Short,
    /// The data are not valid for the codec.
    Invalid,
    Other(PreprocessError),
}

impl From<PreprocessError> for ChunkError {
    fn from(error: PreprocessError) -> Self {
        Self::Other(error)
    }
}

/// Decompressors, which are kept from one strip or tile to the next: making a
/// decompressor takes longer than most strips.
pub(super) enum Codec {
    None,
    PackBits,
    Lzw(Box<Lzw>),
    Deflate(Decompress),
    Zstd(DCtx<'static>),
    /// Fax codes; `unmarked` is true once a strip or tile of group 3 had no
    /// marks of the beginnings of rows.
    Fax {
        coding: FaxCoding,
        unmarked: bool,
    },
}

/// LZW decoder of one image. A code that clears the table stands for no pixel
/// but takes the decoder as long as hundreds of codes for pixels. Therefore
/// encoded bytes are counted against the pixels that they become.
pub(super) struct Lzw {
    decoder: weezl::decode::Decoder,
    /// True if the decoder is for codes of the old kind: the lowest bit first,
    /// and each length of codes used to its end.
    old: bool,
    /// Encoded bytes that may be taken before more pixels come.
    allowance: u64,
}

impl Lzw {
    fn new() -> Self {
        Self {
            decoder: Self::decoder(false),
            old: false,
            allowance: LZW_SPARE,
        }
    }

    fn decoder(old: bool) -> weezl::decode::Decoder {
        let codes = if old {
            weezl::decode::Configuration::new(BitOrder::Lsb, 8)
        } else {
            weezl::decode::Configuration::with_tiff_size_switch(BitOrder::Msb, 8)
        };
        codes.with_yield_on_full_buffer(true).build()
    }

    /// Prepares for a strip or tile, whose first code, which clears the table,
    /// tells its kind.
    fn begin_chunk(&mut self, first: &[u8]) {
        let old = matches!(first, [0, second, ..] if second & 1 == 1);
        if old == self.old {
            self.decoder.reset();
        } else {
            (self.decoder, self.old) = (Self::decoder(old), old);
        }
        self.allowance = self.allowance.saturating_add(LZW_CHUNK_SPARE);
    }

    /// Decodes a step. Returns the numbers of bytes taken and made.
    fn step(&mut self, from: &[u8], to: &mut [u8]) -> Result<(usize, usize), ChunkError> {
        let done = self.decoder.decode_bytes(from, to);
        let earned = (done.consumed_out as u64).saturating_mul(3).div_ceil(2);
        self.allowance = self
            .allowance
            .saturating_add(earned)
            .checked_sub(done.consumed_in as u64)
            .ok_or(ChunkError::Invalid)?;
        match done.status {
            Ok(LzwStatus::Ok) if !from.is_empty() => Ok((done.consumed_in, done.consumed_out)),
            Ok(_) => some(done.consumed_out).map(|made| (done.consumed_in, made)),
            Err(_) => Err(ChunkError::Invalid),
        }
    }
}

impl Codec {
    /// Creates the decompressor of an image. For JPEGs, which are decoded as a
    /// whole, it is [`Codec::None`].
    pub(super) fn new(image: &Image<'_>) -> Result<Self, ChunkError> {
        Ok(match image.compression {
            TiffCompression::None | TiffCompression::Jpeg => Self::None,
            TiffCompression::PackBits => Self::PackBits,
            TiffCompression::Lzw => Self::Lzw(Box::new(Lzw::new())),
            TiffCompression::Deflate => Self::Deflate(Decompress::new(true)),
            TiffCompression::Zstd => {
                let mut decoder = DCtx::try_create().ok_or(ChunkError::Invalid)?;
                // No frame may ask for more than what was admitted.
                decoder
                    .set_parameter(DParameter::WindowLogMax(image.zstd_window.ilog2()))
                    .map_err(|_| ChunkError::Invalid)?;
                Self::Zstd(decoder)
            }
            TiffCompression::Fax(coding) => Self::Fax {
                coding,
                unmarked: false,
            },
        })
    }
}

/// A strip or tile that is being read.
pub(super) struct Chunk<'a> {
    codec: &'a mut Codec,
    data: Data<'a>,
    budget: &'a DecodeBudget<'a>,
    /// State of a `PackBits` run: the byte that repeats, if any, and the number
    /// of bytes to come.
    run: (Option<u8>, usize),
    fax: Option<Fax>,
}

/// Encoded bytes, with the bits of each byte reversed if the file needs that.
pub(super) struct Data<'a> {
    rest: &'a [u8],
    reversed: bool,
    turned: [u8; STEP_BYTES],
    /// Bytes of `turned` that were taken, and bytes that are in it.
    taken: usize,
    filled: usize,
}

impl<'a> Data<'a> {
    fn new(bytes: &'a [u8], reversed: bool) -> Self {
        Self {
            rest: bytes,
            reversed,
            turned: [0; STEP_BYTES],
            taken: 0,
            filled: 0,
        }
    }

    /// Returns the next bytes, at most a step of them, and none at the end.
    fn peek(&mut self) -> &[u8] {
        if !self.reversed {
            return &self.rest[..self.rest.len().min(STEP_BYTES)];
        }
        if self.taken == self.filled {
            let (now, later) = self.rest.split_at(self.rest.len().min(STEP_BYTES));
            for (to, from) in self.turned.iter_mut().zip(now) {
                *to = from.reverse_bits();
            }
            (self.rest, self.taken, self.filled) = (later, 0, now.len());
        }
        &self.turned[self.taken..self.filled]
    }

    fn take(&mut self, count: usize) {
        if self.reversed {
            self.taken += count;
        } else {
            self.rest = &self.rest[count..];
        }
    }

    pub(super) fn byte(&mut self) -> Option<u8> {
        let byte = *self.peek().first()?;
        self.take(1);
        Some(byte)
    }
}

impl<'a> Chunk<'a> {
    pub(super) fn new(
        codec: &'a mut Codec,
        bytes: &'a [u8],
        image: &Image<'_>,
        budget: &'a DecodeBudget<'a>,
    ) -> Self {
        let mut data = Data::new(bytes, image.reversed);
        match codec {
            Codec::Lzw(lzw) => lzw.begin_chunk(data.peek()),
            Codec::Deflate(decoder) => decoder.reset(true),
            Codec::Zstd(decoder) => {
                // A reset of a session does not fail.
                let _ = decoder.reset(ResetDirective::SessionOnly);
            }
            Codec::None | Codec::PackBits | Codec::Fax { .. } => {}
        }
        let fax = match codec {
            Codec::Fax { coding, unmarked } => {
                let mut fax = Fax::new(image.chunk_width, *coding, bytes, image.reversed);
                fax.follow(unmarked);
                Some(fax)
            }
            _ => None,
        };
        Self {
            codec,
            data,
            budget,
            run: (None, 0),
            fax,
        }
    }

    /// Creates a reader of a strip or tile that is uncompressed already.
    /// `codec` must be [`Codec::None`].
    pub(super) fn plain(
        codec: &'a mut Codec,
        bytes: &'a [u8],
        budget: &'a DecodeBudget<'a>,
    ) -> Self {
        Self {
            codec,
            data: Data::new(bytes, false),
            budget,
            run: (None, 0),
            fax: None,
        }
    }

    /// Reads the next bytes, as many as `to` has room for.
    pub(super) fn read(&mut self, mut to: &mut [u8]) -> Result<(), ChunkError> {
        while !to.is_empty() {
            self.budget.check()?;
            let step = to.len().min(STEP_BYTES);
            let made = self.step(&mut to[..step])?;
            to = &mut to[made..];
        }
        Ok(())
    }

    /// Skips `count` bytes.
    pub(super) fn skip(&mut self, mut count: u64) -> Result<(), ChunkError> {
        let mut scratch = [0; STEP_BYTES];
        while count > 0 {
            let step = usize::try_from(count).unwrap_or(usize::MAX).min(STEP_BYTES);
            self.read(&mut scratch[..step])?;
            count -= step as u64;
        }
        Ok(())
    }

    /// Makes some of the next bytes and returns their number, which may be 0 if
    /// only input was taken.
    fn step(&mut self, to: &mut [u8]) -> Result<usize, ChunkError> {
        match self.codec {
            Codec::None => {
                let from = self.data.peek();
                let count = from.len().min(to.len());
                to[..count].copy_from_slice(&from[..count]);
                self.data.take(count);
                some(count)
            }
            Codec::PackBits => self.unpack(to),
            Codec::Lzw(lzw) => {
                let (taken, made) = lzw.step(self.data.peek(), to)?;
                self.data.take(taken);
                Ok(made)
            }
            Codec::Deflate(decoder) => {
                let from = self.data.peek();
                let ended = from.is_empty();
                let before = (decoder.total_in(), decoder.total_out());
                let status = decoder
                    .decompress(from, to, FlushDecompress::None)
                    .map_err(|_| ChunkError::Invalid)?;
                let count =
                    |after: u64, before: u64| usize::try_from(after - before).unwrap_or(usize::MAX);
                self.data.take(count(decoder.total_in(), before.0));
                let made = count(decoder.total_out(), before.1);
                match status {
                    Status::Ok if !ended => Ok(made),
                    Status::Ok | Status::BufError | Status::StreamEnd => some(made),
                }
            }
            Codec::Zstd(decoder) => {
                let mut from = InBuffer::around(self.data.peek());
                let ended = from.src.is_empty();
                let mut to = OutBuffer::around(to);
                decoder
                    .decompress_stream(&mut to, &mut from)
                    .map_err(|_| ChunkError::Invalid)?;
                let (taken, made) = (from.pos(), to.pos());
                self.data.take(taken);
                if ended || taken == 0 {
                    some(made)
                } else {
                    Ok(made)
                }
            }
            Codec::Fax { .. } => {
                let fax = self.fax.as_mut().ok_or(ChunkError::Invalid)?;
                fax.row(&mut self.data).ok_or(ChunkError::Invalid)?;
                some(fax.take(to))
            }
        }
    }

    /// Decodes a part of a `PackBits` run.
    fn unpack(&mut self, to: &mut [u8]) -> Result<usize, ChunkError> {
        if self.run.1 == 0 {
            // A head of 128 has no meaning and is skipped.
            let mut head = self.data.byte();
            while head == Some(128) {
                head = self.data.byte();
            }
            self.run = match head.ok_or(ChunkError::Short)? {
                count @ 0..=128 => (None, usize::from(count) + 1),
                count => {
                    let byte = self.data.byte().ok_or(ChunkError::Short)?;
                    (Some(byte), 257 - usize::from(count))
                }
            };
        }
        let mut count = self.run.1.min(to.len());
        if let Some(byte) = self.run.0 {
            to[..count].fill(byte);
        } else {
            let from = self.data.peek();
            count = count.min(from.len());
            to[..count].copy_from_slice(&from[..count]);
            self.data.take(count);
        }
        self.run.1 -= count;
        some(count)
    }
}

/// Returns the number of bytes that were made, or an error for 0, which means
/// that there are no more.
fn some(count: usize) -> Result<usize, ChunkError> {
    if count == 0 {
        Err(ChunkError::Short)
    } else {
        Ok(count)
    }
}
