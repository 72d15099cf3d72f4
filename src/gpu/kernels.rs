//! The worker's own kernels for GPUs. The driver compiles them for the GPU that
//! is there, once per context.
#![expect(
    unsafe_code,
    reason = "calls a C library that is loaded at run time; see `Functions`"
)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::Version;
use super::driver::{self, SUCCESS, symbol};

/// PTX that `make kernels` compiles from quick_gelu.cu. The text ends in a zero
/// byte, as the driver requires.
const QUICK_GELU: &str = concat!(include_str!("kernels/quick_gelu.ptx"), "\0");
/// Threads per block: a multiple of a warp that every GPU accepts.
const BLOCK: c_uint = 256;
/// Numbers that one thread computes; quick_gelu.cu has the same constant.
const PACK: usize = 8;

/// Format of numbers of 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    Fp16,
    Bf16,
}

/// Numbers in the memory of the current device of the thread.
#[derive(Debug, Clone, Copy)]
pub struct Numbers {
    pub x: *const c_void,
    pub y: *mut c_void,
    pub n: usize,
}

/// Functions of the driver that are called, each as cuda.h declares it: the
/// returned int is the status of the call, and results are written to the
/// pointer arguments.
struct Functions {
    context: unsafe extern "C" fn(context: *mut Handle) -> c_int,
    device: unsafe extern "C" fn(device: *mut c_int) -> c_int,
    attribute: driver::Attribute,
    load: unsafe extern "C" fn(module: *mut Handle, image: *const c_void) -> c_int,
    function:
        unsafe extern "C" fn(function: *mut Handle, module: Handle, name: *const c_char) -> c_int,
    launch: unsafe extern "C" fn(
        function: Handle,
        grid_x: c_uint,
        grid_y: c_uint,
        grid_z: c_uint,
        block_x: c_uint,
        block_y: c_uint,
        block_z: c_uint,
        shared_bytes: c_uint,
        stream: *mut c_void,
        parameters: *mut *mut c_void,
        extra: *mut *mut c_void,
    ) -> c_int,
    error: driver::ErrorText,
}

/// Handle of an object of the driver, whose functions are thread-safe.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
struct Handle(*mut c_void);

// SAFETY: the objects of the driver that handles stand for may be used by any
// thread.
unsafe impl Send for Handle {}

/// Kernels that are loaded into one context.
#[derive(Clone, Copy)]
struct Loaded {
    context: Handle,
    fp16: Handle,
    bf16: Handle,
}

/// Oldest GPUs for which the kernels are compiled; `make kernels` names the same.
const CAPABILITY_MIN: Version = Version { major: 8, minor: 0 };

/// Refuses a GPU for which the driver cannot compile the kernels, in words that
/// say more than the driver's.
fn check_capability(capability: Version) -> Result<(), String> {
    if capability >= CAPABILITY_MIN {
        return Ok(());
    }
    Err(format!(
        "the GPU has compute capability {capability}, and the worker's own kernels need \
         {CAPABILITY_MIN}; compile the model with --portable, which uses ONNX Runtime's"
    ))
}

static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
/// Loaded kernels, one entry per GPU, so only few.
static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

/// Starts `y = x / (1 + exp(-factor x))` on a stream, without waiting for the
/// result.
///
/// # Errors
///
/// When the driver does not exist or refuses the call; the text is the
/// driver's.
///
/// # Safety
///
/// The thread has a current context, the stream belongs to it, and `n` numbers
/// at `x` and at `y`, whose addresses are multiples of 16 bytes, stay in the
/// context's memory until the stream has passed this call.
pub unsafe fn quick_gelu(
    half: Half,
    numbers: Numbers,
    factor: f32,
    stream: *mut c_void,
) -> Result<(), String> {
    if numbers.n == 0 {
        return Ok(());
    }
    let functions = match FUNCTIONS.get_or_init(Functions::load) {
        Ok(functions) => functions,
        Err(error) => return Err(error.clone()),
    };
    let loaded = functions.loaded()?;
    let function = match half {
        Half::Fp16 => loaded.fp16,
        Half::Bf16 => loaded.bf16,
    };
    let blocks = numbers.n.div_ceil(PACK * BLOCK as usize);
    let grid = c_uint::try_from(blocks)
        .map_err(|_| format!("{} numbers are too many for one kernel", numbers.n))?;
    let (mut x, mut y) = (numbers.x, numbers.y);
    let (mut n, mut factor) = (numbers.n as u64, factor);
    let mut parameters: [*mut c_void; 4] = [
        (&raw mut x).cast(),
        (&raw mut y).cast(),
        (&raw mut n).cast(),
        (&raw mut factor).cast(),
    ];
    // SAFETY: the parameters are those of the kernel in quick_gelu.cu, and are
    // copied before the call returns; the caller vouches for the memory that
    // they point to.
    let status = unsafe {
        (functions.launch)(
            function,
            grid,
            1,
            1,
            BLOCK,
            1,
            1,
            0,
            stream,
            parameters.as_mut_ptr(),
            ptr::null_mut(),
        )
    };
    functions.check("cuLaunchKernel", status)
}

