//! Ends of commands whose GPU is lost: the error, its exit code, and no call of
//! a library that would end the process before both are told.

use super::cli::exit;
use crate::compile::CompileError;
use crate::runtime::error::EngineError;
use crate::serve::devices::{FailureKind, WorkerFailure};

/// Returns the exit code of a command that ends with this error.
#[must_use]
pub fn exit_code(error: &anyhow::Error) -> i32 {
    if is_of_lost_device(error) {
        exit::DEVICE
    } else {
        exit::USAGE
    }
}

/// Returns true if the error, or a cause of it, is that of a lost device.
fn is_of_lost_device(error: &anyhow::Error) -> bool {
    error.chain().any(|cause| {
        let of_engine = cause.downcast_ref::<EngineError>();
        let of_compiler = cause.downcast_ref::<CompileError>();
        let of_worker = cause.downcast_ref::<WorkerFailure>();
        matches!(of_engine, Some(EngineError::Device(_)))
            || matches!(of_compiler, Some(CompileError::Device { .. }))
            || of_worker.is_some_and(|failure| failure.kind == FailureKind::Device)
    })
}

/// Frees what a command has on a device, or leaks it if the outcome is the error
/// of a lost device: ONNX Runtime ends the process with SIGABRT if it cannot
/// free a session. The command is about to end in good order.
pub(super) fn free_unless_lost<T, R>(value: T, outcome: anyhow::Result<R>) -> anyhow::Result<R> {
    if outcome.as_ref().is_err_and(is_of_lost_device) {
        std::mem::forget(value);
    }
    outcome
}

#[cfg(test)]
mod tests {
    use anyhow::Context as _;

    use super::*;

    fn lost() -> EngineError {
        EngineError::Device("error 700".to_owned())
    }

    fn in_compiler(error: EngineError) -> CompileError {
        CompileError::of_run("hidden", error)
    }

    fn of_worker(kind: FailureKind) -> WorkerFailure {
        let reason = "the device has failed: error 700".to_owned();
        WorkerFailure { kind, reason }
    }

    #[test]
    fn a_lost_device_has_a_code_of_its_own_wherever_it_is_met() {
        let within = |error: anyhow::Error| {
            let told = error.context("--reference");
            let text = format!("{told:#}");
            let times = text.matches("the device has failed: error 700").count();
            assert_eq!(times, 1, "{text}");
            exit_code(&told)
        };
        assert_eq!(within(lost().into()), exit::DEVICE);
        assert_eq!(within(in_compiler(lost()).into()), exit::DEVICE);
        assert_eq!(within(of_worker(FailureKind::Device).into()), exit::DEVICE);
        assert_eq!(within(of_worker(FailureKind::Worker).into()), exit::USAGE);
        let other = || EngineError::Runtime("no".to_owned());
        assert_eq!(exit_code(&other().into()), exit::USAGE);
        assert_eq!(exit_code(&in_compiler(other()).into()), exit::USAGE);
        assert_eq!(exit_code(&anyhow::anyhow!("no such file")), exit::USAGE);
    }

    #[test]
    fn only_what_a_lost_device_holds_is_leaked() {
        struct Freed<'a>(&'a std::cell::Cell<u8>);
        impl Drop for Freed<'_> {
            fn drop(&mut self) {
                self.0.set(self.0.get() + 1);
            }
        }
        let n_freed = std::cell::Cell::new(0);
        let outcome: Result<(), _> = Err(lost()).context("a run");
        free_unless_lost(Freed(&n_freed), outcome).unwrap_err();
        assert_eq!(n_freed.get(), 0);
        free_unless_lost(Freed(&n_freed), anyhow::Ok(7)).unwrap();
        assert_eq!(n_freed.get(), 1);
        let outcome = anyhow::Result::<()>::Err(anyhow::anyhow!("other"));
        free_unless_lost(Freed(&n_freed), outcome).unwrap_err();
        assert_eq!(n_freed.get(), 2);
    }
}
