//! The worker's own kernels for GPUs. The driver compiles them for the GPU that
//! there is, once a context.
#![expect(
    unsafe_code,
    reason = "calls a C library that is loaded at run time; see `Functions`"
)]

use std::ffi::{CStr, c_char, c_int, c_uint, c_void};
use std::ptr;
use std::sync::{Mutex, OnceLock, PoisonError};

use super::driver::{self, SUCCESS, symbol};

/// What `make kernels` makes of quick_gelu.cu. It ends in a zero, as the driver
/// wants it.
const QUICK_GELU: &str = concat!(include_str!("kernels/quick_gelu.ptx"), "\0");
/// Threads of a block: a multiple of a warp that every GPU takes.
const BLOCK: c_uint = 256;
/// Numbers that a thread computes; quick_gelu.cu has the same.
const PACK: usize = 8;

/// Numbers of 16 bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Half {
    Fp16,
    Bf16,
}

/// Numbers in the memory of the device that the thread works with.
#[derive(Debug, Clone, Copy)]
pub struct Numbers {
    pub x: *const c_void,
    pub y: *mut c_void,
    pub n: usize,
}

/// What is called of the driver, each as cuda.h declares it: an int says how a
/// call went, and results are written where a pointer says.
struct Functions {
    context: unsafe extern "C" fn(context: *mut Handle) -> c_int,
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

/// The driver's; it is thread-safe about them.
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(transparent)]
struct Handle(*mut c_void);

// SAFETY: what handles stand for may be used by any thread.
unsafe impl Send for Handle {}

/// The kernels of one context.
#[derive(Clone, Copy)]
struct Loaded {
    context: Handle,
    fp16: Handle,
    bf16: Handle,
}

static FUNCTIONS: OnceLock<Result<Functions, String>> = OnceLock::new();
/// One a GPU, so few.
static LOADED: Mutex<Vec<Loaded>> = Mutex::new(Vec::new());

/// Starts `y = x / (1 + exp(-factor x))` on a stream, and does not wait for it.
///
/// # Errors
///
/// In the driver's words, when it is not there or refuses.
///
/// # Safety
///
/// A context is the thread's, the stream is one of it, and `n` numbers at `x` and
/// at `y`, whose addresses are multiples of 16 bytes, are in its memory until the
/// stream has passed this.
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
    let grid = c_uint::try_from(blocks).map_err(|_| "too many numbers".to_owned())?;
    let (mut x, mut y) = (numbers.x, numbers.y);
    let (mut n, mut factor) = (numbers.n as u64, factor);
    let mut parameters: [*mut c_void; 4] = [
        (&raw mut x).cast(),
        (&raw mut y).cast(),
        (&raw mut n).cast(),
        (&raw mut factor).cast(),
    ];
    // SAFETY: the parameters are those of the kernel in quick_gelu.cu, and are
    // copied before the call returns; the caller vouches for what they point to.
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
                load: symbol(&library, "cuModuleLoadData")?,
                function: symbol(&library, "cuModuleGetFunction")?,
                launch: symbol(&library, "cuLaunchKernel")?,
                error: symbol(&library, "cuGetErrorString")?,
            }
        };
        // As in `driver`.
        std::mem::forget(library);
        Ok(functions)
    }

    /// The kernels of the thread's context.
    fn loaded(&self) -> Result<Loaded, String> {
        let mut context = Handle(ptr::null_mut());
        // SAFETY: writes to the place that it is given.
        let status = unsafe { (self.context)(&raw mut context) };
        self.check("cuCtxGetCurrent", status)?;
        if context.0.is_null() {
            return Err("no GPU is the thread's".to_owned());
        }
        let mut all = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(loaded) = all.iter().find(|loaded| loaded.context == context) {
            return Ok(*loaded);
        }
        let mut module = Handle(ptr::null_mut());
        // SAFETY: the image is PTX that ends in a zero.
        let status = unsafe { (self.load)(&raw mut module, QUICK_GELU.as_ptr().cast()) };
        self.check("cuModuleLoadData", status)?;
        let kernel = |name: &CStr| {
            let mut function = Handle(ptr::null_mut());
            // SAFETY: the module has just been loaded, and stays.
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

    fn check(&self, call: &str, status: c_int) -> Result<(), String> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: it is the driver's function for that.
        Err(unsafe { driver::failure(self.error, call, status) })
    }
}
