//! Values that labels of metrics may have. None comes from a request.

use super::registry::LabelSet;
use crate::engine::FallbackKind;
use crate::model::graph::{Graph, Norm};
use crate::proto::{GrpcCode, Priority, RpcMethod};
use crate::serve::error::RequestStage;

/// A label of an enum without fields, whose `ALL` is in the order of its variants.
macro_rules! label {
    ($type:ty, $name:literal, $value:ident) => {
        impl LabelSet for $type {
            const LABELS: &'static [&'static str] = &[$name];
            const COUNT: usize = Self::ALL.len();

            fn all() -> Vec<Self> {
                Self::ALL.to_vec()
            }

            fn index(self) -> usize {
                self as usize
            }

            fn values(self) -> Vec<&'static str> {
                vec![self.$value()]
            }
        }
    };
}

label!(RpcMethod, "method", name);
label!(Priority, "class", label);
label!(FallbackKind, "kind", label);
label!(BatchClose, "close_reason", label);
label!(EngineFault, "kind", label);
label!(ConnectionOutcome, "outcome", label);
label!(AccessFile, "file", label);
label!(CacheLookup, "result", label);
label!(CanaryResult, "result", label);
label!(FedTokens, "kind", label);

/// Codes that have series: those that the worker or its gRPC library can answer
/// with. Any other would be counted as UNKNOWN.
const COUNTED: [GrpcCode; 13] = [
    GrpcCode::Unknown,
    GrpcCode::Ok,
    GrpcCode::Cancelled,
    GrpcCode::InvalidArgument,
    GrpcCode::DeadlineExceeded,
    GrpcCode::NotFound,
    GrpcCode::ResourceExhausted,
    GrpcCode::FailedPrecondition,
    GrpcCode::OutOfRange,
    GrpcCode::Unimplemented,
    GrpcCode::Internal,
    GrpcCode::Unavailable,
    GrpcCode::Unauthenticated,
];

/// True if a code has series of its own.
#[cfg(test)]
pub(crate) fn is_counted(code: GrpcCode) -> bool {
    COUNTED.contains(&code)
}

impl LabelSet for GrpcCode {
    const LABELS: &'static [&'static str] = &["code"];
    const COUNT: usize = COUNTED.len();

    fn all() -> Vec<Self> {
        COUNTED.to_vec()
    }

    fn index(self) -> usize {
        // UNKNOWN is the first.
        COUNTED.iter().position(|code| *code == self).unwrap_or(0)
    }

    fn values(self) -> Vec<&'static str> {
        vec![self.name()]
    }
}

impl LabelSet for Graph {
    const LABELS: &'static [&'static str] = &["graph"];
    const COUNT: usize = Self::ALL.len();

    fn all() -> Vec<Self> {
        Self::ALL.to_vec()
    }

    fn index(self) -> usize {
        match self {
            Self::Features(Norm::PreAttnRms) => 0,
            Self::Features(Norm::None) => 1,
            Self::Hidden => 2,
            Self::Logits => 3,
            Self::Score => 4,
            Self::Generate => 5,
        }
    }

    fn values(self) -> Vec<&'static str> {
        vec![self.label()]
    }
}

/// Why an image was dropped before it had an answer, and where it had got to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DropReason {
    Cancelled(RequestStage),
    Deadline(RequestStage),
    /// Refused as it comes to the queue, so there is no other stage.
    DeadlineTooShort,
}

const STAGES: [RequestStage; 3] = [
    RequestStage::Preprocess,
    RequestStage::Queue,
    RequestStage::Engine,
];

impl LabelSet for DropReason {
    const LABELS: &'static [&'static str] = &["reason", "stage"];
    const COUNT: usize = 2 * STAGES.len() + 1;

    fn all() -> Vec<Self> {
        STAGES
            .map(Self::Cancelled)
            .into_iter()
            .chain(STAGES.map(Self::Deadline))
            .chain([Self::DeadlineTooShort])
            .collect()
    }

    fn index(self) -> usize {
        match self {
            Self::Cancelled(stage) => stage as usize,
            Self::Deadline(stage) => STAGES.len() + stage as usize,
            Self::DeadlineTooShort => 2 * STAGES.len(),
        }
    }

    fn values(self) -> Vec<&'static str> {
        match self {
            Self::Cancelled(stage) => vec!["cancelled", stage.label()],
            Self::Deadline(stage) => vec!["deadline", stage.label()],
            Self::DeadlineTooShort => vec!["deadline_too_short", RequestStage::Queue.label()],
        }
    }
}

