//! Small HTTP server, whose answers a test makes: a bucket or a web server.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

pub(crate) struct Request {
    pub(crate) method: String,
    /// Path without the query, as it was sent.
    pub(crate) path: String,
    pub(crate) query: String,
    /// Headers by their names in lower case.
    pub(crate) headers: BTreeMap<String, String>,
    pub(crate) body: Vec<u8>,
}

impl Request {
    /// Returns the range of bytes that is asked for, of a file of `length`
    /// bytes.
    fn range(&self, length: usize) -> Option<std::ops::Range<usize>> {
        let range = self.headers.get("range")?.strip_prefix("bytes=")?;
        let (start, end) = range.split_once('-')?;
        let end: usize = end.parse().ok()?;
        Some(start.parse().ok()?..(end + 1).min(length))
    }
}

pub(crate) struct Answer {
    pub(crate) status: &'static str,
    pub(crate) headers: Vec<(&'static str, String)>,
    pub(crate) body: Vec<u8>,
}

impl Answer {
    pub(crate) fn new(status: &'static str, body: impl Into<Vec<u8>>) -> Self {
        Self {
            status,
            headers: Vec::new(),
            body: body.into(),
        }
    }

    pub(crate) fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    /// Answers with a file, or the part of it that is asked for.
    pub(crate) fn file(request: &Request, content: &[u8]) -> Self {
        let answer = match request.range(content.len()) {
            Some(range) => {
                let place = format!("bytes {}-{}/{}", range.start, range.end - 1, content.len());
                Self::new("206 Partial Content", &content[range]).with("content-range", place)
            }
            None => Self::new("200 OK", content),
        };
        answer
            .with("etag", "\"1\"")
            .with("last-modified", "Mon, 01 Jan 2024 00:00:00 GMT")
    }
}

/// Starts a server that lives as long as the tests.
pub(crate) fn serve(answer: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
    let addr = listener.local_addr().expect("its address");
    let answer = Arc::new(answer);
    let serve = move || {
        for stream in listener.incoming().flatten() {
            let answer = Arc::clone(&answer);
            in_thread(move || one(&stream, answer.as_ref()));
        }
    };
    in_thread(serve);
    addr
}

fn in_thread(body: impl FnOnce() + Send + 'static) {
    let named = std::thread::Builder::new().name("server".to_owned());
    named.spawn(body).expect("a thread");
}

/// Reads one request and answers it; a client that leaves is no fault.
fn one(mut stream: &TcpStream, answer: &dyn Fn(&Request) -> Answer) {
    let mut reader = BufReader::new(stream);
    let mut lines = reader.by_ref().lines().map_while(Result::ok);
    let Some(first) = lines.next() else { return };
    let mut words = first.split(' ');
    let method = words.next().unwrap_or_default().to_owned();
    let target = words.next().unwrap_or_default();
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let headers: BTreeMap<String, String> = lines
        .take_while(|line| !line.is_empty())
        .filter_map(|line| {
            let (name, value) = line.split_once(':')?;
            Some((name.to_ascii_lowercase(), value.trim().to_owned()))
        })
        .collect();
    let length = headers.get("content-length");
    let length = length.map_or(0, |length| length.parse().expect("a length"));
    let mut body = vec![0; length];
    if reader.read_exact(&mut body).is_err() {
        return;
    }
    let request = Request {
        method,
        path: path.to_owned(),
        query: query.to_owned(),
        headers,
        body,
    };
    let Answer {
        status,
        headers,
        body,
    } = answer(&request);
    let mut head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n",
        body.len()
    );
    for (name, value) in headers {
        let _ = write!(head, "{name}: {value}\r\n");
    }
    head.push_str("\r\n");
    let sent = stream.write_all(head.as_bytes());
    if sent.is_ok() && request.method != "HEAD" {
        let _ = stream.write_all(&body);
    }
}

/// Object of a bucket.
#[derive(Clone)]
pub(crate) enum Object {
    Content(Vec<u8>),
    /// Object in cold storage, which is listed and cannot be read.
    Cold(usize),
}

/// Starts a server that speaks as much of S3's protocol as a job needs, for the
/// bucket `b`. A request without a signature of the key `KEY` is refused.
pub(crate) fn bucket(objects: BTreeMap<String, Object>) -> SocketAddr {
    let objects = Mutex::new(objects);
    serve(move |request| {
        let mut objects = objects.lock().expect("a lock");
        let signed = request.headers.get("authorization");
        if !signed.is_some_and(|signed| signed.contains("Credential=KEY/")) {
            return Answer::new(
                "403 Forbidden",
                "<Error><Code>InvalidAccessKeyId</Code></Error>",
            );
        }
        let Some(key) = request.path.strip_prefix("/b").map(decoded) else {
            return Answer::new("404 Not Found", "<Error><Code>NoSuchBucket</Code></Error>");
        };
        if request.query.contains("list-type=2") {
            return listing(&objects, &request.query);
        }
        let key = key.trim_start_matches('/');
        match request.method.as_str() {
            "PUT" if request.headers.contains_key("if-none-match") && objects.contains_key(key) => {
                let reason = "<Error><Code>PreconditionFailed</Code></Error>";
                return Answer::new("412 Precondition Failed", reason);
            }
            "PUT" => {
                let content = Object::Content(request.body.clone());
                objects.insert(key.to_owned(), content);
                return Answer::new("200 OK", "").with("etag", "\"1\"");
            }
            "DELETE" => {
                objects.remove(key);
                return Answer::new("204 No Content", "");
            }
            _ => {}
        }
        match objects.get(key) {
            Some(Object::Content(content)) => Answer::file(request, content),
            Some(Object::Cold(length)) if request.method == "HEAD" => {
                Answer::file(request, &vec![0; *length])
            }
            Some(Object::Cold(_)) => Answer::new(
                "403 Forbidden",
                "<Error><Code>InvalidObjectState</Code><StorageClass>GLACIER</StorageClass></Error>",
            ),
            None => Answer::new("404 Not Found", "<Error><Code>NoSuchKey</Code></Error>"),
        }
    })
}

fn listing(objects: &BTreeMap<String, Object>, query: &str) -> Answer {
    let prefix = query
        .split('&')
        .find_map(|part| part.strip_prefix("prefix="));
    let prefix = decoded(prefix.unwrap_or_default());
    let mut page = String::from("<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>false");
    page.push_str("</IsTruncated>");
    for (key, object) in objects.iter().filter(|(key, _)| key.starts_with(&prefix)) {
        let length = match object {
            Object::Content(content) => content.len(),
            Object::Cold(length) => *length,
        };
        let _ = write!(
            page,
            "<Contents><Key>{key}</Key><LastModified>2024-01-01T00:00:00.000Z</LastModified>\
             <ETag>\"1\"</ETag><Size>{length}</Size></Contents>"
        );
    }
    page.push_str("</ListBucketResult>");
    Answer::new("200 OK", page)
}

/// Decodes the escapes of a URL.
fn decoded(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut left = text.as_bytes();
    while let Some((&byte, rest)) = left.split_first() {
        let code = rest
            .get(..2)
            .and_then(|code| std::str::from_utf8(code).ok());
        let code = code.and_then(|code| u8::from_str_radix(code, 16).ok());
        if let (b'%', Some(code)) = (byte, code) {
            bytes.push(code);
            left = &rest[2..];
        } else {
            bytes.push(byte);
            left = rest;
        }
    }
    String::from_utf8(bytes).expect("UTF-8")
}
