//! Datasets of the Hugging Face Hub as inputs: `hf://datasets/OWNER/NAME`, with
//! a revision and a path below it.
//!
//! A revision is resolved to a commit when the job begins. The manifest records
//! the commit, and a job that resumes reads the same commit, wherever the
//! revision has moved meanwhile.

mod client;
mod store;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use anyhow::Context as _;
use percent_encoding::{AsciiSet, NON_ALPHANUMERIC, percent_decode_str, utf8_percent_encode};

use self::client::{HubClient, HubFailure, HubFile};
use self::store::HubStore;
use super::finding::{FileKind, kind_of, matters, sort_out};
use super::journal::JobManifest;
use super::location::{ListedObject, Location, scheme_of};
use super::plan::{Fact, PlanOptions};
use super::sink::Sink;
use crate::compile::hub::{HubAccess, offline_variable};

pub(super) use self::client::HubError;

const SCHEME: &str = "hf";
const DATASETS: &str = "hf://datasets/";
/// Revision that is read if the input names none.
const MAIN: &str = "main";
/// Branch in which the hub keeps a dataset converted to Parquet.
const CONVERTED: &str = "refs/convert/parquet";
/// Characters that are escaped in a revision, as `huggingface_hub` does.
const REVISION: &AsciiSet = &NON_ALPHANUMERIC
    .remove(b'-')
    .remove(b'_')
    .remove(b'.')
    .remove(b'~');
/// Kind of the manifest's facts that are commits.
pub(super) const COMMIT: &str = "commit";
/// Longest name of an owner or a dataset, as the hub itself has it.
const NAME_BYTES_MAX: usize = 96;
/// Longest revision and longest path; git's own limits are of this order.
const TEXT_BYTES_MAX: usize = 4096;

/// Dataset of a hub at a revision.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct HubRepository {
    /// Name with its owner, or the name alone of a dataset that has none.
    name: String,
    revision: String,
    /// True if the input itself names the revision.
    is_explicit: bool,
}

impl HubRepository {
    /// Returns the address as a person would write it.
    fn url(&self) -> String {
        if !self.is_explicit {
            return format!("{DATASETS}{}", self.name);
        }
        let revision = utf8_percent_encode(&self.revision, REVISION);
        format!("{DATASETS}{}@{revision}", self.name)
    }

    /// Returns the same dataset at the branch that is converted to Parquet.
    fn converted(&self) -> Self {
        Self {
            revision: CONVERTED.to_owned(),
            is_explicit: true,
            ..self.clone()
        }
    }
}

/// Address of an input: a dataset, and a path in it, which is empty for all of
/// the dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
struct HubAddress {
    repository: HubRepository,
    path: String,
}

impl HubAddress {
    /// Parses an address into the addresses that it may mean, in the order in
    /// which they are tried: a dataset without an owner has a name alone.
    fn parse(input: &str) -> anyhow::Result<Vec<Self>> {
        // Schemes are the same in any case.
        let start = input.get(..DATASETS.len()).unwrap_or_default();
        let is_dataset = is_hub(input) && start.ends_with("://datasets/");
        let rest = is_dataset.then(|| &input[DATASETS.len()..]);
        let rest = rest.with_context(|| {
            format!("{input} is not a dataset of the hub; give hf://datasets/OWNER/NAME")
        })?;
        anyhow::ensure!(
            input.len() <= TEXT_BYTES_MAX,
            "an hf:// input has {} bytes; the limit is {TEXT_BYTES_MAX}",
            input.len()
        );
        let parts: Vec<&str> = rest.split('/').filter(|part| !part.is_empty()).collect();
        let address = |n_name: usize| Self::of(input, &parts, n_name);
        match parts.iter().take(2).position(|part| part.contains('@')) {
            Some(place) => Ok(vec![address(place + 1)?]),
            None if parts.len() == 1 => Ok(vec![address(1)?]),
            None => Ok(vec![address(2)?, address(1)?]),
        }
    }

