//! Rounds of `--retry-errors`: which parts have errors to try again, and which
//! of their rows.
//!
//! A round is begun by its note in the output, and is finished for a share when
//! each of its parts with such errors has been tried. A command that was killed
//! goes on with the round that it had begun; after that the same command begins
//! another one.

use std::collections::BTreeMap;

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use super::flags::{JobShare, RetryChoice};
use super::history::PartHistory;
use super::journal::{PartId, RetryPiece};
use super::sink::Sink;
use crate::client::pool::ImageFault;
use crate::proto::GrpcCode;

/// Directory of the notes of rounds.
const ROUNDS: &str = "_imagegpt/retries";
/// Error files that are read at the same time.
const AT_ONCE: usize = 16;

/// Error of a retry that cannot be done: repeating the command does not help.
#[derive(Debug, thiserror::Error)]
#[error("--retry-errors: {0}")]
pub(super) struct RetryRefused(String);

/// Note of a round.
#[derive(Debug, Serialize, Deserialize)]
struct RoundNote {
    /// Codes of the errors that the round tries again, or `all`.
    codes: Vec<String>,
}

/// Round to do: its number, and the parts that are left.
#[derive(Debug)]
pub(super) struct RetryRound {
    pub(super) number: u32,
    /// Parts to try again; none if there is nothing to try, or if the command that
    /// did the round was killed before its end.
    pub(super) parts: Vec<PartRetry>,
}

/// Part whose errors are tried again.
#[derive(Debug, Clone)]
pub(super) struct PartRetry {
    /// Number of the next piece.
    pub(super) id: PartId,
    /// Cursor of the part's first row in its shard.
    pub(super) cursor: u64,
    /// First row that the next piece may have.
    pub(super) from: u64,
    choice: RetryChoice,
    /// Rows that have error lines, in the order of the lines.
    rows: Vec<u64>,
    /// Files of the error lines.
    files: Vec<String>,
    /// True if the part is the last of its shard, and its last row is an error:
    /// the shard may have been cut off there, and may go on now.
    ends_with_error: bool,
}

/// Error line of a part, and whether it is tried again.
#[derive(Debug)]
pub(super) struct ErrorRow {
    pub(super) id: String,
    pub(super) fault: ImageFault,
    pub(super) is_tried: bool,
}

/// Error lines of a part by their rows.
#[derive(Debug)]
pub(super) struct ErrorRows {
    pub(super) lines: BTreeMap<u64, ErrorRow>,
    /// Row from which on all rows are read, since the shard was cut off there.
    pub(super) open_from: Option<u64>,
    last_tried: Option<u64>,
}

impl ErrorRows {
    /// True if nothing after a row is to be read.
    pub(super) fn is_last(&self, row: u64) -> bool {
        self.open_from.is_none() && self.last_tried.is_none_or(|last| row >= last)
    }
}

