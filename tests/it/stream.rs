//! EmbedStream: answers by their ids, flow control in both directions, and all
//! ways in which a stream ends.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use imagegpt::engine::fake::Script;
use imagegpt::proto::pb;
use imagegpt::proto::pb::embed_stream_request::Message as Sent;
use imagegpt::proto::pb::embed_stream_response::Message as Got;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Code, Request, Status, Streaming};
use tonic_types::StatusExt as _;

use crate::harness::{
    self, Client, embed, f32s, fake_answer, flat, gated, seeded, tokens, until_sample,
};

/// Options whose answers take a quarter of a megabyte, so that a few of them
/// fill HTTP/2's windows.
const LARGE: pb::EmbedStreamOptions = pb::EmbedStreamOptions {
    pooling: pb::Pooling::None as i32,
    preprocess: None,
    context: 0,
    normalize: false,
    dtype: 0,
    layers: Vec::new(),
    norm: 0,
    order: 0,
    window: 0,
};

pub(crate) struct Conversation {
    sender: mpsc::Sender<pb::EmbedStreamRequest>,
    answers: Streaming<pb::EmbedStreamResponse>,
    pub(crate) opened: pb::EmbedStreamOpened,
}

impl Conversation {
    pub(crate) async fn open(client: &Client, options: pb::EmbedStreamOptions) -> Self {
        Self::open_as(client, options, |_| {}).await
    }

    pub(crate) async fn open_as(
        client: &Client,
        options: pb::EmbedStreamOptions,
        change: impl FnOnce(&mut Request<ReceiverStream<pb::EmbedStreamRequest>>),
    ) -> Self {
        // Without room, so that a send that has returned was taken.
        let (sender, receiver) = mpsc::channel(1);
        let mut request = Request::new(ReceiverStream::new(receiver));
        change(&mut request);
        // Nothing was sent yet: the head of the response does not wait for it.
        let answers = client.clone().embed_stream(request).await.expect("a head");
        let mut conversation = Self {
            sender,
            answers: answers.into_inner(),
            opened: pb::EmbedStreamOpened::default(),
        };
        conversation.send(Sent::Open(options)).await;
        match conversation.message().await {
            Ok(Some(Got::Opened(opened))) => conversation.opened = opened,
            other => panic!("not opened: {other:?}"),
        }
        conversation
    }

    pub(crate) async fn send(&self, message: Sent) {
        let message = Some(message);
        self.sender
            .send(pb::EmbedStreamRequest { message })
            .await
            .expect("the worker reads");
    }

    pub(crate) async fn item(&self, id: &str, image: pb::Image) {
        self.send(item(id, image)).await;
    }

    async fn message(&mut self) -> Result<Option<Got>, Status> {
        let message = self.answers.message().await?;
        Ok(message.map(|message| message.message.expect("a message")))
    }

    /// Returns the next answer: its id, and the vector or the code of its
    /// error.
    pub(crate) async fn answer(&mut self) -> (String, Result<Vec<f32>, Code>) {
        let got = tokio::time::timeout(harness::PATIENCE, self.message());
        match got.await.expect("in time").expect("no end") {
            Some(Got::Result(result)) => (result.id.clone(), outcome(&result)),
            other => panic!("no result: {other:?}"),
        }
    }

    /// Returns the remaining answers, and the status of the end.
    pub(crate) async fn rest(&mut self) -> (Vec<(String, Result<Vec<f32>, Code>)>, Option<Status>) {
        let mut answers = Vec::new();
        loop {
            let got = tokio::time::timeout(harness::PATIENCE, self.message());
            match got.await.expect("in time") {
                Ok(Some(Got::Result(result))) => {
                    answers.push((result.id.clone(), outcome(&result)));
                }
                Ok(Some(Got::Opened(_))) => panic!("opened twice"),
                Ok(None) => return (answers, None),
                Err(status) => return (answers, Some(status)),
            }
        }
    }

    /// Ends the conversation, and returns the trailers of its answers.
    pub(crate) async fn trailers(&mut self) -> tonic::metadata::MetadataMap {
        self.half_close();
        let (answers, end) = self.rest().await;
        assert!(answers.is_empty() && end.is_none(), "{answers:?}: {end:?}");
        let trailers = self.answers.trailers().await.expect("no error");
        trailers.expect("trailers")
    }

