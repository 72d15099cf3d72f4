//! Opens sessions of ONNX Runtime, for serving and for verification, and reads
//! the profiles of their runs.

pub(crate) mod arena;
pub(crate) mod capture;
pub(crate) mod cuda;
pub mod error;
pub(crate) mod failure;
pub mod library;
pub(crate) mod load;
pub mod operators;
pub(crate) mod pages;
pub(crate) mod placement;
pub(crate) mod probe;
pub(crate) mod python;
pub(crate) mod roofline;
pub(crate) mod zeros;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use ort::environment::Environment;
use ort::ep;
use ort::operator::OperatorDomain;
use ort::session::Session;
use ort::session::builder::{GraphOptimizationLevel, SessionBuilder};
use prost::Message as _;
use serde::Deserialize;

use crate::model::onnx::DataType;
use crate::model::precision::Provider;

/// Place of the weights of `weights.bin` in memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residence {
    /// Sessions compute from weights that they share, in memory or, during
    /// verification, in the mapped file. All graphs together take the weights'
    /// size once: 350 MB for five tasks of imagegpt-small in fp32.
    InPlace,
    /// Each session copies its weights into the order that is fastest for its
    /// kernels: a few percent faster, but 1.3 GB for the same five tasks.
    Packed,
}

/// Settings of the sessions that graphs run in. A process has one environment,
/// so the caller provides it.
#[derive(Clone)]
pub struct Runtime {
    pub environment: Environment,
    /// Execution provider that graphs run on.
    pub provider: Provider,
    /// Number of the GPU, from 0.
    pub device_id: i32,
    /// The worker's own operators. Without them graphs for the CPU use
    /// ONNX Runtime's attention.
    pub operators: Option<Arc<OperatorDomain>>,
    /// Number of threads per run; 0 uses one thread per physical core.
    pub n_threads: usize,
    pub residence: Residence,
    /// True if sessions use the arena that all sessions of their device share.
    pub shares_arena: bool,
    /// Largest arena of a session on a GPU, in bytes; `None` sets no limit.
    pub gpu_memory_limit: Option<usize>,
    /// True if runs are captured as CUDA graphs.
    pub cuda_graphs: bool,
    /// Kernel of attention on a GPU.
    pub attention: GpuAttention,
}

/// Kernel by which ONNX Runtime computes attention on a GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum GpuAttention {
    /// ONNX Runtime's own choice.
    #[default]
    Auto,
    /// Flash attention.
    Flash,
    /// Memory-efficient attention of CUTLASS.
    Efficient,
    /// cuDNN's flash attention.
    Cudnn,
    /// Separate products and a softmax.
    Unfused,
}

impl GpuAttention {
    /// Returns the value of the provider's option `sdpa_kernel`, if there is a
    /// choice.
    fn backend(self) -> Option<ep::cuda::AttentionBackend> {
        use ep::cuda::AttentionBackend;
        match self {
            Self::Auto => None,
            Self::Flash => Some(AttentionBackend::FLASH_ATTENTION),
            Self::Efficient => Some(AttentionBackend::EFFICIENT_ATTENTION),
            Self::Cudnn => Some(AttentionBackend::CUDNN_FLASH_ATTENTION),
            Self::Unfused => Some(AttentionBackend::MATH),
        }
    }
}

/// Program that copies inputs and outputs between the host and a GPU.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum GpuCopies {
    /// ONNX Runtime, one copy of the process at a time.
    #[default]
    #[value(name = "onnxruntime")]
    OnnxRuntime,
    /// The worker over the NVIDIA driver, each device by itself and through
    /// pinned memory.
    Driver,
}

/// Number of kernels that ran, by execution provider and operator.
pub type Operators = BTreeMap<String, BTreeMap<String, usize>>;

/// Returns true if ONNX Runtime's products of 8 bits overflow on this CPU: one
/// with AVX2 or AVX-512 but without VNNI adds pairs of products in 16 bits, and
/// features would be wrong by several percent. `session.x64quantprecision`
/// avoids that at a price: with it, CPUs with VNNI do not use VNNI either,
/// which takes 1.55 to 1.6 times as long on a Zen 5.
pub(crate) fn products_of_bytes_overflow() -> bool {
    #[cfg(target_arch = "x86_64")]
    return !(is_x86_feature_detected!("avx512vnni") || is_x86_feature_detected!("avxvnni"));
    #[cfg(not(target_arch = "x86_64"))]
    return false;
}

