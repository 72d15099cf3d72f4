//! Table from errors to gRPC codes, the only one in the worker.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt};

use crate::imaging::PreprocessError;
use crate::proto::ERROR_DOMAIN;
use crate::serve::error::StageError;
use crate::serve::rpc::error::{RequestError, StreamEnd};

/// Returns the gRPC code and the machine-readable reason of an error.
fn row(error: &RequestError) -> (Code, &'static str) {
    match error {
        RequestError::Stage(error) => stage_row(error),
        RequestError::ImageMissing => (Code::InvalidArgument, "IMAGE_MISSING"),
        RequestError::CallEmpty => (Code::InvalidArgument, "CALL_EMPTY"),
        RequestError::CallTooLarge { .. } => (Code::InvalidArgument, "CALL_TOO_LARGE"),
        RequestError::ResponseTooLarge { .. } | RequestError::SamplesTooLarge { .. } => {
            (Code::InvalidArgument, "RESPONSE_TOO_LARGE")
        }
        RequestError::OptionUnknown { .. } => (Code::InvalidArgument, "OPTION_UNKNOWN"),
        RequestError::OptionInvalid { .. } => (Code::InvalidArgument, "OPTION_INVALID"),
        RequestError::TaskMissing { .. } => (Code::Unimplemented, "TASK_MISSING"),
        RequestError::LayersMissing { .. } => (Code::InvalidArgument, "LAYERS_MISSING"),
        RequestError::StatesMissing => (Code::InvalidArgument, "STATES_MISSING"),
        RequestError::HeadUnknown { .. } => (Code::NotFound, "HEAD_UNKNOWN"),
        RequestError::HeadContext { .. } => (Code::InvalidArgument, "HEAD_CONTEXT"),
        RequestError::HeadPreprocess { .. } => (Code::InvalidArgument, "HEAD_PREPROCESS"),
        RequestError::ModelUnknown { .. } => (Code::NotFound, "MODEL_UNKNOWN"),
        RequestError::MethodUnknown { .. } => (Code::Unimplemented, "METHOD_UNKNOWN"),
        RequestError::TensorInvalid { .. } => (Code::InvalidArgument, "TENSOR_INVALID"),
        RequestError::OfImage { cause, .. } => row(cause),
        RequestError::MessageTooLarge { .. } => (Code::ResourceExhausted, "MESSAGE_TOO_LARGE"),
        RequestError::PriorityUnknown { .. } => (Code::InvalidArgument, "PRIORITY_UNKNOWN"),
        RequestError::MetadataRepeated { .. } => (Code::InvalidArgument, "METADATA_REPEATED"),
        RequestError::Unauthenticated { .. } => (Code::Unauthenticated, "UNAUTHENTICATED"),
        RequestError::RequestSlow { .. } => (Code::DeadlineExceeded, "REQUEST_SLOW"),
        RequestError::RequestLate => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        RequestError::StreamMisused { .. } => (Code::InvalidArgument, "STREAM_MISUSED"),
        RequestError::IdTooLong { .. } => (Code::InvalidArgument, "ID_TOO_LONG"),
        RequestError::StreamEnded { cause, .. } => match cause {
            StreamEnd::Draining => (Code::Unavailable, "DRAINING"),
            StreamEnd::ConnectionAge => (Code::Unavailable, "CONNECTION_AGE"),
            StreamEnd::Idle => (Code::Unavailable, "STREAM_IDLE"),
            StreamEnd::Deadline => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        },
        RequestError::Draining => (Code::Unavailable, "DRAINING"),
    }
}

