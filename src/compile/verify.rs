//! Verification: runs every graph and compares it with the reference before the
//! output is kept.
//!
//! The trial is a batch of fixed pseudo-random tokens, whose results are
//! compared with the float64 [`reference`](mod@super::reference). In addition,
//! ONNX Runtime's profile must show the fused operators that the graph was
//! written with.

mod generate;

use std::path::{Path, PathBuf};

use ort::session::{Session, SessionInputValue};
use ort::value::Tensor;

use super::error::CompileError;
use super::graph::GraphPlan;
use super::reference::{self, Trace};
use super::weights::CheckpointWeights;
use crate::model::architecture::Architecture;
use crate::model::graph::{Graph, Norm};
use crate::model::manifest::GraphFacts;
use crate::model::onnx::ModelProto;
use crate::model::precision::{CompileTask, Provider};
use crate::runtime::failure::{Failures, leak_if_lost};
use crate::runtime::{Operators, Residence, Runtime, what_ran};

/// Number of sequences in the trial: two show that rows do not mix.
pub(crate) const N_SEQUENCES: usize = 2;
/// Largest cost of the reference in operations: about ten seconds on two cores.
const REFERENCE_FLOP_MAX: usize = 20_000_000_000;
/// Smallest number of tokens per sequence; fewer would hardly test attention.
/// With 16 tokens, the reference of imagegpt-large takes four times
/// [`REFERENCE_FLOP_MAX`]; `imagegpt.json` has the number that was used.
const N_POSITIONS_MIN: usize = 16;

/// Fixed inputs of the graphs and the expected results.
pub(crate) struct Trial {
    sequences: Vec<Vec<i32>>,
    targets: Vec<usize>,
    trace: Trace,
    n_layers: usize,
    language_logits: Vec<f64>,
    class_logits: Vec<f64>,
    architecture: Architecture,
    n_classes: usize,
}

/// Distance of a graph's results from the reference.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Nearness {
    pub errors: Vec<f64>,
    pub cosine: f64,
}

/// Returns the number of positions in the trial of a model.
#[must_use]
pub(crate) fn n_positions(architecture: &Architecture, n_layers: usize) -> usize {
    let token_flop = 2 * N_SEQUENCES * architecture.layer_parameters() * n_layers.max(1);
    (REFERENCE_FLOP_MAX / token_flop)
        .max(N_POSITIONS_MIN)
        .min(architecture.n_positions)
}

/// Makes sequences of random tokens.
#[must_use]
pub(crate) fn sequences(
    architecture: &Architecture,
    count: usize,
    length: usize,
    random: &mut Random,
) -> Vec<Vec<i32>> {
    let mut sequence = || {
        // The start token comes first, as in training.
        let tokens = (0..length).map(|position| match position {
            0 => architecture.n_colors(),
            _ => random.below(architecture.vocabulary),
        });
        tokens
            .map(|token| i32::try_from(token).unwrap_or(0))
            .collect()
    };
    (0..count).map(|_| sequence()).collect()
}

impl Trial {
    /// Computes the expected results of graphs of up to `n_layers` layers.
    ///
    /// # Errors
    ///
    /// When a tensor does not fit the configuration.
    pub(crate) fn new(
        weights: &CheckpointWeights<'_>,
        tasks: &[CompileTask],
        n_layers: usize,
        advance: impl FnMut(u64),
    ) -> Result<Self, CompileError> {
        let architecture = weights.architecture.clone();
        let length = n_positions(&architecture, n_layers);
        let mut random = Random(0x1234_5678_9abc_def0);
        let sequences = sequences(&architecture, N_SEQUENCES, length, &mut random);
        let targets = (0..N_SEQUENCES * length)
            .map(|_| random.below(architecture.n_colors()))
            .collect();
        let observe = |_, _, _: &[f64], _| {};
        let trace = reference::trace(weights, &sequences, n_layers, advance, observe)?;
        let width = architecture.width;
        let mut language_logits = Vec::new();
        if tasks.contains(&CompileTask::Score) || tasks.contains(&CompileTask::Generate) {
            language_logits = reference::head(&trace.hidden, &weights.language_head()?, width);
        }
        let mut class_logits = Vec::new();
        if tasks.contains(&CompileTask::Classify) {
            let pooled = reference::means(&trace.hidden, length, width);
            class_logits = reference::head(&pooled, &weights.classification_head()?, width);
        }
        Ok(Self {
            sequences,
            targets,
            trace,
            n_layers,
            language_logits,
            class_logits,
            n_classes: weights.n_classes.unwrap_or_default(),
            architecture,
        })
    }

