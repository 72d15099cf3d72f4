"""Makes the .bin files beside it: make.py, with PyTorch.

pytorch_model.bin  a tiny ImageGPT as old checkpoints are: masks, a transposed
                   head, half and bfloat16 tensors
legacy.bin         the same in the format of PyTorch before 1.6
evil.bin           a state dict with an object whose pickle calls a function
"""

import os
import pathlib

import torch

here = pathlib.Path(__file__).parent
torch.manual_seed(0)
width, positions, vocabulary = 8, 4, 6


def grid(*shape):
    # Sixteenths, so that every type holds them exactly.
    return torch.randint(-16, 17, shape) / 16


state = {
    "transformer.wte.weight": grid(vocabulary, width),
    "transformer.wpe.weight": grid(positions, width),
    "transformer.ln_f.weight": grid(width),
    "lm_head.weight": grid(width, vocabulary - 1).t(),
}
for part, inputs, outputs in [
    ("attn.c_attn", width, 3 * width),
    ("attn.c_proj", width, width),
    ("mlp.c_fc", width, 4 * width),
    ("mlp.c_proj", 4 * width, width),
]:
    state[f"transformer.h.0.{part}.weight"] = grid(inputs, outputs).half()
    state[f"transformer.h.0.{part}.bias"] = torch.zeros(outputs, dtype=torch.bfloat16)
for part in ["ln_1", "ln_2"]:
    state[f"transformer.h.0.{part}.weight"] = grid(width).double()
mask = torch.tril(torch.ones((1, 1, positions, positions), dtype=torch.uint8))
state["transformer.h.0.attn.bias"] = mask
state["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
torch.save(state, here / "pytorch_model.bin")
torch.save(state, here / "legacy.bin", _use_new_zipfile_serialization=False)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/imagegpt-was-here",)


torch.save({"transformer.wte.weight": Evil()}, here / "evil.bin")
