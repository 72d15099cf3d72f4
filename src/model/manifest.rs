//! `imagegpt.json`: what a compiled folder holds, and how exact it is.
//!
//! It is written last, so a folder without one is not a compiled folder.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::architecture;
use super::architecture::Architecture;
use crate::files::hex;
use crate::model::error::ModelFileError;
use crate::model::files::{self, Sha256Digest};
use crate::model::precision::{CompileTask, Precision, Provider};

/// The file's name.
pub const FILE: &str = "imagegpt.json";
/// File of all weights, beside the graphs.
pub const WEIGHTS_FILE: &str = "weights.bin";
/// Counts up when older readers would be wrong about a folder.
pub const FORMAT: u32 = 6;

/// Contents of the manifest file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// Version of the compiler.
    pub tool_version: String,
    pub source: SourceFacts,
    pub precision: Precision,
    /// What the graphs are made for; they are slow elsewhere or do not run.
    pub provider: Provider,
    pub tasks: Vec<CompileTask>,
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
    /// SHA-256 of each file; empty in folders of versions that did not record them,
    /// which then take longer to open.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub sha256: BTreeMap<String, String>,
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
    pub task: CompileTask,
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
    pub fn read(folder: &Path) -> Result<Self, ModelFileError> {
        let path = folder.join(FILE);
        let text = architecture::read(&path)?;
        let refuse = |reason: String| ModelFileError::content(&path, reason);
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
        for needed in graphs.chain([crate::model::manifest::WEIGHTS_FILE]) {
            if !manifest.files.contains_key(needed) {
                return Err(refuse(format!(
                    "does not list {needed}; compile the model again"
                )));
            }
        }
        manifest.digests().map_err(refuse)?;
        for (name, bytes) in &manifest.files {
            let is_inside = |part| matches!(part, Component::Normal(_));
            if !Path::new(name).components().all(is_inside) {
                return Err(refuse(format!(
                    "names {name:?}, which is no file of the folder; compile the model again"
                )));
            }
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

    /// The recorded digests by file.
    ///
    /// # Errors
    ///
    /// When there are some and not of every file, or one is no SHA-256.
    pub(crate) fn digests(&self) -> Result<BTreeMap<&str, Sha256Digest>, String> {
        let mut digests = BTreeMap::new();
        if self.sha256.is_empty() {
            return Ok(digests);
        }
        for name in self.files.keys() {
            let digest = self.sha256.get(name).and_then(|text| unhex(text));
            let digest = digest
                .ok_or_else(|| format!("has no SHA-256 of {name}; compile the model again"))?;
            digests.insert(name.as_str(), digest);
        }
        Ok(digests)
    }

    /// Reads every file of `folder` and compares it with what was recorded.
    ///
    /// # Errors
    ///
    /// When one is another, with all that are; or when nothing was recorded.
    pub fn verify(&self, folder: &Path) -> Result<(), ModelFileError> {
        let refuse = |reason: String| ModelFileError::content(folder, reason);
        let digests = self.digests().map_err(refuse)?;
        if digests.is_empty() {
            return Err(refuse(
                "was compiled before SHA-256s were recorded, so there is nothing to compare its \
                 files with; compile the model again"
                    .to_owned(),
            ));
        }
        let mut differing = Vec::new();
        for (name, recorded) in digests {
            match files::sha256(&folder.join(name)) {
                Ok((_, found)) if found == recorded => {}
                Ok((_, found)) => differing.push(format!(
                    "{name} has the SHA-256 {} where {FILE} has {}",
                    hex(&found),
                    hex(&recorded)
                )),
                Err(error) => differing.push(format!("{name} cannot be read: {error}")),
            }
        }
        if differing.is_empty() {
            return Ok(());
        }
        Err(refuse(format!(
            "is not what was compiled: {}; compile the model again",
            differing.join(", and ")
        )))
    }
}

fn unhex(text: &str) -> Option<Sha256Digest> {
    let mut digest = Sha256Digest::default();
    if text.len() != 2 * digest.len() || !text.is_ascii() {
        return None;
    }
    for (idx, byte) in digest.iter_mut().enumerate() {
        *byte = u8::from_str_radix(text.get(2 * idx..2 * idx + 2)?, 16).ok()?;
    }
    Some(digest)
}
