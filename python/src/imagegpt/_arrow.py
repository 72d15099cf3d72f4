"""Tables of images to tables of vectors, which the adapters of Ray and Spark share."""

from __future__ import annotations

import os
import time
import urllib.parse
import urllib.request
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, TypedDict

import numpy

from imagegpt.client import Client
from imagegpt.errors import (
    DeadlineExceededError,
    ImageError,
    ModelMismatchError,
    UnavailableError,
)
from imagegpt.options import Alpha, Context, Dtype, EmbedOptions, Fit, Layers, Norm, Pooling
from imagegpt.stream import check_stream_options

if TYPE_CHECKING:
    import pyarrow
    from numpy.typing import NDArray

__all__ = [
    "EmbedJob",
    "EmbedJobOptions",
    "embed_batches",
    "images_of",
    "output_schema",
    "prepared",
    "vector_arrays",
]

# Bytes of vectors in one batch of output, and its rows: few enough that a slow model
# gives a batch out every half minute, and enough that batches cost nothing.
_CHUNK_BYTES = 16 << 20
_CHUNK_ROWS = 256
# Shortest and longest time in seconds for one try to reach a worker.
_TRY_MIN, _TRY_MAX = 0.1, 30.0


@dataclass(frozen=True)
class EmbedJob:
    """What each task of a job has to do; may be pickled."""

    #: Arguments of the task's :class:`~imagegpt.Client`, with the model's digest.
    #: Not shown, since a token may be among them.
    client: Mapping[str, Any] = field(repr=False)
    #: Arguments of :meth:`~imagegpt.Client.embed_stream`.
    stream: Mapping[str, Any]
    image_column: str
    id_column: str | None
    #: Columns of the input that are kept; ``None`` for all but the image and the id.
    columns: tuple[str, ...] | None
    #: Columns of vectors, one for each layer.
    vector_columns: tuple[str, ...]
    error_column: str
    #: Number of elements of a vector.
    dimension: int
    dtype: Dtype
    #: True for vectors as fixed-size lists, False for lists of float32, which Spark
    #: needs.
    has_fixed_size: bool = True

    def kept(self, names: Sequence[str]) -> tuple[str, ...]:
        """Returns the columns that are kept of a table with these columns.

        Raises:
            ValueError: The table lacks a column, or has one that is called like a
                column of the output.
        """
        own = [] if self.id_column is None else [self.id_column]
        if self.columns is None:
            columns = tuple(name for name in names if name not in (self.image_column, *own))
        else:
            columns = self.columns
        for name in (self.image_column, *own, *columns):
            if name not in names:
                found = ", ".join(names)
                raise ValueError(f"the table has no column {name!r}, but has: {found}")
        made = self.made()
        for name in columns:
            if name in made or columns.count(name) > 1:
                raise ValueError(
                    f"column {name!r} would be in the output twice; name the columns to keep in "
                    "columns=, or others for vectors and errors in vector_column= and "
                    "error_column="
                )
        return columns

    def made(self) -> tuple[str, ...]:
        """Returns the columns of the output that the input does not have."""
        own = () if self.id_column is None else ("id",)
        return (*own, *self.vector_columns, f"{self.error_column}_code", self.error_column)

    def open(self) -> Client:
        """Returns a client for one task, once a worker answers.

        A client that has reached a worker waits ``give_up_after`` for it later, so
        that a task that begins while workers restart does not fail.

        Raises:
            UnavailableError, DeadlineExceededError: No worker answered within
                ``give_up_after``.
        """
        client = Client(**self.client)
        end = time.monotonic() + float(self.stream["give_up_after"])
        while True:
            try:
                client.model(timeout=max(_TRY_MIN, min(end - time.monotonic(), _TRY_MAX)))
                return client
            except ModelMismatchError:
                # One worker of several may be rolled over; the stream decides.
                return client
            except (UnavailableError, DeadlineExceededError):
                if time.monotonic() >= end:
                    client.close()
                    raise
            except BaseException:
                client.close()
                raise


