//! Choice of a directory's files: which of them are data, and of which kind.
//!
//! Programs that write datasets leave other files beside them: unfinished
//! output, logs of transactions, caches, tables of metadata. Spark, Arrow and
//! DuckDB pass over names that begin with `_` or a dot, and so does this module.
//! Files that are passed over, and pictures that cannot be read, are counted.

use std::collections::{BTreeMap, BTreeSet};

use clap::ValueEnum;
use serde::Serialize;

use super::input;
use super::location::{ListedObject, Location};
use crate::files::{IMAGES, UNREAD_IMAGES};

/// Kind of the files that are read of a directory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum)]
pub enum FileKind {
    Image,
    Tar,
    Parquet,
    Arrow,
}

impl std::fmt::Display for FileKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Image => "image",
            Self::Tar => "tar",
            Self::Parquet => "parquet",
            Self::Arrow => "arrow",
        })
    }
}

/// Files of directories that are not read, although they may hold pictures.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub(super) struct LeftOut {
    /// Directories, tables and shards whose names begin with `_` or a dot,
    /// caches of Hugging Face, and img2dataset's tables of metadata.
    pub(super) passed_over: u64,
    /// Pictures and archives of kinds that cannot be read, by extension.
    #[serde(skip_serializing_if = "BTreeMap::is_empty")]
    pub(super) unread: BTreeMap<String, u64>,
}

impl LeftOut {
    pub(super) fn add(&mut self, other: &Self) {
        self.passed_over += other.passed_over;
        for (extension, count) in &other.unread {
            *self.unread.entry(extension.clone()).or_default() += count;
        }
    }

    pub(super) fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

impl std::fmt::Display for LeftOut {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut parts = Vec::new();
        if self.passed_over > 0 {
            parts.push(format!(
                "{} files or directories passed over (names that begin with _ or a dot, caches, \
                 metadata)",
                self.passed_over
            ));
        }
        if !self.unread.is_empty() {
            let kinds = self.unread.iter();
            let kinds = kinds.map(|(extension, count)| format!("{count} .{extension}"));
            parts.push(format!(
                "files of kinds that cannot be read: {}",
                kinds.collect::<Vec<_>>().join(", ")
            ));
        }
        f.write_str(&parts.join("; "))
    }
}

/// Files of a directory, sorted out.
#[derive(Debug, Default)]
pub(super) struct FoundData {
    pub(super) by_kind: BTreeMap<FileKind, Vec<ListedObject>>,
    /// Entries that cannot be read and may be directories with any content.
    pub(super) may_be_folders: Vec<ListedObject>,
    /// Files without an extension, whose kind only their content tells.
    pub(super) bare: Vec<ListedObject>,
    pub(super) left_out: LeftOut,
}

/// Returns the kind of a file by its name.
pub(super) fn kind_of(name: &str) -> Option<FileKind> {
    let name = name.to_ascii_lowercase();
    let name = name.rsplit('/').next().unwrap_or_default();
    if name.ends_with(".tar.gz") {
        return Some(FileKind::Tar);
    }
    match extension(name) {
        "tar" | "tgz" => Some(FileKind::Tar),
        "parquet" | "parq" | "pq" => Some(FileKind::Parquet),
        "arrow" | "feather" | "ipc" => Some(FileKind::Arrow),
        other if IMAGES.contains(&other) => Some(FileKind::Image),
        _ => None,
    }
}

/// True for a file on which the outcome of [`sort_out`] depends, or which it
/// counts.
pub(super) fn matters(path: &str, kind: Option<FileKind>) -> bool {
    let name = path.rsplit('/').next().unwrap_or_default();
    let is_bare = kind == Some(FileKind::Tar) && !name.contains('.');
    kind_of(name).is_some() || unread(name).is_some() || is_marker(name) || is_bare
}

/// Returns what follows the last dot of a name.
pub(super) fn extension(name: &str) -> &str {
    name.rsplit_once('.').map_or("", |(_, last)| last)
}

