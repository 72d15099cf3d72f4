//! A worker that gives wrong answers on purpose, to check that `imagegpt bench`
//! notices.

use std::net::SocketAddr;
use std::pin::Pin;

use imagegpt::engine::fake::FakeEngine;
use imagegpt::model::graph::Want;
use imagegpt::proto::pb;
use imagegpt::proto::pb::embed_result::Outcome;
use imagegpt::proto::pb::embed_stream_request::Message;
use imagegpt::proto::pb::embed_stream_result::Outcome as StreamOutcome;
use imagegpt::proto::pb::image_gpt_service_server::{ImageGptService, ImageGptServiceServer};
use tokio::sync::mpsc;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::{Code, Request, Response, Status, Streaming};

const POSITIONS: usize = 64;
const COLORS: u32 = 16;
const WINDOW: usize = 16;

/// Fault of the worker at every tenth item of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lie {
    None,
    /// An item is answered twice.
    Double,
    /// An item is never answered.
    Lose,
    /// An item gets the answer of another item.
    Swap,
}

struct Stub(Lie);

/// Starts the worker in the background, until the test's runtime ends.
pub(crate) async fn start(lie: Lie) -> SocketAddr {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
    let listener = listener.expect("a port");
    let addr = listener.local_addr().expect("an address");
    let server = tonic::transport::Server::builder()
        .add_service(ImageGptServiceServer::new(Stub(lie)))
        .serve_with_incoming(TcpListenerStream::new(listener));
    tokio::spawn(server);
    addr
}

/// Returns the fake engine's answer or an error.
fn answer(image: Option<pb::Image>) -> Result<pb::Tensor, tonic_types::Status> {
    let tokens = match image.and_then(|image| image.source) {
        Some(pb::image::Source::Tokens(tokens))
            if tokens.ids.len() == POSITIONS && tokens.ids.iter().all(|&id| id < COLORS) =>
        {
            tokens
        }
        _ => {
            return Err(tonic_types::Status {
                code: Code::InvalidArgument as i32,
                ..Default::default()
            });
        }
    };
    let ids = tokens.ids.into_iter().map(u16::try_from);
    let ids: Vec<u16> = ids.map(|id| id.expect("16 bits")).collect();
    let values = FakeEngine::answer(&ids, Want::Mean);
    let data: Vec<u8> = values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect();
    Ok(pb::Tensor {
        dtype: pb::DataType::F32.into(),
        shape: vec![u32::try_from(values.len()).expect("few")],
        data: data.into(),
    })
}

#[tonic::async_trait]
impl ImageGptService for Stub {
    async fn embed(
        &self,
        request: Request<pb::EmbedRequest>,
    ) -> Result<Response<pb::EmbedResponse>, Status> {
        let outcome = |image| match answer(Some(image)) {
            Ok(tensor) => Outcome::Embedding(tensor),
            Err(status) => Outcome::Error(status),
        };
        let images = request.into_inner().images.into_iter();
        let results = images.map(|image| pb::EmbedResult {
            outcome: Some(outcome(image)),
        });
        Ok(Response::new(pb::EmbedResponse {
            results: results.collect(),
            ..Default::default()
        }))
    }

    type EmbedStreamStream =
        Pin<Box<dyn tokio_stream::Stream<Item = Result<pb::EmbedStreamResponse, Status>> + Send>>;

    async fn embed_stream(
        &self,
        request: Request<Streaming<pb::EmbedStreamRequest>>,
    ) -> Result<Response<Self::EmbedStreamStream>, Status> {
        let (mut items, lie) = (request.into_inner(), self.0);
        // It reads on only as answers are taken.
        let (answers, outgoing) = mpsc::channel(WINDOW);
        tokio::spawn(async move {
            let mut n_items = 0_usize;
            let mut last = None;
            while let Ok(Some(request)) = items.message().await {
                let message = match request.message {
                    Some(Message::Item(item)) => {
                        n_items += 1;
                        let mut outcome = match answer(item.image) {
                            Ok(tensor) => StreamOutcome::Embedding(tensor),
                            Err(status) => StreamOutcome::Error(status),
                        };
                        let lies = n_items.is_multiple_of(10);
                        if lies && lie == Lie::Lose {
                            continue;
                        }
                        if lies && lie == Lie::Swap {
                            outcome = last.take().unwrap_or(outcome);
                        }
                        last = Some(outcome.clone());
                        let result = pb::EmbedStreamResult {
                            id: item.id,
                            outcome: Some(outcome),
                        };
                        if lies && lie == Lie::Double {
                            let _ = answers.send(Ok(response(result.clone()))).await;
                        }
                        response(result)
                    }
                    _ => pb::EmbedStreamResponse {
                        message: Some(pb::embed_stream_response::Message::Opened(
                            pb::EmbedStreamOpened::default(),
                        )),
                    },
                };
                if answers.send(Ok(message)).await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(outgoing))))
    }

    async fn classify(
        &self,
        _request: Request<pb::ClassifyRequest>,
    ) -> Result<Response<pb::ClassifyResponse>, Status> {
        Err(Status::unimplemented("a stub"))
    }

    async fn score(
        &self,
        _request: Request<pb::ScoreRequest>,
    ) -> Result<Response<pb::ScoreResponse>, Status> {
        Err(Status::unimplemented("a stub"))
    }

    type GenerateStream = tokio_stream::Empty<Result<pb::GenerateResponse, Status>>;

    async fn generate(
        &self,
        _request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        Err(Status::unimplemented("a stub"))
    }

    async fn tokenize(
        &self,
        _request: Request<pb::TokenizeRequest>,
    ) -> Result<Response<pb::TokenizeResponse>, Status> {
        Err(Status::unimplemented("a stub"))
    }

    async fn get_model(
        &self,
        _request: Request<pb::GetModelRequest>,
    ) -> Result<Response<pb::GetModelResponse>, Status> {
        Ok(Response::new(pb::GetModelResponse {
            positions: u32::try_from(POSITIONS).expect("few"),
            palette_rgb8: vec![0; COLORS as usize * 3].into(),
            execution_provider: "fake".to_owned(),
            limits: Some(pb::Limits {
                images_per_call_max: 16,
                images_in_flight_max: 1024,
                batch_size_max: 8,
                stream_window_max: u32::try_from(WINDOW).expect("few"),
                ..Default::default()
            }),
            ..Default::default()
        }))
    }
}

fn response(result: pb::EmbedStreamResult) -> pb::EmbedStreamResponse {
    pb::EmbedStreamResponse {
        message: Some(pb::embed_stream_response::Message::Result(result)),
    }
}
