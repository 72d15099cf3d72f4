"""Holds a running worker against transformers on the same weights and pictures.

    python tests/parity/parity.py --endpoint 127.0.0.1:50051 --model models/untrained

The pictures are the PNGs of tests/golden, sent as files. Tokens must be equal;
embeddings and logits may differ by a relative error of 1e-5, which is
||answer - reference|| / ||reference|| of one image. A model that was compiled
in 8 bits may differ by more, and its least cosine is printed. The weights come from
--checkpoint, else from --model if it holds a transformers checkpoint, else
from models/make_untrained.py. They must be those of the ONNX graphs, or the
comparison would mean nothing. Ends with "N passed, N failed"; exits 1 when a
check failed.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import grpc
import grpc_tools
import numpy as np
import onnx
import torch
import transformers
from grpc_tools import protoc
from onnx import numpy_helper
from safetensors.numpy import load_file
from transformers import ImageGPTForImageClassification
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
sys.path.insert(0, str(GOLDEN))
from make_golden import center_crop, to_rgb, upright  # noqa: E402

RELATIVE_ERROR_MAX = 1e-5
# What the compiler allows each graph in 8 bits.
RELATIVE_ERROR_MAX_INT8 = 5e-2
NORMS = ("PRE_ATTN_RMS", "NONE")
FITS = ("SQUASH", "CENTER_CROP")
ALPHAS = ("DROP", "WHITE")
POOLINGS = ("MEAN", "NONE", "LAST")
CONTEXTS = ("RAW", "SOS_SHIFTED")
# The published layout, and those of OWG's and optimum's exports.
GRAPH_FOLDERS = (".", "onnx", "model")
IMAGES_PER_CALL = 8
CALL_SECONDS = 300


class Report:
    """Prints one row a check, and counts."""

    def __init__(self):
        self.passed = 0
        self.failed = 0
        print(f"{'check':<72} {'images':>6} {'worst':>9}  result")

    def row(self, name: str, n_images: int, worst: str, failures: list[str]) -> None:
        print(f"{name:<72} {n_images:>6} {worst:>9}  {'failed' if failures else 'passed'}", flush=True)
        for failure in failures[:5]:
            print(f"    {failure}")
        if len(failures) > 5:
            print(f"    and {len(failures) - 5} more")
        if failures:
            self.failed += 1
        else:
            self.passed += 1


def load_stubs(folder: Path):
    """Compiles the contract, so that no generated code is kept."""
    protos = ["imagegpt/v1/imagegpt.proto", "google/rpc/status.proto"]
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    code = protoc.main(
        [
            "protoc",
            f"-I{ROOT / 'proto'}",
            f"-I{well_known}",
            f"--python_out={folder}",
            f"--grpc_python_out={folder}",
            *protos,
        ]
    )
    if code:
        raise SystemExit("protoc failed")
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    pb = importlib.import_module("imagegpt.v1.imagegpt_pb2")
    services = importlib.import_module("imagegpt.v1.imagegpt_pb2_grpc")
    return pb, services


def find_checkpoint(given: Path | None, model: Path, scratch: Path) -> Path:
    if given:
        return given
    if (model / "model.safetensors").exists():
        return model
    if "untrained" not in json.loads((model / "config.json").read_text()).get("notice", ""):
        raise SystemExit(f"{model} holds no model.safetensors: give --checkpoint DIR")
    checkpoint = scratch / "checkpoint"
    script = ROOT / "models" / "make_untrained.py"
    subprocess.run([sys.executable, script, "--checkpoint", checkpoint], check=True, stderr=subprocess.DEVNULL)
    return checkpoint


def check_weights(report: Report, model: Path, checkpoint: Path) -> None:
    weights = {bare_name(name): value for name, value in load_file(checkpoint / "model.safetensors").items()}
    for name in ("model.onnx", "model_classification.onnx"):
        paths = [model / folder / name for folder in GRAPH_FOLDERS if (model / folder / name).exists()]
        if not paths:
            continue
        graph = onnx.load(paths[0]).graph
        stored = {bare_name(value.name): numpy_helper.to_array(value) for value in graph.initializer}
        # Heads that the graph has no use for.
        unused = {"lm_head.weight", "score.weight"} if name == "model.onnx" else {"lm_head.weight"}
        failures = []
        for key, value in weights.items():
            if key in unused or is_mask(key):
                continue
            if key in stored:
                found = np.array_equal(stored[key], value)
            else:
                # Exporters store the matrix of a Linear transposed, under a
                # name of their own.
                found = any(np.array_equal(other, value.T) for other in stored.values())
            if not found:
                failures.append(f"{key} is not in the graph with these values")
        report.row(f"weights of {name}", 0, "", failures)


def bare_name(name: str) -> str:
    return name.removeprefix("transformer.")


def is_mask(name: str) -> bool:
    return name.endswith((".attn.bias", ".attn.masked_bias"))


def check_model(report: Report, info, processor, config) -> None:
    palette = np.rint(127.5 * (np.asarray(processor.clusters) + 1)).astype(np.uint8)
    failures = []
    for name, answer, wanted in (
        ("positions", info.positions, config.n_positions),
        ("side", info.side, processor.size["height"]),
        ("dimension", info.dimension, config.n_embd),
        ("layers", info.layers, config.n_layer),
        ("palette_rgb8", info.palette_rgb8, palette.tobytes()),
    ):
        if answer != wanted:
            failures.append(f"{name} is {str(answer)[:60]}, not {str(wanted)[:60]}")
    report.row("GetModel", 0, "", failures)


class Pictures:
    """The golden PNGs that fit the worker's limits, and their tokens."""

    def __init__(self, limits, processor, n_images: int | None):
        self.names = []
        self.files = []
        self.tokens = {(fit, alpha): [] for fit in FITS for alpha in ALPHAS}
        self.n_skipped = 0
        for path in sorted((GOLDEN / "images").glob("*.png"))[:n_images]:
            picture = upright(path)
            width, height = picture.size
            data = path.read_bytes()
            if width * height > limits.image_pixels_max or len(data) > limits.image_bytes_max:
                self.n_skipped += 1
                continue
            self.names.append(path.name)
            self.files.append(data)
            for alpha in ALPHAS:
                rgb = to_rgb(picture, alpha)
                for fit in FITS:
                    fitted = rgb if fit == "SQUASH" else center_crop(rgb)
                    (ids,) = processor(fitted, return_tensors="np")["input_ids"]
                    self.tokens[fit, alpha].append(ids)


