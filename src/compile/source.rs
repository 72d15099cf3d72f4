//! Sources of models: a directory, a hub, or random weights.

use std::fmt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::CompileProgress;
use super::error::CompileError;
use super::hub::Hub;
use super::random::{self, PREFIX, ScratchFolder};
use crate::model::ACCEPTED;
use crate::model::error::ModelFileError;
use crate::nearest::nearest_directory;

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
    ///
    /// Where `owner` is a directory, `owner/name` is more likely a mistyped
    /// directory than a model of a hub; a revision, which only a hub has, says
    /// otherwise.
    #[must_use]
    pub fn parse(text: &str, revision: Option<&str>) -> Self {
        let folder = PathBuf::from(text);
        if let Some(shape) = text.strip_prefix(PREFIX)
            && !folder.exists()
        {
            return Self::Random(shape.to_owned());
        }
        let is_beside = || revision.is_none() && folder.parent().is_some_and(Path::is_dir);
        if folder.exists() || !is_repository(text) || is_beside() {
            return Self::Folder(folder);
        }
        Self::Hub {
            repository: text.to_owned(),
            revision: revision.map(str::to_owned),
        }
    }

    /// Refuses a directory that is not there, before anything is done.
    ///
    /// # Errors
    ///
    /// When the directory does not exist; the error names the directory that
    /// exists and is most like it.
    pub(crate) fn check(&self) -> Result<(), CompileError> {
        let Self::Folder(folder) = self else {
            return Ok(());
        };
        if folder.is_dir() {
            return Ok(());
        }
        let what = if folder.exists() {
            "this is not a directory"
        } else {
            "the directory does not exist"
        };
        let mut reason = match nearest_directory(folder) {
            Some(near) => format!("{what}, and {} is one", near.display()),
            None => format!("{what}; {ACCEPTED}"),
        };
        if folder.to_str().is_some_and(is_repository) {
            reason.push_str("; a hub's model of that name needs --revision, such as main");
        }
        Err(ModelFileError::Read {
            path: folder.clone(),
            reason,
        }
        .into())
    }

    /// Makes the source's files available on this machine.
    ///
    /// # Errors
    ///
    /// When the directory does not exist or the files cannot be downloaded.
    pub fn fetch(&self, progress: &mut dyn CompileProgress) -> Result<Local, CompileError> {
        self.check()?;
        match self {
            Self::Folder(folder) => Ok(Local {
                folder: folder.clone(),
                revision: None,
                scratch: None,
            }),
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
        // This package has a directory of that name, and one of the owner's.
        assert!(!is_hub("src/compile"));
        assert!(!is_hub("models/emojy"));
        let of_hub = ModelSource::parse("models/emojy", Some("main"));
        assert!(matches!(of_hub, ModelSource::Hub { .. }));
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

    #[test]
    fn a_mistyped_directory_is_refused_with_the_nearest_one() {
        let refusal = |text: &str| {
            let source = ModelSource::parse(text, None);
            source.check().expect_err(text).to_string()
        };
        for (text, near) in [
            ("models/emojy", "models/emoji is one; a hub's model"),
            ("./modles/emoji", "./models/emoji is one"),
            ("modles/emoji/", "models/emoji is one"),
            ("models/untraind/", "models/untrained is one"),
            ("../nowhere/at/all", "--model takes a directory"),
            ("/nowhere", "--model takes a directory"),
            ("~/nowhere", "--model takes a directory"),
            ("nowhere", "--model takes a directory"),
        ] {
            let said = refusal(text);
            let begin = format!("{text} cannot be read: the directory does not exist");
            assert!(said.starts_with(&begin) && said.contains(near), "{said}");
        }
        let said = refusal("src/lib.rs");
        assert!(said.contains("this is not a directory"), "{said}");
        for fine in ["src/compile", "openai/imagegpt-small", "random:tiny"] {
            ModelSource::parse(fine, None).check().expect(fine);
        }
    }
}
