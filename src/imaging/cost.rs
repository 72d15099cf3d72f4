//! An estimate of what a picture costs to decode, from its header alone.
//!
//! The estimate orders the queue and decides nothing else: a header that lies
//! only moves its own picture, and the bounds of decoding hold in any case.

use std::cell::Cell;
use std::time::Duration;

use super::ImageInput;
use super::budget::{BudgetedSource, DecodeBudget};

/// Time to decode and shrink a pixel, as the slower decoders take it: a PNG
/// inflates 50 million pixels per second and core.
const PIXEL: Duration = Duration::from_nanos(20);
/// Time to read a byte of a file, which counts where there are many to a pixel.
const BYTE: Duration = Duration::from_nanos(10);
/// Time per byte of a file whose header does not say its size.
const BYTE_OF_UNKNOWN: Duration = Duration::from_nanos(100);
/// Chunks of a file that are looked through for its size. A header that has not
/// come by then, behind megabytes of metadata in small pieces, counts by its
/// bytes: the estimate is made where connections are served, so it takes
/// microseconds and at most a millisecond.
const CHUNKS_MAX: u32 = 16;

/// Estimated CPU time from a picture to its tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DecodeCost(pub(crate) Duration);

impl DecodeCost {
    /// Most that a picture may cost to count as cheap: 5 million pixels. Most
    /// photos in data sets are far smaller, photos as cameras write them are
    /// larger.
    const CHEAP_MAX: Self = Self(Duration::from_millis(100));

    /// Estimates the cost of an image in any of its forms.
    pub(crate) fn of(input: &ImageInput) -> Self {
        Self(match input {
            ImageInput::Encoded(bytes) => match pixels_claimed(bytes) {
                Some(pixels) => {
                    times(PIXEL, pixels).saturating_add(times(BYTE, bytes.len() as u64))
                }
                None => times(BYTE_OF_UNKNOWN, bytes.len() as u64),
            },
            ImageInput::Rgb8 { width, height, .. } => {
                times(PIXEL, u64::from(*width) * u64::from(*height))
            }
            ImageInput::Tokens(_) | ImageInput::Prefix(_) => Duration::ZERO,
        })
    }

    /// True if the picture may pass on the way that is kept for cheap ones.
    pub(crate) fn is_cheap(self) -> bool {
        self <= Self::CHEAP_MAX
    }
}

/// Width times height as the header of a file states them.
fn pixels_claimed(bytes: &[u8]) -> Option<u64> {
    let n_chunks = Cell::new(0);
    let enough = || n_chunks.replace(n_chunks.get() + 1) >= CHUNKS_MAX;
    let budget = DecodeBudget::until(&enough);
    let size = imagesize::reader_size(BudgetedSource::new(bytes, &budget)).ok()?;
    (size.width as u64).checked_mul(size.height as u64)
}

fn times(unit: Duration, n: u64) -> Duration {
    let nanos = u64::try_from(unit.as_nanos()).unwrap_or(u64::MAX);
    Duration::from_nanos(nanos.saturating_mul(n))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use bytes::Bytes;

    use super::*;

    #[test]
    fn golden_images_state_their_sizes() {
        let images = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/images");
        let mut n_files = 0;
        for entry in std::fs::read_dir(images).unwrap() {
            let path = entry.unwrap().path();
            let bytes = std::fs::read(&path).unwrap();
            let pixels = pixels_claimed(&bytes);
            assert!(pixels.is_some_and(|n| n > 0), "{}", path.display());
            n_files += 1;
        }
        assert!(n_files > 50, "{n_files} golden images");
    }

    #[test]
    fn pixels_count_and_not_bytes() {
        let png = |side: u32| {
            let mut bytes = b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR".to_vec();
            bytes.extend(side.to_be_bytes());
            bytes.extend(side.to_be_bytes());
            bytes.extend([8, 2, 0, 0, 0, 0, 0, 0, 0]);
            DecodeCost::of(&ImageInput::Encoded(Bytes::from(bytes)))
        };
        assert_eq!(png(8000).0.as_millis(), 1280);
        assert!(png(2000).is_cheap());
        assert!(!png(2400).is_cheap());
        assert!(png(u32::MAX).0 >= Duration::from_nanos(u64::MAX));
        let rgb8 = ImageInput::Rgb8 {
            width: 100,
            height: 10,
            pixels: Bytes::new(),
        };
        assert_eq!(DecodeCost::of(&rgb8).0, Duration::from_micros(20));
        assert_eq!(
            DecodeCost::of(&ImageInput::Tokens(vec![1; 1024])).0,
            Duration::ZERO
        );
    }

    #[test]
    fn a_header_that_never_comes_counts_by_its_bytes() {
        // JPEG comments without a frame: 8 MiB that a reader would walk through.
        let comments = [
            b"\xff\xd8".as_slice(),
            &b"\xff\xfe\0\x04ab".repeat(1_400_000),
        ]
        .concat();
        let len = comments.len() as u64;
        let cost = DecodeCost::of(&ImageInput::Encoded(Bytes::from(comments)));
        assert_eq!(cost.0, Duration::from_nanos(100 * len));
        // A segment of no length, and a BigTIFF of 2^64 entries.
        let stuck = b"\xff\xd8\xff\xe1\0\0".to_vec();
        let entries = [
            b"II\x2b\0\x08\0\0\0\x10\0\0\0\0\0\0\0\xff\xff\xff\xff\xff\xff\xff\xff".as_slice(),
            &[1].repeat(1 << 20),
        ]
        .concat();
        for bytes in [stuck, entries] {
            let len = bytes.len() as u64;
            let cost = DecodeCost::of(&ImageInput::Encoded(Bytes::from(bytes)));
            assert_eq!(cost.0, Duration::from_nanos(100 * len));
        }
    }
}
