//! Plan of the input: converts the command line's inputs into shards, always in
//! the same order.

mod jsonl;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::hub;
use super::input::{ListedRow, Listing};
use super::location::{ListedObject, Location, Stores, expand, fault};
use crate::client::pool::ImageFault;
use crate::files::{IMAGES, Trouble, hex};

/// Largest list, which is read whole. More lines would take more memory than a
/// job should, and a directory or Parquet serves as well.
const LIST_BYTES_MAX: u64 = 4 << 30;
/// Columns of a CSV that may hold the paths, in the order of preference.
const PATH_COLUMNS: [&str; 7] = [
    "path",
    "image",
    "file",
    "filename",
    "file_name",
    "image_path",
    "url",
];

/// Shard: a piece of the input that one job reads from its beginning to its
/// end.
#[derive(Debug, Clone)]
pub(super) struct Shard {
    /// Name for people and for the error file.
    pub(super) name: String,
    /// Size of the shard, to compare shards by when progress is shown.
    pub(super) bytes: u64,
    pub(super) kind: ShardKind,
}

impl Shard {
    /// True if the shard may have a column of URLs.
    fn has_columns(&self) -> bool {
        match &self.kind {
            ShardKind::Parquet(_) | ShardKind::Arrow(_) | ShardKind::Lost(_) => true,
            ShardKind::WebDataset(_) => false,
            ShardKind::Files { listing, .. } => match listing.as_ref() {
                Listing::Tree { .. } => false,
                // A list without columns is refused when it is read.
                Listing::List { .. } => true,
            },
        }
    }
}

#[derive(Debug, Clone)]
pub(super) enum ShardKind {
    /// Run of files, as many as one part of the output has.
    Files {
        listing: Arc<Listing>,
        range: Range<usize>,
    },
    WebDataset(Location),
    Parquet(Location),
    Arrow(Location),
    /// Shard of a directory that cannot be read: one error stands for all
    /// images that the shard may hold.
    Lost(ImageFault),
}

/// Facts about an input that the manifest records, so that a change is noticed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Fact {
    pub(super) name: String,
    pub(super) kind: String,
    /// Number of files in a directory, or of lines in a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) items: Option<u64>,
    pub(super) bytes: u64,
    /// Entity tag, time of the last change, or a digest over the versions of
    /// many files.
    pub(super) version: String,
}

#[derive(Debug)]
pub(super) struct InputPlan {
    pub(super) shards: Vec<Shard>,
    pub(super) facts: Vec<Fact>,
}

/// Options for the plan of the inputs.
pub(super) struct PlanOptions<'a> {
    pub(super) part_items: usize,
    pub(super) keep: &'a [String],
    pub(super) image_column: Option<&'a str>,
    pub(super) url_column: Option<&'a str>,
    /// Location of the output, which must not become input.
    pub(super) output: &'a str,
    /// Inputs of the manifest, if the job has begun before.
    pub(super) began: &'a [Fact],
}

/// Lists all inputs and divides them into shards.
///
/// # Errors
///
/// When an input is missing or has a type that cannot be read; the error names
/// the input.
pub(super) async fn plan(
    inputs: &[String],
    stores: &Arc<Stores>,
    options: &PlanOptions<'_>,
) -> anyhow::Result<InputPlan> {
    let mut plan = InputPlan {
        shards: Vec::new(),
        facts: Vec::new(),
    };
    for input in inputs {
        for name in expand(input)? {
            let location = if hub::is_hub(&name) {
                let input = hub::open(&name, options.began).await?;
                plan.facts.extend(input.facts);
                input.location
            } else {
                stores.locate(&name)?
            };
            match location.stat().await? {
                Some(entry) => plan.file(&location, &entry, stores, options).await?,
                None => match location.trouble()? {
                    None | Some(Trouble::Folder) => plan.folder(&location, options).await?,
                    Some(trouble) => anyhow::bail!("{location}: {trouble}"),
                },
            }
        }
    }
    let without = plan.shards.iter().find(|shard| !shard.has_columns());
    if options.url_column.is_some()
        && let Some(shard) = without
    {
        anyhow::bail!(
            "--url-column: {} has no columns; give a .parquet, .arrow, .csv or .jsonl file",
            shard.name
        );
    }
    anyhow::ensure!(
        !plan.shards.is_empty(),
        "the inputs contain no images: {}",
        inputs.join(" ")
    );
    Ok(plan)
}

