//! Check that answers requests that are no gRPC calls: a person with a browser,
//! a probe or a scraper at the wrong port.
//!
//! The answer is one line of plain text that says what the port serves. Without
//! it an HTTP/1.1 client sees a connection that closes, or frames of HTTP/2, and
//! an HTTP/2 client takes the status 200 of a gRPC error for success.

use http::{HeaderMap, HeaderValue, Request, Response, StatusCode, Version, header};
use tonic::body::Body;
use tower_http::validate_request::ValidateRequest;

use crate::serve::host;

/// Answer to HTTP/1.1 and HTTP/1.0.
const OTHER_VERSION: &str = "this port serves gRPC over HTTP/2 and not HTTP/1.1; /metrics, /livez \
                             and /readyz are on the port of --metrics-listen, and --grpc-web lets \
                             browsers call here\n";
/// Answer to a request of HTTP/2 that has another content type.
const OTHER_TYPE: &str = "this port serves gRPC, whose content-type is application/grpc; /metrics, \
                          /livez and /readyz are on the port of --metrics-listen\n";
/// Answer to a request of gRPC-Web where it is not served.
const WEB_TYPE: &str = "this port serves gRPC, whose content-type is application/grpc; gRPC-Web \
                        needs the worker's flag --grpc-web\n";
/// Beginning of the content types of gRPC, after which there may be nothing, a
/// format or a parameter.
const GRPC: &str = "application/grpc";

/// Check in front of everything that reads gRPC.
#[derive(Debug, Clone, Copy)]
pub(super) struct GrpcOnly {
    /// True if HTTP/1.1 is served, for gRPC-Web.
    pub(super) http1: bool,
}

impl ValidateRequest<Body> for GrpcOnly {
    type ResponseBody = Body;

    fn validate(&mut self, request: &mut Request<Body>) -> Result<(), Response<Body>> {
        match refusal(request.version(), request.headers(), self.http1) {
            None => Ok(()),
            Some((status, text)) => Err(answer(status, text)),
        }
    }
}

/// Returns the answer to a request that is no gRPC call; `None` for a call.
fn refusal(
    version: Version,
    headers: &HeaderMap,
    http1: bool,
) -> Option<(StatusCode, &'static str)> {
    if version < Version::HTTP_2 && !http1 {
        return Some((StatusCode::HTTP_VERSION_NOT_SUPPORTED, OTHER_VERSION));
    }
    let given = headers
        .get(header::CONTENT_TYPE)
        .map_or(&b""[..], HeaderValue::as_bytes);
    let after = given
        .split_at_checked(GRPC.len())
        .filter(|(start, _)| start.eq_ignore_ascii_case(GRPC.as_bytes()));
    match after.map(|(_, after)| after) {
        Some([] | [b'+' | b';' | b' ', ..]) => None,
        Some([b'-', ..]) => Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, WEB_TYPE)),
        _ => Some((StatusCode::UNSUPPORTED_MEDIA_TYPE, OTHER_TYPE)),
    }
}

/// Check that a request over HTTP/1.1 has one `Host`.
#[derive(Debug, Clone, Copy)]
pub(super) struct OneHost;

impl ValidateRequest<Body> for OneHost {
    type ResponseBody = Body;

    fn validate(&mut self, request: &mut Request<Body>) -> Result<(), Response<Body>> {
        if host::has_one_host(request) {
            return Ok(());
        }
        Err(answer(StatusCode::BAD_REQUEST, host::BAD_HOST))
    }
}

/// Makes an answer for a person or program that does not speak gRPC.
pub(super) fn answer(status: StatusCode, text: &'static str) -> Response<Body> {
    let mut response = Response::new(Body::new(text.to_owned()));
    *response.status_mut() = status;
    let plain = HeaderValue::from_static("text/plain; charset=utf-8");
    response.headers_mut().insert(header::CONTENT_TYPE, plain);
    response
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_types_of_grpc_pass() {
        let check = |given: Option<&str>, expected: Option<&str>| {
            let mut headers = HeaderMap::new();
            if let Some(given) = given {
                let given = HeaderValue::from_str(given).expect("a value");
                headers.insert(header::CONTENT_TYPE, given);
            }
            let got = refusal(Version::HTTP_2, &headers, false);
            let expected = expected.map(|text| (StatusCode::UNSUPPORTED_MEDIA_TYPE, text));
            assert_eq!(got, expected, "{given:?}");
        };
        check(Some("application/grpc"), None);
        check(Some("application/grpc+proto"), None);
        check(Some("Application/gRPC; charset=utf-8"), None);
        check(Some("application/grpc-web"), Some(WEB_TYPE));
        check(Some("application/grpc-web-text+proto"), Some(WEB_TYPE));
        check(Some("application/grpcx"), Some(OTHER_TYPE));
        check(Some("application/json"), Some(OTHER_TYPE));
        check(Some(""), Some(OTHER_TYPE));
        check(None, Some(OTHER_TYPE));
    }

    #[test]
    fn older_versions_are_told_unless_they_are_served() {
        let mut headers = HeaderMap::new();
        let grpc = HeaderValue::from_static("application/grpc");
        headers.insert(header::CONTENT_TYPE, grpc);
        for version in [Version::HTTP_10, Version::HTTP_11] {
            let told = (StatusCode::HTTP_VERSION_NOT_SUPPORTED, OTHER_VERSION);
            assert_eq!(refusal(version, &headers, false), Some(told));
            assert_eq!(refusal(version, &headers, true), None);
        }
    }
}
