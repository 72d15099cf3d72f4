//! Health service (grpc.health.v1), which reports the worker's readiness.
//!
//! tonic-health's own service answers a watch of an unknown name with
//! NOT_FOUND, where the protocol asks for SERVICE_UNKNOWN on an open stream,
//! and keeps a copy of the state that readiness already has. Therefore only
//! tonic-health's generated code is used.

use std::time::Instant;

use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::server::NamedService;
use tonic::{Request, Response, Status};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_server::{Health, HealthServer};
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};

use super::listen::{Guest, Peer, WatchPermit};
use crate::proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use crate::proto::pb::image_gpt_service_server::ImageGptServiceServer;
use crate::serve::readiness::Readiness;

/// Name of the whole server, for probes that name no service.
const SERVER: &str = "";
/// Name for liveness probes: it stays SERVING while the worker loads and
/// drains, and becomes NOT_SERVING only when the engine has failed.
pub(crate) const LIVENESS: &str = "liveness";

/// Largest size of a request, which holds the name of a service.
const REQUEST_BYTES_MAX: usize = 4096;

pub(super) fn server(readiness: Readiness) -> HealthServer<impl Health> {
    HealthServer::new(Service { readiness }).max_decoding_message_size(REQUEST_BYTES_MAX)
}

#[derive(Debug)]
struct Service {
    readiness: Readiness,
}

/// Meaning of a service name.
#[derive(Debug, Clone, Copy)]
enum Subject {
    Readiness,
    Liveness,
    Unknown,
}

impl Subject {
    fn of(name: &str) -> Self {
        const SERVICE: &str = <ImageGptServiceServer<super::WorkerService> as NamedService>::NAME;
        const INFERENCE: &str = <GrpcInferenceServiceServer<super::Oip> as NamedService>::NAME;
        match name {
            SERVER | SERVICE | INFERENCE => Self::Readiness,
            LIVENESS => Self::Liveness,
            _ => Self::Unknown,
        }
    }

    fn status(self, readiness: &Readiness) -> ServingStatus {
        let up = match self {
            Self::Readiness => readiness.get().is_ok(),
            Self::Liveness => readiness.failure().is_none(),
            Self::Unknown => return ServingStatus::ServiceUnknown,
        };
        if up {
            ServingStatus::Serving
        } else {
            ServingStatus::NotServing
        }
    }
}

fn answer(status: ServingStatus) -> HealthCheckResponse {
    HealthCheckResponse {
        status: status.into(),
    }
}

#[tonic::async_trait]
impl Health for Service {
    async fn check(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<HealthCheckResponse>, Status> {
        match Subject::of(&request.get_ref().service).status(&self.readiness) {
            ServingStatus::ServiceUnknown => {
                Err(Status::not_found("the worker has no service of this name"))
            }
            status => Ok(Response::new(answer(status))),
        }
    }

    type WatchStream = ReceiverStream<Result<HealthCheckResponse, Status>>;

    async fn watch(
        &self,
        request: Request<HealthCheckRequest>,
    ) -> Result<Response<Self::WatchStream>, Status> {
        let leaves_at = request.extensions().get::<Peer>().and_then(Peer::leaves_at);
        let subject = Subject::of(&request.get_ref().service);
        let place = place(request.extensions())?;
        // A watcher that does not read has one status waiting; the next one
        // that it gets is the newest.
        let (updates, stream) = mpsc::channel(1);
        let readiness = self.readiness.clone();
        tokio::spawn(async move {
            follow(subject, readiness, updates, leaves_at).await;
            drop(place);
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

/// Returns the permit of a watch on its connection; none for a call without a
/// connection, as in a test.
fn place(extensions: &tonic::Extensions) -> Result<Option<WatchPermit>, Status> {
    let place = extensions.get::<Guest>().map(Guest::watch).transpose();
    place.map_err(|error| Status::resource_exhausted(error.to_string()))
}

/// Sends the status of a name now and at each change, until the watcher
/// disconnects or the connection is asked to close: a watch has no end of its
/// own, and would hold the connection for ever.
async fn follow(
    subject: Subject,
    mut readiness: Readiness,
    updates: mpsc::Sender<Result<HealthCheckResponse, Status>>,
    leaves_at: Option<Instant>,
) {
    let follow = async {
        let mut last = None;
        loop {
            let status = subject.status(&readiness);
            if last.replace(status) != Some(status)
                && updates.send(Ok(answer(status))).await.is_err()
            {
                return;
            }
            readiness.changed().await;
        }
    };
    tokio::select! {
        () = follow => {}
        () = updates.closed() => {}
        () = super::deadline::passed(leaves_at) => {
            let goodbye = Status::unavailable(
                "the connection has reached its age limit (--max-connection-age); watch again",
            );
            let _ = updates.try_send(Err(goodbye));
        }
    }
}
