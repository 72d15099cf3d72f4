//! Reads a model directory as published: graphs, palette, labels.
//!
//! Nothing here runs a model. The files are checked against each other, so that
//! a directory that cannot be served is refused with the reason before the
//! worker listens; `engine/onnx.rs` checks what only a run can show.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io::Read;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use self::buckets::Buckets;
use self::files::{DigestOrigin, FilesByPath, Sha256Digest};
use self::graph::{Graph, Layers, Norm, Want};
use self::manifest::Manifest;
use self::precision::Precision;
use self::settings::ModelSettings;
use crate::files::hex;
use crate::model::precision::Provider;

pub use self::files::GraphFiles;
pub use self::settings::ClassActivation;

pub(crate) mod architecture;
pub mod buckets;
pub(crate) mod error;
pub(crate) mod files;
pub mod graph;
pub mod head;
pub mod manifest;
pub mod onnx;
pub mod precision;
pub(crate) mod settings;
pub(crate) mod wire;

/// Values that `--model` accepts, for the error texts of other values.
pub const ACCEPTED: &str = "--model takes a directory made by `imagegpt compile`, a Hugging Face \
                            directory with weights (model.safetensors or pytorch_model.bin), a \
                            directory of ONNX graphs (model.onnx or model_classification.onnx, \
                            beside preprocessor_config.json), a hub id such as \
                            openai/imagegpt-small, or random:small";

/// A kind of call that a model can serve.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CallTask {
    Embed,
    Classify,
    Score,
    Generate,
}

/// A computation for which a model is loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ModelNeed {
    /// Calls of this kind, with default options.
    Call(CallTask),
    /// Pooled features of these layers; none means the default layer.
    Features { layers: Vec<u32>, norm: Norm },
    /// States of the last layer.
    States,
}

impl CallTask {
    /// Tasks that published directories have graphs for.
    const PUBLISHED: [Self; 2] = [Self::Embed, Self::Classify];

    /// Graph that serves the task; for `Embed` the graph of published
    /// directories.
    fn graph(self) -> Graph {
        match self {
            Self::Embed => Graph::Hidden,
            Self::Classify => Graph::Logits,
            Self::Score => Graph::Score,
            Self::Generate => Graph::Generate,
        }
    }

    /// File of the task's graph in published directories; for tasks that they
    /// do not have, words for what is missing.
    #[must_use]
    pub fn file(self) -> &'static str {
        match self {
            Self::Embed => "model.onnx",
            Self::Classify => "model_classification.onnx",
            Self::Score => "score.onnx, which only `imagegpt compile` makes",
            Self::Generate => {
                "generate.onnx, which only `imagegpt compile` makes, or --generate-slots is 0"
            }
        }
    }
}

impl fmt::Display for CallTask {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Embed => "embed",
            Self::Classify => "classify",
            Self::Score => "score",
            Self::Generate => "generate",
        })
    }
}

/// A model directory that has passed its checks.
#[derive(Debug, Clone)]
pub struct Model {
    pub name: String,
    /// "sha256:" and hexadecimal digits, over every file that answers depend
    /// on: the graphs, the files that graphs name, and the configuration files.
    pub digest: String,
    /// "sha256:" and hexadecimal digits, over the weights that the graphs were
    /// made of: `config.json` and the weights of the checkpoint, so that
    /// models of one checkpoint have the same in every precision. A published
    /// export has no checkpoint beside it; then this is [`Self::digest`].
    pub weights_digest: String,
    pub graphs: BTreeMap<Graph, PathBuf>,
    /// Graphs and the files that hold their weights.
    pub files: GraphFiles,
    /// Operator that mixes the images of a batch, if a graph of whole images
    /// has one.
    pub batch_scaled: Option<&'static str>,
    /// Number of images of each run, if a graph of whole images has inputs of a
    /// fixed size.
    pub batch_fixed: Option<u16>,
    /// Palette in token order: red, green and blue in [-1, 1].
    pub clusters: Vec<[f64; 3]>,
    /// Side in pixels of the square that an image is reduced to.
    pub side: u32,
    /// True if config.json has `vocab_size` and `n_positions`, so that both
    /// were compared with the palette and the side.
    pub sizes_are_given: bool,
    /// Number of transformer blocks, if config.json has `n_layer`.
    pub n_layers: Option<u32>,
    /// Facts of the compilation; `None` for a published export.
    pub compiled: Option<CompiledFacts>,
    /// Class names by index; empty if config.json has none.
    pub labels: Vec<String>,
    pub activation: ClassActivation,
    /// Publisher's notice to users, from config.json; empty if there is none.
    pub notice: String,
}

