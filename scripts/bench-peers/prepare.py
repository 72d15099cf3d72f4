"""Makes everything that bench.py compares, in the directory given.

    prepare.py DIR

| file | content |
|---|---|
| small/ | a checkpoint of imagegpt-small's architecture with random weights |
| recipe.onnx | the model card's recipe: last_hidden_state of all layers |
| features.onnx | mean features of LAYER, plain operators, one image of fixed size |
| features-int8.xml | the same after NNCF's post-training quantization |
| weights-int8.xml | the same with weights in 8 bits, for which OpenVINO quantizes rows as they come |
| inputs.npy | images as color tokens |
| features.npy, recipe.npy | the answers of each graph for them, from PyTorch in float64 |
"""

import sys
from pathlib import Path

import nncf
import numpy as np
import openvino
import torch
from systems import LAYER
from transformers import ImageGPTModel

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests" / "parity"))
import card_recipe  # noqa: E402

N_INPUTS = 3
N_CALIBRATION = 8
N_COLORS = 512
POSITIONS = 1024


class MeanState(torch.nn.Module):
    """Mean over positions of the state after the final norm."""

    def __init__(self, model: ImageGPTModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).last_hidden_state.mean(1)


def cut(model: ImageGPTModel) -> ImageGPTModel:
    """Leaves what features of LAYER need: its blocks, and the norm of the next block's attention."""
    model.ln_f = model.h[LAYER].ln_1
    model.h = model.h[:LAYER]
    return model


def load(folder: Path, dtype: torch.dtype) -> ImageGPTModel:
    return ImageGPTModel.from_pretrained(folder, dtype=dtype).eval()


def answers(model: ImageGPTModel, inputs: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.concatenate([MeanState(model)(torch.from_numpy(ids)).numpy() for ids in inputs])


def export(model: ImageGPTModel, file: Path) -> None:
    torch.onnx.export(
        MeanState(model),
        (torch.zeros((1, POSITIONS), dtype=torch.int64),),
        str(file),
        input_names=["input_ids"],
        output_names=["features"],
        opset_version=17,
        dynamo=False,
    )


def quantize(source: Path, file: Path, images: np.ndarray) -> None:
    """Calibrates as NNCF proposes for transformers."""
    quantized = nncf.quantize(
        openvino.Core().read_model(source),
        nncf.Dataset(list(images), lambda ids: {"input_ids": ids}),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(images),
    )
    openvino.save_model(quantized, file, compress_to_fp16=False)


def compress(source: Path, file: Path) -> None:
    mode = nncf.CompressWeightsMode.INT8_SYM
    compressed = nncf.compress_weights(openvino.Core().read_model(source), mode=mode)
    openvino.save_model(compressed, file, compress_to_fp16=False)


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    small = folder / "small"
    card_recipe.random_small(small)
    card_recipe.export(small, str(folder / "recipe.onnx"))
    export(cut(load(small, torch.float32)), folder / "features.onnx")

    rng = np.random.default_rng(0)
    images = rng.integers(0, N_COLORS, (N_INPUTS + N_CALIBRATION, 1, POSITIONS))
    inputs, calibration = images[:N_INPUTS], images[N_INPUTS:]
    np.save(folder / "inputs.npy", inputs)
    exact = load(small, torch.float64)
    np.save(folder / "recipe.npy", answers(exact, inputs))
    np.save(folder / "features.npy", answers(cut(exact), inputs))
    quantize(folder / "features.onnx", folder / "features-int8.xml", calibration)
    compress(folder / "features.onnx", folder / "weights-int8.xml")


if __name__ == "__main__":
    main()
