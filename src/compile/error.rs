//! What can go wrong between a checkpoint and its graphs.

use std::path::{Path, PathBuf};

use crate::model::error::ModelFileError;

/// Every text is one sentence that says what to change.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// A file of the source cannot be read, or is not of an ImageGPT that this
    /// compiler supports.
    #[error(transparent)]
    File(#[from] ModelFileError),
    /// The weights are missing, truncated or of another shape.
    #[error("{} {reason}", path.display())]
    Weights { path: PathBuf, reason: String },
    /// The options do not fit the model or each other.
    #[error("{0}")]
    Options(String),
    /// A hub would not give what was asked for.
    #[error("{repository} cannot be downloaded: {reason}")]
    Hub { repository: String, reason: String },
    /// The output cannot be written.
    #[error("{} cannot be written: {reason}", path.display())]
    Write { path: PathBuf, reason: String },
    /// ONNX Runtime would not load or run a graph.
    #[error("graph {graph} does not run: {reason}")]
    Runtime { graph: String, reason: String },
    /// A graph does not compute what the reference does.
    #[error(
        "graph {graph} is off the float64 reference by {error:.2e} in {output}, above the \
         tolerance of {tolerance:.0e} for {precision}; nothing was written"
    )]
    Tolerance {
        graph: String,
        output: String,
        precision: &'static str,
        error: f64,
        tolerance: f64,
    },
    /// ONNX Runtime took a graph's fused operators apart or left them out.
    #[error(
        "graph {graph} ran {found} of {operator} on {provider} where {expected} belong, so it \
         would be slow; use an ONNX Runtime that has this operator"
    )]
    NotFused {
        graph: String,
        operator: String,
        provider: String,
        found: usize,
        expected: usize,
    },
}

impl CompileError {
    pub(crate) fn read(path: &Path, error: &std::io::Error) -> Self {
        ModelFileError::read(path, error).into()
    }

    pub(crate) fn write(path: &Path, error: &std::io::Error) -> Self {
        let reason = match error.kind() {
            std::io::ErrorKind::StorageFull | std::io::ErrorKind::QuotaExceeded => {
                "the disk is full".to_owned()
            }
            _ => error.to_string(),
        };
        Self::Write {
            path: path.to_owned(),
            reason,
        }
    }

    pub(crate) fn weights(path: &Path, reason: impl Into<String>) -> Self {
        Self::Weights {
            path: path.to_owned(),
            reason: reason.into(),
        }
    }
}
