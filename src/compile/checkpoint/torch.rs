//! The table of contents of a `.bin` that `torch.save` wrote.
//!
//! The file is a zip archive of stored entries: `data.pkl` describes the
//! tensors, and `data/KEY` holds the bytes of each storage.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::Path;

use zip::{CompressionMethod, ZipArchive};

use super::pickle::{self, Tensor};
use super::{Entry, span};
use crate::compile::error::CompileError;

/// A state dict of a few hundred tensors takes some tens of kilobytes.
const PICKLE_BYTES_MAX: u64 = 64 << 20;

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
             give model.safetensors"
                .to_owned(),
        ));
    }
    if magic != *b"PK\x03\x04" {
        return Err(refuse("is not a file of torch.save".to_owned()));
    }
    let mut archive = ZipArchive::new(file)
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
        .take(PICKLE_BYTES_MAX)
        .read_to_end(&mut program)
        .map_err(|error| CompileError::read(path, &error))?;
    let tensors = pickle::state_dict(&program)
        .map_err(|reason| refuse(format!("has a data.pkl that is refused: {reason}")))?;
    let mut entries = BTreeMap::new();
    for (name, tensor) in tensors {
        let entry = place(&mut archive, &root, idx, &tensor)
            .map_err(|reason| refuse(format!("has a tensor {name} that {reason}")))?;
        entries.insert(name, entry);
    }
    Ok(entries)
}

fn place(
    archive: &mut ZipArchive<&File>,
    root: &str,
    idx: usize,
    tensor: &Tensor,
) -> Result<Entry, String> {
    let entry = archive
        .by_name(&format!("{root}data/{}", tensor.storage))
        .map_err(|error| format!("has no bytes: {error}"))?;
    if entry.compression() != CompressionMethod::Stored {
        return Err("is compressed".to_owned());
    }
    let start = entry.data_start().ok_or("has no place in the archive")?;
    let n_elements = span(&tensor.shape, &tensor.strides) as u64;
    let first = tensor.offset as u64;
    let bytes = tensor.element.bytes() as u64;
    let fits = first
        .checked_add(n_elements)
        .and_then(|end| end.checked_mul(bytes))
        .is_some_and(|end| end <= entry.size());
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
