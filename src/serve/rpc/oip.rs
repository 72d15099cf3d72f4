//! Open Inference Protocol, which clients of Triton and KServe speak: the same
//! work as the native service's, through the same admission.
//!
//! A request is prepared (checked and converted to images), submitted, and
//! finished. These are separate steps because a stream waits for room between
//! the first two.

mod infer;
mod metadata;
mod parameters;
mod statistics;
mod stream;
mod tensors;

use std::sync::Arc;

use tonic::{Request, Response, Status};

use self::infer::PreparedInfer;
use super::arriving::Arrived;
use super::calling::CallOrigin;
use super::observe::AnswerBytes;
use super::{WorkerService, respond, status};
use crate::excerpt::Excerpt;
use crate::proto::inference as oip;
use crate::proto::inference::grpc_inference_service_server::GrpcInferenceService;
use crate::serve::readiness::Unready;
use crate::serve::rpc::error::RequestError;

/// Version of the served model, the only one.
const VERSION: &str = "1";

/// Service of the Open Inference Protocol.
#[derive(Debug, Clone)]
pub(super) struct Oip(pub(super) Arc<WorkerService>);

impl Oip {
    /// Checks that a model and its version are the served ones.
    fn check_model(&self, name: &str, version: &str) -> Result<(), RequestError> {
        let served = &self.0.model.name;
        if name != served {
            return Err(RequestError::ModelUnknown {
                given: Excerpt::of(name).to_string(),
                served: served.clone(),
            });
        }
        match version {
            "" | VERSION => Ok(()),
            version if version.parse::<u64>().is_ok() => Err(RequestError::ModelUnknown {
                given: format!("{served}, version {}", Excerpt::of(version)),
                served: served.clone(),
            }),
            version => Err(RequestError::OptionInvalid {
                field: "model_version",
                problem: format!("{:?} is not a whole number", Excerpt::of(version)),
            }),
        }
    }

    async fn infer(
        &self,
        request: Request<oip::ModelInferRequest>,
    ) -> Result<(oip::ModelInferResponse, AnswerBytes), RequestError> {
        let (_, extensions, request) = request.into_parts();
        let origin = CallOrigin::of(&extensions);
        let arrived = extensions.get::<Arrived>().map(Arrived::take);
        PreparedInfer::new(self, request, origin)?
            .submit(self, arrived.unwrap_or_default())?
            .finish(self)
            .await
    }

    fn is_ready(&self) -> bool {
        self.0.readiness.get().is_ok()
    }

    fn index(&self, only_ready: bool) -> oip::RepositoryIndexResponse {
        let (state, reason) = match self.0.readiness.get() {
            Ok(_) => ("READY", String::new()),
            Err(Unready::Loading) => ("LOADING", String::new()),
            Err(unready) => ("UNAVAILABLE", unready.to_string()),
        };
        let model = oip::repository_index_response::ModelIndex {
            name: self.0.model.name.clone(),
            version: VERSION.to_owned(),
            state: state.to_owned(),
            reason,
        };
        oip::RepositoryIndexResponse {
            models: if only_ready && state != "READY" {
                Vec::new()
            } else {
                vec![model]
            },
        }
    }
}

/// Makes a response of an answer that holds no share of the worker's bytes, or
/// a status of its error.
fn answer<T>(outcome: Result<T, RequestError>) -> Result<Response<T>, Status> {
    outcome
        .map(Response::new)
        .map_err(|error| status::of_call(&error))
}

#[tonic::async_trait]
impl GrpcInferenceService for Oip {
    async fn server_live(
        &self,
        _request: Request<oip::ServerLiveRequest>,
    ) -> Result<Response<oip::ServerLiveResponse>, Status> {
        let live = self.0.readiness.failure().is_none();
        Ok(Response::new(oip::ServerLiveResponse { live }))
    }

    async fn server_ready(
        &self,
        _request: Request<oip::ServerReadyRequest>,
    ) -> Result<Response<oip::ServerReadyResponse>, Status> {
        let ready = self.is_ready();
        Ok(Response::new(oip::ServerReadyResponse { ready }))
    }

    async fn model_ready(
        &self,
        request: Request<oip::ModelReadyRequest>,
    ) -> Result<Response<oip::ModelReadyResponse>, Status> {
        let request = request.get_ref();
        let known = self.check_model(&request.name, &request.version).is_ok();
        let ready = known && self.is_ready();
        Ok(Response::new(oip::ModelReadyResponse { ready }))
    }

    async fn server_metadata(
        &self,
        _request: Request<oip::ServerMetadataRequest>,
    ) -> Result<Response<oip::ServerMetadataResponse>, Status> {
        Ok(Response::new(metadata::server()))
    }

    async fn model_metadata(
        &self,
        request: Request<oip::ModelMetadataRequest>,
    ) -> Result<Response<oip::ModelMetadataResponse>, Status> {
        let request = request.get_ref();
        answer(
            self.check_model(&request.name, &request.version)
                .and_then(|()| metadata::model(&self.0)),
        )
    }

    async fn model_infer(
        &self,
        request: Request<oip::ModelInferRequest>,
    ) -> Result<Response<oip::ModelInferResponse>, Status> {
        respond(self.infer(request).await)
    }

    type ModelStreamInferStream = stream::InferAnswers;

    async fn model_stream_infer(
        &self,
        request: Request<tonic::Streaming<oip::ModelInferRequest>>,
    ) -> Result<Response<Self::ModelStreamInferStream>, Status> {
        answer(stream::open(self, request))
    }

    async fn model_config(
        &self,
        request: Request<oip::ModelConfigRequest>,
    ) -> Result<Response<oip::ModelConfigResponse>, Status> {
        let request = request.get_ref();
        answer(
            self.check_model(&request.name, &request.version)
                .and_then(|()| metadata::config(&self.0)),
        )
    }

    async fn model_statistics(
        &self,
        request: Request<oip::ModelStatisticsRequest>,
    ) -> Result<Response<oip::ModelStatisticsResponse>, Status> {
        let request = request.get_ref();
        // Without a name, all models are meant.
        let known = if request.name.is_empty() {
            Ok(())
        } else {
            self.check_model(&request.name, &request.version)
        };
        answer(known.map(|()| {
            let snapshot = self.0.metrics.totals().snapshot();
            statistics::of(&self.0.model.name, &snapshot)
        }))
    }

    async fn repository_index(
        &self,
        request: Request<oip::RepositoryIndexRequest>,
    ) -> Result<Response<oip::RepositoryIndexResponse>, Status> {
        Ok(Response::new(self.index(request.get_ref().ready)))
    }
}
