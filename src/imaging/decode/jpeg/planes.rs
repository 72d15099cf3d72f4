//! The samples of a JPEG on their way to pixels: a few rows of each component,
//! which are enlarged and converted.

use super::color::JpegColors;
use super::frame::JpegFrame;
use super::upsample::{Enlarging, SampleRows};

/// Picture that grows from top to bottom.
pub(super) struct GrowingPicture {
    planes: Vec<Plane>,
    colors: JpegColors,
    width: u32,
    height: u32,
    /// Rows of pixels for one row group, the rows of samples of components
    /// that are sampled vertically once.
    group_height: u32,
    groups: u32,
    /// Row groups that are pixels already.
    groups_done: u32,
    /// True if a row group needs the samples below it.
    needs_below: bool,
    /// Enlarged rows, one per component.
    rows: Vec<Vec<u8>>,
    /// Rows of pixels of the last row of units.
    pixels: Vec<u8>,
}

/// Rows of samples of a component: the last two row groups of the row of units
/// before, and the current row of units.
pub(super) struct Plane {
    pub(super) stride: usize,
    vertical: u32,
    size: (u32, u32),
    enlarging: Enlarging,
    samples: Vec<u8>,
}

/// Rows that are kept of the row of units before, for each vertical sampling
/// factor.
const KEPT_ROWS: u32 = 2;

impl GrowingPicture {
    pub(super) fn new(frame: &JpegFrame, colors: JpegColors) -> Self {
        let planes: Vec<Plane> = frame
            .components
            .iter()
            .map(|component| {
                let stride = component.padded.0 as usize * 8;
                let vertical = component.sampling.1;
                Plane {
                    stride,
                    vertical,
                    size: component.size,
                    enlarging: Enlarging::new(component, frame.sampling),
                    samples: vec![0; stride * ((KEPT_ROWS + 8) * vertical) as usize],
                }
            })
            .collect();
        // Enlarged rows may be a few samples longer than the picture is wide.
        let row_len = frame.width as usize + 8;
        Self {
            colors,
            width: frame.width,
            height: frame.height,
            group_height: frame.sampling.1,
            groups: frame.height.div_ceil(frame.sampling.1),
            groups_done: 0,
            needs_below: planes.iter().any(|plane| plane.enlarging.needs_below()),
            rows: vec![vec![0; row_len]; planes.len()],
            planes,
            pixels: Vec::new(),
        }
    }

    /// Returns the samples of the block at a column and row of the current row
    /// of units, with the distance between their rows.
    #[inline]
    pub(super) fn block(&mut self, component: usize, column: u32, row: u32) -> (&mut [u8], usize) {
        let plane = &mut self.planes[component];
        let start = (KEPT_ROWS * plane.vertical + row * 8) as usize * plane.stride;
        let at = start + column as usize * 8;
        (&mut plane.samples[at..], plane.stride)
    }

    /// Turns the samples of a row of units into pixels, but for those rows that
    /// need the samples below, and returns the rows of pixels.
    pub(super) fn end_unit_row(&mut self, unit_row: u32) -> &[u8] {
        let behind = (unit_row + 1) * 8;
        let last = behind >= self.groups;
        let end = if last {
            self.groups
        } else {
            behind - u32::from(self.needs_below)
        };
        let first = self.groups_done * self.group_height;
        let rows = self.height.min(end * self.group_height) - first;
        self.pixels.resize(
            rows as usize * self.width as usize * self.colors.channels(),
            0,
        );
        for row in 0..rows {
            let (group, step) = (row / self.group_height, row % self.group_height);
            self.make_row(unit_row, self.groups_done + group, step, row);
        }
        self.groups_done = end;
        for plane in &mut self.planes {
            let kept = (KEPT_ROWS * plane.vertical) as usize * plane.stride;
            let start = plane.samples.len() - kept;
            plane.samples.copy_within(start.., 0);
        }
        &self.pixels
    }

    /// Makes a row of pixels of a row group.
    fn make_row(&mut self, unit_row: u32, group: u32, step: u32, row: u32) {
        let width = self.width as usize;
        let mut views: [&[u8]; 4] = [&[]; 4];
        for ((view, plane), room) in views.iter_mut().zip(&self.planes).zip(&mut self.rows) {
            let first =
                i64::from(unit_row * 8 * plane.vertical) - i64::from(KEPT_ROWS * plane.vertical);
            let rows = SampleRows {
                samples: &plane.samples,
                stride: plane.stride,
                first,
                size: plane.size,
            };
            *view = plane
                .enlarging
                .row(&rows, group * plane.vertical, step, width, room);
        }
        let channels = self.colors.channels();
        let start = row as usize * width * channels;
        let target = &mut self.pixels[start..start + width * channels];
        self.colors
            .convert(views.map(|view| view.get(..width).unwrap_or(&[])), target);
    }
}
