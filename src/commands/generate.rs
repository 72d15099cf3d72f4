//! `imagegpt generate`: generates images pixel by pixel, from nothing or from a
//! part of given images, and draws a contact sheet.

use std::collections::BTreeMap;
use std::io::{IsTerminal as _, Write};
use std::path::{Path, PathBuf};
use std::pin::pin;
use std::time::Instant;

use anyhow::Context as _;
use clap::Args;
use futures_util::StreamExt as _;
use image::{RgbImage, imageops};
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::contact_sheet::{Cell, Sheet};
use super::input::{Inputs, only_one_stdin};
use super::output::{Folder, complain, json, stem};
use super::{CommandOutcome, PreprocessConfig, Session, WorkerConfig};
use crate::client::Client;
use crate::commands::neighbors::PICTURE_LIMITS;
use crate::files::{self, printable};
use crate::imaging;
use crate::imaging::decode::decode;
use crate::imaging::{Alpha, DecodeBudget};
use crate::proto::pb;
use crate::proto::pb::generate_response::Message;

/// Pictures per row of a sheet without inputs.
const COLUMNS: usize = 8;
const SAVE_SAMPLES: &str = "--save-samples";
/// Most calls in flight, however many images the worker can generate at the
/// same time.
const CALLS_MAX: usize = 64;

#[derive(Debug, Clone, Args)]
pub struct GenerateArgs {
    /// Image to complete, or a directory of images; can be given several times.
    /// Standard input is written `-`. A row of the sheet shows the input as the model
    /// sees it, the part that is kept, and the samples. Without --input, images
    /// are generated from nothing
    #[arg(long = "input", value_name = "IMAGE")]
    pub inputs: Vec<PathBuf>,

    /// Number of rows to keep of each input, from the top [default: the upper
    /// half]
    #[arg(long, value_name = "N", requires = "inputs", conflicts_with = "mask")]
    pub rows: Option<u32>,

    /// Image that is light where inputs are kept and dark where they are
    /// generated. A kept pixel influences only the pixels after it in raster
    /// order
    #[arg(long, value_name = "FILE", requires = "inputs")]
    pub mask: Option<PathBuf>,

    /// Number of images to generate, per input
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub samples: u32,

    /// Sampling temperature: below 1 prefers more likely colors, above 1 gives
    /// more variety, and 0 always takes the most likely color
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "T",
        allow_negative_numbers = true
    )]
    pub temperature: f32,

    /// Top-k sampling: draw only from the K most likely colors; 0 draws from
    /// all colors
    #[arg(long, default_value_t = 0, value_name = "K")]
    pub top_k: u32,

    /// Top-p sampling: draw only from the fewest most likely colors that
    /// together have this probability; 1 draws from all colors
    #[arg(
        long,
        default_value_t = 1.0,
        value_name = "P",
        allow_negative_numbers = true
    )]
    pub top_p: f32,

    /// Seed of the random draws. On a CPU the same seed gives the same images,
    /// whatever else the worker computes; on a GPU they may differ from run to
    /// run (see docs/gpu.md) [default: a random seed, which is printed]
    #[arg(long, value_name = "N")]
    pub seed: Option<u64>,

    /// Contact sheet to write, a PNG file
    #[arg(long, default_value = "sheet.png", value_name = "FILE")]
    pub output: PathBuf,

    /// Also write each sample as a PNG file into this directory
    #[arg(long, value_name = "DIR")]
    pub save_samples: Option<PathBuf>,

    /// Side of a model pixel in the PNG files, in pixels, without smoothing
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=32))]
    pub scale: u8,

    #[command(flatten)]
    pub preprocess: PreprocessConfig,

    /// Print one JSON object per sample instead of a table
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    pub worker: WorkerConfig,
}

impl GenerateArgs {
    /// Checks the flags that clap cannot check; the worker checks the others.
    pub(super) fn validate(&self) -> anyhow::Result<()> {
        only_one_stdin(self.inputs.iter().map(PathBuf::as_path))?;
        // The size of the sheet is not known yet, but its path can be checked
        // now.
        Sheet::check(&self.output, (0, 0), 0, 1)?;
        let save = self.save_samples.as_deref();
        save.map_or(Ok(()), |path| Folder::make(SAVE_SAMPLES, path).map(drop))
    }
}

