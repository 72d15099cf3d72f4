//! Generation of sequences in ONNX Runtime: the graph `generate` and its
//! key/value cache.
//!
//! The keys of a layer are one buffer of `(slots, heads, positions, elements)`
//! that is allocated once, and so are its values. A run is given the rows of
//! some slots as input and as output, so it writes new keys and values in place
//! and copies nothing. These views are bound once for each range of slots that
//! is ever run; only a few integers change from step to step.
//!
//! On a GPU a step always runs with all slots, whose inputs and outputs are in
//! the device's memory, so that it can be captured as one CUDA graph. A step of
//! few slots would take less time: see benches/GPU.md.
//!
//! The attention operator of the graph chooses the order of numbers within a
//! head; all operators keep whole blocks of [`BLOCK`] positions one after
//! another.
#![expect(
    unsafe_code,
    reason = "ONNX Runtime has no safe way to bind a part of a buffer as input and as output"
)]

use std::collections::BTreeMap;
use std::ffi::{CString, c_void};
use std::path::Path;
use std::time::{Duration, Instant};

use memmap2::{Advice, MmapMut, UncheckedAdvice};
use ort::AsPointer as _;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, RunOptions, Session};
use ort::value::{
    DynTensor, PrimitiveTensorElementType, Shape, Tensor, TensorElementType, TensorRefMut,
    ValueType,
};

use super::whole_images::{GRAPH_ID, NO_GRAPH};
use crate::engine::{RunSpan, SequenceFacts, SlotFeed, SlotFeedRow, WarmRun};
use crate::kernels::attention::{BLOCK, SharedPrefix};
use crate::model::graph::{Graph, PREFIXES};
use crate::model::precision::Provider;
use crate::runtime::error::{EngineError, runtime};
use crate::runtime::load::Loader;
use crate::runtime::{GpuAttention, Residence, Runtime, placement};

/// Number of tokens of a primer that are fed in one run on a CPU. Such a run
/// takes about as long as a few steps of imagegpt-small, so that it hardly
/// delays the images that are being generated.
const CHUNK_CPU: usize = 64;
/// Smallest number of rows of a step of ONNX Runtime's operators on a CPU, if
/// there are that many slots: kernels for a single row add in another order than
/// those for several rows. The worker's own operator does not.
const ROWS_MIN_CPU: usize = 2;
/// Bound of the number of slots for the arithmetic of sizes; no worker has as
/// many.
const SLOTS_MAX: usize = 1 << 16;
/// Number of tokens of a primer that are fed in one run on a GPU, which fewer
/// tokens would not fill.
const CHUNK_CUDA: usize = 256;

/// Size of what is copied at a time to fill slots: large enough that
/// launching the copies takes less time than they do, and small beside any
/// cache.
const FILLING_BYTES_MAX: usize = 16 << 20;

/// Inputs of a step that change from step to step.
const STEP_INPUTS: [&str; 3] = ["input_ids", "position_ids", "seqlens_k"];
/// Id of the captured step, the only one of its session.
const STEP_GRAPH: &str = "1";

/// Settings of generation.
#[derive(Debug, Clone, Copy)]
pub(super) struct SequenceOptions {
    /// Number of slots; fewer are made if `bytes_max` does not suffice.
    pub(super) n_slots: usize,
    /// Largest size of all keys and values, in bytes.
    pub(super) bytes_max: usize,
    pub(super) positions: usize,
    pub(super) n_colors: usize,
    pub(super) attention: GpuAttention,
}

