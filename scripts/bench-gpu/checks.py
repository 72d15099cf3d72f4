"""The steps of scripts/bench-gpu.sh that check a GPU rather than measure speed alone:
answers against the CPU, key/value caches of NaN, seeds, steps, primers, kinds of copies, two
workers on one GPU, kernels by time, and a GPU that fails.
"""

import json
import math
import shutil
import struct
import subprocess
import threading
import time
from pathlib import Path

import faulty
import kernels

# Largest error of served answers against the CPU in fp32, ‖answer − fp32‖ / ‖fp32‖.
ERROR_MAX = {"fp32": 1e-4, "fp16": 2e-3, "bf16": 2e-2, "int8": 1e-1}
# Kernels of attention: flags of the worker, and variables of ONNX Runtime. Its kernel XQA
# comes before any of the others for heads of 64, 128 and 256.
BACKENDS = {
    "auto": ([], {}),
    "no XQA": ([], {"ORT_ENABLE_XQA": "0"}),
    "flash": (["--generate-attention", "flash"], {"ORT_ENABLE_XQA": "0"}),
    "cudnn": (["--generate-attention", "cudnn"], {"ORT_ENABLE_XQA": "0"}),
    "efficient": (["--generate-attention", "efficient"], {"ORT_ENABLE_XQA": "0"}),
}
# Heads that have XQA; for others `no XQA` is `auto`.
XQA_HEADS = (64, 128, 256)
# Elements per head of the shapes with random weights.
HEAD_OF = {"tiny": 16, "small": 64, "medium": 128, "large": 96}
# Elements per head of the models of `seeds`, of which each has four.
HEADS = (32, 64, 96)
ROUNDS = 3
SIDE = 32
# Who copies between host and device (--gpu-copies), and how often each is measured.
COPIES = ("onnxruntime", "driver")
TURNS = 2


def vectors(folder: Path) -> list[float]:
    """Reads the vectors of a table that `imagegpt embed --format npy` wrote."""
    numbers: list[float] = []
    for path in sorted((folder / "img_emb").glob("*.npy")):
        content = path.read_bytes()
        length = struct.unpack("<H", content[8:10])[0]
        header = content[10 : 10 + length].decode()
        kinds = {"'<f4'": "f", "'<f2'": "e"}
        kind = next(code for name, code in kinds.items() if name in header)
        body = content[10 + length :]
        numbers += struct.unpack(f"<{len(body) // struct.calcsize(kind)}{kind}", body)
    return numbers


def distance(got: list[float], expected: list[float]) -> float:
    """Returns ‖got − expected‖ / ‖expected‖; infinity if the answers do not match in number."""
    if len(got) != len(expected) or not expected:
        return math.inf
    difference = math.fsum((a - b) ** 2 for a, b in zip(got, expected))
    error = math.sqrt(difference / math.fsum(b * b for b in expected))
    return math.inf if math.isnan(error) else error


