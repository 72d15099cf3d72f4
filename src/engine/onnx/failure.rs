//! What kind of failure an error text of the runtime tells of; it has no codes
//! for them.

use crate::engine::EngineError;

/// What the runtime says when memory does not suffice, in lower case.
const OUT_OF_MEMORY: [&str; 6] = [
    "out of memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "smaller than requested bytes",
    "alloc_failed",
];

/// What it says when the device or its context is lost: CUDA's errors that
/// every later call repeats.
const DEVICE_FAILED: [&str; 11] = [
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "device-side assert",
    "uncorrectable",
    "device is lost",
    "gpu is lost",
    "execution_failed",
    "driver shutting down",
];

/// The failure of a run.
pub(super) fn run_failed(error: impl std::fmt::Display) -> EngineError {
    let text = error.to_string();
    let lower = text.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if says(&DEVICE_FAILED) {
        EngineError::Device(text)
    } else if says(&OUT_OF_MEMORY) {
        EngineError::OutOfMemory(text)
    } else {
        EngineError::Runtime(text)
    }
}

/// A failure of anything else.
pub(super) fn runtime(error: impl std::fmt::Display) -> EngineError {
    EngineError::Runtime(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_apart_by_their_words() {
        let check = |text, expected: &str| {
            let kind = match run_failed(text) {
                EngineError::Device(_) => "device",
                EngineError::OutOfMemory(_) => "memory",
                EngineError::Runtime(_) => "run",
                other => panic!("{other:?}"),
            };
            assert_eq!(kind, expected, "{text}");
        };
        check(
            "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
            "device",
        );
        check("CUDA failure 719: unspecified launch failure", "device");
        check(
            "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED",
            "device",
        );
        check("CUDA failure 2: out of memory ; GPU=0", "memory");
        check(
            "Available memory of 12 is smaller than requested bytes of 999",
            "memory",
        );
        check(
            "Failed to allocate memory for requested buffer of size 1",
            "memory",
        );
        check("CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED", "memory");
        check("Non-zero status code returned while running Gather", "run");
    }
}