/// Engine of generation, with a key/value cache that is updated in place.
pub(super) struct SequenceEngine {
    pub(super) facts: SequenceFacts,
    /// Bindings by first slot and number of slots; dropped before the buffers,
    /// to which they refer.
    bound: BTreeMap<(usize, usize), IoBinding>,
    /// Step of all slots, if steps always run at that size.
    step: Option<Step>,
    /// Options of runs that are not captured.
    uncaptured: RunOptions,
    captures: bool,
    session: Session,
    buffers: Vec<Buffer>,
    memory: MemoryInfo<'static>,
    /// True if steps always run with all slots, from memory of the device, as on
    /// a GPU.
    has_one_size: bool,
    n_layers: usize,
    element: TensorElementType,
    /// Shape of one slot in one buffer: heads, positions in whole blocks,
    /// elements.
    slot: [usize; 3],
    positions: usize,
    n_colors: usize,
    /// True if there is an unused slot that is run beside the only real slot,
    /// since a product of one row may add in another order than a product of
    /// several rows.
    has_scratch: bool,
}

/// Buffer of the keys or the values of one layer.
struct Buffer {
    past: String,
    present: String,
    place: Place,
}

/// Memory of a buffer.
enum Place {
    /// Memory of the host, in huge pages if the system has them: a step reads
    /// small parts at thousands of places, and with small pages would wait for
    /// address translation as long as for the numbers.
    Host(MmapMut),
    Device(DynTensor),
}

impl Place {
    fn data(&mut self) -> *mut c_void {
        match self {
            Self::Host(memory) => memory.as_mut_ptr().cast(),
            Self::Device(tensor) => tensor.data_ptr_mut(),
        }
    }
}

impl SequenceEngine {
    /// Opens the graph. [`SequenceEngine::prepare`] comes next.
    pub(super) fn open(
        runtime_: &Runtime,
        loader: &mut Loader,
        path: &Path,
        options: SequenceOptions,
    ) -> Result<Self, EngineError> {
        let file = path.display().to_string();
        let refuse = |reason: String| EngineError::Graph {
            file: file.clone(),
            reason,
        };
        let is_cuda = runtime_.provider == Provider::Cuda;
        // A step reads every weight for a few rows: packed weights are twice as
        // fast, and give each row the same bits whatever the other rows are.
        let packed = Runtime {
            residence: Residence::Packed,
            attention: options.attention,
            ..runtime_.clone()
        };
        let session = loader.session(&packed, path)?;
        let placement = placement::placement(&session).map_err(runtime)?;
        placement::check(&placement, runtime_.provider, true).map_err(refuse)?;
        let (n_layers, element, slot) = layout(&session, options.positions)
            .ok_or_else(|| refuse("the inputs of its key/value cache are not known".to_owned()))?;
        let slot_bytes = slot_bytes(n_layers, slot, element).ok_or_else(|| {
            refuse(format!(
                "its key/value cache of {slot:?} per layer and image is too large for memory"
            ))
        })?;
        let n_slots = options.n_slots.min(options.bytes_max / slot_bytes.max(1));
        if n_slots == 0 {
            return Err(EngineError::NotLoaded(format!(
                "the key/value cache of one generated image takes {slot_bytes} bytes; the limit is \
                 {} (--generate-cache-bytes); raise it, or turn generation off with \
                 --generate-slots 0",
                options.bytes_max
            )));
        }
        let memory = memory_of(runtime_).map_err(runtime)?;
        let mut uncaptured = RunOptions::new().map_err(runtime)?;
        if runtime_.cuda_graphs {
            uncaptured.set(GRAPH_ID, NO_GRAPH).map_err(runtime)?;
        }
        // Tests use the path of captured runs on a CPU.
        let has_one_size = is_cuda || runtime_.cuda_graphs;
        // Only the worker's own operator has this input.
        let shares_prefixes = (session.inputs().iter()).any(|input| input.name() == PREFIXES);
        let rows_min = match (has_one_size, shares_prefixes) {
            (true, _) => n_slots,
            (false, true) => 1,
            (false, false) => ROWS_MIN_CPU,
        };
        Ok(Self {
            facts: SequenceFacts {
                n_slots,
                slot_bytes,
                chunk: if is_cuda { CHUNK_CUDA } else { CHUNK_CPU },
                chunks_are_powers: has_one_size,
                rows_min,
                shares_prefixes,
            },
            bound: BTreeMap::new(),
            step: None,
            uncaptured,
            captures: runtime_.cuda_graphs,
            session,
            buffers: Vec::new(),
            memory,
            has_one_size,
            n_layers,
            element,
            slot,
            positions: options.positions,
            n_colors: options.n_colors,
            has_scratch: n_slots == 1 && !shares_prefixes,
        })
    }

