//! Calls whose `:authority` is no part of a URL, in frames as grpcio writes
//! them.

use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

use imagegpt::engine::fake::Script;
use imagegpt::serve::worker::WorkerEnded;

use crate::harness;

const DATA: u8 = 0;
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const GOAWAY: u8 = 7;

fn raw(text: &[u8]) -> Vec<u8> {
    let mut literal = Vec::new();
    match text.len() {
        short @ 0..127 => literal.push(u8::try_from(short).expect("a small number")),
        long => {
            let rest = long - 127;
            literal.extend([127, u8::try_from(rest % 128).expect("a small number") | 128]);
            literal.push(u8::try_from(rest / 128).expect("a small number"));
        }
    }
    literal.extend_from_slice(text);
    literal
}

fn frame(kind: u8, flags: u8, stream: u8, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len())
        .expect("a small number")
        .to_be_bytes();
    let mut frame = length[1..].to_vec();
    frame.extend([kind, flags, 0, 0, 0, stream]);
    frame.extend_from_slice(payload);
    frame
}

/// Bytes of a health check whose block of headers is `block`.
fn check(stream: u8, block: &[u8]) -> Vec<u8> {
    let mut bytes = frame(HEADERS, 4, stream, block);
    bytes.extend(frame(DATA, 1, stream, &[0; 5]));
    bytes
}

/// Returns the kind of the first frame that decides about a call.
async fn outcome(connection: &mut TcpStream, stream: u8) -> u8 {
    loop {
        let mut head = [0; 9];
        connection.read_exact(&mut head).await.expect("a frame");
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut payload = vec![0; length as usize];
        connection.read_exact(&mut payload).await.expect("a frame");
        let (kind, of) = (head[3], head[8]);
        if kind == GOAWAY || of == stream && matches!(kind, DATA | RST_STREAM) {
            return kind;
        }
    }
}

/// Returns the outcomes of two calls on one connection, the second of which
/// names its headers by their places in the table.
async fn outcomes(addr: std::net::SocketAddr, authority: &[u8]) -> [u8; 2] {
    let mut connection = TcpStream::connect(addr).await.expect("a connection");
    let mut bytes = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    bytes.extend(frame(4, 0, 0, &[]));
    let mut block = Vec::new();
    for (name, value) in [
        (&b":path"[..], &b"/grpc.health.v1.Health/Check"[..]),
        (b":authority", authority),
    ] {
        block.push(0x40);
        block.extend(raw(name));
        block.extend(raw(value));
    }
    // POST, http.
    block.extend([0x83, 0x86]);
    for (name, value) in [("content-type", "application/grpc"), ("te", "trailers")] {
        block.push(0x40);
        block.extend(raw(name.as_bytes()));
        block.extend(raw(value.as_bytes()));
    }
    bytes.extend(check(1, &block));
    connection.write_all(&bytes).await.expect("a call");
    let first = outcome(&mut connection, 1).await;
    let again = [0xc1, 0xc0, 0x83, 0x86, 0xbf, 0xbe];
    connection
        .write_all(&check(3, &again))
        .await
        .expect("a call");
    [first, outcome(&mut connection, 3).await]
}

#[tokio::test]
async fn an_authority_of_any_text_is_served() {
    let worker = harness::fake(Script::default(), &[]).await.worker;
    let long = format!("{}:1", "a:1,".repeat(75));
    for authority in [
        "127.0.0.1:1",
        "127.0.0.1:1,127.0.0.1:2",
        "127.0.0.1:1%2C127.0.0.1:2",
        "%5B%3A%3A1%5D:50051",
        "%2Fvar%2Frun%2Fworker.sock",
        "/var/run/worker.sock",
        "a_b",
        "a b",
        "ümlaut.example",
        "a@",
        "[::1",
        "",
        &long,
    ] {
        let outcomes = outcomes(worker.grpc_addr, authority.as_bytes()).await;
        assert_eq!(outcomes, [DATA, DATA], "{authority:?}");
    }
    assert_eq!(worker.shutdown(harness::PATIENCE).await, WorkerEnded::Clean);
}

#[tokio::test]
async fn an_authority_that_no_header_may_have_is_refused() {
    let worker = harness::fake(Script::default(), &[]).await.worker;
    for authority in [&b"a\nb:1,c"[..], b"a\x01b", b" a", b"a/b ", b"a/\x7f"] {
        let outcomes = outcomes(worker.grpc_addr, authority).await;
        assert_eq!(outcomes, [RST_STREAM, RST_STREAM], "{authority:?}");
    }
    assert_eq!(worker.shutdown(harness::PATIENCE).await, WorkerEnded::Clean);
}
