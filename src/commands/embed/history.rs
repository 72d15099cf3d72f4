//! History of a part: its record, and the rounds of `--retry-errors` in which
//! its errors were tried again.
//!
//! The tables of a part and of its retries stay as they are. A finished round
//! has all errors of the part that are left, those that it did not try among
//! them, in error files of its own; the error files before it are superseded
//! and removed.

use std::collections::BTreeMap;

use super::journal::{self, OutputFile, PartId, Record};

/// Record of a part with those of its retries.
#[derive(Debug)]
pub(super) struct PartHistory<'a> {
    pub(super) base: &'a Record,
    /// Pieces of each finished round, by the round's number.
    finished: BTreeMap<u32, Vec<&'a Record>>,
    /// Pieces of a round that is not finished.
    begun: Option<(u32, Vec<&'a Record>)>,
}

impl<'a> PartHistory<'a> {
    fn of(records: &'a BTreeMap<PartId, Record>, base: &'a Record) -> Self {
        let mut rounds: BTreeMap<u32, Vec<&Record>> = BTreeMap::new();
        for (id, record) in records.range(base.id..=base.id.last_retry()) {
            let Some(retry) = id.retry else { continue };
            let pieces = rounds.entry(retry.round).or_default();
            // A piece after a gap is done again.
            if pieces.len() == retry.piece {
                pieces.push(record);
            }
        }
        let is_whole =
            |pieces: &Vec<&Record>| pieces.last().is_some_and(|last| last.next.is_none());
        let begun = rounds
            .last_entry()
            .filter(|last| !is_whole(last.get()))
            .map(std::collections::btree_map::OccupiedEntry::remove_entry);
        rounds.retain(|_, pieces| is_whole(pieces));
        Self {
            base,
            finished: rounds,
            begun,
        }
    }

    /// Returns the records that say which errors the part had before the round
    /// that is not finished.
    fn settled(&self) -> &[&'a Record] {
        let last = self.finished.last_key_value();
        last.map_or(std::slice::from_ref(&self.base), |(_, pieces)| pieces)
    }

    /// Pieces of the round `round`, if it is begun and not finished.
    pub(super) fn pieces(&self, round: u32) -> &[&'a Record] {
        match &self.begun {
            Some((begun, pieces)) if *begun == round => pieces,
            _ => &[],
        }
    }

    /// True if the part has finished the round `round`.
    pub(super) fn has_round(&self, round: u32) -> bool {
        self.finished.contains_key(&round)
    }

    /// True if the part has an unfinished round.
    pub(super) fn is_being_retried(&self) -> bool {
        self.begun.is_some()
    }

    /// True if the round `round` or a later one is finished.
    pub(super) fn is_past(&self, round: u32) -> bool {
        self.finished.range(round..).next().is_some()
    }

    /// Lists the rows that had errors before the round that is not finished;
    /// `None` if an older version did not record them.
    pub(super) fn error_rows(&self) -> Option<Vec<u64>> {
        let settled = self.settled();
        let rows: Vec<u64> = settled
            .iter()
            .flat_map(|record| record.error_rows.iter().copied())
            .collect();
        let errors: u64 = settled.iter().map(|record| record.errors).sum();
        (rows.len() as u64 == errors).then_some(rows)
    }

    /// Error files that have the lines of [`Self::error_rows`], in order.
    pub(super) fn error_files(&self) -> Vec<String> {
        let files = self.settled().iter().flat_map(|record| &record.files);
        let errors = files.filter(|file| file.is_of_errors());
        errors.map(|file| file.name.clone()).collect()
    }

    /// Number of rows in the tables.
    pub(super) fn rows(&self) -> u64 {
        self.records().iter().map(|record| record.rows()).sum()
    }

    /// Number of images, rows or errors, before the round that is not finished.
    pub(super) fn images_settled(&self) -> u64 {
        let begun = self.begun.iter().flat_map(|(_, pieces)| pieces);
        let begun: u64 = begun.map(|record| record.rows()).sum();
        let errors: u64 = self.settled().iter().map(|record| record.errors).sum();
        self.rows() - begun + errors
    }

    /// Number of images that have no row.
    pub(super) fn errors(&self) -> u64 {
        let errors = |records: &[&Record]| records.iter().map(|record| record.errors).sum();
        let settled = self.settled();
        let Some((_, pieces)) = &self.begun else {
            return errors(settled);
        };
        let next = pieces.last().and_then(|last| last.next);
        let left = settled.iter().flat_map(|record| &record.error_rows);
        let left = left.filter(|row| next.is_some_and(|next| **row >= next));
        errors(pieces) + left.count() as u64
    }

    /// Number of images: those with a row, and those with an error.
    pub(super) fn images(&self) -> u64 {
        self.rows() + self.errors()
    }