/// Reason why a directory cannot be served. Each text names the file.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {reason}")]
pub struct ModelError {
    file: String,
    reason: String,
}

impl ModelError {
    fn new(file: &Path, reason: impl fmt::Display) -> Self {
        Self {
            file: file.display().to_string(),
            reason: reason.to_string(),
        }
    }
}

/// Largest number of images per run that a graph may ask for: `--max-batch-size`
/// has the same limit.
const BATCH_FIXED_MAX: u16 = 1024;
/// Subdirectories in which published directories keep their graphs.
const GRAPH_FOLDERS: [&str; 3] = ["", "model", "onnx"];
impl Model {
    /// Reads the directory at `dir`; the model is called `name`, or else by the
    /// directory's name.
    ///
    /// # Errors
    ///
    /// When a needed file is missing or its content cannot be served.
    pub fn open(dir: &Path, name: Option<&str>) -> Result<Self, ModelError> {
        if !dir.is_dir() {
            let what = if dir.exists() {
                "this is not a directory"
            } else {
                "the directory does not exist"
            };
            return Err(ModelError::new(dir, format!("{what}; {ACCEPTED}")));
        }
        let mut digest = Sha256::new();
        let compiled = Compiled::find(dir)?;
        let graphs = match &compiled {
            Some(compiled) => compiled.graphs.clone(),
            None => find_graphs(dir)?,
        };
        let preprocessor = find_config(dir, &graphs, settings::PREPROCESSOR);
        let config = find_config(dir, &graphs, architecture::FILE);
        let settings = ModelSettings::read(dir, preprocessor, config, |path, sha256| {
            mix(&mut digest, path, sha256);
        })?;
        if let Some(compiled) = &compiled {
            let identity = compiled.identity.as_bytes();
            mix(&mut digest, Path::new("compiled"), identity);
        }
        let mut content = Content {
            recorded: compiled.as_ref().map(|compiled| &compiled.recorded),
            found: FilesByPath::default(),
            batch_scaled: None,
            batch_fixed: None,
        };
        for (graph, path) in &graphs {
            content.add(*graph, path, &mut digest)?;
        }
        let digest = format!("sha256:{}", hex(&digest.finalize()));
        Ok(Self {
            name: name.map_or_else(|| directory_name(dir), ToOwned::to_owned),
            weights_digest: compiled.as_ref().map_or_else(
                || digest.clone(),
                |compiled| compiled.weights_digest.clone(),
            ),
            digest,
            graphs,
            files: content.found.done(),
            batch_scaled: content.batch_scaled,
            batch_fixed: content.batch_fixed,
            clusters: settings.clusters,
            side: settings.side,
            sizes_are_given: settings.sizes_are_given,
            n_layers: settings.n_layers,
            compiled: compiled.map(|compiled| compiled.facts),
            labels: settings.labels,
            activation: settings.activation,
            notice: settings.notice,
        })
    }

    /// Returns the batch sizes to run at: those in `asked`, or the only one that
    /// the graphs take, or 1 alone if an operator mixes the images of a batch,
    /// since an image's answer must not depend on the other images of its batch.
    #[must_use]
    pub fn buckets(&self, asked: Buckets) -> Buckets {
        match (self.batch_fixed, self.batch_scaled) {
            (Some(fixed), _) => Buckets::one(fixed.into()),
            (None, Some(_)) => Buckets::one(1),
            (None, None) => asked,
        }
    }

