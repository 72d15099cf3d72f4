//! Health checks, reflection and other services for probes, proxies and tools.

use imagegpt::engine::fake::{FakeEngine, Script};
use imagegpt::engine::{Engine, EngineFactory};
use imagegpt::model::Model;
use imagegpt::proto::pb;
use imagegpt::proto::pb::image_gpt_service_client::ImageGptServiceClient;
use imagegpt::serve::heads::StartHeads;
use imagegpt::serve::worker::{Worker, WorkerEnded};
use tonic::transport::Channel;
use tonic::{Code, Request, Streaming};
use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;

use crate::harness::{self, embed};

const SERVICE: &str = "imagegpt.v1.ImageGptService";

async fn channel(worker: &Worker) -> Channel {
    Channel::from_shared(harness::url(worker))
        .expect("a URL")
        .connect()
        .await
        .expect("a connection")
}

async fn status(channel: &Channel, service: &str) -> ServingStatus {
    let request = HealthCheckRequest {
        service: service.to_owned(),
    };
    HealthClient::new(channel.clone())
        .check(request)
        .await
        .expect("a status")
        .into_inner()
        .status()
}

#[tokio::test]
async fn serving_begins_when_the_model_is_warm() {
    let (open, gate) = crossbeam_channel::bounded::<()>(1);
    let factory: EngineFactory = Box::new(move || {
        let _ = gate.recv();
        Ok(Box::new(FakeEngine::new(Script::default())) as Box<dyn Engine>)
    });
    let dir = harness::model_dir("micro");
    let config = harness::config(&dir, &[]);
    let model = Model::open(&dir, None).expect("a model");
    let mut worker = Worker::start(&config, model, StartHeads::default(), harness::one(factory))
        .await
        .expect("a worker");
    let channel = channel(&worker).await;
    let mut client = ImageGptServiceClient::new(channel.clone());

    for service in ["", SERVICE] {
        assert_eq!(
            status(&channel, service).await,
            ServingStatus::NotServing,
            "{service:?}"
        );
    }
    assert_eq!(status(&channel, "liveness").await, ServingStatus::Serving);
    assert_eq!(harness::get(worker.metrics_addr, "/livez").await.0, 200);
    let (code, body) = harness::get(worker.metrics_addr, "/readyz").await;
    assert_eq!((code, body.as_str()), (503, "loading\n"));
    let error = client
        .embed(embed(vec![harness::flat(1)]))
        .await
        .expect_err("loading");
    assert_eq!(error.code(), Code::Unavailable);

    open.send(()).expect("the engine waits");
    worker.ready().await.expect("a ready engine");
    for service in ["", SERVICE] {
        // The health service follows a moment later.
        harness::until(&worker, &format!("{service:?} is served"), async || {
            status(&channel, service).await == ServingStatus::Serving
        })
        .await;
    }
    assert_eq!(harness::get(worker.metrics_addr, "/readyz").await.0, 200);
    client
        .embed(embed(vec![harness::flat(1)]))
        .await
        .expect("serving");
    drop((client, channel));
    worker.shutdown(harness::PATIENCE).await;
}

/// Returns the next status of a health watch.
async fn next(watch: &mut Streaming<HealthCheckResponse>) -> ServingStatus {
    let update = watch.message().await.expect("a status");
    update.expect("not the end").status()
}

#[tokio::test]
async fn a_watch_follows_and_stays_open_for_an_unknown_name() {
    let (open, gate) = crossbeam_channel::bounded::<()>(1);
    let factory: EngineFactory = Box::new(move || {
        let _ = gate.recv();
        Ok(Box::new(FakeEngine::new(Script::default())) as Box<dyn Engine>)
    });
    let dir = harness::model_dir("micro");
    let config = harness::config(&dir, &[]);
    let model = Model::open(&dir, None).expect("a model");
    let mut worker = Worker::start(&config, model, StartHeads::default(), harness::one(factory))
        .await
        .expect("a worker");
    let mut health = HealthClient::new(channel(&worker).await);
    let mut watches = Vec::new();
    for service in [SERVICE, "liveness", "nobody"] {
        let request = HealthCheckRequest {
            service: service.to_owned(),
        };
        let watch = health.watch(request).await.expect("a stream");
        watches.push(watch.into_inner());
    }
    assert_eq!(next(&mut watches[0]).await, ServingStatus::NotServing);
    assert_eq!(next(&mut watches[1]).await, ServingStatus::Serving);
    assert_eq!(next(&mut watches[2]).await, ServingStatus::ServiceUnknown);
    let request = HealthCheckRequest {
        service: "nobody".to_owned(),
    };
    let error = health.check(request).await.expect_err("unknown");
    assert_eq!(error.code(), Code::NotFound);

    open.send(()).expect("the engine waits");
    worker.ready().await.expect("a ready engine");
    assert_eq!(next(&mut watches[0]).await, ServingStatus::Serving);
    let shutdown = tokio::spawn(worker.shutdown(harness::PATIENCE));
    assert_eq!(next(&mut watches[0]).await, ServingStatus::NotServing);
    drop((watches, health));
    shutdown.await.expect("no panic");
}

