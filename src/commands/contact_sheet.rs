//! Contact sheet: many small pictures in one PNG file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use anyhow::Context as _;

use super::output::check;
use crate::files::part;

/// Gap between pictures and around all of them, in pixels of the model.
const GAP: usize = 2;
const PAPER: [u8; 3] = [255, 255, 255];
/// Color of pixels that are not known.
const UNKNOWN: [u8; 3] = [196, 196, 196];

/// Tokens of a picture in raster order; `None` is a pixel that is not known.
pub(super) type Cell = Vec<Option<u16>>;

/// Pictures in rows, kept as tokens. Tokens become colors only while a line of
/// the file is written, so that a sheet takes little memory at any scale.
#[derive(Debug)]
pub(super) struct Sheet<'a> {
    pub(super) side: usize,
    /// Colors as red, green and blue bytes, in token order.
    pub(super) palette: &'a [u8],
    /// Side of a model pixel, in pixels of the file.
    pub(super) scale: usize,
    pub(super) rows: Vec<Vec<Cell>>,
}

impl Sheet<'_> {
    /// Checks that a sheet with these numbers of columns and rows can be
    /// written to `path`, before there are any pictures.
    ///
    /// # Errors
    ///
    /// The errors of [`Self::save`] that can be known in advance.
    pub(super) fn check(
        path: &Path,
        (n_columns, n_rows): (usize, usize),
        side: usize,
        scale: usize,
    ) -> anyhow::Result<()> {
        extent(n_columns, side, scale)
            .and_then(|_| extent(n_rows, side, scale))
            .with_context(|| format!("--output {} cannot be written", path.display()))?;
        check("--output", path)
    }

    /// Writes the file atomically, through a temporary file that is renamed.
    ///
    /// # Errors
    ///
    /// When the file cannot be written, or would be larger than a PNG may be.
    pub(super) fn save(&self, path: &Path) -> anyhow::Result<()> {
        let part = part(path);
        let written = self
            .write(&part)
            .and_then(|()| Ok(std::fs::rename(&part, path)?));
        if written.is_err() {
            // The temporary file does not exist if it could not be created.
            let _ = std::fs::remove_file(&part);
        }
        written.with_context(|| format!("--output {} cannot be written", path.display()))
    }

    fn write(&self, path: &Path) -> anyhow::Result<()> {
        let n_columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let extent = |n: usize| extent(n, self.side, self.scale);
        let (width, height) = (extent(n_columns)?, extent(self.rows.len())?);
        let mut encoder = png::Encoder::new(BufWriter::new(File::create(path)?), width, height);
        encoder.set_color(png::ColorType::Rgb);
        encoder.set_depth(png::BitDepth::Eight);
        let mut encoder = encoder.write_header()?;
        let mut file = encoder.stream_writer()?;
        let paper = self.line(&[], 0, n_columns);
        for row in &self.rows {
            self.repeat(&mut file, &paper, GAP)?;
            for y in 0..self.side {
                self.repeat(&mut file, &self.line(row, y, n_columns), 1)?;
            }
        }
        self.repeat(&mut file, &paper, GAP)?;
        file.finish()?;
        Ok(encoder.finish()?)
    }

    /// Writes a line of the file as often as `n` model pixels are high.
    fn repeat(&self, file: &mut impl Write, line: &[u8], n: usize) -> std::io::Result<()> {
        (0..n * self.scale).try_for_each(|_| file.write_all(line))
    }

    /// Returns line `y` of these pictures side by side.
    fn line(&self, row: &[Cell], y: usize, n_columns: usize) -> Vec<u8> {
        let mut line = Vec::new();
        let mut put = |color: [u8; 3], n: usize| {
            for _ in 0..n * self.scale {
                line.extend_from_slice(&color);
            }
        };
        for column in 0..n_columns {
            put(PAPER, GAP);
            match row.get(column) {
                None => put(PAPER, self.side),
                Some(cell) => {
                    for token in &cell[y * self.side..][..self.side] {
                        put(self.color(*token), 1);
                    }
                }
            }
        }
        put(PAPER, GAP);
        line
    }

    fn color(&self, token: Option<u16>) -> [u8; 3] {
        let Some(token) = token else { return UNKNOWN };
        match self.palette.chunks_exact(3).nth(token.into()) {
            Some(color) => [color[0], color[1], color[2]],
            None => UNKNOWN,
        }
    }
}

/// Returns the pixels of the file that `n` pictures take, with their gaps.
fn extent(n: usize, side: usize, scale: usize) -> anyhow::Result<u32> {
    /// Largest width and height of a PNG.
    const EXTENT_MAX: u32 = i32::MAX.unsigned_abs();
    let pixels = (n * (side + GAP) + GAP) * scale;
    let pixels = u32::try_from(pixels).ok().filter(|&n| n <= EXTENT_MAX);
    pixels.context("the sheet would be too large for a PNG; lower --scale")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_stand_in_rows_with_their_colors() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sheet.png");
        let sheet = Sheet {
            side: 2,
            palette: &[255, 0, 0, 0, 0, 255],
            scale: 3,
            rows: vec![
                vec![vec![Some(0); 4], vec![Some(0), Some(1), None, Some(0)]],
                vec![vec![Some(1); 4]],
            ],
        };
        sheet.save(&path).unwrap();
        let bytes = std::fs::read(&path).unwrap();
        let drawn = image::load_from_memory(&bytes).unwrap().into_rgb8();
        // Two pictures and three gaps; two rows and three gaps.
        assert_eq!(drawn.dimensions(), (30, 30));
        let at = |x: u32, y: u32| drawn.get_pixel(x, y).0;
        assert_eq!(at(5, 5), PAPER);
        assert_eq!(at(6, 6), [255, 0, 0]);
        assert_eq!(at(11, 11), [255, 0, 0]);
        assert_eq!(at(12, 11), PAPER);
        assert_eq!(at(23, 8), [0, 0, 255]);
        assert_eq!(at(18, 9), UNKNOWN);
        assert_eq!(at(6, 18), [0, 0, 255]);
        assert_eq!(at(18, 18), PAPER, "a row with fewer pictures");
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        let save = |path: &str| sheet.save(&folder.path().join(path));
        let check = |path: &str, n| Sheet::check(&folder.path().join(path), (n, 2), 2, 3);
        check("sheet.png", 2).unwrap();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        for path in ["none/sheet.png", ""] {
            for error in [save(path), check(path, 2)] {
                assert!(error.unwrap_err().to_string().contains("--output"));
            }
        }
        let error = check("sheet.png", 1 << 30).unwrap_err();
        assert!(format!("{error:#}").contains("lower --scale"));
    }
}
