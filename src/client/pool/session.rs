//! One worker's part of the work: a connection, one stream, and what to do when
//! either ends.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use backon::{BackoffBuilder as _, ExponentialBuilder};
use futures_util::stream::FuturesUnordered;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, timeout};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Status, Streaming};
use tonic_types::StatusExt as _;

use super::feed::{TakenTasks, is_guilty};
use super::{Address, ImageFault, PoolAnswer, PoolConfig, PoolOutcome, PoolTask, PoolWork, Shared};
use crate::client::{RESPONSE_BYTES_MAX, Token};
use crate::proto::pb::embed_stream_request::Message as Out;
use crate::proto::pb::embed_stream_response::Message as In;
use crate::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use crate::proto::{GrpcCode, pb};

/// Rests after failures that follow each other: the first is of 100 ms at most, and
/// they double up to 10 s, so that a worker that comes back waits no longer for
/// work. The jitter adds as much again as is written here; it spreads each rest over
/// half of itself, so that the clients of that worker do not all come at once.
const BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(50))
    .with_max_delay(Duration::from_secs(5))
    .with_jitter()
    .without_max_times();
/// Rest for a worker that serves something else, until it is rolled over.
const BACKOFF_OTHER: Duration = Duration::from_secs(30);
/// How long a `RetryInfo` is believed.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);
/// Time to connect, and to answer the first words.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Pings find out that a machine is gone though its connection is not closed.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// A single image may take this many times `item_timeout` while others are
/// answered.
const STRAGGLER_FACTOR: u32 = 10;
/// An image that failed this often with a code that may pass has failed.
const FAILURES_MAX: u32 = 4;
/// After the last answer, time for the worker to end the stream.
const FAREWELL: Duration = Duration::from_secs(1);
/// Images a call where there is no stream, and calls at once.
const CALL_IMAGES: usize = 16;
const CALLS: usize = 4;

type Client = ImageGptServiceClient<InterceptedService<Channel, Token>>;

/// Why a session's stream ended.
#[derive(Debug)]
pub(super) struct SessionEnd {
    pub(super) reason: String,
    /// Rest before the next try; `None` leaves it to the backoff.
    rest: Option<Duration>,
    /// The worker has said itself where to go on: this is no failure.
    orderly: bool,
}

impl SessionEnd {
    fn new(reason: impl Into<String>) -> Self {
        Self {
            reason: reason.into(),
            rest: None,
            orderly: false,
        }
    }

    fn status(status: &Status) -> Self {
        let details = status.get_error_details();
        let cause = details.error_info().map(|info| info.reason.as_str());
        Self {
            reason: format!("{}: {}", GrpcCode::from(status.code()), status.message()),
            rest: details
                .retry_info()
                .and_then(|info| info.retry_delay)
                .map(|delay| delay.min(RETRY_AFTER_MAX)),
            orderly: matches!(cause, Some("CONNECTION_AGE" | "DRAINING" | "STREAM_IDLE")),
        }
    }
}

/// How a session goes on.
enum End {
    /// Everything has been answered.
    Finished,
    Lost(SessionEnd),
}

/// Serves one address until it is gone or everything has been answered.
pub(super) async fn run(address: Address, shared: Arc<Shared>) -> Address {
    let mut backoff = BACKOFF.build();
    let mut finished = shared.finished.clone();
    loop {
        let mut answered = 0;
        let lost = match converse(&address, &shared, &mut answered).await {
            End::Finished => return address,
            End::Lost(lost) => lost,
        };
        if answered > 0 {
            backoff = BACKOFF.build();
        }
        let next = backoff.next();
        // The names may have changed with whatever happened.
        shared.look.notify_one();
        let rest = if lost.orderly {
            tracing::info!(endpoint = %address, reason = lost.reason, "a stream ended");
            BACKOFF.build().next()
        } else {
            tracing::warn!(endpoint = %address, reason = lost.reason, "left out for a while");
            shared.trouble(&address, lost.reason);
            // A rest that the worker asks for is had, and never less than one's own.
            next.max(lost.rest)
        };
        let rest = rest.unwrap_or_default();
        tokio::select! {
            () = tokio::time::sleep(rest) => {}
            () = end(&mut finished) => return address,
        }
        if !shared.addresses.borrow().contains(&address) {
            return address;
        }
    }
}

/// Resolves once everything has been answered.
async fn end(finished: &mut watch::Receiver<bool>) {
    let _ = finished.wait_for(|&finished| finished).await;
}

