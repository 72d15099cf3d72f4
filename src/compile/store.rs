//! `weights.bin`: the file of the weights of all graphs of a compiled
//! directory.
//!
//! Graphs that run in one process share its tensors, which a worker reads into
//! memory; for verification a graph maps the file. Tensors start at multiples
//! of the page size, as mapping requires.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use super::calibrate::{Calibration, LayerProduct, Moments, quantize};
use super::error::CompileError;
use super::weights::{CheckpointWeights, Dense};
use crate::model::architecture::Architecture;
use crate::model::manifest::WEIGHTS_FILE;
use crate::model::onnx::{DataType, StringEntry, TensorProto};
use crate::model::precision::{Precision, Provider};

const ALIGNMENT: u64 = 4096;

/// The tensors of `weights.bin`, as graphs refer to them.
#[derive(Debug, Default)]
pub(crate) struct Store {
    tensors: BTreeMap<String, TensorProto>,
}

impl Store {
    /// Returns the declaration by which a graph uses the tensor `name`, if that
    /// tensor was written.
    #[must_use]
    pub(crate) fn get(&self, name: &str) -> Option<&TensorProto> {
        self.tensors.get(name)
    }

    /// Declares a tensor that no file has, for tests that build graphs only.
    #[cfg(test)]
    pub(crate) fn declare(&mut self, tensor: TensorProto) {
        self.tensors.insert(tensor.name.clone(), tensor);
    }

    #[must_use]
    pub(crate) fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// Declares one of [`PARTS`] as a tensor of its own, over bytes of the
    /// tensor `whole`, whose first axis the parts divide.
    fn cut(&mut self, whole: &str, part: &str, idx: u64) {
        let Some(mut tensor) = self.tensors.get(whole).cloned() else {
            return;
        };
        part.clone_into(&mut tensor.name);
        if let Some(first) = tensor.dims.first_mut() {
            *first /= 3;
        }
        let entry = |tensor: &TensorProto, key: &str| -> u64 {
            let mut entries = tensor.external_data.iter();
            let entry = entries.find(|entry| entry.key == key);
            entry.map_or(0, |entry| entry.value.parse().unwrap_or(0))
        };
        let length = entry(&tensor, "length") / 3;
        let offset = entry(&tensor, "offset") + idx * length;
        for place in &mut tensor.external_data {
            match &*place.key {
                "offset" => place.value = offset.to_string(),
                "length" => place.value = length.to_string(),
                _ => {}
            }
        }
        self.tensors.insert(part.to_owned(), tensor);
    }
}

/// Names of the weights of queries, keys and values, if these are separate
/// products.
pub(crate) const PARTS: [&str; 3] = ["qkv.query", "qkv.key", "qkv.value"];

/// Order of the weights of layers in `weights.bin`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum WeightLayout {
    /// Weights for products over whole images.
    Plain,
    /// Weights as in `Plain`, and 8-bit weights in blocks for products that
    /// treat each row by itself.
    WithBlocks,
    /// Weights with [`PARTS`] as separate tensors: the outputs of queries, keys
    /// and values follow one another, so that each is a part of the whole
    /// tensor.
    Apart,
}

/// Parts of the model that the graphs will need.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Parts {
    /// Number of layers to write, followed by the norm in front of the next
    /// layer.
    pub n_layers: usize,
    pub language_head: bool,
    pub classification_head: bool,
    pub layout: WeightLayout,
}

/// Largest number of inputs in a block of 8-bit weights that share a scale.
/// Smaller blocks are more exact, larger ones are faster.
const BLOCK_MAX: usize = 128;
/// Smallest block that the operator supports.
const BLOCK_MIN: usize = 16;

/// Returns the block size of a product with `inputs` inputs.
#[must_use]
pub(crate) fn block_size(inputs: usize) -> usize {
    inputs.next_power_of_two().clamp(BLOCK_MIN, BLOCK_MAX)
}

