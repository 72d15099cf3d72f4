//! Turns one image, in any form of [`ImageInput`], into the color tokens that
//! the model reads.
//!
//! Promises: the tokens of an image equal, bit for bit, those of Hugging Face's
//! Pillow-based processor (`tests/golden`); an image over a limit is refused by
//! its header, before its pixels are decoded; memory stays within
//! [`ImageLimits::decode_bytes_max`], give or take a few MiB; a decoder that
//! panics harms only its own image.
//!
//! This module does not read files, start threads, record metrics or know of
//! requests. The functions are pure, so the caller chooses where they run and
//! what is timed. [`decode`](decode::decode), [`resize`](resize::resize) and
//! [`Quantizer`] can also be used alone.

use std::time::{Duration, Instant};

use bytes::Bytes;

use self::cost::DecodeCost;
use self::decode::{RowSink, decode_rows};
use self::resize::RowResize;
use self::turn::Turn;

pub(crate) mod budget;
pub(crate) mod cost;
pub mod decode;
mod error;
pub(crate) mod quantize;
pub mod render;
pub mod resize;
mod turn;

pub use self::budget::DecodeBudget;
pub use self::decode::ImageFormat;
pub use self::error::PreprocessError;
pub use self::quantize::{Palette, PaletteError, Quantizer};

/// One image, as the caller sent it.
#[derive(Clone, Debug)]
pub enum ImageInput {
    /// A whole image file.
    Encoded(Bytes),
    /// Raw RGB pixels: rows from top to bottom, 3 bytes per pixel.
    Rgb8 {
        width: u32,
        height: u32,
        pixels: Bytes,
    },
    /// Tokens of a whole image, made earlier with the same palette.
    Tokens(Vec<u32>),
    /// The first tokens of an image that is to be generated, at most all of
    /// them.
    Prefix(Vec<u32>),
}

/// Method that makes an image square.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Fit {
    /// Resizes straight to the model's side, whatever the aspect ratio.
    #[default]
    Squash,
    /// Resizes the shorter side to 7 times the model's side, crops the center
    /// square and resizes the square to the side, as the paper's evaluation
    /// does (224, then 32).
    CenterCrop,
}

/// Treatment of an image's transparency.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, clap::ValueEnum)]
pub enum Alpha {
    /// Ignores transparency: a transparent pixel shows the color stored under
    /// it.
    #[default]
    Drop,
    /// Composites the image onto white.
    White,
}

/// Steps of preprocessing that a caller can choose.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct PreprocessOptions {
    pub fit: Fit,
    pub alpha: Alpha,
}

/// An image, and the options by which the image becomes tokens.
#[derive(Debug, Clone)]
pub struct ImageRequest {
    pub input: ImageInput,
    pub options: PreprocessOptions,
}

impl ImageRequest {
    /// Returns true if the image is given as tokens. Tokens are only checked,
    /// which takes a few microseconds: less than to wake up a thread for the
    /// work.
    #[must_use]
    pub fn is_tokens(&self) -> bool {
        matches!(self.input, ImageInput::Tokens(_))
    }

    /// Estimates the time that a preprocessing thread needs for the picture.
    pub(crate) fn cost(&self) -> DecodeCost {
        DecodeCost::of(&self.input)
    }
}

/// Bounds on one image, so that a small hostile file costs little.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ImageLimits {
    /// Most bytes of an encoded image.
    pub image_bytes_max: usize,
    /// Most pixels of an image: width times height, as its header states them.
    pub image_pixels_max: u64,
    /// Most bytes that decoding may hold at the same time, the pixels included.
    pub decode_bytes_max: u64,
}

/// The tokens of one image, and the time that each step took.
#[derive(Clone, Debug)]
pub struct Tokenized {
    /// `side * side` palette indexes in raster order.
    pub tokens: Box<[u16]>,
    pub timings: StageTimings,
}

/// Time spent on the steps of one image; zero for a step that its form does not
/// need.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageTimings {
    /// Time from file to pixels.
    pub decode: Duration,
    /// Time from pixels to tokens: the resize and the nearest colors.
    pub quantize: Duration,
}

/// Everything that turns images into tokens for one model.
#[derive(Debug)]
pub struct Preprocessor {
    quantizer: Quantizer,
    side: u32,
    limits: ImageLimits,
}

impl Preprocessor {
    /// Prepares the palette's search structure, which takes some milliseconds.
    ///
    /// # Panics
    ///
    /// When `side` is 0.
    #[must_use]
    pub fn new(palette: &Palette, side: u32, limits: ImageLimits) -> Self {
        assert!(side > 0, "a model's images have at least one pixel");
        Self {
            quantizer: Quantizer::new(palette),
            side,
            limits,
        }
    }

    /// Side in pixels of the square that tokens are made from.
    #[must_use]
    pub fn side(&self) -> usize {
        self.side as usize
    }

    /// Number of tokens of an image: `side * side`.
    #[must_use]
    pub fn positions(&self) -> usize {
        self.side as usize * self.side as usize
    }

    /// The start token: the id after the last color.
    #[must_use]
    pub fn start_token(&self) -> u16 {
        u16::try_from(self.quantizer.colors()).unwrap_or(u16::MAX)
    }

