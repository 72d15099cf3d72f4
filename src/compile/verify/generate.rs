//! Verification of `generate`: a primer in one run, then tokens one by one,
//! with sequences at different positions and a key/value cache that is updated
//! in place.

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session};
use ort::value::{DynTensor, Tensor, TensorElementType};

use super::{Nearness, Trial};
use crate::compile::graph::{Attention, GraphPlan};
use crate::kernels::attention::BLOCK;
use crate::model::graph::PREFIXES;
use crate::model::onnx::DataType;
use crate::model::precision::Provider;
use crate::runtime::zeros;

/// Number of tokens by which the second sequence lags behind the first.
const LAG: usize = 3;

pub(super) fn nearness(
    trial: &Trial,
    session: &mut Session,
    plan: &GraphPlan<'_>,
    provider: Provider,
) -> ort::Result<Nearness> {
    let n_positions = trial.n_positions();
    let n_colors = plan.architecture.n_colors();
    let mut binding = session.create_binding()?;
    let mut cache = bind_cache(trial, session, plan, provider, &mut binding)?;
    let cpu = MemoryInfo::new(
        AllocationDevice::CPU,
        0,
        AllocatorType::Device,
        MemoryType::CPUOutput,
    )?;
    binding.bind_output_to_device("logits", &cpu)?;
    let mut found = Vec::new();
    let mut expected = Vec::new();
    let primer = (n_positions / 2).max(1);
    let mut step = |ends: [usize; 2], length: usize| -> ort::Result<()> {
        bind_step(trial, plan, &mut binding, ends, length)?;
        let outputs = session.run_binding(&binding)?;
        let (_, logits) = outputs["logits"].try_extract_tensor::<f32>()?;
        found.extend_from_slice(logits);
        for (sequence, end) in ends.into_iter().enumerate() {
            let row = sequence * n_positions + end - 1;
            expected.extend_from_slice(&trial.language_logits[row * n_colors..][..n_colors]);
        }
        Ok(())
    };
    step([primer, primer], primer)?;
    for end in primer + 1..=n_positions {
        // The second sequence goes back and computes earlier tokens once more.
        step([end, end.saturating_sub(LAG).max(1)], 1)?;
    }
    cache.clear();
    Ok(Nearness::of(&found, &expected, n_colors))
}

/// Binds each tensor of the key/value cache as input and as output; the
/// returned tensors must outlive the binding's use.
fn bind_cache(
    trial: &Trial,
    session: &Session,
    plan: &GraphPlan<'_>,
    provider: Provider,
    binding: &mut IoBinding,
) -> ort::Result<Vec<DynTensor>> {
    let architecture = plan.architecture;
    let (element, position_len) = plan.cache_position();
    let shape = [
        trial.sequences.len(),
        architecture.n_heads,
        trial.n_positions().next_multiple_of(BLOCK),
        position_len,
    ];
    let element = match element {
        DataType::Uint8 => TensorElementType::Uint8,
        DataType::Float16 => TensorElementType::Float16,
        DataType::Bfloat16 => TensorElementType::Bfloat16,
        _ => TensorElementType::Float32,
    };
    let device = match provider {
        Provider::Cpu => AllocationDevice::CPU,
        Provider::Cuda => AllocationDevice::CUDA,
    };
    let info = MemoryInfo::new(device, 0, AllocatorType::Device, MemoryType::Default)?;
    let allocator = Allocator::new(session, info)?;
    let mut cache = Vec::new();
    for idx in 0..architecture.n_layers {
        for part in ["key", "value"] {
            let mut tensor = DynTensor::new(&allocator, element, shape)?;
            // Kernels may multiply what follows a sequence's end by zero, which
            // gives NaN if it is NaN.
            zeros::clear(&mut tensor)?;
            binding.bind_input(format!("past_{part}.{idx}"), &tensor)?;
            binding.bind_output(format!("{part}.{idx}"), &mut tensor)?;
            cache.push(tensor);
        }
    }
    Ok(cache)
}

/// Binds the inputs of a step: of each sequence, the `length` tokens before its
/// end.
fn bind_step(
    trial: &Trial,
    plan: &GraphPlan<'_>,
    binding: &mut IoBinding,
    ends: [usize; 2],
    length: usize,
) -> ort::Result<()> {
    let int32 = |value: usize| i32::try_from(value).unwrap_or(i32::MAX);
    let mut ids = Vec::new();
    let mut positions = Vec::new();
    for (sequence, end) in trial.sequences.iter().zip(ends) {
        ids.extend_from_slice(&sequence[end - length..end]);
        positions.extend((end - length..end).map(int32));
    }
    let shape = [ends.len(), length];
    let past: Vec<i32> = ends.iter().map(|end| int32(end - 1)).collect();
    let most = int32(ends.into_iter().max().unwrap_or(0));
    binding.bind_input("input_ids", &Tensor::from_array((shape, ids))?)?;
    binding.bind_input("position_ids", &Tensor::from_array((shape, positions))?)?;
    binding.bind_input("seqlens_k", &Tensor::from_array(([ends.len()], past))?)?;
    if plan.attention == Attention::Layers {
        // The sequences share no prefixes.
        let none = vec![0; 2 * ends.len()];
        binding.bind_input(PREFIXES, &Tensor::from_array(([ends.len(), 2], none))?)?;
    }
    let scalar: [usize; 0] = [];
    binding.bind_input(
        "total_sequence_length",
        &Tensor::from_array((scalar, vec![most]))?,
    )
}
