//! `imagegpt bench engine`: measures the engine alone in a bare loop, with no
//! server around it, beside the rate of a large matrix product in the same
//! process.
//!
//! The product and the graphs take turns: each round runs the product and then
//! every graph at every batch size, so that a machine that slows down slows all
//! of them. Results are medians over all rounds.

mod cache;
mod flags;
mod flop;
mod nearness;
mod report;

use std::collections::BTreeMap;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::Context as _;
use serde::Serialize;
use serde_json::{Map, json};

use self::cache::NanCache;
use self::flop::ImageWork;
use self::nearness::{BenchNearness, Reference};
use super::flags::Flags;
use super::random::SplitMix64;
use super::stats::as_f64;
use super::{machine, progress};
use crate::commands::compile::Bars;
use crate::commands::loss::free_unless_lost;
use crate::commands::serve::locate;
use crate::engine::{BatchRow, Engine, GraphRun, RunStop, SlotFeed, SlotFeedRow, onnx};
use crate::kernels::attention::SharedPrefix;
use crate::model::Model;
use crate::model::graph::{Graph, Layers, Want};
use crate::model::manifest::Manifest;
use crate::model::precision::{Precision, Provider};
use crate::runtime::roofline::Roofline;
use crate::runtime::{roofline, threads_within_quota};
use crate::serve::config::ServeConfig;
use crate::serve::engines::onnx_factory;

pub(crate) use self::flags::EngineArgs;

/// A model with the engine that runs it.
struct Loaded {
    folder: PathBuf,
    config: ServeConfig,
    model: Model,
    engine: Box<dyn Engine>,
    elapsed: Duration,
}

/// Measurement of one graph at one batch size.
#[derive(Debug, Clone, Serialize)]
struct Measured {
    graph: &'static str,
    batch_size: usize,
    runs: usize,
    median_ms: f64,
    images_per_second: f64,
    /// Multiplications and additions per image, if the architecture is known.
    flop_per_image: Option<u64>,
    tflop_per_second: Option<f64>,
    roofline_share: Option<f64>,
    #[serde(skip)]
    id: Graph,
    #[serde(skip)]
    times: Vec<Duration>,
}

/// Measurement of a step that adds one token to each of some sequences.
#[derive(Debug, Clone, Serialize)]
struct Stepped {
    slots: usize,
    past: usize,
    /// Earlier tokens that all sequences share; a step reads the keys and
    /// values of these tokens once for several sequences.
    shared: usize,
    runs: usize,
    median_ms: f64,
    tokens_per_second: f64,
    #[serde(skip)]
    times: Vec<Duration>,
}

/// Roofline: measured rate of a large matrix product.
#[derive(Debug, Clone, Serialize)]
struct Ceiling {
    precision: &'static str,
    side: usize,
    runs: usize,
    median_ms: f64,
    tflop_per_second: f64,
}

/// All results of the command.
#[derive(Debug, Serialize)]
struct Findings {
    roofline: Ceiling,
    graphs: Vec<Measured>,
    generate: Vec<Stepped>,
    /// Differences from the answers of `--reference`.
    nearness: Vec<BenchNearness>,
    /// Result of `--nan-cache`.
    nan_cache: Option<NanCache>,
}

/// Runs `imagegpt bench engine` and writes its tables to `out`.
///
/// # Errors
///
/// When the model cannot be loaded or run.
pub(super) fn run(flags: &Flags, args: &EngineArgs, out: &mut impl Write) -> anyhow::Result<()> {
    args.validate()?;
    // The reference is loaded and dropped before the model is loaded: a device
    // may not have room for both.
    let reference = match &args.reference {
        Some(reference) => Some(nearness::answers(args, reference, flags.seed)?),
        None => None,
    };
    progress::note("loading and warming up");
    let mut loaded = load(args, &args.model)?;
    let outcome = report(flags, args, &mut loaded, reference.as_ref(), out);
    free_unless_lost(loaded, outcome)
}

