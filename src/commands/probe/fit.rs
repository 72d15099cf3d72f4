//! `imagegpt probe fit`: from labelled images to a head that can be served.
//!
//! Jobs of `imagegpt embed` make a table of all layers for each context and norm;
//! the fits read the tables' features through mapped scratch files. The head is
//! written last.

use std::collections::BTreeMap;
use std::io::Write;
use std::num::NonZeroUsize;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use anyhow::Context as _;
use clap::ValueEnum;
use ndarray::Array2;

use super::examples::ExampleRows;
use super::flags::{FitArgs, WeightsChoice};
use super::jobs::{JobOptions, ProbeWorkers, Unfinished, work_folder};
use super::plots;
use super::report::{FeatureKind, FitFigures, FitReport, Guesses, Measures, PartCounts};
use super::tables::{self, EmbedTable, ExampleColumns, LayerMatrix};
use crate::commands::embed::{JobEnded, Terminal};
use crate::commands::output::value_name as name;
use crate::imaging::{Alpha, Fit};
use crate::model::ClassActivation;
use crate::model::ModelNeed;
use crate::model::graph::{Context, Norm};
use crate::model::head::HeadFile;
use crate::probe::{
    ClassScorer, ClassWeights, ExampleSplit, FeatureMatrix, FitPlan, FitProgress, LabelScorer,
    LayerFeatures, LinearFit, MinimumLimits, PlanResult, ProbeTargets, baseline, fit_plan,
};
use crate::proto::pb;

/// Images up to which baselines are fitted without being asked for: their pixels
/// are six times as wide as the features of a small model.
const BASELINE_IMAGES_MAX: usize = 20_000;
/// Mistakes that the report lists.
pub(super) const WRONG_MAX: usize = 40;
/// Predictions among which a class counts as found.
pub(super) const TOP_K: usize = 5;
/// Interval of the log lines about a fit.
const PROGRESS_INTERVAL: Duration = Duration::from_secs(5);

/// Table of features of one context and norm.
struct Source {
    table: EmbedTable,
    context: Context,
    norm: Norm,
}

/// Tables of a fit, and what the head records of the images and the model.
struct Sources {
    features: Vec<Source>,
    /// Color tokens, if baselines are fitted.
    tokens: Option<(EmbedTable, Vec<[f64; 3]>)>,
    fit: Fit,
    alpha: Alpha,
    model: String,
    model_digest: String,
    weights_digest: Option<String>,
}

/// Best fit so far.
struct Best {
    figures: FitFigures,
    fit: LinearFit,
    /// Place of its table among the sources.
    source: usize,
    context: Context,
    norm: Norm,
    layer: u32,
    validation: Option<Measures>,
    test: Option<Measures>,
}

/// Runs the command after the flags were checked; the table goes to `out`.
///
/// # Errors
///
/// Flags or inputs that cannot be used, a job that was not finished, or labels
/// that cannot be fitted.
pub(super) async fn run(
    args: &FitArgs,
    terminal: &Terminal,
    stop: &mut (impl Future<Output = ()> + Unpin),
    out: &mut impl Write,
) -> anyhow::Result<()> {
    check(args)?;
    crate::commands::check_output("--output", &args.output)?;
    let work = work_folder(args.features.work.as_deref(), &args.output, "features")?;
    // Boxed, since the job within it is large.
    let sources = Box::pin(sources(args, &work, terminal, stop)).await?;
    let given = args.clone();
    let fitted = tokio::task::spawn_blocking(move || fitted(&given, &work, &sources));
    let (report, head) = tokio::select! {
        fitted = fitted => fitted??,
        // The tables stay; the process ends, and the fits with it.
        () = stop => {
            tracing::warn!("the fit was told to end; the same command embeds nothing again");
            return Err(Unfinished(JobEnded::Interrupted).into());
        }
    };
    written(args, &report, &head)?;
    report.print(out)?;
    writeln!(out, "the head is {}", args.output.display())?;
    Ok(())
}

