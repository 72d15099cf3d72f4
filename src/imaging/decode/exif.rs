//! Reads the orientation in EXIF data as Pillow does: of the first directory,
//! in any type of number.

/// Tag of the orientation.
const ORIENTATION: u64 = 274;

/// Most entries of a directory that are searched.
const ENTRIES_MAX: usize = 4096;

/// Byte order of the data.
#[derive(Clone, Copy)]
struct ByteOrder {
    little: bool,
}

impl ByteOrder {
    fn number(self, bytes: &[u8]) -> u64 {
        let fold = |number: u64, byte: &u8| number << 8 | u64::from(*byte);
        if self.little {
            bytes.iter().rev().fold(0, fold)
        } else {
            bytes.iter().fold(0, fold)
        }
    }
}

/// Returns the orientation that EXIF data name: 1 to 8, or `None` if they name
/// none.
pub(super) fn orientation(exif: &[u8]) -> Option<u8> {
    let order = match exif.get(..4)? {
        [b'I', b'I', ..] => ByteOrder { little: true },
        [b'M', b'M', ..] => ByteOrder { little: false },
        _ => return None,
    };
    let version = order.number(&exif[2..4]);
    // Pillow also takes the version in the other byte order.
    let big = match version {
        42 | 0x2a00 => false,
        43 => true,
        _ => return None,
    };
    let (width, count_len, at) = if big { (8, 8, 8) } else { (4, 2, 4) };
    let start = usize::try_from(order.number(exif.get(at..at + width)?)).ok()?;
    let directory = exif.get(start..)?;
    let count = usize::try_from(order.number(directory.get(..count_len)?)).ok()?;
    let entries = directory[count_len..].chunks_exact(4 + 2 * width);
    entries
        .take(count.min(ENTRIES_MAX))
        .filter(|entry| order.number(&entry[..2]) == ORIENTATION)
        .filter_map(|entry| {
            let kind = order.number(&entry[2..4]);
            let size = size(kind)?;
            let count = order.number(&entry[4..4 + width]);
            let len = usize::try_from(count.checked_mul(size as u64)?).ok()?;
            let value = &entry[4 + width..];
            let values = if len <= width {
                value.get(..len)?
            } else {
                let start = usize::try_from(order.number(value)).ok()?;
                exif.get(start..start.checked_add(len)?)?
            };
            number(kind, values.get(..size)?, order)
        })
        .next_back()
        .filter(|value| (1..=8).contains(value))
}

/// Returns the bytes of a number of a type, or `None` for a type that is no
/// number.
fn size(kind: u64) -> Option<usize> {
    match kind {
        6 => Some(1),
        3 | 8 => Some(2),
        4 | 9 | 11 | 13 => Some(4),
        5 | 10 | 12 | 16 => Some(8),
        _ => None,
    }
}

/// Reads a number of a type, if it is small and whole.
fn number(kind: u64, bytes: &[u8], order: ByteOrder) -> Option<u8> {
    let raw = order.number(bytes);
    match kind {
        11 | 12 => {
            let value = if kind == 11 {
                f64::from(f32::from_bits(u32::try_from(raw).ok()?))
            } else {
                f64::from_bits(raw)
            };
            (0..=8).find(|&whole| (f64::from(whole) - value).abs() == 0.0)
        }
        5 | 10 => {
            let (above, below) = (order.number(&bytes[..4]), order.number(&bytes[4..]));
            let whole = above.checked_div(below)?;
            (whole * below == above).then(|| u8::try_from(whole).ok())?
        }
        _ => u8::try_from(raw).ok(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Makes EXIF data of one entry.
    fn exif(kind: u8, count: u8, value: &[u8]) -> Vec<u8> {
        let mut bytes = b"II*\0\x08\0\0\0\x01\0\x12\x01".to_vec();
        bytes.extend([kind, 0, count, 0, 0, 0]);
        if value.len() <= 4 {
            bytes.extend(value);
            bytes.resize(22, 0);
        } else {
            bytes.extend([26, 0, 0, 0, 0, 0, 0, 0]);
            bytes.extend(value);
        }
        bytes
    }

    #[test]
    fn numbers_of_any_type_count() {
        for (kind, value) in [
            (3, &[6, 0][..]),
            (4, &[6, 0, 0, 0]),
            (6, &[6]),
            (8, &[6, 0]),
            (9, &[6, 0, 0, 0]),
            (13, &[6, 0, 0, 0]),
            (16, &[6, 0, 0, 0, 0, 0, 0, 0]),
            (5, &[12, 0, 0, 0, 2, 0, 0, 0]),
            (11, &6_f32.to_le_bytes()),
            (12, &6_f64.to_le_bytes()),
        ] {
            assert_eq!(orientation(&exif(kind, 1, value)), Some(6), "type {kind}");
        }
        // Bytes are not numbers to Pillow, and neither is text.
        for kind in [1, 2, 7, 99] {
            assert_eq!(orientation(&exif(kind, 1, &[6])), None, "type {kind}");
        }
        assert_eq!(orientation(&exif(3, 1, &[9, 0])), None);
        assert_eq!(orientation(&exif(3, 1, &[6, 1])), None);
        assert_eq!(orientation(&exif(5, 1, &[13, 0, 0, 0, 2, 0, 0, 0])), None);
        assert_eq!(orientation(&exif(5, 1, &[6, 0, 0, 0, 0, 0, 0, 0])), None);
        assert_eq!(orientation(&exif(3, 0, &[])), None);
        assert_eq!(orientation(b"II*\0"), None);
    }
}
