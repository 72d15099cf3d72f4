"""Workers to attack, the measurements of them, and the table of outcomes."""

import atexit
import contextlib
import functools
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

MIB = 1 << 20
HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
BINARY = os.environ.get("BINARY", "target/release/imagegpt")
SHORT = os.environ.get("ATTACK_SHORT", "") not in ("", "0")
# Factor by which an unoptimized binary may be slower than a release build.
UNOPTIMIZED = 4 if "debug" in BINARY else 1
# Largest factor by which a busy machine may be slower; a busier one gives no useful result.
PACE_MAX = 10.0
# A worker is killed at this size, so that no attack takes the machine's memory.
MEMORY_MAX = 2048 * MIB
# Address space is more than memory: stacks of threads, arenas of the allocator, mapped files.
ADDRESS_SPACE_MAX = 16 << 30
CGROUPS = [Path("/sys/fs/cgroup/memory"), Path("/sys/fs/cgroup")]
STUBS = ROOT / "target/attack-stubs"
MODEL = "models/untrained"

# The attacker has a limit, too: an attack that takes the attacker's memory shows nothing.
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, resource.RLIM_INFINITY))
FOLDER = Path(tempfile.mkdtemp(prefix="imagegpt-attack-"))
atexit.register(shutil.rmtree, FOLDER, ignore_errors=True)
# A signal ends this process by an exception, so that everything it started is ended too.
for ends in (signal.SIGTERM, signal.SIGHUP):
    signal.signal(ends, lambda number, _: sys.exit(128 + number))


def make_stubs():
    """Generates Python stubs of the .proto files of this checkout, once per run."""
    import grpc_tools
    from grpc_tools import protoc

    known = Path(grpc_tools.__file__).parent / "_proto"
    STUBS.mkdir(parents=True, exist_ok=True)
    contracts = [
        "imagegpt/v1/imagegpt.proto",
        "google/rpc/status.proto",
        "inference/grpc_service.proto",
    ]
    flags = [f"-I{ROOT}/proto", f"-I{known}", f"--python_out={STUBS}", f"--grpc_python_out={STUBS}"]
    if protoc.main(["protoc", *flags, *contracts]) != 0:
        sys.exit("the .proto files in proto/ do not compile")
    sys.path.insert(0, str(STUBS))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@functools.cache
def manual(command):
    return subprocess.run([BINARY, command, "--help"], capture_output=True, text=True, cwd=ROOT).stdout


def pace():
    """Returns how long a second of CPU work takes on this machine now: more than one if other processes are busy."""
    began, cpu = time.monotonic(), time.process_time()
    while time.process_time() - cpu < 0.15:
        pass
    return min(max(1.0, (time.monotonic() - began) / 0.15), PACE_MAX)


MISSING = set()


def flag(name, value):
    """Returns a flag if this binary has it, so that a binary without the limit can be attacked as well."""
    if re.search(rf"{name}\b", manual("serve")):
        return [name, value]
    MISSING.add(name)
    return []


def confined(command, group):
    """Returns a command that runs in the memory cgroup, if there is one, with a limited address space, and that ends
    with this process."""
    script = 'for f; do shift; [ "$f" = -- ] && break; echo $$ >"$f/cgroup.procs"; done; exec "$@"'
    groups = [str(group)] if group else []
    return [
        *("sh", "-c", script, "sh", *groups, "--"),
        *("setpriv", "--pdeathsig", "KILL", "prlimit", f"--as={ADDRESS_SPACE_MAX}", "--core=0"),
        *command,
    ]


def new_cgroup(name):
    """Returns a memory cgroup with the limit, or None if this user may not create one."""
    for hierarchy, limit in zip(CGROUPS, ("memory.limit_in_bytes", "memory.max"), strict=True):
        group = hierarchy / f"imagegpt-attack-{os.getpid()}-{name}"
        with contextlib.suppress(OSError):
            group.mkdir()
            try:
                (group / limit).write_text(str(MEMORY_MAX))
                return group
            except OSError:
                group.rmdir()
    return None