class Checks:
    """Steps that need `Bench`'s program, folders and clock."""

    def backends(self, head: int) -> dict:
        """Returns the kernels of attention to try for heads of `head` elements."""
        if self.set.provider != "cuda":
            return {"auto": BACKENDS["auto"]}
        return {
            name: how for name, how in BACKENDS.items() if name != "no XQA" or head in XQA_HEADS
        }

    def compiled(
        self, source: str, name: str, precision: str, provider: str, *flags: str
    ) -> Path:
        output = self.work / name
        if not output.exists():
            self.run(
                self.set.program, "compile", source, "--output", str(output),
                "--precision", precision, "--provider", provider, *flags,
            )  # fmt: skip
        return output

    def served(self, model: Path, provider: str, folder: Path, name: str) -> dict:
        """Returns the scores and the features of pictures, as a worker serves them."""
        serve = f"--execution-provider {provider} --batch-sizes 1,8 --max-batch-size 8"
        return self.asked(["--model", str(model), "--serve", serve], folder, name)

    def asked(self, flags: list[str], folder: Path, name: str) -> dict:
        """Returns the scores and the features of pictures by a worker that `flags` name."""
        pictures = [str(path) for path in sorted(folder.rglob("*.png"))]
        lines = self.run(self.set.program, "score", *flags, "--json", *pictures)
        scores = [json.loads(line)["nats"] for line in lines.splitlines() if line.strip()]
        table = self.work / f"{name}-table"
        shutil.rmtree(table, ignore_errors=True)
        self.run(
            self.set.program, "embed", *flags, "--format", "npy", "--output", str(table),
            str(folder),
        )  # fmt: skip
        return {"score": scores, "features": vectors(table)}

    def few_images(self) -> Path:
        """Returns the first directory of images without others in it."""
        folder = Path(self.set.images)
        inside = sorted(path for path in folder.rglob("*") if path.is_dir())
        return next((path for path in inside if not any(map(Path.is_dir, path.iterdir()))), folder)

    def answers(self, _shape: str, _precision: str, _seconds: float) -> list:
        """Compares served answers with those of the CPU in fp32, in every precision."""
        folder = self.few_images()
        rows = []
        # Random weights of a published shape have heads of 64, and the emoji model of 32, which
        # other kernels of attention compute.
        sources = {self.set.shapes[0]: f"random:{self.set.shapes[0]}"}
        if self.set.provider == "cuda":
            sources["emoji"] = str(self.root / "models/emoji")
        for source, where in sources.items():
            name = f"answers-{source}"
            reference = self.compiled(where, f"{name}-cpu", "fp32", "cpu")
            expected = self.served(reference, "cpu", folder, f"{name}-cpu")
            for precision in self.set.precisions:
                own = reference
                if (precision, self.set.provider) != ("fp32", "cpu"):
                    own = self.compiled(
                        where, f"{name}-{precision}", precision, self.set.provider
                    )
                got = self.served(own, self.set.provider, folder, f"{name}-{precision}")
                for graph, values in got.items():
                    error = distance(values, expected[graph])
                    rows.append(
                        {
                            "model": source,
                            "precision": precision,
                            "graph": graph,
                            "numbers": len(values),
                            "error": error if math.isfinite(error) else None,
                            "fits": error <= ERROR_MAX[precision],
                        }
                    )
                self.keep("answers", rows)
        return rows

    def headed(self, head: int, precision: str) -> Path:
        """Compiles a model of random weights with four heads of `head` elements."""
        source = self.work / f"heads-{head}"
        if not source.exists():
            # Its palette and recipe are those of every random model.
            tiny = self.compiled("random:tiny", "random-tiny", "fp32", "cpu")
            source.mkdir()
            config = json.loads((tiny / "config.json").read_text())
            # A try on a CPU needs no depth in which differences could grow.
            layers = 6 if self.set.provider == "cuda" else 2
            config |= {"n_embd": 4 * head, "n_head": 4, "n_layer": layers}
            (source / "config.json").write_text(json.dumps(config))
            shutil.copy(tiny / "preprocessor_config.json", source)
            recipe = {"generator": 1, "seed": 0, "standard_deviation": 0.02}
            (source / "random_weights.json").write_text(json.dumps(recipe))
        # Its steps alone, so that loading takes less of the time; on a CPU ONNX Runtime's
        # attention, whose cache is of floats as on a GPU.
        flags = ["--tasks", "generate", *(["--portable"] if self.set.provider == "cpu" else [])]
        name = f"heads-{head}-{precision}"
        return self.compiled(str(source), name, precision, self.set.provider, *flags)

    def bare_steps(self, model: Path, slots: int, flags: list, more: dict, *arguments: str) -> dict:
        serve = ["--generate-cache-bytes", self.set.cache, *flags]
        return self.imagegpt_json(
            "engine", "--model", str(model), "--execution-provider", self.set.provider,
            "--rounds", "2", "--graphs", "generate", "--generate-slots", str(slots),
            "--serve", " ".join(serve), *arguments, more=more,
        )  # fmt: skip

    def nan(self, _shape: str, precision: str, _seconds: float) -> list:
        """Makes steps beside a key/value cache of NaN, which must not show."""
        rows = []
        for head in HEADS:
            model = self.headed(head, precision)
            for backend, (flags, more) in self.backends(head).items():
                said = self.bare_steps(
                    model, 8, flags, more, "--nan-cache", "--generate-pasts", "1",
                    "--seconds", "10ms",
                )  # fmt: skip
                row = {"head": head, "attention": backend, **said["findings"]["nan_cache"]}
                rows.append(row)
                self.keep("nan", rows)
        return rows

    def seeds(self, _shape: str, precision: str, _seconds: float) -> list:
        """Draws images with one seed several times, by elements per head and attention.

        The lower half of a picture is drawn: its steps have the longest pasts, which kernels
        divide among blocks, and take half of the time.
        """
        rows = []
        picture = str(sorted(self.few_images().glob("*.png"))[0])
        n_images = 8 if self.set.provider == "cuda" else 2
        for head in HEADS:
            model = self.headed(head, precision)
            for backend, (flags, more) in self.backends(head).items():
                slots = ["--generate-slots", str(n_images), *flags]
                with self.started(model, *slots, more=more) as worker:
                    drawn = []
                    for turn in range(ROUNDS):
                        folder = self.work / f"seeds-{head}-{turn}"
                        shutil.rmtree(folder, ignore_errors=True)
                        self.run(
                            self.set.program, "generate", "--endpoint", worker.endpoint,
                            "--input", picture, "--rows", "16",
                            "--samples", str(n_images), "--seed", "1",
                            "--output", str(self.work / "seeds.png"),
                            "--save-samples", str(folder),
                        )  # fmt: skip
                        files = sorted(folder.rglob("*.png"))
                        drawn.append([path.read_bytes() for path in files])
                same = sum(len(set(images)) == 1 for images in zip(*drawn))
                rows.append({"head": head, "attention": backend, "images": n_images, "same": same})
                self.keep("seeds", rows)
        return rows

    def steps(self, shape: str, precision: str, _seconds: float) -> list:
        """Measures steps by number of slots, past and attention."""
        rows = []
        model = self.model(shape, precision)
        for slots in [n for n in (8, 64, 256) if n <= self.set.slots]:
            for backend, (flags, more) in self.backends(HEAD_OF[shape]).items():
                said = self.bare_steps(
                    model, slots, flags, more, "--generate-pasts", "1,512,1023",
                    "--seconds", "300ms",
                )  # fmt: skip
                for row in said["findings"]["generate"]:
                    if row["slots"] == slots:
                        rows.append({"attention": backend, **row})
                self.keep("steps", rows)
        return rows

    def primers(self, shape: str, precision: str, _seconds: float) -> list:
        """Completes images after primers of new lengths, each for the first and second time."""
        picture = str(sorted(Path(self.set.images).rglob("*.png"))[0])
        rows = []
        with self.started(self.model(shape, precision), "--generate-slots", "8") as worker:
            for kept in (31, 30, 29, 27, 23, 15):
                times = []
                for _ in range(2):
                    started = time.monotonic()
                    self.run(
                        self.set.program, "generate", "--endpoint", worker.endpoint,
                        "--input", picture, "--rows", str(kept), "--samples", "1", "--seed", "1",
                        "--output", str(self.work / "primer.png"),
                    )  # fmt: skip
                    times.append(time.monotonic() - started)
                rows.append({"tokens": kept * SIDE, "first": times[0], "second": times[1]})
                self.keep("primers", rows)
        return rows

    def copies(self, shape: str, precision: str, seconds: float) -> list:
        """Measures the kinds of copies in turns, and compares the bits of their answers."""
        largest = str(self.set.batches[-1])
        # On a CPU all of them would take the time of the step.
        folder = Path(self.set.images) if self.set.provider == "cuda" else self.few_images()
        # Loading takes most of the time of each turn.
        each = 0.025 * seconds
        rows: list = []
        expected = None
        for _ in range(TURNS):
            for copies in COPIES:
                flag = ["--gpu-copies", copies]
                bare = self.bare(
                    shape, precision, each, "--graphs", "features", "--batch-sizes", largest,
                    "--generate-slots", "0", serve=flag,
                )  # fmt: skip
                row = {"copies": copies, "batch_size": int(largest)}
                row["features_per_second"] = bare["findings"]["graphs"][0]["images_per_second"]
                model = self.model(shape, precision)
                # One size of batches, so that the same kernels answer in every turn.
                with self.started(
                    model, "--generate-slots", "0", *flag, batches=largest
                ) as worker:
                    said = self.load(worker, each, "saturate")
                    answers = self.asked(["--endpoint", worker.endpoint], folder, "copies")
                row["grpc_per_second"] = said["findings"]["saturation_images_per_second"]
                expected = expected or answers
                row["same_bits"] = answers == expected
                rows.append(row)
                self.keep("copies", rows)
        return rows

    def kernels(self, shape: str, precision: str, _seconds: float) -> dict:
        """Counts the time of each kernel while a command computes features of a full batch."""
        if self.set.provider != "cuda":
            raise self.failed("kernels by time need a GPU, and PROVIDER is cpu")
        tools = kernels.tools()
        if not tools:
            raise self.failed("neither nsys nor ncu is installed, so kernels have no times")
        # Without graphs of other answers, whose warm-up would be counted too.
        model = self.compiled(
            f"random:{shape}", f"kernels-{shape}", precision, "cuda", "--tasks", "embed"
        )
        largest = self.set.batches[-1]
        # Kernels that are launched one by one have names; those of a captured graph may not.
        serve = f"--execution-provider cuda --batch-sizes {largest} --max-batch-size {largest}"
        serve += " --generate-slots 0 --cuda-graphs off"
        table = self.work / "kernels-table"

        def run(*part: str) -> str:
            shutil.rmtree(table, ignore_errors=True)
            return self.run(*part)

        command = [
            self.set.program, "embed", "--model", str(model), "--serve", serve, "--format", "npy",
            "--output", str(table), self.set.images,
        ]  # fmt: skip
        try:
            found = kernels.measure(tools, run, self.failed, self.work / "kernels-report", command)
        except ValueError as none:
            raise self.failed(str(none)) from None
        return found | {"batch_size": largest}

    def two(self, shape: str, precision: str, seconds: float) -> dict:
        """Measures one worker at saturation, and then two on the same device."""
        flags = ("--generate-slots", "0")
        each = min(6.0, 0.12 * seconds)
        found: dict = {}
        with self.worker(shape, precision, *flags) as one:
            found["one"] = self.load(one, each, "saturate")["findings"]
            with self.worker(shape, precision, *flags) as other:
                rates: dict = {}

                def drive(name: str, worker) -> None:
                    try:
                        rates[name] = self.load(worker, each, "saturate")["findings"]
                    except self.failed as failed:
                        print(failed, file=self.log, flush=True)

                threads = [
                    threading.Thread(target=drive, args=(name, worker))
                    for name, worker in (("first", one), ("second", other))
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
        if len(rates) < 2:
            raise self.failed("one of two workers was not measured; see log.txt")
        return found | rates

    def fault(self, _shape: str, _precision: str, _seconds: float) -> dict:
        """Reads an illegal address on the GPU: how a worker says so, and how it ends."""
        model = self.work / "fault"
        if not model.exists():
            tiny = self.compiled("random:tiny", "random-tiny", "fp32", "cpu")
            model.mkdir()
            for name in ("config.json", "preprocessor_config.json"):
                shutil.copy(tiny / name, model)
            (model / "model.onnx").write_bytes(faulty.graph())
        # One color everywhere, and not the first of the palette: see faulty.py.
        pictures = self.work / "fault-pictures"
        pictures.mkdir(exist_ok=True)
        faulty.png(pictures / "white.png")
        table = self.work / "fault-table"
        shutil.rmtree(table, ignore_errors=True)
        log_path = self.set.out / "fault.log"
        with open(log_path, "w") as log:
            worker = self.started(model, "--generate-slots", "0", log=log)
            with worker:
                # The client waits for the worker to come back, so it is ended.
                asked = subprocess.Popen(
                    [
                        self.set.program, "embed", "--endpoint", worker.endpoint, "--format",
                        "npy", "--output", str(table), str(pictures),
                    ],
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=self.root,
                )  # fmt: skip
                try:
                    code = worker.process.wait(10)
                except subprocess.TimeoutExpired:
                    code = None
                asked.terminate()
                said, _ = asked.communicate(timeout=10)
        words = [
            line
            for line in log_path.read_text().splitlines()
            if any(word in line.lower() for word in ("error", "fail", "out of service"))
        ]
        return {
            "worker_exit_code": code,
            "client_exit_code": asked.returncode,
            "client": said.splitlines()[-3:],
            "worker": words[-12:],
        }