/// Beginning that all samples of a row of the sheet share.
#[derive(Debug)]
struct Primer {
    /// Path of the input; `None` without an input.
    file: Option<String>,
    request: Option<pb::generate_request::Primer>,
    /// Pictures that the sheet shows before the samples.
    shown: Vec<Cell>,
}

/// Samples of one call.
#[derive(Debug, Clone, Copy)]
struct Part {
    primer_idx: usize,
    first_sample: u32,
    n_samples: u32,
    seed: u64,
}

/// A finished sample.
#[derive(Debug)]
struct Drawn {
    tokens: Vec<u16>,
    /// Log probability of each pixel that was not given.
    log_probs: Vec<f32>,
}

#[derive(Debug, Serialize)]
struct Line<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    input: Option<&'a str>,
    sample: u32,
    seed: u64,
    temperature: f32,
    top_k: u32,
    top_p: f32,
    /// Number of pixels that were drawn; the other pixels were given.
    pixels_drawn: usize,
    /// Mean of ln p of the drawn pixels under the model, without temperature,
    /// top-k and top-p.
    log_prob_mean: Option<f64>,
    log_prob_sum: f64,
    #[serde(skip_serializing_if = "Option::is_none")]
    file: Option<PathBuf>,
    sheet: &'a Path,
    model_digest: &'a str,
}

pub(super) async fn run(
    args: &GenerateArgs,
    session: &Session,
    out: &mut impl Write,
) -> anyhow::Result<CommandOutcome> {
    let (primers, outcome) = primers(args, session).await?;
    anyhow::ensure!(
        !primers.is_empty() || outcome == CommandOutcome::Failed,
        "--input: no images were found"
    );
    if primers.is_empty() {
        return Ok(outcome);
    }
    let save = args.save_samples.as_deref();
    let folder = save
        .map(|path| Folder::make(SAVE_SAMPLES, path))
        .transpose()?;
    let side = session.model.side as usize;
    Sheet::check(
        &args.output,
        shape(args, primers.len()),
        side,
        args.scale.into(),
    )?;
    let seed = args.seed.unwrap_or_else(any_seed);
    if !args.json {
        session.introduce(out)?;
        writeln!(out, "seed {seed}")?;
        writeln!(out, "sample  ln p/pixel  pixels drawn  file")?;
    }
    let n_samples = primers.len() as u64 * u64::from(args.samples);
    let bar = Bar::begin(n_samples, session.model.positions.into());
    let mut report = Report {
        args,
        session,
        bar: &bar,
        folder,
        seed,
        cells: primers.iter().map(|primer| primer.shown.clone()).collect(),
        outcome,
    };
    let parts = parts(args, session, primers.len(), seed);
    let (primers, bar) = (&primers, &bar);
    let calls = futures_util::stream::iter(parts).map(|part| async move {
        let request = request(args, &primers[part.primer_idx], part);
        let drawn = draw(session, request, bar).await?;
        anyhow::Ok((part, drawn))
    });
    let mut calls = pin!(calls.buffered(calls_in_flight(args, session)));
    while let Some(call) = calls.next().await {
        let (part, drawn) = call?;
        let input = primers[part.primer_idx].file.as_deref();
        report.part(input, part, drawn, out)?;
    }
    bar.end();
    report.save(out)
}

/// Output of the samples: lines, files, and places on the sheet.
struct Report<'a> {
    args: &'a GenerateArgs,
    session: &'a Session,
    bar: &'a Bar,
    folder: Option<Folder>,
    seed: u64,
    /// Cells of the sheet by primer.
    cells: Vec<Vec<Cell>>,
    outcome: CommandOutcome,
}

