//! Flags of `imagegpt bench`. `--help` prints the doc comments.

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

/// Load a worker and measure throughput and latency.
#[derive(Debug, Clone, Args)]
#[command(subcommand_precedence_over_arg = true)]
pub struct BenchArgs {
    // The first field, because parsing the other fields takes their values out
    // of the matches.
    #[command(flatten)]
    given: Given,
    #[command(flatten)]
    pub flags: Flags,
    #[command(subcommand)]
    pub mode: Mode,
}

/// Names of the [`Flags`] that are on the command line. The value of a flag
/// with a default does not tell whether the flag was given.
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

/// Flags of all modes.
#[derive(Debug, Clone, Args)]
pub struct Flags {
    /// Addresses of the workers. With several, connections are spread over them
    /// in turn
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

    /// Method to call
    #[arg(long, global = true, value_enum, default_value = "embed")]
    pub task: Method,

    /// Images per call
    #[arg(
        long,
        global = true,
        default_value_t = 1,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub images_per_call: u32,

    /// Send the image files of this directory instead of random tokens, so that
    /// the measurement includes decoding
    #[arg(long, global = true, value_name = "DIR")]
    pub images: Option<PathBuf>,

    /// Share of images that repeat (0 to 1), to see how much coalescing of
    /// identical requests and a cache save. All other images differ, so that
    /// coalescing and caches do not make the worker look faster
    #[arg(long, global = true, default_value_t = 0.0, value_name = "SHARE", value_parser = bounded_number(0.0, 1.0))]
    pub repeat_share: f64,

    /// Connections per endpoint. A worker serves each connection on one core at
    /// a time and takes about 200 concurrent calls per connection [default:
    /// enough for all calls that the worker has room for, 8 to 64]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub connections: Option<u16>,

    /// Callers of a closed loop; each has one call in flight. The mode saturate
    /// takes several numbers and makes one measurement for each [default:
    /// enough callers for four full batches, at least 16, at most as many as
    /// the worker has room for]
    #[arg(
        long,
        global = true,
        value_delimiter = ',',
        value_name = "N[,N]",
        value_parser = clap::value_parser!(u16).range(1..=16_384)
    )]
    pub callers: Vec<u16>,

    /// Limit on calls in flight in an open loop. Calls that are due above the
    /// limit wait; their latency counts from the time at which they were due,
    /// and the table says that the tool was late
    #[arg(
        long,
        global = true,
        default_value_t = 8192,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub in_flight_max: u32,

    /// Warm-up before each measurement, which does not count. Choose a time
    /// longer than one call takes under this load
    #[arg(long, global = true, default_value = "2s", value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub warm_up: Duration,

    /// Duration of each measurement. For a slow model, allow for at least 50
    /// batches; with fewer, one batch more or less changes the result
    #[arg(long, global = true, default_value = "10s", value_name = "TIME", value_parser = bounded_time(TIME_MIN, DAY))]
    pub duration: Duration,

    /// Measure this number of calls instead of a duration; only in the mode
    /// saturate
    #[arg(
        long,
        global = true,
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..=1_000_000_000)
    )]
    pub requests: Option<u64>,

    /// Latency objective: answers that take longer do not count as goodput
    /// [default: all answers count]
    #[arg(long, global = true, value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub slo: Option<Duration>,

    /// Deadline that is sent with each call (grpc-timeout) [default: none]
    #[arg(long, global = true, value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub deadline: Option<Duration>,

    /// Time after which the tool gives up a call and counts it as
    /// CLIENT_TIMEOUT
    #[arg(long, global = true, default_value = "60s", value_name = "TIME", value_parser = bounded_time(TIME_MIN, DAY))]
    pub timeout: Duration,

    /// Priority class that is sent with each call [default: none is sent]
    #[arg(long, global = true, value_enum)]
    pub priority: Option<Priority>,

    /// Retries of a call that ends with UNAVAILABLE or finds no worker, each on
    /// the next connection, as a client with round-robin load balancing does
    #[arg(
        long,
        global = true,
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u8).range(0..=100)
    )]
    pub retries: u8,

    /// Space the calls of open loops evenly. Without this flag they arrive as a
    /// Poisson process, like calls of independent callers, which is harder for
    /// a worker
    #[arg(long, global = true)]
    pub constant: bool,

    /// Seed of images and arrival times; the same seed repeats a run
    #[arg(long, global = true, default_value_t = 1, value_name = "N")]
    pub seed: u64,

    /// Process ids of the workers on this machine; adds their CPU time, memory
    /// and requests per second per core to the results
    #[arg(long = "pid", global = true, value_delimiter = ',', value_name = "PID")]
    pub pids: Vec<u32>,

    /// Write all results to this JSON file
    #[arg(long, global = true, value_name = "FILE")]
    pub json: Option<PathBuf>,

    /// Draw latency against load into this SVG file
    #[arg(long, global = true, value_name = "FILE")]
    pub plot: Option<PathBuf>,

    /// Threads of the tool itself. Where there are enough cores, run the tool
    /// on other cores than the worker [default: one thread per core, at most 4]
    #[arg(long, global = true, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub client_threads: Option<u16>,
}