    /// Returns the number of tokens per sequence.
    #[must_use]
    pub(crate) fn n_positions(&self) -> usize {
        self.sequences[0].len()
    }

    /// Runs the graph in `file` and compares its results with the reference.
    ///
    /// # Errors
    ///
    /// When the graph does not run, its error exceeds the tolerance of its
    /// precision, or it ran without the fused operators of `model`.
    pub(crate) fn judge(
        &self,
        kind: Graph,
        plan: &GraphPlan<'_>,
        model: &ModelProto,
        file: &Path,
        runtime: &Runtime,
    ) -> Result<(Nearness, Operators), CompileError> {
        let failures = Failures::of(runtime);
        let failed = |error| CompileError::of_run(kind.file_stem(), error);
        let profile: PathBuf = file.with_extension("profile");
        // Generation is served with packed weights, so it is verified with
        // them.
        let packed = Runtime {
            residence: Residence::Packed,
            ..runtime.clone()
        };
        let served = if kind == Graph::Generate {
            &packed
        } else {
            runtime
        };
        let mut session = served
            .open(file, Some(&profile))
            .map_err(|error| failed(failures.run(error)))?;
        let outcome = self
            .compare(kind, plan, &mut session, runtime.provider)
            .and_then(|nearness| Ok((nearness, what_ran(&mut session)?)))
            .map_err(|reason| failures.run(reason));
        let (nearness, operators) = match outcome {
            Ok(found) => found,
            Err(error) => {
                leak_if_lost(session, &error);
                return Err(failed(error));
            }
        };
        let tolerance = plan.precision.tolerance();
        for (idx, error) in nearness.errors.iter().enumerate() {
            // A NaN exceeds the tolerance, too.
            if error.is_nan() || *error > tolerance {
                let output = match kind {
                    Graph::Features(_) => format!("{} of layer {idx}", kind.output_name()),
                    _ => kind.output_name().to_owned(),
                };
                return Err(CompileError::Tolerance {
                    graph: kind.file_stem().to_owned(),
                    output,
                    precision: plan.precision.name(),
                    error: *error,
                    tolerance,
                });
            }
        }
        // Graphs for GPUs that run on the CPU are verified by their results
        // only, since the CPU has no fused operators in fp16.
        if runtime.provider == plan.provider {
            check_fused(kind, model, &operators, runtime.provider)?;
        }
        Ok((nearness, operators))
    }

    /// Runs a graph and compares its results with the reference. What the run
    /// has used beside the session is given back to the session's own memory,
    /// which takes no call of CUDA.
    fn compare(
        &self,
        kind: Graph,
        plan: &GraphPlan<'_>,
        session: &mut Session,
        provider: Provider,
    ) -> Result<Nearness, String> {
        let text = |error: ort::Error| error.to_string();
        if kind == Graph::Generate {
            return generate::nearness(self, session, plan, provider).map_err(text);
        }
        let inputs = self.inputs(kind).map_err(text)?;
        let outputs = session.run(inputs).map_err(text)?;
        let output = outputs
            .get(kind.output_name())
            .ok_or("the run returned no output")?;
        let (shape, values) = output.try_extract_tensor::<f32>().map_err(text)?;
        let width = shape.last().and_then(|size| usize::try_from(*size).ok());
        Ok(self.nearness(kind, values, width.unwrap_or(1)))
    }

    fn inputs(&self, kind: Graph) -> ort::Result<Vec<(&'static str, SessionInputValue<'static>)>> {
        let shape = [self.sequences.len(), self.n_positions()];
        let ids = Tensor::from_array((shape, self.sequences.concat()))?;
        let mut inputs = vec![("input_ids", ids.into())];
        if kind == Graph::Score {
            let targets = self
                .targets
                .iter()
                .map(|id| i32::try_from(*id).unwrap_or(0));
            let targets = Tensor::from_array((shape, targets.collect::<Vec<i32>>()))?;
            inputs.push(("targets", targets.into()));
        }
        Ok(inputs)
    }