impl Report<'_> {
    fn part(
        &mut self,
        input: Option<&str>,
        part: Part,
        mut drawn: BTreeMap<u32, Result<Drawn, String>>,
        out: &mut impl Write,
    ) -> anyhow::Result<()> {
        for idx in 0..part.n_samples {
            let sample = part.first_sample + idx;
            let drawn = drawn
                .remove(&idx)
                .unwrap_or_else(|| Err("the worker sent no outcome".to_owned()));
            let cell = match drawn {
                Ok(drawn) => {
                    self.sample(input, sample, &drawn, out)?;
                    drawn.tokens.into_iter().map(Some).collect()
                }
                Err(reason) => {
                    let of = input.map_or_else(String::new, |input| format!("{input}: "));
                    let line = format!("{of}sample {sample}: {reason}");
                    self.bar.aside(|| complain(&line));
                    self.outcome = CommandOutcome::Failed;
                    vec![None; self.session.model.positions as usize]
                }
            };
            self.cells[part.primer_idx].push(cell);
        }
        Ok(())
    }

    fn sample(
        &mut self,
        input: Option<&str>,
        sample: u32,
        drawn: &Drawn,
        out: &mut impl Write,
    ) -> anyhow::Result<()> {
        let args = self.args;
        let file = match &mut self.folder {
            Some(folder) => {
                let png = self.session.tokens.png(&drawn.tokens, args.scale)?;
                let stem = input.map_or_else(|| "sample".to_owned(), stem);
                // A path; the folder drops its extension.
                Some(folder.write(&format!("{stem}-{sample}.png"), &png)?)
            }
            None => None,
        };
        let n = drawn.log_probs.len();
        let sum: f64 = drawn.log_probs.iter().copied().map(f64::from).sum();
        #[expect(clippy::cast_precision_loss, reason = "an image has few pixels")]
        let mean = (n > 0).then(|| sum / n as f64);
        let line = Line {
            input,
            sample,
            seed: self.seed,
            temperature: args.temperature,
            top_k: args.top_k,
            top_p: args.top_p,
            pixels_drawn: n,
            log_prob_mean: mean,
            log_prob_sum: sum,
            file,
            sheet: &args.output,
            model_digest: &self.session.model.digest,
        };
        self.bar.aside(|| line.show(args.json, out))
    }

    fn save(self, out: &mut impl Write) -> anyhow::Result<CommandOutcome> {
        let args = self.args;
        let rows = if args.inputs.is_empty() {
            let cells = self.cells.concat();
            cells.chunks(COLUMNS).map(<[Cell]>::to_vec).collect()
        } else {
            self.cells
        };
        let sheet = Sheet {
            side: self.session.model.side as usize,
            palette: &self.session.model.palette_rgb8,
            scale: args.scale.into(),
            rows,
        };
        sheet.save(&args.output)?;
        if !args.json {
            writeln!(out, "wrote {}", args.output.display())?;
        }
        Ok(self.outcome)
    }
}

/// Returns the known parts of the inputs, and whether all inputs could be used.
async fn primers(
    args: &GenerateArgs,
    session: &Session,
) -> anyhow::Result<(Vec<Primer>, CommandOutcome)> {
    if args.inputs.is_empty() {
        let nothing = Primer {
            file: None,
            request: None,
            shown: Vec::new(),
        };
        return Ok((vec![nothing], CommandOutcome::Done));
    }
    let kept = kept(args, session.model.side)?;
    let keep = if args.mask.is_some() {
        let mask: Vec<u8> = kept.iter().copied().map(u8::from).collect();
        pb::image_primer::Keep::Mask(mask.into())
    } else {
        pb::image_primer::Keep::Rows(rows(args, session.model.side))
    };
    let preprocess = args.preprocess.to_pb();
    let call =
        |mut client: Client, images| async move { client.tokenize(images, preprocess).await };
    let mut primers = Vec::new();
    let take = |file: &str, ids: Vec<u32>| {
        let tokens = session.tokens.check(&ids)?;
        let given: Cell = tokens.into_iter().map(Some).collect();
        let known = given.iter().zip(&kept);
        let known = known.map(|(token, kept)| token.filter(|_| *kept)).collect();
        let image = pb::Image {
            source: Some(pb::image::Source::Tokens(pb::Tokens { ids })),
        };
        primers.push(Primer {
            file: Some(file.to_owned()),
            request: Some(pb::generate_request::Primer::Image(pb::ImagePrimer {
                image: Some(image),
                keep: Some(keep.clone()),
                ..Default::default()
            })),
            shown: vec![given, known],
        });
        Ok(())
    };
    let inputs = Inputs::of(args.inputs.clone());
    let outcome = session.each(inputs, call, take).await?;
    Ok((primers, outcome))
}

