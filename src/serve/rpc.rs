//! The gRPC surface. This module and its submodules are the only part of the
//! worker that uses tonic.
//!
//! A handler decodes the request, submits its images to admission, awaits their
//! outcomes and encodes the response.

mod access;
mod arriving;
mod auth;
mod authority;
mod calling;
mod connection;
mod convert;
mod deadline;
mod embedding;
mod error;
mod generate;
mod heads;
mod health;
mod leaving;
mod listen;
mod not_grpc;
mod observe;
mod oip;
mod outcome_tally;
mod own_pages;
mod playground;
mod reload;
mod report;
mod score;
mod status;
mod stream;
mod tls;
mod unserved;
mod usage;
mod web;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::net::TcpListener;
use tonic::codec::CompressionEncoding;
use tonic::service::Routes;
use tonic::{Code, Request, Response, Status};
use tower::Layer as _;
use tower::util::{MapRequestLayer, option_layer};
use tower_http::validate_request::ValidateRequestHeaderLayer;

use self::arriving::Arrived;
use self::calling::CallOrigin;
use self::embedding::Embedding;
use self::observe::AnswerBytes;
use self::oip::Oip;
use self::outcome_tally::OutcomeTally;
use crate::engine::EngineFacts;
use crate::imaging::{ImageRequest, PreprocessOptions};
use crate::model::graph::Want;
use crate::model::{CallTask, Model};
use crate::proto::inference::grpc_inference_service_server::GrpcInferenceServiceServer;
use crate::proto::pb;
use crate::proto::pb::image_gpt_service_server::{ImageGptService, ImageGptServiceServer};
use crate::serve::admission::{Admission, AdmissionCall, Bytes, PendingAnswers};
use crate::serve::capacity::CapacityShare;
use crate::serve::config::{ConnectionsConfig, LimitsConfig};
use crate::serve::error::StageError;
use crate::serve::heads::ServedHeads;
use crate::serve::job::{Answer, RequestedWork};
use crate::serve::metrics::Metrics;
use crate::serve::readiness::{Readiness, Unready};
use crate::serve::rpc::error::RequestError;
use crate::serve::timeline::RequestTimeline;
use crate::serve::trace::Traces;
use crate::{gpu, proto};

pub(crate) use self::access::Access;
pub(crate) use self::observe::CallsInProgress;

/// Parts of the worker that the gRPC surface uses.
#[derive(Debug)]
pub(crate) struct WorkerService {
    pub model: Arc<Model>,
    pub heads: ServedHeads,
    pub admission: Admission,
    pub readiness: Readiness,
    pub limits: LimitsConfig,
    pub max_batch_size: u16,
    /// Known facts about the GPUs on which the model runs.
    pub gpus: gpu::KnownGpus,
    pub metrics: Metrics,
    /// Time for calls in progress to finish when the worker shuts down.
    pub shutdown_grace_period: Duration,
}

/// Settings of the server.
#[derive(Debug)]
pub(crate) struct ServerOptions {
    pub reflection: bool,
    pub keepalive_interval: Duration,
    /// Longest time for a client to answer an HTTP/2 ping.
    pub keepalive_timeout: Duration,
    /// Counter of calls in progress, which the shutdown waits for.
    pub calls: CallsInProgress,
    /// Certificates and tokens.
    pub access: Access,
    pub connections: ConnectionsConfig,
    pub traces: Traces,
    /// True if each call has a line in the access log.
    pub access_log: bool,
}

