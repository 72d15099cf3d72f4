"""Measures ImageGPT in PyTorch, written for speed, with random weights.

    torch_imagegpt.py SHAPE PRECISION DEVICE BATCH_SIZES SECONDS [VARIANT]

Measures `features` (the mean after the norm in front of the layer two thirds up)
and `hidden` (the mean after the last norm), eagerly and under torch.compile, with
scaled_dot_product_attention; and transformers' own model if it is installed. With a
VARIANT other than `all`, only that variant of `features` is measured. Prints a line of
JSON after each variant, with all rows so far.
"""

import json
import sys
import time
from statistics import median

import torch
from torch import nn
from torch.nn import functional

# Layers, width and heads, as in src/compile/random.rs.
SHAPES = {
    "tiny": (3, 64, 4),
    "small": (24, 512, 8),
    "medium": (36, 1024, 8),
    "large": (48, 1536, 16),
}
POSITIONS, COLORS = 1024, 512
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Block(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.ln_1, self.ln_2 = nn.RMSNorm(width, eps=1e-5), nn.RMSNorm(width, eps=1e-5)
        # Published biases are zero, and our graphs have no biases either.
        self.c_attn = nn.Linear(width, 3 * width, bias=False)
        self.c_proj = nn.Linear(width, width, bias=False)
        self.c_fc = nn.Linear(width, 4 * width, bias=False)
        self.mlp_proj = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        qkv = self.c_attn(self.ln_1(x)).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        attended = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.c_proj(attended.transpose(1, 2).reshape(batch, length, width))
        inner = self.c_fc(self.ln_2(x))
        return x + self.mlp_proj(inner * torch.sigmoid(1.702 * inner))


class ImageGpt(nn.Module):
    """The first layers of ImageGPT; the output is the mean after the next norm."""

    def __init__(self, shape: str, layers: int):
        super().__init__()
        _, width, heads = SHAPES[shape]
        self.wte, self.wpe = nn.Embedding(COLORS + 1, width), nn.Embedding(POSITIONS, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.wte(ids) + self.wpe.weight
        for block in self.blocks:
            x = block(x)
        return self.norm(x).float().mean(dim=1)


def compiled(model: ImageGpt) -> ImageGpt:
    """Compiles each block alone: blocks share kernels, so 48 layers compile like one."""
    for block in model.blocks:
        block.compile(dynamic=False)
    return model


class Transformers(nn.Module):
    """transformers' model with all layers, as in its model card."""

    def __init__(self, shape: str):
        super().__init__()
        from transformers import ImageGPTConfig, ImageGPTModel

        layers, width, heads = SHAPES[shape]
        config = ImageGPTConfig(n_layer=layers, n_embd=width, n_head=heads, n_positions=POSITIONS)
        self.model = ImageGPTModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        states = self.model(ids, use_cache=False).last_hidden_state
        return states.float().mean(dim=1)


def rate(model: nn.Module, batch: int, device: str, seconds: float) -> tuple[float, int]:
    """Returns images per second, including the copies of ids and means, and the number of runs."""
    ids = torch.randint(0, COLORS, (batch, POSITIONS))
    times = []

    def once() -> None:
        started = time.perf_counter()
        # The copy back waits for the device.
        model(ids.to(device)).cpu()
        times.append(time.perf_counter() - started)

    for _ in range(3):
        once()
    times.clear()
    until = time.perf_counter() + seconds
    while not times or time.perf_counter() < until:
        once()
    return batch / median(times), len(times)


def main() -> None:
    shape, precision, device, sizes, seconds = sys.argv[1:6]
    only = sys.argv[6] if len(sys.argv) > 6 else "all"
    layers = SHAPES[shape][0]
    # Default of `imagegpt compile` without --feature-layer.
    feature_layer = -(-2 * layers // 3)
    dtype = DTYPES[precision]
    variants = {
        ("features", "eager"): lambda: ImageGpt(shape, feature_layer),
        ("features", "torch.compile"): lambda: compiled(ImageGpt(shape, feature_layer)),
        ("hidden", "eager"): lambda: ImageGpt(shape, layers),
        ("hidden", "torch.compile"): lambda: compiled(ImageGpt(shape, layers)),
        ("hidden", "transformers"): lambda: Transformers(shape),
    }
    if only != "all":
        variants = {name: make for name, make in variants.items() if name == ("features", only)}
    batch_sizes = [int(size) for size in sizes.split(",")]
    share = float(seconds) / len(variants) / len(batch_sizes)
    rows, failed = [], {}
    torch.manual_seed(0)
    for (graph, variant), make in variants.items():
        try:
            with torch.inference_mode():
                model = make().to(device=device, dtype=dtype).eval()
                for batch in batch_sizes:
                    per_second, runs = rate(model, batch, device, share)
                    rows.append(
                        {
                            "graph": graph,
                            "variant": variant,
                            "batch_size": batch,
                            "images_per_second": per_second,
                            "runs": runs,
                        }
                    )
        # A variant that fails, such as for a missing package, must not end the
        # others.
        except Exception as error:
            failed[f"{graph}, {variant}"] = str(error).strip().splitlines()[-1][:200]
        model = None
        if device == "cuda":
            torch.cuda.empty_cache()
        found = {"torch_version": torch.__version__, "rows": rows, "failed": failed}
        print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
