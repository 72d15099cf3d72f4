//! A caller's request for an image that is generated.

use std::sync::Arc;

use tokio::sync::mpsc;

use super::sample::Sampling;

/// What a caller keeps of a primer image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum KeptPixels {
    /// All that was given, which may be less than an image.
    All,
    /// So many rows from the top.
    Rows(u32),
    /// The pixels that are true, in raster order.
    Mask(Arc<[bool]>),
}

/// What is wanted of one sample.
#[derive(Debug, Clone)]
pub(crate) struct GenerateRequest {
    pub keep: KeptPixels,
    pub sampling: Sampling,
    /// Which sample of its call, counted from 0; each draws numbers of its own.
    pub sample: u32,
    /// Where rows go as they are done. It has room for all of them, so that a
    /// caller who does not read holds up nobody.
    pub rows: Option<mpsc::Sender<GeneratedRow>>,
}

/// A row of a sample that is done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct GeneratedRow {
    pub sample: u32,
    pub row: u32,
    pub tokens: Box<[u16]>,
}
