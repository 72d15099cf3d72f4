//! Errors of the files of a model.

use std::path::{Path, PathBuf};

/// Reason why a file of a model cannot be used. Every text is one sentence.
#[derive(Debug, thiserror::Error)]
pub enum ModelFileError {
    /// The file cannot be read.
    #[error("{} cannot be read: {reason}", path.display())]
    Read { path: PathBuf, reason: String },
    /// The file's content is not supported.
    #[error("{} {reason}", path.display())]
    Content { path: PathBuf, reason: String },
}

impl ModelFileError {
    pub(crate) fn read(path: &Path, error: &std::io::Error) -> Self {
        let reason = match error.kind() {
            std::io::ErrorKind::UnexpectedEof => "the file is truncated".to_owned(),
            _ => error.to_string(),
        };
        Self::Read {
            path: path.to_owned(),
            reason,
        }
    }

    pub(crate) fn content(path: &Path, reason: impl Into<String>) -> Self {
        Self::Content {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
