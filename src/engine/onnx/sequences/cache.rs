//! Key/value cache of all layers and slots.
//!
//! The keys of a layer are one buffer of `(slots, heads, positions, elements)`
//! that is allocated once, and so are its values. The attention operator of the
//! graph chooses the order of numbers within a head; all operators keep whole
//! blocks of [`BLOCK`] positions one after another.
#![expect(
    unsafe_code,
    reason = "ONNX Runtime has no safe way to bind a part of a buffer as input and as output"
)]

use std::ffi::{CString, c_void};

use memmap2::{Advice, MmapMut, UncheckedAdvice};
use ort::AsPointer as _;
use ort::memory::{AllocationDevice, Allocator, AllocatorType, MemoryInfo, MemoryType};
use ort::session::{IoBinding, Session};
use ort::value::{
    DynTensor, PrimitiveTensorElementType, Shape, Tensor, TensorElementType, TensorRefMut,
    ValueType,
};

use crate::kernels::attention::BLOCK;
use crate::model::precision::Provider;
use crate::runtime::Runtime;
use crate::runtime::error::{EngineError, runtime};

/// Bound of the number of slots for the arithmetic of sizes; no worker has as
/// many.
const SLOTS_MAX: usize = 1 << 16;
/// Size of what is copied at a time to fill slots: large enough that
/// launching the copies takes less time than they do, and small beside any
/// cache.
const FILLING_BYTES_MAX: usize = 16 << 20;

/// Layout of the cache that a graph was compiled with.
#[derive(Debug, Clone, Copy)]
pub(super) struct KvLayout {
    n_layers: usize,
    element: TensorElementType,
    /// Shape of one slot in one buffer: heads, positions in whole blocks,
    /// elements.
    pub(super) slot: [usize; 3],
}

/// Keys and values of all layers and slots.
pub(super) struct KvCache {
    pub(super) buffers: Vec<Buffer>,
    memory: MemoryInfo<'static>,
    /// True if the buffers are allocated by ONNX Runtime, as on a GPU.
    is_on_device: bool,
    /// Number of slots that have memory.
    n_slots: usize,
    pub(super) layout: KvLayout,
}

/// Buffer of the keys or the values of one layer.
pub(super) struct Buffer {
    past: String,
    present: String,
    pub(super) place: Place,
}

/// Memory of a buffer.
pub(super) enum Place {
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

impl KvLayout {
    /// Returns the layout of a graph's cache for images of `positions` tokens;
    /// `None` if the graph has no inputs of that shape.
    pub(super) fn of(session: &Session, positions: usize) -> Option<Self> {
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
        Some(Self {
            n_layers: 1 + keys.count(),
            element: *ty,
            slot: [
                size(heads)?,
                positions.next_multiple_of(BLOCK),
                size(position_len)?,
            ],
        })
    }

    /// Returns the size of the cache of one image in bytes, or `None` if
    /// [`SLOTS_MAX`] images would not be addressable. Thus none of the sizes and
    /// offsets below overflows.
    pub(super) fn slot_bytes(&self) -> Option<usize> {
        let mut factors = [2, self.n_layers].into_iter().chain(self.slot);
        let numbers = factors.try_fold(element_bytes(self.element), usize::checked_mul)?;
        (numbers <= isize::MAX as usize / SLOTS_MAX).then_some(numbers)
    }

    /// Returns the size of one slot in one buffer, in bytes.
    fn buffer_bytes(&self) -> usize {
        self.slot.iter().product::<usize>() * element_bytes(self.element)
    }
}

impl KvCache {
    /// Makes a cache without buffers for the device that a runtime runs on.
    pub(super) fn new(
        runtime_: &Runtime,
        layout: KvLayout,
        n_slots: usize,
        is_on_device: bool,
    ) -> Result<Self, EngineError> {
        Ok(Self {
            buffers: Vec::new(),
            memory: memory_of(runtime_).map_err(runtime)?,
            is_on_device,
            n_slots,
            layout,
        })
    }

