//! Errors of the compilation of a checkpoint.

use std::path::{Path, PathBuf};

use crate::model::ModelError;
use crate::model::error::ModelFileError;
use crate::runtime::error::EngineError;

/// Reason why a compilation failed. Every text is one sentence that says what
/// to change.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// A file of the source cannot be read, or belongs to a model that this
    /// compiler does not support.
    #[error(transparent)]
    File(#[from] ModelFileError),
    /// The settings of the source cannot be served.
    #[error(transparent)]
    Settings(#[from] ModelError),
    /// The weights are missing or truncated, or have an unexpected shape.
    #[error("{} {reason}", path.display())]
    Weights { path: PathBuf, reason: String },
    /// The options do not fit the model or each other.
    #[error("{0}")]
    Options(String),
    /// The files of a hub's repository cannot be downloaded.
    #[error("{repository} cannot be downloaded: {reason}")]
    Hub { repository: String, reason: String },
    /// The output cannot be written.
    #[error("{} cannot be written: {reason}", path.display())]
    Write { path: PathBuf, reason: String },
    /// ONNX Runtime cannot load or run a graph.
    #[error("graph {graph} does not run: {reason}")]
    Runtime { graph: String, reason: String },
    /// The device is lost, which says nothing about the graph.
    #[error("graph {graph} could not be tried: {error}")]
    Device { graph: String, error: EngineError },
    /// A graph's results differ too much from the reference.
    #[error(
        "graph {graph} has a relative error of {error:.2e} against the float64 reference in \
         {output}; the tolerance of {precision} is {tolerance:.0e}; nothing was written"
    )]
    Tolerance {
        graph: String,
        output: String,
        precision: &'static str,
        error: f64,
        tolerance: f64,
    },
    /// ONNX Runtime did not run all of a graph's fused operators as such.
    #[error(
        "graph {graph} ran {found} {operator} operators on {provider} instead of {expected}, so \
         it would be slow; use an ONNX Runtime that has this operator"
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
    /// Error of a graph's trial run.
    pub(crate) fn of_run(graph: &str, error: EngineError) -> Self {
        let graph = graph.to_owned();
        match error {
            EngineError::Device(_) => Self::Device { graph, error },
            EngineError::Runtime(reason) | EngineError::OutOfMemory(reason) => {
                Self::Runtime { graph, reason }
            }
            error => Self::Runtime {
                graph,
                reason: error.to_string(),
            },
        }
    }

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