/// Modes of `imagegpt bench`: what is measured.
#[derive(Debug, Clone, Subcommand)]
pub enum Mode {
    /// Closed loop: the highest throughput of the worker
    Saturate,
    /// Open loop: the latency of calls at a given load
    Load(LoadArgs),
    /// Open loop above saturation: the goodput that remains, and how calls are
    /// rejected
    Overload(OverloadArgs),
    /// Interactive calls beside a bulk load that uses all remaining capacity
    Mixed(MixedArgs),
    /// Callers beside clients of EmbedStream that stop reading
    SlowReader(SlowReaderArgs),
    /// Mixed load with cancelled calls, garbage and short deadlines, in which
    /// every answer is verified; exit code 1 if a promise was broken
    Soak(SoakArgs),
    /// The highest load, or the best flags, for a given p99 latency
    Knee(KneeArgs),
    /// The engine without a worker: each graph of a model in a bare loop,
    /// compared with the rate of a large matrix product. Takes only --json and
    /// --seed of the flags that the other modes share
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
    /// Offered loads in images per second, one measurement for each
    #[arg(long, value_delimiter = ',', value_name = "R[,R]", value_parser = rate(), conflicts_with = "of_saturation")]
    pub rate: Vec<f64>,

    /// Offered loads in percent of the saturation, which is measured first
    #[arg(long, value_delimiter = ',', value_name = "P[,P]", default_value = "50,80,95", value_parser = percent())]
    pub of_saturation: Vec<f64>,
}

#[derive(Debug, Clone, Args)]
pub struct OverloadArgs {
    /// Offered loads as multiples of the saturation, which is measured first
    #[arg(long, value_delimiter = ',', value_name = "X[,X]", default_value = "1.5,3", value_parser = bounded_number(0.01, 100.0))]
    pub times: Vec<f64>,
}

/// Kinds of calls that a bulk load consists of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum BulkKind {
    /// Streams of EmbedStream; plain calls if the worker does not serve
    /// EmbedStream
    Stream,
    /// Plain calls with the metadata `imagegpt-priority: bulk`
    Unary,
}

#[derive(Debug, Clone, Args)]
pub struct MixedArgs {
    /// Interactive load in images per second
    #[arg(long, value_name = "R", value_parser = rate(), conflicts_with = "of_saturation")]
    pub rate: Option<f64>,

    /// Interactive load in percent of the saturation, which is measured first
    #[arg(long, value_name = "P", default_value = "30", value_parser = percent())]
    pub of_saturation: f64,

    /// Kind of calls that the bulk load consists of
    #[arg(long, value_enum, default_value = "stream")]
    pub bulk: BulkKind,

    /// Number of bulk streams or bulk callers [default: 2 streams per endpoint,
    /// or enough callers for four full batches]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub bulk_clients: Option<u16>,
}

#[derive(Debug, Clone, Args)]
pub struct SlowReaderArgs {
    /// Load of the callers that do read, in images per second
    #[arg(long, value_name = "R", value_parser = rate(), conflicts_with = "of_saturation")]
    pub rate: Option<f64>,

    /// Load of the callers that do read, in percent of the saturation, which is
    /// measured first
    #[arg(long, value_name = "P", default_value = "50", value_parser = percent())]
    pub of_saturation: f64,

    /// Number of streams that nobody reads
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub readers: u16,
}

#[derive(Debug, Clone, Args)]
pub struct SoakArgs {
    /// Number of streams among the clients, if the worker serves EmbedStream; 0
    /// soaks without streams
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u16).range(0..=1024))]
    pub streams: u16,

    /// Growth of the worker's memory that counts as broken, in KiB per minute,
    /// measured after the first quarter of the run. Needs --pid and a
    /// --duration of at least 90s [default: growth is only reported]
    #[arg(long, value_name = "KIB", value_parser = rate())]
    pub rss_slope_max: Option<f64>,
}

#[derive(Debug, Clone, Args)]
pub struct KneeArgs {
    /// Latency within which 99 % of the calls must be answered
    #[arg(long, value_name = "TIME", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub p99: Duration,

