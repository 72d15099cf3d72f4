//! Plan of the input: converts the command line's inputs into shards, always in
//! the same order.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::sync::Arc;

use anyhow::Context as _;
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

use super::finding::{FileKind, FoundData, LeftOut, bare_tars, extension, named_kind, sort_out};
use super::hub::{self, HubError};
use super::identity::{identity, is_inside};
use super::input::Listing;
use super::lists::{comma_rows, json_rows, lines, name_empty_rows, tab_rows};
use super::location::{
    ListedObject, Location, ReadError, Stores, expand, fault, is_lasting, scheme_of,
};
use super::names::{NamedInput, above, distinguish};
use crate::client::pool::ImageFault;
use crate::files::{Trouble, hex};

/// Largest list, which is read whole. More lines would take more memory than a
/// job should, and a directory or Parquet serves as well.
const LIST_BYTES_MAX: u64 = 4 << 30;
/// Shard: a piece of the input that one job reads from its beginning to its
/// end.
#[derive(Debug, Clone)]
pub(super) struct Shard {
    /// Name for people and for the error file.
    pub(super) name: String,
    /// Size of the shard, to compare shards by when progress is shown.
    pub(super) bytes: u64,
    /// Beginning of the ids: of a table its name, before the number of the row;
    /// of tars and files what stands before each id.
    pub(super) id_base: String,
    pub(super) kind: ShardKind,
}

impl Shard {
    /// True if the shard may have a column of URLs.
    fn has_columns(&self) -> bool {
        match &self.kind {
            ShardKind::Parquet(_) | ShardKind::Arrow(_) | ShardKind::Lost(_) => true,
            ShardKind::WebDataset(_) => false,
            // A list without columns is refused when it is read.
            ShardKind::Files { listing, .. } => !listing.is_tree(),
        }
    }

    /// True if version 1 of the manifest gave the shard's images the same ids.
    /// Versions of that time lost images of some tars, in parts that are done.
    fn has_ids_of_version_1(&self) -> bool {
        match self.kind {
            ShardKind::Parquet(_) | ShardKind::Arrow(_) => !self.id_base.contains('/'),
            ShardKind::WebDataset(_) => false,
            ShardKind::Files { .. } => self.id_base.is_empty(),
            ShardKind::Lost(_) => true,
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
    inputs: Vec<NamedInput>,
    /// True if a list has ids of its own, which version 1 of the manifest left
    /// out.
    has_listed_ids: bool,
    /// Files of directories that are not read.
    pub(super) left_out: LeftOut,
}

/// Options for the plan of the inputs.
pub(super) struct PlanOptions<'a> {
    pub(super) part_items: usize,
    pub(super) keep: &'a [String],
    pub(super) image_column: Option<&'a str>,
    pub(super) url_column: Option<&'a str>,
    pub(super) id_column: Option<&'a str>,
    /// Kind of the files to read.
    pub(super) kind: Option<FileKind>,
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
        inputs: Vec::new(),
        has_listed_ids: false,
        left_out: LeftOut::default(),
    };
    for (location, facts) in located(inputs, stores, options).await? {
        plan.facts.extend(facts);
        plan.input(&location, stores, options).await?;
    }
    let without = plan.shards.iter().find(|shard| !shard.has_columns());
    if options.url_column.is_some()
        && let Some(shard) = without
    {
        anyhow::bail!(
            "--url-column: {} has no columns; give a .parquet, .arrow, .csv, .tsv or .jsonl file",
            shard.name
        );
    }
    distinguish(&plan.inputs, &mut plan.shards)?;
    anyhow::ensure!(
        !plan.shards.is_empty(),
        "the inputs contain no images: {}",
        inputs.join(" ")
    );
    Ok(plan)
}

/// Locates all inputs, each with the facts that are known of it.
///
/// # Errors
///
/// When an input is named twice, whatever its spellings are.
async fn located(
    inputs: &[String],
    stores: &Stores,
    options: &PlanOptions<'_>,
) -> anyhow::Result<Vec<(Location, Vec<Fact>)>> {
    let mut named: HashMap<String, String> = HashMap::new();
    let mut located = Vec::new();
    for input in inputs {
        for name in names(input)? {
            let (same, location, facts) = if hub::is_hub(&name) {
                let input = hub::open(&name, options).await?;
                (input.identity(), input.location, input.facts)
            } else {
                let location = stores.locate(&name)?;
                (identity(&location), location, Vec::new())
            };
            if let Some(before) = named.insert(same, name.clone()) {
                let before = if before == name {
                    String::new()
                } else {
                    format!(" (also as {before})")
                };
                anyhow::bail!(
                    "the inputs name {name} twice{before}, and its images would have the same ids \
                     twice; name it once"
                );
            }
            located.push((location, facts));
        }
    }
    Ok(located)
}