    /// Turns one image into its tokens.
    ///
    /// # Errors
    ///
    /// When the image is over a limit, damaged, or not what its form says, and
    /// when the budget is spent.
    pub fn tokenize(
        &self,
        input: &ImageInput,
        options: PreprocessOptions,
        budget: &DecodeBudget<'_>,
    ) -> Result<Tokenized, PreprocessError> {
        let started = Instant::now();
        match input {
            ImageInput::Encoded(bytes) => {
                let mut sink = Resizing::new(self.side, options.fit);
                decode_rows(bytes, options.alpha, &self.limits, budget, &mut sink)?;
                let decode = started.elapsed().saturating_sub(sink.took);
                let resize = sink.resize.ok_or(PreprocessError::NotAnImage)?;
                Ok(self.tokens_of(sink.took, decode, || resize.finish()))
            }
            ImageInput::Rgb8 {
                width,
                height,
                pixels,
            } => {
                let view = self.check_rgb8(*width, *height, pixels)?;
                let resize = || resize::resize(view, self.side, options.fit);
                Ok(self.tokens_of(Duration::ZERO, Duration::ZERO, resize))
            }
            ImageInput::Tokens(ids) => {
                if ids.len() != self.positions() {
                    return Err(PreprocessError::TokenCount {
                        count: ids.len(),
                        expected: self.positions(),
                    });
                }
                self.check_tokens("tokens", ids)
            }
            ImageInput::Prefix(ids) => {
                if ids.len() > self.positions() {
                    return Err(PreprocessError::PrefixLong {
                        count: ids.len(),
                        max: self.positions(),
                    });
                }
                self.check_tokens(error::PREFIX, ids)
            }
        }
    }

    /// Returns the tokens of a square that `resize` makes, after it took some
    /// time already.
    fn tokens_of(
        &self,
        resized: Duration,
        decode: Duration,
        resize: impl FnOnce() -> RgbImage,
    ) -> Tokenized {
        let started = Instant::now();
        let tokens = self.quantizer.quantize(&resize().pixels);
        Tokenized {
            tokens,
            timings: StageTimings {
                decode,
                quantize: resized + started.elapsed(),
            },
        }
    }

    fn check_rgb8<'a>(
        &self,
        width: u32,
        height: u32,
        pixels: &'a [u8],
    ) -> Result<RgbView<'a>, PreprocessError> {
        if width == 0 || height == 0 {
            return Err(PreprocessError::Rgb8Empty { width, height });
        }
        let pixels_max = self.limits.image_pixels_max;
        if u64::from(width) * u64::from(height) > pixels_max {
            return Err(PreprocessError::Rgb8PixelsOverLimit {
                width,
                height,
                pixels_max,
            });
        }
        RgbView::new(width, height, pixels).ok_or(PreprocessError::Rgb8Length {
            width,
            height,
            bytes: pixels.len(),
        })
    }

    /// Checks tokens against the palette. `field` is the field's name in the
    /// request, for errors.
    fn check_tokens(&self, field: &'static str, ids: &[u32]) -> Result<Tokenized, PreprocessError> {
        let colors = self.quantizer.colors();
        let tokens = ids
            .iter()
            .enumerate()
            .map(|(index, &id)| match u16::try_from(id) {
                Ok(token) if usize::from(token) < colors => Ok(token),
                Ok(token) if usize::from(token) == colors => {
                    Err(PreprocessError::StartToken { field, index, id })
                }
                _ => Err(PreprocessError::TokenOutsidePalette {
                    field,
                    index,
                    id,
                    id_max: colors - 1,
                }),
            })
            .collect::<Result<_, _>>()?;
        Ok(Tokenized {
            tokens,
            timings: StageTimings::default(),
        })
    }
}

/// Decoded pixels: rows from top to bottom, 3 bytes per pixel.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct RgbImage {
    pub width: u32,
    pub height: u32,
    /// Exactly `width * height * 3` bytes.
    pub pixels: Vec<u8>,
}

impl RgbImage {
    /// Borrows the pixels.
    #[must_use]
    pub fn view(&self) -> RgbView<'_> {
        debug_assert_eq!(
            self.pixels.len() as u64,
            u64::from(self.width) * u64::from(self.height) * 3
        );
        RgbView {
            width: self.width as usize,
            height: self.height as usize,
            pixels: &self.pixels,
        }
    }
}

/// Borrowed pixels whose length is known to be right.
#[derive(Clone, Copy, Debug)]
pub struct RgbView<'a> {
    width: usize,
    height: usize,
    pixels: &'a [u8],
}

impl<'a> RgbView<'a> {
    /// Returns a view of the pixels, or `None` if there are no pixels or not
    /// `width * height * 3` bytes of them.
    #[must_use]
    pub fn new(width: u32, height: u32, pixels: &'a [u8]) -> Option<Self> {
        let bytes = u128::from(width) * u128::from(height) * 3;
        (bytes > 0 && bytes == pixels.len() as u128).then_some(Self {
            width: width as usize,
            height: height as usize,
            pixels,
        })
    }
}

/// Sink that resizes rows as they are decoded.
struct Resizing {
    side: u32,
    fit: Fit,
    resize: Option<RowResize>,
    /// Time that was spent on the resize.
    took: Duration,
}

impl Resizing {
    fn new(side: u32, fit: Fit) -> Self {
        Self {
            side,
            fit,
            resize: None,
            took: Duration::ZERO,
        }
    }
}

impl RowSink for Resizing {
    fn begin(&mut self, width: u32, height: u32, turn: Turn) {
        let size = (width as usize, height as usize);
        self.resize = Some(RowResize::new(size, turn, self.side, self.fit));
    }

    fn take(&mut self, rows: &[u8]) {
        let started = Instant::now();
        if let Some(resize) = &mut self.resize {
            resize.take(rows);
        }
        self.took += started.elapsed();
    }
}

#[cfg(test)]
mod tests;
