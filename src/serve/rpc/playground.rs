//! Layer that serves the page of `--playground` beside gRPC-Web: four files of
//! the binary, which `make web` builds from `web/`.
//!
//! Nothing of a request gets into an answer, and nothing is read but its
//! method, its path and one header. The page asks for nothing but its own files
//! and the worker's calls, and its policy lets it ask for nothing else. The
//! page has no secret, so tokens are asked of its calls and not of itself.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use futures_util::future::Either;
use http::header::{self, HeaderName};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use sha2::{Digest as _, Sha256};
use tonic::body::Body;
use tower::{Layer, Service};

use super::leaving::{LeavingBody, Taking};

/// Headers of all answers of this layer. Styles and scripts are files of the
/// page alone, pictures come from the page's own memory, and calls go to the
/// page's own origin; no other page may frame this one.
const HEADERS: [(HeaderName, &str); 6] = [
    (
        header::CONTENT_SECURITY_POLICY,
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; \
         connect-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'; \
         require-trusted-types-for 'script'; trusted-types 'none'",
    ),
    (header::X_CONTENT_TYPE_OPTIONS, "nosniff"),
    (header::REFERRER_POLICY, "no-referrer"),
    (
        HeaderName::from_static("permissions-policy"),
        "camera=(self), microphone=(), geolocation=(), payment=(), usb=()",
    ),
    (
        HeaderName::from_static("cross-origin-resource-policy"),
        "same-origin",
    ),
    // A browser keeps the files, and asks by their tags whether they are still
    // the worker's.
    (header::CACHE_CONTROL, "no-cache"),
];
const GET_AND_HEAD: HeaderValue = HeaderValue::from_static("GET, HEAD");
const PLAIN: HeaderValue = HeaderValue::from_static("text/plain; charset=utf-8");
/// Answer to GET of any other path.
const NOT_FOUND: &str = "this port serves gRPC, gRPC-Web and, at /, a page for browsers; /metrics, \
                         /livez and /readyz are on the port of --metrics-listen\n";
/// Answer to other methods on the page's files.
const NOT_ALLOWED: &str = "this is a file of the page, for GET and HEAD alone\n";

/// File of the page.
#[derive(Debug)]
struct PageFile {
    path: &'static str,
    content_type: HeaderValue,
    content: &'static [u8],
    /// Entity tag of the content.
    tag: HeaderValue,
}

impl PageFile {
    fn new(path: &'static str, content_type: &'static str, content: &'static [u8]) -> Self {
        let hash = Sha256::digest(content);
        let number = hash
            .first_chunk()
            .map_or(0, |first| u64::from_be_bytes(*first));
        let tag = HeaderValue::from_str(&format!("\"{number:016x}\""));
        Self {
            path,
            content_type: HeaderValue::from_static(content_type),
            content,
            tag: tag.expect("hexadecimal digits in quotes are a header value"),
        }
    }

    /// Returns true if a browser has this very file already.
    fn is_known(&self, headers: &HeaderMap) -> bool {
        let tag = self.tag.as_bytes();
        headers
            .get_all(header::IF_NONE_MATCH)
            .iter()
            .flat_map(|value| value.as_bytes().split(|&byte| byte == b','))
            .map(<[u8]>::trim_ascii)
            .any(|known| known == b"*" || known.strip_prefix(b"W/").unwrap_or(known) == tag)
    }
}

/// Layer that answers requests for the page's files.
#[derive(Debug, Clone)]
pub(super) struct PlaygroundLayer(Arc<[PageFile; 4]>);

impl PlaygroundLayer {
    pub(super) fn new() -> Self {
        Self(Arc::new([
            PageFile::new(
                "/",
                "text/html; charset=utf-8",
                include_bytes!("../../../web/dist/index.html"),
            ),
            PageFile::new(
                "/page.css",
                "text/css; charset=utf-8",
                include_bytes!("../../../web/dist/page.css"),
            ),
            PageFile::new(
                "/page.js",
                "text/javascript; charset=utf-8",
                include_bytes!("../../../web/dist/page.js"),
            ),
            PageFile::new(
                "/NOTICE.txt",
                "text/plain; charset=utf-8",
                include_bytes!("../../../web/dist/NOTICE.txt"),
            ),
        ]))
    }

