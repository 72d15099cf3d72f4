//! Errors of ONNX Runtime, classified by their texts, since the runtime has no
//! codes for them.

use crate::model::precision::Provider;

/// Reason why an engine could not be loaded or a batch could not be run.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// The runtime's library is missing or cannot be used.
    #[error("{0}")]
    Library(String),
    /// The requested execution provider cannot be used.
    #[error("{0}")]
    Provider(String),
    /// A graph is not one that this worker can serve.
    #[error("{file}: {reason}")]
    Graph { file: String, reason: String },
    /// The engine could not be loaded; the text is complete by itself.
    #[error("{0}")]
    NotLoaded(String),
    /// The runtime failed.
    #[error("onnx runtime: {0}")]
    Runtime(String),
    /// There was not enough memory for a batch of this size.
    #[error("out of memory: {0}")]
    OutOfMemory(String),
    /// The device is lost, or in a state that only a new process can leave.
    #[error("the device has failed: {0}")]
    Device(String),
    /// The run was stopped because no caller waited for it any more.
    #[error("the run was stopped")]
    Stopped,
    /// The run's output does not have the expected shape or values.
    #[error("the model returned {got}, not {expected}")]
    Output { got: String, expected: String },
    /// Numbers of a run are not finite.
    #[error("the model returned a value that is not finite")]
    NotFinite,
    /// The engine panicked.
    #[error("the engine panicked: {0}")]
    Panicked(String),
}

/// Parts of the runtime's texts that mean too little memory, in lower case.
const OUT_OF_MEMORY: [&str; 6] = [
    "out of memory",
    "failed to allocate memory",
    "bad_alloc",
    "bad allocation",
    "smaller than requested bytes",
    "alloc_failed",
];

/// Parts of the runtime's texts that mean a lost device or context: CUDA's
/// errors that every later call repeats.
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

/// Classifies the error of a run by its text.
pub(crate) fn run_failed(error: impl std::fmt::Display) -> EngineError {
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

/// Wraps any other error of the runtime.
pub(crate) fn runtime(error: impl std::fmt::Display) -> EngineError {
    EngineError::Runtime(error.to_string())
}

/// Error of a session on a provider that cannot be used, with the remedy.
pub(crate) fn cannot_be_had(provider: Provider, error: &ort::Error) -> EngineError {
    match provider {
        Provider::Cpu => runtime(error),
        Provider::Cuda => EngineError::Provider(format!(
            "the CUDA execution provider cannot be used: {}; it needs a GPU, the library of \
             onnxruntime-gpu (--onnxruntime) and CUDA's libraries on LD_LIBRARY_PATH, or both \
             from `pip install 'imagegpt[gpu]'`; `imagegpt doctor` says what is missing; or choose the CPU (--execution-provider cpu, \
             for `compile` --provider cpu)",
            error.to_string().trim_end_matches('.')
        )),
    }
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
