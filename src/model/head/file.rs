//! File of a linear head: its content, its reader and its writer.
//!
//! A head is a safetensors file. Tensors: `weight` (classes, width) and `bias`
//! (classes), both f32; a class's logit is the product of its row of `weight`
//! with the features, plus its bias. Metadata, all text; unknown keys are
//! ignored:
//!
//! | key | value |
//! |---|---|
//! | `labels` | JSON array of the classes' names, in row order |
//! | `layer` | number of the layer whose features the head was trained on, as in Embed |
//! | `norm` | `PRE_ATTN_RMS` or `NONE` |
//! | `context` | `RAW` or `SOS_SHIFTED` |
//! | `problem_type` | optional; `single_label_classification` (default) or `multi_label_classification` |
//! | `fit` | optional; `SQUASH` or `CENTER_CROP` |
//! | `alpha` | optional; `DROP` or `WHITE` |
//! | `weights_digest` | optional; [`Model::weights_digest`] of the model on whose features the head was trained |
//! | `figures` | optional; JSON object of numbers about the training, by name |
//! | `tool_version` | optional; version of the program that wrote the file |
//!
//! [`Model::weights_digest`]: crate::model::Model::weights_digest

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use ndarray::Array2;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::Number;
use sha2::{Digest as _, Sha256};

use crate::excerpt::Excerpt;
use crate::files;
use crate::files::hex;
use crate::imaging::{Alpha, Fit};
use crate::model::ClassActivation;
use crate::model::graph::{Context, Norm};

/// Largest size of a head file, in bytes; a larger file is something else.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Largest header of a head file, in bytes. The names of 20,000 classes take a
/// megabyte; a byte takes about ten bytes of memory once it is parsed.
const HEADER_BYTES_MAX: u64 = 4 << 20;
/// Largest text of the figures, in bytes: some hundred numbers with names. A
/// training has about ten.
const FIGURES_BYTES_MAX: usize = 16 << 10;
/// Largest text of a version, in bytes; one with a commit and a date takes 60.
const VERSION_BYTES_MAX: usize = 256;

const NORMS: [(&str, Norm); 2] = [("PRE_ATTN_RMS", Norm::PreAttnRms), ("NONE", Norm::None)];
const CONTEXTS: [(&str, Context); 2] =
    [("RAW", Context::Raw), ("SOS_SHIFTED", Context::SosShifted)];
const FITS: [(&str, Fit); 2] = [("SQUASH", Fit::Squash), ("CENTER_CROP", Fit::CenterCrop)];
const ALPHAS: [(&str, Alpha); 2] = [("DROP", Alpha::Drop), ("WHITE", Alpha::White)];

/// Content of a head file: the classifier, and the options with which its
/// features were made.
#[derive(Debug, Clone, PartialEq)]
pub struct HeadFile {
    /// Names of the classes, in the order of the rows of `weight`.
    pub labels: Vec<String>,
    pub activation: ClassActivation,
    pub layer: u32,
    pub norm: Norm,
    pub context: Context,
    /// `None` in files that do not say how images became tokens; then each call
    /// chooses.
    pub fit: Option<Fit>,
    pub alpha: Option<Alpha>,
    /// Digest of the source weights of the model on whose features the head was
    /// trained; `None` in files that do not name a model.
    pub weights_digest: Option<String>,
    /// Numbers about the training, such as an accuracy, by name. They are only
    /// kept for people and programs that read the file.
    pub figures: BTreeMap<String, Number>,
    /// Version of the program that wrote the file.
    pub tool_version: Option<String>,
    /// `labels.len()` rows, each of as many numbers as there are features.
    pub weight: Array2<f32>,
    pub bias: Vec<f32>,
}

impl HeadFile {
    /// Number of features that the head takes.
    #[must_use]
    pub fn width(&self) -> usize {
        self.weight.ncols()
    }

    /// True if the head says how images became tokens.
    pub(crate) fn preprocess_is_set(&self) -> bool {
        self.fit.is_some() || self.alpha.is_some()
    }

    /// Reads a head file.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is not a head; the text does not name
    /// the file.
    pub fn read(file: &Path) -> Result<Self, String> {
        let bytes = files::read(file, FILE_BYTES_MAX)
            .map_err(|error| error.to_string())?
            .map_err(|trouble| trouble.to_string())?
            .ok_or_else(|| {
                format!("the file has over {FILE_BYTES_MAX} bytes, the limit of a head")
            })?;
        Self::parse(&bytes)
    }

    /// Writes a head file, through a temporary file that is renamed. Equal
    /// contents give equal bytes.
    ///
    /// # Errors
    ///
    /// When [`HeadFile::read`] would refuse the file, or the file cannot be
    /// written; the text does not name the file.
    pub fn write(&self, file: &Path) -> Result<(), String> {
        let bytes = self.encode()?;
        // A file that was written can be read, and gives the same head.
        Self::parse(&bytes)?;
        files::replace(file, &bytes).map_err(|error| format!("the file cannot be written: {error}"))
    }