    /// Returns the answer to a request that is not for gRPC; `None` for one that
    /// may be a call, or a browser's question before a call.
    fn answer<B>(&self, request: &Request<B>) -> Option<Response<&'static [u8]>> {
        let (method, path) = (request.method(), request.uri().path());
        let is_read = method == Method::GET || method == Method::HEAD;
        let Some(file) = self.0.iter().find(|file| file.path == path) else {
            let is_call = method == Method::POST || method == Method::OPTIONS;
            return (!is_call).then(|| plain(StatusCode::NOT_FOUND, NOT_FOUND, is_read, method));
        };
        if !is_read {
            let mut answer = plain(StatusCode::METHOD_NOT_ALLOWED, NOT_ALLOWED, true, method);
            answer.headers_mut().insert(header::ALLOW, GET_AND_HEAD);
            return Some(answer);
        }
        let is_known = file.is_known(request.headers());
        let is_sent = method == Method::GET && !is_known;
        let mut answer = Response::new(if is_sent { file.content } else { b"" });
        let headers = answer.headers_mut();
        headers.insert(header::ETAG, file.tag.clone());
        headers.insert(header::CONTENT_TYPE, file.content_type.clone());
        if is_known {
            *answer.status_mut() = StatusCode::NOT_MODIFIED;
        } else {
            headers.insert(header::CONTENT_LENGTH, file.content.len().into());
        }
        Some(guarded(answer))
    }
}

/// Makes an answer of one line, without the line for HEAD.
fn plain(
    status: StatusCode,
    text: &'static str,
    has_length: bool,
    method: &Method,
) -> Response<&'static [u8]> {
    let is_sent = method != Method::HEAD;
    let mut answer = Response::new(if is_sent { text.as_bytes() } else { b"" });
    *answer.status_mut() = status;
    let headers = answer.headers_mut();
    headers.insert(header::CONTENT_TYPE, PLAIN);
    if has_length {
        headers.insert(header::CONTENT_LENGTH, text.len().into());
    }
    guarded(answer)
}

/// Adds the headers that all answers have.
fn guarded(mut answer: Response<&'static [u8]>) -> Response<&'static [u8]> {
    let headers = answer.headers_mut();
    for (name, value) in HEADERS {
        headers.insert(name, HeaderValue::from_static(value));
    }
    answer
}

impl<S> Layer<S> for PlaygroundLayer {
    type Service = WithPlayground<S>;

    fn layer(&self, inner: S) -> Self::Service {
        WithPlayground {
            inner,
            page: self.clone(),
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct WithPlayground<S> {
    inner: S,
    page: PlaygroundLayer,
}

impl<S> Service<Request<Body>> for WithPlayground<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Error: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Either<S::Future, PageAnswer<S::Error>>;

    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.inner.poll_ready(cx)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        match self.page.answer(&request) {
            None => Either::Left(self.inner.call(request)),
            Some(answer) => Either::Right(Box::pin(async move { Ok(leaving(answer)) })),
        }
    }
}

/// Future of an answer of this layer.
type PageAnswer<E> = Pin<Box<dyn Future<Output = Result<Response<Body>, E>> + Send>>;

/// Bounds the time in which a browser must read an answer (`--answer-timeout`).
/// Called within the task of the answer, which is the one that is watched.
fn leaving(answer: Response<&'static [u8]>) -> Response<Body> {
    answer.map(|content| {
        let body = Body::new(Full::new(Bytes::from_static(content)));
        let taking = Taking::of_this_call(false);
        Body::new(LeavingBody::new(body, taking, None, None, None))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_are_compared_as_a_list() {
        let file = PageFile::new("/x", "text/plain", b"content");
        let tag = file.tag.to_str().expect("ASCII").to_owned();
        let check = |given: &[&str], expected: bool| {
            let mut headers = HeaderMap::new();
            for given in given {
                let given = HeaderValue::from_str(given).expect("a value");
                headers.append(header::IF_NONE_MATCH, given);
            }
            assert_eq!(file.is_known(&headers), expected, "{given:?}");
        };
        check(&[], false);
        check(&[&tag], true);
        check(&[&format!("W/{tag}")], true);
        check(&[&format!("\"other\", {tag}")], true);
        check(&["\"other\"", &tag], true);
        check(&["*"], true);
        check(&["\"other\""], false);
        check(&[tag.trim_matches('"')], false);
    }

    #[test]
    fn only_files_of_the_page_are_answered() {
        let page = PlaygroundLayer::new();
        let check = |method: Method, path: &str, expected: Option<u16>| {
            let request = Request::builder().method(&method).uri(path).body(());
            let answer = page.answer(&request.expect("a request"));
            let status = answer.map(|answer| answer.status().as_u16());
            assert_eq!(status, expected, "{method} {path}");
        };
        check(Method::GET, "/", Some(200));
        check(Method::HEAD, "/page.js", Some(200));
        check(Method::GET, "/page.js?any=query", Some(200));
        check(Method::POST, "/", Some(405));
        check(Method::DELETE, "/page.css", Some(405));
        check(Method::GET, "/index.html", Some(404));
        check(Method::GET, "/../page.js", Some(404));
        check(Method::GET, "//", Some(404));
        check(Method::GET, "/imagegpt.v1.ImageGptService/Embed", Some(404));
        check(Method::PUT, "/imagegpt.v1.ImageGptService/Embed", Some(404));
        check(Method::POST, "/imagegpt.v1.ImageGptService/Embed", None);
        check(Method::OPTIONS, "/imagegpt.v1.ImageGptService/Embed", None);
    }
}
