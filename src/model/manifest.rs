//! `imagegpt.json`, the manifest of a compiled directory: its files, and how
//! exact its graphs are.
//!
//! The manifest is written last, so a directory without a manifest is not a
//! compiled directory.

use std::collections::BTreeMap;
use std::path::{Component, Path};

use serde::{Deserialize, Serialize};

use super::architecture;
use super::architecture::Architecture;
use crate::files::hex;
use crate::model::error::ModelFileError;
use crate::model::files::{self, Sha256Digest};
use crate::model::precision::{CompileTask, Precision, Provider};

/// Name of the manifest file.
pub const FILE: &str = "imagegpt.json";
/// Name of the file of all weights, beside the graphs.
pub const WEIGHTS_FILE: &str = "weights.bin";
/// Version of the manifest's format; raised when older readers would misread a
/// directory, and when any graph changes (`src/compile/graph/tests.rs`).
pub const FORMAT: u32 = 8;

/// Contents of the manifest file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Manifest {
    pub format: u32,
    /// Version of this package that compiled the model.
    pub tool_version: String,
    pub source: SourceFacts,
    pub precision: Precision,
    /// Provider that the graphs are made for; on another provider they are slow
    /// or do not run.
    pub provider: Provider,
    pub tasks: Vec<CompileTask>,
    pub architecture: Architecture,
    /// Last layer of `embed`, whose features begin at layer 0.
    pub feature_layer: usize,
    /// Number of parameters: of the backbone, and with all heads.
    pub parameters: (u64, u64),
    /// Number of classes of the classification head, if the model has one.
    pub n_classes: Option<usize>,
    pub graphs: BTreeMap<String, GraphFacts>,
    pub verification: Verification,
    /// Size of each file in bytes.
    pub files: BTreeMap<String, u64>,
    /// SHA-256 of each file.
    pub sha256: BTreeMap<String, String>,
}

/// Fields of a manifest that every format has, for directories of other
/// versions.
#[derive(Deserialize)]
struct ManifestHead {
    format: u32,
    #[serde(default)]
    tool_version: String,
    source: Option<SourceFacts>,
    /// Name of the precision, which this version need not know.
    precision: Option<String>,
}

impl ManifestHead {
    /// Returns the reason why the directory is refused, and what to do.
    fn refusal(&self) -> String {
        let (format, version) = (self.format, &self.tool_version);
        if format > FORMAT {
            return format!(
                "has format {format}, written by imagegpt {version}; this version reads format \
                 {FORMAT}; upgrade imagegpt, or compile the model again with this version"
            );
        }
        let command = match (&self.source, &self.precision) {
            (Some(source), Some(precision)) => format!(
                " (imagegpt compile {} --precision {precision} --output DIR)",
                source.name
            ),
            _ => String::new(),
        };
        format!(
            "has format {format} of version {version}; this version reads format {FORMAT}; \
             compile the model again{command}"
        )
    }
}

#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SourceFacts {
    /// Directory or hub id, as the user gave it.
    pub name: String,
    /// Commit of the hub's repository.
    pub revision: Option<String>,
    /// SHA-256 over the bytes of `config.json` and of the files of weights, in
    /// the order of their names. The palette is not part of it, nor where the
    /// files come from; another file format of the same numbers has another
    /// digest.
    pub sha256: String,
}

impl SourceFacts {
    /// Returns the digest as [`Model::weights_digest`] has it.
    ///
    /// [`Model::weights_digest`]: crate::model::Model::weights_digest
    #[must_use]
    pub fn weights_digest(&self) -> String {
        format!("sha256:{}", self.sha256)
    }
}

/// Facts about one graph file.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GraphFacts {
    pub file: String,
    pub task: CompileTask,
    pub n_layers: usize,
    /// Number of multiplications and additions for one image.
    pub flop: u64,
    /// Relative error of the output against the reference; for features, one
    /// error per layer.
    pub errors: Vec<f64>,
    /// Smallest cosine between a row of the output and the same row of the
    /// reference.
    pub cosine: f64,
    /// Number of kernels that ran in the verification, by execution provider
    /// and operator.
    pub operators: BTreeMap<String, BTreeMap<String, usize>>,
}

/// Conditions under which the graphs were verified.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verification {
    /// Provider that the graphs ran on.
    pub provider: Provider,
    /// Largest relative error that was allowed: the norm of the difference
    /// divided by the norm of the reference.
    pub tolerance: f64,
    pub n_sequences: usize,
    /// Number of tokens per sequence; fewer than an image's for large models,
    /// whose reference would take minutes.
    pub n_positions: usize,
}

impl Manifest {
    /// Reads the manifest of a compiled directory.
    ///
    /// # Errors
    ///
    /// When the manifest is missing or has another format, or a file that it
    /// names is missing or has another size.
    pub fn read(folder: &Path) -> Result<Self, ModelFileError> {
        let path = folder.join(FILE);
        let text = architecture::read(&path)?;
        let refuse = |reason: String| ModelFileError::content(&path, reason);
        let unreadable = |error| refuse(format!("is not a manifest that can be read: {error}"));
        let head: ManifestHead = serde_json::from_slice(&text).map_err(unreadable)?;
        if head.format != FORMAT {
            return Err(refuse(head.refusal()));
        }
        let manifest: Self = serde_json::from_slice(&text).map_err(unreadable)?;
        if manifest.feature_layer > manifest.architecture.n_layers {
            return Err(refuse(format!(
                "has feature_layer {}; the model has {} layers; compile the model again",
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
                    "names {name:?}, which is not in its directory; compile the model again"
                )));
            }
            let found = std::fs::metadata(folder.join(name))
                .map(|file| file.len())
                .ok();
            if found != Some(*bytes) {
                return Err(refuse(format!(
                    "names {name} of {bytes} bytes, but the file {}; compile the model again",
                    found.map_or("is missing".to_owned(), |bytes| format!(
                        "has {bytes} bytes"
                    ))
                )));
            }
        }
        Ok(manifest)
    }

    /// Returns the recorded digests by file.
    ///
    /// # Errors
    ///
    /// When a file has no digest, or a digest is not a SHA-256.
    pub(crate) fn digests(&self) -> Result<BTreeMap<&str, Sha256Digest>, String> {
        let mut digests = BTreeMap::new();
        for name in self.files.keys() {
            let digest = self.sha256.get(name).and_then(|text| unhex(text));
            let digest = digest.ok_or_else(|| {
                format!("has no valid SHA-256 of {name}; compile the model again")
            })?;
            digests.insert(name.as_str(), digest);
        }
        Ok(digests)
    }

    /// Reads every file of `folder` and compares its digest with the recorded
    /// one.
    ///
    /// # Errors
    ///
    /// When files differ (the text lists all of them).
    pub fn verify(&self, folder: &Path) -> Result<(), ModelFileError> {
        let refuse = |reason: String| ModelFileError::content(folder, reason);
        let digests = self.digests().map_err(refuse)?;
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
            "has changed since it was compiled: {}; compile the model again",
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
