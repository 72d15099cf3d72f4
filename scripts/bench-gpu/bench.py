"""Runs the measurements of scripts/bench-gpu.sh, whose comment is the manual.

A step that fails or does not fit into the remaining time becomes a line of the
report; the other steps continue.
"""

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import checks
import report
import settings

ROOT = Path(__file__).resolve().parents[2]


try:
    SET = settings.read(os.environ)
except settings.Wrong as wrong:
    print(f"bench-gpu: {wrong}", file=sys.stderr)
    sys.exit(2)

# Relative shares of the remaining time.
WEIGHTS = {"compile": 1, "engine": 3, "grpc": 3, "generate": 2, "cores": 2, "graphs": 1, "torch": 3}
# Steps of a short time on a device, in their order, with the seconds of each: a cut loses only
# what comes after. They are parts of BUDGET, if that is another one.
LIMITS = {
    "answers": 90, "nan": 40, "seeds": 90, "steps": 90, "primers": 30, "graphs": 35,
    "copies": 75, "generate": 70, "two": 50, "torch": 80, "kernels": 40, "fault": 30,
}  # fmt: skip
# A step with fewer seconds than this gives no useful result.
LEAST = 3.0
# Seconds in which a process must end after it was asked to.
GRACE = 20.0
POSITIONS = 1024
START = time.monotonic()
CORES = len(os.sched_getaffinity(0))
# Load average of the last minute, before the measurements begin.
LOAD = os.getloadavg()[0]


# Time at which the step in progress must end.
STEP_ENDS = [math.inf]


def left() -> float:
    now = time.monotonic()
    return min(SET.budget - (now - START), STEP_ENDS[0] - now)


def say(text: str) -> None:
    print(f"[{time.monotonic() - START:5.0f} s] {text}", flush=True)


def sizes(numbers: list[int]) -> str:
    return ",".join(map(str, numbers))


class StepFailed(Exception):
    """A step failed; the message becomes a line of the report."""


def run(
    log, *arguments: str, seconds: float | None = None, is_partial: bool = False, more: dict = {}
) -> str:
    """Runs a command to its end and returns its output. If it takes too long and
    `is_partial` is set, returns the output so far."""
    line = " ".join([*(f"{name}={value}" for name, value in more.items()), *arguments])
    print(f"$ {line}", file=log, flush=True)
    grace = GRACE if STEP_ENDS[0] == math.inf else 2.0
    limit = max(left(), LEAST) + grace if seconds is None else seconds
    try:
        done = subprocess.run(
            arguments, stdout=subprocess.PIPE, stderr=log, text=True, timeout=limit, cwd=ROOT,
            env={**os.environ, **more},
        )  # fmt: skip
    except subprocess.TimeoutExpired as expired:
        if is_partial and expired.stdout:
            return expired.stdout.decode()
        raise StepFailed(f"ended after {limit:.0f} s: {line}") from None
    print(done.stdout, file=log, flush=True)
    # Exit code 1 is a soak that found something broken; its results say what.
    if done.returncode not in (0, 1) or not done.stdout and done.returncode:
        raise StepFailed(f"exit code {done.returncode}: {line}; see log.txt for its output")
    return done.stdout


