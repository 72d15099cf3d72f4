//! Flags of `imagegpt serve`, each also an environment variable.
//!
//! The doc comments of the fields are the operator's manual: `--help` prints
//! them.

mod access;
pub(crate) mod bounds;
mod runtime;
mod trace;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use bytesize::ByteSize;
use clap::Args;

use self::bounds::{DAY, SECOND, bounded_size, bounded_time, size};
use crate::engine::fake;
use crate::model::ModelNeed;
use crate::model::buckets::Buckets;
use crate::model::head::HeadFlag;
use crate::model::precision::Precision;
use crate::runtime::GpuAttention;
use crate::telemetry::LogConfig;

pub(crate) use self::access::ANY_ORIGIN;
pub(crate) use self::runtime::device_id;

pub use self::access::{AccessConfig, ConnectionsConfig};
pub use self::runtime::{CacheFlags, DeviceFlags, GpuCopiesFlags, LibraryFlags, ProviderFlags};
pub use self::trace::TraceConfig;

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
    pub trace: TraceConfig,
    #[command(flatten)]
    pub log: LogConfig,
}

/// Flags that choose the model and how it runs.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Model")]
pub struct ModelConfig {
    /// Model to serve: a directory, a hub id or random weights.
    ///
    /// SOURCE is a compiled directory (see `imagegpt compile`); a published
    /// ONNX directory (model.onnx and/or model_classification.onnx, at the top
    /// or in model/ or onnx/, beside preprocessor_config.json); a Hugging Face
    /// directory with weights; a hub id such as openai/imagegpt-small; or
    /// random:small, random:medium, random:large or random:tiny (random
    /// weights, to measure speed). The last three kinds are compiled once, into
    /// --cache-dir
    #[arg(long, env = "IMAGEGPT_MODEL", value_name = "SOURCE")]
    pub model: String,

    /// Computations for which the model is served, besides those of its heads;
    /// `None` for all that it has. Set by commands that serve a model to
    /// themselves, so that they load nothing else.
    #[arg(skip)]
    pub needs: Option<Vec<ModelNeed>>,

    #[command(flatten)]
    pub compile: CompileConfig,

