//! Command line of the program: its commands and exit codes.

use std::ffi::{OsStr, OsString};

use clap::builder::{BoolishValueParser, Resettable};
use clap::{ArgAction, Command, CommandFactory as _, FromArgMatches as _, Parser, Subcommand};

use crate::commands::ImageCommand;
use crate::commands::bench::flags::BenchArgs;
use crate::commands::compile::{CompileArgs, InspectArgs};
use crate::commands::completions::{CompletionsArgs, ManArgs};
use crate::commands::doctor::DoctorArgs;
use crate::commands::embed::flags::EmbedArgs;
use crate::commands::probe::flags::ProbeCommand;
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
    /// Parses the arguments of a process. A flag among them is the answer to
    /// questions that an environment may answer otherwise for all commands, so
    /// variables that contradict the flag are not read: those of `BEATEN`. A
    /// variable that is empty is as good as none.
    ///
    /// # Errors
    ///
    /// When the arguments are wrong, or ask for help or the version.
    pub fn try_from_args(args: Vec<OsString>) -> Result<Self, clap::Error> {
        let is_given = |flag: &str| {
            args.iter().filter_map(|arg| arg.to_str()).any(|arg| {
                let value = arg.strip_prefix(flag);
                value.is_some_and(|value| value.is_empty() || value.starts_with('='))
            })
        };
        let is_beaten = |name: &OsStr| {
            let beaten = BEATEN.iter().filter(|(flag, _)| is_given(flag));
            beaten
                .flat_map(|(_, names)| *names)
                .any(|&beaten| name == beaten)
        };
        let is_empty = |name: &OsStr| std::env::var_os(name).is_some_and(|value| value.is_empty());
        let command = with_variables(Self::command(), &|name| is_beaten(name) || is_empty(name));
        Self::from_arg_matches(&command.try_get_matches_from(args)?)
    }
}

/// Variables that are not read beside a flag which they contradict.
const BEATEN: [(&str, &[&str]); 6] = [
    ("--model", &["IMAGEGPT_ENDPOINT"]),
    ("--shard", &["IMAGEGPT_SHARDS"]),
    ("--shards", &["IMAGEGPT_SHARD"]),
    ("--finish", &["IMAGEGPT_SHARD", "IMAGEGPT_SHARDS"]),
    (
        "--public-addresses-only",
        &["IMAGEGPT_LINK_LOCAL_ADDRESSES"],
    ),
    (
        "--link-local-addresses",
        &["IMAGEGPT_PUBLIC_ADDRESSES_ONLY"],
    ),
];

/// Changes how a command and its own commands read the environment: variables
/// that are `unread` are left out, and the variable of a flag without a value
/// takes 1, yes, on and true, and 0, no, off and false.
fn with_variables(command: Command, unread: &dyn Fn(&OsStr) -> bool) -> Command {
    command
        .mut_args(|arg| match arg.get_env() {
            Some(name) if unread(name) => arg.env(Resettable::Reset),
            Some(_) if matches!(arg.get_action(), ArgAction::SetTrue) => {
                arg.value_parser(BoolishValueParser::new())
            }
            _ => arg,
        })
        .mut_subcommands(|command| with_variables(command, unread))
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
    /// Fit linear classifiers on features (linear probes), and measure them
    #[command(subcommand)]
    Probe(ProbeCommand),
    /// Load a worker and measure its throughput and latency
    Bench(Box<BenchArgs>),
    /// Check whether this machine can serve a model, and say what to install
    ///
    /// Looks at CPU, memory, ONNX Runtime, the NVIDIA driver and CUDA's
    /// libraries, and runs a tiny model on each provider. Exit code 0 if a
    /// worker can serve with the given flags, 1 if not, 2 if the flags are
    /// wrong.
    Doctor(DoctorArgs),
    /// Print a script that completes commands, flags and values in a shell
    ///
    /// For bash: `eval "$(imagegpt completions bash)"`, or the script as a file
    /// in ~/.local/share/bash-completion/completions/imagegpt. For zsh: the
    /// script as a file _imagegpt in a directory of $fpath. For fish: the
    /// script as ~/.config/fish/completions/imagegpt.fish.
    Completions(CompletionsArgs),
    /// Write the manual pages: one page per command, for `man`
    Man(ManArgs),
}

impl CliCommand {
    /// Returns true if the command has no log, and its warnings go to standard
    /// error as lines. Completions and manual pages are made for a shell, at each
    /// start of one.
    pub fn warns_on_stderr(&self) -> bool {
        match self {
            Self::Serve(_)
            | Self::Embed(_)
            | Self::Probe(_)
            | Self::Completions(_)
            | Self::Man(_) => false,
            Self::Compile(_)
            | Self::Inspect(_)
            | Self::Image(_)
            | Self::Bench(_)
            | Self::Doctor(_) => true,
        }
    }
}
