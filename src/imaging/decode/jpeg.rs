//! Decoder of JPEG files: sequential and progressive, Huffman and arithmetic
//! codes, 8 bits, 1, 3 or 4 components in any sampling that libjpeg accepts.
//!
//! Promises the pixels of libjpeg-turbo as Pillow calls it, bit for bit, also
//! for files that libjpeg repairs silently: restart markers that are missing,
//! data that end before their marker, scans that are missing. What libjpeg or
//! Pillow refuse is refused. There are three differences: a file of one scan
//! that has all its pixels but no end marker is accepted (Pillow accepts some
//! of these files, by the number of bits that are left), arithmetic codes may
//! be longer than the 64 KiB that Pillow hands over at once, and coding without
//! loss is refused by name. Limits of the work are refused too: see
//! [`PASSES_MAX`] here, and [`segments`] for tables and scans.
//!
//! Parts: [`source`] reads bytes, bits and markers, [`segments`] what stands
//! between scans, [`scan`] with [`huffman`] and [`arithmetic`] the coefficients.
//! [`idct`] turns a block into samples, [`planes`] with [`upsample`] and
//! [`color`] samples into pixels. A file of one scan goes through all of it row
//! by row; the coefficients of several scans are gathered first
//! ([`coefficients`]), and estimated if they are missing ([`smooth`]).
//!
//! Memory: ten rows of samples for each row of blocks, the rows of pixels that
//! are made of them, and for several scans 2 bytes per coefficient, padded to
//! whole units of the largest sampling.
//!
//! Work: each scan goes over the blocks of its components, whatever the number
//! of its bytes. The sum over all scans is limited to [`PASSES_MAX`] times the
//! pixels that an image may have. After the scans, each block is transformed
//! once.

use self::coefficients::Coefficients;
use self::color::JpegColors;
use self::frame::JpegFrame;
use self::huffman::JpegBlock;
use self::planes::GrowingPicture;
use self::scan::{BlockPlace, BlockSink, ScanDecoder};
use self::segments::{JpegScan, JpegSegments, NextPart};
use self::smooth::Smoothing;
use self::source::JpegSource;
use super::{Header, PreprocessError, RowSink, orientation};

mod arithmetic;
mod coefficients;
mod color;
mod frame;
mod huffman;
mod idct;
mod planes;
mod scan;
mod segments;
mod smooth;
mod source;
mod standard;
mod upsample;

/// Most passes of a file's scans over the pixels of the largest image that is
/// accepted, each component counted for itself. A progressive file of libjpeg's
/// goes over its own pixels 14 times in color, 24 times in CMYK.
const PASSES_MAX: u64 = 32;

/// Detail of the error of a file that ends too early.
const CUT: &str = "no end-of-image marker";

/// Detail of the error of a file without a picture.
const EMPTY: &str = "no frame header or no scan";

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
    sink: &mut dyn RowSink,
) -> Result<(), PreprocessError> {
    let mut decoder = JpegDecoder::new(bytes, header);
    let scan = decoder.read_header()?;
    let frame = decoder.frame()?;
    let (width, height) = (frame.width, frame.height);
    let colors = JpegColors::guess(frame, decoder.segments.markers);
    let bytes = decoder.held_bytes(&scan)?;
    header.admit(width, height, 0, bytes)?;
    let segments = &decoder.segments;
    // Pillow knows no segments behind the first scan.
    let orientation = orientation(segments.exif.as_deref(), segments.xmp);
    sink.begin(width, height, orientation.into());
    let mut colored = Vec::new();
    decoder.decode(scan, colors, &mut |rows| {
        if colors == JpegColors::Gray {
            colored.clear();
            colored.extend(rows.iter().flat_map(|gray| [*gray; 3]));
            sink.take(&colored);
        } else {
            sink.take(rows);
        }
    })
}

/// Requirements on a JPEG inside another file, and the work and memory that the
/// file took so far.
pub(super) struct Inside {
    pub(super) width: u32,
    /// Rows that are needed, and rows of a whole strip or tile. The JPEG must
    /// have one of these two heights.
    pub(super) rows: (u32, u32),
    pub(super) components: usize,
    /// True if the components are luma and chroma, of which RGB is made.
    pub(super) luma_and_chroma: bool,
    /// Pixels that the scans of all JPEGs of the file went over so far.
    pub(super) scanned: u64,
    /// Bytes that the file's decoder holds.
    pub(super) held_bytes: u64,
}

