"""Spark on a cluster of two executors, with workers that serve models/emoji."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pyspark.sql")

import engines_common as common
import numpy
import pyarrow
import pyarrow.parquet
from pyspark.sql import DataFrame, SparkSession

import imagegpt.calls
import imagegpt.spark
from imagegpt import LocalWorker, ModelMismatchError, UnavailableError

pytestmark = pytest.mark.engines

# Name of the applications, by which the processes of this test are known.
APPLICATION = f"imagegpt-test-{os.getpid()}"


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    """Cluster of two executors of one core, in processes of their own."""
    common.prepare_environment()
    session = (
        SparkSession.builder.master("local-cluster[2,1,1024]")
        .appName(APPLICATION)
        .config("spark.ui.enabled", "false")
        .config("spark.driver.bindAddress", "127.0.0.1")
        .config("spark.driver.host", "127.0.0.1")
        .config("spark.executor.memory", "512m")
        .config("spark.executorEnv.PYTHONPATH", os.environ["PYTHONPATH"])
        .config("spark.executorEnv.PYTHONDONTWRITEBYTECODE", "1")
        .config("spark.task.maxFailures", "3")
        .config("spark.sql.shuffle.partitions", "4")
        .config("spark.sql.files.maxPartitionBytes", "32k")
        .config("spark.sql.files.openCostInBytes", "0")
        .config("spark.sql.files.minPartitionNum", "4")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    yield session
    session.stop()


@pytest.fixture(scope="module")
def worker() -> Iterator[LocalWorker]:
    with common.worker() as started:
        yield started


def test_the_table_is_that_of_the_program(
    spark: SparkSession, worker: LocalWorker, tmp_path: Path
) -> None:
    table = common.with_bad_rows(common.pictures(), str(tmp_path / "none.png"))
    source = common.write_in_files(table, tmp_path / "in", 3)
    df = spark.read.parquet(str(source))
    vectors = imagegpt.spark.embed(df, worker.endpoint, image_column="image")
    names = ["id", "label", "embedding", "error_code", "error"]
    assert vectors.columns == names
    assert vectors.schema["embedding"].dataType.simpleString() == "array<float>"
    vectors.write.parquet(str(tmp_path / "out"))
    ours = pyarrow.parquet.read_table(tmp_path / "out")
    assert ours.num_rows == table.num_rows
    common.compared(ours, common.by_program(source, worker.endpoint, tmp_path / "program"))


def test_layers_options_and_ids(spark: SparkSession, worker: LocalWorker, tmp_path: Path) -> None:
    table = common.with_bad_rows(common.pictures()[:12], str(tmp_path / "none.png"))
    source = common.write_in_files(table, tmp_path / "in", 1)
    vectors = imagegpt.spark.embed(
        spark.read.parquet(str(source)),
        worker.endpoint,
        image_column="image",
        id_column="id",
        columns=["label"],
        layers=[2, 4],
        alpha="white",
        normalize=True,
    )
    flags = ["--layers=2,4", "--alpha=white", "--normalize"]
    program = common.by_program(source, worker.endpoint, tmp_path / "program", *flags)
    common.compared(vectors.toArrow(), program)


def test_binary_files(spark: SparkSession, worker: LocalWorker, tmp_path: Path) -> None:
    files = common.pictures()[:6]
    for number, content in enumerate([*files, b"none"]):
        (tmp_path / f"{number} a.png").write_bytes(content)
    df = spark.read.format("binaryFile").load(str(tmp_path))
    ours = imagegpt.spark.embed(df, worker.endpoint).toArrow().sort_by("path")
    expected = ["path", "modificationTime", "length", "embedding", "error_code", "error"]
    assert ours.column_names == expected
    assert ours["error_code"].to_pylist() == [None] * 6 + ["INVALID_ARGUMENT"]
    kept = expected[:3]
    assert ours.select(kept) == df.select(kept).toArrow().sort_by("path")
    vectors = numpy.array(ours["embedding"].to_pylist()[:6], numpy.float32)
    assert numpy.array_equal(vectors, worker.embed(files))
    # The column of paths, as URLs, gives the same vectors.
    by_path = imagegpt.spark.embed(
        df, worker.endpoint, image_column="path", id_column="length", columns=["path"]
    )
    assert by_path.columns == ["id", "path", "embedding", "error_code", "error"]
    again = by_path.toArrow().sort_by("path")
    assert again["id"].to_pylist() == [str(len(content)) for content in [*files, b"none"]]
    assert again["embedding"].to_pylist() == ours["embedding"].to_pylist()


def test_tokens_and_empty_tables(spark: SparkSession, worker: LocalWorker) -> None:
    tokens = worker.tokenize(common.pictures()[:2])
    rows = [(index, row.tolist()) for index, row in enumerate(tokens)]
    df = spark.createDataFrame(rows, "n long, image array<int>")
    ours = imagegpt.spark.embed(df, worker.endpoint, image_column="image").toArrow().sort_by("n")
    vectors = numpy.array(ours["embedding"].to_pylist(), numpy.float32)
    assert numpy.array_equal(vectors, worker.embed(list(tokens)))
    none = imagegpt.spark.embed(df.where("n > 5"), worker.endpoint, image_column="image")
    assert none.count() == 0


def test_a_limit_ends_the_streams(spark: SparkSession) -> None:
    with common.worker(fake_engine="1ms") as fake:
        df = table_of(spark, common.many_pictures(600)).coalesce(1)
        vectors = imagegpt.spark.embed(df, fake.endpoint, image_column="image")
        assert len(vectors.take(3)) == 3


def table_of(spark: SparkSession, files: list[bytes]) -> DataFrame:
    rows = [(index, bytearray(content)) for index, content in enumerate(files)]
    return spark.createDataFrame(rows, "id long, image binary")


def test_wrong_columns_and_options_are_found_without_a_job(
    spark: SparkSession, worker: LocalWorker
) -> None:
    df = spark.createDataFrame([(1, "a", 0.5)], "n long, content string, error float")
    for options, kind, text in (
        ({"image_column": "image"}, ValueError, "'image' is none of: n, content, error"),
        ({"image_column": "n"}, TypeError, "bigint"),
        ({}, ValueError, "'error' would be in the output twice"),
        ({"columns": ["m"]}, ValueError, "no column 'm'"),
        ({"columns": [], "id_column": "error"}, TypeError, "float, not text"),
        ({"columns": [], "layers": 99}, ValueError, "layer"),
    ):
        with pytest.raises(kind, match=text):
            imagegpt.spark.embed(df, worker.endpoint, **options)  # type: ignore[arg-type]


def test_no_worker_is_an_error_of_ours(
    spark: SparkSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(imagegpt.calls, "UNAVAILABLE_PATIENCE", 1.0)
    df = table_of(spark, [b"x"])
    with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:9"):
        imagegpt.spark.embed(df, "127.0.0.1:9", image_column="image")


def test_a_worker_that_stays_away_fails_the_job(spark: SparkSession) -> None:
    with common.worker(fake_engine="1ms") as gone:
        df = table_of(spark, common.pictures()[:2]).coalesce(1)
        vectors = imagegpt.spark.embed(df, gone.endpoint, image_column="image", give_up_after=1.0)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        vectors.collect()
    assert "UnavailableError" in str(caught.value)
    assert gone.endpoint in str(caught.value)


def test_another_model_is_an_error_and_no_vector(spark: SparkSession) -> None:
    killed = common.KilledWorker("--fake-engine=1ms")
    killed.start()
    try:
        df = table_of(spark, common.pictures()[:2]).coalesce(1)
        with pytest.raises(ModelMismatchError):
            imagegpt.spark.embed(df, killed.endpoint, image_column="image", digest="sha256:0")
        vectors = imagegpt.spark.embed(df, killed.endpoint, image_column="image")
        killed.kill()
        killed.flags = ("--fake-engine=1ms", "--feature-layer=2")
        killed.start()
        with pytest.raises(Exception) as caught:  # noqa: PT011
            vectors.collect()
        assert "ModelMismatchError" in str(caught.value)
    finally:
        killed.kill()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of 160 rows in eight files."""
    folder = tmp_path_factory.mktemp("many")
    table = common.with_bad_rows(common.many_pictures(155), str(folder / "none.png"))
    return common.write_in_files(table, folder / "in", 8)