class References:
    """States and logits of each picture's tokens, in f32 by transformers.

    `layers` has the pooled states of all layers, before and after the norm that
    the next block's attention sees.
    """

    def __init__(self, model, tokens: list[np.ndarray]):
        self.states = {context: [] for context in CONTEXTS}
        self.layers = {(context, norm): [] for context in CONTEXTS for norm in NORMS}
        self.logits = {context: [] for context in CONTEXTS}
        start = model.config.vocab_size - 1
        with torch.no_grad():
            for ids in tokens:
                for context in CONTEXTS:
                    seen = ids if context == "RAW" else np.concatenate([[start], ids[:-1]])
                    input_ids = torch.from_numpy(seen[None].astype(np.int64))
                    output = model(input_ids, output_hidden_states=True, use_cache=False)
                    # The last of the hidden states is after the final norm.
                    self.states[context].append(output.hidden_states[-1][0].numpy())
                    self.logits[context].append(output.logits[0].numpy())
                    states = output.hidden_states
                    norms = [block.ln_1 for block in model.transformer.h] + [torch.nn.Identity()]
                    normed = [norm(state) for norm, state in zip(norms, states, strict=True)]
                    for norm, layers in (("NONE", states), ("PRE_ATTN_RMS", normed)):
                        pooled = [layer[0].double().mean(dim=0).numpy() for layer in layers]
                        self.layers[context, norm].append(np.stack(pooled))


def pool(states: np.ndarray, pooling: str, normalize: bool) -> np.ndarray:
    if pooling == "MEAN":
        # In f64, so that the reference adds no rounding of its own.
        states = states.astype(np.float64).mean(axis=0)
    elif pooling == "LAST":
        states = states[-1]
    if normalize:
        states = states / np.linalg.norm(states.astype(np.float64), axis=-1, keepdims=True)
    return states


