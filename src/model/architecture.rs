//! `config.json` as the architecture that graphs are made for.
//!
//! Every setting that changes the computation is either supported or refused by
//! name; none is ignored silently.

use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::files;
use crate::kernels::layers::Activation;
use crate::model::error::ModelFileError;

/// Name of the configuration file.
pub(crate) const FILE: &str = "config.json";

/// Settings of ImageGPT's configuration that the computation depends on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Architecture {
    pub n_layers: usize,
    pub width: usize,
    pub n_heads: usize,
    /// Width of the feed-forward part.
    pub inner_width: usize,
    pub n_positions: usize,
    /// Number of token ids, the start token included; the language head has one
    /// output fewer.
    pub vocabulary: usize,
    pub epsilon: f32,
    pub activation: Activation,
    /// True if attention scores are divided by the square root of the head
    /// dimension.
    pub scale_attention: bool,
    /// True if attention scores are divided by the layer's number (from 1) as
    /// well.
    pub scale_attention_by_layer: bool,
}

impl Architecture {
    /// Reads `config.json` in `folder`.
    ///
    /// # Errors
    ///
    /// When the file is missing, is not ImageGPT's, or has a setting that is
    /// not supported.
    pub fn read(folder: &Path) -> Result<Self, ModelFileError> {
        let path = folder.join(FILE);
        let text = read(&path)?;
        let value = files::json(&text)
            .map_err(|error| ModelFileError::content(&path, format!("is not JSON: {error}")))?;
        Self::parse(&value).map_err(|reason| ModelFileError::content(&path, reason))
    }

    fn parse(value: &Value) -> Result<Self, String> {
        let fields = value.as_object().ok_or("is not a JSON object")?;
        match fields.get("model_type").and_then(Value::as_str) {
            Some("imagegpt") => {}
            Some(other) => {
                return Err(format!(
                    "has model_type {other:?}; only \"imagegpt\" is supported"
                ));
            }
            None => return Err("has no model_type; it must be \"imagegpt\"".to_owned()),
        }
        refuse(fields, "add_cross_attention", "cross-attention")?;
        refuse(
            fields,
            "reorder_and_upcast_attn",
            "reordered and upcast attention",
        )?;
        refuse(
            fields,
            "tie_word_embeddings",
            "a language head tied to the embedding",
        )?;
        refuse(fields, "is_encoder_decoder", "an encoder")?;
        let width = number(fields, "n_embd", 512)?;
        let architecture = Self {
            n_layers: number(fields, "n_layer", 24)?,
            width,
            n_heads: number(fields, "n_head", 8)?,
            inner_width: number(fields, "n_inner", 4 * width)?,
            n_positions: number(fields, "n_positions", 32 * 32)?,
            vocabulary: number(fields, "vocab_size", 512 + 1)?,
            epsilon: epsilon(fields)?,
            activation: activation(fields)?,
            scale_attention: flag(fields, "scale_attn_weights", true)?,
            scale_attention_by_layer: flag(fields, "scale_attn_by_inverse_layer_idx", false)?,
        };
        if !architecture.width.is_multiple_of(architecture.n_heads) {
            return Err(format!(
                "has n_embd {} and n_head {}; n_embd must be a multiple of n_head",
                architecture.width, architecture.n_heads
            ));
        }
        if architecture.vocabulary < 2 {
            return Err(
                "has vocab_size 1; it must be at least 2, for one color and the start token"
                    .to_owned(),
            );
        }
        Ok(architecture)
    }

    /// Returns the width of one attention head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.width / self.n_heads
    }

    /// Returns the number of colors of the palette, which is the language
    /// head's number of outputs.
    #[must_use]
    pub fn n_colors(&self) -> usize {
        self.vocabulary - 1
    }

    /// Returns the number of parameters of one layer.
    #[must_use]
    pub fn layer_parameters(&self) -> usize {
        let (width, inner) = (self.width, self.inner_width);
        let attention = (width + 1) * 3 * width + (width + 1) * width;
        let feed_forward = (width + 1) * inner + (inner + 1) * width;
        attention + feed_forward + 2 * width
    }

    /// Returns the factor of the attention scores of `layer`.
    #[must_use]
    #[expect(clippy::cast_precision_loss, reason = "both counts are small")]
    pub fn attention_scale(&self, layer: usize) -> f64 {
        let mut scale = 1.0;
        if self.scale_attention {
            scale /= (self.head_dim() as f64).sqrt();
        }
        if self.scale_attention_by_layer {
            scale /= (layer + 1) as f64;
        }
        scale
    }

    /// Returns the layer whose features are best for linear probes: the one at
    /// two thirds of the depth.
    #[must_use]
    pub fn default_feature_layer(&self) -> usize {
        (2 * self.n_layers).div_ceil(3)
    }

    /// Returns the multiplications and additions of one image in the first
    /// `n_layers` blocks, counting only the causal half of attention.
    #[must_use]
    pub fn flop(&self, n_layers: usize, n_positions: usize) -> u64 {
        let products = 4 * self.width * self.width + 2 * self.width * self.inner_width;
        let scores = self.width * (n_positions + 1);
        (2 * n_layers * n_positions * (products + scores)) as u64
    }
}

