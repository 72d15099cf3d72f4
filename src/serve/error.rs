//! Errors that can end a request.
//!
//! The stages know nothing of gRPC: `rpc/status.rs` alone turns a
//! [`StageError`] into a code. Texts are written for the caller and say what to
//! change; texts for the operator alone go to the log where the error happens.

use std::sync::Arc;
use std::time::Duration;

use crate::imaging::PreprocessError;
use crate::runtime::error::EngineError;

/// Reason why an image has no answer, as known to the stages; the gRPC surface
/// has further reasons of its own.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StageError {
    /// The image could not be turned into tokens.
    #[error(transparent)]
    Image(Arc<PreprocessError>),
    /// The worker has no room for the call now (load shedding).
    #[error(
        "the worker is full: {what} in flight would exceed {flag}; retry after {}",
        humantime::format_duration(whole_ms(*retry_after))
    )]
    Full {
        what: &'static str,
        flag: &'static str,
        /// Time after which a retry makes sense, by the rate at which work is
        /// done now.
        retry_after: Duration,
    },
    /// The caller holds more than its share, and the room that is free is left to
    /// others.
    #[error(
        "the worker is nearly full, and the caller holds more than its share: the last {what} of \
         {flag} are for other callers; retry after {}",
        humantime::format_duration(whole_ms(*retry_after))
    )]
    OverShare {
        what: &'static str,
        flag: &'static str,
        retry_after: Duration,
    },
    /// The call is over a limit of its caller, which the tokens file sets.
    #[error(
        "the caller {caller:?} is over its limit {limit} (--auth-tokens-file); retry after {}",
        humantime::format_duration(whole_ms(*retry_after))
    )]
    CallerLimit {
        caller: Box<str>,
        /// The limit as in the tokens file.
        limit: String,
        retry_after: Duration,
    },
    /// The call has more images than its caller may ever have in flight.
    #[error(
        "images: the call needs {given} images; the limit of the caller {caller:?} is {max} \
         (in-flight in --auth-tokens-file); send less per call"
    )]
    CallerNeverFits {
        caller: Box<str>,
        given: u64,
        max: u64,
    },
    /// The call needs more than its class can ever have.
    #[error(
        "images: the call needs {given} {what}; the limit for its class is {max} ({flag}, less \
         --interactive-reserve for bulk); send less per call"
    )]
    NeverFits {
        given: usize,
        max: usize,
        what: &'static str,
        flag: &'static str,
    },
    /// The caller's deadline passed before the answer was ready.
    #[error("the deadline passed {stage}")]
    DeadlineExceeded { stage: RequestStage },
    /// The model cannot be run in the time that is left, by the duration of its
    /// latest runs.
    #[error(
        "the deadline is too short: the answer would take at least {}",
        humantime::format_duration(whole_ms(*needed))
    )]
    DeadlineTooShort { needed: Duration },
    /// The caller disconnected or cancelled, so nobody reads this text.
    #[error("the caller disconnected {stage}")]
    Cancelled { stage: RequestStage },
    /// The model is not loaded, or its engine has failed.
    #[error("the model is not ready; retry on another worker")]
    NotReady,
    /// The model run failed.
    #[error("the model run failed; the worker's log has the cause")]
    Engine(Arc<EngineError>),
    /// A stage dropped the request without answering, which is a defect of the
    /// worker.
    #[error("the worker lost the request; please report this with the worker's log")]
    Lost,
}

impl StageError {
    /// True if an image with this error ends its whole call: the cause is the
    /// worker or the clock, so the other images would fare no better, and a
    /// client retries by the call's code.
    #[must_use]
    pub fn ends_call(&self) -> bool {
        match self {
            Self::DeadlineExceeded { .. }
            | Self::DeadlineTooShort { .. }
            | Self::Cancelled { .. }
            | Self::NotReady
            | Self::Full { .. }
            | Self::OverShare { .. }
            | Self::CallerLimit { .. }
            | Self::CallerNeverFits { .. }
            | Self::NeverFits { .. } => true,
            Self::Image(_) | Self::Engine(_) | Self::Lost => false,
        }
    }
}

/// Rounds a time down to whole milliseconds, and up to 1 ms, for a reader who
/// does not need the microseconds.
fn whole_ms(time: Duration) -> Duration {
    Duration::from_millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX)).max(MS)
}

const MS: Duration = Duration::from_millis(1);

/// Stage at which a request was when it ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RequestStage {
    /// Waiting for a preprocessing thread, or in one.
    Preprocess,
    /// Waiting for the engine.
    Queue,
    /// Handed to the engine.
    Engine,
}

impl RequestStage {
    /// The stage's label in metrics.
    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Preprocess => "preprocess",
            Self::Queue => "queue",
            Self::Engine => "engine",
        }
    }
}

impl std::fmt::Display for RequestStage {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Preprocess => "before the image had been decoded",
            Self::Queue => "while the image waited for the engine",
            Self::Engine => "while the model ran",
        })
    }
}

impl From<PreprocessError> for StageError {
    fn from(error: PreprocessError) -> Self {
        Self::Image(Arc::new(error))
    }
}

impl From<EngineError> for StageError {
    fn from(error: EngineError) -> Self {
        Self::Engine(Arc::new(error))
    }
}
