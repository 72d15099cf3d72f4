//! Flags of `imagegpt serve`, each also an environment variable.
//!
//! The comments here are the operator's manual: `--help` prints them.

mod access;
pub(crate) mod bounds;
mod runtime;

use std::net::SocketAddr;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;

use self::bounds::{DAY, SECOND, bounded_size, bounded_time, size};
use crate::engine::fake;
use crate::model::buckets::Buckets;
use crate::model::head::HeadFlag;
use crate::model::precision::Precision;
use crate::telemetry::LogConfig;

pub(crate) use self::access::ANY_ORIGIN;
pub(crate) use self::runtime::device_id;

pub use self::access::{AccessConfig, ConnectionsConfig};
pub use self::runtime::{CacheFlags, DeviceFlags, LibraryFlags, ProviderFlags};

/// Serve a model over gRPC.
#[derive(Debug, Clone, Args)]
pub struct ServeConfig {
    #[command(flatten)]
    pub model: ModelConfig,
    #[command(flatten)]
    pub network: NetworkConfig,
    #[command(flatten)]
    pub access: AccessConfig,
    #[command(flatten)]
    pub connections: ConnectionsConfig,
    #[command(flatten)]
    pub batching: BatchingConfig,
    #[command(flatten)]
    pub generation: GenerationConfig,
    #[command(flatten)]
    pub limits: LimitsConfig,
    #[command(flatten)]
    pub log: LogConfig,
}

/// What runs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelConfig {
    /// A directory or a hub id. A compiled directory (see `imagegpt compile`);
    /// a published ONNX directory (model.onnx and/or
    /// model_classification.onnx, at the top or in model/ or onnx/, beside
    /// preprocessor_config.json); a Hugging Face directory with weights, a hub
    /// id such as openai/imagegpt-small, or random:small, random:medium,
    /// random:large or random:tiny (random weights, to measure speed), all of
    /// which are compiled once into --cache-dir
    #[arg(long, env = "IMAGEGPT_MODEL", value_name = "SOURCE")]
    pub model: String,

    #[command(flatten)]
    pub compile: CompileConfig,

    /// A linear head for Classify, as often as there are heads: a name that
    /// calls use, and a safetensors file (see README)
    #[arg(
        long = "head",
        env = "IMAGEGPT_HEADS",
        value_name = "NAME=FILE",
        value_delimiter = ','
    )]
    pub heads: Vec<HeadFlag>,

    /// Name that clients see [default: the name of the directory, or of what was
    /// compiled]
    #[arg(
        long,
        env = "IMAGEGPT_MODEL_NAME",
        value_name = "NAME",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    pub model_name: Option<String>,

    #[command(flatten)]
    pub library: LibraryFlags,

    /// Run no model: each run takes TIME, or with TIME+TIME also so much an
    /// image (100ms, 2ms+1ms), and the answers are made up. Prices the server
    /// alone, for `imagegpt bench`; needs no ONNX Runtime
    #[arg(long, env = "IMAGEGPT_FAKE_ENGINE", value_name = "TIME[+TIME]")]
    pub fake_engine: Option<fake::Cost>,

    #[command(flatten)]
    pub devices: DeviceFlags,

    /// What the model may take of a GPU's memory, weights included; 0 for all.
    /// Generation's keys and values count too. With a limit nothing is captured
    /// as a CUDA graph
    #[arg(
        long,
        env = "IMAGEGPT_GPU_MEMORY_LIMIT",
        default_value = "0",
        value_name = "SIZE",
        value_parser = size
    )]
    pub gpu_memory_limit: ByteSize,

    /// Capture runs on a GPU as CUDA graphs, one a batch size, so that a run is
    /// launched at once and not kernel by kernel. auto does without where it
    /// cannot be done, as with --gpu-memory-limit, and says so in the log, in
    /// GetModel and in a metric
    #[arg(long, env = "IMAGEGPT_CUDA_GRAPHS", value_enum, default_value = "auto")]
    pub cuda_graphs: CudaGraphs,

    /// Threads of one model run on the CPU; 0 takes one a physical core. Lower
    /// it when several workers share a machine, or several engines a worker
    #[arg(
        long,
        env = "IMAGEGPT_INTRA_OP_THREADS",
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=1024)
    )]
    pub intra_op_threads: u16,

    /// Threads that decode and quantize images; 0 uses one thread per core. An
    /// image costs about a millisecond, so few are enough on a CPU; on a GPU
    /// raise it until the queue is never empty. One further thread takes only
    /// images of at most 5 million pixels, so that larger ones never hold them
    /// up
    #[arg(
        long,
        env = "IMAGEGPT_PREPROCESS_THREADS",
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=1024)
    )]
    pub preprocess_threads: u16,
}