/// Returns the extension of a picture or an archive of a kind that cannot be
/// read.
fn unread(name: &str) -> Option<String> {
    const ARCHIVES: [&str; 5] = ["zst", "xz", "bz2", "lz4", "lz"];
    let name = name.rsplit('/').next()?.to_ascii_lowercase();
    let (stem, last) = name.rsplit_once('.')?;
    if UNREAD_IMAGES.contains(&last) || matches!(last, "zip" | "tbz2" | "txz" | "tzst") {
        return Some(last.to_owned());
    }
    (ARCHIVES.contains(&last) && extension(stem) == "tar").then(|| format!("tar.{last}"))
}

/// True if a directory or a table with this name is not data. As in Spark, `_`
/// followed by `=` is a column by which a table is partitioned. Keys of buckets
/// may have `.` and `..` as parts, which hide nothing.
fn is_private(part: &str) -> bool {
    match part {
        "." | ".." => false,
        _ => part.starts_with('.') || (part.starts_with('_') && !part.contains('=')),
    }
}

/// Sorts a directory's files. `kind` is the kind that the command line names.
pub(super) fn sort_out(entries: Vec<ListedObject>, kind: Option<FileKind>) -> FoundData {
    let mut found = FoundData::default();
    let mut private = BTreeSet::new();
    let mut markers = Markers::default();
    for entry in entries {
        let (directory, name) = match entry.name.rsplit_once('/') {
            Some((directory, name)) => (directory, name),
            None => ("", entry.name.as_str()),
        };
        if let Some(end) = private_end(directory) {
            private.insert(directory[..end].to_owned());
            continue;
        }
        if entry.may_be_folder {
            if is_private(name) {
                found.left_out.passed_over += 1;
            } else {
                found.may_be_folders.push(entry);
            }
            continue;
        }
        markers.look(&entry.name);
        let is_bare = kind == Some(FileKind::Tar) && !name.contains('.');
        let kind = kind_of(name).or(is_bare.then_some(FileKind::Tar));
        let Some(kind) = kind else {
            if let Some(extension) = unread(name) {
                *found.left_out.unread.entry(extension).or_default() += 1;
            } else if !name.contains('.') && !is_private(name) {
                found.bare.push(entry);
            }
            continue;
        };
        // Cameras write pictures whose names begin with `_`.
        let is_hidden = name.starts_with('.') || (kind != FileKind::Image && is_private(name));
        if is_hidden {
            found.left_out.passed_over += 1;
        } else {
            found.by_kind.entry(kind).or_default().push(entry);
        }
    }
    found.left_out.passed_over += private.len() as u64;
    found.without_caches(&markers);
    found.without_metadata(&markers);
    if let Some(kind) = kind {
        found.by_kind.retain(|other, _| *other == kind);
    }
    found
}

/// Returns the end of the first part of a path that is not data.
fn private_end(directory: &str) -> Option<usize> {
    let mut at = 0;
    for part in directory.split('/') {
        at += part.len();
        if is_private(part) {
            return Some(at);
        }
        at += 1;
    }
    None
}

/// Files that tell by which program a directory was written.
#[derive(Debug, Default)]
struct Markers {
    /// Directories of Hugging Face's datasets.
    datasets: BTreeSet<String>,
    /// Paths of img2dataset's statistics, without the end `_stats.json`.
    statistics: BTreeSet<String>,
}

/// Files of Hugging Face's datasets that describe a directory of tables.
const DATASET_MARKERS: [&str; 2] = ["dataset_info.json", "state.json"];
/// End of the names of img2dataset's statistics.
const STATISTICS_END: &str = "_stats.json";

fn is_marker(name: &str) -> bool {
    DATASET_MARKERS.contains(&name) || name.ends_with(STATISTICS_END)
}

impl Markers {
    fn look(&mut self, path: &str) {
        let (directory, name) = path.rsplit_once('/').unwrap_or(("", path));
        if DATASET_MARKERS.contains(&name) {
            self.datasets.insert(directory.to_owned());
        }
        if let Some(stem) = path.strip_suffix(STATISTICS_END) {
            self.statistics.insert(stem.to_owned());
        }
    }
}