/// Returns the names that an input stands for. A path that exists is meant as
/// it is, whatever braces it has.
fn names(input: &str) -> anyhow::Result<Vec<String>> {
    let is_path = scheme_of(input).is_none() && std::fs::symlink_metadata(input).is_ok();
    if is_path {
        return Ok(vec![input.to_owned()]);
    }
    expand(input)
}

/// True for the error of a bucket that does not let the file itself be looked
/// at; the files below it may be allowed.
fn is_denied(error: &anyhow::Error) -> bool {
    use object_store::Error::{PermissionDenied, Unauthenticated};
    let denied = |error: &object_store::Error| {
        matches!(error, PermissionDenied { .. } | Unauthenticated { .. })
    };
    error.downcast_ref().is_some_and(denied)
}

/// True if the same command finds the same error: the input is wrong, and not
/// only away.
pub(super) fn stays(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| match cause.downcast_ref() {
        Some(ReadError::Store(error)) => is_lasting(error),
        Some(_) => false,
        None => {
            cause.downcast_ref().is_some_and(is_lasting)
                || cause.downcast_ref().is_some_and(HubError::is_lasting)
        }
    })
}

impl InputPlan {
    /// Describes how the inputs are taken: how many of each kind.
    pub(super) fn kinds(&self) -> String {
        let mut kinds: BTreeMap<&str, (u64, Option<u64>)> = BTreeMap::new();
        let data = self.facts.iter().filter(|fact| fact.kind != hub::COMMIT);
        for fact in data {
            let kind = match fact.kind.as_str() {
                "folder" => "directory of images",
                "list" => "list of images",
                kind => kind,
            };
            let (inputs, items) = kinds.entry(kind).or_default();
            *inputs += 1;
            if let Some(more) = fact.items {
                *items = Some(items.unwrap_or_default() + more);
            }
        }
        let kinds = kinds.into_iter().map(|(kind, (inputs, items))| {
            let items = items.map_or_else(String::new, |items| format!(" ({items} images)"));
            format!("{inputs} {kind}{items}")
        });
        kinds.collect::<Vec<_>>().join(", ")
    }

    /// True if version 1 of the manifest gave all images the same ids.
    pub(super) fn has_ids_of_version_1(&self) -> bool {
        !self.has_listed_ids && self.shards.iter().all(Shard::has_ids_of_version_1)
    }

    /// Adds the shards of one input.
    async fn input(
        &mut self,
        location: &Location,
        stores: &Arc<Stores>,
        options: &PlanOptions<'_>,
    ) -> anyhow::Result<()> {
        let first = self.shards.len();
        let base = match location.stat().await {
            Ok(Some(entry)) => {
                self.file(location, &entry, stores, options).await?;
                location.parent()
            }
            Ok(None) => match location.trouble()? {
                None | Some(Trouble::Folder) => {
                    self.folder(location, options).await?;
                    location.clone()
                }
                Some(trouble) => anyhow::bail!("{location}: {trouble}"),
            },
            // Whoever may list a prefix and read below it is told "forbidden"
            // when the prefix itself is looked at.
            Err(denied) if is_denied(&denied) => {
                let listed = self.folder(location, options).await;
                // The listing's answer has the reason in words.
                listed.map_err(|error| if stays(&error) { error } else { denied })?;
                location.clone()
            }
            Err(error) => return Err(error),
        };
        self.inputs.push(NamedInput {
            base,
            shards: first..self.shards.len(),
        });
        Ok(())
    }

