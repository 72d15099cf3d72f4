//! Enlarges components that are stored at a part of the picture's size, bit for
//! bit as libjpeg-turbo does by default: linearly for half the width, half the
//! height, or both; by repetition otherwise, and for components of at most two
//! columns.

use multiversion::multiversion;

use super::frame::JpegComponent;

/// Method that enlarges a component.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Enlarging {
    /// The component has the picture's size.
    None,
    Width,
    Height,
    Both,
    /// Each sample is repeated, horizontally and vertically.
    Repeat {
        horizontal: u32,
        vertical: u32,
    },
}

/// Some rows of samples of a component.
pub(super) struct SampleRows<'a> {
    pub(super) samples: &'a [u8],
    pub(super) stride: usize,
    /// Number of the first row in the component. Negative if rows that do not
    /// exist come before.
    pub(super) first: i64,
    /// Width and height of the component.
    pub(super) size: (u32, u32),
}

impl<'a> SampleRows<'a> {
    /// Returns the samples of a row. Beyond the edges the first and last row
    /// are repeated.
    fn row(&self, y: i64) -> &'a [u8] {
        let y = y.clamp(0, i64::from(self.size.1) - 1) - self.first;
        let start = usize::try_from(y).unwrap_or(0) * self.stride;
        &self.samples[start..start + self.stride]
    }
}

impl Enlarging {
    /// Returns the method for a component in a frame of these largest sampling
    /// factors.
    pub(super) fn new(component: &JpegComponent, (h_max, v_max): (u32, u32)) -> Self {
        let (h, v) = component.sampling;
        let (horizontal, vertical) = (h_max / h, v_max / v);
        let narrow = component.size.0 <= 2;
        match (horizontal, vertical) {
            (1, 1) => Self::None,
            (2, 1) if !narrow => Self::Width,
            (1, 2) => Self::Height,
            (2, 2) if !narrow => Self::Both,
            _ => Self::Repeat {
                horizontal,
                vertical,
            },
        }
    }

    /// Returns true if a row depends on the samples below and above.
    pub(super) fn needs_below(self) -> bool {
        matches!(self, Self::Height | Self::Both)
    }

    /// Returns a row of the picture's width, or longer: row `step` of the row
    /// group whose samples begin at row `top`. `buffer` is room for the row.
    pub(super) fn row<'a>(
        self,
        rows: &SampleRows<'a>,
        top: u32,
        step: u32,
        width: usize,
        buffer: &'a mut [u8],
    ) -> &'a [u8] {
        let (top, step) = (i64::from(top), i64::from(step));
        let samples = rows.size.0 as usize;
        match self {
            Self::None => return rows.row(top + step),
            Self::Width => enlarge_width(&rows.row(top + step)[..samples], buffer),
            Self::Height => {
                let (near, far, bias) = neighbors(rows, top, step);
                enlarge_height(near, far, bias, buffer);
            }
            Self::Both => {
                let (near, far, _) = neighbors(rows, top, step);
                enlarge_both(&near[..samples], &far[..samples], buffer);
            }
            Self::Repeat {
                horizontal,
                vertical,
            } => {
                let row = rows.row(top + step / i64::from(vertical));
                let repeated = buffer[..width].chunks_mut(horizontal as usize);
                for (to, sample) in repeated.zip(row) {
                    to.fill(*sample);
                }
            }
        }
        buffer
    }
}

/// Returns the row that is nearest to a row of double height, the row on its
/// other side, and what is added before their weighted mean is rounded down.
fn neighbors<'a>(rows: &SampleRows<'a>, top: i64, step: i64) -> (&'a [u8], &'a [u8], u16) {
    let near = top + step / 2;
    if step % 2 == 0 {
        (rows.row(near), rows.row(near - 1), 1)
    } else {
        (rows.row(near), rows.row(near + 1), 2)
    }
}

/// Computes a row from the nearest row of half the height and the one on the
/// other side.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2"))]
fn enlarge_height(near: &[u8], far: &[u8], bias: u16, target: &mut [u8]) {
    for ((to, near), far) in target.iter_mut().zip(near).zip(far) {
        *to = low_byte((3 * u16::from(*near) + u16::from(*far) + bias) >> 2);
    }
}

