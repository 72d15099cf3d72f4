"""Trains the model in models/emoji and writes it in transformers' format.

    train.py             # trains, or goes on where it stopped, then exports
    train.py --export    # exports the last checkpoint as it is

Progress goes to target/train/log.jsonl, checkpoints to target/train, and the
finished model to models/emoji. A killed run goes on from its last checkpoint
when it is started again with the same flags; only how long it is to train may
differ, as long as the learning rate has not begun to fall. With --minutes the
learning rate falls by the clock, so that a run on a busy machine ends in time.
"""

import argparse
import json
import math
import shutil
import time
from pathlib import Path

import data
import network
import numpy as np
import torch

RUN = data.ROOT / "target" / "train"
CHECKPOINT = RUN / "checkpoint.pt"
LOG = RUN / "log.jsonl"

CHECKPOINT_EVERY = 50
EVALUATE_EVERY = 200
# Steps that one point of the exported curve is the mean of.
CURVE_STEPS = 25
# Learning rates that transformers of this size take well with Muon and AdamW.
MUON_RATE = 0.02
ADAM_RATE = 0.002
WARM_UP_STEPS = 50
# More than any run with --minutes gets to.
STEPS_MAX = 1_000_000


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal by Newton-Schulz steps, for hidden matrices.

    Every direction of an update then has the same size, which learns from far
    fewer pictures than Adam does. The method is Keller Jordan's (2024).
    Matrices of one shape are done in one batch.
    """

    def __init__(self, parameters, lr: float, momentum: float = 0.95, decay: float = 0.1):
        super().__init__(parameters, {"lr": lr, "momentum": momentum, "decay": decay})

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            by_shape: dict[tuple, list] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                average = state["momentum"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(average, group["momentum"])
                # Query, key and value are three matrices side by side.
                parts = 3 if parameter.shape[1] == 3 * parameter.shape[0] else 1
                for target, part in zip(parameter.chunk(parts, dim=1), update.chunk(parts, dim=1), strict=True):
                    by_shape.setdefault(tuple(part.shape), []).append((target, part))
            for (n_in, n_out), pairs in by_shape.items():
                updates = orthogonal(torch.stack([part for _, part in pairs]))
                rate = group["lr"] * max(1.0, n_out / n_in) ** 0.5
                for (target, _), update in zip(pairs, updates, strict=True):
                    target.mul_(1 - group["lr"] * group["decay"]).add_(update, alpha=-rate)


def orthogonal(matrices: torch.Tensor) -> torch.Tensor:
    """About the nearest matrices whose singular values are all near 1."""
    dtype = matrices.dtype
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.transpose(1, 2) if tall else matrices).bfloat16()
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.transpose(1, 2)
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return (x.transpose(1, 2) if tall else x).to(dtype)


class Batches(torch.utils.data.Dataset):
    """The batch of each step, which depends on the seed and the step alone."""

    def __init__(
        self, emoji: list[data.Emoji], first: int, steps: int, size: int, seed: int, side: int = data.SIDE
    ):
        self.emoji = [one for one in emoji if one.split == "train"]
        self.quantizer = data.Quantizer()
        self.first, self.steps, self.size, self.seed, self.side = first, steps, size, seed, side
        self.round, self.order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return self.steps - self.first

    def __getitem__(self, idx: int) -> torch.Tensor:
        step = self.first + idx
        random = np.random.default_rng((self.seed, step))
        views = []
        for n in range(step * self.size, (step + 1) * self.size):
            # Every emoji once in each round, in another order each time.
            round_idx, place = divmod(n, len(self.emoji))
            if round_idx != self.round:
                self.order = np.random.default_rng((self.seed, round_idx, 1)).permutation(len(self.emoji))
                self.round = round_idx
            views.append(data.augment(self.emoji[self.order[place]], random, side=self.side))
        return torch.from_numpy(self.quantizer(np.stack(views)))


def rate(step: int, done: float, decay: float) -> float:
    """Share of the learning rate: a short rise, a plateau, a fall to zero."""
    return min(1.0, (step + 1) / WARM_UP_STEPS, max(0.0, 1 - done) / decay)


def make_optimizers(model) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    matrices = [p for name, p in model.named_parameters() if p.requires_grad and p.ndim == 2 and ".h." in name]
    chosen = {id(parameter) for parameter in matrices}
    others = [p for p in model.parameters() if p.requires_grad and id(p) not in chosen]
    return [
        Muon(matrices, lr=MUON_RATE),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learn(
    model,
    optimizers: list[torch.optim.Optimizer],
    ids: torch.Tensor,
    share: float,
    forward,
    dropout: float = 0.0,
) -> torch.Tensor:
    """One step at a share of the learning rates; the loss before it, still on the device."""
    for optimizer, base in zip(optimizers, (MUON_RATE, ADAM_RATE), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = base * share
    value = network.loss(model, ids, torch.bfloat16, forward, dropout)
    value.backward()
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return value.detach()


@torch.no_grad()
def held_out_loss(model, tokens: np.ndarray, device: str, dtype: torch.dtype, forward, size: int = 8) -> float:
    total = 0.0
    for start in range(0, len(tokens), size):
        ids = torch.from_numpy(tokens[start : start + size]).to(device)
        total += network.loss(model, ids, dtype, forward).item() * len(ids)
    return total / len(tokens)


def save(state: dict) -> None:
    """Under its name only when it is whole."""
    partial = CHECKPOINT.with_suffix(".partial")
    torch.save(state, partial)
    partial.rename(CHECKPOINT)


def train(arguments: argparse.Namespace) -> None:
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    forward = network.block_forward if arguments.eager else network.compiled_block_forward
    RUN.mkdir(parents=True, exist_ok=True)
    emoji = data.load()
    quantizer = data.Quantizer()
    # Half of the validation split is enough for a curve.
    validation = data.plain_tokens(emoji, "validation", quantizer)[::2]

    model = network.make_model(arguments.width, arguments.layers, arguments.heads, quantizer.clusters, data.SEED)
    network.check_against_transformers(model)
    model.to(device)
    optimizers = make_optimizers(model)
    first, seconds = 0, 0.0
    if CHECKPOINT.exists():
        state = torch.load(CHECKPOINT, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, stored in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(stored)
        first, seconds = state["step"], state["seconds"]
        print(f"goes on from step {first}", flush=True)
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{n_parameters / 1e6:.2f} M parameters on {device}", flush=True)

    steps = arguments.steps if arguments.minutes is None else STEPS_MAX
    batches = torch.utils.data.DataLoader(
        Batches(emoji, first, steps, arguments.batch, data.SEED),
        batch_size=None,
        num_workers=0 if device == "cpu" else 12,
    )
    started = time.monotonic() - seconds
    for step, ids in enumerate(batches, start=first):
        done = step / steps if arguments.minutes is None else seconds / (60 * arguments.minutes)
        value = learn(model, optimizers, ids.to(device), rate(step, done, arguments.decay), forward).item()
        n_done = step + 1
        seconds = time.monotonic() - started
        last = n_done == steps or arguments.minutes is not None and seconds >= 60 * arguments.minutes
        entry = {"step": n_done, "train": round(value, 4), "seconds": round(seconds, 1)}
        if not math.isfinite(entry["train"]):
            raise SystemExit(f"the loss is {entry['train']} at step {n_done}")
        if n_done % EVALUATE_EVERY == 0 or last:
            entry["validation"] = round(held_out_loss(model, validation, device, torch.bfloat16, forward), 4)
        with LOG.open("a") as log:
            log.write(json.dumps(entry) + "\n")
        if n_done % 10 == 0:
            speed = (n_done - first) * arguments.batch / (seconds - (state["seconds"] if first else 0.0))
            print(f"{entry} {speed:.2f} pictures/s", flush=True)
        if n_done % CHECKPOINT_EVERY == 0 or last:
            stored = [optimizer.state_dict() for optimizer in optimizers]
            save({
                "model": model.state_dict(),
                "optimizers": stored,
                "step": n_done,
                "seconds": seconds,
                "shape": (arguments.width, arguments.layers, arguments.heads),
                "batch": arguments.batch,
            })
        if last:
            break


def export() -> None:
    """The last checkpoint as transformers stores models, and its curve."""
    state = torch.load(CHECKPOINT, map_location="cpu", weights_only=True)
    model = network.make_model(*state["shape"], data.Quantizer().clusters, data.SEED)
    model.load_state_dict(state["model"])
    write_model(model, data.MODEL)
    curve = read_curve(state["step"]) | {"batch": state["batch"], "seconds": round(state["seconds"])}
    (data.MODEL / "curve.json").write_text(json.dumps(curve) + "\n")
    draw_curve(curve, data.MODEL)
    print(f"wrote step {state['step']} to {data.MODEL.relative_to(data.ROOT)}")


def write_model(model, folder: Path) -> None:
    """The model as transformers stores it, in fp16, under its name only when it is whole."""
    partial = folder / "partial"
    shutil.rmtree(partial, ignore_errors=True)
    # Half the bytes; each weight moves by less than a part in a thousand.
    model.half().save_pretrained(partial)
    (partial / "model.safetensors").chmod(0o644)
    for name in ("config.json", "model.safetensors"):
        (partial / name).replace(folder / name)
    shutil.rmtree(partial)


def read_curve(last: int) -> dict:
    """Losses by step; a step that was run again after a stop counts once."""
    entries = {}
    for line in LOG.read_text().splitlines():
        entry = json.loads(line)
        entries[entry["step"]] = entry
    entries = [entries[step] for step in sorted(entries) if step <= last]
    steps = range(0, len(entries) - CURVE_STEPS + 1, CURVE_STEPS)
    means = [np.mean([entry["train"] for entry in entries[start : start + CURVE_STEPS]]) for start in steps]
    return {
        "train": [[start + CURVE_STEPS, round(float(mean), 4)] for start, mean in zip(steps, means, strict=True)],
        "validation": [[entry["step"], entry["validation"]] for entry in entries if "validation" in entry],
    }


def draw_curve(curve: dict, folder: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=100)
    axes.plot(*zip(*curve["train"], strict=True), color="#9db4c0", label="training pictures, moved and on grounds")
    axes.plot(*zip(*curve["validation"], strict=True), color="#253237", marker="o", markersize=3, label="held-out emoji, on white")
    axes.set(xlabel=f"step ({curve['batch']} pictures each)", ylabel="nats/token")
    axes.set_ylim(top=min(4.0, max(value for _, value in curve["train"])))
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(folder / "curve.png", metadata={"Software": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--export", action="store_true", help="export the last checkpoint, and do not train")
    parser.add_argument("--device", default="auto", help="cpu, cuda, or auto: cuda if there is one")
    parser.add_argument("--eager", action="store_true", help="do without torch.compile, which needs a C++ compiler")
    parser.add_argument("--width", type=int, default=192)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--batch", type=int, default=8, help="pictures a step")
    parser.add_argument("--steps", type=int, default=3600)
    parser.add_argument("--minutes", type=float, help="train this long instead, stops not counted")
    parser.add_argument("--decay", type=float, default=0.4, help="last share of the run, in which the rate falls")
    arguments = parser.parse_args()
    if not arguments.export:
        train(arguments)
    export()


if __name__ == "__main__":
    main()
