//! Floating-point operations per image, counted from the architecture.
//!
//! A multiplication and an addition count as two operations. The count includes
//! the matrix products of each layer that a graph runs, `2 T (4 d² + 2 d m)`
//! for `T` tokens, a width of `d` and an inner width of `m`; the causal half of
//! attention, `2 d T (T + 1)` per layer; and the head, `2 T d C` for a
//! likelihood over `C` colors or `2 d C` for `C` classes. Norms, activations,
//! softmax and embeddings are left out, since they are less than one percent,
//! and so is everything that a kernel computes of the other half of attention,
//! since no answer uses it.

use std::path::Path;

use super::manifest;
use crate::model::Model;
use crate::model::architecture::Architecture;
use crate::model::graph::Graph;

/// Sizes of a model that determine the work per image.
pub(super) struct ImageWork {
    /// `None` for an export without a config.json of ImageGPT.
    architecture: Option<Architecture>,
    feature_layer: usize,
    n_classes: usize,
}

impl ImageWork {
    pub(super) fn of(folder: &Path, model: &Model) -> Self {
        let manifest = manifest(folder);
        Self {
            n_classes: manifest
                .as_ref()
                .and_then(|manifest| manifest.n_classes)
                .unwrap_or(model.labels.len()),
            feature_layer: manifest
                .as_ref()
                .map_or(0, |manifest| manifest.feature_layer),
            architecture: manifest
                .map(|manifest| manifest.architecture)
                .or_else(|| Architecture::read(folder).ok()),
        }
    }

    /// Multiplications and additions per image, if the architecture is known.
    pub(super) fn flop(&self, graph: Graph) -> Option<u64> {
        let architecture = self.architecture.as_ref()?;
        let (width, n_positions) = (architecture.width, architecture.n_positions);
        let n_layers = match graph {
            Graph::Features(_) => self.feature_layer,
            _ => architecture.n_layers,
        };
        let head = match graph {
            Graph::Score => 2 * n_positions * width * architecture.n_colors(),
            Graph::Logits => 2 * width * self.n_classes,
            Graph::Features(_) | Graph::Hidden | Graph::Generate => 0,
        };
        Some(architecture.flop(n_layers, n_positions) + head as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::compile::random;
    use crate::model::graph::Norm;

    #[test]
    fn imagegpt_small_costs_what_the_arithmetic_says() {
        let local = random::fetch("small").unwrap();
        let work = ImageWork {
            architecture: Some(Architecture::read(&local.folder).unwrap()),
            feature_layer: 16,
            n_classes: 10,
        };
        let (products, attention) = (24 * 2 * 1024 * 3_145_728_u64, 24 * 1024 * 1024 * 1025_u64);
        assert_eq!(work.flop(Graph::Hidden), Some(products + attention));
        let sixteen = (products + attention) / 24 * 16;
        assert_eq!(work.flop(Graph::Features(Norm::None)), Some(sixteen));
        let head = 2 * 1024 * 512 * 512;
        assert_eq!(work.flop(Graph::Score), Some(products + attention + head));
    }
}
