"""Streams: every image is given out once, whatever its workers do."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import grpc
import numpy
import pytest
from fake_worker import FakeWorker, failed, vector

import imagegpt.stream
from imagegpt import (
    Client,
    ClosedError,
    ImageError,
    InvalidImageError,
    InvalidRequestError,
    ModelMismatchError,
    UnauthenticatedError,
    UnavailableError,
)
from imagegpt.v1 import imagegpt_pb2 as pb


@pytest.fixture(autouse=True)
def _quick_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes clients find a worker again without the waits of production."""
    monkeypatch.setattr(imagegpt.stream, "RESOLVE_INTERVAL", 0.1)


def contents(count: int) -> list[bytes]:
    return [f"image {number}".encode() for number in range(count)]


def check(got: list[tuple[Any, Any]], images: list[bytes]) -> None:
    """Checks that every image has its own vector, once."""
    assert sorted(id for id, _ in got) == list(range(len(images)))
    for id, outcome in got:
        numpy.testing.assert_array_equal(outcome, vector(images[id]))


def test_every_image_has_its_vector_under_its_id() -> None:
    images = contents(100)
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        check(list(client.embed_stream(images)), images)
        pairs = [(("a", number), image) for number, image in enumerate(images)]
        got = dict(client.embed_stream(pairs))
        assert set(got) == {id for id, _ in pairs}
        # Equal ids are images of their own.
        twice = list(client.embed_stream([("same", images[0]), ("same", images[1])]))
        assert [id for id, _ in twice] == ["same", "same"]
        assert list(client.embed_stream([])) == []


def test_order_is_kept_on_request_over_two_workers() -> None:
    images = contents(60)
    slow = threading.Event()

    def wait(stream: int, number: int, content: bytes, context: object) -> None:
        if number == 0:
            slow.wait(0.3)

    with FakeWorker() as one, FakeWorker() as two:
        one.on_item = wait
        with Client([one.endpoint, two.endpoint]) as client:
            got = list(client.embed_stream(images, ordered=True))
        assert [id for id, _ in got] == list(range(60))
        check(got, images)
        assert one.read
        assert two.read


@pytest.mark.parametrize("reason", ["DRAINING", "CONNECTION_AGE", "STREAM_IDLE"])
def test_a_stream_that_is_closed_as_planned_goes_on_in_another(reason: str) -> None:
    images = contents(50)
    with FakeWorker() as worker:

        def close(stream: int, number: int, content: bytes, context: grpc.ServicerContext) -> None:
            if stream < 4 and number == 5:
                failed(context, grpc.StatusCode.UNAVAILABLE, "as planned", reason=reason)

        worker.on_item = close
        with Client(worker.endpoint) as client:
            check(list(client.embed_stream(images)), images)
        assert worker.streams == 4


def test_a_worker_that_is_killed_and_comes_back_loses_and_doubles_nothing() -> None:
    images = contents(200)
    first = FakeWorker()
    second: list[FakeWorker] = []

    def replace() -> None:
        first.stop()
        second.append(FakeWorker(port=first.port))

    killer = threading.Thread(target=replace)

    def kill(stream: int, number: int, content: bytes, context: object) -> None:
        if number == 50:
            killer.start()
        if number >= 50:
            time.sleep(10)

    first.on_item = kill
    try:
        with Client(first.endpoint) as client:
            check(list(client.embed_stream(images)), images)
        killer.join()
        assert second[0].read
    finally:
        for worker in second:
            worker.stop()


def test_images_of_a_worker_that_hangs_go_to_others() -> None:
    images = contents(40)
    forever = threading.Event()
    with FakeWorker() as hanging, FakeWorker() as sound:
        hanging.on_item = lambda *_: forever.wait(20) and None
        with Client([hanging.endpoint, sound.endpoint]) as client:
            check(list(client.embed_stream(images, item_timeout=0.5)), images)
        forever.set()


def test_an_image_that_ends_its_workers_is_an_error_and_its_neighbors_are_vectors() -> None:
    images = contents(30)
    with FakeWorker() as worker:

        def crash(stream: int, number: int, content: bytes, context: grpc.ServicerContext) -> None:
            if content == b"image 7":
                failed(context, grpc.StatusCode.INTERNAL, "crashed")

        worker.on_item = crash
        with Client(worker.endpoint) as client:
            got = dict(client.embed_stream(images))
    error = got.pop(7)
    assert isinstance(error, ImageError)
    assert error.code == "ABORTED"
    assert error.id == 7
    assert len(got) == 29
    assert all(isinstance(outcome, numpy.ndarray) for outcome in got.values())


