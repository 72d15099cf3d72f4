//! Images that a list names by URL. What a server does with one is that image's
//! outcome: of a million addresses some are gone, and their job goes on.
//!
//! What may pass (a server that is busy, away or slow) is asked again for a
//! while; what will not (an address that is gone or forbidden, a host that nobody
//! knows) is an error at once.

use std::error::Error as _;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use reqwest::header::{HeaderMap, RETRY_AFTER};
use reqwest::{Client, StatusCode, Url};
use tokio::time::Instant;

use crate::rpc::pool::Fault;

/// Rests between attempts: the first, and what they double up to.
const REST_MIN: Duration = Duration::from_millis(500);
const REST_MAX: Duration = Duration::from_secs(10);
/// Some servers answer nobody who does not say who they are.
const USER_AGENT: &str = concat!("imagegpt/", env!("CARGO_PKG_VERSION"));

/// What is at an address.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Answer {
    Image(Bytes),
    /// So many bytes or more, which is over the limit.
    TooLarge(u64),
}

/// What keeps an image from being read.
#[derive(Debug, PartialEq, Eq)]
enum Failure {
    Lasting(Fault),
    /// And the rest that the server asks for.
    Passing(Fault, Option<Duration>),
}

/// A client of all servers.
///
/// # Errors
///
/// When the process cannot have one.
pub(super) fn client(connect: Duration, request: Duration) -> reqwest::Result<Client> {
    // Whichever of the two libraries of TLS comes first installs it.
    let _ = tokio_rustls::rustls::crypto::ring::default_provider().install_default();
    Client::builder()
        .user_agent(USER_AGENT)
        .connect_timeout(connect)
        .timeout(request)
        .build()
}

/// Reads an image of `max` bytes at most; what may pass is tried again for
/// `patience`.
pub(super) async fn read(
    client: &Client,
    url: &Url,
    max: u64,
    patience: Duration,
) -> Result<Answer, Fault> {
    let started = Instant::now();
    let mut rest = REST_MIN;
    loop {
        let (fault, asked) = match attempt(client, url, max).await {
            Ok(answer) => return Ok(answer),
            Err(Failure::Lasting(fault)) => return Err(fault),
            Err(Failure::Passing(fault, asked)) => (fault, asked),
        };
        let wait = asked.unwrap_or_default().max(rest);
        if started.elapsed() + wait > patience {
            return Err(Fault {
                message: format!(
                    "{}, also when asked again for {} (--url-patience)",
                    fault.message,
                    humantime::format_duration(patience)
                ),
                ..fault
            });
        }
        tokio::time::sleep(wait).await;
        rest = (rest * 2).min(REST_MAX);
    }
}

async fn attempt(client: &Client, url: &Url, max: u64) -> Result<Answer, Failure> {
    let mut response = client.get(url.clone()).send().await.map_err(unanswered)?;
    let status = response.status();
    if !status.is_success() {
        return Err(refused(status, response.headers()));
    }
    if let Some(bytes) = response.content_length().filter(|&bytes| bytes > max) {
        return Ok(Answer::TooLarge(bytes));
    }
    let mut image = BytesMut::new();
    while let Some(chunk) = response.chunk().await.map_err(unanswered)? {
        let bytes = (image.len() + chunk.len()) as u64;
        if bytes > max {
            return Ok(Answer::TooLarge(bytes));
        }
        image.extend_from_slice(&chunk);
    }
    Ok(Answer::Image(image.freeze()))
}

/// What an answer other than the image means.
fn refused(status: StatusCode, headers: &HeaderMap) -> Failure {
    let code = match status.as_u16() {
        401 | 403 => "PERMISSION_DENIED",
        404 | 410 => "NOT_FOUND",
        408 | 429 | 500.. => "UNAVAILABLE",
        _ => "FAILED_PRECONDITION",
    };
    let fault = Fault {
        code,
        message: format!("the server answered {status}"),
    };
    if code != "UNAVAILABLE" {
        return Failure::Lasting(fault);
    }
    let asked = headers.get(RETRY_AFTER).and_then(|text| text.to_str().ok());
    let asked = asked.and_then(|seconds| seconds.parse().ok());
    Failure::Passing(fault, asked.map(Duration::from_secs))
}