    /// Allocates the key/value cache and binds the step of all slots.
    pub(super) fn prepare(&mut self) -> Result<(), EngineError> {
        self.allocate()?;
        self.fill_slots(0, self.n_buffers(), 0.0)?;
        if self.has_one_size {
            self.step = Some(self.step()?);
        }
        Ok(())
    }

    /// Returns the number of slots that have memory, the scratch slot included.
    fn n_buffers(&self) -> usize {
        self.facts.n_slots + usize::from(self.has_scratch)
    }

    fn allocate(&mut self) -> Result<(), EngineError> {
        for layer in 0..self.n_layers {
            for part in ["key", "value"] {
                let place = self.place()?;
                self.buffers.push(Buffer {
                    past: format!("past_{part}.{layer}"),
                    present: format!("{part}.{layer}"),
                    place,
                });
            }
        }
        Ok(())
    }

    /// Allocates the memory of one buffer.
    fn place(&self) -> Result<Place, EngineError> {
        if self.has_one_size {
            let allocator = self.allocator()?;
            let [heads, positions, position_len] = self.slot;
            let shape = [self.n_buffers(), heads, positions, position_len];
            return DynTensor::new(&allocator, self.element, shape)
                .map(Place::Device)
                .map_err(runtime);
        }
        let bytes = self.n_buffers() * self.buffer_bytes();
        let memory = MmapMut::map_anon(bytes).map_err(|error| {
            EngineError::OutOfMemory(format!(
                "cannot allocate {bytes} bytes for keys or values: {error}"
            ))
        })?;
        Ok(Place::Host(memory))
    }

    fn allocator(&self) -> Result<Allocator, EngineError> {
        Allocator::new(&self.session, self.memory.clone()).map_err(runtime)
    }

    /// Sets the keys and values of `n` slots from `first` on to a number. Memory
    /// of a device is not zero when it is allocated.
    pub(super) fn fill_slots(
        &mut self,
        first: usize,
        n: usize,
        number: f32,
    ) -> Result<(), EngineError> {
        self.check_slots(first, n)?;
        match self.element {
            TensorElementType::Float16 => self.fill_as(first, n, half::f16::from_f32(number)),
            TensorElementType::Bfloat16 => self.fill_as(first, n, half::bf16::from_f32(number)),
            // Bytes of the worker's own format, in which zero alone is known.
            TensorElementType::Uint8 if number == 0.0 => self.fill_as(first, n, 0_u8),
            TensorElementType::Uint8 => Err(EngineError::Runtime(format!(
                "keys and values of this model cannot be {number}"
            ))),
            _ => self.fill_as(first, n, number),
        }
    }

    fn fill_as<T>(&mut self, first: usize, n: usize, number: T) -> Result<(), EngineError>
    where
        T: PrimitiveTensorElementType + bytemuck::Pod + std::fmt::Debug,
    {
        let slot_bytes = self.buffer_bytes();
        if !self.has_one_size {
            for buffer in &mut self.buffers {
                if let Place::Host(memory) = &mut buffer.place {
                    let slots = &mut memory[first * slot_bytes..(first + n) * slot_bytes];
                    bytemuck::cast_slice_mut::<u8, T>(slots).fill(number);
                }
            }
            return Ok(());
        }
        let most = (FILLING_BYTES_MAX / slot_bytes.max(1)).clamp(1, n.max(1));
        let mut filling: Option<Filling<T>> = None;
        for start in (first..first + n).step_by(most) {
            let n = most.min(first + n - start);
            if filling.as_ref().is_none_or(|filling| filling.n_slots != n) {
                filling = Some(self.filling(n, number)?);
            }
            for buffer in &mut self.buffers {
                let view = View {
                    memory: &self.memory,
                    first: start,
                    shape: [n, self.slot[0], self.slot[1], self.slot[2]],
                };
                if let Some(filling) = &mut filling {
                    filling.copy_to(&view, buffer).map_err(runtime)?;
                }
            }
        }
        Ok(())
    }

