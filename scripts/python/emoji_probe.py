"""Fits scikit-learn's classifiers on features of models/emoji, and serves them.

    emoji_probe.py    # needs the emoji that models/train/data.py brings

The pictures, splits, layer and strength are those of `make probe`, whose figures the
model card has; see models/emoji/category.json. Each classifier is fitted on the
training pictures alone, and on training and validation pictures together. Its head is
exported and served, and every prediction of the worker is compared.
"""

import json
import sys
import time
from pathlib import Path

import numpy
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "models/train"), str(ROOT / "python/src")]

import data  # noqa: E402
from imagegpt import LocalWorker  # noqa: E402
from imagegpt.sklearn import Features, export_head  # noqa: E402

HEADS = ROOT / "target/python-probe"


def main() -> None:
    """Prints the accuracies, and ends with an error if a prediction differs."""
    card = json.loads((ROOT / "models/emoji/category.json").read_text())
    chosen = card["chosen"]
    emoji = data.load()
    images = {name: [one.png for one in emoji if one.split == name] for name in data.SPLITS}
    labels = {name: [one.category for one in emoji if one.split == name] for name in data.SPLITS}
    features = Features(
        ROOT / "models/emoji",
        layer=chosen["layer"],
        alpha=card["alpha"],
        image_fit=card["fit"],
        context=chosen["context"],
        norm=chosen["norm"],
        # The same pictures are embedded for each classifier.
        flags={"cache_bytes": "256MiB", "execution_provider": "cpu"},
    )
    begun = time.monotonic()
    n_images = sum(map(len, images.values()))
    features.fit_transform([image for part in images.values() for image in part])
    rate = n_images / (time.monotonic() - begun)
    print(f"{n_images} pictures, {rate:.0f} pictures/s with the start of the worker")
    # Its C has another meaning than the strength of a logistic regression, so it is
    # chosen on the validation pictures.
    found = {}
    for strength in (1e-4, 1e-3, 1e-2, 1e-1, 1.0):
        machine = make_pipeline(features, StandardScaler(), LinearSVC(C=strength, max_iter=50000))
        machine.fit(images["train"], labels["train"])
        found[strength] = machine.score(images["validation"], labels["validation"])
    best = max(found, key=lambda strength: found[strength])
    print(f"LinearSVC: C={best:g} has the best validation accuracy, {found[best]:.1%}")
    classifiers = {
        "LogisticRegression": LogisticRegression(C=chosen["strength"], max_iter=5000, tol=1e-6),
        "LinearSVC": LinearSVC(C=best, max_iter=50000),
    }
    HEADS.mkdir(parents=True, exist_ok=True)
    heads: dict[str, Path] = {}
    predicted: dict[str, numpy.ndarray] = {}
    for kind, classifier in classifiers.items():
        for parts in (("train",), ("train", "validation")):
            name = "-".join((kind, *parts))
            probe = make_pipeline(features, StandardScaler(), classifier)
            probe.fit(
                [image for part in parts for image in images[part]],
                [label for part in parts for label in labels[part]],
            )
            predicted[name] = probe.predict(images["test"])
            n_right = int((predicted[name] == numpy.array(labels["test"])).sum())
            share = n_right / len(images["test"])
            print(
                f"{kind}, fitted on {' and '.join(parts)}: {share:.1%} of the test "
                f"pictures ({n_right} of {len(images['test'])})"
            )
            path = HEADS / f"{name}.safetensors"
            heads[name] = export_head(probe, path, figures={"test_accuracy": share})
    print(
        f"the model card: {chosen['test_accuracy']:.1%} for the fit on train alone, "
        f"{card['test']['accuracy']:.1%} for the head"
    )
    with LocalWorker(
        ROOT / "models/emoji",
        feature_layer=chosen["layer"],
        head=heads,
        cache_bytes="64MiB",
        execution_provider="cpu",
    ) as worker:
        for name, expected in predicted.items():
            answers = worker.classify(images["test"], head=name, top_k=1)
            n_different = sum(a.label != b for a, b in zip(answers, expected, strict=True))
            print(f"{name}, served: {n_different} of {len(answers)} predictions differ")
            if n_different:
                sys.exit(1)


if __name__ == "__main__":
    main()