    /// Closes the client's side.
    pub(crate) fn half_close(&mut self) {
        let (closed, _) = mpsc::channel(1);
        self.sender = closed;
    }

    /// Sends items 0, 1, … until the worker takes no more for a while, and
    /// returns the number that it took.
    async fn flood(&self, n_most: u32) -> u32 {
        for idx in 0..n_most {
            let message = item(&idx.to_string(), tokens(seeded(idx)));
            let request = pb::EmbedStreamRequest {
                message: Some(message),
            };
            let sent =
                tokio::time::timeout(Duration::from_millis(300), self.sender.send(request)).await;
            if sent.is_err() {
                return idx;
            }
        }
        n_most
    }
}

fn item(id: &str, image: pb::Image) -> Sent {
    Sent::Item(pb::EmbedStreamItem {
        id: id.to_owned(),
        image: Some(image),
    })
}

fn outcome(result: &pb::EmbedStreamResult) -> Result<Vec<f32>, Code> {
    match result.outcome.as_ref().expect("an outcome") {
        pb::embed_stream_result::Outcome::Embedding(tensor) => Ok(f32s(tensor)),
        pb::embed_stream_result::Outcome::Error(status) => Err(status.code.into()),
    }
}

pub(crate) fn reason(status: &Status) -> String {
    let info = status.get_details_error_info().expect("an ErrorInfo");
    info.reason
}

fn ended(code: Code, method: &str) -> String {
    let code = match code {
        Code::Ok => "OK",
        Code::Unavailable => "UNAVAILABLE",
        Code::DeadlineExceeded => "DEADLINE_EXCEEDED",
        Code::InvalidArgument => "INVALID_ARGUMENT",
        _ => "CANCELLED",
    };
    format!("imagegpt_requests_total{{method=\"{method}\",code=\"{code}\"}}")
}

#[tokio::test]
async fn each_item_is_answered_under_its_id_in_both_orders() {
    let script = Script {
        fail_on: Some(15),
        ..Default::default()
    };
    let running = harness::fake(script, &["--max-batch-size", "4"]).await;
    for order in [pb::Order::AsDone, pb::Order::AsSent] {
        let options = pb::EmbedStreamOptions {
            order: order.into(),
            window: 7,
            ..Default::default()
        };
        let mut conversation = Conversation::open(&running.client, options).await;
        let applied = conversation.opened.options.clone().expect("options");
        assert_eq!(applied.window, 7);
        assert_eq!(applied.order, i32::from(order));
        assert_eq!(applied.pooling, i32::from(pb::Pooling::Mean));
        assert!(conversation.opened.model_digest.starts_with("sha256:"));

        let n_items = 60;
        let long_id = "é".repeat(600);
        let mut expected = Vec::new();
        for idx in 0..n_items {
            let mut ids = seeded(idx);
            // The engine fails on images that begin with 15.
            ids[0] %= 15;
            let id = format!("item {idx}");
            expected.push(match idx % 10 {
                // A file that is none, no image at all, an id that is too long,
                // and a run that fails.
                3 => (
                    id,
                    harness::encoded(&b"no image"[..]),
                    Err(Code::InvalidArgument),
                ),
                5 => (id, pb::Image::default(), Err(Code::InvalidArgument)),
                7 => (long_id.clone(), tokens(ids), Err(Code::InvalidArgument)),
                9 => (id, flat(15), Err(Code::Internal)),
                // Ids need not differ.
                1 => (
                    "same".to_owned(),
                    tokens(ids.clone()),
                    Ok(fake_answer(&ids)),
                ),
                _ => (id, tokens(ids.clone()), Ok(fake_answer(&ids))),
            });
        }
        let sending = {
            let sender = conversation.sender.clone();
            let items: Vec<Sent> = expected
                .iter()
                .map(|(id, image, _)| item(id, image.clone()))
                .collect();
            tokio::spawn(async move {
                for message in items {
                    let message = Some(message);
                    let request = pb::EmbedStreamRequest { message };
                    sender.send(request).await.expect("the worker reads");
                }
            })
        };
        conversation.half_close();
        let (answers, end) = conversation.rest().await;
        sending.await.expect("no panic");
        assert!(end.is_none(), "{end:?}");
        let mut expected: Vec<_> = expected
            .into_iter()
            .map(|(id, _, outcome)| (id.chars().take(512).collect::<String>(), outcome))
            .collect();
        let mut answers = answers;
        if order == pb::Order::AsDone {
            let key = |answer: &(String, Result<Vec<f32>, Code>)| format!("{answer:?}");
            expected.sort_by_key(key);
            answers.sort_by_key(key);
        }
        assert_eq!(answers, expected);
    }
    until_sample(&running, &ended(Code::Ok, "EmbedStream"), |n| n == 2.0).await;
    until_sample(&running, "imagegpt_streams", |n| n == 0.0).await;
    let page = running.metrics().await;
    let count = |code| harness::sample(&page, &format!("imagegpt_images_total{{code=\"{code}\"}}"));
    assert_eq!(count("OK"), 72.0);
    assert_eq!(count("INVALID_ARGUMENT"), 36.0);
    assert_eq!(count("INTERNAL"), 12.0);
    running.end().await;
}

