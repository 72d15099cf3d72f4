"""Kills a dataset job at random moments and compares its output.

    chaos.py           # on a disk
    chaos.py --s3      # with an S3-compatible server (moto) on loopback, which is
                       # stopped and slowed in between
    chaos.py --hub     # from a server with the calls of the Hugging Face Hub, which is
                       # stopped and slowed and at times answers 429 or 503
    chaos.py --urls    # from tables (Parquet and CSV) of URLs of such a server, at
                       # which some images do not exist
    chaos.py --int8    # on a disk, with models/emoji in 8 bits and batches of eight

A job runs undisturbed once. Then the same job is started many times; each time the
client is killed (SIGKILL) at a random moment, and every second time a worker, too,
which is started again. When the job has ended, every file must be identical to that of
the undisturbed one; where kills are left, another job begins. A server is disturbed
during each run but the undisturbed one, also during those that end: no disturbance may
end a job or become an error line. Workers make answers up, except with --int8: there a
real model computes the vectors, and kills change which images share a batch.
`make embed-chaos` does all five.
"""

import argparse
import contextlib
import csv
import hashlib
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import common
import hub_server
import servers

FOLDER = common.ROOT / "target" / "embed-chaos"
FLAGS = ("--item-timeout", "5s")
FAKE_ENGINE = ("--model", str(common.ROOT / "models" / "untrained"), "--fake-engine", "1ms+1ms")
SHARDS = 8
# Shards at the hub: more, so that the client asks for many.
HUB_SHARDS = 40
PARTS = 120
# Every run of the model has eight rows; a batch of fewer images is padded.
BATCHES = ("--batch-sizes", "8", "--max-batch-size", "8")


def digests(output: Path) -> dict[str, str]:
    return {
        str(path.relative_to(output)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output.rglob("*"))
        if path.is_file() and not path.name.startswith(common.TEMPORARY)
    }


