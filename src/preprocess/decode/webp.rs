//! WebP, of an animation its first frame.
//!
//! The decoder sizes its buffers by the inner frame, not by the canvas that was
//! checked, so the inner sizes are checked here first.

use image::ImageDecoder;
use image::codecs::webp::WebPDecoder;
use image::metadata::Orientation;

use super::pixels::Pixels;
use super::wrapped::read;
use super::{Header, PreprocessError, orientation};

/// The most that the decoder holds for a pixel: an animated lossless frame with
/// its canvas, its ARGB and the output. The planes of a lossy one take less.
const PIXEL_BYTES: u64 = 12;

pub(super) fn decode(
    bytes: &[u8],
    header: Header<'_>,
) -> Result<(Pixels, Orientation), PreprocessError> {
    for (width, height) in frame_sizes(bytes) {
        header.admit(width, height, PIXEL_BYTES)?;
    }
    let mut decoder = WebPDecoder::new(header.source(bytes)).map_err(|e| header.image_error(&e))?;
    let (width, height) = decoder.dimensions();
    header.admit(width, height, PIXEL_BYTES)?;
    let exif = decoder.exif_metadata().ok().flatten();
    let xmp = decoder.xmp_metadata().ok().flatten();
    let pixels = read(decoder, header)?;
    Ok((pixels, orientation(exif.as_deref(), xmp.as_deref())))
}

/// The sizes that the frames themselves state. Chunks inside an animation's
/// frames are visited too; a chunk that cannot be read is the decoder's to
/// refuse.
fn frame_sizes(bytes: &[u8]) -> Vec<(u32, u32)> {
    let mut sizes = Vec::new();
    let mut at = 12;
    while let Some(head) = bytes.get(at..at + 8) {
        let (kind, len) = head.split_at(4);
        let len = u32::from_le_bytes([len[0], len[1], len[2], len[3]]) as usize;
        at += 8;
        let body = &bytes[at..];
        match kind {
            // Step into the frame: 16 bytes, then chunks.
            b"ANMF" => {
                at += 16;
                continue;
            }
            b"VP8 " => {
                if let Some(&[w0, w1, h0, h1]) = body.get(6..10) {
                    let side = |low, high| u32::from(u16::from_le_bytes([low, high]) & 0x3fff);
                    sizes.push((side(w0, w1), side(h0, h1)));
                }
            }
            b"VP8L" => {
                if let Some(&[b0, b1, b2, b3]) = body.get(1..5) {
                    let bits = u32::from_le_bytes([b0, b1, b2, b3]);
                    sizes.push(((bits & 0x3fff) + 1, (bits >> 14 & 0x3fff) + 1));
                }
            }
            _ => {}
        }
        at = at.saturating_add(len).saturating_add(len % 2);
    }
    sizes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_state_their_sizes() {
        let check = |chunks: &[u8], expected: &[(u32, u32)]| {
            let bytes = [b"RIFF\0\0\0\0WEBP", chunks].concat();
            assert_eq!(frame_sizes(&bytes), expected);
        };
        let lossy = b"VP8 \x0a\0\0\0\0\0\0\x9d\x01\x2a\x40\x01\x2c\x41";
        let lossless = b"VP8L\x05\0\0\0\x2f\x3f\xc0\x0f\0\0";
        let odd = b"ICCP\x01\0\0\0x\0";
        check(lossy, &[(320, 300)]);
        check(lossless, &[(64, 64)]);
        check(&[odd.as_slice(), lossy].concat(), &[(320, 300)]);
        let animated = [b"ANMF\x2a\0\0\0".as_slice(), &[0; 16], lossy, lossless].concat();
        check(&animated, &[(320, 300), (64, 64)]);
        check(b"VP8 \xff\xff\xff\xff", &[]);
        check(b"", &[]);
    }
}
