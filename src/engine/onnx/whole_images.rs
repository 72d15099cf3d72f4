//! Graphs over whole images, from tokens to features, states or scores.
//!
//! The inputs and outputs of each batch size are allocated and bound once; only
//! the tokens change from run to run. With CUDA graphs they are in the device's
//! memory, because a captured run always uses the addresses of its capture.
//!
//! On the host they are in ordinary memory, since ONNX Runtime 1.31 refuses an
//! output that is bound to pinned memory (it tries to copy it onto itself). Of a
//! run of 19 ms, the upload of 64 images takes 0.04 ms and the download of their
//! means 0.3 ms; the copies also take a lock that all devices share, which
//! benches/GPU.md has a plan for.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use half::f16;
use ndarray::{CowArray, IxDyn};
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, RunOptions, Session, SessionInputValue};
use ort::value::{
    DynTensor, Outlet, PrimitiveTensorElementType, TensorElementType, TensorValueTypeMarker, Value,
    ValueType,
};

use super::answers::answers;
use crate::engine::{BatchRow, GraphRun, RunSpan};
use crate::model::graph::Graph;
use crate::model::precision::Provider;
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::load::Loader;
use crate::runtime::{Runtime, placement};

/// Key of the run option with the id of the captured graph.
pub(super) const GRAPH_ID: &str = "gpu_graph_id";
/// Id of runs that are never captured.
pub(super) const NO_GRAPH: &str = "-1";

/// Graph over whole images, with buffers that are bound once per size.
pub(super) struct WholeGraph {
    pub(super) file: String,
    /// Bound buffers by batch size; dropped before the session, to which they
    /// refer.
    bound: BTreeMap<usize, Bound>,
    session: Session,
    inputs: Vec<Input>,
    output: String,
    /// Type of the output's numbers: float32 or float16.
    numbers: TensorElementType,
    memory: Memory,
    /// Run options by batch size, which are made once like the buffers.
    options: BTreeMap<usize, Arc<RunOptions>>,
    /// Shape of one row of the output, known after the first run.
    row: Option<Vec<usize>>,
    captures: bool,
}

struct Input {
    name: String,
    role: Role,
    element: TensorElementType,
}

/// Number of an input, made of a token, a position or a mask's 1.
trait InputNumber: Copy {
    fn of(number: i32) -> Self;
}

impl InputNumber for i64 {
    fn of(number: i32) -> Self {
        number.into()
    }
}

impl InputNumber for i32 {
    fn of(number: i32) -> Self {
        number
    }
}

impl InputNumber for bool {
    fn of(number: i32) -> Self {
        number != 0
    }
}

/// Masks alone have floats, which are 0 and 1.
impl InputNumber for f32 {
    fn of(number: i32) -> Self {
        if number == 0 { 0.0 } else { 1.0 }
    }
}