/// Returns the number of columns and rows of the sheet.
fn shape(args: &GenerateArgs, n_primers: usize) -> (usize, usize) {
    let n_samples = args.samples as usize;
    if args.inputs.is_empty() {
        return (n_samples.min(COLUMNS), n_samples.div_ceil(COLUMNS));
    }
    // The input and its kept part stand before the samples.
    (2 + n_samples, n_primers)
}

/// Returns for each pixel of an input, in raster order, whether it is kept.
fn kept(args: &GenerateArgs, side: u32) -> anyhow::Result<Vec<bool>> {
    let Some(path) = &args.mask else {
        let rows = rows(args, side);
        anyhow::ensure!(
            rows <= side,
            "--rows is {rows}; the model's images have {side} rows"
        );
        return Ok((0..side * side).map(|pixel| pixel / side < rows).collect());
    };
    let mask =
        mask_pixels(path).with_context(|| format!("--mask {} cannot be read", path.display()))?;
    let mask = RgbImage::from_raw(mask.width, mask.height, mask.pixels)
        .with_context(|| format!("--mask {} has no pixels", path.display()))?;
    let mask = imageops::resize(&mask, side, side, imageops::FilterType::Nearest);
    let light = imageops::grayscale(&mask);
    Ok(light.pixels().map(|pixel| pixel.0[0] >= 128).collect())
}

fn mask_pixels(path: &Path) -> anyhow::Result<imaging::RgbImage> {
    let bytes_max = PICTURE_LIMITS.image_bytes_max;
    let bytes = files::read(path, bytes_max as u64)??;
    let bytes = bytes.with_context(|| format!("the file has more than {bytes_max} bytes"))?;
    Ok(decode(
        &bytes,
        Alpha::White,
        &PICTURE_LIMITS,
        &DecodeBudget::endless(),
    )?)
}

/// Number of rows of an input that are kept without a mask.
fn rows(args: &GenerateArgs, side: u32) -> u32 {
    args.rows.unwrap_or(side / 2)
}

/// Splits the samples into calls of at most as many samples as the worker takes
/// per call. A sample is drawn from the seed and its number in the call, so
/// each further call has a seed of its own.
fn parts(args: &GenerateArgs, session: &Session, n_primers: usize, seed: u64) -> Vec<Part> {
    let per_call = samples_per_call(args, session);
    let of_primer = |primer_idx| {
        let firsts = (0..args.samples).step_by(per_call as usize);
        firsts
            .enumerate()
            .map(move |(call_idx, first_sample)| Part {
                primer_idx,
                first_sample,
                n_samples: per_call.min(args.samples - first_sample),
                seed: seed.wrapping_add(call_idx as u64),
            })
    };
    (0..n_primers).flat_map(of_primer).collect()
}

fn samples_per_call(args: &GenerateArgs, session: &Session) -> u32 {
    let limits = session.model.limits.unwrap_or_default();
    let most = limits.samples_per_call_max.min(limits.images_in_flight_max);
    args.samples.min(most).max(1)
}

/// Number of calls in flight: as many as fill the worker's generation slots,
/// and one more that is waiting when a slot becomes free.
fn calls_in_flight(args: &GenerateArgs, session: &Session) -> usize {
    let n_slots = session.model.limits.unwrap_or_default().generate_slots;
    let calls = n_slots.div_ceil(samples_per_call(args, session)) as usize + 1;
    calls.min(CALLS_MAX)
}