    /// Returns why [`Self::buckets`] has other sizes than `asked`; `None` if it
    /// has the same.
    #[must_use]
    pub fn why_other_buckets(&self, asked: &Buckets) -> Option<String> {
        if self.buckets(asked.clone()) == *asked {
            return None;
        }
        if let Some(fixed) = self.batch_fixed {
            return Some(format!(
                "runs have {fixed} images: the model's graphs have inputs of a fixed size; export \
                 them with a dynamic batch axis for other batch sizes"
            ));
        }
        let operator = self.batch_scaled?;
        Some(format!(
            "images run one by one: in a batch the model's operator {operator} would give all \
             images one scale, and an image's answer would depend on the other images"
        ))
    }

    /// Returns the number of tokens per image.
    #[must_use]
    pub fn positions(&self) -> usize {
        (self.side * self.side) as usize
    }

    /// Returns the palette as displayable colors, three bytes per token.
    #[must_use]
    pub fn palette_rgb8(&self) -> Vec<u8> {
        let byte = |value: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                clippy::cast_sign_loss,
                reason = "clamped to 0..=255"
            )]
            {
                (127.5 * (value + 1.0)).round_ties_even().clamp(0.0, 255.0) as u8
            }
        };
        self.clusters
            .iter()
            .flatten()
            .map(|&value| byte(value))
            .collect()
    }

    /// Forgets all graphs but those that `needs` asks for. If the model lacks
    /// one of them, or nothing is needed, all graphs stay, so that the call that
    /// needs one says what is missing.
    pub fn serve_only(&mut self, needs: &[ModelNeed]) {
        if needs.is_empty() {
            return;
        }
        let graphs = needs.iter().map(|need| {
            let graph = match need {
                ModelNeed::Call(CallTask::Embed) => {
                    Graph::of(self.features(&[], Norm::PreAttnRms)?)
                }
                ModelNeed::Call(task) => task.graph(),
                ModelNeed::Features { layers, norm } => Graph::of(self.features(layers, *norm)?),
                ModelNeed::States => Graph::Hidden,
            };
            self.graphs.contains_key(&graph).then_some(graph)
        });
        if let Some(graphs) = graphs.collect::<Option<BTreeSet<Graph>>>() {
            self.graphs.retain(|graph, _| graphs.contains(graph));
        }
    }

    /// Returns true if the model has a graph for the task.
    #[must_use]
    pub fn can(&self, task: CallTask) -> bool {
        match task {
            CallTask::Embed => self
                .graphs
                .keys()
                .any(|graph| matches!(graph, Graph::Features(_) | Graph::Hidden)),
            CallTask::Classify | CallTask::Score | CallTask::Generate => {
                self.graphs.contains_key(&task.graph())
            }
        }
    }

    /// Returns the layers whose pooled features the model has, in ascending
    /// order.
    #[must_use]
    pub fn layers_served(&self, norm: Norm) -> Vec<u32> {
        let mut layers = Vec::new();
        if let Some(compiled) = self.compiled
            && self.graphs.contains_key(&Graph::Features(norm))
        {
            layers.extend(0..=compiled.feature_layer);
        }
        if let Some(last) = self.n_layers
            && self.graphs.contains_key(&Graph::Hidden)
            && layers.last() < Some(&last)
        {
            layers.push(last);
        }
        layers
    }

    /// Returns the layers whose pooled features the model has with one norm at
    /// least. Both have the same, unless the graph of one was left out.
    #[must_use]
    pub fn layers_of_any_norm(&self) -> Vec<u32> {
        let [normed, raw] = [Norm::PreAttnRms, Norm::None].map(|norm| self.layers_served(norm));
        if raw.len() > normed.len() {
            raw
        } else {
            normed
        }
    }

    /// Returns the layer of requests that name none; `None` if this is the last
    /// layer of a model whose number of layers is unknown.
    #[must_use]
    pub fn layer_default(&self) -> Option<u32> {
        let has_features = |graph: &Graph| matches!(graph, Graph::Features(_));
        match self.compiled {
            Some(compiled) if self.graphs.keys().any(has_features) => Some(compiled.feature_layer),
            _ => self.n_layers,
        }
    }

    /// Returns the computation of the pooled features of `layers` (empty means
    /// the default layer), or `None` if the model does not have them.
    #[must_use]
    pub fn features(&self, layers: &[u32], norm: Norm) -> Option<Want> {
        let default;
        let layers = match (layers, self.layer_default()) {
            ([], Some(layer)) => {
                default = [layer];
                &default
            }
            // A model whose number of layers is unknown serves its last layer
            // only.
            ([], None) => {
                return self
                    .graphs
                    .contains_key(&Graph::Hidden)
                    .then_some(Want::Mean);
            }
            (layers, _) => layers,
        };
        let served = self.layers_served(norm);
        if !layers.iter().all(|layer| served.contains(layer)) {
            return None;
        }
        let pooled_in_graph = self.compiled.is_some_and(|compiled| {
            self.graphs.contains_key(&Graph::Features(norm))
                && layers.iter().all(|&layer| layer <= compiled.feature_layer)
        });
        if pooled_in_graph {
            let layers = Layers::ascending(layers)?;
            Some(Want::Features { layers, norm })
        } else if let &[_last] = layers {
            Some(Want::Mean)
        } else {
            // Layers from two graphs would take two runs.
            None
        }
    }
}

