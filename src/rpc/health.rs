//! grpc.health.v1, kept equal to the worker's readiness.

use tonic::server::NamedService;
use tonic_health::ServingStatus;
use tonic_health::server::HealthReporter;

use crate::pb::image_gpt_service_server::ImageGptServiceServer;
use crate::readiness::Readiness;

/// The whole server, as probes that name no service ask for it.
const SERVER: &str = "";
/// A name that stays SERVING while the worker loads and drains, and stops
/// only when the engine has failed: what a liveness probe should ask for.
pub const LIVENESS: &str = "liveness";

/// Follows readiness for as long as the server lives.
pub(super) async fn follow(reporter: HealthReporter, mut readiness: Readiness) {
    loop {
        let alive = readiness.failure().is_none();
        publish(&reporter, readiness.get().is_ok(), alive).await;
        readiness.changed().await;
    }
}

async fn publish(reporter: &HealthReporter, ready: bool, alive: bool) {
    let status = |up| {
        if up {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    };
    let service = <ImageGptServiceServer<super::Service> as NamedService>::NAME;
    reporter.set_service_status(SERVER, status(ready)).await;
    reporter.set_service_status(service, status(ready)).await;
    reporter.set_service_status(LIVENESS, status(alive)).await;
}

/// A reporter that says NOT_SERVING until it is told otherwise; tonic's own
/// begins with SERVING.
pub(super) async fn reporter() -> HealthReporter {
    let reporter = HealthReporter::new();
    publish(&reporter, false, true).await;
    reporter
}
