//! Copies between the host and one GPU over CUDA's driver, by a stream of their
//! own and through pinned memory.
//!
//! `copy_into` of the crate ort takes one lock for all devices of the process.
//! Each engine has a [`DriverCopies`] of its own instead, so it needs no lock.
//!
//! **Order.** A copy has ended when its call returns, and so has a run: ONNX
//! Runtime waits for its stream at the end of each run, also of a captured one,
//! unless the run's options have `disable_synchronize_execution_providers`,
//! which ours never have. Thus no event is needed between a copy and the runs
//! before and after it, although these are on another stream.
//!
//! **Captures.** While a thread captures a run in CUDA's mode "global", as ONNX
//! Runtime does, every other thread of that mode is prohibited from
//! "potentially unsafe API calls" (`cuThreadExchangeStreamCaptureMode` in the
//! driver's documentation): their call fails and spoils the capture.
//! - Allocations are such calls, since a capture does not see them. They are
//!   made by [`DriverCopies::open`] and [`DriverCopies::reserve`] alone, when
//!   nobody else captures: while the engine loads ([`CaptureLock::alone`]), or,
//!   for the first buffers of a graph that is not captured, in a later run, as
//!   below.
//! - A copy on a stream that is not captured, and the wait for this stream, have
//!   nothing to do with another thread's capture. The documentation does not say
//!   which calls count as unsafe, so the thread copies in the mode "thread
//!   local", in which captures of other threads are ignored. In fact no other
//!   engine captures meanwhile either: batches run when all engines have loaded,
//!   and an idle check keeps captures away ([`CaptureLock::beside`]).
//!
//! [`CaptureLock::alone`]: crate::runtime::capture::CaptureLock::alone
//! [`CaptureLock::beside`]: crate::runtime::capture::CaptureLock::beside
#![expect(
    unsafe_code,
    reason = "calls a C library that is loaded at run time; see `Functions`"
)]

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::OnceLock;

use libloading::Library;

use super::driver::{self, SUCCESS, symbol};

/// Largest pinned buffer, of which an engine has one per direction. Pinned
/// memory cannot be swapped out, so it must stay small beside the host's. This
/// size holds every batch of tokens, and the hidden states of 64 images of
/// imagegpt-small in fp32, 134 MB; larger copies go in pieces, whose waits take
/// microseconds while each piece takes milliseconds.
const STAGING_BYTES_MAX: usize = 256 << 20;
/// `CU_STREAM_NON_BLOCKING`: the stream does not wait for the legacy default
/// stream, nor this for it.
const NON_BLOCKING: c_uint = 1;
/// `CU_STREAM_CAPTURE_MODE_THREAD_LOCAL`.
const THREAD_LOCAL: c_int = 1;

/// Address in the memory of a device, `CUdeviceptr`.
type DeviceAddress = u64;

/// Functions of the driver that are called, each as cuda.h declares it: the
/// returned int is the status of the call, and results are written to the
/// pointer arguments. A call is therefore sound when the pointer is to a value
/// of the type that is named here, and no longer used afterwards, which holds
/// for all calls below but the copies, which say why they are.
#[derive(Clone)]
struct Functions {
    init: unsafe extern "C" fn(flags: c_uint) -> c_int,
    get: unsafe extern "C" fn(device: *mut c_int, ordinal: c_int) -> c_int,
    retain: unsafe extern "C" fn(context: *mut *mut c_void, device: c_int) -> c_int,
    release: unsafe extern "C" fn(device: c_int) -> c_int,
    push: unsafe extern "C" fn(context: *mut c_void) -> c_int,
    pop: unsafe extern "C" fn(context: *mut *mut c_void) -> c_int,
    exchange_mode: unsafe extern "C" fn(mode: *mut c_int) -> c_int,
    create: unsafe extern "C" fn(stream: *mut *mut c_void, flags: c_uint) -> c_int,
    synchronize: unsafe extern "C" fn(stream: *mut c_void) -> c_int,
    destroy: unsafe extern "C" fn(stream: *mut c_void) -> c_int,
    allocate: unsafe extern "C" fn(data: *mut *mut c_void, bytes: usize, flags: c_uint) -> c_int,
    free: unsafe extern "C" fn(data: *mut c_void) -> c_int,
    upload: unsafe extern "C" fn(
        to: DeviceAddress,
        from: *const c_void,
        bytes: usize,
        stream: *mut c_void,
    ) -> c_int,
    download: unsafe extern "C" fn(
        to: *mut c_void,
        from: DeviceAddress,
        bytes: usize,
        stream: *mut c_void,
    ) -> c_int,
    error: driver::ErrorText,
}