/// Measures the model and reports what was found.
fn report(
    flags: &Flags,
    args: &EngineArgs,
    loaded: &mut Loaded,
    reference: Option<&Reference>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let work = ImageWork::of(&loaded.folder, &loaded.model);
    report::header(loaded, &machine(), out)?;
    let nearness = match reference {
        Some(reference) => nearness::compare(loaded, reference)?,
        None => Vec::new(),
    };
    let mut product = ceiling(loaded)?;
    let findings = measure(flags, args, loaded, &mut product, &work, nearness);
    let findings = free_unless_lost(product, findings)?;
    report::table(&findings, out)?;
    if let Some(path) = &flags.json {
        let text = serde_json::to_string_pretty(&json!({
            "tool_version": env!("CARGO_PKG_VERSION"),
            "mode": "engine",
            "machine": machine(),
            "command_line": std::env::args().collect::<Vec<_>>(),
            "rounds": args.rounds,
            "seed": flags.seed,
            "model": model_row(loaded),
            "findings": findings,
        }))?;
        std::fs::write(path, text + "\n")
            .with_context(|| format!("--json {} cannot be written", path.display()))?;
    }
    Ok(())
}

/// Loads the model and the engine that `imagegpt serve` would load with these
/// flags.
fn load(args: &EngineArgs, model: &str) -> anyhow::Result<Loaded> {
    let mut config = args.serve_config(model)?;
    let mut bars = Bars::new();
    let folder = locate(&config, &mut bars);
    bars.end();
    let folder = folder?;
    let mut model = Model::open(&folder, None)?;
    args.keep_asked(&mut model)?;
    let asked = config.batching.buckets();
    if let Some(reason) = model.why_other_buckets(&asked) {
        progress::note(&reason);
        let size = model.buckets(asked).largest();
        let size = u16::try_from(size).unwrap_or(u16::MAX);
        config.batching.batch_sizes = vec![size];
        config.batching.max_batch_size = size;
    }
    let started = Instant::now();
    let engine = onnx_factory(&config, &model, &[])()?;
    Ok(Loaded {
        folder,
        config,
        model,
        engine,
        elapsed: started.elapsed(),
    })
}

fn model_row(loaded: &Loaded) -> serde_json::Value {
    let (model, facts) = (&loaded.model, loaded.engine.facts());
    let mut row = Map::new();
    let mut add = |name: &str, value: serde_json::Value| row.insert(name.to_owned(), value);
    add("name", json!(model.name));
    add("digest", json!(model.digest));
    add("positions", json!(model.positions()));
    add("layers", json!(model.n_layers));
    add("notice", json!(model.notice));
    add(
        "precision",
        json!(model.compiled.map(|compiled| compiled.precision)),
    );
    add(
        "feature_layer",
        json!(model.compiled.map(|compiled| compiled.feature_layer)),
    );
    add("provider", json!(facts.provider));
    add("onnxruntime_version", json!(facts.runtime_version));
    let fallbacks = facts.fallbacks.iter();
    let fallbacks = fallbacks.map(|one| (one.kind.label(), &one.reason));
    add("fallbacks", json!(fallbacks.collect::<BTreeMap<_, _>>()));
    add("load_seconds", json!(loaded.elapsed.as_secs_f64()));
    row.into()
}

fn measure(
    flags: &Flags,
    args: &EngineArgs,
    loaded: &mut Loaded,
    product: &mut Roofline,
    work: &ImageWork,
    nearness: Vec<BenchNearness>,
) -> anyhow::Result<Findings> {
    let tokens = tokens(
        &loaded.model,
        loaded.config.batching.buckets().largest(),
        flags.seed,
    );
    let nan_cache = if args.nan_cache {
        cache::check(&mut *loaded.engine)?
    } else {
        None
    };
    let mut graphs = graphs(loaded);
    let mut generate = steps(args, loaded)?;
    prefill(loaded, &generate)?;
    let share = args.seconds.div_f64(f64::from(args.rounds));
    let mut products = Vec::new();
    for round in 1..=args.rounds {
        progress::note(&format!("round {round} of {}", args.rounds));
        products.push(product.run()?);
        for measured in &mut graphs {
            repeat(share, &mut measured.times, || {
                run_graph(loaded, &tokens, measured.id, measured.batch_size)
            })?;
        }
        for stepped in &mut generate {
            repeat(share, &mut stepped.times, || {
                step(loaded, stepped.slots, stepped.past, stepped.shared)
            })?;
        }
    }
    let time = median(&mut products);
    let roofline = Ceiling {
        precision: product.precision,
        side: product.side,
        runs: products.len(),
        median_ms: time.as_secs_f64() * 1e3,
        tflop_per_second: as_f64(product.flop()) / time.as_secs_f64() / 1e12,
    };
    for measured in &mut graphs {
        let time = median(&mut measured.times).as_secs_f64();
        measured.runs = measured.times.len();
        measured.median_ms = time * 1e3;
        measured.images_per_second = as_f64(measured.batch_size as u64) / time;
        measured.flop_per_image = work.flop(measured.id);
        measured.tflop_per_second = measured
            .flop_per_image
            .map(|flop| as_f64(flop) * measured.images_per_second / 1e12);
        measured.roofline_share = measured
            .tflop_per_second
            .map(|rate| rate / roofline.tflop_per_second);
    }
    for stepped in &mut generate {
        let time = median(&mut stepped.times).as_secs_f64();
        stepped.runs = stepped.times.len();
        stepped.median_ms = time * 1e3;
        stepped.tokens_per_second = as_f64(stepped.slots as u64) / time;
    }
    Ok(Findings {
        roofline,
        graphs,
        generate,
        nearness,
        nan_cache,
    })
}