/// Facts about a model that `imagegpt compile` made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CompiledFacts {
    pub precision: Precision,
    /// Provider that the graphs are made for.
    pub provider: Provider,
    /// Last layer of which pooled features exist; the first is layer 0.
    pub feature_layer: u32,
}

/// A directory that `imagegpt compile` made.
struct Compiled {
    facts: CompiledFacts,
    graphs: BTreeMap<Graph, PathBuf>,
    /// Digest of the source, precision, compiler version and format, which
    /// determine the model's numbers.
    identity: String,
    /// Digest of the source's weights.
    weights_digest: String,
    /// Digests of the directory's files when it was compiled.
    recorded: BTreeMap<PathBuf, Sha256Digest>,
}

impl Compiled {
    /// Reads the manifest in `dir`, if there is one.
    fn find(dir: &Path) -> Result<Option<Self>, ModelError> {
        let path = dir.join(manifest::FILE);
        if !path.is_file() {
            return Ok(None);
        }
        let manifest =
            Manifest::read(dir).map_err(|error| ModelError::new(dir, error.to_string()))?;
        let mut graphs = BTreeMap::new();
        for graph in Graph::ALL {
            if let Some(facts) = manifest.graphs.get(graph.file_stem()) {
                graphs.insert(graph, dir.join(&facts.file));
            }
        }
        let digests = manifest
            .digests()
            .map_err(|error| ModelError::new(dir, error.clone()))?;
        let recorded = (digests.into_iter())
            .map(|(file, sha256)| (dir.join(file), sha256))
            .collect();
        if graphs.is_empty() {
            return Err(ModelError::new(
                &path,
                "the manifest lists no graph that can be served; compile the model again with \
                 tasks such as embed, hidden or classify (--tasks)",
            ));
        }
        Ok(Some(Self {
            facts: CompiledFacts {
                precision: manifest.precision,
                provider: manifest.provider,
                feature_layer: u32::try_from(manifest.feature_layer).unwrap_or(u32::MAX),
            },
            graphs,
            recorded,
            weights_digest: manifest.source.weights_digest(),
            identity: format!(
                "{} {} {} {}",
                manifest.source.sha256,
                manifest.precision.name(),
                manifest.tool_version,
                manifest.format
            ),
        }))
    }
}

/// Files that graphs consist of, collected while graphs are read.
struct Content<'a> {
    recorded: Option<&'a BTreeMap<PathBuf, Sha256Digest>>,
    found: FilesByPath,
    batch_scaled: Option<&'static str>,
    batch_fixed: Option<u16>,
}

