//! Downloads models from a hub into the cache that Hugging Face's own tools
//! use.
//!
//! `HF_HOME`, `HF_TOKEN` and `HF_ENDPOINT` have the same meaning as in these
//! tools. The weights are downloaded in one format only, and all files come
//! from the same commit. Without a connection, cached files are used.

use std::io::Read as _;
use std::path::PathBuf;

use hf_hub::api::sync::{Api, ApiBuilder, ApiRepo};
use hf_hub::{Cache, Repo, RepoType};

use super::error::CompileError;
use super::source::{Local, PREPROCESSOR};
use super::{CompileProgress, CompileStep, checkpoint};
use crate::model::architecture;

/// Number of times that an interrupted download is resumed.
const N_RETRIES: usize = 3;
const MAIN: &str = "main";

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

/// Connection to a hub: its address, the user's token, and the cache directory.
#[derive(Debug, Clone)]
pub struct Hub {
    pub endpoint: Option<String>,
    pub token: Option<String>,
    pub cache: PathBuf,
}

impl Hub {
    /// Takes the settings of `HF_HOME`, `HF_TOKEN` and `HF_ENDPOINT`; without
    /// `HF_TOKEN`, the token that a login has stored.
    ///
    /// # Errors
    ///
    /// When there is no directory for a cache.
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
        })
    }

    /// Downloads the files of `repository` at `revision` (`main` if `None`), or
    /// finds them in the cache.
    ///
    /// # Errors
    ///
    /// When the hub does not have the files, or cannot be reached and the cache
    /// does not have them either.
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
        let api = self.api().map_err(|error| failed(error.to_string()))?;
        let at = |revision: &str| {
            Repo::with_revision(repository.to_owned(), RepoType::Model, revision.to_owned())
        };
        let info = match api.repo(at(revision)).info() {
            Ok(info) => info,
            Err(error) => {
                let local = self.cached(at(revision));
                if let Some(local) = &local {
                    let folder = local.folder.display();
                    tracing::warn!(%error, %folder, "cannot query the hub; using cached files");
                }
                return local.ok_or_else(|| failed(error.to_string()));
            }
        };
        let mut download = Download {
            repo: api.repo(at(&info.sha)),
            cache: Cache::new(self.cache.clone()),
            at: at(&info.sha),
            progress,
        };
        let has = |name: &str| info.siblings.iter().any(|file| file.rfilename == name);
        download.file(PREPROCESSOR).map_err(&failed)?;
        let config = download.file(architecture::FILE).map_err(&failed)?;
        let folder = config.parent().unwrap_or(&config).to_owned();
        for (single, index) in checkpoint::SINGLE.iter().zip(checkpoint::INDEX) {
            if has(single) {
                download.file(single).map_err(&failed)?;
            } else if has(index) {
                let path = download.file(index).map_err(&failed)?;
                for name in checkpoint::indexed_files(&path)? {
                    download.file(&name).map_err(&failed)?;
                }
            } else {
                continue;
            }
            // Records the revision's commit, so that the cache can resolve its
            // name without a connection.
            let cache = Cache::new(self.cache.clone()).repo(at(revision));
            cache
                .create_ref(&info.sha)
                .map_err(|error| failed(error.to_string()))?;
            return Ok(Local {
                folder,
                revision: Some(info.sha),
                scratch: None,
            });
        }
        Err(failed(
            "the repository has neither model.safetensors nor pytorch_model.bin".to_owned(),
        ))
    }

    fn api(&self) -> Result<Api, hf_hub::api::sync::ApiError> {
        let mut builder = ApiBuilder::from_cache(Cache::new(self.cache.clone()))
            .with_token(self.token.clone())
            .with_progress(false)
            .with_retries(N_RETRIES)
            .with_user_agent(env!("CARGO_PKG_NAME"), env!("CARGO_PKG_VERSION"));
        if let Some(endpoint) = &self.endpoint {
            let endpoint = endpoint.trim_end_matches('/').to_owned();
            builder = builder.with_endpoint(endpoint);
        }
        builder.build()
    }

    fn cached(&self, at: Repo) -> Option<Local> {
        let cache = Cache::new(self.cache.clone()).repo(at);
        cache.get(PREPROCESSOR)?;
        let folder = cache.get(architecture::FILE)?.parent()?.to_owned();
        let revision = folder.file_name()?.to_string_lossy().into_owned();
        // Weights may be missing from an unfinished download.
        checkpoint::weight_files(&folder).ok()?;
        Some(Local {
            folder,
            revision: Some(revision),
            scratch: None,
        })
    }
}

/// Download of the files of one commit.
struct Download<'p> {
    repo: ApiRepo,
    cache: Cache,
    at: Repo,
    progress: &'p mut dyn CompileProgress,
}

impl Download<'_> {
    fn file(&mut self, name: &str) -> Result<PathBuf, String> {
        if let Some(path) = self.cache.repo(self.at.clone()).get(name) {
            return Ok(path);
        }
        let bar = Bar {
            progress: &mut *self.progress,
        };
        self.repo
            .download_with_progress(name, bar)
            .map_err(|error| format!("{name}: {error}"))
    }
}

struct Bar<'p> {
    progress: &'p mut dyn CompileProgress,
}

impl hf_hub::api::Progress for Bar<'_> {
    fn init(&mut self, size: usize, _filename: &str) {
        self.progress.begin(CompileStep::Download, size as u64);
    }

    fn update(&mut self, size: usize) {
        self.progress.advance(size as u64);
    }

    fn finish(&mut self) {}
}
