"""Embeddings as columns of Hugging Face datasets, without a network."""

import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# Before the library reads it: nothing here needs a network.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import numpy
import PIL.Image
import pytest
from datasets import Dataset, Image, load_dataset
from datasets.fingerprint import Hasher

from imagegpt import Client, InvalidImageError, LocalWorker, UnavailableError
from imagegpt.datasets import Embedder


@pytest.fixture(scope="session")
def paths(pictures: list[Path]) -> list[str]:
    return [str(picture) for picture in pictures[:12]]


@pytest.fixture(scope="session")
def vectors(emoji: LocalWorker, paths: list[str]) -> Any:
    return emoji.embed(paths, layers=[2, 8])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.enable_caching()
    datasets.disable_progress_bars()


def check(rows: Any, vectors: Any) -> None:
    got = numpy.array([row["embedding"] for row in rows], numpy.float32)
    numpy.testing.assert_array_equal(got, vectors[:, 1])
    assert [row["error"] for row in rows] == [""] * len(vectors)


def table(paths: list[str]) -> Dataset:
    return Dataset.from_dict({"image": paths, "number": list(range(len(paths)))})


def test_forms_of_the_column_give_the_same_vectors(
    emoji: LocalWorker, paths: list[str], vectors: Any
) -> None:
    embedder = Embedder(emoji.endpoint, layers=8)
    rows = table(paths)
    as_files = {"image": [Path(path).read_bytes() for path in paths]}
    for given in (
        rows,
        rows.cast_column("image", Image()),
        rows.cast_column("image", Image(decode=False)),
        Dataset.from_dict(as_files),
        Dataset.from_dict({"image": [PIL.Image.open(path) for path in paths]}),
    ):
        mapped = given.map(embedder, batched=True, batch_size=5)
        check(mapped, vectors)
        assert mapped.features["embedding"] == datasets.List(datasets.Value("float32"))
        assert mapped.features["image"] == given.features["image"]


def test_a_directory_of_pictures_is_embedded(
    emoji: LocalWorker, paths: list[str], vectors: Any, tmp_path: Path
) -> None:
    for path in paths:
        target = tmp_path / "pictures" / Path(path).parent.name / Path(path).name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)
    rows = load_dataset(
        "imagefolder", data_dir=str(tmp_path / "pictures"), split="train", cache_dir=str(tmp_path)
    )
    mapped = rows.map(Embedder(emoji.endpoint, layers=8), batched=True)
    check(mapped, vectors)
    assert "label" in mapped.column_names


def test_several_layers_have_a_column_each(
    emoji: LocalWorker, paths: list[str], vectors: Any
) -> None:
    def mapped(**options: Any) -> Dataset:
        return table(paths).map(Embedder(emoji.endpoint, **options), batched=True)

    two = mapped(layers=[2, 8], output="v", error_column="why")
    assert two.column_names == ["image", "number", "v_2", "v_8", "why"]
    numpy.testing.assert_array_equal(numpy.array(two["v_2"], numpy.float32), vectors[:, 0])
    numpy.testing.assert_array_equal(numpy.array(two["v_8"], numpy.float32), vectors[:, 1])
    assert "embedding_8" in mapped(layers=[8]).column_names
    every = mapped(layers="all")
    assert [f"embedding_{layer}" in every.column_names for layer in range(9)] == [True] * 9
    half = mapped(layers=8, dtype="f16", normalize=True)
    assert half.features["embedding"] == datasets.List(datasets.Value("float16"))


@pytest.mark.slow  # gRPC hangs in a forked child now and then.
@pytest.mark.parametrize("was_used", [False, True])
def test_processes_connect_anew(
    emoji: LocalWorker, paths: list[str], vectors: Any, was_used: bool
) -> None:
    embedder = Embedder(emoji.endpoint, layers=8)
    rows = table(paths)
    if was_used:
        embedder({"image": paths[:1]})
        emoji.embed(paths[:1])
    check(rows.map(embedder, batched=True, batch_size=3, num_proc=2), vectors)
    # The parent's connection works as before.
    assert embedder({"image": paths[:1]})["error"] == [""]
    check(pickled(rows, embedder), vectors)


def pickled(rows: Dataset, embedder: Embedder) -> Dataset:
    copy = pickle.loads(pickle.dumps(embedder))
    return rows.map(copy, batched=True, load_from_cache_file=False)


def test_streams_are_embedded_as_they_come(
    emoji: LocalWorker, paths: list[str], vectors: Any
) -> None:
    rows = table(paths).cast_column("image", Image(decode=False)).to_iterable_dataset(2)
    embedder = Embedder(emoji.endpoint, layers=8)
    check(list(rows.map(embedder, batched=True, batch_size=5)), vectors)
    check(
        list(rows.map(embedder, batched=True, features=embedder.features(rows.features))), vectors
    )