    /// Makes a copy of `number` for each place of `n` slots of one buffer, on the
    /// device if possible.
    fn filling<T>(&self, n: usize, number: T) -> Result<Filling<T>, EngineError>
    where
        T: PrimitiveTensorElementType + bytemuck::Pod + std::fmt::Debug,
    {
        let [heads, positions, position_len] = self.slot;
        let shape = [n, heads, positions, position_len];
        let values = vec![number; shape.iter().product()];
        let host = Tensor::from_array((shape, values)).map_err(runtime)?;
        let allocator = self.allocator()?;
        let on_device = || -> ort::Result<Tensor<T>> {
            let mut device = Tensor::new(&allocator, shape)?;
            host.copy_into(&mut device)?;
            Ok(device)
        };
        // Without memory for it on the device, each copy comes from the host.
        let device = on_device().inspect_err(|error| {
            tracing::debug!(%error, "keys and values are filled from the host");
        });
        Ok(Filling {
            n_slots: n,
            host,
            device: device.ok(),
        })
    }

    /// Returns the size of one slot in one buffer, in bytes.
    fn buffer_bytes(&self) -> usize {
        self.slot.iter().product::<usize>() * element_bytes(self.element)
    }

    /// Runs a primer and a step of each size, before any caller waits for them.
    pub(super) fn warm_up(&mut self) -> Result<Vec<WarmRun>, EngineError> {
        let mut warm = Vec::new();
        let mut logits = Vec::new();
        self.warm_up_primers(&mut logits)?;
        let start = u16::try_from(self.n_colors).unwrap_or(u16::MAX);
        for size in self.facts.sizes().iter() {
            let row = SlotFeedRow {
                tokens: &[start],
                past: 0,
            };
            let rows = vec![row; size];
            let feed = SlotFeed {
                first_slot: 0,
                rows: &rows,
                prefixes: &[],
            };
            let mut elapsed = Duration::ZERO;
            // The first run of a size allocates.
            for _ in 0..2 {
                let started = Instant::now();
                self.feed(&feed, &mut logits, &mut None)?;
                elapsed = started.elapsed();
            }
            warm.push(WarmRun {
                graph: Graph::Generate,
                bucket: size,
                elapsed,
            });
        }
        self.use_huge_pages();
        Ok(warm)
    }

    /// Runs primers of all lengths, first and later pieces: on a GPU, kernels
    /// are chosen and built for each length.
    fn warm_up_primers(&mut self, logits: &mut Vec<f32>) -> Result<(), EngineError> {
        let (facts, positions) = (self.facts, self.positions);
        for length in facts.pieces(positions) {
            let tokens: Vec<u16> = vec![0; length];
            let later = facts.chunks_are_powers.then_some(facts.chunk);
            let pasts = std::iter::once(0).chain(later);
            for past in pasts.filter(|past| past + length <= positions) {
                let piece = SlotFeedRow {
                    tokens: &tokens,
                    past,
                };
                let feed = SlotFeed {
                    first_slot: 0,
                    rows: &[piece],
                    prefixes: &[],
                };
                self.feed(&feed, logits, &mut None)?;
            }
        }
        Ok(())
    }

    /// Asks for huge pages, once the warm-up is over: it writes a few positions
    /// of each slot and head, for which huge pages would take all of the memory
    /// before there is a sequence.
    fn use_huge_pages(&self) {
        #[cfg(target_os = "linux")]
        for buffer in &self.buffers {
            if let Place::Host(memory) = &buffer.place {
                // SAFETY: the mapping is anonymous, so it reads as zeros
                // afterwards, and no run reads keys or values that it has not
                // written since. The small pages would stay where they are.
                let given = unsafe { memory.unchecked_advise(UncheckedAdvice::DontNeed) };
                // Without huge pages, small pages are used.
                if let Err(error) = given.and(memory.advise(Advice::HugePage)) {
                    tracing::debug!(%error, "keys and values are in small pages");
                }
            }
        }
    }

