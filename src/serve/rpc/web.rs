//! gRPC-Web, for browsers and gateways that cannot speak gRPC's HTTP/2, and the
//! CORS headers without which a browser does not let a page call.
//!
//! With gRPC-Web, connections may also speak HTTP/1.1, with one call at a time.
//! hyper closes such a connection if the head of its next request does not
//! arrive within 30 s or is over hyper's own limits (100 headers, 400 KiB). The
//! body of a request has `--request-timeout`, as on any other connection.

use std::net::SocketAddr;
use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, Request, header};
use tonic::body::Body;
use tonic_web::GrpcWebLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use super::own_pages::OwnPages;
use super::playground::PlaygroundLayer;
use super::report::TIMING;
use crate::serve::config::{ANY_ORIGIN, AccessConfig};

/// Time for which a browser may cache the answer to a CORS preflight request.
const PREFLIGHT_MAX_AGE: Duration = Duration::from_hours(1);

/// Request headers that pages may send.
const REQUEST_HEADERS: [HeaderName; 8] = [
    header::AUTHORIZATION,
    header::CONTENT_TYPE,
    HeaderName::from_static("grpc-timeout"),
    HeaderName::from_static("imagegpt-priority"),
    HeaderName::from_static("traceparent"),
    HeaderName::from_static("x-grpc-web"),
    HeaderName::from_static("x-request-id"),
    HeaderName::from_static("x-user-agent"),
];
/// Response headers that pages may read.
const RESPONSE_HEADERS: [HeaderName; 5] = [
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-status"),
    HeaderName::from_static("grpc-status-details-bin"),
    TIMING,
    HeaderName::from_static("x-request-id"),
];

/// Content types of gRPC-Web, as the library that translates it knows them.
const CONTENT_TYPES: [&str; 4] = [
    "application/grpc-web",
    "application/grpc-web+proto",
    "application/grpc-web-text",
    "application/grpc-web-text+proto",
];

/// Change of a request before its content type is read.
pub(super) type Rename = fn(Request<Body>) -> Request<Body>;

/// Writes a content type of gRPC-Web as the library knows it: in small letters
/// and without parameters, which a client may add (RFC 9110, 8.3.1).
pub(super) fn name_type(mut request: Request<Body>) -> Request<Body> {
    if let Some(given) = request.headers_mut().get_mut(header::CONTENT_TYPE)
        && let Ok(text) = given.to_str()
        && let media = text.split(';').next().unwrap_or_default().trim()
        && let Some(known) = CONTENT_TYPES
            .into_iter()
            .find(|known| known.eq_ignore_ascii_case(media))
    {
        *given = HeaderValue::from_static(known);
    }
    request
}

/// Layers for gRPC-Web; none if it is not served.
#[derive(Debug, Clone, Default)]
pub(super) struct Web {
    /// Layer that translates gRPC-Web; if set, connections may speak HTTP/1.1.
    pub(super) calls: Option<GrpcWebLayer>,
    pub(super) cors: Option<CorsLayer>,
    /// Layer that serves the page of --playground.
    pub(super) page: Option<PlaygroundLayer>,
    own_pages: Option<OwnPages>,
}

impl Web {
    pub(super) fn new(config: &AccessConfig) -> Self {
        if !config.serves_web() {
            return Self::default();
        }
        Self {
            calls: Some(GrpcWebLayer::new()),
            cors: cors(&config.cors_origins),
            page: config.playground.then(PlaygroundLayer::new),
            own_pages: OwnPages::new(config),
        }
    }

    /// Returns the check that keeps other people's pages away, if the worker
    /// needs it at this address.
    pub(super) fn own_pages(&self, listen: SocketAddr) -> Option<OwnPages> {
        let is_loopback = listen.ip().to_canonical().is_loopback();
        self.own_pages.clone().filter(|_| is_loopback)
    }
}

/// Returns the CORS layer; none without origins, since pages of the worker's
/// own origin need no permission.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origins = match origins {
        [] => return None,
        [only] if only == ANY_ORIGIN => AllowOrigin::any(),
        origins => {
            // The flags were checked: every origin is a valid header value.
            let values = origins.iter().filter_map(|o| HeaderValue::from_str(o).ok());
            AllowOrigin::list(values)
        }
    };
    // The browser's own credentials (cookies) are not allowed, since tokens
    // come in a header.
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::POST])
            .allow_headers(REQUEST_HEADERS)
            .expose_headers(RESPONSE_HEADERS)
            .max_age(PREFLIGHT_MAX_AGE),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn content_types_are_told_apart_as_http_has_it() {
        let check = |given: &str, expected: &str| {
            let request = Request::builder().header(header::CONTENT_TYPE, given);
            let request = request.body(Body::default()).expect("a request");
            let named = name_type(request);
            assert_eq!(named.headers()[header::CONTENT_TYPE], expected, "{given}");
        };
        check("APPLICATION/GRPC-WEB", "application/grpc-web");
        check(
            "application/grpc-web+proto; charset=x",
            "application/grpc-web+proto",
        );
        check(
            "Application/Grpc-Web-Text ;a=b",
            "application/grpc-web-text",
        );
        for other in ["application/grpc", "application/json; a=b", "text/html"] {
            check(other, other);
        }
    }
}
