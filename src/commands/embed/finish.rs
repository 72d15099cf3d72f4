//! Check that all parts of a job exist, and the summary of the whole dataset.

use std::collections::BTreeMap;
use std::io::Write;
use std::time::Instant;

use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::JobEnded;
use super::history::{PartHistory, histories};
use super::journal::{self, JobManifest, ModelFact, PartId};
use super::recorded::RecordedParts;
use super::report::{self, Report};
use super::sink::Sink;
use crate::files::hex;

/// Path of the summary of all parts, written once they exist, and removed when a
/// job goes on.
pub(super) const SUMMARY: &str = "_imagegpt/summary.json";
/// Missing parts that the error of `--finish` names.
const MISSING_SHOWN: usize = 10;

/// Summary of a whole dataset; the same whatever runs and shares produced it.
#[derive(Debug, Serialize)]
pub(super) struct DatasetSummary {
    model: ModelFact,
    options: BTreeMap<String, String>,
    images: u64,
    rows: u64,
    errors: u64,
    parts: usize,
    /// SHA-256 over the digests and names of all files, in the order of the
    /// parts.
    pub(super) sha256: String,
}

pub(super) async fn finish_alone(sink: &Sink, out: &mut impl Write) -> anyhow::Result<JobEnded> {
    let started = Instant::now();
    match finish(sink).await {
        Ok(summary) => {
            report::warn_of_no_rows(summary.rows, summary.errors, sink);
            report::say(&report_of(&summary, sink, started), out)?;
            Ok(JobEnded::Done)
        }
        Err(error) if error.is::<NotBegun>() => Err(error),
        // Parts are missing, or the bucket is unavailable.
        Err(error) => {
            tracing::error!("{error:#}");
            Ok(JobEnded::Failed)
        }
    }
}

/// Makes the report of a whole dataset, in which this run has done nothing but
/// look.
fn report_of<'a>(summary: &'a DatasetSummary, sink: &Sink, started: Instant) -> Report<'a> {
    Report {
        outcome: JobEnded::Done,
        reason: None,
        output: sink.to_string(),
        share: "0/1".to_owned(),
        model: &summary.model,
        images: summary.images,
        rows: summary.rows,
        errors: summary.errors,
        parts: summary.parts,
        images_this_run: 0,
        errors_this_run: 0,
        seconds: started.elapsed().as_secs_f64(),
        images_per_second: 0.0,
        left_out: None,
        finished: true,
        sha256: Some(summary.sha256.clone()),
    }
}

/// Error of an output in which no job has begun, so that there is nothing to
/// finish.
#[derive(Debug, thiserror::Error)]
#[error("--output {output} has no manifest: no `imagegpt embed` has begun there")]
struct NotBegun {
    output: String,
}

/// Error of an output in which parts are missing.
#[derive(Debug, thiserror::Error)]
#[error(
    "--output {output} is not complete; missing: {}; run the jobs of these parts again",
    missing.join(", ")
)]
struct Incomplete {
    output: String,
    missing: Vec<String>,
}

/// Checks that all parts exist, and writes the summary.
pub(super) async fn finish(sink: &Sink) -> anyhow::Result<DatasetSummary> {
    let manifest = JobManifest::read(sink).await?.ok_or_else(|| NotBegun {
        output: sink.to_string(),
    })?;
    let records = RecordedParts::read(sink, |_| true).await?.whole;
    let mut missing = Vec::new();
    for shard in 0..manifest.shards {
        let done = journal::done(&records, shard);
        if done.last().is_none_or(|last| last.next.is_some()) {
            let first = PartId::of(shard, done.len());
            missing.push(format!("part {first} and the rest of its shard"));
        }
    }
    let parts = histories(&records, 0..manifest.shards);
    let begun = parts.iter().filter(|part| part.is_being_retried());
    missing.extend(begun.map(|part| format!("the rest of the retry of part {}", part.base.id)));
    if !missing.is_empty() {
        let more = missing.len().saturating_sub(MISSING_SHOWN);
        missing.truncate(MISSING_SHOWN);
        if more > 0 {
            missing.push(format!("and {more} more"));
        }
        return Err(Incomplete {
            output: sink.to_string(),
            missing,
        }
        .into());
    }
    let images: u64 = parts.iter().map(PartHistory::images).sum();
    let errors: u64 = parts.iter().map(PartHistory::errors).sum();
    let mut digest = Sha256::new();
    for file in parts.iter().flat_map(PartHistory::files) {
        digest.update(format!("{} {}\n", file.sha256, file.name));
    }
    let summary = DatasetSummary {
        model: manifest.model,
        options: manifest.options,
        images,
        rows: images - errors,
        errors,
        parts: parts.len(),
        sha256: hex(&digest.finalize()),
    };
    let mut text = serde_json::to_string_pretty(&summary)?;
    text.push('\n');
    sink.write(SUMMARY, text.into()).await?;
    Ok(summary)
}