/// Serves until `stop` resolves, then lets calls in progress finish.
///
/// # Errors
///
/// Fails if the descriptors for reflection cannot be set up, or the listener has
/// no address.
pub(crate) async fn serve(
    service: WorkerService,
    listener: TcpListener,
    options: ServerOptions,
    stop: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let ServerOptions {
        access,
        connections,
        ..
    } = options;
    let metrics = service.metrics.clone();
    let observe = observe::ObserveLayer {
        metrics: metrics.clone(),
        request_bytes_max: service.limits.request_bytes_max.as_u64(),
        request_timeout: connections.request_timeout,
        bytes: service.admission.bytes(),
        readiness: Arc::new(service.readiness.clone()),
        calls: options.calls,
        traces: options.traces,
        access_log: options.access_log,
    };
    let patience = leaving::Patience {
        answer_timeout: connections.answer_timeout,
        // The session ends an idle stream first; then the client still has time
        // to read the status.
        stream_timeout: service.limits.stream_idle_timeout + connections.answer_timeout,
        drain_timeout: stream::DRAIN_PATIENCE_MAX.min(service.shutdown_grace_period / 2),
        readiness: service.readiness.clone(),
        metrics: metrics.clone(),
    };
    let routes = routes(service, options.reflection)?;
    let (guards, followers) = access.follow(&metrics);
    let auth = auth::Auth(guards.tokens);
    let web = guards.web;
    let http1 = web.calls.is_some();
    let own_pages = web.own_pages(listener.local_addr()?);
    let door = listen::ConnectionLimits {
        tls: guards.tls,
        connections_max: connections.connections_max as usize,
        per_address_max: connections.per_address_max(),
        max_connection_age: connections.max_connection_age,
        metrics,
    };
    let driver = connection::ConnectionDriver {
        http1,
        keepalive_interval: options.keepalive_interval,
        keepalive_timeout: options.keepalive_timeout,
        streams_max: connections.streams_per_connection_max,
        header_bytes_max: u32::try_from(connections.header_bytes_max.as_u64()).unwrap_or(u32::MAX),
        patience: Arc::new(patience),
    };
    // The outermost layer comes first; rejected calls are counted, too.
    let one_host = http1.then_some(not_grpc::OneHost);
    let layers = (
        option_layer(one_host.map(ValidateRequestHeaderLayer::custom)),
        option_layer(own_pages.map(ValidateRequestHeaderLayer::custom)),
        option_layer(web.page),
        option_layer(web.cors),
        option_layer(http1.then(|| MapRequestLayer::new(web::name_type as web::Rename))),
        option_layer(web.calls),
        ValidateRequestHeaderLayer::custom(not_grpc::GrpcOnly { http1 }),
        observe,
        ValidateRequestHeaderLayer::custom(auth),
    );
    let serve = move |connection: listen::Connection, farewell: listen::ConnectionEnd| {
        // The layer that counts a connection's calls is behind the layer that
        // checks tokens, so that calls rejected there do not count.
        let counted = usage::UsageLayer(connection.guest())
            .layer(unserved::UnservedLayer.layer(routes.clone()));
        let calls = layers.layer(counted);
        driver.clone().serve(connection, farewell, calls)
    };
    listen::run(listener, door, serve, stop).await;
    drop(followers);
    Ok(())
}

fn routes(service: WorkerService, reflection: bool) -> anyhow::Result<Routes> {
    let health = health::server(service.readiness.clone());
    let request_bytes_max =
        usize::try_from(service.limits.request_bytes_max.as_u64()).unwrap_or(usize::MAX);
    let service = Arc::new(service);
    let imagegpt = ImageGptServiceServer::from_arc(Arc::clone(&service))
        .max_decoding_message_size(request_bytes_max)
        // Requests may be compressed, responses are not: vectors hardly shrink,
        // and most clients accept gzip without wanting to wait for it. Messages
        // are inflated before they come here; the setting makes tonic reject
        // other encodings.
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate);
    let inference = GrpcInferenceServiceServer::new(Oip(service))
        .max_decoding_message_size(request_bytes_max)
        .accept_compressed(CompressionEncoding::Gzip)
        .accept_compressed(CompressionEncoding::Deflate);
    let mut routes = Routes::new(imagegpt)
        .add_service(inference)
        .add_service(health);
    if reflection {
        let builder = || {
            tonic_reflection::server::Builder::configure()
                .register_encoded_file_descriptor_set(pb::DESCRIPTORS)
                .register_encoded_file_descriptor_set(tonic_health::pb::FILE_DESCRIPTOR_SET)
        };
        routes = routes
            .add_service(builder().build_v1()?)
            .add_service(builder().build_v1alpha()?);
    }
    Ok(routes.prepare())
}

impl WorkerService {
    /// Returns the engine's facts, or the reason for which nothing is served
    /// now.
    fn facts(&self) -> Result<EngineFacts, RequestError> {
        self.readiness.serving().map_err(|unready| match unready {
            Unready::Leaving | Unready::Draining => RequestError::Draining,
            Unready::Loading | Unready::Failed => StageError::NotReady.into(),
        })
    }

