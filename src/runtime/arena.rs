//! One memory arena for all graphs of a device.
//!
//! A session keeps the largest memory that any of its runs took. The graphs of
//! a worker run one after the other, so with a shared arena they keep the
//! memory of the largest graph, not the sum; and on a GPU one limit bounds all
//! graphs, weights included.
#![expect(unsafe_code, reason = "ort has no safe way to register an arena")]

use std::collections::BTreeSet;
use std::ptr;
use std::sync::Mutex;

use ort::AsPointer as _;
use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};

use crate::model::precision::Provider;

/// Value by which an arena grows by the requested size, not by powers of two.
const EXTEND_AS_REQUESTED: i32 = 1;
/// Value that lets ONNX Runtime choose.
const DEFAULT: i32 = -1;

/// Devices that have an arena; ONNX Runtime would refuse a second one.
static SHARED: Mutex<BTreeSet<(Provider, i32)>> = Mutex::new(BTreeSet::new());

/// Creates a device's arena of at most `limit` bytes, which sessions with
/// `use_env_allocators` share. If the device has an arena already, nothing
/// changes: the first limit stays.
///
/// # Errors
///
/// When ONNX Runtime cannot create the arena.
pub(crate) fn share(
    environment: &Environment,
    provider: Provider,
    device_id: i32,
    limit: Option<usize>,
) -> ort::Result<()> {
    let mut shared = SHARED
        .lock()
        .unwrap_or_else(std::sync::PoisonError::into_inner);
    if shared.contains(&(provider, device_id)) {
        return Ok(());
    }
    let device = match provider {
        Provider::Cpu => AllocationDevice::CPU,
        Provider::Cuda => AllocationDevice::CUDA,
    };
    let memory = MemoryInfo::new(device, device_id, AllocatorType::Arena, MemoryType::Default)?;
    let name = match provider {
        Provider::Cpu => c"CPUExecutionProvider",
        Provider::Cuda => c"CUDAExecutionProvider",
    };
    let api = ort::api();
    let mut arena = ptr::null_mut();
    // SAFETY: every pointer is to a value that lives during the call, and the
    // lists of keys and values are empty; ONNX Runtime copies the
    // configuration, which is released once.
    unsafe {
        let status = (api.CreateArenaCfg)(
            limit.unwrap_or(usize::MAX),
            EXTEND_AS_REQUESTED,
            DEFAULT,
            DEFAULT,
            &raw mut arena,
        );
        ort::Error::result_from_status(status)?;
        let status = (api.CreateAndRegisterAllocatorV2)(
            environment.ptr().cast_mut(),
            name.as_ptr(),
            memory.ptr(),
            arena,
            ptr::null(),
            ptr::null(),
            0,
        );
        (api.ReleaseArenaCfg)(arena);
        ort::Error::result_from_status(status)?;
    }
    shared.insert((provider, device_id));
    Ok(())
}