/// Whether runs on a GPU are captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CudaGraphs {
    /// Where it works.
    Auto,
    Off,
}

/// How a model is compiled that has to be.
#[derive(Debug, Clone, Args)]
pub struct CompileConfig {
    /// Branch, tag or commit of a hub id [default: main]
    #[arg(long, env = "IMAGEGPT_REVISION", value_name = "REVISION")]
    pub revision: Option<String>,

    /// How weights are kept and computed when --model has to be compiled
    #[arg(long, env = "IMAGEGPT_PRECISION", value_enum, default_value = "fp32")]
    pub precision: Precision,

    /// Layer that pooled features come from when --model has to be compiled
    /// [default: two thirds of the depth]
    #[arg(long, env = "IMAGEGPT_FEATURE_LAYER", value_name = "N")]
    pub feature_layer: Option<usize>,

    #[command(flatten)]
    pub cache: CacheFlags,
}

/// Where it listens and how it ends.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkConfig {
    /// Address for gRPC
    #[arg(
        long,
        env = "IMAGEGPT_LISTEN",
        default_value = "127.0.0.1:50051",
        value_name = "ADDRESS",
        value_parser = address
    )]
    pub listen: SocketAddr,

    /// Address for /metrics, /livez and /readyz over HTTP
    #[arg(
        long,
        env = "IMAGEGPT_METRICS_LISTEN",
        default_value = "127.0.0.1:9090",
        value_name = "ADDRESS",
        value_parser = address
    )]
    pub metrics_listen: SocketAddr,

    /// After SIGTERM or SIGINT the worker is at once not ready, and serves on for
    /// so long, so that load balancers stop sending before it stops taking. 5s
    /// suits Kubernetes; 0s where nothing looks at readiness
    #[arg(
        long,
        env = "IMAGEGPT_SHUTDOWN_DELAY",
        default_value = "0s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, DAY)
    )]
    pub shutdown_delay: Duration,

    /// After --shutdown-delay, time to finish what was admitted; then the worker
    /// ends hard, with exit code 1. Requests that are still arriving are refused
    /// at once, and answers that are not taken for 5s (or half of this time) are
    /// given up; neither makes the end a hard one. Keep the sum of both under Kubernetes'
    /// terminationGracePeriodSeconds
    #[arg(
        long,
        env = "IMAGEGPT_SHUTDOWN_GRACE_PERIOD",
        default_value = "25s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, DAY)
    )]
    pub shutdown_grace_period: Duration,

    /// Time between HTTP/2 pings to quiet clients
    #[arg(
        long,
        env = "IMAGEGPT_KEEPALIVE_INTERVAL",
        default_value = "30s",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub keepalive_interval: Duration,

    /// Time that a client may take to answer a ping; then its connection is
    /// closed and its calls are given up
    #[arg(
        long,
        env = "IMAGEGPT_KEEPALIVE_TIMEOUT",
        default_value = "20s",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub keepalive_timeout: Duration,

    /// Turn gRPC server reflection off
    #[arg(
        long,
        env = "IMAGEGPT_NO_REFLECTION",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub no_reflection: bool,
}