impl Functions {
    fn load() -> Result<Self, String> {
        let library = driver::library()?;
        // SAFETY: the types are those of cuda.h, which the driver keeps for good:
        // functions that change get another name.
        let functions = unsafe {
            Self {
                context: symbol(&library, "cuCtxGetCurrent")?,
                device: symbol(&library, "cuCtxGetDevice")?,
                attribute: symbol(&library, "cuDeviceGetAttribute")?,
                load: symbol(&library, "cuModuleLoadData")?,
                function: symbol(&library, "cuModuleGetFunction")?,
                launch: symbol(&library, "cuLaunchKernel")?,
                error: symbol(&library, "cuGetErrorString")?,
            }
        };
        // The library stays loaded, for the reason in `driver`.
        std::mem::forget(library);
        Ok(functions)
    }

    /// Returns the kernels of the thread's current context, and loads them
    /// first if needed.
    fn loaded(&self) -> Result<Loaded, String> {
        let mut context = Handle(ptr::null_mut());
        // SAFETY: the function writes to the place that it is given.
        let status = unsafe { (self.context)(&raw mut context) };
        self.check("cuCtxGetCurrent", status)?;
        if context.0.is_null() {
            return Err("the calling thread has no current CUDA context".to_owned());
        }
        let mut all = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = all.iter().find(|loaded| loaded.context == context) {
            return Ok(*loaded);
        }
        check_capability(self.capability()?)?;
        let mut module = Handle(ptr::null_mut());
        // SAFETY: the image is PTX that ends in a zero.
        let status = unsafe { (self.load)(&raw mut module, QUICK_GELU.as_ptr().cast()) };
        self.check("cuModuleLoadData", status)?;
        let kernel = |name: &CStr| {
            let mut function = Handle(ptr::null_mut());
            // SAFETY: the module has just been loaded, and stays loaded.
            let status = unsafe { (self.function)(&raw mut function, module, name.as_ptr()) };
            self.check("cuModuleGetFunction", status).map(|()| function)
        };
        let loaded = Loaded {
            context,
            fp16: kernel(c"quick_gelu_fp16")?,
            bf16: kernel(c"quick_gelu_bf16")?,
        };
        all.push(loaded);
        Ok(loaded)
    }

    /// Returns the compute capability of the thread's current device.
    fn capability(&self) -> Result<Version, String> {
        let mut device = 0;
        // SAFETY: the function writes to the place that it is given.
        let status = unsafe { (self.device)(&raw mut device) };
        self.check("cuCtxGetDevice", status)?;
        let [major, minor] = driver::CAPABILITY.map(|which| {
            let mut value = 0;
            // SAFETY: as above.
            let status = unsafe { (self.attribute)(&raw mut value, which, device) };
            self.check("cuDeviceGetAttribute", status).map(|()| value)
        });
        Ok(Version {
            major: major?,
            minor: minor?,
        })
    }

    fn check(&self, call: &str, status: c_int) -> Result<(), String> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: `error` is the driver's function for error texts.
        Err(unsafe { driver::failure(self.error, call, status) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_gpu_that_is_too_old_is_told_what_to_do() {
        let of = |major, minor| check_capability(Version { major, minor });
        for (major, minor) in [(8, 0), (8, 9), (9, 0), (12, 0)] {
            assert_eq!(of(major, minor), Ok(()));
        }
        let error = of(7, 5).unwrap_err();
        assert_eq!(
            error,
            "the GPU has compute capability 7.5, and the worker's own kernels need 8.0; compile \
             the model with --portable, which uses ONNX Runtime's"
        );
    }

    #[test]
    fn the_kernels_are_compiled_for_the_oldest_gpu_that_is_accepted() {
        let Version { major, minor } = CAPABILITY_MIN;
        assert!(QUICK_GELU.contains(&format!("\n.target sm_{major}{minor}\n")));
    }
}