/// Returns the number of threads of a run, of which the flag asks for `given`.
/// If the flag leaves the choice open (0): one per physical core, and no more
/// than the CPU quota of the process's control group, since threads beyond the
/// quota are only throttled. The result 0 leaves the choice to ONNX Runtime,
/// which knows the cores but not the quota.
#[must_use]
pub fn threads_within_quota(given: usize) -> usize {
    if given != 0 {
        return given;
    }
    let Ok(allowed) = rustix::thread::sched_getaffinity(None) else {
        return 0;
    };
    let allowed = usize::try_from(allowed.count()).unwrap_or(usize::MAX);
    // Counts the quota in whole CPUs, at least one.
    let within_quota = std::thread::available_parallelism().map_or(allowed, usize::from);
    if within_quota >= allowed {
        return 0;
    }
    let has_threads_per_core = std::fs::read_to_string("/sys/devices/system/cpu/smt/active")
        .is_ok_and(|active| active.trim() == "1");
    let per_core = if has_threads_per_core { 2 } else { 1 };
    within_quota.min(allowed.div_ceil(per_core))
}

impl Runtime {
    /// Makes a runtime with the worker's own operators.
    ///
    /// # Errors
    ///
    /// When the operators cannot be registered.
    pub fn new(environment: Environment, provider: Provider) -> ort::Result<Self> {
        Ok(Self {
            operators: Some(operators(&environment)?),
            environment,
            provider,
            device_id: 0,
            n_threads: 0,
            residence: Residence::InPlace,
            shares_arena: false,
            gpu_memory_limit: None,
            cuda_graphs: false,
            attention: GpuAttention::Auto,
        })
    }

    /// Returns a builder of sessions with these settings.
    ///
    /// # Errors
    ///
    /// When the execution provider cannot be used.
    pub fn builder(&self) -> ort::Result<SessionBuilder> {
        let mut builder = Session::builder(&self.environment)?
            .with_optimization_level(GraphOptimizationLevel::Level3)?
            // Spinning threads would take the cores that preprocessing needs.
            .with_intra_op_spinning(false)?
            .with_config_entry(
                "session.x64quantprecision",
                if products_of_bytes_overflow() {
                    "1"
                } else {
                    "0"
                },
            )?
            .with_prepacking(self.residence == Residence::Packed)?;
        if self.n_threads != 0 {
            builder = builder.with_intra_threads(self.n_threads)?;
        }
        if let Some(operators) = &self.operators {
            builder = builder.with_operators(Arc::clone(operators))?;
        }
        if self.shares_arena {
            builder = builder.with_env_allocators()?;
        }
        if self.provider == Provider::Cuda {
            library::check_for_cuda().map_err(ort::Error::new)?;
            library::preload_cuda();
            let mut cuda = ep::CUDA::default()
                .with_device_id(self.device_id)
                // Features must not depend on a hidden change of precision.
                .with_tf32(false)
                .with_cuda_graph(self.cuda_graphs)
                .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested);
            if let Some(limit) = self.gpu_memory_limit {
                cuda = cuda.with_memory_limit(limit);
            }
            if let Some(backend) = self.attention.backend() {
                cuda = cuda.with_attention_backend(backend);
            }
            builder = builder
                // Auto-tuning takes the kernel that was fastest, which differs
                // from process to process: a seed would draw another image
                // after a restart.
                .with_config_entry("ep.cuda.enable_gemm_auto_tune", "0")?
                .with_execution_providers([cuda.build().error_on_failure()])?;
        }
        Ok(builder)
    }

    /// Opens a graph; with `profile`, ONNX Runtime writes a profile of its runs
    /// to that path.
    ///
    /// # Errors
    ///
    /// When ONNX Runtime cannot load the graph.
    pub fn open(&self, graph: &Path, profile: Option<&Path>) -> ort::Result<Session> {
        let mut builder = self.builder()?;
        if let Some(profile) = profile {
            builder = builder.with_profiling(profile)?;
        }
        builder.commit_from_file(graph)
    }
}