    pub(super) fn feed(
        &mut self,
        feed: &SlotFeed<'_>,
        logits: &mut Vec<f32>,
        span: &mut Option<RunSpan>,
    ) -> Result<(), EngineError> {
        let beside;
        let mut rows = feed.rows;
        if self.has_scratch
            && let [row] = rows
            && row.tokens.len() == 1
        {
            let nobody = SlotFeedRow { past: 0, ..*row };
            beside = [*row, nobody];
            rows = &beside;
        }
        if let Some(step) = &mut self.step
            && (feed.first_slot, rows.len()) == (0, step.n_rows)
            && rows.iter().all(|row| row.tokens.len() == 1)
        {
            let values = step.run(&mut self.session, rows, span)?;
            logits.clear();
            logits.extend_from_slice(&values[..feed.rows.len() * self.n_colors]);
            return Ok(());
        }
        let range = (feed.first_slot, rows.len());
        if !self.bound.contains_key(&range) {
            let binding = self.bind(feed.first_slot, rows.len())?;
            self.bound.insert(range, binding);
        }
        let binding = self
            .bound
            .get_mut(&range)
            .ok_or_else(|| EngineError::Runtime("a binding was lost".to_owned()))?;
        bind_tokens(binding, rows).map_err(runtime)?;
        if self.facts.shares_prefixes {
            bind_prefixes(binding, rows.len(), feed.prefixes).map_err(runtime)?;
        }
        let session = &mut self.session;
        let options = &self.uncaptured;
        let (outputs, ran) = RunSpan::of(|| session.run_binding_with_options(binding, options));
        *span = Some(ran);
        let outputs = outputs.map_err(runtime)?;
        let output = outputs
            .get("logits")
            .ok_or_else(|| EngineError::Runtime("the run returned no logits".to_owned()))?;
        let (_, values) = output.try_extract_tensor::<f32>().map_err(runtime)?;
        if values.len() != rows.len() * self.n_colors {
            return Err(EngineError::Output {
                got: format!("{} logits", values.len()),
                expected: format!("{} x {}", rows.len(), self.n_colors),
            });
        }
        logits.clear();
        logits.extend_from_slice(&values[..feed.rows.len() * self.n_colors]);
        Ok(())
    }

    /// Binds the keys and values of `n` slots from `first` on, and the logits.
    fn bind(&mut self, first: usize, n: usize) -> Result<IoBinding, EngineError> {
        let mut binding = self.bind_slots(first, n)?;
        let host = MemoryInfo::new(
            AllocationDevice::CPU,
            0,
            AllocatorType::Device,
            MemoryType::CPUOutput,
        )
        .map_err(runtime)?;
        binding
            .bind_output_to_device("logits", &host)
            .map_err(runtime)?;
        Ok(binding)
    }

    /// Refuses slots that do not exist.
    fn check_slots(&self, first: usize, n: usize) -> Result<(), EngineError> {
        let n_slots = self.n_buffers();
        match first.checked_add(n) {
            Some(end) if end <= n_slots => Ok(()),
            _ => Err(EngineError::Runtime(format!(
                "{n} slots from {first} on were requested; there are {n_slots}"
            ))),
        }
    }

    /// Binds the keys and values of `n` slots from `first` on.
    fn bind_slots(&mut self, first: usize, n: usize) -> Result<IoBinding, EngineError> {
        self.check_slots(first, n)?;
        let mut binding = self.session.create_binding().map_err(runtime)?;
        for buffer in &mut self.buffers {
            let view = View {
                memory: &self.memory,
                first,
                shape: [n, self.slot[0], self.slot[1], self.slot[2]],
            };
            match self.element {
                TensorElementType::Float16 => view.bind::<half::f16>(&mut binding, buffer),
                TensorElementType::Bfloat16 => view.bind::<half::bf16>(&mut binding, buffer),
                TensorElementType::Uint8 => view.bind::<u8>(&mut binding, buffer),
                _ => view.bind::<f32>(&mut binding, buffer),
            }
            .map_err(runtime)?;
        }
        Ok(binding)
    }

