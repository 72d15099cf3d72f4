//! Flags of `imagegpt bench`. `--help` prints the comments.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::TypedValueParser;
use clap::parser::ValueSource;
use clap::{Arg, ArgMatches, Args, Command, FromArgMatches, Subcommand, ValueEnum};
use serde::Serialize;

use super::engine::EngineArgs;
use crate::client::ConnectConfig;
use crate::client::load::Method;
use crate::proto::Priority;
use crate::serve::config::bounds::{DAY, bounded_number, bounded_time};

/// Load a worker and measure what it does.
#[derive(Debug, Clone, Args)]
#[command(subcommand_precedence_over_arg = true)]
pub struct BenchArgs {
    // First: parsing the others takes their values away.
    #[command(flatten)]
    given: Given,
    #[command(flatten)]
    pub flags: Flags,
    #[command(subcommand)]
    pub mode: Mode,
}

/// Which of [`Flags`] are on the command line: one that has a default does not
/// tell by its value.
#[derive(Debug, Clone, Default)]
struct Given(Vec<String>);

impl FromArgMatches for Given {
    fn from_arg_matches(matches: &ArgMatches) -> Result<Self, clap::Error> {
        let flags = Flags::augment_args(Command::new("bench"));
        let is_given = |arg: &&Arg| {
            matches.value_source(arg.get_id().as_str()) == Some(ValueSource::CommandLine)
        };
        let given = flags.get_arguments().filter(is_given);
        Ok(Self(
            given
                .filter_map(|arg| arg.get_long().map(ToOwned::to_owned))
                .collect(),
        ))
    }

    fn update_from_arg_matches(&mut self, matches: &ArgMatches) -> Result<(), clap::Error> {
        *self = Self::from_arg_matches(matches)?;
        Ok(())
    }
}

impl Args for Given {
    fn augment_args(command: Command) -> Command {
        command
    }

    fn augment_args_for_update(command: Command) -> Command {
        command
    }
}

/// What holds for every mode.
#[derive(Debug, Clone, Args)]
pub struct Flags {
    /// Where workers listen; of several, each gets every other connection
    #[arg(
        long = "endpoint",
        global = true,
        env = "IMAGEGPT_ENDPOINT",
        default_value = "http://127.0.0.1:50051",
        value_delimiter = ',',
        num_args = 1..,
        value_name = "URL"
    )]
    pub endpoints: Vec<String>,

    #[command(flatten)]
    pub connect: ConnectConfig,

    /// What is asked for
    #[arg(long, global = true, value_enum, default_value = "embed")]
    pub task: Method,

    /// Images in each call
    #[arg(
        long,
        global = true,
        default_value_t = 1,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub images_per_call: u32,

    /// Send the image files of this folder instead of random tokens, so that
    /// decoding is measured too
    #[arg(long, global = true, value_name = "DIR")]
    pub images: Option<PathBuf>,

    /// Share of images that repeat (0 to 1), to see what coalescing and a cache
    /// save. All others differ, so that neither flatters the worker
    #[arg(long, global = true, default_value_t = 0.0, value_name = "SHARE", value_parser = bounded_number(0.0, 1.0))]
    pub repeat_share: f64,

    /// Connections to each endpoint. A worker serves a connection on one core
    /// at a time, and takes some 200 calls at once on each [default: enough for
    /// all calls that the worker has room for, 8 to 64]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub connections: Option<u16>,

    /// Callers of a closed loop, each with one call at a time; saturate takes
    /// several numbers, one measurement each [default: four full batches, at
    /// least 16, at most what the worker has room for]
    #[arg(
        long,
        global = true,
        value_delimiter = ',',
        value_name = "N[,N]",
        value_parser = clap::value_parser!(u16).range(1..=16_384)
    )]
    pub callers: Vec<u16>,

    /// Calls that an open loop has in flight at most. More that are due wait,
    /// and their latency counts from when they were due; the table then says
    /// that the tool was late
    #[arg(
        long,
        global = true,
        default_value_t = 8192,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub in_flight_max: u32,

    /// Time before each measurement that does not count. Longer than a call
    /// takes under this load
    #[arg(long, global = true, default_value = "2s", value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub warm_up: Duration,

    /// Time of each measurement. For a slow model take at least 50 batches, or
    /// the last one to fall into it decides the figure
    #[arg(long, global = true, default_value = "10s", value_name = "TIME", value_parser = bounded_time(TIME_MIN, DAY))]
    pub duration: Duration,

    /// Measure this number of calls of a closed loop instead of a time
    #[arg(
        long,
        global = true,
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000)
    )]
    pub requests: Option<u64>,

    /// Answers later than this do not count as goodput [default: all count]
    #[arg(long, global = true, value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub slo: Option<Duration>,

    /// Deadline that each call is sent with (grpc-timeout) [default: none]
    #[arg(long, global = true, value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub deadline: Option<Duration>,

    /// After this time the tool gives a call up as CLIENT_TIMEOUT
    #[arg(long, global = true, default_value = "60s", value_name = "TIME", value_parser = bounded_time(TIME_MIN, DAY))]
    pub timeout: Duration,

    /// Class that calls are sent with [default: none is named]
    #[arg(long, global = true, value_enum)]
    pub priority: Option<Priority>,

    /// How often a call that ends UNAVAILABLE is tried again, each time on the
    /// next connection: what a client with round robin does
    #[arg(
        long,
        global = true,
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u8).range(0..=100)
    )]
    pub retries: u8,

    /// Space the calls of open loops evenly. Otherwise they arrive by Poisson,
    /// as independent callers do, which is harder
    #[arg(long, global = true)]
    pub constant: bool,

    /// Seed of images and arrivals; the same one repeats a run
    #[arg(long, global = true, default_value_t = 1, value_name = "N")]
    pub seed: u64,

    /// Process ids of the workers on this machine: adds CPU, memory, and
    /// requests a second a core
    #[arg(long = "pid", global = true, value_delimiter = ',', value_name = "PID")]
    pub pids: Vec<u32>,

    /// Write every number to this file
    #[arg(long, global = true, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Draw latency against load into this SVG file
    #[arg(long, global = true, value_name = "FILE")]
    pub plot: Option<PathBuf>,

    /// Threads of the tool itself. Keep it away from the worker's cores where
    /// there are enough [default: the machine's, at most 4]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub client_threads: Option<u16>,
}