fn extension(name: &str) -> String {
    let extension = name.rsplit_once('.').map_or("", |(_, last)| last);
    extension.to_ascii_lowercase()
}

impl InputPlan {
    async fn file(
        &mut self,
        location: &Location,
        entry: &ListedObject,
        stores: &Arc<Stores>,
        options: &PlanOptions<'_>,
    ) -> anyhow::Result<()> {
        let extension = extension(&entry.name);
        if let Some(kind) = shard_kind(&extension, location) {
            // A shard that the command line names must be readable; it does not
            // become an error among others.
            if let Some(trouble) = location.trouble()? {
                anyhow::bail!("{location}: {trouble}");
            }
            self.shard(location, entry, &extension, kind);
            return Ok(());
        }
        let mut rows = match extension.as_str() {
            "jsonl" | "ndjson" => {
                let text = &list(location).await?;
                jsonl::rows(text, options).with_context(|| location.to_string())?
            }
            "csv" => {
                let text = &list(location).await?;
                csv_rows(text, options).with_context(|| location.to_string())?
            }
            "txt" | "lst" | "list" => {
                anyhow::ensure!(
                    options.keep.is_empty(),
                    "--keep: {location} is a list of names without columns; give a CSV with columns"
                );
                anyhow::ensure!(
                    options.url_column.is_none(),
                    "--url-column: {location} is a list of names without columns; leave the flag \
                     out, or give a CSV with columns"
                );
                lines(&list(location).await?)
            }
            _ => anyhow::bail!(
                "{location} has a file type that cannot be read; give a directory, .tar, .parquet, \
                 .arrow, or a list of images in .txt, .csv or .jsonl"
            ),
        };
        name_empty_rows(&mut rows, location.file_name());
        self.facts.push(Fact {
            name: location.to_string(),
            kind: "list".to_owned(),
            items: Some(rows.len() as u64),
            bytes: entry.bytes,
            version: entry.version.clone(),
        });
        let n_rows = rows.len();
        let listing = Arc::new(Listing::List {
            stores: Arc::clone(stores),
            base: location.parent(),
            rows,
        });
        // The sizes of the files are unknown, so each file counts as one byte.
        self.files(&listing, n_rows, location, options, |range| {
            range.len() as u64
        });
        Ok(())
    }

    async fn folder(&mut self, folder: &Location, options: &PlanOptions<'_>) -> anyhow::Result<()> {
        let (inside, outside) = (format!("{}/", options.output), format!("{folder}/"));
        anyhow::ensure!(
            !inside.starts_with(&outside),
            "--output {} lies inside the input {folder}, and the next run would read its own \
             output; give an --output elsewhere",
            options.output
        );
        let mut by_kind: BTreeMap<&str, Vec<ListedObject>> = BTreeMap::new();
        let mut may_be_folders = Vec::new();
        for entry in folder.list().await? {
            if entry.may_be_folder {
                may_be_folders.push(entry);
                continue;
            }
            let extension = extension(&entry.name);
            let Some(kind) = kind_of(&extension) else {
                continue;
            };
            by_kind.entry(kind).or_default().push(entry);
        }
        let kinds: Vec<&str> = by_kind.keys().copied().collect();
        anyhow::ensure!(
            kinds.len() <= 1,
            "{folder} contains files of several kinds ({}); name the files to read",
            kinds.join(", ")
        );
        let Some((kind, mut entries)) = by_kind.pop_first() else {
            if matches!(folder, Location::Local(_)) {
                anyhow::bail!("{folder} is a directory without images or shards");
            }
            anyhow::bail!(
                "{folder} does not exist: there is no such file, and no directory with images or \
                 shards"
            );
        };
        if !may_be_folders.is_empty() {
            entries.append(&mut may_be_folders);
            entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        }
        if kind != "image" {
            return self.shards(folder, &entries);
        }
        anyhow::ensure!(
            options.keep.is_empty(),
            "--keep: {folder} is a directory of images, which has no columns"
        );
        let mut digest = Sha256::new();
        for entry in &entries {
            digest.update(format!(
                "{}\0{}\0{}\n",
                entry.name, entry.bytes, entry.version
            ));
        }
        self.facts.push(Fact {
            name: folder.to_string(),
            kind: "folder".to_owned(),
            items: Some(entries.len() as u64),
            bytes: entries.iter().map(|entry| entry.bytes).sum(),
            version: format!("sha256:{}", hex(&digest.finalize())),
        });
        let n_entries = entries.len();
        let listing = Arc::new(Listing::Tree {
            base: folder.clone(),
            entries,
        });
        let counted = Arc::clone(&listing);
        self.files(
            &listing,
            n_entries,
            folder,
            options,
            |range| match counted.as_ref() {
                Listing::Tree { entries, .. } => entries[range].iter().map(|e| e.bytes).sum(),
                Listing::List { .. } => 0,
            },
        );
        Ok(())
    }