@pytest.fixture(scope="module")
def undisturbed(worker: LocalWorker, many: Path, tmp_path_factory: Any) -> common.Program:
    """The table of these rows, as ``imagegpt embed`` writes it."""
    return common.by_program(many, worker.endpoint, tmp_path_factory.mktemp("program") / "out")


def disturbed(
    spark: SparkSession, endpoint: str, many: Path, output: Path, disturb: Callable[[], None]
) -> pyarrow.Table:
    """Embeds the rows, and calls ``disturb`` when the first task has ended."""
    df = spark.read.parquet(str(many))
    vectors = imagegpt.spark.embed(df, endpoint, image_column="image")
    failures: list[BaseException] = []

    def write() -> None:
        try:
            vectors.write.parquet(str(output))
        except BaseException as error:
            failures.append(error)

    def ended() -> int:
        return len(list(output.glob("_temporary/0/task_*")))

    job = threading.Thread(target=write)
    job.start()
    common.wait_for(lambda: bool(ended() or failures), "a task has ended")
    assert not failures
    assert ended() < 4
    disturb()
    job.join(common.JOB_PATIENCE)
    assert not job.is_alive()
    assert not failures
    return pyarrow.parquet.read_table(output)


def test_a_worker_is_killed_and_started_again(
    spark: SparkSession, many: Path, undisturbed: common.Program, tmp_path: Path
) -> None:
    killed = common.KilledWorker()
    killed.start()

    def disturb() -> None:
        killed.kill()
        killed.start()

    try:
        ours = disturbed(spark, killed.endpoint, many, tmp_path / "out", disturb)
    finally:
        killed.kill()
    common.compared(ours, undisturbed)


def processes(parents: set[int] | None, *words: str) -> set[int]:
    """Returns the ids of the processes of these parents whose command has the words."""
    found = set()
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_text(errors="replace")
        except OSError:
            continue
        if (parents is None or parent in parents) and all(word in command for word in words):
            found.add(int(folder.name))
    return found


def executors(spark: SparkSession) -> set[int]:
    """Returns the process ids of this cluster's executors."""
    driver = f"CoarseGrainedScheduler@127.0.0.1:{spark.conf.get('spark.driver.port')}"
    return processes(None, "CoarseGrainedExecutorBackend", driver)


@pytest.mark.parametrize("kind", ["executor", "python"])
def test_an_executor_or_its_python_is_killed(
    spark: SparkSession,
    worker: LocalWorker,
    many: Path,
    undisturbed: common.Program,
    tmp_path: Path,
    kind: str,
) -> None:
    killed: list[int] = []

    def disturb() -> None:
        victims = executors(spark)
        assert len(victims) == 2
        if kind == "python":
            daemons = processes(victims, "pyspark.daemon")
            victims = processes(daemons, "pyspark.daemon")
        killed.append(min(victims))
        os.kill(killed[0], signal.SIGKILL)

    ours = disturbed(spark, worker.endpoint, many, tmp_path / "out", disturb)
    assert len(killed) == 1
    common.compared(ours, undisturbed)
    common.wait_for(lambda: len(executors(spark)) == 2, "there are two executors again")
