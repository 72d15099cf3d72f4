//! The client's pool of workers (`client::pool`), with workers that misbehave.

use std::collections::{BTreeMap, VecDeque};
use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use imagegpt::client::ConnectConfig;
use imagegpt::client::pool::{PoolAnswer, PoolConfig, PoolTask, PoolWork, WorkerPool};
use imagegpt::proto::pb::embed_stream_request::Message;
use imagegpt::proto::pb::embed_stream_result::Outcome;
use imagegpt::proto::{GrpcCode, pb};
use tokio::sync::{Semaphore, mpsc};
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream};
use tonic::body::Body;
use tonic::server::{Grpc, NamedService, StreamingService};
use tonic::{Code, Request, Response, Status, Streaming};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::harness::PATIENCE;

const WINDOW: u32 = 8;
/// Image that ends a worker.
const POISON: &[u8] = b"poison";

/// Behavior of a worker with a stream.
#[derive(Debug, Clone, Copy)]
enum Manner {
    /// Answers each image, and ends at [`POISON`].
    Fine,
    /// Takes an image and ends the stream as full, with this time until a
    /// retry.
    Full(Duration),
    /// Serves another model.
    Other,
    /// Takes images and never answers.
    Hangs,
}

/// Worker with a single method; the generated trait would need all methods.
#[derive(Debug, Clone)]
struct Stub {
    /// Behavior of each stream; the last one is for all later streams too.
    manners: Arc<Mutex<VecDeque<Manner>>>,
    opened: Arc<Mutex<Vec<Instant>>>,
}

impl Stub {
    async fn start(manners: impl IntoIterator<Item = Manner>) -> (SocketAddr, Self) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await;
        let listener = listener.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let stub = Self {
            manners: Arc::new(Mutex::new(manners.into_iter().collect())),
            opened: Arc::default(),
        };
        let server = tonic::transport::Server::builder()
            .add_service(stub.clone())
            .serve_with_incoming(TcpListenerStream::new(listener));
        tokio::spawn(server);
        (addr, stub)
    }

    fn opened(&self) -> Vec<Instant> {
        self.opened.lock().expect("no panic").clone()
    }
}

impl NamedService for Stub {
    const NAME: &'static str = "imagegpt.v1.ImageGptService";
}

type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

impl tower::Service<http::Request<Body>> for Stub {
    type Response = http::Response<Body>;
    type Error = Infallible;
    type Future = BoxFuture<Result<Self::Response, Infallible>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        assert!(request.uri().path().ends_with("/EmbedStream"));
        let mut manners = self.manners.lock().expect("no panic");
        let manner = match manners.len() {
            1 => manners[0],
            _ => manners.pop_front().expect("a manner"),
        };
        drop(manners);
        self.opened.lock().expect("no panic").push(Instant::now());
        Box::pin(async move {
            let mut grpc = Grpc::new(tonic_prost::ProstCodec::default());
            Ok(grpc.streaming(One(manner), request).await)
        })
    }
}

/// Handler of one stream.
struct One(Manner);

type Answers = ReceiverStream<Result<pb::EmbedStreamResponse, Status>>;

impl StreamingService<pb::EmbedStreamRequest> for One {
    type Response = pb::EmbedStreamResponse;
    type ResponseStream = Answers;
    type Future = BoxFuture<Result<Response<Answers>, Status>>;

    fn call(&mut self, request: Request<Streaming<pb::EmbedStreamRequest>>) -> Self::Future {
        let (answers, outgoing) = mpsc::channel(64);
        tokio::spawn(serve(self.0, request.into_inner(), answers));
        Box::pin(async { Ok(Response::new(ReceiverStream::new(outgoing))) })
    }
}

