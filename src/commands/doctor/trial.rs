//! Trial of a provider: runs a model through the engine that would serve it, in
//! a child process.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context as _, ensure};
use serde::{Deserialize, Serialize};

use super::{DoctorArgs, child};
use crate::commands::compile::Bars;
use crate::commands::serve;
use crate::compile::random::ScratchFolder;
use crate::compile::{CompileProgress, Silent};
use crate::engine::{BatchRow, Engine, GraphRun, RunStop};
use crate::model::Model;
use crate::model::graph::{Graph, Want};
use crate::model::precision::{Precision, Provider};
use crate::serve::config::ServeConfig;
use crate::serve::engines::onnx_factory;

/// Longest time of a trial; a longer trial hangs. A tiny model takes seconds, a
/// model of --model that must be compiled first takes minutes.
const TIME_MAX: Duration = Duration::from_mins(15);
/// Model to run without --model.
const TINY: &str = "random:tiny";
/// Largest relative difference of two answers to the same image: a GPU may add
/// in another order from run to run.
const TOLERANCE: f64 = 1e-2;

/// Result of a trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Tried {
    /// The model ran; the text names the model, the graph and the time.
    Passed(String),
    /// The model did not run, for this reason.
    Failed(String),
    /// The provider is unknown, because no model could be prepared, for this
    /// reason.
    Untried(String),
}

/// Runs the trial in a child process.
pub(super) fn in_a_process(args: &DoctorArgs, provider: Provider, id: i32) -> Tried {
    let id = id.to_string();
    let question = ["--trial", provider.name(), "--device-id", &id];
    child::ask(args, &question, TIME_MAX).unwrap_or_else(|lost| Tried::Failed(lost.to_string()))
}

/// Runs the trial in this process.
pub(super) fn here(args: &DoctorArgs, provider: Provider, id: i32) -> Tried {
    let scratch = match &args.model {
        Some(_) => None,
        None => match ScratchFolder::new("doctor").context("TMPDIR names its parent") {
            Ok(scratch) => Some(scratch),
            Err(error) => {
                return Tried::Untried(format!("no directory for a tiny model: {error:#}"));
            }
        },
    };
    let tried = match (&args.model, &scratch) {
        (None, Some(scratch)) => tiny_config(args, provider, id, scratch.path())
            .and_then(|config| run(&config, provider, &mut Silent)),
        (model, _) => config(args, provider, id, model.as_deref().unwrap_or_default())
            .and_then(|config| run(&config, provider, &mut Bars::new())),
    };
    match tried {
        Ok(text) => Tried::Passed(text),
        Err(error) => Tried::Failed(format!("{error:#}")),
    }
}

/// Returns the flags with which `serve` would run the model.
fn config(
    args: &DoctorArgs,
    provider: Provider,
    id: i32,
    model: &str,
) -> anyhow::Result<ServeConfig> {
    let id = id.to_string();
    let flags = [
        "--execution-provider",
        provider.name(),
        "--device-id",
        &id,
        "--generate-slots",
        "0",
    ];
    let mut config = serve::own_config(model, &flags, None)?;
    config.model.library = args.library.clone();
    config.model.compile.cache = args.cache.clone();
    // The trial runs one image at a time.
    config.batching.max_batch_size = 1;
    config.batching.batch_sizes.clear();
    Ok(config)
}

/// Returns the flags for a tiny model, which is compiled in the directory
/// `scratch`.
fn tiny_config(
    args: &DoctorArgs,
    provider: Provider,
    id: i32,
    scratch: &Path,
) -> anyhow::Result<ServeConfig> {
    let mut config = config(args, provider, id, TINY)?;
    config.model.model_name = Some("tiny".to_owned());
    // Variables of the environment about compiling are for another model.
    let compile = &mut config.model.compile;
    (compile.revision, compile.feature_layer) = (None, None);
    compile.precision = Precision::Fp32;
    compile.cache.cache_dir = Some(scratch.join("compiled"));
    Ok(config)
}

