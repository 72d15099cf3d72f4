"""Embeddings as columns of Hugging Face datasets.

A function for ``map``::

    from imagegpt.datasets import Embedder

    rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = rows.map(Embedder("127.0.0.1:50051", column="image", layers=8), batched=True)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import numpy

from imagegpt.client import Client
from imagegpt.errors import ImageError
from imagegpt.options import (
    Alpha,
    Context,
    Dtype,
    EmbedOptions,
    Fit,
    Layers,
    Norm,
    Priority,
    together,
)

__all__ = ["Embedder"]


class Embedder:
    """Function for ``Dataset.map`` and ``IterableDataset.map`` with ``batched=True``,
    which adds the embeddings of a column of images.

    The new columns are ``embedding``, or ``embedding_8`` and so on if ``layers`` are
    several or a list, each a list of d numbers or null; and ``error``, the reason for
    which a row has no embedding, empty for the others.

    A column of ``Image(decode=False)``, of paths or of the bytes of files is sent as it
    is, which is faster than decoded pictures and lets a damaged file be the error of
    its row: ``datasets`` itself raises the error of a picture that it cannot decode.

    An embedder may be pickled and used in forked processes (``num_proc``); each
    process connects anew. All arguments are part of the dataset's fingerprint, and so
    of the cache: give ``digest`` if the model behind an endpoint may change.

    Args:
        endpoints: As in :class:`~imagegpt.Client`.
        column: Column of images, in any form of :data:`~imagegpt.ImageInput`.
        layers: Layer, several layers, or ``"all"``. Default: the model's default.
        pooling: ``"mean"``, or ``"last"`` for the last layer.
        fit: ``"squash"`` (default) or ``"center-crop"``.
        alpha: ``"drop"`` (default) or ``"white"``.
        context: ``"raw"`` or ``"sos-shifted"``.
        norm: ``"pre-attn-rms"`` or ``"none"``.
        normalize: True to scale each vector to length 1.
        dtype: ``"f32"`` or ``"f16"``, of the columns too.
        priority: ``"bulk"`` (default) lets interactive calls go first.
        output: Name of the embeddings' column, and beginning of several names.
        error_column: Name of the errors' column.
        on_error: ``"return"`` gives rows that fail null and the reason, ``"raise"``
            raises the first image's error.
        digest: Digest that the workers' model must have (``Client.model().digest``).
        timeout: As in :class:`~imagegpt.Client`.
        client_options: Further keyword arguments of :class:`~imagegpt.Client`, such as
            ``token_file``.

    Raises:
        TypeError, ValueError: An argument has a wrong value.
    """

    def __init__(
        self,
        endpoints: str | Sequence[str] | None = None,
        *,
        column: str = "image",
        layers: Layers = None,
        pooling: Literal["mean", "last"] = "mean",
        fit: Fit | None = None,
        alpha: Alpha | None = None,
        context: Context = "raw",
        norm: Norm = "pre-attn-rms",
        normalize: bool = False,
        dtype: Dtype = "f32",
        priority: Priority | None = "bulk",
        output: str = "embedding",
        error_column: str = "error",
        on_error: Literal["raise", "return"] = "return",
        digest: str | None = None,
        timeout: float | None = 300.0,
        **client_options: Any,
    ) -> None:
        if pooling not in ("mean", "last"):
            raise ValueError(f"pooling={pooling!r} is none of 'mean', 'last'")
        if on_error not in ("raise", "return"):
            raise ValueError(f"on_error={on_error!r} is neither 'raise' nor 'return'")
        options = EmbedOptions.checked(layers, pooling, fit, alpha, context, norm, normalize, dtype)
        if len({column, output, error_column}) < 3:
            raise ValueError(
                f"column={column!r}, output={output!r} and error_column={error_column!r} are not "
                "three names"
            )
        # Equal arguments give equal fingerprints, so they are kept in one form.
        self._column, self._output, self._error_column = column, output, error_column
        self._raises = on_error == "raise"
        self._has_layer_axis = options.has_layer_axis
        self._embed: dict[str, Any] = {
            "layers": list(options.layers)
            if isinstance(options.layers, tuple) and options.has_layer_axis
            else (options.layers[0] if isinstance(options.layers, tuple) else options.layers),
            "pooling": pooling,
            "fit": fit,
            "alpha": alpha,
            "context": context,
            "norm": norm,
            "normalize": bool(normalize),
            "dtype": dtype,
            "priority": priority,
        }
        self._client_arguments: dict[str, Any] = {
            "endpoints": endpoints
            if endpoints is None or isinstance(endpoints, str)
            # A list and a tuple are the same endpoints.
            else list(endpoints),
            "timeout": timeout,
            "digest": digest,
            **client_options,
        }
        self._client: Client | None = Client(**self._client_arguments)
        self._layers: list[int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # The fingerprint is made of this state, so nothing that a call changes is in it.
        return {**self.__dict__, "_client": None, "_layers": None}

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the new columns of a batch.

        Args:
            batch: Columns by name, each of n rows.

        Raises:
            KeyError: The batch does not have the column.
            ImageError: An image failed, with ``on_error="raise"``.
            WorkerError: No worker answers, or the model does not have the features.
        """
        if not isinstance(batch, Mapping):
            raise TypeError(
                f"the batch is a {type(batch).__name__}; call map on rows.with_format(None)"
            )
        if self._column not in batch:
            raise KeyError(
                f"the batch has no column {self._column!r}; it has {', '.join(map(repr, batch))}"
            )
        column = batch[self._column]
        if isinstance(column, (Mapping, str, bytes)) or not isinstance(column, Iterable):
            raise TypeError(
                f"the column {self._column!r} is a single {type(column).__name__}; call map with "
                "batched=True"
            )
        images = list(column)
        present = [row for row, image in enumerate(images) if image is not None]
        client = self._connected()
        outcomes: list[Any] = [ImageError(0, "INVALID_ARGUMENT", "the image is null")] * len(images)
        pictures = [_picture(images[row]) for row in present]
        embedded = client.embed(pictures, on_error="return", **self._embed)
        for row, outcome in zip(present, embedded, strict=True):
            outcomes[row] = outcome
        if self._raises:
            for row, outcome in enumerate(outcomes):
                if isinstance(outcome, ImageError):
                    outcome.id = row
                    raise outcome
        return self._columns(client, outcomes)

    def features(self, features: Any = None) -> Any:
        """Returns the types of all columns after the map, for its argument
        ``features``. Without it ``datasets`` takes the types from the first batch, and
        ends with an error if no image of that batch has an embedding.

        Args:
            features: Types of the columns before the map (``Dataset.features``).
        """
        try:
            from datasets import Features, List, Value
        except ImportError as error:
            raise ImportError(
                "Embedder.features needs datasets: pip install 'imagegpt[datasets]'"
            ) from error
        numbers = List(Value("float16" if self._embed["dtype"] == "f16" else "float32"))
        client = self._connected()
        added = dict.fromkeys(self._names(client), numbers)
        return Features({**(features or {}), **added, self._error_column: Value("string")})

    def _connected(self) -> Client:
        if self._client is None:
            self._client = Client(**self._client_arguments)
        return self._client

    def _names(self, client: Client) -> list[str]:
        """Returns the names of the embeddings' columns."""
        if not self._has_layer_axis:
            return [self._output]
        layers = self._embed["layers"]
        if layers == "all":
            if self._layers is None:
                self._layers = together(client.model())
            layers = self._layers
        return [f"{self._output}_{layer}" for layer in layers]

    def _columns(self, client: Client, outcomes: list[Any]) -> dict[str, Any]:
        columns: dict[str, Any] = {}
        for position, name in enumerate(self._names(client)):
            values: list[Any] = []
            for outcome in outcomes:
                if isinstance(outcome, ImageError):
                    values.append(None)
                else:
                    values.append(outcome[position] if self._has_layer_axis else outcome)
            # One array is written without a look at each row.
            is_full = bool(values) and all(value is not None for value in values)
            columns[name] = numpy.stack(values) if is_full else values
        # Empty and not null, since datasets takes a column whose first batch is null
        # for one without a type.
        columns[self._error_column] = [
            f"{outcome.code}: {outcome.message}" if isinstance(outcome, ImageError) else ""
            for outcome in outcomes
        ]
        return columns


def _picture(image: Any) -> Any:
    """Returns an image as the client takes it: nested lists and arrays of whole
    numbers, as columns of arrays have them, as pixels or tokens; an array of gray
    pixels, or of pixels with transparency, as ``with_format("numpy")`` gives pictures
    of these modes, as a Pillow image."""
    if isinstance(image, list):
        try:
            image = numpy.asarray(image)
        except ValueError:  # Rows of different lengths.
            return numpy.zeros((0, 0))
    if not isinstance(image, numpy.ndarray):
        return image
    is_whole = image.ndim > 1 and image.dtype.kind in "iu" and image.size
    if is_whole and image.min() >= 0 and image.max() <= 255:
        image = image.astype(numpy.uint8)
    if image.dtype != numpy.uint8:
        return image
    if image.ndim == 2 or (image.ndim == 3 and image.shape[2] in (2, 4)):
        import PIL.Image

        return PIL.Image.fromarray(image)
    return image
