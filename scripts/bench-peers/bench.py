"""Runs the measurements of scripts/bench-peers.sh, whose comment is the manual.

A system that cannot run on this machine becomes a row that says why.
"""

import datetime
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import TextIO

import numpy as np
import report
import systems
from systems import System
from worker import NotReady, Worker

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
# Threads of a library spin for some milliseconds after a run.
PAUSE_SECONDS = 0.05
N_STARTS = 3
PICTURES = "models/pictures/food-drink"
SCORED = "models/emoji"
CPU_FEATURES = "avx2 avx_vnni avx512f avx512_vnni avx512_bf16 amx_tile amx_int8 amx_bf16".split()
BF16_FEATURES = {"avx512_bf16", "amx_bf16"}


def fail(text: str) -> None:
    print(f"bench-peers: {text}", file=sys.stderr)
    sys.exit(2)


def number(name: str, default: int) -> int:
    text = os.environ.get(name) or str(default)
    if not re.fullmatch("[1-9][0-9]{0,2}", text):
        fail(f"{name}={text} is not a number from 1 to 999")
    return int(text)


def chosen_systems() -> list[System]:
    names = (os.environ.get("SYSTEMS") or " ".join(systems.DEFAULT)).split()
    by_name = {system.name: system for system in systems.ALL}
    for name in names:
        if name not in by_name:
            fail(f"SYSTEMS has {name}; allowed are {' '.join(by_name)}")
    return [system for system in systems.ALL if system.name in names]


ROUNDS, THREADS, SYSTEMS = number("ROUNDS", 5), number("THREADS", 2), chosen_systems()
BINARY = ROOT / (os.environ.get("BINARY") or "target/release/imagegpt")
WORK = ROOT / "target" / "bench-peers"
# A copy, so that a build meanwhile changes nothing.
PROGRAM = str(WORK / "imagegpt")
PYTHON = os.environ["PEERS_VENV"] + "/bin/python"
PROVIDER_PYTHON = os.environ["PEERS_OPENVINO_VENV"] + "/bin/python"


class NotRun(Exception):
    """A system cannot run here; the message becomes its row."""


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def last_line(log: Path) -> str:
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1].strip() if lines else "no output"


def prepare() -> None:
    """Makes the graphs, unless that was done after the last change of what makes them."""
    sources = [HERE / "prepare.py", HERE / "requirements.txt", ROOT / "tests/parity/card_recipe.py"]
    stamp = WORK / ".prepared"
    if stamp.exists() and all(source.stat().st_mtime < stamp.stat().st_mtime for source in sources):
        return
    log = WORK / "prepare.log"
    say(f"making graphs, which takes minutes; see {log}")
    with log.open("w") as file:
        done = subprocess.run([PYTHON, str(HERE / "prepare.py"), str(WORK)], stdout=file, stderr=file)
    if done.returncode:
        sys.exit(f"bench-peers: graphs cannot be made: {last_line(log)}")
    stamp.touch()


def compiled(precision: str, tasks: str | None = None) -> Path:
    """Compiles the checkpoint, unless this program has already done that."""
    folder = WORK / f"ours-{precision}-{tasks or 'all'}"
    manifest = folder / "imagegpt.json"
    newest = max(Path(PROGRAM).stat().st_mtime, (WORK / "inputs.npy").stat().st_mtime)
    if manifest.exists() and manifest.stat().st_mtime > newest:
        return folder
    say(f"compiling {folder.name}")
    shutil.rmtree(folder, ignore_errors=True)
    command = [PROGRAM, "compile", str(WORK / "small"), "--output", str(folder)]
    command += ["--precision", precision, *(["--tasks", tasks] if tasks else [])]
    log = folder.with_suffix(".log")
    with log.open("w") as file:
        done = subprocess.run(command, stdout=file, stderr=file)
    if done.returncode:
        raise NotRun(f"the program refuses: {last_line(log)}")
    return folder