#[tokio::test]
async fn as_sent_holds_back_what_is_done_earlier() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let options = pb::EmbedStreamOptions {
        order: pb::Order::AsSent.into(),
        ..Default::default()
    };
    let mut conversation = Conversation::open(&running.client, options).await;
    conversation.item("slow", flat(1)).await;
    // Answered at once, but behind the other.
    conversation
        .item("bad", harness::encoded(&b"no image"[..]))
        .await;
    running.until_in_flight(1).await;
    let early = tokio::time::timeout(Duration::from_millis(100), conversation.answer()).await;
    assert!(early.is_err(), "{early:?}");
    open.send(()).expect("a run");
    assert_eq!(conversation.answer().await.0, "slow");
    assert_eq!(conversation.answer().await.0, "bad");
    conversation.half_close();
    assert!(conversation.rest().await.1.is_none());
    running.end().await;
}

#[tokio::test]
async fn no_more_than_the_window_is_read() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--stream-window-max", "8"]).await;
    let options = pb::EmbedStreamOptions {
        window: 1000,
        ..Default::default()
    };
    let mut conversation = Conversation::open(&running.client, options).await;
    let applied = conversation.opened.options.as_ref().expect("options");
    assert_eq!(applied.window, 8, "no more than the worker allows");
    // What HTTP/2 buffers hold is taken from the client too, but not read.
    let sending = conversation.sender.clone();
    let sending = tokio::spawn(async move {
        for idx in 0..200_u32 {
            let message = Some(item(&idx.to_string(), tokens(seeded(idx))));
            let request = pb::EmbedStreamRequest { message };
            sending.send(request).await.expect("the worker reads");
        }
    });
    conversation.half_close();
    running.until_in_flight(8).await;
    for _ in 0..50 {
        assert_eq!(running.worker.images_in_flight(), 8);
        harness::pause(Duration::from_millis(2)).await;
    }
    drop(open);
    let (answers, end) = conversation.rest().await;
    sending.await.expect("no panic");
    assert!(end.is_none(), "{end:?}");
    assert_eq!(answers.len(), 200);
    running.end().await;
}