    /// Makes the address whose first `n_name` parts are the name, with the
    /// revision in the last of them.
    fn of(input: &str, parts: &[&str], n_name: usize) -> anyhow::Result<Self> {
        let name = parts.get(..n_name).unwrap_or_default().join("/");
        let mut path = parts.get(n_name..).unwrap_or_default();
        let (name, revision) = match name.split_once('@') {
            Some((name, revision)) => (name.to_owned(), Some(revision.to_owned())),
            None => (name, None),
        };
        let is_explicit = revision.is_some();
        let mut revision = revision.unwrap_or_else(|| MAIN.to_owned());
        // The hub's own references may be written with slashes.
        if revision == "refs"
            && let [kind @ ("convert" | "pr"), last, others @ ..] = path
        {
            revision = format!("refs/{kind}/{last}");
            path = others;
        }
        let revision = percent_decode_str(&revision).decode_utf8();
        let revision = revision
            .with_context(|| format!("{input}: the revision is not UTF-8"))?
            .into_owned();
        let is_name = |part: &str| {
            (1..=NAME_BYTES_MAX).contains(&part.len())
                && !part.bytes().all(|byte| byte == b'.')
                && part
                    .bytes()
                    .all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte))
        };
        anyhow::ensure!(
            name.split('/').all(is_name),
            "{input}: '{name}' is not a name of a dataset; give hf://datasets/OWNER/NAME"
        );
        anyhow::ensure!(
            !revision.is_empty() && !revision.split('/').any(|part| matches!(part, "." | "..")),
            "{input}: '{revision}' is not a revision; give a branch, a tag or a commit after @"
        );
        anyhow::ensure!(
            !path.iter().any(|part| matches!(*part, "." | "..")),
            "{input}: the path contains . or .., which the hub does not have"
        );
        Ok(Self {
            repository: HubRepository {
                name,
                revision,
                is_explicit,
            },
            path: path.join("/"),
        })
    }
}

/// Input that has been found on the hub.
#[derive(Debug)]
pub(super) struct HubInput {
    pub(super) location: Location,
    /// Commits that the job reads, the last of them the location's own.
    pub(super) facts: Vec<Fact>,
}

impl HubInput {
    /// Returns a text that is the same for all addresses of the same files.
    pub(super) fn identity(&self) -> String {
        let url = self.location.to_string();
        let Some(fact) = self.facts.last() else {
            return url;
        };
        let path = url.strip_prefix(&fact.name).unwrap_or_default();
        let name = fact.name.split('@').next().unwrap_or_default();
        format!("{name}@{}{path}", fact.version)
    }
}

/// True if an input is an address of the hub.
pub(super) fn is_hub(input: &str) -> bool {
    scheme_of(input).as_deref() == Some(SCHEME)
}

/// Reads the inputs of a job that has begun, if any of its inputs is on the hub
/// and has a commit.
pub(super) async fn began(inputs: &[String], sink: &Sink) -> anyhow::Result<Vec<Fact>> {
    if !inputs.iter().any(|input| is_hub(input)) {
        return Ok(Vec::new());
    }
    let manifest = JobManifest::read(sink).await?;
    Ok(manifest.map_or_else(Vec::new, |manifest| manifest.inputs))
}

/// Finds an input on the hub, at the commit at which the job began.
pub(super) async fn open(input: &str, options: &PlanOptions<'_>) -> anyhow::Result<HubInput> {
    let addresses = HubAddress::parse(input)?;
    refuse_offline(input)?;
    // The token is read from a file.
    let access = tokio::task::spawn_blocking(HubAccess::from_env).await?;
    let client = Arc::new(HubClient::new(access)?);
    find(&client, addresses, options)
        .await
        .with_context(|| input.to_owned())
}

/// Refuses to ask the hub if the environment says not to.
fn refuse_offline(input: &str) -> anyhow::Result<()> {
    if let Some(variable) = offline_variable() {
        anyhow::bail!(
            "{input}: {variable} is set, so the hub is not asked; unset it, or give a copy of the \
             dataset on a disk"
        );
    }
    Ok(())
}

