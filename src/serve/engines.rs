//! Engines that the flags ask for, one per device: of ONNX Runtime, or fake.

use crate::engine::fake::{FakeEngine, FakeSequences, Script};
use crate::engine::onnx::{self, OnnxEngine};
use crate::engine::{Engine, EngineFactory};
use crate::model::Model;
use crate::model::head::LinearHead;
use crate::model::precision::ProviderChoice;
use crate::runtime::error::EngineError;
use crate::runtime::threads_within_quota;
use crate::serve::config::{CudaGraphs, ServeConfig};
use crate::serve::devices::DeviceEngine;

/// Returns the engines that the flags ask for, one per device.
///
/// # Errors
///
/// Fails if ONNX Runtime cannot be used.
pub fn engines(
    config: &ServeConfig,
    model: &Model,
    heads: &[LinearHead],
) -> Result<Vec<DeviceEngine>, EngineError> {
    let Some(cost) = config.model.fake_engine else {
        return onnx_engines(config, model, heads);
    };
    tracing::warn!(
        ?cost,
        "--fake-engine: no model is run; the answers are made up"
    );
    let n_slots = usize::from(config.generation.generate_slots);
    let sequences = FakeSequences {
        n_slots,
        n_colors: model.clusters.len(),
        delay: cost.fixed,
        can_copy: true,
    };
    let engine = |&id| {
        let script = Script {
            sequences: (n_slots > 0).then_some(sequences),
            ..cost.into()
        };
        let factory: EngineFactory =
            Box::new(move || Ok(Box::new(FakeEngine::new(script)) as Box<dyn Engine>));
        DeviceEngine { id, factory }
    };
    Ok(config.model.devices.ids.iter().map(engine).collect())
}

/// Returns ONNX Runtime engines for the model, as the flags say.
///
/// # Errors
///
/// Fails if ONNX Runtime cannot be used.
pub fn onnx_engines(
    config: &ServeConfig,
    model: &Model,
    heads: &[LinearHead],
) -> Result<Vec<DeviceEngine>, EngineError> {
    let ids = &config.model.devices.ids;
    let options = onnx_options(config, model, heads);
    let (provider, ids) = match (options.provider, ids.as_slice()) {
        // Otherwise each engine would choose a provider by itself, and on a
        // machine without GPUs several engines would run on the CPU.
        (ProviderChoice::Auto, [first, _, ..]) => {
            let of_first = onnx::OnnxOptions {
                device_id: *first,
                ..options.clone()
            };
            if onnx::auto_takes_cuda(&of_first)? {
                (ProviderChoice::Cuda, ids.as_slice())
            } else {
                tracing::info!(
                    device_ids = ?ids,
                    "--execution-provider auto chose the CPU, which counts as one device"
                );
                (ProviderChoice::Auto, &ids[..1])
            }
        }
        (provider, ids) => (provider, ids),
    };
    let engine = |&id| {
        let options = onnx::OnnxOptions {
            provider,
            device_id: id,
            ..options.clone()
        };
        let factory: EngineFactory =
            Box::new(move || Ok(Box::new(OnnxEngine::load(&options)?) as Box<dyn Engine>));
        DeviceEngine { id, factory }
    };
    Ok(ids.iter().map(engine).collect())
}

/// Returns an engine for the model on the first device alone, as the worker
/// would serve it.
#[must_use]
pub fn onnx_factory(config: &ServeConfig, model: &Model, heads: &[LinearHead]) -> EngineFactory {
    let options = onnx::OnnxOptions {
        device_id: config.model.devices.ids.first().copied().unwrap_or(0),
        ..onnx_options(config, model, heads)
    };
    Box::new(move || Ok(Box::new(OnnxEngine::load(&options)?) as Box<dyn Engine>))
}

/// Options that all engines of the model have in common.
fn onnx_options(config: &ServeConfig, model: &Model, heads: &[LinearHead]) -> onnx::OnnxOptions {
    onnx::OnnxOptions {
        library: onnx::find_library(config.model.library.onnxruntime.as_deref()),
        provider: config.model.devices.provider.execution_provider,
        // Replaced per engine.
        device_id: 0,
        intra_op_threads: threads_within_quota(config.model.intra_op_threads.into()),
        graphs: model.graphs.clone(),
        files: model.files.clone(),
        positions: model.positions(),
        n_colors: model.clusters.len(),
        sizes_are_given: model.sizes_are_given,
        n_labels: model.labels.len(),
        // A head of --head-dir that does not fit is taken out later, and does not
        // end the start.
        head_widths: heads
            .iter()
            .filter(|head| config.model.heads.iter().any(|flag| flag.name == head.name))
            .map(|head| (head.content.width(), head.name.clone()))
            .collect(),
        compiled_for: model.compiled.map(|compiled| compiled.provider),
        precision: model.compiled.map(|compiled| compiled.precision),
        buckets: model.buckets(config.batching.buckets()),
        generate_slots: config.generation.generate_slots.into(),
        generate_bytes_max: to_usize(config.generation.generate_cache_bytes.as_u64()),
        gpu_memory_limit: Some(to_usize(config.model.gpu_memory_limit.as_u64()))
            .filter(|&limit| limit > 0),
        cuda_graphs: config.model.cuda_graphs == CudaGraphs::Auto,
        generate_attention: config.generation.generate_attention.into(),
        gpu_copies: config.model.copies.gpu_copies,
    }
}

/// Converts a size in bytes to `usize`; a size that is too large becomes the
/// largest one.
pub(super) fn to_usize(size: u64) -> usize {
    usize::try_from(size).unwrap_or(usize::MAX)
}
