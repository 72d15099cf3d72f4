//! Matrices of features: rows of one width, in f32 or f16, in memory of their own
//! or in a mapped file.
//!
//! A mapped matrix takes no memory of its own: 1.28 million rows of 512 in f16 are
//! 1.3 GB of page cache, which the kernel may drop, and a fit converts one row at a
//! time. The file is trusted not to change while it is mapped; the caller, who maps
//! it, answers for that.

use std::fmt;

use half::f16;
use half::slice::HalfFloatSliceExt as _;

use super::ProbeError;

/// Bytes of a mapped file, for instance a `memmap2::Mmap`.
pub type MappedBytes = Box<dyn AsRef<[u8]> + Send + Sync>;

/// Form in which features are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FeatureNumber {
    F32,
    F16,
}

impl FeatureNumber {
    /// Returns the bytes of a number.
    #[must_use]
    pub fn n_bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 => 2,
        }
    }
}

enum Store {
    F32(Vec<f32>),
    F16(Vec<f16>),
    Mapped {
        bytes: MappedBytes,
        offset: usize,
        number: FeatureNumber,
    },
}

/// Features of examples: `n_rows` rows of `width` numbers, one row after the other.
pub struct FeatureMatrix {
    n_rows: usize,
    width: usize,
    store: Store,
}

impl fmt::Debug for FeatureMatrix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FeatureMatrix")
            .field("n_rows", &self.n_rows)
            .field("width", &self.width)
            .finish_non_exhaustive()
    }
}

impl FeatureMatrix {
    /// Makes a matrix of rows of `width` floats.
    ///
    /// # Errors
    ///
    /// When there is no row, no column, or a part of a row.
    pub fn from_f32(width: usize, numbers: Vec<f32>) -> Result<Self, ProbeError> {
        let n_rows = whole_rows(numbers.len(), width)?;
        Ok(Self {
            n_rows,
            width,
            store: Store::F32(numbers),
        })
    }

    /// Makes a matrix of rows of `width` numbers in half precision.
    ///
    /// # Errors
    ///
    /// When there is no row, no column, or a part of a row.
    pub fn from_f16(width: usize, numbers: Vec<f16>) -> Result<Self, ProbeError> {
        let n_rows = whole_rows(numbers.len(), width)?;
        Ok(Self {
            n_rows,
            width,
            store: Store::F16(numbers),
        })
    }

    /// Makes a matrix of `n_rows` rows of `width` numbers, which lie in `bytes` from
    /// `offset` on, little-endian, one row after the other. Bytes after them are
    /// left alone.
    ///
    /// # Errors
    ///
    /// When there is no row or no column, when the rows end beyond the bytes, or
    /// when they do not begin at a multiple of a number's size.
    pub fn from_mapping(
        bytes: MappedBytes,
        offset: usize,
        number: FeatureNumber,
        n_rows: usize,
        width: usize,
    ) -> Result<Self, ProbeError> {
        if n_rows == 0 {
            return Err(ProbeError::NoRows);
        }
        if width == 0 {
            return Err(ProbeError::NoColumns);
        }
        let held = (*bytes).as_ref();
        let end = n_rows
            .checked_mul(width)
            .and_then(|numbers| numbers.checked_mul(number.n_bytes()))
            .and_then(|n_bytes| n_bytes.checked_add(offset))
            .filter(|&end| end <= held.len());
        let Some(end) = end else {
            return Err(ProbeError::Mapping {
                rows: n_rows,
                width,
                offset,
                bytes: held.len(),
            });
        };
        let address = held[offset..end].as_ptr().addr();
        if !address.is_multiple_of(number.n_bytes()) {
            return Err(ProbeError::Alignment {
                address,
                alignment: number.n_bytes(),
            });
        }
        Ok(Self {
            n_rows,
            width,
            store: Store::Mapped {
                bytes,
                offset,
                number,
            },
        })
    }