fn run(
    config: &ServeConfig,
    provider: Provider,
    progress: &mut dyn CompileProgress,
) -> anyhow::Result<String> {
    let folder = serve::locate(config, progress)?;
    let model = Model::open(&folder, config.model.model_name.as_deref())?;
    let mut engine = onnx_factory(config, &model, &[])()?;
    let facts = engine.facts().clone();
    ensure!(
        facts.provider == provider.name(),
        "the model ran on {} instead",
        facts.provider
    );
    let (graph, want) = model
        .graphs
        .keys()
        .find_map(|&graph| Some((graph, want(&model, graph)?)))
        .context("the model has no graph that can be run by itself")?;
    let n_colors = model.clusters.len();
    let tokens: Vec<u16> = (0..model.positions())
        .map(|position| u16::try_from(position * 7 % n_colors).unwrap_or(0))
        .collect();
    let row = BatchRow {
        tokens: &tokens,
        want,
    };
    let first = answer_of(&mut *engine, graph, row)?;
    let started = Instant::now();
    let second = answer_of(&mut *engine, graph, row)?;
    let elapsed = started.elapsed();
    compare(&first, &second)?;
    Ok(format!(
        "{}, graph {}, in {elapsed:.1?}; ONNX Runtime {}",
        model.name,
        graph.label(),
        facts.runtime_version
    ))
}

/// Returns an output that depends on all values of the graph.
fn want(model: &Model, graph: Graph) -> Option<Want> {
    match graph {
        Graph::Features(norm) => model.features(&[model.layer_default()?], norm),
        Graph::Hidden => Some(Want::Mean),
        Graph::Logits => Some(Want::Logits),
        Graph::Score => Some(Want::Nll),
        Graph::Generate => None,
    }
}

fn answer_of(engine: &mut dyn Engine, graph: Graph, row: BatchRow<'_>) -> anyhow::Result<Vec<f32>> {
    let run = GraphRun {
        graph,
        bucket: 1,
        rows: &[row],
    };
    let answers = engine.run(&run, &RunStop::default())?;
    answers.into_iter().next().context("there was no answer")
}

/// Returns an error for an answer that no model gives, and for a device that
/// computes differently from run to run.
fn compare(first: &[f32], second: &[f32]) -> anyhow::Result<()> {
    let length = |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
    let wide = |values: &[f32]| values.iter().copied().map(f64::from).collect::<Vec<_>>();
    let (a, b) = (wide(first), wide(second));
    let is_finite = |values: &[f64]| values.iter().all(|value| value.is_finite());
    ensure!(
        is_finite(&a) && is_finite(&b),
        "the answer has values that are not finite (NaN or infinite)"
    );
    let size = length(&mut a.iter().copied());
    ensure!(size > 0.0, "the answer is all zeros");
    let apart = length(&mut a.iter().zip(&b).map(|(a, b)| a - b)) / size;
    ensure!(
        a.len() == b.len() && apart <= TOLERANCE,
        "the same image had another answer the second time; the relative difference is {apart:.3}"
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_held_against_each_other() {
        let check = |first: &[f32], second: &[f32], expected: &str| {
            let got = compare(first, second);
            let got = got.map_or_else(|error| error.to_string(), |()| "fine".to_owned());
            assert!(got.contains(expected), "{first:?} {second:?}: {got}");
        };
        check(&[1.0, 2.0], &[1.0, 2.0], "fine");
        check(&[1.0, 2.0], &[1.0, 2.001], "fine");
        check(&[1.0, 2.0], &[1.0, 2.1], "another answer the second time");
        check(&[1.0, 2.0], &[1.0], "another answer the second time");
        check(&[1.0, f32::NAN], &[1.0, 2.0], "NaN or infinite");
        check(&[1.0, 2.0], &[1.0, f32::INFINITY], "NaN or infinite");
        check(&[0.0, 0.0], &[0.0, 0.0], "all zeros");
    }
}
