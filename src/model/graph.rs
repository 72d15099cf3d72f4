//! The graphs that a model may have, and the numbers that callers want of them.

use super::precision::CompileTask;
use crate::model::architecture::Architecture;
use crate::proto::pb;

/// Name of the input of `generate` that describes shared prefixes of sequences.
pub const PREFIXES: &str = "prefixes";

/// Activations of a layer that are pooled into features.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Norm {
    /// The paper's features: the residual stream after the norm in front of the
    /// next layer's attention.
    PreAttnRms,
    /// The residual stream itself; for the last layer, the output of `ln_f`, as
    /// in transformers' `hidden_states`.
    None,
}

/// Tokens of an image that the model is given.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Context {
    /// The image's tokens as they are.
    Raw,
    /// The start token first and the last pixel dropped, as in pre-training.
    SosShifted,
}

impl From<Norm> for pb::Norm {
    fn from(norm: Norm) -> Self {
        match norm {
            Norm::PreAttnRms => Self::PreAttnRms,
            Norm::None => Self::None,
        }
    }
}

impl From<Context> for pb::Context {
    fn from(context: Context) -> Self {
        match context {
            Context::Raw => Self::Raw,
            Context::SosShifted => Self::SosShifted,
        }
    }
}

/// A computation that the model offers. Jobs of one batch share a graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Graph {
    /// From tokens to pooled features of every layer up to the feature layer.
    Features(Norm),
    /// From tokens to last hidden states.
    Hidden,
    /// From tokens to scores of the classification head.
    Logits,
    /// From tokens to the negative log-likelihood of each token.
    Score,
    /// From tokens of sequences to logits of the next token; run by
    /// `Engine::feed`.
    Generate,
}

impl Graph {
    pub const ALL: [Self; 6] = [
        Self::Features(Norm::PreAttnRms),
        Self::Features(Norm::None),
        Self::Hidden,
        Self::Logits,
        Self::Score,
        Self::Generate,
    ];

    /// Returns the graph that computes `want`.
    #[must_use]
    pub fn of(want: Want) -> Self {
        match want {
            Want::Features { norm, .. } => Self::Features(norm),
            Want::Mean | Want::Last | Want::States => Self::Hidden,
            Want::Logits => Self::Logits,
            Want::Nll => Self::Score,
        }
    }

    /// Returns the graph's label in metrics and logs.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Features(Norm::PreAttnRms) => "features",
            Self::Features(Norm::None) => "features_raw",
            Self::Hidden => "hidden",
            Self::Logits => "logits",
            Self::Score => "score",
            Self::Generate => "generate",
        }
    }

    /// Returns the graphs that a task needs.
    #[must_use]
    pub fn of_task(task: CompileTask) -> &'static [Self] {
        match task {
            CompileTask::Embed => &[Self::Features(Norm::PreAttnRms), Self::Features(Norm::None)],
            CompileTask::Hidden => &[Self::Hidden],
            CompileTask::Classify => &[Self::Logits],
            CompileTask::Score => &[Self::Score],
            CompileTask::Generate => &[Self::Generate],
        }
    }

    /// Returns the name of the graph's file without its extension.
    #[must_use]
    pub fn file_stem(self) -> &'static str {
        match self {
            Self::Features(Norm::PreAttnRms) => "embed-pre_attn_rms",
            Self::Features(Norm::None) => "embed-none",
            Self::Hidden => "hidden",
            Self::Logits => "classify",
            Self::Score => "score",
            Self::Generate => "generate",
        }
    }

    /// Returns the name of the graph's output other than the key/value cache.
    #[must_use]
    pub fn output_name(self) -> &'static str {
        match self {
            Self::Features(_) => "features",
            Self::Hidden => "last_hidden_state",
            Self::Logits | Self::Generate => "logits",
            Self::Score => "nll",
        }
    }

    /// Returns the number of layers that the graph runs.
    #[must_use]
    pub fn n_layers(self, architecture: &Architecture, feature_layer: usize) -> usize {
        match self {
            Self::Features(_) => feature_layer,
            _ => architecture.n_layers,
        }
    }
}

/// Numbers of a run that are the answer to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Want {
    /// Pooled features of `layers`, one layer after the other.
    Features { layers: Layers, norm: Norm },
    /// Mean of the last hidden states over all positions.
    Mean,
    /// Last hidden state of the last position.
    Last,
    /// Last hidden states of all positions.
    States,
    /// Scores of the classification head.
    Logits,
    /// Negative log-likelihood of each token given the tokens before it, in
    /// nats.
    Nll,
}

/// Set of a model's layers, in ascending order; never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layers(u64);

impl Layers {
    /// First layer number that cannot be in a set; the deepest published model
    /// has 48 layers.
    pub const END: usize = 64;

    /// Layer 0 alone: the embedding, which every model has.
    pub const FIRST: Self = Self(1);

    /// Takes the layers of `list`, or returns `None` if the list is empty, does
    /// not ascend or has a layer of [`Self::END`] or more.
    #[must_use]
    pub fn ascending(list: &[u32]) -> Option<Self> {
        let mut bits = 0_u64;
        for &layer in list {
            let bit = 1_u64.checked_shl(layer)?;
            // In an ascending list each layer is larger than all before it.
            if bits >= bit {
                return None;
            }
            bits |= bit;
        }
        (bits != 0).then_some(Self(bits))
    }

    /// Iterates over the layers in ascending order.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..Self::END).filter(move |layer| self.0 >> layer & 1 == 1)
    }

    /// Returns the number of layers.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Returns false, since a set is never empty; clippy asks for it beside
    /// `len`.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
}

/// Describes ascending numbers of layers in words, such as "0 to 16 and 24".
#[must_use]
pub fn ranges(layers: &[u32]) -> String {
    let runs = layers.chunk_by(|a, b| a + 1 == *b);
    let runs = runs.map(|run| match run {
        [first, .., last] => format!("{first} to {last}"),
        run => run.iter().map(u32::to_string).collect(),
    });
    runs.collect::<Vec<_>>().join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layers_ascend() {
        let check = |list: &[u32], expected: Option<&[usize]>| {
            let layers = Layers::ascending(list).map(|layers| layers.iter().collect::<Vec<_>>());
            assert_eq!(layers.as_deref(), expected, "{list:?}");
        };
        check(&[0], Some(&[0]));
        check(&[0, 5, 63], Some(&[0, 5, 63]));
        check(&[], None);
        check(&[5, 0], None);
        check(&[5, 5], None);
        check(&[64], None);
        check(&[u32::MAX], None);
    }
}
