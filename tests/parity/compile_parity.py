"""Compiled graphs against transformers, on checkpoints it initialised itself.

    compile_parity.py COMPILER [CASE...]

COMPILER is the imagegpt binary; ORT_DYLIB_PATH names the library
that it uses. Graphs are compiled with --portable, since Python's ONNX Runtime
does not have the worker's attention operator; that one is held against float64
whenever a model is compiled, and against transformers in tests/it/compiled.rs. Every case is a head shape of a released model at reduced depth
and width, with norms and biases that are not the defaults, saved in one of the
published layouts; every task and every layer is compared, in fp32 and int8.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile

import numpy
import onnxruntime
import torch
from transformers import (
    ImageGPTConfig,
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
)

TOLERANCE = {"fp32": 1e-5, "int8": 5e-2}
CAUSAL, CLASSES, BACKBONE = (
    ImageGPTForCausalImageModeling,
    ImageGPTForImageClassification,
    ImageGPTModel,
)
CASES = {
    "small-heads": (CAUSAL, "safetensors", {"n_embd": 128, "n_layer": 3, "n_head": 2}),
    "medium-heads": (CAUSAL, "sharded", {"n_embd": 256, "n_layer": 3, "n_head": 2}),
    "large-heads": (CAUSAL, "bin", {"n_embd": 192, "n_layer": 3, "n_head": 2}),
    "classes": (CLASSES, "safetensors", {"n_embd": 128, "n_layer": 2, "n_head": 2, "num_labels": 7}),
    "64-positions": (
        CAUSAL,
        "bin",
        {"n_embd": 48, "n_layer": 4, "n_head": 3, "n_positions": 64, "vocab_size": 18},
    ),
    "backbone": (BACKBONE, "safetensors", {"n_embd": 64, "n_layer": 2, "n_head": 1, "n_positions": 64}),
    "half": (CAUSAL, "float16", {"n_embd": 64, "n_layer": 2, "n_head": 1, "n_positions": 64}),
    "layer-scale": (
        CAUSAL,
        "safetensors",
        {
            "n_embd": 64,
            "n_layer": 3,
            "n_head": 2,
            "n_positions": 64,
            "n_inner": 160,
            "scale_attn_by_inverse_layer_idx": True,
            "activation_function": "gelu_new",
        },
    ),
    "gelu": (
        CAUSAL,
        "safetensors",
        {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "activation_function": "gelu"},
    ),
}


def make(folder, kind, layout, settings):
    torch.manual_seed(len(settings))
    model = kind(ImageGPTConfig(**settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "ln_" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.05)
    if layout == "float16":
        model = model.half()
    model.save_pretrained(folder, **({"max_shard_size": "700KB"} if layout == "sharded" else {}))
    if layout == "sharded":
        assert (folder / "model.safetensors.index.json").exists()
    if layout == "bin":
        (folder / "model.safetensors").unlink()
        state = model.state_dict()
        # What old checkpoints hold besides weights.
        positions = model.config.n_positions
        for idx in range(model.config.n_layer):
            prefix = f"transformer.h.{idx}.attn."
            mask = torch.tril(torch.ones((1, 1, positions, positions), dtype=torch.uint8))
            state[prefix + "bias"] = mask
            state[prefix + "masked_bias"] = torch.tensor(-1e4)
        # A transposed tensor is stored as it lies, with strides.
        state["lm_head.weight"] = state["lm_head.weight"].t().contiguous().t()
        torch.save(state, folder / "pytorch_model.bin")
    clusters = numpy.zeros((model.config.vocab_size - 1, 3)).tolist()
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": clusters}))
    return model.float()


def expected(model, ids):
    """What transformers computes, by graph."""
    backbone = getattr(model, "transformer", model)
    with torch.no_grad():
        out = backbone(input_ids=ids, output_hidden_states=True, use_cache=False)
        states = out.hidden_states
        layer = model.config.n_layer
        normed = [backbone.h[idx].ln_1(states[idx]) for idx in range(layer)] + [states[layer]]
        result = {
            "hidden": out.last_hidden_state,
            "embed-none": torch.stack([state.mean(1) for state in states], 1),
            "embed-pre_attn_rms": torch.stack([state.mean(1) for state in normed], 1),
        }
        if hasattr(model, "lm_head"):
            result["logits"] = model(input_ids=ids, use_cache=False).logits
        if hasattr(model, "score"):
            result["classify"] = model(input_ids=ids, use_cache=False).logits
    return result


def error(found, wanted):
    wanted = wanted.numpy().astype(numpy.float64)
    assert found.shape == wanted.shape, (found.shape, wanted.shape)
    return float(numpy.linalg.norm(found - wanted) / numpy.linalg.norm(wanted))


def generate(session, config, ids):
    """Logits after each token: a primer at once, then one by one."""
    batch, length = ids.shape
    shape = (batch, config.n_head, length, config.n_embd // config.n_head)
    cache = {
        f"{part}.{idx}": onnxruntime.OrtValue.ortvalue_from_numpy(numpy.zeros(shape, numpy.float32))
        for idx in range(config.n_layer)
        for part in ("key", "value")
    }
    logits = {}
    primer = length // 3
    for start, end in [(0, primer)] + [(at, at + 1) for at in range(primer, length)]:
        binding = session.io_binding()
        for name, value in cache.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(name, value)
        positions = numpy.tile(numpy.arange(start, end, dtype=numpy.int32), (batch, 1))
        binding.bind_cpu_input("input_ids", numpy.ascontiguousarray(ids[:, start:end]))
        binding.bind_cpu_input("position_ids", positions)
        binding.bind_cpu_input("seqlens_k", numpy.full(batch, end - 1, numpy.int32))
        binding.bind_cpu_input("total_sequence_length", numpy.array(end, numpy.int32))
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        # Outputs come in the order in which they were bound: logits last.
        logits[end - 1] = binding.copy_outputs_to_cpu()[-1]
    return logits


def compare(model, folder, precision):
    config = model.config
    session = lambda name: onnxruntime.InferenceSession(
        str(folder / f"{name}.onnx"), providers=["CPUExecutionProvider"]
    )
    torch.manual_seed(1)
    length = config.n_positions
    ids = torch.randint(0, config.vocab_size, (2, length))
    ids32 = ids.numpy().astype(numpy.int32)
    wanted = expected(model, ids)
    for name, value in wanted.items():
        if name == "logits":
            continue
        found = session(name).run(None, {"input_ids": ids32})[0]
        if name.startswith("embed"):
            for layer in range(config.n_layer + 1):
                yield f"{name}, layer {layer}", error(found[:, layer], value[:, layer])
        else:
            yield name, error(found, value)
    if "logits" not in wanted:
        return
    targets = torch.randint(0, config.vocab_size - 1, (2, length))
    nll = -torch.log_softmax(wanted["logits"], -1).gather(-1, targets[..., None])[..., 0]
    inputs = {"input_ids": ids32, "targets": targets.numpy().astype(numpy.int32)}
    yield "score", error(session("score").run(None, inputs)[0], nll)
    short = min(length, 96)
    steps = generate(session("generate"), config, ids32[:, :short])
    worst = max(error(logits, wanted["logits"][:, at]) for at, logits in steps.items())
    yield f"generate, {len(steps)} steps", worst


def main():
    compiler, chosen = sys.argv[1], sys.argv[2:] or list(CASES)
    failures = 0
    onnxruntime.set_default_logger_severity(3)
    for case in chosen:
        kind, layout, settings = CASES[case]
        work = pathlib.Path(tempfile.mkdtemp(prefix="imagegpt-parity-"))
        try:
            model = make(work / "source", kind, layout, settings)
            for precision in TOLERANCE:
                output = work / precision
                layers = str(model.config.n_layer)
                command = [
                    compiler, "compile", str(work / "source"), "--output", str(output),
                    "--precision", precision, "--feature-layer", layers, "--portable",
                ]
                subprocess.run(command, check=True, capture_output=True, env=os.environ)
                errors = dict(compare(model, output, precision))
                worst = max(errors, key=errors.get)
                is_near = errors[worst] <= TOLERANCE[precision]
                failures += not is_near
                print(
                    f"{'ok  ' if is_near else 'FAIL'} {case:13} {layout:11} {precision}: "
                    f"{len(errors)} outputs, worst {errors[worst]:.1e} ({worst})",
                    flush=True,
                )
        except subprocess.CalledProcessError as failure:
            failures += 1
            lines = failure.stderr.decode().splitlines()
            print(f"FAIL {case}: {next((line for line in lines if line.startswith('Error')), lines)}")
        finally:
            shutil.rmtree(work)
    n_cases = len(chosen) * len(TOLERANCE)
    print(f"{n_cases - failures} passed, {failures} failed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