class EmbedJobOptions(TypedDict, total=False):
    """Options that the adapters of Ray and Spark share."""

    #: Name of the column of vectors, or the beginning of the names of several layers'.
    vector_column: str
    #: Name of the column of errors, and the beginning of that of their codes.
    error_column: str
    layers: Layers
    pooling: Pooling
    fit: Fit | None
    alpha: Alpha | None
    context: Context
    norm: Norm
    normalize: bool
    dtype: Dtype
    window: int
    item_timeout: float
    give_up_after: float
    timeout: float | None
    digest: str | None
    tls: bool | None
    tls_ca: str | os.PathLike[str] | None
    tls_client_cert: str | os.PathLike[str] | None
    tls_client_key: str | os.PathLike[str] | None
    token: str | None
    token_file: str | os.PathLike[str] | None


def prepared(
    endpoints: str | Sequence[str] | None,
    *,
    image_column: str,
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    vector_column: str = "embedding",
    error_column: str = "error",
    layers: Layers = None,
    pooling: Pooling = "mean",
    fit: Fit | None = None,
    alpha: Alpha | None = None,
    context: Context = "raw",
    norm: Norm = "pre-attn-rms",
    normalize: bool = False,
    dtype: Dtype = "f32",
    window: int = 0,
    item_timeout: float = 60.0,
    give_up_after: float = 600.0,
    **client: Any,
) -> EmbedJob:
    """Checks the options, asks the workers for their model, and lets them embed one
    image, so that a job that cannot succeed fails before it begins. ``client`` are
    arguments of :class:`~imagegpt.Client`.

    Raises:
        TypeError, ValueError: An option has a value that no worker takes.
        WorkerError: No worker answers, or the model does not have these features.
    """
    if pooling == "none":
        raise ValueError("pooling='none' is no vector per image; use 'mean' or 'last'")
    if isinstance(columns, str):
        raise TypeError(f"columns={columns!r} is no list; write columns=[{columns!r}]")
    check_stream_options(window, item_timeout, give_up_after)
    options = EmbedOptions.checked(layers, pooling, fit, alpha, context, norm, normalize, dtype)
    features: dict[str, Any] = {
        "pooling": pooling,
        "fit": fit,
        "alpha": alpha,
        "context": context,
        "norm": norm,
        "normalize": normalize,
        "dtype": dtype,
    }
    arguments = {
        # A task uses the endpoints that this program has.
        "endpoints": os.environ.get("IMAGEGPT_ENDPOINT") if endpoints is None else endpoints,
        **client,
    }
    with Client(**arguments) as workers:
        model = workers.model()
        # The numbers of "all", so that all tasks have the same layers.
        numbers = options.numbers(model)
        features["layers"] = numbers if options.has_layer_axis else layers
        blank = numpy.zeros(model.positions, numpy.int64)
        workers.embed([blank], **features)
    arguments["digest"] = model.digest
    streams = {"window": window, "item_timeout": item_timeout, "give_up_after": give_up_after}
    return EmbedJob(
        client=arguments,
        stream={**features, **streams},
        image_column=image_column,
        id_column=id_column,
        columns=None if columns is None else tuple(columns),
        vector_columns=_vector_columns(vector_column, numbers, options.has_layer_axis),
        error_column=error_column,
        dimension=model.dimension,
        dtype=dtype,
    )


def _vector_columns(name: str, layers: Sequence[int], has_layer_axis: bool) -> tuple[str, ...]:
    return tuple(f"{name}_{layer}" for layer in layers) if has_layer_axis else (name,)


def images_of(column: pyarrow.Array[Any]) -> Iterator[Any]:
    """Yields the cells of a column as images, one after the other, so that only the
    images on their way are held twice; ``None`` for null.

    The column has the bytes of image files, paths or ``file:`` URLs,
    ``struct<bytes, path>``, arrays of pixels (height, width, 3) or of tokens
    (positions,) as tensors or lists.

    Raises:
        TypeError: The column has another type.
    """
    import pyarrow.types as types

    kind: Any = column.type
    if types.is_dictionary(kind):
        column = column.dictionary_decode()  # type: ignore[attr-defined]
        kind = column.type
    if types.is_null(kind):
        convert: Callable[[Any], Any] = _nothing
    elif _is_bytes(kind):
        convert = _content
    elif _is_text(kind):
        convert = _path
    elif types.is_struct(kind) and {"bytes", "path"} & {field.name for field in kind}:
        convert = _row
    elif _is_tensor(kind):
        convert = _tensor
    elif _is_list(kind):
        convert = _list
    else:
        raise TypeError(
            f"a column of {kind} has no images; give the bytes of image files, paths, "
            "struct<bytes, path>, or tensors of pixels"
        )
    for cell in column:
        yield convert(cell) if cell.is_valid else None


