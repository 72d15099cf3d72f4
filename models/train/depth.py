"""Why the middle of models/emoji is not its best layer: probes that can tell
layers apart, and small models that are trained for shorter and longer.

    depth.py              # both parts: the shipped model, the proxies
    depth.py --proxies    # the second, and keeps the figures of the first

`make depth` runs it, in about half an hour of one core, and prints what it writes
to models/emoji/depth.json. The proxies are models of pictures of 16 x 16, trained as
train.py trains, for more and more rounds over the training emoji. Up to the fall
of the learning rate a longer run is the same run as a shorter one, so all share
that part, and each falls on its own. They are kept in target/depth.

Probes are logistic regressions over standardized features, as `make probe` fits them, but
each emoji is scored by probes that did not see it or its group: cross-validation
over all emoji and not one split, so that differences between layers, emoji by
emoji, have an error small enough to tell. The strength of regularization of a
fold is the one with the least log loss on the other folds.
"""

import argparse
import hashlib
import json
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import data
import network
import numpy as np
import torch
import torch.nn.functional as F
import train
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedGroupKFold
from transformers import ImageGPTForCausalImageModeling

FIGURES = data.MODEL / "depth.json"
CACHE = data.ROOT / "target" / "depth"
# A quarter of the tokens and less than an eighth of the parameters, so that one
# core trains a round in well under a minute.
SIDE = 16
WIDTH = 64
LAYERS = 8
HEADS = 2
# Of which the shipped model had 13. More would tell more: see --rounds.
ROUNDS = (3, 13)
# As the shipped model: see train.py.
BATCH = 8
DECAY = 0.4

STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
FOLDS = 5
REPEATS = 2
# What a label needs to be a class. That leaves out the five swatches of skin,
# which are one group.
GROUPS_MIN = 15


def make_proxy() -> torch.nn.Module:
    return network.make_model(WIDTH, LAYERS, HEADS, data.Quantizer().clusters, data.SEED, SIDE)


def train_proxies(emoji: list[data.Emoji], all_rounds: list[int]) -> Iterator[tuple[int, torch.nn.Module]]:
    """A proxy for each number of rounds, trained unless it is there already."""
    model = make_proxy()
    network.check_against_transformers(model)
    optimizers = train.make_optimizers(model)
    first = 0
    for rounds in all_rounds:
        batches = train.Batches(emoji, 0, rounds * n_train(emoji) // BATCH, BATCH, data.SEED, SIDE)
        fall = round(len(batches) * (1 - DECAY))
        trunk, finished = CACHE / f"trunk-{rounds}.pt", CACHE / f"rounds-{rounds}.pt"
        if not trunk.exists():
            learn(model, optimizers, batches, first, fall)
            torch.save((model.state_dict(), [optimizer.state_dict() for optimizer in optimizers]), trunk)
        restore(model, optimizers, trunk)
        if not finished.exists():
            learn(model, optimizers, batches, fall, len(batches))
            torch.save(model.state_dict(), finished)
        model.load_state_dict(torch.load(finished, weights_only=True))
        yield rounds, model
        restore(model, optimizers, trunk)
        first = fall


def n_train(emoji: list[data.Emoji]) -> int:
    return sum(one.split == "train" for one in emoji)


def restore(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], path: Path) -> None:
    weights, stored = torch.load(path, weights_only=True)
    model.load_state_dict(weights)
    for optimizer, state in zip(optimizers, stored, strict=True):
        optimizer.load_state_dict(state)


def learn(model, optimizers, batches: train.Batches, first: int, end: int) -> None:
    started, losses = time.monotonic(), []
    for step in range(first, end):
        share = train.rate(step, step / len(batches), DECAY)
        losses.append(train.learn(model, optimizers, batches[step], share, network.block_forward).item())
        if (step + 1) % 200 == 0 or step + 1 == end:
            speed = BATCH * (step + 1 - first) / (time.monotonic() - started)
            print(
                f"step {step + 1} of {len(batches)}: {np.mean(losses[-200:]):.3f} nats/token, {speed:.1f} pictures/s",
                flush=True,
            )


