//! Failures of runs and copies on one device, told apart by their words and,
//! on a GPU, by the driver.

use crate::gpu::context::{self, ContextState};
use crate::model::precision::Provider;
use crate::runtime::Runtime;
use crate::runtime::error::{EngineError, Words, words};

/// Classifier of the failures of one device.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Failures {
    /// Number of the GPU, from 0; `None` on a CPU.
    gpu: Option<i32>,
    /// Function that asks the driver for the state of a GPU's context.
    ask: fn(i32) -> ContextState,
}

impl Failures {
    pub(crate) fn of(runtime: &Runtime) -> Self {
        let is_gpu = runtime.provider == Provider::Cuda;
        Self {
            gpu: is_gpu.then_some(runtime.device_id),
            ask: context::ask,
        }
    }

    /// Classifies an error again if nothing is known of it but ONNX Runtime's
    /// words. Called where errors leave an engine, so that no copy, binding or
    /// run is left out.
    pub(crate) fn judge(&self, error: EngineError) -> EngineError {
        match error {
            EngineError::Runtime(text) => self.run(text),
            error => error,
        }
    }

    /// Classifies the error of a run, a copy or an allocation. Words that only
    /// some failures of a device have in common, and words that are not known,
    /// are judged by the driver, so that a lost device is noticed wherever it
    /// first shows. No other engine captures meanwhile: the caller loads alone,
    /// or all engines are loaded, or the caller is an idle check
    /// ([`CAPTURES`](crate::runtime::capture::CAPTURES)).
    pub(crate) fn run(&self, error: impl std::fmt::Display) -> EngineError {
        let text = error.to_string();
        let words = words(&text);
        let state = match (words, self.gpu) {
            (Words::OfDevice, _) => return EngineError::Device(text),
            (Words::OfMemory, _) => return EngineError::OutOfMemory(text),
            (Words::MaybeOfDevice | Words::Other, None) => return EngineError::Runtime(text),
            (Words::MaybeOfDevice | Words::Other, Some(gpu)) => (self.ask)(gpu),
        };
        match (state, words) {
            (ContextState::Lost(reason), _) => EngineError::Device(format!("{text}; {reason}")),
            (ContextState::Unknown(reason), Words::MaybeOfDevice) => {
                tracing::warn!(reason, "the state of the device is not known");
                EngineError::Device(text)
            }
            (ContextState::Answers | ContextState::Unknown(_), _) => EngineError::Runtime(text),
        }
    }
}

/// Leaks `value` if its device is lost: ONNX Runtime ends the process with
/// SIGABRT if freeing a captured run fails, and every call fails on a lost
/// device. The process is about to end in good order.
pub(crate) fn leak_if_lost<T>(value: T, error: &EngineError) {
    if matches!(error, EngineError::Device(_)) {
        std::mem::forget(value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lost(_: i32) -> ContextState {
        ContextState::Lost("error 700".to_owned())
    }

    fn answers(_: i32) -> ContextState {
        ContextState::Answers
    }

    fn unknown(_: i32) -> ContextState {
        ContextState::Unknown("no driver".to_owned())
    }

    fn nobody(gpu: i32) -> ContextState {
        panic!("nobody asks for device {gpu}")
    }

    fn kind(gpu: Option<i32>, ask: fn(i32) -> ContextState, text: &str) -> &'static str {
        match (Failures { gpu, ask }).run(text) {
            EngineError::Device(_) => "device",
            EngineError::OutOfMemory(_) => "memory",
            EngineError::Runtime(_) => "run",
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn clear_words_need_no_driver() {
        for gpu in [None, Some(0)] {
            let text = "CUDA failure 702: the launch timed out and was terminated ; GPU=0";
            assert_eq!(kind(gpu, nobody, text), "device");
            assert_eq!(kind(gpu, nobody, "CUDA failure 2: out of memory"), "memory");
        }
    }

    #[test]
    fn the_driver_judges_the_rest() {
        for text in [
            "a copy failed",
            "CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR",
        ] {
            assert_eq!(kind(Some(1), lost, text), "device");
            assert_eq!(kind(Some(1), answers, text), "run");
            assert_eq!(kind(None, nobody, text), "run", "a CPU has no driver");
        }
        assert_eq!(kind(Some(1), unknown, "a copy failed"), "run");
        let text = "CUDA failure 999: unknown error ; GPU=0";
        assert_eq!(kind(Some(1), unknown, text), "device", "the safer of both");
    }

    #[test]
    fn only_what_is_not_classified_yet_is_judged() {
        let failures = Failures {
            gpu: Some(0),
            ask: lost,
        };
        let judged = |error| failures.judge(error);
        let error = judged(EngineError::Runtime("a copy failed".to_owned()));
        assert!(matches!(error, EngineError::Device(_)), "{error:?}");
        let error = judged(EngineError::NotFinite);
        assert!(matches!(error, EngineError::NotFinite), "{error:?}");
    }

    #[test]
    fn the_reason_has_the_words_of_both() {
        let failures = Failures {
            gpu: Some(0),
            ask: lost,
        };
        let text = failures.run("a copy failed").to_string();
        assert_eq!(text, "the device has failed: a copy failed; error 700");
    }

    #[test]
    fn only_what_a_lost_device_holds_is_leaked() {
        struct Freed<'a>(&'a std::cell::Cell<bool>);
        impl Drop for Freed<'_> {
            fn drop(&mut self) {
                self.0.set(true);
            }
        }
        let is_freed = std::cell::Cell::new(false);
        leak_if_lost(Freed(&is_freed), &EngineError::Device("lost".to_owned()));
        assert!(!is_freed.get());
        leak_if_lost(Freed(&is_freed), &EngineError::NotFinite);
        assert!(is_freed.get());
    }
}
