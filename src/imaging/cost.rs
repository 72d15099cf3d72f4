//! Estimate of the time that a picture takes to decode, from its header alone.
//!
//! The estimate orders the queue and decides nothing else. A header that lies
//! only moves its own picture, and the limits of decoding hold in any case.

use std::cell::Cell;
use std::time::Duration;

use super::ImageInput;
use super::budget::{BudgetedSource, DecodeBudget};

/// Time to decode and shrink one pixel with the slower decoders: a PNG inflates
/// 50 million pixels per second and core.
const PIXEL: Duration = Duration::from_nanos(20);
/// Time to read one byte of a file, which matters for a file with many bytes
/// per pixel.
const BYTE: Duration = Duration::from_nanos(10);
/// Time per byte of a file whose size in pixels was not found.
const BYTE_OF_UNKNOWN: Duration = Duration::from_nanos(100);
/// Most chunks of a file that are searched for its size in pixels. A file whose
/// header comes later, behind megabytes of metadata in small pieces, is
/// estimated by its bytes. The estimate is made on the threads that serve
/// connections, so it takes microseconds, and at most a millisecond.
const CHUNKS_MAX: u32 = 16;

/// Estimated CPU time to turn a picture into tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct DecodeCost(pub(crate) Duration);

impl DecodeCost {
    /// Highest cost at which a picture counts as cheap: that of 5 million
    /// pixels. Most photos in data sets are far smaller; photos as cameras
    /// write them are larger.
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

    /// True if the picture counts as cheap, so that it can overtake costly
    /// ones.
    pub(crate) fn is_cheap(self) -> bool {
        self <= Self::CHEAP_MAX
    }
}

/// Returns width times height as the header of a file states them.
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
        // JPEG comments without a frame: 8 MiB that a reader would walk
        // through.
        let comments = [
            b"\xff\xd8".as_slice(),
            &b"\xff\xfe\0\x04ab".repeat(1_400_000),
        ]
        .concat();
        let len = comments.len() as u64;
        let cost = DecodeCost::of(&ImageInput::Encoded(Bytes::from(comments)));
        assert_eq!(cost.0, Duration::from_nanos(100 * len));
        // A segment of length 0, and a BigTIFF of 2^64 entries.
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