/// Writes the weights that `parts` names, with one tensor in memory at a time;
/// `advance` is called with the number of parameters that were written.
///
/// # Errors
///
/// When a tensor does not fit the configuration or cannot be written.
pub(crate) fn write(
    weights: &CheckpointWeights<'_>,
    (precision, provider): (Precision, Provider),
    parts: Parts,
    calibration: Option<&Calibration>,
    folder: &Path,
    mut advance: impl FnMut(u64),
) -> Result<Store, CompileError> {
    let Architecture {
        width,
        vocabulary,
        n_positions,
        n_layers,
        ..
    } = weights.architecture;
    let mut writer = Writer::create(folder.join(WEIGHTS_FILE))?;
    let float = precision.activation(provider);
    writer.floats(
        "wte",
        float,
        &[vocabulary, width],
        &weights.token_embedding()?,
    )?;
    writer.floats(
        "wpe",
        float,
        &[n_positions, width],
        &weights.position_embedding()?,
    )?;
    advance(((vocabulary + n_positions) * width) as u64);
    for idx in 0..parts.n_layers {
        let layer = weights.layer(idx)?;
        let name = |part: &str| format!("h.{idx}.{part}");
        let moments = |product| calibration?.moments(idx, product);
        writer.floats(
            &name("attention_norm"),
            float,
            &[width],
            &layer.attention_norm,
        )?;
        if parts.layout == WeightLayout::Apart {
            writer.apart(&name(""), float, &layer.qkv)?;
        } else {
            writer.dense(
                &name("qkv"),
                (precision.weights(), float),
                &layer.qkv,
                moments(LayerProduct::Qkv),
            )?;
        }
        writer.dense(
            &name("projection"),
            (precision.weights(), float),
            &layer.projection,
            moments(LayerProduct::Projection),
        )?;
        writer.floats(&name("inner_norm"), float, &[width], &layer.inner_norm)?;
        writer.dense(
            &name("expand"),
            (precision.weights(), float),
            &layer.expand,
            moments(LayerProduct::Expand),
        )?;
        writer.dense(
            &name("contract"),
            (precision.weights(), float),
            &layer.contract,
            moments(LayerProduct::Contract),
        )?;
        if parts.layout == WeightLayout::WithBlocks {
            for (part, dense) in [
                ("qkv", &layer.qkv),
                ("projection", &layer.projection),
                ("expand", &layer.expand),
                ("contract", &layer.contract),
            ] {
                writer.blocks(&name(part), dense)?;
            }
        }
        advance(weights.architecture.layer_parameters() as u64);
    }
    if parts.n_layers == n_layers {
        writer.floats("final_norm", float, &[width], &weights.final_norm()?)?;
    } else {
        let name = format!("h.{}.attention_norm", parts.n_layers);
        let norm = weights.attention_norm(parts.n_layers)?;
        writer.floats(&name, float, &[width], &norm)?;
    }
    // Heads are small and their results are compared closely, so they are never
    // narrower than the activations.
    if parts.language_head {
        let shape = [weights.architecture.n_colors(), width];
        writer.floats("language_head", float, &shape, &weights.language_head()?)?;
    }
    if parts.classification_head {
        let shape = [weights.n_classes.unwrap_or_default(), width];
        let head = weights.classification_head()?;
        writer.floats("classification_head", float, &shape, &head)?;
    }
    writer.finish()
}

struct Writer {
    path: PathBuf,
    file: BufWriter<File>,
    position: u64,
    store: Store,
}

impl Writer {
    fn create(path: PathBuf) -> Result<Self, CompileError> {
        let file = File::create(&path).map_err(|error| CompileError::write(&path, &error))?;
        Ok(Self {
            path,
            file: BufWriter::with_capacity(1 << 20, file),
            position: 0,
            store: Store::default(),
        })
    }

    fn dense(
        &mut self,
        name: &str,
        (weights, float): (DataType, DataType),
        dense: &Dense,
        moments: Option<&Moments>,
    ) -> Result<(), CompileError> {
        let shape = [dense.inputs, dense.outputs];
        if weights == DataType::Int8 {
            let (values, scales) = quantize(dense, moments);
            let bytes: Vec<u8> = values.iter().map(|value| value.cast_unsigned()).collect();
            self.bytes(name, DataType::Int8, &shape, &bytes)?;
            self.floats(
                &format!("{name}.scale"),
                DataType::Float,
                &[dense.outputs],
                &scales,
            )?;
        } else {
            self.floats(name, weights, &shape, &dense.weight)?;
        }
        match &dense.bias {
            None => Ok(()),
            Some(bias) => {
                let name = format!("{name}.bias");
                self.floats(&name, float, &[dense.outputs], bias)
            }
        }
    }

    /// Writes the weights of queries, keys and values as separate tensors;
    /// `layer` is the beginning of their names.
    fn apart(
        &mut self,
        layer: &str,
        data_type: DataType,
        dense: &Dense,
    ) -> Result<(), CompileError> {
        let (inputs, outputs) = (dense.inputs, dense.outputs);
        let by_output = (0..outputs)
            .flat_map(|output| (0..inputs).map(move |input| input * outputs + output))
            .map(|place| dense.weight[place]);
        let weight: Vec<f32> = by_output.collect();
        let whole = format!("{layer}qkv");
        self.floats(&whole, data_type, &[outputs, inputs], &weight)?;
        if let Some(bias) = &dense.bias {
            self.floats(&format!("{whole}.bias"), data_type, &[outputs], bias)?;
        }
        for (idx, part) in (0..).zip(PARTS) {
            let part = format!("{layer}{part}");
            self.store.cut(&whole, &part, idx);
            if dense.bias.is_some() {
                let [whole, part] = [&whole, &part].map(|name| format!("{name}.bias"));
                self.store.cut(&whole, &part, idx);
            }
        }
        Ok(())
    }

