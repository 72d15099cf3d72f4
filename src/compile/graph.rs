//! The graphs: one for each task, all over the same backbone and weights.
//!
//! Between layers activations lie as rows, `(batch * sequence, width)`, so
//! that a dense product is one `Gemm` that adds its bias as it goes, and on a CPU
//! the residual. RMS norm, quick-gelu and attention are written as fused operators,
//! ONNX Runtime's or the worker's own, not as patterns that an optimizer might fuse.
//! Batch and sequence are open: one file serves any batch.

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

/// The operator that computes causal attention.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Attention {
    /// `com.microsoft.MultiHeadAttention`, which every execution provider has.
    MultiHead,
    /// `imagegpt.CausalAttention`, the worker's own kernel for the CPU.
    Causal,
    /// `com.microsoft.GroupQueryAttention`, which keeps keys and values.
    GroupQuery,
    /// `imagegpt.Layers`, the worker's own kernel for steps on the CPU: not
    /// attention alone, but all that is around it as well.
    Layers,
}

impl Attention {
    /// The operator's name, as profiles show it.
    #[must_use]
    pub(crate) fn operator(self) -> &'static str {
        match self {
            Self::MultiHead => "MultiHeadAttention",
            Self::Causal => "CausalAttention",
            Self::GroupQuery => "GroupQueryAttention",
            Self::Layers => "Layers",
        }
    }
}

/// All that a graph depends on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct GraphPlan<'a> {
    pub architecture: &'a Architecture,
    pub store: &'a Store,
    pub precision: Precision,
    pub provider: Provider,
    pub attention: Attention,
    /// Whether a graph may have the worker's own operators.
    pub has_ours: bool,
    /// Where `embed` ends.
    pub feature_layer: usize,
}

impl GraphPlan<'_> {
    /// What the keys of a position and head are kept in, and its values, and how
    /// many of them.
    #[must_use]
    pub(crate) fn cache_position(&self) -> (DataType, usize) {
        let head_dim = self.architecture.head_dim();
        match (self.attention, self.precision) {
            // It rounds to 8 bits of mantissa, as the weights are.
            (Attention::Layers, Precision::Int8) => {
                (DataType::Bfloat16, bf16::position_len(head_dim))
            }
            (Attention::Layers, _) => (DataType::Uint8, Int24::position_len(head_dim)),
            _ => (self.precision.activation(), head_dim),
        }
    }

    /// Whether queries, keys and values are products of their own where whole
    /// images are attended to. On a GPU that is less work than to cut one product
    /// apart; a step, which is launches more than work, takes it in one.
    #[must_use]
    pub(crate) fn is_apart(&self) -> bool {
        self.provider == Provider::Cuda
    }

    /// Outputs and inputs of a layer's product by the name of its weight.
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