    /// Linear head for Classify: the name by which calls choose it, and its
    /// safetensors file (see docs/probing.md). Repeat the flag for more heads
    #[arg(
        long = "head",
        env = "IMAGEGPT_HEADS",
        value_name = "NAME=FILE",
        value_delimiter = ','
    )]
    pub heads: Vec<HeadFlag>,

    /// Directory whose files NAME.safetensors are linear heads too, each under
    /// its NAME. A file that is added, replaced or removed takes effect within
    /// about two seconds, without a restart; a file that cannot be used is
    /// logged, and the head before it stays in service
    #[arg(long, env = "IMAGEGPT_HEAD_DIR", value_name = "DIR")]
    pub head_dir: Option<PathBuf>,

    /// Name of the model that clients see [default: the name of the directory,
    /// or of the source that was compiled]
    #[arg(
        long,
        env = "IMAGEGPT_MODEL_NAME",
        value_name = "NAME",
        value_parser = clap::builder::NonEmptyStringValueParser::new()
    )]
    pub model_name: Option<String>,

    #[command(flatten)]
    pub library: LibraryFlags,

    /// Simulate the model: each run takes the first TIME, plus the second TIME
    /// per image (100ms, 2ms+1ms), and the answers are made up. Use it with
    /// `imagegpt bench` to measure the server alone; no ONNX Runtime is needed
    #[arg(long, env = "IMAGEGPT_FAKE_ENGINE", value_name = "TIME[+TIME]")]
    pub fake_engine: Option<fake::Cost>,

    #[command(flatten)]
    pub devices: DeviceFlags,

    /// GPU memory that all graphs of the model may use together on each device,
    /// with the weights, which each graph has on its own, and with the key/value
    /// cache of generation; 0 allows all of it. CUDA's context and the buffers
    /// of copies, some hundred MiB, come on top. With a limit, no runs are
    /// captured as CUDA graphs
    #[arg(
        long,
        env = "IMAGEGPT_GPU_MEMORY_LIMIT",
        default_value = "0",
        value_name = "SIZE",
        value_parser = size
    )]
    pub gpu_memory_limit: ByteSize,

    /// Capture runs on a GPU as CUDA graphs, one per batch size and one for all
    /// steps of generation, so that a run is launched in one step instead of
    /// kernel by kernel. Where graphs cannot be captured, for example with
    /// --gpu-memory-limit, auto runs without them and reports that in the log, in
    /// GetModel and in a metric. A captured run that nobody waits for any more
    /// runs to its end
    #[arg(long, env = "IMAGEGPT_CUDA_GRAPHS", value_enum, default_value = "auto")]
    pub cuda_graphs: CudaGraphs,

    #[command(flatten)]
    pub copies: GpuCopiesFlags,

    /// Threads of one model run on the CPU; 0 uses one thread per physical
    /// core, within the container's CPU quota. Lower the number when several workers share a machine, or when a
    /// worker has several engines
    #[arg(
        long,
        env = "IMAGEGPT_INTRA_OP_THREADS",
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=1024)
    )]
    pub intra_op_threads: u16,

    /// Threads that decode and quantize images; 0 uses one thread per core.
    ///
    /// An image costs about a millisecond, so a few threads are enough when the
    /// model runs on a CPU; on a GPU raise the number until the queue is never
    /// empty. One additional thread takes only images of at most 5 million
    /// pixels, so that small images never wait behind large ones
    #[arg(
        long,
        env = "IMAGEGPT_PREPROCESS_THREADS",
        default_value_t = 0,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=1024)
    )]
    pub preprocess_threads: u16,
}

/// Use of CUDA graphs for runs on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum CudaGraphs {
    /// Runs are captured where that works.
    Auto,
    /// Runs are never captured.
    Off,
}

/// Kernel for attention in steps of generation on a GPU.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum GenerateAttention {
    /// ONNX Runtime chooses.
    Auto,
    /// Flash attention.
    Flash,
    /// Memory-efficient attention.
    Efficient,
    /// cuDNN's flash attention.
    Cudnn,
    /// Products and a softmax apart.
    Unfused,
}

impl From<GenerateAttention> for GpuAttention {
    fn from(flag: GenerateAttention) -> Self {
        match flag {
            GenerateAttention::Auto => Self::Auto,
            GenerateAttention::Flash => Self::Flash,
            GenerateAttention::Efficient => Self::Efficient,
            GenerateAttention::Cudnn => Self::Cudnn,
            GenerateAttention::Unfused => Self::Unfused,
        }
    }
}

/// Flags for the compilation of a model that is not compiled yet.
#[derive(Debug, Clone, Args)]
pub struct CompileConfig {
    /// Branch, tag or commit of the model on the hub, if --model is a hub id
    /// [default: main]; says also that it is one where a directory has its
    /// owner's name
    #[arg(long, env = "IMAGEGPT_REVISION", value_name = "REVISION")]
    pub revision: Option<String>,

    /// Number format of weights and computation if --model must be compiled
    #[arg(long, env = "IMAGEGPT_PRECISION", value_enum, default_value = "fp32")]
    pub precision: Precision,

    /// Layer from which pooled features are taken if --model must be compiled
    /// [default: two thirds of the depth]
    #[arg(long, env = "IMAGEGPT_FEATURE_LAYER", value_name = "N")]
    pub feature_layer: Option<usize>,

    #[command(flatten)]
    pub cache: CacheFlags,
}