class Peer:
    """A system in a process of its own, which computes one image per command."""

    def __init__(self, system: System, cpu_features: set[str], stack: ExitStack):
        if system.precision == "bf16" and not system.is_ours and not cpu_features & BF16_FEATURES:
            raise NotRun("not on this CPU: it has neither AVX512_BF16 nor AMX")
        python = PROVIDER_PYTHON if system.engine == "provider" else PYTHON
        command = [python, str(HERE / "peer.py"), system.name, "--work", str(WORK)]
        command += ["--threads", str(THREADS)]
        if system.is_ours:
            model = compiled(system.precision, "embed")
            command += ["--program", PROGRAM, "--model", str(model)]
        self.log = WORK / f"{system.name}.log"
        log: TextIO = stack.enter_context(self.log.open("w"))
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
        assert self.process.stdin and self.process.stdout
        self.commands, self.answers = self.process.stdin, self.process.stdout
        stack.callback(self.end)
        ready = self.answer()
        if "not_run" in ready:
            raise NotRun(ready["not_run"])
        self.system = system
        self.version: str = ready["version"]
        self.seconds: list[float] = []
        self.cpu_seconds: list[float] = []
        self.cosines: list[float] = []

    def answer(self) -> dict:
        line = self.answers.readline()
        if not line:
            raise NotRun(f"ended: {last_line(self.log)}")
        return json.loads(line)

    def compute(self, idx: int) -> dict:
        print(idx, file=self.commands, flush=True)
        return self.answer()

    def compare(self, n_inputs: int) -> None:
        """Notes how near the answers are to those of float64."""
        reference = np.load(WORK / self.system.reference)
        for idx in range(n_inputs):
            ours, exact = np.array(self.compute(idx)["features"]), reference[idx]
            norms = np.linalg.norm(ours) * np.linalg.norm(exact)
            self.cosines.append(float(ours @ exact / norms))

    def measure(self, idx: int, n_inputs: int) -> None:
        """Times an image after another one, so that caches are as in a row of images."""
        self.compute(idx % n_inputs)
        answer = self.compute((idx + 1) % n_inputs)
        self.seconds.append(answer["seconds"])
        self.cpu_seconds.append(answer["cpu_seconds"])
        time.sleep(PAUSE_SECONDS)

    def end(self) -> None:
        """Closes the input, at which the process ends."""
        self.commands.close()
        self.process.wait()


def cpu() -> tuple[str, set[str]]:
    """Returns the name of the CPU, and which of CPU_FEATURES it has."""
    text = Path("/proc/cpuinfo").read_text()
    fields = dict(re.findall(r"^(model name|flags|model|cpu family)\s*: (.*)$", text, re.MULTILINE))
    name = f"{fields['model name']} (family {fields['cpu family']}, model {fields['model']})"
    return name, set(fields["flags"].split()) & set(CPU_FEATURES)


class Peaks:
    """Operations per second of bare loops, measured in every round."""

    def __init__(self) -> None:
        self.program = str(WORK / "peaks")
        self.found: dict[str, list[float]] = {}
        command = ["gcc", "-O2", "-pthread", "-o", self.program, str(HERE / "peaks.c")]
        try:
            subprocess.run(command, check=True)
            self.is_there = True
        except (OSError, subprocess.CalledProcessError) as error:
            say(f"peaks are left out: {error}")
            self.is_there = False

    def measure(self) -> None:
        if self.is_there:
            command = [self.program, str(THREADS)]
            output = subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout
            for name, rate in json.loads(output).items():
                self.found.setdefault(name, []).append(rate)

    def medians(self) -> dict[str, float]:
        return {name: statistics.median(rates) for name, rates in self.found.items()}