async fn connect(
    address: &Address,
    config: &PoolConfig,
    token: &Token,
) -> Result<Client, SessionEnd> {
    let endpoint = config
        .connect
        .endpoint(&address.url)
        .map_err(|error| SessionEnd::new(format!("{error:#}")))?
        .tcp_nodelay(true)
        .http2_keep_alive_interval(PING_INTERVAL)
        .keep_alive_timeout(PING_INTERVAL)
        .keep_alive_while_idle(true);
    // The URL keeps the name, which TLS checks; the socket has the address.
    let addr = address.addr;
    let connector = tower::service_fn(move |_: http::Uri| async move {
        let socket = TcpStream::connect(addr).await?;
        socket.set_nodelay(true)?;
        Ok::<_, std::io::Error>(TokioIo::new(socket))
    });
    let channel = timeout(HELLO_TIMEOUT, endpoint.connect_with_connector(connector))
        .await
        .map_err(|_| SessionEnd::new("it does not take connections"))?
        .map_err(|error| SessionEnd::new(format!("no connection: {}", chain(&error))))?;
    Ok(
        ImageGptServiceClient::with_interceptor(channel, token.clone())
            .max_decoding_message_size(RESPONSE_BYTES_MAX),
    )
}

/// An error with its causes: tonic's own text is only "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// What the worker at an address serves.
pub(super) async fn model(
    address: &Address,
    config: &PoolConfig,
    token: &Token,
) -> Result<pb::GetModelResponse, SessionEnd> {
    let mut client = connect(address, config, token).await?;
    let response = timeout(HELLO_TIMEOUT, client.get_model(pb::GetModelRequest {})).await;
    Ok(response
        .map_err(|_| SessionEnd::new("it does not say what it serves"))?
        .map_err(|status| SessionEnd::status(&status))?
        .into_inner())
}

async fn converse(address: &Address, shared: &Shared, answered: &mut u64) -> End {
    let client = match connect(address, &shared.config, &shared.token).await {
        Ok(client) => client,
        Err(lost) => return End::Lost(lost),
    };
    let mut outstanding = Outstanding::new(shared);
    let result = match &shared.job {
        PoolWork::Embed(options) => {
            stream(address, client, options, &mut outstanding, answered).await
        }
        PoolWork::Classify(_) | PoolWork::Score(_) => {
            calls(address, client, &shared.job, &mut outstanding, answered).await
        }
    };
    match result {
        Ok(()) => End::Finished,
        Err(lost) => {
            outstanding.lost(&lost).await;
            End::Lost(lost)
        }
    }
}

fn same_model(shared: &Shared, digest: &str) -> Result<(), SessionEnd> {
    if digest == shared.digest {
        return Ok(());
    }
    Err(SessionEnd {
        rest: Some(BACKOFF_OTHER),
        ..SessionEnd::new(format!(
            "it serves another model ({digest}) than the job began with ({})",
            shared.digest
        ))
    })
}

/// The images that the worker has. They go back however the stream ends, also
/// when the session is dropped in the middle of it.
struct Outstanding<'a> {
    shared: &'a Shared,
    tasks: HashMap<u64, (PoolTask, Instant)>,
    /// One of them must have no company.
    alone: bool,
}

impl<'a> Outstanding<'a> {
    fn new(shared: &'a Shared) -> Self {
        Self {
            shared,
            tasks: HashMap::new(),
            alone: false,
        }
    }

    fn insert(&mut self, task: PoolTask) {
        self.tasks.insert(task.id, (task, Instant::now()));
    }

    /// Images that may be added, of `window` in all.
    fn room(&self, window: usize) -> usize {
        if self.alone {
            0
        } else {
            window.saturating_sub(self.tasks.len())
        }
    }

    fn oldest(&self) -> Option<Instant> {
        self.tasks.values().map(|(_, since)| *since).min()
    }

    /// Passes an outcome on, or the image back if it may be better next time.
    async fn settle(
        &mut self,
        id: u64,
        outcome: Result<PoolAnswer, ImageFault>,
    ) -> Result<(), SessionEnd> {
        // An id that is not ours, or a second answer: neither is believed.
        let Some((mut task, _)) = self.tasks.remove(&id) else {
            return Err(SessionEnd::new("it answered an image that it did not have"));
        };
        self.alone = false;
        if let Err(fault) = &outcome
            && may_pass(fault.code)
            && task.failures + 1 < FAILURES_MAX
        {
            task.failures += 1;
            self.shared.feed.give_back(task);
            return Ok(());
        }
        self.finish(task, outcome).await
    }

