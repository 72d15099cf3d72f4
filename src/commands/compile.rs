//! `imagegpt compile` and `imagegpt inspect`.

use std::collections::BTreeSet;
use std::io::{IsTerminal as _, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::Args;
use indicatif::{ProgressBar, ProgressStyle};

use crate::commands::output::columns;
use crate::compile::{CompileOptions, CompileProgress, CompileStep, ModelSource, compile};
use crate::engine::onnx;
use crate::model::manifest;
use crate::model::manifest::Manifest;
use crate::model::precision::{CompileTask, Precision, Provider};
use crate::runtime::Runtime;
use crate::serve::config::LibraryFlags;
use crate::telemetry::{self, LogFormat};

/// Compile graphs that run several times faster than a published export.
#[derive(Debug, Clone, Args)]
pub struct CompileArgs {
    /// Model to compile: a Hugging Face directory (config.json,
    /// preprocessor_config.json, and model.safetensors, sharded safetensors or
    /// pytorch_model.bin); a hub id such as openai/imagegpt-small (downloads
    /// honor HF_HOME, HF_TOKEN, HF_ENDPOINT, HF_HUB_OFFLINE, HF_HUB_ETAG_TIMEOUT
    /// and HF_HUB_DOWNLOAD_TIMEOUT); or random:small,
    /// random:medium, random:large or random:tiny, which have these shapes and
    /// random weights, to measure speed
    pub source: String,

    /// Directory to create; it must not exist, or it must be empty
    #[arg(long, value_name = "DIR")]
    pub output: PathBuf,

    /// Precision of the weights and of the computation: fp32 or int8
    /// (quantized) for the CPU, bf16 for a CPU with AVX512_BF16 or AMX-BF16, fp16
    /// or bf16 for a GPU
    #[arg(long, value_enum, default_value = "fp32")]
    pub precision: Precision,

    /// Tasks to compile graphs for [default: all tasks that the checkpoint has
    /// heads for]
    #[arg(long, value_enum, value_delimiter = ',')]
    pub tasks: Option<Vec<CompileTask>>,

    /// Last layer whose pooled features can be served, along with all earlier
    /// layers. Fewer layers are faster [default: two thirds of the depth, 16
    /// for imagegpt-small]
    #[arg(long, value_name = "N")]
    pub feature_layer: Option<usize>,

    /// Provider that the graphs will run on
    #[arg(long, value_enum, default_value = "cpu")]
    pub provider: Provider,

    /// Branch, tag or commit of a hub id [default: main]; says also that SOURCE
    /// is a hub id where a directory has its owner's name
    #[arg(long, value_name = "REVISION")]
    pub revision: Option<String>,

    /// Use only ONNX Runtime's own operators, so that the graphs also run
    /// outside this worker; attention on a CPU is then several times slower
    #[arg(long)]
    pub portable: bool,

    #[command(flatten)]
    pub library: LibraryFlags,
}

/// Show the contents of a compiled directory.
#[derive(Debug, Clone, Args)]
pub struct InspectArgs {
    /// Compiled directory to show
    pub folder: PathBuf,

    /// Read every file and compare its SHA-256 with the value that was recorded
    /// when the directory was compiled. Exit code 0 if all are equal, 2 with
    /// the name of the file if one differs. Reads all weights, about a second
    /// per gigabyte; a worker verifies the files that it loads in any case
    #[arg(long, env = "IMAGEGPT_VERIFY")]
    pub verify: bool,
}

/// Runs `imagegpt compile`.
///
/// # Errors
///
/// When the model cannot be read or compiled; the error says what to change.
pub fn run(args: &CompileArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let source = ModelSource::parse(&args.source, args.revision.as_deref());
    source.check()?;
    let library = onnx::find_library(args.library.onnxruntime.as_deref());
    let mut runtime = Runtime::new(onnx::environment(&library)?, args.provider)?;
    if args.portable {
        runtime.operators = None;
    }
    let options = CompileOptions {
        precision: args.precision,
        provider: args.provider,
        tasks: args
            .tasks
            .as_ref()
            .map(|tasks| tasks.iter().copied().collect::<BTreeSet<_>>()),
        feature_layer: args.feature_layer,
    };
    // What cannot be compiled at all is said first, whatever this machine lacks.
    options.check(&runtime)?;
    // A provider that cannot run fails here, not after the reference, which takes
    // minutes for a large model.
    if args.provider == Provider::Cuda {
        onnx::probe(&runtime)?;
    }
    let mut progress = Bars::new();
    let manifest = compile(&source, &args.output, &options, &runtime, &mut progress)?;
    progress.end();
    show(&manifest, out)?;
    writeln!(out, "wrote {}", args.output.display())?;
    Ok(())
}

/// Runs `imagegpt inspect`.
///
/// # Errors
///
/// When the directory is not a complete compiled model.
pub fn inspect(args: &InspectArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let folder = &args.folder;
    if !folder.join(manifest::FILE).is_file() {
        let text = folder.to_string_lossy();
        let what = match ModelSource::parse(&text, None) {
            ModelSource::Folder(_) if !folder.exists() => "there is no such directory".to_owned(),
            ModelSource::Folder(_) => format!("it has no {}", manifest::FILE),
            ModelSource::Hub { .. } | ModelSource::Random(_) => {
                "it is a source, not yet compiled".to_owned()
            }
        };
        anyhow::bail!(
            "{text}: {what}; inspect takes a directory that `imagegpt compile SOURCE --output DIR` \
             has made"
        );
    }
    let manifest = Manifest::read(folder)?;
    show(&manifest, out)?;
    if args.verify {
        manifest.verify(folder)?;
        let n_files = manifest.files.len();
        writeln!(
            out,
            "\nthe SHA-256 of each of the {n_files} files is as recorded"
        )?;
    }
    Ok(())
}

fn show(manifest: &Manifest, out: &mut impl Write) -> std::io::Result<()> {
    let architecture = &manifest.architecture;
    let revision = manifest
        .source
        .revision
        .as_ref()
        .map_or_else(String::new, |revision| format!(" at {revision}"));
    writeln!(out, "source        {}{revision}", manifest.source.name)?;
    writeln!(out, "weights       {}", manifest.source.weights_digest())?;
    writeln!(
        out,
        "shape         {} layers, width {}, {} heads, {} positions, {} colors",
        architecture.n_layers,
        architecture.width,
        architecture.n_heads,
        architecture.n_positions,
        architecture.n_colors()
    )?;
    let (backbone, all) = manifest.parameters;
    writeln!(
        out,
        "parameters    {backbone} in the backbone, {all} in all"
    )?;
    writeln!(
        out,
        "precision     {} for {}, features to layer {}",
        manifest.precision.name(),
        manifest.provider.runtime_name(),
        manifest.feature_layer
    )?;
    writeln!(
        out,
        "verified      {} sequences of {} tokens against float64, tolerance {:.0e}",
        manifest.verification.n_sequences,
        manifest.verification.n_positions,
        manifest.verification.tolerance
    )?;
    writeln!(out)?;
    let header = [
        "graph",
        "layers",
        "GFLOP/image",
        "worst error",
        "cosine",
        "ran",
    ];
    let mut rows = vec![header.map(str::to_owned).to_vec()];
    for (name, graph) in &manifest.graphs {
        let worst = graph.errors.iter().copied().fold(0.0, f64::max);
        #[expect(clippy::cast_precision_loss, reason = "shown with four digits")]
        let gflop = graph.flop as f64 / 1e9;
        let fused: Vec<String> = graph
            .operators
            .iter()
            .flat_map(|(provider, operators)| {
                let provider = provider.trim_end_matches("ExecutionProvider");
                operators
                    .iter()
                    .filter(|(operator, _)| FUSED.contains(&operator.as_str()))
                    .map(move |(operator, n)| format!("{n} {operator} on {provider}"))
            })
            .collect();
        rows.push(vec![
            name.clone(),
            graph.n_layers.to_string(),
            format!("{gflop:.4}"),
            format!("{worst:.1e}"),
            format!("{:.6}", graph.cosine),
            fused.join(", "),
        ]);
    }
    columns(rows, |column| (1..=4).contains(&column), out)?;
    writeln!(out)?;
    let files = manifest.files.iter();
    let files = files.map(|(name, bytes)| vec![name.clone(), format!("{bytes} bytes")]);
    columns(files, |column| column == 1, out)
}

/// Fused operators, each of which replaces several of ONNX's own.
const FUSED: [&str; 12] = [
    "ImageLayers",
    "Layers",
    "MultiHeadAttention",
    "GroupQueryAttention",
    "SimplifiedLayerNormalization",
    "QuickGelu",
    "QuickGeluFp16",
    "QuickGeluBf16",
    "Gelu",
    "FastGelu",
    "DynamicQuantizeMatMul",
    "SkipSimplifiedLayerNormalization",
];

/// Progress for a person: a bar per step on a terminal, a line per step
/// elsewhere, which is a line of the log if there is one.
pub struct Bars {
    current: Option<ProgressBar>,
    /// True if bars are shown: a bar may stand between lines of text, and not
    /// between objects.
    shows_bars: bool,
}

impl Bars {
    #[must_use]
    pub fn new() -> Self {
        Self {
            current: None,
            shows_bars: std::io::stderr().is_terminal()
                && telemetry::log_format() != Some(LogFormat::Json),
        }
    }

    /// Clears the last bar.
    pub fn end(&mut self) {
        if let Some(bar) = self.current.take() {
            bar.finish_and_clear();
        }
    }
}

impl Default for Bars {
    fn default() -> Self {
        Self::new()
    }
}

impl CompileProgress for Bars {
    fn begin(&mut self, step: CompileStep, total: u64) {
        self.end();
        let (name, unit) = match step {
            CompileStep::Download => ("downloading", "{bytes}/{total_bytes}"),
            CompileStep::Digest => ("reading the source", "{bytes}/{total_bytes}"),
            CompileStep::Calibrate => ("calibrating 8-bit weights", "{percent}%"),
            CompileStep::Write => ("writing weights", "{percent}%"),
            CompileStep::Reference => ("computing the reference", "{percent}%"),
            CompileStep::Verify => ("trying graphs", "{pos}/{len}"),
        };
        if !self.shows_bars {
            match telemetry::log_format() {
                Some(_) => tracing::info!(step = name, total, "compiling"),
                None => telemetry::note(name),
            }
            return;
        }
        let template = format!("{{prefix:24}} {{wide_bar}} {unit} {{eta}}");
        let style = ProgressStyle::with_template(&template)
            .unwrap_or_else(|_| ProgressStyle::default_bar());
        let bar = ProgressBar::new(total).with_style(style).with_prefix(name);
        bar.enable_steady_tick(Duration::from_millis(200));
        self.current = Some(bar);
    }

    fn advance(&mut self, units: u64) {
        if let Some(bar) = &self.current {
            bar.inc(units);
        }
    }
}
