//! Reads the bytes of a JPEG: markers, segments, and the bits of scans.
//!
//! A scan that needs more bits than it has is given zeros, as libjpeg does, if
//! a marker ends the scan. If the file ends instead, [`JpegSource::cut`] is set
//! and the picture is refused.

/// Bytes of a file, and the state of the scan that is being read.
pub(super) struct JpegSource<'a> {
    file: &'a [u8],
    at: usize,
    /// Marker that was read but not handled. Nothing is read past it.
    pub(super) marker: Option<u8>,
    pub(super) bits: BitBuffer,
    /// True once a scan needed bits behind the marker that ends its data.
    pub(super) insufficient: bool,
    /// True once a scan needed bits behind the end of the file.
    pub(super) cut: bool,
}

/// Bits that were read but not used, the next bit on top. The word holds zeros
/// or bits of the file behind the first `count`.
#[derive(Clone, Copy, Default)]
pub(super) struct BitBuffer {
    word: u64,
    count: u32,
}

/// Most bits of a code and of the value behind it: 17 of an invalid code, or 16
/// of a valid code with 15 of its value.
const BITS_PER_CODE: u32 = 31;

impl<'a> JpegSource<'a> {
    /// Creates a source behind the start marker of a file.
    pub(super) fn new(file: &'a [u8]) -> Self {
        Self {
            file,
            at: 2,
            marker: None,
            bits: BitBuffer::default(),
            insufficient: false,
            cut: false,
        }
    }

    /// Returns the next byte, or `None` at the end of the file.
    pub(super) fn byte(&mut self) -> Option<u8> {
        let byte = *self.file.get(self.at)?;
        self.at += 1;
        Some(byte)
    }

    /// Finds the next marker and keeps it in [`marker`](Self::marker). Returns
    /// `None` at the end of the file.
    pub(super) fn next_marker(&mut self) -> Option<u8> {
        loop {
            let rest = self.file.get(self.at..)?;
            let Some(skipped) = rest.iter().position(|&byte| byte == 0xff) else {
                self.at = self.file.len();
                return None;
            };
            self.at += skipped;
            let mut kind = 0xff;
            while kind == 0xff {
                kind = self.byte()?;
            }
            // A stuffed byte is not a marker.
            if kind != 0 {
                self.marker = Some(kind);
                return Some(kind);
            }
        }
    }

    /// Returns the length of a segment, and its body without the length field.
    /// Returns `None` if the file ends within the segment.
    pub(super) fn segment(&mut self) -> Option<(usize, &'a [u8])> {
        let (len, body) = self.file.get(self.at..)?.split_first_chunk::<2>()?;
        let len = usize::from(u16::from_be_bytes(*len));
        let body = body.get(..len.saturating_sub(2))?;
        self.at += len.max(2);
        Some((len, body))
    }

    /// Prepares the source for the data of a scan.
    pub(super) fn begin_scan(&mut self) {
        self.bits = BitBuffer::default();
        self.insufficient = false;
    }

    /// Passes the restart marker of a number, or does what libjpeg does in its
    /// absence. Returns `None` at the end of the file.
    pub(super) fn restart(&mut self, number: u8) -> Option<()> {
        self.bits = BitBuffer::default();
        let mut marker = match self.marker {
            Some(marker) => marker,
            None => self.next_marker()?,
        };
        loop {
            let ahead = marker.wrapping_sub(0xd0 + number) & 7;
            match marker {
                // No marker of a JPEG has such a number.
                ..0xc0 => marker = self.next_marker()?,
                // The scan goes on behind the expected marker, and behind a
                // marker that is too far from the expected one to be trusted.
                0xd0..=0xd7 if matches!(ahead, 0 | 3 | 4 | 5) => {
                    self.marker = None;
                    self.insufficient = false;
                    return Some(());
                }
                // A marker of the past: the expected one lies behind it.
                0xd0..=0xd7 if ahead >= 6 => marker = self.next_marker()?,
                // A marker to come, or one that ends the scan: the data up to
                // it are missing.
                _ => return Some(()),
            }
        }
    }

