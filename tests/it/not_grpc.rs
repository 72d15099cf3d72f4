//! Requests that are no gRPC calls, and calls of methods that are not served.

use bytes::Bytes;
use imagegpt::engine::fake::Script;
use imagegpt::serve::worker::Worker;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};

use crate::harness::{self, embed, seeded, tokens};
use crate::web::ask;

/// Paths of a call, of a health check, of reflection, and of nothing.
const PATHS: [&str; 4] = [
    "/imagegpt.v1.ImageGptService/GetModel",
    "/grpc.health.v1.Health/Check",
    "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
    "/",
];

#[tokio::test]
async fn http_1_is_told_what_the_port_serves() {
    let running = harness::fake(Script::default(), &[]).await;
    let addr = running.worker.grpc_addr;
    for head in [
        "GET / HTTP/1.1",
        "GET /metrics HTTP/1.1",
        "HEAD /readyz HTTP/1.1",
        "GET / HTTP/1.0",
        "POST /imagegpt.v1.ImageGptService/GetModel HTTP/1.1\r\ncontent-type: application/grpc",
    ] {
        let (answer, body) = ask(addr, head, b"").await;
        let version = if head.ends_with("1.0") { "1.0" } else { "1.1" };
        let expected = format!("http/{version} 505 ");
        assert!(answer.starts_with(&expected), "{head}: {answer}");
        assert!(answer.contains("content-type: text/plain"), "{answer}");
        let body = String::from_utf8(body).expect("text");
        if head.starts_with("HEAD") {
            assert_eq!(body, "");
            continue;
        }
        assert_eq!(body.lines().count(), 1, "{body}");
        for words in ["gRPC over HTTP/2", "--metrics-listen", "--grpc-web"] {
            assert!(body.contains(words), "{body}");
        }
    }
    // The connection is closed although its client would keep it.
    let mut stream = tokio::net::TcpStream::connect(addr)
        .await
        .expect("connected");
    let kept = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: keep-alive\r\n\r\n";
    stream.write_all(kept).await.expect("sent");
    let mut answer = String::new();
    let whole = stream.read_to_string(&mut answer);
    let read = tokio::time::timeout(harness::PATIENCE, whole).await;
    read.expect("closed").expect("text");
    assert!(answer.starts_with("HTTP/1.1 505 "), "{answer}");
    // gRPC as ever, beside it.
    let mut client = running.client.clone();
    client
        .embed(embed(vec![tokens(seeded(1))]))
        .await
        .expect("an answer");
    drop(client);
    running.end().await;
}

/// Sends a request over HTTP/2, and returns status, content type and body.
async fn send(worker: &Worker, request: http::Request<()>) -> (u16, String, String) {
    let stream = tokio::net::TcpStream::connect(worker.grpc_addr)
        .await
        .expect("connected");
    let (client, connection) = h2::client::handshake(stream).await.expect("HTTP/2");
    tokio::spawn(connection);
    let mut client = client.ready().await.expect("ready");
    let (response, _) = client.send_request(request, true).expect("sent");
    let response = response.await.expect("a response");
    let status = response.status().as_u16();
    let content_type = response.headers().get("content-type");
    let content_type = content_type.map_or("", |value| value.to_str().expect("ASCII"));
    let content_type = content_type.to_owned();
    let mut body = response.into_body();
    let mut text = Vec::new();
    while let Some(data) = body.data().await {
        text.extend_from_slice(&data.unwrap_or_else(|_| Bytes::new()));
    }
    // The trailers of gRPC-Web are not text.
    let text = String::from_utf8_lossy(&text).into_owned();
    (status, content_type, text)
}

#[tokio::test]
async fn another_content_type_is_unsupported_on_every_path() {
    for flags in [&[][..], &["--grpc-web"]] {
        let running = harness::fake(Script::default(), flags).await;
        let request = |path: &str, content_type: Option<&str>| {
            let mut request = http::Request::post(format!("http://worker{path}"));
            if let Some(content_type) = content_type {
                request = request.header("content-type", content_type);
            }
            request.body(()).expect("a request")
        };
        for path in PATHS {
            for content_type in [None, Some("application/json"), Some("application/grpcs")] {
                let (status, kind, body) = send(&running.worker, request(path, content_type)).await;
                assert_eq!(status, 415, "{path} {content_type:?}");
                assert!(kind.starts_with("text/plain"), "{kind}");
                assert!(body.contains("application/grpc;"), "{body}");
            }
            let grpc = Some("application/grpc+proto");
            let (status, kind, _) = send(&running.worker, request(path, grpc)).await;
            assert_eq!((status, kind.as_str()), (200, "application/grpc"), "{path}");
            let web = Some("application/grpc-web+proto");
            let (status, _, body) = send(&running.worker, request(path, web)).await;
            if flags.is_empty() {
                assert_eq!(status, 415, "{path}");
                assert!(body.contains("--grpc-web"), "{body}");
            } else {
                assert_eq!(status, 200, "{path}");
            }
        }
        running.end().await;
    }
}

#[tokio::test]
async fn calls_that_are_not_served_are_told_what_is() {
    use http::uri::PathAndQuery;
    use tonic::Code;

    let running = harness::fake(Script::default(), &["--no-reflection"]).await;
    let channel = tonic::transport::Channel::from_shared(running.url()).expect("a URL");
    let channel = channel.connect().await.expect("a connection");
    let check = async |path: &str, words: &[&str]| {
        let mut grpc = tonic::client::Grpc::new(channel.clone());
        grpc.ready().await.expect("ready");
        let path = PathAndQuery::try_from(path).expect("a path");
        let codec = tonic_prost::ProstCodec::<(), ()>::default();
        let error = grpc
            .unary(tonic::Request::new(()), path.clone(), codec)
            .await
            .expect_err("not served");
        assert_eq!(error.code(), Code::Unimplemented, "{path}: {error}");
        for words in words {
            assert!(error.message().contains(words), "{path}: {error}");
        }
    };
    // The calls of Triton that are not in the contract, and one of the future.
    for method in [
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryStatus",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryStatus",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "TraceSetting",
        "LogSettings",
        "Tomorrow",
    ] {
        let path = format!("/inference.GRPCInferenceService/{method}");
        let given = format!("method: {path:?} is not served");
        check(
            &path,
            &[&given, "ModelInfer, ModelStreamInfer", "RepositoryIndex"],
        )
        .await;
    }
    check(
        "/imagegpt.v1.ImageGptService/Train",
        &["imagegpt.v1.ImageGptService has Embed, EmbedStream"],
    )
    .await;
    let services = ["imagegpt.v1.ImageGptService, inference.GRPCInferenceService"];
    check("/imagegpt.v2.ImageGptService/Embed", &services).await;
    check("/grpc.health.v1.Health/List", &services).await;
    check(
        "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo",
        &["--no-reflection"],
    )
    .await;
    check(&format!("/{}", "long".repeat(2000)), &["longlong", "…"]).await;
    drop(channel);
    running.end().await;
}
