//! Spans that a collector gets, times in trailers and in response parameters,
//! and the access log.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, OnceLock};
use std::time::Duration;

use imagegpt::engine::fake::Script;
use imagegpt::proto::inference::infer_parameter::ParameterChoice;
use imagegpt::proto::pb;
use opentelemetry_proto::tonic::collector::trace::v1::trace_service_server::{
    TraceService, TraceServiceServer,
};
use opentelemetry_proto::tonic::collector::trace::v1::{
    ExportTraceServiceRequest, ExportTraceServiceResponse,
};
use opentelemetry_proto::tonic::common::v1::any_value::Value;
use opentelemetry_proto::tonic::trace::v1::Span;
use opentelemetry_proto::tonic::trace::v1::span::SpanKind;
use opentelemetry_proto::tonic::trace::v1::status::StatusCode;
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::metadata::MetadataMap;
use tonic::{Request, Response, Status};

use crate::harness::{
    self, Running, embed, encoded, flat, gated, seeded, tokens, until, until_sample,
};
use crate::oip::{client, files, golden, ids, infer};
use crate::process;
use crate::stream::Conversation;

/// Trace and span of a caller, and whether the caller samples them.
const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736";
const PARENT: &str = "00f067aa0ba902b7";
const METHOD: &str = "imagegpt.v1.ImageGptService/Embed";

/// Collector that keeps what it gets, with the metadata of the first message.
#[derive(Debug, Clone, Default)]
struct Collector(
    Arc<Mutex<Vec<ExportTraceServiceRequest>>>,
    Arc<OnceLock<MetadataMap>>,
);

#[tonic::async_trait]
impl TraceService for Collector {
    async fn export(
        &self,
        request: Request<ExportTraceServiceRequest>,
    ) -> Result<Response<ExportTraceServiceResponse>, Status> {
        let (metadata, _, message) = request.into_parts();
        self.1.get_or_init(|| metadata);
        self.0.lock().expect("no panic").push(message);
        Ok(Response::new(ExportTraceServiceResponse::default()))
    }
}

impl Collector {
    async fn start() -> (Self, SocketAddr) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port");
        let addr = listener.local_addr().expect("an address");
        let collector = Self::default();
        let service = TraceServiceServer::new(collector.clone());
        let server = tonic::transport::Server::builder().add_service(service);
        let incoming = TcpListenerStream::new(listener);
        tokio::spawn(server.serve_with_incoming(incoming));
        (collector, addr)
    }

    fn spans(&self) -> Vec<Span> {
        let requests = self.0.lock().expect("no panic");
        let resources = requests.iter().flat_map(|request| &request.resource_spans);
        let scopes = resources.flat_map(|resource| &resource.scope_spans);
        scopes.flat_map(|scope| scope.spans.clone()).collect()
    }

    fn named(&self, name: &str) -> Vec<Span> {
        let mut spans = self.spans();
        spans.retain(|span| span.name == name);
        spans
    }
}

