//! Linear heads: classification by pooled features, without a second run of the
//! model.
//!
//! A head is a safetensors file. Tensors: `weight` (classes, width) and `bias`
//! (classes), both f32; a class's logit is the product of its row of `weight`
//! with the features, plus its bias. Metadata, all text:
//!
//! | key | value |
//! |---|---|
//! | `labels` | JSON array of the classes' names, in row order |
//! | `layer` | number of the layer whose features the head was trained on, as in Embed |
//! | `norm` | `PRE_ATTN_RMS` or `NONE` |
//! | `context` | `RAW` or `SOS_SHIFTED` |
//! | `problem_type` | optional; `single_label_classification` (default) or `multi_label_classification` |

use std::path::{Path, PathBuf};
use std::str::FromStr;

use ndarray::Array2;
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};

use crate::files;
use crate::model::graph::{Context, Norm};
use crate::model::{ClassActivation, Model};

/// Largest size of a head file, in bytes; a larger file is something else.
const FILE_BYTES_MAX: u64 = 64 << 20;
/// Largest header of a head file, in bytes. The names of 20,000 classes take a
/// megabyte; a byte takes about ten bytes of memory once it is parsed.
const HEADER_BYTES_MAX: u64 = 4 << 20;

/// Value of `--head`: a name and a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct HeadFlag {
    pub name: String,
    pub file: PathBuf,
}

impl FromStr for HeadFlag {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.split_once('=') {
            Some((name, file)) if !name.is_empty() && !file.is_empty() => Ok(Self {
                name: name.to_owned(),
                file: file.into(),
            }),
            _ => Err("the value must be NAME=FILE".to_owned()),
        }
    }
}

/// A loaded head.
#[derive(Debug, Clone)]
pub struct LinearHead {
    pub name: String,
    /// File that the head was read from.
    pub file: PathBuf,
    pub labels: Vec<String>,
    pub activation: ClassActivation,
    pub layer: u32,
    pub norm: Norm,
    pub context: Context,
    /// Number of features that the head takes.
    pub width: usize,
    /// `labels.len()` rows of `width`.
    weight: Array2<f32>,
    bias: Vec<f32>,
}

/// Reason why a head cannot be used. The text names the flag and the file.
#[derive(Debug, thiserror::Error)]
#[error("--head {name}={}: {reason}", file.display())]
pub struct HeadError {
    name: String,
    file: PathBuf,
    reason: String,
}

impl LinearHead {
    /// Reads a head.
    ///
    /// # Errors
    ///
    /// When the file cannot be read or is not a head.
    pub fn open(flag: &HeadFlag) -> Result<Self, HeadError> {
        read(&flag.name, &flag.file).map_err(|reason| HeadError {
            name: flag.name.clone(),
            file: flag.file.clone(),
            reason,
        })
    }

    /// Checks that the model has the features that the head was trained on.
    ///
    /// # Errors
    ///
    /// When the model does not have these features.
    pub fn check(&self, model: &Model) -> Result<(), HeadError> {
        if model.features(&[self.layer], self.norm).is_some() {
            return Ok(());
        }
        Err(HeadError {
            name: self.name.clone(),
            file: self.file.clone(),
            reason: format!(
                "the head was trained on layer {}; the model serves pooled features of the \
                 layers {:?}",
                self.layer,
                model.layers_served(self.norm)
            ),
        })
    }

    /// Returns the logit of each class.
    #[must_use]
    pub fn logits(&self, features: &[f32]) -> Vec<f32> {
        let rows = self.weight.rows().into_iter();
        rows.zip(&self.bias)
            .map(|(row, &bias)| {
                // Added in the order of the features, unlike in a product of
                // `ndarray`.
                let products = row
                    .iter()
                    .zip(features)
                    .map(|(&w, &x)| f64::from(w) * f64::from(x));
                #[expect(clippy::cast_possible_truncation, reason = "rounded once to f32")]
                {
                    (products.sum::<f64>() + f64::from(bias)) as f32
                }
            })
            .collect()
    }
}