def test_a_failure_that_passes_is_tried_again_and_one_that_stays_is_an_error() -> None:
    tries: dict[bytes, int] = {}
    with FakeWorker() as worker:

        def answer(stream: int, number: int, content: bytes, context: object) -> Any:
            tries[content] = tries.get(content, 0) + 1
            if content == b"passes" and tries[content] < 3:
                return pb.EmbedStreamResult(error={"code": 13, "message": "run failed"})
            if content == b"stays":
                return pb.EmbedStreamResult(error={"code": 13, "message": "run failed"})
            if content == b"invalid":
                return pb.EmbedStreamResult(error={"code": 3, "message": "encoded: no image"})
            return None

        worker.on_item = answer
        with Client(worker.endpoint) as client:
            got = dict(
                client.embed_stream([(name, name) for name in (b"passes", b"stays", b"invalid")])
            )
    assert isinstance(got[b"passes"], numpy.ndarray)
    assert isinstance(got[b"stays"], ImageError)
    assert not isinstance(got[b"stays"], InvalidImageError)
    assert isinstance(got[b"invalid"], InvalidImageError)
    assert "encoded: no image" in str(got[b"invalid"])
    assert tries == {b"passes": 3, b"stays": 4, b"invalid": 1}


def test_another_model_in_the_middle_is_an_error_with_the_images_that_are_left() -> None:
    images = contents(30)
    with FakeWorker() as worker:

        def change(stream: int, number: int, content: bytes, context: grpc.ServicerContext) -> None:
            if number == 10:
                worker.digest = "sha256:two"
                failed(context, grpc.StatusCode.UNAVAILABLE, "as planned", reason="DRAINING")

        worker.on_item = change
        got = []
        with Client(worker.endpoint) as client, pytest.raises(ModelMismatchError) as caught:
            got.extend(client.embed_stream(images))
    assert "sha256:two" in str(caught.value)
    assert set(caught.value.items) <= set(range(30))
    assert caught.value.items


def test_a_worker_of_another_model_is_left_out_while_others_serve_the_right_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    images = contents(60)
    with FakeWorker("sha256:one") as right, FakeWorker("sha256:two") as wrong:
        with (
            caplog.at_level(logging.WARNING, "imagegpt"),
            Client([wrong.endpoint, right.endpoint], digest="sha256:one") as client,
        ):
            check(list(client.embed_stream(images)), images)
        assert not wrong.read
        assert len(right.read) == 60


def test_a_digest_that_no_worker_has_is_an_error() -> None:
    with (
        FakeWorker() as worker,
        Client(worker.endpoint, digest="sha256:other") as client,
        pytest.raises(ModelMismatchError, match="sha256:other"),
    ):
        list(client.embed_stream(contents(3)))


def test_a_stream_reads_no_further_than_the_workers_have_room() -> None:
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        for content in contents(100_000):
            taken += 1
            yield content

    gate = threading.Event()
    with FakeWorker(window=4) as worker:
        worker.on_item = lambda *_: gate.wait(20) and None
        with Client(worker.endpoint) as client:
            stream = client.embed_stream(source())
            timer = threading.Timer(0.5, gate.set)
            timer.start()
            next(stream)
            assert taken <= 4 + imagegpt.stream.WAITING_MAX + 8
            # A caller that does not read holds everything.
            time.sleep(0.5)
            assert taken <= 4 + imagegpt.stream.WAITING_MAX + 8
            stream.close()


def test_large_images_are_bounded_by_their_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("imagegpt.ledger.BYTES_MAX", 100_000)
    taken = 0

    def source() -> Iterator[bytes]:
        nonlocal taken
        for number in range(100):
            taken += 1
            yield bytes([number]) * 30_000

    gate = threading.Event()
    with FakeWorker() as worker:
        worker.on_item = lambda *_: gate.wait(20) and None
        with Client(worker.endpoint) as client:
            stream = client.embed_stream(source())
            threading.Timer(0.3, gate.set).start()
            next(stream)
            assert taken <= 8
            assert len(list(stream)) == 99


def test_bad_images_are_errors_in_their_places() -> None:
    items = [
        ("good", b"image"),
        ("missing", "no/such/file.png"),
        ("large", b"x" * (1 << 17)),
        ("empty", b""),
        ("float", numpy.zeros((4, 4, 3))),
        ("gray", numpy.zeros((4, 4), numpy.uint8)),
        ("none", None),
    ]
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        got = dict(client.embed_stream(items))
        assert isinstance(got.pop("good"), numpy.ndarray)
        for id, error in got.items():
            assert isinstance(error, InvalidImageError)
            assert error.id == id
        assert "no/such/file.png" in str(got["missing"])
        assert "--image-bytes-max" in str(got["large"])
        assert "uint8" in str(got["float"])
        with pytest.raises(InvalidImageError, match="'none'"):
            list(client.embed_stream([items[-1]], on_error="raise"))


