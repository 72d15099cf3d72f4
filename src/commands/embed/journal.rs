//! Persistent state of a job, beside its output: a manifest that says what the
//! job computes, and a journal of the parts that are done.
//!
//! The journal is a directory that only grows: one record per part, written
//! after the part's files exist. So a part with a record is done, and a part
//! without a record is done again, with the same file names and the same bytes.
//! Neither the manifest nor the journal depends on time or on the worker that
//! did the work.

use std::collections::BTreeMap;

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use super::plan::Fact;
use super::sink::Sink;

/// Path of the manifest, in a directory that readers of datasets skip because
/// of its name.
const MANIFEST: &str = "_imagegpt/manifest.json";
const RECORDS: &str = "_imagegpt/journal";
/// Version of the manifest, raised when the same input would give other bytes.
/// Since version 2 ids have the path below the input, and tables and lists have
/// the ids of columns of any type.
const VERSION: u32 = 2;
/// Version of a manifest of which nothing has changed since version 1: an
/// output that an older imagegpt began goes on.
const VERSION_UNCHANGED: u32 = 1;
/// Records that are read at the same time.
const AT_ONCE: usize = 16;
/// Differences that an error names; more would not tell more.
const DIFFERENCES_SHOWN: usize = 5;

/// Manifest: the job's model, options and inputs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct JobManifest {
    pub(super) version: u32,
    pub(super) model: ModelFact,
    /// Digest of the model's source weights, which a linear head records; older
    /// versions did not.
    #[serde(default)]
    pub(super) weights_digest: Option<String>,
    /// Options of the computation and of the table, by the names of their
    /// flags.
    pub(super) options: BTreeMap<String, String>,
    /// Number of shards of the inputs.
    pub(super) shards: usize,
    pub(super) inputs: Vec<Fact>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ModelFact {
    pub(super) name: String,
    pub(super) digest: String,
}

impl JobManifest {
    pub(super) fn new(
        model: ModelFact,
        weights_digest: &str,
        options: BTreeMap<String, String>,
        shards: usize,
        inputs: Vec<Fact>,
        has_ids_of_version_1: bool,
    ) -> Self {
        Self {
            version: if has_ids_of_version_1 {
                VERSION_UNCHANGED
            } else {
                VERSION
            },
            model,
            weights_digest: Some(weights_digest.to_owned()).filter(|digest| !digest.is_empty()),
            options,
            shards,
            inputs,
        }
    }

    /// Writes the manifest, or checks that the existing one is the same.
    ///
    /// # Errors
    ///
    /// [`Differs`] when the existing manifest is another.
    pub(super) async fn settle(&self, sink: &Sink) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        if sink.create(MANIFEST, text.into()).await? {
            return Ok(());
        }
        let Some(began) = Self::read(sink).await? else {
            anyhow::bail!(
                "{sink}/{MANIFEST} existed and was deleted meanwhile; let nobody delete files \
                 there while a job runs"
            );
        };
        let differences = began.differences(self);
        if differences.is_empty() {
            return Ok(());
        }
        let remedy = if began.model.digest != self.model.digest {
            MODEL_REMEDY
        } else if began.version < self.version {
            VERSION_REMEDY
        } else {
            REMEDY
        };
        Err(Differs {
            output: sink.to_string(),
            differences,
            remedy,
        }
        .into())
    }

    pub(super) async fn read(sink: &Sink) -> anyhow::Result<Option<Self>> {
        let Some(content) = sink.read(MANIFEST).await? else {
            return Ok(None);
        };
        let manifest = serde_json::from_slice(&content)
            .with_context(|| format!("{sink}/{MANIFEST} is not a manifest of imagegpt embed"))?;
        Ok(Some(manifest))
    }

    /// Lists what differs in the manifest `now`, one sentence each.
    fn differences(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, then: &str, now: &str| {
            if then != now {
                found.push(format!("{what} was {then}, is now {now}"));
            }
        };
        compare(
            "the manifest's version",
            &self.version.to_string(),
            &now.version.to_string(),
        );
        compare("the model's digest", &self.model.digest, &now.model.digest);
        let unset = "unset".to_owned();
        let names: std::collections::BTreeSet<&String> =
            self.options.keys().chain(now.options.keys()).collect();
        for name in names {
            compare(
                name,
                self.options.get(name).unwrap_or(&unset),
                now.options.get(name).unwrap_or(&unset),
            );
        }
        if self.inputs.len() != now.inputs.len() {
            found.push(format!(
                "there were {} inputs, there are now {}",
                self.inputs.len(),
                now.inputs.len()
            ));
        }
        for (then, now) in self.inputs.iter().zip(&now.inputs) {
            if then.name != now.name {
                found.push(format!("the input was {}, is now {}", then.name, now.name));
            } else if then != now {
                found.push(format!("{} has changed: {}", then.name, changed(then, now)));
            }
        }
        found
    }
}

