"""Makes tests/data/models: model folders of a few kilobytes each.

All hold the same micro ImageGPT, whole or damaged: 8x8 images, so 64
positions; 16 colors and the start token 16; width 16. README.md there says
what each folder is for. Same versions as models/requirements.txt.

    python tests/data/make_models.py
"""

import copy
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnx import TensorProto, helper, numpy_helper
from transformers import ImageGPTConfig
from transformers.models.imagegpt.image_processing_pil_imagegpt import ImageGPTImageProcessorPil

FOLDER = Path(__file__).resolve().parent / "models"
sys.path.insert(0, str(FOLDER.parents[2] / "models"))
from make_untrained import (  # noqa: E402
    NOTICE,
    Features,
    Logits,
    config_json,
    export,
    preprocessor_json,
    random_model,
    write_json,
)

SEED = 8
SIDE = 8
N_COLORS = 16
SOS = 16
LABELS = ["circle", "square", "triangle"]


def make_palette() -> list[list[float]]:
    random = np.random.RandomState(SEED)
    return random.uniform(-1, 1, (N_COLORS, 3)).astype(np.float32).astype(np.float64).tolist()


def preprocessor(clusters: list) -> str:
    return preprocessor_json(clusters).replace('"size": 32', f'"size": {SIDE}')


def config(model, **changes) -> dict:
    return config_json(model.config) | {"notice": NOTICE} | changes


def folder(name: str, values: dict, preprocessor_text: str) -> Path:
    path = FOLDER / name
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir(parents=True)
    write_json(path / "config.json", values)
    (path / "preprocessor_config.json").write_text(preprocessor_text)
    return path


class OptimumFeatures(torch.nn.Module):
    """The three inputs of optimum's exports, all of them in use."""

    def __init__(self, model):
        super().__init__()
        self.transformer = model.transformer

    def forward(self, input_ids, attention_mask, position_ids):
        return self.transformer(
            input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=False,
            return_dict=False,
        )[0]


