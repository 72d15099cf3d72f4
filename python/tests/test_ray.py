"""Ray Data on a cluster of two nodes, with workers that serve models/emoji."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

pytest.importorskip("ray.data")

import engines_common as common
import pyarrow
import pyarrow.parquet
import ray.cluster_utils
import ray.data

import imagegpt.calls
import imagegpt.ray
from imagegpt import LocalWorker, ModelMismatchError, UnavailableError

pytestmark = pytest.mark.engines


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Cluster of two nodes of one CPU, in processes of their own."""
    common.prepare_environment()
    # Small stores, since this machine runs both.
    node = {"num_cpus": 1, "object_store_memory": 200 << 20}
    started = ray.cluster_utils.Cluster(
        initialize_head=True, head_node_args={**node, "include_dashboard": False}
    )
    # Before there is another node, since this program must not depend on one that a
    # test takes away.
    ray.init(address=started.address, log_to_driver=False, logging_level="ERROR")
    started.add_node(**node)
    started.wait_for_nodes(common.PATIENCE)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    yield started
    ray.shutdown()
    started.shutdown()


@pytest.fixture(scope="module")
def worker() -> Iterator[LocalWorker]:
    with common.worker() as started:
        yield started


def arrow(ds: Any) -> pyarrow.Table:
    """Returns the rows of a dataset as one table."""
    tables = [table for table in ray.get(ds.to_arrow_refs()) if table.num_rows]
    return pyarrow.concat_tables(tables)


def test_the_table_is_that_of_the_program(
    cluster: Any, worker: LocalWorker, tmp_path: Path
) -> None:
    table = common.with_bad_rows(common.pictures(), str(tmp_path / "none.png"))
    source = common.write_in_files(table, tmp_path / "in", 3)
    ds = ray.data.read_parquet(str(source))
    vectors = imagegpt.ray.embed(ds, worker.endpoint, batch_size=8)
    vectors.write_parquet(str(tmp_path / "out"))
    ours = pyarrow.parquet.read_table(tmp_path / "out")
    assert ours.num_rows == table.num_rows
    assert ours.column_names == ["id", "label", "embedding", "error_code", "error"]
    assert ours.schema.field("embedding").type == pyarrow.list_(pyarrow.float32(), 192)
    common.compared(ours, common.by_program(source, worker.endpoint, tmp_path / "program"))


def test_layers_options_and_ids(cluster: Any, worker: LocalWorker, tmp_path: Path) -> None:
    table = common.with_bad_rows(common.pictures()[:12], str(tmp_path / "none.png"))
    source = common.write_in_files(table, tmp_path / "in", 1)
    vectors = imagegpt.ray.embed(
        ray.data.read_parquet(str(source)),
        worker.endpoint,
        id_column="id",
        columns=["label"],
        layers=[2, 4],
        alpha="white",
        normalize=True,
        dtype="f16",
    )
    ours = arrow(vectors)
    assert ours.schema.field("embedding_4").type == pyarrow.list_(pyarrow.float16(), 192)
    flags = ["--layers=2,4", "--alpha=white", "--normalize", "--dtype=f16"]
    common.compared(ours, common.by_program(source, worker.endpoint, tmp_path / "program", *flags))


def test_pixels_paths_and_other_columns(cluster: Any, worker: LocalWorker, tmp_path: Path) -> None:
    pixels = numpy.random.default_rng(1).integers(0, 256, (5, 16, 16, 3), numpy.uint8)
    expected = worker.embed(list(pixels))
    ds = ray.data.from_numpy(pixels)
    vectors = imagegpt.ray.embed(ds, worker.endpoint, image_column="data", concurrency=(1, 2))
    ours = arrow(vectors)
    assert ours.column_names == ["embedding", "error_code", "error"]
    found = numpy.stack(ours["embedding"].to_numpy())
    assert sorted(found.tolist()) == sorted(expected.tolist())
    # Pixels of several sizes.
    mixed = ray.data.from_items([{"image": pixels[0]}, {"image": pixels[1, :8]}])
    ours = arrow(imagegpt.ray.embed(mixed, worker.endpoint))
    assert ours["error"].null_count == 2
    # Paths, one of which is no file, and a column that is called as the output's.
    file = tmp_path / "a.png"
    file.write_bytes(common.pictures()[0])
    rows = [{"image": str(file), "error": "x"}, {"image": str(tmp_path), "error": "x"}]
    paths = ray.data.from_items(rows)
    ours = arrow(imagegpt.ray.embed(paths, worker.endpoint, error_column="why", columns=[]))
    assert sorted(ours["why_code"].to_pylist(), key=str) == ["NOT_FOUND", None]
    with pytest.raises(Exception, match="column 'error' would be in the output twice"):
        imagegpt.ray.embed(paths, worker.endpoint).materialize()


def test_one_large_block_is_work_for_all_actors(cluster: Any, worker: LocalWorker) -> None:
    table = pyarrow.table({"image": common.many_pictures(64), "n": list(range(64))})
    vectors = imagegpt.ray.embed(ray.data.from_arrow(table), worker.endpoint, batch_size=8)
    blocks = [block.num_rows for block in ray.get(vectors.to_arrow_refs())]
    assert blocks == [8] * 8
    assert imagegpt.ray.embed(ray.data.from_arrow(table[:0]), worker.endpoint).count() == 0


def test_an_own_pipeline(cluster: Any, worker: LocalWorker) -> None:
    job = imagegpt.ray.job(worker.endpoint, layers=[0, 6])
    ds = ray.data.from_items([{"image": content} for content in common.pictures()[:4]])
    vectors = ds.map_batches(
        imagegpt.ray.Embedder,
        fn_constructor_args=(job,),
        batch_format="pyarrow",
        batch_size=2,
        compute=ray.data.ActorPoolStrategy(size=1),
        num_cpus=0,
    )
    assert arrow(vectors).column_names == ["embedding_0", "embedding_6", "error_code", "error"]


