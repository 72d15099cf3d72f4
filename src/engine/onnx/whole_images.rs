//! Graphs over whole images: tokens in, features, states, scores out.
//!
//! What a run of one size reads and writes is made once and bound once; where runs
//! are captured as a CUDA graph it is memory of the device itself, because a
//! captured run reads and writes where it did when it was captured. Only the tokens
//! change from run to run.
//!
//! On the host it is ordinary memory. ONNX Runtime 1.31 refuses an output that is
//! bound to pinned memory (it wants to copy it onto itself), and there is little to
//! gain: 64 images go up in 0.04 ms and their means come down in 0.3, of 19.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, RunOptions, Session, SessionInputValue};
use ort::value::{DynTensor, Outlet, TensorElementType, ValueType};

use super::answers::answers;
use crate::engine::{BatchRow, GraphRun, RunSpan};
use crate::model::graph::Graph;
use crate::model::precision::Provider;
use crate::runtime::error::{EngineError, run_failed, runtime};
use crate::runtime::load::Loader;
use crate::runtime::{Runtime, placement};

/// The key by which a run says which captured graph it is.
pub(super) const GRAPH_ID: &str = "gpu_graph_id";
/// The run that is never captured.
pub(super) const NO_GRAPH: &str = "-1";

/// Graph over whole images, with buffers that are bound once per size.
pub(super) struct WholeGraph {
    pub(super) file: String,
    /// The bindings refer to the session, so they go first.
    bound: BTreeMap<usize, Bound>,
    session: Session,
    inputs: Vec<Input>,
    output: String,
    memory: Memory,
    /// What runs of a size are told; made once, as the buffers are.
    options: BTreeMap<usize, Arc<RunOptions>>,
    /// Sizes of one row of the output, once a run has shown them.
    row: Option<Vec<usize>>,
    captures: bool,
}

struct Input {
    name: String,
    role: Role,
    integer: TensorElementType,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    InputIds,
    AttentionMask,
    PositionIds,
    Targets,
}

impl Role {
    /// Whether its numbers differ from image to image.
    fn varies(self) -> bool {
        matches!(self, Self::InputIds | Self::Targets)
    }

    /// Writes a batch into an input's memory.
    fn fill<T: From<i32> + Copy>(self, places: &mut [T], batch: WholeBatch<'_>) {
        let row_len = batch.positions.max(1);
        for (row, places) in batch.rows.iter().zip(places.chunks_exact_mut(row_len)) {
            self.fill_row(places, row.tokens, batch.start);
        }
        let filled = (batch.rows.len() * row_len).min(places.len());
        for padding in (filled..places.len()).step_by(row_len) {
            places.copy_within(filled - row_len..filled, padding);
        }
    }

    /// With a start token it comes first, and the last token is not fed: it is
    /// only a target.
    fn fill_row<T: From<i32> + Copy>(self, places: &mut [T], tokens: &[u16], start: Option<u16>) {
        match (self, start) {
            (Self::InputIds, Some(start)) => {
                if let Some((first, rest)) = places.split_first_mut() {
                    *first = T::from(start.into());
                    widen(rest, &tokens[..rest.len()]);
                }
            }
            (Self::InputIds, None) | (Self::Targets, _) => widen(places, &tokens[..places.len()]),
            (Self::AttentionMask, _) => places.fill(T::from(1)),
            (Self::PositionIds, _) => {
                for (place, position) in places.iter_mut().zip(0..) {
                    *place = T::from(position);
                }
            }
        }
    }
}

/// A loop that is as fast as memory; the device waits for it.
fn widen<T: From<i32>>(places: &mut [T], tokens: &[u16]) {
    for (place, &token) in places.iter_mut().zip(tokens) {
        *place = T::from(i32::from(token));
    }
}

/// What is run, and at which size.
#[derive(Clone, Copy)]
pub(super) struct WholeBatch<'a> {
    pub(super) rows: &'a [BatchRow<'a>],
    pub(super) size: usize,
    /// Tokens of one row.
    pub(super) positions: usize,
    /// What comes before the first token, where the last one is only a target.
    pub(super) start: Option<u16>,
}

