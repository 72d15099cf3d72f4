"""Features of images as a scikit-learn transformer, and heads from its classifiers.

A pipeline of images::

    from imagegpt.sklearn import Features, export_head
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    probe = make_pipeline(Features("models/emoji", layer=8), LogisticRegression())
    probe.fit(paths, labels)
    export_head(probe, "labels.safetensors")  # for imagegpt serve --head
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy

try:
    from sklearn.base import BaseEstimator, ClassNamePrefixFeaturesOutMixin, TransformerMixin
except ImportError as error:
    raise ImportError(
        "imagegpt.sklearn needs scikit-learn: pip install 'imagegpt[scikit-learn]'"
    ) from error

from imagegpt.client import Client
from imagegpt.errors import ImageError, ModelMismatchError
from imagegpt.heads import export_head
from imagegpt.images import ImageInput
from imagegpt.options import Alpha, Context, Dtype, EmbedOptions, Fit, Norm, whole_number
from imagegpt.results import ModelInfo
from imagegpt.shared import remote_client, shared_worker

if TYPE_CHECKING:
    from numpy.typing import NDArray

__all__ = ["Features", "export_head"]


class Features(ClassNamePrefixFeaturesOutMixin, TransformerMixin, BaseEstimator):
    """Transformer from images to feature vectors of one layer, float32 (n, d).

    X is a list or one-dimensional array of images in any form of
    :data:`~imagegpt.ImageInput`, such as paths; an array of pixels (n, height, width,
    3) of uint8; an array of tokens (n, positions); or a table with one column of
    images. ``fit`` learns nothing from the images: it asks the model for its digest
    and dimension. ``transform`` works without ``fit`` too.

    Clones and copies share one worker or connection of their process. Each process of
    ``n_jobs`` starts a worker of its own for ``model``, so give ``endpoint`` to several
    processes. A search over ``features__layer`` starts one worker if
    ``flags={"feature_layer": N}`` names the last of its layers.

    Args:
        model: Model that this process serves to itself, as
            :class:`~imagegpt.LocalWorker` takes one: a directory, or a hub id such as
            ``"openai/imagegpt-small"``. Always a model and never an address.
        endpoint: Address of a worker, or several, as :class:`~imagegpt.Client` takes
            them. Exactly one of ``model`` and ``endpoint`` is given.
        layer: Layer whose features are taken; ``None`` for the model's default. Layer
            16 was the best one of imagegpt-small for linear probes in the paper.
        image_fit: ``"squash"`` or ``"center-crop"``: how images become squares. (The
            client's ``fit``, which is the name of a method here.)
        alpha: Colors of transparent pixels: stored (``"drop"``) or ``"white"``.
        context: ``"raw"`` or ``"sos-shifted"``.
        norm: ``"pre-attn-rms"`` or ``"none"``.
        pooling: ``"mean"``, or ``"last"`` for the last layer.
        normalize: True to scale each vector to length 1.
        dtype: Elements of the worker's answers, ``"f32"`` or ``"f16"``; the transformed
            array has float32 in both cases.
        on_error: ``"raise"`` raises the first image's error, ``"nan"`` warns and gives
            a row of NaN for each image that failed.
        flags: Flags of the worker that ``model`` starts, with underscores
            (``{"precision": "int8"}``), and ``start_timeout``.
        client_options: Keyword arguments of the :class:`~imagegpt.Client` of
            ``endpoint``, such as ``token_file``. They are in pickles and in the printed
            estimator, so give ``token_file`` and not ``token``.

    Attributes:
        layer_: Layer whose features are taken.
        digest_: Digest of the model (``"sha256:…"``).
        weights_digest_: Digest of the model's weights, equal in all precisions.
            ``transform`` raises :class:`~imagegpt.ModelMismatchError` for a model of
            other weights.
    """

    layer_: int
    digest_: str
    weights_digest_: str

    def __init__(
        self,
        model: str | os.PathLike[str] | None = None,
        *,
        endpoint: str | Sequence[str] | None = None,
        layer: int | None = 16,
        image_fit: Fit = "squash",
        alpha: Alpha = "drop",
        context: Context = "raw",
        norm: Norm = "pre-attn-rms",
        pooling: Literal["mean", "last"] = "mean",
        normalize: bool = False,
        dtype: Dtype = "f32",
        on_error: Literal["raise", "nan"] = "raise",
        flags: Mapping[str, Any] | None = None,
        client_options: Mapping[str, Any] | None = None,
    ) -> None:
        self.model = model
        self.endpoint = endpoint
        self.layer = layer
        self.image_fit = image_fit
        self.alpha = alpha
        self.context = context
        self.norm = norm
        self.pooling = pooling
        self.normalize = normalize
        self.dtype = dtype
        self.on_error = on_error
        self.flags = flags
        self.client_options = client_options

    def fit(self, X: Any, y: Any = None) -> Features:
        """Asks the model for its digest and dimension.

        Args:
            X: Images; they are not embedded.
            y: Not used.

        Raises:
            ValueError: A parameter has a wrong value, or the model does not serve the
                layer.
            WorkerError: No worker answers.
            WorkerStartError: The worker of ``model`` did not become ready.
        """
        images_of(X)
        _, info = self._served()
        self.layer_ = info.layer_default if self.layer is None else int(self.layer)
        self.digest_ = info.digest
        self.weights_digest_ = info.weights_digest
        self._n_features_out = info.dimension
        return self

    def transform(self, X: Any) -> NDArray[numpy.float32]:
        """Embeds images.

        Args:
            X: Images, n of them.

        Returns:
            Vectors, float32 (n, d), in the order of the images.

        Raises:
            ImageError: An image failed, with ``on_error="raise"``; its ``id`` is the
                image's index.
            ModelMismatchError: The model has other weights than the one of ``fit``.
            WorkerError: No worker answers.
        """
        images = images_of(X)
        client, info = self._served()
        self._check_same(info)
        options: dict[str, Any] = {
            "layers": self.layer,
            "pooling": self.pooling,
            "fit": self.image_fit,
            "alpha": self.alpha,
            "context": self.context,
            "norm": self.norm,
            "normalize": self.normalize,
            "dtype": self.dtype,
        }
        if self.on_error == "raise":
            return numpy.asarray(client.embed(images, **options), numpy.float32)
        outcomes = client.embed(images, on_error="return", **options)
        vectors = numpy.full((len(images), info.dimension), numpy.nan, numpy.float32)
        failures = []
        for row, outcome in enumerate(outcomes):
            if isinstance(outcome, ImageError):
                failures.append(outcome)
            else:
                vectors[row] = outcome
        if failures:
            text = f"{len(failures)} of {len(images)} images are rows of NaN; {failures[0]}"
            warnings.warn(text, RuntimeWarning, stacklevel=2)
        return vectors

    def _served(self) -> tuple[Client, ModelInfo]:
        """Returns the shared client and its model, after a check of the parameters."""
        if (self.model is None) == (self.endpoint is None):
            given = "neither is" if self.model is None else "both are"
            raise ValueError(f"model or endpoint: {given} given; give one of them")
        if self.on_error not in ("raise", "nan"):
            raise ValueError(f"on_error={self.on_error!r} is none of 'raise', 'nan'")
        if self.pooling not in ("mean", "last"):
            raise ValueError(f"pooling={self.pooling!r} is none of 'mean', 'last'")
        layer = None if self.layer is None else whole_number("layer", self.layer, 0)
        EmbedOptions.checked(
            layer,
            self.pooling,
            self.image_fit,
            self.alpha,
            self.context,
            self.norm,
            self.normalize,
            self.dtype,
        )
        client: Client
        if self.model is not None:
            if self.client_options:
                raise ValueError("client_options are those of endpoint; model has flags")
            client = shared_worker(self.model, self.flags, layer)
        elif self.endpoint is not None:
            if self.flags:
                raise ValueError("flags are those of model; a worker at endpoint has its own")
            client = remote_client(self.endpoint, self.client_options)
        info = client.model()
        if layer is not None and layer not in info.layers_served:
            served = ", ".join(map(str, info.layers_served))
            raise ValueError(
                f"layer={layer} is not served by {info.name}; it serves {served} "
                "(--feature-layer of the worker, or of imagegpt compile)"
            )
        return client, info

    def _check_same(self, info: ModelInfo) -> None:
        fitted: str = getattr(self, "weights_digest_", "")
        served = info.weights_digest
        if not (fitted and served):
            # Graphs that others exported do not say of which weights they are.
            fitted, served = getattr(self, "digest_", ""), info.digest
        if fitted and fitted != served:
            raise ModelMismatchError(
                "FAILED_PRECONDITION",
                f"the model {info.name} has the digest {served}, and the one that Features was "
                f"fitted with {fitted}; serve that model, or fit again",
            )

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.requires_fit = False
        # Images are no table of numbers.
        tags.input_tags.two_d_array = False
        tags.input_tags.string = True
        tags.no_validation = True
        return tags


def images_of(X: Any) -> list[ImageInput]:
    """Returns the images of X as a list.

    Raises:
        TypeError: X is one image, or nothing that has images.
        ValueError: X has a shape that is no list of images.
    """
    if isinstance(X, (str, bytes, bytearray, memoryview, os.PathLike, Mapping)):
        raise TypeError(f"X is one {type(X).__name__}; give a list of images")
    if hasattr(X, "columns") and hasattr(X, "iloc"):
        if len(X.columns) != 1:
            raise ValueError(f"X has {len(X.columns)} columns; give the column of images")
        X = X.iloc[:, 0]
    if isinstance(X, numpy.ndarray):
        return _rows_of(X)
    if not isinstance(X, Iterable):
        raise TypeError(f"X is a {type(X).__name__}; give a list of images")
    return list(X)


def _rows_of(array: NDArray[Any]) -> list[ImageInput]:
    if array.dtype.kind == "S":
        raise ValueError(
            f"X is an array of {array.dtype}, which drops zero bytes at the end of a file; use "
            "dtype=object"
        )
    is_object = array.dtype.kind in "OU"
    if is_object and array.ndim == 2 and array.shape[1] == 1:
        return list(array[:, 0])
    is_images = array.ndim == 1 if is_object else array.ndim in (2, 4)
    if not is_images:
        raise ValueError(
            f"X of shape {array.shape} and {array.dtype} is neither pixels, (n, height, width, 3) "
            "of uint8, nor tokens, (n, positions), nor a column of images"
        )
    return list(array)
