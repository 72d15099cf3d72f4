#!/usr/bin/env python3
"""The dataset Job under faults: its command, shards, parallelism and retries are
those of deploy/jobs/embed, its pool that of an overlay. In the middle a worker is
killed (SIGKILL) and restarted as the kubelet does, another hangs (SIGSTOP) until
its liveness probe has it restarted, and a pod of the Job is killed and replaced.
At the end no image is missing and the output is, to the byte, that of a Job that
nobody disturbed."""

import argparse
import asyncio
import io
import json
import os
import pathlib
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import urllib.request
import zlib

from pods import Manifest, Pool, build, seconds

N_WORKERS = 3
IMAGES_PER_FILE = 1500
# 50 images/s a worker.
COST = "0ms+20ms"
FOLDER = pathlib.Path("target/deploy-pool/job")
# Seconds after the Job's start.
KILL_WORKER, STOP_WORKER, KILL_POD = 15, 45, 60
# A worker has its share again when it does so much of the others' mean.
BALANCED = 0.9
WINDOW_SECONDS = 3
SERIES = re.compile(r'imagegpt_images_total\{code="OK"\} (\d+)')


def png(pixels):
    def chunk(kind, data):
        return struct.pack("!I", len(data)) + kind + data + struct.pack("!I", zlib.crc32(kind + data))
    rows = b"".join(b"\0" + pixels[row * 96:row * 96 + 96] for row in range(32))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack("!IIBBBBB", 32, 32, 8, 2, 0, 0, 0))
            + chunk(b"IDAT", zlib.compress(rows, 0)) + chunk(b"IEND", b""))


def make_dataset(n_files):
    folder = FOLDER / "images"
    folder.mkdir(parents=True)
    chance = random.Random(1)
    for number in range(n_files):
        with tarfile.open(folder / f"{number:05}.tar", "w") as tar:
            for image in range(IMAGES_PER_FILE):
                data = png(chance.randbytes(3072))
                member = tarfile.TarInfo(f"{number:05}{image:05}.png")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return folder


def answered(pod):
    """Images so far, or None of a worker that does not say."""
    try:
        with urllib.request.urlopen(f"http://{pod.address}:9090/metrics", timeout=0.2) as page:
            return int(SERIES.search(page.read().decode())[1])
    except OSError:
        return None


class Job:
    """The Job's controller: so many pods at once, a new one for each that fails."""

    def __init__(self, spec, binary, replace):
        self.spec, self.binary, self.replace = spec, binary, replace
        self.running, self.failures, self.n_killed = {}, {}, 0

    async def pod(self, index, gate):
        container = self.spec["template"]["spec"]["containers"][0]
        args = [self.replace.get(arg, arg) for arg in container["args"]]
        environment = {**{k: v for k, v in os.environ.items() if not k.startswith("IMAGEGPT_")},
                       **{variable["name"]: variable["value"] for variable in container["env"]},
                       "JOB_COMPLETION_INDEX": str(index)}
        async with gate:
            while True:
                with open(FOLDER / f"pod-{index}.log", "a") as log:
                    process = await asyncio.create_subprocess_exec(
                        self.binary, *args, env=environment, stdout=log, stderr=log)
                    self.running[index] = process
                    code = await process.wait()
                del self.running[index]
                if code == 0:
                    return
                self.failures[index] = self.failures.get(index, 0) + 1
                if self.failures[index] > self.spec["backoffLimitPerIndex"]:
                    raise RuntimeError(f"index {index} failed {self.failures[index]} times, at last with {code}")

    async def run(self):
        gate = asyncio.Semaphore(self.spec["parallelism"])
        await asyncio.gather(*(self.pod(index, gate) for index in range(self.spec["completions"])))

    def kill_one(self):
        index = min(self.running)
        self.running[index].send_signal(signal.SIGKILL)
        return index


async def follow(pool, samples):
    """What each worker has answered, twice a second."""
    loop = asyncio.get_running_loop()
    while True:
        counts = await asyncio.gather(*(loop.run_in_executor(None, answered, pod) for pod in pool.pods))
        samples.append((time.monotonic(), counts))
        await asyncio.sleep(0.5)


def rates(samples, until):
    """Images a second of each worker over a window that ends then; 0 of one that
    says nothing. A restart counts from 0."""
    window = [(at, counts) for at, counts in samples if until - WINDOW_SECONDS <= at <= until]
    if len(window) < 3:
        return None
    per_worker = []
    for number in range(N_WORKERS):
        done = 0
        for (_, before), (_, after) in zip(window, window[1:]):
            if before[number] is not None and after[number] is not None and after[number] >= before[number]:
                done += after[number] - before[number]
        per_worker.append(done / (window[-1][0] - window[0][0]))
    return per_worker


