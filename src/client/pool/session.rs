//! Session of one worker: a connection, one stream, and what to do when either
//! ends.

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

/// Exponential backoff with jitter after failures in a row: the first rest is
/// at most 100 ms, and the rests double up to 10 s, so that a worker that comes
/// back waits no longer for work. The delays written here are half of those
/// bounds, since the jitter adds up to as much again. The jitter spreads each
/// rest over its upper half, so that the clients of one worker do not all
/// return at the same time.
const BACKOFF: ExponentialBuilder = ExponentialBuilder::new()
    .with_min_delay(Duration::from_millis(50))
    .with_max_delay(Duration::from_secs(5))
    .with_jitter()
    .without_max_times();
/// Rest for a worker that serves another model or applies other options, until
/// it is rolled over.
const BACKOFF_OTHER: Duration = Duration::from_secs(30);
/// Longest delay that is accepted from a worker's `RetryInfo`.
const RETRY_AFTER_MAX: Duration = Duration::from_mins(1);
/// Longest time to connect, and to get the first answer.
const HELLO_TIMEOUT: Duration = Duration::from_secs(10);
/// Interval of HTTP/2 pings, which detect a machine that has vanished without
/// closing the connection.
const PING_INTERVAL: Duration = Duration::from_secs(10);
/// Longest time for a single image while the worker answers others, in
/// multiples of `item_timeout`.
const STRAGGLER_FACTOR: u32 = 10;
/// Failures with a code that may pass after which an image counts as failed.
const FAILURES_MAX: u32 = 4;
/// Longest wait after the last answer for the worker to close the stream.
const FAREWELL: Duration = Duration::from_secs(1);
/// Images per call of a task that has no stream, and calls at the same time.
const CALL_IMAGES: usize = 16;
const CALLS: usize = 4;

type Client = ImageGptServiceClient<InterceptedService<Channel, Token>>;