async fn find(
    client: &Arc<HubClient>,
    addresses: Vec<HubAddress>,
    options: &PlanOptions<'_>,
) -> anyhow::Result<HubInput> {
    let (began, wanted) = (options.began, options.kind);
    let (address, found) = dataset(client, addresses, began).await?;
    let repository = &found.store.repository;
    let commit = &found.store.commit;
    if !address.path.is_empty() {
        match client.file(repository, commit, &address.path).await {
            Ok(_) => return found.input(&address.path),
            Err(error) if error.kind == HubFailure::NoFile => {}
            Err(error) => return Err(error.into()),
        }
    }
    let mut taken = found.choose(&address.path, wanted).await?;
    let may_be_converted = address.path.is_empty()
        && !repository.is_explicit
        && wanted.is_none_or(|kind| kind == FileKind::Parquet);
    if may_be_converted && taken.kind != Some(FileKind::Parquet) {
        let is_all = taken.kind.is_none() || taken.has_script;
        if is_all && let Some(converted) = found.converted(began).await? {
            taken = converted;
        }
    }
    let Some(kind) = taken.kind else {
        let what = if address.path.is_empty() {
            "the dataset".to_owned()
        } else {
            format!("{} of the dataset", address.path)
        };
        if let Some(kind) = wanted {
            anyhow::bail!("--kind {kind}: {what} has no files of this kind");
        }
        anyhow::bail!(
            "{what} has neither Parquet, Arrow or tar files nor images, and no files that the hub \
             has converted to Parquet; a list (.csv, .txt) is read if the input names the file"
        );
    };
    let CommittedDataset { store, .. } = &taken.dataset;
    // Lists of gated datasets are public, and their files are not.
    if let Some(first) = taken.files.first() {
        client
            .file(&store.repository, &store.commit, &first.path)
            .await?;
    }
    tracing::info!(
        dataset = store.repository.url(),
        commit = &*store.commit,
        files = taken.n_data,
        "reading the dataset's {kind} files"
    );
    let mut input = taken.dataset.input(&address.path)?;
    if store.repository != found.store.repository {
        input.facts.insert(0, found.fact());
    }
    let mut chosen = store.chosen.lock();
    let chosen = chosen
        .as_deref_mut()
        .map_err(|_| anyhow::anyhow!("a thread panicked"))?;
    chosen.insert(address.path, taken.files);
    Ok(input)
}

/// Finds the dataset that the first of these addresses means, and its commit.
async fn dataset(
    client: &Arc<HubClient>,
    addresses: Vec<HubAddress>,
    began: &[Fact],
) -> anyhow::Result<(HubAddress, CommittedDataset)> {
    for address in &addresses {
        let url = address.repository.url();
        if let Some(fact) = began.iter().find(|fact| is_commit(fact, &url)) {
            let found = CommittedDataset::new(client, &address.repository, &fact.version);
            return Ok((address.clone(), found));
        }
    }
    let mut first = None;
    for address in addresses {
        match client.commit(&address.repository).await {
            Ok(commit) => {
                let found = CommittedDataset::new(client, &address.repository, &commit);
                return Ok((address, found));
            }
            Err(error) if error.kind == HubFailure::NoRepository => {
                first.get_or_insert(error);
            }
            Err(error) => return Err(error.into()),
        }
    }
    Err(first.map_or_else(|| anyhow::anyhow!("no dataset is named"), Into::into))
}

fn is_commit(fact: &Fact, url: &str) -> bool {
    fact.kind == COMMIT && fact.name == url
}

/// Dataset at the commit that the job reads.
#[derive(Debug, Clone)]
struct CommittedDataset {
    store: HubStore,
}

/// Files of a dataset that are taken as the input.
struct TakenFiles {
    dataset: CommittedDataset,
    kind: Option<FileKind>,
    /// Files of this kind that are data.
    n_data: usize,
    /// Files of this kind, and those that are no data and are counted.
    files: Vec<HubFile>,
    /// True if the dataset has a script that makes it out of its files.
    has_script: bool,
}