    /// Returns "sha256:" and hexadecimal digits over all that scores depend on:
    /// labels, activation, layer, norm, context, weight and bias. Heads with
    /// equal ones give equal scores.
    #[must_use]
    pub fn digest(&self) -> String {
        let mut digest = Sha256::new();
        for label in &self.labels {
            digest.update(label);
            digest.update([0]);
        }
        digest.update(self.activation.problem_type());
        let norm = NORMS.iter().find(|(_, norm)| *norm == self.norm);
        let context = CONTEXTS
            .iter()
            .find(|(_, context)| *context == self.context);
        digest.update(norm.map_or("", |(name, _)| name));
        digest.update(context.map_or("", |(name, _)| name));
        digest.update(self.layer.to_le_bytes());
        for number in self.weight.iter().chain(&self.bias) {
            digest.update(number.to_le_bytes());
        }
        format!("sha256:{}", hex(&digest.finalize()))
    }

    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let header = bytes
            .first_chunk()
            .map_or(0, |head| u64::from_le_bytes(*head));
        if header > HEADER_BYTES_MAX {
            return Err(format!(
                "not a safetensors file: its header would have {header} bytes; the limit is \
                 {HEADER_BYTES_MAX}"
            ));
        }
        let not_safetensors = |error| format!("not a safetensors file: {error}");
        let tensors = SafeTensors::deserialize(bytes).map_err(not_safetensors)?;
        let (_, header) = SafeTensors::read_metadata(bytes).map_err(not_safetensors)?;
        let metadata = HeadMetadata(header.metadata().clone().unwrap_or_default());
        let weight = tensors
            .tensor("weight")
            .map_err(|_| "the file has no tensor \"weight\"")?;
        let bias = tensors
            .tensor("bias")
            .map_err(|_| "the file has no tensor \"bias\"")?;
        let &[n_classes, width] = weight.shape() else {
            return Err(format!(
                "weight has the shape {:?}; it must be (classes, width)",
                weight.shape()
            ));
        };
        if bias.shape() != [n_classes] || n_classes == 0 || width == 0 {
            return Err(format!(
                "bias has the shape {:?} and weight {:?}; they must be (classes) and (classes, \
                 width)",
                bias.shape(),
                weight.shape()
            ));
        }
        let labels: Vec<String> = serde_json::from_str(metadata.needed("labels")?)
            .map_err(|error| format!("labels are not a JSON array of names: {error}"))?;
        if labels.len() != n_classes {
            return Err(format!(
                "labels has {} names; weight has {n_classes} classes",
                labels.len()
            ));
        }
        let layer = metadata.needed("layer")?;
        Ok(Self {
            labels,
            activation: metadata.activation()?,
            layer: layer.parse().map_err(|_| {
                let layer = Excerpt::of(layer);
                format!("layer is {layer:?}; it must be a whole number")
            })?,
            norm: choice("norm", metadata.needed("norm")?, NORMS)?,
            context: choice("context", metadata.needed("context")?, CONTEXTS)?,
            fit: metadata.choice("fit", FITS)?,
            alpha: metadata.choice("alpha", ALPHAS)?,
            weights_digest: metadata.weights_digest()?,
            figures: metadata.figures()?,
            tool_version: metadata.tool_version()?,
            weight: Array2::from_shape_vec((n_classes, width), f32s("weight", &weight)?)
                .map_err(|error| format!("weight: {error}"))?,
            bias: f32s("bias", &bias)?,
        })
    }

    /// Encodes the file. The library's own writer puts the metadata in another
    /// order each time, so the header is made here.
    fn encode(&self) -> Result<Vec<u8>, String> {
        let (bias, weight) = (4 * self.bias.len(), 4 * self.weight.len());
        let mut header = serde_json::json!({
            "__metadata__": self.metadata()?,
            "bias": {
                "dtype": "F32",
                "shape": [self.bias.len()],
                "data_offsets": [0, bias],
            },
            "weight": {
                "dtype": "F32",
                "shape": self.weight.shape(),
                "data_offsets": [bias, bias + weight],
            },
        })
        .to_string();
        // The format aligns the tensors to 8 bytes by spaces.
        while !header.len().is_multiple_of(8) {
            header.push(' ');
        }
        if header.len() as u64 > HEADER_BYTES_MAX {
            return Err(format!(
                "labels: the header with all metadata would have {} bytes; the limit is \
                 {HEADER_BYTES_MAX}; use shorter names or fewer classes",
                header.len()
            ));
        }
        let n_bytes = 8 + header.len() + bias + weight;
        if n_bytes as u64 > FILE_BYTES_MAX {
            return Err(format!(
                "weight: the file would have {n_bytes} bytes; the limit of a head is \
                 {FILE_BYTES_MAX}; use fewer classes"
            ));
        }
        let mut bytes = Vec::with_capacity(n_bytes);
        bytes.extend((header.len() as u64).to_le_bytes());
        bytes.extend(header.as_bytes());
        // Row by row, however the array lies in memory.
        for value in self.bias.iter().chain(self.weight.iter()) {
            bytes.extend(value.to_le_bytes());
        }
        Ok(bytes)
    }

    /// Returns the metadata, in the order of the keys.
    fn metadata(&self) -> Result<BTreeMap<&'static str, String>, String> {
        let labels = serde_json::to_string(&self.labels).map_err(|error| error.to_string())?;
        let mut metadata = BTreeMap::from([
            ("labels", labels),
            ("layer", self.layer.to_string()),
            ("norm", name(self.norm, NORMS)),
            ("context", name(self.context, CONTEXTS)),
            ("problem_type", self.activation.problem_type().to_owned()),
        ]);
        let figures = (!self.figures.is_empty())
            .then(|| serde_json::to_string(&self.figures))
            .transpose()
            .map_err(|error| error.to_string())?;
        let optional = [
            ("fit", self.fit.map(|fit| name(fit, FITS))),
            ("alpha", self.alpha.map(|alpha| name(alpha, ALPHAS))),
            ("weights_digest", self.weights_digest.clone()),
            ("figures", figures),
            ("tool_version", self.tool_version.clone()),
        ];
        metadata.extend(
            optional
                .into_iter()
                .filter_map(|(key, value)| Some((key, value?))),
        );
        Ok(metadata)
    }
}