def chunks(images: list, limits, answer_bytes: int) -> list[list]:
    """Splits so that no call goes over a limit of the worker."""
    n_most = min(IMAGES_PER_CALL, limits.images_per_call_max)
    if answer_bytes:
        n_most = min(n_most, max(1, limits.response_bytes_max // answer_bytes))
    parts = [[]]
    n_bytes = 0
    for image in images:
        size = image.ByteSize() + 64
        if parts[-1] and (len(parts[-1]) == n_most or n_bytes + size > limits.request_bytes_max - 1024):
            parts.append([])
            n_bytes = 0
        parts[-1].append(image)
        n_bytes += size
    return parts


def call(method, request_type, images: list, limits, answer_bytes: int = 0, **options) -> list:
    results = []
    for part in chunks(images, limits, answer_bytes):
        response = method(request_type(images=part, **options), timeout=CALL_SECONDS)
        if len(response.results) != len(part):
            raise RuntimeError(f"{len(response.results)} results for {len(part)} images")
        results += response.results
    return results


def to_array(pb, tensor) -> np.ndarray:
    if tensor.dtype not in (pb.DATA_TYPE_UNSPECIFIED, pb.DATA_TYPE_F32):
        raise ValueError("the tensor is not f32")
    return np.frombuffer(tensor.data, "<f4").reshape(tuple(tensor.shape))


def compare(
    report: Report, name: str, names: list[str], answers, references, error_max: float = RELATIVE_ERROR_MAX
) -> None:
    """`answers` yields an array for each picture, or text that says why not."""
    failures = []
    worst = 0.0
    cosines = []
    for picture, answer, reference in zip(names, answers, references, strict=True):
        if isinstance(answer, str):
            failures.append(f"{picture}: {answer}")
        elif answer.shape != reference.shape:
            failures.append(f"{picture}: shape {answer.shape}, not {reference.shape}")
        else:
            difference = answer.astype(np.float64) - reference
            error = np.linalg.norm(difference) / np.linalg.norm(reference.astype(np.float64))
            worst = max(worst, error)
            lengths = np.linalg.norm(answer.astype(np.float64)) * np.linalg.norm(reference.astype(np.float64))
            cosines.append((answer.astype(np.float64) * reference).sum() / lengths)
            # Written so that NaN fails.
            if not error <= error_max:
                failures.append(f"{picture}: relative error {error:.1e}")
    if error_max > RELATIVE_ERROR_MAX and cosines:
        name = f"{name}, cosine {np.mean(cosines):.5f}, least {np.min(cosines):.5f}"
    report.row(name, len(names), f"{worst:.1e}", failures)


def check_tokens(report: Report, name: str, names: list[str], results, references) -> None:
    failures = []
    n_worst = 0
    for picture, result, reference in zip(names, results, references, strict=True):
        if result.WhichOneof("outcome") != "tokens":
            failures.append(f"{picture}: {result.error.message}")
            continue
        ids = np.array(result.tokens.ids)
        if ids.shape != reference.shape:
            failures.append(f"{picture}: {ids.size} tokens, not {reference.size}")
            continue
        n_wrong = int((ids != reference).sum())
        n_worst = max(n_worst, n_wrong)
        if n_wrong:
            failures.append(f"{picture}: {n_wrong} of {ids.size} tokens differ")
    report.row(name, len(names), str(n_worst), failures)


def outcome(pb, result, get_tensor):
    if result.WhichOneof("outcome") == "error":
        return result.error.message
    return to_array(pb, get_tensor(result))


def check_layers(report: Report, pb, worker, info, names, images, references: References, error_max: float) -> None:
    """Each layer's pooled features, which a compiled model gives out of one run."""
    for (context, norm), wanted in references.layers.items():
        results = call(
            worker.Embed,
            pb.EmbedRequest,
            images,
            info.limits,
            4 * info.dimension * len(info.layers_served),
            context=pb.Context.Value(f"CONTEXT_{context}"),
            norm=pb.Norm.Value(f"NORM_{norm}"),
            layers=info.layers_served,
        )
        answers = [outcome(pb, result, lambda it: it.embedding) for result in results]
        for row, layer in enumerate(info.layers_served):
            compare(
                report,
                f"Embed {context} {norm} layer {layer}",
                names,
                [answer if isinstance(answer, str) else answer[row] for answer in answers],
                [pooled[layer] for pooled in wanted],
                error_max,
            )


def run(arguments, scratch: Path) -> int:
    pb, services = load_stubs(scratch)
    report = Report()
    checkpoint = find_checkpoint(arguments.checkpoint, arguments.model, scratch)
    check_weights(report, arguments.model, checkpoint)
    model = ImageGPTForImageClassification.from_pretrained(checkpoint, dtype=torch.float32).eval()
    processor = ImageGPTImageProcessorPil.from_pretrained(arguments.model)

    options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
    with grpc.insecure_channel(arguments.endpoint, options=options) as channel:
        worker = services.ImageGptServiceStub(channel)
        info = worker.GetModel(pb.GetModelRequest(), timeout=CALL_SECONDS, wait_for_ready=True)
        check_model(report, info, processor, model.config)
        pictures = Pictures(info.limits, processor, arguments.images)
        images = [pb.Image(encoded=data) for data in pictures.files]
        names = pictures.names

        for (fit, alpha), tokens in pictures.tokens.items():
            preprocess = pb.Preprocess(fit=pb.Fit.Value(f"FIT_{fit}"), alpha=pb.Alpha.Value(f"ALPHA_{alpha}"))
            results = call(worker.Tokenize, pb.TokenizeRequest, images, info.limits, preprocess=preprocess)
            check_tokens(report, f"Tokenize {fit} {alpha}", names, results, tokens)

        references = References(model, pictures.tokens["SQUASH", "DROP"])
        error_max = RELATIVE_ERROR_MAX_INT8 if info.precision == "int8" else RELATIVE_ERROR_MAX
        if len(info.layers_served) > 1:
            check_layers(report, pb, worker, info, names, images, references, error_max)
        if pb.TASK_EMBED in info.tasks:
            for context in CONTEXTS:
                for pooling in POOLINGS:
                    for normalize in (False, True):
                        results = call(
                            worker.Embed,
                            pb.EmbedRequest,
                            images,
                            info.limits,
                            4 * info.dimension * (info.positions if pooling == "NONE" else 1),
                            context=pb.Context.Value(f"CONTEXT_{context}"),
                            pooling=pb.Pooling.Value(f"POOLING_{pooling}"),
                            normalize=normalize,
                            layers=[model.config.n_layer],
                        )
                        compare(
                            report,
                            f"Embed {context} {pooling}{' normalized' if normalize else ''}",
                            names,
                            [outcome(pb, result, lambda it: it.embedding) for result in results],
                            [pool(states, pooling, normalize) for states in references.states[context]],
                            error_max,
                        )
        if pb.TASK_CLASSIFY in info.tasks:
            for context in CONTEXTS:
                results = call(
                    worker.Classify,
                    pb.ClassifyRequest,
                    images,
                    info.limits,
                    context=pb.Context.Value(f"CONTEXT_{context}"),
                    logits=True,
                )
                compare(
                    report,
                    f"Classify {context} logits",
                    names,
                    [outcome(pb, result, lambda it: it.classification.logits) for result in results],
                    references.logits[context],
                )
    if pictures.n_skipped:
        print(f"{pictures.n_skipped} pictures are over the worker's limits and were not sent")
    if not names:
        report.row("pictures", 0, "", ["none was sent"])
    print(f"{report.passed} passed, {report.failed} failed")
    return 1 if report.failed else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--endpoint", required=True, help="host:port of a running worker")
    parser.add_argument("--model", type=Path, required=True, help="folder of the model that it serves")
    parser.add_argument("--checkpoint", type=Path, help="folder with the same weights as model.safetensors")
    parser.add_argument("--images", type=int, help="how many pictures to send; default: all")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    # A causal checkpoint has no classification head; that is no news here.
    transformers.logging.set_verbosity_error()
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(run(arguments, Path(scratch)))


if __name__ == "__main__":
    main()