/// Decodes a JPEG inside a TIFF, which gives the components their meaning: to
/// RGB, or to samples as stored.
pub(super) fn decode_samples(
    bytes: &[u8],
    inside: &mut Inside,
    header: Header<'_>,
) -> Result<Vec<u8>, PreprocessError> {
    let mut decoder = JpegDecoder::new(bytes, header);
    decoder.scanned = inside.scanned;
    let scan = decoder.read_header()?;
    let frame = decoder.frame()?;
    let (width, height) = (frame.width, frame.height);
    let count = frame.components.len();
    let fits = width == inside.width
        && [inside.rows.0, inside.rows.1].contains(&height)
        && count == inside.components;
    if !fits {
        return Err(header.damaged(format!(
            "a JPEG of {width} x {height} and {count} components in a strip or tile of {} x {} and \
             {} components",
            inside.width, inside.rows.1, inside.components
        )));
    }
    let held = inside.held_bytes + decoder.held_bytes(&scan)?;
    header.admit(width, height, inside.components as u64, held)?;
    let colors = if inside.luma_and_chroma {
        JpegColors::YCbCr
    } else {
        JpegColors::Stored(count)
    };
    let mut samples = Vec::with_capacity(width as usize * height as usize * count);
    decoder.decode(scan, colors, &mut |rows| samples.extend_from_slice(rows))?;
    inside.scanned = decoder.scanned;
    Ok(samples)
}

/// Decoder of one file.
struct JpegDecoder<'a> {
    source: JpegSource<'a>,
    segments: JpegSegments<'a>,
    header: Header<'a>,
    /// Factors of each component: those of its first scan. Components without a
    /// scan have none, and are gray.
    quantization: Vec<Option<JpegBlock>>,
    scans: usize,
    /// Pixels that the scans went over, each component counted for itself.
    scanned: u64,
}

impl<'a> JpegDecoder<'a> {
    fn new(bytes: &'a [u8], header: Header<'a>) -> Self {
        Self {
            source: JpegSource::new(bytes),
            segments: JpegSegments::new(),
            header,
            quantization: Vec::new(),
            scans: 0,
            scanned: 0,
        }
    }

    /// Reads the file up to its first scan.
    fn read_header(&mut self) -> Result<JpegScan, PreprocessError> {
        match self.segments.read(&mut self.source, self.header)? {
            NextPart::Scan(scan) => {
                self.quantization = vec![None; self.frame()?.components.len()];
                Ok(scan)
            }
            NextPart::EndOfImage | NextPart::EndOfFile => Err(self.header.damaged(EMPTY)),
        }
    }

    fn frame(&self) -> Result<&JpegFrame, PreprocessError> {
        let frame = self.segments.frame.as_ref();
        frame.ok_or_else(|| self.header.damaged(EMPTY))
    }

    /// Returns the bytes that are held beside the pixels.
    fn held_bytes(&self, scan: &JpegScan) -> Result<u64, PreprocessError> {
        /// Tables of codes and estimates, with room to spare.
        const TABLES: u64 = 64 << 10;
        const COEFFICIENT: u64 = 2;
        /// Rows of samples of a row of blocks, with those that are kept.
        const ROWS: u64 = 10;
        let frame = self.frame()?;
        let coefficients = if scan.is_whole(frame) {
            0
        } else {
            frame.padded_pixels() * COEFFICIENT
        };
        let rows: u64 = frame
            .components
            .iter()
            .map(|component| {
                let (across, v) = (component.padded.0, component.sampling.1);
                u64::from(across) * 8 * u64::from(v) * ROWS + u64::from(frame.width) + 8
            })
            .sum();
        // The pixels of the row groups that a row of units ends, and their colors
        // if they are gray.
        let made = u64::from(frame.width) * 4 * 9 * u64::from(frame.sampling.1);
        let metadata = self.segments.exif.as_ref().map_or(0, Vec::capacity) as u64;
        Ok(coefficients + rows + made + metadata + TABLES)
    }

