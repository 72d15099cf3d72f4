//! What a job remembers, beside its output: a manifest of what it was asked to
//! do, and a journal of the parts that are done.
//!
//! The journal is a folder that only grows: a record for each part, written
//! after the part's files are there. So what has a record is done, and what has
//! none is done again, into the same names and with the same bytes. Nothing in
//! either depends on time or on who did the work.

use std::collections::BTreeMap;

use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _};
use serde::{Deserialize, Serialize};

use super::plan::Fact;
use super::sink::Sink;

/// In a folder that readers of datasets pass over, by its name.
const MANIFEST: &str = "_imagegpt/manifest.json";
const RECORDS: &str = "_imagegpt/journal";
/// Raised when the same input would give other bytes.
const VERSION: u32 = 1;
/// Records that are read at once.
const AT_ONCE: usize = 16;
/// Differences that are named; more say no more.
const DIFFERENCES_SHOWN: usize = 5;

/// What the job is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct JobManifest {
    pub(super) version: u32,
    pub(super) model: ModelFact,
    /// What is computed and how it is stored, by the names of the flags.
    pub(super) options: BTreeMap<String, String>,
    /// How many shards there are.
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
        options: BTreeMap<String, String>,
        shards: usize,
        inputs: Vec<Fact>,
    ) -> Self {
        Self {
            version: VERSION,
            model,
            options,
            shards,
            inputs,
        }
    }

    /// Writes it, or checks that what is there already is the same.
    ///
    /// # Errors
    ///
    /// [`Differs`] when it is not.
    pub(super) async fn settle(&self, sink: &Sink) -> anyhow::Result<()> {
        let mut text = serde_json::to_string_pretty(self)?;
        text.push('\n');
        if sink.create(MANIFEST, text.into()).await? {
            return Ok(());
        }
        let Some(began) = Self::read(sink).await? else {
            anyhow::bail!("{sink}/{MANIFEST} came and went; does somebody delete files there?");
        };
        let differences = began.differences(self);
        if differences.is_empty() {
            return Ok(());
        }
        let remedy = if began.model.digest == self.model.digest {
            REMEDY
        } else {
            MODEL_REMEDY
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
            .with_context(|| format!("{sink}/{MANIFEST} is no manifest of this program"))?;
        Ok(Some(manifest))
    }

    /// What `now` has otherwise, one sentence each.
    fn differences(&self, now: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, then: &str, now: &str| {
            if then != now {
                found.push(format!("{what} was {then}, is {now}"));
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
                "there were {} inputs, there are {}",
                self.inputs.len(),
                now.inputs.len()
            ));
        }
        for (then, now) in self.inputs.iter().zip(&now.inputs) {
            if then.name != now.name {
                found.push(format!("the input was {}, is {}", then.name, now.name));
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
        return "its files are others, or were written again".to_owned();
    }
    format!(
        "it was {}{} bytes, is {}{} bytes",
        items(then),
        then.bytes,
        items(now),
        now.bytes
    )
}

/// The output belongs to another job.
#[derive(Debug, thiserror::Error)]
#[error(
    "{output} was begun with something else, and parts of both would not fit together; {}. {remedy}",
    shown(differences)
)]
pub(super) struct Differs {
    output: String,
    differences: Vec<String>,
    remedy: &'static str,
}

/// Remedy for an output that belongs to another job.
const REMEDY: &str = "Give what it was begun with, or another --output";
/// The same, when the model's digest differs. Digests of compiled models cover graphs
/// and weights since their manifests record them: what an older version began under
/// the digest of the checkpoint alone may be of any weights.
const MODEL_REMEDY: &str = "Finish it with the model, and the version of imagegpt, that it was \
                            begun with, or give another --output";

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

/// Which part, of which shard.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct PartId {
    pub(super) shard: usize,
    pub(super) part: usize,
}

impl std::fmt::Display for PartId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:05}-{:05}", self.shard, self.part)
    }
}

impl PartId {
    fn parse(name: &str) -> Option<Self> {
        let (shard, part) = name.strip_suffix(".json")?.split_once('-')?;
        Some(Self {
            shard: shard.parse().ok()?,
            part: part.parse().ok()?,
        })
    }
}

/// A part that is done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Record {
    #[serde(flatten)]
    pub(super) id: PartId,
    /// Images that were read.
    pub(super) images: u64,
    /// Of those, how many have no answer.
    pub(super) errors: u64,
    /// Where the next part of the shard begins; `None` when this is the last.
    pub(super) next: Option<u64>,
    pub(super) files: Vec<OutputFile>,
}

/// A file of the output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct OutputFile {
    pub(super) name: String,
    pub(super) bytes: u64,
    pub(super) sha256: String,
}

impl Record {
    pub(super) async fn write(&self, sink: &Sink) -> anyhow::Result<()> {
        let mut text = serde_json::to_string(self)?;
        text.push('\n');
        sink.write(&format!("{RECORDS}/{}.json", self.id), text.into())
            .await
    }

    /// Records of the shards that `wanted` says.
    pub(super) async fn read_all(
        sink: &Sink,
        wanted: impl Fn(usize) -> bool,
    ) -> anyhow::Result<BTreeMap<PartId, Self>> {
        let names = sink.list(RECORDS).await?;
        let ids = names
            .iter()
            .filter_map(|(name, _)| PartId::parse(name))
            .filter(|id| wanted(id.shard));
        let read = async |id: PartId| {
            let name = format!("{RECORDS}/{id}.json");
            let content = sink.read(&name).await?;
            let content = content.with_context(|| format!("{sink}/{name} went away"))?;
            let record: Self = serde_json::from_slice(&content)
                .with_context(|| format!("{sink}/{name} is no record of this program"))?;
            Ok::<_, anyhow::Error>((id, record))
        };
        futures_util::stream::iter(ids)
            .map(read)
            .buffer_unordered(AT_ONCE)
            .try_collect()
            .await
    }
}

/// How far a shard is: its records from the first on, without a gap.
pub(super) fn done(records: &BTreeMap<PartId, Record>, shard: usize) -> Vec<&Record> {
    let mut done = Vec::new();
    while let Some(record) = records.get(&PartId {
        shard,
        part: done.len(),
    }) {
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
            "--dtype was f32, is unset",
            "--fit was squash, is center-crop",
            "--layer was unset, is 3",
            "/data/0.tar has changed: it was 5 bytes, is 6 bytes",
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
        let expected = "the model's digest was sha256:1, is sha256:2. Finish it with the model, \
                        and the version of imagegpt, that it was begun with, or give another \
                        --output";
        assert!(text.ends_with(expected), "{text}");
    }

    #[tokio::test]
    async fn a_shard_is_done_up_to_the_first_gap() {
        let dir = tempfile::tempdir().unwrap();
        let sink = Sink::open(dir.path().to_str().unwrap(), &Stores::default()).unwrap();
        for part in [0, 1, 3] {
            let record = Record {
                id: PartId { shard: 7, part },
                images: 2,
                errors: 0,
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
