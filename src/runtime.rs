//! How sessions are opened, to serve graphs or to try them, and what ran in
//! them.

pub(crate) mod arena;
pub mod error;
pub mod library;
pub(crate) mod load;
pub mod operators;
pub(crate) mod placement;
pub(crate) mod probe;
pub(crate) mod roofline;
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

/// What sessions do with `weights.bin`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Residence {
    /// They compute from where it lies, in memory that they share or, while graphs are
    /// tried, in the mapped file: so all graphs together take the weights' size once,
    /// with five tasks of imagegpt-small in fp32 350 MB.
    InPlace,
    /// Each session copies its weights into the order that its kernels like
    /// best: a few percent faster, 1.3 GB for the same five.
    Packed,
}

/// What graphs run with. A process has one environment, so the caller brings
/// it.
#[derive(Clone)]
pub struct Runtime {
    pub environment: Environment,
    /// Where graphs run.
    pub provider: Provider,
    /// Which GPU.
    pub device_id: i32,
    /// The worker's own operators. Without them graphs for the CPU use
    /// ONNX Runtime's attention.
    pub operators: Option<Arc<OperatorDomain>>,
    /// Threads of one run; 0 lets the runtime take one a physical core.
    pub n_threads: usize,
    pub residence: Residence,
    /// Whether sessions take the arena that their device has in common.
    pub shares_arena: bool,
    /// Bytes of a GPU that the arena of a session may take; `None` for all.
    pub gpu_memory_limit: Option<usize>,
    /// Whether runs are captured as CUDA graphs.
    pub cuda_graphs: bool,
}

/// Kernels that ran, by execution provider and operator.
pub type Operators = BTreeMap<String, BTreeMap<String, usize>>;

impl Runtime {
    /// A runtime with the worker's own operators.
    ///
    /// # Errors
    ///
    /// When they cannot be registered.
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
        })
    }

    /// A session's options, before it has a graph.
    ///
    /// # Errors
    ///
    /// When the provider cannot be had.
    pub fn builder(&self) -> ort::Result<SessionBuilder> {
        let mut builder = Session::builder(&self.environment)?
            .with_optimization_level(GraphOptimizationLevel::Level3)?
            // Spinning threads would take the cores that preprocessing needs.
            .with_intra_op_spinning(false)?
            // Without it, a CPU that has AVX2 and no products of 8 bits (VNNI) adds
            // pairs of them in 16 bits, which overflows: features would be several
            // percent off. Other CPUs are as fast with it.
            .with_config_entry("session.x64quantprecision", "1")?
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
            let mut cuda = ep::CUDA::default()
                .with_device_id(self.device_id)
                // Features must not depend on a hidden change of precision.
                .with_tf32(false)
                .with_cuda_graph(self.cuda_graphs)
                .with_arena_extend_strategy(ep::ArenaExtendStrategy::SameAsRequested);
            if let Some(limit) = self.gpu_memory_limit {
                cuda = cuda.with_memory_limit(limit);
            }
            builder = builder
                // It times kernels and takes the fastest, not the same one in each
                // process: a seed would draw another image after a restart.
                .with_config_entry("ep.cuda.enable_gemm_auto_tune", "0")?
                .with_execution_providers([cuda.build().error_on_failure()])?;
        }
        Ok(builder)
    }

    /// Opens a graph, recording what runs if `profile` says where to.
    ///
    /// # Errors
    ///
    /// When ONNX Runtime does not take it.
    pub fn open(&self, graph: &Path, profile: Option<&Path>) -> ort::Result<Session> {
        let mut builder = self.builder()?;
        if let Some(profile) = profile {
            builder = builder.with_profiling(profile)?;
        }
        builder.commit_from_file(graph)
    }
}

/// The oldest version of the library that is taken: 1 and this.
pub const MINOR_VERSION_MIN: u32 = ort::MINOR_VERSION;

/// Loads a shared library as ONNX Runtime's and its provider's are loaded, and
/// keeps it.
///
/// # Errors
///
/// In the dynamic linker's words, when it is not there, or what it is linked
/// with is not, or both are of another system.
pub fn load(library: &Path) -> Result<(), String> {
    ort::util::preload_dylib(library).map_err(|error| {
        let words = std::error::Error::source(&error).map(ToString::to_string);
        words.unwrap_or_else(|| error.to_string())
    })
}

/// The second number of a library's version (31 of 1.31), as it says itself;
/// `None` if it is not ONNX Runtime 1.
#[must_use]
pub fn minor_version(library: &Path) -> Option<u32> {
    ort::util::probe(library)
}

/// The worker's own operators, which an environment knows from then on.
///
/// ONNX Runtime notes a domain when the first session has it; of two that are
/// first at one time, as with several devices, one fails. So a session that does
/// nothing is first.
///
/// # Errors
///
/// When ONNX Runtime does not take them.
#[expect(
    clippy::arc_with_non_send_sync,
    reason = "it is the type that sessions share operators by"
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
/// that ran, each once however often the graph did.
///
/// What ran says more than an optimized graph read back: it also tells where,
/// and costs no copy of the weights.
///
/// # Errors
///
/// When the profile cannot be read.
pub fn what_ran(session: &mut Session) -> Result<Operators, String> {
    let file = session.end_profiling().map_err(|error| error.to_string())?;
    let text = std::fs::read(&file).map_err(|error| format!("{file}: {error}"));
    // A profile that stays behind would only take space.
    let _ = std::fs::remove_file(&file);
    let events: Vec<Event> = serde_json::from_slice(&text?)
        .map_err(|error| format!("the profile is not what ONNX Runtime used to write: {error}"))?;
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