def test_the_same_map_again_is_taken_from_the_cache(
    emoji: LocalWorker, paths: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Rows in a file, since rows in memory are not cached.
    table(paths).save_to_disk(tmp_path / "rows")
    rows = Dataset.load_from_disk(tmp_path / "rows")
    calls = []
    embed = Client.embed
    monkeypatch.setattr(
        Client, "embed", lambda *args, **more: calls.append(1) or embed(*args, **more)
    )
    embedder = Embedder(emoji.endpoint, layers=8)
    first = rows.map(embedder, batched=True)
    assert len(calls) == 1
    # The same one after use, an equal one, and a copy.
    equal = Embedder(emoji.endpoint, layers=numpy.int64(8))  # type: ignore[arg-type]
    for again in (embedder, equal, pickle.loads(pickle.dumps(embedder))):
        assert rows.map(again, batched=True)._fingerprint == first._fingerprint
    assert len(calls) == 1
    other = rows.map(Embedder(emoji.endpoint, layers=7), batched=True)
    assert other._fingerprint != first._fingerprint
    assert len(calls) == 2


def test_another_process_has_the_same_fingerprint() -> None:
    program = (
        "from imagegpt.datasets import Embedder; from datasets.fingerprint import Hasher\n"
        "print(Hasher.hash(Embedder('127.0.0.1:1', layers=(2, 8), alpha='white')))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment, timeout=60
    )
    here = Hasher.hash(Embedder("127.0.0.1:1", layers=[2, 8], alpha="white"))
    assert done.stdout.strip() == here


def test_the_format_is_kept(emoji: LocalWorker, paths: list[str], vectors: Any) -> None:
    embedder = Embedder(emoji.endpoint, layers=8)
    rows = table(paths).cast_column("image", Image()).with_format("numpy")
    mapped = rows.map(embedder, batched=True)
    assert mapped.format["type"] == "numpy"
    assert isinstance(mapped[0]["embedding"], numpy.ndarray)
    numpy.testing.assert_array_equal(mapped[:]["embedding"], vectors[:, 1])
    gray = [PIL.Image.open(path).convert("L") for path in paths]
    dim = Dataset.from_dict({"image": gray}).with_format("numpy").map(embedder, batched=True)
    numpy.testing.assert_array_equal(dim[:]["embedding"], emoji.embed(gray, layers=8))
    narrow = table(paths).with_format("numpy", columns=["image"]).map(embedder, batched=True)
    numpy.testing.assert_array_equal(
        narrow.with_format("numpy")[:]["embedding"].astype(numpy.float32), vectors[:, 1]
    )


def test_rows_that_fail_are_null_with_a_reason(
    emoji: LocalWorker, paths: list[str], vectors: Any, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    images = [*paths[:3], str(broken), None, "missing.png"]
    embedder = Embedder(emoji.endpoint, layers=[2, 8])
    rows = Dataset.from_dict({"image": images})
    for given in (rows, rows.cast_column("image", Image(decode=False))):
        mapped = given.map(embedder, batched=True, batch_size=3)
        assert mapped["error"][:3] == [""] * 3
        assert mapped["embedding_8"][3:] == [None] * 3
        numpy.testing.assert_array_equal(
            numpy.array(mapped["embedding_8"][:3], numpy.float32), vectors[:3, 1]
        )
        reasons = mapped["error"][3:]
        assert reasons[0].startswith("INVALID_ARGUMENT: ")
        assert "null" in reasons[1]
        assert "missing.png cannot be read" in reasons[2]
    raising = Embedder(emoji.endpoint, layers=8, on_error="raise")
    with pytest.raises(InvalidImageError, match="image 3"):
        rows.map(raising, batched=True)


def test_features_give_types_to_a_first_batch_that_fails(
    emoji: LocalWorker, paths: list[str]
) -> None:
    rows = Dataset.from_dict({"image": ["missing.png", *paths[:1]]})
    embedder = Embedder(emoji.endpoint, layers=8)
    with pytest.raises(TypeError, match="features="):
        rows.map(embedder, batched=True, batch_size=1)
    types = embedder.features(rows.features)
    mapped = rows.map(embedder, batched=True, batch_size=1, features=types)
    assert mapped.features == types
    assert mapped[0]["embedding"] is None
    assert len(mapped[1]["embedding"]) == 192


def test_wrong_arguments_are_refused(paths: list[str]) -> None:
    for words, arguments in {
        "pooling='none'": {"pooling": "none"},
        "on_error='nan'": {"on_error": "nan"},
        "alpha='black'": {"alpha": "black"},
        "ascending": {"layers": [8, 2]},
        "port": {"endpoints": "localhost"},
    }.items():
        with pytest.raises(ValueError, match=words):
            Embedder(**{"endpoints": "127.0.0.1:1", **arguments})  # type: ignore[arg-type]
    with pytest.raises(KeyError, match="no column 'picture'; it has 'image', 'number'"):
        table(paths).map(Embedder("127.0.0.1:1", column="picture"), batched=True)
    with pytest.raises(TypeError, match="batched=True"):
        table(paths).map(Embedder("127.0.0.1:1"))


def test_a_worker_that_is_not_there_is_an_error(paths: list[str]) -> None:
    with pytest.raises(UnavailableError):
        table(paths).map(Embedder("127.0.0.1:9", timeout=0.5), batched=True)


def test_all_layers_are_those_of_one_run(models: Path, paths: list[str]) -> None:
    with LocalWorker(models / "emoji", fake_engine="0ms") as worker:
        rows = table(paths[:3]).map(Embedder(worker.endpoint, layers="all"), batched=True)
    names = [name for name in rows.column_names if name.startswith("embedding")]
    assert names == [f"embedding_{layer}" for layer in range(7)]


def test_columns_of_arrays_are_pictures(emoji: LocalWorker, paths: list[str], vectors: Any) -> None:
    pixels = [numpy.asarray(PIL.Image.open(path).convert("RGB")) for path in paths[:3]]
    shape = pixels[0].shape
    features = datasets.Features({"image": datasets.Array3D(shape, "uint8")})
    rows = Dataset.from_dict({"image": pixels}, features=features)
    embedder = Embedder(emoji.endpoint, layers=8)
    plain = rows.map(embedder, batched=True)
    assert plain["error"][:] == [""] * 3
    formatted = rows.with_format("numpy").map(embedder, batched=True)
    assert list(formatted["error"]) == [""] * 3


def test_names_of_columns_that_are_equal_are_refused() -> None:
    with pytest.raises(ValueError, match="three names"):
        Embedder("host:1", output="x", error_column="x")
    with pytest.raises(ValueError, match="three names"):
        Embedder("host:1", output="image")