def _is_bytes(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _is_text(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind))


def _is_list(kind: Any) -> bool:
    import pyarrow.types as types

    return bool(types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind))


def _is_tensor(kind: Any) -> bool:
    import pyarrow

    return isinstance(kind, pyarrow.BaseExtensionType)


def _nothing(cell: Any) -> None:
    return None


def _content(cell: Any) -> Any:
    return memoryview(cell.as_buffer())


def _path(cell: Any) -> str:
    return _local(cell.as_py())


def _row(cell: Any) -> dict[str, Any]:
    row = cell.as_py()
    path = row.get("path")
    return {"bytes": row.get("bytes"), "path": _local(path) if isinstance(path, str) else path}


def _local(path: str) -> str:
    """Returns the path of a ``file:`` URL, which Spark writes for paths."""
    if not path.startswith("file:"):
        return path
    return urllib.request.url2pathname(urllib.parse.urlsplit(path).path)


def _tensor(cell: Any) -> NDArray[Any]:
    if hasattr(cell, "to_numpy"):
        return numpy.asarray(cell.to_numpy())
    return numpy.asarray(cell.as_py())


def _list(cell: Any) -> Any:
    """Returns lists of whole numbers as pixels or tokens; a list that is neither as an
    array that the client refuses."""
    try:
        array = numpy.asarray(cell.as_py())
    except ValueError:  # Rows of different lengths.
        return numpy.zeros((0, 0))
    is_pixels = array.ndim == 3 and array.dtype.kind in "iu" and array.size
    if is_pixels and array.min() >= 0 and array.max() <= 255:
        return array.astype(numpy.uint8)
    return array


def output_schema(job: EmbedJob, schema: pyarrow.Schema) -> pyarrow.Schema:
    """Returns the schema of the output for that of the input.

    Raises:
        TypeError: The column of ids is neither text nor whole numbers.
        ValueError: As :meth:`EmbedJob.kept`.
    """
    import pyarrow
    import pyarrow.types as types

    kept = [schema.field(name) for name in job.kept(schema.names)]
    if job.id_column is not None:
        kind = schema.field(job.id_column).type
        value = kind.value_type if types.is_dictionary(kind) else kind
        if not (_is_text(value) or types.is_integer(value) or types.is_null(value)):
            raise TypeError(f"id_column={job.id_column!r} has {kind}, not text or whole numbers")
        kept = [pyarrow.field("id", pyarrow.string()), *kept]
    if job.has_fixed_size:
        element = pyarrow.float16() if job.dtype == "f16" else pyarrow.float32()
        vector: pyarrow.DataType = pyarrow.list_(element, job.dimension)
    else:
        vector = pyarrow.list_(pyarrow.float32())
    made = [pyarrow.field(name, vector) for name in job.vector_columns]
    errors = (f"{job.error_column}_code", job.error_column)
    made += [pyarrow.field(name, pyarrow.string()) for name in errors]
    return pyarrow.schema([*kept, *made])


@dataclass(frozen=True)
class _Pending:
    """Rows whose images are on their way: their other columns, without the images."""

    schema: pyarrow.Schema
    columns: tuple[pyarrow.Array[Any], ...]
    rows: int
    done: int = 0