impl InputNumber for f16 {
    fn of(number: i32) -> Self {
        if number == 0 { Self::ZERO } else { Self::ONE }
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Role {
    InputIds,
    AttentionMask,
    PositionIds,
    Targets,
}

impl Role {
    /// Returns true if the input's numbers differ from image to image.
    fn varies(self) -> bool {
        matches!(self, Self::InputIds | Self::Targets)
    }

    /// Returns true if the input may have numbers of this type.
    fn takes(self, element: TensorElementType) -> bool {
        use TensorElementType::{Bool, Float16, Float32, Int32, Int64};
        match element {
            Int64 | Int32 => true,
            Bool | Float16 | Float32 => self == Self::AttentionMask,
            _ => false,
        }
    }

    /// Writes a batch into an input's memory, and repeats the last row as
    /// padding.
    fn fill<T: InputNumber>(self, places: &mut [T], batch: WholeBatch<'_>) {
        let row_len = batch.positions.max(1);
        for (row, places) in batch.rows.iter().zip(places.chunks_exact_mut(row_len)) {
            self.fill_row(places, row.tokens, batch.start);
        }
        let filled = (batch.rows.len() * row_len).min(places.len());
        for padding in (filled..places.len()).step_by(row_len) {
            places.copy_within(filled - row_len..filled, padding);
        }
    }

    /// Writes one row. A start token comes first; then the last token of the
    /// image is not fed, since it is only a target.
    fn fill_row<T: InputNumber>(self, places: &mut [T], tokens: &[u16], start: Option<u16>) {
        match (self, start) {
            (Self::InputIds, Some(start)) => {
                if let Some((first, rest)) = places.split_first_mut() {
                    *first = T::of(start.into());
                    widen(rest, &tokens[..rest.len()]);
                }
            }
            (Self::InputIds, None) | (Self::Targets, _) => widen(places, &tokens[..places.len()]),
            (Self::AttentionMask, _) => places.fill(T::of(1)),
            (Self::PositionIds, _) => {
                for (place, position) in places.iter_mut().zip(0..) {
                    *place = T::of(position);
                }
            }
        }
    }
}

/// Converts tokens, in a loop as fast as memory, since the device waits for it.
fn widen<T: InputNumber>(places: &mut [T], tokens: &[u16]) {
    for (place, &token) in places.iter_mut().zip(tokens) {
        *place = T::of(i32::from(token));
    }
}

/// Rows of a run and its batch size.
#[derive(Clone, Copy)]
pub(super) struct WholeBatch<'a> {
    pub(super) rows: &'a [BatchRow<'a>],
    pub(super) size: usize,
    /// Number of tokens per row.
    pub(super) positions: usize,
    /// Start token to put in front of each row, if the last token is only a
    /// target.
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
        let (output, numbers) = output(&session, graph).map_err(refuse)?;
        Ok(Self {
            file,
            bound: BTreeMap::new(),
            session,
            inputs,
            output,
            numbers,
            memory: Memory {
                provider: runtime_.provider,
                device_id: runtime_.device_id,
            },
            options: BTreeMap::new(),
            row: None,
            captures: runtime_.cuda_graphs,
        })
    }

    /// True if runs are captured, all but the first.
    pub(super) fn captures(&self) -> bool {
        self.captures
    }

    /// Returns the options of the next run of `size` images, without a stop
    /// request of an earlier run.
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
        // The first run is not captured, so its options are not kept.
        if self.row.is_some() {
            self.options.insert(size, Arc::clone(&options));
        }
        Ok(options)
    }

    /// Runs a batch and returns the numbers that its rows want.
    pub(super) fn run(
        &mut self,
        run: &GraphRun<'_>,
        batch: WholeBatch<'_>,
        options: &RunOptions,
        span: &mut Option<RunSpan>,
    ) -> Result<Vec<Vec<f32>>, EngineError> {
        // A graph need not declare the shape of its output. The first run shows
        // the shape, and then memory can be allocated.
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
        outcome.map_err(runtime)?;
        let output = floats(bound.output()?)?;
        answers(run, batch.positions, &output.view())
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
            .map_err(runtime)?;
        let output = outputs
            .get(&self.output)
            .ok_or_else(|| EngineError::Runtime("the run returned no output".to_owned()))?;
        let output = floats(output)?;
        let row = output.shape().iter().skip(1).copied().collect();
        let answers = answers(run, batch.positions, &output.view())?;
        self.row = Some(row);
        Ok(answers)
    }

    /// Returns true if a batch can be run without an error.
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

/// Recognizes an input of the graph by its name and type.
fn input(outlet: &Outlet, graph: Graph) -> Result<Input, String> {
    let name = outlet.name();
    let role = match name {
        "input_ids" => Role::InputIds,
        "attention_mask" => Role::AttentionMask,
        "position_ids" => Role::PositionIds,
        "targets" if graph == Graph::Score => Role::Targets,
        _ => {
            return Err(format!(
                "has an input {name:?}; input_ids, attention_mask and position_ids are supported"
            ));
        }
    };
    match outlet.dtype() {
        ValueType::Tensor { ty, .. } if role.takes(*ty) => Ok(Input {
            name: name.to_owned(),
            role,
            element: *ty,
        }),
        other => Err(format!(
            "input {name:?} is {other:?}; int32 and int64 tensors are supported, and for \
             attention_mask tensors of bool, float16 and float32"
        )),
    }
}

