//! Compiled graphs against the model card's recipe, interleaved in one
//! process: `cargo bench --bench graphs -- RECIPE.onnx DIR...`, where the
//! directories are compiled from the checkpoint that RECIPE was exported from
//! (`tests/parity/card_recipe.py`), with ONNX Runtime in `ORT_DYLIB_PATH`.
//! `THREADS` (default 2), `BATCH` (1), `ROUNDS` (7) and `RESIDENCE` (mapped or
//! packed) are read from the environment.
#![allow(clippy::print_stdout, reason = "a benchmark prints its figures")]

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::Context;
use imagegpt::engine::onnx;
use imagegpt::model::manifest::Manifest;
use imagegpt::model::precision::Provider;
use imagegpt::runtime::{Residence, Runtime};
use ort::session::Session;
use ort::value::{Tensor, TensorElementType};

/// Names of the graphs that are timed.
const GRAPHS: [&str; 3] = ["hidden", "embed-pre_attn_rms", "embed-none"];

struct Contender {
    label: String,
    session: Session,
    seconds: Vec<f64>,
    cpu_seconds: Vec<f64>,
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args()
        .skip(1)
        .filter(|argument| argument != "--bench");
    let Some(recipe) = arguments.next() else {
        println!("no RECIPE.onnx is given, so there is nothing to compare");
        return Ok(());
    };
    let folders: Vec<PathBuf> = arguments.map(PathBuf::from).collect();
    let setting = |name: &str, default: usize| {
        std::env::var(name)
            .ok()
            .and_then(|text| text.parse().ok())
            .unwrap_or(default)
    };
    let (threads, batch, rounds) = (
        setting("THREADS", 2),
        setting("BATCH", 1),
        setting("ROUNDS", 7),
    );
    let given = std::env::var_os("ORT_DYLIB_PATH").map(PathBuf::from);
    let environment = onnx::environment(&onnx::find_library(given.as_deref()))?;
    let mut runtime = Runtime {
        n_threads: threads,
        residence: Residence::Packed,
        ..Runtime::new(environment, Provider::Cpu)?
    };

    let mut contenders = vec![contender(
        "the card's recipe".to_owned(),
        &runtime,
        Path::new(&recipe),
    )?];
    // The recipe runs as ONNX Runtime runs it by default.
    runtime.residence = match std::env::var("RESIDENCE").as_deref() {
        Ok("packed") => Residence::Packed,
        _ => Residence::InPlace,
    };
    let mut positions = 1024;
    let mut vocabulary = 512;
    for folder in &folders {
        let manifest = Manifest::read(folder)?;
        positions = manifest.architecture.n_positions;
        vocabulary = manifest.architecture.n_colors();
        for name in GRAPHS
            .iter()
            .filter(|name| manifest.graphs.contains_key(**name))
        {
            let graph = &manifest.graphs[*name];
            let label = format!(
                "{name}, {} layers, {}",
                graph.n_layers,
                manifest.precision.name()
            );
            contenders.push(contender(label, &runtime, &folder.join(&graph.file))?);
        }
        println!("{}: weights {}", folder.display(), manifest.source.sha256);
    }

    let tokens: Vec<i32> = (0..batch * positions)
        .map(|idx| i32::try_from(idx * 7919 % vocabulary).unwrap_or(0))
        .collect();
    for round in 0..=rounds {
        for contender in &mut contenders {
            let (start, cpu_start) = (Instant::now(), cpu_seconds()?);
            run(&mut contender.session, [batch, positions], &tokens)?;
            // The first round allocates.
            if round > 0 {
                contender.seconds.push(start.elapsed().as_secs_f64());
                contender.cpu_seconds.push(cpu_seconds()? - cpu_start);
            }
        }
    }
    println!("{threads} threads, batches of {batch}, medians of {rounds} interleaved rounds");
    #[allow(clippy::cast_precision_loss, reason = "batches are small")]
    let images = batch as f64;
    let recipe = median(&mut contenders[0].seconds);
    let recipe_cpu = median(&mut contenders[0].cpu_seconds);
    for contender in &mut contenders {
        let seconds = median(&mut contender.seconds);
        let cpu = median(&mut contender.cpu_seconds);
        println!(
            "{:40} {:7.3} s/image {:5.2} x   {:7.3} CPU s/image {:5.2} x",
            contender.label,
            seconds / images,
            recipe / seconds,
            cpu / images,
            recipe_cpu / cpu
        );
    }
    Ok(())
}

fn contender(label: String, runtime: &Runtime, file: &Path) -> anyhow::Result<Contender> {
    let session = runtime
        .open(file, None)
        .with_context(|| format!("{} does not load", file.display()))?;
    Ok(Contender {
        label,
        session,
        seconds: Vec::new(),
        cpu_seconds: Vec::new(),
    })
}

fn run(session: &mut Session, shape: [usize; 2], tokens: &[i32]) -> anyhow::Result<()> {
    let element = session.inputs()[0].dtype().tensor_type();
    let ids = if element == Some(TensorElementType::Int64) {
        let wide: Vec<i64> = tokens.iter().map(|token| i64::from(*token)).collect();
        Tensor::from_array((shape, wide))?.upcast()
    } else {
        Tensor::from_array((shape, tokens.to_vec()))?.upcast()
    };
    session.run(vec![("input_ids", ids)])?;
    Ok(())
}

/// Returns the CPU time that all threads have used so far. On a shared machine,
/// CPU time means more than wall time; the threads of this benchmark do not
/// spin.
fn cpu_seconds() -> anyhow::Result<f64> {
    let text = std::fs::read_to_string("/proc/self/stat")?;
    let (_, fields) = text.rsplit_once(") ").context("no process name")?;
    let ticks: f64 = fields
        .split(' ')
        .skip(11)
        .take(2)
        .map(|field| field.parse::<f64>().unwrap_or(0.0))
        .sum();
    // Linux counts in hundredths on every platform that the worker runs on.
    Ok(ticks / 100.0)
}

fn median(values: &mut [f64]) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}