impl WholeGraph {
    pub(super) fn open(
        runtime_: &Runtime,
        loader: &mut Loader,
        graph: Graph,
        path: &Path,
        is_compiled: bool,
    ) -> Result<Self, EngineError> {
        let file = path.display().to_string();
        let refuse = |reason: String| EngineError::Graph {
            file: file.clone(),
            reason,
        };
        let session = loader.session(runtime_, path)?;
        let placement = placement::placement(&session).map_err(runtime)?;
        placement::check(&placement, runtime_.provider, is_compiled).map_err(refuse)?;
        let inputs: Result<Vec<Input>, String> = session
            .inputs()
            .iter()
            .map(|outlet| input(outlet, graph))
            .collect();
        let inputs = inputs.map_err(refuse)?;
        if !inputs.iter().any(|input| input.role == Role::InputIds) {
            return Err(refuse("has no input \"input_ids\"".to_owned()));
        }
        let output = output(&session, graph).map_err(refuse)?;
        Ok(Self {
            file,
            bound: BTreeMap::new(),
            session,
            inputs,
            output,
            memory: Memory {
                provider: runtime_.provider,
                device_id: runtime_.device_id,
            },
            options: BTreeMap::new(),
            row: None,
            captures: runtime_.cuda_graphs,
        })
    }

    /// The options of the next run of `size` images, which nobody has told to
    /// stop yet.
    pub(super) fn options(&mut self, size: usize) -> ort::Result<Arc<RunOptions>> {
        if let Some(options) = self.options.get(&size) {
            options.unterminate()?;
            return Ok(Arc::clone(options));
        }
        let mut options = RunOptions::new()?;
        if self.captures {
            let id = match self.row {
                Some(_) => size.to_string(),
                None => NO_GRAPH.to_owned(),
            };
            options.set(GRAPH_ID, id)?;
        }
        let options = Arc::new(options);
        // The first run is like no other.
        if self.row.is_some() {
            self.options.insert(size, Arc::clone(&options));
        }
        Ok(options)
    }

    /// Runs a batch and cuts out what its rows want.
    pub(super) fn run(
        &mut self,
        run: &GraphRun<'_>,
        batch: WholeBatch<'_>,
        options: &RunOptions,
        span: &mut Option<RunSpan>,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        // Who made the graph may have left open what it returns; the first run
        // shows it, and then there can be memory for it.
        let Some(row) = &self.row else {
            *span = None;
            return self.first_run(run, batch, options);
        };
        if !self.bound.contains_key(&batch.size) {
            let bound = Bound::new(self, row, batch)?;
            self.bound.insert(batch.size, bound);
        }
        let bound = self
            .bound
            .get_mut(&batch.size)
            .ok_or_else(|| EngineError::Runtime("a binding was lost".to_owned()))?;
        bound.feed(&self.inputs, batch)?;
        let session = &mut self.session;
        let (outcome, ran) = RunSpan::of(|| {
            let outcome = session.run_binding_with_options(&bound.binding, options);
            outcome.map(drop)
        });
        *span = Some(ran);
        outcome.map_err(run_failed)?;
        let output = bound.output()?;
        let output = output.try_extract_array().map_err(runtime)?;
        answers(run, batch.positions, &output)
    }

    fn first_run(
        &mut self,
        run: &GraphRun<'_>,
        batch: WholeBatch<'_>,
        options: &RunOptions,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        let feeds = self.feeds(batch)?;
        let outputs = self
            .session
            .run_with_options(feeds, options)
            .map_err(run_failed)?;
        let output = outputs
            .get(&self.output)
            .ok_or_else(|| EngineError::Runtime("the run returned no output".to_owned()))?;
        let output = output.try_extract_array().map_err(runtime)?;
        let row = output.shape().iter().skip(1).copied().collect();
        let answers = answers(run, batch.positions, &output)?;
        self.row = Some(row);
        Ok(answers)
    }

    /// Whether a batch can be run at all.
    pub(super) fn takes(&mut self, batch: WholeBatch<'_>) -> Result<bool, EngineError> {
        let feeds = self.feeds(batch)?;
        Ok(self.session.run(feeds).is_ok())
    }

    fn feeds(
        &self,
        batch: WholeBatch<'_>,
    ) -> Result<Vec<(String, SessionInputValue<'static>)>, EngineError> {
        let allocator = Allocator::default();
        let feeds = self.inputs.iter().map(|input| {
            let mut tensor = input.tensor(&allocator, batch)?;
            input.fill(&mut tensor, batch)?;
            Ok((input.name.clone(), tensor.into()))
        });
        feeds.collect()
    }
}

/// What an input of the graph is for.
fn input(outlet: &Outlet, graph: Graph) -> Result<Input, String> {
    let name = outlet.name();
    let role = match name {
        "input_ids" => Role::InputIds,
        "attention_mask" => Role::AttentionMask,
        "position_ids" => Role::PositionIds,
        "targets" if graph == Graph::Score => Role::Targets,
        _ => {
            return Err(format!(
                "has an input {name:?}; input_ids, attention_mask and position_ids are known"
            ));
        }
    };
    match outlet.dtype() {
        ValueType::Tensor { ty, .. }
            if matches!(ty, TensorElementType::Int64 | TensorElementType::Int32) =>
        {
            Ok(Input {
                name: name.to_owned(),
                role,
                integer: *ty,
            })
        }
        other => Err(format!(
            "input {name:?} is {other:?}; int32 and int64 tensors are supported"
        )),
    }
}

