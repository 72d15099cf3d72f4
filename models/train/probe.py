"""Linear probes over the features that a running worker gives.

    probe.py --endpoint HOST:PORT            # the tables, the figure, the head
    probe.py --endpoint HOST:PORT --check    # the shipped head, by Classify

`make probe` does both. The worker must serve models/emoji compiled with
`--feature-layer` of its last layer, so that every layer is there. A probe is a
logistic regression over standardized features of one layer, fitted on the
train split. What it is fitted with (context, norm, layer, strength of
regularization) has the lowest log loss on the validation split; the test split
is only reported.
"""

import argparse
import json
import warnings
from collections import Counter
from pathlib import Path

import data
import numpy as np
from safetensors.numpy import save_file
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from worker import Worker

CACHE = data.ROOT / "target" / "probe"
HEAD = data.MODEL / "category.safetensors"
CONTEXTS = ("RAW", "SOS_SHIFTED")
NORMS = ("PRE_ATTN_RMS", "NONE")
STRENGTHS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# What a subcategory needs to be a class of the second task.
SUBCATEGORY_TRAIN_MIN = 15
SUBCATEGORY_TEST_MIN = 4


class Split:
    """The pictures of a split, with the labels of each task."""

    def __init__(self, emoji: list[data.Emoji], name: str, views: int = 0):
        chosen = [one for one in emoji if one.split == name]
        random = np.random.default_rng(data.SEED)
        self.name = f"{name}-{views}"
        self.sources: list = [one.png for one in chosen]
        self.pixels = [data.plain(one.pictures[0]) for one in chosen]
        for _ in range(views):
            seen = [data.augment(one, random, soft_share=0.0) for one in chosen]
            self.sources += seen
            self.pixels += seen
        self.category = np.array([one.category for one in chosen] * (1 + views))
        self.subcategory = np.array([one.subcategory for one in chosen] * (1 + views))


def all_features(worker: Worker, split: Split, context: str, norm: str) -> np.ndarray:
    """From the worker, or from what the same model gave before."""
    digest = worker.info.digest.removeprefix("sha256:")[:16]
    path = CACHE / f"{digest}-{split.name}-{context}-{norm}.npy"
    if not path.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        np.save(path, worker.features(split.sources, context, norm))
    return np.load(path)