/// Why a batch was formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BatchClose {
    /// The batch had reached the size that the engine is fastest at.
    Full,
    /// Its oldest image had waited the queue delay.
    Delay,
    /// The engine was about to run something anyway, so waiting for company
    /// would have meant waiting for that.
    Turn,
    /// The worker is shutting down and waits for nobody.
    Drain,
}

impl BatchClose {
    const ALL: [Self; 4] = [Self::Full, Self::Delay, Self::Turn, Self::Drain];

    fn label(self) -> &'static str {
        match self {
            Self::Full => "full",
            Self::Delay => "delay",
            Self::Turn => "turn",
            Self::Drain => "drain",
        }
    }
}

/// Kind of a fault in the engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum EngineFault {
    /// A run failed.
    Run,
    /// Memory did not suffice for a batch.
    OutOfMemory,
    /// The device can do no more.
    Device,
    /// The engine panicked.
    Panic,
}

impl EngineFault {
    const ALL: [Self; 4] = [Self::Run, Self::OutOfMemory, Self::Device, Self::Panic];

    fn label(self) -> &'static str {
        match self {
            Self::Run => "run",
            Self::OutOfMemory => "out_of_memory",
            Self::Device => "device",
            Self::Panic => "panic",
        }
    }
}

/// End of a connection, or the reason that it had none.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConnectionOutcome {
    /// The connection was let in and has closed.
    Closed,
    /// The connection was closed at once, for want of a place.
    Refused,
    /// A connection was closed at once, because its address has as many as one may have.
    RefusedAddress,
    /// A connection without a call gave its place to another one.
    SentAway,
    /// The client did not finish its handshake, or not in time.
    HandshakeFailed,
    /// The system gave no connection, for want of file descriptors mostly.
    AcceptFailed,
}

impl ConnectionOutcome {
    const ALL: [Self; 6] = [
        Self::Closed,
        Self::Refused,
        Self::RefusedAddress,
        Self::SentAway,
        Self::HandshakeFailed,
        Self::AcceptFailed,
    ];

    fn label(self) -> &'static str {
        match self {
            Self::Closed => "closed",
            Self::Refused => "refused",
            Self::RefusedAddress => "refused_address",
            Self::SentAway => "sent_away",
            Self::HandshakeFailed => "handshake_failed",
            Self::AcceptFailed => "accept_failed",
        }
    }
}

/// Files that may be replaced while the worker runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum AccessFile {
    Certificate,
    Tokens,
}

impl AccessFile {
    const ALL: [Self; 2] = [Self::Certificate, Self::Tokens];

    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Tokens => "tokens",
        }
    }
}

/// Result of a look into the cache.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CacheLookup {
    Hit,
    Miss,
}

impl CacheLookup {
    const ALL: [Self; 2] = [Self::Hit, Self::Miss];

    fn label(self) -> &'static str {
        match self {
            Self::Hit => "hit",
            Self::Miss => "miss",
        }
    }
}

/// Result of a check of an idle engine, whose answer is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum CanaryResult {
    Ok,
    Failed,
}

impl CanaryResult {
    const ALL: [Self; 2] = [Self::Ok, Self::Failed];

    fn label(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Failed => "failed",
        }
    }
}

/// Which tokens are fed to sequences.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FedTokens {
    Step,
    Primer,
}

impl FedTokens {
    const ALL: [Self; 2] = [Self::Step, Self::Primer];

    fn label(self) -> &'static str {
        match self {
            Self::Step => "step",
            Self::Primer => "primer",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is_indexed<L: LabelSet + PartialEq + std::fmt::Debug>() {
        for (index, label) in L::all().into_iter().enumerate() {
            assert_eq!(label.index(), index, "{label:?}");
            assert_eq!(label.values().len(), L::LABELS.len());
        }
        assert_eq!(L::all().len(), L::COUNT);
        assert_eq!(L::all().len(), L::COUNT);
    }

    #[test]
    fn each_value_has_the_index_of_its_place() {
        is_indexed::<RpcMethod>();
        is_indexed::<GrpcCode>();
        is_indexed::<(RpcMethod, GrpcCode)>();
        is_indexed::<Priority>();
        is_indexed::<Graph>();
        is_indexed::<DropReason>();
        is_indexed::<FallbackKind>();
        is_indexed::<BatchClose>();
        is_indexed::<EngineFault>();
        is_indexed::<ConnectionOutcome>();
        is_indexed::<AccessFile>();
        is_indexed::<CacheLookup>();
        is_indexed::<CanaryResult>();
        is_indexed::<FedTokens>();
        // What has no series of its own is counted all the same.
        assert_eq!(GrpcCode::DataLoss.index(), GrpcCode::Unknown.index());
    }
}