/// Flags for the worker's addresses, its shutdown and its keepalive.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Network")]
pub struct NetworkConfig {
    /// IP address and port on which gRPC is served
    #[arg(
        long,
        env = "IMAGEGPT_LISTEN",
        default_value = "127.0.0.1:50051",
        value_name = "ADDRESS",
        value_parser = address
    )]
    pub listen: SocketAddr,

    /// IP address and port on which /metrics, /livez and /readyz are served
    /// over HTTP
    #[arg(
        long,
        env = "IMAGEGPT_METRICS_LISTEN",
        default_value = "127.0.0.1:9090",
        value_name = "ADDRESS",
        value_parser = address
    )]
    pub metrics_listen: SocketAddr,

    /// Time for which the worker still accepts calls after SIGTERM or SIGINT.
    /// The worker reports at once that it is not ready; the delay lets load
    /// balancers stop sending calls before the worker stops accepting them. 10s
    /// suits Kubernetes, 0s suits setups in which nothing checks readiness
    #[arg(
        long,
        env = "IMAGEGPT_SHUTDOWN_DELAY",
        default_value = "0s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, DAY)
    )]
    pub shutdown_delay: Duration,

    /// Time after --shutdown-delay for calls in progress to finish (graceful
    /// shutdown). When the time is over, the worker aborts the remaining calls
    /// and exits with code 1.
    ///
    /// Requests that are still arriving are rejected at once, and an answer
    /// whose client stops reading for 5s (or half of this time, if that is
    /// shorter) is dropped; neither changes the exit code. Keep the sum of
    /// --shutdown-delay and this time below Kubernetes'
    /// terminationGracePeriodSeconds
    #[arg(
        long,
        env = "IMAGEGPT_SHUTDOWN_GRACE_PERIOD",
        default_value = "25s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, DAY)
    )]
    pub shutdown_grace_period: Duration,

    /// Shut down, as after SIGTERM, when standard input is closed. A program
    /// that starts the worker with a pipe as its standard input then never
    /// leaves it behind, even if the program is killed
    #[arg(
        long,
        env = "IMAGEGPT_EXIT_ON_STDIN_EOF",
        value_parser = clap::builder::FalseyValueParser::new()
    )]
    pub exit_on_stdin_eof: bool,

    /// Interval between HTTP/2 pings to a client that sends nothing
    #[arg(
        long,
        env = "IMAGEGPT_KEEPALIVE_INTERVAL",
        default_value = "30s",
        value_name = "TIME",
        value_parser = bounded_time(SECOND, DAY)
    )]
    pub keepalive_interval: Duration,

    /// Longest time for a client to answer an HTTP/2 ping; after it the
    /// connection is closed and its calls are cancelled
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

/// Flags for the batches in which images share runs of the model.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Batching")]
pub struct BatchingConfig {
    /// Largest number of images in one run of the model. On a CPU more than a
    /// few images only add latency; on a GPU raise the number until images per
    /// second stop rising
    #[arg(
        long,
        env = "IMAGEGPT_MAX_BATCH_SIZE",
        default_value_t = 8,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub max_batch_size: u16,