    fn require(&self, task: CallTask) -> Result<(), RequestError> {
        if self.model.can(task) {
            Ok(())
        } else {
            Err(RequestError::TaskMissing {
                task,
                file: task.file(),
            })
        }
    }

    /// Submits the images of a call and awaits the outcome of each, in the
    /// call's order.
    async fn outcomes(
        &self,
        images: Vec<pb::Image>,
        preprocess: PreprocessOptions,
        work: RequestedWork,
        n_values: usize,
        dtype: pb::DataType,
        extensions: &tonic::Extensions,
    ) -> Result<(Vec<Result<Answer, RequestError>>, AnswerBytes), RequestError> {
        let origin = CallOrigin::of(extensions);
        let timeline = origin.timeline.request();
        let ask = Ask {
            work,
            n_values,
            dtype,
        };
        self.check_size(images.len(), std::slice::from_ref(&ask))?;
        let pictures = convert::pictures(images, preprocess);
        let arrived = extensions.get::<Arrived>().map(Arrived::take);
        self.submit(
            pictures,
            &[ask],
            origin,
            arrived.unwrap_or_default(),
            timeline,
        )?
        .outcomes()
        .await
    }

    /// Checks the number of images of a call, and the size of its answer.
    fn check_size(&self, n_images: usize, asks: &[Ask]) -> Result<(), RequestError> {
        if n_images == 0 {
            return Err(RequestError::CallEmpty);
        }
        let n_images_max = self.limits.images_per_call_max as usize;
        if n_images > n_images_max {
            return Err(RequestError::CallTooLarge {
                given: n_images,
                max: n_images_max,
            });
        }
        let answer_bytes: usize = asks
            .iter()
            .map(|ask| ask.n_values * convert::dtype_bytes(ask.dtype))
            .sum();
        let response_bytes = answer_bytes as u64 * n_images as u64;
        let response_bytes_max = self.limits.response_bytes_max.as_u64();
        if response_bytes > response_bytes_max {
            return Err(RequestError::ResponseTooLarge {
                given: response_bytes,
                max: response_bytes_max,
            });
        }
        Ok(())
    }

    /// Submits the images of a call, each once per entry of `asks`.
    fn submit(
        &self,
        pictures: Vec<Result<ImageRequest, RequestError>>,
        asks: &[Ask],
        origin: CallOrigin,
        arrived: CapacityShare,
        timeline: RequestTimeline,
    ) -> Result<Submitted, RequestError> {
        let n_outcomes = pictures.len() * asks.len();
        let n_charged = pictures.iter().flatten().count();
        let bytes = call_bytes(&pictures, asks, arrived);
        let mut known = Vec::with_capacity(n_outcomes);
        let mut admitted = Vec::with_capacity(n_outcomes);
        for picture in pictures {
            let mut picture = Some(picture);
            for (idx, ask) in asks.iter().enumerate() {
                // The last ask takes the image without a copy; most calls have
                // one ask.
                let picture = if idx + 1 == asks.len() {
                    picture.take()
                } else {
                    picture.clone()
                };
                known.push(match picture {
                    Some(Ok(picture)) => {
                        admitted.push((picture, ask.work.clone()));
                        None
                    }
                    Some(Err(error)) => Some(error),
                    None => Some(StageError::Lost.into()),
                });
            }
        }
        let mut tally = OutcomeTally::new(self.metrics.clone(), origin.deadline);
        tally.expect(n_outcomes);
        let call = AdmissionCall {
            images: admitted,
            caller: origin.caller,
            n_charged,
            class: origin.class,
            bytes,
            deadline: origin.deadline,
            span: tracing::Span::current(),
            timeline,
        };
        let pending = self.admission.submit(call).map_err(RequestError::from);
        let pending = pending.inspect_err(|error| tally.rest(status::code(error)))?;
        Ok(Submitted {
            known,
            pending,
            tally,
        })
    }

