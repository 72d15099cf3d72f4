use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpListener;

use super::*;

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// Starts a server that answers each connection with the next of these answers,
/// in which `HERE` stands for its own address.
async fn client(answers: &[(&str, String)]) -> HubClient {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let here = format!("http://{}", listener.local_addr().unwrap());
    let answers: Vec<String> = answers
        .iter()
        .map(|(head, body)| {
            let head = head.replace("HERE", &here);
            let length = body.len();
            format!(
                "HTTP/1.1 {head}\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n{body}"
            )
        })
        .collect();
    tokio::spawn(async move {
        for answer in answers {
            let (mut stream, _) = listener.accept().await.unwrap();
            let _ = stream.read(&mut [0; 4096]).await.unwrap();
            stream.write_all(answer.as_bytes()).await.unwrap();
        }
    });
    let access = HubAccess {
        endpoint: Some(here),
        token: None,
    };
    HubClient::new(access)
        .unwrap()
        .with_patience(Duration::from_secs(2))
}

fn repository() -> HubRepository {
    HubRepository {
        name: "team/pics".to_owned(),
        revision: "main".to_owned(),
        is_explicit: false,
    }
}

fn page(names: &[&str]) -> String {
    let entries = names.iter().map(|name| {
        format!(r#"{{"type": "file", "oid": "o", "size": 3, "path": "{name}", "more": []}}"#)
    });
    format!("[{}]", entries.collect::<Vec<_>>().join(","))
}

#[test]
fn the_next_page_is_that_of_the_link_called_next() {
    let check = |text: &str, expected: Option<&str>| {
        assert_eq!(next_page(text).as_deref(), expected, "{text}");
    };
    check(
        "<http://h/a?b=1,2;c>; rel=\"next\"",
        Some("http://h/a?b=1,2;c"),
    );
    check("<a>; rel=\"last\", <b>; title=\"x\"; rel=next", Some("b"));
    check("<a>; rel=\"next\", <b>; rel=\"last\"", Some("a"));
    check("<a>; rel=\"last\"", None);
    check("a; rel=next", None);
    check("", None);
}

#[test]
fn a_range_has_a_beginning_and_the_size_of_the_file() {
    assert_eq!(content_range("bytes 5-9/12"), Some((Some(5), 12)));
    assert_eq!(content_range("bytes */12"), Some((None, 12)));
    for wrong in ["bytes 5-9/*", "bytes", "bits 0-1/2", "bytes x-9/12", ""] {
        assert_eq!(content_range(wrong), None, "{wrong}");
    }
}

#[tokio::test]
async fn pages_are_read_to_the_last_and_only_from_the_hub() {
    let next = "200 OK\r\nlink: <HERE/page?cursor=a%2Cb>; rel=\"next\"";
    let pages = [
        (next, page(&["a.png", "b.txt"])),
        ("503 Busy", String::new()),
        ("200 OK", page(&["c.png"])),
    ];
    let wanted = |name: &str| name.contains(".png");
    let hub = client(&pages).await;
    let files = hub.files(&repository(), COMMIT, "", wanted).await.unwrap();
    let names: Vec<&str> = files.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(names, ["a.png", "c.png"]);
    let elsewhere = "200 OK\r\nlink: <http://127.0.0.1:1/page>; rel=\"next\"";
    let hub = client(&[(elsewhere, page(&["a.png"]))]).await;
    let error = hub
        .files(&repository(), COMMIT, "", wanted)
        .await
        .unwrap_err();
    assert!(error.is_lasting());
    assert!(
        error.to_string().contains("is not a page of the hub"),
        "{error}"
    );
}

#[tokio::test]
async fn an_answer_that_is_no_answer_of_the_hub_is_an_error() {
    for (body, expected) in [
        (
            "{\"sha\": \"main\"}".to_owned(),
            "not 40 hexadecimal digits",
        ),
        ("<html>".to_owned(), "is not an answer of the hub"),
        ("x".repeat(17 << 20), "more than 16777216 bytes"),
    ] {
        let hub = client(&[("200 OK", body)]).await;
        let error = hub.commit(&repository()).await.unwrap_err();
        assert!(error.is_lasting());
        assert!(error.to_string().contains(expected), "{error}");
    }
}

#[tokio::test]
async fn a_hub_that_stays_busy_is_asked_for_a_bounded_time() {
    let busy = ("429 Busy\r\nretry-after: 3", String::new());
    let hub = client(&[busy.clone(), busy]).await;
    let error = hub.commit(&repository()).await.unwrap_err();
    assert!(!error.is_lasting());
    let text = error.to_string();
    assert!(
        text.contains("429") && text.contains("after retries for 2s"),
        "{text}"
    );
}

#[tokio::test]
async fn a_block_is_what_was_asked_for_or_an_error() {
    let whole = ("200 OK", "abcdef".to_owned());
    let part = ("206 Part\r\ncontent-range: bytes 2-3/6", "cd".to_owned());
    let other = ("206 Part\r\ncontent-range: bytes 1-2/6", "bc".to_owned());
    let short = ("206 Part\r\ncontent-range: bytes 2-3/6", "c".to_owned());
    let empty = ("416 Range\r\ncontent-range: bytes */0", String::new());
    let block = async |answer, range| {
        let hub = client(&[answer]).await;
        hub.block(&repository(), COMMIT, "a.png", range).await
    };
    for answer in [whole.clone(), part] {
        let found = block(answer, 2..4).await.unwrap();
        assert_eq!((&found.bytes[..], found.file_bytes), (&b"cd"[..], 6));
    }
    let found = block(whole, 4..10).await.unwrap();
    assert_eq!((&found.bytes[..], found.file_bytes), (&b"ef"[..], 6));
    assert_eq!(block(empty, 0..4).await.unwrap().file_bytes, 0);
    for answer in [other, short] {
        let error = block(answer, 2..4).await.unwrap_err();
        assert!(error.to_string().contains("other bytes"), "{error}");
    }
}

#[test]
fn an_endpoint_or_a_token_that_cannot_be_is_refused_by_name() {
    let check = |endpoint: Option<&str>, token: Option<&str>, expected: &str| {
        let access = HubAccess {
            endpoint: endpoint.map(str::to_owned),
            token: token.map(str::to_owned),
        };
        let error = HubClient::new(access).unwrap_err();
        assert!(error.to_string().contains(expected), "{error}");
    };
    check(Some("hub.example"), None, "HF_ENDPOINT hub.example");
    check(
        Some("ftp://hub.example"),
        None,
        "HF_ENDPOINT ftp://hub.example",
    );
    check(None, Some("a\nb"), "HF_TOKEN contains characters");
}
