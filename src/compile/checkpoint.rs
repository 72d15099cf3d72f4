//! A folder's weights as named tensors, whatever files hold them.
//!
//! Opening reads only the tables of contents; [`Checkpoint::read`] then takes
//! one tensor at a time, so that a model of several gigabytes never lies in
//! memory as a whole. Files are read at offsets and not mapped, because a
//! mapped file that someone truncates ends the process.

mod pickle;
mod safetensors;
mod torch;

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

/// Where a tensor lies and what it is made of.
#[derive(Debug, Clone, PartialEq)]
struct Entry {
    file: usize,
    /// Of the first element, from the start of the file.
    offset: u64,
    element: Element,
    shape: Vec<usize>,
    /// In elements; one for each dimension.
    strides: Vec<usize>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Element {
    F64,
    F32,
    F16,
    Bf16,
    /// Anything else, by its bytes: masks and counters, never weights.
    Other(usize),
}

impl Entry {
    /// Bytes of all elements.
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
    /// Where tensors are drawn and not read; then there are no entries.
    drawn: Option<RandomTensors>,
}

/// What published folders call their weights, the first found is taken.
pub(super) const SINGLE: [&str; 2] = ["model.safetensors", "pytorch_model.bin"];
pub(super) const INDEX: [&str; 2] = [
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
];

/// Files that weights are spread over; all are open at one time. imagegpt-large has
/// one, models of a hundred times its size some dozens.
const SHARDS_MAX: usize = 256;

/// Names of the files that hold the weights of `folder`.
///
/// # Errors
///
/// When there are none, or the index of several cannot be understood.
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
        "has no weights: model.safetensors, pytorch_model.bin and the .index.json of either are \
         known",
    ))
}

/// The files that an index names, each once.
///
/// # Errors
///
/// When the index cannot be understood or names a file outside its folder.
pub(crate) fn indexed_files(path: &Path) -> Result<Vec<String>, CompileError> {
    let text = crate::model::architecture::read(path)?;
    let index: serde_json::Value = serde_json::from_slice(&text)
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
                format!("names {name:?}, which is no file beside it"),
            ));
        }
        names.insert(name.to_owned());
        if names.len() > SHARDS_MAX {
            return Err(CompileError::weights(
                path,
                format!("names more than {SHARDS_MAX} files"),
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
            checkpoint.entries.extend(entries);
            checkpoint.files.push((path, file));
        }
        Ok(checkpoint)
    }

    /// The shape of the tensor `name`, if there is one.
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
    /// When it is not there, has another shape, is not made of floats or
    /// cannot be read.
    pub(crate) fn read(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CompileError> {
        // Their shapes are of the same configuration as what is asked for.
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
                    "has {name} of shape {:?} where config.json makes it {shape:?}",
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
                format!("has {name}, but not in f16, bf16, f32 or f64"),
            )
        })?;
        let values = gather(values, &entry.shape, &entry.strides);
        if values.iter().all(|value| value.is_finite()) {
            Ok(values)
        } else {
            Err(CompileError::weights(
                path,
                format!("has {name} with values that are not finite"),
            ))
        }
    }

    /// Sum of the sizes of the files.
    ///
    /// # Errors
    ///
    /// When a file cannot be asked.
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

    /// SHA-256 over `config.json` and the weights, which is what graphs are
    /// made of; `advance` is told of bytes as they pass.
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

#[must_use]
/// Row-major strides of `shape`.
fn contiguous(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1_usize; shape.len()];
    for axis in (1..shape.len()).rev() {
        // Beside a size of zero the others may be anything.
        strides[axis - 1] = strides[axis].saturating_mul(shape[axis]);
    }
    strides
}

/// Elements from the first to the last one, both counted.
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

/// Puts elements that lie `strides` apart into row-major order.
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
