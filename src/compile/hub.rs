//! Downloads models from a hub into the cache that Hugging Face's own tools
//! use.
//!
//! `HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`, `HF_HUB_ETAG_TIMEOUT`
//! and `HF_HUB_DOWNLOAD_TIMEOUT` have the same meaning as in these tools. The
//! weights are downloaded in one format only, and all files come from the same
//! commit. If the hub cannot be used now, cached files are used; if it refuses
//! (no such model, no access), that is an error, whatever the cache has.

mod download;
mod wire;

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hf_hub::{Cache, CacheRepo, Repo, RepoType};

use self::download::SnapshotDownload;
use self::wire::{HubModel, HubTrouble, HubWire};
use super::error::CompileError;
use super::source::{Local, PREPROCESSOR};
use super::{CompileProgress, checkpoint};
use crate::model::architecture;
use crate::model::settings::ModelSettings;

const MAIN: &str = "main";
/// Default of both time limits, as `huggingface_hub` has it.
const TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time limit that a variable may set; a longer one is no limit.
const TIMEOUT_MAX: u64 = 24 * 60 * 60;
pub(crate) const ETAG_TIMEOUT: &str = "HF_HUB_ETAG_TIMEOUT";
pub(crate) const DOWNLOAD_TIMEOUT: &str = "HF_HUB_DOWNLOAD_TIMEOUT";
/// Variables that forbid connections to the hub. The second one counts only if
/// the first one is unset or empty.
const OFFLINE: [&str; 2] = ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"];

/// Largest file that is read as a token; a token has about 40 bytes.
const TOKEN_BYTES_MAX: u64 = 4096;

/// Address of a hub, and the user's token.
#[derive(Clone, Default)]
pub struct HubAccess {
    /// Address from `HF_ENDPOINT`, if the variable is set.
    pub endpoint: Option<String>,
    pub token: Option<String>,
}

impl HubAccess {
    /// Takes the settings of `HF_ENDPOINT` and `HF_TOKEN`; without `HF_TOKEN`,
    /// the token that a login has stored in `HF_TOKEN_PATH`, or in the
    /// directory of `HF_HOME`.
    #[must_use]
    pub fn from_env() -> Self {
        Self {
            endpoint: set("HF_ENDPOINT"),
            token: set("HF_TOKEN").or_else(stored_token),
        }
    }
}

// A token is never written into a log.
impl std::fmt::Debug for HubAccess {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HubAccess")
            .field("endpoint", &self.endpoint)
            .finish_non_exhaustive()
    }
}

/// Returns the value of an environment variable that is set and not empty.
fn set(name: &str) -> Option<String> {
    let value = std::env::var(name).ok()?;
    let value = value.trim();
    (!value.is_empty()).then(|| value.to_owned())
}

/// Reads the token that a login has stored, where Hugging Face's own tools look
/// for it.
fn stored_token() -> Option<String> {
    let path = set("HF_TOKEN_PATH").map(PathBuf::from).or_else(|| {
        let home = set("HF_HOME").map(PathBuf::from).or_else(|| {
            let cache = set("XDG_CACHE_HOME").map(PathBuf::from);
            let cache = cache.or_else(|| Some(std::env::home_dir()?.join(".cache")));
            cache.map(|cache| cache.join("huggingface"))
        });
        home.map(|home| home.join("token"))
    })?;
    // Opening a pipe would block.
    if !std::fs::metadata(&path).ok()?.is_file() {
        return None;
    }
    let mut token = String::new();
    let file = std::fs::File::open(path).ok()?;
    file.take(TOKEN_BYTES_MAX).read_to_string(&mut token).ok()?;
    let token = token.trim();
    (!token.is_empty()).then(|| token.to_owned())
}

/// Returns the variable that forbids connections to the hub, if one does.
#[must_use]
pub fn offline_variable() -> Option<&'static str> {
    offline_by(set)
}

fn offline_by(set: impl Fn(&str) -> Option<String>) -> Option<&'static str> {
    let (name, value) = OFFLINE
        .into_iter()
        .find_map(|name| Some((name, set(name)?)))?;
    let value = value.to_ascii_uppercase();
    matches!(value.as_str(), "1" | "ON" | "YES" | "TRUE").then_some(name)
}

/// Time limits for a hub.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HubTimes {
    /// Limit for each answer without a file, and for the head of each answer
    /// with a file.
    pub answer: Duration,
    /// Limit for a pause within a file. A slow download that goes on has no
    /// limit.
    pub pause: Duration,
}

