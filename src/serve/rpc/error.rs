//! Errors of calls and of their images: the errors of the stages, and those of
//! the gRPC surface itself.

use std::time::Duration;

use crate::excerpt::Excerpt;
use crate::imaging::PreprocessError;
use crate::model::CallTask;
use crate::serve::error::StageError;

/// Largest number of layers of a caller's list that an error repeats.
const LAYERS_SHOWN: usize = 64;

/// Reason for which a call, or one image of a call, has no answer.
#[derive(Debug, Clone, thiserror::Error)]
pub(super) enum RequestError {
    /// A stage failed.
    #[error(transparent)]
    Stage(#[from] StageError),
    /// An image of the call has none of the three forms set.
    #[error("image: none of encoded, rgb8 and tokens is set; set exactly one")]
    ImageMissing,
    /// The call has no image at all.
    #[error("images: the call has no image; send at least one")]
    CallEmpty,
    /// The call has more images than one call may have.
    #[error(
        "images: the call has {given} images; the limit is {max} (--images-per-call-max); split \
         the call"
    )]
    CallTooLarge { given: usize, max: usize },
    /// The answer would be larger than one response may be.
    #[error(
        "images: the answer would take {given} bytes; the limit is {max} (--response-bytes-max); \
         send fewer images per call, or use pooling"
    )]
    ResponseTooLarge { given: u64, max: u64 },
    /// The samples of a call could be larger than one response may be.
    #[error(
        "samples: the answer may take {given} bytes; the limit is {max} (--response-bytes-max); \
         ask for fewer samples per call, or for a lower scale"
    )]
    SamplesTooLarge { given: u64, max: u64 },
    /// An option has a value that the contract does not define.
    #[error("{field}: {value} is not a value of this enum")]
    OptionUnknown { field: &'static str, value: i32 },
    /// An option has an invalid value.
    #[error("{field}: {problem}")]
    OptionInvalid {
        field: &'static str,
        problem: String,
    },
    /// The loaded model has no graph for the task.
    #[error("the loaded model cannot {task}: it has no {file}")]
    TaskMissing { task: CallTask, file: &'static str },
    /// Embed was asked for layers whose pooled features the model does not
    /// have.
    #[error(
        "layers: {:?} with this norm and pooling are not served; the model serves {served}, in \
         ascending order and in one run",
        &given[..given.len().min(LAYERS_SHOWN)]
    )]
    LayersMissing { given: Vec<u32>, served: String },
    /// The pooling needs the states of all positions, which the model does not
    /// have.
    #[error(
        "pooling: the model has only pooled features; to get the states of the last layer, \
         compile the model with the task hidden"
    )]
    StatesMissing,
    /// No linear head with the given name is loaded.
    #[error("head: {given:?} is not loaded; the worker has {known}")]
    HeadUnknown { given: Excerpt, known: String },
    /// The linear head was trained with another context than the call's.
    #[error("context: the head {head} was trained with {trained}; leave context unset")]
    HeadContext { head: String, trained: &'static str },
    /// The linear head was trained with other options of preprocessing than the
    /// call's.
    #[error("{field}: the head {head} was trained with {trained}; leave {field} unset")]
    HeadPreprocess {
        field: &'static str,
        head: String,
        trained: &'static str,
    },
    /// The call names a model or a version that is not served.
    #[error("model: {given:?} is not found; the worker serves {served:?}, version 1")]
    ModelUnknown { given: String, served: String },
    /// The call names a method or a service that the worker does not have.
    #[error("method: {given:?} is not served; {served}")]
    MethodUnknown { given: Excerpt, served: String },
    /// A tensor of the request does not fit the model's inputs or outputs.
    #[error("{tensor}: {problem}")]
    TensorInvalid { tensor: String, problem: String },
    /// One image failed, and its call needs the answers of all images.
    #[error("image {index}: {cause}")]
    OfImage {
        index: usize,
        cause: Box<RequestError>,
    },
    /// The metadata names an unknown priority class.
    #[error("imagegpt-priority: {given:?} is not a class; use \"interactive\" or \"bulk\"")]
    PriorityUnknown { given: Excerpt },
    /// The metadata has several values of something that can have one.
    #[error("{name}: the call has it with several values; send one")]
    MetadataRepeated { name: http::HeaderName },
    /// The request message is larger than the limit.
    #[error(
        "request: the message is too large; the limit is {max} bytes (--request-bytes-max); send \
         fewer or smaller images per call"
    )]
    MessageTooLarge { max: u64 },
    /// The call has no bearer token, or one that is not accepted.
    #[error("authorization: {problem}")]
    Unauthenticated { problem: &'static str },
    /// The request took too long to arrive.
    #[error(
        "request: the request did not arrive within {} (--request-timeout); send fewer or smaller \
         images per call",
        humantime::format_duration(*.max)
    )]
    RequestSlow { max: Duration },
    /// The call's deadline passed while its request was arriving.
    #[error(
        "request: the deadline passed while the request arrived; allow more time, or send fewer \
         or smaller images per call"
    )]
    RequestLate,
    /// The worker is shutting down.
    #[error("the worker is draining and takes no new work; retry on another worker")]
    Draining,
    /// A message of a stream is not allowed at its place in the stream.
    #[error("stream: {problem}")]
    StreamMisused { problem: &'static str },
    /// The id of a stream's item is too long; the answer has a shortened id.
    #[error("id: the id has {given} bytes; the limit is {max}; this answer has the shortened id")]
    IdTooLong { given: usize, max: usize },
    /// A stream was ended before its client ended it.
    #[error("{cause}; {}", fate(*items_read, *items_answered))]
    StreamEnded {
        cause: StreamEnd,
        items_read: u64,
        /// Number of items whose answers were passed to the connection.
        items_answered: u64,
    },
}