impl FoundData {
    /// Leaves out the results of `map` and `filter` that Hugging Face's datasets
    /// keep beside their own files.
    fn without_caches(&mut self, markers: &Markers) {
        let Some(tables) = self.by_kind.get_mut(&FileKind::Arrow) else {
            return;
        };
        let place = |entry: &ListedObject| {
            let (directory, name) = entry.name.rsplit_once('/').unwrap_or(("", &entry.name));
            let is_cache = name.starts_with("cache-") && extension(name) == "arrow";
            (directory.to_owned(), is_cache)
        };
        let own: BTreeSet<String> = tables
            .iter()
            .map(place)
            .filter(|(directory, is_cache)| !is_cache && markers.datasets.contains(directory))
            .map(|(directory, _)| directory)
            .collect();
        let before = tables.len();
        tables.retain(|entry| {
            let (directory, is_cache) = place(entry);
            !(is_cache && own.contains(&directory))
        });
        self.left_out.passed_over += (before - tables.len()) as u64;
    }

    /// Leaves out the tables that img2dataset writes beside its tars: the same
    /// samples without their images.
    fn without_metadata(&mut self, markers: &Markers) {
        let stem = |name: &str| name.rsplit_once('.').map(|(stem, _)| stem.to_owned());
        let (Some(tars), Some(tables)) = (
            self.by_kind.get(&FileKind::Tar),
            self.by_kind.get(&FileKind::Parquet),
        ) else {
            return;
        };
        let stems: BTreeSet<String> = tars.iter().filter_map(|entry| stem(&entry.name)).collect();
        let is_metadata = tables
            .iter()
            .all(|entry| stem(&entry.name).is_some_and(|stem| stems.contains(&stem)));
        if is_metadata && !markers.statistics.is_disjoint(&stems) {
            self.left_out.passed_over += tables.len() as u64;
            self.by_kind.remove(&FileKind::Parquet);
        }
    }
}

/// Returns the kind of a file that the command line names: by the name, by
/// `--kind`, or, for a tar without its extension, by the content.
pub(super) async fn named_kind(
    location: &Location,
    entry: &ListedObject,
    kind: Option<FileKind>,
) -> anyhow::Result<Option<FileKind>> {
    /// Extensions of lists, which are read as lists.
    const LISTS: [&str; 4] = ["csv", "txt", "lst", "list"];
    let by_name = kind_of(&entry.name);
    if let Some(kind) = kind {
        anyhow::ensure!(
            by_name.is_none_or(|by_name| by_name == kind),
            "--kind {kind}: {location} is a file of another kind by its name; leave the flag out"
        );
        return Ok(Some(kind));
    }
    if by_name.is_some() || LISTS.contains(&&*extension(&entry.name).to_ascii_lowercase()) {
        return Ok(by_name);
    }
    Ok(is_tar(location, entry).await?.then_some(FileKind::Tar))
}

async fn is_tar(location: &Location, entry: &ListedObject) -> anyhow::Result<bool> {
    let (location, bytes) = (location.clone(), entry.bytes);
    let runtime = tokio::runtime::Handle::current();
    let is_tar = tokio::task::spawn_blocking(move || input::is_tar(&location, bytes, runtime));
    is_tar.await?
}

