"""Runs one system of scripts/bench-peers.sh in a process of its own.

    peer.py NAME --work DIR --threads N [--program FILE --model DIR]

NAME is one of systems.py, DIR what prepare.py has made; the last two flags are
for `imagegpt`. Prints a line of JSON when the system is ready ({"version": …})
or cannot run here ({"not_run": reason}); then, for each line with the number of
an input, the times and the answer ({"seconds": …, "cpu_seconds": …,
"features": […]}).
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

import numpy as np
import systems
from worker import Worker

ROOT = Path(__file__).resolve().parents[2]
# By the names of precisions in systems.py; products in 8 bits are a part of the graph.
OPENVINO_HINTS = {"fp32": "f32", "bf16": "bf16"}
OPENVINO_FILES = {"openvino-int8": "features-int8.xml", "weights-int8": "weights-int8.xml"}


class CannotRun(Exception):
    """A system cannot run on this machine; the message says why."""


class Loaded(NamedTuple):
    """A system that is ready."""

    # From tokens of the shape (1, positions) to features of the shape (width,).
    features: Callable[[np.ndarray], np.ndarray]
    version: str
    # Time that all threads have had a core so far.
    cpu_seconds: Callable[[], float] = time.process_time


def recipe(args: argparse.Namespace, precision: str, stack: ExitStack) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = args.threads
    session = onnxruntime.InferenceSession(
        args.work / "recipe.onnx", options, providers=["CPUExecutionProvider"]
    )
    return Loaded(
        lambda ids: session.run(None, {"input_ids": ids})[0][0].mean(0),
        f"onnxruntime {onnxruntime.__version__}",
    )


def openvino(args: argparse.Namespace, precision: str, stack: ExitStack) -> Loaded:
    import openvino as ov

    core = ov.Core()
    has_bf16 = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    if precision == "bf16" and not has_bf16:
        raise CannotRun("OpenVINO offers no bf16 on this CPU")
    rest = {"int8": "bf16" if has_bf16 else "fp32"}.get(precision, precision)
    hints = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": args.threads,
        "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[rest],
    }
    file = OPENVINO_FILES.get(args.name, "features.onnx")
    request = core.compile_model(args.work / file, "CPU", hints).create_infer_request()
    return Loaded(
        lambda ids: request.infer({0: ids})[0][0],
        f"openvino {ov.get_version()}, hint {OPENVINO_HINTS[rest]}",
    )


def provider(args: argparse.Namespace, precision: str, stack: ExitStack) -> Loaded:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # A graph of which a part would run on ONNX Runtime's own provider is refused.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    chosen = {
        "device_type": "CPU",
        "num_of_threads": str(args.threads),
        # The text of a file that other languages' bindings name here.
        "load_config": json.dumps({"CPU": {"INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision]}}),
    }
    session = onnxruntime.InferenceSession(
        args.work / "features.onnx",
        options,
        providers=["OpenVINOExecutionProvider"],
        provider_options=[chosen],
    )
    if "OpenVINOExecutionProvider" not in session.get_providers():
        raise CannotRun("ONNX Runtime cannot load its OpenVINO provider")
    return Loaded(
        lambda ids: session.run(None, {"input_ids": ids})[0][0],
        f"onnxruntime-openvino {onnxruntime.__version__}",
    )


def pytorch(args: argparse.Namespace, precision: str, stack: ExitStack) -> Loaded:
    import prepare
    import torch

    torch.set_num_threads(args.threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    model = prepare.MeanState(prepare.cut(prepare.load(args.work / "small", dtype)))

    @torch.no_grad()
    def features(ids: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(ids))[0].float().numpy()

    return Loaded(features, f"torch {torch.__version__}")


def imagegpt(args: argparse.Namespace, precision: str, stack: ExitStack) -> Loaded:
    """Serves the compiled model and calls it over gRPC, whose cost counts as ours."""
    import grpc

    sys.path.insert(0, str(ROOT / "tests" / "interop"))
    import common

    pb, services = common.contract()
    flags = ["--intra-op-threads", str(args.threads), "--max-batch-size", "1", "--generate-slots", "0"]
    worker = stack.enter_context(Worker(args.program, args.model, *flags))
    stub = services.ImageGptServiceStub(grpc.insecure_channel(worker.endpoint))
    facts = stub.GetModel(pb.GetModelRequest())

    def features(ids: np.ndarray) -> np.ndarray:
        image = pb.Image(tokens=pb.Tokens(ids=ids[0].tolist()))
        result = stub.Embed(pb.EmbedRequest(images=[image], layers=[systems.LAYER])).results[0]
        if result.WhichOneof("outcome") == "error":
            raise RuntimeError(result.error.message)
        return np.frombuffer(result.embedding.data, "<f4")

    return Loaded(
        features,
        f"imagegpt {facts.worker_version} in {facts.precision}, through gRPC, "
        f"onnxruntime {facts.onnxruntime_version}",
        lambda: time.process_time() + worker.cpu_seconds(),
    )


LOADERS = {
    "recipe": recipe,
    "openvino": openvino,
    "weights": openvino,
    "provider": provider,
    "torch": pytorch,
    systems.OURS: imagegpt,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("name")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--program")
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    # Libraries print to standard output too; what they print goes to the log.
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def say(answer: dict) -> None:
        print(json.dumps(answer), file=answers)

    inputs = np.load(args.work / "inputs.npy")
    engine, precision = args.name.split("-")
    with ExitStack() as stack:
        try:
            loaded = LOADERS[engine](args, precision, stack)
        except CannotRun as error:
            say({"not_run": str(error)})
            return
        say({"version": loaded.version})
        for line in sys.stdin:
            start, cpu_start = time.perf_counter(), loaded.cpu_seconds()
            features = loaded.features(inputs[int(line)])
            seconds, cpu_seconds = time.perf_counter() - start, loaded.cpu_seconds() - cpu_start
            say({"seconds": seconds, "cpu_seconds": cpu_seconds, "features": features.tolist()})


if __name__ == "__main__":
    main()