    fn nearness(&self, kind: Graph, values: &[f32], row_width: usize) -> Nearness {
        let width = self.architecture.width;
        match kind {
            Graph::Features(norm) => {
                let layers = match norm {
                    Norm::PreAttnRms => &self.trace.normed,
                    Norm::None => &self.trace.raw,
                };
                // Reorders (batch, layers, width) as in the reference.
                let n_features = values.len() / (width * self.sequences.len());
                let mut errors = Vec::new();
                let mut cosine = 1.0_f64;
                for (idx, expected) in layers.iter().enumerate().take(n_features) {
                    let found: Vec<f32> = values
                        .chunks_exact(n_features * width)
                        .flat_map(|sequence| sequence[idx * width..][..width].iter().copied())
                        .collect();
                    errors.push(relative_error(&found, expected));
                    cosine = cosine.min(smallest_cosine(&found, expected, width));
                }
                Nearness { errors, cosine }
            }
            Graph::Hidden => Nearness::of(values, &self.trace.hidden, row_width),
            Graph::Logits => Nearness::of(values, &self.class_logits, self.n_classes),
            Graph::Score => {
                let n_colors = self.architecture.n_colors();
                let expected = reference::nll(&self.language_logits, &self.targets, n_colors);
                Nearness::of(values, &expected, row_width)
            }
            Graph::Generate => Nearness::of(values, &self.language_logits, row_width),
        }
    }

    /// Returns the graph's entry in the manifest.
    #[must_use]
    pub(crate) fn facts(
        &self,
        kind: Graph,
        task: CompileTask,
        plan: &GraphPlan<'_>,
        (nearness, operators): (Nearness, Operators),
    ) -> GraphFacts {
        let n_layers = kind.n_layers(plan.architecture, plan.feature_layer);
        debug_assert!(
            n_layers <= self.n_layers,
            "the reference ran as far as any graph"
        );
        GraphFacts {
            file: format!("{}.onnx", kind.file_stem()),
            task,
            n_layers,
            flop: plan
                .architecture
                .flop(n_layers, plan.architecture.n_positions),
            errors: nearness.errors,
            cosine: nearness.cosine,
            operators,
        }
    }
}

impl Nearness {
    fn of(found: &[f32], expected: &[f64], width: usize) -> Self {
        Self {
            errors: vec![relative_error(found, expected)],
            cosine: smallest_cosine(found, expected, width),
        }
    }
}

/// Returns the norm of the difference divided by the norm of the reference;
/// infinity if the sizes differ.
fn relative_error(found: &[f32], expected: &[f64]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let difference: f64 = found
        .iter()
        .zip(expected)
        .map(|(found, expected)| (f64::from(*found) - expected).powi(2))
        .sum();
    let norm: f64 = expected.iter().map(|value| value * value).sum();
    (difference / norm.max(f64::MIN_POSITIVE)).sqrt()
}

fn smallest_cosine(found: &[f32], expected: &[f64], width: usize) -> f64 {
    let rows = found
        .chunks_exact(width.max(1))
        .zip(expected.chunks_exact(width.max(1)));
    rows.map(|(found, expected)| {
        let pairs = || found.iter().map(|value| f64::from(*value)).zip(expected);
        let product: f64 = pairs().map(|(a, b)| a * b).sum();
        let lengths: (f64, f64) = pairs().fold((0.0, 0.0), |(x, y), (a, b)| (x + a * a, y + b * b));
        product / (lengths.0 * lengths.1).sqrt().max(f64::MIN_POSITIVE)
    })
    .fold(1.0, f64::min)
}

/// Fused operators, each of which replaces a pattern of nodes; graphs are slow
/// without them.
const FUSED: [&str; 13] = [
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "QuickGeluFp16",
    "QuickGeluBf16",
    "QuickGelu",
    "Gelu",
    "FastGelu",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "ImageLayers",
    "Layers",
    "DynamicQuantizeMatMul",
    "MatMulNBits",
];

fn check_fused(
    kind: Graph,
    model: &ModelProto,
    operators: &Operators,
    provider: Provider,
) -> Result<(), CompileError> {
    let nodes = model.graph.iter().flat_map(|graph| &graph.node);
    let provider = provider.runtime_name();
    for operator in FUSED {
        let expected = nodes
            .clone()
            .filter(|node| node.op_type == operator)
            .count();
        let ran = |operator: &str| {
            let of_provider = operators.get(provider);
            of_provider.and_then(|ran| ran.get(operator)).copied()
        };
        // ONNX Runtime may fuse a bias in front of Gelu into BiasGelu.
        let joined = (operator == "Gelu").then(|| ran("BiasGelu")).flatten();
        let found = ran(operator).unwrap_or(0) + joined.unwrap_or(0);
        if found < expected {
            return Err(CompileError::NotFused {
                graph: kind.file_stem().to_owned(),
                operator: operator.to_owned(),
                provider: provider.to_owned(),
                found,
                expected,
            });
        }
    }
    Ok(())
}

/// `SplitMix64`, a generator that gives the same tokens on every machine and in
/// every version.
pub(crate) struct Random(pub u64);

impl Random {
    pub(crate) fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^= mixed >> 31;
        usize::try_from(mixed % end as u64).unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