/// Oldest minor version of ONNX Runtime 1 that is supported.
pub const MINOR_VERSION_MIN: u32 = ort::MINOR_VERSION;

/// Loads a shared library in the way ONNX Runtime and its providers are loaded,
/// and keeps it loaded.
///
/// # Errors
///
/// When the library or a library that it needs does not exist or is for another
/// system; the text is the dynamic linker's.
pub fn load(library: &Path) -> Result<(), String> {
    ort::util::preload_dylib(library).map_err(|error| {
        let words = std::error::Error::source(&error).map(ToString::to_string);
        words.unwrap_or_else(|| error.to_string())
    })
}

/// Returns the minor version (31 of 1.31) that a library reports; `None` if it
/// is not ONNX Runtime 1.
#[must_use]
pub fn minor_version(library: &Path) -> Option<u32> {
    ort::util::probe(library)
}

/// Registers the worker's own operators in an environment and returns them.
///
/// ONNX Runtime registers a domain with the first session that uses it; if two
/// sessions are the first at the same time, as with several devices, one fails.
/// So a session that computes nothing is opened first.
///
/// # Errors
///
/// When ONNX Runtime does not accept the operators.
#[expect(
    clippy::arc_with_non_send_sync,
    reason = "sessions share operators by this type"
)]
pub fn operators(environment: &Environment) -> ort::Result<Arc<OperatorDomain>> {
    static IS_NOTED: Mutex<bool> = Mutex::new(false);
    let domain = Arc::new(crate::runtime::operators::domain()?);
    let mut is_noted = IS_NOTED.lock().unwrap_or_else(PoisonError::into_inner);
    if !*is_noted {
        let nothing = roofline::chain(1, 1, DataType::Float, &[1.0]);
        Session::builder(environment)?
            .with_intra_threads(1)?
            .with_operators(Arc::clone(&domain))?
            .commit_from_memory(&nothing.encode_to_vec())?;
        *is_noted = true;
    }
    Ok(domain)
}

#[derive(Deserialize)]
struct Event {
    #[serde(default)]
    cat: String,
    #[serde(default)]
    name: String,
    #[serde(default)]
    args: Arguments,
}

#[derive(Default, Deserialize)]
struct Arguments {
    #[serde(default)]
    op_name: String,
    #[serde(default)]
    provider: String,
    #[serde(default)]
    node_index: String,
}

/// Ends the profile of `session`, removes its file and counts the kernels
/// that ran, each once no matter how often the graph ran.
///
/// A profile tells more than reading back the optimized graph: it also has the
/// execution provider of each kernel, and needs no copy of the weights.
///
/// # Errors
///
/// When the profile cannot be read.
pub fn what_ran(session: &mut Session) -> Result<Operators, String> {
    let file = session.end_profiling().map_err(|error| error.to_string())?;
    let text = std::fs::read(&file).map_err(|error| format!("{file}: {error}"));
    // The profile is not needed any more and would only take space.
    let _ = std::fs::remove_file(&file);
    let events: Vec<Event> = serde_json::from_slice(&text?)
        .map_err(|error| format!("the profile of ONNX Runtime has an unknown format: {error}"))?;
    let mut nodes = BTreeMap::new();
    for event in events {
        if event.cat == "Node" && event.name.ends_with("_kernel_time") {
            let place = (event.args.provider, event.args.op_name);
            nodes.insert((event.args.node_index, event.name), place);
        }
    }
    let mut operators = Operators::new();
    for (provider, operator) in nodes.into_values() {
        *operators
            .entry(provider)
            .or_default()
            .entry(operator)
            .or_default() += 1;
    }
    Ok(operators)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_of_attention_have_the_numbers_of_onnx_runtime() {
        let number = |attention: GpuAttention| attention.backend().map(|value| value.to_string());
        assert_eq!(number(GpuAttention::Auto), None);
        for (attention, expected) in [
            (GpuAttention::Flash, "1"),
            (GpuAttention::Efficient, "2"),
            (GpuAttention::Cudnn, "8"),
            (GpuAttention::Unfused, "16"),
        ] {
            assert_eq!(number(attention).as_deref(), Some(expected));
        }
    }
}
