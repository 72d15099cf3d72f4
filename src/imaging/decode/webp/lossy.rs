//! Checks the sizes inside a lossy frame (VP8, RFC 6386).

use super::super::{Header, PreprocessError};

/// Bytes of the part of the frame header that is not arithmetically coded.
const HEAD: usize = 10;

/// Returns width and height of a key frame.
pub(super) fn size(frame: &[u8]) -> Option<(u32, u32)> {
    let &[tag, _, _, 0x9d, 0x01, 0x2a, w0, w1, h0, h1] = frame.first_chunk::<HEAD>()? else {
        return None;
    };
    let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
    (tag & 1 == 0).then_some((side(w0, w1), side(h0, h1)))
}

/// Refuses partitions that reach beyond the frame, because the decoder makes
/// room for each partition before it reads any of it.
pub(super) fn check(frame: &[u8], header: Header<'_>) -> Result<(), PreprocessError> {
    let cut = || header.damaged("a partition that reaches beyond its frame");
    let &[t0, t1, t2] = frame.first_chunk().ok_or_else(cut)?;
    let first = usize::try_from(u32::from_le_bytes([t0, t1, t2, 0]) >> 5).unwrap_or(usize::MAX);
    let (first, rest) = frame
        .get(HEAD..)
        .and_then(|rest| rest.split_at_checked(first))
        .ok_or_else(cut)?;
    let others = (1 << Bools::new(first).partitions()) - 1;
    let (sizes, rest) = rest.split_at_checked(3 * others).ok_or_else(cut)?;
    let (sizes, _) = sizes.as_chunks::<3>();
    let sum: usize = sizes.iter().map(|&size| super::u24(size) as usize).sum();
    if sum > rest.len() {
        return Err(cut());
    }
    Ok(())
}

/// Arithmetic decoder for flags that are as likely true as false.
struct Bools<'a> {
    rest: &'a [u8],
    value: u32,
    range: u32,
    /// Bits of the last byte that were taken in.
    taken: u32,
}

impl<'a> Bools<'a> {
    fn new(bytes: &'a [u8]) -> Self {
        let mut bools = Self {
            rest: bytes,
            value: 0,
            range: 255,
            taken: 0,
        };
        bools.value = bools.byte() << 8;
        bools.value |= bools.byte();
        bools
    }

    /// Returns the next byte, or 0 after the end, as every decoder does.
    fn byte(&mut self) -> u32 {
        let Some((&byte, rest)) = self.rest.split_first() else {
            return 0;
        };
        self.rest = rest;
        byte.into()
    }

    fn flag(&mut self) -> bool {
        let split = 1 + (((self.range - 1) * 128) >> 8);
        let flag = self.value >= split << 8;
        if flag {
            self.range -= split;
            self.value -= split << 8;
        } else {
            self.range = split;
        }
        while self.range < 128 {
            self.range <<= 1;
            self.value <<= 1;
            self.taken += 1;
            if self.taken == 8 {
                self.taken = 0;
                self.value |= self.byte();
            }
        }
        flag
    }

    fn number(&mut self, bits: u32) -> u32 {
        (0..bits).fold(0, |number, _| number << 1 | u32::from(self.flag()))
    }

    /// Skips `count` optional numbers of `bits` bits. A flag in front of each
    /// number tells if the number follows.
    fn skip_optional(&mut self, count: u32, bits: u32) {
        for _ in 0..count {
            if self.flag() {
                self.number(bits);
            }
        }
    }

    /// Returns the binary logarithm of the number of partitions behind the
    /// first.
    fn partitions(mut self) -> u32 {
        // Color space and clamping.
        self.number(2);
        if self.flag() {
            // Segments: their map, their quantizers and filter levels.
            let map = self.flag();
            if self.flag() {
                self.flag();
                self.skip_optional(4, 8);
                self.skip_optional(4, 7);
            }
            if map {
                self.skip_optional(3, 8);
            }
        }
        // The loop filter: type, level and sharpness, then adjustments.
        self.number(1 + 6 + 3);
        if self.flag() && self.flag() {
            self.skip_optional(8, 7);
        }
        self.number(2)
    }
}