/// Finds the round that comes next for parts of one share: the first round that
/// is begun and not finished, or else a new one, whose note is written if there
/// is anything to try again.
///
/// # Errors
///
/// [`RetryRefused`] when the errors cannot be tried again by this command.
pub(super) async fn next_round(
    sink: &Sink,
    share: JobShare,
    choice: &RetryChoice,
    histories: &[PartHistory<'_>],
) -> anyhow::Result<RetryRound> {
    let mut number = 1;
    loop {
        let name = format!("{ROUNDS}/{number:05}.json");
        let Some(note) = sink.read(&name).await? else {
            break;
        };
        let note: RoundNote = serde_json::from_slice(&note)
            .with_context(|| format!("{sink}/{name} is not a note of imagegpt embed"))?;
        let begun = RetryChoice::of_names(&note.codes)
            .with_context(|| format!("{sink}/{name} names no codes"))?;
        let parts = unfinished(sink, number, &begun, histories).await?;
        if !parts.is_empty() {
            same_choice(number, &begun, choice)?;
            return Ok(RetryRound { number, parts });
        }
        // A command that was killed after the last part of its round ends the
        // round now, and begins no other.
        let is_mine = begun == *choice && histories.iter().any(|part| part.has_round(number));
        if is_mine && sink.read(&end_note(number, share)).await?.is_none() {
            return Ok(RetryRound { number, parts });
        }
        number += 1;
    }
    let parts = unfinished(sink, number, choice, histories).await?;
    if parts.is_empty() {
        return Ok(RetryRound { number, parts });
    }
    let codes = choice.names();
    let mut text = serde_json::to_string(&RoundNote { codes })?;
    text.push('\n');
    let name = format!("{ROUNDS}/{number:05}.json");
    if !sink.create(&name, text.into()).await? {
        // Another share has begun the round meanwhile.
        let note = sink.read(&name).await?.context("a note was deleted")?;
        let note: RoundNote = serde_json::from_slice(&note)?;
        let begun = RetryChoice::of_names(&note.codes).context("a note names no codes")?;
        same_choice(number, &begun, choice)?;
    }
    Ok(RetryRound { number, parts })
}

/// Name of the note that a share has ended a round.
fn end_note(number: u32, share: JobShare) -> String {
    let JobShare { index, of } = share;
    format!("{ROUNDS}/{number:05}-ended-{index}-of-{of}.json")
}

impl RetryRound {
    /// Notes that the share has ended the round, once its parts are done.
    pub(super) async fn end(&self, sink: &Sink, share: JobShare) -> anyhow::Result<()> {
        // A round that has not begun has no end.
        let begun = sink
            .read(&format!("{ROUNDS}/{:05}.json", self.number))
            .await?;
        if begun.is_some() {
            sink.write(&end_note(self.number, share), "{}\n".into())
                .await?;
        }
        Ok(())
    }
}

fn same_choice(number: u32, begun: &RetryChoice, now: &RetryChoice) -> Result<(), RetryRefused> {
    if begun == now {
        return Ok(());
    }
    let begun = begun.names().join(",");
    Err(RetryRefused(format!(
        "retry {number} of this job was begun with --retry-errors={begun} and is not finished; \
         finish it with these codes first"
    )))
}

/// Lists the parts that a round has not finished, with what is left of each.
async fn unfinished(
    sink: &Sink,
    round: u32,
    choice: &RetryChoice,
    histories: &[PartHistory<'_>],
) -> anyhow::Result<Vec<PartRetry>> {
    let mut parts = Vec::new();
    let mut cursor = 0;
    for history in histories {
        let base = history.base;
        if base.id.part == 0 {
            cursor = 0;
        }
        let pieces = history.pieces(round);
        // A retry that has begun may have images to read after its last error.
        if !history.is_past(round) && (history.errors() > 0 || !pieces.is_empty()) {
            let rows = history.error_rows().ok_or_else(|| unknown_rows(base.id))?;
            parts.push(PartRetry {
                id: PartId {
                    retry: Some(RetryPiece {
                        round,
                        piece: pieces.len(),
                    }),
                    ..base.id
                },
                cursor,
                from: pieces.last().and_then(|last| last.next).unwrap_or_default(),
                choice: choice.clone(),
                files: history.error_files(),
                ends_with_error: base.next.is_none()
                    && rows.last().copied() == history.images_settled().checked_sub(1),
                rows,
            });
        }
        cursor = base.next.unwrap_or_default();
    }
    let has_some = async |part: PartRetry| {
        // The lines of a part that is begun had such an error.
        let is_begun = part.id.retry.is_some_and(|retry| retry.piece > 0);
        let is_tried = is_begun
            || *choice == RetryChoice::All
            || part
                .error_rows(sink)
                .await?
                .lines
                .values()
                .any(|line| line.is_tried);
        Ok::<_, anyhow::Error>(is_tried.then_some(part))
    };
    let parts: Vec<Option<PartRetry>> = futures_util::stream::iter(parts)
        .map(has_some)
        .buffered(AT_ONCE)
        .try_collect()
        .await?;
    Ok(parts.into_iter().flatten().collect())
}

fn unknown_rows(part: PartId) -> RetryRefused {
    RetryRefused(format!(
        "part {part} was made by an older imagegpt, which did not record which rows failed; make \
         a list of the ids in its error file and embed the list into another --output"
    ))
}

impl PartRetry {
    /// Number of error lines before a row.
    fn before(&self, row: u64) -> usize {
        self.rows.partition_point(|line| *line < row)
    }

    /// Number of error lines that are left.
    pub(super) fn n_lines(&self) -> u64 {
        (self.rows.len() - self.before(self.from)) as u64
    }

    /// Share of the lines that are left which lies before a row, 0 to 1.
    pub(super) fn share_before(&self, row: u64) -> f64 {
        let done = self.before(row).saturating_sub(self.before(self.from));
        #[expect(clippy::cast_precision_loss, reason = "a share for the eye")]
        let share = done as f64 / self.n_lines().max(1) as f64;
        share
    }

    /// Reads the error lines that the part has now.
    pub(super) async fn error_rows(&self, sink: &Sink) -> anyhow::Result<ErrorRows> {
        let mut lines = Vec::new();
        for name in &self.files {
            let content = sink.read(name).await?;
            let content = content.with_context(|| format!("{sink}/{name} has been deleted"))?;
            for line in content.split(|byte| *byte == b'\n') {
                if !line.is_empty() {
                    let line = self.line(line);
                    lines.push(line.with_context(|| format!("{sink}/{name} is no error file"))?);
                }
            }
        }
        anyhow::ensure!(
            lines.len() == self.rows.len(),
            "the error files of part {} have {} lines and should have {}",
            self.id,
            lines.len(),
            self.rows.len()
        );
        let lines: BTreeMap<u64, ErrorRow> = self.rows.iter().copied().zip(lines).collect();
        let last_tried = lines.iter().rev().find(|(_, line)| line.is_tried);
        let last_tried = last_tried.map(|(row, _)| *row);
        let last = lines.keys().next_back().copied();
        let open_from = last.filter(|_| self.ends_with_error && last == last_tried);
        Ok(ErrorRows {
            lines,
            open_from,
            last_tried,
        })
    }

    fn line(&self, line: &[u8]) -> Option<ErrorRow> {
        #[derive(Deserialize)]
        struct Line {
            id: String,
            code: String,
            message: String,
        }
        let line: Line = serde_json::from_slice(line).ok()?;
        let code = GrpcCode::named(&line.code)?;
        Some(ErrorRow {
            id: line.id,
            fault: ImageFault {
                code,
                message: line.message,
            },
            is_tried: self.choice.has(code),
        })
    }
}
