//! Loads sessions from files that are read into memory first.
//!
//! ONNX Runtime would map the files that a graph names: truncating such a file
//! would end the process, and writing into it would change the numbers. So
//! graphs and weights are read, compared with the model's digest, and passed
//! from memory.
//!
//! Graphs that were compiled for a CPU compute from weights in place, so all
//! sessions of an engine are given the same tensors by name. In the graph
//! itself, these tensors get a location that cannot be read, so that a session
//! that would read a tensor from its file fails, and does not compute with
//! other numbers. Small tensors are written into the graph, because ONNX
//! Runtime's optimizations need the values of some. Other graphs, such as those
//! for GPUs and published exports, are given the files as a whole, and each
//! session copies its weights.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use half::{bf16, f16};
use ort::session::Session;
use ort::session::builder::SessionBuilder;
use ort::value::{DynValue, PrimitiveTensorElementType, Tensor};

use crate::model::files::{FileReader, beside};
use crate::model::onnx::DataType;
use crate::model::precision::Provider;
use crate::model::wire::{self, ExternalTensor, Substitute};
use crate::model::{GraphFiles, manifest};
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::failure::Failures;
use crate::runtime::{Runtime, pages, products_of_bytes_overflow};

/// Largest tensor that is written into the graph, in bytes: this includes all
/// norms and biases, and no matrix of a real model.
pub(super) const INLINE_BYTES_MAX: u64 = 64 << 10;
/// Offset that cannot be read because it is beyond the end of any file.
const NOWHERE: u64 = 1 << 50;
/// Setting of the directory in which a graph from memory looks for its files.
const FOLDER: &str = "session.model_external_initializers_file_folder_path";

/// Loader of an engine's sessions, which is dropped when the engine is loaded.
pub(crate) struct Loader {
    files: GraphFiles,
    /// Weights that sessions share, by file; empty if nothing is shared.
    shared: BTreeMap<PathBuf, Weights>,
    /// Files that sessions copy from.
    copied: BTreeMap<PathBuf, Arc<[u8]>>,
    /// Shared weights that operators of ONNX Runtime read in each run.
    read: BTreeSet<(PathBuf, Key)>,
}

/// Tensors of a file, by their place and type.
type Weights = BTreeMap<Key, Held>;

/// Place, type and shape of a tensor in a file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    offset: u64,
    bytes: u64,
    data_type: i32,
    dims: Vec<i64>,
}

/// Returns true if a graph has products whose weights ONNX Runtime converts as
/// it opens the graph, on CPUs where products of bytes overflow: a session
/// cannot share weights that it converts, and would fail with an error in the
/// log.
fn has_products_of_bytes(graph: &[u8]) -> bool {
    const OPERATOR: &[u8] = b"DynamicQuantizeMatMul";
    graph
        .windows(OPERATOR.len())
        .any(|window| window == OPERATOR)
}

enum Held {
    Small(Vec<u8>),
    Shared(Arc<DynValue>),
}

