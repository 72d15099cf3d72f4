//! Linear heads: classification by pooled features, without a second run of the
//! model.
//!
//! `file.rs` has the format of their files. A head says which features it was
//! trained on; a head for another model, or for features that the model does not
//! have, is refused before the worker is ready.

mod file;

use std::path::PathBuf;
use std::str::FromStr;

use crate::model::Model;
use crate::model::graph::{Graph, ranges};

pub use self::file::HeadFile;

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
    /// [`HeadFile::digest`] of the content.
    pub digest: String,
    pub content: HeadFile,
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
        let content = HeadFile::read(&flag.file).map_err(|reason| HeadError {
            name: flag.name.clone(),
            file: flag.file.clone(),
            reason,
        })?;
        Ok(Self {
            name: flag.name.clone(),
            file: flag.file.clone(),
            digest: content.digest(),
            content,
        })
    }

    /// Checks that the model is the one that the head was trained on, as far as
    /// the head says so, and has the features that the head takes.
    ///
    /// # Errors
    ///
    /// When the head is of another model, or the model does not have these
    /// features.
    pub fn check(&self, model: &Model) -> Result<(), HeadError> {
        let reason = if let Some(digest) = &self.content.weights_digest
            && *digest != model.weights_digest
        {
            format!(
                "the head was trained on the weights {digest}, and the model {} has the weights \
                 {}; give --model the model that the head was trained on, or train the head again",
                model.name, model.weights_digest
            )
        } else if model
            .features(&[self.content.layer], self.content.norm)
            .is_none()
        {
            self.layer_missing(model)
        } else {
            return Ok(());
        };
        Err(HeadError {
            name: self.name.clone(),
            file: self.file.clone(),
            reason,
        })
    }

    /// Says why the model does not have the head's features, and which flag
    /// helps.
    fn layer_missing(&self, model: &Model) -> String {
        let HeadFile { layer, norm, .. } = self.content;
        if let Some(n_layers) = model.n_layers
            && layer > n_layers
        {
            return format!(
                "the head was trained on layer {layer}, and the model {} has {n_layers} layers; \
                 give --model the model that the head was trained on",
                model.name
            );
        }
        let served = model.layers_served(norm);
        let served = match served.as_slice() {
            [] => "no layer".to_owned(),
            [one] => format!("layer {one}"),
            several => format!("layers {}", ranges(several)),
        };
        let remedy = if model.compiled.is_none() {
            format!(
                "the directory is a published export; give --model the checkpoint itself, with \
                 --feature-layer {layer}"
            )
        } else if model.graphs.contains_key(&Graph::Features(norm)) {
            format!(
                "start the worker with --feature-layer {layer}, or compile the directory of \
                 --model again with --feature-layer {layer}"
            )
        } else {
            format!(
                "compile the directory of --model again with --feature-layer {layer} and the task \
                 embed (--tasks)"
            )
        };
        format!(
            "the head was trained on layer {layer}, and the model {} serves pooled features of \
             {served}; {remedy}",
            model.name
        )
    }

    /// Returns the logit of each class.
    #[must_use]
    pub fn logits(&self, features: &[f32]) -> Vec<f32> {
        let rows = self.content.weight.rows().into_iter();
        rows.zip(&self.content.bias)
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

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::Path;

    use ndarray::array;

    use super::*;
    use crate::model::ClassActivation;
    use crate::model::graph::{Context, Norm};

    /// Makes a head of 2 classes over 3 numbers.
    fn head(layer: u32, weights_digest: Option<&str>) -> LinearHead {
        LinearHead {
            name: "pets".to_owned(),
            file: "pets.safetensors".into(),
            digest: String::new(),
            content: HeadFile {
                labels: ["cat", "dog"].map(String::from).into(),
                activation: ClassActivation::Softmax,
                layer,
                norm: Norm::None,
                context: Context::SosShifted,
                fit: None,
                alpha: None,
                weights_digest: weights_digest.map(str::to_owned),
                figures: BTreeMap::new(),
                tool_version: None,
                weight: array![[1.0, 0.0, 2.0], [0.0, -1.0, 0.5]],
                bias: vec![0.25, -0.25],
            },
        }
    }

    #[test]
    fn a_head_is_a_product_plus_a_bias() {
        let logits = head(4, None).logits(&[1.0, 2.0, 4.0]);
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<u32>>();
        assert_eq!(bits(&logits), bits(&[9.25, -0.25]));
    }

    #[test]
    fn a_head_is_for_one_model_and_its_layers() {
        let published = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/models/micro");
        let mut model = Model::open(&published, None).unwrap();
        assert_eq!(model.weights_digest, model.digest, "there is no checkpoint");
        let own = model.weights_digest.clone();
        let other = format!("sha256:{}", "0".repeat(64));
        let check =
            |model: &Model, layer, digest: Option<&str>, expected: Result<(), &[&str]>| match (
                head(layer, digest).check(model),
                expected,
            ) {
                (Ok(()), Ok(())) => {}
                (Err(error), Err(parts)) => {
                    let error = error.to_string();
                    for part in parts
                        .iter()
                        .chain(&["--head pets=pets.safetensors: the head"])
                    {
                        assert!(error.contains(part), "{error}");
                    }
                }
                (got, _) => panic!("{got:?}"),
            };
        check(&model, 2, None, Ok(()));
        check(&model, 2, Some(&own), Ok(()));
        let parts = [
            other.as_str(),
            own.as_str(),
            "give --model the model that the head was trained on",
        ];
        // The wrong model is named, whether or not it has the layer.
        check(&model, 2, Some(&other), Err(&parts));
        check(&model, 1, Some(&other), Err(&parts));
        check(
            &model,
            3,
            None,
            Err(&["trained on layer 3, and the model micro has 2 layers"]),
        );
        let parts = [
            "trained on layer 1, and the model micro serves pooled features of layer 2",
            "give --model the checkpoint itself, with --feature-layer 1",
        ];
        check(&model, 1, Some(&own), Err(&parts));
        model.graphs.clear();
        check(
            &model,
            2,
            None,
            Err(&["serves pooled features of no layer"]),
        );
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
