"""Measures the rounding error of 16-bit floats on models of random weights, with PyTorch on a CPU.

Prints ‖16 bit − fp32‖ / ‖fp32‖ of the pooled features (the worst layer), the last
hidden states and the logits, with everything in 16 bits as in compiled graphs: weights,
activations and the residual stream. The tolerances in src/model/precision.rs leave room
for these errors.
"""

import math

import torch
from torch.nn import functional
from torch_imagegpt import COLORS, SHAPES

# Number of tokens with which `imagegpt compile` verifies the largest models.
TOKENS = 16
STD = 0.02


def norm(x: torch.Tensor) -> torch.Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-5)).to(x.dtype)


def block(x: torch.Tensor, weights: list[torch.Tensor], heads: int) -> torch.Tensor:
    qkv, projection, expand, contract = weights
    rows, length, width = x.shape
    parts = (norm(x) @ qkv).view(rows, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attended = functional.scaled_dot_product_attention(*parts, is_causal=True)
    x = x + attended.transpose(1, 2).reshape(rows, length, width) @ projection
    inner = norm(x) @ expand
    return x + (inner * torch.sigmoid(1.702 * inner)) @ contract


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.float() - expected).norm() / expected.norm()).item()


def measure(shape: str, dtype: torch.dtype) -> None:
    layers, width, heads = SHAPES[shape]
    normal = lambda *size, std=STD: torch.randn(*size) * std  # noqa: E731
    narrow = STD / math.sqrt(2 * layers)
    x = normal(2, TOKENS, width) + normal(2, TOKENS, width)
    y = x.to(dtype)
    worst = 0.0
    for _ in range(layers):
        weights = [
            normal(width, 3 * width),
            normal(width, width, std=narrow),
            normal(width, 4 * width),
            normal(4 * width, width, std=narrow),
        ]
        x, y = block(x, weights, heads), block(y, [weight.to(dtype) for weight in weights], heads)
        worst = max(worst, error(norm(y).float().mean(1), norm(x).mean(1)))
    head = normal(width, COLORS)
    hidden, logits = error(norm(y), norm(x)), error(norm(y) @ head.to(dtype), norm(x) @ head)
    name = str(dtype).removeprefix("torch.")
    print(f"{shape:8} {name:9} features {worst:.1e}  hidden {hidden:.1e}  logits {logits:.1e}")


def main() -> None:
    torch.manual_seed(0)
    with torch.inference_mode():
        for shape in ("small", "medium", "large"):
            for dtype in (torch.float16, torch.bfloat16):
                measure(shape, dtype)


if __name__ == "__main__":
    main()