    async fn finish(
        &self,
        task: PoolTask,
        outcome: Result<PoolAnswer, ImageFault>,
    ) -> Result<(), SessionEnd> {
        let done = PoolOutcome {
            id: task.id,
            outcome,
        };
        // Its memory is free before whoever collects has taken it.
        drop(task);
        // Nobody collects any more: the job is being given up.
        let sent = self.shared.done.send(done).await;
        sent.map_err(|_| SessionEnd::new("the job ends"))
    }

    /// The worker has ended, or is taken to have, with these images.
    async fn lost(&mut self, lost: &SessionEnd) {
        if lost.orderly {
            return;
        }
        let tasks: Vec<PoolTask> = self.tasks.drain().map(|(_, (task, _))| task).collect();
        for mut task in tasks {
            task.lost += 1;
            if is_guilty(&task) {
                let fault = ImageFault {
                    code: GrpcCode::Aborted,
                    message: format!(
                        "image: {} workers ended or hung while they had it, the last ones while \
                         they had nothing else",
                        task.lost
                    ),
                };
                let _ = self.finish(task, Err(fault)).await;
            } else {
                self.shared.feed.give_back(task);
            }
        }
    }
}

impl Drop for Outstanding<'_> {
    fn drop(&mut self) {
        for (_, (task, _)) in self.tasks.drain() {
            self.shared.feed.give_back(task);
        }
    }
}

/// Whether another try, perhaps elsewhere, may end otherwise. What is wrong with
/// the image itself does not change.
fn may_pass(code: GrpcCode) -> bool {
    !matches!(
        code,
        GrpcCode::InvalidArgument
            | GrpcCode::OutOfRange
            | GrpcCode::FailedPrecondition
            | GrpcCode::Unimplemented
            | GrpcCode::NotFound
    )
}

/// Embeds over one stream, until it ends.
async fn stream(
    address: &Address,
    mut client: Client,
    options: &pb::EmbedStreamOptions,
    outstanding: &mut Outstanding<'_>,
    answered: &mut u64,
) -> Result<(), SessionEnd> {
    let shared = outstanding.shared;
    let patience = shared.config.item_timeout;
    let (mut answers, out, window) = open(&mut client, options, shared).await?;
    shared.well(address);
    let mut out = Some(out);
    let mut finished = shared.finished.clone();
    let mut last_answer = Instant::now();
    // Looking a few times in its patience is exact enough, and costs nothing.
    let mut look = tokio::time::interval(patience / 4);
    loop {
        let has_room = outstanding.room(window) > 0;
        let is_idle = outstanding.tasks.is_empty();
        tokio::select! {
            message = answers.message() => {
                let message = match message {
                    Ok(Some(message)) => message.message,
                    Ok(None) if out.is_none() => return Ok(()),
                    Ok(None) => return Err(SessionEnd::new("it ended the stream")),
                    Err(status) => return Err(SessionEnd::status(&status)),
                };
                let Some(In::Result(result)) = message else { continue };
                let Ok(id) = result.id.parse() else {
                    return Err(SessionEnd::new("it answered under an id that was not sent"));
                };
                last_answer = Instant::now();
                *answered += 1;
                outstanding.settle(id, embedding(result.outcome)).await?;
            }
            TakenTasks { task, alone } = shared.feed.take(is_idle), if has_room && out.is_some() => {
                // A worker that had nothing to do has not been silent.
                if is_idle {
                    last_answer = Instant::now();
                }
                outstanding.alone = alone;
                let mut next = Some(task);
                while let Some(task) = next {
                    let message = item(&task);
                    outstanding.insert(task);
                    // It holds as many as may be outstanding, so it is not full.
                    let sent = out.as_ref().is_some_and(|out| out.try_send(message).is_ok());
                    if !sent {
                        // The status says why; it is what the answers end with.
                        out = None;
                        break;
                    }
                    let room = outstanding.room(window) > 0;
                    next = room.then(|| shared.feed.try_take()).flatten();
                }
            }
            () = end(&mut finished), if out.is_some() => {
                drop(out.take());
                let _ = timeout(FAREWELL, answers.message()).await;
                return Ok(());
            }
            _ = look.tick(), if !outstanding.tasks.is_empty() => {
                let oldest = outstanding.oldest().map_or(Duration::ZERO, |since| since.elapsed());
                if last_answer.elapsed() > patience || oldest > patience * STRAGGLER_FACTOR {
                    return Err(SessionEnd::new(format!(
                        "no answer in {} (--item-timeout); its {} images go elsewhere",
                        humantime::format_duration(Duration::from_secs(oldest.as_secs())),
                        outstanding.tasks.len()
                    )));
                }
            }
        }
    }
}