/// Prepares the matrix product on the provider and device of the model.
fn ceiling(loaded: &Loaded) -> anyhow::Result<Roofline> {
    let library = onnx::find_library(loaded.config.model.library.onnxruntime.as_deref());
    let provider = match loaded.engine.facts().provider {
        "cuda" => Provider::Cuda,
        _ => Provider::Cpu,
    };
    let precision = loaded.model.compiled.map(|compiled| compiled.precision);
    let options = roofline::RooflineOptions {
        library: &library,
        provider,
        device_id: loaded
            .config
            .model
            .devices
            .ids
            .first()
            .copied()
            .unwrap_or(0),
        intra_op_threads: threads_within_quota(loaded.config.model.intra_op_threads.into()),
        precision: precision.unwrap_or(Precision::Fp32),
    };
    Ok(Roofline::new(&options)?)
}

/// Random images as tokens; no two are equal.
fn tokens(model: &Model, n_images: usize, seed: u64) -> Vec<Vec<u16>> {
    let n_colors = model.clusters.len() as u64;
    (0..n_images as u64)
        .map(|idx| {
            let mut random = SplitMix64::fork(seed, idx);
            (0..model.positions())
                .map(|_| u16::try_from(random.below(n_colors)).unwrap_or(0))
                .collect()
        })
        .collect()
}

/// Output that is asked of a graph: as little as calls usually ask for.
fn want(graph: Graph, model: &Model) -> Want {
    match graph {
        Graph::Features(norm) => {
            let layer = model.compiled.map_or(0, |compiled| compiled.feature_layer);
            Want::Features {
                layers: Layers::ascending(&[layer]).unwrap_or(Layers::FIRST),
                norm,
            }
        }
        Graph::Hidden => Want::Mean,
        Graph::Logits => Want::Logits,
        Graph::Score | Graph::Generate => Want::Nll,
    }
}

fn graphs(loaded: &Loaded) -> Vec<Measured> {
    let graphs = loaded.model.graphs.keys().copied();
    graphs
        .filter(|graph| *graph != Graph::Generate)
        .flat_map(|id| {
            let buckets = loaded.config.batching.buckets();
            let sizes: Vec<usize> = buckets.iter().collect();
            sizes.into_iter().map(move |batch_size| Measured {
                graph: id.label(),
                batch_size,
                runs: 0,
                median_ms: 0.0,
                images_per_second: 0.0,
                flop_per_image: None,
                tflop_per_second: None,
                roofline_share: None,
                id,
                times: Vec::new(),
            })
        })
        .collect()
}