def until_balanced(samples, number, since):
    """Seconds from `since` until this worker does its share of the work."""
    for at, _ in samples:
        if at < since + WINDOW_SECONDS:
            continue
        each = rates(samples, at)
        if not each:
            continue
        others = [rate for other, rate in enumerate(each) if other != number]
        if each[number] >= BALANCED * sum(others) / len(others) > 0:
            return at - since
    return None


async def attempt(args, embed, finish, manifest, images, output, disturb):
    with Pool(manifest, args.worker, COST if disturb else "0ms") as pool:
        await pool.scale(N_WORKERS)
        # The pods' addresses in place of the headless service's name.
        endpoints = ",".join(f"http://{pod.address}:50051" for pod in pool.pods)
        container = embed["template"]["spec"]["containers"][0]["args"]
        replace = {container[1]: str(images), container[container.index("--output") + 1]: str(output),
                   container[container.index("--endpoint") + 1]: endpoints}
        job, samples = Job(embed, args.worker, replace), []
        for pod in pool.pods:
            pod.may_restart = True
        started = time.monotonic()
        running = asyncio.ensure_future(job.run())
        watch = asyncio.ensure_future(follow(pool, samples))
        notes = []
        if disturb:
            killed, stopped = pool.pods[0], pool.pods[1]

            async def at(moment):
                await asyncio.sleep(max(0, started + moment - time.monotonic()))
                if running.done():
                    raise RuntimeError("the job was done before it was disturbed")

            await at(KILL_WORKER)
            killed.process.send_signal(signal.SIGKILL)
            killed.process.wait()
            killed.restart()
            kill_time = time.monotonic()
            await at(STOP_WORKER)
            stopped.process.send_signal(signal.SIGSTOP)
            stop_time = time.monotonic()
            await at(KILL_POD)
            index = job.kill_one()
            await running
            others = rates(samples, stop_time + 20)
            notes += [f"a worker killed: its share again {until_balanced(samples, 0, kill_time):.1f} s later",
                      f"a worker stopped: the others went on at {others[0]:.0f} and {others[2]:.0f} images/s; restarted "
                      f"by its liveness probe after {stopped.restarts[0] - stop_time:.0f} s, its share again "
                      f"{until_balanced(samples, 1, stopped.restarts[0]):.1f} s later",
                      f"the pod of shard {index} killed: the shard was done again by the next one"]
        else:
            await running
        watch.cancel()
    args_of_finish = [replace.get(arg, arg) for arg in finish["template"]["spec"]["containers"][0]["args"]]
    subprocess.run([args.worker, *args_of_finish], check=True, capture_output=True)
    summary = json.loads((output / "_imagegpt/summary.json").read_text())
    return summary, time.monotonic() - started, notes, job.failures


async def run(args):
    shutil.rmtree(FOLDER, ignore_errors=True)
    jobs = [resource["spec"] for resource in build(args.kubectl, "deploy/jobs/embed") if resource["kind"] == "Job"]
    embed = next(job for job in jobs if job.get("completionMode") == "Indexed")
    finish = next(job for job in jobs if job is not embed)
    manifest = Manifest(build(args.kubectl, "deploy/overlays/cpu"))
    n_shards = embed["completions"]
    images = make_dataset(n_shards)
    whole, _, _, _ = await attempt(args, embed, finish, manifest, images, FOLDER / "whole", disturb=False)
    broken, took, notes, failures = await attempt(args, embed, finish, manifest, images, FOLDER / "disturbed", disturb=True)
    wanted = n_shards * IMAGES_PER_FILE
    arguments = embed["template"]["spec"]["containers"][0]["args"]
    timeout = seconds(arguments[arguments.index("--item-timeout") + 1])
    print(f"job: {wanted} images in {n_shards} shards, {embed['parallelism']} at once, {N_WORKERS} workers, "
          f"--item-timeout {timeout:g} s: {took:.0f} s")
    for note in notes:
        print(f"job: {note}")
    fine = broken["rows"] == wanted and broken["errors"] == 0 and broken["sha256"] == whole["sha256"]
    print(f"job: {broken['rows']} rows, {broken['errors']} errors, {sum(failures.values())} pod(s) replaced, output "
          f"{'the same to the byte as' if fine else 'NOT that of'} an undisturbed job ({broken['sha256'][:12]})")
    return fine


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--kubectl", required=True)
    parser.add_argument("--worker", required=True)
    parser.add_argument("--stubs")
    sys.exit(0 if asyncio.run(run(parser.parse_args())) else 1)


if __name__ == "__main__":
    main()