fn hex(bytes: &[u8]) -> String {
    use std::fmt::Write as _;
    bytes.iter().fold(String::new(), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// Returns an attribute of a span, as text.
fn attribute(span: &Span, key: &str) -> Option<String> {
    let found = span.attributes.iter().find(|pair| pair.key == key)?;
    Some(match found.value.as_ref()?.value.as_ref()? {
        Value::StringValue(text) => text.clone(),
        Value::IntValue(number) => number.to_string(),
        other => format!("{other:?}"),
    })
}

fn duration(span: &Span) -> Duration {
    Duration::from_nanos(span.end_time_unix_nano - span.start_time_unix_nano)
}

/// Starts a worker that sends its spans to a collector.
async fn traced(script: Script, flags: &[&str]) -> (Running, Collector) {
    let (collector, addr) = Collector::start().await;
    let url = format!("http://{addr}");
    let flags = [&["--otlp-endpoint", &url], flags].concat();
    (harness::fake(script, &flags).await, collector)
}

fn with_parent(images: Vec<pb::Image>, flags: &str) -> Request<pb::EmbedRequest> {
    let mut request = Request::new(embed(images));
    let parent = format!("00-{TRACE}-{PARENT}-{flags}");
    let metadata = request.metadata_mut();
    metadata.insert("traceparent", parent.parse().expect("ascii"));
    metadata.insert("tracestate", "vendor=1".parse().expect("ascii"));
    metadata.insert("x-request-id", "of-the-test".parse().expect("ascii"));
    request
}

/// Returns the times of the stages in a trailer, and the size of the batch.
fn times(timing: &str) -> BTreeMap<String, f64> {
    let mut found = BTreeMap::new();
    for part in timing.split(", ") {
        let mut fields = part.split(';');
        let name = fields.next().expect("a name");
        for field in fields {
            let (key, value) = field.split_once('=').expect("a value");
            let key = match key {
                "dur" => name.to_owned(),
                key => key.to_owned(),
            };
            found.insert(key, value.parse().expect("a number"));
        }
    }
    found
}

fn sum_of_stages(times: &BTreeMap<String, f64>) -> f64 {
    let stages = [
        "receive",
        "admission",
        "wait",
        "decode",
        "queue",
        "inference",
        "reply",
    ];
    stages.iter().map(|stage| times[*stage]).sum()
}

#[tokio::test]
async fn a_call_is_a_child_of_its_callers_span_and_its_stages_sum_to_it() {
    let script = Script {
        delay: Duration::from_millis(20),
        ..Default::default()
    };
    let (mut running, collector) = traced(script, &[]).await;
    let picture = encoded(golden("emoji-1f308.png"));
    let request = with_parent(vec![picture, flat(3)], "01");
    let response = running.client.embed(request).await.expect("a response");
    let timing = response.metadata().get("imagegpt-timing").expect("times");
    let timing = times(timing.to_str().expect("ascii"));
    assert!(timing["inference"] >= 20.0, "{timing:?}");
    assert!(
        timing["decode"] > 0.0 && timing["batch"] >= 1.0,
        "{timing:?}"
    );
    let sum = sum_of_stages(&timing);
    assert!((sum - timing["total"]).abs() <= 0.01, "{timing:?}");
    running.end().await;

    let [call] = &collector.named(METHOD)[..] else {
        panic!("{:?}", collector.spans());
    };
    assert_eq!(hex(&call.trace_id), TRACE);
    assert_eq!(hex(&call.parent_span_id), PARENT);
    assert_eq!(call.trace_state, "vendor=1");
    assert_eq!(call.kind, SpanKind::Server as i32);
    let of = |key| attribute(call, key).unwrap_or_default();
    assert_eq!(of("rpc.system"), "grpc");
    assert_eq!(of("rpc.service"), "imagegpt.v1.ImageGptService");
    assert_eq!(of("rpc.method"), "Embed");
    assert_eq!(of("rpc.grpc.status_code"), "0");
    assert_eq!(of("imagegpt.request_id"), "of-the-test");
    assert_eq!(of("imagegpt.images"), "2");
    assert_eq!(of("imagegpt.class"), "interactive");
    assert_eq!(of("client.address"), "127.0.0.1");
    let mut children = collector.spans();
    children.retain(|span| span.parent_span_id == call.span_id);
    children.sort_by_key(|span| span.start_time_unix_nano);
    let names: Vec<&str> = children.iter().map(|span| span.name.as_str()).collect();
    let stages = ["receive", "admission", "wait", "decode"];
    assert_eq!(
        names,
        [&stages[..], &["queue", "inference", "reply"]].concat()
    );
    // Each stage begins where the one before it ended.
    let mut at = call.start_time_unix_nano;
    for child in &children {
        assert_eq!(child.trace_id, call.trace_id);
        assert_eq!(child.start_time_unix_nano, at, "{}", child.name);
        at = child.end_time_unix_nano;
    }
    assert_eq!(at, call.end_time_unix_nano);
    let sum: Duration = children.iter().map(duration).sum();
    let off = sum.abs_diff(duration(call));
    assert!(
        off <= duration(call) / 100,
        "{sum:?} of {:?}",
        duration(call)
    );
    // The batch and the call know each other.
    let inference = &children[5];
    let [link] = &inference.links[..] else {
        panic!("{inference:?}");
    };
    let batches = collector.named("batch");
    let batch = batches.iter().find(|batch| batch.span_id == link.span_id);
    let batch = batch.expect("the batch of the link");
    assert_eq!(batch.trace_id, link.trace_id);
    assert!(batch.links.iter().any(|link| link.span_id == call.span_id));
    assert_eq!(
        attribute(batch, "imagegpt.images"),
        attribute(inference, "imagegpt.batch")
    );
    assert!(duration(batch) >= Duration::from_millis(20));
}

#[tokio::test]
async fn calls_of_one_batch_are_linked_to_it() {
    let (open, script) = gated();
    let (running, collector) = traced(script, &["--max-queue-delay", "0s"]).await;
    let call = |seed: u32| {
        let mut client = running.client.clone();
        tokio::spawn(async move { client.embed(embed(vec![tokens(seeded(seed))])).await })
    };
    // The first call runs alone, and the others wait together meanwhile; the
    // last two are one row.
    let first = call(0);
    running.until_in_flight(1).await;
    crate::batching::wait_for_batches(&running, 1.0).await;
    let rest = [call(1), call(2), call(2)];
    running.until_in_flight(4).await;
    for _ in 0..2 {
        open.send(()).expect("a run");
    }
    first.await.expect("no panic").expect("a response");
    for call in rest {
        let response = call.await.expect("no panic").expect("a response");
        let timing = response
            .metadata()
            .get("imagegpt-timing")
            .expect("times")
            .to_str();
        assert_eq!(times(timing.expect("ascii"))["batch"], 2.0);
    }
    running.end().await;
    let calls = collector.named(METHOD);
    assert_eq!(calls.len(), 4);
    let mut links: Vec<usize> = Vec::new();
    for batch in collector.named("batch") {
        links.push(batch.links.len());
        for link in &batch.links {
            assert!(calls.iter().any(|call| call.span_id == link.span_id));
        }
    }
    links.sort_unstable();
    assert_eq!(links, [1, 3]);
    let traces: std::collections::BTreeSet<_> = calls.iter().map(|call| &call.trace_id).collect();
    assert_eq!(traces.len(), 4, "a trace for each call without a parent");
}

#[tokio::test]
async fn the_callers_decision_is_followed_and_others_are_sampled_by_ratio() {
    let (mut running, collector) = traced(Script::default(), &["--otlp-sample-ratio", "0"]).await;
    let client = &mut running.client;
    client.embed(embed(vec![flat(1)])).await.expect("unsampled");
    let not = with_parent(vec![flat(2)], "00");
    client.embed(not).await.expect("unsampled by its caller");
    let malformed = [
        "00-0-0-01",
        "",
        "00-",
        "zz-4bf92f3577b34da6a3ce929d0e0e4736-1-01",
    ];
    let mut doubled = with_parent(vec![flat(5)], "01");
    let second = format!("00-{TRACE}-00f067aa0ba902b8-01").parse();
    let second: tonic::metadata::MetadataValue<_> = second.expect("ascii");
    doubled.metadata_mut().append("traceparent", second);
    client.embed(doubled).await.expect("served all the same");
    for parent in malformed {
        let mut request = Request::new(embed(vec![flat(3)]));
        let value = parent.parse().expect("ascii");
        request.metadata_mut().insert("traceparent", value);
        client.embed(request).await.expect("served all the same");
    }
    let sampled = with_parent(vec![flat(4)], "01");
    client.embed(sampled).await.expect("sampled by its caller");
    running.end().await;
    assert_eq!(collector.named(METHOD).len(), 1, "{:?}", collector.spans());
}

#[tokio::test]
async fn a_failed_call_has_the_stages_it_reached_and_its_status() {
    let (open, script) = gated();
    let (mut running, collector) = traced(script, &["--max-queue-delay", "0s"]).await;
    // On a busy machine the client's own timer may be first.
    let timing = loop {
        let mut late = with_parent(vec![flat(1)], "01");
        let timeout = "50m".parse().expect("ascii");
        late.metadata_mut().insert("grpc-timeout", timeout);
        let status = running.client.embed(late).await.expect_err("late");
        if !harness::is_clients_timer(&status) {
            let timing = status.metadata().get("imagegpt-timing").cloned();
            break timing.expect("times");
        }
    };
    let total = times(timing.to_str().expect("ascii"))["total"];
    assert!(total >= 40.0, "{total}");
    let wrong = with_parent(Vec::new(), "01");
    running.client.embed(wrong).await.expect_err("no images");
    drop(open);
    running.end().await;
    let mut calls = collector.named(METHOD);
    calls.sort_by_key(|call| std::cmp::Reverse(duration(call)));
    let codes = calls
        .iter()
        .map(|call| attribute(call, "rpc.grpc.status_code"));
    let mut codes: Vec<String> = codes.map(Option::unwrap_or_default).collect();
    // A call that the client ended was cancelled, or late in the worker as well.
    calls.retain(|call| attribute(call, "rpc.grpc.status_code").as_deref() != Some("1"));
    codes.retain(|code| code != "1");
    codes.dedup();
    assert_eq!(codes, ["4", "3"]);
    let status = |call: &Span| call.status.clone().unwrap_or_default().code;
    let [late, .., wrong] = &calls[..] else {
        panic!("{calls:#?}");
    };
    assert_eq!(status(late), StatusCode::Error as i32);
    assert_eq!(
        status(wrong),
        StatusCode::Unset as i32,
        "the caller's fault"
    );
}

#[tokio::test]
async fn a_call_that_ends_early_is_in_the_stage_it_had_reached() {
    let (open, script) = gated();
    let (running, collector) = traced(script, &["--max-queue-delay", "0s"]).await;
    // Both images of the call wait behind the first call.
    let mut client = running.client.clone();
    let first = tokio::spawn(async move { client.embed(embed(vec![flat(9)])).await });
    running.until_in_flight(1).await;
    crate::batching::wait_for_batches(&running, 1.0).await;
    let mut client = running.client.clone();
    let request = with_parent(vec![flat(1), flat(2)], "01");
    let call = tokio::spawn(async move { client.embed(request).await });
    running.until_in_flight(3).await;
    crate::batching::wait_for_depth(&running, 2.0).await;
    harness::pause(Duration::from_millis(30)).await;
    call.abort();
    running.until_in_flight(1).await;
    open.send(()).expect("a run");
    first.await.expect("no panic").expect("served");
    running.end().await;
    let calls = collector.named(METHOD);
    let mut calls = calls
        .iter()
        .filter(|call| hex(&call.parent_span_id) == PARENT);
    let call = calls.next().expect("the call that was cancelled");
    assert_eq!(
        attribute(call, "rpc.grpc.status_code").as_deref(),
        Some("1")
    );
    let mut children = collector.spans();
    children.retain(|span| span.parent_span_id == call.span_id);
    let waited = |name: &str| {
        let found = children.iter().find(|span| span.name == name);
        duration(found.unwrap_or_else(|| panic!("no {name}: {children:#?}")))
    };
    assert!(waited("queue") >= Duration::from_millis(30));
    assert!(waited("admission") < Duration::from_millis(30));
    assert_eq!(
        children.iter().map(duration).sum::<Duration>(),
        duration(call)
    );
}

#[tokio::test]
async fn a_request_that_is_late_itself_has_only_arrived() {
    let (running, collector) = traced(Script::default(), &[]).await;
    let channel = tonic::transport::Endpoint::from_shared(running.url()).expect("a URL");
    let mut client = tonic::client::Grpc::new(channel.connect().await.expect("a connection"));
    client.ready().await.expect("a connection");
    // The only message of the call never comes.
    let mut request = Request::new(tokio_stream::pending::<pb::EmbedRequest>());
    let metadata = request.metadata_mut();
    metadata.insert("grpc-timeout", "50m".parse().expect("ascii"));
    let path = http::uri::PathAndQuery::from_static("/imagegpt.v1.ImageGptService/Embed");
    let codec = tonic_prost::ProstCodec::<pb::EmbedRequest, pb::EmbedResponse>::default();
    let status = client
        .streaming(request, path, codec)
        .await
        .expect_err("late");
    if !harness::is_clients_timer(&status) {
        assert_eq!(status.code(), tonic::Code::DeadlineExceeded);
        assert!(
            status.message().contains("while the request arrived"),
            "{status:?}"
        );
    }
    drop(client);
    running.end().await;
    let [call] = &collector.named(METHOD)[..] else {
        panic!("{:?}", collector.spans());
    };
    let mut children = collector.spans();
    children.retain(|span| span.parent_span_id == call.span_id);
    let names: Vec<&str> = children.iter().map(|span| span.name.as_str()).collect();
    assert_eq!(names, ["receive"]);
    assert_eq!(duration(&children[0]), duration(call));
}

#[tokio::test]
async fn strangers_do_not_decide_what_is_traced() {
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("tokens");
    std::fs::write(&file, "probe 0123456789abcdef").expect("written");
    let tokens = file.to_str().expect("UTF-8");
    let flags = ["--auth-tokens-file", tokens, "--otlp-sample-ratio", "0"];
    let (mut running, collector) = traced(Script::default(), &flags).await;
    let unknown = with_parent(vec![flat(1)], "01");
    let status = running.client.embed(unknown).await.expect_err("no token");
    assert_eq!(status.code(), tonic::Code::Unauthenticated);
    let mut known = with_parent(vec![flat(1)], "01");
    let token = "Bearer 0123456789abcdef".parse().expect("ascii");
    known.metadata_mut().insert("authorization", token);
    running.client.embed(known).await.expect("served");
    running.end().await;
    let [call] = &collector.named(METHOD)[..] else {
        panic!("{:?}", collector.spans());
    };
    assert_eq!(attribute(call, "imagegpt.caller").as_deref(), Some("probe"));
}

/// The ratio and the caller's span must both sample the call of a stranger.
#[tokio::test]
async fn of_a_stranger_the_ratio_samples_no_more_than_its_span() {
    let folder = tempfile::tempdir().expect("a directory");
    let file = folder.path().join("tokens");
    std::fs::write(&file, "probe 0123456789abcdef").expect("written");
    let tokens = file.to_str().expect("UTF-8");
    let flags = ["--auth-tokens-file", tokens, "--otlp-sample-ratio", "1"];
    let (mut running, collector) = traced(Script::default(), &flags).await;
    let alone = Request::new(embed(vec![flat(1)]));
    for request in [
        with_parent(vec![flat(1)], "00"),
        with_parent(vec![flat(1)], "01"),
        alone,
    ] {
        let status = running.client.embed(request).await.expect_err("no token");
        assert_eq!(status.code(), tonic::Code::Unauthenticated);
    }
    running.end().await;
    let calls = collector.named(METHOD);
    let parents: Vec<String> = calls.iter().map(|call| hex(&call.parent_span_id)).collect();
    assert_eq!(parents, [PARENT, ""]);
}

#[tokio::test]
async fn a_caller_fills_no_queue_with_its_own_words() {
    let (mut running, collector) = traced(Script::default(), &[]).await;
    let mut request = with_parent((0..20).map(|_| flat(1)).collect(), "01");
    let vendors: Vec<String> = (0..32)
        .map(|idx| format!("v{idx}={}", "x".repeat(200)))
        .collect();
    let state = vendors.join(",").parse().expect("ascii");
    request.metadata_mut().insert("tracestate", state);
    running.client.embed(request).await.expect("served");
    running.end().await;
    let spans = collector.spans();
    assert!(spans.iter().all(|span| span.trace_state.is_empty()));
    // Twenty equal images of one call are one link.
    let links: usize = spans
        .iter()
        .filter(|span| span.name == "batch")
        .map(|b| b.links.len())
        .sum();
    assert!((1..=3).contains(&links), "{links}");
    let states = spans
        .iter()
        .flat_map(|span| &span.links)
        .map(|link| &link.trace_state);
    assert!(states.into_iter().all(String::is_empty));
}

#[tokio::test]
async fn a_stream_has_an_event_for_each_image_and_means_in_its_trailers() {
    let script = Script {
        delay: Duration::from_millis(5),
        ..Default::default()
    };
    let (running, collector) = traced(script, &[]).await;
    let mut conversation =
        Conversation::open(&running.client, pb::EmbedStreamOptions::default()).await;
    for seed in 0..3 {
        let id = seed.to_string();
        conversation.item(&id, tokens(seeded(seed))).await;
        conversation.answer().await.1.expect("a vector");
    }
    let trailers = conversation.trailers().await;
    let timing = times(
        trailers
            .get("imagegpt-timing")
            .expect("times")
            .to_str()
            .expect("ascii"),
    );
    assert_eq!(timing["images"], 3.0);
    assert!(
        timing["inference"] >= 5.0 && timing["total"] >= 15.0,
        "{timing:?}"
    );
    running.end().await;
    let [call] = &collector.named("imagegpt.v1.ImageGptService/EmbedStream")[..] else {
        panic!("{:?}", collector.spans());
    };
    assert_eq!(call.events.len(), 3);
    assert_eq!(attribute(call, "imagegpt.images").as_deref(), Some("3"));
    assert!(duration(call) >= Duration::from_millis(15));
    let batches = collector.named("batch");
    assert_eq!(batches.len(), 3);
    assert!(
        batches
            .iter()
            .all(|batch| batch.links[0].span_id == call.span_id)
    );
}

#[tokio::test]
async fn a_collector_that_is_away_costs_nothing_but_a_count() {
    let closed = process::free_port();
    let url = format!("http://{closed}");
    let mut running = harness::fake(Script::default(), &["--otlp-endpoint", &url]).await;
    for _ in 0..3 {
        let response = running.client.embed(embed(vec![flat(1)])).await;
        response.expect("a response");
    }
    let dropped = "imagegpt_spans_dropped_total{reason=\"collector\"}";
    // A call, its stages and its batch.
    until_sample(&running, dropped, |n| n >= 27.0).await;
    assert_eq!(running.sample("imagegpt_spans_exported_total").await, 0.0);
    running.end().await;
}

#[tokio::test]
async fn a_collector_that_never_answers_holds_up_no_call_and_no_shutdown() {
    // Connections are accepted by the system, and nobody reads.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    let url = format!("http://{}", silent.local_addr().expect("an address"));
    let mut running = harness::fake(Script::default(), &["--otlp-endpoint", &url]).await;
    // More spans than may wait: the first message is on its way, for seconds.
    for _ in 0..1500 {
        let response = running.client.embed(embed(vec![flat(1)])).await;
        response.expect("a response");
    }
    let dropped = "imagegpt_spans_dropped_total{reason=\"queue\"}";
    until_sample(&running, dropped, |n| n > 0.0).await;
    let begun = std::time::Instant::now();
    running.end().await;
    assert!(
        begun.elapsed() < Duration::from_secs(10),
        "{:?}",
        begun.elapsed()
    );
}

#[tokio::test]
async fn spans_arrive_while_the_worker_runs() {
    let (mut running, collector) = traced(Script::default(), &[]).await;
    running
        .client
        .embed(embed(vec![flat(1)]))
        .await
        .expect("served");
    until(&running, "a span", async || {
        !collector.named(METHOD).is_empty()
    })
    .await;
    until_sample(&running, "imagegpt_spans_exported_total", |n| n >= 9.0).await;
    let requests = collector.0.lock().expect("no panic").clone();
    let resource = requests[0].resource_spans[0].resource.clone();
    let pairs = resource.expect("a resource").attributes;
    let name = pairs.iter().find(|pair| pair.key == "service.name");
    let name = name.and_then(|pair| pair.value.clone()?.value);
    assert_eq!(name, Some(Value::StringValue("imagegpt-worker".to_owned())));
    running.end().await;
}

#[tokio::test]
async fn responses_of_open_inference_have_times_as_parameters() {
    let script = Script {
        delay: Duration::from_millis(20),
        ..Default::default()
    };
    let running = harness::fake(script, &[]).await;
    let mut client = client(&running).await;
    let response = infer(&mut client, &ids(&[seeded(1), seeded(2)])).await;
    let response = response.expect("a response");
    let number = |name: &str| match response.parameters[name].parameter_choice {
        Some(ParameterChoice::DoubleParam(number)) => number,
        ref other => panic!("{name}: {other:?}"),
    };
    assert!(number("inference_ms") >= 20.0);
    assert!(number("queue_ms") >= 0.0 && number("wait_ms") >= 0.0);
    let batch = &response.parameters["batch"].parameter_choice;
    assert!(
        matches!(batch, Some(ParameterChoice::Int64Param(1 | 2))),
        "{batch:?}"
    );
    let picture = golden("emoji-1f308.png");
    let response = infer(&mut client, &files(&[&picture])).await;
    let response = response.expect("a response");
    let decode = &response.parameters["decode_ms"].parameter_choice;
    assert!(
        matches!(decode, Some(ParameterChoice::DoubleParam(ms)) if *ms > 0.0),
        "{decode:?}"
    );
    running.end().await;
}

#[tokio::test]
async fn the_access_log_has_a_line_per_call_with_times_as_numbers() {
    let model = harness::model_dir("micro");
    let model = model.to_str().expect("an UTF-8 path");
    let flags = ["--model", model, "--fake-engine", "5ms", "--access-log"];
    let (worker, log) = process::Worker::logging(&flags);
    let mut client = harness::Client::connect(worker.url())
        .await
        .expect("a connection");
    let picture = encoded(golden("emoji-1f308.png"));
    client.embed(embed(vec![picture])).await.expect("served");
    client
        .embed(embed(Vec::new()))
        .await
        .expect_err("no images");
    drop(client);
    worker.end();
    let lines = log.rest();
    let events = lines
        .iter()
        .map(|line| serde_json::from_str(line).expect("JSON"));
    let events: Vec<serde_json::Value> = events.collect();
    let calls = events
        .iter()
        .filter(|event| event["target"] == "imagegpt::access");
    let [event, refused] = &calls.collect::<Vec<_>>()[..] else {
        panic!("{lines:#?}");
    };
    assert_eq!(event["span"]["method"], "Embed");
    assert_eq!(refused["code"], "INVALID_ARGUMENT");
    assert!(refused.get("inference_ms").is_none(), "{refused}");
    assert_eq!(event["level"], "INFO");
    assert_eq!(event["code"], "OK");
    assert_eq!((&event["images"], &event["batch"]), (&1.into(), &1.into()));
    assert!(event["span"]["request_id"].is_string());
    assert!(
        event["peer"]
            .as_str()
            .expect("text")
            .starts_with("127.0.0.1:")
    );
    let ms = |name: &str| {
        event[name]
            .as_f64()
            .unwrap_or_else(|| panic!("{name}: {event}"))
    };
    assert!(ms("inference_ms") >= 5.0 && ms("decode_ms") > 0.0);
    let stages = [
        "receive_ms",
        "admission_ms",
        "wait_ms",
        "decode_ms",
        "queue_ms",
        "inference_ms",
        "reply_ms",
    ];
    let sum: f64 = stages.iter().map(|name| ms(name)).sum();
    assert!((sum - ms("total_ms")).abs() < 0.01, "{event}");
}

/// A header that cannot be read is missing at the collector, which is said at the
/// start; the others are sent.
#[tokio::test(flavor = "multi_thread")]
async fn headers_that_cannot_be_read_are_named_and_the_others_are_sent() {
    let (collector, addr) = Collector::start().await;
    let (url, model) = (format!("http://{addr}"), harness::model_dir("micro"));
    let model = model.to_str().expect("an UTF-8 path").to_owned();
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("log");
    let log = std::fs::File::create(&path).expect("a file");
    let started = tokio::task::spawn_blocking(move || {
        let mut flags = vec!["--model", &model, "--fake-engine", "0s"];
        flags.extend(["--otlp-endpoint", &url, "--log-format", "json"]);
        let headers = "x-team=vision,Bearer s3cret,x-none=,authorization=Bearer%20t0ken";
        process::Worker::start_with(&flags, &[("OTEL_EXPORTER_OTLP_HEADERS", headers)], log)
    });
    let worker = started.await.expect("a worker");
    let mut client = harness::Client::connect(worker.url())
        .await
        .expect("a connection");
    client.embed(embed(vec![flat(1)])).await.expect("served");
    drop(client);
    // The last spans are sent.
    tokio::task::spawn_blocking(|| worker.end())
        .await
        .expect("an end");
    let metadata = collector.1.get().expect("a message");
    assert_eq!(metadata.get("x-team").expect("sent"), "vision");
    assert_eq!(metadata.get("authorization").expect("sent"), "Bearer t0ken");
    let log = std::fs::read_to_string(path).expect("a log");
    assert!(!log.contains("s3cret") && !log.contains("t0ken"), "{log}");
    let mut lines = log.lines().filter(|line| line.contains("OTLP_HEADERS"));
    let line = lines.next().unwrap_or_else(|| panic!("{log}"));
    let event: serde_json::Value = serde_json::from_str(line).expect("JSON");
    assert_eq!(event["level"], "WARN");
    assert_eq!((event["entries"].as_u64(), lines.next()), (Some(2), None));
    assert_eq!(event["first"], "entry 2: it is no NAME=VALUE");
}