    /// Allocates the buffers, whose numbers are not known yet.
    pub(super) fn allocate(&mut self, session: &Session) -> Result<(), EngineError> {
        for layer in 0..self.layout.n_layers {
            for part in ["key", "value"] {
                let place = self.place(session)?;
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
    fn place(&self, session: &Session) -> Result<Place, EngineError> {
        if self.is_on_device {
            let allocator = self.allocator(session)?;
            let [heads, positions, position_len] = self.layout.slot;
            let shape = [self.n_slots, heads, positions, position_len];
            return DynTensor::new(&allocator, self.layout.element, shape)
                .map(Place::Device)
                .map_err(runtime);
        }
        let bytes = self.n_slots * self.layout.buffer_bytes();
        let memory = MmapMut::map_anon(bytes).map_err(|error| {
            EngineError::OutOfMemory(format!(
                "cannot allocate {bytes} bytes for keys or values: {error}"
            ))
        })?;
        Ok(Place::Host(memory))
    }

    /// Returns the allocator of the memory that steps use.
    pub(super) fn allocator(&self, session: &Session) -> Result<Allocator, EngineError> {
        Allocator::new(session, self.memory.clone()).map_err(runtime)
    }

    /// Sets the keys and values of `n` slots from `first` on to a number. Memory
    /// of a device is not zero when it is allocated.
    pub(super) fn fill(
        &mut self,
        session: &Session,
        first: usize,
        n: usize,
        number: f32,
    ) -> Result<(), EngineError> {
        self.check_slots(first, n)?;
        match self.layout.element {
            TensorElementType::Float16 => {
                self.fill_as(session, first, n, half::f16::from_f32(number))
            }
            // Copied as numbers of another type with the same bits, since the
            // copies of ONNX Runtime do not take this type.
            TensorElementType::Bfloat16 => {
                let bits = half::bf16::from_f32(number).to_bits();
                self.fill_as(session, first, n, half::f16::from_bits(bits))
            }
            // Bytes of the worker's own format, in which zero alone is known.
            TensorElementType::Uint8 if number == 0.0 => self.fill_as(session, first, n, 0_u8),
            TensorElementType::Uint8 => Err(EngineError::Runtime(format!(
                "keys and values of this model cannot be {number}"
            ))),
            _ => self.fill_as(session, first, n, number),
        }
    }

    fn fill_as<T>(
        &mut self,
        session: &Session,
        first: usize,
        n: usize,
        number: T,
    ) -> Result<(), EngineError>
    where
        T: PrimitiveTensorElementType + bytemuck::Pod + std::fmt::Debug,
    {
        let slot_bytes = self.layout.buffer_bytes();
        if !self.is_on_device {
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
                filling = Some(self.filling(session, n, number)?);
            }
            for buffer in &mut self.buffers {
                let view = View::of(&self.memory, self.layout.slot, start, n);
                if let Some(filling) = &mut filling {
                    filling.copy_to(&view, buffer).map_err(runtime)?;
                }
            }
        }
        Ok(())
    }

    /// Makes a copy of `number` for each place of `n` slots of one buffer, on the
    /// device if possible.
    fn filling<T>(&self, session: &Session, n: usize, number: T) -> Result<Filling<T>, EngineError>
    where
        T: PrimitiveTensorElementType + bytemuck::Pod + std::fmt::Debug,
    {
        let [heads, positions, position_len] = self.layout.slot;
        let shape = [n, heads, positions, position_len];
        let values = vec![number; shape.iter().product()];
        let host = Tensor::from_array((shape, values)).map_err(runtime)?;
        let allocator = self.allocator(session)?;
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

    /// Refuses slots that do not exist.
    fn check_slots(&self, first: usize, n: usize) -> Result<(), EngineError> {
        let n_slots = self.n_slots;
        match first.checked_add(n) {
            Some(end) if end <= n_slots => Ok(()),
            _ => Err(EngineError::Runtime(format!(
                "{n} slots from {first} on were requested; there are {n_slots}"
            ))),
        }
    }

    /// Binds the keys and values of `n` slots from `first` on.
    pub(super) fn bind(
        &mut self,
        session: &Session,
        first: usize,
        n: usize,
    ) -> Result<IoBinding, EngineError> {
        self.check_slots(first, n)?;
        let mut binding = session.create_binding().map_err(runtime)?;
        for buffer in &mut self.buffers {
            let view = View::of(&self.memory, self.layout.slot, first, n);
            match self.layout.element {
                TensorElementType::Float16 => view.bind::<half::f16>(&mut binding, buffer),
                TensorElementType::Bfloat16 => view.bind::<half::bf16>(&mut binding, buffer),
                TensorElementType::Uint8 => view.bind::<u8>(&mut binding, buffer),
                _ => view.bind::<f32>(&mut binding, buffer),
            }
            .map_err(runtime)?;
        }
        Ok(binding)
    }

    /// Asks for huge pages, once the warm-up is over: it writes a few positions
    /// of each slot and head, for which huge pages would take all of the memory
    /// before there is a sequence.
    pub(super) fn use_huge_pages(&self) {
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

    /// Copies the first `n` positions of a slot, rounded up to whole blocks;
    /// returns false if the memory is not the host's.
    pub(super) fn copy_slot(&mut self, from: usize, to: usize, n: usize) -> bool {
        let [heads, positions, position_len] = self.layout.slot;
        let position_bytes = position_len * element_bytes(self.layout.element);
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

impl<'a> View<'a> {
    fn of(memory: &'a MemoryInfo<'static>, slot: [usize; 3], first: usize, n: usize) -> Self {
        let [heads, positions, position_len] = slot;
        Self {
            memory,
            first,
            shape: [n, heads, positions, position_len],
        }
    }

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

#[cfg(test)]
mod tests;
