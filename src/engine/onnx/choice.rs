//! Choice of an execution provider and of the settings of its sessions.

use ort::environment::Environment;

use super::OnnxOptions;
use crate::engine::{Fallback, FallbackKind};
use crate::kernels::whole::has_bf16_products;
use crate::model::precision::{BF16_FEATURES, Precision, Provider, ProviderChoice};
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::library::environment;
use crate::runtime::probe::probe;
use crate::runtime::{GpuAttention, Residence, Runtime, arena, operators};

/// Refuses graphs that were compiled for another provider than `provider`, on
/// which they would be slow or not run at all.
pub(super) fn check_compiled_for(
    compiled_for: Option<Provider>,
    provider: Provider,
) -> Result<(), EngineError> {
    match compiled_for {
        Some(made) if made != provider => {
            let (made, given) = (made.name(), provider.name());
            Err(EngineError::Provider(format!(
                "the model was compiled for {made} and cannot run on {given}; compile it with \
                 --provider {given}, or serve it with --execution-provider {made}"
            )))
        }
        _ => Ok(()),
    }
}

/// Refuses graphs in a precision that this CPU could only run slowly.
pub(super) fn check_precision(
    precision: Option<Precision>,
    provider: Provider,
) -> Result<(), EngineError> {
    if (precision, provider) != (Some(Precision::Bf16), Provider::Cpu) || has_bf16_products() {
        return Ok(());
    }
    Err(EngineError::Provider(format!(
        "the model was compiled in bf16 for CPUs with {BF16_FEATURES}, which this CPU does not \
         have; compile it with --precision int8 or fp32"
    )))
}

/// Returns true if an engine with these options may capture its runs.
pub(super) fn may_capture(options: &OnnxOptions) -> bool {
    options.cuda_graphs
        && options.gpu_memory_limit.is_none()
        && options.provider != ProviderChoice::Cpu
        && options.compiled_for != Some(Provider::Cpu)
}

/// Chooses the execution provider and its settings, and adds features that
/// cannot be used to `fallbacks`.
pub(super) fn choose(
    environment: &Environment,
    options: &OnnxOptions,
    fallbacks: &mut Vec<Fallback>,
) -> Result<Runtime, EngineError> {
    let of = |provider| runtime_of(environment.clone(), options, provider);
    let provider = match (options.provider, options.compiled_for) {
        (ProviderChoice::Cpu, _) | (ProviderChoice::Auto, Some(Provider::Cpu)) => Provider::Cpu,
        // Graphs for CUDA cannot fall back to the CPU.
        (ProviderChoice::Cuda, _) | (ProviderChoice::Auto, Some(Provider::Cuda)) => {
            probe(&of(Provider::Cuda)?)?;
            Provider::Cuda
        }
        (ProviderChoice::Auto, None) => match probe(&of(Provider::Cuda)?) {
            Ok(()) => Provider::Cuda,
            Err(error) => {
                tracing::info!(
                    %error,
                    "cannot use the CUDA execution provider; running on the CPU"
                );
                fallbacks.push(Fallback {
                    kind: FallbackKind::Cuda,
                    reason: error.to_string(),
                });
                Provider::Cpu
            }
        },
    };
    let mut runtime = of(provider)?;
    // Without a limit, each session on a GPU has an arena of its own, as is
    // usual.
    if provider == Provider::Cpu || options.gpu_memory_limit.is_some() {
        let limit = runtime.gpu_memory_limit;
        arena::share(environment, provider, runtime.device_id, limit).map_err(|error| {
            EngineError::NotLoaded(format!(
                "cannot create a memory arena for {}: {error}",
                provider.name()
            ))
        })?;
        runtime.shares_arena = true;
    }
    if runtime.shares_arena && runtime.cuda_graphs {
        // A captured run writes to the memory that it had when it was captured,
        // which the arena may have given to another graph since, even for its
        // weights.
        runtime.cuda_graphs = false;
        let reason = "with --gpu-memory-limit all graphs share their memory, but captured runs \
                      need memory of their own";
        tracing::warn!(
            reason,
            "cannot use CUDA graphs; launching kernels one by one"
        );
        fallbacks.push(Fallback {
            kind: FallbackKind::CudaGraphs,
            reason: reason.to_owned(),
        });
    }
    Ok(runtime)
}

/// Returns true if the execution provider `auto` means CUDA for these options.
///
/// # Errors
///
/// When ONNX Runtime cannot be used.
pub fn auto_takes_cuda(options: &OnnxOptions) -> Result<bool, EngineError> {
    if let Some(compiled_for) = options.compiled_for {
        return Ok(compiled_for == Provider::Cuda);
    }
    let environment = environment(&options.library)?;
    let cuda = runtime_of(environment, options, Provider::Cuda)?;
    Ok(probe(&cuda).is_ok())
}

/// Returns the settings of sessions on `provider` for these options.
fn runtime_of(
    environment: Environment,
    options: &OnnxOptions,
    provider: Provider,
) -> Result<Runtime, EngineError> {
    let (operators, residence) = if options.compiled_for.is_some() {
        // Compiled graphs share the weights of one file and compute from them
        // in place; packing would copy them for every graph.
        let operators = operators(&environment).map_err(runtime)?;
        (Some(operators), Residence::InPlace)
    } else {
        (None, Residence::Packed)
    };
    let is_cuda = provider == Provider::Cuda;
    Ok(Runtime {
        environment,
        provider,
        device_id: if is_cuda { options.device_id } else { 0 },
        operators,
        n_threads: options.intra_op_threads,
        residence,
        shares_arena: false,
        gpu_memory_limit: options.gpu_memory_limit.filter(|_| is_cuda),
        cuda_graphs: options.cuda_graphs && is_cuda,
        attention: GpuAttention::Auto,
    })
}