fn changed(then: &Fact, now: &Fact) -> String {
    let items = |fact: &Fact| {
        fact.items
            .map_or_else(String::new, |items| format!("{items} images in "))
    };
    if (then.items, then.bytes) == (now.items, now.bytes) {
        return "it has other files, or its files were written again".to_owned();
    }
    format!(
        "it was {}{} bytes, is now {}{} bytes",
        items(then),
        then.bytes,
        items(now),
        now.bytes
    )
}

/// Error of an output that belongs to another job.
#[derive(Debug, thiserror::Error)]
#[error(
    "--output {output} belongs to a job with another model, other inputs or other options, and \
     parts of both jobs would not fit together: {}. {remedy}",
    shown(differences)
)]
pub(in crate::commands) struct Differs {
    output: String,
    differences: Vec<String>,
    remedy: &'static str,
}

/// Remedy for an output that belongs to another job.
const REMEDY: &str = "Repeat the command that the output was begun with, or give another --output";
/// Remedy for an output whose job had another model digest. Digests of compiled
/// models cover graphs and weights only since their manifests record them: an
/// output that an older version began under the digest of the checkpoint alone
/// may have been made with any weights.
const MODEL_REMEDY: &str = "Finish the output with the model, and the version of imagegpt, that it \
                            was begun with, or give another --output";

/// Remedy for an output that an older version began, which gave its images
/// other ids.
const VERSION_REMEDY: &str = "The output was begun by an older imagegpt, which gave these images \
                              other ids: without the path below the input, or without \
                              --id-column. Finish it with that imagegpt, or give another --output";

fn shown(differences: &[String]) -> String {
    let mut text = differences
        .iter()
        .take(DIFFERENCES_SHOWN)
        .cloned()
        .collect::<Vec<_>>()
        .join("; ");
    if differences.len() > DIFFERENCES_SHOWN {
        use std::fmt::Write as _;
        let more = differences.len() - DIFFERENCES_SHOWN;
        // Writing to a string cannot fail.
        let _ = write!(text, "; and {more} more");
    }
    text
}

/// Number of a part: its shard, its place in the shard, and for a retry of the
/// part's errors the number of the retry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct PartId {
    pub(super) shard: usize,
    pub(super) part: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) retry: Option<RetryPiece>,
}

/// Number of a piece of a round of `--retry-errors`, which has at most as many
/// images as a part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct RetryPiece {
    pub(super) round: u32,
    pub(super) piece: usize,
}

impl std::fmt::Display for PartId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:05}-{:05}", self.shard, self.part)?;
        match self.retry {
            None => Ok(()),
            Some(RetryPiece { round, piece }) => write!(f, "-retry{round}-{piece:05}"),
        }
    }
}

impl PartId {
    /// Makes the number of a part that is no retry.
    pub(super) fn of(shard: usize, part: usize) -> Self {
        Self {
            shard,
            part,
            retry: None,
        }
    }

    /// Returns the number of the next part of the shard, or of the next piece
    /// of the round.
    pub(super) fn next(self) -> Self {
        match self.retry {
            None => Self::of(self.shard, self.part + 1),
            Some(RetryPiece { round, piece }) => Self {
                retry: Some(RetryPiece {
                    round,
                    piece: piece + 1,
                }),
                ..self
            },
        }
    }

