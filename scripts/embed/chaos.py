"""Kills a dataset job at random moments and compares its output.

    chaos.py           # on a disk
    chaos.py --s3      # with an S3-compatible server (moto) on loopback, which is
                       # stopped and slowed in between
    chaos.py --int8    # on a disk, with models/emoji in 8 bits and batches of eight

A job runs undisturbed once. Then the same job is started many times; each time the
client is killed (SIGKILL) at a random moment, and every second time a worker, too,
which is started again. When the job has ended, every file must be identical to that of
the undisturbed one; where kills are left, another job begins. Workers make answers up,
except with --int8: there a real model computes the vectors, and kills change which
images share a batch.
`make embed-chaos` does all three.
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import common

FOLDER = common.ROOT / "target" / "embed-chaos"
FLAGS = ("--keep", "cls", "--item-timeout", "5s")
FAKE_ENGINE = ("--model", str(common.ROOT / "models" / "untrained"), "--fake-engine", "1ms+1ms")
SHARDS = 8
PARTS = 120
# Every run of the model has eight rows; a batch of fewer images is padded.
BATCHES = ("--batch-sizes", "8", "--max-batch-size", "8")


def digests(output: Path) -> dict[str, str]:
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.name.startswith(common.TEMPORARY)
    }


class Disk:
    # Seconds from a client's start to its first image.
    start_seconds = 0.1

    def __init__(self, tars: list[Path]):
        self.source = str(tars[0].parent)
        self.env = dict(os.environ)
        for name in ("whole", "killed"):
            shutil.rmtree(FOLDER / name, ignore_errors=True)

    def output(self, name: str) -> str:
        return str(FOLDER / name)

    def digests(self, name: str) -> dict[str, str]:
        return digests(FOLDER / name)

    def clear(self, name: str) -> None:
        shutil.rmtree(FOLDER / name)

    def disturb(self) -> None:
        """Does nothing: a disk is not disturbed."""

    def end(self) -> None:
        pass


class S3:
    """moto's server, with a bucket for each run."""

    start_seconds = 0.5

    def __init__(self, tars: list[Path]):
        import boto3

        self.source = "s3://images/shards"
        port = common.free_port()
        server = Path(sys.executable).with_name("moto_server")
        self.process = subprocess.Popen(
            [server, "-H", "127.0.0.1", "-p", str(port)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        url = f"http://127.0.0.1:{port}"
        common.await_page(f"{url}/moto-api/", self.process)
        self.env = os.environ | {
            "AWS_ENDPOINT": url,
            "AWS_ALLOW_HTTP": "true",
            "AWS_ACCESS_KEY_ID": "test",
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_REGION": "us-east-1",
        }
        self.s3 = boto3.client(
            "s3",
            endpoint_url=url,
            region_name="us-east-1",
            aws_access_key_id="test",
            aws_secret_access_key="test",
        )
        for bucket in ("images", "whole", "killed"):
            self.s3.create_bucket(Bucket=bucket)
        for path in tars:
            self.s3.upload_file(str(path), "images", f"shards/{path.name}")

    def output(self, name: str) -> str:
        return f"s3://{name}/table"

    def digests(self, name: str) -> dict[str, str]:
        found = {}
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=name):
            for entry in page.get("Contents", []):
                content = self.s3.get_object(Bucket=name, Key=entry["Key"])["Body"].read()
                found[entry["Key"]] = hashlib.sha256(content).hexdigest()
        return found

    def clear(self, name: str) -> None:
        for page in self.s3.get_paginator("list_objects_v2").paginate(Bucket=name):
            for entry in page.get("Contents", []):
                self.s3.delete_object(Bucket=name, Key=entry["Key"])

    def disturb(self) -> None:
        """Stops the server for up to two seconds, or slows it to a fifth of its speed for that time."""
        if random.random() < 0.5:
            common.stop(self.process)
            time.sleep(random.uniform(0.2, 2))
        else:
            until = time.monotonic() + random.uniform(0.2, 2)
            while time.monotonic() < until:
                common.stop(self.process)
                time.sleep(0.08)
                common.go_on(self.process)
                time.sleep(0.02)
        common.go_on(self.process)

    def end(self) -> None:
        self.process.kill()


def int8_engine() -> tuple[str, ...]:
    """Compiles models/emoji in 8 bits and returns the flags that serve it."""
    model = FOLDER / "emoji-int8"
    shutil.rmtree(model, ignore_errors=True)
    subprocess.run(
        [common.PROGRAM, "compile", common.ROOT / "models" / "emoji", "--output", model]
        + ["--precision", "int8", "--tasks", "embed"],
        stdout=subprocess.DEVNULL,
        check=True,
    )
    return ("--model", str(model), "--execution-provider", "cpu", *BATCHES)


def compare(store: Disk | S3, expected: dict[str, str], summary: dict, n_images: int, broken: int) -> str:
    """Returns the digest of the killed job's files; raises where they are not those of the undisturbed one."""
    found = store.digests("killed")
    differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    if differing:
        raise SystemExit(f"{len(differing)} of {len(expected)} files differ: {sorted(differing)[:5]}")
    if summary["images"] != n_images or summary["errors"] != broken:
        raise SystemExit(f"{summary['images']} images with {summary['errors']} errors")
    return hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--s3", action="store_true", help="read from and write to moto's S3")
    parser.add_argument("--int8", action="store_true", help="serve models/emoji in 8 bits, at batch size 8")
    parser.add_argument("--images", type=int, help="images of the job [default: 12000, 1200 with --int8]")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    n_images = arguments.images or (1200 if arguments.int8 else 12_000)
    tars = common.make_tars(FOLDER / f"tars-{n_images}", n_images, max(1, n_images // SHARDS))
    store = (S3 if arguments.s3 else Disk)(tars)
    flags = (*FLAGS, "--part-items", str(max(1, n_images // PARTS)))
    engine = int8_engine() if arguments.int8 else FAKE_ENGINE
    workers = [common.Worker(*engine) for _ in range(2)]
    try:
        job = (store.source, store.output("killed"), workers, *flags)
        began = time.monotonic()
        whole = common.run(store.source, store.output("whole"), workers, *flags, env=store.env)
        took = time.monotonic() - began
        print(
            f"{'S3' if arguments.s3 else 'disk'}{', int8' if arguments.int8 else ''}, seed {arguments.seed}: undisturbed"
            f" {whole['images']} images, {whole['errors']} errors, {whole['parts']} parts in {took:.1f} s"
        )
        broken = sum(common.is_broken(number) for number in range(n_images))
        expected = store.digests("whole")
        killed = {"client": 0, "worker": 0}
        jobs = 0
        # A job that ends before its time is compared, and another one begun, so
        # that every kill that is counted has met a running job.
        while killed["client"] < arguments.kills:
            client = subprocess.Popen(
                common.command(store.source, store.output("killed"), workers, *flags),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=store.env,
            )
            disturbance = threading.Thread(target=store.disturb)
            disturbance.start()
            # Spreads the kills over the whole job.
            time.sleep(store.start_seconds + random.uniform(0, 2) * took / arguments.kills)
            if killed["client"] % 2 and client.poll() is None:
                victim = random.choice(workers)
                victim.kill()
                killed["worker"] += 1
                victim.start()
                time.sleep(random.uniform(0.01, 0.2))
            has_ended = client.poll() is not None
            client.kill()
            client.wait()
            disturbance.join()
            if has_ended:
                compare(store, expected, common.run(*job, env=store.env), n_images, broken)
                store.clear("killed")
                jobs += 1
            else:
                killed["client"] += 1
        last = common.run(*job, env=store.env)
        together = compare(store, expected, last, n_images, broken)
        print(
            f"killed running clients {killed['client']} times and a worker {killed['worker']} times in"
            f" {jobs + 1} jobs; the last run did {last['images_this_run']} images"
        )
        print(f"all {len(expected)} files of each job are the same to the byte; together sha256 {together}")
    finally:
        for worker in workers:
            worker.kill()
        store.end()


if __name__ == "__main__":
    main()
