//! HTTP server on the operator's port: /metrics, /livez and /readyz, and
//! nothing else.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::State;
use axum::http::{Request, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, oneshot};
use tower::ServiceExt as _;
use tower_http::validate_request::{ValidateRequest, ValidateRequestHeaderLayer};

use crate::serve::admission::Occupancy;
use crate::serve::cache::AnswerCache;
use crate::serve::host;
use crate::serve::metrics::Metrics;
use crate::serve::readiness::Readiness;
use crate::telemetry;

/// Largest number of connections at the same time. Scrapes and probes come a
/// few at a time, and each connection carries one request, so no connection is
/// held between them. When all places are taken, the next connection gets the
/// place of the oldest connection that has sent no request yet, or else of the
/// oldest one: so a probe never waits, however many clients connect and send
/// nothing, or do not read their page.
const CONNECTIONS_MAX: usize = 128;
/// Longest time from accepting a connection until its request's head has
/// arrived: a round trip or two.
const HEAD_TIME_MAX: Duration = Duration::from_secs(5);
/// Longest time from accepting a connection to closing it. A page is made in
/// milliseconds.
const CONNECTION_TIME_MAX: Duration = Duration::from_secs(10);
/// Largest number of metrics pages that are made at the same time: each takes a
/// core for milliseconds, and probes and calls need the other cores, however
/// many clients ask.
const RENDERS_MAX: usize = 1;
/// Pause after an accept that failed, mostly for lack of file descriptors.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(100);
/// Answer to a request under a name that is not loopback's.
const OTHER_HOST: &str = "on loopback the port of --metrics-listen answers under localhost and \
                          under addresses alone, so that no web page reads it from another name; \
                          ask it by its address, or bind --metrics-listen to another address\n";

/// Sources of the values that the pages show.
#[derive(Clone)]
pub(crate) struct PageSources {
    pub(crate) metrics: Metrics,
    pub(crate) occupancy: Occupancy,
    pub(crate) cache: AnswerCache,
    pub(crate) readiness: Readiness,
}

/// Serves the pages until the process ends: while the worker drains, a scrape
/// can still see that.
pub(crate) async fn serve(listener: TcpListener, pages: PageSources) {
    // Elsewhere a name in the network's own DNS leads here, and a page from the
    // internet reaches no more than any program there.
    let is_loopback = listener
        .local_addr()
        .is_ok_and(|addr| addr.ip().to_canonical().is_loopback());
    let router = Router::new()
        .route("/metrics", get(metrics))
        .route("/livez", get(livez))
        .route("/readyz", get(readyz))
        .with_state(pages)
        .layer(ValidateRequestHeaderLayer::custom(HostCheck {
            is_loopback,
        }));
    let free = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let places = Places::default();
    loop {
        let stream = match listener.accept().await {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::debug!(%error, "the metrics port cannot accept a connection");
                tokio::time::sleep(ACCEPT_BACKOFF).await;
                continue;
            }
        };
        if free.available_permits() == 0 {
            places.give_up_one();
        }
        // A connection that was given up has ended as soon as its task has run.
        let permit = Arc::clone(&free).acquire_owned().await;
        let (place, given_up) = places.enter();
        let router = router.clone();
        tokio::spawn(async move {
            let _permit = permit;
            tokio::select! {
                () = answer(stream, router, &place) => {}
                _ = given_up => {}
            }
        });
    }
}

/// Check that refuses requests that may come from another name's web page.
#[derive(Debug, Clone, Copy)]
struct HostCheck {
    /// True if the port is bound to loopback.
    is_loopback: bool,
}

impl ValidateRequest<Body> for HostCheck {
    type ResponseBody = Body;

    fn validate(&mut self, request: &mut Request<Body>) -> Result<(), Response> {
        let answer = |status, text| (status, text).into_response();
        if !host::has_one_host(request) {
            return Err(answer(StatusCode::BAD_REQUEST, host::BAD_HOST));
        }
        let host = host::host(request);
        // Browsers name a host in every request.
        if self.is_loopback && !host.is_empty() && !host::cannot_be_moved(host) {
            return Err(answer(StatusCode::MISDIRECTED_REQUEST, OTHER_HOST));
        }
        Ok(())
    }
}

