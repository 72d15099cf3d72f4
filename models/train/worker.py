"""A running worker, called over gRPC with stubs made from the contract."""

import importlib
import sys
import tempfile
from pathlib import Path

import data
import grpc
import grpc_tools
import numpy as np
from grpc_tools import protoc

CALL_SECONDS = 300
IMAGES_PER_CALL = 16


def load_stubs() -> tuple:
    folder = tempfile.mkdtemp()
    proto = data.ROOT / "proto"
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main([
        "protoc",
        f"-I{proto}",
        f"-I{well_known}",
        f"--python_out={folder}",
        f"--grpc_python_out={folder}",
        "imagegpt/v1/imagegpt.proto",
        "google/rpc/status.proto",
    ])
    if code:
        raise SystemExit("protoc failed")
    sys.path.insert(0, folder)
    return tuple(importlib.import_module(f"imagegpt.v1.imagegpt_pb2{suffix}") for suffix in ("", "_grpc"))


class Worker:
    def __init__(self, endpoint: str):
        self.pb, services = load_stubs()
        self.stub = services.ImageGptServiceStub(grpc.insecure_channel(endpoint))
        self.info = self.stub.GetModel(self.pb.GetModelRequest(), timeout=CALL_SECONDS, wait_for_ready=True)
        self.preprocess = self.pb.Preprocess(alpha=self.pb.ALPHA_WHITE)

    def image(self, source: bytes | np.ndarray):
        """A file as it is, or pixels of (height, width, 3)."""
        if isinstance(source, bytes):
            return self.pb.Image(encoded=source)
        height, width, _ = source.shape
        return self.pb.Image(rgb8=self.pb.RawImage(width=width, height=height, pixels=source.tobytes()))

    def call(self, method, request_type, sources: list, **options):
        """The outcome of each source, in order."""
        for start in range(0, len(sources), IMAGES_PER_CALL):
            images = [self.image(source) for source in sources[start : start + IMAGES_PER_CALL]]
            request = request_type(images=images, preprocess=self.preprocess, **options)
            for result in method(request, timeout=CALL_SECONDS).results:
                if result.WhichOneof("outcome") == "error":
                    raise RuntimeError(result.error.message)
                yield result

    def features(self, sources: list, context: str, norm: str) -> np.ndarray:
        """Pooled features of all layers: (sources, layers, width)."""
        results = self.call(
            self.stub.Embed,
            self.pb.EmbedRequest,
            sources,
            layers=self.info.layers_served,
            context=self.pb.Context.Value(f"CONTEXT_{context}"),
            norm=self.pb.Norm.Value(f"NORM_{norm}"),
        )
        rows = [np.frombuffer(result.embedding.data, "<f4") for result in results]
        return np.stack(rows).reshape(len(sources), -1, self.info.dimension)

    def tokens(self, sources: list) -> np.ndarray:
        results = self.call(self.stub.Tokenize, self.pb.TokenizeRequest, sources)
        return np.array([result.tokens.ids for result in results])

    def classes(self, sources: list, head: str) -> list[str]:
        """The best class of each source, by a head that the worker has loaded."""
        results = self.call(self.stub.Classify, self.pb.ClassifyRequest, sources, head=head, top_k=1)
        return [result.classification.classes[0].label for result in results]
