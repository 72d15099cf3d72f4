//! What the commands print and write.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::files::printable;

/// A line for the person, whatever names and reasons are in it.
pub(crate) fn complain(text: &str) {
    // Without standard error there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "imagegpt: {}", printable(text));
}

/// One JSON object, on a line of its own.
pub(super) fn json(out: &mut impl Write, value: &impl Serialize) -> anyhow::Result<()> {
    writeln!(out, "{}", serde_json::to_string(value)?)?;
    Ok(())
}

/// Rows in columns two spaces apart, with nothing drawn around them. Those columns
/// that `is_right` names by their number end at their right edge.
pub(super) fn columns(
    rows: impl IntoIterator<Item = Vec<String>>,
    is_right: impl Fn(usize) -> bool,
    out: &mut impl Write,
) -> std::io::Result<()> {
    let mut table = Table::new();
    table.load_style(presets::NOTHING).add_rows(rows);
    for column in table.column_iter_mut() {
        column.set_padding((0, 2));
        if is_right(column.index) {
            column.set_cell_alignment(CellAlignment::Right);
        }
    }
    for line in table.lines() {
        writeln!(out, "{}", line.trim_end())?;
    }
    Ok(())
}

/// What files that are made of an image are named like.
pub(super) fn stem(name: &str) -> String {
    match name {
        "-" => "stdin".to_owned(),
        _ => Path::new(name).file_stem().map_or_else(
            || "image".to_owned(),
            |stem| stem.to_string_lossy().into_owned(),
        ),
    }
}

/// A folder that gets a file for each image.
#[derive(Debug)]
pub(super) struct Folder {
    flag: &'static str,
    path: PathBuf,
    taken: BTreeSet<String>,
}

impl Folder {
    /// # Errors
    ///
    /// When it is not there and cannot be made, or cannot be written into.
    pub(super) fn make(flag: &'static str, folder: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("{flag} {} cannot be made", folder.display()))?;
        probe(&folder.join(format!(".imagegpt.{}.part", std::process::id())))
            .with_context(|| format!("{flag} {} cannot be written into", folder.display()))?;
        Ok(Self {
            flag,
            path: folder.to_owned(),
            taken: BTreeSet::new(),
        })
    }

    /// Writes a PNG file that is named like `name`, an image's path, and says
    /// which. Images of one name in several folders are numbered.
    ///
    /// # Errors
    ///
    /// When it cannot be written.
    pub(super) fn write(&mut self, name: &str, png: &[u8]) -> anyhow::Result<PathBuf> {
        let stem = stem(name);
        let numbered = (2..).map(|n: u64| format!("{stem}-{n}"));
        let free = std::iter::once(stem.clone())
            .chain(numbered)
            .find(|name| !self.taken.contains(name))
            .unwrap_or(stem);
        let path = self.path.join(format!("{free}.png"));
        self.taken.insert(free);
        std::fs::write(&path, png)
            .with_context(|| format!("{}: {} cannot be written", self.flag, path.display()))?;
        Ok(path)
    }
}

/// Checks that the file that `flag` names can be written, before there is
/// anything to write.
///
/// # Errors
///
/// When it cannot.
pub(crate) fn check(flag: &str, path: &Path) -> anyhow::Result<()> {
    let checked = if path.is_dir() {
        Err(anyhow::anyhow!("it is a folder"))
    } else {
        probe(&part(path)).map_err(Into::into)
    };
    checked.with_context(|| format!("{flag} {} cannot be written", path.display()))
}

/// Where a file is while it is written.
pub(super) fn part(path: &Path) -> PathBuf {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    part.into()
}

/// Makes the file and removes it again, so that what cannot be written is told
/// before there is something to write.
fn probe(path: &Path) -> std::io::Result<()> {
    std::fs::File::create(path)?;
    std::fs::remove_file(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_of_one_name_are_numbered() {
        let parent = tempfile::tempdir().unwrap();
        let mut folder = Folder::make("--map", &parent.path().join("a/b")).unwrap();
        let mut name = |of: &str| {
            let path = folder.write(of, b"png").unwrap();
            path.file_name().unwrap().to_str().unwrap().to_owned()
        };
        assert_eq!(name("x/cat.jpg"), "cat.png");
        assert_eq!(name("y/cat.png"), "cat-2.png");
        assert_eq!(name("cat-2.gif"), "cat-2-2.png");
        assert_eq!(name("z/cat"), "cat-3.png");
        assert_eq!(name("-"), "stdin.png");
        std::fs::write(parent.path().join("file"), b"").unwrap();
        let error = Folder::make("--map", &parent.path().join("file"));
        assert!(error.unwrap_err().to_string().contains("--map"));
    }
}
