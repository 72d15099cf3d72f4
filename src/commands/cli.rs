//! Command line of the program: commands, and the codes that they exit with.

use clap::{Parser, Subcommand};

use crate::commands::ImageCommand;
use crate::commands::bench::flags::BenchArgs;
use crate::commands::compile::{CompileArgs, InspectArgs};
use crate::commands::doctor::DoctorArgs;
use crate::commands::embed::flags::EmbedArgs;
use crate::serve::config::ServeConfig;

/// Exit codes, each with its meaning. `imagegpt serve` and the commands share them.
pub mod exit {
    /// All was done that was asked for.
    pub const DONE: i32 = 0;
    /// Some of it was not.
    pub const FAILED: i32 = 1;
    /// Flags or files are wrong: what clap exits with, too.
    pub const USAGE: i32 = 2;
    /// A stage of the worker failed while it served: only a restart helps.
    pub const WORKER: i32 = 3;
    /// The device failed: a restart helps, perhaps only on another node.
    pub const DEVICE: i32 = 4;
    /// A job was told to end: the same command goes on.
    pub const RESUMABLE: i32 = 5;
    /// Too many images of a dataset failed: the same command would end so again.
    pub const ERRORS: i32 = 6;
    /// A command was told to end: what a shell takes SIGINT for.
    pub const INTERRUPTED: i32 = 130;

    /// All of them by name.
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

/// Commands of the program.
#[derive(Debug, Subcommand)]
pub enum CliCommand {
    /// Serve a model over gRPC
    Serve(Box<ServeConfig>),
    /// Make graphs that run several times faster than a published export
    Compile(CompileArgs),
    /// Show what a compiled directory holds
    Inspect(InspectArgs),
    #[command(flatten)]
    Image(ImageCommand),
    /// Embed or classify a dataset of any size: files, WebDataset or Parquet in,
    /// Parquet out; killed at any moment, the same command goes on
    Embed(Box<EmbedArgs>),
    /// Load a worker and measure what it does
    Bench(Box<BenchArgs>),
    /// Check whether this machine can serve, and say what to install
    ///
    /// Looks at CPU, memory, ONNX Runtime, the NVIDIA driver and CUDA's
    /// libraries, and runs a tiny model on each provider. Exit code 0 if a
    /// worker can serve with what was asked for, 1 if not, 2 if the flags are
    /// wrong.
    Doctor(DoctorArgs),
}