/// Bytes of the host and of a device between which a copy is made.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CopyPart {
    pub(crate) host: *mut u8,
    pub(crate) device: *mut c_void,
    pub(crate) bytes: usize,
}

/// Pinned memory of the host; null if there is none.
struct PinnedBuffer {
    data: *mut u8,
    bytes: usize,
}

/// Copies between the host and one GPU.
pub(crate) struct DriverCopies {
    functions: Functions,
    device: c_int,
    /// Primary context of the device, which is the context that ONNX Runtime
    /// uses; retained until this is dropped.
    context: *mut c_void,
    /// Stream of the copies; null if it could not be created.
    stream: *mut c_void,
    up: PinnedBuffer,
    down: PinnedBuffer,
    /// Largest size of each buffer.
    bytes_max: usize,
}

impl DriverCopies {
    /// Gets the context of device `device_id`, and creates a stream in it. No
    /// other engine may be capturing.
    ///
    /// # Errors
    ///
    /// When there is no driver, or it lacks a function or refuses a call; the
    /// text is the driver's.
    pub(crate) fn open(device_id: i32) -> Result<Self, String> {
        static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
        let functions = FUNCTIONS.get_or_init(|| driver::library().and_then(Functions::load));
        Self::new(functions.clone()?, device_id, STAGING_BYTES_MAX)
    }

    fn new(functions: Functions, device_id: i32, bytes_max: usize) -> Result<Self, String> {
        let (mut device, mut context) = (0, ptr::null_mut());
        // SAFETY: see `Functions`.
        unsafe {
            functions.check("cuInit", (functions.init)(0))?;
            let status = (functions.get)(&raw mut device, device_id);
            functions.check("cuDeviceGet", status)?;
            let status = (functions.retain)(&raw mut context, device);
            functions.check("cuDevicePrimaryCtxRetain", status)?;
        }
        // What there is so far is released if the rest fails.
        let mut copies = Self {
            functions,
            device,
            context,
            stream: ptr::null_mut(),
            up: PinnedBuffer::NONE,
            down: PinnedBuffer::NONE,
            bytes_max,
        };
        let mut stream = ptr::null_mut();
        copies.within(|copies| {
            // SAFETY: see `Functions`.
            let status = unsafe { (copies.functions.create)(&raw mut stream, NON_BLOCKING) };
            copies.functions.check("cuStreamCreate", status)
        })?;
        copies.stream = stream;
        Ok(copies)
    }

    /// Enlarges the pinned buffers to copies of so many bytes to the device and
    /// back, or to their bound if this is less. No other engine may be
    /// capturing.
    ///
    /// # Errors
    ///
    /// When memory cannot be pinned; then no more copies can be made.
    pub(crate) fn reserve(&mut self, up: usize, down: usize) -> Result<(), String> {
        self.within(|copies| {
            let bytes_max = copies.bytes_max;
            let functions = &copies.functions;
            let buffers = [(&mut copies.up, up), (&mut copies.down, down)];
            for (buffer, bytes) in buffers {
                let bytes = bytes.min(bytes_max);
                if bytes > buffer.bytes {
                    // The old buffer goes first, so that never more than the
                    // bound is pinned.
                    buffer.free(functions)?;
                    *buffer = PinnedBuffer::new(functions, bytes)?;
                }
            }
            Ok(())
        })
    }

