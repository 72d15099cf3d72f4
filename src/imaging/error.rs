//! What can be wrong with an image, in words for the caller: the field, what was
//! found, and the limit's flag.

use std::time::Duration;

use thiserror::Error;

use super::ImageFormat;

/// The first tokens of an image that is generated, as callers know them.
pub(super) const PREFIX: &str = "prefix";

/// Why an image has no tokens. The caller can mend all of these but
/// [`Panicked`](Self::Panicked), which is a defect on this side.
#[derive(Debug, Error)]
pub enum PreprocessError {
    #[error("encoded: no bytes")]
    Empty,
    #[error("encoded: {bytes} bytes are over the limit of {bytes_max} (--image-bytes-max)")]
    BytesOverLimit { bytes: usize, bytes_max: usize },
    #[error("encoded: not an image in an accepted format (PNG, JPEG, WebP, GIF, BMP or TIFF)")]
    NotAnImage,
    #[error(
        "encoded: the {format} claims {width} x {height} = {} pixels, \
         over the limit of {pixels_max} (--image-pixels-max)",
        u64::from(*.width) * u64::from(*.height)
    )]
    EncodedPixelsOverLimit {
        format: ImageFormat,
        width: u32,
        height: u32,
        pixels_max: u64,
    },
    #[error(
        "encoded: decoding the {width} x {height} {format} takes up to {bytes} bytes, \
         over the limit of {bytes_max} (--decode-bytes-max)"
    )]
    DecodeOverLimit {
        format: ImageFormat,
        width: u32,
        height: u32,
        bytes: u64,
        bytes_max: u64,
    },
    #[error(
        "encoded: the strips or tiles of the {width} x {height} {format} hold {bytes} bytes \
         together, over the limit of {bytes_max} (--decode-bytes-max)"
    )]
    ChunksOverLimit {
        format: ImageFormat,
        width: u32,
        height: u32,
        bytes: u64,
        bytes_max: u64,
    },
    #[error(
        "encoded: the {scans} scans of the {format} go over {pixels} pixels together, over the \
         limit of {pixels_max}, {passes} times --image-pixels-max"
    )]
    ScansOverLimit {
        format: ImageFormat,
        scans: usize,
        pixels: u64,
        pixels_max: u64,
        passes: u64,
    },
    #[error("encoded: the {format} uses a feature that is not supported: {detail}")]
    Unsupported { format: ImageFormat, detail: String },
    #[error("encoded: the {format} is damaged or cut short: {detail}")]
    Damaged { format: ImageFormat, detail: String },
    #[error("encoded: the {format} decoder failed on these bytes; this is a defect of the worker")]
    Panicked { format: ImageFormat },
    /// Nobody reads this: the stage that ran the decode says why it was given up.
    #[error("encoded: decoding was given up, since nobody waits for the image any more")]
    Abandoned,
    #[error(
        "encoded: decoding took more than {} of CPU time (--decode-cpu-time-max)",
        humantime::format_duration(*.max)
    )]
    CpuTimeOverLimit { max: Duration },
    #[error("rgb8: {width} x {height} has no pixels; width and height must be at least 1")]
    Rgb8Empty { width: u32, height: u32 },
    #[error(
        "rgb8: {width} x {height} = {} pixels are over the limit of {pixels_max} \
         (--image-pixels-max)",
        u64::from(*.width) * u64::from(*.height)
    )]
    Rgb8PixelsOverLimit {
        width: u32,
        height: u32,
        pixels_max: u64,
    },
    #[error(
        "rgb8.pixels: {bytes} bytes where {width} x {height} x 3 needs {}",
        u128::from(*.width) * u128::from(*.height) * 3
    )]
    Rgb8Length {
        width: u32,
        height: u32,
        bytes: usize,
    },
    #[error("tokens.ids: {count} tokens where the model takes {expected}")]
    TokenCount { count: usize, expected: usize },
    #[error("prefix.ids: {count} tokens where an image has {max}")]
    PrefixLong { count: usize, max: usize },
    #[error(
        "{field}.ids: index {index} is {id}, the start token, which is not a color; {}",
        if *.field == PREFIX { "every image that is generated begins with it" }
        else { "the context SOS_SHIFTED adds it" }
    )]
    StartToken {
        field: &'static str,
        index: usize,
        id: u32,
    },
    #[error("{field}.ids: index {index} is {id}, outside the palette (0 to {id_max})")]
    TokenOutsidePalette {
        field: &'static str,
        index: usize,
        id: u32,
        id_max: usize,
    },
}