async fn serve(
    manner: Manner,
    mut requests: Streaming<pb::EmbedStreamRequest>,
    answers: mpsc::Sender<Result<pb::EmbedStreamResponse, Status>>,
) {
    use pb::embed_stream_response::Message as Out;
    let send = async |message| {
        let message = Some(message);
        let _ = answers.send(Ok(pb::EmbedStreamResponse { message })).await;
    };
    while let Ok(Some(request)) = requests.message().await {
        let item = match request.message.expect("a message") {
            Message::Open(mut options) => {
                options.window = WINDOW;
                let model_digest = match manner {
                    Manner::Other => "other".to_owned(),
                    _ => "model".to_owned(),
                };
                let options = Some(options);
                send(Out::Opened(pb::EmbedStreamOpened {
                    model_digest,
                    options,
                }))
                .await;
                continue;
            }
            Message::Item(item) => item,
        };
        let source = item.image.and_then(|image| image.source);
        let Some(pb::image::Source::Encoded(bytes)) = source else {
            panic!("not a file");
        };
        let end = match manner {
            Manner::Hangs => continue,
            Manner::Full(rest) => {
                let details = ErrorDetails::with_retry_info(Some(rest));
                Status::with_error_details(Code::ResourceExhausted, "full", details)
            }
            Manner::Fine | Manner::Other if bytes == POISON => Status::unavailable("died of it"),
            Manner::Fine | Manner::Other => {
                let tensor = pb::Tensor {
                    data: bytes,
                    ..Default::default()
                };
                let outcome = Some(Outcome::Embedding(tensor));
                let id = item.id;
                send(Out::Result(pb::EmbedStreamResult { id, outcome })).await;
                continue;
            }
        };
        let _ = answers.send(Err(end)).await;
        return;
    }
}

/// Sends images to the workers and returns their answers by id; checks that
/// none is answered twice.
async fn answered(
    workers: &[SocketAddr],
    images: Vec<&'static [u8]>,
) -> BTreeMap<u64, Result<PoolAnswer, GrpcCode>> {
    let config = PoolConfig {
        endpoints: workers
            .iter()
            .map(|addr| format!("http://{addr}"))
            .collect(),
        connect: ConnectConfig::default(),
        window: 0,
        item_timeout: Duration::from_secs(1),
        resolve_interval: Duration::from_secs(1),
    };
    let job = PoolWork::Embed(pb::EmbedStreamOptions::default());
    let (feed, tasks) = mpsc::channel(images.len());
    let room = Arc::new(Semaphore::new(images.len()));
    let n_images = images.len();
    for (id, image) in (0..).zip(images) {
        let room = Arc::clone(&room).try_acquire_owned().expect("room");
        let task = PoolTask {
            id,
            image: image.into(),
            room,
            failures: 0,
            lost: 0,
        };
        feed.try_send(task).expect("room");
    }
    let started = WorkerPool::start(config, job, "model".to_owned(), tasks);
    let (pool, mut answers) = started.expect("a pool");
    let mut outcomes = BTreeMap::new();
    while outcomes.len() < n_images {
        let done = tokio::time::timeout(PATIENCE, answers.recv()).await;
        let done = done.expect("no answer").expect("no end");
        let outcome = done.outcome.map_err(|fault| fault.code);
        assert!(outcomes.insert(done.id, outcome).is_none(), "twice");
    }
    pool.finish().await;
    assert_eq!(room.available_permits(), n_images, "their memory is free");
    outcomes
}

fn embedding(bytes: &'static [u8]) -> PoolAnswer {
    PoolAnswer::Embedding(bytes.into())
}

#[tokio::test]
async fn a_full_worker_is_left_alone_for_as_long_as_it_says() {
    let rest = Duration::from_millis(700);
    let (addr, stub) = Stub::start([Manner::Full(rest), Manner::Fine]).await;
    let outcomes = answered(&[addr], vec![b"a", b"b"]).await;
    assert_eq!(outcomes[&0], Ok(embedding(b"a")));
    assert_eq!(outcomes[&1], Ok(embedding(b"b")));
    let opened = stub.opened();
    assert_eq!(opened.len(), 2);
    assert!(opened[1] - opened[0] >= rest);
}

#[tokio::test]
async fn an_image_that_ends_workers_is_found_and_takes_nobody_along() {
    let (one, _) = Stub::start([Manner::Fine]).await;
    let (other, _) = Stub::start([Manner::Fine]).await;
    let mut images: Vec<&[u8]> = vec![b"good"; 40];
    images[17] = POISON;
    let outcomes = answered(&[one, other], images).await;
    for (id, outcome) in outcomes {
        if id == 17 {
            assert_eq!(outcome, Err(GrpcCode::Aborted));
        } else {
            assert_eq!(outcome, Ok(embedding(b"good")));
        }
    }
}

#[tokio::test]
async fn workers_that_hang_or_serve_another_model_are_left_out() {
    let (hangs, _) = Stub::start([Manner::Hangs]).await;
    let (other, stub) = Stub::start([Manner::Other]).await;
    let (fine, _) = Stub::start([Manner::Fine]).await;
    let outcomes = answered(&[hangs, other, fine], vec![b"x"; 30]).await;
    assert!(
        outcomes
            .values()
            .all(|outcome| *outcome == Ok(embedding(b"x")))
    );
    assert_eq!(stub.opened().len(), 1, "it is not asked again for a while");
}
