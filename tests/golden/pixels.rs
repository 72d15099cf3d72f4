//! The decoders against Pillow, pixel by pixel: files of odd kinds, and damaged
//! ones, each with what Pillow makes of it (`scripts/corpus/make_pixels.py`).

use std::fs;

use imagegpt::imaging::decode::decode;
use imagegpt::imaging::{Alpha, DecodeBudget};
use serde::Deserialize;
use sha2::{Digest, Sha256};

use super::{LIMITS, hex, root};

/// Files that Pillow refuses and the worker decodes, each with the reason.
const ONLY_OURS: [&str; 0] = [];

/// Files that Pillow reads and the worker refuses by name, each with a part of
/// its error.
const ONLY_PILLOWS: [(&str, &str); 10] = [
    (
        "bmp-16-planes-dib.dib",
        "not an image in an accepted format",
    ),
    (
        "bmp-24-planes-dib.dib",
        "not an image in an accepted format",
    ),
    (
        "bmp-32-planes-dib.dib",
        "not an image in an accepted format",
    ),
    ("tiff-lab-lzw-mm.tif", "colors in L*a*b*"),
    (
        "tiff-p1-float-d3-lzw-mm.tif",
        "high byte first and compressed",
    ),
    (
        "tiff-p1-float-packbits-mm.tif",
        "high byte first and compressed",
    ),
    (
        "tiff-p1-int16-d-deflate-mm.tif",
        "high byte first and compressed",
    ),
    (
        "tiff-ycc-11-deflate-mm.tif",
        "colors in YCbCr without JPEG compression",
    ),
    (
        "tiff-ycc-21-lzw-ii.tif",
        "colors in YCbCr without JPEG compression",
    ),
    (
        "tiff-ycc-default-packbits-mm.tif",
        "colors in YCbCr without JPEG compression",
    ),
];

/// Row of pixels.json; without size and hash if Pillow refuses the file.
#[derive(Debug, Deserialize)]
struct Row {
    file: String,
    size: Option<[u32; 2]>,
    rgb_sha256: Option<String>,
}

#[test]
fn pixels_are_pillows() {
    let folder = root().join("tests/golden");
    let rows: Vec<Row> =
        serde_json::from_slice(&fs::read(folder.join("pixels.json")).unwrap()).unwrap();
    let n_files = fs::read_dir(folder.join("pixels")).unwrap().count();
    assert_eq!(rows.len(), n_files, "files without a row in pixels.json");
    let mut failures = Vec::new();
    for row in &rows {
        let bytes = fs::read(folder.join("pixels").join(&row.file)).unwrap();
        let ours = decode(&bytes, Alpha::Drop, &LIMITS, &DecodeBudget::endless());
        let only_pillows = ONLY_PILLOWS.iter().find(|(file, _)| *file == row.file);
        let failure = match (ours, row.size, &row.rgb_sha256) {
            (ours, Some(_), _) if only_pillows.is_some() => {
                let error = ours.map_or_else(|error| error.to_string(), |_| "decoded".to_owned());
                let expected = only_pillows.is_some_and(|(_, part)| error.contains(part));
                (!expected).then_some(error)
            }
            (Ok(image), Some(size), Some(digest)) => {
                if [image.width, image.height] != size {
                    Some(format!("{} x {}", image.width, image.height))
                } else if hex(&Sha256::digest(&image.pixels)) != *digest {
                    Some("other pixels".to_owned())
                } else {
                    None
                }
            }
            (Err(error), Some(_), _) => Some(error.to_string()),
            (Ok(_), None, _) if !ONLY_OURS.contains(&row.file.as_str()) => {
                Some("decoded, where Pillow refuses the file".to_owned())
            }
            _ => None,
        };
        failures.extend(failure.map(|failure| format!("{}: {failure}", row.file)));
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}