    /// Returns the next byte of arithmetic codes: zero behind the marker that
    /// ends them.
    pub(super) fn coded_byte(&mut self) -> u8 {
        if self.marker.is_some() {
            return 0;
        }
        self.scan_byte().unwrap_or_else(|| {
            self.cut |= self.marker.is_none();
            0
        })
    }

    /// Returns the next byte of a scan, or `None` at a marker or at the end of
    /// the file.
    fn scan_byte(&mut self) -> Option<u8> {
        let byte = self.byte()?;
        if byte != 0xff {
            return Some(byte);
        }
        let mut kind = 0xff;
        while kind == 0xff {
            kind = self.byte()?;
        }
        if kind == 0 {
            return Some(0xff);
        }
        self.marker = Some(kind);
        None
    }
}

#[expect(
    clippy::inline_always,
    reason = "what reads bits is compiled for several CPUs, and this with it"
)]
impl BitBuffer {
    /// Reads ahead so that a code and its value are there, if the data go on.
    #[inline(always)]
    pub(super) fn refill(&mut self, source: &mut JpegSource<'_>) {
        if self.count < BITS_PER_CODE {
            self.read_ahead(source);
        }
    }

    #[inline(always)]
    fn read_ahead(&mut self, source: &mut JpegSource<'_>) {
        let next = source
            .file
            .get(source.at..)
            .and_then(|rest| rest.first_chunk::<8>());
        if let (Some(next), None) = (next, source.marker) {
            let next = u64::from_be_bytes(*next);
            if !has_ff(next) {
                let bytes = (63 - self.count) / 8;
                self.word |= next >> self.count;
                self.count += 8 * bytes;
                source.at += bytes as usize;
                return;
            }
        }
        *self = self.read_bytes(source);
    }

    /// Reads ahead byte by byte, up to a marker.
    #[cold]
    fn read_bytes(mut self, source: &mut JpegSource<'_>) -> Self {
        // Bits below `count` are read again.
        self.word &= !(u64::MAX >> self.count);
        while self.count <= 56 && source.marker.is_none() {
            let Some(byte) = source.scan_byte() else {
                break;
            };
            self.word |= u64::from(byte) << (56 - self.count);
            self.count += 8;
        }
        self
    }

    /// Returns the next bits, at most 16, without using them. [`refill`] must
    /// have been called.
    ///
    /// [`refill`]: Self::refill
    #[expect(clippy::cast_possible_truncation, reason = "at most 16 bits are left")]
    #[inline(always)]
    pub(super) fn peek(self, bits: u32) -> usize {
        (self.word >> (64 - bits)) as usize
    }

    /// Uses bits, at most 17.
    #[inline(always)]
    pub(super) fn skip(&mut self, bits: u32, source: &mut JpegSource<'_>) {
        if bits > self.count {
            *self = Self::zeros(source);
            return;
        }
        self.word <<= bits;
        self.count -= bits;
    }

    /// Returns zeros for data that end too early.
    #[cold]
    fn zeros(source: &mut JpegSource<'_>) -> Self {
        source.insufficient = true;
        source.cut |= source.marker.is_none();
        Self { word: 0, count: 57 }
    }

    /// Returns and uses the next bits, at least 1 and at most 16.
    #[inline(always)]
    pub(super) fn take(&mut self, bits: u32, source: &mut JpegSource<'_>) -> i32 {
        let value = i32::try_from(self.peek(bits)).unwrap_or(0);
        self.skip(bits, source);
        value
    }

    /// Returns and uses one bit.
    #[inline(always)]
    pub(super) fn bit(&mut self, source: &mut JpegSource<'_>) -> bool {
        if self.count == 0 {
            self.read_ahead(source);
        }
        self.take(1, source) == 1
    }