def measure_systems(cpu_features: set[str], peaks: Peaks) -> list[dict]:
    n_inputs = len(np.load(WORK / "inputs.npy"))
    peers: list[Peer] = []
    not_run: dict[str, str] = {}
    with ExitStack() as stack:
        for system in SYSTEMS:
            say(f"starting {system.name}")
            try:
                peer = Peer(system, cpu_features, stack)
                peer.compare(n_inputs)
                peers.append(peer)
            except NotRun as error:
                not_run[system.name] = str(error)
                say(f"  not run: {error}")
        for idx in range(ROUNDS):
            say(f"round {idx + 1} of {ROUNDS}")
            peaks.measure()
            # No system runs after the same one in every round.
            start = idx % max(len(peers), 1)
            for peer in peers[start:] + peers[:start]:
                try:
                    peer.measure(idx, n_inputs)
                except (NotRun, BrokenPipeError) as error:
                    peers.remove(peer)
                    not_run[peer.system.name] = str(error)
                    say(f"  {peer.system.name} ended: {error}")
    ran = {peer.system.name: peer for peer in peers}
    rows = []
    for system in SYSTEMS:
        row: dict = {"name": system.name, "label": system.label, "precision": system.precision}
        row |= {"n_layers": system.n_layers, "is_ours": system.is_ours}
        if system.name in not_run:
            row["not_run"] = not_run[system.name]
        else:
            peer = ran[system.name]
            row |= {"version": peer.version, "cosine": min(peer.cosines)}
            row |= {"seconds": peer.seconds, "cpu_seconds": peer.cpu_seconds}
        rows.append(row)
    return rows


def measure_start() -> dict:
    """Measures how soon a worker with all tasks in int8 is ready, and its memory."""
    found: dict = {"ready_seconds": [], "resident_bytes": []}
    try:
        model = compiled("int8")
        with (WORK / "start.log").open("w") as log:
            for _ in range(N_STARTS):
                flags = ["--intra-op-threads", str(THREADS)]
                with Worker(PROGRAM, model, *flags, log=log) as worker:
                    found["ready_seconds"].append(worker.ready_seconds)
                    found["resident_bytes"].append(worker.resident_bytes())
    except (NotRun, NotReady) as error:
        return {"not_run": str(error)}
    return found


def measure_score() -> dict:
    """Measures a command that serves the model itself, after its model was compiled."""
    command = [PROGRAM, "score", PICTURES, "--model", SCORED]
    environment = os.environ | {"IMAGEGPT_CACHE_DIR": str(WORK / "cache")}
    seconds = []
    for _ in range(1 + N_STARTS):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        seconds.append(time.perf_counter() - start)
        if done.returncode:
            return {"not_run": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return {"seconds": seconds[1:]}


def output_of(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.stdout.strip() or "unknown"


def main() -> None:
    if not os.access(BINARY, os.X_OK):
        fail(f"BINARY={BINARY} is no program; `make build` makes target/release/imagegpt")
    WORK.mkdir(parents=True, exist_ok=True)
    shutil.copy2(BINARY, PROGRAM)
    prepare()
    settings: dict = {"ROUNDS": ROUNDS, "THREADS": THREADS}
    if os.environ.get("SYSTEMS"):
        settings["SYSTEMS"] = os.environ["SYSTEMS"]
    name, cpu_features = cpu()
    peaks = Peaks()
    load_before = os.getloadavg()[0]
    rows = measure_systems(cpu_features, peaks)
    results = {
        "date": datetime.date.today().isoformat(),
        "settings": settings,
        "program": output_of(PROGRAM, "--version"),
        "commit": output_of("git", "describe", "--always", "--dirty"),
        "cpu": name,
        "cores": len(os.sched_getaffinity(0)),
        "cpu_features": [feature for feature in CPU_FEATURES if feature in cpu_features],
        "load": [load_before, os.getloadavg()[0]],
        "peaks": peaks.medians(),
        "systems": rows,
        "start": measure_start(),
        "score": measure_score(),
    }
    (WORK / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    text = report.markdown(results)
    (WORK / "bench-peers.md").write_text(text)
    print(text, end="")


if __name__ == "__main__":
    main()
