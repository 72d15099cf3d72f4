"""64 callers of tritonclient beside 64 of the native service.

    python tests/interop/fleet.py --endpoint 127.0.0.1:50051 --model micro --metrics 127.0.0.1:9090

Each has one image in flight, so a run of more than 64 images holds images of
both: that is looked for in the metrics. The worker must be able to form such
batches (--max-batch-size 128) and be slow enough that callers gather
(--fake-engine 500ms). Exits 1 when no such run was made or an answer was wrong.
"""

import argparse
import asyncio
import sys
import urllib.request
from pathlib import Path

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio

sys.path.insert(0, str(Path(__file__).parent))
from common import Report, contract  # noqa: E402

pb, pb_grpc = contract()
CALLERS, ROUNDS = 64, 6


def series(address, name):
    """The sum of a metric's samples, or those that a prefix selects."""
    page = urllib.request.urlopen(f"http://{address}/metrics").read().decode()
    lines = (line for line in page.splitlines() if line.startswith(name))
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines)


def tensor(ids):
    given = triton.InferInput("input_ids", ids.shape, "INT64")
    return given.set_data_from_numpy(ids)


async def callers(endpoint, model):
    async with triton_aio.InferenceServerClient(endpoint) as client, grpc.aio.insecure_channel(
        endpoint
    ) as channel:
        stub = pb_grpc.ImageGptServiceStub(channel)
        facts = await stub.GetModel(pb.GetModelRequest())
        n_colors = len(facts.palette_rgb8) // 3
        rng = np.random.default_rng(0)
        ids = rng.integers(0, n_colors, (2 * CALLERS * ROUNDS, 1, facts.positions))

        async def theirs(caller):
            answers = []
            for n in range(ROUNDS):
                idx = caller * ROUNDS + n
                answer = await client.infer(model, [tensor(ids[idx])])
                answers.append((idx, answer.as_numpy("embedding")[0]))
            return answers

        async def ours(caller):
            answers = []
            for n in range(ROUNDS):
                idx = (CALLERS + caller) * ROUNDS + n
                image = pb.Image(tokens=pb.Tokens(ids=ids[idx, 0].tolist()))
                answer = await stub.Embed(pb.EmbedRequest(images=[image]))
                values = np.frombuffer(answer.results[0].embedding.data, np.float32)
                answers.append((idx, values))
            return answers

        both = [*(theirs(n) for n in range(CALLERS)), *(ours(n) for n in range(CALLERS))]
        gathered = dict(pair for answers in await asyncio.gather(*both) for pair in answers)
        # Each image again, through the other protocol.
        swapped = []
        for idx in range(0, len(ids), 37):
            if idx < CALLERS * ROUNDS:
                image = pb.Image(tokens=pb.Tokens(ids=ids[idx, 0].tolist()))
                answer = await stub.Embed(pb.EmbedRequest(images=[image]))
                again = np.frombuffer(answer.results[0].embedding.data, np.float32)
            else:
                again = (await client.infer(model, [tensor(ids[idx])])).as_numpy("embedding")[0]
            swapped.append(again.tobytes() == gathered[idx].tobytes())
        return len(gathered), all(swapped)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--endpoint", required=True)
    parser.add_argument("--metrics", required=True)
    parser.add_argument("--model", required=True)
    arguments = parser.parse_args()
    report = Report()
    n_answers, good = asyncio.run(callers(arguments.endpoint, arguments.model))
    report.check("each of 128 callers has its own answers", good and n_answers == 2 * CALLERS * ROUNDS)
    runs = series(arguments.metrics, "imagegpt_batch_size_count")
    images = series(arguments.metrics, "imagegpt_batch_size_sum")
    small = 0.0
    for graph in ("features", "features_raw", "hidden", "logits", "score", "generate"):
        prefix = f'imagegpt_batch_size_bucket{{graph="{graph}",le="64"}}'
        small += series(arguments.metrics, prefix)
    calls = [
        series(arguments.metrics, f'imagegpt_requests_total{{method="{method}",code="OK"}}')
        for method in ("ModelInfer", "Embed")
    ]
    detail = f"{images:.0f} images in {runs:.0f} runs; ModelInfer {calls[0]:.0f}, Embed {calls[1]:.0f}"
    report.check(f"runs with images of both: {runs - small:.0f}", runs > small, detail)
    report.end()


if __name__ == "__main__":
    main()