    /// Returns the largest number that a retry of the part can have.
    pub(super) fn last_retry(self) -> Self {
        Self {
            retry: Some(RetryPiece {
                round: u32::MAX,
                piece: usize::MAX,
            }),
            ..self
        }
    }

    /// Reads a number as it is displayed.
    pub(super) fn parse(text: &str) -> Option<Self> {
        let (shard, rest) = text.split_once('-')?;
        let (part, retry) = match rest.split_once("-retry") {
            None => (rest, None),
            Some((part, retry)) => {
                let (round, piece) = retry.split_once('-')?;
                let (round, piece) = (round.parse().ok()?, piece.parse().ok()?);
                (part, Some(RetryPiece { round, piece }))
            }
        };
        Some(Self {
            shard: shard.parse().ok()?,
            part: part.parse().ok()?,
            retry,
        })
    }
}

/// Record of a part that is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) id: PartId,
    /// Images of the part that were read.
    pub(super) images: u64,
    /// Images of the part that have no answer.
    pub(super) errors: u64,
    /// Images that have no answer, by their places in the part, from 0; in the
    /// order of the lines in the error file. Of a retry, places in the part
    /// that is retried. Older versions did not record them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub(super) error_rows: Vec<u64>,
    /// Cursor at which the next part of the shard begins; `None` for the last
    /// part. Of a retry, the place in the part that is retried.
    pub(super) next: Option<u64>,
    pub(super) files: Vec<OutputFile>,
}

/// File of the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OutputFile {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl OutputFile {
    /// True for a file of error lines.
    pub(super) fn is_of_errors(&self) -> bool {
        self.name.starts_with("errors/")
    }
}

impl Record {
    /// Returns the number of rows in the part's table.
    pub(super) fn rows(&self) -> u64 {
        self.images.saturating_sub(self.errors)
    }

    pub(super) async fn write(&self, sink: &Sink) -> anyhow::Result<()> {
        let mut text = serde_json::to_string(self)?;
        text.push('\n');
        sink.write(&format!("{RECORDS}/{}.json", self.id), text.into())
            .await
    }

    /// Removes the files of the record and then the record, so that a kill in
    /// between leaves a record whose files are missing.
    pub(super) async fn remove(&self, sink: &Sink) -> anyhow::Result<()> {
        for file in &self.files {
            sink.remove(&file.name).await?;
        }
        sink.remove(&format!("{RECORDS}/{}.json", self.id)).await
    }

    /// Reads the records of the shards for which `wanted` is true.
    pub(super) async fn read_all(
        sink: &Sink,
        wanted: impl Fn(usize) -> bool,
    ) -> anyhow::Result<BTreeMap<PartId, Self>> {
        let names = sink.list(RECORDS).await?;
        let ids = names
            .iter()
            .filter_map(|(name, _)| PartId::parse(name.strip_suffix(".json")?))
            .filter(|id| wanted(id.shard));
        let read = async |id: PartId| {
            let name = format!("{RECORDS}/{id}.json");
            let content = sink.read(&name).await?;
            let content = content.with_context(|| {
                format!("{sink}/{name} was deleted while the records were read")
            })?;
            let record: Self = serde_json::from_slice(&content)
                .map_err(|error| NoRecord(format!("{sink}/{name}"), error))?;
            Ok::<_, anyhow::Error>((id, record))
        };
        futures_util::stream::iter(ids)
            .map(read)
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    }
}

/// Error of a file that should be a record and is none. It stays so.
#[derive(Debug, thiserror::Error)]
#[error("{0} is not a record of imagegpt embed ({1}); remove it, and its part is done again")]
pub(super) struct NoRecord(String, serde_json::Error);

/// Returns the finished parts of a shard: its records from the first on, up to
/// the first gap.
pub(super) fn done(records: &BTreeMap<PartId, Record>, shard: usize) -> Vec<&Record> {
    let mut done = Vec::new();
    while let Some(record) = records.get(&PartId::of(shard, done.len())) {
        done.push(record);
        if record.next.is_none() {
            break;
        }
    }
    done
}

