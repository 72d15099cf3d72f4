"""Users for locust that call the worker through tritonclient.

    locust -f tests/interop/locustfile.py --headless -u 16 -r 16 -t 8s --host 127.0.0.1:50051

The model is MODEL [untrained]. Users send one image a call, in turn random tokens
and an encoded picture; locust knows no gRPC, so each call is reported by hand.
"""

import io
import os
import sys
import time

# It patches the standard library for gevent, so it comes first.
from locust import User, events, task

import grpc.experimental.gevent  # noqa: E402

grpc.experimental.gevent.init_gevent()

import numpy as np  # noqa: E402
import tritonclient.grpc as triton  # noqa: E402
from PIL import Image  # noqa: E402

MODEL = os.environ.get("MODEL", "untrained")
RANDOM = np.random.default_rng(0)


@events.quit.add_listener
def end(exit_code, **_):
    """gRPC's threads under gevent do not end by themselves."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


class Triton(User):
    def on_start(self):
        self.client = triton.InferenceServerClient(self.host)
        self.outputs = [triton.InferRequestedOutput("embedding")]

    def infer(self, name, tensor):
        started, failure, n_bytes = time.perf_counter(), None, 0
        try:
            answer = self.client.infer(MODEL, [tensor], outputs=self.outputs).as_numpy("embedding")
            n_bytes = answer.nbytes
            if answer.shape[0] != 1 or not np.isfinite(answer).all():
                failure = AssertionError(f"an embedding of shape {answer.shape}")
        except triton.InferenceServerException as error:
            failure = error
        events.request.fire(
            request_type="ModelInfer",
            name=name,
            response_time=1000 * (time.perf_counter() - started),
            response_length=n_bytes,
            exception=failure,
            context={},
        )

    @task
    def tokens(self):
        ids = RANDOM.integers(0, 8, (1, 1024), dtype=np.int64)
        tensor = triton.InferInput("input_ids", ids.shape, "INT64")
        tensor.set_data_from_numpy(ids)
        self.infer("input_ids", tensor)

    @task
    def image(self):
        png = io.BytesIO()
        Image.fromarray(RANDOM.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(png, "PNG")
        tensor = triton.InferInput("image", [1], "BYTES")
        tensor.set_data_from_numpy(np.array([png.getvalue()], dtype=np.object_))
        self.infer("image", tensor)