/// The output that a graph is there for.
fn output(session: &Session, graph: Graph) -> Result<String, String> {
    let wanted = match graph {
        Graph::Features(_) => "features",
        Graph::Hidden => "last_hidden_state",
        Graph::Logits | Graph::Generate => "logits",
        Graph::Score => "nll",
    };
    let mut outputs = session.outputs().iter();
    let Some(output) = outputs.find(|outlet| outlet.name() == wanted) else {
        let names: Vec<&str> = session.outputs().iter().map(Outlet::name).collect();
        return Err(format!(
            "has no output {wanted:?}; it has {}",
            names.join(", ")
        ));
    };
    if output.dtype().tensor_type() != Some(TensorElementType::Float32) {
        return Err(format!(
            "output {wanted:?} is {:?}; a float32 tensor is supported",
            output.dtype()
        ));
    }
    Ok(wanted.to_owned())
}

impl Input {
    fn tensor(
        &self,
        allocator: &Allocator,
        batch: WholeBatch<'_>,
    ) -> Result<DynTensor, EngineError> {
        DynTensor::new(allocator, self.integer, [batch.size, batch.positions]).map_err(run_failed)
    }

    /// Writes the numbers of each row; rows that are missing repeat the last
    /// one, which is as cheap as any and has valid tokens.
    fn fill(&self, tensor: &mut DynTensor, batch: WholeBatch<'_>) -> Result<(), EngineError> {
        if self.integer == TensorElementType::Int64 {
            let (_, places) = tensor.try_extract_tensor_mut::<i64>().map_err(runtime)?;
            self.role.fill(places, batch);
        } else {
            let (_, places) = tensor.try_extract_tensor_mut::<i32>().map_err(runtime)?;
            self.role.fill(places, batch);
        }
        Ok(())
    }
}

/// Where memory is made.
#[derive(Clone, Copy)]
struct Memory {
    provider: Provider,
    device_id: i32,
}

impl Memory {
    /// For what the host writes or reads.
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

/// What runs of one size read and write.
struct Bound {
    /// It refers to what follows, so it goes first.
    binding: IoBinding,
    /// What the host writes, as the graph's inputs.
    inputs: Vec<DynTensor>,
    /// What the host reads.
    output: DynTensor,
    /// What a captured run reads and writes instead.
    on_device: Option<OnDevice>,
}

struct OnDevice {
    inputs: Vec<DynTensor>,
    output: DynTensor,
}

impl Bound {
    fn new(graph: &WholeGraph, row: &[usize], batch: WholeBatch<'_>) -> Result<Self, EngineError> {
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
            let output =
                DynTensor::new(allocator, TensorElementType::Float32, shape).map_err(run_failed)?;
            Ok((inputs?, output))
        };
        let (mut inputs, output) = new(&Memory::host(session)?)?;
        let mut on_device = None;
        if graph.captures {
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
        bound.place(graph)?;
        Ok(bound)
    }

    /// Binds what stays where it is.
    fn place(&mut self, graph: &WholeGraph) -> Result<(), EngineError> {
        let output = match &mut self.on_device {
            Some(on_device) => {
                let inputs = graph.inputs.iter().zip(&self.inputs);
                for ((input, host), tensor) in inputs.zip(&mut on_device.inputs) {
                    host.copy_into(&mut *tensor).map_err(run_failed)?;
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

    /// Brings the tokens of a batch to where the run reads them.
    fn feed(&mut self, inputs: &[Input], batch: WholeBatch<'_>) -> Result<(), EngineError> {
        for (idx, input) in inputs.iter().enumerate() {
            // A captured run of another size writes where that one's memory was,
            // and these may have been given the same place since.
            if !input.role.varies() && self.on_device.is_none() {
                continue;
            }
            let Some(tensor) = self.inputs.get_mut(idx) else {
                continue;
            };
            input.fill(tensor, batch)?;
            match &mut self.on_device {
                Some(on_device) => {
                    if let Some(target) = on_device.inputs.get_mut(idx) {
                        tensor.copy_into(target).map_err(run_failed)?;
                    }
                }
                // Binding is what copies to another device.
                None => self
                    .binding
                    .bind_input(&input.name, tensor)
                    .map_err(runtime)?,
            }
        }
        self.binding.synchronize_inputs().map_err(run_failed)
    }

    /// What the last run returned, where the host can read it.
    fn output(&mut self) -> Result<&DynTensor, EngineError> {
        if let Some(on_device) = &self.on_device {
            on_device
                .output
                .copy_into(&mut self.output)
                .map_err(run_failed)?;
        }
        Ok(&self.output)
    }
}

#[cfg(test)]
mod tests;