impl Loader {
    /// Makes a loader whose `graphs` share their weights if possible; sessions
    /// of other graphs copy their weights.
    ///
    /// # Errors
    ///
    /// When a file cannot be read or has changed since the model was opened.
    pub(crate) fn new<'a>(
        files: GraphFiles,
        graphs: impl Iterator<Item = &'a PathBuf>,
    ) -> Result<Self, EngineError> {
        let mut wanted: BTreeMap<PathBuf, Vec<Key>> = BTreeMap::new();
        let mut read = BTreeSet::new();
        for path in graphs {
            let refuse = |reason| refuse(path, reason);
            let graph = files.read(path).map_err(refuse)?;
            for tensor in wire::look(&graph).map_err(refuse)?.external {
                let file = beside(path, &tensor.location).map_err(refuse)?;
                let key = Key::of(&tensor).map_err(refuse)?;
                if !tensor.is_packed {
                    read.insert((file.clone(), key.clone()));
                }
                wanted.entry(file).or_default().push(key);
            }
        }
        let mut shared = BTreeMap::new();
        for (path, keys) in wanted {
            let weights = files
                .reader(&path)
                .and_then(|reader| weights(reader, keys))
                .map_err(|reason| refuse(&path, reason))?;
            if let Some(weights) = weights {
                shared.insert(path, weights);
            }
        }
        Ok(Self {
            files,
            shared,
            copied: BTreeMap::new(),
            read,
        })
    }

    /// Ends loading, when every graph has been opened: gives the memory of the
    /// weights back that only the worker's own operators read, which have packed
    /// them.
    pub(crate) fn finish(self) {
        for (path, weights) in &self.shared {
            for (key, held) in weights {
                if let Held::Shared(value) = held
                    && !self.read.contains(&(path.clone(), key.clone()))
                {
                    pages::give_back(value, key.bytes);
                }
            }
        }
    }

    /// Opens a session of a graph.
    pub(crate) fn session(
        &mut self,
        runtime_: &Runtime,
        path: &Path,
    ) -> Result<Session, EngineError> {
        let graph = self
            .files
            .read(path)
            .map_err(|reason| refuse(path, reason))?;
        let can_share = !self.shared.is_empty() && runtime_.provider == Provider::Cpu;
        if can_share && !(products_of_bytes_overflow() && has_products_of_bytes(&graph)) {
            match self.with_shared(runtime_, path, &graph) {
                Err(EngineError::Graph { file, reason }) => {
                    tracing::info!(file, reason, "cannot share weights; copying them");
                }
                outcome => return outcome,
            }
        }
        self.with_copied(runtime_, path, &graph)
    }

    fn with_shared(
        &self,
        runtime_: &Runtime,
        path: &Path,
        graph: &[u8],
    ) -> Result<Session, EngineError> {
        let refuse = |reason| refuse(path, reason);
        let held = |tensor: &ExternalTensor| -> Result<&Held, String> {
            let file = beside(path, &tensor.location)?;
            let held = self.shared.get(&file);
            let held = held.and_then(|weights| weights.get(&Key::of(tensor).ok()?));
            held.ok_or_else(|| format!("the tensor {} cannot be shared", tensor.name))
        };
        let substitute = |tensor: &ExternalTensor| match held(tensor)? {
            Held::Small(bytes) => Ok(Substitute::Inline(bytes.clone())),
            Held::Shared(_) if tensor.is_nested => {
                Err(format!("the tensor {} cannot be shared", tensor.name))
            }
            Held::Shared(_) => Ok(Substitute::Elsewhere {
                location: manifest::FILE.to_owned(),
                offset: NOWHERE,
            }),
        };
        let rewritten = wire::rewrite(graph, &substitute).map_err(refuse)?;
        let mut builder = builder(runtime_, path)?;
        for tensor in wire::look(graph).map_err(refuse)?.external {
            if let Held::Shared(value) = held(&tensor).map_err(refuse)? {
                builder = builder
                    .with_initializer(&tensor.name, Arc::clone(value))
                    .map_err(runtime)?;
            }
        }
        commit(
            runtime_,
            &mut builder,
            path,
            rewritten.as_deref().unwrap_or(graph),
        )
    }

    fn with_copied(
        &mut self,
        runtime_: &Runtime,
        path: &Path,
        graph: &[u8],
    ) -> Result<Session, EngineError> {
        let refuse_ = |reason| refuse(path, reason);
        let external = wire::look(graph).map_err(refuse_)?.external;
        for tensor in &external {
            let file = beside(path, &tensor.location).map_err(refuse_)?;
            if !self.copied.contains_key(&file) {
                let content = self
                    .files
                    .read(&file)
                    .map_err(|reason| refuse(&file, reason))?;
                self.copied.insert(file, content);
            }
        }
        let content = |tensor: &ExternalTensor| -> Result<&Arc<[u8]>, String> {
            let file = beside(path, &tensor.location)?;
            let content = self.copied.get(&file);
            content.ok_or_else(|| format!("{} was not read", file.display()))
        };
        // ONNX Runtime takes only tensors of the outermost graph from memory,
        // and it needs small tensors, such as shapes, before that.
        let is_inline = |tensor: &ExternalTensor| {
            tensor.is_nested || tensor.bytes().is_ok_and(|bytes| bytes <= INLINE_BYTES_MAX)
        };
        let substitute = |tensor: &ExternalTensor| {
            let content = content(tensor)?;
            let range = tensor.range(content.len() as u64)?;
            Ok(if is_inline(tensor) {
                Substitute::Inline(content[range].to_vec())
            } else {
                Substitute::Keep
            })
        };
        let rewritten = wire::rewrite(graph, &substitute).map_err(refuse_)?;
        let mut builder = builder(runtime_, path)?;
        let mut given = Vec::new();
        for tensor in external.iter().filter(|tensor| !is_inline(tensor)) {
            if given.contains(&&tensor.location) {
                continue;
            }
            given.push(&tensor.location);
            let content = Arc::clone(content(tensor).map_err(refuse_)?);
            builder = builder
                .with_external_initializer_file_in_memory(&tensor.location, content)
                .map_err(runtime)?;
        }
        commit(
            runtime_,
            &mut builder,
            path,
            rewritten.as_deref().unwrap_or(graph),
        )
    }
}

