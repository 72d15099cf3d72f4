//! Asks CUDA's driver whether the context of a device still answers.
//!
//! After some errors, such as an illegal address, CUDA repeats the error in
//! every later call of the process: the context is lost, and only a new process
//! gets another one. ONNX Runtime has no codes for such errors, and its texts
//! name some of them only.
#![expect(
    unsafe_code,
    reason = "calls a C library that is loaded at run time; see `Functions`"
)]

use std::ffi::{c_int, c_uint, c_void};
use std::ptr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::Duration;

use libloading::Library;

use super::driver::{self, SUCCESS, symbol};

/// State of the context in which a device computes for this process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ContextState {
    /// The context has finished all work and reports no error.
    Answers,
    /// Every later call would fail; the text is the driver's.
    Lost(String),
    /// The driver could not be asked, or the device has no context.
    Unknown(String),
}

/// Time within which the driver must answer. The question waits for the work
/// that the device has begun, which takes seconds at most.
const ANSWER_WITHIN: Duration = Duration::from_secs(10);
/// `CUDA_ERROR_OUT_OF_MEMORY`, after which a context goes on.
const OUT_OF_MEMORY: c_int = 2;
/// Errors of a thread that captures runs; they are gone when the capture ends.
const OF_CAPTURES: std::ops::RangeInclusive<c_int> = 900..=908;

/// Functions of the driver that are called, each as cuda.h declares it: the
/// returned int is the status of the call, and results are written to the
/// pointer arguments. A call is therefore sound when the pointer is to a value
/// of the type that is named here, and no longer used afterwards, which holds
/// for all calls below.
#[derive(Clone, Copy)]
struct Functions {
    init: unsafe extern "C" fn(flags: c_uint) -> c_int,
    get: unsafe extern "C" fn(device: *mut c_int, ordinal: c_int) -> c_int,
    state: unsafe extern "C" fn(device: c_int, flags: *mut c_uint, is_active: *mut c_int) -> c_int,
    retain: unsafe extern "C" fn(context: *mut *mut c_void, device: c_int) -> c_int,
    release: unsafe extern "C" fn(device: c_int) -> c_int,
    push: unsafe extern "C" fn(context: *mut c_void) -> c_int,
    pop: unsafe extern "C" fn(context: *mut *mut c_void) -> c_int,
    synchronize: unsafe extern "C" fn() -> c_int,
    error: driver::ErrorText,
}

/// Asker of one driver.
struct Asker {
    functions: Functions,
    /// True while a question has no answer: then no further thread is made,
    /// which would hang like the first.
    is_waiting: AtomicBool,
}

/// Asks the driver for the state of the primary context of device `device_id`,
/// which is the context that ONNX Runtime uses. Blocks, for ten seconds at most.
///
/// While another thread captures a run, the question would spoil the capture;
/// see `runtime::capture`.
pub(crate) fn ask(device_id: i32) -> ContextState {
    static ASKER: OnceLock<Result<Arc<Asker>, String>> = OnceLock::new();
    let asker = ASKER.get_or_init(|| driver::library().and_then(Asker::new));
    match asker {
        Ok(asker) => asker.ask(device_id, ANSWER_WITHIN),
        Err(reason) => ContextState::Unknown(reason.clone()),
    }
}

impl Asker {
    fn new(library: Library) -> Result<Arc<Self>, String> {
        // SAFETY: the types are those of cuda.h, which the driver keeps for
        // good: functions that change get another name.
        let functions = unsafe {
            Functions {
                init: symbol(&library, "cuInit")?,
                get: symbol(&library, "cuDeviceGet")?,
                state: symbol(&library, "cuDevicePrimaryCtxGetState")?,
                retain: symbol(&library, "cuDevicePrimaryCtxRetain")?,
                release: symbol(&library, "cuDevicePrimaryCtxRelease_v2")?,
                push: symbol(&library, "cuCtxPushCurrent_v2")?,
                pop: symbol(&library, "cuCtxPopCurrent_v2")?,
                synchronize: symbol(&library, "cuCtxSynchronize")?,
                error: symbol(&library, "cuGetErrorString")?,
            }
        };
        // The library stays loaded, for the reason in `driver`.
        std::mem::forget(library);
        Ok(Arc::new(Self {
            functions,
            is_waiting: AtomicBool::new(false),
        }))
    }

