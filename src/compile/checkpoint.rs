//! The weights of a directory as named tensors, independent of the file format.
//!
//! Opening reads only the tables of contents; [`Checkpoint::read`] then takes
//! one tensor at a time, so that a model of several gigabytes is never in
//! memory as a whole. Files are read at offsets and not mapped, because a
//! mapped file that someone truncates ends the process.

mod pickle;
mod safetensors;
mod torch;

use std::collections::btree_map::Entry as MapEntry;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use half::{bf16, f16};
use sha2::{Digest, Sha256};

use super::error::CompileError;
use super::random::{self, RandomTensors};
use crate::files::hex;
use crate::model::files;

/// Place, type and shape of a tensor in a file.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    file: usize,
    /// Offset of the first element from the start of the file, in bytes.
    offset: u64,
    element: Element,
    shape: Vec<usize>,
    /// Stride of each dimension, in elements.
    strides: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    F64,
    F32,
    F16,
    Bf16,
    /// Any other type, by its size in bytes: masks and counters, never weights.
    Other(usize),
}

impl Entry {
    /// Returns the size of all elements, in bytes.
    fn bytes(&self) -> u64 {
        let elements = self.shape.iter().map(|&size| size as u64);
        elements.fold(self.element.bytes() as u64, u64::saturating_mul)
    }
}

impl Element {
    fn bytes(self) -> usize {
        match self {
            Self::F64 => 8,
            Self::F32 => 4,
            Self::F16 | Self::Bf16 => 2,
            Self::Other(bytes) => bytes,
        }
    }
}

/// Checkpoint whose tensors are read when they are asked for.
#[derive(Debug)]
pub(crate) struct Checkpoint {
    folder: PathBuf,
    files: Vec<(PathBuf, File)>,
    entries: BTreeMap<String, Entry>,
    /// Random tensors, if the weights are drawn by a recipe; then there are no
    /// entries.
    drawn: Option<RandomTensors>,
}

/// File names of weights in published directories; the first that exists is
/// taken.
pub(super) const SINGLE: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];
pub(super) const INDEX: [&str; 2] = [
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
];

/// Names of modules that wrap another in training, at any place of a tensor's
/// name: DistributedDataParallel and DataParallel, `torch.compile`,
/// FullyShardedDataParallel, and activation checkpoints.
const WRAPPERS: [&str; 4] = [
    "module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
];

/// Largest number of files (shards) of a checkpoint, all of which are open at
/// the same time. imagegpt-large has one file, models a hundred times as large
/// have some dozens.
const SHARDS_MAX: usize = 256;

/// Returns the names of the files that hold the weights of `folder`.
///
/// # Errors
///
/// When there are no weights, or the index of the shards is not valid.
pub(crate) fn weight_files(folder: &Path) -> Result<Vec<String>, CompileError> {
    for (single, index) in SINGLE.iter().zip(INDEX) {
        if folder.join(single).is_file() {
            return Ok(vec![(*single).to_owned()]);
        }
        let path = folder.join(index);
        if path.is_file() {
            return indexed_files(&path);
        }
    }
    if folder.join(random::FILE).is_file() {
        return Ok(vec![random::FILE.to_owned()]);
    }
    Err(CompileError::weights(
        folder,
        "has no weights: it must have model.safetensors, pytorch_model.bin or the .index.json of \
         either",
    ))
}

/// Returns the files that an index names, each once.
///
/// # Errors
///
/// When the index is not valid or names a file outside its directory.
pub(crate) fn indexed_files(path: &Path) -> Result<Vec<String>, CompileError> {
    let text = crate::model::architecture::read(path)?;
    let index: serde_json::Value = crate::files::json(&text)
        .map_err(|error| CompileError::weights(path, format!("is not JSON: {error}")))?;
    let map = index
        .get("weight_map")
        .and_then(serde_json::Value::as_object)
        .ok_or_else(|| CompileError::weights(path, "has no weight_map"))?;
    let mut names = BTreeSet::new();
    for name in map.values() {
        let name = name.as_str().unwrap_or_default();
        if name.is_empty() || name.contains(['/', '\\']) || name.starts_with('.') {
            return Err(CompileError::weights(
                path,
                format!("names {name:?}, which is not a file in the same directory"),
            ));
        }
        names.insert(name.to_owned());
        if names.len() > SHARDS_MAX {
            return Err(CompileError::weights(
                path,
                format!("names more than {SHARDS_MAX} files, the limit of a checkpoint"),
            ));
        }
    }
    Ok(names.into_iter().collect())
}

