//! One arena for all graphs of a device.
//!
//! A session keeps the most memory that any of its runs took. The graphs of a
//! worker run one after the other, so with an arena in common they keep what
//! the largest needs, not the sum; and on a GPU one limit bounds them all,
//! weights included.
#![expect(unsafe_code, reason = "ort has no safe way to register an arena")]

use std::collections::BTreeSet;
use std::ptr;
use std::sync::Mutex;

use ort::AsPointer as _;
use ort::environment::Environment;
use ort::memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType};

use crate::model::precision::Provider;

/// An arena grows by what is asked for, not by powers of two.
const EXTEND_AS_REQUESTED: i32 = 1;
/// Lets ONNX Runtime choose.
const DEFAULT: i32 = -1;

/// The devices that have one: a second would be refused.
static SHARED: Mutex<BTreeSet<(Provider, i32)>> = Mutex::new(BTreeSet::new());

/// Gives a device an arena that sessions with `use_env_allocators` take, of
/// `limit` bytes at most; the first limit holds.
///
/// # Errors
///
/// When ONNX Runtime does not make one.
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
    // SAFETY: every pointer is of a value that lives during the call, the keys
    // and values are none; ONNX Runtime copies the configuration, which is
    // released once.
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
