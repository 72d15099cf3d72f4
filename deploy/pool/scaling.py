#!/usr/bin/env python3
"""Throughput, balance and latency of 1 to 8 workers on this machine.

The engine is fake and slow (100 ms a run and 20 ms an image), so that these two
cores are idle and what is measured is the pool: how calls spread and whether
throughput grows with workers. The client is `imagegpt bench`, whose connections
go round the workers."""

import argparse
import asyncio
import json
import os
import pathlib
import re
import subprocess
import sys
import urllib.request

from pods import Manifest, Pool, build

COST = "100ms+20ms"
# Of eight images at most, as components/cpu has it: 260 ms, 30.8 images/s.
CAPACITY = 8 / (0.100 + 8 * 0.020)
SIZES = [1, 2, 4, 8]
# Four batches' worth of callers for each worker keep it full.
CALLERS = 32
SECONDS = 25
TOLERANCE = 0.10
SERIES = re.compile(r'imagegpt_images_total\{code="OK"\} (\d+)')


def answered(pod):
    with urllib.request.urlopen(f"http://{pod.address}:9090/metrics", timeout=10) as page:
        return int(SERIES.search(page.read().decode())[1])


def cpu_seconds(pids):
    ticks = 0
    for pid in pids:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


async def bench(worker, endpoints, json_file, *flags):
    process = await asyncio.create_subprocess_exec(
        worker, "bench", *flags, "--endpoint", ",".join(endpoints), "--json", json_file,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    _, stderr = await process.communicate()
    if process.returncode:
        raise RuntimeError(stderr.decode())
    return json.loads(pathlib.Path(json_file).read_text())["measurements"][0]


async def measure(args, manifest, n_workers):
    with Pool(manifest, args.worker, COST) as pool:
        await pool.scale(n_workers)
        endpoints = [f"http://{pod.address}:50051" for pod in pool.pods]
        file = "target/deploy-pool/scaling.json"
        before = [answered(pod) for pod in pool.pods]
        busy = cpu_seconds(pod.process.pid for pod in pool.pods)
        full = await bench(args.worker, endpoints, file, "saturate", "--callers", str(CALLERS * n_workers),
                           "--connections", "4", "--warm-up", "3s", "--duration", f"{SECONDS}s")
        busy = cpu_seconds(pod.process.pid for pod in pool.pods) - busy
        middle = [answered(pod) for pod in pool.pods]
        part = await bench(args.worker, endpoints, file, "load", "--rate", f"{0.7 * CAPACITY * n_workers:.1f}",
                           "--connections", "4", "--warm-up", "3s", "--duration", f"{SECONDS}s")
        after = [answered(pod) for pod in pool.pods]
    return full, part, balance(before, middle) + balance(middle, after), busy


def balance(before, after):
    """What each worker did, of the mean."""
    each = [late - early for early, late in zip(before, after)]
    return [count * len(each) / sum(each) for count in each]


def per_second(measurement):
    return measurement["images_per_second"]


def p99(measurement):
    return measurement["latency"]["p99_ms"]


async def run(args):
    manifest = Manifest(build(args.kubectl, "deploy/overlays/cpu"))
    first, fine = None, True
    print(f"scaling: engine {COST} (at most {CAPACITY:.1f} images/s a worker), {CALLERS} callers a worker, {SECONDS} s")
    print("| workers | images/s | of one worker's, times workers | least and most busy worker, of the mean | "
          "p99 at 70 % load | CPU a worker |")
    print("|---|---|---|---|---|---|")
    for n_workers in SIZES:
        full, part, shares, busy = await measure(args, manifest, n_workers)
        first = first or per_second(full)
        linear = per_second(full) / (first * n_workers)
        low, high = min(shares), max(shares)
        fine &= abs(linear - 1) <= TOLERANCE and 1 - low <= TOLERANCE and high - 1 <= TOLERANCE
        print(f"| {n_workers} | {per_second(full):.1f} | {100 * linear:.1f} % | {100 * low:.1f} %, {100 * high:.1f} % | "
              f"{p99(part):.0f} ms | {busy / n_workers / (SECONDS + 3):.3f} cores |", flush=True)
    print(f"scaling: {'linear and balanced' if fine else 'NOT linear or balanced'} within {100 * TOLERANCE:.0f} %")
    return fine


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kubectl", required=True)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--stubs")
    sys.exit(0 if asyncio.run(run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