    /// Makes the step of all slots.
    fn step(&mut self) -> Result<Step, EngineError> {
        let n_rows = self.n_buffers();
        let mut binding = self.bind_slots(0, n_rows)?;
        let allocator = Allocator::new(&self.session, self.memory.clone()).map_err(runtime)?;
        let new = |allocator: &Allocator| Placed::new(allocator, n_rows, self.n_colors);
        let host = new(&Allocator::default()).map_err(runtime)?;
        let mut device = new(&allocator).map_err(runtime)?;
        for (name, tensor) in STEP_INPUTS.into_iter().zip(&device.tokens) {
            binding.bind_input(name, tensor).map_err(runtime)?;
        }
        binding
            .bind_output("logits", &mut device.logits)
            .map_err(runtime)?;
        // This input is read on the host, so a captured step always has the
        // value of its capture: the largest possible number, which only affects
        // how the work is split.
        let scalar: [usize; 0] = [];
        let most = i32::try_from(self.positions).unwrap_or(i32::MAX);
        let most = Tensor::from_array((scalar, vec![most])).map_err(runtime)?;
        binding
            .bind_input("total_sequence_length", &most)
            .map_err(runtime)?;
        let mut options = RunOptions::new().map_err(runtime)?;
        if self.captures {
            options.set(GRAPH_ID, STEP_GRAPH).map_err(runtime)?;
        }
        Ok(Step {
            n_rows,
            binding,
            host,
            device,
            options,
        })
    }

    /// Copies the first `n` positions of a slot, rounded up to whole blocks;
    /// returns false if the memory is not the host's.
    pub(super) fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool {
        let [heads, positions, position_len] = self.slot;
        let position_bytes = position_len * element_bytes(self.element);
        let head_bytes = positions * position_bytes;
        let n_bytes = n.next_multiple_of(BLOCK).min(positions) * position_bytes;
        self.buffers.iter_mut().all(|buffer| {
            let Place::Host(memory) = &mut buffer.place else {
                return false;
            };
            for head in 0..heads {
                let start = |slot: usize| (slot * heads + head) * head_bytes;
                let fits = start(from.max(to)) + n_bytes <= memory.len();
                if !fits {
                    return false;
                }
                memory.copy_within(start(from)..start(from) + n_bytes, start(to));
            }
            true
        })
    }
}

/// Inputs and outputs of a step other than keys and values.
struct Placed {
    /// Inputs in the order of [`STEP_INPUTS`].
    tokens: [Tensor<i32>; 3],
    logits: Tensor<f32>,
}

impl Placed {
    fn new(allocator: &Allocator, n_rows: usize, n_colors: usize) -> ort::Result<Self> {
        Ok(Self {
            tokens: [
                Tensor::new(allocator, [n_rows, 1])?,
                Tensor::new(allocator, [n_rows, 1])?,
                Tensor::new(allocator, [n_rows])?,
            ],
            logits: Tensor::new(allocator, [n_rows, n_colors])?,
        })
    }
}

/// Step of all slots, bound once to memory of the device.
struct Step {
    n_rows: usize,
    /// Binding of the tensors below, before which it is dropped.
    binding: IoBinding,
    host: Placed,
    device: Placed,
    options: RunOptions,
}