/// Reason for which a session's stream ended.
#[derive(Debug)]
pub(super) struct SessionEnd {
    pub(super) reason: String,
    /// Rest before the next try, as the worker asks or the reason demands;
    /// `None` leaves it to the backoff.
    rest: Option<Duration>,
    /// True if the worker closed the stream as planned (connection age,
    /// draining, idle stream), which is no failure.
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

/// Outcome of one connection of a session.
enum End {
    /// Every image of the job has been answered.
    Finished,
    /// The connection or the stream ended before.
    Lost(SessionEnd),
}

/// Serves one address until the address has vanished or every image has been
/// answered.
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
        // The addresses of the host names may have changed with the failure.
        shared.look.notify_one();
        let rest = if lost.orderly {
            tracing::info!(endpoint = %address, reason = lost.reason, "a stream ended");
            BACKOFF.build().next()
        } else {
            tracing::warn!(
                endpoint = %address,
                reason = lost.reason,
                "a worker is left out for a while"
            );
            shared.trouble(&address, lost.reason);
            // The rest is at least the one that the worker asks for, and at
            // least the backoff's.
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

/// Resolves once every image has been answered.
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
    // The URL keeps the host name, which TLS checks; the socket uses the
    // address.
    let addr = address.addr;
    let connector = tower::service_fn(move |_: http::Uri| async move {
        let socket = TcpStream::connect(addr).await?;
        socket.set_nodelay(true)?;
        Ok::<_, std::io::Error>(TokioIo::new(socket))
    });
    let channel = timeout(HELLO_TIMEOUT, endpoint.connect_with_connector(connector))
        .await
        .map_err(|_| SessionEnd::new(no_hello("accept the connection")))?
        .map_err(|error| SessionEnd::new(format!("cannot connect: {}", chain(&error))))?;
    Ok(
        ImageGptServiceClient::with_interceptor(channel, token.clone())
            .max_decoding_message_size(RESPONSE_BYTES_MAX),
    )
}

/// Describes an error with its causes, since tonic's own text is only
/// "transport error".
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// Asks the worker at an address which model it serves.
pub(super) async fn model(
    address: &Address,
    config: &PoolConfig,
    token: &Token,
) -> Result<pb::GetModelResponse, SessionEnd> {
    let mut client = connect(address, config, token).await?;
    let response = timeout(HELLO_TIMEOUT, client.get_model(pb::GetModelRequest {})).await;
    Ok(response
        .map_err(|_| SessionEnd::new(no_hello("answer GetModel")))?
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
        PoolWork::Classify(_) | PoolWork::Score(_) | PoolWork::Tokenize(_) => {
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

/// Reason of a worker that has not done its first step within
/// [`HELLO_TIMEOUT`].
fn no_hello(step: &str) -> String {
    let limit = humantime::format_duration(HELLO_TIMEOUT);
    format!("the worker did not {step} within {limit}")
}

fn same_model(shared: &Shared, digest: &str) -> Result<(), SessionEnd> {
    if digest == shared.digest {
        return Ok(());
    }
    Err(SessionEnd {
        rest: Some(BACKOFF_OTHER),
        ..SessionEnd::new(format!(
            "the worker serves another model ({digest}) than the job began with ({})",
            shared.digest
        ))
    })
}

/// Images that the worker has and has not answered. They go back to the feed
/// however the stream ends, also when the session is dropped in the middle of
/// the stream.
struct Outstanding<'a> {
    shared: &'a Shared,
    tasks: HashMap<u64, (PoolTask, Instant)>,
    /// True if the worker has a suspect, which must be its only image.
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

    /// Returns the number of images that may be added, with at most `window` in
    /// all.
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

    /// Passes an outcome on, or gives the image back if another try may
    /// succeed.
    async fn settle(
        &mut self,
        id: u64,
        outcome: Result<PoolAnswer, ImageFault>,
    ) -> Result<(), SessionEnd> {
        // Neither an unknown id nor a second answer for an id is accepted.
        let Some((mut task, _)) = self.tasks.remove(&id) else {
            return Err(SessionEnd::new(
                "the worker answered an image that it did not have",
            ));
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
        // The image's memory is released before the collector has taken the
        // outcome.
        drop(task);
        // An error means that nobody collects any more: the job is being given
        // up.
        let sent = self.shared.done.send(done).await;
        sent.map_err(|_| SessionEnd::new("the job is ending"))
    }

    /// Counts these images as lost: the worker has ended with them, or is taken
    /// to have.
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
                        "image: {} workers ended or hung while they had this image, the last ones \
                         while they had no other",
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

/// True if another try, perhaps on another worker, may succeed. A fault of the
/// image itself does not change.
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

/// Embeds images over one stream until the stream ends.
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
    // A check every quarter of the patience is exact enough and cheap.
    let mut look = tokio::time::interval(patience / 4);
    loop {
        let has_room = outstanding.room(window) > 0;
        let is_idle = outstanding.tasks.is_empty();
        tokio::select! {
            message = answers.message() => {
                let message = match message {
                    Ok(Some(message)) => message.message,
                    Ok(None) if out.is_none() => return Ok(()),
                    Ok(None) => return Err(SessionEnd::new("the worker ended the stream")),
                    Err(status) => return Err(SessionEnd::status(&status)),
                };
                let Some(In::Result(result)) = message else { continue };
                let Ok(id) = result.id.parse() else {
                    return Err(SessionEnd::new(
                        "the worker answered under an id that it was not sent",
                    ));
                };
                last_answer = Instant::now();
                *answered += 1;
                outstanding.settle(id, embedding(result.outcome)).await?;
            }
            TakenTasks { task, alone } = shared.feed.take(is_idle), if has_room && out.is_some() => {
                // A worker that had no images has not been silent.
                if is_idle {
                    last_answer = Instant::now();
                }
                outstanding.alone = alone;
                let mut next = Some(task);
                while let Some(task) = next {
                    let message = item(&task);
                    outstanding.insert(task);
                    // The queue holds as many items as may be outstanding, so
                    // it is not full.
                    let sent = out.as_ref().is_some_and(|out| out.try_send(message).is_ok());
                    if !sent {
                        // The stream is closed; the status that the answers end
                        // with says why.
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
                        "no answer in {} for the oldest image (--item-timeout); the worker's {} \
                         images go to other workers",
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

/// Opens a stream, and checks that the worker applies the job's model and
/// options.
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
    // The window is unknown until the stream is open. So the outgoing messages
    // are one queue for the opening, followed by another queue as large as the
    // window.
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
        .map_err(|_| SessionEnd::new(no_hello("open a stream")))?
        .map_err(|status| SessionEnd::status(&status))?;
    let Some(In::Opened(opened)) = opened.and_then(|opened| opened.message) else {
        return Err(SessionEnd::new(
            "the worker's stream does not begin with an opening",
        ));
    };
    same_model(shared, &opened.model_digest)?;
    let applied = opened.options.unwrap_or_default();
    let window = applied.window;
    let wanted = pb::EmbedStreamOptions {
        window,
        ..options.clone()
    };
    // Only the worker knows which layer is the last one.
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
            ..SessionEnd::new("the worker applies other options than the job's")
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

fn tokens(result: pb::TokenizeResult) -> Result<PoolAnswer, ImageFault> {
    match result.outcome {
        Some(pb::tokenize_result::Outcome::Tokens(tokens)) => Ok(PoolAnswer::Tokens(tokens.ids)),
        Some(pb::tokenize_result::Outcome::Error(error)) => Err(fault(error)),
        None => Err(no_outcome()),
    }
}

/// Asks in calls of several images, a few calls at the same time, for tasks
/// that have no stream.
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
                    return Err(SessionEnd::new(format!(
                        "the worker sent {} results for {} images",
                        response.outcomes.len(),
                        ids.len()
                    )));
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

/// Response to a call of Classify, Score or Tokenize.
struct Response {
    model_digest: String,
    /// Outcome of each image, in the call's order.
    outcomes: Vec<Result<PoolAnswer, ImageFault>>,
}

/// Makes one call for these images.
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
        PoolWork::Tokenize(request) => {
            let request = bulk(pb::TokenizeRequest { images, ..request });
            let response = client.tokenize(request).await?.into_inner();
            Response {
                model_digest: response.model_digest,
                outcomes: response.results.into_iter().map(tokens).collect(),
            }
        }
    })
}

/// Marks a request as bulk work, since nobody waits for a single image of a
/// table.
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
            "no answer in {} (--item-timeout); the call's images go to other workers",
            humantime::format_duration(patience)
        ))),
    };
    (ids, response)
}

#[cfg(test)]
mod tests;
