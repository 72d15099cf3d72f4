"""Makes models/untrained: a small ImageGPT with random weights.

The folder has the layout of the published ONNX exports, so everything that
works on it works on a real model's folder. Weights come from a fixed seed and
are never trained.

    python models/make_untrained.py                      # the ONNX folder
    python models/make_untrained.py --emoji DIR          # its palette as well
    python models/make_untrained.py --checkpoint DIR     # the same weights as a
                                                         # transformers checkpoint

DIR of --emoji is package/img/google/64 of the npm package
emoji-datasource-google 16.0.0 (npm pack, then untar). Without --emoji the
palette that is already in the folder stays.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from PIL import Image
from transformers import ImageGPTConfig, ImageGPTForImageClassification

SEED = 20
FOLDER = Path(__file__).resolve().parent / "untrained"
NOTICE = "untrained: randomly initialized weights, for tests and demonstrations only"
# Wide enough that attention is far from uniform: at the usual 0.02 every
# position attends alike, and a wrong mask or a swapped head would not show.
WEIGHT_STD = 0.125
RELATIVE_ERROR_MAX = 1e-5


def make_model() -> ImageGPTForImageClassification:
    config = ImageGPTConfig(
        vocab_size=513,
        n_positions=1024,
        n_embd=64,
        n_layer=3,
        n_head=4,
        architectures=["ImageGPTForImageClassification"],
    )
    return random_model(config, SEED)


def random_model(config: ImageGPTConfig, seed: int) -> ImageGPTForImageClassification:
    model = ImageGPTForImageClassification(config).eval()
    # RandomState, because numpy promises that its streams never change.
    random = np.random.RandomState(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = random.standard_normal(tuple(parameter.shape))
            if is_norm(name):
                # Published norms are not all ones, and a forgotten or
                # misplaced one should show.
                noise = 1 + 0.2 * noise
            elif name.endswith(".bias"):
                # Published biases are zero; fine-tuned ones are not.
                noise = 0.05 * noise
            else:
                noise = WEIGHT_STD * noise
            parameter.copy_(torch.from_numpy(noise.astype(np.float32)))
    return model


def is_norm(name: str) -> bool:
    return any(part in name for part in ("ln_1.", "ln_2.", "ln_f."))


def config_json(config: ImageGPTConfig) -> dict:
    values = config.to_dict()
    # transformers fills in LABEL_0 and LABEL_1. The published checkpoints name
    # no labels, and neither does a random head.
    for key in ("id2label", "label2id"):
        values.pop(key, None)
    return {"notice": NOTICE} | values


class Features(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.transformer = model.transformer

    def forward(self, input_ids):
        return self.transformer(input_ids, use_cache=False, return_dict=False)[0]


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.transformer = model.transformer
        self.score = model.score

    def forward(self, input_ids):
        states = self.transformer(input_ids, use_cache=False, return_dict=False)[0]
        return self.score(states.mean(dim=1))


def export(module: torch.nn.Module, output: str, path: Path) -> None:
    """Exports as transformers.onnx did: TorchScript, dynamic batch and length."""
    axes = {0: "batch", 1: "sequence"}
    output_axes = axes if output == "last_hidden_state" else {0: "batch"}
    n_positions = module.transformer.config.n_positions
    example = torch.arange(2 * n_positions).view(2, -1) % module.transformer.config.vocab_size
    torch.onnx.export(
        module,
        (example,),
        str(path),
        input_names=["input_ids"],
        output_names=[output],
        dynamic_axes={"input_ids": axes, output: output_axes},
        opset_version=17,
        dynamo=False,
    )
    onnx.checker.check_model(onnx.load(path))
    check(module, output, path)


def check(module: torch.nn.Module, output: str, path: Path) -> None:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    random = np.random.RandomState(SEED)
    config = module.transformer.config
    for batch_size in (1, 3):
        tokens = random.randint(0, config.vocab_size, (batch_size, config.n_positions))
        (result,) = session.run([output], {"input_ids": tokens.astype(np.int64)})
        with torch.no_grad():
            reference = module(torch.from_numpy(tokens)).numpy()
        error = np.linalg.norm(result - reference) / np.linalg.norm(reference)
        print(f"{path.name}: batch {batch_size}, relative error {error:.1e}")
        assert result.shape == reference.shape
        assert error <= RELATIVE_ERROR_MAX, error


def make_palette(emoji: Path) -> list[list[float]]:
    """512 colors in [-1, 1] by k-means over small pictures."""
    from sklearn.cluster import KMeans
    from sklearn.datasets import load_sample_images

    colors = []
    for path in sorted(emoji.glob("*.png")):
        picture = Image.open(path).convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        picture = Image.alpha_composite(white, picture).convert("RGB")
        colors.append(np.array(picture.resize((32, 32), Image.Resampling.BILINEAR)))
    for photo in load_sample_images().images:
        picture = Image.fromarray(photo).resize((128, 128), Image.Resampling.BILINEAR)
        colors.append(np.array(picture))
    flat = np.concatenate([color.reshape(-1, 3) for color in colors])
    # Each color weighs by the square root of its count: white is most of what
    # emoji show, but it needs one center only.
    unique, counts = np.unique(flat, axis=0, return_counts=True)
    random = np.random.RandomState(SEED)
    picked = random.permutation(len(unique))[:100_000]
    kmeans = KMeans(512, n_init=1, max_iter=60, random_state=SEED)
    kmeans.fit(unique[picked] / 127.5 - 1, sample_weight=np.sqrt(counts[picked]))
    # The published palettes are f32 values written as f64.
    centers = np.clip(kmeans.cluster_centers_, -1, 1).astype(np.float32)
    # Brightest first; white needs token 0 no more than any other.
    centers = centers[np.argsort(-centers.sum(axis=1), kind="stable")]
    print(f"palette: {len(unique)} colors, inertia {kmeans.inertia_:.1f}")
    return centers.astype(np.float64).tolist()


def preprocessor_json(clusters: list[list[float]]) -> str:
    """The published keys, with one center a line."""
    values = {
        "do_normalize": True,
        "do_resize": True,
        "feature_extractor_type": "ImageGPTFeatureExtractor",
        "resample": 2,
        "size": 32,
    }
    centers = ",\n".join("    " + json.dumps(center) for center in clusters)
    rest = json.dumps(values, indent=2).removeprefix("{\n")
    return '{\n  "clusters": [\n' + centers + "\n  ],\n" + rest + "\n"


def write_json(path: Path, values: dict) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--emoji", type=Path, help="folder of 64x64 PNGs to make the palette from")
    parser.add_argument("--checkpoint", type=Path, help="write a transformers checkpoint there, and nothing else")
    arguments = parser.parse_args()

    model = make_model()
    preprocessor = FOLDER / "preprocessor_config.json"
    if arguments.checkpoint:
        arguments.checkpoint.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(arguments.checkpoint)
        write_json(arguments.checkpoint / "config.json", config_json(model.config))
        copy = arguments.checkpoint / preprocessor.name
        copy.write_text(preprocessor.read_text())
        return

    FOLDER.mkdir(exist_ok=True)
    if arguments.emoji:
        preprocessor.write_text(preprocessor_json(make_palette(arguments.emoji)))
    write_json(FOLDER / "config.json", config_json(model.config))
    with torch.no_grad():
        export(Features(model).eval(), "last_hidden_state", FOLDER / "model.onnx")
        export(Logits(model).eval(), "logits", FOLDER / "model_classification.onnx")


if __name__ == "__main__":
    main()
