"""Measures Ray Data and Spark beside the client and `imagegpt embed`.

One worker on this machine embeds the same Parquet files of small images: through
`imagegpt embed`, through `Client.embed_stream` in one process, and through the
adapters with several numbers of streams. `--fake-engine 0ms` measures what the
adapters cost; without it the worker runs models/emoji. Rates are images per second;
those of Ray and Spark are of warm engines, with reading and writing, and that of
`embed` has the start of the program in it. Run with

    PYTHONPATH=python/src:python/tests python scripts/python/bench_engines.py
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import engines_common as common
import pyarrow
import pyarrow.parquet

from imagegpt import Client, find_program

STREAMS = (1, 2, 4)


@contextmanager
def rate(what: str, n: int) -> Iterator[None]:
    """Prints the images per second of a block."""
    begun = time.monotonic()
    yield
    print(f"{what:<32} {n / (time.monotonic() - begun):8.0f} images/s", flush=True)


def write(folder: Path, n: int) -> Path:
    """Writes n images as eight Parquet files."""
    table = pyarrow.table({"id": [str(i) for i in range(n)], "image": common.many_pictures(n)})
    return common.write_in_files(table, folder / "in", 8)


def ray_data(endpoint: str, source: Path, output: Path, n: int) -> None:
    """Measures Ray on one node."""
    import ray
    import ray.data

    import imagegpt.ray

    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    ray.init("local", include_dashboard=False, object_store_memory=500 << 20, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
    for streams in (STREAMS[0], *STREAMS):
        ds = ray.data.read_parquet(str(source)).materialize()
        vectors = imagegpt.ray.embed(ds, endpoint, concurrency=streams)
        batches = vectors.iter_batches(batch_size=None, batch_format="pyarrow")
        # Actors begin with an interpreter, which takes seconds.
        first = next(iter_ := iter(batches)).num_rows
        with rate(f"Ray, {streams} actors, after the first", n - first):
            rest = sum(batch.num_rows for batch in iter_)
        assert first + rest == n
    ray.shutdown()


def spark_sql(endpoint: str, source: Path, output: Path, n: int) -> None:
    """Measures Spark in local mode, with as many partitions as streams."""
    from pyspark.sql import SparkSession

    import imagegpt.spark

    session = (
        SparkSession.builder.master(f"local[{max(STREAMS)}]")
        .config("spark.ui.enabled", "false")
        .config("spark.driver.host", "127.0.0.1")
        .getOrCreate()
    )
    session.sparkContext.setLogLevel("OFF")
    for streams in (STREAMS[0], *STREAMS):
        df = session.read.parquet(str(source)).repartition(streams).cache()
        assert df.count() == n
        vectors = imagegpt.spark.embed(df, endpoint, image_column="image")
        with rate(f"Spark, {streams} tasks", n):
            vectors.write.mode("overwrite").parquet(str(output))
    session.stop()


def main() -> None:
    """Measures what the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=8000)
    parser.add_argument("--fake-engine")
    parser.add_argument("what", nargs="*", default=["embed", "client", "ray", "spark"])
    arguments = parser.parse_args()
    common.prepare_environment()
    folder = Path(tempfile.mkdtemp(prefix="imagegpt-engines-"))
    n = arguments.images
    try:
        source = write(folder, n)
        flags = {"fake_engine": arguments.fake_engine} if arguments.fake_engine else {}
        with common.worker(**flags) as worker:
            if "embed" in arguments.what:
                command = [str(find_program()), "embed", str(source), "--id-column", "id"]
                command += ["--output", str(folder / "embed"), "--endpoint", worker.endpoint]
                with rate("imagegpt embed", n):
                    subprocess.run(command, check=True, capture_output=True)
            if "client" in arguments.what:
                images = pyarrow.parquet.read_table(source)["image"].to_pylist()
                with Client(worker.endpoint) as client, rate("Client.embed_stream", n):
                    assert sum(1 for _ in client.embed_stream(images)) == n
            if "ray" in arguments.what:
                ray_data(worker.endpoint, source, folder / "ray", n)
            if "spark" in arguments.what:
                spark_sql(worker.endpoint, source, folder / "spark", n)
    finally:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