impl Content<'_> {
    /// Adds a graph and every file that the graph names to the digest.
    fn add(&mut self, graph: Graph, path: &Path, digest: &mut Sha256) -> Result<(), ModelError> {
        let refuse = |reason: String| ModelError::new(path, reason);
        let bytes = read_graph(path)?;
        let sha256 = Sha256Digest::from(Sha256::digest(&bytes));
        let origin = match self.recorded.and_then(|recorded| recorded.get(path)) {
            Some(&recorded) if recorded != sha256 => {
                let origin = DigestOrigin::Recorded;
                return Err(refuse(files::differs(sha256, recorded, origin)));
            }
            Some(_) => DigestOrigin::Recorded,
            None => DigestOrigin::Opened,
        };
        mix(digest, path, &sha256);
        self.found
            .add(path.to_owned(), bytes.len() as u64, sha256, origin);
        let summary = wire::look(&bytes).map_err(refuse)?;
        drop(bytes);
        if graph != Graph::Generate {
            self.batch_scaled = self.batch_scaled.or(summary.batch_scaled);
            self.fix_batch(summary.batch_fixed).map_err(refuse)?;
            if let (Some(operator), Some(2..)) = (self.batch_scaled, self.batch_fixed) {
                return Err(refuse(format!(
                    "has the operator {operator}, which gives all images of a run one scale, and \
                     runs of a fixed size above 1; export the model with a dynamic batch axis"
                )));
            }
        }
        let mut files = BTreeMap::new();
        for tensor in &summary.external {
            let file = files::beside(path, &tensor.location).map_err(refuse)?;
            let size = self.add_file(&file).map_err(|error| {
                let location = &tensor.location;
                refuse(format!(
                    "names the file {location:?}, which cannot be read: {error}"
                ))
            })?;
            tensor.range(size).map_err(refuse)?;
            files.insert(file, &tensor.location);
        }
        // Exporters use these names for tensors that exceed protobuf's limit.
        // The digest covered such files before it covered every file that a
        // graph names, so they stay in it first and under their own names.
        for file in external_data(path) {
            self.add_file(&file)
                .map_err(|error| ModelError::new(&file, error))?;
            mix(digest, &file, &self.found.sha256(&file).unwrap_or_default());
            files.remove(&file);
        }
        for (file, location) in files {
            let sha256 = self.found.sha256(&file).unwrap_or_default();
            mix_named(digest, location, &sha256);
        }
        Ok(())
    }

    /// Notes that a graph takes this number of images per run alone.
    fn fix_batch(&mut self, fixed: Option<u64>) -> Result<(), String> {
        let Some(fixed) = fixed else {
            return Ok(());
        };
        let fixed = u16::try_from(fixed)
            .ok()
            .filter(|fixed| (1..=BATCH_FIXED_MAX).contains(fixed));
        match (fixed, self.batch_fixed) {
            (None, _) => Err(format!(
                "takes another fixed number of images per run than 1 to {BATCH_FIXED_MAX}; export it \
                 with a dynamic batch axis"
            )),
            (Some(fixed), Some(other)) if fixed != other => Err(format!(
                "takes {fixed} images per run, and another graph takes {other}; export both with \
                 the same batch axis"
            )),
            (Some(fixed), _) => {
                self.batch_fixed = Some(fixed);
                Ok(())
            }
        }
    }

    /// Records a file's size and digest, and returns the size in bytes.
    fn add_file(&mut self, path: &Path) -> std::io::Result<u64> {
        if let Some(bytes) = self.found.bytes(path) {
            return Ok(bytes);
        }
        // A recorded digest is compared when the file is loaded, so gigabytes
        // are not read twice.
        let recorded = self.recorded.and_then(|recorded| recorded.get(path));
        let (bytes, sha256, origin) = if let Some(recorded) = recorded {
            (files::open(path)?.1, *recorded, DigestOrigin::Recorded)
        } else {
            let (bytes, sha256) = files::sha256(path)?;
            (bytes, sha256, DigestOrigin::Opened)
        };
        self.found.add(path.to_owned(), bytes, sha256, origin);
        Ok(bytes)
    }
}