    /// Longest time that an image waits for others to form a batch while the
    /// model is idle. Images wait only where a larger batch has a higher
    /// throughput; while the model is busy, images gather in the queue anyway
    #[arg(
        long,
        env = "IMAGEGPT_MAX_QUEUE_DELAY",
        default_value = "2ms",
        value_name = "TIME",
        value_parser = bounded_time(Duration::ZERO, Duration::from_mins(1))
    )]
    pub max_queue_delay: Duration,

    /// Batch sizes at which the model is run, in ascending order; the last must
    /// be --max-batch-size. Before the worker is ready it warms each size up on
    /// a GPU, and the smallest on a CPU; a batch is padded to the next size
    /// where that is faster [default:
    /// powers of two up to --max-batch-size]
    #[arg(
        long,
        env = "IMAGEGPT_BATCH_SIZES",
        value_name = "N,N",
        value_delimiter = ',',
        value_parser = clap::value_parser!(u16).range(1..=1024)
    )]
    pub batch_sizes: Vec<u16>,

    /// Smallest share of the model's time, in percent, that bulk work gets
    /// while interactive work waits too. In the remaining time interactive work
    /// runs first, and bulk work uses the time that interactive work leaves
    #[arg(
        long,
        env = "IMAGEGPT_BULK_SHARE",
        default_value_t = 10,
        value_name = "PERCENT",
        value_parser = clap::value_parser!(u8).range(0..=90)
    )]
    pub bulk_share: u8,

    /// Longest time that waiting bulk work goes without a batch, whatever
    /// --bulk-share is
    #[arg(
        long,
        env = "IMAGEGPT_BULK_WAIT_MAX",
        default_value = "10s",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(1), DAY)
    )]
    pub bulk_wait_max: Duration,

    /// Memory for the cache of answers: the same image with the same options is
    /// then answered without a run of the model. 0 turns the cache off.
    /// Identical images that are in the worker at the same time share one run
    /// in any case (coalescing)
    #[arg(
        long,
        env = "IMAGEGPT_CACHE_BYTES",
        default_value = "0",
        value_name = "SIZE",
        value_parser = size
    )]
    pub cache_bytes: ByteSize,

    /// Idle time after which the model is run once on an image whose answer is
    /// known, so that a failed device is noticed before a call meets it. 0s
    /// turns the check off
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
                return refuse(format!(
                    "--batch-sizes {sizes:?} must be in ascending order"
                ));
            }
            if sizes.last() != Some(&self.max_batch_size) {
                return refuse(format!(
                    "--batch-sizes {sizes:?} must end with --max-batch-size {}",
                    self.max_batch_size
                ));
            }
        }
        Ok(())
    }

    /// Returns the sizes of --batch-sizes, or powers of two if none are given.
    #[must_use]
    pub fn buckets(&self) -> Buckets {
        let sizes = self.batch_sizes.iter().copied().map(usize::from).collect();
        Buckets::ascending(sizes)
            .unwrap_or_else(|| Buckets::powers_of_two(self.max_batch_size.into()))
    }
}

/// Flags for the generation of images.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Generation")]
pub struct GenerationConfig {
    /// Largest number of images that each device generates at the same time
    /// (continuous batching); further images wait in the queue. 0 turns
    /// generation off and saves the memory of its graph.
    ///
    /// A step for all of these images takes little longer than a step for one
    /// image, as long as most of the step's time is spent on reading the
    /// weights
    #[arg(
        long,
        env = "IMAGEGPT_GENERATE_SLOTS",
        default_value_t = 8,
        value_name = "N",
        value_parser = clap::value_parser!(u16).range(0..=1024)
    )]
    pub generate_slots: u16,

    /// Kernel of ONNX Runtime for attention in steps of generation on a GPU. For
    /// heads of 64, 128 and 256, ONNX Runtime uses its kernel XQA before any of
    /// these, unless the environment has ORT_ENABLE_XQA=0. Only auto has run on a
    /// GPU yet
    #[arg(
        long,
        env = "IMAGEGPT_GENERATE_ATTENTION",
        value_enum,
        default_value = "auto"
    )]
    pub generate_attention: GenerateAttention,

    /// Memory for the key/value cache of generated images on each device. If
    /// the memory is too small for --generate-slots images, fewer images are
    /// generated at the same time.
    ///
    /// imagegpt-small keeps 74 MiB per image in fp32, and 48 MiB in int8 and
    /// fp16. On a CPU the memory is taken at the start if the system provides
    /// huge pages, otherwise as it is used
    #[arg(
        long,
        env = "IMAGEGPT_GENERATE_CACHE_BYTES",
        default_value = "2GiB",
        value_name = "SIZE",
        value_parser = size
    )]
    pub generate_cache_bytes: ByteSize,
}

