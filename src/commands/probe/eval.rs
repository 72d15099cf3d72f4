//! `imagegpt probe eval`: a head measured on labelled images.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use serde::Serialize;

use super::examples::ExampleRows;
use super::fit::measures;
use super::flags::{EvalArgs, PartName};
use super::jobs::{JobOptions, ProbeWorkers, work_folder};
use super::report::Measures;
use super::tables::{EmbedTable, ExampleColumns, TableModel, is_table};
use crate::commands::contact_sheet::{Cell, Sheet};
use crate::commands::embed::Terminal;
use crate::commands::output::value_name;
use crate::imaging::{Alpha, Fit};
use crate::model::head::HeadFile;
use crate::model::{ClassActivation, ModelNeed};
use crate::probe::{FeatureMatrix, LinearFit, ProbeTargets, SplitPart};
use crate::proto::pb;

/// Pictures in a row of the sheet.
const SHEET_COLUMNS: usize = 8;
/// Side of a model pixel in the sheet.
const SHEET_SCALE: usize = 4;

/// Report of the command.
#[derive(Debug, Serialize)]
struct EvalReport<'a> {
    head: String,
    model: &'a str,
    model_digest: &'a str,
    measures: &'a Measures,
}

/// Line of the file of predictions.
#[derive(Debug, Serialize)]
struct Prediction<'a> {
    id: &'a str,
    labels: Vec<&'a str>,
    predicted: Vec<&'a str>,
    /// Score of each class, in the order of the head's labels.
    scores: Vec<f64>,
}

/// Runs the command; the table goes to `out`.
///
/// # Errors
///
/// Flags, a head or inputs that cannot be used, or a job that was not finished.
pub(super) async fn run(
    args: &EvalArgs,
    terminal: &Terminal,
    stop: &mut (impl Future<Output = ()> + Unpin),
    out: &mut impl Write,
) -> anyhow::Result<()> {
    for (flag, path) in [
        ("--json", &args.json),
        ("--predictions", &args.predictions),
        ("--sheet", &args.sheet),
    ] {
        if let Some(path) = path {
            crate::commands::check_output(flag, path)?;
        }
    }
    let shown = args.head.display();
    let head = HeadFile::read(&args.head).map_err(|reason| anyhow::anyhow!("{shown}: {reason}"))?;
    let inputs = &args.examples.inputs;
    let source = if inputs.iter().any(|input| is_table(input)) {
        given(args, &head)?
    } else {
        let work = work_folder(args.work.as_deref(), &args.head, "eval")?;
        let needs = vec![ModelNeed::Features {
            layers: vec![head.layer],
            norm: head.norm,
        }];
        let mut workers =
            ProbeWorkers::new(&args.jobs.workers, &args.jobs.connect, terminal, needs);
        // Boxed, since the jobs within it are large.
        let made = Box::pin(made(args, &head, &work, &mut workers, stop)).await;
        workers.end().await;
        made?
    };
    let rows = source.features.examples(ExampleColumns {
        label: args.examples.label.as_deref(),
        is_multi_label: args.examples.multi_label,
        part: args.split.as_deref(),
        group: None,
    })?;
    let targets = head_targets(&rows, &head, args.examples.multi_label)?;
    let part = part(args.part, &rows)?;
    let mut layers = source.features.layers()?;
    layers.retain(|layer, _| *layer == head.layer);
    let matrices = source.features.features(&layers, &source.scratch)?;
    let matrix = matrices.into_iter().next();
    let matrix = matrix.context("the table lacks the head's layer")?.features;
    let model = &source.about;
    anyhow::ensure!(
        matrix.width() == head.weight.ncols(),
        "{shown} takes {} features, and the model {} has {}; give the model that the head was \
         fitted on",
        head.weight.ncols(),
        model.name,
        matrix.width()
    );
    let fit = LinearFit {
        width: matrix.width(),
        is_multi_label: head.activation == ClassActivation::Sigmoid,
        weight: head.weight.iter().map(|&weight| weight.into()).collect(),
        bias: head.bias.iter().map(|&bias| bias.into()).collect(),
    };
    let measured = measures(&fit, &matrix, &targets, &part, &rows)?;
    let measured = measured.context("the part has no images")?;
    if let Some(path) = &args.predictions {
        predictions(path, &fit, &matrix, &targets, &part, &rows)
            .with_context(|| format!("--predictions {}", path.display()))?;
    }
    if let (Some(path), Some((tokens, model))) = (&args.sheet, &source.tokens) {
        sheet(path, &measured, tokens, &rows, model)?;
    }
    if let Some(path) = &args.json {
        let report = EvalReport {
            head: shown.to_string(),
            model: &model.name,
            model_digest: &model.digest,
            measures: &measured,
        };
        let mut text = serde_json::to_string_pretty(&report)?;
        text.push('\n');
        std::fs::write(path, text).with_context(|| format!("--json {}", path.display()))?;
    }
    measured.print(out)?;
    Ok(())
}