    async fn embed(
        &self,
        request: Request<pb::EmbedRequest>,
    ) -> Result<(pb::EmbedResponse, AnswerBytes), RequestError> {
        let facts = self.facts()?;
        self.require(CallTask::Embed)?;
        let (_, extensions, request) = request.into_parts();
        let options = pb::EmbedStreamOptions {
            preprocess: request.preprocess,
            context: request.context,
            pooling: request.pooling,
            normalize: request.normalize,
            dtype: request.dtype,
            layers: request.layers,
            norm: request.norm,
            ..Default::default()
        };
        let embedding = Embedding::new(&options, &self.model, &facts)?;
        let (outcomes, held) = self
            .outcomes(
                request.images,
                embedding.preprocess,
                embedding.work(),
                embedding.n_values(),
                embedding.dtype,
                &extensions,
            )
            .await?;
        let result = |outcome: Result<Answer, RequestError>| {
            let outcome = match outcome.and_then(|answer| embedding.tensor(answer)) {
                Ok(tensor) => pb::embed_result::Outcome::Embedding(tensor),
                Err(error) => pb::embed_result::Outcome::Error(status::of_image(&error)),
            };
            pb::EmbedResult {
                outcome: Some(outcome),
            }
        };
        let applied = embedding.applied(&self.model);
        let response = pb::EmbedResponse {
            results: outcomes.into_iter().map(result).collect(),
            model_digest: self.model.digest.clone(),
            preprocess: applied.preprocess,
            context: applied.context,
            pooling: applied.pooling,
            normalize: applied.normalize,
            layers: applied.layers,
            norm: applied.norm,
        };
        Ok((response, held))
    }

    async fn classify(
        &self,
        request: Request<pb::ClassifyRequest>,
    ) -> Result<(pb::ClassifyResponse, AnswerBytes), RequestError> {
        let facts = self.facts()?;
        let (_, extensions, request) = request.into_parts();
        let head = heads::named(&self.heads.get(), &request.head, &self.model)?;
        let head = head.as_deref();
        let preprocess = heads::preprocess(head, request.preprocess.as_ref())?;
        let (work, context) = if let Some(head) = head {
            let work = heads::work(head, request.context, &self.model)?;
            (work, head.content.context)
        } else {
            let context = convert::context(request.context)?;
            let want = Want::Logits;
            (RequestedWork::Infer { context, want }, context)
        };
        let (labels, activation) = match head {
            Some(head) => (head.content.labels.as_slice(), head.content.activation),
            None => (self.model.labels.as_slice(), self.model.activation),
        };
        let n_classes = head.map_or(facts.n_classes, |head| head.content.labels.len());
        let dtype = pb::DataType::F32;
        let (outcomes, held) = self
            .outcomes(
                request.images,
                preprocess,
                work,
                n_classes,
                dtype,
                &extensions,
            )
            .await?;
        let with_logits = request.logits || labels.is_empty();
        let result = |outcome| {
            let outcome = match outcome {
                Ok(Answer::Values(values)) => {
                    let logits = match head {
                        Some(head) => head.logits(&values),
                        None => values,
                    };
                    pb::classify_result::Outcome::Classification(pb::Classification {
                        classes: convert::classes(&logits, labels, activation, request.top_k),
                        logits: with_logits
                            .then(|| convert::tensor(&logits, &[logits.len()], pb::DataType::F32)),
                    })
                }
                Ok(_) => {
                    pb::classify_result::Outcome::Error(status::of_image(&StageError::Lost.into()))
                }
                Err(error) => pb::classify_result::Outcome::Error(status::of_image(&error)),
            };
            pb::ClassifyResult {
                outcome: Some(outcome),
            }
        };
        let response = pb::ClassifyResponse {
            results: outcomes.into_iter().map(result).collect(),
            model_digest: self.model.digest.clone(),
            preprocess: Some(proto::preprocess_applied(preprocess)),
            context: pb::Context::from(context).into(),
            head: head.map(|head| head.name.clone()).unwrap_or_default(),
        };
        Ok((response, held))
    }

