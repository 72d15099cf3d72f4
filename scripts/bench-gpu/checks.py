"""The steps of scripts/bench-gpu.sh that check a GPU rather than measure speed alone:
answers against the CPU, key/value caches of NaN, seeds, steps, primers, two workers on one
GPU, and a GPU that fails.
"""

import json
import math
import shutil
import struct
import subprocess
import threading
import time
import zlib
from array import array
from pathlib import Path

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
# Elements per head of the models of `seeds`, of which each has four.
HEADS = (32, 64, 96)
ROUNDS = 3
SIDE = 32


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

    def backends(self) -> dict:
        return BACKENDS if self.set.provider == "cuda" else {"auto": BACKENDS["auto"]}

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

    def served(self, model: Path, provider: str, pictures: list[str], name: str) -> dict:
        """Returns the scores and the features of pictures, as a worker serves them."""
        serve = f"--execution-provider {provider} --batch-sizes 1,8 --max-batch-size 8"
        flags = ["--model", str(model), "--serve", serve]
        lines = self.run(self.set.program, "score", *flags, "--json", *pictures)
        scores = [json.loads(line)["nats"] for line in lines.splitlines() if line.strip()]
        table = self.work / f"{name}-table"
        shutil.rmtree(table, ignore_errors=True)
        folder = str(Path(pictures[0]).parent)
        self.run(
            self.set.program, "embed", *flags, "--format", "npy", "--output", str(table), folder
        )
        return {"score": scores, "features": vectors(table)}

    def answers(self, _shape: str, _precision: str, _seconds: float) -> list:
        """Compares served answers with those of the CPU in fp32, in every precision."""
        folder = self.set.images if self.set.provider == "cuda" else f"{self.set.images}/flags"
        subfolders = sorted(path for path in Path(folder).rglob("*") if path.is_dir())
        folder = subfolders[0] if subfolders else Path(folder)
        pictures = [str(path) for path in sorted(folder.glob("*.png"))]
        rows = []
        # Random weights of a published shape have heads of 64, and the emoji model of 32, which
        # other kernels of attention compute.
        sources = {self.set.shapes[0]: f"random:{self.set.shapes[0]}"}
        if self.set.provider == "cuda":
            sources["emoji"] = str(self.root / "models/emoji")
        for source, where in sources.items():
            name = f"answers-{source}"
            reference = self.compiled(where, f"{name}-cpu", "fp32", "cpu")
            expected = self.served(reference, "cpu", pictures, f"{name}-cpu")
            for precision in self.set.precisions:
                own = reference
                if (precision, self.set.provider) != ("fp32", "cpu"):
                    own = self.compiled(
                        where, f"{name}-{precision}", precision, self.set.provider
                    )
                got = self.served(own, self.set.provider, pictures, f"{name}-{precision}")
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
            config |= {"n_embd": 4 * head, "n_head": 4, "n_layer": 6}
            (source / "config.json").write_text(json.dumps(config))
            shutil.copy(tiny / "preprocessor_config.json", source)
            recipe = {"generator": 1, "seed": 0, "standard_deviation": 0.02}
            (source / "random_weights.json").write_text(json.dumps(recipe))
        # On a CPU ONNX Runtime's attention, whose cache is of floats as on a GPU.
        flags = ["--portable"] if self.set.provider == "cpu" else []
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
            for backend, (flags, more) in self.backends().items():
                said = self.bare_steps(
                    model, 8, flags, more, "--nan-cache", "--generate-pasts", "1",
                    "--seconds", "10ms",
                )  # fmt: skip
                row = {"head": head, "attention": backend, **said["findings"]["nan_cache"]}
                rows.append(row)
                self.keep("nan", rows)
        return rows

    def seeds(self, _shape: str, precision: str, _seconds: float) -> list:
        """Draws images with one seed several times, by elements per head and attention."""
        rows = []
        n_images = 8 if self.set.provider == "cuda" else 2
        for backend, (flags, more) in self.backends().items():
            for head in HEADS:
                model = self.headed(head, precision)
                slots = ["--generate-slots", str(n_images), *flags]
                with self.started(model, *slots, more=more) as worker:
                    drawn = []
                    for turn in range(ROUNDS):
                        folder = self.work / f"seeds-{head}-{turn}"
                        shutil.rmtree(folder, ignore_errors=True)
                        self.run(
                            self.set.program, "generate", "--endpoint", worker.endpoint,
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
            for backend, (flags, more) in self.backends().items():
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
            (model / "model.onnx").write_bytes(faulty_graph())
        # One color everywhere, and not the first of the palette: see `faulty_graph`.
        pictures = self.work / "fault-pictures"
        pictures.mkdir(exist_ok=True)
        png(pictures / "white.png")
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


def png(path: Path) -> None:
    """Writes a white picture."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    rows = (b"\0" + b"\xff" * (3 * SIDE)) * SIDE
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )


# A graph in the wire format of protocol buffers, field by field.


def varint(number: int) -> bytes:
    out = b""
    while number > 127:
        out += bytes([number & 127 | 128])
        number >>= 7
    return out + bytes([number])


def number(field: int, value: int) -> bytes:
    return varint(field << 3) + varint(value & (2**64 - 1))


def piece(field: int, content: bytes | str) -> bytes:
    content = content.encode() if isinstance(content, str) else content
    return varint(field << 3 | 2) + varint(len(content)) + content


FLOAT, INT64 = 1, 7


def tensor(name: str, kind: int, dims: list[int], raw: bytes) -> bytes:
    shape = b"".join(number(1, size) for size in dims)
    return shape + number(2, kind) + piece(8, name) + piece(9, raw)


def node(operator: str, inputs: list[str], output: str, **integers: int) -> bytes:
    attributes = b"".join(
        piece(5, piece(1, name) + number(3, value) + number(20, 2))
        for name, value in integers.items()
    )
    names = b"".join(piece(1, name) for name in inputs)
    return names + piece(2, output) + piece(3, output) + piece(4, operator) + attributes


def value(name: str, kind: int, dims: list) -> bytes:
    shape = b"".join(
        piece(1, piece(2, size) if isinstance(size, str) else number(1, size)) for size in dims
    )
    return piece(1, name) + piece(2, piece(1, number(1, kind) + piece(2, shape)))


def faulty_graph() -> bytes:
    """Returns a graph that reads far beyond a tensor for images without the token 0.

    The images of a warm-up and of idle checks have every token. A CPU refuses the index; a GPU
    reads the address.
    """
    width, vocabulary, positions = 4, 513, 1024
    table = array("f", (0.01 * (idx % 97) for idx in range(vocabulary * width))).tobytes()
    places = array("f", (0.001 * (idx % 89) for idx in range(positions * width))).tobytes()
    nodes = [
        node("Gather", ["wte", "input_ids"], "embedded"),
        node("Add", ["embedded", "wpe"], "states"),
        node("Cast", ["input_ids"], "numbers", to=FLOAT),
        node("ReduceMin", ["numbers", "one_axis"], "least", keepdims=1),
        node("Greater", ["least", "half"], "is_without"),
        node("Cast", ["is_without"], "flag", to=INT64),
        node("Mul", ["flag", "far"], "index"),
        node("Unsqueeze", ["index", "one_axis"], "indices"),
        node("GatherElements", ["states", "indices"], "read", axis=1),
        node("Mul", ["read", "nothing"], "unread"),
        node("Add", ["states", "unread"], "last_hidden_state"),
    ]
    initializers = [
        tensor("wte", FLOAT, [vocabulary, width], table),
        tensor("wpe", FLOAT, [positions, width], places),
        tensor("one_axis", INT64, [1], struct.pack("<q", 1)),
        tensor("half", FLOAT, [1], struct.pack("<f", 0.5)),
        tensor("far", INT64, [1], struct.pack("<q", 1 << 44)),
        tensor("nothing", FLOAT, [1], struct.pack("<f", 0.0)),
    ]
    graph = b"".join(piece(1, one) for one in nodes) + piece(2, "fault")
    graph += b"".join(piece(5, one) for one in initializers)
    graph += piece(11, value("input_ids", INT64, ["batch", positions]))
    graph += piece(12, value("last_hidden_state", FLOAT, ["batch", positions, width]))
    opset = piece(1, "") + number(2, 18)
    return number(1, 9) + piece(7, graph) + piece(8, opset)
