//! Sources of models: a directory, a hub, or random weights.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use super::CompileProgress;
use super::error::CompileError;
use super::hub::Hub;
use super::random::{self, PREFIX, ScratchFolder};
use crate::model::error::ModelFileError;

pub(crate) use crate::model::settings::PREPROCESSOR;

/// A model in Hugging Face's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelSource {
    /// Directory on this machine.
    Folder(PathBuf),
    /// Repository on a hub, for instance `openai/imagegpt-small`.
    Hub {
        repository: String,
        /// Branch, tag or commit; `None` for `main`.
        revision: Option<String>,
    },
    /// Random weights in a published shape, for instance `small`.
    Random(String),
}

/// Files of a source on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    pub folder: PathBuf,
    /// Commit of the files, if they come from a hub.
    pub revision: Option<String>,
    /// Guard that removes the directory after its last use, if it is a
    /// temporary directory of this process.
    pub scratch: Option<Arc<ScratchFolder>>,
}

impl fmt::Display for ModelSource {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(formatter, "{}", folder.display()),
            Self::Hub { repository, .. } => write!(formatter, "{repository}"),
            Self::Random(shape) => write!(formatter, "{PREFIX}{shape}"),
        }
    }
}

impl ModelSource {
    /// Parses the value that a user gave: a directory if it exists, else a
    /// shape with random weights (`random:SHAPE`) or a hub id (`owner/name`).
    #[must_use]
    pub fn parse(text: &str, revision: Option<&str>) -> Self {
        let folder = PathBuf::from(text);
        if let Some(shape) = text.strip_prefix(PREFIX)
            && !folder.exists()
        {
            return Self::Random(shape.to_owned());
        }
        if folder.exists() || !is_repository(text) {
            return Self::Folder(folder);
        }
        Self::Hub {
            repository: text.to_owned(),
            revision: revision.map(str::to_owned),
        }
    }

    /// Makes the source's files available on this machine.
    ///
    /// # Errors
    ///
    /// When the directory does not exist or the files cannot be downloaded.
    pub fn fetch(&self, progress: &mut dyn CompileProgress) -> Result<Local, CompileError> {
        match self {
            Self::Folder(folder) if folder.is_dir() => Ok(Local {
                folder: folder.clone(),
                revision: None,
                scratch: None,
            }),
            Self::Folder(folder) => Err(ModelFileError::Read {
                path: folder.clone(),
                reason: "the directory does not exist, and this is not a hub id such as \
                         openai/imagegpt-small"
                    .to_owned(),
            }
            .into()),
            Self::Hub {
                repository,
                revision,
            } => Hub::from_env()?.fetch(repository, revision.as_deref(), progress),
            Self::Random(shape) => random::fetch(shape),
        }
    }
}

/// Returns true for `owner/name` in the characters that hubs allow.
fn is_repository(text: &str) -> bool {
    let is_name = |name: &str| {
        !name.is_empty()
            && !name.starts_with(['.', '-'])
            && name
                .chars()
                .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_'))
    };
    text.split_once('/')
        .is_some_and(|(owner, name)| is_name(owner) && is_name(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_sources_are_told_apart() {
        let is_hub = |text| matches!(ModelSource::parse(text, None), ModelSource::Hub { .. });
        assert!(is_hub("openai/imagegpt-small"));
        // This package has a directory of that name.
        assert!(!is_hub("src/compile"));
        let random = ModelSource::Random("small".to_owned());
        assert_eq!(ModelSource::parse("random:small", None), random);
        assert_eq!(random.to_string(), "random:small");
        for text in [
            "models",
            "/models/small",
            "./models/small",
            "../small",
            "a/b/c",
            "a/",
        ] {
            assert!(!is_hub(text), "{text}");
        }
    }
}
