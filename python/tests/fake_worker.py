"""Worker that answers as a test says, over the real protocol."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import numpy
from google.protobuf import any_pb2
from google.rpc import error_details_pb2, status_pb2

from imagegpt.v1 import imagegpt_pb2 as pb
from imagegpt.v1 import imagegpt_pb2_grpc

DIMENSION = 4


def vector(content: bytes) -> numpy.ndarray[Any, Any]:
    """Vector that a fake worker gives for an image: four numbers of its hash."""
    return numpy.frombuffer(hashlib.sha256(content).digest()[:DIMENSION], numpy.uint8).astype("<f4")


def failed(
    context: grpc.ServicerContext,
    code: grpc.StatusCode,
    message: str,
    reason: str | None = None,
    retry_after: float | None = None,
) -> None:
    """Ends a call with a status and its details, as the worker does."""
    details: list[any_pb2.Any] = []
    if reason is not None:
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(reason=reason, domain="imagegpt.v1"))
        details.append(info)
    if retry_after is not None:
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromNanoseconds(int(retry_after * 1e9))
        packed = any_pb2.Any()
        packed.Pack(retry)
        details.append(packed)
    status = status_pb2.Status(code=code.value[0], message=message, details=details)
    context.set_trailing_metadata(
        (("grpc-status-details-bin", status.SerializeToString()), ("x-request-id", "abc123"))
    )
    context.abort(code, message)


class FakeWorker(imagegpt_pb2_grpc.ImageGptServiceServicer):
    """Fake worker. ``on_stream`` and ``on_embed`` may end a call or answer
    otherwise; each is given the number of the call and the context."""

    def __init__(self, digest: str = "sha256:one", port: int = 0, window: int = 8) -> None:
        self.digest = digest
        self.window = window
        self.limits = pb.Limits(
            images_per_call_max=3,
            request_bytes_max=1 << 20,
            response_bytes_max=1 << 20,
            image_bytes_max=1 << 16,
            stream_window_max=window,
        )
        #: Content of each image that a stream has read, in order.
        self.read: list[bytes] = []
        #: Content of each image that was embedded by a call.
        self.embedded: list[bytes] = []
        self.metadata: list[dict[str, str]] = []
        self.streams = 0
        self.calls = 0
        #: Called before an item of a stream is answered: (stream, item, context).
        self.on_item: Callable[[int, int, bytes, grpc.ServicerContext], Any] = lambda *_: None
        self.on_open: Callable[[int, grpc.ServicerContext], Any] = lambda *_: None
        self.on_embed: Callable[[int, grpc.ServicerContext], Any] = lambda *_: None
        self._lock = threading.Lock()
        self._server = grpc.server(
            ThreadPoolExecutor(32),
            options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", -1)],
        )
        imagegpt_pb2_grpc.add_ImageGptServiceServicer_to_server(self, self._server)
        self.port = self._server.add_insecure_port(f"127.0.0.1:{port}")
        self._server.start()

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def stop(self) -> None:
        """Ends the worker at once, with its connections."""
        self._server.stop(None).wait()

    def __enter__(self) -> FakeWorker:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def GetModel(self, request: Any, context: grpc.ServicerContext) -> pb.GetModelResponse:
        self.metadata.append({str(key): str(value) for key, value in context.invocation_metadata()})
        return pb.GetModelResponse(
            name="fake",
            digest=self.digest,
            dimension=DIMENSION,
            positions=16,
            side=4,
            layers=2,
            layers_served=[0, 1, 2],
            layer_default=1,
            limits=self.limits,
            tasks=[pb.TASK_EMBED],
        )

    def Embed(self, request: pb.EmbedRequest, context: grpc.ServicerContext) -> pb.EmbedResponse:
        with self._lock:
            self.calls += 1
            call = self.calls
        self.on_embed(call, context)
        results = []
        for image in request.images:
            self.embedded.append(image.encoded)
            results.append(pb.EmbedResult(embedding=_tensor(image.encoded, request.layers)))
        return pb.EmbedResponse(results=results, model_digest=self.digest, layers=request.layers)

    def EmbedStream(
        self, requests: Iterator[pb.EmbedStreamRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.EmbedStreamResponse]:
        with self._lock:
            self.streams += 1
            stream = self.streams
        options = next(requests).open
        self.on_open(stream, context)
        applied = pb.EmbedStreamOptions()
        applied.CopyFrom(options)
        applied.window = options.window or self.window
        opened = pb.EmbedStreamOpened(model_digest=self.digest, options=applied)
        yield pb.EmbedStreamResponse(opened=opened)
        for number, request in enumerate(requests):
            content = request.item.image.encoded
            self.read.append(content)
            answer = self.on_item(stream, number, content, context)
            if isinstance(answer, pb.EmbedStreamResult):
                answer.id = answer.id or request.item.id
                yield pb.EmbedStreamResponse(result=answer)
                continue
            result = pb.EmbedStreamResult(
                id=request.item.id, embedding=_tensor(content, options.layers)
            )
            yield pb.EmbedStreamResponse(result=result)


def _tensor(content: bytes, layers: Any) -> pb.Tensor:
    one = vector(content)
    if len(layers) > 1:
        data = b"".join((one + layer).astype("<f4").tobytes() for layer in layers)
        return pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[len(layers), DIMENSION], data=data)
    return pb.Tensor(dtype=pb.DATA_TYPE_F32, shape=[DIMENSION], data=one.tobytes())
