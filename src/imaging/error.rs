//! Errors of one image, worded for the caller: the field, the value that was
//! found, and the limit with its flag.

use std::time::Duration;

use thiserror::Error;

use super::ImageFormat;

/// Name under which callers know the first tokens of an image that is
/// generated.
pub(super) const PREFIX: &str = "prefix";

/// Reason why an image has no tokens. The caller can correct every cause but
/// [`Panicked`](Self::Panicked), which is a defect of the worker.
#[derive(Debug, Error)]
pub enum PreprocessError {
    #[error("encoded: the image file is empty (0 bytes)")]
    Empty,
    #[error(
        "encoded: the file has {bytes} bytes, over the limit of {bytes_max} (--image-bytes-max)"
    )]
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
        "encoded: the first {scans} scans of the {format} cover {pixels} pixels in total, over the \
         limit of {pixels_max} ({passes} times --image-pixels-max)"
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
    /// Error of a cancelled decode. No caller reads its text: the stage that
    /// ran the decode reports why the decode was cancelled.
    #[error("encoded: decoding was cancelled, because no caller waits for the image any longer")]
    Abandoned,
    #[error(
        "encoded: decoding took more CPU time than the limit of {} (--decode-cpu-time-max)",
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
        "rgb8.pixels: the field has {bytes} bytes; {width} x {height} pixels of 3 bytes need {}",
        u128::from(*.width) * u128::from(*.height) * 3
    )]
    Rgb8Length {
        width: u32,
        height: u32,
        bytes: usize,
    },
    #[error("tokens.ids: the image has {count} tokens; the model needs exactly {expected}")]
    TokenCount { count: usize, expected: usize },
    #[error("prefix.ids: the prefix has {count} tokens; the limit is {max}, a whole image")]
    PrefixLong { count: usize, max: usize },
    #[error(
        "{field}.ids: index {index} is {id}, the start token, which is not a color; leave it out, \
         since {}",
        if *.field == PREFIX { "every generated image begins with it" }
        else { "the context SOS_SHIFTED adds it" }
    )]
    StartToken {
        field: &'static str,
        index: usize,
        id: u32,
    },
    #[error(
        "{field}.ids: index {index} is {id}, outside the palette (color ids are 0 to {id_max})"
    )]
    TokenOutsidePalette {
        field: &'static str,
        index: usize,
        id: u32,
        id_max: usize,
    },
}