/// Enlarges a row of more than two samples to double width. Each sample weighs
/// three quarters, and its neighbor one.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2"))]
fn enlarge_width(row: &[u8], target: &mut [u8]) {
    let (pairs, _) = target.as_chunks_mut::<2>();
    let [first, .., last] = row else { return };
    let around = row.iter().zip(&row[1..]).zip(&row[2..]);
    for (pair, ((left, here), right)) in pairs[1..].iter_mut().zip(around) {
        let here = 3 * u16::from(*here);
        *pair = [
            low_byte((here + u16::from(*left) + 1) >> 2),
            low_byte((here + u16::from(*right) + 2) >> 2),
        ];
    }
    let (second, before) = (u16::from(row[1]), u16::from(row[row.len() - 2]));
    pairs[0] = [*first, low_byte((3 * u16::from(*first) + second + 2) >> 2)];
    pairs[row.len() - 1] = [low_byte((3 * u16::from(*last) + before + 1) >> 2), *last];
}

/// Enlarges a row of more than two samples to double width, between two rows of
/// half the height.
#[multiversion(targets("x86_64+avx2+bmi1+bmi2"))]
fn enlarge_both(near: &[u8], far: &[u8], target: &mut [u8]) {
    /// Columns that are enlarged at a time.
    const STEP: usize = 64;
    let (pairs, _) = target.as_chunks_mut::<2>();
    let last = near.len() - 1;
    // Sums of two rows, with the column before and the column behind.
    let mut sums = [0_u16; STEP + 2];
    for start in (0..near.len()).step_by(STEP) {
        let end = near.len().min(start + STEP);
        let before = start.saturating_sub(1);
        let behind = (end + 1).min(near.len());
        let room = &mut sums[1 - (start - before)..];
        let columns = near[before..behind].iter().zip(&far[before..behind]);
        for (sum, (near, far)) in room.iter_mut().zip(columns) {
            *sum = 3 * u16::from(*near) + u16::from(*far);
        }
        let around = sums.iter().zip(&sums[1..]).zip(&sums[2..]);
        for (pair, ((left, here), right)) in pairs[start..end].iter_mut().zip(around) {
            *pair = [
                low_byte((3 * here + left + 8) >> 4),
                low_byte((3 * here + right + 7) >> 4),
            ];
        }
        if start == 0 {
            pairs[0][0] = low_byte((4 * sums[1] + 8) >> 4);
        }
        if end == near.len() {
            pairs[last][1] = low_byte((4 * sums[end - start] + 7) >> 4);
        }
    }
}

#[expect(clippy::cast_possible_truncation, reason = "means of bytes are bytes")]
#[inline]
fn low_byte(mean: u16) -> u8 {
    mean as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn double_width_alternates_how_halves_are_rounded() {
        let mut target = [0; 8];
        enlarge_width(&[0, 2, 4, 255], &mut target);
        assert_eq!(target, [0, 1, 1, 3, 3, 67, 192, 255]);
        let mut target = [0; 6];
        enlarge_width(&[10, 11, 10], &mut target);
        assert_eq!(target, [10, 10, 11, 11, 10, 10]);
    }

    #[test]
    fn flat_rows_stay_flat() {
        for level in [0, 1, 127, 255] {
            let row = [level; 5];
            let mut target = [9; 10];
            enlarge_both(&row, &row, &mut target);
            assert_eq!(target, [level; 10]);
        }
    }

    #[test]
    fn rows_beyond_the_edges_are_repeated() {
        let samples = [1, 1, 2, 2, 3, 3];
        let rows = SampleRows {
            samples: &samples,
            stride: 2,
            first: 0,
            size: (2, 2),
        };
        assert_eq!(rows.row(-1), [1, 1]);
        assert_eq!(rows.row(1), [2, 2]);
        assert_eq!(rows.row(2), [2, 2]);
    }
}
