//! ImageGPT's weights by their place in the model.
//!
//! Checkpoints of the whole model prefix names by `transformer.`, those of
//! the backbone alone do not. Dense weights lie `(in, out)`, heads
//! `(out, in)`. Biases are there in the published checkpoints but all zero,
//! and then graphs do without them. What else a file holds (causal masks) is
//! ignored.

use super::checkpoint::Checkpoint;
use super::error::CompileError;
use crate::model::architecture::Architecture;

/// A checkpoint, and the architecture that its shapes must fit.
#[derive(Debug)]
pub(crate) struct CheckpointWeights<'c> {
    checkpoint: &'c Checkpoint,
    pub architecture: Architecture,
    prefix: &'static str,
    /// Rows of the classification head, if the checkpoint has one.
    pub n_classes: Option<usize>,
    /// Whether there is a language head, which scoring and generating need.
    pub has_language_head: bool,
}

/// `y = x W + b`, with `W` as `(inputs, outputs)`.
#[derive(Debug, Clone)]
pub(crate) struct Dense {
    pub weight: Vec<f32>,
    /// `None` if it is all zero.
    pub bias: Option<Vec<f32>>,
    pub inputs: usize,
    pub outputs: usize,
}

/// The weights of one layer.
#[derive(Debug, Clone)]
pub(crate) struct CheckpointLayer {
    pub attention_norm: Vec<f32>,
    /// Queries, keys and values side by side.
    pub qkv: Dense,
    pub projection: Dense,
    pub inner_norm: Vec<f32>,
    pub expand: Dense,
    pub contract: Dense,
}

impl<'c> CheckpointWeights<'c> {
    /// Finds the names and looks at the heads; tensors are read later.
    #[must_use]
    pub(crate) fn new(checkpoint: &'c Checkpoint, architecture: Architecture) -> Self {
        let prefix = if checkpoint.shape("transformer.wte.weight").is_some() {
            "transformer."
        } else {
            ""
        };
        let n_classes = checkpoint
            .shape("score.weight")
            .and_then(|shape| shape.first().copied());
        Self {
            n_classes,
            has_language_head: checkpoint.shape("lm_head.weight").is_some(),
            checkpoint,
            architecture,
            prefix,
        }
    }

    /// The embedding of tokens, `(vocabulary, width)`.
    ///
    /// # Errors
    ///
    /// These and all below fail when the tensor is not there or does not fit.
    pub(crate) fn token_embedding(&self) -> Result<Vec<f32>, CompileError> {
        let shape = [self.architecture.vocabulary, self.architecture.width];
        self.backbone("wte.weight", &shape)
    }

    /// The embedding of positions, `(positions, width)`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn position_embedding(&self) -> Result<Vec<f32>, CompileError> {
        let shape = [self.architecture.n_positions, self.architecture.width];
        self.backbone("wpe.weight", &shape)
    }

    /// The norm in front of layer `idx`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn attention_norm(&self, idx: usize) -> Result<Vec<f32>, CompileError> {
        self.backbone(&format!("h.{idx}.ln_1.weight"), &[self.architecture.width])
    }

    /// The norm after the last layer.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn final_norm(&self) -> Result<Vec<f32>, CompileError> {
        self.backbone("ln_f.weight", &[self.architecture.width])
    }

    /// All of layer `idx`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn layer(&self, idx: usize) -> Result<CheckpointLayer, CompileError> {
        let (width, inner) = (self.architecture.width, self.architecture.inner_width);
        let name = |part: &str| format!("h.{idx}.{part}");
        Ok(CheckpointLayer {
            attention_norm: self.attention_norm(idx)?,
            qkv: self.dense(&name("attn.c_attn"), width, 3 * width)?,
            projection: self.dense(&name("attn.c_proj"), width, width)?,
            inner_norm: self.backbone(&name("ln_2.weight"), &[width])?,
            expand: self.dense(&name("mlp.c_fc"), width, inner)?,
            contract: self.dense(&name("mlp.c_proj"), inner, width)?,
        })
    }

    /// The language head, `(colors, width)`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn language_head(&self) -> Result<Vec<f32>, CompileError> {
        let shape = [self.architecture.n_colors(), self.architecture.width];
        self.checkpoint.read("lm_head.weight", &shape)
    }

    /// The classification head, `(classes, width)`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn classification_head(&self) -> Result<Vec<f32>, CompileError> {
        let shape = [self.n_classes.unwrap_or_default(), self.architecture.width];
        self.checkpoint.read("score.weight", &shape)
    }

    /// Parameters of the backbone, and those with all heads.
    #[must_use]
    pub(crate) fn n_parameters(&self) -> (u64, u64) {
        let shape = &self.architecture;
        let width = shape.width;
        let embeddings = (shape.vocabulary + shape.n_positions) * width;
        let backbone = shape.n_layers * shape.layer_parameters() + embeddings + width;
        let language = usize::from(self.has_language_head) * shape.n_colors() * width;
        let classes = self.n_classes.unwrap_or_default() * width;
        (backbone as u64, (backbone + language + classes) as u64)
    }

    fn backbone(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, CompileError> {
        self.checkpoint
            .read(&format!("{}{name}", self.prefix), shape)
    }

    fn dense(&self, name: &str, inputs: usize, outputs: usize) -> Result<Dense, CompileError> {
        let bias = self.backbone(&format!("{name}.bias"), &[outputs])?;
        Ok(Dense {
            weight: self.backbone(&format!("{name}.weight"), &[inputs, outputs])?,
            bias: bias.iter().any(|value| *value != 0.0).then_some(bias),
            inputs,
            outputs,
        })
    }
}
