//! Calls for `imagegpt bench` that cost the caller little and report failures
//! by code.
//!
//! Requests are bytes that were encoded before, so that the tool's own work
//! does not show as the worker's latency on a machine that both share.
//! Measuring is the part of `imagegpt bench`, not of this module.

use std::cmp::Ordering;
use std::time::Duration;

use anyhow::Context as _;
use bytes::{BufMut as _, Bytes};
use http::uri::PathAndQuery;
use prost::Message as _;
use serde::Serialize;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::client::Grpc;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder, Streaming};
use tonic::metadata::MetadataValue;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Code, ConnectError, Status};
use tonic_types::StatusExt as _;

use super::{ConnectConfig, RESPONSE_BYTES_MAX, Token};
use crate::proto::{GrpcCode, Priority, pb};

/// Items of a stream in the queue between its writer and its connection; the
/// worker's window is the bound of the stream.
const STREAM_QUEUE: usize = 16;

/// Failure of a call or of an image in its answer: a gRPC code, or a failure
/// that only the caller sees.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum CallCode {
    Grpc(GrpcCode),
    /// The call got no answer within the tool's own patience.
    ClientTimeout,
    /// No worker accepted a connection.
    NoWorker,
    /// An image of an answer has neither a result nor an error.
    NoOutcome,
}

impl CallCode {
    /// Returns the name of the code in reports.
    #[must_use]
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Grpc(code) => code.name(),
            Self::ClientTimeout => "CLIENT_TIMEOUT",
            Self::NoWorker => "NO_WORKER",
            Self::NoOutcome => "NO_OUTCOME",
        }
    }
}

/// Orders codes by their names, as reports list them.
impl Ord for CallCode {
    fn cmp(&self, other: &Self) -> Ordering {
        self.name().cmp(other.name())
    }
}

impl PartialOrd for CallCode {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl std::fmt::Display for CallCode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

impl Serialize for CallCode {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name())
    }
}

/// Method of the worker that is called.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    Embed,
    Classify,
    Tokenize,
}

impl Method {
    fn path(self) -> PathAndQuery {
        PathAndQuery::from_static(match self {
            Self::Embed => "/imagegpt.v1.ImageGptService/Embed",
            Self::Classify => "/imagegpt.v1.ImageGptService/Classify",
            Self::Tokenize => "/imagegpt.v1.ImageGptService/Tokenize",
        })
    }

    /// Decodes the outcome of each image from a response of this method.
    fn outcomes(self, body: Bytes) -> Result<Outcomes, prost::DecodeError> {
        fn failed(status: &tonic_types::Status) -> ImageOutcome {
            Err(CallCode::Grpc(status.code.into()))
        }
        Ok(match self {
            Self::Embed => {
                let outcome = |result: pb::EmbedResult| match result.outcome {
                    Some(pb::embed_result::Outcome::Embedding(tensor)) => Ok(tensor.data),
                    Some(pb::embed_result::Outcome::Error(status)) => failed(&status),
                    None => Err(CallCode::NoOutcome),
                };
                let results = pb::EmbedResponse::decode(body)?.results;
                results.into_iter().map(outcome).collect()
            }
            Self::Classify => {
                let outcome = |result: pb::ClassifyResult| match result.outcome {
                    Some(pb::classify_result::Outcome::Classification(_)) => Ok(Bytes::new()),
                    Some(pb::classify_result::Outcome::Error(status)) => failed(&status),
                    None => Err(CallCode::NoOutcome),
                };
                let results = pb::ClassifyResponse::decode(body)?.results;
                results.into_iter().map(outcome).collect()
            }
            Self::Tokenize => {
                let outcome = |result: pb::TokenizeResult| match result.outcome {
                    Some(pb::tokenize_result::Outcome::Tokens(_)) => Ok(Bytes::new()),
                    Some(pb::tokenize_result::Outcome::Error(status)) => failed(&status),
                    None => Err(CallCode::NoOutcome),
                };
                let results = pb::TokenizeResponse::decode(body)?.results;
                results.into_iter().map(outcome).collect()
            }
        })
    }
}