/// How images share runs of the model.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Batching")]
pub struct BatchingConfig {
    /// Images in one run at most. On a CPU more than a few only adds latency;
    /// on a GPU raise it until images per second stop rising
    #[arg(
        long,
        env = "IMAGEGPT_MAX_BATCH_SIZE",
        default_value_t = 8,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub max_batch_size: u16,

    /// How long an image may wait for others while the model is free, where
    /// larger batches are faster. While the model is busy images gather anyway
    #[arg(
        long,
        env = "IMAGEGPT_MAX_QUEUE_DELAY",
        default_value = "2ms",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, Duration::from_mins(1))
    )]
    pub max_queue_delay: Duration,

    /// The batch sizes that are run, ascending, the last one --max-batch-size;
    /// each is warmed before the worker is ready, and a batch is padded up to
    /// one of them where that pays [default: powers of two]
    #[arg(
        long,
        env = "IMAGEGPT_BATCH_SIZES",
        value_name = "N,N",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub batch_sizes: Vec<u16>,

    /// Percent of the model's time that bulk work gets at least while
    /// interactive work waits too. Interactive work goes first in the rest;
    /// whatever it leaves is bulk's
    #[arg(
        long,
        env = "IMAGEGPT_BULK_SHARE",
        default_value_t = 10,
        value_name = "PERCENT",
        value_parser = clap::value_parser!(u8).range(0..=90)
    )]
    pub bulk_share: u8,

    /// The longest that bulk work goes without a batch while it waits, whatever
    /// its share
    #[arg(
        long,
        env = "IMAGEGPT_BULK_WAIT_MAX",
        default_value = "10s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(1), DAY)
    )]
    pub bulk_wait_max: Duration,

    /// Memory for answers that were given before; the same image under the same
    /// options is then answered without a run. 0 keeps none. Identical images
    /// that are in the worker at one time share a run in any case
    #[arg(
        long,
        env = "IMAGEGPT_CACHE_BYTES",
        default_value = "0",
        value_name = "SIZE",
        value_parser = size
    )]
    pub cache_bytes: ByteSize,

    /// When the model has been idle so long, it is run once on an image whose
    /// answer is known; a device that fails is noticed before a caller does. 0s
    /// turns that off
    #[arg(
        long,
        env = "IMAGEGPT_CANARY_INTERVAL",
        default_value = "30s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, DAY)
    )]
    pub canary_interval: Duration,
}

impl BatchingConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let refuse = |text: String| Err(ConfigError(text));
        let sizes = &self.batch_sizes;
        if !sizes.is_empty() {
            if !sizes.windows(2).all(|pair| pair[0] < pair[1]) {
                return refuse(format!("--batch-sizes {sizes:?} do not ascend"));
            }
            if sizes.last() != Some(&self.max_batch_size) {
                return refuse(format!(
                    "--batch-sizes {sizes:?} do not end with --max-batch-size {}",
                    self.max_batch_size
                ));
            }
        }
        Ok(())
    }

    /// The batch sizes, given or not.
    #[must_use]
    pub fn buckets(&self) -> Buckets {
        let sizes = self.batch_sizes.iter().copied().map(usize::from).collect();
        Buckets::ascending(sizes)
            .unwrap_or_else(|| Buckets::powers_of_two(self.max_batch_size.into()))
    }
}

/// How images are generated.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationConfig {
    /// Images that each device generates at one time; more wait for a place. A
    /// step of all of them takes little longer than one of a single image while
    /// reading the weights is most of it. 0 turns generation off and saves the
    /// memory of its graph
    #[arg(
        long,
        env = "IMAGEGPT_GENERATE_SLOTS",
        default_value_t = 8,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=1024)
    )]
    pub generate_slots: u16,

    /// What the keys and values of these images may take on each device; there
    /// are fewer places if it does not suffice. imagegpt-small keeps 74 MiB an
    /// image in fp32, 48 in int8 and fp16. On a CPU memory is taken at the start
    /// where the system gives huge pages, elsewhere as it is used
    #[arg(
        long,
        env = "IMAGEGPT_GENERATE_CACHE_BYTES",
        default_value = "2GiB",
        value_name = "SIZE",
        value_parser = size
    )]
    pub generate_cache_bytes: ByteSize,
}

