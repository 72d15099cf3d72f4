//! The operator's port: /metrics, /livez and /readyz, and nothing else.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::IntoResponse;
use axum::routing::get;
use hyper::server::conn::http1;
use hyper_util::rt::TokioIo;
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::admission::Occupancy;
use crate::cache::Cache;
use crate::metrics::Metrics;
use crate::readiness::Readiness;

/// Connections at once. Scrapes and probes come a few at a time; each
/// connection is one request, so that none is held between them.
const CONNECTIONS_MAX: usize = 64;
/// From its accept to its close. A page is made in milliseconds.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);
/// Rest after an accept that failed, for want of file descriptors mostly.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);

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
pub(crate) async fn serve(listener: TcpListener, pages: Pages) {
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(pages);
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    loop {
        // The next client waits in the kernel's queue.
        let place = Arc::clone(&places).acquire_owned().await;
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "the metrics port cannot accept");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let _place = place;
            let answer = http1::Builder::new()
                .keep_alive(false)
                .serve_connection(TokioIo::new(stream), service);
            // How a client fails is its own affair.
            let _ = tokio::time::timeout(CONNECTION_TIME_MAX, answer).await;
        });
    }
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