/// Checks flags that the fits would refuse only after the images are embedded.
fn check(args: &FitArgs) -> anyhow::Result<()> {
    let extension = args.output.extension().and_then(|end| end.to_str());
    anyhow::ensure!(
        extension == Some("safetensors"),
        "--output {}: a head is a file that ends with .safetensors",
        args.output.display()
    );
    for strength in &args.regression.strengths {
        anyhow::ensure!(
            *strength > 0.0 && strength.is_finite(),
            "--strengths {strength}: a strength must be a number above 0"
        );
    }
    let (validation, test) = (args.split.validation_share, args.split.test_share);
    anyhow::ensure!(
        validation + test < 1.0,
        "--validation-share {validation} and --test-share {test} leave nothing to train on; \
         together they must be below 1"
    );
    Ok(())
}

/// Makes the tables, or opens those that are given.
async fn sources(
    args: &FitArgs,
    work: &Path,
    terminal: &Terminal,
    stop: &mut (impl Future<Output = ()> + Unpin),
) -> anyhow::Result<Sources> {
    let inputs = &args.examples.inputs;
    if inputs.iter().any(|input| tables::is_table(input)) {
        return given_tables(args);
    }
    let needs = args.features.norms.iter().map(|norm| ModelNeed::Features {
        layers: vec![0],
        norm: *norm,
    });
    let needs = needs.collect();
    let mut workers = ProbeWorkers::new(&args.jobs.workers, &args.jobs.connect, terminal, needs);
    // Boxed, since it is the largest of the futures that wait for each other.
    let made = Box::pin(made_tables(args, work, &mut workers, stop)).await;
    workers.end().await;
    made
}

async fn made_tables(
    args: &FitArgs,
    work: &Path,
    workers: &mut ProbeWorkers<'_>,
    stop: &mut (impl Future<Output = ()> + Unpin),
) -> anyhow::Result<Sources> {
    let columns = [&args.split.column, &args.split.group];
    let keep: Vec<&str> = columns.into_iter().flatten().map(String::as_str).collect();
    let options = JobOptions {
        examples: &args.examples,
        reading: &args.jobs.reading,
        fit: args.features.fit,
        alpha: args.features.alpha,
        keep: &keep,
    };
    let model = workers.model().await?;
    let mut features = Vec::new();
    for &context in &args.features.contexts {
        for &norm in &args.features.norms {
            let kind = format!("{}-{}", name(&context), name(&norm));
            let flags = [
                format!("--layers={}", args.features.layers),
                format!("--context={}", name(&context)),
                format!("--norm={}", name(&norm)),
                format!("--dtype={}", name(&args.features.dtype)),
            ];
            let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
            let folder = workers.run(options, &flags, (work, &kind), stop).await?;
            features.push(Source {
                table: EmbedTable::open(&folder)?,
                context,
                norm,
            });
        }
    }
    let n_images = features.first().and_then(|source| source.table.n_rows());
    let is_small = n_images.is_some_and(|n_images| n_images <= BASELINE_IMAGES_MAX);
    let tokens = if args.regression.baselines.unwrap_or(is_small) {
        let flags = ["--task=tokenize"];
        let folder = workers.run(options, &flags, (work, "tokens"), stop).await?;
        Some((EmbedTable::open(&folder)?, palette(&model)))
    } else {
        None
    };
    Ok(Sources {
        features,
        tokens,
        fit: args.features.fit,
        alpha: args.features.alpha,
        model_digest: model.digest,
        weights_digest: Some(model.weights_digest).filter(|digest| !digest.is_empty()),
        model: model.name,
    })
}

/// Returns the palette's colors, -1 to 1.
fn palette(model: &pb::GetModelResponse) -> Vec<[f64; 3]> {
    let level = |byte: u8| f64::from(byte) / 127.5 - 1.0;
    let colors = model.palette_rgb8.chunks_exact(3);
    colors
        .map(|color| [level(color[0]), level(color[1]), level(color[2])])
        .collect()
}