class Worker:
    """`imagegpt serve` on loopback ports of its own, killed when the block ends."""

    count = 0

    def __init__(self, *flags, model=MODEL, fake="0s", stderr=None, close_stderr=False, delay=0):
        Worker.count += 1
        self.port, self.metrics_port = free_port(), free_port()
        self.log = FOLDER / f"worker-{Worker.count}.log"
        self.group = new_cgroup(Worker.count)
        command = [
            *(BINARY, "serve", "--model", str(model)),
            *(("--fake-engine", fake) if fake else ()),
            *("--listen", f"127.0.0.1:{self.port}", "--metrics-listen", f"127.0.0.1:{self.metrics_port}"),
            *("--cache-dir", str(FOLDER / "cache"), "--preprocess-threads", "2"),
            *flags,
        ]
        if close_stderr:
            command = ["sh", "-c", 'exec "$@" 2>&-', "sh", *command]
        environment = {k: v for k, v in os.environ.items() if not k.startswith("IMAGEGPT_")}
        environment.setdefault("ORT_DYLIB_PATH", str(ROOT / "target/onnxruntime/libonnxruntime.so"))
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                confined(command, self.group),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=log if stderr is None else stderr,
                env=environment,
            )
        self.pid = self.process.pid
        self.peak = self.base = 0
        self.ended = threading.Event()
        threading.Thread(target=self._sample, daemon=True).start()

    def __enter__(self):
        try:
            until = time.monotonic() + 60
            while not self.answers("/readyz"):
                if not self.alive():
                    raise RuntimeError(f"the worker ended with {self.process.returncode}: {self.tail()}")
                if time.monotonic() > until:
                    raise RuntimeError(f"the worker is not ready after 60 s: {self.tail()}")
                time.sleep(0.05)
            self.forget_peak()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_):
        self.kill()

    def kill(self):
        self.ended.set()
        if self.alive():
            self.process.kill()
        self.process.wait()
        if self.group:
            for _ in range(20):
                with contextlib.suppress(OSError):
                    self.group.rmdir()
                    break
                time.sleep(0.05)

    def alive(self):
        return self.process.poll() is None

    def _status(self, key):
        found = re.search(rf"{key}:\s+(\d+)", Path(f"/proc/{self.pid}/status").read_text())
        return int(found[1]) * 1024 if found else 0

    def _sample(self):
        """Keeps the kernel's own peak, which is lost when the process ends."""
        while not self.ended.wait(0.02):
            with contextlib.suppress(OSError):
                self.peak = max(self.peak, self._status("VmHWM"))

    def forget_peak(self):
        """Resets the peak to the worker's current memory."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{self.pid}/clear_refs").write_text("5")
            self.base = self.peak = self._status("VmRSS")

    def grown(self):
        """Returns the peak, less the worker's memory at rest."""
        with contextlib.suppress(OSError):
            self.peak = max(self.peak, self._status("VmHWM"))
        return self.peak - self.base

    def cpu(self):
        """Returns the seconds of CPU that the worker has spent."""
        try:
            fields = Path(f"/proc/{self.pid}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            return 0.0
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def get(self, path, timeout=5.0):
        with urllib.request.urlopen(f"http://127.0.0.1:{self.metrics_port}{path}", timeout=timeout) as answer:
            return answer.read().decode()

    def answers(self, path, timeout=1.0):
        try:
            return bool(self.get(path, timeout))
        except OSError:
            return False

    def metric(self, pattern):
        """Returns the sum of all series whose name and labels match."""
        lines = (line for line in self.get("/metrics").splitlines() if not line.startswith("#"))
        return sum(float(line.rsplit(" ", 1)[1]) for line in lines if re.search(pattern, line.rsplit(" ", 1)[0]))

    def log_text(self):
        return re.sub(r"\x1b\[[0-9;]*m", "", self.log.read_text(errors="replace"))

    def tail(self):
        return " | ".join(self.log_text().strip().splitlines()[-2:])[-300:]

    def terminate(self):
        self.process.send_signal(signal.SIGTERM)
        return time.monotonic()

    def exit_within(self, seconds):
        """Returns the exit code, or None if the worker is still running."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None


class Good:
    """A well-behaved client in a process of its own, beside an attacker."""

    def __init__(self, worker, image="-", interval=0.02, timeout=10.0, method="Embed"):
        self.process = subprocess.Popen(
            [
                *("setpriv", "--pdeathsig", "KILL", sys.executable, str(HERE / "good.py")),
                *(str(worker.port), str(image), str(interval), str(timeout), method),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": str(STUBS)},
            text=True,
        )

    def __enter__(self):
        until = time.monotonic() + 20
        while self.take()["calls"] < 3 and time.monotonic() < until:
            time.sleep(0.1)
        # The first calls include the connection, so they are dropped.
        time.sleep(0.3)
        self.quiet = self.take()
        return self

    def __exit__(self, *_):
        self.process.kill()
        self.process.wait()

    def take(self):
        self.process.stdin.write("take\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())


class Row:
    """A row of the table: the promise, and everything that broke it."""

    def __init__(self, attack, promise, limit):
        # The promised times are for a machine without other load.
        self.slow = UNOPTIMIZED * pace()
        self.attack, self.promise, self.limit = attack, promise, limit
        self.wrong, self.peak, self.base, self.p99, self.errors, self.calls = [], 0, 0, None, {}, 0
        self.notes = []

    def expect(self, holds, otherwise):
        if not holds:
            self.wrong.append(otherwise)
        return holds

    def note(self, text):
        self.notes.append(text)

    def saw(self, worker):
        """Notes the worker's peak, if the worker grew more than the others of this attack."""
        if worker.peak - worker.base >= self.peak - self.base:
            self.peak, self.base = worker.peak, worker.base

    def lives(self, worker):
        """Expects that the worker still serves."""
        self.saw(worker)
        return self.expect(worker.alive(), f"the worker ended with {worker.process.poll()}")

    def bounded(self, worker, bytes_max, what):
        """Expects a peak of at most `bytes_max` over the worker's memory at rest."""
        grown = worker.grown()
        self.lives(worker)
        self.expect(
            grown <= bytes_max, f"{what} grew the worker by {grown / MIB:.0f} MiB, promised {bytes_max / MIB:.0f}"
        )

    def served(self, good, p99_max, errors_max=0):
        """Notes the good client's calls since the last time, and expects that they were served."""
        p99_max *= self.slow
        # An attack may be over before the good client has said its first word.
        until = time.monotonic() + 10
        while (seen := good.take())["p99"] is None and not seen["errors"] and time.monotonic() < until:
            time.sleep(0.1)
        n_errors = sum(seen["errors"].values())
        self.calls += seen["calls"]
        for code, n in seen["errors"].items():
            self.errors[code] = self.errors.get(code, 0) + n
        if seen["p99"] is None:
            return self.expect(False, "no call of the good client has ended")
        self.p99 = max(self.p99 or 0, seen["p99"])
        self.expect(n_errors <= errors_max, f"the good client had {n_errors} of {seen['calls']} calls fail: {seen['errors']}")
        return self.expect(
            seen["p99"] <= p99_max, f"the good client's p99 is {seen['p99'] * 1e3:.0f} ms, promised {p99_max * 1e3:.0f}"
        )

    def cells(self):
        beside = "" if self.p99 is None else f"{self.p99 * 1e3:.0f} ms"
        errors = "" if self.p99 is None else f"{sum(self.errors.values())} of {self.calls}"
        peak = f"{self.peak / MIB:.0f} MiB ({self.base / MIB:.0f} at rest)" if self.peak else ""
        outcome = "**wrong**" if self.wrong else "right"
        return [self.attack, self.promise, self.limit, outcome, peak, beside, errors]


HEAD = ["attack", "promised", "by", "outcome", "peak memory", "good client's p99", "its errors"]


def table(rows):
    lines = [HEAD, ["---"] * len(HEAD), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
