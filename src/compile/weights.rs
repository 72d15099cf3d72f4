//! ImageGPT's weights by their place in the model.
//!
//! Checkpoints of the whole model prefix names with `transformer.`, those of
//! the backbone alone do not. Dense weights have the shape `(in, out)`, heads
//! `(out, in)`. The biases of the published checkpoints are all zero, and
//! graphs leave such biases out. Other tensors of a file (causal masks) are
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
    /// True if the checkpoint has a language head, which scoring and generation
    /// need.
    pub has_language_head: bool,
}

/// `y = x W + b`, with `W` as `(inputs, outputs)`.
#[derive(Debug, Clone)]
pub(crate) struct Dense {
    pub weight: Vec<f32>,
    /// Bias of each output; `None` if all are zero.
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
    /// Finds the prefix of names and the heads; tensors are read later.
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

    /// Reads the embedding of tokens, `(vocabulary, width)`.
    ///
    /// # Errors
    ///
    /// When the tensor is missing, cannot be read or has another shape; so do
    /// all methods below.
    pub(crate) fn token_embedding(&self) -> Result<Vec<f32>, CompileError> {
        let shape = [self.architecture.vocabulary, self.architecture.width];
        self.backbone("wte.weight", &shape)
    }

    /// Reads the embedding of positions, `(positions, width)`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn position_embedding(&self) -> Result<Vec<f32>, CompileError> {
        let shape = [self.architecture.n_positions, self.architecture.width];
        self.backbone("wpe.weight", &shape)
    }

    /// Reads the norm in front of layer `idx`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn attention_norm(&self, idx: usize) -> Result<Vec<f32>, CompileError> {
        self.backbone(&format!("h.{idx}.ln_1.weight"), &[self.architecture.width])
    }

    /// Reads the norm after the last layer.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn final_norm(&self) -> Result<Vec<f32>, CompileError> {
        self.backbone("ln_f.weight", &[self.architecture.width])
    }

    /// Reads all weights of layer `idx`.
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

    /// Reads the language head, `(colors, width)`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn language_head(&self) -> Result<Vec<f32>, CompileError> {
        let shape = [self.architecture.n_colors(), self.architecture.width];
        self.checkpoint.read("lm_head.weight", &shape)
    }

    /// Reads the classification head, `(classes, width)`.
    ///
    /// # Errors
    ///
    /// See [`CheckpointWeights::token_embedding`].
    pub(crate) fn classification_head(&self) -> Result<Vec<f32>, CompileError> {
        let shape = [self.n_classes.unwrap_or_default(), self.architecture.width];
        self.checkpoint.read("score.weight", &shape)
    }

    /// Returns the number of parameters of the backbone, and with all heads.
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
