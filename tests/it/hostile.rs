//! Hostile clients that send and read in frames of their own: the memory that
//! they make the worker hold is counted, bounded, and freed in time.

use std::io::Write as _;
use std::time::{Duration, Instant};

use bytes::Bytes;
use h2::client::{ResponseFuture, SendRequest};
use h2::{Reason, SendStream};
use imagegpt::engine::fake::{FakeSequences, Script};
use imagegpt::proto::pb;
use imagegpt::serve::worker::{Worker, WorkerEnded};
use prost::Message as _;
use tonic::Code;

use crate::harness::{self, embed, flat, gated, seeded, until, until_sample};

/// Metadata of a call.
type Headers<'a> = &'a [(&'a str, &'a str)];

const EMBED: &str = "/imagegpt.v1.ImageGptService/Embed";
const EMBED_STREAM: &str = "/imagegpt.v1.ImageGptService/EmbedStream";
const GENERATE: &str = "/imagegpt.v1.ImageGptService/Generate";
const MODEL_STREAM_INFER: &str = "/inference.GRPCInferenceService/ModelStreamInfer";
const BYTES: &str = "imagegpt_bytes_in_flight";
const KIB: usize = 1 << 10;
/// Flags of a worker that a few calls fill.
const SMALL: [&str; 6] = [
    "--request-bytes-max",
    "1MiB",
    "--response-bytes-max",
    "64KiB",
    "--bytes-in-flight-max",
    "4MiB",
];

/// Opens a connection whose client has a flow-control window of `window` bytes
/// per answer.
async fn connect(worker: &Worker, window: u32) -> SendRequest<Bytes> {
    let stream = tokio::net::TcpStream::connect(worker.grpc_addr)
        .await
        .expect("a connection");
    let (client, connection) = h2::client::Builder::new()
        .initial_window_size(window)
        .handshake::<_, Bytes>(stream)
        .await
        .expect("HTTP/2");
    tokio::spawn(connection);
    client
}

struct Call {
    response: ResponseFuture,
    request: SendStream<Bytes>,
}

fn call(client: &SendRequest<Bytes>, path: &str, headers: &[(&str, &str)]) -> Call {
    let mut request = http::Request::post(format!("http://worker{path}"))
        .header("content-type", "application/grpc")
        .header("te", "trailers");
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let request = request.body(()).expect("a request");
    let (response, request) = client.clone().send_request(request, false).expect("a call");
    Call { response, request }
}

impl Call {
    fn send(&mut self, data: impl Into<Bytes>, is_last: bool) {
        // A worker may refuse a request before it has all of it; its answer shows.
        let _ = self.request.send_data(data.into(), is_last);
    }

    /// Returns the call's status code, from its headers or trailers, and its
    /// message.
    async fn end(self) -> (Code, String) {
        let answer = async {
            let response = self.response.await.expect("a response");
            if let Some(status) = tonic::Status::from_header_map(response.headers()) {
                return (status.code(), status.message().to_owned());
            }
            let mut body = response.into_body();
            while let Some(data) = body.data().await {
                let data = data.expect("data");
                let _ = body.flow_control().release_capacity(data.len());
            }
            let trailers = body.trailers().await.expect("trailers").expect("some");
            let status = tonic::Status::from_header_map(&trailers).expect("a status");
            (status.code(), status.message().to_owned())
        };
        tokio::time::timeout(harness::PATIENCE, answer)
            .await
            .expect("an end")
    }

    /// Waits until the stream is reset, and returns the reason.
    async fn reset(self) -> Option<Reason> {
        let reset = async {
            match self.response.await {
                Err(error) => error.reason(),
                Ok(response) => match response.into_body().data().await {
                    Some(Err(error)) => error.reason(),
                    _ => None,
                },
            }
        };
        tokio::time::timeout(harness::PATIENCE, reset)
            .await
            .expect("a reset")
    }
}

fn frame(flag: u8, message: &[u8]) -> Vec<u8> {
    let len = u32::try_from(message.len()).expect("small");
    [&[flag][..], &len.to_be_bytes(), message].concat()
}

/// Function that compresses a message.
type Compress = fn(&[u8]) -> Vec<u8>;

fn gzip(message: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(message).expect("written");
    encoder.finish().expect("finished")
}

