//! gRPC-Web over HTTP/1.1, as browsers use it, and its cross-origin rules.

use imagegpt::engine::fake::Script;
use imagegpt::proto::inference as oip;
use prost::Message as _;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{self, embed, fake_answer, seeded, tokens, vector};

/// Sends a request over HTTP/1.1 on a new connection, and returns the whole
/// response.
pub(crate) async fn ask(addr: std::net::SocketAddr, head: &str, body: &[u8]) -> (String, Vec<u8>) {
    ask_host(addr, head, "test", body).await
}

/// Sends a request with the given `Host`, as [`ask`] does.
pub(crate) async fn ask_host(
    addr: std::net::SocketAddr,
    head: &str,
    host: &str,
    body: &[u8],
) -> (String, Vec<u8>) {
    ask_whole(addr, &format!("{head}\r\nhost: {host}"), body).await
}

/// Sends a request with the hosts that its head has, as [`ask`] does.
pub(crate) async fn ask_whole(
    addr: std::net::SocketAddr,
    head: &str,
    body: &[u8],
) -> (String, Vec<u8>) {
    let mut stream = tokio::net::TcpStream::connect(addr)
        .await
        .expect("connected");
    let head = format!(
        "{head}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    stream.write_all(head.as_bytes()).await.expect("sent");
    stream.write_all(body).await.expect("sent");
    let mut answer = Vec::new();
    // A worker may close before it has read the body.
    let _ = stream.read_to_end(&mut answer).await;
    let Some(at) = answer.windows(4).position(|four| four == b"\r\n\r\n") else {
        return (String::from_utf8_lossy(&answer).to_lowercase(), Vec::new());
    };
    let body = answer.split_off(at + 4);
    (String::from_utf8_lossy(&answer).to_lowercase(), body)
}

/// Returns the frames of a chunked gRPC-Web body: flag and content.
fn frames(mut chunked: &[u8]) -> Vec<(u8, Vec<u8>)> {
    let mut body = Vec::new();
    while let Some(at) = chunked.windows(2).position(|two| two == b"\r\n") {
        let size = std::str::from_utf8(&chunked[..at]).expect("a size");
        let size = usize::from_str_radix(size, 16).expect("a size");
        body.extend_from_slice(&chunked[at + 2..][..size]);
        chunked = &chunked[at + 2 + size + 2..];
    }
    let mut frames = Vec::new();
    let mut rest = &body[..];
    while let Some((&flag, after)) = rest.split_first() {
        let (length, after) = after.split_first_chunk().expect("a length");
        let (content, after) = after.split_at(u32::from_be_bytes(*length) as usize);
        frames.push((flag, content.to_vec()));
        rest = after;
    }
    frames
}

pub(crate) fn framed(message: &impl prost::Message) -> Vec<u8> {
    let message = message.encode_to_vec();
    let length = u32::try_from(message.len()).expect("small");
    [&[0][..], &length.to_be_bytes(), &message].concat()
}

const EMBED: &str = "POST /imagegpt.v1.ImageGptService/Embed HTTP/1.1\r\n\
                     content-type: application/grpc-web+proto\r\nx-grpc-web: 1";

#[tokio::test]
async fn browsers_may_call_where_they_are_let() {
    let flags = ["--grpc-web", "--cors-origin", "https://app.example"];
    let running = harness::fake(Script::default(), &flags).await;
    let addr = running.worker.grpc_addr;
    let request = framed(&embed(vec![tokens(seeded(5))]));
    let head = format!("{EMBED}\r\norigin: https://app.example\r\nx-request-id: web-1");
    let (head, body) = ask(addr, &head, &request).await;
    assert!(head.starts_with("http/1.1 200"), "{head}");
    assert!(
        head.contains("access-control-allow-origin: https://app.example"),
        "{head}"
    );
    assert!(head.contains("x-request-id: web-1"), "{head}");
    let frames = frames(&body);
    let response = imagegpt::proto::pb::EmbedResponse::decode(&frames[0].1[..]).expect("an answer");
    assert_eq!(
        vector(&response.results[0]).expect("a vector"),
        fake_answer(&seeded(5))
    );
    let trailers = String::from_utf8(frames[1].1.clone()).expect("text");
    assert_eq!(
        (frames[1].0, trailers.contains("grpc-status:0")),
        (0x80, true),
        "{trailers}"
    );

    // The other service, and an error.
    let head = "POST /inference.GRPCInferenceService/ModelMetadata HTTP/1.1\r\n\
                content-type: Application/GRPC-Web+proto; charset=utf-8";
    let unknown = oip::ModelMetadataRequest {
        name: "other".to_owned(),
        ..Default::default()
    };
    let (head, _) = ask(addr, head, &framed(&unknown)).await;
    assert!(head.contains("grpc-status: 5"), "{head}");

    // A browser asks first.
    let preflight = |origin: &str| {
        format!(
            "OPTIONS /imagegpt.v1.ImageGptService/Embed HTTP/1.1\r\norigin: {origin}\r\n\
             access-control-request-method: POST\r\n\
             access-control-request-headers: content-type,x-grpc-web,authorization"
        )
    };
    let (allowed, _) = ask(addr, &preflight("https://app.example"), &[]).await;
    assert!(
        allowed.contains("access-control-allow-origin: https://app.example"),
        "{allowed}"
    );
    assert!(allowed.contains("authorization"), "{allowed}");
    let (other, _) = ask(addr, &preflight("https://other.example"), &[]).await;
    assert!(!other.contains("access-control-allow-origin"), "{other}");

    // What is neither gRPC nor gRPC-Web.
    let (plain, _) = ask(addr, "GET / HTTP/1.1", &[]).await;
    assert!(plain.starts_with("http/1.1 400"), "{plain}");
    // And gRPC as ever, beside it.
    let response = running
        .client
        .clone()
        .embed(embed(vec![tokens(seeded(6))]))
        .await;
    assert_eq!(
        vector(&response.expect("an answer").get_ref().results[0]).expect("a vector"),
        fake_answer(&seeded(6))
    );
    let page = running.metrics().await;
    let calls = "imagegpt_requests_total{method=\"Embed\",code=\"OK\"}";
    assert_eq!(harness::sample(&page, calls), 2.0);
    running.end().await;
}

#[tokio::test]
async fn browsers_are_not_let_unless_asked_for() {
    let running = harness::fake(Script::default(), &[]).await;
    let (head, _) = ask(
        running.worker.grpc_addr,
        EMBED,
        &framed(&embed(vec![tokens(seeded(5))])),
    )
    .await;
    assert!(head.starts_with("http/1.1 505"), "{head}");
    running.end().await;
}

/// Of two hosts a proxy may take one and the worker the other.
#[tokio::test]
async fn a_request_over_http_1_has_one_host() {
    for flags in [&["--grpc-web"][..], &["--playground"]] {
        let running = harness::fake(Script::default(), flags).await;
        let addr = running.worker.grpc_addr;
        let call = framed(&embed(vec![tokens(seeded(5))]));
        for (hosts, is_served) in [
            ("\r\nhost: localhost", true),
            ("\r\nhost: localhost\r\nhost: localhost", false),
            ("\r\nhost: localhost\r\nhost: evil.example", false),
            ("\r\nhost: evil.example\r\nhost: localhost", false),
            ("\r\nhost: user@localhost", false),
            ("", false),
        ] {
            let (answer, body) = ask_whole(addr, &format!("{EMBED}{hosts}"), &call).await;
            let expected = if is_served { "200" } else { "400" };
            assert_eq!(answer.split(' ').nth(1), Some(expected), "{hosts}");
            assert_eq!(body.starts_with(b"a request over"), !is_served, "{hosts}");
            let (page, _) = ask_whole(addr, &format!("GET / HTTP/1.1{hosts}"), b"").await;
            let is_page = is_served && flags[0] == "--playground";
            let expected = if is_page { "200" } else { "400" };
            assert_eq!(page.split(' ').nth(1), Some(expected), "{hosts}");
        }
        running.end().await;
    }
}

#[tokio::test]
async fn tokens_are_asked_of_browsers_too() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    std::fs::write(&file, "0123456789abcdef\n").expect("written");
    let file = file.to_str().expect("a path");
    let flags = [
        "--grpc-web",
        "--cors-origin",
        "*",
        "--auth-tokens-file",
        file,
    ];
    let running = harness::fake(Script::default(), &flags).await;
    let request = framed(&embed(vec![tokens(seeded(5))]));
    let (head, _) = ask(running.worker.grpc_addr, EMBED, &request).await;
    assert!(head.contains("grpc-status: 16"), "{head}");
    let authorized = format!("{EMBED}\r\nauthorization: Bearer 0123456789abcdef");
    let (head, body) = ask(running.worker.grpc_addr, &authorized, &request).await;
    assert!(
        head.starts_with("http/1.1 200") && frames(&body).len() == 2,
        "{head}"
    );
    running.end().await;
}

#[tokio::test]
async fn a_connection_that_says_nothing_in_http1_is_closed_with_the_worker() {
    let running = harness::fake(Script::default(), &["--grpc-web"]).await;
    let mut stream = tokio::net::TcpStream::connect(running.worker.grpc_addr)
        .await
        .expect("connected");
    stream
        .write_all(b"POST /imagegpt.v1.ImageGptService/Embed HTTP/1.1\r\nhost: x\r\n")
        .await
        .expect("sent");
    harness::pause(std::time::Duration::from_millis(20)).await;
    running.end().await;
}