/// Tables that a head is measured on.
struct EvalSource {
    features: EmbedTable,
    /// Color tokens for the sheet, with the model whose palette they are in.
    tokens: Option<(EmbedTable, pb::GetModelResponse)>,
    about: TableModel,
    /// Directory on whose disk the features are unpacked.
    scratch: PathBuf,
}

/// Opens a table that is given as the input.
fn given(args: &EvalArgs, head: &HeadFile) -> anyhow::Result<EvalSource> {
    let [input] = args.examples.inputs.as_slice() else {
        anyhow::bail!("a head is measured on one table; give one");
    };
    anyhow::ensure!(
        args.sheet.is_none(),
        "--sheet: {input} is a table of features, which has no pictures; give the pictures"
    );
    let features = EmbedTable::open(Path::new(input))?;
    let about = &features.about;
    let shown = args.head.display();
    anyhow::ensure!(
        features.layers()?.contains_key(&head.layer),
        "{shown} takes layer {}, which {input} does not have",
        head.layer
    );
    let wanted = [
        ("--context", Some(value_name(&head.context))),
        ("--norm", Some(value_name(&head.norm))),
        ("--fit", head.fit.as_ref().map(value_name)),
        ("--alpha", head.alpha.as_ref().map(value_name)),
    ];
    for (flag, wanted) in wanted {
        let has = about.options.get(flag).map_or("", String::as_str);
        if let Some(wanted) = wanted.filter(|wanted| wanted != has) {
            anyhow::bail!("{shown} takes features of {flag} {wanted}, and {input} has {has}");
        }
    }
    if let (Some(head), Some(table)) = (&head.weights_digest, &about.weights_digest) {
        anyhow::ensure!(
            head == table,
            "{shown} was fitted on the weights {head}, and {input} was made by {table}"
        );
    }
    Ok(EvalSource {
        about: about.model.clone(),
        features,
        tokens: None,
        scratch: std::env::temp_dir(),
    })
}

/// Makes the table of the head's features, and one of tokens for the sheet.
async fn made(
    args: &EvalArgs,
    head: &HeadFile,
    work: &Path,
    workers: &mut ProbeWorkers<'_>,
    stop: &mut (impl Future<Output = ()> + Unpin),
) -> anyhow::Result<EvalSource> {
    let model = workers.model().await?;
    if let Some(digest) = &head.weights_digest {
        anyhow::ensure!(
            *digest == model.weights_digest,
            "{} was fitted on the weights {digest}, and the model {} has the weights {}; give the \
             model that the head was fitted on",
            args.head.display(),
            model.name,
            model.weights_digest
        );
    }
    let keep: Vec<&str> = args.split.as_deref().into_iter().collect();
    let options = JobOptions {
        examples: &args.examples,
        reading: &args.jobs.reading,
        fit: head.fit.unwrap_or(Fit::Squash),
        alpha: head.alpha.unwrap_or(Alpha::Drop),
        keep: &keep,
    };
    let flags = [
        format!("--layer={}", head.layer),
        format!("--context={}", value_name(&head.context)),
        format!("--norm={}", value_name(&head.norm)),
    ];
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    let folder = workers
        .run(options, &flags, (work, "features"), stop)
        .await?;
    let features = EmbedTable::open(&folder)?;
    let about = TableModel {
        name: model.name.clone(),
        digest: model.digest.clone(),
    };
    let mut tokens = None;
    if args.sheet.is_some() {
        let flags = ["--task=tokenize"];
        let folder = workers.run(options, &flags, (work, "tokens"), stop).await?;
        tokens = Some((EmbedTable::open(&folder)?, model));
    }
    Ok(EvalSource {
        features,
        tokens,
        about,
        scratch: work.to_owned(),
    })
}