/// Opens tables that are given as inputs: one for each context and norm.
fn given_tables(args: &FitArgs) -> anyhow::Result<Sources> {
    anyhow::ensure!(
        args.regression.baselines != Some(true),
        "--baselines true: the inputs are tables of features, which have no pixels; give the \
         images"
    );
    let mut features = Vec::new();
    for input in &args.examples.inputs {
        anyhow::ensure!(
            tables::is_table(input),
            "{input} is no output of imagegpt embed, and other inputs are; give one kind"
        );
        let table = EmbedTable::open(Path::new(input))?;
        let option = |flag: &str| table.about.options.get(flag).map_or("", String::as_str);
        let unknown = |flag: &str| format!("{input} has no {flag} that is known");
        let context = Context::from_str(option("--context"), false);
        let norm = Norm::from_str(option("--norm"), false);
        features.push(Source {
            context: context.map_err(|_| anyhow::anyhow!(unknown("--context")))?,
            norm: norm.map_err(|_| anyhow::anyhow!(unknown("--norm")))?,
            table,
        });
    }
    let first = features.first().context("no input")?;
    let about = first.table.about.clone();
    for (source, input) in features.iter().zip(&args.examples.inputs) {
        let other = &source.table.about;
        // Tables of one checkpoint may be of graphs with different layers.
        let has_same_weights =
            about.weights_digest.is_some() && other.weights_digest == about.weights_digest;
        anyhow::ensure!(
            has_same_weights || other.model.digest == about.model.digest,
            "{input} was made by the model {} ({}), and {} by {} ({}); give tables of one model",
            other.model.name,
            other.model.digest,
            args.examples.inputs[0],
            about.model.name,
            about.model.digest
        );
        for flag in ["--fit", "--alpha"] {
            anyhow::ensure!(
                other.options.get(flag) == about.options.get(flag),
                "{input} and {} have different {flag}",
                args.examples.inputs[0]
            );
        }
    }
    let option = |flag: &str| about.options.get(flag).map_or("", String::as_str);
    let fit = Fit::from_str(option("--fit"), false);
    let alpha = Alpha::from_str(option("--alpha"), false);
    Ok(Sources {
        features,
        tokens: None,
        fit: fit.map_err(|error| anyhow::anyhow!("--fit of the tables: {error}"))?,
        alpha: alpha.map_err(|error| anyhow::anyhow!("--alpha of the tables: {error}"))?,
        model: about.model.name,
        model_digest: about.model.digest,
        weights_digest: about.weights_digest,
    })
}

/// Layers of a table that are tried.
fn layers_tried(args: &FitArgs, table: &EmbedTable) -> anyhow::Result<BTreeMap<u32, String>> {
    let mut layers = table.layers()?;
    if args.features.layers == "all" {
        return Ok(layers);
    }
    let wanted: Result<Vec<u32>, _> = (args.features.layers.split(','))
        .map(|layer| layer.trim().parse())
        .collect();
    let wanted = wanted.map_err(|_| {
        anyhow::anyhow!(
            "--layers {}: layers must be numbers such as 8,12,16, or all",
            args.features.layers
        )
    })?;
    for layer in &wanted {
        anyhow::ensure!(
            layers.contains_key(layer),
            "--layers {layer}: the table has the layers {}",
            layers
                .keys()
                .map(u32::to_string)
                .collect::<Vec<_>>()
                .join(", ")
        );
    }
    layers.retain(|layer, _| wanted.contains(layer));
    Ok(layers)
}