/// What is measured.
#[derive(Debug, Clone, Subcommand)]
pub enum Mode {
    /// Closed loop: how much the worker does at most
    Saturate,
    /// Open loop: how long callers wait at a given load
    Load(LoadArgs),
    /// More than the worker can do: what is left of it, and how refusals come
    Overload(OverloadArgs),
    /// Interactive calls beside a bulk load that takes all it gets
    Mixed(MixedArgs),
    /// Callers beside clients of EmbedStream that stop reading
    SlowReader(SlowReaderArgs),
    /// Mixed load with cancels, garbage and short deadlines, each answer
    /// verified; exit code 1 when something broke
    Soak(SoakArgs),
    /// The highest load, or the best flags, for a given p99
    Knee(KneeArgs),
    /// No worker: each graph of a model in a bare loop, against the rate of a
    /// large matrix product. Of the flags of the other modes it takes --json and
    /// --seed
    Engine(EngineArgs),
}

impl Mode {
    #[must_use]
    pub fn name(&self) -> &'static str {
        match self {
            Self::Saturate => "saturate",
            Self::Load(_) => "load",
            Self::Overload(_) => "overload",
            Self::Mixed(_) => "mixed",
            Self::SlowReader(_) => "slow-reader",
            Self::Soak(_) => "soak",
            Self::Knee(_) => "knee",
            Self::Engine(_) => "engine",
        }
    }
}

#[derive(Debug, Clone, Args)]
pub struct LoadArgs {
    /// Images a second, one measurement each
    #[arg(long, value_delimiter = ',', value_name = "R[,R]", value_parser = rate(), conflicts_with = "of_saturation")]
    pub rate: Vec<f64>,

    /// The same in percent of the saturation, which is measured first
    #[arg(long, value_delimiter = ',', value_name = "P[,P]", default_value = "50,80,95", value_parser = percent())]
    pub of_saturation: Vec<f64>,
}

