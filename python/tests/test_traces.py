"""Spans of a worker, as a collector with OpenTelemetry's own types reads them."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent import futures
from pathlib import Path

import grpc
import pytest
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from imagegpt import LocalWorker
from imagegpt.v1 import imagegpt_pb2 as pb
from imagegpt.v1 import imagegpt_pb2_grpc

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = "00f067aa0ba902b7"
STAGES = ["receive", "admission", "wait", "decode", "queue", "inference", "reply"]


class Collector(trace_service_pb2_grpc.TraceServiceServicer):
    """Collector that keeps the spans that it gets."""

    def __init__(self) -> None:
        self.spans: list[trace_pb2.Span] = []

    def Export(
        self,
        request: trace_service_pb2.ExportTraceServiceRequest,
        context: grpc.ServicerContext,
    ) -> trace_service_pb2.ExportTraceServiceResponse:
        for resource in request.resource_spans:
            for scope in resource.scope_spans:
                self.spans.extend(scope.spans)
        return trace_service_pb2.ExportTraceServiceResponse()


@pytest.fixture
def collector() -> Iterator[tuple[Collector, str]]:
    """A collector, and its URL."""
    server = grpc.server(futures.ThreadPoolExecutor(2))
    collector = Collector()
    trace_service_pb2_grpc.add_TraceServiceServicer_to_server(collector, server)
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    yield collector, f"http://127.0.0.1:{port}"
    server.stop(None).wait()


def test_spans_of_calls_with_and_without_a_parent(
    models: Path, pictures: list[Path], collector: tuple[Collector, str]
) -> None:
    """The stages of a call sum to it, and the batch and its call are linked."""
    kept, url = collector
    images = [pb.Image(encoded=path.read_bytes()) for path in pictures[:3]]
    with (
        LocalWorker(models / "emoji", otlp_endpoint=url, otlp_sample_ratio=0) as worker,
        grpc.insecure_channel(worker.endpoint.removeprefix("http://")) as channel,
    ):
        stub = imagegpt_pb2_grpc.ImageGptServiceStub(channel)
        request = pb.EmbedRequest(images=images)
        parent = ("traceparent", f"00-{TRACE}-{PARENT}-01")
        _, call = stub.Embed.with_call(request, metadata=[parent])
        stub.Embed(request)
    trailers = dict(call.trailing_metadata() or ())
    assert "inference;dur=" in str(trailers["imagegpt-timing"])
    (span,) = [span for span in kept.spans if span.kind == trace_pb2.Span.SPAN_KIND_SERVER]
    assert span.trace_id.hex() == TRACE
    assert span.parent_span_id.hex() == PARENT
    children = [child for child in kept.spans if child.parent_span_id == span.span_id]
    children.sort(key=lambda child: (child.start_time_unix_nano, STAGES.index(child.name)))
    assert [child.name for child in children] == STAGES
    whole = span.end_time_unix_nano - span.start_time_unix_nano
    parts = [child.end_time_unix_nano - child.start_time_unix_nano for child in children]
    assert sum(parts) == pytest.approx(whole, rel=0.01)
    (link,) = children[STAGES.index("inference")].links
    batches = {batch.span_id: batch for batch in kept.spans if batch.name == "batch"}
    assert span.span_id in {link.span_id for link in batches[link.span_id].links}