/// Labels of the examples in the order of the head's classes.
fn head_targets(
    rows: &ExampleRows,
    head: &HeadFile,
    is_multi_label: bool,
) -> anyhow::Result<ProbeTargets> {
    anyhow::ensure!(
        is_multi_label == (head.activation == ClassActivation::Sigmoid),
        "{}",
        if is_multi_label {
            "--multi-label: the head gives one class to each image; leave the flag out"
        } else {
            "the head gives any number of labels to each image; give --multi-label"
        }
    );
    let own = rows.targets(is_multi_label)?;
    let place = |name: &String| head.labels.iter().position(|label| label == name);
    let places: Vec<Option<usize>> = own.names().iter().map(place).collect();
    let unknown = own.names().iter().zip(&places);
    let unknown: Vec<&str> = (unknown.filter(|(_, place)| place.is_none()))
        .map(|(name, _)| name.as_str())
        .collect();
    anyhow::ensure!(
        unknown.is_empty(),
        "the images have the labels {} that the head does not know; its labels are {}",
        few(&unknown),
        few(&head.labels.iter().map(String::as_str).collect::<Vec<_>>())
    );
    let n_rows = own.n_rows();
    if is_multi_label {
        let mut values = vec![false; n_rows * head.labels.len()];
        for row in 0..n_rows {
            for (label, place) in places.iter().enumerate() {
                if let Some(place) = place.filter(|_| own.has(row, label)) {
                    values[row * head.labels.len() + place] = true;
                }
            }
        }
        return Ok(ProbeTargets::labels(head.labels.clone(), n_rows, values)?);
    }
    let classes = (0..n_rows).filter_map(|row| places[own.class(row)?]);
    let classes = classes.collect();
    Ok(ProbeTargets::classes(head.labels.clone(), classes)?)
}

fn few(names: &[&str]) -> String {
    const SHOWN: usize = 10;
    let text = names[..names.len().min(SHOWN)].join(", ");
    match names.len().saturating_sub(SHOWN) {
        0 => text,
        more => format!("{text} and {more} more"),
    }
}

/// Rows of the part that is measured.
fn part(name: Option<PartName>, rows: &ExampleRows) -> anyhow::Result<Vec<usize>> {
    let Some(name) = name else {
        return Ok((0..rows.len()).collect());
    };
    let wanted = match name {
        PartName::Train => SplitPart::Train,
        PartName::Validation => SplitPart::Validation,
        PartName::Test => SplitPart::Test,
    };
    let parts = rows.named_parts()?;
    let parts =
        parts.context("--part: the input is not divided into train, validation and test")?;
    let rows = parts.iter().enumerate();
    Ok(rows
        .filter(|(_, part)| **part == wanted)
        .map(|(row, _)| row)
        .collect())
}

fn predictions(
    path: &Path,
    fit: &LinearFit,
    features: &FeatureMatrix,
    targets: &ProbeTargets,
    part: &[usize],
    rows: &ExampleRows,
) -> anyhow::Result<()> {
    let mut file = BufWriter::new(File::create(path)?);
    let mut written = Ok(());
    let names = targets.names();
    fit.visit(features, part, |position, logits| {
        let row = part[position];
        let scores = fit.probabilities(logits);
        let has = |label: &usize| targets.has(row, *label);
        let labels = (0..names.len())
            .filter(has)
            .map(|label| names[label].as_str());
        let predicted = fit.predicted(logits).into_iter();
        let line = Prediction {
            id: &rows.ids[row],
            labels: labels.collect(),
            predicted: predicted.map(|class| names[class].as_str()).collect(),
            scores,
        };
        let wrote = serde_json::to_writer(&mut file, &line)
            .map_err(std::io::Error::from)
            .and_then(|()| file.write_all(b"\n"));
        if written.is_ok() {
            written = wrote;
        }
    })?;
    written?;
    file.flush()?;
    Ok(())
}

/// Draws the most confidently wrong images, as the model sees them.
fn sheet(
    path: &Path,
    measures: &Measures,
    tokens: &EmbedTable,
    rows: &ExampleRows,
    model: &pb::GetModelResponse,
) -> anyhow::Result<()> {
    if measures.wrong.is_empty() {
        tracing::info!("--sheet: no image is wrong, so there is nothing to draw");
        return Ok(());
    }
    let ids = tokens.examples(ExampleColumns::default())?.ids;
    anyhow::ensure!(ids == rows.ids, "the tables have different rows");
    let tokens = tokens.tokens()?;
    let cells: Vec<Cell> = (measures.wrong.iter())
        .map(|wrong| tokens[wrong.row].iter().map(|token| Some(*token)).collect())
        .collect();
    let sheet = Sheet {
        side: (model.positions as usize).isqrt(),
        palette: &model.palette_rgb8,
        scale: SHEET_SCALE,
        rows: cells.chunks(SHEET_COLUMNS).map(<[Cell]>::to_vec).collect(),
    };
    sheet.save(path)
}
