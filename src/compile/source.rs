//! Where a model comes from.

use std::fmt;
use std::path::PathBuf;

use super::Progress;
use super::error::CompileError;

/// The preprocessor's settings and palette, which `serve` needs.
pub const PREPROCESSOR: &str = "preprocessor_config.json";

/// A model in Hugging Face's layout.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Source {
    /// On this machine.
    Folder(PathBuf),
}

/// A source as files on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Local {
    pub folder: PathBuf,
    /// The commit, if a hub named one.
    pub revision: Option<String>,
}

impl fmt::Display for Source {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => write!(formatter, "{}", folder.display()),
        }
    }
}

impl Source {
    /// Takes what a user wrote: a folder if there is one by that name.
    #[must_use]
    pub fn parse(text: &str, _revision: Option<&str>) -> Self {
        Self::Folder(PathBuf::from(text))
    }

    /// Makes the files available.
    ///
    /// # Errors
    ///
    /// When the folder is not there.
    pub fn fetch(&self, _progress: &mut dyn Progress) -> Result<Local, CompileError> {
        match self {
            Self::Folder(folder) => {
                if !folder.is_dir() {
                    return Err(CompileError::Read {
                        path: folder.clone(),
                        reason: "there is no such folder".to_owned(),
                    });
                }
                Ok(Local {
                    folder: folder.clone(),
                    revision: None,
                })
            }
        }
    }
}