impl Checkpoint {
    /// Opens the weights of `folder`.
    ///
    /// # Errors
    ///
    /// When a file is missing, truncated or of another format.
    pub(crate) fn open(folder: &Path) -> Result<Self, CompileError> {
        let mut checkpoint = Self {
            folder: folder.to_owned(),
            files: Vec::new(),
            entries: BTreeMap::new(),
            drawn: None,
        };
        for name in weight_files(folder)? {
            let path = folder.join(&name);
            let (file, _) =
                files::open(&path).map_err(|error| CompileError::read(&path, &error))?;
            if name == random::FILE {
                checkpoint.drawn = Some(RandomTensors::open(folder, &path)?);
                checkpoint.files.push((path, file));
                continue;
            }
            let idx = checkpoint.files.len();
            let is_torch = Path::new(&name)
                .extension()
                .is_some_and(|extension| extension == "bin");
            let entries = if is_torch {
                torch::entries(&path, &file, idx)?
            } else {
                safetensors::entries(&path, &file, idx)?
            };
            for (name, entry) in entries {
                checkpoint.add(&name, entry, &path)?;
            }
            checkpoint.files.push((path, file));
        }
        Ok(checkpoint)
    }

    /// Adds a tensor under its name without [`WRAPPERS`].
    fn add(&mut self, name: &str, entry: Entry, path: &Path) -> Result<(), CompileError> {
        let parts = name.split('.').filter(|part| !WRAPPERS.contains(part));
        let plain = parts.collect::<Vec<_>>().join(".");
        match self.entries.entry(plain) {
            MapEntry::Vacant(place) => {
                place.insert(entry);
                Ok(())
            }
            MapEntry::Occupied(place) => Err(CompileError::weights(
                path,
                format!(
                    "has {name:?}, and the checkpoint has {:?} already, which has the same name \
                     without {}; remove one of them",
                    place.key(),
                    WRAPPERS.join(", ")
                ),
            )),
        }
    }

    /// Returns the shape of the tensor `name`, if the checkpoint has that
    /// tensor.
    #[must_use]
    pub(crate) fn shape(&self, name: &str) -> Option<&[usize]> {
        match &self.drawn {
            Some(drawn) => drawn.shape(name),
            None => self.entries.get(name).map(|entry| entry.shape.as_slice()),
        }
    }

    /// Reads a tensor whose shape must be `shape`, in row-major order.
    ///
    /// # Errors
    ///
    /// When the tensor is missing, has another shape, does not consist of
    /// finite floats or cannot be read.
    pub(crate) fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CompileError> {
        // Random tensors have their shapes from the same configuration.
        if let Some(drawn) = &self.drawn
            && drawn.shape(name) == Some(shape)
        {
            return Ok(drawn.read(name));
        }
        let Some(entry) = self.entries.get(name) else {
            return Err(CompileError::weights(
                &self.folder,
                format!("has no tensor {name}"),
            ));
        };
        let (path, file) = &self.files[entry.file];
        if entry.shape != shape {
            return Err(CompileError::weights(
                path,
                format!(
                    "has the tensor {name} of shape {:?}; by config.json it must be {shape:?}",
                    entry.shape
                ),
            ));
        }
        let span = span(&entry.shape, &entry.strides);
        let mut bytes = vec![0; span * entry.element.bytes()];
        file.read_exact_at(&mut bytes, entry.offset)
            .map_err(|error| CompileError::read(path, &error))?;
        let values = decode(&bytes, entry.element).ok_or_else(|| {
            CompileError::weights(
                path,
                format!("has the tensor {name}, but not in f16, bf16, f32 or f64"),
            )
        })?;
        let values = gather(values, &entry.shape, &entry.strides);
        if values.iter().all(|value| value.is_finite()) {
            Ok(values)
        } else {
            Err(CompileError::weights(
                path,
                format!("has the tensor {name} with values that are not finite"),
            ))
        }
    }