/// Returns the tars among a directory's files without an extension.
pub(super) async fn bare_tars(
    folder: &Location,
    bare: Vec<ListedObject>,
) -> anyhow::Result<Vec<ListedObject>> {
    /// Files that are looked into: each costs a few requests to a bucket.
    const TRIED_MAX: usize = 64;
    let n_bare = bare.len();
    let mut tars = Vec::new();
    for entry in bare.into_iter().take(TRIED_MAX) {
        let location = folder.join(&entry.name);
        let is_readable = entry.trouble.is_none() && location.trouble()?.is_none();
        if is_readable && is_tar(&location, &entry).await? {
            tars.push(entry);
        }
    }
    anyhow::ensure!(
        tars.is_empty() || n_bare <= TRIED_MAX,
        "{folder} contains {n_bare} files without an extension, over the limit of {TRIED_MAX} for \
         looking into them, and some are tars; read all of them with --kind tar, or name the files \
         to read"
    );
    Ok(tars)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Sorts files with these names, and returns the kinds with their files.
    fn sorted(names: &[&str], kind: Option<FileKind>) -> (String, LeftOut) {
        let entries = names.iter().map(|name| ListedObject {
            name: (*name).to_owned(),
            bytes: 1,
            version: String::new(),
            trouble: None,
            may_be_folder: false,
        });
        let found = sort_out(entries.collect(), kind);
        let kinds = found.by_kind.into_iter().map(|(kind, entries)| {
            let names: Vec<String> = entries.into_iter().map(|entry| entry.name).collect();
            format!("{kind}: {}", names.join(" "))
        });
        (kinds.collect::<Vec<_>>().join("; "), found.left_out)
    }

    fn check(names: &[&str], kinds: &str, passed_over: u64) {
        let (found, left_out) = sorted(names, None);
        assert_eq!((&*found, left_out.passed_over), (kinds, passed_over));
        assert!(left_out.unread.is_empty());
    }

    #[test]
    fn what_programs_leave_behind_is_passed_over_and_counted() {
        check(
            &[
                "_temporary/0/a.parquet",
                "_temporary/1/b.parquet",
                "c.parquet",
            ],
            "parquet: c.parquet",
            1,
        );
        check(
            &[
                "_delta_log/1.checkpoint.parquet",
                "_spark_metadata/0",
                "c.parquet",
            ],
            "parquet: c.parquet",
            2,
        );
        check(
            &["x/_a.tar", "x/.b.tar", "x/c.tar", "_d.arrow", "._e.png"],
            "tar: x/c.tar",
            4,
        );
        check(&["_k=1/a.parquet"], "parquet: _k=1/a.parquet", 0);
        check(
            &["DCIM/_DSC0001.JPG", "_thumbs/_DSC0001.JPG", "_x.jfif"],
            "image: DCIM/_DSC0001.JPG _x.jfif",
            1,
        );
    }

    #[test]
    fn caches_of_hugging_face_are_no_data_beside_its_own_files() {
        check(
            &[
                "t/cache-0123.arrow",
                "t/cache-89_00000_of_00002.arrow",
                "t/data-00000-of-00001.arrow",
                "t/state.json",
            ],
            "arrow: t/data-00000-of-00001.arrow",
            2,
        );
        // Anybody may call a table so.
        check(
            &["cache-1.arrow", "x.arrow"],
            "arrow: cache-1.arrow x.arrow",
            0,
        );
        check(
            &["cache-1.arrow", "dataset_info.json"],
            "arrow: cache-1.arrow",
            0,
        );
    }

    #[test]
    fn a_directory_of_img2dataset_is_its_tars() {
        check(
            &[
                "00000.parquet",
                "00000.tar",
                "00000_stats.json",
                "_tmp/1.feather",
            ],
            "tar: 00000.tar",
            2,
        );
        // Tables that are not of these tars are data of another kind.
        let both = ["00000.tar", "00000_stats.json", "00001.parquet"];
        check(&both, "tar: 00000.tar; parquet: 00001.parquet", 0);
        let (found, _) = sorted(&both, Some(FileKind::Tar));
        assert_eq!(found, "tar: 00000.tar");
        check(&["a.parquet", "a.tar"], "tar: a.tar; parquet: a.parquet", 0);
    }

    #[test]
    fn what_cannot_be_read_is_counted_by_its_extension() {
        let names = [
            "a.HEIC",
            "b/c.heic",
            "d.avif",
            "e.jxl",
            "f.jpg",
            "g.tar.zst",
            "h.zst",
        ];
        let (found, left_out) = sorted(&names, None);
        assert_eq!(found, "image: f.jpg");
        let text = "files of kinds that cannot be read: 1 .avif, 2 .heic, 1 .jxl, 1 .tar.zst";
        assert_eq!(left_out.to_string(), text);
    }

    #[test]
    fn a_kind_shows_by_the_name() {
        for (name, kind) in [
            ("a/b.TAR.GZ", Some(FileKind::Tar)),
            ("b.tgz", Some(FileKind::Tar)),
            ("b.gz", None),
            ("b.pjpeg", Some(FileKind::Image)),
            ("b.JFIF", Some(FileKind::Image)),
            ("tar", None),
            ("a/part-0.PARQ", Some(FileKind::Parquet)),
            ("b.snappy.pq", Some(FileKind::Parquet)),
            ("pq", None),
            ("b.feather", Some(FileKind::Arrow)),
        ] {
            assert_eq!(kind_of(name), kind, "{name}");
        }
        let (found, _) = sorted(&["a", "b.tar", "c.txt"], Some(FileKind::Tar));
        assert_eq!(found, "tar: a b.tar");
    }
}