impl Step {
    /// Runs the step and returns the logits of all rows.
    fn run(
        &mut self,
        session: &mut Session,
        rows: &[SlotFeedRow<'_>],
        span: &mut Option<RunSpan>,
    ) -> Result<&[f32], EngineError> {
        let int32 = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
        let [ids, positions, ends] = &mut self.host.tokens;
        let [ids, positions, ends] = [ids, positions, ends].map(|host| host.extract_tensor_mut().1);
        let places = ids.iter_mut().zip(positions).zip(ends);
        for (row, ((id, position), end)) in rows.iter().zip(places) {
            *id = row.tokens.first().map_or(0, |&token| i32::from(token));
            *position = int32(row.past);
            // ONNX Runtime's convention: tokens after the run, less one.
            *end = int32(row.past);
        }
        let (outcome, ran) = RunSpan::of(|| {
            for (host, device) in self.host.tokens.iter().zip(&mut self.device.tokens) {
                host.copy_into(device)?;
            }
            session.run_binding_with_options(&self.binding, &self.options)?;
            self.device.logits.copy_into(&mut self.host.logits)
        });
        *span = Some(ran);
        outcome.map_err(runtime)?;
        Ok(self.host.logits.extract_tensor().1)
    }
}

/// Returns the size of the key/value cache of one image in bytes, or `None` if
/// [`SLOTS_MAX`] images would not be addressable. Thus none of the sizes and
/// offsets below overflows.
fn slot_bytes(n_layers: usize, slot: [usize; 3], element: TensorElementType) -> Option<usize> {
    let mut factors = [2, n_layers].into_iter().chain(slot);
    let numbers = factors.try_fold(element_bytes(element), usize::checked_mul)?;
    (numbers <= isize::MAX as usize / SLOTS_MAX).then_some(numbers)
}

fn element_bytes(element: TensorElementType) -> usize {
    match element {
        TensorElementType::Uint8 => 1,
        TensorElementType::Float16 | TensorElementType::Bfloat16 => 2,
        _ => 4,
    }
}

/// Returns the memory of the device that a runtime runs on.
fn memory_of(runtime: &Runtime) -> ort::Result<MemoryInfo<'static>> {
    let (device, device_id) = match runtime.provider {
        Provider::Cuda => (AllocationDevice::CUDA, runtime.device_id),
        Provider::Cpu => (AllocationDevice::CPU, 0),
    };
    MemoryInfo::new(
        device,
        device_id,
        AllocatorType::Device,
        MemoryType::Default,
    )
}

/// Returns the number of layers with a key/value cache, its type, and its shape
/// for one image: heads, positions in whole blocks, and elements per position.
fn layout(session: &Session, positions: usize) -> Option<(usize, TensorElementType, [usize; 3])> {
    let mut keys = session
        .inputs()
        .iter()
        .filter(|input| input.name().starts_with("past_key."));
    let ValueType::Tensor { ty, shape, .. } = keys.next()?.dtype() else {
        return None;
    };
    let &[_, heads, _, position_len] = &**shape else {
        return None;
    };
    let size = |extent: i64| usize::try_from(extent).ok().filter(|size| *size > 0);
    Some((
        1 + keys.count(),
        *ty,
        [
            size(heads)?,
            positions.next_multiple_of(BLOCK),
            size(position_len)?,
        ],
    ))
}

/// One number for all places of some slots of one buffer.
struct Filling<T: PrimitiveTensorElementType + std::fmt::Debug> {
    n_slots: usize,
    host: Tensor<T>,
    /// The same on the device, from which copies are hundreds of times as fast.
    device: Option<Tensor<T>>,
}

impl<T: PrimitiveTensorElementType + std::fmt::Debug> Filling<T> {
    /// Copies the number to as many slots. If a copy within the device fails,
    /// this and all others come from the host.
    fn copy_to(&mut self, view: &View<'_>, buffer: &mut Buffer) -> ort::Result<()> {
        if let Some(device) = &self.device {
            match device.copy_into(view.tensor::<T>(&mut buffer.place)?) {
                Ok(()) => return Ok(()),
                Err(error) => {
                    tracing::debug!(%error, "keys and values are filled from the host");
                    self.device = None;
                }
            }
        }
        self.host.copy_into(view.tensor::<T>(&mut buffer.place)?)
    }
}

