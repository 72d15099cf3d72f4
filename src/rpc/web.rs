//! gRPC-Web, for browsers and gateways that cannot speak gRPC's HTTP/2, and
//! the CORS headers without which a browser does not let a page call.
//!
//! With it connections may speak HTTP/1.1, one call at a time: hyper closes one
//! whose next request's head has not come within 30 s, and a request's body has
//! `--request-timeout` as any other.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, header};
use tonic_web::GrpcWebLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::config::AccessConfig;

/// How long a browser may remember what it was allowed.
const PREFLIGHT_MAX_AGE: Duration = Duration::from_hours(1);
/// Any page.
const ANY: &str = "*";

/// What calls may bring.
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
/// What pages may read of an answer.
const RESPONSE_HEADERS: [HeaderName; 4] = [
    HeaderName::from_static("grpc-message"),
    HeaderName::from_static("grpc-status"),
    HeaderName::from_static("grpc-status-details-bin"),
    HeaderName::from_static("x-request-id"),
];

/// How gRPC-Web is served, if it is.
#[derive(Debug, Clone, Default)]
pub(super) struct Web {
    /// Also what lets HTTP/1.1 in.
    pub(super) calls: Option<GrpcWebLayer>,
    pub(super) cors: Option<CorsLayer>,
}

impl Web {
    pub(super) fn new(config: &AccessConfig) -> Self {
        if !config.grpc_web {
            return Self::default();
        }
        Self {
            calls: Some(GrpcWebLayer::new()),
            cors: cors(&config.cors_origins),
        }
    }
}

/// None without origins: pages of the worker's own origin need no permission.
fn cors(origins: &[String]) -> Option<CorsLayer> {
    let origins = match origins {
        [] => return None,
        [only] if only == ANY => AllowOrigin::any(),
        origins => {
            // Flags were checked: nothing but what a header may hold.
            let values = origins.iter().filter_map(|o| HeaderValue::from_str(o).ok());
            AllowOrigin::list(values)
        }
    };
    // Without credentials of the browser's own: tokens come in a header.
    Some(
        CorsLayer::new()
            .allow_origin(origins)
            .allow_methods([Method::POST])
            .allow_headers(REQUEST_HEADERS)
            .expose_headers(RESPONSE_HEADERS)
            .max_age(PREFLIGHT_MAX_AGE),
    )
}

/// What is wrong with an origin as a flag has it.
pub(crate) fn check_origin(origin: &str) -> Result<(), &'static str> {
    if origin == ANY {
        return Ok(());
    }
    let host = origin
        .strip_prefix("https://")
        .or_else(|| origin.strip_prefix("http://"))
        .ok_or("it must begin with https:// or http://, or be *")?;
    let is_host = |byte: u8| byte.is_ascii_alphanumeric() || b".-:[]".contains(&byte);
    if host.is_empty() || !host.bytes().all(is_host) {
        return Err("after the scheme it has a host and perhaps a port, and no path");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins() {
        for good in [
            "*",
            "https://a.example",
            "http://localhost:8080",
            "http://[::1]:3",
        ] {
            assert_eq!(check_origin(good), Ok(()), "{good}");
        }
        for bad in [
            "",
            "a.example",
            "https://",
            "https://a.example/",
            "null",
            "http://a b",
        ] {
            assert!(check_origin(bad).is_err(), "{bad}");
        }
    }
}