def untrained(model: torch.nn.Module) -> torch.nn.Module:
    """Random blocks: the model's own start has blocks that do nothing."""
    random = np.random.RandomState(data.SEED)
    with torch.no_grad():
        for block in model.transformer.h:
            for layer in (block.attn.c_proj, block.mlp.c_proj):
                scale = 0.7 / np.sqrt(layer.weight.shape[0])
                layer.weight.copy_(torch.from_numpy(random.normal(0, scale, layer.weight.shape)))
    return model


@torch.no_grad()
def features(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """RAW, PRE_ATTN_RMS and the mean, as Embed gives them: (pictures, layers, width)."""
    body = model.transformer
    rows = []
    for start in range(0, len(tokens), 4):
        ids = torch.from_numpy(tokens[start : start + 4])
        states = body.wte.weight[ids] + body.wpe.weight[: ids.shape[1]]
        pooled = []
        for block in body.h:
            pooled.append(normed(states, block.ln_1).mean(dim=1))
            weights = network.block_weights(block, torch.float32)
            states = network.block_forward(states, weights, model.config.n_head, block.ln_1.eps)
        pooled.append(normed(states, body.ln_f).mean(dim=1))
        rows.append(torch.stack(pooled, dim=1))
    return torch.cat(rows).numpy()


def normed(states: torch.Tensor, norm: torch.nn.Module) -> torch.Tensor:
    return F.rms_norm(states, states.shape[-1:], norm.weight, norm.eps)


def kept(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Features of the shipped model take eight minutes, so they are kept."""
    digest = hashlib.sha256(b"".join(value.numpy().tobytes() for value in model.state_dict().values()))
    path = CACHE / f"shipped-{digest.hexdigest()[:16]}.npy"
    if not path.exists():
        np.save(path, features(model, tokens))
    return np.load(path)


@dataclass
class Scores:
    """Of each emoji, the mean over the repeats."""

    log_loss: np.ndarray
    right: np.ndarray


class Task:
    """A labeling of the emoji, and the folds of every repeat."""

    def __init__(self, name: str, emoji: list[data.Emoji]):
        labels = np.array([getattr(one, name) for one in emoji])
        groups = np.array([one.group for one in emoji])
        n_groups = Counter(label for label, _ in set(zip(labels.tolist(), groups.tolist(), strict=True)))
        self.rows = np.array([n_groups[label] >= GROUPS_MIN for label in labels.tolist()])
        self.classes, self.labels = np.unique(labels[self.rows], return_inverse=True)
        self.groups = np.unique(groups[self.rows], return_inverse=True)[1]
        self.held_out = np.array([one.split != "train" for one in emoji])[self.rows]
        self.repeats = []
        for repeat in range(REPEATS):
            folds = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=data.SEED + repeat)
            self.repeats.append([held for _, held in folds.split(self.labels, self.labels, self.groups)])

    def score(self, all_features: np.ndarray, standardize: bool = True) -> Scores:
        seen = all_features[self.rows].astype(np.float64)
        found = [self.score_once(seen, folds, standardize) for folds in self.repeats]
        return Scores(*(np.mean(values, axis=0) for values in zip(*found, strict=True)))

    def score_once(self, seen: np.ndarray, folds: list[np.ndarray], standardize: bool) -> tuple:
        log_losses = np.zeros((len(STRENGTHS), len(seen)))
        right = np.zeros_like(log_losses)
        for held in folds:
            fitted = np.delete(np.arange(len(seen)), held)
            mean = seen[fitted].mean(axis=0)
            scale = np.maximum(seen[fitted].std(axis=0), 1e-6) if standardize else 1.0
            x, labels = (seen - mean) / scale, self.labels[fitted]
            assert len(set(labels)) == len(self.classes), "a fold has all of a class"
            for idx, strength in enumerate(STRENGTHS):
                regression = LogisticRegression(C=strength, max_iter=1000, tol=1e-3).fit(x[fitted], labels)
                chances = regression.predict_log_proba(x[held])
                log_losses[idx, held] = -chances[np.arange(len(held)), self.labels[held]]
                right[idx, held] = chances.argmax(axis=1) == self.labels[held]
        sums = np.array([log_losses[:, held].sum(axis=1) for held in folds])
        log_loss, hits = np.zeros(len(seen)), np.zeros(len(seen))
        for held, own in zip(folds, sums, strict=True):
            best = int(np.argmin(sums.sum(axis=0) - own))
            log_loss[held], hits[held] = log_losses[best, held], right[best, held]
        return log_loss, hits

    def mean(self, values: np.ndarray, rows: np.ndarray | None = None) -> list[float]:
        """The mean and its standard error; emoji of one group are one draw."""
        groups = self.groups if rows is None else self.groups[rows]
        values = values if rows is None else values[rows]
        sums = np.bincount(groups, values - values.mean())
        return [round(float(values.mean()), 4), round(float(np.sqrt((sums**2).sum()) / len(values)), 4)]


def probe_layers(name: str, tasks: dict[str, Task], found: np.ndarray) -> tuple[dict, dict]:
    """Every layer's figures, and its differences from the last layer."""
    figures, scores = {}, {}
    for task_name, task in tasks.items():
        layers = [task.score(found[:, layer]) for layer in range(found.shape[1])]
        last = layers[-1]
        figures[task_name] = [
            {
                "log_loss": task.mean(layer.log_loss),
                "accuracy": task.mean(layer.right),
                "log_loss_minus_last": task.mean(layer.log_loss - last.log_loss),
                "accuracy_minus_last": task.mean(layer.right - last.right),
                # Emoji that no training saw.
                "log_loss_minus_last_held_out": task.mean(layer.log_loss - last.log_loss, task.held_out),
            }
            for layer in layers
        ]
        scores[task_name] = layers
        for idx, entry in enumerate(figures[task_name]):
            show(f"{name}, layer {idx}", task_name, entry)
    return figures, scores


def show(name: str, task_name: str, entry: dict) -> None:
    cells = [f"{key} {value[0]:.4f} +- {value[1]:.4f}" for key, value in entry.items()]
    print(f"{task_name:12} {name:28} {'; '.join(cells)}", flush=True)


def colors(tokens: np.ndarray) -> np.ndarray:
    """How often each color is, and nothing of where."""
    counts = np.stack([np.bincount(row, minlength=data.N_COLORS) for row in tokens])
    # Roots of shares, so that white is not all there is; of length sqrt(512) to
    # have the scale of standardized features.
    return np.sqrt(counts / tokens.shape[1] * data.N_COLORS)


def probe_beyond_colors(tasks: dict[str, Task], tokens: np.ndarray, found: np.ndarray) -> dict:
    """What a layer adds to a probe that has the counts of colors already."""
    counts = colors(tokens)
    figures = {}
    for name, task in tasks.items():
        alone = task.score(counts, standardize=False)
        figures[name] = {}
        for layer in (0, found.shape[1] // 2, found.shape[1] - 1):
            added = (found[:, layer] - found[:, layer].mean(axis=0)) / found[:, layer].std(axis=0)
            both = task.score(np.concatenate([counts, added], axis=1), standardize=False)
            entry = {
                "log_loss": task.mean(both.log_loss),
                "accuracy": task.mean(both.right),
                "log_loss_minus_colors": task.mean(both.log_loss - alone.log_loss),
                "accuracy_minus_colors": task.mean(both.right - alone.right),
            }
            show(f"colors and layer {layer}", name, entry)
            figures[name][layer] = entry
    return figures


def probe_colors(tasks: dict[str, Task], tokens: np.ndarray) -> dict:
    """What needs no model."""
    figures = {}
    for name, task in tasks.items():
        scores = task.score(colors(tokens), standardize=False)
        figures[name] = {"log_loss": task.mean(scores.log_loss), "accuracy": task.mean(scores.right)}
        show(f"colors of {tokens.shape[1]} pixels", name, figures[name])
    return figures


def change(task: Task, early: list[Scores], late: list[Scores], layer: int) -> list[float]:
    """By how much more a layer is ahead of the last one than it was."""
    ahead = [layers[-1].log_loss - layers[layer].log_loss for layers in (early, late)]
    return task.mean(ahead[1] - ahead[0])


def plain_tokens(emoji: list[data.Emoji], side: int) -> np.ndarray:
    return data.Quantizer()(np.stack([data.plain(one.pictures[0], side) for one in emoji]))


def probe_proxies(emoji: list[data.Emoji], tasks: dict[str, Task], all_rounds: list[int]) -> dict:
    tokens = plain_tokens(emoji, SIDE)
    result = {"side": SIDE, "width": WIDTH, "layers": LAYERS, "heads": HEADS, "batch": BATCH}
    result["colors"] = probe_colors(tasks, tokens)
    result["untrained"], _ = probe_layers("untrained proxy", tasks, features(untrained(make_proxy()), tokens))
    trained = {"train": np.array([one.split == "train" for one in emoji])}
    trained["validation and test"] = ~trained["train"]
    scores, result["rounds"] = {}, {}
    for rounds, model in train_proxies(emoji, all_rounds):
        losses = {
            name: round(train.held_out_loss(model, tokens[rows], "cpu", torch.float32, network.block_forward), 4)
            for name, rows in trained.items()
        }
        print(f"{rounds} rounds, nats/token: {losses}", flush=True)
        figures, scores[rounds] = probe_layers(f"{rounds} rounds", tasks, features(model, tokens))
        result["rounds"][rounds] = {"nats_per_token": losses} | figures
    result["change"] = {}
    for name, task in tasks.items():
        changes = [
            change(task, scores[all_rounds[0]][name], scores[all_rounds[-1]][name], layer) for layer in range(LAYERS)
        ]
        result["change"][name] = changes
        print(f"{name}: lead over the last layer, {all_rounds[-1]} rounds minus {all_rounds[0]}, by layer: {changes}")
    return result


def probe_shipped(emoji: list[data.Emoji], tasks: dict[str, Task]) -> dict:
    tokens = plain_tokens(emoji, data.SIDE)
    model = ImageGPTForCausalImageModeling.from_pretrained(data.MODEL, dtype=torch.float32).eval()
    check_features(model, tokens[:1])
    result = {"colors": probe_colors(tasks, tokens)}
    found = kept(model, tokens)
    result["layers"], _ = probe_layers("shipped", tasks, found)
    result["beyond_colors"] = probe_beyond_colors(tasks, tokens, found)
    return result


@torch.no_grad()
def check_features(model: torch.nn.Module, tokens: np.ndarray) -> None:
    """The states are those of transformers."""
    states = model.transformer(torch.from_numpy(tokens), output_hidden_states=True, use_cache=False).hidden_states
    norms = [block.ln_1 for block in model.transformer.h] + [torch.nn.Identity()]
    theirs = torch.stack([norm(state).mean(dim=1) for norm, state in zip(norms, states, strict=True)], dim=1)
    error = (torch.from_numpy(features(model, tokens)) - theirs).norm() / theirs.norm()
    assert error < 1e-4, error


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--proxies", action="store_true", help="only the proxies")
    parser.add_argument("--rounds", type=int, nargs="+", default=ROUNDS, help="how long to train them")
    arguments = parser.parse_args()
    # The same sums in the same order everywhere, and room for others.
    torch.set_num_threads(1)
    warnings.simplefilter("ignore", ConvergenceWarning)
    CACHE.mkdir(parents=True, exist_ok=True)
    emoji = data.load()
    tasks = {name: Task(name, emoji) for name in ("category", "subcategory")}
    result = json.loads(FIGURES.read_text()) if arguments.proxies else {"folds": FOLDS, "repeats": REPEATS}
    for name, task in tasks.items():
        n_groups = int(task.groups.max()) + 1
        print(f"{name}: {len(task.labels)} emoji, {n_groups} groups, {len(task.classes)} classes", flush=True)
        result[name] = {"emoji": len(task.labels), "groups": n_groups, "classes": task.classes.tolist()}
    if not arguments.proxies:
        result["shipped"] = probe_shipped(emoji, tasks)
        FIGURES.write_text(json.dumps(result) + "\n")
    result["proxies"] = probe_proxies(emoji, tasks, sorted(arguments.rounds))
    FIGURES.write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