/// Fits everything, and returns the report and the head.
fn fitted(args: &FitArgs, work: &Path, sources: &Sources) -> anyhow::Result<(FitReport, HeadFile)> {
    let is_multi_label = args.examples.multi_label;
    let columns = ExampleColumns {
        label: args.examples.label.as_deref(),
        is_multi_label,
        part: args.split.column.as_deref(),
        group: args.split.group.as_deref(),
    };
    let first = sources.features.first().context("no table")?;
    let rows = first.table.examples(columns)?;
    let targets = rows.targets(is_multi_label)?;
    let split = rows.split(&targets, &args.split)?;
    let plan = plan(args);
    let (mut fits, mut layers) = (Vec::new(), Vec::new());
    let mut best: Option<Best> = None;
    for (place, source) in sources.features.iter().enumerate() {
        // The rows are those of the first table.
        anyhow::ensure!(
            place == 0 || source.table.examples(ExampleColumns::default())?.ids == rows.ids,
            "the tables have different rows; several tables are taken as the same images with \
             different contexts and norms, and images may have failed in one of them"
        );
        let kind = FeatureKind {
            context: name(&source.context),
            norm: name(&source.norm),
        };
        let matrices = source
            .table
            .features(&layers_tried(args, &source.table)?, work)?;
        let borrowed: Vec<LayerFeatures<'_>> = (matrices.iter())
            .map(|LayerMatrix { layer, features }| LayerFeatures {
                layer: *layer,
                features,
            })
            .collect();
        let said = Said::new(format!("{}, {}", kind.context, kind.norm));
        let result = fit_plan(&borrowed, &targets, &split, &plan, &|seen| said.tell(seen))?;
        let figures = |result| FitFigures::of("features", Some(&kind), result);
        fits.extend(result.results.iter().map(figures));
        layers.extend(best_of_layers(&result).into_iter().map(figures));
        let chosen = &result.results[result.chosen];
        let figures = figures(chosen);
        if best
            .as_ref()
            .is_none_or(|best| figures.loss() < best.figures.loss())
        {
            let matrix = matrices.iter().find(|matrix| matrix.layer == chosen.layer);
            let matrix = &matrix.context("the chosen layer")?.features;
            let measured = |part: &[usize]| measures(&result.fit, matrix, &targets, part, &rows);
            best = Some(Best {
                validation: measured(&split.validation)?,
                test: measured(&split.test)?,
                source: place,
                context: source.context,
                norm: source.norm,
                layer: chosen.layer,
                fit: result.fit.clone(),
                figures,
            });
        }
    }
    let mut best = best.context("no fit")?;
    let is_refitted = args.regression.refit && !split.validation.is_empty();
    if is_refitted {
        refit(&mut best, work, sources, &targets, &split, &plan, &rows)?;
    }
    let baselines = match &sources.tokens {
        Some((table, palette)) => baselines(table, palette, &rows, &targets, &split, &plan)?,
        None => Vec::new(),
    };
    let counts = PartCounts {
        train: split.train.len(),
        validation: split.validation.len(),
        test: split.test.len(),
    };
    let n_failed = first.table.errors();
    let head = head(sources, &targets, &best, counts, is_refitted)?;
    let report = FitReport {
        model: sources.model.clone(),
        model_digest: sources.model_digest.clone(),
        weights_digest: sources.weights_digest.clone(),
        classes: targets.names().to_vec(),
        multi_label: is_multi_label,
        fit: name(&sources.fit),
        alpha: name(&sources.alpha),
        examples: counts,
        failed: n_failed,
        chosen: best.figures,
        refitted: is_refitted,
        layers,
        baselines,
        guesses: Guesses::of(&targets, &split),
        validation: best.validation,
        test: best.test,
        fits,
    };
    Ok((report, head))
}

