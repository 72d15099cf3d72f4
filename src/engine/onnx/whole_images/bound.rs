//! Buffers of the runs of one batch size, on the host and, for captured runs and
//! for copies over the driver, on the device.

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session};
use ort::value::DynTensor;

use super::super::copies::EngineCopies;
use super::inputs::Input;
use super::{WholeBatch, WholeGraph};
use crate::model::precision::Provider;
use crate::runtime::error::{EngineError, runtime};

/// Device whose memory is allocated.
#[derive(Clone, Copy)]
pub(super) struct Memory {
    pub(super) provider: Provider,
    pub(super) device_id: i32,
}

impl Memory {
    /// Returns an allocator of memory that the host writes or reads.
    fn host(session: &Session) -> Result<Allocator, EngineError> {
        allocator(session, AllocationDevice::CPU, 0)
    }

    fn device(self, session: &Session) -> Result<Allocator, EngineError> {
        let (device, device_id) = match self.provider {
            Provider::Cpu => (AllocationDevice::CPU, 0),
            Provider::Cuda => (AllocationDevice::CUDA, self.device_id),
        };
        allocator(session, device, device_id)
    }
}

fn allocator(
    session: &Session,
    device: AllocationDevice<'static>,
    device_id: i32,
) -> Result<Allocator, EngineError> {
    let (kind, memory_type) = (AllocatorType::Device, MemoryType::Default);
    MemoryInfo::new(device, device_id, kind, memory_type)
        .and_then(|memory| Allocator::new(session, memory))
        .map_err(runtime)
}

/// Buffers of the runs of one batch size.
pub(super) struct Bound {
    /// Binding of the tensors below, before which it is dropped.
    pub(super) binding: IoBinding,
    /// Inputs that the host writes, in the order of the graph's inputs.
    inputs: Vec<DynTensor>,
    /// Output that the host reads.
    output: DynTensor,
    /// Inputs and output that a captured run, or one with the driver's copies,
    /// uses instead.
    on_device: Option<OnDevice>,
}

struct OnDevice {
    inputs: Vec<DynTensor>,
    output: DynTensor,
}

impl Bound {
    pub(super) fn new(
        graph: &WholeGraph,
        row: &[usize],
        batch: WholeBatch<'_>,
        copies: &mut EngineCopies,
    ) -> Result<Self, EngineError> {
        let session = &graph.session;
        let new = |allocator: &Allocator| -> Result<(Vec<DynTensor>, DynTensor), EngineError> {
            let inputs: Result<Vec<_>, _> = graph
                .inputs
                .iter()
                .map(|input| input.tensor(allocator, batch))
                .collect();
            let shape: Vec<usize> = std::iter::once(batch.size)
                .chain(row.iter().copied())
                .collect();
            let output = DynTensor::new(allocator, graph.numbers, shape).map_err(runtime)?;
            Ok((inputs?, output))
        };
        let (mut inputs, output) = new(&Memory::host(session)?)?;
        let mut on_device = None;
        if graph.captures || copies.are_the_drivers() {
            copies.reserve(&inputs.iter().collect::<Vec<_>>(), &output);
            let (inputs, output) = new(&graph.memory.device(session)?)?;
            on_device = Some(OnDevice { inputs, output });
        }
        let mut binding = session.create_binding().map_err(runtime)?;
        for (input, tensor) in graph.inputs.iter().zip(&mut inputs) {
            input.fill(tensor, batch)?;
            if on_device.is_none() {
                binding.bind_input(&input.name, tensor).map_err(runtime)?;
            }
        }
        let mut bound = Self {
            binding,
            inputs,
            output,
            on_device,
        };
        bound.place(graph, copies)?;
        Ok(bound)
    }

    /// Binds the inputs and output whose memory never changes.
    fn place(&mut self, graph: &WholeGraph, copies: &mut EngineCopies) -> Result<(), EngineError> {
        let output = match &mut self.on_device {
            Some(on_device) => {
                copies.upload(self.inputs.iter_mut().zip(&mut on_device.inputs))?;
                for (input, tensor) in graph.inputs.iter().zip(&on_device.inputs) {
                    self.binding
                        .bind_input(&input.name, tensor)
                        .map_err(runtime)?;
                }
                &mut on_device.output
            }
            None => &mut self.output,
        };
        self.binding
            .bind_output(&graph.output, output)
            .map_err(runtime)
    }

    /// Copies the tokens of a batch to the memory that the run reads.
    pub(super) fn feed(
        &mut self,
        inputs: &[Input],
        batch: WholeBatch<'_>,
        copies: &mut EngineCopies,
    ) -> Result<(), EngineError> {
        for (input, tensor) in inputs.iter().zip(&mut self.inputs) {
            // A captured run of another size writes to the memory of its
            // capture, which may have been reused for these inputs since; so
            // all are written again.
            if !input.role.varies() && self.on_device.is_none() {
                continue;
            }
            input.fill(tensor, batch)?;
            // Binding copies the tensor to another device.
            if self.on_device.is_none() {
                self.binding
                    .bind_input(&input.name, tensor)
                    .map_err(runtime)?;
            }
        }
        if let Some(on_device) = &mut self.on_device {
            copies.upload(self.inputs.iter_mut().zip(&mut on_device.inputs))?;
            // The driver's copies have been waited for.
            if copies.are_the_drivers() {
                return Ok(());
            }
        }
        self.binding.synchronize_inputs().map_err(runtime)
    }

    /// Returns the output of the last run, in memory that the host can read.
    pub(super) fn output(&mut self, copies: &mut EngineCopies) -> Result<&DynTensor, EngineError> {
        if let Some(on_device) = &mut self.on_device {
            copies.download(&mut on_device.output, &mut self.output)?;
        }
        Ok(&self.output)
    }
}