/// Steps to measure: each number of sequences that a worker steps at the same
/// time, after each of `--generate-pasts`, or else at the beginning, in the
/// middle and at the end of an image.
fn steps(args: &EngineArgs, loaded: &Loaded) -> anyhow::Result<Vec<Stepped>> {
    let Some(sequences) = loaded.engine.facts().sequences else {
        return Ok(Vec::new());
    };
    let last = loaded.model.positions() - 1;
    let mut pasts: Vec<usize> = args
        .generate_pasts
        .iter()
        .map(|past| usize::from(*past))
        .collect();
    if let Some(past) = pasts.iter().find(|past| **past > last) {
        anyhow::bail!(
            "--generate-pasts: {past} is too large; an image has {last} tokens before its last one"
        );
    }
    if pasts.is_empty() {
        pasts = vec![1.min(last), last.div_ceil(2), last];
    }
    pasts.dedup();
    if args.generate_own.is_some() && !sequences.shares_prefixes {
        anyhow::bail!(
            "--generate-own: steps of this model share no prefixes on this provider (only \
             imagegpt's own operators on a CPU do); drop --generate-own"
        );
    }
    let shared = |past: usize| {
        let own = args.generate_own.map_or(past, usize::from);
        past.saturating_sub(own)
    };
    let steps = sequences
        .sizes()
        .iter()
        .flat_map(|slots| {
            pasts.iter().map(move |&past| Stepped {
                slots,
                past,
                shared: shared(past),
                runs: 0,
                median_ms: 0.0,
                tokens_per_second: 0.0,
                times: Vec::new(),
            })
        })
        .collect();
    Ok(steps)
}

/// Most sequences whose key/value cache is filled token by token where caches
/// cannot be copied. A GPU would take a minute for hundreds, and a step reads
/// the same number of bytes of the others, whatever their caches contain.
const PREFILLED_MAX: usize = 16;

/// Fills the key/value caches of the sequences with an image, so that steps
/// read real values.
fn prefill(loaded: &mut Loaded, steps: &[Stepped]) -> anyhow::Result<()> {
    let Some(sequences) = loaded
        .engine
        .facts()
        .sequences
        .filter(|_| !steps.is_empty())
    else {
        return Ok(());
    };
    progress::note("filling key/value caches");
    let image = tokens(&loaded.model, 1, 0).concat();
    let mut logits = Vec::new();
    for slot in 0..sequences.n_slots {
        if slot > 0 && loaded.engine.copy_slot(0, slot, image.len()) {
            continue;
        }
        if slot == PREFILLED_MAX {
            break;
        }
        let mut past = 0;
        for tokens in image.chunks(sequences.chunk.max(1)) {
            let feed = SlotFeed {
                first_slot: slot,
                rows: &[SlotFeedRow { tokens, past }],
                prefixes: &[],
            };
            loaded.engine.feed(&feed, &mut logits)?;
            past += tokens.len();
        }
    }
    Ok(())
}

fn run_graph(
    loaded: &mut Loaded,
    tokens: &[Vec<u16>],
    graph: Graph,
    batch_size: usize,
) -> anyhow::Result<()> {
    let want = want(graph, &loaded.model);
    let rows: Vec<BatchRow<'_>> = tokens
        .iter()
        .take(batch_size)
        .map(|tokens| BatchRow { tokens, want })
        .collect();
    let run = GraphRun {
        graph,
        bucket: batch_size,
        rows: &rows,
    };
    loaded.engine.run(&run, &RunStop::default())?;
    Ok(())
}

fn step(loaded: &mut Loaded, slots: usize, past: usize, shared: usize) -> anyhow::Result<()> {
    let row = SlotFeedRow { tokens: &[0], past };
    let prefix = SharedPrefix { of: 0, len: shared };
    let feed = SlotFeed {
        first_slot: 0,
        rows: &vec![row; slots],
        prefixes: &vec![prefix; slots],
    };
    Ok(loaded.engine.feed(&feed, &mut Vec::new())?)
}

/// Repeats `something` until `time` is over, at least once, and records each
/// duration.
fn repeat(
    time: Duration,
    times: &mut Vec<Duration>,
    mut something: impl FnMut() -> anyhow::Result<()>,
) -> anyhow::Result<()> {
    let begun = Instant::now();
    loop {
        let started = Instant::now();
        something()?;
        times.push(started.elapsed());
        if begun.elapsed() >= time {
            return Ok(());
        }
    }
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times.get(times.len() / 2).copied().unwrap_or_default()
}

/// Manifest of a compiled directory; `None` for a published export.
fn manifest(folder: &Path) -> Option<Manifest> {
    Manifest::read(folder).ok()
}
