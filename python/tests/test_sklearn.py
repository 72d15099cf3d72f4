"""The scikit-learn transformer, and the heads that are exported from classifiers."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import PIL.Image
import pytest
import sklearn
from safetensors import safe_open
from sklearn.base import BaseEstimator, clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA, IncrementalPCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.ensemble import RandomForestClassifier
from sklearn.feature_selection import SelectKBest, VarianceThreshold
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    RidgeClassifier,
    SGDClassifier,
)
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multiclass import OneVsOneClassifier, OneVsRestClassifier
from sklearn.multioutput import MultiOutputClassifier
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    PolynomialFeatures,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC, NuSVC
from sklearn.utils import estimator_checks

from imagegpt import (
    Client,
    ImageError,
    InvalidImageError,
    LocalWorker,
    ModelMismatchError,
    UnavailableError,
)
from imagegpt.shared import shared_worker
from imagegpt.sklearn import Features, export_head, images_of

ROOT = Path(__file__).parents[2]
MODELS = Path(os.environ.get("IMAGEGPT_MODELS", ROOT / "models"))
MODEL = MODELS / "emoji"
LAYER = 8
# One worker for all layers, which answers pictures that it has seen at once.
FLAGS = {"feature_layer": LAYER, "cache_bytes": "64MiB"}


@pytest.fixture(scope="session")
def emoji_worker() -> LocalWorker:
    """The worker that the Features of these tests share."""
    return shared_worker(MODEL, FLAGS, LAYER)


@pytest.fixture(scope="session")
def paths(pictures: list[Path]) -> list[str]:
    return list(map(str, pictures))


@pytest.fixture(scope="session")
def classes(paths: list[str]) -> list[str]:
    return [Path(path).parent.name for path in paths]


@pytest.fixture(scope="session")
def vectors(emoji_worker: LocalWorker, paths: list[str]) -> Any:
    return emoji_worker.embed(paths, layers=LAYER, alpha="white")


def features(**parameters: Any) -> Features:
    return Features(MODEL, **{"layer": LAYER, "alpha": "white", "flags": FLAGS, **parameters})


# The transformer.


def test_vectors_are_those_of_the_client(paths: list[str], vectors: Any) -> None:
    got = features().fit_transform(paths)
    assert got.dtype == numpy.float32
    assert got.shape == (45, 192)
    numpy.testing.assert_array_equal(got, vectors)
    # Without fit too.
    numpy.testing.assert_array_equal(features().transform(paths[:2]), vectors[:2])


def test_images_come_in_all_forms(paths: list[str], vectors: Any) -> None:
    import pandas

    step = features().fit(paths)
    files = [Path(path).read_bytes() for path in paths[:3]]
    objects = numpy.empty(3, object)
    objects[:] = files
    for images in (
        numpy.array(paths[:3]),
        [Path(path) for path in paths[:3]],
        files,
        objects,
        objects.reshape(3, 1),
        [PIL.Image.open(path) for path in paths[:3]],
        [{"bytes": file, "path": None} for file in files],
        pandas.Series(paths[:3]),
        pandas.DataFrame({"image": paths[:3]}),
        (path for path in paths[:3]),
    ):
        numpy.testing.assert_array_equal(step.transform(images), vectors[:3])
    pixels = numpy.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), numpy.uint8)
    assert step.transform(pixels).shape == (2, 192)
    assert step.transform(numpy.zeros((2, 1024), numpy.int64)).shape == (2, 192)
    assert step.transform([]).shape == (0, 192)


@pytest.mark.parametrize(
    ("X", "error", "words"),
    [
        ("a.png", TypeError, "one str"),
        (b"file", TypeError, "one bytes"),
        (Path("a.png"), TypeError, "one PosixPath"),
        ({"bytes": b"", "path": None}, TypeError, "one dict"),
        (7, TypeError, "list of images"),
        (numpy.zeros((32, 32, 3), numpy.uint8), ValueError, r"\(32, 32, 3\)"),
        (numpy.array([b"a\0"]), ValueError, "zero bytes"),
        (numpy.array([["a", "b"]]), ValueError, "column of images"),
    ],
)
def test_what_is_no_list_of_images_is_refused(X: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        images_of(X)


@pytest.mark.parametrize(
    ("parameters", "error", "words"),
    [
        ({"model": None}, ValueError, "neither is given"),
        ({"endpoint": "127.0.0.1:1"}, ValueError, "both are given"),
        ({"layer": 1.5}, TypeError, "whole number"),
        ({"layer": 9}, ValueError, "layer=9 is not served by emoji"),
        ({"alpha": "black"}, ValueError, "alpha='black'"),
        ({"image_fit": "crop"}, ValueError, "fit='crop'"),
        ({"context": "cooked"}, ValueError, "context='cooked'"),
        ({"norm": "l2"}, ValueError, "norm='l2'"),
        ({"pooling": "none"}, ValueError, "pooling='none'"),
        ({"dtype": "f64"}, ValueError, "dtype='f64'"),
        ({"on_error": "return"}, ValueError, "on_error='return'"),
        ({"client_options": {"timeout": 1}}, ValueError, "client_options"),
        ({"model": None, "endpoint": "127.0.0.1:1"}, ValueError, "flags are those of model"),
    ],
)
def test_wrong_parameters_are_refused_by_fit(
    paths: list[str], parameters: dict[str, Any], error: type[Exception], words: str
) -> None:
    step = features().set_params(**parameters)
    with pytest.raises(error, match=words):
        step.fit(paths)


def test_an_endpoint_gives_the_same_vectors(
    emoji_worker: LocalWorker, paths: list[str], vectors: Any
) -> None:
    step = Features(endpoint=emoji_worker.endpoint, layer=LAYER, alpha="white")
    numpy.testing.assert_array_equal(step.fit_transform(paths), vectors)
    step.set_params(client_options={"timeout": 5.0})
    numpy.testing.assert_array_equal(step.transform(paths), vectors)


def test_a_worker_that_is_not_there_is_an_error(paths: list[str]) -> None:
    step = Features(endpoint="127.0.0.1:9", client_options={"timeout": 0.5})
    with pytest.raises(UnavailableError):
        step.fit(paths)


def test_images_that_fail_raise_or_are_rows_of_nan(
    tmp_path: Path, paths: list[str], vectors: Any
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    images = [paths[0], str(broken), paths[1], "missing.png"]
    with pytest.raises(InvalidImageError) as caught:
        features().transform(images)
    assert caught.value.id in (1, 3)
    with pytest.warns(RuntimeWarning, match="2 of 4 images are rows of NaN; image 1"):
        got = features(on_error="nan").transform(images)
    assert numpy.isnan(got[[1, 3]]).all()
    numpy.testing.assert_array_equal(got[[0, 2]], vectors[:2])
    assert issubclass(InvalidImageError, ImageError)


def test_f16_on_the_way_is_float32_here(paths: list[str], vectors: Any) -> None:
    got = features(dtype="f16").transform(paths)
    assert got.dtype == numpy.float32
    numpy.testing.assert_allclose(got, vectors, atol=2e-3)
    lengths = numpy.linalg.norm(features(normalize=True).transform(paths), axis=1)
    numpy.testing.assert_allclose(lengths, 1, rtol=1e-5)


def test_a_model_of_other_weights_is_refused(paths: list[str]) -> None:
    step = features().fit(paths)
    step.weights_digest_ = "sha256:" + "0" * 64
    with pytest.raises(ModelMismatchError, match="fitted"):
        step.transform(paths)


def test_the_default_layer_is_the_models(paths: list[str]) -> None:
    step = Features(MODELS / "untrained", layer=None).fit(paths)
    assert step.layer_ == 3
    assert step.transform(paths[:1]).shape == (1, 64)


# scikit-learn's own machinery.


def test_a_pipeline_is_cloned_pickled_and_shown(paths: list[str], classes: list[str]) -> None:
    pipeline = make_pipeline(features(), StandardScaler(), LogisticRegression(C=0.1))
    copy = clone(pipeline)
    assert copy.get_params()["features__alpha"] == "white"
    copy.set_params(features__layer=2)
    assert pipeline.named_steps["features"].layer == LAYER
    pipeline.fit(paths, classes)
    assert pipeline.score(paths, classes) > 0.9
    again = pickle.loads(pickle.dumps(pipeline))
    assert (again.predict(paths) == pipeline.predict(paths)).all()
    assert "Features" in pipeline._repr_html_()
    assert "layer=8" in repr(features())


def test_vectors_become_a_data_frame_with_names(paths: list[str]) -> None:
    step = features().set_output(transform="pandas").fit(paths)
    frame = step.transform(paths)
    assert list(frame.columns[:2]) == ["features0", "features1"]
    assert list(step.get_feature_names_out()) == list(frame.columns)
    assert frame.shape == (45, 192)


@pytest.mark.slow
def test_searches_share_one_worker(
    emoji_worker: LocalWorker, paths: list[str], classes: list[str]
) -> None:
    pipeline = make_pipeline(features(), StandardScaler(), LogisticRegression())
    grid = {"features__layer": [2, LAYER], "logisticregression__C": [0.01, 0.1]}
    search = GridSearchCV(pipeline, grid, cv=2).fit(paths, classes)
    assert len(search.cv_results_["params"]) == 4
    assert numpy.isfinite(search.cv_results_["mean_test_score"]).all()
    assert shared_worker(MODEL, FLAGS, 2) is emoji_worker


@pytest.mark.slow
def test_a_later_layer_replaces_the_worker(paths: list[str]) -> None:
    first = shared_worker(MODEL, {"model_name": "shared"}, 1)
    assert 2 not in first.model().layers_served
    second = shared_worker(MODEL, {"model_name": "shared"}, 2)
    assert second is not first
    assert shared_worker(str(MODEL), {"model_name": "shared"}, 1) is second
    # The first one serves those who hold it.
    assert first.embed(paths[:1]).shape == (1, 192)
    second.close()
    third = shared_worker(MODEL, {"model_name": "shared"}, 2)
    assert third.embed(paths[:1]).shape == (1, 192)


@pytest.mark.slow
def test_processes_of_cross_validation_have_workers_of_their_own(
    emoji_worker: LocalWorker, paths: list[str], classes: list[str]
) -> None:
    for step in (features(), Features(endpoint=emoji_worker.endpoint, layer=LAYER)):
        pipeline = make_pipeline(step, StandardScaler(), LogisticRegression(C=0.1))
        scores = cross_val_score(pipeline, paths, classes, cv=3, n_jobs=2, error_score="raise")
        assert scores.mean() > 1 / 9


def _pids_of_a_fork(path: str, pipe: Any) -> None:
    vectors = features().fit_transform([path])
    pipe.send((shared_worker(MODEL, FLAGS, LAYER).pid, vectors.tobytes()))


@pytest.mark.slow  # gRPC hangs in a forked child now and then.
def test_a_fork_starts_a_worker_of_its_own(
    emoji_worker: LocalWorker, paths: list[str], vectors: Any
) -> None:
    fork = multiprocessing.get_context("fork")
    here, there = fork.Pipe()
    child = fork.Process(target=_pids_of_a_fork, args=(paths[0], there))
    child.start()
    assert here.poll(60)
    pid, content = here.recv()
    child.join(60)
    assert child.exitcode == 0
    assert pid != emoji_worker.pid
    assert content == vectors[:1].tobytes()
    assert emoji_worker.embed(paths[:1]).shape == (1, 192)


@pytest.mark.slow
def test_the_worker_ends_with_the_process(paths: list[str]) -> None:
    program = (
        "import sys; from imagegpt.sklearn import Features; from imagegpt.shared import _shared\n"
        "Features(sys.argv[1], layer=1).fit_transform(sys.argv[2:])\n"
        "print(*[running.worker.pid for running in _shared.workers.values()])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(MODEL), paths[0]],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    (pid,) = map(int, done.stdout.split())
    assert not Path(f"/proc/{pid}").exists()


def _named_checks() -> Iterator[Callable[..., None]]:
    """The checks of scikit-learn that need no table of numbers as X."""
    for name in (
        "check_estimator_cloneable",
        "check_estimator_repr",
        "check_no_attributes_set_in_init",
        "check_parameters_default_constructible",
        "check_get_params_invariance",
        "check_set_params",
        "check_valid_tag_types",
        "check_estimator_tags_renamed",
        "check_do_not_raise_errors_in_init_or_set_params",
        "check_mixin_order",
    ):
        yield getattr(estimator_checks, name)


@pytest.mark.parametrize("check", _named_checks(), ids=lambda check: check.__name__)
def test_the_applicable_checks_of_scikit_learn_pass(check: Callable[..., None]) -> None:
    check("Features", features())


def test_scikit_learn_knows_that_images_are_no_table() -> None:
    # So its other checks, which fit tables of random numbers, do not apply.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert not [
            check
            for _, check in estimator_checks.estimator_checks_generator(features(), legacy=True)
            if "check_fit2d" in str(check)
        ]


# Heads.


@pytest.fixture(scope="session")
def samples() -> tuple[Any, Any]:
    """Random vectors of the model's width in five classes that overlap."""
    random = numpy.random.default_rng(1)
    y = random.integers(0, 5, 300)
    centers = random.standard_normal((5, 192))
    return centers[y] + 3 + 2 * random.standard_normal((300, 192)), y