/// A reader that stops holds only its own window and does not delay other
/// callers, and it gets all its answers when it reads on.
#[tokio::test(flavor = "multi_thread")]
async fn a_reader_that_stalls_holds_bounded_memory_and_harms_nobody() {
    // Vectors of all positions: 1 KiB an item of the micro model.
    let running = harness::fake(Script::default(), &["--stream-window-max", "16"]).await;
    let endpoint = running.url();
    // Little is taken by the connection itself.
    let channel = tonic::transport::Channel::from_shared(endpoint)
        .expect("a URL")
        .initial_stream_window_size(Some(1024))
        .initial_connection_window_size(Some(65_535))
        .connect()
        .await
        .expect("a connection");
    let mut conversation = Conversation::open(&Client::new(channel), LARGE).await;
    let n_items = 20_000;
    let n_taken = conversation.flood(n_items).await;
    assert!(n_taken < n_items, "the worker reads on");
    // Each item counts its tokens, its id and three times its answer.
    let item_bytes = 64 * 4 + 5 + 3 * 64 * 4 * 4;
    let held = running.sample("imagegpt_bytes_in_flight").await;
    assert!(held > 0.0 && held <= f64::from(16 * item_bytes), "{held}");
    assert_eq!(running.worker.images_in_flight(), 0, "all are answered");
    let mut client = running.client.clone();
    for seed in 0..50 {
        let started = Instant::now();
        let response = client.embed(embed(vec![tokens(seeded(seed))])).await;
        response.expect("another caller is served");
        assert!(started.elapsed() < Duration::from_secs(5));
    }
    // The item that waited on the client's side when the flood stopped is lost.
    let sent = n_taken;
    conversation.half_close();
    let (answers, end) = conversation.rest().await;
    assert!(end.is_none(), "{end:?}");
    let ids: BTreeMap<u32, usize> = answers.iter().fold(BTreeMap::new(), |mut ids, (id, _)| {
        *ids.entry(id.parse().expect("a number")).or_default() += 1;
        ids
    });
    assert_eq!(ids, (0..sent).map(|idx| (idx, 1)).collect());
    assert_eq!(running.sample("imagegpt_bytes_in_flight").await, 0.0);
    running.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_vanishes_frees_its_places_at_once() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    // By a reset of the stream.
    let conversation = Conversation::open(&running.client, pb::EmbedStreamOptions::default()).await;
    conversation.flood(20).await;
    running.until_in_flight(20).await;
    assert_eq!(running.sample("imagegpt_streams").await, 1.0);
    drop(conversation);
    running.until_in_flight(0).await;
    // By the loss of its connection, without a word.
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let endpoint = running.url();
    let conversation = runtime.spawn(async move {
        let client = Client::connect(endpoint).await.expect("a connection");
        let conversation = Conversation::open(&client, pb::EmbedStreamOptions::default()).await;
        conversation.flood(20).await;
        (client, conversation)
    });
    running.until_in_flight(20).await;
    runtime.shutdown_background();
    running.until_in_flight(0).await;
    drop(conversation);
    until_sample(&running, "imagegpt_streams", |n| n == 0.0).await;
    until_sample(&running, "imagegpt_bytes_in_flight", |n| n == 0.0).await;
    until_sample(&running, &ended(Code::Cancelled, "EmbedStream"), |n| {
        n == 2.0
    })
    .await;
    until_sample(&running, "imagegpt_images_total{code=\"CANCELLED\"}", |n| {
        n == 40.0
    })
    .await;
    drop(open);
    running.end().await;
}

#[tokio::test]
async fn the_deadline_ends_a_stream() {
    let (open, script) = gated();
    let running = harness::fake(script, &["--max-queue-delay", "0s"]).await;
    let started = Instant::now();
    let mut conversation = Conversation::open_as(
        &running.client,
        pb::EmbedStreamOptions::default(),
        |request| {
            // As a header, so that this client does not enforce it itself.
            request
                .metadata_mut()
                .insert("grpc-timeout", "500m".parse().expect("ascii"));
        },
    )
    .await;
    conversation.flood(5).await;
    running.until_in_flight(5).await;
    let (answers, end) = conversation.rest().await;
    let status = end.expect("an end");
    assert!(answers.is_empty());
    assert_eq!(status.code(), Code::DeadlineExceeded, "{status:?}");
    assert_eq!(reason(&status), "DEADLINE_EXCEEDED");
    assert!(started.elapsed() >= Duration::from_millis(450));
    running.until_in_flight(0).await;
    until_sample(
        &running,
        &ended(Code::DeadlineExceeded, "EmbedStream"),
        |n| n == 1.0,
    )
    .await;
    let late = "imagegpt_images_total{code=\"DEADLINE_EXCEEDED\"}";
    until_sample(&running, late, |n| n == 5.0).await;
    drop(open);
    running.end().await;
}

/// A stalled reader's stream ends in time and holds nothing, although its
/// connection never polls it.
#[tokio::test(flavor = "multi_thread")]
async fn a_deadline_and_idleness_free_what_a_stalled_reader_holds() {
    stall(&[]).await;
    // Two items are all that the stream may hold, so that the third waits for room.
    let few_bytes = ["--bytes-in-flight-max", "64KiB"];
    let small = [
        "--request-bytes-max",
        "4KiB",
        "--response-bytes-max",
        "8KiB",
    ];
    stall(&[few_bytes.as_slice(), &small].concat()).await;
}

