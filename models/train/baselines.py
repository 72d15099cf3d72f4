"""Held-out losses that need no network, in nats a token, beside the model's.

    baselines.py

Counts come from the training pictures on white, skin tones too, which is what
the held-out pictures look like; strengths of smoothing are chosen on the
validation split. The model's own loss is computed in f32.
"""

import data
import network
import numpy as np
import torch
from transformers import ImageGPTForCausalImageModeling

STRENGTHS = (1.0, 3.0, 10.0, 30.0, 100.0, 300.0)
# The context of a pixel at the edge: no color.
EDGE = data.N_COLORS


def training_tokens(emoji: list[data.Emoji], quantizer: data.Quantizer) -> np.ndarray:
    chosen = [one for one in emoji if one.split == "train"]
    return quantizer(np.stack([data.plain(picture) for one in chosen for picture in one.pictures]))


def contexts(tokens: np.ndarray) -> dict[str, np.ndarray]:
    """What each pixel's prediction may look at, in raster order."""
    square = tokens.reshape(-1, data.SIDE, data.SIDE)
    above = np.full_like(square, EDGE)
    above[:, 1:] = square[:, :-1]
    previous = np.full_like(tokens, EDGE)
    previous[:, 1:] = tokens[:, :-1]
    return {"previous pixel": previous, "pixel above": above.reshape(tokens.shape)}


class Pair:
    """P(pixel | one other pixel), falling back on the unigram by counts."""

    def __init__(self, context: np.ndarray, tokens: np.ndarray, unigram: np.ndarray):
        self.counts = np.zeros((data.N_COLORS + 1, data.N_COLORS))
        np.add.at(self.counts, (context.ravel(), tokens.ravel()), 1)
        self.unigram = unigram

    def probabilities(self, context: np.ndarray, tokens: np.ndarray, strength: float) -> np.ndarray:
        seen = self.counts[context, tokens]
        return (seen + strength * self.unigram[tokens]) / (self.counts.sum(axis=1)[context] + strength)


def nats(probabilities: np.ndarray) -> float:
    return float(-np.log(probabilities).mean())


def baselines(train: np.ndarray, validation: np.ndarray, test: np.ndarray) -> dict[str, float]:
    counts = np.bincount(train.ravel(), minlength=data.N_COLORS) + 1.0
    unigram = counts / counts.sum()
    losses = {"uniform": float(np.log(data.N_COLORS)), "unigram": nats(unigram[test])}
    chosen = {}
    for name, context in contexts(train).items():
        pair = Pair(context, train, unigram)
        seen = contexts(validation)[name]
        strength = min(STRENGTHS, key=lambda value: nats(pair.probabilities(seen, validation, value)))
        chosen[name] = {
            part: pair.probabilities(contexts(tokens)[name], tokens, strength)
            for part, tokens in (("validation", validation), ("test", test))
        }
        losses[name] = nats(chosen[name]["test"])

    def mixed(part: str, share: float) -> np.ndarray:
        previous, above = (probabilities[part] for probabilities in chosen.values())
        return share * previous + (1 - share) * above

    share = min(np.linspace(0, 1, 21), key=lambda value: nats(mixed("validation", value)))
    losses["both, mixed"] = nats(mixed("test", share))
    return losses


@torch.no_grad()
def model_loss(model: ImageGPTForCausalImageModeling, tokens: np.ndarray) -> float:
    total = 0.0
    for start in range(0, len(tokens), 4):
        ids = torch.from_numpy(tokens[start : start + 4])
        total += network.loss(model, ids, torch.float32).item() * len(ids)
    return total / len(tokens)


def main() -> None:
    emoji = data.load()
    quantizer = data.Quantizer()
    train = training_tokens(emoji, quantizer)
    plain = {name: data.plain_tokens(emoji, name, quantizer) for name in data.SPLITS}
    print(f"nats a token on the {len(plain['test'])} emoji of the test split, on white")
    for name, value in baselines(train, plain["validation"], plain["test"]).items():
        print(f"{name:15} {value:.3f}")
    if (data.MODEL / "model.safetensors").exists():
        model = ImageGPTForCausalImageModeling.from_pretrained(data.MODEL, dtype=torch.float32).eval()
        network.check_against_transformers(model)
        print(f"{'models/emoji':15} {model_loss(model, plain['test']):.3f}")
        # A fifth of the training emoji, to see how much was learned by heart.
        print(f"{'  on training':15} {model_loss(model, plain['train'][::5]):.3f}")


if __name__ == "__main__":
    main()