impl Default for HubTimes {
    fn default() -> Self {
        Self {
            answer: TIMEOUT,
            pause: TIMEOUT,
        }
    }
}

impl HubTimes {
    fn read(set: impl Fn(&str) -> Option<String>) -> Result<Self, CompileError> {
        let time = |name: &str| {
            let Some(text) = set(name) else {
                return Ok(TIMEOUT);
            };
            match text.parse() {
                // `huggingface_hub` takes its default then.
                Ok(0) => Ok(TIMEOUT),
                Ok(seconds @ 1..=TIMEOUT_MAX) => Ok(Duration::from_secs(seconds)),
                _ => Err(CompileError::Options(format!(
                    "{name} is {text:?}; it must be a whole number of seconds, 1 to {TIMEOUT_MAX}"
                ))),
            }
        };
        Ok(Self {
            answer: time(ETAG_TIMEOUT)?,
            pause: time(DOWNLOAD_TIMEOUT)?,
        })
    }
}

/// Connection to a hub: its address, the user's token, and the cache directory.
#[derive(Debug, Clone)]
pub struct Hub {
    pub endpoint: Option<String>,
    pub token: Option<String>,
    pub cache: PathBuf,
    /// Variable that forbids connections, if one does.
    pub offline: Option<&'static str>,
    pub times: HubTimes,
}

impl Hub {
    /// Takes the settings of the environment; without `HF_TOKEN`, the token
    /// that a login has stored.
    ///
    /// # Errors
    ///
    /// When there is no directory for a cache, or a time limit is not a number.
    pub fn from_env() -> Result<Self, CompileError> {
        if set("HF_HOME").is_none() && std::env::home_dir().is_none() {
            return Err(CompileError::Options(
                "the home directory is unknown, so downloads cannot be cached; set HF_HOME"
                    .to_owned(),
            ));
        }
        let HubAccess { endpoint, token } = HubAccess::from_env();
        Ok(Self {
            endpoint,
            token,
            cache: Cache::from_env().path().clone(),
            offline: offline_variable(),
            times: HubTimes::read(set)?,
        })
    }

    /// Downloads the files of `repository` at `revision` (`main` if `None`), or
    /// finds them in the cache.
    ///
    /// # Errors
    ///
    /// When the hub does not have the files or does not give them to this user,
    /// or cannot be used now and the cache does not have them either.
    pub fn fetch(
        &self,
        repository: &str,
        revision: Option<&str>,
        progress: &mut dyn CompileProgress,
    ) -> Result<Local, CompileError> {
        let revision = revision.unwrap_or(MAIN);
        let failed = |reason: String| CompileError::Hub {
            repository: repository.to_owned(),
            reason,
        };
        let at = HubModel {
            name: repository,
            revision,
        };
        let cache = self.cache.display();
        if let Some(variable) = self.offline {
            let local = self.cached(at).ok_or_else(|| {
                failed(format!(
                    "{variable} is set, so the hub is not asked, and the cache {cache} has no \
                     complete copy of revision {revision}; unset {variable}, or name the cache \
                     that has one with HF_HOME"
                ))
            })?;
            note_cached(&local, variable);
            return Ok(local);
        }
        let trouble = match self.download(at, progress) {
            Ok(local) => return Ok(local),
            Err(trouble) => trouble,
        };
        match (trouble, self.cached(at)) {
            (HubTrouble::Here(error), _) => Err(error),
            (HubTrouble::Absent(reason), Some(local)) => {
                let (folder, revision) = (local.folder.display(), local.revision.as_deref());
                tracing::warn!(
                    reason,
                    revision,
                    %folder,
                    "cannot use the hub; using the model's copy in the cache"
                );
                Ok(local)
            }
            (HubTrouble::Absent(reason), None) => Err(failed(format!(
                "{reason}; the cache {cache} has no complete copy of revision {revision} to use \
                 instead; check the network, proxies and HF_ENDPOINT, or allow more time with \
                 {ETAG_TIMEOUT} and {DOWNLOAD_TIMEOUT} (seconds)"
            ))),
            // An old copy would hide that the model is gone or that the token
            // is wrong.
            (HubTrouble::Refused(reason), Some(local)) => Err(failed(format!(
                "{reason}; HF_HUB_OFFLINE=1 uses the copy of commit {} that the cache has",
                local.revision.unwrap_or_default()
            ))),
            (HubTrouble::Refused(reason), None) => Err(failed(reason)),
        }
    }

