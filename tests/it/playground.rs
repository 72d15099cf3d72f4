//! The page of `--playground`: its files, their headers, and who may ask.

use imagegpt::engine::fake::Script;
use imagegpt::proto::pb;

use crate::harness::{self, Running, embed, seeded, tokens};
use crate::web::{ask_host, framed};

/// Files of the page, and the beginnings of their types.
const FILES: [(&str, &str); 4] = [
    ("/", "text/html"),
    ("/page.css", "text/css"),
    ("/page.js", "text/javascript"),
    ("/NOTICE.txt", "text/plain"),
];
const GET_MODEL: &str = "POST /imagegpt.v1.ImageGptService/GetModel HTTP/1.1\r\n\
                         content-type: application/grpc-web+proto\r\nx-grpc-web: 1";

async fn get(running: &Running, head: &str) -> (String, Vec<u8>) {
    let addr = running.worker.grpc_addr;
    ask_host(addr, head, &addr.to_string(), b"").await
}

fn status(answer: &str) -> &str {
    answer.split(' ').nth(1).unwrap_or("none")
}

/// Returns a header of an answer, whose names are in lower case.
fn header<'a>(answer: &'a str, name: &str) -> &'a str {
    let prefix = format!("{name}: ");
    let value = answer.lines().find_map(|line| line.strip_prefix(&prefix));
    value.unwrap_or_default()
}

#[tokio::test]
async fn the_page_is_served_when_it_is_asked_for() {
    let running = harness::fake(Script::default(), &["--playground"]).await;
    for (path, kind) in FILES {
        let (head, body) = get(&running, &format!("GET {path} HTTP/1.1")).await;
        assert_eq!(status(&head), "200", "{head}");
        assert!(header(&head, "content-type").starts_with(kind), "{head}");
        assert_eq!(header(&head, "content-length"), body.len().to_string());
        let policy = header(&head, "content-security-policy");
        for part in [
            "default-src 'none'",
            "script-src 'self';",
            "style-src 'self';",
            "connect-src 'self';",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        ] {
            assert!(policy.contains(part), "{policy}");
        }
        assert!(!policy.contains("unsafe"), "{policy}");
        assert_eq!(header(&head, "x-content-type-options"), "nosniff");
        assert_eq!(header(&head, "referrer-policy"), "no-referrer");
        assert!(header(&head, "permissions-policy").contains("camera=(self)"));
        assert_eq!(header(&head, "cache-control"), "no-cache");

        let (same, none) = get(&running, &format!("HEAD {path} HTTP/1.1")).await;
        assert_eq!(status(&same), "200", "{same}");
        assert_eq!(header(&same, "content-length"), body.len().to_string());
        assert!(none.is_empty());

        let tag = header(&head, "etag");
        let again = format!("GET {path} HTTP/1.1\r\nif-none-match: {tag}");
        let (known, none) = get(&running, &again).await;
        assert_eq!(status(&known), "304", "{known}");
        assert!(none.is_empty());
        assert_eq!(header(&known, "etag"), tag);
    }
    let (page, text) = get(&running, "GET / HTTP/1.1").await;
    let text = String::from_utf8(text).expect("UTF-8");
    assert!(text.starts_with("<!doctype html>"), "{page}");
    // Nothing of the page is elsewhere, and nothing runs that is no file.
    for elsewhere in [
        "src=\"http",
        "href=\"http",
        "src=\"//",
        "<style",
        "style=\"",
    ] {
        assert!(!text.contains(elsewhere), "{elsewhere}");
    }
    assert_eq!(text.matches("<script").count(), 1);

    for (head, expected) in [
        ("GET /metrics HTTP/1.1", "404"),
        ("GET /index.html HTTP/1.1", "404"),
        ("HEAD /nothing HTTP/1.1", "404"),
        (
            "DELETE /imagegpt.v1.ImageGptService/GetModel HTTP/1.1",
            "404",
        ),
        ("POST / HTTP/1.1", "405"),
        ("PUT /page.js HTTP/1.1", "405"),
    ] {
        let (answer, _) = get(&running, head).await;
        assert_eq!(status(&answer), expected, "{head}: {answer}");
        assert_eq!(header(&answer, "x-content-type-options"), "nosniff");
        if expected == "405" {
            assert_eq!(header(&answer, "allow"), "get, head");
        }
    }
    running.end().await;
}

#[tokio::test]
async fn the_page_is_served_over_http_2_beside_grpc() {
    let running = harness::fake(Script::default(), &["--playground"]).await;
    let addr = running.worker.grpc_addr;
    let stream = tokio::net::TcpStream::connect(addr).await;
    let (client, connection) = h2::client::handshake(stream.expect("connected"))
        .await
        .expect("HTTP/2");
    tokio::spawn(connection);
    let mut client = client.ready().await.expect("ready");
    for (path, kind) in FILES {
        let request = http::Request::get(format!("http://localhost:{}{path}", addr.port()));
        let request = request.body(()).expect("a request");
        let (response, _) = client.send_request(request, true).expect("sent");
        let response = response.await.expect("a response");
        assert_eq!(response.status(), 200, "{path}");
        let content_type = &response.headers()["content-type"];
        assert!(content_type.to_str().expect("ASCII").starts_with(kind));
        let length = &response.headers()["content-length"];
        let length: usize = length.to_str().expect("ASCII").parse().expect("a number");
        let mut body = response.into_body();
        let mut n_bytes = 0;
        while let Some(data) = body.data().await {
            let data = data.expect("a piece");
            n_bytes += data.len();
            body.flow_control()
                .release_capacity(data.len())
                .expect("released");
        }
        assert_eq!(n_bytes, length, "{path}");
    }
    let request = http::Request::get("http://evil.example/").body(());
    let (response, _) = client
        .send_request(request.expect("a request"), true)
        .expect("sent");
    assert_eq!(response.await.expect("a response").status(), 421);
    let mut grpc = running.client.clone();
    grpc.embed(embed(vec![tokens(seeded(3))]))
        .await
        .expect("an answer");
    drop((client, grpc));
    running.end().await;
}