def read(path: Path) -> tuple[dict[str, str], Any, Any]:
    with safe_open(path, "numpy") as file:
        return file.metadata(), file.get_tensor("weight"), file.get_tensor("bias")


def logits_of(path: Path, vectors: Any) -> Any:
    _, weight, bias = read(path)
    return vectors.astype(numpy.float64) @ weight.T.astype(numpy.float64) + bias


MULTI_CLASS = {
    "logistic": LogisticRegression(C=0.1),
    "logistic-cv": LogisticRegressionCV(Cs=2, cv=2, max_iter=2000, use_legacy_attributes=False),
    "linear-svc": LinearSVC(C=0.01),
    "ridge": RidgeClassifier(),
    "sgd-hinge": SGDClassifier(random_state=0),
    "sgd-log": SGDClassifier(loss="log_loss", random_state=0),
    "perceptron": Perceptron(),
    "lda": LinearDiscriminantAnalysis(solver="lsqr", shrinkage="auto"),
    "lda-svd": LinearDiscriminantAnalysis(),
    "no-intercept": LogisticRegression(C=0.1, fit_intercept=False),
    "ovr-logistic": OneVsRestClassifier(LogisticRegression(C=0.1)),
    "ovr-svc": OneVsRestClassifier(SVC(kernel="linear")),
    "ovr-pipeline": OneVsRestClassifier(make_pipeline(StandardScaler(), LinearSVC(C=0.01))),
}
TWO_CLASSES = MULTI_CLASS | {
    "svc": SVC(kernel="linear"),
    "nu-svc": NuSVC(kernel="linear", nu=0.1),
}
STEPS = {
    "none": [],
    "standard": [StandardScaler()],
    "no-mean": [StandardScaler(with_mean=False)],
    "max-abs": [MaxAbsScaler()],
    "min-max": [MinMaxScaler((-1, 2))],
    "robust": [RobustScaler()],
    "pca": [StandardScaler(), PCA(20)],
    "whitened": [PCA(20, whiten=True), StandardScaler()],
    "incremental": [IncrementalPCA(20, whiten=True)],
    "svd": [TruncatedSVD(20)],
    "selection": [VarianceThreshold(), StandardScaler(), SelectKBest(k=50), "passthrough"],
}


