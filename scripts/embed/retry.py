"""Retries the errors of a job over URLs of which three in ten fail for a while.

    retry.py [--images 10000] [--kills 20]

A server answers 503 for 30 % of the images until the job has ended, and not after that.
`embed --retry-errors` then runs once undisturbed, and on a copy of the output with the
client killed (SIGKILL) at random moments, every second time with a worker. Both outputs
must be identical, with one row for each image and no error. In a third run the server
fails for half of those images again, so that two rounds are needed.
"""

import argparse
import random
import shutil
import subprocess
import time
from multiprocessing.sharedctypes import RawValue
from pathlib import Path

import common
import servers
from chaos import FAKE_ENGINE, FLAGS, digests

FOLDER = common.ROOT / "target" / "embed-retry"
FLAGS = (*FLAGS, "--id-column", "key", "--keep", "label", "--url-patience", "100ms")
RETRY = "--retry-errors=UNAVAILABLE"


def fails(number: int) -> bool:
    """True for three images in ten."""
    return number % 10 in (1, 4, 8)


class Web:
    """Server of images, some of which it refuses while `busy` is above 0."""

    def __init__(self, count: int):
        # 2: all that fail; 1: half of them.
        self.busy, self.asked = RawValue("i", 2), RawValue("q", 0)
        self.process = servers.ServerProcess(lambda: self.serve(count))

    def serve(self, count: int) -> str:
        images = {f"/{common.key(number)}.png": (number, common.picture(number)) for number in range(count)}

        def answer(handler) -> None:
            self.asked.value += 1
            number, image = images[handler.path]
            if fails(number) and (self.busy.value == 2 or self.busy.value == 1 and number % 2):
                servers.send(handler, 503)
            else:
                servers.send(handler, 200, image)

        return servers.serve(answer)

    def list(self, count: int) -> str:
        lines = (f"{common.key(number)},{self.process.url}/{common.key(number)}.png,{number % 7}\n" for number in range(count))
        path = FOLDER / "list.csv"
        path.write_text("key,url,label\n" + "".join(lines))
        return str(path)


def check(output: Path, count: int) -> None:
    """Raises unless each image has exactly one row, and no file of errors is left."""
    import pyarrow.parquet

    ids = [
        one
        for path in sorted(output.glob("part-*.parquet"))
        for one in pyarrow.parquet.read_table(path, columns=["id"])["id"].to_pylist()
    ]
    if sorted(ids) != [common.key(number) for number in range(count)]:
        raise SystemExit(f"{len(ids)} rows, {len(set(ids))} of them different, of {count} images")
    left = list((output / "errors").glob("*"))
    if left:
        raise SystemExit(f"error files are left: {left[:5]}")


def killed(command: list[str], workers: list[common.Worker], kills: int, seconds: float) -> int:
    """Runs a command with kills, spread over about the time that it takes; returns how often a running client was killed."""
    done = 0
    while done < kills:
        client = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(0.1 + random.uniform(0, 2) * seconds / kills)
        if client.poll() is not None:
            if client.returncode != 0:
                raise SystemExit(f"a client ended with {client.returncode}")
            break
        if done % 2:
            victim = random.choice(workers)
            victim.kill()
            victim.start()
        client.kill()
        client.wait()
        done += 1
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=int(time.time()))
    arguments = parser.parse_args()
    random.seed(arguments.seed)
    count = arguments.images
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir(parents=True)
    web = Web(count)
    source = web.list(count)
    workers = [common.Worker(*FAKE_ENGINE) for _ in range(2)]
    flags = (*FLAGS, "--part-items", "100")
    try:
        first = common.run(source, str(FOLDER / "first"), workers, *flags)
        failing = sum(fails(number) for number in range(count))
        print(f"seed {arguments.seed}: {first['images']} images, {first['errors']} errors", flush=True)
        if first["errors"] != failing:
            raise SystemExit(f"{failing} should have failed")
        for name in ("whole", "twice"):
            shutil.copytree(FOLDER / "first", FOLDER / name)
        tables = {name: digest for name, digest in digests(FOLDER / "first").items() if name.startswith("part-")}

        web.busy.value, asked = 0, web.asked.value
        began = time.monotonic()
        whole = common.run(source, str(FOLDER / "whole"), workers, *flags, RETRY)
        took = time.monotonic() - began
        check(FOLDER / "whole", count)
        asked = web.asked.value - asked
        print(f"{RETRY}: {whole['rows']} rows, {whole['errors']} errors in {took:.1f} s, {asked} requests", flush=True)
        found = digests(FOLDER / "whole")
        if asked != failing or any(found[name] != digest for name, digest in tables.items()):
            raise SystemExit("an image was read again without need, or a table has changed")

        expected = digests(FOLDER / "whole")
        command = common.command(source, str(FOLDER / "killed"), workers, *flags, RETRY)
        kills = retries = 0
        # A retry that ends before its time is compared, and another one begun.
        while kills < arguments.kills:
            shutil.rmtree(FOLDER / "killed", ignore_errors=True)
            shutil.copytree(FOLDER / "first", FOLDER / "killed")
            kills += killed(command, workers, arguments.kills - kills, took)
            common.run(source, str(FOLDER / "killed"), workers, *flags, RETRY)
            found = digests(FOLDER / "killed")
            differing = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
            if differing:
                raise SystemExit(f"{len(differing)} of {len(expected)} files differ: {sorted(differing)[:5]}")
            check(FOLDER / "killed", count)
            retries += 1
        print(f"killed {kills} times in {retries} retries: all {len(expected)} files are the same to the byte", flush=True)

        web.busy.value = 1
        half = common.run(source, str(FOLDER / "twice"), workers, *flags, RETRY)
        web.busy.value = 0
        twice = common.run(source, str(FOLDER / "twice"), workers, *flags, RETRY)
        check(FOLDER / "twice", count)
        print(f"in two rounds: {half['errors']} errors after the first, {twice['errors']} after the second")
    finally:
        for worker in workers:
            worker.kill()
        web.process.kill()


if __name__ == "__main__":
    main()
