"""Attacks a worker on this machine and reports which of its promises held.

usage: attack.py [NAME…], names of attacks or beginnings of names; without any, all attacks run. Environment: BINARY
(target/release/imagegpt), ATTACK_SHORT=1 (under a minute, for CI, also with an unoptimized binary). Exit code 1 when an
outcome was wrong.

Everything is on loopback. A worker that takes more than 2 GiB of memory is killed by its memory cgroup (where this user
may create one) or by the limit on its address space. This process has a memory limit of its own, every attack has a time
limit, and all processes end with this one. The workers' limits are low, so that an attack on them takes seconds.
"""

import contextlib
import functools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
import urllib.error

from harness import (
    BINARY,
    FOLDER,
    MIB,
    MISSING,
    ROOT,
    SHORT,
    Good,
    Row,
    Worker,
    flag,
    free_port,
    make_stubs,
    table,
)

make_stubs()

import grpc
import pictures
from imagegpt.v1 import imagegpt_pb2 as pb
from imagegpt.v1 import imagegpt_pb2_grpc as rpc
from inference import grpc_service_pb2 as kserve
from wire import HEALTH, IMAGEGPT, KSERVE, Wire, framed

# An attack that takes longer has hung.
ATTACK_SECONDS_MAX = 45
# Memory that the allocator keeps, and pages of the program that are touched for the first time.
SLACK = 64 * MIB
# Seconds allowed for the good client's p99 beside an attack that is not about processing time; its calls take milliseconds.
P99 = 1.0
IN_FLIGHT = 64 * MIB
LIMITS = [
    *("--bytes-in-flight-max", "64MiB", "--request-bytes-max", "8MiB"),
    *("--response-bytes-max", "8MiB", "--image-bytes-max", "8MiB"),
]
DECODE_BYTES = 64 * MIB
PIXELS = 4_000_000
PICTURE_LIMITS = [
    *("--decode-bytes-max", "64MiB", "--image-pixels-max", str(PIXELS)),
    *("--image-bytes-max", "32MiB"),
]
ATTACKS = {}


def attack(name, promise, limit, short=True):
    """Registers a function that attacks and fills in a row of the table."""

    def register(function):
        ATTACKS[name] = (function, promise, limit, short)
        return function

    return register


# Calls.


def stub(worker):
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    return rpc.ImageGptServiceStub(grpc.insecure_channel(f"127.0.0.1:{worker.port}", options))


def one_image(data):
    return pb.TokenizeRequest(images=[pb.Image(encoded=data)])


def tokens(n=1):
    return pb.EmbedRequest(images=[pb.Image(tokens=pb.Tokens(ids=[1] * 1024))] * n)


def tokenize(worker, data, timeout=20.0):
    """Returns the outcome of an image: `row`, `refused…` or a gRPC code."""
    try:
        result = stub(worker).Tokenize(one_image(data), timeout=timeout).results[0]
    except grpc.RpcError as error:
        return error.code().name
    if result.WhichOneof("outcome") == "tokens":
        return "row"
    code = grpc_name(result.error.code)
    return "refused" if code == "INVALID_ARGUMENT" else f"refused as {code}"


def grpc_name(number):
    return next(code.name for code in grpc.StatusCode if code.value[0] == number)


def settles(worker, seconds):
    """Returns whether the worker's threads become idle within `seconds`."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        before = worker.cpu()
        time.sleep(0.3)
        if worker.cpu() - before < 0.1:
            return True
    return False


def until(condition, seconds, step=0.05):
    """Waits until the condition holds; returns whether it does."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(step)
    return True


def small_file(side=32):
    path = FOLDER / f"good-{side}.png"
    path.write_bytes(pictures.small_png(1, side))
    return path