type Opened = (
    Streaming<pb::EmbedStreamResponse>,
    mpsc::Sender<pb::EmbedStreamRequest>,
    usize,
);

/// Opens a stream and checks what the worker makes of it.
async fn open(
    client: &mut Client,
    options: &pb::EmbedStreamOptions,
    shared: &Shared,
) -> Result<Opened, SessionEnd> {
    let (first, requests) = mpsc::channel(1);
    let options = pb::EmbedStreamOptions {
        window: shared.config.window,
        ..options.clone()
    };
    let opening = pb::EmbedStreamRequest {
        message: Some(Out::Open(options.clone())),
    };
    // The window is not known before the stream is open, so what goes out is one
    // queue for the opening and another, as large as the window, behind it.
    let (rest, later) = tokio::sync::oneshot::channel::<mpsc::Receiver<_>>();
    let _ = first.try_send(opening);
    drop(first);
    let later = futures_util::stream::once(async move {
        match later.await {
            Ok(items) => ReceiverStream::new(items),
            Err(_) => std::future::pending().await,
        }
    });
    let items = futures_util::StreamExt::flatten(later);
    let requests = futures_util::StreamExt::chain(ReceiverStream::new(requests), items);
    let hello = async {
        let mut answers = client.embed_stream(requests).await?.into_inner();
        let first = answers.message().await?;
        Ok::<_, Status>((answers, first))
    };
    let (answers, opened) = timeout(HELLO_TIMEOUT, hello)
        .await
        .map_err(|_| SessionEnd::new("it takes connections, but does not open a stream"))?
        .map_err(|status| SessionEnd::status(&status))?;
    let Some(In::Opened(opened)) = opened.and_then(|opened| opened.message) else {
        return Err(SessionEnd::new("its stream does not begin with an opening"));
    };
    same_model(shared, &opened.model_digest)?;
    let applied = opened.options.unwrap_or_default();
    let window = applied.window;
    let wanted = pb::EmbedStreamOptions {
        window,
        ..options.clone()
    };
    // Which layer is the last one only the worker knows.
    let wanted = pb::EmbedStreamOptions {
        layers: if wanted.layers.is_empty() {
            applied.layers.clone()
        } else {
            wanted.layers
        },
        ..wanted
    };
    if applied != wanted {
        return Err(SessionEnd {
            rest: Some(BACKOFF_OTHER),
            ..SessionEnd::new("it applies other options than the job's")
        });
    }
    let window = (window as usize).max(1);
    let (out, items) = mpsc::channel(window);
    let _ = rest.send(items);
    Ok((answers, out, window))
}

fn item(task: &PoolTask) -> pb::EmbedStreamRequest {
    pb::EmbedStreamRequest {
        message: Some(Out::Item(pb::EmbedStreamItem {
            id: task.id.to_string(),
            image: Some(image(task)),
        })),
    }
}

fn image(task: &PoolTask) -> pb::Image {
    pb::Image {
        source: Some(pb::image::Source::Encoded(task.image.clone())),
    }
}

fn fault(error: tonic_types::Status) -> ImageFault {
    ImageFault {
        code: error.code.into(),
        message: error.message,
    }
}

fn no_outcome() -> ImageFault {
    ImageFault {
        code: GrpcCode::Internal,
        message: "the worker sent no outcome".to_owned(),
    }
}

fn embedding(outcome: Option<pb::embed_stream_result::Outcome>) -> Result<PoolAnswer, ImageFault> {
    match outcome {
        Some(pb::embed_stream_result::Outcome::Embedding(tensor)) => {
            Ok(PoolAnswer::Embedding(tensor.data))
        }
        Some(pb::embed_stream_result::Outcome::Error(error)) => Err(fault(error)),
        None => Err(no_outcome()),
    }
}

