//! Command line of the program: its commands and exit codes.

use std::ffi::{OsStr, OsString};

use clap::builder::Resettable;
use clap::{CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::commands::ImageCommand;
use crate::commands::bench::flags::BenchArgs;
use crate::commands::compile::{CompileArgs, InspectArgs};
use crate::commands::doctor::DoctorArgs;
use crate::commands::embed::flags::EmbedArgs;
use crate::serve::config::ServeConfig;

/// Exit codes and their meaning, shared by `imagegpt serve` and all commands.
pub mod exit {
    /// Success: everything that was asked for was done.
    pub const DONE: i32 = 0;
    /// Partial failure: a part of the work was not done.
    pub const FAILED: i32 = 1;
    /// Wrong flags or files; clap exits with the same code.
    pub const USAGE: i32 = 2;
    /// A stage of the worker failed while the worker was serving; only a
    /// restart helps.
    pub const WORKER: i32 = 3;
    /// The device failed; a restart helps, perhaps only on another node.
    pub const DEVICE: i32 = 4;
    /// A job was told to end; the same command resumes the job.
    pub const RESUMABLE: i32 = 5;
    /// Too many images of a dataset failed; the same command would end in the
    /// same way again.
    pub const ERRORS: i32 = 6;
    /// A command was told to end; a shell reports SIGINT with the same code.
    pub const INTERRUPTED: i32 = 130;

    /// All exit codes by name.
    pub const ALL: [(&str, i32); 8] = [
        ("done", DONE),
        ("failed", FAILED),
        ("usage", USAGE),
        ("worker", WORKER),
        ("device", DEVICE),
        ("resumable", RESUMABLE),
        ("errors", ERRORS),
        ("interrupted", INTERRUPTED),
    ];
}

/// ImageGPT over gRPC: images become color tokens, tokens become features and
/// class scores, through ONNX Runtime
#[derive(Debug, Parser)]
#[command(name = "imagegpt", version, max_term_width = 100)]
pub struct Cli {
    #[command(subcommand)]
    pub command: CliCommand,
}

impl Cli {
    /// Parses the arguments of a process. A `--model` among them is an answer to
    /// the question which worker is asked, so the variable for `--endpoint`,
    /// which an environment may set for all commands, is then not read.
    ///
    /// # Errors
    ///
    /// When the arguments are wrong, or ask for help or the version.
    pub fn try_from_args(args: Vec<OsString>) -> Result<Self, clap::Error> {
        let is_model = |arg: &OsString| {
            arg.to_str()
                .is_some_and(|arg| arg == "--model" || arg.starts_with("--model="))
        };
        let mut command = Self::command();
        if args.iter().any(is_model) {
            command = command.mut_subcommands(|command| {
                command.mut_args(|arg| {
                    if arg.get_env() == Some(OsStr::new("IMAGEGPT_ENDPOINT")) {
                        arg.env(Resettable::Reset)
                    } else {
                        arg
                    }
                })
            });
        }
        Self::from_arg_matches(&command.try_get_matches_from(args)?)
    }
}

/// Commands of the program.
#[derive(Debug, Subcommand)]
pub enum CliCommand {
    /// Serve a model over gRPC
    Serve(Box<ServeConfig>),
    /// Compile graphs that run several times faster than a published export
    Compile(CompileArgs),
    /// Show the contents of a compiled directory
    Inspect(InspectArgs),
    #[command(flatten)]
    Image(ImageCommand),
    /// Embed or classify a dataset of any size. Reads files, WebDataset or
    /// Parquet and writes Parquet. Resumable: after the process was killed, the
    /// same command continues
    Embed(Box<EmbedArgs>),
    /// Load a worker and measure its throughput and latency
    Bench(Box<BenchArgs>),
    /// Check whether this machine can serve a model, and say what to install
    ///
    /// Looks at CPU, memory, ONNX Runtime, the NVIDIA driver and CUDA's
    /// libraries, and runs a tiny model on each provider. Exit code 0 if a
    /// worker can serve with the given flags, 1 if not, 2 if the flags are
    /// wrong.
    Doctor(DoctorArgs),
}
