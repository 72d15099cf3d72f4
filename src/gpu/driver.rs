//! Asks CUDA's driver, libcuda.so.1, for the devices that this process sees, in
//! CUDA's order, after `CUDA_VISIBLE_DEVICES` and the restrictions of a
//! container.
#![expect(
    unsafe_code,
    reason = "calls a C library that is loaded at run time; see `Functions`"
)]

use std::ffi::{CStr, c_char, c_int, c_uint};

use libloading::Library;

use super::{CudaDevice, Driver, Version};

const LIBRARY: &str = "libcuda.so.1";
/// `CUDA_SUCCESS`.
pub(super) const SUCCESS: c_int = 0;
/// `cuGetErrorString`.
pub(super) type ErrorText = unsafe extern "C" fn(status: c_int, text: *mut *const c_char) -> c_int;
/// `CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR` and `…_MINOR`.
pub(super) const CAPABILITY: [c_int; 2] = [75, 76];
/// `cuDeviceGetAttribute`.
pub(super) type Attribute =
    unsafe extern "C" fn(value: *mut c_int, which: c_int, device: c_int) -> c_int;
/// Longer than any device's name; the driver cuts a name that does not fit.
const NAME_BYTES: usize = 256;

/// Functions of the driver that are called, each as cuda.h declares it: the
/// returned int is the status of the call, and results are written to the
/// pointer arguments. A call is therefore sound when the pointer is to a value
/// of the type that is named here, and no longer used afterwards, which holds
/// for all calls below.
struct Functions {
    init: unsafe extern "C" fn(flags: c_uint) -> c_int,
    version: unsafe extern "C" fn(version: *mut c_int) -> c_int,
    count: unsafe extern "C" fn(count: *mut c_int) -> c_int,
    get: unsafe extern "C" fn(device: *mut c_int, ordinal: c_int) -> c_int,
    uuid: unsafe extern "C" fn(uuid: *mut [u8; 16], device: c_int) -> c_int,
    name: unsafe extern "C" fn(name: *mut c_char, length: c_int, device: c_int) -> c_int,
    memory: unsafe extern "C" fn(bytes: *mut usize, device: c_int) -> c_int,
    attribute: Attribute,
    error: ErrorText,
}

/// Asks the driver for its devices. Waking the driver takes up to a second; no
/// device gets a context, so no device's memory is taken.
pub(super) fn look() -> Result<Driver, String> {
    let functions = Functions::load()?;
    let version = functions.version()?;
    Ok(Driver {
        version,
        devices: functions.devices(),
    })
}

impl Functions {
    fn load() -> Result<Self, String> {
        let library = library()?;
        // SAFETY: the types are those of cuda.h, which the driver keeps for
        // good: a function that changes gets another name.
        let functions = unsafe {
            Self {
                init: symbol(&library, "cuInit")?,
                version: symbol(&library, "cuDriverGetVersion")?,
                count: symbol(&library, "cuDeviceGetCount")?,
                get: symbol(&library, "cuDeviceGet")?,
                // Before 11.4 there is only `cuDeviceGetUuid`, which gives a
                // part of a GPU (MIG) the UUID of the whole GPU.
                uuid: symbol(&library, "cuDeviceGetUuid_v2")
                    .or_else(|_| symbol(&library, "cuDeviceGetUuid"))?,
                name: symbol(&library, "cuDeviceGetName")?,
                memory: symbol(&library, "cuDeviceTotalMem_v2")?,
                attribute: symbol(&library, "cuDeviceGetAttribute")?,
                error: symbol(&library, "cuGetErrorString")?,
            }
        };
        // The functions are valid as long as the library is loaded, and a
        // driver that has started threads must not be unloaded under them.
        std::mem::forget(library);
        Ok(functions)
    }

    fn version(&self) -> Result<Version, String> {
        let mut version = 0;
        // SAFETY: see `Functions`.
        self.check("cuDriverGetVersion", unsafe {
            (self.version)(&raw mut version)
        })?;
        Ok(Version::of_cuda(version))
    }

    fn devices(&self) -> Result<Vec<CudaDevice>, String> {
        // SAFETY: takes a number.
        self.check("cuInit", unsafe { (self.init)(0) })?;
        let mut count = 0;
        // SAFETY: see `Functions`.
        self.check("cuDeviceGetCount", unsafe { (self.count)(&raw mut count) })?;
        (0..count).map(|ordinal| self.device(ordinal)).collect()
    }