@functools.cache
def tiny_model():
    """Returns a compiled model of random weights, for attacks that the scripted engine cannot serve."""
    folder = FOLDER / "tiny"
    environment = {**os.environ, "ORT_DYLIB_PATH": str(ROOT / "target/onnxruntime/libonnxruntime.so")}
    subprocess.run(
        [BINARY, "compile", "random:tiny", "--output", str(folder)],
        cwd=ROOT, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    return folder


# Pictures.


def try_pictures(row, files):
    """Sends each picture alone; each has its set of right outcomes."""
    flags = [*PICTURE_LIMITS, "--request-bytes-max", "40MiB", "--log", "warn"]
    with contextlib.ExitStack() as stack:
        worker = None
        for name, make, right in files:
            if worker is None or not worker.alive():
                worker = stack.enter_context(Worker(*flags))
                good = stack.enter_context(Good(worker, small_file()))
            data = make()
            worker.forget_peak()
            cpu = worker.cpu()
            began = time.monotonic()
            outcome = tokenize(worker, data, timeout=8 * row.slow)
            taken = time.monotonic() - began
            said = f"{name} ({len(data)} bytes) was {outcome}"
            if outcome == "UNAVAILABLE":
                # A process that has closed its connections may not have ended yet.
                worker.exit_within(2)
            if not worker.alive():
                row.expect(False, f"{said}: the worker ended with {worker.exit_within(5)}")
                row.lives(worker)
                continue
            row.expect(outcome in right, f"{said} after {taken:.1f} s, and {worker.cpu() - cpu:.1f} s of CPU")
            row.bounded(worker, DECODE_BYTES + SLACK, name)
            row.served(good, P99)
            # A picture that is still being decoded would count for the next one, too.
            if not row.expect(settles(worker, 2 * row.slow), f"{name} held its thread past its call"):
                worker.kill()


REFUSED = {"refused"}
EITHER = {"refused", "row"}


@attack("tiff-tile", "a tile larger than memory (284 bytes) is INVALID_ARGUMENT, and the worker lives", "`--decode-bytes-max`")
def tiff_tile(row):
    try_pictures(row, [("tiff-tile", pictures.tiff_tile, REFUSED)])


@attack(
    "tiff-chunks",
    "tiles and strips cost no more memory than the limit, and no more time than their picture's size is worth",
    "`--decode-bytes-max`",
)
def tiff_chunks(row):
    blank = functools.partial(pictures.tiled, compression=8)
    strip = pictures.zlib.compress(b"\x80")
    jpeg = pictures.saved(pictures.Image.new("L", (2000, 2000), 99), "JPEG")
    files = [
        ("one tile of 512 MiB", lambda: pictures.tiled(16, 1, 1 << 25, 1, 1, pictures.zeros(1 << 29), samples=16), REFUSED),
        ("200 tiles that share 64 MiB", lambda: blank(1, 200, 1 << 26, 1, 200, pictures.zeros(1 << 26)), EITHER),
        ("2,000,000 tiles that share 64 MiB", lambda: blank(1, 2_000_000, 1 << 26, 1, 2_000_000, pictures.zeros(1 << 26)), EITHER),
        ("300,000 strips of a byte", lambda: pictures.strips(1, 300_000, strip, 8), EITHER),
        ("1,000 strips that are one JPEG of 4 Mpx", lambda: pictures.strips(16, 1000, jpeg, 7), EITHER),
        ("a strip that is a JPEG of 65535 x 65535", lambda: pictures.strips(16, 1, pictures.sized_jpeg(65535, 65535), 7), REFUSED),
    ]  # fmt: skip
    try_pictures(row, files[:3] if SHORT else files)


@attack(
    "pictures",
    "whatever lies inside a picture is within its limits: sizes, frames, scans, texts",
    "`--image-pixels-max`, `--decode-bytes-max`",
)
def other_pictures(row):
    files = [
        ("a WebP whose frame is larger than its header says", lambda: pictures.webp_hidden(4000), REFUSED),
        ("a JPEG of 65535 x 65535", lambda: pictures.sized_jpeg(65535, 65535), REFUSED),
        ("a progressive JPEG of 1,000 scans", lambda: pictures.jpeg_scans(2000, 2000, 1000), EITHER),
        ("a PNG of 60000 x 60000", lambda: pictures.png(60000, 60000, 6, pictures.zeros(MIB)), REFUSED),
        ("a PNG whose texts inflate to 256 MiB", lambda: pictures.png_metadata(1 << 28), EITHER),
        ("a PNG of one column", lambda: pictures.png_of_zeros(1, PIXELS, 0), EITHER),
        ("a PNG of one row", lambda: pictures.png_of_zeros(PIXELS, 1, 0), EITHER),
        ("a GIF of 1 x 1 on a screen of 65535 x 65535", lambda: pictures.gif(65535, 1), EITHER),
        ("a GIF over the limit", lambda: pictures.gif(3000, 3000), REFUSED),
        ("a BMP of 65535 x 65535 without data", lambda: pictures.bmp(65535, 65535), REFUSED),
    ]  # fmt: skip
    try_pictures(row, files[:4] if SHORT else files)


@attack(
    "decode-ends",
    "a decode ends with its call's deadline, with its caller and with the worker",
    "the call's deadline, `--decode-cpu-time-max`",
)
def decode_ends(row):
    slow = {"a PNG of 64 Mpx": pictures.hog(), "a TIFF of 100,000 large tiles": tiles_for_hours()}
    for name, data in slow.items():
        with Worker("--log", "warn") as worker, Good(worker, small_file(), timeout=5) as good:
            call = functools.partial(stub(worker).Tokenize.future, one_image(data))
            # As many calls as there are threads.
            late = [call(timeout=0.4 * row.slow) for _ in range(2)]
            left = [late_one.code().name for late_one in late if wait_for(late_one)]
            row.expect(settles(worker, 1.5 * row.slow), f"{name}: threads ran on past the deadline ({left})")
            row.served(good, 1.5)
            gone = [call(timeout=60) for _ in range(2)]
            time.sleep(0.4 * row.slow)
            for one in gone:
                one.cancel()
            row.expect(settles(worker, 1.5 * row.slow), f"{name}: threads ran on past their callers")
            row.served(good, 1.5)
            running = [call(timeout=60) for _ in range(2)]
            time.sleep(0.3)
            began = worker.terminate()
            code = worker.exit_within(8 * row.slow)
            row.expect(code == 0, f"{name}: SIGTERM beside it ended with {code} after {time.monotonic() - began:.1f} s")
            del running


def wait_for(call):
    """Waits until a call ends, with or without an error."""
    with contextlib.suppress(grpc.RpcError, grpc.FutureTimeoutError):
        call.exception(timeout=10)
    return call.done()


@functools.cache
def tiles_for_hours():
    return pictures.tiled(1, 100_000, 1 << 26, 1, 100_000, pictures.zeros(1 << 26))


@attack("poison-stream", "one bad image in an EmbedStream is one error; all others are rows", "`--decode-bytes-max`")
def poison_stream(row):
    n_good = 40
    with Worker("--log", "warn") as worker:
        items = [pb.EmbedStreamItem(id=str(idx), image=pb.Image(encoded=pictures.small_png(idx))) for idx in range(n_good)]
        items.insert(n_good // 2, pb.EmbedStreamItem(id="bad", image=pb.Image(encoded=pictures.tiff_tile())))
        requests = [pb.EmbedStreamRequest(open=pb.EmbedStreamOptions())]
        requests += [pb.EmbedStreamRequest(item=item) for item in items]
        answers = {}
        try:
            for answer in stub(worker).EmbedStream(iter(requests), timeout=20):
                if answer.WhichOneof("message") == "result":
                    answers[answer.result.id] = answer.result.WhichOneof("outcome")
        except grpc.RpcError as error:
            row.expect(False, f"the stream ended with {error.code().name}")
        errors = [name for name, outcome in answers.items() if outcome != "embedding"]
        row.expect(errors == ["bad"], f"errors of {errors}, promised one, of the bad image")
        row.expect(len(answers) == n_good + 1, f"{len(answers)} answers to {n_good + 1} images")
        row.lives(worker)


@attack("poison-embed", "one bad image among a job's is one error, and no worker of the pool ends", "`--decode-bytes-max`")
def poison_embed(row):
    n_good = 40
    folder = FOLDER / "job"
    folder.mkdir()
    for idx in range(n_good):
        (folder / f"{idx:03}.png").write_bytes(pictures.small_png(idx))
    (folder / "020-bad.tif").write_bytes(pictures.tiff_tile())
    with Worker("--log", "warn") as one, Worker("--log", "warn") as other:
        endpoints = [f"--endpoint=http://127.0.0.1:{worker.port}" for worker in (one, other)]
        command = ["embed", str(folder), "--output", str(FOLDER / "job-out"), "--give-up-after", "5s", *endpoints]
        done = subprocess.run([BINARY, *command], cwd=ROOT, capture_output=True, text=True, timeout=30 * row.slow)
        if row.expect(done.returncode == 0, f"the job ended with {done.returncode}"):
            report = json.loads(done.stdout.strip().splitlines()[-1])
            row.expect(
                (report["images"], report["errors"]) == (n_good + 1, 1),
                f"{report['images']} images and {report['errors']} errors, promised {n_good + 1} and 1",
            )
        for worker in (one, other):
            row.lives(worker)


@attack("hog", "eight callers of slow pictures delay small ones by no more than two of their decodes", "cheapest first", short=False)
def hog(row):
    data = pictures.hog()
    with Worker("--log", "warn") as worker:
        began = time.monotonic()
        row.expect(tokenize(worker, data, 20 * row.slow) == "row", "the slow picture is not a row")
        alone = time.monotonic() - began
        row.note(f"one slow picture alone takes {alone:.2f} s")
        stop = threading.Event()

        def press():
            call = stub(worker).Tokenize
            while not stop.is_set():
                with contextlib.suppress(grpc.RpcError):
                    call(one_image(data), timeout=30 * row.slow)

        with Good(worker, small_file(), interval=0.05) as good:
            callers = [threading.Thread(target=press, daemon=True) for _ in range(8)]
            for caller in callers:
                caller.start()
            time.sleep(alone)
            good.take()
            time.sleep(12)
            row.served(good, (2 * alone + 0.25) / row.slow)
            stop.set()
            row.lives(worker)
        # Killing the worker ends all calls.
        worker.kill()
        for caller in callers:
            caller.join(10)


# Bytes.


@attack(
    "gzip-hold",
    "compressed requests whose end never comes hold no more than the limit, and nothing after their time",
    "`--bytes-in-flight-max`, `--request-timeout`",
)
def gzip_hold(row):
    n_streams = 24
    big = one_image(bytes(15 * MIB // 2)).SerializeToString()
    # An id takes one byte on the wire and four in memory.
    many = tokens(1).images[0]
    many.tokens.ids[:] = [1] * 100_000
    ids = pb.EmbedRequest(images=[many] * 75).SerializeToString()
    kinds = [
        ("bytes", IMAGEGPT + "Tokenize", framed(big, "gzip"), "gzip"),
        ("tokens", IMAGEGPT + "Embed", framed(ids, "gzip"), "gzip"),
        ("KServe bytes", KSERVE + "ModelInfer", framed(infer(bytes(15 * MIB // 2)), "deflate"), "deflate"),
    ]
    for name, path, body, encoding in kinds:
        with (
            Worker(*LIMITS, "--request-timeout", "2s", "--log", "warn") as worker,
            Good(worker, small_file()) as good,
        ):
            wire = Wire(worker.port)
            streams = [wire.open(path, body, encoding=encoding) for _ in range(n_streams)]
            wire.pump(0.5)
            row.bounded(worker, IN_FLIGHT + SLACK, f"{n_streams} requests of {len(body) // 1024} KiB ({name})")
            if not worker.alive():
                continue
            wire.pump(1.5 + row.slow)
            row.expect(not wire.unfinished(streams), f"{name}: {len(wire.unfinished(streams))} calls outlived --request-timeout")
            freed = until(lambda worker=worker: worker.metric(r"^imagegpt_bytes_in_flight$") < MIB, 2)
            row.expect(freed, f"{name}: bytes are held past --request-timeout")
            row.served(good, P99)
            wire.close()


def infer(data):
    """Returns an inference request of one encoded image."""
    request = kserve.ModelInferRequest(model_name="untrained")
    tensor = request.inputs.add(name="image", datatype="BYTES", shape=[1])
    del tensor
    request.raw_input_contents.append(len(data).to_bytes(4, "little") + data)
    return request.SerializeToString()


ANSWER_SECONDS = 2


def answer_limits():
    return [*LIMITS, *flag("--answer-timeout", f"{ANSWER_SECONDS}s"), "--stream-idle-timeout", f"{ANSWER_SECONDS}s", "--log", "warn"]


@attack(
    "slow-reader-unary",
    "calls whose answers are never taken shut nobody out, and end after the limit",
    "`--answer-timeout`",
)
def slow_reader_unary(row):
    with Worker(*answer_limits()) as worker, Good(worker, small_file()) as good:
        wire = Wire(worker.port, window=0)
        streams = []
        sizes = [7 * MIB] * 9 + [MIB, MIB // 2, MIB // 4, 100_000, 40_000] + [16_000] * 4 + [4_000] * 10
        for size in sizes:
            body = framed(one_image(bytes(size)).SerializeToString(), "gzip")
            stream = wire.open(IMAGEGPT + "Embed", body, end=True, encoding="gzip")
            # One after the other: the attack is about answers that stay, not about work in progress.
            until(lambda stream=stream: not wire.pump(0.01) or stream in wire.status or stream in wire.ended, 0.08, step=0)
            streams.append(stream)
        wire.pump(0.5)
        row.served(good, P99)
        wire.pump(ANSWER_SECONDS + 1.5 * row.slow)
        row.expect(not wire.unfinished(streams), f"{len(wire.unfinished(streams))} answers were held past the limit")
        row.bounded(worker, IN_FLIGHT + SLACK, "answers that are not taken")
        row.served(good, P99)
        wire.close()


@attack(
    "slow-reader-stream",
    "an EmbedStream whose answers are never taken shuts nobody out, and ends after the limit",
    "`--stream-idle-timeout`",
)
def slow_reader_stream(row):
    with Worker(*answer_limits()) as worker, Good(worker, small_file()) as good:
        wire = Wire(worker.port, window=0)
        opening = framed(pb.EmbedStreamRequest(open=pb.EmbedStreamOptions()).SerializeToString())
        image = pb.Image(encoded=pictures.small_png(3) + bytes(MIB // 4))
        item = pb.EmbedStreamRequest(item=pb.EmbedStreamItem(id="i", image=image)).SerializeToString()
        streams = [
            wire.open(IMAGEGPT + "EmbedStream", opening + framed(item, "gzip") * 200, encoding="gzip", patience=0.1)
            for _ in range(16)
        ]
        wire.pump(0.5)
        row.served(good, P99)
        wire.pump(ANSWER_SECONDS + 2 * row.slow)
        row.expect(not wire.unfinished(streams), f"{len(wire.unfinished(streams))} streams were held past the limit")
        row.bounded(worker, IN_FLIGHT + SLACK, "streams that are not read")
        row.served(good, P99)
        wire.close()


@attack(
    "slow-reader-generate",
    "images that nobody takes keep no place of generation past the limit",
    "`--answer-timeout`",
)
def slow_reader_generate(row):
    flags = [*flag("--answer-timeout", f"{ANSWER_SECONDS}s"), "--generate-slots", "2", "--samples-in-flight-max", "4", "--log", "warn"]
    with Worker(*flags, "--samples-per-call-max", "4", model=tiny_model(), fake=None) as worker, Good(worker) as good:
        wire = Wire(worker.port, window=0)
        request = framed(pb.GenerateRequest(prefix=pb.Tokens(ids=[1] * 1000)).SerializeToString())
        streams = [wire.open(IMAGEGPT + "Generate", request, end=True) for _ in range(4)]
        wire.pump(1)
        row.served(good, P99)
        wire.pump(ANSWER_SECONDS + 2 * row.slow)
        row.expect(not wire.unfinished(streams), f"{len(wire.unfinished(streams))} calls were held past the limit")
        try:
            made = list(stub(worker).Generate(pb.GenerateRequest(prefix=pb.Tokens(ids=[1] * 1000)), timeout=5))
            row.expect(made[-1].result.WhichOneof("outcome") == "image", "the next caller got no image")
        except grpc.RpcError as error:
            row.expect(False, f"the next caller of Generate got {error.code().name}")
        row.lives(worker)
        row.served(good, P99)
        wire.close()


@attack(
    "stream-hold-arriving",
    "streams whose messages never end hold no more than the limit",
    "`--bytes-in-flight-max`, `--request-timeout`",
)
def stream_hold_arriving(row):
    n_streams, n_rounds = 32, 7
    for service in (IMAGEGPT + "EmbedStream", KSERVE + "ModelStreamInfer"):
        with (
            Worker(*LIMITS, "--request-timeout", "4s", "--log", "warn") as worker,
            Good(worker, small_file()) as good,
        ):
            wire = Wire(worker.port)
            opening = b""
            if "EmbedStream" in service:
                opening = framed(pb.EmbedStreamRequest(open=pb.EmbedStreamOptions()).SerializeToString())
            head = opening + b"\0" + (15 * MIB // 2).to_bytes(4, "big")
            streams = [wire.open(service, head, patience=0.05) for _ in range(n_streams)]
            part, sent = bytes(MIB), 0
            for _ in range(n_rounds):
                sent += sum(wire.send(stream, part, patience=0.02) for stream in wire.unfinished(streams))
                if wire.closed:
                    break
            name = service.rsplit("/", 1)[1]
            row.note(f"{name}: {sent / MIB:.0f} MiB were taken")
            row.bounded(worker, IN_FLIGHT + SLACK, f"{n_streams} unfinished messages of {name}")
            row.served(good, P99)
            wire.close()


@attack("stream-hold-waiting", "messages that wait for room are counted: streams hold no more than the limit", "`--bytes-in-flight-max`")
def stream_hold_waiting(row):
    # A valid picture, padded after its end to the largest message.
    data = pictures.small_png(5) + bytes(7 * MIB)
    item = pb.EmbedStreamRequest(item=pb.EmbedStreamItem(id="i", image=pb.Image(encoded=data))).SerializeToString()
    opening = framed(pb.EmbedStreamRequest(open=pb.EmbedStreamOptions()).SerializeToString())
    kinds = [
        (IMAGEGPT + "EmbedStream", opening + framed(item, "gzip") * 4, "gzip"),
        (KSERVE + "ModelStreamInfer", framed(infer(data), "deflate") * 4, "deflate"),
    ]
    for path, body, encoding in kinds:
        # The engine is too slow to answer during the attack, so the good client calls Tokenize.
        with (
            Worker(*LIMITS, "--log", "warn", fake="30s") as worker,
            Good(worker, small_file(), method="Tokenize") as good,
        ):
            wire = Wire(worker.port)
            for _ in range(40):
                wire.open(path, body, encoding=encoding, patience=0.05)
            wire.pump(1)
            row.bounded(worker, IN_FLIGHT + SLACK, f"40 streams of {path.rsplit('/', 1)[1]} with whole messages")
            row.served(good, P99)
            wire.close()


# Places.


def newcomer(worker, seconds):
    """Makes a new connection and a call; returns the seconds of both, or the code of the failure."""
    channel = grpc.insecure_channel(
        f"127.0.0.1:{worker.port}",
        [
            ("grpc.use_local_subchannel_pool", 1),
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 200),
        ],
    )
    began = time.monotonic()
    try:
        call = rpc.ImageGptServiceStub(channel).Embed
        while True:
            try:
                call(tokens(), timeout=seconds)
                return time.monotonic() - began
            except grpc.RpcError as error:
                # Retries, as a client does whose connection was refused.
                if error.code() != grpc.StatusCode.UNAVAILABLE or time.monotonic() - began > seconds:
                    return error.code().name
                time.sleep(0.1)
    finally:
        channel.close()


N_PLACES = 48
PLACES = ["--connections-max", str(N_PLACES), "--keepalive-interval", "1s", "--keepalive-timeout", "1s", "--log", "warn"]


def hold_places(row, connect, seconds):
    """Holds all connections that the worker allows, by `connect`, while new clients try to connect."""
    with Worker(*PLACES) as worker:
        stop, held = threading.Event(), []

        def hold():
            while not stop.is_set():
                for held_one in list(held):
                    if not held_one.pump():
                        held.remove(held_one)
                if len(held) < N_PLACES + 4:
                    with contextlib.suppress(OSError):
                        held.append(connect(worker.port))
                time.sleep(0.002)

        with Good(worker, small_file()) as good:
            holder = threading.Thread(target=hold, daemon=True)
            holder.start()
            until(lambda: len(held) >= N_PLACES - 2, 3)
            # In this time keepalive pings are due.
            time.sleep(1.5)
            came = [newcomer(worker, seconds) for _ in range(2 if SHORT else 4)]
            failed = [code for code in came if isinstance(code, str)]
            row.note(f"new clients: {[one if isinstance(one, str) else f'{one:.2f} s' for one in came]}")
            row.expect(not failed, f"{len(failed)} of {len(came)} new clients were shut out: {sorted(set(failed))}")
            row.served(good, P99)
            row.lives(worker)
            stop.set()
            holder.join(5)


class Silent:
    """A connection that sends a few bytes and then nothing."""

    def __init__(self, port, says=b""):
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=2)
        self.socket.sendall(says)
        self.socket.setblocking(False)

    def pump(self):
        """Returns whether the connection is open."""
        try:
            while self.socket.recv(4096):
                pass
            return False
        except BlockingIOError:
            return True
        except OSError:
            return False


@attack("places-pings", "one client cannot hold all places by answering pings: a newcomer is served", "`--connections-max`")
def places_pings(row):
    hold_places(row, Wire, seconds=3 * row.slow)


@attack("places-silent", "connections that say nothing do not shut newcomers out", "`--connections-max`")
def places_silent(row):
    hold_places(row, Silent, seconds=3 * row.slow)


@attack("places-preface", "connections that begin and never go on do not shut newcomers out", "`--connections-max`", short=False)
def places_preface(row):
    hold_places(row, functools.partial(Silent, says=b"PRI * HTTP/2.0\r\n\r\nSM"), seconds=3 * row.slow)


@attack("places-watches", "one client cannot hold all health watches", "watches are counted per connection", short=False)
def places_watches(row):
    with Worker("--log", "warn") as worker, Good(worker) as good:
        wires = [Wire(worker.port) for _ in range(5)]
        for wire in wires:
            for _ in range(1024):
                wire.open(HEALTH + "Watch", framed(b""), end=True)
                if wire.closed:
                    break
            wire.pump(0.2)
        mine = Wire(worker.port)
        stream = mine.open(HEALTH + "Watch", framed(b""), end=True)
        until(lambda: not mine.pump(0.05) or stream in mine.bytes or stream in mine.ended, 3, step=0)
        row.expect(stream in mine.bytes, f"another client's watch was answered with {mine.status.get(stream)}")
        row.served(good, P99)
        row.bounded(worker, SLACK, "health watches")
        for wire in (*wires, mine):
            wire.close()


@attack("livez", "/livez answers within a second beside 200 silent connections to its port", "places of the metrics port")
def livez(row):
    with Worker("--log", "warn") as worker, Good(worker) as good:
        silent = []
        for _ in range(200):
            with contextlib.suppress(OSError):
                silent.append(Silent(worker.metrics_port))
        time.sleep(0.3)
        for _ in range(3):
            began = time.monotonic()
            answered = worker.answers("/livez", timeout=row.slow)
            taken = time.monotonic() - began
            row.expect(answered, f"/livez had not answered after {taken:.1f} s")
        row.served(good, P99)
        row.lives(worker)


@attack("resets", "cancelled uploads are CANCELLED, and log nothing at WARN", "the table of codes")
def resets(row):
    with Worker("--log", "info") as worker, Good(worker) as good:
        body = framed(one_image(bytes(MIB // 2)).SerializeToString())
        # Warnings from the start of the worker are not caused by clients.
        at_start = len(worker.log_text())
        end, n, wire = time.monotonic() + (2 if SHORT else 5), 0, Wire(worker.port)
        while time.monotonic() < end:
            if wire.closed:
                wire = Wire(worker.port)
            how = n % 4
            stream = wire.open(IMAGEGPT + "Embed", body[: (0, 100, 40_000, len(body))[how]], patience=0.02)
            if how == 3 and n % 8 == 3:
                # A closed connection cannot reset its stream.
                wire.close()
            else:
                wire.reset(stream)
            wire.pump()
            n += 1
        wire.close()
        time.sleep(0.5)
        warnings = [line for line in worker.log_text()[at_start:].splitlines() if re.search(r" (WARN|ERROR) ", line)]
        row.note(f"{n} uploads were cancelled")
        row.expect(not warnings, f"{len(warnings)} lines at WARN or above, the first: {warnings[:1]}")
        n_internal = worker.metric(r'^imagegpt_requests_total.*code="(INTERNAL|UNKNOWN)"')
        row.expect(n_internal == 0, f"{n_internal:.0f} of {n} were counted as INTERNAL or UNKNOWN")
        n_cancelled = worker.metric(r'^imagegpt_requests_total.*code="CANCELLED"')
        row.expect(n_cancelled > 0, "none was counted as CANCELLED")
        row.served(good, P99)
        row.lives(worker)


@attack("term", "SIGTERM ends a worker with exit code 0 in 5 s whatever its clients do", "5 s for readers that take nothing")
def term(row):
    # The promised 5 s, plus the time of a drain beside six other workers.
    seconds = 5 + 2.5 * row.slow
    opening = framed(pb.EmbedStreamRequest(open=pb.EmbedStreamOptions()).SerializeToString())
    item = pb.EmbedStreamRequest(item=pb.EmbedStreamItem(id="i", image=tokens().images[0]))
    whole = framed(tokens().SerializeToString())
    image = pb.GenerateRequest(prefix=pb.Tokens(ids=[1] * 1000))
    tiles = framed(one_image(tiles_for_hours()).SerializeToString())
    clients = {
        "a unary reader that takes nothing": lambda wire: wire.open(IMAGEGPT + "Embed", whole, end=True),
        "half a request": lambda wire: wire.open(IMAGEGPT + "Embed", whole[:100]),
        "half a request of Generate": lambda wire: wire.open(IMAGEGPT + "Generate", whole[:100]),
        "a stream that takes nothing": lambda wire: wire.open(
            IMAGEGPT + "EmbedStream", opening + framed(item.SerializeToString())
        ),
        "a Generate that takes nothing": lambda wire: wire.open(
            IMAGEGPT + "Generate", framed(image.SerializeToString()), end=True
        ),
        "a health watch": lambda wire: wire.open(HEALTH + "Watch", framed(b""), end=True),
        "a decode of hours": lambda wire: wire.open(IMAGEGPT + "Tokenize", tiles, end=True),
    }
    with contextlib.ExitStack() as stack:
        # Only a real model generates images.
        real = {"model": tiny_model(), "fake": None}
        workers = [Worker("--log", "info", **(real if "Generate" in name else {"fake": "5ms"})) for name in clients]
        for worker in workers:
            stack.callback(worker.kill)
        running = []
        for worker, (name, client) in zip(workers, clients.items(), strict=True):
            stack.enter_context(worker)
            wire = Wire(worker.port, window=0)
            client(wire)
            wire.pump(0.5)
            running.append((name, worker, wire))
        began = [worker.terminate() for _, worker, _ in running]
        ended = {}
        while len(ended) < len(running) and time.monotonic() - began[0] < seconds + 3:
            for (name, worker, wire), start in zip(running, began, strict=True):
                if name not in ended and worker.exit_within(0.01) is not None:
                    ended[name] = time.monotonic() - start
                wire.pump()
        for name, worker, _ in running:
            taken = ended.get(name)
            row.expect(
                taken is not None and taken <= seconds and worker.process.returncode == 0,
                f"beside {name}: " + (f"exit {worker.process.returncode} after {taken:.1f} s" if taken else f"runs on after {seconds + 3:.0f} s"),
            )
            row.saw(worker)
        row.note("slowest " + (f"{max(ended.values()):.1f} s" if ended else "none"))


@attack("log-sink", "a log that cannot be written (closed, full, a pipe that is left or not read) loses lines, which are counted, and nothing else", "lines are dropped")
def log_sink(row):
    for name in ("closed", "full", "left", "not read"):
        with contextlib.ExitStack() as stack:
            reader, writer = os.pipe()
            stack.callback(os.close, writer)
            with contextlib.ExitStack() as reading:
                reading.callback(os.close, reader)
                full = stack.enter_context(open("/dev/full", "wb"))
                how = {"closed": {"close_stderr": True}, "full": {"stderr": full}}.get(name, {"stderr": writer})
                try:
                    worker = stack.enter_context(Worker("--log", "debug", **how))
                except RuntimeError as error:
                    row.expect(False, f"{name}: {error}")
                    continue
                if name != "left":
                    # Keeps the reader open until the worker has ended.
                    stack.push(reading.pop_all())
            if name == "not read":
                fill(writer)
            good = stack.enter_context(Good(worker, timeout=2))
            # Refused calls are logged, and 4,096 lines may wait for a reader.
            for _ in range(3000 if name == "not read" else 20):
                with contextlib.suppress(grpc.RpcError):
                    stub(worker).Embed(pb.EmbedRequest(), timeout=1)
            time.sleep(0.5)
            if not row.lives(worker):
                row.wrong[-1] = f"{name}: {row.wrong[-1]}"
                continue
            row.served(good, P99)
            try:
                n_lost = worker.metric(r"log.*(dropped|lost)|(dropped|lost).*log")
            except OSError:
                n_lost = 0
            # A program that starts without standard error gets /dev/null, which accepts every line.
            row.expect(n_lost > 0 or name == "closed", f"{name}: no lost line is counted")
            worker.terminate()
            code = worker.exit_within(8 * row.slow)
            row.expect(code == 0, f"{name}: SIGTERM ends it with {code}")


def fill(writer):
    """Fills a pipe completely, through a non-blocking file description of its own: the worker's still blocks."""
    own = os.open(f"/proc/self/fd/{writer}", os.O_WRONLY | os.O_NONBLOCK)
    try:
        for size in (4096, 1):
            with contextlib.suppress(BlockingIOError):
                while True:
                    os.write(own, b"x" * size)
    finally:
        os.close(own)


@attack("weights-cut", "weights that are cut or overwritten while they are served change no byte of an answer", "a copy that nobody else can change")
def weights_cut(row):
    def cut(path):
        os.truncate(path, path.stat().st_size // 3)

    def overwrite(path):
        size = path.stat().st_size
        with open(path, "r+b") as file:
            file.write(os.urandom(size))

    for name, harm in (("cut", cut), ("overwritten", overwrite)):
        folder = FOLDER / f"weights-{name}"
        shutil.copytree(tiny_model(), folder)
        with Worker("--log", "warn", model=folder, fake=None) as worker, Good(worker) as good:
            request = tokens()
            request.images[0].tokens.ids[:] = [(idx * 7) % 512 for idx in range(1024)]
            before = stub(worker).Embed(request, timeout=10).results[0].embedding.data
            harm(folder / "weights.bin")
            after = None
            for _ in range(5):
                with contextlib.suppress(grpc.RpcError):
                    after = stub(worker).Embed(request, timeout=10).results[0].embedding.data
                    with contextlib.suppress(grpc.RpcError):
                        list(stub(worker).Generate(pb.GenerateRequest(prefix=pb.Tokens(ids=[1] * 1000)), timeout=10))
            if not row.lives(worker):
                row.wrong[-1] += f" after its weights were {name}"
                continue
            row.expect(after == before, f"other numbers after the weights were {name}")
            row.served(good, P99)


# The table.


def run(name, function, promise, limit):
    row = Row(name, promise, limit)

    def late(*_):
        raise TimeoutError(f"the attack had not ended after {seconds} s")

    seconds = int(ATTACK_SECONDS_MAX * row.slow)
    signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    began = time.monotonic()
    try:
        function(row)
    except Exception as error:
        traceback.print_exc(limit=-3)
        row.expect(False, f"the attack itself ended: {type(error).__name__}: {error}")
    finally:
        signal.alarm(0)
    if row.slow > 1.5:
        row.note(f"times are multiplied by {row.slow:.1f}: the machine is busy, or the binary is not optimized")
    taken = time.monotonic() - began
    print(f"{'WRONG' if row.wrong else 'right'}  {name}  ({taken:.1f} s)  {'; '.join(row.notes)}", flush=True)
    for wrong in row.wrong:
        print(f"       {wrong}", flush=True)
    return row


def main():
    wanted = sys.argv[1:]
    unknown = [name for name in wanted if not any(known.startswith(name) for known in ATTACKS)]
    if unknown:
        sys.exit(f"there is no attack {', '.join(unknown)}; the attacks are {', '.join(ATTACKS)}")
    if not (ROOT / BINARY).exists():
        sys.exit(f"{BINARY} does not exist; build it, or name another program with BINARY")
    rows = []
    for name, (function, promise, limit, short) in ATTACKS.items():
        if any(name.startswith(start) for start in wanted) or (not wanted and (short or not SHORT)):
            rows.append(run(name, function, promise, limit))
    if MISSING:
        print(f"this binary has no {', '.join(sorted(MISSING))}; it was attacked without these flags")
    print("\n" + table(rows))
    return any(row.wrong for row in rows)


if __name__ == "__main__":
    sys.exit(main())
