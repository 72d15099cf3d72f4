"""Workers that the tests share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from imagegpt import LocalWorker

ROOT = Path(__file__).resolve().parents[2]
MODELS = Path(os.environ.get("IMAGEGPT_MODELS", ROOT / "models"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "engines: needs Ray or Spark")
    config.addinivalue_line("markers", "wheel: needs the package to be installed from its wheel")
    config.addinivalue_line("markers", "slow: takes more than ten seconds")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # gRPC servers within this process keep threads in gRPC, with which a process
    # cannot be forked: the tests that have them come last.
    servers = {"FakeWorker", "Collector"}
    items.sort(key=lambda item: bool(servers & vars(getattr(item, "module", item)).keys()))


@pytest.fixture(scope="session")
def models() -> Path:
    """Directory of the repository's models and pictures."""
    return MODELS


@pytest.fixture(scope="session")
def emoji() -> Iterator[LocalWorker]:
    """Worker with models/emoji and its linear head."""
    head = {"category": MODELS / "emoji/category.safetensors"}
    with LocalWorker(MODELS / "emoji", feature_layer=8, model_name="emoji", head=head) as worker:
        yield worker


@pytest.fixture(scope="session")
def pictures() -> list[Path]:
    """The repository's pictures."""
    return sorted((MODELS / "pictures").rglob("*.png"))