    /// Returns the value that `bits` bits stand for: the upper half of the
    /// numbers is positive, the lower half negative.
    #[inline(always)]
    pub(super) fn value(&mut self, bits: u32, source: &mut JpegSource<'_>) -> i32 {
        extended(self.take(bits, source), bits)
    }
}

/// Returns the value that a number of `bits` bits stands for.
#[inline]
pub(super) fn extended(number: i32, bits: u32) -> i32 {
    if number < 1 << (bits - 1) {
        number - (1 << bits) + 1
    } else {
        number
    }
}

/// Returns true if one of the bytes is 0xff.
#[inline]
fn has_ff(bytes: u64) -> bool {
    const ONES: u64 = 0x0101_0101_0101_0101;
    let inverted = !bytes;
    inverted.wrapping_sub(ONES) & bytes & (ONES << 7) != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_of_ones_are_found() {
        assert!(!has_ff(0));
        assert!(!has_ff(0xfefe_fefe_fefe_fefe));
        for at in 0..8 {
            assert!(has_ff(0xff << (8 * at)), "{at}");
            assert!(has_ff(0x8000_0000_0000_0080 | (0xff << (8 * at))), "{at}");
        }
    }

    #[test]
    fn bits_come_in_order_across_stuffed_bytes_and_end_in_zeros() {
        let mut file = b"\xff\xd8".to_vec();
        file.extend((0..40_u8).flat_map(|byte| [byte, 0x5a]));
        file.extend(b"\xff\x00\xff\xff\x00\x80\xff\xd9");
        let mut expected: Vec<u8> = (0..40_u8).flat_map(|byte| [byte, 0x5a]).collect();
        expected.extend([0xff, 0xff, 0x80]);
        for step in 1..=16 {
            let mut source = JpegSource::new(&file);
            let mut bits = BitBuffer::default();
            for at in (0..expected.len() * 8 / step).map(|n| n * step) {
                bits.refill(&mut source);
                let ours = bits.take(u32::try_from(step).unwrap(), &mut source);
                let theirs = (at..at + step).fold(0, |value, at| {
                    value << 1 | i32::from(expected[at / 8] >> (7 - at % 8) & 1)
                });
                assert_eq!(ours, theirs, "{step} bits at {at}");
            }
            assert!(!source.insufficient, "{step}");
            for _ in 0..2 {
                bits.refill(&mut source);
                bits.take(16, &mut source);
            }
            assert_eq!(source.marker, Some(0xd9));
            assert!(source.insufficient && !source.cut);
            assert_eq!(bits.take(16, &mut source), 0);
        }
    }

    #[test]
    fn restarts_are_found_again() {
        let check = |expected: u8, file: &[u8], marker: Option<u8>, insufficient: bool| {
            let file = [b"\xff\xd8", file].concat();
            let mut source = JpegSource::new(&file);
            source.insufficient = true;
            source.restart(expected).unwrap();
            assert_eq!(source.marker, marker, "{file:x?}");
            assert_eq!(source.insufficient, insufficient, "{file:x?}");
        };
        check(0, b"\xff\xd0", None, false);
        check(7, b"junk\xff\x00\xff\xff\xd7", None, false);
        // One and two ahead are kept, so that the data before them are missing.
        check(7, b"\xff\xd0", Some(0xd0), true);
        check(3, b"\xff\xd5", Some(0xd5), true);
        // Farther ones are taken for the expected one.
        check(3, b"\xff\xd6", None, false);
        check(3, b"\xff\xd0", None, false);
        // Past ones and invalid ones are passed over.
        check(3, b"\xff\xd2\xff\xd1\xff\x10\xff\xd3", None, false);
        check(3, b"\xff\xd9", Some(0xd9), true);
        assert!(JpegSource::new(b"\xff\xd8\xff").restart(0).is_none());
    }
}