fn classes(result: pb::ClassifyResult) -> Result<PoolAnswer, ImageFault> {
    match result.outcome {
        Some(pb::classify_result::Outcome::Classification(found)) => {
            Ok(PoolAnswer::Classes(found.classes))
        }
        Some(pb::classify_result::Outcome::Error(error)) => Err(fault(error)),
        None => Err(no_outcome()),
    }
}

fn score(result: pb::ScoreResult) -> Result<PoolAnswer, ImageFault> {
    match result.outcome {
        Some(pb::score_result::Outcome::Score(score)) => Ok(PoolAnswer::Score(score)),
        Some(pb::score_result::Outcome::Error(error)) => Err(fault(error)),
        None => Err(no_outcome()),
    }
}

/// Asks in calls of several images, a few calls at a time: what there is for
/// tasks that have no stream.
async fn calls(
    address: &Address,
    client: Client,
    job: &PoolWork,
    outstanding: &mut Outstanding<'_>,
    answered: &mut u64,
) -> Result<(), SessionEnd> {
    let shared = outstanding.shared;
    let mut finished = shared.finished.clone();
    let mut calls = FuturesUnordered::new();
    loop {
        let has_room = calls.len() < CALLS && !outstanding.alone;
        let is_idle = outstanding.tasks.is_empty();
        tokio::select! {
            Some((ids, response)) = calls.next(), if !calls.is_empty() => {
                let ids: Vec<u64> = ids;
                let response: Result<Response, SessionEnd> = response;
                let response = response?;
                same_model(shared, &response.model_digest)?;
                if response.outcomes.len() != ids.len() {
                    return Err(SessionEnd::new("it answered another number of images than it was sent"));
                }
                shared.well(address);
                for (id, outcome) in ids.into_iter().zip(response.outcomes) {
                    *answered += 1;
                    outstanding.settle(id, outcome).await?;
                }
            }
            TakenTasks { task, alone } = shared.feed.take(is_idle), if has_room => {
                outstanding.alone = alone;
                let (mut ids, mut images) = (Vec::new(), Vec::new());
                let mut next = Some(task);
                while let Some(task) = next {
                    ids.push(task.id);
                    images.push(image(&task));
                    outstanding.insert(task);
                    let room = outstanding.room(usize::MAX) > 0 && ids.len() < CALL_IMAGES;
                    next = room.then(|| shared.feed.try_take()).flatten();
                }
                let call = ask(client.clone(), job.clone(), images);
                calls.push(answer(call, ids, shared.config.item_timeout));
            }
            () = end(&mut finished) => return Ok(()),
        }
    }
}

/// What a call was answered.
struct Response {
    model_digest: String,
    /// One for each image, in the call's order.
    outcomes: Vec<Result<PoolAnswer, ImageFault>>,
}

/// One call of these images.
async fn ask(
    mut client: Client,
    job: PoolWork,
    images: Vec<pb::Image>,
) -> Result<Response, Status> {
    Ok(match job {
        PoolWork::Embed(_) => return Err(Status::internal("embeds have a stream")),
        PoolWork::Classify(request) => {
            let request = bulk(pb::ClassifyRequest { images, ..request });
            let response = client.classify(request).await?.into_inner();
            Response {
                model_digest: response.model_digest,
                outcomes: response.results.into_iter().map(classes).collect(),
            }
        }
        PoolWork::Score(request) => {
            let request = bulk(pb::ScoreRequest { images, ..request });
            let response = client.score(request).await?.into_inner();
            Response {
                model_digest: response.model_digest,
                outcomes: response.results.into_iter().map(score).collect(),
            }
        }
    })
}

/// A table is not made for somebody who waits for one picture.
fn bulk<T>(message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    let bulk = tonic::metadata::MetadataValue::from_static("bulk");
    request.metadata_mut().insert("imagegpt-priority", bulk);
    request
}

async fn answer(
    call: impl Future<Output = Result<Response, Status>>,
    ids: Vec<u64>,
    patience: Duration,
) -> (Vec<u64>, Result<Response, SessionEnd>) {
    let response = match timeout(patience, call).await {
        Ok(Ok(response)) => Ok(response),
        Ok(Err(status)) => Err(SessionEnd::status(&status)),
        Err(_) => Err(SessionEnd::new(format!(
            "no answer in {} (--item-timeout); its images go elsewhere",
            humantime::format_duration(patience)
        ))),
    };
    (ids, response)
}

#[cfg(test)]
mod tests;