#[derive(Debug, Clone, Args)]
pub struct OverloadArgs {
    /// How many times the saturation, which is measured first
    #[arg(long, value_delimiter = ',', value_name = "X[,X]", default_value = "1.5,3", value_parser = bounded_number(0.01, 100.0))]
    pub times: Vec<f64>,
}

/// How a bulk load comes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BulkKind {
    /// EmbedStream; plain calls if the worker does not serve it
    Stream,
    /// Plain calls with the metadata `imagegpt-priority: bulk`
    Unary,
}

#[derive(Debug, Clone, Args)]
pub struct MixedArgs {
    /// Interactive images a second
    #[arg(long, value_name = "R", value_parser = rate(), conflicts_with = "of_saturation")]
    pub rate: Option<f64>,

    /// The same in percent of the saturation, which is measured first
    #[arg(long, value_name = "P", default_value = "30", value_parser = percent())]
    pub of_saturation: f64,

    /// How the bulk load comes
    #[arg(long, value_enum, default_value = "stream")]
    pub bulk: BulkKind,

    /// Bulk streams, or callers [default: 2 streams, or callers for four full
    /// batches]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub bulk_clients: Option<u16>,
}

#[derive(Debug, Clone, Args)]
pub struct SlowReaderArgs {
    /// Images a second of the callers that do read
    #[arg(long, value_name = "R", value_parser = rate(), conflicts_with = "of_saturation")]
    pub rate: Option<f64>,

    /// The same in percent of the saturation, which is measured first
    #[arg(long, value_name = "P", default_value = "50", value_parser = percent())]
    pub of_saturation: f64,

    /// Streams that do not read
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub readers: u16,
}

#[derive(Debug, Clone, Args)]
pub struct SoakArgs {
    /// Streams among the clients, if the worker serves EmbedStream
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub streams: u16,

    /// Growth of the worker's memory that counts as broken, in KiB a minute
    /// after the first quarter of the time; needs --pid and a --duration of 90s
    /// or more [default: it is only reported]
    #[arg(long, value_name = "KIB", value_parser = rate())]
    pub rss_slope_max: Option<f64>,
}

#[derive(Debug, Clone, Args)]
pub struct KneeArgs {
    /// What 99 % of calls must be answered in
    #[arg(long, value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub p99: Duration,

    /// Start workers with these flags of `imagegpt serve` (split at spaces) and
    /// each of the settings below, and recommend one. Without it, the running
    /// worker's highest rate is found
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    pub serve: Option<String>,

    /// Values of --max-batch-size to try
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N[,N]",
        default_value = "1,2,4,8",
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub batch_sizes: Vec<u16>,

    /// Values of --max-queue-delay to try
    #[arg(long, value_delimiter = ',', value_name = "TIME[,TIME]", default_value = "0ms,2ms", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub queue_delays: Vec<Duration>,

    /// The program that serves [default: this one]
    #[arg(long, value_name = "FILE", hide = true)]
    pub program: Option<PathBuf>,
}

/// Shorter ones measure nothing.
const TIME_MIN: Duration = Duration::from_millis(1);
/// The quarter that warms up, and then a minute of readings and some to spare.
const SLOPE_SOAK_MIN: Duration = Duration::from_secs(90);

/// Images a second.
fn rate() -> impl TypedValueParser<Value = f64> {
    bounded_number(0.001, 1e7)
}

/// Percent of the saturation.
fn percent() -> impl TypedValueParser<Value = f64> {
    bounded_number(0.1, 1000.0)
}

/// What `engine` takes of the flags of the other modes.
const OF_ENGINE: [&str; 2] = ["json", "seed"];

impl BenchArgs {
    /// Checks what no flag can check by itself.
    ///
    /// # Errors
    ///
    /// One sentence that names the flags and says what to change.
    pub fn validate(&self) -> anyhow::Result<()> {
        if let Mode::Engine(_) = self.mode {
            let strange = self
                .given
                .0
                .iter()
                .find(|flag| !OF_ENGINE.contains(&flag.as_str()));
            if let Some(flag) = strange {
                anyhow::bail!(
                    "--{flag} is for modes that load a worker, and engine has none; drop it"
                );
            }
        }
        anyhow::ensure!(
            self.flags.plot.is_none() || !matches!(self.mode, Mode::Soak(_)),
            "--plot draws latency against load, and soak has one load; drop it"
        );
        self.flags.validate(&self.mode)
    }
}

