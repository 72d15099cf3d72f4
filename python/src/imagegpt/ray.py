"""Vectors of images in Ray Data: :func:`embed` takes a dataset and returns one.

Needs ``pip install 'imagegpt[ray]'``, here and on the machines of the cluster.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Unpack

from imagegpt._arrow import EmbedJob, EmbedJobOptions, embed_batches, output_schema, prepared

try:
    import pyarrow
    import ray.data
except ImportError as error:
    raise ImportError(
        "imagegpt.ray needs Ray Data and pyarrow: pip install 'imagegpt[ray]'"
    ) from error

__all__ = ["Embedder", "embed", "job"]

# Rows of a batch unless their vectors are large. One batch is a task of its own: small
# enough that all actors have work, and that little is done again after a failure.
_BATCH_SIZE = 256
# Largest size of the vectors of a batch. Ray cuts the output of a task into blocks by
# bytes, 128 MiB unless told otherwise, and a task that is run again with another error
# text would be cut elsewhere: rows would be there twice or be missing. Half of it
# leaves room for the other columns.
_BATCH_BYTES = 64 << 20
# Runs of a task after its actor or machine was lost. Ray's own default is without end,
# so that a task that ends its process whenever it runs would be run forever.
_TASK_RETRIES = 16


def embed(
    ds: ray.data.Dataset,
    endpoints: str | Sequence[str] | None = None,
    *,
    image_column: str = "image",
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    concurrency: int | tuple[int, int] = 2,
    batch_size: int | None = None,
    num_cpus: float = 0,
    **options: Unpack[EmbedJobOptions],
) -> ray.data.Dataset:
    """Returns a dataset with a vector or an error for each row.

    The workers are asked for their model at once, and embed one image with these
    options; the dataset itself is computed when it is used. All tasks meet the same
    model.

    Args:
        ds: Dataset with a column of images, n rows.
        endpoints: Workers, as in :class:`~imagegpt.Client`. This program and every
            machine of the cluster must reach them.
        image_column: Column of images: the bytes of image files, paths that every
            machine has, ``struct<bytes, path>`` as Hugging Face has them, or arrays of
            pixels (height, width, 3) of uint8.
        id_column: Column of text or whole numbers that becomes the column ``id``, as
            text, as in the tables of ``imagegpt embed``.
        columns: Columns of the input that are kept. Default: all but
            ``image_column`` and ``id_column``.
        concurrency: Number of actors, or the smallest and largest number. Each actor
            has one stream; all share the workers.
        batch_size: Rows of a task. Default: 256, fewer if their vectors are large.
        num_cpus: CPUs that Ray reserves for each actor, which waits for workers most
            of the time.
        options: ``vector_column`` (``"embedding"``): name of the column of vectors,
            with several layers the beginning of the names; ``error_column``
            (``"error"``): name of the column of errors, and the beginning of that of
            codes;

            ``layers``, ``pooling``, ``fit``, ``alpha``, ``context``, ``norm``,
            ``normalize``, ``dtype`` as in :meth:`imagegpt.Client.embed`, without
            ``pooling="none"``;

            ``window``, ``item_timeout``, ``give_up_after`` as in
            :meth:`imagegpt.Client.embed_stream`;

            ``timeout``, ``digest``, ``tls``, ``tls_ca``, ``tls_client_cert``,
            ``tls_client_key``, ``token``, ``token_file`` as in
            :class:`~imagegpt.Client`, with paths that every machine has. Ray stores
            ``token`` with the tasks; ``token_file`` is read by each of them.

    Returns:
        Dataset of n rows: ``id`` if there is an ``id_column``, the kept columns,
        ``embedding`` (``FixedSizeList<float32>[d]``, or of float16) or a column for
        each of several layers (``embedding_8``), ``error_code`` and ``error``, which
        are null where there is a vector. Other columns are as they were.

    Raises:
        ValueError: An option has no such value, or the dataset's context lets Ray drop
            rows (``max_errored_blocks``).
        UnavailableError: No worker answers.
        ModelMismatchError: The workers serve another model than ``digest``.
        InvalidRequestError: The model does not have these features.
    """
    tolerated = ds.context.max_errored_blocks
    if tolerated != 0:
        raise ValueError(
            f"the dataset's context has max_errored_blocks={tolerated}, with which Ray would leave "
            "rows out without an error; set ds.context.max_errored_blocks = 0"
        )
    todo = job(
        endpoints, image_column=image_column, id_column=id_column, columns=columns, **options
    )
    rows = checked_batch_size(todo, batch_size)
    # Batches are made before they meet an actor, so that one large block is work for
    # all actors, and each task gives one block.
    return ds.repartition(target_num_rows_per_block=rows).map_batches(
        Embedder,
        fn_constructor_args=(todo,),
        batch_size=rows,
        batch_format="pyarrow",
        zero_copy_batch=True,
        udf_modifying_row_count=False,
        compute=_actors(concurrency),
        num_cpus=num_cpus,
        max_restarts=-1,
        max_task_retries=_TASK_RETRIES,
    )


def job(
    endpoints: str | Sequence[str] | None = None,
    *,
    image_column: str = "image",
    id_column: str | None = None,
    columns: Sequence[str] | None = None,
    **options: Unpack[EmbedJobOptions],
) -> EmbedJob:
    """Returns the argument of :class:`Embedder`; the workers are asked for their
    model, and embed one image.

    Args:
        endpoints, image_column, id_column, columns, options: As in :func:`embed`.

    Raises:
        ValueError, WorkerError: As :func:`embed`.
    """
    return prepared(
        endpoints, image_column=image_column, id_column=id_column, columns=columns, **options
    )


def checked_batch_size(job: EmbedJob, batch_size: int | None) -> int:
    """Returns the rows of a batch whose vectors are not too large.

    Raises:
        ValueError: The given number is not above 0, or too large.
    """
    largest = max(1, _BATCH_BYTES // (len(job.vector_columns) * job.dimension * 4))
    if batch_size is None:
        return min(_BATCH_SIZE, largest)
    if not 0 < batch_size <= largest:
        raise ValueError(
            f"batch_size={batch_size} is not between 1 and {largest}: a batch has up to "
            f"{_BATCH_BYTES >> 20} MiB of vectors"
        )
    return batch_size


def _actors(concurrency: int | tuple[int, int]) -> ray.data.ActorPoolStrategy:
    if isinstance(concurrency, int):
        return ray.data.ActorPoolStrategy(size=concurrency)
    smallest, largest = concurrency
    return ray.data.ActorPoolStrategy(min_size=smallest, max_size=largest)


class Embedder:
    """Callable class for ``map_batches``, in pipelines of their own.

    Takes and returns tables of Arrow (``batch_format="pyarrow"``); the rows of a table
    are answered when its call returns. Make its argument with :func:`job`::

        job = imagegpt.ray.job("worker:50051", image_column="image")
        ds.map_batches(
            imagegpt.ray.Embedder,
            fn_constructor_args=(job,),
            batch_format="pyarrow",
            batch_size=256,
            compute=ray.data.ActorPoolStrategy(size=2),
        )

    Args:
        job: What to do, from :func:`job`.

    Raises:
        UnavailableError: No worker answered within ``give_up_after``.
    """

    def __init__(self, job: EmbedJob) -> None:
        self._job = job
        self._client = job.open()

    def __call__(self, table: pyarrow.Table) -> pyarrow.Table:
        """Embeds the images of a table.

        Raises:
            WorkerError: As :meth:`imagegpt.Client.embed_stream`.
        """
        if not table.num_rows:
            if self._job.image_column not in table.column_names:
                return table
            return output_schema(self._job, table.schema).empty_table()
        batches = embed_batches(self._client, self._job, table.to_batches())
        return pyarrow.Table.from_batches(batches)