    /// Adds the shards of a directory. A shard that cannot be read becomes an
    /// error.
    fn shards(&mut self, folder: &Location, entries: &[ListedObject]) -> anyhow::Result<()> {
        for entry in entries {
            let location = folder.join(&entry.name);
            let extension = extension(&entry.name);
            let trouble = match &entry.trouble {
                Some(trouble) => Some(trouble.clone()),
                None => location.trouble()?.as_ref().map(fault),
            };
            let kind = match trouble {
                Some(fault) => Some(ShardKind::Lost(ImageFault {
                    message: format!("the whole file is skipped: {}", fault.message),
                    ..fault
                })),
                None => shard_kind(&extension, &location),
            };
            if let Some(kind) = kind {
                self.shard(&location, entry, &extension, kind);
            }
        }
        Ok(())
    }

    fn shard(
        &mut self,
        location: &Location,
        entry: &ListedObject,
        kind_name: &str,
        kind: ShardKind,
    ) {
        self.facts.push(Fact {
            name: location.to_string(),
            kind: kind_name.to_owned(),
            items: None,
            bytes: entry.bytes,
            version: entry.version.clone(),
        });
        self.shards.push(Shard {
            name: location.to_string(),
            bytes: entry.bytes,
            kind,
        });
    }

    /// Cuts files into shards of one part each, so that several jobs can share
    /// them.
    fn files(
        &mut self,
        listing: &Arc<Listing>,
        length: usize,
        of: &Location,
        options: &PlanOptions<'_>,
        bytes: impl Fn(Range<usize>) -> u64,
    ) {
        for start in (0..length).step_by(options.part_items) {
            let range = start..(start + options.part_items).min(length);
            self.shards.push(Shard {
                name: format!("{of} [{}..{}]", range.start, range.end),
                bytes: bytes(range.clone()),
                kind: ShardKind::Files {
                    listing: Arc::clone(listing),
                    range,
                },
            });
        }
    }
}

/// Returns the kind of file that an extension shows, if files of this kind are
/// read from a directory.
fn kind_of(extension: &str) -> Option<&'static str> {
    Some(match extension {
        "tar" => "tar",
        "parquet" => "parquet",
        "arrow" | "feather" | "ipc" => "arrow",
        other if IMAGES.contains(&other) => "image",
        _ => return None,
    })
}

/// Returns the kind of a file of a directory by its name.
pub(super) fn kind_by_name(name: &str) -> Option<&'static str> {
    kind_of(&extension(name))
}

fn shard_kind(extension: &str, location: &Location) -> Option<ShardKind> {
    let location = location.clone();
    match extension {
        "tar" => Some(ShardKind::WebDataset(location)),
        "parquet" => Some(ShardKind::Parquet(location)),
        "arrow" | "feather" | "ipc" => Some(ShardKind::Arrow(location)),
        _ => None,
    }
}

