//! Check that keeps other people's web pages from a worker on loopback that
//! asks for no token.
//!
//! A browser sends the name under which it reached the worker as `Host`
//! (`host.rs` says what that is good for), and the page's origin as `Origin`. So
//! pages, and calls that have an origin, must come under a name of loopback, and
//! calls from the worker's own page. Programs send no origin, and may use any
//! name.

use std::sync::Arc;

use http::{Method, Request, Response, StatusCode, header};
use tonic::body::Body;
use tower_http::validate_request::ValidateRequest;

use super::not_grpc;
use crate::serve::config::{ANY_ORIGIN, AccessConfig};
use crate::serve::host::{header_text, host, is_loopback_name};

/// Answer to a page's request under a name that is not loopback's.
const OTHER_HOST: &str = "without tokens, browsers reach this worker as localhost, 127.0.0.1 or \
                          [::1] alone; for another name give --cors-origin with the origin of \
                          that name, or --auth-tokens-file\n";
/// Answer to a call from another origin.
const OTHER_ORIGIN: &str = "calls of pages of another origin are refused; --cors-origin allows \
                            them\n";

/// Check that refuses what may come from other people's pages.
#[derive(Debug, Clone)]
pub(super) struct OwnPages {
    /// Origins of --cors-origin.
    origins: Arc<[String]>,
    /// True if a page is served, which is guarded too.
    has_page: bool,
}

impl OwnPages {
    /// Returns the check if a worker on loopback needs it: where browsers may
    /// call without a token, and not every origin is allowed.
    pub(super) fn new(config: &AccessConfig) -> Option<Self> {
        let is_needed = config.serves_web()
            && config.auth_tokens_file.is_none()
            && !config
                .cors_origins
                .iter()
                .any(|origin| origin == ANY_ORIGIN);
        is_needed.then(|| Self {
            origins: config.cors_origins.clone().into(),
            has_page: config.playground,
        })
    }

    /// Returns the answer to a request that is refused.
    fn refusal<B>(&self, request: &Request<B>) -> Option<(StatusCode, &'static str)> {
        let host = host(request);
        let is_read = [Method::GET, Method::HEAD].contains(request.method());
        let Some(origin) = request.headers().get(header::ORIGIN) else {
            let is_refused = self.has_page && is_read && !self.knows(host);
            return is_refused.then_some((StatusCode::MISDIRECTED_REQUEST, OTHER_HOST));
        };
        let origin = header_text(Some(origin));
        if self.origins.iter().any(|allowed| allowed == origin) {
            return None;
        }
        if !self.knows(host) {
            return Some((StatusCode::MISDIRECTED_REQUEST, OTHER_HOST));
        }
        // The browser asks before calls of other origins, and is told by CORS.
        let is_question = request.method() == Method::OPTIONS;
        (!is_question && !is_origin_of(origin, host))
            .then_some((StatusCode::FORBIDDEN, OTHER_ORIGIN))
    }

    /// Returns true if a host is loopback, or that of an allowed origin.
    fn knows(&self, host: &str) -> bool {
        is_loopback_name(host) || self.origins.iter().any(|origin| is_origin_of(origin, host))
    }
}

/// Returns true if an origin is that of pages from `host`. The schemes are not
/// compared: a proxy may add TLS.
fn is_origin_of(origin: &str, host: &str) -> bool {
    let parts = [("http://", ":80"), ("https://", ":443")];
    parts.iter().any(|(scheme, port)| {
        let short = |name: &'static str, text: &str| text.strip_suffix(name).map(str::len);
        origin.strip_prefix(scheme).is_some_and(|of| {
            // The port of the scheme may be left out.
            let of = &of[..short(port, of).unwrap_or(of.len())];
            let host = &host[..short(port, host).unwrap_or(host.len())];
            !host.is_empty() && of.eq_ignore_ascii_case(host)
        })
    })
}

impl ValidateRequest<Body> for OwnPages {
    type ResponseBody = Body;

    fn validate(&mut self, request: &mut Request<Body>) -> Result<(), Response<Body>> {
        match self.refusal(request) {
            None => Ok(()),
            Some((status, text)) => Err(not_grpc::answer(status, text)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_of_hosts() {
        let check = |origin, host, expected| {
            assert_eq!(is_origin_of(origin, host), expected, "{origin} {host}");
        };
        check("http://127.0.0.1:50051", "127.0.0.1:50051", true);
        check("https://localhost:50051", "LocalHost:50051", true);
        check("http://localhost", "localhost:80", true);
        check("https://a.example:443", "a.example", true);
        check("http://127.0.0.1:8080", "127.0.0.1:50051", false);
        check("http://127.0.0.1:50051", "localhost:50051", false);
        check("http://localhost", "localhost:443", false);
        check("null", "null", false);
        check("http://", "", false);
        check("file://", "", false);
    }

    #[test]
    fn requests() {
        let check = |origins: &[&str],
                     method: Method,
                     host: &str,
                     origin: Option<&str>,
                     expected: Option<u16>| {
            let guard = OwnPages {
                origins: origins.iter().map(|&origin| origin.to_owned()).collect(),
                has_page: true,
            };
            let mut request = Request::builder()
                .method(&method)
                .uri("/x")
                .header(header::HOST, host);
            if let Some(origin) = origin {
                request = request.header(header::ORIGIN, origin);
            }
            let refusal = guard.refusal(&request.body(()).expect("a request"));
            let status = refusal.map(|(status, _)| status.as_u16());
            assert_eq!(status, expected, "{origins:?} {method} {host} {origin:?}");
        };
        let (own, evil) = ("http://localhost:1", "http://evil.example:1");
        let app = "https://app.example";
        check(&[], Method::GET, "localhost:1", None, None);
        check(&[], Method::HEAD, "evil.example:1", None, Some(421));
        check(&[], Method::GET, "", None, Some(421));
        // Programs use any name.
        check(&[], Method::POST, "worker.svc:1", None, None);
        check(&[], Method::POST, "localhost:1", Some(own), None);
        check(&[], Method::POST, "evil.example:1", Some(evil), Some(421));
        check(&[], Method::POST, "localhost:1", Some(evil), Some(403));
        check(&[], Method::POST, "localhost:1", Some("null"), Some(403));
        check(&[], Method::OPTIONS, "localhost:1", Some(evil), None);
        check(&[], Method::GET, "localhost:1", Some(evil), Some(403));
        // A proxy on this machine, under a name that is allowed.
        check(&[app], Method::GET, "app.example", None, None);
        check(&[app], Method::POST, "app.example", Some(app), None);
        check(&[app], Method::POST, "localhost:1", Some(app), None);
        check(&[app], Method::POST, "localhost:1", Some(evil), Some(403));
    }
}
