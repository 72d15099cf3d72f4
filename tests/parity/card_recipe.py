"""Exports a checkpoint as the model cards do: torch.onnx.export of ImageGPTModel.

    card_recipe.py SOURCE OUTPUT.onnx
    card_recipe.py --random-small FOLDER     (imagegpt-small's shape, random weights)

The graph has one output, last_hidden_state, and dynamic batch and sequence.
This is what the graphs of `imagegpt compile` are compared with.
"""

import json
import pathlib
import sys

import numpy
import torch
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling, ImageGPTModel


class LastHiddenState(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, input_ids):
        return self.model(input_ids=input_ids, use_cache=False, return_dict=True).last_hidden_state


def export(source, output):
    model = LastHiddenState(ImageGPTModel.from_pretrained(source, dtype=torch.float32).eval())
    ids = torch.randint(0, model.model.config.vocab_size, (1, model.model.config.n_positions))
    names = {0: "batch", 1: "sequence"}
    torch.onnx.export(
        model,
        (ids,),
        output,
        input_names=["input_ids"],
        output_names=["last_hidden_state"],
        dynamic_axes={"input_ids": names, "last_hidden_state": names},
        opset_version=17,
        dynamo=False,
    )


def random_small(folder):
    torch.manual_seed(0)
    ImageGPTForCausalImageModeling(ImageGPTConfig()).save_pretrained(folder)
    clusters = numpy.random.default_rng(0).uniform(-1, 1, (512, 3)).astype("float32")
    settings = {"do_resize": True, "do_normalize": True, "resample": 2, "size": 32}
    settings["clusters"] = clusters.tolist()
    (pathlib.Path(folder) / "preprocessor_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    if sys.argv[1] == "--random-small":
        random_small(sys.argv[2])
    else:
        export(sys.argv[1], sys.argv[2])
