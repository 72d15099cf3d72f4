"""Makes tests/golden/probe.json: fits and measures of scikit-learn on small problems.

`make probe-golden` runs this. src/probe fits the same problems, and its tests
compare weights, losses and predictions. Features are in f32, as features of a
worker are; everything is computed in f64.
"""

import json
import warnings
from pathlib import Path

import numpy as np
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import (
    average_precision_score,
    confusion_matrix,
    log_loss,
    precision_recall_fscore_support,
    top_k_accuracy_score,
)
from sklearn.preprocessing import StandardScaler

FILE = Path(__file__).resolve().parents[2] / "tests" / "golden" / "probe.json"


def blobs(random: np.random.Generator, n: int, width: int, n_classes: int, spread: float):
    """Classes around centers, with columns of different means and scales."""
    labels = np.arange(n) % n_classes
    centers = random.normal(size=(n_classes, width))
    features = centers[labels] + spread * random.normal(size=(n, width))
    features = features * random.uniform(0.05, 20, width) + random.normal(0, 50, width)
    return short(features), labels


def short(features: np.ndarray) -> np.ndarray:
    """Numbers that an f32 holds and that few digits write."""
    return np.round(features, 2).astype(np.float32)


def fit(features: np.ndarray, labels: np.ndarray, strength: float, class_weight=None):
    """A fit of one class per example, with as many rows as classes, or one for two."""
    scaler = StandardScaler().fit(features.astype(np.float64))
    standardized = scaler.transform(features.astype(np.float64))
    with warnings.catch_warnings():
        # At this tolerance the solver often ends at the precision of f64 instead.
        warnings.simplefilter("ignore", ConvergenceWarning)
        model = LogisticRegression(C=strength, tol=1e-10, max_iter=100_000, class_weight=class_weight)
        model.fit(standardized, labels)
    weight = model.coef_ / scaler.scale_
    bias = model.intercept_ - weight @ scaler.mean_
    return scaler, standardized, model, weight, bias


def class_problem(name: str, features: np.ndarray, labels: np.ndarray, strength: float, class_weight=None) -> dict:
    scaler, standardized, model, weight, bias = fit(features, labels, strength, class_weight)
    shares = model.predict_proba(standardized)
    if len(model.classes_) == 2:
        weight, bias = np.vstack([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
    predictions = model.predict(standardized)
    every = list(range(len(model.classes_)))
    precision, recall, f1, support = precision_recall_fscore_support(
        labels, predictions, labels=every, zero_division=np.nan
    )
    top_k = min(3, len(every) - 1)
    return {
        "name": name,
        "strength": strength,
        "class_weight": class_weight
        if class_weight is None or isinstance(class_weight, str)
        else [class_weight[c] for c in every],
        "features": written(features),
        "labels": labels.tolist(),
        "mean": scaler.mean_.tolist(),
        "scale": scaler.scale_.tolist(),
        "weight": weight.tolist(),
        "bias": bias.tolist(),
        "log_loss": log_loss(labels, shares, labels=every),
        "predictions": predictions.tolist(),
        "confusion": confusion_matrix(labels, predictions, labels=every).tolist(),
        "precision": numbers(precision),
        "recall": numbers(recall),
        "f1": numbers(f1),
        "support": support.tolist(),
        "top_k": top_k,
        "top_k_accuracy": top_k_accuracy_score(
            labels, shares if len(every) > 2 else shares[:, 1], k=top_k, labels=every
        ),
    }


def numbers(values: np.ndarray) -> list:
    return [None if np.isnan(value) else float(value) for value in values]


def written(features: np.ndarray) -> list:
    """Each f32 by the shortest text that reads as it."""
    return [[float(str(value)) for value in row] for row in features]


def label_problem(name: str, features: np.ndarray, values: np.ndarray, strength: float, class_weight=None) -> dict:
    """One fit per label, as OneVsRestClassifier does."""
    fits = [fit(features, values[:, label], strength, class_weight) for label in range(values.shape[1])]
    shares = np.stack([model.predict_proba(standardized)[:, 1] for _, standardized, model, _, _ in fits], axis=1)
    predictions = shares > 0.5
    return {
        "name": name,
        "strength": strength,
        "class_weight": class_weight,
        "features": written(features),
        "labels": values.tolist(),
        "weight": [weight[0].tolist() for _, _, _, weight, _ in fits],
        "bias": [float(bias[0]) for _, _, _, _, bias in fits],
        "log_loss": float(np.mean([log_loss(values[:, label], shares[:, label]) for label in range(values.shape[1])])),
        "predictions": predictions.astype(int).tolist(),
        "average_precision": [
            float(average_precision_score(values[:, label], shares[:, label])) for label in range(values.shape[1])
        ],
    }


def main() -> None:
    random = np.random.default_rng(20)
    classes = []
    features, labels = blobs(random, 60, 7, 2, 1.5)
    classes.append(class_problem("two classes", features, labels, 0.3))
    features, labels = blobs(random, 90, 6, 3, 1.2)
    classes.append(class_problem("three classes", features, labels, 1.0))
    classes.append(class_problem("three classes, weak regularization", features, labels, 100.0))
    features, labels = blobs(random, 240, 18, 12, 2.0)
    classes.append(class_problem("twelve classes", features, labels, 0.1))
    labels = np.where(labels < 9, 0, labels - 8)
    classes.append(class_problem("four classes, balanced", features, labels, 0.1, "balanced"))
    classes.append(
        class_problem("four classes, explicit weights", features, labels, 0.1, {0: 0.5, 1: 2.0, 2: 1.0, 3: 7.0})
    )
    classes.append(class_problem("two classes, balanced", features, np.minimum(labels, 1), 0.5, "balanced"))
    features, labels = blobs(random, 60, 5, 3, 1.0)
    columns = [features, 2 * features[:, :1], features[:, 1:2], np.full((60, 1), 7.25), np.zeros((60, 1))]
    classes.append(class_problem("collinear and constant", short(np.hstack(columns)), labels, 1.0))
    # Far from zero, where a variance from sums of squares would be rounding.
    far = short(features + np.float32(100_000))
    classes.append(class_problem("far from zero", far, labels, 1.0))
    features, labels = blobs(random, 3, 4, 3, 1.0)
    classes.append(class_problem("three examples", features, labels, 1.0))

    several = []
    features, labels = blobs(random, 120, 9, 5, 2.0)
    values = (random.normal(size=(120, 4)) + features[:, :4] / features[:, :4].std(axis=0) > [1.0, 0.0, -1.0, 2.0]).astype(int)
    values ^= (features[:, :4] < features[:, :4].mean(axis=0)).astype(int) & (random.uniform(size=(120, 4)) < 0.1)
    assert (values.min(axis=0) == 0).all() and (values.max(axis=0) == 1).all()
    several.append(label_problem("four labels", features, values, 0.5))
    several.append(label_problem("four labels, balanced", features, values, 0.5, "balanced"))
    FILE.write_text(json.dumps({"classes": classes, "labels": several}, separators=(",", ":")) + "\n")
    print(f"{FILE}: {FILE.stat().st_size} bytes")


if __name__ == "__main__":
    main()
