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

/// Parts of the runtime's texts that mean a lost device or context, in lower
/// case: CUDA's errors that every later call repeats.
const OF_DEVICE: [&str; 15] = [
    "illegal memory access",
    "illegal address",
    "illegal instruction",
    "misaligned address",
    "unspecified launch failure",
    "launch timed out",
    "hardware stack error",
    "invalid program counter",
    "shared address space",
    "context is destroyed",
    "device-side assert",
    "uncorrectable",
    "device is lost",
    "gpu is lost",
    "driver shutting down",
];

/// Parts of the runtime's texts that may mean a lost device, in lower case:
/// libraries of CUDA say so for passing errors too.
const MAYBE_OF_DEVICE: [&str; 3] = ["unknown error", "internal_error", "execution_failed"];

/// Meaning of an error's words.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Words {
    OfDevice,
    MaybeOfDevice,
    OfMemory,
    Other,
}

/// Returns the meaning of the text of a failure.
pub(crate) fn words(text: &str) -> Words {
    let lower = text.to_lowercase();
    let says = |words: &[&str]| words.iter().any(|word| lower.contains(word));
    if says(&OF_DEVICE) {
        Words::OfDevice
    } else if says(&OUT_OF_MEMORY) {
        Words::OfMemory
    } else if says(&MAYBE_OF_DEVICE) {
        Words::MaybeOfDevice
    } else {
        Words::Other
    }
}

/// Wraps any other error of the runtime.
pub(crate) fn runtime(error: impl std::fmt::Display) -> EngineError {
    EngineError::Runtime(error.to_string())
}

/// Error of a session on a provider that cannot be used, with the remedy.
pub(crate) fn cannot_be_had(provider: Provider, error: &ort::Error) -> EngineError {
    let text = error.to_string();
    match provider {
        Provider::Cuda if words(&text) == Words::OfDevice => EngineError::Device(text),
        Provider::Cpu => runtime(error),
        Provider::Cuda => EngineError::Provider(format!(
            "the CUDA execution provider cannot be used: {}; it needs a GPU, the library of \
             onnxruntime-gpu (--onnxruntime) and CUDA's libraries on LD_LIBRARY_PATH, or both \
             from `pip install 'imagegpt[gpu]'`; `imagegpt doctor` says what is missing; or choose the CPU (--execution-provider cpu, \
             for `compile` --provider cpu)",
            text.trim_end_matches('.')
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn failures_are_told_apart_by_their_words() {
        let check = |text, expected| assert_eq!(words(text), expected, "{text}");
        for text in [
            "CUDA failure 700: an illegal memory access was encountered ; GPU=0",
            "CUDA failure 719: unspecified launch failure",
            "CUDA failure 702: the launch timed out and was terminated",
            "CUDA failure 714: hardware stack error",
            "CUDA failure 717: operation not supported on global/shared address space",
            "CUDA failure 718: invalid program counter",
            "CUDA failure 709: context is destroyed",
            "CUDA failure 214: uncorrectable ECC error encountered",
        ] {
            check(text, Words::OfDevice);
        }
        for text in [
            "CUDA failure 999: unknown error ; GPU=0",
            "CUBLAS failure 13: CUBLAS_STATUS_EXECUTION_FAILED",
            "CUBLAS failure 14: CUBLAS_STATUS_INTERNAL_ERROR",
            "CUDNN failure 4000: CUDNN_STATUS_INTERNAL_ERROR",
        ] {
            check(text, Words::MaybeOfDevice);
        }
        for text in [
            "CUDA failure 2: out of memory ; GPU=0",
            "Available memory of 12 is smaller than requested bytes of 999",
            "Failed to allocate memory for requested buffer of size 1",
            "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED",
        ] {
            check(text, Words::OfMemory);
        }
        check(
            "Non-zero status code returned while running Gather",
            Words::Other,
        );
    }
}