/// Fits the chosen layer and strength on the training and validation parts
/// together, and measures the test part again.
fn refit(
    best: &mut Best,
    work: &Path,
    sources: &Sources,
    targets: &ProbeTargets,
    split: &ExampleSplit,
    plan: &FitPlan,
    rows: &ExampleRows,
) -> anyhow::Result<()> {
    let table = &sources.features[best.source].table;
    let mut layers = table.layers()?;
    layers.retain(|layer, _| *layer == best.layer);
    let matrices = table.features(&layers, work)?;
    let features = &matrices.first().context("the chosen layer")?.features;
    let mut train: Vec<usize> = split
        .train
        .iter()
        .chain(&split.validation)
        .copied()
        .collect();
    train.sort_unstable();
    let whole = ExampleSplit {
        train,
        validation: Vec::new(),
        test: split.test.clone(),
    };
    let plan = FitPlan {
        strengths: vec![best.figures.strength],
        ..plan.clone()
    };
    let layer = LayerFeatures {
        layer: best.layer,
        features,
    };
    let result = fit_plan(&[layer], targets, &whole, &plan, &|_| ())?;
    best.fit = result.fit;
    best.test = measures(&best.fit, features, targets, &split.test, rows)?;
    Ok(())
}

fn plan(args: &FitArgs) -> FitPlan {
    let all = std::thread::available_parallelism().unwrap_or(NonZeroUsize::MIN);
    FitPlan {
        strengths: args.regression.strengths.clone(),
        class_weights: match args.regression.class_weights {
            WeightsChoice::None => ClassWeights::None,
            WeightsChoice::Balanced => ClassWeights::Balanced,
        },
        standardize: true,
        limits: MinimumLimits {
            tolerance: args.regression.tolerance,
            iterations_max: args.regression.iterations_max as usize,
        },
        threads: args.regression.threads.unwrap_or(all),
    }
}

/// Returns the result of the best strength of each layer, in their order.
fn best_of_layers(result: &PlanResult) -> Vec<&crate::probe::StrengthResult> {
    let loss = |result: &crate::probe::StrengthResult| {
        result
            .validation
            .map_or(result.train.log_loss, |scores| scores.log_loss)
    };
    result
        .results
        .chunk_by(|a, b| a.layer == b.layer)
        .filter_map(|layer| layer.iter().min_by(|a, b| loss(a).total_cmp(&loss(b))))
        .collect()
}

/// Measures a fit on a part; `None` if the part is empty.
pub(super) fn measures(
    fit: &LinearFit,
    features: &FeatureMatrix,
    targets: &ProbeTargets,
    part: &[usize],
    rows: &ExampleRows,
) -> anyhow::Result<Option<Measures>> {
    if part.is_empty() {
        return Ok(None);
    }
    let names = targets.names();
    if targets.is_multi_label() {
        let mut scorer = LabelScorer::new(names.len());
        fit.visit(features, part, |position, logits| {
            scorer.add(logits, |label| targets.has(part[position], label));
        })?;
        let measures = scorer.finish();
        return Ok(measures.map(|measures| Measures::of_labels(&measures, names)));
    }
    let mut scorer = ClassScorer::new(names.len(), TOP_K, WRONG_MAX);
    fit.visit(features, part, |position, logits| {
        let row = part[position];
        if let Some(class) = targets.class(row) {
            scorer.add(row, class, logits);
        }
    })?;
    let measures = scorer.finish();
    Ok(measures.map(|measures| Measures::of_classes(&measures, names, &rows.ids)))
}

/// Fits probes on pixels and on counts of colors.
fn baselines(
    table: &EmbedTable,
    palette: &[[f64; 3]],
    rows: &ExampleRows,
    targets: &ProbeTargets,
    split: &ExampleSplit,
    plan: &FitPlan,
) -> anyhow::Result<Vec<FitFigures>> {
    let ids = table.examples(ExampleColumns::default())?.ids;
    anyhow::ensure!(
        ids == rows.ids,
        "the tables of tokens and of features have different rows"
    );
    let tokens = table.tokens()?;
    let pixels = baseline::pixel_features(&tokens, palette)?;
    let colors = baseline::color_features(&tokens, palette.len())?;
    let mut figures = Vec::new();
    // Pixels have one scale already.
    for (name, features, standardize) in [
        ("pixels", &pixels, false),
        ("counts of colors", &colors, true),
    ] {
        let plan = FitPlan {
            standardize,
            ..plan.clone()
        };
        let layer = LayerFeatures { layer: 0, features };
        let said = Said::new(name.to_owned());
        let result = fit_plan(&[layer], targets, split, &plan, &|seen| said.tell(seen))?;
        figures.push(FitFigures::of(name, None, &result.results[result.chosen]));
    }
    Ok(figures)
}

