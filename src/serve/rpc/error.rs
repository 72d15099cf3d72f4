//! Why a call or an image of it is refused: reasons of the stages, and those that the
//! gRPC surface has itself.

use std::time::Duration;

use crate::imaging::PreprocessError;
use crate::model::CallTask;
use crate::serve::error::StageError;

/// A caller's list of layers is echoed this far.
const LAYERS_SHOWN: usize = 64;

/// Why a call, or one image of a call, has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum RequestError {
    /// A stage has no answer.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// An image of the call has none of the three forms set.
    #[error("image: none of encoded, rgb8 and tokens is set; set exactly one")]
    ImageMissing,
    /// The call has no image at all.
    #[error("images: the call has none; send at least one")]
    CallEmpty,
    /// The call has more images than one call may have.
    #[error(
        "images: {given} in one call, over the limit of {max} (--images-per-call-max); split the call"
    )]
    CallTooLarge { given: usize, max: usize },
    /// The answer would be larger than one response may be.
    #[error(
        "images: the answer would take {given} bytes, over the limit of {max} \
         (--response-bytes-max); send fewer images a call, or pool"
    )]
    ResponseTooLarge { given: u64, max: u64 },
    /// The samples of a call would be larger than one response may be.
    #[error(
        "samples: the answer may take {given} bytes, over the limit of {max} \
         (--response-bytes-max); ask for fewer samples a call, or for a lower scale"
    )]
    SamplesTooLarge { given: u64, max: u64 },
    /// An option has a value that the contract does not define.
    #[error("{field}: {value} is not a value of this enum")]
    OptionUnknown { field: &'static str, value: i32 },
    /// An option has a value that makes no sense.
    #[error("{field}: {problem}")]
    OptionInvalid {
        field: &'static str,
        problem: String,
    },
    /// The loaded model has no graph for the task.
    #[error("the loaded model cannot {task}: it has no {file}")]
    TaskMissing { task: CallTask, file: &'static str },
    /// Embed was asked for layers that the model does not have pooled.
    #[error(
        "layers: {:?} with this norm and pooling are not served; the model serves {served}, \
         ascending and in one run",
        &given[..given.len().min(LAYERS_SHOWN)]
    )]
    LayersMissing { given: Vec<u32>, served: String },
    /// Pooling needs the states of all positions, and there are none.
    #[error(
        "pooling: the model has pooled features only; compile it with the task hidden for the \
         states of the last layer"
    )]
    StatesMissing,
    /// There is no linear head of that name.
    #[error("head: {given:?} is not loaded; the worker has {known}")]
    HeadUnknown { given: String, known: String },
    /// A linear head was trained with another context.
    #[error("context: the head {head} was trained with another one; leave it unset")]
    HeadContext { head: String },
    /// A model, or a version of it, that is not the one that is served.
    #[error("model: {given:?} is not found; the worker serves {served:?}, version 1")]
    ModelUnknown { given: String, served: String },
    /// A tensor of a request is not one that the model takes or gives.
    #[error("{tensor}: {problem}")]
    TensorInvalid { tensor: String, problem: String },
    /// One image has no answer, and its call takes all or nothing.
    #[error("image {index}: {cause}")]
    OfImage {
        index: usize,
        cause: Box<RequestError>,
    },
    /// The metadata names a class that there is not.
    #[error("imagegpt-priority: {given:?} is not a class; use \"interactive\" or \"bulk\"")]
    PriorityUnknown { given: String },
    /// The request message is larger than one may be.
    #[error(
        "request: the message is over the limit of {max} bytes (--request-bytes-max); send fewer \
         or smaller images a call"
    )]
    MessageTooLarge { max: u64 },
    /// The call brought no bearer token, or one that is not accepted.
    #[error("authorization: {problem}")]
    Unauthenticated { problem: &'static str },
    /// The request took too long to arrive.
    #[error(
        "request: it did not arrive within {} (--request-timeout); send fewer or smaller images a \
         call",
        humantime::format_duration(*.max)
    )]
    RequestSlow { max: Duration },
    /// The worker is shutting down.
    #[error("the worker is draining and takes no new work; retry on another one")]
    Draining,
    /// A message of a stream does not fit where it came.
    #[error("stream: {problem}")]
    StreamMisused { problem: &'static str },
    /// The id of a stream's item is too long to come back.
    #[error("id: it has {given} bytes, over the limit of {max}; it is cut here")]
    IdTooLong { given: usize, max: usize },
    /// A stream was ended before its client ended it.
    #[error("{cause}; {}", fate(*items_read, *items_answered))]
    StreamEnded {
        cause: StreamEnd,
        items_read: u64,
        /// Items whose answers were handed to the connection.
        items_answered: u64,
    },
}

impl RequestError {
    /// True if one image with this error ends its whole call: the trouble is
    /// the worker's or the clock's, so the other images would fare no better,
    /// and a client retries by the call's code.
    #[must_use]
    pub(super) fn ends_call(&self) -> bool {
        match self {
            Self::Stage(error) => error.ends_call(),
            Self::Draining
            | Self::StreamMisused { .. }
            | Self::StreamEnded { .. }
            | Self::PriorityUnknown { .. }
            | Self::OfImage { .. }
            | Self::Unauthenticated { .. }
            | Self::RequestSlow { .. } => true,
            Self::ImageMissing
            | Self::IdTooLong { .. }
            | Self::MessageTooLarge { .. }
            | Self::CallEmpty
            | Self::CallTooLarge { .. }
            | Self::ResponseTooLarge { .. }
            | Self::SamplesTooLarge { .. }
            | Self::OptionUnknown { .. }
            | Self::OptionInvalid { .. }
            | Self::TaskMissing { .. }
            | Self::LayersMissing { .. }
            | Self::StatesMissing
            | Self::HeadUnknown { .. }
            | Self::HeadContext { .. }
            | Self::ModelUnknown { .. }
            | Self::TensorInvalid { .. } => false,
        }
    }
}

/// An image that could not become tokens.
impl From<PreprocessError> for RequestError {
    fn from(error: PreprocessError) -> Self {
        StageError::from(error).into()
    }
}

/// Why a stream was ended before its client ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamEnd {
    /// The worker is shutting down.
    Draining,
    /// The connection is to be made anew, perhaps to another worker.
    ConnectionAge,
    /// The client neither sent nor took anything for long.
    Idle,
    /// The caller's deadline passed.
    Deadline,
}

impl std::fmt::Display for StreamEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Draining => "the worker is draining",
            Self::ConnectionAge => "the stream is as old as one may be (--max-connection-age)",
            Self::Idle => "nothing was sent or taken for --stream-idle-timeout",
            Self::Deadline => "the deadline passed",
        })
    }
}

/// What a client can rely on when it goes on elsewhere.
fn fate(items_read: u64, items_answered: u64) -> String {
    if items_read == items_answered {
        "every item that was read was answered; go on in another stream with the ids that have no \
         answer"
            .to_owned()
    } else {
        format!(
            "of {items_read} items that were read {items_answered} were answered; go on in another \
             stream with the ids that have no answer"
        )
    }
}
