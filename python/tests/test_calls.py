"""Calls with one answer: requests within the limits, repetitions, errors."""

from __future__ import annotations

import asyncio
import os
import pickle
import socket
import threading
import time

import grpc
import numpy
import pytest
from fake_worker import FakeWorker, failed, vector

import imagegpt.calls
from imagegpt import (
    AsyncClient,
    Client,
    ClosedError,
    DeadlineExceededError,
    InvalidImageError,
    ModelMismatchError,
    ResourceExhaustedError,
    UnauthenticatedError,
    UnavailableError,
    UnimplementedError,
    WorkerError,
)
from imagegpt.calls import Failure, Patience


def contents(count: int) -> list[bytes]:
    return [f"image {number}".encode() for number in range(count)]


def test_a_call_with_many_images_is_several_requests_within_the_limits() -> None:
    images = contents(20)
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        vectors = client.embed(images)
        numpy.testing.assert_array_equal(vectors, numpy.stack([vector(image) for image in images]))
        # images_per_call_max is 3.
        assert worker.calls == 7
        worker.limits.images_per_call_max = 100
        worker.limits.request_bytes_max = 100_000
        with Client(worker.endpoint) as other:
            large = [bytes([number]) * 40_000 for number in range(6)]
            assert other.embed(large).shape == (6, 4)
        assert worker.calls == 10
        assert sorted(worker.embedded) == sorted([*images, *large])


def test_answers_are_bounded_too() -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        # 4 numbers of 4 bytes for each of 2 layers: one image per answer.
        worker.limits.response_bytes_max = 40
        assert client.embed(contents(3), layers=[0, 2]).shape == (3, 2, 4)
        assert worker.calls == 3


def test_no_images_give_an_empty_array_of_the_right_shape() -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        assert client.embed([]).shape == (0, 4)
        assert client.embed([], layers="all").shape == (0, 2, 4)
        assert client.embed([], dtype="f16").dtype == numpy.float16


@pytest.mark.parametrize(
    ("code", "retry_after"),
    [(grpc.StatusCode.UNAVAILABLE, None), (grpc.StatusCode.RESOURCE_EXHAUSTED, 0.02)],
)
def test_a_call_is_repeated_while_the_worker_has_no_room(
    code: grpc.StatusCode, retry_after: float | None
) -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:

        def reject(call: int, context: grpc.ServicerContext) -> None:
            if call < 4:
                failed(context, code, "not now", retry_after=retry_after)

        worker.on_embed = reject
        assert client.embed([b"x"]).shape == (1, 4)
        assert worker.calls == 4


def test_a_message_that_is_too_large_is_not_repeated() -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        worker.on_embed = lambda call, context: failed(
            context, grpc.StatusCode.RESOURCE_EXHAUSTED, "over the limit", reason="MESSAGE"
        )
        with pytest.raises(ResourceExhaustedError, match="over the limit") as caught:
            client.embed(contents(2))
        assert worker.calls == 1
        error = caught.value
        assert (error.reason, error.request_id) == ("MESSAGE", "abc123")
        assert list(error.items) == [0, 1]


def test_a_failed_request_names_the_images_that_have_no_answer() -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:

        def refuse(call: int, context: grpc.ServicerContext) -> None:
            if worker.embedded:
                failed(context, grpc.StatusCode.INTERNAL, "broken")

        worker.on_embed = refuse
        with pytest.raises(WorkerError, match="broken") as caught:
            client.embed(contents(9))
        assert 8 in caught.value.items
        assert len(caught.value.items) < 9


def test_the_worker_that_answers_is_asked_when_another_is_gone() -> None:
    with FakeWorker() as gone:
        endpoint = gone.endpoint
    with FakeWorker() as worker, Client([endpoint, worker.endpoint]) as client:
        for _ in range(4):
            assert client.embed([b"x"]).shape == (1, 4)


def test_no_worker_is_an_error_that_names_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagegpt.calls, "UNAVAILABLE_PATIENCE", 0.5)
    with FakeWorker() as gone:
        endpoint = gone.endpoint
    begun = time.monotonic()
    with Client(endpoint) as client, pytest.raises(UnavailableError, match=endpoint):
        client.embed([b"x"])
    assert time.monotonic() - begun < 5


def test_a_timeout_is_an_error_of_its_own() -> None:
    gate = threading.Event()
    with FakeWorker() as worker, Client(worker.endpoint, timeout=0.3) as client:
        worker.on_embed = lambda *_: gate.wait(10) and None
        with pytest.raises(DeadlineExceededError) as caught:
            client.embed([b"x"])
        assert isinstance(caught.value, TimeoutError)
        assert list(caught.value.items) == [0]
        gate.set()