def test_no_worker_is_an_error_and_no_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagegpt.stream, "FIRST_PATIENCE", 0.5)
    with FakeWorker() as worker:
        endpoint = worker.endpoint
    with Client(endpoint) as client, pytest.raises(UnavailableError) as caught:
        list(client.embed_stream(contents(3)))
    assert endpoint in str(caught.value)


def test_workers_that_are_gone_are_given_up_with_the_images_named() -> None:
    worker = FakeWorker()
    stopper = threading.Thread(target=worker.stop)

    def stop(stream: int, number: int, content: bytes, context: object) -> None:
        if number == 5:
            stopper.start()
        if number >= 5:
            time.sleep(10)

    worker.on_item = stop
    with Client(worker.endpoint) as client, pytest.raises(UnavailableError) as caught:
        list(client.embed_stream(contents(10), give_up_after=1.0))
    stopper.join()
    assert set(caught.value.items) >= {5, 6, 7, 8, 9}


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.INVALID_ARGUMENT, InvalidRequestError),
        (grpc.StatusCode.UNAUTHENTICATED, UnauthenticatedError),
    ],
)
def test_an_opening_that_every_worker_refuses_is_an_error_at_once(
    code: grpc.StatusCode, kind: type[Exception]
) -> None:
    with FakeWorker() as worker:
        worker.on_open = lambda stream, context: failed(context, code, "layers: 99 is not served")
        with Client(worker.endpoint) as client, pytest.raises(kind, match="99 is not served"):
            list(client.embed_stream(contents(3), layers=99))


def test_layers_are_an_axis_if_they_are_a_list() -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        shapes = {
            str(layers): next(iter(client.embed_stream([b"x"], layers=layers)))[1].shape
            for layers in (1, [1], [0, 2], "all")
        }
    assert shapes == {"1": (4,), "[1]": (1, 4), "[0, 2]": (2, 4), "all": (2, 4)}


def test_an_error_of_the_iterable_is_the_callers() -> None:
    def source() -> Iterator[bytes]:
        yield b"image"
        raise RuntimeError("the disk is gone")

    with FakeWorker() as worker, Client(worker.endpoint) as client:
        with pytest.raises(RuntimeError, match="the disk is gone"):
            list(client.embed_stream(source()))
        check(list(client.embed_stream(contents(5))), contents(5))


def test_a_stream_of_a_closed_client_says_so() -> None:
    with FakeWorker() as worker:
        client = Client(worker.endpoint)
        stream = client.embed_stream(contents(1000))
        next(stream)
        client.close()
        with pytest.raises(ClosedError):
            for _ in stream:
                pass
        with pytest.raises(ClosedError):
            client.embed_stream([])


def test_streams_of_several_threads_share_a_client() -> None:
    images = contents(40)
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        results: list[list[tuple[Any, Any]]] = []
        threads = [
            threading.Thread(target=lambda: results.append(list(client.embed_stream(images))))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
    assert len(results) == 4
    for got in results:
        check(got, images)


def test_the_status_of_a_worker_is_seen_although_items_are_on_their_way() -> None:
    """A worker that closes a stream in good order has answered what it read: nothing
    of that is sent again, and nothing counts as lost."""
    images = contents(400)
    with FakeWorker(window=64) as worker:

        def close(stream: int, number: int, content: bytes, context: grpc.ServicerContext) -> None:
            if number == 20:
                worker.read.pop()
                failed(context, grpc.StatusCode.UNAVAILABLE, "as planned", reason="CONNECTION_AGE")

        worker.on_item = close
        with Client(worker.endpoint) as client:
            check(list(client.embed_stream(images)), images)
        assert worker.streams == 20 or worker.streams == 21
        assert len(worker.read) == 400


@pytest.mark.parametrize(
    "options",
    [{"window": 1.5}, {"window": True}, {"window": -1}, {"priority": 1}, {"item_timeout": "5"}],
)
def test_wrong_options_of_a_stream_are_refused_at_once(options: dict[str, Any]) -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        with pytest.raises((TypeError, ValueError), match=next(iter(options))):
            client.embed_stream(contents(3), **options)
        assert worker.streams == 0


@pytest.mark.parametrize("source", [None, 5, "a.png", b"bytes", {"id": b"image"}])
def test_what_is_no_iterable_of_images_is_refused_at_once(source: Any) -> None:
    with FakeWorker() as worker, Client(worker.endpoint) as client:
        with pytest.raises(TypeError, match="images"):
            client.embed_stream(source)
        assert worker.streams == 0


def test_a_fault_within_a_stream_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise AttributeError("a fault")

    monkeypatch.setattr(imagegpt.stream.EmbedStream, "_check_opened", broken)
    with (
        FakeWorker() as worker,
        Client(worker.endpoint) as client,
        pytest.raises(AttributeError, match="a fault"),
    ):
        list(client.embed_stream(contents(3)))