    fn device(&self, ordinal: c_int) -> Result<CudaDevice, String> {
        let mut device = 0;
        // SAFETY: see `Functions`, here and below.
        self.check("cuDeviceGet", unsafe {
            (self.get)(&raw mut device, ordinal)
        })?;
        let mut uuid = [0; 16];
        // SAFETY: as above; a CUuuid is sixteen bytes.
        self.check("cuDeviceGetUuid", unsafe {
            (self.uuid)(&raw mut uuid, device)
        })?;
        let mut memory = 0;
        // SAFETY: as above.
        self.check("cuDeviceTotalMem", unsafe {
            (self.memory)(&raw mut memory, device)
        })?;
        let [major, minor] = CAPABILITY.map(|which| {
            let mut value = 0;
            // SAFETY: as above.
            let status = unsafe { (self.attribute)(&raw mut value, which, device) };
            self.check("cuDeviceGetAttribute", status).map(|()| value)
        });
        Ok(CudaDevice {
            uuid,
            name: self.name(device)?,
            memory_bytes: memory as u64,
            compute_capability: Version {
                major: major?,
                minor: minor?,
            },
        })
    }

    fn name(&self, device: c_int) -> Result<String, String> {
        let mut name = [0_u8; NAME_BYTES];
        let length = c_int::try_from(NAME_BYTES).unwrap_or(0);
        // SAFETY: there are `length` bytes to write to, and a c_char is a byte.
        let status = unsafe { (self.name)(name.as_mut_ptr().cast(), length, device) };
        self.check("cuDeviceGetName", status)?;
        let name = CStr::from_bytes_until_nul(&name).unwrap_or_default();
        Ok(name.to_string_lossy().into_owned())
    }

    /// Returns an error in the driver's words, unless `status` is success.
    fn check(&self, call: &str, status: c_int) -> Result<(), String> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: `error` is the driver's function for error texts.
        Err(unsafe { failure(self.error, call, status) })
    }
}

/// Loads the driver's library.
pub(super) fn library() -> Result<Library, String> {
    // SAFETY: the driver's library is made to be loaded in this way, and is
    // responsible for what it does on loading.
    unsafe { Library::new(LIBRARY) }.map_err(|error| {
        let words = std::error::Error::source(&error).map(ToString::to_string);
        absence(&words.unwrap_or_else(|| error.to_string()))
    })
}

/// Formats the error of a failed call, in the driver's words.
///
/// # Safety
/// `error` is the function that its type names.
pub(super) unsafe fn failure(error: ErrorText, call: &str, status: c_int) -> String {
    let mut text = std::ptr::null();
    // SAFETY: see `Functions`. The text, if there is one, is a constant of the
    // driver's and ends in a zero.
    let words = unsafe {
        if error(status, &raw mut text) == SUCCESS && !text.is_null() {
            CStr::from_ptr(text).to_string_lossy().into_owned()
        } else {
            "unknown".to_owned()
        }
    };
    format!("{call} of the NVIDIA driver failed: {words} (error {status})")
}

/// Explains, from the dynamic linker's words, why the driver's library was not
/// loaded.
fn absence(words: &str) -> String {
    if words.contains("No such file") {
        format!("there is no NVIDIA driver ({LIBRARY})")
    } else {
        format!("the NVIDIA driver's library cannot be loaded: {words}")
    }
}

/// Finds a function of the driver.
///
/// # Safety
/// `T` is the type of the function with this name, and the function is not
/// called after `library` is unloaded.
pub(super) unsafe fn symbol<T: Copy>(library: &Library, name: &str) -> Result<T, String> {
    // SAFETY: the caller vouches for both.
    let found = unsafe { library.get::<T>(name) };
    found
        .map(|symbol| *symbol)
        .map_err(|error| format!("{LIBRARY} has no function {name}: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_driver_that_is_not_there_is_told_from_one_that_is_broken() {
        assert_eq!(
            absence("libcuda.so.1: cannot open shared object file: No such file or directory"),
            "there is no NVIDIA driver (libcuda.so.1)"
        );
        assert_eq!(
            absence("libcuda.so.1: file too short"),
            "the NVIDIA driver's library cannot be loaded: libcuda.so.1: file too short"
        );
    }
}