/// Bounds on what comes in.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitsConfig {
    /// Images in the worker at once, over all calls; past it calls get
    /// RESOURCE_EXHAUSTED. Bounds how long an image can wait
    #[arg(
        long,
        env = "IMAGEGPT_IMAGES_IN_FLIGHT_MAX",
        default_value_t = 1024,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub images_in_flight_max: u32,

    /// Bytes in the worker at once: requests and the answers they will get.
    /// Bounds memory
    #[arg(
        long,
        env = "IMAGEGPT_BYTES_IN_FLIGHT_MAX",
        default_value = "1GiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 40)
    )]
    pub bytes_in_flight_max: ByteSize,

    /// Images in one call
    #[arg(
        long,
        env = "IMAGEGPT_IMAGES_PER_CALL_MAX",
        default_value_t = 256,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub images_per_call_max: u32,

    /// Images that are generated or wait for it, over all calls. They keep their
    /// places for long, so this is well under --images-in-flight-max: whatever
    /// else the worker does finds room beside them
    #[arg(
        long,
        env = "IMAGEGPT_SAMPLES_IN_FLIGHT_MAX",
        default_value_t = 128,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub samples_in_flight_max: u32,

    /// Samples of one Generate call
    #[arg(
        long,
        env = "IMAGEGPT_SAMPLES_PER_CALL_MAX",
        default_value_t = 64,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1024)
    )]
    pub samples_per_call_max: u32,

    /// Percent of the images and bytes in flight that bulk work cannot take, so
    /// that interactive calls find room while a bulk job fills the rest
    #[arg(
        long,
        env = "IMAGEGPT_INTERACTIVE_RESERVE",
        default_value_t = 25,
        value_name = "PERCENT",
        value_parser = clap::value_parser!(u8).range(0..=90)
    )]
    pub interactive_reserve: u8,

    /// Items of one EmbedStream in the worker at once; past it the stream is
    /// not read on until the client takes answers. A few batches keep the model
    /// busy from one stream
    #[arg(
        long,
        env = "IMAGEGPT_STREAM_WINDOW_MAX",
        default_value_t = 64,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub stream_window_max: u32,

    /// A stream in which the client neither sends nor takes anything for so long,
    /// while the worker has nothing to do for it, is ended so that the client
    /// can go on in another. Longer than a client pauses, or forgotten streams
    /// and readers that stall would hold their places for ever
    #[arg(
        long,
        env = "IMAGEGPT_STREAM_IDLE_TIMEOUT",
        default_value = "10m",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub stream_idle_timeout: Duration,

    /// Bytes of one request message, after decompression
    #[arg(
        long,
        env = "IMAGEGPT_REQUEST_BYTES_MAX",
        default_value = "64MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 31)
    )]
    pub request_bytes_max: ByteSize,

    /// Bytes of all tensors in one response
    #[arg(
        long,
        env = "IMAGEGPT_RESPONSE_BYTES_MAX",
        default_value = "128MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 31)
    )]
    pub response_bytes_max: ByteSize,

    /// Bytes of one encoded image
    #[arg(
        long,
        env = "IMAGEGPT_IMAGE_BYTES_MAX",
        default_value = "32MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 31)
    )]
    pub image_bytes_max: ByteSize,

    /// Pixels of one image, by its header, before anything is decoded
    #[arg(
        long,
        env = "IMAGEGPT_IMAGE_PIXELS_MAX",
        default_value_t = 64_000_000,
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..=4_000_000_000)
    )]
    pub image_pixels_max: u64,

    /// Memory that decoding one image may take. As many images are decoded at
    /// once as there are preprocess threads, and one more
    #[arg(
        long,
        env = "IMAGEGPT_DECODE_BYTES_MAX",
        default_value = "512MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 40)
    )]
    pub decode_bytes_max: ByteSize,

    /// CPU time that decoding one image may take. A last net: the other limits
    /// bound the work by the header of a file, far below this time. Whether an
    /// image is refused by it depends on the machine, so leave it high
    #[arg(
        long,
        env = "IMAGEGPT_DECODE_CPU_TIME_MAX",
        default_value = "60s",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub decode_cpu_time_max: Duration,
}