def fitted(steps: list[Any], classifier: Any, X: Any, y: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return make_pipeline(*map(clone_step, steps), clone(classifier)).fit(X, y)


def clone_step(step: Any) -> Any:
    return step if isinstance(step, str) else clone(step)


@pytest.mark.parametrize("name", MULTI_CLASS)
def test_a_head_decides_as_its_classifier(name: str, tmp_path: Path, samples: Any) -> None:
    X, y = samples
    probe = fitted([StandardScaler()], MULTI_CLASS[name], X, y)
    path = export_head(probe, tmp_path / "h", features=Features(layer=LAYER))
    logits = logits_of(path, X)
    assert logits.shape == (300, 5)
    assert (probe.classes_[logits.argmax(1)] == probe.predict(X)).all()
    numpy.testing.assert_allclose(logits, probe.decision_function(X), rtol=1e-3, atol=1e-3)
    assert json.loads(read(path)[0]["labels"]) == ["0", "1", "2", "3", "4"]


@pytest.mark.parametrize("name", TWO_CLASSES)
def test_two_classes_are_two_rows(name: str, tmp_path: Path, samples: Any) -> None:
    X, y = samples
    names = numpy.where(y > 2, "yes", "no")
    probe = fitted([StandardScaler()], TWO_CLASSES[name], X, names)
    path = export_head(probe, tmp_path / "h", features=Features(layer=LAYER))
    logits = logits_of(path, X)
    assert logits.shape == (300, 2)
    assert (probe.classes_[logits.argmax(1)] == probe.predict(X)).all()
    if name in ("logistic", "lda", "sgd-log"):
        scores = numpy.exp(logits) / numpy.exp(logits).sum(1, keepdims=True)
        numpy.testing.assert_allclose(scores, probe.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize("name", STEPS)
def test_affine_steps_are_folded(name: str, tmp_path: Path, samples: Any) -> None:
    X, y = samples
    probe = fitted(STEPS[name], LogisticRegression(C=0.1, max_iter=1000), X, y)
    path = export_head(probe, tmp_path / "h", features=Features(layer=LAYER))
    scores = numpy.exp(logits_of(path, X))
    scores /= scores.sum(1, keepdims=True)
    numpy.testing.assert_allclose(scores, probe.predict_proba(X), atol=1e-4)


@pytest.mark.parametrize(
    "classifier",
    [
        RidgeClassifier(),
        OneVsRestClassifier(LogisticRegression(C=0.1)),
        MultiOutputClassifier(LogisticRegression(C=0.1)),
        MultiOutputClassifier(make_pipeline(StandardScaler(), LinearSVC(C=0.01))),
    ],
)
def test_several_labels_have_a_score_each(classifier: Any, tmp_path: Path, samples: Any) -> None:
    X, y = samples
    several = numpy.stack([y > 1, y % 2 == 0, y == 3], axis=1).astype(int)
    probe = fitted([StandardScaler()], classifier, X, several)
    described = Features(layer=LAYER)
    with pytest.raises(ValueError, match="labels"):
        export_head(probe, tmp_path / "h", features=described)
    path = export_head(probe, tmp_path / "h", features=described, labels=["big", "even", "three"])
    metadata = read(path)[0]
    assert metadata["problem_type"] == "multi_label_classification"
    assert json.loads(metadata["labels"]) == ["big", "even", "three"]
    assert ((logits_of(path, X) > 0) == probe.predict(X)).all()


def test_the_file_says_how_features_were_made(
    tmp_path: Path, paths: list[str], classes: list[str], emoji_worker: LocalWorker
) -> None:
    step = features(context="sos-shifted", norm="none", image_fit="center-crop")
    probe = make_pipeline(step, StandardScaler(), LogisticRegression()).fit(paths, classes)
    path = export_head(probe, tmp_path / "head", figures={"accuracy": 1})
    metadata, weight, bias = read(path)
    assert (weight.shape, bias.shape) == ((9, 192), (9,))
    assert metadata["layer"] == "8"
    assert metadata["norm"] == "NONE"
    assert metadata["context"] == "SOS_SHIFTED"
    assert metadata["fit"] == "CENTER_CROP"
    assert metadata["alpha"] == "WHITE"
    assert metadata["weights_digest"] == emoji_worker.model().weights_digest
    assert json.loads(metadata["figures"]) == {"accuracy": 1}
    assert sklearn.__version__ in metadata["tool_version"]
    assert os.listdir(tmp_path) == ["head"]


@pytest.mark.slow
def test_the_best_of_a_search_is_exported(
    tmp_path: Path, paths: list[str], classes: list[str]
) -> None:
    pipeline = make_pipeline(features(), StandardScaler(), LogisticRegression())
    grid = {"logisticregression__C": [0.01, 0.1]}
    unsure = GridSearchCV(pipeline, grid, cv=2, refit=False).fit(paths, classes)
    with pytest.raises(ValueError, match="refit=False"):
        export_head(unsure, tmp_path / "head")
    search = GridSearchCV(pipeline, grid, cv=2)
    with pytest.raises(sklearn.exceptions.NotFittedError):
        export_head(search, tmp_path / "head")
    search.fit(paths, classes)
    metadata = read(export_head(search, tmp_path / "head"))[0]
    assert json.loads(metadata["labels"]) == sorted(set(classes))


class Shifted(StandardScaler):
    """A scaler whose transform is not what its attributes say."""

    def transform(self, X: Any, copy: bool | None = None) -> Any:
        return super().transform(X, copy) + 1


class Own(LogisticRegression):
    """A classifier of the user's."""


REFUSED: dict[str, tuple[list[Any], Any, dict[str, Any], type[Exception], str]] = {
    "kernel": ([], SVC(), {}, ValueError, "kernel='rbf' is not linear"),
    "pairs": ([], SVC(kernel="linear"), {}, ValueError, "votes between pairs"),
    "one-vs-one": ([], OneVsOneClassifier(LinearSVC()), {}, TypeError, "OneVsOneClassifier"),
    "trees": ([], RandomForestClassifier(5), {}, TypeError, "RandomForestClassifier is no linear"),
    "calibrated": (
        [],
        CalibratedClassifierCV(LinearSVC()),
        {},
        TypeError,
        "CalibratedClassifierCV",
    ),
    "ovr-trees": (
        [],
        OneVsRestClassifier(RandomForestClassifier(5)),
        {},
        TypeError,
        "RandomForestClassifier",
    ),
    "regression": ([], LinearRegression(), {}, TypeError, "is no classifier"),
    "subclass": ([], Own(), {}, TypeError, "Own is no linear head"),
    "clip": ([MinMaxScaler(clip=True)], LogisticRegression(), {}, ValueError, "clip=True"),
    "normalizer": ([Normalizer()], LogisticRegression(), {}, TypeError, "step Normalizer"),
    "polynomial": (
        [PCA(3), PolynomialFeatures()],
        LogisticRegression(),
        {},
        TypeError,
        "step PolynomialFeatures",
    ),
    "own-step": ([Shifted()], LogisticRegression(), {}, TypeError, "step Shifted"),
    "normalize": ([], LogisticRegression(), {"normalize": True}, ValueError, "normalize=True"),
    "last": ([], LogisticRegression(), {"pooling": "last"}, ValueError, "pooling='last'"),
    "layer": ([], LogisticRegression(), {"layer": None}, ValueError, "layer=None"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_linear_head_is_refused(name: str, tmp_path: Path, samples: Any) -> None:
    steps, classifier, parameters, error, words = REFUSED[name]
    probe = fitted(steps, classifier, *samples)
    with pytest.raises(error, match=words):
        export_head(probe, tmp_path / "h", features=Features(**{"layer": 8, **parameters}))
    assert not os.listdir(tmp_path)


def test_arguments_that_do_not_fit_are_refused(
    tmp_path: Path, paths: list[str], classes: list[str], samples: Any
) -> None:
    X, y = samples
    described = Features(layer=LAYER)
    probe = LogisticRegression(C=0.1).fit(X, y)
    path = tmp_path / "h"
    with pytest.raises(ValueError, match="no Features"):
        export_head(probe, path)
    with pytest.raises(ValueError, match="4 names"):
        export_head(probe, path, features=described, labels=list("abcd"))
    with pytest.raises(ValueError, match="several times"):
        export_head(probe, path, features=described, labels=list("abcda"))
    with pytest.raises(ValueError, match="finite"):
        export_head(probe, path, features=described, figures={"loss": float("nan")})
    narrow, asked = LogisticRegression(C=0.1).fit(X[:, :100], y), features().fit(paths)
    with pytest.raises(ValueError, match="takes 100 numbers, and features have 192"):
        export_head(narrow, path, features=asked)
    with pytest.raises(sklearn.exceptions.NotFittedError):
        export_head(LogisticRegression(), path, features=described)
    with pytest.raises(TypeError, match="no classifier after"):
        export_head(Pipeline([("features", features())]), path)
    own = make_pipeline(features(), LogisticRegression()).fit(paths, classes)
    with pytest.raises(ValueError, match="Features of its own"):
        export_head(own, path, features=described)
    constant = OneVsRestClassifier(LogisticRegression())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        constant.fit(X, numpy.stack([y > 1, y > 9], axis=1).astype(int))
    with pytest.raises(ValueError, match="label 1 has one value"):
        export_head(constant, path, features=described, labels=["a", "b"])
    with pytest.raises(FileNotFoundError):
        export_head(probe, tmp_path / "no" / "h", features=described)
    assert not os.listdir(tmp_path)


def test_a_file_that_differs_from_its_estimator_is_never_written(
    tmp_path: Path, samples: Any
) -> None:
    X, y = samples
    described = Features(layer=LAYER)
    probe = fitted([StandardScaler()], LogisticRegression(C=0.1), X, y)
    path = export_head(probe, tmp_path / "h", features=described)
    before = path.read_bytes()
    # Decisions that are not those of the coefficients.
    decide = probe[-1].decision_function
    probe[-1].decision_function = lambda vectors: decide(vectors) + 1
    with pytest.raises(ValueError, match="decision values"):
        export_head(probe, path, features=described)
    del probe[-1].decision_function
    probe[-1].predict = lambda vectors: numpy.zeros(len(vectors), int)
    with pytest.raises(ValueError, match="decisions"):
        export_head(probe, path, features=described)
    # Features whose differences are lost in 32 bits.
    far = fitted([StandardScaler()], LogisticRegression(C=0.1), X + 1e7, y)
    with pytest.raises(ValueError, match="32 bits"):
        export_head(far, path, features=described)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["h"]


@pytest.mark.slow
def test_served_heads_classify_as_their_classifiers(
    tmp_path: Path, paths: list[str], classes: list[str], vectors: Any
) -> None:
    described = features().fit(paths)
    is_animal = numpy.array([name == "animals-nature" for name in classes])
    probes: dict[str, Any] = {}
    for name, classifier in MULTI_CLASS.items():
        probes[name] = fitted([StandardScaler()], classifier, vectors, classes)
    for name, classifier in TWO_CLASSES.items():
        probes[f"{name}-2"] = fitted([StandardScaler()], classifier, vectors, is_animal)
    for name, steps in STEPS.items():
        probes[f"steps-{name}"] = fitted(steps, LogisticRegression(), vectors, classes)
    several = numpy.stack([is_animal, numpy.array(classes) > "m"], axis=1).astype(int)
    labels = ["animal", "late"]
    probes["several"] = fitted([], OneVsRestClassifier(LogisticRegression()), vectors, several)
    heads = {}
    for name, probe in probes.items():
        named = labels if name == "several" else None
        heads[name] = export_head(probe, tmp_path / name, features=described, labels=named)
    # The cache has the features after the first head.
    with LocalWorker(MODEL, feature_layer=LAYER, head=heads, cache_bytes="64MiB") as worker:
        for name, probe in probes.items():
            answers = worker.classify(paths, head=name, top_k=9, logits=name == "several")
            predicted = probe.predict(vectors)
            if name == "several":
                logits = numpy.stack([answer.logits for answer in answers])
                assert ((logits > 0) == predicted).all()
                scores = [{c.label: c.score for c in answer.classes} for answer in answers]
                rows = [[score[label] for label in labels] for score in scores]
                numpy.testing.assert_allclose(rows, probe.predict_proba(vectors), atol=1e-3)
            else:
                assert [answer.label for answer in answers] == [str(one) for one in predicted]


def test_the_package_does_not_import_scikit_learn() -> None:
    program = "import sys, imagegpt; sys.exit('sklearn' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


def test_a_missing_library_names_the_extra() -> None:
    program = (
        "import sys; sys.modules['sklearn'] = None\n"
        "try:\n    import imagegpt.sklearn\n"
        "except ImportError as error:\n    print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install 'imagegpt[scikit-learn]'" in done.stdout


def test_a_client_is_what_features_use(emoji_worker: LocalWorker) -> None:
    assert isinstance(emoji_worker, Client)
    assert isinstance(features(), BaseEstimator)