async fn list(location: &Location) -> anyhow::Result<Bytes> {
    let content = location.read(LIST_BYTES_MAX).await;
    content
        .with_context(|| location.to_string())?
        .with_context(|| {
            format!(
                "the list {location} has over {LIST_BYTES_MAX} bytes, the limit; split the list"
            )
        })
}

/// Byte order mark, with which some editors begin a text.
const BYTE_ORDER_MARK: &[u8] = b"\xef\xbb\xbf";

fn lines(text: &[u8]) -> Vec<ListedRow> {
    let text = text.strip_prefix(BYTE_ORDER_MARK).unwrap_or(text);
    let lines = text.split(|&byte| byte == b'\n').map(<[u8]>::trim_ascii);
    lines
        .filter(|line| !line.is_empty())
        .map(|line| row(line, std::iter::empty()))
        .collect()
}

/// Makes the row of a line. A line that is not UTF-8 becomes an error.
fn row<'a>(name: &[u8], kept: impl Iterator<Item = &'a [u8]>) -> ListedRow {
    let mut is_text = true;
    let mut text = |bytes: &[u8]| {
        let text = String::from_utf8_lossy(bytes);
        is_text &= matches!(text, Cow::Borrowed(_));
        text.into_owned()
    };
    let (name, kept) = (text(name), kept.map(&mut text).collect());
    let fault = || {
        ImageFault::invalid(
            "this line of the list is not UTF-8; write the list in UTF-8".to_owned(),
        )
    };
    ListedRow {
        name,
        kept,
        trouble: (!is_text).then(fault),
    }
}

/// Returns the column that holds the paths, with the flag that names it.
fn path_column<'a>(options: &PlanOptions<'a>) -> Option<(&'static str, &'a str)> {
    let urls = options.url_column.map(|name| ("--url-column", name));
    urls.or(options.image_column.map(|name| ("--image-column", name)))
}

/// Makes rows without a path or URL into errors, whose ids are the numbers of
/// the rows.
fn name_empty_rows(rows: &mut [ListedRow], list: &str) {
    for (number, row) in rows.iter_mut().enumerate() {
        if !row.name.is_empty() {
            continue;
        }
        row.trouble.get_or_insert_with(|| {
            ImageFault::invalid("the row has neither a path nor a URL".to_owned())
        });
        row.name = format!("{list}#{number}");
    }
}