fn deflate(message: &[u8]) -> Vec<u8> {
    let mut encoder = flate2::write::ZlibEncoder::new(Vec::new(), flate2::Compression::best());
    encoder.write_all(message).expect("written");
    encoder.finish().expect("finished")
}

/// Makes a black image of `n_kib` KiB.
fn black(n_kib: usize) -> pb::Image {
    let (width, height) = (1024, u32::try_from(n_kib).expect("small"));
    pb::Image {
        source: Some(pb::image::Source::Rgb8(pb::RawImage {
            width,
            height,
            pixels: vec![0; 3 * KIB * n_kib].into(),
        })),
    }
}

fn requests(method: &str, code: &str) -> String {
    format!("imagegpt_requests_total{{method=\"{method}\",code=\"{code}\"}}")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_inflated_is_counted_and_only_once_the_request_has_ended() {
    let cases: [(&str, Compress); 2] = [("gzip", gzip), ("deflate", deflate)];
    for (name, compress) in cases {
        let (open, script) = gated();
        let running = harness::fake(script, &SMALL).await;
        let client = connect(&running.worker, 65_535).await;
        let image_bytes = 200 * 3 * KIB;
        let message = embed(vec![black(200)]).encode_to_vec();
        let frame = frame(1, &compress(&message));
        assert!(frame.len() < 4 * KIB);
        let encoding = [("grpc-encoding", name)];
        // As long as the end is withheld there are a few KiB of each, and they
        // are counted.
        let mut calls: Vec<Call> = (0..20).map(|_| call(&client, EMBED, &encoding)).collect();
        for call in &mut calls {
            call.send(frame.clone(), false);
        }
        let expected = 20.0 * to_f64(frame.len());
        let held = until_sample(&running, BYTES, |held| held >= expected).await;
        assert!(held <= 2.0 * expected, "{name}: {held}");
        // Then six images fit, and the others are told when to come back. One
        // request ends after the other: what two of them take while they are
        // decoded would count beside the images that wait.
        let refused = requests("Embed", "RESOURCE_EXHAUSTED");
        for (n_before, call) in calls.iter_mut().enumerate() {
            call.send(Bytes::new(), true);
            harness::until(&running, "the call is admitted or refused", async || {
                let n_refused = running.sample(&refused).await;
                to_f64(running.worker.images_in_flight()) + n_refused >= to_f64(n_before + 1)
            })
            .await;
        }
        running.until_in_flight(6).await;
        let expected = 6.0 * to_f64(image_bytes);
        until_sample(&running, &requests("Embed", "RESOURCE_EXHAUSTED"), |n| {
            n == 14.0
        })
        .await;
        let held = running.sample(BYTES).await;
        assert!(held >= expected && held <= 4.0 * 1024.0 * 1024.0, "{held}");
        drop(open);
        let (mut n_ok, mut n_full) = (0, 0);
        for call in calls {
            match call.end().await {
                (Code::Ok, _) => n_ok += 1,
                (Code::ResourceExhausted, sentence) => {
                    assert!(sentence.contains("--bytes-in-flight-max"), "{sentence}");
                    n_full += 1;
                }
                end => panic!("{end:?}"),
            }
        }
        assert_eq!((n_ok, n_full), (6, 14), "{name}");
        until_sample(&running, BYTES, |held| held == 0.0).await;
        drop(client);
        running.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_not_one_message_is_the_clients_fault() {
    let running = harness::fake(Script::default(), &SMALL).await;
    let client = connect(&running.worker, 65_535).await;
    let good = embed(vec![flat(1)]).encode_to_vec();
    let bomb = vec![0; 20 << 20];
    let mut broken = gzip(&good);
    broken.truncate(broken.len() - 3);
    let gz = [("grpc-encoding", "gzip")];
    let zlib = [("grpc-encoding", "deflate")];
    let twice = |flag, message: &[u8]| [frame(flag, message), frame(flag, message)].concat();
    let cases: Vec<(Headers<'_>, Vec<u8>, Code, &str)> = vec![
        (&gz, frame(1, &gzip(&good)), Code::Ok, ""),
        (&zlib, frame(1, &deflate(&good)), Code::Ok, ""),
        (&gz, frame(0, &good), Code::Ok, ""),
        (
            &gz,
            frame(1, &gzip(&bomb)),
            Code::ResourceExhausted,
            "--request-bytes-max",
        ),
        (
            &zlib,
            frame(1, &deflate(&bomb)),
            Code::ResourceExhausted,
            "--request-bytes-max",
        ),
        (
            &[],
            frame(0, &bomb),
            Code::ResourceExhausted,
            "--request-bytes-max",
        ),
        (
            &gz,
            twice(1, &gzip(&good)),
            Code::InvalidArgument,
            "a second message",
        ),
        (
            &[],
            twice(0, &good),
            Code::InvalidArgument,
            "a second message",
        ),
        (
            &gz,
            frame(1, &broken),
            Code::InvalidArgument,
            "cannot be inflated",
        ),
        (
            &zlib,
            frame(1, &good),
            Code::InvalidArgument,
            "cannot be inflated",
        ),
        (
            &[],
            frame(1, &gzip(&good)),
            Code::InvalidArgument,
            "grpc-encoding",
        ),
        (&[], frame(7, &good), Code::InvalidArgument, "begins with 7"),
        (
            &[],
            frame(0, &good)[..20].to_vec(),
            Code::InvalidArgument,
            "ends before",
        ),
        (&[], vec![0, 0], Code::InvalidArgument, "ends before"),
        (&[], Vec::new(), Code::InvalidArgument, "no message"),
        (
            &[("grpc-encoding", "zstd")],
            frame(1, &good),
            Code::Unimplemented,
            "zstd",
        ),
    ];
    for (headers, body, code, words) in cases {
        // At once, and a byte at a time at first.
        for n_alone in [0, 7] {
            let mut call = call(&client, EMBED, headers);
            let n_alone = n_alone.min(body.len());
            for &byte in &body[..n_alone] {
                call.send(vec![byte], false);
            }
            call.send(body[n_alone..].to_vec(), true);
            let (got, sentence) = call.end().await;
            assert_eq!(got, code, "{sentence}, not {words}");
            assert!(sentence.contains(words), "{sentence:?} lacks {words:?}");
        }
    }
    for code in ["INTERNAL", "UNKNOWN"] {
        assert_eq!(running.sample(&requests("Embed", code)).await, 0.0);
    }
    until_sample(&running, BYTES, |held| held == 0.0).await;
    drop(client);
    running.end().await;
}

/// A call's deadline and the time limit of a request free the received part,
/// even if the client never sends the rest.
#[tokio::test(flavor = "multi_thread")]
async fn what_has_arrived_is_free_at_the_deadline() {
    let flags = [&SMALL[..], &["--request-timeout", "2s"]].concat();
    let running = harness::fake(Script::default(), &flags).await;
    let client = connect(&running.worker, 65_535).await;
    let message = frame(0, &embed(vec![black(200)]).encode_to_vec());
    for (headers, part) in [
        (&[("grpc-timeout", "400m")][..], message.len()),
        (&[("grpc-timeout", "400m")][..], message.len() / 2),
        (&[][..], message.len() / 2),
    ] {
        let mut calls: Vec<Call> = (0..4).map(|_| call(&client, EMBED, headers)).collect();
        for call in &mut calls {
            call.send(message[..part].to_vec(), false);
        }
        until_sample(&running, BYTES, |held| held >= 4.0 * to_f64(part)).await;
        until_sample(&running, BYTES, |held| held == 0.0).await;
        for call in calls {
            assert_eq!(call.end().await.0, Code::DeadlineExceeded);
        }
    }
    drop(client);
    running.end().await;
}

/// Tokens that take one byte on the wire are counted as eight bytes when
/// decoded.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_message_becomes_is_counted() {
    let running = harness::fake(Script::default(), &SMALL).await;
    let client = connect(&running.worker, 65_535).await;
    let ids = pb::Tokens {
        ids: vec![1; 300 * KIB],
    };
    let image = pb::Image {
        source: Some(pb::image::Source::Tokens(ids)),
    };
    let message = embed(vec![image.clone(), image]).encode_to_vec();
    let mut call = call(&client, EMBED, &[]);
    call.send(frame(0, &message), true);
    let (code, sentence) = call.end().await;
    // 600 KiB that would be 4.8 MiB.
    assert_eq!(code, Code::InvalidArgument, "{sentence}");
    assert!(sentence.contains("--bytes-in-flight-max"), "{sentence}");
    drop(client);
    running.end().await;
}

/// A connection whose client reads nothing fills the worker; its answers end,
/// and other clients are served again.
#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_taken_ends() {
    let flags = [&SMALL[..], &["--answer-timeout", "1s"]].concat();
    // All of it, and what does not fit into a little.
    for window in [0, 100] {
        let running = harness::fake(Script::default(), &flags).await;
        let client = connect(&running.worker, window).await;
        // 64 vectors of 64 numbers of 4 bytes, counted three times, are more than
        // a connection's buffer soon.
        let request = pb::EmbedRequest {
            pooling: pb::Pooling::None.into(),
            ..embed(vec![flat(3); 63])
        };
        let message = frame(0, &request.encode_to_vec());
        let calls: Vec<Call> = (0..16)
            .map(|_| {
                let mut call = call(&client, EMBED, &[]);
                call.send(message.clone(), true);
                call
            })
            .collect();
        until_sample(&running, &requests("Embed", "OK"), |n| n == 16.0).await;
        // What has been answered is not held any more, what was not taken is.
        let answer_bytes = 3.0 * 63.0 * 1024.0;
        let n_waiting = if window == 0 { 16.0 } else { 8.0 };
        let held = running.sample(BYTES).await;
        assert!(held >= n_waiting * answer_bytes, "{held}");
        assert!(held <= 16.0 * answer_bytes, "{held}");
        // Somebody else is served all the time.
        let mut other = running.client.clone();
        let served = other.embed(embed(vec![flat(1)])).await;
        served.expect("there is room for one more");
        until_sample(&running, BYTES, |held| held == 0.0).await;
        let ended = running.sample("imagegpt_answers_not_taken_total").await;
        assert!(ended >= n_waiting, "{ended}");
        let mut n_reset = 0.0;
        if window == 0 {
            for call in calls {
                assert_eq!(call.reset().await, Some(Reason::CANCEL));
                n_reset += 1.0;
            }
            assert_eq!(ended, n_reset);
        }
        drop((client, other));
        running.end().await;
    }
}

/// A client with a slow link reads its answer in small pieces, and gets all of
/// it.
#[tokio::test(flavor = "multi_thread")]
async fn a_slow_reader_that_reads_gets_its_answer() {
    let running = harness::fake(Script::default(), &["--answer-timeout", "10s"]).await;
    let client = connect(&running.worker, 1000).await;
    let request = pb::EmbedRequest {
        pooling: pb::Pooling::None.into(),
        ..embed(vec![flat(3); 250])
    };
    let mut call = call(&client, EMBED, &[]);
    call.send(frame(0, &request.encode_to_vec()), true);
    let response = call.response.await.expect("a response");
    let mut body = response.into_body();
    let (started, mut n_bytes) = (Instant::now(), 0);
    while let Some(data) = body.data().await {
        let data = data.expect("data");
        n_bytes += data.len();
        // 100 kB/s: some three seconds in all.
        let due = Duration::from_secs_f64(to_f64(n_bytes) / 100_000.0);
        harness::pause(due.saturating_sub(started.elapsed())).await;
        let _ = body.flow_control().release_capacity(data.len());
    }
    assert!(n_bytes > 250 * KIB, "{n_bytes}");
    assert!(started.elapsed() > Duration::from_secs(2));
    assert_eq!(
        running.sample("imagegpt_answers_not_taken_total").await,
        0.0
    );
    drop((body, client));
    running.end().await;
}

/// Messages of streams are counted from their arrival; messages without room
/// are not read (backpressure), and all are answered in the end.
#[tokio::test(flavor = "multi_thread")]
async fn messages_that_arrive_or_wait_on_streams_are_counted() {
    let (open, script) = gated();
    let running = harness::fake(script, &SMALL).await;
    let client = connect(&running.worker, 1 << 20).await;
    let opening = pb::EmbedStreamRequest {
        message: Some(pb::embed_stream_request::Message::Open(
            pb::EmbedStreamOptions::default(),
        )),
    };
    let item = pb::EmbedStreamRequest {
        message: Some(pb::embed_stream_request::Message::Item(
            pb::EmbedStreamItem {
                id: "a".to_owned(),
                image: Some(black(200)),
            },
        )),
    };
    let (opening, item) = (opening.encode_to_vec(), item.encode_to_vec());
    // A part of a message counts, too.
    let another = connect(&running.worker, 1 << 20).await;
    let mut halves: Vec<Call> = (0..2)
        .map(|_| {
            let mut call = call(&another, EMBED_STREAM, &[]);
            call.send(frame(0, &opening), false);
            call.send(frame(0, &item)[..KIB].to_vec(), false);
            call
        })
        .collect();
    let half = to_f64(item.len());
    until_sample(&running, BYTES, |held| held >= 2.0 * half).await;
    // Of the 3 MiB that bulk work may have these and one or two others fit.
    let mut calls = Vec::new();
    for idx in 0..12 {
        let headers: &[(&str, &str)] = match idx % 2 {
            0 => &[],
            _ => &[("grpc-encoding", "gzip")],
        };
        let message = match idx % 2 {
            0 => frame(0, &item),
            _ => frame(1, &gzip(&item)),
        };
        let mut call = call(&client, EMBED_STREAM, headers);
        call.send(frame(0, &opening), false);
        call.send(message.clone(), false);
        call.send(message, true);
        calls.push(call);
    }
    let started = Instant::now();
    while started.elapsed() < Duration::from_millis(300) {
        let held = running.sample(BYTES).await;
        assert!(held <= 3.0 * 1024.0 * 1024.0, "{held}");
        harness::pause(Duration::from_millis(5)).await;
    }
    for half in &mut halves {
        half.send(frame(0, &item)[KIB..].to_vec(), true);
    }
    drop(open);
    for call in halves.into_iter().chain(calls) {
        let (code, sentence) = call.end().await;
        assert_eq!(code, Code::Ok, "{sentence}");
    }
    assert_eq!(
        running.sample("imagegpt_images_total{code=\"OK\"}").await,
        26.0
    );
    until_sample(&running, BYTES, |held| held == 0.0).await;
    drop((client, another));
    running.end().await;
}

/// Memory of a stream's messages is freed when they are answered, while the
/// stream stays open.
#[tokio::test(flavor = "multi_thread")]
async fn streams_keep_nothing_of_what_they_have_answered() {
    const N_STREAMS: usize = 16;
    let flags = [
        "--request-bytes-max",
        "32MiB",
        "--response-bytes-max",
        "1MiB",
    ];
    let running = harness::fake(Script::default(), &flags).await;
    let client = connect(&running.worker, 1 << 20).await;
    let opening = pb::EmbedStreamRequest {
        message: Some(pb::embed_stream_request::Message::Open(
            pb::EmbedStreamOptions::default(),
        )),
    };
    // 16 MiB of what is no image, which are a few KiB on the wire.
    let encoded = pb::image::Source::Encoded(vec![0; 16 << 20].into());
    let item = pb::EmbedStreamRequest {
        message: Some(pb::embed_stream_request::Message::Item(
            pb::EmbedStreamItem {
                id: "a".to_owned(),
                image: Some(pb::Image {
                    source: Some(encoded),
                }),
            },
        )),
    };
    let item = frame(1, &gzip(&item.encode_to_vec()));
    let resident = || {
        let status = std::fs::read_to_string("/proc/self/status").expect("a status");
        let line = status.lines().find(|line| line.starts_with("VmRSS:"));
        let kib = line.and_then(|line| line.split_whitespace().nth(1));
        kib.and_then(|kib| kib.parse::<usize>().ok()).expect("KiB") * KIB
    };
    let before = resident();
    let mut calls = Vec::new();
    for n in 1..=N_STREAMS {
        let mut call = call(&client, EMBED_STREAM, &[("grpc-encoding", "gzip")]);
        call.send(frame(0, &opening.encode_to_vec()), false);
        for _ in 0..2 {
            call.send(item.clone(), false);
        }
        let answered = to_f64(2 * n);
        let images = "imagegpt_images_total{code=\"INVALID_ARGUMENT\"}";
        until_sample(&running, images, |n| n >= answered).await;
        calls.push(call);
    }
    until_sample(&running, BYTES, |held| held == 0.0).await;
    // Other tests of this process take memory, too, but not half of this.
    let kept = resident().saturating_sub(before);
    assert!(kept < N_STREAMS * (8 << 20), "{kept} bytes are kept");
    drop((calls, client));
    running.end().await;
}

/// A client that announces much and sends nothing is ended in time, on both
/// kinds of streams, and its room is freed.
#[tokio::test(flavor = "multi_thread")]
async fn a_message_that_never_ends_is_ended() {
    let flags = [&SMALL[..], &["--request-timeout", "1s"]].concat();
    let running = harness::fake(Script::default(), &flags).await;
    let client = connect(&running.worker, 65_535).await;
    for path in [EMBED_STREAM, MODEL_STREAM_INFER] {
        let mut call = call(&client, path, &[]);
        call.send(vec![0, 0, 8, 0, 0], false);
        until_sample(&running, BYTES, |held| held >= to_f64(512 * KIB)).await;
        let (code, sentence) = call.end().await;
        assert_eq!(code, Code::DeadlineExceeded, "{sentence}");
        assert!(sentence.contains("--request-timeout"), "{sentence}");
        until_sample(&running, BYTES, |held| held == 0.0).await;
    }
    drop(client);
    running.end().await;
}

/// Calls that a client's transport ends count as cancelled by the client,
/// however it ends them.
#[tokio::test(flavor = "multi_thread")]
async fn uploads_that_break_off_are_cancelled() {
    let running = harness::fake(Script::default(), &[]).await;
    let message = frame(0, &embed(vec![black(100)]).encode_to_vec());
    let reasons = [
        Reason::CANCEL,
        Reason::INTERNAL_ERROR,
        Reason::PROTOCOL_ERROR,
        Reason::FLOW_CONTROL_ERROR,
        Reason::REFUSED_STREAM,
        Reason::ENHANCE_YOUR_CALM,
        Reason::HTTP_1_1_REQUIRED,
    ];
    let mut n_calls = 0.0;
    let client = connect(&running.worker, 65_535).await;
    for method in ["Embed", "EmbedStream"] {
        let path = format!("/imagegpt.v1.ImageGptService/{method}");
        for reason in reasons {
            for _ in 0..10 {
                let mut call = call(&client, &path, &[]);
                call.send(message[..5000].to_vec(), false);
                tokio::task::yield_now().await;
                call.request.send_reset(reason);
            }
        }
        // And connections that are lost, with and without a word.
        for _ in 0..10 {
            let stream = tokio::net::TcpStream::connect(running.worker.grpc_addr);
            let stream = stream.await.expect("a connection");
            let (client, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
            let connection = tokio::spawn(connection);
            let mut call = call(&client, &path, &[]);
            call.send(message[..5000].to_vec(), false);
            until_sample(&running, BYTES, |held| held > 0.0).await;
            connection.abort();
            until_sample(&running, BYTES, |held| held == 0.0).await;
        }
        n_calls += 10.0 * (to_f64(reasons.len()) + 1.0);
        let all = |page: &str| -> f64 {
            let start = format!("imagegpt_requests_total{{method=\"{method}\"");
            let lines = page.lines().filter(|line| line.starts_with(&start));
            lines
                .filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok())
                .sum()
        };
        // A call that was reset before the worker saw it has none.
        until(&running, "all calls were cancelled", async || {
            let page = running.metrics().await;
            let cancelled = harness::sample(&page, &requests(method, "CANCELLED"));
            for code in ["INTERNAL", "UNKNOWN", "UNAVAILABLE"] {
                let n = harness::sample(&page, &requests(method, code));
                assert_eq!(n, 0.0, "{method} {code}");
            }
            cancelled >= 10.0 && cancelled == all(&page)
        })
        .await;
    }
    assert!(n_calls > 0.0);
    drop(client);
    running.end().await;
}

/// A drain waits for work, not for clients that neither send nor read.
#[tokio::test(flavor = "multi_thread")]
async fn clients_that_stall_do_not_hold_the_end() {
    let sequences = FakeSequences {
        n_slots: 4,
        n_colors: 16,
        delay: Duration::ZERO,
        can_copy: true,
    };
    let script = || Script {
        sequences: Some(sequences),
        ..Default::default()
    };
    let embed = frame(0, &embed(vec![flat(1)]).encode_to_vec());
    let generate = frame(0, &pb::GenerateRequest::default().encode_to_vec());
    let cases = [
        (EMBED, &embed[..], true, Duration::from_secs(4)),
        (GENERATE, &generate[..], true, Duration::from_secs(4)),
        (EMBED, &embed[..20], false, Duration::ZERO),
        (EMBED, &embed[..], false, Duration::ZERO),
    ];
    let mut ends = tokio::task::JoinSet::new();
    for (idx, (path, body, is_last, at_least)) in cases.into_iter().enumerate() {
        let worker = harness::fake_worker(script(), &[]).await;
        let client = connect(&worker, 0).await;
        let mut call = call(&client, path, &[]);
        call.send(body.to_vec(), is_last);
        // All there is to compute is done, or what was sent has come.
        until(&worker, &format!("case {idx} is there"), async || {
            let page = harness::metrics(&worker).await;
            harness::sample(&page, BYTES) > 0.0 && worker.images_in_flight() == 0
        })
        .await;
        ends.spawn(async move {
            let started = Instant::now();
            let ended = worker.shutdown(Duration::from_secs(25)).await;
            let elapsed = started.elapsed();
            drop((client, call));
            assert_eq!(ended, WorkerEnded::Clean, "{idx}");
            assert!(elapsed >= at_least, "{idx}: {elapsed:?}");
            assert!(elapsed < Duration::from_secs(9), "{idx}: {elapsed:?}");
        });
    }
    while let Some(end) = ends.join_next().await {
        end.expect("no panic");
    }
}

#[expect(clippy::cast_precision_loss, reason = "sizes of tests")]
fn to_f64(n: usize) -> f64 {
    n as f64
}

/// Errors repeat a caller's text to its beginning: a status travels in a header,
/// and a line of the log is read by people.
#[tokio::test]
async fn errors_repeat_little_of_a_callers_text() {
    use crate::oip::{ids, infer, output, parameters, word};

    let running = harness::fake(Script::default(), &[]).await;
    let long = "urgent".repeat(1700);
    let client = connect(&running.worker, 1 << 20).await;
    let embed = "/imagegpt.v1.ImageGptService/Embed";
    for header in ["imagegpt-priority", "grpc-encoding"] {
        for path in [embed, "/grpc.health.v1.Health/Check"] {
            let mut call = call(&client, path, &[(header, &long)]);
            call.send(frame(0, b""), true);
            let (code, message) = call.end().await;
            if path != embed && header == "imagegpt-priority" {
                assert_eq!(code, Code::Ok, "{message}");
                continue;
            }
            assert!(message.contains("urgent"), "{message}");
            assert!(message.contains('…'), "{message}");
            assert!(message.len() < 512, "{} bytes", message.len());
        }
    }
    // All that fits into the limit on options.
    let long = "urgent".repeat(500);
    let head = pb::ClassifyRequest {
        head: long.clone(),
        ..Default::default()
    };
    let error = running.client.clone().classify(head).await;
    let mut errors = vec![error.expect_err("no such head")];
    let mut client = crate::oip::client(&running).await;
    let changes: [&dyn Fn(&mut crate::oip::Asked); 8] = [
        &|r| r.model_name.clone_from(&long),
        &|r| r.model_version.clone_from(&long),
        &|r| r.inputs[0].name.clone_from(&long),
        &|r| r.inputs[0].datatype.clone_from(&long),
        &|r| r.outputs = vec![output(&long, &[])],
        &|r| r.outputs = vec![output("logits", &[("head", word(&long))])],
        &|r| r.parameters = parameters(&[("fit", word(&long))]),
        &|r| r.parameters = parameters(&[("layer", word(&long))]),
    ];
    for change in changes {
        let mut request = ids(&[seeded(1)]);
        change(&mut request);
        errors.push(infer(&mut client, &request).await.expect_err("refused"));
    }
    for error in errors {
        let message = error.message();
        assert!(
            message.contains("urgent") && message.contains('…'),
            "{message}"
        );
        assert!(message.len() < 512, "{} bytes", message.len());
    }
    drop(client);
    running.end().await;
}