/// Returns the gRPC code and the machine-readable reason of a stage's error.
fn stage_row(error: &StageError) -> (Code, &'static str) {
    match error {
        StageError::Image(cause) => match &**cause {
            PreprocessError::Panicked { .. } => (Code::Internal, "DECODER_PANICKED"),
            _ => (Code::InvalidArgument, "IMAGE_INVALID"),
        },
        StageError::Full { .. } => (Code::ResourceExhausted, "WORKER_FULL"),
        StageError::OverShare { .. } => (Code::ResourceExhausted, "OVER_SHARE"),
        StageError::CallerLimit { .. } => (Code::ResourceExhausted, "CALLER_LIMIT"),
        StageError::NeverFits { .. } | StageError::CallerNeverFits { .. } => {
            (Code::InvalidArgument, "NEVER_FITS")
        }
        StageError::DeadlineExceeded { .. } => (Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        StageError::DeadlineTooShort { .. } => (Code::DeadlineExceeded, "DEADLINE_TOO_SHORT"),
        StageError::Cancelled { .. } => (Code::Cancelled, "CANCELLED"),
        StageError::NotReady => (Code::Unavailable, "NOT_READY"),
        StageError::Engine(_) => (Code::Internal, "INFERENCE_FAILED"),
        StageError::Lost => (Code::Internal, "REQUEST_LOST"),
    }
}

/// Returns the gRPC code of an error.
pub(super) fn code(error: &RequestError) -> Code {
    row(error).0
}

/// Returns the status of a call that ends with this error.
pub(super) fn of_call(error: &RequestError) -> Status {
    let (code, reason) = row(error);
    let mut details = ErrorDetails::with_error_info(reason, ERROR_DOMAIN, metadata(error));
    if let RequestError::Stage(
        StageError::Full { retry_after, .. }
        | StageError::OverShare { retry_after, .. }
        | StageError::CallerLimit { retry_after, .. },
    ) = error
    {
        details.set_retry_info(Some(*retry_after));
    }
    Status::with_error_details(code, error.to_string(), details)
}

/// Returns the status of a call that ends with a stage's error.
pub(super) fn of_stage(error: StageError) -> Status {
    of_call(&error.into())
}

/// Returns the metadata of the status for programs: the counts of a stream's
/// items.
fn metadata(error: &RequestError) -> HashMap<String, String> {
    match error {
        RequestError::StreamEnded {
            items_read,
            items_answered,
            ..
        } => HashMap::from([
            ("items_read".to_owned(), items_read.to_string()),
            ("items_answered".to_owned(), items_answered.to_string()),
        ]),
        _ => HashMap::new(),
    }
}

/// Returns true if a status is the library's own for a message over the limit:
/// OUT_OF_RANGE, where gRPC's own libraries use RESOURCE_EXHAUSTED; or, for a
/// compressed message, RESOURCE_EXHAUSTED with a text that does not say what to
/// change. The worker's handlers use neither.
pub(super) fn is_over_limit(code: Code, message: &[u8]) -> bool {
    match code {
        Code::OutOfRange => true,
        Code::ResourceExhausted => {
            // The text as it is, and percent-encoded as in a header.
            message.starts_with(b"Error decompressing")
                || message.starts_with(b"Error%20decompressing")
        }
        _ => false,
    }
}

/// Returns the status of one image.
pub(super) fn of_image(error: &RequestError) -> tonic_types::Status {
    tonic_types::Status {
        code: code(error) as i32,
        message: error.to_string(),
        details: Vec::new(),
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::excerpt::Excerpt;
    use crate::model::CallTask;
    use crate::proto::GrpcCode;
    use crate::runtime::error::EngineError;
    use crate::serve::error::RequestStage;
    use crate::serve::metrics::is_counted;

    #[test]
    #[expect(clippy::too_many_lines, reason = "a table, a row an error")]
    fn each_error_has_its_code_and_reason() {
        let stage = RequestStage::Queue;
        let ended = |cause| RequestError::StreamEnded {
            cause,
            items_read: 3,
            items_answered: 3,
        };
        let engine = || StageError::from(EngineError::Runtime("secret path".to_owned()));
        let rows: [(RequestError, Code, &str); 42] = [
            (
                PreprocessError::Empty.into(),
                Code::InvalidArgument,
                "IMAGE_INVALID",
            ),
            (
                RequestError::ImageMissing,
                Code::InvalidArgument,
                "IMAGE_MISSING",
            ),
            (RequestError::CallEmpty, Code::InvalidArgument, "CALL_EMPTY"),
            (
                RequestError::CallTooLarge { given: 2, max: 1 },
                Code::InvalidArgument,
                "CALL_TOO_LARGE",
            ),
            (
                RequestError::ResponseTooLarge { given: 2, max: 1 },
                Code::InvalidArgument,
                "RESPONSE_TOO_LARGE",
            ),
            (
                RequestError::SamplesTooLarge { given: 2, max: 1 },
                Code::InvalidArgument,
                "RESPONSE_TOO_LARGE",
            ),
            (
                RequestError::OptionUnknown {
                    field: "fit",
                    value: 9,
                },
                Code::InvalidArgument,
                "OPTION_UNKNOWN",
            ),
            (
                RequestError::OptionInvalid {
                    field: "top_p",
                    problem: "7 is not above 0 and at most 1".to_owned(),
                },
                Code::InvalidArgument,
                "OPTION_INVALID",
            ),
            (
                RequestError::TaskMissing {
                    task: CallTask::Embed,
                    file: "model.onnx",
                },
                Code::Unimplemented,
                "TASK_MISSING",
            ),
            (
                RequestError::LayersMissing {
                    given: vec![9],
                    served: "0 to 4".to_owned(),
                },
                Code::InvalidArgument,
                "LAYERS_MISSING",
            ),
            (
                RequestError::StatesMissing,
                Code::InvalidArgument,
                "STATES_MISSING",
            ),
            (
                RequestError::HeadUnknown {
                    given: Excerpt::of("a"),
                    known: "none".to_owned(),
                },
                Code::NotFound,
                "HEAD_UNKNOWN",
            ),
            (
                RequestError::HeadContext {
                    head: "a".to_owned(),
                    trained: "RAW",
                },
                Code::InvalidArgument,
                "HEAD_CONTEXT",
            ),
            (
                RequestError::HeadPreprocess {
                    field: "preprocess.alpha",
                    head: "a".to_owned(),
                    trained: "WHITE",
                },
                Code::InvalidArgument,
                "HEAD_PREPROCESS",
            ),
            (
                RequestError::ModelUnknown {
                    given: "a".to_owned(),
                    served: "b".to_owned(),
                },
                Code::NotFound,
                "MODEL_UNKNOWN",
            ),
            (
                RequestError::MethodUnknown {
                    given: Excerpt::of("/a.B/C"),
                    served: "a.B has D".to_owned(),
                },
                Code::Unimplemented,
                "METHOD_UNKNOWN",
            ),
            (
                RequestError::TensorInvalid {
                    tensor: "image".to_owned(),
                    problem: "two".to_owned(),
                },
                Code::InvalidArgument,
                "TENSOR_INVALID",
            ),
            (
                RequestError::OfImage {
                    index: 3,
                    cause: Box::new(engine().into()),
                },
                Code::Internal,
                "INFERENCE_FAILED",
            ),
            (
                RequestError::MessageTooLarge { max: 1 },
                Code::ResourceExhausted,
                "MESSAGE_TOO_LARGE",
            ),
            (
                RequestError::PriorityUnknown {
                    given: Excerpt::of("urgent"),
                },
                Code::InvalidArgument,
                "PRIORITY_UNKNOWN",
            ),
            (
                RequestError::MetadataRepeated {
                    name: http::header::AUTHORIZATION,
                },
                Code::InvalidArgument,
                "METADATA_REPEATED",
            ),
            (
                StageError::Full {
                    what: "images",
                    flag: "--images-in-flight-max",
                    retry_after: Duration::from_millis(1500),
                }
                .into(),
                Code::ResourceExhausted,
                "WORKER_FULL",
            ),
            (
                StageError::OverShare {
                    what: "images",
                    flag: "--images-in-flight-max",
                    retry_after: Duration::from_secs(1),
                }
                .into(),
                Code::ResourceExhausted,
                "OVER_SHARE",
            ),
            (
                StageError::CallerLimit {
                    caller: "a".into(),
                    limit: "rate=1/s".to_owned(),
                    retry_after: Duration::from_secs(1),
                }
                .into(),
                Code::ResourceExhausted,
                "CALLER_LIMIT",
            ),
            (
                StageError::CallerNeverFits {
                    caller: "a".into(),
                    given: 2,
                    max: 1,
                }
                .into(),
                Code::InvalidArgument,
                "NEVER_FITS",
            ),
            (
                StageError::NeverFits {
                    given: 2,
                    max: 1,
                    what: "images",
                    flag: "--images-in-flight-max",
                }
                .into(),
                Code::InvalidArgument,
                "NEVER_FITS",
            ),
            (
                StageError::DeadlineTooShort {
                    needed: Duration::from_millis(400),
                }
                .into(),
                Code::DeadlineExceeded,
                "DEADLINE_TOO_SHORT",
            ),
            (
                RequestError::Unauthenticated { problem: "a" },
                Code::Unauthenticated,
                "UNAUTHENTICATED",
            ),
            (
                RequestError::RequestSlow {
                    max: std::time::Duration::from_secs(1),
                },
                Code::DeadlineExceeded,
                "REQUEST_SLOW",
            ),
            (
                RequestError::RequestLate,
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
            ),
            (
                StageError::DeadlineExceeded { stage }.into(),
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
            ),
            (
                StageError::Cancelled { stage }.into(),
                Code::Cancelled,
                "CANCELLED",
            ),
            (
                RequestError::StreamMisused { problem: "twice" },
                Code::InvalidArgument,
                "STREAM_MISUSED",
            ),
            (
                RequestError::IdTooLong { given: 2, max: 1 },
                Code::InvalidArgument,
                "ID_TOO_LONG",
            ),
            (ended(StreamEnd::Draining), Code::Unavailable, "DRAINING"),
            (
                ended(StreamEnd::ConnectionAge),
                Code::Unavailable,
                "CONNECTION_AGE",
            ),
            (ended(StreamEnd::Idle), Code::Unavailable, "STREAM_IDLE"),
            (
                ended(StreamEnd::Deadline),
                Code::DeadlineExceeded,
                "DEADLINE_EXCEEDED",
            ),
            (RequestError::Draining, Code::Unavailable, "DRAINING"),
            (StageError::NotReady.into(), Code::Unavailable, "NOT_READY"),
            (engine().into(), Code::Internal, "INFERENCE_FAILED"),
            (StageError::Lost.into(), Code::Internal, "REQUEST_LOST"),
        ];
        let known = include_str!("../../../tests/outside/reasons.txt");
        let mut reasons: Vec<String> = rows
            .iter()
            .map(|(_, code, reason)| format!("{reason} {}", GrpcCode::from(*code)))
            .chain(["DECODER_PANICKED INTERNAL".to_owned()])
            .collect();
        reasons.sort_unstable();
        reasons.dedup();
        assert_eq!(
            reasons.join("\n"),
            known.trim_end(),
            "write it anew if that is meant"
        );
        for (error, code, reason) in rows {
            let status = of_call(&error);
            assert_eq!(status.code(), code, "{error:?}");
            let info = status.get_details_error_info().expect("an ErrorInfo");
            assert_eq!(
                (info.reason.as_str(), info.domain.as_str()),
                (reason, ERROR_DOMAIN)
            );
            assert_eq!(of_image(&error).code, code as i32);
            assert!(is_counted(code.into()), "{code:?} is counted");
        }
    }

    #[test]
    fn a_full_worker_says_when_to_come_back() {
        let full = StageError::Full {
            what: "images",
            flag: "--images-in-flight-max",
            retry_after: Duration::from_millis(1500),
        };
        let status = of_stage(full);
        let retry = status.get_details_retry_info().expect("a RetryInfo");
        assert_eq!(retry.retry_delay, Some(Duration::from_millis(1500)));
        assert!(status.message().ends_with("retry after 1s 500ms"));
        assert!(
            of_call(&RequestError::Draining)
                .get_details_retry_info()
                .is_none()
        );
    }

    #[test]
    fn a_stream_that_was_ended_says_how_far_it_came() {
        let ended = |items_answered| {
            of_call(&RequestError::StreamEnded {
                cause: StreamEnd::Draining,
                items_read: 7,
                items_answered,
            })
        };
        let info = ended(7).get_details_error_info().expect("an ErrorInfo");
        assert_eq!(info.metadata["items_read"], "7");
        assert_eq!(info.metadata["items_answered"], "7");
        assert!(
            ended(7)
                .message()
                .contains("every item that was read was answered")
        );
        assert!(
            ended(5)
                .message()
                .contains("of 7 items that were read, 5 were answered")
        );
    }

    #[test]
    fn a_decoder_panic_is_internal() {
        let error = RequestError::from(PreprocessError::Panicked {
            format: crate::imaging::ImageFormat::Png,
        });
        assert_eq!(row(&error), (Code::Internal, "DECODER_PANICKED"));
    }

    #[test]
    fn a_runtime_message_stays_in_the_log() {
        let error = StageError::from(EngineError::Runtime("/secret/path".to_owned()));
        assert!(!of_stage(error).message().contains("secret"));
    }
}
