//! `imagegpt doctor`: whether this machine can serve, on what, and if not, what
//! to install.
//!
//! Three steps: look (`machine`, `cache`, `library`, `gpu`), judge (`judge`, which
//! is told what was seen and touches nothing) and show (`report`). What is seen is
//! only half of it, so the judge has each provider tried (`trial`). Whatever calls
//! a driver or loads a library does so in a process of its own, with a limit in
//! time (`child`): a driver that takes its process with it, or never answers, must
//! not take the report.

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
        arg.help("What is to run the model. With auto it suffices that something can")
            .long_help(None)
    }),
    mut_arg("ids", |arg| {
        arg.help("Which GPUs, counted from 0 among those that CUDA shows this process")
            .long_help(None)
    })
)]
pub struct DoctorArgs {
    /// A directory to try, as for serve; what has to be compiled is compiled into
    /// --cache-dir. Nothing is downloaded [default: a tiny model of random
    /// weights, made on the spot]
    // IMAGEGPT_MODEL is not read: beside a worker that serves it, a second copy
    // might not fit.
    #[arg(long, value_name = "SOURCE")]
    pub model: Option<String>,

    #[command(flatten)]
    pub library: LibraryFlags,

    #[command(flatten)]
    pub devices: DeviceFlags,

    #[command(flatten)]
    pub cache: CacheFlags,

    /// How long ONNX Runtime's library, CUDA's and NVIDIA's driver may take to
    /// answer, each. Raise it where many GPUs have to wake up
    #[arg(
        long,
        env = "IMAGEGPT_LOOK_TIMEOUT",
        default_value = "1min",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, DAY)
    )]
    pub look_timeout: Duration,

    /// A table for a person, or one JSON object
    #[arg(long, value_enum, default_value = "table")]
    pub format: ReportFormat,

    /// Only run a model on this provider, and say how it went; what the command
    /// starts itself by
    #[arg(long, hide = true, value_enum, value_name = "PROVIDER")]
    pub trial: Option<Provider>,

    /// Only look at this, and say in JSON what there is; as --trial
    #[arg(long, hide = true, value_enum, value_name = "PART")]
    pub look: Option<CheckPart>,
}

/// What is looked at in a process of its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum CheckPart {
    /// ONNX Runtime's library.
    Library,
    /// What its CUDA provider is linked with.
    Cuda,
    /// NVIDIA's driver, and NVML.
    Gpus,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ReportFormat {
    Table,
    Json,
}

/// Whether a worker could serve with what was asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Diagnosis {
    CanServe,
    CannotServe,
}

/// Runs the command.
///
/// # Errors
///
/// When the flags cannot be used, or nobody takes what is printed.
pub fn run(args: &DoctorArgs, out: &mut impl Write) -> anyhow::Result<Diagnosis> {
    if let Some(model) = &args.model
        && let ModelSource::Hub { repository, .. } = ModelSource::parse(model, None)
    {
        bail!("--model {repository} is no directory; the doctor downloads nothing");
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

/// Sees all that the judge wants to know.
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

/// Looks at one part in this process.
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
