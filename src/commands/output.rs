//! Output of the commands: messages, JSON lines, tables and image files.

use std::collections::BTreeSet;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use comfy_table::{CellAlignment, Table, presets};
use serde::Serialize;

use crate::files::{part, printable};

/// Prints a message to standard error; control characters of names are escaped.
pub(crate) fn complain(text: &str) {
    // Without standard error there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "imagegpt: {}", printable(text));
}

/// Writes one JSON object on a line of its own.
pub(super) fn json(out: &mut impl Write, value: &impl Serialize) -> anyhow::Result<()> {
    writeln!(out, "{}", serde_json::to_string(value)?)?;
    Ok(())
}

/// Writes rows as columns two spaces apart, without borders. A column is
/// aligned to the right if `is_right` is true for its index.
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

/// Formats a value as it is written on the command line.
pub(super) fn value_name(value: &impl clap::ValueEnum) -> String {
    let name = value.to_possible_value();
    name.map_or_else(String::new, |name| name.get_name().to_owned())
}

/// Returns the stem of the names of files that are made from an image.
pub(super) fn stem(name: &str) -> String {
    match name {
        "-" => "stdin".to_owned(),
        _ => Path::new(name).file_stem().map_or_else(
            || "image".to_owned(),
            |stem| stem.to_string_lossy().into_owned(),
        ),
    }
}

/// Directory that gets a file per image.
#[derive(Debug)]
pub(super) struct Folder {
    flag: &'static str,
    path: PathBuf,
    taken: BTreeSet<String>,
}

impl Folder {
    /// Creates the directory, and checks that files can be written into it.
    ///
    /// # Errors
    ///
    /// When the directory does not exist and cannot be created, or cannot be
    /// written into.
    pub(super) fn make(flag: &'static str, folder: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("{flag} {} cannot be created", folder.display()))?;
        probe(&folder.join(format!(".imagegpt.{}.part", std::process::id())))
            .with_context(|| format!("{flag} {} cannot be written into", folder.display()))?;
        Ok(Self {
            flag,
            path: folder.to_owned(),
            taken: BTreeSet::new(),
        })
    }

    /// Writes a PNG file that is named like `name`, the path of an image, and
    /// returns its path. Images of the same name in several directories are
    /// numbered.
    ///
    /// # Errors
    ///
    /// When the file cannot be written.
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
/// When the file cannot be written.
pub(crate) fn check(flag: &str, path: &Path) -> anyhow::Result<()> {
    let checked = if path.is_dir() {
        Err(anyhow::anyhow!("it is a directory"))
    } else {
        probe(&part(path)).map_err(Into::into)
    };
    checked.with_context(|| format!("{flag} {} cannot be written", path.display()))
}

/// Creates the file and removes it again, to find out in advance whether it can
/// be written.
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