async fn stall(flags: &[&str]) {
    let idle = ["--stream-idle-timeout", "400ms"];
    let running = harness::fake(Script::default(), &[&idle, flags].concat()).await;
    let endpoint = running.url();
    let channel = tonic::transport::Channel::from_shared(endpoint)
        .expect("a URL")
        .initial_stream_window_size(Some(1024))
        .connect()
        .await
        .expect("a connection");
    let client = Client::new(channel);
    for (timeout, code, why) in [
        (Some("300m"), Code::DeadlineExceeded, "DEADLINE_EXCEEDED"),
        (None, Code::Unavailable, "STREAM_IDLE"),
    ] {
        let mut conversation = Conversation::open_as(&client, LARGE, |request| {
            if let Some(timeout) = timeout {
                let timeout = timeout.parse().expect("ascii");
                request.metadata_mut().insert("grpc-timeout", timeout);
            }
        })
        .await;
        for idx in 0..40 {
            let _ = conversation.sender.try_send(pb::EmbedStreamRequest {
                message: Some(item(&idx.to_string(), flat(idx % 16))),
            });
            harness::pause(Duration::from_millis(1)).await;
        }
        assert!(running.sample("imagegpt_bytes_in_flight").await > 0.0);
        until_sample(&running, "imagegpt_bytes_in_flight", |n| n == 0.0).await;
        // The session lingers a moment for its end to be taken.
        until_sample(&running, "imagegpt_streams", |n| n == 0.0).await;
        let (answers, end) = conversation.rest().await;
        let status = end.expect("an end");
        assert_eq!((status.code(), reason(&status).as_str()), (code, why));
        assert!(status.message().contains("were answered"), "{status:?}");
        assert!(answers.len() < 40);
    }
    running.end().await;
}

#[tokio::test]
async fn what_concerns_all_items_ends_the_stream() {
    let running = harness::fake(Script::default(), &["--request-bytes-max", "4KiB"]).await;
    let check = async |messages: Vec<Option<Sent>>, code: Code, why: &str| {
        let requests = messages
            .into_iter()
            .map(|message| pb::EmbedStreamRequest { message });
        let requests: Vec<_> = requests.collect();
        let mut answers = running
            .client
            .clone()
            .embed_stream(tokio_stream::iter(requests))
            .await
            .expect("a head")
            .into_inner();
        let status = loop {
            match answers.message().await {
                Ok(Some(_)) => {}
                Ok(None) => panic!("{why}: it ended with OK"),
                Err(status) => break status,
            }
        };
        assert_eq!(status.code(), code, "{status:?}");
        assert_eq!(reason(&status), why, "{status:?}");
    };
    let open = || Some(Sent::Open(pb::EmbedStreamOptions::default()));
    let misused = "STREAM_MISUSED";
    check(vec![], Code::InvalidArgument, misused).await;
    check(
        vec![Some(item("a", flat(1)))],
        Code::InvalidArgument,
        misused,
    )
    .await;
    check(vec![open(), open()], Code::InvalidArgument, misused).await;
    check(vec![open(), None], Code::InvalidArgument, misused).await;
    let wrong = pb::EmbedStreamOptions {
        order: 9,
        ..Default::default()
    };
    check(
        vec![Some(Sent::Open(wrong))],
        Code::InvalidArgument,
        "OPTION_UNKNOWN",
    )
    .await;
    let large = item("large", harness::encoded(vec![0; 5000]));
    check(
        vec![open(), Some(large)],
        Code::ResourceExhausted,
        "MESSAGE_TOO_LARGE",
    )
    .await;
    running.end().await;
}

