//! Reads the segments of a JPEG, without its pixels: the contents of its frame
//! and scan headers, and a copy of the parts that the decoder needs.

use super::super::{Header, PreprocessError};

/// Most scans of a file. Encoders of progressive files use about 10.
pub(super) const SCANS_MAX: usize = 100;

/// Most segments with tables. An encoder writes at most a few per scan;
/// building a table takes as long as some thousand bytes of pixels.
const TABLES_MAX: usize = 1024;

/// Number of coefficients, in the order of the file, that libjpeg guesses if a
/// progressive file leaves them out.
const SMOOTHED: usize = 10;

/// Contents of a file's segments.
#[derive(Debug)]
pub(super) struct Outline<'a> {
    pub(super) frame: JpegFrame,
    pub(super) scans: Vec<JpegScan>,
    /// Tables, frame and scans up to the end of the image, for the decoder.
    pub(super) stream: Vec<u8>,
    /// First EXIF data of the file.
    pub(super) exif: Option<&'a [u8]>,
    /// First XMP data of the file.
    pub(super) xmp: Option<&'a [u8]>,
}

/// Contents of the frame header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct JpegFrame {
    pub(super) progressive: bool,
    pub(super) width: u16,
    pub(super) height: u16,
    pub(super) components: Vec<Component>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Component {
    id: u8,
    horizontal: u8,
    vertical: u8,
}

/// Contents of a scan header.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct JpegScan {
    /// Position in [`Outline::stream`] at which the scan begins.
    pub(super) at: usize,
    /// Indexes of the scan's components in the frame.
    components: Vec<usize>,
    /// First and last coefficient of the scan.
    band: (u8, u8),
    /// Lowest bit of the coefficients that the scan gives.
    bit: u8,
}

impl<'a> Outline<'a> {
    /// Reads a file up to its end-of-image marker. A file without the marker is
    /// refused, as by Pillow, which calls it truncated.
    pub(super) fn read(bytes: &'a [u8], header: Header<'_>) -> Result<Self, PreprocessError> {
        let mut reader = Reader {
            frame: None,
            scans: Vec::new(),
            tables: 0,
            stream: b"\xff\xd8".to_vec(),
            exif: None,
            xmp: None,
        };
        reader.stream.reserve_exact(bytes.len());
        let cut = || header.damaged("no end-of-image marker");
        let mut rest = bytes.get(2..).ok_or_else(cut)?;
        loop {
            let start = marker(rest).ok_or_else(cut)?;
            let (kind, after) = rest[start..].split_first().ok_or_else(cut)?;
            rest = after;
            match kind {
                0xd9 => break,
                // Markers without a body that have no meaning here.
                0x01 | 0xd0..=0xd8 => continue,
                _ => {}
            }
            let (len, _) = rest.split_first_chunk::<2>().ok_or_else(cut)?;
            let len = usize::from(u16::from_be_bytes(*len));
            if len < 2 {
                return Err(header.damaged(format!(
                    "a segment of {len} bytes, less than its length field of 2"
                )));
            }
            let (segment, after) = rest.split_at_checked(len).ok_or_else(cut)?;
            rest = after;
            reader.segment(*kind, segment, header)?;
            if *kind == 0xda {
                let (data, after) = rest.split_at(scan_len(rest));
                reader.stream.extend_from_slice(data);
                rest = after;
            }
        }
        reader.stream.extend_from_slice(b"\xff\xd9");
        let (Some(frame), false) = (reader.frame, reader.scans.is_empty()) else {
            return Err(header.damaged("no frame header or no scan"));
        };
        Ok(Self {
            frame,
            scans: reader.scans,
            stream: reader.stream,
            exif: reader.exif,
            xmp: reader.xmp,
        })
    }

    /// Returns the pixels that all scans go over, each component counted for
    /// itself.
    pub(super) fn scanned(&self) -> u64 {
        self.scans
            .iter()
            .flat_map(|scan| &scan.components)
            .map(|&index| self.frame.component_pixels(index))
            .sum()
    }

    /// Refuses files that the decoder would get wrong.
    pub(super) fn check(&self, header: Header<'_>) -> Result<(), PreprocessError> {
        self.frame.check(header)?;
        if !self.frame.progressive {
            let whole = self.scans[0].components.len() == self.frame.components.len();
            return if whole && self.scans.len() == 1 {
                Ok(())
            } else {
                Err(header
                    .unsupported("components in separate scans of a file that is not progressive"))
            };
        }
        for index in 0..self.frame.components.len() {
            let bits = self.bits(index);
            if bits[0].is_none() {
                return Err(header.damaged("a component without a scan"));
            }
            if bits[..SMOOTHED].iter().any(|bit| *bit != Some(0)) {
                return Err(header.unsupported("a progressive file whose last scans are missing"));
            }
        }
        Ok(())
    }