/// Reads a graph's bytes, at most as many as protobuf allows.
fn read_graph(path: &Path) -> Result<Vec<u8>, ModelError> {
    let refuse = |reason: String| ModelError::new(path, reason);
    let (file, n_bytes) = files::open(path).map_err(|error| refuse(error.to_string()))?;
    if n_bytes > wire::GRAPH_BYTES_MAX {
        return Err(refuse(format!(
            "has {n_bytes} bytes; the limit of an ONNX graph is {}; save it with external data",
            wire::GRAPH_BYTES_MAX
        )));
    }
    let mut bytes = Vec::new();
    // The file may grow while it is read, or be larger than the memory.
    bytes
        .try_reserve_exact(usize::try_from(n_bytes).unwrap_or(usize::MAX))
        .map_err(|error| refuse(error.to_string()))?;
    file.take(n_bytes)
        .read_to_end(&mut bytes)
        .map_err(|error| refuse(error.to_string()))?;
    Ok(bytes)
}

/// Returns true if a directory has a published graph.
#[must_use]
pub fn has_graphs(dir: &Path) -> bool {
    find_graphs(dir).is_ok()
}

fn find_graphs(dir: &Path) -> Result<BTreeMap<Graph, PathBuf>, ModelError> {
    let mut graphs = BTreeMap::new();
    for task in CallTask::PUBLISHED {
        let found = GRAPH_FOLDERS
            .iter()
            .map(|folder| dir.join(folder).join(task.file()))
            .find(|path| path.is_file());
        if let Some(path) = found {
            graphs.insert(task.graph(), path);
        }
    }
    if graphs.is_empty() {
        return Err(ModelError::new(
            dir,
            format!(
                "the directory has neither weights nor graphs (model.onnx or \
                 model_classification.onnx, at the top or in model/ or onnx/); {ACCEPTED}"
            ),
        ));
    }
    Ok(graphs)
}

/// Finds a configuration file in the directory itself, or else beside a graph.
fn find_config(dir: &Path, graphs: &BTreeMap<Graph, PathBuf>, file: &str) -> Option<PathBuf> {
    let beside_graphs = graphs.values().filter_map(|path| path.parent());
    std::iter::once(dir)
        .chain(beside_graphs)
        .map(|folder| folder.join(file))
        .find(|path| path.is_file())
}

/// Returns the files beside a graph that may hold its weights.
fn external_data(graph: &Path) -> Vec<PathBuf> {
    let Some(name) = graph.file_name().and_then(|name| name.to_str()) else {
        return Vec::new();
    };
    ["_data", ".data"]
        .iter()
        .map(|suffix| graph.with_file_name(format!("{name}{suffix}")))
        .filter(|path| path.is_file())
        .collect()
}

/// Adds a file by its name and its own digest, so that the digest depends
/// neither on the directory's path nor on where one file ends and the next
/// begins.
fn mix(digest: &mut Sha256, path: &Path, content: &[u8]) {
    let name = path.file_name().map(|name| name.to_string_lossy());
    mix_named(digest, name.as_deref().unwrap_or_default(), content);
}

fn mix_named(digest: &mut Sha256, name: &str, content: &[u8]) {
    digest.update(name);
    digest.update([0]);
    digest.update(content);
}

/// Returns the name of a model in a directory: the directory's, or that of the
/// repository of a snapshot.
fn directory_name(dir: &Path) -> String {
    let own = || {
        let dir = dir.canonicalize().ok()?;
        Some(dir.file_name()?.to_string_lossy().into_owned())
    };
    snapshot_repository(dir)
        .or_else(own)
        .unwrap_or_else(|| "imagegpt".to_owned())
}

/// Returns a repository's name, without its owner, if a directory is a snapshot
/// of it in the cache of Hugging Face's tools
/// (`models--OWNER--NAME/snapshots/COMMIT`): the directory's own name is a hash.
pub(crate) fn snapshot_repository(dir: &Path) -> Option<String> {
    let dir = dir.canonicalize().ok()?;
    let snapshots = dir.parent()?;
    if snapshots.file_name()? != "snapshots" {
        return None;
    }
    let repository = snapshots.parent()?.file_name()?.to_str()?;
    let id = repository.strip_prefix("models--")?;
    let (_, name) = id.split_once("--").unwrap_or(("", id));
    (!name.is_empty()).then(|| name.to_owned())
}
