"""Callers that start, cancel and finish images at random.

    generate_soak.py --endpoint HOST:PORT --metrics HOST:PORT --pid PID [--minutes 5]

Sixteen callers ask for images with primers, seeds and options out of a small
set, and take all of a stream, or cancel it after some rows, or give it too little
time. First each request is made alone; from then on whatever comes of it must be
the same tokens, in rows and in results. In the end no image may be in flight, no
slot taken, every stream ended with OK, CANCELLED or DEADLINE_EXCEEDED, and the
worker's memory as it was after the first minute. Ends with "passed" or says what
failed; exits 1 then.
"""

import argparse
import random
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path

import grpc

sys.path.insert(0, str(Path(__file__).parent))
from parity import load_stubs  # noqa: E402

N_CALLERS = 16
N_REQUESTS = 12
# What the allocator and the metrics page may gain in minutes.
GROWTH_MAX = 1.05


def requests(pb, n_colors: int, n_positions: int):
    draw = random.Random(5)
    for idx in range(N_REQUESTS):
        ids = [draw.randrange(n_colors) for _ in range(n_positions)]
        request = pb.GenerateRequest(samples=draw.choice([1, 1, 2, 4]), seed=draw.randrange(1 << 40))
        kind = idx % 4
        if kind == 1:
            request.prefix.ids.extend(ids[: draw.randrange(1, n_positions)])
        elif kind == 2:
            request.image.image.tokens.ids.extend(ids)
            request.image.rows = draw.randrange(1, 32)
        elif kind == 3:
            request.image.image.tokens.ids.extend(ids)
            request.image.mask = bytes(draw.randrange(2) for _ in range(n_positions))
        if idx % 3 == 0:
            request.top_k, request.temperature = 40, 0.9
        elif idx % 3 == 1:
            request.top_p = 0.9
        yield request


def whole(stub, request):
    images = {}
    for response in stub.Generate(request):
        if response.WhichOneof("message") == "result":
            images[response.result.sample] = list(response.result.image.tokens.ids)
    return images


class Soak:
    def __init__(self, arguments, pb, stub, until: float):
        self.pb, self.stub, self.until = pb, stub, until
        info = stub.GetModel(pb.GetModelRequest())
        self.side = info.side
        self.requests = list(requests(pb, len(info.palette_rgb8) // 3, info.positions))
        self.codes, self.wrong, self.lock = Counter(), [], threading.Lock()
        started = time.perf_counter()
        self.expected = [whole(stub, request) for request in self.requests]
        print(f"{N_REQUESTS} requests, one by one: {time.perf_counter() - started:.1f} s", flush=True)

    def caller(self, seed: int) -> None:
        draw = random.Random(seed)
        while time.monotonic() < self.until:
            which = draw.randrange(N_REQUESTS)
            fate = draw.random()
            rows = draw.randrange(1, 2 * self.side) if fate < 0.4 else None
            timeout = draw.uniform(0.05, 2) if 0.4 <= fate < 0.6 else None
            self.call(which, rows, timeout)

    def call(self, which: int, rows: int | None, timeout: float | None) -> None:
        expected, seen = self.expected[which], 0
        results = set()
        stream = self.stub.Generate(self.requests[which], timeout=timeout)
        try:
            for response in stream:
                kind = response.WhichOneof("message")
                if kind == "row":
                    row = response.row
                    want = expected[row.sample][row.row * self.side : (row.row + 1) * self.side]
                    self.check(list(row.ids) == want, f"request {which}: row {row.row} differs")
                    seen += 1
                elif kind == "result":
                    results.add(response.result.sample)
                    got = list(response.result.image.tokens.ids)
                    self.check(got == expected[response.result.sample], f"request {which}: the image differs")
                if rows is not None and seen >= rows:
                    stream.cancel()
            code = grpc.StatusCode.OK
            self.check(results == set(expected), f"request {which}: OK with {len(results)} results")
        except grpc.RpcError as error:
            code = error.code()
        if code == grpc.StatusCode.CANCELLED:
            self.check(rows is not None, "cancelled by nobody")
        elif code == grpc.StatusCode.DEADLINE_EXCEEDED:
            self.check(timeout is not None, "a deadline that nobody set")
        else:
            self.check(code == grpc.StatusCode.OK, f"request {which}: {code}")
        with self.lock:
            self.codes[code.name] += 1

    def check(self, right: bool, what: str) -> None:
        if not right:
            with self.lock:
                self.wrong.append(what)


def resident(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS"):
            return int(line.split()[1]) / 1024
    return 0.0


def samples(address: str) -> dict[str, float]:
    page = urllib.request.urlopen(f"http://{address}/metrics", timeout=10).read().decode()
    return dict((line.rsplit(" ", 1)[0], float(line.rsplit(" ", 1)[1])) for line in page.splitlines() if line[:1] != "#" and line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--minutes", type=float, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        pb, services = load_stubs(Path(scratch))
    stub = services.ImageGptServiceStub(grpc.insecure_channel(arguments.endpoint))
    soak = Soak(arguments, pb, stub, 0)
    seconds = arguments.minutes * 60
    soak.until = time.monotonic() + seconds
    callers = [threading.Thread(target=soak.caller, args=(seed,)) for seed in range(N_CALLERS)]
    for caller in callers:
        caller.start()
    memory = []
    step = min(20.0, seconds / 6)
    while time.monotonic() < soak.until:
        time.sleep(step)
        page = samples(arguments.metrics)
        memory.append(resident(arguments.pid))
        print(
            f"{memory[-1]:.0f} MiB resident, {page['imagegpt_sequences']:.0f} sequences, "
            f"{page['imagegpt_images_in_flight']:.0f} images in flight; {dict(soak.codes)}",
            flush=True,
        )
    for caller in callers:
        caller.join()
    wrong = soak.wrong
    time.sleep(1)
    page = samples(arguments.metrics)
    for series in ("imagegpt_sequences", "imagegpt_images_in_flight", "imagegpt_bytes_in_flight"):
        if page[series]:
            wrong.append(f"{series} is {page[series]} in the end")
    settled = memory[len(memory) // 5]
    if memory[-1] > settled * GROWTH_MAX:
        wrong.append(f"memory grew from {settled:.0f} to {memory[-1]:.0f} MiB")
    tokens = page['imagegpt_tokens_total{kind="step"}']
    print(f"{sum(soak.codes.values())} streams: {dict(soak.codes)}; {tokens:.0f} tokens; memory {settled:.0f} to {memory[-1]:.0f} MiB")
    for what in wrong[:10]:
        print(f"wrong: {what}")
    print(f"{len(wrong)} wrong" if wrong else "passed")
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