/// Options of a call, apart from its images.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CallOptions {
    pub method: Method,
    /// Priority class of the call; `None` sends no class, so that the worker's
    /// default applies.
    pub priority: Option<Priority>,
    /// Deadline, sent as `grpc-timeout`.
    pub deadline: Option<Duration>,
    /// Time after which the tool gives the call up by itself.
    pub patience: Duration,
}

/// Outcome of an image: the bytes of its embedding (empty for the other
/// methods), or the code of its error.
pub(crate) type ImageOutcome = Result<Bytes, CallCode>;
/// Outcomes of a call, one for each image.
pub(crate) type Outcomes = Vec<ImageOutcome>;

/// Reason for which a call or a stream ended without an answer.
#[derive(Debug, Clone)]
pub(crate) struct Refusal {
    pub code: CallCode,
    pub message: String,
    /// Delay that `google.rpc.RetryInfo` asks for, if the status carries one.
    pub retry_after: Option<Duration>,
}

impl Refusal {
    fn new(status: &Status) -> Self {
        let unconnected = unconnected(status);
        let code = match &unconnected {
            Some(_) => CallCode::NoWorker,
            None if never_left(status) => CallCode::Grpc(GrpcCode::Unavailable),
            None => CallCode::Grpc(status.code().into()),
        };
        Self {
            code,
            message: unconnected.unwrap_or_else(|| status.message().to_owned()),
            retry_after: status
                .get_details_retry_info()
                .and_then(|info| info.retry_delay),
        }
    }

    /// True if the worker rejected the call without a fault of its own or of
    /// the request: it is full, draining or not ready.
    #[must_use]
    pub(crate) fn is_reject(&self) -> bool {
        matches!(
            self.code,
            CallCode::Grpc(GrpcCode::ResourceExhausted | GrpcCode::Unavailable)
        )
    }

    /// True if a client with round-robin load balancing would try the next
    /// worker.
    #[must_use]
    pub(crate) fn is_elsewhere(&self) -> bool {
        matches!(
            self.code,
            CallCode::Grpc(GrpcCode::Unavailable) | CallCode::NoWorker
        )
    }

    /// True if the worker does not implement the method.
    #[must_use]
    pub(crate) fn is_unimplemented(&self) -> bool {
        self.code == CallCode::Grpc(GrpcCode::Unimplemented)
    }
}

impl std::fmt::Display for Refusal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}

/// Returns the reason for which no connection could be made, if that is what
/// ended the call. tonic reports it as UNAVAILABLE, which is also the code of a
/// draining worker.
fn unconnected(status: &Status) -> Option<String> {
    let mut source = std::error::Error::source(status);
    while let Some(error) = source {
        if error.is::<ConnectError>() {
            return Some(error.to_string());
        }
        source = error.source();
    }
    None
}

/// True if a call was dropped before it was sent, because its connection was
/// just closing, as happens to the clients of a draining worker. tonic reports
/// CANCELLED for it although nobody cancelled; gRPC's own clients retry such a
/// call. Only statuses that were made on this side have a source.
fn never_left(status: &Status) -> bool {
    status.code() == Code::Cancelled
        && std::error::Error::source(status).is_some()
        // Text of hyper's error for a request that was dropped before it was
        // processed; the type of the error is not accessible.
        && status.message() == "operation was canceled"
}

/// Connection to one worker.
#[derive(Debug, Clone)]
pub(crate) struct LoadConnection(Grpc<InterceptedService<Channel, Token>>);

impl LoadConnection {
    /// Connects to `url`, such as `http://127.0.0.1:50051`.
    ///
    /// `stream_window` bounds the bytes of answers per stream that the
    /// connection takes from the worker before they are read; `None` leaves the
    /// library's default.
    ///
    /// # Errors
    ///
    /// When the address is malformed, a file cannot be used, or nothing
    /// answers there.
    pub(crate) async fn connect(
        url: &str,
        config: &ConnectConfig,
        stream_window: Option<u32>,
    ) -> anyhow::Result<Self> {
        let token = config.token()?;
        let channel = config
            .endpoint(url)?
            .initial_stream_window_size(stream_window)
            .connect()
            .await
            .with_context(|| format!("no worker answers at {url}"))?;
        let service = InterceptedService::new(channel, token);
        let grpc = Grpc::new(service).max_decoding_message_size(RESPONSE_BYTES_MAX);
        Ok(Self(grpc))
    }

