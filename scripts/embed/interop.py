"""Reads the output of `imagegpt embed` with the tools of data engineers, and trains
a linear probe on it.

First, a generated dataset in every format is read with pyarrow, pandas, polars,
DuckDB, Hugging Face datasets and NumPy, and all must read the same data. Then the
emoji on which models/emoji was probed are embedded from a Parquet file, and a
logistic regression on the table, fitted as by `make probe`, must have the accuracy in
models/emoji/category.json. `make interop-embed` runs the script.
"""

import json
import shutil
import sys
from pathlib import Path

import common
import duckdb
import numpy as np
import pandas
import polars
import pyarrow
import pyarrow.feather
import pyarrow.parquet

FOLDER = common.ROOT / "target" / "embed-interop"
IMAGES = 1000
# Largest difference of an accuracy: solvers of regressions change with
# versions.
TOLERANCE = 0.006


def expect(what: str, same: bool) -> None:
    print(f"  {what}: {'same' if same else 'DIFFERENT'}")
    if not same:
        raise SystemExit(1)


def stacked(vectors) -> np.ndarray:
    return np.stack([np.asarray(vector) for vector in vectors])


def read_everywhere() -> None:
    shutil.rmtree(FOLDER / "out", ignore_errors=True)
    source = common.make_parquet(FOLDER / "images", IMAGES, IMAGES // 2)[0].parent
    engine = ("--model", str(common.ROOT / "models" / "untrained"), "--fake-engine", "0s")
    worker = common.Worker(*engine)

    def embed(name: str, *flags: str) -> Path:
        out = FOLDER / "out" / name
        own = ("--keep", "label", "--id-column", "key", "--part-items", "300")
        common.run(str(source), str(out), [worker], *own, *flags)
        return out

    try:
        parquet, half = embed("parquet"), embed("half", "--dtype", "f16")
        arrow, npy = embed("arrow", "--format", "arrow"), embed("npy", "--format", "npy")
    finally:
        worker.kill()
    good = [number for number in range(IMAGES) if not common.is_broken(number)]
    ids = [common.key(number) for number in good]
    labels = [number % 7 for number in good]
    files = sorted(parquet.glob("*.parquet"))
    pattern = str(parquet / "*.parquet")

    table = pyarrow.parquet.read_table(files)
    vectors = stacked(table["embedding"].to_pylist())
    kind = table.schema.field("embedding").type
    print(f"pyarrow {pyarrow.__version__}: {table.num_rows} rows, embedding {kind}")
    expect("ids and labels", table["id"].to_pylist() == ids and table["label"].to_pylist() == labels)
    expect("vectors are fixed-size lists", pyarrow.types.is_fixed_size_list(kind))
    about = json.loads(pyarrow.parquet.read_schema(files[0]).metadata[b"imagegpt"])
    expect("the model's digest in the metadata", about["model"]["digest"].startswith("sha256:"))

    frame = pandas.concat(map(pandas.read_parquet, files))
    print(f"pandas {pandas.__version__}: {frame.shape}")
    expect("ids", frame["id"].tolist() == ids)
    expect("vectors", (stacked(frame["embedding"]) == vectors).all())

    frame = polars.read_parquet(pattern)
    print(f"polars {polars.__version__}: {frame.shape}, embedding {frame.schema['embedding']}")
    expect("ids and labels", frame["id"].to_list() == ids and frame["label"].to_list() == labels)
    expect("vectors", (stacked(frame["embedding"].to_list()) == vectors).all())

    rows = duckdb.sql(f"select id, embedding, label from read_parquet('{pattern}') order by id").fetchall()
    print(f"DuckDB {duckdb.__version__}: {len(rows)} rows")
    expect("ids and labels", [(row[0], row[2]) for row in rows] == list(zip(ids, labels, strict=True)))
    expect("vectors", (stacked(row[1] for row in rows) == vectors).all())
    halves = duckdb.sql(f"select embedding from read_parquet('{half}/*.parquet')").fetchall()
    expect("f16 vectors", np.allclose(stacked(row[0] for row in halves), vectors, atol=1e-3))

    import datasets

    loaded = datasets.load_dataset("parquet", data_files=pattern, split="train", cache_dir=FOLDER / "cache")
    print(f"datasets {datasets.__version__}: {loaded.features}")
    expect("ids", list(loaded["id"]) == ids)
    expect("vectors", (np.asarray(loaded.with_format("numpy")["embedding"]) == vectors).all())

    feathers = [pyarrow.feather.read_table(file) for file in sorted(arrow.glob("*.arrow"))]
    print("Arrow files")
    expect("tables", pyarrow.concat_tables(feathers).equals(table.replace_schema_metadata(feathers[0].schema.metadata)))

    arrays = [np.load(file) for file in sorted((npy / "img_emb").glob("*.npy"))]
    index = pyarrow.parquet.read_table(sorted((npy / "metadata").glob("*.parquet")))
    print(f"NumPy {np.__version__}: {[array.shape for array in arrays]}, index {index.column_names}")
    expect("vectors", (np.concatenate(arrays) == vectors).all())
    expect("ids", index["id"].to_pylist() == ids)

    errors = [json.loads(line) for file in sorted((parquet / "errors").glob("*")) for line in file.open()]
    broken = [common.key(number) for number in range(IMAGES) if common.is_broken(number)]
    print(f"errors: {errors[0]}")
    expect("every broken image is named", [error["id"] for error in errors] == broken)


def probe() -> None:
    """Fits the probe that `make probe` chose once more, by scikit-learn, on features from a table."""
    sys.path.insert(0, str(common.ROOT / "models" / "train"))
    import data
    from sklearn.linear_model import LogisticRegression

    report = json.loads((data.MODEL / "category.json").read_text())
    expected, n_right = report["chosen"], round(report["test"]["accuracy"] * report["test"]["examples"])
    emoji = data.load()
    source, out, classes = FOLDER / "emoji.parquet", FOLDER / "emoji", FOLDER / "classes"
    # The head may be another than in an earlier run.
    shutil.rmtree(classes, ignore_errors=True)
    columns = {
        "image": pyarrow.array([one.png for one in emoji], pyarrow.binary()),
        "name": [one.short_name for one in emoji],
        "split": [one.split for one in emoji],
        "category": [one.category for one in emoji],
    }
    # A table that an earlier run has written is not written again: the job
    # resumes.
    if not source.exists():
        pyarrow.parquet.write_table(pyarrow.table(columns), source)
    worker = common.Worker(
        *("--model", str(data.MODEL), "--feature-layer", str(expected["layer"])),
        *("--execution-provider", "cpu", "--cache-dir", str(FOLDER / "models")),
        *("--head", f"category={data.MODEL / 'category.safetensors'}"),
    )
    flags = ("--id-column", "name", "--keep", "split,category", "--alpha", "white", "--part-items", "256")
    try:
        report = common.run(
            *(str(source), str(out), [worker], *flags, "--layer", str(expected["layer"]), "--item-timeout", "5m"),
            *("--context", expected["context"], "--norm", expected["norm"]),
        )
        common.run(
            str(source), str(classes), [worker], *flags, "--task", "classify", "--head", "category", "--top-k", "2"
        )
    finally:
        worker.kill()
    print(f"models/emoji: {report['images']} emoji, {report['images_per_second']:.1f}/s")
    table = polars.read_parquet(out / "*.parquet")

    def split(name: str) -> tuple[np.ndarray, np.ndarray]:
        rows = table.filter(polars.col("split") == name)
        return rows["embedding"].to_numpy(), rows["category"].to_numpy()

    features, labels = split("train")
    mean, scale = features.mean(axis=0), np.maximum(features.std(axis=0), 1e-6)
    regression = LogisticRegression(C=expected["strength"], max_iter=1000)
    regression.fit((features - mean) / scale, labels)
    for name in ("validation", "test"):
        features, labels = split(name)
        accuracy = regression.score((features - mean) / scale, labels)
        told = expected[f"{name}_accuracy"]
        print(f"linear probe from the table, {name}: {accuracy:.4f} of {len(labels)}; make probe found {told:.4f}")
        if abs(accuracy - told) > TOLERANCE:
            raise SystemExit(f"the accuracy differs by more than {TOLERANCE}")
    found = polars.read_parquet(classes / "*.parquet").filter(polars.col("split") == "test")
    best = found["labels"].list.first() == found["category"]
    print(f"--task classify with the shipped head, test: {best.sum()} of {len(best)} right; make probe found {n_right}")
    if best.sum() != n_right or (found["scores"].list.len() != 2).any():
        raise SystemExit("the classes differ from those that make probe found")


if __name__ == "__main__":
    read_everywhere()
    probe()
