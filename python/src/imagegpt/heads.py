"""Linear heads for ``imagegpt serve --head`` from scikit-learn's classifiers."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from imagegpt.sklearn import Features

__all__ = ["export_head"]

# Limits of the worker: bytes of a file and of its header, and of the figures.
_FILE_BYTES_MAX = 64 << 20
_HEADER_BYTES_MAX = 4 << 20
_FIGURES_BYTES_MAX = 16 << 10
# Random vectors on which a file is compared with its estimator.
_CHECKED = 512
# Largest difference between a file's decision values, in 32 bits, and the
# estimator's, as a part of their standard deviation. Rounding alone gives 1e-6.
_TOLERANCE = 1e-3

_PLAIN = (
    "LogisticRegression",
    "LogisticRegressionCV",
    "LinearSVC",
    "RidgeClassifier",
    "RidgeClassifierCV",
    "SGDClassifier",
    "Perceptron",
    "LinearDiscriminantAnalysis",
)
_EXPORTABLE = (
    f"{', '.join(_PLAIN)}, SVC and NuSVC with kernel='linear', and OneVsRestClassifier and "
    "MultiOutputClassifier of these"
)


@dataclass(frozen=True)
class _Linear:
    """Classifier as a matrix and a bias, in 64 bits."""

    #: (rows, width): a row per class or label, or one row for two classes.
    weight: NDArray[Any]
    bias: NDArray[Any]
    #: Classes in the order of the rows; two for one row, none for labels that do not
    #: exclude each other.
    classes: tuple[Any, ...]
    is_multi_label: bool
    #: Decision values of the estimator itself, (n, rows) or (n,) for one row.
    decide: Callable[[Any], Any]
    #: Decisions of the estimator itself: classes (n,), or labels (n, rows).
    predict: Callable[[Any], Any]
    #: Affine steps before the classifier, first one first.
    steps: tuple[Any, ...] = ()


def export_head(
    estimator: Any,
    path: str | os.PathLike[str],
    *,
    labels: Sequence[str] | None = None,
    features: Features | None = None,
    figures: Mapping[str, float] | None = None,
) -> Path:
    """Writes a fitted linear classifier as the file that ``imagegpt serve --head
    NAME=FILE`` takes.

    Affine steps between the features and the classifier are folded into weight and
    bias. The file's decisions are then compared with the estimator's on random
    vectors, and nothing is written if they differ. The head's scores are the softmax
    of the decision values, and the sigmoid for labels that do not exclude each other:
    they equal ``predict_proba`` for LogisticRegression, LinearDiscriminantAnalysis and
    several labels of LogisticRegression, and rank the classes alike for the others.

    Args:
        estimator: Fitted pipeline of :class:`~imagegpt.sklearn.Features`, any of
            StandardScaler, MinMaxScaler, MaxAbsScaler, RobustScaler, PCA,
            IncrementalPCA, TruncatedSVD and selections of columns, and a classifier;
            a search over such pipelines, for its best one; or a pipeline or classifier
            that was fitted on features.
        path: File to write; an earlier one is replaced as a whole.
        labels: Names of the classes, in the order of ``classes_``. Default: the
            classes as text. Needed for several labels per image, in the order of the
            columns of y.
        features: How the features were made if the estimator does not have them,
            ``Features("models/emoji", layer=8, alpha="white")``. Unless it was fitted,
            the file does not name the model's weights.
        figures: Numbers about the training that are kept in the file, such as
            ``{"test_accuracy": 0.757}``.

    Returns:
        The path.

    Raises:
        TypeError: The estimator or a step is of a kind that is no exact linear head.
        ValueError: The estimator is of an exportable kind but with settings that are
            no exact linear head, or does not fit the features or labels.
        OSError: The file cannot be written.
    """
    steps = _flat(estimator)
    steps, features = _split(steps, features)
    linear = _linear_of_steps(steps)
    weight, bias = _folded(linear)
    dimension = getattr(features, "_n_features_out", weight.shape[1])
    if dimension != weight.shape[1]:
        raise ValueError(
            f"the estimator takes {weight.shape[1]} numbers, and features have {dimension}"
        )
    _check_decisions(linear, weight, bias)
    if linear.weight.shape[0] == 1 and not linear.is_multi_label:
        # One row for two classes: halves of it, so that their softmax is the sigmoid
        # of the row.
        weight = numpy.vstack([-weight, weight]) / 2
        bias = numpy.concatenate([-bias, bias]) / 2
    metadata = _metadata(linear, len(bias), labels, features, figures)
    content = _encoded(weight, bias, metadata)
    target = Path(path)
    _write(target, content)
    return target


def _flat(estimator: Any) -> list[Any]:
    """Returns the steps of an estimator: searches as their best one, pipelines as
    their steps."""
    from sklearn.pipeline import Pipeline
    from sklearn.utils.validation import check_is_fitted

    parameters = estimator.get_params(deep=False) if hasattr(estimator, "get_params") else {}
    # scikit-learn's searches, and those of other packages that are made like them.
    if {"estimator", "cv", "refit"} <= parameters.keys():
        check_is_fitted(estimator)
        if not hasattr(estimator, "best_estimator_"):
            raise ValueError(f"{type(estimator).__name__} has refit=False, so it has no estimator")
        return _flat(estimator.best_estimator_)
    if isinstance(estimator, Pipeline):
        return [part for _, step in estimator.steps for part in _flat(step)]
    # Pipelines have these for no step.
    return [] if estimator is None or estimator == "passthrough" else [estimator]


def _split(steps: list[Any], given: Features | None) -> tuple[list[Any], Features]:
    """Returns the steps after the features, and the features."""
    from imagegpt.sklearn import Features

    own = [step for step in steps if isinstance(step, Features)]
    if own and given is not None:
        raise ValueError("features: the estimator has Features of its own; leave the argument out")
    if own and (len(own) > 1 or steps[0] is not own[0]):
        raise ValueError("the estimator has steps before its Features, or several of them")
    features = own[0] if own else given
    if features is None:
        raise ValueError(
            "features: the estimator has no Features; say how its features were made, "
            "features=Features(model, layer=…)"
        )
    if features.normalize:
        raise ValueError("normalize=True divides by each vector's length, and a head cannot")
    if features.pooling != "mean":
        raise ValueError(f"pooling={features.pooling!r}: a head reads mean features")
    return (steps[1:] if own else steps), features


def _linear_of_steps(steps: list[Any]) -> _Linear:
    if not steps:
        raise TypeError("the estimator has no classifier after its Features")
    before = tuple(steps[:-1])
    linear = _linear(steps[-1])
    for step in before:
        _check_is_affine(step)
    return replace(linear, steps=before + linear.steps)


def _linear(classifier: Any) -> _Linear:
    """Returns a classifier's matrix and bias.

    Raises:
        TypeError, ValueError: The classifier is no exact linear head.
    """
    from sklearn.base import is_classifier
    from sklearn.utils.validation import check_is_fitted

    kind = type(classifier).__name__
    is_own = type(classifier).__module__.startswith("sklearn.")
    if is_own and kind in _PLAIN:
        check_is_fitted(classifier)
        return _of_coefficients(classifier)
    if is_own and kind in ("SVC", "NuSVC"):
        if classifier.kernel != "linear":
            raise ValueError(f"{kind} with kernel={classifier.kernel!r} is not linear")
        check_is_fitted(classifier)
        if len(classifier.classes_) > 2:
            raise ValueError(
                f"{kind} decides {len(classifier.classes_)} classes by votes between pairs, which "
                f"is no linear head; use LinearSVC, or OneVsRestClassifier({kind}(kernel='linear'))"
            )
        return _of_coefficients(classifier)
    if is_own and kind in ("OneVsRestClassifier", "MultiOutputClassifier"):
        check_is_fitted(classifier)
        return _of_several(classifier)
    if not is_classifier(classifier):
        raise TypeError(f"{kind} is no classifier; a head has classes: {_EXPORTABLE}")
    raise TypeError(f"{kind} is no linear head that can be exported; these are: {_EXPORTABLE}")


def _of_coefficients(classifier: Any) -> _Linear:
    weight = classifier.coef_
    weight = numpy.atleast_2d(
        numpy.asarray(weight.toarray() if hasattr(weight, "toarray") else weight, numpy.float64)
    )
    # One number if fit_intercept is False.
    bias = numpy.broadcast_to(
        numpy.asarray(classifier.intercept_, numpy.float64).reshape(-1), (len(weight),)
    )
    binarizer = getattr(classifier, "_label_binarizer", None)
    is_multi_label = getattr(binarizer, "y_type_", "").startswith("multilabel")
    classes = () if is_multi_label else tuple(classifier.classes_)
    return _Linear(
        weight, bias, classes, is_multi_label, classifier.decision_function, classifier.predict
    )


def _of_several(classifier: Any) -> _Linear:
    """Returns the rows of one classifier per class or label as one matrix."""
    kind = type(classifier).__name__
    parts = []
    for number, part in enumerate(classifier.estimators_):
        if type(part).__name__ == "_ConstantPredictor":
            raise ValueError(f"label {number} has one value in the training, so it has no weights")
        linear = _linear_of_steps(_flat(part))
        if linear.weight.shape[0] != 1 or linear.is_multi_label:
            raise ValueError(f"part {number} of {kind} has more than two classes")
        parts.append((linear, *_folded(linear)))
    weight = numpy.vstack([weight for _, weight, _ in parts])
    bias = numpy.concatenate([bias for _, _, bias in parts])
    is_multi_label = kind == "MultiOutputClassifier" or bool(classifier.multilabel_)
    if kind == "MultiOutputClassifier":
        for number, (linear, _, _) in enumerate(parts):
            if linear.classes not in ((0, 1), (False, True)):
                raise ValueError(
                    f"output {number} has the classes {list(linear.classes)}; labels are 0 and 1"
                )

    def decide(vectors: Any) -> Any:
        columns = [_decided(linear, vectors).reshape(-1) for linear, _, _ in parts]
        return numpy.stack(columns, axis=1)

    classes = () if is_multi_label else tuple(classifier.classes_)
    return _Linear(weight, bias, classes, is_multi_label, decide, classifier.predict)


def _decided(linear: _Linear, vectors: Any) -> NDArray[Any]:
    """Returns the decision values of the estimator itself."""
    return numpy.asarray(linear.decide(_prepared(linear, vectors)), numpy.float64)


def _prepared(linear: _Linear, vectors: Any) -> Any:
    for step in linear.steps:
        vectors = step.transform(vectors)
    return vectors


def _check_is_affine(step: Any) -> None:
    """Raises an error for a step that cannot be folded."""
    kind = type(step).__name__
    if not _affine_kind(step):
        raise TypeError(f"the step {kind} is not affine, or not known to be; a head cannot have it")
    if getattr(step, "clip", False):
        raise ValueError(f"the step {kind} has clip=True, and a head cannot clip")


def _affine_kind(step: Any) -> str:
    """Returns how a step is folded; empty if it is not."""
    from sklearn.feature_selection import SelectorMixin

    kind = type(step).__name__
    if not type(step).__module__.startswith("sklearn."):
        return ""
    if isinstance(step, SelectorMixin):
        return "selection"
    if kind in ("StandardScaler", "MinMaxScaler", "MaxAbsScaler", "RobustScaler"):
        return "scale"
    if kind in ("PCA", "IncrementalPCA", "TruncatedSVD"):
        return "projection"
    return ""


def _folded(linear: _Linear) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns weight and bias on the features themselves."""
    weight, bias = linear.weight, linear.bias
    for step in reversed(linear.steps):
        weight, bias = _fold(step, weight, bias)
    return weight, bias


