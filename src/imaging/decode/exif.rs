//! Reads the orientation in EXIF data as Pillow does: of the first directory,
//! in any type of number. Of several orientations the first counts.

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

/// Returns the orientation that EXIF data name, which is 1 for a value that is
/// none of 1 to 8, or `None` if they name no value.
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
    let mut read_bytes = 0_u64;
    for entry in entries.take(count.min(ENTRIES_MAX)) {
        let kind = order.number(&entry[2..4]);
        let count = order.number(&entry[4..4 + width]);
        let Some(size) = size(kind) else { continue };
        let len = count.saturating_mul(size as u64);
        let value = &entry[4 + width..];
        let values = if len <= width as u64 {
            &value[..usize::try_from(len).ok()?]
        } else {
            read_bytes = read_bytes.saturating_add(len);
            if read_bytes > exif.len() as u64 {
                continue;
            }
            // Values outside the data end the directory.
            let start = usize::try_from(order.number(value)).ok()?;
            exif.get(start..start.checked_add(usize::try_from(len).ok()?)?)?
        };
        if order.number(&entry[..2]) == ORIENTATION && !values.is_empty() {
            let value = number(kind, &values[..size], order);
            return Some(value.filter(|value| (1..=8).contains(value)).unwrap_or(1));
        }
    }
    None
}

/// Returns the bytes of a value of a type, or `None` for a type that Pillow does
/// not know.
fn size(kind: u64) -> Option<usize> {
    match kind {
        1 | 2 | 6 | 7 => Some(1),
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
        // Bytes and text are no numbers to Pillow.
        1 | 2 | 7 => None,
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
        for kind in [1, 2, 7] {
            assert_eq!(orientation(&exif(kind, 1, &[6])), Some(1), "type {kind}");
        }
        assert_eq!(orientation(&exif(99, 1, &[6])), None);
        assert_eq!(orientation(&exif(3, 1, &[9, 0])), Some(1));
        assert_eq!(orientation(&exif(3, 1, &[6, 1])), Some(1));
        let fraction = |above, below| exif(5, 1, &[above, 0, 0, 0, below, 0, 0, 0]);
        assert_eq!(orientation(&fraction(13, 2)), Some(1));
        assert_eq!(orientation(&fraction(6, 0)), Some(1));
        assert_eq!(orientation(&exif(3, 0, &[])), None);
        assert_eq!(orientation(b"II*\0"), None);
    }

    /// Makes EXIF data of entries: tag, type, count and value.
    fn entries(entries: &[(u16, u16, u32, u32)]) -> Vec<u8> {
        let mut bytes = b"II*\0\x08\0\0\0".to_vec();
        bytes.extend(u16::try_from(entries.len()).unwrap().to_le_bytes());
        for &(tag, kind, count, value) in entries {
            bytes.extend([tag, kind].map(u16::to_le_bytes).concat());
            bytes.extend([count, value].map(u32::to_le_bytes).concat());
        }
        bytes.extend([0; 4]);
        bytes
    }

    #[test]
    fn of_several_orientations_the_first_with_a_value_counts() {
        let two = |first| orientation(&entries(&[first, (274, 3, 1, 3)]));
        assert_eq!(two((274, 3, 1, 6)), Some(6));
        assert_eq!(two((274, 3, 1, 9)), Some(1));
        assert_eq!(two((274, 7, 1, 6)), Some(1));
        // Unknown types and empty values are passed over, as are values that
        // are longer than the data.
        assert_eq!(two((274, 99, 1, 6)), Some(3));
        assert_eq!(two((274, 3, 0, 6)), Some(3));
        assert_eq!(two((271, 2, 1000, 8)), Some(3));
        // Others end the directory if they lie outside the data.
        assert_eq!(two((271, 2, 8, 1000)), None);
        assert_eq!(two((271, 2, 8, 8)), Some(3));
    }
}