/// What it means that there is no answer, or not all of it.
fn unanswered(error: reqwest::Error) -> Failure {
    let error = error.without_url();
    let causes = std::iter::successors(error.source(), |&cause| cause.source());
    let causes: Vec<String> = causes.map(ToString::to_string).collect();
    // The system's own resolver has no kind of error for it.
    let unresolved = causes.iter().any(|cause| {
        cause.contains("failed to lookup address") && !cause.contains("Temporary failure")
    });
    let is_lasting = unresolved || error.is_redirect() || error.is_builder();
    let code = match (unresolved, error.is_timeout()) {
        (true, _) => "NOT_FOUND",
        (_, true) => "DEADLINE_EXCEEDED",
        _ if is_lasting => "FAILED_PRECONDITION",
        _ => "UNAVAILABLE",
    };
    let what = causes.last().cloned();
    let fault = Fault {
        code,
        message: format!(
            "the server gave no answer: {}",
            what.unwrap_or_else(|| error.to_string())
        ),
    };
    if is_lasting {
        Failure::Lasting(fault)
    } else {
        Failure::Passing(fault, None)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;

    use super::*;

    const SHORT: Duration = Duration::from_secs(5);

    /// A server that gives each connection the next of these answers.
    async fn server(answers: &[&'static str]) -> Url {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/a.png", listener.local_addr().unwrap());
        let answers = answers.to_vec();
        tokio::spawn(async move {
            for answer in answers {
                let (mut stream, _) = listener.accept().await.unwrap();
                let _ = stream.read(&mut [0; 4096]).await.unwrap();
                stream.write_all(answer.as_bytes()).await.unwrap();
            }
        });
        url.parse().unwrap()
    }

    async fn read_from(answers: &[&'static str], patience: Duration) -> Result<Answer, Fault> {
        let url = server(answers).await;
        read(&client(SHORT, SHORT).unwrap(), &url, 4, patience).await
    }

    fn refusal(status: u16) -> Failure {
        refused(StatusCode::from_u16(status).unwrap(), &HeaderMap::new())
    }

    #[test]
    fn what_a_server_says_lasts_or_passes() {
        let check = |status, expected: &str, lasts: bool| match refusal(status) {
            Failure::Lasting(fault) => assert_eq!((fault.code, true), (expected, lasts)),
            Failure::Passing(fault, _) => assert_eq!((fault.code, false), (expected, lasts)),
        };
        check(400, "FAILED_PRECONDITION", true);
        check(401, "PERMISSION_DENIED", true);
        check(403, "PERMISSION_DENIED", true);
        check(404, "NOT_FOUND", true);
        check(410, "NOT_FOUND", true);
        check(451, "FAILED_PRECONDITION", true);
        check(408, "UNAVAILABLE", false);
        check(429, "UNAVAILABLE", false);
        check(500, "UNAVAILABLE", false);
        check(503, "UNAVAILABLE", false);
        let headers = HeaderMap::from_iter([(RETRY_AFTER, "7".parse().unwrap())]);
        let Failure::Passing(_, asked) = refused(StatusCode::SERVICE_UNAVAILABLE, &headers) else {
            panic!("a busy server may be free again");
        };
        assert_eq!(asked, Some(Duration::from_secs(7)));
    }

    #[tokio::test]
    async fn what_passes_is_asked_again_and_what_lasts_is_not() {
        let busy = "HTTP/1.1 503 Busy\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let cut = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\na";
        let image = "HTTP/1.1 200 OK\r\ncontent-length: 3\r\nconnection: close\r\n\r\nabc";
        let gone = "HTTP/1.1 410 Gone\r\ncontent-length: 0\r\nconnection: close\r\n\r\n";
        let got = read_from(&[busy, cut, image], SHORT).await;
        assert_eq!(got, Ok(Answer::Image(Bytes::from_static(b"abc"))));
        let got = read_from(&[gone, image], SHORT).await.unwrap_err();
        assert_eq!(got.message, "the server answered 410 Gone");
        // Longer than there is patience for.
        let got = read_from(&[busy, image], REST_MIN / 2).await.unwrap_err();
        assert_eq!(got.code, "UNAVAILABLE");
        assert!(got.message.contains("(--url-patience)"), "{}", got.message);
    }

    #[tokio::test]
    async fn what_is_too_large_is_not_read_to_its_end() {
        let long = "HTTP/1.1 200 OK\r\ncontent-length: 5\r\nconnection: close\r\n\r\n";
        assert_eq!(read_from(&[long], SHORT).await, Ok(Answer::TooLarge(5)));
        // Of a length that nobody says.
        let stream = "HTTP/1.1 200 OK\r\nconnection: close\r\n\r\nabcde";
        assert_eq!(read_from(&[stream], SHORT).await, Ok(Answer::TooLarge(5)));
    }

    #[tokio::test]
    async fn a_server_that_is_not_there_may_come_and_a_host_that_nobody_knows_not() {
        let client = client(SHORT, SHORT).unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}/", listener.local_addr().unwrap());
        drop(listener);
        let failure = |url: Url| {
            let client = client.clone();
            async move { attempt(&client, &url, 4).await.unwrap_err() }
        };
        let refused = failure(url.parse().unwrap()).await;
        assert!(
            matches!(
                refused,
                Failure::Passing(
                    Fault {
                        code: "UNAVAILABLE",
                        ..
                    },
                    None
                )
            ),
            "{refused:?}"
        );
        // On a machine without a name server it is one that may come, too.
        let unknown = failure("http://nowhere.invalid/".parse().unwrap()).await;
        assert!(
            matches!(
                &unknown,
                Failure::Lasting(Fault {
                    code: "NOT_FOUND",
                    ..
                }) | Failure::Passing(
                    Fault {
                        code: "UNAVAILABLE",
                        ..
                    },
                    None
                )
            ),
            "{unknown:?}"
        );
    }
}