def embed_batches(
    client: Client, job: EmbedJob, batches: Iterable[pyarrow.RecordBatch]
) -> Iterator[pyarrow.RecordBatch]:
    """Embeds the images of batches, in one stream over all of them.

    A batch of output has rows of one batch of input, in their order, and bounded
    size. The stream is ordered, for two reasons: the other columns of a batch are held
    only until its rows are answered, and a task that is run again gives the same rows
    in the same batches, which both engines count on when they put together what the
    first and the second run of a task gave out.

    Raises:
        WorkerError: As :meth:`~imagegpt.Client.embed_stream`.
    """
    pending: deque[_Pending] = deque()

    def images() -> Iterator[tuple[int, Any]]:
        number = 0
        for batch in batches:
            if not batch.num_rows:
                continue
            pending.append(_pending(job, batch))
            column = batch.column(batch.schema.get_field_index(job.image_column))
            del batch
            for image in images_of(column):
                yield number, image
                number += 1

    row_bytes = len(job.vector_columns) * job.dimension * 4
    rows_max = max(1, min(_CHUNK_ROWS, _CHUNK_BYTES // row_bytes))
    outcomes: list[NDArray[Any] | ImageError] = []
    # The pairs' ids are the numbers of rows within the task, which errors name.
    for _, outcome in client.embed_stream(images(), ordered=True, **job.stream):
        outcomes.append(outcome)
        first = pending[0]
        if len(outcomes) == min(rows_max, first.rows - first.done):
            yield _output(job, first, outcomes)
            done = first.done + len(outcomes)
            if done == first.rows:
                pending.popleft()
            else:
                pending[0] = replace(first, done=done)
            outcomes = []


def _pending(job: EmbedJob, batch: pyarrow.RecordBatch) -> _Pending:
    import pyarrow
    import pyarrow.compute

    schema = output_schema(job, batch.schema)
    columns = [batch.column(batch.schema.get_field_index(n)) for n in job.kept(batch.schema.names)]
    if job.id_column is not None:
        ids = batch.column(batch.schema.get_field_index(job.id_column))
        columns.insert(0, pyarrow.compute.cast(ids, pyarrow.string()))
    return _Pending(schema, tuple(columns), batch.num_rows)


def _output(
    job: EmbedJob, pending: _Pending, outcomes: list[NDArray[Any] | ImageError]
) -> pyarrow.RecordBatch:
    import pyarrow

    rows = len(outcomes)
    arrays = [column.slice(pending.done, rows) for column in pending.columns]
    arrays += vector_arrays(job, outcomes)
    for attribute in ("code", "message"):
        values = [getattr(o, attribute) if isinstance(o, ImageError) else None for o in outcomes]
        arrays.append(pyarrow.array(values, pyarrow.string()))
    return pyarrow.RecordBatch.from_arrays(arrays, schema=pending.schema)


def vector_arrays(
    job: EmbedJob, outcomes: Sequence[NDArray[Any] | ImageError]
) -> list[pyarrow.Array[Any]]:
    """Returns a column per layer of vectors, (d,) or (layers, d) each, in the order of
    the outcomes; null in the place of an error."""
    import pyarrow

    n_layers, d = len(job.vector_columns), job.dimension
    element = numpy.float16 if job.has_fixed_size and job.dtype == "f16" else numpy.float32
    values = numpy.zeros((n_layers, len(outcomes), d), element)
    is_null = numpy.zeros(len(outcomes), bool)
    for row, outcome in enumerate(outcomes):
        if isinstance(outcome, ImageError):
            is_null[row] = True
        else:
            values[:, row] = outcome.reshape(n_layers, d)
    arrays: list[pyarrow.Array[Any]] = []
    for layer in range(n_layers):
        if job.has_fixed_size:
            flat = pyarrow.array(values[layer].reshape(-1))
            mask = pyarrow.array(is_null)
            arrays.append(pyarrow.FixedSizeListArray.from_arrays(flat, d, mask=mask))
            continue
        flat = pyarrow.array(values[layer][~is_null].reshape(-1))
        ends = numpy.cumsum(~is_null, dtype=numpy.int32) * numpy.int32(d)
        offsets = pyarrow.array(numpy.concatenate([numpy.zeros(1, numpy.int32), ends]))
        mask = pyarrow.array(is_null)
        arrays.append(pyarrow.ListArray.from_arrays(offsets, flat, mask=mask))
    return arrays