    /// Asks the worker which model it serves.
    ///
    /// # Errors
    ///
    /// The status with which the call failed.
    pub(crate) async fn model(&self) -> Result<pb::GetModelResponse, Refusal> {
        let path = PathAndQuery::from_static("/imagegpt.v1.ImageGptService/GetModel");
        let body = self.unary(tonic::Request::new(Bytes::new()), path).await;
        let body = body.map_err(|status| Refusal::new(&status))?;
        pb::GetModelResponse::decode(body).map_err(|error| malformed(&error))
    }

    /// Makes one call with a request that was encoded before.
    ///
    /// # Errors
    ///
    /// The failure that ended the call as a whole.
    pub(crate) async fn call(&self, manner: CallOptions, body: Bytes) -> Result<Outcomes, Refusal> {
        let mut request = tonic::Request::new(body);
        if let Some(deadline) = manner.deadline {
            request.set_timeout(deadline);
        }
        set_priority(&mut request, manner.priority);
        let call = self.unary(request, manner.method.path());
        match tokio::time::timeout(manner.patience, call).await {
            Ok(Ok(body)) => manner
                .method
                .outcomes(body)
                .map_err(|error| malformed(&error)),
            Ok(Err(status)) => Err(Refusal::new(&status)),
            Err(_) => Err(Refusal {
                code: CallCode::ClientTimeout,
                message: format!("no answer in {:?}", manner.patience),
                retry_after: None,
            }),
        }
    }

    async fn unary(
        &self,
        request: tonic::Request<Bytes>,
        path: PathAndQuery,
    ) -> Result<Bytes, Status> {
        let mut grpc = self.0.clone();
        grpc.ready()
            .await
            .map_err(|error| Status::from_error(Box::new(error)))?;
        Ok(grpc.unary(request, path, RawCodec).await?.into_inner())
    }

    /// Opens an EmbedStream with default options; `window` 0 asks for the
    /// largest window that the worker allows.
    ///
    /// # Errors
    ///
    /// The status that the worker sent instead of opening the stream.
    pub(crate) async fn stream(
        &self,
        priority: Option<Priority>,
        window: u32,
    ) -> Result<(StreamWriter, StreamReader), Refusal> {
        let (items, outgoing) = mpsc::channel(STREAM_QUEUE);
        let open = pb::EmbedStreamRequest {
            message: Some(pb::embed_stream_request::Message::Open(
                pb::EmbedStreamOptions {
                    window,
                    ..Default::default()
                },
            )),
        };
        // The queue is empty, so sending cannot wait.
        let _ = items.try_send(Bytes::from(open.encode_to_vec()));
        let mut request = tonic::Request::new(ReceiverStream::new(outgoing));
        set_priority(&mut request, priority);
        let mut grpc = self.0.clone();
        grpc.ready()
            .await
            .map_err(|error| Refusal::new(&Status::from_error(Box::new(error))))?;
        let path = PathAndQuery::from_static("/imagegpt.v1.ImageGptService/EmbedStream");
        let answers = grpc
            .streaming(request, path, RawCodec)
            .await
            .map_err(|status| Refusal::new(&status))?
            .into_inner();
        Ok((StreamWriter(items), StreamReader(answers)))
    }
}

fn set_priority<T>(request: &mut tonic::Request<T>, priority: Option<Priority>) {
    let value = match priority {
        None => return,
        Some(priority) => priority.label(),
    };
    let metadata = request.metadata_mut();
    metadata.insert("imagegpt-priority", MetadataValue::from_static(value));
}

fn malformed(error: &prost::DecodeError) -> Refusal {
    Refusal::new(&Status::internal(format!(
        "the answer is malformed: {error}"
    )))
}

/// Sending side of a stream. Dropping it ends the stream once its items are
/// answered.
#[derive(Debug, Clone)]
pub(crate) struct StreamWriter(mpsc::Sender<Bytes>);