    /// Start workers with these flags of `imagegpt serve` (separated by spaces)
    /// and each combination of --batch-sizes and --queue-delays, and recommend
    /// one. Without this flag, the highest rate of the running worker is found
    #[arg(long, value_name = "FLAGS", allow_hyphen_values = true)]
    pub serve: Option<String>,

    /// Values of --max-batch-size to try, with --serve
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "N[,N]",
        default_value = "1,2,4,8",
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub batch_sizes: Vec<u16>,

    /// Values of --max-queue-delay to try, with --serve
    #[arg(long, value_delimiter = ',', value_name = "TIME[,TIME]", default_value = "0ms,2ms", value_parser = bounded_time(Duration::ZERO, DAY))]
    pub queue_delays: Vec<Duration>,

    /// Program to run as the worker [default: this program]
    #[arg(long, value_name = "FILE", hide = true)]
    pub program: Option<PathBuf>,
}

/// Shortest measurement: a shorter one has no meaningful result.
const TIME_MIN: Duration = Duration::from_millis(1);
/// Shortest soak with a memory slope: a quarter of it is warm-up, and the rest
/// leaves a minute of readings with some to spare.
const SLOPE_SOAK_MIN: Duration = Duration::from_secs(90);

/// Parses a load in images per second.
fn rate() -> impl TypedValueParser<Value = f64> {
    bounded_number(0.001, 1e7)
}

/// Parses a percentage of the saturation.
fn percent() -> impl TypedValueParser<Value = f64> {
    bounded_number(0.1, 1000.0)
}

/// Flags of all modes that the mode `engine` takes.
const OF_ENGINE: [&str; 2] = ["json", "seed"];

impl BenchArgs {
    /// Checks the combinations of flags that clap cannot check.
    ///
    /// # Errors
    ///
    /// When flags contradict each other; the error names the flags and says how
    /// to change them.
    pub fn validate(&self) -> anyhow::Result<()> {
        if let Mode::Engine(_) = self.mode {
            let strange = self
                .given
                .0
                .iter()
                .find(|flag| !OF_ENGINE.contains(&flag.as_str()));
            if let Some(flag) = strange {
                let instead = if flag == "duration" {
                    "use --seconds"
                } else {
                    "drop it"
                };
                anyhow::bail!(
                    "--{flag} is for modes that load a worker, and engine runs without one; \
                     {instead}"
                );
            }
        }
        anyhow::ensure!(
            self.flags.plot.is_none() || !matches!(self.mode, Mode::Soak(_)),
            "--plot draws latency against load, and soak has only one load; drop it"
        );
        if let Mode::Knee(args) = &self.mode {
            anyhow::ensure!(
                args.serve.is_none() || !self.given.0.iter().any(|flag| flag == "endpoint"),
                "--endpoint: with --serve, knee measures the workers that it starts; drop \
                 --endpoint or --serve"
            );
        }
        self.flags.validate(&self.mode)
    }
}

impl Flags {
    fn validate(&self, mode: &Mode) -> anyhow::Result<()> {
        anyhow::ensure!(
            self.requests.is_none() || matches!(mode, Mode::Saturate),
            "--requests counts the calls of a closed loop, and only saturate is one; use --duration"
        );
        anyhow::ensure!(
            self.task == Method::Embed || !matches!(mode, Mode::Soak(_)),
            "--task: soak verifies embeddings only; drop --task"
        );
        if let Mode::Soak(args) = mode {
            anyhow::ensure!(
                args.rss_slope_max.is_none() || self.duration >= SLOPE_SOAK_MIN,
                "--rss-slope-max: --duration is too short to measure growth per minute; it must \
                 be {} or more",
                humantime::format_duration(SLOPE_SOAK_MIN)
            );
        }
        if let Mode::Knee(args) = mode {
            anyhow::ensure!(
                args.serve.is_none() || self.pids.is_empty(),
                "--pid: with --serve, knee measures the workers that it starts; drop --pid"
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
        // The name of a mode ends the list of endpoints. Flags are accepted
        // before and after the mode.
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
        let knee = ["knee", "--p99", "9ms", "--serve", "--model x"];
        check(&knee, Ok("Knee"));
        check(&[&knee[..], &["--endpoint", "a"]].concat(), Err("drop"));
        check(
            &["saturate", "--repeat-share", "2"],
            Err("'2' for '--repeat-share <SHARE>': it must be 0 to 1"),
        );
        check(&["soak", "--plot", "a.svg"], Err("drop it"));
        check(&["knee"], Err("--p99"));
        // Flags are refused before and after the mode, and also if their value
        // is the default.
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
        engine(&["--duration", "1s"], Err("use --seconds"));
        engine(&["--token-file", "a"], Err("--token-file is for modes"));
        check(&[], Err("Usage"));
    }
}
