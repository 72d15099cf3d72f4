//! Report at the end of a job, for programs and for people.

use std::io::Write;

use serde::Serialize;

use super::JobEnded;
use super::finding::LeftOut;
use super::journal::ModelFact;
use super::sink::Sink;

/// JSON report at the end of the command, also with `--finish`.
#[derive(Debug, Serialize)]
pub(super) struct Report<'a> {
    pub(super) outcome: JobEnded,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) reason: Option<String>,
    pub(super) output: String,
    pub(super) share: String,
    pub(super) model: &'a ModelFact,
    /// Images in the finished parts of this share, of this run and the runs
    /// before.
    pub(super) images: u64,
    /// Rows in the tables of these parts: images without an error.
    pub(super) rows: u64,
    /// Errors in the finished parts of this share; after too many errors all
    /// that stand in error files, including those of unfinished parts.
    pub(super) errors: u64,
    pub(super) parts: usize,
    /// Images that have an outcome in this run. Those of parts that were not
    /// written will be done again.
    pub(super) images_this_run: u64,
    pub(super) errors_this_run: u64,
    pub(super) seconds: f64,
    pub(super) images_per_second: f64,
    /// Files of directories that were not read, if there are any.
    #[serde(flatten)]
    pub(super) left_out: Option<&'a LeftOut>,
    /// True if all shares are done and the dataset's summary is written.
    pub(super) finished: bool,
    /// SHA-256 of the dataset's summary.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) sha256: Option<String>,
}

/// Says plainly that a job whose images all failed has an empty output: its exit
/// code is that of a finished job.
pub(super) fn warn_of_no_rows(rows: u64, errors: u64, sink: &Sink) {
    if rows == 0 && errors > 0 {
        tracing::warn!(
            "no image has a row: all {errors} are errors, which are in {sink}/errors; \
             --max-errors makes such a job fail"
        );
    }
}

/// Prints the line of JSON. A failure to print does not change the outcome of
/// the job; the owner of `out` finds it out.
pub(super) fn say(report: &impl Serialize, out: &mut impl Write) -> anyhow::Result<()> {
    let line = serde_json::to_string(report)?;
    if let Err(error) = writeln!(out, "{line}") {
        tracing::error!("{error}");
    }
    Ok(())
}
