"""Times `imagegpt probe fit` beside scikit-learn's lbfgs, in turns, on the same features.

    bench.py [--rows 50000] [--width 512] [--classes 10] [--layers 16] [--rounds 2]

The features are correlated noise with classes in it, written as a table that `imagegpt
embed` could have written. Both fit every layer at five strengths on four fifths of the
rows and score the rest; scikit-learn reads the same table, standardizes the features
and fits in float32 (its faster setting) at its default tolerance. Each run is a process
of its own, whose time, CPU time and largest resident memory are printed; memory includes
pages of mapped files, which the kernel may drop. `make bench-probe` runs this.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(os.environ.get("IMAGEGPT", ROOT / "target" / "release" / "imagegpt"))
FOLDER = ROOT / "target" / "bench-probe"
STRENGTHS = (0.001, 0.01, 0.1, 1.0, 10.0)
PART_ROWS = 10_000


def make(table: Path, arguments: argparse.Namespace) -> None:
    """Writes the table, with the files that a finished job has."""
    random = np.random.default_rng(0)
    n, width = arguments.rows, arguments.width
    classes = random.integers(0, arguments.classes, n)
    mixing = random.standard_normal((width, width)) / width**0.5
    notes = table / "_imagegpt"
    notes.mkdir(parents=True)
    options = {
        "--task": "embed", "--pooling": "mean", "--normalize": "false", "--context": "raw", "--norm": "pre-attn-rms",
        "--fit": "squash", "--alpha": "drop", "--format": "parquet",
        "--layers": ",".join(map(str, range(arguments.layers))),
    }
    manifest = {"model": {"name": "noise", "digest": "sha256:0"}, "options": options}
    (notes / "manifest.json").write_text(json.dumps(manifest))
    (notes / "summary.json").write_text("{}")
    centers = random.standard_normal((arguments.layers, arguments.classes, width)) * 0.15
    for part, start in enumerate(range(0, n, PART_ROWS)):
        rows = classes[start : start + PART_ROWS]
        parts = ["validation" if number % 5 == 0 else "train" for number in range(start, start + len(rows))]
        columns = {"id": [str(number) for number in range(start, start + len(rows))]}
        for layer in range(arguments.layers):
            noise = random.standard_normal((len(rows), width)) + centers[layer, rows]
            values = pyarrow.array((noise @ mixing).astype("float32").ravel())
            columns[f"embedding_{layer}"] = pyarrow.FixedSizeListArray.from_arrays(values, width)
        columns |= {"label": rows, "part": parts}
        pyarrow.parquet.write_table(
            pyarrow.table(columns), table / f"part-00000-{part:05}.parquet", use_dictionary=["label", "part"], compression="none"
        )


def by_sklearn(table: Path) -> None:
    """Body of the process that fits by scikit-learn."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import log_loss

    files = sorted(table.glob("part-*.parquet"))
    facts = pyarrow.parquet.read_table(files, columns=["label", "part"])
    labels = facts["label"].to_numpy()
    is_train = np.array(facts["part"].to_pylist()) == "train"
    n_layers = len([name for name in pyarrow.parquet.read_schema(files[0]).names if name.startswith("embedding_")])
    best = (np.inf,)
    for layer in range(n_layers):
        column = pyarrow.parquet.read_table(files, columns=[f"embedding_{layer}"])[0].combine_chunks()
        features = column.values.to_numpy().reshape(len(labels), -1)
        features = (features - features[is_train].mean(axis=0)) / features[is_train].std(axis=0)
        for strength in STRENGTHS:
            fit = LogisticRegression(C=strength, max_iter=1000).fit(features[is_train], labels[is_train])
            loss = log_loss(labels[~is_train], fit.predict_proba(features[~is_train]))
            best = min(best, (loss, layer, strength, fit.score(features[~is_train], labels[~is_train])))
    print(json.dumps({"log_loss": best[0], "layer": best[1], "strength": best[2], "accuracy": best[3]}))


def timed(command: list, what: str) -> str:
    began = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{what} failed: {said}")
    seconds = time.monotonic() - began
    cpu = usage.ru_utime + usage.ru_stime
    print(f"{what}: {seconds:.1f} s, {cpu:.1f} CPU s, {usage.ru_maxrss / 1e6:.2f} GB resident", flush=True)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, default in (("rows", 50_000), ("width", 512), ("classes", 10), ("layers", 16), ("rounds", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--sklearn", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.sklearn:
        return by_sklearn(arguments.sklearn)
    shutil.rmtree(FOLDER, ignore_errors=True)
    table = FOLDER / "table"
    make(table, arguments)
    head = FOLDER / "head.safetensors"
    ours = [PROGRAM, "probe", "fit", table, "--output", head, "--label", "label", "--split", "part", "--log", "error"]
    ours += ["--refit", "false", "--strengths", ",".join(map(str, STRENGTHS))]
    theirs = [sys.executable, __file__, "--sklearn", table]
    for _ in range(arguments.rounds):
        timed(ours, "imagegpt probe fit")
        theirs_found = json.loads(timed(theirs, "scikit-learn"))
    found = json.loads(head.with_suffix(".json").read_text())["chosen"]
    print(f"imagegpt: layer {found['layer']}, strength {found['strength']}, log loss {found['validation_log_loss']:.5f}")
    print(
        f"scikit-learn: layer {theirs_found['layer']}, strength {theirs_found['strength']},"
        f" log loss {theirs_found['log_loss']:.5f}"
    )
    shutil.rmtree(table)


if __name__ == "__main__":
    main()