impl RequestError {
    /// Returns true if an image with this error ends its whole call: the cause
    /// is the worker or the clock, so the other images would fare no better,
    /// and a client retries by the call's code.
    #[must_use]
    pub(super) fn ends_call(&self) -> bool {
        match self {
            Self::Stage(error) => error.ends_call(),
            Self::Draining
            | Self::StreamMisused { .. }
            | Self::StreamEnded { .. }
            | Self::PriorityUnknown { .. }
            | Self::MetadataRepeated { .. }
            | Self::OfImage { .. }
            | Self::Unauthenticated { .. }
            | Self::RequestSlow { .. }
            | Self::RequestLate => true,
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
            | Self::HeadPreprocess { .. }
            | Self::ModelUnknown { .. }
            | Self::MethodUnknown { .. }
            | Self::TensorInvalid { .. } => false,
        }
    }
}

/// Converts the error of an image that could not be turned into tokens.
impl From<PreprocessError> for RequestError {
    fn from(error: PreprocessError) -> Self {
        StageError::from(error).into()
    }
}

/// Reason for which a stream was ended before its client ended it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum StreamEnd {
    /// The worker is shutting down.
    Draining,
    /// The connection has reached its largest age; the client should open a new
    /// one, perhaps to another worker.
    ConnectionAge,
    /// The client neither sent items nor read answers for too long.
    Idle,
    /// The caller's deadline passed.
    Deadline,
}

impl std::fmt::Display for StreamEnd {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Draining => "the worker is draining",
            Self::ConnectionAge => {
                "the connection has reached its age limit (--max-connection-age)"
            }
            Self::Idle => "the client neither sent nor read anything for --stream-idle-timeout",
            Self::Deadline => "the deadline passed",
        })
    }
}

/// Describes which items were answered, for a client that continues in another
/// stream.
fn fate(items_read: u64, items_answered: u64) -> String {
    if items_read == items_answered {
        "every item that was read was answered; continue in another stream with the ids that have \
         no answer"
            .to_owned()
    } else {
        format!(
            "of {items_read} items that were read, {items_answered} were answered; continue in \
             another stream with the ids that have no answer"
        )
    }
}