/// Largest size of a configuration file, in bytes. Configurations take some
/// kilobytes, palette included, and an index of weights 100 KB; a byte takes up
/// to 32 bytes of memory once it is parsed.
pub(crate) const BYTES_MAX: u64 = 4 << 20;

/// Reads a configuration file.
///
/// # Errors
///
/// When the file cannot be read or is larger than [`BYTES_MAX`].
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, ModelFileError> {
    let bytes = files::read(path, BYTES_MAX).map_err(|error| ModelFileError::read(path, &error))?;
    match bytes {
        Ok(Some(bytes)) => Ok(bytes),
        Ok(None) => Err(ModelFileError::content(
            path,
            format!("has over {BYTES_MAX} bytes, the limit of a configuration"),
        )),
        Err(trouble) => Err(ModelFileError::Read {
            path: path.to_owned(),
            reason: trouble.to_string(),
        }),
    }
}

fn refuse(fields: &Map<String, Value>, name: &str, what: &str) -> Result<(), String> {
    if flag(fields, name, false)? {
        return Err(format!("sets {name}; {what} is not supported"));
    }
    Ok(())
}

fn flag(fields: &Map<String, Value>, name: &str, default: bool) -> Result<bool, String> {
    match fields.get(name) {
        None | Some(Value::Null) => Ok(default),
        Some(Value::Bool(value)) => Ok(*value),
        Some(other) => Err(format!("has {name} {other}; it must be true or false")),
    }
}

fn number(fields: &Map<String, Value>, name: &str, default: usize) -> Result<usize, String> {
    // Larger than in any model, and small enough that products do not overflow.
    const MAX: usize = 1 << 20;
    let value = match fields.get(name) {
        None | Some(Value::Null) => default,
        Some(other) => other
            .as_u64()
            .and_then(|value| usize::try_from(value).ok())
            .ok_or_else(|| format!("has {name} {other}; it must be a whole number"))?,
    };
    if (1..=MAX).contains(&value) {
        Ok(value)
    } else {
        Err(format!("has {name} {value}; it must be 1 to {MAX}"))
    }
}

fn epsilon(fields: &Map<String, Value>) -> Result<f32, String> {
    let value = match fields.get("layer_norm_epsilon") {
        None | Some(Value::Null) => 1e-5,
        Some(other) => other
            .as_f64()
            .filter(|value| *value >= 0.0 && *value < 1.0)
            .ok_or_else(|| {
                format!("has layer_norm_epsilon {other}; it must be at least 0 and less than 1")
            })?,
    };
    #[expect(clippy::cast_possible_truncation, reason = "ONNX attributes are f32")]
    Ok(value as f32)
}

fn activation(fields: &Map<String, Value>) -> Result<Activation, String> {
    match fields.get("activation_function").map(Value::as_str) {
        None => Ok(Activation::QuickGelu),
        // Another name of the same function.
        Some(Some("gelu_pytorch_tanh")) => Ok(Activation::GeluNew),
        Some(Some(name)) if let Some(activation) = Activation::named(name) => Ok(activation),
        Some(other) => Err(format!(
            "has activation_function {:?}; quick_gelu, gelu, gelu_new and relu are supported",
            other.unwrap_or_default()
        )),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[track_caller]
    fn refused(config: &Value, word: &str) {
        let reason = Architecture::parse(config).unwrap_err();
        assert!(reason.contains(word), "{reason}");
    }

    #[test]
    fn an_empty_config_is_imagegpt_small() {
        let small = Architecture::parse(&json!({"model_type": "imagegpt"})).unwrap();
        assert_eq!((small.n_layers, small.width, small.n_heads), (24, 512, 8));
        assert_eq!((small.inner_width, small.n_colors()), (2048, 512));
        assert_eq!(small.default_feature_layer(), 16);
        assert!((small.attention_scale(3) - 0.125).abs() < 1e-12);
    }

    #[test]
    fn what_is_not_supported_is_refused_by_name() {
        refused(&json!({"model_type": "gpt2"}), "gpt2");
        refused(&json!({}), "model_type");
        refused(&json!([]), "object");
        let with = |name: &str, value: Value| json!({"model_type": "imagegpt", name: value});
        refused(
            &with("add_cross_attention", json!(true)),
            "add_cross_attention",
        );
        refused(
            &with("reorder_and_upcast_attn", json!(true)),
            "reorder_and_upcast_attn",
        );
        refused(
            &with("tie_word_embeddings", json!(true)),
            "tie_word_embeddings",
        );
        refused(&with("activation_function", json!("mish")), "mish");
        refused(
            &with("activation_function", json!(7)),
            "activation_function",
        );
        refused(&with("n_head", json!(7)), "n_head");
        refused(&with("n_layer", json!(0)), "n_layer");
        refused(&with("n_embd", json!(-1)), "n_embd");
        refused(
            &with("layer_norm_epsilon", json!("small")),
            "layer_norm_epsilon",
        );
    }

    #[test]
    fn layers_can_scale_their_scores() {
        let config = json!({"model_type": "imagegpt", "scale_attn_by_inverse_layer_idx": true});
        let scale = Architecture::parse(&config).unwrap().attention_scale(3);
        assert!((scale - 0.125 / 4.0).abs() < 1e-12);
    }
}
