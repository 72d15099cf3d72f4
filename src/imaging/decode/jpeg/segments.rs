//! Reads the segments between scans: tables, the frame, metadata, and the
//! headers of scans.

use super::super::{Header, PreprocessError};
use super::CUT;
use super::arithmetic::Conditioning;
use super::frame::{JpegCoding, JpegFrame};
use super::huffman::{HuffmanCode, JpegBlock, NATURAL_ORDER};
use super::source::JpegSource;
use super::standard;

/// Most scans of a file. Encoders of progressive files use about 10.
pub(super) const SCANS_MAX: usize = 100;

/// Most segments with tables. An encoder writes at most a few per scan;
/// building a table takes as long as some thousand bytes of pixels.
const TABLES_MAX: usize = 1024;

/// Most units of samples that a scan interleaves.
const UNIT_BLOCKS_MAX: u32 = 10;

/// Everything that the segments of a file have said so far.
pub(super) struct JpegSegments<'a> {
    pub(super) frame: Option<JpegFrame>,
    pub(super) tables: JpegTables,
    pub(super) markers: ColorMarkers,
    /// EXIF data: of all its segments, as Pillow puts them together.
    pub(super) exif: Option<Vec<u8>>,
    /// Last XMP data.
    pub(super) xmp: Option<&'a [u8]>,
    scans: usize,
    n_tables: usize,
}

/// Tables that scans use.
#[derive(Default)]
pub(super) struct JpegTables {
    /// Factors, row by row.
    pub(super) quantization: [Option<JpegBlock>; 4],
    /// Huffman codes of first coefficients and of the others.
    pub(super) first: [Option<HuffmanCode>; 4],
    pub(super) others: [Option<HuffmanCode>; 4],
    pub(super) conditioning: [Conditioning; 16],
    /// Units between two restart markers, or 0.
    pub(super) restart_interval: u16,
}

/// Markers that tell the meaning of components.
#[derive(Clone, Copy, Default)]
pub(super) struct ColorMarkers {
    pub(super) jfif: bool,
    /// Transform that Adobe's marker names.
    pub(super) adobe: Option<u8>,
}

/// Contents of a scan header.
pub(super) struct JpegScan {
    pub(super) components: Vec<ScanComponent>,
    pub(super) first: u8,
    pub(super) last: u8,
    pub(super) high: u8,
    pub(super) low: u8,
}

/// Component of a scan: its index in the frame, and its tables.
#[derive(Clone, Copy)]
pub(super) struct ScanComponent {
    pub(super) index: usize,
    pub(super) first_table: u8,
    pub(super) other_table: u8,
}

/// Next part of a file.
pub(super) enum NextPart {
    Scan(JpegScan),
    /// The end-of-image marker.
    EndOfImage,
    /// The end of the file.
    EndOfFile,
}

impl<'a> JpegSegments<'a> {
    pub(super) fn new() -> Self {
        Self {
            frame: None,
            tables: JpegTables::default(),
            markers: ColorMarkers::default(),
            exif: None,
            xmp: None,
            scans: 0,
            n_tables: 0,
        }
    }

