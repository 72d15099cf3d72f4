//! Records of an output held against its files.
//!
//! A kill can leave files of a part that has no record, and error files whose
//! lines a finished retry has taken over; somebody may have deleted files of a
//! recorded part. All of these are put right before a job goes on.

use std::collections::{BTreeMap, BTreeSet};

use super::history::{PartHistory, all_histories};
use super::journal::{PartId, Record};
use super::sink::Sink;

/// Names that files of parts begin with, before the part's number.
const PREFIXES: [&str; 4] = ["part-", "img_emb_", "metadata_", "errors-"];
/// Extensions of files of parts.
const EXTENSIONS: [&str; 4] = ["parquet", "arrow", "npy", "jsonl"];

/// Records of parts, by whether their files exist.
#[derive(Debug, Default)]
pub(super) struct RecordedParts {
    /// Records of parts whose files all exist with the size that was written.
    pub(super) whole: BTreeMap<PartId, Record>,
    /// Records of parts of which a file is missing or changed, with all their
    /// retries: such a part is done again.
    lost: Vec<Record>,
}

impl RecordedParts {
    /// Reads the records of the shards for which `wanted` is true.
    pub(super) async fn read(sink: &Sink, wanted: impl Fn(usize) -> bool) -> anyhow::Result<Self> {
        let mut records = Record::read_all(sink, wanted).await?;
        let named = records.values().flat_map(|record| &record.files);
        let folders: BTreeSet<String> = named
            .map(|file| file.name.rsplit_once('/').map_or("", |(folder, _)| folder))
            .map(str::to_owned)
            .collect();
        let there = files(sink, &folders).await?;
        let mut kept = BTreeSet::new();
        // Parts after a gap are done again with the parts before them, since only
        // these say where they begin.
        let mut gap = None;
        for history in all_histories(&records) {
            let PartId { shard, part, .. } = history.base.id;
            let is_first = part == 0;
            let follows = is_first || kept.contains(&PartId::of(shard, part - 1));
            if !follows {
                gap.get_or_insert(history.base.id);
                continue;
            }
            let is_there = history
                .files()
                .iter()
                .all(|file| there.get(&file.name) == Some(&file.bytes));
            if is_there {
                kept.extend(history.records().iter().map(|record| record.id));
            } else {
                tracing::warn!(
                    "files of part {} are missing or were changed; the part must be done again",
                    history.base.id
                );
            }
        }
        if let Some(part) = gap {
            tracing::warn!("a part before part {part} has no record; they are done again");
        }
        let lost = records.extract_if(.., |id, _| !kept.contains(id));
        let lost = lost.map(|(_, record)| record).collect();
        Ok(Self {
            whole: records,
            lost,
        })
    }

    /// Removes what no record of a whole part names, of the shards for which
    /// `is_ours` is true: the next run may give such a part other files. Looks
    /// into `folders`, in which the job writes.
    pub(super) async fn tidy(
        &self,
        sink: &Sink,
        folders: &BTreeSet<String>,
        is_ours: impl Fn(usize) -> bool,
    ) -> anyhow::Result<()> {
        for record in &self.lost {
            record.remove(sink).await?;
        }
        let is_unknown = |id: PartId| is_ours(id.shard) && !self.whole.contains_key(&id);
        for name in files(sink, folders).await?.keys() {
            if part_of(name).is_some_and(is_unknown) {
                sink.remove(name).await?;
            }
        }
        remove_superseded(sink, &self.whole).await
    }
}

/// Returns the name of a file in `folders` that is called like one of a part, for
/// an output in which no job has begun.
pub(super) async fn foreign_part(
    sink: &Sink,
    folders: &BTreeSet<String>,
) -> anyhow::Result<Option<String>> {
    let there = files(sink, folders).await?;
    Ok(there.into_keys().find(|name| part_of(name).is_some()))
}

/// Removes error files whose lines are in those of a finished retry.
pub(super) async fn remove_superseded(
    sink: &Sink,
    records: &BTreeMap<PartId, Record>,
) -> anyhow::Result<()> {
    let histories = all_histories(records);
    let mut superseded = histories.iter().flat_map(PartHistory::superseded);
    let Some(first) = superseded.next() else {
        return Ok(());
    };
    let there = files(sink, &BTreeSet::from(["errors".to_owned()])).await?;
    for file in std::iter::once(first).chain(superseded) {
        if there.contains_key(&file.name) {
            sink.remove(&file.name).await?;
        }
    }
    Ok(())
}

/// Lists the files of directories of the output, with their sizes.
async fn files(sink: &Sink, folders: &BTreeSet<String>) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut files = BTreeMap::new();
    for folder in folders {
        for (name, bytes) in sink.list(folder).await? {
            let name = if folder.is_empty() {
                name
            } else {
                format!("{folder}/{name}")
            };
            files.insert(name, bytes);
        }
    }
    Ok(files)
}

/// Returns the number of the part that a file belongs to by its name.
fn part_of(name: &str) -> Option<PartId> {
    let name = name.rsplit('/').next()?;
    let (stem, extension) = name.rsplit_once('.')?;
    let mut prefixes = PREFIXES
        .into_iter()
        .filter(|_| EXTENSIONS.contains(&extension));
    prefixes.find_map(|prefix| {
        let number = stem.strip_prefix(prefix)?;
        PartId::parse(number).filter(|id| id.to_string() == number)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_of_parts_by_their_names() {
        let check = |name: &str, expected: Option<&str>| {
            let got = part_of(name).map(|id| id.to_string());
            assert_eq!(got.as_deref(), expected, "{name}");
        };
        check("part-00003-00001.parquet", Some("00003-00001"));
        check("img_emb_8/img_emb_00003-00001.npy", Some("00003-00001"));
        check("metadata/metadata_00003-00001.parquet", Some("00003-00001"));
        check(
            "errors/errors-00003-00001-retry2-00000.jsonl",
            Some("00003-00001-retry2-00000"),
        );
        for name in [
            "part-00003.parquet",
            "part-00003-00001.parquet.crc",
            "errors/unfinished-00003-00001.jsonl",
            "notes-00003-00001.parquet",
            "part-a-b.arrow",
            "part-0-1.parquet",
        ] {
            check(name, None);
        }
    }
}
