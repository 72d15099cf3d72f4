"""Shared parts of the scripts here: pictures, workers and runs of `imagegpt embed`."""

import io
import json
import os
import signal
import socket
import struct
import subprocess
import tarfile
import time
import urllib.request
import zlib
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(os.environ.get("IMAGEGPT", ROOT / "target" / "release" / "imagegpt"))
# Beginning of the names of temporary files, which a kill may leave behind and
# the next run overwrites.
TEMPORARY = "."
SIDE = 16


def picture(number: int) -> bytes:
    """Returns a PNG of noise that is different for each number."""
    state = (number * 2654435761 + 1) & 0xFFFFFFFF
    values = bytearray()
    while len(values) < SIDE * SIDE * 3:
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        values += struct.pack("<I", state)[1:]
    rows = b"".join(
        b"\0" + bytes(values[row * SIDE * 3 : (row + 1) * SIDE * 3]) for row in range(SIDE)
    )

    def chunk(kind: bytes, content: bytes) -> bytes:
        checksum = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )


def is_broken(number: int) -> bool:
    """True for one in a hundred images."""
    return number % 100 == 42


def image(number: int) -> bytes:
    return b"no image" if is_broken(number) else picture(number)


def key(number: int) -> str:
    return f"{number:07}"


def make_tars(folder: Path, count: int, per_shard: int) -> list[Path]:
    """Makes WebDataset shards; existing ones are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for shard, start in enumerate(range(0, count, per_shard)):
        path = folder / f"{shard:04}.tar"
        paths.append(path)
        if path.exists():
            continue
        part = path.with_suffix(".part")
        with tarfile.open(part, "w") as archive:
            for number in range(start, min(start + per_shard, count)):
                for kind, content in (("cls", str(number % 7).encode()), ("png", image(number))):
                    member = tarfile.TarInfo(f"{key(number)}.{kind}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
        part.rename(path)
    return paths


def make_parquet(folder: Path, count: int, per_file: int) -> list[Path]:
    """Makes Parquet files in Hugging Face's layout; existing ones are kept."""
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    paths = []
    for shard, start in enumerate(range(0, count, per_file)):
        path = folder / f"{shard:04}.parquet"
        paths.append(path)
        if path.exists():
            continue
        numbers = range(start, min(start + per_file, count))
        rows = [{"bytes": image(number), "path": None} for number in numbers]
        table = pyarrow.table(
            {
                "image": pyarrow.array(rows, kind),
                "key": [key(number) for number in numbers],
                "label": [number % 7 for number in numbers],
            }
        )
        part = path.with_suffix(".part")
        pyarrow.parquet.write_table(table, part, row_group_size=1000)
        part.rename(path)
    return paths


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def await_page(url: str, process: subprocess.Popen, seconds: float = 120) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            urllib.request.urlopen(url, timeout=1).read()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"{url} does not answer") from None
            time.sleep(0.02)


def await_port(port: int, process: subprocess.Popen, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > until:
                raise SystemExit(f"no process listens on port {port}") from None
            time.sleep(0.05)


class Worker:
    """`imagegpt serve` on ports of its own, which stay the same after a restart."""

    def __init__(self, *flags: str):
        self.flags = flags
        self.port, self.metrics = free_port(), free_port()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(
            [
                PROGRAM,
                "serve",
                *self.flags,
                *("--listen", f"127.0.0.1:{self.port}"),
                *("--metrics-listen", f"127.0.0.1:{self.metrics}"),
            ],
            stderr=subprocess.DEVNULL,
        )
        await_page(f"http://127.0.0.1:{self.metrics}/readyz", self.process)

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


def command(source: str, output: str, workers: list[Worker], *flags: str) -> list[str]:
    urls = ",".join(worker.url for worker in workers)
    return [str(PROGRAM), "embed", source, "--output", output, "--endpoint", urls, *flags]


def run(source: str, output: str, workers: list[Worker], *flags: str, env: dict | None = None) -> dict:
    """Runs a job, which must succeed, and returns its report."""
    done = subprocess.run(
        command(source, output, workers, *flags), capture_output=True, text=True, env=env
    )
    if done.returncode != 0:
        raise SystemExit(f"ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout)


def cpu_seconds(pid: int) -> float:
    """Returns the user and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def stop(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def go_on(pid: int) -> None:
    os.kill(pid, signal.SIGCONT)