def make_tars(count: int, shards: int) -> list[Path]:
    return common.make_tars(FOLDER / f"tars-{count}-{shards}", count, max(1, count // shards))


class Store:
    """Input of a job and place of its output; an undisturbed one."""

    flags = ("--keep", "cls")

    @staticmethod
    def is_error(number: int) -> bool:
        """True for an image that has an error line."""
        return common.is_broken(number)

    def disturb(self) -> None:
        pass

    def refused(self) -> str:
        """Says how many requests the server refused, if it refuses any."""
        return ""

    def end(self) -> None:
        pass


class Disk(Store):
    name = "disk"
    # Seconds from a client's start to its first image.
    start_seconds = 0.1

    def __init__(self, count: int):
        self.source = str(make_tars(count, SHARDS)[0].parent)
        self.env = dict(os.environ)
        self.clear("whole", "killed")

    def output(self, name: str) -> str:
        return str(FOLDER / name)

    def digests(self, name: str) -> dict[str, str]:
        return digests(FOLDER / name)

    def clear(self, *names: str) -> None:
        for name in names:
            shutil.rmtree(FOLDER / name, ignore_errors=True)


class S3(Store):
    """moto's server, with a bucket for each run."""

    name = "S3"
    start_seconds = 0.5

    def __init__(self, count: int):
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
        for path in make_tars(count, SHARDS):
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
        servers.disturb(self.process.pid)

    def end(self) -> None:
        self.process.kill()


class Served(Disk):
    """Server of the scripts here from which a job reads; the job writes to a disk."""

    # After its first image: half of the disturbances have ended by then.
    start_seconds = 1

    def __init__(self, count: int):
        self.refusal = servers.Refusal()
        self.process = servers.ServerProcess(lambda: self.serve(count))
        self.env = dict(os.environ)
        self.clear("whole", "killed")

    def disturb(self) -> None:
        servers.disturb(self.process.pid, self.refusal)

    def refused(self) -> str:
        return f"; the server refused {self.refusal.count.value} requests"

    def end(self) -> None:
        self.process.kill()


class Hub(Served):
    """Server with the calls of the Hugging Face Hub, and a dataset of tars."""

    name = "hub"
    source = "hf://datasets/team/tars"

    def __init__(self, count: int):
        super().__init__(count)
        self.env = hub_server.environment(self.process.url, FOLDER / "home")

    def serve(self, count: int) -> str:
        hub = hub_server.Hub(self.refusal)
        tars = make_tars(count, HUB_SHARDS)
        hub.add("team/tars", "main", {f"data/{path.name}": path.read_bytes() for path in tars})
        return hub.url


class Urls(Served):
    """Server of single images, and tables on a disk with their URLs."""

    name = "URLs"
    # Longer than all disturbances together, so that none becomes an error line.
    flags = ("--url-column", "url", "--id-column", "key", "--keep", "label", "--url-patience", "1h")

    def __init__(self, count: int):
        super().__init__(count)
        self.source = self.make_tables(count)

    @staticmethod
    def is_missing(number: int) -> bool:
        """True for one in a hundred images."""
        return number % 100 == 77

    @staticmethod
    def is_error(number: int) -> bool:
        return common.is_broken(number) or Urls.is_missing(number)

    def serve(self, count: int) -> str:
        numbers = (number for number in range(count) if not self.is_missing(number))
        images = {f"/{common.key(number)}.png": common.image(number) for number in numbers}

        def answer(handler) -> None:
            image = images.get(handler.path)
            servers.send(handler, 404 if image is None else 200, image or b"")

        return servers.serve(answer, self.refusal)

    def make_tables(self, count: int) -> str:
        """Makes Parquet files and, as the last, a CSV; returns the pattern that names them all."""
        import pyarrow
        import pyarrow.parquet

        folder = FOLDER / "urls"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        starts = range(0, count, max(1, count // SHARDS))
        names = []
        for shard, start in enumerate(starts):
            numbers = range(start, min(start + starts.step, count))
            columns = {
                "url": [f"{self.process.url}/{common.key(number)}.png" for number in numbers],
                "key": [common.key(number) for number in numbers],
                "label": [str(number % 7) for number in numbers],
            }
            if start == starts[-1]:
                names.append(f"{shard:04}.csv")
                with open(folder / names[-1], "w", newline="") as file:
                    csv.writer(file).writerows([columns.keys(), *zip(*columns.values())])
            else:
                names.append(f"{shard:04}.parquet")
                pyarrow.parquet.write_table(pyarrow.table(columns), folder / names[-1])
        return f"{folder}/{{{','.join(names)}}}"


@contextlib.contextmanager
def disturbed(store: Store) -> Iterator[None]:
    disturbance = threading.Thread(target=store.disturb)
    disturbance.start()
    try:
        yield
    finally:
        disturbance.join()


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


def compare(store: Store, expected: dict[str, str], summary: dict, n_images: int, broken: int) -> str:
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
    kinds = parser.add_mutually_exclusive_group()
    for kind, what in (
        (S3, "read from and write to moto's S3"),
        (Hub, "read from a server with the calls of the Hugging Face Hub"),
        (Urls, "read images from a web server, by tables of URLs"),
    ):
        kinds.add_argument(
            f"--{kind.name.lower()}", dest="kind", action="store_const", const=kind, default=Disk, help=what
        )
    parser.add_argument("--int8", action="store_true", help="serve models/emoji in 8 bits, at batch size 8")
    parser.add_argument("--images", type=int, help="images of the job [default: 12000, 1200 with --int8]")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    n_images = arguments.images or (1200 if arguments.int8 else 12_000)
    store = arguments.kind(n_images)
    flags = (*FLAGS, *store.flags, "--part-items", str(max(1, n_images // PARTS)))
    engine = int8_engine() if arguments.int8 else FAKE_ENGINE
    workers = [common.Worker(*engine) for _ in range(2)]
    log = FOLDER / "client.log"

    def job(output: str) -> dict:
        return common.run(store.source, store.output(output), workers, *flags, env=store.env)

    def disturbed_job() -> dict:
        with disturbed(store):
            return job("killed")

    try:
        began = time.monotonic()
        whole = job("whole")
        took = time.monotonic() - began
        print(
            f"{store.name}{', int8' if arguments.int8 else ''}, seed {arguments.seed}: undisturbed"
            f" {whole['images']} images, {whole['errors']} errors, {whole['parts']} parts in {took:.1f} s",
            flush=True,
        )
        broken = sum(store.is_error(number) for number in range(n_images))
        expected = store.digests("whole")
        killed = {"client": 0, "worker": 0}
        jobs = 0
        # A job that ends before its time is compared, and another one begun, so
        # that every kill that is counted has met a running job.
        while killed["client"] < arguments.kills:
            with disturbed(store), log.open("w") as errors:
                client = subprocess.Popen(
                    common.command(store.source, store.output("killed"), workers, *flags),
                    stdout=subprocess.DEVNULL,
                    stderr=errors,
                    env=store.env,
                )
                # Spreads the kills over the whole job.
                time.sleep(store.start_seconds + random.uniform(0, 2) * took / arguments.kills)
                if killed["client"] % 2 and client.poll() is None:
                    victim = random.choice(workers)
                    victim.kill()
                    killed["worker"] += 1
                    victim.start()
                    time.sleep(random.uniform(0.01, 0.2))
                ended = client.poll()
                client.kill()
                client.wait()
            if ended is None:
                killed["client"] += 1
                continue
            if ended != 0:
                raise SystemExit(f"ended with {ended}, which no kill explains:\n{log.read_text()}")
            compare(store, expected, disturbed_job(), n_images, broken)
            store.clear("killed")
            jobs += 1
        last = disturbed_job()
        together = compare(store, expected, last, n_images, broken)
        print(
            f"killed running clients {killed['client']} times and a worker {killed['worker']} times in"
            f" {jobs + 1} jobs; the last run did {last['images_this_run']} images{store.refused()}"
        )
        print(f"all {len(expected)} files of each job are the same to the byte; together sha256 {together}")
    finally:
        for worker in workers:
            worker.kill()
        store.end()


if __name__ == "__main__":
    main()