fn address(text: &str) -> Result<SocketAddr, String> {
    text.parse()
        .map_err(|_| "it must be an IP address and a port, such as 127.0.0.1:50051".to_owned())
}

/// A combination of flags that cannot work.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl ServeConfig {
    /// Checks what no flag can check by itself.
    ///
    /// # Errors
    ///
    /// One sentence that names the flags and says what to change.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.access.validate(self.network.listen)?;
        let limits = &self.limits;
        let refuse = |text: String| Err(ConfigError(text));
        if limits.images_per_call_max > limits.images_in_flight_max {
            return refuse(format!(
                "--images-per-call-max is {}, over --images-in-flight-max {}: such a call could \
                 never be admitted; raise the latter",
                limits.images_per_call_max, limits.images_in_flight_max
            ));
        }
        if u32::from(self.batching.max_batch_size) > limits.images_in_flight_max {
            return refuse(format!(
                "--max-batch-size is {}, over --images-in-flight-max {}: such a batch could never \
                 fill; raise the latter",
                self.batching.max_batch_size, limits.images_in_flight_max
            ));
        }
        // An answer is counted as it was computed (f32), as a tensor and as the
        // message that carries it: up to four times its own size for f16.
        let one_call = limits.request_bytes_max.as_u64() + 4 * limits.response_bytes_max.as_u64();
        if one_call > limits.bytes_in_flight_max.as_u64() {
            return refuse(format!(
                "--request-bytes-max {} and four times --response-bytes-max {} are over \
                 --bytes-in-flight-max {}: such a call could never be admitted; raise the latter",
                limits.request_bytes_max, limits.response_bytes_max, limits.bytes_in_flight_max
            ));
        }
        // A call's bytes are taken as one permit of 32 bits.
        if one_call > u64::from(u32::MAX) {
            return refuse(format!(
                "--request-bytes-max {} and four times --response-bytes-max {} are over {}, the \
                 most that is counted for one call; lower one of them",
                limits.request_bytes_max,
                limits.response_bytes_max,
                ByteSize(1 << 32)
            ));
        }
        self.batching.validate()?;
        self.model.validate()
    }
}

