//! Turns and mirrors images as their orientation says.

use image::metadata::Orientation;

use super::RgbImage;

/// Way in which an image has to be turned, said by the source of each pixel of
/// the result.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Rows and columns change places.
    pub(crate) transposed: bool,
    /// The rows of the source are mirrored.
    pub(crate) from_right: bool,
    /// The columns of the source are mirrored.
    pub(crate) from_bottom: bool,
}

impl From<Orientation> for Turn {
    fn from(orientation: Orientation) -> Self {
        use Orientation as O;
        let (transposed, from_right, from_bottom) = match orientation {
            O::NoTransforms => (false, false, false),
            O::FlipHorizontal => (false, true, false),
            O::Rotate180 => (false, true, true),
            O::FlipVertical => (false, false, true),
            O::Rotate90FlipH => (true, false, false),
            O::Rotate90 => (true, false, true),
            O::Rotate270FlipH => (true, true, true),
            O::Rotate270 => (true, true, false),
        };
        Self {
            transposed,
            from_right,
            from_bottom,
        }
    }
}

/// Side of the square tiles that are turned one after another. Going along
/// whole rows of one image would miss the cache at every pixel of the other.
const TILE: usize = 32;

/// Turns a whole image.
pub(super) fn turned(image: RgbImage, turn: Turn) -> RgbImage {
    if turn == Turn::default() {
        return image;
    }
    let Turn {
        transposed,
        from_right,
        from_bottom,
    } = turn;
    let (width, height) = (image.width as usize, image.height as usize);
    let (result_width, result_height) = if transposed {
        (height, width)
    } else {
        (width, height)
    };
    let (source, _) = image.pixels.as_chunks::<3>();
    let mut pixels = vec![0; image.pixels.len()];
    let (result, _) = pixels.as_chunks_mut::<3>();
    for top in (0..result_height).step_by(TILE) {
        for left in (0..result_width).step_by(TILE) {
            let right = result_width.min(left + TILE);
            for row in top..result_height.min(top + TILE) {
                let target = &mut result[row * result_width + left..row * result_width + right];
                for (column, target) in (left..right).zip(target) {
                    let (x, y) = if transposed {
                        (row, column)
                    } else {
                        (column, row)
                    };
                    let x = if from_right { width - 1 - x } else { x };
                    let y = if from_bottom { height - 1 - y } else { y };
                    *target = source[y * width + x];
                }
            }
        }
    }
    RgbImage {
        width: if transposed {
            image.height
        } else {
            image.width
        },
        height: if transposed {
            image.width
        } else {
            image.height
        },
        pixels,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn orientations_move_corners() {
        // A 3 x 2 image: a b c / d e f.
        let image = RgbImage {
            width: 3,
            height: 2,
            pixels: b"abcdef".iter().flat_map(|&byte| [byte; 3]).collect(),
        };
        let check = |exif, width, expected: &str| {
            let orientation = Orientation::from_exif(exif).unwrap();
            let turned = turned(image.clone(), orientation.into());
            let letters: Vec<u8> = turned.pixels.iter().copied().step_by(3).collect();
            assert_eq!(turned.width, width, "orientation {exif}");
            assert_eq!(letters, expected.as_bytes(), "orientation {exif}");
        };
        check(1, 3, "abcdef");
        check(2, 3, "cbafed");
        check(3, 3, "fedcba");
        check(4, 3, "defabc");
        check(5, 2, "adbecf");
        check(6, 2, "daebfc");
        check(7, 2, "fcebda");
        check(8, 2, "cfbead");
    }
}