    /// Returns, for each coefficient of a component, the lowest bit that the
    /// scans give.
    fn bits(&self, index: usize) -> [Option<u8>; 64] {
        let mut bits = [None; 64];
        for scan in &self.scans {
            let (first, last) = scan.band;
            if scan.components.contains(&index) && first <= last && last < 64 {
                bits[usize::from(first)..=usize::from(last)].fill(Some(scan.bit));
            }
        }
        bits
    }
}

/// State of reading the segments of a file.
struct Reader<'a> {
    frame: Option<JpegFrame>,
    scans: Vec<JpegScan>,
    tables: usize,
    stream: Vec<u8>,
    exif: Option<&'a [u8]>,
    xmp: Option<&'a [u8]>,
}

impl<'a> Reader<'a> {
    /// Reads one segment. `segment` is its length field and its body.
    fn segment(
        &mut self,
        kind: u8,
        segment: &'a [u8],
        header: Header<'_>,
    ) -> Result<(), PreprocessError> {
        let body = &segment[2..];
        match kind {
            // Tables for quantization, Huffman codes, and the restart interval.
            0xdb | 0xc4 | 0xdd => {
                self.tables += 1;
                if self.tables > TABLES_MAX {
                    return Err(
                        header.unsupported(format!("more than {TABLES_MAX} segments with tables"))
                    );
                }
            }
            0xc9..=0xcf => {
                return Err(header.unsupported("arithmetic coding"));
            }
            0xc3 => return Err(header.unsupported("lossless coding")),
            0xc5..=0xc7 | 0xde | 0xdf => return Err(header.unsupported("hierarchical coding")),
            0xdc => {
                return Err(header.unsupported("a height that follows the pixels (a DNL segment)"));
            }
            0xc0..=0xc2 => {
                if self.frame.is_some() {
                    return Err(header.damaged("two frame headers"));
                }
                self.frame = Some(JpegFrame::read(kind == 0xc2, body, header)?);
            }
            0xda => {
                let Some(frame) = &self.frame else {
                    return Err(header.damaged("a scan before the frame header"));
                };
                if self.scans.len() == SCANS_MAX {
                    return Err(header.unsupported(format!("more than {SCANS_MAX} scans")));
                }
                let scan = JpegScan::read(body, self.stream.len(), frame)
                    .ok_or_else(|| header.damaged("a scan header that contradicts its frame"))?;
                self.scans.push(scan);
            }
            // Motion JPEG's segment, which stands for default tables, and
            // Adobe's segment, which names the colors: the decoder needs both.
            0xe0 if body.starts_with(b"AVI1\0") => {}
            0xee => {}
            0xe1 => {
                if let Some(exif) = body.strip_prefix(b"Exif\0\0") {
                    self.exif.get_or_insert(exif);
                } else if let Some(xmp) = body.strip_prefix(b"http://ns.adobe.com/xap/1.0/\0") {
                    self.xmp.get_or_insert(xmp);
                }
                return Ok(());
            }
            _ => return Ok(()),
        }
        self.stream.extend_from_slice(&[0xff, kind]);
        self.stream.extend_from_slice(segment);
        Ok(())
    }
}

impl JpegFrame {
    fn read(progressive: bool, body: &[u8], header: Header<'_>) -> Result<Self, PreprocessError> {
        let Some(&[precision, h0, h1, w0, w1, count]) = body.first_chunk() else {
            return Err(header.damaged("a frame header cut short"));
        };
        if precision != 8 {
            return Err(
                header.unsupported(format!("samples of {precision} bits; only 8 are supported"))
            );
        }
        let (components, rest) = body[6..].as_chunks::<3>();
        if components.len() != usize::from(count) || !rest.is_empty() {
            return Err(header
                .damaged("a frame header whose length does not match its number of components"));
        }
        match count {
            0 => return Err(header.damaged("no components")),
            1 | 3 | 4 => {}
            2 => return Err(header.unsupported("2 components; 1, 3 and 4 are supported")),
            _ => {
                return Err(
                    header.unsupported(format!("{count} components; 1, 3 and 4 are supported"))
                );
            }
        }
        let components: Vec<Component> = components
            .iter()
            .map(|&[id, sampling, _]| Component {
                id,
                horizontal: sampling >> 4,
                vertical: sampling & 15,
            })
            .collect();
        for component in &components {
            let sides = [component.horizontal, component.vertical];
            if sides.iter().any(|side| !(1..=4).contains(side)) {
                return Err(header.damaged(format!(
                    "a component sampled {} x {}; each factor must be 1 to 4",
                    component.horizontal, component.vertical
                )));
            }
        }
        Ok(Self {
            progressive,
            width: u16::from_be_bytes([w0, w1]),
            height: u16::from_be_bytes([h0, h1]),
            components,
        })
    }