def test_the_wait_for_a_full_worker_ends_with_the_timeout() -> None:
    patience = Patience(begun=0.0, timeout=10.0)
    full = Failure("RESOURCE_EXHAUSTED", "full", retry_after=4.0)
    assert patience.wait(full, now=1.0) == 4.0
    assert patience.wait(full, now=5.0) == 4.0
    assert patience.wait(full, now=6.5) is None
    assert patience.wait(Failure("INVALID_ARGUMENT", "wrong"), now=0.0) is None
    # Without a worker the patience is shorter, and counts from the first failure.
    gone = Failure("UNAVAILABLE", "refused")
    patience = Patience(begun=0.0, timeout=None)
    assert patience.wait(gone, now=100.0) is not None
    assert patience.wait(gone, now=105.0) is not None
    assert patience.wait(gone, now=110.5) is None


def test_another_model_in_the_middle_of_a_call_is_an_error() -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:

        def change(call: int, context: grpc.ServicerContext) -> None:
            if call == 3:
                worker.digest = "sha256:two"

        worker.on_embed = change
        with pytest.raises(ModelMismatchError, match="sha256:two"):
            client.embed(contents(20))
        # A new call takes the new model.
        assert client.embed([b"x"]).shape == (1, 4)
    with (
        FakeWorker() as worker,
        Client(worker.endpoint, digest="sha256:two") as client,
        pytest.raises(ModelMismatchError),
    ):
        client.model()


def test_a_closed_client_says_so() -> None:
    with FakeWorker() as worker:
        client = Client(worker.endpoint)
        assert client.model().name == "fake"
        client.close()
        client.close()
        with pytest.raises(ClosedError):
            client.model()
        with pytest.raises(ClosedError):
            client.embed([b"x"])


def test_a_client_that_is_closed_during_a_call_ends_the_call() -> None:
    gate = threading.Event()
    with FakeWorker() as worker:
        client = Client(worker.endpoint)
        client.model()
        called = threading.Event()

        def hold(call: int, context: grpc.ServicerContext) -> None:
            called.set()
            gate.wait(10)

        worker.on_embed = hold
        caught: list[BaseException] = []

        def call() -> None:
            try:
                client.embed([b"x"])
            except BaseException as error:
                caught.append(error)

        thread = threading.Thread(target=call)
        thread.start()
        assert called.wait(10)
        client.close()
        thread.join(10)
        gate.set()
    assert [type(error) for error in caught] == [ClosedError]


def test_tokens_and_priorities_are_sent(tmp_path: os.PathLike[str]) -> None:
    file = os.path.join(tmp_path, "tokens")
    with open(file, "w") as out:
        out.write("# comment\n\n  secret-of-file  \n")
    marked = os.path.join(tmp_path, "marked")
    with open(marked, "w", encoding="utf-8-sig") as out:
        out.write("secret-of-editor\n")
    named = os.path.join(tmp_path, "named")
    with open(named, "w") as out:
        out.write("billing secret rate=1/s\n")
    with FakeWorker() as worker:
        with Client(worker.endpoint, token="secret") as client:
            client.model()
        for path in (file, marked):
            with Client(worker.endpoint, token_file=path) as client:
                client.model()
        with Client(worker.endpoint, token_file=named) as client:
            with pytest.raises(ValueError, match="a token has no spaces") as caught:
                client.model()
            assert "secret" not in str(caught.value)
    sent = [metadata["authorization"] for metadata in worker.metadata]
    assert sent == ["Bearer secret", "Bearer secret-of-file", "Bearer secret-of-editor"]


def test_unauthenticated_is_an_error_of_its_own() -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        worker.on_embed = lambda call, context: failed(
            context, grpc.StatusCode.UNAUTHENTICATED, "no accepted bearer token"
        )
        with pytest.raises(UnauthenticatedError, match="bearer token"):
            client.embed([b"x"])


