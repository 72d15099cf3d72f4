"""Measures generation beside transformers with its cache, interleaved.

    bench_generate.py WORKER WORK_FOLDER

WORK_FOLDER holds imagegpt-small's architecture with random weights: `small` as
transformers saves it, `fp32` and `int8` compiled. For 1, 4, 8 and 16 sequences
at the beginning, in the middle and at the end of an image it prints the tokens a
second of

- the worker, through gRPC: as many calls as sequences, samples of one primer,
  over two rows of 32 tokens: 32 to 95, 512 to 575 and 960 to 1023. The primer ends
  a row before, so that the last 64 tokens of each past are its own and those before
  are read once for several of them;
- transformers' forward with a cache of as many tokens as there are before the
  middle of those two rows, two threads;
- the decode graph alone at the same past, in the loop of `imagegpt bench engine`
  (Python does not have the worker's own operators); and last once more, "apart":
  over pasts of which nothing is shared;

medians of ROUNDS rounds (5), in each of which all are measured one after the
other, and the fraction of the roofline: the bytes that a step must read, weights and
past, what is shared once, divided by the measured bandwidth, over the step's time.
"""

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

import grpc
import numpy as np
import torch
from transformers import DynamicCache, ImageGPTForCausalImageModeling

sys.path.insert(0, str(Path(__file__).parent))
from parity import ROOT, load_stubs  # noqa: E402

ROUNDS = int(os.environ.get("ROUNDS", "5"))
THREADS = int(os.environ.get("THREADS", "2"))
SEQUENCES = [int(n) for n in os.environ.get("SEQUENCES", "1 4 8 16").split()]
PRECISIONS = os.environ.get("PRECISIONS", "fp32 int8").split()
LAYERS, HEADS, HEAD_DIM, SIDE, COLORS = 24, 8, 64, 32, 512
POSITIONS = SIDE * SIDE
# The row whose end begins the measurement, of two rows, by the tokens before their
# middle.
ROWS = {64: 0, 544: 15, 992: 29}
# Tokens of a past that are its own in the middle of those two rows: all after the
# primer.
OWN = 2 * SIDE
PORT, METRICS_PORT = 50154, 9194


class Transformers:
    def __init__(self, folder: Path):
        torch.set_num_threads(THREADS)
        self.model = ImageGPTForCausalImageModeling.from_pretrained(folder, dtype=torch.float32).eval()

    def rate(self, n: int, past: int) -> float:
        shape = (n, HEADS, past, HEAD_DIM)
        cache = DynamicCache()
        for layer in range(LAYERS):
            cache.update(torch.randn(shape), torch.randn(shape), layer)
        ids = torch.randint(0, COLORS, (n, 1))
        times = []
        with torch.no_grad():
            for step in range(3):
                position = torch.tensor([[min(past + step, POSITIONS - 1)]])
                started = time.perf_counter()
                if past + step < POSITIONS:
                    self.model(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True)
                    times.append(time.perf_counter() - started)
        return n / min(times)