    /// Asks on a thread of its own, since a driver that hangs never answers.
    fn ask(self: &Arc<Self>, device_id: i32, limit: Duration) -> ContextState {
        let silent = || {
            let seconds = limit.as_secs_f32();
            ContextState::Lost(format!(
                "the NVIDIA driver did not answer within {seconds} s"
            ))
        };
        if self.is_waiting.swap(true, Ordering::AcqRel) {
            return silent();
        }
        let (sender, answer) = mpsc::sync_channel(1);
        let asker = Arc::clone(self);
        let thread = std::thread::Builder::new().name("gpu-check".to_owned());
        let spawned = thread.spawn(move || {
            let state = asker.functions.state(device_id);
            asker.is_waiting.store(false, Ordering::Release);
            // Nobody listens any more if the answer comes too late.
            let _ = sender.send(state);
        });
        if let Err(error) = spawned {
            self.is_waiting.store(false, Ordering::Release);
            return ContextState::Unknown(format!("cannot start a thread: {error}"));
        }
        answer.recv_timeout(limit).unwrap_or_else(|_| silent())
    }
}

impl Functions {
    fn state(&self, device_id: i32) -> ContextState {
        let mut device = 0;
        // SAFETY: see `Functions`, here and below.
        let found = unsafe {
            self.check("cuInit", (self.init)(0))
                .and_then(|()| self.check("cuDeviceGet", (self.get)(&raw mut device, device_id)))
        };
        if let Err((_, reason)) = found {
            return ContextState::Unknown(reason);
        }
        let (mut flags, mut is_active) = (0, 0);
        // SAFETY: as above.
        let status = unsafe { (self.state)(device, &raw mut flags, &raw mut is_active) };
        if status == SUCCESS && is_active == 0 {
            return ContextState::Unknown("the device has no context yet".to_owned());
        }
        let asked = self
            .check("cuDevicePrimaryCtxGetState", status)
            .and_then(|()| self.synchronized(device));
        match asked {
            Ok(()) => ContextState::Answers,
            Err((status, reason)) if status == OUT_OF_MEMORY || OF_CAPTURES.contains(&status) => {
                ContextState::Unknown(reason)
            }
            Err((_, reason)) => ContextState::Lost(reason),
        }
    }

    /// Waits for all work of a device's primary context, which is active.
    fn synchronized(&self, device: c_int) -> Result<(), (c_int, String)> {
        let mut context = ptr::null_mut();
        // SAFETY: as above; the context is retained until it is released below,
        // and current on this thread only between push and pop.
        unsafe {
            self.check(
                "cuDevicePrimaryCtxRetain",
                (self.retain)(&raw mut context, device),
            )?;
            let pushed = self.check("cuCtxPushCurrent", (self.push)(context));
            let outcome = pushed.and_then(|()| {
                let status = (self.synchronize)();
                let mut popped = ptr::null_mut();
                // The thread ends soon, so a failure here changes nothing.
                let _ = (self.pop)(&raw mut popped);
                self.check("cuCtxSynchronize", status)
            });
            // ONNX Runtime holds the context too, so this frees nothing.
            let _ = (self.release)(device);
            outcome
        }
    }