#[cfg(test)]
mod tests {
    use super::super::location::Stores;
    use super::*;

    fn manifest(options: &[(&str, &str)], bytes: u64) -> JobManifest {
        JobManifest::new(
            ModelFact {
                name: "m".to_owned(),
                digest: "sha256:1".to_owned(),
            },
            "sha256:3",
            options
                .iter()
                .map(|&(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
            1,
            vec![Fact {
                name: "/data/0.tar".to_owned(),
                kind: "tar".to_owned(),
                items: None,
                bytes,
                version: "1".to_owned(),
            }],
            true,
        )
    }

    #[tokio::test]
    async fn another_job_is_refused_with_what_differs() {
        let dir = tempfile::tempdir().unwrap();
        let sink = Sink::open(dir.path().to_str().unwrap(), &Stores::default()).unwrap();
        let first = manifest(&[("--fit", "squash"), ("--dtype", "f32")], 5);
        first.settle(&sink).await.unwrap();
        first.settle(&sink).await.unwrap();
        let other = manifest(&[("--fit", "center-crop"), ("--layer", "3")], 6);
        let error = other.settle(&sink).await.unwrap_err();
        assert!(error.is::<Differs>());
        let text = error.to_string();
        for part in [
            "--dtype was f32, is now unset",
            "--fit was squash, is now center-crop",
            "--layer was unset, is now 3",
            "/data/0.tar has changed: it was 5 bytes, is now 6 bytes",
        ] {
            assert!(text.contains(part), "{part}: {text}");
        }
    }

    #[tokio::test]
    async fn another_digest_is_refused_with_both_and_a_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let sink = Sink::open(dir.path().to_str().unwrap(), &Stores::default()).unwrap();
        let first = manifest(&[], 5);
        first.settle(&sink).await.unwrap();
        let mut other = first.clone();
        other.model.digest = "sha256:2".to_owned();
        let text = other.settle(&sink).await.unwrap_err().to_string();
        let expected = "the model's digest was sha256:1, is now sha256:2. Finish the output with \
                        the model, and the version of imagegpt, that it was begun with, or give \
                        another --output";
        assert!(text.ends_with(expected), "{text}");
    }

    #[test]
    fn numbers_of_parts_are_read_as_they_are_written() {
        let base = PartId::of(3, 12);
        let retry = PartId {
            retry: Some(RetryPiece { round: 2, piece: 0 }),
            ..base
        };
        for (id, text) in [
            (base, "00003-00012"),
            (retry, "00003-00012-retry2-00000"),
            (retry.next(), "00003-00012-retry2-00001"),
            (base.next(), "00003-00013"),
        ] {
            assert_eq!(id.to_string(), text);
            assert_eq!(PartId::parse(text), Some(id));
        }
        assert!(base < retry && retry < retry.next() && base.last_retry() < base.next());
        for text in [
            "",
            "3",
            "3-",
            "3-x",
            "3-1-retry",
            "3-1-retry1",
            "3-1-again1-0",
        ] {
            assert_eq!(PartId::parse(text), None, "{text}");
        }
    }

    #[tokio::test]
    async fn a_shard_is_done_up_to_the_first_gap() {
        let dir = tempfile::tempdir().unwrap();
        let sink = Sink::open(dir.path().to_str().unwrap(), &Stores::default()).unwrap();
        for part in [0, 1, 3] {
            let record = Record {
                id: PartId::of(7, part),
                images: 2,
                errors: 0,
                error_rows: Vec::new(),
                next: Some(9),
                files: Vec::new(),
            };
            record.write(&sink).await.unwrap();
        }
        let records = Record::read_all(&sink, |shard| shard == 7).await.unwrap();
        assert_eq!(records.len(), 3);
        assert_eq!(done(&records, 7).len(), 2);
        assert_eq!(done(&records, 6).len(), 0);
        assert!(Record::read_all(&sink, |_| false).await.unwrap().is_empty());
    }
}
