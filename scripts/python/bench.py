"""Measures `Client.embed_stream` beside `imagegpt embed`, in turns.

Two workers with the fake engine, which takes a given time per batch and per image
(like a small model on a device of its own), embed the same WebDataset shards. For
each round the script prints images per second of the command, which also writes a
table, and of the Python client, which reads the shards with tarfile; the client's
CPU time per image; and its resident memory early, in the middle and late.
`make bench-python` runs the script with the package's own Python.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "embed"))
import common  # noqa: E402

FOLDER = ROOT / "target" / "python" / "bench"


def images(shards: Path) -> Iterator[tuple[str, bytes]]:
    """Yields the ids and contents of the images of WebDataset shards."""
    for shard in sorted(shards.glob("*.tar")):
        with tarfile.open(shard) as archive:
            for member in archive:
                file = archive.extractfile(member)
                if file is not None and member.name.endswith(".png"):
                    yield member.name, file.read()


def client(shards: Path, endpoints: list[str]) -> None:
    """Streams all images and prints what it took, as JSON."""
    from imagegpt import Client, ImageError

    begun, cpu = time.monotonic(), time.process_time()
    n_vectors = n_errors = 0
    memory = []
    for _, outcome in Client(endpoints).embed_stream(images(shards)):
        if isinstance(outcome, ImageError):
            n_errors += 1
        else:
            n_vectors += 1
        if (n_vectors + n_errors) % 1000 == 0:
            memory.append(common.resident_mb(os.getpid()))
    thirds = [memory[len(memory) * third // 3 : len(memory) * (third + 1) // 3] for third in range(3)]
    print(
        json.dumps(
            {
                "images": n_vectors + n_errors,
                "errors": n_errors,
                "seconds": time.monotonic() - begun,
                "cpu": time.process_time() - cpu,
                "memory": [max(third, default=0.0) for third in thirds],
            }
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--engine", default="2ms+1ms", help="--fake-engine of the workers")
    parser.add_argument("--client", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.client:
        client(Path(arguments.client[0]), arguments.client[1:])
        return
    count = arguments.images
    shards = common.make_tars(FOLDER / f"tars-{count}", count, max(count // 10, 1))[0].parent
    engine = ("--model", str(ROOT / "models" / "untrained"), "--fake-engine", arguments.engine)
    workers = [common.Worker(*engine) for _ in range(2)]
    try:
        print(f"{os.cpu_count()} cores, {count} images, two workers with the engine {arguments.engine}")
        print("round  imagegpt embed  embed_stream  ratio   client's CPU  MB: early, middle, late")
        for number in range(arguments.rounds):
            out = FOLDER / "out"
            shutil.rmtree(out, ignore_errors=True)
            report = common.run(str(shards), str(out), workers)
            assert report["images"] == count, report
            command = [sys.executable, __file__, "--client", str(shards)]
            done = subprocess.run(
                [*command, *(worker.url for worker in workers)], capture_output=True, text=True
            )
            if done.returncode != 0:
                raise SystemExit(done.stderr)
            streamed = json.loads(done.stdout)
            assert streamed["images"] == count, streamed
            assert streamed["errors"] == report["errors"], (streamed, report)
            rate = count / streamed["seconds"]
            print(
                f"{number:5} {report['images_per_second']:9.0f} images/s {rate:6.0f} images/s "
                f"{100 * rate / report['images_per_second']:5.1f} % {1e6 * streamed['cpu'] / count:8.0f} us/image  "
                + " ".join(f"{value:.0f}" for value in streamed["memory"])
            )
    finally:
        for worker in workers:
            worker.kill()


if __name__ == "__main__":
    main()