def bare_loop(program: str, folder: Path, n: int, own: list[str]) -> dict[int, float]:
    """Tokens a second of n sequences by past, by the worker's program without a server."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "engine.json"
        subprocess.run(
            [program, "bench", "engine", "--model", str(folder), "--execution-provider", "cpu"]
            + ["--graphs", "generate", "--generate-slots", str(n), "--rounds", "1", "--json", str(path)]
            + ["--generate-pasts", ",".join(map(str, ROWS)), *own]
            + ["--serve", f"--generate-cache-bytes 4GiB --intra-op-threads {THREADS}"],
            check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )
        rows = json.loads(path.read_text())["findings"]["generate"]
    return {row["past"]: row["tokens_per_second"] for row in rows if row["slots"] == n}


class Worker:
    def __init__(self, program: str, folder: Path, n: int, pb, services):
        self.n, self.pb = n, pb
        log = open(folder / "worker.log", "w")
        self.process = subprocess.Popen(
            [program, "serve", "--model", str(folder), "--execution-provider", "cpu", "--batch-sizes", "1"]
            + ["--max-batch-size", "1", "--listen", f"127.0.0.1:{PORT}"]
            + ["--metrics-listen", f"127.0.0.1:{METRICS_PORT}", "--generate-slots", str(n)]
            + ["--generate-cache-bytes", "4GiB", "--intra-op-threads", str(THREADS)],
            stderr=log,
        )
        script = ROOT / "scripts" / "await-ready.sh"
        subprocess.run([script, str(self.process.pid), str(METRICS_PORT), log.name], check=True)
        self.stub = services.ImageGptServiceStub(grpc.insecure_channel(f"127.0.0.1:{PORT}"))

    def rate(self, past: int) -> float:
        """One primer for all, so that it is computed once and all go in step."""
        first = ROWS[past]
        ids = np.random.default_rng(0).integers(0, COLORS, first * SIDE).tolist()
        seen, lock = [[], []], threading.Lock()

        def call(sequence: int) -> None:
            request = self.pb.GenerateRequest(prefix=self.pb.Tokens(ids=ids), seed=sequence)
            stream = self.stub.Generate(request)
            for response in stream:
                if response.WhichOneof("message") != "row":
                    continue
                for which, row in enumerate((first, first + 2)):
                    if response.row.row == row:
                        with lock:
                            seen[which].append(time.perf_counter())
                if response.row.row >= first + 2:
                    # The others must find it in their step until they are there.
                    both.wait()
                    stream.cancel()
                    return

        both = threading.Barrier(self.n)
        threads = [threading.Thread(target=call, args=(sequence,)) for sequence in range(self.n)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        spans = [end - begin for begin, end in zip(sorted(seen[0]), sorted(seen[1]))]
        return self.n * 2 * SIDE / median(spans)

    def end(self) -> None:
        self.process.terminate()
        self.process.wait()


def bandwidth() -> float:
    """Bytes a second that the threads read from memory."""
    data = torch.ones(1 << 28)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - started)
    return data.nbytes / best


def main() -> None:
    program, work = sys.argv[1], Path(sys.argv[2]).absolute()
    with tempfile.TemporaryDirectory() as scratch:
        pb, services = load_stubs(Path(scratch))
    reference = Transformers(work / "small")
    read = bandwidth()
    cpu = next(line.split(":")[1].strip() for line in open("/proc/cpuinfo") if line.startswith("model name"))
    print(f"{cpu}, {THREADS} threads, {ROUNDS} rounds; memory read {read / 1e9:.1f} GB/s")
    print(f"{'':>5} {'seqs':>4} {'past':>5} {'transformers':>12} {'graph':>7} {'gRPC':>7}   "
          f"{'gRPC/tr.':>8} {'gRPC/graph':>10} {'of roofline':>11}   {'apart':>7} {'apart/tr.':>9}   "
          "tokens a second", flush=True)
    for precision in PRECISIONS:
        # Steps in fp32 keep 24 bits, and a factor for each position and head; those
        # in int8 keep the past in bfloat16.
        weights = 76_682_240 * (3 if precision == "fp32" else 1)
        cached = 3 + 4 / HEAD_DIM if precision == "fp32" else 2
        for n in SEQUENCES:
            worker = Worker(program, work / precision, n, pb, services)
            alike = ["--generate-own", str(OWN)]
            rates = {past: ([], [], [], []) for past in ROWS}
            for _ in range(ROUNDS):
                # A loop goes over all pasts, since to load the model takes longest.
                bare = bare_loop(program, work / precision, n, alike)
                apart = bare_loop(program, work / precision, n, [])
                for past, (theirs, alone, ours, unshared) in rates.items():
                    theirs.append(reference.rate(n, past))
                    alone.append(bare[past])
                    ours.append(worker.rate(past))
                    unshared.append(apart[past])
            for past in ROWS:
                theirs, bare, ours, apart = (median(values) for values in rates[past])
                positions = past - OWN + n * OWN
                bytes_read = weights + positions * LAYERS * 2 * HEADS * HEAD_DIM * cached
                roofline = bytes_read / read / (n / ours)
                print(f"{precision:>5} {n:>4} {past:>5} {theirs:>12.1f} {bare:>7.1f} {ours:>7.1f}   "
                      f"{ours / theirs:>7.2f}x {ours / bare:>9.0%} {roofline:>11.0%}   {apart:>7.1f} {apart / theirs:>8.2f}x",
                      flush=True)
            worker.end()


if __name__ == "__main__":
    main()