impl ModelConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let heads = &self.heads;
        if self.fake_engine.is_some() && !heads.is_empty() {
            return Err(ConfigError(
                "--fake-engine has no features that a --head could score; drop one of them"
                    .to_owned(),
            ));
        }
        self.devices.validate()?;
        for (idx, head) in heads.iter().enumerate() {
            if heads[..idx].iter().any(|other| other.name == head.name) {
                return Err(ConfigError(format!(
                    "--head {} is given twice; names must differ",
                    head.name
                )));
            }
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
        serve: ServeConfig,
    }

    fn check(flags: &[&str], expected: &str) {
        let args = ["imagegpt", "--model", "."].iter().chain(flags);
        let got = match Cli::try_parse_from(args) {
            Ok(cli) => match cli.serve.validate() {
                Ok(()) => "fine".to_owned(),
                Err(error) => error.to_string(),
            },
            Err(error) => error.to_string(),
        };
        assert!(got.contains(expected), "{flags:?}: {got}");
    }

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table, a row per rule")]
    fn flags() {
        check(&[], "fine");
        check(
            &["--images-per-call-max", "2000"],
            "--images-per-call-max is 2000, over --images-in-flight-max 1024",
        );
        check(
            &["--images-in-flight-max", "4", "--images-per-call-max", "4"],
            "--max-batch-size is 8, over --images-in-flight-max 4",
        );
        check(
            &["--bytes-in-flight-max", "10MiB"],
            "are over --bytes-in-flight-max 10.0 MiB",
        );
        check(
            &[
                "--request-bytes-max",
                "1GiB",
                "--response-bytes-max",
                "1GiB",
                "--bytes-in-flight-max",
                "8GiB",
            ],
            "--request-bytes-max 1.0 GiB and four times --response-bytes-max 1.0 GiB are over 4.0 GiB",
        );
        check(
            &["--request-bytes-max", "10"],
            "'10' for '--request-bytes-max <SIZE>': it must be 1.0 KiB to 2.0 GiB",
        );
        check(&["--max-batch-size", "0"], "0 is not in 1..=1024");
        check(
            &["--batch-sizes", "4,2", "--max-batch-size", "2"],
            "do not ascend",
        );
        check(
            &["--batch-sizes", "1,6"],
            "--batch-sizes [1, 6] do not end with --max-batch-size 8",
        );
        check(&["--batch-sizes", "1,6,8"], "fine");
        check(&["--max-queue-delay", "5"], "invalid value '5'");
        check(
            &["--max-queue-delay", "2h"],
            "'2h' for '--max-queue-delay <TIME>': it must be 0s to 1m",
        );
        check(
            &["--keepalive-interval", "500ms"],
            "'500ms' for '--keepalive-interval <TIME>': it must be 1s to 1day",
        );
        check(
            &["--keepalive-timeout", "0s"],
            "'0s' for '--keepalive-timeout <TIME>': it must be 1s to 1day",
        );
        check(
            &["--listen", "0.0.0.0:1"],
            "--listen 0.0.0.0:1 is not loopback",
        );
        for way_out in [
            &["--insecure"][..],
            &["--tls-cert", "a", "--tls-key", "b"],
            &["--auth-tokens-file", "a"],
        ] {
            check(&[&["--listen", "[::]:1"], way_out].concat(), "fine");
        }
        check(&["--listen", "[::ffff:127.0.0.1]:1"], "fine");
        check(&["--tls-cert", "a"], "--tls-key <FILE>");
        check(&["--tls-client-ca", "a"], "--tls-cert <FILE>");
        check(
            &["--header-bytes-max", "2MiB"],
            "'2MiB' for '--header-bytes-max <SIZE>': it must be 1.0 KiB to 1.0 MiB",
        );
        check(
            &["--max-connection-age", "10ms"],
            "'10ms' for '--max-connection-age <TIME>': it must be 1s to 1day",
        );
        check(
            &["--request-timeout", "0s"],
            "'0s' for '--request-timeout <TIME>': it must be 1s to 1day",
        );
        check(
            &["--answer-timeout", "0s"],
            "'0s' for '--answer-timeout <TIME>': it must be 1s to 1day",
        );
        check(&["--connections-max", "0"], "1..=1000000");
        check(
            &["--shutdown-grace-period", "584000000000years"],
            "for '--shutdown-grace-period <TIME>': it must be 0s to 1day",
        );
        check(&["--preprocess-threads", "10000000"], "0..=1024");
        check(&["--request-bytes-max", "abc"], "a size such as 64MiB");
        check(&["--fake-engine", "2ms+1ms"], "fine");
        check(&["--fake-engine", "fast"], "a time of up to 60s");
        check(
            &["--fake-engine", "0s", "--head", "a=b"],
            "--fake-engine has no features",
        );
        check(&["--listen", "localhost:80"], "an IP address and a port");
        check(&["--device-id", "0,3"], "fine");
        check(&["--device-id", "1,0,1"], "--device-id has 1 twice");
        check(&["--device-id", "0,1024"], "1024 is not in 0..1024");
        let many: Vec<String> = (0..17).map(|id| id.to_string()).collect();
        check(
            &["--device-id", &many.join(",")],
            "--device-id has 17 devices; a worker has at most 16",
        );
        check(
            &["--execution-provider", "tpu"],
            "[possible values: auto, cpu, cuda]",
        );
    }
}