impl Flags {
    fn validate(&self, mode: &Mode) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.requests.is_none() || matches!(mode, Mode::Saturate),
            "--requests counts the calls of a closed loop, which only saturate is; use --duration"
        );
        anyhow::ensure!(
            self.task == Method::Embed || !matches!(mode, Mode::Soak(_)),
            "soak verifies embeddings; drop --task"
        );
        if let Mode::Soak(args) = mode {
            anyhow::ensure!(
                args.rss_slope_max.is_none() || self.duration >= SLOPE_SOAK_MIN,
                "--rss-slope-max: growth a minute is not to be had in so short a --duration; it \
                 must be {} or more",
                humantime::format_duration(SLOPE_SOAK_MIN)
            );
        }
        if let Mode::Knee(args) = mode {
            anyhow::ensure!(
                args.serve.is_none() || self.pids.is_empty(),
                "--pid: knee knows the workers that it starts with --serve; drop --pid"
            );
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser)]
    struct Cli {
        #[command(flatten)]
        bench: BenchArgs,
    }

    fn check(args: &[&str], expected: Result<&str, &str>) {
        let parsed = Cli::try_parse_from(std::iter::once(&"bench").chain(args));
        let got = match parsed {
            Ok(Cli { bench }) => match bench.validate() {
                Ok(()) => Ok(format!("{:?} {:?}", bench.mode, bench.flags.endpoints)),
                Err(error) => Err(error.to_string()),
            },
            Err(error) => Err(error.to_string()),
        };
        match (&got, expected) {
            (Ok(got), Ok(expected)) | (Err(got), Err(expected)) => {
                assert!(got.contains(expected), "{args:?}: {got}");
            }
            _ => panic!("{args:?}: {got:?}"),
        }
    }

    #[test]
    fn flags() {
        // A mode ends the list of endpoints, and flags may stand on both sides.
        check(
            &["--endpoint", "a", "b", "saturate", "--callers", "1,8"],
            Ok("Saturate [\"a\", \"b\"]"),
        );
        check(&["load", "--rate", "5,7"], Ok("rate: [5.0, 7.0]"));
        check(&["load", "--endpoint", "a,b"], Ok("[\"a\", \"b\"]"));
        let slope = ["soak", "--rss-slope-max", "9", "--duration"];
        check(&[&slope[..], &["89s"]].concat(), Err("--rss-slope-max: "));
        check(&[&slope[..], &["90s"]].concat(), Ok("Soak"));
        check(&["load"], Ok("of_saturation: [50.0, 80.0, 95.0]"));
        check(
            &["load", "--rate", "5", "--of-saturation", "50"],
            Err("cannot be used with"),
        );
        check(&["load", "--requests", "5"], Err("only saturate is"));
        check(&["soak", "--task", "classify"], Err("verifies embeddings"));
        check(
            &["saturate", "--repeat-share", "2"],
            Err("'2' for '--repeat-share <SHARE>': it must be 0 to 1"),
        );
        check(&["soak", "--plot", "a.svg"], Err("drop it"));
        check(&["knee"], Err("--p99"));
        // On either side of the mode; also with the value that it has anyway.
        let engine = |flags: &[&'static str], expected| {
            let after = [&["engine", "--model", "x"], flags].concat();
            let before = [flags, &["engine", "--model", "x"]].concat();
            check(&after, expected);
            check(&before, expected);
        };
        engine(&["--json", "a", "--seed", "5"], Ok("Engine"));
        engine(&["--plot", "a.svg"], Err("--plot is for modes that load"));
        engine(&["--pid", "1"], Err("--pid is for modes"));
        engine(&["--callers", "4"], Err("--callers is for modes"));
        engine(&["--images", "a"], Err("--images is for modes"));
        engine(&["--warm-up", "2s"], Err("--warm-up is for modes"));
        engine(&["--constant"], Err("--constant is for modes"));
        engine(&["--token-file", "a"], Err("--token-file is for modes"));
        check(&[], Err("Usage"));
    }
}
