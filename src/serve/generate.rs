//! Request for an image that is generated.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::sample::Sampling;

/// Part of a primer image that is kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeptPixels {
    /// All given pixels, which may be less than an image.
    All,
    /// Number of rows to keep from the top.
    Rows(u32),
    /// The pixels that are true, in raster order.
    Mask(Arc<[bool]>),
}

/// Request for one sample.
#[derive(Debug, Clone)]
pub(crate) struct GenerateRequest {
    pub keep: KeptPixels,
    pub sampling: Sampling,
    /// Index of the sample in its call, counted from 0; each sample draws its
    /// own random numbers.
    pub sample: u32,
    /// Channel for finished rows. It has room for all rows, so that a caller
    /// who does not read holds up nobody.
    pub rows: Option<mpsc::Sender<GeneratedRow>>,
}

/// Finished row of a sample.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GeneratedRow {
    pub sample: u32,
    pub row: u32,
    pub tokens: Box<[u16]>,
}