#[tokio::test]
async fn there_is_no_page_unless_it_is_asked_for() {
    for (flags, expected) in [(&[][..], "505"), (&["--grpc-web"], "400")] {
        let running = harness::fake(Script::default(), flags).await;
        for (path, _) in FILES {
            let (head, body) = get(&running, &format!("GET {path} HTTP/1.1")).await;
            assert_eq!(status(&head), expected, "{head}");
            assert!(!body.starts_with(b"<!doctype"), "{head}");
        }
        running.end().await;
    }
}

#[tokio::test]
async fn tokens_are_asked_of_calls_and_not_of_the_page() {
    let folder = tempfile::tempdir().expect("a folder");
    let file = folder.path().join("tokens");
    std::fs::write(&file, "0123456789abcdef\n").expect("written");
    let flags = [
        "--playground",
        "--auth-tokens-file",
        file.to_str().expect("a path"),
    ];
    let running = harness::fake(Script::default(), &flags).await;
    let addr = running.worker.grpc_addr;
    let body = framed(&pb::GetModelRequest::default());
    // With tokens, any name will do: a foreign page has no token.
    for host in [addr.to_string(), "worker.example".to_owned()] {
        let (page, _) = ask_host(addr, "GET / HTTP/1.1", &host, b"").await;
        assert_eq!(status(&page), "200", "{page}");
        let (refused, _) = ask_host(addr, GET_MODEL, &host, &body).await;
        assert_eq!(header(&refused, "grpc-status"), "16", "{refused}");
        let with_token = format!("{GET_MODEL}\r\nauthorization: Bearer 0123456789abcdef");
        let (answered, _) = ask_host(addr, &with_token, &host, &body).await;
        assert_eq!(status(&answered), "200", "{answered}");
        assert_eq!(header(&answered, "grpc-status"), "", "{answered}");
    }
    running.end().await;
}

/// Asks for the page and for a call under a host, with an origin.
async fn under(running: &Running, host: &str, origin: &str) -> (String, String) {
    let addr = running.worker.grpc_addr;
    let (page, _) = ask_host(addr, "GET / HTTP/1.1", host, b"").await;
    let call = format!("{GET_MODEL}\r\norigin: {origin}");
    let body = framed(&pb::GetModelRequest::default());
    let (call, _) = ask_host(addr, &call, host, &body).await;
    (status(&page).to_owned(), status(&call).to_owned())
}

#[tokio::test]
async fn other_peoples_pages_do_not_reach_a_worker_on_loopback() {
    let running = harness::fake(Script::default(), &["--playground"]).await;
    let port = running.worker.grpc_addr.port();
    let check = async |host: &str, origin: &str, expected: (&str, &str)| {
        let host = format!("{host}:{port}");
        let (page, call) = under(&running, &host, origin).await;
        assert_eq!((page.as_str(), call.as_str()), expected, "{host} {origin}");
    };
    let own = |name: &str| format!("http://{name}:{port}");
    for name in ["127.0.0.1", "localhost", "[::1]"] {
        check(name, &own(name), ("200", "200")).await;
    }
    // A name that an attacker lets resolve to this machine.
    check("evil.example", &own("evil.example"), ("421", "421")).await;
    // A page of another origin that calls here.
    check("127.0.0.1", "https://evil.example", ("200", "403")).await;
    check("127.0.0.1", "http://127.0.0.1:1", ("200", "403")).await;
    check("127.0.0.1", "null", ("200", "403")).await;
    // A program has no origin, and may use any name.
    let body = framed(&pb::GetModelRequest::default());
    let (program, _) = ask_host(running.worker.grpc_addr, GET_MODEL, "any", &body).await;
    assert_eq!(status(&program), "200", "{program}");
    running.end().await;

    // Without the page, calls of browsers are guarded all the same.
    let running = harness::fake(Script::default(), &["--grpc-web"]).await;
    let evil = "evil.example";
    let (_, call) = under(&running, evil, &format!("http://{evil}")).await;
    assert_eq!(call, "421");
    running.end().await;

    // A proxy on this machine has another name, which is allowed by its origin.
    let allowed = ["--playground", "--cors-origin", "https://app.example"];
    let running = harness::fake(Script::default(), &allowed).await;
    let answers = under(&running, "app.example", "https://app.example").await;
    assert_eq!(answers, ("200".to_owned(), "200".to_owned()));
    let answers = under(&running, "app.example", "https://evil.example").await;
    assert_eq!(answers, ("200".to_owned(), "403".to_owned()));
    running.end().await;
}