    /// Copies all parts to the device, and waits until they are there.
    ///
    /// # Errors
    ///
    /// When a copy fails; the text is the driver's.
    ///
    /// # Safety
    ///
    /// Each part has that many bytes at both places, which nobody else writes
    /// before the call returns, and those on the device belong to its primary
    /// context.
    pub(crate) unsafe fn upload(&mut self, parts: &[CopyPart]) -> Result<(), String> {
        self.within_thread_local(|copies| {
            for pieces in pieces(parts, copies.up.bytes)? {
                for (part, at) in pieces {
                    // SAFETY: the caller vouches for the part, `pieces` keeps
                    // the piece within the buffer, and no copy from the buffer
                    // is under way, since the last ones were waited for.
                    let status = unsafe {
                        let staged = copies.up.data.add(at);
                        ptr::copy_nonoverlapping(part.host, staged, part.bytes);
                        let to = part.device as DeviceAddress;
                        (copies.functions.upload)(to, staged.cast(), part.bytes, copies.stream)
                    };
                    copies.functions.check("cuMemcpyHtoDAsync", status)?;
                }
                copies.wait()?;
            }
            Ok(())
        })
    }

    /// Copies all parts from the device, and waits until they are there.
    ///
    /// # Errors
    ///
    /// When a copy fails; the text is the driver's.
    ///
    /// # Safety
    ///
    /// As for [`DriverCopies::upload`]; in addition nobody reads the host's
    /// bytes before the call returns.
    pub(crate) unsafe fn download(&mut self, parts: &[CopyPart]) -> Result<(), String> {
        self.within_thread_local(|copies| {
            for pieces in pieces(parts, copies.down.bytes)? {
                for (part, at) in &pieces {
                    // SAFETY: the caller vouches for the part, and `pieces`
                    // keeps the piece within the buffer, which is read when the
                    // copies have been waited for.
                    let status = unsafe {
                        let staged = copies.down.data.add(*at).cast();
                        let from = part.device as DeviceAddress;
                        (copies.functions.download)(staged, from, part.bytes, copies.stream)
                    };
                    copies.functions.check("cuMemcpyDtoHAsync", status)?;
                }
                copies.wait()?;
                for (part, at) in pieces {
                    // SAFETY: as above.
                    unsafe {
                        let staged = copies.down.data.add(at);
                        ptr::copy_nonoverlapping(staged, part.host, part.bytes);
                    }
                }
            }
            Ok(())
        })
    }

    /// Waits for all copies of the stream.
    fn wait(&self) -> Result<(), String> {
        // SAFETY: the stream lives as long as this.
        let status = unsafe { (self.functions.synchronize)(self.stream) };
        self.functions.check("cuStreamSynchronize", status)
    }

    /// Calls `work` while the context is current on this thread.
    fn within<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        // SAFETY: the context is retained, and the stack of the thread is as
        // before in the end.
        let status = unsafe { (self.functions.push)(self.context) };
        self.functions.check("cuCtxPushCurrent", status)?;
        let outcome = work(self);
        let mut popped = ptr::null_mut();
        // SAFETY: see `Functions`.
        let status = unsafe { (self.functions.pop)(&raw mut popped) };
        let done = outcome?;
        self.functions.check("cuCtxPopCurrent", status)?;
        Ok(done)
    }

    /// Calls `work` while the context is current on this thread, and captures of
    /// other threads are ignored.
    fn within_thread_local<T>(
        &mut self,
        work: impl FnOnce(&mut Self) -> Result<T, String>,
    ) -> Result<T, String> {
        self.within(|copies| {
            let mut mode = THREAD_LOCAL;
            copies.exchange(&mut mode)?;
            let outcome = work(copies);
            let restored = copies.exchange(&mut mode);
            let done = outcome?;
            restored?;
            Ok(done)
        })
    }

    /// Sets the thread's mode, and returns the previous one in its place.
    fn exchange(&self, mode: &mut c_int) -> Result<(), String> {
        // SAFETY: see `Functions`; the mode is one of those of cuda.h, or the
        // driver has returned it.
        let status = unsafe { (self.functions.exchange_mode)(mode) };
        self.functions
            .check("cuThreadExchangeStreamCaptureMode", status)
    }
}

/// Releases what the driver has given. On a lost context each call only returns
/// an error, which changes nothing any more; an engine whose device is lost is
/// leaked with its copies.
impl Drop for DriverCopies {
    fn drop(&mut self) {
        let released = self.within(|copies| {
            if copies.stream.is_null() {
                return Ok(());
            }
            // A copy whose wait has failed may be under way.
            let waited = copies.wait();
            let functions = &copies.functions;
            let up = copies.up.free(functions);
            let down = copies.down.free(functions);
            // SAFETY: nobody else knows the stream.
            let status = unsafe { (functions.destroy)(copies.stream) };
            let destroyed = functions.check("cuStreamDestroy", status);
            waited.and(up).and(down).and(destroyed)
        });
        // SAFETY: see `Functions`; the context was retained once.
        let status = unsafe { (self.functions.release)(self.device) };
        let status = self.functions.check("cuDevicePrimaryCtxRelease", status);
        if let Err(reason) = released.and(status) {
            tracing::debug!(
                reason,
                "copies over the driver were not released in good order"
            );
        }
    }
}