    fn check(&self, call: &str, status: c_int) -> Result<(), (c_int, String)> {
        if status == SUCCESS {
            return Ok(());
        }
        // SAFETY: `error` is the driver's function for error texts.
        Err((status, unsafe { driver::failure(self.error, call, status) }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Source of a driver whose context synchronizes with the status `STATUS`,
    /// or never, and counts who holds it.
    const FAKE: &str = r#"
        #include <unistd.h>
        static int held = 0, pushed = 0;
        int cuInit(unsigned flags) { return flags; }
        int cuDeviceGet(int *device, int ordinal) {
            *device = ordinal + 10;
            return ordinal < 2 ? 0 : 101;
        }
        int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
            *flags = 0;
            *active = device == 10;
            return 0;
        }
        int cuDevicePrimaryCtxRetain(void **context, int device) {
            *context = &held;
            held += 1;
            return device == 10 ? 0 : 1;
        }
        int cuDevicePrimaryCtxRelease_v2(int device) {
            held -= 1;
            return device == 10 ? 0 : 1;
        }
        int cuCtxPushCurrent_v2(void *context) {
            pushed += 1;
            return context == &held ? 0 : 1;
        }
        int cuCtxPopCurrent_v2(void **context) {
            pushed -= 1;
            *context = &held;
            return 0;
        }
        int cuCtxSynchronize(void) {
            if (held != 1 || pushed != 1) return 1;
            while (STATUS < 0) pause();
            return STATUS;
        }
        int cuGetErrorString(int status, const char **text) {
            *text = status == 700 ? "an illegal memory access was encountered" : "some error";
            return 0;
        }
    "#;

    fn asker(status: i32) -> Arc<Asker> {
        let folder = tempfile::tempdir().unwrap();
        let (source, library) = (folder.path().join("a.c"), folder.path().join("a.so"));
        std::fs::write(&source, FAKE).unwrap();
        let mut compiler = std::process::Command::new("cc");
        let compiler = compiler
            .args(["-shared", "-fPIC"])
            .arg(format!("-DSTATUS=({status})"));
        let compiled = compiler.arg(&source).arg("-o").arg(&library).status();
        assert!(compiled.unwrap().success());
        // SAFETY: nothing runs when this library is loaded.
        let library = unsafe { Library::new(&library) }.unwrap();
        Asker::new(library).unwrap()
    }

    /// Long enough for any thread to begin.
    const LONG: Duration = Duration::from_mins(1);

    #[test]
    fn a_context_that_repeats_an_error_is_lost() {
        let state = asker(700).ask(0, LONG);
        let ContextState::Lost(reason) = state else {
            panic!("{state:?}");
        };
        assert_eq!(
            reason,
            "cuCtxSynchronize of the NVIDIA driver failed: an illegal memory access was \
             encountered (error 700)"
        );
    }

    #[test]
    fn a_context_that_answers_may_be_asked_again() {
        let asker = asker(0);
        for _ in 0..3 {
            // The fake driver fails unless each question lets go of the
            // context.
            assert_eq!(asker.ask(0, LONG), ContextState::Answers);
        }
    }

    #[test]
    fn what_says_nothing_about_the_context_is_not_a_loss() {
        for passing in [OUT_OF_MEMORY, 900, 906] {
            let state = asker(passing).ask(0, LONG);
            assert!(matches!(state, ContextState::Unknown(_)), "{state:?}");
        }
        let asker = asker(0);
        for absent in [1, 7] {
            let state = asker.ask(absent, LONG);
            assert!(matches!(state, ContextState::Unknown(_)), "{state:?}");
        }
    }

    #[test]
    fn a_driver_that_hangs_is_waited_for_once() {
        let asker = asker(-1);
        let limit = Duration::from_millis(20);
        let ContextState::Lost(reason) = asker.ask(0, limit) else {
            panic!("it does not answer");
        };
        assert_eq!(reason, "the NVIDIA driver did not answer within 0.02 s");
        // The second question makes no second thread, or this would take an
        // hour.
        let again = asker.ask(0, Duration::from_hours(1));
        assert!(matches!(again, ContextState::Lost(_)), "{again:?}");
    }
}