    fn download(
        &self,
        at: HubModel<'_>,
        progress: &mut dyn CompileProgress,
    ) -> Result<Local, HubTrouble> {
        let wire = HubWire::new(self)?;
        let info = wire.info(at)?;
        let cache = self.repository(at);
        let snapshot = cache.pointer_path(&info.commit);
        let mut download = SnapshotDownload {
            wire: &wire,
            at,
            commit: &info.commit,
            folder: snapshot,
            pause: self.times.pause,
            progress,
        };
        download.file(PREPROCESSOR)?;
        let config = download.file(architecture::FILE)?;
        let folder = config.parent().unwrap_or(&config).to_owned();
        // Before the weights, which may be gigabytes.
        ModelSettings::of_checkpoint(&folder).map_err(CompileError::from)?;
        for (single, index) in checkpoint::SINGLE.iter().zip(checkpoint::INDEX) {
            if info.has(single) {
                download.file(single)?;
            } else if info.has(index) {
                let path = download.file(index)?;
                for name in checkpoint::indexed_files(&path)? {
                    download.file(&name)?;
                }
            } else {
                continue;
            }
            // Records the revision's commit, so that the cache can resolve its
            // name without a connection.
            cache
                .create_ref(&info.commit)
                .map_err(|error| CompileError::write(&self.cache, &error))?;
            return Ok(Local {
                folder,
                revision: Some(info.commit),
                scratch: None,
            });
        }
        Err(HubTrouble::Refused(
            "the repository has neither model.safetensors nor pytorch_model.bin".to_owned(),
        ))
    }

    fn repository(&self, at: HubModel<'_>) -> CacheRepo {
        let (name, revision) = (at.name.to_owned(), at.revision.to_owned());
        let repository = Repo::with_revision(name, RepoType::Model, revision);
        Cache::new(self.cache.clone()).repo(repository)
    }

    /// Finds a complete copy of a revision in the cache.
    fn cached(&self, at: HubModel<'_>) -> Option<Local> {
        let cache = self.repository(at);
        // A commit may have no reference of its own.
        let folder = match cache.get(architecture::FILE) {
            Some(config) => config.parent()?.to_owned(),
            None if wire::is_commit(at.revision) => cache.pointer_path(at.revision),
            None => return None,
        };
        let has = |name: &str| folder.join(name).is_file();
        // Other tools record a commit before they have all of its files.
        let weights = checkpoint::weight_files(&folder).ok()?;
        let is_complete =
            has(PREPROCESSOR) && has(architecture::FILE) && weights.iter().all(|name| has(name));
        is_complete.then(|| Local {
            revision: folder
                .file_name()
                .map(|name| name.to_string_lossy().into_owned()),
            folder,
            scratch: None,
        })
    }
}

fn note_cached(local: &Local, variable: &str) {
    let (folder, revision): (&Path, _) = (&local.folder, local.revision.as_deref());
    let folder = folder.display();
    tracing::info!(
        revision,
        %folder,
        "{variable} is set; using the model's copy in the cache"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variables_that_forbid_connections_are_read_as_the_hubs_own_tools_read_them() {
        let offline = |hub: Option<&str>, transformers: Option<&str>| {
            offline_by(|name| {
                let value = if name == "HF_HUB_OFFLINE" {
                    hub
                } else {
                    transformers
                };
                value.map(str::to_owned)
            })
        };
        for value in ["1", "true", "True", "YES", "on"] {
            assert_eq!(offline(Some(value), None), Some("HF_HUB_OFFLINE"));
            assert_eq!(offline(None, Some(value)), Some("TRANSFORMERS_OFFLINE"));
        }
        for value in ["0", "false", "no", "off", "2"] {
            assert_eq!(offline(Some(value), Some("1")), None, "{value}");
        }
        assert_eq!(offline(None, None), None);
    }

    #[test]
    fn time_limits_are_whole_seconds() {
        let read = |value: &str| HubTimes::read(|_| Some(value.to_owned()));
        assert_eq!(read("3").unwrap().answer, Duration::from_secs(3));
        assert_eq!(read("0").unwrap(), HubTimes::default());
        for value in ["abc", "-1", "1.5", "100000", "inf"] {
            let error = read(value).unwrap_err().to_string();
            assert!(error.starts_with("HF_HUB_ETAG_TIMEOUT is"), "{error}");
        }
    }
}