    /// Records of the part and of all its retries, in order.
    pub(super) fn records(&self) -> Vec<&'a Record> {
        let begun = self.begun.iter().flat_map(|(_, pieces)| pieces);
        let retries = self.finished.values().flatten().chain(begun);
        std::iter::once(&self.base)
            .chain(retries)
            .copied()
            .collect()
    }

    /// Files that belong to the output, in order.
    pub(super) fn files(&self) -> Vec<&'a OutputFile> {
        self.split_files().0
    }

    /// Error files whose lines are in the files of a later round.
    pub(super) fn superseded(&self) -> Vec<&'a OutputFile> {
        self.split_files().1
    }

    fn split_files(&self) -> (Vec<&'a OutputFile>, Vec<&'a OutputFile>) {
        let settled: Vec<PartId> = self.settled().iter().map(|record| record.id).collect();
        let begun = self.begun.as_ref().map(|(round, _)| *round);
        let files = self.records().into_iter().flat_map(|record| {
            let is_current = settled.contains(&record.id)
                || record.id.retry.map(|retry| retry.round) == begun && begun.is_some();
            record.files.iter().map(move |file| (file, is_current))
        });
        let (current, superseded): (Vec<_>, Vec<_>) =
            files.partition(|(file, is_current)| *is_current || !file.is_of_errors());
        let names = |files: Vec<(&'a OutputFile, bool)>| files.into_iter().map(|(file, _)| file);
        (names(current).collect(), names(superseded).collect())
    }
}

/// Returns the histories of the finished parts of shards, in order.
pub(super) fn histories(
    records: &BTreeMap<PartId, Record>,
    shards: impl Iterator<Item = usize>,
) -> Vec<PartHistory<'_>> {
    shards
        .flat_map(|shard| journal::done(records, shard))
        .map(|base| PartHistory::of(records, base))
        .collect()
}

/// Returns the histories of all parts that have a record, finished or not.
pub(super) fn all_histories(records: &BTreeMap<PartId, Record>) -> Vec<PartHistory<'_>> {
    let bases = records.iter().filter(|(id, _)| id.retry.is_none());
    bases
        .map(|(_, base)| PartHistory::of(records, base))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::super::journal::RetryPiece;
    use super::*;

    fn file(name: &str) -> OutputFile {
        OutputFile {
            name: name.to_owned(),
            bytes: 1,
            sha256: String::new(),
        }
    }

    fn record(
        retry: Option<(u32, usize)>,
        images: u64,
        error_rows: &[u64],
        next: Option<u64>,
    ) -> Record {
        let id = PartId {
            retry: retry.map(|(round, piece)| RetryPiece { round, piece }),
            ..PartId::of(3, 0)
        };
        let mut files = Vec::new();
        if images > error_rows.len() as u64 {
            files.push(file(&format!("part-{id}.parquet")));
        }
        if !error_rows.is_empty() {
            files.push(file(&format!("errors/errors-{id}.jsonl")));
        }
        Record {
            id,
            images,
            errors: error_rows.len() as u64,
            error_rows: error_rows.to_vec(),
            next,
            files,
        }
    }

    fn check(records: &[Record], expected: (u64, u64), files: &[&str], superseded: &[&str]) {
        let records: BTreeMap<PartId, Record> = records
            .iter()
            .map(|record| (record.id, record.clone()))
            .collect();
        let histories = histories(&records, 3..4);
        let [history] = histories.as_slice() else {
            panic!("{histories:?}")
        };
        assert_eq!((history.rows(), history.errors()), expected);
        let names = |files: Vec<&OutputFile>| -> Vec<String> {
            files.into_iter().map(|file| file.name.clone()).collect()
        };
        assert_eq!(names(history.files()), files);
        assert_eq!(names(history.superseded()), superseded);
    }

    #[test]
    fn the_last_finished_round_has_the_errors_that_are_left() {
        const TABLE: &str = "part-00003-00000.parquet";
        const ERRORS: &str = "errors/errors-00003-00000.jsonl";
        let base = record(None, 10, &[2, 5, 7], None);
        check(std::slice::from_ref(&base), (7, 3), &[TABLE, ERRORS], &[]);
        // Row 2 has an answer now, and row 5 has not; row 7 was not tried.
        let first = record(Some((1, 0)), 2, &[5], Some(7));
        check(
            &[base.clone(), first.clone()],
            (8, 2),
            &[
                TABLE,
                ERRORS,
                "part-00003-00000-retry1-00000.parquet",
                "errors/errors-00003-00000-retry1-00000.jsonl",
            ],
            &[],
        );
        let second = record(Some((1, 1)), 1, &[], None);
        check(
            &[base.clone(), first.clone(), second.clone()],
            (9, 1),
            &[
                TABLE,
                "part-00003-00000-retry1-00000.parquet",
                "errors/errors-00003-00000-retry1-00000.jsonl",
                "part-00003-00000-retry1-00001.parquet",
            ],
            &[ERRORS],
        );
        // A later round, after one in which the part had nothing to try.
        let third = record(Some((3, 0)), 1, &[], None);
        check(
            &[base, first, second, third],
            (10, 0),
            &[
                TABLE,
                "part-00003-00000-retry1-00000.parquet",
                "part-00003-00000-retry1-00001.parquet",
                "part-00003-00000-retry3-00000.parquet",
            ],
            &[ERRORS, "errors/errors-00003-00000-retry1-00000.jsonl"],
        );
    }

    #[test]
    fn a_shard_that_is_whole_now_has_more_images_than_before() {
        let base = record(None, 3, &[2], None);
        let read = record(Some((1, 0)), 40, &[], None);
        let files = [
            "part-00003-00000.parquet",
            "part-00003-00000-retry1-00000.parquet",
        ];
        check(
            &[base, read],
            (42, 0),
            &files,
            &["errors/errors-00003-00000.jsonl"],
        );
    }
}
