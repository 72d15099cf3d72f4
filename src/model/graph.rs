//! Graphs that a model has, and which numbers of them are wanted.

use super::precision::CompileTask;
use crate::model::architecture::Architecture;
use crate::proto::pb;

/// The input of `generate` that says what sequences share.
pub const PREFIXES: &str = "prefixes";

/// What is pooled of a layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, clap::ValueEnum)]
pub enum Norm {
    /// The paper's features: what the next layer's attention sees.
    PreAttnRms,
    /// The residual stream itself; for the last layer it is what `ln_f` leaves,
    /// as in transformers' `hidden_states`.
    None,
}

/// Which tokens the model sees.
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
    /// Tokens to pooled features of every layer up to the feature layer.
    Features(Norm),
    /// Tokens to last hidden states.
    Hidden,
    /// Tokens to scores of the classification head.
    Logits,
    /// Tokens to how unlikely each of them is.
    Score,
    /// Tokens of sequences to logits of what follows: run by `Engine::feed`.
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

    /// The graph that computes what is wanted.
    #[must_use]
    pub fn of(want: Want) -> Self {
        match want {
            Want::Features { norm, .. } => Self::Features(norm),
            Want::Mean | Want::Last | Want::States => Self::Hidden,
            Want::Logits => Self::Logits,
            Want::Nll => Self::Score,
        }
    }

    /// The graph's label in metrics and logs.
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

    /// The files that a task needs.
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

    /// The name that its file begins with.
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

    /// The name of its output, other than the cache.
    #[must_use]
    pub fn output_name(self) -> &'static str {
        match self {
            Self::Features(_) => "features",
            Self::Hidden => "last_hidden_state",
            Self::Logits | Self::Generate => "logits",
            Self::Score => "nll",
        }
    }

    /// Layers that it runs.
    #[must_use]
    pub fn n_layers(self, architecture: &Architecture, feature_layer: usize) -> usize {
        match self {
            Self::Features(_) => feature_layer,
            _ => architecture.n_layers,
        }
    }
}

/// Which numbers of a run are the answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Want {
    /// Pooled features of these layers, one after the other.
    Features { layers: Layers, norm: Norm },
    /// Mean of the last hidden states over all positions.
    Mean,
    /// Last hidden state of the last position.
    Last,
    /// Last hidden states of all positions.
    States,
    /// Scores of the classification head.
    Logits,
    /// How unlikely each token is after those before it, in nats.
    Nll,
}

/// Some of a model's layers, in ascending order. Never empty.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Layers(u64);

impl Layers {
    /// One more than the largest layer that can be named; the deepest
    /// published model has 48.
    pub const END: usize = 64;

    /// The embedding alone, which every model has.
    pub const FIRST: Self = Self(1);

    /// The layers of a list, which must ascend.
    #[must_use]
    pub fn ascending(list: &[u32]) -> Option<Self> {
        let mut bits = 0_u64;
        for &layer in list {
            let bit = 1_u64.checked_shl(layer)?;
            // Ascending means larger than all before.
            if bits >= bit {
                return None;
            }
            bits |= bit;
        }
        (bits != 0).then_some(Self(bits))
    }

    /// One by one.
    pub fn iter(self) -> impl Iterator<Item = usize> {
        (0..Self::END).filter(move |layer| self.0 >> layer & 1 == 1)
    }

    /// How many there are.
    #[must_use]
    pub fn len(self) -> usize {
        self.0.count_ones() as usize
    }

    /// Never, but clippy asks.
    #[must_use]
    pub fn is_empty(self) -> bool {
        self.0 == 0
    }
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