impl CommittedDataset {
    fn new(client: &Arc<HubClient>, repository: &HubRepository, commit: &str) -> Self {
        Self {
            store: HubStore {
                client: Arc::clone(client),
                repository: Arc::new(repository.clone()),
                commit: commit.into(),
                chosen: Arc::new(Mutex::new(HashMap::new())),
            },
        }
    }

    /// Returns the fact that the manifest records about the commit.
    fn fact(&self) -> Fact {
        Fact {
            name: self.store.repository.url(),
            kind: COMMIT.to_owned(),
            items: None,
            bytes: 0,
            version: self.store.commit.as_ref().to_owned(),
        }
    }

    fn input(&self, path: &str) -> anyhow::Result<HubInput> {
        let mut url = self.store.repository.url();
        if !path.is_empty() {
            url = format!("{url}/{path}");
        }
        Ok(HubInput {
            location: Location::Remote {
                store: Arc::new(self.store.clone()),
                path: object_store::path::Path::parse(path)?,
                url,
            },
            facts: vec![self.fact()],
        })
    }

    /// Chooses the files below a path that the job reads: those of the first
    /// kind that is there.
    async fn choose(&self, path: &str, wanted: Option<FileKind>) -> Result<TakenFiles, HubError> {
        let HubStore {
            client,
            repository,
            commit,
            ..
        } = &self.store;
        let name = repository.name.rsplit('/').next().unwrap_or_default();
        let script = format!("{name}.py");
        let is_looked_at = |file: &str| file == script || matters(file, wanted);
        let mut files = client.files(repository, commit, path, is_looked_at).await?;
        let has_script = files.iter().any(|file| file.path == script);
        let below = |file: &HubFile| {
            let name = file.path.strip_prefix(path).unwrap_or(&file.path);
            ListedObject {
                name: name.trim_start_matches('/').to_owned(),
                bytes: file.bytes,
                version: String::new(),
                trouble: None,
                may_be_folder: false,
            }
        };
        let mut by_kind = sort_out(files.iter().map(below).collect(), wanted).by_kind;
        let kinds = [
            FileKind::Parquet,
            FileKind::Arrow,
            FileKind::Tar,
            FileKind::Image,
        ];
        let mut taken = kinds
            .into_iter()
            .filter_map(|kind| Some((kind, by_kind.remove(&kind)?.len())));
        let (kind, n_data) = taken.next().unzip();
        files.retain(|file| kind_of(&file.path).is_none_or(|other| Some(other) == kind));
        Ok(TakenFiles {
            dataset: self.clone(),
            kind,
            n_data: n_data.unwrap_or_default(),
            files,
            has_script,
        })
    }

    /// Returns the files that the hub has converted to Parquet, if there are
    /// any.
    async fn converted(&self, began: &[Fact]) -> anyhow::Result<Option<TakenFiles>> {
        let client = &self.store.client;
        let repository = self.store.repository.converted();
        let url = repository.url();
        let commit = match began.iter().find(|fact| is_commit(fact, &url)) {
            Some(fact) => fact.version.clone(),
            None => match client.commit(&repository).await {
                Ok(commit) => commit,
                Err(error) if matches!(error.kind, HubFailure::NoRevision | HubFailure::NoFile) => {
                    return Ok(None);
                }
                Err(error) => return Err(error.into()),
            },
        };
        let converted = Self::new(client, &repository, &commit);
        let taken = converted.choose("", Some(FileKind::Parquet)).await?;
        let is_parquet = taken.kind == Some(FileKind::Parquet);
        if is_parquet {
            tracing::info!(
                "{} has no Parquet files of its own; the files that the hub has converted are \
                 read from {url}",
                self.store.repository.url()
            );
        }
        Ok(is_parquet.then_some(taken))
    }
}

#[cfg(test)]
mod tests;