#[tokio::test]
async fn reflection_lists_the_service_and_can_be_turned_off() {
    let running = harness::fake(Script::default(), &[]).await;
    let channel = channel(&running.worker).await;
    let request = tonic_reflection::pb::v1::ServerReflectionRequest {
        host: String::new(),
        message_request: Some(MessageRequest::ListServices(String::new())),
    };
    let mut answers = ServerReflectionClient::new(channel.clone())
        .server_reflection_info(tokio_stream::once(request.clone()))
        .await
        .expect("reflection")
        .into_inner();
    let answer = answers
        .message()
        .await
        .expect("a message")
        .expect("not the end");
    let Some(MessageResponse::ListServicesResponse(list)) = answer.message_response else {
        panic!("{answer:?}");
    };
    let names: Vec<&str> = list
        .service
        .iter()
        .map(|service| service.name.as_str())
        .collect();
    assert!(
        names.contains(&SERVICE)
            && names.contains(&"inference.GRPCInferenceService")
            && names.contains(&"grpc.health.v1.Health"),
        "{names:?}"
    );
    running.end().await;

    let running = harness::fake(Script::default(), &["--no-reflection"]).await;
    let channel = self::channel(&running.worker).await;
    let error = ServerReflectionClient::new(channel)
        .server_reflection_info(tokio_stream::once(request))
        .await
        .expect_err("off");
    assert_eq!(error.code(), Code::Unimplemented);
    running.end().await;
}

#[tokio::test]
async fn a_request_id_comes_back() {
    let mut running = harness::fake(Script::default(), &[]).await;
    let mut request = Request::new(pb::GetModelRequest {});
    request
        .metadata_mut()
        .insert("x-request-id", "abc-123".parse().expect("ascii"));
    let response = running.client.get_model(request).await.expect("a model");
    assert_eq!(
        response.metadata().get("x-request-id").expect("an id"),
        "abc-123"
    );
    let response = running
        .client
        .get_model(pb::GetModelRequest {})
        .await
        .expect("a model");
    assert!(
        !response
            .metadata()
            .get("x-request-id")
            .expect("an id")
            .is_empty()
    );
    running.end().await;
}

#[tokio::test]
async fn gzip_is_taken() {
    use tonic::codec::CompressionEncoding::Gzip;
    let running = harness::fake(Script::default(), &[]).await;
    let mut client = running
        .client
        .clone()
        .send_compressed(Gzip)
        .accept_compressed(Gzip);
    let response = client
        .embed(embed(vec![harness::flat(1)]))
        .await
        .expect("a response");
    assert_eq!(response.get_ref().results.len(), 1);
    drop(client);
    running.end().await;
}

/// Probes and tools that compress, such as `grpc_health_probe -gzip`.
#[tokio::test]
async fn health_and_reflection_take_compressed_requests() {
    use tonic::codec::CompressionEncoding::{Deflate, Gzip};
    let worker = harness::fake_worker(Script::default(), &[]).await;
    let channel = channel(&worker).await;
    for encoding in [Gzip, Deflate] {
        let mut health = HealthClient::new(channel.clone()).send_compressed(encoding);
        let request = HealthCheckRequest {
            service: "imagegpt.v1.ImageGptService".to_owned(),
        };
        let response = health.check(request.clone()).await.expect("a status");
        assert_eq!(response.get_ref().status(), ServingStatus::Serving);
        let mut watch = health.watch(request).await.expect("a watch").into_inner();
        assert_eq!(next(&mut watch).await, ServingStatus::Serving);
        // A name over the limit on these messages, which compresses well.
        let request = HealthCheckRequest {
            service: "a".repeat(1 << 20),
        };
        let error = health.check(request).await.expect_err("too large");
        assert_eq!(error.code(), Code::OutOfRange, "{error}");

        let mut reflection = ServerReflectionClient::new(channel.clone()).send_compressed(encoding);
        let request = tonic_reflection::pb::v1::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(MessageRequest::ListServices(String::new())),
        };
        let mut answers = reflection
            .server_reflection_info(tokio_stream::iter([request.clone(), request]))
            .await
            .expect("answers")
            .into_inner();
        for _ in 0..2 {
            answers.message().await.expect("an answer").expect("one");
        }
    }
    drop(channel);
    assert_eq!(worker.shutdown(harness::PATIENCE).await, WorkerEnded::Clean);
}