def test_options_that_lose_rows_or_cannot_be_served_are_refused(
    cluster: Any, worker: LocalWorker
) -> None:
    ds = ray.data.from_items([{"image": b"x"}])
    with pytest.raises(ValueError, match="layer"):
        imagegpt.ray.embed(ds, worker.endpoint, layers=99)
    with pytest.raises(ValueError, match="between 1 and 87381"):
        imagegpt.ray.embed(ds, worker.endpoint, batch_size=1 << 20)
    ds.context.max_errored_blocks = 3
    try:
        with pytest.raises(ValueError, match="max_errored_blocks=3"):
            imagegpt.ray.embed(ds, worker.endpoint)
    finally:
        ds.context.max_errored_blocks = 0


def chain(error: BaseException | None) -> str:
    """Returns the texts of an error and all its causes."""
    texts = []
    while error is not None and len(texts) < 10:
        texts.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or getattr(error, "cause", None) or error.__context__
    return "\n".join(texts)


def test_no_worker_is_an_error_of_ours(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(imagegpt.calls, "UNAVAILABLE_PATIENCE", 1.0)
    ds = ray.data.from_items([{"image": b"x"}])
    with pytest.raises(UnavailableError, match=r"http://127\.0\.0\.1:9"):
        imagegpt.ray.embed(ds, "127.0.0.1:9")


def test_a_worker_that_stays_away_fails_the_job(cluster: Any) -> None:
    with common.worker(fake_engine="1ms") as gone:
        ds = ray.data.from_items([{"image": content} for content in common.pictures()])
        vectors = imagegpt.ray.embed(ds, gone.endpoint, give_up_after=2.0)
    with pytest.raises(Exception) as caught:  # noqa: PT011
        vectors.materialize()
    text = chain(caught.value)
    assert "UnavailableError" in text
    assert gone.endpoint in text


def test_another_model_is_an_error_and_no_vector(cluster: Any, worker: LocalWorker) -> None:
    killed = common.KilledWorker("--fake-engine=1ms")
    killed.start()
    try:
        with pytest.raises(ModelMismatchError):
            imagegpt.ray.embed(ray.data.range(1), killed.endpoint, digest="sha256:0")
        ds = ray.data.from_items([{"image": content} for content in common.pictures()])
        vectors = imagegpt.ray.embed(ds, killed.endpoint)
        killed.kill()
        killed.flags = ("--fake-engine=1ms", "--feature-layer=2")
        killed.start()
        with pytest.raises(Exception) as caught:  # noqa: PT011
            vectors.materialize()
        assert "ModelMismatchError" in chain(caught.value)
    finally:
        killed.kill()


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of 160 rows in four files."""
    folder = tmp_path_factory.mktemp("many")
    table = common.with_bad_rows(common.many_pictures(155), str(folder / "none.png"))
    return common.write_in_files(table, folder / "in", 4)


@pytest.fixture(scope="module")
def undisturbed(cluster: Any, worker: LocalWorker, many: Path, tmp_path_factory: Any) -> Any:
    """The table of these rows, as ``imagegpt embed`` writes it."""
    return common.by_program(many, worker.endpoint, tmp_path_factory.mktemp("program") / "out")


def disturbed(endpoint: str, many: Path, disturb: Any) -> pyarrow.Table:
    """Embeds the rows, and calls ``disturb`` when the first of them are there."""
    vectors = imagegpt.ray.embed(ray.data.read_parquet(str(many)), endpoint, batch_size=8)
    tables: list[pyarrow.Table] = []

    def read() -> None:
        for table in vectors.iter_batches(batch_size=None, batch_format="pyarrow"):
            tables.append(table)
            if len(tables) == 1:
                disturb()

    common.within(common.JOB_PATIENCE, read)
    assert len(tables) > 4
    return pyarrow.concat_tables(tables)


def test_a_worker_is_killed_and_started_again(
    cluster: Any, many: Path, undisturbed: common.Program
) -> None:
    killed = common.KilledWorker()
    killed.start()

    def disturb() -> None:
        killed.kill()
        killed.start()

    try:
        common.compared(disturbed(killed.endpoint, many, disturb), undisturbed)
    finally:
        killed.kill()


def actors(node: Any) -> list[int]:
    """Returns the process ids of the actors of a node of this cluster."""
    raylets = {info.process.pid for info in node.all_processes["raylet"]}
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            title = (folder / "cmdline").read_bytes()
        except OSError:
            continue
        if parent in raylets and b"Embedder" in title:
            found.append(int(folder.name))
    return found


def test_an_actor_is_killed(
    cluster: Any, worker: LocalWorker, many: Path, undisturbed: common.Program
) -> None:
    killed = []

    def disturb() -> None:
        killed.append(next(pid for node in cluster.list_all_nodes() for pid in actors(node)))
        os.kill(killed[0], signal.SIGKILL)

    common.compared(disturbed(worker.endpoint, many, disturb), undisturbed)
    assert len(killed) == 1


def test_a_node_is_lost(
    cluster: Any, worker: LocalWorker, many: Path, undisturbed: common.Program
) -> None:
    # Two actors on three nodes: at least one of them is not on the head's.
    cluster.add_node(num_cpus=1, object_store_memory=200 << 20)
    cluster.wait_for_nodes(common.PATIENCE)
    lost = []

    def disturb() -> None:
        lost.append(next(node for node in list(cluster.worker_nodes) if actors(node)))
        cluster.remove_node(lost[0], allow_graceful=False)

    common.compared(disturbed(worker.endpoint, many, disturb), undisturbed)
    assert len(lost) == 1