class Probe:
    """A logistic regression over standardized features.

    Pixels have one scale already, and are only centered: that makes their probe
    better than dividing by what an edge pixel varies by.
    """

    def __init__(self, features: np.ndarray, labels: np.ndarray, strength: float, pixels: bool):
        self.mean = features.mean(axis=0)
        # A feature that never changes has nothing to say.
        self.scale = 1.0 if pixels else np.maximum(features.std(axis=0), 1e-6)
        self.regression = LogisticRegression(C=strength, max_iter=1000, tol=1e-3)
        self.regression.fit(self.standardized(features), labels)

    def standardized(self, features: np.ndarray) -> np.ndarray:
        return (features - self.mean) / self.scale

    def accuracy(self, features: np.ndarray, labels: np.ndarray) -> float:
        return float(self.regression.score(self.standardized(features), labels))

    def log_loss(self, features: np.ndarray, labels: np.ndarray) -> float:
        scores = self.regression.predict_proba(self.standardized(features))
        return float(log_loss(labels, scores, labels=self.regression.classes_))

    def folded(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias for features as they come."""
        weight = self.regression.coef_ / self.scale
        return weight.astype(np.float32), (self.regression.intercept_ - weight @ self.mean).astype(np.float32)


class Task:
    """Labels of the three splits, and which of their pictures take part."""

    def __init__(self, name: str, splits: dict[str, Split], views: int):
        labels = {key: getattr(split, name) for key, split in splits.items()}
        self.rows = {key: np.full(len(values), True) for key, values in labels.items()}
        if name == "subcategory":
            n_train, n_test = Counter(labels["train"]), Counter(labels["test"])
            kept = [
                label
                for label in sorted(n_train)
                if n_train[label] >= SUBCATEGORY_TRAIN_MIN * (1 + views) and n_test[label] >= SUBCATEGORY_TEST_MIN
            ]
            self.rows = {key: np.isin(values, kept) for key, values in labels.items()}
        self.labels = {key: values[self.rows[key]] for key, values in labels.items()}
        self.classes = sorted(set(self.labels["train"]))

    def fit(self, features: dict[str, np.ndarray], pixels: bool = False) -> tuple[Probe, dict]:
        """The probe of the strength that validation likes best."""
        seen = {key: values[self.rows[key]] for key, values in features.items()}
        probes = [Probe(seen["train"], self.labels["train"], strength, pixels) for strength in STRENGTHS]
        losses = [probe.log_loss(seen["validation"], self.labels["validation"]) for probe in probes]
        best = int(np.argmin(losses))
        figures = {
            "strength": STRENGTHS[best],
            "validation_log_loss": round(losses[best], 4),
            "validation": round(probes[best].accuracy(seen["validation"], self.labels["validation"]), 4),
            "test": round(probes[best].accuracy(seen["test"], self.labels["test"]), 4),
            # What the test split itself would have liked best: no choice is
            # made by it, but it shows how much the choice of strength cost.
            "test_over_strengths": round(
                max(probe.accuracy(seen["test"], self.labels["test"]) for probe in probes), 4
            ),
        }
        return probes[best], figures

    def majority(self) -> float:
        most = Counter(self.labels["train"]).most_common(1)[0][0]
        return float((self.labels["test"] == most).mean())


def show(name: str, entry: dict) -> None:
    where = [str(entry[key]) for key in ("context", "norm", "layer") if key in entry]
    print(
        f"{name:12}{' '.join(where):28} {entry['pictures']:18} C {entry['strength']:<7g}"
        f" validation {entry['validation']:.3f} (log loss {entry['validation_log_loss']:.3f})"
        f"  test {entry['test']:.3f}  (best over C {entry['test_over_strengths']:.3f})",
        flush=True,
    )


def probe(worker: Worker, emoji: list[data.Emoji], views: int) -> None:
    splits = {name: Split(emoji, name) for name in data.SPLITS}
    moved = splits | {"train": Split(emoji, "train", views)}
    quantizer = data.Quantizer()
    wanted = quantizer(np.stack(splits["test"].pixels))
    assert (worker.tokens(splits["test"].sources) == wanted).all(), "the worker's tokens are others"

    result = {"digest": worker.info.digest, "views": views}
    for name in ("category", "subcategory"):
        task = Task(name, splits, 0)
        counts = {key: len(values) for key, values in task.labels.items()}
        print(f"{name}: {len(task.classes)} classes; pictures: {counts}")
        raw = [raw_pixels(task, splits, "")]
        if views and name == "category":
            raw.append(raw_pixels(Task(name, moved, views), moved, f" and {views} views"))
        found = []
        for context in CONTEXTS:
            for norm in NORMS:
                found += layers(worker, task, splits, context, norm, "")
        # Views cost the most, so only the best way of taking features has them.
        best = min(found, key=log_loss_of)
        if views and name == "category":
            context, norm = best["context"], best["norm"]
            found += layers(worker, Task(name, moved, views), moved, context, norm, f" and {views} views")
            best = min(found, key=log_loss_of)
        alike = [entry for entry in found if all(entry[key] == best[key] for key in ("context", "norm", "pictures"))]
        chosen_raw = min(raw, key=log_loss_of)
        error = (best["test"] * (1 - best["test"]) / counts["test"]) ** 0.5
        print(f"{name}: chance {1 / len(task.classes):.3f}, majority {task.majority():.3f}, standard error {error:.3f}")
        show("raw pixels", chosen_raw)
        show("chosen", best)
        show("last layer", alike[-1])
        together = concatenated(worker, task, splits, best["context"], best["norm"])
        if name == "category":
            write_head(best["probe"], best["context"], best["norm"], best["layer"])
        for entry in (*found, *raw):
            entry.pop("probe")
        result[name] = {
            "classes": task.classes,
            "pictures": counts,
            "chance": round(1 / len(task.classes), 4),
            "majority": round(task.majority(), 4),
            "standard_error": round(error, 4),
            "raw_pixels": chosen_raw,
            "chosen": best,
            "layers": alike,
            "layers_together": together,
            "all": found,
        }
    (data.MODEL / "probe.json").write_text(json.dumps(result, indent=1) + "\n")
    draw(result)
    print_card(result)


def log_loss_of(entry: dict) -> float:
    return entry["validation_log_loss"]


def raw_pixels(task: Task, splits: dict[str, Split], more: str) -> dict:
    """The same probe on the pixels themselves, which knows of no model."""
    raw = {key: np.stack(split.pixels).reshape(len(split.sources), -1) / 127.5 - 1 for key, split in splits.items()}
    fitted, figures = task.fit(raw, pixels=True)
    entry = {"pictures": f"plain{more}"} | figures | {"probe": fitted}
    show("raw pixels", entry)
    return entry


def concatenated(worker: Worker, task: Task, splits: dict[str, Split], context: str, norm: str) -> dict:
    """The features of all layers as one vector; a head file takes one layer only."""
    features = {key: all_features(worker, split, context, norm) for key, split in splits.items()}
    _, figures = task.fit({key: values.reshape(len(values), -1) for key, values in features.items()})
    entry = {"pictures": "plain"} | figures
    show("all layers", entry)
    return entry


def layers(
    worker: Worker, task: Task, splits: dict[str, Split], context: str, norm: str, more: str
) -> list[dict]:
    """A probe of each layer."""
    features = {key: all_features(worker, split, context, norm) for key, split in splits.items()}
    entries = []
    for layer in worker.info.layers_served:
        fitted, figures = task.fit({key: values[:, layer] for key, values in features.items()})
        where = {"context": context, "norm": norm, "layer": layer, "pictures": f"plain{more}"}
        entries.append(where | figures | {"probe": fitted})
        show("", entries[-1])
    return entries


def print_card(result: dict) -> None:
    """The table of the model card."""
    print("| features | category: validation, test | subcategory: validation, test |\n|---|---|---|")
    tasks = [result["category"], result["subcategory"]]

    def row(name: str, entries: list[dict]) -> None:
        cells = [f"{100 * entry['validation']:.1f} %, {100 * entry['test']:.1f} %" for entry in entries]
        print(f"| {name} | {' | '.join(cells)} |")

    for layer, entries in enumerate(zip(*(task["layers"] for task in tasks), strict=True)):
        row(f"layer {layer}", list(entries))
    row("all layers together", [task["layers_together"] for task in tasks])
    row("raw pixels", [task["raw_pixels"] for task in tasks])
    for name in ("majority", "chance"):
        print(f"| {name} | {' | '.join(f'{100 * task[name]:.1f} %' for task in tasks)} |")


def write_head(fitted: Probe, context: str, norm: str, layer: int) -> None:
    weight, bias = fitted.folded()
    labels = json.dumps(fitted.regression.classes_.tolist())
    metadata = {"labels": labels, "layer": str(layer), "norm": norm, "context": context}
    # save_file writes memory as it lies, and scikit-learn's lies by columns.
    save_file({"weight": np.ascontiguousarray(weight), "bias": bias}, HEAD, metadata)
    HEAD.chmod(0o644)


def draw(result: dict) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 4), dpi=100)
    for axes, name in zip(panels, ("category", "subcategory"), strict=True):
        task = result[name]
        percent = [100 * figures["test"] for figures in task["layers"]]
        axes.plot(percent, color="#253237", marker="o", label="features, test split")
        lines = (
            ("raw pixels", task["raw_pixels"]["test"], "--", "#c05746"),
            ("majority class", task["majority"], ":", "#5c6b73"),
            ("chance", task["chance"], "-.", "#9db4c0"),
        )
        for label, share, style, color in lines:
            axes.axhline(100 * share, linestyle=style, color=color, label=label)
        axes.set(title=f"{len(task['classes'])} classes ({name})", xlabel="layer", ylabel="accuracy, %", ylim=(0, 100))
        axes.grid(alpha=0.3)
    panels[0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(data.MODEL / "probe.png", metadata={"Software": None})


def check(worker: Worker, emoji: list[data.Emoji]) -> None:
    """The shipped head, as a client of the worker meets it."""
    for name in ("validation", "test"):
        split = Split(emoji, name)
        right = np.array(worker.classes(split.sources, "category")) == split.category
        print(f"Classify, {worker.info.precision}, {name}: {right.sum()} of {len(right)} right, {right.mean():.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--endpoint", required=True, help="host:port of a running worker")
    parser.add_argument("--check", action="store_true", help="only try the head that the worker has loaded")
    parser.add_argument("--views", type=int, default=0, help="moved views of each training picture, too")
    arguments = parser.parse_args()
    # A probe at the weakest regularization may stop early; validation decides.
    warnings.simplefilter("ignore", ConvergenceWarning)
    worker = Worker(arguments.endpoint)
    emoji = data.load()
    if arguments.check:
        check(worker, emoji)
    else:
        probe(worker, emoji, arguments.views)


if __name__ == "__main__":
    main()
