"""Measures `imagegpt embed` with two workers: its speed, the speed at different
sizes, and the cost of the client itself.

The workers have the fake engine, which takes a given time per batch and per image
(like a small model on a device of its own) and leaves the cores to decoding and to
the client. For 1,000, 10,000 and 100,000 images as WebDataset and as Parquet, the
script prints images per second, CPU time of the client beside that of the workers,
and resident memory early, in the middle and late. Before that, `imagegpt bench
saturate` measures the two workers' highest rate with the same pictures. `make
bench-embed` runs the script.
"""

import argparse
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import common

FOLDER = common.ROOT / "target" / "embed-bench"
SAMPLE_SECONDS = 0.1


def saturation(workers: list[common.Worker]) -> float:
    """Returns the workers' highest rate in images per second."""
    images = FOLDER / "images"
    images.mkdir(parents=True, exist_ok=True)
    for number in range(1000):
        if not common.is_broken(number):
            (images / f"{common.key(number)}.png").write_bytes(common.picture(number))
    out = FOLDER / "saturation.json"
    subprocess.run(
        [
            *(common.PROGRAM, "bench", "saturate", "--json", out, "--images", images),
            *("--endpoint", ",".join(worker.url for worker in workers)),
            *("--images-per-call", "8", "--callers", "32", "--duration", "8s"),
        ],
        check=True,
        capture_output=True,
    )
    return json.loads(out.read_text())["measurements"][0]["images_per_second"]


def median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0


def measure(source: Path, count: int, workers: list[common.Worker], *flags: str) -> dict:
    out = FOLDER / "out"
    shutil.rmtree(out, ignore_errors=True)
    before = [common.cpu_seconds(worker.process.pid) for worker in workers]
    client = subprocess.Popen(
        common.command(str(source), str(out), workers, *flags),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    samples, client_cpu = [], 0.0
    while client.poll() is None:
        try:
            pids = [client.pid, *(worker.process.pid for worker in workers)]
            memory = [common.resident_mb(pid) for pid in pids]
            client_cpu = common.cpu_seconds(client.pid)
        except (FileNotFoundError, IndexError):
            break
        # A process that has just ended is a zombie without memory.
        if memory[0] > 0:
            samples.append(memory)
        time.sleep(SAMPLE_SECONDS)
    report = json.loads(client.communicate()[0])
    assert client.returncode == 0 and report["images"] == count, report
    after = [common.cpu_seconds(worker.process.pid) for worker in workers]
    thirds = [samples[len(samples) * k // 3 : len(samples) * (k + 1) // 3] for k in range(3)]
    return {
        "rate": report["images_per_second"],
        "errors": report["errors"],
        "client_cpu": client_cpu,
        "workers_cpu": sum(after) - sum(before),
        "seconds": report["seconds"],
        "memory": [[median([row[who] for row in third]) for third in thirds] for who in range(3)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=100_000, help="images of the largest run")
    parser.add_argument("--engine", default="2ms+1ms", help="--fake-engine of the workers")
    arguments = parser.parse_args()
    engine = ("--model", str(common.ROOT / "models" / "untrained"), "--fake-engine", arguments.engine)
    counts = [arguments.images // 100, arguments.images // 10, arguments.images]
    sources = {}
    for count in counts:
        per_file = max(count // 10, 1)
        tars = common.make_tars(FOLDER / f"tars-{count}", count, per_file)
        tables = common.make_parquet(FOLDER / f"parquet-{count}", count, per_file)
        sources[count] = {"WebDataset": tars[0].parent, "Parquet": tables[0].parent}
    workers = [common.Worker(*engine) for _ in range(2)]
    try:
        most = saturation(workers)
        print(f"{os.cpu_count()} cores, engine {arguments.engine}; two workers at saturation: {most:.0f} images/s")
        print("layout        images  images/s  of saturation  client's share of CPU   us/image   MB of client, workers: early, middle, late")
        measure(sources[counts[0]]["WebDataset"], counts[0], workers)
        for layout, flags in (("WebDataset", ()), ("Parquet", ("--id-column", "key"))):
            rates = []
            for count in counts:
                one = measure(sources[count][layout], count, workers, *flags)
                rates.append(one["rate"])
                share = one["client_cpu"] / (one["client_cpu"] + one["workers_cpu"])
                memory = "  ".join("/".join(f"{value:.0f}" for value in who) for who in one["memory"])
                print(
                    f"{layout:12} {count:7} {one['rate']:9.0f} {100 * one['rate'] / most:13.1f} %"
                    f" {100 * share:20.1f} % {1e6 * one['client_cpu'] / count:10.0f}   {memory}"
                )
            print(f"{layout}: the slowest of the sizes is {100 * (1 - min(rates) / max(rates)):.1f} % below the fastest")
    finally:
        for worker in workers:
            worker.kill()


if __name__ == "__main__":
    main()
