//! Values of the labels of metrics. No value comes from a request.

use super::registry::LabelSet;
use crate::engine::FallbackKind;
use crate::model::graph::{Graph, Norm};
use crate::proto::{GrpcCode, Priority, RpcMethod};
use crate::serve::error::RequestStage;

/// Implements [`LabelSet`] for an enum without fields whose `ALL` is in the
/// order of its variants.
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
label!(ReloadedFile, "file", label);
label!(CacheLookup, "result", label);
label!(CanaryResult, "result", label);
label!(FedTokens, "kind", label);
label!(SpanDrop, "reason", label);

/// Codes that have series of their own: all codes with which the worker or its
/// gRPC library can answer. Other codes are counted as UNKNOWN.
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

/// Returns the code whose series count a code.
pub(super) fn counted(code: GrpcCode) -> GrpcCode {
    COUNTED[code.index()]
}

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
        // Index 0 is UNKNOWN.
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

/// Reason for which an image was dropped without an answer, and the stage that
/// the image had reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum DropReason {
    Cancelled(RequestStage),
    Deadline(RequestStage),
    /// Too little time for a run before the deadline; the only stage is the
    /// queue, since the image is rejected when it gets there.
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

/// Reason for which a batch was formed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum BatchClose {
    /// The batch had reached the size at which the engine is fastest.
    Full,
    /// The oldest image of the batch had waited for --max-queue-delay.
    Delay,
    /// The engine would otherwise have run another batch, and this batch would
    /// have had to wait for that run.
    Turn,
    /// The worker is shutting down and waits for no further images.
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
    /// The device failed and can run nothing more.
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

/// Reason for which a connection ended or was never let in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum ConnectionOutcome {
    /// The connection was let in and has closed.
    Closed,
    /// The connection was closed at once because of --connections-max.
    Refused,
    /// The connection was closed at once because its address had reached
    /// --connections-per-address-max.
    RefusedAddress,
    /// The connection had no call and was closed to make room for a new one.
    SentAway,
    /// The client did not finish its handshake, or not in time.
    HandshakeFailed,
    /// The system could not accept a connection, mostly for lack of file
    /// descriptors.
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
pub enum ReloadedFile {
    Certificate,
    Tokens,
    /// Files of `--head-dir`.
    Heads,
}

impl ReloadedFile {
    const ALL: [Self; 3] = [Self::Certificate, Self::Tokens, Self::Heads];

    #[must_use]
    pub fn label(self) -> &'static str {
        match self {
            Self::Certificate => "certificate",
            Self::Tokens => "tokens",
            Self::Heads => "heads",
        }
    }
}

/// Result of a lookup in the cache.
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

/// Result of the check of an idle engine on an image whose answer is known.
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

/// Reason for which a span was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SpanDrop {
    /// Too many spans waited.
    Queue,
    /// The collector did not take the span.
    Collector,
}

impl SpanDrop {
    const ALL: [Self; 2] = [Self::Queue, Self::Collector];

    fn label(self) -> &'static str {
        match self {
            Self::Queue => "queue",
            Self::Collector => "collector",
        }
    }
}

/// Kind of tokens that are fed to images that are generated.
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
        is_indexed::<ReloadedFile>();
        is_indexed::<CacheLookup>();
        is_indexed::<CanaryResult>();
        is_indexed::<FedTokens>();
        // A code without a series of its own is counted as UNKNOWN.
        assert_eq!(GrpcCode::DataLoss.index(), GrpcCode::Unknown.index());
    }
}
