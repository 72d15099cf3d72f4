"""What the protocol costs beside the native service, for the same work.

    python tests/interop/overhead.py --endpoint 127.0.0.1:50051 --model untrained --pid PID

One image a call, 32 calls at once, requests that were encoded before, in turns
of each protocol; the worker should cost nothing itself (--fake-engine 0s
--max-queue-delay 0s). What is compared is the time that the worker's threads are
on a core for a call, in which the client has no part, and the mean time of a
call, of which it is most. The time on a core is the scheduler's own, in
nanoseconds: the clock ticks of /proc/PID/stat are 2 % of a turn. Each turn is
compared with the one beside it, since a machine's speed drifts by more than
what is looked for. Prints the median with the range that holds it with 95 %
confidence, and exits 1 when all of that range is over --max-percent.
"""

import argparse
import asyncio
import statistics
import sys
import time
from pathlib import Path

import grpc
import numpy as np
import tritonclient.grpc as triton
from tritonclient.grpc import service_pb2

sys.path.insert(0, str(Path(__file__).parent))
from common import contract  # noqa: E402

pb, pb_grpc = contract()
AT_ONCE = 32


def core_seconds(pid):
    threads = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((thread / "schedstat").read_text().split()[0]) for thread in threads) / 1e9


def inference(model, name, array, datatype):
    given = triton.InferInput(name, array.shape, datatype).set_data_from_numpy(array)
    request = service_pb2.ModelInferRequest(model_name=model)
    request.inputs.append(given._get_tensor())
    request.raw_input_contents.append(given._get_content())
    return request.SerializeToString()


def work(facts, model, rng, n_requests):
    """For each form of an image its requests in both protocols."""
    n_colors, positions, side = len(facts.palette_rgb8) // 3, facts.positions, facts.side
    forms = {"tokens": ([], []), "pixels": ([], [])}
    for _ in range(n_requests):
        ids = rng.integers(0, n_colors, (1, positions))
        image = pb.Image(tokens=pb.Tokens(ids=ids[0].tolist()))
        forms["tokens"][0].append(pb.EmbedRequest(images=[image]).SerializeToString())
        forms["tokens"][1].append(inference(model, "input_ids", ids.astype(np.int32), "INT32"))
        pixels = rng.integers(0, 256, (1, side, side, 3)).astype(np.uint8)
        raw = pb.RawImage(width=side, height=side, pixels=pixels.tobytes())
        forms["pixels"][0].append(pb.EmbedRequest(images=[pb.Image(rgb8=raw)]).SerializeToString())
        forms["pixels"][1].append(inference(model, "pixels", pixels, "UINT8"))
    return forms


async def turn(call, requests, pid):
    """Core time and time of a call, in microseconds."""
    todo = iter(requests)
    times = []

    async def caller():
        for request in todo:
            started = time.perf_counter()
            await call(request)
            times.append(time.perf_counter() - started)

    before = core_seconds(pid)
    await asyncio.gather(*(caller() for _ in range(AT_ONCE)))
    core = core_seconds(pid) - before
    return core / len(requests) * 1e6, statistics.mean(times) * 1e6


def median_range(values):
    """Order statistics that hold the median with 95 % confidence."""
    values = sorted(values)
    first = max(0, int(len(values) / 2 - 0.98 * len(values) ** 0.5))
    return values[first], values[-1 - first]


async def measure(arguments):
    worst = -100.0
    async with grpc.aio.insecure_channel(arguments.endpoint) as channel:
        facts = await pb_grpc.ImageGptServiceStub(channel).GetModel(pb.GetModelRequest())
        methods = ("/imagegpt.v1.ImageGptService/Embed", "/inference.GRPCInferenceService/ModelInfer")
        calls = [channel.unary_unary(method) for method in methods]
        rng = np.random.default_rng(0)
        for form, requests in work(facts, arguments.model, rng, arguments.requests).items():
            turns = ([], [])
            # The first turn warms up; then in turns, so that what the machine
            # does besides meets both.
            for n in range(arguments.turns + 1):
                for protocol in (0, 1) if n % 2 else (1, 0):
                    turned = await turn(calls[protocol], requests[protocol], arguments.pid)
                    if n > 0:
                        turns[protocol].append(turned)
            native, oip = [
                [statistics.median(column) for column in zip(*of_protocol)] for of_protocol in turns
            ]
            # Turn by turn: core time, time of a call.
            ratios = [[100 * (b / a - 1) for a, b in zip(*pair)] for pair in zip(*turns)]
            core, call = [statistics.median(column) for column in zip(*ratios)]
            low, high = median_range([ratio[0] for ratio in ratios])
            worst = max(worst, low)
            print(
                f"{form}: core time a call {native[0]:.0f} us natively, {oip[0]:.0f} us"
                f" ({core:+.1f} %, {low:+.1f} to {high:+.1f});"
                f" a call takes {native[1]:.0f} us, {oip[1]:.0f} us ({call:+.1f} %)"
            )
    return worst


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pid", type=int, required=True)
    parser.add_argument("--requests", type=int, default=4000)
    parser.add_argument("--turns", type=int, default=25)
    parser.add_argument("--max-percent", type=float, default=5.0)
    arguments = parser.parse_args()
    worst = asyncio.run(measure(arguments))
    print(f"overhead at least {worst:+.1f} %, of {arguments.max_percent:.0f} % allowed")
    sys.exit(worst > arguments.max_percent)


if __name__ == "__main__":
    main()