fn csv_rows(text: &[u8], options: &PlanOptions<'_>) -> anyhow::Result<Vec<ListedRow>> {
    let mut reader = csv::Reader::from_reader(text);
    let header = reader.headers()?.clone();
    let names = || header.iter().collect::<Vec<_>>().join(", ");
    let place = |name: &str| header.iter().position(|column| column == name);
    let path = match path_column(options) {
        Some((flag, name)) => place(name).with_context(|| {
            format!(
                "{flag} {name}: the list has no such column; its columns are {}",
                names()
            )
        })?,
        None => PATH_COLUMNS
            .iter()
            .find_map(|name| place(name))
            .with_context(|| {
                format!(
                    "no column is known to hold paths; the list's columns are {}; name one with \
                     --image-column",
                    names()
                )
            })?,
    };
    let keep = options.keep.iter().map(|name| {
        place(name).with_context(|| {
            format!(
                "--keep {name}: the list has no such column; its columns are {}",
                names()
            )
        })
    });
    let keep = keep.collect::<anyhow::Result<Vec<_>>>()?;
    let mut rows = Vec::new();
    for record in reader.byte_records() {
        let record = record?;
        let field = |place| record.get(place).unwrap_or_default();
        rows.push(row(field(path), keep.iter().map(|&place| field(place))));
    }
    Ok(rows)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn planned(inputs: &[String], keep: &[String]) -> anyhow::Result<InputPlan> {
        let options = PlanOptions {
            part_items: 2,
            keep,
            image_column: None,
            url_column: None,
            output: "/output",
            began: &[],
        };
        plan(inputs, &Arc::default(), &options).await
    }

    #[tokio::test]
    async fn what_an_input_is_shows_by_its_name_and_content() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, content: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(&path, content).unwrap();
            path.to_str().unwrap().to_owned()
        };
        for name in ["tree/a/1.png", "tree/b/2.JPG", "tree/3.png", "tree/x.txt"] {
            write(name, "x");
        }
        write("shards/00.tar", "x");
        write("shards/01.tar", "x");
        write("mixed/00.tar", "x");
        write("mixed/0.png", "x");
        let folder = |name: &str| dir.path().join(name).to_str().unwrap().to_owned();
        let shards = |plan: &InputPlan| {
            let last = |shard: &Shard| shard.name.rsplit('/').next().unwrap().to_owned();
            plan.shards.iter().map(last).collect::<Vec<_>>().join("; ")
        };

        let tree = planned(&[folder("tree")], &[]).await.unwrap();
        assert_eq!(shards(&tree), "tree [0..2]; tree [2..3]");
        assert_eq!(tree.facts[0].items, Some(3));
        write("tree/3.png", "xy");
        let changed = planned(&[folder("tree")], &[]).await.unwrap();
        assert_ne!(changed.facts, tree.facts);

        let tars = planned(&[folder("shards/{00..01}.tar")], &[])
            .await
            .unwrap();
        assert_eq!(shards(&tars), "00.tar; 01.tar");
        let tars = planned(&[folder("shards")], &[]).await.unwrap();
        assert_eq!(shards(&tars), "00.tar; 01.tar");

        let list = write("l.csv", "label,path\n1,a.png\n2,\"b,c.png\"\n3,d.png\n");
        let list = planned(&[list], &["label".to_owned()]).await.unwrap();
        assert_eq!(shards(&list), "l.csv [0..2]; l.csv [2..3]");

        let refused = async |input: String, keep: &[String], why: &str| {
            let error = planned(&[input], keep).await.unwrap_err();
            assert!(format!("{error:#}").contains(why), "{error:#}");
        };
        refused(folder("mixed"), &[], "several kinds (image, tar)").await;
        refused(folder("nowhere"), &[], "there is no such file").await;
        std::os::unix::fs::symlink("gone", dir.path().join("link")).unwrap();
        refused(folder("link"), &[], "it is a symbolic link whose target").await;
        let pipe = folder("pipe.txt");
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        refused(pipe, &[], "it is neither a file nor a directory").await;
        refused(String::new(), &[], "'' is neither a path").await;
        std::fs::create_dir(dir.path().join("empty")).unwrap();
        refused(folder("empty"), &[], "a directory without images").await;
        refused(write("a.zip", "x"), &[], "a file type that cannot be read").await;
        refused(folder("tree"), &["label".to_owned()], "has no columns").await;
        refused(
            write("m.csv", "a,b\n1,2\n"),
            &[],
            "no column is known to hold paths",
        )
        .await;
    }

    #[test]
    fn a_line_that_is_no_text_is_a_row_with_its_trouble() {
        let of = |rows: &[ListedRow]| -> Vec<(String, bool)> {
            let one = |row: &ListedRow| (row.name.clone(), row.trouble.is_some());
            rows.iter().map(one).collect()
        };
        let list = lines(b"\xef\xbb\xbfa.png\r\n\n b\xff.png\nc.png");
        let expected = [("a.png", false), ("b\u{fffd}.png", true), ("c.png", false)];
        let expected = expected.map(|(name, is_bad)| (name.to_owned(), is_bad));
        assert_eq!(of(&list), expected);
        let options = PlanOptions {
            part_items: 2,
            keep: &["label".to_owned()],
            image_column: None,
            url_column: None,
            output: "/output",
            began: &[],
        };
        let table = b"path,label\na.png,x\nb\xff.png,y\nc.png,\xff\n";
        let rows = csv_rows(table, &options).unwrap();
        assert_eq!(rows[1].kept, ["y"]);
        let is_bad: Vec<bool> = of(&rows).into_iter().map(|(_, is_bad)| is_bad).collect();
        assert_eq!(is_bad, [false, true, true]);
    }
}
