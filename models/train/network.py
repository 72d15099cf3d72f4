"""ImageGPT as transformers has it, and a faster way through the same weights.

`make_model` gives an ordinary ImageGPTForCausalImageModeling. `logits` computes
what its forward computes, with causal attention in pieces and in a lower
precision where asked: on two cores that is several times faster. The two are
compared whenever a training begins.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

START = 512
POSITIONS = 1024
SIDE = 32
# Rows of queries that attend at once on a CPU. Later keys are left out of each
# piece, which saves nearly half of the work that a whole square would take.
PIECE = 128


def make_model(
    width: int, layers: int, heads: int, clusters: np.ndarray, seed: int, side: int = SIDE
) -> ImageGPTForCausalImageModeling:
    torch.manual_seed(seed)
    config = ImageGPTConfig(
        vocab_size=START + 1,
        n_positions=side * side,
        n_embd=width,
        n_layer=layers,
        n_head=heads,
        # Every picture is seen in another place and on another ground each
        # time; dropout would only slow a training this short.
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        architectures=["ImageGPTForCausalImageModeling"],
    )
    model = ImageGPTForCausalImageModeling(config)
    random = np.random.RandomState(seed)
    with torch.no_grad():
        # Colors near one another and neighboring positions begin alike, so
        # that a short training need not find out which those are.
        colors = fourier_features(clusters, width, 1.5, random)
        model.transformer.wte.weight[:START] = colors
        model.transformer.wte.weight[START] = torch.randn(width)
        rows, columns = np.divmod(np.arange(side * side), side)
        places = np.concatenate([waves(rows, width // 2, side), waves(columns, width // 2, side)], axis=1)
        model.transformer.wpe.weight.copy_(torch.from_numpy(places).float())
        model.lm_head.weight.copy_(colors * (0.5 / math.sqrt(width)))
        for block in model.transformer.h:
            for layer in (block.attn.c_attn, block.mlp.c_fc):
                layer.weight.normal_(0, 0.7 / math.sqrt(width))
            # A block begins as the identity.
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                layer.weight.zero_()
            block.ln_1.weight.fill_(1)
            block.ln_2.weight.fill_(1)
            # The published models have no biases: theirs here are zero too.
            for name, parameter in block.named_parameters():
                if name.endswith(".bias"):
                    parameter.zero_()
                    parameter.requires_grad_(False)
        model.transformer.ln_f.weight.fill_(1)
    return model


def fourier_features(points: np.ndarray, width: int, scale: float, random: np.random.RandomState) -> torch.Tensor:
    """Features of length sqrt(width) whose products fall with distance."""
    directions = random.standard_normal((points.shape[1], width)) * scale
    phases = random.uniform(0, 2 * math.pi, width)
    return torch.from_numpy(np.sqrt(2) * np.cos(points @ directions + phases)).float()


def waves(places: np.ndarray, width: int, side: int) -> np.ndarray:
    """Sines and cosines of a coordinate, from one pixel's wave to the side's."""
    frequencies = math.pi * np.geomspace(1 / side, 0.5, width // 2)
    angles = places[:, None] * frequencies
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Causal attention of (batch, heads, positions, head width)."""
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)
    query = query * query.shape[-1] ** -0.5
    length = query.shape[-2]
    later = torch.full((PIECE, PIECE), -math.inf, dtype=query.dtype).triu(1)
    parts = []
    for start in range(0, length, PIECE):
        end = min(start + PIECE, length)
        scores = query[..., start:end, :] @ key[..., :end, :].transpose(-1, -2)
        # Only the last square of a piece has keys that are still to come.
        scores[..., start:end].add_(later[: end - start, : end - start])
        parts.append(scores.softmax(-1) @ value[..., :end, :])
    return torch.cat(parts, dim=-2)


def block_forward(
    states: torch.Tensor, weights: tuple[torch.Tensor, ...], heads: int, eps: float, dropout: float = 0.0
) -> torch.Tensor:
    batch, length, width = states.shape
    ln_1, c_attn, attn_proj, ln_2, c_fc, mlp_proj = weights
    mixed = F.rms_norm(states, (width,), ln_1, eps) @ c_attn
    query, key, value = mixed.view(batch, length, 3, heads, width // heads).permute(2, 0, 3, 1, 4)
    attended = attend(query, key, value).transpose(1, 2).reshape(batch, length, width)
    states = states + dropped(attended @ attn_proj, dropout)
    inner = F.rms_norm(states, (width,), ln_2, eps) @ c_fc
    inner = inner * torch.sigmoid(1.702 * inner)
    return states + dropped(inner @ mlp_proj, dropout)


def dropped(states: torch.Tensor, share: float) -> torch.Tensor:
    """Without a random share of the numbers, in training only."""
    return F.dropout(states, share) if share else states


# Fused element-wise steps make a training step a fifth to a third faster; all
# blocks share what is compiled.
compiled_block_forward = torch.compile(block_forward)


def block_weights(block: torch.nn.Module, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    modules = (block.ln_1, block.attn.c_attn, block.attn.c_proj, block.ln_2, block.mlp.c_fc, block.mlp.c_proj)
    return tuple(module.weight.to(dtype) for module in modules)


def logits(
    model: ImageGPTForCausalImageModeling,
    inputs: torch.Tensor,
    dtype: torch.dtype,
    forward=block_forward,
    dropout: float = 0.0,
) -> torch.Tensor:
    """What the model's own forward gives, in f32, if its biases are zero and nothing is dropped."""
    body = model.transformer
    states = (body.wte.weight[inputs] + body.wpe.weight[: inputs.shape[1]]).to(dtype)
    states = dropped(states, dropout)
    for block in body.h:
        states = forward(states, block_weights(block, dtype), model.config.n_head, block.ln_1.eps, dropout)
    states = F.rms_norm(states, states.shape[-1:], body.ln_f.weight.to(dtype), body.ln_f.eps)
    return (states @ model.lm_head.weight.to(dtype).T).float()


def shifted(ids: torch.Tensor) -> torch.Tensor:
    """[SOS, x1 ... x1023]: the start token first, the last pixel dropped."""
    return torch.cat([torch.full_like(ids[:, :1], START), ids[:, :-1]], dim=1)


def loss(
    model: ImageGPTForCausalImageModeling,
    ids: torch.Tensor,
    dtype: torch.dtype,
    forward=block_forward,
    dropout: float = 0.0,
) -> torch.Tensor:
    """Nats a token."""
    scores = logits(model, shifted(ids), dtype, forward, dropout)
    return F.cross_entropy(scores.flatten(0, 1), ids.flatten())


def check_against_transformers(model: ImageGPTForCausalImageModeling) -> None:
    """The fast way and transformers' own agree, on weights off their start."""
    config = model.config
    other = ImageGPTForCausalImageModeling(config).eval()
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if ".ln_" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith(".bias"):
                parameter.zero_()
            else:
                parameter.normal_(0, 0.08)
        ids = torch.randint(0, START, (1, config.n_positions))
        ours = logits(other, shifted(ids), torch.float32)
        theirs = other(input_ids=shifted(ids), use_cache=False).logits
        error = ((ours - theirs).norm() / theirs.norm()).item()
    assert error < 1e-4, error
