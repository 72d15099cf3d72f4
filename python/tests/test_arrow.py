"""Columns of Arrow as images, and outcomes as columns."""

from __future__ import annotations

import inspect
import pickle
from typing import Any, get_type_hints

import numpy
import pytest

pyarrow = pytest.importorskip("pyarrow")

from imagegpt import Client, InvalidImageError  # noqa: E402
from imagegpt._arrow import (  # noqa: E402
    EmbedJob,
    EmbedJobOptions,
    embed_batches,
    images_of,
    output_schema,
    prepared,
    vector_arrays,
)

STRUCT = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


def a_job(**changes: Any) -> EmbedJob:
    """Returns a job of two elements per vector."""
    arguments: dict[str, Any] = {
        "client": {},
        "stream": {},
        "image_column": "image",
        "id_column": None,
        "columns": None,
        "vector_columns": ("embedding",),
        "error_column": "error",
        "dimension": 2,
        "dtype": "f32",
    }
    return EmbedJob(**{**arguments, **changes})


@pytest.mark.parametrize(
    "kind", [pyarrow.binary(), pyarrow.large_binary(), pyarrow.binary_view(), pyarrow.binary(2)]
)
def test_bytes_are_files(kind: Any) -> None:
    column = pyarrow.array([b"ab", None, b"cd"], kind)
    found = [None if image is None else bytes(image) for image in images_of(column[1:])]
    assert found == [None, b"cd"]


def test_text_is_a_path_and_spark_writes_urls() -> None:
    column = pyarrow.array(["/a b.png", "file:/a%20b.png", "file:///c.png", "s3://b/k", None])
    assert list(images_of(column)) == ["/a b.png", "/a b.png", "/c.png", "s3://b/k", None]
    assert next(images_of(column.dictionary_encode())) == "/a b.png"


def test_structs_of_hugging_face() -> None:
    column = pyarrow.array(
        [{"bytes": b"a", "path": "x"}, {"bytes": None, "path": "file:/x"}, None], STRUCT
    )
    assert list(images_of(column)) == [
        {"bytes": b"a", "path": "x"},
        {"bytes": None, "path": "/x"},
        None,
    ]


def test_tensors_and_lists_are_pixels_or_tokens() -> None:
    pixels = numpy.arange(2 * 4 * 5 * 3, dtype=numpy.uint8).reshape(2, 4, 5, 3)
    tensors = pyarrow.FixedShapeTensorArray.from_numpy_ndarray(pixels)
    for column in (tensors, pyarrow.array(pixels.tolist())):
        found = list(images_of(column))
        assert [image.dtype for image in found] == [numpy.uint8] * 2
        assert numpy.array_equal(numpy.stack(found), pixels)
    tokens = list(images_of(pyarrow.array([[1, 500], None])))
    assert tokens[0].tolist() == [1, 500]
    assert tokens[1] is None
    ragged = next(iter(images_of(pyarrow.array([[[1], [1, 2]]]))))
    assert ragged.ndim == 2


def test_other_columns_are_refused() -> None:
    assert list(images_of(pyarrow.nulls(2))) == [None, None]
    for column in (pyarrow.array([1.5]), pyarrow.array([{"data": b"a"}])):
        with pytest.raises(TypeError, match="has no images"):
            list(images_of(column))


@pytest.mark.parametrize("has_fixed_size", [True, False])
def test_errors_are_null_among_vectors(has_fixed_size: bool) -> None:
    job = a_job(vector_columns=("embedding_1", "embedding_2"), has_fixed_size=has_fixed_size)
    first = numpy.array([[1, 2], [3, 4]], numpy.float32)
    error = InvalidImageError(0, "NOT_FOUND", "a")
    columns = vector_arrays(job, [error, first, error, first + 4])
    for column in columns:
        column.validate(full=True)
    assert columns[0].to_pylist() == [None, [1, 2], None, [5, 6]]
    assert columns[1].to_pylist() == [None, [3, 4], None, [7, 8]]
    kind = columns[0].type
    assert (kind == pyarrow.list_(pyarrow.float32(), 2)) == has_fixed_size


def test_halves_are_kept_where_the_engine_has_them() -> None:
    vector = numpy.array([1.5, 0.1], numpy.float16)
    ray = vector_arrays(a_job(dtype="f16"), [vector])[0]
    assert ray.type == pyarrow.list_(pyarrow.float16(), 2)
    spark = vector_arrays(a_job(dtype="f16", has_fixed_size=False), [vector])[0]
    assert spark.type == pyarrow.list_(pyarrow.float32())
    assert spark.to_pylist() == [vector.astype(numpy.float32).tolist()]