/// Returns the numbers of an output as float32.
fn floats<T: TensorValueTypeMarker + ?Sized>(
    output: &Value<T>,
) -> Result<CowArray<'_, f32, IxDyn>, EngineError> {
    if output.dtype().tensor_type() == Some(TensorElementType::Float16) {
        let halves = output.try_extract_array::<f16>().map_err(runtime)?;
        return Ok(halves.mapv(f16::to_f32).into());
    }
    let floats = output.try_extract_array::<f32>().map_err(runtime)?;
    Ok(floats.into())
}

/// Returns the name of a graph's output and the type of its numbers, after
/// checks of both.
fn output(session: &Session, graph: Graph) -> Result<(String, TensorElementType), String> {
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
    match output.dtype().tensor_type() {
        Some(numbers @ (TensorElementType::Float32 | TensorElementType::Float16)) => {
            Ok((wanted.to_owned(), numbers))
        }
        _ => Err(format!(
            "output {wanted:?} is {:?}; it must be a float32 or float16 tensor",
            output.dtype()
        )),
    }
}

impl Input {
    fn tensor(
        &self,
        allocator: &Allocator,
        batch: WholeBatch<'_>,
    ) -> Result<DynTensor, EngineError> {
        DynTensor::new(allocator, self.element, [batch.size, batch.positions]).map_err(runtime)
    }

    /// Writes the numbers of each row; padding repeats the last row, which
    /// costs nothing extra and has valid tokens.
    fn fill(&self, tensor: &mut DynTensor, batch: WholeBatch<'_>) -> Result<(), EngineError> {
        match self.element {
            TensorElementType::Int64 => self.fill_with::<i64>(tensor, batch),
            TensorElementType::Bool => self.fill_with::<bool>(tensor, batch),
            TensorElementType::Float16 => self.fill_with::<f16>(tensor, batch),
            TensorElementType::Float32 => self.fill_with::<f32>(tensor, batch),
            _ => self.fill_with::<i32>(tensor, batch),
        }
    }

    fn fill_with<T: InputNumber + PrimitiveTensorElementType>(
        &self,
        tensor: &mut DynTensor,
        batch: WholeBatch<'_>,
    ) -> Result<(), EngineError> {
        let (_, places) = tensor.try_extract_tensor_mut::<T>().map_err(runtime)?;
        self.role.fill(places, batch);
        Ok(())
    }
}

/// Device whose memory is allocated.
#[derive(Clone, Copy)]
struct Memory {
    provider: Provider,
    device_id: i32,
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
struct Bound {
    /// Binding of the tensors below, before which it is dropped.
    binding: IoBinding,
    /// Inputs that the host writes, in the order of the graph's inputs.
    inputs: Vec<DynTensor>,
    /// Output that the host reads.
    output: DynTensor,
    /// Inputs and output that a captured run uses instead.
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
            let output = DynTensor::new(allocator, graph.numbers, shape).map_err(runtime)?;
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

    /// Binds the inputs and output whose memory never changes.
    fn place(&mut self, graph: &WholeGraph) -> Result<(), EngineError> {
        let output = match &mut self.on_device {
            Some(on_device) => {
                let inputs = graph.inputs.iter().zip(&self.inputs);
                for ((input, host), tensor) in inputs.zip(&mut on_device.inputs) {
                    host.copy_into(&mut *tensor).map_err(runtime)?;
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
    fn feed(&mut self, inputs: &[Input], batch: WholeBatch<'_>) -> Result<(), EngineError> {
        for (idx, input) in inputs.iter().enumerate() {
            // A captured run of another size writes to the memory of its
            // capture, which may have been reused for these inputs since; so
            // all are written again.
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
                        tensor.copy_into(target).map_err(runtime)?;
                    }
                }
                // Binding copies the tensor to another device.
                None => self
                    .binding
                    .bind_input(&input.name, tensor)
                    .map_err(runtime)?,
            }
        }
        self.binding.synchronize_inputs().map_err(runtime)
    }

    /// Returns the output of the last run, in memory that the host can read.
    fn output(&mut self) -> Result<&DynTensor, EngineError> {
        if let Some(on_device) = &self.on_device {
            on_device
                .output
                .copy_into(&mut self.output)
                .map_err(runtime)?;
        }
        Ok(&self.output)
    }
}

#[cfg(test)]
mod tests;