fn request(args: &GenerateArgs, primer: &Primer, part: Part) -> pb::GenerateRequest {
    pb::GenerateRequest {
        primer: primer.request.clone(),
        samples: part.n_samples,
        temperature: Some(args.temperature),
        top_k: args.top_k,
        top_p: Some(args.top_p),
        seed: Some(part.seed),
        log_probs: true,
        // The PNG files are drawn here, from the tokens.
        scale: 1,
        no_rows: false,
    }
}

/// Makes a call and returns its samples by number.
async fn draw(
    session: &Session,
    request: pb::GenerateRequest,
    bar: &Bar,
) -> anyhow::Result<BTreeMap<u32, Result<Drawn, String>>> {
    let mut generation = session.client.clone().generate(request).await?;
    let mut drawn = BTreeMap::new();
    while let Some(message) = generation.next().await? {
        match message {
            Message::Started(_) => {}
            Message::Row(row) => bar.advance(row.ids.len() as u64),
            Message::Result(result) => {
                let outcome = match result.outcome {
                    Some(pb::generate_result::Outcome::Image(image)) => Ok(Drawn {
                        tokens: session
                            .tokens
                            .check(&image.tokens.unwrap_or_default().ids)?,
                        log_probs: image.log_probs,
                    }),
                    Some(pb::generate_result::Outcome::Error(status)) => Err(status.message),
                    None => Err("the worker sent no outcome".to_owned()),
                };
                drawn.insert(result.sample, outcome);
            }
        }
    }
    Ok(drawn)
}

/// Returns a random seed that is short enough to type.
fn any_seed() -> u64 {
    use std::hash::{BuildHasher as _, RandomState};
    // Each `RandomState` has random keys of its own.
    RandomState::new().hash_one(0_u8) & u64::from(u32::MAX)
}

impl Line<'_> {
    fn show(&self, as_json: bool, out: &mut impl Write) -> anyhow::Result<()> {
        if as_json {
            return json(out, self);
        }
        let mean = self
            .log_prob_mean
            .map_or_else(|| "-".to_owned(), |mean| format!("{mean:.4}"));
        let file = match (&self.file, self.input) {
            (Some(file), _) => file.display().to_string(),
            (None, Some(input)) => input.to_owned(),
            (None, None) => "-".to_owned(),
        };
        let file = printable(&file);
        let (sample, n) = (self.sample, self.pixels_drawn);
        writeln!(out, "{sample:>6}  {mean:>10}  {n:>12}  {file}")?;
        Ok(())
    }
}

/// Progress over pixels, on standard error, so that standard output stays
/// clean: a bar on a terminal; elsewhere a line at the beginning and one at the
/// end.
struct Bar {
    shown: Option<ProgressBar>,
    begun: Instant,
}

impl Bar {
    fn begin(n_samples: u64, positions: u64) -> Self {
        let shown = std::io::stderr().is_terminal().then(|| {
            let template = "{wide_bar} {pos}/{len} pixels, {per_sec}, {eta}";
            let style = ProgressStyle::with_template(template)
                .unwrap_or_else(|_| ProgressStyle::default_bar());
            ProgressBar::new(n_samples * positions).with_style(style)
        });
        if shown.is_none() {
            let n_pixels = n_samples * positions;
            complain(&format!(
                "generating {n_pixels} pixels, {positions} per image"
            ));
        }
        Self {
            shown,
            begun: Instant::now(),
        }
    }

    fn advance(&self, n_pixels: u64) {
        if let Some(bar) = &self.shown {
            bar.inc(n_pixels);
        }
    }

    /// Prints something while the bar is hidden.
    fn aside<T>(&self, print: impl FnOnce() -> T) -> T {
        match &self.shown {
            Some(bar) => bar.suspend(print),
            None => print(),
        }
    }

    fn end(&self) {
        let seconds = self.begun.elapsed().as_secs_f64();
        match &self.shown {
            Some(bar) => bar.finish_and_clear(),
            None => complain(&format!("done in {seconds:.1} s")),
        }
    }
}

impl Drop for Bar {
    fn drop(&mut self) {
        if let Some(bar) = &self.shown {
            bar.finish_and_clear();
        }
    }
}
