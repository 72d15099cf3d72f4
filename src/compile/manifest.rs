//! `imagegpt.json`: what a compiled folder holds, and how exact it is.
//!
//! It is written last, so a folder without one is not a compiled folder.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use super::config::Architecture;
use super::error::CompileError;
use super::{Precision, Provider, Task};

/// The file's name.
pub const FILE: &str = "imagegpt.json";
/// Counts up when older readers would be wrong about a folder.
pub const FORMAT: u32 = 6;

/// See the module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// Version of the compiler.
    pub tool_version: String,
    pub source: SourceFacts,
    pub precision: Precision,
    /// What the graphs are made for; they are slow elsewhere or do not run.
    pub provider: Provider,
    pub tasks: Vec<Task>,
    pub architecture: Architecture,
    /// Where `embed` ends: its features are of layers 0 to this one.
    pub feature_layer: usize,
    /// Of the backbone, and with all heads.
    pub parameters: (u64, u64),
    /// Classes of the head that `classify` ends in.
    pub n_classes: Option<usize>,
    pub graphs: BTreeMap<String, GraphFacts>,
    pub verification: Verification,
    /// Bytes of each file.
    pub files: BTreeMap<String, u64>,
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceFacts {
    /// The folder or hub id as it was given.
    pub name: String,
    /// The commit that a hub gave.
    pub revision: Option<String>,
    /// SHA-256 over `config.json` and the weights.
    pub sha256: String,
}

/// One graph file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraphFacts {
    pub file: String,
    pub task: Task,
    pub n_layers: usize,
    /// Multiplications and additions for one image.
    pub flop: u64,
    /// Largest relative error of each output against the reference; for
    /// features, of each layer.
    pub errors: Vec<f64>,
    /// Smallest cosine between a row of the output and the reference's.
    pub cosine: f64,
    /// Kernels that ran in the trial, by execution provider and operator.
    pub operators: BTreeMap<String, BTreeMap<String, usize>>,
}

/// How the graphs were tried.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// Where they ran.
    pub provider: Provider,
    /// Largest relative error (norm of the difference to norm of the
    /// reference) that was allowed.
    pub tolerance: f64,
    pub n_sequences: usize,
    /// Tokens of each; fewer than an image's for models so large that the
    /// reference would take minutes.
    pub n_positions: usize,
}

impl Manifest {
    /// Reads the manifest of a compiled folder.
    ///
    /// # Errors
    ///
    /// When there is none, or it is of another format, or a file that it
    /// names is missing or of another size.
    pub fn read(folder: &Path) -> Result<Self, CompileError> {
        let path = folder.join(FILE);
        let text = std::fs::read(&path).map_err(|error| CompileError::read(&path, &error))?;
        let refuse = |reason: String| CompileError::config(&path, reason);
        let manifest: Self = serde_json::from_slice(&text)
            .map_err(|error| refuse(format!("is not a compiled folder's: {error}")))?;
        if manifest.format != FORMAT {
            return Err(refuse(format!(
                "is of format {}, this version reads {FORMAT}; compile the model again",
                manifest.format
            )));
        }
        if manifest.feature_layer > manifest.architecture.n_layers {
            return Err(refuse(format!(
                "names feature layer {} of a model of {} layers; compile the model again",
                manifest.feature_layer, manifest.architecture.n_layers
            )));
        }
        let graphs = manifest.graphs.values().map(|graph| graph.file.as_str());
        for needed in graphs.chain([super::store::FILE]) {
            if !manifest.files.contains_key(needed) {
                return Err(refuse(format!(
                    "does not list {needed}; compile the model again"
                )));
            }
        }
        for (name, bytes) in &manifest.files {
            let found = std::fs::metadata(folder.join(name))
                .map(|file| file.len())
                .ok();
            if found != Some(*bytes) {
                return Err(refuse(format!(
                    "names {name} of {bytes} bytes, which is {}; compile the model again",
                    found.map_or("missing".to_owned(), |bytes| format!("of {bytes} bytes"))
                )));
            }
        }
        Ok(manifest)
    }
}
