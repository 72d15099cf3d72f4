//! Difference of a model's answers from those of the same weights in fp32.

use anyhow::Context as _;
use serde::Serialize;

use super::{EngineArgs, Loaded, load, manifest, tokens, want};
use crate::commands::loss::free_unless_lost;
use crate::engine::{BatchRow, GraphRun, RunStop};
use crate::model::graph::Graph;

/// Number of images that are compared. Each answer is the result of a few
/// hundred thousand roundings, so that more images would show the same.
const N_IMAGES: usize = 8;

/// Difference of a graph's answers from those of the reference.
#[derive(Debug, Clone, Serialize)]
pub(super) struct BenchNearness {
    pub(super) graph: &'static str,
    pub(super) n_images: usize,
    /// ‖answer − reference‖ / ‖reference‖ over all images.
    pub(super) relative_error: f64,
    /// Smallest cosine similarity over all images.
    pub(super) cosine: f64,
}

/// Answers of the reference, with the images and the digest of the weights.
pub(super) struct Reference {
    sha256: String,
    tokens: Vec<Vec<u16>>,
    answers: Vec<(Graph, Vec<Vec<f32>>)>,
}

/// Loads the reference, computes its answers and drops it.
pub(super) fn answers(args: &EngineArgs, reference: &str, seed: u64) -> anyhow::Result<Reference> {
    let own = EngineArgs {
        batch_sizes: vec![1],
        generate_slots: 0,
        ..args.clone()
    };
    let mut loaded = load(&own, reference).context("--reference")?;
    let outcome = answers_of(&mut loaded, seed);
    free_unless_lost(loaded, outcome)
}

fn answers_of(loaded: &mut Loaded, seed: u64) -> anyhow::Result<Reference> {
    let tokens = tokens(&loaded.model, N_IMAGES, seed);
    let graphs: Vec<Graph> = loaded.model.graphs.keys().copied().collect();
    let mut answers = Vec::new();
    for graph in graphs {
        if graph != Graph::Generate {
            answers.push((graph, ask(loaded, graph, &tokens)?));
        }
    }
    Ok(Reference {
        sha256: weights(loaded).context("--reference")?,
        tokens,
        answers,
    })
}

/// Compares the answers of the graphs that both models have.
pub(super) fn compare(
    loaded: &mut Loaded,
    reference: &Reference,
) -> anyhow::Result<Vec<BenchNearness>> {
    anyhow::ensure!(
        weights(loaded)? == reference.sha256,
        "--reference was compiled from other weights than --model; compile both from the same \
         checkpoint"
    );
    let mut found = Vec::new();
    for (graph, expected) in &reference.answers {
        if !loaded.model.graphs.contains_key(graph) {
            continue;
        }
        let answers = ask(loaded, *graph, &reference.tokens)?;
        found.push(BenchNearness {
            graph: graph.label(),
            n_images: answers.len(),
            relative_error: relative_error(&answers.concat(), &expected.concat()),
            cosine: answers
                .iter()
                .zip(expected)
                .map(|(answer, expected)| cosine(answer, expected))
                .fold(1.0, f64::min),
        });
    }
    anyhow::ensure!(
        !found.is_empty(),
        "--reference has none of --model's graphs"
    );
    Ok(found)
}

/// Digest of the weights that a directory was compiled from.
fn weights(loaded: &Loaded) -> anyhow::Result<String> {
    manifest(&loaded.folder)
        .map(|manifest| manifest.source.sha256)
        .with_context(|| format!("{} is not a compiled directory", loaded.folder.display()))
}

/// Runs one image at a time, so that answers do not depend on the batch.
fn ask(loaded: &mut Loaded, graph: Graph, tokens: &[Vec<u16>]) -> anyhow::Result<Vec<Vec<f32>>> {
    let bucket = loaded.config.batching.buckets().smallest();
    let want = want(graph, &loaded.model);
    let mut answers = Vec::new();
    for tokens in tokens {
        let run = GraphRun {
            graph,
            bucket,
            rows: &[BatchRow { tokens, want }],
        };
        answers.extend(loaded.engine.run(&run, &RunStop::default())?);
    }
    Ok(answers)
}

fn relative_error(found: &[f32], expected: &[f32]) -> f64 {
    if found.len() != expected.len() {
        return f64::INFINITY;
    }
    let pairs = || {
        let pairs = found.iter().zip(expected);
        pairs.map(|(a, b)| (f64::from(*a), f64::from(*b)))
    };
    let difference: f64 = pairs().map(|(a, b)| (a - b).powi(2)).sum();
    let length: f64 = pairs().map(|(_, b)| b * b).sum();
    (difference / length.max(f64::MIN_POSITIVE)).sqrt()
}

fn cosine(a: &[f32], b: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| -> f64 {
        let pairs = a.iter().zip(b);
        pairs.map(|(a, b)| f64::from(*a) * f64::from(*b)).sum()
    };
    dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().max(f64::MIN_POSITIVE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_relative_to_the_reference() {
        assert!((relative_error(&[3.0, 4.5], &[3.0, 4.0]) - 0.1).abs() < 1e-12);
        assert!(relative_error(&[1.0], &[1.0, 2.0]).is_infinite());
        assert!((cosine(&[1.0, 0.0], &[1.0, 1.0]) - 0.5_f64.sqrt()).abs() < 1e-12);
    }
}