/// Log lines about the fits, at intervals.
struct Said {
    what: String,
    last: Mutex<Instant>,
}

impl Said {
    fn new(what: String) -> Self {
        Self {
            what,
            last: Mutex::new(Instant::now()),
        }
    }

    fn tell(&self, seen: FitProgress) {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if last.elapsed() < PROGRESS_INTERVAL {
            return;
        }
        *last = Instant::now();
        tracing::info!(
            layer = seen.layer,
            strength = seen.strength,
            iterations = seen.iterations,
            loss = seen.loss,
            "fitting {}",
            self.what
        );
    }
}

fn head(
    sources: &Sources,
    targets: &ProbeTargets,
    best: &Best,
    counts: PartCounts,
    is_refitted: bool,
) -> anyhow::Result<HeadFile> {
    let (weight, bias) = best.fit.rounded()?;
    let mut figures = BTreeMap::new();
    let fitted = counts.train + if is_refitted { counts.validation } else { 0 };
    #[expect(clippy::cast_precision_loss, reason = "numbers of images")]
    for (name, value) in [
        ("strength", Some(best.figures.strength)),
        ("train_examples", Some(counts.train as f64)),
        ("validation_examples", Some(counts.validation as f64)),
        ("test_examples", Some(counts.test as f64)),
        ("train_accuracy", Some(best.figures.train_accuracy)),
        ("validation_accuracy", best.figures.validation_accuracy),
        ("validation_log_loss", best.figures.validation_log_loss),
        ("fitted_examples", Some(fitted as f64)),
        (
            "test_accuracy",
            best.test.as_ref().map(|test| test.accuracy),
        ),
        (
            "test_log_loss",
            best.test.as_ref().map(|test| test.log_loss),
        ),
    ] {
        // A figure that is no number is left out.
        let value = value.and_then(serde_json::Number::from_f64);
        figures.extend(value.map(|value| (name.to_owned(), value)));
    }
    Ok(HeadFile {
        labels: targets.names().to_vec(),
        activation: if targets.is_multi_label() {
            ClassActivation::Sigmoid
        } else {
            ClassActivation::Softmax
        },
        layer: best.layer,
        norm: best.norm,
        context: best.context,
        fit: Some(sources.fit),
        alpha: Some(sources.alpha),
        weights_digest: sources.weights_digest.clone(),
        figures,
        tool_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
        weight: Array2::from_shape_vec((bias.len(), best.fit.width), weight)?,
        bias,
    })
}

/// Writes the report and the plots, and then the head.
fn written(args: &FitArgs, report: &FitReport, head: &HeadFile) -> anyhow::Result<()> {
    let stem = args.output.with_extension("");
    let beside = |end: &str| -> PathBuf {
        let mut path = stem.clone().into_os_string();
        path.push(end);
        path.into()
    };
    let json = beside(".json");
    let mut text = serde_json::to_string(report)?;
    text.push('\n');
    std::fs::write(&json, text).with_context(|| json.display().to_string())?;
    plots::layers(&beside("-layers.svg"), report)?;
    let confusion = beside("-confusion.svg");
    let is_drawn = match report.test.as_ref().or(report.validation.as_ref()) {
        Some(measures) => plots::confusion(&confusion, &report.classes, measures)?,
        None => false,
    };
    // A plot of an earlier fit does not stay beside this one.
    if !is_drawn && confusion.exists() {
        std::fs::remove_file(&confusion).with_context(|| confusion.display().to_string())?;
    }
    let shown = args.output.display();
    head.write(&args.output)
        .map_err(|reason| anyhow::anyhow!("--output {shown} cannot be written: {reason}"))
}
