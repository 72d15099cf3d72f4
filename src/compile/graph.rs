//! Builds the graphs of all tasks, which share one backbone and its weights.
//!
//! On a CPU all layers are one operator, the worker's own. On a GPU, and without
//! that operator, activations between layers are rows, `(batch * sequence,
//! width)`, so that a dense product is one `Gemm` that also adds the bias, and
//! on a CPU the residual; RMS norm, quick-gelu and attention are written as
//! fused operators, ONNX Runtime's or the worker's own, not as patterns that an
//! optimizer might fuse. Batch and sequence are open dimensions: one file serves any batch.

mod backbone;
mod builder;
mod tasks;

use half::bf16;

use super::store::Store;
use crate::kernels::attention::{Int24, Kept as _};
use crate::model::architecture::Architecture;
use crate::model::graph::Graph;
use crate::model::onnx::{DataType, ModelProto};
use crate::model::precision::{Precision, Provider};

/// The operator that computes causal attention, alone or with the rest of the
/// layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attention {
    /// `com.microsoft.MultiHeadAttention`, which every execution provider has.
    MultiHead,
    /// `com.microsoft.GroupQueryAttention`, which has a key/value cache.
    GroupQuery,
    /// `imagegpt.ImageLayers`, the worker's own kernel for whole images on the
    /// CPU, which computes all layers.
    ImageLayers,
    /// `imagegpt.Layers`, the worker's own kernel for steps of generation on
    /// the CPU, which computes all layers.
    Layers,
}

impl Attention {
    /// Returns the operator's name, as in profiles.
    #[must_use]
    pub(crate) fn operator(self) -> &'static str {
        match self {
            Self::MultiHead => "MultiHeadAttention",
            Self::GroupQuery => "GroupQueryAttention",
            Self::ImageLayers => "ImageLayers",
            Self::Layers => "Layers",
        }
    }
}

/// Everything that the content of a graph depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GraphPlan<'a> {
    pub architecture: &'a Architecture,
    pub store: &'a Store,
    pub precision: Precision,
    pub provider: Provider,
    pub attention: Attention,
    /// True if graphs may contain the worker's own operators.
    pub has_ours: bool,
    /// Last layer of `embed`.
    pub feature_layer: usize,
}

impl GraphPlan<'_> {
    /// Returns the data type of the key/value cache, and the number of its
    /// elements per position and head, for keys and for values each.
    #[must_use]
    pub(crate) fn cache_position(&self) -> (DataType, usize) {
        let head_dim = self.architecture.head_dim();
        match (self.attention, self.precision) {
            // bfloat16 has 8 bits of mantissa, which suits weights of as many.
            (Attention::Layers, Precision::Int8 | Precision::Bf16) => {
                (DataType::Bfloat16, bf16::position_len(head_dim))
            }
            (Attention::Layers, _) => (DataType::Uint8, Int24::position_len(head_dim)),
            _ => (self.activation(), head_dim),
        }
    }

    /// Returns the data type of activations between operators.
    #[must_use]
    pub(crate) fn activation(&self) -> DataType {
        self.precision.activation(self.provider)
    }

    /// Returns true if queries, keys and values are separate products in graphs
    /// of whole images. On a GPU this is less work than to split one product; a
    /// step of generation, whose time is mostly kernel launches, has one
    /// product.
    #[must_use]
    pub(crate) fn is_apart(&self) -> bool {
        self.provider == Provider::Cuda
    }

    /// Returns the outputs and inputs of a layer's product, by the name of its
    /// weight.
    fn product(&self, name: &str) -> [usize; 2] {
        let (width, inner) = (self.architecture.width, self.architecture.inner_width);
        match name.rsplit('.').next() {
            Some("qkv") => [3 * width, width],
            Some("expand") => [inner, width],
            Some("contract") => [width, inner],
            _ => [width, width],
        }
    }
}

/// Builds a graph.
#[must_use]
pub(crate) fn build(graph: Graph, plan: &GraphPlan<'_>) -> ModelProto {
    match graph {
        Graph::Features(norm) => tasks::embed(plan, norm),
        Graph::Hidden => tasks::hidden(plan),
        Graph::Logits => tasks::classify(plan),
        Graph::Score => tasks::score(plan),
        Graph::Generate => tasks::generate(plan),
    }
}

#[cfg(test)]
mod tests;