/// Bytes that are not a valid message end the stream, after the answers to the
/// messages before them.
#[tokio::test]
async fn bytes_that_are_no_message_end_the_stream() {
    use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};

    /// Encoder that sends bytes unchanged.
    #[derive(Default)]
    struct Raw;

    impl Encoder for Raw {
        type Item = Vec<u8>;
        type Error = Status;

        fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
            bytes::BufMut::put_slice(buffer, &item);
            Ok(())
        }
    }

    impl Decoder for Raw {
        type Item = usize;
        type Error = Status;

        fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<usize>, Status> {
            let n_bytes = bytes::Buf::remaining(buffer);
            bytes::Buf::advance(buffer, n_bytes);
            Ok(Some(n_bytes))
        }
    }

    impl Codec for Raw {
        type Encode = Vec<u8>;
        type Decode = usize;
        type Encoder = Self;
        type Decoder = Self;

        fn encoder(&mut self) -> Self {
            Self
        }

        fn decoder(&mut self) -> Self {
            Self
        }
    }

    let running = harness::fake(Script::default(), &[]).await;
    let endpoint = running.url();
    let channel = tonic::transport::Channel::from_shared(endpoint)
        .expect("a URL")
        .connect()
        .await
        .expect("a connection");
    let mut grpc = tonic::client::Grpc::new(channel);
    grpc.ready().await.expect("ready");
    let encode = |message| {
        let message = Some(message);
        prost::Message::encode_to_vec(&pb::EmbedStreamRequest { message })
    };
    let messages = vec![
        encode(Sent::Open(pb::EmbedStreamOptions::default())),
        encode(item("a", flat(1))),
        b"\xff\xff\xff".to_vec(),
        encode(item("b", flat(2))),
    ];
    let path = http::uri::PathAndQuery::from_static("/imagegpt.v1.ImageGptService/EmbedStream");
    let mut answers = grpc
        .streaming(Request::new(tokio_stream::iter(messages)), path, Raw)
        .await
        .expect("a head")
        .into_inner();
    assert!(answers.message().await.expect("opened").is_some());
    assert!(answers.message().await.expect("an answer").is_some());
    let status = answers.message().await.expect_err("the end");
    assert_eq!(status.code(), Code::InvalidArgument);
    assert_eq!(reason(&status), "REQUEST_MALFORMED");
    running.end().await;
}

#[tokio::test]
async fn a_stream_ends_at_its_age_and_when_nothing_happens() {
    let running = harness::fake(Script::default(), &["--max-connection-age", "1s"]).await;
    let mut conversation =
        Conversation::open(&running.client, pb::EmbedStreamOptions::default()).await;
    conversation.item("a", flat(1)).await;
    let (answers, end) = conversation.rest().await;
    let status = end.expect("an end");
    assert_eq!(answers.len(), 1);
    assert_eq!(status.code(), Code::Unavailable);
    assert_eq!(reason(&status), "CONNECTION_AGE");
    assert!(
        status
            .message()
            .contains("every item that was read was answered")
    );
    running.end().await;

    let running = harness::fake(Script::default(), &["--stream-idle-timeout", "300ms"]).await;
    let mut conversation =
        Conversation::open(&running.client, pb::EmbedStreamOptions::default()).await;
    // Life in it keeps it open.
    for _ in 0..6 {
        harness::pause(Duration::from_millis(100)).await;
        conversation.item("a", flat(1)).await;
        conversation.answer().await.1.expect("a vector");
    }
    let (_, end) = conversation.rest().await;
    assert_eq!(reason(&end.expect("an end")), "STREAM_IDLE");
    running.end().await;
}

/// Streams are bulk work by default, so that interactive calls find room and go
/// first.
#[tokio::test]
async fn a_stream_that_fills_the_worker_leaves_room_for_interactive_calls() {
    let (open, script) = gated();
    let flags = [
        "--images-in-flight-max",
        "16",
        "--images-per-call-max",
        "4",
        "--max-batch-size",
        "4",
        // One size: a run that waits for its gate is no measure of any other.
        "--batch-sizes",
        "4",
        "--max-queue-delay",
        "0s",
        // However long this machine takes.
        "--bulk-wait-max",
        "1min",
    ];
    let running = harness::fake(script, &flags).await;
    let mut conversation =
        Conversation::open(&running.client, pb::EmbedStreamOptions::default()).await;
    let sending = conversation.sender.clone();
    let sending = tokio::spawn(async move {
        for idx in 0..60_u32 {
            let message = Some(item(&idx.to_string(), tokens(seeded(idx))));
            let request = pb::EmbedStreamRequest { message };
            sending.send(request).await.expect("the worker reads");
        }
    });
    conversation.half_close();
    // A quarter is kept from it; the rest waits in the stream.
    running.until_in_flight(12).await;
    let mut client = running.client.clone();
    let call = tokio::spawn(async move { client.embed(embed(vec![flat(1); 4])).await });
    // Admitted is not yet in the queue, where identical images are one.
    let queued = "imagegpt_queue_depth{class=\"interactive\"}";
    until_sample(&running, queued, |n| n >= 1.0).await;
    // What runs now, and then the call.
    open.send(()).expect("a run");
    open.send(()).expect("a run");
    call.await
        .expect("no panic")
        .expect("room and the next run");
    drop(open);
    let (answers, end) = conversation.rest().await;
    sending.await.expect("no panic");
    assert!(end.is_none(), "{end:?}");
    assert_eq!(answers.len(), 60);
    running.end().await;
}