fn read(name: &str, file: &Path) -> Result<LinearHead, String> {
    let bytes = files::read(file, FILE_BYTES_MAX)
        .map_err(|error| error.to_string())?
        .map_err(|trouble| trouble.to_string())?
        .ok_or_else(|| format!("the file has over {FILE_BYTES_MAX} bytes, the limit of a head"))?;
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
    let tensors = SafeTensors::deserialize(&bytes).map_err(not_safetensors)?;
    let (_, header) = SafeTensors::read_metadata(&bytes).map_err(not_safetensors)?;
    let metadata = header.metadata().clone().unwrap_or_default();
    let entry = |key: &str| {
        let value = metadata.get(key).map(String::as_str);
        value.ok_or_else(|| format!("the metadata has no {key}"))
    };
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
            "bias has the shape {:?} and weight {:?}; they must be (classes) and (classes, width)",
            bias.shape(),
            weight.shape()
        ));
    }
    let labels: Vec<String> = serde_json::from_str(entry("labels")?)
        .map_err(|error| format!("labels are not a JSON array of names: {error}"))?;
    if labels.len() != n_classes {
        return Err(format!(
            "labels has {} names; weight has {n_classes} classes",
            labels.len()
        ));
    }
    let layer = entry("layer")?;
    Ok(LinearHead {
        name: name.to_owned(),
        file: file.to_owned(),
        labels,
        activation: ClassActivation::of(metadata.get("problem_type").map(String::as_str))?,
        layer: layer
            .parse()
            .map_err(|_| format!("layer is {layer:?}; it must be a whole number"))?,
        norm: match entry("norm")? {
            "PRE_ATTN_RMS" => Norm::PreAttnRms,
            "NONE" => Norm::None,
            other => {
                return Err(format!(
                    "norm is {other:?}; it must be PRE_ATTN_RMS or NONE"
                ));
            }
        },
        context: match entry("context")? {
            "RAW" => Context::Raw,
            "SOS_SHIFTED" => Context::SosShifted,
            other => {
                return Err(format!(
                    "context is {other:?}; it must be RAW or SOS_SHIFTED"
                ));
            }
        },
        width,
        weight: Array2::from_shape_vec((n_classes, width), f32s("weight", &weight)?)
            .map_err(|error| format!("weight: {error}"))?,
        bias: f32s("bias", &bias)?,
    })
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
mod tests {
    use std::collections::HashMap;

    use super::*;

    /// Writes a head of 2 classes over 3 numbers, changed by `change`.
    fn head(
        change: impl FnOnce(&mut HashMap<String, String>, &mut Vec<usize>),
    ) -> Result<LinearHead, String> {
        let mut metadata: HashMap<String, String> = [
            ("labels", "[\"cat\", \"dog\"]"),
            ("layer", "4"),
            ("norm", "NONE"),
            ("context", "SOS_SHIFTED"),
        ]
        .map(|(key, value)| (key.to_owned(), value.to_owned()))
        .into();
        let mut shape = vec![2, 3];
        change(&mut metadata, &mut shape);
        let bytes = |values: &[f32]| {
            values
                .iter()
                .flat_map(|v| v.to_le_bytes())
                .collect::<Vec<u8>>()
        };
        let weight = bytes(&[1.0, 0.0, 2.0, 0.0, -1.0, 0.5]);
        let bias = bytes(&[0.25, -0.25]);
        let tensors = [
            (
                "weight",
                TensorView::new(Dtype::F32, shape, &weight).unwrap(),
            ),
            ("bias", TensorView::new(Dtype::F32, vec![2], &bias).unwrap()),
        ];
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("head.safetensors");
        std::fs::write(
            &file,
            safetensors::serialize(tensors, Some(metadata)).unwrap(),
        )
        .unwrap();
        LinearHead::open(&HeadFlag {
            name: "pets".to_owned(),
            file,
        })
        .map_err(|error| error.to_string())
    }

    #[test]
    fn a_head_is_a_product_plus_a_bias() {
        let head = head(|_, _| {}).unwrap();
        assert_eq!(
            (head.layer, head.norm, head.context),
            (4, Norm::None, Context::SosShifted)
        );
        assert_eq!(head.labels, ["cat", "dog"]);
        assert_eq!(
            head.logits(&[1.0, 2.0, 4.0]).map_bits(),
            [9.25_f32, -0.25].map_bits()
        );
    }

    trait MapBits {
        fn map_bits(&self) -> Vec<u32>;
    }

    impl<T: AsRef<[f32]>> MapBits for T {
        fn map_bits(&self) -> Vec<u32> {
            self.as_ref().iter().map(|value| value.to_bits()).collect()
        }
    }

    #[test]
    fn what_is_not_a_head_is_named() {
        let check = |key: &'static str, value: &'static str, words: &str| {
            let error = head(|metadata, _| {
                metadata.insert(key.to_owned(), value.to_owned());
            })
            .unwrap_err();
            assert!(
                error.contains("--head pets=") && error.contains(words),
                "{error}"
            );
        };
        check("labels", "[\"cat\"]", "1 names; weight has 2 classes");
        check("labels", "cat", "labels are not a JSON array");
        check("layer", "last", "layer is \"last\"");
        check("norm", "L2", "norm is \"L2\"");
        check("context", "", "context is \"\"");
        check(
            "problem_type",
            "regression",
            "problem_type is \"regression\"",
        );
        let error = head(|metadata, _| drop(metadata.remove("norm"))).unwrap_err();
        assert!(error.contains("the metadata has no norm"), "{error}");
        let error = head(|_, shape| *shape = vec![3, 2]).unwrap_err();
        assert!(error.contains("bias has the shape [2]"), "{error}");
    }

    #[test]
    fn flags_are_name_and_file() {
        let flag: HeadFlag = "a=b/c=d".parse().unwrap();
        assert_eq!(
            (flag.name.as_str(), flag.file),
            ("a", PathBuf::from("b/c=d"))
        );
        for text in ["", "a", "=b", "a="] {
            assert!(text.parse::<HeadFlag>().is_err(), "{text:?}");
        }
    }
}