    /// Returns the number of rows, which is at least 1.
    #[must_use]
    pub fn n_rows(&self) -> usize {
        self.n_rows
    }

    /// Returns the numbers of a row, which are at least 1.
    #[must_use]
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns a row as floats: from where it lies if it is stored in f32, or else
    /// from `scratch`, which holds `width` floats.
    ///
    /// # Panics
    ///
    /// When `row` is outside the matrix, or `scratch` has another size.
    #[must_use]
    pub fn row<'a>(&'a self, row: usize, scratch: &'a mut [f32]) -> &'a [f32] {
        let numbers = row * self.width..(row + 1) * self.width;
        match &self.store {
            Store::F32(all) => &all[numbers],
            Store::F16(all) => {
                all[numbers].convert_to_f32_slice(scratch);
                scratch
            }
            Store::Mapped {
                bytes,
                offset,
                number,
            } => {
                let size = number.n_bytes();
                let held = &(**bytes).as_ref()[*offset..];
                let held = &held[numbers.start * size..numbers.end * size];
                match number {
                    FeatureNumber::F32 => bytemuck::try_cast_slice(held)
                        .expect("the constructor has checked address and size"),
                    FeatureNumber::F16 => {
                        let row: &[f16] = bytemuck::try_cast_slice(held)
                            .expect("the constructor has checked address and size");
                        row.convert_to_f32_slice(scratch);
                        scratch
                    }
                }
            }
        }
    }

    /// Writes `rows` as floats to `into`, one after the other: a block of
    /// `rows.len()` by `width`.
    ///
    /// # Panics
    ///
    /// When a row is outside the matrix, or `into` is no block of this size.
    pub fn read_rows(&self, rows: &[usize], into: &mut [f32]) {
        assert_eq!(into.len(), rows.len() * self.width, "a block of these rows");
        let mut scratch = vec![0.0; self.width];
        for (&row, into) in rows.iter().zip(into.chunks_exact_mut(self.width)) {
            into.copy_from_slice(self.row(row, &mut scratch));
        }
    }

    /// Checks that `rows` are in the matrix and hold finite numbers. A fit asks this
    /// once, before its first step.
    ///
    /// # Errors
    ///
    /// At the first NaN or infinity, with its row and column.
    pub fn check(&self, rows: &[usize]) -> Result<(), ProbeError> {
        let mut scratch = vec![0.0; self.width];
        for &row in rows {
            if row >= self.n_rows {
                return Err(ProbeError::RowOutside {
                    row,
                    rows: self.n_rows,
                });
            }
            let numbers = self.row(row, &mut scratch);
            if let Some(column) = numbers.iter().position(|number| !number.is_finite()) {
                return Err(ProbeError::NotFinite {
                    row,
                    column,
                    value: numbers[column],
                });
            }
        }
        Ok(())
    }
}

