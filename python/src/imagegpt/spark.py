"""Vectors of images in Spark: :func:`embed` takes a DataFrame and returns one.

Needs ``pip install 'imagegpt[spark]'``, for the driver and for the executors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Unpack

from imagegpt._arrow import EmbedJob, EmbedJobOptions, embed_batches, prepared

try:
    import pyarrow
    from pyspark.sql import DataFrame
    from pyspark.sql.types import (
        ArrayType,
        BinaryType,
        DataType,
        FloatType,
        IntegralType,
        NullType,
        StringType,
        StructField,
        StructType,
    )
except ImportError as error:
    raise ImportError(
        "imagegpt.spark needs pyspark, pandas and pyarrow: pip install 'imagegpt[spark]'"
    ) from error

__all__ = ["embed"]


def embed(
    df: DataFrame,
    endpoints: str | Sequence[str] | None = None,
    *,
    image_column: str = "content",
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    **options: Unpack[EmbedJobOptions],
) -> DataFrame:
    """Returns a DataFrame with a vector or an error for each row.

    The workers are asked for their model at once, and embed one image with these
    options; no job of Spark runs until the result is used. All tasks meet the same
    model.

    Args:
        df: DataFrame with a column of images, such as
            ``spark.read.format("binaryFile").load(…)``. Each partition is a task with
            one stream; all share the workers.
        endpoints: Workers, as in :class:`~imagegpt.Client`. The driver and every
            executor must reach them.
        image_column: Column of images: the bytes of image files, paths that every
            executor has, ``struct<bytes, path>`` as Hugging Face has them, or arrays
            of pixels (height, width, 3) or of tokens (positions,).
        id_column: Column of text or whole numbers that becomes the column ``id``, as
            text, as in the tables of ``imagegpt embed``.
        columns: Columns of the input that are kept. Default: all but
            ``image_column`` and ``id_column``.
        options: ``vector_column`` (``"embedding"``): name of the column of vectors,
            with several layers the beginning of the names; ``error_column``
            (``"error"``): name of the column of errors, and the beginning of that of
            codes;

            ``layers``, ``pooling``, ``fit``, ``alpha``, ``context``, ``norm``,
            ``normalize``, ``dtype`` as in :meth:`imagegpt.Client.embed`, without
            ``pooling="none"``. Spark has no float16: with ``dtype="f16"`` vectors are
            rounded to it;

            ``window``, ``item_timeout``, ``give_up_after`` as in
            :meth:`imagegpt.Client.embed_stream`;

            ``timeout``, ``digest``, ``tls``, ``tls_ca``, ``tls_client_cert``,
            ``tls_client_key``, ``token``, ``token_file`` as in
            :class:`~imagegpt.Client`, with paths that every executor has. ``token`` is
            part of the tasks; ``token_file`` is read by each of them.

    Returns:
        DataFrame of as many rows: ``id`` if there is an ``id_column``, the kept
        columns, ``embedding`` (``array<float>`` of d elements) or a column for each of
        several layers (``embedding_8``), ``error_code`` and ``error``, which are null
        where there is a vector. Rows are in the order of their partition.

    Raises:
        TypeError, ValueError: An option has no such value, or a column is missing or
            has another type.
        UnavailableError: No worker answers.
        ModelMismatchError: The workers serve another model than ``digest``.
        InvalidRequestError: The model does not have these features.
    """
    _check_image_column(df.schema, image_column)
    job = prepared(
        endpoints, image_column=image_column, id_column=id_column, columns=columns, **options
    )
    job = replace(job, has_fixed_size=False)
    schema = _schema(job, df.schema)
    # Other columns do not leave the JVM.
    names = dict.fromkeys([image_column, *job.kept(df.columns), *filter(None, [id_column])])
    needed = df.select(*(f"`{name.replace('`', '``')}`" for name in names))
    return needed.mapInArrow(_task(replace(job, columns=job.kept(df.columns))), schema)


def _task(
    job: EmbedJob,
) -> Callable[[Iterator[pyarrow.RecordBatch]], Iterator[pyarrow.RecordBatch]]:
    def task(batches: Iterator[pyarrow.RecordBatch]) -> Iterator[pyarrow.RecordBatch]:
        first = next((batch for batch in batches if batch.num_rows), None)
        if first is None:
            return

        def all_batches() -> Iterator[pyarrow.RecordBatch]:
            nonlocal first
            batch, first = first, None
            if batch is not None:
                yield batch
            del batch
            yield from batches

        with job.open() as client:
            yield from embed_batches(client, job, all_batches())

    return task


def _check_image_column(schema: StructType, name: str) -> None:
    if name not in schema.names:
        raise ValueError(f"image_column={name!r} is none of: {', '.join(schema.names)}")
    kind = schema[name].dataType
    has_images = isinstance(kind, (BinaryType, StringType, ArrayType, NullType)) or (
        isinstance(kind, StructType) and {"bytes", "path"} & set(kind.names)
    )
    if not has_images:
        raise TypeError(
            f"image_column={name!r} has {kind.simpleString()}; give the bytes of image files, "
            "paths, struct<bytes, path>, or arrays of pixels"
        )


def _schema(job: EmbedJob, schema: StructType) -> StructType:
    fields = [schema[name] for name in job.kept(schema.names)]
    if job.id_column is not None:
        kind: DataType = schema[job.id_column].dataType
        if not isinstance(kind, (StringType, IntegralType, NullType)):
            raise TypeError(
                f"id_column={job.id_column!r} has {kind.simpleString()}, not text or whole numbers"
            )
        fields.insert(0, StructField("id", StringType()))
    fields += [StructField(name, ArrayType(FloatType())) for name in job.vector_columns]
    errors = (f"{job.error_column}_code", job.error_column)
    fields += [StructField(name, StringType()) for name in errors]
    return StructType(fields)
