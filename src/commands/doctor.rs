//! `imagegpt doctor`: checks whether this machine can serve, on which
//! providers, and says what to install if not.
//!
//! Three steps: look (`machine`, `cache`, `library`, `gpu`), judge (`judge`,
//! which only gets findings and never looks at the machine) and show
//! (`report`). Looking alone does not prove that a provider works, so the judge
//! also has each provider tried (`trial`). Code that calls a driver or loads a
//! library runs in a child process with a time limit (`child`): a driver that
//! crashes its process, or never answers, must not prevent the report.

mod cache;
mod child;
mod judge;
mod library;
mod machine;
mod report;
mod trial;

use std::io::Write;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, ValueEnum};

use self::cache::CacheFinding;
use self::judge::{Asked, DriverFindings, MachineFindings};
use self::library::{CudaProvider, Library};
use self::machine::MachineLimits;
use crate::compile::ModelSource;
use crate::gpu::Monitor;
use crate::model::precision::{Provider, ProviderChoice};
use crate::serve::config::bounds::{DAY, bounded_time};
use crate::serve::config::{CacheFlags, DeviceFlags, LibraryFlags};

/// Check this machine.
#[derive(Debug, Clone, Args)]
#[command(
    mut_arg("execution_provider", |arg| {
        arg.help("Provider to check. With auto, one provider that can run the model suffices")
            .long_help(None)
    }),
    mut_arg("ids", |arg| {
        arg.help("Numbers of the GPUs to check, counted from 0 among the GPUs that CUDA shows")
            .long_help(None)
    })
)]
pub struct DoctorArgs {
    /// Model directory to try, as for serve; compiled into --cache-dir first if
    /// needed. Nothing is downloaded [default: a tiny model with random
    /// weights, made for the check]
    // IMAGEGPT_MODEL is not read: beside a worker that serves this model,
    // memory may not suffice for a second copy.
    #[arg(long, value_name = "SOURCE")]
    pub model: Option<String>,

    #[command(flatten)]
    pub library: LibraryFlags,

    #[command(flatten)]
    pub devices: DeviceFlags,

    #[command(flatten)]
    pub cache: CacheFlags,

    /// Longest wait for an answer of ONNX Runtime's library, of CUDA's
    /// libraries and of NVIDIA's driver, each. Raise it where many GPUs have to
    /// wake up
    #[arg(
        long,
        env = "IMAGEGPT_LOOK_TIMEOUT",
        default_value = "1min",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, DAY)
    )]
    pub look_timeout: Duration,

    /// Format of the report: a table for a person, or one JSON object
    #[arg(long, value_enum, default_value = "table")]
    pub format: ReportFormat,

    /// Only run a model on this provider and report the result; the command
    /// starts itself with this flag
    #[arg(long, hide = true, value_enum, value_name = "PROVIDER")]
    pub trial: Option<Provider>,

    /// Only look at this part and print the findings as JSON; the command
    /// starts itself with this flag
    #[arg(long, hide = true, value_enum, value_name = "PART")]
    pub look: Option<CheckPart>,
}

/// Parts of the machine that a child process looks at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CheckPart {
    /// ONNX Runtime's library.
    Library,
    /// Libraries that ONNX Runtime's CUDA provider is linked with.
    Cuda,
    /// NVIDIA's driver, and NVML.
    Gpus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    Table,
    Json,
}

/// Result of the command: whether a worker could serve with the given flags.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Diagnosis {
    CanServe,
    CannotServe,
}

/// Runs `imagegpt doctor` and writes the report to `out`.
///
/// # Errors
///
/// When the flags cannot be used, or the report cannot be written.
pub fn run(args: &DoctorArgs, out: &mut impl Write) -> anyhow::Result<Diagnosis> {
    if let Some(model) = &args.model {
        let source = ModelSource::parse(model, None);
        if let ModelSource::Hub { repository, .. } = source {
            bail!("--model {repository} is not a directory, and the doctor downloads nothing");
        }
        source.check()?;
    }
    let id = args.devices.ids.first().copied().unwrap_or_default();
    if let Some(provider) = args.trial {
        child::answer(&trial::here(args, provider, id), out)?;
        return Ok(Diagnosis::CanServe);
    }
    if let Some(part) = args.look {
        look_here(args, part, out)?;
        return Ok(Diagnosis::CanServe);
    }
    args.devices.validate()?;
    let asked = Asked {
        provider: args.devices.provider.execution_provider,
        device_ids: args.devices.ids.clone(),
    };
    let found = look(args);
    let report = judge::judge(&asked, &found, &mut |provider, id| {
        trial::in_a_process(args, provider, id)
    });
    match args.format {
        ReportFormat::Table => report.table(out)?,
        ReportFormat::Json => report.json(out)?,
    }
    Ok(if report.can_serve {
        Diagnosis::CanServe
    } else {
        Diagnosis::CannotServe
    })
}

/// Collects all findings that the judge needs.
fn look(args: &DoctorArgs) -> MachineFindings {
    let library = child::ask(args, &["--look", "library"], args.look_timeout);
    let library =
        library.unwrap_or_else(|lost| Library::lost(args.library.onnxruntime.as_deref(), &lost));
    let mut found = MachineFindings {
        machine: MachineLimits::here(),
        cache: CacheFinding::find(args.cache.cache_dir.as_deref()),
        library,
        cuda: None,
        gpus: Ok(DriverFindings::default()),
        visible_devices: std::env::var("CUDA_VISIBLE_DEVICES").ok(),
    };
    if args.devices.provider.execution_provider == ProviderChoice::Cpu {
        return found;
    }
    if found.library.folder.is_some() {
        let cuda = child::ask(args, &["--look", "cuda"], args.look_timeout);
        found.cuda = cuda.unwrap_or_else(|lost| Some(CudaProvider::lost(&lost)));
    }
    let gpus = child::ask(args, &["--look", "gpus"], args.look_timeout);
    found.gpus = gpus.map_err(|lost| lost.to_string());
    found
}

/// Looks at one part of the machine in this process.
fn look_here(args: &DoctorArgs, part: CheckPart, out: &mut impl Write) -> anyhow::Result<()> {
    let library = || Library::find(args.library.onnxruntime.as_deref());
    match part {
        CheckPart::Library => child::answer(&library(), out),
        CheckPart::Cuda => {
            let folder = library().folder;
            child::answer(&folder.as_deref().map(CudaProvider::find), out)
        }
        CheckPart::Gpus => {
            let monitor = Monitor::open();
            let ids: Vec<i32> = monitor.gpus.devices.iter().map(|gpu| gpu.id).collect();
            let usage = monitor.usage(&ids);
            let gpus = monitor.gpus;
            child::answer(&DriverFindings { gpus, usage }, out)
        }
    }
}