impl StreamWriter {
    /// Sends one item, and waits while the worker takes no more. `image` is an
    /// encoded [`pb::Image`]. Returns `false` when the stream has ended.
    pub(crate) async fn send(&self, id: u64, image: &[u8]) -> bool {
        self.0.send(stream_item(id, image)).await.is_ok()
    }
}

/// Encodes an `EmbedStreamRequest` around an image that is already encoded.
fn stream_item(id: u64, image: &[u8]) -> Bytes {
    const ITEM: u32 = 2;
    const ITEM_ID: u32 = 1;
    const ITEM_IMAGE: u32 = 2;
    let mut item = Vec::with_capacity(image.len() + 32);
    put_field(ITEM_ID, id.to_string().as_bytes(), &mut item);
    put_field(ITEM_IMAGE, image, &mut item);
    let mut message = Vec::with_capacity(item.len() + 8);
    put_field(ITEM, &item, &mut message);
    message.into()
}

/// Appends a length-delimited field: bytes, text or a message.
pub(crate) fn put_field(number: u32, content: &[u8], to: &mut Vec<u8>) {
    prost::encoding::encode_key(number, prost::encoding::WireType::LengthDelimited, to);
    prost::encoding::encode_varint(content.len() as u64, to);
    to.extend_from_slice(content);
}

/// Event that a stream's reader returns.
#[derive(Debug)]
pub(crate) enum StreamEvent {
    /// Answer for an item, with the number that it was sent with; `None` if the
    /// worker sent an id that is no number.
    Answer(Option<u64>, ImageOutcome),
    /// End of the stream, with a refusal unless it ended in good order.
    End(Option<Refusal>),
}

/// Receiving side of a stream.
#[derive(Debug)]
pub(crate) struct StreamReader(Streaming<Bytes>);

impl StreamReader {
    /// Returns the next answer, or the end of the stream.
    pub(crate) async fn next(&mut self) -> StreamEvent {
        loop {
            let body = match self.0.message().await {
                Ok(Some(body)) => body,
                Ok(None) => return StreamEvent::End(None),
                Err(status) => return StreamEvent::End(Some(Refusal::new(&status))),
            };
            let message = match pb::EmbedStreamResponse::decode(body) {
                Ok(response) => response.message,
                Err(error) => return StreamEvent::End(Some(malformed(&error))),
            };
            let Some(pb::embed_stream_response::Message::Result(result)) = message else {
                continue;
            };
            let outcome = match result.outcome {
                Some(pb::embed_stream_result::Outcome::Embedding(tensor)) => Ok(tensor.data),
                Some(pb::embed_stream_result::Outcome::Error(status)) => {
                    Err(CallCode::Grpc(status.code.into()))
                }
                None => Err(CallCode::NoOutcome),
            };
            return StreamEvent::Answer(result.id.parse().ok(), outcome);
        }
    }
}

/// Codec that passes messages on as the bytes on the wire.
#[derive(Debug, Clone, Copy, Default)]
struct RawCodec;

impl Codec for RawCodec {
    type Encode = Bytes;
    type Decode = Bytes;
    type Encoder = Self;
    type Decoder = Self;

    fn encoder(&mut self) -> Self {
        Self
    }

    fn decoder(&mut self) -> Self {
        Self
    }
}

impl Encoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn encode(&mut self, item: Bytes, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        buffer.put(item);
        Ok(())
    }
}

impl Decoder for RawCodec {
    type Item = Bytes;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Bytes>, Status> {
        use bytes::Buf as _;
        Ok(Some(buffer.copy_to_bytes(buffer.remaining())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_item_is_what_the_contract_says() {
        let image = pb::Image {
            source: Some(pb::image::Source::Tokens(pb::Tokens {
                ids: (0..300).collect(),
            })),
        };
        let bytes = stream_item(1234, &image.encode_to_vec());
        let item = pb::EmbedStreamItem {
            id: "1234".to_owned(),
            image: Some(image),
        };
        let expected = pb::embed_stream_request::Message::Item(item);
        let got = pb::EmbedStreamRequest::decode(bytes).unwrap();
        assert_eq!(got.message, Some(expected));
    }
}