/// View of some slots of a buffer.
struct View<'a> {
    memory: &'a MemoryInfo<'static>,
    first: usize,
    shape: [usize; 4],
}

impl View<'_> {
    /// Returns the slots as a tensor.
    fn tensor<'b, T: PrimitiveTensorElementType + std::fmt::Debug>(
        &self,
        place: &'b mut Place,
    ) -> ort::Result<TensorRefMut<'b, T>> {
        let [_, heads, positions, position_len] = self.shape;
        let offset = self.first * heads * positions * position_len * size_of::<T>();
        let data = place.data().wrapping_byte_add(offset);
        let shape = Shape::new(
            self.shape
                .map(|size| i64::try_from(size).unwrap_or(i64::MAX)),
        );
        // SAFETY: `check_slots` has checked that the slots are within the
        // buffer. The buffer's size did not overflow when it was allocated,
        // `self.memory` describes it, and `SequenceEngine` neither moves nor
        // frees it while a binding exists.
        unsafe { TensorRefMut::from_raw(self.memory.clone(), data, shape) }
    }

    /// Binds the view as input (past) and as output (present).
    fn bind<T: PrimitiveTensorElementType + std::fmt::Debug>(
        &self,
        binding: &mut IoBinding,
        buffer: &mut Buffer,
    ) -> ort::Result<()> {
        let view = self.tensor::<T>(&mut buffer.place)?;
        let name = CString::new(buffer.past.as_str()).map_err(ort::Error::wrap)?;
        // SAFETY: all three pointers are to values that live during the call,
        // and ONNX Runtime keeps its own reference to the tensor. The safe
        // `bind_input` would bind a copy of the tensor.
        unsafe {
            ort::Error::result_from_status((ort::api().BindInput)(
                binding.ptr_mut(),
                name.as_ptr(),
                view.ptr(),
            ))?;
        }
        binding.bind_output(buffer.present.as_str(), view)
    }
}

/// Binds the inputs that change from run to run.
fn bind_tokens(binding: &mut IoBinding, rows: &[SlotFeedRow<'_>]) -> ort::Result<()> {
    let int32 = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
    let n_rows = rows.len();
    let length = rows.iter().map(|row| row.tokens.len()).max().unwrap_or(0);
    let mut ids = Vec::with_capacity(n_rows * length);
    let mut positions = Vec::with_capacity(n_rows * length);
    let mut ends = Vec::with_capacity(n_rows);
    for row in rows {
        ids.extend(row.tokens.iter().map(|&token| i32::from(token)));
        positions.extend((row.past..row.past + row.tokens.len()).map(int32));
        // ONNX Runtime's convention: tokens after the run, less one.
        ends.push(int32(row.past + row.tokens.len() - 1));
    }
    let most = ends.iter().max().map_or(1, |end| end + 1);
    let scalar: [usize; 0] = [];
    binding.bind_input("input_ids", &Tensor::from_array(([n_rows, length], ids))?)?;
    binding.bind_input(
        "position_ids",
        &Tensor::from_array(([n_rows, length], positions))?,
    )?;
    binding.bind_input("seqlens_k", &Tensor::from_array(([n_rows], ends))?)?;
    binding.bind_input(
        "total_sequence_length",
        &Tensor::from_array((scalar, vec![most]))?,
    )
}

/// Binds the shared prefixes of `n_rows` rows.
fn bind_prefixes(
    binding: &mut IoBinding,
    n_rows: usize,
    prefixes: &[SharedPrefix],
) -> ort::Result<()> {
    let int32 = |size: usize| i32::try_from(size).unwrap_or(i32::MAX);
    let prefix = |row| prefixes.get(row).copied().unwrap_or_default();
    let pairs = (0..n_rows).map(prefix);
    let pairs: Vec<i32> = pairs
        .flat_map(|SharedPrefix { of, len }| [int32(of), int32(len)])
        .collect();
    binding.bind_input(PREFIXES, &Tensor::from_array(([n_rows, 2], pairs))?)
}

#[cfg(test)]
mod tests;