/// A drain neither loses nor doubles answers for a client that resumes with the
/// ids that have no answer.
#[tokio::test(flavor = "multi_thread")]
async fn a_client_goes_on_elsewhere_with_what_has_no_answer() {
    let script = || Script {
        delay: Duration::from_millis(2),
        ..Default::default()
    };
    let first = harness::fake(script(), &["--max-batch-size", "4"]).await;
    let second = harness::fake(script(), &["--max-batch-size", "4"]).await;
    let n_items = 400_u32;
    let mut answered: BTreeMap<u32, Vec<f32>> = BTreeMap::new();
    let record = |answers: Vec<(String, Result<Vec<f32>, Code>)>,
                  answered: &mut BTreeMap<u32, Vec<f32>>| {
        for (id, outcome) in answers {
            let idx = id.parse().expect("a number");
            let double = answered.insert(idx, outcome.expect("a vector"));
            assert!(double.is_none(), "{idx} was answered twice");
        }
    };

    let mut conversation =
        Conversation::open(&first.client, pb::EmbedStreamOptions::default()).await;
    let sender = conversation.sender.clone();
    let sending = tokio::spawn(async move {
        for idx in 0..n_items {
            let message = Some(item(&idx.to_string(), tokens(seeded(idx))));
            // The stream ends while the client still sends.
            if sender
                .send(pb::EmbedStreamRequest { message })
                .await
                .is_err()
            {
                return;
            }
        }
        std::future::pending::<()>().await;
    });
    let mut early = Vec::new();
    for _ in 0..50 {
        early.push(conversation.answer().await);
    }
    record(early, &mut answered);
    let shutdown = tokio::spawn(first.worker.shutdown(harness::PATIENCE));
    let (answers, end) = conversation.rest().await;
    record(answers, &mut answered);
    let status = end.expect("an end");
    assert_eq!(status.code(), Code::Unavailable);
    let info = status.get_details_error_info().expect("an ErrorInfo");
    assert_eq!(info.reason, "DRAINING");
    assert_eq!(info.metadata["items_read"], answered.len().to_string());
    assert_eq!(info.metadata["items_answered"], answered.len().to_string());
    assert!(answered.len() < n_items as usize, "it was cut");
    sending.abort();
    drop((conversation, first.client));
    let ended = shutdown.await.expect("no panic");
    assert_eq!(ended, imagegpt::serve::worker::WorkerEnded::Clean);

    let mut conversation =
        Conversation::open(&second.client, pb::EmbedStreamOptions::default()).await;
    let left: Vec<u32> = (0..n_items)
        .filter(|idx| !answered.contains_key(idx))
        .collect();
    let sender = conversation.sender.clone();
    conversation.half_close();
    tokio::spawn(async move {
        for idx in left {
            let message = Some(item(&idx.to_string(), tokens(seeded(idx))));
            let request = pb::EmbedStreamRequest { message };
            sender.send(request).await.expect("the worker reads");
        }
    });
    let (answers, end) = conversation.rest().await;
    assert!(end.is_none(), "{end:?}");
    record(answers, &mut answered);
    assert_eq!(answered.len(), n_items as usize);
    for (idx, vector) in answered {
        assert_eq!(vector, fake_answer(&seeded(idx)));
    }
    second.end().await;
}
