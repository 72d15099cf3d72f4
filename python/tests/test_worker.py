"""A real worker: every call against the bare stubs, and the life of its process."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import grpc
import numpy
import pytest

from imagegpt import (
    Client,
    DeadlineExceededError,
    ImageError,
    InvalidImageError,
    InvalidRequestError,
    LocalWorker,
    NotFoundError,
    UnavailableError,
    WorkerStartError,
    find_program,
)
from imagegpt.loop import GrpcLoop
from imagegpt.v1 import imagegpt_pb2 as pb
from imagegpt.v1 import imagegpt_pb2_grpc
from imagegpt.worker import arguments

WHITE = pb.Preprocess(alpha=pb.ALPHA_WHITE)


@pytest.fixture(scope="module")
def stub(emoji: LocalWorker) -> Any:
    channel = grpc.insecure_channel(emoji.endpoint.removeprefix("http://"))
    return imagegpt_pb2_grpc.ImageGptServiceStub(channel)  # type: ignore[no-untyped-call]


@pytest.fixture(scope="module")
def images(pictures: list[Path]) -> list[pb.Image]:
    return [pb.Image(encoded=path.read_bytes()) for path in pictures[:5]]


def until_gone(process: int) -> None:
    """Waits until a process that is no child of this one has ended, or is only waited
    for."""
    deadline = time.monotonic() + 20
    while True:
        try:
            state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        assert time.monotonic() < deadline, f"process {process} has not ended"
        time.sleep(0.05)


def floats(tensor: pb.Tensor) -> numpy.ndarray[Any, Any]:
    return numpy.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


@pytest.mark.parametrize("layers", [[], [3], [0, 4, 8]])
@pytest.mark.parametrize("normalize", [False, True])
def test_embed_is_the_stubs_bit_for_bit(
    emoji: LocalWorker,
    stub: Any,
    images: list[pb.Image],
    pictures: list[Path],
    layers: list[int],
    normalize: bool,
) -> None:
    request = pb.EmbedRequest(images=images, preprocess=WHITE, layers=layers, normalize=normalize)
    wanted = [floats(result.embedding) for result in stub.Embed(request).results]
    got = emoji.embed(
        pictures[:5],
        layers=layers if len(layers) > 1 else layers[0] if layers else None,
        alpha="white",
        normalize=normalize,
    )
    assert got.dtype == numpy.float32
    assert got.tobytes() == numpy.stack(wanted).tobytes()
    assert got.shape == (5, 3, 192) if len(layers) > 1 else (5, 192)
    streamed = emoji.embed_stream(
        pictures[:5], layers=layers or None, alpha="white", normalize=normalize, ordered=True
    )
    vectors = [vector for _, vector in streamed if not isinstance(vector, ImageError)]
    assert numpy.stack(vectors).tobytes() == got.tobytes()


def test_all_layers_are_those_of_one_run(models: Path, pictures: list[Path]) -> None:
    # Without a flag the feature layer is 6, and the last one, 8, is of another run.
    with LocalWorker(models / "emoji") as worker:
        assert worker.model().layers_served == (0, 1, 2, 3, 4, 5, 6, 8)
        got = worker.embed(pictures[:2], layers="all")
        assert got.shape == (2, 7, 192)
        assert got[:, 6].tobytes() == worker.embed(pictures[:2]).tobytes()
        assert worker.embed(pictures[:2], layers=8).shape == (2, 192)
        streamed = worker.embed_stream(pictures[:2], layers="all", on_error="raise")
        assert {vectors.shape for _, vectors in streamed} == {(7, 192)}


def test_half_precision_contexts_norms_and_poolings_are_the_stubs(
    emoji: LocalWorker, stub: Any, images: list[pb.Image], pictures: list[Path]
) -> None:
    request = pb.EmbedRequest(
        images=images,
        preprocess=pb.Preprocess(fit=pb.FIT_CENTER_CROP),
        context=pb.CONTEXT_SOS_SHIFTED,
        norm=pb.NORM_NONE,
        dtype=pb.DATA_TYPE_F16,
    )
    wanted = b"".join(result.embedding.data for result in stub.Embed(request).results)
    got = emoji.embed(
        pictures[:5], fit="center-crop", context="sos-shifted", norm="none", dtype="f16"
    )
    assert got.dtype == numpy.float16
    assert got.tobytes() == wanted
    request = pb.EmbedRequest(images=images, pooling=pb.POOLING_NONE)
    wanted = b"".join(result.embedding.data for result in stub.Embed(request).results)
    got = emoji.embed(pictures[:5], pooling="none")
    assert got.shape == (5, 1024, 192)
    assert got.tobytes() == wanted


def test_classify_score_and_tokenize_are_the_stubs(
    emoji: LocalWorker, stub: Any, images: list[pb.Image], pictures: list[Path]
) -> None:
    request = pb.ClassifyRequest(images=images, top_k=3, logits=True)
    results = stub.Classify(request).results
    for found, result in zip(
        emoji.classify(pictures[:5], top_k=3, logits=True), results, strict=True
    ):
        wanted = result.classification
        assert [(c.index, c.label, c.score) for c in found.classes] == [
            (c.index, c.label, c.score) for c in wanted.classes
        ]
        assert found.label == wanted.classes[0].label
        assert found.logits is not None
        assert found.logits.tobytes() == wanted.logits.data
    scored = stub.Score(pb.ScoreRequest(images=images, preprocess=WHITE, map=True, complexity=True))
    for score, result in zip(
        emoji.score(pictures[:5], alpha="white", map=True, complexity=True),
        scored.results,
        strict=True,
    ):
        assert score.nats == result.score.nats
        assert score.bits_per_token == result.score.bits_per_token
        assert score.complexity_bits_per_token == result.score.complexity_bits_per_token
        assert score.map is not None
        assert score.map.shape == (32, 32)
        assert score.map.tobytes() == result.score.map.data
    plain = emoji.score(pictures[:1])[0]
    assert plain.map is None
    assert plain.complexity_bits_per_token is None
    tokens = stub.Tokenize(pb.TokenizeRequest(images=images, preprocess=WHITE)).results
    wanted = [list(result.tokens.ids) for result in tokens]
    assert emoji.tokenize(pictures[:5], alpha="white").tolist() == wanted


def test_generate_and_complete_are_the_stubs(
    emoji: LocalWorker, stub: Any, images: list[pb.Image], pictures: list[Path]
) -> None:
    def wanted(request: pb.GenerateRequest) -> dict[int, pb.GeneratedImage]:
        answers = (answer.result for answer in stub.Generate(request) if answer.HasField("result"))
        return {result.sample: result.image for result in answers}

    mask = numpy.zeros((32, 32), bool)
    mask[:, :16] = True
    mask[24:] = True
    primer = pb.ImagePrimer(image=images[0], preprocess=WHITE, mask=mask.astype("u1").tobytes())
    request = pb.GenerateRequest(
        image=primer, samples=2, temperature=0.9, top_k=20, top_p=0.9, seed=5, scale=2,
        log_probs=True,
    )  # fmt: skip
    found = emoji.complete(
        pictures[0], mask=mask, alpha="white", samples=2, temperature=0.9, top_k=20, top_p=0.9,
        seed=5, scale=2, log_probs=True,
    )  # fmt: skip
    for number, image in wanted(request).items():
        got = found[number]
        assert (got.sample, got.seed) == (number, 5)
        assert got.tokens.tolist() == list(image.tokens.ids)
        assert got.png == image.png
        assert got.log_probs is not None
        assert got.log_probs.tolist() == list(image.log_probs)
        assert got.log_probs.size == (~mask).sum()
        assert got.image.size == (64, 64)
    palette = emoji.model().palette
    shown = numpy.asarray(found[0].image)[::2, ::2].reshape(-1, 3)
    numpy.testing.assert_array_equal(shown, palette[found[0].tokens])
    prefix = emoji.tokenize([pictures[0]])[0][:1000]
    request = pb.GenerateRequest(prefix=pb.Tokens(ids=prefix.tolist()), seed=1)
    got = emoji.generate(prefix=prefix, seed=1)[0]
    assert got.tokens.tolist() == list(wanted(request)[0].tokens.ids)
    assert got.log_probs is None


def test_the_model_says_what_it_is(emoji: LocalWorker, stub: Any) -> None:
    model, message = emoji.model(), stub.GetModel(pb.GetModelRequest())
    assert (model.name, model.digest) == ("emoji", message.digest)
    assert model.palette.shape == (512, 3)
    assert model.palette.tobytes() == message.palette_rgb8
    assert model.layers_served == tuple(range(9))
    assert "embed" in model.tasks
    head = model.head("category")
    assert (head.layer, head.alpha, head.norm) == (8, "white", "pre-attn-rms")
    assert head.activation == "softmax"
    with pytest.raises(KeyError):
        model.head("other")
    assert model.limits.images_per_call_max == message.limits.images_per_call_max


def test_errors_have_names_and_the_image(emoji: LocalWorker, pictures: list[Path]) -> None:
    mixed = emoji.embed([pictures[0], b"no image", pictures[1]], on_error="return")
    assert isinstance(mixed[1], InvalidImageError)
    assert mixed[1].id == 1
    assert not isinstance(mixed[2], ImageError)
    with pytest.raises(InvalidImageError, match="image 1"):
        emoji.embed([pictures[0], b"no image"])
    with pytest.raises(InvalidImageError, match="image 0"):
        emoji.embed([numpy.zeros(7, numpy.int64)])
    with pytest.raises(InvalidRequestError, match="99"):
        emoji.embed([pictures[0]], layers=99)
    with pytest.raises(NotFoundError, match="other"):
        emoji.classify([pictures[0]], head="other")
    with pytest.raises(InvalidRequestError, match="top_p"):
        emoji.generate(top_p=3.0)
    with pytest.raises(InvalidImageError):
        emoji.complete(b"no image", rows=4)
    with pytest.raises(ValueError, match="either rows"):
        emoji.complete(pictures[0])


@pytest.mark.slow  # gRPC hangs in a forked child now and then.
def test_a_forked_process_connects_anew(emoji: LocalWorker, pictures: list[Path]) -> None:
    client = Client(emoji.endpoint)
    wanted = client.embed(pictures[:2])
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            got = [vector for _, vector in client.embed_stream(pictures[:2], ordered=True)]
            os.write(writer, numpy.stack(got).tobytes())
        except BaseException as error:
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answer:
        assert answer.read() == wanted.tobytes()
    os.waitpid(child, 0)
    assert client.embed(pictures[:2]).tobytes() == wanted.tobytes()
    client.close()


@pytest.mark.slow  # gRPC hangs in a forked child now and then.
def test_a_process_that_is_forked_during_a_call_says_so(
    emoji: LocalWorker, pictures: list[Path]
) -> None:
    client = Client(emoji.endpoint)
    stream = client.embed_stream(pictures)
    next(stream)
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            client.embed(pictures[:2])
        except Exception as error:
            os.write(writer, type(error).__name__.encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        said = answer.read()
    _, status = os.waitpid(child, 0)
    # gRPC's own handlers of forks may end the child before it does anything.
    assert said == "ForkError" or os.WIFSIGNALED(status)
    assert len(list(stream)) == len(pictures) - 1
    client.close()


def test_a_local_worker_ends_with_its_block(models: Path) -> None:
    with LocalWorker(models / "emoji") as worker:
        process, endpoint = worker.pid, worker.endpoint
        assert Client(endpoint).model().name == "emoji"
        with pytest.raises(TypeError, match="endpoint"):
            pickle.dumps(worker)
    assert not os.path.exists(f"/proc/{process}")


def test_a_local_worker_that_was_killed_is_an_error_with_its_exit_code(models: Path) -> None:
    with LocalWorker(models / "emoji") as worker:
        os.kill(worker.pid, signal.SIGKILL)
        os.waitid(os.P_PID, worker.pid, os.WEXITED | os.WNOWAIT)
        with pytest.raises(UnavailableError, match="-9"):
            worker.model()


def test_a_local_worker_ends_with_a_program_that_is_killed(models: Path) -> None:
    script = f"""
        import time
        from imagegpt import LocalWorker
        worker = LocalWorker({str(models / "emoji")!r})
        print(worker.pid, flush=True)
        time.sleep(60)
    """
    program = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)], stdout=subprocess.PIPE, text=True
    )
    with program:
        assert program.stdout is not None
        process = int(program.stdout.readline())
        program.kill()
    until_gone(process)


@pytest.mark.parametrize(
    "end", ["", "raise SystemExit(3)", "os.kill(os.getpid(), 2)", "asyncio.run(leave())"]
)
def test_a_program_ends_although_a_stream_is_not_read_to_its_end(models: Path, end: str) -> None:
    script = f"""
        import asyncio, os, signal
        from imagegpt import AsyncClient, Client, LocalWorker
        # Ignored where the tests run in the background of a shell.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        worker = LocalWorker({str(models / "emoji")!r})
        picture = {str(models / "pictures/flags/rainbow-flag.png")!r}
        client = Client(worker.endpoint)
        stream = client.embed_stream([picture] * 200)
        print("began with", next(stream)[0])
        async def leave():
            async for id, _ in AsyncClient(worker.endpoint).embed_stream([picture] * 200):
                break
        {end}
    """
    done = subprocess.run(
        [sys.executable, "-X", "dev", "-c", textwrap.dedent(script)],
        capture_output=True,
        text=True,
        timeout=40,
    )
    expected = {"": 0, "raise SystemExit(3)": 3, "os.kill(os.getpid(), 2)": -2}
    assert done.returncode == expected.get(end, 0), done.stderr
    assert "began with" in done.stdout
    if not end.startswith("os.kill"):
        assert done.stderr == ""


def test_a_worker_that_cannot_start_says_why(models: Path, tmp_path: Path) -> None:
    with pytest.raises(WorkerStartError, match="--no-such-flag") as caught:
        LocalWorker(models / "emoji", no_such_flag=True)
    assert caught.value.exit_code == 2
    with pytest.raises(FileNotFoundError, match="missing"):
        LocalWorker(tmp_path / "missing")
    with pytest.raises(WorkerStartError) as caught:
        LocalWorker(str(tmp_path))
    assert str(tmp_path) in str(caught.value)


def test_flags_are_those_of_the_command_line() -> None:
    flags = {
        "feature_layer": 8,
        "portable": True,
        "fake_engine": False,
        "revision": None,
        "device_id": [0, 1],
        "head": {"a": Path("a.safetensors"), "b": "b.safetensors"},
        "cache_dir": Path("/cache"),
    }
    assert arguments(flags) == [
        "--feature-layer=8",
        "--portable",
        "--device-id=0",
        "--device-id=1",
        "--head=a=a.safetensors",
        "--head=b=b.safetensors",
        "--cache-dir=/cache",
    ]


def test_the_program_of_the_variable_goes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("IMAGEGPT_BINARY", "/somewhere/imagegpt")
    assert find_program() == Path("/somewhere/imagegpt")
    with pytest.raises(WorkerStartError, match="/somewhere/imagegpt"):
        LocalWorker("models/emoji")


@pytest.fixture(scope="module")
def quick(models: Path) -> Any:
    """Worker whose answers are made up."""
    with LocalWorker(models / "emoji", fake_engine="0ms") as worker:
        yield worker


def test_an_iterable_may_use_the_client_and_is_read_in_the_calling_thread(
    quick: LocalWorker, pictures: list[Path]
) -> None:
    threads = set()

    def source() -> Any:
        for path in pictures[:3]:
            threads.add(threading.current_thread())
            yield quick.tokenize([path])[0]

    assert quick.embed(source()).shape == (3, 4)
    assert len(list(quick.embed_stream(source()))) == 3
    assert threads == {threading.current_thread()}

    def leaves() -> Any:
        yield pictures[0]
        raise SystemExit("missing")

    with pytest.raises(SystemExit):
        quick.embed(leaves())
    assert quick.model().name == "emoji"


def test_the_garbage_collector_may_free_streams_and_clients_anywhere(
    quick: LocalWorker, pictures: list[Path]
) -> None:
    content = pictures[0].read_bytes()

    class Reader:
        def __init__(self) -> None:
            self.client = Client(quick.endpoint)
            self.stream = self.client.embed_stream([content] * 1000)
            next(self.stream)
            self.me = self

        def __del__(self) -> None:
            self.client.close()

    for _ in range(20):
        Reader()
        # As the collector does when the loop's thread makes garbage.
        GrpcLoop.get().run(asyncio.to_thread(int))
        asyncio.run_coroutine_threadsafe(collect(), GrpcLoop.get().loop).result(30)
    assert quick.embed([content]).shape == (1, 4)


async def collect() -> None:
    gc.collect()


def test_a_timeout_holds_for_the_first_call_too(models: Path, pictures: list[Path]) -> None:
    with LocalWorker(models / "emoji", fake_engine="0ms") as worker:
        client = Client(worker.endpoint)
        os.kill(worker.pid, signal.SIGSTOP)
        begun = time.monotonic()
        try:
            with pytest.raises(DeadlineExceededError):
                client.embed(pictures[:1], timeout=1)
        finally:
            os.kill(worker.pid, signal.SIGCONT)
        assert time.monotonic() - begun < 10


def test_times_that_no_clock_has_are_no_limit_and_wrong_ones_are_refused(
    quick: LocalWorker, models: Path, pictures: list[Path]
) -> None:
    for timeout in (float("inf"), 1e20, 1e12):
        assert quick.embed(pictures[:1], timeout=timeout).shape == (1, 4)
    for wrong, kind in (
        (0, ValueError),
        (-1, ValueError),
        (float("nan"), ValueError),
        ("5", TypeError),
    ):
        with pytest.raises(kind, match="timeout"):
            quick.embed(pictures[:1], timeout=wrong)  # type: ignore[call-overload]
        with pytest.raises(kind, match="start_timeout"):
            LocalWorker(models / "emoji", start_timeout=wrong)  # type: ignore[arg-type]


def test_a_call_of_a_local_worker_that_ends_meanwhile_says_so_at_once(
    models: Path, pictures: list[Path]
) -> None:
    with LocalWorker(models / "emoji", fake_engine="30s") as worker:
        threading.Timer(0.5, os.kill, (worker.pid, signal.SIGKILL)).start()
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="-9") as caught:
            worker.embed(pictures[:1], timeout=60.0)
        assert time.monotonic() - begun < 6.0
        assert caught.value.items == [0]


def test_a_stream_of_a_local_worker_that_has_ended_says_so_at_once(
    models: Path, pictures: list[Path]
) -> None:
    with LocalWorker(models / "emoji", fake_engine="20ms") as worker:
        stream = worker.embed_stream(pictures * 100)
        next(stream)
        os.kill(worker.pid, signal.SIGKILL)
        begun = time.monotonic()
        with pytest.raises(UnavailableError, match="-9") as caught:
            list(stream)
        assert time.monotonic() - begun < 10
        assert caught.value.items


def test_a_worker_that_is_ready_at_once_is_seen(models: Path) -> None:
    for _ in range(20):
        LocalWorker(models / "emoji", fake_engine="0ms").close()


def test_a_forked_child_does_not_keep_the_worker(models: Path) -> None:
    worker = LocalWorker(models / "emoji", fake_engine="0ms")
    child = os.fork()
    if child == 0:
        time.sleep(60)
        os._exit(0)
    begun = time.monotonic()
    worker.close()
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert time.monotonic() - begun < 10


def test_an_interrupt_of_the_terminal_is_for_the_program(quick: LocalWorker) -> None:
    assert os.getpgid(quick.pid) != os.getpgid(0)


@pytest.mark.parametrize("flag", ["listen", "log", "auth_tokens_file", "tls_cert"])
def test_flags_that_a_local_worker_gives_itself_are_refused(models: Path, flag: str) -> None:
    with pytest.raises(TypeError, match=flag):
        LocalWorker(models / "emoji", **{flag: "x"})


def test_an_image_that_no_request_holds_is_an_error_of_its_own(quick: LocalWorker) -> None:
    small, large = numpy.zeros((40, 40, 3), "u1"), numpy.zeros((9000, 9000, 3), "u1")
    got = quick.embed([small, large, small], on_error="return")
    assert isinstance(got[1], InvalidImageError)
    assert "--request-bytes-max" in str(got[1])
    assert not isinstance(got[2], ImageError)
    streamed = dict(quick.embed_stream([small, large, small]))
    assert isinstance(streamed[1], InvalidImageError)
    assert not isinstance(streamed[2], ImageError)