def imagegpt_json(log, *arguments: str, more: dict = {}) -> dict:
    """Runs `imagegpt bench` and returns its results."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        run(log, SET.program, "bench", *arguments, "--json", file.name, more=more)
        try:
            return json.loads(Path(file.name).read_text())
        except ValueError:
            raise StepFailed(f"bench {arguments[0]} wrote no results; see log.txt") from None


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


class Worker:
    """`imagegpt serve`, from its start to its end."""

    def __init__(self, log, model: Path, *flags: str, more: dict = {}):
        self.port, self.metrics_port = free_port(), free_port()
        self.endpoint = f"http://127.0.0.1:{self.port}"
        command = [
            SET.program, "serve", "--model", str(model), "--execution-provider", SET.provider,
            "--listen", f"127.0.0.1:{self.port}",
            "--metrics-listen", f"127.0.0.1:{self.metrics_port}", *flags, *SET.serve_flags,
        ]  # fmt: skip
        print("$ " + " ".join(command), file=log, flush=True)
        environment = {**os.environ, **more}
        self.process = subprocess.Popen(
            command, stdout=log, stderr=log, cwd=ROOT, env=environment
        )

    def __enter__(self):
        grace = GRACE if STEP_ENDS[0] == math.inf else 2.0
        until = time.monotonic() + max(left(), LEAST) + grace
        while self.process.poll() is None and time.monotonic() < until:
            try:
                self.page("readyz")
                return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        self.__exit__()
        raise StepFailed("the worker did not become ready; see log.txt for its output")

    def page(self, name: str) -> str:
        url = f"http://127.0.0.1:{self.metrics_port}/{name}"
        with urllib.request.urlopen(url, timeout=5) as response:
            return response.read().decode()

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def gpu_bytes(worker: Worker) -> int | None:
    """Memory in use on the first GPU, as nvidia-smi or else the worker reports it."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10)
        return int(answer.stdout.split()[0]) << 20
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        pass
    try:
        for line in worker.page("metrics").splitlines():
            if line.startswith("imagegpt_gpu_memory_used_bytes"):
                return int(float(line.split()[-1]))
    except (urllib.error.URLError, OSError):
        pass
    return None


class Readings:
    """Reads the memory of the GPU every second until the block ends."""

    def __init__(self, worker: Worker):
        self.worker, self.bytes, self.stop = worker, [], threading.Event()
        self.thread = threading.Thread(target=self.read)

    def read(self) -> None:
        while not self.stop.wait(1.0):
            value = gpu_bytes(self.worker)
            if value is not None:
                self.bytes.append(value)

    def __enter__(self):
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()


