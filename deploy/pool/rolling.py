#!/usr/bin/env python3
"""A rolling update under load: every pod of an overlay is replaced, by its own
probes and grace, while interactive calls come through DNS and round_robin, and
no call fails. Once with the retry policy that deploy/README.md recommends, and
once with no retries at all."""

import argparse
import asyncio
import json
import random
import sys
import time

import grpc

from names import NameServer
from pods import Manifest, Pool, build

N_PODS = 3
CALLS_PER_SECOND = 100
DEADLINE_SECONDS = 5
NAME = "imagegpt-headless.imagegpt.svc.cluster.local"


def service_config(retries):
    config = {"loadBalancingConfig": [{"round_robin": {}}]}
    if retries:
        config["methodConfig"] = [{"name": [{"service": "imagegpt.v1.ImageGptService"}], "retryPolicy": {
            "maxAttempts": 4, "initialBackoff": "0.05s", "maxBackoff": "1s", "backoffMultiplier": 2,
            "retryableStatusCodes": ["UNAVAILABLE"]}}]
    return json.dumps(config)


async def load(stub, pb, stop, outcomes, latencies):
    """Calls at a constant rate, each counted by its code; none waits for another."""
    async def call(number):
        # None twice, or calls would share runs.
        pixels = random.Random(number).randbytes(32 * 32 * 3)
        request = pb.EmbedRequest(images=[pb.Image(rgb8=pb.RawImage(width=32, height=32, pixels=pixels))])
        started = time.monotonic()
        try:
            response = await stub.Embed(request, timeout=DEADLINE_SECONDS)
            outcome = "OK" if response.results[0].WhichOneof("outcome") == "embedding" else "image failed"
        except grpc.aio.AioRpcError as error:
            outcome = f"{error.code().name}: {error.details()}"
        outcomes[outcome] = outcomes.get(outcome, 0) + 1
        latencies.append(time.monotonic() - started)

    calls, number, started = set(), 0, time.monotonic()
    while not stop.is_set():
        task = asyncio.ensure_future(call(number))
        calls.add(task)
        task.add_done_callback(calls.discard)
        number += 1
        await asyncio.sleep(max(0, started + number / CALLS_PER_SECOND - time.monotonic()))
    await asyncio.gather(*calls)


async def run(args, pb, pb_grpc, retries):
    names = await NameServer().start()
    manifest = Manifest(build(args.kubectl, args.overlay))
    with Pool(manifest, args.worker, "5ms+1ms", names) as pool:
        await pool.scale(N_PODS)
        await pool.until(lambda: len(names.addresses) == N_PODS)
        options = [("grpc.service_config", service_config(retries)), ("grpc.enable_retries", int(retries))]
        async with grpc.aio.insecure_channel(f"dns://127.0.0.1:{names.port}/{NAME}:50051", options) as channel:
            stop, outcomes, latencies = asyncio.Event(), {}, []
            loading = asyncio.ensure_future(load(pb_grpc.ImageGptServiceStub(channel), pb, stop, outcomes, latencies))
            await asyncio.sleep(5)
            started = time.monotonic()
            gone = await pool.roll_out()
            took = time.monotonic() - started
            await asyncio.sleep(5)
            stop.set()
            await loading
    latencies.sort()
    ends = ", ".join(f"exit code {code} after {after:.1f} s" for code, after in (pod.ended for pod in gone))
    grace = manifest.pod["terminationGracePeriodSeconds"]
    print(f"rolling: {args.overlay}, {'with' if retries else 'without'} retries: {N_PODS} pods replaced in "
          f"{took:.0f} s; {ends}, of {grace} s of grace")
    print(f"rolling: {len(latencies)} calls: {outcomes}; p50 {1000 * latencies[len(latencies) // 2]:.1f} ms, "
          f"p99 {1000 * latencies[len(latencies) * 99 // 100]:.1f} ms, longest {1000 * latencies[-1]:.0f} ms")
    return set(outcomes) == {"OK"} and all(pod.ended[0] == 0 and pod.ended[1] < grace for pod in gone)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kubectl", required=True)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--stubs", required=True)
    parser.add_argument("--overlay", default="deploy/overlays/cpu")
    args = parser.parse_args()
    sys.path.insert(0, args.stubs)
    from imagegpt.v1 import imagegpt_pb2 as pb
    from imagegpt.v1 import imagegpt_pb2_grpc as pb_grpc
    fine = [asyncio.run(run(args, pb, pb_grpc, retries)) for retries in (True, False)]
    print(f"rolling: {'no call failed' if all(fine) else 'CALLS FAILED'}")
    sys.exit(0 if all(fine) else 1)


if __name__ == "__main__":
    main()