/// Answers the single request of a connection.
async fn answer(stream: TcpStream, router: Router, place: &Arc<Place>) {
    let asking = Arc::clone(place);
    let router = router.map_request(move |request: Request<Incoming>| {
        asking.asks();
        request
    });
    let answer = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_TIME_MAX)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    // A client's failure is its own affair.
    let _ = tokio::time::timeout(CONNECTION_TIME_MAX, answer).await;
}

/// Connections of the port.
#[derive(Debug, Clone, Default)]
struct Places(Arc<Mutex<Guests>>);

#[derive(Debug, Default)]
struct Guests {
    /// Number of connections that have been accepted so far.
    count: u64,
    /// Connections that have sent no request yet, in order of arrival.
    silent: BTreeMap<u64, oneshot::Sender<()>>,
    /// Connections that have sent a request, in order of arrival.
    asked: BTreeMap<u64, oneshot::Sender<()>>,
}

impl Places {
    /// Returns a place, and a future that resolves when the place goes to
    /// another connection.
    fn enter(&self) -> (Arc<Place>, oneshot::Receiver<()>) {
        let (give_up, given_up) = oneshot::channel();
        let mut state = self.lock();
        state.count += 1;
        let id = state.count;
        state.silent.insert(id, give_up);
        let places = self.clone();
        (Arc::new(Place { places, id }), given_up)
    }

    fn give_up_one(&self) {
        let mut state = self.lock();
        let oldest = state.silent.pop_first();
        if let Some((_, give_up)) = oldest.or_else(|| state.asked.pop_first()) {
            let _ = give_up.send(());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Guests> {
        // Nothing below can panic halfway through a change.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Place of one connection.
#[derive(Debug)]
struct Place {
    places: Places,
    id: u64,
}

impl Place {
    /// Records that the head of the connection's request has arrived.
    fn asks(&self) {
        let mut state = self.places.lock();
        if let Some(give_up) = state.silent.remove(&self.id) {
            state.asked.insert(self.id, give_up);
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.places.lock();
        state.silent.remove(&self.id);
        state.asked.remove(&self.id);
    }
}

async fn metrics(State(pages): State<PageSources>) -> impl IntoResponse {
    static RENDERS: Semaphore = Semaphore::const_new(RENDERS_MAX);
    // Never closed, so there is no error.
    let _turn = RENDERS.acquire().await;
    // Read when the page is requested, from the source of each value, so that
    // no code path can forget to count down.
    let (metrics, occupancy) = (&pages.metrics, &pages.occupancy);
    metrics.in_flight(occupancy.images(), occupancy.images_max());
    metrics.bytes(
        occupancy.bytes(),
        occupancy.bytes_max(),
        pages.cache.bytes(),
    );
    metrics.log_lines_dropped(telemetry::lines_dropped());
    pages.metrics.ready(pages.readiness.get().is_ok());
    (
        [(
            header::CONTENT_TYPE,
            "text/plain; version=0.0.4; charset=utf-8",
        )],
        pages.metrics.render(),
    )
}

/// Answers "alive" until the worker has failed: then only a restart helps.
async fn livez(State(pages): State<PageSources>) -> impl IntoResponse {
    match pages.readiness.failure() {
        None => (StatusCode::OK, "alive\n".to_owned()),
        Some(failure) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("worker failed: {}\n", failure.reason),
        ),
    }
}

async fn readyz(State(pages): State<PageSources>) -> impl IntoResponse {
    match pages.readiness.get() {
        Ok(_) => (StatusCode::OK, "ready\n".to_owned()),
        Err(reason) => (StatusCode::SERVICE_UNAVAILABLE, format!("{reason}\n")),
    }
}