    /// Writes weights for `MatMulNBits`: bytes `(outputs, blocks, block)` with
    /// the zero point 128, and a scale per block. The bias is written by
    /// `dense`.
    fn blocks(&mut self, name: &str, dense: &Dense) -> Result<(), CompileError> {
        let block = block_size(dense.inputs);
        let n_blocks = dense.inputs.div_ceil(block);
        let (bytes, scales) = quantize_blocks(dense, block);
        self.bytes(
            &format!("{name}.blocks"),
            DataType::Uint8,
            &[dense.outputs, n_blocks, block],
            &bytes,
        )?;
        self.floats(
            &format!("{name}.block_scales"),
            DataType::Float,
            &[dense.outputs * n_blocks],
            &scales,
        )
    }

    fn floats(
        &mut self,
        name: &str,
        data_type: DataType,
        shape: &[usize],
        values: &[f32],
    ) -> Result<(), CompileError> {
        self.bytes(name, data_type, shape, &data_type.bytes(values))
    }

    fn bytes(
        &mut self,
        name: &str,
        data_type: DataType,
        shape: &[usize],
        bytes: &[u8],
    ) -> Result<(), CompileError> {
        let offset = self.position.next_multiple_of(ALIGNMENT);
        let gap = usize::try_from(offset - self.position).unwrap_or_default();
        self.file
            .write_all(&vec![0; gap])
            .and_then(|()| self.file.write_all(bytes))
            .map_err(|error| CompileError::write(&self.path, &error))?;
        self.position = offset + bytes.len() as u64;
        let entry = |key: &str, value: String| StringEntry {
            key: key.to_owned(),
            value,
        };
        let tensor = TensorProto {
            dims: shape
                .iter()
                .map(|size| i64::try_from(*size).unwrap_or(i64::MAX))
                .collect(),
            data_type: data_type.into(),
            name: name.to_owned(),
            raw_data: Vec::new(),
            external_data: vec![
                entry("location", WEIGHTS_FILE.to_owned()),
                entry("offset", offset.to_string()),
                entry("length", bytes.len().to_string()),
            ],
            data_location: 1,
        };
        self.store.tensors.insert(name.to_owned(), tensor);
        Ok(())
    }

    fn finish(self) -> Result<Store, CompileError> {
        let write = |error: &std::io::Error| CompileError::write(&self.path, error);
        let file = self
            .file
            .into_inner()
            .map_err(|error| write(error.error()))?;
        file.sync_all().map_err(|error| write(&error))?;
        Ok(self.store)
    }
}

/// Quantizes weights to 8 bits with the zero point 128 and a scale per block of
/// an output's inputs, rounded to nearest. The last block is padded with zeros.
fn quantize_blocks(dense: &Dense, block: usize) -> (Vec<u8>, Vec<f32>) {
    let n_blocks = dense.inputs.div_ceil(block);
    let mut bytes = Vec::with_capacity(dense.outputs * n_blocks * block);
    let mut scales = Vec::with_capacity(dense.outputs * n_blocks);
    for output in 0..dense.outputs {
        for first in (0..dense.inputs).step_by(block) {
            let last = (first + block).min(dense.inputs);
            let weights =
                || (first..last).map(|input| dense.weight[input * dense.outputs + output]);
            let largest = weights().fold(0.0_f32, |largest, weight| largest.max(weight.abs()));
            let scale = if largest > 0.0 { largest / 127.0 } else { 1.0 };
            scales.push(scale);
            bytes.extend(weights().map(|weight| {
                #[expect(
                    clippy::cast_possible_truncation,
                    clippy::cast_sign_loss,
                    reason = "within 127 of 128 by the scale"
                )]
                let byte = ((weight / scale).round_ties_even() + 128.0) as u8;
                byte
            }));
            bytes.resize(bytes.len() + block - (last - first), 128);
        }
    }
    (bytes, scales)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_stand_for_the_weights() {
        // Two outputs of 20 inputs: a whole block of 16 and one of 4.
        let weight: Vec<f32> = (0..40_u8).map(|n| (f32::from(n) - 20.0) / 7.0).collect();
        let dense = Dense {
            weight,
            bias: None,
            inputs: 20,
            outputs: 2,
        };
        let (bytes, scales) = quantize_blocks(&dense, 16);
        assert_eq!((bytes.len(), scales.len()), (64, 4));
        for output in 0..2 {
            for input in 0..20 {
                let block = output * 2 + input / 16;
                let byte = bytes[block * 16 + input % 16];
                let got = (f32::from(byte) - 128.0) * scales[block];
                let expected = dense.weight[input * 2 + output];
                assert!((got - expected).abs() <= scales[block] / 2.0);
            }
        }
        assert!(
            bytes[20..32].iter().all(|&byte| byte == 128),
            "padding is zero"
        );
    }

    #[test]
    fn blocks_fit_the_inputs() {
        assert_eq!([1, 16, 17, 96, 512].map(block_size), [16, 16, 32, 128, 128]);
    }
}