def test_a_pickled_client_connects_anew() -> None:
    with FakeWorker() as worker, Client(worker.endpoint, timeout=7) as client:
        client.model()
        copy = pickle.loads(pickle.dumps(client))
        with copy:
            assert copy.embed([b"x"]).shape == (1, 4)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"endpoints": "localhost"}, "port"),
        ({"endpoints": "localhost:0"}, "port"),
        ({"endpoints": "::1:50051"}, "brackets"),
        ({"endpoints": "ftp://host:1"}, "known"),
        ({"endpoints": []}, "names no worker"),
        ({"endpoints": "http://host:1", "tls_ca": "ca.pem"}, "https://"),
        ({"endpoints": "http://host:1", "tls": True}, "contradicts"),
        ({"endpoints": "host:1", "tls_client_cert": "a.pem"}, "together"),
        ({"endpoints": "host:1", "token": "a", "token_file": "b"}, "both"),
        ({"endpoints": "host:1", "timeout": 0}, "timeout"),
        ({"endpoints": "http://user:secret@host:1"}, "known"),
        ({"endpoints": "host:1", "token": "a\nb"}, "one line"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_sent(
    arguments: dict[str, object], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        Client(**arguments)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"layers": []}, ValueError, "no layer"),
        ({"layers": [2, 1]}, ValueError, "ascending"),
        ({"layers": "most"}, ValueError, "'all'"),
        ({"layers": 1.5}, TypeError, "whole number"),
        ({"layers": True}, TypeError, "whole number"),
        ({"layers": -1}, ValueError, "between"),
        ({"pooling": "max"}, ValueError, "pooling='max'"),
        ({"alpha": "black"}, ValueError, "alpha='black'"),
        ({"fit": "stretch"}, ValueError, "fit='stretch'"),
        ({"dtype": "f64"}, ValueError, "dtype='f64'"),
        ({"on_error": "ignore"}, ValueError, "on_error"),
        ({"priority": "high"}, ValueError, "priority='high'"),
    ],
)
def test_wrong_options_are_refused(
    options: dict[str, object], error: type[Exception], words: str
) -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        with pytest.raises(error, match=words):
            client.embed([b"x"], **options)  # type: ignore[call-overload]
        assert worker.calls == 0


@pytest.mark.parametrize(
    "single", ["picture.png", b"bytes", numpy.zeros((8, 8, 3), numpy.uint8), {}]
)
def test_a_single_image_is_no_list_of_images(single: object) -> None:
    with (
        FakeWorker() as worker,
        Client(worker.endpoint) as client,
        pytest.raises(TypeError, match=r"\[image\]"),
    ):
        client.embed(single)  # type: ignore[call-overload]


def test_names_with_several_addresses_and_ipv6_are_endpoints() -> None:
    with FakeWorker() as worker:
        for endpoint in (f"dns:///localhost:{worker.port}", f"http://localhost:{worker.port}"):
            with Client(endpoint) as client:
                assert client.embed([b"x"]).shape == (1, 4)
                assert len(list(client.embed_stream([b"x", b"y"]))) == 2
    if socket.has_ipv6:
        from imagegpt.endpoints import Endpoint

        address = asyncio.run(Endpoint.parse("[::1]:50051", False).resolve())[0]
        assert address.target == "ipv6:[::1]:50051"


def test_an_asyncio_program_makes_calls_at_the_same_time() -> None:
    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:
            many = await asyncio.gather(*(client.embed([image]) for image in contents(20)))
            for image, vectors in zip(contents(20), many, strict=True):
                numpy.testing.assert_array_equal(vectors[0], vector(image))
            got = [pair async for pair in client.embed_stream(contents(50), ordered=True)]
            assert [id for id, _ in got] == list(range(50))

            async def source():  # type: ignore[no-untyped-def]
                for image in contents(30):
                    await asyncio.sleep(0)
                    yield image, image

            async for id, outcome in client.embed_stream(source()):
                numpy.testing.assert_array_equal(outcome, vector(id))
            with pytest.raises(InvalidImageError):
                async for _ in client.embed_stream([None], on_error="raise"):
                    pass
            with pytest.raises(UnimplementedError):
                await client.complete(b"x", rows=1)
        with pytest.raises(ClosedError):
            await client.model()

    with FakeWorker() as worker:
        asyncio.run(main(worker.endpoint))


def test_an_asyncio_call_that_is_canceled_is_canceled_at_the_worker() -> None:
    gate, ended = threading.Event(), threading.Event()

    def hold(call: int, context: grpc.ServicerContext) -> None:
        context.add_callback(ended.set)
        gate.wait(10)

    async def main(endpoint: str) -> None:
        async with AsyncClient(endpoint) as client:
            await client.model()
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.embed([b"x"]), 0.3)
            assert await asyncio.to_thread(ended.wait, 10)

    with FakeWorker() as worker:
        worker.on_embed = hold
        asyncio.run(main(worker.endpoint))
        gate.set()


def test_an_asyncio_client_is_used_in_several_loops() -> None:
    with FakeWorker() as worker:
        client = AsyncClient(worker.endpoint)
        for _ in range(2):
            assert asyncio.run(client.embed([b"x"])).shape == (1, 4)
        asyncio.run(client.close())