def export_optimum(model, path: Path) -> None:
    path.parent.mkdir()
    names = ["input_ids", "attention_mask", "position_ids"]
    axes = {0: "batch_size", 1: "sequence_length"}
    tokens = torch.arange(2 * SIDE * SIDE).view(2, -1) % model.config.vocab_size
    positions = torch.arange(SIDE * SIDE).repeat(2, 1)
    mask = torch.ones_like(tokens)
    # A mask without a zero is left out of the trace.
    mask[1, 0] = 0
    module = OptimumFeatures(model).eval()
    torch.onnx.export(
        module,
        (tokens, mask, positions),
        str(path),
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_axes={name: axes for name in [*names, "last_hidden_state"]},
        opset_version=18,
        dynamo=False,
    )
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [value.name for value in session.get_inputs()] == names

    def run(mask, positions):
        feeds = zip(names, (tokens, mask, positions))
        return session.run(None, {name: value.numpy() for name, value in feeds})[0]

    with torch.no_grad():
        reference = module.transformer(tokens, use_cache=False, return_dict=False)[0].numpy()
    ones = torch.ones_like(tokens)
    assert relative_error(run(ones, positions), reference) <= 1e-5
    # Whoever fills an input wrongly must get a wrong answer here.
    late = ones.clone()
    late[:, : SIDE * SIDE // 2] = 0
    for wrong in (run(late, positions), run(ones, 0 * positions), run(ones, positions.flip(1))):
        assert not relative_error(wrong, reference) < 0.1


def relative_error(result, reference) -> float:
    return float(np.linalg.norm(result - reference) / np.linalg.norm(reference))


def with_int32_input(graph: onnx.ModelProto) -> onnx.ModelProto:
    graph = copy.deepcopy(graph)
    (value,) = graph.graph.input
    value.type.tensor_type.elem_type = TensorProto.INT32
    rename_input(graph, "input_ids", "input_ids_int64")
    cast = helper.make_node("Cast", ["input_ids"], ["input_ids_int64"], to=TensorProto.INT64)
    graph.graph.node.insert(0, cast)
    return graph


def rename_input(graph: onnx.ModelProto, old: str, new: str) -> None:
    """Renames what nodes read, not what the graph declares."""
    for node in graph.graph.node:
        for i, name in enumerate(node.input):
            if name == old:
                node.input[i] = new


def with_bool_mask(graph: onnx.ModelProto) -> onnx.ModelProto:
    graph = copy.deepcopy(graph)
    (value,) = (value for value in graph.graph.input if value.name == "attention_mask")
    value.type.tensor_type.elem_type = TensorProto.BOOL
    rename_input(graph, "attention_mask", "attention_mask_int64")
    cast = helper.make_node(
        "Cast", ["attention_mask"], ["attention_mask_int64"], to=TensorProto.INT64
    )
    graph.graph.node.insert(0, cast)
    return graph


def with_fixed_batch(graph: onnx.ModelProto, n_images: int) -> onnx.ModelProto:
    """The declared sizes of an export without dynamic axes."""
    graph = copy.deepcopy(graph)
    for value in [*graph.graph.input, *graph.graph.output]:
        value.type.tensor_type.shape.dim[0].dim_value = n_images
    return graph


def export_float16(model, path: Path) -> None:
    """Weights, states and outputs in float16, as `optimum-cli export onnx
    --dtype fp16` writes them."""
    module = OptimumFeatures(copy.deepcopy(model).half()).eval()
    names = ["input_ids", "attention_mask", "position_ids"]
    axes = {0: "batch_size", 1: "sequence_length"}
    tokens = torch.arange(2 * SIDE * SIDE).view(2, -1) % model.config.vocab_size
    mask = torch.ones_like(tokens)
    mask[1, 0] = 0
    torch.onnx.export(
        module,
        (tokens, mask, torch.arange(SIDE * SIDE).repeat(2, 1)),
        str(path),
        input_names=names,
        output_names=["last_hidden_state"],
        dynamic_axes={name: axes for name in [*names, "last_hidden_state"]},
        opset_version=18,
        dynamo=False,
    )
    (output,) = onnx.load(path).graph.output
    assert output.type.tensor_type.elem_type == TensorProto.FLOAT16


def with_unknown_input(graph: onnx.ModelProto) -> onnx.ModelProto:
    graph = copy.deepcopy(graph)
    rename_output(graph, "states")
    graph.graph.input.append(helper.make_tensor_value_info("temperature", TensorProto.FLOAT, [1]))
    graph.graph.node.append(helper.make_node("Div", ["states", "temperature"], ["last_hidden_state"]))
    return graph


def with_wrong_output(graph: onnx.ModelProto) -> onnx.ModelProto:
    graph = copy.deepcopy(graph)
    rename_output(graph, "foo")
    graph.graph.output[0].name = "foo"
    return graph


def rename_output(graph: onnx.ModelProto, new: str) -> None:
    """Renames what nodes write, not what the graph declares."""
    for node in graph.graph.node:
        for i, name in enumerate(node.output):
            if name == "last_hidden_state":
                node.output[i] = new


def with_small_vocabulary(graph: onnx.ModelProto, n_tokens: int) -> onnx.ModelProto:
    graph = copy.deepcopy(graph)
    (table,) = (value for value in graph.graph.initializer if value.name.endswith("wte.weight"))
    rows = numpy_helper.to_array(table)[:n_tokens]
    table.CopyFrom(numpy_helper.from_array(rows.copy(), table.name))
    return graph


def save(graph: onnx.ModelProto, path: Path) -> None:
    onnx.checker.check_model(graph)
    path.parent.mkdir(exist_ok=True)
    onnx.save(graph, path)
    onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def layer_features(model, input_ids) -> dict:
    """The mean over positions of each layer, embedding first: `raw` as
    transformers' hidden_states, `normed` as the next layer's attention sees
    it; after the last layer both are what ln_f leaves."""
    with torch.no_grad():
        states = model.transformer(
            input_ids, output_hidden_states=True, use_cache=False, return_dict=True
        ).hidden_states
        norms = [block.ln_1 for block in model.transformer.h] + [torch.nn.Identity()]
        normed = [norm(state) for norm, state in zip(norms, states, strict=True)]
    return {
        "layers_raw": [state[0].mean(dim=0).tolist() for state in states],
        "layers_normed": [state[0].mean(dim=0).tolist() for state in normed],
    }


def expected(model) -> dict:
    """What every whole folder must answer for these tokens, by PyTorch."""
    random = np.random.RandomState(SEED)
    images = random.randint(0, N_COLORS, (2, SIDE * SIDE))
    cases = []
    for tokens in images.tolist():
        case = {"tokens": tokens}
        for context, ids in (("raw", tokens), ("sos_shifted", [SOS, *tokens[:-1]])):
            input_ids = torch.tensor([ids])
            with torch.no_grad():
                states = Features(model)(input_ids)[0]
                logits = Logits(model)(input_ids)[0]
            case[context] = {
                "mean": states.mean(dim=0).tolist(),
                "first": states[0].tolist(),
                "last": states[-1].tolist(),
                "logits": logits.tolist(),
                **layer_features(model, input_ids),
            }
        cases.append(case)
    return {"relative_error_max": 1e-5, "cases": cases}


def main() -> None:
    model = random_model(
        ImageGPTConfig(
            vocab_size=N_COLORS + 1,
            n_positions=SIDE * SIDE,
            n_embd=16,
            n_layer=2,
            n_head=2,
            num_labels=len(LABELS),
            architectures=["ImageGPTForImageClassification"],
        ),
        SEED,
    )
    clusters = make_palette()
    plain = config(model)
    labeled = config(model, id2label={str(i): label for i, label in enumerate(LABELS)})
    labeled["label2id"] = {label: i for i, label in enumerate(LABELS)}

    micro = folder("micro", labeled, preprocessor(clusters))
    export(Features(model).eval(), "last_hidden_state", micro / "model.onnx")
    export(Logits(model).eval(), "logits", micro / "model_classification.onnx")
    graph = onnx.load(micro / "model.onnx")
    write_json(FOLDER / "expected.json", expected(model))

    checkpoint = folder("micro-checkpoint", labeled, preprocessor(clusters))
    model.save_pretrained(checkpoint)
    write_json(checkpoint / "config.json", labeled)

    multilabel = labeled | {"problem_type": "multi_label_classification"}
    path = folder("micro-multilabel", multilabel, preprocessor(clusters))
    shutil.copy(micro / "model_classification.onnx", path)

    path = folder("no-labels", plain, preprocessor(clusters))
    shutil.copy(micro / "model_classification.onnx", path)

    path = folder("optimum", plain, preprocessor(clusters))
    export_optimum(model, path / "onnx" / "model.onnx")

    path = folder("int32", plain, preprocessor(clusters))
    save(with_int32_input(graph), path / "model" / "model.onnx")

    path = folder("bool-mask", plain, preprocessor(clusters))
    optimum = onnx.load(FOLDER / "optimum" / "onnx" / "model.onnx")
    save(with_bool_mask(optimum), path / "onnx" / "model.onnx")

    path = folder("float16", plain, preprocessor(clusters))
    export_float16(model, path / "model.onnx")

    for n_images in (1, 3):
        path = folder(f"fixed-batch-{n_images}", labeled, preprocessor(clusters))
        save(with_fixed_batch(graph, n_images), path / "model.onnx")
        logits = onnx.load(micro / "model_classification.onnx")
        save(with_fixed_batch(logits, n_images), path / "model_classification.onnx")

    path = folder("unknown-input", plain, preprocessor(clusters))
    save(with_unknown_input(graph), path / "model.onnx")

    path = folder("wrong-output", plain, preprocessor(clusters))
    save(with_wrong_output(graph), path / "model.onnx")

    path = folder("vocab-too-small", plain | {"vocab_size": 10}, preprocessor(clusters))
    save(with_small_vocabulary(graph, 10), path / "model.onnx")

    path = folder("palette-short", plain, preprocessor(clusters[:-1]))
    save(graph, path / "model.onnx")

    path = folder("palette-wrong", plain, preprocessor([*clusters[:4], clusters[4][:2], *clusters[5:]]))
    save(graph, path / "model.onnx")

    # As transformers 5 writes it, under the newer keys.
    processor = ImageGPTImageProcessorPil(clusters=clusters, size=SIDE, resample=2)
    values = json.loads(processor.to_json_string())
    path = folder("new-style", plain, json.dumps(values, indent=2) + "\n")
    save(graph, path / "model.onnx")


if __name__ == "__main__":
    main()