/// Flags that limit requests, images and streams.
#[derive(Debug, Clone, Args)]
#[command(next_help_heading = "Limits")]
pub struct LimitsConfig {
    /// Largest number of images in the worker at the same time, over all calls;
    /// calls above the limit are rejected with RESOURCE_EXHAUSTED. The limit
    /// bounds how long an image can wait
    #[arg(
        long,
        env = "IMAGEGPT_IMAGES_IN_FLIGHT_MAX",
        default_value_t = 1024,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub images_in_flight_max: u32,

    /// Largest number of bytes in the worker at the same time: all requests,
    /// and the answers that they will get. The limit bounds the worker's memory
    #[arg(
        long,
        env = "IMAGEGPT_BYTES_IN_FLIGHT_MAX",
        default_value = "1GiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 40)
    )]
    pub bytes_in_flight_max: ByteSize,

    /// Largest number of images in one call
    #[arg(
        long,
        env = "IMAGEGPT_IMAGES_PER_CALL_MAX",
        default_value_t = 256,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub images_per_call_max: u32,

    /// Largest number of images that are being generated or wait for
    /// generation, over all calls. Generation takes long, so keep the limit
    /// well below --images-in-flight-max: other calls then still find room
    #[arg(
        long,
        env = "IMAGEGPT_SAMPLES_IN_FLIGHT_MAX",
        default_value_t = 128,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1_000_000)
    )]
    pub samples_in_flight_max: u32,

    /// Largest number of samples of one Generate call
    #[arg(
        long,
        env = "IMAGEGPT_SAMPLES_PER_CALL_MAX",
        default_value_t = 64,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=1024)
    )]
    pub samples_per_call_max: u32,

    /// Share of --images-in-flight-max and --bytes-in-flight-max, in percent,
    /// that bulk work cannot use, so that interactive calls find room while a
    /// bulk job fills the rest
    #[arg(
        long,
        env = "IMAGEGPT_INTERACTIVE_RESERVE",
        default_value_t = 25,
        value_name = "PERCENT",
        value_parser = clap::value_parser!(u8).range(0..=90)
    )]
    pub interactive_reserve: u8,

    /// Largest number of items of one EmbedStream in the worker at the same
    /// time; at the limit the worker reads no further items until the client
    /// reads answers (backpressure). A few batches of items keep the model busy
    /// from one stream
    #[arg(
        long,
        env = "IMAGEGPT_STREAM_WINDOW_MAX",
        default_value_t = 64,
        value_name = "N",
        value_parser = clap::value_parser!(u32).range(1..=65_536)
    )]
    pub stream_window_max: u32,

    /// Time after which the worker ends a stream whose client neither sends
    /// items nor reads answers while the worker has no work for that stream;
    /// the client can continue in a new stream. Choose a time longer than the
    /// longest pause of a client. Without the limit, forgotten streams and
    /// stalled readers would hold their share of the worker for ever
    #[arg(
        long,
        env = "IMAGEGPT_STREAM_IDLE_TIMEOUT",
        default_value = "10m",
        value_name = "TIME",
        value_parser = bounded_time(Duration::from_millis(100), DAY)
    )]
    pub stream_idle_timeout: Duration,

    /// Largest size of one request message, after decompression
    #[arg(
        long,
        env = "IMAGEGPT_REQUEST_BYTES_MAX",
        default_value = "64MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 31)
    )]
    pub request_bytes_max: ByteSize,

    /// Largest size of all tensors in one response together
    #[arg(
        long,
        env = "IMAGEGPT_RESPONSE_BYTES_MAX",
        default_value = "128MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 31)
    )]
    pub response_bytes_max: ByteSize,

    /// Largest size of one encoded image
    #[arg(
        long,
        env = "IMAGEGPT_IMAGE_BYTES_MAX",
        default_value = "32MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 31)
    )]
    pub image_bytes_max: ByteSize,

    /// Largest number of pixels of one image. The header of the image is
    /// checked before anything is decoded
    #[arg(
        long,
        env = "IMAGEGPT_IMAGE_PIXELS_MAX",
        default_value_t = 64_000_000,
        value_name = "N",
        value_parser = clap::value_parser!(u64).range(1..=4_000_000_000)
    )]
    pub image_pixels_max: u64,

    /// Largest memory for the decoding of one image. The number of images that
    /// are decoded at the same time is --preprocess-threads plus one
    #[arg(
        long,
        env = "IMAGEGPT_DECODE_BYTES_MAX",
        default_value = "512MiB",
        value_name = "SIZE",
        value_parser = bounded_size(1 << 10, 1 << 40)
    )]
    pub decode_bytes_max: ByteSize,

    /// Largest CPU time for the decoding of one image. The time is a last
    /// resort: the other limits bound the work by the file's header, and normal
    /// images need far less. A slow machine can reject an image that a fast one
    /// accepts, so keep the time high
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
    /// Checks combinations of flags, which no flag's parser can check by
    /// itself.
    ///
    /// # Errors
    ///
    /// Returns one sentence that names the flags and says what to change.
    pub fn validate(&self) -> Result<(), ConfigError> {
        self.access.validate(self.network.listen)?;
        let limits = &self.limits;
        let refuse = |text: String| Err(ConfigError(text));
        if limits.images_per_call_max > limits.images_in_flight_max {
            return refuse(format!(
                "--images-per-call-max is {}, over --images-in-flight-max {}: a call with that \
                 many images could never be admitted; raise --images-in-flight-max",
                limits.images_per_call_max, limits.images_in_flight_max
            ));
        }
        if u32::from(self.batching.max_batch_size) > limits.images_in_flight_max {
            return refuse(format!(
                "--max-batch-size is {}, over --images-in-flight-max {}: a batch of that size \
                 could never fill; raise --images-in-flight-max",
                self.batching.max_batch_size, limits.images_in_flight_max
            ));
        }
        // An answer is counted as the computed values (f32), as a tensor and as
        // the message that carries the tensor: up to four times the size of the
        // tensor for f16.
        let one_call = limits.request_bytes_max.as_u64() + 4 * limits.response_bytes_max.as_u64();
        if one_call > limits.bytes_in_flight_max.as_u64() {
            return refuse(format!(
                "--request-bytes-max {} and four times --response-bytes-max {} are over \
                 --bytes-in-flight-max {}: a call of that size could never be admitted; raise \
                 --bytes-in-flight-max",
                limits.request_bytes_max, limits.response_bytes_max, limits.bytes_in_flight_max
            ));
        }
        // The semaphore counts the bytes of one call in 32 bits.
        if one_call > u64::from(u32::MAX) {
            return refuse(format!(
                "--request-bytes-max {} and four times --response-bytes-max {} are over {}, the \
                 limit for one call; lower one of the two",
                limits.request_bytes_max,
                limits.response_bytes_max,
                ByteSize(1 << 32)
            ));
        }
        self.batching.validate()?;
        self.trace.validate()?;
        self.model.validate()
    }
}

impl ModelConfig {
    fn validate(&self) -> Result<(), ConfigError> {
        let heads = &self.heads;
        if self.fake_engine.is_some() && (!heads.is_empty() || self.head_dir.is_some()) {
            return Err(ConfigError(
                "--fake-engine has no features that a --head or a head of --head-dir could score; \
                 remove one of the flags"
                    .to_owned(),
            ));
        }
        self.devices.validate()?;
        for (idx, head) in heads.iter().enumerate() {
            if heads[..idx].iter().any(|other| other.name == head.name) {
                return Err(ConfigError(format!(
                    "--head {} is given twice; the names of heads must differ",
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
            "must be in ascending order",
        );
        check(
            &["--batch-sizes", "1,6"],
            "--batch-sizes [1, 6] must end with --max-batch-size 8",
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
        check(&["--fake-engine", "fast"], "a time per run of at most 60s");
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
