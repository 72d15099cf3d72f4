"""Workers, tables and programs for the tests of Ray and Spark."""

from __future__ import annotations

import glob
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy
import PIL.Image
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from imagegpt import Client, LocalWorker, UnavailableError
from imagegpt.worker import find_onnxruntime, find_program

ROOT = Path(__file__).resolve().parent.parent.parent
EMOJI = ROOT / "models" / "emoji"
SOURCE = ROOT / "python" / "src"
# Longest wait in seconds for anything that a test waits for.
PATIENCE = 60.0
# Longest time for a job that is disturbed, on a machine that does other things too.
JOB_PATIENCE = 180.0
T = TypeVar("T")
STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def pictures() -> list[bytes]:
    """Returns the files of models/pictures, in the order of their names."""
    files = sorted(glob.glob(str(ROOT / "models" / "pictures" / "*" / "*.png")))
    assert len(files) == 45
    return [Path(file).read_bytes() for file in files]


def many_pictures(n: int) -> list[bytes]:
    """Returns n different images, made by a seed."""
    random = numpy.random.default_rng(0)
    found = []
    for _ in range(n):
        file = io.BytesIO()
        pixels = random.integers(0, 256, (8, 8, 3), numpy.uint8)
        PIL.Image.fromarray(pixels).save(file, "PNG")
        found.append(file.getvalue())
    return found


def with_bad_rows(files: list[bytes], missing: str) -> pyarrow.Table:
    """Returns a table of ids, a column to keep, and images, some of them bad."""
    images: list[Any] = [{"bytes": content, "path": None} for content in files]
    bad = [
        None,
        {"bytes": None, "path": None},
        {"bytes": b"", "path": None},
        {"bytes": None, "path": missing},
        {"bytes": b"no picture", "path": None},
    ]
    for place, image in zip((0, 7, 8, 20, len(images)), bad, strict=True):
        images.insert(place, image)
    n = len(images)
    return pyarrow.table(
        {
            "id": pyarrow.array([f"row-{i:05}" for i in range(n)]),
            "label": pyarrow.array([None if i % 10 == 9 else i * 3 for i in range(n)]),
            "image": pyarrow.array(images, STRUCT),
        }
    )


def write_in_files(table: pyarrow.Table, folder: Path, files: int) -> Path:
    """Writes a table as several Parquet files, and returns their directory."""
    folder.mkdir()
    step = -(-table.num_rows // files)
    for number in range(files):
        part = table.slice(number * step, step)
        pyarrow.parquet.write_table(part, folder / f"in-{number:03}.parquet", row_group_size=16)
    return folder


#: Rows that ``imagegpt embed`` writes, and the codes of its errors by id.
Program = tuple[pyarrow.Table, dict[str, str]]


def by_program(folder: Path, endpoint: str, output: Path, *flags: str) -> Program:
    """Embeds a directory with ``imagegpt embed``."""
    command = [str(find_program()), "embed", str(folder), "--output", str(output)]
    command += ["--endpoint", endpoint, "--id-column", "id", "--keep", "label", *flags]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    rows = pyarrow.parquet.read_table(sorted(output.glob("*.parquet")))
    rows = rows.replace_schema_metadata(None)
    files = sorted(output.glob("errors/*.jsonl"))
    errors = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return rows, {error["id"]: error["code"] for error in errors}


def compared(ours: pyarrow.Table, program: Program) -> None:
    """Compares a table of an adapter with that of ``imagegpt embed``: the same ids
    once, the same bytes of vectors, the same codes of the same rows."""
    rows, errors = program
    ours = ours.sort_by("id")
    ids = ours["id"].to_pylist()
    assert len(set(ids)) == len(ids)
    good = ours.filter(pyarrow.compute.is_null(ours["error_code"]))
    bad = ours.filter(pyarrow.compute.is_valid(ours["error_code"]))
    codes = dict(zip(bad["id"].to_pylist(), bad["error_code"].to_pylist(), strict=True))
    assert codes == errors
    assert all(bad["error"].to_pylist())
    rows = rows.sort_by("id")
    assert good["id"].to_pylist() == rows["id"].to_pylist()
    assert good["label"].to_pylist() == rows["label"].to_pylist()
    names = [name for name in rows.column_names if name.startswith("embedding")]
    assert names
    assert names == [name for name in ours.column_names if name.startswith("embedding")]
    for name in names:
        assert bad[name].null_count == bad.num_rows
        assert vector_bytes(good[name]) == vector_bytes(rows[name])


def vector_bytes(column: pyarrow.ChunkedArray) -> bytes:
    """Returns the bytes of all vectors, whatever kind of list they are in."""
    assert column.null_count == 0
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=False).tobytes()


def same(ours: pyarrow.Table, other: pyarrow.Table) -> None:
    """Compares two tables of an adapter, rows in any order."""
    assert ours.sort_by("id").to_pylist() == other.sort_by("id").to_pylist()


class KilledWorker:
    """Worker on a fixed port of this machine, which can be killed and started again."""

    def __init__(self, *flags: str) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.flags = flags
        self.endpoint = f"http://127.0.0.1:{self.port}"
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Starts the worker, and waits until it answers."""
        environment = dict(os.environ)
        library = find_onnxruntime()
        if library is not None:
            environment.setdefault("ORT_DYLIB_PATH", str(library))
        command = [str(find_program()), "serve", f"--model={EMOJI}", *self.flags]
        command += [f"--listen=127.0.0.1:{self.port}", "--metrics-listen=127.0.0.1:0"]
        quiet = subprocess.DEVNULL
        self.process = subprocess.Popen(
            command, stdin=quiet, stdout=quiet, stderr=quiet, env=environment, process_group=0
        )
        end = time.monotonic() + PATIENCE
        with Client(self.endpoint) as client:
            while True:
                try:
                    client.model(timeout=5.0)
                    return
                except UnavailableError:
                    assert time.monotonic() < end, "the worker does not start"

    def kill(self) -> None:
        """Kills the worker and all that it has started, as a lost machine would."""
        if self.process is not None and self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(PATIENCE)


@contextmanager
def worker(**flags: Any) -> Iterator[LocalWorker]:
    """Starts a worker with models/emoji."""
    with LocalWorker(EMOJI, start_timeout=PATIENCE, **flags) as started:
        yield started


def wait_for(condition: Callable[[], bool], text: str) -> None:
    """Waits until a condition holds, for a bounded time."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"not within {PATIENCE:.0f} s: {text}"
        time.sleep(0.02)


def within(seconds: float, work: Callable[[], T]) -> T:
    """Returns what the work returns, and fails if it takes longer."""
    found: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            found.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    assert not thread.is_alive(), f"not done within {seconds:.0f} s"
    if failures:
        raise failures[0]
    return found[0]


def prepare_environment() -> None:
    """Lets the processes of the engines find this package and this Python."""
    paths = [str(SOURCE), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    os.environ["PYSPARK_PYTHON"] = sys.executable
    os.environ["PYSPARK_DRIVER_PYTHON"] = sys.executable