    /// Returns the total size of the files, in bytes.
    ///
    /// # Errors
    ///
    /// When the size of a file cannot be read.
    pub(crate) fn bytes(&self) -> Result<u64, CompileError> {
        let mut sum = 0;
        for (path, file) in &self.files {
            sum += file
                .metadata()
                .map_err(|error| CompileError::read(path, &error))?
                .len();
        }
        Ok(sum)
    }

    /// Computes the SHA-256 over `config.json` and the weights, from which
    /// graphs are made; `advance` is called with the number of bytes that were
    /// read.
    ///
    /// # Errors
    ///
    /// When a file cannot be read.
    pub(crate) fn digest(&self, mut advance: impl FnMut(u64)) -> Result<String, CompileError> {
        let mut hash = Sha256::new();
        let config = self.folder.join(crate::model::architecture::FILE);
        hash.update(crate::model::architecture::read(&config)?);
        let mut buffer = vec![0; 1 << 20];
        for (path, _) in &self.files {
            // A reader of its own, since reading moves the file's position.
            let mut file = File::open(path).map_err(|error| CompileError::read(path, &error))?;
            loop {
                let n_bytes = file
                    .read(&mut buffer)
                    .map_err(|error| CompileError::read(path, &error))?;
                if n_bytes == 0 {
                    break;
                }
                hash.update(&buffer[..n_bytes]);
                advance(n_bytes as u64);
            }
        }
        Ok(hex(&hash.finalize()))
    }
}

/// Returns the row-major strides of `shape`.
#[must_use]
fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1_usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        // If one size is zero, the others may have any value.
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

/// Returns the number of elements from the first to the last, both included.
fn span(shape: &[usize], strides: &[usize]) -> usize {
    if shape.contains(&0) {
        return 0;
    }
    1 + shape
        .iter()
        .zip(strides)
        .map(|(size, stride)| (size - 1) * stride)
        .sum::<usize>()
}

/// Reorders elements with the given strides into row-major order.
fn gather(values: Vec<f32>, shape: &[usize], strides: &[usize]) -> Vec<f32> {
    if strides == contiguous(shape) || values.is_empty() {
        return values;
    }
    let n_values = shape.iter().product();
    let mut index = vec![0; shape.len()];
    let mut gathered = Vec::with_capacity(n_values);
    while gathered.len() < n_values {
        let position: usize = index
            .iter()
            .zip(strides)
            .map(|(i, stride)| i * stride)
            .sum();
        gathered.push(values[position]);
        for axis in (0..shape.len()).rev() {
            index[axis] += 1;
            if index[axis] < shape[axis] {
                break;
            }
            index[axis] = 0;
        }
    }
    gathered
}

fn decode(bytes: &[u8], element: Element) -> Option<Vec<f32>> {
    fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        let (chunks, _) = bytes.as_chunks();
        chunks.iter().map(|chunk| value(*chunk)).collect()
    }
    match element {
        #[expect(clippy::cast_possible_truncation, reason = "graphs are f32 at most")]
        Element::F64 => Some(each(bytes, |chunk| f64::from_le_bytes(chunk) as f32)),
        Element::F32 => Some(each(bytes, f32::from_le_bytes)),
        Element::F16 => Some(each(bytes, |chunk| f16::from_le_bytes(chunk).to_f32())),
        Element::Bf16 => Some(each(bytes, |chunk| bf16::from_le_bytes(chunk).to_f32())),
        Element::Other(_) => None,
    }
}

#[cfg(test)]
mod tests;
