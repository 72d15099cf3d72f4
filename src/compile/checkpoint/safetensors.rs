//! The table of contents of a `.safetensors` file.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use safetensors::Dtype;
use safetensors::tensor::Metadata;

use super::{Element, Entry, contiguous};
use crate::compile::error::CompileError;

/// Largest header, in bytes. The header of imagegpt-large takes 70 KB; a byte
/// takes about ten bytes of memory once it is parsed, so the crate's own limit
/// of 100 MB would take a gigabyte.
const HEADER_BYTES_MAX: u64 = 4 << 20;

pub(super) fn entries(
    path: &Path,
    file: &File,
    idx: usize,
) -> Result<BTreeMap<String, Entry>, CompileError> {
    let read = |error| CompileError::read(path, &error);
    let file_bytes = file.metadata().map_err(read)?.len();
    let mut length = [0; 8];
    file.read_exact_at(&mut length, 0).map_err(read)?;
    let header_bytes = u64::from_le_bytes(length);
    if header_bytes > HEADER_BYTES_MAX {
        return Err(CompileError::weights(
            path,
            format!(
                "is not a safetensors file: its header would have {header_bytes} bytes; the limit \
                 is {HEADER_BYTES_MAX}"
            ),
        ));
    }
    let data_start = 8 + header_bytes;
    if data_start > file_bytes {
        return Err(CompileError::weights(path, "is truncated in its header"));
    }
    let mut header = vec![0; usize::try_from(header_bytes).unwrap_or_default()];
    file.read_exact_at(&mut header, 8).map_err(read)?;
    let metadata: Metadata = serde_json::from_slice(&header).map_err(|error| {
        CompileError::weights(path, format!("is not a safetensors file: {error}"))
    })?;
    let expected = data_start.saturating_add(metadata.data_len() as u64);
    if expected != file_bytes {
        return Err(CompileError::weights(
            path,
            format!("is truncated or damaged: it has {file_bytes} bytes instead of {expected}"),
        ));
    }
    Ok(metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let entry = Entry {
                file: idx,
                offset: data_start + info.data_offsets.0 as u64,
                element: element(info.dtype),
                strides: contiguous(&info.shape),
                shape: info.shape.clone(),
            };
            (name, entry)
        })
        .collect())
}

fn element(dtype: Dtype) -> Element {
    match dtype {
        Dtype::F64 => Element::F64,
        Dtype::F32 => Element::F32,
        Dtype::F16 => Element::F16,
        Dtype::BF16 => Element::Bf16,
        other => Element::Other(other.bitsize().div_ceil(8)),
    }
}