def _fold(step: Any, weight: NDArray[Any], bias: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    kind = _affine_kind(step)
    if kind == "selection":
        chosen = step.get_support()
        full = numpy.zeros((len(weight), len(chosen)))
        full[:, chosen] = weight
        return full, bias
    if kind == "projection":
        rows = numpy.asarray(step.components_, numpy.float64)
        if getattr(step, "whiten", False):
            deviation = numpy.sqrt(step.explained_variance_)
            least = numpy.finfo(deviation.dtype).eps
            rows = rows / numpy.maximum(deviation, least)[:, None]
        weight = weight @ rows
        mean = getattr(step, "mean_", None)
        return weight, bias if mean is None else bias - weight @ mean
    name = type(step).__name__
    if name == "MinMaxScaler":
        return weight * step.scale_, bias + weight @ step.min_
    if getattr(step, "scale_", None) is not None:
        weight = weight / step.scale_
    center = getattr(step, "center_" if name == "RobustScaler" else "mean_", None)
    # A StandardScaler without with_mean has a mean that it does not use.
    if center is not None and getattr(step, "with_mean", True):
        bias = bias - weight @ center
    return weight, bias


def _check_decisions(linear: _Linear, weight: NDArray[Any], bias: NDArray[Any]) -> None:
    """Compares the decision values of the file with the estimator's.

    Raises:
        ValueError: They differ.
    """
    if not (numpy.isfinite(weight).all() and numpy.isfinite(bias).all()):
        raise ValueError("the estimator's weights are not all finite numbers")
    random = numpy.random.default_rng(0)
    center, spread = _typical(linear, weight.shape[1])
    # Half as the training's features, half far from them.
    reach = numpy.where(numpy.arange(_CHECKED) % 2 == 0, 1.0, 3.0)[:, None]
    vectors = center + spread * reach * random.standard_normal((_CHECKED, weight.shape[1]))
    vectors = vectors.astype(numpy.float32)
    expected = _decided(linear, vectors.astype(numpy.float64)).reshape(_CHECKED, -1)
    actual = vectors @ weight.astype(numpy.float32).T + bias.astype(numpy.float32)
    if expected.shape != actual.shape:
        raise ValueError(f"{expected.shape[1]} decision values have {actual.shape[1]} rows")
    allowed = _TOLERANCE * float(expected.std()) + 1e-6
    difference = float(numpy.abs(expected - actual).max())
    if not difference <= allowed:
        raise ValueError(
            f"the head's decision values in 32 bits differ by {difference:.3g} from the "
            f"estimator's, more than {allowed:.3g}: features that vary little around a large "
            "mean, or a step that is not what its attributes say"
        )
    predicted = linear.predict(_prepared(linear, vectors.astype(numpy.float64)))
    if linear.is_multi_label:
        predicted = predicted.toarray() if hasattr(predicted, "toarray") else predicted
        is_same = (numpy.asarray(predicted) > 0).reshape(actual.shape) == (actual > 0)
        is_same |= numpy.abs(actual) <= 2 * allowed
    else:
        if actual.shape[1] == 1:
            actual = numpy.hstack([-actual, actual]) / 2
        ranked = numpy.sort(actual, axis=1)
        is_same = numpy.asarray(linear.classes)[actual.argmax(axis=1)] == numpy.asarray(predicted)
        is_same |= ranked[:, -1] - ranked[:, -2] <= 2 * allowed
    if not is_same.all():
        raise ValueError("the estimator's decisions are not those of its decision values")


def _typical(linear: _Linear, width: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns mean and spread of features, as far as the first step knows them."""
    center, spread = numpy.zeros(width), numpy.ones(width)
    if linear.steps:
        first = linear.steps[0]
        name = type(first).__name__
        if name == "MinMaxScaler":
            center, spread = (first.data_min_ + first.data_max_) / 2, first.data_range_ / 2
        elif name == "RobustScaler":
            center = center if first.center_ is None else first.center_
            spread = spread if first.scale_ is None else first.scale_
        elif _affine_kind(first) == "scale":
            mean = getattr(first, "mean_", None)
            center = center if mean is None else mean
            spread = spread if first.scale_ is None else first.scale_
        elif name in ("PCA", "IncrementalPCA"):
            center = first.mean_
            spread = numpy.full(width, numpy.sqrt(first.explained_variance_.mean()))
    return numpy.asarray(center, numpy.float64), numpy.asarray(spread, numpy.float64)


def _metadata(
    linear: _Linear,
    n_rows: int,
    labels: Sequence[str] | None,
    features: Features,
    figures: Mapping[str, float] | None,
) -> dict[str, str]:
    import sklearn

    import imagegpt

    layer = getattr(features, "layer_", features.layer)
    if layer is None:
        raise ValueError("features: layer=None is the model's own; name it, or fit the Features")
    metadata = {
        "labels": json.dumps(_labels(linear, n_rows, labels), ensure_ascii=False),
        "layer": str(int(layer)),
        "norm": features.norm.upper().replace("-", "_"),
        "context": features.context.upper().replace("-", "_"),
        "fit": features.image_fit.upper().replace("-", "_"),
        "alpha": features.alpha.upper(),
        "problem_type": (
            "multi_label_classification" if linear.is_multi_label else "single_label_classification"
        ),
        "tool_version": f"imagegpt {imagegpt.__version__}, scikit-learn {sklearn.__version__}",
    }
    digest = getattr(features, "weights_digest_", "")
    if digest:
        metadata["weights_digest"] = digest
    if figures:
        numbers = {str(name): float(number) for name, number in figures.items()}
        if not numpy.isfinite(list(numbers.values())).all():
            raise ValueError("figures are not all finite numbers")
        text = json.dumps(numbers)
        if len(text.encode()) > _FIGURES_BYTES_MAX:
            raise ValueError(f"figures have {len(text)} bytes, more than {_FIGURES_BYTES_MAX}")
        metadata["figures"] = text
    return metadata


def _labels(linear: _Linear, n_rows: int, given: Sequence[str] | None) -> list[str]:
    if given is None and linear.is_multi_label:
        raise ValueError("labels: several labels per image have no names; give labels=[…]")
    names = [str(name) for name in (linear.classes if given is None else given)]
    if len(names) != n_rows:
        raise ValueError(f"labels has {len(names)} names, and the estimator {n_rows} classes")
    if len(set(names)) != len(names):
        double = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"labels has the name {double!r} several times")
    return names


def _encoded(weight: NDArray[Any], bias: NDArray[Any], metadata: dict[str, str]) -> bytes:
    try:
        from safetensors.numpy import load, save
    except ImportError as error:
        raise ImportError(
            "export_head needs safetensors: pip install 'imagegpt[scikit-learn]'"
        ) from error

    tensors = {
        # safetensors stores memory as it lies, so it must lie row by row.
        "weight": numpy.ascontiguousarray(weight, numpy.float32),
        "bias": numpy.ascontiguousarray(bias, numpy.float32),
    }
    content: bytes = save(tensors, metadata)
    header = int.from_bytes(content[:8], "little")
    if header > _HEADER_BYTES_MAX:
        raise ValueError(
            f"labels: the header has {header} bytes, more than the {_HEADER_BYTES_MAX} of a head; "
            "use shorter names or fewer classes"
        )
    if len(content) > _FILE_BYTES_MAX:
        raise ValueError(
            f"the head has {len(content)} bytes, more than {_FILE_BYTES_MAX}; use fewer classes"
        )
    stored = load(content)
    if not all(numpy.array_equal(stored[name], tensors[name]) for name in tensors):
        raise ValueError("the head does not read back as it was written")
    return content


def _write(path: Path, content: bytes) -> None:
    """Writes a file through a temporary one beside it."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            # mkstemp gives no rights to others; a new file has those of the umask.
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), 0o666 & ~mask)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