    async fn tokenize(
        &self,
        request: Request<pb::TokenizeRequest>,
    ) -> Result<(pb::TokenizeResponse, AnswerBytes), RequestError> {
        self.facts()?;
        let (_, extensions, request) = request.into_parts();
        let preprocess = convert::preprocess(request.preprocess.as_ref())?;
        // An id takes as many bytes as an f32.
        let (n_ids, dtype, work) = (
            self.model.positions(),
            pb::DataType::F32,
            RequestedWork::Tokenize,
        );
        let (outcomes, held) = self
            .outcomes(request.images, preprocess, work, n_ids, dtype, &extensions)
            .await?;
        let result = |outcome| {
            let outcome = match outcome {
                Ok(Answer::Tokens(tokens)) => pb::tokenize_result::Outcome::Tokens(pb::Tokens {
                    ids: tokens.iter().copied().map(u32::from).collect(),
                }),
                Ok(_) => {
                    pb::tokenize_result::Outcome::Error(status::of_image(&StageError::Lost.into()))
                }
                Err(error) => pb::tokenize_result::Outcome::Error(status::of_image(&error)),
            };
            pb::TokenizeResult {
                outcome: Some(outcome),
            }
        };
        let response = pb::TokenizeResponse {
            results: outcomes.into_iter().map(result).collect(),
            model_digest: self.model.digest.clone(),
            preprocess: Some(proto::preprocess_applied(preprocess)),
        };
        Ok((response, held))
    }

    fn get_model(&self) -> Result<pb::GetModelResponse, RequestError> {
        let facts = self.facts()?;
        let model = &self.model;
        let limits = &self.limits;
        let tasks = [
            (CallTask::Embed, pb::Task::Embed),
            (CallTask::Classify, pb::Task::Classify),
            (CallTask::Score, pb::Task::Score),
            (CallTask::Generate, pb::Task::Generate),
        ];
        let generate_slots = facts.sequences.map_or(0, |sequences| sequences.n_slots);
        let devices = self.readiness.devices();
        let device = |device| convert::device(device, self.gpus.get());
        let heads = self.heads.get();
        let devices = devices.iter().map(device).collect();
        Ok(pb::GetModelResponse {
            name: model.name.clone(),
            digest: model.digest.clone(),
            tasks: tasks
                .into_iter()
                .filter(|&(task, _)| match task {
                    CallTask::Classify => model.can(task) || !heads.is_empty(),
                    CallTask::Generate => generate_slots > 0,
                    CallTask::Embed | CallTask::Score => model.can(task),
                })
                .map(|(_, task)| task.into())
                .collect(),
            layers: model.n_layers.unwrap_or(0),
            dimension: u32::try_from(facts.dimension).unwrap_or(u32::MAX),
            positions: u32::try_from(model.positions()).unwrap_or(u32::MAX),
            side: model.side,
            palette_rgb8: model.palette_rgb8().into(),
            labels: model.labels.clone(),
            activation: if model.labels.is_empty() {
                pb::Activation::Unspecified
            } else {
                convert::activation(model.activation)
            }
            .into(),
            execution_provider: facts.provider.to_owned(),
            onnxruntime_version: facts.runtime_version,
            worker_version: env!("CARGO_PKG_VERSION").to_owned(),
            limits: Some(pb::Limits {
                images_per_call_max: limits.images_per_call_max,
                request_bytes_max: limits.request_bytes_max.as_u64(),
                response_bytes_max: limits.response_bytes_max.as_u64(),
                image_pixels_max: limits.image_pixels_max,
                image_bytes_max: limits.image_bytes_max.as_u64(),
                images_in_flight_max: limits.images_in_flight_max,
                batch_size_max: self.max_batch_size.into(),
                stream_window_max: self.limits.stream_window_max,
                generate_slots: u32::try_from(generate_slots).unwrap_or(u32::MAX),
                samples_per_call_max: limits.samples_per_call_max,
            }),
            notice: model.notice.clone(),
            layers_served: model.layers_of_any_norm(),
            layer_default: model.layer_default().unwrap_or(0),
            precision: model
                .compiled
                .map(|compiled| compiled.precision.name().to_owned())
                .unwrap_or_default(),
            heads: heads.iter().map(|head| heads::info(head)).collect(),
            fallbacks: facts.fallbacks.iter().map(convert::fallback).collect(),
            devices,
            weights_digest: model.weights_digest.clone(),
            head_default: heads::named(&heads, "", model)
                .ok()
                .flatten()
                .map(|head| head.name.clone())
                .unwrap_or_default(),
        })
    }
}

/// Work that is asked for each image of a call.
#[derive(Debug, Clone)]
struct Ask {
    work: RequestedWork,
    /// Number of values in the answer.
    n_values: usize,
    dtype: pb::DataType,
}