class Bench(checks.Checks):
    def __init__(self, work: Path, log):
        self.work, self.log = work, log
        self.set, self.root, self.failed = SET, ROOT, StepFailed
        self.facts, self.results, self.missing = self.read_facts(), [], []

    def read_facts(self) -> dict:
        def first_line(*command: str) -> str | None:
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=ROOT)
                return done.stdout.strip().splitlines()[0]
            except (OSError, IndexError, subprocess.TimeoutExpired):
                return None

        cpuinfo = Path("/proc/cpuinfo").read_text()
        cpu = [line.split(": ")[1] for line in cpuinfo.splitlines() if line.startswith("model name")]
        gpu = ("nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader")
        return {
            "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
            "gpu": first_line(*gpu) if SET.provider == "cuda" else None,
            "cpu": cpu[0] if cpu else "unknown",
            "cores": CORES,
            "load": LOAD,
            "program": first_line(SET.program, "--version"),
            "commit": first_line("git", "rev-parse", "HEAD"),
            "command": "scripts/bench-gpu.sh",
            "settings": SET.named(),
        }

    def model(self, shape: str, precision: str) -> Path:
        return self.work / f"{shape}-{precision}"

    def run(self, *arguments: str, more: dict = {}) -> str:
        return run(self.log, *arguments, more=more)

    def imagegpt_json(self, *arguments: str, more: dict = {}) -> dict:
        return imagegpt_json(self.log, *arguments, more=more)

    def started(
        self, model: Path, *flags: str, more: dict = {}, log=None, batches: str = "1,8"
    ) -> Worker:
        sizes_ = ("--batch-sizes", batches, "--max-batch-size", batches.split(",")[-1])
        cache = ("--generate-cache-bytes", SET.cache)
        return Worker(log or self.log, model, *sizes_, *cache, *flags, more=more)

    def keep(self, step: str, found) -> None:
        """Writes what a step has found so far, in case that it is cut."""
        self.partial = found
        (SET.out / f"{step}.json").write_text(json.dumps(found, indent=1) + "\n")

    # Each step takes about the given number of seconds, not counting the
    # loading of a model, and returns the data for the report.

    def compile(self, shape: str, precision: str, _seconds: float) -> dict:
        output = self.model(shape, precision)
        if not output.exists():
            run(
                self.log, SET.program, "compile", f"random:{shape}", "--output", str(output),
                "--precision", precision, "--provider", SET.provider,
            )  # fmt: skip
        return json.loads((output / "imagegpt.json").read_text())

    def engine(self, shape: str, precision: str, seconds: float) -> dict:
        arguments = ["--batch-sizes", sizes(SET.batches), "--generate-slots", str(SET.slots)]
        reference = self.model(shape, "fp32")
        if precision != "fp32" and reference.exists():
            arguments += ["--reference", str(reference)]
        n_steps = 1 if SET.provider == "cuda" else SET.slots.bit_length()
        n_sizes = 4 * len(SET.batches) + 3 * n_steps
        return self.bare(shape, precision, 0.6 * seconds / n_sizes, *arguments)

    def bare(
        self, shape: str, precision: str, each: float, *arguments: str, serve: list = []
    ) -> dict:
        """Runs `imagegpt bench engine` with `each` seconds per graph and size."""
        serve = ["--generate-cache-bytes", SET.cache, *SET.serve_flags, *serve]
        return imagegpt_json(
            self.log, "engine", "--model", str(self.model(shape, precision)),
            "--execution-provider", SET.provider, "--rounds", "5",
            "--seconds", f"{max(1, round(1000 * each))}ms", "--serve", " ".join(serve), *arguments,
        )  # fmt: skip

    def worker(self, shape: str, precision: str, *flags: str) -> Worker:
        batches = ("--batch-sizes", sizes(SET.batches), "--max-batch-size", str(SET.batches[-1]))
        return Worker(self.log, self.model(shape, precision), *batches, *flags)

    def grpc(self, shape: str, precision: str, seconds: float) -> dict:
        """Measures saturation and, with `latency`, open loops at fractions of it."""
        modes = ["load", "--of-saturation", "50,80,95"] if "latency" in SET.steps else ["saturate"]
        each = 0.8 * seconds / (4 if "latency" in SET.steps else 1)
        with self.worker(shape, precision, "--generate-slots", "0") as worker:
            return self.load(worker, each, *modes)

    def load(self, worker: Worker, each: float, *arguments: str) -> dict:
        return imagegpt_json(
            self.log, *arguments, "--endpoint", worker.endpoint, "--pid", str(worker.process.pid),
            "--warm-up", f"{max(100, round(200 * each))}ms",
            "--duration", f"{max(500, round(800 * each))}ms",
        )  # fmt: skip

    def generate(self, shape: str, precision: str, seconds: float) -> list:
        """Generates whole images through gRPC, more at the same time in each turn."""
        flags = (
            "--generate-slots", str(SET.slots), "--generate-cache-bytes", SET.cache,
            "--samples-in-flight-max", str(max(SET.slots, 128)),
        )  # fmt: skip
        rows, until = [], time.monotonic() + seconds
        with self.worker(shape, precision, *flags) as worker:
            sheet = str(self.work / "sheet.png")
            n = 1
            # The next turn takes longer than the last one.
            while n <= SET.slots and (not rows or time.monotonic() + rows[-1]["seconds"] < until):
                started = time.monotonic()
                run(
                    self.log, SET.program, "generate", "--endpoint", worker.endpoint, "--json",
                    "--samples", str(n), "--seed", "1", "--output", sheet,
                )  # fmt: skip
                took = time.monotonic() - started
                rows.append({"images": n, "seconds": took, "tokens_per_second": n * POSITIONS / took})
                n *= 4
        return rows

    def cores(self, shape: str, precision: str, seconds: float) -> list:
        """Measures encoded images at saturation, by the number of decoding threads."""
        counts = [n for n in (1, 2, 4, 8, 16) if n <= CORES]
        rows = []
        for n in counts:
            flags = ("--generate-slots", "0", "--preprocess-threads", str(n))
            with self.worker(shape, precision, *flags) as worker:
                each = 0.6 * seconds / len(counts)
                said = self.load(worker, each, "saturate", "--images", SET.images)
            phase = said["measurements"][0]
            cores = (phase["server"] or {}).get("cores")
            rows.append({"threads": n, "images_per_second": phase["images_per_second"], "cores": cores})
        return rows

    def graphs(self, shape: str, precision: str, seconds: float) -> dict:
        """Measures with CUDA graphs and without, at sizes where launches cost most."""
        if SET.provider != "cuda":
            raise StepFailed("CUDA graphs need a GPU, and PROVIDER is cpu")
        rows = {}
        for mode in ("auto", "off"):
            rows[mode] = self.bare(
                shape, precision, 0.1 * seconds, "--graphs", "features,hidden",
                "--batch-sizes", "1,2", "--generate-slots", "0", serve=["--cuda-graphs", mode],
            )  # fmt: skip
        return rows

    def soak(self, shape: str, precision: str, seconds: float) -> dict:
        with self.worker(shape, precision, "--generate-slots", "0") as worker:
            with Readings(worker) as readings:
                said = imagegpt_json(
                    self.log, "soak", "--endpoint", worker.endpoint,
                    "--pid", str(worker.process.pid), "--duration", f"{round(seconds)}s",
                )  # fmt: skip
        return {"soak": said, "gpu_bytes": readings.bytes}

    def torch(self, shape: str, precision: str, seconds: float) -> dict:
        """Measures PyTorch between two measurements of imagegpt."""
        if precision == "int8":
            raise StepFailed("the PyTorch model does not support int8")
        try:
            run(self.log, sys.executable, "-c", "import torch", seconds=120)
        except StepFailed:
            raise StepFailed("python3 has no torch") from None
        # In a short time on a device only what its goal is about: compiling takes most of it.
        asked = SET.batches
        if SET.is_timed:
            variants, graphs, few, share = "torch.compile", "features", asked[-1:], 0.03
        else:
            variants, graphs, share = "all", "features,hidden", 0.04
            few = sorted({asked[0], asked[len(asked) // 2], asked[-1]})
        few = sizes(few)
        ours = lambda: self.bare(  # noqa: E731
            shape, precision, share * seconds,
            "--graphs", graphs, "--batch-sizes", few, "--generate-slots", "0",
        )  # fmt: skip
        before = ours()
        script = str(Path(__file__).parent / "torch_imagegpt.py")
        device = "cuda" if SET.provider == "cuda" else "cpu"
        # Kernels that were compiled stay in the cache, so the second run measures only.
        more = {"TORCHINDUCTOR_FX_GRAPH_CACHE": "1", "TORCHINDUCTOR_CACHE_DIR": str(self.work / "torch")}
        if SET.is_timed:
            try:
                run(
                    self.log, sys.executable, script, shape, precision, device, few, "0.1",
                    variants, seconds=max(0.4 * seconds, 20.0), is_partial=True, more=more,
                )  # fmt: skip
            except StepFailed as failed:
                # What was compiled by then is in the cache.
                print(failed, file=self.log, flush=True)
        theirs = run(
            self.log, sys.executable, script, shape, precision, device, few,
            str((0.1 if SET.is_timed else 0.2) * seconds), variants, seconds=max(0.5 * seconds, 30.0), is_partial=True, more=more,
        )  # fmt: skip
        if not theirs.strip():
            raise StepFailed("PyTorch measured nothing in its time; see log.txt")
        found = {"ours": [before], "torch": json.loads(theirs.splitlines()[-1])}
        if SET.is_timed:
            # One comparison is better than none if the second does not fit.
            self.keep("torch", found)
        return {**found, "ours": [before, ours()]}

    def plan(self) -> list:
        """Returns the steps, the most valuable first, in case time runs out."""
        asked, plan = set(SET.steps), []
        # The first shape in the last precision answers the most images.
        first, last = SET.shapes[0], SET.precisions[-1]
        if timed := [step for step in LIMITS if step in asked and SET.is_timed]:
            needs_model = {"steps", "primers", "graphs", "copies", "generate", "two", "torch"}
            for step in timed:
                if step in needs_model and ("compile", first, last) not in plan:
                    plan.append(("compile", first, last))
                plan.append((step, first, last))
            asked -= set(timed)
        for shape in SET.shapes:
            for precision in SET.precisions:
                if ("compile", shape, precision) not in plan and asked:
                    plan.append(("compile", shape, precision))
                for step in ("engine", "grpc", "generate"):
                    if step in asked or (step == "grpc" and "latency" in asked):
                        plan.append((step, shape, precision))
            # Steps whose results depend little on the precision use the last
            # one, and steps whose results depend little on the shape use the
            # first, which answers the most images.
            for step in ("cores", "graphs", "soak", "torch"):
                is_once = step in ("cores", "soak")
                if step in asked and (not is_once or shape == SET.shapes[0]):
                    plan.append((step, shape, SET.precisions[-1]))
        return plan

    def all(self) -> None:
        plan = self.plan()
        for idx, (step, shape, precision) in enumerate(plan):
            later = [name for name, _, _ in plan[idx:]]
            reserved = SET.soak * later.count("soak")
            weights = sum(WEIGHTS.get(name, 0) for name in later)
            if step == "soak":
                seconds = min(SET.soak, left() - GRACE)
            elif SET.is_timed and step in LIMITS:
                seconds = min(LIMITS[step] * SET.budget / sum(LIMITS.values()), left())
            else:
                seconds = (left() - reserved) * WEIGHTS[step] / weights
            what = f"{step} {shape} {precision}"
            # The failed step `compile` has already been reported.
            own = {"answers", "nan", "seeds", "kernels", "fault"}
            if step not in {"compile", *own} and not self.model(shape, precision).exists():
                continue
            if seconds < LEAST:
                self.missing.append(f"{what}: no time was left (BUDGET={SET.budget:.0f})")
                say(self.missing[-1])
                continue
            say(f"{what}: {seconds:.0f} s")
            self.partial = None
            if SET.is_timed and step in LIMITS:
                STEP_ENDS[0] = time.monotonic() + seconds
            try:
                found = getattr(self, step)(shape, precision, seconds)
            # A step that meets anything unexpected must not take the others with it.
            except (StepFailed, OSError, ValueError, LookupError, subprocess.SubprocessError) as failed:
                self.missing.append(f"{what}: {type(failed).__name__}: {failed}")
                say(self.missing[-1])
                if self.partial is None:
                    continue
                found = self.partial
            finally:
                STEP_ENDS[0] = math.inf
            self.results.append(
                {"step": step, "shape": shape, "precision": precision, "found": found}
            )
            if step != "compile":
                self.keep(step if SET.is_timed else f"{step}-{shape}-{precision}", found)
            self.write()

    def write(self) -> None:
        everything = {"facts": self.facts, "results": self.results, "missing": self.missing}
        (SET.out / "results.json").write_text(json.dumps(everything, indent=1) + "\n")
        (SET.out / "bench-gpu.md").write_text(report.markdown(everything))


def main() -> None:
    if report.is_loaded(LOAD, CORES):
        say(report.loaded(LOAD, CORES))
    work = SET.work or Path(tempfile.mkdtemp(prefix="bench-gpu-"))
    try:
        with open(SET.out / "log.txt", "w") as log:
            bench = Bench(work, log)
            try:
                bench.all()
            finally:
                bench.write()
    finally:
        if not SET.work:
            shutil.rmtree(work, ignore_errors=True)
    say("wrote")
    print(SET.out / "bench-gpu.md")
    if not any(result["step"] != "compile" for result in bench.results):
        sys.exit("bench-gpu: nothing was measured; see log.txt")


if __name__ == "__main__":
    main()