    /// Reads segments up to the next scan or the end.
    pub(super) fn read(
        &mut self,
        source: &mut JpegSource<'a>,
        header: Header<'_>,
    ) -> Result<NextPart, PreprocessError> {
        loop {
            header.budget.check()?;
            let Some(kind) = source.marker.or_else(|| source.next_marker()) else {
                return Ok(NextPart::EndOfFile);
            };
            source.marker = None;
            match kind {
                0xd9 => return Ok(NextPart::EndOfImage),
                // Markers without a body that have no meaning here.
                0x01 | 0xd0..=0xd7 => continue,
                0xd8 => return Err(header.damaged("two start-of-image markers")),
                0xc3 | 0xcb => return Err(header.unsupported("lossless coding")),
                0xc5..=0xc8 | 0xcd..=0xcf | 0xde | 0xdf => {
                    return Err(header.unsupported("hierarchical coding"));
                }
                0xc0..=0xcc | 0xda..=0xdd | 0xe0..=0xef | 0xfe => {}
                _ => return Err(header.unsupported(format!("a marker of kind {kind:#x}"))),
            }
            let is_metadata = matches!(kind, 0xdc | 0xe0..);
            let Some((len, body)) = source.segment() else {
                return if is_metadata {
                    Ok(NextPart::EndOfFile)
                } else {
                    Err(header.damaged(CUT))
                };
            };
            // Metadata of such a length are nothing, as in libjpeg.
            if len < 2 && !is_metadata {
                return Err(header.damaged(format!(
                    "a segment of {len} bytes, less than its length field of 2"
                )));
            }
            if kind == 0xda {
                return self.scan(body, header).map(NextPart::Scan);
            }
            self.segment(kind, body, header)?;
        }
    }

