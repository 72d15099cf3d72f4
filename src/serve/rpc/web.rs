//! gRPC-Web, for browsers and gateways that cannot speak gRPC's HTTP/2, and
//! the CORS headers without which a browser does not let a page call.
//!
//! With it connections may speak HTTP/1.1, one call at a time: hyper closes one
//! whose next request's head has not come within 30 s or is over its own bounds
//! (100 headers, 400 KiB), and a request's body has `--request-timeout` as any
//! other.

use std::time::Duration;

use http::{HeaderName, HeaderValue, Method, header};
use tonic_web::GrpcWebLayer;
use tower_http::cors::{AllowOrigin, CorsLayer};

use crate::serve::config::{ANY_ORIGIN, AccessConfig};

/// How long a browser may remember what it was allowed.
const PREFLIGHT_MAX_AGE: Duration = Duration::from_hours(1);

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
        [only] if only == ANY_ORIGIN => AllowOrigin::any(),
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