/// Returns the bytes that a call holds while it is in the worker.
fn call_bytes(
    pictures: &[Result<ImageRequest, RequestError>],
    asks: &[Ask],
    arrived: CapacityShare,
) -> Bytes {
    let answers: usize = asks
        .iter()
        .map(|ask| convert::answer_bytes(ask.n_values, ask.dtype))
        .sum();
    let pictures_bytes: usize = pictures.iter().flatten().map(convert::picture_bytes).sum();
    Bytes {
        request: pictures_bytes * asks.len(),
        arrived,
        answer: answers * pictures.len(),
    }
}

/// Call whose images were submitted. Dropping it before its end cancels the
/// images.
#[derive(Debug)]
struct Submitted {
    /// Errors of images that were not submitted, by their places in the call;
    /// none for images that were.
    known: Vec<Option<RequestError>>,
    pending: PendingAnswers,
    tally: OutcomeTally,
}

impl Submitted {
    /// Awaits the outcomes: images in the call's order, and for each image its
    /// asks in their order.
    async fn outcomes(
        mut self,
    ) -> Result<(Vec<Result<Answer, RequestError>>, AnswerBytes), RequestError> {
        let mut results = Vec::with_capacity(self.known.len());
        for known in self.known {
            let outcome = match known {
                Some(error) => Err(error),
                None => self
                    .pending
                    .next()
                    .await
                    .unwrap_or(Err(StageError::Lost))
                    .map_err(RequestError::from),
            };
            match outcome {
                Err(error) if error.ends_call() => {
                    self.tally.rest(status::code(&error));
                    return Err(error);
                }
                outcome => {
                    self.tally
                        .one(outcome.as_ref().map_or_else(status::code, |_| Code::Ok));
                    results.push(outcome);
                }
            }
        }
        Ok((
            results,
            AnswerBytes {
                bytes: Arc::clone(&self.pending.bytes),
            },
        ))
    }
}

/// Makes a response of an answer and its share of the worker's bytes, which is
/// kept until the caller has read the answer.
fn respond<T>(outcome: Result<(T, AnswerBytes), RequestError>) -> Result<Response<T>, Status> {
    match outcome {
        Ok((answer, held)) => {
            let mut response = Response::new(answer);
            response.extensions_mut().insert(held);
            Ok(response)
        }
        Err(error) => Err(status::of_call(&error)),
    }
}

#[tonic::async_trait]
impl ImageGptService for WorkerService {
    async fn embed(
        &self,
        request: Request<pb::EmbedRequest>,
    ) -> Result<Response<pb::EmbedResponse>, Status> {
        respond(Self::embed(self, request).await)
    }

    type EmbedStreamStream = stream::EmbedAnswers;

    async fn embed_stream(
        &self,
        request: Request<tonic::Streaming<pb::EmbedStreamRequest>>,
    ) -> Result<Response<Self::EmbedStreamStream>, Status> {
        stream::open(self, request)
            .map(Response::new)
            .map_err(|error| status::of_call(&error))
    }

    async fn classify(
        &self,
        request: Request<pb::ClassifyRequest>,
    ) -> Result<Response<pb::ClassifyResponse>, Status> {
        respond(Self::classify(self, request).await)
    }

    async fn score(
        &self,
        request: Request<pb::ScoreRequest>,
    ) -> Result<Response<pb::ScoreResponse>, Status> {
        respond(score::score(self, request).await)
    }

    type GenerateStream = generate::Samples;

    async fn generate(
        &self,
        request: Request<pb::GenerateRequest>,
    ) -> Result<Response<Self::GenerateStream>, Status> {
        generate::open(self, request)
            .map(Response::new)
            .map_err(|error| status::of_call(&error))
    }

    async fn tokenize(
        &self,
        request: Request<pb::TokenizeRequest>,
    ) -> Result<Response<pb::TokenizeResponse>, Status> {
        respond(Self::tokenize(self, request).await)
    }

    async fn get_model(
        &self,
        _request: Request<pb::GetModelRequest>,
    ) -> Result<Response<pb::GetModelResponse>, Status> {
        Self::get_model(self)
            .map(Response::new)
            .map_err(|error| status::of_call(&error))
    }
}