fn refuse(path: &Path, reason: String) -> EngineError {
    EngineError::Graph {
        file: path.display().to_string(),
        reason,
    }
}

fn builder(runtime_: &Runtime, path: &Path) -> Result<SessionBuilder, EngineError> {
    let folder = path.parent().unwrap_or(Path::new("."));
    let builder = super::placement::builder(runtime_)?;
    builder
        .with_config_entry(FOLDER, folder.to_string_lossy())
        .map_err(runtime)
}

fn commit(
    runtime_: &Runtime,
    builder: &mut SessionBuilder,
    path: &Path,
    graph: &[u8],
) -> Result<Session, EngineError> {
    let failures = Failures::of(runtime_);
    builder
        .commit_from_memory(graph)
        .map_err(|error| match failures.run(&error) {
            // A lost device says nothing about the graph.
            lost @ EngineError::Device(_) => lost,
            _ => refuse(
                path,
                format!("not a graph that ONNX Runtime can load: {error}"),
            ),
        })
}

impl Key {
    fn of(tensor: &ExternalTensor) -> Result<Self, String> {
        Ok(Self {
            offset: tensor.offset,
            bytes: tensor.bytes()?,
            data_type: tensor.data_type,
            dims: tensor.dims.clone(),
        })
    }

    fn end(&self) -> u64 {
        self.offset.saturating_add(self.bytes)
    }
}

/// Reads a file's tensors; `None` if they cannot be shared, because some
/// overlap, end beyond the file, or have a type that weights do not have.
fn weights(mut reader: FileReader<'_>, mut keys: Vec<Key>) -> Result<Option<Weights>, String> {
    keys.sort_unstable();
    keys.dedup();
    let overlap = keys.windows(2).any(|pair| pair[0].end() > pair[1].offset);
    let beyond = keys.last().is_some_and(|last| last.end() > reader.bytes());
    if overlap || beyond {
        return Ok(None);
    }
    let mut weights = Weights::new();
    for key in keys {
        reader.pass(key.offset)?;
        let held = if key.bytes <= INLINE_BYTES_MAX {
            let mut bytes = vec![0; usize::try_from(key.bytes).unwrap_or_default()];
            reader.fill(&mut bytes)?;
            Held::Small(bytes)
        } else {
            match value(&mut reader, &key)? {
                Some(value) => Held::Shared(Arc::new(value)),
                None => return Ok(None),
            }
        };
        weights.insert(key, held);
    }
    reader.finish()?;
    Ok(Some(weights))
}

/// Reads a tensor into memory; `None` for a type that weights do not have.
fn value(reader: &mut FileReader<'_>, key: &Key) -> Result<Option<DynValue>, String> {
    let value = match DataType::try_from(key.data_type) {
        Ok(DataType::Float) => filled::<f32>(reader, &key.dims),
        Ok(DataType::Float16) => filled::<f16>(reader, &key.dims),
        Ok(DataType::Bfloat16) => filled::<bf16>(reader, &key.dims),
        Ok(DataType::Int8) => filled::<i8>(reader, &key.dims),
        Ok(DataType::Uint8) => filled::<u8>(reader, &key.dims),
        _ => return Ok(None),
    };
    value.map(Some)
}

fn filled<T: PrimitiveTensorElementType + Debug + bytemuck::Pod>(
    reader: &mut FileReader<'_>,
    dims: &[i64],
) -> Result<DynValue, String> {
    // ONNX Runtime computes in place only from memory that it did not allocate.
    let n = dims.iter().try_fold(1_usize, |n, &size| {
        n.checked_mul(usize::try_from(size).ok()?)
    });
    let n = n.ok_or("has a tensor whose shape is not valid")?;
    let mut numbers = Vec::new();
    numbers
        .try_reserve_exact(n)
        .map_err(|error| format!("has a tensor of {n} numbers, too large for memory: {error}"))?;
    numbers.resize(n, T::zeroed());
    reader.fill(bytemuck::cast_slice_mut(&mut numbers))?;
    let tensor = Tensor::from_array((dims.to_vec(), numbers));
    Ok(tensor.map_err(|error| error.to_string())?.into_dyn())
}