/// Metadata of a head file, as text.
struct HeadMetadata(HashMap<String, String>);

impl HeadMetadata {
    fn get(&self, key: &str) -> Option<&str> {
        self.0.get(key).map(String::as_str)
    }

    fn needed(&self, key: &str) -> Result<&str, String> {
        self.get(key)
            .ok_or_else(|| format!("the metadata has no {key}"))
    }

    /// Returns the value of an optional key.
    fn choice<T: Copy>(&self, key: &str, choices: [(&str, T); 2]) -> Result<Option<T>, String> {
        self.get(key)
            .map(|value| choice(key, value, choices))
            .transpose()
    }

    fn activation(&self) -> Result<ClassActivation, String> {
        ClassActivation::of(self.get("problem_type"))
    }

    fn weights_digest(&self) -> Result<Option<String>, String> {
        let Some(digest) = self.get("weights_digest") else {
            return Ok(None);
        };
        let is_digit = |letter: u8| letter.is_ascii_digit() || (b'a'..=b'f').contains(&letter);
        let is_digest = digest
            .strip_prefix("sha256:")
            .is_some_and(|digits| digits.len() == 64 && digits.bytes().all(is_digit));
        if !is_digest {
            return Err(format!(
                "weights_digest is {:?}; it must be sha256: and 64 hexadecimal digits in lower \
                 case",
                Excerpt::of(digest)
            ));
        }
        Ok(Some(digest.to_owned()))
    }

    fn figures(&self) -> Result<BTreeMap<String, Number>, String> {
        let Some(text) = self.get("figures") else {
            return Ok(BTreeMap::new());
        };
        at_most("figures", text, FIGURES_BYTES_MAX)?;
        serde_json::from_str(text)
            .map_err(|error| format!("figures are not a JSON object of numbers: {error}"))
    }

    fn tool_version(&self) -> Result<Option<String>, String> {
        let Some(version) = self.get("tool_version") else {
            return Ok(None);
        };
        at_most("tool_version", version, VERSION_BYTES_MAX)?;
        Ok(Some(version.to_owned()))
    }
}

fn at_most(key: &str, text: &str, max: usize) -> Result<(), String> {
    if text.len() <= max {
        return Ok(());
    }
    Err(format!(
        "{key} has {} bytes; the limit is {max}",
        text.len()
    ))
}

fn choice<T: Copy>(key: &str, given: &str, choices: [(&str, T); 2]) -> Result<T, String> {
    let found = choices.iter().find(|(name, _)| *name == given);
    found.map(|&(_, value)| value).ok_or_else(|| {
        let [(one, _), (other, _)] = choices;
        let given = Excerpt::of(given);
        format!("{key} is {given:?}; it must be {one} or {other}")
    })
}

fn name<T: Copy + PartialEq>(value: T, choices: [(&str, T); 2]) -> String {
    let found = choices.into_iter().find(|(_, choice)| *choice == value);
    found.map_or_else(String::new, |(name, _)| name.to_owned())
}

fn f32s(name: &str, tensor: &TensorView<'_>) -> Result<Vec<f32>, String> {
    if tensor.dtype() != Dtype::F32 {
        return Err(format!("{name} is {:?}; it must be F32", tensor.dtype()));
    }
    let values: Vec<f32> = tensor
        .data()
        .chunks_exact(4)
        .map(|bytes| f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
        .collect();
    if values.iter().all(|value| value.is_finite()) {
        Ok(values)
    } else {
        Err(format!("{name} has a number that is not finite"))
    }
}

#[cfg(test)]
mod tests;