fn whole_rows(numbers: usize, width: usize) -> Result<usize, ProbeError> {
    if width == 0 {
        return Err(ProbeError::NoColumns);
    }
    let rows = numbers / width;
    if rows * width != numbers {
        return Err(ProbeError::Size {
            numbers,
            rows,
            width,
        });
    }
    if rows == 0 {
        return Err(ProbeError::NoRows);
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use super::*;

    fn halves(n: usize) -> Vec<f16> {
        (0_u16..)
            .take(n)
            .map(|idx| f16::from_f32(f32::from(idx) / 8.0 - 3.0))
            .collect()
    }

    /// Maps a file of `head` bytes and then `numbers`.
    #[expect(unsafe_code, reason = "nobody else has the file")]
    fn mapped(head: usize, numbers: &[f16]) -> MappedBytes {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&vec![0xff; head]).unwrap();
        file.write_all(bytemuck::cast_slice(numbers)).unwrap();
        // SAFETY: the file has no name, so nobody changes it.
        Box::new(unsafe { memmap2::Mmap::map(&file) }.unwrap())
    }

    #[test]
    fn a_mapped_matrix_is_the_one_in_memory() {
        let numbers = halves(5 * 11);
        let owned = FeatureMatrix::from_f16(11, numbers.clone()).unwrap();
        let bytes = mapped(128, &numbers);
        let mapped = FeatureMatrix::from_mapping(bytes, 128, FeatureNumber::F16, 5, 11).unwrap();
        let floats: Vec<f32> = numbers.iter().map(|x| x.to_f32()).collect();
        let whole = FeatureMatrix::from_f32(11, floats.clone()).unwrap();
        let rows = [4, 0, 3, 3];
        for matrix in [&owned, &mapped, &whole] {
            let mut block = vec![0.0; 4 * 11];
            matrix.read_rows(&rows, &mut block);
            for (row, block) in rows.iter().zip(block.chunks(11)) {
                assert_eq!(block, &floats[row * 11..][..11]);
            }
            assert_eq!((matrix.n_rows(), matrix.width()), (5, 11));
        }
        let floats: Box<[f32]> = floats.into();
        let bytes: Vec<u8> = bytemuck::cast_slice(&floats).to_vec();
        let again = FeatureMatrix::from_mapping(Box::new(bytes), 4, FeatureNumber::F32, 4, 11);
        let again = again.unwrap();
        assert_eq!(again.row(3, &mut [0.0; 11]), &floats[34..45]);
    }

    #[test]
    fn a_mapping_that_does_not_fit_is_refused() {
        let numbers = halves(6);
        let make = |offset, rows, width| {
            let bytes = mapped(128, &numbers);
            FeatureMatrix::from_mapping(bytes, offset, FeatureNumber::F16, rows, width).err()
        };
        assert_eq!(make(128, 2, 3), None);
        let outside = make(128, 2, 4).unwrap().to_string();
        assert!(
            outside.contains("2 rows of 4 numbers begin at byte 128 of a mapping of 140 bytes"),
            "{outside}"
        );
        assert!(matches!(
            make(128, usize::MAX, 3),
            Some(ProbeError::Mapping { .. })
        ));
        assert!(matches!(
            make(127, 2, 3),
            Some(ProbeError::Alignment { alignment: 2, .. })
        ));
        assert_eq!(make(128, 0, 3), Some(ProbeError::NoRows));
        assert_eq!(make(128, 2, 0), Some(ProbeError::NoColumns));
    }

    #[test]
    fn what_is_not_finite_is_named() {
        let mut numbers = vec![1.0; 12];
        let matrix = FeatureMatrix::from_f32(4, numbers.clone()).unwrap();
        assert_eq!(matrix.check(&[0, 1, 2]), Ok(()));
        assert_eq!(
            matrix.check(&[0, 3]),
            Err(ProbeError::RowOutside { row: 3, rows: 3 })
        );
        numbers[9] = f32::NEG_INFINITY;
        let matrix = FeatureMatrix::from_f32(4, numbers).unwrap();
        assert_eq!(matrix.check(&[0, 1]), Ok(()));
        let error = matrix.check(&[0, 2]).unwrap_err().to_string();
        assert!(
            error.contains("features have -inf in row 2, column 1"),
            "{error}"
        );
        let nan = FeatureMatrix::from_f16(1, vec![f16::NAN]).unwrap();
        let error = nan.check(&[0]).unwrap_err().to_string();
        assert!(error.contains("NaN in row 0, column 0"), "{error}");
    }

    #[test]
    fn parts_of_rows_are_refused() {
        let size = FeatureMatrix::from_f32(4, vec![0.0; 7]).unwrap_err();
        assert_eq!(
            size,
            ProbeError::Size {
                numbers: 7,
                rows: 1,
                width: 4
            }
        );
        assert_eq!(
            FeatureMatrix::from_f32(4, Vec::new()).unwrap_err(),
            ProbeError::NoRows
        );
        assert_eq!(
            FeatureMatrix::from_f16(0, Vec::new()).unwrap_err(),
            ProbeError::NoColumns
        );
    }
}
