//! The table of contents of a `.bin` file that `torch.save` wrote.
//!
//! The file is a zip archive of stored entries: `data.pkl` describes the
//! tensors, and `data/KEY` holds the bytes of each storage.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read, Seek, SeekFrom};
use std::os::unix::fs::FileExt;
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, PickledTensor};
use super::{Element, Entry, span};
use crate::compile::error::CompileError;

/// Largest `data.pkl`, in bytes. The state dict of imagegpt-large takes 120
/// KiB; a byte takes up to some hundred bytes of memory once it is read.
const PICKLE_BYTES_MAX: u64 = 1 << 20;
/// Largest number of bytes that are read to find the tensors: the archive's
/// directory and the pickle. The directory of imagegpt-large takes 80 KiB.
const READ_BYTES_MAX: u64 = 8 << 20;
/// Largest size of all tensors, as a multiple of the file's size. Tensors that
/// share a storage, such as tied embeddings, take more than the file; no model
/// takes more than twice its size.
const SHARED_MAX: u64 = 2;

pub(super) fn entries(
    path: &Path,
    file: &File,
    idx: usize,
) -> Result<BTreeMap<String, Entry>, CompileError> {
    let refuse = |reason: String| CompileError::weights(path, reason);
    let mut magic = [0; 4];
    file.read_exact_at(&mut magic, 0)
        .map_err(|error| CompileError::read(path, &error))?;
    if magic[0] == 0x80 {
        return Err(refuse(
            "is in the format of PyTorch before 1.6; load it in PyTorch and save it again, or \
             provide model.safetensors"
                .to_owned(),
        ));
    }
    if magic != *b"PK\x03\x04" {
        return Err(refuse("was not written by torch.save".to_owned()));
    }
    let file_bytes = file
        .metadata()
        .map_err(|error| CompileError::read(path, &error))?
        .len();
    let mut archive = ZipArchive::new(Bounded::new(file, file_bytes))
        .map_err(|error| refuse(format!("is truncated or not a zip archive: {error}")))?;
    let root = archive
        .file_names()
        .filter_map(Result::ok)
        .find_map(|name| name.strip_suffix("data.pkl").map(str::to_owned))
        .ok_or_else(|| refuse("has no data.pkl".to_owned()))?;
    let mut program = Vec::new();
    archive
        .by_name(&format!("{root}data.pkl"))
        .map_err(|error| refuse(format!("has no readable data.pkl: {error}")))?
        .take(PICKLE_BYTES_MAX + 1)
        .read_to_end(&mut program)
        .map_err(|error| CompileError::read(path, &error))?;
    if program.len() as u64 > PICKLE_BYTES_MAX {
        return Err(refuse(format!(
            "has a data.pkl of over {PICKLE_BYTES_MAX} bytes, the limit of a state dict"
        )));
    }
    let tensors = pickle::state_dict(&program)
        .map_err(|reason| refuse(format!("has a data.pkl that is refused: {reason}")))?;
    let mut entries = BTreeMap::new();
    let mut bytes = 0_u64;
    for (name, tensor) in tensors {
        let entry = place(&mut archive, &root, idx, &tensor, file_bytes)
            .map_err(|reason| refuse(format!("has a tensor {name} that {reason}")))?;
        if !matches!(entry.element, Element::Other(_)) {
            bytes = bytes.saturating_add(entry.bytes());
        }
        entries.insert(name, entry);
    }
    if bytes > file_bytes.saturating_mul(SHARED_MAX) {
        return Err(refuse(format!(
            "has tensors of {bytes} bytes in a file of {file_bytes}: more of them share their \
             storage than tied embeddings do"
        )));
    }
    Ok(entries)
}

fn place(
    archive: &mut ZipArchive<Bounded<'_>>,
    root: &str,
    idx: usize,
    tensor: &PickledTensor,
    file_bytes: u64,
) -> Result<Entry, String> {
    let entry = archive
        .by_name(&format!("{root}data/{}", tensor.storage))
        .map_err(|error| format!("has no bytes: {error}"))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err("is compressed".to_owned());
    }
    let start = entry.data_start().ok_or("has no place in the archive")?;
    let n_elements = span(&tensor.shape, &tensor.strides) as u64;
    // Strides of zero, as after `expand`, would turn a few stored numbers into
    // any number of elements.
    let of_shape = tensor.shape.iter().product::<usize>() as u64;
    // Tensors of other types than floats are not weights and are never read.
    if of_shape > n_elements && !matches!(tensor.element, Element::Other(_)) {
        return Err(format!(
            "has the shape {:?} and the strides {:?}, so {of_shape} elements share {n_elements} \
             stored elements; save it as a contiguous tensor",
            tensor.shape, tensor.strides
        ));
    }
    // The size in the archive's directory may be wrong.
    let stored = entry.size().min(file_bytes.saturating_sub(start));
    let first = tensor.offset as u64;
    let bytes = tensor.element.bytes() as u64;
    let fits = first
        .checked_add(n_elements)
        .and_then(|end| end.checked_mul(bytes))
        .is_some_and(|end| end <= stored);
    if !fits {
        return Err("reaches beyond its storage".to_owned());
    }
    Ok(Entry {
        file: idx,
        offset: start + first * bytes,
        element: tensor.element,
        shape: tensor.shape.clone(),
        strides: tensor.strides.clone(),
    })
}

/// File of which at most [`READ_BYTES_MAX`] bytes are read, since an archive
/// may claim any number of entries.
struct Bounded<'f> {
    file: &'f File,
    bytes: u64,
    position: u64,
    left: u64,
}

impl<'f> Bounded<'f> {
    fn new(file: &'f File, bytes: u64) -> Self {
        Self {
            file,
            bytes,
            position: 0,
            left: READ_BYTES_MAX,
        }
    }
}

impl Read for Bounded<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.left == 0 {
            return Err(io::Error::other(format!(
                "its directory has over {READ_BYTES_MAX} bytes, the limit of a checkpoint"
            )));
        }
        let n_bytes = buffer
            .len()
            .min(usize::try_from(self.left).unwrap_or(usize::MAX));
        let n_bytes = self.file.read_at(&mut buffer[..n_bytes], self.position)?;
        self.position += n_bytes as u64;
        self.left -= n_bytes as u64;
        Ok(n_bytes)
    }
}

impl Seek for Bounded<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let to = match to {
            SeekFrom::Start(to) => Some(to),
            SeekFrom::End(by) => self.bytes.checked_add_signed(by),
            SeekFrom::Current(by) => self.position.checked_add_signed(by),
        };
        self.position =
            to.ok_or_else(|| io::Error::other("an offset is before the file's start"))?;
        Ok(self.position)
    }
}