    /// Returns the largest sampling factors, horizontal and vertical.
    pub(super) fn largest_sampling(&self) -> (u64, u64) {
        let side =
            |of: fn(&Component) -> u8| u64::from(self.components.iter().map(of).max().unwrap_or(1));
        (side(|c| c.horizontal), side(|c| c.vertical))
    }

    /// Returns the samples of a component, with the padding to whole units.
    fn component_pixels(&self, index: usize) -> u64 {
        let component = &self.components[index];
        let (horizontal, vertical) = self.largest_sampling();
        let units = u64::from(self.width).div_ceil(8 * horizontal)
            * u64::from(self.height).div_ceil(8 * vertical);
        units * 64 * u64::from(component.horizontal) * u64::from(component.vertical)
    }

    /// Returns the samples of all components, with the padding to whole units.
    pub(super) fn padded_pixels(&self) -> u64 {
        (0..self.components.len())
            .map(|index| self.component_pixels(index))
            .sum()
    }

    fn check(&self, header: Header<'_>) -> Result<(), PreprocessError> {
        let (horizontal, vertical) = self.largest_sampling();
        let luma = self.components[0];
        // The sampling factors of a single component have no effect.
        if self.components.len() == 1 && horizontal != 3 {
            return Ok(());
        }
        if u64::from(luma.horizontal) != horizontal {
            return Err(header.unsupported("luma at less than the full width"));
        }
        for component in &self.components {
            let (h, v) = (
                u64::from(component.horizontal),
                u64::from(component.vertical),
            );
            if h == 3 || horizontal % h != 0 || vertical % v != 0 {
                return Err(header.unsupported(format!(
                    "a component sampled {h} x {v} where the largest is sampled {horizontal} x {vertical}"
                )));
            }
            if 2 * h == horizontal && u64::from(self.width).div_ceil(2) <= 2 {
                return Err(
                    header.unsupported("chroma at half the width that is at most 2 pixels wide")
                );
            }
        }
        Ok(())
    }
}

impl JpegScan {
    fn read(body: &[u8], at: usize, frame: &JpegFrame) -> Option<Self> {
        let (&count, body) = body.split_first()?;
        let (components, rest) = body.split_at_checked(2 * usize::from(count))?;
        let &[first, last, bits] = <&[u8; 3]>::try_from(rest).ok()?;
        let components = components
            .chunks(2)
            .map(|pair| {
                let mut found = frame.components.iter();
                found.position(|component| component.id == pair[0])
            })
            .collect::<Option<Vec<usize>>>()?;
        let twice = (1..components.len()).any(|at| components[..at].contains(&components[at]));
        (!components.is_empty() && !twice).then_some(Self {
            at,
            components,
            band: (first, last),
            bit: bits & 15,
        })
    }
}

/// Returns the position of the next marker's kind, the byte behind its 0xff.
fn marker(bytes: &[u8]) -> Option<usize> {
    let mut at = 0;
    loop {
        at += bytes.get(at..)?.iter().position(|&byte| byte == 0xff)?;
        at += bytes[at..].iter().position(|&byte| byte != 0xff)?;
        // A stuffed byte is not a marker.
        if bytes[at] != 0 {
            return Some(at);
        }
    }
}

/// Returns the length of a scan's data in bytes: up to a marker that does not
/// belong to the data.
fn scan_len(bytes: &[u8]) -> usize {
    let mut at = 0;
    while let Some(next) = bytes[at..].iter().position(|&byte| byte == 0xff) {
        at += next;
        match bytes.get(at + 1) {
            Some(0x00 | 0xd0..=0xd7) => at += 2,
            Some(0xff) => at += 1,
            _ => return at,
        }
    }
    bytes.len()
}