    async fn file(
        &mut self,
        location: &Location,
        entry: &ListedObject,
        stores: &Arc<Stores>,
        options: &PlanOptions<'_>,
    ) -> anyhow::Result<()> {
        let extension = extension(&entry.name).to_ascii_lowercase();
        let kind = named_kind(location, entry, options.kind).await?;
        if let Some((kind, shard)) = kind.and_then(|kind| Some((kind, shard_kind(kind, location)?)))
        {
            // A shard that the command line names must be readable; it does not
            // become an error among others.
            if let Some(trouble) = location.trouble()? {
                anyhow::bail!("{location}: {trouble}");
            }
            self.shard(location, entry, kind, shard);
            return Ok(());
        }
        let mut has_columns = true;
        let mut rows = match extension.as_str() {
            "csv" => {
                let text = &list(location).await?;
                comma_rows(text, options).with_context(|| location.to_string())?
            }
            "tsv" | "tab" => {
                let text = &list(location).await?;
                tab_rows(text, options).with_context(|| location.to_string())?
            }
            "jsonl" | "ndjson" => {
                let text = &list(location).await?;
                json_rows(text, options).with_context(|| location.to_string())?
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
                has_columns = false;
                lines(&list(location).await?)
            }
            _ => anyhow::bail!(
                "{location} has a file type that cannot be read; give a directory, .tar, .parquet, \
                 .arrow, or a list of images in .txt, .csv, .tsv or .jsonl"
            ),
        };
        name_empty_rows(&mut rows, location.file_name());
        self.has_listed_ids |= has_columns && options.id_column.is_some();
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
        anyhow::ensure!(
            !is_inside(options.output, folder),
            "--output {} lies inside the input {folder}, and the next run would read its own \
             output; give an --output elsewhere",
            options.output
        );
        let FoundData {
            mut by_kind,
            mut may_be_folders,
            bare,
            left_out,
        } = sort_out(folder.list().await?, options.kind);
        self.left_out.add(&left_out);
        if options.kind.is_none() && by_kind.keys().all(|kind| *kind == FileKind::Tar) {
            let tars = bare_tars(folder, bare).await?;
            if !tars.is_empty() {
                let entries = by_kind.entry(FileKind::Tar).or_default();
                entries.extend(tars);
                entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
            }
        }
        let kinds: Vec<String> = by_kind.keys().map(FileKind::to_string).collect();
        anyhow::ensure!(
            kinds.len() <= 1,
            "{folder} contains files of several kinds ({}); choose one with --kind, or name the \
             files to read",
            kinds.join(", ")
        );
        let Some((kind, mut entries)) = by_kind.pop_first() else {
            let besides = if left_out.is_empty() {
                String::new()
            } else {
                format!("; it has {left_out}")
            };
            if let Some(kind) = options.kind {
                anyhow::bail!("--kind {kind}: {folder} has no files of this kind{besides}");
            }
            if matches!(folder, Location::Local(_)) {
                anyhow::bail!("{folder} is a directory without images or shards{besides}");
            }
            anyhow::bail!(
                "{folder} does not exist: there is no such file, and no directory with images or \
                 shards{besides}"
            );
        };
        if !may_be_folders.is_empty() {
            entries.append(&mut may_be_folders);
            entries.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        }
        if kind != FileKind::Image {
            return self.shards(folder, kind, &entries);
        }
        self.images(folder, entries, options)
    }

    /// Adds a directory of images.
    fn images(
        &mut self,
        folder: &Location,
        entries: Vec<ListedObject>,
        options: &PlanOptions<'_>,
    ) -> anyhow::Result<()> {
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
    fn shards(
        &mut self,
        folder: &Location,
        kind: FileKind,
        entries: &[ListedObject],
    ) -> anyhow::Result<()> {
        for entry in entries {
            let location = folder.join(&entry.name);
            let trouble = match &entry.trouble {
                Some(trouble) => Some(trouble.clone()),
                None => location.trouble()?.as_ref().map(fault),
            };
            let shard = match trouble {
                Some(fault) => Some(ShardKind::Lost(ImageFault {
                    message: format!("the whole file is skipped: {}", fault.message),
                    ..fault
                })),
                None => shard_kind(kind, &location),
            };
            if let Some(shard) = shard {
                self.shard(&location, entry, kind, shard);
            }
        }
        Ok(())
    }

    fn shard(
        &mut self,
        location: &Location,
        entry: &ListedObject,
        kind: FileKind,
        shard: ShardKind,
    ) {
        self.facts.push(Fact {
            name: location.to_string(),
            kind: fact_kind(kind, &entry.name),
            items: None,
            bytes: entry.bytes,
            version: entry.version.clone(),
        });
        self.shards.push(Shard {
            name: location.to_string(),
            bytes: entry.bytes,
            id_base: match &shard {
                ShardKind::WebDataset(_) => above(&entry.name).to_owned(),
                _ => entry.name.clone(),
            },
            kind: shard,
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
                id_base: String::new(),
                kind: ShardKind::Files {
                    listing: Arc::clone(listing),
                    range,
                },
            });
        }
    }
}

/// Returns the kind that the manifest records.
fn fact_kind(kind: FileKind, name: &str) -> String {
    match kind {
        FileKind::Arrow => extension(name).to_ascii_lowercase(),
        kind => kind.to_string(),
    }
}

fn shard_kind(kind: FileKind, location: &Location) -> Option<ShardKind> {
    let location = location.clone();
    match kind {
        FileKind::Tar => Some(ShardKind::WebDataset(location)),
        FileKind::Parquet => Some(ShardKind::Parquet(location)),
        FileKind::Arrow => Some(ShardKind::Arrow(location)),
        FileKind::Image => None,
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

#[cfg(test)]
mod tests {
    use super::*;

    async fn planned(inputs: &[String], keep: &[String]) -> anyhow::Result<InputPlan> {
        let options = PlanOptions {
            part_items: 2,
            keep,
            image_column: None,
            url_column: None,
            id_column: None,
            kind: None,
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
}
