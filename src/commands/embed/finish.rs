//! Whether all parts are there, and what they are together.

use std::collections::BTreeMap;
use std::io::Write;

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::JobEnded;
use super::journal::{self, JobManifest, ModelFact, PartId, Record};
use super::sink::Sink;
use crate::files::hex;

/// A summary of all parts, once they are there.
const SUMMARY: &str = "_imagegpt/summary.json";
/// Parts that `--finish` names when they are missing.
const MISSING_SHOWN: usize = 10;

/// What is known of a whole dataset; the same however it came about.
#[derive(Debug, Serialize)]
pub(super) struct DatasetSummary {
    model: ModelFact,
    options: BTreeMap<String, String>,
    images: u64,
    rows: u64,
    errors: u64,
    parts: usize,
    /// Over the digests of all files, by name.
    sha256: String,
}

/// Records whose files are all there, as large as they were written. Whatever
/// somebody has deleted is done again.
pub(super) async fn only_with_files(
    sink: &Sink,
    mut records: BTreeMap<PartId, Record>,
) -> anyhow::Result<BTreeMap<PartId, Record>> {
    let there = files(sink).await?;
    records.retain(|id, record| {
        let whole = record
            .files
            .iter()
            .all(|file| there.get(&file.name) == Some(&file.bytes));
        if !whole {
            tracing::warn!("files of part {id} are missing or were changed; it is done again");
        }
        whole
    });
    Ok(records)
}

/// All files of the output, with their sizes.
async fn files(sink: &Sink) -> anyhow::Result<BTreeMap<String, u64>> {
    let mut files = BTreeMap::new();
    for folder in ["", "errors", "img_emb", "metadata"] {
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

pub(super) async fn finish_alone(sink: &Sink, out: &mut impl Write) -> anyhow::Result<JobEnded> {
    match finish(sink).await {
        Ok(summary) => {
            super::say(&summary, out)?;
            Ok(JobEnded::Done)
        }
        Err(error) if error.is::<NotBegun>() => Err(error),
        // Parts that are missing, or a bucket that is away.
        Err(error) => {
            tracing::error!("{error:#}");
            Ok(JobEnded::Failed)
        }
    }
}

/// There is nothing to finish.
#[derive(Debug, thiserror::Error)]
#[error("{output} has no manifest: no `imagegpt embed` has begun there")]
struct NotBegun {
    output: String,
}

/// Parts are missing.
#[derive(Debug, thiserror::Error)]
#[error("{output} is not whole: {}; run their jobs again", missing.join(", "))]
struct Incomplete {
    output: String,
    missing: Vec<String>,
}

/// Checks that all parts are there, and writes the summary.
pub(super) async fn finish(sink: &Sink) -> anyhow::Result<DatasetSummary> {
    let manifest = JobManifest::read(sink).await?.ok_or_else(|| NotBegun {
        output: sink.to_string(),
    })?;
    let records = Record::read_all(sink, |_| true).await?;
    let records = only_with_files(sink, records).await?;
    let mut missing = Vec::new();
    let mut whole = Vec::new();
    for shard in 0..manifest.shards {
        let done = journal::done(&records, shard);
        if done.last().is_none_or(|last| last.next.is_some()) {
            let part = done.len();
            missing.push(format!("part {} and what follows", PartId { shard, part }));
        }
        whole.extend(done);
    }
    if !missing.is_empty() {
        let more = missing.len().saturating_sub(MISSING_SHOWN);
        missing.truncate(MISSING_SHOWN);
        if more > 0 {
            missing.push(format!("and {more} more shards"));
        }
        return Err(Incomplete {
            output: sink.to_string(),
            missing,
        }
        .into());
    }
    let images: u64 = whole.iter().map(|record| record.images).sum();
    let errors: u64 = whole.iter().map(|record| record.errors).sum();
    let mut digest = Sha256::new();
    for file in whole.iter().flat_map(|record| &record.files) {
        digest.update(format!("{} {}\n", file.sha256, file.name));
    }
    let summary = DatasetSummary {
        model: manifest.model,
        options: manifest.options,
        images,
        rows: images - errors,
        errors,
        parts: whole.len(),
        sha256: hex(&digest.finalize()),
    };
    let mut text = serde_json::to_string_pretty(&summary)?;
    text.push('\n');
    sink.write(SUMMARY, text.into()).await?;
    Ok(summary)
}
