//! The operator's port: /metrics, /livez and /readyz, and nothing else.

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use tokio::net::TcpListener;

use crate::admission::Occupancy;
use crate::cache::Cache;
use crate::metrics::Metrics;
use crate::readiness::Readiness;

/// What the pages show.
#[derive(Clone)]
pub(crate) struct Pages {
    pub(crate) metrics: Metrics,
    pub(crate) occupancy: Occupancy,
    pub(crate) cache: Cache,
    pub(crate) readiness: Readiness,
}

/// Serves the pages until the process ends: while the worker drains, a scrape
/// still sees it drain.
pub(crate) async fn serve(listener: TcpListener, pages: Pages) -> std::io::Result<()> {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(pages);
    axum::serve(listener, router).await
}

async fn metrics(State(pages): State<Pages>) -> impl IntoResponse {
    // Read when asked for, from where the truth is, so that no path can
    // forget to count down.
    let (metrics, occupancy) = (&pages.metrics, &pages.occupancy);
    metrics.in_flight(occupancy.images(), occupancy.images_max());
    metrics.bytes(
        occupancy.bytes(),
        occupancy.bytes_max(),
        pages.cache.bytes(),
    );
    pages.metrics.ready(pages.readiness.get().is_ok());
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        pages.metrics.render(),
    )
}

/// Alive until the engine has failed: then only a restart helps.
async fn livez(State(pages): State<Pages>) -> impl IntoResponse {
    match pages.readiness.failure() {
        None => (StatusCode::OK, "alive\n".to_owned()),
        Some(failure) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("engine failed: {}\n", failure.reason),
        ),
    }
}

async fn readyz(State(pages): State<Pages>) -> impl IntoResponse {
    match pages.readiness.get() {
        Ok(_) => (StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}