def test_the_columns_of_the_output() -> None:
    schema = pyarrow.schema(
        [("key", pyarrow.int64()), ("image", pyarrow.binary()), ("b", pyarrow.date32())]
    )
    assert output_schema(a_job(), schema).names == ["key", "b", "embedding", "error_code", "error"]
    by_id = output_schema(a_job(id_column="key"), schema)
    assert by_id.names == ["id", "b", "embedding", "error_code", "error"]
    assert by_id.field("id").type == pyarrow.string()
    chosen = output_schema(a_job(columns=("image", "key")), schema)
    assert chosen.names[:3] == ["image", "key", "embedding"]
    for changes, text in (
        ({"image_column": "picture"}, "no column 'picture', but has: key, image, b"),
        ({"columns": ("c",)}, "no column 'c'"),
        ({"columns": ("b", "b")}, "twice"),
        ({"vector_columns": ("b",)}, "column 'b' would be in the output twice"),
        ({"error_column": "b", "columns": ("b",)}, "twice"),
    ):
        with pytest.raises(ValueError, match=text):
            output_schema(a_job(**changes), schema)
    with pytest.raises(TypeError, match="not text or whole numbers"):
        output_schema(a_job(id_column="b"), schema)


class Answers:
    """Stands in for a client's stream: element 0 of a vector is the image's length."""

    def __init__(self) -> None:
        self.read = 0
        self.given = 0

    def embed_stream(self, images: Any, *, ordered: bool) -> Any:
        assert ordered
        for number, image in images:
            self.read += 1
            assert number == self.given
            self.given += 1
            error = InvalidImageError(number, "INVALID_ARGUMENT", "none")
            yield number, error if image is None else numpy.array([len(image), 0], numpy.float32)


def test_rows_keep_their_order_in_batches_of_bounded_size(monkeypatch: pytest.MonkeyPatch) -> None:
    import imagegpt._arrow as module

    monkeypatch.setattr(module, "_CHUNK_ROWS", 4)
    sizes = [3, 0, 9, 1]
    total = sum(sizes)
    table = pyarrow.table(
        {
            "key": list(range(total)),
            "image": [None if i % 5 == 4 else b"x" * i for i in range(total)],
        }
    ).combine_chunks()
    whole = table.to_batches()[0]
    starts = [sum(sizes[:index]) for index in range(len(sizes))]
    batches = (whole.slice(start, size) for start, size in zip(starts, sizes, strict=True))
    answers = Answers()
    job = a_job()
    found = []
    for batch in embed_batches(answers, job, batches):  # type: ignore[arg-type]
        found.append(batch)
        # What is not asked for is not read.
        assert answers.read == sum(part.num_rows for part in found)
    assert [batch.num_rows for batch in found] == [3, 4, 4, 1, 1]
    result = pyarrow.Table.from_batches(found)
    assert result.schema == output_schema(job, table.schema)
    assert result["key"].to_pylist() == list(range(total))
    vectors = result["embedding"].to_pylist()
    assert vectors == [None if i % 5 == 4 else [i, 0] for i in range(total)]
    codes = result["error_code"].to_pylist()
    assert codes == ["INVALID_ARGUMENT" if i % 5 == 4 else None for i in range(total)]


def test_the_options_are_those_of_a_job_and_a_client() -> None:
    parameters = inspect.signature(prepared).parameters
    own = {name for name in parameters if name not in ("endpoints", "client")}
    client = set(inspect.signature(Client).parameters) - {"endpoints"}
    columns = {"image_column", "id_column", "columns"}
    assert set(get_type_hints(EmbedJobOptions)) == (own - columns) | client


def test_wrong_options_are_found_before_a_worker_is_called() -> None:
    for options, kind, text in (
        ({"pooling": "none"}, ValueError, "no vector per image"),
        ({"columns": "label"}, TypeError, r"columns=\['label'\]"),
        ({"fit": "stretch"}, ValueError, "fit='stretch'"),
        ({"layers": [3, 1]}, ValueError, "ascending"),
        ({"give_up_after": 0}, ValueError, "give_up_after"),
        ({"worker": 1}, TypeError, "worker"),
    ):
        with pytest.raises(kind, match=text):
            prepared("127.0.0.1:1", image_column="image", **options)  # type: ignore[arg-type]


def test_a_job_may_be_pickled_and_does_not_show_its_token() -> None:
    job = a_job(client={"endpoints": ["a:1"], "token": "secret"})
    assert pickle.loads(pickle.dumps(job)) == job
    assert "secret" not in repr(job)