impl PinnedBuffer {
    const NONE: Self = Self {
        data: ptr::null_mut(),
        bytes: 0,
    };

    /// Allocates pinned memory of the current context.
    fn new(functions: &Functions, bytes: usize) -> Result<Self, String> {
        let mut data = ptr::null_mut();
        // SAFETY: see `Functions`.
        let status = unsafe { (functions.allocate)(&raw mut data, bytes, 0) };
        functions.check("cuMemHostAlloc", status)?;
        Ok(Self {
            data: data.cast(),
            bytes,
        })
    }

    /// Frees the memory, if there is any.
    fn free(&mut self, functions: &Functions) -> Result<(), String> {
        let Self { data, .. } = std::mem::replace(self, Self::NONE);
        if data.is_null() {
            return Ok(());
        }
        // SAFETY: the memory was allocated above, no copy from or to it is
        // under way, and nothing points to it any more.
        let status = unsafe { (functions.free)(data.cast()) };
        functions.check("cuMemFreeHost", status)
    }
}

impl Functions {
    /// Finds the functions in the driver's library, which stays loaded, for the
    /// reason in `driver`.
    fn load(library: Library) -> Result<Self, String> {
        // SAFETY: the types are those of cuda.h, which the driver keeps for
        // good: functions that change get another name.
        let functions = unsafe {
            Self {
                init: symbol(&library, "cuInit")?,
                get: symbol(&library, "cuDeviceGet")?,
                retain: symbol(&library, "cuDevicePrimaryCtxRetain")?,
                release: symbol(&library, "cuDevicePrimaryCtxRelease_v2")?,
                push: symbol(&library, "cuCtxPushCurrent_v2")?,
                pop: symbol(&library, "cuCtxPopCurrent_v2")?,
                exchange_mode: symbol(&library, "cuThreadExchangeStreamCaptureMode")?,
                create: symbol(&library, "cuStreamCreate")?,
                synchronize: symbol(&library, "cuStreamSynchronize")?,
                destroy: symbol(&library, "cuStreamDestroy_v2")?,
                allocate: symbol(&library, "cuMemHostAlloc")?,
                free: symbol(&library, "cuMemFreeHost")?,
                upload: symbol(&library, "cuMemcpyHtoDAsync_v2")?,
                download: symbol(&library, "cuMemcpyDtoHAsync_v2")?,
                error: symbol(&library, "cuGetErrorString")?,
            }
        };
        std::mem::forget(library);
        Ok(functions)
    }

    fn check(&self, call: &str, status: c_int) -> Result<(), String> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: `error` is the driver's function for error texts.
        Err(unsafe { driver::failure(self.error, call, status) })
    }
}

/// Divides parts into groups of pieces that fit into a buffer of `bytes`
/// together; each piece comes with its place in the buffer.
fn pieces(parts: &[CopyPart], bytes: usize) -> Result<Vec<Vec<(CopyPart, usize)>>, String> {
    let mut groups = Vec::new();
    let mut group = Vec::new();
    let mut used = 0;
    for part in parts {
        let mut rest = *part;
        while rest.bytes > 0 {
            if bytes == 0 {
                return Err("no pinned memory was reserved for this copy".to_owned());
            }
            if used == bytes {
                groups.push(std::mem::take(&mut group));
                used = 0;
            }
            let n = rest.bytes.min(bytes - used);
            group.push((CopyPart { bytes: n, ..rest }, used));
            used += n;
            rest = CopyPart {
                host: rest.host.wrapping_add(n),
                device: rest.device.wrapping_byte_add(n),
                bytes: rest.bytes - n,
            };
        }
    }
    groups.extend(Some(group).filter(|group| !group.is_empty()));
    Ok(groups)
}

#[cfg(test)]
pub(crate) mod tests;