    fn segment(
        &mut self,
        kind: u8,
        body: &'a [u8],
        header: Header<'_>,
    ) -> Result<(), PreprocessError> {
        if matches!(kind, 0xc4 | 0xcc | 0xdb | 0xdd) {
            self.n_tables += 1;
            if self.n_tables > TABLES_MAX {
                return Err(
                    header.unsupported(format!("more than {TABLES_MAX} segments with tables"))
                );
            }
        }
        let table = |done: Option<()>, name: &str| {
            done.ok_or_else(|| header.damaged(format!("an invalid table of {name}")))
        };
        match kind {
            0xc4 => table(self.tables.read_codes(body), "Huffman codes"),
            0xcc => table(
                self.tables.read_conditioning(body),
                "arithmetic conditioning",
            ),
            0xdb => table(self.tables.read_quantization(body), "quantization"),
            0xdd => {
                let interval = <[u8; 2]>::try_from(body)
                    .map_err(|_| header.damaged("a restart interval of another length"))?;
                self.tables.restart_interval = u16::from_be_bytes(interval);
                Ok(())
            }
            0xc0..=0xc2 | 0xc9 | 0xca => {
                if self.frame.is_some() {
                    return Err(header.damaged("two frame headers"));
                }
                let coding = JpegCoding {
                    progressive: matches!(kind, 0xc2 | 0xca),
                    arithmetic: kind >= 0xc9,
                };
                self.frame = Some(JpegFrame::read(coding, body, header)?);
                Ok(())
            }
            // What follows the first scan says nothing about the whole picture.
            _ if self.scans == 0 => {
                self.metadata(kind, body);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    fn metadata(&mut self, kind: u8, body: &'a [u8]) {
        match kind {
            0xe0 => self.markers.jfif |= body.starts_with(b"JFIF\0") && body.len() >= 14,
            0xe1 => {
                if body.starts_with(b"Exif\0\0") {
                    match &mut self.exif {
                        Some(exif) => exif.extend_from_slice(&body[6..]),
                        None => self.exif = Some(body.to_vec()),
                    }
                } else if let Some(xmp) = body.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
                    self.xmp = Some(xmp);
                }
            }
            0xee if body.starts_with(b"Adobe") => {
                if let Some(transform) = body.get(11) {
                    self.markers.adobe = Some(*transform);
                }
            }
            _ => {}
        }
    }

    fn scan(&mut self, body: &[u8], header: Header<'_>) -> Result<JpegScan, PreprocessError> {
        let Some(frame) = &self.frame else {
            return Err(header.damaged("a scan before the frame header"));
        };
        if self.scans == SCANS_MAX {
            return Err(header.unsupported(format!("more than {SCANS_MAX} scans")));
        }
        let scan = JpegScan::read(body, frame)
            .ok_or_else(|| header.damaged("a scan header that contradicts its frame"))?;
        if self.scans == 0 && !frame.coding.arithmetic && !frame.coding.progressive {
            // Motion JPEG leaves these codes out.
            self.tables.add_standard_codes();
        }
        self.scans += 1;
        Ok(scan)
    }
}

impl JpegScan {
    fn read(body: &[u8], frame: &JpegFrame) -> Option<Self> {
        let (&count, body) = body.split_first()?;
        let (pairs, rest) = body.split_at_checked(2 * usize::from(count))?;
        let &[first, last, bits] = <&[u8; 3]>::try_from(rest).ok()?;
        if !(1..=4).contains(&count) {
            return None;
        }
        let mut components: Vec<ScanComponent> = Vec::with_capacity(4);
        let (pairs, _) = pairs.as_chunks::<2>();
        for &[id, tables] in pairs {
            // As in libjpeg, the components of a scan come in the order of the
            // frame, which also tells components of the same id apart.
            let (index, _) = frame
                .components
                .iter()
                .enumerate()
                .skip(components.len())
                .find(|(_, component)| component.id == id)?;
            if components.iter().any(|component| component.index == index) {
                return None;
            }
            components.push(ScanComponent {
                index,
                first_table: tables >> 4,
                other_table: tables & 15,
            });
        }
        let unit: u32 = components
            .iter()
            .map(|component| frame.components[component.index].sampling)
            .map(|(h, v)| h * v)
            .sum();
        if components.len() > 1 && unit > UNIT_BLOCKS_MAX {
            return None;
        }
        Some(Self {
            components,
            first,
            last,
            high: bits >> 4,
            low: bits & 15,
        })
    }
}

impl JpegTables {
    /// Reads Huffman codes. Returns `None` if they are not valid.
    fn read_codes(&mut self, mut body: &[u8]) -> Option<()> {
        // As in libjpeg, what is too short for a code must be nothing.
        while body.len() >= 17 {
            let (head, rest) = body.split_first_chunk::<17>()?;
            let [kind, counts @ ..] = *head;
            let count = counts.iter().map(|&count| usize::from(count)).sum();
            let (values, rest) = rest.split_at_checked(count)?;
            let mut symbols = [0; 256];
            symbols.get_mut(..count)?.copy_from_slice(values);
            let codes = if kind & 0x10 == 0 {
                &mut self.first
            } else {
                &mut self.others
            };
            let place = codes.get_mut(usize::from(kind & !0x10))?;
            *place = Some(HuffmanCode { counts, symbols });
            body = rest;
        }
        body.is_empty().then_some(())
    }

    fn add_standard_codes(&mut self) {
        for (table, counts, symbols) in standard::FIRST {
            self.first[table].get_or_insert_with(|| standard::code(counts, symbols));
        }
        for (table, counts, symbols) in standard::OTHERS {
            self.others[table].get_or_insert_with(|| standard::code(counts, symbols));
        }
    }

    fn read_conditioning(&mut self, body: &[u8]) -> Option<()> {
        let (pairs, rest) = body.as_chunks::<2>();
        for &[table, value] in pairs {
            let conditioning = &mut self.conditioning[usize::from(table & 15)];
            if table >= 32 {
                return None;
            }
            if table < 16 {
                (conditioning.small, conditioning.large) = (value & 15, value >> 4);
                if conditioning.small > conditioning.large {
                    return None;
                }
            } else {
                conditioning.low = value;
            }
        }
        rest.is_empty().then_some(())
    }

    fn read_quantization(&mut self, mut body: &[u8]) -> Option<()> {
        while let Some((&kind, rest)) = body.split_first() {
            let place = self.quantization.get_mut(usize::from(kind & 15))?;
            let width = if kind >> 4 == 0 { 1 } else { 2 };
            let (values, rest) = rest.split_at_checked(64 * width)?;
            let mut table = [0; 64];
            for (value, at) in values.chunks_exact(width).zip(NATURAL_ORDER) {
                let value = match *value {
                    [high, low] => [high, low],
                    [low] => [0, low],
                    _ => return None,
                };
                table[usize::from(at)] = i16::from_be_bytes(value);
            }
            *place = Some(table);
            body = rest;
        }
        Some(())
    }
}
