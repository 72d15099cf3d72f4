//! Constant inputs of the operators that compute whole layers.
//!
//! Each layer has the same fourteen, in this order:
//!
//! | | |
//! |---|---|
//! | 0 | the norm before attention, f32, `(width)` |
//! | 1, 2, 3 | queries, keys and values: weights, f32, bf16 or i8, `(width, 3 * width)`; scales, f32, `(3 * width)`; bias, f32, `(3 * width)` |
//! | 4, 5, 6 | the projection: the same with `(width, width)` |
//! | 7 | the norm before the feed-forward part, f32, `(width)` |
//! | 8, 9, 10 | the expansion: the same with `(width, inner)` |
//! | 11, 12, 13 | the contraction: the same with `(inner, width)` |
//!
//! An empty tensor stands for no scales or no bias. The attributes:
//!
//! | | |
//! |---|---|
//! | `num_heads` | int |
//! | `scale` | floats: factor of the attention scores of each layer |
//! | `epsilon` | float, of the norms |
//! | `activation` | string: `quick_gelu`, `gelu`, `gelu_new` or `relu` |

use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use ort::operator::KernelContext;
use ort::value::{DynTensorRef, DynTensorValueType, PrimitiveTensorElementType, TensorElementType};

use crate::kernels::layers::{Activation, DenseWeights, LayerWeights, Sizes, Weight};
use crate::runtime::load::INLINE_BYTES_MAX;

/// Number of constant inputs per layer.
pub(super) const CONSTANTS: usize = 14;

/// Places of the weights among a layer's constants.
const WEIGHTS: [usize; 4] = [1, 4, 8, 11];

/// Constant inputs and attributes of a node.
pub(super) struct Constants<'ctx> {
    layers: Vec<Vec<DynTensorRef<'ctx>>>,
    attention_scales: Vec<f32>,
    pub(super) sizes: Sizes,
}

impl<'ctx> Constants<'ctx> {
    /// Reads the constants of a node whose first `first` inputs belong to no
    /// layer, and whose layers have `others` inputs before their constants.
    pub(super) fn of(
        context: &KernelContext<'ctx>,
        first: usize,
        others: usize,
    ) -> ort::Result<Self> {
        let per_layer = others + CONSTANTS;
        let n_inputs = context.inputs()?.len();
        let n_layers = n_inputs.saturating_sub(first) / per_layer;
        if n_layers == 0 || first + n_layers * per_layer != n_inputs {
            return Err(ort::Error::new(format!(
                "there are {n_inputs} inputs; there must be {first}, and {per_layer} per layer"
            )));
        }
        let constants = |layer: usize| {
            let first = first + layer * per_layer + others;
            (first..first + CONSTANTS)
                .map(|idx| context.constant_input::<DynTensorValueType>(idx))
                .collect::<ort::Result<Vec<_>>>()
        };
        let layers = (0..n_layers)
            .map(constants)
            .collect::<ort::Result<Vec<_>>>()?;
        let missing = |name: &str| ort::Error::new(format!("the attribute {name} is missing"));
        let attention_scales: Vec<f32> = context.get("scale").ok_or_else(|| missing("scale"))?;
        if attention_scales.len() != n_layers {
            return Err(ort::Error::new(format!(
                "{} scales for {n_layers} layers",
                attention_scales.len()
            )));
        }
        let activation: String = context
            .get("activation")
            .ok_or_else(|| missing("activation"))?;
        let activation = Activation::named(&activation)
            .ok_or_else(|| ort::Error::new(format!("there is no activation {activation:?}")))?;
        let heads = context
            .get::<i64>("num_heads")
            .and_then(|heads| usize::try_from(heads).ok())
            .filter(|heads| *heads > 0)
            .ok_or_else(|| ort::Error::new("the attribute num_heads must be at least 1"))?;
        // Packing checks that all layers have the sizes of the first one.
        let len = |idx: usize| layers[0][idx].shape().num_elements();
        let width = len(0);
        let sizes = Sizes {
            width,
            inner_width: len(11) / width.max(1),
            heads,
            epsilon: context.get("epsilon").ok_or_else(|| missing("epsilon"))?,
            activation,
        };
        Ok(Self {
            layers,
            attention_scales,
            sizes,
        })
    }

    /// Returns the type of the weights.
    pub(super) fn weights_type(&self) -> TensorElementType {
        *self.layers[0][WEIGHTS[0]].data_type()
    }

    pub(super) fn n_layers(&self) -> usize {
        self.layers.len()
    }

    /// Returns the weights of a layer, which have the type `W`.
    pub(super) fn layer<W: Weight + PrimitiveTensorElementType>(
        &self,
        layer: usize,
    ) -> ort::Result<LayerWeights<'_, W>> {
        let constants = &self.layers[layer];
        for constant in constants {
            // Weights may be at any offset in their file, but numbers must be
            // aligned to be read.
            if !constant.data_ptr().addr().is_multiple_of(align_of::<f32>()) {
                return Err(ort::Error::new("weights are not aligned to 4 bytes"));
            }
        }
        let floats =
            |idx: usize| Ok::<_, ort::Error>(constants[idx].try_extract_tensor::<f32>()?.1);
        let some = |idx: usize| {
            Ok::<_, ort::Error>(Some(floats(idx)?).filter(|floats| !floats.is_empty()))
        };
        let dense = |idx: usize| {
            Ok::<_, ort::Error>(DenseWeights {
                weights: constants[idx].try_extract_tensor::<W>()?.1,
                scales: some(idx + 1)?,
                bias: some(idx + 2)?,
            })
        };
        let [qkv, projection, expand, contract] = WEIGHTS;
        Ok(LayerWeights {
            attention_norm: floats(0)?,
            attention_scale: self.attention_scales[layer],
            qkv: dense(qkv)?,
            projection: dense(projection)?,
            inner_norm: floats(7)?,
            expand: dense(expand)?,
            contract: dense(contract)?,
        })
    }

    /// Returns a number that two layers have in common only if they have the
    /// same weights: sessions that share memory have large weights at the same
    /// address, and copies of small ones.
    pub(super) fn identity<W: Weight + PrimitiveTensorElementType + bytemuck::Pod>(
        &self,
        layer: usize,
    ) -> ort::Result<u64> {
        let weights = self.layer::<W>(layer)?;
        let mut identity = DefaultHasher::new();
        weights.attention_scale.to_bits().hash(&mut identity);
        let mut floats = |floats: &[f32]| {
            floats.len().hash(&mut identity);
            identity.write(bytemuck::cast_slice(floats));
        };
        floats(weights.attention_norm);
        floats(weights.inner_norm);
        let products = [
            weights.qkv,
            weights.projection,
            weights.expand,
            weights.contract,
        ];
        for dense in products {
            floats(dense.scales.unwrap_or_default());
            floats(dense.bias.unwrap_or_default());
        }
        for dense in products {
            dense.weights.len().hash(&mut identity);
            // A tensor within the graph is copied by each session.
            if size_of_val(dense.weights) as u64 <= INLINE_BYTES_MAX {
                identity.write(bytemuck::cast_slice(dense.weights));
            } else {
                dense.weights.as_ptr().addr().hash(&mut identity);
            }
        }
        Ok(identity.finish())
    }
}