    /// Decodes the scans, from the first on, and emits the rows of pixels.
    fn decode(
        &mut self,
        scan: JpegScan,
        colors: JpegColors,
        emit: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PreprocessError> {
        if scan.is_whole(self.frame()?) {
            self.decode_single(&scan, colors, emit)?;
            // libjpeg reads on to the end marker, if there is one.
            return match self.segments.read(&mut self.source, self.header)? {
                NextPart::Scan(_) => Err(self.header.damaged("a scan behind the last one")),
                NextPart::EndOfImage | NextPart::EndOfFile => Ok(()),
            };
        }
        let coefficients = self.gather(scan)?;
        self.transform(&coefficients, colors, emit)
    }

    /// Prepares for a scan.
    fn begin_scan(&mut self, scan: &JpegScan) -> Result<ScanDecoder, PreprocessError> {
        let header = self.header;
        let frame = self.segments.frame.as_ref();
        let frame = frame.ok_or_else(|| header.damaged(EMPTY))?;
        self.scans += 1;
        for component in &scan.components {
            let (index, component) = (component.index, &frame.components[component.index]);
            self.scanned = self.scanned.saturating_add(component.pixels());
            if self.quantization[index].is_none() {
                let tables = &self.segments.tables.quantization;
                let table = tables.get(usize::from(component.table)).copied().flatten();
                let missing = || header.damaged("a component without a quantization table");
                self.quantization[index] = Some(table.ok_or_else(missing)?);
            }
        }
        let pixels_max = header.limits.image_pixels_max.saturating_mul(PASSES_MAX);
        if self.scanned > pixels_max {
            return Err(PreprocessError::ScansOverLimit {
                format: header.format,
                scans: self.scans,
                pixels: self.scanned,
                pixels_max,
                passes: PASSES_MAX,
            });
        }
        self.source.begin_scan();
        ScanDecoder::new(scan, frame, &self.segments.tables, header)
    }

    /// Decodes a file whose only scan has all components, row by row.
    fn decode_single(
        &mut self,
        scan: &JpegScan,
        colors: JpegColors,
        emit: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PreprocessError> {
        let mut decoder = self.begin_scan(scan)?;
        let header = self.header;
        let frame = self.segments.frame.as_ref();
        let frame = frame.ok_or_else(|| header.damaged(EMPTY))?;
        let factors: Vec<JpegBlock> = self.factors();
        let mut picture = GrowingPicture::new(frame, colors);
        for unit_row in 0..frame.unit_rows() {
            header.budget.check()?;
            let mut sink = SampleSink {
                frame,
                picture: &mut picture,
                factors: &factors,
                unit_row,
            };
            for row in decoder.rows(unit_row, frame) {
                decoder.row(row, frame, &mut self.source, &mut sink, header)?;
            }
            emit(picture.end_unit_row(unit_row));
        }
        Ok(())
    }

    /// Returns the factors of each component.
    fn factors(&self) -> Vec<JpegBlock> {
        let tables = self.quantization.iter();
        tables.map(|table| table.unwrap_or([0; 64])).collect()
    }

    /// Gathers the coefficients of all scans.
    fn gather(&mut self, first: JpegScan) -> Result<Coefficients, PreprocessError> {
        let header = self.header;
        let mut coefficients = Coefficients::new(self.frame()?);
        let mut scan = first;
        loop {
            let mut decoder = self.begin_scan(&scan)?;
            coefficients.begin_scan(&scan);
            let frame = self.segments.frame.as_ref();
            let frame = frame.ok_or_else(|| header.damaged(EMPTY))?;
            for unit_row in 0..frame.unit_rows() {
                header.budget.check()?;
                for row in decoder.rows(unit_row, frame) {
                    if decoder.row(row, frame, &mut self.source, &mut coefficients, header)? {
                        coefficients.last_good_row = unit_row;
                    }
                }
            }
            match self.segments.read(&mut self.source, header)? {
                NextPart::Scan(next) => scan = next,
                NextPart::EndOfImage => return Ok(coefficients),
                NextPart::EndOfFile => return Err(header.damaged(CUT)),
            }
        }
    }

    /// Turns coefficients into pixels.
    fn transform(
        &self,
        coefficients: &Coefficients,
        colors: JpegColors,
        emit: &mut dyn FnMut(&[u8]),
    ) -> Result<(), PreprocessError> {
        let frame = self.frame()?;
        let factors = self.factors();
        let smooth = smooth::is_useful(coefficients, &self.quantization, frame);
        let mut picture = GrowingPicture::new(frame, colors);
        for unit_row in 0..frame.unit_rows() {
            self.header.budget.check()?;
            for (index, (component, factors)) in frame.components.iter().zip(&factors).enumerate() {
                let smoothing = smooth.then(|| Smoothing::new(coefficients, index, factors, frame));
                let v = component.sampling.1;
                for y in 0..v.min(component.blocks.1 - unit_row * v) {
                    let row = unit_row * v + y;
                    for column in 0..component.blocks.0 {
                        let (samples, stride) = picture.block(index, column, y);
                        if let Some(smoothing) = &smoothing {
                            idct::transform(
                                &smoothing.block(column, row),
                                factors,
                                samples,
                                stride,
                            );
                        } else {
                            let block = coefficients.components[index].get(column, row);
                            transform(block, factors, samples, stride);
                        }
                    }
                }
            }
            emit(picture.end_unit_row(unit_row));
        }
        Ok(())
    }
}

impl JpegScan {
    /// Returns true if the scan is all that the frame has.
    fn is_whole(&self, frame: &JpegFrame) -> bool {
        !frame.coding.progressive && self.components.len() == frame.components.len()
    }
}

/// Sink that turns blocks into samples at once.
struct SampleSink<'a> {
    frame: &'a JpegFrame,
    picture: &'a mut GrowingPicture,
    factors: &'a [JpegBlock],
    unit_row: u32,
}

impl BlockSink for SampleSink<'_> {
    #[inline]
    fn block(&mut self, component: usize, place: BlockPlace, decode: impl FnOnce(&mut JpegBlock)) {
        let mut block = [0; 64];
        decode(&mut block);
        let vertical = self.frame.components[component].sampling.1;
        let row = place.row - self.unit_row * vertical;
        let (samples, stride) = self.picture.block(component, place.column, row);
        transform(&block, &self.factors[component], samples, stride);
    }
}

/// Transforms a block by the quickest way.
#[inline]
fn transform(block: &JpegBlock, factors: &JpegBlock, samples: &mut [u8], stride: usize) {
    if block[1..].iter().fold(0, |all, value| all | value) == 0 {
        idct::transform_first(block[0], factors[0], samples, stride);
    } else {
        idct::transform(block, factors, samples, stride);
    }
}
